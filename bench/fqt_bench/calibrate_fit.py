"""What a run measured that `fqt.cost` predicts, and the fit of its constants to that. See `fqt_bench.calibrate`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fqt import cost
from fqt.cost import Ceilings, NotModelled, Tiling
from fqt.recipe import Recipe

from .facts import Machine, is_host_bound, is_ok, sizes
from .products import DISPATCHED
from .targets import BF16, GEMM, LINEAR, OWN_INT8, QUANTIZE

KNEE = 0.02
CONSTANTS = (*cost.RATES, *cost.FITTED)
# The largest standard error with which a constant counts as told: of a logarithm, or, where it may be 0, of itself.
TOLD = {**dict.fromkeys(cost.RATES, 0.06), "launch_us": 0.15, "quantize_share": 0.08, "bf16_fill": 0.25,
        "bf16_ramp": 64.0, "ramp": 64.0}  # fmt: skip
LINEAR_SCALE = {"bf16_fill": 1.0, "bf16_ramp": 256.0, "ramp": 256.0}  # the others are searched by their logarithms
POLISH = 40  # passes over the constants, at most
CACHED = 2  # times the L2: traffic below it does not tell the memory's rate
_CONFIG = re.compile(r"(?:^| )(\d+)x(\d+)x\d+ w\d+ s\d+(?: split (\d+))?")


@dataclass(frozen=True)
class Observation:
    """A measured time, and what `fqt.cost` counts for it.

    products: (rate's name, shape, format, tiling or None for dispatch's) each; passes: (bytes, kernels); copy: bytes.
    ratio: the record's, against the baseline, with its 95 % interval; None of the baseline. why: it is not fitted to, or "".
    """

    suite: str
    shape: str
    name: str
    ms: float
    ratio: tuple[float, float, float] | None
    why: str
    products: tuple[tuple[str, tuple[int, int, int], str, Tiling | None], ...] = ()
    passes: tuple[tuple[float, int], ...] = ()
    copy: float = 0.0

    def predicted(self, c: Ceilings) -> float:
        """In ms, by `fqt.cost`. Raises NotModelled."""
        total = cost.copied(self.copy, c) if self.copy else 0.0
        for rate, shape, format, tiling in self.products:
            tera = getattr(c, "int8_tops" if rate == "bf16_tflops" else rate)
            if tera is None:
                raise NotModelled(f"no {rate}")
            one = cost.product("", shape, tera, c, format, tiling)
            total += one.bf16_ms if rate == "bf16_tflops" else one.ms
        return total + sum(cost.quantized(size, kernels, c) for size, kernels in self.passes)

    def error(self, c: Ceilings) -> float:
        """The logarithm of predicted over measured."""
        return math.log(self.predicted(c) / self.ms)


# ---- what was measured


def observations(machine: Machine, c: Ceilings) -> list[Observation]:
    """Of every case that `c` has a prediction for."""
    found = [o for m in machine.cases() for o in _of_case(m.case, m.run.result["environment"], c)]
    return [o for o in found if _modelled(o, c)]


def _modelled(o: Observation, c: Ceilings) -> bool:
    try:
        return o.predicted(c) > 0
    except NotModelled:
        return False


def _of_case(case: dict[str, Any], environment: dict[str, Any], ceilings: Ceilings) -> list[Observation]:
    suite, size = case["suite"], sizes(case["shape"])
    make: dict[str, Callable[..., dict[str, Any] | None]] = {GEMM: _product, QUANTIZE: _quantization, LINEAR: _layer}
    found = []
    for c in case["candidates"]:
        work = make[suite](c, ceilings, *size) if suite in make and is_ok(c) else None
        if work is None:
            continue
        why = work.pop("why", "")
        moved = work.get("copy", 0.0) + sum(bytes_ for bytes_, _ in work.get("passes", ()))
        if suite == QUANTIZE and moved < CACHED * 2**20 * (environment["l2_mib"] or 0):
            why = "the L2 holds a part of it"
        if is_host_bound(c):
            why = "host-bound"
        r = c.get("ratio") if c["name"] != case["baseline"] else None
        ratio = (r["value"], r["low"], r["high"]) if r else None
        found.append(Observation(suite, case["shape"], c["name"], c["ms"]["median"], ratio, why, **work))
    return found


def _product(c: dict[str, Any], ceilings: Ceilings, m: int, n: int, k: int) -> dict[str, Any] | None:
    if c["tag"] == "bf16":
        return {"products": (("bf16_tflops", (m, n, k), "int", None),)}
    rate, format = ("fp8_tflops", "e4m3") if c["tag"] == "fp8" else ("int8_tops", "int")
    if c["tag"] not in (*OWN_INT8, "fp8"):
        return None
    if DISPATCHED in c["name"]:
        return {"products": ((rate, (m, n, k), format, None),)}
    config = _CONFIG.search(c["name"])
    tiling = None
    if config and ceilings.processors:
        block_m, block_n, split = (int(value or 1) for value in config.groups())
        tiling = cost.tiling((m, n, k), (block_m, block_n), split, ceilings.processors)
    return {"products": ((rate, (m, n, k), format, tiling),), "why": "dispatch does not take it"}


def _quantization(c: dict[str, Any], ceilings: Ceilings, m: int, n: int) -> dict[str, Any] | None:
    """Fitted to: the copy, and the kernels that a layer launches."""
    if c["tag"] == "copy":
        return {"copy": 4.0 * m * n}
    if c["tag"].startswith("gradient "):
        size, kernels = cost.traffic(Recipe.parse(c["tag"].removeprefix("gradient ")))["dY"]
        return {"passes": ((float(size) * m * n, kernels),)}
    granularity, _, rest = c["name"].partition(" ")
    layouts = {"rows", "transposed"} & set(re.split(r"[ ,+()]+", rest))
    if granularity not in ("per_row", "per_tensor", "per_column") or not layouts:
        return None
    one = granularity == "per_row" and "(tile)" not in rest
    reads, kernels = (1, 1) if one else (2, 3)
    why = "" if len(layouts) == 2 and "nearest" in rest and "(dispatch)" in rest else "a layer does not launch it"
    return {"passes": ((float(reads * cost.ELEMENT + len(layouts)) * m * n, kernels),), "why": why}


def _layer(c: dict[str, Any], ceilings: Ceilings, m: int, n: int, k: int) -> dict[str, Any] | None:
    shapes = (m, n, k), (m, k, n), (n, k, m)
    if c["tag"] in BF16:
        return {"products": tuple(("bf16_tflops", shape, "int", None) for shape in shapes)}
    name, _, backend = c["tag"].partition(" ")
    if not c["ours"] or name not in ("int8", "psq8", "fp8"):
        return None
    recipe = Recipe.parse(name)
    rate = "int8_tops" if recipe.format == "int" else "fp8_tflops"
    elements = {"X": m * k, "W": n * k, "dY": m * n, "dX": m * k}
    passes = tuple((float(elements[name]) * size, kernels) for name, (size, kernels) in cost.traffic(recipe).items())
    return {"products": tuple((rate, shape, recipe.format, None) for shape in shapes), "passes": passes,
            "why": f"only by fqt.backend({backend!r})" if backend else ""}  # fmt: skip


# ---- the model of all observations at once


class Model:
    """The times of observations as a function of the constants: `Observation.predicted`, all at once."""

    def __init__(self, found: Sequence[Observation], c: Ceilings) -> None:
        self.log_ms = _tensor([math.log(o.ms) for o in found])
        products = [(i, *p) for i, o in enumerate(found) for p in o.products]
        cuts = [tiling or cost.tiling_of(shape, c, format) for _, _, shape, format, tiling in products]
        self.at = torch.tensor([p[0] for p in products], dtype=torch.int64)
        self.rate = torch.tensor([cost.RATES.index(p[1]) for p in products], dtype=torch.int64)
        is_bf16 = self.rate == cost.RATES.index("bf16_tflops")
        self.bf16 = is_bf16.to(torch.int64)
        self.work = _tensor([2e-9 * math.prod(shape) for _, _, shape, _, _ in products])
        self.full = _tensor([cut.full for cut in cuts])
        self.terms = torch.where(is_bf16, _tensor([p[2][2] for p in products]), _tensor([cut.terms for cut in cuts]))
        size = [(cost.ELEMENT if p[1] == "bf16_tflops" else 1) * (m * k + n * k) + cost.ELEMENT * m * n
                for p in products for m, n, k in [p[2]]]  # fmt: skip
        self.moved = 1e-9 * _tensor(size)
        self.copied = 1e-9 * _tensor([o.copy for o in found])
        self.quantized = 1e-9 * _tensor([sum(size for size, _ in o.passes) for o in found])
        counted = [len(o.products) + bool(o.copy) + sum(kernels for _, kernels in o.passes) for o in found]
        self.launches = 1e-3 * _tensor(counted) * bool(c.processors)

    def ms(self, x: dict[str, float]) -> torch.Tensor:
        rates = _tensor([x.get(name) or 1.0 for name in cost.RATES])
        fill, ramp = _tensor([1.0, x["bf16_fill"]])[self.bf16], _tensor([x["ramp"], x["bf16_ramp"]])[self.bf16]
        computing = self.work * (1 + ramp / self.terms) / (rates[self.rate] * self.full**fill)
        products = torch.zeros_like(self.log_ms)
        products.index_add_(0, self.at, torch.maximum(computing, self.moved / x["tb_s"]))
        passes = self.quantized / (x["tb_s"] * x["quantize_share"])
        return products + self.copied / x["tb_s"] + passes + self.launches * x["launch_us"]

    def errors(self, x: dict[str, float]) -> torch.Tensor:
        return torch.log(self.ms(x)) - self.log_ms

    def objective(self, x: dict[str, float]) -> float:
        return float(torch.sqrt(1 + (self.errors(x) / KNEE) ** 2).mean())

    def slopes(self, x: dict[str, float], free: Sequence[str]) -> torch.Tensor:
        """(observations, free): of the errors, by the coordinates of `moved`, from both sides where the range has both."""
        columns = []
        for name in free:
            above, below = moved(name, x[name], 1e-4), moved(name, x[name], -1e-4)
            step = 1e-4 * ((above != x[name]) + (below != x[name]))
            columns.append((self.errors({**x, name: above}) - self.errors({**x, name: below})) / step)
        return torch.stack(columns, 1)


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def constants(c: Ceilings) -> dict[str, float]:
    return {name: getattr(c, name) for name in CONSTANTS if getattr(c, name) is not None}


def moved(name: str, value: float, step: float) -> float:
    """A constant one step further, of its logarithm or of itself in its scale, within its range."""
    low, high = cost.FITTED.get(name, (1e-6, 1e6))
    if name in LINEAR_SCALE:
        return min(max(value + step * LINEAR_SCALE[name], low), high)
    return min(max(max(value, 1e-3) * math.exp(step), low), high)


# ---- the fit


@dataclass(frozen=True)
class Fitted:
    """ceilings: those fitted. errors: the standard error of each constant that was, of its logarithm, or of itself where it
    may be 0. kept: why another was not."""

    ceilings: Ceilings
    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def fit(found: Sequence[Observation], c: Ceilings) -> Fitted:
    """The constants of `c` fitted to the observations that are to be.

    One that they leave more uncertain than TOLD keeps its value, and one of `cost.FITTED` that is not further from it than
    two standard errors: of several the last of CONSTANTS, which holds for the fewest observations, until none is left.
    """
    found = [o for o in found if not o.why]
    start, kept = constants(c), {name: "there is no such rate" for name in CONSTANTS if getattr(c, name) is None}
    model = Model(found, c)
    if found:
        slopes = model.slopes(start | dict.fromkeys(("bf16_ramp", "ramp"), 1.0), list(start))
        kept |= {name: "no measurement depends on it" for name, column in zip(start, slopes.T, strict=True)
                 if not bool((column.abs() > 1e-3).any())}  # fmt: skip
    while True:
        free = [name for name in CONSTANTS if name not in kept]
        if not found or not free:
            return Fitted(c, {}, kept)
        x = _least(model, start, free)
        errors = _standard_errors(model, x, free)
        vague = [name for name in free if errors[name] > TOLD[name]]
        same = [name for name in free if name in cost.FITTED and _apart(name, x[name], start[name]) < 2 * errors[name]]
        if vague:
            kept[vague[-1]] = f"the measurements tell it to ± {_uncertain(vague[-1], errors[vague[-1]])} alone"
        elif same:
            kept[same[-1]] = "the measurements agree with it"
        else:
            return Fitted(replace(c, **_polished(model, x, free), source="measured"), errors, kept)


def _apart(name: str, a: float, b: float) -> float:
    """In the terms of its standard error."""
    return abs(a - b) if name in LINEAR_SCALE else abs(math.log(max(a, 1e-3) / max(b, 1e-3)))


def _uncertain(name: str, error: float) -> str:
    if name in LINEAR_SCALE:
        return f"{error:.2g}"
    return f"{100 * error:.0f} %" if error < 1 else "anything"


def _least(model: Model, start: dict[str, float], free: Sequence[str]) -> dict[str, float]:
    """The objective's least, by the method of Levenberg and Marquardt with its tails weighted."""
    x, best, damping = dict(start), model.objective(start), 1e-3
    for _ in range(100):
        errors, slopes = model.errors(x), model.slopes(x, free)
        weights = 1 / torch.sqrt(1 + (errors / KNEE) ** 2)
        normal, gradient = slopes.T @ (weights[:, None] * slopes), slopes.T @ (weights * errors)
        while damping < 1e9:
            scale = torch.diag(normal.diagonal().clamp_min(1e-9) * damping)
            step = -torch.linalg.solve(normal + scale, gradient).clamp(-2, 2)
            tried = x | {name: moved(name, x[name], float(s)) for name, s in zip(free, step, strict=True)}
            value = model.objective(tried)
            if value < best:
                break
            damping *= 4
        else:
            break
        done, x, best, damping = best - value < 1e-9, tried, value, max(damping / 10, 1e-9)
        if done:
            break
    return x


def _polished(model: Model, x: dict[str, float], free: Sequence[str], step: float = 0.02) -> dict[str, float]:
    """Each constant in turn up or down by a step that shrinks: where memory begins to bound a product the slopes break."""
    best = model.objective(x)
    for _ in range(POLISH):
        before = best
        for name in free:
            for sign in (1, -1):
                tried = {**x, name: moved(name, x[name], sign * step)}
                value = model.objective(tried)
                if value < best - 1e-9:
                    x, best = tried, value
                    break
        if best == before:
            step /= 3
            if step < 1e-5:
                break
    return x


def _standard_errors(model: Model, x: dict[str, float], free: Sequence[str]) -> dict[str, float]:
    """From the slopes, with the errors' typical size, at least that of the KNEE, as the noise of each observation."""
    errors, slopes = model.errors(x), model.slopes(x, free)
    noise = max(1.48 * float(errors.abs().median()), KNEE)
    scaled = slopes.norm(dim=0).clamp_min(1e-12)  # columns of unit length: a singular matrix shows by its diagonal
    unit = slopes / scaled
    covariance = torch.linalg.inv(unit.T @ unit + 1e-10 * torch.eye(len(free), dtype=torch.float64))
    sizes_ = noise * covariance.diagonal().clamp_min(0).sqrt() / scaled
    return {name: float(s) * LINEAR_SCALE.get(name, 1.0) for name, s in zip(free, sizes_, strict=True)}


def left_out(found: Sequence[Observation], c: Ceilings) -> dict[Observation, float]:
    """The error of each observation that is fitted to, with the constants that all other shapes give, from `c` on."""
    errors = {}
    for shape in dict.fromkeys(o.shape for o in found if not o.why):
        rest = [o for o in found if o.shape != shape and not o.why]
        if rest:
            fitted = fit(rest, c).ceilings
            errors |= {o: o.error(fitted) for o in found if o.shape == shape and not o.why}
    return errors


def typical(errors: Sequence[float]) -> float | None:
    """The median size."""
    return statistics.median(map(abs, errors)) if errors else None
