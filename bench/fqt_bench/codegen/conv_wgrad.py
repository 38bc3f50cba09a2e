"""The launches of wgrad of a convolution, for the compiler gate: see `launches`."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt.conv import Geometry, padded_images
from fqt_kernels import conv_wgrad

from .table import ARCHES, config_name

_empty = functools.partial(torch.empty, device="meta")


def _wgrad(config: tuple[int, ...], n: int, c: int, o: int, geometry: Geometry, *, affine: bool = False,
           out: torch.Tensor | None = None) -> Callable[[], object]:  # fmt: skip
    """n images of c channels, the gradients of o; affine: both operands have offsets."""
    codes = functools.partial(_empty, dtype=torch.int8)
    images, taps = padded_images(n), geometry.taps
    offsets = dict(a_offset=_empty(1), table=_empty(c, taps), row_term=_empty(o, taps)) if affine else {}
    return functools.partial(
        conv_wgrad.conv_wgrad, codes(o, geometry.out_pixels, images), codes(c, geometry.pixels, images), n, geometry,
        a_scale=_empty(1 if affine else o), b_scale=_empty(1), out=out, config=config, splits=4, **offsets,
    )  # fmt: skip


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): every configuration once; a stride; channels and images that fill no whole tile; both operands
    affine, added to a gradient in channels_last memory."""
    same = ((1, 1), (1, 1))
    table = conv_wgrad.CONFIGS[ARCHES[arch]]
    for config in table:
        geometry = Geometry.of((14, 14), (3, 3), padding=same)
        yield f"{config_name(config)} wgrad scales even", _wgrad(config, 256, 256, 256, geometry)
    title = config_name(table[-1])
    strided = Geometry.of((56, 56), (3, 3), (2, 2), same)
    yield f"{title} wgrad strided even", _wgrad(table[-1], 64, 128, 128, strided)
    odd = Geometry.of((225, 225), (7, 7), (2, 2), ((3, 3), (3, 3)))
    yield f"{title} wgrad odd", _wgrad(table[-1], 33, 3, 63, odd)
    out = _empty(256, 128, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    geometry = Geometry.of((28, 28), (3, 3), padding=same)
    launch = _wgrad(table[-1], 256, 128, 256, geometry, affine=True, out=out)
    yield f"{title} wgrad affine added bfloat16 even", launch
