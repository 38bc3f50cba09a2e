"""The cost model held against what was measured on a GPU, shape by shape, and its constants fitted to that.

    python -m fqt_bench.calibrate RESULT.json ... [--out FILE.json] [--ceilings fqt/ceilings.json]

Results of `fqt bench --suite kernels layers` of one GPU; of a case in several the newest counts. Every product, quantization
and layer that `fqt.cost` has a prediction for is an observation. Fitted to are those that a layer launches as dispatch takes
them; the others are shown, each with its reason: host-bound, another configuration, partly in the L2.

The fit minimizes the mean of sqrt(1 + (e / 0.02)²) over them, e the logarithm of predicted over measured time: beyond 2 %
that grows like the error's size, so that a few shapes the model cannot describe do not bend it. A constant that they leave
uncertain keeps its value, with the reason: one shape, say, does not tell a rate from the launch. Beside the errors before
and after stand those of shapes that were left out of the fit. --ceilings adds the constants to that file, if shapes left
out are predicted no worse with them than before.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fqt import cost
from fqt.cli import MISTAKE, UsageError, table
from fqt.cost import Ceilings, NotModelled
from fqt.recipe import Recipe

from . import environment, facts
from .calibrate_fit import CONSTANTS, LINEAR_SCALE, Fitted, fit, left_out, observations, typical
from .facts import Machine, is_host_bound, is_ok, sizes
from .products import DISPATCHED
from .reading import OTHER, Run, find, load
from .stats import speed_ups
from .targets import BF16, GEMM, LINEAR, OWN_INT8

SHOWN = 20  # of the observations that are most wrong
WAS_WRONG = 0.1  # by more than that of its value
VERDICTS = ("WRONG", "right", "undecidable", "host-bound", "not modelled")


@dataclass(frozen=True)
class Decision:
    """Whether `name`, as dispatch takes it, is faster than bf16 at its fastest: the ratio of their times as measured, with
    its 95 % interval, and as predicted."""

    suite: str
    shape: str
    name: str
    measured: float
    low: float
    high: float
    before: float | None
    after: float | None
    host_bound: bool = False

    def verdict(self, predicted: float | None) -> str:
        """One of VERDICTS."""
        if predicted is None:
            return "not modelled"
        if self.host_bound:
            return "host-bound"
        if self.low <= 1 <= self.high:
            return "undecidable"
        return "right" if (predicted > 1) == (self.measured > 1) else "WRONG"


def decisions(machine: Machine, before: Ceilings, after: Ceilings) -> list[Decision]:
    found = []
    for _, case in machine.cases():
        if case["suite"] not in (GEMM, LINEAR) or len(sizes(case["shape"])) != 3:
            continue
        ok = [c for c in case["candidates"] if is_ok(c)]
        base = min((c for c in ok if c["tag"] in BF16), key=lambda c: c["ms"]["median"], default=None)
        for c in (c for c in ok if base and _recipe(case["suite"], c)):
            value, low, high = speed_ups(base["samples_ms"], {"ours": c["samples_ms"]})["ours"]
            recipe = _recipe(case["suite"], c)
            predicted = [_ratio(case["suite"], sizes(case["shape"]), recipe, ceilings) for ceilings in (before, after)]
            host_bound = is_host_bound(c) or is_host_bound(base)
            found.append(Decision(case["suite"], case["shape"], recipe, value, low, high, *predicted, host_bound))
    return found


def _recipe(suite: str, c: dict[str, Any]) -> str | None:
    """That the candidate computes, as a layer with this recipe would."""
    if suite == LINEAR:
        return c["tag"] if c["tag"] in ("int8", "psq8", "fp8") else None
    if DISPATCHED not in c["name"]:
        return None
    return "int8" if c["tag"] in OWN_INT8 else "fp8" if c["tag"] == "fp8" else None


def _ratio(suite: str, size: tuple[int, ...], recipe: str, c: Ceilings) -> float | None:
    try:
        if suite == LINEAR:
            return cost.linear(*size, Recipe.parse(recipe), c).ratio
        rate, format = (c.fp8_tflops, "e4m3") if recipe == "fp8" else (c.int8_tops, "int")
        bf16 = cost.product("", size, c.int8_tops, c).bf16_ms
        return None if rate is None else bf16 / cost.product("", size, rate, c, format).ms
    except NotModelled:
        return None


# ---- everything


def calibrate(machine: Machine, files: Sequence[str] = ()) -> dict[str, Any]:
    """The document that --out writes. files: where the results lie, in the order of the machine's runs; their names if
    empty. Raises UsageError where there is nothing to fit."""
    files = list(files) or [run.file for run in machine.runs]
    e = machine.runs[-1].result["environment"]
    before = _before(machine)
    everything = observations(machine, before)
    found = [o for o in everything if not o.why]
    fitted = fit(found, before)
    if not fitted.errors:
        raise UsageError("the results have no figure that tells a constant: run the suites kernels and layers")
    entry, missing = _entry(fitted, e, files[-1])
    after = cost.of_entry(entry, before.arch, before.processors) if entry else fitted.ceilings
    out = left_out(found, before)
    errors = {"before": [o.error(before) for o in found], "after": [o.error(after) for o in found],
              "left out": list(out.values())}  # fmt: skip
    return {
        "kind": "calibration of fqt.cost",
        "environment": e,
        "results": [{"file": file, "environment": run.result["environment"]}
                    for file, run in zip(files, machine.runs, strict=True)],
        "before": before.source,
        "constants": {
            name: {"before": getattr(before, name), "after": getattr(after, name),
                   "error": fitted.errors.get(name), "kept": fitted.kept.get(name, "")} for name in CONSTANTS
        },
        "errors": {name: typical(values) for name, values in errors.items()},
        "observations": [
            {"suite": o.suite, "shape": o.shape, "name": o.name, "ms": o.ms, "ratio": o.ratio, "not_fitted": o.why,
             "before_ms": o.predicted(before), "after_ms": o.predicted(after), "before_error": o.error(before),
             "after_error": o.error(after), "left_out_error": out.get(o)} for o in everything
        ],
        "decisions": [{**vars(d), "verdict_before": d.verdict(d.before), "verdict_after": d.verdict(d.after)}
                      for d in decisions(machine, before, after)],
        "entry": entry,
        "no_entry": missing,
    }  # fmt: skip


def _before(machine: Machine) -> Ceilings:
    """What `fqt.cost` predicts with on this GPU, else the best rates of the results."""
    known = facts.ceilings(machine)
    if known is None:
        raise UsageError(f"no datasheet and no measured ceilings of {machine.name}: run the suite kernels as a whole")
    try:
        before = cost.named(machine.name, known.arch, known.processors)
    except NotModelled:
        return known
    return before if before.fp8_tflops else replace(before, fp8_tflops=known.fp8_tflops)


def _entry(fitted: Fitted, e: dict[str, Any], file: str) -> tuple[dict[str, Any] | None, str]:
    """For `fqt/ceilings.json`, or why there is none."""
    needed = [f"{name} ({fitted.kept[name]})" for name in ("bf16_tflops", "int8_tops", "tb_s") if name in fitted.kept]
    if needed:
        return None, f"no entry for the file of ceilings, not measured: {', '.join(needed)}"
    c = fitted.ceilings
    rounded = {name: None if getattr(c, name) is None else float(f"{getattr(c, name):.6g}") for name in CONSTANTS}
    if "fp8_tflops" in fitted.kept:
        rounded["fp8_tflops"] = None  # never an expectation among measured rates
    versions = {name: e[name] for name in ("torch", "triton", "cuda", "hip", "driver") if e[name]}
    own = {name: rounded.pop(name) for name in cost.FITTED}
    return {"gpu": e["gpu"], **rounded, "fitted": own, "versions": versions, "date": e["date"], "file": file}, ""


# ---- as text


def report(found: dict[str, Any]) -> str:
    return "\n\n".join(_parts(found))


def _parts(found: dict[str, Any]) -> Iterator[str]:
    e, observed = found["environment"], found["observations"]
    files = ", ".join(r["file"] for r in found["results"])
    yield (f"{e['gpu']}, driver {e['driver']}, torch {e['torch']}, Triton {e['triton']}, {e['date']}\n"
           f"{len(observed)} measurements of {files}; before: {found['before']} ceilings")  # fmt: skip
    rows = []
    for name, c in found["constants"].items():
        shown = _shown(c["before"]), _shown(c["after"]), _plus_minus(name, c["error"])
        rows.append((name, *shown, c["kept"] and f"kept: {c['kept']}"))
    yield table(("constant", "before", "fitted", "±", ""), rows, right=(1, 2, 3))
    wrong = [f"{name} by {100 * (c['after'] / c['before'] - 1):+.0f} %" for name, c in found["constants"].items()
             if c["error"] is not None and name not in LINEAR_SCALE
             and abs(c["after"] / c["before"] - 1) > WAS_WRONG]  # fmt: skip
    yield f"Constants that were wrong by more than {100 * WAS_WRONG:.0f} %: {', '.join(wrong) or 'none'}"
    percent = "; ".join(f"{name} {100 * value:.1f} %" for name, value in found["errors"].items() if value is not None)
    yield f"Median error of a predicted time: {percent}\n{_kinds(observed)}"
    fitted_to = [o for o in observed if not o["not_fitted"]]
    yield "Most wrong after the fit, of what was fitted to:\n" + _observed(fitted_to)
    others = [o for o in observed if o["not_fitted"]]
    if others:
        yield "Most wrong of the others:\n" + _observed(others)
    yield _decided(found["decisions"])
    if found["no_entry"]:
        yield found["no_entry"]


def _kinds(observed: Sequence[dict[str, Any]]) -> str:
    """Median errors by kind of case, and of bf16 apart."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for o in observed:
        if not o["not_fitted"]:
            kinds.setdefault(f"{o['suite']}{', bf16' if 'bf16' in o['name'] else ''}", []).append(o)
    rows = []
    for kind, some in kinds.items():
        values = [typical([o[key] for o in some if o[key] is not None])
                  for key in ("before_error", "after_error", "left_out_error")]  # fmt: skip
        rows.append((kind, str(len(some)), *("-" if v is None else f"{100 * v:.1f} %" for v in values)))
    return table(("", "measurements", "before", "fitted", "left out"), rows, right=(1, 2, 3, 4))


def _observed(some: Sequence[dict[str, Any]]) -> str:
    worst = sorted(some, key=lambda o: -abs(o["after_error"]))[:SHOWN]
    rows = [(o["suite"], o["shape"], o["name"], *(f"{o[key]:.4f}" for key in ("ms", "before_ms", "after_ms")),
             f"{100 * math.expm1(o['after_error']):+.0f} %", o["not_fitted"]) for o in worst]  # fmt: skip
    more = f"\n… and {len(some) - SHOWN} that are less so" if len(some) > SHOWN else ""
    return table(("case", "shape", "", "ms", "before", "fitted", "off by", ""), rows, right=(3, 4, 5, 6)) + more


def _decided(found: Sequence[dict[str, Any]]) -> str:
    """Every one, the wrong ones first, then those that the fit changed, then the furthest from its prediction."""

    def order(d: dict[str, Any]) -> tuple[Any, ...]:
        off = abs(math.log(d["after"] / d["measured"])) if d["after"] else 0.0
        return VERDICTS.index(d["verdict_after"]), d["verdict_before"] == d["verdict_after"], -off

    rows = [(d["suite"], d["shape"], d["name"], f"{d['measured']:.3f}", f"{d['low']:.3f}-{d['high']:.3f}",
             _shown(d["before"]), d["verdict_before"], _shown(d["after"]), d["verdict_after"])
            for d in sorted(found, key=order)]  # fmt: skip
    wrong = {key: [f"{d['suite']} {d['shape']} {d['name']}" for d in found if d[f"verdict_{key}"] == "WRONG"]
             for key in ("before", "after")}  # fmt: skip
    decidable = sum(d["verdict_after"] in ("WRONG", "right") for d in found)
    said = (f"Is it faster than bf16? Of {decidable} decidable shapes wrong before: {len(wrong['before'])}, after: "
            f"{len(wrong['after'])}{': ' * bool(wrong['after'])}{', '.join(wrong['after'])}")  # fmt: skip
    header = ("case", "shape", "", "measured", "95 %", "before", "", "fitted", "")
    return f"{said}\n{table(header, rows, right=(3, 4, 5, 7))}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _plus_minus(name: str, error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.2g}" if name in LINEAR_SCALE else f"{100 * error:.1f} %"


# ---- files


def machine_of(paths: Sequence[Path]) -> tuple[Machine, list[str]]:
    """The one GPU of these results, and where each lies, from the checkout's root on where it is in it. Of a folder what is
    no result at all is left alone. Raises UsageError."""
    named, runs = {path.resolve() for path in paths}, []
    for path in find(paths):
        found, refused = load([path])
        for _, reason in refused:
            if path.resolve() in named or not reason.startswith(OTHER):
                raise UsageError(f"{path}: {reason}")
        runs += [(run, _placed(path)) for run in found]
    runs.sort(key=lambda each: (each[0].date, each[1]))
    names = sorted({_kind(run) for run, _ in runs})
    if len(names) != 1 or runs[0][0].gpu is None:
        raise UsageError(f"results of one GPU are needed, got those of {'; '.join(names) or 'none'}")
    return Machine(runs[0][0].machine, tuple(run for run, _ in runs)), [file for _, file in runs]


def _kind(run: Run) -> str:
    e = run.result["environment"]
    return f"{run.machine}, {e['processors']} processors" if run.gpu else f"{run.machine}, no GPU"


def _placed(path: Path) -> str:
    path, root = path.resolve(), environment.ROOT
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name


def add_to(path: Path, found: dict[str, Any]) -> None:
    """Put the entry into a file of measured ceilings, in the place of one of the same GPU and date. Raises UsageError."""
    if found["entry"] is None:
        raise UsageError(f"{path} is left as it is: {found['no_entry']}")
    errors = found["errors"]
    if errors["left out"] is None or errors["left out"] > errors["before"]:
        raise UsageError(f"{path} is left as it is: shapes left out of the fit are predicted no better than before")
    entries = []
    if path.exists():
        try:
            entries = cost.entries(path)
        except (OSError, ValueError) as e:
            raise UsageError(str(e)) from e
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
        found = calibrate(*machine_of(args.results))
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
