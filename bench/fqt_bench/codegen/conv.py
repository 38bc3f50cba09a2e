"""The launches of fprop and dgrad of a convolution, for the compiler gate: see `launches`."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt import conv
from fqt_kernels.conv import CONFIGS, UNALIGNED_CONFIG
from fqt_kernels.conv import conv as launch

from .table import ARCHES, config_name

_empty = functools.partial(torch.empty, device="meta")
_codes = functools.partial(_empty, dtype=torch.int8)
_sums = functools.partial(_empty, dtype=torch.int32)


def _product(
    config: tuple[int, ...],
    channels: int,
    rows: int,
    kernel: int,
    *,
    n: int = 64,
    stride: int = 1,
    groups: int = 1,
    transposed: bool = False,
    affine: bool = False,
    size: int = 28,
    **options: object,
) -> Callable[[], object]:
    """A launch on square images of that many pixels a side; channels, rows: of a group."""
    pad = (kernel // 2, kernel // 2)
    g = conv.Geometry.of((size, size), (kernel, kernel), (stride, stride), (pad, pad), groups=groups)
    pixels, outputs = (g.out_pixels, g.pixels) if transposed else (g.pixels, g.out_pixels)
    every = groups * rows
    more = dict(b_scale=_empty(every)) if not transposed else {}
    if affine:
        more |= dict(
            a_offset=_empty(n), table=_empty(9, every), classes=_sums(outputs), a_sums=_sums(n, pixels, groups),
            b_offset=_empty(1),
        )  # fmt: skip
    return functools.partial(
        launch, _codes(n, pixels, groups * channels), _codes(every, g.taps, channels), g, transposed=transposed,
        a_scale=_empty(n), config=config, **more, **options,
    )  # fmt: skip


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): the recipes' fprop with every configuration, and what needs the most registers or narrow loads.

    even: channels in whole blocks; tail: of an output whose pixels are no multiple of 16; groups: of unaligned channels.
    """
    *others, last = table = CONFIGS[ARCHES[arch]]
    bfloat16 = dict(out_dtype=torch.bfloat16, bias=_empty(256))
    for config in others:
        yield f"{config_name(config)} conv even", _product(config, 256, 256, 3, **bfloat16)
    yield f"{config_name(last)} conv scales even", _product(last, 256, 256, 3, **bfloat16)
    affine = dict(affine=True, out_dtype=torch.bfloat16)
    yield (
        f"{config_name(last)} conv affine stride even",
        _product(last, 256, 256, 3, stride=2, transposed=True, **affine),
    )
    contiguous = dict(size=14, channels_last=False, **affine)
    yield f"{config_name(last)} conv affine contiguous tail", _product(last, 208, 208, 3, **contiguous)
    yield f"{config_name(table[0])} conv affine contiguous odd", _product(table[0], 208, 200, 3, **contiguous)
    yield (
        f"{config_name(UNALIGNED_CONFIG)} conv groups affine odd",
        _product(UNALIGNED_CONFIG, 4, 6, 3, groups=32, **affine),
    )
