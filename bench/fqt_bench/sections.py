"""The report as sections of text, tables and figures, the same for markdown and HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fqt.suites import CONVOLUTIONS

from . import convs, facts, householder, wholes
from .facts import NOT_MEASURED, Grid, Machine, Measured
from .reading import Run
from .stats import of_the_copy
from .targets import GEMM, LINEAR
from .wholes import Whole

MANY = 4  # so many open tables of a suite, and no more
NO_GPU = (
    "GPU: not measured. No result here comes from a GPU, so each figure of one is missing; those of the CPU say CPU."
)


class Mark(str):
    """A verdict or a status: a word that stands out."""


@dataclass(frozen=True)
class Text:
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Tiles:
    """Counts with what they count."""

    title: str
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """right: the columns of numbers. folded: closed until it is asked for."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """The figure that `plots.<kind>_figure(*data, ident, …)` draws."""

    kind: str
    caption: str
    data: tuple[Any, ...]
    label: str  # what a screen reader says of it


Block = Text | Heading | Tiles | Table | Figure


@dataclass(frozen=True)
class Section:
    """bulky: the first to be left out where space is short."""

    title: str
    blocks: tuple[Block, ...]
    bulky: bool = False


def document(
    runs: Sequence[Run], refused: Sequence[tuple[str, str]] = (), trained: Sequence[Whole] = ()
) -> list[Section]:
    """runs: at least one. refused: (file, reason). trained: results of whole training steps, those of a GPU count."""
    machines = facts.machines(runs)
    number = {id(run): str(i) for i, run in enumerate(runs, 1)}
    found = [
        Section("Summary", tuple(_summary(machines, refused))),
        Section("Measured on", (_runs(runs),)),
        Section("Targets", tuple(_targets(machines, number))),
        Section("Skipped, wrong and failed", tuple(_problems(machines, number))),
        Section("Ratio to the baseline", tuple(_cases(machines, number))),
        Section("Roofline", tuple(_roofline(machines))),
        Section("Where int8 pays", tuple(_frontier(machines))),
        Section("Whole training steps", tuple(_trained(trained))),
        Section("Trend", tuple(_trend(machines))),
        Section("Memory, launches and repetition", tuple(_steps(machines, number))),
        Section("Counters", tuple(_counters(machines)), bulky=True),
        Section("Method", tuple(_method(runs))),
    ]
    return [section for section in found if section.blocks]


def _summary(machines: Sequence[Machine], refused: Sequence[tuple[str, str]]) -> Iterator[Block]:
    gpus = [machine for machine in machines if machine.is_gpu]
    if not gpus:
        yield Text(NO_GPU, warning=True)
    for machine in gpus or [None]:
        count = Counter(v.verdict for v in facts.verdicts(machine))
        name = machine.name if machine else "GPU: not measured"
        yield Tiles(
            f"Targets, {name}", tuple((str(count[verdict]), verdict) for verdict in ("met", "missed", NOT_MEASURED))
        )
    for machine in machines:
        count = Counter(c["status"] for _, case in machine.cases() for c in case["candidates"])
        titles = (("ok", "measured"), ("skip", "skipped"), ("wrong", "wrong"), ("error", "failed"))
        if count:
            yield Tiles(f"Candidates, {machine.name}", tuple((str(count[status]), title) for status, title in titles))
    if refused:
        yield Table("Files that were refused", ("file", "reason"), tuple(refused))


def _runs(runs: Sequence[Run]) -> Table:
    header = ("run", "device", "date, UTC", "commit", "driver", "PyTorch", "Triton", "CUDA or HIP", "Python", "suites")
    rows = tuple((str(i), *_run(run)) for i, run in enumerate(runs, 1))
    return Table("The runs, oldest first", (*header, "file"), rows, right=(0,))


def _run(run: Run) -> tuple[str, ...]:
    e = run.result["environment"]
    device = f"{run.machine}, capability {e['capability']}" if e["capability"] else run.machine
    versions = (e["driver"], e["torch"], e["triton"], e["cuda"] or e["hip"], e["python"])
    date = run.date[:16].replace("T", " ")
    return device, date, run.commit, *(v or "–" for v in versions), ", ".join(run.result["suites"]), run.file


def _targets(machines: Sequence[Machine], number: dict[int, str]) -> Iterator[Block]:
    yield Text("Each is a figure of one run on a GPU, set for an H100; the fastest candidate of each kind counts.")
    for machine in [m for m in machines if m.is_gpu] or [None]:
        rows = ((v.name, v.what, Mark(v.verdict), v.value or "–", v.bound, v.predicted or "–", v.why or "–",
                 number[id(v.run)] if v.run else "–") for v in facts.verdicts(machine))  # fmt: skip
        header = ("target", "figure", "verdict", "measured", "bound", "predicted", "why not", "run")
        yield Table(machine.name if machine else "GPU: not measured", header, tuple(rows), right=(3, 4, 5, 7))


def _problems(machines: Sequence[Machine], number: dict[int, str]) -> Iterator[Block]:
    """A row for all shapes that have the same to say."""
    for machine in machines:
        shapes: dict[tuple[str, ...], list[str]] = {}
        for p in facts.problems(machine):
            row = (Mark(p.status), p.suite, p.name or "the whole case", p.remark or "–", number[id(p.run)])
            shapes.setdefault(row, []).append(p.shape or "–")
        rows = tuple((*row[:-1], ", ".join(found), row[-1]) for row, found in shapes.items())
        header = ("status", "suite", "candidate", "remark", "shapes", "run")
        if rows:
            yield Table(machine.name, header, rows, right=(5,))
        else:
            yield Text(f"{machine.name}: nothing was skipped, wrong or failed.")


# ---- cases


def _cases(machines: Sequence[Machine], number: dict[int, str]) -> Iterator[Block]:
    yield Text(
        "The rate of a candidate over that of the case's baseline, in the same run, with its 95 % confidence interval: "
        "above 1 is faster. Circles are fqt's own, diamonds are others'. On a GPU products and layers have a bf16 baseline."
    )
    if not any(machine.is_gpu for machine in machines):
        yield Text("Ratios on a GPU: not measured.", warning=True)
    for machine in machines:
        by_suite: dict[str, list[Measured]] = {}
        for m in machine.cases():
            by_suite.setdefault(m.case["suite"], []).append(m)
        for suite, found in by_suite.items():
            yield Heading(f"{suite}, {machine.name}")
            yield from (
                _ratio(m.case) for m in found if sum(facts.ratio(c) is not None for c in m.case["candidates"]) > 1
            )
            yield from (_case(m, number, folded=len(found) > MANY) for m in found)
            if suite.startswith(householder.SUITE):
                yield from _break_even(found)


def _ratio(case: dict[str, Any]) -> Figure:
    ratios = {c["name"]: r[0] for c in case["candidates"] if (r := facts.ratio(c))}
    missing = Counter(c["status"] for c in case["candidates"] if facts.ratio(c) is None)
    without = ", ".join(f"{n} {'without a ratio' if status == 'ok' else status}" for status, n in missing.items())
    ends = (f"{name} {ratios[name]:.2f}" for name in (max(ratios, key=ratios.get), min(ratios, key=ratios.get)))
    label = f"Ratio to {case['baseline']} of {len(ratios)} candidates, from {' down to '.join(ends)}"
    return Figure("ratio", f"{_shape(case)}{f' (not drawn: {without})' if without else ''}", (case,), label)


def _shape(case: dict[str, Any]) -> str:
    return case["shape"].replace("x", " × ") or case["suite"]


def _case(m: Measured, number: dict[int, str], folded: bool) -> Table:
    rated = any(facts.rate(m.case, c) is not None for c in m.case["candidates"])
    expected = any(c["prediction"] for c in m.case["candidates"])
    shares = of_the_copy(m.case)
    launches = {r["name"]: str(r["kernels"]) for r in m.run.result["launches"] if r["shape"] == m.case["shape"]}
    counted = bool(shares and launches)
    columns = [
        ("candidate", lambda c: c["name"]),
        ("status", lambda c: Mark(c["status"])),
        ("ratio (95 %)", lambda c: _interval(facts.ratio(c))),
        *([(facts.rate_unit(m.case), lambda c: _number(facts.rate(m.case, c)))] if rated else []),
        *(
            [("of the copy", lambda c: f"{100 * shares[c['name']]:.1f} %" if c["name"] in shares else "–")]
            if shares
            else []
        ),
        *([("launches", lambda c: launches.get(c["name"], "–"))] if counted else []),
        ("ms, median", lambda c: _times(c)[0]),
        ("p10 to p90", lambda c: _times(c)[1]),
        *([("predicted", lambda c: c["prediction"] or "–")] if expected else []),
        ("provider", lambda c: c["provider"]),
        ("remark", _remark),
    ]
    header = tuple(title for title, _ in columns)
    rows = tuple(tuple(of(c) for _, of in columns) for c in m.case["candidates"])
    caption = f"{_shape(m.case)}: against {m.case['baseline']}, run {number[id(m.run)]}, {m.case['rounds']} rounds"
    return Table(caption, header, rows, tuple(range(2, 5 + rated + bool(shares) + counted)), folded)


def _break_even(found: Sequence[Measured]) -> Iterator[Table]:
    rows = tuple((_shape(m.case), *row.cells()) for m in found for row in householder.break_evens(m.case))
    if rows:
        yield Table("BHQ against PSQ; K by the measured pieces, rows and outputs fixed",
                    ("shape", *householder.BREAK_EVEN_HEADER), rows, right=(2, 3, 4))  # fmt: skip


def _remark(candidate: dict[str, Any]) -> str:
    host = f"host-bound: {candidate['host_ms']:.3f} ms to launch" if facts.is_host_bound(candidate) else ""
    return "; ".join(filter(None, (host, candidate["remark"]))) or "–"


def _times(candidate: dict[str, Any]) -> tuple[str, str]:
    if not facts.is_ok(candidate):
        return "–", "–"
    ms = candidate["ms"]
    return _number(ms["median"], 4), f"{_number(ms['p10'], 4)} to {_number(ms['p90'], 4)}"


def _number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, all digits before the point; "–" for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def _interval(ratio: tuple[float, float, float] | None) -> str:
    return "–" if ratio is None else "{} ({} to {})".format(*map(_number, ratio))


# ---- roofline, frontier, trend


def _roofline(machines: Sequence[Machine]) -> Iterator[Block]:
    if not any(machine.is_gpu and facts.points(machine) for machine in machines):
        yield Text("Roofline of a GPU: not measured.", warning=True)
    for machine in machines:
        points, ceilings = facts.points(machine), facts.ceilings(machine)
        if not points:
            continue
        yield Heading(machine.name)
        yield Text(f"{_ceilings(ceilings)}.")
        for suite in dict.fromkeys(p.measured.case["suite"] for p in points):
            some = [p for p in points if p.measured.case["suite"] == suite]
            label = f"Roofline, {suite}, {machine.name}: {len(some)} candidates. {_ceilings(ceilings)}"
            yield Figure("roofline", suite, (some, ceilings), label)
        header = ("suite", "shape", "candidate", "ops/byte", "10¹² ops/s", "of the ceiling")
        rows = tuple(_point(p, facts.roof(ceilings, p) if ceilings else None) for p in points)
        yield Table(f"Points of the roofline, {machine.name}", header, rows, right=(3, 4, 5), folded=True)


def _ceilings(ceilings: Any) -> str:
    if ceilings is None:
        return "Ceilings: not measured, and none known of this device"
    kind = "measured" if ceilings.source == "measured" else "expected shares of the datasheet's peaks"
    return f"Ceilings, {kind}: {str(ceilings).partition(': ')[2]}"


def _point(p: facts.Point, roof: float | None) -> tuple[str, ...]:
    case = p.measured.case
    share = "–" if roof is None else f"{100 * p.tops / roof:.0f} %"
    return case["suite"], case["shape"], p.candidate["name"], _number(p.intensity), _number(p.tops), share


def _frontier(machines: Sequence[Machine]) -> Iterator[Block]:
    yield Text(
        "Time of the fastest bf16 candidate over that of fqt's fastest int8 candidate, same run, by M (tokens) and "
        "N, K (of the weight). Above 1 int8 is faster; the frontier is drawn between measured cells alone."
    )
    for suite in (GEMM, LINEAR):
        grids = [(machine, grid) for machine in machines if machine.is_gpu and (grid := facts.grid(machine, suite))]
        if not grids:
            yield Text(f"Int8 over bf16, {facts.TITLES[suite]}, on a GPU: not measured.", warning=True)
        for machine, grid in grids:
            yield Heading(f"{facts.TITLES[suite].capitalize()}, {machine.name}")
            yield from _grid(machine, suite, grid)
    for network in CONVOLUTIONS:
        tables = [(machine, rows) for machine in machines if machine.is_gpu and
                  (rows := convs.rows(network, (case for _, case in machine.cases())))]  # fmt: skip
        if not tables:
            yield Text(f"Int8 over bf16, convolutions of {network}, on a GPU: not measured.", warning=True)
        for machine, rows in tables:
            caption = f"Convolutions of {network}, batch {rows[0].of.n}, forward and backward, {machine.name}"
            yield Table(caption, convs.HEADER, tuple(map(convs.cells, rows)), right=convs.RIGHT)


def _grid(machine: Machine, suite: str, grid: Grid) -> Iterator[Block]:
    title = f"{facts.TITLES[suite]}, {machine.name}"
    label = f"Int8 over bf16 of {title}: {len(grid.cells)} of {len(grid.ms) * len(grid.weights)} cells measured"
    yield Figure("heat", "Measured", (grid, False), label)
    predicted = f"Predicted ({'datasheet' if grid.source == 'datasheet' else 'from measured ceilings'})"
    if grid.predicted:
        yield Figure("heat", f"{predicted}, no measurement", (grid, True),
                     f"Prediction of int8 over bf16 by the cost model, {title}")  # fmt: skip
    crossings = facts.crossings(grid)
    words = (f"N {c.weight[0]}, K {c.weight[1]}: {'begins' if c.begins else 'ceases'} to pay between M {c.below} and "
             f"M {c.above}" for c in crossings)  # fmt: skip
    pays = sum(value >= 1 for value in grid.cells.values())
    found = "; ".join(words) or "no frontier along M between the measured cells"
    yield Text(f"Int8 is at least as fast in {pays} of {len(grid.cells)} measured cells; {found}.")
    yield _grid_table(f"Measured int8 over bf16, {title}", grid, grid.cells, NOT_MEASURED)
    if grid.predicted:
        yield _grid_table(f"{predicted} int8 over bf16, {title}", grid, grid.predicted, "no prediction")
        yield _beside(f"Int8 over bf16, measured beside {predicted.lower()}, {title}", grid)


def _beside(caption: str, grid: Grid) -> Table:
    """Every measured cell that has a prediction: those on the other side of 1 first, then the furthest off."""
    cells = [(m, weight, value, grid.predicted[m, weight])
             for (m, weight), value in grid.cells.items() if (m, weight) in grid.predicted]  # fmt: skip
    cells.sort(key=lambda cell: ((cell[2] >= 1) == (cell[3] >= 1), -abs(math.log(cell[3] / cell[2]))))
    rows = tuple((str(m), f"{n} × {k}", _number(value), _number(predicted), f"{100 * (predicted / value - 1):+.0f} %",
                  "–" if (value >= 1) == (predicted >= 1) else "wrong side of 1")
                 for m, (n, k), value, predicted in cells)  # fmt: skip
    return Table(caption, ("M", "N × K", "measured", "predicted", "off by", ""), rows, right=(0, 2, 3, 4), folded=True)


def _grid_table(caption: str, grid: Grid, cells: dict[Any, float], missing: str) -> Table:
    rows = (
        (f"{n} × {k}", *(_number(cells[m, (n, k)]) if (m, (n, k)) in cells else missing for m in grid.ms))
        for n, k in grid.weights
    )
    header = ("N × K", *(f"M {m}" for m in grid.ms))
    return Table(caption, header, tuple(rows), right=tuple(range(1, len(header))), folded=True)


def _trained(trained: Sequence[Whole]) -> Iterator[Block]:
    newest = wholes.newest(trained)
    if not newest:
        yield Text("Whole training steps on a GPU: not measured.", warning=True)
    for whole in newest:
        yield Table(f"{whole.gpu}, {whole.versions}", wholes.HEADER, whole.rows, right=wholes.RIGHT)


def _trend(machines: Sequence[Machine]) -> Iterator[Block]:
    if not any(facts.trends(machine) for machine in machines):
        yield Text("Not measured: it takes two runs of one GPU with the same headline ratio.")
    for machine in machines:
        trends = facts.trends(machine)
        if trends:
            yield Heading(machine.name)
            yield Text("Runs, oldest first, evenly spaced; their drivers and versions may differ: see above.")
        for trend in trends:
            values = ", ".join(f"{value:.2f} ({run.date[:10]})" for run, value in trend.points)
            yield Figure("trend", trend.what, (trend,), f"{trend.what}: {values}")
        rows = ((t.what, run.date[:10], run.commit, f"{value:.3f}", f"{'≤' if t.at_most else '≥'} {t.bound:.2f}")
                for t in trends for run, value in t.points)  # fmt: skip
        if trends:
            yield Table(f"Headline ratios by run, {machine.name}", ("figure", "date", "commit", "ratio", "bound"),
                        tuple(rows), right=(3, 4), folded=True)  # fmt: skip


# ---- the rest


def _steps(machines: Sequence[Machine], number: dict[int, str]) -> Iterator[Block]:
    for machine in machines:
        if run := machine.newest("memory"):
            rows = [(r["name"], r["shape"], _mib(r["saved"]), _mib(r["peak"])) for r in run.result["memory"]]
            header = ("layer", "shape", "saved for backward, MiB", "peak, MiB")
            yield Table(f"Memory, {machine.name}, run {number[id(run)]}", header, tuple(rows), right=(2, 3))
        if run := machine.newest("launches"):
            rows = [(r["name"], r["shape"], str(r["kernels"]), str(r["copies"])) for r in run.result["launches"]]
            header = ("layer", "shape", "kernels", "copies or fills")
            yield Table(f"Launches of a step, {machine.name}, run {number[id(run)]}", header, tuple(rows), right=(2, 3))
        if run := machine.newest("repeats"):
            rows = [(r["suite"], r["shape"], r["name"], Mark(r["status"]), r["remark"] or "–")
                    for r in run.result["repeats"]]  # fmt: skip
            header = ("suite", "shape", "candidate", "status", "remark")
            yield Table(f"Repeated runs, {machine.name}, run {number[id(run)]}", header, tuple(rows), folded=True)


def _mib(size: int) -> str:
    return _number(size / 2**20, 4)


def _counters(machines: Sequence[Machine]) -> Iterator[Block]:
    """One table for the names that have the same counters."""
    for machine in machines:
        run = machine.newest("counters")
        if run is None:
            continue
        of = run.result["counters_of"] or {}
        compiled = f"Triton {of['triton'] or 'not installed'} for {', '.join(of['arches']) or 'no GPU'}" if of else ""
        yield Text(f"{machine.name}: {compiled or 'counters'}. Free of noise: they are the same on every run.")
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for name, counters in run.result["counters"].items():
            groups.setdefault(tuple(counters), []).append((name, *map(str, counters.values())))
        for header, rows in groups.items():
            yield Table(f"Counters: {', '.join(header)} ({len(rows)}), {machine.name}", ("of", *header), tuple(rows),
                        right=tuple(range(1, len(header) + 1)), folded=True)  # fmt: skip
    if not any(machine.newest("counters") for machine in machines):
        yield Text("Counters: not measured.")


def _method(runs: Iterable[Run]) -> Iterator[Block]:
    for method in dict.fromkeys(run.result["method"] for run in runs):
        yield Text(method)
    yield Text(
        "A candidate that is wrong, fails or is skipped has no figures. A prediction is of the cost model, from ceilings "
        "that it names; it is no measurement."
    )
