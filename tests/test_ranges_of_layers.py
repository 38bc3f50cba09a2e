"""Layers with ranges that are handed over, bounded or delayed; and codes of values beyond their range."""

import laws
import pytest
import torch

import fqt
from fqt import ranges, reference
from fqt.recipe import Quantizer, Recipe


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_is_far_beyond_its_range_clips_to_its_end(rounding, bits, device):
    """Fixed point has 15 bits before the point: beyond 2¹⁵ bins, and at infinity, a sign would turn."""
    from fqt_kernels.quantize import quantize

    far = torch.tensor([1.0, 3.0, 100.0, 300.0, 1e6, 1e30, float("inf")])
    x = torch.cat([far, -far, torch.tensor([0.0, float("nan")])])[None].repeat(4, 1).to(device)
    absmax = torch.ones(4, device=device).view(torch.int32)
    rng = laws.random_state(device=device) if rounding == "stochastic" else None
    codes = reference.quantize(x, Quantizer(bits, "per_row", "symmetric", rounding), rng=rng, row_absmax=absmax).q
    top = 2 ** (bits - 1) - 1
    assert codes.tolist() == [[top] * 7 + [-top] * 7 + [0, 0]] * 4
    made = quantize(x, bits=bits, granularity="per_row", zero="symmetric", rng=rng, stats=absmax[None, None])
    laws.assert_same(made[0], codes)


@pytest.mark.parametrize("fields", [dict(zero="min"), dict(zero="grid"), dict(granularity="per_column"),
                                    dict(granularity="per_row", householder=True)])  # fmt: skip
@pytest.mark.parametrize("range", ["bound", "delayed"])
def test_ranges_that_are_not_found_go_with_symmetric_rows_and_tensors(fields, range):
    with pytest.raises(ValueError, match="range"):
        Quantizer(**{"granularity": "per_tensor", "zero": "symmetric", **fields}, range=range)
    with pytest.raises(ValueError, match="range"):
        Recipe(x=Quantizer(range=range), w=Quantizer())


def symmetric_recipe(range="exact", granularity="per_tensor"):
    x, g = Quantizer(8, granularity), Quantizer(8, "per_row", rounding="stochastic", range=range)
    h = Quantizer(8, rounding="stochastic", range="delayed" if range == "delayed" else "exact")
    return Recipe(x=x, w=x, dgrad=g, wgrad=h)


def gradients(recipe, enabled=True, steps=2):
    torch.manual_seed(0), fqt.manual_seed(0)
    ranges.handover.clear()
    ranges.handover.enabled = enabled
    try:
        sizes = [(12, 16), (16, 20), (20, 8), (8, 4)]
        model = torch.nn.Sequential(*[torch.nn.Linear(*s) for s in sizes])
        fqt.quantize_(model, recipe)
        for _ in range(steps):
            model(torch.randn(2, 5, 12)).square().sum().backward()
    finally:
        ranges.handover.enabled = True
    return [p.grad for p in model.parameters()]


def test_layers_hand_over_and_their_gradients_are_the_same_to_the_bit():
    given = gradients(symmetric_recipe())
    assert ranges.handover.counts == {"none": 2, "left": 6, "taken": 6}
    for a, b, c in zip(given, gradients(symmetric_recipe(), False), gradients(symmetric_recipe("bound")), strict=True):
        laws.assert_same(a, b)
        laws.assert_same(c, b)  # with nothing folded, the bound is the magnitude


@pytest.mark.parametrize("range", ["bound", "delayed"])
def test_layers_with_other_ranges_are_close_to_exact_ones(range):
    """8 bits: each product's relative error is a few times 2⁻⁷ at most, with bounds up to 4 times too wide."""
    recipe = symmetric_recipe(range, "per_row" if range == "bound" else "per_tensor")
    other, exact = gradients(recipe), gradients(symmetric_recipe("exact", recipe.x.granularity))
    for a, b in zip(other, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
