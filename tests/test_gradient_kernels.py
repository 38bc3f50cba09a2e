"""Laws of the fused quantization of an output gradient: what two quantizations of it give, bit for bit, and its sums."""

import laws
import pytest
import torch

import fqt_kernels.gradient as kernels
import fqt_kernels.statistics as statistics
from fqt import reference
from fqt.gradients import DGRAD, WGRAD
from fqt.recipe import Quantizer, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SMALL_TILE = (32, 32, 1)
RECIPES = ("int8", "fp8", "psq8", "psq3", "ptq5")
SHAPES = [(1, 1), (1, 33), (33, 1), (31, 32), (7, 64), (33, 47), (48, 32)]


@pytest.fixture(autouse=True)
def memory(guard, monkeypatch):
    """What the launchers allocate lies between guard bands, and what they leave unwritten is poison."""
    monkeypatch.setattr(kernels, "STATS_TILE", (16, 32, 1))
    return guard(kernels, statistics)


def gradient(m, n, seed=0, dtype=torch.float32, strided=False):
    """Rows and columns of very different sizes, some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(m, n, generator=g)
        * torch.exp(torch.randn(m, 1, generator=g))
        * torch.exp(torch.randn(n, generator=g))
    )
    x = torch.where(torch.rand(m, n, generator=g) < 0.1, torch.zeros(()), x).to(dtype)
    return laws.poisoned(x) if strided else x


def factors(m, n, folded):
    g = torch.Generator().manual_seed(m + n)
    return tuple(torch.rand(size, generator=g) + 0.2 if folded else None for size in (m, n))


def side(z: Quantizer) -> kernels.Side:
    return kernels.Side(z.bits, z.granularity, "e4m3" if z.format == "e4m3" else z.zero)


def launch(dy, recipe, row_mul, col_mul, *, rng, rank=0, **options):
    to = lambda t: None if t is None else t.to(dy.device)  # noqa: E731
    return kernels.quantize_gradient(
        dy, side(recipe.dgrad), side(recipe.wgrad), row_mul=to(row_mul), col_mul=to(col_mul), rng=rng.to(dy.device),
        streams=(DGRAD + 256 * rank, WGRAD + 256 * rank), **{"sums": recipe.affine, "tile": SMALL_TILE, **options},
    )  # fmt: skip


def two_quantizations(dy, recipe, row_mul, col_mul, *, rng, rank=0):
    sums = recipe.affine
    by_column = None if col_mul is None else col_mul[None]
    by_row = None if row_mul is None else row_mul[:, None]
    g = reference.quantize(dy, recipe.dgrad, multiplier=by_column, rng=rng, stream=DGRAD, rank=rank, sums=sums)
    h = reference.quantize(
        dy, recipe.wgrad, multiplier=by_row, rng=rng, stream=WGRAD, rank=rank, rows=False, cols=True, sums=sums
    )
    return (g.q, g.scale, g.offset, g.row_sum), (h.qt, h.scale, h.offset, h.col_sum)


def assert_same(got, expected, what):
    for side_got, side_expected, name in zip(got, expected, ("dgrad", "wgrad"), strict=True):
        for a, e, field in zip(side_got, side_expected, kernels.Quantized._fields, strict=True):
            if e is not None and e.dtype == torch.float8_e4m3fn:
                assert a.dtype == e.dtype
                a, e = a.view(torch.int8), e.view(torch.int8)
            laws.assert_same(a, e, f"{field} for {name} {what}")


@pytest.mark.parametrize("name", RECIPES)
def test_both_quantizations_are_those_of_the_reference(name, device):
    recipe = Recipe.parse(name)
    for i, (m, n) in enumerate(SHAPES):
        dy = gradient(m, n, i, (torch.float32, torch.bfloat16, torch.float16)[i % 3], strided=i % 2 == 1)
        row_mul, col_mul = factors(m, n, recipe.x.granularity == "per_row")
        rng = laws.random_state(5, i)
        *got, _ = launch(dy.to(device), recipe, row_mul, col_mul, rng=rng, rank=3)
        assert_same(got, two_quantizations(dy, recipe, row_mul, col_mul, rng=rng, rank=3), f"{m}x{n}")


@pytest.mark.parametrize("name", ["int8", "psq8"])
@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_nothing_depends_on_how_the_work_is_divided(name, programs, device, monkeypatch):
    """Chunks of the statistics, their tile, the tile of the codes, the default launch; the sums within their bound."""
    recipe, (m, n) = Recipe.parse(name), (70, 24)
    dy = gradient(m, n)
    row_mul, col_mul = factors(m, n, recipe.x.granularity == "per_row")
    rng = laws.random_state(1, 1)
    expected = two_quantizations(dy, recipe, row_mul, col_mul, rng=rng)
    monkeypatch.setattr(kernels, "STATS_PROGRAMS", programs)
    for stats_tile, tile in (((8, 8, 1), (64, 16, 1)), ((64, 16, 1), (16, 64, 1)), ((16, 64, 1), None)):
        monkeypatch.setattr(kernels, "STATS_TILE", stats_tile)
        *got, total = launch(dy.to(device), recipe, row_mul, col_mul, rng=rng, bias=True, tile=tile)
        assert_same(got, expected, f"{stats_tile} {tile}")
        # m additions in float32, each off by at most 2⁻²⁴ of a partial sum of magnitudes.
        error = (total.cpu().double() - dy.double().sum(0)).abs()
        assert bool((error <= m * 2.0**-24 * dy.double().abs().sum(0)).all())


def test_the_two_draw_random_bits_of_their_own(device):
    """dgrad's and wgrad's rounding errors of one gradient are uncorrelated: 0 ± 1/√n, at 5σ."""
    m = n = 64
    dy = torch.rand(m, n, generator=torch.Generator().manual_seed(0))
    dy[0], dy[:, 0] = 1.0, 1.0  # every row and every column has the same scale
    recipe = Recipe.int8()
    g, h, _ = launch(dy.to(device), recipe, None, None, rng=laws.random_state(2))
    errors = [q.codes.cpu().float() / 127 - t for q, t in ((g, dy), (h, dy.t()))]
    a, b = errors[0][1:, 1:].flatten(), errors[1].t()[1:, 1:].flatten()
    assert not torch.equal(g.codes, h.codes.t())
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


def test_two_runs_have_the_same_bits(device):
    dy = gradient(100, 90).to(device)
    runs = [launch(dy, Recipe.int8(), *factors(100, 90, True), rng=laws.random_state(3), bias=True) for _ in range(2)]
    for first, second in zip(*((*g, *h, total) for g, h, total in runs), strict=True):
        laws.assert_same(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_makes_its_row_and_its_column_non_finite_and_no_other(value, device):
    dy = gradient(20, 30)
    dy[3, 7] = value
    g, h, total = launch(dy.to(device), Recipe.int8(), None, None, rng=laws.random_state(), bias=True)
    assert [int(i) for i in (~g.scale.cpu().isfinite()).flatten().nonzero()] == [3]
    assert [int(i) for i in (~h.scale.cpu().isfinite()).flatten().nonzero()] == [7]
    assert [int(i) for i in (~total.cpu().isfinite()).nonzero()] == [7]


def test_the_input_is_left_alone_and_the_sums_are_only_made_if_asked_for(device):
    dy = gradient(17, 33).to(device)
    before = dy.clone()
    g, h, total = launch(dy, Recipe.int8(), None, None, rng=laws.random_state())
    assert torch.equal(dy, before) and total is None and g.sums is None and h.sums is None
