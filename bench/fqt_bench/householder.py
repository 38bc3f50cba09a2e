"""The cases of what BHQ costs: each of its stages against the product that it serves (dgrad), against PSQ, against the
authors' way (`authors_way`).

A layer has dY (M, N), W (N, K) and dX (M, K). An element of dY has e bytes, one of dX o; W's codes are int8. Bytes are
those that a stage has to move, each matrix once, however often a kernel reads it; of a row, what BHQ keeps of it.

    PSQ quantization        (e + 1)·M·N          + 12·M    dY; codes; scale, offset and sum of the codes
    statistics              e·M·N                +  8·M    dY; range and largest magnitude
    grouping                                       20·M    range; order, group, first, s
    transform + quantize    (e + 1)·M·N          + 32·M    dY; codes; the 16 of the groups, magnitude, and PSQ's 12
    inverse                 (4 + o)·M·K          + 28·M    the product in float32; dX; groups, magnitude, range, value
    copy                    2e·M·N                         dY, read and written: what the others' GB/s are held against
    dgrad product           M·N + N·K + o·M·K    + 12·M    codes; dX; PSQ's 12
    product with inverse    M·N + N·K + o·M·K    + 36·M    the same; groups, range, value

An input gradient of BHQ is the sum of its stages: statistics, grouping, transform, and either a product that writes
float32 and the inverse (groups of all rows), or the product with the inverse (groups in tiles of 128 rows). The authors'
stages move M × M matrices in float32 and codes as float32, those of the CPU not counted. The kernels read more than that,
the second time mostly from the L2: the transform reads dY twice (of more than 8192 columns three times, and to choose for
auto twice more), the inverse the product twice.

What BHQ costs beyond PSQ, target T8, is the whole input gradient of the one less that of the other, over PSQ's product.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fqt import cost, gradients, products, reference
from fqt.cli import table
from fqt.gradients import DGRAD
from fqt.householder import TILE, Groups
from fqt.qtensor import QTensor

from . import authors_way
from .cases import BF16_BOUND, ceilings
from .harness import Candidate, Case, check_equal, check_near, check_rounded
from .householder_stages import BITS, FORMS, PSQ, SOURCES, Problem, kernel_stages, torch_stages
from .providers import peer
from .stats import Ratio, of_the_copy, speed_ups

SUITE = "householder"


def title(source: str) -> str:
    """The kind of a case with gradients from this source."""
    return SUITE if source == SOURCES[0] else f"{SUITE}, {source}"


# ---- the candidates


@dataclass(frozen=True)
class Sizes:
    """Bytes that the stages of a layer have to move, by the table above."""

    m: int
    n: int
    k: int
    element: int

    @property
    def quantization(self) -> float:
        return (self.element + 1.0) * self.m * self.n + 12 * self.m

    @property
    def statistics(self) -> float:
        return 1.0 * self.element * self.m * self.n + 8 * self.m

    @property
    def grouping(self) -> float:
        return 20.0 * self.m

    @property
    def transform(self) -> float:
        return (self.element + 1.0) * self.m * self.n + 32 * self.m

    @property
    def inverse(self) -> float:
        return (4.0 + self.element) * self.m * self.k + 28 * self.m

    def product(self, element: int | None = None, row: int = 12) -> float:
        """element: bytes of one of the output."""
        element = self.element if element is None else element
        return 1.0 * self.m * self.n + self.n * self.k + element * self.m * self.k + row * self.m

    @property
    def copy(self) -> float:
        return 2.0 * self.element * self.m * self.n

    @property
    def before(self) -> float:
        """Of BHQ's product."""
        return self.statistics + self.grouping + self.transform


def case(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    sets: int = 2,
    *,
    source: str = "lognormal",
    alone: bool = True,
    authors: bool = True,
    kernels: bool | None = None,
) -> Case:
    """What BHQ costs a layer: whole input gradients and, if asked for, each stage alone and the authors' way.

    kernels: those of `fqt_kernels`, else the CPU backend; None: as the device has them.
    """
    kernels = device.type == "cuda" if kernels is None else kernels
    stages = kernel_stages(device, m, n, k) if kernels else torch_stages()
    p = Problem(m, n, k, device, source, sets, stages)
    size = Sizes(m, n, k, p.dtype.itemsize)
    psq = _psq(p, size)
    made = [
        *psq,
        *((*_stages(p, size), _copy(p, size)) if alone else ()),
        *_whole(p, size),
        *(_authors(p, size) if authors else ()),
    ]
    expected = _expected(size, device)
    made = [replace(c, prediction=expected.get(c.tag, "")) for c in made]
    return Case(title(source), f"{m}x{n}x{k}", "ms", psq[0].name, tuple(made), sets)


def _expected(size: Sizes, device: torch.device) -> dict[str, str]:
    """What `fqt.cost` predicts by tag: of a stage the time of its bytes, of a whole gradient the product and the others'."""
    rates = ceilings(device)
    if rates is None:
        return {}
    try:
        product = cost.product("dgrad", (size.m, size.k, size.n), rates.int8_tops, rates).ms
    except cost.NotModelled:
        return {}
    whole = size.before + size.product(element=4) - size.product() + size.inverse  # but for the product
    moved = {
        "dy copy": size.copy,
        "statistics": size.statistics,
        "psq": size.quantization,
        "inverse global": size.inverse,
    }
    moved |= {f"transform {form}": size.transform for form in FORMS}
    beside = {"product": 0.0, "inverse tile": 0.0, "psq whole": size.quantization, "whole tile": size.before}
    beside |= {"whole global": whole, "whole auto": whole}
    times = {tag: 1e-9 * size / rates.tb_s for tag, size in (moved | beside).items()}
    times |= {tag: product + times[tag] for tag in beside}
    return {tag: f"{ms:.3f} ms ({rates.source})" for tag, ms in times.items()}


def _psq(p: Problem, size: Sizes) -> list[Candidate]:
    """The product that is served, and PSQ's quantization."""

    def right(i: int) -> Tensor:
        return reference.scaled_mm(p.given(i).rows(), p.b)

    def quantize(i: int) -> QTensor:
        return products.quantized(p.dy[i], PSQ, rng=p.rng, stream=DGRAD, sums=True)

    def product(codes: QTensor) -> Tensor:
        return products.product(codes.rows(), p.b, out_dtype=p.dtype)

    check = lambda out, i: check_rounded(out, right(i))  # noqa: E731
    return [
        Candidate("dgrad product", lambda i: product(p.given(i)), check, bytes=size.product(), tag="product"),
        Candidate("PSQ quantization", quantize, lambda out, i: _check_codes(out, p.given(i)), bytes=size.quantization,
                  tag="psq"),
        Candidate("input gradient, PSQ", lambda i: product(quantize(i)), check, bytes=size.quantization + size.product(),
                  tag="psq whole"),
    ]  # fmt: skip


def _check_codes(got: QTensor, want: QTensor) -> str:
    for name in ("q", "scale", "offset", "row_sum"):
        check_equal(getattr(got, name), getattr(want, name), name)
    return "bit-equal"


def _stages(p: Problem, size: Sizes) -> list[Candidate]:
    s = p.stages
    dy, rng = p.dy, p.rng

    def groups(form: str) -> Candidate:
        def check(out: Any, i: int) -> str:
            for name in Groups._fields:
                want = getattr(p.right(i, form)[0].groups, name)
                check_equal(getattr(out, name).to(want.dtype), want, name)
            return "bit-equal"

        return Candidate(f"grouping, {form}", lambda i: s.grouping(p.found(i)[0], form), check, bytes=size.grouping,
                         tag=f"grouping {form}")  # fmt: skip

    def transform(form: str) -> Candidate:
        return Candidate(f"transform + quantize, {form}",
                         lambda i: s.transform(dy[i], p.found(i), p.groups(i, form), FORMS[form], rng),
                         lambda out, i: _check_codes(out, p.right(i, form)[1]), bytes=size.transform,
                         tag=f"transform {form}")  # fmt: skip

    def inverse(i: int) -> Tensor:
        return s.inverse(p.product(i, "global"), p.magnitudes(i, "global"), p.found(i), p.groups(i, "global"),
                         p.value(i), p.columns, p.dtype)  # fmt: skip

    def product(i: int) -> Tensor:
        return s.product(p.right(i, "tile")[1].rows(), p.b, p.found(i), p.groups(i, "tile"), p.value(i), p.columns,
                         p.dtype)  # fmt: skip

    def statistics(out: tuple[Tensor, Tensor | None], i: int) -> str:
        y = dy[i].float()
        if out[1] is not None:
            check_equal(out[1].view(torch.float32), y.abs().amax(1), "magnitudes")
        return check_equal(out[0], y.amax(1) - y.amin(1), "ranges")

    made = [
        Candidate("statistics", lambda i: s.statistics(dy[i]), statistics, bytes=size.statistics, tag="statistics"),
        *map(groups, ("global", "tile")), *map(transform, FORMS),
        Candidate("inverse, global", inverse, lambda out, i: check_rounded(out, p.input_gradient(i, "global")),
                  bytes=size.inverse, tag="inverse global"),
    ]  # fmt: skip
    if s.product is not None:
        made.append(
            Candidate("product with inverse, tile", product, functools.partial(_check_gradient, p, "tile"),
                      bytes=size.product(row=36), tag="inverse tile")
        )  # fmt: skip
    return made


def _copy(p: Problem, size: Sizes) -> Candidate:
    target = functools.cache(lambda: torch.empty_like(p.dy[0]))
    return Candidate("copy_ of dY", lambda i: target().copy_(p.dy[i]), lambda out, i: check_equal(out, p.dy[i]),
                     bytes=size.copy, **peer("torch", p.w.device), tag="dy copy")  # fmt: skip


def _whole(p: Problem, size: Sizes) -> list[Candidate]:
    """dX from dY, as a layer makes it."""

    def of(form: str) -> Candidate:
        z = FORMS[form]

        def run(i: int) -> Tensor:
            t = gradients.transformed(p.dy[i], z, sums=True, rng=p.rng)
            return gradients.product_of_inverse(t, p.b, p.columns, z.groups, p.dtype)

        fused = form == "tile" and p.stages.product is not None
        after = size.product(row=36) if fused else size.product(element=4) + size.inverse
        return Candidate(f"input gradient, BHQ {form}", run, functools.partial(_check_gradient, p, form),
                         bytes=size.before + after, tag=f"whole {form}")  # fmt: skip

    return [of(form) for form in FORMS]


def _check_gradient(p: Problem, form: str, out: Tensor, i: int) -> str:
    """The product with the inverse sums up to 128 rows in float32, by a matrix the absolute sums of whose rows are up to
    √128; all else is rounded once."""
    want = p.input_gradient(i, form)
    if form != "tile" or p.stages.product is None:
        return check_rounded(out, want)
    return check_near(out, want, BF16_BOUND if out.dtype == torch.bfloat16 else (TILE + 16) * TILE**0.5 * 2.0**-24)


def _authors(p: Problem, size: Sizes) -> list[Candidate]:
    """Their stages, whose random numbers are torch's: checked by the bound of the variance."""
    w = functools.cache(lambda: (p.b.q.float() * p.b.scale + p.b.offset).t().contiguous())
    dense = functools.cache(lambda i: authors_way.dense(p.dy[i]))
    codes = functools.cache(lambda i: authors_way.quantize(dense(i).forward @ p.dy[i].float(), BITS))

    def near(out: Tensor, i: int) -> str:
        want = p.dy[i].float()
        return check_near(out, want, (p.variance(i, "global") / float(want.double().square().sum())) ** 0.5)

    def near_product(out: Tensor, i: int) -> str:
        want = reference.mm(p.dy[i].float(), w())
        variance = p.variance(i, "global") * float(w().square().sum(1).max())
        return check_near(out, want, (variance / float(want.double().square().sum())) ** 0.5)

    m, n, k, e = size.m, size.n, size.k, size.element
    square, entries = 4.0 * m * m, 1.0 * m * n
    moved = {
        "T and T⁻¹": e * entries + 2 * square,
        "transform + quantize": square + (e + 4) * entries,
        "inverse": square + 8 * entries,
    }
    floats = 4 * (entries + n * k + m * k)
    near_inverse = lambda out, i: near(dense(i).inverse @ out, i)  # noqa: E731
    made = [
        ("T and T⁻¹", dense.__wrapped__, lambda out, i: near(out.inverse @ (out.forward @ p.dy[i].float()), i)),
        (
            "transform + quantize",
            lambda i: authors_way.quantize(dense(i).forward @ p.dy[i].float(), BITS),
            near_inverse,
        ),
        ("inverse", lambda i: dense(i).inverse @ codes(i), near),
    ]
    fits = 3 <= m <= authors_way.MAX_ROWS
    missing = "" if fits else f"dense M × M matrices: for 3 to {authors_way.MAX_ROWS} rows"
    common = {"provider": "StatQuant's way", "missing": missing}
    return [
        *(Candidate(f"authors' way, {name}", run, check, bytes=moved[name], **common) for name, run, check in made),
        Candidate("authors' way, input gradient", lambda i: authors_way.input_gradient(p.dy[i], w(), BITS), near_product,
                  bytes=sum(moved.values()) + floats, tag="authors whole", **common),
    ]  # fmt: skip


# ---- the table


def costs(record: dict[str, Any]) -> str:
    """What BHQ costs, of a measured case: time, share of the product, ratio to PSQ's quantization, bytes, and bytes a second
    beside those of a copy of dY."""
    ok = {c["name"]: c for c in record["candidates"] if c["status"] == "ok"}
    over = {tag: _over(ok, tag) for tag in ("product", "psq")}
    header = (
        f"{record['suite']} {record['shape']}",
        "ms",
        "of the product",
        "95 %",
        "of PSQ's quantization",
        "MB to move",
        "GB/s",
        "of the copy",
    )
    rows, shares = [], of_the_copy(record)
    for name, c in ok.items():
        of, psq = (over[tag].get(name) for tag in ("product", "psq"))
        interval = "" if of is None else f"{_short(100 * of.low)}-{_short(100 * of.high)} %"
        rows.append((name, _short(c["ms"]["median"]), "" if of is None else f"{_short(100 * of.value)} %", interval,
                     "" if psq is None else f"{_short(psq.value)}×", _short(c["gb_s"] * c["ms"]["median"]),
                     _short(c["gb_s"]), f"{_short(100 * shares[name])} %" if name in shares else ""))  # fmt: skip
    printed = table(header, rows, right=range(1, len(header)))
    beyond = [row.cells() for row in break_evens(record)]
    return printed + ("\n\n" + table(BREAK_EVEN_HEADER, beyond, right=(1, 2, 3)) if beyond else "")


# ---- from which width on


OVERHEAD = 0.1  # of PSQ's whole input gradient
BREAK_EVEN_HEADER = ("input gradient", "ms beyond PSQ", "of PSQ's", f"below {100 * OVERHEAD:.0f} % from K")


@dataclass(frozen=True)
class BreakEven:
    """extra: ms of dX with BHQ beyond dX with PSQ, as measured whole. share: of PSQ's. width: the least K from which on the
    overhead is at most `OVERHEAD`, by the measured pieces; inf: never; None: a piece was not measured."""

    form: str
    extra: float
    share: float
    width: float | None

    def cells(self) -> tuple[str, str, str, str]:
        width = "not measured" if self.width is None else "never" if math.isinf(self.width) else f"{self.width:.0f}"
        return f"BHQ {self.form}", f"{self.extra:.3g}", f"{100 * self.share:.3g} %", width


def break_evens(record: dict[str, Any]) -> list[BreakEven]:
    """BHQ against PSQ, of a measured case (M, N, K), for groups of all rows and in tiles; none where dX was not measured."""
    ms = {c["tag"]: c["ms"]["median"] for c in record["candidates"] if c["status"] == "ok" and c["tag"]}
    found = []
    for form in ("global", "tile"):
        if "psq whole" in ms and f"whole {form}" in ms:
            extra = ms[f"whole {form}"] - ms["psq whole"]
            width = _width(ms, form, int(record["shape"].split("x")[2]))
            found.append(BreakEven(form, extra, extra / ms["psq whole"], width))
    return found


def _width(ms: dict[str, float], form: str, k: int) -> float | None:
    """The least K' with C + I·K'/K <= OVERHEAD·(Q + P·K'/K), for which that holds from there on; see `BreakEven.width`.

    Assumes, M and N fixed: the time of the product P and of the inverse I is linear in K; that of PSQ's quantization Q and
    of what BHQ does beyond it before the product, C = statistics + grouping + transform − Q, does not depend on K. I of a
    product with the inverse is what it takes beyond P. That a product before an inverse writes float32 is not counted.
    """
    fused = form == "tile" and "inverse tile" in ms
    pieces = ("product", "psq", "statistics", f"grouping {form}", f"transform {form}",
              "inverse tile" if fused else "inverse global")  # fmt: skip
    if any(tag not in ms for tag in pieces):
        return None
    product, psq, *before, inverse = (ms[tag] for tag in pieces)
    inverse -= product if fused else 0.0
    fixed, gain = sum(before) - psq - OVERHEAD * psq, OVERHEAD * product - inverse
    if gain < 0 or (gain == 0 and fixed > 0):
        return math.inf
    return 1.0 if fixed <= 0 else max(1.0, math.ceil(k * fixed / gain))


def _over(ok: dict[str, dict[str, Any]], tag: str) -> dict[str, Ratio]:
    """The times of the candidates over that of the one with this tag, by name; empty where it was not measured."""
    base = next((c for c in ok.values() if c["tag"] == tag), None)
    if base is None:
        return {}
    faster = speed_ups(base["samples_ms"], {name: c["samples_ms"] for name, c in ok.items()})
    return {name: Ratio(1 / r.value, 1 / r.high, 1 / r.low) for name, r in faster.items()}


def _short(value: float) -> str:
    """Three digits: 1.32, 0.0123, 987."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
