"""The cost model of convolutions: its identities, its monotonicities, the design's expectation, and what it refuses."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from fqt import conv, conv_cost, conv_products, cost
from fqt.conv import Geometry
from fqt.conv_cost import Shape, convolution
from fqt.cost import Ceilings, NotModelled
from fqt.dispatch import Choice
from fqt.recipe import Quantizer, Recipe

INT8 = Recipe.int8()


def ceilings(int8_tops=1450.0, tb_s=3.0, bf16_tflops=798.0, **fields):
    return Ceilings(bf16_tflops, int8_tops, None, tb_s, "datasheet", **fields)


def h100(int8_tops=1450.0):
    return ceilings(int8_tops, gpu="NVIDIA H100 80GB HBM3", arch="sm90", processors=132)


def square(channels, edge, images=256, out=None, **options):
    """3x3 with padding 1."""
    return Shape(images, channels, out or channels, edge**2, edge**2, 9, **options)


def pointwise(channels, out, edge, images=256):
    return Shape(images, channels, out, edge**2, edge**2, 1, path="1x1 GEMM")


def ratio(shape, on, recipe=INT8):
    return convolution(shape, recipe, on).ratio


# ---- identities


def test_the_products_are_those_of_the_three_directions():
    """Of a group: 2·M·N·K operations each are those of all images, whichever direction; of dgrad, whose rows a stride leaves
    without some of the taps, less."""
    s = Shape(4, 8, 12, 30, 20, 9, groups=2)
    assert s.products == {"fprop": (80, 6, 36), "dgrad": (120, 4, 54), "wgrad": (6, 36, 80)}
    assert s.groups * math.prod(s.products["fprop"]) == s.groups * math.prod(s.products["wgrad"]) == s.multiplications
    assert s.elements == {"X": 4 * 8 * 30, "W": 12 * 4 * 9, "dY": 4 * 12 * 20}


def test_the_prediction_of_a_wide_layer_is_the_formula():
    """Without waves and launches, where operations bound: 6·N·P·O·T·C / R / share, plus the bytes of quantization."""
    s, on = square(512, 14), ceilings()
    got = convolution(s, INT8, on)
    operations = 6 * s.multiplications
    assert got.bf16_ms == pytest.approx(operations / (798e12 * conv_cost.IMPLICIT) * 1e3)
    assert got.bytes == 6 * s.elements["X"] + (3 + 4) * s.elements["W"] + 6 * s.elements["dY"]
    assert got.ms == pytest.approx((operations / (1450e12 * conv_cost.IMPLICIT) + got.bytes / 3.0e12) * 1e3)
    assert got.source == "datasheet" and got.codes == "int8"


def test_a_product_that_memory_bounds_takes_the_time_of_its_bytes():
    s = square(16, 112, groups=16)
    x, w, dy = s.elements.values()
    for p, (read, written) in zip(convolution(s, INT8, ceilings()).products, ((x + w, dy), (dy + w, x), (dy + x, w)),
                                  strict=True):  # fmt: skip
        assert p.bf16_ms == pytest.approx(2 * (read + written) / 3.0e9)
        assert p.ms == pytest.approx((read + 2 * written) / 3.0e9)


def test_a_1x1_convolution_is_the_linear_layer_of_its_pixels_but_for_the_images_statistics():
    s, on = pointwise(1024, 512, 16, images=8), ceilings()
    got, matrices = convolution(s, INT8, on), cost.linear(8 * 256, 512, 1024, INT8, on)
    assert [(p.name, p.shape) for p in got.products] == [(p.name, p.shape) for p in matrices.products]
    for p, q in zip(got.products, matrices.products, strict=True):
        assert (p.bf16_ms, p.ms) == pytest.approx((q.bf16_ms, q.ms))
    assert {p.name: p.bytes_per_element for p in got.passes} == {"X": 6, "W": 7, "dY": 6}


def test_windows_in_floating_point_are_a_linear_layer_that_pays_for_them():
    s = square(64, 16, images=4, path="im2col", windows=True)
    got, matrices = convolution(s, INT8, ceilings()), cost.linear(4 * 256, 64, 576, INT8, ceilings())
    assert got.passes[:-1] == matrices.passes and got.passes[-1].name == "im2col"
    assert got.passes[-1].bytes == 4 * 256 * 576 * sum(conv_cost.WINDOWS)
    assert [p.ms for p in got.products] == [p.ms for p in matrices.products]
    assert got.ratio < ratio(square(64, 16, images=4), ceilings())


def test_codes_under_windows_are_written_and_padded_to_rows_of_16():
    for channels, taps, length, copies in ((3, 9, 32, 3), (8, 2, 16, 1)):
        s = Shape(2, channels, 8, 64, 64, taps, path="im2col")
        (found,) = (p for p in convolution(s, INT8, ceilings()).passes if p.name == "im2col")
        assert (found.elements, found.bytes_per_element) == (2 * 64 * length, copies)


def test_the_bytes_follow_the_recipe():
    """Offsets of an operand need sums of the other's codes in wgrad; a transform reads dY again, and dX in float32."""
    row = Quantizer(8, "per_row")
    apart = Recipe(x=row, w=row, dgrad=row, wgrad=Quantizer(8, "per_column"))
    traffic = conv_cost.traffic
    assert {n: b for n, (b, _) in traffic(INT8).items()} == {"X": 6, "W": 7, "dY": 6}
    assert {n: b for n, (b, _) in traffic(Recipe.psq(4)).items()} == {"X": 7, "W": 9, "dY": 7}
    assert traffic(apart)["dY"][0] == 10
    bhq, auto = traffic(Recipe.bhq(4)), traffic(Recipe.auto(4))
    assert bhq["dY"][0] == 13 and bhq["dX"][0] == 8 and auto["dY"][0] == 15


# ---- monotonicities, waste, and the expectation of the design


def test_the_expectation_of_the_design_at_the_rate_it_was_made_for():
    """ResNet-50 at batch 256 on an H100, whose int8 products reach 1450 TOPS: 3x3 gains from 128 channels on, by 1.06 to
    1.43; 1x1 and narrow layers lose (0.7 to 0.97). Shares of rates are assumptions: a tenth is left for them."""
    stages = ((64, 56), (128, 28), (256, 14), (512, 7))
    narrow, *wide = (ratio(square(c, edge), h100()) for c, edge in stages)
    assert all(1.06 < r < 1.1 * 1.43 for r in wide) and wide == sorted(wide) and 0.7 < narrow < 0.97
    for c, edge in stages:
        assert ratio(pointwise(c, 4 * c, edge), h100()) < 0.97 and ratio(pointwise(4 * c, c, edge), h100()) < 0.97


def test_with_synchronous_products_only_the_widest_layers_gain():
    """950 TOPS, what is expected of tl.dot on an H100: at most 950 / 798 is to be gained."""
    got = [ratio(square(c, edge), h100(950.0)) for c, edge in ((64, 56), (128, 28), (256, 14), (512, 7))]
    assert got == sorted(got) and got[0] < got[1] < 1 < got[3] < 950 / 798


def test_wider_layers_faster_products_and_faster_memory_raise_the_ratio():
    for values in ([ratio(square(c, 14), ceilings()) for c in (64, 128, 256, 512)],
                   [ratio(square(256, 14), ceilings(tops)) for tops in (600, 900, 1200, 1500)],
                   [ratio(square(256, 14), ceilings(tb_s=tb_s)) for tb_s in (1.0, 2.0, 4.0, 8.0)]):  # fmt: skip
        assert values == sorted(values) and len(set(values)) == len(values)


def test_blocks_that_narrow_channels_fill_in_part_cost_as_if_they_were_full(monkeypatch):
    """48 channels in blocks of 64, 9 taps: 4/3. Rows and columns of the tiles fit."""
    monkeypatch.setattr(conv_cost, "choose", lambda *_: Choice("triton", (128, 64, 64, 4, 3), ""))
    on, share = ceilings(arch="sm90", processors=128), conv_cost.IMPLICIT
    s = Shape(128, 48, 64, 1024, 1024, 9)  # 1024 tiles: 8 waves
    fprop = convolution(s, INT8, on).products[0]
    assert fprop.ms == pytest.approx(2e-9 * s.multiplications * 64 / 48 / (1450 * share) + cost.LAUNCH_US / 1e3)
    assert fprop.bf16_ms == pytest.approx(2e-9 * s.multiplications / (798 * share) + cost.LAUNCH_US / 1e3)
    more = convolution(dataclasses.replace(s, images=129), INT8, on).products[0]  # 1032 tiles: 9 waves
    assert more.ms - cost.LAUNCH_US / 1e3 == pytest.approx((fprop.ms - cost.LAUNCH_US / 1e3) * 9 / 8)


def test_programs_that_share_the_sums_of_wgrad_fill_the_processors(monkeypatch):
    for split in (1, 4):
        choice = Choice("triton", (64, 64, 64, 4, 3), "", split_k=split)
        monkeypatch.setattr(conv_cost, "choose", lambda *_, choice=choice: choice)
        s = Shape(512, 64, 64, 4096, 4096, 9)  # 9 tiles
        wgrad = convolution(s, INT8, ceilings(arch="sm90", processors=36)).products[2]
        exact = 2e-9 * s.multiplications / (1450 * conv_cost.IMPLICIT) * 4 / split
        assert wgrad.ms - 2 * cost.LAUNCH_US / 1e3 == pytest.approx(exact)


def test_groups_lose_and_the_smaller_the_more():
    got = [ratio(square(128, 28, groups=groups), h100()) for groups in (1, 4, 32, 128)]
    assert got == sorted(got, reverse=True) and got[2] < 0.5 and got[3] < 0.1


def test_why_names_what_the_time_goes_into():
    depthwise = convolution(square(128, 28, groups=128), INT8, h100())
    assert "its products alone take" in conv_cost.why_slower(depthwise)
    narrow = convolution(pointwise(64, 256, 56), INT8, h100())
    assert "quantizing moves" in conv_cost.why_slower(
        narrow
    ) and f"{narrow.bytes / 1e6:.3g} MB" in conv_cost.why_slower(narrow)


# ---- what is not predicted


@pytest.mark.parametrize(
    ("shape", "recipe", "says"),
    [
        (square(64, 14), Recipe.exact(), "nothing is quantized"),
        (square(64, 14), Recipe.qat(8), "float32"),
        (square(64, 14, images=0), INT8, "no convolution"),
        (square(20000, 14), INT8, "leaves int32"),
    ],
)
def test_what_is_not_modelled_says_why(shape, recipe, says):
    with pytest.raises(NotModelled, match=says):
        convolution(shape, recipe, h100())


def test_dispatch_is_asked_as_the_products_ask_it(monkeypatch):
    """The same problem, but for the GPU, as `conv_products` poses for a layer of these sizes."""
    posed, asked = {}, {}
    monkeypatch.setattr(
        conv_cost, "select", lambda p: posed.setdefault(p.op, []).append(p) or Choice("reference", None, "x")
    )
    s = Shape(16, 8, 4, 36, 16, 9, groups=2)
    for name in s.products:
        conv_cost.choose(name, s, "sm90", 132)

    def choose(op, device, m, n, k=0, dtype=None, **more):
        asked.setdefault(op, []).append((m, n, k, more.get("kind", "")))
        return Choice("reference", None, "")

    monkeypatch.setattr(conv_products, "choose", choose)
    g = Geometry.of((6, 6), (3, 3), groups=2)
    x, dy = torch.randn(16, 8, 36), torch.randn(16, 4, 16)
    f, b = conv.filters(torch.ones(4, 4, 3, 3, dtype=torch.int8), g, 8)
    one = torch.ones(1)
    a = conv.quantize(x, INT8.x, groups=2, cols=True)
    conv_products.product(a, conv.Filters(f, one, None, None, 4), g)
    state = torch.zeros(2, dtype=torch.int64)
    conv_products.input_gradient(dy, conv.Filters(b, one.expand(4), None, None, 2), INT8, g, torch.float32, rng=state)
    conv_products.weight_gradient(dy, a, INT8, g, torch.float32, rng=state)
    for op in ("conv", "conv_wgrad"):
        assert [(p.m, p.n, p.k, p.kind) for p in posed[op]] == asked[op]


def test_importing_it_imports_neither_torch_nor_triton():
    code = "import sys, fqt.conv_cost; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
