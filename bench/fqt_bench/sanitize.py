"""Every kernel under NVIDIA's compute-sanitizer, at small shapes, on the GPU:

    python -m fqt_bench.sanitize [--tools memcheck racecheck initcheck synccheck] [--only PATTERN] [--out FILE.json]

What runs is `fqt doctor --only PATTERN`, once as it is, so that Triton's cache is warm, and once under each tool. Every
tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that memcheck and initcheck know its bounds. These
two watch all kernels, since to initcheck what a filtered kernel writes is never written; racecheck and synccheck watch only
ours, whose names end in "_kernel". What is found in other kernels than ours is listed, and not held against us.

Before the doctor, each tool has to report a fault that was planted for it (`sanitize_planted`); --selftest does only that.
racecheck looks at shared memory alone: it finds no race in global memory.

Exit status: 0 nothing found by tools that work, 1 anything else, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fqt.cli import MISTAKE, Defaults, UsageError, positive, table

from . import environment
from .sanitize_report import TOOLS, Report, parse

FALLBACK = Path("/usr/local/cuda/bin/compute-sanitizer")
EVERY_KERNEL = "_*"  # the names of kernels; the doctor's other checks are of the reference and of whole layers
EXIT_FOUND = 86  # of compute-sanitizer, where the program itself ended with 0
CONTROL_S = 180  # a control compiles a kernel of three lines
SHOWN = 20  # findings of a tool that are printed; the file has all
_COMMON = (
    "--target-processes", "application-only", "--show-backtrace", "device", "--print-limit", "2000",
    "--error-exitcode", str(EXIT_FOUND),
)  # fmt: skip
# Barriers in shared memory that a program may have: the tools' own count comes from compilers that say how many there are.
_ONLY_OURS = ("--kernel-name", "regex=_kernel$", "--num-cuda-barriers", "64")
OPTIONS = {
    # Torch probes the driver for functions that it may lack, each an API error; launches that fail raise in the doctor.
    "memcheck": ("--padding", "4096", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"),
    "racecheck": ("--racecheck-report", "analysis", *_ONLY_OURS),
    "initcheck": ("--check-api-memory-access", "no"),
    "synccheck": _ONLY_OURS,
}


@dataclass
class Outcome:
    """What a tool came to.

    status: "clean", "found", "failed" (its output cannot be trusted, see reason), "blind" (the planted fault was not
    reported), "not finished" (cut off; what was found until then is there), or "not run". control: "reported", or why not.
    """

    tool: str
    status: str = "not run"
    reason: str = ""
    control: str = "not run"
    report: Report = field(default_factory=Report)
    checks: int = 0
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == "clean"

    def record(self) -> dict[str, Any]:
        """For JSON: findings in our kernels, and those in others."""
        found = {ours: [f.record() for f in self.report.findings if f.ours == ours] for ours in (True, False)}
        return {
            "tool": self.tool, "status": self.status, "reason": self.reason, "control": self.control,
            "errors": self.report.errors, "warnings": self.report.warnings, "checks": self.checks,
            "seconds": round(self.seconds, 1), "command": self.command, "findings": found[True],
            "in_other_kernels": found[False], "problems": self.report.problems,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module for its exit status."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except UsageError as e:
        print(f"sanitize: {e}", file=sys.stderr)
        return MISTAKE


def run(args: argparse.Namespace) -> int:
    """Warm up, run the tools, write the file after each, print the table."""
    binary, device = find(), gpu()
    result: dict[str, Any] = {"environment": environment.environment(device), "compute_sanitizer": version(binary),
                              "only": None if args.selftest else args.only, "tools": []}  # fmt: skip
    expected = 0
    if not args.selftest:
        expected, seconds = warm(args.only, args.timeout_s)
        result["warm"] = {"checks": expected, "seconds": round(seconds, 1)}

    lock = threading.Lock()

    def one(tool: str) -> Outcome:
        outcome = check(tool, binary, args, expected)
        with lock:
            result["tools"].append(outcome.record())
            if args.out:
                environment.write(Path(args.out), result)
        print(f"sanitize: {tool}: {outcome.status}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        return outcome

    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(one, dict.fromkeys(args.tools)))
    print(summary(outcomes, args.selftest))
    return 0 if all(outcome.control == "reported" if args.selftest else outcome.ok for outcome in outcomes) else 1


# ---- what is run


def find() -> str:
    """The path of compute-sanitizer. Raises UsageError where there is none."""
    found = shutil.which("compute-sanitizer") or (str(FALLBACK) if FALLBACK.is_file() else None)
    if found is None:
        raise UsageError(f"compute-sanitizer is neither on PATH nor {FALLBACK}: it comes with the CUDA toolkit")
    return found


def gpu() -> torch.device:
    """The GPU. Raises UsageError where none is NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise UsageError("compute-sanitizer needs an NVIDIA GPU, and torch sees none")
    return torch.device("cuda", torch.cuda.current_device())


def version(binary: str) -> str:
    """What compute-sanitizer says of itself, in one line."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UsageError(f"{binary} --version: {e}") from e
    lines = [line.strip() for line in done.stdout.splitlines() if "ersion" in line]
    return " ".join(lines)[:200] or f"exit status {done.returncode}"


def doctor(only: str) -> list[str]:
    """The command that launches the kernels: it prints a report in JSON."""
    return [sys.executable, "-m", "fqt", "doctor", "--json", "--only", only]


def planted(tool: str) -> list[str]:
    """The command that has the tool's fault."""
    return [sys.executable, "-m", "fqt_bench.sanitize_planted", tool]


def under(binary: str, tool: str, log: Path, target: Sequence[str]) -> list[str]:
    """The command under a tool, whose output goes to a file of its own."""
    return [binary, "--tool", tool, *_COMMON, *OPTIONS[tool], "--log-file", str(log), *target]


def warm(only: str, limit_s: float) -> tuple[int, float]:
    """How many checks the doctor ran without a sanitizer, and the seconds it took. Raises UsageError where one failed."""
    began = time.perf_counter()
    status, out, err = _process(doctor(only), limit_s)
    if status is None:
        raise UsageError(f"the doctor alone takes longer than --timeout-s {limit_s:g}: give it more, or --only less")
    checks = _checks(out)
    if status or not checks:
        wrong = [f"{c['kernel']}: {c['case']}: {c['message']}" for c in checks if not c["ok"]]
        why = "; ".join(wrong[:3]) or (err.strip().splitlines() or ["it ran no check"])[-1]
        raise UsageError(f"{' '.join(doctor(only)[1:])} fails without a sanitizer (exit status {status}): {why[:600]}")
    return len(checks), time.perf_counter() - began


def check(tool: str, binary: str, args: argparse.Namespace, expected: int) -> Outcome:
    """A tool on its control, and on the doctor unless --selftest; expected: checks of the doctor."""
    outcome, began = Outcome(tool), time.perf_counter()
    outcome.control = _control(tool, binary, min(CONTROL_S, args.timeout_s))
    if not args.selftest:
        _examine(outcome, binary, doctor(args.only), args.timeout_s, expected)
    elif outcome.control != "reported":
        outcome.status, outcome.reason = "blind", outcome.control
    if outcome.ok and outcome.control != "reported":
        outcome.status, outcome.reason = "blind", f"planted fault: {outcome.control}"
    outcome.seconds = time.perf_counter() - began
    return outcome


def _control(tool: str, binary: str, limit_s: float) -> str:
    """ "reported", or what became of the planted fault."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        status, _, err = _process(under(binary, tool, log, planted(tool)), limit_s)
        report = parse(_text(log), tool)
    if any(f.kernel.startswith("_planted_") for f in report.ours):
        return "reported"
    why = report.problems[:2] or (err.strip().splitlines() or ["nothing was said"])[-1:]
    cut = f"cut off after {limit_s:g} s" if status is None else f"exit status {status}"
    return f"not reported ({cut}): {'; '.join(why)}"[:500]


def _examine(outcome: Outcome, binary: str, target: list[str], limit_s: float, expected: int) -> None:
    """Run the doctor under the tool and judge what both say."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        outcome.command = under(binary, outcome.tool, log, target)
        status, out, err = _process(outcome.command, limit_s)
        text = _text(log)
    report = outcome.report = parse(text, outcome.tool)
    checks = _checks(out)
    outcome.checks = len(checks)
    failed = [f"{c['kernel']}: {c['case']}" for c in checks if not c["ok"]]
    if status is None:
        outcome.status, outcome.reason = "not finished", f"cut off after {limit_s:g} s"
    elif report.ours:
        outcome.status, outcome.reason = "found", f"{len(report.ours)} places in our kernels"
    elif report.problems:
        outcome.status, outcome.reason = "failed", report.problems[0]
    elif failed:
        outcome.status, outcome.reason = "failed", f"under the tool {len(failed)} checks fail, first {failed[0]}"
    elif len(checks) != expected:
        last = (err.strip().splitlines() or ["no message"])[-1]
        outcome.status, outcome.reason = "failed", f"{len(checks)} checks of {expected} ran: {last}"
    elif status not in ((0, EXIT_FOUND) if report.findings else (0,)):
        outcome.status, outcome.reason = "failed", f"exit status {status}, with nothing reported"
    else:
        outcome.status = "clean"
    outcome.reason = outcome.reason[:500]


def _process(command: Sequence[str], limit_s: float) -> tuple[int | None, str, str]:
    """(exit status, stdout, stderr) of a command, None for the status where it was stopped, with all that it started."""
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                _stop(process)
        out.seek(0), err.seek(0)
        return status, out.read(), err.read()


def _stop(process: subprocess.Popen) -> None:
    """End a process and what it started: politely, so that the sanitizer writes what it has, then not."""
    for how, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(seconds)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _checks(out: str) -> list[dict[str, Any]]:
    """The checks in what the doctor printed; none where that is no report."""
    try:
        return json.loads(out[out.index("{") :])["checks"]
    except (ValueError, KeyError, TypeError):
        return []


# ---- what is printed


def summary(outcomes: Sequence[Outcome], selftest: bool = False) -> str:
    """A line for each tool, then the findings."""
    rows = []
    for o in outcomes:
        others = len(o.report.findings) - len(o.report.ours)
        counts = (str(len(o.report.ours)), str(others), "-" if o.report.errors is None else str(o.report.errors))
        rows.append((o.tool, o.status, *counts, o.control.partition(" (")[0], f"{o.seconds:.0f} s", o.reason[:100]))
    header = ("tool", "status", "places", "elsewhere", "errors", "planted fault", "took", "because")
    if selftest:
        return table(("tool", "planted fault"), [(o.tool, o.control) for o in outcomes])
    parts = [table(header, rows, right=(2, 3, 4))]
    for o in outcomes:
        ours = o.report.ours
        parts += ["\n  ".join([f"{o.tool}: {f.kernel}, {f.count} times", *f.lines]) for f in ours[:SHOWN]]
        parts += [f"{o.tool}: {len(ours) - SHOWN} more"] * (len(ours) > SHOWN)
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fqt_bench.sanitize", description=__doc__.partition(":\n")[0] + ".", formatter_class=Defaults
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument(
        "--only", default=EVERY_KERNEL, metavar="PATTERN", help="of the doctor's checks, 'KERNEL: case'"
    )
    parser.add_argument("--timeout-s", type=_seconds, default=900, metavar="N", help="for each tool")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="tools at a time, on one GPU")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the results, after each tool")
    parser.add_argument("--selftest", action="store_true", help="only see whether each tool reports its planted fault")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
