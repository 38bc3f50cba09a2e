"""Groups of rows for the block Householder transform: one large row, the leader, and some small ones, its followers.

    sort, v₁ ≥ … ≥ v_N;   G = #{g : (N - g)·v_g > Σ_{i≤g} v_i};   c_i = ⌊(N - G)·Σ_{j≤i} v_j / Σ_{j≤G} v_j + ½⌋

Leader i of G gets the followers of ranks G + c_{i-1} to G + c_i. The definition is `fqt/householder.py`, and all four
arrays equal its own to the bit: sums are integers, quotients and scales float64 by operations that are rounded correctly
on every device. Nothing here waits for the device, and no shape depends on what it finds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import from_ordered, magnitude

TILE = 128  # rows among which groups="tile" looks for groups
LEADERS = (2048, 8)  # (BLOCK, num_warps) of the one program that walks over the sorted ranges
RANKS = (128, 4)  # (BLOCK, num_warps) of the kernels with a thread for each row


class Groups(NamedTuple):
    """The groups of N rows. Groups are numbered by the position of their leader among its tile's leaders, plus the tile's
    first row; a number that no group has is that of an empty one.

    order (N,) int32: rows, group by group, the leader first, then the followers by falling range. group (N,) int32: of
    each row. first (N + 1,) int32: where each group begins in order. s (N,) float32 of each group: what its followers are
    multiplied with; 1 for single rows, 0 for groups that are left as they are.
    """

    order: torch.Tensor
    group: torch.Tensor
    first: torch.Tensor
    s: torch.Tensor


# ---- arithmetic, as in fqt/householder.py


@triton.jit
def _exponent(x):
    """⌊log₂ x⌋ of normal float64 numbers, int64."""
    return (x.to(tl.int64, bitcast=True) >> 52) - 1023


@triton.jit
def _integers(v, largest, n):
    """n ranges, float64, in whole multiples of a power of two, such that all sums fit into 62 bits; zeros are 0."""
    shift = 61 - _exponent(tl.cast(n, tl.float64)) - _exponent(largest)
    return (v * ((shift + 1023) << 52).to(tl.float64, bitcast=True)).to(tl.int64)


@triton.jit
def _end(sums, led, rest):
    """c = ⌊rest · sums / led + ½⌋ int32, from int64 sums of which led is the last leader's, whose c is rest; of none, 0."""
    led = tl.maximum(led, 1)
    return (rest.to(tl.float64) * sums.to(tl.float64) / led.to(tl.float64) + 0.5).to(tl.int32)


@triton.jit
def _square_root(x):
    y = (x.to(tl.int64, bitcast=True) // 2 + (1023 << 51)).to(tl.float64, bitcast=True)
    for _ in tl.static_range(4):
        y = 0.5 * (y + x / y)
    return y


@triton.jit
def _cube_root(x):
    y = (x.to(tl.int64, bitcast=True) // 3 + (715094163 << 32)).to(tl.float64, bitcast=True)
    for _ in tl.static_range(3):
        cube = y * y * y
        y = y * (cube + (x + x)) / (cube + cube + x)
    return y


@triton.jit
def _follower_scale(n, first, second):
    """s₂/s₁ of groups of n > 1 rows whose leader and largest follower have these ranges, all float64."""
    root = _square_root(n)
    d = n - root
    largest = tl.maximum(1 / root, tl.abs(1 - 1 / d))
    largest = tl.where(n > 2, tl.maximum(largest, 1 / d), largest)
    millionth = tl.full((), 1e-6, tl.float64)  # a literal would be rounded to float32
    w2 = tl.maximum(second, millionth * first) * largest
    return _cube_root(first / root * (n - 1) / w2)


@triton.jit
def _store_groups(order_ptr, group_ptr, first_ptr, s_ptr, start, rank, n, count, row, group, starts, sizes, v, second):
    """Write what is known of these ranks among n rows, of which `count` lead: the row of each rank, the group of a
    follower, and of a leader its followers' start, its size, its range and its largest follower's, float64."""
    leads = rank < count
    alone = count == 0  # every row is
    group = tl.where(leads | alone, rank, group)
    first = tl.where(leads, rank + starts, tl.where(alone, rank, n))
    position = tl.where(leads | alone, first, rank - count + group + 1)
    s = tl.where(leads & (sizes > 1), _follower_scale(tl.maximum(sizes, 2).to(tl.float64), v, second), 1)
    tl.store(order_ptr + start + position, start + row, mask=rank < n)
    tl.store(group_ptr + start + row, start + group, mask=rank < n)
    tl.store(first_ptr + start + rank, start + first, mask=rank <= n)
    tl.store(s_ptr + start + rank, s.to(tl.float32), mask=rank < n)


# ---- kernels


@triton.jit
def _row_ranges_kernel(partial_ptr, ranges_ptr, absmax_ptr, parts, M, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    hi = tl.full((BLOCK_S, BLOCK_M), -2147483648, tl.int32)
    lo = tl.full((BLOCK_S, BLOCK_M), -2147483648, tl.int32)
    second = partial_ptr + tl.cast(parts, tl.int64) * M
    for first in range(0, parts, BLOCK_S):
        part = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (part < parts) & (rows < M)[None, :]
        hi = tl.maximum(hi, tl.load(partial_ptr + part * M + rows[None, :], mask=mask, other=-2147483648))
        lo = tl.maximum(lo, tl.load(second + part * M + rows[None, :], mask=mask, other=-2147483648))
    high = from_ordered(tl.max(hi, 0))
    minus_low = from_ordered(tl.max(lo, 0))
    tl.store(ranges_ptr + rows, high + minus_low, mask=rows < M)
    tl.store(absmax_ptr + rows, tl.maximum(magnitude(high), magnitude(minus_low)), mask=rows < M)


@triton.jit
def _leaders_kernel(v_ptr, sums_ptr, led_ptr, N, BLOCK: tl.constexpr):
    # Leaders come first: the walk ends with the first block that has others.
    largest = tl.load(v_ptr, mask=N > 0, other=0.0).to(tl.float64)
    start = tl.full((), 0, tl.int32)
    count = tl.full((), 0, tl.int32)
    carry = tl.full((), 0, tl.int64)
    led = tl.full((), 0, tl.int64)
    while count == start:
        rank = start + tl.arange(0, BLOCK)
        whole = _integers(tl.load(v_ptr + rank, mask=rank < N, other=0.0).to(tl.float64), largest, N)
        sums = carry + tl.cumsum(whole, 0)
        leads = (N - 1 - rank) * whole > sums
        tl.store(sums_ptr + rank, sums, mask=rank < N)
        count += tl.sum(leads.to(tl.int32), 0)
        led += tl.sum(tl.where(leads, whole, 0), 0)
        carry += tl.sum(whole, 0)
        start += BLOCK
    tl.store(led_ptr, count.to(tl.int64))
    tl.store(led_ptr + 1, led)


@triton.jit
def _groups_kernel(
    v_ptr, row_ptr, sums_ptr, led_ptr, order_ptr, group_ptr, first_ptr, s_ptr, N, BLOCK: tl.constexpr
):  # fmt: skip
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(led_ptr).to(tl.int32)
    led = tl.load(led_ptr + 1)
    rest = N - count
    leads = rank < count
    starts = _end(tl.load(sums_ptr + rank - 1, mask=leads & (rank > 0), other=0), led, rest)
    ends = _end(tl.load(sums_ptr + rank, mask=leads, other=0), led, rest)
    # The group of a follower: the first whose end is beyond it.
    group = tl.zeros((BLOCK,), tl.int32)
    groups = count
    while groups > 1:
        half = groups // 2
        end = _end(tl.load(sums_ptr + group + (half - 1)), led, rest)
        group = tl.where(end <= rank - count, group + half, group)
        groups -= half
    row = tl.load(row_ptr + rank, mask=rank < N, other=0).to(tl.int32)
    v = tl.load(v_ptr + rank, mask=rank < N, other=0.0).to(tl.float64)
    second = tl.load(v_ptr + count + starts, mask=leads, other=0.0).to(tl.float64)
    _store_groups(
        order_ptr, group_ptr, first_ptr, s_ptr, 0, rank, N, count, row, group, starts, ends - starts + 1, v, second
    )  # fmt: skip


@triton.jit
def _tile_groups_kernel(ranges_ptr, order_ptr, group_ptr, first_ptr, s_ptr, M, TILE: tl.constexpr):
    start = tl.program_id(0) * TILE
    rank = tl.arange(0, TILE)
    n = tl.minimum(M - start, TILE)
    bits = tl.load(ranges_ptr + start + rank, mask=rank < n, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where((bits > 0) & (bits < 0x7F800000), bits, 0)
    # A range's bits have its order, of equal ones the first row has the largest key. What is no row has 0, which only row
    # TILE - 1 could have too.
    key = (bits.to(tl.int64) << 32) + (TILE - 1 - rank)
    key = tl.sort(tl.where(rank < n, key, 0), descending=True)
    row = TILE - 1 - (key & (TILE - 1)).to(tl.int32)
    v = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    whole = _integers(v, tl.max(v, 0), n)
    sums = tl.cumsum(whole, 0)
    leads = (n - 1 - rank) * whole > sums
    count = tl.sum(leads.to(tl.int32), 0)
    led = tl.sum(tl.where(leads, whole, 0), 0)
    rest = n - count
    starts = _end(tl.where(leads, sums - whole, 0), led, rest)
    ends = _end(tl.where(leads, sums, 0), led, rest)
    group = tl.zeros((TILE,), tl.int32)
    groups = count
    while groups > 1:
        half = groups // 2
        group = tl.where(tl.gather(ends, group + (half - 1), 0) <= rank - count, group + half, group)
        groups -= half
    second = tl.gather(v, count + starts, 0)
    _store_groups(
        order_ptr, group_ptr, first_ptr, s_ptr, start, rank, n, count, row, group, starts, ends - starts + 1, v, second
    )


@triton.jit
def _group_absmax_kernel(absmax_ptr, order_ptr, group_ptr, first_ptr, out_ptr, N, BLOCK: tl.constexpr):
    # By positions, so that the rows of a large group meet in a program before they meet in memory. The last row may be
    # there several times.
    position = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), N - 1)
    row = tl.load(order_ptr + position)
    group = tl.load(group_ptr + row)
    follows = tl.load(first_ptr + group) != position
    absmax = tl.load(absmax_ptr + row, mask=follows, other=0)
    lowest = tl.min(group, 0)
    if lowest == tl.max(group, 0):
        tl.atomic_max(out_ptr + lowest, tl.max(absmax, 0), sem="relaxed")
    else:
        tl.atomic_max(out_ptr + group, absmax, mask=follows, sem="relaxed")


# ---- launchers


def row_ranges(partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the ranges of M rows from their partial extremes (2, S, M) int32, contiguous: see `statistics`.

    Returns:
        (M,) float32 maximum minus minimum, and (M,) int32 bits of the largest magnitude. Of a row with a NaN or an
        infinity both are NaN or infinite.
    """
    _, parts, m = partial.shape
    ranges = torch.empty(m, dtype=torch.float32, device=partial.device)
    absmax = torch.empty(m, dtype=torch.int32, device=partial.device)
    if m:
        block_s, block_m = 16, 32
        _row_ranges_kernel[(triton.cdiv(m, block_m),)](
            partial, ranges, absmax, parts, m, BLOCK_S=block_s, BLOCK_M=block_m, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return ranges, absmax


def group_rows(ranges: torch.Tensor, groups: str = "global") -> Groups:
    """Launch the grouping of N rows by their ranges (N,) float32, contiguous and not negative; non-finite ones count as 0.

    groups: "global", among all rows, or "tile", among the rows of each 128.

    Raises:
        ValueError: another kind of groups.
    """
    if groups not in ("global", "tile"):
        raise ValueError(f"groups must be 'global' or 'tile', got {groups!r}")
    n = ranges.numel()
    new = lambda kind, size: torch.empty(size, dtype=kind, device=ranges.device)  # noqa: E731
    out = Groups(*(new(torch.int32, size) for size in (n, n, n + 1)), new(torch.float32, n))
    # The grids include rank n, for the end of first.
    if groups == "tile":
        _tile_groups_kernel[(n // TILE + 1,)](ranges, *out, n, TILE=TILE, num_warps=4, enable_fp_fusion=False)
        return out
    v, rows = torch.sort(torch.nan_to_num(ranges, 0.0, 0.0, 0.0), descending=True, stable=True)
    sums, led = new(torch.int64, n), new(torch.int64, 2)
    block, warps = LEADERS
    _leaders_kernel[(1,)](v, sums, led, n, BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    block, warps = RANKS
    _groups_kernel[(n // block + 1,)](
        v, rows, sums, led, *out, n, BLOCK=block, num_warps=warps, enable_fp_fusion=False
    )  # fmt: skip
    return out


def group_absmax(absmax: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Launch the maximum (N,) int32 of absmax (N,) int32 ≥ 0 over the followers of each group, 0 where there are none."""
    n = absmax.numel()
    out = torch.zeros(n, dtype=torch.int32, device=absmax.device)
    if n:
        block, warps = RANKS
        _group_absmax_kernel[(triton.cdiv(n, block),)](
            absmax, groups.order, groups.group, groups.first, out, n, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
