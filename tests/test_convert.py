"""`quantize_`, `dequantize_`, the report and `explain`, of linear layers; `test_convert_conv.py` has the convolutions."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fqt
import fqt.nn
from fqt import (
    conv_cost,
    conv_ops,
    conv_products,
    convert,
    cost,
    expectation,
    gradients,
    products,
    tuned,
    tuned_cost,
)
from fqt.dispatch import Choice
from fqt.tuned import Entry, Timing
from fqt.tuned_cost import Dtypes


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
    fqt.manual_seed(1)  # reaches the quantized layers that are alive: no longer these
    fqt.set_step(2)


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
    assert "2 layers quantized, 2 without a Triton kernel, 1 skipped" in text
    assert text.count("not predicted: no GPU: on cpu") == 2
    assert [r["name"] for r in json.loads(report.to_json())] == ["0", "2.0", "3"]
    assert [r["speedup"] for r in json.loads(report.to_json())] == [None] * 3
    assert len(report.fallbacks) == 2 and report.fallbacks[0].reason == "CPU tensors"


def test_explain_names_each_operator_its_choice_and_the_reason(capsys):
    layer = fqt.nn.Linear(16, 8, recipe="bhq4")
    fqt.explain(layer, torch.randn(2, 3, 16))
    text = capsys.readouterr().out
    assert "M=6 N=8 K=16" in text and text.count("reference: CPU tensors") == 7 and "Householder" in text
    with fqt.backend("triton"):
        fqt.explain(layer, torch.randn(6, 16))
    assert "fprop (6, 8, 16): triton" in capsys.readouterr().out
    with pytest.raises(TypeError, match="Linear"):
        fqt.explain(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="16"):
        fqt.explain(layer, torch.randn(2, 15))


# ---- predictions, on a CPU that passes for an H100


@pytest.fixture
def h100(monkeypatch):
    ceilings = cost.Ceilings(798, 1200, None, 3.0, "measured", "NVIDIA H100 80GB HBM3", "sm90", 132)
    monkeypatch.setattr(cost, "ceilings", lambda device: ceilings)
    with fqt.backend("triton"):
        yield ceilings


def unset(module):
    """The module with weights that nothing has written, which costs nothing."""
    return module.to_empty(device="cpu")


def wide_and_narrow():
    return unset(nn.Sequential(nn.Linear(4096, 4096, device="meta"), nn.Linear(4096, 64, device="meta")))


def test_the_report_shows_the_prediction_and_its_source(h100):
    report = fqt.quantize_(wide_and_narrow(), "int8", rows=8192)
    wide, narrow = report.layers
    expected = [cost.linear(8192, n, 4096, fqt.Recipe.int8(), h100).ratio for n in (4096, 64)]
    assert [r.speedup for r in report.layers] == expected and expected[0] > 1 > expected[1]
    assert f"{wide.speedup:.2f}× (measured)" in str(report)
    assert "faster" not in wide.reason
    assert "bf16 is expected to be faster here" in narrow.reason and "8192 rows" in narrow.reason
    assert [r.status for r in report.layers] == ["converted", "converted"]


def test_rows_change_the_prediction(h100):
    few, many = (fqt.quantize_(wide_and_narrow(), "int8", rows=rows).layers[0].speedup for rows in (64, 16384))
    assert few < 1 < many
    for rows in (0, -1, 2.0, True, "64"):
        with pytest.raises(ValueError, match="rows"):
            fqt.quantize_(wide_and_narrow(), "int8", rows=rows)


def test_only_if_faster_leaves_the_layers_that_would_lose(h100):
    model = wide_and_narrow()
    report = fqt.quantize_(model, "int8", only_if_faster=True)
    assert [type(m) for m in model] == [fqt.nn.Linear, nn.Linear]
    (skipped,) = report.skipped
    assert skipped.name == "1" and skipped.speedup < 1 and skipped.kernel == "" and skipped.recipe == ""
    bf16, quantized = (float(t) for t in re.findall(r"([\d.]+) ms", skipped.reason))
    assert skipped.speedup == pytest.approx(bf16 / quantized, rel=0.01)  # times of three digits
    assert "1 layers quantized" in str(report) and "1 skipped" in str(report)


def test_only_if_faster_leaves_a_quantized_layer_as_it_is(h100):
    model = unset(nn.Sequential(nn.Linear(4096, 64, device="meta")))
    fqt.quantize_(model, "psq5")
    fqt.quantize_(model, "int8", only_if_faster=True)
    assert model[0].recipe == fqt.Recipe.psq(5)


def test_a_model_that_is_faster_in_bf16_is_no_failure(h100):
    model = nn.Sequential(nn.Linear(64, 64))
    report = fqt.quantize_(model, {"0": "int8"}, only_if_faster=True)
    assert type(model[0]) is nn.Linear and not report.converted


@pytest.mark.parametrize(("recipe", "says"), [("qat8", "float32")])
def test_a_recipe_without_a_prediction_is_refused_before_anything_is_converted(recipe, says, h100):
    model = wide_and_narrow()
    with pytest.raises(ValueError, match=rf"only_if_faster: no prediction for 1 with recipe {recipe}.*{says}"):
        fqt.quantize_(model, {"0": "int8", "1": recipe}, only_if_faster=True)
    assert type(model[0]) is nn.Linear
    report = fqt.quantize_(model, {"0": "int8", "1": recipe}, only_if_faster=True, strict=False)
    assert [r.status for r in report.layers] == ["converted", "converted"]
    assert report.layers[1].speedup is None and "no prediction to go by" in report.layers[1].reason


def test_on_a_gpu_without_a_kernel_bf16_is_faster():
    """There plain torch would compute the quantized layer; on a CPU, where nothing else can, the question is open."""
    reason = "sm_75 has no int8 kernel"
    layer = convert.LayerReport("0", "Linear", (8, 8), "int8", "converted", "reference", None, "plain torch", reason)
    got = convert._unless_slower(layer, fqt.Recipe.int8(), on_gpu=True, strict=True)
    assert (got.status, got.kernel, got.recipe) == ("skipped", "", "")
    assert got.reason == f"bf16 is faster than plain torch: {reason}"
    with pytest.raises(ValueError, match="only_if_faster"):
        convert._unless_slower(layer, fqt.Recipe.int8(), on_gpu=False, strict=True)


def test_tuned_times_come_before_the_model(h100, monkeypatch):
    model, recipe = wide_and_narrow(), fqt.Recipe.int8()
    assert cost.linear(4096, 4096, 4096, recipe, h100).ratio > 1
    operators = tuned_cost.operators(
        4096, 4096, 4096, recipe, "float32", device="cpu", arch="sm90", processors=132, triton="3"
    )
    entries = [Entry(tuned.key(p), (Timing("tile", (64, 128, 8), 1, 10**6),), 10**6, (p.m, p.n, p.k))
               for p in operators.values()]  # fmt: skip
    monkeypatch.setattr(expectation.tuning, "table", lambda device: tuned.Table(entries))
    monkeypatch.setattr(expectation, "device_info", lambda device: ("sm90", 132))
    report = fqt.quantize_(model, "int8", only_if_faster=True, strict=False)
    wide = report.layers[0]  # 3 ms in bf16; as long for the products, and 3 ms for the quantizations
    assert wide.status == "skipped" and wide.speedup == pytest.approx(0.5) and wide.expected == "0.50× (tuned)"


def tuned_for(monkeypatch, dtypes, drop=()):
    """A table of all operators of a square layer of 4096 with those dtypes, 1 ms each, but for some."""
    operators = tuned_cost.operators(
        4096, 4096, 4096, fqt.Recipe.int8(), dtypes, device="cpu", arch="sm90", processors=132, triton="3"
    )
    entries = [Entry(tuned.key(p), (Timing("tile", (64, 128, 8), 1, 10**6),), 10**6, (p.m, p.n, p.k))
               for name, p in operators.items() if name not in drop]  # fmt: skip
    monkeypatch.setattr(expectation.tuning, "table", lambda device: tuned.Table(entries))
    monkeypatch.setattr(expectation, "device_info", lambda device: ("sm90", 132))


@pytest.mark.parametrize("x", ["float32", "float16", "bfloat16"])
def test_a_float32_layer_takes_the_times_that_were_tuned_under_autocast(x, h100, monkeypatch):
    dy = "bfloat16" if x == "float32" else x
    tuned_for(monkeypatch, Dtypes(x, "float32", dy))
    assert fqt.quantize_(wide_and_narrow(), "int8").layers[0].speedup_source == "tuned"
    layer, given = unset(fqt.nn.Linear(4096, 4096, device="meta")), torch.empty(4096, 4096, dtype=getattr(torch, x))
    with torch.autocast("cpu", dtype=getattr(torch, dy)):
        assert "the tuned times of its operators" in expectation.explanation(layer, given)
    assert "the tuned times of its operators" not in expectation.explanation(layer, given.float())


def test_what_was_not_tuned_is_said(h100, monkeypatch):
    tuned_for(monkeypatch, "float32", drop=("dY",))
    found = fqt.quantize_(wide_and_narrow(), "int8").layers[0]
    assert found.speedup_source == "measured"  # the ceilings
    assert found.reason.endswith("the tuned times were of no use: dY in float32 was not tuned")
    layer = unset(fqt.nn.Linear(4096, 4096, device="meta"))
    text = expectation.explanation(layer, torch.empty(4096, 4096))
    assert "; the tuned times were of no use: dY in float32 was not tuned\n" in text


def test_where_the_model_has_no_prediction_either_what_was_not_tuned_is_said_all_the_same(h100, monkeypatch):
    def none(device):
        raise cost.NotModelled("no ceilings of this GPU")

    tuned_for(monkeypatch, "float32", drop=("dY",))
    monkeypatch.setattr(cost, "ceilings", none)
    found = fqt.quantize_(wide_and_narrow(), "int8").layers[0]
    assert found.speedup is None
    assert (
        found.speedup_source == "no ceilings of this GPU; the tuned times were of no use: dY in float32 was not tuned"
    )


def test_explain_names_the_choices_of_the_dtypes_that_autocast_asks_for(h100, monkeypatch):
    tuned_for(monkeypatch, Dtypes("bfloat16", "float32", "bfloat16"))
    layer, x = unset(fqt.nn.Linear(4096, 4096, device="meta")), torch.empty(4096, 4096, dtype=torch.bfloat16)
    asked = []
    monkeypatch.setattr(expectation, "_choice", lambda op, *a, dtype=None, **m: asked.append((op, dtype)) or CHOICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lines = list(expectation._matrix_operators(layer.recipe, x, layer.weight, 4096, 4096, 4096))
        assert len(lines) == 6
        images = fqt.nn.Conv2d(16, 32, 3)
        given = torch.empty(2, 16, 6, 6)
        of = expectation._shape(images, "image", tuple(given.shape))
        matrices, asked[:] = list(asked), []
        assert len(list(expectation._image_operators(images.recipe, given, images.weight, of, True))) == 6
    bf16, f32 = torch.bfloat16, torch.float32
    assert matrices[:3] == [("quantize", bf16), ("quantize", f32), ("quantize_gradient", bf16)]
    assert asked[:3] == [("quantize_images", f32), ("quantize", f32), ("quantize_gradient_images", bf16)]


CHOICE = Choice("triton", None, "of the test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_operators_are_asked_for_in_the_dtypes_that_are_looked_up(dtype, device, monkeypatch):
    heard, choose = set(), products.choose

    def spy(op, device, m, n, k=0, dtype=None, **more):
        if op in tuned.OPS and op not in tuned.CODES_ONLY:
            heard.add((op, str(dtype).removeprefix("torch."), more.get("kind", "")))
        return choose(op, device, m, n, k, dtype, **more)

    for owner in (products, gradients, conv_products):
        monkeypatch.setattr(owner, "choose", spy)
    matrix = fqt.nn.Linear(32, 16, device=device)
    images = fqt.nn.Conv2d(16, 32, 3, device=device)
    for layer, shape in ((matrix, (16, 32)), (images, (2, 16, 6, 6))):
        heard.clear()
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        with fqt.backend("triton"):
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                y = layer(x)
                (dtypes,) = expectation._dtypes(layer.weight, x)
            y.backward(torch.randn_like(y))
        if layer is matrix:
            asked = tuned_cost.operators(16, 16, 32, layer.recipe, dtypes)
        else:
            of = expectation._shape(layer, "image", shape)
            asked = conv_cost.operators(of, layer.recipe, dtypes, conv_ops.is_channels_last(y))
        assert {(p.op, p.dtype, p.kind) for p in asked.values() if p.op not in tuned.CODES_ONLY} == heard


def test_only_if_faster_without_a_gpu_says_so():
    model = mlp()
    with pytest.raises(ValueError, match="no GPU: on cpu; move the model to its GPU first"):
        fqt.quantize_(model, "int8", only_if_faster=True)
    assert type(model[0]) is nn.Linear
    assert len(fqt.quantize_(model, "int8", only_if_faster=True, strict=False).converted) == 3


def test_full_precision_needs_no_prediction(h100):
    report = fqt.quantize_(wide_and_narrow(), {"0": "int8", "1": "exact"}, only_if_faster=True)
    assert report.layers[1].recipe == "exact" and report.layers[1].expected == ""


def test_a_layer_that_runs_in_plain_torch_has_no_prediction(h100):
    with fqt.backend("reference"):
        report = fqt.quantize_(wide_and_narrow(), "int8")
    assert {r.speedup for r in report.layers} == {None}
    assert {r.speedup_source for r in report.layers} == {"plain torch: asked for"}


def test_explain_prints_the_terms_of_the_prediction(h100):
    layer = unset(fqt.nn.Linear(4096, 2048, device="meta", recipe="psq8"))
    text = expectation.explanation(layer, torch.empty(4, 1024, 4096))
    expected = cost.linear(4096, 2048, 4096, layer.recipe, h100)
    assert f"{expected.ratio:.2f}× (measured)" in text and str(h100) in text
    for term in (*expected.products, *expected.passes):
        assert f"{term.ms:.4f} ms" in text
    assert "6 bytes an element, 100.7 MB" in text  # of X: 6 · 4096 · 4096
    bhq = expectation.explanation(fqt.nn.Linear(16, 8, recipe="bhq4"), torch.empty(8, 16))
    assert "quantize dY for dgrad, block Householder" in bhq and "inverse of dX" in bhq
