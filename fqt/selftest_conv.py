"""The checks of `fqt doctor` for convolutions: their kernels against `fqt.conv` on the CPU, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import candidates, conv, dispatch
from .gradients import DGRAD, WGRAD
from .recipe import Quantizer, Recipe

Compared = dict[str, tuple[Tensor, Tensor, Tensor | float]]
# Taps outside of the image on all sides; phases of different taps; a factor of the stride that dilation shares.
GEOMETRY = conv.Geometry.of((7, 6), (3, 3), (2, 1), ((1, 2), (1, 1)))
DILATED = conv.Geometry.of((7, 6), (3, 2), (2, 4), ((2, 2), (1, 1)), (2, 2))
GROUPS = conv.Geometry.of((4, 5), (3, 3), padding=((1, 1), (1, 1)), groups=3)


def checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(kernel, case, run) of every kernel of convolutions, see `fqt.selftest.Check`."""
    yield from product_checks(device)
    yield from quantize_checks(device)
    yield from wgrad_checks(device)


# ---- fprop and dgrad


def product_checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """Every configuration that dispatch may choose on the device; in the interpreter one."""
    cases = [("strided", GEOMETRY, 32, 16, False), ("strided", GEOMETRY, 32, 16, True), ("dilated", DILATED, 20, 5, True),
             ("3 groups", GROUPS, 5, 7, False)]  # fmt: skip
    for name, geometry, channels, rows, transposed in cases:
        for config in _configs(device, rows, channels):
            case = f"{'dgrad' if transposed else 'fprop'}, affine, {name}, {channels} channels, {rows} rows, {config}"
            arguments = device, geometry, channels, rows, transposed, config
            yield "_conv_mm_kernel", case, lambda a=arguments: _product_case(*a)


def _configs(device: torch.device, rows: int, channels: int) -> list[tuple[int, ...]]:
    """Those of aligned channels in turn, of others the one there is."""
    from fqt_kernels.conv import CONFIGS, UNALIGNED_CONFIG, fits

    if device.type != "cuda":
        return [(64, 16, 32, 1, 1)]
    arch, _ = dispatch.device_info(str(device))
    table = CONFIGS["amd" if arch.startswith("gfx") else candidates.FAMILY.get(arch, "sm80")]
    return [config for config in table if fits(config, rows)] if channels % 16 == 0 else [UNALIGNED_CONFIG]


def _product_case(device: torch.device, geometry: conv.Geometry, channels: int, rows: int, transposed: bool,
                  config: tuple[int, ...]) -> Compared:  # fmt: skip
    """An affine product of 2 images, with several scales of both operands, in both memory formats."""
    from fqt_kernels import conv as kernel

    generator, n, g = torch.Generator().manual_seed(5), 2, geometry

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

    a = codes(n, g.out_pixels if transposed else g.pixels, channels * g.groups)
    b = codes(rows * g.groups, g.taps, channels)
    vectors = [torch.randn(size, generator=generator) for size in (n, len(b), n, 1, len(b))]
    sa, sb, oa, ob, bias = vectors
    images = conv.Images(a, None, sa, oa, conv.pixel_sums(a, g.groups))
    filters = conv.Filters(b, sb, ob, b.sum(2, dtype=torch.int32), channels)
    want = conv.product(images, filters, g, bias, transposed=transposed)
    terms = dict(
        a_scale=sa, b_scale=sb, a_offset=oa, table=conv.offset_table(filters, g, transposed, torch.float32),
        classes=conv.border(g, transposed).classes, a_sums=images.sums, b_offset=ob, bias=bias,
    )  # fmt: skip
    terms = {name: t.to(device) for name, t in terms.items()}
    results = {}
    for name, channels_last in (("channels_last", True), ("contiguous", False)):
        got = kernel.conv(
            a.to(device), b.to(device), g, transposed=transposed, channels_last=channels_last, config=config, **terms
        )
        results[name] = (got.flatten(2), want, 0.0)
    return results


# ---- quantization of images


def quantize_checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """Every kernel that quantizes images, with odd and with aligned extents, in both memory formats; in the interpreter in
    one each."""
    both = "channels_last", "contiguous"
    for name, shape, formats in (("odd", (17, 5, 6), both), ("aligned", (16, 16, 16), both[::-1])):
        for memory in formats if device.type == "cuda" else formats[:1]:
            case = f"{name}, {memory}"
            yield "_image_stats_kernel", case, lambda a=(device, shape, memory): _ranges_case(*a)
            for zero, rounding in (("symmetric", "nearest"), ("grid", "stochastic"), ("min", "nearest")):
                quantizer = Quantizer(8, "per_tensor", zero, rounding)
                arguments = device, shape, memory, quantizer
                yield "_images_kernel", f"{case}, {zero}, {rounding}", lambda a=arguments: _images_case(*a)
            for recipe in (Recipe.int8(), Recipe.parse("psq8")):
                arguments = device, shape, memory, recipe
                yield "_gradient_images_kernel", f"{case}, {recipe}", lambda a=arguments: _gradient_case(*a)


def _some_images(shape: tuple[int, int, int], memory: str, poisoned: bool = False) -> Tensor:
    """Images of very different sizes, one of zeros, one constant, one of ties; with a NaN and an infinity if poisoned."""
    n, c, p = shape
    x = torch.randn(n, p, c, generator=torch.Generator().manual_seed(8)) * torch.logspace(-6, 3, n)[:, None, None]
    x[3], x[4] = 0.0, 0.5
    x[5] = (torch.arange(p * c) - 20.5).view(p, c)
    if poisoned:
        x[7, 2, 1], x[8, 3, 2] = float("nan"), float("inf")
    x = x.transpose(1, 2)
    return x if memory == "channels_last" else x.contiguous()


def _strided(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def _factors(n: int) -> Tensor:
    return torch.linspace(0.5, 2.0, n)


def _ranges_case(device: torch.device, shape: tuple[int, int, int], memory: str) -> Compared:
    """Extremes of each image and of each channel, each times factors of the other, and the sums of channels.

    The images' sums have as many terms as roundings.
    """
    from fqt_kernels.conv_statistics import Ranged, image_stats
    from fqt_kernels.gradient import Side

    x, (n, c, p) = _some_images(shape, memory), shape
    of_c, of_n = _factors(c), _factors(n)
    wanted = [Ranged(Side(8, "per_row", "min"), of_c.to(device), False),
              Ranged(Side(8, "per_column", "min"), of_n.to(device), True)]  # fmt: skip
    partials, parts = image_stats(_strided(x, device), wanted, True)
    bound = n * p * 2.0**-24 * x.double().abs().sum((0, 2))
    compared = {"sums": (parts.double().sum(0), x.double().sum((0, 2)), bound)}
    products = (x * of_c[:, None], (1, 2)), (x * of_n[:, None, None], (0, 2))
    for name, partial, (y, dims) in zip(("images", "channels"), partials, products, strict=True):
        bits = partial.amax(1).cpu()
        high, low = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        compared |= {f"highest of {name}": (high, y.amax(dims), 0.0), f"lowest of {name}": (-low, y.amin(dims), 0.0)}
    return compared


def _same(names: tuple[str, ...], got: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...]) -> Compared:
    return {name: (g, w, 0.0) for name, g, w in zip(names, got, want, strict=True) if w is not None}


def _images_case(device: torch.device, shape: tuple[int, int, int], memory: str, quantizer: Quantizer) -> Compared:
    """Of each image, of each channel with a factor for each image, and of all images."""
    from fqt_kernels.conv_quantize import quantize_images

    state, compared, factors = torch.tensor([0x123456789ABCDEF, 7]), {}, _factors(shape[0])[:, None]
    for granularity, multiplier in (("per_row", None), ("per_column", factors), ("per_tensor", None)):
        q = dataclasses.replace(quantizer, granularity=granularity)
        x = _some_images(shape, memory, poisoned=granularity != "per_tensor")
        layout = dict(channels=conv.padded(shape[1]), cols=True, sums=True)
        want = conv.quantize(x, q, multiplier=multiplier, rng=state, stream=1, rank=3, **layout)
        got = quantize_images(
            _strided(x, device), bits=q.bits, granularity=granularity, zero=q.zero, stream=1 + 256 * 3,
            multiplier=None if multiplier is None else multiplier.to(device),
            rng=state.to(device) if q.rounding == "stochastic" else None, **layout,
        )  # fmt: skip
        compared |= _same(tuple(f"{name} {granularity}" for name in want._fields), got, want)
    return compared


def _gradient_case(device: torch.device, shape: tuple[int, int, int], memory: str, recipe: Recipe) -> Compared:
    from fqt_kernels.conv_quantize import quantize_gradient_images
    from fqt_kernels.gradient import Side

    dy, (n, c, p) = _some_images(shape, memory), shape
    random, channels = dict(rng=torch.tensor([0x123456789ABCDEF, 7]), rank=3), conv.padded(c)
    of_n, of_c = _factors(n), _factors(c)
    g = conv.quantize(dy, recipe.dgrad, multiplier=of_c[None], stream=DGRAD, channels=channels, sums=True, **random)
    h = conv.quantize(dy, recipe.wgrad, multiplier=of_n[:, None], stream=WGRAD, rows=False, cols=True, **random)
    rows, cols, total = quantize_gradient_images(
        _strided(dy, device), *(Side(q.bits, q.granularity, q.zero) for q in (recipe.dgrad, recipe.wgrad)),
        row_mul=of_n.to(device), col_mul=of_c.to(device), rng=random["rng"].to(device),
        streams=(DGRAD + 256 * 3, WGRAD + 256 * 3), channels=channels, sums=True, bias=True,
    )  # fmt: skip
    compared = _same(("rows", "scale of images", "offset of images", "sums"), rows, (g.rows, g.scale, g.offset, g.sums))
    compared |= _same(("cols", "scale of channels", "offset of channels"), cols, (h.cols, h.scale, h.offset))
    bound = n * p * 2.0**-24 * dy.double().abs().sum((0, 2))  # so many additions
    return compared | {"sums of dY": (total.double(), dy.double().sum((0, 2)), bound)}


# ---- wgrad


def wgrad_checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """Both kernels, of images that fill a piece of 16 codes and of few, in every configuration that dispatch may choose on
    the device; in the interpreter in one."""
    cases = ("strided", GEOMETRY, 16), ("dilated", DILATED, 5), ("3 groups", GROUPS, 33)
    for name, geometry, n in cases:
        for config in _wgrad_configs(device):
            case = f"affine, {name}, {n} images, {config}"
            arguments = device, geometry, n, config
            yield "_conv_wgrad_mm_kernel", case, lambda a=arguments: _wgrad_case(*a, adds=False)
            yield "_conv_wgrad_sum_kernel", f"{case}, added", lambda a=arguments: _wgrad_case(*a, adds=True)


def _wgrad_configs(device: torch.device) -> list[tuple[int, ...]]:
    from fqt_kernels.conv_wgrad import CONFIGS

    if device.type != "cuda":
        return [(16, 64, 64, 1, 1)]
    arch, _ = dispatch.device_info(str(device))
    return CONFIGS["amd" if arch.startswith("gfx") else candidates.FAMILY.get(arch, "sm80")]


def _wgrad_case(device: torch.device, geometry: conv.Geometry, n: int, config: tuple[int, ...], adds: bool) -> Compared:
    """Affine operands, a sum that two programs share; a new gradient, or one in either memory format that it is added to."""
    from fqt_kernels.conv_wgrad import conv_wgrad

    generator, g = torch.Generator().manual_seed(6), geometry
    shapes = (5 * g.groups, g.out_pixels, n), (3 * g.groups, g.pixels, n)
    a, b = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in shapes)
    a, b = (F.pad(q, (0, conv.padded_images(n) - n)) for q in (a, b))
    sa, oa, sb, ob = (torch.randn(size, generator=generator) for size in (len(a), len(a), 1, 1))
    h, x = conv.Images(None, a, sa, oa), conv.Images(None, b, sb, ob)
    table, row_term = conv.wgrad_terms(h, x, sb, g, n)
    want = conv.wgrad(h, x, sb, g, n).unflatten(2, g.kernel)
    vectors = dict(a_scale=sa, b_scale=sb, a_offset=oa, table=table, row_term=row_term)
    vectors = {name: t.to(device) for name, t in vectors.items()}
    results = {}
    for memory in (torch.contiguous_format, torch.channels_last) if adds else (None,):
        before = torch.randn(want.shape, generator=generator) if adds else torch.zeros_like(want)
        out = before.to(device, memory_format=memory, copy=True) if adds else None
        got = conv_wgrad(a.to(device), b.to(device), n, g, out=out, config=config, splits=2, **vectors)
        results[f"gradient {memory or 'alone'}"] = (got, before + want, 0.0)
    return results


# ---- a whole layer, through its operators and whatever dispatch chooses for them


def layer_checks(device: torch.device, backend: str) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """A convolution on the device by the backend, against the reference backend on the CPU, bit for bit."""
    for name, channels, kernel in (("int8", 3, 3), ("int8", 16, 1), ("psq4", 16, 3)):
        case = f"{name}, {channels} channels, {kernel}x{kernel}"
        yield "fqt.nn.Conv2d", case, lambda a=(name, channels, kernel): _layer_case(*a, device, backend)


def _layer_case(name: str, channels: int, kernel: int, device: torch.device, backend: str) -> Compared:
    from . import nn

    generator = torch.Generator().manual_seed(7)
    layer = nn.Conv2d(channels, 20, kernel, padding=kernel // 2, recipe=name)
    x = torch.randn(3, channels, 5, 4, generator=generator)
    dy = torch.randn(3, 20, 5, 4, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    there = copy.deepcopy(layer).to(device)
    outputs = []
    for module, where, how in ((there, device, backend), (layer, torch.device("cpu"), "reference")):
        leaf = x.to(where, memory_format=torch.channels_last).requires_grad_()
        with dispatch.backend(how):
            y = module(leaf)
            y.backward(dy.to(where))
        outputs.append((y.detach(), leaf.grad, module.weight.grad))
    return {key: (got, want, 0) for key, got, want in zip(("y", "dx", "dw"), *outputs, strict=True)}
