"""Accuracies on a device beside those of the CPU backend: the same networks, batches and seeds.

    python -m fqt_bench.beside resnet --base FILE.json [--out FILE.json]     # a study of `fqt_bench.resnet_study` on a CPU
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fqt import demo
from fqt.cli import UsageError, table

from . import environment, psgd_runs, resnet_study

Figures = dict[str, Any]
Runs = dict[str, list[Figures]]
RULE = (
    "A recipe is within the base's spread if as many of its runs diverged and its mean accuracy differs by at most "
    "√(s² + s₀²), s and s₀ being the sample standard deviations over the seeds on the device and in the base. Of equally "
    "distributed accuracies of three seeds about one mean in twelve differs by more, one in two hundred by twice as much: "
    "twice as much is outside."
)


def compared(base: Runs, runs: Runs) -> list[Figures]:
    """By recipe: means and sample deviations of the accuracies in % of the runs that did not diverge, and the verdict,
    "within", "beyond" the spread once, or "outside"."""
    return [_row(recipe, base[recipe], runs[recipe]) for recipe in base]


def _row(recipe: str, base: Sequence[Figures], runs: Sequence[Figures]) -> Figures:
    row: Figures = {"recipe": recipe, "base": _summary(base), "device": _summary(runs)}
    a, b = row["base"], row["device"]
    if a["diverged"] != b["diverged"]:
        return row | {"difference": None, "spread": None, "verdict": "outside"}
    if a["mean"] is None:  # all diverged, on either side
        return row | {"difference": None, "spread": None, "verdict": "within"}
    difference, spread = b["mean"] - a["mean"], math.hypot(a["std"] or 0.0, b["std"] or 0.0)
    times = math.ceil(abs(difference) / spread) if spread else 3 * (difference != 0)
    verdict = {0: "within", 1: "within", 2: "beyond"}.get(times, "outside")
    return row | {"difference": difference, "spread": spread, "verdict": verdict}


def _summary(runs: Sequence[Figures]) -> Figures:
    values = [run["accuracy"] for run in runs if not run["diverged"]]
    return {
        "runs": len(runs), "diverged": len(runs) - len(values), "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }  # fmt: skip


# ---- what is trained


def resnet(base: Mapping[str, Any], folder: Path, device: torch.device) -> tuple[Runs, Runs]:
    """The runs of a ResNet study, and the same on the device.

    Raises:
        UsageError: the base is no study, or the images are not those it was made of.
    """
    try:
        plan, lr, name, runs = (
            resnet_study.Plan(**base["plan"]),
            base["learning_rate"],
            base["data"]["name"],
            base["runs"],
        )
    except (KeyError, TypeError) as e:
        raise UsageError(f"--base: no study of fqt_bench.resnet_study: {e!r}") from None
    data = psgd_runs.load("fashion-mnist" if name == "Fashion-MNIST" else "mnist", folder)
    if (data.name, len(data.train_x)) != (name, base["data"]["train"]):
        raise UsageError(f"--base is of {base['data']}, the images here are {len(data.train_x)} of {data.name}")
    data = data._replace(**{k: getattr(data, k).to(device) for k in ("train_x", "train_y", "test_x", "test_y")})
    known, found = {}, {}
    for run in runs:
        known.setdefault(run["recipe"], []).append(run)
        start = time.perf_counter()
        new = resnet_study.run(plan, run["recipe"], lr, data, run["seed"], measure=False)
        new |= {"seed": run["seed"], "seconds": round(time.perf_counter() - start, 2)}
        found.setdefault(run["recipe"], []).append(new)
        print(f"beside: {run['recipe']} seed {run['seed']}: {new['accuracy']} % (base {run['accuracy']} %), "
              f"{new['seconds']} s", file=sys.stderr, flush=True)  # fmt: skip
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
            base = base or demo.run(**plan, device="cpu", out=folder)
            known, name = base["recipes"], base["data"]
        except (KeyError, TypeError) as e:
            raise UsageError(f"--base: no demo.json of fqt demo: {e!r}") from None
        result = demo.run(**plan, device=device.type, out=folder)
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
         "" if row["difference"] is None else f"{row['difference']:+.2f}", row["verdict"])
        for row in rows
    ]  # fmt: skip
    return table(("recipe", "base, %", "device, %", "difference", "of the spread"), lines, right=(1, 2, 3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.beside", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("resnet", "demo"))
    parser.add_argument("--base", type=Path, metavar="FILE.json", help="the CPU's result")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see how equal they can be")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=psgd_runs.FASHION, metavar="DIR", help="its four idx files"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    if args.what == "resnet" and args.base is None:
        parser.error("resnet needs --base, a study of fqt_bench.resnet_study")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is false: not measured")
    device = torch.device(args.device)
    torch.set_num_threads(1)  # as the base's
    try:
        base = None if args.base is None else json.loads(args.base.read_text(encoding="utf-8"))
        known, found = resnet(base, args.fashion_mnist, device) if args.what == "resnet" else digits(base, device)
    except (UsageError, OSError, json.JSONDecodeError) as e:
        parser.error(str(e))
    rows = compared(known, found)
    if args.out:
        environment.write(args.out, {
            "kind": f"accuracies of {args.what} on a device beside the CPU's", "rule": RULE,
            "environment": environment.environment(device), "base": (base or {}).get("environment"), "rows": rows,
            "runs": found, "base_runs": {recipe: [{k: run[k] for k in ("seed", "diverged", "accuracy")} for run in runs]
                                         for recipe, runs in known.items()},
        })  # fmt: skip
    print(summary(rows))
    return int(any(row["verdict"] == "outside" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
