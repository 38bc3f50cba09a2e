"""Laws of the block Householder transform: the reflection, the grouping, and the variance it saves."""

import itertools
import math

import laws
import pytest
import torch

from fqt import reference
from fqt.householder import Householder, cube_root, group_rows, square_root
from fqt.recipe import Quantizer

BHQ, PSQ = (lambda bits, h=h: Quantizer(bits, "per_row", "min", "stochastic", h) for h in (True, False))


def rows_of_range(ranges, d=32, seed=0, dtype=torch.float64):
    """A matrix whose rows have these ranges, to rounding: uniform noise with both ends present."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(len(ranges), d, generator=g, dtype=torch.float64)
    x[:, 0], x[:, 1] = 0, 1
    return ((x - 0.5) * torch.tensor(ranges, dtype=torch.float64)[:, None]).to(dtype)


RANGES = {
    "random": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64),
    "heavy tails": lambda n, g: torch.exp(3 * torch.randn(n, generator=g, dtype=torch.float64)),
    "equal": lambda n, g: torch.full((n,), 0.75, dtype=torch.float64),
    "ties": lambda n, g: torch.randint(1, 4, (n,), generator=g).double(),
    "ties and zeros": lambda n, g: torch.randint(0, 3, (n,), generator=g).double(),
    "one huge": lambda n, g: torch.where(torch.arange(n) == n // 2, 1e6, 1.0).double(),
    "one not zero": lambda n, g: (torch.arange(n) == n - 1).double(),
    "two sizes": lambda n, g: torch.where(torch.arange(n) % 5 == 0, 100.0, 1.0).double(),
    "ascending": lambda n, g: torch.arange(n).double(),
    "descending powers": lambda n, g: torch.ldexp(torch.ones(n, dtype=torch.float64), -torch.arange(n).clamp(max=300)),
    "zeros": lambda n, g: torch.zeros(n, dtype=torch.float64),
    "tiny": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64) * 2.0**-140,
}
SIZES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 32, 33, 64, 97, 128, 199, 200]


def ranges_of(kind, n):
    return RANGES[kind](n, torch.Generator().manual_seed(n))


def grouped(ranges, groups="global"):
    """(group, leads, size, s) of each row, as lists."""
    h = Householder(group_rows(ranges, groups), (ranges == 0)[:, None])
    return h.group.tolist(), h.leader.tolist(), h.size.tolist(), h.groups.s[h.group].tolist()


def group_one_by_one(ranges):
    """The published grouping, loop by loop in float64: sort, walk G down from N - 1, round cumulative shares.

    Returns group, leads, size, and the ranges of the group's leader and of its largest follower, of each row, as lists.
    """
    n = len(ranges)
    order = sorted(range(n), key=lambda i: (-ranges[i], i))
    if n < 3 or max(ranges) == 0:
        return [order.index(i) for i in range(n)], [True] * n, [1] * n, ranges, ranges
    v = [ranges[i] for i in order]
    total = list(itertools.accumulate(v))
    leaders = n - 1
    while not (n - leaders) * v[leaders - 1] > total[leaders - 1]:
        leaders -= 1
    group, leads, size, first, second = ([None] * n for _ in range(5))
    start = 0
    for i in range(leaders):
        share = (n - leaders) * total[i] / total[leaders - 1]
        end = n - leaders if i == leaders - 1 else math.floor(share + 0.5)
        members = [i, *range(leaders + start, leaders + end)]
        for rank in members:
            row = order[rank]
            group[row], leads[row], size[row] = i, rank == i, len(members)
            first[row], second[row] = v[i], v[leaders + start]
        start = end
    return group, leads, size, first, second


# ---- grouping


def published_scale(size, first, second):
    """s₂/s₁ of math.md's formula, in Python's float64; 1 for a single row."""
    if size == 1:
        return 1.0
    d = size - math.sqrt(size)
    largest = max(1 / math.sqrt(size), abs(1 - 1 / d), 1 / d if size > 2 else 0.0)
    w1, w2 = first / math.sqrt(size), max(second, 1e-6 * first) * largest
    return (w1 * (size - 1) / w2) ** (1 / 3)


def assert_published(ranges, actual):
    """That groups are those of the loop; scales to 1e-14, a dozen float64 roundings, or one float32 rounding."""
    group, leads, size, first, second = group_one_by_one(ranges.tolist())
    assert actual[:3] == (group, leads, size)
    eps = 1e-14 if ranges.dtype == torch.float64 else 2.0**-24 + 1e-14
    for s, *group in zip(actual[3], size, first, second, strict=True):
        assert abs(s / published_scale(*group) - 1) < eps


@pytest.mark.parametrize("kind", RANGES)
def test_grouping_is_the_published_loop(kind, device):
    for n in [*SIZES, 4096]:
        ranges = ranges_of(kind, n)
        assert_published(ranges, grouped(ranges.to(device)))


def random_ranges(g):
    """Float32 ranges of 3 to 200 rows from one of six distributions, some rounded so that there are ties."""
    n = int(torch.randint(3, 201, (), generator=g))
    spread, kind = float(torch.rand((), generator=g)) * 6, int(torch.randint(0, 6, (), generator=g))
    normal = torch.randn(n, generator=g)
    ranges = [
        lambda: torch.exp(spread * normal),
        lambda: torch.rand(n, generator=g),
        lambda: normal.abs() * 10 ** (spread * (torch.rand(n, generator=g) < 0.05)),
        lambda: torch.rand(n, generator=g).pow(-1 / (0.2 + spread)),  # a power law
        lambda: torch.randint(0, 2 + int(spread), (n,), generator=g).float(),  # ties and zeros
        lambda: torch.ldexp(torch.ones(n), torch.randint(-20, 20, (n,), generator=g)),
    ][kind]()
    ties = torch.rand(n, generator=g) < 0.2
    return torch.where(ties & (ranges < 1e6), ranges.round(), ranges)


def test_grouping_is_the_published_loop_on_four_thousand_random_cases():
    g = torch.Generator().manual_seed(5)
    largest = []
    for _ in range(4_000):
        ranges = random_ranges(g)
        group, leads, size, *_ = group_one_by_one(ranges.tolist())
        assert grouped(ranges)[:3] == (group, leads, size)
        assert min(size) >= 2 or max(ranges.tolist()) == 0
        largest.append(max(size))
    assert sum(s == 3 for s in largest) > 120 and sum(s > 16 for s in largest) > 120  # small groups and large ones


@pytest.mark.parametrize("kind", RANGES)
def test_tiles_are_grouped_each_for_itself(kind, device):
    for n in (1, 2, 127, 128, 129, 300, 1024):
        ranges = ranges_of(kind, n).float()
        actual = grouped(ranges.to(device), "tile")
        for start in range(0, n, 128):
            group, *rest = grouped(ranges[start : start + 128])
            part = slice(start, start + 128)
            assert [a[part] for a in actual] == [[g + start for g in group], *rest]


def test_a_million_rows_are_grouped():
    """2²⁰ float32 ranges: float64 sums would round; the loop in Python integers is exact and decides."""
    n = 2**20
    g = torch.Generator().manual_seed(3)
    ranges = torch.exp(2 * torch.randn(n, generator=g))
    groups = group_rows(ranges)
    v = [int(x) for x in torch.ldexp(ranges.sort(descending=True).values.double(), torch.tensor(149)).tolist()]
    total = list(itertools.accumulate(v))
    count = next(i for i in range(n - 1, 0, -1) if (n - i) * v[i - 1] > total[i - 1])
    size = (groups.first[1:] - groups.first[:-1]).tolist()
    assert sum(s > 0 for s in size) == count and not any(size[count:])
    ends = itertools.accumulate(s - 1 for s in size[:count])
    for i, end in enumerate(ends):
        assert end == (2 * (n - count) * total[i] + total[count - 1]) // (2 * total[count - 1])


def test_the_square_root_is_one():
    """To 1 ulp: a quotient, a sum and a half after convergence."""
    n = torch.arange(1, 2**20 + 1, dtype=torch.float64)
    root = square_root(n)
    assert float((root * root / n - 1).abs().max()) <= 2.5 * 2.0**-52
    assert torch.equal(square_root((n * n)[:2048]), n[:2048])


def test_the_cube_root_is_one():
    """To 2 ulp: three divisions and products after the last step of a cubically convergent iteration."""
    x = torch.exp(200 * (2 * torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1))
    root = cube_root(x)
    assert float((root * root * root / x - 1).abs().max()) < 3 * 4 * 2.0**-53
    assert torch.equal(
        cube_root(torch.tensor([1.0, 8.0, 27.0], dtype=torch.float64)).round(), torch.tensor([1.0, 2, 3]).double()
    )


@pytest.mark.parametrize("kind", [k for k in RANGES if k != "zeros"])
def test_groups_have_one_leader_two_rows_or_more_and_cover_all_rows(kind):
    for n in [n for n in SIZES if n >= 3]:
        ranges = ranges_of(kind, n)
        groups = group_rows(ranges)
        h = Householder(groups, (ranges == 0)[:, None])
        group, leads, size = h.group, h.leader, h.size
        members = torch.bincount(group)
        first = ranges[groups.order[groups.first[group]]]
        assert int(members.min()) >= 2 and int(members.sum()) == n
        assert torch.equal(size, members[group])
        assert torch.equal(torch.bincount(group[leads], minlength=len(members)), torch.ones_like(members))
        for k in range(len(members)):
            own = group == k
            followers = ranges[own & ~leads]
            assert float(ranges[own & leads]) == float(first[own][0]) == float(first[own].max())
            at = groups.order[groups.first[k] : groups.first[k + 1]]
            assert sorted(at.tolist()) == own.nonzero().flatten().tolist() and bool(leads[at[0]])
            assert ranges[at[1:]].tolist() == sorted(followers.tolist(), reverse=True)
            # Leaders are the largest rows, and large leaders get the large followers.
            assert float(ranges[own & leads]) >= float(ranges[~leads].max())
            if k:
                assert float(first[own][0]) <= float(first[group == k - 1][0])
                assert float(followers.max()) <= float(ranges[(group == k - 1) & ~leads].min())


def test_equal_rows_make_groups_of_two_and_three():
    """f(g) = (N - 2g)·v is positive up to g < N/2: 63 groups of 128 rows, ties by row index."""
    group, leads, size, _ = grouped(torch.ones(128, dtype=torch.float64))
    assert max(group) + 1 == 63 and set(size) == {2, 3}
    assert leads == [True] * 63 + [False] * 65


def test_the_number_of_groups_is_exclusive_where_the_share_is_exactly_one():
    """(N - G)·v_G = Σ: the published C++ asks for more than one, and 4 equal rows then are one group, not two."""
    assert max(grouped(torch.ones(4, dtype=torch.float64))[0]) == 0
    assert max(grouped(torch.ones(5, dtype=torch.float64))[0]) == 1


def test_the_order_of_rows_does_not_matter():
    ranges = ranges_of("heavy tails", 97)
    permutation = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    for a, b in zip(grouped(ranges[permutation]), grouped(ranges), strict=True):
        assert a == [b[i] for i in permutation.tolist()]


def test_fewer_than_three_rows_and_all_zeros_are_groups_of_their_own():
    for ranges in ([], [2.0], [3.0, 1.0], [0.0] * 7):
        group, leads, size, s = grouped(torch.tensor(ranges, dtype=torch.float64))
        assert sorted(group) == list(range(len(ranges))) and all(leads) and set(size) <= {1} and set(s) <= {1.0}


# ---- the transform


@pytest.mark.parametrize("kind", RANGES)
def test_the_transform_is_blocks_of_the_closed_form(kind, device):
    """T of the identity, less its scales: Q_1j = Q_j1 = 1/√n, Q_jj = 1 - 1/d, Q_jk = -1/d, d = n - √n; else zero.

    Entries are at most 1 and need about ten float64 roundings each; the factor 2/‖u‖² ≤ 3.5 and sums of n ≤ 33.
    """
    for n in (1, 2, 3, 4, 5, 9, 16, 33):
        h = Householder.of(rows_of_range(ranges_of(kind, n).tolist()).to(device))
        q = (h.apply(torch.eye(n, dtype=torch.float64, device=device)) / h.s.t()).cpu()
        group, leader = h.group.tolist(), h.leader.tolist()
        expected = torch.zeros(n, n, dtype=torch.float64)
        for i, j in itertools.product(range(n), repeat=2):
            size = group.count(group[i])
            if group[i] != group[j]:
                continue
            if size == 1:
                expected[i, j] = 1
            elif leader[i] or leader[j]:
                expected[i, j] = 1 / math.sqrt(size)
            else:
                d = size - math.sqrt(size)
                expected[i, j] = (i == j) - 1 / d
        limit = 400 * 2.0**-53
        assert float((q - expected).abs().max()) < limit
        assert float((q - q.t()).abs().max()) < limit
        assert float((q @ q - torch.eye(n, dtype=torch.float64)).abs().max()) < limit * n


@pytest.mark.parametrize("kind", RANGES)
def test_the_inverse_undoes_the_transform(kind, device):
    """In the units of a row's group: Q mixes a leader into its followers, whose own size is lost below its rounding."""
    for n, dtype in itertools.product((1, 2, 3, 5, 33), (torch.float32, torch.float64)):
        x = rows_of_range(ranges_of(kind, n).tolist(), dtype=dtype).to(device)
        h = Householder.of(x)
        eps = torch.finfo(dtype).eps
        largest = torch.stack([(x * h.s)[h.group == k].abs().max() for k in h.group])[:, None]
        # Two reflections, sums of up to n terms no larger than that; below the normal numbers, of the smallest steps,
        # and float32's sums of followers are of multiples of 2⁻¹²⁶.
        smallest = torch.finfo(dtype).tiny * (eps if dtype == torch.float64 else 1)
        limit = 8 * n * (eps * largest + smallest)
        assert bool(((h.inverse(h.apply(x)) - x).abs() <= limit / h.s).all())
        ratio = float(h.s.max() / h.s.min())
        limit = 8 * n * ratio * (eps * x.abs().max() + smallest)
        assert bool(((h.apply(h.inverse(x)) - x).abs() <= limit).all())


def test_the_transform_acts_on_rows_only_so_it_commutes_with_a_product():
    """T⁻¹(Y) W = T⁻¹(Y W): what lets the inverse wait until after dgrad."""
    x = rows_of_range(ranges_of("heavy tails", 33).tolist())
    w = torch.randn(32, 5, dtype=torch.float64)
    h = Householder.of(x)
    left, right = h.inverse(x) @ w, h.inverse(x @ w)
    assert float((left - right).abs().max()) <= 1e-13 * float(left.abs().max())


@pytest.mark.parametrize("kind", ["random", "heavy tails", "ties", "one huge", "two sizes", "descending powers"])
def test_the_scales_minimise_the_bound_on_the_variance(kind):
    """Per group (s₁⁻² + (n-1)·s₂⁻²)·(w₁s₁ + w₂s₂)², w₁ = λ₁/√n, w₂ = λ₂·max|Q|: no other ratio s₂/s₁ does better."""
    for n in (3, 4, 5, 9, 33):
        ranges = ranges_of(kind, n)
        x = rows_of_range(ranges.tolist())
        h = Householder.of(x)
        ranges = x.amax(1) - x.amin(1)
        dense = h.apply(torch.eye(n, dtype=torch.float64)) / h.s.t()
        for k in h.group.unique():
            own = h.group == k
            size, lead = int(own.sum()), own & h.leader
            first, second = float(ranges[lead]), float(ranges[own & ~h.leader].max())
            w1 = first / math.sqrt(size)
            w2 = max(second, 1e-6 * first) * float(dense[own][:, own].abs().max())
            s1, s2 = float(h.s[lead]), h.s[own & ~h.leader].flatten()
            assert s1 == 1 and bool((s2 == s2[0]).all())

            def bound(ratio, w1=w1, w2=w2, size=size):
                return (1 + (size - 1) / ratio**2) * (w1 + w2 * ratio) ** 2

            best = bound(float(s2[0]))
            # Second order around a minimum: a ratio wrong by 1 % would already show against 3 % on one side.
            assert best < bound(1.03 * float(s2[0])) and best < bound(float(s2[0]) / 1.03)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_rows_are_quantized_per_sample(n):
    x = torch.randn(n, 9)
    for bits in (2, 8):
        rng = laws.random_state(3)
        laws.assert_same(
            reference.dequantized_gradient(x, BHQ(bits), rng=rng), reference.dequantized_gradient(x, PSQ(bits), rng=rng)
        )


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
def test_empty_matrices_are_transformed(shape):
    x = torch.empty(shape)
    h = Householder.of(x)
    assert h.apply(x).shape == h.inverse(x).shape == shape
    assert reference.dequantized_gradient(x, BHQ(4), rng=laws.random_state()).shape == shape


# ---- the variance


def exact_variance(x, quantizer):
    """Σ over elements of p(1-p) bins², through the rows' norms of T⁻¹: 1/(n·s₁²) + (1 - 1/n)/s₂² for a row of a group."""
    y, weight = x, torch.ones(x.shape[0], 1, dtype=torch.float64)
    if quantizer.householder:
        h = Householder.of(x, quantizer.groups)
        y = h.apply(x)
        if quantizer.auto:
            h = h.where_better(x.amax(1) - x.amin(1), y.amax(1) - y.amin(1))
            y = h.apply(x)
        for k in h.group.unique():
            own = h.group == k
            n, s1 = int(own.sum()), float(h.s[own & h.leader])
            s2 = float(h.s[own & ~h.leader][0]) if n > 1 else 1.0
            if float(h.groups.s[k]):
                weight[own] = 1 / (n * s1**2) + (1 - 1 / n) / s2**2
    scale, inv, z, i, _ = reference.quantization_params(
        y.amin(1, True), y.amax(1, True), quantizer.bits, quantizer.zero
    )
    p = ((y - z) * inv + i).double()
    p = p - p.floor()
    return float((weight * p * (1 - p) * scale.double() ** 2).sum())


@pytest.mark.parametrize("kind", ["random", "heavy tails", "equal", "one huge", "two sizes"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_variance_is_that_of_the_formula(kind, bits, device):
    """Monte Carlo: the mean squared error of 200 draws, with its own standard error, at 5σ (and dither: 2⁻¹⁶ of it)."""
    x = rows_of_range(ranges_of(kind, 33).tolist(), d=48, dtype=torch.float32).to(device)
    expected = exact_variance(x.cpu(), BHQ(bits))
    errors = [
        (reference.dequantized_gradient(x, BHQ(bits), rng=laws.random_state(1, i, device)).double() - x).square().sum()
        for i in range(200)
    ]
    errors = torch.stack(errors)
    assert abs(float(errors.mean()) - expected) < 5 * float(errors.std()) / math.sqrt(200) + 1e-4 * expected


@pytest.mark.parametrize("kind", ["random", "heavy tails", "equal", "ties and zeros", "one huge"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_quantization_through_the_transform_is_unbiased(kind, bits, device):
    x = rows_of_range(ranges_of(kind, 17).tolist(), dtype=torch.float32).to(device)
    laws.assert_unbiased(
        lambda i: reference.dequantized_gradient(x, BHQ(bits), rng=laws.random_state(2, i, device)), x, 200
    )


def one_large_row(small):
    """128 normal rows of 512, all but row 77 `small`."""
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    return torch.where((torch.arange(128) == 77)[:, None], x, small * x)


def gain(x, bits):
    return exact_variance(x, BHQ(bits)) / exact_variance(x, PSQ(bits))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_one_large_row_has_its_variance_divided_by_the_number_of_rows(bits):
    """n = 128 rows, one group: each gets 1/√n of the large row, so its bins shrink by √n, and BHQ/PSQ → 1/n.

    The other rows cost (n-1)/s₂² of that on top, s₂ = (w₁·(n-1)/w₂)^(1/3) with w₁ = 1/√n, w₂ = 0.911·λ₂: 0.0024 where
    λ₂ is at its floor of 1e-6, 0.24 for 1e-3. Codes there are those of the large row alone: 1 % for the rounding of p.
    At 1e-3 their share also widens the ranges, by √(1 + (s₂·1e-3·√n)²) - 1 = 3 % for normal values, at most 26 %;
    512 p(1-p) of the large row are known to 2 %: between 1.236·0.9/128 and 1.236·1.07·1.1/128.
    """
    assert abs(gain(one_large_row(1e-9), bits) * 128 / 1.0024 - 1) < 0.01
    assert 0.0087 < gain(one_large_row(1e-3), bits) < 0.0114


def test_the_transform_saves_variance_on_heavy_tails_and_not_on_equal_rows():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 128, generator=g)
    assert gain(x * torch.exp(2 * torch.randn(128, 1, generator=g)), 5) < 0.2
    assert gain(x, 5) > 0.95


@pytest.mark.parametrize("groups", ["global", "tile"])
@pytest.mark.parametrize("kind", ["random", "heavy tails", "equal", "one huge", "two sizes"])
def test_the_variance_is_two_thirds_of_its_bound(kind, groups):
    """Var ≤ D/4 Σ ‖T⁻¹eᵢ‖² bins², as p(1-p) ≤ 1/4, whose mean over well filled bins is 1/6.

    Of 150 · 512 uniform p the mean of p(1-p) is known to 0.2 %; where one row's weight counts for all, to 2 %; at 5σ.
    """
    x = rows_of_range(ranges_of(kind, 150).tolist(), d=512, dtype=torch.float32)
    quantizer = Quantizer(8, "per_row", "min", "stochastic", True, groups=groups)
    h, codes = reference.householder_codes(x, quantizer, rng=laws.random_state())
    bound = 512 / 4 * float((h.weights() * codes.scale.flatten().double() ** 2).sum())
    variance = exact_variance(x, quantizer)
    assert variance <= bound and abs(variance / bound * 1.5 - 1) < 0.1


@pytest.mark.parametrize("groups", ["global", "tile"])
@pytest.mark.parametrize("kind", [k for k in RANGES if k != "zeros"])
def test_auto_predicts_no_more_variance_than_either_quantizer(kind, groups):
    """Group by group the smaller of two sums: the total is at most either's, to the rounding of float64 sums."""
    x = rows_of_range(ranges_of(kind, 150).tolist(), d=64)
    h = Householder.of(x, groups)
    before, after = (t.amax(1) - t.amin(1) for t in (x, h.apply(x)))
    chosen = h.where_better(before, after)
    y = chosen.apply(x)
    predicted = float((chosen.weights() * (y.amax(1) - y.amin(1)).square()).sum())
    bhq, psq = float((h.weights() * after.square()).sum()), float(before.square().sum())
    assert predicted <= min(bhq, psq) * (1 + 1e-12)
    kept = chosen.groups.s[chosen.group] != 0
    assert torch.equal(y[kept], h.apply(x)[kept]) and torch.equal(y[~kept], x[~kept])
    assert bool(kept.any()) or predicted == psq


def test_auto_is_no_worse_than_rows_on_their_own_and_much_better_with_one_large_row():
    auto = Quantizer(5, "per_row", "min", "stochastic", True, auto=True)
    equal = torch.randn(128, 512, generator=torch.Generator().manual_seed(2))
    assert exact_variance(equal, auto) <= 1.01 * exact_variance(equal, PSQ(5))  # p(1-p) is known to 0.5 %
    large = one_large_row(1e-3)
    assert exact_variance(large, auto) == exact_variance(large, BHQ(5))


# ---- rows that are not ordinary


@pytest.mark.parametrize("bits", [2, 8])
def test_rows_of_zero_range_come_back_exactly(bits, device):
    x = rows_of_range(ranges_of("heavy tails", 13).tolist(), dtype=torch.float32).to(device)
    x[4], x[7], x[8], x[12] = 0.0, 0.1, -1e30, 3e-40
    for step in range(4):
        out = reference.dequantized_gradient(x, BHQ(bits), rng=laws.random_state(4, step, device))
        for row in (4, 7, 8, 12):
            assert torch.equal(out[row], x[row])


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_matrix_of_equal_rows_of_no_range_comes_back_exactly(value):
    x = torch.full((9, 5), value) * torch.arange(1, 10)[:, None]
    h = Householder.of(x)
    assert torch.equal(h.apply(x), x) and torch.equal(h.inverse(x), x) and bool(h.constant.all())
    assert torch.equal(reference.dequantized_gradient(x, BHQ(3), rng=laws.random_state()), x)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("kind", ["heavy tails", "two sizes", "equal", "zeros"])
@pytest.mark.parametrize("row", [0, 7, 16])
def test_a_non_finite_row_poisons_its_own_group_only(bad, kind, row, device):
    """Other groups are bit-identical to the run in which that row has no range; rows without a range stay exact."""
    clean = rows_of_range(ranges_of(kind, 17).tolist(), dtype=torch.float32).to(device)
    clean[row], clean[3] = 1.0, 0.5
    x = clean.clone()
    x[row, 5 : 5 + len(bad)] = torch.tensor(bad, device=device)
    h = Householder.of(x)
    assert torch.equal(h.group, Householder.of(clean).group)
    if kind != "zeros":
        assert not bool(h.leader[row]) and int((h.group == h.group[row]).sum()) < 17
    rng = laws.random_state(5, 0, device)
    before, after = (reference.dequantized_gradient(t, BHQ(5), rng=rng) for t in (clean, x))
    poisoned = (h.group == h.group[row]) & ~h.constant[:, 0]
    assert bool(poisoned[row])
    assert not bool(torch.isfinite(after[poisoned]).any())
    assert torch.equal(after[~poisoned], before[~poisoned])


def test_every_row_non_finite_leaves_nothing_finite():
    for value in (math.nan, math.inf):
        x = torch.full((5, 4), value)
        assert not bool(torch.isfinite(reference.dequantized_gradient(x, BHQ(4), rng=laws.random_state())).any())


def test_the_transform_repeats_itself(device):
    x = rows_of_range(ranges_of("ties", 199).tolist(), dtype=torch.float32).to(device)
    a, b = (reference.dequantized_gradient(x, BHQ(4), rng=laws.random_state(6, 0, device)) for _ in range(2))
    assert torch.equal(a, b)
    strided = laws.poisoned(x)
    assert torch.equal(reference.dequantized_gradient(strided, BHQ(4), rng=laws.random_state(6, 0, device)), a)


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-20, 2.0**60])
def test_the_transform_does_not_depend_on_the_unit(scale):
    """A power of two scales everything without rounding: the same groups and codes, the values scaled."""
    x = rows_of_range(ranges_of("heavy tails", 33).tolist(), dtype=torch.float32)
    a, b = (reference.dequantized_gradient(t, BHQ(5), rng=laws.random_state()) for t in (x, x * scale))
    assert torch.equal(a * scale, b)
