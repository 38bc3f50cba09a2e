"""`quantize_`, `dequantize_`, the report and `explain`."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fqt
import fqt.nn


def mlp():
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Sequential(nn.Linear(12, 12), nn.Tanh()), nn.Linear(12, 4))


def count_forwards(model, x):
    """How often the forward of each quantized layer runs in model(x)."""
    counts = {name: 0 for name, m in model.named_modules() if isinstance(m, fqt.nn.Linear)}
    hooks = []
    for name, module in model.named_modules():
        if name in counts:
            hooks.append(module.register_forward_hook(lambda *_, n=name: counts.__setitem__(n, counts[n] + 1)))
    model(x)
    for hook in hooks:
        hook.remove()
    return counts


def test_conversion_keeps_identity_keys_hooks_and_optimizers():
    model = mlp()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fqt.quantize_(model, "psq8")
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert all(isinstance(model[i], nn.Linear) and type(model[i]) is fqt.nn.Linear for i in (0, 3))
    x = torch.randn(3, 16)
    before = model(x)
    before.sum().backward()
    optimizer.step()
    assert seen and not torch.equal(model(x), before)


def test_a_second_call_switches_the_recipe_and_keeps_the_stream():
    model = mlp()
    first = fqt.quantize_(model, "psq8")
    model(torch.randn(3, 16)).sum().backward()
    state = model[0]._fqt_rng.clone()
    second = fqt.quantize_(model, "int8")
    third = fqt.quantize_(model, "int8")
    assert [{r.status for r in report.layers} for report in (first, second, third)] == [
        {"converted"}, {"switched"}, {"unchanged"},
    ]  # fmt: skip
    assert {r.recipe for r in second.layers} == {"int8"} and model[0].recipe == fqt.Recipe.int8()
    assert torch.equal(model[0]._fqt_rng, state)


def test_dequantize_gives_plain_modules_with_the_same_parameters():
    model = mlp()
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    fqt.quantize_(model, "bhq4")
    assert fqt.dequantize_(model) is model
    assert all(type(m) is not fqt.nn.Linear for m in model.modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert {n for m in model.modules() for n in m.__dict__} == {n for m in plain.modules() for n in m.__dict__}
    assert not dict(model.named_buffers())
    x = torch.randn(3, 16)
    assert torch.equal(model(x), plain(x))


def test_the_root_module_can_be_the_layer():
    layer = nn.Linear(8, 4)
    report = fqt.quantize_(layer, "int8")
    assert type(layer) is fqt.nn.Linear and len(report.converted) == 1 and "(the model)" in str(report)


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    fqt.quantize_(model, "int8")
    model["head"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    assert model["head"].weight is model["embed"].weight and model["embed"].weight.grad is not None


# ---- choosing layers


def test_filter_fn_gets_module_and_name_and_its_refusals_are_reported():
    model, names = mlp(), []
    report = fqt.quantize_(model, "int8", filter_fn=lambda m, n: names.append((type(m), n)) or not n.startswith("2"))
    assert names == [(nn.Linear, "0"), (nn.Linear, "2.0"), (nn.Linear, "3")]
    assert [(r.name, r.reason) for r in report.skipped] == [("2.0", "filter_fn returned False")]


def test_patterns_give_layers_their_recipes_first_match_first():
    model = mlp()
    report = fqt.quantize_(model, {"3": "exact", "2.*": "bhq5", "*": "psq4"})
    assert {r.name: r.recipe for r in report.layers} == {"0": "psq4", "2.0": "bhq5", "3": "exact"}
    untouched = fqt.quantize_(mlp(), {"0": "int8"})
    assert [r.name for r in untouched.skipped] == ["2.0", "3"]


@pytest.mark.parametrize(
    ("model", "kwargs", "says"),
    [
        (nn.Sequential(nn.ReLU()), {}, "no nn.Linear"),
        (mlp(), {"filter_fn": lambda m, n: False}, "all were skipped"),
        (mlp(), {"recipe": {"*": "int8", "decoder.*": "psq4"}}, r"'decoder\.\*'"),
    ],
)
def test_strict_raises_where_nothing_happened_and_lax_reports(model, kwargs, says):
    with pytest.raises(ValueError, match=says):
        fqt.quantize_(copy.deepcopy(model), **kwargs)
    assert isinstance(fqt.quantize_(model, **kwargs, strict=False), fqt.ConversionReport)


def test_an_unknown_recipe_leaves_the_model_alone():
    model = mlp()
    with pytest.raises(ValueError, match=r"unknown recipe 'int7'.*Valid"):
        fqt.quantize_(model, {"0": "int8", "3": "int7"})
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="OrderedDict"):
        fqt.quantize_(model.state_dict(), "int8")


# ---- layers that must not be swapped, or whose parents go around them


def test_multihead_attention_keeps_its_out_proj():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    report = fqt.quantize_(model, "int8")
    assert [(r.name, r.reason) for r in report.skipped] == [
        ("attention.out_proj", "MultiheadAttention reads its weight directly")
    ]


def test_convolutions_are_reported_as_skipped():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 4, 2), nn.Linear(4, 4))
    report = fqt.quantize_(model, "int8")
    assert [(r.name, r.type, r.shape, r.reason) for r in report.skipped] == [
        ("0", "Conv2d", (8, 2, 3, 3), "convolutions are not quantized"),
        ("1", "ConvTranspose1d", (4, 8, 2), "convolutions are not quantized"),
    ]
    with pytest.raises(ValueError, match="'0'"):
        fqt.quantize_(model, {"0": "int8", "2": "psq4"})


def test_parametrized_and_hooked_weights_are_skipped_with_the_reason():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(parametrized, pruned, normed, nn.Linear(4, 4))
    report = fqt.quantize_(model, "int8")
    reasons = {r.name: r.reason for r in report.skipped}
    assert reasons.keys() == {"0", "1", "2"}
    assert "parametrized" in reasons["0"] and "hook" in reasons["1"] and "hook" in reasons["2"]
    assert model(torch.randn(2, 4)).shape == (2, 4)


class Subclass(nn.Linear):
    pass


def test_subclasses_are_skipped():
    report = fqt.quantize_(nn.Sequential(Subclass(4, 4), nn.Linear(4, 4)), "int8")
    assert report.skipped[0].reason == "its type is Subclass, not nn.Linear"


def test_no_conversion_is_silently_without_effect_in_a_transformer():
    """In training, evaluation and inference mode every converted layer of an encoder is called, fast path or not."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2).eval()
    plain = copy.deepcopy(encoder)
    report = fqt.quantize_(encoder, "int8")
    assert len(report.converted) == 4 and len(report.skipped) == 2
    x = torch.randn(2, 5, 8)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert set(count_forwards(encoder, x).values()) == {1}
            assert not torch.equal(encoder(x), plain(x))
    encoder.train()
    assert set(count_forwards(encoder, x).values()) == {1}
    fqt.dequantize_(encoder).eval()
    assert encoder.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu == 1
    with torch.inference_mode():
        assert torch.equal(encoder(x), plain(x))


def test_layers_of_one_name_have_one_stream_and_others_have_others():
    a, b = mlp(), mlp()
    fqt.quantize_(a, "psq4")
    fqt.quantize_(b, "psq4")
    keys = [m._fqt_rng[0].item() for m in a.modules() if isinstance(m, fqt.nn.Linear)]
    assert len(set(keys)) == 3
    assert keys == [m._fqt_rng[0].item() for m in b.modules() if isinstance(m, fqt.nn.Linear)]


# ---- the report and explain


def test_the_report_is_a_table_and_data():
    report = fqt.quantize_(mlp(), "psq5", filter_fn=lambda m, n: n != "3")
    text = str(report)
    assert "2 layers quantized, 2 without a Triton kernel, 1 skipped" in text and "not measured" in text
    assert [r["name"] for r in json.loads(report.to_json())] == ["0", "2.0", "3"]
    assert len(report.fallbacks) == 2 and report.fallbacks[0].reason == "CPU tensors"


def test_explain_names_each_operator_its_choice_and_the_reason(capsys):
    layer = fqt.nn.Linear(16, 8, recipe="bhq4")
    fqt.explain(layer, torch.randn(2, 3, 16))
    text = capsys.readouterr().out
    assert "M=6 N=8 K=16" in text and text.count("reference: CPU tensors") == 6 and "Householder" in text
    with fqt.backend("triton"):
        fqt.explain(layer, torch.randn(6, 16))
    assert "fprop (6, 8, 16): triton" in capsys.readouterr().out
    with pytest.raises(TypeError, match="Linear"):
        fqt.explain(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="16"):
        fqt.explain(layer, torch.randn(2, 15))
