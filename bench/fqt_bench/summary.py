"""What a comparison found: as markdown for a job's summary page, and as a document in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .compare import SCHEMA, Comparison
from .counters import Change
from .gate import Timing

ROWS = 60  # of a table: the document has all
_VERDICT = {
    "regression": "**slower**",
    "improvement": "faster",
    "same": "same",
    "not confirmed": "same (not confirmed)",
    "unknown": "not judged: its noise could not be measured",
}


def document(c: Comparison) -> dict[str, Any]:
    """Everything, in types that JSON has."""
    counters = timings = None
    if c.counters is not None:
        before, after, changes = c.counters
        counters = {
            "of": after.of,
            "base": before.entries,
            "head": after.entries,
            "changes": [dataclasses.asdict(change) for change in changes],
            "unknown": {"base": before.unknown, "head": after.unknown},
            "failed": {"base": before.failed, "head": after.failed},
        }
    if c.timings is not None:
        timings = [_timing(t) for t in c.timings]
    return {
        "schema": SCHEMA,
        "date": c.date,
        "base": {"name": c.base.name, "digest": c.base.digest},
        "head": {"name": c.head.name, "digest": c.head.digest},
        "regressions": c.regressions,
        "counters": counters,
        "timings": timings,
        "environment": c.environment,
    }


def _timing(t: Timing) -> dict[str, Any]:
    again = t.confirmation
    return {
        "name": t.name,
        "status": t.status,
        "threshold": t.threshold,
        "stored": t.stored,
        "log_ratio": t.first.log_ratio if t.first.timed else None,
        "confirmation": again.log_ratio if again is not None and again.timed else None,
        "rounds_ns": {"base": t.first.base, "head": t.first.head},
        "unknown": t.first.unknown,
        "failed": t.first.failed,
    }


def markdown(c: Comparison) -> str:
    count = len(c.regressions)
    same = " (the sources are identical)" if c.base.digest == c.head.digest else ""
    lines = [f"# fqt: `{c.base.name}` → `{c.head.name}`{same}", ""]
    lines += [f"**{count} regression{'s' * (count > 1)}**" if count else "No regression."]
    if lost := _lost(c):
        lines[-1] += f" **Not compared: {lost} kernels or steps that base has and head has not** (listed below)."
    lines += [f"- {_escaped(line)}" for line in c.regressions[:ROWS]] + _rest(c.regressions)
    if c.counters is not None:
        lines += ["", *_counters(c)]
    if c.timings:
        lines += ["", *_timings(c.timings)]
    return "\n".join(lines)


def _lost(c: Comparison) -> int:
    """Counters of base that nothing of head is held against: a kernel that was renamed, a launch that head refuses."""
    return len(c.counters[0].entries.keys() - c.counters[1].entries.keys()) if c.counters is not None else 0


def _counters(c: Comparison) -> list[str]:
    before, after, changes = c.counters
    both = before.entries.keys() & after.entries.keys()
    arches = ", ".join(after.of.get("arches") or before.of.get("arches") or ["no kernel"])
    lines = [f"## Counters: {len(both)} kernels and steps ({arches}, Triton {after.of.get('triton')})", ""]
    shown = [change for change in changes if change.kind != "described"] or changes
    widths = {change.name for change in shown}
    shown = [change for change in changes if change.name in widths]
    rows = [(d.name, d.counter, d.base, d.head, _grown(d), _KIND[d.kind]) for d in shown[:ROWS]]
    lines += _table(("kernel or step", "counter", "base", "head", "change", ""), rows) if rows else ["Nothing changed."]
    lines += _rest(shown)
    for title, names in (
        ("Only in head", [n for n in after.entries if n not in both]),
        ("Only in base", [n for n in before.entries if n not in both]),
        ("Not known in base", _reasons(before.unknown)),
        ("Not known in head", _reasons(after.unknown)),
        ("Failed in base", _reasons(before.failed)),
        ("Failed in head", _reasons(after.failed)),
    ):
        if names:
            lines += ["", f"{title}:", *(f"- {_escaped(name)}" for name in names[:ROWS]), *_rest(names)]
    return lines


_KIND = {"regression": "**more**", "tolerated": "within the tolerance", "improvement": "less", "described": ""}


def _grown(change: Change) -> str:
    return "new" if change.percent is None else f"{change.percent:+.1f} %"


def _timings(timings: Sequence[Timing]) -> list[str]:
    rows = []
    for t in timings:
        if not t.first.timed:
            reasons = {**t.first.unknown, **t.first.failed}
            verdict = f"{t.status} in " + "; ".join(f"{side}: {reason}" for side, reason in reasons.items())
            rows.append((t.name, "", "", "", "", verdict))
            continue
        again = t.confirmation.log_ratio if t.confirmation is not None and t.confirmation.timed else None
        ratio = f"{math.exp(t.first.log_ratio):.3f}" + ("" if again is None else f", again {math.exp(again):.3f}")
        verdict = _VERDICT.get(t.status, "**failed when measured again**")
        times = (f"{min(side) / 1e6:.3f}" for side in (t.first.base, t.first.head))
        rows.append((t.name, *times, ratio, f"{100 * math.expm1(t.threshold):.1f} %", verdict))
    stored = min((t.stored for t in timings if t.first.timed), default=0)
    return [
        "## Timings",
        "",
        *_table(("case", "base ms", "head ms", "head / base", "threshold", ""), rows),
        "",
        "Least time of a call, fresh processes of both by turns. The thresholds come from at least "
        f"{stored} stored comparisons of identical code on this machine; what exceeds one is measured again.",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_escaped(str(cell)) for cell in line)} |" for line in lines]


def _reasons(found: dict[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in found.items()]


def _rest(rows: Sequence[object]) -> list[str]:
    return ["", f"… and {len(rows) - ROWS} more."] if len(rows) > ROWS else []


def _escaped(text: str) -> str:
    """One line of text in which markdown's tables and emphasis see nothing of their own."""
    text = text.replace("\n", " ").replace("|", "\\|")
    return text if text.startswith("**") else text.replace("_", "\\_")
