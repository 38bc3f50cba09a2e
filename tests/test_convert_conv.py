"""Convolutions in `quantize_`: a corpus of architectures, the truth of the report, predictions on an example."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import fqt
import fqt.nn
from fqt import conv_cost, cost, expectation
from fqt.conv_cost import Shape
from fqt.conv_nn import QUANTIZED
from fqt.example import input_shapes


class Block(nn.Module):
    """A residual block of ResNet; with a stride or other channels, the shortcut is a 1x1 convolution."""

    def __init__(self, channels, out, stride=1, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, groups=groups, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, groups=groups, bias=False)
        self.downsample = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class Standardized(nn.Conv2d):
    """A subclass with a forward pass of its own: weight standardization."""

    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), self.bias)


def head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)


def corpus():
    """{name: (model, an input of it)}; every layer of the models is in `TRUTH`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
    image = torch.randn(2, 4, 8, 8)
    separable = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 8, 1)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return {
        "resnet": (nn.Sequential(Block(4, 16, stride=2), Block(16, 16), *head(16)), image),
        "mobilenet": (nn.Sequential(*separable, *head(8)), image),
        "dilated": (nn.Sequential(nn.Conv2d(4, 16, 3, padding="same", dilation=2), nn.Conv2d(16, 4, (1, 3))), image),
        "resnext": (nn.Sequential(Block(4, 16, groups=4)), image),
        "decoder": (nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 3, 3)), image),
        "reflect": (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3)), image),
        "wrapped": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), normed), image),
        "video": (nn.Sequential(nn.Conv3d(4, 4, 2), nn.Conv3d(4, 4, 2, groups=2)), torch.randn(2, 4, 4, 5, 6)),
        "standardized": (nn.Sequential(Standardized(4, 4, 3), nn.Conv2d(4, 4, 1)), image),
        "sound": (nn.Sequential(nn.Conv1d(4, 16, 5, stride=2), nn.Conv1d(16, 4, 1)), torch.randn(2, 4, 30)),
        "twice": (nn.Sequential(shared, nn.ReLU(), shared), image),
    }


GEMM, ONE, IM2COL = "implicit GEMM", "1x1 GEMM", "im2col"
TRUTH = {  # {layer: its path, or a part of the reason it was skipped for}
    "resnet": {"0.conv1": IM2COL, "0.conv2": GEMM, "0.downsample": IM2COL,
               "1.conv1": GEMM, "1.conv2": GEMM, "1.downsample": ONE, "4": "triton"},
    "mobilenet": {"0": GEMM, "3": ONE, "6": "triton"},
    "dilated": {"0": IM2COL, "1": GEMM},
    "resnext": {"0.conv1": GEMM, "0.conv2": GEMM, "0.downsample": ONE},
    "decoder": {"0": "transposed convolutions are not quantized", "1": IM2COL},
    "reflect": {"0": "padding_mode 'reflect'", "1": IM2COL},
    "wrapped": {"0": "its weight is parametrized", "1": "its weight is computed by a hook"},
    "video": {"0": IM2COL, "1": "groups=2: im2col"},
    "standardized": {"0": "its type is Standardized, not nn.Conv2d", "1": ONE},
    "sound": {"0": IM2COL, "1": ONE},
    "twice": {"0": IM2COL},
}  # fmt: skip


@pytest.mark.parametrize("name", corpus())
def test_the_report_is_true_of_every_layer(name):
    """Each layer of a model is in the report once, and what it says was done, and how, was."""
    model, x = corpus()[name]
    plain = copy.deepcopy(model) if name != "wrapped" else None
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    with fqt.backend("triton"):
        report = fqt.quantize_(model, "int8", strict=False)
    assert {r.name: r.kernel or r.reason for r in report.layers}.keys() == TRUTH[name].keys() == layers.keys()
    for r in report.layers:
        expected, layer = TRUTH[name][r.name], layers[r.name]
        quantized = type(layer) in (*QUANTIZED.values(), fqt.nn.Linear)
        assert (r.status == "converted") == quantized == (r.kernel != ""), r
        assert (r.kernel == expected) if quantized else (expected in r.reason), r
        assert r.type == type(layer).__name__ and r.shape[:2] == _weight_shape(layer)[:2]
        assert r.shape[2:] == tuple(getattr(layer, "kernel_size", ()))
        assert r.recipe == ("int8" if quantized else "")
    y = model(x)
    y.square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    if plain is not None:
        plain.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(plain.state_dict(), strict=True)
        expected = plain.train()(x)
        error = float((y.detach() - expected.detach()).norm() / expected.detach().norm())
        # each of up to 6 layers adds an error of a step of 1/127 of its largest input or weight, of norms 3 to 5 times less
        assert error < 0.1 and (error > 0) == bool(report.converted)
    fqt.dequantize_(model)
    assert not [m for m in model.modules() if "fqt" in type(m).__module__]


def _weight_shape(layer):
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups


def test_a_model_of_convolutions_only_converts_and_keeps_parameters_hooks_and_optimizer():
    model, x = corpus()["dilated"]
    parameters, seen = list(model.parameters()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert len(fqt.quantize_(model, "psq8").converted) == 2
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = model(x)
    before.square().mean().backward()
    optimizer.step()
    assert seen and not torch.equal(model(x), before)
    assert [r.status for r in fqt.quantize_(model, "psq4").layers] == ["switched"] * 2
    assert [r.status for r in fqt.quantize_(model, "psq4").layers] == ["unchanged"] * 2


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    fqt.quantize_(model, "int8")
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    assert model[0].weight is model[1].weight and model[0].weight.grad is not None


def test_patterns_and_recipes_that_a_convolution_cannot_have():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    report = fqt.quantize_(model, "fp8")
    assert [(r.name, r.status) for r in report.layers] == [("0", "skipped"), ("2", "converted")]
    assert "e4m3" in report.layers[0].reason
    with pytest.raises(ValueError, match=r"strict: no layer that can be quantized matches '0'"):
        fqt.quantize_(model, {"0": "fp8", "2": "int8"})
    report = fqt.quantize_(model, {"0": "psq4"}, filter_fn=lambda m, n: isinstance(m, nn.Conv2d))
    assert {r.name: r.recipe for r in report.converted} == {"0": "psq4"} and report.fallbacks[0].reason == "CPU tensors"
    left = fqt.quantize_(model, "fp8").layers[0]
    assert left.status == "skipped" and left.reason.endswith("; it stays quantized by psq4")
    with pytest.raises(ValueError, match=r"0 .*e4m3"):
        model[0].recipe = "fp8"
    exact = fqt.quantize_(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "exact")
    assert [(r.status, r.kernel) for r in exact.layers] == [("converted", "torch")]


def test_strict_says_that_there_is_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"no nn\.Linear and no nn\.Conv1d"):
        fqt.quantize_(nn.ReLU())
    with pytest.raises(ValueError, match="transposed"):
        fqt.quantize_(nn.ConvTranspose1d(2, 2, 2))


# ---- the example


class Noisy(nn.Module):
    """Everything that a run could leave behind: statistics, random numbers, modes, counters, hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = []

    def forward(self, x, scale=1.0):
        self.seen += 1
        self.calls.append(tuple(x.shape))
        torch.rand(3)
        return self.drop(self.bn(self.conv(x * scale)))


def test_running_the_example_leaves_no_trace():
    model, x, hooked = Noisy(), torch.randn(2, 3, 9, 9), []
    model.drop.eval()
    model.conv.register_forward_hook(lambda *_: hooked.append(1))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    assert input_shapes(model, (x, 0.5))["conv"] == [(2, 3, 9, 9)]
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert [p._version for p in model.parameters()] == versions and not model.calls and not hooked
    model(x)
    assert hooked == [1] and torch.is_grad_enabled()
    assert input_shapes(model, x[:1, :, :3, :3])["bn"] == [(1, 8, 1, 1)]  # of which training has no statistics


@pytest.mark.parametrize("name", ["wrapped", "video", "sound", "twice"])
def test_an_example_reaches_every_layer_as_often_as_it_is_called(name):
    model, x = corpus()[name]
    shapes = input_shapes(model, x)
    assert shapes["0"][0] == tuple(x.shape) and len(shapes["0"]) == (2 if name == "twice" else 1)


def test_an_example_that_does_not_fit_is_an_error_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    for example, error, says in ((torch.randn(2, 4, 8, 8), ValueError, "example_input: the model raises RuntimeError"),
                                 ([1], TypeError, "list")):  # fmt: skip
        with pytest.raises(error, match=says):
            fqt.quantize_(model, "int8", example_input=example)
    model[0].lock = (i for i in ())  # a generator
    with pytest.raises(ValueError, match="cannot be copied"):
        fqt.quantize_(model, "int8", example_input=torch.randn(1, 3, 8, 8))
    assert type(model[0]) is nn.Conv2d


# ---- predictions, on a CPU that passes for an H100


@pytest.fixture
def h100(monkeypatch):
    ceilings = cost.Ceilings(798, 1450, None, 3.0, "datasheet", "NVIDIA H100 80GB HBM3", "sm90", 132)
    monkeypatch.setattr(cost, "ceilings", lambda device: ceilings)
    with fqt.backend("triton"):
        yield ceilings


class Sized(nn.Module):
    """Convolutions of one kind on images of a given size, without computing: what is under test are the shapes."""

    def __init__(self, *convolutions, again=1):
        super().__init__()
        self.layers, self.again = nn.ModuleList(convolutions), again

    def forward(self, x):
        for layer in self.layers:
            for _ in range(self.again):
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, (x.expand(-1, layer.in_channels, -1, -1),), {})
        return x


def wide_narrow_and_1x1(again=1):
    kinds = nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(256, 1024, 1)
    return Sized(*kinds, again=again)


def shape_of(layer, path="implicit GEMM"):
    return Shape(256, layer.in_channels, layer.out_channels, 196, 196, layer.kernel_size[0] ** 2, path=path)


def test_with_an_example_the_report_predicts_and_says_where_bf16_is_faster_and_why(h100):
    model = wide_narrow_and_1x1()
    report = fqt.quantize_(model, "int8", example_input=torch.zeros(256, 1, 14, 14))
    paths = ("implicit GEMM", "implicit GEMM", "1x1 GEMM")
    recipe = fqt.Recipe.int8()
    expected = [conv_cost.convolution(shape_of(m, p), recipe, h100) for m, p in zip(model.layers, paths, strict=True)]
    assert [r.kernel for r in report.layers] == list(paths)
    assert [r.speedup for r in report.layers] == [e.ratio for e in expected]
    wide, narrow, one = report.layers
    assert wide.speedup > 1 and wide.reason == "" and wide.expected == f"{wide.speedup:.2f}× (datasheet)"
    for r in (narrow, one):
        assert r.speedup < 1 and r.status == "converted"
        assert r.reason.startswith("bf16 is expected to be faster here: ") and "256×" in r.reason
    assert "quantizing moves" in one.reason
    bf16, quantized = (float(t) for t in re.findall(r"([\d.]+) ms", one.reason)[:2])
    assert one.speedup == pytest.approx(bf16 / quantized, rel=0.01)  # times of three digits


def test_a_layer_that_is_called_twice_is_predicted_as_both(h100):
    once, twice = (fqt.quantize_(wide_narrow_and_1x1(n), "int8", example_input=torch.zeros(256, 1, 14, 14)).layers
                   for n in (1, 2))  # fmt: skip
    assert [r.speedup for r in once] == pytest.approx([r.speedup for r in twice])
    assert "and 1 more" in twice[1].reason and "more" not in once[1].reason


def test_only_if_faster_leaves_the_convolutions_that_would_lose(h100):
    model = wide_narrow_and_1x1()
    report = fqt.quantize_(model, "int8", only_if_faster=True, example_input=torch.zeros(256, 1, 14, 14))
    assert [type(m) for m in model.layers] == [fqt.nn.Conv2d, nn.Conv2d, nn.Conv2d]
    assert [r.name for r in report.skipped] == ["layers.1", "layers.2"] and all(r.kernel == "" for r in report.skipped)


def test_without_an_example_nothing_is_predicted_and_only_if_faster_asks_for_one(h100):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"only_if_faster: no prediction for 0 .* image size is unknown: give example"):
        fqt.quantize_(model, "int8", only_if_faster=True)
    assert type(model[0]) is nn.Conv2d
    report = fqt.quantize_(model, "int8", only_if_faster=True, strict=False)
    (layer,) = report.layers
    assert layer.status == "converted" and layer.reason == "only_if_faster had no prediction to go by"
    assert layer.expected == "not predicted: the image size is unknown: give example_input"
    unreached = fqt.quantize_(Sized(nn.Conv2d(4, 4, 3), again=0), "int8", example_input=torch.zeros(1, 4, 8, 8)).layers[
        0
    ]
    assert unreached.expected == "not predicted: example_input does not reach it"


def test_an_example_tells_the_samples_of_linear_layers(h100):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU())
    given = fqt.quantize_(model, "int8", example_input=torch.zeros(6, 7, 256)).layers[0]
    assert given.speedup == cost.linear(42, 64, 256, fqt.Recipe.int8(), h100).ratio and "42 rows" in given.reason


def test_without_a_gpu_that_is_the_reason():
    (layer,) = fqt.quantize_(nn.Conv2d(4, 4, 3), "int8", example_input=torch.zeros(1, 4, 8, 8)).layers
    assert (layer.kernel, layer.reason, layer.expected) == ("reference", "CPU tensors", "not predicted: no GPU: on cpu")
    assert not layer.name


# ---- explain


def test_explain_names_each_operator_of_a_convolution(capsys):
    layer = fqt.nn.Conv2d(4, 8, 3, padding=1, recipe="bhq4")
    fqt.explain(layer, torch.randn(2, 4, 5, 6))
    text = capsys.readouterr().out
    assert (
        "input 2×4×5×6" in text and text.count("reference: CPU tensors") == 7 and "block Householder (2, 240)" in text
    )
    assert "fprop (60, 8, 36)" in text and "dgrad (60, 4, 72)" in text and "wgrad (8, 36, 60)" in text
    with pytest.raises(ValueError, match=r"\(N, 4, H, W\)"):
        fqt.explain(layer, torch.randn(2, 3, 5, 6))


def test_explain_leaves_sums_that_leave_int32_to_the_kernel_of_convolutions(h100):
    layer = fqt.nn.Conv2d(16, 8, 1)
    for edge, how in ((362, "1x1 GEMM"), (363, "implicit GEMM")):  # 362² = 131 044 terms, of 131 071
        text = expectation.explanation(layer, torch.empty(()).expand(1, 16, edge, edge))
        assert f"wgrad (8, 16, {edge**2}): {how}, triton" in text and f"fprop ({edge**2}, 8, 16): 1x1 GEMM" in text


@pytest.mark.parametrize(
    ("layer", "fprop", "dgrad"),
    [
        (lambda: fqt.nn.Conv2d(4, 8, 3), "im2col, triton", "implicit GEMM, triton"),
        (lambda: fqt.nn.Conv2d(16, 8, 3), "implicit GEMM, triton", "implicit GEMM, triton"),
        (lambda: fqt.nn.Conv2d(16, 8, 1), "1x1 GEMM, triton", "1x1 GEMM, triton"),
        (lambda: fqt.nn.Conv2d(4, 8, 3, sample="row"), "triton", "triton"),
        (lambda: fqt.nn.Conv2d(4, 8, 3, recipe="qat8"), "im2col, triton", "torch, full precision"),
    ],
)
def test_explain_names_the_path_of_each_product(layer, fprop, dgrad, h100):
    layer = layer()
    text = expectation.explanation(layer, torch.empty(2, layer.in_channels, 6, 6))
    assert re.search(rf"fprop \(.*\): {fprop}", text) and re.search(rf"dgrad \(.*\): {dgrad}", text)
    assert ("im2col: torch, windows (32, 36)" in text) == (layer.sample == "row")
    predicted = "expected, forward and backward, on NVIDIA H100 80GB HBM3" in text
    assert predicted == (layer.recipe.dgrad is not None) and ("not predicted: products in float32" in text) != predicted


@pytest.mark.parametrize(
    ("layer", "asked"),
    [
        (nn.Conv2d(16, 8, 1), ("scaled_mm", 2 * 64, 8, 16, "")),
        (nn.Conv2d(3, 8, 3, padding=1), ("scaled_mm", 2 * 64, 8, 32, "")),
        (nn.Conv2d(32, 64, 3, padding=1, groups=2), ("conv", 2 * 64, 32, 144, "2 groups 9 taps contiguous")),
    ],
)
def test_the_reason_in_the_report_is_that_of_the_path_that_runs(layer, asked, h100, monkeypatch):
    """A 1x1 layer's is that of a matrix product, with all that decides its tiles, once the path has been asked for."""
    seen = []
    choose = expectation._choice

    def spy(op, device, *sizes, **more):
        seen.append((op, *sizes, more.get("kind", "")))
        return choose(op, device, *sizes, **more)

    monkeypatch.setattr(expectation, "_choice", spy)
    fqt.quantize_(layer, "int8", example_input=torch.zeros(2, layer.in_channels, 8, 8))
    assert seen[asked[0] == "scaled_mm"] == asked and seen[0][0] == "conv"
