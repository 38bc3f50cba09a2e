"""Cases of whole operators, as a layer calls them, on whichever backend dispatch chooses: any device, no kernel named."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import fqt
import fqt.nn
from fqt import gradients, products, reference
from fqt.gradients import DGRAD, WGRAD
from fqt.qtensor import QTensor
from fqt.recipe import Quantizer, Recipe

from .cases import BF16_BOUND, COLUMN_STOCHASTIC, GRID, ROW, ROW_STOCHASTIC, gaussian, quantize_exactly
from .harness import Candidate, Case, Wrong, check_equal, check_near
from .layers import dtype_name
from .providers import peer

RNG = (0x0123456789ABCDEF, 7)  # key and step of the stochastic rounding
# (quantizer, how a layer asks for it), a row a candidate: every granularity, zero, rounding and format.
QUANTIZATIONS = [
    (GRID, {"cols": True, "sums": True}),
    (replace(GRID, rounding="stochastic"), {"rows": False, "cols": True, "sums": True}),
    (ROW, {"cols": True}),
    (ROW_STOCHASTIC, {}),
    (Quantizer(8, "per_row", "min", "stochastic"), {"sums": True}),
    (COLUMN_STOCHASTIC, {"rows": False, "cols": True}),
    (replace(ROW, format="e4m3"), {"cols": True}),
    (replace(ROW_STOCHASTIC, format="e4m3"), {}),
]
GRADIENTS = ("int8", "psq8", "fp8")
OPERANDS = {"int8 per_row": ROW, "int8 per_tensor grid": GRID, "e4m3 per_row": replace(ROW, format="e4m3")}


def work_dtype(device: torch.device) -> torch.dtype:
    """What a network would be trained in: bf16 on a GPU, float32 on a CPU, whose bf16 products are slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Within, cuDNN times its algorithms for each convolution that it meets for the first time, and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# ---- quantization


def quantize(m: int, n: int, device: torch.device, sets: int = 2) -> Case:
    """Quantization of a matrix and of a gradient, in GB/s of the bytes that have to be moved, against a copy of it."""
    dtype = work_dtype(device)
    x = [gaussian(m, n, device=device, seed=i, dtype=dtype) for i in range(sets)]
    rng = torch.tensor(RNG, device=device)
    read = float(m * n * dtype.itemsize)
    copied = Candidate("clone", lambda i: x[i].clone(), lambda out, i: check_equal(out, x[i]), bytes=2 * read,
                       **peer("torch", device), tag="copy")  # fmt: skip
    candidates = [copied, *(_quantization(x, z, layout, rng, read) for z, layout in QUANTIZATIONS)]
    candidates += [_gradient(name, x, rng, read) for name in GRADIENTS]
    return Case("quantize", f"{m}x{n}", "GB/s", copied.name, tuple(candidates), sets)


def _quantization(x: list[Tensor], z: Quantizer, layout: dict[str, bool], rng: Tensor, read: float) -> Candidate:
    written = [
        name for name, asked in (("rows", layout.get("rows", True)), ("transposed", layout.get("cols"))) if asked
    ]
    kind = "e4m3" if z.format == "e4m3" else z.zero
    return Candidate(
        f"{z.granularity} {kind} {z.rounding}, {' + '.join(written)}",
        lambda i: products.quantized(x[i], z, rng=rng, **layout),
        lambda out, i: check_quantized(out, x[i], z, rng=rng, **layout),
        bytes=read + len(written) * x[0].numel(), tag=f"{z.granularity} {z.rounding}",
    )  # fmt: skip


def check_quantized(out: QTensor, x: Tensor, z: Quantizer, *, multiplier: Tensor | None = None, **how) -> str:
    """Integer codes to the last bit; e4m3 codes by their scale, and by a step of the format from the value."""
    if z.format == "int":
        for got, want, what in zip(
            out, quantize_exactly(x, z, multiplier=multiplier, **how), QTensor._fields, strict=True
        ):
            if (got is None) != (want is None):
                raise Wrong(f"{what}: {'missing' if got is None else 'not asked for'}")
            if got is not None:
                check_equal(got, want, what)
        return "bit-equal"
    y = x.float() if multiplier is None else x.float() * multiplier
    dim = {"per_row": 1, "per_column": 0}[z.granularity]
    largest = y.abs().amax(dim, keepdim=True)
    check_equal(out.scale, largest / torch.full_like(largest, reference.E4M3_MAX), "scale")
    for codes in (out.q, None if out.qt is None else out.qt.view(torch.int8).t().contiguous().view(out.qt.dtype)):
        if codes is None:
            continue
        # Numbers of the format lie 1/8 of their size apart at most, the small ones 2⁻⁹; nearest rounds by half of that.
        step = torch.maximum(y.abs() / 8, out.scale * 2.0**-9) * (0.5 if z.rounding == "nearest" else 1.0)
        if not bool(((codes.float() * out.scale - y).abs() <= step * (1 + 2.0**-20)).all()):
            raise Wrong("e4m3 codes: not a neighbour of the value")
    return "within a step of the format"


def _gradient(name: str, dy: list[Tensor], rng: Tensor, read: float) -> Candidate:
    """Both quantizations of dY (M, N), for dgrad and for wgrad, as the backward pass of a layer makes them."""
    r, device = Recipe.parse(name), dy[0].device
    m, n = dy[0].shape
    x_scale, w_scale = (gaussian(size, 1, device=device, seed=90 + size, dtype=torch.float32) for size in (m, n))
    x, w = QTensor(None, None, x_scale, None), QTensor(None, None, w_scale, None)
    folded = {
        side: None if z.granularity != "per_row" else t
        for side, z, t in (("dgrad", r.w, w_scale.t()), ("wgrad", r.x, x_scale))
    }
    sides = {
        "dgrad": {"stream": DGRAD, "sums": r.affine, "multiplier": folded["dgrad"]},
        "wgrad": {"stream": WGRAD, "sums": r.affine, "multiplier": folded["wgrad"], "rows": False, "cols": True},
    }

    def run(i: int) -> tuple[QTensor, QTensor]:
        fused = gradients.quantized_gradient(dy[i], w, x, r, False, rng=rng, rank=0)
        if fused is not None:
            return fused[:2]
        return tuple(products.quantized(dy[i], getattr(r, side), rng=rng, **how) for side, how in sides.items())

    def check(out: tuple[QTensor, QTensor], i: int) -> str:
        remarks = {check_quantized(got, dy[i], getattr(r, side), rng=rng, **how)
                   for got, (side, how) in zip(out, sides.items(), strict=True)}  # fmt: skip
        return ", ".join(sorted(remarks))

    return Candidate(f"gradient of {name}, both quantizations", run, check, bytes=read + 2 * dy[0].numel(),
                     tag=f"gradient {name}")  # fmt: skip


# ---- the product


def product(m: int, n: int, k: int, device: torch.device, sets: int = 2) -> Case:
    """C = A Bᵀ of quantized operands by the operator, against a product in the device's working precision."""
    dtype = work_dtype(device)
    x, w = ([gaussian(rows, k, device=device, seed=2 * i + side, dtype=dtype) for i in range(sets)]
            for side, rows in enumerate((m, n)))  # fmt: skip
    ops = 2.0 * m * n * k
    bound = BF16_BOUND if dtype == torch.bfloat16 else k * 2.0**-24  # sums of K terms of float32
    matmul = Candidate(f"torch.matmul {dtype_name(dtype)}", lambda i: torch.matmul(x[i], w[i].t()),
                       lambda out, i: check_near(out, x[i].double() @ w[i].double().t(), bound), ops,
                       **peer("torch", device), tag="bf16")  # fmt: skip
    codes = [tuple(quantize_exactly(t[i], ROW).q for t in (x, w)) for i in range(sets)]
    int_mm = Candidate("torch._int_mm (int32 out)", lambda i: torch._int_mm(codes[i][0], codes[i][1].t()),
                       lambda out, i: check_equal(out, reference.int_mm(*codes[i])), ops,
                       **peer("torch._int_mm", device), tag="_int_mm")  # fmt: skip
    candidates = [matmul, int_mm, _scaled_mm(x, w, ops)]
    for name, z in OPERANDS.items():
        a, b = ([products.quantized(t, z, sums=z.zero != "symmetric") for t in side] for side in (x, w))
        candidates.append(
            Candidate(f"fqt product, {name}", functools.partial(_product, a, b, dtype),
                      lambda out, i, a=a, b=b: check_near(
                          out, a[i].dequantize().double() @ b[i].dequantize().double().t(), bound),
                      ops, tag=name)
        )  # fmt: skip
    return Case("gemm", f"{m}x{n}x{k}", "TOPS", matmul.name, tuple(candidates), sets)


def _scaled_mm(x: list[Tensor], w: list[Tensor], ops: float) -> Candidate:
    """torch's own product of e4m3 codes with scales per row."""
    a, b = ([reference.quantize(t, OPERANDS["e4m3 per_row"]) for t in side] for side in (x, w))
    return Candidate(
        "torch._scaled_mm fp8 row-wise",
        lambda i: torch._scaled_mm(a[i].q, b[i].q.t(), scale_a=a[i].scale, scale_b=b[i].scale.t(),
                                   out_dtype=torch.bfloat16),
        lambda out, i: check_near(out, a[i].dequantize().double() @ b[i].dequantize().double().t(), BF16_BOUND),
        ops, **peer("torch._scaled_mm", x[0].device), tag="_scaled_mm fp8",
    )  # fmt: skip


def _product(a: list[QTensor], b: list[QTensor], dtype: torch.dtype, i: int) -> Tensor:
    return products.product(a[i].rows(), b[i].rows(), out_dtype=dtype)


# ---- conversion


def conversion(width: int, device: torch.device) -> Case:
    """`fqt.quantize_` of a copy of a small model, against the copy alone."""
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU()))).to(device)
    x = gaussian(8, width, device=device, seed=0, dtype=torch.float32)

    def same(got: nn.Module, i: int) -> str:
        if not all(torch.equal(a, b) for a, b in zip(got.parameters(), model.parameters(), strict=True)):
            raise Wrong("the parameters changed")
        return "same parameters"

    def convert(i: int) -> nn.Module:
        copied = copy.deepcopy(model)
        fqt.quantize_(copied, "int8")
        return copied

    def check(got: nn.Module, i: int) -> str:
        converted = [type(m) is fqt.nn.Linear for m in got.modules() if isinstance(m, nn.Linear)]
        if converted != [True] * 4:
            raise Wrong(f"{sum(converted)} of 4 layers were converted")
        # Four layers, each about 1 % of its output's norm off: 8-bit codes of its input and of its weight.
        return f"{same(got, i)}, {check_near(got(x), model(x), 0.1)}"

    return Case("convert", f"4x{width}x{width}", "ms", "copy.deepcopy",
                (Candidate("copy.deepcopy", lambda i: copy.deepcopy(model), same, **peer("torch", device)),
                 Candidate("copy.deepcopy, fqt.quantize_", convert, check, tag="convert")), 1)  # fmt: skip
