"""Matrices and images of more than 2³¹ elements: the corner programs of every launch stay within their memory.

The memory is there but, save for a few pages, never touched. The programs that run are the first and the last of the grid
and some between them, under the sanitizer: an offset that has left int32 lies outside of every tensor. What they compute of
the rows that hold something is compared with the reference's.
"""

import resource

import laws
import pytest
import sanitizer
import torch

import fqt_kernels.conv
import fqt_kernels.conv_quantize
import fqt_kernels.conv_statistics
import fqt_kernels.conv_wgrad
import fqt_kernels.gemm
import fqt_kernels.gradient
import fqt_kernels.quantize
import fqt_kernels.statistics
from fqt import conv, reference
from fqt.recipe import Quantizer

pytestmark = [
    pytest.mark.interpreted,  # on a GPU: python -m fqt_bench.extremes
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of random words and of unwritten ranges
]
TALL, TALLER, LONG = ((1 << 20) + 16, 2112), ((1 << 25) + 16, 80), (48, (1 << 26) + 16)
LIMIT = 3 << 30  # bytes: a page that is touched may be one of 2 MiB, and a tile of a transposed copy touches 128


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """These tests take little memory and, since programs share what there is to do instead of looping over it, time."""
    monkeypatch.setattr(fqt_kernels.statistics, "STATS_MIN_PROGRAMS", 1 << 30)
    monkeypatch.setattr(fqt_kernels.gradient, "STATS_PROGRAMS", 1 << 30)
    monkeypatch.setattr(fqt_kernels.quantize, "long_rows_programs", lambda x, block_m: -(-len(x) // block_m))
    monkeypatch.setattr(fqt_kernels.conv_statistics, "PROGRAMS", 1 << 30)
    for module in (fqt_kernels.quantize, fqt_kernels.gradient):
        monkeypatch.setattr(module, "params", _of_few_parts(module.params))
    monkeypatch.setattr(fqt_kernels.conv_statistics, "_params", _of_few_parts(fqt_kernels.conv_statistics._params))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < LIMIT


def _of_few_parts(params):
    """The kernel that goes through all parts of a range does not where they are many: their number is no offset."""

    def of_few_parts(*args, **more):
        if all(t.shape[-2] <= 64 for t in (*args, *more.values()) if isinstance(t, torch.Tensor) and t.dim() > 1):
            params(*args, **more)

    return of_few_parts


def corners(launch, inner: int = 1):
    """What launch() returns, of the corner programs; the sanitizer finds nothing."""
    with sanitizer.Sanitizer(order=lambda grid: sanitizer.corners(grid, inner)) as found:
        result = launch()
    assert not found
    return result


def large(m: int, n: int, dtype: torch.dtype = torch.bfloat16, extra: int = 0) -> torch.Tensor:
    """(m, n) of nothing but the first, middle and last 64 rows and columns of both."""
    assert m * n > 2**31
    x = torch.empty(m, n + extra, dtype=dtype)[:, :n]
    generator = torch.Generator().manual_seed(0)
    for rows in pieces(m):
        for cols in pieces(n):
            part = x[rows, cols]
            part.copy_(torch.randn(part.shape, generator=generator))
    return x


def pieces(n: int, width: int = 64) -> list[slice]:
    if n <= 4096:
        return [slice(0, n)]
    return [slice(0, width), slice(n // 2 - width, n // 2 + width), slice(n - width, n)]


# ---- quantization of matrices


@pytest.mark.parametrize("kernel", ["rows", "long_rows", "tile"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_rows_of_a_tall_matrix(kernel, stochastic):
    x = large(*TALL)
    rng = laws.random_state(1) if stochastic else None
    q, _, scale, *_ = corners(
        lambda: fqt_kernels.quantize.quantize(
            x, bits=8, granularity="per_row", zero="symmetric", rng=rng, cols=kernel != "rows", kernel=kernel
        )
    )
    if stochastic or kernel == "tile":  # the bits are of the row's number, the ranges of programs that have not run
        return
    for rows in (slice(0, 1), slice(len(x) - 1, len(x))):
        want = reference.quantize(x[rows].float(), Quantizer(8, "per_row", "symmetric"))
        laws.assert_same(scale[rows], want.scale)
        laws.assert_same(q[rows], want.q)


CASES = [
    (TALL, "per_tensor", "dense"), (TALL, "per_row", "transposed"), (TALL, "per_column", "padded"),
    (TALLER, "per_row", "padded"), (TALLER, "per_column", "dense"), (TALLER, "per_tensor", "transposed"),
    (LONG, "per_row", "dense"), (LONG, "per_column", "transposed"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "granularity", "form"), CASES)
def test_tiles_of_a_large_matrix(shape, granularity, form):
    x = large(*shape, extra=16 * (form == "padded"))
    x = x.t() if form == "transposed" else x
    corners(
        lambda: fqt_kernels.quantize.quantize(
            x, bits=8, granularity=granularity, zero="grid", rows=True, cols=True, sums=shape == TALL, kernel="tile"
        )
    )


@pytest.mark.parametrize("shape", [TALL, TALLER])
def test_a_large_gradient(shape):
    x, (m, n) = large(*shape), shape
    side = fqt_kernels.gradient.Side
    corners(
        lambda: fqt_kernels.gradient.quantize_gradient(
            x, side(8, "per_row", "min"), side(8, "per_column", "symmetric"), row_mul=torch.ones(m), col_mul=torch.ones(n),
            rng=laws.random_state(1), streams=(0, 1), sums=True, bias=True,
        )
    )  # fmt: skip


# ---- products


def affine(m: int, n: int) -> dict[str, torch.Tensor]:
    return dict(
        a_scale=torch.ones(m), b_scale=torch.ones(n), a_offset=torch.ones(m), b_offset=torch.ones(1),
        a_sum=torch.ones(m, dtype=torch.int32), b_sum=torch.ones(n, dtype=torch.int32), bias=torch.zeros(n),
    )  # fmt: skip


@pytest.mark.parametrize("config", [(64, 128, 32, 4, 1), (128, 64, 32, 4, 1)])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(TALL[0], 2112, 16), (2112, TALL[0], 16), (TALL[0], 40, 2112), (40, TALL[0], 2112)]
)
def test_a_product_of_large_extents(m, n, k, config):
    """Of an output, of either operand: the last element of a vector of ones is the sum of its codes."""
    a, b = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
    a[-1], b[-1] = 1, 2
    terms = affine(m, n)
    symmetric = {"a_scale": terms["a_scale"], "b_scale": terms["b_scale"]}
    out = corners(lambda: fqt_kernels.gemm.scaled_mm(a, b, **symmetric, config=config))
    assert float(out[-1, -1]) == 2 * k
    corners(lambda: fqt_kernels.gemm.scaled_mm(a, b, **terms, config=config))


# ---- convolutions of 256 images of 224 x 224 pixels


SIDE, CHANNELS = 224, 176
GEOMETRY = conv.Geometry.of((SIDE, SIDE), (3, 3), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_convolution_of_large_images(transposed, channels_last):
    a = torch.empty(256, SIDE * SIDE, CHANNELS, dtype=torch.int8)
    b = torch.empty(CHANNELS, 9, CHANNELS, dtype=torch.int8)
    assert a.numel() > 2**31
    a[-1, -1], b[-1] = 1, 2
    out = corners(
        lambda: fqt_kernels.conv.conv(
            a, b, GEOMETRY, transposed=transposed, a_scale=torch.ones(256), b_scale=torch.ones(CHANNELS),
            channels_last=channels_last, config=(128, 64, 32, 4, 1),
        )
    )  # fmt: skip
    # Of the last pixel's nine taps four are inside, of which one holds ones.
    assert float(out[-1, -1, -1, -1]) == 2 * CHANNELS


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("granularity", ["per_row", "per_column"])
def test_large_images(granularity, memory_format):
    shape = (256, SIDE * SIDE, CHANNELS) if memory_format == "channels_last" else (256, CHANNELS, SIDE * SIDE)
    x = torch.empty(shape, dtype=torch.bfloat16)
    x = x.transpose(1, 2) if memory_format == "channels_last" else x
    corners(
        lambda: fqt_kernels.conv_quantize.quantize_images(
            x, bits=8, granularity=granularity, zero="min", rng=laws.random_state(2), stream=1, channels=CHANNELS, cols=True,
            sums=True,
        ),
        inner=0,
    )  # fmt: skip


def test_a_large_gradient_of_images():
    x = torch.empty(256, SIDE * SIDE, CHANNELS, dtype=torch.bfloat16).transpose(1, 2)
    side = fqt_kernels.gradient.Side
    corners(
        lambda: fqt_kernels.conv_quantize.quantize_gradient_images(
            x, side(8, "per_row", "min"), side(8, "per_column", "symmetric"), row_mul=torch.ones(256),
            col_mul=torch.ones(CHANNELS), rng=laws.random_state(1), streams=(0, 1), channels=CHANNELS, sums=True, bias=True,
        ),
        inner=0,
    )  # fmt: skip


def test_a_large_gradient_of_filters():
    """Both operands have more than 2³¹ elements."""
    n, g = 256, conv.Geometry.of((64, 64), (3, 3), padding=((1, 1), (1, 1)))
    a, b = (torch.empty(2080, 64 * 64, n, dtype=torch.int8) for _ in range(2))
    assert a.numel() > 2**31
    corners(
        lambda: fqt_kernels.conv_wgrad.conv_wgrad(
            a, b, n, g, a_scale=torch.ones(len(a)), b_scale=torch.ones(1), config=(16, 16, 4096, 4, 1), splits=8
        ),
        inner=0,
    )  # fmt: skip
