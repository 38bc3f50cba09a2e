"""Every kernel under NVIDIA's compute-sanitizer, at small shapes, on the GPU:

    python -m fqt_bench.sanitize [--tools memcheck racecheck initcheck synccheck] [--only PATTERN] [--limit-s N]
                                 [--jobs N] [--selftest] [--out FILE.json]

What runs is `fqt doctor --only PATTERN`, once as it is, so that Triton's cache is warm, and once under each tool. Every
tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that memcheck and initcheck know its bounds. These
two watch all kernels, since to initcheck what a filtered kernel writes is never written; racecheck and synccheck watch only
ours, whose names end in "_kernel". What is found in other kernels than ours is listed, and not held against us.

Before the doctor, each tool has to report a fault that was planted for it (`sanitize_planted`); --selftest does only that.
racecheck looks at shared memory alone: it finds no race in global memory.

The file is written after each tool, and when the command is interrupted or its --limit-s is over: the tools that were
running are "not finished", with what they had found, and the others "not run". A check that fails without a tool as well is
in the file under "warm", and not held against the tools.

Exit status: 0 nothing found by tools that work, and no check fails, 1 anything else, 2 a mistake in the call,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
from pathlib import Path
from typing import Any

import torch

from fqt.cli import INTERRUPTED, MISTAKE, Defaults, UsageError, positive, table

from . import environment
from .sanitize_report import SHOWN, TOOLS, Outcome, parse, summary

FALLBACK = Path("/usr/local/cuda/bin/compute-sanitizer")
EVERY_KERNEL = "_*"  # the names of kernels; the doctor's other checks are of the reference and of whole layers
EXIT_FOUND = 86  # of compute-sanitizer, where the program itself ended with 0
CONTROL_S = 60  # a control compiles a kernel of three lines
PATIENCE_S = 3  # with a process that was asked to end; fqt_bench.hardware has 10 s with this one
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module for its exit status."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except UsageError as e:
        print(f"sanitize: {e}", file=sys.stderr)
        return MISTAKE


def run(args: argparse.Namespace) -> int:
    """Warm up, run the tools, write the file after each, print the table. An interrupt ends all that runs."""
    commands = Commands(args.limit_s)
    binary, device = find(), gpu()
    outcomes = {tool: Outcome(tool) for tool in args.tools}
    result: dict[str, Any] = {"environment": environment.environment(device),
                              "compute_sanitizer": version(binary, commands),
                              "only": None if args.selftest else args.only}  # fmt: skip
    lock = threading.Lock()

    def save() -> None:
        with lock:
            result["tools"] = [outcome.record() for outcome in outcomes.values()]
            if args.out:
                environment.write(Path(args.out), result)

    def one(tool: str) -> None:
        outcomes[tool] = outcome = check(
            tool, binary, commands, None if args.selftest else args.only, result.get("warm")
        )
        save()
        print(f"sanitize: {tool}: {outcome.status}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)

    interrupted, pool = False, ThreadPoolExecutor(args.jobs)
    try:
        if not args.selftest:
            result["warm"] = warm(args.only, commands)
        save()
        list(pool.map(one, outcomes))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        commands.stop()
        pool.shutdown(cancel_futures=True)
    if interrupted:
        for outcome in outcomes.values():
            outcome.reason = outcome.reason or ("interrupted" if outcome.status == "not run" else "")
        save()
    return _say(list(outcomes.values()), args.selftest, result.get("warm"), interrupted)


def _say(outcomes: list[Outcome], selftest: bool, warmed: dict[str, Any] | None, interrupted: bool) -> int:
    """Print what came of it; the exit status."""
    if selftest:
        print(table(("tool", "planted fault"), [(o.tool, o.control) for o in outcomes]))
    else:
        print(summary(outcomes))
    failed = warmed["failed"] if warmed else []
    if failed:
        lines = [f"  {c['kernel']}: {c['case']}: {c['message']}"[:300] for c in failed[:SHOWN]]
        print("\n".join([f"\n{len(failed)} checks fail without a sanitizer as well:", *lines]))
    if interrupted:
        print("sanitize: interrupted", file=sys.stderr)
        return INTERRUPTED
    right = all(o.control == "reported" if selftest else o.ok for o in outcomes)
    return 0 if right and not failed and not (warmed and warmed["status"]) else 1


# ---- what is run


def missing() -> str:
    """Why compute-sanitizer cannot run here, "" if it can."""
    if shutil.which("compute-sanitizer") or FALLBACK.is_file():
        return ""
    return f"compute-sanitizer is neither on PATH nor {FALLBACK}: it comes with the CUDA toolkit"


def find() -> str:
    """The path of compute-sanitizer. Raises UsageError where there is none."""
    if why := missing():
        raise UsageError(why)
    return shutil.which("compute-sanitizer") or str(FALLBACK)


def gpu() -> torch.device:
    """The GPU. Raises UsageError where none is NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise UsageError("compute-sanitizer needs an NVIDIA GPU, and torch sees none")
    return torch.device("cuda", torch.cuda.current_device())


def version(binary: str, commands: Commands) -> str:
    """What compute-sanitizer says of itself, in one line."""
    try:
        status, out, _ = commands.run([binary, "--version"], 60)
    except OSError as e:
        raise UsageError(f"{binary} --version: {e}") from e
    lines = [line.strip() for line in out.splitlines() if "ersion" in line]
    return " ".join(lines)[:200] or f"exit status {status}"


def doctor(only: str) -> list[str]:
    """The command that launches the kernels: it prints a report in JSON."""
    return [sys.executable, "-m", "fqt", "doctor", "--json", "--only", only]


def planted(tool: str) -> list[str]:
    """The command that has the tool's fault."""
    return [sys.executable, "-m", "fqt_bench.sanitize_planted", tool]


def under(binary: str, tool: str, log: Path, target: Sequence[str]) -> list[str]:
    """The command under a tool, whose output goes to a file of its own."""
    return [binary, "--tool", tool, *_COMMON, *OPTIONS[tool], "--log-file", str(log), *target]


def warm(only: str, commands: Commands) -> dict[str, Any]:
    """The doctor without a sanitizer, for JSON: its exit status, how many checks it ran, those of them that failed, and the
    seconds it took. Raises UsageError where it gave no report."""
    began = time.monotonic()
    status, out, err = commands.run(doctor(only))
    if status is None:
        raise UsageError(
            f"the doctor alone takes longer than --limit-s {commands.limit_s:g}: give more, or --only less"
        )
    checks = _checks(out)
    if not checks:
        why = _last(err, "it ran no check")
        raise UsageError(
            f"{' '.join(doctor(only)[1:])} gives no report without a sanitizer (exit status {status}): {why}"
        )
    failed = [{"kernel": c["kernel"], "case": c["case"], "message": c["message"]} for c in checks if not c["ok"]]
    return {"checks": len(checks), "failed": failed, "status": status, "seconds": round(time.monotonic() - began, 1)}


def check(tool: str, binary: str, commands: Commands, only: str | None, warmed: dict[str, Any] | None) -> Outcome:
    """A tool on its control, and on the doctor's checks `only`, unless that is None; warmed: the doctor without a tool."""
    outcome, began = Outcome(tool), time.monotonic()
    if commands.over():
        outcome.reason = commands.over()
        return outcome
    outcome.control = _control(tool, binary, commands)
    if warmed and only is not None:
        _examine(outcome, binary, doctor(only), commands, warmed)
    elif outcome.control != "reported":
        outcome.status, outcome.reason = "not finished" if commands.over() else "blind", outcome.control
    if outcome.ok and outcome.control != "reported":
        outcome.status, outcome.reason = "blind", f"planted fault: {outcome.control}"
    outcome.seconds = time.monotonic() - began
    return outcome


def _control(tool: str, binary: str, commands: Commands) -> str:
    """ "reported", or what became of the planted fault."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        status, _, err = commands.run(under(binary, tool, log, planted(tool)), CONTROL_S)
        report = parse(_text(log), tool)
    if any(f.kernel.startswith("_planted_") for f in report.ours):
        return "reported"
    why = report.problems[:2] or [_last(err, "nothing was said")]
    cut = commands.over() or f"cut off after {CONTROL_S:g} s" if status is None else f"exit status {status}"
    return f"not reported ({cut}): {'; '.join(why)}"[:500]


def _examine(outcome: Outcome, binary: str, target: list[str], commands: Commands, warmed: dict[str, Any]) -> None:
    """Run the doctor under the tool and judge what both say. A check that fails without the tool too is no fault of its."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        outcome.command = under(binary, outcome.tool, log, target)
        status, out, err = commands.run(outcome.command)
        text = _text(log)
    report = outcome.report = parse(text, outcome.tool)
    checks = _checks(out)
    outcome.checks = len(checks)
    known = {(c["kernel"], c["case"]) for c in warmed["failed"]}
    failed = [(c["kernel"], c["case"]) for c in checks if not c["ok"]]
    new = [": ".join(name) for name in failed if name not in known]
    expected = {1 if failed else 0} | ({EXIT_FOUND} if report.findings else set())
    if status is None:
        outcome.status, outcome.reason = "not finished", commands.over()
    elif report.ours:
        outcome.status, outcome.reason = "found", f"{len(report.ours)} places in our kernels"
    elif report.problems:
        outcome.status, outcome.reason = "failed", report.problems[0]
    elif new:
        outcome.status, outcome.reason = "failed", f"{len(new)} checks fail only under the tool, first {new[0]}"
    elif len(checks) != warmed["checks"]:
        last = _last(err, "no message")
        outcome.status, outcome.reason = "failed", f"{len(checks)} checks of {warmed['checks']} ran: {last}"
    elif status not in expected:
        outcome.status, outcome.reason = "failed", f"exit status {status}, with nothing reported"
    else:
        outcome.status = "clean"
    outcome.reason = outcome.reason[:500]


class Commands:
    """Runs commands, from several threads, until the time of all is over or `stop` is called. Those that still run then are
    ended with all that they have started, since their sessions of their own keep a signal to this process from them."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._running: list[subprocess.Popen] = []
        self._stopped = False
        self._lock = threading.Lock()

    def over(self) -> str:
        """Why nothing is run any more, "" while something is."""
        if self._stopped:
            return "interrupted"
        return f"--limit-s {self.limit_s:g} is over" if time.monotonic() >= self._end else ""

    def run(self, command: Sequence[str], at_most_s: float = math.inf) -> tuple[int | None, str, str]:
        """(exit status, stdout, stderr) of a command, None for the status where it was ended, or never begun."""
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            with self._lock:
                if self.over():
                    return None, "", ""
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
                self._running.append(process)
            try:
                status: int | None = process.wait(max(min(at_most_s, self._end - time.monotonic()), 0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end([process])
                self._running.remove(process)
            out.seek(0), err.seek(0)
            return None if self._stopped else status, out.read(), err.read()

    def stop(self) -> None:
        """End what runs and begin nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        _end(running)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and what they started: politely, so that the sanitizer writes what it has, then not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        until = time.monotonic() + PATIENCE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))


def _last(err: str, otherwise: str) -> str:
    """The last line of what a command wrote to stderr."""
    return (err.strip().splitlines() or [otherwise])[-1][:600]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _checks(out: str) -> list[dict[str, Any]]:
    """The checks in what the doctor printed; none where that is no report."""
    try:
        return json.loads(out[out.index("{") :])["checks"]
    except (ValueError, KeyError, TypeError):
        return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fqt_bench.sanitize", description=__doc__.partition(":\n")[0] + ".", formatter_class=Defaults
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument(
        "--only", default=EVERY_KERNEL, metavar="PATTERN", help="of the doctor's checks, 'KERNEL: case'"
    )
    parser.add_argument("--limit-s", type=_seconds, default=900, metavar="N", help="for all that is run together")
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it: nothing is left on the GPU
    sys.exit(main())
