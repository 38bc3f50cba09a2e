"""Every launch that the compiler gate compiles: the launchers themselves, called with tensors that have no memory.

A launch has a name that says what is special about it, and may start several kernels. "odd" marks the launches that
write (and, quantizing, read) matrices whose rows are no whole multiples of 16 bytes.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from fqt_kernels import gemm, quantize

from .table import ARCHES, config_name

Launch = Callable[[], object]
_empty = functools.partial(torch.empty, device="meta")
_codes = functools.partial(_empty, dtype=torch.int8)
_sums = functools.partial(_empty, dtype=torch.int32)


def launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all that is compiled for an architecture."""
    family = ARCHES[arch]
    for config in gemm.CONFIGS[family]:
        yield from _products(config, 4096, "")
    yield from _products(gemm.FLUSH_CONFIG[family], 200_704, "flush ")
    yield from _row_quantizations()
    yield from _tile_quantizations()


def _products(config: tuple[int, ...], k: int, kind: str) -> Iterator[tuple[str, Launch]]:
    """The epilogues of the recipes. "even": extents fill whole tiles; "tail": M and K do not; "odd": nor does N."""
    title = f"{config_name(config)} {kind}"
    product = functools.partial(gemm.scaled_mm, config=config, out_dtype=torch.bfloat16)
    for extents, m, n, terms in (("even", 8192, 4096, k), ("tail", 8191, 4096, k + 16), ("odd", 8191, 4095, k + 16)):
        args = _codes(m, terms), _codes(n, terms), _empty(m)
        offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_sums(m), b_sum=_sums(n))
        if extents != "tail":  # less than the affine epilogue with a tail
            yield f"{title}scales {extents}", functools.partial(product, *args, _empty(n), bias=_empty(n))
        yield f"{title}affine {extents}", functools.partial(product, *args, _empty(1), bias=_empty(n), **offsets)
    args = _codes(8192, k), _codes(4096, k), _empty(8192), None
    yield f"{title}folded even", functools.partial(gemm.scaled_mm, *args, config=config)


def _quantization(m: int, n: int, granularity: str, zero: str, *, stochastic: bool = False, rows: bool = True,
                  cols: bool = False, dtype: torch.dtype = torch.bfloat16, multiplier: tuple[int, int] | None = None,
                  ) -> Launch:  # fmt: skip
    """A launch of `quantize` on a contiguous (m, n) matrix, with sums of codes where zero has an offset."""
    return functools.partial(
        quantize.quantize,
        _empty(m, n, dtype=dtype),
        bits=8,
        granularity=granularity,
        zero=zero,
        multiplier=None if multiplier is None else _empty(multiplier),
        rng=_empty(2, dtype=torch.int64) if stochastic else None,
        rows=rows,
        cols=cols,
        sums=zero != "symmetric",
    )


def _row_quantizations() -> Iterator[tuple[str, Launch]]:
    """From a single read, as the recipes round: X and W to nearest, gradients stochastically.

    From the shortest to the longest row in registers; n = 1024 is the longest that is also written transposed.
    """

    def row(n: int, zero: str, m: int = 8192, **options) -> Launch:
        return _quantization(m, n, "per_row", zero, **options)

    yield "n128 cols symmetric nearest", row(128, "symmetric", cols=True)
    yield "n1024 cols symmetric nearest", row(1024, "symmetric", cols=True)
    yield "n1024 odd cols symmetric nearest", row(1024, "symmetric", m=8191, cols=True)
    yield "n4096 symmetric nearest", row(4096, "symmetric")
    yield "n16384 float32 symmetric nearest", row(16384, "symmetric", dtype=torch.float32)
    for zero in quantize.ZERO:
        yield f"n1024 cols {zero} stochastic", row(1024, zero, cols=True, stochastic=True)
    yield "n1023 odd cols min stochastic", row(1023, "min", m=8191, cols=True, stochastic=True)
    yield "n4096 multiplier symmetric stochastic", row(4096, "symmetric", multiplier=(1, 4096), stochastic=True)
    yield "n4096 min stochastic", row(4096, "min", stochastic=True)
    yield "n16384 grid stochastic", row(16384, "grid", stochastic=True)


def _tile_quantizations() -> Iterator[tuple[str, Launch]]:
    """From two reads, as the recipes round: rows too long for registers, or scales that rows share."""
    m, n = 8192, 28672
    nearest = functools.partial(_quantization, m, n)
    yield "per_tensor both grid nearest", nearest("per_tensor", "grid", cols=True)
    yield "per_row both symmetric nearest", nearest("per_row", "symmetric", cols=True)
    yield "per_row both float32 symmetric nearest", nearest("per_row", "symmetric", cols=True, dtype=torch.float32)
    yield "per_tensor both odd grid nearest", _quantization(m - 1, n - 1, "per_tensor", "grid", cols=True)
    stochastic = functools.partial(_quantization, m, n, stochastic=True)
    yield "per_tensor grid stochastic", stochastic("per_tensor", "grid")
    yield "per_tensor cols grid stochastic", stochastic("per_tensor", "grid", rows=False, cols=True)
    yield "per_row min stochastic", stochastic("per_row", "min")
    yield "per_row multiplier symmetric stochastic", stochastic("per_row", "symmetric", multiplier=(1, n))
    columns = stochastic("per_column", "symmetric", rows=False, cols=True, multiplier=(m, 1))
    yield "per_column cols multiplier symmetric stochastic", columns
    # An extent of 1 reaches a kernel as a constant, not as a number.
    yield "one row odd grid stochastic", _quantization(1, 4096, "per_tensor", "grid", cols=True, stochastic=True)
    yield "one column odd min stochastic", _quantization(4096, 1, "per_column", "min", cols=True, stochastic=True)
    odd = _quantization(m - 1, n - 1, "per_row", "min", cols=True, stochastic=True)
    yield "per_row both odd min stochastic", odd
