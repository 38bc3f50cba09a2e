"""Convolutions in the benchmark: the layers of the networks, checks that refuse what is off, the table of a network."""

import contextlib
from collections import Counter

import bench_fabricated as fake
import pytest
import torch
from bench_fakes import ONCE, FakeTimer
from torch import nn

import fqt
import fqt.nn
from fqt import conv_cost, conv_nn, conv_products, cost, ops
from fqt.recipe import Recipe
from fqt.suites import CONVOLUTIONS, Convolution
from fqt_bench import conv_pieces, convs, resnet50, suites, targets
from fqt_bench.harness import Budget, Wrong, measure, repeat
from fqt_bench.parameters import RESNET50
from fqt_bench.suites import TINY_CONVS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STEM, STRIDED, POINTWISE, DEPTHWISE = TINY_CONVS

pytestmark = pytest.mark.usefixtures("one_thread")


def _measured(case):
    timer = FakeTimer()
    return measure(case, timer, Budget(1000.0, timer), ONCE, log=lambda text: None)["candidates"]


@contextlib.contextmanager
def _off(t, factor):
    """Within, the largest element is another: of codes by one, of other numbers by the factor."""
    at = tuple((t.abs() == t.abs().max()).nonzero()[0])
    value = t[at].clone()
    t[at] = value * factor if t.is_floating_point() else value - value.sign()
    yield
    t[at] = value


# ---- the networks


def _met(model, edge):
    """How often the model convolves what, (channels, edge, out channels, kernel, stride), on images of this size."""
    met = Counter()

    def meet(layer, args, output):
        sizes = args[0].shape[1], args[0].shape[3], output.shape[1], layer.kernel_size[0], layer.stride[0]
        met[sizes] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.padding == (layer.kernel_size[0] // 2,) * 2
            layer.register_forward_hook(meet)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, edge, edge, device="meta"))
    return met


def test_the_layers_of_resnet_50_are_those_that_the_network_computes():
    with torch.device("meta"):
        model = resnet50.ResNet()
    assert [tuple(p.shape) for p in model.parameters()] == list(RESNET50.shapes)
    listed = {(c.c, c.edge, c.o, c.kernel, c.stride): c.count for c in CONVOLUTIONS["ResNet-50"]}
    assert _met(model, 224) == listed and len(listed) == 23 and sum(listed.values()) == 53


@pytest.mark.parametrize("network, n, layers, giga", [("ResNet-50", 256, 53, 4.087), ("ResNet-18", 64, 20, 1.814)])
def test_a_network_multiplies_as_often_as_published(network, n, layers, giga):
    found = CONVOLUTIONS[network]
    assert {c.n for c in found} == {n} and sum(c.count for c in found) == layers
    assert len({c[1:8] for c in found}) == len(found)
    assert round(sum(c.count * c.multiplications for c in found) / n / 1e9, 3) == giga
    assert [c.name for c in found if c.first] == ["conv1"]


def test_a_group_is_a_matrix_product_of_unfolded_images():
    for c in (*TINY_CONVS, *CONVOLUTIONS["ResNet-18"]):
        layer = convs.layer(c, torch.device("meta"), torch.float32)
        y = layer(torch.empty(1, c.c, c.edge, c.edge, device="meta"))
        assert y.shape[2:] == (c.out_edge, c.out_edge)
        m, n, k = c.as_layer[1:]
        assert (m, n, k) == (c.n * c.out_edge**2, c.o // c.groups, layer.weight[0].numel())
        assert c.multiplications == m * n * k * c.groups


# ---- a layer


@pytest.mark.parametrize("of", TINY_CONVS, ids=lambda c: c.name)
def test_every_candidate_passes_its_check_and_is_refused_when_a_value_is_off(of, device):
    case = convs.case(of, torch.device(device), sets=1, compiled=False)
    assert [c.ours for c in case.candidates] == [False, True, True]
    for candidate in case.candidates:
        out = candidate.run(0)
        assert (out[1] is None) == of.first
        for part, what in zip(out, ("Y", "dX", "dW"), strict=True):
            if part is not None:
                with _off(part, -2), pytest.raises(Wrong, match=what):
                    candidate.check(out, 0)
        candidate.check(out, 0)


def test_a_gradient_that_is_missing_or_was_not_asked_for_is_wrong():
    for of, text in ((POINTWISE, "dX: missing"), (STEM, "dX: not asked for")):
        candidate = convs.case(of, CPU, sets=1, compiled=False).candidates[1]
        y, dx, dw = candidate.run(0)
        with pytest.raises(Wrong, match=text):
            candidate.check((y, dw if dx is None else None, dw), 0)


def test_the_work_is_that_of_the_products_that_are_computed_and_the_bytes_those_of_their_tensors():
    for of, products in ((STEM, 2), (DEPTHWISE, 3)):
        case = convs.case(of, CPU, sets=1, compiled=False)
        y, dx, dw = case.candidates[1].run(0)
        x = of.n * of.c * of.edge**2 * 4
        moved = x + dw.nbytes + y.nbytes + y.nbytes + dw.nbytes + (0 if dx is None else dx.nbytes)
        operations = 2 * products * y[:, :1].numel() * of.o * dw[0].numel()
        assert {(c.ops, c.bytes) for c in case.candidates} == {(operations, moved)}
    assert (case.unit, case.shape) == ("TFLOP/s", "16x16x8x8x16x3x1x16")


def test_a_step_is_in_channels_last_searches_cudnns_algorithms_and_quantizes_the_weight_anew(monkeypatch):
    case = convs.case(STRIDED, CPU, sets=1, compiled=False)
    seen = []
    quantize_weight = ops.quantize_weight
    monkeypatch.setattr(ops, "quantize_weight", lambda *a, **k: seen.append(torch.backends.cudnn.benchmark)
                        or quantize_weight(*a, **k))  # fmt: skip
    for _ in range(3):
        out = case.candidates[1].run(0)
    assert seen == [True] * 3 and not torch.backends.cudnn.benchmark
    for part in (*out, *case.candidates[0].run(0)):
        assert part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()


def test_layers_repeat_their_bits_and_their_launches_are_counted(monkeypatch):
    records = repeat(convs.case(STRIDED, CPU, sets=1, compiled=False), FakeTimer(), runs=2)
    assert [r["name"] for r in records] == [convs.OWN + r for r in convs.RECIPES]
    assert {r["status"] for r in records} == {"ok"}

    def count(run):
        run()
        return {"kernels": 1, "copies": 0, "by_name": {}}

    monkeypatch.setattr("fqt_bench.cuda.launches", count)
    found = suites._launches_of_conv(STRIDED, CPU, FakeTimer(), {records[0]["name"]: "did not end"})
    assert [(r["name"], r["shape"]) for r in found] == [
        ("nn.Conv2d float32", convs.size(STRIDED)), (records[1]["name"], convs.size(STRIDED))]  # fmt: skip


def test_predictions_are_the_cost_models_of_the_same_work(monkeypatch):
    h100 = cost.Ceilings(798, 1200, 1250, 3.0, "measured", "NVIDIA H100 80GB HBM3", "sm90", 132)
    monkeypatch.setattr(cost, "ceilings", lambda device: h100)
    case = convs.case(STRIDED, CPU, sets=1)
    shape = conv_cost.Shape(16, 16, 32, 64, 16, 9)
    expected = {r: str(conv_cost.convolution(shape, Recipe.parse(r), h100)) for r in convs.RECIPES}
    assert {c.tag: c.prediction for c in case.candidates if c.prediction} == expected
    assert not any(c.prediction for c in convs.case(STEM, CPU, sets=1).candidates)  # its dX is not needed


# ---- its kernels, one by one


def test_every_piece_passes_its_check_and_is_refused_when_a_value_is_off(device):
    of, where = Convolution("", 16, 16, 4, 16, 3, 2), torch.device(device)
    cases = [conv_pieces.quantize(of, where, sets=1)]
    cases += [conv_pieces.product(name, of, where, sets=1) for name in conv_pieces.PRODUCTS]
    for case in cases:
        assert {c["name"]: c["remark"] for c in _measured(case) if c["status"] != "ok"} == {}
        for candidate in case.candidates:
            out = candidate.run(0)
            for part in _tensors(out):
                with _off(part, -2), pytest.raises(Wrong):
                    candidate.check(out, 0)
            candidate.check(out, 0)


def _tensors(out):
    """Of a tensor, of images, or of a tuple of them."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out if part is not None for t in _tensors(part)]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", conv_pieces.PRODUCTS)
def test_the_implicit_gemm_is_run_with_each_of_its_configurations(name, monkeypatch):
    from fqt_kernels import conv, conv_wgrad

    configs = [(32, 32, 32, 1, 1), (64, 32, 32, 1, 1)]
    for module in (conv, conv_wgrad):
        monkeypatch.setattr(module, "CONFIGS", {"sm80": configs})
    case = conv_pieces.product(name, Convolution("", 2, 16, 3, 16, 3, 2), CPU, sets=1, kernels=True)
    made = [c for c in case.candidates if c.name.startswith("implicit GEMM")]
    assert [c.name.partition(", int8, ")[2] for c in made] == [
        "32x32x32, 1 warps, 1 stages", "64x32x32, 1 warps, 1 stages"]  # fmt: skip
    for candidate in made:
        candidate.check(candidate.run(0), 0)


# ---- what is planned


def test_all_layers_are_planned_at_full_size_and_the_pieces_of_three():
    planned = suites.plans(("conv",), GPU, quick=False)
    shapes = {network: {p.shape for p in planned if p.suite == convs.title(network)} for network in CONVOLUTIONS}
    assert shapes == {network: {convs.size(c) for c in found} for network, found in CONVOLUTIONS.items()}
    three = {"256x256x14x14x256x3x1", "256x128x56x56x128x3x2", "256x1024x14x14x256x1x1"}
    for of in (
        "launches of conv fwd+bwd",
        "repeats of conv fwd+bwd",
        "conv quantize",
        "conv fprop",
        "conv dgrad",
        "conv wgrad",
    ):
        assert {p.shape for p in planned if p.suite == of} == three, of
    assert sum(p.needs_s for p in planned) < 240 and three > {c.shape for c in planned[:2]}
    assert {p.shape for p in suites.plans(("conv",), GPU, quick=True)} == three
    assert ("train ResNet-50", "256x3x224x224") in {(p.suite, p.shape) for p in suites.plans(("train",), GPU, False)}


def test_the_smoke_selection_takes_every_way_that_kernels_compute_a_convolution():
    layers = [(convs.layer(c, torch.device("meta"), torch.float32), c) for c in TINY_CONVS]
    ways = {conv_products.path(conv_nn.geometry(layer, (c.edge, c.edge)), c.c) for layer, c in layers}
    assert ways == set(conv_products.PATHS)
    assert any(c.stride > 1 and not c.first for c in TINY_CONVS) and any(c.groups > 1 for c in TINY_CONVS)
    planned = {p.shape for p in suites.plans(("smoke",), CPU, quick=False)}
    assert planned >= {convs.size(c) for c in TINY_CONVS}


# ---- the table of a network


def _result(ms, layers=CONVOLUTIONS["ResNet-18"]):
    """Of layers whose candidates took ms(layer), by tag; None failed."""
    cases = []
    for of in layers:
        made = [fake.failed(tag, "wrong", "off", tag=tag) if t is None else fake.candidate(tag, t, tag=tag)
                for tag, t in ms(of).items()]  # fmt: skip
        cases.append(fake.case(convs.title("ResNet-18"), convs.size(of), *made, unit="TFLOP/s"))
    return fake.result(*cases)


def test_the_table_has_every_layer_also_where_int8_loses_and_their_sum_by_how_often_they_occur():
    def ms(of):
        return {"bf16": 2.0, "bf16 compiled": 1.0 + of.kernel, "int8": 0.5 if of.kernel == 3 else 4.0, "psq8": 1.0}

    result = _result(ms)
    *each, total = convs.rows("ResNet-18", result["cases"])
    assert [row.of for row in each] == list(CONVOLUTIONS["ResNet-18"])
    assert {row.of.kernel: row.ratio("int8") for row in each} == {7: 0.5, 3: 4.0, 1: 0.5}
    # 16 of 3x3, 3 of 1x1, and the stem: bf16 takes 2 ms each, the compiled one where it is faster
    assert (total.count, total.bf16, total.ours) == (20, 40.0, {"int8": 16 * 0.5 + 4 * 4.0, "psq8": 20.0})
    lines = targets.report(result).splitlines()
    assert sum(line.startswith(("conv1 ", "layer1.", "layer2.", "layer3.", "layer4.")) for line in lines) == len(each)
    assert any(line.split()[:4] == ["all", "layers", "20", "40"] for line in lines)
    assert any("layer2.0.downsample" in line and " 0.5" in line for line in lines)


def test_what_failed_or_was_not_measured_has_no_figure_and_no_sum():
    rows = convs.rows("ResNet-18", _result(lambda of: {"bf16": 1.0, "int8": None if of.first else 1.0})["cases"])
    assert rows[0].ours == {"int8": None, "psq8": None} and rows[0].ratio("int8") is None
    assert rows[-1].of is None and rows[-1].bf16 == 20.0 and set(rows[-1].ours.values()) == {None}
    assert convs.cells(rows[0])[3:] == ("1", "", "", "", "", "", "")
    some = _result(lambda of: {"bf16": 1.0}, CONVOLUTIONS["ResNet-18"][:3])["cases"]
    assert [row.of.name for row in convs.rows("ResNet-18", some)] == ["conv1", "layer1.0.conv1", "layer2.0.conv1"]
    assert convs.rows("ResNet-50", some) == []


# ---- training


def test_a_small_resnet_trains_by_every_recipe_as_by_full_precision():
    case = resnet50.case(8, 16, CPU, width=4, blocks=(1, 1))
    for candidate in case.candidates:
        assert candidate.check(candidate.run(0), 0).endswith("% off")
    assert [c.tag for c in case.candidates] == ["full precision", "int8", "psq8"] and case.unit == "ms"


def test_all_its_convolutions_are_quantized_and_its_norms_stay():
    model = resnet50.ResNet(4, (1, 1), 8)
    report = fqt.quantize_(model, "int8")
    assert len(report.converted) == 1 + 2 * 4 + 1 and not report.skipped
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {fqt.nn.Conv2d}
