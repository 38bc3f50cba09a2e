"""What the cases are made of, and the case of quantization. Each builds on any device; on the CPU they serve the tests.

Inputs are Gaussian, int8 codes are those of quantized Gaussians, never zeros. The oracle is `fqt.reference` on the same
inputs and the same device, except for the parameters of a quantizer, which are computed on the CPU: on a GPU torch
divides by a Python number by multiplying with its reciprocal, and the scale would be off by one unit in the last place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fqt import cost, reference
from fqt.cost import Ceilings
from fqt.gradients import DGRAD, WGRAD
from fqt.qtensor import QTensor
from fqt.recipe import Quantizer, Recipe

from .harness import Candidate, Case, check_equal

ROW = Quantizer(8, "per_row", "symmetric")
ROW_STOCHASTIC = Quantizer(8, "per_row", "symmetric", "stochastic")
COLUMN_STOCHASTIC = Quantizer(8, "per_column", "symmetric", "stochastic")
GRID = Quantizer(8, "per_tensor", "grid")
BF16_BOUND = 2.0**-7  # twice the unit roundoff of bfloat16, in which the outputs are rounded


def gaussian(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def ceilings(device: torch.device) -> Ceilings | None:
    """What `fqt.cost` predicts with on the device, None where it predicts nothing."""
    try:
        return cost.ceilings(device)
    except cost.NotModelled:
        return None


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
    """`fqt.reference.quantize` to int8 codes, to the last bit on every device: its steps, its parameters from the CPU."""
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


# ---- quantization

# (tag, quantizer, kernel or None for the one that is chosen, layout), a row a candidate. layout: rows, cols and sums of
# `fqt_kernels.quantize.quantize`; multiplier "rows" for one of (M, 1).
QUANTIZATIONS = [
    ("rows nearest", ROW, "rows", {}),
    ("rows nearest", ROW, "tile", {}),
    ("rows stochastic", ROW_STOCHASTIC, "rows", {}),
    ("rows stochastic", ROW_STOCHASTIC, "tile", {}),
    ("both nearest", ROW, None, {"cols": True}),
    ("both nearest", ROW, "tile", {"cols": True}),
    ("both stochastic", ROW_STOCHASTIC, None, {"cols": True}),
    ("both stochastic", ROW_STOCHASTIC, "tile", {"cols": True}),
    ("", GRID, None, {}),
    ("", GRID, None, {"cols": True, "sums": True}),
    ("", COLUMN_STOCHASTIC, None, {"rows": False, "cols": True, "multiplier": "rows"}),
]
# Recipes whose two quantizations of a gradient are made together.
GRADIENTS = ("int8", "psq8")


def quantize(m: int, n: int, device: torch.device, sets: int = 2) -> Case:
    """The quantize kernels on a bf16 matrix, in GB/s of the bytes they have to move, against a copy of the matrix.

    Those are 2 read and 1 for each copy written, of an element; a second read is not counted. The copy: 2 and 2.
    """
    from fqt_kernels.quantize import rows_block

    x = [gaussian(m, n, device=device, seed=i) for i in range(sets)]
    target = torch.empty_like(x[0])
    copy = Candidate("copy_", lambda i: target.copy_(x[i]), lambda out, i: check_equal(out, x[i]), bytes=4.0 * m * n,
                     provider="torch", prediction=_copy_prediction(device), tag="copy")  # fmt: skip
    candidates = [copy]
    for tag, quantizer, kernel, layout in QUANTIZATIONS:
        if kernel != "rows" or rows_block(m, n, layout.get("cols", False)) is not None:
            candidates.append(_quantize(tag, x, quantizer, kernel, layout))
    candidates += [_gradient(name, x) for name in GRADIENTS]
    return Case("quantize", f"{m}x{n}", "GB/s", copy.name, tuple(candidates), sets)


def _copy_prediction(device: torch.device) -> str:
    expected = ceilings(device)
    return f"{expected.tb_s * 1e3:.0f} GB/s ({expected.source})" if expected else ""


def _ideal(copies: int, reads: int) -> str:
    """Bytes that have to be moved over those that `fqt.cost` counts, as a ratio to the copy."""
    return f"{(2 + copies) / (2 * reads + copies):.2f}×"


def _quantize(tag: str, x: list[Tensor], z: Quantizer, kernel: str | None, layout: dict[str, Any]) -> Candidate:
    from fqt_kernels.quantize import quantize as launch

    rng = _rng(x[0].device)
    stochastic = z.rounding == "stochastic"
    written = [
        name for name, asked in (("rows", layout.get("rows", True)), ("transposed", layout.get("cols"))) if asked
    ]
    if layout.get("multiplier"):
        layout = {**layout, "multiplier": gaussian(x[0].shape[0], 1, device=x[0].device, seed=99).float()}
    parts = [z.granularity, *([z.zero] if z.zero != "symmetric" else []), z.rounding + ",", " + ".join(written),
             *(f"+ {name}" for name in ("sums", "multiplier") if name in layout), f"({kernel or 'dispatch'})"]  # fmt: skip

    def run(i: int) -> tuple[Tensor | None, ...]:
        return launch(x[i], bits=z.bits, granularity=z.granularity, zero=z.zero, rng=rng if stochastic else None,
                      kernel=kernel, **layout)  # fmt: skip

    def check(out: tuple[Tensor | None, ...], i: int) -> str:
        for got, want, what in zip(out, quantize_exactly(x[i], z, rng=rng, **layout), QTensor._fields, strict=True):
            if got is not None or want is not None:
                check_equal(got, want, what)
        return "bit-equal"

    reads = 1 if z.granularity == "per_row" and kernel != "tile" else 2
    return Candidate(" ".join(parts), run, check, bytes=x[0].numel() * (2.0 + len(written)), tag=tag,
                     prediction=_ideal(len(written), reads))  # fmt: skip


def _gradient(name: str, dy: list[Tensor]) -> Candidate:
    """Both quantizations of dY, for dgrad and for wgrad, from one pass of statistics and one of codes."""
    from fqt_kernels.gradient import Side, quantize_gradient

    r = Recipe.parse(name)
    (m, n), device = dy[0].shape, dy[0].device
    rng = _rng(device)
    sides = [Side(z.bits, z.granularity, z.zero) for z in (r.dgrad, r.wgrad)]
    row_mul = gaussian(m, device=device, seed=98).float() if r.x.granularity == "per_row" else None
    col_mul = gaussian(n, device=device, seed=97).float() if r.w.granularity == "per_row" else None

    def run(i: int) -> tuple[Tensor | None, ...]:
        g, h, _ = quantize_gradient(
            dy[i], *sides, row_mul=row_mul, col_mul=col_mul, rng=rng, streams=(DGRAD, WGRAD), sums=r.affine
        )
        return (*g, *h)

    def check(out: tuple[Tensor | None, ...], i: int) -> str:
        g = quantize_exactly(dy[i], r.dgrad, multiplier=None if col_mul is None else col_mul[None], rng=rng,
                             stream=DGRAD, sums=r.affine)  # fmt: skip
        h = quantize_exactly(dy[i], r.wgrad, multiplier=None if row_mul is None else row_mul[:, None], rng=rng,
                             stream=WGRAD, rows=False, cols=True, sums=r.affine)  # fmt: skip
        want = (g.q, g.scale, g.offset, g.row_sum, h.qt, h.scale, h.offset, h.col_sum)
        for got, expected in zip(out, want, strict=True):
            if got is not None or expected is not None:
                check_equal(got, expected)
        return "bit-equal"

    return Candidate(f"gradient of {name}, both quantizations", run, check, bytes=4.0 * m * n, tag=f"gradient {name}",
                     prediction=_ideal(2, 2))  # fmt: skip


def _rng(device: torch.device) -> Tensor:
    return torch.tensor([0x0123456789ABCDEF, 7], device=device)
