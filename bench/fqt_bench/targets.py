"""What a result says: the tables, whether the targets are met, and the ceilings for `fqt.cost`. Pure functions of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fqt.cli import table
from fqt.suites import CONVOLUTIONS

from . import convs, psgd
from .convs import BF16
from .harness import DOES_NOT_FIT
from .householder import SUITE as HOUSEHOLDER
from .householder import costs
from .measures import (
    FAILED,
    GEMM,
    LINEAR,
    QUANTIZE,
    BeyondPsq,
    Counted,
    Measure,
    Rate,
    Result,
    independent,
    launched,
    repeated,
    said,
    saved,
)
from .parameters import LLAMA_8B, RESNET50, Parameters
from .products import DISPATCHED
from .psgd import EMITTING
from .psgd import title as psgd_title

HEADER = ("case", "shape", "candidate", "ms", "p10-p90", "rate", "ratio", "95 %", "prediction", "verdict")
OWN_INT8 = ("portable", "split", "hopper", "cublas")
OWN_LAYER = ("int8", "int8 hopper")


def failures(result: Result) -> list[str]:
    """fqt's own candidates that failed or changed their bits, a choice of dispatch that does not fit, what broke else."""

    def failed(c: dict[str, Any]) -> bool:
        return c["status"] in FAILED or (DISPATCHED in c["name"] and c["remark"].startswith(DOES_NOT_FIT))

    bad = [f"{case['suite']} {case['shape']}: {c['name']}: {said(c)}" for case in result["cases"]
           for c in case["candidates"] if c["ours"] and failed(c)]  # fmt: skip
    bad += [f"repeat {r['shape']}: {r['name']}: {said(r)}" for r in result["repeats"] if failed(r)]
    return bad + [f"{s['suite']} {s['shape']}: {said(s)}" for s in result["skipped"] if s["status"] == "error"]


def measured(result: Result) -> bool:
    """Whether the run has any figure."""
    timed = any(c["status"] == "ok" for case in result["cases"] for c in case["candidates"])
    return timed or any(result[key] for key in ("counters", "memory", "repeats", "launches"))


# ---- targets


@dataclass(frozen=True)
class Target:
    """A figure of a GPU that is to be at least (or, with at_most, at most) its bound."""

    name: str
    what: str
    bound: float
    measure: Measure
    unit: str = "×"
    at_most: bool = False

    def judged(self, result: Result) -> tuple[str, str, str, str, str, str, str]:
        """(name, what, bound, predicted or "", measured or "", "met", "missed" or "not measured", why nothing was or "")."""
        on_gpu = result["environment"]["device"] == "cuda"
        value, predicted = ((of(result) if on_gpu else None) for of in (self.measure, self.measure.predicted))
        shown = ("" if figure is None else _shown(figure, self.unit) for figure in (predicted, value))
        head = (self.name, self.what, f"{'≤' if self.at_most else '≥'} {_shown(self.bound, self.unit)}", *shown)
        if value is None:
            return (*head, "not measured", self.measure.why(result) if on_gpu else "")
        met = value <= self.bound if self.at_most else value >= self.bound
        return (*head, "met" if met else "missed", "")

    def line(self, result: Result) -> tuple[str, ...]:
        """What is judged, the reason behind the verdict."""
        *head, verdict, why = self.judged(result)
        return (*head, f"{verdict}: {why}" if why else verdict)


HEAD = ("", "target", "bound", "predicted", "measured", "verdict")


def _shown(value: float, unit: str) -> str:
    return f"{value:.2f}×" if unit == "×" else f"{value:.0f} {unit}".rstrip()


def _psgd(of: Parameters) -> tuple[Target, ...]:
    """T7, of a step over a network's float32 parameters; the copy's bytes are those of a step without codes."""
    case, name = (psgd_title(of, torch.float32), of.size), of.name
    return (
        Target("T7", f"PSGD with int8 codes over a copy, {name}", 0.90,
               Rate(*case, ["psgd codes"], ["step copy"], "gb_s")),
        Target("T7", f"PSGD with int8 codes over fused SGD, {name}", 1.00,
               Rate(*case, ["psgd codes"], ["sgd fused"], "per_ms")),
        Target("T7", f"PSGD over PSGD by foreach, {name}", 4.00, Rate(*case, ["psgd"], ["psgd foreach"], "per_ms")),
        Target("T7", f"launches of PSGD with int8 codes, {name}", 1, launched(EMITTING, of.size), "", at_most=True),
    )  # fmt: skip


CUBE16, CUBE8, CUBE4 = ("16384x16384x16384", "8192x8192x8192", "4096x4096x4096")
SQUARE = "8192x8192"
CUBES = {CUBE16: "16384³", CUBE8: "8192³", CUBE4: "4096³"}
# Of layers: what it is called, and the bound over bf16.
LAYERS = {CUBE8: ("at 8192³", 1.30), "8192x28672x4096": ("Llama-8B w13", 1.20), "8192x4096x14336": ("Llama-8B w2", 1.20),
          CUBE4: ("at 4096³", 1.10)}  # fmt: skip


def _over_bf16(shape: str) -> str:
    name, _ = LAYERS[shape]
    return f"int8 layer over bf16{'' if name.startswith('at') else ','} {name}"


TARGETS = (
    Target("T1", "int8 product at 8192³", 1150, Rate(GEMM, CUBE8, OWN_INT8), "TOPS"),
    Target("T1", "int8 product over bf16 at 8192³", 1.40, Rate(GEMM, CUBE8, OWN_INT8, ["bf16"])),
    Target("T1", "portable int8 product at 8192³", 950, Rate(GEMM, CUBE8, ["portable", "split"]), "TOPS"),
    *(Target("T2", f"int8 product over _int_mm at {name}", 1.00, Rate(GEMM, cube, OWN_INT8, ["_int_mm"]))
      for cube, name in CUBES.items()),
    *(Target("T2", f"int8 product over fp8 _scaled_mm at {name}", 0.92, Rate(GEMM, cube, OWN_INT8, ["_scaled_mm fp8"]))
      for cube, name in CUBES.items()),
    *(Target("T3", _over_bf16(shape), bound, Rate(LINEAR, shape, OWN_LAYER, BF16))
      for shape, (_, bound) in LAYERS.items()),
    *(Target("T4", _over_bf16(shape).replace("bf16", "torchao's"), 1.15, Rate(LINEAR, shape, OWN_LAYER, ["torchao"]))
      for shape in LAYERS),
    Target("T5", "row quantization over a copy", 0.90, Rate(QUANTIZE, SQUARE, ["rows nearest"], ["copy"], "gb_s")),
    Target("T5", "the same, stochastic", 0.85, Rate(QUANTIZE, SQUARE, ["rows stochastic"], ["copy"], "gb_s")),
    Target("T5", "both layouts over a copy", 0.85, Rate(QUANTIZE, SQUARE, ["both nearest"], ["copy"], "gb_s")),
    Target("T6", "stochastic over nearest time, rows", 1.10,
           Rate(QUANTIZE, SQUARE, ["rows nearest"], ["rows stochastic"], "gb_s"), at_most=True),
    Target("T6", "stochastic over nearest time, both layouts", 1.10,
           Rate(QUANTIZE, SQUARE, ["both nearest"], ["both stochastic"], "gb_s"), at_most=True),
    *_psgd(LLAMA_8B),
    *_psgd(RESNET50),
    *(Target("T8", f"BHQ{' in tiles' * (tag == 'whole tile')} beyond PSQ, of dgrad at {CUBES[cube]}", bound,
             BeyondPsq(cube, tag), "%", at_most=True)
      for cube, bound in ((CUBE8, 10), (CUBE4, 15)) for tag in ("whole global", "whole tile")),
    Target("T9", "bytes that a forward saves over bf16's", 0.52, Counted(saved), at_most=True),
    Target("T10", "candidates whose runs are bit-identical", 100, Counted(repeated), "%"),
    Target("T10", "configurations of a product that give the same bits, split K too", 100, Counted(independent), "%"),
)  # fmt: skip


# ---- ceilings


def ceilings(result: Result, file: str) -> dict[str, Any] | None:
    """The entry of this GPU for `fqt/ceilings.json`: the best rates of the run; None where one is missing."""
    if result["environment"]["device"] == "cpu":
        return None
    found = [(case, c) for case in result["cases"] for c in case["candidates"] if c["status"] == "ok"]

    def rate(tags: Sequence[str]) -> float | None:
        return max((c["tops"] for case, c in found if case["suite"] == GEMM and c["tag"] in tags), default=None)

    copies = [(_elements(case["shape"]), c["gb_s"]) for case, c in found if c["tag"] == "copy"]
    rates = {
        "bf16_tflops": rate(["bf16"]),
        "int8_tops": rate(OWN_INT8),
        "fp8_tflops": rate(["fp8"]),
        "tb_s": max(copies)[1] / 1e3 if copies else None,  # of the largest matrix: a small one stays in the L2
    }
    if any(value is None for name, value in rates.items() if name != "fp8_tflops"):
        return None
    e = result["environment"]
    versions = {name: e[name] for name in ("torch", "triton", "cuda", "hip", "driver") if e[name]}
    rounded = {name: None if value is None else round(value, 3) for name, value in rates.items()}
    return {"gpu": e["gpu"], **rounded, "versions": versions, "date": e["date"], "file": file}


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


# ---- tables


def report(result: Result) -> str:
    """The environment, what was measured beside what was predicted, and the targets of the suites that ran."""
    e = result["environment"]
    commit = f"commit {(e['commit'] or 'unknown')[:9]}{' with changes' if e['dirty'] else ''}, source {e['source']}"
    bad = failures(result)
    rows = list(_rows(result))
    wide = [i for i in range(len(HEADER)) if i < 3 or any(row[i] for row in rows)]  # no column without an entry
    right = [at for at, i in enumerate(wide) if i in (3, 4, 5, 6, 7)]
    sections = [
        f"{_device(e)}, torch {e['torch']}, Triton {e['triton']}, Python {e['python']}, fqt {e['fqt']}, {e['date']}, "
        f"{commit}\n"
        "ratio: rate over that of the first candidate of the case, same run, with its 95 % confidence interval; "
        "prediction: fqt.cost before this run",
        table([HEADER[i] for i in wide], [[row[i] for i in wide] for row in rows], right=right),
    ]
    of_bhq = [costs(case) for case in result["cases"] if case["suite"].split(",")[0] == HOUSEHOLDER]
    if of_bhq:
        where = "on the CPU; a GPU: not measured" if e["device"] == "cpu" else "on the GPU"
        sections += [f"What BHQ costs, {where}. Times over those of the product that computes dX, and of PSQ", *of_bhq]
    of_psgd = [text for case in result["cases"] if case["suite"].startswith(psgd.SUITE)
               and (text := psgd.shares(case, result["launches"]))]  # fmt: skip
    if of_psgd:
        where = "on the CPU; a GPU: not measured" if e["device"] == "cpu" else "on the GPU"
        sections += [f"What a step of PSGD moves, {where}: beside the copy of the same run", *of_psgd]
    for network in CONVOLUTIONS:
        rows = convs.rows(network, result["cases"])
        if rows:
            sections += [f"{network}, forward and backward, batch {rows[0].of.n}: against the faster of torch's",
                         table(convs.HEADER, list(map(convs.cells, rows)), right=convs.RIGHT)]  # fmt: skip
    if {"kernels", "layers", "optim", HOUSEHOLDER} & set(result["suites"]):
        sections.append(table(HEAD, [t.line(result) for t in TARGETS], right=(2, 3, 4)))
    counted = [f"{len(result['counters'])} entries of noise-free counters"] if result["counters"] else []
    spent = f"{result['spent_s']:.0f} of {result['budget_s']:.0f} s spent"
    sections.append("; ".join([spent, *counted, f"{len(bad)} failures"]))
    return "\n\n".join(sections) + "".join(f"\nFAILED {name}" for name in bad)


def _device(e: dict[str, Any]) -> str:
    if e["device"] == "cpu":
        return f"CPU: {e['cpu']}, {e['host']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, no GPU timed"
    return (f"{e['gpu']}, capability {e['capability']}, {e['processors']} processors, driver {e['driver']}, "
            f"CUDA {e['cuda']}")  # fmt: skip


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    for case in result["cases"]:
        for candidate in case["candidates"]:
            yield _row(case, candidate)
    for r in result["memory"]:
        base = result["memory"][0]["saved"]
        verdict = f"a forward saves; the peak is {r['peak'] / 2**20:.0f} MiB"
        rate, ratio = f"{r['saved'] / 2**20:.1f} MiB", f"{r['saved'] / base:.2f}" if base else ""
        yield ("memory", r["shape"], r["name"], "", "", rate, ratio, "", "", verdict)
    for r in result["repeats"]:
        yield ("repeat", r["shape"], r["name"], "", "", "", "", "", "", said(r))
    for r in result["launches"]:
        base = next(other["kernels"] for other in result["launches"] if other["shape"] == r["shape"])
        rate, ratio = f"{r['kernels']} kernels", f"{r['kernels'] / base:.2f}" if base else ""
        yield ("launches", r["shape"], r["name"], "", "", rate, ratio, "", "", f"{r['copies']} copies or fills")
    for s in result["skipped"]:
        yield (s["suite"], s["shape"], "", "", "", "", "", "", "", said(s))


def _row(case: dict[str, Any], candidate: dict[str, Any]) -> tuple[str, ...]:
    verdict = said(candidate)
    head, tail = (case["suite"], case["shape"], candidate["name"]), candidate["prediction"]
    ms = candidate.get("ms")
    if ms is None:
        return (*head, "", "", "", "", "", tail, verdict)
    if candidate["starved"] > ms["n"] / 2:
        verdict += f"; host-bound: {candidate['host_ms']:.3f} ms to launch"
    unit = "GB/s" if case["unit"] == "ms" else case["unit"]
    rate = candidate["gb_s" if unit == "GB/s" else "tops"]
    shown = "" if rate is None else f"{digits(rate)} {unit}"
    ratio = candidate.get("ratio")
    ratios = (digits(ratio["value"]), f"{digits(ratio['low'])}-{digits(ratio['high'])}") if ratio else ("", "")
    return (*head, f"{ms['median']:.4f}", f"{ms['p10']:.4f}-{ms['p90']:.4f}", shown, *ratios, tail, verdict)


def digits(value: float) -> str:
    """Three digits, none after the point from 100 on: 1.32, 0.0123, 987."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"
