"""Ranges of the groups of a matrix, and the quantization parameters that follow from them.

Two steps, so that no step needs an atomic or a cleared buffer: a kernel of many programs writes the extremes of its part
of each group (`_row_stats_kernel` here, `_gradient_stats_kernel`, or the epilogue of a matrix product), `_params_kernel`
reduces the parts of a group and computes its scale.

    partial (1 or 2, S, groups) int32: ordered bits of S partial maxima and, for codes with an offset, of minus the minima
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import (
    E4M3,
    GRID,
    MIN,
    SYMMETRIC,
    from_ordered,
    is_wide,
    magnitude,
    ordered,
    quantization_params,
    tile_offsets,
)

ZERO = {"symmetric": SYMMETRIC, "grid": GRID, "min": MIN, "e4m3": E4M3}
LOWEST = -(2**31)  # below the ordered bits of every float: the range of nothing

# (BLOCK_M, BLOCK_N, num_warps): for contiguous rows a program reads long pieces of few rows, for contiguous columns the
# other way round.
STATS = {"rows": (8, 512, 8), "cols": (64, 64, 8)}
STATS_MIN_PROGRAMS = 512  # below this many, the reduced dimension is split too


class Params(NamedTuple):
    """Of each group: scale and offset (None where symmetric) of its codes; inv and zp (None where symmetric), which the
    codes are computed with; all float32. scale and offset have the shape asked for, inv and zp are (groups,)."""

    scale: torch.Tensor
    offset: torch.Tensor | None
    inv: torch.Tensor
    zp: torch.Tensor | None


def is_symmetric(zero: str) -> bool:
    """Whether codes of this kind have no offset, so that a range is one number, the absolute maximum."""
    return zero in ("symmetric", "e4m3")


@triton.jit
def load_tile(x_ptr, first_m, first_n, M, N, stride_xm, stride_xn,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
              KEEP: tl.constexpr = 0):  # fmt: skip
    """The tile of x at (first_m, first_n), int64, in float32, 0 outside; and its masks of rows and columns.

    KEEP: 1 asks the L2 to hold on to it, -1 to let go of it.
    """
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    mask_m = m < M - first_m
    mask_n = n < N - first_n
    corner = x_ptr + first_m * stride_xm + first_n * stride_xn
    ptrs = corner + (m * stride_xm + n * stride_xn)
    if KEEP == 1:
        x = tl.load(ptrs, mask=mask_m & mask_n, other=0.0, eviction_policy="evict_last")
    elif KEEP == -1:
        x = tl.load(ptrs, mask=mask_m & mask_n, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(ptrs, mask=mask_m & mask_n, other=0.0)
    return x.to(tl.float32), mask_m, mask_n


@triton.jit
def load_multiplied(x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul,
                    MUL_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
                    KEEP: tl.constexpr = 0):  # fmt: skip
    """`load_tile` of x ∘ multiplier, which has a factor for each row or each column, or is None."""
    x, mask_m, mask_n = load_tile(x_ptr, first_m, first_n, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, WIDE, KEEP)
    if mul_ptr is not None:
        m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
        if MUL_ROWS:
            x = x * tl.load(mul_ptr + (first_m + m) * stride_mul, mask=mask_m, other=0.0)
        else:
            x = x * tl.load(mul_ptr + (first_n + n) * stride_mul, mask=mask_n, other=0.0)
    return x, mask_m, mask_n


@triton.jit
def widen(hi, lo, x, mask, SYM: tl.constexpr):
    """The running extremes hi and lo (ordered bits of the maximum and of minus the minimum) with a tile x added."""
    if SYM:
        hi = tl.maximum(hi, tl.where(mask, magnitude(x), -2147483648))
    else:
        hi = tl.maximum(hi, tl.where(mask, ordered(x), -2147483648))
        lo = tl.maximum(lo, tl.where(mask, ordered(-x), -2147483648))
    return hi, lo


@triton.jit
def _row_stats_kernel(
    x_ptr, mul_ptr, partial_ptr, M, N, stride_xm, stride_xn, stride_mul, parts, groups,
    MUL_ROWS: tl.constexpr, TENSOR: tl.constexpr, SYM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(0) // num_m
    first_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M
    first_n = part.to(tl.int64) * (TILES * BLOCK_N)
    hi = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    lo = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    for tile in range(TILES):
        x, mask_m, mask_n = load_multiplied(
            x_ptr, mul_ptr, first_m, first_n + tile * BLOCK_N, M, N, stride_xm, stride_xn, stride_mul,
            MUL_ROWS, BLOCK_M, BLOCK_N, WIDE,
        )  # fmt: skip
        hi, lo = widen(hi, lo, x, mask_m & mask_n, SYM)
    if TENSOR:
        tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(hi, 1), 0))
        if not SYM:
            tl.store(partial_ptr + parts + tl.program_id(0), tl.max(tl.max(lo, 1), 0))
    else:
        rows = first_m + tl.arange(0, BLOCK_M)
        out = partial_ptr + part.to(tl.int64) * groups + rows
        tl.store(out, tl.max(hi, 1), mask=rows < M)
        if not SYM:
            tl.store(out + tl.cast(parts, tl.int64) * groups, tl.max(lo, 1), mask=rows < M)


@triton.jit
def _params_kernel(
    partial_ptr, sums_ptr, scale_ptr, offset_ptr, inv_ptr, zp_ptr, total_ptr, parts, groups,
    BITS: tl.constexpr, ZERO: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = g < groups
    hi = tl.full((BLOCK_S, BLOCK_G), -2147483648, tl.int32)
    lo = tl.full((BLOCK_S, BLOCK_G), -2147483648, tl.int32)
    total = tl.zeros((BLOCK_S, BLOCK_G), tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (s < parts) & mask_g[None, :]
        at = s * groups + g[None, :]
        if partial_ptr is not None:
            hi = tl.maximum(hi, tl.load(partial_ptr + at, mask=mask, other=-2147483648))
            if ZERO == 1 or ZERO == 2:
                second = partial_ptr + tl.cast(parts, tl.int64) * groups
                lo = tl.maximum(lo, tl.load(second + at, mask=mask, other=-2147483648))
        if sums_ptr is not None:
            total += tl.load(sums_ptr + at, mask=mask, other=0.0)
    if partial_ptr is not None:
        high = from_ordered(tl.max(hi, 0))
        low = -high
        if ZERO == 1 or ZERO == 2:
            low = -from_ordered(tl.max(lo, 0))
        scale, inv, zp, offset = quantization_params(low, high, BITS, ZERO)
        tl.store(scale_ptr + g, scale, mask=mask_g)
        tl.store(inv_ptr + g, inv, mask=mask_g)
        if ZERO == 1 or ZERO == 2:
            tl.store(offset_ptr + g, offset, mask=mask_g)
            tl.store(zp_ptr + g, zp, mask=mask_g)
    if total_ptr is not None:
        tl.store(total_ptr + g, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=mask_g)


def empty_params(shape: tuple[int, int], zero: str, device: torch.device, between: bool = True) -> Params:
    """Room for the parameters of shape[0] · shape[1] groups.

    between: for inv and zp too, which one kernel leaves to another; else they are None.
    """
    new = lambda *s: torch.empty(s, dtype=torch.float32, device=device)  # noqa: E731
    rooms = 1 if is_symmetric(zero) else 2  # without or with offset and zp
    scale, offset = (new(*shape) if i < rooms else None for i in range(2))
    inv, zp = (new(shape[0] * shape[1]) if between and i < rooms else None for i in range(2))
    return Params(scale, offset, inv, zp)


def params(
    partial: torch.Tensor | None,
    out: Params | None,
    bits: int,
    zero: str,
    *,
    sums: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Launch the parameters of the groups from their partial extremes, into out, whose tensors are contiguous.

    sums (S, groups) float32 with total (groups,): also, or without partial only, the sums of the parts, in one order.
    """
    _, parts, groups = partial.shape if partial is not None else (1, *sums.shape)
    block_s, block_g = (1024, 1) if groups == 1 else (16, 32)
    scale, offset, inv, zp = (None,) * 4 if out is None else out
    _params_kernel[(-(-groups // block_g),)](
        partial, sums, scale, offset, inv, zp, total, parts, groups,
        BITS=bits, ZERO=ZERO[zero], BLOCK_S=block_s, BLOCK_G=block_g, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def row_stats(
    x: torch.Tensor, granularity: str, symmetric: bool, multiplier: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch the partial extremes of x ∘ multiplier, x (M, N) with M, N ≥ 1: (1 if symmetric else 2, S, groups) int32.

    multiplier is (M, 1) or (1, N) float32.
    """
    (m, n), (xm, xn) = x.shape, x.stride()
    stride_mul, mul_rows = multiplier_stride(multiplier)
    if granularity == "per_column":  # the rows of the transposed view
        m, n, xm, xn, mul_rows = n, m, xn, xm, not mul_rows
    block_m, block_n, warps = STATS["rows" if xn <= xm else "cols"]
    num_m, num_n = -(-m // block_m), -(-n // block_n)  # triton.cdiv takes 2 µs
    tiles = min(max(num_m * num_n // STATS_MIN_PROGRAMS, 1), num_n)
    tiles = 1 << (tiles - 1).bit_length()  # a power of two: few variants to compile
    programs = num_m * -(-num_n // tiles)
    tensor = granularity == "per_tensor"
    parts, groups = (programs, 1) if tensor else (programs // num_m, m)
    partial = torch.empty(1 if symmetric else 2, parts, groups, dtype=torch.int32, device=x.device)
    _row_stats_kernel[(programs,)](
        x, multiplier, partial, m, n, xm, xn, stride_mul, parts, groups,
        MUL_ROWS=mul_rows, TENSOR=tensor, SYM=symmetric, BLOCK_M=block_m, BLOCK_N=block_n,
        TILES=tiles, WIDE=is_wide(block_m * xm + block_n * xn), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return partial


def multiplier_stride(multiplier: torch.Tensor | None) -> tuple[int, bool]:
    """(stride along the factors, whether there is one for each row) of a multiplier (M, 1), (1, N) or None."""
    if multiplier is None:
        return 0, False
    by_row = multiplier.shape[1] == 1
    return 0 if multiplier.numel() == 1 else multiplier.stride(0 if by_row else 1), by_row
