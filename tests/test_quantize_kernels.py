"""Laws of the quantization kernels: the reference bit for bit, in every tiling and layout, writing nothing else."""

import itertools
import math

import laws
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fqt_kernels.quantize as kernels
import fqt_kernels.statistics as statistics
from fqt import reference
from fqt.recipe import GRANULARITIES, ROUNDINGS, ZEROS, Quantizer

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FIELDS = ("q", "qt", "scale", "offset", "row_sum", "col_sum")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_TILE = (32, 32, 1)  # several tiles from a small matrix: the interpreter needs 10 to 20 ms for each
# 1, primes, one below and above a block of SMALL_TILE, rows that fill 8 lanes of random bits or do not.
SHAPES = [(1, 1), (1, 33), (33, 1), (2, 3), (31, 32), (32, 31), (7, 64), (31, 8), (33, 47), (5, 65), (13, 29), (32, 32)]
LAYOUTS = ("contiguous", "transposed", "strided", "one row", "one column")
KERNELS = ["tile", "rows", "long_rows"]
INTERPRETED = not torch.cuda.is_available()
WAYS = [(g, z, r) for r in ROUNDINGS for z in ZEROS for g in GRANULARITIES]


@pytest.fixture(autouse=True)
def memory(guard):
    """In every test what the launchers allocate lies between guard bands, and what they leave unwritten is poison."""
    return guard(kernels, statistics)


def matrix(m, n, dtype, layout="contiguous", seed=0, device="cpu", factor=1.0):
    """Rows of very different sizes with some zeros, in a layout; what is outside of it is NaN where it can be."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g) * torch.exp(1.5 * torch.randn(m, 1, generator=g))
    x = torch.where(torch.rand(m, n, generator=g) < 0.1, torch.zeros(()), x * factor).to(dtype).to(device)
    return {
        "contiguous": lambda: x,
        "transposed": lambda: laws.poisoned(x.t()).t(),
        "strided": lambda: laws.poisoned(x),
        "one row": lambda: laws.poisoned(x[:1]).expand(m, n),
        "one column": lambda: laws.poisoned(x[:, :1]).expand(m, n),
    }[layout]()


def launch(x, quantizer, *, rng, stream=0, rank=0, sums=True, **kwargs):
    """The kernels, with transposed codes unless a single read, which may refuse them, is asked for."""
    kwargs.setdefault("cols", kwargs.get("kernel") != "rows")
    return kernels.quantize(
        x, bits=quantizer.bits, granularity=quantizer.granularity, zero=quantizer.zero,
        rng=rng.to(x.device) if quantizer.rounding == "stochastic" else None,
        stream=stream + 256 * rank, sums=sums, **kwargs,
    )  # fmt: skip


def assert_equals_reference(x, quantizer, *, multiplier=None, step=3, stream=1, rank=2, **kwargs):
    """Codes, scales, offsets and sums of the kernels, to the last bit; transposed codes too if `launch` asks for them."""
    rng = laws.random_state(5, step)
    kwargs.setdefault("cols", kwargs.get("kernel") != "rows")
    expected = reference.quantize(
        x.cpu(), quantizer, multiplier=None if multiplier is None else multiplier.cpu(),
        rng=rng, stream=stream, rank=rank, cols=kwargs["cols"], sums=True,
    )  # fmt: skip
    out = launch(x, quantizer, multiplier=multiplier, rng=rng, stream=stream, rank=rank, **kwargs)
    for name, a, e in zip(FIELDS, out, expected, strict=True):
        laws.assert_same(a, e, f"{name} of {tuple(x.shape)} {x.dtype} strides {x.stride()} {quantizer} {kwargs}")
    return out


# ---- equal to the reference


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_tile_kernel_is_the_reference(way, device):
    """Every granularity, zero and rounding over every other shape; bits, type and layout change with the shape."""
    for i in range(WAYS.index(way) % 2, len(SHAPES), 2):
        bits, dtype, layout = (8, 2, 5)[i % 3], DTYPES[i // 3 % 3], LAYOUTS[i % 5]
        x = matrix(*SHAPES[i], dtype, layout, i, device)
        assert_equals_reference(x, Quantizer(bits, *way), kernel="tile", tile=SMALL_TILE)


@pytest.mark.parametrize("way", [w for w in WAYS if w[0] == "per_row"], ids="-".join)
def test_the_kernels_of_whole_rows_are_the_reference(way, device):
    """Every other shape, for each zero all; with transposed codes from a single read where both are multiples of 16."""
    for i in range(WAYS.index(way) // 3 % 2, len(SHAPES), 2):
        m, n = SHAPES[i]
        x = matrix(m, n, DTYPES[i // 3 % 3], LAYOUTS[i % 5], i, device)
        assert_equals_reference(x, Quantizer((8, 3, 6)[i % 3], *way), kernel="rows")
        assert_equals_reference(x, Quantizer((6, 8, 3)[i % 3], *way), kernel="long_rows", tile=SMALL_TILE)
    for i, (m, n) in enumerate([(16, 16), (48, 32), (16, 48), (64, 16)]):
        x = matrix(m, n, DTYPES[i % 3], seed=i, device=device)
        assert_equals_reference(x, Quantizer((8, 3, 6)[i % 3], *way), kernel="rows", cols=True)


@pytest.mark.parametrize(
    "kernel, granularity", [("tile", g) for g in GRANULARITIES] + [("rows", "per_row"), ("long_rows", "per_row")]
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_e4m3_codes_are_the_reference(kernel, granularity, rounding, device):
    """To the last bit of the format, subnormals and the largest number included."""
    for i, (m, n) in enumerate([(33, 47), (16, 64), (1, 9)]):
        x = matrix(m, n, DTYPES[i % 3], "strided", i, device) * torch.logspace(-6, 0, n, device=device).to(
            DTYPES[i % 3]
        )
        quantizer = Quantizer(8, granularity, "symmetric", rounding, format="e4m3")
        rng = laws.random_state(5, 3).to(device) if rounding == "stochastic" else None
        expected = reference.quantize(x.cpu(), quantizer, rng=laws.random_state(5, 3), cols=kernel != "rows")
        out = kernels.quantize(
            x, bits=8, granularity=granularity, zero="e4m3", rng=rng,
            cols=kernel != "rows", kernel=kernel, tile=SMALL_TILE,
        )  # fmt: skip
        for name, a, e in zip(FIELDS, out, expected, strict=True):
            codes = [t.view(torch.int8) if t is not None and t.dtype == torch.float8_e4m3fn else t for t in (a, e)]
            laws.assert_same(*codes, name)
        assert out[0].dtype == torch.float8_e4m3fn and float(out[0].float().abs().max()) == 448


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits_is_the_reference(bits, device):
    for granularity, zero, rounding in WAYS[bits % 4 :: 4]:
        assert_equals_reference(
            matrix(19, 21, torch.float32, seed=bits, device=device), Quantizer(bits, granularity, zero, rounding)
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_only_a_stride(granularity, layout, device):
    """The same values in any layout have the same codes, the default launch included."""
    x = matrix(37, 33, torch.bfloat16, layout, device=device)
    for zero in ("symmetric", "grid"):
        quantizer = Quantizer(8, granularity, zero, "stochastic")
        out = assert_equals_reference(x, quantizer)
        for a, b in zip(
            out, launch(x.contiguous(), quantizer, rng=laws.random_state(5, 3), stream=1, rank=2), strict=True
        ):
            laws.assert_same(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", ["row", "column"])
def test_the_multiplier_is_folded_in_before_anything_else(granularity, shape, device):
    for (m, n), zero, strided in zip(
        [(33, 17), (1, 17), (17, 1), (1, 1)], [*ZEROS, "grid"], (False, True) * 2, strict=True
    ):
        mul = torch.rand((m, 1) if shape == "row" else (1, n), generator=torch.Generator().manual_seed(m)) + 0.2
        mul = laws.poisoned(mul.to(device)) if strided else mul.to(device)
        x = matrix(m, n, torch.float32, "strided", device=device)
        for rounding in ROUNDINGS:
            quantizer = Quantizer(7, granularity, zero, rounding)
            assert_equals_reference(x, quantizer, multiplier=mul, kernel="tile", tile=SMALL_TILE)
            if granularity == "per_row":
                assert_equals_reference(x, quantizer, multiplier=mul, kernel="rows")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_what_is_asked_for_is_returned(granularity, device):
    x = matrix(21, 18, torch.float32, device=device)
    for rows, cols, sums in itertools.product((True, False), repeat=3):
        if not rows and not cols:
            continue
        for zero in ("symmetric", "min"):
            quantizer = Quantizer(8, granularity, zero)
            expected = reference.quantize(x.cpu(), quantizer, rows=rows, cols=cols, sums=sums)
            out = launch(x, quantizer, rng=laws.random_state(), rows=rows, cols=cols, sums=sums)
            for name, a, e in zip(FIELDS, out, expected, strict=True):
                laws.assert_same(a, e, name)
                assert a is None or a.is_contiguous()


# ---- tilings


TILES = [(128, 64, 8), (16, 16, 1), (64, 8, 2), (8, 128, 4), (32, 32, 4)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_tiling_gives_the_same_codes(granularity, rounding, device):
    """Random bits belong to an element, ranges to a group: replay does not depend on the launch."""
    x = matrix(40, 45, torch.float32, "strided", device=device)
    quantizer = Quantizer(4, granularity, "grid", rounding)
    outs = [assert_equals_reference(x, quantizer, kernel="tile", tile=tile) for tile in TILES]
    for out in outs[1:]:
        for a, b in zip(out, outs[0], strict=True):
            laws.assert_same(a, b)
    if granularity == "per_row":
        laws.assert_same(assert_equals_reference(x, quantizer, kernel="rows")[0], outs[0][0])
        for tile in TILES:
            laws.assert_same(assert_equals_reference(x, quantizer, kernel="long_rows", tile=tile)[0], outs[0][0])


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_long_rows_do_not_depend_on_how_many_programs_walk_over_them(programs, device, monkeypatch):
    monkeypatch.setattr(kernels, "long_rows_programs", lambda x, block_m: programs)
    x = matrix(45, 70, torch.float32, device=device)
    assert_equals_reference(x, Quantizer(8, "per_row", "min", "stochastic"), kernel="long_rows", tile=(8, 16, 1))


def test_the_programs_that_walk_over_long_rows_have_them_in_half_the_l2_together():
    processors, l2 = kernels.processors_and_l2(torch.device("meta"))
    for n in (1, 1000, 4096, 14336, 28672, 500_000):
        x = torch.empty(10**6, n, dtype=torch.bfloat16, device="meta")
        programs = kernels.long_rows_programs(x, 16)
        together = programs * 16 * 2 * n
        assert programs >= processors and (programs == processors or together <= l2 / 2), n
        more = programs + processors
        assert more > kernels.LONG_ROWS_PROGRAMS * processors or more * 16 * 2 * n > l2 / 2, n
    assert kernels.long_rows_programs(torch.empty(33, 4096, device="meta"), 16) == 3


@pytest.mark.parametrize("m, n, strides, transposed, kernel", [
    (4096, 16384, (16384, 1), False, "rows"), (4096, 16385, (16385, 1), False, "long_rows"),
    (4096, 1024, (1024, 1), True, "rows"), (4095, 1024, (1024, 1), True, "long_rows"),
    (4096, 1025, (1025, 1), True, "long_rows"), (4096, 1024, (1, 4096), False, "tile"),
    (4, 2**30, (2**31, 2), False, "tile"), (2**20, 4096, (4096, 1), True, "long_rows"),
])  # fmt: skip
def test_the_kernel_follows_from_the_shape(m, n, strides, transposed, kernel):
    x = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided((1, 1), (1, 1)).as_strided((m, n), strides)
    assert kernels.choose_kernel(x, "per_row", transposed, False) == kernel
    assert kernels.choose_kernel(x, "per_row", transposed, True) == "tile"
    assert kernels.choose_kernel(x, "per_tensor", transposed, False) == "tile"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_ranges_that_the_producer_found_give_the_same_codes(rounding, parts, device):
    """Partial extremes in any number of parts; those of a wider range give wider bins, as they must."""
    x = matrix(21, 40, torch.float32, device=device)
    for granularity, zero in (
        ("per_row", "symmetric"),
        ("per_row", "min"),
        ("per_column", "symmetric"),
        ("per_tensor", "grid"),
    ):
        quantizer = Quantizer(8, granularity, zero, rounding)
        found = statistics.row_stats(x, granularity, zero == "symmetric")
        lowest = torch.full(
            (found.shape[0], parts - 1, found.shape[2]), statistics.LOWEST, dtype=torch.int32, device=device
        )
        assert_equals_reference(x, quantizer, stats=torch.cat([lowest, found], 1))
    wide = (2 * x).abs().amax(1).view(torch.int32)[None, None]
    q, _, scale, *_ = launch(x, Quantizer(8, "per_row", "symmetric"), rng=laws.random_state(), stats=wide)
    _, _, half, *_ = launch(x, Quantizer(8, "per_row", "symmetric"), rng=laws.random_state())
    nonzero = x.abs().amax(1) > 0
    assert torch.equal(scale[nonzero], 2 * half[nonzero]) and q.abs().max() == 64


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_values_outside_of_a_range_that_was_given_take_the_last_code(rounding, device):
    x = matrix(16, 40, torch.float32, device=device)
    narrow = (x.abs().amax(1) / 4).view(torch.int32)[None, None]
    rng = laws.random_state().to(device) if rounding == "stochastic" else None
    for zero, largest in (("symmetric", 127.0), ("e4m3", 448.0)):
        q, _, scale, *_ = kernels.quantize(x, bits=8, granularity="per_row", zero=zero, stats=narrow, rng=rng)
        beyond = x.abs() > 1.01 * largest * scale
        assert beyond.any() and torch.equal(q.float()[beyond], largest * x.sign()[beyond])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero", ["symmetric", "min"])
@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_ranges_do_not_depend_on_how_they_are_gathered(granularity, zero, programs, device, monkeypatch):
    """One program for a row of blocks or one for each block, in both orientations."""
    monkeypatch.setattr(statistics, "STATS_MIN_PROGRAMS", programs)
    monkeypatch.setattr(statistics, "STATS", {"rows": (4, 16, 1), "cols": (16, 8, 1)})
    for layout in ("contiguous", "transposed"):
        x = matrix(13, 53, torch.float32, layout, device=device)
        assert_equals_reference(x, Quantizer(8, granularity, zero), kernel="tile", tile=(64, 64, 1))


@pytest.mark.parametrize("n", [16383, 16384, 16385])
def test_long_rows_are_the_reference_on_either_side_of_a_single_read(n, device):
    """16 384 elements is the longest row that one program holds; a longer one is read twice."""
    x = matrix(2, n, torch.bfloat16, device=device)
    quantizer = Quantizer(8, "per_row", "symmetric", "stochastic")
    rng = laws.random_state(1)
    expected = reference.quantize(x.cpu(), quantizer, rng=rng, sums=True)
    out = launch(x, quantizer, rng=rng, cols=False, tile=(2, 2048, 4))
    for name, a, e in zip(FIELDS, out, expected, strict=True):
        laws.assert_same(a, e, name)


@pytest.mark.parametrize(
    "shape, granularity, cols",
    [((2, 16385), "per_row", False), ((16, 1040), "per_row", True), ((4, 4), "per_tensor", False)],
)
def test_a_kernel_of_whole_rows_is_refused_where_it_cannot_have_them(shape, granularity, cols, device):
    """Longer than a program holds, 16 of them longer, or not per row."""
    with pytest.raises(ValueError, match="finds the ranges of whole rows"):
        kernels.quantize(
            torch.ones(shape, device=device),
            bits=8,
            granularity=granularity,
            zero="symmetric",
            cols=cols,
            kernel="rows",
        )


def test_an_unknown_kernel_is_refused(device):
    with pytest.raises(ValueError, match="'row'"):
        kernels.quantize(torch.ones(4, 4, device=device), bits=8, granularity="per_row", zero="symmetric", kernel="row")


def test_rows_of_a_program_fit_and_transposed_ones_are_written_in_16_bytes():
    for m, n in itertools.product((1, 5, 1000), (1, 7, 8, 9, 512, 1024, 1025, 2048, 16384, 16385)):
        for transposed in (False, True):
            block = kernels.rows_block(m, n, transposed)
            if block is None:
                assert n > (1024 if transposed else 16384)
            else:
                assert block[0] * block[1] <= 16384 and block[1] >= n and (block[0] >= 16 or not transposed)


# ---- random bits


def test_key_step_stream_and_rank_reach_the_random_bits(device):
    """All 64 bits of the key, 32 of the step, and stream + 256·rank as one word, up to the largest."""
    x = matrix(16, 32, torch.float32, device=device)
    quantizer = Quantizer(4, "per_row", "min", "stochastic")
    words = [
        (0, 0, 0, 0), (1, 0, 0, 0), (2**32, 0, 0, 0), (-(2**63), 0, 0, 0), (0, 1, 0, 0), (0, 2**31, 0, 0), (0, 0, 1, 0),
        (0, 0, 0, 1), (2**63 - 1, 2**32 - 1, 255, 2**23 - 1), (-1, 0, 0, 2**23), (0, 0, 255, 2**24 - 1),
    ]  # fmt: skip
    seen = []
    for key, step, stream, rank in words:
        rng = torch.tensor([key, step])
        expected = reference.quantize(x.cpu(), quantizer, rng=rng, stream=stream, rank=rank, cols=True, sums=True)
        for kernel in KERNELS:
            out = launch(x, quantizer, rng=rng, stream=stream, rank=rank, kernel=kernel, cols=True, tile=SMALL_TILE)
            for name, a, e in zip(FIELDS, out, expected, strict=True):
                laws.assert_same(a, e, name)
        assert all(not torch.equal(expected.q, q) for q in seen)
        seen.append(expected.q)


@pytest.mark.parametrize("kernel", KERNELS)
def test_stochastic_rounding_steps_up_exactly_at_the_random_bits(kernel, device):
    """Bins of width 1, and every value a quarter of 2⁻¹⁶ below or three quarters below where its own bits carry."""
    m, n = 16, 40
    quantizer, rng = Quantizer(8, "per_row", "min", "stochastic"), laws.random_state(12)
    bits = reference.random_bits(rng, m, n)
    integer = torch.arange(m * n).view(m, n) % 4
    for below, step in ((0.25, 1), (0.75, 0)):
        x = integer + (65536 - bits - below) / 65536  # 2 bits, 16 and 2 more: exact in float32
        x[:, 0], x[:, -1] = 0, 255  # so that scale and its inverse are 1
        q, *_ = launch(x.to(device), quantizer, rng=rng, kernel=kernel, tile=SMALL_TILE)
        assert torch.equal(q.cpu()[:, 1:-1] + 128, (integer + step)[:, 1:-1])


def test_the_kernels_round_without_bias(device):
    """The law itself, not only agreement with the reference: 64 draws of 3 bits."""
    x = matrix(16, 24, torch.float32, seed=4, device=device)
    quantizer = Quantizer(3, "per_row", "min", "stochastic")

    def draw(i):
        q, _, scale, offset, *_ = launch(x, quantizer, rng=laws.random_state(8, i), cols=False, sums=False)
        return q * scale + offset

    laws.assert_unbiased(draw, x, 64)


# ---- values


def nan_of(bits):
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]


NON_FINITE = {
    "nan": [nan_of(0x7FC00000)],
    "negative nan": [nan_of(-0x400000)],
    "nan with payload": [nan_of(0x7F800001)],
    "inf": [torch.tensor(math.inf)],
    "-inf": [torch.tensor(-math.inf)],
    "both inf": [torch.tensor(math.inf), torch.tensor(-math.inf)],
    "-inf and nan": [torch.tensor(-math.inf), nan_of(-0x400000)],
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_non_finite_value_makes_its_group_non_finite_and_no_other(granularity, zero, bad, device):
    """In scale or offset, since no code can say so; every kind of NaN, and in the last row and column."""
    clean = matrix(11, 13, torch.float32)
    x = clean.clone()
    for i, value in enumerate(NON_FINITE[bad]):
        x[10 - i if granularity == "per_column" else 10, 12 if granularity == "per_column" else 12 - i] = value
    hit = torch.zeros(11, 13, dtype=torch.bool)
    hit[{"per_tensor": (slice(None),), "per_row": (10,), "per_column": (slice(None), 12)}[granularity]] = True
    rng = laws.random_state(2)
    for kernel, rounding in zip(
        KERNELS if granularity == "per_row" else ["tile"], (*ROUNDINGS, "nearest"), strict=False
    ):
        quantizer = Quantizer(8, granularity, zero, rounding)
        before = reference.quantize(clean, quantizer, rng=rng)
        q, _, scale, offset, *_ = launch(x.to(device), quantizer, rng=rng, kernel=kernel, tile=SMALL_TILE)
        out = (q * scale if offset is None else q * scale + offset).cpu()
        assert not bool(torch.isfinite(out[hit]).any())
        assert torch.equal(out[~hit], before.dequantize()[~hit])
        laws.assert_same(q, reference.quantize(x, quantizer, rng=rng).q)


EDGES = {
    "zeros": lambda x: x * 0,
    "minus zeros": lambda x: x * 0 * -1,
    "a row and a column of zeros": lambda x: x * (torch.arange(11) != 10)[:, None] * (torch.arange(13) != 12),
    "equal": lambda x: x * 0 + 0.7,
    "equal rows": lambda x: x[:, :1].expand(11, 13),
    "positive": lambda x: x.abs() + 0.1,
    "negative": lambda x: -x.abs() - 0.1,
    "one tiny negative": lambda x: x.abs() - torch.where(torch.arange(143) == 142, 1e-6, 0.0).view(11, 13),
    "one huge": lambda x: x + torch.where(torch.arange(143) == 141, 1e30, 0.0).view(11, 13),
    "large": lambda x: x.clamp(-3, 3) * 1e38,
    "a range that overflows": lambda x: x.sign() * 3e38,
    "small": lambda x: x * 1e-37,
    "below the normal numbers": lambda x: x * 1e-40,
    "ties": lambda x: (x * 10).round() / 2,
    "powers of two": lambda x: torch.ldexp(x.sign(), (x * 8).round().int()),
}


@pytest.mark.parametrize("kind", EDGES)
def test_values_at_the_edges_are_the_reference(kind, device):
    x = EDGES[kind](torch.randn(11, 13, generator=torch.Generator().manual_seed(9))).to(device)
    for way in WAYS[list(EDGES).index(kind) % 4 :: 4]:  # every granularity, zero and rounding with each kind
        quantizer = Quantizer(2 if kind in ("large", "one tiny negative") else 8, *way)
        assert_equals_reference(x, quantizer, kernel="tile", tile=SMALL_TILE)
        if way[0] == "per_row":
            assert_equals_reference(x, quantizer, kernel="rows")


@pytest.mark.parametrize("zero", ["grid", "min"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_stay_in_range_where_rounding_overshoots(zero, kernel, device):
    """One code further would not be an int8, and wrap around to the other end."""
    x, rng = laws.overshooting(zero)
    q, *_ = launch(x.to(device), Quantizer(8, "per_row", zero, "stochastic"), rng=rng, kernel=kernel)
    assert torch.equal(q.cpu().int(), torch.where(x > 0, 127, -128).int())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nothing_clips_and_zeros_stay_zero(rounding, device):
    """At most half a bin of error to nearest, one bin stochastically; slack as in test_reference."""
    x = matrix(33, 47, torch.float32, device=device)
    for granularity, zero in itertools.product(GRANULARITIES, ZEROS):
        q, _, scale, offset, *_ = launch(x, Quantizer(8, granularity, zero, rounding), rng=laws.random_state(3))
        out = q * scale if offset is None else q * scale + offset
        slack = scale.double() * (5 * laws.EPS * 256 + laws.DITHER) + 8 * laws.EPS * torch.maximum(
            x.abs().max(), 256 * scale.max()
        )
        assert bool(((out.double() - x).abs() <= scale.double() * (0.5 if rounding == "nearest" else 1) + slack).all())
        if zero != "min":
            assert bool((out[x == 0] == 0).all())


# ---- memory


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_output_is_written_and_nothing_outside_of_it(granularity, device, monkeypatch):
    """Two poisons give the same results, equal to the reference, and the guard bands around them stay."""
    for (m, n), zero in zip([(1, 1), (33, 31), (31, 8), (5, 64)], [*ZEROS, "grid"], strict=True):
        x = matrix(m, n, torch.float32, "strided", device=device)
        for poison, kernel in zip(
            (0x5A, 0xA5, 0x5A), KERNELS if granularity == "per_row" else ["tile"] * 3, strict=True
        ):
            memory = laws.GuardedTorch(poison)
            for module in (kernels, statistics):
                monkeypatch.setattr(module, "torch", memory)
            quantizer = Quantizer(8, granularity, zero, "stochastic")
            out = assert_equals_reference(x, quantizer, kernel=kernel, tile=SMALL_TILE)
            memory.check()
            assert memory.made >= sum(t is not None for t in out)


def test_the_input_is_left_alone(device):
    x = matrix(17, 33, torch.float32, device=device)
    before = x.clone()
    for granularity in GRANULARITIES:
        launch(x, Quantizer(8, granularity, "grid", "stochastic"), rng=laws.random_state())
    assert torch.equal(x, before)


@pytest.mark.parametrize("granularity, kernel", [*(("per_row", k) for k in KERNELS), ("per_column", "tile")])
def test_wide_offsets_are_the_reference(granularity, kernel, device, monkeypatch):
    """The variant for rows so far apart that 32 bits cannot say how far, on a matrix that does not need it."""
    monkeypatch.setattr(kernels, "is_wide", lambda *spans: True)
    x = matrix(33, 47, torch.float32, "strided", device=device)
    mul = torch.rand(1, 47, generator=torch.Generator().manual_seed(0)).to(device)
    quantizer = Quantizer(8, granularity, "grid", "stochastic")
    assert_equals_reference(x, quantizer, multiplier=mul, kernel=kernel, tile=SMALL_TILE)


@pytest.mark.parametrize("axis", [0, 1])
def test_elements_may_be_2_to_the_31_apart(axis, device):
    """33 rows, or columns, 2²⁶ elements apart: 4 GiB, of which nearly all is never touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = matrix(33, 5, torch.float16, device=device)
    view = memory.as_strided((33, 5), (2**26, 1))
    view.copy_(x)
    x, view = (x, view) if axis == 0 else (x.t(), view.t())
    for granularity in ("per_row", "per_column"):
        a = launch(view, Quantizer(8, granularity, "min"), rng=laws.random_state(), kernel="tile")
        for got, expected in zip(
            a, reference.quantize(x.cpu(), Quantizer(8, granularity, "min"), cols=True, sums=True), strict=True
        ):
            laws.assert_same(got, expected)


def test_codes_repeat_for_the_same_step_and_differ_for_the_next(device):
    x = matrix(17, 33, torch.float32, device=device)
    quantizer = Quantizer(4, "per_tensor", "grid", "stochastic")
    a, b, c = (launch(x, quantizer, rng=laws.random_state(1, step))[0] for step in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- anything


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40), n=st.integers(1, 70), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(WAYS), bits=st.integers(2, 8), tile=st.sampled_from(TILES), exponent=st.integers(-140, 120),
    multiplier=st.sampled_from([None, "row", "column"]), kernel=st.sampled_from(KERNELS), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_matrix_is_the_reference(m, n, dtype, layout, way, bits, tile, exponent, multiplier, kernel, seed, device):
    # float16 cannot hold such powers, and the interpreter reads bfloat16 below the normal numbers as zero.
    limit = {torch.float16: 0, torch.bfloat16: 100 if INTERPRETED else 140, torch.float32: 140}[dtype]
    x = matrix(m, n, dtype, layout, seed, device, factor=2.0 ** max(min(exponent, limit), -limit))
    mul = None
    if multiplier is not None:
        mul = torch.rand((m, 1) if multiplier == "row" else (1, n), generator=torch.Generator().manual_seed(1)).to(
            device
        )
    kernel = kernel if way[0] == "per_row" else "tile"
    assert_equals_reference(
        x,
        Quantizer(bits, *way),
        multiplier=mul,
        step=seed,
        stream=seed % 256,
        rank=seed % 1000,
        kernel=kernel,
        tile=tile,
    )
