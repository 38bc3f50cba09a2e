"""Cases of operators, optimizers and training steps: every candidate passes, and one that is off does not."""

import copy

import pytest
import torch
from bench_fakes import ONCE, FakeTimer
from torch import nn

import fqt
from fqt import products, reference
from fqt.recipe import Quantizer, Recipe
from fqt_bench import operators, optim, providers, train
from fqt_bench.cases import GRID, ROW, ROW_STOCHASTIC
from fqt_bench.harness import Budget, Wrong, measure
from fqt_bench.operators import check_quantized
from fqt_bench.suites import FAMILIES

CPU = torch.device("cpu")
BUILDERS = {
    "quantize": lambda: operators.quantize(48, 64, CPU, sets=1),
    "product": lambda: operators.product(32, 48, 64, CPU, sets=1),
    "conversion": lambda: operators.conversion(32, CPU),
    "optimizer": lambda: optim.step(24, 40, CPU),
    "mlp": lambda: train.mlp(64, 64, 2, CPU),
    "encoder": lambda: train.encoder(4, 8, 64, 1, CPU),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", BUILDERS)
def test_every_candidate_passes_its_check_and_peers_that_are_missing_say_so(name):
    timer = FakeTimer()
    got = measure(BUILDERS[name](), timer, Budget(1000.0, timer), ONCE)["candidates"]
    assert {c["name"]: c["remark"] for c in got if c["status"] not in ("ok", "skip")} == {}
    assert all(
        c["remark"].startswith(("not installed", "needs")) and not c["ours"] for c in got if c["status"] == "skip"
    )
    assert got[0]["status"] == "ok" and sum(c["ours"] and c["status"] == "ok" for c in got) >= 1
    assert all("ratio" in c for c in got if c["status"] == "ok")


def test_the_quantizations_are_of_every_granularity_rounding_zero_and_format():
    made = [z for z, _ in operators.QUANTIZATIONS]
    for field, values in (("granularity", {"per_tensor", "per_row", "per_column"}), ("format", {"int", "e4m3"}),
                          ("rounding", {"nearest", "stochastic"}), ("zero", {"grid", "symmetric", "min"})):  # fmt: skip
        assert {getattr(z, field) for z in made} == values
    layouts = {(layout.get("rows", True), layout.get("cols", False)) for _, layout in operators.QUANTIZATIONS}
    assert layouts == {(True, True), (False, True), (True, False)}


def test_there_is_a_recipe_of_every_family():
    assert {Recipe.parse(name).name for name in FAMILIES} == {"exact", "qat8", "ptq8", "psq8", "bhq8", "int8", "fp8"}


# ---- what a check refuses


E4M3 = Quantizer(8, "per_row", "symmetric", "nearest", format="e4m3")


@pytest.mark.parametrize("z", [ROW, GRID, ROW_STOCHASTIC, E4M3], ids=str)
def test_codes_that_are_off_by_one_and_scales_that_are_off_by_a_bit_are_wrong(z):
    x, rng = torch.randn(16, 32), torch.tensor(operators.RNG)
    good = products.quantized(x, z, rng=rng, cols=True)
    check_quantized(good, x, z, rng=rng, cols=True)
    for name in ("q", "qt"):
        codes = getattr(good, name).clone()
        as_bytes = codes.view(torch.int8)
        as_bytes[3, 5] += 2 if z.format == "e4m3" else 1
        with pytest.raises(Wrong):
            check_quantized(good._replace(**{name: codes}), x, z, rng=rng, cols=True)
    with pytest.raises(Wrong, match="scale"):
        check_quantized(good._replace(scale=good.scale * (1 + 2.0**-20)), x, z, rng=rng, cols=True)


def test_a_layout_that_is_missing_or_was_not_asked_for_is_wrong():
    x = torch.randn(8, 16)
    both = products.quantized(x, ROW, cols=True)
    with pytest.raises(Wrong, match="qt: not asked for"):
        check_quantized(both, x, ROW)
    with pytest.raises(Wrong, match="qt: missing"):
        check_quantized(both._replace(qt=None), x, ROW, cols=True)


def test_a_product_without_its_offsets_is_wrong(monkeypatch):
    case = operators.product(32, 48, 64, CPU, sets=1)
    affine = next(c for c in case.candidates if "grid" in c.name)
    scaled_mm = reference.scaled_mm
    monkeypatch.setattr(products.reference, "scaled_mm", lambda a, b, *rest: scaled_mm(
        a._replace(offset=None), b._replace(offset=None), *rest))  # fmt: skip
    with pytest.raises(Wrong):
        affine.check(affine.run(0), 0)


def test_a_conversion_that_leaves_a_layer_out_or_changes_a_weight_is_wrong():
    case = operators.conversion(16, CPU)
    plain, convert = case.candidates
    with pytest.raises(Wrong, match="0 of 4 layers"):
        convert.check(plain.run(0), 0)
    model = convert.run(0)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(Wrong, match="parameters changed"):
        convert.check(model, 0)


# ---- optimizers


def test_the_codes_are_made_anew_in_every_step(monkeypatch):
    candidates = {c.name: c for c in optim.step(16, 32, CPU).candidates}
    calls = []
    quantize_weight = fqt.ops.quantize_weight
    monkeypatch.setattr(fqt.ops, "quantize_weight", lambda *a: calls.append(a[2]) or quantize_weight(*a))
    for name in ("SGD fused", "SGD foreach", "Adam fused"):
        calls.clear()
        candidates[name].run(0)
        assert calls == []
        candidates[f"{name}, int8 codes of the weights"].run(0)
        candidates[f"{name}, int8 codes of the weights"].run(0)
        assert calls == [True] * 2 * optim.LAYERS  # both layouts


def test_codes_of_the_weights_before_the_step_are_wrong(monkeypatch):
    monkeypatch.setattr(fqt, "invalidate_", lambda layer: layer)
    monkeypatch.setattr(fqt.nn.Linear, "_quantized_weight", lambda layer, transposed, made={}: made.setdefault(
        layer, fqt.ops.quantize_weight(layer.weight.detach(), layer.recipe, transposed)))  # fmt: skip
    stale = next(c for c in optim.step(16, 32, CPU).candidates if c.ours)
    stale.run(0)
    out = stale.run(0)
    with pytest.raises(Wrong, match="differ"):
        stale.check(out, 0)


@pytest.mark.parametrize("name", [name for name, *_ in optim.OPTIMIZERS])
def test_a_step_of_another_size_is_wrong(name):
    _, kind, options = next(entry for entry in optim.OPTIMIZERS if entry[0] == name)
    weight = nn.Parameter(torch.randn(16, 32))
    weight.grad = torch.randn(16, 32)
    optimizer = kind([weight], lr=0.1, **options)
    optim.check_step(optimizer, optimizer.step)

    def twice():
        optimizer.step()
        optimizer.step()

    with pytest.raises(Wrong, match="weight"):
        optim.check_step(optimizer, twice)
    with pytest.raises(Wrong):
        optim.check_step(optimizer, lambda: None)


# ---- training


def _checked(convert):
    """The check of a training case, of a model that is converted so."""
    case = train.mlp(64, 64, 2, CPU)
    int8 = next(c for c in case.candidates if c.tag == "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_quantized", lambda model, name: convert(model))
        case = train.mlp(64, 64, 2, CPU)
        int8 = next(c for c in case.candidates if c.tag == "int8")
        return int8.check(torch.tensor(1.0), 0)


def test_a_network_that_does_not_learn_is_wrong():
    def frozen(model):
        model[0].weight.requires_grad_(False)
        return model

    def diverging(model):
        with torch.no_grad():
            model[-1].bias[0] = torch.inf
        return model

    assert "off" in _checked(lambda model: copy.deepcopy(model))
    with pytest.raises(Wrong, match="of its progress off"):
        _checked(frozen)
    with pytest.raises(Wrong, match="of its progress off"):
        _checked(diverging)


def test_a_loss_that_is_not_finite_is_wrong():
    candidate = train.mlp(64, 64, 2, CPU).candidates[1]
    for value in (torch.nan, torch.inf):
        with pytest.raises(Wrong, match="loss"):
            candidate.check(torch.tensor(value), 0)


def test_a_step_trains_every_parameter_of_the_network():
    for case in (train.mlp(32, 64, 1, CPU), train.encoder(2, 4, 64, 1, CPU)):
        first = float(case.candidates[1].run(0))
        for _ in range(5):
            last = float(case.candidates[1].run(0))
        assert last < first


# ---- providers


def test_a_provider_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert providers.peer("torch", CPU) == {"provider": "torch", "missing": ""}
    for name, reason in (("torchao", "not installed: torchao"), ("bitsandbytes", "not installed: bitsandbytes"),
                         ("torch._scaled_mm", "needs a GPU with float8"), ("torch.compile", "needs a GPU")):  # fmt: skip
        assert providers.peer(name, CPU)["missing"].startswith(reason)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    assert providers.peer("torchao", CPU) == {"provider": "torchao", "missing": "needs a GPU"}
    assert providers.peer("torchao", torch.device("cuda", 0))["missing"] == ""
