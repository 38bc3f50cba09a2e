"""Ranges of images' groups (the tensor, each image, or each channel) and the quantization parameters that follow from them.

The extremes are found of each channel of each image, and multiplied by its factor then: rounding is monotone, so that they
are the extremes of the products, and one pass over the images serves quantizations with different factors. Partial extremes
are those of `statistics`, which reduces them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import from_ordered, is_wide
from .gradient import Side
from .quantize import GRANULARITY
from .statistics import ZERO, Params, _params_kernel, empty_params, is_symmetric, load_tile, row_stats, widen

TILE, LONGEST, WARPS = 4096, 256, 8  # elements of a tile, at most so many of them contiguous in memory
SMALL_TILE = 2048  # with sums, or strides that are no multiples of 16: with more, a thread needs too many registers
PROGRAMS = 1024  # about so many, each for some channels of some images
PARAMS_BLOCK = {True: (1024, 1), False: (128, 8)}  # parts and groups of a block: by whether there is one group


class Ranged(NamedTuple):
    """A quantization of x ∘ multiplier (contiguous factors of images or of channels, or None) whose ranges are wanted."""

    side: Side
    multiplier: torch.Tensor | None
    by_image: bool


def has_pixels_last(x: torch.Tensor) -> bool:
    """Whether neighbours in the memory of x (N, C, P) are pixels rather than channels."""
    _, c, p = x.shape
    return p > 1 and (c == 1 or x.stride(2) < x.stride(1))


def in_units(x: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """(unit, (N, C, P, strides)) of x (N, C, P): P and the first two strides in units of so many elements.

    Triton knows of multiples of 16 only. Where pixels are last, rows of 14·14 of them are read in pieces of 4.
    """
    (n, c, p), (stride_n, stride_c, stride_p) = x.shape, x.stride()
    rows = (p, stride_n, stride_c)
    is_fit = has_pixels_last(x) and stride_p == 1 and not is_aligned(*rows) and all(size % 4 == 0 for size in rows)
    unit = 4 if is_fit and stride_n < 2**31 else 1  # the kernels multiply it in 32 bits
    return unit, (n, c, p // unit, stride_n // unit, stride_c // unit, stride_p)


def is_aligned(*sizes: int) -> bool:
    return all(size == 1 or size % 16 == 0 for size in sizes)


@triton.jit
def _factor(mul_ptr, n, c, mask_c, BY_IMAGE: tl.constexpr):
    """What the channels c of image n are multiplied by, to broadcast against c."""
    if mul_ptr is None:
        factor = 1.0
    elif BY_IMAGE:
        factor = tl.load(mul_ptr + n)
    else:
        factor = tl.load(mul_ptr + c, mask=mask_c, other=0.0)
    return factor


@triton.jit
def _store_extremes(partial_ptr, at, second, hi, lo, mask, SYM: tl.constexpr):
    tl.store(partial_ptr + at, hi, mask=mask)
    if not SYM:
        tl.store(partial_ptr + second + at, lo, mask=mask)


@triton.jit
def _widen_by_image(
    hi, lo, partial_ptr, high, low, factor, mask, at, second, GRANULARITY: tl.constexpr, SYM: tl.constexpr
):
    """The running extremes with those of an image's channels, times factor; with a scale per image, these are stored."""
    if GRANULARITY == 1:
        hi = tl.full(hi.shape, -2147483648, tl.int32)
        lo = hi
    hi, lo = widen(hi, lo, high * factor, mask, SYM)
    hi, lo = widen(hi, lo, low * factor, mask, SYM)  # a factor may be negative
    if GRANULARITY == 1:
        _store_extremes(partial_ptr, at, second, tl.max(hi, 0), tl.max(lo, 0), None, SYM)
    return hi, lo


@triton.jit
def _store_last(partial_ptr, hi, lo, mask, c, part, C, second, GRANULARITY: tl.constexpr, SYM: tl.constexpr):
    """The extremes of all images of a program, of each channel or of all."""
    if GRANULARITY == 0:
        at = tl.program_id(0).to(tl.int64)
        _store_extremes(partial_ptr, at, second, tl.max(hi, 0), tl.max(lo, 0), None, SYM)
    elif GRANULARITY == 2:
        _store_extremes(partial_ptr, part * C + c, second, hi, lo, mask, SYM)


@triton.jit(do_not_specialize=["images", "tiles", "second_a", "second_b"])
def _image_stats_kernel(
    x_ptr, a_mul_ptr, b_mul_ptr, a_partial_ptr, b_partial_ptr, sums_ptr,
    N, C, P, stride_n, stride_c, stride_p, images, tiles, second_a, second_b,
    A_BY_IMAGE: tl.constexpr, B_BY_IMAGE: tl.constexpr, A_GRANULARITY: tl.constexpr, B_GRANULARITY: tl.constexpr,
    A_SYM: tl.constexpr, B_SYM: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # A program is for a block of channels, some images, and some of their pixels. second: where lower extremes start.
    P, stride_n, stride_c = P * UNIT, stride_n * UNIT, stride_c * UNIT
    num_c = tl.cdiv(C, BLOCK_C)
    num_p = tl.cdiv(P, tiles * BLOCK_P)
    block_c = tl.program_id(0) % num_c
    part = tl.program_id(0) // num_c
    first_c = block_c.to(tl.int64) * BLOCK_C
    first_p = (part % num_p) * tiles * BLOCK_P
    row = (block_c * num_p + part % num_p) * N
    c = first_c + tl.arange(0, BLOCK_C)
    mask_c = c < C
    SYM: tl.constexpr = A_SYM and B_SYM
    lowest = tl.full((BLOCK_P, BLOCK_C), -2147483648, tl.int32)
    a_hi = tl.full((BLOCK_C,), -2147483648, tl.int32)
    a_lo, b_hi, b_lo = a_hi, a_hi, a_hi
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for image in range(tl.minimum(images, N - (part // num_p) * images)):
        n = (part // num_p) * images + image
        hi, lo = lowest, lowest
        for step in range(tl.cdiv(tl.minimum(tiles * BLOCK_P, P - first_p), BLOCK_P)):
            x, mask_p, _ = load_tile(
                x_ptr + n.to(tl.int64) * stride_n, (first_p + step * BLOCK_P).to(tl.int64), first_c,
                P, C, stride_p, stride_c, BLOCK_P, BLOCK_C, WIDE,
            )  # fmt: skip
            hi, lo = widen(hi, lo, x, mask_p, SYM)
            if sums_ptr is not None:
                total += x
        high = from_ordered(tl.max(hi, 0))
        low = -high if SYM else -from_ordered(tl.max(lo, 0))
        if a_partial_ptr is not None:
            factor = _factor(a_mul_ptr, n, c, mask_c, A_BY_IMAGE)
            a_hi, a_lo = _widen_by_image(
                a_hi, a_lo, a_partial_ptr, high, low, factor, mask_c, row + n, second_a, A_GRANULARITY, A_SYM
            )
        if b_partial_ptr is not None:
            factor = _factor(b_mul_ptr, n, c, mask_c, B_BY_IMAGE)
            b_hi, b_lo = _widen_by_image(
                b_hi, b_lo, b_partial_ptr, high, low, factor, mask_c, row + n, second_b, B_GRANULARITY, B_SYM
            )
    if a_partial_ptr is not None:
        _store_last(a_partial_ptr, a_hi, a_lo, mask_c, c, part, C, second_a, A_GRANULARITY, A_SYM)
    if b_partial_ptr is not None:
        _store_last(b_partial_ptr, b_hi, b_lo, mask_c, c, part, C, second_b, B_GRANULARITY, B_SYM)
    if sums_ptr is not None:
        tl.store(sums_ptr + part * C + c, tl.sum(total, 0), mask=mask_c)


def image_params(x: torch.Tensor, wanted: list[Ranged], sums: bool = False) -> tuple[list[Params], torch.Tensor | None]:
    """Launch the parameters of one or two quantizations of x (N, C, P) and, if sums, the sums of each channel (C,) float32.

    The sums are added up in one order, which is another in channels-last memory than in contiguous.
    """
    partials, parts = image_stats(x, wanted, sums)
    found = []
    for ranged, partial in zip(wanted, partials, strict=True):
        found.append(empty_params((partial.shape[2], 1), ranged.side.zero, x.device))
        _params(ranged.side, partial, found[-1])
    if not sums:
        return found, None
    total = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    _params(wanted[0].side, sums=parts, total=total)
    return found, total


def image_stats(
    x: torch.Tensor, wanted: list[Ranged], sums: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Launch the partial extremes of one or two quantizations of x (N, C, P): each (1 if symmetric else 2, S, groups) int32.

    With them, if sums, the partial sums of x of each channel, (S, C) float32, else None.
    """
    matrix = None if sums else _as_matrix(x, wanted)
    if matrix is not None:
        whole = all(r.side.granularity == "per_tensor" for r in wanted)
        partial = row_stats(matrix, "per_tensor" if whole else "per_row", is_symmetric(wanted[0].side.zero))
        # Parts of the images are parts of the tensor.
        return [partial if r.side.granularity == "per_row" else partial.view(len(partial), -1, 1) for r in wanted], None
    n, c, p = x.shape
    block_p, block_c = _block(x, sums)
    num_c, num_p = triton.cdiv(c, block_c), triton.cdiv(p, block_p)
    images = max(n * num_c // PROGRAMS, 1)
    tiles = triton.cdiv(num_p, max(min(PROGRAMS // (n * num_c), num_p), 1))
    pieces = triton.cdiv(num_p, tiles)
    parts = triton.cdiv(n, images) * pieces
    shapes = {"per_tensor": (parts * num_c, 1), "per_row": (num_c * pieces, n), "per_column": (parts, c)}
    partials = [
        torch.empty(
            1 if is_symmetric(r.side.zero) else 2, *shapes[r.side.granularity], dtype=torch.int32, device=x.device
        )
        for r in wanted
    ]
    partial_sums = torch.empty(parts, c, dtype=torch.float32, device=x.device) if sums else None
    a, b = wanted[0], wanted[-1]
    unit, sizes = in_units(x)
    _image_stats_kernel[(parts * num_c,)](
        x, a.multiplier, b.multiplier, partials[0], partials[1] if len(wanted) == 2 else None, partial_sums,
        *sizes, images, tiles, *(partials[i][0].numel() for i in (0, -1)), A_BY_IMAGE=a.by_image, B_BY_IMAGE=b.by_image,
        A_GRANULARITY=GRANULARITY[a.side.granularity], B_GRANULARITY=GRANULARITY[b.side.granularity],
        A_SYM=is_symmetric(a.side.zero), B_SYM=is_symmetric(b.side.zero), UNIT=unit, BLOCK_P=block_p, BLOCK_C=block_c,
        WIDE=is_wide(block_p * x.stride(2) + block_c * x.stride(1)), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return partials, partial_sums


def _block(x: torch.Tensor, sums: bool) -> tuple[int, int]:
    """Pixels and channels of a tile of x (N, C, P): as many as may be of those that are neighbours in memory."""
    elements = TILE if is_aligned(*x.stride()) and not sums else SMALL_TILE
    p, c = (triton.next_power_of_2(size) for size in (x.shape[2], x.shape[1]))
    if has_pixels_last(x):
        block_p = min(p, LONGEST)
        return block_p, min(c, elements // block_p)
    block_c = min(c, LONGEST)
    return min(p, elements // block_c), block_c


def _as_matrix(x: torch.Tensor, wanted: list[Ranged]) -> torch.Tensor | None:
    """The memory of x (N, C, P) as a matrix of N rows, in whichever order, where that has the ranges that are wanted."""
    kinds = {(r.multiplier is None, r.side.granularity == "per_column", is_symmetric(r.side.zero)) for r in wanted}
    if kinds in ({(True, False, False)}, {(True, False, True)}):
        for y in (x, x.transpose(1, 2)):
            if y[0].is_contiguous():
                return y.flatten(1)
    return None


def _params(
    side: Side,
    partial: torch.Tensor | None = None,
    out: Params | None = None,
    sums: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """`statistics.params`, with blocks for many parts of few groups."""
    parts, groups = (sums if partial is None else partial).shape[-2:]
    block_s, block_g = PARAMS_BLOCK[groups == 1]
    _params_kernel[(triton.cdiv(groups, block_g),)](
        partial, sums, *(out or (None,) * 4), total, parts, groups,
        BITS=side.bits, ZERO=ZERO[side.zero], BLOCK_S=block_s, BLOCK_G=block_g, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
