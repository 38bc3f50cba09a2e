"""Laws of the kernels of the block Householder transform: the reference bit for bit, however the work is divided."""

import laws
import pytest
import torch

import fqt_kernels.grouping as grouping
import fqt_kernels.householder as kernels
import fqt_kernels.householder_sums as sums
import fqt_kernels.statistics as statistics
from fqt import reference
from fqt.householder import Householder
from fqt.recipe import Quantizer

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

INTERPRETED = not torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows in registers are whole multiples of 16; longer and odd ones are walked along. Of 70 rows all are one group.
SHAPES = {
    "rows": [(1, 16), (2, 16), (3, 48), (7, 16), (33, 144), (70, 48)],
    "long rows": [(3, 48), (7, 144), (33, 16), (70, 16)],
    "odd rows": [(1, 5), (3, 1), (3, 130), (7, 33), (33, 13), (70, 5)],
}
KINDS = ("heavy tails", "one huge", "equal")


@pytest.fixture(autouse=True)
def memory(guard, monkeypatch):
    """Guard bands around all that is allocated, poison where nothing is written; pieces so small that all paths are taken.

    Groups of 16 rows have their sums found before, in pieces from 32 on; matrices are wider than tiles.
    """
    small = dict(PIECES=(8,), LONG_ROWS=(8, 64, 1), ODD_ROWS=(8, 32, 1), INVERSE=(8, 32, 1), INVERSE_PIECE=8)
    for name, value in small.items():
        monkeypatch.setattr(kernels, name, value)
    for name, value in dict(SUMS_ELEMENTS=1024, SUMS_COLUMNS=64, SUMS_WINDOW=32, SUMS_PIECE=16).items():
        monkeypatch.setattr(sums, name, value)
    monkeypatch.setattr(kernels, "CHOOSE", (32, 32, 1))
    return guard(kernels, sums, statistics, grouping)


def gradient(m, n, kind="heavy tails", dtype=torch.float32, seed=0):
    """Rows of different ranges, which are groups of a few rows, one group, or groups of two; some elements and rows 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g)
    if kind == "heavy tails":
        x *= torch.exp(3 * torch.randn(m, 1, generator=g))
    x = torch.where(torch.rand(m, n, generator=g) < 0.1, torch.zeros(()), x)
    x[2::7] = 0
    if kind == "one huge":
        x[m // 2] = 1e4 * torch.randn(n, generator=g)
    return x.to(dtype)


def for_kernels(groups):
    """The reference's groups in the types of the kernels, not shared with them."""
    return grouping.Groups(*(t.to(torch.int32) for t in groups[:3]), groups.s.clone())


def absmax(x):
    return x.abs().amax(1).view(torch.int32)


def ranges(x):
    return x.amax(1) - x.amin(1)


def transform(x, quantizer, device, *, multiplier=None, rng=None, **options):
    """(the kernels' outputs, their groups afterwards), from the reference's groups."""
    y = x.float() if multiplier is None else x.float() * multiplier
    groups = grouping.Groups(*(t.to(device) for t in for_kernels(Householder.of(y, quantizer.groups).groups)))
    got = kernels.transform(
        x if x.device.type == device else x.to(device), groups, absmax(y).to(device),
        multiplier=None if multiplier is None else multiplier.to(device), bits=quantizer.bits, zero=quantizer.zero,
        rng=None if rng is None else rng.to(device), ranges=ranges(y).to(device) if quantizer.auto else None, **options,
    )  # fmt: skip
    return got, groups


def invert(z, h, x, columns, device, out_dtype=torch.float32):
    """The kernels' T⁻¹ z, of the transform h of x."""
    return kernels.inverse(
        z.to(device), grouping.Groups(*(t.to(device) for t in for_kernels(h.groups))), absmax(z).to(device),
        ranges=ranges(x).to(device), value=x[:, 0].to(device), columns=columns.to(device), out_dtype=out_dtype,
    )  # fmt: skip


def assert_codes(got, codes, what):
    for a, e, name in zip(
        got, (codes.q, codes.scale, codes.offset, codes.row_sum), ("q", "scale", "offset", "row_sum"), strict=True
    ):
        laws.assert_same(a, e, f"{name} {what}")


def assert_equals_reference(x, quantizer, device, *, multiplier=None, stream=515, **options):
    rng = laws.random_state(5, 3) if quantizer.rounding == "stochastic" else None
    y = x.float() if multiplier is None else x.float() * multiplier
    h, codes = reference.householder_codes(y, quantizer, rng=rng, stream=stream % 256, rank=stream // 256, sums=True)
    got, groups = transform(x, quantizer, device, multiplier=multiplier, rng=rng, stream=stream, sums=True, **options)
    assert_codes(got, codes, f"of {tuple(x.shape)} {x.dtype} {quantizer}")
    g = h.groups.group
    assert torch.equal(groups.s.cpu()[g], h.groups.s[g]), "the choice"
    return h, codes


# ---- equal to the reference


@pytest.mark.parametrize("way", SHAPES)
def test_the_codes_are_those_of_the_reference(way, device, monkeypatch):
    """Bits, zero, type, multiplier, rounding and the kind of ranges change with the shape."""
    if way == "long rows":
        monkeypatch.setattr(kernels, "ROWS_MAX", 8)
    for i, (m, n) in enumerate(SHAPES[way]):
        zero, rounding = ("min", "grid", "symmetric")[i % 3], "nearest" if i % 4 == 3 else "stochastic"
        quantizer = Quantizer((8, 5, 2)[i // 2 % 3], "per_row", zero, rounding, True)
        multiplier = torch.rand(*((m, 1), (1, n))[i // 2 % 2]) + 0.5 if i % 2 else None
        x = gradient(m, n, "one huge" if m == 70 else KINDS[i % 3], DTYPES[i % 3], seed=i)
        h, _ = assert_equals_reference(x, quantizer, device, multiplier=multiplier)
        assert m != 70 or int(h.size.max()) == 70


@pytest.mark.parametrize("way", SHAPES)
def test_what_is_not_there_widens_no_range(way, device, monkeypatch):
    """Of positive rows: columns and rows with which a tile is filled up count for nothing."""
    if way == "long rows":
        monkeypatch.setattr(kernels, "ROWS_MAX", 8)
    x = gradient(5, 33 if way == "odd rows" else 48).abs() + 1
    assert_equals_reference(x, Quantizer(8, "per_row", "min", "nearest", True), device)


@pytest.mark.parametrize("n", [16, 7])
def test_groups_of_tiles_are_those_of_the_reference(n, device):
    """One group of a tile of 128 rows, and groups of the 33 rows of the next."""
    x = torch.cat([gradient(128, n, "one huge"), gradient(33, n, seed=1)])
    h, _ = assert_equals_reference(x, Quantizer(8, "per_row", "min", "nearest", True, groups="tile"), device)
    assert int(h.size[0]) == 128 and int(h.size[128:].max()) < 33


@pytest.mark.parametrize("way", SHAPES)
def test_the_choice_of_auto_is_that_of_the_reference(way, device, monkeypatch):
    """Some groups are transformed and some are not."""
    if way == "long rows":
        monkeypatch.setattr(kernels, "ROWS_MAX", 8)
    left = []
    for i, (m, n) in enumerate([(2, 16), (20, 32), (40, 16)]):
        n = n + 1 if way == "odd rows" else n
        x = torch.cat([gradient(m // 2, n, "heavy tails", seed=i), gradient(m - m // 2, n, "equal", seed=i)])
        quantizer = Quantizer(4, "per_row", ("symmetric", "min", "grid")[i], "stochastic", True, auto=True)
        h, _ = assert_equals_reference(x, quantizer, device)
        left += h.groups.s[h.groups.group].tolist()
    assert 0 in left and len(set(left)) > 2


@pytest.mark.parametrize("groups", ["global", "tile"])
def test_the_inverse_is_that_of_the_reference_and_constant_rows_are_known(groups, device):
    """In float32 and rounded once; the interpreter truncates bfloat16: within one ulp there."""
    for i, (m, k) in enumerate([(1, 5), (3, 33), (7, 16), (33, 65), (150, 1)]):
        x = gradient(m, 9, "one huge" if m == 150 else "heavy tails", seed=i)
        x[0] = 0.75  # constant, not zero
        h = Householder.of(x, groups)
        if i % 2:  # some groups are left as they are
            h = h._replace(groups=h.groups._replace(s=torch.where(h.groups.s > 2.5, 0, h.groups.s)))
        z, columns = gradient(m, k, seed=50 + i), torch.randn(k)
        expected = torch.where(h.constant, x[:, :1] * columns, h.inverse(z))
        out_dtype = DTYPES[i % 3]
        got = invert(z, h, x, columns, device, out_dtype)
        if INTERPRETED and out_dtype == torch.bfloat16:
            assert bool(((got.float() - expected).abs() <= laws.ulp(expected.to(out_dtype))).all())
        else:
            laws.assert_same(got, expected.to(out_dtype), f"{m}x{k} {groups}")


# ---- nothing else matters


@pytest.mark.parametrize("way", SHAPES)
def test_nothing_depends_on_how_the_work_is_divided(way, device, monkeypatch):
    """Pieces of groups, windows and tiles of every kernel."""
    n = 33 if way == "odd rows" else 32
    x = torch.cat([gradient(12, n, "heavy tails"), gradient(40, n, "one huge", seed=1)])
    quantizer = Quantizer(8, "per_row", "min", "nearest", True)
    if way == "long rows":
        monkeypatch.setattr(kernels, "ROWS_MAX", 8)
    for piece, tile, tile_of_sums in ((16, (16, 64, 1), (64, 512, 64, 16)), (4, (4, 16, 1), (16, 128, 16, 64))):
        monkeypatch.setattr(kernels, "PIECES", (piece,))
        monkeypatch.setattr(kernels, "LONG_ROWS", tile)
        monkeypatch.setattr(kernels, "ODD_ROWS", tile)
        names = "SUMS_COLUMNS", "SUMS_ELEMENTS", "SUMS_WINDOW", "SUMS_PIECE"
        for name, value in zip(names, tile_of_sums, strict=True):
            monkeypatch.setattr(sums, name, value)
        h, codes = assert_equals_reference(x, quantizer, device)
        z = codes.dequantize()
        monkeypatch.setattr(kernels, "INVERSE", tile)
        monkeypatch.setattr(kernels, "INVERSE_PIECE", piece)
        expected = torch.where(h.constant, x[:, :1], h.inverse(z))
        laws.assert_same(invert(z, h, x, torch.ones(n), device), expected, f"pieces of {piece}")


def test_pieces_have_their_default_sizes(device, monkeypatch):
    """The launch as it is without a test's changes."""
    monkeypatch.undo()
    for n in (144, 130):
        x = gradient(20, n, dtype=torch.bfloat16)
        assert_equals_reference(x, Quantizer(8, "per_row", "min", "stochastic", True), device)


def test_layout_is_only_a_stride(device):
    """The same values in any layout have the same codes; what lies between them is not read."""
    x = gradient(9, 32, dtype=torch.bfloat16).to(device)
    unaligned = torch.full((9 * 48 + 1,), float("nan"), dtype=x.dtype, device=device)[1:].view(9, 48)[:, :32]
    unaligned.copy_(x)
    quantizer = Quantizer(8, "per_row", "min", "stochastic", True)
    rng = laws.random_state(5)
    expected, _ = transform(x.cpu(), quantizer, device, rng=rng, sums=True)
    layouts = (
        laws.poisoned(x),
        laws.poisoned(x.t()).t(),
        laws.poisoned_rows(x, 40),
        laws.poisoned_rows(x, 48),
        unaligned,
    )
    groups = grouping.Groups(*(t.to(device) for t in for_kernels(Householder.of(x.cpu().float()).groups)))
    for y in layouts:
        got = kernels.transform(
            y, groups, absmax(x.float()), bits=8, zero="min", rng=rng.to(device), sums=True
        )  # fmt: skip
        for a, e in zip(got, expected, strict=True):
            laws.assert_same(a, e, f"strides {y.stride()}")
    row = x[:1].expand(9, 32)
    assert_equals_reference(row.cpu(), quantizer, device)


def test_only_what_is_asked_for_is_made_and_the_input_is_left_alone(device):
    x = gradient(9, 16).to(device)
    before = x.clone()
    (q, scale, offset, row_sum), groups = transform(x, Quantizer(8, "per_row", "symmetric", "nearest", True), device)
    assert torch.equal(x, before) and offset is None and row_sum is None
    assert q.dtype == torch.int8 and scale.shape == (9, 1)
    assert bool((groups.s > 0).all())  # no choice was asked for


def test_nothing_waits_for_the_device(monkeypatch):
    """No value of a tensor reaches the host: tensors without memory are enough for every launch."""

    class Ignored:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for module in (kernels, sums, grouping):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Ignored())
        monkeypatch.setattr(module, "torch", torch)
    monkeypatch.setattr(statistics, "torch", torch)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    ints = lambda size: new(size, dtype=torch.int32)  # noqa: E731
    for m, n in ((5000, 4096), (300, 20_001)):
        groups = grouping.Groups(ints(m), ints(m), ints(m + 1), new(m))
        q, *_ = kernels.transform(
            new(m, n), groups, ints(m), bits=8, zero="min", rng=new(2, dtype=torch.int64), sums=True, ranges=new(m)
        )
        more = dict(ranges=new(m), value=new(m), columns=new(n))
        out = kernels.inverse(new(m, n), groups, ints(m), **more, out_dtype=torch.bfloat16)
        assert q.shape == out.shape == (m, n)


# ---- values that are not numbers, and zeros


@pytest.mark.parametrize(
    "way, value", [("rows", float("nan")), ("long rows", float("inf")), ("odd rows", -float("inf"))]
)
def test_a_non_finite_row_makes_its_group_non_finite_and_no_other(way, value, device, monkeypatch):
    """Scale and codes are the reference's; the inverse of what they stand for has no finite row in that group."""
    if way == "long rows":
        monkeypatch.setattr(kernels, "ROWS_MAX", 8)
    x = gradient(20, 33 if way == "odd rows" else 32)
    x[11, 7] = value
    for zero in ("min", "grid", "symmetric"):
        h, codes = assert_equals_reference(x, Quantizer(8, "per_row", zero, "nearest", True), device)
        bad = h.group == h.group[11]
        assert 1 < int(bad.sum()) < 20 and torch.equal(~codes.scale.isfinite()[:, 0], bad)
    z = codes.dequantize()
    got = invert(z, h, x, torch.ones(z.shape[1]), device)
    laws.assert_same(got, torch.where(h.constant, x[:, :1], h.inverse(z)))
    assert not bool(got.cpu()[bad & ~h.constant[:, 0]].isfinite().any())


def test_auto_leaves_a_group_with_a_non_finite_row_as_it_is(device):
    x = gradient(20, 16)
    x[11, 7] = float("nan")
    quantizer = Quantizer(8, "per_row", "min", "stochastic", True, auto=True)
    h, codes = assert_equals_reference(x, quantizer, device)
    assert float(h.groups.s[h.group[11]]) == 0
    assert (~codes.scale.isfinite()).flatten().nonzero().flatten().tolist() == [11]


def test_the_largest_numbers_overflow_as_in_the_reference(device):
    """Sums and ranges beyond float32, and numbers near its smallest."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(12, 16, generator=g)
    for scale in (1e38, 1e-38):
        assert_equals_reference(x * scale, Quantizer(8, "per_row", "min", "nearest", True), device)


@pytest.mark.parametrize("zero", ["min", "grid", "symmetric"])
def test_zeros_stay_zeros(zero, device):
    """Of a matrix of zeros, and of zero rows among others by the inverse."""
    quantizer = Quantizer(8, "per_row", zero, "stochastic", True)
    _, codes = assert_equals_reference(torch.zeros(9, 16), quantizer, device)
    assert bool((codes.dequantize() == 0).all())
    x = gradient(20, 16)
    h = Householder.of(x)
    z = h.apply(x)
    got = invert(z, h, x, torch.randn(16), device)
    assert bool((got.cpu()[2::7] == 0).all()) and bool((got.cpu()[3] != 0).any())
