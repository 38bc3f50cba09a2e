"""A run of `fqt bench`: the suites on a device, within a budget, into tables and one JSON file with every sample.

The file's schema is schema.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fqt import dispatch
from fqt.cli import MISTAKE, UsageError

from . import ahead, environment, pytest_json
from .harness import DOES_NOT_FIT, Budget, Effort, Timer, measure
from .suites import Plan, plans
from .targets import ceilings, failures, measured, report

AHEAD_SHARE = 0.4  # of the budget, at most, for the trial run
QUICK = Effort(rounds=30, limit_s=1.5)
CPU_THREADS = 1  # more than one wait for each other, for tens of milliseconds where another process has their core
COUNTERS_S = 30.0  # that collecting the counters takes at most on two cores
NOT_MEASURED = "not measured: nothing was timed, no file was written"
METHOD = (
    "Candidates of a case interleaved in one process, each round in a random order of its own; medians; ratios with a "
    "bootstrap over whole rounds. Outputs are checked on every input set, in poisoned memory, before timing, and once more "
    "after it. "
)
ON_GPU = (
    "Device events; before each sample the L2 is flushed (a write of at least twice its size, then a read of another "
    "buffer) and the device is held back until the host is ahead."
)
ON_CPU = f"CPU backend, {CPU_THREADS} thread, wall clock, warm caches, no garbage collection."


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a run's file."""
    return json.loads(resources.files(__package__).joinpath("schema.json").read_text(encoding="utf-8"))


def main(args: argparse.Namespace) -> int:
    """`fqt bench`: 0 measured, 1 one of fqt's own candidates is wrong or raises, 2 nothing could be measured.

    Raises:
        UsageError: no such device or case, or a folder that cannot be written.
    """
    began = time.perf_counter()  # the clock of both timers
    device = _device(args.device)
    out = Path(args.out) if args.out else environment.default_out()
    todo = plans(args.suite, device, args.quick, args.only or "*")
    counters = "smoke" in args.suite and args.only is None
    if not todo:
        known = ", ".join(f"{plan.suite} {plan.shape}" for plan in plans(args.suite, device, args.quick))
        raise UsageError(f"--only {args.only}: no such case; there are: {known}")
    _writable(out)
    if args.benchmark_json:
        _writable(Path(args.benchmark_json).absolute().parent, "--benchmark-json")
        if Path(args.benchmark_json).is_dir():
            raise UsageError(f"--benchmark-json {args.benchmark_json}: is a folder")
    timer, refused = _timer(device), {}
    if device.type == "cuda" and not args.no_trial:
        print("bench: trial run of every candidate, in processes of their own", file=sys.stderr, flush=True)
        command = functools.partial(ahead.command, suites=args.suite, only=args.only or "*", quick=args.quick)
        refused = ahead.run_ahead(command, ahead.parts(), AHEAD_SHARE * args.budget_s)
    result, path = run(todo, timer, args.suite, device, out, Budget(args.budget_s, timer, began),
                       QUICK if args.quick else Effort(), refused, counters)  # fmt: skip
    if path is None:
        print(f"fqt bench: {NOT_MEASURED}; {_reasons(result)}", file=sys.stderr)
        return 1 if failures(result) else MISTAKE
    print(f"bench: {path}", file=sys.stderr)
    if args.benchmark_json:
        environment.write(Path(args.benchmark_json), pytest_json.of(result))
    print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) if args.json else report(result))
    return 1 if failures(result) else 0


def run(
    todo: Sequence[Plan],
    timer: Timer,
    suites: Sequence[str],
    device: torch.device,
    out: Path,
    budget: Budget,
    effort: Effort,
    refused: Mapping[ahead.Key, str] = {},
    counters: bool = False,
) -> tuple[dict[str, Any], Path | None]:
    """Measure the plans that fit into the budget, without the candidates that are refused, and collect the counters.

    The file is written anew after each plan: a run that is cut off leaves one too. None where there is no figure.
    """
    record = environment.environment(device)
    result: dict[str, Any] = {
        "schema": 3,
        "suites": list(suites),
        "method": METHOD + (ON_GPU if device.type == "cuda" else ON_CPU),
        "environment": record,
        "budget_s": budget.seconds,
        "spent_s": 0.0,
        "cases": [],
        "counters": {},
        "counters_of": None,
        "memory": [],
        "repeats": [],
        "launches": [],
        "skipped": [],
        "ceilings": None,
    }
    path = environment.result_path(out, suites, record)
    file = path.relative_to(environment.ROOT) if environment.ROOT and path.is_relative_to(environment.ROOT) else path
    steps = [functools.partial(_measure, plan, timer, budget, effort, refused) for plan in todo]
    for step in [*steps, *([functools.partial(_count, budget)] if counters else [])]:
        step(result)
        result["ceilings"] = ceilings(result, file.as_posix())
        result["spent_s"] = round(budget.spent(), 1)
        if measured(result):
            environment.write(path, result)
    return result, path if measured(result) else None


def _measure(plan: Plan, timer: Timer, budget: Budget, effort: Effort, refused: Mapping[ahead.Key, str],
             result: dict[str, Any]) -> None:  # fmt: skip
    """Add what the plan gives to the result; what it does not give, and why, to the list of what is skipped."""
    head = {"suite": plan.suite, "shape": plan.shape}
    if budget.left() < plan.needs_s:
        result["skipped"].append({**head, "status": "skip", "remark": _short(budget, plan.needs_s)})
        return
    try:
        if plan.key == "cases":
            why = {name: why for (*case, name), why in refused.items() if case == [plan.suite, plan.shape]}
            result["cases"].append(measure(plan.build(), timer, budget, plan.effort or effort, why))
        else:
            why = {name: why for (_, _, name), why in refused.items()}
            result[plan.key] += plan.build(timer=timer, refused=why)
    except Exception as error:  # of building the inputs, say; or a profiler that may not look
        if isinstance(error, torch.OutOfMemoryError):
            status, says = "skip", f"{DOES_NOT_FIT}: "
        else:
            status, says = ("skip", "not measured: ") if plan.key == "launches" else ("error", "")
        remark = f"{says}{type(error).__name__}: {error}"[:300]
        result["skipped"].append({**head, "status": status, "remark": remark})


def _count(budget: Budget, result: dict[str, Any]) -> None:
    """Add the noise-free counters of the smoke selection."""
    head = {"suite": "counters", "shape": ""}
    if dispatch.triton_version() is None:
        result["skipped"].append({**head, "status": "skip", "remark": "not installed: triton"})
        return
    if budget.left() < COUNTERS_S:
        result["skipped"].append({**head, "status": "skip", "remark": _short(budget, COUNTERS_S)})
        return
    from . import counters
    from .trees import Tree

    print(f"bench: {budget.spent():5.1f} s  counters", file=sys.stderr, flush=True)
    found = counters.measure("smoke", Tree.installed())
    result["counters"] = found.entries
    result["counters_of"] = found.of if found.entries else None
    for status, reasons in (("skip", found.unknown), ("error", found.failed)):
        result["skipped"] += [{**head, "status": status, "remark": f"{name}: {why}"} for name, why in reasons.items()]


def _short(budget: Budget, needs_s: float) -> str:
    return f"{max(budget.left(), 0):.0f} of {budget.seconds:.0f} s left, {needs_s:.0f} needed"


def _reasons(result: dict[str, Any]) -> str:
    """Why nothing was measured, each reason once."""
    said = [*result["skipped"], *(c for case in result["cases"] for c in case["candidates"])]
    return "; ".join(dict.fromkeys(record["remark"] for record in said))


def _device(name: str) -> torch.device:
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise UsageError(f"bench --device cuda: {NOT_MEASURED}: torch.cuda.is_available() is false")
    torch.set_num_threads(CPU_THREADS)
    return torch.device("cpu")


def _timer(device: torch.device) -> Timer:
    if device.type == "cuda":
        from .cuda import CudaTimer

        return CudaTimer(device)
    from .cpu import CpuTimer

    return CpuTimer()


def _writable(out: Path, option: str = "--out") -> None:
    """Before anything is timed, for a result that cannot be kept is a run for nothing."""
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {out}: {folder} is {'not writable' if folder.is_dir() else 'not a folder'}")
