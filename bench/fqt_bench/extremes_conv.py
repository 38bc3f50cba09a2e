"""Extreme extents of the quantization of images and of the three products of convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fqt import conv, dispatch, reference
from fqt.candidates import family
from fqt.conv import Filters, Geometry, Images
from fqt.recipe import Quantizer

from .extremes_check import Case, Wrong, bits_at, codes_of, gib, near, normal, piece, rng_of, same

_gib = functools.partial(gib, spare=6)  # for a piece and its definition
SPLITS = (1, 2, 3, 7, 16, 33, 128)  # programs that share a sum; never fewer than int32 needs
Y_LIMIT = 65_535  # programs of a grid along its second axis


def cases(tiny: bool) -> Iterator[Case]:
    """On a GPU extents beyond 2³¹; tiny: the same launches of a few elements."""
    yield from _quantizations(tiny)
    yield from _forward(tiny)
    yield from _gradients(tiny)
    yield from _grids(tiny)


# ---- quantization


def _quantizations(tiny: bool) -> Iterator[Case]:
    for n, c, p in ((17, 24, 3), (17, 16, 4)) if tiny else ((2**18 + 3, 136, 63), (2**18 + 16, 144, 64)):
        for memory in ("channels last", "contiguous"):
            for granularity in ("per_row", "per_column"):
                run = functools.partial(_images, n, c, p, memory, granularity)
                yield Case("_images_kernel", f"{n}x{c}x{p}, {memory}, {granularity}", _gib(n * c * p, 4.2), run)
            run = functools.partial(_gradient, n, c, p, memory)
            yield Case("_gradient_images_kernel", f"{n}x{c}x{p}, {memory}", _gib(n * c * p, 4.2), run)


def _some_images(n: int, c: int, p: int, memory: str, device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if memory == "contiguous":
        return normal(n, c, p, device=device, dtype=dtype)
    return normal(n, p, c, device=device, dtype=dtype).transpose(1, 2)


def _images(n: int, c: int, p: int, memory: str, granularity: str, device: torch.device) -> str:
    from fqt_kernels.conv_quantize import quantize_images

    x, rng = _some_images(n, c, p, memory, device), rng_of(device)
    z = Quantizer(8, granularity, "min", "stochastic")
    rows, cols, scale, offset, sums = quantize_images(
        x, bits=z.bits, granularity=granularity, zero=z.zero, channels=conv.padded(c), rng=rng, stream=5, cols=True,
        sums=True,
    )  # fmt: skip
    _check_images("", x, z, rng, 5, None, rows, cols, scale, offset, sums)
    return "codes, scales and sums"


def _gradient(n: int, c: int, p: int, memory: str, device: torch.device) -> str:
    from fqt_kernels.conv_quantize import quantize_gradient_images
    from fqt_kernels.gradient import Side

    dy, rng = _some_images(n, c, p, memory, device), rng_of(device)
    of_n, of_c = (torch.linspace(0.5, 2.0, size, device=device) for size in (n, c))
    g, h = (Quantizer(8, kind, "symmetric", "stochastic") for kind in ("per_row", "per_column"))
    of_g, of_h, total = quantize_gradient_images(
        dy, *(Side(z.bits, z.granularity, z.zero) for z in (g, h)), row_mul=of_n, col_mul=of_c, rng=rng, streams=(0, 1),
        channels=conv.padded(c), sums=True, bias=True,
    )  # fmt: skip
    _check_images("G ", dy, g, rng, 0, of_c[None, :, None], of_g[0], None, *of_g[1:])
    _check_images("H ", dy, h, rng, 1, of_n[:, None, None], None, of_h[0], *of_h[1:], None)
    want, size = (torch.zeros(c, dtype=torch.float64, device=device) for _ in range(2))
    for images in _runs(n, c * p):
        want += dy[images].double().sum((0, 2))
        size += dy[images].double().abs().sum((0, 2))
    near("bias", total, want, n * p * 2.0**-24 * size)  # so many additions
    return "both codes, scales, sums and sums of channels"


def _runs(n: int, each: int) -> Iterator[slice]:
    """Runs of images of so many elements each."""
    step = max(piece() // each, 1)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _check_images(what: str, x: Tensor, z: Quantizer, rng: Tensor, stream: int, multiplier: Tensor | None,
                  rows: Tensor | None, cols: Tensor | None, scale: Tensor, offset: Tensor | None,
                  sums: Tensor | None) -> None:  # fmt: skip
    """Compare with `fqt.conv.quantize` of x (N, C, P); multiplier broadcasts against it."""
    n, c, p = x.shape
    by_image = z.granularity == "per_row"

    def multiplied(images: slice) -> Tensor:
        y = x[images].float()
        if multiplier is None:
            return y
        return y * (multiplier[images] if multiplier.shape[0] == n else multiplier)

    dims = (1, 2) if by_image else (0, 2)
    hi = torch.full((n if by_image else 1, 1 if by_image else c, 1), -torch.inf, device=x.device)
    lo = -hi
    for images in _runs(n, c * p):
        y = multiplied(images)
        own = images if by_image else slice(None)
        lo[own] = torch.minimum(lo[own], y.amin(dims, True))
        hi[own] = torch.maximum(hi[own], y.amax(dims, True))
    if z.zero == "symmetric":
        hi = torch.maximum(hi, -lo)
        lo = -hi
    for images in _runs(n, c * p):
        own = images if by_image else slice(None)
        pixels = slice(images.start * p, images.stop * p)
        bits = bits_at(rng, pixels, slice(0, c), stream).view(-1, p, c).transpose(1, 2)
        q, of_q, offset_q = reference.codes(multiplied(images), lo[own], hi[own], z, bits)
        at = (images.start, 0, 0)
        if rows is not None:
            same(f"{what}rows", rows[images, :, :c], q.transpose(1, 2), at)
            same(f"{what}rows' padding", rows[images, :, c:], torch.zeros_like(rows[images, :, c:]), at)
        if cols is not None:
            same(f"{what}cols", cols[:, :, images], q.permute(1, 2, 0), at[::-1])
        for name, got, want in (("scale", scale, of_q), ("offset", offset, offset_q)):
            if got is not None:
                same(what + name, got[own], want.flatten(), (images.start if by_image else 0,))
        if sums is not None:
            same(f"{what}sums", sums[images, :, 0], q.sum(1, dtype=torch.int32), at[:2])
    if cols is not None:
        same(f"{what}cols' padding", cols[:, :, n:], torch.zeros_like(cols[:, :, n:]))


# ---- fprop and dgrad


def _forward(tiny: bool) -> Iterator[Case]:
    n, c, rows = (5, 16, 8) if tiny else (2**18 + 3, 144, 16)
    size = (4, 3) if tiny else (8, 8)
    wide = Geometry.of(size, (3, 3), padding=((1, 1), (1, 1)))
    strided = Geometry.of(size, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    pixels = math.prod(size)
    yield Case("_conv_mm_kernel", f"fprop, {n} images of {c} channels of {size}", _gib(n * pixels * c, 2),
               functools.partial(_product, n, c, rows, wide, False, True))  # fmt: skip
    n, c, rows = (5, 16, 24) if tiny else (2**17 + 3, 16, 272)
    for geometry, transposed, last in ((wide, False, True), (wide, False, False), (strided, True, True)):
        name = f"{'dgrad' if transposed else 'fprop'}, {n} images to {rows} channels of {size}"
        name += f", stride {geometry.stride[0]}, channels {'last' if last else 'first'}"
        yield Case("_conv_mm_kernel", name, _gib(n * pixels * rows, 4),
                   functools.partial(_product, n, c, rows, geometry, transposed, last))  # fmt: skip
    terms = 240 if tiny else 131_056
    for a, b in ((-128, -128), (127, -128)):
        yield Case("_conv_mm_kernel", f"sums of {terms} products, codes {a} and {b}", 2.0,
                   functools.partial(_long_sum, terms, a, b))  # fmt: skip
    yield Case("_conv_mm_kernel", "an image of 2³¹ outputs, and a sum beyond int32, are refused", 1.0, _refusals)


def _product(n: int, c: int, rows: int, g: Geometry, transposed: bool, last: bool, device: torch.device) -> str:
    """Every configuration, on random codes: exact sums, two multiplications."""
    from fqt_kernels.conv import conv as launch

    pixels = g.out_pixels if transposed else g.pixels
    a, b = codes_of(n, pixels, c, device=device), codes_of(rows, g.taps, c, device=device, seed=3)
    sa, sb = (torch.linspace(0.5, 2.0, size, device=device) for size in (n, rows))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = g.size if transposed else g.out
    tried, first = _configs("conv", device, rows), None
    for config in tried:
        out = launch(a, b, g, transposed=transposed, a_scale=sa, b_scale=sb, out_dtype=dtype, channels_last=last,
                     config=config)  # fmt: skip
        # float64 images are 8 bytes an element, and a convolution may write out its windows
        for images in _runs(n, (16 if first is None else 1) * max(pixels * c, math.prod(size) * rows)):
            if first is None:
                left, right = Images(a[images], None, sa[images], None), Filters(b, sb, None, None, c)
                want = conv.product(left, right, g, transposed=transposed).to(dtype).unflatten(2, size)
            else:
                want = first[images]
            same(f"{config}: out", out[images], want, (images.start, 0, 0, 0))
        first = out if first is None else first
    return f"{len(tried)} configurations, bit for bit"


def _configs(op: str, device: torch.device, rows: int) -> list[tuple[int, ...]]:
    """Those that dispatch has for the device; in the interpreter one."""
    from fqt_kernels import conv as forward
    from fqt_kernels import conv_wgrad

    if device.type != "cuda":
        return [(32, 32, 32, 1, 1) if op == "conv" else (16, 64, 64, 1, 1)]
    name = family(dispatch.problem("scaled_mm", device, 128, 128, 128)) or "sm80"
    if op == "conv":
        return [config for config in forward.CONFIGS[name] if forward.fits(config, rows)]
    return list(conv_wgrad.CONFIGS[name])


def _long_sum(terms: int, a: int, b: int, device: torch.device) -> str:
    from fqt_kernels.conv import conv as launch

    g, n, rows = Geometry.of((3, 2), (1, 1), (2, 1)), 3, 32
    qa, qb = (torch.full(shape, code, dtype=torch.int8, device=device) for shape, code in
              (((n, g.pixels, terms), a), ((rows, 1, terms), b)))  # fmt: skip
    ones = torch.ones(1, device=device)
    tried = _configs("conv", device, rows)
    for config in tried:
        out = launch(qa, qb, g, a_scale=ones, b_scale=None, config=config)
        same(f"{config}: out", out, torch.full((n, rows, *g.out), float(terms * a * b), device=device))
    return f"{len(tried)} configurations, exact"


def _refusals(device: torch.device) -> str:
    from fqt_kernels.conv import conv as launch

    large = Geometry.of((1, 1), (1, 1), padding=((16_384, 16_384), (16_384, 16_384)))  # 32 769² outputs
    for g, c, rows, words in ((large, 16, 2, "2³¹ elements"), (Geometry.of((1, 1), (1, 1)), 131_072, 1, "leave int32")):
        a, b = (torch.zeros(shape, dtype=torch.int8, device=device) for shape in ((1, 1, c), (rows, 1, c)))
        try:
            launch(a, b, g, a_scale=torch.ones(1, device=device), config=(64, 64, 64, 4, 4))
        except ValueError as e:
            if words in str(e):
                continue
            raise
        raise Wrong(f"{rows} channels of {g.out} from {c} were not refused")
    return "both refused"


# ---- wgrad


def _gradients(tiny: bool) -> Iterator[Case]:
    o, c, n, size = (9, 4, 17, (4, 3)) if tiny else (72, 24, 256, (56, 56))
    splits = SPLITS[:2] if tiny else SPLITS
    for a, b in ((-128, -128), (127, -128)):
        for kernel in (1, 3):
            g = Geometry.of(size, (kernel, kernel), padding=((kernel // 2,) * 2,) * 2)
            yield Case("_conv_wgrad_mm_kernel", f"{kernel}x{kernel}, N·H·W {n * g.pixels}, codes {a} and {b}", 2.0,
                       functools.partial(_extreme_codes, o, c, n, g, a, b, splits))  # fmt: skip
    o, c, n, size = (5, 3, 32, (4, 3)) if tiny else (16, 144, 2**18 + 16, (8, 8))
    yield Case("_conv_wgrad_mm_kernel", f"X {c}x{math.prod(size)}x{n}", _gib(c * n * math.prod(size), 2),
               functools.partial(_random_codes, o, c, n, size))  # fmt: skip
    n, size = (32, (4, 8)) if tiny else (2**17 + 16, (128, 128))
    yield Case("_conv_wgrad_mm_kernel", f"a channel of {n} images of {size}", _gib(2 * n * math.prod(size), 1),
               functools.partial(_random_codes, 1, 1, n, size))  # fmt: skip


def _splits(terms: int, config: tuple[int, ...], wanted: tuple[int, ...]) -> list[int]:
    from fqt_kernels.conv_wgrad import least_splits

    least = least_splits(terms, config[2])
    return sorted({max(split, least) for split in wanted})


def _extreme_codes(
    o: int, c: int, n: int, g: Geometry, a: int, b: int, splits: tuple[int, ...], device: torch.device
) -> str:
    """Each tap's sum is the number of its outputs inside of the image, times n·a·b, rounded once."""
    from fqt_kernels.conv_wgrad import conv_wgrad

    images = conv.padded_images(n)
    qa, qb = (torch.zeros(rows, pixels, images, dtype=torch.int8, device=device) for rows, pixels in
              ((o, g.out_pixels), (c, g.pixels)))  # fmt: skip
    qa[..., :n], qb[..., :n] = a, b
    inside = [g.inside(axis).sum(0) for axis in (0, 1)]  # outputs whose tap is inside
    total = inside[0][:, None] * inside[1][None, :] * (n * a * b)
    want = total.float().to(device).expand(o, c, *g.kernel) * 0.5
    half, one = torch.full((1,), 0.5, device=device), torch.ones(1, device=device)
    count = 0
    for config in _configs("conv_wgrad", device, o):
        for split in _splits(n * g.out_pixels, config, splits):
            got = conv_wgrad(qa, qb, n, g, a_scale=half, b_scale=one, config=config, splits=split)
            same(f"{config} split {split}: dW", got, want)
            count += 1
    return f"{count} configurations and splits, exact"


def _random_codes(o: int, c: int, n: int, size: tuple[int, int], device: torch.device) -> str:
    """1x1: the product of two matrices, whose sums are exact in float64."""
    from fqt_kernels.conv_wgrad import conv_wgrad

    g = Geometry.of(size, (1, 1))
    qa, qb = codes_of(o, g.pixels, n, device=device), codes_of(c, g.pixels, n, device=device, seed=3)
    a, b = qa.view(o, -1), qb.view(c, -1)
    terms, one, count = a.shape[1], torch.ones(1, device=device), 0
    for config in _configs("conv_wgrad", device, o):
        for split in _splits(terms, config, SPLITS)[:2]:
            got = conv_wgrad(qa, qb, n, g, a_scale=one, b_scale=one, config=config, splits=split)
            for channels in _runs(c, o * 4):
                width = channels.stop - channels.start
                total = torch.zeros(o, width, dtype=torch.float64, device=device)
                step = max(piece() // (o + width), 1)
                for i in range(0, terms, step):
                    total += a[:, i : i + step].double() @ b[channels, i : i + step].double().t()
                want = total.to(torch.int64).float()[:, :, None, None]
                same(f"{config} split {split}: dW", got[:, channels], want, (0, channels.start, 0, 0))
            count += 1
            del got
    return f"{count} configurations and splits, exact"


# ---- as many programs as the second axis of a grid has


def _grids(tiny: bool) -> Iterator[Case]:
    most = 3 if tiny else Y_LIMIT
    yield Case("_conv_mm_kernel", f"{most} groups", 2.0, functools.partial(_groups, most))
    yield Case("_conv_wgrad_mm_kernel", f"{most} programs share a sum", 2.0, functools.partial(_many_splits, most))
    columns = 600 if tiny else 512 * Y_LIMIT
    yield Case(
        "_conv_wgrad_sum_kernel", f"{columns} channels", 4.0, functools.partial(_random_codes, 2, columns, 8, (1, 1))
    )
    columns, o = (600, 5) if tiny else (2**22, 513)  # 512 rows are 2³¹ elements
    yield Case("_conv_wgrad_mm_kernel", f"dW {o}x{columns}", _gib(o * columns, 8),
               functools.partial(_random_codes, o, columns, 8, (1, 1)))  # fmt: skip


def _groups(groups: int, device: torch.device) -> str:
    g = Geometry.of((3, 3), (3, 3), padding=((1, 1), (1, 1)), groups=groups)
    from fqt_kernels.conv import conv as launch

    a, b = codes_of(2, 9, groups, device=device), codes_of(groups, 9, 1, device=device, seed=3)
    one = torch.ones(1, device=device)
    config = (64, 32, 32, 4, 2)  # of channels that are no multiple of 16
    got = launch(a, b, g, a_scale=one, b_scale=one, config=config)
    want = conv.product(Images(a, None, one, None), Filters(b, one, None, None, 1), g)
    same("out", got, want.unflatten(2, g.out))
    return "exact"


def _many_splits(splits: int, device: torch.device) -> str:
    from fqt_kernels.conv_wgrad import conv_wgrad

    config = (64, 64, 64, 4, 4) if device.type == "cuda" else (32, 32, 32, 1, 1)
    n = config[2]
    g = Geometry.of((1, splits), (1, 1))  # a block of K for each program
    qa, qb = codes_of(1, splits, n, device=device), codes_of(1, splits, n, device=device, seed=3)
    one = torch.ones(1, device=device)
    got = conv_wgrad(qa, qb, n, g, a_scale=one, b_scale=one, config=config, splits=splits)
    want = (qa.long() * qb.long()).sum().float().view(1, 1, 1, 1)
    same("dW", got, want)
    return "exact"
