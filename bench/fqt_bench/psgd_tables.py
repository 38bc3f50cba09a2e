"""Markdown tables of a PSGD study, from what its JSON holds."""

from __future__ import annotations

import math
from typing import Any

Figures = dict[str, Any]

NAMES = {
    "sgd": "SGD", "l1": "SGD + L1", "psgd-zero": "PSGD, zero",
    **{f"psgd-grid+zero-{s}": f"PSGD, 4 bits + zero at {s} %" for s in (80, 90)},
    **{f"psgd-{b}": f"PSGD, {b} bits" for b in (4, 3, 2)},
    **{f"lsq-{b}": f"LSQ, {b} bits" for b in (4, 3, 2)},
    **{f"psgd+lsq-{b}": f"PSGD + LSQ, {b} bits" for b in (4, 3, 2)},
}  # fmt: skip
NAMES |= {f"{name}*": f"{label} *" for name, label in NAMES.items()}
NETWORKS = {"cnn": "a CNN", "mlp": "an MLP", "resnet": "a ResNet-20", "gpt": "a transformer"}
ROUNDED = ("fp", "W8", "W6", "W4", "W3", "W2")
FITTED = ("fp", None, None, "W4 fitted", "W3 fitted", "W2 fitted")
CUT = ("fp", "S50", "S80", "S90", "S95", "S80 W4", "S90 W4")
HEADS = {"fp": "full precision", "S80 W4": "80 % cut, W4", "S90 W4": "90 % cut, W4",
         **{f"S{s}": f"{s} % cut" for s in (50, 80, 90, 95)}}  # fmt: skip
# What PSGD is compared with SGD at: the cell, and the targets trained for it.
_ZEROS = ("psgd-zero", "psgd-zero*")
_TO_ZERO = {s: (*_ZEROS, f"psgd-grid+zero-{s}", f"psgd-grid+zero-{s}*") for s in (80, 90)}
COMPARED = (
    ("W4", ("psgd-4",)), ("W3", ("psgd-3",)), ("W2", ("psgd-2", "psgd-2*")),
    ("S80", _TO_ZERO[80]), ("S90", _TO_ZERO[90]), ("S95", _ZEROS), ("S80 W4", _TO_ZERO[80]), ("S90 W4", _TO_ZERO[90]),
)  # fmt: skip


def tables(result: Figures) -> str:
    """Of each data set: accuracy rounded, accuracy cut, the comparisons by the study's rule, and the settings."""
    lines: list[str] = []
    for found in result["datasets"].values():
        plan, data, inputs = found["plan"], found["data"], inputs_of(found)
        said = [
            f"### {title(found)}", "",
            f"{plan['pretrain']} + {plan['steps']} steps of {plan['batch']} {inputs} "
            f"({found['epochs']:.1f} epochs of {data['train']}), {data['test']} test {inputs}; test accuracy in %, "
            f"mean ± standard deviation of {plan['seeds']} seeds.", "",
            *_rounded(found["summary"]), "", *_cut(found["summary"]), "", *_compared(found["summary"]), "",
            f"Settings chosen on held-out training {inputs}: " + "; ".join(
                f"{NAMES[m]} {_setting(s)}" for m, s in found["chosen"].items()) + ".", "",
        ]  # fmt: skip
        lines += [named(line, found) for line in said]
    return "\n".join([*lines, *_noise(result["noise"])])


def title(found: Figures) -> str:
    """A data set and the network that is trained on it."""
    return f"{found['data']['name']}, {NETWORKS[found['plan']['network']]}"


def inputs_of(found: Figures) -> str:
    return "windows" if found["plan"]["network"] == "gpt" else "images"


def named(text: str, found: Figures) -> str:
    """The text with the names of the optimizers that trained the network."""
    adam = found.get("arguments", {}).get("optimizer") == "AdamW"
    return text.replace("PSGD", "PSGDAdamW").replace(" SGD", " AdamW") if adam else text


def comparisons(summary: Figures) -> list[Figures]:
    """By the study's rule: losses of SGD (fitted_loss: on the grid of least error, None of cuts) and of PSGD, the gain and
    the spread, all in percentage points, and whether PSGD wins. Methods and cells that were not run are left out."""
    found = []
    for cell, methods in COMPARED:
        for method in methods:
            if any(cell not in summary.get(m, {"cells": ()})["cells"] for m in ("sgd", method)):
                continue
            sgd, psgd = (summary[m]["cells"] for m in ("sgd", method))
            gain = sgd[cell]["loss"] - psgd[cell]["loss"]
            spread = math.hypot(sgd[cell]["loss_std"], psgd[cell]["loss_std"])
            below = sgd["fp"]["mean"] - psgd["fp"]["mean"]
            found.append({
                "cell": cell, "method": method, "sgd_loss": sgd[cell]["loss"],
                "fitted_loss": sgd.get(f"{cell} fitted", {}).get("loss"), "loss": psgd[cell]["loss"], "gain": gain,
                "spread": spread, "fp_below": below, "wins": gain > spread and below <= 0.5,
            })  # fmt: skip
    return found


def _ordered(summary: Figures) -> list[str]:
    """The methods in the order they were run in, but those with a * under those without."""
    names = list(summary)
    return sorted(names, key=lambda m: (names.index(m.rstrip("*")), m))


def _rounded(summary: Figures) -> list[str]:
    rows, has = [], _columns(summary, ROUNDED)
    for method in (m for m in _ordered(summary) if not m.startswith("psgd-zero")):
        cells = summary[method]["cells"]
        rows.append([_label(method, summary), *(_cell(cells, ROUNDED[i]) for i in has)])
        if method == "sgd":
            rows.append(["SGD, grid of least error", *(_cell(cells, FITTED[i]) for i in has)])
    return _table(["trained by", *(HEADS.get(ROUNDED[i], ROUNDED[i]) for i in has)], rows)


def _cut(summary: Figures) -> list[str]:
    chosen = [m for m in _ordered(summary) if any(c in summary[m]["cells"] for c in CUT[1:])]
    cells = [CUT[i] for i in _columns(summary, CUT)]
    rows = [[_label(m, summary), *(_cell(summary[m]["cells"], c) for c in cells)] for m in chosen]
    return _table(["trained by", *(HEADS.get(c, c) for c in cells)], rows)


def _columns(summary: Figures, cells: tuple[str, ...]) -> list[int]:
    """Which of the cells a method was evaluated at."""
    return [i for i, cell in enumerate(cells) if any(cell in of["cells"] for of in summary.values())]


def _compared(summary: Figures) -> list[str]:
    rows = []
    for c in comparisons(summary):
        fitted = "" if c["fitted_loss"] is None else f"{c['fitted_loss']:.2f}"
        figures = f"{c['loss']:.2f}", f"{c['gain']:+.2f}", f"{c['spread']:.2f}", f"{-c['fp_below']:+.2f}"
        wins = "yes" if c["wins"] else "no"
        rows.append(
            [HEADS.get(c["cell"], c["cell"]), NAMES[c["method"]], f"{c['sgd_loss']:.2f}", fitted, *figures, wins]
        )
    head = "", "", "SGD loses", "on the grid of least error", "PSGD loses", "gain", "spread", "full precision", "wins"
    return _table(list(head), rows)


def _noise(noise: Figures) -> list[str]:
    steps, found = noise["steps"], noise["mse_in_spacings"]
    picked = [i for i in range(len(steps)) if i % 5 == 0]
    rows = [[NAMES.get(m, "PSGD"), *(f"{found[m][i]:.2g}" for i in picked)] for m in found]
    return _table(["gradients of pure noise: MSE/Δ² after step", *(str(steps[i]) for i in picked)], rows)


def _label(method: str, summary: Figures) -> str:
    diverged = summary[method]["diverged"]
    return NAMES[method] + (f" ({diverged} of {summary[method]['runs']} diverged)" if diverged else "")


def _setting(setting: Figures) -> str:
    l1 = f", L1 {setting['l1']:g}" if "l1" in setting else ""
    return f"lr {setting['lr']:g}{l1}{', from scratch' if setting['start'] == 'scratch' else ''}"


def _cell(cells: Figures, cell: str | None) -> str:
    return f"{cells[cell]['mean']:.2f} ± {cells[cell]['std']:.2f}" if cell in cells else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
