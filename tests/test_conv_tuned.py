"""Measured convolutions: dispatch, reports, `only_if_faster` and `explain` go by what a table has of them."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import fqt
import fqt.nn
from fqt import conv_cost, conv_problems, conv_products, cost, dispatch, expectation, tuned
from fqt.conv import Geometry
from fqt.dispatch import Choice, Problem, select
from fqt.tuned import Entry, Table, Timing, key
from fqt.tuned_cost import Dtypes
from fqt_kernels import conv as conv_kernel
from fqt_kernels import conv_quantize

GPU = dict(device="cuda", arch="sm90", processors=132, triton="3.7.1")
SAME, ONE = Geometry.of((14, 14), (3, 3), padding=((1, 1), (1, 1))), Geometry.of((14, 14), (1, 1))
FIRST = conv_kernel.CONFIGS["sm90"][0]
INT8 = fqt.Recipe.int8()


def posed(g=SAME, images=256, channels=256, **change):
    call = conv_problems.product(g, images, 256, channels, channels, False)
    return Problem(call.op, *call.sizes, **GPU | call.more | change)


def entry(problem, *kernels, ms=1.0, bf16_ms=0.0):
    """The candidates in this order, each 1 ms slower than the one before it."""
    ranking = tuple(Timing(kernel, config, 1, round((ms + i) * 1e6)) for i, (kernel, config) in enumerate(kernels))
    return Entry(key(problem), ranking, round(bf16_ms * 1e6), (problem.m, problem.n, problem.k))


# ---- dispatch


def test_what_was_measured_is_launched_and_said():
    table = Table([entry(posed(), ("implicit", FIRST), bf16_ms=0.5)])
    own, near, far = (select(posed(images=n), table) for n in (256, 150, 32))
    assert select(posed()).config != FIRST == own.config == near.config != far.config
    assert [c.source for c in (own, near, far)] == ["tuned", "nearest", "heuristic"]
    assert str(own) == f"triton implicit {FIRST}: tuned at 50176x256x2304: 1 ms; bf16 is faster: 0.5 ms"
    assert "tuned at the nearest shape 50176x256x2304" in near.reason
    for other in (
        posed(SAME._replace(stride=(2, 2), out=(7, 7)), 1024),
        posed(SAME._replace(dilation=(2, 2))),
    ):
        assert select(other, table).source == "heuristic", other.kind


def test_the_path_is_chosen_by_measurement_where_the_geometry_leaves_a_choice():
    p = posed(ONE)
    assert select(p).kernel == "pointwise"
    table = Table([entry(p, ("implicit", FIRST), ("pointwise", ()))])
    assert (select(p, table).kernel, select(p, table).config) == ("implicit", FIRST)
    table = Table([entry(p, ("pointwise", ()), ("implicit", FIRST))])
    assert (select(p, table).kernel, select(p, table).config) == ("pointwise", None)
    # Of the same key, but padded.
    assert (
        select(replace(p, geometry=posed(ONE._replace(padding=(1, 1), out=(16, 16))).geometry), table).config == FIRST
    )


def test_a_configuration_that_does_not_fit_gives_way_to_the_next_that_does():
    """24 rows are no multiple of 16: tiles that hold too many a thread are not for them."""
    narrow = replace(posed(), n=24)
    fitting = [config for config in conv_kernel.CONFIGS["sm90"] if conv_kernel.fits(config, 24)]
    wide = next(config for config in conv_kernel.CONFIGS["sm90"] if config not in fitting)
    table = Table([entry(narrow, ("implicit", wide), ("implicit", fitting[0]))])
    assert select(narrow, table).config == fitting[0] and select(narrow, table).source == "tuned"


@pytest.mark.parametrize("gradient", [False, True])
def test_the_tile_that_dispatch_chose_is_launched_where_the_strides_have_it(gradient, monkeypatch):
    """Of dense images it does; of a slice of channels, and of a gradient that was expanded, the usual one is launched."""
    seen = []
    dense = torch.zeros(16, 4, 16).transpose(1, 2)  # channels innermost
    wide = conv_quantize.tiles_of(dense, 16, 16, gradient)
    assert len(wide) == 2
    monkeypatch.setattr(conv_products, "choose", lambda *_, **__: Choice("triton", wide[0], "", "tile"))
    monkeypatch.setattr(conv_products, "Images", lambda *_: None)
    for name in ("quantize_images", "quantize_gradient_images"):
        monkeypatch.setattr(conv_quantize, name, lambda *_, **more: seen.append(more["tile"]) or ((None,) * 4,) * 3)
    sliced = torch.zeros(16, 4, 25)[:, :, 3:19].transpose(1, 2)
    expanded = torch.zeros(16, 10, 1).expand(16, 10, 64)
    for x in (dense, sliced, expanded):
        one = torch.ones(x.shape[1])
        if gradient:
            conv_products.quantized_gradient(x, INT8, ONE, one, one, False, False, rng=one, rank=0)
        else:
            conv_products.quantized(x, INT8.x, groups=1, channels=x.shape[1])
        tiles = conv_quantize.tiles_of(x, x.shape[1], 16, gradient)
        assert seen.pop() == (wide[0] if wide[0] in tiles else None), x.shape
    assert wide[0] not in tiles


# ---- reports, on a CPU that passes for an H100


@pytest.fixture
def measured(monkeypatch):
    """measured(*entries): the table of the GPU. The model, where it is asked, predicts by datasheet."""
    ceilings = cost.Ceilings(798, 1450, None, 3.0, "datasheet", "NVIDIA H100 80GB HBM3", "sm90", 132)
    monkeypatch.setattr(cost, "ceilings", lambda device: ceilings)
    monkeypatch.setattr(expectation, "device_info", lambda device: ("sm90", 132))
    pose = expectation.problem
    monkeypatch.setattr(expectation, "problem", lambda *args, **more: replace(pose(*args, **more), **GPU))

    def use(*entries):
        monkeypatch.setattr(expectation.tuning, "table", lambda device: Table(entries))

    use()
    return use


def layer(kernel=3, channels=256, last=True):
    made = nn.Conv2d(channels, 256, kernel, padding=kernel // 2, bias=False)
    return made.to(memory_format=torch.channels_last) if last else made


SHAPE = (256, 256, 14, 14)
EXAMPLE = torch.empty(()).expand(SHAPE)


def operators(of, last=True, ms=1.0, bf16_ms=1.0, dtypes="float32", **more):
    """An entry of each operator of a step: 1 ms, the products' beside bf16."""
    shape = expectation._shape(of, "image", SHAPE)
    found = conv_cost.operators(shape, INT8, dtypes, last, **more, **GPU)
    kernels = {"quantize": ("tile", (64, 128, 8)), "arrange_filters": ("torch", ()), "conv": ("implicit", FIRST),
               "conv_wgrad": ("implicit", (64, 64, 128, 4, 4))}  # fmt: skip
    return {name: entry(p, kernels.get(p.op, ("tile", (64, 1, 128, 8))), ms=ms,
                        bf16_ms=bf16_ms if p.op in tuned.PRODUCTS else 0) for name, p in found.items()}  # fmt: skip


def report(of, monkeypatch, **more):
    monkeypatch.setattr("fqt.convert.input_shapes", lambda model, example: {"0": [SHAPE]})
    model = nn.Sequential(of)
    (found,) = fqt.quantize_(model, "int8", only_if_faster=True, example_input=EXAMPLE, **more).layers
    return type(model[0]), found


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_that_was_measured_to_be_faster_is_converted_and_a_slower_one_is_left(kernel, measured, monkeypatch):
    """3 products, 3 quantizations and the filters' arrangement of 1 ms: 7 ms, beside 3 of bf16."""
    measured(*operators(layer(kernel), bf16_ms=7.7 / 3).values())
    kind, found = report(layer(kernel), monkeypatch)
    assert kind is fqt.nn.Conv2d and found.status == "converted" and found.expected == "1.10× (tuned)"
    assert found.reason == "measured to be faster than bf16: 7.7 ms, quantized 7 ms for 256×256×14×14"
    assert found.kernel == "implicit GEMM"  # the table's, also of a 1x1
    measured(*operators(layer(kernel), bf16_ms=2.0).values())
    kind, found = report(layer(kernel), monkeypatch)
    assert kind is nn.Conv2d and found.status == "skipped" and found.speedup == pytest.approx(6 / 7)
    assert found.reason.startswith("bf16 was measured to be faster here: 6 ms, quantized 7 ms for 256×256×14×14; ")
    assert found.reason.endswith("int8 products take 3 ms, quantizing 4 ms")


def test_one_operator_that_was_not_measured_leaves_the_model(measured, monkeypatch):
    entries = operators(layer(), ms=100.0)
    for missing in entries:
        measured(*(e for name, e in entries.items() if name != missing))
        found = report(layer(), monkeypatch)[1]
        assert found.speedup_source == "datasheet", missing
        assert re.search(rf"the tuned times were of no use: {missing}( in float32)? was not tuned$", found.reason), (
            missing
        )
    for name in ("fprop", "dgrad", "wgrad"):
        measured(*(entries | {name: entries[name]._replace(bf16_ns=0)}).values())
        assert report(layer(), monkeypatch)[1].speedup_source == "datasheet", name
    measured(*entries.values())
    assert report(layer(), monkeypatch)[1].speedup_source == "tuned"
    measured(*operators(layer(5, channels=64)).values())  # of another layer, hence no word of it
    assert "tuned" not in report(layer(), monkeypatch)[1].reason


def test_what_was_tuned_in_a_step_is_said_to_lack_bf16_and_never_taken_for_a_first_layer(measured, monkeypatch):
    entries = operators(layer())
    alone = {name: e._replace(bf16_ns=0) for name, e in entries.items() if name != "arranging W"}
    measured(*alone.values())  # as a step leaves them
    found = report(layer(), monkeypatch)[1]
    without = "tuned without bf16, which `fqt tune` times"
    assert found.speedup_source == "datasheet"
    assert found.reason.endswith(f"use: arranging W was not tuned, fprop, dgrad, wgrad were {without}")
    first = operators(layer(), first=True)
    measured(*first.values(), alone["dgrad"], alone["dY"])  # a first layer, and another of its shape
    found = report(layer(), monkeypatch)[1]
    assert found.speedup_source == "datasheet" and found.reason.endswith(
        "use: dgrad was tuned without bf16, which `fqt tune` times"
    )
    measured(*(e for name, e in first.items() if name != "W"))
    assert report(layer(), monkeypatch)[1].reason.endswith("of no use: W in float32 was not tuned")


@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_a_layer_of_float32_is_measured_as_it_trains_under_autocast(x, measured, monkeypatch):
    entries = operators(layer(), bf16_ms=4.0, dtypes=Dtypes(x, "float32", "bfloat16"))
    measured(*entries.values())
    assert report(layer(), monkeypatch)[1].expected == "1.71× (tuned)"  # 12 ms in bf16, 7 in int8
    kind, found = report(layer().bfloat16(), monkeypatch)
    assert kind is fqt.nn.Conv2d and found.speedup_source == "datasheet"
    assert "X in bfloat16" in found.reason or "W in bfloat16" in found.reason


def test_a_first_layer_is_measured_without_the_gradient_of_its_input(measured, monkeypatch):
    """2 products and 4 ms of quantizing; where the others need dX, their step is not this."""
    entries = operators(layer(), first=True, bf16_ms=4.5)
    measured(*entries.values())
    kind, found = report(layer(), monkeypatch)
    assert kind is fqt.nn.Conv2d and found.expected == "1.50× (tuned)"
    assert found.reason.endswith("9 ms, quantized 6 ms for 256×256×14×14, without a gradient of its input")
    measured(*(entries | operators(layer())).values(), *entries.values())
    assert report(layer(), monkeypatch)[1].reason.endswith("10 ms, quantized 7 ms for 256×256×14×14")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [("psq8", "offsets"), ("bhq8", "more than tuned kernels do"), ("qat8", "more than tuned kernels do")],
)
def test_what_tuning_does_not_measure_is_said(recipe, says):
    shape = expectation._shape(layer(), "image", SHAPE)
    with pytest.raises(cost.NotModelled, match=says):
        conv_cost.operators(shape, fqt.Recipe.parse(recipe), "float32", True, **GPU)
    with pytest.raises(cost.NotModelled, match="write their windows out"):
        conv_cost.operators(replace(shape, geometry=None), INT8, "float32", True, **GPU)


def test_times_are_those_of_the_memory_format_that_the_weight_tells(measured, monkeypatch):
    """A 3x3's does; a 1x1's, which is in both formats, takes what was measured."""
    for kernel, last, source in ((3, True, "datasheet"), (3, False, "tuned"), (1, True, "tuned")):
        measured(*operators(layer(kernel), last=False).values())
        assert report(layer(kernel, last=last), monkeypatch, strict=False)[1].speedup_source == source


def test_times_are_scaled_to_the_batch(measured):
    of = expectation._shape(layer(), "image", SHAPE)
    table = Table(operators(layer()).values())
    whole, part = (conv_cost.tuned_convolution(s, INT8, table, "float32", **GPU)
                   for s in (of, replace(of, images=255)))  # fmt: skip
    assert [p.ms for p in whole.products] == [1.0] * 3 and whole.ms == 7.0 and whole.bf16_ms == 3.0
    assert [p.ms for p in part.products][:2] == pytest.approx([255 / 256] * 2) and part.source == "tuned"


def test_explain_says_what_was_chosen_and_why(measured):
    of = fqt.nn.Conv2d(256, 256, 1, bias=False)
    x = torch.empty(SHAPE, device="meta").to(memory_format=torch.channels_last)
    entries = operators(of)
    fprop = entries["fprop"]._replace(ranking=(Timing("pointwise", (), 1, 400_000), *entries["fprop"].ranking))
    measured(*(entries | {"fprop": fprop}).values())
    text = expectation.explanation(of, x)
    assert "fprop (50176, 256, 256): 1x1 GEMM, triton portable" in text
    assert "; 1x1 GEMM: tuned at 50176x256x256: 0.4 ms; bf16 takes 1 ms" in text
    assert f"dgrad (50176, 256, 256): implicit GEMM, triton implicit {FIRST}: tuned at 50176x256x256: 1 ms" in text
    assert "quantize X (50176, 256): triton tile (64, 1, 128, 8): tuned at 50176x256: 1 ms" in text
    assert "quantize dY for dgrad and wgrad (50176, 256): triton tile (64, 1, 128, 8): tuned" in text
    assert "the tuned times of its operators" in text and "(tuned)" in text


def test_in_step_tuning_is_asked_with_the_geometry(monkeypatch):
    """Without it a problem could not be built."""
    posed_to = []

    class Tuning:
        table = staticmethod(lambda device: tuned.EMPTY)
        enabled = staticmethod(lambda: True)
        tune_now = staticmethod(lambda problem, device: posed_to.append(problem))

    monkeypatch.setattr(dispatch, "_tuning", lambda: Tuning)
    monkeypatch.setattr(dispatch, "device_info", lambda device: ("sm90", 132))
    monkeypatch.setattr(dispatch, "_is_recorded", lambda: False)
    call = conv_problems.product(SAME, 256, 256, 256, 256, False)
    choice = dispatch.choose(call.op, torch.device("cuda", 0), *call.sizes, **call.more)
    assert choice.source == "heuristic" and [p.geometry for p in posed_to] == [call.geometry]
