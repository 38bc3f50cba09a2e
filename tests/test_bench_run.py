"""A run of the benchmark: its file, its schema, its tables, its exit status."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import ONCE, FakeTimer, a_case, bad_candidates, candidate, record

from fqt import cli, dispatch
from fqt.cli_bench import BUDGET_S
from fqt.suites import SUITES
from fqt_bench import ahead, counters, cuda, environment, layers, products, pytest_json
from fqt_bench import run as runs
from fqt_bench.cpu import CpuTimer
from fqt_bench.harness import Budget
from fqt_bench.measures import Rate
from fqt_bench.suites import NAMES, NETWORKS, Plan, plans
from fqt_bench.targets import TARGETS, failures, measured, report

jsonschema = pytest.importorskip("jsonschema")  # a machine with a GPU may have nothing but torch, Triton and pytest
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _gpu_record(monkeypatch):
    fixed = record()
    monkeypatch.setattr(environment, "environment", lambda device: fixed)
    monkeypatch.setattr(runs, "CPU_THREADS", torch.get_num_threads())


def _valid(result):
    jsonschema.Draft202012Validator(runs.schema()).validate(result)
    return result


def _run(tmp_path, todo, budget_s=1000.0, timer=None, suites=("kernels",), device=GPU, **options):
    timer = timer or FakeTimer()
    result, path = runs.run(todo, timer, suites, device, tmp_path, Budget(budget_s, timer), ONCE, **options)
    return _valid(result), path


def _plan(*candidates, needs_s=1.0):
    return Plan("suite", "1x1", needs_s, lambda **_: a_case(*candidates))


# ---- the file


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(runs.schema())
    assert runs.schema()["properties"]["suites"]["items"]["enum"] == list(NAMES)


def test_the_file_holds_what_the_run_returned_and_no_run_overwrites_another(tmp_path):
    result, path = _run(tmp_path, [_plan(candidate("a"), candidate("b", prediction="900 to 1000"))])
    assert path.parent.name == "nvidia-h200"
    assert path.name == f"kernels-{result['environment']['date'][:10]}-012345678.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    samples = [candidate["samples_ms"] for candidate in result["cases"][0]["candidates"]]
    assert sorted(samples[0] + samples[1]) == [3.0, 4.0, 5.0, 6.0]  # after one round of warm-up
    _, second = _run(tmp_path, [_plan(candidate("a"))])
    assert second != path and path.exists() and second.exists()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, second.name])


def test_every_status_fits_the_schema_and_a_figure_without_ok_does_not(tmp_path):
    bad = [candidate(name, run=c.run, check=c.check) for name, c in bad_candidates().items()]
    peer = candidate("peer", provider="torch", missing="not installed: it")
    result, _ = _run(tmp_path, [_plan(candidate("a"), *bad, peer)])
    got = result["cases"][0]["candidates"]
    assert [c["status"] for c in got] == ["ok", "wrong", "error", "skip", "skip"]
    for spoil in (
        lambda c: c.update(status="wrong"),
        lambda c: c.pop("samples_ms"),
        lambda c: c.update(ratio=1.0),
        lambda c: c.update(status="crashed"),
        lambda c: c.update(ms={**c["ms"], "median": 0.0}),
        lambda c: c.update(verdict="ok"),
    ):
        spoiled = json.loads(json.dumps(result))
        spoil(spoiled["cases"][0]["candidates"][0])
        with pytest.raises(jsonschema.ValidationError):
            _valid(spoiled)


@pytest.mark.parametrize("field", ["ms", "tops", "gb_s", "host_ms", "starved", "samples_ms", "ratio"])
def test_what_failed_has_no_figure_of_any_kind(field, tmp_path):
    result, _ = _run(tmp_path, [_plan(candidate("a", bytes=1.0), bad_candidates()["wrong"])])
    good, bad = result["cases"][0]["candidates"]
    bad[field] = good[field]
    with pytest.raises(jsonschema.ValidationError):
        _valid(result)


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path):
    def cut():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, [_plan(candidate("a")), Plan("suite", "2x2", 1.0, cut)])
    (path,) = tmp_path.rglob("*.json")
    assert _valid(json.loads(path.read_text(encoding="utf-8")))["cases"][0]["candidates"][0]["status"] == "ok"


def test_what_does_not_fit_into_the_budget_is_skipped_and_said(tmp_path):
    todo = [_plan(candidate("a")), _plan(candidate("never built"), needs_s=60.0)]
    result, _ = _run(tmp_path, todo, budget_s=50.0)
    assert [case["candidates"][0]["name"] for case in result["cases"]] == ["a"]
    (skipped,) = result["skipped"]
    assert skipped["status"] == "skip" and "60 needed" in skipped["remark"]
    assert skipped["remark"] in report(result) and not failures(result)


def test_a_case_that_cannot_be_built_is_a_failure_and_the_others_go_on(tmp_path):
    broken = Plan("broken", "9x9", 1.0, lambda: 1 / 0)
    result, _ = _run(tmp_path, [broken, _plan(candidate("a"))])
    assert len(result["cases"]) == 1
    assert failures(result) == ["broken 9x9: error: ZeroDivisionError: division by zero"]


def test_a_case_that_is_too_large_for_the_device_is_skipped(tmp_path):
    def large():
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    result, _ = _run(tmp_path, [Plan("large", "9x9", 1.0, large), _plan(candidate("a"))])
    assert not failures(result) and result["skipped"][0]["status"] == "skip"
    assert result["skipped"][0]["remark"].startswith("does not fit: ")


def test_only_our_own_candidates_fail_the_benchmark(tmp_path):
    bad = bad_candidates()
    peer = candidate("peer", run=bad["error"].run, provider="torch")
    for candidates, failed in (
        ([peer], []),
        ([bad["skip"]], []),
        ([bad["wrong"]], ["suite 1x1: bad: wrong: 3 of 4 elements differ"]),
        ([candidate("c (dispatch)", run=bad["skip"].run)],
         ["suite 1x1: c (dispatch): skip: does not fit: shared memory"]),
    ):  # fmt: skip
        result, _ = _run(tmp_path, [_plan(candidate("a"), *candidates)])
        assert failures(result) == failed


def test_entries_are_added_to_their_list_and_know_what_is_refused(tmp_path):
    seen = []
    entry = {"suite": "gemm", "shape": "1x1", "name": "a", "status": "wrong", "remark": "run 2"}

    def build(timer, refused):
        seen.append(refused)
        return [entry]

    todo = [Plan("repeats of gemm", "1x1", 1.0, build, "repeats"),
            Plan("launches", "1x1", 1.0, lambda **_: 1 / 0, "launches"),
            Plan("memory", "1x1", 1.0, lambda **_: 1 / 0, "memory")]  # fmt: skip
    result, _ = _run(tmp_path, todo, refused={("gemm", "9x9", "b"): "did not end"})
    assert seen == [{"b": "did not end"}] and result["repeats"] == [entry]
    assert [text[:26] for text in failures(result)] == ["repeat 1x1: a: wrong: run ", "memory 1x1: error: ZeroDiv"]
    assert "not measured: ZeroDivisionError" in report(result)  # launches: a profiler may not be allowed to look


def _counted(monkeypatch, **found):
    made = counters.Counters(**{"entries": {"sm_90 _kernel n1": {"instructions": 5}},
                                "of": {"triton": "3.7.1", "arches": ["sm_90"]}, **found})  # fmt: skip
    monkeypatch.setattr(counters, "measure", lambda selection, tree: made)


def test_the_counters_are_of_the_result_and_what_failed_in_them_fails_it(tmp_path, monkeypatch):
    _counted(monkeypatch)
    result, path = _run(tmp_path, [], counters=True, device=CPU)
    assert path is not None and result["counters"] == {"sm_90 _kernel n1": {"instructions": 5}}
    assert result["counters_of"]["arches"] == ["sm_90"] and not failures(result)
    _counted(monkeypatch, unknown={"x": "no such launch"}, failed={"y": "does not compile"})
    result, _ = _run(tmp_path, [], counters=True, device=CPU)
    assert failures(result) == ["counters : error: y: does not compile"]
    assert {"suite": "counters", "shape": "", "status": "skip", "remark": "x: no such launch"} in result["skipped"]


def test_without_triton_or_without_time_no_counters_are_collected(tmp_path, monkeypatch):
    _counted(monkeypatch)
    result, path = _run(tmp_path, [], counters=True, budget_s=5.0)
    assert path is None and "needed" in result["skipped"][0]["remark"] and result["counters_of"] is None
    monkeypatch.setattr(dispatch, "triton_version", lambda: None)
    result, path = _run(tmp_path, [], counters=True)
    assert path is None and result["skipped"][0]["remark"] == "not installed: triton" and not measured(result)
    assert list(tmp_path.iterdir()) == []


# ---- the table


def test_the_table_sets_predictions_beside_measurements_and_marks_host_bound_samples(tmp_path):
    candidates = (candidate("base"), candidate("ours", prediction="900 to 1000"), bad_candidates()["wrong"])
    result, _ = _run(tmp_path, [_plan(*candidates)], timer=FakeTimer(starved=True))
    result["launches"] = [
        {"name": "plain", "shape": "1x1", "kernels": 3, "copies": 0, "by_name": {}},
        {"name": "quantized", "shape": "1x1", "kernels": 12, "copies": 1, "by_name": {}},
    ]
    lines = report(result).splitlines()
    assert sum(line.startswith("case ") and "candidate" in line for line in lines) == 1
    ours = next(line for line in lines if "ours" in line)
    assert "900 to 1000" in ours and "host-bound: 0.250 ms to launch" in ours and "TOPS" in ours
    ratio = result["cases"][0]["candidates"][1]["ratio"]
    assert f"{ratio['low']:#.3g}-" in ours or f"{ratio['low']:.2f}-" in ours
    bad = next(line for line in lines if " bad " in line)
    assert "wrong: 3 of 4 elements differ" in bad and "TOPS" not in bad
    assert any("12 kernels" in line and "4.00" in line for line in lines)
    assert "NVIDIA H200" in lines[0] and "012345678" in lines[0]


def test_the_targets_are_shown_for_the_suites_that_they_read(tmp_path):
    for suite, shown in (("kernels", True), ("layers", True), ("optim", True), ("smoke", False), ("train", False)):
        result, _ = _run(tmp_path, [_plan(candidate("a"))], suites=(suite,))
        assert ("not measured" in report(result)) == shown


# ---- the plans


def test_the_plans_are_the_cases_at_full_size_the_most_wanted_first():
    planned = [(p.suite, p.shape) for p in plans(("kernels", "layers"), GPU, quick=False)]
    assert planned[0] == ("gemm", "8192x8192x8192")
    linears = ("8192x28672x4096", "8192x4096x14336", "4096x4096x4096", "50432x4096x1024")
    assert set(planned) >= {("gemm", "4096x4096x4096"), ("gemm", "1024x1024x65536"), ("memory", "8192x4096x4096"),
                            ("repeats of gemm", "1024x1024x65536"),
                            *(("linear fwd+bwd", shape) for shape in linears)}  # fmt: skip
    assert len(set(planned)) == len(planned)
    both = plans(("kernels", "layers"), GPU, False)
    assert sum(plan.needs_s for plan in both if plan.effort is None) < 300
    assert sum(plan.needs_s for plan in both) < 450  # in 600 s with the trial run
    assert not any("8192x8192" in plan.shape for plan in plans(NAMES[1:], GPU, quick=True))


def test_what_targets_are_set_for_comes_first_and_the_frontier_last():
    """Of both suites together: a run that is cut short has the figures of the targets."""
    planned = plans(("kernels", "layers"), GPU, quick=False)
    asked = {(t.measure.suite, t.measure.shape) for t in TARGETS if isinstance(t.measure, Rate)}
    asked |= {
        ("memory", "8192x4096x4096"),
        ("repeats of gemm", "8192x4096x4096"),
        ("repeats of gemm", "1024x1024x65536"),
    }
    turns = [(plan.suite, plan.shape) in asked for plan in planned]
    assert sum(turns) > 10 and all(turns[: sum(turns)])
    brief = [plan.effort is not None for plan in planned]
    assert sum(brief) > 70 and brief == sorted(brief)


def test_the_shapes_of_the_frontier_compare_bf16_with_one_kernel_each():
    """1k to 16k cubes, the networks at several sizes, and odd and small ones, as products and as layers; of the networks at
    one size the products of the backward pass too."""
    planned = plans(NAMES[1:], GPU, quick=False)
    networks = {(m, n, k) for name in NETWORKS for _, m, n, k in SUITES[name]}
    assert {(8192, 28672, 4096), (16384, 1024, 4096), (50432, 3072, 1024), (50432, 1024, 4096)} <= networks
    odd = {(n, n, n) for n in (128, 1000, 1024, 2048, 4095, 4096, 8192, 16384)}
    for suite in ("gemm", "linear fwd+bwd"):
        assert {plan.shape for plan in planned if plan.suite == suite} >= {_x(*shape) for shape in networks | odd}
    products_of = {plan.shape for plan in planned if plan.suite == "gemm"}
    for m, n, k in networks:
        if m in (8192, 50432):
            assert {_x(m, k, n), _x(n, k, m)} <= products_of
    for build, of in ((functools.partial(products.gemm, every=False), "torch.matmul bf16"),
                      (functools.partial(layers.linear, names=("int8",), peers=False), "nn.Linear bf16")):  # fmt: skip
        first, *ours = build(48, 32, 64, CPU).candidates
        assert first.name == of and [c.ours for c in ours] == [True]


def _x(*shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_every_suite_has_cases_on_every_device(device, monkeypatch):
    monkeypatch.setattr("fqt_bench.suites.has_fp8", lambda device: False)
    for name in NAMES:
        planned = plans((name,), device, quick=False)
        assert planned and len({(p.suite, p.shape) for p in planned}) == len(planned)
        assert all(part.isdigit() for p in planned for part in p.shape.split("x"))
    assert [p.suite for p in plans(NAMES, CPU, False, only="gemm 512*")] == ["gemm"]


# ---- the command


def _bench(*arguments):
    return cli.main(["bench", *arguments])


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _bench("--device", "cuda", "--out", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not measured" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_status_says_whether_ours_passed_and_stdout_is_the_table_or_the_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(cuda, "CudaTimer", lambda device: FakeTimer(second=0.1))
    asked = []
    monkeypatch.setattr(ahead, "run_ahead", lambda command, parts, limit_s: asked.append(command(0, parts))
                        or {("suite", "1x1", "hung"): "did not end"})  # fmt: skip
    good, bad = _plan(candidate("fine")), _plan(candidate("fine"), bad_candidates()["wrong"])
    peer = _plan(candidate("fine"), candidate("peer", run=bad_candidates()["error"].run, provider="torch"))
    for todo, status in (([good], 0), ([peer], 0), ([bad], 1), ([_plan(candidate("fine"), candidate("hung"))], 1)):
        monkeypatch.setattr(runs, "plans", lambda suites, device, quick, only="*", todo=todo: todo)
        options = ("--suite", "layers", "kernels", "layers", "--quick", "--out", str(tmp_path), "--budget", "1")
        assert _bench(*options) == status
        out, err = capsys.readouterr()
        (path,) = [line.removeprefix("bench: ") for line in err.splitlines() if line.endswith(".json")]
        result = _valid(json.loads(open(path, encoding="utf-8").read()))
        assert out == report(result) + "\n" and result["budget_s"] == 60 and result["suites"] == ["layers", "kernels"]
        assert out.count("candidate  ") == 1 and out.count("target  ") == 1
    assert json.loads(asked[0][-1])["suites"] == ["layers", "kernels"]
    assert _bench("--suite", "kernels", "--no-trial", "--out", str(tmp_path), "--json") == 0  # nothing hangs untried
    assert len(asked) == 4 and _valid(json.loads(capsys.readouterr().out))["budget_s"] == BUDGET_S


def test_where_nothing_could_be_measured_the_reason_is_said_and_the_status_is_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "plans", lambda *a, **k: [_plan(candidate("a"), needs_s=1e6)])
    assert _bench("--suite", "kernels", "--device", "cpu", "--out", str(tmp_path / "new")) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not measured" in err and "1000000 needed" in err and list(tmp_path.iterdir()) == []


def test_a_case_that_is_not_there_and_a_folder_that_is_none_are_mistakes(tmp_path, capsys):
    assert _bench("--device", "cpu", "--only", "nothing") == 2
    assert "--only nothing: no such case; there are: quantize 256x256" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert _bench("--device", "cpu", "--out", str(tmp_path / "file" / "below")) == 2
    assert "file is not a folder" in capsys.readouterr().err
    for place in (tmp_path, tmp_path / "file" / "b.json"):
        assert _bench("--device", "cpu", "--out", str(tmp_path / "out"), "--benchmark-json", str(place)) == 2
        assert "--benchmark-json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_samples_are_what_pytest_benchmark_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        runs, "plans", lambda *a, **k: [_plan(candidate("a"), candidate("b"), bad_candidates()["skip"])]
    )
    monkeypatch.setattr(runs, "_timer", lambda device: FakeTimer(second=0.1))
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.chdir(tmp_path)
    assert _bench("--suite", "train", "--device", "cpu", "--out", "out", "--benchmark-json", "b.json", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    compare = pytest.importorskip("pytest_benchmark.cli").main
    monkeypatch.setattr(
        "sys.argv", "pytest-benchmark compare b.json --group-by=group --columns=min,median,rounds".split()
    )
    compare()
    text = capsys.readouterr().out
    assert "benchmark 'suite 1x1': 2 tests" in text and "(time in ms)" in text
    for c, best in zip(result["cases"][0]["candidates"], (True, False), strict=False):
        (line,) = [line.split() for line in text.splitlines() if line.startswith(f"{c['name']} ")]
        rounds = len(c["samples_ms"])
        assert line[-1] == str(rounds) and f"{min(c['samples_ms']):.4f}" in line[1] and best == (line[2] == "(1.0)")


def test_the_figures_for_pytest_benchmark_are_its_own():
    stats = pytest.importorskip("pytest_benchmark.stats").Stats()
    data = [0.5, 0.1, 0.2, 0.25, 9.0, 0.3, 0.22]
    own = pytest_json._stats(data)
    for value in data:
        stats.update(value)
    for field in ("min", "max", "mean", "stddev", "rounds", "median", "total", "ops"):
        assert own[field] == pytest.approx(getattr(stats, field), rel=1e-12), field
    assert sorted(own) == sorted([*stats.as_dict(), "data", "iterations"])


# ---- a real run


def test_a_real_smoke_run_measures_every_operator_and_fits_the_schema(tmp_path, monkeypatch):
    """On the CPU, without the counters, which are processes of their own, and in a round or two."""
    monkeypatch.undo()
    timer, threads = CpuTimer(), torch.get_num_threads()
    todo = [replace(p, effort=None) for p in plans(("smoke",), CPU, quick=False)]
    try:
        torch.set_num_threads(1)
        result, path = _run(tmp_path, todo, 60.0, timer, ("smoke",), CPU)
    finally:
        torch.set_num_threads(threads)
    assert failures(result) == [] and path is not None and result["skipped"] == []
    own = [(case["suite"], c["status"]) for case in result["cases"] for c in case["candidates"] if c["ours"]]
    assert {suite for suite, _ in own} == {"quantize", "gemm", "linear fwd+bwd", "convert", "householder",
                                        "psgd step, tiny ResNet float32", "conv fwd+bwd"}  # fmt: skip
    assert {status for _, status in own} == {"ok"} and len(own) >= 20
    assert {c["provider"] for case in result["cases"] for c in case["candidates"]} == {
        "fqt", "torch", "torchao", "StatQuant's way"}  # fmt: skip
