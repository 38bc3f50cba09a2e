"""The report's figures, as SVG to stand inside a page: matplotlib draws, the page's CSS colours.

Colours are names of the page's custom properties ("--ink"), so that one drawing serves light and dark. Text stays text, in
the reader's font; ids that are referred to carry the figure's own, and there is nothing that names another place.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FormatStrFormatter, FuncFormatter, MaxNLocator, NullLocator

from fqt.cost import Ceilings

from .facts import FORMATS, NOT_MEASURED, Grid, Point, Trend, borders, peak, ratio

# Stand-ins that nothing else draws with, one for each custom property of the page.
INK, MUTED, RULE, PAPER, OURS, THEIRS, INT8, BF16, FP8 = (f"#0102{i:02x}" for i in range(1, 10))
_PROPERTIES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", OURS: "ours", THEIRS: "theirs",
               INT8: "int8", BF16: "bf16", FP8: "fp8"}  # fmt: skip
_FORMAT = {"int8": INT8, "bf16": BF16, "fp8": FP8, None: MUTED}
WIDTH = 380  # of a figure that fits a phone, in CSS pixels
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "hatch.color": RULE,
    "axes.formatter.use_mathtext": False,
    "text.parse_math": False,  # a name may hold a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


def svg(draw: Callable[[Figure], None], ident: str, label: str, width: float, height: float) -> str:
    """One figure of this size in CSS pixels. ident: unique within the page. label: what a screen reader says of it."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the layout font lacks: the reader's font draws it
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": ident})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), ident, label, width, height)


def _inline(text: str, ident: str, label: str, width: float, height: float) -> str:
    """The drawing without head, metadata and style sheet, its ids made its own."""
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    wanted = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', body))
    wanted = {name for pair in wanted for name in pair if name}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{ident}-{m[1]}"' if m[1] in wanted else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{ident}-", body).replace("xlink:href", "href")
    body = re.sub(r"#0102[0-9a-f]{2}", lambda m: f"var(--{_PROPERTIES[m[0]]})", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    return head + re.sub(r"\s*\n\s*", "\n", body)


# ---- ratio


def ratio_figure(case: dict[str, Any], *, ident: str, label: str) -> str:
    """Dot and whisker of each candidate that has a ratio to the case's baseline, the fastest on top."""
    found = sorted(((c, r) for c in case["candidates"] if (r := ratio(c))), key=lambda pair: -pair[1][0])
    row, top, bottom = 29, 8, 40
    height = row * len(found) + top + bottom

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((10 / WIDTH, bottom / height, 1 - 24 / WIDTH, row * len(found) / height))
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for i, (candidate, (value, low, high)) in enumerate(found):
            ours = candidate["ours"]
            axes.errorbar(
                value, i + 0.68, xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt="o" if ours else "D",
                markersize=6.5 if ours else 5.5, color=OURS if ours else THEIRS, capsize=3, elinewidth=1.4,
                markerfacecolor=OURS if ours else PAPER,
            )  # fmt: skip
            figure_of = f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
            for x, side, text in ((0, "left", _cut(candidate["name"], 50)), (1, "right", figure_of)):
                axes.text(x, i + 0.37, text, ha=side, fontsize=10, transform=axes.get_yaxis_transform(),
                          bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})  # fmt: skip
        axes.set_ylim(len(found), 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _ratio_scale(axes, [x for _, r in found for x in r])
        axes.set_xlabel(_cut(f"rate over that of {case['baseline']}", 60))
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)

    return svg(draw, ident, label, WIDTH, height)


def _ratio_scale(axes: Any, values: Sequence[float]) -> None:
    """All values and 1, with room at both ends; logarithmic from a factor of six on."""
    low, high = min(1, *values), max(1, *values)
    if high / low > 6:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
        _plain_log(axes.xaxis, low / 1.25, high * 1.25)
    else:
        room = max(0.06 * (high - low), 0.02)
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _plain_log(axis: Any, low: float, high: float) -> None:
    """At most seven ticks at 1, 2, 5, 10, …, or at powers of ten, written as plain numbers."""
    for steps in ((1, 2, 5), (1,)):
        ticks = [
            s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps
        ]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) <= 7:
            break
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)] if ticks else []))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def _cut(text: str, length: int) -> str:
    """At most so many characters; the middle goes, since names differ at both ends."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half].rstrip()}…{text[-half:].lstrip()}"


# ---- roofline


def roofline_figure(points: Sequence[Point], ceilings: Ceilings | None, *, ident: str, label: str) -> str:
    """Intensity against rate, both logarithmic; the ceilings, where there are any, say where they come from."""
    formats = [f for f in (*FORMATS, None) if any(p.format == f for p in points)]
    entries = sum(len({p.candidate["ours"] for p in points if p.format == f}) for f in formats)
    roofs = [f for f in formats if f and ceilings and peak(ceilings, f)]
    plot, bottom = 290, 42 + 15 * (entries + len(roofs))
    height = plot + bottom + 26

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((48 / WIDTH, bottom / height, 1 - 60 / WIDTH, plot / height))
        xs, ys = [p.intensity for p in points], [p.tops for p in points]
        low, high = min(xs) / 2, max(xs) * 2
        for name in formats:
            for ours in (True, False):
                some = [p for p in points if p.format == name and p.candidate["ours"] == ours]
                if some:
                    axes.plot([p.intensity for p in some], [p.tops for p in some], "o" if ours else "D", alpha=0.85,
                              color=_FORMAT[name], markerfacecolor=_FORMAT[name] if ours else PAPER,
                              markersize=6.5 if ours else 5.5, linestyle="none",
                              label=f"{name or 'other formats'}, {'fqt' if ours else 'not fqt'}")  # fmt: skip
        for name, dashes in zip(roofs, ("-", (0, (6, 2)), (0, (2, 2))), strict=False):
            top = peak(ceilings, name)
            x = [low, *([top / ceilings.tb_s] if low < top / ceilings.tb_s < high else []), high]
            roof = [min(top, ceilings.tb_s * at) for at in x]
            ys += roof
            axes.plot(x, roof, color=_FORMAT[name], linewidth=1.5, linestyle=dashes,
                      label=f"{name} ceiling: {top:.0f} · 10¹²/s, {ceilings.tb_s:.2f} TB/s ({ceilings.source})")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(ys) / 1.6, max(ys) * 1.6))
        _plain_log(axes.xaxis, low, high)
        _plain_log(axes.yaxis, min(ys) / 1.6, max(ys) * 1.6)
        axes.set_xlabel("operations per byte that has to move")
        axes.set_title("10¹² operations per second", loc="left", fontsize=10, x=-48 / (WIDTH - 60))
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="lower left", bbox_to_anchor=(0, 0), borderaxespad=0.2, labelspacing=0.35, handlelength=1.8)

    return svg(draw, ident, label, WIDTH, height)


# ---- where int8 pays


_FRONTIER = {True: "-", False: (0, (1.2, 0.8))}  # between cells that touch; an end of a gap


def heat_figure(grid: Grid, predicted: bool, *, ident: str, label: str) -> str:
    """M across, (N, K) down. Measured cells with the frontier, the others hatched; or, apart, the predictions of all."""
    cells = grid.predicted if predicted else grid.cells
    left, cell, row, top, bottom = 68, 60, 36, 24, 8 if predicted else 30
    width = left + cell * len(grid.ms) + 8
    height = top + row * len(grid.weights) + bottom
    norm, colours = TwoSlopeNorm(0, -1, 1), matplotlib.colormaps["PuOr"]

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            (left / width, bottom / height, cell * len(grid.ms) / width, row * len(grid.weights) / height)
        )
        axes.set(xlim=(-0.5, len(grid.ms) - 0.5), ylim=(len(grid.weights) - 0.5, -0.5))
        for i, m in enumerate(grid.ms):
            for j, weight in enumerate(grid.weights):
                _cell(axes, i, j, cells.get((m, weight)), norm, colours, "no prediction" if predicted else NOT_MEASURED)
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(grid.ms)), [f"M {m}" for m in grid.ms])
        axes.set_yticks(range(len(grid.weights)), [f"N {n}\nK {k}" for n, k in grid.weights])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not predicted:
            for (x0, y0), (x1, y1), exact in borders(grid):
                axes.plot([x0, x1], [y0, y1], color=PAPER, linewidth=6, solid_capstyle="butt", clip_on=False)
                axes.plot([x0, x1], [y0, y1], color=INK, linewidth=3, linestyle=_FRONTIER[exact], clip_on=False)
            exact = {exact for *_, exact in borders(grid)}
            _frontier_key(figure, [e for e in (True, False) if e in exact], width, height)

    return svg(draw, ident, label, width, height)


def _cell(axes: Any, i: int, j: int, value: float | None, norm: Any, colours: Any, missing: str) -> None:
    box = {"xy": (i - 0.47, j - 0.46), "width": 0.94, "height": 0.92, "linewidth": 0}
    if value is None:
        axes.add_patch(Rectangle(**box, facecolor="none", hatch="////", edgecolor=RULE))
        words = missing.replace(" ", "\n", 1)
        axes.text(i, j, words, ha="center", va="center", fontsize=8.5, color=MUTED, linespacing=0.95,
                  bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1})  # fmt: skip
        return
    colour = colours(norm(max(-1.0, min(1.0, math.log2(value)))))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    dark = 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18  # where white has the better contrast
    axes.add_patch(Rectangle(**box, facecolor=colour))
    axes.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=11, color="white" if dark else "black")


def _frontier_key(figure: Figure, kinds: Sequence[bool], width: float, height: float) -> None:
    """Below the cells, what the lines that are drawn mean."""
    for i, exact in enumerate(kinds):
        x = 8 + 118 * i
        figure.add_artist(Line2D([x / width, (x + 18) / width], [12 / height] * 2, color=INK, linewidth=3,
                                 linestyle=_FRONTIER[exact]))  # fmt: skip
        words = "frontier, ratio 1" if exact else "the frontier is between two of these"
        figure.text((x + 23) / width, 12 / height, words, fontsize=9.5, va="center")


# ---- trend


def trend_figure(trend: Trend, *, ident: str, label: str) -> str:
    """A ratio over the runs, evenly spaced, and its bound."""
    height, bottom = 190, 44
    values = [value for _, value in trend.points]

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((44 / WIDTH, bottom / height, 1 - 88 / WIDTH, 1 - (bottom + 10) / height))
        axes.axhline(trend.bound, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(range(len(values)), values, "o-", color=OURS, linewidth=1.5, markersize=5)
        room = max(0.12 * (max(*values, trend.bound) - min(*values, trend.bound)), 0.02)
        axes.set_ylim(min(*values, trend.bound) - room, max(*values, trend.bound) + room)
        axes.set_xlim(-0.5, len(values) - 0.5)
        shown = sorted({0, len(values) // 2, len(values) - 1})  # so few that they never touch
        names = [f"{run.date[:10]}\n{run.commit[:9]}" for run, _ in trend.points]
        axes.set_xticks(shown, [names[i] for i in shown], fontsize=9.5)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%.2f"))
        axes.text(1.01, trend.bound, f"{'≤' if trend.at_most else '≥'} {trend.bound:.2f}", va="center", fontsize=9.5,
                  color=MUTED, transform=axes.get_yaxis_transform())  # fmt: skip
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)

    return svg(draw, ident, label, WIDTH, height)
