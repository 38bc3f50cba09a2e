"""The checks of `fqt doctor`: every kernel, operator and layer on small shapes, each against an oracle of its own.

The oracle of the kernels is `fqt.reference` on the CPU. Codes, scales, offsets and sums must be equal to the last bit. A
matrix product accumulates exactly in integers and then rounds in float32, on either side at most 10 times plus once for
each piece of a long sum, so that the two lie within

    2 · (10 + pieces) · 2⁻²⁴ · (|a|·|b| summed over K, with the magnitudes of every offset term and of the bias)

of each other, and one unit in the last place more for bfloat16; a kernel that rounds in the same order is bit-equal.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference, selftest_conv, selftest_householder, selftest_int8_step, selftest_psgd
from .candidates import MORE_LONG_ROWS, MORE_TILES, candidates
from .qtensor import Operand
from .recipe import GRANULARITIES, ROUNDINGS, ZEROS, Quantizer, Recipe

ODD, EVEN = (131, 70), (144, 80)  # quantized matrices: above a tile in each direction; aligned, the launch differs
_UNIT = 2.0**-24  # rounding to float32 is off by at most this fraction


class Check(NamedTuple):
    """One case: what is run, and a function that returns {output: (got, want, bound)}; bound 0 asks for equal bits."""

    kernel: str
    case: str
    run: Callable[[], dict[str, tuple[Tensor, Tensor, Tensor | float]]]


# ---- the kernels against the reference


def kernel_checks(device: torch.device, interpreter: bool = False) -> Iterator[Check]:
    """Every kernel of fqt_kernels on small shapes, in every configuration that dispatch can choose on this device.

    Hopper's product comes last: after an illegal access no other check can run in the process.
    """
    yield from _stats_checks(device)
    yield from _params_checks(device)
    yield from _quantize_checks(device)
    yield from _gradient_checks(device)
    yield from _scaled_mm_checks(device, interpreter)
    if interpreter or "int" in formats_with_kernels(device):
        for module in (selftest_householder, selftest_conv):
            yield from (Check(*check) for check in module.checks(device))
    for module in (selftest_psgd, selftest_int8_step):
        yield from (Check(*check) for check in module.checks(device))
    if device.type == "cuda":
        yield from _hopper_checks(device)


def formats_with_kernels(device: torch.device) -> list[str]:
    """The formats of codes that Triton multiplies on the device, as recipes call them."""
    choices = {
        f: dispatch.select(dispatch.problem("scaled_mm", device, 128, 128, 128, format=f)) for f in ("int", "e4m3")
    }
    return [format for format, choice in choices.items() if choice.backend == "triton"]


def _matrix(shape: tuple[int, int] = ODD, poisoned: bool = False) -> Tensor:
    """Rows of very different sizes, one of zeros, one constant, one of ties; with a NaN and an infinity if poisoned."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[0])[:, None]
    x[3], x[4] = 0.0, 0.5
    x[5] = torch.arange(shape[1]) - 20.5
    if poisoned:
        x[7, 11], x[8, 12] = float("nan"), float("inf")
    return x


def _stats_checks(device: torch.device) -> Iterator[Check]:
    from fqt_kernels import statistics as kernel

    def case(granularity: str, symmetric: bool) -> dict[str, tuple[Tensor, Tensor, float]]:
        x = _matrix()
        bits = kernel.row_stats(x.to(device), granularity, symmetric).amax(1).cpu()
        got = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        dims = {"per_tensor": (0, 1), "per_row": (1,), "per_column": (0,)}[granularity]
        want = [x.abs().amax(dims)] if symmetric else [x.amax(dims), (-x).amax(dims)]
        return {"range": (got, torch.stack(want).view_as(got), 0.0)}

    for granularity in GRANULARITIES:
        for symmetric in (True, False):
            name = f"{granularity}, {'absolute maximum' if symmetric else 'minimum and maximum'}"
            yield Check("_row_stats_kernel", name, lambda g=granularity, s=symmetric: case(g, s))


def _params_checks(device: torch.device) -> Iterator[Check]:
    from fqt_kernels import statistics as kernel

    def case(zero: str, parts: int) -> dict[str, tuple[Tensor, Tensor, float]]:
        x = _matrix((131, parts), poisoned=parts > 12)
        partial = torch.stack([kernel.row_stats(column, "per_row", zero in ("symmetric", "e4m3"))[:, 0]
                               for column in x.to(device).split(1, 1)], 1)  # fmt: skip
        out = kernel.empty_params((len(x), 1), zero, device)
        kernel.params(partial, out, 8, zero)
        symmetric = kernel.is_symmetric(zero)
        hi = x.abs().amax(1) if symmetric else x.amax(1)
        lo = -hi if symmetric else x.amin(1)
        form = ("symmetric", "e4m3") if zero == "e4m3" else (zero, "int")
        scale, inv, z, i, offset = reference.quantization_params(lo, hi, 8, *form)
        want = {"scale": (out.scale.flatten(), scale), "inv": (out.inv, inv)}
        if not symmetric:
            want |= {"offset": (out.offset.flatten(), offset), "zp": (out.zp, z if zero == "min" else i)}
        return {name: (*pair, 0.0) for name, pair in want.items()}

    for zero, parts in itertools.product((*ZEROS, "e4m3"), (1, 17)):
        yield Check("_params_kernel", f"{zero}, {parts} parts", lambda z=zero, p=parts: case(z, p))


def _quantize_checks(device: torch.device) -> Iterator[Check]:
    kernels = [(granularity, "tile") for granularity in GRANULARITIES] + [("per_row", "rows"), ("per_row", "long_rows")]
    cases = itertools.product(kernels, (*ZEROS, "e4m3"), ROUNDINGS, ("rows", "transposed"))
    for index, ((granularity, kernel), zero, rounding, layout) in enumerate(cases):
        if zero == "e4m3":
            quantizer = Quantizer(8, granularity, "symmetric", rounding, format="e4m3")
        else:
            quantizer = Quantizer(8 if rounding == "nearest" else 4, granularity, zero, rounding)
        shape, dense = EVEN if index % 5 < 2 else ODD, index % 7 < 4  # 5 and 7 divide no loop's period
        ptx = index % 3 > 0  # inline assembly, which only NVIDIA has, and Triton's own operations
        name = (
            f"{granularity}, {zero}, {rounding}, {quantizer.bits} bits, {layout}, {shape}{'' if dense else ' strided'}"
            f"{'' if ptx else ', without assembly'}"
        )
        case = (device, quantizer, kernel, layout, shape, dense, ptx)
        yield Check(f"_{kernel}_kernel", name, lambda case=case: _quantize_case(*case))
    for kernel, tile in [("tile", t) for t in MORE_TILES] + [("long_rows", t) for t in MORE_LONG_ROWS]:
        case = (device, Quantizer(8, "per_row", "symmetric"), kernel, "transposed", EVEN, True, True, tile)
        name = f"per_row, symmetric, nearest, 8 bits, transposed, {EVEN}, tile {tile}"
        yield Check(f"_{kernel}_kernel", name, lambda case=case: _quantize_case(*case))


def _quantize_case(
    device: torch.device,
    quantizer: Quantizer,
    which: str,
    layout: str,
    shape: tuple[int, int],
    dense: bool,
    ptx: bool,
    tile: tuple[int, int, int] | None = None,
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """One launch against the reference; the stochastic ones fold a scale into the matrix."""
    from fqt_kernels import quantize as kernel

    granularity, stochastic = quantizer.granularity, quantizer.rounding == "stochastic"
    x = _matrix(shape, poisoned=granularity != "per_tensor")
    m, n = x.shape
    multiplier = rng = None
    if stochastic:
        rng = torch.tensor([-0x123456789ABCDEF, 41])
        size = (m, 1) if granularity == "per_column" else (1, n)
        multiplier = torch.linspace(0.5, 2.0, max(size)).view(size)
    rows, sums = layout == "rows", quantizer.format == "int"
    want = reference.quantize(
        x, quantizer, multiplier=multiplier, rng=rng, stream=5, rank=3, rows=rows, cols=not rows, sums=sums
    )
    on_device = x.to(device) if dense else x.t().contiguous().to(device).t()
    got = kernel.quantize(
        on_device, bits=quantizer.bits, granularity=granularity,
        zero="e4m3" if quantizer.format == "e4m3" else quantizer.zero, kernel=which, ptx=ptx, tile=tile,
        multiplier=None if multiplier is None else multiplier.to(device), rng=None if rng is None else rng.to(device),
        stream=5 + 256 * 3, rows=rows, cols=not rows, sums=sums,
    )  # fmt: skip
    names = ("q", "qt", "scale", "offset", "row_sum", "col_sum")
    expected = (want.q, want.qt, want.scale, want.offset, want.row_sum, want.col_sum)
    for name, g, w in zip(names, got, expected, strict=True):
        if (g is None) != (w is None):
            raise ValueError(f"{name} is {'missing' if g is None else 'returned unasked'}")
    return {name: (_bytes(g), _bytes(w), 0.0) for name, g, w in zip(names, got, expected, strict=True) if g is not None}


def _bytes(t: Tensor) -> Tensor:
    """float8 codes as the bytes they are, which compare more strictly."""
    return t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t


def _gradient_checks(device: torch.device) -> Iterator[Check]:
    for name in ("int8", "psq8", "ptq4", "fp8"):
        for shape in (ODD, EVEN):
            case = device, name, shape
            yield Check(
                "_gradient_stats_kernel", f"{name}, {shape}", lambda case=case: _gradient_case(*case, ranges=True)
            )
            yield Check(
                "_gradient_tile_kernel", f"{name}, {shape}", lambda case=case: _gradient_case(*case, ranges=False)
            )
    for tile in MORE_TILES:
        case = device, "int8", EVEN, False, tile
        yield Check("_gradient_tile_kernel", f"int8, {EVEN}, tile {tile}", lambda case=case: _gradient_case(*case))


def _gradient_case(
    device: torch.device, name: str, shape: tuple[int, int], ranges: bool, tile: tuple[int, int, int] | None = None
) -> dict[str, tuple[Tensor, Tensor, float | Tensor]]:
    """Both quantizations of a gradient against the reference's two: the scales and the column sums, or the codes."""
    from fqt_kernels.gradient import Side, quantize_gradient

    recipe = Recipe.parse(name)
    dy = _matrix(shape)
    m, n = shape
    folded = recipe.x.granularity == "per_row"
    row_mul = torch.linspace(0.5, 2.0, m) if folded else None
    col_mul = torch.linspace(2.0, 0.25, n) if folded else None
    rng = torch.tensor([0x123456789ABCDEF, 7])
    sides = [
        Side(z.bits, z.granularity, "e4m3" if z.format == "e4m3" else z.zero) for z in (recipe.dgrad, recipe.wgrad)
    ]
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    g, h, total = quantize_gradient(
        dy.to(device), *sides, row_mul=move(row_mul), col_mul=move(col_mul), rng=rng.to(device), streams=(0, 1),
        sums=recipe.affine, bias=True, tile=tile,
    )  # fmt: skip
    want_g = reference.quantize(
        dy, recipe.dgrad, multiplier=None if col_mul is None else col_mul[None], rng=rng, stream=0, sums=recipe.affine
    )
    want_h = reference.quantize(
        dy, recipe.wgrad, multiplier=None if row_mul is None else row_mul[:, None], rng=rng, stream=1, rows=False,
        cols=True, sums=recipe.affine,
    )  # fmt: skip
    if ranges:
        # m additions in float32 on either side, each off by at most 2⁻²⁴ of a sum of magnitudes.
        return {
            "dgrad scale": (g.scale, want_g.scale, 0.0), "wgrad scale": (h.scale, want_h.scale, 0.0),
            "column sums": (total, dy.sum(0), 2 * m * _UNIT * dy.abs().sum(0)),
        }  # fmt: skip
    checks = {"dgrad codes": (g.codes, want_g.q), "wgrad codes": (h.codes, want_h.qt)}
    if recipe.affine:
        checks |= {"dgrad sums": (g.sums, want_g.row_sum), "wgrad sums": (h.sums, want_h.col_sum)}
        checks |= {"dgrad offset": (g.offset, want_g.offset), "wgrad offset": (h.offset, want_h.offset)}
    return {what: (_bytes(got), _bytes(want), 0.0) for what, (got, want) in checks.items()}


def _scaled_mm_checks(device: torch.device, interpreter: bool) -> Iterator[Check]:
    def configs(k: int, **more) -> list[tuple[int, ...]]:
        with dispatch.backend("triton" if interpreter else "auto"):
            posed = [dispatch.problem("scaled_mm", device, 2**i, 2**i, k, **more) for i in range(6, 16)]
        found = [candidate for problem in posed for candidate in candidates(problem)]
        return list(dict.fromkeys(candidate.config for candidate in found if candidate.kernel == "portable"))

    # K in whole blocks, in 16 but not in blocks, in neither (padded), beyond what int32 can sum.
    even, ragged, odd, long = (64, 48, 128), (64, 48, 80), (67, 45, 37), (5, 3, reference.MAX_INT32_TERMS + 20)
    kinds = {"symmetric": even, "affine": ragged, "affine, no scale of B": odd, "affine, bias, odd shape": odd}
    cases, formats = [], ("int", "e4m3") if interpreter else formats_with_kernels(device)
    if "int" in formats:
        cases += [(kind, shape, configs(64)[0]) for kind, shape in kinds.items()]
        cases += [("affine, bias, odd shape", odd, config) for config in configs(64)[1:]]
        if torch.version.hip is None:
            cases += [("affine, split_k 3", (67, 45, 1000), config) for config in configs(64)]
        if not interpreter:  # it truncates float32 to bfloat16 instead of rounding
            cases.append(("affine, bias, bfloat16", odd, configs(64)[0]))
        cases += [("extreme codes, sum beyond int32", long, config) for config in configs(long[2])]
    if "e4m3" in formats:
        cases += [("e4m3", (67, 45, 1000), config) for config in configs(64, format="e4m3")]
    for kind, shape, config in cases:
        name = f"{kind}, {_by(shape)}, {config}"
        yield Check("_scaled_mm_kernel", name, lambda a=(device, kind, shape, config): _scaled_mm_case(*a))
    if "int" in formats:
        # On a GPU the library wants at least 17 rows and multiples of 8 columns; K is padded.
        kinds = {
            "symmetric": even,
            "affine": (67, 40, 37),
            "affine, no scale of B": even,
            "affine, bias": (131, 264, 16),
        }
        for kind, shape in kinds.items():
            case = device, kind, shape, None, "gemm_cublas"
            yield Check("_epilogue_kernel", f"{kind}, {_by(shape)}", lambda case=case: _scaled_mm_case(*case))


def _hopper_checks(device: torch.device) -> Iterator[Check]:
    from fqt_kernels import gemm_hopper

    if gemm_hopper.reason_against(dispatch.device_info(str(device))[0], 128, 128, 128) is not None:
        return
    # K in 16 but not in blocks, in neither (padded); more tiles than processors: each program goes on to another.
    ragged, odd, many = (64, 48, 80), (67, 45, 37), (3000, 2000, 1000)
    kinds = {"affine, bias, bfloat16": ragged, "affine, bias, odd shape": odd, "symmetric, bfloat16": many}
    for config, (kind, shape) in itertools.product(gemm_hopper.CONFIGS, kinds.items()):
        case = device, kind, shape, config, "gemm_hopper"
        name = f"{kind}, {_by(shape)}, {config}"
        yield Check("_hopper_scaled_mm_kernel", name, lambda case=case: _scaled_mm_case(*case))


def _scaled_mm_case(
    device: torch.device, kind: str, shape: tuple[int, int, int], config: tuple[int, ...] | None, module: str = "gemm"
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    kernel = importlib.import_module(f"fqt_kernels.{module}")
    a, b, bias = _operands(*shape, kind)
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    want = reference.scaled_mm(a, b, bias, dtype)

    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    got = kernel.scaled_mm(
        move(a.q), move(b.q), move(a.scale), move(b.scale), a_offset=move(a.offset), b_offset=move(b.offset),
        a_sum=move(a.sum), b_sum=move(b.sum), bias=move(bias), out_dtype=dtype, **({"config": config} if config else {}),
        **({"split_k": 3} if "split_k" in kind else {}),
        **({"processors": dispatch.device_info(str(device))[1]} if module == "gemm_hopper" else {}),
    )  # fmt: skip
    bound = scaled_mm_bound(a, b, bias)
    if dtype == torch.bfloat16:
        bound = bound + 2.0**-7 * want.double().abs()
    return {"product": (got, want, bound)}


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _operands(m: int, n: int, k: int, kind: str) -> tuple[Operand, Operand, Tensor | None]:
    """Codes, scales, offsets and sums of a product of that shape, all from one fixed seed."""
    generator = torch.Generator().manual_seed(1)
    if "extreme" in kind:
        qa, qb = torch.full((m, k), -128, dtype=torch.int8), torch.full((n, k), -128, dtype=torch.int8)
    else:
        qa, qb = (torch.randint(-128, 128, (r, k), generator=generator).to(torch.int8) for r in (m, n))
    if kind == "e4m3":
        qa, qb = ((q / 16.0).to(torch.float8_e4m3fn) for q in (qa, qb))
    sa, sb = (torch.rand(r, generator=generator) + 0.1 for r in (m, n))
    if "affine" not in kind:
        return Operand(qa, sa, None, None), Operand(qb, sb, None, None), None
    oa, ob = torch.randn(m, generator=generator), torch.randn(1, generator=generator)
    sums = [q.sum(1, dtype=torch.int32) for q in (qa, qb)]
    bias = torch.randn(n, generator=generator) if "bias" in kind else None
    return Operand(qa, sa, oa, sums[0]), Operand(qb, None if "no scale" in kind else sb, ob, sums[1]), bias


def scaled_mm_bound(a: Operand, b: Operand, bias: Tensor | None) -> Tensor:
    """(M, N) float64: how far two float32 evaluations of `scaled_mm` can be apart, sums of integers being exact.

    Sums of float8 products are rounded at each of K additions, and Hopper's tensor cores hold the 32 products of an
    instruction in 14 bits or so: 2⁻¹¹ of their magnitudes for the four instructions before a sum goes on in float32.
    """
    k = a.q.shape[1]
    magnitude = a.q.double().abs() @ b.q.double().abs().t() * a.scale.double()[:, None]
    sb = 1.0 if b.scale is None else b.scale.double()
    magnitude = magnitude * sb
    if a.offset is not None:
        u = b.sum.double().abs() * sb + (0.0 if b.offset is None else b.offset.double().abs() * k)
        magnitude = magnitude + a.offset.double().abs()[:, None] * u
    if b.offset is not None:
        magnitude = magnitude + (b.offset.double().abs() * a.scale.double() * a.sum.double().abs())[:, None]
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    pieces = -(-k // (reference.MAX_INT32_TERMS // 2))
    if a.q.dtype != torch.int8:
        return (2 * (10 + k) * _UNIT + 2.0**-11) * magnitude
    return 2 * (10 + pieces) * _UNIT * magnitude


# ---- the reference against first principles


def reference_checks() -> Iterator[Check]:
    """The CPU backend against definitions that share no code with it."""
    yield Check("reference.philox", "published answer of Philox4x32-10 for zeros", _philox_case)
    yield Check("reference.int_mm", "extreme codes against int64, 33x2500 by 2500x17", _int_mm_case)
    for granularity in GRANULARITIES:
        for zero in ZEROS:
            for rounding in ROUNDINGS:
                quantizer = Quantizer(5, granularity, zero, rounding)
                name = f"{granularity}, {zero}, {rounding}: within {'half a' if rounding == 'nearest' else 'one'} step"
                yield Check("reference.quantize", name, lambda q=quantizer: _step_case(q))
    yield Check("reference.scaled_mm", "affine against float64, 67x45x37", _product_case)


def _philox_case() -> dict[str, tuple[Tensor, Tensor, float]]:
    words = reference.philox(*[torch.zeros((), dtype=torch.int64)] * 6, rounds=10)
    return {"words": (torch.stack(words), torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]), 0.0)}


def _int_mm_case() -> dict[str, tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-128, 128, (r, 2500), generator=generator).to(torch.int8) for r in (33, 17))
    a[0], b[0] = -128, -128
    return {"product": (reference.int_mm(a, b), (a.long() @ b.long().t()).int(), 0.0)}


def _step_case(quantizer: Quantizer) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Dequantizing gives x back to within half a step (nearest) or one (stochastic), and float32's own rounding."""
    x = _matrix()
    t = reference.quantize(x, quantizer, rng=torch.tensor([7, 8]))
    step = 0.5 if quantizer.rounding == "nearest" else 1.0 + 2.0**-16
    rounding = 8 * _UNIT * (x.abs() + (0.0 if t.offset is None else t.offset.abs()))
    return {"x": (t.dequantize(), x, t.scale * (step + 8 * _UNIT * 2**quantizer.bits) + rounding)}


def _product_case() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    operands = _operands(67, 45, 37, "affine, bias")
    return {"product": (reference.scaled_mm(*operands).double(), _product(*operands), scaled_mm_bound(*operands))}


# ---- a whole layer, through its operators and whatever dispatch chooses for them


def layer_checks(device: torch.device, interpreter: bool = False) -> Iterator[Check]:
    """The three products of a linear layer against their definitions in float64, from the reference's codes; those of a
    convolution against the reference backend's."""
    formats = formats_with_kernels(device)
    for name in ("int8", "ptq4", "psq4", "fp8"):
        if not interpreter and Recipe.parse(name).format not in formats:
            continue
        yield Check("fqt.nn.Linear", name, lambda n=name: _layer_case(n, device, "triton" if interpreter else "auto"))
    if interpreter or "int" in formats:
        yield from (Check(*check) for check in selftest_conv.layer_checks(device, "triton" if interpreter else "auto"))


def _layer_case(name: str, device: torch.device, backend: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    from . import gradients, nn, rng

    recipe = Recipe.parse(name)
    generator = torch.Generator().manual_seed(3)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((67, 37), (45, 37), (67, 45)))
    bias = torch.randn(45, generator=generator)
    layer = nn.Linear(37, 45, device=device, recipe=recipe)
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(bias)
    state = rng.get_rng_state(layer)["layers"][""]
    on_device = x.to(device).requires_grad_()
    with dispatch.backend(backend):
        y = layer(on_device)
        y.backward(dy.to(device))

    sums = recipe.affine
    xq, wq = (reference.quantize(t, q, cols=True, sums=sums) for t, q in ((x, recipe.x), (w, recipe.w)))
    fold_w, fold_x = (q.granularity == "per_row" for q in (recipe.w, recipe.x))
    g = reference.quantize(
        dy, recipe.dgrad, multiplier=wq.scale.t() if fold_w else None, rng=state, stream=gradients.DGRAD, sums=sums
    )
    h = reference.quantize(
        dy,
        recipe.wgrad,
        multiplier=xq.scale if fold_x else None,
        rng=state,
        stream=gradients.WGRAD,
        cols=True,
        sums=sums,
    )
    products = {
        "fprop": (y, xq.rows(), wq.rows(), bias),
        "dgrad": (on_device.grad, g.rows(), wq.cols()._replace(**({"scale": None} if fold_w else {})), None),
        "wgrad": (layer.weight.grad, h.cols(), xq.cols()._replace(**({"scale": None} if fold_x else {})), None),
    }
    return {
        key: (got.double(), _product(a, b, c), scaled_mm_bound(a, b, c)) for key, (got, a, b, c) in products.items()
    }


def _product(a: Operand, b: Operand, bias: Tensor | None) -> Tensor:
    """A Bᵀ + bias in float64, from the dequantized operands."""
    left, right = (o.q.double() if o.scale is None else o.q.double() * o.scale.double().view(-1, 1) for o in (a, b))
    left = left if a.offset is None else left + a.offset.double().view(-1, 1)
    right = right if b.offset is None else right + b.offset.double()
    return left @ right.t() if bias is None else left @ right.t() + bias.double()
