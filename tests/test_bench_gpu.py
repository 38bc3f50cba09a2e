"""The benchmark's device side with a fake torch.cuda, and the trial run in processes of its own."""

import functools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import a_case, candidate

import fqt_bench.cuda
from fqt_bench import ahead, suites
from fqt_bench.cpu import CpuTimer
from fqt_bench.cuda import CudaTimer, count_launches
from fqt_bench.suites import Plan

# ---- the device's side, with a fake torch.cuda


class _Cuda:
    """Logs what is asked of the device; events are 2.5 ms apart, and start has not been reached by the end's record."""

    def __init__(self):
        self.log = []
        log = self.log

        class Event:
            made = 0

            def __init__(self, enable_timing):
                assert enable_timing
                self.name = ("start", "end")[Event.made % 2]
                Event.made += 1

            def record(self):
                log.append(self.name)

            def query(self):
                log.append(f"query {self.name}")
                return False

            def synchronize(self):
                log.append(f"wait {self.name}")

            def elapsed_time(self, other):
                assert (self.name, other.name) == ("start", "end")
                return 2.5

        self.Event = Event

    def _sleep(self, cycles):
        assert isinstance(cycles, int) and cycles >= 0
        self.log.append(f"sleep {cycles}")

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1000)

    def synchronize(self):
        self.log.append("synchronize")


def test_a_sample_sleeps_flushes_and_runs_between_the_events(monkeypatch):
    cuda = _Cuda()
    monkeypatch.setattr(fqt_bench.cuda, "FLUSH_BYTES", 4096)
    for name in ("Event", "_sleep", "get_device_properties", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    timer = CudaTimer(torch.device("cpu"))
    cuda.log.clear()
    assert timer._written.numel() * 4 >= 2 * 1000 and timer._read.numel() == timer._written.numel()
    timer._written.zero_()
    sample = timer.sample(lambda: cuda.log.append("run"), lead_ms=0.5)
    assert cuda.log == ["sleep 2000000", "start", "run", "end", "query start", "wait end"]  # 4e6 cycles a ms
    assert (sample.device_ms, sample.starved) == (2.5, False) and sample.host_ms >= 0
    assert bool((timer._written == 1).all())
    timer.synchronize()
    assert cuda.log[-1] == "synchronize" and timer.now() <= timer.now()


def test_torch_has_what_the_device_timer_calls():
    assert callable(torch.cuda._sleep) and callable(torch.cuda.synchronize)
    for name in ("record", "query", "synchronize", "elapsed_time"):
        assert callable(getattr(torch.cuda.Event, name))


def test_launches_are_the_devices_kernels_and_copies_apart():
    def event(name, device, us, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)

    gpu, cpu = fqt_bench.cuda.DeviceType.CUDA, fqt_bench.cuda.DeviceType.CPU
    events = [event("_tile_kernel", gpu, 5.0), event("_tile_kernel", gpu, 7.0), event("Memset (Device)", gpu, 1.0),
              event("aten::mm", cpu, 90.0), event("step", gpu, 99.0, annotation=True)]  # fmt: skip
    got = count_launches(events)
    assert (got["kernels"], got["copies"]) == (2, 1)
    assert got["by_name"] == {"_tile_kernel": {"count": 2, "us": 12.0}, "Memset (Device)": {"count": 1, "us": 1.0}}


def test_a_profiler_that_sees_nothing_is_no_count_of_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(fqt_bench.cuda, "count_launches", lambda events: {"kernels": 0, "copies": 0, "by_name": {}})
    with pytest.raises(RuntimeError, match="reports no kernel"):
        fqt_bench.cuda.launches(lambda: torch.ones(2).sum())


def test_memory_is_what_is_kept_beside_the_output_and_the_peak(monkeypatch):
    allocated = [100]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    steps = []

    def forward():
        allocated[0] += 64 + 40  # 16 float32 of output, 40 bytes for the backward
        return torch.zeros(16)

    def backward(y):
        allocated[0] -= 64 + 40
        steps.append(y.shape)

    assert fqt_bench.cuda.memory(forward, backward) == {"saved": 40, "peak": 900}
    assert len(steps) == 3  # two before, for what stays


def test_the_cpu_timer_times_the_call_and_nothing_else():
    timer, ran = CpuTimer(), []
    sample = timer.sample(lambda: ran.append(time.sleep(0.01)), lead_ms=5.0)
    assert ran == [None] and sample.device_ms >= 10 and (sample.host_ms, sample.starved) == (0.0, False)
    assert timer.sample(lambda: None, 0.0).device_ms > 0 and timer.now() <= timer.now()


# ---- the trial run


def _worker(text):
    """A process of the trial run that executes this code; say(event, name) writes to its log."""
    code = "import json, os, time\ndef say(event, name): print(json.dumps({event: ['s', 'x', name]}), flush=True)\n"
    return lambda part, parts: [sys.executable, "-c", code + text[part]]


def test_the_trial_run_names_what_hangs_and_what_kills_its_process():
    workers = [
        "say('begin', 'fine'); say('end', 'fine')",
        "say('begin', 'fine'); say('end', 'fine'); say('begin', 'killer'); os._exit(3)",
        "say('begin', 'hung'); time.sleep(60)",
        "raise SystemExit(1)",  # before any candidate: nothing is held against one
    ]
    began = time.monotonic()
    got = ahead.run_ahead(_worker(workers), 4, limit_s=30.0, stall_s=2.0)
    assert time.monotonic() - began < 25
    assert {key: why[:14] for key, why in got.items()} == {
        ("s", "x", "killer"): "its process en",
        ("s", "x", "hung"): "did not end wi",
    }
    assert "status 3" in got["s", "x", "killer"]


def test_the_trial_run_holds_nothing_against_a_candidate_that_its_limit_cuts_off():
    began = time.monotonic()
    assert ahead.run_ahead(_worker(["say('begin', 'slow'); time.sleep(60)"]), 1, limit_s=1.0, stall_s=30.0) == {}
    assert time.monotonic() - began < 20


def test_an_interrupt_ends_the_workers_too(monkeypatch):
    started, start = [], ahead._start
    monkeypatch.setattr(ahead, "_start", lambda *args: started.append(start(*args)) or started[-1])

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ahead.run_ahead(_worker(["time.sleep(60)"] * 2), 2, limit_s=30.0)
    assert [worker.process.poll() for worker in started] == [-9, -9]


def test_a_worker_says_what_it_begins_and_ends_and_dies_of_a_broken_context(capsys):
    def broken():
        raise RuntimeError("an illegal memory access")

    ahead.run_once(lambda: None, ("s", "x", "fine"), lambda: None)
    ahead.run_once(broken, ("s", "x", "raises"), lambda: None)  # a check or a shape: the benchmark reports it
    with pytest.raises(RuntimeError, match="illegal"):
        ahead.run_once(broken, ("s", "x", "breaks"), broken)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event, key[2]) for line in lines for event, key in line.items()] == [
        ("begin", "fine"), ("end", "fine"), ("begin", "raises"), ("end", "raises"), ("begin", "breaks")]  # fmt: skip


def test_a_worker_is_this_package_and_runs_its_share(monkeypatch):
    command = ahead.command(2, 3, suites=["kernels"], only="*", quick=True)
    assert command[1:3] == ["-m", "fqt_bench.ahead"]
    asked = []
    ran = []
    named = [candidate(name, run=lambda i, name=name: ran.append(name)) for name in "abcde"]
    named.append(candidate("not here", run=ran.append, missing="needs more"))
    todo = [Plan("s", "x", 1.0, lambda sets: a_case(*named[:2])), Plan("s", "y", 1.0, lambda sets: 1 / 0),
            Plan("memory", "x", 1.0, lambda **_: ran.append("memory"), "memory"),
            Plan("s", "z", 1.0, lambda sets: a_case(*named[2:]))]  # fmt: skip
    for name in ("current_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(
        suites, "plans", lambda suites, device, quick, only: asked.append((suites, quick, only)) or todo
    )
    for part in range(3):
        assert ahead.main(ahead.command(part, 3, suites=["kernels"], only="g*", quick=True)[3:]) == 0
    assert sorted(ran) == list("abcde") and 1 <= ahead.parts() <= ahead.MAX_PARTS
    assert asked == [(["kernels"], True, "g*")] * 3


def test_a_brief_case_is_built_and_run_by_one_worker_alone(monkeypatch):
    """With as many workers, each would build the inputs of every case; those of a full one are shared out by candidate."""
    built, ran = [], []

    def build(name, sets=1):
        built.append(name)
        return a_case(*(candidate(f"{name}{i}", run=lambda i, of=f"{name}{i}": ran.append(of)) for i in range(4)))

    todo = [Plan("s", name, 1.0, functools.partial(build, name), effort=effort)
            for name, effort in (("b", suites.BRIEF), ("c", suites.BRIEFER), ("a", None))]  # fmt: skip
    for name in ("current_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(suites, "plans", lambda suites, device, quick, only: todo)
    for part in range(3):
        ahead.main(ahead.command(part, 3, suites=["kernels"], only="*", quick=False)[3:])
    assert sorted(built) == ["a", "a", "a", "b", "c"]
    assert sorted(ran) == [f"{name}{i}" for name in "abc" for i in range(4)]
