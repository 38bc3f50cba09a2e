"""The cost model held against what was measured on a GPU, shape by shape, and its constants fitted to that.

    python -m fqt_bench.calibrate RESULT.json ... [--out FILE.json] [--ceilings fqt/ceilings.json]

Results of `fqt bench --suite kernels layers` of one GPU; of a case in several the newest counts. Every product, quantization
and layer that `fqt.cost` has a prediction for is an observation; what was host-bound is shown and not fitted to.

The fit minimizes the mean of sqrt(1 + (e / 0.02)²) over the observations, e the logarithm of predicted over measured
time: beyond 2 % that grows like the error's size, so that a few shapes the model cannot describe do not bend it. Constants
about which the observations say nothing keep their values, with the reason. Beside the errors before and after stand those
of shapes that were left out of the fit. --ceilings adds the constants to that file, if shapes left out are predicted no
worse with them than before.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fqt import cost
from fqt.cli import MISTAKE, UsageError, table
from fqt.cost import Ceilings, NotModelled
from fqt.recipe import Recipe

from . import environment, facts
from .facts import Machine, is_host_bound, is_ok, sizes
from .products import DISPATCHED
from .reading import find, load
from .stats import speed_ups
from .targets import BF16, GEMM, LINEAR, OWN_INT8, QUANTIZE

KNEE = 0.02
RATES = ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")
CONSTANTS = (*RATES, *cost.FITTED)
LEAST = 3  # observations that tell a launch or the waves of bf16
LAUNCH_SHARE, NOT_FULL = 0.05, 0.9  # of the time, and of the processors', that count as telling
FINEST = 1e-5  # the last step of the search, of a constant's logarithm
SHOWN = 12  # of the observations that are most wrong


@dataclass(frozen=True)
class Observation:
    """A measured time, and what `fqt.cost` counts for it. products: (rate's name, shape, format) each; passes: (bytes,
    kernels)."""

    suite: str
    shape: str
    name: str
    ms: float
    host_bound: bool
    products: tuple[tuple[str, tuple[int, int, int], str], ...] = ()
    passes: tuple[tuple[float, int], ...] = ()
    copy: float = 0.0  # bytes

    def predicted(self, c: Ceilings) -> float:
        """In ms, by `fqt.cost`. Raises NotModelled."""
        total = cost.copied(self.copy, c) if self.copy else 0.0
        for rate, shape, format in self.products:
            one = cost.product("", shape, getattr(c, "int8_tops" if rate == "bf16_tflops" else rate), c, format)
            total += one.bf16_ms if rate == "bf16_tflops" else one.ms
        return total + sum(cost.quantized(size, kernels, c) for size, kernels in self.passes)


@dataclass(frozen=True)
class Decision:
    """Whether int8 is faster than bf16: their times' ratio as measured with its 95 % interval, and as predicted."""

    suite: str
    shape: str
    measured: float
    low: float
    high: float
    before: float | None
    after: float | None

    def verdict(self, predicted: float | None) -> str:
        if predicted is None:
            return "not modelled"
        if self.low <= 1 <= self.high:
            return "undecidable"
        return "right" if (predicted > 1) == (self.measured > 1) else "WRONG"


# ---- what was measured


def observations(machine: Machine, c: Ceilings) -> list[Observation]:
    """Of every case that `c` has a prediction for."""
    found = [o for m in machine.cases() for o in _of_case(m.case)]
    return [o for o in found if _modelled(o, c)]


def _modelled(o: Observation, c: Ceilings) -> bool:
    try:
        return o.predicted(c) > 0
    except (NotModelled, TypeError):  # no rate of float8
        return False


def _of_case(case: dict[str, Any]) -> list[Observation]:
    suite, size = case["suite"], sizes(case["shape"])
    make: dict[str, Callable[..., dict[str, Any] | None]] = {GEMM: _product, QUANTIZE: _quantization, LINEAR: _layer}
    found = []
    for c in case["candidates"]:
        work = make[suite](c, *size) if suite in make and is_ok(c) else None
        if work is not None:
            found.append(Observation(suite, case["shape"], c["name"], c["ms"]["median"], is_host_bound(c), **work))
    return found


def _product(c: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any] | None:
    if c["tag"] == "bf16":
        return {"products": (("bf16_tflops", (m, n, k), "int"),)}
    own = "int8_tops" if c["tag"] in OWN_INT8 else "fp8_tflops" if c["tag"] == "fp8" else ""
    if not own or DISPATCHED not in c["name"]:
        return None
    return {"products": ((own, (m, n, k), "int" if own == "int8_tops" else "e4m3"),)}


def _quantization(c: dict[str, Any], m: int, n: int) -> dict[str, Any] | None:
    if c["tag"] == "copy":
        return {"copy": 4.0 * m * n}
    if c["tag"] == "both nearest" and "dispatch" in c["name"]:
        size, kernels = cost.traffic(Recipe.int8())["X"]
    elif c["tag"].startswith("gradient "):
        size, kernels = cost.traffic(Recipe.parse(c["tag"].removeprefix("gradient ")))["dY"]
    else:
        return None
    return {"passes": ((float(size) * m * n, kernels),)}


def _layer(c: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any] | None:
    shapes = (m, n, k), (m, k, n), (n, k, m)
    if c["tag"] in BF16:
        return {"products": tuple(("bf16_tflops", shape, "int") for shape in shapes)}
    if c["tag"] not in ("int8", "psq8", "fp8"):
        return None
    recipe = Recipe.parse(c["tag"])
    rate = "int8_tops" if recipe.format == "int" else "fp8_tflops"
    elements = {"X": m * k, "W": n * k, "dY": m * n, "dX": m * k}
    passes = tuple((float(elements[name]) * size, kernels) for name, (size, kernels) in cost.traffic(recipe).items())
    return {"products": tuple((rate, shape, recipe.format) for shape in shapes), "passes": passes}


# ---- the fit


class Fit:
    """The model's times of observations as a function of the constants: `Observation.predicted`, all at once."""

    def __init__(self, found: Sequence[Observation], c: Ceilings) -> None:
        self.log_ms = _tensor([math.log(o.ms) for o in found])
        self.count = len(found)
        products = [(i, *p) for i, o in enumerate(found) for p in o.products]
        self.at = torch.tensor([i for i, *_ in products], dtype=torch.int64)
        self.rate = torch.tensor([RATES.index(rate) for _, rate, _, _ in products], dtype=torch.int64)
        self.work = _tensor([2e-9 * math.prod(shape) for _, _, shape, _ in products])
        full = [cost.fullness(shape, c, format) for _, _, shape, format in products]
        self.full = _tensor([math.log(f) for f in full])
        size = [(cost.ELEMENT if r == "bf16_tflops" else 1) * (m * k + n * k) + cost.ELEMENT * m * n
                for _, r, (m, n, k), _ in products]  # fmt: skip
        self.moved = 1e-9 * _tensor(size)
        self.copied = 1e-9 * _tensor([o.copy for o in found])
        self.quantized = 1e-9 * _tensor([sum(size for size, _ in o.passes) for o in found])
        counted = [len(o.products) + bool(o.copy) + sum(kernels for _, kernels in o.passes) for o in found]
        self.launches = 1e-3 * _tensor(counted) * bool(c.processors)

    def ms(self, x: dict[str, float]) -> torch.Tensor:
        rates = _tensor([x.get(name) or 1.0 for name in RATES])
        fill = torch.where(self.rate == 0, _tensor([x["bf16_fill"]]), _tensor([1.0]))
        computing = self.work / (rates[self.rate] * torch.exp(self.full * fill))
        products = torch.zeros(self.count, dtype=torch.float64)
        products.index_add_(0, self.at, torch.maximum(computing, self.moved / x["tb_s"]))
        passes = self.quantized / (x["tb_s"] * x["quantize_share"])
        return products + self.copied / x["tb_s"] + passes + self.launches * x["launch_us"]

    def objective(self, x: dict[str, float]) -> float:
        error = (torch.log(self.ms(x)) - self.log_ms) / KNEE
        return float(torch.sqrt(1 + error**2).mean())


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def constants(c: Ceilings) -> dict[str, float]:
    return {name: getattr(c, name) for name in CONSTANTS if getattr(c, name) is not None}


def told(found: Sequence[Observation], c: Ceilings) -> dict[str, str]:
    """Of each constant why the observations do not tell it, "" where they do."""
    kinds = {rate for o in found for rate, _, _ in o.products}
    why = {name: "" if name in kinds else "no such product was measured" for name in RATES[:3]}
    why["tb_s"] = "" if any(o.copy for o in found) else "no copy was measured"
    quantized = [o for o in found if o.passes and not o.products]
    why["quantize_share"] = "" if quantized else "no quantization was measured by itself"
    cheap = replace(c, launch_us=0.0)
    launches = sum(1 - o.predicted(cheap) / o.predicted(c) >= LAUNCH_SHARE for o in found)
    partial = {shape for o in found for rate, shape, format in o.products
               if rate == "bf16_tflops" and cost.fullness(shape, c, format) < NOT_FULL}  # fmt: skip
    why["launch_us"] = "" if launches >= LEAST else f"launches matter in {launches} of the {LEAST} measurements needed"
    why["bf16_fill"] = (
        "" if len(partial) >= LEAST else f"{len(partial)} of the {LEAST} products needed fill the GPU in part"
    )
    return {name: why[name] for name in CONSTANTS}


def fit(found: Sequence[Observation], c: Ceilings, free: Sequence[str], step: float = 0.25) -> Ceilings:
    """The constants named in `free` fitted, from those of `c` on: each in turn up or down by a step that shrinks."""
    model, x = Fit(found, c), constants(c)
    best = model.objective(x)
    while step > FINEST:
        moved = False
        for name in free:
            for sign in (1, -1):
                tried = {**x, name: _moved(name, x[name], sign * step)}
                value = model.objective(tried)
                if value < best - 1e-9:
                    x, best, moved = tried, value, True
                    break
        step = step * 1.2 if moved else step / 2
    return replace(c, **x, source="measured")


def _moved(name: str, value: float, step: float) -> float:
    if name not in cost.FITTED:
        return value * math.exp(step)
    low, high = cost.FITTED[name]
    if name == "bf16_fill":
        return min(max(value + step, low), high)
    return min(max(max(value, 1e-3) * math.exp(step), low), high)


def left_out(found: Sequence[Observation], c: Ceilings, free: Sequence[str]) -> list[float]:
    """The errors of each shape's observations with the constants that all others give."""
    errors = []
    for shape in dict.fromkeys(o.shape for o in found):
        rest = [o for o in found if o.shape != shape]
        if rest:
            fitted = fit(rest, c, free, step=0.02)
            errors += [error(o, fitted) for o in found if o.shape == shape]
    return errors


def error(o: Observation, c: Ceilings) -> float:
    """The logarithm of predicted over measured."""
    return math.log(o.predicted(c) / o.ms)


def typical(errors: Sequence[float]) -> float | None:
    """The median size."""
    return statistics.median(map(abs, errors)) if errors else None


# ---- int8 or bf16


def decisions(machine: Machine, before: Ceilings, after: Ceilings) -> list[Decision]:
    found = []
    for _, case in machine.cases():
        if case["suite"] not in (GEMM, LINEAR) or len(sizes(case["shape"])) != 3:
            continue
        ok = [c for c in case["candidates"] if is_ok(c)]
        theirs = [c for c in ok if c["tag"] in BF16]
        ours = [c for c in ok if (c["tag"] in OWN_INT8 and DISPATCHED in c["name"]) or c["tag"] == "int8"]
        if theirs and ours:
            base = min(theirs, key=lambda c: c["ms"]["median"])["samples_ms"]
            measured = speed_ups(base, {"ours": ours[0]["samples_ms"]})["ours"]
            predicted = [_ratio(case["suite"], sizes(case["shape"]), c) for c in (before, after)]
            value, low, high = measured.value, measured.low, measured.high
            found.append(Decision(case["suite"], case["shape"], value, low, high, *predicted))
    return found


def _ratio(suite: str, size: tuple[int, ...], c: Ceilings) -> float | None:
    try:
        if suite == GEMM:
            one = cost.product("gemm", size, c.int8_tops, c)
            return one.bf16_ms / one.ms
        return cost.linear(*size, Recipe.int8(), c).ratio
    except NotModelled:
        return None


# ---- everything


def calibrate(machine: Machine) -> dict[str, Any]:
    """The document that --out writes. Raises UsageError where there is nothing to fit."""
    run = machine.runs[-1]
    e = run.result["environment"]
    known = facts.ceilings(machine)
    if known is None:
        raise UsageError(f"no datasheet and no measured ceilings of {machine.name}: run the suite kernels as a whole")
    try:
        before = cost.named(machine.name, known.arch, known.processors)
    except NotModelled:
        before = known
    if before.fp8_tflops is None:
        before = replace(before, fp8_tflops=known.fp8_tflops)
    everything = observations(machine, before)
    found = [o for o in everything if not o.host_bound]
    why = told(found, before)
    free = [name for name in CONSTANTS if not why[name]]
    if not free:
        raise UsageError("the results have no figure that the cost model predicts: run the suites kernels and layers")
    fitted = fit(found, before, free)
    entry, missing = _entry(fitted, [n for n in ("bf16_tflops", "int8_tops", "tb_s") if why[n]], e, run.file)
    after = cost.of_entry(entry, before.arch, before.processors) if entry else fitted
    out = left_out(found, after, free)
    choices = decisions(machine, before, after)
    return {
        "kind": "calibration of fqt.cost",
        "environment": e,
        "results": [r.file for r in machine.runs],
        "constants": {name: {"before": getattr(before, name), "after": getattr(after, name), "kept": why[name]}
                      for name in CONSTANTS},
        "errors": {"before": typical([error(o, before) for o in found]),
                   "after": typical([error(o, after) for o in found]), "left out": typical(out)},
        "observations": [
            {"suite": o.suite, "shape": o.shape, "name": o.name, "ms": o.ms, "host_bound": o.host_bound,
             "before_ms": o.predicted(before), "after_ms": o.predicted(after)} for o in everything
        ],
        "decisions": [{**vars(d), "verdict_before": d.verdict(d.before), "verdict_after": d.verdict(d.after)}
                      for d in choices],
        "entry": entry,
        "no_entry": missing,
    }  # fmt: skip


def _entry(c: Ceilings, untold: Sequence[str], e: dict[str, Any], file: str) -> tuple[dict[str, Any] | None, str]:
    """For `fqt/ceilings.json`, or why there is none."""
    if untold:
        return None, f"not measured: {', '.join(untold)}"
    rounded = {name: None if getattr(c, name) is None else float(f"{getattr(c, name):.6g}") for name in CONSTANTS}
    versions = {name: e[name] for name in ("torch", "triton", "cuda", "hip", "driver") if e[name]}
    fitted = {name: rounded.pop(name) for name in cost.FITTED}
    return {"gpu": e["gpu"], **rounded, "fitted": fitted, "versions": versions, "date": e["date"], "file": file}, ""


def report(found: dict[str, Any]) -> str:
    e, errors = found["environment"], found["errors"]
    shown = lambda x: "-" if x is None else f"{x:.4g}"  # noqa: E731
    rows = [(name, shown(c["before"]), shown(c["after"]), c["kept"] and f"kept: {c['kept']}")
            for name, c in found["constants"].items()]  # fmt: skip
    percent = "; ".join(f"{name} {100 * value:.1f} %" for name, value in errors.items() if value is not None)
    worst = sorted(found["observations"], key=lambda o: -abs(math.log(o["after_ms"] / o["ms"])))[:SHOWN]
    times = [(o["suite"], o["shape"], o["name"], *(f"{o[key]:.4f}" for key in ("ms", "before_ms", "after_ms")),
              f"{100 * (o['after_ms'] / o['ms'] - 1):+.0f} %", "host-bound" * o["host_bound"]) for o in worst]  # fmt: skip
    order = {"WRONG": 0, "undecidable": 1, "right": 2, "not modelled": 3}
    choices = [(d["suite"], d["shape"], f"{d['measured']:.3f}", f"{d['low']:.3f}-{d['high']:.3f}", shown(d["before"]),
                d["verdict_before"], shown(d["after"]), d["verdict_after"])
               for d in sorted(found["decisions"], key=lambda d: order[d["verdict_after"]])]  # fmt: skip
    wrong = {key: sum(d[f"verdict_{key}"] == "WRONG" for d in found["decisions"]) for key in ("before", "after")}
    parts = [
        f"{e['gpu']}, driver {e['driver']}, torch {e['torch']}, Triton {e['triton']}, {e['date']}: "
        f"{len(found['observations'])} measurements of {', '.join(found['results'])}",
        table(("constant", "before", "fitted", ""), rows, right=(1, 2)),
        f"Median error of a predicted time: {percent}",
        "Most wrong after the fit:\n"
        + table(("case", "shape", "", "ms", "before", "fitted", "off by", ""), times, right=(3, 4, 5, 6)),
        f"Is int8 faster than bf16? Wrong: {wrong['before']} of {len(choices)} before, {wrong['after']} after\n"
        + table(("case", "shape", "measured", "95 %", "before", "", "fitted", ""), choices, right=(2, 3, 4, 6)),
    ]
    return "\n\n".join([*parts, *([found["no_entry"]] if found["no_entry"] else [])])


def machine_of(paths: Sequence[Path]) -> Machine:
    """The one GPU of these results. Raises UsageError."""
    runs, refused = load(find(paths))
    if refused:
        path, reason = refused[0]
        raise UsageError(f"{path.name}: {reason}")
    names = sorted({run.machine if run.gpu else f"{run.machine} (no GPU)" for run in runs})
    if len(names) != 1 or runs[0].gpu is None:
        raise UsageError(f"results of one GPU are needed, got those of {', '.join(names) or 'none'}")
    return Machine(runs[0].machine, tuple(sorted(runs, key=lambda run: run.result["environment"]["date"])))


def add_to(path: Path, found: dict[str, Any]) -> None:
    """Put the entry into a file of measured ceilings, in the place of one of the same GPU and date. Raises UsageError."""
    if found["entry"] is None:
        raise UsageError(f"{path.name} is left as it is: {found['no_entry']}")
    errors = found["errors"]
    if errors["left out"] is None or errors["left out"] > errors["before"]:
        raise UsageError(
            f"{path.name} is left as it is: shapes left out of the fit are predicted no better than before"
        )
    entries = []
    if path.exists():
        try:
            cost.measured(path)
        except ValueError as e:
            raise UsageError(str(e)) from e
        entries = json.loads(path.read_text(encoding="utf-8"))
    key = found["entry"]["gpu"], found["entry"]["date"]
    kept = [entry for entry in entries if (entry["gpu"], entry["date"]) != key]
    environment.write(path, [*kept, found["entry"]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fqt_bench.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="JSON of fqt bench, or a folder of it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="add the fitted constants to this file")
    args = parser.parse_args(argv)
    try:
        found = calibrate(machine_of(args.results))
        print(report(found))
        if args.out:
            environment.write(args.out, found)
        if args.ceilings:
            add_to(args.ceilings, found)
    except UsageError as e:
        print(f"fqt_bench.calibrate: {e}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
