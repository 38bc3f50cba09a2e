"""Device arithmetic shared by the kernels: it neither loads nor stores.

Everything is float32 in the order that `fqt/reference.py` defines, so that codes agree with it to the last bit. Launchers
pass `enable_fp_fusion=False` for the same reason: a fused multiply-add would round once where the definition rounds twice.
"""

import triton
import triton.language as tl

# Constants of the kernels. A per-tensor, per-row or per-column scale; how zero sits in the code range.
PER_TENSOR, PER_ROW, PER_COLUMN = 0, 1, 2
SYMMETRIC, GRID, MIN = 0, 1, 2


@triton.jit
def ordered(x):
    """float32 → int32 of the same order, -0 below +0 and every NaN, whatever its sign, above infinity."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def magnitude(x):
    """`ordered` of |x|, whose bits have that order already."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def from_ordered(i):
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def at_least_tiny(scale, span):
    tiny = 1.1754943508222875e-38  # the smallest normal float32
    return tl.where((scale < tiny) & (span > 0), tiny, scale)


@triton.jit
def quantization_params(lo, hi, BITS: tl.constexpr, ZERO: tl.constexpr):
    """(scale, inv, z, i, offset) of groups with minimum lo and maximum hi; for SYMMETRIC, hi is the absolute maximum."""
    SHIFT: tl.constexpr = 1 << (BITS - 1)
    nought = hi * 0.0
    nought = tl.where(nought == nought, nought, 0.0)  # zero, also where hi is NaN or infinite
    if ZERO == 0:
        z = nought
        i = nought
        scale = at_least_tiny(tl.math.div_rn(hi, nought + (SHIFT - 1)), hi)
        scale = tl.where(hi == 0, 1.0, scale)
    elif ZERO == 2:
        z = lo
        i = nought
        scale = at_least_tiny(tl.math.div_rn(hi - lo, nought + (2 * SHIFT - 1)), hi - lo)
    else:
        # The comparisons are written so that a NaN stays.
        below = -tl.where(lo > 0, 0.0, lo)
        above = tl.where(hi < 0, 0.0, hi)
        span = below + above
        i = tl.floor(tl.math.div_rn(below, span) * (2 * SHIFT - 1))
        i = tl.where(span == 0, 0.0, i)
        narrow = (i == 0) & (below > 0)
        wide = tl.math.div_rn(below, tl.where(i == 0, 1.0, i))
        scale = tl.where(i == 0, tl.math.div_rn(above, nought + (2 * SHIFT - 1)), wide)
        # Not tl.maximum: it may drop a NaN.
        least = tl.math.div_rn(above, nought + (2 * SHIFT - 2))
        scale = tl.where(narrow, tl.where(below > least, below, least), scale)
        scale = at_least_tiny(scale, span)
        scale = tl.where(span == 0, 1.0, scale)
        i = tl.where(narrow, 1.0, i)
        z = nought
    inv = tl.where(scale == 0, 0.0, tl.math.div_rn(nought + 1.0, tl.where(scale == 0, 1.0, scale)))
    offset = z + (SHIFT - i) * scale
    return scale, inv, z, i, offset


@triton.jit
def random_bits(key, step, stream, rows, blocks):
    """16 random bits for each element of a tile, as int32 in [0, 65535].

    rows [BLOCK_M, 1] and blocks [1, BLOCK_N // 8] (column // 8) are the element's coordinates in the whole matrix, so
    that the bits do not depend on the tiling. One Philox4x32-7 call serves eight columns; see `fqt.reference.random_bits`.
    """
    nought = rows.to(tl.uint32) * 0 + blocks.to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox_impl(
        nought + blocks.to(tl.uint32),
        nought + rows.to(tl.uint32),
        nought + step.to(tl.uint32),
        (nought + stream).to(tl.uint32),  # an argument equal to 1 arrives as a constant, which has no .to()
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
        7,
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # To int32 at once: uint32 mixed with int32 would make every later sum unsigned.
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32, bitcast=True)


@triton.jit
def round_nearest(y):
    """Ties to even, for |y| < 2²²: adding 1.5·2²³ leaves no fraction bits."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def round_stochastic(y, bits):
    """floor(y + bits / 2¹⁶), y first rounded to a multiple of 2⁻¹⁶: an integer stays as it is, whatever the bits."""
    floor = tl.floor(y)
    fraction = round_nearest((y - floor) * 65536.0).to(tl.int32)
    return floor + ((fraction + bits) >> 16).to(tl.float32)


@triton.jit
def to_codes(rounded, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Clamp rounded values to the code range and shift affine ones by half of it: int32 codes that fit int8."""
    SHIFT: tl.constexpr = 1 << (BITS - 1)
    code = rounded.to(tl.int32)
    if ZERO == 0:
        code = tl.minimum(tl.maximum(code, 1 - SHIFT), SHIFT - 1)
    else:
        code = tl.minimum(tl.maximum(code, 0), 2 * SHIFT - 1) - SHIFT
    return code


@triton.jit
def tile_ids(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """The tile of program pid, columns of GROUP_M tiles at a time, so that neighbours in time share operands in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % size_m, (pid % width) // size_m


@triton.jit
def tile_offsets(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Rows [BLOCK_M, 1] and columns [1, BLOCK_N] within a tile, int32 unless WIDE.

    A tile's corner is one 64-bit address; an element needs 64 bits of its own only where rows lie very far apart. With
    an int64 offset for each element, unaligned tiles run out of registers.
    """
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    if WIDE:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    return m, n


def is_wide(*spans: int) -> bool:
    """Whether a tile that spans so many elements of memory needs int64 offsets. Runs on the host."""
    return max(map(abs, spans)) >= 2**31
