"""The figure of a PSGD study: test error by bits and by sparsity, noise, and histograms of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .psgd_tables import HEADS, NAMES, named, title

Figures = dict[str, Any]

_BITS, _SPARSITIES, _BOTH = (8, 6, 4, 3, 2), (50, 80, 90, 95), ("S80", "S80 W4", "S90", "S90 W4")
_STYLES = {
    "sgd": ("#D55E00", "s"), "fitted": ("#D55E00", "x"), "l1": ("#E69F00", "v"), "psgd": ("#0072B2", "o"),
    "psgd-2*": ("#0072B2", "*"), "lsq": ("#999999", "^"), "psgd+lsq": ("#CC79A7", "D"), "psgd-zero": ("#009E73", "P"),
    "psgd-grid+zero-80": ("#56B4E9", "X"), "psgd-grid+zero-90": ("#882255", "*"),
}  # fmt: skip
_CUT = ("sgd", "l1", "psgd-zero", "psgd-grid+zero-80", "psgd-grid+zero-90")
_HISTOGRAMS = ("sgd", "psgd-4", "psgd-3", "psgd-2", "psgd-zero", "psgd-grid+zero-80")


def draw(result: Figures, path: Path) -> None:
    """One row of panels for each data set, with what pure noise does, and a row of histograms of the last one's weights."""
    from matplotlib.figure import Figure

    datasets = result["datasets"]
    rows = len(datasets)
    figure = Figure(figsize=(14, 4.1 * rows + 3.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.1 * rows, 3.2])
    grid = above.subplots(rows, 3, squeeze=False)
    for line, found in zip(grid, datasets.values(), strict=True):
        _by_bits(line[0], found)
        _by_sparsity(line[1], found)
    if rows > 1:
        _both(grid[0][2], list(datasets.values())[-1])
    _noise(grid[-1][2], result["noise"])
    _histograms(below, list(datasets.values())[-1])
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _line(axes, kind: str, label: str, x: list[float], cells: list[Figures | None], dash: str = "-") -> None:
    color, marker = _STYLES[kind]
    points = [(at, 100 - c["mean"], c["std"]) for at, c in zip(x, cells, strict=True) if c is not None]
    if points:
        at, mean, std = zip(*points, strict=True)
        axes.errorbar(at, mean, std, linestyle=dash, color=color, marker=marker, markersize=5.5, linewidth=1.3, capsize=2.5,
                      label=label)  # fmt: skip


def _cell(found: Figures, method: str, cell: str) -> Figures | None:
    return found["summary"].get(method, {"cells": {}})["cells"].get(cell)


def _by_bits(axes, found: Figures) -> None:
    """Methods that are trained for a number of bits: each point is of the network trained for it; at 8 and 6, for 4."""
    bits = [b for b in _BITS if _cell(found, "sgd", f"W{b}")]
    cells = ["fp", *(f"W{b}" for b in bits)]
    x = [*range(len(cells))]
    for kind, label in (("sgd", "SGD"), ("l1", "SGD + L1")):
        _line(axes, kind, label, x, [_cell(found, kind, c) for c in cells])
    fitted = [_cell(found, "sgd", f"{c} fitted") for c in cells]
    _line(axes, "fitted", "SGD, grid of least error", x, fitted, ":")
    psgd = [_cell(found, f"psgd-{min(b, 4)}", c) for b, c in zip((4, *bits), cells, strict=True)]
    _line(axes, "psgd", "PSGD, trained for these bits", x, psgd)
    for i, (kind, label) in enumerate((("lsq", "LSQ"), ("psgd+lsq", "PSGD + LSQ"))):
        of_bits = [_cell(found, f"{kind}-{b}", f"W{b}") for b in bits]
        _line(axes, kind, label, [at + 0.08 * (i + 1) for at in x[1:]], of_bits, "--")
    _line(axes, "psgd-2*", NAMES["psgd-2*"], [0, x[-1]], [_cell(found, "psgd-2*", c) for c in ("fp", "W2")], "none")
    _finish(axes, found, "rounding", x, cells)


def _by_sparsity(axes, found: Figures) -> None:
    sparsities = [s for s in _SPARSITIES if _cell(found, "sgd", f"S{s}")]
    cells = ["fp", *(f"S{s}" for s in sparsities)]
    for kind in _CUT:
        _line(axes, kind, NAMES[kind], [*range(len(cells))], [_cell(found, kind, c) for c in cells])
    _finish(axes, found, "cutting", [*range(len(cells))], ["0", *(f"{s} %" for s in sparsities)])


def _both(axes, found: Figures) -> None:
    for i, kind in enumerate(_CUT):
        x = [at + 0.12 * (i - 2) for at in range(len(_BOTH))]
        _line(axes, kind, NAMES[kind], x, [_cell(found, kind, c) for c in _BOTH], "none")
    _finish(axes, found, "cutting, then rounding", list(range(len(_BOTH))), [HEADS[c] for c in _BOTH])


def _finish(axes, found: Figures, what: str, x: list[int], labels: list[str]) -> None:
    axes.set_yscale("log")
    axes.set_yticks(*zip(*[(v, str(v)) for v in (1, 2, 3, 5, 10, 20, 30, 50, 90)], strict=True))
    axes.minorticks_off()
    axes.autoscale(axis="y")
    axes.set_xticks(x, labels)
    axes.set_title(f"{title(found)}: test error after {what}, %", fontsize=9)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, [named(f" {label}", found).strip() for label in labels], fontsize=8, loc="upper left")


def _noise(axes, noise: Figures) -> None:
    for kind, values in noise["mse_in_spacings"].items():
        color, marker = _STYLES[kind]
        axes.plot(noise["steps"], values, "-", color=color, marker=marker, markersize=4, label=NAMES.get(kind, "PSGD"))
    axes.axhline(1 / 12, color="0.5", linewidth=1, linestyle=":", label="1/12")
    axes.set(yscale="log", xlabel="steps")
    axes.set_title("Gradients of pure noise: rounding error, MSE / Δ²", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def _histograms(figure, found: Figures) -> None:
    """Of the second layer's weights, with a logarithmic count, of the first seed; of methods with a *, those."""
    first = {r["method"]: r["histogram"] for r in found["runs"] if "histogram" in r}
    shown = [f"{m}*" if f"{m}*" in first else m for m in _HISTOGRAMS if m in first]
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, method in zip(panels, shown, strict=True):
        counts = [int(c) for c in first[method]["counts"].split()]
        edges = [2 * i / len(counts) - 1 for i in range(len(counts) + 1)]
        axes.stairs([max(c, 0.5) for c in counts], edges, fill=True, baseline=0.5, color="#0072B2")
        axes.set(yscale="log", xlabel="w / max|w|")
        axes.set_title(f"{named(f' {NAMES[method]}', found)}\nmax|w| = {first[method]['largest']:.2f}", fontsize=9)
    panels[0].set_ylabel("weights in a bin")
    panels[0].set_ylim(0.5, 2 * max(int(c) for m in shown for c in first[m]["counts"].split()))
    figure.suptitle(f"{title(found)}: second layer's weights, logarithmic count", fontsize=10)
