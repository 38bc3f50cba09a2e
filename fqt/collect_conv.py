"""Convolutions for `fqt.collect`, on tensors without data: what their kernels return, by shape, and a step of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import conv, conv_ops, conv_problems, conv_products, products
from .conv import Border, Filters, Geometry
from .recipe import Recipe
from .suites import Convolution


def fakes(choose: Callable[..., Any]) -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in) of the launchers, of what is kept of a border, which must not be kept without its data, and of
    the arrangement of filters, for which dispatch is not asked."""
    arrange = conv.filters

    def filters(q: Tensor, geometry: Geometry, channels: int) -> tuple[Tensor, Tensor]:
        asked = conv_problems.arranged(*q.shape[:2], geometry.taps, geometry.groups)
        choose(asked.op, q.device, *asked.sizes, **asked.more)
        return arrange(q, geometry, channels)

    from fqt_kernels import conv as conv_kernel
    from fqt_kernels import conv_quantize, conv_wgrad

    return [
        (conv_kernel, "conv", _conv), (conv_wgrad, "conv_wgrad", _conv_wgrad),
        (conv_quantize, "quantize_images", _quantize_images),
        (conv_quantize, "quantize_gradient_images", _quantize_gradient_images),
        (conv, "filters", filters), (conv, "offset_table", _offset_table), (conv, "inside", _inside),
        (conv_products, "border", _border),
    ]  # fmt: skip


def _conv(
    a: Tensor, b: Tensor, geometry: Geometry, *, transposed: bool = False, out_dtype: torch.dtype, **_: Any
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0], *(geometry.size if transposed else geometry.out)), dtype=out_dtype)


def _conv_wgrad(
    a: Tensor, b: Tensor, n: int, geometry: Geometry, *, out_dtype: torch.dtype, out: Tensor | None = None, **_: Any
) -> Tensor:
    shape = a.shape[0], b.shape[0] // geometry.groups, *geometry.kernel
    return a.new_empty(shape, dtype=out_dtype) if out is None else out


def _quantize_images(
    x: Tensor, *, granularity: str, zero: str, groups: int = 1, channels: int = 0, rows: bool = True, cols: bool = False,
    sums: bool = False, **_: Any
) -> tuple[Tensor | None, ...]:  # fmt: skip
    n, c, p = x.shape
    scale = x.new_empty({"per_tensor": 1, "per_row": n, "per_column": c}[granularity], dtype=torch.float32)
    return (
        x.new_empty((n, p, max(c, channels)), dtype=torch.int8) if rows else None,
        x.new_empty((c, p, conv.padded_images(n)), dtype=torch.int8) if cols else None,
        scale,
        None if zero == "symmetric" else scale,
        x.new_empty((n, p, groups), dtype=torch.int32) if sums and rows else None,
    )


def _quantize_gradient_images(
    dy: Tensor, g: Any, h: Any, *, groups: int = 1, channels: int = 0, sums: bool = False, bias: bool = False, **_: Any
):
    rows, _, *of_g = _quantize_images(
        dy, granularity=g.granularity, zero=g.zero, groups=groups, channels=channels, sums=sums
    )
    _, cols, scale, offset, _ = _quantize_images(dy, granularity=h.granularity, zero=h.zero, rows=False, cols=True)
    total = dy.new_empty(dy.shape[1], dtype=torch.float32) if bias else None
    return (rows, *of_g), (cols, scale, offset), total


def _offset_table(b: Filters, geometry: Geometry, transposed: bool, dtype: torch.dtype) -> Tensor:
    return b.q.new_empty((1, len(b.q)), dtype=dtype)


def _inside(geometry: Geometry, axis: int, transposed: bool = False, device: str = "cpu") -> Tensor:
    outputs = geometry.size if transposed else geometry.out
    return torch.zeros(outputs[axis], geometry.kernel[axis], dtype=torch.float64, device=device)


def _border(geometry: Geometry, transposed: bool = False, device: str = "cpu") -> Border:
    outputs = geometry.pixels if transposed else geometry.out_pixels
    return Border(torch.zeros(outputs, dtype=torch.int32, device=device), torch.zeros(1, geometry.taps, device=device))


# ---- a layer by its shape


def train(of: Convolution, recipe: Recipe, dtype: torch.dtype, code: Callable[[str], Callable[..., Any]]) -> None:
    """What `fqt.nn.Conv2d` does in a step, beneath the dispatcher: code(name) is that of an operator."""
    pad = of.kernel // 2, of.kernel // 2
    geometry = Geometry.of((of.edge,) * 2, (of.kernel,) * 2, (of.stride,) * 2, (pad, pad), groups=of.groups)
    images = dict(dtype=dtype, device="meta", memory_format=torch.channels_last)
    x, dy = (torch.empty(of.n, c, *size, **images) for c, size in ((of.c, geometry.size), (of.o, geometry.out)))
    weight = torch.empty(of.o, of.c // of.groups, *geometry.kernel, dtype=dtype, device="meta")
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    flat = conv_ops.flat(geometry)
    w = products.quantized(weight.flatten(1), recipe.w)
    f, b = conv.filters(w.q.view(weight.shape), geometry, conv_products.channels_of_x(of.c, of.groups))
    f_sum, b_sum = (q.sum(2, dtype=torch.int32) if recipe.affine else None for q in (f, b))
    scale, offset = w.scale.flatten(), None if w.offset is None else w.offset.flatten()
    _, *saved = code("conv2d")(
        x, weight, None, f, b, scale, offset, f_sum, b_sum, rng, str(recipe), dtype, True, flat, True
    )
    code("conv2d_backward")(
        dy, *saved, b, scale, offset, b_sum, rng, 0, str(recipe), dtype, dtype, dtype, not of.first, True, False, of.c,
        flat, True, True,
    )  # fmt: skip
