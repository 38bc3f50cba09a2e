"""What holding weights in int8 without a float copy costs: excess variance on a quadratic, accuracy on the demo's digits.

    python -m fqt_bench.int8_weight_study --out FILE.json

Quadratic: f(w) = μ w² / 2 of many independent weights, gradients with noise of variance 1, steps of `fqt.optim.int8` at a
fixed scale Δ (each row has one weight at 100 Δ that is never moved). The stationary variance of float32 weights, of int8
weights rounded stochastically and of int8 weights rounded to nearest, beside the formulas of `fqt.optim.int8`.

Digits: the demo's network, data, batch, momentum and falling learning rate under recipe "int8", with float32 weights that
are quantized for each forward pass, with weights held in int8, and with those rounded to nearest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import demo, rng
from fqt.convert import quantize_
from fqt.int8_weight import Int8Weight, hold_int8_
from fqt.optim import int8
from fqt.position import Position

from . import environment

Figures = dict[str, Any]
CURVATURE, DELTA = 1.0, 0.05
RATES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
ROWS, COLUMNS = 64, 256
TIMES = 8  # relaxation times 1 / (η μ) that are let pass, and then averaged over
PLAIN = Position(target=None)
SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
WEIGHTS = ("float32", "int8", "int8 to nearest")
EPOCHS = 24


def nearest_(p: Int8Weight, g: Tensor, state: dict, group: dict) -> None:
    """`int8.step_` with rounding to nearest."""
    new = int8.stepped(p, g, state, PLAIN, group, "sgd")
    scale = int8.row_scales(p.scale, new)
    q = torch.round(new / scale).nan_to_num(0.0).clamp(-int8.HIGHEST, int8.HIGHEST).to(torch.int8)
    int8.write_(p, q, scale)


# ---- the quadratic


def quadratic(rate: float, seed: int = 0) -> Figures:
    """Stationary mean squares of the weights at a learning rate, and what the formulas say of the excess."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-20, 21, (ROWS, COLUMNS), generator=generator) * DELTA
    held, stuck = _at_scale(start), _at_scale(start)
    w, group, state = start.clone(), SGD | {"lr": rate}, {}
    steps = round(TIMES / (rate * CURVATURE))
    sums, bernoulli, gradient = dict.fromkeys(WEIGHTS, 0.0), 0.0, 0.0
    for step in range(2 * steps):
        noise = torch.randn(ROWS, COLUMNS, generator=generator)
        g = _gradient(held, noise)
        if step >= steps:
            sums["float32"] += float(w.square().mean()) / steps
            for name, p in (("int8", held), ("int8 to nearest", stuck)):
                sums[name] += float(p.dequantize()[:, 1:].square().mean()) / steps
            u = (g[:, 1:] * (rate / DELTA)).double()
            p = u - u.floor()
            bernoulli += float((p * (1 - p)).mean()) / steps
            gradient += float(g[:, 1:].abs().mean()) / steps
        w -= rate * (CURVATURE * w + noise)
        int8.step_(held, g, state, PLAIN, group, "sgd")
        nearest_(stuck, _gradient(stuck, noise), state, group)
    return {
        "rate": rate,
        "steps": 2 * steps,
        "mean_square": sums,
        "excess": sums["int8"] - sums["float32"],
        "standard_error": _standard_error(sums),
        "mean_p_1_p": bernoulli,
        "formula": bernoulli * DELTA**2 / (2 * rate * CURVATURE - (rate * CURVATURE) ** 2),
        "limit": gradient * DELTA / (2 * CURVATURE),
        "sgd_formula": rate / (2 * CURVATURE - rate * CURVATURE**2),
    }


def _at_scale(start: Tensor) -> Int8Weight:
    """Weights at a scale of DELTA, with a first column at 100 DELTA that keeps it."""
    q = torch.cat([torch.full((ROWS, 1), 100.0), start / DELTA], 1).round().to(torch.int8)
    stream = torch.tensor([rng.layer_key("quadratic", 0), 0])
    return Int8Weight(q, q.t().contiguous(), torch.full((ROWS, 1), DELTA), stream)


def _gradient(p: Int8Weight, noise: Tensor) -> Tensor:
    g = CURVATURE * p.dequantize()
    g[:, 1:] += noise
    g[:, 0] = 0.0
    return g


def _standard_error(sums: Figures) -> float:
    """Of the excess, at most: both mean squares v are of ROWS · COLUMNS weights over TIMES relaxation times; the noise of
    the gradients, which both have, falls out of the difference.

    The square of a normal variable has the variance 2 v² and is correlated over half a relaxation time to each side.
    """
    count = ROWS * COLUMNS * TIMES
    return (2 / count * (sums["float32"] ** 2 + sums["int8"] ** 2)) ** 0.5


# ---- digits


def train(weights: str, seed: int, data: demo.Digits, epochs: int) -> Figures:
    """Train the demo's network with one of WEIGHTS."""
    torch.manual_seed(seed)
    rng.manual_seed(seed)
    model = demo.mlp(data.train_x.shape[1])
    quantize_(model, "int8")
    if weights != "float32":
        hold_int8_(model)
    held = [p for p in model.parameters() if isinstance(p, Int8Weight)]
    others = [p for p in model.parameters() if not isinstance(p, Int8Weight)]
    optimizer = torch.optim.SGD(others, lr=0.0, momentum=demo.MOMENTUM)
    states: list[dict] = [{} for _ in held]
    order = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        group = SGD | {"lr": demo.LEARNING_RATE * (1 - epoch / epochs), "momentum": demo.MOMENTUM}
        optimizer.param_groups[0]["lr"] = group["lr"]
        for batch in torch.randperm(len(data.train_x), generator=order).split(demo.BATCH):
            model.zero_grad()
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            for p, state in zip(held, states, strict=True):
                if weights == "int8":
                    int8.step_(p, p.grad, state, PLAIN, group, "sgd")
                else:
                    with torch.no_grad():
                        nearest_(p, p.grad, state, group)
        held_bytes = _bytes(model)  # before evaluation, which keeps no transposed codes
        losses.append(_loss(model, data))
    return {"seed": seed, "train_loss": losses, "accuracy": _accuracy(model, data), **held_bytes}


@torch.no_grad()
def _loss(model: nn.Module, data: demo.Digits) -> float:
    return float(F.cross_entropy(model(data.train_x), data.train_y))


@torch.no_grad()
def _accuracy(model: nn.Module, data: demo.Digits) -> float:
    return float((model(data.test_x).argmax(1) == data.test_y).double().mean())


def _bytes(model: nn.Module) -> Figures:
    """Bytes for each weight of the linear layers: what holds W, and with it the codes that the layer keeps beside it."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    held = beside = 0
    for layer in layers:
        codes = [layer.weight.q, layer.weight.qt, layer.weight.scale] if isinstance(layer.weight, Int8Weight) else []
        held += sum(t.nbytes for t in codes) or layer.weight.nbytes
        cache = layer._fqt_cache
        beside += sum(t.nbytes for t in cache.value if t is not None) if cache is not None else 0
    count = sum(layer.weight.numel() for layer in layers)
    return {"bytes_of_weights": held / count, "bytes_with_codes": (held + beside) / count}


# ---- the report


def report(result: Figures) -> str:
    """The tables of a result, in Markdown."""
    rows = [
        [f"{f['rate']:g}", *(f"{f['mean_square'][name]:.5f}" for name in WEIGHTS), f"{f['sgd_formula']:.5f}",
         f"{f['excess']:.5f} ± {f['standard_error']:.5f}", f"{f['formula']:.5f}", f"{f['limit']:.5f}"]
        for f in result["quadratic"]
    ]  # fmt: skip
    head = ("η", *WEIGHTS, "formula of float32", "excess of int8", "E[p(1-p)]Δ²/(2ημ-η²μ²)", "E|g|Δ/(2μ)")
    lines = ["Stationary mean square of the weights, μ = 1, Δ = 0.05", "", *_markdown(head, rows), ""]
    rows = []
    for name, runs in result["digits"].items():
        loss, accuracy = [[f(r) for r in runs] for f in (lambda r: r["train_loss"][-1], lambda r: 100 * r["accuracy"])]
        rows.append([name, _spread(accuracy, ".2f"), _spread(loss, ".4g"),
                     *(f"{runs[0][key]:.2f}" for key in ("bytes_of_weights", "bytes_with_codes"))])  # fmt: skip
    head = ("weights", "test accuracy, %", "training loss", "bytes a weight", "with the layer's codes")
    return "\n".join([*lines, f"{result['data']}, mean and spread over seeds", "", *_markdown(head, rows)])


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) if len(values) > 1 else 0.0:{form}}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.int8_weight_study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--seeds", type=int, default=3, help="of the networks")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.epochs < 1:
        parser.error("seeds and epochs are at least 1")
    torch.set_num_threads(1)
    data = demo.load_digits()
    result = {
        "environment": environment.environment(torch.device("cpu")),
        "data": data.name,
        "arguments": {"seeds": args.seeds, "epochs": args.epochs, "rows": ROWS, "columns": COLUMNS, "times": TIMES,
                      "curvature": CURVATURE, "delta": DELTA, "batch": demo.BATCH, "hidden": demo.HIDDEN,
                      "learning_rate": demo.LEARNING_RATE, "momentum": demo.MOMENTUM},
        "quadratic": [quadratic(rate) for rate in RATES],
        "digits": {name: [train(name, seed, data, args.epochs) for seed in range(args.seeds)] for name in WEIGHTS},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, allow_nan=False), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
