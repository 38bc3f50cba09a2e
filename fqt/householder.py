"""The block Householder transform of a gradient (BHQ), in plain torch: the definition that the kernels follow to the bit.

A few rows of a gradient are large, most are small. Rows are put into groups of one large row (the leader) and some small
ones (the followers), and in each group the leader is spread evenly over all its rows by a Householder reflection before
rounding, so that the rounding error of a large row shrinks with the size of its group.

    T = Q diag(s),   Q = I - 2 u uᵀ / ‖u‖²,   u = 1/√n - e₁  (so that Q e₁ = 1/√n),   T⁻¹ = diag(1/s) Q

With l the leader's row, t the sum of the followers' rows and d = n - √n, the reflection of a group of n rows is

    leader  (l + t) / √n,        follower j  x_j + b,   b = l / √n - t / d.

A worked example: rows of ranges 6, 2, 2, 2 are one group, which the first leads, with 1/√n = 1/2 and d = 2.

>>> import torch
>>> x = torch.tensor([[6.0, 0.0, 3.0], [1.0, -1.0, 0.0], [0.0, 2.0, 1.0], [-1.0, 1.0, 0.0]])
>>> h = Householder.of(x)
>>> h.group.tolist(), h.leader.tolist()
([0, 0, 0, 0], [True, False, False, False])
>>> round(float(h.s[1]), 3)  # of the followers: ((6/√4)·3 / (2·½))^(1/3), as max|Q| is ½
2.08
>>> y = h.apply(x)
>>> [round(float(v), 2) for v in y.amax(1) - y.amin(1)]  # the ranges after the transform
[0.92, 9.24, 0.92, 0.92]
>>> torch.allclose(h.inverse(y), x, atol=1e-6)
True

Sources: StatQuant (arXiv 2010.14298) section 4.2 and its published grouping; sums in integers: [derived].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # rows among which groups="tile" looks for groups


class Groups(NamedTuple):
    """The groups of N rows, all int64 but s. Groups are numbered by the position of their leader among its tile's leaders,
    plus the tile's first row; a number that no group has is that of an empty one.

    order (N,): rows, group by group, the leader first, then the followers by falling range. group (N,): of each row.
    first (N + 1,): where each group begins in order. s (N,) of each group: what its followers are multiplied with, in
    float32 or the float64 of the ranges; 0 where the group is left as it is (see `Householder.where_better`).
    """

    order: Tensor
    group: Tensor
    first: Tensor
    s: Tensor


class Householder(NamedTuple):
    """The transform of an (N, D) matrix's rows: T and its inverse, block by block.

    constant (N, 1) marks the rows whose range is zero: they take part as followers, but their exact value is known and
    replaces what the inverse gives for them.
    """

    groups: Groups
    constant: Tensor

    @staticmethod
    def of(x: Tensor, groups: str = "global") -> Householder:
        """The transform for an (N, D) float32 or float64 matrix, from the ranges of its rows. No host synchronization.

        groups: "global", among all rows, or "tile", among the rows of each 128.

        Fewer than three rows, or all of range zero: every row is a group of its own, T is the identity. A row with a
        NaN or an infinity counts as range zero here: it joins one group as a follower and makes that group non-finite.
        """
        n, d = x.shape
        ranges = x.amax(1) - x.amin(1) if d else x.new_zeros(n)
        return Householder(group_rows(ranges, groups), (ranges == 0)[:, None])

    @property
    def group(self) -> Tensor:
        """(N,) int64: the group of each row."""
        return self.groups.group

    @property
    def leader(self) -> Tensor:
        """(N,) bool: whether a row leads its group."""
        return self._leader_row() == torch.arange(self.group.numel(), device=self.group.device)

    @property
    def size(self) -> Tensor:
        """(N,) int64: how many rows the group of each row has."""
        return (self.groups.first[1:] - self.groups.first[:-1])[self.group]

    @property
    def s(self) -> Tensor:
        """(N, 1): what each row is multiplied with before the reflection; 1 for leaders and rows left as they are."""
        s = self.groups.s[self.group]
        return torch.where(self.leader | (s == 0), torch.ones_like(s), s)[:, None]

    def apply(self, x: Tensor) -> Tensor:
        """T x, for (N, D) x."""
        s = self.groups.s[self.group].to(x.dtype)[:, None]
        return self._reflect(x, s * x, s)

    def inverse(self, y: Tensor) -> Tensor:
        """T⁻¹ y, for (N, D) y; D may differ from the transformed matrix's, since T acts on the rows."""
        out = self._reflect(y, y, None)
        return torch.where(self.leader[:, None], out, out * (1 / self.s.double()).to(y.dtype))

    def weights(self) -> Tensor:
        """(N,) float64: ‖T⁻¹eᵢ‖² = 1/n + (1 - 1/n)/s², by which a row's rounding error counts in the result's."""
        n, s = self.size.double(), self.groups.s[self.group].double()
        return torch.where((n == 1) | (s == 0), torch.ones_like(s), 1 / n + (1 - 1 / n) / (s * s))

    def where_better(self, before: Tensor, after: Tensor) -> Householder:
        """This transform in the groups where it lowers the predicted variance, the identity in the others.

        before and after: (N,) ranges of the rows of x and of T x. Σ ‖T⁻¹eᵢ‖² R'ᵢ² < Σ Rᵢ² over a group decides; a
        comparison with a NaN leaves the group as it is. Source: [derived]; the bound D/(4B²) is common to both sides.
        """
        gain = before.double().square() - self.weights() * after.double().square()
        total = torch.zeros_like(gain).index_add_(0, self.group, gain)
        return self._replace(groups=self.groups._replace(s=torch.where(total > 0, self.groups.s, 0)))

    def _leader_row(self) -> Tensor:
        """(N,): the row that leads each row's group."""
        return self.groups.order[self.groups.first[self.group]]

    def _reflect(self, x: Tensor, followers: Tensor, s: Tensor | None) -> Tensor:
        """Q of the leaders' rows of x and the others' of `followers`, s (N, 1) · x where s is not None."""
        if x.numel() == 0:
            return x
        leader, n, leads = self.leader[:, None], self.size.double()[:, None], x[self._leader_row()]
        total = follower_sums(x, self.group, leader)[self.group]
        total = total if s is None else s * total
        root = n.sqrt()
        inverse_root, inverse_d = (1 / root).to(x.dtype), torch.where(n > 1, 1 / (n - root), 0).to(x.dtype)
        shift = leads * inverse_root - total * inverse_d
        out = torch.where(leader, (leads + total) * inverse_root, followers + shift)
        return torch.where(self.groups.s[self.group][:, None] == 0, x, out)


def follower_sums(x: Tensor, group: Tensor, leader: Tensor) -> Tensor:
    """(N, D) sums of the followers of each group, row g for group g.

    In float32 each element is rounded to 30 bits below the largest magnitude of its group's followers (but no finer than
    to 2⁻¹²⁶) and summed in integers: the sum is at least as exact as one of float32 numbers, and does not depend on the
    order. Where any of them is NaN or infinite, the sum is NaN in all columns.

    x: (N, D) float32 or float64.   group: (N,) int64.   leader: (N, 1) bool.
    """
    if x.dtype == torch.float64:
        return torch.zeros_like(x).index_add_(0, group, torch.where(leader, 0, x))
    largest = torch.where(leader, 0, x.abs()).amax(1).view(torch.int32)  # of a magnitude the bits have its order
    largest = torch.zeros_like(largest).scatter_reduce_(0, group, largest, "amax")[:, None]
    up, unit = fixed_point(largest)
    whole = torch.where(leader, 0, torch.round(x * up[group])).nan_to_num(0.0, 0.0, 0.0).to(torch.int64)
    total = torch.zeros(x.shape, dtype=torch.int64, device=x.device).index_add_(0, group, whole)
    return total.to(torch.float32) * unit


def fixed_point(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(2ᵖ, 2⁻ᵖ) float32, p = min(29 - ⌊log₂ a⌋, 126), of magnitudes a given by their int32 bits: a·2ᵖ < 2³⁰.

    2⁻ᵖ is NaN where a is NaN or infinite.
    """
    p = (156 - (largest >> 23)).clamp(max=126)
    up, unit = ((p + 127) << 23).view(torch.float32), ((127 - p) << 23).view(torch.float32)
    return up, torch.where(largest < 0x7F800000, unit, torch.nan)


def group_rows(ranges: Tensor, groups: str = "global") -> Groups:
    """Put N rows into groups by their ranges (N,), float32 or float64; a non-finite range counts as zero.

    Sorted in descending order v₁ ≥ … ≥ v_N (ties by row index), the first G = #{g : (N - g)·v_g > Σ_{i≤g} v_i} rows are
    leaders; leader i gets the next c_i - c_{i-1} of the others, c_i = ⌊(N - G)·Σ_{j≤i} v_j / Σ_{j≤G} v_j + ½⌋, a quotient
    in float64. Where there is no leader (all zero, fewer than three rows), every row is a group of its own.

    The sums are integers of 62 bits, multiples of a power of two that up to 2¹⁹ rows no leader's float32 range has a bit
    below: they do not depend on the order of summation. Up to 2¹⁴ rows float64's sums are as exact, and the same.

    groups: "global", or "tile" for the algorithm within each 128 rows.

    Raises:
        ValueError: another kind of groups.
    """
    if groups not in ("global", "tile"):
        raise ValueError(f"groups must be 'global' or 'tile', got {groups!r}")
    n = ranges.numel()
    v = torch.where(torch.isfinite(ranges), ranges, 0).double()
    tile = TILE if groups == "tile" else max(n, 1)
    whole = n // tile * tile
    parts = [_group_tiles(v[:whole].view(n // tile, tile), 0), _group_tiles(v[whole:].view(1, n - whole), whole)]
    order, group, first, s = (torch.cat([p[i].flatten() for p in parts]) for i in range(4))
    return Groups(order, group, torch.cat([first, first.new_full((1,), n)]), s.to(ranges.dtype))


def _group_tiles(ranges: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Groups` of each of T tiles of n rows, (T, n) each, s in float64; start: the first row's number."""
    tiles, n = ranges.shape
    if ranges.numel() == 0:
        nothing = torch.empty(tiles, n, dtype=torch.int64, device=ranges.device)
        return nothing, nothing, nothing, nothing.double()
    index = torch.arange(n, device=ranges.device).expand(tiles, n)
    base = start + n * torch.arange(tiles, device=ranges.device)[:, None]
    v, order = torch.sort(ranges, dim=1, descending=True, stable=True)
    whole = _integers(v, n.bit_length())
    sums = whole.cumsum(1)
    count = ((n - 1 - index) * whole > sums).sum(1, keepdim=True)  # G
    led = sums.gather(1, (count - 1).clamp(min=0))
    ends = torch.floor((n - count).double() * sums.double() / led.double() + 0.5).nan_to_num(0.0).long()
    ends = torch.where(index >= count - 1, n - count, ends)  # c_i of leader i; N - G from the last leader on
    starts = torch.cat([torch.zeros_like(count), ends[:, :-1]], 1)
    first = torch.where(index < count, index + starts, torch.where(count == 0, index, n))
    rank_group = torch.searchsorted(ends, index - count, right=True)
    leads = (index < count) | (count == 0)
    rank_group = torch.where(leads, index, rank_group)
    position = torch.where(leads, first, index - count + rank_group + 1)
    sizes = torch.cat([first[:, 1:], torch.full_like(count, n)], 1) - first
    largest_follower = v.gather(1, (count + starts).clamp(max=n - 1))
    s = torch.where(sizes > 1, _follower_scale(sizes.double(), v, largest_follower), 1.0)
    return (
        torch.empty_like(order).scatter_(1, position, order) + base,
        torch.empty_like(order).scatter_(1, order, rank_group) + base,
        first + base,
        s,
    )


def _integers(v: Tensor, bits: int) -> Tensor:
    """v (T, n) float64, descending, in whole multiples of a power of two, such that sums of fewer than 2**bits fit."""
    exponent = (v[:, :1].contiguous().view(torch.int64) >> 52) - 1023  # of the largest
    return (v * ((62 - bits - exponent + 1023) << 52).view(torch.float64)).to(torch.int64)


def _follower_scale(n: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """s₂/s₁ of groups of n rows, float64, whose leader and largest follower have these ranges; n > 1.

    It minimises the variance bound (s₁⁻² + (n-1)·s₂⁻²)·(w₁s₁ + w₂s₂)², w₁ = λ₁/√n, w₂ = λ₂·max|Q|; λ₂ is at least 1e-6·λ₁.
    """
    root = square_root(n)
    d = n - root
    # The largest |Q_jk|: 1/√n, |1 - 1/d| or, for n > 2, 1/d.
    largest = torch.maximum(1 / root, (1 - 1 / d).abs())
    largest = torch.where(n > 2, torch.maximum(largest, 1 / d), largest)
    w2 = torch.maximum(second, 1e-6 * first) * largest
    return cube_root(first / root * (n - 1) / w2)


def square_root(x: Tensor) -> Tensor:
    """The square root of positive float64 numbers, by operations that every device rounds alike: torch's own is one unit
    in the last place off for some, on some CPUs.

    Half of the exponent bits, off by at most 7 %, then four of Heron's steps, each of which squares the error.
    """
    y = (x.view(torch.int64) // 2 + (1023 << 51)).view(torch.float64)
    for _ in range(4):
        y = 0.5 * (y + x / y)
    return y


def cube_root(x: Tensor) -> Tensor:
    """The cube root of positive float64 numbers, by operations that every device rounds alike.

    A third of the exponent bits, off by at most 6 %, then three of Halley's steps, each of which cubes the error.
    """
    y = (x.view(torch.int64) // 3 + (715094163 << 32)).view(torch.float64)
    for _ in range(3):
        cube = y * y * y
        y = y * (cube + (x + x)) / (cube + cube + x)
    return y
