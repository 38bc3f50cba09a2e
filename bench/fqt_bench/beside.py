"""Accuracies on a device beside those of the CPU backend: the same networks, batches and seeds.

    python -m fqt_bench.beside resnet --base FILE.json [--out FILE.json]     # a study of `fqt_bench.recipe_study` on a CPU
    python -m fqt_bench.beside demo [--base demo.json] [--out FILE.json]     # without --base the CPU trains first

Everything but the device is the base's: data, plan, learning rate, recipes and seeds; the initial weights and the random
words of the rounding are too. Sums of floats are not, so that runs drift apart as two seeds do. Exit status 1 if a recipe
is outside of the rule.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fqt import demo
from fqt.cli import UsageError, table

from . import environment, psgd_runs, recipe_study

Figures = dict[str, Any]
Runs = dict[str, list[Figures]]
RULE = (
    "A recipe is within the base's spread if as many of its runs diverged and its mean accuracy differs by at most "
    "√(s² + s₀²), s and s₀ being the sample standard deviations over the seeds on the device and in the base. Equal "
    "devices differ by more than that now and then: of three seeds each in 16 % of recipes. A recipe is outside where "
    "Student's t-test of the two means has p < 0.01 / (number of recipes), or other numbers of runs diverged; beyond is "
    "between the two."
)
LEVEL = 0.01


def compared(base: Runs, runs: Runs) -> list[Figures]:
    """By recipe that was run: means and sample deviations of the accuracies in % of the runs that did not diverge, the
    difference, p, and the verdict, "within", "beyond" or "outside"."""
    names = [recipe for recipe in base if runs.get(recipe)]
    return [_row(recipe, base[recipe], runs[recipe], LEVEL / len(names)) for recipe in names]


def _row(recipe: str, base: Sequence[Figures], runs: Sequence[Figures], level: float) -> Figures:
    row: Figures = {"recipe": recipe, "base": _summary(base), "device": _summary(runs)}
    a, b = row["base"], row["device"]
    row |= {"difference": None, "spread": None, "p": None}
    if a["diverged"] * b["runs"] != b["diverged"] * a["runs"]:
        return row | {"verdict": "outside"}
    if a["mean"] is None:  # all diverged, on either side
        return row | {"verdict": "within"}
    difference, spread = b["mean"] - a["mean"], math.hypot(a["std"] or 0.0, b["std"] or 0.0)
    counts = [s["runs"] - s["diverged"] for s in (a, b)]
    p = _p(difference, a["std"], b["std"], *counts)
    verdict = "within" if abs(difference) <= spread else "beyond" if p is None or p >= level else "outside"
    return row | {"difference": difference, "spread": spread, "p": p, "verdict": verdict}


def _p(difference: float, s: float | None, t: float | None, n: int, m: int) -> float | None:
    """Of Student's t-test of two means with equal variances; None of one run on either side."""
    if s is None or t is None:
        return None
    pooled = ((n - 1) * s**2 + (m - 1) * t**2) / (n + m - 2) * (1 / n + 1 / m)
    if not pooled:
        return float(not difference)
    return students_p(difference / math.sqrt(pooled), n + m - 2)


def students_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's distribution: 1 - ∫ its density, with u = √ν tan θ, by Simpson's rule."""
    end, steps = math.atan(abs(t) / math.sqrt(freedom)), 400
    values = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
    integral = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * end / steps / 3
    density = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(max(1 - 2 * density * integral, 0.0), 1.0)


def _summary(runs: Sequence[Figures]) -> Figures:
    values = [run["accuracy"] for run in runs if not run["diverged"]]
    return {
        "runs": len(runs), "diverged": len(runs) - len(values), "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }  # fmt: skip


# ---- what is trained


def resnet(
    base: Mapping[str, Any], folder: Path, device: torch.device, limit_s: float, keep: Callable[[Runs, Runs], object]
) -> tuple[Runs, Runs]:
    """The runs of a ResNet study, and the same on the device, all recipes of a seed before the next; keep: what to do with
    them after each run. None is begun after limit_s.

    Raises:
        UsageError: the base is no study, or the images are not those it was made of.
    """
    try:
        plan, lr, name = recipe_study.Plan(**base["plan"]), base["learning_rate"], base["data"]["name"]
        runs = sorted(base["runs"], key=lambda run: run["seed"])
    except (KeyError, TypeError) as e:
        raise UsageError(f"--base: no study of fqt_bench.recipe_study: {e!r}") from None
    kinds = {"Fashion-MNIST": "fashion-mnist", "MNIST": "mnist", "sources": "python"}  # by the first word of a data set
    if (kind := kinds.get(name.split(" ")[0])) is None:
        raise UsageError(f"--base is of {name}, of which there is nothing here")
    data = psgd_runs.load(kind, folder)
    if (data.name, len(data.train_x)) != (name, base["data"]["train"]):
        raise UsageError(f"--base is of {base['data']}, what is here are {len(data.train_x)} of {data.name}")
    data = data.to(device)
    known, found, begun = {}, {}, time.perf_counter()
    for run in runs:
        start = time.perf_counter()
        if start - begun > limit_s:
            break
        new = recipe_study.run(plan, run["recipe"], lr, data, run["seed"], measure=False)
        new |= {"seed": run["seed"], "seconds": round(time.perf_counter() - start, 2)}
        known.setdefault(run["recipe"], []).append(run)
        found.setdefault(run["recipe"], []).append(new)
        print(f"beside: {run['recipe']} seed {run['seed']}: {new['accuracy']} % (base {run['accuracy']} %), "
              f"{new['seconds']} s", file=sys.stderr, flush=True)  # fmt: skip
        keep(known, found)
    return known, found


def digits(base: Mapping[str, Any] | None, device: torch.device) -> tuple[Runs, Runs]:
    """The runs of `fqt demo`, on the CPU unless they are given, and the same on the device.

    Raises:
        UsageError: the base is no result of the demo, or its digits are others than those here.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            plan = {"epochs": 8, "seeds": 3, "bits": [4, 2]}
            plan = plan if base is None else {key: base["arguments"][key] for key in plan}
            base = base or demo.run(**plan, device="cpu", out=folder, draw=False)
            known, name = base["recipes"], base["data"]
        except (KeyError, TypeError) as e:
            raise UsageError(f"--base: no demo.json of fqt demo: {e!r}") from None
        result = demo.run(**plan, device=device.type, out=folder, draw=False)
    if result["data"] != name:
        raise UsageError(f"--base is of {name}, the digits here are {result['data']}")
    return tuple({recipe: [_in_percent(run) for run in of["runs"]] for recipe, of in some.items()}
                 for some in (known, result["recipes"]))  # fmt: skip


def _in_percent(run: Figures) -> Figures:
    accuracy = None if run["accuracy"] is None else 100 * run["accuracy"]
    return {"seed": run["seed"], "diverged": run["diverged"], "accuracy": accuracy}


# ---- the command


def summary(rows: Sequence[Figures]) -> str:
    """The comparison as text."""

    def cell(s: Figures) -> str:
        if s["mean"] is None:
            return "diverged"
        return f"{s['mean']:.2f}" + ("" if s["std"] is None else f" ± {s['std']:.2f}")

    lines = [
        (row["recipe"], cell(row["base"]), cell(row["device"]),
         "" if row["difference"] is None else f"{row['difference']:+.2f}",
         "" if row["p"] is None else f"{row['p']:.2g}", row["verdict"])
        for row in rows
    ]  # fmt: skip
    return table(("recipe", "base, %", "device, %", "difference", "p", "of the spread"), lines, right=(1, 2, 3, 4))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.beside", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("resnet", "demo"))
    parser.add_argument("--base", type=Path, metavar="FILE.json", help="the CPU's result")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see how equal they can be")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=psgd_runs.FASHION, metavar="DIR", help="its four idx files"
    )
    parser.add_argument("--limit-s", type=float, default=math.inf, metavar="N", help="of resnet: begin no run later")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="written after every run")
    args = parser.parse_args(argv)
    if args.what == "resnet" and args.base is None:
        parser.error("resnet needs --base, a study of fqt_bench.recipe_study")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is false: not measured")
    device = torch.device(args.device)
    torch.set_num_threads(1)  # as the base's

    def keep(known: Runs, found: Runs) -> list[Figures]:
        rows = compared(known, found)
        if args.out:
            environment.write(args.out, {
                "kind": f"accuracies of {args.what} on a device beside the CPU's", "rule": RULE,
                "environment": record, "base": (base or {}).get("environment"), "rows": rows, "runs": found,
                "base_runs": {recipe: [{k: run[k] for k in ("seed", "diverged", "accuracy")} for run in runs]
                              for recipe, runs in known.items()},
            })  # fmt: skip
        return rows

    record = environment.environment(device)
    try:
        base = None if args.base is None else json.loads(args.base.read_text(encoding="utf-8"))
        if args.what == "resnet":
            known, found = resnet(base, args.fashion_mnist, device, args.limit_s, keep)
        else:
            known, found = digits(base, device)
    except (UsageError, OSError, json.JSONDecodeError) as e:
        parser.error(str(e))
    rows = keep(known, found)
    if args.what == "resnet" and (left := len(base["runs"]) - sum(map(len, found.values()))):
        print(f"{left} of the base's {len(base['runs'])} runs were not begun within {args.limit_s:g} s")
    print(summary(rows))
    return int(any(row["verdict"] == "outside" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
