"""Laws of ranges that are not found in the values: bounds hold, guesses count what clips, closed forms agree."""

import doctest
import itertools
import math

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fqt
from fqt import ranges, reference
from fqt.ranges import CLIPPED, FIRST, HISTORY, MARGIN, SEEN, Rows, row_ranges_for
from fqt.recipe import Quantizer

LAYOUTS = ("per_row", "per_tensor")


def symmetric(bits=8, granularity="per_row", range="exact", rounding="stochastic"):
    return Quantizer(bits, granularity, "symmetric", rounding, range=range)


def magnitudes(x):
    """Bits of the largest magnitude of each row."""
    return x.float().abs().amax(1).view(torch.int32)


def numbers(bits):
    return bits.view(torch.float32)


def heavy(m, n, seed=0, tail=2.0):
    """Rows of very different sizes, each with a heavy tail."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g) * torch.exp(tail * torch.randn(m, n, generator=g))
    return x * torch.exp(tail * torch.randn(m, 1, generator=g))


# ---- exact: the hand-over changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", LAYOUTS)
@pytest.mark.parametrize("by_row", [False, True])
def test_exact_rows_give_the_very_codes(dtype, granularity, by_row):
    dy = heavy(33, 40, tail=1.0).to(dtype)
    dy[3] = 0
    multiplier = heavy(33, 1, seed=1).abs() if by_row else None
    quantizer = symmetric(granularity=granularity)
    absmax = row_ranges_for(quantizer, dy, multiplier, Rows(magnitudes(dy), exact=True))
    arguments = dict(multiplier=multiplier, rng=laws.random_state(3))
    given, own = (reference.quantize(dy, quantizer, row_absmax=a, **arguments) for a in (absmax, None))
    laws.assert_same(given.q, own.q)
    laws.assert_same(given.scale, own.scale)


def test_exact_takes_no_bound_and_no_folded_columns():
    dy, rows = heavy(4, 8), torch.zeros(4, dtype=torch.int32)
    assert row_ranges_for(symmetric(), dy, None, Rows(rows, exact=False)) is None
    assert row_ranges_for(symmetric(), dy, torch.ones(1, 8), Rows(rows, exact=True)) is None
    assert row_ranges_for(symmetric(), dy) is None
    assert row_ranges_for(Quantizer(8, "per_row", "min", "stochastic"), dy, None, Rows(rows, exact=True)) is None


def test_exact_of_one_row_folds_a_column_multiplier_by_its_largest():
    """(1, N) factors of a single row are factors of columns, (1, 1) is one of the row."""
    dy, multiplier = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[1.0, 3.0, 2.0]])
    rows = Rows(magnitudes(dy), exact=True)
    assert row_ranges_for(symmetric(), dy, multiplier, rows) is None
    assert numbers(row_ranges_for(symmetric(range="bound"), dy, multiplier, rows)).tolist() == [6.0]
    assert numbers(row_ranges_for(symmetric(), dy, multiplier[:, 1:2], rows)).tolist() == [6.0]


@pytest.mark.parametrize("range", ["exact", "bound", "delayed"])
def test_float64_and_empty_gradients_have_exact_ranges(range):
    state = ranges.new_state()[0]
    for dy in (torch.ones(4, 3, dtype=torch.float64), torch.ones(0, 3), torch.ones(4, 0)):
        rows = Rows(torch.zeros(dy.shape[0], dtype=torch.int32), exact=True)
        assert row_ranges_for(symmetric(range=range), dy, None, rows, state) is None
    assert not state.any()


# ---- bound: nothing clips, nothing is biased


def operands(m, n, k, zero, granularity, seed, tail):
    """dgrad's operands: quantized gradient (m, n), transposed codes of W (n, k)."""
    w_zero = "grid" if zero != "symmetric" else "symmetric"
    g = reference.quantize(heavy(m, n, seed, tail), Quantizer(8, granularity, zero, "nearest"), sums=True)
    w = Quantizer(8, "per_tensor", w_zero)
    w = reference.quantize(heavy(n, k, seed + 1, tail), w, rows=False, cols=True, sums=True)
    return g, w


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(1, 9), n=st.integers(1, 300), k=st.integers(1, 9), zero=st.sampled_from(["symmetric", "grid", "min"]),
       granularity=st.sampled_from(LAYOUTS), tail=st.sampled_from([0.0, 1.0, 3.0]), seed=st.integers(0, 999),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_the_bound_from_the_operands_holds(m, n, k, zero, granularity, tail, seed, dtype):
    g, w = operands(m, n, k, zero, granularity, seed, tail)
    dx = reference.scaled_mm(g.rows(), w.cols(), out_dtype=dtype).float()
    bound = numbers(ranges.bound_from_product(g.rows(), w.cols(), dtype))
    assert bool((dx.abs().amax(1) <= bound).all())


@pytest.mark.parametrize("zero", ["symmetric", "grid", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_from_the_operands_is_reached(zero, dtype):
    """Rows of g proportional to the longest column of W: Cauchy and Schwarz hold with equality, so only rounding is left.

    The bound exceeds the product by its slack alone: 2⁻²⁰ of the bound, for affine operands 2⁻²⁰ of the sum of the terms,
    here below 4 times the bound, and the rounding of both to dtype.
    """
    column = torch.randint(-127, 128, (64, 1), generator=torch.Generator().manual_seed(0)).float()
    column[0], column[1] = -127, 127
    g = reference.quantize(column.t() * torch.tensor([[1.0], [3.0]]), Quantizer(8, "per_row", zero), sums=True)
    w = reference.quantize(column, Quantizer(8, "per_tensor", zero), rows=False, cols=True, sums=True)
    dx = reference.scaled_mm(g.rows(), w.cols(), out_dtype=dtype).float().abs().amax(1)
    bound = numbers(ranges.bound_from_product(g.rows(), w.cols(), dtype))
    eps = torch.finfo(dtype).eps
    assert bool((dx <= bound).all())
    # Affine codes of 255 bins put each row within half a bin, 1/254, of the column: their angle's cosine is 1 - 1e-5.
    assert bool((bound <= dx * (1 + 8 * 2.0**-20 + 2e-5 + 2 * eps)).all())


def test_the_bound_of_a_row_of_zeros_covers_what_is_left_of_its_terms():
    """The codes of an affine operand are not zero where the row is: its terms cancel but for their rounding."""
    dy, w = torch.rand(3, 300) - 0.3, torch.rand(300, 16)
    dy[0], w[0] = 0, -0.1
    g = reference.quantize(dy, Quantizer(8, "per_tensor", "grid"), sums=True)
    w = reference.quantize(w, Quantizer(8, "per_tensor", "grid"), rows=False, cols=True, sums=True)
    assert not g.dequantize()[0].any()
    dx = reference.scaled_mm(g.rows(), w.cols()).abs().amax(1)
    assert 0 < dx[0] <= numbers(ranges.bound_from_product(g.rows(), w.cols()))[0] < 1e-2 * dx[1]


def test_a_bound_beyond_float16_is_infinite_and_float8_is_refused():
    q = torch.full((1, 64), 127, dtype=torch.int8)
    one, large = torch.ones(1), torch.full((1,), 2.0)
    a, b = fqt.qtensor.Operand(q, large, None, None), fqt.qtensor.Operand(q, one, None, None)
    assert numbers(ranges.bound_from_product(a, b, torch.float16)).isinf().all()
    assert numbers(ranges.bound_from_product(a, b)).item() == pytest.approx(2 * 64 * 127**2, rel=2.0**-19)
    with pytest.raises(ValueError, match="int8"):
        ranges.bound_from_product(a._replace(q=q.to(torch.float8_e4m3fn)), b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bound_of_what_is_not_finite_is_not_finite(bad):
    g, w = operands(4, 16, 5, "symmetric", "per_row", 0, 1.0)
    g.scale[2] = bad
    bound = numbers(ranges.bound_from_product(g.rows(), w.cols()))
    assert bound.isfinite().tolist() == [True, True, False, True]
    w.scale[0] = bad
    assert not numbers(ranges.bound_from_product(g.rows(), w.cols())).isfinite().any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(1, 9), n=st.integers(1, 60), granularity=st.sampled_from(LAYOUTS), seed=st.integers(0, 999),
       tail=st.sampled_from([0.0, 1.0, 5.0]), axis=st.sampled_from([None, 0, 1]), exact=st.booleans())  # fmt: skip
def test_no_element_exceeds_a_bound_times_its_multiplier(m, n, granularity, seed, tail, axis, exact):
    dy = heavy(m, n, seed, tail)
    multiplier = None if axis is None else heavy(*((1, n) if axis else (m, 1)), seed + 1, tail)
    known = numbers(magnitudes(dy)) * (1 if exact else 1.5)
    absmax = row_ranges_for(symmetric(granularity=granularity, range="bound"), dy, multiplier,
                            Rows(known.view(torch.int32), exact))  # fmt: skip
    y = dy if multiplier is None else dy * multiplier
    assert bool((y.abs() <= numbers(absmax)[:, None]).all())


def test_products_of_magnitudes_overflow_to_the_largest_number_and_keep_what_is_not_finite():
    dy = torch.tensor([[1e30, 1.0], [math.inf, 1.0], [math.nan, 1.0], [1.0, 2.0]])
    multiplier = torch.tensor([[1.0, 1e20]])
    absmax = numbers(row_ranges_for(symmetric(range="bound"), dy, multiplier, Rows(magnitudes(dy), exact=True)))
    assert absmax[0] == torch.finfo(torch.float32).max and absmax[1] == math.inf and absmax[2].isnan()
    q = reference.quantize(dy, symmetric(), multiplier=multiplier, rng=laws.random_state(),
                           row_absmax=absmax.view(torch.int32)).dequantize()  # fmt: skip
    assert q.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", LAYOUTS)
def test_a_bound_is_unbiased(bits, granularity):
    g, w = operands(12, 24, 16, "symmetric", "per_row", 5, 0.5)
    dx = reference.scaled_mm(g.rows(), w.cols())
    multiplier = heavy(1, 16, seed=9, tail=0.5).abs()
    quantizer = symmetric(bits, granularity, "bound")
    rows = Rows(ranges.bound_from_product(g.rows(), w.cols()), exact=False)
    absmax = row_ranges_for(quantizer, dx, multiplier, rows)
    assert bool((numbers(absmax) > (dx * multiplier).abs().amax(1)).all())  # as loose as it is in use
    draw = lambda i: reference.quantize(  # noqa: E731
        dx, quantizer, multiplier=multiplier, rng=laws.random_state(7, i), row_absmax=absmax
    ).dequantize()
    laws.assert_unbiased(draw, dx * multiplier, 400, bin=numbers(absmax)[:, None] / (2 ** (bits - 1) - 1))


# ---- delayed: guesses, counts, and what clipping costs


def steps(quantizer, gradients, bound=None, multiplier=None):
    """The ranges that a sequence of gradients is given, and the state afterwards."""
    state = ranges.new_state()[0]
    found = [
        row_ranges_for(quantizer, dy, multiplier, None if bound is None else Rows(b.view(torch.int32), False), state)
        for dy, b in zip(gradients, bound or gradients, strict=True)
    ]
    return [numbers(r) for r in found], state


DELAYED = [symmetric(granularity=g, range="delayed") for g in LAYOUTS]


def bounds_of(gradients, seed=0):
    """A bound of each row, 2 to 4 times as large as the row."""
    g = torch.Generator().manual_seed(seed)
    return [numbers(magnitudes(x)) * (2 + 2 * torch.rand(len(x), generator=g)) for x in gradients]


@pytest.mark.parametrize("quantizer", DELAYED, ids=LAYOUTS)
def test_the_first_step_and_steps_without_a_history_are_exact(quantizer):
    zeros, x = torch.zeros(5, 8), heavy(5, 8)
    found, state = steps(quantizer, [zeros, zeros, x], bounds_of([zeros, zeros, x]))
    true = magnitudes(x) if quantizer.granularity == "per_row" else magnitudes(x).amax(0, keepdim=True)
    assert torch.equal(found[2], numbers(true))
    assert state[CLIPPED] == 0 and state[SEEN] == 3 * x.numel() and (state[FIRST:] > 0).sum() == 1


def test_a_tensor_s_guess_is_a_margin_over_the_largest_of_the_history():
    sizes = [1.0, 3.0, 2.0] + [1.0] * (HISTORY + 1)
    found, _ = steps(DELAYED[1], [torch.full((2, 3), s) for s in sizes])
    expected = [1.0] + [MARGIN * max(sizes[max(0, i - HISTORY) : i]) for i in range(1, len(sizes))]
    assert torch.cat(found).tolist() == expected and expected[-1] < expected[-2] == MARGIN * 2


def test_a_row_s_guess_is_a_margin_over_the_largest_share_of_its_bound():
    gradients = [torch.tensor([[1.0, -2.0], [4.0, 1.0]]), torch.tensor([[1.0, 1.0], [8.0, 0.0]])]
    found, state = steps(DELAYED[0], gradients, [torch.tensor([8.0, 8.0]), torch.tensor([2.0, 64.0])])
    assert found[1].tolist() == [MARGIN * 0.5 * 2, MARGIN * 0.5 * 64]
    assert numbers(state[FIRST : FIRST + 2].to(torch.int32)).tolist() == [0.5, 0.5]


def test_a_guess_does_not_exceed_its_bound():
    gradients = [torch.full((2, 3), s) for s in (1.0, 0.125)]
    for quantizer in DELAYED:
        found, _ = steps(quantizer, gradients, [torch.full((2,), 1.0), torch.tensor([0.125, 0.25])])
        assert found[1].tolist() == ([0.125, 0.25] if quantizer.granularity == "per_row" else [0.25])


def test_a_bound_is_needed_by_rows_and_exact_rows_by_no_guess():
    dy, state = heavy(4, 6), ranges.new_state()[0]
    assert row_ranges_for(DELAYED[0], dy, state=state) is None
    for quantizer in DELAYED:
        given = row_ranges_for(quantizer, dy, None, Rows(magnitudes(dy), exact=True), state)
        assert given.amax() == magnitudes(dy).amax()
    assert not state.any()
    with pytest.raises(ValueError, match="state"):
        row_ranges_for(DELAYED[1], dy)


@pytest.mark.parametrize("quantizer", DELAYED, ids=LAYOUTS)
@pytest.mark.parametrize("growth", [1.0, 1.5, 40.0])
def test_exactly_the_counted_elements_clip_and_the_next_step_has_recovered(quantizer, growth):
    """Elements beyond the range come out as its ends: to 4 roundings, of the scale, its inverse and two products.

    The others are within a bin of themselves. A step as large as the one that overflowed no longer clips.
    """
    multiplier = heavy(1, 32, seed=3, tail=0.5).abs()
    first, second = heavy(16, 32, 1, 0.5), growth * heavy(16, 32, 2, 0.5)
    bounds = [torch.full((16,), 1e4)] * 3
    found, state = steps(quantizer, [first, second], bounds[:2], multiplier)
    y, r = second * multiplier, found[1][:, None].expand(16, 1)
    beyond = y.abs() > r
    assert state[CLIPPED] == beyond.sum() and (growth < 2) != (beyond.sum() > 20)
    q = reference.quantize(second, quantizer, multiplier=multiplier, rng=laws.random_state(1),
                           row_absmax=found[1].contiguous().view(torch.int32)).dequantize()  # fmt: skip
    assert torch.allclose(q[beyond], (y.sign() * r)[beyond], rtol=8 * laws.EPS, atol=0)
    assert bool(((q - y).abs() <= 1.001 * r / 127)[~beyond].all())
    _, after = steps(quantizer, [first, second, second], bounds, multiplier)
    assert after[CLIPPED] == state[CLIPPED] and after[SEEN] == 3 * y.numel()


def test_clipping_is_a_bias_that_a_test_rejects():
    first, second = heavy(16, 32, 1, 0.5), 5 * heavy(16, 32, 1, 0.5)
    (_, absmax), state = steps(DELAYED[1], [first, second])
    assert state[CLIPPED] > 0

    def draw(absmax):
        random = (laws.random_state(2, i) for i in itertools.count())
        return lambda i: reference.quantize(second, DELAYED[1], rng=next(random), row_absmax=absmax).dequantize()

    with pytest.raises(AssertionError, match="biased"):
        laws.assert_unbiased(draw(absmax.view(torch.int32)), second, 200)
    laws.assert_unbiased(draw(None), second, 200)


@pytest.mark.parametrize("quantizer", DELAYED, ids=LAYOUTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_is_not_remembered(quantizer, bad):
    x = heavy(6, 8)
    broken = x.clone()
    broken[2, 3] = bad
    found, state = steps(quantizer, [x, broken, x], bounds_of([x] * 3))
    q = reference.quantize(broken, quantizer, rng=laws.random_state(), row_absmax=found[1].view(torch.int32))
    finite = q.dequantize().isfinite().all(1).tolist()
    assert finite == ([True, True, False, True, True, True] if quantizer.granularity == "per_row" else [False] * 6)
    history = numbers(state[FIRST:].to(torch.int32))
    assert found[2].isfinite().all() and history.isfinite().all() and history.count_nonzero() >= 2
    assert state[CLIPPED] == 0


def test_a_state_survives_the_casts_of_its_module():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("state", ranges.new_state(), persistent=False)
    module.state[0, SEEN] = 2**40 + 1
    assert module.half().state[0, SEEN] == 2**40 + 1 and module.state.dtype == torch.int64


# ---- the closed form of cross-entropy


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_the_ranges_of_cross_entropy_are_those_of_autograd(scale):
    """Autograd forms p_y - 1 from p_y in float32, with an error of 2⁻²⁴ of 1; the rest are a few roundings each."""
    logits = (scale * torch.randn(64, 10)).requires_grad_()
    target = torch.randint(10, (64,))
    target[:5] = logits[:5].argmax(1)
    target[7] = -100
    torch.nn.functional.cross_entropy(logits, target).backward()
    lo, hi = ranges.cross_entropy_row_ranges(logits.detach(), target, (target != -100).sum())
    g, close = logits.grad, dict(rtol=64 * laws.EPS, atol=2 * laws.EPS / 63)
    assert torch.allclose(lo, g.amin(1), **close) and torch.allclose(hi, g.amax(1), **close)
    assert torch.allclose(hi - lo, g.amax(1) - g.amin(1), **close) and torch.allclose(-lo, g.abs().amax(1), **close)
    assert lo[7] == hi[7] == 0


# ---- which quantizers, and the documentation's example


def test_quantizers_that_no_row_can_serve():
    assert ranges.uses_rows(symmetric(), False) and ranges.uses_rows(symmetric(range="bound"), True)
    assert not ranges.uses_rows(symmetric(), True) and not ranges.uses_rows(Quantizer(8, "per_row", "min"), False)
    assert not ranges.uses_rows(Quantizer(8, "per_column", "symmetric"), False)
    assert not ranges.uses_rows(Quantizer(8, "per_row", "symmetric", "stochastic", householder=True), False)


def test_the_example_of_the_documentation_is_true():
    assert doctest.testmod(ranges) == (0, 7)
