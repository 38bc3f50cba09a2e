"""Laws of weights that are held in int8: the layer's arithmetic, what torch does with the tensor, and their models."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fqt
from fqt import reference
from fqt.int8_weight import HELD, Int8Weight, hold_int8_, release_int8_
from fqt.recipe import Quantizer, Recipe

GRID = Quantizer(8, "per_tensor", "grid")
# X with an offset, so that sums of W's codes are needed.
AFFINE = Recipe(x=GRID, w=HELD, dgrad=Quantizer(8, "per_tensor", "grid", "stochastic"))


def network(recipe="int8", dtype=torch.float32):
    model = nn.Sequential(nn.Linear(12, 20, dtype=dtype), nn.ReLU(), nn.Linear(20, 5, dtype=dtype))
    fqt.quantize_(model, recipe)
    return model


def weight(n=6, k=9, dtype=torch.float32):
    return Int8Weight.of(torch.randn(n, k).to(dtype), torch.tensor([77, 3]))


def same_codes(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("q", "qt", "scale", "rng"))


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["int8", AFFINE])
def test_a_layer_computes_what_one_with_the_dequantized_weight_does(recipe, dtype):
    """Scales that are powers of two and a code of 127 in every row: quantizing the float weight finds the same codes."""
    fqt.manual_seed(1)
    held, plain = nn.Linear(24, 16, dtype=dtype), nn.Linear(24, 16, dtype=dtype)
    for layer in (held, plain):
        fqt.quantize_(layer, recipe)
    hold_int8_(held)
    w = held.weight
    with torch.no_grad():
        w.q.copy_(torch.randint(-127, 128, w.shape))
        w.q[:, 3] = 127
        w.qt.copy_(w.q.t())
        w.scale.copy_(2.0 ** torch.randint(-9, -4, (16, 1)))
        plain.weight.copy_(w)
        plain.bias.copy_(held.bias)
    x = torch.randn(2, 5, 24, dtype=dtype)
    results = []
    for layer in (held, plain):
        fqt.set_step(4)
        z = x.clone().requires_grad_()
        y = layer(z)
        y.square().sum().backward()
        results.append((y, z.grad, layer.weight.grad, layer.bias.grad))
    for got, want in zip(*results, strict=True):
        assert type(got) is torch.Tensor and got.dtype == dtype and torch.equal(got, want)


class _FloatsOfSize(TorchDispatchMode):
    """The operators whose results are float tensors of so many elements in memory of their own."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            # Of an expanded tensor only what lies in memory counts.
            if (
                func is not torch.ops.aten.detach.default
                and type(t) is torch.Tensor
                and t.is_floating_point()
                and t.untyped_storage().nbytes() >= 2 * self.numel
            ):
                self.found.append(func)
        return out


def test_neither_forward_nor_backward_makes_a_float_copy_of_the_weight(monkeypatch):
    layer = nn.Linear(64, 48)
    fqt.quantize_(layer, "int8")
    hold_int8_(layer)
    monkeypatch.setattr(Int8Weight, "dequantize", None)
    monkeypatch.setattr(reference, "quantize", _only(reference.quantize, lambda x: x.shape != (48, 64)))
    with _FloatsOfSize(48 * 64) as floats:
        y = layer(torch.randn(3, 64, requires_grad=True))
        assert not floats.found
        y.sum().backward()
    assert floats.found == [torch.ops.fqt.linear_backward.default]  # the gradient, and no other


def _only(quantize, allowed):
    def checked(x, *args, **kwargs):
        assert allowed(x), "the weight is quantized again"
        return quantize(x, *args, **kwargs)

    return checked


def test_gradients_accumulate_with_and_without_the_kernels_addition():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(12, 8)
        fqt.quantize_(layer, "int8", fuse_grad_accumulation=fused)
        hold_int8_(layer)
        fqt.set_step(0)
        for x in torch.randn(2, 4, 12):
            layer(x).sum().backward()
        results.append(layer.weight.grad)
        assert type(results[-1]) is torch.Tensor
    assert torch.allclose(*results, rtol=0, atol=float(results[0].abs().max()) * 2.0**-22)


def test_a_compiled_layer_gives_the_same_bits():
    layer = nn.Linear(12, 8)
    fqt.quantize_(layer, "int8")
    hold_int8_(layer)
    x, results = torch.randn(4, 12), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        fqt.set_step(2)
        layer.zero_grad()
        y = run(x)
        y.sum().backward()
        results.append((y, layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- the tensor


def test_any_other_operator_is_given_the_product_of_codes_and_scales():
    w, x = weight().requires_grad_(), torch.randn(4, 9)
    dense = w.detach().dequantize().requires_grad_()
    for v in (w, dense):
        F.linear(x, v).square().sum().backward()
    assert torch.equal(w.grad, dense.grad) and type(w.grad) is torch.Tensor
    assert torch.equal(w.detach() + 1, dense.detach() + 1)
    assert torch.equal(dense.detach(), w.q.float() * w.scale)
    assert torch.equal(w.double(), dense.detach().double())
    assert torch.zeros_like(w).shape == w.shape and type(torch.zeros_like(w)) is torch.Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1.0),
        lambda w: w.mul_(0.5),
        lambda w: w.uniform_(),
        lambda w: w.zero_(),
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: torch.add(w, 1.0, out=w),
        lambda w: w.__setitem__(0, 1.0),
    ],
)
def test_no_write_is_lost_in_silence(write):
    w = weight()
    before = copy.deepcopy(w)
    with pytest.raises(TypeError, match="Int8Weight"):
        write(w)
    assert same_codes(w, before)


def test_torchs_own_optimizers_are_refused():
    model = network()
    hold_int8_(model)
    model(torch.randn(3, 12)).sum().backward()
    with pytest.raises(TypeError, match="optimizers"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_copies_of_floats_are_rounded_to_nearest_and_of_codes_are_exact():
    w, x, other = weight(), torch.randn(6, 9), weight()
    key, storage = w.rng.clone(), w.q.data_ptr()
    want = reference.quantize(x, HELD, cols=True)
    w.copy_(x)
    assert torch.equal(w.q, want.q) and torch.equal(w.qt, want.qt) and torch.equal(w.scale, want.scale)
    assert torch.equal(w.rng, key) and w.q.data_ptr() == storage
    w.copy_(other)
    assert same_codes(w, other) and w.q.data_ptr() == storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copying_a_weights_own_values_changes_nothing(dtype):
    """Also where a step has left no code of 127, so that the scale is not that of the row's range; other rows do change."""
    w = weight(dtype=dtype)
    w.q.clamp_(-90, 90)
    w.qt.copy_(w.q.t())
    before, values = copy.deepcopy(w), w.dequantize()
    w.copy_(values)
    assert same_codes(w, before)
    values[2, 1] *= 2
    w.copy_(values)
    others = torch.arange(6) != 2
    assert torch.equal(w.q[others], before.q[others]) and torch.equal(w.scale[others], before.scale[others])
    assert torch.equal(w.qt, w.q.t()) and int(w.q[2].abs().max()) == 127


def test_conversions_keep_the_codes():
    w = nn.Parameter(weight(), requires_grad=False)
    assert isinstance(w, nn.Parameter) and isinstance(w, Int8Weight)
    for other in (w.detach(), w.clone(), copy.deepcopy(w), w.to(torch.bfloat16), w.to("cpu", copy=True)):
        assert isinstance(other, Int8Weight) and same_codes(w, other)
    half = w.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.dequantize(), w.dequantize().bfloat16())
    assert w.clone().q.data_ptr() != w.q.data_ptr() == w.detach().q.data_ptr()
    inner, dtype = w.__tensor_flatten__()
    assert same_codes(Int8Weight.__tensor_unflatten__({n: getattr(w, n) for n in inner}, dtype, None, None), w)


# ---- models


def test_state_dicts_go_both_ways():
    held, plain, again = network(), network(), network()
    hold_int8_(held)
    hold_int8_(again)
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    plain.load_state_dict(saved)
    assert type(plain[0].weight) is nn.Parameter and torch.equal(plain[0].weight, held[0].weight.dequantize())
    again.load_state_dict(saved)
    assert same_codes(again[0].weight, held[0].weight)
    again[0].weight.rng.add_(1)
    again.load_state_dict(
        plain.state_dict()
    )  # rounded to nearest: at most half a code and the scale's own rounding off
    error = (again[0].weight.dequantize() - plain[0].weight).abs()
    assert (error <= again[0].weight.scale * (0.5 + 2.0**-15)).all()
    assert int(again[0].weight.rng[1]) == 1


def test_a_model_moves_copies_and_pickles_with_its_codes():
    model = network()
    hold_int8_(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(other[0].weight, nn.Parameter) and same_codes(other[0].weight, model[0].weight)
        assert other[0].weight.q.data_ptr() != model[0].weight.q.data_ptr()
    x = torch.randn(3, 12)
    moved = copy.deepcopy(model).bfloat16()
    assert moved(x.bfloat16()).dtype == torch.bfloat16 and same_codes(moved[0].weight, model[0].weight)
    with pytest.raises(TypeError, match="cast"):
        moved(x)


def test_the_report_says_what_is_held_and_why_the_rest_is_not():
    model = nn.ModuleDict(
        {name: nn.Linear(8, 8) for name in ("a", "per_tensor", "plain", "float16", "left", "meta", "tied")}
    )
    model["float16"].half()
    model["meta"].to("meta")
    model["embedding"] = nn.Embedding(8, 8)
    model["tied"].weight = model["embedding"].weight
    fqt.quantize_(
        model, {"a": "int8", "per_tensor": "psq8", "float16": "int8", "left": "int8", "tied": "int8", "meta": "int8"}
    )
    before = model["a"].weight
    report = hold_int8_(model, filter_fn=lambda module, name: name != "left")
    assert report.held == ("a",) and isinstance(model["a"].weight, Int8Weight)
    reasons = {
        "per_tensor": "psq8",
        "plain": "quantize_",
        "float16": "not float32",
        "left": "filter_fn",
        "tied": "Embedding",
        "meta": "meta device",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, word in reasons.items():
        assert word in report.skipped[name] and type(model[name].weight) is nn.Parameter
    assert (report.bytes_before, report.bytes_after) == (4 * 64, 2 * 64 + 4 * 8 + 16)
    assert "a: held" in str(report) and "Embedding" in str(report)
    want = reference.quantize(before.detach(), HELD)
    assert torch.equal(model["a"].weight.q, want.q) and torch.equal(model["a"].weight.scale, want.scale)
    assert int(model["a"].weight.rng[0]) == fqt.rng.layer_key("a")
    assert hold_int8_(model, filter_fn=lambda module, name: name != "left").held == ("a",)  # again: nothing changes


@pytest.mark.parametrize(("recipe", "word"), [("psq8", "psq8"), ("fp8", "fp8")])
def test_holding_nothing_is_an_error(recipe, word):
    with pytest.raises(ValueError, match=word):
        hold_int8_(network(recipe))
    with pytest.raises(ValueError, match="no linear layers"):
        hold_int8_(nn.ReLU())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        hold_int8_(torch.ones(2))


def test_shared_weights_stay_shared_and_come_back():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, bias=False), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    fqt.quantize_(model, "int8")
    model["a"].weight.requires_grad_(False)
    model["c"].weight.grad = torch.ones(8, 8)
    assert hold_int8_(model).held == ("a", "b", "c")
    assert model["a"].weight is model["b"].weight and not model["a"].weight.requires_grad
    assert torch.equal(model["c"].weight.grad, torch.ones(8, 8))
    values = model["a"].weight.dequantize()
    assert release_int8_(model) is model
    assert model["a"].weight is model["b"].weight and type(model["a"].weight) is nn.Parameter
    assert torch.equal(model["a"].weight, values) and not model["a"].weight.requires_grad
    assert torch.equal(model["c"].weight.grad, torch.ones(8, 8))


def test_another_recipe_still_computes_from_the_values():
    model = network()
    hold_int8_(model)
    x, plain = torch.randn(3, 12), copy.deepcopy(model)
    release_int8_(plain)
    for recipe in ("psq8", "exact"):
        results = []
        for m in (model, plain):
            fqt.quantize_(m, recipe)
            fqt.set_step(1)
            m.zero_grad()
            y = m(x)
            y.sum().backward()
            results.append((y, m[0].weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
