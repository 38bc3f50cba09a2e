"""Markdown tables of a recipe study, from what its JSON holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from . import recipe_plots, sources
from .bits_study import recipe_of

Figures = dict[str, Any]

BASELINES = ("exact", "qat8", "int8")


def tables(result: Figures) -> str:
    """Markdown: accuracy, training loss and variances by bits."""
    of, data, plan, families = (result[name] for name in ("summary", "data", "plan", "families"))
    pairs = paired(result)

    def by_bits(bits: Sequence[int], title: str, cell: Callable[[str], str]) -> list[str]:
        head = [f"| bits | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
        rows = [f"| {b} | {' | '.join(cell(recipe_of(f, b)) for f in families)} |" for b in bits]
        baselines = ", ".join(f"{name} {cell(name)}" for name in BASELINES if name in of)
        return [*head, *rows, "", f"{title} {baselines}.", ""]

    def ratios(name: str) -> str:
        return " / ".join(f"{result['variance'][when][name]['ratio']:.2g}" for when in result["variance"])

    return "\n".join([
        f"{trained_on(result)}; {plan['steps']} steps of {plan['batch']} "
        f"({plan['steps'] * plan['batch'] / data['train']:.1f} epochs), learning rate {result['learning_rate']}.", "",
        *by_bits(result["bits"], f"Test accuracy in %, mean ± standard deviation of {recipe_plots.seeds_said(result)}; "
                 "**bold**: not within the seeds' spread of exact.", lambda name: accuracy_cell(of[name], of["exact"])),
        *by_bits(result["bits"], "Accuracy over exact's of the same seed, percentage points.",
                 lambda name: _paired_cell(pairs[name])),
        *(by_bits(result["bits"], "Loss on the test data, bits a byte.",
                  lambda name: _pair(in_bits(of[name]), "test_loss", 3)) if recipe_plots.is_text(result) else ()),
        *by_bits(result["bits"], "Training loss of the last 100 steps.", lambda name: _pair(of[name], "train_loss", 4)),
        *by_bits(result["variance_bits"], "Variance over draws, as a multiple of that over batches, on the networks of qat8 "
                 "after a tenth of the steps / at the end.", ratios),
    ])  # fmt: skip


def trained_on(result: Figures) -> str:
    """The network and the data, in words."""
    plan, data = result["plan"], result["data"]
    if recipe_plots.is_text(result):
        return (f"Transformer of {plan['depth']} blocks of width {plan['width']}, {data['name']}, {data['train']} training "
                f"and {data['test']} test windows of {sources.CONTEXT} bytes")  # fmt: skip
    return (f"ResNet-{plan['depth']} of width {plan['width']}, {data['name']}, {data['train']} training and {data['test']} "
            f"test images averaged over {plan['pool']}x{plan['pool']} pixels")  # fmt: skip


def in_bits(found: Figures) -> Figures:
    """A summary with the test loss in bits."""
    of = {field: found[field] for field in ("test_loss_mean", "test_loss_std")}
    return found | {field: None if value is None else value / math.log(2) for field, value in of.items()}


def paired(result: Figures) -> dict[str, list[float]]:
    """By recipe, accuracy over exact's of the same seed, which begins with the same weights and sees the same batches;
    percentage points, of seeds of which neither run diverged."""
    exact = {r["seed"]: r["accuracy"] for r in result["runs"] if r["recipe"] == "exact" and not r["diverged"]}
    found: dict[str, list[float]] = {r["recipe"]: [] for r in result["runs"]}
    for r in result["runs"]:
        if r["seed"] in exact and not r["diverged"]:
            found[r["recipe"]].append(r["accuracy"] - exact[r["seed"]])
    return found


def _paired_cell(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    std = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{std}"


def accuracy_cell(found: Figures, exact: Figures) -> str:
    text = _pair(found, "accuracy", 2)
    return text if is_within(found, exact) else f"**{text}**"


def _pair(found: Figures, field: str, digits: int) -> str:
    mean, std = found[f"{field}_mean"], found[f"{field}_std"]
    text = "" if mean is None else f"{mean:.{digits}f}"
    text += "" if std is None else f" ± {std:.{digits}f}"
    diverged = f"{found['diverged']} of {found['runs']} diverged" if found["diverged"] else ""
    return ", ".join(filter(None, (text, diverged)))


def is_within(found: Figures, exact: Figures) -> bool:
    """Whether a summary is within the seeds' spread of exact's, by `RULE`."""
    if found["diverged"]:
        return False
    spread = math.hypot(found["accuracy_std"] or 0.0, exact["accuracy_std"] or 0.0)
    return found["accuracy_mean"] >= exact["accuracy_mean"] - spread
