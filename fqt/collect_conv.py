"""What the kernels of convolutions return, by shape: for `fqt.collect`, on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conv, conv_products
from .conv import Border, Filters, Geometry


def fakes() -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in) of the launchers, and of what is kept of a border, which must not be kept without its data."""
    from fqt_kernels import conv as conv_kernel
    from fqt_kernels import conv_quantize, conv_wgrad

    return [
        (conv_kernel, "conv", _conv), (conv_wgrad, "conv_wgrad", _conv_wgrad),
        (conv_quantize, "quantize_images", _quantize_images),
        (conv_quantize, "quantize_gradient_images", _quantize_gradient_images),
        (conv, "offset_table", _offset_table), (conv, "inside", _inside), (conv_products, "border", _border),
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
