"""BHQ as its authors compute it, for comparison: groups found on the CPU, then products with dense N × N matrices.

    T = Pᵀ blockdiag(Q) diag(s) P,   T⁻¹ = Pᵀ diag(1/s) blockdiag(Q) P,   Q = I - 2 u uᵀ / ‖u‖²,   u = 1/√n - e₁

The ranges of the rows are copied to the CPU, which forms the groups, fills T and T⁻¹ and sends them to the device. There
T G is a matrix product, quantized between the minimum and the maximum of each row, and T⁻¹ times the dequantized codes
is another; a gradient of the input is a float32 product with the dequantized weight (fake quantization). The search
for the number of groups, a loop in C++ there, is a vectorized count here, so that Python does not make it slow.

Source: StatQuant (arXiv 2010.14298) section 4.2 and what its published code does, written anew from the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8  # added to ranges, as there
MAX_ROWS = 16384  # T and T⁻¹ take 1 GiB each


class Dense(NamedTuple):
    """T and T⁻¹, (N, N) float32, on the gradient's device."""

    forward: Tensor
    inverse: Tensor


class Blocks(NamedTuple):
    """Of N ≥ 3 rows, on the CPU: rows by falling range; of each such rank its group; of each group its number of rows, and
    the scales s₁ of its leader and s₂ of its followers, in float64. The first ranks are the leaders, of group 0, 1, …"""

    order: Tensor
    group: Tensor
    size: Tensor
    s1: Tensor
    s2: Tensor


def blocks(ranges: Tensor) -> Blocks:
    """The groups of rows with these ranges (N,), N ≥ 3, wherever they are; found on the CPU.

    Raises:
        ValueError: fewer than three rows, for which the method has no groups.
    """
    n = ranges.numel()
    if n < 3:
        raise ValueError(f"at least three rows have groups, got {n}")
    v, order = torch.sort(ranges.cpu().double() + EPS, descending=True, stable=True)
    sums, rank = v.cumsum(0), torch.arange(1, n + 1)
    leaders = max(int(((n - rank) * v > sums).sum()), 1)
    ends = torch.floor((n - leaders) * sums[:leaders] / sums[leaders - 1] + 0.5).long()
    followers = ends - torch.cat([ends.new_zeros(1), ends[:-1]])
    group = torch.cat([torch.arange(leaders), torch.repeat_interleave(torch.arange(leaders), followers)])
    size = followers + 1.0
    d = size - size.sqrt()
    largest = torch.maximum(1 / size.sqrt(), (1 - 1 / d).abs())  # of |Q|
    largest = torch.where(size > 2, torch.maximum(largest, 1 / d), largest)
    w1, w2 = v[:leaders] / size.sqrt(), v[leaders + ends - followers] * largest
    s1, s2 = w1 ** (-1 / 3), (w2 / (size - 1)) ** (-1 / 3)
    norm = (1 / s1.square() + 1 / s2.square()).sqrt()
    return Blocks(order, group, size, s1 * norm, s2 * norm)


def dense(g: Tensor) -> Dense:
    """T and T⁻¹ for a gradient (N, D): the ranges go to the CPU, the matrices come back."""
    b = blocks((g.amax(1) - g.amin(1)).float())
    leaders, rows = b.size.numel(), b.order
    group = torch.empty_like(b.group).scatter_(0, rows, b.group)
    size, scale = b.size[group], b.s2[group]
    scale[rows[:leaders]] = b.s1
    d = size - size.sqrt()
    together = group[:, None] == group
    q = together * (-1 / d).float()[:, None]
    q.diagonal().copy_(1 - 1 / d)
    edge = (1 / size.sqrt()).float()
    for side in (q, q.t()):
        side[rows[:leaders]] = together[rows[:leaders]] * edge[rows[:leaders], None]
    scale = scale.float()
    return Dense((q * scale).to(g.device), (q / scale[:, None]).to(g.device))


def quantize(y: Tensor, bits: int) -> Tensor:
    """The dequantized codes of Y, float32: B = 2**bits - 1 bins between the minimum and the maximum of each row, SR."""
    bins = 2**bits - 1
    low = y.amin(1, keepdim=True) - EPS
    scale = bins / (y.amax(1, keepdim=True) + EPS - low)
    noise = torch.empty_like(y).uniform_(-0.5, 0.5)
    return ((y - low) * scale + noise).clamp_(0, bins).round_() / scale + low


def input_gradient(g: Tensor, w: Tensor, bits: int) -> Tensor:
    """dX = Q(G) W, (N, K) float32, of G (N, D) and the dequantized weight W (D, K) float32."""
    t = dense(g)
    return (t.inverse @ quantize(t.forward @ g.float(), bits)) @ w
