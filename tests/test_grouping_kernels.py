"""Laws of the grouping kernels: the groups of fqt/householder.py, bit for bit, from ranges found on the device."""

import laws
import pytest
import torch
import triton
import triton.language as tl
from test_householder import RANGES, random_ranges, ranges_of

from fqt import householder
from fqt_kernels import grouping, statistics

# The interpreter divides in lanes that no group is taken from.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SIZES = [0, 1, 2, 3, 4, 5, 31, 127, 128, 129, 300, 1000]


@pytest.fixture(autouse=True)
def memory(guard):
    """What the launchers allocate lies between guard bands, and what they leave unwritten is poison."""
    return guard(grouping, statistics)


def blocks(monkeypatch, leaders, ranks):
    monkeypatch.setattr(grouping, "LEADERS", (leaders, 1))
    monkeypatch.setattr(grouping, "RANKS", (ranks, 1))


def assert_defined(ranges, device, groups="global"):
    """That the groups of these float32 ranges are those of the definition."""
    actual, expected = grouping.group_rows(ranges.to(device), groups), householder.group_rows(ranges, groups)
    for name in grouping.Groups._fields:
        kind = torch.float32 if name == "s" else torch.int32
        laws.assert_same(getattr(actual, name), getattr(expected, name).to(kind), f"{name} of {ranges.numel()} rows")
    return actual


# ---- groups


@pytest.mark.parametrize("kind", RANGES)
def test_groups_of_all_rows_are_the_definition_s(kind, device):
    """Every size, and every kind with half of the sizes, the largest included."""
    for n in [*SIZES[list(RANGES).index(kind) % 2 : -1 : 2], SIZES[-1]]:
        assert_defined(ranges_of(kind, n).float(), device)


def test_more_rows_lead_than_one_step_of_the_walk_takes(device):
    groups = assert_defined(torch.ones(4200), device)
    assert int((groups.first.diff() > 0).sum()) == 2099 > grouping.LEADERS[0]


@pytest.mark.parametrize("kind", RANGES)
def test_groups_of_a_whole_tile_and_of_a_ragged_one_are_the_definition_s(kind, device):
    assert_defined(ranges_of(kind, 199).float(), device, "tile")


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 127, 128, 129, 384])
def test_tiles_of_any_number_of_rows_are_grouped(n, device):
    assert_defined(ranges_of("heavy tails", n).float(), device, "tile")


@pytest.mark.parametrize(("groups", "cases"), [("global", 30), ("tile", 10)])
def test_groups_of_random_ranges_are_the_definition_s(groups, cases, device, monkeypatch):
    """Small blocks, so that the walk over the leaders takes many."""
    blocks(monkeypatch, 32, 256)
    g = torch.Generator().manual_seed(7)
    for _ in range(cases):
        ranges = random_ranges(g)
        assert_defined(ranges if groups == "global" else ranges[:127], device, groups)


@pytest.mark.parametrize("groups", ["global", "tile"])
def test_a_share_of_exactly_one_half_goes_up(groups, device):
    """45·35/50 = 31.5 followers belong to the first seven of ten leaders: 45·(35/50) would round below it."""
    first = assert_defined(torch.tensor([5.0] * 10 + [1.0] * 45), device, groups).first
    assert int(first[7]) == 7 + 32


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("kind", ["equal", "two sizes"])
def test_the_walk_ends_with_the_last_leader_wherever_it_is_in_a_block(kind, count, device, monkeypatch):
    """Of N equal rows the first ⌈N/2⌉ - 1 lead. Large rows before them, each as large as all: they lead as well."""
    blocks(monkeypatch, 16, 32)
    for n in (2 * count + 1, 2 * count + 2):
        ranges = torch.ones(n)
        if kind == "two sizes":
            ranges[:count] = n
        groups = assert_defined(ranges, device)
        assert int((groups.first.diff() > 0).sum()) == count


def test_a_million_rows_are_grouped(device, monkeypatch):
    """In large blocks in the interpreter, whose time goes by blocks."""
    n = 2**20
    if device == "cpu":
        blocks(monkeypatch, 2**17, 2**16)
    ranges = torch.exp(2 * torch.randn(n, generator=torch.Generator().manual_seed(3)))
    groups = assert_defined(ranges, device)
    assert int((groups.first.diff() > 0).sum()) > n // 8  # the walk takes more than one step


@pytest.mark.parametrize("groups", ["global", "tile"])
def test_a_range_that_is_not_finite_counts_as_zero(groups, device):
    ranges = ranges_of("heavy tails", 97).float()
    at = [3, 17, 18, 40, 96]
    wild, tame = ranges.clone(), ranges.clone()
    wild[at] = torch.tensor([torch.inf, torch.nan, -torch.nan, -torch.inf, torch.inf])
    tame[at] = 0
    for a, b in zip(assert_defined(wild, device, groups), assert_defined(tame, device, groups), strict=True):
        assert torch.equal(a, b)
    assert_defined(torch.full((7,), torch.nan), device, groups)


def test_another_kind_of_groups_is_refused():
    with pytest.raises(ValueError, match="groups must be 'global' or 'tile', got 'row'"):
        grouping.group_rows(torch.ones(4), "row")


# ---- arithmetic


@triton.jit
def _arithmetic_kernel(n_ptr, first_ptr, second_ptr, scale_ptr, whole_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    first = tl.load(first_ptr + i)
    scale = grouping._follower_scale(tl.load(n_ptr + i), first, tl.load(second_ptr + i))
    tl.store(scale_ptr + i, scale)
    tl.store(whole_ptr + i, grouping._integers(first, tl.max(first, 0), N))


def test_scales_and_integers_are_the_definition_s_in_float64(device):
    """What s in float32 and the groups hardly ever show.

    Roots are of explicit operations, in the same order: the same bits.
    """
    g = torch.Generator().manual_seed(0)
    size = torch.cat([torch.arange(2, 34), torch.randint(2, 2**20, (2016,), generator=g)]).double()
    first = torch.exp(6 * torch.randn(2048, generator=g)).double().sort(descending=True).values
    second = torch.where(
        torch.arange(2048) % 9 == 0, 0, first * torch.exp(-20 * torch.rand(2048, generator=g)).double()
    )
    scale, whole = (
        torch.empty(2048, dtype=torch.float64, device=device),
        torch.empty(2048, dtype=torch.int64, device=device),
    )
    _arithmetic_kernel[(1,)](
        size.to(device), first.to(device), second.to(device), scale, whole, N=2048, enable_fp_fusion=False
    )
    expected = householder._follower_scale(size, first, second)
    assert torch.equal(scale.cpu(), expected)
    assert torch.equal(whole.cpu(), householder._integers(first[None], 12)[0])  # 2048 has 12 bits


# ---- ranges of rows


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (33, 40), (3, 8800), (0, 0)])
@pytest.mark.parametrize("factors", [None, "rows", "columns"])
def test_ranges_and_magnitudes_are_those_of_the_rows(shape, factors, device):
    """8800 columns are 18 parts, more than a block of them, and the last ones have the largest values."""
    m, n = shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(m)) + torch.linspace(-3, 3, m)[:, None]
    x *= torch.linspace(1, 4, n)
    multiplier = torch.rand((m, 1) if factors == "rows" else (1, n)) - 0.5 if factors else None
    if m:
        partial = statistics.row_stats(
            x.to(device), "per_row", False, None if multiplier is None else multiplier.to(device)
        )
    else:
        partial = torch.empty(2, 1, 0, dtype=torch.int32, device=device)
    ranges, absmax = grouping.row_ranges(partial)
    x = x if multiplier is None else x * multiplier
    expected = (x.amax(1) - x.amin(1), x.abs().amax(1)) if m else (torch.empty(0), torch.empty(0))
    laws.assert_same(ranges, expected[0], "ranges")
    laws.assert_same(absmax, expected[1].view(torch.int32), "absmax")


def test_a_value_that_is_not_finite_shows_in_both_the_range_and_the_magnitude(device):
    """Finite rows whose range overflows count as such too, as in the definition; their magnitude is finite."""
    inf, nan = torch.inf, torch.nan
    rows = [[nan, 1], [1, -nan], [nan, nan], [inf, 1], [-inf, 1], [inf, inf], [-inf, -inf], [inf, -inf], [inf, nan],
            [-inf, nan], [1, 1], [0, -0.0], [-2, -2], [1e-45, 0], [3e38, -3e38]]  # fmt: skip
    x = torch.tensor(rows)
    ranges, absmax = (t.cpu() for t in grouping.row_ranges(statistics.row_stats(x.to(device), "per_row", False)))
    laws.assert_same(ranges, x.amax(1) - x.amin(1), "ranges")
    finite = x.isfinite().all(1)
    assert torch.equal(ranges.isfinite(), finite & (torch.arange(len(rows)) != 14))
    assert torch.equal(absmax < 0x7F800000, finite) and bool((absmax >= 0).all())
    assert torch.equal(absmax[finite], x.abs().amax(1)[finite].view(torch.int32))
    assert torch.equal(householder.fixed_point(absmax)[1].isnan(), ~finite)


# ---- the largest magnitude of a group's followers


@pytest.mark.parametrize(
    ("kind", "n"), [("heavy tails", 200), ("one huge", 50), ("equal", 33), ("zeros", 9), ("random", 2), ("zeros", 0)]
)
@pytest.mark.parametrize("groups", ["global", "tile"])
def test_the_magnitude_of_a_group_is_the_largest_of_its_followers(kind, n, groups, device, monkeypatch):
    """Blocks of 16: groups that share a program, a program within a group, and groups across programs."""
    blocks(monkeypatch, 32, 16)
    found = householder.group_rows(ranges_of(kind, n).float(), groups)
    leader = found.order[found.first[found.group]] == torch.arange(n)
    x = torch.exp(3 * torch.randn(n, generator=torch.Generator().manual_seed(1)))
    x = torch.where(leader, 2 * x + 1e6, x)  # leaders have the largest
    x[n // 2 : n // 2 + 1] = torch.nan
    bits = x.view(torch.int32)
    expected = torch.zeros(n, dtype=torch.int32).scatter_reduce_(0, found.group, torch.where(leader, 0, bits), "amax")
    kinds = (torch.int32, torch.int32, torch.int32, torch.float32)
    on_device = grouping.Groups(*(t.to(device, kind) for t, kind in zip(found, kinds, strict=True)))
    laws.assert_same(grouping.group_absmax(bits.to(device), on_device), expected)


# ---- launching


def test_launching_looks_at_no_value_so_it_waits_for_no_device(monkeypatch):
    """Tensors without memory: reading one on the host, or a shape that depends on one, raises."""
    monkeypatch.setattr(grouping, "torch", torch)  # guard bands have memory to look at
    launched = []
    for name in [name for name in vars(grouping) if name.endswith("_kernel")]:
        kernel = {"__getitem__": lambda self, grid, name=name: lambda *args, **options: launched.append((name, grid))}
        monkeypatch.setattr(grouping, name, type("Kernel", (), kernel)())
    for n in (0, 1, 5000):
        absmax = grouping.row_ranges(torch.empty(2, 3, n, dtype=torch.int32, device="meta"))[1]
        for groups in ("global", "tile"):
            found = grouping.group_rows(torch.empty(n, device="meta"), groups)
            assert [tuple(t.shape) for t in (*found, grouping.group_absmax(absmax, found))] == [
                (n,), (n,), (n + 1,), (n,), (n,),
            ]  # fmt: skip
    assert {name for name, _ in launched} == {name for name in vars(grouping) if name.endswith("_kernel")}
