"""Laws of the points that weights can be drawn to: `fqt.targets`."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from laws import assert_same
from torch import nn
from torch.nn.utils import parametrize

import fqt
import fqt.nn
from fqt import reference
from fqt.position import NO_RANGE, Position, scale_to_points
from fqt.targets import AdaptivFloat, FakeQuantized, PowerOfTwo, adaptivfloat, power_of_two

FORMATS = [(bits, e) for bits in range(2, 9) for e in range(1, bits)]


def adaptivfloat_points(bits: int, exponent_bits: int, top: int) -> torch.Tensor:
    """The format's points in float64, ascending, written from its codes: sign, exponent field, mantissa field."""
    mantissas = 2 ** (bits - 1 - exponent_bits)
    bias = top - (2**exponent_bits - 1)
    codes = itertools.product(range(2**exponent_bits), range(mantissas))
    positive = [2.0 ** (bias + e) * (1 + m / mantissas) for e, m in codes if (e, m) != (0, 0)]
    return torch.tensor(sorted([-v for v in positive] + [0.0] + positive), dtype=torch.float64)


def power_points(bits: int, top: int) -> torch.Tensor:
    positive = [2.0 ** (top - k) for k in range(2 ** (bits - 1) - 1)]
    return torch.tensor(sorted([-v for v in positive] + [0.0] + positive), dtype=torch.float64)


def trying(points: torch.Tensor, largest: float) -> torch.Tensor:
    """float32 weights whose largest magnitude is `largest`: the points, just beside and at their midpoints, and others."""
    points = points[(points.abs() >= 2.0**-120) | (points == 0)].float()
    middle = ((points[1:].double() + points[:-1].double()) / 2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf)]
    free = torch.empty(300).uniform_(-largest, largest)
    logarithmic = torch.sign(free) * largest * 2.0 ** -torch.empty(300).uniform_(0, 20)
    w = torch.cat([points, middle, *beside, free, logarithmic, torch.tensor([largest])])
    return w[w.abs() <= largest]


def assert_nearest(w: torch.Tensor, actual: torch.Tensor, points: torch.Tensor) -> None:
    """Every value of `actual` is one of the points, and none of them is nearer to the weight."""
    assert torch.isin(actual.double(), points).all()
    best = (w.double()[:, None] - points).abs().amin(1)
    assert_same((w.double() - actual.double()).abs(), best, "distance to the nearest point")


# ---- floating-point grids


@pytest.mark.parametrize("bits, exponent_bits", FORMATS)
def test_adaptivfloat_is_the_nearest_of_exactly_its_points(bits, exponent_bits):
    for top, largest in ((0, 1.0), (-3, 2.0**-3 * 1.37), (5, 2.0**6 * (1 - 2.0**-20))):  # the last is beyond all points
        points = adaptivfloat_points(bits, exponent_bits, top)
        assert len(points) == 2 * (2 ** (bits - 1) - 1) + 1
        w = trying(points, largest)
        actual = adaptivfloat(w, bits, exponent_bits)
        assert actual.dtype == torch.float32 and actual.shape == w.shape
        assert_nearest(w, actual, points)
        reached = torch.isin(points, actual.double()) | (points.abs() > largest) | (points.abs() < 2.0**-120)
        assert reached[points != 0].all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_power_of_two_is_the_nearest_of_exactly_its_points(bits):
    for top, largest in ((0, 1.0), (3, 8 * 1.4999), (3, 6.0), (-7, 2.0**-7 * 1.2)):
        points = power_points(bits, top)
        assert len(points) == 2 * (2 ** (bits - 1) - 1) + 1
        w = trying(points, largest)
        assert_nearest(w, power_of_two(w, bits), points)


def test_ties_of_adaptivfloat_go_to_the_even_mantissa_and_at_the_smallest_to_zero():
    # <4, 2> with E = 0: one mantissa bit, exponents -3 to 0, so ± 0.1875, 0.25, 0.375, 0.5, 0.75, 1, 1.5.
    w = torch.tensor([1.0, 1.25, 0.875, 0.625, -0.4375, 0.21875, 0.09375, -0.09375])
    assert adaptivfloat(w, 4, 2).tolist() == [1.0, 1.0, 1.0, 0.5, -0.5, 0.25, 0.0, 0.0]
    assert adaptivfloat(torch.tensor([1.0, 0.09375001]), 4, 2)[1] == 0.1875


def test_ties_of_powers_go_to_the_larger_and_at_the_smallest_to_zero():
    # 3 bits, E = 0: 1, 1/2, 1/4.
    w = torch.tensor([1.0, 0.75, -0.375, 0.125, -0.125, 0.12500001])
    assert power_of_two(w, 3).tolist() == [1.0, 1.0, -0.5, 0.0, 0.0, 0.25]
    assert power_of_two(torch.tensor([1.5, 0.9]), 3).tolist() == [2.0, 1.0]  # 1.5 is nearest to 2 as much as to 1
    assert power_of_two(torch.tensor([1.0, 0.3, -0.6]), 2).tolist() == [1.0, 0.0, -1.0]


BOTH = [(f"adaptivfloat{b}e{e}", AdaptivFloat(b, e)) for b, e in ((4, 2), (8, 3), (8, 7))] + [("po2", PowerOfTwo(4))]
both = pytest.mark.parametrize("target", [t for _, t in BOTH], ids=[name for name, _ in BOTH])


@both
@pytest.mark.parametrize("k", [-60, -1, 3, 90])
def test_points_scale_with_weights_by_powers_of_two(target, k):
    w = torch.randn(200)
    assert_same(target(w * 2.0**k), target(w) * 2.0**k)


@both
def test_points_are_their_own_points(target):
    x = target(torch.randn(200))
    assert_same(target(x), x)


@both
def test_points_are_odd(target):
    w = torch.randn(200)
    assert_same(target(-w), -target(w))


@both
def test_weights_that_are_not_finite_leave_the_others_points(target):
    w = torch.randn(3, 40)
    bad = w.clone()
    bad[0, 0], bad[1, 1], bad[2, 2] = math.nan, math.inf, -math.inf
    w[0, 0] = w[1, 1] = w[2, 2] = 0
    actual = target(bad)
    assert actual[0, 0].isnan() and actual[1, 1] == -actual[2, 2] == actual.nan_to_num().max() < math.inf
    actual[0, 0] = actual[1, 1] = actual[2, 2] = 0
    assert_same(actual, target(w))


@both
def test_empty_zero_scalar_and_tiny_tensors(target):
    assert target(torch.empty(0, 3)).shape == (0, 3)
    assert_same(target(torch.zeros(4, 2)), torch.zeros(4, 2))
    assert_same(target(torch.tensor(-0.5)), torch.tensor(-0.5))
    tiny = torch.full((3,), NO_RANGE / 2)
    assert_same(target(tiny), tiny)
    assert target(torch.tensor([1.1 * NO_RANGE]))[0] in (NO_RANGE, 1.125 * NO_RANGE)
    huge = target(torch.tensor([3.4e38, -1.0]))
    assert huge[0] >= 2.0**127 and huge.isfinite().all()


@both
def test_dtypes_are_computed_in_the_compute_dtype(target):
    w = torch.randn(100, dtype=torch.bfloat16)
    assert_same(target(w), target(w.float()))
    assert target(w.double()).dtype == torch.float64
    assert_same(target(w.double()).float(), target(w))
    strided = torch.randn(12, 10).t()[::2]
    assert_same(target(strided), target(strided.contiguous()))
    p = nn.Parameter(torch.randn(4))
    assert not target(p).requires_grad


def test_targets_compare_pickle_and_show_their_bits():
    for target in (AdaptivFloat(5, 3), PowerOfTwo(3)):
        again = pickle.loads(pickle.dumps(target))
        assert again == target and hash(again) == hash(target) and again != type(target)()
        assert eval(repr(target)) == target
    assert_same(AdaptivFloat(5, 3)(torch.arange(9.0)), adaptivfloat(torch.arange(9.0), 5, 3))
    assert_same(PowerOfTwo(3)(torch.arange(9.0)), power_of_two(torch.arange(9.0), 3))


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_bits_out_of_range_are_refused(bits):
    for call in (AdaptivFloat, PowerOfTwo):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            call(bits)
    for call in (adaptivfloat, power_of_two):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            call(torch.ones(2), bits)


@pytest.mark.parametrize("exponent_bits", [0, 4, 2.0, True])
def test_exponent_bits_out_of_range_are_refused(exponent_bits):
    with pytest.raises(ValueError, match="exponent_bits must be an integer from 1 to bits - 1 = 3"):
        AdaptivFloat(4, exponent_bits)


# ---- fake-quantized weights


def quantized_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two fake-quantized layers, by LSQ and by a recipe, and one that is not."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), fqt.nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    fqt.lsq_(model, bits=3, filter_fn=lambda _, name: name == "0", first_last_bits=3)
    return model


def test_of_a_weight_under_lsq_it_is_what_the_layer_computes_with():
    model = quantized_model()
    target = FakeQuantized(model)
    assert_same(target(model[0].parametrizations.weight.original), model[0].weight)
    conv = nn.Sequential(nn.Conv2d(3, 4, 2))
    fqt.lsq_(conv, first_last_bits=4, per_channel=True)
    assert_same(FakeQuantized(conv)(conv[0].parametrizations.weight.original), conv[0].weight)


@pytest.mark.parametrize("recipe", ["int8", "qat8", "psq4", "fp8"])
def test_of_a_quantized_layer_it_is_the_dequantized_codes(recipe):
    layer = fqt.nn.Linear(16, 8, recipe=recipe)
    expected = reference.quantize(layer.weight.detach(), layer.recipe.w).dequantize()
    assert_same(FakeQuantized(layer)(layer.weight), expected)
    with torch.no_grad():
        layer.weight.mul_(1.3)
    expected = reference.quantize(layer.weight.detach(), layer.recipe.w).dequantize()
    assert_same(FakeQuantized(layer)(layer.weight), expected)


def test_in_bfloat16_it_is_not_rounded_to_bfloat16():
    model = quantized_model(torch.bfloat16)
    for w in (model[0].parametrizations.weight.original, model[2].weight):
        points = FakeQuantized(model)(w)
        assert points.dtype == torch.float32 and not torch.equal(points, points.bfloat16().float())


def test_what_no_layer_quantizes_takes_plain_steps():
    model = quantized_model()
    target = FakeQuantized(model)
    drawn = [name for name, p in model.named_parameters() if target(p) is not None]
    assert drawn == ["0.parametrizations.weight.original", "2.weight"]
    fqt.hold_int8_(model)
    assert target(model[2].weight) is None
    fqt.release_int8_(model)
    assert target(model[2].weight) is not None
    model[2].recipe = "exact"
    assert target(model[2].weight) is None
    parametrize.register_parametrization(model[3], "weight", nn.Tanh())
    assert target(model[3].parametrizations.weight.original) is None


def test_changes_of_the_model_are_followed():
    model = quantized_model()
    target = FakeQuantized(model)
    old = model[2].weight
    target(old)
    model[2].weight = nn.Parameter(torch.randn(4, 5))
    assert target(model[2].weight) is not None
    with pytest.raises(ValueError, match=r"shape \(4, 5\) is not one of the model"):
        target(old)
    w = model[3].weight
    assert target(w) is None
    fqt.lsq_(model, filter_fn=lambda _, name: name == "3")
    assert_same(target(w), model[3].weight)
    fqt.remove_lsq_(model)
    assert target(w) is None
    layer = model.pop(2)
    del model[2]
    model[1] = nn.Sequential(layer)  # elsewhere, and there is no place of its old name
    assert target(layer.weight) is not None
    fqt.dequantize_(model)
    assert target(layer.weight) is None


def test_copies_of_a_target_and_its_model_belong_together_and_pickles_have_no_model():
    model = quantized_model()
    target = FakeQuantized(model)
    assert copy.deepcopy({"target": target})["target"] is target
    copied, other = copy.deepcopy((model, target))
    assert other.model is copied and other(copied[2].weight) is not None
    lone = copy.deepcopy(model)
    with pytest.raises(ValueError, match="not one of the model"):
        target(lone[2].weight)
    loaded = pickle.loads(pickle.dumps(target))
    assert (repr(target), repr(loaded)) == ("FakeQuantized(Sequential)", "FakeQuantized()")
    with pytest.raises(ValueError, match="without its model"):
        loaded(model[2].weight)
    loaded.model = model
    assert_same(loaded(model[2].weight), target(model[2].weight))


def test_fakequantized_takes_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        FakeQuantized([nn.Linear(2, 2)])


def test_the_scale_is_the_distance_to_the_fake_quantized_weight():
    model = quantized_model()
    w = model[0].parametrizations.weight.original
    target = FakeQuantized(model)
    s = scale_to_points(w, Position(target, scale=3.0), target(w))
    assert_same(s, ((w - model[0].weight).abs() * 3.0).detach())


def test_a_model_is_searched_once_for_all_of_its_parameters(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    fqt.lsq_(model, bits=4)
    target, searches = FakeQuantized(model), []
    search = model.named_modules
    monkeypatch.setattr(model, "named_modules", lambda *a, **k: (searches.append(1), search(*a, **k))[1])
    for _ in range(2):
        found = {name: target(p) is not None for name, p in model.named_parameters()}
    quantized = {name for name, there in found.items() if there}
    assert quantized == {f"{i}.parametrizations.weight.original" for i in (0, 2)}
    assert len(searches) - 2 == 1  # named_parameters searches as well
