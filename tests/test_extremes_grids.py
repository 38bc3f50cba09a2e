"""The grids of launches beyond 2³¹ elements: CUDA has 2³¹ - 1 programs along the first axis and 65 535 along the others."""

import importlib

import pytest
import torch

META = torch.device("meta")
MODULES_OF_KERNELS = (
    "quantize", "statistics", "gradient", "gemm", "gemm_cublas", "gemm_householder", "grouping", "householder",
    "householder_sums", "conv", "conv_quantize", "conv_statistics", "conv_wgrad", "psgd", "int8_step",
)  # fmt: skip


@pytest.fixture
def grids(monkeypatch):
    """[(kernel, grid)] of the launches from here on, which do nothing: their tensors need no memory."""
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((self.name, grid))

    for name in MODULES_OF_KERNELS:
        module = importlib.import_module(f"fqt_kernels.{name}")
        for kernel in [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(kernel))
    return launched


def _empty(*shape, dtype=torch.int8):
    return torch.empty(shape, dtype=dtype, device=META)


def _quantize(m, n, granularity, kernel=None, strided=False):
    from fqt_kernels.quantize import quantize

    x = _empty(n, m, dtype=torch.bfloat16).t() if strided else _empty(m, n, dtype=torch.bfloat16)
    quantize(x, bits=8, granularity=granularity, zero="min", cols=kernel != "rows", sums=True, kernel=kernel)


def _gradient(m, n):
    from fqt_kernels.gradient import Side, quantize_gradient

    sides = Side(8, "per_row", "symmetric"), Side(8, "per_column", "symmetric")
    rng = _empty(2, dtype=torch.int64)
    quantize_gradient(
        _empty(m, n, dtype=torch.bfloat16), *sides, row_mul=None, col_mul=None, rng=rng, streams=(0, 1), bias=True
    )


def _mm(m, n, k, split_k=1):
    from fqt_kernels.gemm import CONFIGS, scaled_mm

    for config in CONFIGS["sm90"]:
        scaled_mm(_empty(m, k), _empty(n, k), _empty(m, dtype=torch.float32), None, split_k=split_k, config=config)


def _tile_mm(m, n, k):
    from fqt_kernels import gemm_householder, grouping

    ranges, columns = _empty(m, dtype=torch.float32), _empty(n, dtype=torch.float32)
    gemm_householder.scaled_mm(
        _empty(m, k), _empty(n, k), ranges, None, groups=grouping.group_rows(ranges, "tile"), ranges=ranges, value=ranges,
        columns=columns, config=gemm_householder.CONFIGS["sm90"][0],
    )  # fmt: skip


def _householder(m, n, groups="global"):
    from fqt_kernels import grouping, householder, statistics

    x, z = _empty(m, n, dtype=torch.bfloat16), _empty(m, n, dtype=torch.float32)
    ranges, absmax = grouping.row_ranges(statistics.row_stats(x, "per_row", False))
    found = grouping.group_rows(ranges, groups)
    householder.transform(x, found, absmax, bits=8, zero="min", ranges=ranges)
    columns = _empty(n, dtype=torch.float32)
    householder.inverse(z, found, absmax, ranges=ranges, value=ranges, columns=columns, out_dtype=torch.float32)


def _conv(n, c, rows, size, groups=1, transposed=False, stride=1):
    from fqt.conv import Geometry
    from fqt_kernels.conv import CONFIGS, conv

    g = Geometry.of(size, (3, 3), (stride, stride), padding=((1, 1), (1, 1)), groups=groups)
    a, b = _empty(n, g.out_pixels if transposed else g.pixels, c), _empty(rows, 9, c // groups)
    conv(a, b, g, transposed=transposed, a_scale=_empty(1, dtype=torch.float32), config=CONFIGS["sm90"][0])


def _wgrad(o, c, n, size, splits=1):
    from fqt.conv import Geometry
    from fqt_kernels.conv_wgrad import CONFIGS, conv_wgrad

    g, scale = Geometry.of(size, (1, 1)), _empty(1, dtype=torch.float32)
    for config in CONFIGS["sm90"]:
        a, b = _empty(o, g.pixels, n), _empty(c, g.pixels, n)
        conv_wgrad(a, b, n, g, a_scale=scale, b_scale=scale, config=config, splits=splits)


def _images(n, c, p, last):
    from fqt_kernels.conv_quantize import quantize_images

    x = _empty(n, p, c, dtype=torch.bfloat16).transpose(1, 2) if last else _empty(n, c, p, dtype=torch.bfloat16)
    for granularity in ("per_tensor", "per_row", "per_column"):
        quantize_images(x, bits=8, granularity=granularity, zero="min", cols=True, sums=True)


def _int8_step(m, n):
    from fqt_kernels.int8_step import int8_step
    from fqt_kernels.psgd import Hyper

    scale, rng = _empty(m, 1, dtype=torch.float32), _empty(2, dtype=torch.int64)
    range_ = _empty(1, 2, dtype=torch.float32)
    g = _empty(m, n, dtype=torch.bfloat16)
    int8_step(_empty(m, n), _empty(n, m), scale, rng, g, Hyper(0.1, target="grid"), range=range_, fresh=True)


@pytest.mark.parametrize(
    "launch, arguments",
    [
        *((_quantize, (*shape, granularity)) for shape in ((2**33, 7), (2**21, 2**14), (9, 2**30), (1, 2**35))
          for granularity in ("per_tensor", "per_row", "per_column")),
        (_quantize, (2**33, 7, "per_row", "rows")),
        (_quantize, (2**20, 2**12, "per_row", None, True)),
        (_gradient, (2**33, 7)), (_gradient, (2**21, 2**14)), (_gradient, (9, 2**30)),
        (_mm, (2**33, 48, 64)), (_mm, (48, 2**33, 64)), (_mm, (2**20, 2**20, 64)), (_mm, (512, 512, 131_071, 131_071)),
        (_tile_mm, (2**30, 48, 64)), (_tile_mm, (2**20, 2**16, 64)),
        (_householder, (2**30, 16)), (_householder, (2**20, 2**14, "tile")), (_householder, (64, 2**30)),
        (_conv, (2**28, 16, 16, (8, 8))), (_conv, (8, 16, 2**20, (32, 32))), (_conv, (2**20, 64, 64, (8, 8), 64)),
        (_conv, (2**26, 16, 16, (8, 8), 1, True, 2)), (_conv, (2, 65_535, 65_535, (8, 8), 65_535)),
        (_wgrad, (64, 2**20, 2**10, (8, 8))), (_wgrad, (2**20, 64, 2**10, (8, 8))), (_wgrad, (1, 1, 2**17, (181, 181))),
        (_wgrad, (2, 512 * 65_535, 8, (1, 1))),
        (_images, (2**28, 16, 9, True)), (_images, (2**28, 16, 9, False)), (_images, (3, 2**20, 2**12, True)),
        (_int8_step, (2**31, 16)), (_int8_step, (16, 2**30)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_the_grid_of_every_launch_beyond_2_to_the_31_is_one_that_cuda_takes(launch, arguments, grids):
    launch(*arguments)
    assert grids
    for kernel, grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        assert 1 <= x < 2**31 and 1 <= y <= 65_535 and z == 1, f"{kernel}: {grid}"


def test_the_grids_are_those_of_every_kernel(grids):
    """A kernel whose grid nothing here looks at fails this: with a list of those whose grid is bounded by other means."""
    for launch, arguments in ((_quantize, (64, 32, "per_row", "rows")), (_quantize, (64, 32, "per_row", "long_rows")),
                              (_quantize, (64, 32, "per_tensor")), (_gradient, (64, 32)), (_mm, (64, 32, 16)),
                              (_tile_mm, (64, 32, 16)), (_householder, (4096, 64)), (_householder, (64, 70)),
                              (_householder, (256, 64, "tile")), (_conv, (2, 16, 16, (8, 8))), (_wgrad, (8, 8, 16, (4, 4))),
                              (_images, (17, 16, 9, False)), (_int8_step, (64, 32))):  # fmt: skip
        launch(*arguments)
    seen = {kernel for kernel, _ in grids}
    every = {kernel for name in MODULES_OF_KERNELS for kernel in vars(importlib.import_module(f"fqt_kernels.{name}"))
             if kernel.startswith("_") and kernel.endswith("_kernel")}  # fmt: skip
    # As many programs as tiles of at most 2²⁸ sums; as the items of a list on the host; the twin of `_images_kernel`.
    assert every - seen == {"_epilogue_kernel", "_psgd_kernel", "_psgd_stats_kernel", "_gradient_images_kernel"}


@pytest.mark.parametrize(
    "launch, arguments, says",
    [
        (_conv, (2, 65_536, 65_536, (8, 8), 65_536), "65536 groups"),
        (_wgrad, (2, 512 * 65_535 + 1, 8, (1, 1)), "33553921 weights"),
        (_wgrad, (1, 1, 2**17, (257, 257)), "programs share"),  # so many programs int32 itself asks for
        (_wgrad, (256, 2**23, 8, (1, 1)), "2³¹ weights"),
        (_quantize, (1, 2**31 - 1, "per_row", "long_rows"), "2147483647 elements"),
        (_householder, (2, 2**31 - 1), "2147483647 elements"),
        (_int8_step, (2, 2**31 - 1), "2147483647 elements"),
    ],
)
def test_extents_that_no_launch_can_have_are_refused(launch, arguments, says, grids):
    """More than 65 535 programs along an axis; loops to extents whose last step leaves int32."""
    with pytest.raises(ValueError, match=says):
        launch(*arguments)


def test_a_row_that_a_loop_cannot_end_at_is_quantized_in_tiles(grids):
    _quantize(1, 2**31 - 1, "per_row")
    assert grids[-1][0] == "_tile_kernel"
