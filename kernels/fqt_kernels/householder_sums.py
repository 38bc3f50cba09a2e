"""Groups of rows as the kernels walk over them, and the sums of their followers.

Rows are worked on in the order of `Groups.order`, where a group is a run of positions, its leader first. Groups differ
much in size, so long runs are cut into pieces: a group of n rows into ⌊n / PIECE⌋ of PIECE rows, at least one, of which
the last has the rest as well. A program looks at a window of positions and works on the pieces that begin there: as much
work for each, no table of pieces, and nothing that the host would have to know.

    sum of followers = 2⁻ᵖ · Σ rint(x · 2ᵖ),   2ᵖ from the largest magnitude among the group's followers

in int64, so that the order of the additions, and with it the division into pieces, changes no bit. Source: the definition
in `fqt/householder.py`, `follower_sums`.
"""

import torch
import triton
import triton.language as tl

from ._device import inline_ptx, nearest_int
from .grouping import Groups
from .statistics import multiplier_stride

SUMS_ELEMENTS, SUMS_COLUMNS, SUMS_WARPS = 4096, 1024, 8  # of a tile of both kernels, the columns at most
SUMS_WINDOW = 64  # positions that a program of _follower_sums_kernel looks at
SUMS_PIECE = 64  # rows of a piece, at least


# ---- pieces and rows


@triton.jit
def next_piece(order_ptr, group_ptr, first_ptr, window, after, M,
               PIECE: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """The first position of this window, later than `after`, where a piece of a group of at least LEAST rows begins;
    2³¹ - 1 if there is none. Found anew for each piece: a list of them would cost a loop a register."""
    at = window * WINDOW + tl.arange(0, WINDOW)
    inside = at < M
    g = tl.load(group_ptr + tl.load(order_ptr + at, mask=inside, other=0), mask=inside, other=0)
    start = tl.load(first_ptr + g)
    n = tl.load(first_ptr + g + 1) - start
    begins = ((at - start) % PIECE == 0) & ((at - start) // PIECE < tl.maximum(n // PIECE, 1))
    return tl.min(tl.where(inside & begins & (n >= LEAST) & (at > after), at, 2147483647), 0)


@triton.jit
def piece_at(order_ptr, group_ptr, first_ptr, begin, PIECE: tl.constexpr):
    """Of the piece that begins at a position: its group, where the group starts, how many rows that has, and where the
    piece stops."""
    g = tl.load(group_ptr + tl.load(order_ptr + begin))
    start = tl.load(first_ptr + g)
    end = tl.load(first_ptr + g + 1)
    return g, start, end - start, tl.where(end - begin < 2 * PIECE, end, begin + PIECE)


@triton.jit
def load_kept(ptrs, mask, KEEP: tl.constexpr):
    """What is at ptrs, 0 outside of the mask. KEEP: 1 asks the L2 to hold on to it, -1 to let go of it."""
    if KEEP == 1:
        return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last")
    elif KEEP == -1:
        return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_rows(x_ptr, order_ptr, at, stop, n, N, stride_xm, BLOCK_M: tl.constexpr, KEEP: tl.constexpr = 0):
    """The rows [BLOCK_M, 1] int64 at positions at, at + 1, …, and their columns n of x, 0 from position stop on.

    Nothing is computed with x here, so that a loop may load ahead.
    """
    position = at + tl.arange(0, BLOCK_M)[:, None]
    row = tl.load(order_ptr + position, mask=position < stop, other=0).to(tl.int64)
    return row, load_kept(x_ptr + row * stride_xm + n, (position < stop) & (n < N), KEEP)


@triton.jit
def multiplied(x, mul_ptr, row, n, N, stride_mul, MUL_ROWS: tl.constexpr):
    """x in float32, times the factors of its rows or of its columns where there is a multiplier."""
    x = x.to(tl.float32)
    if mul_ptr is not None:
        if MUL_ROWS:
            x = x * tl.load(mul_ptr + row * stride_mul)
        else:
            x = x * tl.load(mul_ptr + n.to(tl.int64) * stride_mul, mask=n < N, other=0.0)
    return x


# ---- sums


@triton.jit
def fixed_point(largest):
    """(2ᵖ, 2⁻ᵖ) float32, p = min(29 - ⌊log₂ a⌋, 126), of a magnitude a given by its int32 bits: a·2ᵖ < 2³⁰.

    2⁻ᵖ is NaN where a is NaN or infinite.
    """
    p = tl.minimum(156 - (largest >> 23), 126)
    up = ((p + 127) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(largest < 0x7F800000, (127 - p) << 23, 0x7FC00000)
    return up, unit.to(tl.float32, bitcast=True)


@triton.jit
def _whole(t, PTX: tl.constexpr):
    """t to the nearest int32, ties to even, for |t| ≤ 2³⁰; 0 for NaN."""
    if PTX and inline_ptx():
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [t], tl.int32, True, 1)
    else:
        return nearest_int(t)


@triton.jit
def follower_sum(x_ptr, mul_ptr, order_ptr, at, stop, up, n, N, stride_xm, stride_mul, MUL_ROWS: tl.constexpr,
                 PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 KEEP: tl.constexpr = 0):  # fmt: skip
    """[1, BLOCK_N] int64: the sums, in whole multiples of 1/up, of columns n of the rows at positions at to stop - 1."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    row, x = load_rows(x_ptr, order_ptr, at, stop, n, N, stride_xm, BLOCK_M, KEEP)
    for first in range(at, stop, BLOCK_M):
        next_row, next_x = load_rows(x_ptr, order_ptr, first + BLOCK_M, stop, n, N, stride_xm, BLOCK_M, KEEP)
        total += _whole(multiplied(x, mul_ptr, row, n, N, stride_mul, MUL_ROWS) * up, PTX)
        row, x = next_row, next_x
    return tl.sum(total, 0, keep_dims=True)


@triton.jit
def group_total(x_ptr, mul_ptr, order_ptr, absmax_ptr, total_ptr, g, start, size, n, N, stride_xm, stride_mul,
                MUL_ROWS: tl.constexpr, PTX: tl.constexpr, LEAST: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, KEEP: tl.constexpr = 0):  # fmt: skip
    """[1, BLOCK_N] float32: the sums of a group's followers, of a large group's those that `follower_totals` found."""
    total = tl.zeros((1, BLOCK_N), tl.float32)
    if size < LEAST:
        up, unit = fixed_point(tl.load(absmax_ptr + g))
        whole = follower_sum(
            x_ptr, mul_ptr, order_ptr, start + 1, start + size, up, n, N, stride_xm, stride_mul,
            MUL_ROWS, PTX, BLOCK_M, BLOCK_N, KEEP,
        )  # fmt: skip
        total = whole.to(tl.float32) * unit
    elif total_ptr is not None:
        total = tl.load(total_ptr + (start // LEAST).to(tl.int64) * N + n, mask=n < N, other=0.0)
    return total


@triton.jit
def _follower_sums_kernel(
    x_ptr, mul_ptr, order_ptr, group_ptr, first_ptr, absmax_ptr, total_ptr, partial_ptr, M, N, stride_xm, stride_mul,
    MUL_ROWS: tl.constexpr, PTX: tl.constexpr, PIECE: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    window = tl.program_id(0) // num_n
    begin = next_piece(order_ptr, group_ptr, first_ptr, window, -1, M, PIECE, LEAST, WINDOW)
    while begin < 2147483647:
        g, start, size, stop = piece_at(order_ptr, group_ptr, first_ptr, begin, PIECE)
        up, unit = fixed_point(tl.load(absmax_ptr + g))
        whole = follower_sum(
            x_ptr, mul_ptr, order_ptr, tl.maximum(begin, start + 1), stop, up, n, N, stride_xm, stride_mul,
            MUL_ROWS, PTX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        at = total_ptr + (start // LEAST).to(tl.int64) * N + n
        tl.store(at, whole.to(tl.float32) * unit, mask=(n < N) & (size < 2 * PIECE))
        if partial_ptr is not None:
            at = partial_ptr + (begin // PIECE).to(tl.int64) * N + n
            tl.store(at, whole, mask=(n < N) & (size >= 2 * PIECE))
        begin = next_piece(order_ptr, group_ptr, first_ptr, window, begin, M, PIECE, LEAST, WINDOW)


@triton.jit
def _follower_totals_kernel(
    partial_ptr, order_ptr, group_ptr, first_ptr, absmax_ptr, total_ptr, M, N,
    PIECE: tl.constexpr, LEAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # Of groups with two pieces or more at most one starts in so many positions.
    window = tl.program_id(0) // num_n
    start = next_piece(order_ptr, group_ptr, first_ptr, window, -1, M, 1 << 29, 2 * PIECE, 2 * PIECE)
    if start < 2147483647:
        g, _, size, _ = piece_at(order_ptr, group_ptr, first_ptr, start, PIECE)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
        for first in range(0, size // PIECE, BLOCK_M):
            piece = first + tl.arange(0, BLOCK_M)[:, None]
            at = partial_ptr + (start // PIECE + piece).to(tl.int64) * N + n
            total += tl.load(at, mask=(piece < size // PIECE) & (n < N), other=0)
        _, unit = fixed_point(tl.load(absmax_ptr + g))
        at = total_ptr + (start // LEAST).to(tl.int64) * N + n
        tl.store(at, tl.sum(total, 0, keep_dims=True).to(tl.float32) * unit, mask=n < N)


def all_registers(warps: int) -> dict[str, int]:
    """The option that gives a program of so many warps all the registers there are: left alone, NVIDIA's assembler spills
    one or two so that one more program fits."""
    return {"maxnreg": min(65536 // (32 * warps), 255)} if inline_ptx() else {}


def follower_totals(
    x: torch.Tensor,
    groups: Groups,
    largest: torch.Tensor,
    least: int,
    *,
    multiplier: torch.Tensor | None = None,
    ptx: bool = True,
) -> torch.Tensor | None:
    """Launch the sums of the followers of x ∘ multiplier, of the groups that have at least so many rows; least ≥ 2.

    x (M, N) float32, float16 or bfloat16 with contiguous rows; largest (M,) int32: the bits of the largest magnitude of
    each group's followers, see `grouping.group_absmax`.

    Returns:
        (⌈M / least⌉, N) float32, group g in row first[g] // least, and nothing in the other rows; None where M < least.
    """
    m, n = x.shape
    if m < least:
        return None
    new = lambda kind, rows: torch.empty(rows, n, dtype=kind, device=x.device)  # noqa: E731
    # About as many rows in a piece as the longest group has pieces.
    piece = max(SUMS_PIECE, 1 << m.bit_length() // 2)
    total = new(torch.float32, triton.cdiv(m, least))
    partial = new(torch.int64, triton.cdiv(m, piece)) if m >= 2 * piece else None
    block_n = min(max(triton.next_power_of_2(n), 64), SUMS_COLUMNS)
    num_n, (stride_mul, mul_rows) = triton.cdiv(n, block_n), multiplier_stride(multiplier)
    options = dict(PIECE=piece, LEAST=least, BLOCK_M=SUMS_ELEMENTS // block_n, BLOCK_N=block_n, num_warps=SUMS_WARPS,
                   **all_registers(SUMS_WARPS), enable_fp_fusion=False)  # fmt: skip
    _follower_sums_kernel[(triton.cdiv(m, SUMS_WINDOW) * num_n,)](
        x, multiplier, *groups[:3], largest, total, partial, m, n, x.stride(0), stride_mul,
        MUL_ROWS=mul_rows, PTX=ptx, WINDOW=SUMS_WINDOW, **options,
    )  # fmt: skip
    if partial is not None:
        _follower_totals_kernel[(triton.cdiv(m, 2 * piece) * num_n,)](
            partial, *groups[:3], largest, total, m, n, **options
        )
    return total
