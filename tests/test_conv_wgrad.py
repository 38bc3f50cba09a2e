"""The kernels of wgrad against `fqt.conv.wgrad`, bit for bit: exact integer sums, then the same operations."""

import itertools
import math

import laws
import pytest
import torch

import fqt_kernels.conv_wgrad as kernels
from fqt import conv
from fqt.conv import Geometry, Images
from fqt_kernels.conv_wgrad import conv_wgrad, least_splits
from fqt_kernels.gemm import MAX_INT32_TERMS

SMALL = (16, 64, 64, 1, 1)  # the interpreter's cost is per program and per block
# size, kernel, stride, padding (before, after) of both directions, dilation, groups; images, C, O
GEOMETRIES = {
    "3x3": ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, 16, 3, 17),
    "3x3 inside": ((5, 4), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, 33, 2, 5),
    "1x1 strided": ((6, 5), (1, 1), (2, 3), ((0, 0), (0, 0)), (1, 1), 1, 64, 16, 3),
    "7x7 of few channels": ((9, 8), (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 1, 5, 3, 4),
    "after only": ((7, 9), (3, 2), (1, 2), ((0, 2), (0, 1)), (2, 1), 1, 1, 3, 2),
    "asymmetric and dilated": ((8, 5), (4, 3), (3, 1), ((2, 0), (0, 4)), (2, 2), 1, 16, 2, 3),
    "5x6": ((4, 7), (5, 6), (1, 1), ((2, 3), (4, 1)), (1, 1), 1, 64, 1, 1),
    "one row": ((1, 11), (1, 4), (1, 2), ((0, 0), (2, 2)), (1, 2), 1, 5, 4, 3),
    "groups": ((4, 5), (3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1), 3, 16, 6, 9),
    "depthwise": ((5, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 3, 33, 3, 3),
    "one pixel": ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, 16, 1, 2),
    "more outputs than pixels": ((2, 2), (2, 2), (1, 1), ((3, 2), (2, 3)), (1, 1), 1, 5, 2, 3),
    "outside only": ((1, 2), (1, 1), (7, 7), ((3, 3), (3, 3)), (1, 1), 1, 16, 2, 2),
}

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def memory(guard):
    """What the launcher allocates lies between guard bands; fresh memory holds poison."""
    return guard(kernels)


def operands(name, affine=True, several=True):
    """(dY, X, the scale of X, geometry, images) with scales of many magnitudes; several: a scale for each channel of dY."""
    *geometry, n, c, o = GEOMETRIES[name]
    geometry = Geometry.of(*geometry)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in
            ((o, geometry.out_pixels, conv.padded_images(n)), (c, geometry.pixels, conv.padded_images(n))))  # fmt: skip
    a[..., n:], b[..., n:] = 0, 0
    scale, offset = torch.exp(2 * torch.randn(o if several else 1)), torch.randn(o if several else 1)
    h = Images(None, a, scale, offset if affine else None)
    x = Images(None, b, torch.rand(1), torch.randn(1) if affine else None)
    return h, x, x.scale if affine or several else None, geometry, n


def expected(h, x, x_scale, geometry, n):
    return conv.wgrad(h, x, x_scale, geometry, n).unflatten(2, geometry.kernel)


def launch(h, x, x_scale, geometry, n, device, config=SMALL, **options):
    """The kernels, on operands between poison."""
    table, row_term = conv.wgrad_terms(h, x, x_scale, geometry, n)
    a, b = (laws.poisoned_tail(q.flatten()).view(q.shape).to(device) for q in (h.cols, x.cols))
    vectors = [None if t is None else t.to(device) for t in (h.scale, x_scale, h.offset, table, row_term)]
    names = "a_scale", "b_scale", "a_offset", "table", "row_term"
    return conv_wgrad(a, b, n, geometry, **dict(zip(names, vectors, strict=True)), config=config, **options)


# ---- every geometry


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_wgrad_equals_the_reference(name, splits, device):
    """Affine operands and symmetric ones; scales of dY for each channel and one, that of X given or folded into dY."""
    case = operands(name, affine=splits == 1, several=list(GEOMETRIES).index(name) % 2 == 0)
    laws.assert_same(launch(*case, device, splits=splits), expected(*case), name)


@pytest.mark.parametrize("name", ["3x3 inside", "asymmetric and dilated"])
def test_neither_tiles_nor_splits_show_in_any_bit(name, device):
    case = operands(name)
    want = expected(*case)
    for splits in range(2, 8):
        config = (32, 32, 32, 1, 1) if splits % 2 else (16, 16, 128, 1, 1)
        laws.assert_same(launch(*case, device, config, splits=splits), want, f"{splits} splits of {config}")


@pytest.mark.parametrize("splits, made", [(1, 1), (3, 3), (4, 3)])
def test_a_workspace_has_a_part_for_each_split_that_has_blocks(splits, made, memory, monkeypatch, device):
    """5 blocks of K: 3 programs have 2, 2 and 1 of them, and so have 4."""
    shapes, empty = [], memory.empty
    monkeypatch.setattr(memory, "empty", lambda *shape, **options: shapes.append(shape) or empty(*shape, **options))
    launch(*operands("3x3 inside"), device, splits=splits)
    assert shapes[0] == (made, 5, 32)  # 18 columns


@pytest.mark.parametrize("name", ["asymmetric and dilated", "after only"])
def test_offsets_of_64_bits_change_nothing(name, device, monkeypatch):
    monkeypatch.setattr(kernels, "is_wide", lambda *spans: True)
    case = operands(name)
    laws.assert_same(launch(*case, device, splits=2), expected(*case))


def test_images_beyond_n_that_are_zero_add_nothing(device):
    """Rows of 16 codes for 5 images, which as such have 5."""
    h, x, *rest = operands("one row")
    padded = [t._replace(cols=torch.nn.functional.pad(t.cols, (0, 11))) for t in (h, x)]
    laws.assert_same(launch(*padded, *rest, device), expected(h, x, *rest))


# ---- added to a gradient


def gradient(shape, order, dtype):
    """A tensor whose dimensions lie in memory in this order, the slowest first, and a copy of its values."""
    values = torch.randn(shape).to(dtype)
    inverse = [order.index(d) for d in range(4)]
    return values.permute(order).contiguous().permute(inverse).clone(), values


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2)], ids=["contiguous", "channels_last", "other"]
)
@pytest.mark.parametrize("name", ["groups", "3x3"])
def test_the_gradient_is_added_to_out_whatever_its_strides(name, order, device):
    case = operands(name)
    want = expected(*case)
    out, before = gradient(want.shape, order, torch.float32)
    out = out.to(device)
    strides = out.stride()
    got = launch(*case, device, out=out, splits=2)
    assert got is out and out.stride() == strides
    laws.assert_same(out, before + want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once(dtype, device):
    """Of the gradient in float32. The interpreter truncates bfloat16: within one ulp."""
    h, *rest = operands("3x3", affine=False)
    case = h._replace(scale=h.scale / 2**24), *rest
    want = expected(*case)
    out, before = gradient(want.shape, (0, 2, 3, 1), dtype)
    rounded = (before.float() + want).to(dtype)
    assert not torch.equal(rounded, (before.float() + want.to(dtype).float()).to(dtype))
    out = launch(*case, device, out=out.to(device)).cpu()
    new = launch(*case, device, out_dtype=dtype).cpu()
    assert out.dtype == new.dtype == dtype
    for got, exact in ((out, rounded), (new, want.to(dtype))):
        if device == "cpu" and dtype == torch.bfloat16:
            assert bool(((got.float() - exact.float()).abs() <= laws.ulp(exact)).all())
        else:
            laws.assert_same(got, exact)


# ---- long sums


def long_steps(device: str, block_k: int) -> tuple[int, ...]:
    """Of few steps, which the interpreter takes its time for; of a GPU as many as its shared memory allows."""
    return (16, 16, block_k if device == "cpu" else 1024, 4, 2)


def test_a_long_sum_of_extreme_codes_is_exact(device):
    """200 704 terms: rows of -128, of 127 and mixed times the former two; the launcher splits what asks for no split."""
    n, geometry = 64, Geometry.of((56, 56), (1, 1))
    terms = n * geometry.out_pixels
    assert terms == 200_704 > MAX_INT32_TERMS
    a = torch.stack(
        [torch.full((3136, n), -128), torch.full((3136, n), 127), torch.randint(0, 2, (3136, n)) * 255 - 128]
    )
    a = a.to(torch.int8)
    b = a[:2].clone()
    out = conv_wgrad(a.to(device), b.to(device), n, geometry, a_scale=torch.ones(1, device=device),
                     config=long_steps(device, 4096), splits=1)  # fmt: skip
    exact = [[terms * 2**14, -terms * 128 * 127], [-terms * 128 * 127, terms * 127**2]]
    laws.assert_same(out[:2, :, 0, 0], torch.tensor(exact).float())
    total = a[2].sum(dtype=torch.int64)
    laws.assert_same(out[2, :, 0, 0], torch.stack([-128 * total, 127 * total]).float())


def test_a_long_sum_with_a_border_is_exact(device):
    """3x3 with 802 816 outputs, all codes -128: a tap that lies outside of a whole row or column has as many terms less."""
    n, geometry = 256, Geometry.of((56, 56), (3, 3), padding=((1, 1), (1, 1)))
    a, b = (torch.full((1, 3136, n), -128, dtype=torch.int8, device=device) for _ in range(2))
    out = conv_wgrad(a, b, n, geometry, a_scale=torch.ones(1, device=device), config=long_steps(device, 8192), splits=1)
    inside = [55, 56, 55]
    exact = torch.tensor([[y * x * n * 2**14 for x in inside] for y in inside])
    laws.assert_same(out[0, 0], exact.float())


def test_as_few_programs_share_a_sum_as_int32_allows():
    for terms, block in itertools.product((1, 4096, 131_071, 131_072, 200_704, 802_816), (32, 64, 128, 256, 4096)):
        splits, blocks = least_splits(terms, block), math.ceil(terms / block)
        assert math.ceil(blocks / splits) * block <= MAX_INT32_TERMS
        assert splits == 1 or math.ceil(blocks / (splits - 1)) * block > MAX_INT32_TERMS


# ---- bad arguments


def _change(**changes):
    """Arguments of a launch that fits, with these changes; a function is applied to what is there."""
    (h, x, x_scale, geometry, n) = operands("groups")
    table, row_term = conv.wgrad_terms(h, x, x_scale, geometry, n)
    arguments = dict(a=h.cols, b=x.cols, n=n, geometry=geometry, a_scale=h.scale, b_scale=x_scale, a_offset=h.offset,
                     table=table, row_term=row_term, config=SMALL)  # fmt: skip
    return arguments | {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "must be int8, got torch.int16", dict(a=lambda t: t.short())),
        (ValueError, r"\(O, 10, images\)", dict(a=lambda t: t[:, 1:])),
        (ValueError, "must be contiguous", dict(b=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))),
        (ValueError, "n is 17", dict(n=17)),
        (ValueError, "n is 0", dict(n=0)),
        (ValueError, "8 output and 6 input channels do not make 3 groups", dict(a=lambda t: t[:8])),
        (ValueError, "splits must be at least 1, got 0", dict(splits=0)),
        (ValueError, "a_offset and table come together", dict(table=None)),
        (ValueError, "a_scale must be", dict(a_scale=lambda t: t[:4])),
        (ValueError, "b_scale must be", dict(b_scale=lambda t: t.double())),
        (ValueError, "table must be", dict(table=lambda t: t[:3])),
        (TypeError, "out is torch.float64", dict(out=torch.zeros(9, 2, 3, 3, dtype=torch.float64))),
        (TypeError, "out is torch.int32", dict(out_dtype=torch.int32)),
        (ValueError, r"out must be \(9, 2, 3, 3\)", dict(out=torch.zeros(9, 2, 3, 2))),
        (ValueError, "of dense strides", dict(out=torch.zeros(9, 2, 3, 6)[..., ::2])),
        (ValueError, "of dense strides", dict(out=torch.zeros(9, 2, 3, 1).expand(9, 2, 3, 3))),
    ],
)
def test_what_does_not_fit_is_refused(error, message, changes):
    with pytest.raises(error, match=message):
        conv_wgrad(**_change(**changes))
