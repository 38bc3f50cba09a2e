"""What the results say, apart from how it is written down: pure functions of runs, for the tables and the plots alike.

Of each machine a case is taken from the newest run that has it. Nothing is computed from a candidate that is not "ok".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fqt import cost
from fqt.recipe import Recipe

from .reading import Run
from .targets import BF16, GEMM, LINEAR, OWN_INT8, OWN_LAYER, TARGETS

PAIRS = {GEMM: (OWN_INT8, BF16), LINEAR: (OWN_LAYER, BF16)}  # suite: tags of int8, and of bf16
TITLES = {GEMM: "products", LINEAR: "layers, forward and backward"}
FORMATS = ("int8", "bf16", "fp8")
_FORMAT_OF = {"_int_mm": "int8", "torchao": "int8", "psq8": "int8", **dict.fromkeys((*OWN_INT8, *OWN_LAYER), "int8"),
              **dict.fromkeys(BF16, "bf16"), "fp8": "fp8", "_scaled_mm fp8": "fp8", "torchao fp8": "fp8",
              "_int_mm compiled": "int8"}  # fmt: skip
NOT_MEASURED = "not measured"


class Measured(NamedTuple):
    """A case, and the run that it was measured in."""

    run: Run
    case: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.case["suite"], self.case["shape"]


@dataclass(frozen=True)
class Machine:
    """The runs of one GPU, or of the CPU, oldest first."""

    name: str
    runs: tuple[Run, ...]

    @property
    def is_gpu(self) -> bool:
        return self.runs[-1].gpu is not None

    def cases(self) -> list[Measured]:
        """The newest of each suite and shape, of those with a figure if there are any: suites in the order of the runs,
        shapes by size."""
        newest: dict[tuple[str, str], Measured] = {}
        for run, case in ((each, case) for each in self.runs for case in each.result["cases"]):
            key = case["suite"], case["shape"]
            if key not in newest or _has_figures(case) or not _has_figures(newest[key].case):
                newest[key] = Measured(run, case)
        suites = list(dict.fromkeys(suite for suite, _ in newest))
        return [newest[key] for key in sorted(newest, key=lambda key: (suites.index(key[0]), sizes(key[1]), key[1]))]

    def newest(self, key: str) -> Run | None:
        """The newest run in which this field of the result is not empty."""
        return next((run for run in reversed(self.runs) if run.result[key]), None)


def _has_figures(case: dict[str, Any]) -> bool:
    return any(candidate["status"] == "ok" for candidate in case["candidates"])


def machines(runs: Iterable[Run]) -> list[Machine]:
    """GPUs by name, then the CPU."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.machine, []).append(run)
    found = [Machine(name, tuple(of)) for name, of in by_name.items()]
    return sorted(found, key=lambda machine: (not machine.is_gpu, machine.name))


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x")) if shape else ()


# ---- candidates


def is_ok(candidate: dict[str, Any]) -> bool:
    return candidate["status"] == "ok"


def rate(case: dict[str, Any], candidate: dict[str, Any]) -> float | None:
    """In `rate_unit`; None where there is none."""
    return candidate.get("gb_s" if rate_unit(case) == "GB/s" else "tops") if is_ok(candidate) else None


def rate_unit(case: dict[str, Any]) -> str:
    """The case's unit; of a case that goes by time, that of the bytes it moves."""
    return "GB/s" if case["unit"] == "ms" else case["unit"]


def ratio(candidate: dict[str, Any]) -> tuple[float, float, float] | None:
    """(value, low, high) against the case's baseline."""
    found = candidate.get("ratio") if is_ok(candidate) else None
    return None if found is None else (found["value"], found["low"], found["high"])


def format_of(candidate: dict[str, Any]) -> str | None:
    """The numbers that a product multiplies, by the candidate's tag; None of any others."""
    format = _FORMAT_OF.get(candidate["tag"])
    return None if format == "bf16" and "bf16" not in candidate["name"] else format  # a CPU's baseline is float32


def is_host_bound(candidate: dict[str, Any]) -> bool:
    return is_ok(candidate) and candidate["starved"] > candidate["ms"]["n"] / 2


class Problem(NamedTuple):
    """Something that is not "ok"."""

    run: Run
    suite: str
    shape: str
    name: str
    status: str
    remark: str


def problems(machine: Machine) -> list[Problem]:
    """Every candidate, repetition or case that was skipped, wrong or failed, and that no newer run has in order."""
    found = [Problem(run, *key, c["name"], c["status"], c["remark"])
             for run, case in machine.cases() for key in [(case["suite"], case["shape"])]
             for c in case["candidates"] if not is_ok(c)]  # fmt: skip
    repeats = {(r["suite"], r["shape"], r["name"]): (run, r) for run in machine.runs for r in run.result["repeats"]}
    found += [Problem(run, "repeat", r["shape"], r["name"], r["status"], r["remark"])
              for run, r in repeats.values() if not is_ok(r)]  # fmt: skip
    done = {m.key: machine.runs.index(m.run) for m in machine.cases()}
    skipped = {
        (s["suite"], s["shape"]): (i, run, s) for i, run in enumerate(machine.runs) for s in run.result["skipped"]
    }
    found += [Problem(run, *key, "", s["status"], s["remark"])
              for key, (i, run, s) in skipped.items() if done.get(key, -1) < i]  # fmt: skip
    return sorted(found, key=lambda p: ("wrong", "error", "skip").index(p.status))


# ---- targets


class Verdict(NamedTuple):
    """A row of `fqt_bench.targets`: as text, "" or "not measured" where there is no value, and why. run: None there."""

    name: str
    what: str
    bound: str
    predicted: str
    value: str
    verdict: str
    why: str
    run: Run | None


def verdicts(machine: Machine | None) -> list[Verdict]:
    """Each target in the newest run of a GPU that measured it; else what the newest that gives a reason says of it. The
    CPU, or None, measures none of them."""
    runs = tuple(reversed(machine.runs)) if machine and machine.is_gpu else ()
    found = []
    for target in TARGETS:
        judged = [Verdict(*target.judged(run.result), run) for run in runs]
        without = [v._replace(run=None) for v in judged if v.why] + [Verdict(*target.judged(NOTHING), None)]
        found.append(next((v for v in judged if v.verdict != NOT_MEASURED), without[0]))
    return found


NOTHING: dict[str, Any] = {
    "environment": {"device": "cpu"}, "cases": [], "memory": [], "repeats": [], "launches": [], "skipped": [],
    "counters": {},
}  # fmt: skip


class Trend(NamedTuple):
    """A ratio of the targets over the runs that have it, oldest first; at_most: it is to be at most the bound."""

    what: str
    bound: float
    at_most: bool
    points: tuple[tuple[Run, float], ...]


def trends(machine: Machine) -> list[Trend]:
    """The ratios among the targets that at least two runs of a GPU have."""
    found = []
    for target in (t for t in TARGETS if t.unit == "×" and machine.is_gpu):
        values = ((run, target.measure(run.result)) for run in machine.runs)
        points = tuple((run, value) for run, value in values if value is not None)
        if len(points) > 1:
            found.append(Trend(f"{target.name} {target.what}", target.bound, target.at_most, points))
    return found


# ---- roofline


class Point(NamedTuple):
    """A product or a layer: operations per byte that has to move, and 10¹² operations a second."""

    measured: Measured
    candidate: dict[str, Any]
    intensity: float
    tops: float

    @property
    def format(self) -> str | None:
        return format_of(self.candidate)


def points(machine: Machine) -> list[Point]:
    """Of each candidate with a rate in operations and a known least traffic."""
    return [Point(m, c, x, c["tops"]) for m in machine.cases() for c in m.case["candidates"]
            if is_ok(c) and c["tops"] for x in [_intensity(m.case, c)] if x is not None]  # fmt: skip


def _intensity(case: dict[str, Any], candidate: dict[str, Any]) -> float | None:
    """Operations per byte. Of a layer: X, W and dY read once, Y, dX and dW written once, all in bf16."""
    if candidate["gb_s"]:
        return 1e3 * candidate["tops"] / candidate["gb_s"]
    size = sizes(case["shape"])
    if case["suite"] != LINEAR or len(size) != 3:
        return None
    m, n, k = size
    return 6 * m * n * k / (2 * 2 * (m * k + n * k + m * n))


def ceilings(machine: Machine) -> cost.Ceilings | None:
    """Those that the newest run measured, else what `fqt.cost` knows of the GPU; None of the CPU and of an unknown GPU."""
    if not machine.is_gpu:
        return None
    run = machine.newest("ceilings")
    e = (run or machine.runs[-1]).result["environment"]
    arch, processors = (
        ("gfx", 0) if e["hip"] else (f"sm{(e['capability'] or '').replace('.', '')}", e["processors"] or 0)
    )
    if run is not None:
        rates = [run.result["ceilings"][name] for name in ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")]
        return cost.Ceilings(*rates, "measured", machine.name, arch, processors)
    try:
        return cost.named(machine.name, arch, processors)
    except cost.NotModelled:
        return None


def predictor(machine: Machine) -> cost.Ceilings | None:
    """What `fqt.cost` predicts with on this GPU: the constants that were measured for it if there are, else `ceilings`."""
    known = ceilings(machine)
    if known is None:
        return None
    try:
        named = cost.named(machine.name, known.arch, known.processors)
    except cost.NotModelled:
        return known
    return named if named.source == "measured" else known


def peak(ceiling: cost.Ceilings, format: str) -> float | None:
    """10¹² operations a second of products of a format."""
    return {"int8": ceiling.int8_tops, "bf16": ceiling.bf16_tflops, "fp8": ceiling.fp8_tflops}[format]


def roof(ceiling: cost.Ceilings, point: Point) -> float | None:
    """What the ceilings allow at the point's intensity."""
    top = peak(ceiling, point.format) if point.format else None
    return None if top is None else min(top, point.intensity * ceiling.tb_s)


# ---- where int8 pays

Weight = tuple[int, int]  # N, K


@dataclass(frozen=True)
class Grid:
    """int8 over bf16 by M and by (N, K), above 1 where int8 is faster: the fastest of fqt's int8 candidates over the fastest
    bf16 one of the same case. What is not in `cells` was not measured."""

    ms: tuple[int, ...]
    weights: tuple[Weight, ...]
    cells: dict[tuple[int, Weight], float]
    predicted: dict[tuple[int, Weight], float] = field(default_factory=dict)
    source: str = ""  # of the predictions' ceilings


class Crossing(NamedTuple):
    """Between two measured values of M, next to each other among those of this (N, K), int8 begins or ceases to pay."""

    weight: Weight
    below: int
    above: int
    begins: bool


def grid(machine: Machine, suite: str) -> Grid | None:
    """None where no case of the suite has both."""
    cells = {}
    for _, case in machine.cases():
        size = sizes(case["shape"])
        value = int8_over_bf16(case) if case["suite"] == suite and len(size) == 3 else None
        if value is not None:
            cells[size[0], size[1:]] = value
    if not cells:
        return None
    ms = tuple(sorted({m for m, _ in cells}))
    weights = tuple(sorted({weight for _, weight in cells}, key=lambda w: (w[0] * w[1], w)))
    ceiling = predictor(machine)
    predicted = _predictions(suite, ms, weights, ceiling) if ceiling else {}
    return Grid(ms, weights, cells, predicted, ceiling.source if ceiling and predicted else "")


def int8_over_bf16(case: dict[str, Any]) -> float | None:
    """The times' ratio; candidates of a case do the same work."""
    ours, theirs = (_least(case, tags) for tags in PAIRS[case["suite"]])
    return None if ours is None or theirs is None else theirs / ours


def _least(case: dict[str, Any], tags: Sequence[str]) -> float | None:
    found = (c for c in case["candidates"] if is_ok(c) and c["tag"] in tags and format_of(c))
    return min((c["ms"]["median"] for c in found), default=None)


def _predictions(
    suite: str, ms: Sequence[int], weights: Sequence[Weight], ceiling: cost.Ceilings
) -> dict[tuple[int, Weight], float]:
    found = {}
    for m in ms:
        for n, k in weights:
            try:
                if suite == GEMM:
                    one = cost.product("gemm", (m, n, k), ceiling.int8_tops, ceiling)
                    found[m, (n, k)] = one.bf16_ms / one.ms
                else:
                    found[m, (n, k)] = cost.linear(m, n, k, Recipe.parse("int8"), ceiling).ratio
            except cost.NotModelled:
                continue
    return found


def crossings(grid: Grid) -> list[Crossing]:
    """The frontier, ratio 1, along M. Cells between `below` and `above` are not measured."""
    found = []
    for weight in grid.weights:
        known = [m for m in grid.ms if (m, weight) in grid.cells]
        for below, above in itertools.pairwise(known):
            pays = [grid.cells[m, weight] >= 1 for m in (below, above)]
            if pays[0] != pays[1]:
                found.append(Crossing(weight, below, above, pays[1]))
    return found


def borders(grid: Grid) -> Iterator[tuple[tuple[float, float], tuple[float, float], bool]]:
    """The frontier where cell (i, j), of ms[i] and weights[j], is the unit square around (i, j): segments, and whether each
    is exact. An exact one lies between two cells that touch; one that is not is an end of a gap that the frontier is in."""
    for weight, below, above, _ in crossings(grid):
        j, i, stop = grid.weights.index(weight), grid.ms.index(below), grid.ms.index(above)
        for x in sorted({i + 0.5, stop - 0.5}):
            yield (x, j - 0.5), (x, j + 0.5), stop == i + 1
    for i, m in enumerate(grid.ms):
        for j, pair in enumerate(itertools.pairwise(grid.weights)):
            values = [grid.cells.get((m, weight), math.nan) for weight in pair]
            if not math.isnan(sum(values)) and (values[0] >= 1) != (values[1] >= 1):
                yield (i - 0.5, j + 0.5), (i + 0.5, j + 0.5), True
