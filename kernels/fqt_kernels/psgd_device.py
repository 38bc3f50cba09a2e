"""What the programs of `psgd.py` are made of: where an item lies, the state before a step, the extremes after it."""

import triton
import triton.language as tl

from . import psgd_columns as at
from .position import absmax, advanced_range, advanced_threshold, points_scale, position_scale


@triton.jit
def item(items_ptr, table_ptr, BLOCK_M: tl.constexpr):
    """(row of the table, first row of the matrix or BLOCK_M times the number of the piece) of this program's item."""
    row_ptr = table_ptr + tl.load(items_ptr + 2 * tl.program_id(0)).to(tl.int64) * at.COLUMNS
    return row_ptr, tl.multiple_of(tl.load(items_ptr + 2 * tl.program_id(0) + 1).to(tl.int64), BLOCK_M)


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table. A number from memory carries no alignment of its own."""
    ptr = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def hyper(hyper_ptr, COLUMN: tl.constexpr):
    return tl.load(hyper_ptr + COLUMN).to(tl.float32)


@triton.jit
def span(row_ptr, first, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr):
    """(start, stride, lead, step, limit, height): the tiles of an item, BLOCK_M rows of a matrix or a piece of a tensor.

    Tile t has its element (m, n) at start + t·step + m·stride + n, and it is there where m < height and
    n + m·lead + t·step < limit.
    """
    rows, cols = tl.load(row_ptr + at.ROWS), tl.load(row_ptr + at.COLS)
    pieces = rows == 0
    start = first * tl.where(pieces, PIECE // BLOCK_M, cols)
    limit = tl.where(pieces, tl.minimum(cols - start, PIECE), cols).to(tl.int32)
    stride = tl.where(pieces, BLOCK_N, cols).to(tl.int32)
    lead = tl.where(pieces, BLOCK_N, 0)
    step = tl.where(pieces, BLOCK_M * BLOCK_N, BLOCK_N)
    height = tl.where(pieces, BLOCK_M, tl.minimum(rows - first, BLOCK_M)).to(tl.int32)
    if ALIGNED:
        start, stride, limit = tl.multiple_of(start, 16), tl.multiple_of(stride, 16), tl.multiple_of(limit, 8)
        lead, step = tl.multiple_of(lead, 16), tl.multiple_of(step, 16)
    return start, stride, lead, step, limit, height


@triton.jit
def has_range(flags):
    kind = flags & at.KIND
    return (kind >= 1) & (kind <= 3)


@triton.jit
def from_bits(i):
    return i.to(tl.float32, bitcast=True)


@triton.jit
def range_of_step(range_ptr, newest_ptr, rows, flags, mask):
    """(low, high) of the step, of rows of a range; 0 outside of the mask."""
    replace = (flags & (at.FRESH | at.ABSMAX)) != 0
    newest_low = 0.0 - from_bits(tl.load(newest_ptr + (at.EXTREMES + 2 * rows), mask=mask, other=0))
    newest_high = from_bits(tl.load(newest_ptr + (at.EXTREMES + 1 + 2 * rows), mask=mask, other=0))
    running = mask & ((flags & at.FRESH) == 0)
    low = tl.load(range_ptr + 2 * rows, mask=running, other=0.0)
    high = tl.load(range_ptr + (1 + 2 * rows), mask=running, other=0.0)
    return advanced_range(low, newest_low, replace), advanced_range(high, newest_high, replace)


@triton.jit
def threshold_of_step(row_ptr, threshold_ptr, newest_ptr, reach, flags, sparsity, mask):
    """The threshold of the step. reach: what the tensor's range reaches to, unless it is one of many channels."""
    held = tl.load(threshold_ptr, mask=mask, other=0.0)
    small = tl.load(newest_ptr + at.SMALL, mask=mask, other=0)
    of_channels = from_bits(tl.load(newest_ptr + at.REACH, mask=mask, other=0))
    rows, cols = tl.load(row_ptr + at.ROWS, mask=mask, other=0), tl.load(row_ptr + at.COLS, mask=mask, other=1)
    reach = tl.where((flags & at.PER_CHANNEL) != 0, of_channels, reach)
    advanced = advanced_threshold(held, small, tl.where(rows == 0, 1, rows) * cols, sparsity, reach)
    return tl.where((flags & at.FRESH_THRESHOLD) != 0, held, advanced)


@triton.jit
def fours(x):
    """[BLOCK_M, BLOCK_N] → [BLOCK_M, BLOCK_N // 4, 4]: four neighbours, which one thread holds."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4])


@triton.jit
def widened(low, high, x, mask):
    """Bits of minus the minimum and of the maximum, [BLOCK_M, BLOCK_N // 4] ≥ 0, with the finite ones of a tile added."""
    bits = x.to(tl.int32, bitcast=True)
    minus = bits ^ -2147483648  # the least int32 is the sign bit
    high = tl.maximum(high, tl.max(fours(tl.where(mask & (bits < 0x7F800000), bits, 0)), 2))
    return tl.maximum(low, tl.max(fours(tl.where(mask & (minus < 0x7F800000), minus, 0)), 2)), high


@triton.jit
def count_small(small, x, mask, threshold):
    return small + tl.sum(fours((mask & (tl.abs(x) <= threshold)).to(tl.int32)), 2)


@triton.jit
def publish(newest_ptr, low, high, small, rows, mask_m, flags, low_now, high_now, replace, COUNTS: tl.constexpr):
    """Write the extremes of an item's weights: those of channels, which no other program finds, or into the whole tensor's.

    low, high, small: of `widened` and `count_small`. low_now, high_now: the range that the next step advances from, unless
    replace.
    """
    channels = (flags & at.PER_CHANNEL) != 0
    whole = has_range(flags) & ((flags & at.PER_CHANNEL) == 0)
    row_low, row_high = tl.max(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True)
    mask = mask_m & channels & has_range(flags)
    tl.store(newest_ptr + (at.EXTREMES + 2 * rows), row_low, mask=mask)
    tl.store(newest_ptr + (at.EXTREMES + 1 + 2 * rows), row_high, mask=mask)
    if whole:
        tl.atomic_max(newest_ptr + at.LOW_NOW, tl.max(row_low), sem="relaxed")
        tl.atomic_max(newest_ptr + at.HIGH_NOW, tl.max(row_high), sem="relaxed")
    if COUNTS:
        if (flags & at.KIND) == 3:
            tl.atomic_add(newest_ptr + at.SMALL_NOW, tl.sum(small), sem="relaxed")
            next_low = advanced_range(low_now, 0.0 - from_bits(row_low), replace)
            next_high = advanced_range(high_now, from_bits(row_high), replace)
            reach = tl.where(mask, absmax(next_low, next_high).to(tl.int32, bitcast=True), 0)
            tl.atomic_max(newest_ptr + at.REACH_NOW, tl.max(reach), sem="relaxed")


@triton.jit
def finish(table_ptr, hypers_ptr, ticket_ptr, tensors, ADVANCE: tl.constexpr, ADAMW: tl.constexpr,
           RANGES: tl.constexpr, COUNTS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """The program that all others precede advances the state of all tensors, and makes the new extremes the newest.

    The barrier orders the loads of every thread before the ticket, which one thread takes for the program; that thread's are
    also all relaxed atomics before it, so that it releases them on AMD too, where a barrier does not wait for memory. Who
    takes the last ticket may read what all have found, and write what they have read.
    """
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for start in range(0, tensors, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            row_ptr = table_ptr + t.to(tl.int64) * at.COLUMNS
            flags = tl.load(row_ptr + at.FLAGS, mask=t < tensors, other=0).to(tl.int32)
            hyper_ptr = hypers_ptr + (flags >> at.GROUP_BITS) * at.HYPERS
            if RANGES:
                _finish_ranges(row_ptr, hyper_ptr, flags, ADVANCE, COUNTS)
            if ADVANCE and ADAMW:
                powers_ptr = tl.load(row_ptr + at.POWERS, mask=t < tensors, other=0).to(tl.pointer_type(tl.float64))
                first, second = _next_powers(powers_ptr, hyper_ptr, t < tensors)
                tl.debug_barrier()  # a number may be held by several threads
                tl.store(powers_ptr, first, mask=t < tensors)
                tl.store(powers_ptr + 1, second, mask=t < tensors)
        tl.store(ticket_ptr, 0)


@triton.jit
def _finish_ranges(row_ptr, hyper_ptr, flags, ADVANCE: tl.constexpr, COUNTS: tl.constexpr):
    ranges = has_range(flags)
    whole, counts = ranges & ((flags & at.PER_CHANNEL) == 0), (flags & at.KIND) == 3
    newest_ptr = tl.load(row_ptr + at.NEWEST, mask=ranges, other=0).to(tl.pointer_type(tl.int32))
    range_ptr = tl.load(row_ptr + at.RANGE, mask=ranges, other=0).to(tl.pointer_type(tl.float32))
    threshold_ptr = tl.load(row_ptr + at.THRESHOLD, mask=counts, other=0).to(tl.pointer_type(tl.float32))
    low, high = range_of_step(range_ptr, newest_ptr, flags * 0, flags, whole)
    threshold = low
    if COUNTS:
        sparsity = tl.load(hyper_ptr + at.SPARSITY, mask=counts, other=0.0).to(tl.float32)
        threshold = threshold_of_step(row_ptr, threshold_ptr, newest_ptr, absmax(low, high), flags, sparsity, counts)
    tl.debug_barrier()
    if ADVANCE:
        tl.store(range_ptr, low, mask=whole)
        tl.store(range_ptr + 1, high, mask=whole)
        if COUNTS:
            tl.store(threshold_ptr, threshold, mask=counts)
    tl.store(newest_ptr + at.EXTREMES, tl.atomic_xchg(newest_ptr + at.LOW_NOW, flags * 0, mask=whole), mask=whole)
    tl.store(
        newest_ptr + (at.EXTREMES + 1), tl.atomic_xchg(newest_ptr + at.HIGH_NOW, flags * 0, mask=whole), mask=whole
    )
    if COUNTS:
        tl.store(newest_ptr + at.SMALL, tl.atomic_xchg(newest_ptr + at.SMALL_NOW, flags * 0, mask=counts), mask=counts)
        tl.store(newest_ptr + at.REACH, tl.atomic_xchg(newest_ptr + at.REACH_NOW, flags * 0, mask=counts), mask=counts)


@triton.jit
def _next_powers(powers_ptr, hyper_ptr, mask):
    first = tl.load(powers_ptr, mask=mask, other=0.0) * tl.load(hyper_ptr + at.BETA1, mask=mask, other=0.0)
    second = tl.load(powers_ptr + 1, mask=mask, other=0.0) * tl.load(hyper_ptr + at.BETA2, mask=mask, other=0.0)
    return first, second


@triton.jit
def corrections(powers_ptr, hyper_ptr):
    """1 - β₁ᵗ and √(1 - β₂ᵗ) of the step."""
    first, second = _next_powers(powers_ptr, hyper_ptr, True)
    return (1.0 - first).to(tl.float32), tl.sqrt_rn((1.0 - second).to(tl.float32))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """(x in DTYPE, the same in float32): to nearest, ties to even."""
    if DTYPE == tl.bfloat16:  # the interpreter's conversion would cut off
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000) & -65536
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.float32, bitcast=True)
    else:
        y = x.to(DTYPE)
        return y, y.to(tl.float32)


@triton.jit
def learning_rate(row_ptr, hyper_ptr):
    lr_ptr = tl.load(row_ptr + at.LR_PTR)
    on_device = tl.load(lr_ptr.to(tl.pointer_type(tl.float32)), mask=lr_ptr != 0, other=0.0)
    return tl.where(lr_ptr != 0, on_device, hyper(hyper_ptr, at.LR))


@triton.jit
def sgd_numbers(row_ptr, hyper_ptr):
    return (
        learning_rate(row_ptr, hyper_ptr),
        hyper(hyper_ptr, at.DECAY),
        hyper(hyper_ptr, at.BETA),
        hyper(hyper_ptr, at.KEEP),
    )


@triton.jit
def sgd(x, g, s, held, numbers, flags, first_ptr, mask, DTYPE: tl.constexpr, MOMENTS: tl.constexpr):
    """The new weights, before they are rounded; writes the new momentum. held: the last one."""
    lr, decay, beta, keep = numbers
    after = (flags & at.UPDATE) != 0
    g = tl.where(after, g, g * s)
    g = tl.where(decay != 0.0, g + x * decay, g)
    if MOMENTS:
        has = (flags & at.MOMENTUM) != 0
        new = tl.where((flags & at.NEW) != 0, g, held * beta + g * keep)
        tl.store(first_ptr, rounded(new, DTYPE)[0], mask=mask & has)
        g = tl.where(has, tl.where((flags & at.NESTEROV) != 0, g + new * beta, new), g)
    return x - tl.where(after, g * s, g) * lr


@triton.jit
def adamw_numbers(row_ptr, hyper_ptr):
    lr = learning_rate(row_ptr, hyper_ptr)
    c1, c2 = corrections(pointer(row_ptr, at.POWERS, tl.float64, False), hyper_ptr)
    decay = 1.0 - lr * hyper(hyper_ptr, at.DECAY)
    betas = hyper(hyper_ptr, at.BETA1), hyper(hyper_ptr, at.NEW1), hyper(hyper_ptr, at.BETA2), hyper(hyper_ptr, at.NEW2)
    return lr, decay, betas, hyper(hyper_ptr, at.ADAM_EPS), c1, c2


@triton.jit
def adamw(x, g, s, first, second, numbers, flags, first_ptr, second_ptr, mask, DTYPE: tl.constexpr):
    """The new weights, before they are rounded; writes the new moments. first, second: the last ones."""
    lr, decay, betas, eps, c1, c2 = numbers
    beta1, new1, beta2, new2 = betas
    after = (flags & at.UPDATE) != 0
    g = tl.where(after, g, g * s)
    first = first * beta1 + g * new1
    second = second * beta2 + (g * g) * new2
    tl.store(first_ptr, rounded(first, DTYPE)[0], mask=mask)
    tl.store(second_ptr, rounded(second, DTYPE)[0], mask=mask)
    update = tl.math.div_rn(tl.math.div_rn(first, c1), tl.math.div_rn(tl.sqrt_rn(second), c2) + eps)
    return x * decay - tl.where(after, update * s, update) * lr


@triton.jit
def position_numbers(hyper_ptr):
    qmax, lam = hyper(hyper_ptr, at.QMAX), hyper(hyper_ptr, at.LAMBDA)
    return qmax, lam, hyper(hyper_ptr, at.LARGEST), hyper(hyper_ptr, at.EPS)


@triton.jit
def scale(x, reach, threshold, numbers, kind, points, points_lam,
           RANGES: tl.constexpr, POINTS: tl.constexpr):  # fmt: skip
    """s of a tile of weights; 1 where the tensor has no target."""
    qmax, lam, largest, eps = numbers
    s = tl.full(x.shape, 1.0, tl.float32)
    if RANGES:
        by_name = position_scale(x, reach, threshold, kind, qmax, lam, largest, eps)
        s = tl.where((kind >= 1) & (kind <= 3), by_name, s)
    if POINTS:
        s = tl.where(kind == 4, points_scale(x, points, points_lam, eps), s)
    return s
