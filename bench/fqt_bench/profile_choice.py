"""Which candidates of a result are furthest from what was predicted of them: those that are worth a profile.

The share of a candidate is what was measured over what was predicted, in a run of its own: its rate over the predicted one
("930 (measured)", of a product: waves of tiles and launches are counted), its ratio to the baseline (bf16, or the copy) over
the predicted one ("1.31×", of layers and quantization), the predicted time over its own ("0.120 ms", of BHQ's stages).

Only fqt's own are looked at, and of those with the same tag in a case the one that dispatch selects, else the fastest:
configurations that nobody would use are slow by design. Without a prediction, and where the host was too slow to launch it,
a candidate is left out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .products import DISPATCHED

_PREDICTED = re.compile(r"([0-9.]+)(×| ms| GB/s)? ?(?:\((?:measured|datasheet|tuned)\))?")


class Reach(NamedTuple):
    """A candidate of a case. share: measured over predicted, below 1 is slower. why: both in words."""

    suite: str
    shape: str
    name: str
    share: float
    why: str


def slowest(result: dict[str, Any], top: int) -> list[Reach]:
    """At most `top`: first the furthest of each kind of case, then the furthest of the rest."""
    found = sorted((r for case in result["cases"] for r in reaches(case)), key=lambda r: r.share)
    first = {r.suite: r for r in reversed(found)}
    ordered = sorted(first.values(), key=lambda r: r.share)
    return [*ordered, *(r for r in found if r is not first[r.suite])][:top]


def reaches(case: dict[str, Any]) -> list[Reach]:
    """The candidates of a case that are looked at."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for c in case["candidates"]:
        if c["ours"] and c["status"] == "ok" and c["prediction"]:
            groups.setdefault(c["tag"] or c["name"], []).append(c)
    found = []
    for group in groups.values():
        c = min(group, key=lambda c: (DISPATCHED not in c["name"], c["ms"]["median"]))
        share = None if c["starved"] > c["ms"]["n"] / 2 else _share(c)
        if share is not None:
            found.append(Reach(case["suite"], case["shape"], c["name"], *share))
    return found


def _share(c: dict[str, Any]) -> tuple[float, str] | None:
    """(measured over predicted, in words), None where the two cannot be compared."""
    match = _PREDICTED.fullmatch(c["prediction"].strip())
    if match is None or not float(match[1]):
        return None
    predicted, unit = float(match[1]), (match[2] or "").strip()
    measured = {"×": c.get("ratio", {}).get("value"), "ms": c["ms"]["median"], "GB/s": c["gb_s"], "": c["tops"]}[unit]
    if not measured:
        return None
    share = predicted / measured if unit == "ms" else measured / predicted
    return share, f"{measured:.4g}{'' if unit == '×' else ' '}{unit or 'TOPS'} of {c['prediction']} predicted"
