"""The operators of a convolution: both backends, the definition, unbiased gradients, shapes without data, refusals."""

import pytest
import torch
import torch.nn.functional as F
from conv_cases import case
from laws import assert_same, assert_unbiased, random_state
from torch.library import opcheck

import fqt
from fqt import conv, conv_ops, conv_products, reference
from fqt.conv import Geometry
from fqt.recipe import Quantizer, Recipe

RECIPES = ("int8", "ptq4", "psq3", "bhq4", "qat8")


def run(x, weight, bias, dy, geometry, recipe, rng=None, dtype=None):
    """y, dx, dw and dbias of the layer's operator."""
    r, leaves = Recipe.parse(recipe), [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    rng = random_state(5, 2) if rng is None else rng
    flat, last = conv_ops.flat(geometry), conv_ops.is_channels_last(x)
    codes = conv_ops.quantize_filters(leaves[1].detach(), r, flat, True)
    y = conv_ops.conv2d(*leaves, codes, rng, str(r), dtype or x.dtype, True, flat, last)
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def dequantized(x, weight, geometry, recipe):
    """X and W as the layer's forward pass sees them, float64."""
    r = Recipe.parse(recipe)
    t = conv.quantize(x.flatten(2), r.x)
    q = t.rows.transpose(1, 2).to(t.scale) * t.scale[:, None, None]
    q = q if t.offset is None else q + t.offset[:, None, None]
    w = reference.quantize(weight.flatten(1), r.w).dequantize()
    return q.unflatten(2, geometry.size).double(), w.view(weight.shape).double()


# ---- both backends


@pytest.mark.parametrize("number", range(64))
def test_kernels_and_reference_agree_to_the_bit(number, device):
    """Of 64 convolutions of every kind, in the layouts that were asked for. A householder transform's float32 sums are in
    an order of the kernel's own: those agree to rounding, of the 8 bits that a code has, and of the sums of float32."""
    t = case(number)
    arguments = [a.to(device) for a in (t.x, t.weight, t.bias, t.dy)]
    rng = random_state(5, 2, device)
    with fqt.backend("reference"):
        expected = run(*arguments, t.geometry, t.recipe, rng.clone())
    with fqt.backend("triton" if device == "cpu" else "auto"):
        found = run(*arguments, t.geometry, t.recipe, rng.clone())
    transformed = t.recipe.startswith(("bhq", "auto"))
    for what, a, b in zip(("y", "dx", "dw", "dbias"), found, expected, strict=True):
        strides = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (a, b)]
        assert strides[0] == strides[1] and a.dtype == b.dtype, what
        if what == "dbias" or (what == "dx" and transformed) or t.recipe == "qat8":
            # Sums in another order: of at most 17·36 elements in a bias' gradient, each below 5; T mixes 17 images, whose
            # codes may differ by one where T dY lies between two codes, 1/15 of a range of 10 (bhq5), times 5 · 100.
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-3 if what == "dbias" else 2e-4 * float(b.detach().abs().max() + 1)
            )
        else:
            assert_same(a, b, what)


@pytest.mark.parametrize("recipe", ["int8", "ptq8", "psq8"])
def test_memory_formats_change_no_bit(recipe):
    t = case(12)
    one, other = (
        run(t.x.contiguous(memory_format=m), t.weight, t.bias, t.dy.contiguous(memory_format=m), t.geometry, recipe)
        for m in (torch.contiguous_format, torch.channels_last)
    )
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    assert one[0].is_contiguous() and one[1].is_contiguous()
    assert conv_ops.is_channels_last(other[0]) and conv_ops.is_channels_last(other[1])


# ---- the definition


@pytest.mark.parametrize("recipe", ["qat8", "int8", "psq8"])
@pytest.mark.parametrize("number", [0, 2, 5, 6, 8])
def test_the_forward_pass_is_the_convolution_of_the_dequantized_operands(number, recipe):
    t = case(number)
    x, w = t.x.double(), t.weight.double()
    y = run(x, w, t.bias.double(), t.dy.double(), t.geometry, recipe)[0]
    xq, wq = dequantized(x, w, t.geometry, recipe)
    expected = F.conv2d(F.pad(xq, t.surroundings), wq, t.bias.double(), **t.options)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-9)  # as in test_conv.py
    assert torch.linalg.norm(y - F.conv2d(F.pad(x, t.surroundings), w, t.bias.double(), **t.options)) < 0.05 * y.norm()


def strided():
    """Images and gradients of very different sizes, with stride, asymmetric padding and groups, float64."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    padding = ((1, 1), (0, 2))
    g = Geometry.of((5, 4), (3, 2), (2, 1), padding, groups=2)
    x, w, b = normal(8, 4, 5, 4), normal(6, 2, 3, 2), normal(6)
    dy = normal(8, 6, *g.out) * normal(8, 1, 1, 1).exp()
    return g, padding, x, w, b, dy


@pytest.mark.parametrize("recipe", RECIPES[:4])
def test_gradients_are_unbiased_estimates_of_qat(recipe):
    """E[gradient] is the gradient of the QAT layer, differentiated in float64 by torch (straight-through)."""
    g, padding, x, w, b, dy = strided()
    leaves = [t.requires_grad_() for t in dequantized(x, w, g, recipe)]
    surroundings = (*padding[1], *padding[0])
    y = F.conv2d(F.pad(leaves[0], surroundings), leaves[1], b, stride=g.stride, groups=2)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    draws = [run(x, w, b, dy, g, recipe, random_state(5, step)) for step in range(160)]
    assert_unbiased(lambda i: draws[i][1].flatten(1), dx.flatten(1), 160)
    assert_unbiased(lambda i: draws[i][2].flatten(1), dw.flatten(1), 160)
    assert len({float(draw[1].sum()) for draw in draws}) > 150 and len({float(draw[2].sum()) for draw in draws}) > 150
    torch.testing.assert_close(draws[0][3], dy.sum((0, 2, 3)))


def test_qat_gradients_are_exact():
    g, padding, x, w, b, dy = strided()
    leaves = [t.requires_grad_() for t in dequantized(x, w, g, "qat8")]
    y = F.conv2d(F.pad(leaves[0], (*padding[1], *padding[0])), leaves[1], b, stride=g.stride, groups=2)
    for found, expected in zip(run(x, w, b, dy, g, "qat8")[1:3], torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_of_a_transform_images_are_the_rows():
    """One image with a gradient a thousand times the others': BHQ spreads it over their codes, PSQ does not."""
    g, _, x, w, b, dy = strided()
    dy = dy / dy.abs().amax((1, 2, 3), keepdim=True)
    dy[1:] /= 1000
    expected = run(x, w, b, dy, g, "qat8")[1]
    variance = {
        recipe: sum(
            float((run(x, w, b, dy, g, recipe, random_state(1, i))[1] - expected).square().sum()) for i in range(20)
        )
        for recipe in ("psq4", "bhq4")
    }
    assert variance["bhq4"] < 0.5 * variance["psq4"]  # 1/8 where followers are nothing at all


def test_a_constant_image_has_an_exact_gradient_through_a_transform():
    g, _, x, w, b, dy = strided()
    dy[2] = 0.75
    found = run(x, w, b, dy, g, "bhq2")[1]
    exact = run(x, w, b, dy, g, "qat8")[1]
    torch.testing.assert_close(found[2], exact[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[3], exact[3], rtol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_non_finite_gradient_is_never_silently_finite(recipe):
    g, _, x, w, b, dy = strided()
    dy[1, 0, 1, 1] = torch.nan
    _, dx, dw, dbias = run(x, w, b, dy, g, recipe)
    assert not dw[0].isfinite().all() and not dbias[0].isfinite()
    # Per image (PSQ, int8) the image; a transform's group; the tensor; in full precision what the pixel reaches.
    assert not dx[1].isfinite().all()
    if recipe in ("psq3", "int8"):
        assert not dx[1].isfinite().any() and dx[0].isfinite().all() and dx[2:].isfinite().all()


# ---- sizes


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_empty_batch_gives_empty_outputs_and_gradients_of_zero(recipe):
    t = case(2)
    y, dx, dw, dbias = run(t.x[:0], t.weight, t.bias, t.dy[:0], t.geometry, recipe)
    assert y.shape == t.dy[:0].shape and dx.shape == t.x[:0].shape
    assert not dw.any() and not dbias.any() and dw.shape == t.weight.shape


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("number", [1, 3, 4])
def test_wgrad_adds_to_a_gradient_as_autograd_would(number, backend, device):
    """In float32 the very bits: the same additions in the same order."""
    t, r = case(number), Recipe.parse("int8")
    x, w, dy = (a.to(device) for a in (t.x, t.weight, t.dy))
    weight, flat = w.clone().requires_grad_(), conv_ops.flat(t.geometry)
    codes = conv_ops.quantize_filters(w, r, flat, True)
    grads = []
    for accumulate in (False, True):
        weight.grad, rng = torch.ones_like(weight), random_state(1, device=device)
        address = weight.grad.data_ptr()
        with fqt.backend(backend):
            arguments = x, weight, None, codes, rng, "int8", x.dtype, True, flat, False, accumulate
            conv_ops.conv2d(*arguments).backward(dy)
        grads.append(weight.grad.clone())
        assert not accumulate or weight.grad.data_ptr() == address
    assert torch.equal(*grads) and not torch.equal(grads[0], torch.ones_like(weight))


def test_few_channels_are_written_out_under_each_window():
    t = case(0)
    g = t.geometry
    rows = torch.randint(-127, 128, (len(t.x), g.pixels, t.x.shape[1]), dtype=torch.int8)
    found = conv_products.im2col(rows, g)
    images = F.pad(rows.transpose(1, 2).float().unflatten(2, g.size), t.surroundings)
    expected = F.unfold(images, g.kernel, g.dilation, 0, g.stride)
    expected = expected.unflatten(1, (-1, g.taps)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(found.float(), expected)
    assert [conv_products.path(g, c) for c in (15, 16)] == ["im2col", "implicit GEMM"]
    assert conv_products.path(Geometry((4, 4), (4, 4), (1, 1)), 3) == "1x1 GEMM"


# ---- operators


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("number", [2, 8, 13])
def test_the_operators_pass_opcheck(number, recipe):
    t, r = case(number), Recipe.parse(recipe)
    flat, rng, last = conv_ops.flat(t.geometry), random_state(1), conv_ops.is_channels_last(t.x)
    c = conv_ops.quantize_filters(t.weight, r, flat, True)
    leaves = [x.clone().requires_grad_() for x in (t.x, t.weight, t.bias)]
    forward = (*leaves, c.f, c.b, c.scale, c.offset, c.f_sum, c.b_sum, rng, str(r), torch.float32, True, flat, last)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(conv_ops.forward, forward, test_utils=tests)
    _, cols, scale, offset = conv_ops.forward(*forward)
    f32, channels = [torch.float32] * 3, t.x.shape[1]
    for needs in ((True, True, True), (False, True, False)):
        more = (rng, 0, str(r), *f32, *needs, channels, flat, last, False)
        opcheck(
            conv_ops.backward, (t.dy, cols, scale, offset, c.b, c.scale, c.offset, c.b_sum, *more), test_utils=tests
        )
    forward = (*forward[:12], False, *forward[13:])
    opcheck(conv_ops.forward, forward, test_utils=tests)


def test_geometries_survive_as_numbers():
    g = case(6).geometry
    assert conv_ops.unflat(conv_ops.flat(g)) == g


def test_a_second_derivative_raises():
    t = case(0)
    x = t.x.clone().requires_grad_()
    flat = conv_ops.flat(t.geometry)
    codes = conv_ops.quantize_filters(t.weight, Recipe.int8(), flat, True)
    y = conv_ops.conv2d(x, t.weight, None, codes, random_state(), "int8", x.dtype, True, flat, False)
    (dx,) = torch.autograd.grad(y, x, t.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_only_codes_of_the_input_are_saved():
    t = case(4)
    x, weight = t.x.clone().requires_grad_(), t.weight.clone().requires_grad_()
    flat = conv_ops.flat(t.geometry)
    codes = conv_ops.quantize_filters(t.weight, Recipe.int8(), flat, True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        conv_ops.conv2d(x, weight, None, codes, random_state(), "int8", x.dtype, True, flat, False)
    n, c = x.shape[:2]
    assert {s.dtype for s in saved if s.dim() > 1} == {torch.int8}
    assert sum(s.numel() for s in saved) <= c * t.geometry.pixels * conv.padded_images(n) + 2 * weight.numel() * 16 + 64


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe.fp8(), "int8 codes"),
        (
            Recipe(*[Quantizer(8, "per_row")] * 2, dgrad=Quantizer(8, "per_row", range="bound", rounding="stochastic")),
            "exact ranges",
        ),
    ],
)
def test_recipes_that_convolutions_do_not_have_are_known(recipe, says):
    assert says in conv_ops.reason_against(recipe)
    assert conv_ops.reason_against(Recipe.int8()) is None
