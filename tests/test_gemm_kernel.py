"""Laws of the scaled int8 product: exact integers, the reference's epilogue bit for bit, nothing read or written astray."""

import itertools
import math

import laws
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import INTERPRETED, codes, gpu_family, launch, pair

import fqt_kernels.gemm as kernels
from fqt import reference
from fqt.qtensor import Operand
from fqt.recipe import Quantizer

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

LONG = (16, 16, 512, 4, 2)  # for long sums: the interpreter's cost is per block of K
# (M, N, K): nothing to sum, 1, primes, one below and above a block, K on and off multiples of 16 and of BLOCK_K.
SHAPES = [
    (1, 1, 0), (3, 2, 0), (1, 1, 1), (1, 33, 15), (33, 1, 16), (2, 3, 17), (31, 32, 63),
    (32, 31, 64), (33, 65, 65), (7, 13, 80), (29, 5, 128), (64, 32, 144), (5, 64, 129),
]  # fmt: skip
# Granularity and offset of A; granularity of B (or no scale) and offset: all that a layer's products ask for, and more.
EPILOGUES = list(
    itertools.product(("per_tensor", "per_row"), (False, True), ("per_tensor", "per_row", "none"), (False, True))
)


@pytest.fixture(autouse=True)
def memory(guard):
    """In every test what the launcher allocates lies between guard bands, and what it leaves unwritten is poison."""
    return guard(kernels)


# ---- equal to the reference


@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_the_product_is_the_reference(i, device):
    """Bit for bit in float32: integer sums are exact, the epilogue rounds in the reference's order, nothing is fused."""
    m, n, k = SHAPES[i]
    for j, epilogue in enumerate(EPILOGUES[i % 2 :: 2]):
        a, b = pair(m, n, k, epilogue, seed=i)
        bias = None if (i + j) % 3 == 0 else torch.randn(n, generator=torch.Generator().manual_seed(j))
        laws.assert_same(launch(a, b, bias, device=device), reference.scaled_mm(a, b, bias), f"{SHAPES[i]} {epilogue}")


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "-".join(map(str, e)))
def test_every_epilogue_is_the_reference(epilogue, device):
    a, b = pair(19, 37, 48, epilogue)
    for bias in (None, torch.float32, torch.float16, torch.bfloat16):
        bias = None if bias is None else torch.randn(37, generator=torch.Generator().manual_seed(1)).to(bias)
        laws.assert_same(launch(a, b, bias, device=device), reference.scaled_mm(a, b, bias))


def test_each_part_of_the_epilogue_matters(device):
    """Each of scale, offset, sum and bias changes the output: the tests above can tell."""
    a, b = pair(9, 8, 48, ("per_row", True, "per_row", True))
    bias = torch.randn(8)
    out = launch(a, b, bias, device=device)
    for changed in (
        (a._replace(scale=a.scale * 2), b, bias), (a._replace(offset=a.offset + 1), b, bias),
        (a._replace(sum=a.sum + 1), b, bias), (a, b._replace(scale=b.scale * 2), bias),
        (a, b._replace(offset=b.offset + 1), bias), (a, b._replace(sum=b.sum + 1), bias), (a, b, bias + 1),
    ):  # fmt: skip
        assert bool((launch(*changed, device=device) != out).any())


def test_the_product_of_quantized_matrices_is_near_that_of_the_matrices(device):
    """Above all codes are arbitrary. Here: max |A Bᵀ - Â B̂ᵀ| for half a bin of error in every element of both."""
    x, w = torch.randn(33, 48), torch.randn(17, 48) + 0.5
    a = reference.quantize(x, Quantizer(8, "per_row", "min"), sums=True)
    b = reference.quantize(w, Quantizer(8, "per_tensor", "grid"), sums=True)
    error = (launch(a.rows(), b.rows(), device=device).cpu() - x @ w.t()).abs()
    # Half a bin on either side, both at once, and float32's rounding of 48 terms: far below 1 % of that.
    limit = (
        (x.abs() @ (b.scale / 2).expand(48, 17))
        + ((a.scale / 2).expand(33, 48) @ w.abs().t())
        + 48 * a.scale * b.scale / 4
    )
    assert bool((error <= 1.01 * limit).all())


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_the_output_is_rounded_once_to_its_type(out_dtype, device):
    """To nearest on a GPU, so equal to the reference. The interpreter truncates bfloat16: within one ulp of it."""
    for epilogue in (("per_row", False, "per_row", False), ("per_row", True, "per_tensor", True)):
        a, b = pair(33, 31, 80, epilogue)
        a, b = a._replace(scale=a.scale / 64), b._replace(scale=b.scale / 64)  # within float16
        bias = torch.randn(31, generator=torch.Generator().manual_seed(2))
        out, expected = launch(a, b, bias, out_dtype, device=device).cpu(), reference.scaled_mm(a, b, bias, out_dtype)
        assert out.dtype == out_dtype and bool(torch.isfinite(expected).all())
        if INTERPRETED:
            assert bool(((out.float() - expected.float()).abs() <= laws.ulp(expected)).all())
        else:
            laws.assert_same(out, expected)


# ---- tilings


CONFIGS = [(16, 16, 32, 1, 1), (64, 16, 32, 2, 2), (16, 64, 128, 4, 3), (128, 32, 64, 4, 2), (64, 64, 256, 4, 2)]


def test_every_tiling_gives_the_same_bits(device):
    a, b = pair(37, 53, 208, ("per_row", True, "per_tensor", True))
    expected = reference.scaled_mm(a, b)
    for config in CONFIGS:
        laws.assert_same(launch(a, b, config=config, device=device), expected, str(config))


@pytest.mark.parametrize("config", [(16, 64, 32, 1, 1), (64, 64, 32, 1, 1), (32, 128, 32, 1, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 48, 61, 64, 130])
def test_columns_in_chunks_give_the_same_bits(config, n, device):
    """4 chunks; of 32 elements a thread 2, or 1 of aligned rows; some of them beyond the last column."""
    a, b = pair(35, n, 48, ("per_row", True, "per_row", True))
    bias = torch.randn(n)
    laws.assert_same(launch(a, b, bias, config=config, device=device), reference.scaled_mm(a, b, bias))


TABLE = [
    (family, config)
    for family in kernels.CONFIGS
    for config in [*kernels.CONFIGS[family], kernels.FLUSH_CONFIG[family]]
]


@pytest.mark.parametrize("family, config", TABLE, ids=str)
def test_every_configuration_of_the_table_gives_the_same_bits(family, config, device):
    """On a GPU those of its own family."""
    if not INTERPRETED and family != gpu_family():
        pytest.skip(f"configurations of {family}, on {gpu_family()}")
    a, b = pair(130, 70, 144, ("per_row", True, "per_tensor", True))
    laws.assert_same(launch(a, b, config=config, device=device), reference.scaled_mm(a, b))


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_the_order_of_tiles_covers_each_once(group, device, monkeypatch):
    """Grids that GROUP_M divides, does not divide, and exceeds."""
    monkeypatch.setattr(kernels, "GROUP_M", group)
    for m, n in [(80, 33), (16, 80), (65, 16)]:
        a, b = pair(m, n, 16)
        laws.assert_same(launch(a, b, config=(16, 16, 32, 1, 1), device=device), reference.scaled_mm(a, b))


# ---- exact integers


@pytest.mark.parametrize("k", [1023, 1024, 1025, 131_056, 131_071])
def test_the_sum_is_exact_up_to_131071_extreme_codes(k, device):
    """All -128 · -128, all 127 · 127, and mixed: int32 holds every one. With scale 1 the output is the rounded integer."""
    a, b = (Operand(codes(m, k, m, extreme=True), torch.ones(1), None, None) for m in (5, 3))
    exact = a.q.double() @ b.q.double().t()  # of integers below 2⁵³: exact
    out = launch(a, b, config=LONG, device=device)
    laws.assert_same(out, exact.float())
    laws.assert_same(out, reference.scaled_mm(a, b))
    assert float(out[0, 0]) == k * 2**14


@pytest.mark.parametrize("k", [131_072, 131_072 + 77, 200_704, 262_144])
@pytest.mark.parametrize("config", [LONG, (32, 16, 1024, 4, 2)])
def test_longer_sums_leave_int32_before_it_overflows(k, config, device):
    """All -128 · -128 sum to K·2¹⁴ ≥ 2³¹, and float32 holds that, being a multiple of 2¹⁴ below 2³⁸.

    Other sums: exact in pieces of at most 131 071 terms, each rounded to float32 once, and so is each of the at most two
    additions, of numbers below K·2¹⁴: 5 roundings of 2⁻²⁴.
    """
    a, b = (Operand(codes(m, k, m, extreme=True), torch.ones(1), None, None) for m in (5, 3))
    out = launch(a, b, config=config, device=device).cpu()
    assert float(out[0, 0]) == k * 2**14 and float(out[1, 1]) == pytest.approx(k * 127**2, rel=3 * laws.EPS)
    exact = a.q.double() @ b.q.double().t()
    assert float((out.double() - exact).abs().max()) <= 5 * laws.EPS * k * 2**14


def test_pieces_of_a_long_sum_are_added_in_float32(device):
    """Bit for bit: whole blocks of at most 131 071 terms, each sum rounded once, added in order; then the scales."""
    k, block_k = 2 * 131_072 + 77, LONG[2]
    a, b = pair(5, 3, k, extreme=True)
    piece = reference.MAX_INT32_TERMS // block_k * block_k
    acc = torch.zeros(5, 3)
    for start in range(0, k, piece):
        part = slice(start, start + piece)
        acc = acc + (a.q[:, part].double() @ b.q[:, part].double().t()).float()
    laws.assert_same(launch(a, b, config=LONG, device=device), acc * a.scale[:, None] * b.scale)


def test_a_long_sum_with_offsets_is_the_reference_to_rounding(device):
    """Two pieces: two roundings more than the 8 of `test_reference`'s identity, on either side of the comparison."""
    k = 131_072 + 77
    a, b = pair(5, 3, k, ("per_row", True, "per_tensor", True))
    terms = (a.scale[:, None] * b.scale * (a.q.double() @ b.q.double().t())).abs() + (b.offset * a.scale * a.sum).abs()[
        :, None
    ]
    terms = terms + a.offset.abs()[:, None] * ((b.scale * b.sum).abs() + (k * b.offset).abs())
    # One piece may be larger than the whole: at most Σ|qa|·|qb|.
    terms = terms + a.scale[:, None] * b.scale * (a.q.double().abs() @ b.q.double().abs().t())
    error = launch(a, b, config=LONG, device=device).cpu().double() - reference.scaled_mm(a, b).double()
    assert bool((error.abs() <= 18 * laws.EPS * terms).all())


# ---- memory


@pytest.mark.parametrize(
    "k, stride", [(48, 64), (48, 80), (48, 55), (37, 64), (37, 37), (64, 64), (16, 1024), (130, 144)]
)
def test_rows_may_be_any_distance_apart(k, stride, device):
    """Rows with garbage between them: K and strides on and off multiples of 16 (the codes are copied) and of BLOCK_K."""
    a, b = pair(33, 35, k, ("per_row", True, "per_tensor", True))
    expected = reference.scaled_mm(a, b)
    a = a._replace(q=laws.poisoned_rows(a.q.to(device), stride))
    b = b._replace(q=laws.poisoned_rows(b.q.to(device), stride + 16))
    assert a.q.stride() == (stride, 1)
    laws.assert_same(launch(a, b, device=device), expected)


def test_wide_offsets_are_the_reference(device, monkeypatch):
    """The variant for an output whose tiles span 2³¹ elements, on one that does not need it."""
    monkeypatch.setattr(kernels, "is_wide", lambda *spans: True)
    a, b = pair(33, 65, 48)
    laws.assert_same(launch(a, b, device=device), reference.scaled_mm(a, b))


def test_rows_may_be_2_to_the_31_bytes_apart(device):
    """33 rows 2²⁶ elements apart: 2 GiB, of which nearly all is never touched."""
    a, b = pair(33, 7, 48)
    view = torch.empty(2**31 + 64, dtype=torch.int8, device=device).as_strided((33, 48), (2**26, 1))
    view.copy_(a.q)
    laws.assert_same(launch(a._replace(q=view), b, device=device), reference.scaled_mm(a, b))


def test_rows_may_be_the_same_row(device):
    a, b = pair(1, 33, 48)
    wide = a._replace(q=a.q.to(device).expand(17, 48), scale=a.scale.expand(17).contiguous())
    laws.assert_same(launch(wide, b, device=device), reference.scaled_mm(a, b).expand(17, 33))


def test_nothing_beyond_an_operand_reaches_the_output(device):
    """Every vector of the epilogue ends where poison begins: NaN, and integers near 2³¹."""
    for m, n, k in [(1, 1, 16), (33, 31, 48), (17, 35, 80)]:
        a, b = pair(m, n, k, ("per_row", True, "per_row", True))
        bias = torch.randn(n)
        expected = reference.scaled_mm(a, b, bias)
        a, b = (Operand(t.q.to(device), *(laws.poisoned_tail(v.to(device)) for v in t[1:])) for t in (a, b))
        laws.assert_same(launch(a, b, laws.poisoned_tail(bias.to(device)), device=device), expected)


def test_every_output_is_written_and_nothing_outside_of_it(device, monkeypatch):
    """Two poisons give the same results, and the guard bands stay; M and N on both sides of a block."""
    for (m, n, k), poison, out_dtype in itertools.product(
        [(1, 1, 16), (31, 33, 48), (33, 65, 0)], (0x5A, 0xA5), (torch.float32, torch.float16)
    ):
        a, b = pair(m, n, k)
        a = a._replace(scale=a.scale / 65536)  # within float16
        memory = laws.GuardedTorch(poison)
        monkeypatch.setattr(kernels, "torch", memory)
        out = launch(a, b, out_dtype=out_dtype, device=device)
        memory.check()
        assert memory.made == 1 and out.is_contiguous()
        expected = reference.scaled_mm(a, b, None, out_dtype)
        if out_dtype == torch.float32:
            laws.assert_same(out, expected)
        else:
            assert bool(((out.cpu().float() - expected.float()).abs() <= laws.ulp(expected)).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_scale_or_offset_reaches_its_row_only(value, device):
    """A gradient that overflowed has to arrive as such: 0·∞ is NaN, never zero. No other row sees it."""
    a, b = pair(9, 8, 48, ("per_row", True, "per_tensor", True))
    clean = reference.scaled_mm(a, b)
    for field in ("scale", "offset"):
        vector = getattr(a, field).clone()
        vector[3] = value
        out = launch(a._replace(**{field: vector}), b, device=device).cpu()
        assert not bool(torch.isfinite(out[3]).any())
        laws.assert_same(out[[0, 1, 2, 4, 5, 6, 7, 8]], clean[[0, 1, 2, 4, 5, 6, 7, 8]])
        laws.assert_same(out, reference.scaled_mm(a._replace(**{field: vector}), b))


def test_the_product_repeats_itself(device):
    a, b = pair(65, 33, 208)
    assert torch.equal(launch(a, b, device=device), launch(a, b, device=device))


# ---- anything


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(0, 300), epilogue=st.sampled_from(EPILOGUES),
    bias=st.booleans(), extreme=st.booleans(), gap=st.sampled_from([0, 1, 16, 64]), config=st.sampled_from(CONFIGS),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_product_is_the_reference(m, n, k, epilogue, bias, extreme, gap, config, seed, device):
    a, b = pair(m, n, k, epilogue, seed, extreme)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)) if bias else None
    expected = reference.scaled_mm(a, b, bias)
    if gap:
        a = a._replace(q=laws.poisoned_rows(a.q.to(device), k + gap))
        b = b._replace(q=laws.poisoned_rows(b.q.to(device), k + gap))
    laws.assert_same(launch(a, b, bias, config=config, device=device), expected)
