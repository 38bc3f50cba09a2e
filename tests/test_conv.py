"""The definition of convolutions of codes: geometry, borders, codes of images, and the three products."""

import pytest
import torch
import torch.nn.functional as F
from conv_cases import case
from torch import Tensor

from fqt import conv, reference
from fqt.conv import Filters, Geometry, Images
from fqt.recipe import Quantizer

SYMMETRIC, GRID, MIN = Quantizer(8, "per_row"), Quantizer(8, "per_tensor", "grid"), Quantizer(8, "per_tensor", "min")
PER_IMAGE, PER_CHANNEL = Quantizer(8, "per_row", "min"), Quantizer(8, "per_column", "min")


def values(t: Images, n: int) -> Tensor:
    """The dequantized images (N, C, pixels), float64."""
    q = t.rows.transpose(1, 2) if t.rows is not None else t.cols[..., :n].permute(2, 0, 1)
    per = (1, -1, 1) if t.rows is None else (-1, 1, 1)
    x = q.double() * t.scale.view(per)
    return x if t.offset is None else x + t.offset.view(per)


# ---- geometry


@pytest.mark.parametrize("number", range(16))
def test_the_output_has_the_size_that_torch_gives(number):
    t = case(number)
    assert F.conv2d(F.pad(t.x, t.surroundings), t.weight, **t.options).shape == t.dy.shape


def test_a_kernel_larger_than_the_padded_image_is_refused():
    with pytest.raises(
        ValueError, match=r"a kernel that spans \(5, 1\) pixels is larger than the padded image \(4, 3\)"
    ):
        Geometry.of((3, 3), (3, 1), padding=((1, 0), (0, 0)), dilation=(2, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("number", [0, 2, 5, 6, 14])
def test_the_border_counts_the_taps_inside(number, transposed):
    t = case(number)
    g = t.geometry
    border = conv.border(g, transposed)
    ones = torch.ones(1, 1, *(g.out if transposed else g.size), dtype=torch.float64)
    each = torch.arange(1.0, g.taps + 1, dtype=torch.float64)  # tells which taps they are, not only how many
    w = each.view(1, 1, *g.kernel)
    if transposed:
        padded = torch.zeros(1, 1, *(s + sum(p) for s, p in zip(g.size, t.padding, strict=True)), dtype=torch.float64)
        expected = torch.nn.grad.conv2d_input(padded.shape, w, ones, stride=g.stride, dilation=g.dilation)
        (top, _), (left, _) = t.padding
        expected = expected[..., top : top + g.size[0], left : left + g.size[1]]
    else:
        expected = F.conv2d(F.pad(ones, t.surroundings), w, stride=g.stride, dilation=g.dilation)
    found = border.sums(each.int()[None])[border.classes.long(), 0]
    assert torch.equal(found, expected.flatten())


def test_an_image_with_padding_has_nine_kinds_of_pixels():
    assert len(conv.border(Geometry.of((56, 56), (3, 3), padding=((1, 1), (1, 1)))).masks) == 9


# ---- codes of images


@pytest.mark.parametrize("quantizer", [SYMMETRIC, GRID, MIN, PER_IMAGE], ids=str)
def test_an_image_is_a_row_of_a_matrix(quantizer):
    x = torch.randn(3, 5, 7)
    images = conv.quantize(x, quantizer, channels=16, cols=True)
    matrix = reference.quantize(x.flatten(1), quantizer)
    assert torch.equal(images.rows[..., :5].transpose(1, 2), matrix.q.view(3, 5, 7)) and not images.rows[..., 5:].any()
    assert torch.equal(images.cols.permute(2, 0, 1), matrix.q.view(3, 5, 7))
    assert torch.equal(images.scale, matrix.scale.flatten())


def test_batches_of_sixteen_and_more_are_padded_to_whole_pieces():
    assert [conv.padded_images(n) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 15, 16, 32, 32]
    cols = conv.quantize(torch.ones(17, 2, 3), GRID, rows=False, cols=True).cols
    assert cols.shape == (2, 3, 32) and not (cols[..., 17:]).any()


def test_random_bits_are_those_of_pixels_by_channels():
    rng, x = torch.tensor([7, 3]), torch.rand(2, 3, 5)
    quantizer = Quantizer(4, "per_column", "symmetric", "stochastic")
    q = conv.quantize(x, quantizer, rng=rng, stream=1, rank=2).rows
    matrix = reference.quantize(x.transpose(1, 2).reshape(10, 3), quantizer, rng=rng, stream=1, rank=2)
    assert torch.equal(q.reshape(10, 3), matrix.q)


def test_a_nan_stays_in_its_image_its_channel_or_its_tensor():
    x = torch.randn(3, 4, 5)
    x[1, 2, 3] = torch.nan
    for quantizer, bad in ((PER_IMAGE, [1]), (GRID, [0])):
        scale = conv.quantize(x, quantizer).scale
        assert (~scale.isfinite()).nonzero().flatten().tolist() == bad
    assert (~conv.quantize(x, PER_CHANNEL).scale.isfinite()).nonzero().flatten().tolist() == [2]


def test_sums_are_those_of_a_pixels_channels_of_each_group():
    t = conv.quantize(torch.randn(2, 6, 3), GRID, groups=3, sums=True)
    assert torch.equal(t.sums, torch.stack([t.rows[..., i : i + 2].sum(2) for i in (0, 2, 4)], 2).int())


def test_filters_of_either_direction_hold_the_same_codes():
    t = case(2)
    q = torch.randint(-127, 128, t.weight.shape, dtype=torch.int8)
    f, b = conv.filters(q, t.geometry, 0)
    assert torch.equal(f.transpose(1, 2).reshape(q.shape), q)
    assert torch.equal(conv.from_back(b, t.geometry, len(q)), q)


# ---- the products


def operands(number: int):
    """A case's operands by quantizers that take turns, in float64: X, W (the matrix), the filters of both directions."""
    t, g = case(number), case(number).geometry
    for_x = (GRID, SYMMETRIC, MIN)[number % 3]
    for_w = (GRID, SYMMETRIC, MIN, GRID)[number % 4]
    x = conv.quantize(t.x.flatten(2).double(), for_x, groups=g.groups, cols=True, sums=True)
    w = reference.quantize(t.weight.flatten(1).double(), for_w)
    f, b = conv.filters(w.q.view(t.weight.shape), g, 0)
    scale, offset = w.scale.flatten(), None if w.offset is None else w.offset.flatten()
    o, per_group = t.weight.shape[:2]
    forward = Filters(f, scale, offset, f.sum(2, dtype=torch.int32), per_group)
    back = Filters(b, scale if len(scale) == 1 else None, offset, b.sum(2, dtype=torch.int32), o // g.groups)
    return t, x, w, forward, back


# Float64 sums of at most 400 terms of magnitude below 30: 400 · 30 · 2⁻⁵² · 400 is below 2e-9.
EXACT = dict(rtol=0, atol=2e-9)


@pytest.mark.parametrize("number", range(72))
def test_the_products_are_those_of_the_dequantized_operands(number):
    t, x, w, forward, back = operands(number)
    g, n = t.geometry, len(t.x)
    images = values(x, n).unflatten(2, g.size)
    filters = w.dequantize().view(t.weight.shape)
    y = F.conv2d(F.pad(images, t.surroundings), filters, **t.options)
    torch.testing.assert_close(conv.product(x, forward, g).view(y.shape), y, **EXACT)

    dy = t.dy.double().flatten(2)
    g_codes = conv.quantize(dy, (PER_IMAGE, GRID, SYMMETRIC)[number % 3], groups=g.groups, sums=True)
    folded = filters if w.scale.numel() == 1 else w.q.view(t.weight.shape).double()
    leaf = torch.zeros_like(images).requires_grad_()
    of_x = F.conv2d(F.pad(leaf, t.surroundings), folded, **t.options)
    expected = torch.autograd.grad(of_x, leaf, values(g_codes, n).view(y.shape))[0]
    found = conv.product(g_codes, back, g, transposed=True).view(expected.shape)
    torch.testing.assert_close(found, expected, **EXACT)

    h = conv.quantize(dy, (GRID, PER_CHANNEL, Quantizer(8, "per_column"))[number % 3], rows=False, cols=True)
    folded = images if len(x.scale) == 1 else x.rows.transpose(1, 2).double().unflatten(2, g.size)
    leaf = torch.zeros_like(filters).requires_grad_()
    of_w = F.conv2d(F.pad(folded, t.surroundings), leaf, **t.options)
    expected = torch.autograd.grad(of_w, leaf, values(h, n).view(y.shape))[0]
    found = conv.wgrad(h, x, x.scale if len(x.scale) == 1 else None, g, n).view(expected.shape)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_stride_may_leave_the_whole_image_out():
    """All that the only output sees is padding: the first tap lies three pixels to the left of a single pixel."""
    g = Geometry.of((1, 1), (1, 1), (7, 7), ((3, 3), (3, 3)))
    x, w, dy = (torch.full((1, 1, 1), 5, dtype=torch.int8) for _ in range(3))
    assert g.out == (1, 1)
    assert not conv.codes_fprop(x, w, g).any()
    assert not conv.codes_dgrad(dy, w, g).any() and not conv.codes_wgrad(dy, x, g).any()


# Beyond what one float32 sums exactly: channels in parts, float64 of large kernels and groups, nibbles of large batches.
@pytest.mark.parametrize(
    ("n", "c", "o", "size", "kernel", "groups"),
    [(2, 300, 5, 4, 2, 1), (1, 3, 2, 40, 33, 1), (1, 520, 4, 3, 2, 2), (40, 3, 2, 18, 3, 1), (1, 2, 2, 101, 3, 1)],
)
def test_sums_of_codes_are_exact_whatever_their_number(n, c, o, size, kernel, groups):
    g = Geometry.of((size, size), (kernel, kernel), padding=((1, 1), (1, 1)), groups=groups)
    codes = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8)  # noqa: E731
    x, w, dy = codes(n, c, g.pixels), codes(o, c // groups, kernel, kernel), codes(n, o, g.out_pixels)
    # Nearly the largest sums there are, and odd ones, which a float32 does not hold beyond 2²⁴.
    for t in (x[0], x[:, 0], w[0], dy[0], dy[:, 0]):
        t.copy_(127 - 2 * (torch.rand(t.shape) < 0.1))
    f, b = conv.filters(w, g, 0)
    leaves = [t.double().requires_grad_() for t in (x.unflatten(2, g.size), w)]
    y = F.conv2d(*leaves, padding=1, groups=groups)
    dx, dw = torch.autograd.grad(y, leaves, dy.double().view(y.shape))
    assert torch.equal(conv.codes_fprop(x.transpose(1, 2), f, g), y.flatten(2).long())
    assert torch.equal(conv.codes_dgrad(dy.transpose(1, 2), b, g), dx.flatten(2).long())
    found = conv.codes_wgrad(dy.permute(1, 2, 0), x.permute(1, 2, 0), g)
    assert torch.equal(found, dw.flatten(2).long())


@pytest.mark.parametrize("side", [56, 112])
def test_wgrad_of_extreme_codes_leaves_int32_without_overflow(side):
    g = Geometry.of((side, side), (1, 1))
    x = torch.full((1, side * side, 64), -128, dtype=torch.int8)
    assert (
        conv.codes_wgrad(x, x, g).item() == 64 * side * side * 2**14
    )  # 200 704 and 802 816 terms; int32 ends at 131 071


def test_autocast_does_not_reach_the_sums():
    g = Geometry.of((3, 3), (3, 3))
    x, w = torch.full((1, 9, 5), 127, dtype=torch.int8), torch.full((1, 9, 5), 127, dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.codes_fprop(x, w, g).item() == 45 * 127**2
        assert conv.codes_dgrad(torch.full((1, 1, 16), 127, dtype=torch.int8), torch.full((1, 9, 16), 127, dtype=torch.int8),
                                g).unique().item() == 16 * 127**2  # fmt: skip
