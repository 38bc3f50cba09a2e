"""Quantization of images and the three products of a convolution, on whichever backend dispatch chooses: what `conv_ops` is
made of. `fqt.conv` is the definition.

On the kernels a product takes one of three ways. Without stride, padding and groups a 1x1 convolution is the product of two
matrices ("1x1 GEMM"), with all kernels that linear layers have. Where an image has few channels, whose codes would leave
most of a tensor core idle, fprop writes the codes under each window out ("im2col"). All else is an implicit GEMM, and so are
those two where dispatch has measured that to be faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv, conv_problems, gradients, products, telemetry
from .conv import ALIGNMENT, Filters, Geometry, Images, border, padded
from .conv_problems import Call
from .dispatch import Choice, choose
from .gradients import DGRAD, WGRAD, Transformed
from .householder import Householder
from .products import device_guard, zero
from .qtensor import Operand, QTensor
from .recipe import Quantizer, Recipe

PATHS = tuple(conv_problems.PATHS.values())


def path(geometry: Geometry, channels: int) -> str:
    """How the kernels compute fprop of images with so many channels where nothing was measured, one of PATHS; dgrad and
    wgrad have no im2col."""
    return conv_problems.PATHS[conv_problems.path(geometry, channels)]


def channels_of_x(c: int, groups: int) -> int:
    """To how many channels the codes of X are padded."""
    return padded(c) if groups == 1 and c >= ALIGNMENT else c


def channels_of_dy(o: int, groups: int) -> int:
    """To how many channels the codes of dY are padded."""
    return padded(o) if groups == 1 else o


# ---- quantization


def quantized(
    x: Tensor,
    quantizer: Quantizer,
    *,
    groups: int,
    channels: int,
    multiplier: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    rank: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
) -> Images:
    """`fqt.conv.quantize` of images (N, C, pixels), by the kernels where dispatch chooses them."""
    random = rng if quantizer.rounding == "stochastic" else None
    layout = dict(groups=groups, channels=channels, multiplier=multiplier, rows=rows, cols=cols, sums=sums)
    layouts = "both" if rows and cols else "cols" if cols else "rows"
    choice = _chosen(x, channels, conv_problems.quantization, quantizer.granularity, quantizer.rounding, layouts)
    if choice.backend == "triton":
        from fqt_kernels.conv_quantize import quantize_images

        with device_guard(x):
            return Images(
                *quantize_images(x, bits=quantizer.bits, granularity=quantizer.granularity, zero=zero(quantizer),
                                 rng=random, stream=stream + 256 * rank, tile=_tile(choice, x, channels, cols), **layout)
            )  # fmt: skip
    return conv.quantize(x, quantizer, rng=random, stream=stream, rank=rank, **layout)


def quantized_gradient(
    dy: Tensor, recipe: Recipe, geometry: Geometry, w_scale: Tensor, x_scale: Tensor, sums: bool, bias: bool, *, rng: Tensor,
    rank: int
) -> tuple[Images, Images, Tensor | None] | None:  # fmt: skip
    """Both quantizations of dY (N, O, pixels), for dgrad and for wgrad, and its sums (O,) if bias, by the fused kernels.

    They are those that `input_gradient` and `weight_gradient` make each for itself. None where no fused kernel applies.
    """
    g, h = recipe.dgrad, recipe.wgrad
    if g is None or h is None or g.householder or {g.rounding, h.rounding} != {"stochastic"}:
        return None
    channels = channels_of_dy(dy.shape[1], geometry.groups)
    choice = _chosen(dy, channels, conv_problems.gradient, g.granularity, h.granularity)
    if choice.backend != "triton":
        return None
    from fqt_kernels.conv_quantize import quantize_gradient_images
    from fqt_kernels.gradient import Side

    with device_guard(dy):
        rows, cols, total = quantize_gradient_images(
            dy, *(Side(z.bits, z.granularity, zero(z)) for z in (g, h)),
            row_mul=x_scale if _folded(recipe.x) else None, col_mul=w_scale if _folded(recipe.w) else None, rng=rng,
            streams=(DGRAD + 256 * rank, WGRAD + 256 * rank), groups=geometry.groups,
            channels=channels, sums=sums, bias=bias, tile=_tile(choice, dy, channels, True),
        )  # fmt: skip
    return Images(rows[0], None, *rows[1:]), Images(None, *cols[:3]), total


def _chosen(x: Tensor, channels: int, call: Callable[..., Call], *words: str) -> Choice:
    """How images (N, C, pixels) are quantized, with so many channels of codes; by the reference where there are none."""
    if x.numel() == 0:
        return Choice("reference", None, "no images")
    last = conv_problems.has_pixels_last(x.shape, x.stride())
    asked = call(*x.shape, max(channels, x.shape[1]), last, *words)
    return choose(asked.op, x.device, *asked.sizes, x.dtype, **asked.more)


def _tile(choice: Choice, x: Tensor, channels: int, cols: bool) -> tuple[int, ...] | None:
    """The tile that was tuned, of dense images; None, the usual one, where none was, or where the strides of these images
    (a slice of channels, an expanded gradient) do not have it."""
    if not choice.config:
        return None
    from fqt_kernels.conv_quantize import stored_images, tiles_of

    n, c, _ = x.shape
    return choice.config if choice.config in tiles_of(x, max(channels, c), stored_images(n, cols), cols) else None


def _folded(quantizer: Quantizer) -> bool:
    """Whether the scales of X or W lie on an index that a gradient product contracts, so that they are folded into dY."""
    return quantizer.granularity == "per_row"


# ---- fprop and dgrad


def product(
    a: Images,
    b: Filters,
    geometry: Geometry,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    transposed: bool = False,
    channels_last: bool = True,
    choice: Choice | None = None,
) -> Tensor:
    """`fqt.conv.product`, (N, rows of b, height, width) in out_dtype, in channels_last or contiguous memory.

    choice: how; None: as dispatch says.
    """
    g, n, rows = geometry, len(a.rows), len(b.q)
    size = g.size if transposed else g.out
    if n * rows * size[0] * size[1] == 0:
        return _formatted(a.scale.new_empty(n, rows, *size, dtype=out_dtype), channels_last)
    if choice is None:
        asked = conv_problems.product(g, n, rows, b.channels, b.q.shape[2], transposed, channels_last)
        choice = choose(asked.op, a.rows.device, *asked.sizes, a.scale.dtype, **asked.more)
    if choice.backend == "reference":
        out = conv.product(a, b, geometry, bias, transposed=transposed)
        return _formatted(out.to(out_dtype).unflatten(2, size), channels_last)
    if choice.kernel == "pointwise":
        if None not in (a.offset, b.offset):  # padding would count as terms
            a, b = a._replace(rows=a.rows[..., : b.channels]), b._replace(q=b.q[..., : b.channels])
        return _matrix_product(a, b.q[:, 0], b, bias, out_dtype, size, channels_last)
    if choice.kernel == "im2col":
        return _im2col_product(a, b, g, bias, out_dtype, channels_last)
    return _implicit_product(a, b, g, g, bias, out_dtype, transposed, channels_last, choice)


def _implicit_product(
    a: Images, b: Filters, geometry: Geometry, of: Geometry, bias: Tensor | None, out_dtype: torch.dtype,
    transposed: bool, channels_last: bool, choice: Choice
) -> Tensor:  # fmt: skip
    """By the kernel; the border is that of the geometry `of`."""
    from fqt_kernels.conv import conv as launch

    more = {}
    if a.offset is not None:
        more |= dict(a_offset=a.offset, table=conv.offset_table(b, of, transposed, a.scale.dtype),
                     classes=border(of, transposed, str(a.rows.device)).classes)  # fmt: skip
    if b.offset is not None:
        more |= dict(b_offset=b.offset, a_sums=a.sums)
    with device_guard(a.rows):
        return launch(
            a.rows, b.q, geometry, transposed=transposed, a_scale=a.scale, b_scale=b.scale, out_dtype=out_dtype,
            bias=None if bias is None else bias.contiguous(), channels_last=channels_last, config=choice.config, **more,
        )  # fmt: skip


def _matrix_product(
    a: Images, q: Tensor, b: Filters, bias: Tensor | None, out_dtype: torch.dtype, size: tuple[int, int], channels_last: bool
) -> Tensor:  # fmt: skip
    """By the kernels of linear layers: the rows of a (N, outputs, K) times those of q (rows, K), transposed."""
    n, pixels, k = a.rows.shape
    per_pixel = lambda t: t if t is None or t.numel() == 1 else t.repeat_interleave(pixels)  # noqa: E731
    sums = None if a.sums is None else a.sums.flatten()
    left = Operand(a.rows.reshape(n * pixels, k), per_pixel(a.scale), per_pixel(a.offset), sums)
    right = Operand(q, b.scale, b.offset, None if b.sums is None else b.sums.sum(1, dtype=torch.int32))
    out = products.product(left, right, bias, out_dtype)
    return _formatted(out.view(n, *size, -1).permute(0, 3, 1, 2), channels_last)


def _im2col_product(
    a: Images, b: Filters, geometry: Geometry, bias: Tensor | None, out_dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """fprop from the codes under each window, written out."""
    g = geometry
    windows = im2col(a.rows, g)
    pad = -windows.shape[2] % ALIGNMENT
    filters = F.pad(b.q.flatten(1), (0, pad))
    images = a._replace(
        rows=F.pad(windows, (0, pad)), sums=None if a.sums is None else windows.sum(2, dtype=torch.int32)[:, :, None]
    )
    if a.offset is None:
        return _matrix_product(images, filters, b, bias, out_dtype, g.out, channels_last)
    b = b._replace(q=filters[:, None], channels=b.channels)
    flat = Geometry(g.out, g.out, (1, 1))
    n, _, k = images.rows.shape
    asked = conv_problems.product(flat, n, len(filters), k, k, False, channels_last)
    choice = choose(asked.op, filters.device, *asked.sizes, a.scale.dtype, plain=False, **asked.more)
    return _implicit_product(images, b, flat, g, bias, out_dtype, False, channels_last, choice)


def im2col(rows: Tensor, geometry: Geometry) -> Tensor:
    """The codes (N, output pixels, taps·C) under each window of images (N, pixels, C); 0 outside."""
    g, (n, _, c) = geometry, rows.shape
    ends = [(p - 1) * s + (k - 1) * d + 1 - before - size for p, s, k, d, before, size in
            zip(g.out, g.stride, g.kernel, g.dilation, g.padding, g.size, strict=True)]  # fmt: skip
    x = conv.pad(rows.view(n, *g.size, c), (0, 0, g.padding[1], ends[1], g.padding[0], ends[0])).contiguous()
    image, row, pixel, _ = x.stride()
    (sy, sx), (dy, dx) = g.stride, g.dilation
    strides = (image, sy * row, sx * pixel, dy * row, dx * pixel, 1)
    return x.as_strided((n, *g.out, *g.kernel, c), strides).reshape(n, g.out_pixels, g.taps * c)


def _formatted(y: Tensor, channels_last: bool) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def input_gradient(
    dy: Tensor,
    w: Filters,
    recipe: Recipe,
    geometry: Geometry,
    out_dtype: torch.dtype,
    g: Images | None = None,
    *,
    channels_last: bool = True,
    rng: Tensor,
    rank: int = 0,
) -> Tensor:
    """dgrad: dX (N, C, height, width) from dY (N, O, pixels) and the filters (C, taps, O/groups) with their own scale.

    g: dY quantized already.
    """
    quantizer, (n, o, p) = recipe.dgrad, dy.shape
    if quantizer is None:
        with torch.autocast(dy.device.type, enabled=False):
            dx = _exact_input_gradient(dy.to(w.scale.dtype), w, geometry)
        return _formatted(dx.to(out_dtype), channels_last)
    multiplier = w.scale[None] if _folded(recipe.w) else None
    operand = w._replace(scale=None) if _folded(recipe.w) else w
    random = dict(rng=rng, rank=rank)
    if quantizer.householder and n:
        return _householder_gradient(dy, operand, quantizer, multiplier, geometry, out_dtype, channels_last, random)
    if g is None:
        g = quantized(
            dy, quantizer, groups=geometry.groups, channels=channels_of_dy(o, geometry.groups), multiplier=multiplier,
            stream=DGRAD, sums=w.offset is not None, **random,
        )  # fmt: skip
    if telemetry.is_recording():
        by_image = None if multiplier is None else multiplier.repeat(1, p)
        offset = None if g.offset is None else g.offset[:, None]
        codes = QTensor(g.rows[..., :o].reshape(n, p * o), None, g.scale[:, None], offset)
        telemetry.record("dgrad", rng, _by_image(dy), by_image, quantizer, codes)
    return product(g, operand, geometry, out_dtype=out_dtype, transposed=True, channels_last=channels_last)


def _exact_input_gradient(dy: Tensor, w: Filters, geometry: Geometry) -> Tensor:
    """From dY (N, O, pixels) and the dequantized filters, in dY's dtype."""
    o, g = dy.shape[1], geometry
    q = conv.from_back(w.q, g, o).to(dy.dtype) * w.scale.view(-1, 1, 1, 1)
    q = q if w.offset is None else q + w.offset
    whole = F.conv_transpose2d(dy.unflatten(2, g.out), q, stride=g.stride, dilation=g.dilation, groups=g.groups)
    return conv.of_images(whole, g)


def _householder_gradient(
    dy: Tensor, w: Filters, quantizer: Quantizer, multiplier: Tensor | None, geometry: Geometry, out_dtype: torch.dtype,
    channels_last: bool, random: dict
) -> Tensor:  # fmt: skip
    """dgrad where T mixes images: T⁻¹ of the product of the codes of T dY, (N, pixels·O) matrices of T."""
    (n, o, p), matrix = dy.shape, _by_image(dy)
    by_image = None if multiplier is None else multiplier.repeat(1, p)
    t = gradients.transformed(matrix, quantizer, multiplier=by_image, **random)
    telemetry.record("dgrad", random["rng"], matrix, by_image, quantizer, t.codes, t.groups, t.ranges)
    rows = t.codes.q.view(n, p, o)
    g = Images(
        F.pad(rows, (0, channels_of_dy(o, geometry.groups) - o)), None, t.codes.scale.flatten(),
        None if t.codes.offset is None else t.codes.offset.flatten(),
        None if w.offset is None else conv.pixel_sums(rows, geometry.groups),
    )  # fmt: skip
    z = product(g, w, geometry, out_dtype=g.scale.dtype, transposed=True)
    # A constant image's gradient is its value times what 1 everywhere gives.
    table = conv.offset_table(w, geometry, True, z.dtype)
    columns = table[border(geometry, True, str(z.device)).classes.long()].flatten()
    dx = _inverse(t, z.permute(0, 2, 3, 1).reshape(n, -1), columns, out_dtype)
    return _formatted(dx.view(n, *geometry.size, -1).permute(0, 3, 1, 2), channels_last)


def _by_image(dy: Tensor) -> Tensor:
    """dY (N, O, pixels) as the matrix (N, pixels·O)."""
    return dy.transpose(1, 2).reshape(len(dy), -1)


def _inverse(t: Transformed, z: Tensor, columns: Tensor, out_dtype: torch.dtype) -> Tensor:
    """T⁻¹ z; rows of a matrix that had no range, and `value` everywhere, become value · columns."""
    if isinstance(t.groups, Householder):
        z = t.groups.inverse(z)
        return torch.where(t.groups.constant, t.value[:, None] * columns, z).to(out_dtype)
    from fqt_kernels.householder import inverse

    absmax = z.abs().amax(1).view(torch.int32)
    with device_guard(z):
        return inverse(z, t.groups, absmax, ranges=t.ranges, value=t.value, columns=columns, out_dtype=out_dtype)


# ---- wgrad


def weight_gradient(
    dy: Tensor,
    x: Images,
    recipe: Recipe,
    geometry: Geometry,
    out_dtype: torch.dtype,
    h: Images | None = None,
    out: Tensor | None = None,
    *,
    rng: Tensor,
    rank: int = 0,
) -> Tensor:
    """wgrad: dW (O, C/groups, R, S) from dY (N, O, pixels) and the codes of X in cols.

    h: dY quantized already.   out: a gradient of earlier steps, of dW's shape, that this is added to, instead of a new one.
    """
    n, o, p = dy.shape
    if recipe.wgrad is None:
        with torch.autocast(dy.device.type, enabled=False):
            dw = _exact_weight_gradient(dy, x, geometry)
        return dw.to(out_dtype) if out is None else out.copy_(out + dw)
    multiplier, x_scale = (x.scale[:, None], None) if _folded(recipe.x) else (None, x.scale)
    if h is None:
        h = quantized(
            dy, recipe.wgrad, groups=geometry.groups, channels=o, multiplier=multiplier, stream=WGRAD, rows=False, cols=True,
            rng=rng, rank=rank,
        )  # fmt: skip
    if telemetry.is_recording():
        by_pixel = None if multiplier is None else multiplier.repeat_interleave(p, 0)
        offset = None if h.offset is None else h.offset[None]
        codes = QTensor(h.cols[..., :n].permute(2, 1, 0).reshape(n * p, o), None, h.scale[None], offset)
        telemetry.record("wgrad", rng, dy.transpose(1, 2).reshape(n * p, o), by_pixel, recipe.wgrad, codes)
    return weight_product(h, x, x_scale, geometry, n, out_dtype, out)


def _exact_weight_gradient(dy: Tensor, x: Images, geometry: Geometry) -> Tensor:
    """From dY (N, O, pixels) and the dequantized images, in the dtype of their scale."""
    g, (n, o, _) = geometry, dy.shape
    values = x.cols[..., :n].permute(2, 0, 1).to(x.scale.dtype) * x.scale[:, None, None]
    values = values if x.offset is None else values + x.offset[:, None, None]
    shape = (o, values.shape[1] // g.groups, *g.kernel)
    images = conv.padded_surroundings(values.unflatten(2, g.size), g)
    if n == 0:
        return values.new_zeros(shape)
    gradient = dy.to(values.dtype).unflatten(2, g.out)
    return torch.nn.grad.conv2d_weight(images, shape, gradient, stride=g.stride, dilation=g.dilation, groups=g.groups)


def weight_product(
    h: Images,
    x: Images,
    x_scale: Tensor | None,
    geometry: Geometry,
    n: int,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """`fqt.conv.wgrad` of n images, (O, C/groups, R, S) in out_dtype; added to out if that is given.

    choice: how; None: as dispatch says.
    """
    g, (o, p, k), channels = geometry, h.cols.shape, len(x.cols) // geometry.groups
    shape, affine = (o, channels, *g.kernel), h.offset is not None or x.offset is not None
    if choice is None and n:
        asked = conv_problems.wgrad(g, n, o // g.groups, channels, k)
        plain = (out is None or out.is_contiguous()) and (k == n or not affine)  # that a product of matrices can
        choice = choose(asked.op, h.cols.device, *asked.sizes, h.scale.dtype, plain=plain, **asked.more)
    if choice is None or choice.backend == "reference":
        dw = conv.wgrad(h, x, x_scale, geometry, n).view(shape)
        return dw.to(out_dtype) if out is None else out.copy_(out.to(dw.dtype) + dw)
    if choice.kernel == "pointwise":
        sums = [t.cols.sum((1, 2), dtype=torch.int32) if affine else None for t in (h, x)]
        left = Operand(h.cols.view(o, p * k), h.scale, h.offset, sums[0])
        right = Operand(x.cols.view(channels, p * k), x_scale, x.offset, sums[1])
        return products.product(left, right, out_dtype=out_dtype, out=None if out is None else out.view(o, -1)).view(
            shape
        )
    from fqt_kernels.conv_wgrad import conv_wgrad

    table, row_term = conv.wgrad_terms(h, x, x_scale, geometry, n)
    with device_guard(h.cols):
        return conv_wgrad(
            h.cols, x.cols, n, geometry, a_scale=h.scale, b_scale=x_scale, a_offset=h.offset, table=table,
            row_term=row_term, out_dtype=out_dtype, out=out, config=choice.config, splits=choice.split_k,
        )  # fmt: skip
