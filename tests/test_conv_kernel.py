"""The kernel of fprop and dgrad against `fqt.conv.product`, bit for bit: exact integer sums, then the same operations."""

import dataclasses
import random

import laws
import pytest
import torch

import fqt_kernels.conv
from fqt import conv
from fqt.conv import Filters, Geometry, Images
from fqt_kernels.conv import CONFIGS, UNALIGNED_CONFIG, fits
from fqt_kernels.gemm import MAX_INT32_TERMS

SMALL, FEW = (32, 32, 32, 1, 1), (128, 32, 32, 1, 1)  # the interpreter's cost is per program and per block


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution and what its epilogue does. channels: of the images, rows: of the output, in a group."""

    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    channels: int = 16
    rows: int = 5
    n: int = 2
    transposed: bool = False
    affine: bool = False
    scales: str = "image row"  # which operands have several
    channels_last: bool = True

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.size, self.kernel, self.stride, self.padding, self.dilation, self.groups)


def operands(case: Case, extreme: bool = False) -> tuple[Images, Filters, torch.Tensor | None]:
    """Codes, scales, offsets and sums; `extreme`: every code -128. The bias is of affine cases."""
    g, every = case.geometry, case.rows * case.groups
    pixels = g.out_pixels if case.transposed else g.pixels
    shapes = (case.n, pixels, case.channels * g.groups), (every, g.taps, case.channels)
    a, b = (torch.randint(-128, -127 if extreme else 128, shape, dtype=torch.int8) for shape in shapes)
    images, rows = (case.n if "image" in case.scales else 1), (every if "row" in case.scales else 1)
    sa, sb = torch.rand(images) + 0.1, torch.rand(rows) + 0.1 if "none" not in case.scales else None
    if not case.affine:
        return Images(a, None, sa, None), Filters(b, sb, None, None, case.channels), None
    sums = conv.pixel_sums(a, g.groups), b.sum(2, dtype=torch.int32)
    filters = Filters(b, sb, torch.randn(1), sums[1], case.channels)
    return Images(a, None, sa, torch.randn(images), sums[0]), filters, torch.randn(every)


def launch(case: Case, a: Images, b: Filters, bias, device, config=SMALL, **options) -> torch.Tensor:
    """The kernel on operands that lie between poison."""
    g = case.geometry
    more = {}
    if a.offset is not None:
        table = conv.offset_table(b, g, case.transposed, torch.float32)
        classes = conv.border(g, case.transposed).classes
        more = dict(a_offset=a.offset, table=table, classes=classes, a_sums=a.sums, b_offset=b.offset, bias=bias)
    more |= dict(a_scale=a.scale, b_scale=b.scale)
    between = {
        k: None if t is None else laws.poisoned_tail(t.to(device).flatten()).view(t.shape) for k, t in more.items()
    }
    codes = (laws.poisoned_tail(t.to(device).flatten()).view(t.shape) for t in (a.rows, b.q))
    return fqt_kernels.conv.conv(
        *codes, g, transposed=case.transposed, channels_last=case.channels_last, config=config, **between, **options
    )


def check(case: Case, device, **options) -> None:
    a, b, bias = operands(case)
    g = case.geometry
    got = launch(case, a, b, bias, device, **options)
    want = conv.product(a, b, g, bias, transposed=case.transposed)
    assert got.shape == (case.n, case.rows * case.groups, *(g.size if case.transposed else g.out))
    kept = torch.channels_last if case.channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=kept)
    laws.assert_same(got.flatten(2), want, str(case))


def fuzzed(count: int, seed: int) -> list[Case]:
    """Random convolutions of every kind, small."""
    draw = random.Random(seed)
    pick = lambda *values: draw.choice(values)  # noqa: E731
    found: list[Case] = []
    while len(found) < count:
        one = lambda: (pick(0, 0, 1, 2), pick(0, 1, 2))  # noqa: E731
        case = Case(
            (draw.randint(1, 8), draw.randint(1, 8)), (pick(1, 2, 3, 5), pick(1, 3, 4)), (pick(1, 2, 3), pick(1, 2)),
            (one(), one()), (pick(1, 1, 2, 3), pick(1, 2)), pick(1, 1, 1, 2, 3), pick(1, 5, 16, 33), pick(1, 3, 8, 17),
            pick(1, 2, 3), len(found) % 2 == 1, pick(False, True), pick("image row", "image none", "row", ""),
            pick(False, True),
        )  # fmt: skip
        spans = [d * (k - 1) + 1 - sum(p) for d, k, p in zip(case.dilation, case.kernel, case.padding, strict=True)]
        if all(span <= size for span, size in zip(spans, case.size, strict=True)):  # no larger than the padded image
            found.append(case)
    return found


NONE, SEVEN = ((0, 0), (0, 0)), dict(size=(9, 8), kernel=(7, 7), stride=(2, 2), padding=((3, 3), (3, 3)))
EDGES = [
    Case(**SEVEN, channels=3),  # the first layer of a ResNet
    Case(**SEVEN, channels=8, rows=3, transposed=True),
    Case(size=(5, 7), kernel=(1, 1), stride=(2, 2), padding=NONE, transposed=True, affine=True),  # no taps in 3 phases
    Case(size=(7, 7), stride=(3, 2), dilation=(3, 2), transposed=True, affine=True),  # they share a factor
    Case(size=(7, 9), kernel=(2, 3), stride=(4, 2), dilation=(2, 4), padding=((1, 2), (4, 0)), transposed=True),
    Case(size=(1, 1), kernel=(1, 1), stride=(5, 5), padding=NONE, transposed=True),  # phases without outputs
    # Of one dimension; 5 phases, whose first taps the inverse of the dilation orders.
    Case((1, 20), (1, 9), (1, 5), ((0, 0), (4, 4)), (1, 2), transposed=True, affine=True),
    Case(groups=3, channels=1, rows=1, affine=True, channels_last=False),  # depthwise
    Case(size=(4, 3), groups=3, channels=1, rows=2, stride=(2, 2), transposed=True, affine=True),
    Case(groups=2, channels=32, rows=16, affine=True),
    Case(size=(6, 6), n=1, channels=64, rows=48, affine=True, channels_last=False),  # blocks of K, tiles of columns
    Case(size=(4, 4), channels=80, transposed=True, affine=True, scales="image none"),
]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges_are_the_reference(case, device, guard):
    guard(fqt_kernels.conv)
    check(case, device)


@pytest.mark.parametrize("seed", range(5))
def test_fuzzed_convolutions_are_the_reference(seed, device, guard):
    guard(fqt_kernels.conv)
    for case in fuzzed(4, seed):
        check(case, device, config=FEW)


def test_the_configuration_changes_no_bit(device, guard):
    """Every tile there is; on a GPU those of the smallest, since all have the memory for them."""
    guard(fqt_kernels.conv)
    case = Case(size=(3, 4), n=3, kernel=(2, 2), stride=(2, 1), channels=48, rows=40, transposed=True, affine=True)
    tables = CONFIGS.values() if device == "cpu" else (CONFIGS["sm80"],)
    configs = {config[:3]: config for table in (*tables, [UNALIGNED_CONFIG]) for config in table}
    for config in configs.values():
        check(case, device, config=config)


def test_offsets_of_64_bits_change_no_bit(device, monkeypatch, guard):
    """Of images that no test has the memory for."""
    guard(fqt_kernels.conv)
    seen = []
    monkeypatch.setattr(fqt_kernels.conv, "is_wide", lambda *spans: seen.append(spans) or True)
    for transposed in (False, True):
        check(Case(size=(4, 3), stride=(2, 2), transposed=transposed, affine=True, channels_last=transposed), device)
    assert len(seen) == 2


def test_what_is_wide_is_what_an_offset_of_31_bits_cannot_span(monkeypatch):
    """The outputs of all images and a tile, the codes between two taps, the elements between the ends of a tile."""
    seen = []
    monkeypatch.setattr(fqt_kernels.conv, "is_wide", lambda *spans: seen.append(spans) or False)
    monkeypatch.setattr(fqt_kernels.conv, "_conv_mm_kernel", {(4, 1): lambda *args, **kwargs: None})
    case = Case(size=(3, 5), n=8, channels=16, rows=7, transposed=True, stride=(1, 1))
    launch(case, *operands(case), torch.device("cpu"))
    assert seen == [(8 * 15 + 32, (3 * 5 + 3) * 16, (32 // 15 + 2) * 7 * 15)]


def test_the_longest_sum_of_extreme_codes_is_exact(device):
    """131 071 products of -128 and -128, which int32 just holds, before a scale of a power of two."""
    case = Case(size=(1, 1), kernel=(1, 1), padding=((0, 0), (0, 0)), channels=MAX_INT32_TERMS, rows=1, n=1)
    a, b, _ = operands(case, extreme=True)
    a, b = a._replace(scale=torch.tensor([0.5])), b._replace(scale=None)
    got = launch(case, a, b, None, device, config=(16, 16, 8192, 1, 1) if device == "cpu" else UNALIGNED_CONFIG)
    assert got.item() == float(MAX_INT32_TERMS * 2**14) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_of_16_bits_are_the_float32_ones_rounded(dtype, channels_last, device, guard):
    """To nearest on a GPU; the interpreter truncates bfloat16, which is off by less than one unit in the last place."""
    guard(fqt_kernels.conv)
    case = Case(size=(4, 4), affine=True, transposed=True, stride=(2, 2), channels_last=channels_last)
    a, b, bias = operands(case)
    a = a._replace(scale=a.scale * 2.0**-10)  # within float16
    got = launch(case, a, b, bias, device, out_dtype=dtype).cpu()
    want = conv.product(a, b, case.geometry, bias, transposed=True).view(got.shape)
    assert got.dtype == dtype
    if device == "cpu" and dtype == torch.bfloat16:
        assert bool(((got.float() - want).abs() < laws.ulp(want.to(dtype))).all())
    else:
        laws.assert_same(got, want.to(dtype))


def test_padded_channels_add_nothing(device):
    """Zero codes that pad the channels to 16 are not looked at by the offsets' terms either."""
    case = Case(channels=5, affine=True)
    a, b, bias = operands(case)
    want = conv.product(a, b, case.geometry, bias)
    a = a._replace(rows=torch.nn.functional.pad(a.rows, (0, 11)))
    b = b._replace(q=torch.nn.functional.pad(b.q, (0, 11)))
    laws.assert_same(launch(case, a, b, bias, device).flatten(2), want)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(a=torch.float16), TypeError, "int8, got torch.float16 and torch.int8"),
        (dict(b=torch.int32), TypeError, "int8, got torch.int8 and torch.int32"),
        (dict(a_shape=(2, 29, 16)), ValueError, r"a must be contiguous \(N, 30, C\), got \(2, 29, 16\)"),
        (dict(b_shape=(5, 8, 16)), ValueError, r"b must be contiguous .* 9, 16 / 1\), got \(5, 8, 16\)"),
        (dict(b_shape=(5, 9, 15)), ValueError, r"b must be contiguous .* got \(5, 9, 15\)"),
        (dict(a_shape=(2, 30, 14564), b_shape=(5, 9, 14564)), ValueError, "sums of 9·14564 products leave int32"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, says):
    meta = dict(device="meta")
    a = torch.empty(change.get("a_shape", (2, 30, 16)), dtype=change.get("a", torch.int8), **meta)
    b = torch.empty(change.get("b_shape", (5, 9, 16)), dtype=change.get("b", torch.int8), **meta)
    with pytest.raises(error, match=says):
        fqt_kernels.conv.conv(a, b, Case().geometry, a_scale=torch.empty(1, **meta), config=SMALL)


def test_unaligned_rows_have_configurations_that_keep_their_registers():
    for table in CONFIGS.values():
        assert fits(table[0], 7) and all(fits(config, 16) for config in table)
        assert any(not fits(config, 7) for config in table)
