"""Laws of the scaled product's other outputs: C added to what is there, and the row maxima of what was stored."""

import math

import laws
import pytest
import torch
from products import INTERPRETED, launch, pair

import fqt_kernels.gemm as kernels
from fqt import reference

AFFINE = ("per_row", True, "per_tensor", True)
LOWEST = -(2**31)
# The interpreter's programs are few; one has columns to spare, one stores its tile in chunks.
CONFIGS = [(32, 32, 64, 4, 2), (64, 64, 32, 1, 1)]
# split_k is for NVIDIA only.
SPLITS = (1,) if torch.version.hip else (1, 2)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def memory(guard):
    return guard(kernels)


def existing(m, n, stride, dtype, device, seed=0):
    """A matrix (m, n) of rows `stride` elements apart with poison around and between them, and a copy of its values."""
    values = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return laws.poisoned_rows(values.to(device), stride), values


def frame_of(view):
    """All of the memory that `laws.poisoned_rows` made for a view, as bytes."""
    m, stride = view.shape[0], view.stride(0)
    return view.as_strided(((m + 2) * stride,), (1,), 0).cpu().view(torch.uint8).clone()


# ---- C += A Bᵀ


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("m, n, stride", [(1, 1, 1), (33, 31, 31), (35, 64, 64), (40, 48, 80), (65, 61, 64)])
def test_the_product_is_added_to_out(m, n, stride, config, split, device):
    """Bit for bit in float32; nothing between the rows of out changes; the result is out itself."""
    a, b = pair(m, n, 80, AFFINE)
    bias = torch.randn(n)
    out, before = existing(m, n, stride, torch.float32, device)
    frame = frame_of(out)
    got = launch(a, b, bias, config=config, split_k=split, out=out, device=device)
    assert got is out
    laws.assert_same(out, before + reference.scaled_mm(a, b, bias))
    out.copy_(before)
    assert torch.equal(frame_of(out), frame)


def test_a_sum_of_products_is_that_of_their_outputs(device):
    """Three micro-batches into one gradient, in order."""
    out, expected = torch.zeros(17, 33, device=device), torch.zeros(17, 33)
    for seed in range(3):
        a, b = pair(17, 33, 48, ("per_row", False, "none", False), seed)
        launch(a, b, out=out, device=device)
        expected += reference.scaled_mm(a, b)
    laws.assert_same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once(dtype, device):
    """Of the product in float32, which float16 would round before. The interpreter truncates bfloat16: within one ulp."""
    a, b = pair(33, 31, 80)
    a = a._replace(scale=a.scale / 4096)
    out, before = existing(33, 31, 31, dtype, device)
    product = reference.scaled_mm(a, b)
    expected = (before.float() + product).to(dtype)
    assert not torch.equal(expected, (before.float() + product.to(dtype).float()).to(dtype))
    launch(a, b, out=out, device=device)
    if INTERPRETED and dtype == torch.bfloat16:
        assert bool(((out.cpu().float() - expected.float()).abs() <= laws.ulp(expected)).all())
    else:
        laws.assert_same(out, expected)


def test_no_output_is_made_where_one_is_given(memory, device):
    a, b = pair(17, 33, 48)
    launch(a, b, out=torch.zeros(17, 33, device=device), device=device)
    assert memory.made == 0


# ---- the maxima of rows


def lowest(m, device):
    """Nothing's maxima, guarded on both sides."""
    return laws.poisoned_tail(torch.full((m,), LOWEST, dtype=torch.int32, device=device))


def magnitudes(c):
    """(M,) int32: the bits of max |c| of each row, a NaN being more than infinity."""
    return c.cpu().float().abs().view(torch.int32).amax(1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("m, n", [(1, 1), (33, 31), (35, 64), (65, 97)])
def test_the_maxima_are_those_of_the_rows(m, n, config, split, device):
    """Affine, so that columns beyond the last would have values of their own; over one tile of columns or several."""
    a, b = pair(m, n, 80, AFFINE)
    row_absmax = lowest(m, device)
    out = launch(a, b, config=config, split_k=split, row_absmax=row_absmax, device=device)
    laws.assert_same(out, reference.scaled_mm(a, b))
    laws.assert_same(row_absmax, magnitudes(out))


def test_columns_beyond_the_last_have_no_part_in_a_maximum(device):
    """With an offset on either side they would be v = oa·ob·K, which the bias takes away from the others."""
    a, b = pair(1, 33, 64, AFFINE)
    a, b = a._replace(scale=a.scale * 1e-9, offset=torch.tensor([4.0])), b._replace(scale=b.scale * 1e-9)
    b = b._replace(offset=torch.tensor([2.0]))
    row_absmax = lowest(1, device)
    out = launch(a, b, torch.full((33,), -4.0 * 2.0 * 64), row_absmax=row_absmax, device=device)
    assert float(out.abs().max()) < 1
    laws.assert_same(row_absmax, magnitudes(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_maxima_are_those_of_what_was_stored(dtype, device):
    """Rounded, and with what was there before."""
    a, b = pair(33, 31, 80)
    a = a._replace(scale=a.scale / 4096)
    row_absmax = lowest(33, device)
    out = launch(a, b, out_dtype=dtype, row_absmax=row_absmax, device=device)
    laws.assert_same(row_absmax, magnitudes(out))
    assert bool((row_absmax.cpu() != magnitudes(reference.scaled_mm(a, b))).any())
    out, _ = existing(33, 31, 48, dtype, device)
    row_absmax = lowest(33, device)
    launch(a, b, out=out, row_absmax=row_absmax, device=device)
    laws.assert_same(row_absmax, magnitudes(out))


def test_a_maximum_only_grows(device):
    """It starts from what is there: 1e30 stays, as does a NaN's, and a row of zeros is 0, above nothing."""
    a, b = pair(4, 5, 48)
    a.q[3] = 0
    there = torch.tensor([1e30, math.nan, 0.0, 0.0]).view(torch.int32)
    there[2:] = LOWEST
    row_absmax = there.to(device)
    out = launch(a, b, row_absmax=row_absmax, device=device)
    expected = torch.cat([there[:2], magnitudes(out)[2:]])
    laws.assert_same(row_absmax, expected)
    assert expected[3] == 0


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_a_non_finite_row_has_a_non_finite_maximum(value, device):
    """NaN above infinity, whatever its sign, as in `magnitude`; 0·∞ is NaN. No other row sees it."""
    a, b = pair(9, 40, 48)
    b.q[7] = 0  # a zero among the sums
    clean = magnitudes(reference.scaled_mm(a, b))
    a.scale[3] = value
    row_absmax = lowest(9, device)
    launch(a, b, row_absmax=row_absmax, device=device)
    row_absmax = row_absmax.cpu()
    assert int(row_absmax[3]) > 0x7F800000
    row_absmax[3] = clean[3]
    laws.assert_same(row_absmax, clean)


# ---- refusals


@pytest.mark.parametrize(
    "options, error, says",
    [
        (dict(out=torch.zeros(3, 3)), ValueError, r"out must be \(3, 2\).*got \(3, 3\)"),
        (dict(out=torch.zeros(2, 3).t()), ValueError, r"of strides \(1, 3\)"),
        (dict(out=torch.zeros(1, 2).expand(3, 2)), ValueError, r"of strides \(0, 1\)"),
        (dict(out=torch.zeros(3, 2, device="meta")), ValueError, "on meta"),
        (dict(out=torch.zeros(3, 2, dtype=torch.float64)), TypeError, "float64"),
        (dict(out=torch.zeros(3, 2, dtype=torch.int32)), TypeError, "int32"),
        (dict(out=torch.zeros(3, 2), out_dtype=torch.float16), TypeError, "out is torch.float32, wanted torch.float16"),
        (dict(row_absmax=torch.zeros(2, dtype=torch.int32)), ValueError, r"row_absmax must be \(3,\).*got \(2,\)"),
        (dict(row_absmax=torch.zeros(3)), ValueError, "float32"),
        (dict(row_absmax=torch.zeros(6, dtype=torch.int32)[::2]), ValueError, "contiguous"),
        (dict(row_absmax=torch.zeros(3, dtype=torch.int32, device="meta")), ValueError, "on meta"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(options, error, says, device):
    if not INTERPRETED:
        options = {name: t if getattr(t, "is_meta", True) else t.to(device) for name, t in options.items()}
    a, b = pair(3, 2, 64)
    with pytest.raises(error, match=says):
        launch(a, b, device=device, **options)
