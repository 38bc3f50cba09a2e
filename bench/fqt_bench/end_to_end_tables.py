"""Tables and the plot of an end-to-end result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .wholes import COMPILED, EXACT

Figures = dict[str, Any]

GIB = 2**30
_OTHERS, _OURS = "#999999", "#0072B2"  # colours of bars


def tables(result: Figures) -> str:
    """Markdown: what it was measured on, and of each network times, rates and memory, what has no figures, and profiles."""
    e = result["environment"]
    lines = [f"{e['gpu'] or e['cpu']}, {e['date'][:10]}, torch {e['torch']}, Triton {e['triton']}, fqt "
             f"{(e['commit'] or 'unknown')[:9]}. {result['method']}", ""]  # fmt: skip
    if e["device"] == "cpu":
        lines += ["**On a CPU, at toy sizes: these times say nothing about a GPU.**", ""]
    for network in result["networks"]:
        lines += [*_network(network), ""]
    return "\n".join(lines).rstrip()


def _network(network: Figures) -> list[str]:
    measured = [c for c in network["candidates"] if "ms" in c]
    lines = [
        f"### {network['title']}, {network['shape']}", "",
        f"{network['parameters'] / 1e6:.4g} M parameters, {network['flops'] / 1e12:.4g} TFLOP a step of "
        f"{network['items']} {network['unit']}.{' ' * bool(network['note'])}{network['note']}", "",
        *_table(["", "step, ms", "over exact", "over exact, compiled", f"{network['unit']}/s", "TFLOP/s", "peak, GiB",
                 "saved by a forward, GiB", "check"], [_row(c) for c in measured]),
    ]  # fmt: skip
    lost = [f"- {c['name']}: {c['status']}: {c['remark']}" for c in network["candidates"] if "ms" not in c]
    lines += ["", "Without figures:", *lost] if lost else []
    for c in measured:
        lines += ["", *_profile(c)] if c["profile"] else []
    return lines


def _row(c: Figures) -> list[str]:
    ms = c["ms"]
    rounds = "one round" if len(c["rounds"]) == 1 else f"{ms['low']:.4g}–{ms['high']:.4g}"
    ratios = [_ratio(c["ratio"].get(tag)) for tag in (EXACT, COMPILED)]
    return [c["name"], f"{ms['median']:.4g} ({rounds})", *ratios, f"{c['items_s']:.4g}", f"{c['tflops']:.4g}",
            *(_gib(c[field]) for field in ("peak", "saved")), c["remark"]]  # fmt: skip


def _ratio(ratio: Figures | None) -> str:
    return "" if ratio is None else f"{ratio['value']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _profile(c: Figures) -> list[str]:
    """Where the time of a step's kernels goes."""
    found = c["profile"]
    if "error" in found:
        return [f"{c['name']}: no profile: {found['error']}"]
    groups = ", ".join(f"{name} {share:.0%}" for name, share in found["groups"].items())
    rows = [
        [k["name"][:80], k["group"], str(k["count"]), f"{k['us'] / 1e3:.3f}", f"{k['share']:.1%}"] for k in found["top"]
    ]
    return [f"{c['name']}: {found['kernels']} kernels of {found['us'] / 1e3:.1f} ms in all: {groups}.", "",
            *_table(["kernel", "group", "launches", "ms", "share"], rows)]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in escaped]


def draw(result: Figures, path: Path) -> None:
    """Bars of each network's step times, with the rounds' medians as intervals, and of peak memory where it was measured."""
    from matplotlib.figure import Figure

    networks = [n for n in result["networks"] if any("ms" in c for c in n["candidates"])]
    if not networks:
        return
    most = max(sum("ms" in c for c in n["candidates"]) for n in networks)
    figure = Figure(figsize=(11.5, (1.1 + 0.36 * most) * len(networks)), layout="constrained")
    for line, network in zip(figure.subplots(len(networks), 2, squeeze=False), networks, strict=True):
        _bars(*line, network)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(times: Any, memory: Any, network: Figures) -> None:
    measured = [c for c in network["candidates"] if "ms" in c][::-1]  # bars are drawn from below
    names, at = [c["name"] for c in measured], range(len(measured))
    colours = [_OURS if c["ours"] else _OTHERS for c in measured]
    medians = [c["ms"]["median"] for c in measured]
    # Of an even number of rounds with different medians, the median of all samples lies between them.
    ends = [[max(m - c["ms"]["low"], 0) for m, c in zip(medians, measured, strict=True)],
            [max(c["ms"]["high"] - m, 0) for m, c in zip(medians, measured, strict=True)]]  # fmt: skip
    times.barh(at, medians, xerr=ends, color=colours, capsize=2.5)
    times.set_title(f"{network['title']}, {network['shape']}: ms a step", fontsize=10)
    times.set_yticks(list(at), names, fontsize=8)
    memory.barh(at, [(c["peak"] or 0) / GIB for c in measured], color=colours)
    known = any(c["peak"] is not None for c in measured)
    memory.set_title("Peak memory, GiB" if known else "Peak memory: not measured without a GPU", fontsize=10)
    memory.set_yticks(list(at), [])
    for axes in (times, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
