"""The profiler on an ncu that is not real: trusted only where it counts a known kernel right, and never silently replaced.

The fake prints what ncu 2025 prints (see test_profile_read), of the metrics that it is asked for; every number is made up.
"""

import functools
import json
import os
import stat
import subprocess
import sys
import time

import bench_fabricated as fabricated
import pytest
import torch

from fqt_bench import environment, profile, profile_child, profile_choice, profile_ncu
from fqt_bench.harness import Candidate, Case
from fqt_bench.products import DISPATCHED
from fqt_bench.profile_child import Hooks
from fqt_bench.profile_read import FIELDS
from fqt_bench.suites import Plan

SIZE = 2**30
FAKE = """#!{python}
import json, os, signal, sys, time
arguments = sys.argv[1:]
plan = json.load(open({plan!r}))
if arguments == ["--version"]:
    sys.exit(print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.4.1.0 (build 0) (public-release)"))
if arguments == ["--query-metrics"]:
    print("Device NVIDIA FABRICATED\\n" + "\\n".join(f"{{name}}   Counter   byte   text" for name in plan["listed"]))
    sys.exit(0 if plan["listed"] else 1)
work, log = json.loads(arguments[-1]), arguments[arguments.index("--log-file") + 1]
asked = arguments[arguments.index("--metrics") + 1].split(",")
part = plan[work["mode"]]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([work, asked, os.getpid(), arguments]) + "\\n")
print("a line of the application")
if part.get("said") is not None:
    print(json.dumps(part["said"]))
lines = ["==PROF== Connected to process 1 (python)"]
unknown = [name for name in asked if name in plan["unknown"]]
if unknown:
    lines += [plan["complaint"].format(name) for name in unknown[:1]]
elif part["kernels"] is not None:
    head = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
            "Device", "CC", *asked]
    rows = [head, [""] * 11 + ["%"] * len(asked)]
    for i, kernel in enumerate(part["kernels"]):
        numbers = [f"{{kernel.get(name, 1.0):,}}" for name in asked]
        of = [str(i), "1", "python", "host", kernel["name"], "1", "7", "(128, 1, 1)", "(64, 1, 1)", "0", "9.0"]
        rows.append([*of, *numbers])
    lines += [",".join(f'"{{cell}}"' for cell in row) for row in rows]
lines += part.get("lines", ["==PROF== Disconnected from process 1"])
text = "\\n".join(lines) + "\\n"
open(log, "w").write(text[: part["cut"]] if "cut" in part else text)
if part.get("sleep"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(part["sleep"])
sys.exit(1 if unknown else part.get("status", 0))
"""
READ, WRITTEN = FIELDS["read_bytes"][0], FIELDS["written_bytes"][0]
COPY = {"name": "neg", "gpu__time_duration.sum": 9e5, READ: 1.001 * SIZE, WRITTEN: 0.97 * SIZE}
OURS = {"name": "_scaled_mm_kernel", "gpu__time_duration.sum": 1e6, READ: 3e8, WRITTEN: 1e8,
        FIELDS["tensor_pct"][0]: 81.0}  # fmt: skip
GEMM = f"hopper 128x256x128{DISPATCHED}"
NO_PERMISSION = ["==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
                 "==WARNING== No kernels were profiled."]  # fmt: skip


def result():
    """FABRICATED: a product at 60 % of its prediction, quantization at 50 % of its, a layer at 90 % of its."""
    c = fabricated.candidate
    gemm = fabricated.case("gemm", "8192x8192x8192", c("torch bf16", ours=False, tops=600.0),
                           c("portable", tops=300.0, tag="portable"),
                           c(GEMM, tops=600.0, tag="hopper", prediction="1000 (measured)"))  # fmt: skip
    quantize = fabricated.case(
        "quantize", "8192x8192", c("copy_", ours=False, gb_s=3000.0, tag="copy", prediction="9000 GB/s (measured)"),
        c("rows (rows)", 0.5, tag="rows nearest", ratio=(0.5, 0.4, 0.6), prediction="1.00×"),
        c("rows (tile)", 0.9, tag="rows nearest", ratio=(0.2, 0.1, 0.3), prediction="0.60×"),
        c("both (tile)", 0.4, tag="both nearest", ratio=(0.1, 0.1, 0.1), prediction="0.50×"),
        c(f"both{DISPATCHED}", 0.6, tag="both nearest", ratio=(0.76, 0.7, 0.8), prediction="0.80×"),
        c("gradient", 0.6, ratio=(0.6, 0.5, 0.7), prediction="0.67×"), unit="GB/s",
    )  # fmt: skip
    layer = fabricated.case(
        "linear fwd+bwd", "8192x8192x8192", c("nn.Linear bf16", ours=False, tops=600.0),
        c("fqt.nn.Linear int8", ratio=(1.17, 1.1, 1.2), prediction="1.30× (measured)", tag="int8"),
        c("fqt.nn.Linear psq8", ratio=(0.1, 0.1, 0.1), prediction="1.30× (measured)", tag="psq8", starved=3),
        unit="TFLOP/s",
    )  # fmt: skip
    return fabricated.result(gemm, quantize, layer, suites=["kernels", "layers"])


@pytest.fixture(scope="module")
def record():
    return environment.environment(torch.device("cpu"))


@pytest.fixture
def tool(tmp_path, monkeypatch, record):
    """tool(**plan): an ncu of this plan, by the mode of what runs under it; returns run(*arguments): (exit status, the
    file, the calls of ncu). By default it counts the planted kernel right, and a candidate's as OURS."""
    monkeypatch.setattr(profile, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(profile_ncu, "PLACES", ())
    monkeypatch.setattr(environment, "environment", lambda device: record)
    (tmp_path / "result.json").write_text(json.dumps(result()))

    def durations(work):
        said = {"ops": 1e12, "bytes": None, "kernels": [{"name": "_scaled_mm_kernel", "count": 2, "us": 7.5}]}
        if work["mode"] == "list":
            said = [
                {"suite": "gemm", "shape": "64x64x64", "name": name, "ours": name != "torch"} for name in ("a", "torch")
            ]
        return [sys.executable, "-SIc", f"print({json.dumps(said)!r})", json.dumps(work)]

    monkeypatch.setattr(profile_ncu, "child", durations)

    def put(**plan):
        plan = {"listed": [], "unknown": [], "complaint": "==ERROR== Failed to find metric {}",
                "copy": {"said": {"bytes": SIZE}, "kernels": [COPY]},
                "candidate": {"said": {"ops": 1e12, "bytes": 2e8}, "kernels": [OURS, OURS]}, **plan}  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        binary = tmp_path / "ncu"
        binary.write_text(
            FAKE.format(python=sys.executable, plan=str(tmp_path / "plan.json"), calls=str(tmp_path / "calls"))
        )
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)

        def run(*arguments, ncu=str(binary)):
            arguments = arguments or ("--result", str(tmp_path / "result.json"), "--top", "1")
            out = tmp_path / "out.json"
            status = profile.main([*arguments, "--out", str(out), "--ncu", ncu])
            calls = tmp_path / "calls"
            lines = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
            return status, json.loads(out.read_text()) if out.exists() else None, lines

        run.calls = tmp_path / "calls"
        return run

    return put


def test_the_furthest_candidate_is_profiled_after_the_planted_kernel(tool, capsys):
    status, file, calls = tool()()
    assert status == 0 and [work["mode"] for work, *_ in calls] == ["copy", "candidate"]
    assert calls[1][0] == {"mode": "candidate", "suites": ["kernels", "layers"], "suite": "quantize", "shape": "8192x8192",
                           "name": "rows (rows)"}  # fmt: skip
    arguments = " ".join(calls[1][3])
    assert "--profile-from-start off" in arguments and "--clock-control none" in arguments and "--page raw" in arguments
    assert file["results"] == ["result.json"]
    assert file["ncu"]["planted"]["status"] == "trusted" and "2025.4.1" in file["ncu"]["version"]
    (found,) = file["profiles"]
    assert found["status"] == "counters" and len(found["kernels"]) == 2
    assert found["kernels"][0]["limited_by"] == "tensor cores: 81 % of the peak"
    assert found["kernels"][0]["values"]["read_bytes"] == 3e8
    text = capsys.readouterr().out
    assert "moved 800.0 MB, 400 GB/s: 4.00× the 200.0 MB that have to be moved" in text
    assert "1e+12 operations in 2.0000 ms of kernels: 500 TOPS" in text
    assert text.rstrip().endswith("1 candidates: 1 counters")


@pytest.mark.parametrize(
    "kernels, words",
    [
        ([COPY | {READ: 0.5 * SIZE}], "read bytes"),
        ([COPY | {READ: 1.06 * SIZE}], "read bytes"),
        ([COPY | {WRITTEN: 0.9 * SIZE}], "written bytes"),
        ([COPY | {WRITTEN: 1e3 * SIZE}], "written bytes"),
        ([COPY, COPY], "2 kernels were seen where one ran"),
    ],
)
def test_counters_that_miss_the_planted_bytes_are_not_trusted(tool, capsys, kernels, words):
    """A fake GPU without an L2: what is written has to be there too."""
    status, file, _ = tool(copy={"said": {"bytes": SIZE}, "kernels": kernels})()
    assert status == 1 and file["ncu"]["planted"]["status"] == "not trusted"
    assert words in file["ncu"]["planted"]["reason"]
    text = capsys.readouterr().out
    assert "COUNTERS NOT TRUSTED" in text and "NOT TRUSTED" in text.splitlines()[-1]


def test_what_may_stay_in_the_l2_need_not_be_written():
    from fqt_bench.profile_read import Kernel, Report

    report = Report([Kernel("k", "", "", {"read_bytes": 1.0 * SIZE, "written_bytes": 0.92 * SIZE})])
    assert profile_ncu.doubt(report, SIZE, 50 * 2**20) == ""
    assert "written bytes" in profile_ncu.doubt(report, SIZE, 0)


REASONS = {
    "permission": ({"kernels": None, "lines": NO_PERMISSION}, "ERR_NVGPUCTRPERM"),
    "driver": ({"kernels": None, "lines": ["==ERROR== LibraryNotLoaded"], "status": 1}, "LibraryNotLoaded"),
    "no kernels": ({"kernels": None, "lines": ["==WARNING== No kernels were profiled."]}, "no kernels were profiled"),
    "cut off": ({"kernels": [COPY], "cut": -60}, "cut off"),
    "silent": ({"kernels": None, "lines": [], "status": 9}, "ended with 9"),
}


@pytest.mark.parametrize("case", REASONS)
def test_without_counters_there_are_durations_and_the_reason(tool, capsys, case):
    part, words = REASONS[case]
    status, file, calls = tool(copy={"said": {"bytes": SIZE}, **part})()
    (found,) = file["profiles"]
    assert (
        status == 0
        and found["status"] == "durations only"
        and words in found["reason"]
        and words in file["ncu"]["reason"]
    )
    assert found["kernels"] == [{"name": "_scaled_mm_kernel", "count": 2, "us": 7.5}] and found["ops"] == 1e12
    assert len(calls) == 1  # the candidate did not have to try as well
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("durations only: ") and words in text.splitlines()[-1]


def test_without_ncu_there_are_durations_and_the_reason(tool, capsys, monkeypatch):
    status, file, calls = tool()(ncu="/no/such/ncu")
    assert status == 0 and not calls and file["profiles"][0]["status"] == "durations only"
    assert "/no/such/ncu is no program" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "neither on PATH" in profile_ncu.find(None).why


@pytest.mark.parametrize(
    "complaint", ["==ERROR== Failed to find metric {}", "==ERROR== Some metrics are not available"]
)
def test_metrics_that_ncu_does_not_know_are_left_out_by_name(tool, capsys, complaint):
    """Another name for the same takes their place; a complaint that names none costs all that can be spared."""
    unknown = [FIELDS["read_bytes"][0], FIELDS["tma_pct"][0]] if "{}" in complaint else [FIELDS["tma_pct"][0]]
    kernel = COPY | {"dram__bytes_op_read.sum": SIZE}
    status, file, calls = tool(
        unknown=unknown, complaint=complaint, copy={"said": {"bytes": SIZE}, "kernels": [kernel]}
    )()
    assert status == 0 and file["ncu"]["planted"]["status"] == "trusted"
    assert "tma_pct" in file["ncu"]["unknown"] and FIELDS["tma_pct"][0] in capsys.readouterr().out
    assert not set(unknown) & set(calls[-1][1])
    if "{}" in complaint:
        assert file["ncu"]["metrics"]["read_bytes"] == "dram__bytes_op_read.sum"
        assert list(file["ncu"]["unknown"]) == ["tma_pct"]
        assert len(calls) == 4  # what the first process learns the second knows
    else:
        assert set(calls[-1][1]) == {FIELDS[name][0] for name in ("time_ns", "read_bytes", "written_bytes")}


def test_the_list_of_metrics_ends_the_asking(tool):
    """Three are unknown, and ncu names one at a time: the second time its list tells the third."""
    unknown = [FIELDS[name][0] for name in ("tma_pct", "xu_pct", "lsu_pct")]
    listed = {m.partition(".")[0] for choices in FIELDS.values() for m in choices} - {
        m.partition(".")[0] for m in unknown
    }
    for some, asked in ((sorted(listed), 3), ([], 4), (["x__y"], 4)):
        run = tool(listed=some, unknown=unknown)
        status, file, calls = run()
        assert status == 0 and set(file["ncu"]["unknown"]) == {"tma_pct", "xu_pct", "lsu_pct"}
        assert [work["mode"] for work, *_ in calls].count("copy") == asked
        run.calls.unlink()


def test_an_ncu_that_hangs_is_ended(tool, monkeypatch):
    monkeypatch.setattr(profile_ncu, "PATIENCE_S", 0.2)
    monkeypatch.setattr(profile_ncu, "ONE_S", 1.5)
    candidate = {"said": {"ops": 1.0, "bytes": None}, "kernels": None, "lines": [], "sleep": 60}
    began = time.monotonic()
    status, file, calls = tool(candidate=candidate)()
    assert time.monotonic() - began < 30
    assert (
        file["profiles"][0]["status"] == "durations only"
        and "did not end within 1.5 s" in file["profiles"][0]["reason"]
    )
    assert status == 0 and not _lives(calls[-1][2])


def _lives(pid):
    for _ in range(50):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


def test_when_the_time_is_over_the_rest_is_not_run(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_ncu, "PATIENCE_S", 0.2)
    candidate = {"said": None, "kernels": None, "lines": [], "sleep": 60}
    arguments = ("--result", str(tmp_path / "result.json"), "--top", "2", "--limit-s", "2")
    status, file, _ = tool(candidate=candidate)(*arguments)
    assert status == 1 and [p["status"] for p in file["profiles"]] == ["not run", "not run"]
    assert file["profiles"][1]["reason"] == "--limit-s 2 is over"


def test_a_candidate_that_cannot_run_fails_by_its_own_reason(tool):
    candidate = {"said": {"failed": "OutOfMemoryError: no"}, "kernels": None, "lines": [], "status": 1}
    status, file, _ = tool(candidate=candidate)()
    assert status == 1 and file["profiles"][0]["status"] == "failed"
    assert file["profiles"][0]["reason"] == "OutOfMemoryError: no"


@pytest.mark.parametrize("part", [{"status": 1}, {"cut": -60}])
def test_counters_that_are_not_whole_fail(tool, part):
    status, file, _ = tool(candidate={"said": {"ops": 1.0, "bytes": 1.0}, "kernels": [OURS, OURS], **part})()
    assert status == 1 and file["profiles"][0]["status"] == "counters, not whole" and file["profiles"][0]["reason"]


def test_cases_are_chosen_by_pattern(tool, tmp_path, capsys):
    _, file, _ = tool()("--only", "gemm 64*")
    assert [p["name"] for p in file["profiles"]] == ["a"]
    _, file, _ = tool()("--only", "gemm", "--candidate", "torch")
    assert [p["name"] for p in file["profiles"]] == ["torch"]
    _, file, _ = tool()("--result", str(tmp_path / "result.json"), "--only", "gemm*", "--top", "1")
    assert [p["name"] for p in file["profiles"]] == [GEMM] and "--top takes more" in capsys.readouterr().err
    assert tool()("--only", "gemm", "--candidate", "none")[0] == 2
    assert "gemm 64x64x64: torch" in capsys.readouterr().err


def test_several_results_are_looked_at_as_one(tool, tmp_path, capsys):
    whole = result()
    parts = []
    for suite, cases in (("kernels", whole["cases"][:2]), ("layers", whole["cases"][2:])):
        parts.append(tmp_path / f"{suite}.json")
        parts[-1].write_text(json.dumps({**whole, "suites": [suite], "cases": cases}))
    status, file, calls = tool()("--result", *map(str, parts), "--top", "3")
    assert status == 0 and file["results"] == ["kernels.json", "layers.json"]
    assert [p["suite"] for p in file["profiles"]] == ["quantize", "gemm", "linear fwd+bwd"]
    assert calls[-1][0]["suites"] == ["kernels", "layers"] and "is of FABRICATED" in capsys.readouterr().err


def test_mistakes_in_the_call_are_named(tool, tmp_path, capsys):
    run = tool()
    assert run("--top", "3")[0] == 2 and "--result" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert run("--result", str(tmp_path / "bad.json"))[0] == 2 and "bad.json" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_profiled(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile.main(["--only", "gemm"]) == 2 and "not measured" in capsys.readouterr().err


# ---- which are furthest


def test_the_furthest_of_each_kind_comes_first():
    found = profile_choice.slowest(result(), 9)
    assert [(r.name, round(r.share, 3)) for r in found] == [
        ("rows (rows)", 0.5), (GEMM, 0.6), ("fqt.nn.Linear int8", 0.9), ("gradient", 0.896),
        (f"both{DISPATCHED}", 0.95)]  # fmt: skip
    assert [r.name for r in profile_choice.slowest(result(), 2)] == ["rows (rows)", GEMM]
    assert found[1].why == "600 TOPS of 1000 (measured) predicted" and found[0].why == "0.5× of 1.00× predicted"


def test_a_time_over_its_prediction_is_slow():
    stage = fabricated.candidate("transform", 0.3, tag="transform", prediction="0.120 ms (datasheet)")
    base = fabricated.candidate("statistics", 0.1, tag="statistics", prediction="0.100 ms (datasheet)")
    found = profile_choice.reaches(fabricated.case("householder", "1x1x1", base, stage, unit="ms"))
    assert [(r.name, round(r.share, 6)) for r in found] == [("statistics", 1.0), ("transform", 0.4)]


# ---- what runs under ncu


class Recorder:
    """Hooks that record what is called, of a device that is not there."""

    def __init__(self):
        self.calls = []
        by_name = {"k": {"count": 1, "us": 2.0}}
        self.hooks = Hooks(*(lambda name=name: self.calls.append(name) for name in ("synchronize", "start", "stop")),
                           lambda run: (run(), self.calls.append("launches"), {"by_name": by_name})[-1])  # fmt: skip

    def run(self):
        self.calls.append("run")


def test_one_warm_run_is_in_the_region_and_nothing_else():
    r = Recorder()
    profile_child.region(r.run, r.hooks, warm_ups=2)
    assert r.calls == ["run", "run", "synchronize", "start", "run", "synchronize", "stop"]

    def broken():
        r.run()
        if "start" in r.calls:
            raise ValueError

    r.calls.clear()
    with pytest.raises(ValueError):
        profile_child.region(broken, r.hooks)
    assert r.calls[-1] == "stop"


def test_a_candidate_of_a_real_case_is_found_and_run(capsys):
    r, cpu = Recorder(), torch.device("cpu")
    listed = profile_child.answer({"mode": "list", "suites": ["kernels"], "only": "quantize*"}, cpu, r.hooks)
    assert {"suite": "quantize", "shape": "512x1024", "name": "clone", "ours": False} in listed and not r.calls
    work = {"suites": ["kernels"], "suite": "quantize", "shape": "512x1024", "name": "clone"}
    assert profile_child.main([json.dumps({"mode": "candidate", **work})], cpu, r.hooks) == 0
    assert r.calls == ["synchronize", "start", "synchronize", "stop"]
    assert json.loads(capsys.readouterr().out) == {"ops": None, "bytes": 512 * 1024 * 8.0}
    said = profile_child.answer({"mode": "durations", **work}, cpu, r.hooks)
    assert said["kernels"] == [{"name": "k", "count": 1, "us": 2.0}] and r.calls[-1] == "launches"
    for wrong in ({"name": "none"}, {"shape": "1x1"}):
        assert profile_child.main([json.dumps({"mode": "candidate", **work, **wrong})], cpu, r.hooks) == 1
        assert json.loads(capsys.readouterr().out)["failed"].startswith("LookupError")


def test_a_configuration_is_the_same_whether_dispatch_selects_it_or_not(monkeypatch):
    case = Case(
        "gemm", "1x1x1", "TOPS", "a", (Candidate("a", None, None), Candidate(GEMM, None, None, missing="no GPU"))
    )
    plan = Plan("gemm", "1x1x1", 1, lambda sets: case)
    monkeypatch.setattr(profile_child, "plans", lambda suites, device, quick: [plan])
    find = functools.partial(profile_child.find, ["kernels"], "gemm", "1x1x1", device=torch.device("cpu"))
    assert find(f"a{DISPATCHED}").name == "a"
    with pytest.raises(LookupError, match="no GPU"):
        find(GEMM.removesuffix(DISPATCHED))


def test_what_a_gpu_is_asked_for_is_there():
    assert all(map(callable, profile_child.of_cuda()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_child_runs_on_a_gpu(capsys):
    assert profile_child.main([json.dumps({"mode": "copy", "bytes": 2**20})]) == 0
    assert json.loads(capsys.readouterr().out) == {"bytes": 2**20}
    work = {"mode": "durations", "suites": ["kernels"], "suite": "quantize", "shape": "4096x4096", "name": "copy_"}
    assert profile_child.main([json.dumps(work)]) in (0, 1)  # torch.profiler may not be allowed to look
    assert json.loads(capsys.readouterr().out).keys() & {"bytes", "failed"}


def test_the_planted_kernel_reads_and_writes_what_it_says():
    r = Recorder()
    assert profile_child.answer({"mode": "copy", "bytes": 4096}, torch.device("cpu"), r.hooks) == {"bytes": 4096}
    assert r.calls == ["synchronize", "start", "synchronize", "stop"]


def test_the_child_is_a_command_that_there_is():
    """As it is started, up to where it needs the GPU."""
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(profile_ncu.child({"mode": "copy"}), env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "failed" in profile_ncu.answer(done.stdout)
