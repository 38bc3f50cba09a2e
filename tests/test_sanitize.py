"""The whole command, on a compute-sanitizer and a doctor that are not real."""

import json
import os
import select
import signal
import stat
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from test_sanitize_report import CLEAN, CLEAN_RACE, FRESH, OOB, SAMPLES

from fqt import cli
from fqt_bench import sanitize, sanitize_planted
from fqt_bench.sanitize_report import TOOLS, parse

FAKE = """\
#!{python}
import json, os, signal, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0")
    sys.exit()
tool, log = (arguments[arguments.index(name) + 1] for name in ("--tool", "--log-file"))
plan = json.load(open({plan!r}))
part = plan["planted" if "planted" in " ".join(arguments) else "doctor"][tool]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([arguments, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"), os.getpid()]) + "\\n")
with open(log, "w") as file:
    file.write(part["log"])
if part.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if part.get("interrupt"):
    os.kill(os.getppid(), signal.SIGINT)
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


def calls_in(folder):
    """[arguments, what it knows of torch's allocator, process] of each call of the fake."""
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_all_tools_are_run_and_nothing_found_is_success(fake, capsys):
    folder = fake()
    status, result = run(folder, "--only", "_rows*", "--jobs", "2")
    assert status == 0 and {t["tool"]: t["status"] for t in result["tools"]} == dict.fromkeys(TOOLS, "clean")
    assert (
        result["environment"]["torch"] and "2025.3.1.0" in result["compute_sanitizer"] and result["warm"]["checks"] == 1
    )
    calls = calls_in(folder)
    assert len(calls) == 2 * len(TOOLS) and all(caching == "1" for _, caching, _ in calls)
    assert sum("_rows*" in arguments for arguments, *_ in calls) == len(TOOLS)
    assert "memcheck" in capsys.readouterr().out


def test_only_tools_that_do_not_follow_writes_are_kept_to_our_kernels(fake):
    folder = fake()
    run(folder)
    calls = [arguments for arguments, *_ in calls_in(folder)]
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
            "1 checks fail only under the tool, first _rows_kernel",
        ),
    ],
)
def test_a_run_that_proves_nothing_is_not_clean(fake, part, status, reason):
    code, result = run(fake(doctor={"memcheck": part}), "--tools", "memcheck")
    assert code == 1 and result["tools"][0]["status"] == status and reason in result["tools"][0]["reason"]


def test_a_tool_that_is_cut_off_tells_what_it_had_found(fake):
    text = OOB.rpartition("========= ERROR")[0]
    folder = fake(doctor={"memcheck": {"log": text, "out": DOCTOR, "sleep": 60}})
    status, result = run(folder, "--tools", "memcheck", "--limit-s", "2")
    (tool,) = result["tools"]
    assert status == 1 and tool["status"] == "not finished" and tool["findings"][0]["kernel"] == "_rows_kernel"
    assert tool["reason"] == "--limit-s 2 is over" and tool["control"] == "reported"


def test_the_limit_is_that_of_all_tools_together(fake):
    """The second is not begun: the first has used the time of both."""
    folder = fake(doctor={"memcheck": {"log": CLEAN, "out": DOCTOR, "sleep": 60}})
    status, result = run(folder, "--tools", "memcheck", "racecheck", "--limit-s", "1.5")
    assert status == 1 and [t["status"] for t in result["tools"]] == ["not finished", "not run"]
    assert [t["reason"] for t in result["tools"]] == ["--limit-s 1.5 is over"] * 2
    assert {call[call.index("--tool") + 1] for call, *_ in calls_in(folder)} == {"memcheck"}


def test_a_command_may_take_what_the_others_have_left(monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(sanitize, "time", clock)
    now = 0.0
    commands, sleeps = sanitize.Commands(100), [sys.executable, "-c", "import time; time.sleep(10)"]
    now = 99.9
    assert commands.run(sleeps)[0] is None and commands.over() == ""
    now = 100.0
    assert commands.over() == "--limit-s 100 is over" and commands.run(["no such command"]) == (None, "", "")


def test_an_interrupt_ends_what_runs_and_tells_what_was_found(fake, monkeypatch):
    """Also what does not end when asked to; and nothing more is begun."""
    monkeypatch.setattr(sanitize, "PATIENCE_S", 0.3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    cut = {"log": OOB.rpartition("========= ERROR")[0], "sleep": 60, "stubborn": True, "interrupt": True}
    folder = fake(doctor={"memcheck": cut}, planted={"racecheck": {"log": "", "sleep": 60}})
    tools = ["memcheck", "racecheck", "initcheck"]
    try:
        status, result = run(folder, "--tools", *tools, "--jobs", "2")
    except KeyboardInterrupt:
        pytest.fail("the interrupt left the command")
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == cli.INTERRUPTED
    assert [t["tool"] for t in result["tools"]] == tools
    assert [t["status"] for t in result["tools"]] == ["not finished", "not finished", "not run"]
    assert {t["reason"] for t in result["tools"]} == {"interrupted"}
    assert result["tools"][0]["findings"][0]["kernel"] == "_rows_kernel"
    for *_, process in calls_in(folder):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_a_command_leaves_behind_is_ended(tmp_path):
    """Such as the doctor of a sanitizer that has crashed: here a process that keeps a pipe open."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    left = "import os, sys, time\npipe = open(sys.argv[1], 'w')\nif not os.fork():\n    time.sleep(60)\nos._exit(3)"
    try:
        assert sanitize.Commands(60).run([sys.executable, "-c", left, str(tmp_path / "pipe")]) == (3, "", "")
        assert select.select([end], [], [], 10)[0], "nobody has it open any more"
    finally:
        os.close(end)


def test_the_file_has_each_tool_once_it_is_done(fake, monkeypatch):
    written = []
    monkeypatch.setattr(sanitize.environment, "write", lambda _, result: written.append(json.loads(json.dumps(result))))
    run(fake(), "--tools", "synccheck", "memcheck")
    assert [[t["status"] for t in result["tools"]] for result in written] == [
        ["not run", "not run"], ["clean", "not run"], ["clean", "clean"],
    ]  # fmt: skip


def test_a_check_that_fails_without_a_tool_is_not_held_against_the_tools(fake, monkeypatch, capsys):
    """It is told of, and the command fails; what fails only under a tool is the tool's."""
    wrong = CHECKS[0] | {"case": "b", "ok": False, "message": "1 of 4 differ"}
    warmed, under = (
        json.dumps({"checks": checks}) for checks in ([*CHECKS, wrong], [CHECKS[0] | {"ok": False}, wrong])
    )
    command = [sys.executable, "-c", f"import sys; print({warmed!r}); sys.exit(1)"]
    monkeypatch.setattr(sanitize, "doctor", lambda only: command)
    folder = fake(doctor={"memcheck": {"log": CLEAN, "out": warmed, "status": 1},
                          "synccheck": {"log": CLEAN, "out": under, "status": 1}})  # fmt: skip
    status, result = run(folder, "--tools", "memcheck", "synccheck")
    assert [t["status"] for t in result["tools"]] == ["clean", "failed"]
    assert "1 checks fail only under the tool, first _rows_kernel: a" in result["tools"][1]["reason"]
    assert result["warm"]["checks"] == 2 and result["warm"]["status"] == 1
    assert result["warm"]["failed"] == [{"kernel": "_rows_kernel", "case": "b", "message": "1 of 4 differ"}]
    assert status == 1 and "_rows_kernel: b: 1 of 4 differ" in capsys.readouterr().out
    assert run(folder, "--tools", "memcheck")[0] == 1, "a kernel is wrong"


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
        sanitize.main(["--limit-s", "0"])


def test_missing_says_why_it_cannot_run(fake, monkeypatch):
    folder = fake()
    assert sanitize.missing() == ""
    monkeypatch.setenv("PATH", str(folder / "nowhere"))
    monkeypatch.setattr(sanitize, "FALLBACK", folder / "nowhere")
    assert "CUDA toolkit" in sanitize.missing()
    monkeypatch.setattr(sanitize, "FALLBACK", folder / "compute-sanitizer")
    assert sanitize.missing() == "" and sanitize.find() == str(folder / "compute-sanitizer")


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
