"""Device arithmetic shared by the kernels: it neither loads nor stores.

Everything is float32 in the order that `fqt/reference.py` defines, so that codes agree with it to the last bit. Launchers
pass `enable_fp_fusion=False` for the same reason: a fused multiply-add would round once where the definition rounds twice.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target
from triton.runtime.jit import constexpr_function

# Constants of the kernels. A per-tensor, per-row or per-column scale; how zero sits in the code range of integers, or
# the bytes of float8_e4m3fn, which are symmetric.
PER_TENSOR, PER_ROW, PER_COLUMN = 0, 1, 2
SYMMETRIC, GRID, MIN, E4M3 = 0, 1, 2, 3


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
    tiny = 7.703719777548943e-34  # 2⁻¹¹⁰: 2¹⁶ / scale is finite
    return tl.where((scale < tiny) & (span > 0), tiny, scale)


@triton.jit
def quantization_params(lo, hi, BITS: tl.constexpr, ZERO: tl.constexpr):
    """(scale, inv, zp, offset) of groups with minimum lo and maximum hi; for symmetric codes, hi is the absolute maximum.

    zp is what `scaled` needs besides inv: the minimum itself (MIN), the code of zero (GRID), nothing (0) otherwise.
    """
    SHIFT: tl.constexpr = 1 << (BITS - 1)
    nought = hi * 0.0
    nought = tl.where(nought == nought, nought, 0.0)  # zero, also where hi is NaN or infinite
    if ZERO == 0 or ZERO == 3:
        LARGEST: tl.constexpr = 448 if ZERO == 3 else SHIFT - 1
        zp = nought
        offset = nought
        scale = at_least_tiny(tl.math.div_rn(hi, nought + LARGEST), hi)
        scale = tl.where(hi == 0, 1.0, scale)
    elif ZERO == 2:
        zp = lo
        scale = at_least_tiny(tl.math.div_rn(hi - lo, nought + (2 * SHIFT - 1)), hi - lo)
        offset = lo + SHIFT * scale
    else:
        # The comparisons are written so that a NaN stays.
        below = -tl.where(lo > 0, 0.0, lo)
        above = tl.where(hi < 0, 0.0, hi)
        span = below + above
        zp = tl.floor(tl.math.div_rn(below, span) * (2 * SHIFT - 1))
        zp = tl.where(span == 0, 0.0, zp)
        narrow = (zp == 0) & (below > 0)
        wide = tl.math.div_rn(below, tl.where(zp == 0, 1.0, zp))
        scale = tl.where(zp == 0, tl.math.div_rn(above, nought + (2 * SHIFT - 1)), wide)
        # Not tl.maximum: it may drop a NaN.
        least = tl.math.div_rn(above, nought + (2 * SHIFT - 2))
        scale = tl.where(narrow, tl.where(below > least, below, least), scale)
        scale = at_least_tiny(scale, span)
        scale = tl.where(span == 0, 1.0, scale)
        zp = tl.where(narrow, 1.0, zp)
        offset = (SHIFT - zp) * scale
    inv = tl.where(scale == 0, 0.0, tl.math.div_rn(nought + 1.0, tl.where(scale == 0, 1.0, scale)))
    return scale, inv, zp, offset


@triton.jit
def scaled(x, inv, zp, ZERO: tl.constexpr, FIXED: tl.constexpr):
    """What is rounded to a code, (x - z) · inv + i of `fqt.reference.quantize` without the terms that are nought.

    FIXED: times 2¹⁶. A power of two commutes with every rounding here, so it is applied to inv and i, once for a group.
    """
    if FIXED:
        inv = inv * 65536.0
    if ZERO == 2:
        return (x - zp) * inv
    elif ZERO == 1:
        return x * inv + (zp * 65536.0 if FIXED else zp)
    else:
        return x * inv


@triton.jit
def random_words(key, step, stream, rows, blocks):
    """[BLOCK_M, BLOCK_N // 2] uint32: 16 random bits for each of two neighbours of a row, the first in the low half.

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
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def random_bits(words):
    """[BLOCK_M, BLOCK_N] int32 in [0, 65535] of `random_words`."""
    # To int32 at once: uint32 mixed with int32 would make every later sum unsigned.
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32, bitcast=True)


@triton.jit
def nearest_int(t):
    """t to the nearest int32, ties to even, for |t| < 2³¹; 0 for NaN."""
    magic = tl.where(t < 0, -8388608.0, 8388608.0)
    t = tl.where(tl.abs(t) < 8388608.0, (t + magic) - magic, t)  # from 2²³ on float32 has no fraction bits
    return tl.where(t == t, t, 0.0).to(tl.int32)


@constexpr_function
def inline_ptx():
    """Whether kernels are being compiled for NVIDIA: the interpreter cannot run assembly, AMD has another."""
    return not knobs.runtime.interpret and current_target().backend == "cuda"


# Four neighbours a, b, c, d of a row: to int32, whole or in 16.16, less half the code range where affine, clamped, and
# their bytes packed. cvt makes 0 of NaN; dp2a adds the low or the high half of a random word. $0 is the result, $1 to
# $4 are a, c, b, d, $5 and $6 the words.
_TO_INT = "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $3; cvt.rni.s32.f32 c, $2; cvt.rni.s32.f32 d, $4;"
_ADD_BITS = """
dp2a.lo.u32.u32 a, $5, 1, a; dp2a.lo.u32.u32 b, $5, 256, b; dp2a.lo.u32.u32 c, $6, 1, c; dp2a.lo.u32.u32 d, $6, 256, d;
"""


@constexpr_function
def rounding_ptx(bits, zero, stochastic, clip):
    """The assembly that rounds four neighbours to codes of so many bits.

    Codes are clamped only where they can leave their range: unless clip, which is for ranges that may not hold, symmetric
    ones never do (tried with every mantissa), and those from the minimum up only at the upper end.
    """
    half = 2 ** (bits - 1)
    low, high, less = (1 - half, half - 1, 0) if zero == SYMMETRIC else (-half, half - 1, half)
    if stochastic:  # codes are the third byte of each word
        low, high, less = low << 16, high << 16 | 0xFFFF, less << 16
    each = [f"sub.s32 {{0}}, {{0}}, {less};"] if less else []
    each += [f"max.s32 {{0}}, {{0}}, {low};"] if clip or zero == GRID else []
    each += [f"min.s32 {{0}}, {{0}}, {high};"] if clip or zero != SYMMETRIC else []
    clamp = " ".join(line.format(x) for line in each for x in "abcd")
    byte = "0x0062" if stochastic else "0x0040"
    pack = f"prmt.b32 a, a, b, {byte}; prmt.b32 c, c, d, {byte}; prmt.b32 $0, a, c, 0x5410;"
    return "{ .reg .b32 a, b, c, d; " + _TO_INT + (_ADD_BITS if stochastic else " ") + clamp + pack + " }"


@triton.jit
def round_codes(y, words, BITS: tl.constexpr, ZERO: tl.constexpr, STOCHASTIC: tl.constexpr, CLIP: tl.constexpr,
                PTX: tl.constexpr):  # fmt: skip
    """int8 codes of y [BLOCK_M, BLOCK_N], 0 (less half the code range where affine) for NaN: the same bits either way.

    Integer codes are rounded to nearest with ties to even, or, STOCHASTIC, are floor(y + bits / 2¹⁶) with y first rounded
    to a multiple of 2⁻¹⁶, so that an integer stays as it is; y comes times 2¹⁶ then, and words are `random_words`.
    CLIP: y may be outside of the range of the codes by more than a rounding error.
    """
    if CLIP and ZERO != 3:  # an int32 has room for 2¹⁴ codes in 16.16, and for the bits on top; NaN stays
        y = tl.where(y > 1073741824.0, 1073741824.0, tl.where(y < -1073741824.0, -1073741824.0, y))
    if ZERO == 3:
        return _e4m3_bytes(y, words, STOCHASTIC, PTX)
    elif PTX and inline_ptx():
        even, odd = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
        if STOCHASTIC:
            pair = tl.inline_asm_elementwise(
                rounding_ptx(BITS, ZERO, True, CLIP), "=r,r,r,r,r,r,r", [even, odd, words], tl.int16, True, 2
            )
        else:
            pair = tl.inline_asm_elementwise(
                rounding_ptx(BITS, ZERO, False, CLIP), "=r,r,r,r,r", [even, odd], tl.int16, True, 2
            )
        return tl.interleave(pair.to(tl.int8), (pair >> 8).to(tl.int8))
    else:
        SHIFT: tl.constexpr = 1 << (BITS - 1)
        if STOCHASTIC:
            code = (nearest_int(y) + random_bits(words)) >> 16
        else:
            code = nearest_int(y)
        if ZERO == 0:
            code = tl.minimum(tl.maximum(code, 1 - SHIFT), SHIFT - 1)
        else:
            code = tl.minimum(tl.maximum(code, 0), 2 * SHIFT - 1) - SHIFT
        return code.to(tl.int8)


@constexpr_function
def has_e4m3():
    """Whether the target converts to float8_e4m3fn by itself, rounding to nearest."""
    return inline_ptx() and current_target().arch >= 89


@triton.jit
def _e4m3_bytes(y, words, STOCHASTIC: tl.constexpr, PTX: tl.constexpr):
    """y as the bytes of float8_e4m3fn, |y| clamped to 448; 0 for NaN. See `fqt.reference.round_e4m3`."""
    y = tl.where(y == y, y, 0.0)
    if PTX and not STOCHASTIC and has_e4m3():
        even, odd = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
        pair = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,r,r", [even, odd], tl.int16, True, 1
        )
        return tl.interleave(pair.to(tl.int8), (pair >> 8).to(tl.int8))
    else:
        a = tl.abs(y)
        small = a < 0.015625  # below 2⁻⁶ the numbers are the multiples of 2⁻⁹
        if STOCHASTIC:
            # With 2⁻⁶ added, small ones have 20 bits below the last place as well, and 8 too many in the code.
            bits = tl.where(small, a + 0.015625, a).to(tl.int32, bitcast=True)
            code = ((bits + (random_bits(words) << 4)) >> 20) - tl.where(small, 968, 960)
        else:
            bits = a.to(tl.int32, bitcast=True)
            multiple = (a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 2¹⁴ has 2⁻⁹ as its last place
            code = tl.where(small, multiple, ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960)
        sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (tl.minimum(code, 0x7E) | sign).to(tl.int8)  # 0x7E is 448, 0x7F NaN


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


def wraps(extent: int, step: int) -> bool:
    """Whether a kernel's loop to the extent leaves int32 in its last step: larger extents are int64. Runs on the host."""
    return extent < 2**31 <= extent + step
