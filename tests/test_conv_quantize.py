"""Laws of the quantization of images: `fqt.conv.quantize` bit for bit, in every format and tiling, writing nothing else."""

import dataclasses
import itertools

import laws
import pytest
import torch

import fqt_kernels.conv_quantize as kernels
import fqt_kernels.conv_statistics as ranges
import fqt_kernels.statistics as statistics
from fqt import conv
from fqt.gradients import DGRAD, WGRAD
from fqt.recipe import GRANULARITIES, ROUNDINGS, ZEROS, Quantizer, Recipe
from fqt_kernels.gradient import Side

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nchw", "nhwc", "strided", "images last", "one image")
# 1, odd and even channels, pixels and images; pixels in units of 4; a batch of more than 16, whose codes are padded. Few
# images: the interpreter takes 10 ms to find the ranges of each.
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 20, 9), (1, 33, 1), (2, 6, 12), (17, 5, 2), (4, 8, 4)]
WAYS = list(itertools.product(GRANULARITIES, ZEROS, ROUNDINGS))


@pytest.fixture(autouse=True)
def memory(guard, monkeypatch):
    """What the launchers allocate lies between guard bands, and what they leave unwritten is poison."""
    monkeypatch.setattr(ranges, "PROGRAMS", 2)  # the interpreter pays for each
    return guard(kernels, ranges, statistics)


def images(n, c, p, memory="nchw", dtype=torch.float32, seed=0):
    """Images and channels of very different sizes, some zeros, in some format; NaN lies around them where it can.

    Of odd seeds all are positive, so that what is outside would widen the ranges if it counted as 0.
    """
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    x = normal(n, c, p) * torch.exp(normal(n, 1, 1)) * torch.exp(normal(1, c, 1))
    x = torch.where(torch.rand(n, c, p, generator=g) < 0.1, torch.zeros(()), x)
    x = (x.abs() + 1 if seed % 2 else x).to(dtype)
    if memory == "one image":
        return x[:1].expand(n, c, p)
    order = {"nchw": (0, 1, 2), "nhwc": (0, 2, 1), "strided": (0, 1, 2), "images last": (2, 1, 0)}[memory]
    gap = 2 if memory == "strided" else 1
    frame = torch.full([2 + gap * x.shape[d] for d in order], torch.nan, dtype=dtype)
    view = (
        frame[tuple(slice(1, 1 + gap * x.shape[d], gap) for d in order)]
        if gap > 1
        else torch.empty_like(frame[2:, 2:, 2:])
    )
    return view.permute(*(order.index(d) for d in range(3))).copy_(x)


def on(device, x):
    """x on the device, with its strides."""
    if device == "cpu":
        return x
    if 0 in x.stride():  # of one image that is repeated
        return x[:1].to(device).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def launch(x, quantizer, device, *, rng, rank=0, **options):
    stochastic = quantizer.rounding == "stochastic"
    options["stream"] = options.get("stream", 0) + 256 * rank
    multiplier = options.pop("multiplier", None)
    return kernels.quantize_images(
        on(device, x), bits=quantizer.bits, granularity=quantizer.granularity, zero=quantizer.zero,
        multiplier=None if multiplier is None else multiplier.to(device),
        rng=rng.to(device) if stochastic else None, **options,
    )  # fmt: skip


def assert_is_reference(x, quantizer, device, **options):
    options = dict(rng=laws.random_state(5, 3), stream=1, rank=2, cols=True, sums=True) | options
    expected = conv.quantize(x, quantizer, **options)
    for name, a, e in zip(expected._fields, launch(x, quantizer, device, **options), expected, strict=True):
        laws.assert_same(a, e, f"{name} of {tuple(x.shape)} {x.dtype} strides {x.stride()} {quantizer} {options}")


def multiplier(n, c, kind):
    """Of one sign or two, by image, by channel, or none."""
    g = torch.Generator().manual_seed(n * c)
    return [None, torch.rand(n, 1, generator=g) + 0.2, torch.randn(1, c, generator=g)][kind]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_codes_scales_and_sums_are_those_of_the_reference(way, device):
    """Every granularity, zero and rounding; shape, format, type, bits, groups, padding and multiplier take turns."""
    granularity, zero, rounding = way
    first = 2 * WAYS.index(way)
    for i in (first, first + 1):
        n, c, p = SHAPES[i * 3 % len(SHAPES)]
        groups = 2 if c % 2 == 0 and i % 2 else 1
        assert_is_reference(
            images(n, c, p, FORMATS[i % len(FORMATS)], DTYPES[i % 3], i),
            Quantizer((8, 5, 2)[i % 3], granularity, zero, rounding),
            device,
            multiplier=multiplier(n, c, (i + i // 3) % 3),
            groups=groups,
            channels=conv.padded(c) if groups == 1 else c,
        )


@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
def test_one_layout_alone_is_written_as_with_the_other(memory, device):
    for rows, quantizer in ((True, Quantizer(8, "per_tensor", "min")), (False, Quantizer(8, "per_row", "grid"))):
        assert_is_reference(images(17, 5, 6, memory), quantizer, device, rows=rows, cols=not rows, channels=16)


def divide(monkeypatch, programs, wide):
    """Small tiles, so many programs of the statistics, and offsets of 64 bits if wide."""
    for name in ("TILES", "ODD_TILES"):
        monkeypatch.setattr(kernels, name, dict.fromkeys(kernels.TILES, (4, 2, 8, 1)))
    for name, size in (("PROGRAMS", programs), ("TILE", 16), ("SMALL_TILE", 16), ("LONGEST", 8)):
        monkeypatch.setattr(ranges, name, size)
    for module in (kernels, ranges):
        monkeypatch.setattr(module, "is_wide", lambda *spans: wide)


@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_nothing_depends_on_how_the_work_is_divided(memory, programs, device, monkeypatch):
    """Tiles in every direction; pieces of the images, and of their pixels, in the statistics."""
    divide(monkeypatch, programs, wide=programs == 5)
    quantizer = Quantizer(8, GRANULARITIES[programs % 3], "grid", "stochastic")
    assert_is_reference(images(5, 9, 3, memory), quantizer, device, multiplier=multiplier(5, 9, 1), channels=16)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
def test_ranges_without_factors_are_found_in_the_memory_as_it_lies(memory, granularity, device, monkeypatch):
    """Extremes have no order: an image is a row of a matrix, whose statistics are those of any matrix."""
    monkeypatch.delattr(ranges, "_image_stats_kernel")
    for zero in ("symmetric", "min"):
        assert_is_reference(images(3, 5, 7, memory), Quantizer(8, granularity, zero), device)


def test_padding_is_zero_also_where_zero_has_another_code(device):
    x = images(17, 5, 6) + 3.0
    rows, cols, *_ = launch(
        x, Quantizer(8, "per_tensor", "min"), device, rng=laws.random_state(), channels=16, cols=True
    )
    assert rows.shape == (17, 6, 16) and cols.shape == (5, 6, 32)
    assert not rows[..., 5:].any() and not cols[..., 17:].any()
    assert bool((rows[..., :5] != 0).any()) and bool((cols[..., :17] != 0).any())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity, spoilt", [("per_row", 1), ("per_column", 4)])
def test_a_non_finite_value_makes_its_image_or_its_channel_non_finite_and_no_other(granularity, spoilt, value, device):
    x = images(2, 6, 5)
    x[1, 4, 2] = value
    for factors, zero in enumerate(ZEROS):
        options = dict(multiplier=multiplier(2, 6, factors), rng=laws.random_state(1), cols=True)
        *_, scale, offset, _ = launch(x, Quantizer(8, granularity, zero, "stochastic"), device, **options)
        finite = scale.cpu().isfinite() & (True if offset is None else offset.cpu().isfinite())
        assert [int(i) for i in (~finite).nonzero()] == [spoilt]
        if value != value:
            assert_is_reference(x, Quantizer(8, granularity, zero, "stochastic"), device, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_factor_makes_its_groups_non_finite_and_no_other(value, device):
    for granularity, kind in (("per_row", 1), ("per_column", 2), ("per_tensor", 2)):
        factors = multiplier(2, 4, kind).abs()
        factors.view(-1)[1] = value
        options = dict(multiplier=factors, rng=laws.random_state(1), cols=True)
        rows, cols, scale, *_ = launch(images(2, 4, 5), Quantizer(8, granularity, "symmetric"), device, **options)
        expected = conv.quantize(images(2, 4, 5), Quantizer(8, granularity, "symmetric"), **options)
        assert torch.equal(scale.cpu().isfinite(), expected.scale.isfinite())
        laws.assert_same(rows, expected.rows)
        laws.assert_same(cols, expected.cols)


def test_the_factor_of_an_only_channel_is_that_of_every_image(device):
    factor = laws.poisoned_tail(torch.tensor([0.7]))[None]
    assert_is_reference(images(3, 1, 4), Quantizer(8, "per_row", "grid"), device, multiplier=factor)


# ---- both quantizations of a gradient


def factors(n, c, folded):
    g = torch.Generator().manual_seed(n + c)
    return tuple(torch.rand(size, generator=g) + 0.2 if folded else None for size in (n, c))


def launch_gradient(dy, recipe, device, row_mul, col_mul, *, rng, rank=0, **options):
    sides = (Side(q.bits, q.granularity, q.zero) for q in (recipe.dgrad, recipe.wgrad))
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    return kernels.quantize_gradient_images(
        on(device, dy), *sides, row_mul=to(row_mul), col_mul=to(col_mul), rng=rng.to(device),
        streams=(DGRAD + 256 * rank, WGRAD + 256 * rank), **options,
    )  # fmt: skip


def assert_is_two_quantizations(dy, recipe, device, folded, **options):
    n, c, p = dy.shape
    random = dict(rng=laws.random_state(5, n), rank=3)
    row_mul, col_mul = factors(n, c, folded)
    g = conv.quantize(
        dy, recipe.dgrad, multiplier=None if col_mul is None else col_mul[None], stream=DGRAD, **random, **options
    )
    h = conv.quantize(
        dy, recipe.wgrad, multiplier=None if row_mul is None else row_mul[:, None], stream=WGRAD, rows=False, cols=True,
        **random,
    )  # fmt: skip
    rows, cols, total = launch_gradient(dy, recipe, device, row_mul, col_mul, bias=True, **random, **options)
    expected = ((g.rows, g.scale, g.offset, g.sums), (h.cols, h.scale, h.offset))
    for got, want in zip((rows, cols), expected, strict=True):
        for a, e, name in zip(got, want, ("codes", "scale", "offset", "sums"), strict=False):
            laws.assert_same(a, e, f"{name} of {tuple(dy.shape)} strides {dy.stride()} {recipe}")
    # n·p - 1 additions in float32, each off by at most 2⁻²⁴ of a partial sum of magnitudes.
    error = (total.cpu().double() - dy.double().sum((0, 2))).abs()
    assert bool((error <= n * p * laws.EPS * dy.double().abs().sum((0, 2))).all())


RECIPES = ("int8", "psq8", "psq3", "ptq5")


@pytest.mark.parametrize("name", RECIPES)
def test_both_quantizations_of_a_gradient_are_those_of_the_reference(name, device):
    recipe, first = Recipe.parse(name), RECIPES.index(name)
    for i in range(2 * first, 2 * first + 3):
        n, c, p = SHAPES[i % len(SHAPES)]
        dy = images(n, c, p, FORMATS[i % len(FORMATS)], DTYPES[i % 3], i)
        groups = 2 if c % 2 == 0 and i % 2 else 1
        channels = conv.padded(c) if groups == 1 else c
        folded = recipe.x.granularity == "per_row"
        assert_is_two_quantizations(dy, recipe, device, folded, sums=recipe.affine, groups=groups, channels=channels)


@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
def test_a_gradients_codes_and_sums_do_not_depend_on_how_the_work_is_divided(memory, device, monkeypatch):
    divide(monkeypatch, programs=5, wide=memory == "nchw")
    mixed = dataclasses.replace(Recipe.int8(), wgrad=Quantizer(8, "per_column", "min", "stochastic"))
    for recipe, folded in ((mixed, True), (Recipe.parse("psq8"), False)):
        assert_is_two_quantizations(images(3, 9, 3, memory), recipe, device, folded, sums=True, channels=16)


def test_two_runs_have_the_same_bits_and_leave_the_gradient_alone(device):
    dy = on(device, images(3, 6, 7, "nhwc"))
    before = dy.clone()
    runs = [
        launch_gradient(dy, Recipe.int8(), device, *factors(3, 6, True), rng=laws.random_state(3), bias=True)
        for _ in range(2)
    ]
    for first, second in zip(*((*g, *h, total) for g, h, total in runs), strict=True):
        laws.assert_same(first, second)
    assert torch.equal(dy, before)
