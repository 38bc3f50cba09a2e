"""The block Householder transform of a gradient (BHQ), in plain torch.

A few rows of a gradient are large, most are small. Rows are put into groups of one large row (the leader) and some small
ones (the followers), and in each group the leader is spread evenly over all its rows by a Householder reflection before
rounding, so that the rounding error of a large row shrinks with the size of its group.

    T = Q diag(s),   Q = I - 2 u uᵀ / ‖u‖²,   u = 1/√n - e₁  (so that Q e₁ = 1/√n),   T⁻¹ = diag(1/s) Q

Source: StatQuant (arXiv 2010.14298) section 4.2 and its published grouping.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Householder(NamedTuple):
    """The transform of an (N, D) matrix's rows: group (N,) int64, and for each row u, s, and the factor 2/‖u‖² (N, 1).

    leader (N,) and size (N,) describe the groups. constant (N, 1) marks the rows whose range is zero: they take part as
    followers, but their exact value is known and replaces what the inverse gives for them.
    """

    group: Tensor
    leader: Tensor
    size: Tensor
    u: Tensor
    s: Tensor
    factor: Tensor
    constant: Tensor

    @staticmethod
    def of(x: Tensor) -> Householder:
        """The transform for an (N, D) float32 or float64 matrix, from the ranges of its rows. No host synchronization.

        Fewer than three rows, or all of range zero: every row is a group of its own, T is the identity. A row with a
        NaN or an infinity counts as range zero here: it joins one group as a follower and makes that group non-finite.
        """
        n, d = x.shape
        ranges = x.amax(1) - x.amin(1) if d else x.new_zeros(n)
        constant = (ranges == 0)[:, None]
        ranges = torch.where(torch.isfinite(ranges), ranges, torch.zeros_like(ranges)).double()
        group, leader, size, first, second = group_rows(ranges)
        root = size.double().sqrt()
        single = size < 2
        u = torch.where(leader, 1 / root - 1, 1 / root)
        factor = torch.where(single, torch.zeros_like(root), root / (root - 1))
        # The scales that minimise the variance bound, up to a common factor: the leader keeps 1.
        w1 = first / root
        w2 = torch.maximum(second, 1e-6 * first) * _largest_entry(size)
        ratio = (w1 * (size - 1) / w2).pow(1 / 3)
        s = torch.where(leader | single, torch.ones_like(ratio), ratio)
        u, s, factor = (v.to(x.dtype)[:, None] for v in (u, s, factor))
        return Householder(group, leader, size, u, s, factor, constant)

    def apply(self, x: Tensor) -> Tensor:
        """T x, for (N, D) x."""
        return self._reflect(x * self.s)

    def inverse(self, y: Tensor) -> Tensor:
        """T⁻¹ y, for (N, D) y; D may differ from the transformed matrix's, since T acts on the rows."""
        return self._reflect(y) / self.s

    def _reflect(self, y: Tensor) -> Tensor:
        if y.shape[0] < 3 or y.shape[1] == 0:
            return y
        along = _group_sums(y * self.u, self.group)
        return y - self.factor * self.u * along[self.group]


def group_rows(ranges: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Put N rows into groups by their ranges (N,) float64, non-negative and finite.

    Sorted in descending order v₁ ≥ … ≥ v_N (ties by row index), the first G = #{g : (N - g)·v_g > Σ_{i≤g} v_i} rows are
    leaders; leader i gets the next c_i - c_{i-1} of the others, c_i = ⌊(N - G)·Σ_{j≤i} v_j / Σ_{j≤G} v_j + ½⌋.

    Returns, for each row in the given order: its group (numbered by leader), whether it leads, the size of its group,
    and the ranges of the group's leader and of its largest follower.
    """
    n = ranges.numel()
    index = torch.arange(n, device=ranges.device)
    if n < 3:
        return index, torch.ones_like(index, dtype=torch.bool), torch.ones_like(index), ranges, ranges
    v, order = torch.sort(ranges, descending=True, stable=True)
    sums = v.cumsum(0)
    count = ((n - 1 - index) * v > sums).sum()  # G, on the device
    led = sums.gather(0, (count - 1).clamp(min=0).reshape(1))  # not sums[…]: a 0-d index would be read by the host
    ends = torch.floor((n - count) * sums / led + 0.5).nan_to_num(0).long()
    ends = torch.where(index >= count - 1, n - count, ends)  # c_i of leader i; exactly N - G from the last leader on
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    leads = index < count
    sorted_group = torch.where(leads, index, torch.searchsorted(ends, index - count + 1))
    sorted_group = torch.where(count == 0, index, sorted_group)
    leads = leads | (count == 0)
    sizes = torch.where(count == 0, torch.ones_like(ends), ends - starts + 1)
    first, second = v, v[(count + starts).clamp(max=n - 1)]
    back = torch.empty_like(order).scatter_(0, order, index)
    group = sorted_group[back]
    return group, leads[back], sizes[group], first[group], second[group]


def _group_sums(y: Tensor, group: Tensor) -> Tensor:
    """(N, D) sums of y's rows over each group, row g for group g; deterministic on every device."""
    order = torch.argsort(group, stable=True)
    lengths = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
    return torch.segment_reduce(y[order].contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)


def _largest_entry(n: Tensor) -> Tensor:
    """The largest |Q_jk| of an n × n reflection: 1/√n, |1 - 1/d| or, for n > 2, 1/d, with d = n - √n."""
    n = n.double()
    d = (n - n.sqrt()).clamp(min=1e-9)
    largest = torch.maximum(1 / n.sqrt(), (1 - 1 / d).abs())
    return torch.where(n > 2, torch.maximum(largest, 1 / d), largest).clamp(max=1.0)
