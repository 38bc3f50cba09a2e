"""The cases: matrix products, quantization, a linear layer. Each builds on any device; on the CPU they serve the tests.

Inputs are Gaussian, int8 codes are those of quantized Gaussians, never zeros. The oracle is `fqt.reference` on the same
inputs and the same device, except for the parameters of a quantizer, which are computed on the CPU: on a GPU torch
divides by a Python number by multiplying with its reciprocal, and the scale would be off by one unit in the last place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fqt
import fqt.nn
from fqt import dispatch, reference
from fqt.ops import DGRAD, WGRAD
from fqt.qtensor import Operand, QTensor
from fqt.recipe import Quantizer, Recipe

from . import predict
from .harness import Candidate, Case, check_equal, check_near, check_rounded

ROW = Quantizer(8, "per_row", "symmetric")
ROW_STOCHASTIC = Quantizer(8, "per_row", "symmetric", "stochastic")
BF16_BOUND = 2.0**-7  # twice the unit roundoff of bfloat16, in which the outputs are rounded
FP8_BOUND = 1e-2  # fast accumulation keeps fewer bits than float32
RECIPES = ("int8", "psq8")
DISPATCHED = " (dispatch)"  # marks the configuration that dispatch selects


def gaussian(*shape: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)


def quantize_exactly(
    x: Tensor,
    quantizer: Quantizer,
    *,
    multiplier: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
) -> QTensor:
    """`fqt.reference.quantize` to the last bit on every device: its own steps, with the parameters from the CPU."""
    y = x.float() if multiplier is None else x.float() * multiplier
    dims = {"per_tensor": (0, 1), "per_row": (1,), "per_column": (0,)}[quantizer.granularity]
    symmetric = quantizer.zero == "symmetric"
    hi = y.abs().amax(dims, keepdim=True) if symmetric else y.amax(dims, keepdim=True)
    lo = -hi if symmetric else y.amin(dims, keepdim=True)
    parameters = reference.quantization_params(lo.cpu(), hi.cpu(), quantizer.bits, quantizer.zero)
    scale, inv, z, i, offset = (p.to(x.device) for p in parameters)
    stochastic = quantizer.rounding == "stochastic"
    bits = reference.random_bits(rng, *x.shape, stream=stream) if stochastic else None
    q = reference.round_codes((y - z) * inv + i, quantizer.rounding, bits)
    half = 2 ** (quantizer.bits - 1)
    q = (q.clamp(1 - half, half - 1) if symmetric else q.clamp(0, 2 * half - 1) - half).to(torch.int8)
    return QTensor(
        q if rows else None,
        q.t().contiguous() if cols else None,
        scale,
        None if symmetric else offset,
        q.sum(1, dtype=torch.int32) if sums and rows else None,
        q.sum(0, dtype=torch.int32) if sums and cols else None,
    )


# ---- matrix products


def config_table(device: torch.device) -> list[tuple[int, ...]]:
    """The kernel's configurations for the device's kind of GPU; the CPU's interpreter runs those of sm_90."""
    from fqt_kernels.gemm import CONFIGS

    arch = dispatch.device_info(str(device))[0] if device.type == "cuda" else "sm90"
    return CONFIGS[dispatch._FAMILY.get(arch) or ("amd" if arch.startswith("gfx") else "sm80")]


def gemm(m: int, n: int, k: int, device: torch.device, sets: int = 2) -> Case:
    """C = A Bᵀ: the kernel with every configuration of its table, against torch.matmul in bf16, torch._int_mm, and
    torch._scaled_mm in fp8 with scales per row where the GPU has fp8."""
    x = [gaussian(m, k, device=device, seed=2 * i) for i in range(sets)]
    w = [gaussian(n, k, device=device, seed=2 * i + 1) for i in range(sets)]
    a = [quantize_exactly(t, ROW).rows() for t in x]
    b = [quantize_exactly(t, ROW).rows() for t in w]
    ops, out_bytes = 2.0 * m * n * k, 2.0 * m * n
    int8_bytes = 1.0 * m * k + 1.0 * n * k + out_bytes
    expected = functools.cache(lambda i: reference.scaled_mm(a[i], b[i]))
    matmul = Candidate(
        "torch.matmul bf16",
        lambda i: torch.matmul(x[i], w[i].t()),
        lambda out, i: check_near(out, reference.mm(x[i].float(), w[i].float().t()), BF16_BOUND),
        ops, 2.0 * m * k + 2.0 * n * k + out_bytes, ours=False, prediction=predict.matmul_bf16(device),
    )  # fmt: skip
    int_mm = Candidate(
        "torch._int_mm (int32 out)",
        lambda i: torch._int_mm(a[i].q, b[i].q.t()),
        lambda out, i: check_equal(out, reference.int_mm(a[i].q, b[i].q)),
        ops, int8_bytes + out_bytes, ours=False,
    )  # fmt: skip
    candidates = [matmul, int_mm]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        candidates.append(_fp8(x, w, ops, int8_bytes))
    selected = dispatch.select(dispatch.problem("scaled_mm", device, m, n, k, torch.float32)).config
    candidates += [_scaled_mm(config, config == selected, a, b, expected, ops, int8_bytes, device)
                   for config in config_table(device)]  # fmt: skip
    return Case("gemm", f"{m}x{n}x{k}", "TOPS", matmul.name, tuple(candidates), sets)


def _scaled_mm(config, selected: bool, a: list[Operand], b: list[Operand], expected, ops, traffic, device) -> Candidate:
    from fqt_kernels.gemm import scaled_mm

    tile, (warps, stages) = "x".join(map(str, config[:3])), config[3:]
    return Candidate(
        f"scaled_mm {tile} w{warps} s{stages}{DISPATCHED if selected else ''}",
        lambda i: scaled_mm(a[i].q, b[i].q, a[i].scale, b[i].scale, out_dtype=torch.bfloat16, config=config),
        lambda out, i: check_rounded(out, expected(i)),
        ops, traffic, prediction=predict.synchronous_dot(device) if selected else "",
    )  # fmt: skip


def _fp8(x: list[Tensor], w: list[Tensor], ops: float, traffic: float) -> Candidate:
    """The fp8 peer: e4m3 codes with float32 scales per row, bf16 output, fast accumulation."""

    def scaled(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.float().abs().amax(1, keepdim=True) / 448.0
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    a, b = [scaled(t) for t in x], [scaled(t) for t in w]

    def run(i: int) -> Tensor:
        (qa, sa), (qb, sb) = a[i], b[i]
        return torch._scaled_mm(qa, qb.t(), scale_a=sa, scale_b=sb.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

    def check(out: Tensor, i: int) -> str:
        (qa, sa), (qb, sb) = a[i], b[i]
        return check_near(out, reference.mm(qa.float(), qb.float().t()) * sa * sb.t(), FP8_BOUND)

    return Candidate("torch._scaled_mm fp8 row-wise", run, check, ops, traffic, ours=False)


# ---- quantization


def quantize(m: int, n: int, device: torch.device, sets: int = 2) -> Case:
    """The quantize kernels on a bf16 matrix, in GB/s of the bytes they have to move, against a copy of the matrix.

    Those are 2 read and 1 for each copy written, of an element; a second read is not counted. The copy: 2 and 2.
    """
    from fqt_kernels.quantize import rows_block

    x = [gaussian(m, n, device=device, seed=i) for i in range(sets)]
    multiplier = gaussian(m, 1, device=device, seed=99).float()
    target = torch.empty_like(x[0])
    copy = Candidate("copy_", lambda i: target.copy_(x[i]), lambda out, i: check_equal(out, x[i]), bytes=4.0 * m * n,
                     ours=False, prediction=predict.copy(device))  # fmt: skip
    candidates = [copy]
    grid, column = Quantizer(8, "per_tensor", "grid"), Quantizer(8, "per_column")
    column_stochastic = Quantizer(8, "per_column", "symmetric", "stochastic")
    for cols, layout in ((False, "rows"), (True, "rows + transposed")):
        for z, name in ((ROW, "nearest"), (ROW_STOCHASTIC, "stochastic")):
            for single, kernel in ((True, "single read"), (False, "stats + tile")):
                if not single or rows_block(m, n, cols) is not None:
                    goal = predict.quantize_target(cols, z.rounding)
                    candidates.append(_quantize(f"per_row {name}, {layout}: {kernel}", x, z, single, goal, cols=cols))
    candidates += [
        _quantize("per_tensor grid nearest, rows", x, grid, None),
        _quantize("per_tensor grid nearest, rows + transposed + sums", x, grid, None, cols=True, sums=True),
        _quantize("per_column nearest, transposed", x, column, None, rows=False, cols=True),
        _quantize("per_column stochastic times (M, 1), transposed", x, column_stochastic, None,
                  rows=False, cols=True, multiplier=multiplier),
    ]  # fmt: skip
    return Case("quantize", f"{m}x{n}", "GB/s", copy.name, tuple(candidates), sets)


def _quantize(
    name: str, x: list[Tensor], z: Quantizer, single_read: bool | None, prediction: str = "", **layout: Any
) -> Candidate:
    """layout: rows, cols, sums and multiplier of `quantize_exactly`."""
    from fqt_kernels.quantize import quantize as launch

    rng = torch.tensor([0x0123456789ABCDEF, 7], device=x[0].device)
    stochastic = z.rounding == "stochastic"
    copies = layout.get("rows", True) + layout.get("cols", False)

    def run(i: int) -> tuple[Tensor | None, ...]:
        return launch(x[i], bits=z.bits, granularity=z.granularity, zero=z.zero, rng=rng if stochastic else None,
                      single_read=single_read, **layout)  # fmt: skip

    def check(out: tuple[Tensor | None, ...], i: int) -> str:
        for got, want, what in zip(out, quantize_exactly(x[i], z, rng=rng, **layout), QTensor._fields, strict=True):
            if got is not None or want is not None:
                check_equal(got, want, what)
        return "bit-equal"

    return Candidate(name, run, check, bytes=x[0].numel() * (2.0 + copies), prediction=prediction)


# ---- a linear layer


def linear(m: int, n: int, k: int, device: torch.device, sets: int = 2) -> Case:
    """Forward and backward of a linear layer without bias, X (M, K), W (N, K), bf16: `fqt.nn.Linear` against nn.Linear.

    All of the quantization is timed. The codes of the weight are dropped at the start of each run, on the host, so that
    every run quantizes the weight in both layouts, as a training step does.
    """
    x = [gaussian(m, k, device=device, seed=2 * i).requires_grad_() for i in range(sets)]
    dy = [gaussian(m, n, device=device, seed=2 * i + 1) for i in range(sets)]
    ops = 6.0 * m * n * k
    plain = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    baseline = Candidate("nn.Linear bf16", step(plain, x, dy), _exact_check(plain, x, dy), ops, ours=False)
    candidates = [baseline]
    for name in RECIPES:
        layer = fqt.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16, recipe=name)
        with torch.no_grad():
            layer.weight.copy_(plain.weight)
        prediction = predict.linear_int8(m, n, k, device) if name == "int8" else ""
        candidates.append(
            Candidate(
                f"fqt.nn.Linear {name}", step(layer, x, dy), _layer_check(layer, x, dy), ops, prediction=prediction
            )
        )
    return Case("linear fwd+bwd", f"{m}x{n}x{k}", "TFLOP/s", baseline.name, tuple(candidates), sets)


def step(layer: torch.nn.Linear, x: list[Tensor], dy: list[Tensor]) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """run(i): forward and backward on input set i from empty gradients; returns (Y, dX, dW)."""

    def run(i: int) -> tuple[Tensor, Tensor, Tensor]:
        x[i].grad = layer.weight.grad = None
        fqt.invalidate_(layer)
        y = layer(x[i])
        y.backward(dy[i])
        return y.detach(), x[i].grad, layer.weight.grad

    return run


def _exact_check(layer: torch.nn.Linear, x: list[Tensor], dy: list[Tensor]):
    def check(out: tuple[Tensor, Tensor, Tensor], i: int) -> str:
        a, w, g = x[i].detach().float(), layer.weight.detach().float(), dy[i].float()
        return _check_layer(out, (reference.mm(a, w.t()), reference.mm(g, w), reference.mm(g.t(), a)))

    return check


def _layer_check(layer: fqt.nn.Linear, x: list[Tensor], dy: list[Tensor]):
    """Against `fqt.reference`'s definitions of the three products, in float32, with the random bits of the step done."""

    def check(out: tuple[Tensor, Tensor, Tensor], i: int) -> str:
        recipe: Recipe = layer.recipe
        rng = layer._fqt_rng.clone()
        rng[1] -= 1
        xq = quantize_exactly(x[i].detach(), recipe.x)
        wq = quantize_exactly(layer.weight.detach(), recipe.w)
        g = dy[i].float()
        want = (
            reference.fprop(xq, wq),
            reference.dgrad(g, wq, recipe, rng=rng, stream=DGRAD),
            reference.wgrad(g, xq, recipe, rng=rng, stream=WGRAD),
        )
        return _check_layer(out, want)

    return check


def _check_layer(out: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    parts = zip(out, want, ("Y", "dX", "dW"), strict=True)
    return ", ".join(f"{what} {check_near(got, to, BF16_BOUND, what)}" for got, to, what in parts)
