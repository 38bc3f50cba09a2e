"""What compute-sanitizer says, read; and the whole command, on a compute-sanitizer and a doctor that are not real."""

import json
import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

from fqt import cli
from fqt_bench import sanitize, sanitize_planted
from fqt_bench.sanitize_report import TOOLS, parse

OOB = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _rows_kernel+0x3d0 in quantize.py:137
=========     by thread (5,0,0) in block (2,0,0)
=========     Address 0x7f0c00000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0c00000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame:  [0x2dd3f1] in libcuda.so.1
=========
========= Invalid __global__ read of size 4 bytes
=========     at _rows_kernel+0x3d0 in quantize.py:137
=========     by thread (6,0,0) in block (2,0,0)
=========     Address 0x7f0c00000204 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
FRESH = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 16 bytes
=========     at load_tile+0x100 in statistics.py:70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========         Device Frame: _tile_kernel+0x2c0 in quantize.py:99
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<int>>(int, T2, T3)+0x50
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec00200
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _scaled_mm_kernel+0x90 in gemm.py:41
=========     and Read access at _scaled_mm_kernel+0x100 in gemm.py:51 [508 hazards]
=========
========= Warning: Race reported between Write access at _leaders_kernel+0x90 in grouping.py:41
=========     and Read access at _leaders_kernel+0x100 in grouping.py:51 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
BARRIER = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at _hopper_scaled_mm_kernel+0x15520 in gemm_hopper.py:150
=========     by thread (128,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
SAMPLES = {"memcheck": OOB, "initcheck": FRESH, "racecheck": RACE, "synccheck": BARRIER}


# ---- reading


@pytest.mark.parametrize(
    "tool, kinds, kernels",
    [
        ("memcheck", ["Invalid __global__ read of size 4 bytes"], ["_rows_kernel"]),
        ("initcheck", ["Uninitialized __global__ memory read of size 16 bytes"], ["_tile_kernel"]),
        ("racecheck", ["error: Race reported", "warning: Race reported"], ["_scaled_mm_kernel", "_leaders_kernel"]),
        ("synccheck", ["Barrier error detected. Divergent thread(s) in block"], ["_hopper_scaled_mm_kernel"]),
    ],
)
def test_a_report_is_a_finding_of_its_kernel(tool, kinds, kernels):
    report = parse(SAMPLES[tool], tool)
    assert [f.kind for f in report.ours] == kinds and [f.kernel for f in report.ours] == kernels
    assert not report.problems and all(f.place and f.lines for f in report.findings)


def test_the_same_place_counts_up_and_keeps_the_first_report_without_host_frames():
    (finding,) = parse(OOB, "memcheck").findings
    assert finding.count == 2 and finding.place == "_rows_kernel+0x3d0 in quantize.py:137"
    assert "by thread (5,0,0) in block (2,0,0)" in finding.lines and not any("Host Frame" in x for x in finding.lines)


def test_a_kernel_of_torchs_is_not_ours():
    other = parse(FRESH, "initcheck").findings[1]
    assert not other.ours and "vectorized_elementwise_kernel" in other.kernel
    text = OOB.replace("_rows_kernel", "void at::native::_cat_kernel<float>(float*)")
    assert not parse(text, "memcheck").ours


def test_the_manuals_own_layout_without_indents_is_read_alike():
    flat = OOB.replace("=========     ", "========= ").replace("=========         ", "========= ")
    assert parse(flat, "memcheck").findings == parse(OOB, "memcheck").findings


@pytest.mark.parametrize("tool, text", [(tool, CLEAN_RACE if tool == "racecheck" else CLEAN) for tool in TOOLS])
def test_a_clean_output_has_neither_findings_nor_problems(tool, text):
    report = parse(text, tool)
    assert report.errors == 0 and not report.findings and not report.problems


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no summary"),
        ("Segmentation fault\n", "no summary"),
        ("========= COMPUTE-SANITIZER\n", "no summary"),
        (OOB.rpartition("========= ERROR")[0], "no summary"),
        (OOB.replace("SUMMARY: 2", "SUMMARY: 5"), "the summary counts 5 errors, but 2 were read"),
        (CLEAN.replace("0 errors", "1,204 errors"), "the summary counts 1204 errors"),
        (OOB.replace("SUMMARY: 2 errors", "SUMMARY: 9 errors\n========= ERROR SUMMARY: 7 errors were not printed. Use "
                     "--print-limit option to adjust the number of printed errors"), "7 reports were not printed"),
        ("========= Error: Target application terminated before first instrumented API call\n" + CLEAN, "terminated"),
        ("========= Internal Sanitizer Error: The Sanitizer encountered an error while launching _rows_kernel and didn't "
         "track the launch. Errors might go undetected.\n" + CLEAN, "Internal Sanitizer Error"),
        ("========= Warning: Detected overflow of tracked cuda::barrier structures.\n" + CLEAN, "overflow"),
        (OOB.replace("Invalid __global__ read of size 4 bytes", "Something new", 1), "Something new"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_a_problem_and_never_no_errors(text, why):
    assert any(why in problem for problem in parse(text, "memcheck").problems)


def test_a_race_summary_must_agree_with_its_reports():
    assert any("counts 3 hazards" in p for p in parse(RACE.replace(": 2 hazards", ": 3 hazards"), "racecheck").problems)


def test_an_error_of_a_call_from_the_host_is_no_kernels():
    head = '========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA API call\n'
    report = parse(head + CLEAN.replace("0 errors", "1 error"), "memcheck")
    assert not report.ours and not report.problems and report.findings[0].kernel is None


# ---- the command

FAKE = """\
#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0")
    sys.exit()
tool, log = (arguments[arguments.index(name) + 1] for name in ("--tool", "--log-file"))
plan = json.load(open({plan!r}))
part = plan["planted" if "planted" in " ".join(arguments) else "doctor"][tool]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([arguments, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]) + "\\n")
with open(log, "w") as file:
    file.write(part["log"])
if part.get("sleep"):
    time.sleep(part["sleep"])
print(part.get("out", ""))
sys.exit(part.get("status", 0))
"""
CHECKS = [{"kernel": "_rows_kernel", "case": "a", "ok": True, "message": ""}]
DOCTOR = json.dumps({"checks": CHECKS}, indent=1)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(**parts): a compute-sanitizer of these outputs first on PATH, by tool; by default it reports what is planted and
    finds nothing in the doctor. Returns the folder."""

    def put(doctor=None, planted=None):
        names = {"memcheck": "_planted_bounds_kernel", "initcheck": "_planted_fresh_kernel",
                 "racecheck": "_planted_asm_kernel", "synccheck": "_planted_asm_kernel"}  # fmt: skip
        first = {"memcheck": "_rows_kernel", "initcheck": "_tile_kernel", "racecheck": "_scaled_mm_kernel",
                 "synccheck": "_hopper_scaled_mm_kernel"}  # fmt: skip
        seen = {tool: {"log": SAMPLES[tool].replace(first[tool], names[tool]), "status": 86} for tool in TOOLS}
        clean = {tool: {"log": CLEAN_RACE if tool == "racecheck" else CLEAN, "out": DOCTOR} for tool in TOOLS}
        plan = {"planted": seen | (planted or {}), "doctor": clean | (doctor or {})}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        binary = tmp_path / "compute-sanitizer"
        plan, calls = str(tmp_path / "plan.json"), str(tmp_path / "calls")
        binary.write_text(FAKE.format(python=sys.executable, plan=plan, calls=calls))
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path

    monkeypatch.setattr(sanitize, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(sanitize, "doctor", lambda only: [sys.executable, "-c", f"print({DOCTOR!r})", only])
    return put


def run(folder, *arguments):
    """(exit status, what was written) of the command."""
    out = folder / "out.json"
    status = sanitize.main([*arguments, "--out", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else None


def test_all_tools_are_run_and_nothing_found_is_success(fake, capsys):
    folder = fake()
    status, result = run(folder, "--only", "_rows*", "--jobs", "2")
    assert status == 0 and {t["tool"]: t["status"] for t in result["tools"]} == dict.fromkeys(TOOLS, "clean")
    assert (
        result["environment"]["torch"] and "2025.3.1.0" in result["compute_sanitizer"] and result["warm"]["checks"] == 1
    )
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    assert len(calls) == 2 * len(TOOLS) and all(caching == "1" for _, caching in calls)
    assert sum("_rows*" in arguments for arguments, _ in calls) == len(TOOLS)
    assert "memcheck" in capsys.readouterr().out


def test_only_tools_that_do_not_follow_writes_are_kept_to_our_kernels(fake):
    folder = fake()
    run(folder)
    calls = [json.loads(line)[0] for line in (folder / "calls").read_text().splitlines()]
    filtered = {arguments[arguments.index("--tool") + 1] for arguments in calls if "--kernel-name" in arguments}
    assert filtered == {"racecheck", "synccheck"}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_finding_in_our_kernels_fails_with_the_report(fake, capsys, tool):
    folder = fake(doctor={tool: {"log": SAMPLES[tool], "out": DOCTOR, "status": 86}})
    status, result = run(folder, "--tools", tool)
    (found,) = result["tools"]
    assert status == 1 and found["status"] == "found"
    assert found["findings"] == [f.record() for f in parse(SAMPLES[tool], tool).ours]
    assert found["findings"][0]["kernel"] in capsys.readouterr().out


def test_findings_elsewhere_are_listed_and_do_not_fail(fake):
    text = "========= COMPUTE-SANITIZER\n" + FRESH.partition("=========\n")[2].replace("2 errors", "1 error")
    folder = fake(doctor={"initcheck": {"log": text, "out": DOCTOR, "status": 86}})
    status, result = run(folder, "--tools", "initcheck")
    assert status == 0 and not result["tools"][0]["findings"] and len(result["tools"][0]["in_other_kernels"]) == 1


@pytest.mark.parametrize(
    "part, status, reason",
    [
        ({"log": "", "out": DOCTOR}, "failed", "no summary"),
        ({"log": "========= Error: No attachable process found.\n" + CLEAN, "out": DOCTOR}, "failed", "attachable"),
        ({"log": CLEAN, "out": DOCTOR, "status": 3}, "failed", "exit status 3"),
        ({"log": CLEAN, "out": DOCTOR, "status": 86}, "failed", "exit status 86"),
        ({"log": CLEAN, "out": "", "status": 1}, "failed", "0 checks of 1"),
        (
            {"log": CLEAN, "out": DOCTOR.replace("true", "false"), "status": 1},
            "failed",
            "1 checks fail, first _rows_kernel",
        ),
    ],
)
def test_a_run_that_proves_nothing_is_not_clean(fake, part, status, reason):
    code, result = run(fake(doctor={"memcheck": part}), "--tools", "memcheck")
    assert code == 1 and result["tools"][0]["status"] == status and reason in result["tools"][0]["reason"]


def test_a_tool_that_is_cut_off_tells_what_it_had_found(fake):
    text = OOB.rpartition("========= ERROR")[0]
    folder = fake(doctor={"memcheck": {"log": text, "out": DOCTOR, "sleep": 60}})
    status, result = run(folder, "--tools", "memcheck", "--timeout-s", "2")
    (tool,) = result["tools"]
    assert status == 1 and tool["status"] == "not finished" and tool["findings"][0]["kernel"] == "_rows_kernel"
    assert 2 <= tool["seconds"] < 30


def test_a_tool_that_is_silent_about_the_planted_fault_is_blind(fake):
    folder = fake(planted={"racecheck": {"log": CLEAN_RACE}})
    status, result = run(folder, "--tools", "memcheck", "racecheck")
    assert status == 1 and [t["status"] for t in result["tools"]] == ["clean", "blind"]
    assert sanitize.main(["--selftest", "--tools", "racecheck"]) == 1
    assert sanitize.main(["--selftest", "--tools", "memcheck"]) == 0


def test_the_finding_of_another_kernel_is_not_that_of_the_planted_one(fake):
    folder = fake(planted={"memcheck": {"log": OOB, "status": 86}})
    assert run(folder, "--tools", "memcheck")[1]["tools"][0]["status"] == "blind"


def test_mistakes_end_with_2_and_a_sentence(fake, capsys, monkeypatch):
    folder = fake()
    monkeypatch.setattr(sanitize, "doctor", lambda only: [sys.executable, "-c", "import sys; sys.exit('no such case')"])
    assert run(folder)[0] == 2 and "no such case" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(folder / "nowhere"))
    monkeypatch.setattr(sanitize, "FALLBACK", folder / "nowhere")
    assert sanitize.main([]) == 2 and "compute-sanitizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitize.main(["--timeout-s", "0"])


@pytest.mark.interpreted
def test_without_a_gpu_it_says_so(fake, monkeypatch):
    fake()
    monkeypatch.undo()
    with pytest.raises(sanitize.UsageError, match="GPU"):
        sanitize.gpu()


@pytest.mark.interpreted
def test_the_doctor_takes_the_command_and_its_report_is_read(capsys):
    real = sanitize.doctor("_params_kernel: grid, 1 parts")
    assert real[1:3] == ["-m", "fqt"] and cli.main(real[3:]) == 0
    (check,) = sanitize._checks("a line of a library's\n" + capsys.readouterr().out)
    assert check["kernel"] == "_params_kernel" and check["ok"] and {"case", "message"} <= check.keys()


# ---- the planted faults


def test_every_tool_has_a_planted_fault_that_the_compiler_accepts():
    """For sm_90 and sm_80, with ptxas: in a process of its own, since this one may be the interpreter's."""
    assert set(sanitize_planted.PLANTED) == set(TOOLS)
    code = """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile
        from fqt_bench.sanitize_planted import PLANTED, SIZE
        for kernel, constants, _ in PLANTED.values():
            constants = constants | dict(SIZE=SIZE)
            signature = dict(x_ptr="*i32", out_ptr="*i32") | dict.fromkeys(constants, "constexpr")
            values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            done = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=2))
            ptx = done.asm["ptx"]
            print(done.metadata.name, ptx.count("st.shared"), ptx.count("@goes bar.sync"), ".shared " in ptx)
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "_planted_bounds_kernel 0 0 False",
        "_planted_fresh_kernel 0 0 False",
        "_planted_asm_kernel 1 0 True",
        "_planted_asm_kernel 0 1 False",
    ]
