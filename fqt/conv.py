"""Convolutions of codes: geometry, the codes of images, and the three products in plain torch, the specification.

    fprop  Y[n,o,p,q]  = Σ_{r,s,c} X[n,c,y,x] W[o,c,r,s]      y = p·stride + r·dilation - padding, x likewise
    dgrad  dX[n,c,y,x] = Σ_{r,s,o} dY[n,o,p,q] W[o,c,r,s]     over the (r, s) for which such p and q exist
    wgrad  dW[o,c,r,s] = Σ_{n,p,q} dY[n,o,p,q] X[n,c,y,x]

A sample is an image: its H·W·C elements share a scale, which factors out of fprop and dgrad; so does a scale for each
output channel of W out of fprop. What lies on a contracted index is folded into dY before that is quantized, as in a linear
layer. Outside of an image X and dY are 0, which need not be a code. Codes there are taken to be 0, and what an offset adds
depends on which taps fall inside (below V and T; `Border`), so that padding is exact for every quantizer:

    A = qa·sa + oa, B = qb·sb + ob   ⇒   C = sa·sb·(qa * qb) + oa·(sb·V + ob·terms) + ob·sa·T + bias

with V the sum of B's codes and T that of A's over the terms inside of the image. Images are (N, C, pixels), pixels in the
order (row, column). One-dimensional convolutions are those of images of height 1.

Sources: StatQuant (arXiv 2010.14298), its published code (a sample is an image); the identity: [derived].
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .capture import Constants
from .recipe import Quantizer

ALIGNMENT = 16  # codes: loads narrower than 16 bytes cost far more than zeros that pad a row to them
_EXACT_TERMS = 1024  # products of two int8 codes that one float32 can always sum: 1024 · 2¹⁴ = 2²⁴
_EXACT_NIBBLE_TERMS = 8738  # of a code and four bits: 8738 · 128 · 15 < 2²⁴


class Geometry(NamedTuple):
    """A two-dimensional convolution, but for its channels: pairs are (vertical, horizontal).

    padding is that before the first row and column; how much follows the last is in out, the size of the output.
    """

    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> Geometry:
        """That of images of this size; padding is (before, after) vertically, then horizontally.

        Raises:
            ValueError: the kernel is larger than the padded image.
        """
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        padded = [s + sum(p) for s, p in zip(size, padding, strict=True)]
        if any(span > have for span, have in zip(spans, padded, strict=True)):
            raise ValueError(
                f"a kernel that spans {tuple(spans)} pixels is larger than the padded image {tuple(padded)}"
            )
        out = tuple((have - span) // s + 1 for have, span, s in zip(padded, spans, stride, strict=True))
        return cls(
            tuple(size), out, tuple(kernel), tuple(stride), tuple(p[0] for p in padding), tuple(dilation), groups
        )

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of an input image."""
        return self.size[0] * self.size[1]

    @property
    def out_pixels(self) -> int:
        return self.out[0] * self.out[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether every product is that of two matrices: 1x1 without stride, padding and groups."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0) and self.out == self.size and (
            self.groups == 1
        )  # fmt: skip

    def inside(self, axis: int, transposed: bool = False, device: str | None = None) -> Tensor:
        """(outputs, kernel) bool: whether the tap of an output lies inside of the image, vertically (0) or horizontally (1).

        transposed: of dgrad, whose outputs are the pixels of X and whose image is dY.
        """
        k, s, before, d = (pair[axis] for pair in (self.kernel, self.stride, self.padding, self.dilation))
        size, out = self.size[axis], self.out[axis]
        taps = torch.arange(k, device=device) * d
        if not transposed:
            at = torch.arange(out, device=device)[:, None] * s + taps - before
            return (at >= 0) & (at < size)
        at = torch.arange(size, device=device)[:, None] + before - taps
        return (at % s == 0) & (at >= 0) & (at < out * s)


class Border(NamedTuple):
    """Which taps of the outputs lie inside of the image: most outputs are alike.

    classes: (outputs,) int32, that of each output pixel.   masks: (classes, taps) float64, 1 for a tap inside, else 0.
    """

    classes: Tensor
    masks: Tensor

    def sums(self, each: Tensor) -> Tensor:
        """(classes, rows) float64, exact: what `each` (rows, taps) int32 comes to over the taps inside."""
        return self.masks @ each.double().t()


def border(geometry: Geometry, transposed: bool = False, device: str = "cpu") -> Border:
    """The border of fprop, or, transposed, of dgrad."""
    return _borders(geometry, transposed, device)


def inside(geometry: Geometry, axis: int, transposed: bool = False, device: str = "cpu") -> Tensor:
    """`Geometry.inside` in float64 on a device."""
    return _insides(geometry, axis, transposed, device)


def _make_border(geometry: Geometry, transposed: bool, device: str) -> Border:
    (rows, at_y), (cols, at_x) = (_kinds(geometry, axis, transposed, device) for axis in (0, 1))
    masks = rows[:, None, :, None] & cols[None, :, None, :]
    classes = at_y[:, None] * len(cols) + at_x
    masks = masks.reshape(len(rows) * len(cols), geometry.taps)
    return Border(classes.flatten().to(torch.int32), masks.to(torch.float64))


def _kinds(geometry: Geometry, axis: int, transposed: bool, device: str) -> tuple[Tensor, Tensor]:
    """The distinct rows of `Geometry.inside`, (kinds, kernel) bool, and which of them each output has, (outputs,) int64.

    Which outputs are the first of their kind is found on the host; nothing is copied from there.
    """
    with torch.device("cpu"):
        _, kind = torch.unique(geometry.inside(axis, transposed), dim=0, return_inverse=True)
    numbers = kind.tolist()
    each = geometry.inside(axis, transposed, device)
    kinds = [each[numbers.index(number)] for number in range(max(numbers) + 1)]
    at = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    for number, row in enumerate(kinds):
        at.masked_fill_((each == row).all(1), number)
    return torch.stack(kinds), at


def _make_inside(geometry: Geometry, axis: int, transposed: bool, device: str) -> Tensor:
    return geometry.inside(axis, transposed, device).to(torch.float64)


_borders, _insides = Constants(_make_border), Constants(_make_inside)


def sums_of_taps(each: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
    """(rows, taps) float64: what each (rows, outputs) comes to over the outputs whose tap lies inside; exact for integers.

    transposed: outputs are the pixels of X that a tap looks at.
    """
    rows, cols = (inside(geometry, axis, transposed, str(each.device)) for axis in (0, 1))
    images = each.double().unflatten(1, geometry.size if transposed else geometry.out)
    return torch.einsum("iyx,yr,xs->irs", images, rows, cols).flatten(1)


# ---- quantized operands


class Images(NamedTuple):
    """Quantized images (N, C, pixels): x ≈ q * scale (+ offset).

    rows: (N, pixels, C) int8, for fprop and dgrad; C may be padded with zero codes.   cols: (C, pixels, N) int8, the same
    codes or others of their own for wgrad; N may be padded likewise.   scale, offset (None where symmetric): (1,), (N,), or
    (C,) for wgrad only, float32 (float64).   sums: (N, pixels, groups) int32, of the codes of a pixel's channels of each
    group, where the other operand has an offset.
    """

    rows: Tensor | None
    cols: Tensor | None
    scale: Tensor
    offset: Tensor | None
    sums: Tensor | None = None


class Filters(NamedTuple):
    """Quantized filters as an operand of fprop, rows output channels, or of dgrad, rows input channels.

    q: (rows, taps, channels of a group) int8; channels may be padded with zero codes where there is one group.
    scale: (1,), (rows,), or None for 1.   offset: (1,) or None.   sums: (rows, taps) int32, of the codes of a tap, or None.
    channels: of a group, without padding.
    """

    q: Tensor
    scale: Tensor | None
    offset: Tensor | None
    sums: Tensor | None
    channels: int


def padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def padded_images(n: int) -> int:
    """The length of a row of `Images.cols`: small batches, which would mostly be padding, have none."""
    return padded(n) if n >= ALIGNMENT else n


def quantize(
    x: Tensor,
    quantizer: Quantizer,
    *,
    groups: int = 1,
    channels: int = 0,
    multiplier: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    rank: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
) -> Images:
    """Quantize images (N, C, pixels), floating point, of any strides.

    per_row is a scale for each image, per_column one for each channel. The random bits are those of the matrix
    (N·pixels, C), so that a pixel's channels are neighbours.

    Args:
        channels: to which the codes in rows are padded; 0 for C.   multiplier: (N, 1) or (1, C), folded into x first.
        rng, stream, rank: see `fqt.reference.random_bits`.   sums: of rows.

    See `fqt.reference.quantize` for what is not finite; its householder flag is not looked at here either.
    """
    n, c, p = x.shape
    y = x.to(reference.compute_dtype(x))
    if multiplier is not None:
        y = y * multiplier.to(y.dtype)[:, :, None]
    dims = {"per_tensor": (0, 1, 2), "per_row": (1, 2), "per_column": (0, 2)}[quantizer.granularity]
    if y.numel() == 0:
        lo = hi = y.new_zeros([1 if d in dims else y.shape[d] for d in range(3)])
    elif quantizer.zero == "symmetric":
        hi = y.abs().amax(dims, keepdim=True)
        lo = -hi
    else:
        lo, hi = y.amin(dims, keepdim=True), y.amax(dims, keepdim=True)
    bits = None
    if quantizer.rounding == "stochastic":
        bits = reference.random_bits(rng, n * p, c, stream=stream, rank=rank).view(n, p, c).transpose(1, 2)
    q, scale, offset = reference.codes(y, lo, hi, quantizer, bits)
    by_pixel = q.transpose(1, 2)
    return Images(
        F.pad(by_pixel, (0, max(channels - c, 0))).contiguous() if rows else None,
        F.pad(q.permute(1, 2, 0), (0, padded_images(n) - n)).contiguous() if cols else None,
        scale.flatten(),
        None if offset is None else offset.flatten(),
        pixel_sums(by_pixel, groups) if sums and rows else None,
    )


def pixel_sums(rows: Tensor, groups: int) -> Tensor:
    """(N, pixels, groups) int32 of codes (N, pixels, C)."""
    n, p, c = rows.shape
    return rows.reshape(n, p, groups, c // groups).sum(3, dtype=torch.int32)


def filters(q: Tensor, geometry: Geometry, channels: int) -> tuple[Tensor, Tensor]:
    """Codes of W (O, C/groups, R, S) as (O, taps, C/groups) for fprop and (C, taps, O/groups) for dgrad.

    channels: those of fprop's are padded to where there is one group; dgrad's then to a multiple of 16.
    """
    o, per_group = q.shape[:2]
    g, taps = geometry.groups, geometry.taps
    q = q.reshape(o, per_group, taps)
    forward = q.transpose(1, 2)
    back = q.view(g, o // g, per_group, taps).permute(0, 2, 3, 1).reshape(g * per_group, taps, o // g)
    if g == 1:
        forward, back = F.pad(forward, (0, max(channels - per_group, 0))), F.pad(back, (0, padded(o) - o))
    return forward.contiguous(), back.contiguous()


def from_back(q: Tensor, geometry: Geometry, o: int) -> Tensor:
    """Codes of W (O, C/groups, R, S) from those for dgrad, (C, taps, O/groups), padded or not."""
    g = geometry
    q = q[..., : o // g.groups].reshape(g.groups, -1, g.taps, o // g.groups)
    return q.permute(0, 3, 1, 2).reshape(o, -1, *g.kernel)


# ---- the exact products of codes


def codes_fprop(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """(N, rows of b, output pixels) in int64 of codes a (N, pixels, C) and b (rows, taps, C/groups), without padding."""
    g = geometry
    x = padded_surroundings(a.transpose(1, 2).unflatten(2, g.size), g)
    w = b.transpose(1, 2).unflatten(2, g.kernel)
    run = functools.partial(F.conv2d, stride=g.stride, dilation=g.dilation, groups=g.groups)
    return _in_parts(run, x, w, w.shape[1] * g.taps, g, dim=1).flatten(2)


def codes_dgrad(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, pixels) in int64 of codes a (N, output pixels, O) and b (C, taps, O/groups), without padding."""
    g, o = geometry, a.shape[2]
    dy = a.transpose(1, 2).unflatten(2, g.out)
    w = from_back(b, g, o)
    run = functools.partial(F.conv_transpose2d, stride=g.stride, dilation=g.dilation, groups=g.groups)
    whole = _in_parts(run, dy, w, o // g.groups * g.taps, g, dim=0)  # of the padded image
    return of_images(whole, g).flatten(2)


def codes_wgrad(a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """(O, C/groups, taps) in int64 of codes a (O, output pixels, N) and b (C, pixels, N), without padding."""
    g, n, terms = geometry, a.shape[2], a.shape[2] * geometry.out_pixels
    dy, x = (q.permute(2, 0, 1).unflatten(2, size).contiguous() for q, size in ((a, g.out), (b, g.size)))
    x = padded_surroundings(x, g)
    shape = (a.shape[0], b.shape[0] // g.groups, *g.kernel)

    def run(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
        geometry = dict(stride=g.stride, dilation=g.dilation, groups=g.groups)
        with _exactly(x):
            return torch.nn.grad.conv2d_weight(x.to(dtype), shape, dy.to(dtype), **geometry).to(torch.int64)

    total = torch.zeros(shape, dtype=torch.int64, device=a.device)
    if n == 0:
        return total.flatten(2)
    if a.device.type != "cpu" or g.out_pixels > _EXACT_NIBBLE_TERMS:
        return run(x, dy, torch.float64).flatten(2)
    if terms <= _EXACT_TERMS:
        return run(x, dy, torch.float32).flatten(2)
    step = _EXACT_NIBBLE_TERMS // g.out_pixels
    for part in zip(x.split(step), dy.split(step), strict=True):
        total += run(part[0], part[1] & 15, torch.float32) + (run(part[0], part[1] >> 4, torch.float32) << 4)
    return total.flatten(2)


def padded_surroundings(x: Tensor, g: Geometry) -> Tensor:
    """Images (N, C, H, W) with what the taps reach of their surroundings, and nothing more."""
    ends = [(p - 1) * s + (k - 1) * d + 1 - before - size for p, s, k, d, before, size in
            zip(g.out, g.stride, g.kernel, g.dilation, g.padding, g.size, strict=True)]  # fmt: skip
    return pad(x, (g.padding[1], ends[1], g.padding[0], ends[0]))


def of_images(x: Tensor, g: Geometry) -> Tensor:
    """The images (N, C, H, W) in what the taps reach of them and of their surroundings."""
    (h, w), (top, left) = g.size, g.padding
    return pad(x, (-left, w + left - x.shape[3], -top, h + top - x.shape[2]))


def pad(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """F.pad with zeros, which refuses to crop more than there is before it has padded."""
    x = F.pad(x, [max(side, 0) for side in sides])
    return F.pad(x, [min(side, 0) for side in sides])


def _in_parts(run, x: Tensor, w: Tensor, terms: int, g: Geometry, dim: int) -> Tensor:
    """run(x, w) of codes, exactly: a float32 sums few enough channels at a time, or a float64 all. dim: of w's channels."""
    with _exactly(x):
        if x.device.type != "cpu" or g.taps > _EXACT_TERMS or (g.groups > 1 and terms > _EXACT_TERMS):
            return run(x.double(), w.double()).to(torch.int64)
        if terms <= _EXACT_TERMS:
            return run(x.float(), w.float()).to(torch.int64)
        step = _EXACT_TERMS // g.taps
        parts = zip(x.split(step, 1), w.split(step, dim), strict=True)
        return functools.reduce(torch.add, (run(a.float(), b.float()).to(torch.int64) for a, b in parts))


@contextlib.contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """Without autocast, and without NNPACK, whose transforms round where sums of products would not."""
    with torch.autocast(x.device.type, enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


# ---- the products


def window_sums(sums: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
    """(N, outputs, groups) int64: what sums (N, pixels, groups) int32 of an image's codes come to over the taps inside."""
    g, groups = geometry, sums.shape[2]
    x = sums.double().transpose(1, 2).unflatten(2, g.out if transposed else g.size)
    ones = x.new_ones(groups, 1, *g.kernel)
    options = dict(stride=g.stride, dilation=g.dilation, groups=groups)
    with _exactly(x):
        if not transposed:
            total = F.conv2d(padded_surroundings(x, g), ones, **options)
        else:
            total = of_images(F.conv_transpose2d(x, ones, **options), g)
    return total.flatten(2).transpose(1, 2).to(torch.int64)


def offset_table(b: Filters, geometry: Geometry, transposed: bool, dtype: torch.dtype) -> Tensor:
    """(classes, rows) in dtype: what an offset of 1 of the images adds to an output, sb·V + ob·terms."""
    inside = border(geometry, transposed, str(b.q.device))
    u = inside.sums(b.sums).to(dtype)
    u = u if b.scale is None else u * b.scale
    if b.offset is not None:
        u = u + b.offset * (inside.masks.sum(1, keepdim=True) * b.channels).to(dtype)
    return u


def product(
    a: Images, b: Filters, geometry: Geometry, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """fprop or, transposed, dgrad: (N, rows of b, outputs) in the dtype of the scales.

    a: quantized images, of dY if transposed.   bias: (rows of b,).
    """
    codes = codes_dgrad if transposed else codes_fprop
    channels = b.channels * geometry.groups
    out = codes(a.rows[..., :channels], b.q[..., : b.channels], geometry).to(a.scale.dtype) * a.scale[:, None, None]
    if b.scale is not None:
        out = out * b.scale[:, None]
    if a.offset is not None:
        table = offset_table(b, geometry, transposed, out.dtype)
        out = out + a.offset[:, None, None] * table[border(geometry, transposed, str(out.device)).classes.long()].t()
    if b.offset is not None:
        windows = window_sums(a.sums, geometry, transposed).to(out.dtype).transpose(1, 2)  # (N, groups, outputs)
        term = b.offset * a.scale[:, None, None] * windows
        out = out + term.repeat_interleave(out.shape[1] // geometry.groups, 1)
    return out if bias is None else out + bias.to(out.dtype)[:, None]


def wgrad_terms(
    h: Images, x: Images, x_scale: Tensor | None, geometry: Geometry, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """What offsets add to wgrad: (C, taps), what an offset of 1 of dY adds, and (O, taps), what that of X does.

    From the codes in cols, whose padding is 0, over the output pixels where a tap lies inside; None without that offset.
    """
    dtype = h.scale.dtype
    table = row = None
    if h.offset is not None:
        table = sums_of_taps(x.cols.sum(2, dtype=torch.int32), geometry, transposed=True).to(dtype)
        table = table if x_scale is None else table * x_scale
        if x.offset is not None:
            terms = sums_of_taps(x.scale.new_ones(1, geometry.out_pixels), geometry) * n
            table = table + x.offset * terms.to(dtype)
    if x.offset is not None:
        sums = sums_of_taps(h.cols.sum(2, dtype=torch.int32), geometry)
        row = x.offset * h.scale[:, None] * sums.to(dtype)
    return table, row


def wgrad(h: Images, x: Images, x_scale: Tensor | None, geometry: Geometry, n: int) -> Tensor:
    """dW (O, C/groups, taps) of n images, in the dtype of the scales.

    h: dY quantized, times what lies on the contracted index.   x: X; x_scale: (1,), its scale, None where that is folded
    into h.
    """
    out = codes_wgrad(h.cols[..., :n], x.cols[..., :n], geometry).to(h.scale.dtype) * h.scale[:, None, None]
    if x_scale is not None:
        out = out * x_scale
    table, row = wgrad_terms(h, x, x_scale, geometry, n)
    if table is not None:
        per_group = (geometry.groups, -1)
        added = h.offset.expand(len(out)).view(*per_group, 1, 1) * table.view(*per_group, geometry.taps)[:, None]
        out = out + added.reshape(out.shape)
    return out if row is None else out + row[:, None]
