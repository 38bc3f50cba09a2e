"""What quantizing a gradient does to it: its ranges, the variance that they predict, the variance and the error it has.

For dgrad a row is a sample; for wgrad, which contracts the samples, it is an output channel: what can have a scale of its
own. G below is dY times whatever scales were folded into it, with N rows of D elements and ranges R, B = 2**bits - 1, and

    ptq          N·D·scale²/6        zero on the grid; what ranges predict where remainders p of rounding are
    psq          D/(6B²)·Σ Rᵢ²       uniform, so that E p(1-p) = 1/6
    bhq          D/(6B²)·Σ ‖T⁻¹eᵢ‖²·R'ᵢ²,   R' the ranges of T G
    conditional  the variance of Q(G) given G: Σ p(1-p)·scale², carried through T⁻¹
    empirical    ‖Q(G) - G‖² of the codes at hand

The predictions of psq and bhq are those that `Householder.where_better` compares.

Source: StatQuant (arXiv 2010.14298) sections 3.3, 4.1 and 4.2; E p(1-p) and the rows of T⁻¹: [derived].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .householder import Householder
from .qtensor import QTensor
from .recipe import Quantizer
from .reference import E4M3_MAX, quantization_params


def measured(
    product: str,
    dy: Tensor,
    multiplier: Tensor | None,
    quantizer: Quantizer,
    codes: QTensor,
    transform: Householder | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics of one quantization, which `fqt.telemetry.Record` explains, and how many rows are not finite.

    Scalars on the device of dY (M, N), not empty, without a host synchronization.

    product: "dgrad" or "wgrad".   multiplier: (M, 1) or (1, N), folded into dY.   codes: of T (dY · multiplier) by the
    quantizer, T = 1 without a transform.
    """
    g = dy.to(codes.scale.dtype)
    g = g if multiplier is None else g * multiplier
    y = g if transform is None else transform.apply(g)
    coded, scale, offset = codes.dequantize(), codes.scale, codes.offset
    if product == "wgrad":
        g, y, coded, scale = g.t(), y.t(), coded.t(), scale.t()
        offset = None if offset is None else offset.t()
    result = coded if transform is None else torch.where(transform.constant, g[:, :1], transform.inverse(coded))
    width = scale if quantizer.format == "int" else scale * _e4m3_spacing(y / scale)
    error = (coded - y).abs()  # p or 1 - p bins, of which the other is as likely as this one is not
    conditional, part = error * (width - error).clamp(min=0), 6
    if quantizer.rounding == "nearest":  # nothing is random; the error of a uniform remainder is scale²/12
        conditional, part = torch.zeros_like(error), 12
    predicted = (width.double().square() / part).expand_as(y)
    ranges = _ranges(g)
    ordered = ranges.sort().values
    numbers = {
        "rows": torch.full_like(ranges[0], len(ranges), dtype=torch.float64),
        "norm2": _sum_of_squares(g),
        "range_smallest": ordered[0],
        "range_median": ordered[(len(ordered) - 1) // 2],
        "range_largest": ordered[-1],
        "zero_rows": _fraction(ranges == 0),
        **_predictions(product, g, ranges, quantizer.bits),
        "predicted": _carried_back(transform, predicted.sum(1)),
        "conditional": _carried_back(transform, conditional.sum(1, dtype=torch.float64)),
        "empirical": _sum_of_squares(result - g),
        "clipped": _fraction(_clipped(y, scale, offset, quantizer)),
        "zeros_before": _fraction(g == 0),
        "zeros_after": _fraction(result == 0),
        **({} if transform is None else _counts(transform)),
    }
    return numbers, (~torch.isfinite(g)).any(1).sum()


def _predictions(product: str, g: Tensor, ranges: Tensor, bits: int) -> dict[str, Tensor]:
    """The variance predicted of each quantizer that the product can have, at this many bits."""
    n, d = g.shape
    each = d / (6 * (2**bits - 1) ** 2)
    scale = quantization_params(g.amin(), g.amax(), bits, "grid")[0].double()
    of = {"ptq": n * d / 6 * scale.square()}
    if product == "wgrad":
        return of | {"per_column": each * _sum_of_squares(ranges)}
    of["psq"] = each * _sum_of_squares(ranges)
    for name, groups in (("bhq", "global"), ("bhq_tile", "tile")):
        h = Householder.of(g, groups)
        of[name] = each * (h.weights() * _ranges(h.apply(g)).double().square()).sum()
    return of


def _carried_back(transform: Householder | None, rows: Tensor) -> Tensor:
    """The total variance of T⁻¹ Y, the rows of Y being independent and of variances `rows` (N,) float64.

    Squared, the leader's row of T⁻¹ = diag(1/s) Q is 1/n throughout. A follower's is, over s², 1/n for the leader,
    (1 - 1/d)² for itself and 1/d² for the others, d = n - √n. Rows of range zero, which are put back, have none.
    """
    if transform is None:
        return rows.sum()
    n, leader, s = transform.size.double(), transform.leader, transform.groups.s[transform.group].double()
    parts = (rows, torch.where(leader, 0, rows))
    total, followers = (torch.zeros_like(rows).index_add_(0, transform.group, x)[transform.group] for x in parts)
    inverse_d = torch.where(n > 1, 1 / (n - n.sqrt()), 0)
    others = (total - followers) / n + (1 - 2 * inverse_d) * rows + inverse_d.square() * followers
    out = torch.where(s == 0, rows, torch.where(leader, total / n, others / s.square()))
    return torch.where(transform.constant[:, 0], 0, out).sum()


def _clipped(y: Tensor, scale: Tensor, offset: Tensor | None, quantizer: Quantizer) -> Tensor:
    """Which elements lie beyond the first or the last code, by more than float32's rounding of scale and offset.

    That moves the codes' ends by up to 2⁻²⁴ of |y| + |offset| + 6h - 3 bins, h = 2**(bits - 1), and there |y| + |offset| is
    at least h - 1 bins: together below 2⁻²⁰ of it.
    """
    half = 2 ** (quantizer.bits - 1)
    first, last = (-half if quantizer.zero != "symmetric" else 1 - half), half - 1
    if quantizer.format == "e4m3":
        first, last = -E4M3_MAX, E4M3_MAX
    shift = torch.zeros_like(scale) if offset is None else offset
    beyond = torch.maximum(first * scale + shift - y, y - (last * scale + shift))
    return beyond > (y.abs() + shift.abs()) * 2.0**-20


def _e4m3_spacing(u: Tensor) -> Tensor:
    """The distance of the two float8_e4m3fn numbers around u: 2⁻³ of the power of two up to |u|, at least 2⁻⁹."""
    exponent = torch.frexp(u.abs().clamp(2.0**-6, E4M3_MAX)).exponent
    return torch.ldexp(torch.ones_like(u), exponent - 4)


def _counts(transform: Householder) -> dict[str, Tensor]:
    """How many groups there are, how many of them and of the rows are transformed, how large the largest group is."""
    sizes = transform.groups.first[1:] - transform.groups.first[:-1]
    transformed = (sizes > 1) & (transform.groups.s != 0)
    return {
        "groups": (sizes > 0).sum(),
        "groups_transformed": transformed.sum(),
        "rows_transformed": transformed[transform.group].sum(),
        "largest_group": sizes.max(),
    }


def _ranges(x: Tensor) -> Tensor:
    return x.amax(1) - x.amin(1)


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _fraction(mask: Tensor) -> Tensor:
    return mask.mean(dtype=torch.float64)
