"""Every launch that the compiler gate compiles: the launchers themselves, called with tensors that have no memory.

A launch has a name that says what is special about it, and may start several kernels. "odd" marks the launches that
write (and, quantizing, read) matrices whose rows are no whole multiples of 16 bytes.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt import candidates
from fqt_kernels import gemm, gemm_cublas, gemm_hopper, gradient, quantize
from fqt_kernels.statistics import ZERO

from . import conv, conv_quantize, conv_wgrad, grouping, householder, int8_step, psgd, tile_products
from .table import ARCHES, config_name

Launch = Callable[[], object]
_empty = functools.partial(torch.empty, device="meta")
_codes = functools.partial(_empty, dtype=torch.int8)
_fp8 = functools.partial(_empty, dtype=torch.float8_e4m3fn)
_sums = functools.partial(_empty, dtype=torch.int32)


def launches(arch: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all that is compiled for an architecture."""
    family = ARCHES[arch]
    table, fp8 = gemm.CONFIGS[family], gemm.FP8_CONFIGS.get(candidates.FP8_FAMILY.get(arch.replace("_", "")), [])
    for config in fp8:
        yield from _fp8_products(config)
        yield from _more_outputs(config, torch.float8_e4m3fn, every=config == fp8[-1])
    for config in table:
        yield from _products(config, 4096, "")
    yield from _products(gemm.FLUSH_CONFIG[family], 200_704, "flush ")
    if arch == "sm_89":  # for integers the instructions are those of sm_80
        return
    for config in table:
        yield from _more_outputs(config, torch.int8, splits=family != "amd", every=config == table[-1])
    if family == "sm90":
        for config in gemm_hopper.CONFIGS:
            yield from _hopper_products(config)
    for module in (grouping, householder, psgd, int8_step, tile_products, conv, conv_wgrad, conv_quantize):
        yield from module.launches(arch)
    yield from _epilogues()
    yield from _row_quantizations()
    yield from _tile_quantizations()
    yield from _gradient_quantizations()
    if arch in ("sm_80", "sm_90"):
        yield from _more_tiles()


def _products(config: tuple[int, ...], k: int, kind: str) -> Iterator[tuple[str, Launch]]:
    """The epilogues of the recipes. "even": extents fill whole tiles; "tail": M and K do not; "odd": nor does N."""
    title = f"{config_name(config)} {kind}"
    product = functools.partial(gemm.scaled_mm, config=config, out_dtype=torch.bfloat16)
    for extents, m, n, terms in (("even", 8192, 4096, k), ("tail", 8191, 4096, k + 16), ("odd", 8191, 4095, k + 16)):
        args = _codes(m, terms), _codes(n, terms), _empty(m)
        offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_sums(m), b_sum=_sums(n))
        if not gemm.fits(config, n):  # dispatch does not choose it
            continue
        if extents != "tail":  # less than the affine epilogue with a tail
            yield f"{title}scales {extents}", functools.partial(product, *args, _empty(n), bias=_empty(n))
        if extents != "even":  # the same
            yield f"{title}affine {extents}", functools.partial(product, *args, _empty(1), bias=_empty(n), **offsets)
    args = _codes(8192, k), _codes(4096, k), _empty(8192), None
    yield f"{title}folded even", functools.partial(gemm.scaled_mm, *args, config=config)


def _fp8_products(config: tuple[int, ...]) -> Iterator[tuple[str, Launch]]:
    for extents, m, n, k in (("even", 8192, 4096, 4096), ("odd", 8191, 4095, 4112)):
        if gemm.fits(config, n):
            args = _fp8(m, k), _fp8(n, k), _empty(m), _empty(n)
            launch = functools.partial(gemm.scaled_mm, *args, bias=_empty(n), config=config, out_dtype=torch.bfloat16)
            yield f"{config_name(config)} fp8 scales {extents}", launch


def _more_outputs(
    config: tuple[int, ...], dtype: torch.dtype, *, splits: bool = False, every: bool
) -> Iterator[tuple[str, Launch]]:
    """C added to what is there, as wgrad does in float32 and an affine epilogue in bfloat16; the row maxima; split-K.

    Unless every, only those with the longest epilogues.
    """
    kind = "" if dtype == torch.int8 else "fp8 "
    m, n, k = 8191, 4096, 4112
    codes = _empty(m, k, dtype=dtype), _empty(n, k, dtype=dtype)
    product = functools.partial(gemm.scaled_mm, *codes, _empty(m), config=config)
    offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_sums(m), b_sum=_sums(n)) if not kind else {}
    to_bfloat16 = dict(b_scale=_empty(1), bias=_empty(n), out=_empty(m, n, dtype=torch.bfloat16), **offsets)
    found = dict(b_scale=_empty(n), bias=_empty(n), out_dtype=torch.bfloat16, row_absmax=_sums(m))
    for name, options in (
        ("added bfloat16 tail", to_bfloat16),
        ("added folded tail", dict(b_scale=None, out=_empty(m, n))),
        ("absmax tail", found),
    )[: 3 if every else 1]:
        yield f"{config_name(config)} {kind}{name}", functools.partial(product, **options)
    if splits:
        title = f"{config_name(config)} split"
        if every:
            yield f"{title} added folded tail", functools.partial(product, None, out=_empty(m, n), split_k=4)
        yield (
            f"{title} added bfloat16 absmax tail",
            functools.partial(product, **to_bfloat16, row_absmax=_sums(m), split_k=4),
        )


def _hopper_products(config: tuple[int, ...]) -> Iterator[tuple[str, Launch]]:
    """The epilogues of the recipes; "full": every operand that there is, as a vector."""
    title = config_name(config)
    product = functools.partial(gemm_hopper.scaled_mm, config=config, out_dtype=torch.bfloat16, processors=132)
    for extents, m, n, k in (("even", 8192, 4096, 4096), ("tail", 8191, 4096, 4111), ("odd", 8191, 4095, 4111)):
        args = _codes(m, k), _codes(n, k), _empty(m)
        offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_sums(m), b_sum=_sums(n))
        yield f"{title} scales {extents}", functools.partial(product, *args, _empty(n), bias=_empty(n))
        yield f"{title} affine {extents}", functools.partial(product, *args, _empty(1), bias=_empty(n), **offsets)
        yield f"{title} full {extents}", functools.partial(product, *args, _empty(n), bias=_empty(n), **offsets)
        yield f"{title} folded {extents}", functools.partial(product, *args, None, out_dtype=torch.float32)
    one = _codes(1, 1), _codes(1, 1), _empty(1), _empty(1)
    yield f"{title} one odd", functools.partial(product, *one, bias=_empty(1))


def _epilogues() -> Iterator[tuple[str, Launch]]:
    """The pass over the sums of `torch._int_mm`, whose N is a multiple of 8, and of 16 or not ("units"); "odd": where C
    has rows of another stride."""
    m, n = 8191, 4088
    product = functools.partial(gemm_cublas.scaled_mm, out_dtype=torch.bfloat16)
    yield (
        "epilogue scales even",
        functools.partial(
            product, _codes(8192, 4096), _codes(4096, 4096), _empty(8192), _empty(4096), bias=_empty(4096)
        ),
    )
    args = _codes(m, 4112), _codes(n, 4112), _empty(m)
    offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_sums(m), b_sum=_sums(n), bias=_empty(n))
    more = dict(out_dtype=None, row_absmax=_sums(m))
    added = _empty(m, n, dtype=torch.bfloat16)
    yield "epilogue affine units", functools.partial(product, *args, _empty(1), **offsets)
    yield "epilogue folded added units", functools.partial(product, *args, None, out_dtype=None, out=_empty(m, n))
    yield (
        "epilogue affine added absmax units",
        functools.partial(product, *args, _empty(n), out=added, **more, **offsets),
    )
    added = _empty(m, n + 1, dtype=torch.bfloat16)[:, :n]
    yield "epilogue affine added absmax odd", functools.partial(product, *args, _empty(n), out=added, **more, **offsets)


def _quantization(m: int, n: int, granularity: str, zero: str, *, stochastic: bool = False, rows: bool = True,
                  cols: bool = False, dtype: torch.dtype = torch.bfloat16, multiplier: tuple[int, int] | None = None,
                  ) -> Launch:  # fmt: skip
    """A launch of `quantize` on a contiguous (m, n) matrix, with sums of codes where zero has an offset."""
    return functools.partial(
        quantize.quantize,
        _empty(m, n, dtype=dtype),
        bits=8,
        granularity=granularity,
        zero=zero,
        multiplier=None if multiplier is None else _empty(multiplier),
        rng=_empty(2, dtype=torch.int64) if stochastic else None,
        rows=rows,
        cols=cols,
        sums=zero != "symmetric",
    )


def _row_quantizations() -> Iterator[tuple[str, Launch]]:
    """Rows with their own scale, as the recipes round: X and W to nearest, gradients stochastically.

    From the shortest to the longest row in registers, of which n = 1024 is the longest that is also written transposed,
    and longer ones.
    """

    def row(n: int, zero: str, m: int = 8192, **options) -> Launch:
        return _quantization(m, n, "per_row", zero, **options)

    yield "n128 cols symmetric nearest", row(128, "symmetric", cols=True)
    yield "n1024 cols symmetric nearest", row(1024, "symmetric", cols=True)
    yield "n1024 odd cols symmetric nearest", row(1024, "symmetric", m=8191, cols=True)
    yield "n4096 symmetric nearest", row(4096, "symmetric")
    yield "n16384 float32 symmetric nearest", row(16384, "symmetric", dtype=torch.float32)
    for zero in ZERO:
        yield f"n1024 cols {zero} stochastic", row(1024, zero, cols=True, stochastic=True)
    yield "n1023 odd cols min stochastic", row(1023, "min", m=8191, cols=True, stochastic=True)
    yield "n4096 multiplier symmetric stochastic", row(4096, "symmetric", multiplier=(1, 4096), stochastic=True)
    yield "n4096 min stochastic", row(4096, "min", stochastic=True)
    yield "n16384 grid stochastic", row(16384, "grid", stochastic=True)
    yield "n4096 e4m3 nearest", row(4096, "e4m3")
    yield "n28672 cols symmetric nearest", row(28672, "symmetric", cols=True)
    yield "n28672 cols float32 symmetric nearest", row(28672, "symmetric", cols=True, dtype=torch.float32)
    yield "n28672 cols e4m3 nearest", row(28672, "e4m3", cols=True)
    yield "n28672 min stochastic", row(28672, "min", stochastic=True)
    yield "n28672 multiplier symmetric stochastic", row(28672, "symmetric", multiplier=(1, 28672), stochastic=True)
    yield "n28671 odd cols min stochastic", row(28671, "min", m=8191, cols=True, stochastic=True)


def _tile_quantizations() -> Iterator[tuple[str, Launch]]:
    """Tile by tile, as the recipes round: scales that rows share, or ranges that the producer found."""
    m, n = 8192, 28672
    yield "per_tensor both grid nearest", _quantization(m, n, "per_tensor", "grid", cols=True)
    for zero, found in (("symmetric", (1, 1, m)), ("e4m3", (1, 1, m))):
        launch = _quantization(m, n, "per_row", zero, cols=True)
        yield f"per_row both stats {zero} nearest", functools.partial(launch, stats=_sums(found))
    yield "per_tensor both odd grid nearest", _quantization(m - 1, n - 1, "per_tensor", "grid", cols=True)
    stochastic = functools.partial(_quantization, m, n, stochastic=True)
    yield "per_tensor grid stochastic", stochastic("per_tensor", "grid")
    yield "per_tensor cols grid stochastic", stochastic("per_tensor", "grid", rows=False, cols=True)
    columns = stochastic("per_column", "symmetric", rows=False, cols=True, multiplier=(m, 1))
    yield "per_column cols multiplier symmetric stochastic", columns
    # An extent of 1 reaches a kernel as a constant, not as a number.
    yield "one row odd grid stochastic", _quantization(1, 4096, "per_tensor", "grid", cols=True, stochastic=True)
    yield "one column odd min stochastic", _quantization(4096, 1, "per_column", "min", cols=True, stochastic=True)


def _gradient_quantizations() -> Iterator[tuple[str, Launch]]:
    """Both quantizations of an output gradient, as the recipes that do not transform it ask for them."""
    int8 = gradient.Side(8, "per_row", "symmetric"), gradient.Side(8, "per_column", "symmetric")
    psq = gradient.Side(8, "per_row", "min"), gradient.Side(8, "per_tensor", "grid")
    ptq = gradient.Side(4, "per_tensor", "grid"), gradient.Side(8, "per_tensor", "grid")
    fp8 = gradient.Side(8, "per_row", "e4m3"), gradient.Side(8, "per_column", "e4m3")
    for name, sides, (m, n), dtype in (
        ("int8", int8, (8192, 4096), torch.bfloat16),
        ("int8 float32", int8, (8192, 4096), torch.float32),
        ("int8 odd", int8, (8191, 4095), torch.bfloat16),
        ("psq8", psq, (8192, 4096), torch.bfloat16),
        ("psq8 odd", psq, (8191, 4095), torch.bfloat16),
        ("ptq4", ptq, (8192, 4096), torch.bfloat16),
        ("fp8", fp8, (8192, 4096), torch.bfloat16),
        ("fp8 odd", fp8, (8191, 4095), torch.bfloat16),
    ):
        folded = sides[0].zero in ("symmetric", "e4m3")
        yield (
            f"gradient {name} stochastic",
            functools.partial(
                gradient.quantize_gradient,
                _empty(m, n, dtype=dtype),
                *sides,
                row_mul=_empty(m) if folded else None,
                col_mul=_empty(n) if folded else None,
                rng=_empty(2, dtype=torch.int64),
                streams=(0, 1),
                sums=not folded,
                bias=True,
            ),
        )


def _more_tiles() -> Iterator[tuple[str, Launch]]:
    """The launches that need the most registers, of the tiles that only tuning chooses."""
    quantizations = dict([*_row_quantizations(), *_tile_quantizations(), *_gradient_quantizations()])
    names = "per_row both stats e4m3 nearest", "gradient int8 stochastic", "gradient fp8 stochastic"
    jobs = [(tile, name) for tile in candidates.MORE_TILES for name in names]
    names = "n28672 cols e4m3 nearest", "n28672 min stochastic"
    jobs += [(tile, name) for tile in candidates.MORE_LONG_ROWS for name in names]
    for tile, name in jobs:
        yield f"{name} {'x'.join(map(str, tile[:2]))} w{tile[2]}", functools.partial(quantizations[name], tile=tile)
