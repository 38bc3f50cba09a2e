"""The two gradient products of a layer, dgrad and wgrad, from dY and the codes of W and X, on whichever backend dispatch
chooses.

    dgrad  dX = Q_b2(dY) W        wgrad  dW = Q_b1(dY)ᵀ X

dY is quantized once for each, with streams of random bits of their own. Where Q_b2 has a block Householder transform T
(BHQ), the codes are those of T dY, and T⁻¹, which acts on the rows only, is applied to the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import candidates, reference, telemetry
from .dispatch import choose, problem
from .householder import Householder
from .products import device_guard, kind, product, quantized, zero
from .qtensor import Operand, QTensor
from .ranges import bound_from_product
from .recipe import Quantizer, Recipe

DGRAD, WGRAD = 0, 1  # streams


class Transformed(NamedTuple):
    """T dY quantized: its codes, the transform, and what puts back the rows of dY that have no range.

    groups is a Householder (reference backend) or the kernels' Groups; ranges (M,) are those of dY's rows (of the kernels
    only), value (M,) what each element of a row of range 0 is.
    """

    codes: QTensor
    groups: Householder | tuple[Tensor, ...]
    ranges: Tensor | None
    value: Tensor


def quantized_gradient(
    dy: Tensor, w: QTensor, x: QTensor, recipe: Recipe, bias: bool, *, rng: Tensor, rank: int,
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[QTensor | Transformed, QTensor, Tensor | None] | None:  # fmt: skip
    """Both quantizations of dY (M, N), for dgrad and for wgrad, and its column sums (N,) if bias, by the fused kernels.

    bias_dtype: of the column sums; those beside a transform stay in float32.

    They are those that `input_gradient` and `weight_gradient` make each for itself. None where no fused kernel applies.
    """
    g, h = recipe.dgrad, recipe.wgrad
    if g is None or h is None or {g.rounding, h.rounding} != {"stochastic"} or dy.numel() == 0:
        return None
    if g.householder:
        return _transformed_gradient(dy, w, x, recipe, bias, rng, rank)
    words = kind(dy, g.granularity, h.granularity)
    choice = choose("quantize_gradient", dy.device, *dy.shape, dtype=dy.dtype, format=recipe.format, kind=words)
    if choice.backend == "reference":
        return None
    from fqt_kernels.gradient import Side, quantize_gradient

    with device_guard(dy):
        rows, cols, total = quantize_gradient(
            dy, *(Side(z.bits, z.granularity, zero(z)) for z in (g, h)),
            row_mul=x.scale.flatten() if _folded(recipe.x) else None,
            col_mul=w.scale.flatten() if _folded(recipe.w) else None,
            rng=rng, streams=(DGRAD + 256 * rank, WGRAD + 256 * rank), sums=recipe.affine, bias=bias,
            bias_dtype=bias_dtype, tile=choice.config or None,
        )  # fmt: skip
    return (
        QTensor(rows.codes, None, rows.scale, rows.offset, row_sum=rows.sums),
        QTensor(None, cols.codes, cols.scale, cols.offset, col_sum=cols.sums),
        total,
    )


def _transformed_gradient(
    dy: Tensor, w: QTensor, x: QTensor, recipe: Recipe, bias: bool, rng: Tensor, rank: int
) -> tuple[Transformed, QTensor, Tensor | None] | None:
    """`quantized_gradient` where dgrad's quantizer transforms: one pass of statistics serves both."""
    g, h = recipe.dgrad, recipe.wgrad
    if not _has_transform(dy, g):
        return None
    from fqt_kernels.gradient import Side, statistics

    col_mul, row_mul = multipliers(w, x, recipe)
    with device_guard(dy):
        ranges, partial, total = statistics(
            dy, Side(g.bits, g.granularity, "min"), Side(h.bits, h.granularity, zero(h)),
            row_mul=None if row_mul is None else row_mul.flatten(), col_mul=None if col_mul is None else col_mul.flatten(),
            bias=bias,
        )  # fmt: skip
    random = dict(rng=rng, rank=rank, sums=recipe.affine)
    columns = quantized(dy, h, multiplier=row_mul, stream=WGRAD, rows=False, cols=True, partial=partial, **random)
    return transformed(dy, g, multiplier=col_mul, partial=ranges, **random), columns, total


def _has_transform(dy: Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernels transform this gradient."""
    if dy.numel() == 0:
        return False
    choice = choose("householder", dy.device, *dy.shape, dtype=dy.dtype, kind=kind(dy, quantizer.groups))
    return choice.backend == "triton"


def transformed(
    dy: Tensor,
    quantizer: Quantizer,
    *,
    multiplier: Tensor | None = None,
    sums: bool = False,
    rng: Tensor,
    rank: int = 0,
    partial: Tensor | None = None,
) -> Transformed:
    """The codes of T (dY · multiplier), with dgrad's stream of random bits: `fqt.reference.householder_codes`.

    dy: (M, N).   multiplier: (1, N).   partial: the extremes of the rows of dY · multiplier as a kernel found them (see
    `fqt_kernels.statistics`), if one did.
    """
    random = rng if quantizer.rounding == "stochastic" else None
    if partial is None and not _has_transform(dy, quantizer):
        y = dy.to(reference.compute_dtype(dy))
        y = y if multiplier is None else y * multiplier
        h, codes = reference.householder_codes(y, quantizer, stream=DGRAD, rng=random, rank=rank, sums=sums)
        return Transformed(codes, h, None, y[:, 0] if y.shape[1] else y.new_zeros(y.shape[0]))
    from fqt_kernels.grouping import group_rows, row_ranges
    from fqt_kernels.householder import transform
    from fqt_kernels.statistics import row_stats

    with device_guard(dy):
        partial = row_stats(dy, "per_row", False, multiplier) if partial is None else partial
        ranges, absmax = row_ranges(partial)
        groups = group_rows(ranges, quantizer.groups)
        q, scale, offset, row_sum = transform(
            dy, groups, absmax, multiplier=multiplier, bits=quantizer.bits, zero=quantizer.zero,
            rng=random, stream=DGRAD + 256 * rank, sums=sums, ranges=ranges if quantizer.auto else None,
        )  # fmt: skip
    value = dy[:, 0].to(torch.float32).contiguous()
    value = value if multiplier is None else value * multiplier[0, 0]
    return Transformed(QTensor(q, None, scale, offset, row_sum), groups, ranges, value)


def product_of_inverse(t: Transformed, b: Operand, columns: Tensor, groups: str, out_dtype: torch.dtype) -> Tensor:
    """T⁻¹ (A Bᵀ) for the codes A of T dY, (M, K); rows of dY without a range give their value times columns (K,)."""
    a = t.codes.rows()
    if isinstance(t.groups, Householder):
        z = t.groups.inverse(product(a, b, out_dtype=a.scale.dtype))
        return torch.where(t.groups.constant, t.value[:, None] * columns, z).to(out_dtype)
    from fqt_kernels import gemm_householder
    from fqt_kernels.householder import inverse

    (m, n), k = a.q.shape, b.q.shape[0]
    if k == 0:
        return a.scale.new_empty(m, 0, dtype=out_dtype)
    terms = dict(ranges=t.ranges, value=t.value, columns=columns, out_dtype=out_dtype)
    family = candidates.family(problem("scaled_mm", a.q.device, m, k, n)) or "sm80"
    if groups == "tile" and gemm_householder.reason_against(family, m, k, n) is None:
        with device_guard(a.q):
            return gemm_householder.scaled_mm(
                a.q, b.q.contiguous(), a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum,
                groups=t.groups, config=gemm_householder.config(family, m, k), **terms,
            )  # fmt: skip
    row_absmax = torch.zeros(m, dtype=torch.int32, device=a.q.device)
    z = product(a, b, row_absmax=row_absmax)
    with device_guard(z):
        return inverse(z, t.groups, row_absmax, **terms)


def _folded(quantizer: Quantizer) -> bool:
    """Whether the scales of X or W lie on an index that a gradient product contracts, so that they are folded into dY."""
    return quantizer.granularity == "per_row"


def multipliers(w: QTensor, x: QTensor, recipe: Recipe) -> tuple[Tensor | None, Tensor | None]:
    """What dY is multiplied with before it is quantized, for dgrad (1, N) and for wgrad (M, 1)."""
    return w.scale.t() if _folded(recipe.w) else None, x.scale if _folded(recipe.x) else None


def _columns(t: QTensor, quantizer: Quantizer) -> Operand:
    """The transposed codes of X or W as an operand, with scale 1 where the scales are folded into dY."""
    return Operand(t.qt, None, _flat(t.offset), t.col_sum) if _folded(quantizer) else t.cols()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.flatten()


def input_gradient(
    dy: Tensor,
    w: QTensor,
    recipe: Recipe,
    out_dtype: torch.dtype,
    g: QTensor | Transformed | None = None,
    dy_absmax: Tensor | None = None,
    dx_absmax: Tensor | None = None,
    **random,
) -> Tensor:
    """dgrad: dX = Q_b2(dY) W, (M, K), from dY (M, N) and the transposed codes of W (N, K).

    g: dY quantized already. dy_absmax: the magnitudes that it is to be quantized with, dx_absmax (M,) int32 zeros: becomes
    what is known of the rows of dX (see `fqt.ranges`).
    """
    quantizer = recipe.dgrad
    if quantizer is None:
        return reference.mm(dy.to(w.scale.dtype), w.dequantize()).to(out_dtype)
    recorded = telemetry.is_recording()  # a call of `record` that has nobody to tell takes 5 µs
    multiplier = w.scale.t() if _folded(recipe.w) and (g is None or recorded) else None
    operand = _columns(w, recipe.w)
    if quantizer.householder:
        g = transformed(dy, quantizer, multiplier=multiplier, sums=recipe.affine, **random) if g is None else g
        if recorded:
            telemetry.record("dgrad", random["rng"], dy, multiplier, quantizer, g.codes, g.groups, g.ranges)
        columns = w.col_sum.to(w.scale.dtype) if _folded(recipe.w) else w.col_sum * w.scale[0]
        columns = columns if w.offset is None else columns + w.offset[0] * float(dy.shape[1])
        return product_of_inverse(g, operand, columns, quantizer.groups, out_dtype)
    if g is None:
        g = quantized(
            dy, quantizer, multiplier=multiplier, stream=DGRAD, sums=recipe.affine, row_absmax=dy_absmax, **random
        )
    if recorded:
        telemetry.record("dgrad", random["rng"], dy, multiplier, quantizer, g)
    if dx_absmax is not None and quantizer.range == "delayed":  # what is known before the product
        dx_absmax.copy_(bound_from_product(g.rows(), operand, out_dtype))
        dx_absmax = None
    return product(g.rows(), operand, out_dtype=out_dtype, row_absmax=dx_absmax)


def weight_gradient(
    dy: Tensor,
    x: QTensor,
    recipe: Recipe,
    out_dtype: torch.dtype,
    h: QTensor | None = None,
    out: Tensor | None = None,
    dy_absmax: Tensor | None = None,
    **random,
) -> Tensor:
    """wgrad: dW = Q_b1(dY)ᵀ X, (N, K), from dY (M, N) and the transposed codes of X (M, K).

    h: dY quantized already. out: a gradient of earlier steps (N, K) that this one is added to, instead of a new one.
    dy_absmax: the magnitudes that dY is to be quantized with (see `fqt.ranges`).
    """
    if recipe.wgrad is None:
        dw = reference.mm(dy.t().to(x.scale.dtype), x.dequantize())
        return dw.to(out_dtype) if out is None else out.copy_(out + dw)
    multiplier = x.scale if _folded(recipe.x) else None
    if h is None:
        h = quantized(
            dy, recipe.wgrad, multiplier=multiplier, stream=WGRAD, rows=False, cols=True, sums=recipe.affine,
            row_absmax=dy_absmax, **random,
        )  # fmt: skip
    if telemetry.is_recording():
        telemetry.record("wgrad", random["rng"], dy, multiplier, recipe.wgrad, h)
    return product(h.cols(), _columns(x, recipe.x), out_dtype=out_dtype, out=out)
