"""The operators of torch.library for a convolution: forward, and its backward; the filters' codes.

As in `ops`, each runs on CPU and CUDA tensors, traces under torch.compile, and knows its output shapes without data. Codes
are int8. Images here are (N, C, H, W) of any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import conv, conv_products, ops, reference, rng
from .conv import Filters, Geometry, Images
from .conv_products import channels_of_x
from .ops import _DEVICES, _or_empty, _or_none, _recipe
from .recipe import Recipe


class FilterCodes(NamedTuple):
    """The codes of a weight (O, C/groups, R, S) with w ≈ q * scale (+ offset).

    f: (O, taps, C/groups) int8 for fprop; b: (C, taps, O/groups) for dgrad, None if not asked for; both as `conv.filters`
    pads them.   scale: (1,) or (O,); offset: (1,), None where symmetric.   f_sum, b_sum: (rows, taps) int32, of the codes of
    each tap, None unless the recipe is affine.
    """

    f: Tensor
    b: Tensor | None
    scale: Tensor
    offset: Tensor | None
    f_sum: Tensor | None
    b_sum: Tensor | None


def flat(geometry: Geometry) -> list[int]:
    """A geometry as operators take it; `unflat` is the way back."""
    return [*(i for pair in geometry[:-1] for i in pair), geometry.groups]


def unflat(numbers: Sequence[int]) -> Geometry:
    pairs = zip(numbers[:-1:2], numbers[1:-1:2], strict=True)
    return Geometry(*pairs, numbers[-1])


def reason_against(recipe: Recipe) -> str | None:
    """Why a convolution cannot have the recipe, None if it can."""
    if recipe.format != "int":
        return f"convolutions have int8 codes, recipe {recipe} has {recipe.format}"
    ranges = {q.range for q in (recipe.dgrad, recipe.wgrad) if q is not None} - {"exact"}
    return f"convolutions have exact ranges, recipe {recipe} has {', '.join(sorted(ranges))}" if ranges else None


def quantize_filters(weight: Tensor, recipe: Recipe, geometry: Sequence[int], transposed: bool) -> FilterCodes:
    """The codes of a weight (O, C/groups, R, S) by the recipe's quantizer; those for dgrad as well if transposed.

    Through operators that can be traced.
    """
    g = unflat(geometry)
    t = ops.quantize_weight(weight.flatten(1), recipe, transposed=False)
    f, b = conv.filters(t.q.view(weight.shape), g, channels_of_x(weight.shape[1] * g.groups, g.groups))
    sums = [q.sum(2, dtype=torch.int32) if recipe.affine else None for q in (f, b)]
    offset = None if t.offset is None else t.offset.flatten()
    b, b_sum = (b, sums[1]) if transposed else (None, None)
    return FilterCodes(f, b, t.scale.flatten(), offset, sums[0], b_sum)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w: FilterCodes,
    rng_state: Tensor,
    recipe: str,
    out_dtype: torch.dtype,
    save_x: bool,
    geometry: Sequence[int],
    channels_last: bool,
    accumulate: bool = False,
) -> Tensor:
    """Y (N, O, P, Q) = Q_f(X) * Q_θ(W) + bias, differentiable; see `forward` for the arguments."""
    return forward(
        x, weight, bias, w.f, w.b, w.scale, w.offset, w.f_sum, w.b_sum, rng_state, recipe, out_dtype, save_x, list(geometry),
        channels_last, accumulate,
    )[0]  # fmt: skip


@custom_op("fqt::conv2d", mutates_args=(), device_types=_DEVICES)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_f: Tensor,
    w_b: Tensor | None,
    w_scale: Tensor,
    w_offset: Tensor | None,
    w_f_sum: Tensor | None,
    w_b_sum: Tensor | None,
    rng: Tensor,
    recipe: str,
    out_dtype: torch.dtype,
    save_x: bool,
    geometry: Sequence[int],
    channels_last: bool,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y (N, O, P, Q) of X (N, C, H, W) and already quantized filters (see `FilterCodes`); the rest is saved for backward.

    weight takes no part in the forward pass: it is where the gradient of W goes; accumulate: wgrad adds to its .grad, where
    there is one, by itself.   geometry: of `flat`.   channels_last: the memory of Y, and of dX.   Returns (y, and if save_x
    the codes of X (C, pixels, N), their scale and offset; else three empty tensors).
    """
    r, g = _recipe(recipe), unflat(geometry)
    channels = channels_of_x(x.shape[1], g.groups)
    a = conv_products.quantized(
        x.flatten(2), r.x, groups=g.groups, channels=channels, cols=save_x, sums=w_offset is not None
    )
    filters = Filters(w_f, w_scale, w_offset, w_f_sum, weight.shape[1])
    y = conv_products.product(a, filters, g, bias, out_dtype, channels_last=channels_last)
    if not save_x:
        return y, x.new_empty(0, dtype=torch.int8), *(x.new_empty(0, dtype=a.scale.dtype) for _ in range(2))
    return y, a.cols, a.scale, _or_empty(a.offset, a.scale)


@forward.register_fake
def _(x, weight, bias, w_f, w_b, w_scale, w_offset, w_f_sum, w_b_sum, rng, recipe, out_dtype, save_x, geometry,
      channels_last, accumulate=False):  # fmt: skip
    r, g = _recipe(recipe), unflat(geometry)
    n, c = x.shape[:2]
    scale = x.new_empty(n if r.x.granularity == "per_row" else 1, dtype=reference.compute_dtype(x))
    return (
        _empty_images(x, (n, weight.shape[0], *g.out), out_dtype, channels_last),
        x.new_empty((c, g.pixels, conv.padded_images(n)) if save_x else 0, dtype=torch.int8),
        scale if save_x else scale.new_empty(0),
        scale.new_empty(scale.shape if save_x and r.x.zero != "symmetric" else 0),
    )


def _empty_images(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory)


@custom_op("fqt::conv2d_backward", mutates_args=("rng", "w_grad"), device_types=_DEVICES)
def backward(
    dy: Tensor,
    x_cols: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_b: Tensor | None,
    w_scale: Tensor,
    w_offset: Tensor | None,
    w_b_sum: Tensor | None,
    rng: Tensor,
    rank: int,
    recipe: str,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    channels: int,
    geometry: Sequence[int],
    channels_last: bool,
    w_channels_last: bool,
    w_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, dbias) of `fqt::conv2d` from dY (N, O, P, Q), empty where not needed; advances the step of rng.

    The bias gradient is the sum of dY itself.   channels: of X.   w_grad: dW is added to it, and not returned.
    """
    r, g, o = _recipe(recipe), unflat(geometry), dy.shape[1]
    random = {"rng": rng, "rank": rank}
    dx, dw, dbias = (dy.new_empty(0, dtype=d) for d in (x_dtype, w_dtype, bias_dtype))
    w = Filters(w_b, w_scale, w_offset, w_b_sum, o // g.groups)
    x = Images(None, x_cols, x_scale, _or_none(x_offset, x_offset.numel() > 0))
    dy, total, g_codes, h_codes = dy.flatten(2), None, None, None
    if need_x and need_w:
        both = conv_products.quantized_gradient(
            dy, r, g, w_scale, x_scale, sums=w_offset is not None, bias=need_bias, **random
        )
        if both is not None:
            g_codes, h_codes, total = both
    if need_x:
        dx = conv_products.input_gradient(dy, w, r, g, x_dtype, g_codes, channels_last=channels_last, **random)
    if need_bias:
        dbias = (dy.sum((0, 2), dtype=w_scale.dtype) if total is None else total).to(bias_dtype)
    if need_w:
        dw_ = conv_products.weight_gradient(dy, x, r, g, w_dtype, h_codes, w_grad, **random)
        dw = dw if w_grad is not None else _formatted(dw_, w_channels_last)
    rng[1:].add_(1)
    return dx, dw, dbias


def _formatted(dw: Tensor, channels_last: bool) -> Tensor:
    return dw.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@backward.register_fake
def _(dy, x_cols, x_scale, x_offset, w_b, w_scale, w_offset, w_b_sum, rng, rank, recipe, x_dtype, w_dtype, bias_dtype,
      need_x, need_w, need_bias, channels, geometry, channels_last, w_channels_last, w_grad=None):  # fmt: skip
    g, (n, o) = unflat(geometry), dy.shape[:2]
    dx = _empty_images(dy, (n, channels, *g.size), x_dtype, channels_last) if need_x else dy.new_empty(0, dtype=x_dtype)
    dw = dy.new_empty(0, dtype=w_dtype)
    if need_w and w_grad is None:
        dw = _empty_images(dy, (o, channels // g.groups, *g.kernel), w_dtype, w_channels_last)
    return dx, dw, dy.new_empty(o if need_bias else 0, dtype=bias_dtype)


def is_channels_last(x: Tensor) -> bool:
    """Whether images are in channels_last memory and in no other, as torch asks of a convolution's operands."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, w_b, w_scale, w_offset, _, w_b_sum, rng_state, recipe, _, save_x, geometry, last, accumulate = (
        inputs
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], w_b, w_scale, w_offset, w_b_sum)
    ctx.rng, ctx.recipe, ctx.save_x, ctx.geometry = rng_state, recipe, save_x, list(geometry)
    ctx.channels, ctx.formats = x.shape[1], (last, is_channels_last(weight))
    ctx.parameter = weight if accumulate else None
    ctx.dtypes = (x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 16
    need_x, need_w, need_bias = needed = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: under activation checkpointing each reading recomputes
    if (need_x and saved[3] is None) or (need_w and not ctx.save_x):
        raise RuntimeError("fqt::conv2d: a gradient is asked for that nothing was saved for (save_x, w_b)")
    w_grad = ops._grad_to_add_to(ctx.parameter) if need_w else None
    dx, dw, dbias = backward(
        dy,
        *saved,
        ctx.rng,
        rng.rank(),
        ctx.recipe,
        *ctx.dtypes,
        *needed,
        ctx.channels,
        ctx.geometry,
        *ctx.formats,
        w_grad,
    )
    if torch.is_grad_enabled():  # create_graph=True
        dx, dw, dbias = ops._NoSecondDerivative.apply(dy.new_empty(0, requires_grad=True), dx, dw, dbias)
    dw = dw if need_w and w_grad is None else None
    return (dx if need_x else None, dw, dbias if need_bias else None, *(None,) * 13)


forward.register_autograd(_backward, setup_context=_setup_context)
