"""`python -m bench.gpu`: the kernels on this machine's GPU, in one table and one JSON file with every sample.

Exit status: 0 measured; 1 one of fqt's own candidates is wrong or raises; 2 no GPU, or a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fqt.cli import table

from . import cases, environment
from .harness import Budget, Case, Effort, Timer, measure

BUDGET_S = 170.0
NO_GPU = (
    "bench.gpu: not measured: no GPU (torch.cuda.is_available() is false); nothing was timed and no file was written"
)
HEADER = ("suite", "shape", "candidate", "ms", "p10-p90", "rate", "ratio", "prediction", "verdict")
METHOD = (
    "Candidates of a case interleaved in one process, each round in a random order of its own. Before each sample the "
    "L2 is flushed (a write of at least twice its size, then a read of another buffer) and the device is held back "
    "until the host is ahead. Device events; medians. Outputs are checked on every input set, in poisoned memory, "
    "before timing, and once more after it."
)


@dataclass(frozen=True)
class Plan:
    """A case that is built when its turn comes, and the seconds without which it is not begun."""

    suite: str
    shape: str
    needs_s: float
    build: Callable[[], Case]


def plans(device: torch.device, quick: bool) -> list[Plan]:
    """The most wanted first: what is at the end is skipped when the time runs out."""

    def plan(suite: str, shape: Sequence[int], needs_s: float) -> Plan:
        build = getattr(cases, suite.split()[0])
        return Plan(suite, "x".join(map(str, shape)), needs_s, lambda: build(*shape, device))

    large, small = (8192, 8192, 8192), (4096, 4096, 4096)
    if quick:
        return [
            plan("gemm", small, 15),
            plan("linear fwd+bwd", (8192, 4096, 4096), 15),
            plan("quantize", small[:2], 10),
        ]
    return [
        plan("gemm", large, 15),
        plan("linear fwd+bwd", large, 20),
        plan("quantize", large[:2], 15),
        plan("gemm", small, 8),
        plan("linear fwd+bwd", (8192, 4096, 4096), 8),
        plan("quantize", small[:2], 8),
        plan("quantize", (32768, 1024), 8),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()  # the clock of CudaTimer
    args = _arguments(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    from .cuda import CudaTimer, launches

    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device)
    effort = Effort(rounds=30, limit_s=1.5) if args.quick else Effort()
    result, path = run(
        plans(device, args.quick), timer, environment.environment(device), Path(args.out),
        Budget(args.budget_s, timer, began), effort, launch_counts=lambda: layer_launches(launches, device),
    )  # fmt: skip
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
    launch_counts: Callable[[], list[dict[str, Any]]] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measure the plans that fit into the budget. The file is written anew after each: a cut-off run leaves one too."""
    result: dict[str, Any] = {
        "schema": 1,
        "suite": "gpu",
        "method": METHOD,
        "environment": record,
        "budget_s": budget.seconds,
        "spent_s": 0.0,
        "cases": [],
        "skipped": [],
        "launches": [],
    }
    path = environment.result_path(out, result["suite"], record)
    for plan in todo:
        head = {"suite": plan.suite, "shape": plan.shape}
        if budget.left() < plan.needs_s:
            reason = f"{max(budget.left(), 0):.0f} of {budget.seconds:.0f} s left, {plan.needs_s:.0f} needed"
            result["skipped"].append({**head, "verdict": "skipped", "remark": reason})
            continue
        try:
            result["cases"].append(measure(plan.build(), timer, budget, effort))
        except Exception as error:  # of building the inputs: out of memory, say
            result["skipped"].append({**head, "verdict": "error", "remark": f"{type(error).__name__}: {error}"[:300]})
        result["spent_s"] = round(budget.spent(), 1)
        environment.write(path, result)
    if launch_counts is not None:
        head = {"suite": "launches", "shape": "linear fwd+bwd"}
        if budget.left() < 8:
            result["skipped"].append(
                {**head, "verdict": "skipped", "remark": f"{max(budget.left(), 0):.0f} s left, 8 needed"}
            )
        else:
            try:
                result["launches"] = launch_counts()
            except Exception as error:
                remark = f"{type(error).__name__}: {error}"[:300]
                result["skipped"].append({**head, "verdict": "not measured", "remark": remark})
    result["spent_s"] = round(budget.spent(), 1)
    environment.write(path, result)
    return result, path


def layer_launches(count: Callable[[Callable[[], object]], dict[str, Any]], device: torch.device, tokens: int = 8192,
                   features: int = 4096) -> list[dict[str, Any]]:  # fmt: skip
    """The launches of one forward and backward of each layer of `cases.linear`; counts do not vary from run to run."""
    case = cases.linear(tokens, features, features, device, sets=1)
    found = []
    for candidate in case.candidates:
        for _ in range(3):
            candidate.run(0)
        found.append({"name": candidate.name, "shape": case.shape, **count(lambda run=candidate.run: run(0))})
    return found


def failures(result: dict[str, Any]) -> list[str]:
    """fqt's own candidates that are wrong or raised, a choice of dispatch that does not fit, cases not built."""

    def failed(c: dict[str, Any]) -> bool:
        return c["verdict"] in ("wrong", "error") or (c["verdict"] == "does not fit" and cases.DISPATCHED in c["name"])

    bad = [f"{case['suite']} {case['shape']}: {c['name']}: {c['verdict']}" for case in result["cases"]
           for c in case["candidates"] if c["ours"] and failed(c)]  # fmt: skip
    return bad + [f"{s['suite']} {s['shape']}: error" for s in result["skipped"] if s["verdict"] == "error"]


# ---- the table


def report(result: dict[str, Any]) -> str:
    """The environment in two lines and one table; predictions stand beside what was measured."""
    e = result["environment"]
    commit = f"commit {(e['commit'] or 'unknown')[:9]}{' with changes' if e['dirty'] else ''}, source {e['source']}"
    lines = [
        f"{e['gpu'] or 'no GPU'}, capability {e['capability']}, {e['processors']} processors, driver {e['driver']}, "
        f"torch {e['torch']}, Triton {e['triton']}, CUDA {e['cuda']}, Python {e['python']}, {e['date']}, {commit}",
        "ratio: rate over that of the first candidate of the case, same run; prediction: from before any measurement",
        "",
        table(HEADER, _rows(result), right=(3, 4, 5, 6)),
        "",
        f"{result['spent_s']:.0f} of {result['budget_s']:.0f} s spent; {len(failures(result))} failures",
    ]
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [_row(case, candidate) for case in result["cases"] for candidate in case["candidates"]]
    base = result["launches"][0]["kernels"] if result["launches"] else 0
    for entry in result["launches"]:
        ratio = f"{entry['kernels'] / base:.2f}" if base else ""
        counts = f"{entry['kernels']} kernels"
        rows.append(
            ("launches", entry["shape"], entry["name"], "", "", counts, ratio, "", f"{entry['copies']} copies or fills")
        )
    return rows + [
        (s["suite"], s["shape"], "", "", "", "", "", "", f"{s['verdict']}: {s['remark']}") for s in result["skipped"]
    ]


def _row(case: dict[str, Any], candidate: dict[str, Any]) -> tuple[str, ...]:
    verdict = ": ".join(filter(None, (candidate["verdict"], candidate["remark"])))
    head, tail = (case["suite"], case["shape"], candidate["name"]), candidate["prediction"]
    ms = candidate.get("ms")
    if ms is None:
        return (*head, "", "", "", "", tail, verdict)
    if candidate["starved"] > ms["n"] / 2:
        verdict += f"; host-bound: {candidate['host_ms']:.3f} ms to launch"
    rate = candidate["gb_s"] if case["unit"] == "GB/s" else candidate["tops"]
    ratio = f"{candidate['ratio']:.2f}" if "ratio" in candidate else ""
    shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    figures = (f"{ms['median']:.4f}", f"{ms['p10']:.4f}-{ms['p90']:.4f}", f"{shown} {case['unit']}", ratio)
    return (*head, *figures, tail, verdict)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Benchmark fqt's kernels on this GPU.")
    parser.add_argument("--quick", action="store_true", help="the 4096 shapes alone, fewer rounds")
    out = environment.ROOT / "bench" / "results"
    parser.add_argument("--out", default=str(out), metavar="DIR", help="where results go (default: bench/results)")
    parser.add_argument(
        "--budget-s", type=_seconds, default=BUDGET_S, metavar="N", help="seconds in all (default: 170)"
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
