"""Laws of the product with the inverse of tile-local Householder groups: `fqt.householder`'s to float32's rounding."""

import functools
import inspect
import math

import laws
import pytest
import torch
from products import INTERPRETED, gpu_family, pair

import fqt_kernels.gemm_householder as kernels
from fqt import reference
from fqt.householder import Householder, group_rows
from fqt_kernels.grouping import Groups

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CONFIG = (64, 64, 1, 8, 4)  # in every table, so on every GPU
AFFINE = ("per_row", True, "per_row", True)
SCALES = ("per_row", False, "per_row", False)


@pytest.fixture(autouse=True)
def memory(guard):
    """What the launcher allocates lies between guard bands, and what it leaves unwritten is poison."""
    guard(kernels)


def ranges_of(kind, m):
    """Ranges of m rows. "equal": groups of two; "one huge": of a whole tile; "zeros": every third row has none."""
    generator = torch.Generator().manual_seed(m)
    if kind == "equal":
        return torch.ones(m)
    if kind == "one huge":
        return torch.where(torch.arange(m) % 128 == min(5, m - 1), 1e4, 1.0)
    ranges = torch.exp(2 * torch.randn(m, generator=generator))
    return torch.where(torch.arange(m) % 3 == 1, 0.0, ranges) if kind == "zeros" else ranges


class Case:
    """Operands, groups and exact values of a product (m, n, k)."""

    def __init__(self, m, n, k, kind="random", epilogue=AFFINE, seed=0):
        self.a, self.b = pair(m, n, k, epilogue, seed=seed)
        self.ranges = ranges_of(kind, m)
        self.groups = group_rows(self.ranges, "tile")
        generator = torch.Generator().manual_seed(seed)
        self.value, self.columns = torch.randn(m, generator=generator), torch.randn(n, generator=generator)

    @property
    def transform(self):
        return Householder(self.groups, (self.ranges == 0)[:, None])

    @property
    def product(self):
        """z = A Bᵀ, which the kernel computes to the same bits."""
        return reference.scaled_mm(self.a, self.b)

    @property
    def expected(self):
        exact = self.value[:, None] * self.columns
        return torch.where(self.transform.constant, exact, self.transform.inverse(self.product))

    @property
    def limit(self):
        """How far the kernel may be from the reference, with u = 2⁻²⁴ and a the largest |z| of the group's column.

        Σ |w z| ≤ (1/√n + (n - 1)/d)·a < 2.5·a. Of b, each term has two roundings (of w, of the product) and at most 9
        additions: 28·u·a; with its use, a follower has less than 40·u·a/s, a leader, to which b comes √n times, as much
        times √n. Of the reference's own roundings there are less than 10·u·√n·a; and the n terms of its sum are off by
        2⁻³⁰ of the largest |z| of all columns each, which n/d < 4 or n/√n of reach a row.
        """
        z, group = self.product, self.groups.group[:, None].expand(-1, self.b.q.shape[0])
        largest = torch.zeros_like(z).scatter_reduce_(0, group, z.abs(), "amax").gather(0, group)
        unit = 50 * laws.EPS * largest + 4 * 2.0**-30 * largest.amax(1, keepdim=True)
        return unit * self.transform.size[:, None].sqrt() / self.transform.s

    def launch(self, device, config=CONFIG, **changes):
        def move(t):
            return None if t is None else t.to(device)

        a, b, groups = (changes.pop(name, getattr(self, name)) for name in ("a", "b", "groups"))
        groups = Groups(*(x.to(torch.int32) for x in groups[:3]), groups.s)
        arguments = dict(
            a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum, ranges=self.ranges, value=self.value,
            columns=self.columns,
        ) | changes  # fmt: skip
        arguments = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        codes = move(a.q), move(b.q), move(a.scale), move(b.scale)
        return kernels.scaled_mm(*codes, **arguments, groups=Groups(*map(move, groups)), config=config).cpu()

    def check(self, out):
        excess = (out - self.expected).abs() - self.limit
        assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding"


# ---- equal to the definition


# M of one row, one below and above a tile, a last tile of two rows, which are groups of their own; N and K off blocks.
@pytest.mark.parametrize("m, n, k", [(1, 33, 17), (127, 65, 16), (128, 1, 48), (130, 70, 80), (300, 20, 65)])
def test_it_is_the_inverse_of_the_product(m, n, k, device):
    case = Case(m, n, k)
    case.check(case.launch(device))


@pytest.mark.parametrize("kind", ["equal", "one huge", "zeros"])
def test_groups_of_every_size(kind, device):
    """From 63 in a tile to one. Rows without a range are followers whose value is known: the outer product, exactly."""
    case = Case(200, 24, 32, kind)
    sizes = case.transform.size[:128]
    assert {"equal": int((sizes == 2).sum()) >= 120, "one huge": bool((sizes == 128).all())}.get(kind, True)
    out = case.launch(device)
    case.check(out)
    known = case.ranges == 0
    assert bool(known.any()) == (kind == "zeros")
    laws.assert_same(out[known], (case.value[:, None] * case.columns)[known])


@pytest.mark.parametrize("scale", ["none", "per_tensor", "per_row"])
@pytest.mark.parametrize("a_offset, b_offset", [(False, False), (True, False), (False, True), (True, True)])
def test_every_epilogue(scale, a_offset, b_offset, device):
    case = Case(40, 20, 32, epilogue=("per_row", a_offset, scale, b_offset))
    case.check(case.launch(device))


def test_groups_that_are_left_as_they_are_keep_their_bits(device):
    """s = 0 is the identity: the product's bits, infinities and NaN and negative zeros' sums included."""
    case = Case(128, 24, 32)
    plain = case.groups.group.unique()[::2]
    case.groups.s[plain] = 0
    kept = torch.isin(case.groups.group, plain)
    for k, scale in enumerate((math.inf, math.nan, -1e30)):
        case.a.scale[kept.nonzero()[k]] = scale
    out = case.launch(device)
    laws.assert_same(out[kept], case.product[kept])
    assert bool((out != case.product)[~kept].any(1).all())
    case.a.scale[kept] = 1.0
    case.check(case.launch(device))


def test_single_rows_keep_their_bits(device):
    """Tiles of fewer than three rows, or without ranges."""
    case = Case(130, 24, 32)
    laws.assert_same(case.launch(device)[128:], case.product[128:])
    case = Case(5, 24, 32)
    case.groups = group_rows(torch.zeros(5), "tile")
    laws.assert_same(case.launch(device), case.product)


# ---- what must not change the result


def test_no_tiling_changes_a_bit(device):
    """The order of a sum depends on the rows alone, so an element on its columns' tile, chunk and warps in no way."""
    case = Case(130, 144, 48)
    expected = case.launch(device)
    tables = kernels.CONFIGS.values() if INTERPRETED else [kernels.CONFIGS[gpu_family()]]
    for config in {(32, 32, 2, 4, 2), *(config for table in tables for config in table)}:
        laws.assert_same(case.launch(device, config), expected, str(config))


@pytest.mark.parametrize("power", [-90, 100])
def test_powers_of_two_commute(power, device):
    """Every step is a sum or a product of float32: huge and tiny numbers are treated as others, down to the bits."""
    case = Case(128, 16, 32, epilogue=SCALES)
    factor = 2.0**power
    scaled = case.launch(device, a=case.a._replace(scale=case.a.scale * factor), value=case.value * factor)
    assert bool(torch.isfinite(scaled).all())
    laws.assert_same(scaled, case.launch(device) * factor)


def test_groups_do_not_touch_each_other(device):
    """The rows of one group, however large or not finite, change no bit of another group's; and all of their own.

    Of the columns, in which every row is equally alone, a scale of NaN spoils its own.
    """
    case = Case(128, 16, 32)
    expected = case.launch(device)
    for k, value in zip(case.groups.group.unique(), (math.nan, math.inf, -math.inf, 1e25), strict=False):
        own = case.groups.group == k
        for row in own.nonzero()[:: max(int(own.sum()) // 2, 1), 0]:
            out = case.launch(device, a=case.a._replace(scale=case.a.scale.index_fill(0, row, value)))
            laws.assert_same(out[~own], expected[~own], f"row {int(row)}, {value}")
            assert bool((out[own] != expected[own] if value == 1e25 else ~out[own].isfinite()).all())
    out = case.launch(device, b=case.b._replace(scale=case.b.scale.index_fill(0, torch.tensor(7), math.nan)))
    assert bool(out[:, 7].isnan().all())
    laws.assert_same(out[:, torch.arange(16) != 7], expected[:, torch.arange(16) != 7])


def test_the_order_of_the_rows_is_not_that_of_the_groups(device):
    """Above all arguments by row are those of the row: each one's change changes its group's rows alone."""
    case = Case(60, 8, 32)
    expected, group = case.launch(device), case.groups.group
    assert not torch.equal(case.groups.order, torch.arange(60))
    for row in (0, 17, 59):
        for field in ("q", "scale", "offset", "sum"):
            changed = getattr(case.a, field).clone()
            changed[row] += 1
            out = case.launch(device, a=case.a._replace(**{field: changed}))
            assert torch.equal((out != expected).any(1), group == group[row])


# ---- output


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_the_output_is_rounded_once(out_dtype, device):
    """To nearest on a GPU, the bits of the float32 result. The interpreter truncates bfloat16: within one ulp."""
    case = Case(130, 33, 32, "zeros")
    case.a = case.a._replace(scale=case.a.scale / 4096, offset=case.a.offset / 4096)  # within float16
    exact, out = case.launch(device), case.launch(device, out_dtype=out_dtype)
    assert out.dtype == out_dtype and bool(exact.isfinite().all())
    if INTERPRETED:
        assert bool(((out.float() - exact).abs() <= laws.ulp(exact.to(out_dtype))).all())
    else:
        laws.assert_same(out, exact.to(out_dtype))


# ---- arguments


def test_what_it_cannot_multiply_it_refuses():
    for arguments in (("sm90", 128, 64, 131_072), ("sm80", 0, 64, 64), ("gfx942", 128, 64, 64, torch.float8_e4m3fn)):
        assert kernels.reason_against(*arguments)
    assert kernels.reason_against("sm80", 1, 1, kernels.MAX_INT32_TERMS) is None
    case = Case(4, 4, 16)
    long = torch.zeros(4, 131_072, dtype=torch.int8)
    with pytest.raises(ValueError, match="131072 products may overflow"):
        case.launch("cpu", a=case.a._replace(q=long), b=case.b._replace(q=long))
    with pytest.raises(TypeError, match="must both be int8"):
        case.launch("cpu", a=case.a._replace(q=case.a.q.float()))


def test_arguments_that_do_not_fit_are_refused():
    case = Case(4, 5, 16)
    for name in ("ranges", "value", "columns", "a_offset"):
        for wrong in (torch.zeros(3), torch.zeros(4 + (name == "columns"), dtype=torch.float64)):
            with pytest.raises(ValueError, match=rf"{name} must be \("):
                case.launch("cpu", **{name: wrong})
    with pytest.raises(ValueError, match="a_scale must be"):
        case.launch("cpu", a=case.a._replace(scale=torch.ones(1)))
    with pytest.raises(ValueError, match="first must be"):
        case.launch("cpu", groups=case.groups._replace(first=case.groups.first[:-1]))


def test_large_tiles_are_for_large_aligned_outputs():
    for family, (small, large) in kernels.CONFIGS.items():
        config = functools.partial(kernels.config, family)
        assert config(8192, 4096) == large
        assert config(8192, 4097) == config(128, 4096) == small
        assert small[0] * kernels.TILE // (32 * small[3]) <= 64  # sums a thread


def test_the_kernel_has_no_more_arguments_than_can_be_read():
    runtime = [
        p for p in inspect.signature(kernels._householder_mm_kernel.fn).parameters if p.upper() != p or len(p) == 1
    ]
    assert len(runtime) <= 22
