"""Results of `fqt_bench.end_to_end`, read as rows of a table: for the README and for `fqt bench report`.

As any result they may come from anywhere: what is not of the form that is read here is `Refused`, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reading import OTHER, Refused, clean, parse
from .targets import digits

KIND = "end to end"  # of a result
EXACT, COMPILED = "exact", "exact compiled"  # tags of what the others are compared with
HEADER = ("network", "", "ms a step", "over bf16", "over bf16, compiled", "a second", "peak, GiB")
RIGHT = (2, 3, 4, 5, 6)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """One result. gpu: its name, "" of a CPU. quick: of toy sizes. rows: of `HEADER`, the reason where there is no time."""

    gpu: str
    date: str
    versions: str
    quick: bool
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, result: Figures) -> Whole:
        """Raises Refused."""
        try:
            e = result["environment"]
            versions = f"driver {e['driver']}, torch {e['torch']}, Triton {e['triton']}, {e['date'][:10]}"
            commit = (e["commit"] or "unknown")[:9]
            rows = tuple(_row(n, c) for n in result["networks"] for c in n["candidates"])
            found = cls(
                e["gpu"] or "", e["date"], f"{versions}, commit {commit}", bool(result["arguments"]["quick"]), rows
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
            raise Refused(f"no whole result of whole training steps: {type(e).__name__}: {e}") from e
        if not all(isinstance(text, str) for text in (found.gpu, found.date, *(cell for row in rows for cell in row))):
            raise Refused("a number where a result of whole training steps has text")
        return found


def is_one(result: Any) -> bool:
    """Whether this is meant to be such a result."""
    return isinstance(result, dict) and result.get("kind") == KIND


def read(path: Path) -> Whole:
    """One file's. Raises Refused."""
    result = parse(path)
    if not is_one(result):
        raise Refused("no result of whole training steps")
    return _cleaned(result)


def _cleaned(result: Figures) -> Whole:
    try:
        return Whole.of(clean(result))
    except RecursionError:
        raise Refused("nested too deep") from None


def among(refused: Iterable[tuple[Path, str]]) -> tuple[list[Whole], list[tuple[Path, str]]]:
    """Of the files that are no results of `fqt bench` those that are results of this, and the others with the reasons."""
    found, others = [], []
    for path, reason in refused:
        try:
            result = parse(path) if reason.startswith(OTHER) else None
            if is_one(result):
                found.append(_cleaned(result))
            else:
                others.append((path, reason))
        except Refused as e:
            others.append((path, str(e)))
    return found, others


def newest(wholes: Iterable[Whole]) -> list[Whole]:
    """Of each GPU the newest, by the GPU's name; those of a CPU or of toy sizes say nothing of one."""
    by_gpu = {whole.gpu: whole for whole in sorted(wholes, key=lambda w: w.date) if whole.gpu and not whole.quick}
    return [by_gpu[gpu] for gpu in sorted(by_gpu)]


def _row(network: Figures, c: Figures) -> tuple[str, ...]:
    head = f"{network['title']}, {network['shape']}", c["name"]
    if "ms" not in c:
        return (*head, f"{c['status']}: {c['remark']}", "", "", "", "")
    if not all(math.isfinite(number) for number in (c["ms"]["median"], c["items_s"], c["peak"] or 0)):
        raise ValueError(f"a figure of {c['name']} is not finite")
    ratios = [(c["ratio"].get(tag) or {}).get("value") for tag in (EXACT, COMPILED)]
    peak = "–" if c["peak"] is None else f"{c['peak'] / 2**30:.1f}"
    return (*head, digits(c["ms"]["median"]), *(f"{ratio:.2f}" if ratio else "–" for ratio in ratios),
            f"{digits(c['items_s'])} {network['unit']}", peak)  # fmt: skip
