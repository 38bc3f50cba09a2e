"""`python -m fqt_bench.gpu`: the kernels on this machine's GPU, in tables and one JSON file with every sample.

Exit status: 0 measured; 1 one of fqt's own candidates is wrong or raises; 2 no GPU, or a mistake in the call.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import ahead, cases, environment, layers, products
from .harness import Budget, Effort, Timer, measure, repeat
from .targets import ceilings, failures, report

BUDGET_S = 420.0
AHEAD_SHARE = 0.4  # of the budget, at most, for the trial run
NO_GPU = "fqt bench: not measured: no GPU (torch.cuda.is_available() is false); nothing was timed, no file was written"
METHOD = (
    "Candidates of a case interleaved in one process, each round in a random order of its own. Before each sample the "
    "L2 is flushed (a write of at least twice its size, then a read of another buffer) and the device is held back "
    "until the host is ahead. Device events; medians. Outputs are checked on every input set, in poisoned memory, "
    "before timing, and once more after it."
)


@dataclass(frozen=True)
class Plan:
    """A case that is built when its turn comes, and the seconds without which it is not begun.

    key: the list of the result that it adds to: "cases", and build() gives the Case to measure, or "memory", "repeats",
    "launches", and build(timer=…, refused=…) gives the entries; refused: why a candidate of this name is not to be run.
    """

    suite: str
    shape: str
    needs_s: float
    build: Callable[..., Any]
    key: str = "cases"


LARGE, SMALL = (8192, 8192, 8192), (4096, 4096, 4096)
W13, W2 = (8192, 28672, 4096), (8192, 4096, 14336)  # Llama-8B, 8192 tokens
VIT = (50432, 4096, 1024)  # ViT-L/16, batch 256, the wide layer
SPLIT = (1024, 1024, 65536)  # the weight gradient of a narrow layer
STEP = (8192, 4096, 4096)


def plans(device: torch.device, quick: bool) -> list[Plan]:
    """The most wanted first: what is at the end is skipped when the time runs out."""
    builders = {"gemm": products.gemm, "linear fwd+bwd": layers.linear, "quantize": cases.quantize}

    def plan(suite: str, shape: Sequence[int], needs_s: float) -> Plan:
        return Plan(suite, "x".join(map(str, shape)), needs_s, functools.partial(builders[suite], *shape, device))

    def entries(key: str, shape: Sequence[int], needs_s: float, build: Callable[..., Any]) -> Plan:
        return Plan(key, "x".join(map(str, shape)), needs_s, functools.partial(build, shape, device), key)

    memory, repeats, launches = (
        entries("memory", STEP, 5, _memory),
        [entries("repeats", shape, 8, _repeats) for shape in (SPLIT, STEP)],
        entries("launches", STEP, 8, _launches),
    )
    if quick:
        return [plan("gemm", SMALL, 15), plan("linear fwd+bwd", SMALL, 15), plan("quantize", SMALL[:2], 10),
                memory, *repeats]  # fmt: skip
    return [
        plan("gemm", LARGE, 15),
        plan("linear fwd+bwd", LARGE, 20),
        plan("quantize", LARGE[:2], 15),
        memory,
        *repeats,
        plan("linear fwd+bwd", W13, 20),
        plan("linear fwd+bwd", W2, 15),
        plan("linear fwd+bwd", SMALL, 10),
        plan("gemm", SMALL, 10),
        plan("gemm", SPLIT, 10),
        plan("linear fwd+bwd", VIT, 15),
        launches,
        plan("gemm", W13, 12),
        plan("gemm", W2, 12),
        plan("quantize", SMALL[:2], 8),
        plan("quantize", (32768, 1024), 8),
    ]


def _memory(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    from .cuda import memory

    return layers.memory(*shape, device, memory, refused)


def _repeats(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    """The products, and the layer, of a shape."""
    found = []
    for build in (products.gemm, layers.linear):
        found += repeat(build(*shape, device, sets=1), timer, refused)
    return found


def _launches(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    from .cuda import launches

    return layer_launches(launches, device, shape, refused)


def layer_launches(count: Callable[[Callable[[], object]], dict[str, Any]], device: torch.device,
                   shape: tuple[int, int, int], refused: Mapping[str, str] = {}) -> list[dict[str, Any]]:  # fmt: skip
    """The launches of one forward and backward of nn.Linear and of ours; counts do not vary from run to run."""
    case = layers.linear(*shape, device, sets=1)
    found = []
    for candidate in (c for c in case.candidates if c.name not in refused and (c.ours or c.name == case.baseline)):
        for _ in range(3):
            candidate.run(0)
        found.append({"name": candidate.name, "shape": case.shape, **count(lambda run=candidate.run: run(0))})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()  # the clock of CudaTimer
    args = _arguments(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    refused = {}
    if not args.no_trial:
        print("bench: trial run of every candidate, in processes of their own", file=sys.stderr, flush=True)
        command = functools.partial(ahead.command, quick=args.quick)
        refused = ahead.run_ahead(command, ahead.parts(), AHEAD_SHARE * args.budget_s)
    from .cuda import CudaTimer

    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device)
    effort = Effort(rounds=30, limit_s=1.5) if args.quick else Effort()
    result, path = run(plans(device, args.quick), timer, environment.environment(device), Path(args.out),
                       Budget(args.budget_s, timer, began), effort, refused)  # fmt: skip
    print(f"bench: {path}", file=sys.stderr)
    print(report(result))
    return 1 if failures(result) else 0


def run(
    todo: Sequence[Plan],
    timer: Timer,
    record: dict[str, Any],
    out: Path,
    budget: Budget,
    effort: Effort,
    refused: Mapping[ahead.Key, str] = {},
) -> tuple[dict[str, Any], Path]:
    """Measure the plans that fit into the budget, without the candidates that are refused. The file is written anew
    after each plan: a run that is cut off leaves one too."""
    result: dict[str, Any] = {
        "schema": 2,
        "suite": "gpu",
        "method": METHOD,
        "environment": record,
        "budget_s": budget.seconds,
        "spent_s": 0.0,
        "ceilings": None,
        "cases": [],
        "memory": [],
        "repeats": [],
        "launches": [],
        "skipped": [],
    }
    path = environment.result_path(out, result["suite"], record)
    file = path.relative_to(environment.ROOT) if path.is_relative_to(environment.ROOT) else path
    for plan in todo:
        head = {"suite": plan.suite, "shape": plan.shape}
        if budget.left() < plan.needs_s:
            reason = f"{max(budget.left(), 0):.0f} of {budget.seconds:.0f} s left, {plan.needs_s:.0f} needed"
            result["skipped"].append({**head, "verdict": "skipped", "remark": reason})
            continue
        try:
            if plan.key == "cases":
                why = {name: why for (*case, name), why in refused.items() if case == [plan.suite, plan.shape]}
                result["cases"].append(measure(plan.build(), timer, budget, effort, why))
            else:
                why = {name: why for (_, _, name), why in refused.items()}
                result[plan.key] += plan.build(timer=timer, refused=why)
        except Exception as error:  # of building the inputs, say: out of memory; or a profiler that may not look
            verdict = "not measured" if plan.key == "launches" else "error"
            result["skipped"].append({**head, "verdict": verdict, "remark": f"{type(error).__name__}: {error}"[:300]})
        result["ceilings"] = ceilings(result, file.as_posix())
        result["spent_s"] = round(budget.spent(), 1)
        environment.write(path, result)
    environment.write(path, result)
    return result, path


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.gpu", description="Benchmark fqt's kernels on this GPU.")
    parser.add_argument("--quick", action="store_true", help="the 4096 shapes alone, fewer rounds")
    parser.add_argument("--no-trial", action="store_true", help="leave out the trial run, which compiles in parallel")
    out = environment.ROOT / "bench" / "results"
    parser.add_argument("--out", default=str(out), metavar="DIR", help="where results go (default: bench/results)")
    parser.add_argument(
        "--budget-s", type=_seconds, default=BUDGET_S, metavar="N", help=f"seconds in all (default: {BUDGET_S:.0f})"
    )
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
