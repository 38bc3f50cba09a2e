"""The figure of a recipe study: accuracy, training loss and gradient variance by bits, the variance by layer, and how the
loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bits_study import recipe_of

Figures = dict[str, Any]

_STYLES = {"ptq": ("#D55E00", "s"), "psq": ("#009E73", "^"), "bhq": ("#0072B2", "o"), "int8": ("#CC79A7", "*")}
_BASES = {"exact": ("#000000", "-"), "qat8": ("#999999", "--")}
_WHEN = {"early": ("none", ":", "early, a tenth of the steps"), "end": ("full", "-", "at the end")}


def draw(result: Figures, path: Path) -> None:
    """Four panels, variances on logarithmic axes; below them, where the study has them, curves of the loss."""
    from matplotlib.figure import Figure

    has_curves = any(run.get("curve") for run in result["runs"])
    figure = Figure(figsize=(11.5, 8.4 + 3.8 * has_curves), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[8.4, 3.8]) if has_curves else (figure.subfigures(1, 1), None)
    (accuracy, variance), (loss, layers) = above.subplots(2, 2)
    plan = result["plan"]
    _by_bits(accuracy, result, "accuracy")
    accuracy.set_title(f"Test accuracy, %: mean ± std of {seeds_said(result)}", fontsize=10)
    _by_bits(loss, result, "train_loss")
    loss.set(yscale="log")
    loss.set_title("Training loss of the last 100 steps", fontsize=10)
    _variance(variance, result)
    for axes, bits in ((accuracy, "bits"), (loss, "bits"), (variance, "variance_bits")):
        axes.set_xticks(result[bits])
        axes.invert_xaxis()
        axes.set_xlabel("bits of the gradient codes of dgrad")
    _by_layer(layers, result)
    for axes in (accuracy, loss, variance, layers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    if below is not None:
        _curves(below, result)
    network = f"Transformer of {plan['depth']} blocks" if is_text(result) else f"ResNet-{plan['depth']}"
    figure.suptitle(f"{network}, width {plan['width']}, {result['data']['name']}", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def is_text(result: Figures) -> bool:
    """Whether the network is the transformer; studies of before had none."""
    return result["plan"].get("network") == "gpt"


def seeds_said(result: Figures) -> str:
    """How many seeds there were, in words."""
    few, many = result["seeds"], result["seeds_8_bits"]
    return f"{few} seeds" if few == many else f"{few} seeds, {many} at 8 bits and of exact and qat8"


def _by_bits(axes, result: Figures, field: str) -> None:
    """A quantity of the runs: exact and qat8 as bands, int8 at 8 bits; what diverged has no point."""
    of, bits = result["summary"], result["bits"]
    for name, (color, dash) in _BASES.items():
        if name in of and of[name][f"{field}_mean"] is not None:
            mean, std = of[name][f"{field}_mean"], of[name][f"{field}_std"] or 0.0
            axes.axhline(mean, color=color, linestyle=dash, linewidth=1, label=f"{name} ± std")
            axes.axhspan(mean - std, mean + std, color=color, alpha=0.08, linewidth=0)
    kinds = [*result["families"], *(["int8"] if "int8" in of else [])]
    for i, kind in enumerate(kinds):
        at = [8] if kind == "int8" else bits
        points = [
            (b - 0.1 * (i - (len(kinds) - 1) / 2), of[kind if kind == "int8" else recipe_of(kind, b)]) for b in at
        ]
        points = [(x, r) for x, r in points if r[f"{field}_mean"] is not None]  # side by side: bits fall to the right
        color, marker = _STYLES[kind]
        axes.errorbar([x for x, _ in points], [r[f"{field}_mean"] for _, r in points],
                      [r[f"{field}_std"] or 0.0 for _, r in points], color=color, marker=marker, markersize=5,
                      linewidth=1.2, capsize=2.5, label=kind)  # fmt: skip


def _variance(axes, result: Figures) -> None:
    """Over draws, by bits, and over batches, on the same networks."""
    bits = result["variance_bits"]
    for when, (fill, dash, said) in _WHEN.items():
        of = result["variance"][when]
        sampling = of[recipe_of(result["families"][0], bits[0])]["sampling"]  # the same of all: of qat8
        axes.axhline(sampling, color="0.3", linestyle=dash, linewidth=1, label=f"over batches, {said}")
        for family in result["families"]:
            color, marker = _STYLES[family]
            y = [of[recipe_of(family, b)]["quantization"] for b in bits]
            axes.plot(bits, y, dash, color=color, marker=marker, markersize=5, fillstyle=fill, linewidth=1.2,
                      label=f"{family}, {said}")  # fmt: skip
        if "int8" in of:
            color, marker = _STYLES["int8"]
            axes.plot([8], [of["int8"]["quantization"]], marker, color=color, fillstyle=fill, label=f"int8, {said}")
    axes.set(yscale="log")
    title = "Variance of the gradient of all parameters over draws\nof the rounding, and over batches; networks of qat8"
    axes.set_title(title, fontsize=10)


def _by_layer(axes, result: Figures) -> None:
    """Of each layer's weight gradient, at the middle number of bits, early."""
    of, bits = result["variance"]["early"], sorted(result["variance_bits"])
    b = bits[len(bits) // 2]
    x = range(len(result["layers"]))
    for family in result["families"]:
        color, marker = _STYLES[family]
        lines = of[recipe_of(family, b)]["layers"]
        pairs = zip(lines["quantization"].split(), lines["sampling"].split(), strict=True)
        axes.plot(x, [float(q) / float(s) for q, s in pairs], "-", color=color, marker=marker, markersize=4, linewidth=1.2,
                  label=f"{family}{b}")  # fmt: skip
    axes.set(yscale="log")
    axes.set_xticks(list(x), result["layers"], rotation=90, fontsize=6)
    axes.set_title(
        "Weight gradients by layer, early: variance over draws\nas a multiple of that over batches", fontsize=10
    )


def _curves(figure, result: Figures) -> None:
    """The training loss over the steps, one panel for each family: means over seeds that did not diverge, by bits."""
    from matplotlib import colormaps

    panels = figure.subplots(1, len(result["families"]), sharey=True, squeeze=False)[0]
    low, high = min(result["bits"]), max(result["bits"])
    for axes, family in zip(panels, result["families"], strict=True):
        shades = [
            (recipe_of(family, b), colormaps["plasma"](0.85 * (high - b) / max(high - low, 1))) for b in result["bits"]
        ]
        for name, color in (*shades, *((name, color) for name, (color, _) in _BASES.items())):
            curves = [[float(v) for v in run["curve"].split()]
                      for run in result["runs"] if run["recipe"] == name and run.get("curve")]  # fmt: skip
            if curves:
                mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                at = [(i + 0.5) / len(mean) * result["plan"]["steps"] for i in range(len(mean))]
                axes.plot(at, mean, color=color, linewidth=1.1, linestyle="--" if name == "qat8" else "-", label=name)
        axes.set(yscale="log", xlabel="step")
        axes.set_title(f"Training loss, {family}: mean over seeds", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
