"""Both quantizations of an output gradient dY (M, N), from one pass of statistics and one pass of tiles.

    G = dY ∘ col_mul   row-major codes (M, N), for dgrad; a scale per row or one
    H = dY ∘ row_mul   transposed codes (N, M), for wgrad; a scale per column or one
    column sums of dY  the gradient of a bias

col_mul (N,) holds the scales of W, row_mul (M,) those of X, which lie on the contracted index of dgrad and wgrad and are
folded into dY; either may be None for 1. The two draw random bits from streams of their own, and every code, scale and
sum of codes is that of `quantize` called twice. dY is read twice in all.

Source: [derived]; scale folding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import tile_offsets
from .quantize import GRANULARITY, as_codes, codes, load_params, store_columns, store_rows, tile_is_wide, tile_of
from .statistics import ZERO, empty_params, is_symmetric, load_tile, params, widen

STATS_TILE = (16, 256, 8)  # (BLOCK_M, BLOCK_N, num_warps)
STATS_PROGRAMS = 1024  # about so many, each walking down a panel of columns


class Side(NamedTuple):
    """How one of the two is quantized: bits, "per_row" (dgrad), "per_column" (wgrad) or "per_tensor", and zero."""

    bits: int
    granularity: str
    zero: str


class Quantized(NamedTuple):
    """codes (M, N) of G or (N, M) of H; scale and offset (None where symmetric) (M, 1), (1, N) or (1, 1) float32; sums
    (M,) or (N,) int32 of the codes that share a contraction, or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    sums: torch.Tensor | None


@triton.jit
def _fold(x, mul_ptr, offsets, mask):
    """x times the factors at the offsets, which are shaped to broadcast against it."""
    if mul_ptr is not None:
        x = x * tl.load(mul_ptr + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def _gradient_stats_kernel(
    dy_ptr, row_mul_ptr, col_mul_ptr, g_partial_ptr, h_partial_ptr, sums_ptr, M, N, stride_m, stride_n, parts_g, parts_h,
    G_TENSOR: tl.constexpr, H_TENSOR: tl.constexpr, G_SYM: tl.constexpr, H_SYM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # A program walks down TILES tiles of a panel of columns: rows are reduced tile by tile, columns at the end.
    num_n = tl.cdiv(N, BLOCK_N)
    panel = tl.program_id(0) % num_n
    chunk = tl.program_id(0) // num_n
    first_n = panel.to(tl.int64) * BLOCK_N
    lowest = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)
    g_hi, g_lo, h_hi, h_lo = lowest, lowest, lowest, lowest
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    for tile in range(TILES):
        first_m = (chunk.to(tl.int64) * TILES + tile) * BLOCK_M
        x, mask_m, mask_n = load_tile(dy_ptr, first_m, first_n, M, N, stride_m, stride_n, BLOCK_M, BLOCK_N, WIDE)
        mask = mask_m & mask_n
        if sums_ptr is not None:
            total += x
        g = _fold(x, col_mul_ptr, first_n + n, mask_n)
        h = _fold(x, row_mul_ptr, first_m + m, mask_m)
        h_hi, h_lo = widen(h_hi, h_lo, h, mask, H_SYM)
        if G_TENSOR:
            g_hi, g_lo = widen(g_hi, g_lo, g, mask, G_SYM)
        else:
            hi, lo = widen(lowest, lowest, g, mask, G_SYM)
            rows = first_m + tl.arange(0, BLOCK_M)
            out = g_partial_ptr + panel.to(tl.int64) * M + rows
            tl.store(out, tl.max(hi, 1), mask=rows < M)
            if not G_SYM:
                tl.store(out + tl.cast(parts_g, tl.int64) * M, tl.max(lo, 1), mask=rows < M)
    if G_TENSOR:
        tl.store(g_partial_ptr + tl.program_id(0), tl.max(tl.max(g_hi, 1), 0))
        if not G_SYM:
            tl.store(g_partial_ptr + parts_g + tl.program_id(0), tl.max(tl.max(g_lo, 1), 0))
    cols = first_n + tl.arange(0, BLOCK_N)
    at = chunk.to(tl.int64) * N + cols
    if H_TENSOR:
        tl.store(h_partial_ptr + tl.program_id(0), tl.max(tl.max(h_hi, 1), 0))
        if not H_SYM:
            tl.store(h_partial_ptr + parts_h + tl.program_id(0), tl.max(tl.max(h_lo, 1), 0))
    else:
        tl.store(h_partial_ptr + at, tl.max(h_hi, 0), mask=cols < N)
        if not H_SYM:
            tl.store(h_partial_ptr + tl.cast(parts_h, tl.int64) * N + at, tl.max(h_lo, 0), mask=cols < N)
    if sums_ptr is not None:
        tl.store(sums_ptr + at, tl.sum(total, 0), mask=cols < N)


@triton.jit(do_not_specialize=["stream_g", "stream_h"])
def _gradient_tile_kernel(
    dy_ptr, row_mul_ptr, col_mul_ptr, g_inv_ptr, g_zp_ptr, h_inv_ptr, h_zp_ptr, rng_ptr,
    q_ptr, qt_ptr, row_sum_ptr, col_sum_ptr, M, N, stride_m, stride_n, stream_g, stream_h,
    G_GRANULARITY: tl.constexpr, H_GRANULARITY: tl.constexpr, G_BITS: tl.constexpr, H_BITS: tl.constexpr,
    G_ZERO: tl.constexpr, H_ZERO: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    x, mask_m, mask_n = load_tile(dy_ptr, first_m, first_n, M, N, stride_m, stride_n, BLOCK_M, BLOCK_N, WIDE)
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    g = _fold(x, col_mul_ptr, first_n + n, mask_n)
    inv, zp = load_params(
        g_inv_ptr, g_zp_ptr, first_m, first_n, mask_m, mask_n, G_GRANULARITY, G_ZERO, BLOCK_M, BLOCK_N
    )
    q = codes(g, inv, zp, rng_ptr, stream_g, first_m, first_n, G_BITS, G_ZERO, True, False, PTX, BLOCK_M, BLOCK_N)
    store_rows(q_ptr, row_sum_ptr, q, mask_m, mask_n, first_m, first_n, N, BLOCK_M, BLOCK_N, WIDE)
    h = _fold(x, row_mul_ptr, first_m + m, mask_m)
    inv, zp = load_params(
        h_inv_ptr, h_zp_ptr, first_m, first_n, mask_m, mask_n, H_GRANULARITY, H_ZERO, BLOCK_M, BLOCK_N
    )
    q = codes(h, inv, zp, rng_ptr, stream_h, first_m, first_n, H_BITS, H_ZERO, True, False, PTX, BLOCK_M, BLOCK_N)
    store_columns(qt_ptr, col_sum_ptr, q, mask_m, mask_n, first_m, first_n, M, BLOCK_M, BLOCK_N, WIDE)


def statistics(
    dy: torch.Tensor,
    g: Side,
    h: Side,
    *,
    row_mul: torch.Tensor | None,
    col_mul: torch.Tensor | None,
    bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the partial extremes of G and of H (see `fqt_kernels.statistics`) and, if bias, the column sums of dy.

    dy (M, N), row_mul, col_mul and bias as in `quantize_gradient`. The column sums, (N,) float32, are added up in one
    fixed order.
    """
    g_partial, h_partial, parts = _partial_statistics(dy, g, h, row_mul, col_mul, bias)
    if parts is None:
        return g_partial, h_partial, None
    total = torch.empty(dy.shape[1], dtype=torch.float32, device=dy.device)
    params(None, None, h.bits, h.zero, sums=parts, total=total)
    return g_partial, h_partial, total


def _partial_statistics(
    dy: torch.Tensor, g: Side, h: Side, row_mul: torch.Tensor | None, col_mul: torch.Tensor | None, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The partial extremes of G and of H, and the partial column sums (chunks, N) or None."""
    (m, n), dev = dy.shape, dy.device
    g_groups, h_groups = (m if g.granularity == "per_row" else 1), (n if h.granularity == "per_column" else 1)
    block_m, block_n, warps = STATS_TILE
    num_m, num_n = -(-m // block_m), -(-n // block_n)  # triton.cdiv takes 2 µs
    tiles = 1 << (min(max(num_m * num_n // STATS_PROGRAMS, 1), num_m) - 1).bit_length()
    chunks = -(-num_m // tiles)
    parts_g = num_n if g.granularity == "per_row" else chunks * num_n
    parts_h = chunks if h.granularity == "per_column" else chunks * num_n
    new = lambda kind, *s: torch.empty(s, dtype=kind, device=dev)  # noqa: E731
    g_partial = new(torch.int32, 1 if is_symmetric(g.zero) else 2, parts_g, g_groups)
    h_partial = new(torch.int32, 1 if is_symmetric(h.zero) else 2, parts_h, h_groups)
    partial_sums = new(torch.float32, chunks, n) if bias else None
    _gradient_stats_kernel[(chunks * num_n,)](
        dy, row_mul, col_mul, g_partial, h_partial, partial_sums, m, n, *dy.stride(), parts_g, parts_h,
        G_TENSOR=g.granularity == "per_tensor", H_TENSOR=h.granularity == "per_tensor",
        G_SYM=is_symmetric(g.zero), H_SYM=is_symmetric(h.zero), BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles,
        WIDE=tile_is_wide(dy, block_m, block_n), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return g_partial, h_partial, partial_sums


def quantize_gradient(
    dy: torch.Tensor,
    g: Side,
    h: Side,
    *,
    row_mul: torch.Tensor | None,
    col_mul: torch.Tensor | None,
    rng: torch.Tensor,
    streams: tuple[int, int],
    sums: bool = False,
    bias: bool = False,
    bias_dtype: torch.dtype = torch.float32,
    tile: tuple[int, int, int] | None = None,
    ptx: bool = True,
) -> tuple[Quantized, Quantized, torch.Tensor | None]:
    """Launch both quantizations of dy (M, N), float32, float16 or bfloat16, any strides, M and N ≥ 1, both stochastic.

    row_mul (M,) and col_mul (N,) contiguous float32; rng (2,) int64 (key, step); streams of G and of H, whole counter
    words. sums: with the sums of the codes. bias: with the column sums of dy (N,), added up in float32 in one fixed order
    and rounded to bias_dtype.

    Returns:
        G, H, and the column sums or None.
    """
    (m, n), dev = dy.shape, dy.device
    g_groups, h_groups = (m if g.granularity == "per_row" else 1), (n if h.granularity == "per_column" else 1)
    g_partial, h_partial, partial_sums = _partial_statistics(dy, g, h, row_mul, col_mul, bias)
    new = lambda kind, *s: torch.empty(s, dtype=kind, device=dev)  # noqa: E731
    g_out = empty_params((g_groups, 1), g.zero, dev)
    h_out = empty_params((1, h_groups), h.zero, dev)
    total = new(bias_dtype, n) if bias else None
    params(g_partial, g_out, g.bits, g.zero)
    if bias and h.granularity == "per_tensor":
        params(None, None, h.bits, h.zero, sums=partial_sums, total=total)
        params(h_partial, h_out, h.bits, h.zero)
    else:
        params(h_partial, h_out, h.bits, h.zero, sums=partial_sums, total=total)
    q, qt = new(torch.int8, m, n), new(torch.int8, n, m)
    row_sum, col_sum = (torch.zeros(s, dtype=torch.int32, device=dev) if sums else None for s in (m, n))
    block_m, block_n, warps = tile or tile_of(dy)
    _gradient_tile_kernel[(-(-m // block_m) * -(-n // block_n),)](
        dy, row_mul, col_mul, g_out.inv, g_out.zp, h_out.inv, h_out.zp, rng, q, qt, row_sum, col_sum,
        m, n, *dy.stride(), *streams,
        G_GRANULARITY=GRANULARITY[g.granularity], H_GRANULARITY=GRANULARITY[h.granularity],
        G_BITS=g.bits, H_BITS=h.bits, G_ZERO=ZERO[g.zero], H_ZERO=ZERO[h.zero], PTX=ptx,
        BLOCK_M=block_m, BLOCK_N=block_n, WIDE=tile_is_wide(dy, block_m, block_n), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return (
        Quantized(as_codes(q, g.zero), g_out.scale, g_out.offset, row_sum),
        Quantized(as_codes(qt, h.zero), h_out.scale, h_out.offset, col_sum),
        total,
    )
