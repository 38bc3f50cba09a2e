"""The benchmark's laws, with a fake clock: what is counted, what is refused, what is written. Nothing is timed here."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

import bench.cuda
import bench.gpu
from bench import cases, environment, predict
from bench.cuda import CudaTimer, count_launches
from bench.gpu import Plan
from bench.harness import (
    Budget,
    Candidate,
    Case,
    Effort,
    Sample,
    Wrong,
    check_equal,
    check_near,
    check_rounded,
    figures,
    measure,
    orders,
    percentile,
)
from fqt import dispatch, reference
from fqt.recipe import Quantizer

ONCE = Effort(rounds=2, min_rounds=2, warm_up_s=0.0, warm_up_rounds=1)


class FakeTimer:
    """Every run takes 1, 2, 3, … ms of device time, and `second` seconds of the clock."""

    def __init__(self, second=0.0, starved=False):
        self.clock, self.second, self.starved, self.samples, self.leads = 0.0, second, starved, 0, []

    def now(self):
        return self.clock

    def synchronize(self):
        pass

    def sample(self, run, lead_ms):
        run()
        self.clock += self.second
        self.samples += 1
        self.leads.append(lead_ms)
        return Sample(float(self.samples), 0.25, self.starved)


def _candidate(name, run=lambda i: None, check=lambda out, i: "fine", **fields):
    return Candidate(name, run, check, **{"ops": 1e9, **fields})


def _case(*candidates, sets=2):
    return Case("suite", "1x1", "TOPS", candidates[0].name, candidates, sets)


def _measure(*candidates, effort=ONCE, timer=None, budget_s=1000.0, sets=2):
    timer = timer or FakeTimer()
    result = measure(_case(*candidates, sets=sets), timer, Budget(budget_s, timer), effort)
    return {record["name"]: record for record in result["candidates"]}


# ---- figures


@pytest.mark.parametrize("n", [2, 3, 10, 11, 100])
def test_percentiles_are_those_of_the_standard_library(n):
    values = [float((7 * i) % n) for i in range(n)]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    got = [percentile(values, p) for p in (10, 50, 90)]
    assert got == pytest.approx([deciles[0], deciles[4], deciles[8]], rel=1e-12)


def test_figures_follow_from_the_median_and_keep_every_sample():
    samples = [Sample(ms, 0.5, ms > 3) for ms in (4.0, 2.0, 100.0, 1.0, 3.0)]
    got = figures(samples, _candidate("a", ops=3e9, bytes=6e6))
    assert got["ms"] == {"median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(61.6), "n": 5}
    assert got["tops"] == pytest.approx(1.0)  # 3e9 operations in 3 ms
    assert got["gb_s"] == pytest.approx(2.0)  # 6e6 bytes in 3 ms
    assert (got["samples_ms"], got["starved"], got["host_ms"]) == ([4.0, 2.0, 100.0, 1.0, 3.0], 2, 0.5)
    assert percentile([5.0], 90) == 5.0


def test_the_ratio_is_the_rate_over_the_baselines():
    got = _measure(_candidate("base"), _candidate("twice the work", ops=2e9), effort=ONCE)
    assert got["base"]["ratio"] == 1.0
    other = got["twice the work"]
    assert other["ratio"] == pytest.approx(2 * got["base"]["ms"]["median"] / other["ms"]["median"])


# ---- interleaving


def test_every_round_runs_every_candidate_once():
    seen = list(orders(5, 200))
    assert len(seen) == 200 and all(sorted(order) == list(range(5)) for order in seen)
    firsts = [order[0] for order in seen]
    assert min(firsts.count(i) for i in range(5)) > 15  # no candidate keeps a place


def test_candidates_share_rounds_input_sets_and_head_start():
    log = []
    named = [_candidate(name, run=lambda i, name=name: log.append((name, i))) for name in "abc"]
    timer = FakeTimer()
    got = _measure(*named, effort=Effort(rounds=6, warm_up_s=0.0, warm_up_rounds=1), timer=timer, sets=2)
    assert [len(got[name]["samples_ms"]) for name in "abc"] == [6, 6, 6]
    timed = log[3 * 2 + 3 : -3]  # after the checks on two sets and one round of warm-up, before the check at the end
    for r in range(6):
        assert sorted(timed[3 * r : 3 * r + 3]) == [(name, r % 2) for name in "abc"]
    assert set(timer.leads[3:]) == {2 * 0.25 + 0.05}


def test_warm_up_lasts_its_seconds_and_sampling_stops_at_its_limit_in_whole_rounds():
    timer = FakeTimer(second=0.01)
    effort = Effort(rounds=1000, min_rounds=3, limit_s=0.5, warm_up_s=0.2, warm_up_rounds=1)
    got = _measure(_candidate("a"), _candidate("b"), effort=effort, timer=timer)
    rounds = len(got["a"]["samples_ms"])
    assert rounds == len(got["b"]["samples_ms"]) and 25 <= rounds <= 27  # two candidates of 10 ms, 500 ms
    assert timer.samples - 2 * rounds >= 20  # 200 ms of warm-up


def test_a_spent_budget_ends_the_sampling_after_the_least_number_of_rounds():
    timer = FakeTimer(second=1.0)
    effort = Effort(rounds=1000, min_rounds=4, limit_s=1e9, warm_up_s=0.0, warm_up_rounds=1)
    got = _measure(_candidate("a"), effort=effort, timer=timer, budget_s=6.0)
    assert len(got["a"]["samples_ms"]) == 5


# ---- refusals


def _says(text):
    def check(out, i):
        raise Wrong(text)

    return check


def _raises(error):
    def run(i):
        raise error

    return run


def _bad_candidates():
    out_of_resources = type("OutOfResources", (Exception,), {})
    return {
        "wrong": _candidate("bad", check=_says("3 of 4 elements differ")),
        "error": _candidate("bad", run=_raises(RuntimeError("no kernel\nfor this"))),
        "does not fit": _candidate("bad", run=_raises(out_of_resources("shared memory"))),
    }


@pytest.mark.parametrize("verdict", _bad_candidates())
def test_what_is_wrong_or_fails_is_reported_and_never_timed(verdict):
    timer = FakeTimer()
    got = _measure(_candidate("good"), _bad_candidates()[verdict], timer=timer)
    assert got["bad"]["verdict"] == verdict and got["bad"]["remark"]
    assert not {"ms", "samples_ms", "tops", "ratio"} & got["bad"].keys()
    assert timer.samples == len(got["good"]["samples_ms"]) + 1  # one round of warm-up
    assert got["good"]["verdict"] == "ok"


def test_wrong_on_the_last_input_set_alone_is_wrong():
    def check(out, i):
        if i == 1:
            raise Wrong("this set")
        return ""

    assert _measure(_candidate("a"), _candidate("b", check=check))["b"]["verdict"] == "wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32])
def test_an_element_that_nothing_wrote_is_wrong(dtype):
    want = torch.zeros(64, dtype=dtype)  # what fresh memory often holds

    def run(i):
        out = torch.empty(64, dtype=dtype)
        out[:63] = 0
        return out

    got = _measure(_candidate("a"), _candidate("b", run=run, check=lambda out, i: check_equal(out, want)))
    assert got["b"]["verdict"] == "wrong"
    assert torch.get_deterministic_debug_mode() == 0


def test_what_goes_wrong_while_it_is_timed_loses_its_figures():
    calls = {"late": 0, "raises": 0}

    def count(name, out=None):
        calls[name] += 1
        return calls[name]

    def run_or_raise(i):
        if count("raises") == 4:
            raise RuntimeError("in the middle")

    def check(out, i):
        if out > 5:  # two checks, a round of warm-up and two rounds before it
            raise Wrong("a race")
        return ""

    late = _candidate("late", run=lambda i: count("late"), check=check)
    got = _measure(_candidate("base"), late, _candidate("raises", run=run_or_raise))
    assert [got[name]["verdict"] for name in ("base", "late", "raises")] == ["ok", "wrong", "error"]
    assert "ms" not in got["late"] and "ms" not in got["raises"]


def test_without_a_baseline_there_is_no_ratio():
    got = _measure(_bad_candidates()["error"], _candidate("good"))
    assert "ratio" not in got["good"] and got["good"]["tops"] > 0


def test_checks_refuse_nan_other_shapes_and_what_is_beyond_the_bound():
    want = torch.linspace(-2, 2, 64)
    nan = want.clone()
    nan[5] = torch.nan
    checks = (check_equal, check_rounded, lambda got, to: check_near(got, to, 1e9))
    for check in checks:
        for got in (nan, want[:-1]):
            with pytest.raises(Wrong):
                check(got, want)
    with pytest.raises(Wrong):
        check_equal(want.double(), want)
    assert check_equal(want, want.clone()) == "bit-equal"
    assert check_near(want * 1.001, want, 2e-3).startswith("error")
    with pytest.raises(Wrong):
        check_near(want * 1.01, want, 2e-3)


def test_bfloat16_may_be_truncated_but_not_off_by_more_than_one_unit():
    want = torch.randn(1000)
    rounded = want.to(torch.bfloat16)
    assert check_rounded(rounded, want) == "bit-equal"
    truncated = (want.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)  # the upper 16 bits
    assert check_rounded(truncated, want) == "within 1 bf16 ulp"
    with pytest.raises(Wrong):
        check_rounded((rounded.view(torch.int16) + 3).view(torch.bfloat16), want)


# ---- the run, its file and its table


def _record(**fields):
    return {**environment.environment(torch.device("cpu")), "gpu": "NVIDIA H200", "commit": "0123456789abcdef",
            "dirty": False, **fields}  # fmt: skip


def _run(tmp_path, todo, budget_s=1000.0, timer=None, **fields):
    timer = timer or FakeTimer()
    return bench.gpu.run(todo, timer, _record(**fields), tmp_path, Budget(budget_s, timer), ONCE)


def _plan(*candidates, needs_s=1.0):
    return Plan("suite", "1x1", needs_s, lambda: _case(*candidates))


def test_the_file_holds_what_the_run_returned_and_no_run_overwrites_another(tmp_path):
    result, path = _run(tmp_path, [_plan(_candidate("a"), _candidate("b", prediction="900 to 1000"))])
    assert path.parent.name == "nvidia-h200"
    assert path.name == f"gpu-{result['environment']['date'][:10]}-012345678.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    samples = [candidate["samples_ms"] for candidate in result["cases"][0]["candidates"]]
    assert sorted(samples[0] + samples[1]) == [3.0, 4.0, 5.0, 6.0]  # after one round of warm-up
    _, second = _run(tmp_path, [])
    assert second != path and path.exists() and second.exists()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, second.name])


def test_what_does_not_fit_into_the_budget_is_skipped_and_said(tmp_path):
    todo = [_plan(_candidate("a")), _plan(_candidate("never built"), needs_s=60.0)]
    result, _ = _run(tmp_path, todo, budget_s=50.0)
    assert [case["candidates"][0]["name"] for case in result["cases"]] == ["a"]
    (skipped,) = result["skipped"]
    assert skipped["verdict"] == "skipped" and "60 needed" in skipped["remark"]
    assert skipped["remark"] in bench.gpu.report(result) and not bench.gpu.failures(result)


def test_a_candidate_is_not_begun_when_the_time_is_up():
    got = _measure(_candidate("a"), budget_s=2.0)
    assert got["a"]["verdict"] == "skipped" and "ms" not in got["a"]


def test_a_case_that_cannot_be_built_is_a_failure_and_the_others_go_on(tmp_path):
    broken = Plan("broken", "9x9", 1.0, lambda: 1 / 0)
    result, _ = _run(tmp_path, [broken, _plan(_candidate("a"))])
    assert len(result["cases"]) == 1 and bench.gpu.failures(result) == ["broken 9x9: error"]


def test_only_our_own_candidates_fail_the_benchmark(tmp_path):
    bad = _bad_candidates()
    peer = Candidate("peer", bad["error"].run, bad["error"].check, ops=1.0, ours=False)
    result, _ = _run(tmp_path, [_plan(_candidate("a"), peer)])
    assert not bench.gpu.failures(result)
    result, _ = _run(tmp_path, [_plan(_candidate("a"), bad["does not fit"])])
    assert not bench.gpu.failures(result)
    result, _ = _run(tmp_path, [_plan(_candidate("a"), bad["wrong"])])
    assert bench.gpu.failures(result) == ["suite 1x1: bad: wrong"]
    chosen = _candidate("c (dispatch)", run=bad["does not fit"].run)
    result, _ = _run(tmp_path, [_plan(_candidate("a"), chosen)])
    assert bench.gpu.failures(result) == ["suite 1x1: c (dispatch): does not fit"]


def test_the_table_sets_predictions_beside_measurements_and_marks_host_bound_samples(tmp_path):
    candidates = (_candidate("base"), _candidate("ours", prediction="900 to 1000"), _bad_candidates()["wrong"])
    result, _ = _run(tmp_path, [_plan(*candidates)], timer=FakeTimer(starved=True))
    result["launches"] = [
        {"name": "plain", "shape": "1x1", "kernels": 3, "copies": 0, "by_name": {}},
        {"name": "quantized", "shape": "1x1", "kernels": 12, "copies": 1, "by_name": {}},
    ]
    lines = bench.gpu.report(result).splitlines()
    assert sum(line.startswith("suite  ") and "candidate" in line for line in lines) == 1
    ours = next(line for line in lines if "ours" in line)
    assert "900 to 1000" in ours and "host-bound: 0.250 ms to launch" in ours and "TOPS" in ours
    bad = next(line for line in lines if " bad " in line)
    assert "wrong: 3 of 4 elements differ" in bad and "TOPS" not in bad
    assert any("12 kernels" in line and "4.00" in line for line in lines)
    assert "NVIDIA H200" in lines[0] and "012345678" in lines[0]


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not measured: no GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_main_prints_one_table_and_its_status_says_whether_ours_passed(tmp_path, monkeypatch, capsys):
    good, bad = _plan(_candidate("fine")), _plan(_candidate("fine"), _bad_candidates()["wrong"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench.gpu, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(bench.cuda, "CudaTimer", lambda device: FakeTimer(second=0.1))
    record = _record()
    monkeypatch.setattr(environment, "environment", lambda device: record)
    counts = [{"name": "plain", "shape": "1x1", "kernels": 3, "copies": 0, "by_name": {}}]
    monkeypatch.setattr(bench.gpu, "layer_launches", lambda count, device: counts)
    for todo, status in (([good], 0), ([bad], 1)):
        monkeypatch.setattr(bench.gpu, "plans", lambda device, quick, todo=todo: todo)
        assert bench.gpu.main(["--quick", "--out", str(tmp_path), "--budget-s", "60"]) == status
        out, err = capsys.readouterr()
        (path,) = [line.removeprefix("bench: ") for line in err.splitlines() if line.endswith(".json")]
        result = json.loads(open(path, encoding="utf-8").read())
        assert out == bench.gpu.report(result) + "\n" and result["launches"] == counts and result["budget_s"] == 60
        assert out.count("candidate  ") == 1 and "3 kernels" in out


def test_the_plans_are_the_cases_at_full_size_the_most_wanted_first():
    shapes = {(plan.suite, plan.shape) for plan in bench.gpu.plans(torch.device("cuda", 0), quick=False)}
    assert shapes >= {("gemm", "8192x8192x8192"), ("gemm", "4096x4096x4096"), ("quantize", "8192x8192"),
                      ("quantize", "4096x4096"), ("linear fwd+bwd", "8192x8192x8192"),
                      ("linear fwd+bwd", "8192x4096x4096")}  # fmt: skip
    quick = [(plan.suite, plan.shape) for plan in bench.gpu.plans(torch.device("cuda", 0), quick=True)]
    assert set(quick) < shapes


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_budget_that_is_no_number_of_seconds_is_a_mistake(text):
    with pytest.raises(SystemExit) as exit_:
        bench.gpu.main([f"--budget-s={text}"])
    assert exit_.value.code == 2


# ---- the environment


def test_slug_is_a_plain_folder_name():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.slug("AMD Instinct MI300X / VF") == "amd-instinct-mi300x-vf"
    assert environment.slug("../..") == "unknown"


def test_a_copy_without_git_is_named_by_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    record = environment.environment(torch.device("cpu"))
    assert record["commit"] is None and record["dirty"] is None
    assert environment.result_path(tmp_path, "gpu", record).name.endswith("-nogit.json")
    (tmp_path / "fqt").mkdir()
    (tmp_path / "fqt" / "a.py").write_text("x = 1\n")
    before = environment.source_digest(tmp_path)
    (tmp_path / "fqt" / "a.py").write_text("x = 2\n")
    assert environment.source_digest(tmp_path) != before


def test_the_record_names_everything_a_figure_needs():
    record = environment.environment(torch.device("cpu"))
    needed = {
        "gpu",
        "driver",
        "capability",
        "processors",
        "torch",
        "triton",
        "cuda",
        "commit",
        "dirty",
        "date",
        "python",
    }
    assert needed <= record.keys() and record["torch"] == torch.__version__
    json.dumps(record, allow_nan=False)


def test_the_record_of_a_gpu(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                                 total_memory=81 * 2**30, L2_cache_size=50 * 2**20)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    smi = "580.159.04, 700.00 W, 1980 MHz, 2619 MHz, 345 MHz, 30"
    monkeypatch.setattr(environment, "_output", lambda *command: smi if command[0] == "nvidia-smi" else None)
    record = environment.environment(torch.device("cuda", 0))
    assert (record["gpu"], record["capability"], record["processors"], record["l2_mib"], record["driver"]) == (
        "NVIDIA H100 80GB HBM3", "9.0", 132, 50.0, "580.159.04")  # fmt: skip
    assert environment.result_path(tmp_path, "gpu", record).parent.name == "nvidia-h100-80gb-hbm3"


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
    monkeypatch.setattr(bench.cuda, "FLUSH_BYTES", 4096)
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

    gpu, cpu = bench.cuda.DeviceType.CUDA, bench.cuda.DeviceType.CPU
    events = [event("_tile_kernel", gpu, 5.0), event("_tile_kernel", gpu, 7.0), event("Memset (Device)", gpu, 1.0),
              event("aten::mm", cpu, 90.0), event("step", gpu, 99.0, annotation=True)]  # fmt: skip
    got = count_launches(events)
    assert (got["kernels"], got["copies"]) == (2, 1)
    assert got["by_name"] == {"_tile_kernel": {"count": 2, "us": 12.0}, "Memset (Device)": {"count": 1, "us": 1.0}}


def test_a_profiler_that_sees_nothing_is_no_count_of_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench.cuda, "count_launches", lambda events: {"kernels": 0, "copies": 0, "by_name": {}})
    timer = FakeTimer()
    result, _ = bench.gpu.run([], timer, _record(), tmp_path, Budget(1000.0, timer), ONCE,
                              launch_counts=lambda: [bench.cuda.launches(lambda: torch.ones(2).sum())])  # fmt: skip
    assert result["launches"] == [] and not bench.gpu.failures(result)
    assert "not measured: RuntimeError: torch.profiler reports no kernel" in bench.gpu.report(result)


def test_every_layer_of_the_linear_case_has_its_launches_counted(device):
    counted = []

    def count(run):
        counted.append(run())
        return {"kernels": len(counted), "copies": 0, "by_name": {}}

    got = bench.gpu.layer_launches(count, torch.device(device), tokens=128, features=128)
    assert [entry["name"] for entry in got] == ["nn.Linear bf16", "fqt.nn.Linear int8", "fqt.nn.Linear psq8"]
    assert [entry["kernels"] for entry in got] == [1, 2, 3]


# ---- the cases, at a small size


@pytest.mark.parametrize("name, shape", [("gemm", (64, 96, 128)), ("quantize", (64, 128)), ("linear", (128, 128, 128))])
def test_every_candidate_of_a_case_passes_its_check(name, shape, device):
    case = getattr(cases, name)(*shape, torch.device(device), sets=1)
    timer = FakeTimer()
    records = measure(case, timer, Budget(1000.0, timer), Effort(rounds=1, warm_up_s=0.0, warm_up_rounds=1))[
        "candidates"
    ]
    assert {r["name"]: r["remark"] for r in records if r["ours"] and r["verdict"] not in ("ok", "does not fit")} == {}
    assert records[0]["verdict"] == "ok" and any(r["ours"] and r["verdict"] == "ok" for r in records)
    if name == "quantize":
        assert {r["remark"] for r in records} == {"bit-equal"}


@pytest.mark.parametrize("name, shape", [("gemm", (64, 96, 128)), ("quantize", (64, 128)), ("linear", (128, 128, 128))])
def test_every_candidate_of_a_case_is_refused_when_a_value_is_off(name, shape, device):
    case = getattr(cases, name)(*shape, torch.device(device), sets=1)
    for candidate in (c for c in case.candidates if c.ours or device == "cpu"):  # a GPU may lack what a peer needs
        out = candidate.run(0)
        for part in (t for t in (out if isinstance(out, tuple) else (out,)) if t is not None):
            largest = int(part.abs().argmax())
            value = part.view(-1)[largest].clone()
            part.view(-1)[largest] = -2 * value if value.is_floating_point() else value ^ 1
            with pytest.raises(Wrong):
                candidate.check(out, 0)
            part.view(-1)[largest] = value
        candidate.check(out, 0)


def test_the_exact_quantizer_of_the_cases_is_the_reference_on_the_cpu():
    x = cases.gaussian(33, 40, device=torch.device("cpu"), seed=3)
    multiplier, rng = torch.rand(33, 1) + 0.5, torch.tensor([5, 6])
    for granularity in ("per_tensor", "per_row", "per_column"):
        for zero in ("symmetric", "grid", "min"):
            for rounding in ("nearest", "stochastic"):
                for bits in (8, 3):
                    z = Quantizer(bits, granularity, zero, rounding)
                    fields = dict(multiplier=multiplier, rng=rng, stream=1, cols=True, sums=True)
                    got, want = cases.quantize_exactly(x, z, **fields), reference.quantize(x, z, **fields)
                    assert all(g is w or torch.equal(g, w) for g, w in zip(got, want, strict=True)), z


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("size", [64, 1024, 8192])
def test_the_configuration_that_dispatch_selects_is_among_the_candidates(arch, size, monkeypatch):
    monkeypatch.setattr(dispatch, "device_info", lambda device: (arch, 132))
    gpu = torch.device("cuda", 0)
    choice = dispatch.select(dispatch.problem("scaled_mm", gpu, size, size, size))
    assert choice.config in cases.config_table(gpu)


def test_the_layer_is_quantized_anew_in_every_step(device):
    """Each step must pay for the weight: its codes are computed again, once, in every run."""
    case = cases.linear(128, 128, 128, torch.device(device), sets=1)
    int8 = case.candidates[1]
    calls = []
    quantize_weight = cases.fqt.ops.quantize_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases.fqt.ops, "quantize_weight", lambda *a: calls.append(a[2]) or quantize_weight(*a))
        for _ in range(3):
            int8.run(0)
    assert calls == [True] * 3  # both layouts


def test_the_model_of_a_layer_is_the_documents():
    """At 8192³ on an H100, quantization that is free leaves the ratio of the rates; the bytes then cost their time."""
    assert predict.linear_ratio(8192, 8192, 8192, 798, 1e12, 1200) == pytest.approx(1200 / 798, rel=1e-6)
    seconds = 6 * 8192**3 / 950e12 + 16 * 8192**2 / 3.0e12
    assert predict.linear_ratio(8192, 8192, 8192, 798, 3.0) == pytest.approx(6 * 8192**3 / 798e12 / seconds, rel=1e-6)


def test_predictions_are_made_only_for_the_gpus_that_they_were_made_for(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    named = {"NVIDIA H100 80GB HBM3": "900 to 1000", "NVIDIA H200": "900 to 1000", "NVIDIA A100-SXM4-80GB": ""}
    for name, text in named.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert predict.synchronous_dot(gpu) == text
        everything = (predict.matmul_bf16(gpu), predict.copy(gpu), predict.linear_int8(8192, 8192, 8192, gpu))
        assert all(everything) if text else not any(everything)
    assert predict.synchronous_dot(cpu) == predict.linear_int8(1, 1, 1, cpu) == predict.copy(cpu) == ""
