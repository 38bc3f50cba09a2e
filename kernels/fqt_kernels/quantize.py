"""Quantization of a matrix to int8 codes: row-major, transposed, or both; a scale per tensor, row or column.

    x ∘ multiplier ≈ q * scale (+ offset)

Three kernels. `_row_stats_kernel` finds the range of each row (of a transposed view: each column; with one output: the
tensor). `_tile_kernel` then quantizes tile by tile with those ranges. `_rows_kernel` does both from a single read where a
per-row scale is wanted and whole rows fit in registers. Layout is a stride, granularity is data.
"""

import torch
import triton
import triton.language as tl

from ._device import (
    GRID,
    MIN,
    PER_COLUMN,
    PER_ROW,
    PER_TENSOR,
    SYMMETRIC,
    from_ordered,
    is_wide,
    magnitude,
    ordered,
    quantization_params,
    random_bits,
    round_nearest,
    round_stochastic,
    tile_offsets,
    to_codes,
)

GRANULARITY = {"per_tensor": PER_TENSOR, "per_row": PER_ROW, "per_column": PER_COLUMN}
ZERO = {"symmetric": SYMMETRIC, "grid": GRID, "min": MIN}
LOWEST = -(2**31)  # below the ordered bits of every float: the range of nothing

# (BLOCK_M, BLOCK_N, num_warps). Tiles: 64 contiguous bytes of int8 in either layout and 16 elements a thread: with 32,
# tiles whose rows are no multiples of 16 elements, and some others on sm_100, run out of registers.
TILE = (64, 64, 8)
# Statistics: for contiguous rows a program reads long pieces of few rows, for contiguous columns the other way round.
STATS = {"rows": (8, 512, 8), "cols": (128, 32, 8)}
ROWS_MAX_ELEMENTS = 16384  # of one program of _rows_kernel: 64 float32 registers a thread with 8 warps
STATS_MIN_PROGRAMS = 512  # below this many, the reduced dimension is split too


@triton.jit
def _load(x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul,
          MUL_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The tile of x ∘ multiplier at (first_m, first_n), int64, in float32, 0 outside; and its masks of rows and columns."""
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    mask_m = m < M - first_m
    mask_n = n < N - first_n
    corner = x_ptr + first_m * stride_xm + first_n * stride_xn
    x = tl.load(corner + (m * stride_xm + n * stride_xn), mask=mask_m & mask_n, other=0.0).to(tl.float32)
    if mul_ptr is not None:
        if MUL_ROWS:
            x = x * tl.load(mul_ptr + (first_m + m) * stride_mul, mask=mask_m, other=0.0)
        else:
            x = x * tl.load(mul_ptr + (first_n + n) * stride_mul, mask=mask_n, other=0.0)
    return x, mask_m, mask_n


@triton.jit
def _row_stats_kernel(
    x_ptr, mul_ptr, stats_ptr, M, N, stride_xm, stride_xn, stride_mul, groups,
    MUL_ROWS: tl.constexpr, TENSOR: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # stats[0] gathers max ordered(x), stats[1] max ordered(-x); symmetric: stats[0] max magnitude(x) alone.
    # Integer maxima do not depend on the order of the atomics, and a NaN is the largest of all.
    num_m = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) // num_m).to(tl.int64) * (TILES * BLOCK_N)
    hi = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    lo = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    for tile in range(TILES):
        x, mask_m, mask_n = _load(
            x_ptr, mul_ptr, first_m, first_n + tile * BLOCK_N, M, N, stride_xm, stride_xn, stride_mul,
            MUL_ROWS, BLOCK_M, BLOCK_N, WIDE,
        )  # fmt: skip
        mask = mask_m & mask_n
        if SYMMETRIC:
            hi = tl.maximum(hi, tl.where(mask, magnitude(x), -2147483648))
        else:
            hi = tl.maximum(hi, tl.where(mask, ordered(x), -2147483648))
            lo = tl.maximum(lo, tl.where(mask, ordered(-x), -2147483648))
    if TENSOR:
        tl.atomic_max(stats_ptr, tl.max(tl.max(hi, 1), 0))
        if not SYMMETRIC:
            tl.atomic_max(stats_ptr + 1, tl.max(tl.max(lo, 1), 0))
    else:
        rows = first_m + tl.arange(0, BLOCK_M)
        tl.atomic_max(stats_ptr + rows, tl.max(hi, 1), mask=rows < M)
        if not SYMMETRIC:
            tl.atomic_max(stats_ptr + groups + rows, tl.max(lo, 1), mask=rows < M)


@triton.jit
def _codes(x, mask, lo, hi, rng_ptr, stream, first_m, first_n, BITS: tl.constexpr, ZERO: tl.constexpr,
           STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Codes of a tile (0 outside the mask, so that their sums are right), and the scale and offset of its groups."""
    scale, inv, z, i, offset = quantization_params(lo, hi, BITS, ZERO)
    y = (x - z) * inv + i
    y = tl.where(y == y, y, 0.0)  # NaN has no code; the scale carries it
    if STOCHASTIC:
        rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
        blocks = (first_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
        y = round_stochastic(y, random_bits(tl.load(rng_ptr), tl.load(rng_ptr + 1), stream, rows, blocks))
    else:
        y = round_nearest(y)
    return tl.where(mask, to_codes(y, BITS, ZERO), 0), scale, offset


@triton.jit
def _store(q_ptr, qt_ptr, row_sum_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, first_n, M, N,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write a tile of codes row-major and transposed, and add its sums; a None pointer asks for nothing."""
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    if q_ptr is not None:
        tl.store(q_ptr + (first_m * N + first_n) + (m * N + n), q.to(tl.int8), mask=mask_m & mask_n)
    if qt_ptr is not None:
        tl.store(qt_ptr + (first_n * M + first_m) + (n * M + m), q.to(tl.int8), mask=mask_m & mask_n)
    if row_sum_ptr is not None:
        tl.atomic_add(row_sum_ptr + first_m + m, tl.sum(q, 1, keep_dims=True), mask=mask_m)
    if col_sum_ptr is not None:
        tl.atomic_add(col_sum_ptr + first_n + n, tl.sum(q, 0, keep_dims=True), mask=mask_n)


@triton.jit(do_not_specialize=["stream"])
def _tile_kernel(
    x_ptr, mul_ptr, stats_ptr, rng_ptr, q_ptr, qt_ptr, scale_ptr, offset_ptr, row_sum_ptr, col_sum_ptr,
    M, N, stride_xm, stride_xn, stride_mul, groups, stream,
    MUL_ROWS: tl.constexpr, GRANULARITY: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    x, mask_m, mask_n = _load(
        x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul, MUL_ROWS, BLOCK_M, BLOCK_N, WIDE
    )
    if GRANULARITY == 0:
        group = tl.zeros((1, 1), tl.int64)
    elif GRANULARITY == 1:
        group = (first_m + tl.arange(0, BLOCK_M))[:, None]
    else:
        group = (first_n + tl.arange(0, BLOCK_N))[None, :]
    hi = from_ordered(tl.load(stats_ptr + group, mask=group < groups, other=0))
    lo = -hi
    if ZERO != 0:
        lo = -from_ordered(tl.load(stats_ptr + groups + group, mask=group < groups, other=0))
    q, scale, offset = _codes(
        x, mask_m & mask_n, lo, hi, rng_ptr, stream, first_m, first_n, BITS, ZERO, STOCHASTIC, BLOCK_M, BLOCK_N
    )
    _store(
        q_ptr, qt_ptr, row_sum_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, first_n, M, N, BLOCK_M, BLOCK_N, WIDE
    )  # fmt: skip
    # One program writes the scale of each group: the first along the dimensions that share it.
    if (GRANULARITY == 1 or first_m == 0) and (GRANULARITY == 2 or first_n == 0):
        tl.store(scale_ptr + group, scale, mask=group < groups)
        if offset_ptr is not None:
            tl.store(offset_ptr + group, offset, mask=group < groups)


@triton.jit(do_not_specialize=["stream"])
def _rows_kernel(
    x_ptr, mul_ptr, rng_ptr, q_ptr, qt_ptr, scale_ptr, offset_ptr, row_sum_ptr, col_sum_ptr,
    M, N, stride_xm, stride_xn, stride_mul, stream,
    MUL_ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    x, mask_m, mask_n = _load(
        x_ptr, mul_ptr, first_m, 0, M, N, stride_xm, stride_xn, stride_mul, MUL_ROWS, BLOCK_M, BLOCK_N, WIDE
    )
    mask = mask_m & mask_n
    if ZERO == 0:
        hi = from_ordered(tl.max(tl.where(mask, magnitude(x), 0), 1, keep_dims=True))
        lo = -hi
    else:
        hi = from_ordered(tl.max(tl.where(mask, ordered(x), -2147483648), 1, keep_dims=True))
        lo = -from_ordered(tl.max(tl.where(mask, ordered(-x), -2147483648), 1, keep_dims=True))
    q, scale, offset = _codes(
        x, mask, lo, hi, rng_ptr, stream, first_m, 0, BITS, ZERO, STOCHASTIC, BLOCK_M, BLOCK_N
    )  # fmt: skip
    _store(q_ptr, qt_ptr, row_sum_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, 0, M, N, BLOCK_M, BLOCK_N, WIDE)
    rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
    tl.store(scale_ptr + rows, scale, mask=mask_m)
    if offset_ptr is not None:
        tl.store(offset_ptr + rows, offset, mask=mask_m)


def rows_block(m: int, n: int, transposed: bool, aligned: bool = True) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) of `_rows_kernel` for an (m, n) matrix, or None where a row does not fit or would write badly.

    A transposed copy needs 16 rows in a program, so that it is written in pieces of 16 bytes, and aligned rows.
    """
    block_n = max(triton.next_power_of_2(n), 8)
    block_m = min(max(ROWS_MAX_ELEMENTS // block_n, 1) if transposed else max(2048 // block_n, 1), 32)
    if block_n > ROWS_MAX_ELEMENTS or (transposed and (block_m < 16 or not aligned)):
        return None
    return block_m, block_n


def quantize(
    x: torch.Tensor,
    *,
    bits: int,
    granularity: str,
    zero: str,
    multiplier: torch.Tensor | None = None,
    rng: torch.Tensor | None = None,
    stream: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
    single_read: bool | None = None,
    tile: tuple[int, int, int] = TILE,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the quantization of x (M, N), float32, float16 or bfloat16, any strides, M and N ≥ 1.

    rng (2,) int64 (key, step) asks for stochastic rounding, stream is the whole fourth counter word (stream + 256·rank).
    multiplier is (M, 1) or (1, N) float32. single_read forces or forbids `_rows_kernel`; tile is `_tile_kernel`'s launch.

    Returns:
        q (M, N), qt (N, M) int8; scale, offset (1, 1), (M, 1) or (1, N) float32; row_sum (M,), col_sum (N,) int32; None
        for each that was not asked for.
    """
    m, n = x.shape
    dev = x.device
    shape = {"per_tensor": (1, 1), "per_row": (m, 1), "per_column": (1, n)}[granularity]
    groups = shape[0] * shape[1]
    q = torch.empty(m, n, dtype=torch.int8, device=dev) if rows else None
    qt = torch.empty(n, m, dtype=torch.int8, device=dev) if cols else None
    scale = torch.empty(shape, dtype=torch.float32, device=dev)
    offset = None if zero == "symmetric" else torch.empty_like(scale)
    row_sum = torch.zeros(m, dtype=torch.int32, device=dev) if sums and rows else None
    col_sum = torch.zeros(n, dtype=torch.int32, device=dev) if sums and cols else None
    mul_rows = multiplier is not None and multiplier.shape[1] == 1  # else it has one row
    stride_mul = 0 if multiplier is None or multiplier.numel() == 1 else multiplier.stride(0 if mul_rows else 1)
    out = (q, qt, scale, offset, row_sum, col_sum)
    (xm, xn), aligned = x.stride(), n % 16 == 0 and (m % 16 == 0 or not cols) and _aligned(x)
    block = (
        rows_block(m, n, cols, aligned or single_read is True)
        if granularity == "per_row" and single_read is not False
        else None
    )
    if single_read and block is None:
        raise ValueError(
            f"a single read needs per_row and rows that fit in registers, got {granularity}, {tuple(x.shape)}"
        )
    block_m, block_n, *warps = block or tile
    wide = is_wide(block_m * xm + block_n * xn, block_m * n + block_n, block_n * m + block_m)
    flags = dict(MUL_ROWS=mul_rows, BITS=bits, ZERO=ZERO[zero], STOCHASTIC=rng is not None,
                 BLOCK_M=block_m, BLOCK_N=block_n, WIDE=wide, enable_fp_fusion=False)  # fmt: skip
    if block is not None:
        _rows_kernel[(triton.cdiv(m, block_m),)](
            x, multiplier, rng, *out, m, n, xm, xn, stride_mul, stream,
            **flags, num_warps=8 if block_m * block_n > 4096 else 4,
        )  # fmt: skip
        return out
    stats = row_stats(x, granularity, zero == "symmetric", multiplier, stride_mul, mul_rows)
    _tile_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x, multiplier, stats, rng, *out, m, n, xm, xn, stride_mul, groups, stream,
        GRANULARITY=GRANULARITY[granularity], **flags, num_warps=warps[0],
    )  # fmt: skip
    return out


def _aligned(x: torch.Tensor) -> bool:
    """Whether the rows, or the columns, of x start at multiples of 16 elements."""
    return all(s == 1 or s % 16 == 0 for s in x.stride())


def row_stats(
    x: torch.Tensor,
    granularity: str,
    symmetric: bool,
    multiplier: torch.Tensor | None,
    stride_mul: int = 0,
    mul_rows: bool = False,
) -> torch.Tensor:
    """Launch the ranges of x ∘ multiplier: (2, groups) int32, ordered bits of the maximum and of minus the minimum.

    symmetric: (1, groups), of the absolute maximum. A group's range of no elements is LOWEST.
    """
    (m, n), (xm, xn) = x.shape, x.stride()
    if granularity == "per_column":  # the rows of the transposed view
        m, n, xm, xn, mul_rows = n, m, xn, xm, not mul_rows
    groups = 1 if granularity == "per_tensor" else m
    stats = torch.full((1 if symmetric else 2, groups), LOWEST, dtype=torch.int32, device=x.device)
    block_m, block_n, warps = STATS["rows" if xn <= xm else "cols"]
    num_m, num_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    tiles = min(max(num_m * num_n // STATS_MIN_PROGRAMS, 1), num_n)
    tiles = 1 << (tiles - 1).bit_length()  # a power of two: few variants to compile
    _row_stats_kernel[(num_m * triton.cdiv(num_n, tiles),)](
        x, multiplier, stats, m, n, xm, xn, stride_mul, groups,
        MUL_ROWS=mul_rows, TENSOR=granularity == "per_tensor", SYMMETRIC=symmetric, BLOCK_M=block_m, BLOCK_N=block_n,
        TILES=tiles, WIDE=is_wide(block_m * xm + block_n * xn), num_warps=warps,
    )  # fmt: skip
    return stats
