"""Laws of the reference operators: random bits, rounding, quantization, the integer product, the three products."""

import functools
import itertools
import math

import laws
import pytest
import torch

from fqt import reference
from fqt.qtensor import QTensor
from fqt.recipe import GRANULARITIES, Quantizer, Recipe

U32 = 0xFFFFFFFF
CELLS = torch.arange(4096).view(64, 64)
ALL_BITS = torch.arange(65536, dtype=torch.int32)
AFFINE = ("grid", "min")


def quantizer(bits=8, granularity="per_tensor", zero="symmetric", rounding="nearest", householder=False):
    return Quantizer(bits, granularity, zero, rounding, householder)


def heavy_tailed(m, n, seed=0, dtype=torch.float32):
    """Normal rows whose sizes are spread over orders of magnitude: what a gradient looks like."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(m, n, generator=g) * torch.exp(1.5 * torch.randn(m, 1, generator=g))).to(dtype)


def draws_of(x, q, **kwargs):
    """draw(i): x stochastically quantized and dequantized with the random bits of step i."""
    return lambda i: reference.dequantized_gradient(x, q, rng=laws.random_state(1, i), **kwargs)


def groups_of(x, granularity):
    """The groups of elements of a matrix that share a scale."""
    return {"per_tensor": [x], "per_row": list(x), "per_column": list(x.t())}[granularity]


# ---- Philox


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((U32,) * 4, (U32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers for philox4x32-10 that come with Random123, by the authors of Philox."""
    out = reference.philox(*(torch.tensor(c) for c in (*counter, *key)), rounds=10)
    assert tuple(int(w) for w in out) == words


def test_random_bits_are_the_halves_of_seven_philox_rounds():
    """Counter (column // 8, row, step, stream + 256·rank), key low word first; lane column % 8, the low half first."""
    key, step, stream, rank = -0x123456789ABCDEF, 2**32 - 2, 255, 2**24 - 1
    bits = reference.random_bits(torch.tensor([key, step]), 3, 21, stream=stream, rank=rank)
    for row, column in itertools.product(range(3), range(21)):
        counter = (column // 8, row, step, stream + 256 * rank)
        words = reference.philox(*(torch.tensor(c) for c in (*counter, key & U32, key >> 32 & U32)))
        lane = column % 8
        assert int(bits[row, column]) == int(words[lane // 2]) >> 16 * (lane % 2) & 0xFFFF


# ---- random bits


def test_an_element_has_the_same_bits_in_every_matrix_that_contains_it():
    rng = laws.random_state(3, 5)
    whole = reference.random_bits(rng, 37, 53, stream=1, rank=2)
    for m, n in [(1, 1), (1, 53), (37, 1), (7, 8), (36, 52), (37, 9), (2, 7)]:
        assert torch.equal(reference.random_bits(rng, m, n, stream=1, rank=2), whole[:m, :n])
    assert torch.equal(reference.random_bits(rng, 37, 53, stream=1, rank=2), whole)


def test_no_other_key_step_stream_or_rank_has_the_same_bits():
    one = {"key": 0, "step": 0, "stream": 0, "rank": 0}
    others = [one | change for change in ({"key": 1}, {"key": 2**32}, {"key": -1}, {"step": 1}, {"step": 2**32 - 1},
                                          {"stream": 1}, {"stream": 255}, {"rank": 1}, {"rank": 2**16})]  # fmt: skip

    def bits(key, step, stream, rank):
        return reference.random_bits(torch.tensor([key, step]), 64, 64, stream=stream, rank=rank)

    drawn = [bits(**c) for c in [one, *others]]
    # 4096 independent pairs of 16 bits agree in 1/16 places on average; 8 or more has probability 1e-18.
    for a, b in itertools.combinations(drawn, 2):
        assert int((a == b).sum()) < 8


def test_the_step_counts_modulo_two_to_the_32():
    assert torch.equal(
        reference.random_bits(torch.tensor([7, 3]), 4, 9), reference.random_bits(torch.tensor([7, 3 + 2**32]), 4, 9)
    )


def test_random_bits_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    reference.random_bits(laws.random_state(), 5, 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(512, 512), (1, 262144), (32768, 8)])
def test_random_bits_are_uniform(shape):
    """χ² over 256 cells of the high and of the low byte: 255 ± √510, and normal enough for a 5σ limit on each side."""
    bits = reference.random_bits(laws.random_state(11), *shape)
    assert int(bits.min()) >= 0 and int(bits.max()) <= 65535
    for byte in (bits >> 8, bits & 255):
        counts = torch.bincount(byte.flatten(), minlength=256).double()
        chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert abs(chi2 - 255) < 5 * math.sqrt(510)


def test_random_bits_of_different_elements_and_draws_are_uncorrelated():
    """Correlation of n independent pairs is 0 ± 1/√n; pairs along rows, columns, lanes of a call, steps, streams, ranks."""
    m, n = 256, 512

    def centered(**kwargs):
        step = kwargs.pop("step", 0)
        return reference.random_bits(laws.random_state(4, step), m, n, **kwargs).double() - 32767.5

    x = centered()
    pairs = [(x, centered(step=1)), (x, centered(stream=1)), (x, centered(rank=1)), (x[1:], x[:-1])]
    pairs += [(x[:, lag:], x[:, :-lag]) for lag in range(1, 17)]
    pairs += [(x[:, i::8], x[:, j::8]) for i, j in itertools.combinations(range(8), 2)]
    for a, b in pairs:
        correlation = float((a * b).mean()) / (65536**2 / 12)
        assert abs(correlation) < 5 / math.sqrt(a.numel())


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_integer_is_a_fixed_point_of_stochastic_rounding_for_all_bits(dtype):
    for y in (-255.0, -128.0, -1.0, 0.0, 1.0, 2.0, 127.0, 254.0, 255.0):
        rounded = reference.round_codes(torch.full((65536,), y, dtype=dtype), "stochastic", ALL_BITS)
        assert rounded.dtype == dtype and bool((rounded == y).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_stochastic_rounding_over_all_bits_is_the_dithered_value_exactly(dtype):
    """Σ over all 65536 bit values = 65536·y for y a multiple of 2⁻¹⁶, and within half a unit of it for any other y."""
    g = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.rand(40, generator=g, dtype=torch.float64) * 510 - 255, torch.tensor([2**-16, 1 - 2**-16, 0.5])]
    )
    for y in values.to(dtype):
        total = int(reference.round_codes(y.expand(65536), "stochastic", ALL_BITS).double().sum())
        assert abs(total - 65536 * float(y)) <= 0.5
    for k in (1, 2, 32768, 65535):
        total = reference.round_codes(torch.full((65536,), 5 + k / 65536, dtype=dtype), "stochastic", ALL_BITS).sum()
        assert int(total) == 5 * 65536 + k


def test_stochastic_rounding_steps_up_exactly_at_the_random_bits():
    """For all bits: a quarter of 2⁻¹⁶ below where they carry is rounded up to it, three quarters below is not."""
    for integer in (-3.0, 0.0, 2.0):
        for below, step in ((0.25, 1), (0.75, 0)):
            y = integer + (65536 - ALL_BITS - below) / 65536
            assert bool((reference.round_codes(y, "stochastic", ALL_BITS) == integer + step).all())


def test_stochastic_rounding_takes_the_floor_or_the_ceiling():
    y = torch.linspace(-3, 3, 1001)
    for bits in (0, 1, 32767, 32768, 65535):
        rounded = reference.round_codes(y, "stochastic", torch.full((1001,), bits, dtype=torch.int32))
        # y within 2⁻¹⁷ of an integer may be rounded as that integer.
        assert bool(((rounded - y).abs() < 1 + 2.0**-17).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounding_is_monotone(rounding):
    """For the same bits a larger value never has a smaller code."""
    y = torch.linspace(-4, 4, 20001)
    for bits in (0, 1, 12345, 32768, 65535):
        rounded = reference.round_codes(y, rounding, torch.full((20001,), bits, dtype=torch.int32))
        assert bool((rounded[1:] >= rounded[:-1]).all())


def test_more_bits_never_round_lower():
    rounded = reference.round_codes(torch.full((65536,), 2.3), "stochastic", ALL_BITS)
    assert bool((rounded[1:] >= rounded[:-1]).all()) and set(rounded.tolist()) == {2.0, 3.0}


def test_nearest_rounds_ties_to_even():
    half = torch.arange(-130, 130) + 0.5
    assert bool((reference.round_codes(half, "nearest") % 2 == 0).all())
    assert reference.round_codes(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997]), "nearest").tolist() == [
        0,
        2,
        2,
        0,
        -2,
        0,
    ]


@functools.cache
def bits_of_step(i):
    return reference.random_bits(laws.random_state(2, i), 64, 64)


def rounded_draws(y, rounder):
    return lambda i: rounder(y, bits_of_step(i))


def test_stochastic_rounding_is_unbiased_with_variance_p_times_one_minus_p():
    y = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) * 20 - 10
    draw = rounded_draws(y, lambda y, bits: reference.round_codes(y, "stochastic", bits))
    laws.assert_unbiased(draw, y, 256, bin=1.0)
    p = (y - y.floor()).double()
    # Squared errors lie in [0, 1]: the mean of 4096·200 of them is known to 0.5/√(4096·200), at 5σ.
    variance = laws.total_variance(draw, y, 200) / y.numel()
    assert abs(variance - float((p * (1 - p)).mean())) < 5 * 0.5 / math.sqrt(4096 * 200)


@pytest.mark.parametrize(
    "name, rounder",
    [
        ("nearest", lambda y, bits: torch.round(y)),
        ("down", lambda y, bits: torch.floor(y)),
        ("offset by a hundredth of a bin", lambda y, bits: torch.floor(y + bits / 65536 + 0.01)),
        ("offsets in (0, 1] of 6 bits", lambda y, bits: torch.floor(y + ((bits >> 10) + 1) / 64)),
        ("towards zero in magnitude", lambda y, bits: y.sign() * torch.floor(y.abs() + bits / 65536 - 0.01)),
        ("wrong in one row", lambda y, bits: torch.floor(y + bits / 65536 + 0.1 * (CELLS // 64 == 17))),
        ("wrong in one element", lambda y, bits: torch.floor(y + bits / 65536 + 0.3 * (CELLS == 99))),
    ],
)  # fmt: skip
def test_a_biased_rounder_is_rejected(name, rounder):
    """The same test, the same draws: what it cannot tell from an unbiased rounder would pass elsewhere too."""
    y = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) * 20 - 10
    with pytest.raises(AssertionError, match="biased"):
        laws.assert_unbiased(rounded_draws(y, rounder), y, 256, bin=1.0)


# ---- quantization


STOCHASTIC = [
    ("ptq grid", "per_tensor", "grid"),
    ("ptq min", "per_tensor", "min"),
    ("psq", "per_row", "min"),
    ("psq grid", "per_row", "grid"),
    ("symmetric tensor", "per_tensor", "symmetric"),
    ("symmetric rows", "per_row", "symmetric"),
    ("columns", "per_column", "symmetric"),
    ("affine columns", "per_column", "min"),
]


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("name, granularity, zero", STOCHASTIC, ids=[s[0] for s in STOCHASTIC])
def test_stochastic_quantization_is_unbiased(name, granularity, zero, bits):
    x = heavy_tailed(24, 40)
    q = quantizer(bits, granularity, zero, "stochastic")
    scale = reference.quantize(x, q, rng=laws.random_state()).scale
    laws.assert_unbiased(draws_of(x, q), x, 300, bin=scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_householder_quantization_is_unbiased(bits):
    x = heavy_tailed(24, 40)
    laws.assert_unbiased(draws_of(x, quantizer(bits, "per_row", "min", "stochastic", True)), x, 300)


@pytest.mark.parametrize("zero", ["symmetric", *AFFINE])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_variance_is_two_thirds_of_the_bound(granularity, zero, bits):
    """Bound: a quarter of a squared bin for each element (p(1-p) ≤ 1/4). With well-filled bins p is uniform: 1/6.

    The ends of a group's range are codes: one element of it (two for min/max) has no variance. p(1-p) has standard
    deviation 0.0745, so the mean over 8192 elements is 1/6 ± 0.5 %; its estimate from 30 draws adds 0.2 %, unequal rows
    0.1 %. At 5σ: ± 3 %. Two bits would leave bins badly filled.
    """
    g = torch.Generator().manual_seed(2)
    x = torch.randn(64, 128, generator=g)
    q = quantizer(bits, granularity, zero, "stochastic")
    draw = draws_of(x, q)
    scale = reference.quantize(x, q, rng=laws.random_state()).scale.double()
    bound = float((scale**2 / 4).expand(64, 128).sum())
    ends = (2 if zero == "min" else 1) * scale.numel()
    assert abs(laws.total_variance(draw, x, 30) / (2 / 3 * bound * (1 - ends / 8192)) - 1) < 0.03


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_variance_is_within_the_papers_bounds_on_heavy_tails(bits):
    """N·D·R²/(4B²) for PTQ, D/(4B²)·Σ R_i² for PSQ, and PSQ's bound is the smaller. Bins here are not well filled.

    A total of independent errors in [-bin, bin] around a variance below bound exceeds it by 5 % with negligible chance.
    """
    x = heavy_tailed(64, 128)
    n, d = x.shape
    levels = 2**bits - 1
    r = (x.max() - x.min()).item()
    rows = (x.amax(1) - x.amin(1)).double()
    ptq = n * d * r**2 / (4 * levels**2)
    psq = d / (4 * levels**2) * float((rows**2).sum())
    assert psq < ptq
    assert laws.total_variance(draws_of(x, quantizer(bits, "per_tensor", "min", "stochastic")), x, 16) < 1.05 * ptq
    assert laws.total_variance(draws_of(x, quantizer(bits, "per_row", "min", "stochastic")), x, 16) < 1.05 * psq


@pytest.mark.parametrize("high, ratio", [(8, 4.03), (7, 4.06), (6, 4.13), (5, 4.27)])
def test_a_bit_fewer_costs_four_times_the_variance(high, ratio):
    """((2^b - 1)/(2^(b-1) - 1))² for min/max, 4.03 from 8 bits to 7 and 4.27 from 5 to 4."""
    exact = ((2**high - 1) / (2 ** (high - 1) - 1)) ** 2
    assert round(exact, 2) == ratio
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    more, fewer = (
        laws.total_variance(draws_of(x, quantizer(b, "per_tensor", "min", "stochastic")), x, 30)
        for b in (high, high - 1)
    )
    # Each is known to 0.54 % (see above): √2 · 0.54 % · 5σ.
    assert abs(fewer / more / exact - 1) < 0.038


def lone_values(kind):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(12, 16, generator=g)
    return {
        "normal": x,
        "half zeros": torch.where(torch.rand(12, 16, generator=g) < 0.5, torch.zeros(()), x),
        "a zero row and column": x * (torch.arange(12) != 5)[:, None] * (torch.arange(16) != 3),
        "positive": x.abs() + 0.1,
        "negative": -x.abs() - 0.1,
        "non-negative": x.relu(),
        "one tiny negative": x.relu() - 1e-6 * (torch.arange(192) == 77).view(12, 16),
        "one tiny positive": -x.relu() + 1e-6 * (torch.arange(192) == 77).view(12, 16),
        "a tiny negative in every row": torch.cat([x.abs(), torch.full((12, 1), -1e-7)], 1),
        "equal": torch.full((12, 16), 0.7),
        "equal negative": torch.full((12, 16), -0.3),
        "equal rows": x[:, :1].expand(12, 16),
        "two values": torch.where(x > 0, 1.0, -2.0),
        "one huge row": x * torch.where(torch.arange(12) == 4, 1e6, 1.0)[:, None],
        "one huge element": x + 1e8 * (torch.arange(192) == 100).view(12, 16),
        "far from zero": x + 1000,
        "large": x * 1e37,
        "small": x * 1e-37,
        "below the normal numbers": x * 1e-39,
        "smallest number": torch.where(x > 0, 2.0**-149, 0.0),
        "smallest on both sides": torch.where(x > 0, 2.0**-149, -(2.0**-149)),
        "minus zero": -torch.zeros(12, 16),
        "one element": x[:1, :1],
        "one row": x[:1],
        "one column": x[:, :1],
        "two rows": x[:2],
        "primes": torch.randn(13, 7, generator=g),
    }[kind]


LONE = ["normal", "half zeros", "a zero row and column", "positive", "negative", "non-negative", "one tiny negative",
        "one tiny positive", "a tiny negative in every row", "equal", "equal negative", "equal rows", "two values",
        "one huge row", "one huge element", "far from zero", "large", "small", "below the normal numbers",
        "smallest number", "smallest on both sides", "minus zero", "one element", "one row", "one column", "two rows",
        "primes"]  # fmt: skip


def float_slack(x, t, bits):
    """What float32 arithmetic adds to an error of bins. x - z, the scale, its inverse, their product and the sum with i
    round once each: 5 roundings of a value of up to 2^bits bins. Dequantizing rounds a product, an offset (twice) and a
    sum, none larger than twice the largest magnitude of the group. 2⁻¹⁷ bins are the dither's; below the normal numbers
    a rounding is one of the smallest steps.
    """
    largest = torch.maximum(x.abs().amax(), (t.scale.double() * 2**bits).max())
    return t.scale.double() * (5 * laws.EPS * 2**bits + laws.DITHER) + 8 * laws.EPS * largest + 4 * 2.0**-149


@pytest.mark.parametrize("kind", LONE)
def test_nothing_clips(kind):
    """The error is at most half a bin to nearest and one bin stochastically, for every granularity, zero and bits."""
    x = lone_values(kind)
    for granularity, zero, bits in itertools.product(GRANULARITIES, ("symmetric", *AFFINE), (2, 3, 8)):
        for rounding, bins in (("nearest", 0.5), ("stochastic", 1.0)):
            t = reference.quantize(x, quantizer(bits, granularity, zero, rounding), rng=laws.random_state(6))
            error = (t.dequantize().double() - x.double()).abs()
            limit = bins * t.scale.double() + float_slack(x.double(), t, bits)
            assert bool((error <= limit).all()), (granularity, zero, bits, rounding, float((error / limit).max()))


@pytest.mark.parametrize("kind", LONE)
def test_the_range_is_used(kind):
    """Bins are as wide as the range asks for: B = 2^bits - 1 of them for min/max, B - 1 if symmetric; zero on the grid
    gives ⌊B·below/(below + above)⌋ bins to the negatives, one where that is none of them but there are some.
    """
    x = lone_values(kind).double()
    for granularity, zero, bits in itertools.product(GRANULARITIES, ("symmetric", *AFFINE), (2, 4, 8)):
        t = reference.quantize(x, quantizer(bits, granularity, zero))
        levels = 2**bits - 1
        for group, scale in zip(groups_of(x, granularity), t.scale.flatten().tolist(), strict=True):
            lo, hi = float(group.min()), float(group.max())
            if zero == "symmetric":
                needed = 2 * max(-lo, hi) / (levels - 1)
            elif zero == "min":
                needed = (hi - lo) / levels
            else:
                below, above = max(-lo, 0.0), max(hi, 0.0)
                i = math.floor(below / (below + above) * levels) if below + above else 0
                needed = below / i if i else above / levels if below == 0 else max(below, above / (levels - 1))
            if needed == 0:
                assert scale == (0 if zero == "min" else 1)
            else:
                assert scale == pytest.approx(max(needed, 2.0**-126), rel=1e-12)


@pytest.mark.parametrize("kind", LONE)
@pytest.mark.parametrize("zero", ["grid", "symmetric"])
def test_zeros_stay_exactly_zero_where_zero_is_on_the_grid(kind, zero):
    x = lone_values(kind)
    for granularity, bits, step in itertools.product(GRANULARITIES, range(2, 9), range(3)):
        t = reference.quantize(x, quantizer(bits, granularity, zero, "stochastic"), rng=laws.random_state(7, step))
        assert bool((t.dequantize()[x == 0] == 0).all())


@pytest.mark.parametrize("kind", LONE)
def test_the_zero_point_is_an_integer_code(kind):
    x = lone_values(kind)
    for bits in range(2, 9):
        lo, hi = x.amin(1), x.amax(1)
        scale, _, z, i, offset = reference.quantization_params(lo, hi, bits, "grid")
        assert torch.equal(i, i.round()) and bool((i >= 0).all()) and bool((i <= 2**bits - 1).all())
        assert bool((z == 0).all()) and bool((scale > 0).all())
        # Zero's own code is i less half the levels; with the offset it gives zero in float32 without an error.
        assert bool(((i - 2 ** (bits - 1)) * scale + offset == 0).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_span_the_range_of_their_bits(granularity, bits):
    """Both ends are reached, and -2^(bits-1) only by affine codes."""
    x = heavy_tailed(30, 50)
    half = 2 ** (bits - 1)
    for zero in ("symmetric", *AFFINE):
        q = reference.quantize(x, quantizer(bits, granularity, zero)).q
        assert q.dtype == torch.int8
        for group in groups_of(q, granularity):
            lo, hi = int(group.min()), int(group.max())
            if zero == "symmetric":
                assert max(-lo, hi) == half - 1
            elif zero == "min":
                assert (lo, hi) == (-half, half - 1)
            else:  # where less than a bin is negative, the other end is the one that is reached
                assert lo == -half or hi == half - 1


@pytest.mark.parametrize("zero", AFFINE)
def test_codes_stay_in_range_where_rounding_overshoots(zero):
    """One code further would not be an int8, and wrap around to the other end."""
    x, rng = laws.overshooting(zero)
    t = reference.quantize(x, quantizer(8, "per_row", zero, "stochastic"), rng=rng)
    assert torch.equal(t.q.int(), torch.where(x > 0, 127, -128).int())


@pytest.mark.parametrize("zero", ["symmetric", *AFFINE])
def test_groups_without_a_range_are_exact(zero):
    """Rows of zeros come back as zeros under every form, rows of one value as that value under min/max."""
    x = torch.cat([torch.zeros(2, 9), torch.full((2, 9), 0.1), torch.full((1, 9), -3e-41), torch.randn(2, 9)])
    for bits in (2, 5, 8):
        t = reference.quantize(x, quantizer(bits, "per_row", zero, "stochastic"), rng=laws.random_state())
        assert torch.equal(t.dequantize()[:2], x[:2])
        if zero == "min":
            assert torch.equal(t.dequantize()[:5], x[:5])
        assert t.scale[0, 0] == (0 if zero == "min" else 1)


@pytest.mark.parametrize("bits", [2, 7, 8])
def test_scales_are_correctly_rounded_quotients_on_every_device(bits, device):
    """A reciprocal instead of a division is off by an ulp, and codes on one device then differ from another's.

    A quotient of float32 numbers rounded to float64 and then to float32 is the correctly rounded one (53 ≥ 2·24 + 2).
    """
    x = heavy_tailed(500, 8)
    lo, hi = x.amin(1).to(device), x.amax(1).to(device)
    levels = 2**bits - 1
    amax = x.abs().amax(1).to(device)
    for zero, ends, divisor in (("symmetric", (-amax, amax), 2 ** (bits - 1) - 1), ("min", (lo, hi), levels)):
        scale, inv, *_ = reference.quantization_params(*ends, bits, zero)
        width = amax if zero == "symmetric" else hi - lo
        laws.assert_same(scale, (width.cpu().double() / divisor).float())
        laws.assert_same(inv, (1 / scale.cpu().double()).float())
    scale, _, _, i, _ = reference.quantization_params(lo, hi, bits, "grid")
    mixed = (i.cpu() > 0) & (i.cpu() < levels) & (-lo.cpu() * levels > hi.cpu() - lo.cpu())
    assert int(mixed.sum()) > 100
    laws.assert_same(scale.cpu()[mixed], (-lo.cpu().double() / i.cpu().double()).float()[mixed])
    for granularity, zero in itertools.product(GRANULARITIES, ("symmetric", *AFFINE)):
        q = quantizer(bits, granularity, zero, "stochastic")
        there = reference.quantize(x.to(device), q, rng=laws.random_state(1, 0, device), sums=True)
        for a, b in zip(there, reference.quantize(x, q, rng=laws.random_state(1), sums=True), strict=True):
            laws.assert_same(a, b)


def test_the_transposed_codes_and_the_sums_are_those_of_the_codes():
    x = heavy_tailed(11, 6)
    for rows, cols, sums in itertools.product((True, False), repeat=3):
        q = quantizer(5, "per_row", "grid", "stochastic")
        full = reference.quantize(x, q, rng=laws.random_state())
        t = reference.quantize(x, q, rng=laws.random_state(), rows=rows, cols=cols, sums=sums)
        laws.assert_same(t.q, full.q if rows else None)
        laws.assert_same(t.qt, full.q.t() if cols else None)
        assert t.qt is None or t.qt.is_contiguous()
        laws.assert_same(t.row_sum, full.q.sum(1, dtype=torch.int32) if rows and sums else None)
        laws.assert_same(t.col_sum, full.q.sum(0, dtype=torch.int32) if cols and sums else None)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero", ["symmetric", *AFFINE])
def test_the_multiplier_is_folded_in_before_anything_else(granularity, zero):
    x = heavy_tailed(9, 14)
    q = quantizer(6, granularity, zero, "stochastic")
    for shape in ((9, 1), (1, 14)):
        mul = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
        folded = reference.quantize(x, q, multiplier=mul, rng=laws.random_state(), cols=True, sums=True)
        for a, b in zip(
            folded, reference.quantize(x * mul, q, rng=laws.random_state(), cols=True, sums=True), strict=True
        ):
            laws.assert_same(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_do_not_depend_on_strides(granularity):
    x = heavy_tailed(17, 23)
    q = quantizer(4, granularity, "grid", "stochastic")
    expected = reference.quantize(x, q, rng=laws.random_state(), cols=True, sums=True)
    for view in (x.t().contiguous().t(), laws.poisoned(x)):
        for a, b in zip(
            reference.quantize(view, q, rng=laws.random_state(), cols=True, sums=True), expected, strict=True
        ):
            laws.assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(9, 14).to(dtype)
    for zero in ("symmetric", *AFFINE):
        a = reference.quantize(x, quantizer(8, "per_row", zero))
        b = reference.quantize(x.float(), quantizer(8, "per_row", zero))
        laws.assert_same(a.q, b.q)
        laws.assert_same(a.scale, b.scale)
        assert a.scale.dtype == torch.float32


def test_float64_is_computed_in_float64():
    """Half a bin of error to 2⁻⁴⁵ of a bin, 8 bits from float64's 53: in float32 the slack would be 2⁻¹⁶."""
    x = heavy_tailed(20, 30, dtype=torch.float64)
    x[3] = 1 + torch.arange(30, dtype=torch.float64) * 2.0**-40  # a range that float32 does not see
    for zero in ("symmetric", *AFFINE):
        t = reference.quantize(x, quantizer(8, "per_row", zero))
        assert t.scale.dtype == torch.float64
        slack = 2.0**-45 * t.scale + 4 * 2.0**-53 * x.abs().amax(1, keepdim=True)
        assert bool(((t.dequantize() - x).abs() <= t.scale / 2 + slack).all())
    assert int(t.q[3].max()) - int(t.q[3].min()) == 255


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices_are_quantized(shape):
    for granularity, zero in itertools.product(GRANULARITIES, ("symmetric", *AFFINE)):
        q = quantizer(8, granularity, zero, "stochastic")
        t = reference.quantize(torch.empty(shape), q, rng=laws.random_state(), cols=True, sums=True)
        assert t.q.shape == shape and t.qt.shape == shape[::-1] and t.dequantize().shape == shape
        assert bool(torch.isfinite(t.scale).all())
        assert bool((t.row_sum == 0).all()) and bool((t.col_sum == 0).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero", ["symmetric", *AFFINE])
@pytest.mark.parametrize(
    "bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_non_finite_value_makes_its_group_non_finite_and_no_other(granularity, zero, bad, dtype):
    clean = heavy_tailed(7, 9, dtype=dtype)
    x = clean.clone()
    x[2, 4 : 4 + len(bad) if granularity != "per_column" else 5] = torch.tensor(
        bad if granularity != "per_column" else bad[0]
    )
    if granularity == "per_column":
        x[5, 4] = bad[-1]
    for rounding, bits in itertools.product(("nearest", "stochastic"), (2, 8)):
        q = quantizer(bits, granularity, zero, rounding)
        before = reference.quantize(clean, q, rng=laws.random_state()).dequantize()
        after = reference.quantize(x, q, rng=laws.random_state()).dequantize()
        hit = torch.zeros_like(x, dtype=torch.bool)
        hit[{"per_tensor": (slice(None),), "per_row": (2,), "per_column": (slice(None), 4)}[granularity]] = True
        assert not bool(torch.isfinite(after[hit]).any())
        assert torch.equal(after[~hit], before[~hit])


# ---- the integer product


def extreme_codes(m, k, seed):
    """Codes of the largest magnitudes: the sums of random signs stay small, those of the first rows' equal signs do not.

    All -128 is a sum that float32 holds for long, being a multiple of 2¹⁴; with a single 1 it no longer is.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.where(torch.rand(m, k, generator=g) < 0.5, -128, 127)
    x[0] = -128
    x[1:2] = 127
    x[2:3] = -128
    x[2:3, :1] = 1
    return x.to(torch.int8)


@pytest.mark.parametrize("k", [0, 1, 7, 1023, 1024, 1025, 3071, 3073, 131_071, 131_072, 200_704, 1_000_000])
def test_the_integer_product_is_exact(k):
    """Against int64, all pairs of -128 · -128, 127 · 127 and -128 · 127 among them; int64 only where int32 may overflow."""
    a, b = extreme_codes(4, k, 0), extreme_codes(3, k, 1)
    out = reference.int_mm(a, b)
    assert out.dtype == (torch.int32 if k <= 131_071 else torch.int64)
    assert torch.equal(out.long(), (a.long()[:, None] * b.long()).sum(-1))
    if k:
        assert int(out[0, 0]) == k * 2**14 and int(out[2, 2]) == (k - 1) * 2**14 + 1


def test_int32_holds_131071_products_and_not_one_more():
    assert reference.MAX_INT32_TERMS * 2**14 <= 2**31 - 1 < (reference.MAX_INT32_TERMS + 1) * 2**14


def test_the_integer_product_is_exact_where_float32_products_are_not(device):
    """Under autocast, and where float32 products may use TF32 or bfloat16: both hold every int8 code."""
    a, b = extreme_codes(33, 2049, 0).to(device), extreme_codes(17, 2049, 1).to(device)
    expected = a.cpu().long() @ b.cpu().long().t()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast(device, dtype=dtype):
                    assert torch.equal(reference.int_mm(a, b).cpu().long(), expected)
    finally:
        torch.set_float32_matmul_precision(before)


OPERANDS = [
    ("per_tensor", "symmetric"),
    ("per_row", "symmetric"),
    ("per_tensor", "grid"),
    ("per_row", "min"),
    ("per_row", "grid"),
]


@pytest.mark.parametrize("left", OPERANDS, ids="-".join)
@pytest.mark.parametrize(
    "right", [o for o in OPERANDS if o[0] == "per_tensor" or o[1] == "symmetric"] + [("none", "none")], ids="-".join
)
def test_the_scaled_product_is_the_product_of_the_dequantized_operands(left, right):
    """Against float64. Each of the up to four terms takes at most 8 roundings of float32 (of the integer, two factors,
    the sum inside u, three sums); each loses at most 2⁻²⁴ of a partial result no larger than the sum of the terms'
    magnitudes.
    """
    for (m, n, k), bias in itertools.product([(1, 1, 1), (5, 3, 17), (33, 31, 64), (2, 3, 1500)], (None, 1.0)):
        x, w = heavy_tailed(m, k, 1), heavy_tailed(n, k, 2)
        a = reference.quantize(x, quantizer(8, *left), sums=True)
        b = reference.quantize(
            w, quantizer(7, "per_row", "symmetric") if right[0] == "none" else quantizer(7, *right), sums=True
        )
        c = None if bias is None else torch.randn(n, generator=torch.Generator().manual_seed(3))
        rows = b.rows() if right[0] != "none" else b.rows()._replace(scale=None)
        out = reference.scaled_mm(a.rows(), rows, c)
        assert out.dtype == torch.float32 and out.shape == (m, n)
        sa, oa = a.scale.double(), torch.zeros(1, 1) if a.offset is None else a.offset.double()
        sb = torch.ones(1, 1).double() if right[0] == "none" else b.scale.double()
        ob = torch.zeros(1, 1).double() if b.offset is None else b.offset.double()
        left64, right64 = a.q.double() * sa + oa, b.q.double() * sb + ob
        exact = left64 @ right64.t() + (0 if c is None else c.double())
        terms = (sa * sb.t() * (a.q.double() @ b.q.double().t())).abs() + (oa * (b.q.double().sum(1) * sb.t())).abs()
        terms = (
            terms
            + (oa * k * ob).abs()
            + (ob * sa * a.q.double().sum(1, keepdim=True)).abs()
            + (0 if c is None else c.abs())
        )
        oracle = (k + 4) * 2.0**-53 * (left64.abs() @ right64.abs().t())  # float64's own rounding, where terms cancel
        assert bool(((out.double() - exact).abs() <= 8 * laws.EPS * terms + oracle).all())


def test_the_scaled_product_is_rounded_once_to_the_output_type():
    a, b = (reference.quantize(heavy_tailed(9, 33, s), quantizer(8, "per_row"), sums=True).rows() for s in (1, 2))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        laws.assert_same(reference.scaled_mm(a, b, None, dtype), reference.scaled_mm(a, b).to(dtype))


def test_the_scaled_product_of_float64_operands_is_computed_in_float64():
    x, w = heavy_tailed(9, 33, 1, torch.float64), heavy_tailed(5, 33, 2, torch.float64)
    a, b = (
        reference.quantize(x, quantizer(8, "per_row", "min"), sums=True),
        reference.quantize(w, quantizer(8), sums=True),
    )
    exact = a.dequantize() @ b.dequantize().t()
    out = reference.scaled_mm(a.rows(), b.rows(), None, torch.float64)
    # 33 sums in the oracle, 8 roundings here.
    assert (
        float((out - exact).abs().max())
        <= 50 * 2.0**-53 * float((a.dequantize().abs() @ b.dequantize().abs().t()).max()) * 4
    )


def test_a_product_over_nothing_is_the_bias():
    a, b = (reference.quantize(torch.empty(m, 0), quantizer(8, zero="grid"), sums=True).rows() for m in (3, 2))
    bias = torch.tensor([1.5, -2.0])
    assert torch.equal(reference.scaled_mm(a, b, bias), bias.expand(3, 2))


# ---- the three products


def operands(recipe, m=12, k=10, n=14):
    g = torch.Generator().manual_seed(8)
    x, w = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g)
    return reference.quantize(x, recipe.x), reference.quantize(w, recipe.w), heavy_tailed(m, n, 9)


def by_hand(t: QTensor):
    """Σ-free dequantization, element by element, in float64."""
    m, n = t.q.shape
    scale, offset = t.scale.expand(m, n).double(), 0.0 if t.offset is None else t.offset.expand(m, n).double()
    return t.q.double() * scale + offset


FULL = ["ptq8", "psq4", "bhq5", "int8"]


@pytest.mark.parametrize("name", FULL)
def test_fprop_is_the_product_of_the_quantized_operands(name):
    x, w, _ = operands(Recipe.parse(name))
    bias = torch.randn(14)
    exact = torch.einsum("mk,nk->mn", by_hand(x), by_hand(w))
    # A float32 sum of K = 10 products and a bias, each factor rounded on dequantizing (twice): 14 roundings.
    limit = 14 * laws.EPS * (torch.einsum("mk,nk->mn", by_hand(x).abs(), by_hand(w).abs()) + bias.abs())
    assert bool(((reference.fprop(x, w, bias).double() - exact - bias).abs() <= limit).all())
    assert bool(((reference.fprop(x, w).double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("name", FULL)
def test_gradients_without_a_quantizer_are_those_of_the_quantized_operands(name):
    """Quantization-aware training: dX = dY W and dW = dYᵀ X of the quantized W and X, by autograd through fprop."""
    recipe = Recipe.parse(name).as_qat()
    x, w, dy = operands(recipe)
    xd, wd = by_hand(x).requires_grad_(), by_hand(w).requires_grad_()
    torch.einsum("mk,nk->mn", xd, wd).backward(dy.double())
    # Float32 sums of 14 and of 12 products, dequantized factors: 18 roundings of terms up to the product of magnitudes.
    limit_x = 18 * laws.EPS * (dy.double().abs() @ wd.detach().abs())
    limit_w = 18 * laws.EPS * (dy.double().abs().t() @ xd.detach().abs())
    assert bool(((reference.dgrad(dy, w, recipe).double() - xd.grad).abs() <= limit_x).all())
    assert bool(((reference.wgrad(dy, x, recipe).double() - wd.grad).abs() <= limit_w).all())


def test_a_scale_per_output_channel_is_folded_into_dy_before_it_is_quantized():
    """dgrad with W per row: the codes of dY·s_w times the codes of W, to the last bit. Likewise wgrad with X per row."""
    recipe = Recipe.int8()
    x, w, dy = operands(recipe)
    rng = laws.random_state(5)
    g = reference.quantize(dy * w.scale.t(), recipe.dgrad, rng=rng, stream=0)
    laws.assert_same(reference.dgrad(dy, w, recipe, rng=rng, stream=0), g.dequantize() @ w.q.float())
    h = reference.quantize(dy * x.scale, recipe.wgrad, rng=rng, stream=1)
    laws.assert_same(reference.wgrad(dy, x, recipe, rng=rng, stream=1), h.dequantize().t() @ x.q.float())


@pytest.mark.parametrize("name", ["ptq8", "ptq3", "psq8", "psq2", "bhq4", "int8"])
def test_the_quantized_gradient_is_an_unbiased_estimate_of_the_qat_gradient(name):
    """StatQuant, theorem 1, for one layer."""
    recipe = Recipe.parse(name)
    x, w, dy = operands(recipe)
    for operator, operand in ((reference.dgrad, w), (reference.wgrad, x)):
        expected = operator(dy.double(), QTensor(operand.q, None, operand.scale.double(),
                            None if operand.offset is None else operand.offset.double()), recipe.as_qat())  # fmt: skip
        laws.assert_unbiased(
            lambda i, op=operator, t=operand: op(dy, t, recipe, rng=laws.random_state(9, i)), expected, 300
        )


def test_the_householder_gradient_folds_its_multiplier_too():
    """A recipe with W per row and BHQ: unbiased, and the same as transforming dY·s_w."""
    recipe = Recipe(
        quantizer(8, "per_row"), quantizer(8, "per_row"), dgrad=quantizer(4, "per_row", "min", "stochastic", True)
    )
    _, w, dy = operands(recipe)
    rng = laws.random_state(5)
    folded = reference.dequantized_gradient(dy * w.scale.t(), recipe.dgrad, rng=rng)
    laws.assert_same(reference.dgrad(dy, w, recipe, rng=rng), folded @ w.q.float())
    expected = dy.double() @ w.dequantize().double()
    laws.assert_unbiased(lambda i: reference.dgrad(dy, w, recipe, rng=laws.random_state(9, i)), expected, 300)
