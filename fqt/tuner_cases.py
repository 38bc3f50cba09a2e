"""What tuning measures: the benchmark's case of a problem, with every kernel that may be launched for it.

Products are of quantized Gaussians and write bfloat16; quantizations are of Gaussians in the problem's dtype. Every
output is compared with `fqt.reference` before and after it is timed. `tuner_conv` has the operators of convolutions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import conv_problems, reference, tuned
from .candidates import Candidate, title
from .dispatch import Problem
from .products import launcher
from .qtensor import Operand, QTensor
from .recipe import Quantizer

BF16 = "torch bf16"
_STREAMS = (0, 1)
LOSSY = 0.05  # of a bf16 product beside that of 8-bit codes: their own error is 1.4 % (int8) and 4 % (e4m3)
# The grid of an exhaustive search, of the portable kernel: what a tensor core and a pipeline can use.
_GRID = tuple(itertools.product((64, 128, 256), (64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5)))
_GRID_SHARED = {
    "sm80": 163,
    "sm90": 227,
    "sm100": 227,
    "sm103": 227,
    "gfx942": 64,
    "gfx950": 160,
}  # KiB a program may have


def shape(problem: Problem) -> str:
    """ "8192x4096x4096" of a product, "8192x4096" of a matrix."""
    return "x".join(map(str, (problem.m, problem.n, problem.k) if problem.k else (problem.m, problem.n)))


def describe(problem: Problem) -> str:
    """A problem's key in words, and its sizes: what tells it from every other that is tuned."""
    words = "" if problem.op in tuned.CODES_ONLY else problem.dtype
    return " ".join(filter(None, (problem.op, problem.format, words, problem.kind, shape(problem))))


def grid(problem: Problem) -> tuple[Candidate, ...]:
    """Configurations of the portable kernel that fit the GPU: what an exhaustive search of a product looks through."""
    from fqt_kernels import gemm

    if problem.op != "scaled_mm" or (problem.format == "int" and problem.k > gemm.MAX_INT32_TERMS):
        return ()
    shared = _GRID_SHARED.get(problem.arch, 99) * 1024

    def fits(config: tuple[int, ...]) -> bool:
        block_m, block_n, block_k, warps, stages = config
        accumulators = block_m * block_n // (32 * warps)  # registers of a thread, of 255
        return (block_m + block_n) * block_k * stages <= shared and accumulators <= 128 and gemm.fits(config, problem.n)

    return tuple(Candidate("portable", config) for config in _GRID if fits(config))


def build(
    problem: Problem,
    candidates: Iterable[Candidate],
    device: torch.device,
    sets: int = 2,
    yardstick: bool = True,
    exact: bool = True,
):
    """The `fqt_bench.harness.Case` of a problem: the candidates by their titles and, of a product, torch's in bf16.

    sets: of inputs, each with values of its own. exact: False for any codes at all, a byte each to make, where nothing is
    checked or timed. Nothing is launched before a candidate runs but what makes the inputs.
    """
    from fqt_bench.harness import Case

    if problem.op in conv_problems.GRAMMAR:
        from . import tuner_conv

        made, bf16 = tuner_conv.made(problem, tuple(candidates), device, sets, exact)
    else:
        product = functools.partial(_product, make=_codes if exact else _any_codes)
        make = product if problem.op == "scaled_mm" else _quantization if problem.op == "quantize" else _gradient
        made, bf16 = list(make(problem, tuple(candidates), device, sets)), _bf16
    first = [bf16(problem, made, device, sets)] if yardstick and problem.op in tuned.PRODUCTS else []
    every = (*first, *(candidate for candidate, _ in made))
    # Without a baseline: of ratios with their intervals, which take a while to compute, nothing is needed.
    return Case(problem.op, describe(problem), "ms", "", every, sets)


def ours(candidate: Candidate, run: Callable[[int], Any], check: Callable[[Any, int], str], same_bits: str = ""):
    from fqt_bench import harness

    return harness.Candidate(title(candidate), run, check, same_bits=same_bits)


# ---- products


def _product(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int, make: Callable[..., Operand]
) -> Iterator[tuple]:
    """(harness candidate, what its outputs should be) of each candidate."""
    from fqt_bench.cases import BF16_BOUND
    from fqt_bench.harness import check_near, check_rounded
    from fqt_bench.products import FP8_BOUND
    from fqt_kernels.gemm import MAX_INT32_TERMS

    m, n, k = problem.m, problem.n, problem.k
    a = [make(m, k, problem.format, device, 2 * i) for i in range(sets)]
    b = [make(n, k, problem.format, device, 2 * i + 1) for i in range(sets)]
    expected = functools.cache(lambda i: reference.scaled_mm(a[i], b[i]))

    def check(out: Tensor, i: int) -> str:
        if problem.format == "e4m3":
            return check_near(out, expected(i), FP8_BOUND)
        if (
            k > MAX_INT32_TERMS
        ):  # the pieces of the sum are added in float32: a sum near zero keeps their rounding error
            return check_near(out, expected(i), BF16_BOUND)
        return check_rounded(out, expected(i))

    same_bits = problem.format if problem.format == "int" else ""  # float8 sums follow the configuration
    for candidate in candidates:
        launch = launcher(candidate, problem.processors)

        def run(i: int, launch: Callable[..., Tensor] = launch) -> Tensor:
            return launch(a[i].q, b[i].q, a[i].scale, b[i].scale, out_dtype=torch.bfloat16)

        yield ours(candidate, run, check, same_bits), expected


def _codes(rows: int, k: int, format: str, device: torch.device, seed: int) -> Operand:
    """Quantized Gaussians (rows, k), a scale per row."""
    from fqt_bench.cases import ROW, gaussian, quantize_exactly

    x = gaussian(rows, k, device=device, seed=seed)
    if format == "int":
        return quantize_exactly(x, ROW).rows()
    scale = x.float().abs().amax(1, keepdim=True) / 448.0
    return Operand((x.float() / scale).to(torch.float8_e4m3fn), scale.flatten(), None, None)


def _any_codes(rows: int, k: int, format: str, device: torch.device, seed: int) -> Operand:
    """Finite codes (rows, k) with scales of 1, without the memory that quantizing takes: processes share a GPU."""
    q = torch.randint(0, 120, (rows, k), dtype=torch.int8, device=device)
    return Operand(q if format == "int" else q.view(torch.float8_e4m3fn), torch.ones(rows, device=device), None, None)


def _bf16(problem: Problem, made: list[tuple], device: torch.device, sets: int):
    """The yardstick, on the Gaussians that the codes are of."""
    from fqt_bench.cases import gaussian
    from fqt_bench.harness import Candidate as Timed
    from fqt_bench.harness import check_near

    x = [gaussian(problem.m, problem.k, device=device, seed=2 * i) for i in range(sets)]
    w = [gaussian(problem.n, problem.k, device=device, seed=2 * i + 1) for i in range(sets)]

    def check(out: Tensor, i: int) -> str:
        return check_near(out, made[0][1](i), LOSSY) if made else ""

    return Timed(BF16, lambda i: torch.matmul(x[i], w[i].t()), check, provider="torch")


# ---- quantizations


def _quantization(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int
) -> Iterator[tuple]:
    from fqt_kernels.quantize import quantize
    from fqt_kernels.statistics import is_symmetric, row_stats

    words = problem.kind.split()
    granularity = next(word for word in words if word.startswith("per_"))
    z = quantizer_of(granularity, problem.format, "stochastic" if "stochastic" in words else "nearest")
    layout = {"rows": "cols" not in words, "cols": "cols" in words or "both" in words}
    x, rng = _matrices(problem, device, sets), rng_of(device)
    stats = [row_stats(t, granularity, is_symmetric(_zero(z))) if "stats" in words else None for t in x]
    expected = functools.cache(lambda i: _exactly(x[i], z, rng=rng, **layout))

    for candidate in candidates:
        kernel, tile, _ = candidate

        def run(i: int, kernel: str = kernel, tile: tuple[int, ...] = tile) -> tuple[Tensor | None, ...]:
            return quantize(
                x[i], bits=8, granularity=granularity, zero=_zero(z), rng=rng if z.rounding == "stochastic" else None,
                kernel=kernel, tile=tile or None, stats=stats[i], **layout,
            )  # fmt: skip

        yield ours(candidate, run, lambda out, i: same(out, expected(i))), expected


def _gradient(problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int) -> Iterator[tuple]:
    """Both quantizations of dY; scales of X and W are folded into it where its columns have scales, as recipe int8 does."""
    from fqt_bench.cases import gaussian
    from fqt_kernels.gradient import Side, quantize_gradient

    words = problem.kind.split()
    g, h = (quantizer_of(word, problem.format, "stochastic") for word in words if word.startswith("per_"))
    affine = g.zero != "symmetric" or h.zero != "symmetric"
    folded = h.granularity == "per_column"
    dy, rng = _matrices(problem, device, sets), rng_of(device)
    row_mul = gaussian(problem.m, device=device, seed=98).float() if folded else None
    col_mul = gaussian(problem.n, device=device, seed=97).float() if folded else None

    def want(i: int) -> tuple[Tensor | None, ...]:
        a = _exactly(dy[i], g, multiplier=col_mul[None] if folded else None, rng=rng, stream=_STREAMS[0], sums=affine)
        b = _exactly(dy[i], h, multiplier=row_mul[:, None] if folded else None, rng=rng, stream=_STREAMS[1], rows=False,
                     cols=True, sums=affine)  # fmt: skip
        return a.q, a.scale, a.offset, a.row_sum, b.qt, b.scale, b.offset, b.col_sum

    expected = functools.cache(want)
    for candidate in candidates:

        def run(i: int, tile: tuple[int, ...] = candidate.config) -> tuple[Tensor | None, ...]:
            rows, cols, _ = quantize_gradient(
                dy[i], *(Side(8, z.granularity, _zero(z)) for z in (g, h)), row_mul=row_mul, col_mul=col_mul,
                rng=rng, streams=_STREAMS, sums=affine, tile=tile or None,
            )  # fmt: skip
            return *rows, *cols

        yield ours(candidate, run, lambda out, i: same(out, expected(i))), expected


def quantizer_of(granularity: str, format: str, rounding: str) -> Quantizer:
    """The quantizer of the recipes of this granularity. Zero is no part of a problem: one stands for all."""
    zero = "grid" if granularity == "per_tensor" and format == "int" else "symmetric"
    return Quantizer(8, granularity, zero, rounding, format=format)


def _zero(z: Quantizer) -> str:
    return "e4m3" if z.format == "e4m3" else z.zero


def _exactly(x: Tensor, z: Quantizer, *, multiplier: Tensor | None = None, **more: Any) -> QTensor:
    """`fqt.reference.quantize` with parameters from the CPU, of either format (see `fqt_bench.cases`)."""
    from fqt_bench.cases import quantize_exactly

    if z.format == "int":
        return quantize_exactly(x, z, multiplier=multiplier, **more)
    rng, stream, rows, cols = (more.get(name) for name in ("rng", "stream", "rows", "cols"))
    y = x.float() if multiplier is None else x.float() * multiplier
    high = y.abs().amax({"per_tensor": (0, 1), "per_row": (1,), "per_column": (0,)}[z.granularity], keepdim=True).cpu()
    scale, inv, *_ = reference.quantization_params(-high, high, 8, "symmetric", "e4m3")
    bits = reference.random_bits(rng, *x.shape, stream=stream or 0) if z.rounding == "stochastic" else None
    q = reference.round_e4m3(y * inv.to(x.device), z.rounding, bits)
    qt = q.view(torch.int8).t().contiguous().view(q.dtype) if cols else None
    return QTensor(q if rows is not False else None, qt, scale.to(x.device), None)


def same(out: Iterable[Tensor | None], want: Iterable[Tensor | None]) -> str:
    """All of the outputs bit-equal, and there where they should be."""
    from fqt_bench.harness import Wrong, check_equal

    for place, (got, expected) in enumerate(zip(out, want, strict=True)):
        if (got is None) != (expected is None):
            raise Wrong(f"output {place} is {'missing' if got is None else 'not asked for'}")
        if got is not None:
            check_equal(*(t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t for t in (got, expected)))
    return "bit-equal"


def _matrices(problem: Problem, device: torch.device, sets: int) -> list[Tensor]:
    from fqt_bench.cases import gaussian

    (m, n), dtype = (problem.m, problem.n), getattr(torch, problem.dtype)
    if "strided" in problem.kind.split():
        return [gaussian(n, m, device=device, seed=i, dtype=dtype).t() for i in range(sets)]
    return [gaussian(m, n, device=device, seed=i, dtype=dtype) for i in range(sets)]


def rng_of(device: torch.device) -> Tensor:
    return torch.tensor([0x0123456789ABCDEF, 7], device=device)
