"""Extreme extents on the GPU, every case against the definition or an exact answer:

    python -m fqt_bench.extremes [--only PATTERN] [--out FILE.json] [--limit-s N]

more than 2³¹ elements of every operand and every output, sums as large as int32 holds and larger, more programs than the
second axis of a grid has. The cases are in `extremes_matrix`, `extremes_conv` and `extremes_step`; fresh memory is poisoned
before each. They run one after the other in a process of their own, which a fault takes down with it: the next cases get a
new one, and what was found before is in the file. A case that does not fit in the GPU's memory is skipped, and says so.

--tiny runs the same launches on a few elements, also in Triton's interpreter (TRITON_INTERPRET=1).

Exit status: 0 all that ran is right and all ran that fits, 1 anything else, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fqt.cli import MISTAKE, Defaults, UsageError, positive, table

from . import environment
from .extremes_check import GIB, Case, Wrong, set_piece

MODULES = ("fqt_bench.extremes_conv", "fqt_bench.extremes_step", "fqt_bench.extremes_matrix")
TINY_PIECE = 1024  # elements compared at a time, so that there are several pieces
START_S = 120  # for a process to import torch and find the GPU
POISON = 0x5B
POISONED = 0.9  # of the free memory
BROKEN = 3  # exit status of a process whose device cannot be used any more
STATUSES = ("passed", "failed", "skipped", "not run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module for its exit status."""
    args = _parser().parse_args(argv)
    try:
        return work(args) if args.worker else run(args)
    except UsageError as e:
        print(f"extremes: {e}", file=sys.stderr)
        return MISTAKE


def run(args: argparse.Namespace) -> int:
    """Run all cases in processes of their own, write the file after each, print the table."""
    device = _device(args.tiny)
    known = [case.title for case in _cases(args)]
    todo = [title for title in known if fnmatchcase(title, args.only)]
    if not todo:
        raise UsageError(f"--only {args.only}: no such case; there are:\n" + "\n".join(known))
    result: dict[str, Any] = {"environment": environment.environment(device), "tiny": args.tiny, "cases": []}
    for record in _run_all(todo, args):
        result["cases"].append(record)
        if args.out:
            environment.write(Path(args.out), result)
        print(f"extremes: {record['case']}: {record['status']}", file=sys.stderr, flush=True)
    print(summary(result["cases"]))
    return 0 if all(record["status"] in ("passed", "skipped") for record in result["cases"]) else 1


def _run_all(todo: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record of each case, in order; a new process after each that was lost with one."""
    ends = time.monotonic() + args.limit_s
    left = list(todo)
    while left and time.monotonic() < ends:
        done = 0
        for record in _process(left, args, ends):
            done += 1
            yield record
        left = left[done:]
    for title in left:
        yield _record(title, "not run", f"the limit of {args.limit_s} s was reached")


def worker(args: argparse.Namespace) -> list[str]:
    """The command of a process that runs the cases whose titles it is given."""
    return [sys.executable, "-m", "fqt_bench.extremes", "--worker", "--cases", *args.cases, *["--tiny"] * args.tiny]


def _process(titles: list[str], args: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """The records of the cases that one process comes to: all, or up to the one that it ended in."""
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as given:
        json.dump(titles, given)
        given.seek(0)
        process = subprocess.Popen(
            worker(args), stdin=given, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        current, seconds = titles[0], float(START_S)
        try:
            while True:
                wait = min(seconds, max(ends - time.monotonic(), 0.0))
                try:
                    line = lines.get(timeout=wait)
                except queue.Empty:
                    why = f"no end after {seconds:.0f} s" if wait == seconds else f"cut off: --limit-s {args.limit_s}"
                    yield _record(current, "failed" if wait == seconds else "not run", why)
                    return
                if line is None:
                    if current:
                        process.wait()
                        err.seek(0)
                        last = (err.read().strip().splitlines() or ["no message"])[-1]
                        yield _record(current, "failed", f"the process ended with {process.returncode}: {last}"[:600])
                    return
                message = json.loads(line)
                if "began" in message:
                    current, seconds = message["began"], float(args.case_s)
                else:
                    yield message
                    rest = titles[titles.index(message["case"]) + 1 :]
                    current, seconds = (rest[0] if rest and not message.get("broken") else ""), float(START_S)
                    if not current:
                        return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(stream, lines: queue.Queue) -> None:
    """Messages of a process, and None at their end; other lines that libraries print are no messages."""
    for line in stream:
        if line.startswith(('{"began"', '{"case"')):
            lines.put(line)
    lines.put(None)


def _record(title: str, status: str, message: str, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"case": title, "status": status, "message": message, "seconds": round(seconds, 2), **more}


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line for each case, and how many came out how."""
    rows = [(r["case"], r["status"], f"{r['seconds']:.1f}", r["message"][:160]) for r in records]
    counts = ", ".join(f"{n} {s}" for s in STATUSES if (n := sum(r["status"] == s for r in records)))
    return table(("case", "verdict", "s", "what"), rows, right=(2,)) + f"\n\n{counts}"


# ---- the process that runs cases


def work(args: argparse.Namespace) -> int:
    """Run the cases whose titles are on stdin; a line of JSON on stdout before and after each."""
    device = _device(args.tiny)
    wanted = json.load(sys.stdin)
    cases = {case.title: case for case in _cases(args)}
    if args.tiny:
        set_piece(TINY_PIECE)
    for title in wanted:
        print(json.dumps({"began": title}), flush=True)
        record = judge(cases[title], device)
        print(json.dumps(record), flush=True)
        if record.get("broken"):
            return BROKEN
    return 0


def judge(case: Case, device: torch.device) -> dict[str, Any]:
    """Run a case: its record, "broken" where the device cannot be used any more."""
    began = time.perf_counter()
    more: dict[str, Any] = {}
    try:
        if (lacking := _lacking(case, device)) is not None:
            return _record(case.title, "skipped", lacking)
        _poison(device)
        message, status = case.run(device), "passed"
        _synchronize(device)
    except Wrong as e:
        status, message = "failed", str(e)
    except torch.OutOfMemoryError as e:
        status, message = "skipped", f"out of memory: {' '.join(str(e).split())[:200]}"
    except Exception as e:  # whatever a kernel does wrong is a verdict
        status, message = "failed", f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"
        if device.type == "cuda" and (not _works(device) or "CUDA error" in message):
            more["broken"] = True
    if device.type == "cuda" and "broken" not in more:
        more["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 1)
        _free(device)
    return _record(case.title, status, message, time.perf_counter() - began, **more)


def _lacking(case: Case, device: torch.device) -> str | None:
    """Which memory is not there, None if it is."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return None if case.gib * GIB <= free else f"needs {case.gib:.1f} GiB, {free / GIB:.1f} free"


def _poison(device: torch.device) -> None:
    """Leave bytes that no right result is made of in the memory that the case will be given."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        free, _ = torch.cuda.mem_get_info(device)
        torch.empty(int(POISONED * free), dtype=torch.uint8, device=device).fill_(POISON)
        torch.cuda.reset_peak_memory_stats(device)


def _free(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    """What a kernel did wrong may only be known now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _works(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
        return True
    except Exception:  # of whichever kind: the context is lost
        return False


# ---- arguments


def _cases(args: argparse.Namespace) -> list[Case]:
    return [case for module in args.cases for case in importlib.import_module(module).cases(args.tiny)]


def _device(tiny: bool) -> torch.device:
    """The GPU; the CPU for tiny extents in the interpreter. Raises UsageError where there is neither."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not tiny:
        raise UsageError("extents beyond 2³¹ need a GPU; --tiny runs the same launches of a few elements anywhere")
    import triton

    if not triton.knobs.runtime.interpret:
        raise UsageError("without a GPU kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    return torch.device("cpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fqt_bench.extremes", description=__doc__.partition(":\n")[0] + ".", formatter_class=Defaults
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of 'KERNEL: extents', with * and ?")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the results, after each case")
    parser.add_argument("--limit-s", type=positive, default=1200, metavar="N", help="for all cases")
    parser.add_argument(
        "--case-s", type=positive, default=180, metavar="N", help="for a case, its compilation included"
    )
    parser.add_argument("--tiny", action="store_true", help="the same launches of a few elements")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=list(MODULES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
