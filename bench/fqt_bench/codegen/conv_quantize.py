"""The launches of the quantization of images, for the compiler gate: see `launches`."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels import conv_quantize
from fqt_kernels.gradient import Side

_empty = functools.partial(torch.empty, device="meta")


def images(n: int, c: int, p: int, channels_last: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(N, C, P) without memory, in either format."""
    return _empty(n, p, c, dtype=dtype).transpose(1, 2) if channels_last else _empty(n, c, p, dtype=dtype)


def _quantization(x: torch.Tensor, granularity: str, zero: str, channels: int, *, cols: bool = True,
                  stochastic: bool = False, multiplier: tuple[int, int] | None = None,
                  ) -> Callable[[], object]:  # fmt: skip
    return functools.partial(
        conv_quantize.quantize_images,
        x,
        bits=8,
        granularity=granularity,
        zero=zero,
        channels=channels,
        multiplier=None if multiplier is None else _empty(multiplier),
        rng=_empty(2, dtype=torch.int64) if stochastic else None,
        cols=cols,
        sums=zero != "symmetric",
    )


def _gradient(dy: torch.Tensor, g: Side, h: Side, channels: int, folded: bool, bias: bool) -> Callable[[], object]:
    return functools.partial(
        conv_quantize.quantize_gradient_images,
        dy, g, h,
        row_mul=_empty(dy.shape[0]) if folded else None,
        col_mul=_empty(dy.shape[1]) if folded else None,
        rng=_empty(2, dtype=torch.int64), streams=(0, 1), channels=channels, sums=not folded, bias=bias,
    )  # fmt: skip


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): X for training in both formats and for inference; dY as the recipes quantize it; odd extents."""
    int8 = Side(8, "per_row", "symmetric"), Side(8, "per_column", "symmetric")
    psq = Side(8, "per_row", "min"), Side(8, "per_tensor", "grid")
    n, c, p = 256, 128, 784
    for name, last in (("nhwc", True), ("nchw", False)):
        x = images(n, c, p, last)
        yield f"images {name} symmetric nearest", _quantization(x, "per_row", "symmetric", c)
        yield f"images {name} rows grid nearest", _quantization(x, "per_tensor", "grid", c, cols=False)
        yield f"images {name} gradient int8 stochastic", _gradient(x, *int8, c, True, False)
        yield f"images {name} gradient psq8 stochastic", _gradient(x, *psq, c, False, True)
        # 7 x 7 pixels, and a last batch.
        odd = images(n - 1, c + 1, 49, last)
        yield f"images {name} odd gradient psq8 stochastic", _gradient(odd, *psq, 144, False, True)
    yield (
        "images nhwc float32 multiplier min stochastic",
        _quantization(images(n, c, p, True, torch.float32), "per_column", "min", c, multiplier=(n, 1), stochastic=True),
    )
    quarters = images(n, 2 * c, 196, False)  # 14 x 14 pixels: pieces of four
    yield "images nchw odd 14x14 gradient int8 stochastic", _gradient(quarters, *int8, 2 * c, True, False)
    # An extent of 1 reaches a kernel as a constant.
    yield "images one odd gradient psq8 stochastic", _gradient(images(1, 1, 1, True), *psq, 16, False, True)
    yield "images first odd grid nearest", _quantization(images(n, 3, 224 * 224, False), "per_tensor", "grid", 3)
