"""Laws of `fqt.variance`: the variance a gradient's ranges predict, the one its codes have, and the error they make."""

import math

import pytest
import torch
from laws import overshooting, random_state
from torch._subclasses import FakeTensorMode

from fqt import reference
from fqt.householder import TILE, Householder
from fqt.qtensor import QTensor
from fqt.recipe import Quantizer, Recipe
from fqt.variance import _e4m3_spacing, measured

OTHERS = {
    "ptq": Recipe.ptq(6),
    "ptq min/max": Recipe.ptq(5, "min"),
    "psq": Recipe.psq(4),
    "psq symmetric": Recipe.int8(),
    "e4m3": Recipe.fp8(),
}
TRANSFORMED = {"bhq": Recipe.bhq(4), "bhq-tile": Recipe.bhq(3, "tile"), "auto": Recipe.auto(4)}
QUANTIZERS = {name: recipe.dgrad for name, recipe in (OTHERS | TRANSFORMED).items()}
NAMED = {"ptq": "ptq5", "psq": "psq5", "bhq": "bhq5", "bhq_tile": "bhq5-tile"}  # the recipes of what is predicted


def dgrad(recipe):
    return Recipe.parse(recipe).dgrad


def heavy(m=40, n=96, spread=1.5, seed=0, dtype=torch.float64):
    """A gradient whose rows have log-normal magnitudes."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(m, 1, generator=g, dtype=torch.float64))
    return (torch.randn(m, n, generator=g, dtype=torch.float64) * rows).to(dtype)


def quantized(g, quantizer, step=0):
    """(codes, transform) of G, by the reference."""
    random = dict(rng=random_state(3, step), stream=0)
    if quantizer.householder:
        transform, codes = reference.householder_codes(g, quantizer, **random)
        return codes, transform
    return reference.quantize(g, quantizer, **random), None


def numbers(g, quantizer, step=0, product="dgrad", multiplier=None):
    y = g if multiplier is None else g * multiplier
    out, nonfinite = measured(product, g, multiplier, quantizer, *quantized(y, quantizer, step))
    return {name: float(x) for name, x in out.items()} | {"nonfinite_rows": int(nonfinite)}


def two_halves(m, n):
    """Rows of two magnitudes, the second half's 100 times the first's, of which most have no range."""
    g = heavy(m, n, 0.1)
    g[m // 2 :] *= 100
    g[1], g[2 : m // 3] = 0.0, 0.7
    return g


# ---- conditional and empirical


@pytest.mark.parametrize("kind", ["psq", "ptq", "ptq min/max", *TRANSFORMED])
def test_the_conditional_variance_is_that_of_bernoulli_rounding_through_the_dense_inverse(kind):
    """Σ_j Σ_i (T⁻¹)_ji² Σ_k p_ik(1-p_ik)·scale_i², over the rows j that are not put back exactly."""
    g, quantizer = two_halves(150, 17), QUANTIZERS[kind]
    codes, transform = quantized(g, quantizer)
    y = g if transform is None else transform.apply(g)
    scale, offset = codes.scale, codes.offset
    u = torch.where(scale == 0, 0, (y - offset) / scale)
    p = u - u.floor()
    rows = (p * (1 - p) * scale.square()).sum(1)
    if transform is not None:
        dense = transform.inverse(torch.eye(len(g), dtype=torch.float64))
        rows = torch.where(transform.constant[:, 0], 0, dense.square() @ rows)
    # Both are float64; the codes' remainder is rounded to 2⁻¹⁶ only for drawing. u is off by 2⁻⁵² of at most 2⁸ bins.
    assert float(rows.sum()) > 0
    assert numbers(g, quantizer)["conditional"] == pytest.approx(float(rows.sum()), rel=1e-9)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_the_empirical_error_is_that_of_the_quantized_gradient(kind):
    """Rows without a range, which BHQ puts back, have none."""
    g, quantizer = two_halves(24, 33), QUANTIZERS[kind]
    error = reference.dequantized_gradient(g, quantizer, rng=random_state(3, 0), stream=0) - g
    assert numbers(g, quantizer)["empirical"] == pytest.approx(float(error.square().sum()), rel=1e-12)  # float64


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_the_mean_of_the_empirical_error_is_the_conditional_variance(kind):
    """A z-test over 100 draws; the conditional variance is the same in all of them."""
    g = two_halves(24, 33).float()
    draws = [numbers(g, QUANTIZERS[kind], step) for step in range(100)]
    conditional = torch.tensor([d["conditional"] for d in draws], dtype=torch.float64)
    empirical = torch.tensor([d["empirical"] for d in draws], dtype=torch.float64)
    # |error| is off by a few 2⁻²⁴ of values up to 2⁸ bins, so p(1-p) by up to 1e-4 of a bin; signs average most of it out.
    assert float(conditional.max() / conditional.min()) - 1 < 1e-3
    z = float((empirical - conditional).mean() / (empirical.std() / 10))
    assert abs(z) < 5
    assert float(empirical.std()) > 0


def test_rounding_to_nearest_has_no_variance_and_half_the_error():
    """A uniform remainder's error is scale²/12; over 4096 elements its mean is within 1 % √(1/12 - 1/144)/(1/12)·5 = 7 %."""
    g = heavy(64, 64, 0.0)
    quantizer = Quantizer(6, "per_row", "min", "nearest")
    n = numbers(g, quantizer)
    assert n["conditional"] == 0
    assert n["predicted"] == pytest.approx(n["psq"] / 2, rel=1e-12)
    assert n["empirical"] == pytest.approx(n["predicted"], rel=0.07)


# ---- predicted


@pytest.mark.parametrize("recipe", ["ptq6", "psq6", "bhq6", "bhq6-tile", "auto6"])
def test_the_prediction_is_the_variance_where_bins_are_well_filled(recipe):
    """12 800 remainders are nearly uniform, those of rows of alike ranges also per tensor: within a tenth."""
    n = numbers(heavy(64, 200, 0.3), dgrad(recipe))
    assert 0.9 < n["predicted"] / n["conditional"] < 1.1


def test_ptq_has_less_variance_than_predicted_where_most_elements_are_near_its_zero():
    n = numbers(heavy(64, 200, 2.0), dgrad("ptq4"))
    assert n["conditional"] < n["predicted"] / 2


def test_what_is_predicted_of_a_quantizer_is_what_it_has_when_it_is_in_use():
    """Whichever is in use, the same is predicted of each, and of itself from its scales."""
    g = heavy(TILE + 22, 40)
    in_use = {name: numbers(g, dgrad(recipe)) for name, recipe in NAMED.items()}
    for name, n in in_use.items():
        # float64 throughout: sums of 6000 elements in two orders.
        assert n["predicted"] == pytest.approx(n[name], rel=1e-12), name
        assert all(other[name] == n[name] for other in in_use.values()), name


def test_one_large_row_is_spread_by_bhq_and_costs_ptq_every_row():
    """BHQ/PSQ is about 1/n, as math of one block has it; PTQ/PSQ is n, as every row has the large one's scale."""
    m = 128
    g = heavy(m, 400, 0.0)
    g[1:] *= 1e-6
    n = numbers(g, dgrad("psq5"))
    assert 1 / m < n["bhq"] / n["psq"] < 1.4 / m
    assert n["bhq_tile"] == n["bhq"]  # one tile
    assert 0.9 * m < n["ptq"] / n["psq"] < 1.2 * m  # of ptq the bin is wider, to have zero on the grid
    assert n["range_largest"] / n["range_median"] > 1e5


def test_wgrad_is_predicted_along_the_columns():
    """The same numbers as of dgrad of the transpose, with what folds in transposed."""
    g, multiplier = heavy(30, 50, dtype=torch.float32), torch.rand(30, 1) + 0.5
    quantizer = Quantizer(6, "per_column", "min", "stochastic")
    n = numbers(g, quantizer, product="wgrad", multiplier=multiplier)
    t = numbers(g.t(), dgrad("psq6"), multiplier=multiplier.t())
    assert n["rows"] == 50 and n["per_column"] == t["psq"] == pytest.approx(n["predicted"], rel=1e-6)
    assert {"psq", "bhq", "bhq_tile"}.isdisjoint(n)
    for name in ("norm2", "ptq", "range_smallest", "range_median", "range_largest"):
        assert n[name] == pytest.approx(t[name], rel=1e-12), name
    assert n["conditional"] == pytest.approx(t["conditional"], rel=1e-6)  # float32 errors in two orders


# ---- what auto chose


@pytest.mark.parametrize("groups", ["global", "tile"])
def test_auto_transforms_the_groups_where_the_better_prediction_is(groups):
    """Counted group by group in Python, from the ranges before and after the transform of all of them."""
    g, quantizer = heavy(200, 24, 0.6), Recipe.auto(4, groups).dgrad
    h = Householder.of(g, groups)
    before, after = ([float(r.max() - r.min()) for r in x] for x in (g, h.apply(g)))
    members: dict[int, list[int]] = {}
    for row, group in enumerate(h.group.tolist()):
        members.setdefault(group, []).append(row)
    weights = h.weights().tolist()
    better = [
        rows
        for rows in members.values()
        if sum(weights[i] * after[i] ** 2 for i in rows) < sum(before[i] ** 2 for i in rows)
    ]
    n = numbers(g, quantizer)
    assert 0 < len(better) < len(members)
    assert n["groups"] == len(members) and n["groups_transformed"] == len(better)
    assert n["rows_transformed"] == sum(map(len, better))
    assert n["largest_group"] == max(map(len, members.values()))
    assert n["predicted"] < min(n["psq"], n["bhq" if groups == "global" else "bhq_tile"])


def test_rows_that_are_all_single_are_not_transformed():
    n = numbers(heavy(2, 24), dgrad("bhq4"))
    assert (n["groups"], n["groups_transformed"], n["rows_transformed"], n["largest_group"]) == (2, 0, 0, 1)
    assert n["predicted"] == pytest.approx(n["psq"], rel=1e-12)


# ---- counts


def test_rows_without_a_range_and_rows_that_are_not_finite_are_counted():
    g = heavy(10, 12)
    g[1], g[2], g[7] = 0.0, 0.5, 0.0
    assert numbers(g, dgrad("psq4"))["zero_rows"] == 0.3
    g[3, 4], g[4, 0], g[4, 1] = math.nan, math.inf, -math.inf
    for quantizer in QUANTIZERS.values():
        n = numbers(g, quantizer)
        assert n["nonfinite_rows"] == 2 and not math.isfinite(n["norm2"])


def test_ranges_are_the_smallest_the_lower_median_and_the_largest():
    g = torch.tensor([5.0, 1.0, 9.0, 2.0])[:, None] * torch.tensor([0.25, 1.0, 0.0])
    n = numbers(g, dgrad("psq4"))
    assert [n[f"range_{name}"] for name in ("smallest", "median", "largest")] == [1, 2, 9]
    assert (n["rows"], n["norm2"]) == (4, float(g.square().sum()))


def test_zeros_are_counted_before_and_after():
    """On ptq's grid an exact zero stays one; elements below a bin join it. psq's codes have none: it puts no row on 0."""
    g = torch.tensor([[0.0, 0.0, 1e-9, 8.0], [0.0, -8.0, 3.0, 2.0]])
    assert [numbers(g, dgrad("ptq8"))[name] for name in ("zeros_before", "zeros_after")] == [0.375, 0.5]
    assert numbers(g + 1, dgrad("psq8"))["zeros_after"] == 0


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("shift", [0.0, 2.0**16])
def test_ranges_found_in_the_values_clip_nothing(kind, shift):
    """Also not where a row's ends are far from 0, on either side of a power of two, and float32 rounds the codes' ends."""
    n = numbers((heavy(dtype=torch.float32) + shift), QUANTIZERS[kind])
    assert n["clipped"] == 0


def test_an_end_that_rounds_beyond_the_last_code_is_not_clipped():
    x, rng = overshooting("min")
    codes = reference.quantize(x, dgrad("psq8"), rng=rng)
    assert float(measured("dgrad", x, None, dgrad("psq8"), codes)[0]["clipped"]) == 0


@pytest.mark.parametrize("kind", ["ptq", "ptq min/max", "psq", "psq symmetric", "e4m3"])
def test_what_lies_beyond_the_codes_is_clipped(kind):
    """Codes of a gradient cut off at its 10 largest and 10 smallest elements, told of the gradient as it was."""
    quantizer = QUANTIZERS[kind]
    g = torch.linspace(-1, 1, 400).view(1, 400).repeat(3, 1)
    cut = g[0, -11]
    codes, _ = quantized(g.clamp(-cut, cut), quantizer)
    out, _ = measured("dgrad", g, None, quantizer, codes)
    # zero="grid" widens the range by up to one bin of 63, which holds 6 of the elements 0.005 apart.
    assert float(out["clipped"]) == pytest.approx(20 / 400, rel=1e-9, abs=7 / 400 if kind == "ptq" else 0)
    assert 0 < float(out["clipped"])


def test_the_spacing_of_e4m3_is_that_of_its_numbers():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448
    gaps = numbers[1:] - numbers[:-1]
    for share in (0.0, 0.5, 0.999):
        u = (numbers[:-1] + share * gaps).float()
        assert _e4m3_spacing(u).tolist() == _e4m3_spacing(-u).tolist() == gaps.tolist()


@pytest.mark.parametrize("kind", [*QUANTIZERS, "wgrad"])
def test_nothing_is_read_on_the_host(kind):
    """On tensors without data a read would raise: what a GPU would have to be waited for."""
    product = "wgrad" if kind == "wgrad" else "dgrad"
    quantizer = Recipe.psq().wgrad if kind == "wgrad" else QUANTIZERS[kind]
    g = heavy(150, 24, dtype=torch.float32)
    codes, transform = quantized(g, quantizer)
    with FakeTensorMode() as fake:
        codes = QTensor(*(None if t is None else fake.from_tensor(t) for t in codes))
        if transform is not None:
            groups = type(transform.groups)(*map(fake.from_tensor, transform.groups))
            transform = Householder(groups, fake.from_tensor(transform.constant))
        out, nonfinite = measured(product, fake.from_tensor(g), None, quantizer, codes, transform)
    assert all(x.shape == () for x in (*out.values(), nonfinite))
