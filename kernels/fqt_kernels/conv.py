"""Convolutions of int8 codes as implicit matrix products: fprop, and dgrad of any stride, without patches in memory.

    fprop  Y[n,o,p,q]  = Σ_{r,s,c} A[n,y,x,c] B[o,r,s,c]      y = p·stride + r·dilation - padding, x likewise
    dgrad  dX[n,c,y,x] = Σ_{r,s,o} A[n,p,q,o] B[c,r,s,o]      over the (r, s) for which such p and q exist

A row of the product is an output pixel, a column an output channel of a group, and its sum goes over the taps inside of the
image and the channels of the group. The pixels of dgrad's output fall into as many phases as the stride says, in each
direction: those of a phase have the same taps, every stride/gcd(stride, dilation)-th, and consecutive ones read
consecutive inputs. So each phase is a convolution without a stride, and no product has a zero for a factor.
"""

import math

import torch
import triton
import triton.language as tl

from ._device import is_wide, tile_ids
from .gemm import GROUP_M, MAX_INT32_TERMS, _split, is_aligned

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by kind of GPU; the first row is safe, one is for narrow groups.
CONFIGS = {
    "sm80": [(64, 64, 64, 4, 4), (128, 32, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 4)],
    "sm90": [(64, 64, 64, 4, 4), (128, 32, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 128, 8, 3)],
    "sm100": [(64, 64, 64, 4, 4), (128, 32, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 128, 8, 3)],
    "amd": [(64, 64, 64, 4, 2), (128, 32, 64, 2, 2), (128, 128, 64, 8, 2)],
}
# Where the channels of a group are no multiple of 16: loaded one by one, each with an address of its own.
UNALIGNED_CONFIG = (64, 32, 32, 4, 2)


def fits(config: tuple[int, int, int, int, int], rows: int) -> bool:
    """Whether a thread has the registers for its part of the tile. Where the rows of a group are no multiple of 16, outputs
    and border terms are moved element by element, with addresses of their own: at most 32 of them a thread."""
    block_m, block_n, _, warps, _ = config
    return is_aligned(rows) or block_m * block_n <= 32 * 32 * warps


@triton.jit
def _conv_mm_kernel(
    a_ptr, b_ptr, out_ptr, vectors, images, out_pixels, vertical, horizontal, channels, channels_a, rows, stride_sa,
    stride_sb, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, PHASED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(rows, BLOCK_N)
    tile, pid_n = tile_ids(tl.program_id(0), tl.num_programs(0) // num_n, num_n, GROUP_M)
    group = tl.program_id(1)
    first_n = pid_n * BLOCK_N
    at_y, at_x, tile = _phase(tile, vertical, horizontal, PHASED)
    if PHASED:
        pixels = at_y[0] * at_x[0]
    else:
        pixels = out_pixels
    outputs = images * pixels  # of the phase
    first_m = tile * BLOCK_M
    if WIDE:
        first_m = tile.to(tl.int64) * BLOCK_M
        outputs = (tl.zeros((), tl.int64) + images) * pixels
    if first_m >= outputs:
        return
    # Rows and columns beyond the edges repeat the last row and the first column, and are not stored: no mask in the loop.
    n, _, y, x = _pixels(tl.minimum(first_m + tl.arange(0, BLOCK_M), outputs - 1), pixels, at_x[0])
    y = y * at_y[4] + at_y[3]  # the input of the first tap, which may lie outside
    x = x * at_x[4] + at_x[3]
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row = group.to(tl.int64) * rows + tl.where(offs_n < rows, offs_n, 0)
    pixel = (n.to(tl.int64) * vertical[0] + y) * horizontal[0] + x
    a_ptrs = a_ptr + group * channels + pixel[:, None] * channels_a + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + row[None, :] * (vertical[2] * horizontal[2] * channels) + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = _dot(a_ptrs, b_ptrs, y, x, offs_k, at_y, at_x, vertical[0], horizontal[0], horizontal[2], channels, channels_a,
               BLOCK_M, BLOCK_N, BLOCK_K, EVEN, WIDE)  # fmt: skip

    windows = 0
    if vectors[5] is not None:
        windows = _window_sums(vectors[5] + group, n, y, x, at_y, at_x, vertical[0], horizontal[0])
    WIDTH: tl.constexpr = BLOCK_N // CHUNKS
    chunks = _split(acc, CHUNKS)
    for i in tl.static_range(CHUNKS):
        _finish(
            chunks[i].to(tl.float32), out_ptr, vectors, windows, first_m, first_n + i * WIDTH, outputs, pixels, group, at_y,
            at_x, out_pixels, horizontal[1], rows, stride_sa, stride_sb, BLOCK_M, WIDTH, PHASED, CHANNELS_LAST, WIDE,
        )  # fmt: skip


@triton.jit
def _phase(tile, vertical, horizontal, PHASED: tl.constexpr):
    """The phase of a tile along both axes, and its number among the tiles of the phase, which are the phases' in turn.

    (outputs, taps, the first tap, the input of the first output at that tap; from each to the next: input by output, tap,
    input by tap, output in the image; the first of these). vertical, horizontal: as `_axis` makes them.
    """
    if PHASED:
        phase = tile % (vertical[3] * horizontal[3])
        at_y = _phase_of_axis(phase // horizontal[3], vertical)
        at_x = _phase_of_axis(phase % horizontal[3], horizontal)
        return at_y, at_x, tile // (vertical[3] * horizontal[3])
    else:
        _, out_y, kernel_y, step_y, base_y, tap_y = vertical
        _, out_x, kernel_x, step_x, base_x, tap_x = horizontal
        at_y = (out_y, kernel_y, 0, base_y, step_y, 1, tap_y, 1, 0)
        at_x = (out_x, kernel_x, 0, base_x, step_x, 1, tap_x, 1, 0)
        return at_y, at_x, tile


@triton.jit
def _phase_of_axis(phase, axis):
    """The outputs phase, phase + stride, …: their taps r are those where stride divides output + padding - r·dilation."""
    _, outputs, kernel, stride, padding, dilation, common, inverse = axis
    every = stride // common
    at = phase + padding
    first = at // common * inverse % every
    taps = tl.where(at % common == 0, tl.cdiv(tl.maximum(kernel - first, 0), every), 0)
    base = (at - first * dilation) // stride  # exact, where there are taps
    return (outputs - phase + stride - 1) // stride, taps, first, base, 1, every, -(dilation // common), stride, phase


@triton.jit
def _pixels(m, pixels, width):
    """The image, the pixel and its row and column of each of a phase's outputs."""
    pixel = (m % pixels).to(tl.int32)
    return (m // pixels).to(tl.int32), pixel, pixel // width, pixel % width


@triton.jit
def _dot(a_ptrs, b_ptrs, y, x, offs_k, at_y, at_x, size_y, size_x, kernel_x, channels, channels_a, BLOCK_M: tl.constexpr,
         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Σ over taps and blocks of channels, in int32, in one loop, so that its pipeline never runs empty between taps.

    What a tap adds to an address is the same for all rows; only whether it lies inside of the image is not.
    """
    step_x = at_x[6] * channels_a
    step_y = at_y[6] * size_x * channels_a
    if WIDE:
        step_y = (tl.zeros((), tl.int64) + at_y[6]) * size_x * channels_a
    limit_y, limit_x = _unsigned(size_y), _unsigned(size_x)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    c = 0
    tap_y = 0
    tap_x = 0
    for _ in range(at_y[1] * at_x[1] * tl.cdiv(channels, BLOCK_K)):
        # 0 ≤ y < size by one comparison, and x likewise
        inside = (y + tap_y * at_y[6]).to(tl.uint32, bitcast=True) < limit_y
        inside &= (x + tap_x * at_x[6]).to(tl.uint32, bitcast=True) < limit_x
        tap = (at_y[2] + tap_y * at_y[5]) * kernel_x + at_x[2] + tap_x * at_x[5]
        a = a_ptrs + (tap_y * step_y + tap_x * step_x + c)
        b = b_ptrs + (tap * channels + c)
        if EVEN:
            a = tl.load(a, mask=inside[:, None], other=0)
            b = tl.load(b)
        else:
            mask_k = offs_k < channels - c
            a = tl.load(a, mask=inside[:, None] & mask_k[None, :], other=0)
            b = tl.load(b, mask=mask_k[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        # On to the next block of channels, or to the next tap of a row, or to the next row of taps.
        c += BLOCK_K
        done = c >= channels
        c = tl.where(done, 0, c)
        tap_x += done.to(tl.int32)
        done = tap_x == at_x[1]
        tap_x = tl.where(done, 0, tap_x)
        tap_y += done.to(tl.int32)
    return acc


@triton.jit
def _unsigned(size):
    return (tl.zeros((), tl.int32) + size).to(tl.uint32, bitcast=True)


@triton.jit
def _finish(out, out_ptr, vectors, windows, first_m, first_n, outputs, pixels, group, at_y, at_x, out_pixels, width, rows,
            stride_sa, stride_sb, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PHASED: tl.constexpr,
            CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Scale the sums of the chunk at (first_m, first_n), add what the offsets and the bias do, and store it."""
    a_scale_ptr, b_scale_ptr, a_offset_ptr, table_ptr, classes_ptr, _, b_offset_ptr, bias_ptr = vectors
    m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = m < outputs
    mask_n = offs_n < rows
    n, pixel, y, x = _pixels(m, pixels, at_x[0])
    if PHASED:
        pixel = (y * at_y[7] + at_y[8]) * width + x * at_x[7] + at_x[8]
    channel = group * rows + offs_n
    all_rows = rows * tl.num_programs(1)
    sa = tl.load(a_scale_ptr + n * stride_sa, mask=mask_m, other=0.0)[:, None]
    out *= sa
    if b_scale_ptr is not None:
        out *= tl.load(b_scale_ptr + channel * stride_sb, mask=mask_n, other=0.0)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if a_offset_ptr is not None:
        at = tl.load(classes_ptr + pixel, mask=mask_m, other=0)[:, None] * all_rows + channel[None, :]
        oa = tl.load(a_offset_ptr + n * stride_sa, mask=mask_m, other=0.0)[:, None]
        out += oa * tl.load(table_ptr + at, mask=mask, other=0.0)
    if b_offset_ptr is not None:
        out += tl.load(b_offset_ptr) * sa * windows[:, None].to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + channel, mask=mask_n, other=0.0)[None, :].to(tl.float32)

    # Relative to the first image of the tile, whose address is one of 64 bits.
    image = (first_m // pixels).to(tl.int32)
    n -= image
    corner = out_ptr + image.to(tl.int64) * out_pixels * all_rows
    if WIDE:
        n = n.to(tl.int64)
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    out = out.to(out_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        at = (n * out_pixels + pixel) * all_rows
        tl.store(corner + (at[:, None] + channel[None, :]), out, mask=mask)
    else:
        at = n * (out_pixels * all_rows) + pixel
        tl.store(corner + (at[None, :] + (channel * out_pixels)[:, None]), tl.trans(out), mask=tl.trans(mask))


@triton.jit
def _window_sums(sum_ptr, n, y, x, at_y, at_x, size_y, size_x):
    """Σ over the taps inside of the sums of codes of their inputs; y, x: of the first tap."""
    limit_y, limit_x = _unsigned(size_y), _unsigned(size_x)
    image = n.to(tl.int64) * size_y
    total = tl.zeros_like(y)
    for tap in range(at_y[1] * at_x[1]):
        tap_y = y + tap // at_x[1] * at_y[6]
        tap_x = x + tap % at_x[1] * at_x[6]
        inside = (tap_y.to(tl.uint32, bitcast=True) < limit_y) & (tap_x.to(tl.uint32, bitcast=True) < limit_x)
        total += tl.load(sum_ptr + ((image + tap_y) * size_x + tap_x) * tl.num_programs(1), mask=inside, other=0)
    return total


def conv(
    a: torch.Tensor,
    b: torch.Tensor,
    geometry,
    *,
    transposed: bool = False,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor | None = None,
    a_offset: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    classes: torch.Tensor | None = None,
    a_sums: torch.Tensor | None = None,
    b_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    config: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Launch fprop or, transposed, dgrad: (N, rows, H, W) of the output, of X if transposed, in channels_last memory or not.

        C = sa·sb·Σ qa qb + oa·table[class] + ob·sa·T + bias      T the sum of A's codes over the taps inside

    a: (N, pixels, C') int8, of the input, of dY if transposed; b: (rows, taps, C'/groups) int8, taps in the order of the
    kernel; both contiguous. geometry: size, out, kernel, stride, padding, dilation and groups of the convolution that is
    transposed or not, as `fqt.conv.Geometry` has them. N and the outputs' pixels ≥ 1.
    a_scale (N or 1,), b_scale (rows or 1,) or None for 1, a_offset like a_scale, with table (classes, rows) and classes
    (outputs,) int32, what an offset of 1 adds and where; b_offset (1,) with a_sums (N, pixels, groups) int32, the sums of
    a group's codes of a pixel; bias (rows,) of any floating dtype. The others are float32, and all contiguous.
    Bits do not depend on the configuration: operations of float32 in the order above, each rounded.

    Raises:
        TypeError: codes that are not int8.   ValueError: shapes that do not fit, or sums that leave int32.
    """
    _check(a, b, geometry, transposed)
    g, images, rows = geometry, a.shape[0], b.shape[0] // geometry.groups
    out_y, out_x = g.size if transposed else g.out
    phased = transposed and g.stride != (1, 1)
    axes = [_axis(g, axis, transposed, phased) for axis in (0, 1)]
    block_m, block_n, block_k, warps, stages = config
    phases = g.stride if phased else (1, 1)
    largest = math.prod(triton.cdiv(size, count) for size, count in zip((out_y, out_x), phases, strict=True))
    tiles = triton.cdiv(images * largest, block_m) * math.prod(phases)
    out = torch.empty(
        (images, out_y, out_x, b.shape[0]) if channels_last else (images, b.shape[0], out_y, out_x),
        dtype=out_dtype, device=a.device,
    )  # fmt: skip
    # As in `gemm.scaled_mm`: few elements of a thread at a time, in whole tiles where rows are stored in wide pieces.
    elements = block_m * block_n // (32 * warps)
    chunks = 1 if elements <= 32 and channels_last and is_aligned(rows) else min(max(elements // 16, 1), 4)
    width = (g.out if transposed else g.size)[1]
    # From the first tap to any.
    reach = (g.kernel[0] * g.dilation[0] * width + g.kernel[1] * g.dilation[1]) * a.shape[2]
    spans = images * largest + block_m, reach, (block_m // largest + 2) * out[0].numel()
    vectors = a_scale, b_scale, a_offset, table, classes, a_sums, b_offset, bias
    _conv_mm_kernel[(tiles * triton.cdiv(rows, block_n), g.groups)](
        a, b, out, vectors, images, out_y * out_x, *axes, b.shape[2], a.shape[2], rows, int(a_scale.numel() > 1),
        int(b_scale is not None and b_scale.numel() > 1), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP_M=GROUP_M, CHUNKS=chunks, EVEN=b.shape[2] % block_k == 0, PHASED=phased, CHANNELS_LAST=channels_last,
        WIDE=is_wide(*spans), num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2) if channels_last else out


def _axis(g, axis: int, transposed: bool, phased: bool) -> tuple[int, ...]:
    """What the kernel needs of a direction: (inputs, outputs, taps, input by output, input of output 0 at tap 0, by tap);
    if phased (inputs, outputs, taps, stride, padding, dilation, their divisor, the inverse of the rest of dilation)."""
    size, out, kernel, stride, padding, dilation = (
        pair[axis] for pair in (g.size, g.out, g.kernel, g.stride, g.padding, g.dilation)
    )
    if not transposed:
        return size, out, kernel, stride, -padding, dilation
    if not phased:
        return out, size, kernel, 1, padding, -dilation
    common = math.gcd(stride, dilation)
    return out, size, kernel, stride, padding, dilation, common, pow(dilation // common, -1, stride // common)


def _check(a: torch.Tensor, b: torch.Tensor, g, transposed: bool) -> None:
    """Refuse what the kernel would compute wrongly without a word."""
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"conv: a and b must be int8, got {a.dtype} and {b.dtype}")
    pixels, taps = math.prod(g.out if transposed else g.size), math.prod(g.kernel)
    if a.dim() != 3 or a.shape[1] != pixels or not a.is_contiguous():
        raise ValueError(f"conv: a must be contiguous (N, {pixels}, C), got {tuple(a.shape)} of strides {a.stride()}")
    fits = b.dim() == 3 and b.shape[1] == taps and b.shape[2] * g.groups == a.shape[2] and b.shape[0] % g.groups == 0
    if not fits or not b.is_contiguous():
        raise ValueError(
            f"conv: b must be contiguous (rows of {g.groups} groups, {taps}, {a.shape[2]} / {g.groups}), "
            f"got {tuple(b.shape)} of strides {b.stride()}"
        )
    if b.shape[0] * math.prod(g.size if transposed else g.out) >= 2**31:
        raise ValueError(f"conv: an image of {b.shape[0]} channels of the output's size has 2³¹ elements or more")
    if g.groups > 65_535:
        raise ValueError(f"conv: {g.groups} groups are more than the 65 535 programs of a grid's second axis")
    if taps * b.shape[2] > MAX_INT32_TERMS:
        raise ValueError(f"conv: sums of {taps}·{b.shape[2]} products leave int32, which holds {MAX_INT32_TERMS}")
