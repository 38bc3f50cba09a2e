"""How convolutions are put to dispatch: what is collected and predicted is what a step asks for; keys and their words."""

import re
from collections import Counter

import pytest
import torch
from torch import nn

import fqt
from fqt import collect, conv_cost, conv_nn, conv_problems, conv_products, dispatch, products, tuned
from fqt.collect import Target
from fqt.conv import Geometry
from fqt.conv_problems import Numbers
from fqt.dispatch import Problem
from fqt.expectation import _shape
from fqt.suites import Convolution
from fqt.tuned import Entry, Refused, Timing, entry_from_json, key, to_json

CPU = Target("", 1, "cpu")
H100 = Target("sm90", 132)
GPU = dict(device="cuda", arch="sm90", processors=132, triton=dispatch.triton_version())
SAME = Geometry.of((8, 8), (3, 3), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("of", "recipe"),
    [(Convolution("", 2, 16, 2, 4, 2, 2), "int8"), (Convolution("", 2, 3, 2, 4, 3, first=True), "psq8"),
     (Convolution("", 2, 16, 2, 4, 1), "ptq8"), (Convolution("", 2, 4, 2, 4, 3, groups=2), "int8")],
)  # fmt: skip
def test_what_is_recorded_is_what_a_real_step_asks_for(of, recipe, device, monkeypatch):
    """The layer runs for real, without a GPU in the interpreter, while a spy listens at dispatch."""
    heard, geometries, choose = Counter(), set(), products.choose

    def spy(op, device, m, n, k=0, dtype=None, **more):
        if op in tuned.OPS:
            heard[key(dispatch.problem(op, device, m, n, k, dtype, **more))] += 1
            geometries.add((op, more.get("geometry", ())))
        return choose(op, device, m, n, k, dtype, **more)

    for owner in (products, conv_products):
        monkeypatch.setattr(owner, "choose", spy)
    more = dict(dtype=torch.bfloat16, device=device)
    layer = fqt.nn.Conv2d(
        of.c, of.o, of.kernel, of.stride, of.kernel // 2, groups=of.groups, bias=False, recipe=recipe, **more
    )
    layer = layer.to(memory_format=torch.channels_last)
    last = dict(memory_format=torch.channels_last)
    x = torch.randn(of.n, of.c, of.edge, of.edge, **more).to(**last).requires_grad_(not of.first)
    with dispatch.backend("triton"):
        y = layer(x)
        y.backward(torch.randn_like(y))
    monkeypatch.undo()
    met = {p: n for p, n in collect.of_convolutions([of], CPU, [recipe]).items() if p.op != conv_problems.ARRANGED}
    assert {key(p): n for p, n in met.items()} == heard and {(p.op, p.geometry) for p in met} <= geometries


@pytest.mark.parametrize(
    ("layer", "size", "last"),
    [
        (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 8, 8), True),
        (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 8, 8), False),
        (lambda: nn.Conv2d(20, 36, 3, stride=2), (16, 20, 9, 9), True),
        (lambda: nn.Conv2d(32, 64, 1), (16, 32, 4, 4), True),
        (lambda: nn.Conv2d(3, 8, 3, padding=2, dilation=2), (4, 3, 8, 8), False),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), True),
        (lambda: nn.Conv1d(16, 16, 5, stride=2), (16, 16, 20), False),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_what_is_added_up_is_what_a_step_asks_for(layer, size, last, first, monkeypatch):
    """But for the products of matrices that a convolution asks for in turn: their time is part of its own."""
    memory = torch.channels_last if last else torch.contiguous_format

    def make():
        return layer().to(memory_format=memory), torch.randn(size).contiguous(memory_format=memory).requires_grad_(
            not first
        )

    monkeypatch.setattr(collect, "_load", lambda spec: make)
    met = collect.of_model("made:make", H100, ["int8"]).problems
    shape = _shape(layer(), "image", size)
    predicted = conv_cost.operators(shape, fqt.Recipe.int8(), "float32", last, first=first, **GPU)
    assert {key(p) for p in predicted.values()} == {key(p) for p in met if p.op != "scaled_mm"}
    assert {p.geometry for p in predicted.values()} == {p.geometry for p in met}
    paths = {conv_problems.path_of(p) for p in predicted.values() if p.op in conv_problems.PRODUCTS}
    assert (paths != {"implicit"}) == any(p.op == "scaled_mm" for p in met)


def fprop(g=SAME, images=256, rows=64, channels=64, transposed=False, last=True, **change):
    call = conv_problems.product(g, images, rows, channels, channels, transposed, last)
    return Problem(call.op, *call.sizes, **GPU | call.more | change)


def test_what_the_speed_depends_on_is_in_the_key_and_what_jitters_is_not():
    larger = Geometry.of((16, 4), (3, 3), padding=((1, 1), (1, 1)))
    same = fprop(images=250), fprop(larger), fprop(dtype="bfloat16"), fprop(plain=False)
    other = [
        fprop(transposed=True), fprop(last=False), fprop(SAME._replace(stride=(2, 2), out=(4, 4)), images=1024),
        fprop(SAME._replace(groups=2), rows=128), fprop(SAME._replace(dilation=(2, 2))), fprop(images=512),
        fprop(SAME._replace(kernel=(1, 3)), channels=192), fprop(rows=65), fprop(channels=72),
    ]  # fmt: skip
    assert {key(p) for p in same} == {key(fprop())}
    assert len({key(p) for p in (fprop(), *other)}) == len(other) + 1
    # 16 taps of 1 channel are 16 terms, none of them aligned.
    assert not key(fprop(SAME._replace(kernel=(4, 4)), channels=1)).aligned


def test_few_images_have_keys_of_their_own():
    def of(n):
        calls = (
            conv_problems.wgrad(SAME, n, 64, 64, 16),
            conv_problems.gradient(n, 64, 256 // n, 64, False, "per_row", "per_row"),
        )
        return [key(Problem(c.op, *c.sizes, **GPU | c.more)) for c in calls]

    assert all("8 images" in k.kind for k in of(8)) and of(8) != of(4)
    assert all(k.kind in ("9 taps", "per_row per_row") for k in of(16)) and of(16) == of(16)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_problem_knows_its_geometry(transposed):
    g = Geometry.of((9, 7), (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2), 4)
    assert Geometry(*Numbers.of(fprop(g, transposed=transposed))) == g
    with pytest.raises(ValueError, match=r"geometry of the convolution is not known: .*'conv'"):
        Numbers.of(fprop(geometry=()))


@pytest.mark.parametrize(
    ("op", "kind", "valid"),
    [
        ("conv", "dgrad 32 groups 9 taps 2x2 stride 2x1 dilation contiguous", True), ("conv", "", True),
        ("conv", "9 taps dgrad", False), ("conv", "09 taps", False), ("conv", "9  taps", False), ("conv", "9 taps ", False),
        ("conv", "9 taps 9 taps", False), ("conv", "0 taps", False), ("conv", "per_row", False), ("conv", 9, False),
        ("conv", f"{10**9} taps", False), ("conv", "٣ taps", False), ("conv_wgrad", "9 taps 8 images", True),
        ("conv_wgrad", "dgrad", False), ("quantize_images", "per_row nearest both pixels_last 2 images", True),
        ("quantize_images", "per_row nearest", False), ("quantize_gradient_images", "per_row per_column", True),
        ("quantize_gradient_images", "per_row", False), ("arrange_filters", "2 groups 9 taps", True),
        ("arrange_filters", "torch", False), ("scaled_mm", "9 taps", False), ("quantize", "9 taps", False),
    ],
)  # fmt: skip
def test_a_kind_is_what_this_code_writes_or_refused(op, kind, valid):
    kernel, config = {"conv": ("im2col", ()), "conv_wgrad": ("pointwise", ()), "arrange_filters": ("torch", ())}.get(
        op, ("tile", (16, 16, 32, 8))
    )
    dtype = "" if op in tuned.CODES_ONLY else "bfloat16"
    item = dict(op=op, format="int", dtype=dtype, kind=kind, exact=[64, 64, 576], bf16_ns=0,
                ranking=[dict(kernel=kernel, config=list(config), split_k=1, ns=5)])  # fmt: skip
    if valid:
        assert to_json(entry_from_json(item)) == item
    else:
        with pytest.raises(Refused, match="an unknown word"):
            entry_from_json(item)


def test_what_a_network_asks_for_can_be_kept():
    """Every problem of ResNet-50's, whatever is in first place."""
    from fqt import suites
    from fqt.candidates import candidates

    met = suites.problems(["resnet50-conv"], H100, ["int8", "psq8"])
    for p in met:
        ranking = tuple(Timing(*c, 5) for c in candidates(p)[: tuned.MAX_RANKING])
        entry = Entry(key(p), ranking, 0, (p.m, p.n, p.k))
        assert entry_from_json(to_json(entry)) == entry


def test_the_docstring_of_a_problem_has_the_words_of_the_grammar():
    words = {
        w
        for text in conv_problems.GRAMMAR.values()
        for w in re.findall(r"[a-z_]{4,}", text)
        if not w.startswith("per_")
    }
    for word in words - {"tensor", "column", "nearest", "stochastic", "rows", "cols", "both"}:
        assert word in Problem.__doc__, word
    assert conv_nn.kernel_path(nn.Conv2d(16, 16, 3), "image") in conv_problems.PATHS.values()
