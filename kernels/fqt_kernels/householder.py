"""The block Householder transform of a matrix's rows, quantized to int8 codes as it is made, and the inverse.

With l a group's leader, t = s · (sum of its followers) and d = n - √n, n rows become

    leader  (l + t) / √n,        follower j  s·x_j + b,   b = l / √n - t / d

and each is quantized with the range that it then has. The inverse is that of z with s = 1, its followers times 1 / s. A
group with s = 0 is left as it is. The definition, of every rounding, is `fqt/householder.py`.

`_transform_kernel` holds whole rows: a program finds the sum of a group in registers and reads the rows again for the
codes, from the L2; the sums of large groups are found before, by many programs (`householder_sums`). Rows that do not
fit are walked along in tiles (`_long_transform_kernel`) with all sums found before.
"""

import torch
import triton
import triton.language as tl

from ._device import from_ordered, magnitude, quantization_params, random_words, round_codes, scaled, wraps
from .grouping import Groups, group_absmax
from .householder_sums import (
    all_registers,
    follower_totals,
    group_total,
    load_kept,
    load_rows,
    multiplied,
    next_piece,
    piece_at,
)
from .statistics import ZERO, empty_params, multiplier_stride

# Rows of a piece of a group: as many as leave 512 pieces. Groups of fewer than two pieces are summed by one program.
PIECES, PIECES_LEAST = (16, 8, 4), 512
ROWS_MAX = 8192  # columns of a row in registers, 16 a thread
ROWS_ELEMENTS, ROWS_PER_WARP = 512, 512  # of a program of _transform_kernel, at least; of its warps
# (BLOCK_M, BLOCK_N, num_warps) of a tile of _long_transform_kernel; rows that are no multiples of 16 are read one by one.
LONG_ROWS, ODD_ROWS = (16, 128, 4), (8, 64, 4)
INVERSE = (8, 256, 4)  # of _inverse_kernel: a group's columns are few enough to be read again from the L1 or the L2
INVERSE_PIECE = 16
CHOOSE = (16, 512, 4)  # (WINDOW, BLOCK, num_warps) of _choose_kernel: positions, rows of a group at a time


# ---- the reflection


@triton.jit
def _coefficients(size):
    """(1/√n, 1/d) float32 of a group of n rows, 1/d = 0 for n = 1."""
    n = size.to(tl.float64)
    root = tl.sqrt(n)
    return (1.0 / root).to(tl.float32), tl.where(size > 1, 1.0 / (n - root), 0.0).to(tl.float32)


@triton.jit
def _reflected(x, total, shift, factor, before, after, leads):
    """The leader's (x + total)·factor and the followers' (x·before + shift)·after, of which each has a factor of 1."""
    x = x * tl.where(leads, 1.0, before)
    return (x + tl.where(leads, total, shift)) * tl.where(leads, factor, after)


@triton.jit
def _extremes(y, mask, SYM: tl.constexpr):
    """(hi, lo) int32 of y, in whose order -NaN is below and NaN above all; the bits of |y| twice where SYM."""
    if SYM:
        hi = tl.where(mask, magnitude(y), 0)
        lo = hi
    else:
        bits = y.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        hi = tl.where(mask, bits, -2147483648)
        lo = tl.where(mask, bits, 2147483647)
    return hi, lo


@triton.jit
def _bounds(hi, lo, SYM: tl.constexpr):
    """(lo, hi) [BLOCK_M, 1] float32 of rows of `_extremes`, one of them NaN where an element is; the magnitude twice where
    SYM."""
    high = tl.max(hi, 1, keep_dims=True)
    if SYM:
        high = high.to(tl.float32, bitcast=True)
        low = high
    else:
        low = from_ordered(tl.min(lo, 1, keep_dims=True))
        high = from_ordered(high)
    return low, high


@triton.jit
def _codes(y, inv, zp, rng_ptr, stream, row, block, BITS: tl.constexpr, ZERO: tl.constexpr,
           STOCHASTIC: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """int8 codes of y, whose random bits are those of these rows [BLOCK_M, 1] and blocks [1, BLOCK_N // 8]."""
    words = 0
    if STOCHASTIC:
        words = random_words(tl.load(rng_ptr), tl.load(rng_ptr + 1), stream, row, block)
    return round_codes(scaled(y, inv, zp, ZERO, STOCHASTIC), words, BITS, ZERO, STOCHASTIC, False, PTX)


# ---- kernels


@triton.jit(do_not_specialize=["stream"])
def _transform_kernel(
    x_ptr, mul_ptr, order_ptr, group_ptr, first_ptr, s_ptr, absmax_ptr, total_ptr, rng_ptr,
    q_ptr, scale_ptr, offset_ptr, row_sum_ptr, range_ptr, M, N, stride_xm, stride_mul, stream,
    MUL_ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
    PIECE: tl.constexpr, LEAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    SYM: tl.constexpr = (ZERO == 0) & (q_ptr is not None)
    n = tl.arange(0, BLOCK_N)[None, :]
    block = tl.arange(0, BLOCK_N // 8)[None, :]
    begin = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), -1, M, PIECE, 1, PIECE)
    while begin < 2147483647:
        g, start, size, stop = piece_at(order_ptr, group_ptr, first_ptr, begin, PIECE)
        s = tl.load(s_ptr + g)
        root, d = _coefficients(size)
        total = tl.zeros((1, BLOCK_N), tl.float32)
        shift = tl.zeros((1, BLOCK_N), tl.float32)
        if (s != 0) & (size > 1):
            total = s * group_total(
                x_ptr, mul_ptr, order_ptr, absmax_ptr, total_ptr, g, start, size, n, N, stride_xm, stride_mul,
                MUL_ROWS, PTX, LEAST, BLOCK_M, BLOCK_N, 1,
            )  # fmt: skip
            row, x = load_rows(x_ptr, order_ptr, start, start + 1, n, N, stride_xm, 1)
            shift = multiplied(x, mul_ptr, row, n, N, stride_mul, MUL_ROWS) * root - total * d
        else:
            s = 1.0
            root = 1.0
        # From the last rows to the first: those that were added last are still near.
        first = begin + (stop - 1 - begin) // BLOCK_M * BLOCK_M
        row, x = load_rows(x_ptr, order_ptr, first, stop, n, N, stride_xm, BLOCK_M, -1)
        while first >= begin:
            earlier = first - BLOCK_M
            next_row, next_x = load_rows(
                x_ptr, order_ptr, earlier, tl.where(earlier >= begin, first, earlier), n, N, stride_xm, BLOCK_M, -1
            )
            position = first + tl.arange(0, BLOCK_M)[:, None]
            x = multiplied(x, mul_ptr, row, n, N, stride_mul, MUL_ROWS)
            y = _reflected(x, total, shift, root, s, 1.0, position == start)
            mask_m = position < stop
            mask = mask_m & (n < N)
            hi, lo = _extremes(y, mask, SYM)
            lo, hi = _bounds(hi, lo, SYM)
            if range_ptr is not None:
                tl.store(range_ptr + row, hi - lo, mask=mask_m)
            else:
                scale, inv, zp, offset = quantization_params(lo, hi, BITS, ZERO)
                q = _codes(y, inv, zp, rng_ptr, stream, row, block, BITS, ZERO, rng_ptr is not None, PTX)
                tl.store(q_ptr + row * N + n, q, mask=mask)
                tl.store(scale_ptr + row, scale, mask=mask_m)
                if offset_ptr is not None:
                    tl.store(offset_ptr + row, offset, mask=mask_m)
                if row_sum_ptr is not None:
                    inside = tl.where(mask, q.to(tl.int32), 0)
                    tl.store(row_sum_ptr + row, tl.sum(inside, 1, keep_dims=True), mask=mask_m)
            row, x = next_row, next_x
            first = earlier
        begin = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), begin, M, PIECE, 1, PIECE)


@triton.jit
def _long_tile(x_ptr, mul_ptr, total_ptr, row, mask_m, leads, leader, slot, n, N, stride_xm, stride_mul, s, root, d,
               reflects, MUL_ROWS: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Columns n of rows [BLOCK_M, 1] of the transformed matrix, of a group whose leader is another row or one of them."""
    total = tl.zeros(n.shape, tl.float32)
    shift = tl.zeros(n.shape, tl.float32)
    if total_ptr is not None:
        mask = n < tl.where(reflects, N, 0)
        total = s * tl.load(total_ptr + slot * N + n, mask=mask, other=0.0)
        x = load_kept(x_ptr + leader * stride_xm + n, mask, 1)
        shift = multiplied(x, mul_ptr, leader, n, N, stride_mul, MUL_ROWS) * root - total * d
    x = load_kept(x_ptr + row * stride_xm + n, mask_m & (n < N), KEEP)
    return _reflected(multiplied(x, mul_ptr, row, n, N, stride_mul, MUL_ROWS), total, shift, root, s, 1.0, leads)


@triton.jit(do_not_specialize=["stream"])
def _long_transform_kernel(
    x_ptr, mul_ptr, order_ptr, group_ptr, first_ptr, s_ptr, total_ptr, rng_ptr,
    q_ptr, scale_ptr, offset_ptr, row_sum_ptr, range_ptr, M, N, stride_xm, stride_mul, stream,
    MUL_ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    SYM: tl.constexpr = (ZERO == 0) & (q_ptr is not None)
    begin = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), -1, M, PIECE, 1, PIECE)
    while begin < 2147483647:
        g, start, size, stop = piece_at(order_ptr, group_ptr, first_ptr, begin, PIECE)
        s = tl.load(s_ptr + g)
        reflects = (s != 0) & (size > 1)
        root, d = _coefficients(size)
        root = tl.where(reflects, root, 1.0)
        s = tl.where(reflects, s, 1.0)
        leader = tl.load(order_ptr + start).to(tl.int64)
        slot = (start // 2).to(tl.int64)
        for at in range(begin, stop, BLOCK_M):
            position = at + tl.arange(0, BLOCK_M)[:, None]
            mask_m = position < stop
            row = tl.load(order_ptr + position, mask=mask_m, other=0).to(tl.int64)
            hi, lo = _extremes(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), False, SYM)
            for first_n in range(0, N, BLOCK_N):
                n = first_n + tl.arange(0, BLOCK_N)[None, :]
                y = _long_tile(
                    x_ptr, mul_ptr, total_ptr, row, mask_m, position == start, leader, slot, n, N, stride_xm, stride_mul,
                    s, root, d, reflects, MUL_ROWS, 1,
                )  # fmt: skip
                high, low = _extremes(y, mask_m & (n < N), SYM)
                hi = tl.maximum(hi, high)
                lo = tl.minimum(lo, low)
            low, high = _bounds(hi, lo, SYM)
            if range_ptr is not None:
                tl.store(range_ptr + row, high - low, mask=mask_m)
            else:
                scale, inv, zp, offset = quantization_params(low, high, BITS, ZERO)
                tl.store(scale_ptr + row, scale, mask=mask_m)
                if offset_ptr is not None:
                    tl.store(offset_ptr + row, offset, mask=mask_m)
                sums = tl.zeros((BLOCK_M, 1), tl.int32)
                for first_n in range(0, N, BLOCK_N):
                    n = first_n + tl.arange(0, BLOCK_N)[None, :]
                    y = _long_tile(
                        x_ptr, mul_ptr, total_ptr, row, mask_m, position == start, leader, slot, n, N, stride_xm,
                        stride_mul, s, root, d, reflects, MUL_ROWS, -1,
                    )  # fmt: skip
                    block = first_n // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
                    q = _codes(y, inv, zp, rng_ptr, stream, row, block, BITS, ZERO, rng_ptr is not None, PTX)
                    tl.store(q_ptr + row * N + n, q, mask=mask_m & (n < N))
                    if row_sum_ptr is not None:
                        inside = tl.where(mask_m & (n < N), q.to(tl.int32), 0)
                        sums += tl.sum(inside, 1, keep_dims=True)
                if row_sum_ptr is not None:
                    tl.store(row_sum_ptr + row, sums, mask=mask_m)
        begin = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), begin, M, PIECE, 1, PIECE)


@triton.jit
def _choose_kernel(
    order_ptr, group_ptr, first_ptr, s_ptr, before_ptr, after_ptr, M, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), -1, M, 1 << 29, 1, WINDOW)
    while start < 2147483647:
        g, _, size, _ = piece_at(order_ptr, group_ptr, first_ptr, start, 1 << 29)
        s = tl.load(s_ptr + g)
        n = size.to(tl.float64)
        # How a row's rounding error counts in the result's, ‖T⁻¹eᵢ‖²; math.md 1.5.
        square = s.to(tl.float64) * s.to(tl.float64)
        weight = 1.0 / n + (1.0 - 1.0 / n) / tl.where(square == 0, 1.0, square)
        weight = tl.where(square == 0, 1.0, weight)
        gain = tl.zeros((BLOCK,), tl.float64)
        for first in range(start, start + size, BLOCK):
            position = first + tl.arange(0, BLOCK)
            inside = position < start + size
            row = tl.load(order_ptr + position, mask=inside, other=0)
            before = tl.load(before_ptr + row, mask=inside, other=0.0).to(tl.float64)
            after = tl.load(after_ptr + row, mask=inside, other=0.0).to(tl.float64)
            gain += before * before - weight * (after * after)
        tl.store(s_ptr + g, tl.where(tl.sum(gain, 0) > 0, s, 0.0))
        start = next_piece(order_ptr, group_ptr, first_ptr, tl.program_id(0), start, M, 1 << 29, 1, WINDOW)


@triton.jit
def _inverse_kernel(
    z_ptr, out_ptr, order_ptr, group_ptr, first_ptr, s_ptr, absmax_ptr, total_ptr, range_ptr, value_ptr, column_ptr, M, N,
    PTX: tl.constexpr, PIECE: tl.constexpr, LEAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    column = tl.load(column_ptr + n, mask=n < N, other=0.0)
    window = tl.program_id(0) // num_n
    begin = next_piece(order_ptr, group_ptr, first_ptr, window, -1, M, PIECE, 1, PIECE)
    while begin < 2147483647:
        g, start, size, stop = piece_at(order_ptr, group_ptr, first_ptr, begin, PIECE)
        s = tl.load(s_ptr + g)
        root, d = _coefficients(size)
        inverse_s = (1.0 / s.to(tl.float64)).to(tl.float32)
        total = tl.zeros((1, BLOCK_N), tl.float32)
        shift = tl.zeros((1, BLOCK_N), tl.float32)
        if (s != 0) & (size > 1):
            total = group_total(
                z_ptr, None, order_ptr, absmax_ptr, total_ptr, g, start, size, n, N, N, 0,
                False, PTX, LEAST, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            _, leads = load_rows(z_ptr, order_ptr, start, start + 1, n, N, N, 1)
            shift = leads * root - total * d
        else:
            inverse_s = 1.0
            root = 1.0
        for at in range(begin, stop, BLOCK_M):
            row, z = load_rows(z_ptr, order_ptr, at, stop, n, N, N, BLOCK_M)
            position = at + tl.arange(0, BLOCK_M)[:, None]
            y = _reflected(z, total, shift, root, 1.0, inverse_s, position == start)
            # Of a row of equal elements the product is known.
            known = tl.load(value_ptr + row) * column
            y = tl.where(tl.load(range_ptr + row) == 0, known, y)
            tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=(position < stop) & (n < N))
        begin = next_piece(order_ptr, group_ptr, first_ptr, window, begin, M, PIECE, 1, PIECE)


# ---- launchers


def transform(
    x: torch.Tensor,
    groups: Groups,
    absmax: torch.Tensor,
    *,
    multiplier: torch.Tensor | None = None,
    bits: int,
    zero: str,
    rng: torch.Tensor | None = None,
    stream: int = 0,
    sums: bool = False,
    ranges: torch.Tensor | None = None,
    ptx: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the int8 codes of T (x ∘ multiplier), x (M, N) float32, float16 or bfloat16, any strides, M and N ≥ 1.

    They are those of `fqt.reference.householder_codes`, with a scale per row, in the order of the rows of x. A matrix whose
    rows are not contiguous is copied first. Nothing waits for the device.

    Args:
        groups: of the rows.   absmax: (M,) int32, the bits of the largest magnitude of each row of x ∘ multiplier.
        multiplier: (1, N) or (M, 1) float32.   bits: 2 to 8.   zero: "symmetric", "grid" or "min".
        rng, stream: of the stochastic rounding, as in `quantize.quantize`; without rng it is to nearest.
        sums: whether to return the sums of the codes along the rows.
        ranges: (M,) float32, those of the rows of x ∘ multiplier. If given, groups whose predicted variance the transform
            does not lower are left as they are: their s becomes 0, in place.
        ptx: False keeps to Triton's own operations on every GPU.

    Returns:
        q (M, N); scale and offset (None where symmetric) (M, 1) float32; row_sum (M,) int32 or None.
    """
    (m, n), dev = x.shape, x.device
    if wraps(n, LONG_ROWS[1]):
        raise ValueError(f"transform: rows of {n} elements are more than a kernel steps along in int32")
    x = x if n == 1 or x.stride(1) == 1 else x.contiguous()
    aligned = n % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    long = n > ROWS_MAX or not aligned
    piece = next((p for p in PIECES if m >= p * PIECES_LEAST), PIECES[-1])
    if long:
        block_m, block_n, warps = LONG_ROWS if aligned else ODD_ROWS
        piece, least = max(piece, block_m), 2
    else:
        block_n = max(triton.next_power_of_2(n), 8)
        block_m = min(max(ROWS_ELEMENTS // block_n, 1), piece)
        warps, least = max(block_m * block_n // ROWS_PER_WARP, 1), 2 * piece
    largest = group_absmax(absmax, groups)
    total = follower_totals(x, groups, largest, least, multiplier=multiplier, ptx=ptx)
    out = empty_params((m, 1), zero, dev)
    q = torch.empty(m, n, dtype=torch.int8, device=dev)
    row_sum = torch.empty(m, dtype=torch.int32, device=dev) if sums else None
    stride_mul, mul_rows = multiplier_stride(multiplier)
    options = dict(MUL_ROWS=mul_rows, BITS=bits, ZERO=ZERO[zero], PTX=ptx, PIECE=piece, BLOCK_M=block_m, BLOCK_N=block_n,
                   num_warps=warps, **all_registers(warps), enable_fp_fusion=False)  # fmt: skip
    if long:
        launch, found = _long_transform_kernel, (total,)
    else:
        launch, found = _transform_kernel, (largest, total)
        options["LEAST"] = least
    launch = launch[(triton.cdiv(m, piece),)]
    extents = (m, n, x.stride(0), stride_mul, stream)
    if ranges is not None:
        after = torch.empty(m, dtype=torch.float32, device=dev)
        launch(x, multiplier, *groups, *found, None, None, None, None, None, after, *extents, **options)
        window, block, warps = CHOOSE
        _choose_kernel[(triton.cdiv(m, window),)](
            *groups, ranges, after, m, WINDOW=window, BLOCK=block, num_warps=warps, enable_fp_fusion=False
        )
    launch(x, multiplier, *groups, *found, rng, q, out.scale, out.offset, row_sum, None, *extents, **options)
    return q, out.scale, out.offset, row_sum


def inverse(
    z: torch.Tensor,
    groups: Groups,
    absmax: torch.Tensor,
    *,
    ranges: torch.Tensor,
    value: torch.Tensor,
    columns: torch.Tensor,
    out_dtype: torch.dtype,
    ptx: bool = True,
) -> torch.Tensor:
    """Launch T⁻¹ z (M, K) in out_dtype for a contiguous float32 z, M and K ≥ 1: `fqt.householder.Householder.inverse`.

    Args:
        groups: of the rows, as `transform` left them.   absmax: (M,) int32, the bits of max |z| of each row, at least.
        ranges, value: (M,) float32 of the matrix that was transformed; columns (K,) float32. A row of range 0, which had
            `value` everywhere, becomes value · columns.
    """
    (m, k), (block_m, block_n, warps) = z.shape, INVERSE
    ranges, value, columns = ranges.contiguous(), value.contiguous(), columns.contiguous()
    least = 2 * INVERSE_PIECE
    largest = group_absmax(absmax, groups)
    total = follower_totals(z, groups, largest, least, ptx=ptx)
    out = torch.empty(m, k, dtype=out_dtype, device=z.device)
    _inverse_kernel[(triton.cdiv(m, INVERSE_PIECE) * triton.cdiv(k, block_n),)](
        z, out, *groups, largest, total, ranges, value, columns, m, k, PTX=ptx, PIECE=INVERSE_PIECE, LEAST=least,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, **all_registers(warps), enable_fp_fusion=False,
    )  # fmt: skip
    return out
