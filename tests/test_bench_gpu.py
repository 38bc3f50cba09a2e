"""The benchmark's run: its file, its tables, its targets, and the device's side with a fake torch.cuda."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import ONCE, FakeTimer, a_case, bad_candidates, candidate

import fqt_bench.cuda
import fqt_bench.gpu
import fqt_bench.targets
from fqt import cost
from fqt_bench import ahead, environment
from fqt_bench.cuda import CudaTimer, count_launches
from fqt_bench.gpu import Plan
from fqt_bench.harness import Budget, Candidate
from fqt_bench.targets import TARGETS, failures, report

# ---- the run, its file and its table


def _record(**fields):
    return {**environment.environment(torch.device("cpu")), "gpu": "NVIDIA H200", "commit": "0123456789abcdef",
            "dirty": False, **fields}  # fmt: skip


def _run(tmp_path, todo, budget_s=1000.0, timer=None, **fields):
    timer = timer or FakeTimer()
    return fqt_bench.gpu.run(todo, timer, _record(**fields), tmp_path, Budget(budget_s, timer), ONCE)


def _plan(*candidates, needs_s=1.0):
    return Plan("suite", "1x1", needs_s, lambda: a_case(*candidates))


def test_the_file_holds_what_the_run_returned_and_no_run_overwrites_another(tmp_path):
    result, path = _run(tmp_path, [_plan(candidate("a"), candidate("b", prediction="900 to 1000"))])
    assert path.parent.name == "nvidia-h200"
    assert path.name == f"gpu-{result['environment']['date'][:10]}-012345678.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    samples = [candidate["samples_ms"] for candidate in result["cases"][0]["candidates"]]
    assert sorted(samples[0] + samples[1]) == [3.0, 4.0, 5.0, 6.0]  # after one round of warm-up
    _, second = _run(tmp_path, [])
    assert second != path and path.exists() and second.exists()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, second.name])


def test_what_does_not_fit_into_the_budget_is_skipped_and_said(tmp_path):
    todo = [_plan(candidate("a")), _plan(candidate("never built"), needs_s=60.0)]
    result, _ = _run(tmp_path, todo, budget_s=50.0)
    assert [case["candidates"][0]["name"] for case in result["cases"]] == ["a"]
    (skipped,) = result["skipped"]
    assert skipped["verdict"] == "skipped" and "60 needed" in skipped["remark"]
    assert skipped["remark"] in report(result) and not failures(result)


def test_a_case_that_cannot_be_built_is_a_failure_and_the_others_go_on(tmp_path):
    broken = Plan("broken", "9x9", 1.0, lambda: 1 / 0)
    result, _ = _run(tmp_path, [broken, _plan(candidate("a"))])
    assert len(result["cases"]) == 1 and failures(result) == ["broken 9x9: error"]


def test_only_our_own_candidates_fail_the_benchmark(tmp_path):
    bad = bad_candidates()
    peer = Candidate("peer", bad["error"].run, bad["error"].check, ops=1.0, ours=False)
    result, _ = _run(tmp_path, [_plan(candidate("a"), peer)])
    assert not failures(result)
    result, _ = _run(tmp_path, [_plan(candidate("a"), bad["does not fit"])])
    assert not failures(result)
    result, _ = _run(tmp_path, [_plan(candidate("a"), bad["wrong"])])
    assert failures(result) == ["suite 1x1: bad: wrong"]
    chosen = candidate("c (dispatch)", run=bad["does not fit"].run)
    result, _ = _run(tmp_path, [_plan(candidate("a"), chosen)])
    assert failures(result) == ["suite 1x1: c (dispatch): does not fit"]


def test_the_table_sets_predictions_beside_measurements_and_marks_host_bound_samples(tmp_path):
    candidates = (candidate("base"), candidate("ours", prediction="900 to 1000"), bad_candidates()["wrong"])
    result, _ = _run(tmp_path, [_plan(*candidates)], timer=FakeTimer(starved=True))
    result["launches"] = [
        {"name": "plain", "shape": "1x1", "kernels": 3, "copies": 0, "by_name": {}},
        {"name": "quantized", "shape": "1x1", "kernels": 12, "copies": 1, "by_name": {}},
    ]
    lines = report(result).splitlines()
    assert sum(line.startswith("suite  ") and "candidate" in line for line in lines) == 1
    ours = next(line for line in lines if "ours" in line)
    assert "900 to 1000" in ours and "host-bound: 0.250 ms to launch" in ours and "TOPS" in ours
    bad = next(line for line in lines if " bad " in line)
    assert "wrong: 3 of 4 elements differ" in bad and "TOPS" not in bad
    assert any("12 kernels" in line and "4.00" in line for line in lines)
    assert "NVIDIA H200" in lines[0] and "012345678" in lines[0]


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fqt_bench.gpu.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not measured: no GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_main_prints_its_tables_and_its_status_says_whether_ours_passed(tmp_path, monkeypatch, capsys):
    good, bad = _plan(candidate("fine")), _plan(candidate("fine"), bad_candidates()["wrong"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fqt_bench.gpu, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(fqt_bench.cuda, "CudaTimer", lambda device: FakeTimer(second=0.1))
    monkeypatch.setattr(ahead, "run_ahead", lambda command, parts, limit_s: {("suite", "1x1", "hung"): "did not end"})
    record = _record()
    monkeypatch.setattr(environment, "environment", lambda device: record)
    for todo, status in (([good], 0), ([bad], 1), ([_plan(candidate("fine"), candidate("hung"))], 1)):
        monkeypatch.setattr(fqt_bench.gpu, "plans", lambda device, quick, todo=todo: todo)
        assert fqt_bench.gpu.main(["--quick", "--out", str(tmp_path), "--budget-s", "60"]) == status
        out, err = capsys.readouterr()
        (path,) = [line.removeprefix("bench: ") for line in err.splitlines() if line.endswith(".json")]
        result = json.loads(open(path, encoding="utf-8").read())
        assert out == report(result) + "\n" and result["budget_s"] == 60
        assert out.count("candidate  ") == 1 and out.count("target  ") == 1
    assert fqt_bench.gpu.main(["--no-trial", "--out", str(tmp_path)]) == 0  # nothing hangs that was not tried


def test_entries_are_added_to_their_list_and_know_what_is_refused(tmp_path):
    seen = []

    def build(timer, refused):
        seen.append(refused)
        return [{"name": "a", "shape": "1x1", "verdict": "differs", "remark": "run 2"}]

    refused = {("gemm", "9x9", "b"): "did not end"}
    timer = FakeTimer()
    todo = [Plan("repeats", "1x1", 1.0, build, "repeats"), Plan("launches", "1x1", 1.0, lambda **_: 1 / 0, "launches"),
            Plan("memory", "1x1", 1.0, lambda **_: 1 / 0, "memory")]  # fmt: skip
    result, _ = fqt_bench.gpu.run(todo, timer, _record(), tmp_path, Budget(1000.0, timer), ONCE, refused)
    assert seen == [{"b": "did not end"}] and result["repeats"] == build(None, None)
    assert failures(result) == ["repeat 1x1: a: differs", "memory 1x1: error"]
    assert "not measured: ZeroDivisionError" in report(result)  # launches: a profiler may not be allowed to look


def test_the_plans_are_the_cases_at_full_size_the_most_wanted_first():
    planned = [(plan.suite, plan.shape) for plan in fqt_bench.gpu.plans(torch.device("cuda", 0), quick=False)]
    assert planned[:3] == [("gemm", "8192x8192x8192"), ("linear fwd+bwd", "8192x8192x8192"), ("quantize", "8192x8192")]
    layers = ("8192x28672x4096", "8192x4096x14336", "4096x4096x4096", "50432x4096x1024")
    assert set(planned) >= {("gemm", "4096x4096x4096"), ("gemm", "1024x1024x65536"), ("memory", "8192x4096x4096"),
                            ("repeats", "1024x1024x65536"), *(("linear fwd+bwd", shape) for shape in layers)}  # fmt: skip
    assert len(set(planned)) == len(planned)
    assert (
        sum(plan.needs_s for plan in fqt_bench.gpu.plans(torch.device("cuda", 0), False)) < fqt_bench.gpu.BUDGET_S < 480
    )
    for plan in fqt_bench.gpu.plans(torch.device("cuda", 0), quick=True):
        assert "8192x8192" not in plan.shape


def test_every_target_reads_a_case_that_is_planned():
    """A target whose suite, shape or tag has no case would be "not measured" for ever."""
    asked = []

    plans = fqt_bench.gpu.plans(torch.device("cuda", 0), quick=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fqt_bench.targets, "best", lambda result, suite, shape, tags, field="tops": asked.append((suite, shape))
        )
        for target in TARGETS:
            target.measure({"memory": [], "repeats": []})
    assert len(asked) > 20 and set(asked) <= {(plan.suite, plan.shape) for plan in plans}


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_budget_that_is_no_number_of_seconds_is_a_mistake(text):
    with pytest.raises(SystemExit) as exit_:
        fqt_bench.gpu.main([f"--budget-s={text}"])
    assert exit_.value.code == 2


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


# ---- targets and ceilings


def _measured(suite, shape, *candidates):
    passed = {"verdict": "ok", "ours": True, "remark": ""}
    records = [{"name": tag, "tag": tag, **passed, **figures} for tag, figures in candidates]
    return {"suite": suite, "shape": shape, "unit": "TOPS", "candidates": records}


def _result(*cases, **lists):
    return {"environment": _record(), "cases": list(cases), "memory": [], "repeats": [], "skipped": [], **lists}


def _targets(result):
    return {(t.name, t.what): t.row(result)[3:] for t in TARGETS}


def test_a_target_is_met_at_its_bound_and_missed_beyond_it():
    def verdicts(tops, saved, int_mm):
        product = _measured("gemm", "8192x8192x8192", ("bf16", {"tops": 800.0}), ("_int_mm", {"tops": int_mm}),
                            ("portable", {"tops": 900.0}), ("hopper", {"tops": tops}))  # fmt: skip
        memory = [{"name": "bf16", "saved": 100}, {"name": "int8", "saved": saved}]
        got = _targets(_result(product, memory=memory))
        return [got["T1", "int8 product at 8192³"], got["T2", "int8 product over _int_mm at 8192³"],
                got["T9", "bytes that a forward saves over bf16's"]]  # fmt: skip

    assert verdicts(1150.0, 52, 1150.0) == [("1150 TOPS", "met"), ("1.00×", "met"), ("0.52×", "met")]
    assert verdicts(1149.0, 53, 1150.0) == [("1149 TOPS", "missed"), ("1.00×", "missed"), ("0.53×", "missed")]


def test_a_layer_is_compared_with_the_faster_of_the_bf16_ones():
    layer = _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", {"tops": 600.0}), ("bf16 compiled", {"tops": 700.0}),
                      ("int8", {"tops": 980.0}), ("torchao", {"tops": 490.0}))  # fmt: skip
    got = _targets(_result(layer))
    assert got["T3", "int8 layer over bf16 at 8192³"] == ("1.40×", "met")
    assert got["T4", "int8 layer over torchao's at 8192³"] == ("2.00×", "met")


def test_stochastic_rounding_is_judged_by_time_not_by_rate():
    case = _measured("quantize", "8192x8192", ("copy", {"gb_s": 3000.0}), ("rows nearest", {"gb_s": 2800.0}),
                     ("rows stochastic", {"gb_s": 2500.0}))  # fmt: skip
    got = _targets(_result(case))
    assert got["T5", "row quantization over a copy"] == ("0.93×", "met")
    assert got["T6", "stochastic over nearest time, rows"] == ("1.12×", "missed")


def test_what_was_not_measured_or_was_wrong_meets_no_target():
    wrong = _measured("gemm", "8192x8192x8192", ("hopper", {"tops": 9e9}))
    wrong["candidates"][0]["verdict"] = "wrong"
    for result in (_result(), _result(wrong)):
        assert {verdict for _, verdict in _targets(result).values()} == {"not measured"}
    partly = _result(repeats=[{"verdict": v} for v in ("ok", "ok", "ok", "differs", "does not fit")])
    assert _targets(partly)["T10", "candidates whose runs are bit-identical"] == ("75 %", "missed")


def test_the_run_ends_in_ceilings_that_the_cost_model_reads(tmp_path):
    cases = [
        _measured("gemm", "8192x8192x8192", ("bf16", {"tops": 798.1234}), ("portable", {"tops": 950.0}),
                  ("hopper", {"tops": 1160.0}), ("_int_mm", {"tops": 2000.0})),
        _measured("gemm", "4096x4096x4096", ("bf16", {"tops": 700.0}), ("split", {"tops": 100.0})),
        _measured("quantize", "8192x8192", ("copy", {"gb_s": 3000.0})),
        _measured("quantize", "4096x4096", ("copy", {"gb_s": 9000.0})),  # from the L2
        _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", {"tops": 5000.0})),
    ]  # fmt: skip
    entry = fqt_bench.targets.ceilings(_result(*cases), "bench/results/nvidia-h200/x.json")
    rates = {name: entry[name] for name in ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")}
    assert rates == {"bf16_tflops": 798.123, "int8_tops": 1160.0, "fp8_tflops": None, "tb_s": 3.0}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps([entry]))
    assert cost.measured(path) == {"NVIDIA H200": entry}
    assert fqt_bench.targets.ceilings(_result(*cases[:2]), "") is None  # no bandwidth


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
    assert ahead.command(2, 8, quick=True)[1:] == ["-m", "fqt_bench.ahead", "2", "8", "--quick"]
    ran = []
    named = [candidate(name, run=lambda i, name=name: ran.append(name)) for name in "abcde"]
    todo = [Plan("s", "x", 1.0, lambda sets: a_case(*named[:2])), Plan("s", "y", 1.0, lambda sets: 1 / 0),
            Plan("memory", "x", 1.0, lambda **_: ran.append("memory"), "memory"),
            Plan("s", "z", 1.0, lambda sets: a_case(*named[2:]))]  # fmt: skip
    for name in ("current_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(fqt_bench.gpu, "plans", lambda device, quick: todo)
    for part in range(3):
        assert ahead.main([str(part), "3"]) == 0
    assert sorted(ran) == list("abcde") and 1 <= ahead.parts() <= ahead.MAX_PARTS
