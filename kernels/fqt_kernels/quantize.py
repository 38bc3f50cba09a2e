"""Quantization of a matrix to int8 or float8_e4m3fn codes: row-major, transposed, or both; a scale per tensor, row, column.

    x ∘ multiplier ≈ q * scale (+ offset)

With a scale per row, a program finds the ranges of a few rows and quantizes them: `_rows_kernel` from a single read, where
whole rows fit in registers, `_long_rows_kernel` from two, of which the second hits the L2, because a fixed number of
programs walks over the rows together. With any other scale, or ranges that the producer of x found, `_tile_kernel`
quantizes tile by tile once the ranges are known (`statistics`). Layout is a stride, granularity is data.
"""

import functools

import torch
import triton
import triton.language as tl

from ._device import (
    PER_COLUMN,
    PER_ROW,
    PER_TENSOR,
    from_ordered,
    is_wide,
    quantization_params,
    random_words,
    round_codes,
    scaled,
    tile_offsets,
)
from .statistics import (
    ZERO,
    empty_params,
    is_symmetric,
    load_multiplied,
    multiplier_stride,
    params,
    row_stats,
    widen,
)

KERNELS = ("rows", "long_rows", "tile")
GRANULARITY = {"per_tensor": PER_TENSOR, "per_row": PER_ROW, "per_column": PER_COLUMN}

# (BLOCK_M, BLOCK_N, num_warps) of a tile: at least 64 contiguous bytes of codes in either layout. With more than 8 a
# thread, tiles whose rows or columns are no multiples of 16 run out of registers on one GPU or another.
TILE, ODD_TILE = (64, 128, 8), (64, 32, 8)
ROWS_MAX_ELEMENTS = 16384  # of one program of _rows_kernel: 64 float32 registers a thread with 8 warps
LONG_ROWS = (16, 256, 8)  # a tile of _long_rows_kernel: 16 bytes of a transposed row, 512 of a row
LONG_ROWS_PROGRAMS = 4  # of _long_rows_kernel on a processor, at most: fewer where their rows would not fit in the L2


@triton.jit
def codes(x, inv, zp, rng_ptr, stream, first_m, first_n, BITS: tl.constexpr, ZERO: tl.constexpr,
          STOCHASTIC: tl.constexpr, CLIP: tl.constexpr, PTX: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """int8 codes of a tile at (first_m, first_n) of the matrix whose elements the random bits are counted by."""
    words = 0
    if STOCHASTIC:
        rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
        blocks = (first_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
        words = random_words(tl.load(rng_ptr), tl.load(rng_ptr + 1), stream, rows, blocks)
    y = scaled(x, inv, zp, ZERO, STOCHASTIC and ZERO != 3)
    return round_codes(y, words, BITS, ZERO, STOCHASTIC, CLIP, PTX)


@triton.jit
def store_rows(q_ptr, sum_ptr, q, mask_m, mask_n, first_m, first_n, stride_q,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write a tile of codes row-major, and add up its rows; a None pointer asks for nothing."""
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    if q_ptr is not None:
        tl.store(q_ptr + (first_m * stride_q + first_n) + (m * stride_q + n), q, mask=mask_m & mask_n)
    if sum_ptr is not None:
        inside = tl.where(mask_m & mask_n, q.to(tl.int32), 0)
        tl.atomic_add(sum_ptr + first_m + m, tl.sum(inside, 1, keep_dims=True), mask=mask_m)


@triton.jit
def store_columns(qt_ptr, sum_ptr, q, mask_m, mask_n, first_m, first_n, stride_qt,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write a tile of codes transposed, and add up its columns; a None pointer asks for nothing."""
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    if qt_ptr is not None:
        tl.store(qt_ptr + (first_n * stride_qt + first_m) + (n * stride_qt + m), q, mask=mask_m & mask_n)
    if sum_ptr is not None:
        inside = tl.where(mask_m & mask_n, q.to(tl.int32), 0)
        tl.atomic_add(sum_ptr + first_n + n, tl.sum(inside, 0, keep_dims=True), mask=mask_n)


@triton.jit(do_not_specialize=["stream"])
def _tile_kernel(
    x_ptr, mul_ptr, inv_ptr, zp_ptr, rng_ptr, q_ptr, qt_ptr, row_sum_ptr, col_sum_ptr,
    M, N, stride_xm, stride_xn, stride_mul, stream,
    MUL_ROWS: tl.constexpr, GRANULARITY: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, STOCHASTIC: tl.constexpr,
    CLIP: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    x, mask_m, mask_n = load_multiplied(
        x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul, MUL_ROWS, BLOCK_M, BLOCK_N, WIDE
    )
    inv, zp = load_params(
        inv_ptr, zp_ptr, first_m, first_n, mask_m, mask_n, GRANULARITY, ZERO, BLOCK_M, BLOCK_N
    )  # fmt: skip
    q = codes(x, inv, zp, rng_ptr, stream, first_m, first_n, BITS, ZERO, STOCHASTIC, CLIP, PTX, BLOCK_M, BLOCK_N)
    store_rows(q_ptr, row_sum_ptr, q, mask_m, mask_n, first_m, first_n, N, BLOCK_M, BLOCK_N, WIDE)
    store_columns(qt_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, first_n, M, BLOCK_M, BLOCK_N, WIDE)


@triton.jit
def load_params(inv_ptr, zp_ptr, first_m, first_n, mask_m, mask_n, GRANULARITY: tl.constexpr, ZERO: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """inv and zp (0 for codes without offset) of a tile's groups, shaped to broadcast against it."""
    if GRANULARITY == 0:
        group = tl.zeros((1, 1), tl.int64)
        mask = group == 0
    elif GRANULARITY == 1:
        group = (first_m + tl.arange(0, BLOCK_M))[:, None]
        mask = mask_m
    else:
        group = (first_n + tl.arange(0, BLOCK_N))[None, :]
        mask = mask_n
    inv = tl.load(inv_ptr + group, mask=mask, other=0.0)
    zp = inv * 0.0
    if ZERO == 1 or ZERO == 2:
        zp = tl.load(zp_ptr + group, mask=mask, other=0.0)
    return inv, zp


@triton.jit(do_not_specialize=["stream"])
def _rows_kernel(
    x_ptr, mul_ptr, rng_ptr, q_ptr, qt_ptr, scale_ptr, offset_ptr, row_sum_ptr, col_sum_ptr,
    M, N, stride_xm, stride_xn, stride_mul, stream,
    MUL_ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, STOCHASTIC: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    x, mask_m, mask_n = load_multiplied(
        x_ptr, mul_ptr, first_m, 0, M, N, stride_xm, stride_xn, stride_mul, MUL_ROWS, BLOCK_M, BLOCK_N, WIDE
    )
    lowest = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    hi, lo = widen(lowest, lowest, x, mask_m & mask_n, ZERO == 0 or ZERO == 3)
    hi = from_ordered(tl.max(hi, 1, keep_dims=True))
    lo = -from_ordered(tl.max(lo, 1, keep_dims=True))
    scale, inv, zp, offset = quantization_params(lo, hi, BITS, ZERO)
    q = codes(x, inv, zp, rng_ptr, stream, first_m, 0, BITS, ZERO, STOCHASTIC, False, PTX, BLOCK_M, BLOCK_N)
    store_rows(q_ptr, row_sum_ptr, q, mask_m, mask_n, first_m, 0, N, BLOCK_M, BLOCK_N, WIDE)
    store_columns(qt_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, 0, M, BLOCK_M, BLOCK_N, WIDE)
    rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
    tl.store(scale_ptr + rows, scale, mask=mask_m)
    if offset_ptr is not None:
        tl.store(offset_ptr + rows, offset, mask=mask_m)


@triton.jit(do_not_specialize=["stream"])
def _long_rows_kernel(
    x_ptr, mul_ptr, rng_ptr, q_ptr, qt_ptr, scale_ptr, offset_ptr, row_sum_ptr, col_sum_ptr,
    M, N, stride_xm, stride_xn, stride_mul, stream,
    MUL_ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, STOCHASTIC: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Blocks of rows pid, pid + programs, …: neighbours in memory are worked on at the same time.
    # A loop's own counter is int32, too short for the offset of a column in transposed codes.
    zero = tl.full((), 0, tl.int64)
    for step in range(0, tl.cdiv(tl.cdiv(M, BLOCK_M) - tl.program_id(0), tl.num_programs(0))):
        first_m = (tl.program_id(0) + step * tl.num_programs(0)).to(tl.int64) * BLOCK_M
        hi = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
        lo = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
        for first_n in range(0, N, BLOCK_N):
            x, mask_m, mask_n = load_multiplied(
                x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul,
                MUL_ROWS, BLOCK_M, BLOCK_N, WIDE, 1,
            )  # fmt: skip
            hi, lo = widen(hi, lo, x, mask_m & mask_n, ZERO == 0 or ZERO == 3)
        high = from_ordered(tl.max(hi, 1, keep_dims=True))
        low = -from_ordered(tl.max(lo, 1, keep_dims=True))
        scale, inv, zp, offset = quantization_params(low, high, BITS, ZERO)
        rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
        tl.store(scale_ptr + rows, scale, mask=rows < M)
        if offset_ptr is not None:
            tl.store(offset_ptr + rows, offset, mask=rows < M)
        for first_n in range(0, N, BLOCK_N):
            x, mask_m, mask_n = load_multiplied(
                x_ptr, mul_ptr, first_m, first_n, M, N, stride_xm, stride_xn, stride_mul,
                MUL_ROWS, BLOCK_M, BLOCK_N, WIDE, -1,
            )  # fmt: skip
            q = codes(
                x, inv, zp, rng_ptr, stream, first_m, first_n, BITS, ZERO, STOCHASTIC, False, PTX, BLOCK_M, BLOCK_N
            )
            store_rows(q_ptr, row_sum_ptr, q, mask_m, mask_n, first_m, first_n, N, BLOCK_M, BLOCK_N, WIDE)
            store_columns(qt_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, zero + first_n, M, BLOCK_M, BLOCK_N, WIDE)


def rows_block(m: int, n: int, transposed: bool) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) of `_rows_kernel` for an (m, n) matrix, or None where a row does not fit in a program.

    A transposed copy needs 16 rows in a program, so that it is written in pieces of 16 bytes.
    """
    block_n = max(1 << (n - 1).bit_length(), 8)  # triton.next_power_of_2 and triton.cdiv take 2 µs
    block_m = min(max(ROWS_MAX_ELEMENTS // block_n, 1) if transposed else max(2048 // block_n, 1), 32)
    return None if block_n > ROWS_MAX_ELEMENTS or (transposed and block_m < 16) else (block_m, block_n)


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
    stats: torch.Tensor | None = None,
    kernel: str | None = None,
    tile: tuple[int, int, int] | None = None,
    ptx: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the quantization of x (M, N), float32, float16 or bfloat16, any strides, M and N ≥ 1.

    zero "symmetric", "grid" or "min" makes int8 codes of so many bits, "e4m3" float8_e4m3fn ones. multiplier is (M, 1) or
    (1, N) float32. rng (2,) int64 (key, step) asks for stochastic rounding, stream is the whole fourth counter word
    (stream + 256·rank). stats: the partial extremes of x ∘ multiplier (see `statistics`), if a producer of x made them;
    they must cover every element. kernel "rows", "long_rows" or "tile" is chosen by the shape where it is None; tile is the
    (BLOCK_M, BLOCK_N, num_warps) of one of the latter two, "rows" has its own; ptx False keeps to Triton's own operations
    on every GPU.

    Returns:
        q (M, N), qt (N, M); scale, offset (1, 1), (M, 1) or (1, N) float32; row_sum (M,), col_sum (N,) int32; None for
        each that was not asked for.
    """
    m, n = x.shape
    dev = x.device
    shape = {"per_tensor": (1, 1), "per_row": (m, 1), "per_column": (1, n)}[granularity]
    q = torch.empty(m, n, dtype=torch.int8, device=dev) if rows else None
    qt = torch.empty(n, m, dtype=torch.int8, device=dev) if cols else None
    row_sum = torch.zeros(m, dtype=torch.int32, device=dev) if sums and rows else None
    col_sum = torch.zeros(n, dtype=torch.int32, device=dev) if sums and cols else None
    kernel = kernel or choose_kernel(x, granularity, cols, stats is not None)
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    out = empty_params(shape, zero, dev, between=kernel == "tile")
    stride_mul, mul_rows = multiplier_stride(multiplier)
    extents = (m, n, *x.stride(), stride_mul, stream)
    flags = dict(
        MUL_ROWS=mul_rows,
        BITS=bits,
        ZERO=ZERO[zero],
        STOCHASTIC=rng is not None,
        PTX=ptx,
        enable_fp_fusion=False,
    )
    if kernel == "tile":
        (block_m, block_n, warps), clip = tile or tile_of(x), stats is not None
        if stats is None:
            stats = row_stats(x, granularity, is_symmetric(zero), multiplier)
        params(stats, out, bits, zero)
        _tile_kernel[(-(-m // block_m) * -(-n // block_n),)](
            x, multiplier, out.inv, out.zp, rng, q, qt, row_sum, col_sum, *extents, GRANULARITY=GRANULARITY[granularity],
            BLOCK_M=block_m, BLOCK_N=block_n, WIDE=tile_is_wide(x, block_m, block_n), CLIP=clip, num_warps=warps, **flags,
        )  # fmt: skip
    else:
        block = rows_block(m, n, cols) if kernel == "rows" else (tile or LONG_ROWS)[:2]
        if granularity != "per_row" or stats is not None or block is None:
            raise ValueError(
                f"kernel {kernel!r} finds the ranges of whole rows{' in its registers' * (kernel == 'rows')}: not of "
                f"{tuple(x.shape)} {granularity}{', transposed' * cols}{', with stats' * (stats is not None)}"
            )
        block_m, block_n = block
        if kernel == "long_rows" and n + block_n >= 2**31:
            raise ValueError(f"kernel {kernel!r} steps along a row in int32, got rows of {n} elements")
        if kernel == "rows":
            warps, grid, launch = 8 if block_m * block_n > 4096 else 4, -(-m // block_m), _rows_kernel
        else:
            warps, grid, launch = (tile or LONG_ROWS)[2], long_rows_programs(x, block_m), _long_rows_kernel
        launch[(grid,)](
            x, multiplier, rng, q, qt, out.scale, out.offset, row_sum, col_sum, *extents,
            BLOCK_M=block_m, BLOCK_N=block_n, WIDE=tile_is_wide(x, block_m, block_n), num_warps=warps, **flags,
        )  # fmt: skip
    return (*(as_codes(t, zero) for t in (q, qt)), out.scale, out.offset, row_sum, col_sum)


def choose_kernel(x: torch.Tensor, granularity: str, transposed: bool, has_stats: bool) -> str:
    """The kernel for x (M, N): "rows", "long_rows" or "tile"."""
    (m, n), (xm, xn) = x.shape, x.stride()
    # Of a transposed view whole rows are no pieces of memory; _long_rows_kernel steps along a row in int32.
    if granularity != "per_row" or has_stats or xn > xm or is_wide(n * xn, n + LONG_ROWS[1]):
        return "tile"
    aligned = n % 16 == 0 and xm % 16 == 0 and (m % 16 == 0 or not transposed)
    return "rows" if rows_block(m, n, transposed) and (aligned or not transposed) else "long_rows"


def long_rows_programs(x: torch.Tensor, block_m: int) -> int:
    """How many programs of `_long_rows_kernel` walk over x: as many as have their rows in half the L2 together."""
    processors, l2 = processors_and_l2(x.device)
    rows = max(block_m * x.shape[1] * x.element_size(), 1)
    return min(-(-x.shape[0] // block_m), processors * min(max(l2 // 2 // (rows * processors), 1), LONG_ROWS_PROGRAMS))


@functools.cache
def processors_and_l2(device: torch.device) -> tuple[int, int]:
    """The number of a GPU's processors and the bytes of its L2; of one that is not there, those of an H100."""
    if device.type != "cuda":
        return 132, 50 * 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def as_codes(q: torch.Tensor | None, zero: str) -> torch.Tensor | None:
    """Bytes as the codes they are."""
    return q.view(torch.float8_e4m3fn) if q is not None and zero == "e4m3" else q


def tile_of(x: torch.Tensor) -> tuple[int, int, int]:
    """The tile that reads and writes x (M, N) and its codes without running out of registers."""
    return TILE if all(s == 1 or s % 16 == 0 for s in (*x.shape, *x.stride())) else ODD_TILE


def tile_is_wide(x: torch.Tensor, block_m: int, block_n: int) -> bool:
    """Whether a tile of x, of its codes or of its transposed codes spans more than int32 offsets reach."""
    (m, n), (xm, xn) = x.shape, x.stride()
    return is_wide(block_m * xm + block_n * xn, block_m * n + block_n, block_n * m + block_m)
