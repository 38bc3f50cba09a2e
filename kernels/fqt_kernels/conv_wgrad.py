"""wgrad of a convolution: dW[o, c, r, s] = Σ over output pixels (p, q) and images n of dY[o, p, q, n] · X[c, y, x, n].

y = p·stride + r·dilation - padding, x likewise; X is 0 outside of its images. As a matrix product: rows are the output
channels of a group, columns its pairs of an input channel and a tap, and the sum goes over pixels and images. The images
of a pixel lie next to each other, and a tap moves X by whole pixels: pieces of 16 images stay whole in every geometry.

`_conv_wgrad_mm_kernel` sums in int32, which can hold 131 071 products whatever the codes. Several programs share a sum,
each with terms of its own, and `_conv_wgrad_sum_kernel` adds up exactly what they found, rounds it once and scales it:

    dW = acc · a_scale[o] · b_scale + a_offset[o] · table[c, tap] + row_term[o, tap] (+ what is there)

in float32, in this order. No tile and no number of programs shows in any bit of the result.
"""

import math

import torch
import triton
import triton.language as tl

from ._device import is_wide, tile_ids, tile_offsets
from .gemm import GROUP_M, MAX_INT32_TERMS

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by kind of GPU, by size of the output tile; the first row is safe.
CONFIGS = {
    "sm80": [(64, 64, 64, 4, 4), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4)],
    "sm90": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3)],
    "sm100": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3)],
    "amd": [(64, 64, 64, 4, 2), (128, 128, 64, 8, 2)],
}  # fmt: skip
_SUM_COLUMNS, _SUM_PARTS, _SUM_WARPS = 512, 4, 2  # of each of 4 parts 8 columns a thread: 16 bytes of bfloat16


@triton.jit
def _conv_wgrad_mm_kernel(
    a_ptr, b_ptr, part_ptr, vertical, horizontal, rows, channels, pieces, share, stride_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PIECE: tl.constexpr,
    EVEN_K: tl.constexpr, INSIDE: tl.constexpr, TAPS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns = channels * (vertical[2] * horizontal[2])
    num_m = tl.cdiv(rows, BLOCK_M)
    num_n = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (num_m * num_n)
    pid_m, pid_n = tile_ids(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    terms = pieces * (vertical[1] * horizontal[1])  # in pieces, as is all of K but addresses
    first = tl.program_id(1) * (share * (BLOCK_K // PIECE))
    left = tl.minimum(terms - first, share * (BLOCK_K // PIECE))  # of this program
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the edge read the first: no mask for them in the loop.
    row = group.to(tl.int64) * rows + tl.where(offs_m < rows, offs_m, 0)
    a_ptrs = a_ptr + (row * terms + first)[:, None] * PIECE + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    c, r, s = _columns(tl.where(offs_n < columns, offs_n, 0), channels, vertical[2], horizontal[2], TAPS_LAST)
    y = r * vertical[5] - vertical[4]
    x = s * horizontal[5] - horizontal[4]
    pixel = ((group.to(tl.int64) * channels + c) * vertical[0] + y) * horizontal[0] + x
    b_ptrs = b_ptr + pixel[None, :] * (pieces * PIECE)  # [1, BLOCK_N]
    acc = _dot(a_ptrs, b_ptrs, y[None, :], x[None, :], offs_k, first, left, vertical, horizontal, pieces,
               BLOCK_M, BLOCK_N, BLOCK_K, PIECE, EVEN_K, INSIDE, WIDE)  # fmt: skip

    m, n = tile_offsets(BLOCK_M, BLOCK_N, False)
    groups = tl.num_programs(0) // (num_m * num_n)
    first_m = (tl.program_id(1).to(tl.int64) * groups + group) * rows + pid_m * BLOCK_M
    part_ptrs = part_ptr + (first_m * stride_part + pid_n * BLOCK_N) + (m * stride_part + n)
    # Columns that pad a row to whole pieces are written too.
    tl.store(part_ptrs, acc, mask=(offs_m < rows)[:, None] & (offs_n < stride_part)[None, :])


@triton.jit
def _columns(offs_n, channels, kernel_y, kernel_x, TAPS_LAST: tl.constexpr):
    """The channel and the tap (r, s) of columns."""
    if TAPS_LAST:
        c = offs_n // (kernel_y * kernel_x)
        tap = offs_n % (kernel_y * kernel_x)
    else:
        c = offs_n % channels
        tap = offs_n // channels
    return c, tap // kernel_x, tap % kernel_x


@triton.jit
def _dot(a_ptrs, b_ptrs, y_in, x_in, offs_k, first, left, vertical, horizontal, pieces,
         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr, EVEN_K: tl.constexpr,
         INSIDE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Σ in int32 over the pieces first … first + left - 1 of K. y_in, x_in [1, BLOCK_N]: where the taps of output 0 lie.

    Piece k is number i = k % pieces of the pixel k // pieces, in row p and column q of the output. Nothing is divided in
    the loop: from block to block every piece moves on by the same way.
    """
    width = horizontal[1]
    piece = offs_k // PIECE
    p = (first + piece) // pieces // width
    q = (first + piece) // pieces % width
    i = (first + piece) % pieces
    STEP: tl.constexpr = BLOCK_K // PIECE
    step_p = STEP // pieces // width
    step_q = STEP // pieces % width
    step_i = STEP % pieces
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, left, STEP):
        y = p * vertical[3]
        x = q * horizontal[3]
        if WIDE:
            at = y.to(tl.int64) * horizontal[0] + x
        else:
            at = y * horizontal[0] + x
        at = (at * pieces + i) * PIECE + offs_k % PIECE
        mask_k = piece < left - k
        if EVEN_K:
            a = tl.load(a_ptrs + k * PIECE)
        else:
            a = tl.load(a_ptrs + k * PIECE, mask=mask_k[None, :], other=0)
        if not INSIDE:  # pixels beyond the last may lie inside, but the codes of A there are 0
            to_y = y[:, None] + y_in
            to_x = x[:, None] + x_in
            # Of one direction a sign, of the other a comparison: with two comparisons ptxas runs out of predicates.
            inside = _is_inside(to_y, vertical[0]) & ((to_x | (horizontal[0] - 1 - to_x)) >= 0)
            b = tl.load(b_ptrs + at[:, None], mask=inside, other=0)
        elif EVEN_K:
            b = tl.load(b_ptrs + at[:, None])
        else:
            b = tl.load(b_ptrs + at[:, None], mask=mask_k[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        p, q, i = _advance(p, q, i, step_p, step_q, step_i, width, pieces)
    return acc


@triton.jit
def _advance(p, q, i, by_p, by_q, by_i, width, pieces):
    """The row and column of a pixel and a piece of it, so many further: by_i < pieces, by_q < width."""
    i = i + by_i
    over = i >= pieces
    i = tl.where(over, i - pieces, i)
    q = tl.where(over, q + by_q + 1, q + by_q)
    over = q >= width
    return tl.where(over, p + by_p + 1, p + by_p), tl.where(over, q - width, q), i


@triton.jit
def _is_inside(at, size):
    """0 ≤ at < size, in one comparison."""
    return at.to(tl.uint32, bitcast=True) < (at * 0 + size).to(tl.uint32, bitcast=True)


@triton.jit
def _conv_wgrad_sum_kernel(
    part_ptr, out_ptr, vectors, parts, rows, channels, kernel_y, kernel_x, stride_part, strides, stride_sa,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, TAPS_LAST: tl.constexpr, DENSE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    a_scale_ptr, b_scale_ptr, a_offset_ptr, table_ptr, row_term_ptr = vectors
    o = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    taps = kernel_y * kernel_x
    mask = offs_n < channels * taps
    total = tl.zeros((BLOCK_N,), tl.int64)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        part_ptrs = part_ptr + (part * tl.num_programs(0).to(tl.int64) + o) * stride_part + offs_n[None, :]
        found = tl.load(part_ptrs, mask=(part < parts) & (offs_n < stride_part)[None, :], other=0)
        total += tl.sum(found.to(tl.int64), 0)
    c, r, s = _columns(offs_n, channels, kernel_y, kernel_x, TAPS_LAST)
    tap = r * kernel_x + s
    out = total.to(tl.float32) * tl.load(a_scale_ptr + o * stride_sa)
    if b_scale_ptr is not None:
        out *= tl.load(b_scale_ptr)
    if a_offset_ptr is not None:
        row = ((o // rows) * channels + c) * taps + tap
        out += tl.load(a_offset_ptr + o * stride_sa) * tl.load(table_ptr + row, mask=mask, other=0.0)
    if row_term_ptr is not None:
        out += tl.load(row_term_ptr + o * taps + tap, mask=mask, other=0.0)
    if DENSE:
        out_ptrs = out_ptr + o * strides[0] + offs_n
    else:
        out_ptrs = out_ptr + o * strides[0] + c.to(tl.int64) * strides[1] + r * strides[2] + s * strides[3]
    if ADD:
        out += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def conv_wgrad(
    a: torch.Tensor,
    b: torch.Tensor,
    n: int,
    geometry,
    *,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor | None = None,
    a_offset: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    row_term: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    config: tuple[int, int, int, int, int],
    splits: int = 1,
) -> torch.Tensor:
    """Launch wgrad of n ≥ 1 images: dW (O, C/groups, R, S), bit for bit that of `fqt.conv.wgrad`.

    a (O, output pixels, N') and b (C, pixels, N') contiguous int8 codes of dY and of X, N' ≥ n, codes beyond n zero. Where
    N' is a multiple of 16 they are read in pieces of 16 bytes, else of 8, after a copy if need be.
    geometry: `fqt.conv.Geometry`, or what has its fields. a_scale (O or 1,), b_scale (1,) or None for 1, a_offset like
    a_scale with table (C, taps), row_term (O, taps): contiguous float32; see the formula above.
    out_dtype: of a new dW, contiguous. Or out: an existing one of any dense strides, to which it is added, rounded once.
    splits: how many programs share a sum, at least as many as int32 needs (`least_splits`). It changes no bit.

    Raises:
        TypeError: codes or out of a wrong dtype.   ValueError: an argument that does not fit the others, or extents that a
            launch cannot have.
    """
    _check(a, b, n, geometry, (a_scale, b_scale, a_offset, table, row_term), splits)
    a, b = _padded(a), _padded(b)
    g, (o, _, images), channels = geometry, a.shape, b.shape[0] // geometry.groups
    columns = channels * g.kernel[0] * g.kernel[1]
    _check_out(out, out_dtype, (o, channels, *g.kernel), a.device)
    block_m, block_n, block_k, warps, stages = config
    terms = a.shape[1] * images
    blocks = triton.cdiv(terms, block_k)
    share = triton.cdiv(blocks, max(splits, least_splits(terms, block_k)))
    splits = triton.cdiv(blocks, share)  # so that none is left without a block
    stride_part = triton.cdiv(columns, 16) * 16
    if max(splits, triton.cdiv(columns, _SUM_COLUMNS)) > 65_535:
        raise ValueError(
            f"conv_wgrad: a filter of {columns} weights whose gradients are sums that {splits} programs share: a grid's "
            f"second axis holds 65 535 programs, {65_535 * _SUM_COLUMNS} weights"
        )
    if min(block_m, o // g.groups) * stride_part >= 2**31:
        raise ValueError(f"conv_wgrad: a tile of {block_m} filters of {columns} weights have 2³¹ weights or more")
    parts = torch.empty(splits, o, stride_part, dtype=torch.int32, device=a.device)
    if out is None:
        dw = torch.empty(o, channels, *g.kernel, dtype=out_dtype, device=a.device)
    else:
        dw = out
    taps_last = dw.is_contiguous() or not dw.is_contiguous(memory_format=torch.channels_last)
    piece = math.gcd(images, 16)
    vertical, horizontal = zip(g.size, g.out, g.kernel, g.stride, g.padding, g.dilation, strict=True)
    tiles = triton.cdiv(o // g.groups, block_m) * triton.cdiv(columns, block_n) * g.groups
    _conv_wgrad_mm_kernel[(tiles, splits)](
        a, b, parts, vertical, horizontal, o // g.groups, channels, images // piece, share, stride_part,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M, PIECE=piece, EVEN_K=terms % block_k == 0,
        INSIDE=_is_within(vertical) and _is_within(horizontal), TAPS_LAST=taps_last,
        WIDE=is_wide(a.shape[1] * images, b.shape[1] * images), num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    _conv_wgrad_sum_kernel[(o, triton.cdiv(columns, _SUM_COLUMNS))](
        parts, dw, (a_scale, b_scale, a_offset, table, row_term), splits, o // g.groups, channels, *g.kernel,
        stride_part, dw.stride(), int(a_scale.numel() > 1), BLOCK_N=_SUM_COLUMNS, PARTS=_SUM_PARTS, TAPS_LAST=taps_last,
        DENSE=dw.is_contiguous() or not taps_last, ADD=out is not None, num_warps=_SUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return dw


def _padded(q: torch.Tensor) -> torch.Tensor:
    """Codes with zero images up to a multiple of 8: addresses and masks of narrower pieces fill all registers."""
    return q if q.shape[2] % 8 == 0 else torch.nn.functional.pad(q, (0, -q.shape[2] % 8))


def least_splits(terms: int, block_k: int) -> int:
    """How many programs must share a sum, each with whole blocks of it, so that no part leaves int32."""
    return triton.cdiv(triton.cdiv(terms, block_k), MAX_INT32_TERMS // block_k)


def _is_within(axis: tuple[int, ...]) -> bool:
    """Whether every tap of every output lies inside of the image, in one direction."""
    size, outputs, kernel, stride, padding, dilation = axis
    return padding <= 0 and (outputs - 1) * stride + (kernel - 1) * dilation - padding < size


def _is_dense(t: torch.Tensor) -> bool:
    """Whether t's elements fill its memory, each once, in whatever order."""
    count = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride != count:
            return False
        count *= size
    return True


def _check(a, b, n: int, g, vectors, splits: int) -> None:
    """Refuse what the kernels would compute wrongly without a word."""
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"conv_wgrad: a and b must be int8, got {a.dtype} and {b.dtype}")
    pixels, out_pixels = g.size[0] * g.size[1], g.out[0] * g.out[1]
    if a.dim() != 3 or b.dim() != 3 or (a.shape[1], b.shape[1]) != (out_pixels, pixels) or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"conv_wgrad: a and b must be (O, {out_pixels}, images) and (C, {pixels}, images), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(f"conv_wgrad: a and b must be contiguous, got strides {a.stride()} and {b.stride()}")
    if not 1 <= n <= a.shape[2]:
        raise ValueError(f"conv_wgrad: n is {n}, but rows have codes of {a.shape[2]} images")
    o, c, taps = a.shape[0], b.shape[0], g.kernel[0] * g.kernel[1]
    if o % g.groups or c % g.groups:
        raise ValueError(f"conv_wgrad: {o} output and {c} input channels do not make {g.groups} groups")
    if splits < 1:
        raise ValueError(f"conv_wgrad: splits must be at least 1, got {splits}")
    a_scale, b_scale, a_offset, table, row_term = vectors
    if (a_offset is None) != (table is None):
        raise ValueError("conv_wgrad: a_offset and table come together")
    shapes = {"a_scale": (a_scale, {(1,), (o,)}), "b_scale": (b_scale, {(1,)}), "table": (table, {(c, taps)}),
              "a_offset": (a_offset, {tuple(a_scale.shape)}), "row_term": (row_term, {(o, taps)})}  # fmt: skip
    for name, (t, wanted) in shapes.items():
        if t is not None and (tuple(t.shape) not in wanted or t.dtype != torch.float32 or not t.is_contiguous()):
            raise ValueError(
                f"conv_wgrad: {name} must be contiguous float32 {' or '.join(map(str, sorted(wanted)))}, "
                f"got {t.dtype} {tuple(t.shape)} of strides {t.stride()}"
            )


def _check_out(out, out_dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    dtype = out_dtype if out is None else out.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"conv_wgrad: out is {dtype}, wanted float32, bfloat16 or float16")
    if out is not None and (out.shape != shape or out.device != device or not _is_dense(out)):
        raise ValueError(
            f"conv_wgrad: out must be {shape} of dense strides on {device}, "
            f"got {tuple(out.shape)} of strides {out.stride()} on {out.device}"
        )
