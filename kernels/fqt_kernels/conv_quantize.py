"""Quantization of images to int8 codes in the two layouts that convolutions contract, and both quantizations of a gradient.

    x ∘ multiplier ≈ q * scale (+ offset)      x (N, C, P), of any strides: P the pixels of an image
    rows (N, P, C')  for fprop and dgrad, C' ≥ C      cols (C, P, N')  for wgrad, N' a multiple of 16 where N ≥ 16

A scale is that of a tensor, an image, or a channel. Images are read twice: for the extremes of every group
(`conv_statistics`), and to write codes, tile by tile, in both layouts at once. A tile is [pixels·images, channels], images
fastest. From channels-last memory it is loaded as it is; from other memory with pixels last, and turned in registers.

What lies in the padding is 0. Random bits are those of the matrix (N·P, C). `fqt.conv.quantize` is the definition.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import is_wide, random_words, round_codes, scaled
from .conv_statistics import Ranged, has_pixels_last, image_params, in_units, is_aligned
from .gradient import Side
from .quantize import GRANULARITY
from .statistics import ZERO, Params

# Images, pixels, channels and warps of a tile, at most, by whether pixels are last in memory, and codes are written for
# wgrad: pieces of at least 16 codes in each layout. With more elements than in ODD_TILES a thread runs out of registers
# where extents are no multiples of 16.
TILES = {
    (False, False): (1, 64, 128, 8),
    (False, True): (64, 1, 128, 8),
    (True, False): (1, 64, 128, 8),
    (True, True): (16, 16, 32, 8),
}
ODD_TILES = {
    (False, False): (1, 16, 128, 8),
    (False, True): (64, 1, 32, 8),
    (True, False): (1, 32, 64, 8),
    (True, True): (16, 8, 16, 8),
}
ALIGNMENT = 16  # codes, to which a row of cols is padded


@triton.jit
def _load_images(x_ptr, first_n, first_p, first_c, N, C, P, stride_n, stride_c, stride_p,
                 PIXELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
    """A tile of x in float32, 0 outside: [BLOCK_P·BLOCK_N, BLOCK_C], images fastest."""
    corner = x_ptr + first_n * stride_n + first_p * stride_p + first_c * stride_c
    if PIXELS_LAST:
        n = _offsets(BLOCK_N, WIDE)[:, None, None]
        c = _offsets(BLOCK_C, WIDE)[None, :, None]
        p = _offsets(BLOCK_P, WIDE)[None, None, :]
        mask = (n < N - first_n) & (c < C - first_c) & (p < P - first_p)
        x = tl.load(corner + (n * stride_n + c * stride_c + p * stride_p), mask=mask, other=0.0)
        x = tl.reshape(tl.permute(x, (2, 0, 1)), (BLOCK_P * BLOCK_N, BLOCK_C))
    else:
        n, p, c = _within_tile(BLOCK_N, BLOCK_P, BLOCK_C, WIDE)
        mask = (n < N - first_n) & (c < C - first_c) & (p < P - first_p)
        x = tl.load(corner + (n * stride_n + c * stride_c + p * stride_p), mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _offsets(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return i.to(tl.int64) if WIDE else i


@triton.jit
def _within_tile(BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Image and pixel [BLOCK_P·BLOCK_N, 1] and channel [1, BLOCK_C] of a tile's elements, from its corner."""
    m = _offsets(BLOCK_P * BLOCK_N, WIDE)[:, None]
    return m % BLOCK_N, m // BLOCK_N, _offsets(BLOCK_C, WIDE)[None, :]


@triton.jit
def _corner(padded_n, padded_c, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first image, pixel and channel of the program's tile, int64; neighbours in memory at the same time."""
    num_n = tl.cdiv(padded_n, BLOCK_N)
    num_c = tl.cdiv(padded_c, BLOCK_C)
    first_c = (tl.program_id(0) % num_c).to(tl.int64) * BLOCK_C
    first_n = (tl.program_id(0) // num_c % num_n).to(tl.int64) * BLOCK_N
    first_p = (tl.program_id(0) // (num_c * num_n)).to(tl.int64) * BLOCK_P
    return first_n, first_p, first_c


@triton.jit
def _codes(x, mul_ptr, inv_ptr, zp_ptr, rng_ptr, stream, first_n, first_p, first_c, N, C, P,
           BY_IMAGE: tl.constexpr, GRANULARITY: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
           STOCHASTIC: tl.constexpr, PTX: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """int8 codes of a tile times its factors; 0 in the padding."""
    n, p, c = _within_tile(BLOCK_N, BLOCK_P, BLOCK_C, False)
    mask_n, mask_p, mask_c = n < N - first_n, p < P - first_p, c < C - first_c
    if mul_ptr is not None:
        if BY_IMAGE:
            x = x * tl.load(mul_ptr + first_n + n, mask=mask_n, other=0.0)
        else:
            x = x * tl.load(mul_ptr + first_c + c, mask=mask_c, other=0.0)
    if GRANULARITY == 0:
        group = tl.zeros((1, 1), tl.int64)
        mask = group == 0
    elif GRANULARITY == 1:
        group = first_n + n
        mask = mask_n
    else:
        group = first_c + c
        mask = mask_c
    inv = tl.load(inv_ptr + group, mask=mask, other=0.0)
    zp = inv * 0.0
    if ZERO != 0:
        zp = tl.load(zp_ptr + group, mask=mask, other=0.0)
    words = 0
    if STOCHASTIC:
        rows = (first_n + n) * P + (first_p + p)
        blocks = (first_c // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
        words = random_words(tl.load(rng_ptr), tl.load(rng_ptr + 1), stream, rows, blocks)
    q = round_codes(scaled(x, inv, zp, ZERO, STOCHASTIC), words, BITS, ZERO, STOCHASTIC, False, PTX)
    return tl.where(mask_n & mask_p & mask_c, q, 0)


@triton.jit
def _store_rows(rows_ptr, sum_ptr, q, first_n, first_p, first_c, N, P, padded_c,
                BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write a tile of codes (N, P, C'), and add up each pixel's; a None pointer asks for nothing."""
    n, p, c = _within_tile(BLOCK_N, BLOCK_P, BLOCK_C, WIDE)
    pixel = n * P + p
    mask = (n < N - first_n) & (p < P - first_p)
    corner = first_n * P + first_p
    if rows_ptr is not None:
        out = rows_ptr + (corner * padded_c + first_c) + (pixel * padded_c + c)
        tl.store(out, q, mask=mask & (c < padded_c - first_c))
    if sum_ptr is not None:
        tl.atomic_add(sum_ptr + corner + pixel, tl.sum(q.to(tl.int32), 1, keep_dims=True), mask=mask)


@triton.jit
def _store_cols(cols_ptr, q, first_n, first_p, first_c, C, P, padded_n,
                BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Write a tile of codes (C, P, N'), if there is a pointer."""
    if cols_ptr is not None:
        n, p, c = _within_tile(BLOCK_N, BLOCK_P, BLOCK_C, WIDE)
        mask = (n < padded_n - first_n) & (p < P - first_p) & (c < C - first_c)
        corner = (first_c * P + first_p) * padded_n + first_n
        tl.store(cols_ptr + corner + ((c * P + p) * padded_n + n), q, mask=mask)


@triton.jit(do_not_specialize=["stream"])
def _images_kernel(
    x_ptr, mul_ptr, inv_ptr, zp_ptr, rng_ptr, rows_ptr, cols_ptr, sum_ptr,
    N, C, P, stride_n, stride_c, stride_p, padded_n, padded_c, stream,
    BY_IMAGE: tl.constexpr, GRANULARITY: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr, PTX: tl.constexpr, PIXELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    P, stride_n, stride_c = P * UNIT, stride_n * UNIT, stride_c * UNIT
    n, p, c = _corner(padded_n, padded_c, BLOCK_N, BLOCK_P, BLOCK_C)
    x = _load_images(
        x_ptr, n, p, c, N, C, P, stride_n, stride_c, stride_p, PIXELS_LAST, BLOCK_N, BLOCK_P, BLOCK_C, WIDE
    )  # fmt: skip
    q = _codes(
        x, mul_ptr, inv_ptr, zp_ptr, rng_ptr, stream, n, p, c, N, C, P,
        BY_IMAGE, GRANULARITY, BITS, ZERO, STOCHASTIC, PTX, BLOCK_N, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    _store_rows(rows_ptr, sum_ptr, q, n, p, c, N, P, padded_c, BLOCK_N, BLOCK_P, BLOCK_C, WIDE)
    _store_cols(cols_ptr, q, n, p, c, C, P, padded_n, BLOCK_N, BLOCK_P, BLOCK_C, WIDE)


@triton.jit(do_not_specialize=["stream_g", "stream_h"])
def _gradient_images_kernel(
    x_ptr, g_mul_ptr, h_mul_ptr, g_inv_ptr, g_zp_ptr, h_inv_ptr, h_zp_ptr, rng_ptr, rows_ptr, cols_ptr, sum_ptr,
    N, C, P, stride_n, stride_c, stride_p, padded_n, padded_c, stream_g, stream_h,
    G_GRANULARITY: tl.constexpr, H_GRANULARITY: tl.constexpr, G_BITS: tl.constexpr, H_BITS: tl.constexpr,
    G_ZERO: tl.constexpr, H_ZERO: tl.constexpr, PTX: tl.constexpr, PIXELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    P, stride_n, stride_c = P * UNIT, stride_n * UNIT, stride_c * UNIT
    n, p, c = _corner(padded_n, padded_c, BLOCK_N, BLOCK_P, BLOCK_C)
    x = _load_images(
        x_ptr, n, p, c, N, C, P, stride_n, stride_c, stride_p, PIXELS_LAST, BLOCK_N, BLOCK_P, BLOCK_C, WIDE
    )  # fmt: skip
    q = _codes(
        x, g_mul_ptr, g_inv_ptr, g_zp_ptr, rng_ptr, stream_g, n, p, c, N, C, P,
        False, G_GRANULARITY, G_BITS, G_ZERO, True, PTX, BLOCK_N, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    _store_rows(rows_ptr, sum_ptr, q, n, p, c, N, P, padded_c, BLOCK_N, BLOCK_P, BLOCK_C, WIDE)
    q = _codes(
        x, h_mul_ptr, h_inv_ptr, h_zp_ptr, rng_ptr, stream_h, n, p, c, N, C, P,
        True, H_GRANULARITY, H_BITS, H_ZERO, True, PTX, BLOCK_N, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    _store_cols(cols_ptr, q, n, p, c, C, P, padded_n, BLOCK_N, BLOCK_P, BLOCK_C, WIDE)


def tiles_of(x: torch.Tensor, channels: int, images: int, cols: bool) -> list[tuple[int, int, int, int]]:
    """The tiles that x (N, C, P) may have, at most, the usual one first; channels and images as in `tile_of`."""
    fits = is_aligned(*x.stride()) or in_units(x)[0] > 1
    tables = (TILES, ODD_TILES) if fits and is_aligned(channels, images) else (ODD_TILES,)
    return [table[has_pixels_last(x), cols] for table in tables]


def stored_images(n: int, cols: bool) -> int:
    """To how many images a row of cols is padded; n without cols."""
    return triton.cdiv(n, ALIGNMENT) * ALIGNMENT if cols and n >= ALIGNMENT else n


def tile_of(
    x: torch.Tensor, channels: int, images: int, cols: bool, tile: tuple[int, int, int, int] | None = None
) -> tuple[int, int, int, int]:
    """Images, pixels, channels, warps of a tile of x (N, C, P); codes are (N, P, channels), and, if cols, (C, P, images).

    tile: one of `tiles_of`, None for the usual one. Raises ValueError for another.
    """
    tiles = tiles_of(x, channels, images, cols)
    if tile is not None and tuple(tile) not in tiles:
        raise ValueError(f"images of shape {tuple(x.shape)} and strides {x.stride()} have tiles of {tiles}, got {tile}")
    most_n, most_p, most_c, warps = tile or tiles[0]
    block_n = min(triton.next_power_of_2(images), most_n)
    block_c = min(max(triton.next_power_of_2(channels), 8), most_c)  # a random number is for 8 of them
    block_p = min(triton.next_power_of_2(x.shape[2]), most_n * most_p * most_c // (block_n * block_c))
    return block_n, block_p, block_c, warps


class Launch(NamedTuple):
    """Of the kernels over tiles: what they write, or None; the grid; the sizes and the constants that they take."""

    rows: torch.Tensor | None
    cols: torch.Tensor | None
    sums: torch.Tensor | None
    grid: tuple[int]
    sizes: tuple[int, ...]
    flags: dict[str, int]

    @classmethod
    def of(
        cls, x: torch.Tensor, channels: int, rows: bool, cols: bool, sums: bool, tile: tuple[int, int, int, int] | None
    ) -> "Launch":
        """That of x (N, C, P); channels: of a row, with padding; tile: as in `tile_of`."""
        n, c, p = x.shape
        channels, images = max(channels, c), stored_images(n, cols)
        new = lambda *shape: torch.empty(*shape, dtype=torch.int8, device=x.device)  # noqa: E731
        block_n, block_p, block_c, warps = tile_of(x, channels, images, cols, tile)
        spans = sum(block * stride for block, stride in zip((block_n, block_c, block_p), x.stride(), strict=True))
        unit, sizes = in_units(x)
        return cls(
            new(n, p, channels) if rows else None,
            new(c, p, images) if cols else None,
            torch.zeros(n, p, 1, dtype=torch.int32, device=x.device) if sums else None,
            (triton.cdiv(images, block_n) * triton.cdiv(p, block_p) * triton.cdiv(channels, block_c),),
            (*sizes, images, channels),
            dict(
                PIXELS_LAST=has_pixels_last(x), UNIT=unit, BLOCK_N=block_n, BLOCK_P=block_p, BLOCK_C=block_c,
                WIDE=is_wide(spans, block_n * p * channels, block_c * p * images), num_warps=warps,
                enable_fp_fusion=False,
            ),
        )  # fmt: skip

    def sums_of(self, c: int, groups: int) -> torch.Tensor:
        """(N, P, groups) int32: the sums of the c channels of the rows, or, of several groups, of each."""
        if groups == 1:
            return self.sums
        n, p, _ = self.rows.shape
        return self.rows[..., :c].reshape(n, p, groups, c // groups).sum(3, dtype=torch.int32)


def quantize_images(
    x: torch.Tensor,
    *,
    bits: int,
    granularity: str,
    zero: str,
    groups: int = 1,
    channels: int = 0,
    multiplier: torch.Tensor | None = None,
    rng: torch.Tensor | None = None,
    stream: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
    ptx: bool = True,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the quantization of images x (N, C, P), float32, float16 or bfloat16, any strides, N, C and P ≥ 1.

    zero is "symmetric", "grid" or "min"; granularity "per_tensor", "per_row" (images) or "per_column" (channels).
    multiplier is (N, 1) or (1, C) float32: one that is not finite makes its groups non-finite. channels: to which rows is
    padded, 0 for C. rng (2,) int64 (key, step) asks for stochastic rounding, stream is the whole fourth counter word
    (stream + 256·rank). sums: of the codes of each pixel's channels, if rows, in so many groups. ptx False keeps to Triton's
    own operations on every GPU. tile: one of `tiles_of`, None for the usual one; it changes no bit.

    Returns:
        rows (N, P, channels), cols (C, P, N') int8; scale, offset (1,), (N,) or (C,) float32; sums (N, P, groups) int32;
        None for each that was not asked for.
    """
    by_image = multiplier is not None and multiplier.shape[0] == x.shape[0] and multiplier.shape[1] == 1
    factors = None if multiplier is None else multiplier.flatten().contiguous()
    ranged, sums = Ranged(Side(bits, granularity, zero), factors, by_image), sums and rows
    (out,), _ = image_params(x, [ranged])
    to = Launch.of(x, channels, rows, cols, sums and groups == 1, tile)
    _images_kernel[to.grid](
        x, factors, out.inv, out.zp, rng, to.rows, to.cols, to.sums, *to.sizes, stream,
        BY_IMAGE=by_image, GRANULARITY=GRANULARITY[granularity], BITS=bits, ZERO=ZERO[zero], STOCHASTIC=rng is not None,
        PTX=ptx, **to.flags,
    )  # fmt: skip
    return to.rows, to.cols, *_flat(out), to.sums_of(x.shape[1], groups) if sums else None


def _flat(out: Params) -> tuple[torch.Tensor, torch.Tensor | None]:
    """scale and offset, one for each group."""
    return out.scale.flatten(), None if out.offset is None else out.offset.flatten()


def quantize_gradient_images(
    dy: torch.Tensor,
    g: Side,
    h: Side,
    *,
    row_mul: torch.Tensor | None,
    col_mul: torch.Tensor | None,
    rng: torch.Tensor,
    streams: tuple[int, int],
    groups: int = 1,
    channels: int = 0,
    sums: bool = False,
    bias: bool = False,
    ptx: bool = True,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...], torch.Tensor | None]:
    """Launch both quantizations of dY (N, C, P), float32, float16 or bfloat16, any strides, N, C and P ≥ 1, stochastic.

    G = dY·col_mul[c] makes the rows, for dgrad, with the scales of g, "per_tensor" or "per_row"; H = dY·row_mul[n] the cols,
    for wgrad, with those of h, "per_tensor" or "per_column". row_mul (N,) and col_mul (C,) contiguous float32, or None;
    streams of G and of H, whole counter words. bias: with the sums of dY of each channel, (C,) float32, added up in one
    order, which is another in channels-last memory than in contiguous. The rest is as in `quantize_images`.

    Returns:
        (rows, scale, offset, sums), (cols, scale, offset), and the sums of dY or None.
    """
    (of_g, of_h), total = image_params(dy, [Ranged(g, col_mul, False), Ranged(h, row_mul, True)], bias)
    to = Launch.of(dy, channels, True, True, sums and groups == 1, tile)
    _gradient_images_kernel[to.grid](
        dy, col_mul, row_mul, of_g.inv, of_g.zp, of_h.inv, of_h.zp, rng, to.rows, to.cols, to.sums, *to.sizes, *streams,
        G_GRANULARITY=GRANULARITY[g.granularity], H_GRANULARITY=GRANULARITY[h.granularity],
        G_BITS=g.bits, H_BITS=h.bits, G_ZERO=ZERO[g.zero], H_ZERO=ZERO[h.zero], PTX=ptx, **to.flags,
    )  # fmt: skip
    pixel_sums = to.sums_of(dy.shape[1], groups) if sums else None
    return (to.rows, *_flat(of_g), pixel_sums), (to.cols, *_flat(of_h)), total
