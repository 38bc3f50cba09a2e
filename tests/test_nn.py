"""`fqt.nn.Linear`: what it computes, what it keeps, and that it is an nn.Linear in every other respect."""

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from laws import assert_unbiased
from torch import nn

import fqt
import fqt.nn
from fqt import ops, products, reference
from fqt.qtensor import QTensor
from fqt.recipe import Quantizer, Recipe

QUANTIZED = ("qat8", "int8", "fp8", "ptq8", "psq8", "bhq8", "psq3", "bhq2", "auto4", "bhq3-tile")
CUSTOM = Recipe(
    x=Quantizer(8, "per_row"),
    w=Quantizer(6, "per_row"),
    dgrad=Quantizer(5, "per_row", "min", "stochastic", householder=True),
    wgrad=Quantizer(7, "per_column", "min", "stochastic"),
)


@pytest.fixture(autouse=True)
def _on_device(device):
    with torch.device(device):
        yield


def layer(recipe, n=24, k=40, dtype=torch.float64, bias=True):
    return fqt.nn.Linear(k, n, bias=bias, dtype=dtype, recipe=recipe)


def gradients(module, x, dy):
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, module.weight.grad.clone(), None if module.bias is None else module.bias.grad.clone()


def quantized_operands(module, x):
    """X and W as the layer quantizes them, by the reference."""
    r = module.recipe
    return reference.quantize(x.detach(), r.x), reference.quantize(module.weight.detach(), r.w)


# ---- values


@pytest.mark.parametrize("recipe", [*QUANTIZED, CUSTOM], ids=str)
def test_the_three_products_equal_their_definition(recipe):
    """Integer products with affine epilogues against dequantized float64 products of the same codes."""
    module = layer(recipe)
    x = torch.randn(33, 40, dtype=torch.float64)
    dy = torch.randn(33, 24, dtype=torch.float64) * torch.randn(33, 1, dtype=torch.float64).exp()
    dy[3], dy[5] = 0.0, 0.7  # rows of range zero, which BHQ gives back exactly
    fqt.set_step(11)
    state = module._fqt_rng.clone()
    y, dx, dw, db = gradients(module, x, dy)
    xq, wq = quantized_operands(module, x)
    r = module.recipe
    # Both sides are float64 sums of at most 40 products: 1e-12 of the largest is thousands of roundings.
    close = dict(rtol=0, atol=1e-12 * float(dy.abs().max()) * 100)
    torch.testing.assert_close(y, reference.fprop(xq, wq, module.bias.detach()), **close)
    torch.testing.assert_close(dx, reference.dgrad(dy, wq, r, **_random(r.dgrad, state, fqt.gradients.DGRAD)), **close)
    torch.testing.assert_close(dw, reference.wgrad(dy, xq, r, **_random(r.wgrad, state, fqt.gradients.WGRAD)), **close)
    torch.testing.assert_close(db, dy.sum(0), **close)


def _random(quantizer, state, stream):
    return {} if quantizer is None else {"rng": state, "stream": stream}


@pytest.mark.parametrize("recipe", ["int8", "fp8", "ptq4", "psq2", "bhq3", CUSTOM], ids=str)
def test_gradients_are_unbiased_estimates_of_qat(recipe):
    """E[gradient] is the gradient of the QAT layer, differentiated in float64 by torch (straight-through)."""
    module = layer(recipe)
    x = torch.randn(12, 40, dtype=torch.float64)
    dy = torch.randn(12, 24, dtype=torch.float64) * torch.randn(12, 1, dtype=torch.float64).exp()
    xq, wq = quantized_operands(module, x)
    xd, wd = xq.dequantize().requires_grad_(), wq.dequantize().requires_grad_()
    nn.functional.linear(xd, wd, module.bias.detach()).backward(dy)
    draws = [gradients(module, x, dy) for _ in range(400)]
    assert_unbiased(lambda i: draws[i][1], xd.grad, 400)
    assert_unbiased(lambda i: draws[i][2], wd.grad, 400)
    assert len({draw[2].sum().item() for draw in draws}) > 390  # fresh bits in every backward pass


def test_qat_gradients_are_exact():
    module = layer("qat8")
    x, dy = torch.randn(12, 40, dtype=torch.float64), torch.randn(12, 24, dtype=torch.float64)
    xq, wq = quantized_operands(module, x)
    _, dx, dw, _ = gradients(module, x, dy)
    torch.testing.assert_close(dx, dy @ wq.dequantize(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, dy.t() @ xq.dequantize(), rtol=1e-12, atol=1e-12)


def test_exact_is_nn_linear_bit_for_bit():
    module, plain = layer("exact", dtype=torch.float32), nn.Linear(40, 24)
    plain.load_state_dict(module.state_dict())
    x, dy = torch.randn(5, 40), torch.randn(5, 24)
    for a, b in zip(gradients(module, x, dy), gradients(plain, x, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["int8", "ptq5", "psq3", "bhq4", "auto5", CUSTOM], ids=str)
def test_kernels_and_reference_give_the_same_layer(recipe):
    """Forward and backward through the kernels (interpreter or GPU) and through plain torch: the same bits in float32.

    But for the bias gradient, a sum of 21 floats in another order: each addition is off by 2⁻²⁴ of a partial sum.
    """
    module = layer(recipe, n=33, k=50, dtype=torch.float32)
    x, dy = torch.randn(21, 50), torch.randn(21, 33)
    with fqt.backend("reference"):
        fqt.set_step(3)
        expected = gradients(module, x, dy)
    fqt.invalidate_(module)
    with fqt.backend("triton"):
        fqt.set_step(3)
        got = gradients(module, x, dy)
    for name, a, b in zip(("y", "dx", "dw"), expected[:3], got[:3], strict=True):
        assert torch.equal(a, b), f"{name}: {float((a - b).abs().max())}"
    assert bool(((expected[3] - got[3]).abs() <= 2 * 21 * 2.0**-24 * dy.abs().sum(0)).all())


def test_groups_in_tiles_give_the_same_layer_to_float32_accuracy():
    """The inverse in the product's epilogue adds up a group in an order of its own.

    Rows of one size make groups of two and three with 1 ≤ s ≤ 2: z is at most √3 of the largest dX, and a dozen sums and
    products are each off by 2⁻²⁴ of it. Two tiles, of which the second is short.
    """
    module = layer("bhq6-tile", n=33, k=50, dtype=torch.float32)
    x, dy = torch.randn(150, 50), torch.randn(150, 33)
    found = []
    for backend in ("reference", "triton"):
        fqt.invalidate_(module)
        with fqt.backend(backend):
            fqt.set_step(3)
            found.append(gradients(module, x, dy))
    (y, dx, dw, _), (y2, dx2, dw2, _) = found
    assert torch.equal(y, y2) and torch.equal(dw, dw2)
    assert float((dx - dx2).abs().max()) <= 24 * 2.0**-24 * float(dx.abs().max())
    assert not torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 5), (2, 0, 4), (2, 3, 4)])
@pytest.mark.parametrize("recipe", ["int8", "psq8", "bhq8"])
def test_any_leading_shape(lead, recipe):
    module = layer(recipe, dtype=torch.float32)
    x = torch.randn(*lead, 40, requires_grad=True)
    y = module(x)
    assert y.shape == (*lead, 24)
    y.sum().backward()
    assert x.grad.shape == x.shape and module.weight.grad.shape == (24, 40)
    assert torch.isfinite(module.weight.grad).all()


def test_strides_do_not_matter():
    module = layer("psq8", dtype=torch.float32)
    x, dy = torch.randn(6, 40), torch.randn(6, 24)
    frame = torch.full((12, 81), float("nan"))
    frame[::2, 1::2] = x
    fqt.set_step(0)
    expected = gradients(module, x, dy)
    for strided in (frame[::2, 1::2], x.t().contiguous().t()):
        fqt.set_step(0)
        got = gradients(module, strided, dy.t().contiguous().t())
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    fqt.set_step(0)
    ones = gradients(module, x, torch.ones(6, 24))
    fqt.set_step(0)
    expanded = gradients(module, x, torch.ones(()).expand(6, 24))  # what y.sum() sends back
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))


# ---- dtypes and autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_nn_linear(dtype):
    module = layer("int8", dtype=dtype)
    y, dx, dw, db = gradients(module, torch.randn(4, 40, dtype=dtype), torch.randn(4, 24, dtype=dtype))
    assert {t.dtype for t in (y, dx, dw, db)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["int8", "psq8", "bhq8", "qat8"])
def test_autocast_gives_the_dtypes_of_nn_linear_and_exact_integer_products(recipe, dtype, device):
    module, plain = layer(recipe, k=3000, dtype=torch.float32), nn.Linear(3000, 24)
    x = torch.randn(4, 3000, dtype=dtype, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y, y_plain = module(x), plain(x)
        y.sum().backward()
    assert (y.dtype, x.grad.dtype, module.weight.grad.dtype) == (y_plain.dtype, dtype, torch.float32)
    xq, wq = quantized_operands(module, x)
    exact = reference.fprop(xq, wq, module.bias.detach())
    # One rounding to bfloat16 (2⁻⁹ relative), and float32 sums below it. bfloat16 products would be off by 2⁻⁸·√3000.
    torch.testing.assert_close(y.float(), exact, rtol=2.0**-8, atol=1e-5 * float(exact.abs().max()))


# ---- what is kept for backward


def saved_tensors(module, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    return kept


@pytest.mark.parametrize("recipe", ["qat8", "int8", "psq8", "bhq8"])
def test_only_codes_of_the_input_are_saved(recipe):
    module = layer(recipe, n=64, k=128, dtype=torch.float32)
    x = torch.randn(256, 128, requires_grad=True)
    kept = saved_tensors(module, x)
    large = [t for t in kept if t.numel() >= 64 * 128]
    assert {tuple(t.shape) for t in large} == {(128, 256), (128, 64)}  # Xᵀ and Wᵀ
    assert {t.dtype for t in large} == {torch.int8}
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)


def test_nothing_is_saved_where_nothing_needs_a_gradient(monkeypatch):
    module = layer("int8", dtype=torch.float32)
    calls = []
    original = products.quantized
    monkeypatch.setattr(products, "quantized", lambda *a, **k: calls.append(k.get("cols", False)) or original(*a, **k))
    with torch.no_grad():
        assert not saved_tensors(module, torch.randn(4, 40))
    with torch.inference_mode():
        module(torch.randn(4, 40))
    module.requires_grad_(False)
    module(torch.randn(4, 40))
    assert calls and not any(calls), "transposed codes were written for nothing"


def test_products_that_nobody_needs_are_not_computed(monkeypatch):
    computed = []
    for name in ("input_gradient", "weight_gradient"):
        original = getattr(fqt.gradients, name)
        monkeypatch.setattr(
            fqt.gradients, name, lambda *a, _n=name, _f=original, **k: computed.append(_n) or _f(*a, **k)
        )
    module = layer("int8", dtype=torch.float32)
    module(torch.randn(4, 40)).sum().backward()
    assert computed == ["weight_gradient"]
    computed.clear()
    module.weight.requires_grad_(False)
    x = torch.randn(4, 40, requires_grad=True)
    module(x).sum().backward()
    assert computed == ["input_gradient"] and x.grad is not None


# ---- the weight's cache


def count_weight_quantizations(monkeypatch):
    calls = []
    original = ops.quantize_weight
    monkeypatch.setattr(ops, "quantize_weight", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_the_weight_is_quantized_once_per_version(monkeypatch):
    calls = count_weight_quantizations(monkeypatch)
    module = layer("int8", dtype=torch.float32)
    x = torch.randn(4, 40, requires_grad=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(2):  # gradient accumulation
            module(x).sum().backward()
        assert len(calls) == step + 1
        optimizer.step()
    with torch.no_grad():
        module(x)
        module(x)
    assert len(calls) == 4


def test_every_write_that_autograd_sees_is_seen():
    module = layer("int8", dtype=torch.float32)
    x = torch.randn(4, 40)

    def fresh():
        other = layer("int8", dtype=torch.float32)
        other.load_state_dict(module.state_dict())
        return other(x)

    def writes():
        with torch.no_grad():
            module.weight.mul_(2)
        yield "in place"
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
        yield "load_state_dict"
        module.load_state_dict({k: v - 0.5 for k, v in module.state_dict().items()}, assign=True)
        yield "load_state_dict(assign=True)"
        module.weight = nn.Parameter(torch.randn(24, 40))
        yield "a new Parameter"
        module.to(torch.bfloat16).to(torch.float32)
        yield "to(dtype) there and back"
        module.reset_parameters()
        yield "reset_parameters"
        torch.optim.Adam(module.parameters(), foreach=True).step()
        module(x).sum().backward()
        torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True).step()
        yield "a foreach optimizer"
        torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()
        yield "a fused optimizer, which does not advance the version"

    module(x)
    for what in writes():
        assert torch.equal(module(x), fresh()), what


def test_a_frozen_weight_is_not_quantized_again_after_each_step():
    """Beside an adapter, say: the codes are those of the same object."""
    frozen, trained = layer("int8", dtype=torch.float32).requires_grad_(False), layer("int8", dtype=torch.float32)
    x = torch.randn(4, 40)
    frozen(x)
    (trained(x)).sum().backward()
    before = frozen._fqt_cache
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    frozen(x)
    assert before is not None and frozen._fqt_cache is before


def test_a_write_through_data_needs_invalidate_():
    """The documented limit: .data does not advance the version; `invalidate_` is the remedy."""
    module = nn.Sequential(layer("int8", dtype=torch.float32))
    x = torch.randn(4, 40)
    before = module(x)
    module[0].weight.data.mul_(3)
    assert torch.equal(module(x), before)
    assert fqt.invalidate_(module) is module
    assert not torch.equal(module(x), before)


def test_moving_a_module_drops_the_cache():
    """to(), half() and the like may leave another value at the same address with the same version."""
    module = layer("int8", dtype=torch.float32)
    x = torch.randn(4, 40)
    before = module(x)
    module._apply(lambda t: t.data.mul_(2) if t.is_floating_point() else t)
    assert not torch.equal(module(x), before)


def test_fsdp_style_swaps_of_the_parameter_drop_the_cache():
    """FSDP writes gathered weights without advancing their version, then sets the parameter: setting must be enough."""
    module = layer("int8", dtype=torch.float32)
    x = torch.randn(4, 40)
    before, weight = module(x), module.weight
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.mul_(2)
    module.weight = weight
    assert not torch.equal(module(x), before)


def test_backward_uses_the_weight_of_its_forward():
    module = layer("qat8")
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    old = quantized_operands(module, x)[1].dequantize()
    y = module(x)
    with torch.no_grad():
        module.weight.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 24, dtype=torch.float64) @ old, rtol=1e-12, atol=1e-12)


# ---- errors


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.randn(3, 41), ValueError, r"blocks\.0\.fc .*\(\*, 40\).*\(3, 41\)"),
        (torch.randn(()), ValueError, r"blocks\.0\.fc"),
        (torch.ones(3, 40, dtype=torch.int64), TypeError, r"blocks\.0\.fc .*int64"),
        (torch.randn(3, 40, dtype=torch.float16), TypeError, r"blocks\.0\.fc .*float16.*float32"),
        (torch.randn(3, 40, device="meta"), ValueError, r"blocks\.0\.fc .*meta"),
    ],
)
def test_a_wrong_input_names_the_layer(x, error, says):
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(40, 24)})])})
    fqt.quantize_(model, "int8")
    with pytest.raises(error, match=says):
        model["blocks"][0]["fc"](x if x.is_meta else x.to(model["blocks"][0]["fc"].weight.device))


def test_an_unknown_recipe_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"psq9.*exact, qat8, int8.*psq2\.\.psq8"):
        fqt.nn.Linear(4, 4, recipe="psq9")


def test_a_second_derivative_raises():
    module = layer("int8", dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    (gx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gx.sum().backward()
    (gw,) = torch.autograd.grad(module(x).sum(), module.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gw.sum().backward()


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_never_silently_finite(recipe, value):
    """GradScaler must see it, in dX and in dW."""
    module = layer(recipe, dtype=torch.float32)
    x = torch.randn(9, 40, requires_grad=True)
    dy = torch.randn(9, 24)
    dy[4, 7] = value
    module(x).backward(dy)
    assert not torch.isfinite(x.grad[4]).any()
    assert not torch.isfinite(module.weight.grad[7]).any()
    if module.recipe.dgrad and module.recipe.dgrad.granularity == "per_row" and not module.recipe.dgrad.householder:
        assert torch.isfinite(x.grad[torch.arange(9) != 4]).all()


def test_a_non_finite_input_reaches_the_output():
    x = torch.randn(9, 40)
    x[4, 7] = float("nan")
    y = layer("int8", dtype=torch.float32)(x)
    assert not torch.isfinite(y[4]).any() and torch.isfinite(y[torch.arange(9) != 4]).all()
    assert not torch.isfinite(layer("psq8", dtype=torch.float32)(x)).any()  # per tensor


# ---- an nn.Linear in every other respect


def test_copies_and_pickles_compute_the_same_and_are_independent():
    module = nn.Sequential(layer("psq4", dtype=torch.float32))
    x, dy = torch.randn(5, 40), torch.randn(5, 24)
    module(x)  # fill the cache
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    fqt.set_step(2)  # reaches the copies too
    expected = gradients(module[0], x, dy)
    for other in copies:
        assert other[0].recipe == module[0].recipe and other[0]._fqt_rng.tolist()[1] == 2
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients(other[0], x, dy), strict=True))
        with torch.no_grad():
            other[0].weight.zero_()
        assert module[0].weight.abs().sum() > 0


def test_state_dict_both_ways_and_weights_only():
    module, plain = layer("int8", dtype=torch.float32), nn.Linear(40, 24)
    assert list(module.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    module.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(module.weight, plain.weight)


def test_a_layer_built_on_meta_gets_the_stream_it_would_have_had(device):
    """Whether it is materialized by to_empty() or by load_state_dict(assign=True)."""
    plain = nn.Sequential(nn.Linear(40, 24))
    fqt.quantize_(plain, "psq4")
    for assign in (False, True):
        module = nn.Sequential(nn.Linear(40, 24, device="meta"))
        fqt.quantize_(module, "psq4")
        assert module(torch.randn(3, 40, device="meta")).shape == (3, 24)
        if not assign:
            module.to_empty(device=device)
        module.load_state_dict(plain.state_dict(), strict=True, assign=assign)
        module.to(device)
        assert torch.equal(module[0]._fqt_rng.cpu(), plain[0]._fqt_rng.cpu())
        module(torch.randn(3, 40, device=device)).sum().backward()
        assert module[0]._fqt_rng[1] == 1


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    module = nn.Sequential(layer("bhq4", n=40, dtype=torch.float32), nn.ReLU(), layer("psq4", dtype=torch.float32))
    x = torch.randn(7, 40, requires_grad=True)
    results = []
    for run in (module, lambda v: checkpoint(module, v, use_reentrant=False)):
        fqt.set_step(0)
        module.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_accumulate_and_a_retained_graph_draws_fresh_bits():
    module = layer("psq2", dtype=torch.float32)
    x = torch.randn(7, 40, requires_grad=True)
    dy = torch.randn(7, 24)
    y = module(x)
    y.backward(dy, retain_graph=True)
    first = x.grad.clone()
    y.backward(dy)
    assert not torch.equal(x.grad - first, first)
    assert module._fqt_rng[1] == 2


def test_grad_scaler_skips_an_overflowing_step(device):
    module = layer("int8", dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    before = module.weight.clone()
    scaler.scale(module(torch.full((2, 40), 1e38)).mul(1e38).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(module.weight, before) and scaler.get_scale() == 2.0


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = layer("bhq4", dtype=torch.float32)
        module(torch.randn(7, 40, requires_grad=True)).sum().backward()


# ---- torch.compile


@pytest.mark.parametrize("recipe", ["qat8", "int8", "ptq8", "psq4", "bhq4", CUSTOM], ids=str)
def test_compiled_training_repeats_eager_training_bit_for_bit(recipe):
    """fullgraph with AOT autograd: three SGD steps, the random counters advanced inside the graph."""

    def train(compiled):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
        fqt.quantize_(module, recipe)
        fqt.manual_seed(5)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(6, 40)
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        return [*(p.detach() for p in module.parameters()), module[0]._fqt_rng, module[2]._fqt_rng]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_a_recipe_that_was_never_used_can_be_traced():
    """Nothing of it is computed on first use: torch.compile cannot trace a cached property."""
    fresh = dataclasses.replace(Recipe.int8(), dgrad=Quantizer(7, "per_row", "symmetric", "stochastic"))
    module = fqt.nn.Linear(8, 8, recipe=fresh)
    x = torch.randn(2, 8)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_compile_with_dynamic_batch():
    module = layer("psq8", dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (5, 9, 17):
        x = torch.randn(m, 40)
        assert torch.equal(compiled(x), module(x))


def test_qtensor_of_the_cache_is_a_qtensor():
    module = layer("int8", dtype=torch.float32)
    value = module._quantized_weight(transposed=True)
    assert isinstance(value, QTensor) and torch.equal(value.q.t(), value.qt)


# ---- gradient accumulation in the kernel


def accumulated(module, fused, steps=3):
    """The tensors that held the gradients of W and the bias over some backward passes without zero_grad between."""
    module.zero_grad()
    module.fuse_grad_accumulation = fused
    fqt.set_step(0)
    generator = torch.Generator().manual_seed(0)
    held = []
    for _ in range(steps):
        x, dy = (torch.randn(12, n, generator=generator, device="cpu").to(module.weight) for n in (40, 24))
        module(x).backward(dy)
        held.append(module.weight.grad)
    return held, module.bias.grad


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("recipe", ["int8", "psq8", "qat8"])
def test_a_gradient_added_to_in_the_kernel_is_the_sum_of_the_gradients(backend, recipe):
    """In float32 the very bits: the same additions in the same order."""
    module = layer(recipe, dtype=torch.float32)
    with fqt.backend(backend):
        (plain, plain_bias), (fused, fused_bias) = (accumulated(module, on) for on in (False, True))
    assert torch.equal(plain[-1], fused[-1]) and torch.equal(plain_bias, fused_bias)
    assert len({t.data_ptr() for t in fused}) == 1


def test_a_bfloat16_gradient_added_to_in_the_kernel_is_rounded_once():
    module = layer("int8", dtype=torch.bfloat16)
    first = accumulated(module, False, steps=1)[0][0].float()
    (plain, _), (fused, _) = (accumulated(module, on, steps=2) for on in (False, True))
    two, one = plain[-1].float(), fused[-1].float()
    # Each of the three roundings is off by at most 2⁻⁸ of what it rounds: the sum, twice, and the second gradient.
    bound = 1.02 * 2.0**-8 * (2 * two.abs() + (two - first).abs())
    assert bool(((two - one).abs() <= bound).all()) and not torch.equal(two, one)


def test_whoever_waits_for_the_gradient_of_a_parameter_is_told_of_it():
    """With a hook on the parameter the addition is autograd's, fused or not."""
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        module = layer("int8", dtype=torch.float32)
        accumulated(module, True, steps=1)
        seen = []
        getattr(module.weight, register)(lambda g, seen=seen: seen.append(1))
        module(torch.randn(3, 40)).sum().backward()
        assert seen == [1]


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_a_gradient_that_the_kernel_cannot_add_to_is_left_to_autograd():
    module = layer("int8", dtype=torch.float32)
    (expected, _), (held, _) = accumulated(module, False), accumulated(module, True, steps=1)
    module.weight.grad = held[0].t().contiguous().t()  # not contiguous
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(12, n, generator=generator, device="cpu").to(module.weight)  # noqa: E731
    inputs = [tuple(draw(n) for n in (40, 24)) for _ in range(3)]
    for x, dy in inputs[1:]:
        module(x).backward(dy)
    assert torch.equal(module.weight.grad, expected[-1])


def test_fused_accumulation_goes_through_checkpointing():
    from torch.utils.checkpoint import checkpoint

    module = layer("int8", dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    grads = []
    for fused in (False, True):
        accumulated(module, fused, steps=1)
        checkpoint(module, x, use_reentrant=False).sum().backward()
        grads.append(module.weight.grad)
    assert torch.equal(*grads)


def test_only_a_backward_pass_that_was_asked_for_the_gradient_adds_to_it():
    """Input gradients alone, other parameters alone, gradients to be returned: `.grad` is nobody's to touch."""
    module = layer("int8", dtype=torch.float32)
    held, _ = accumulated(module, True, steps=1)
    before = held[0].clone()
    x = torch.randn(3, 40, requires_grad=True)
    torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(module.weight.grad, before)
    module(x).sum().backward(inputs=[module.bias])
    assert torch.equal(module.weight.grad, before)
    (dw,) = torch.autograd.grad(module(x).sum(), [module.weight])
    assert torch.equal(module.weight.grad, before) and dw.shape == before.shape and bool(dw.any())
    module(x).sum().backward(inputs=[module.weight])
    assert module.weight.grad is held[0] and not torch.equal(held[0], before)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_gradient_that_is_itself_the_output_gradient_is_read_before_it_is_added_to(backend):
    module = layer("int8", n=24, k=24, dtype=torch.float32)
    results = []
    for fused in (False, True):
        module.zero_grad()
        module.fuse_grad_accumulation = fused
        fqt.set_step(0)
        module.weight.grad = torch.ones(24, 24)
        with fqt.backend(backend):
            module(torch.eye(24)).backward(module.weight.grad)
        results.append((module.weight.grad, module.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_of_one_column_with_any_stride_is_added_to_by_someone():
    module = layer("int8", n=24, k=1, dtype=torch.float32)
    module.fuse_grad_accumulation = True
    module.weight.grad = torch.zeros(1, 24).t()
    with fqt.backend("triton"):
        module(torch.randn(3, 1)).sum().backward()
    assert bool(module.weight.grad.any())


def test_switching_the_recipe_leaves_fused_accumulation_as_it_is():
    model = nn.Sequential(nn.Linear(8, 8))
    fqt.quantize_(model, "int8", fuse_grad_accumulation=True)
    fqt.quantize_(model, "psq4")
    assert model[0].fuse_grad_accumulation
    fqt.quantize_(model, "psq4", fuse_grad_accumulation=False)
    assert not model[0].fuse_grad_accumulation
