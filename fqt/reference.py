"""Every operator of fqt in plain torch: the specification, the oracle of the tests, and the backend without a GPU.

Bits, floats and integers are defined here to the last bit: a kernel that computes in float32 in the order written here
gives the same codes. Matrices are 2-D, of any strides; float16 and bfloat16 are computed in float32, float64 in float64.

Sources: StatQuant (arXiv 2010.14298); Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .householder import Householder
from .qtensor import Operand, QTensor
from .recipe import Quantizer, Recipe

SCALE_MIN = 2.0**-110  # below it 2¹⁶ / scale, which the kernels multiply with, could overflow
MAX_INT32_TERMS = 131_071  # products of two int8 codes that one int32 can always hold: 131 071 · 2¹⁴ < 2³¹
_EXACT_FLOAT_TERMS = 1024  # products of two int8 codes whose float32 sum is exact in any order: 1024 · 2¹⁴ = 2²⁴
E4M3_MAX = 448
_U32 = 0xFFFFFFFF


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- random bits and rounding


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, rounds: int = 7) -> list[Tensor]:
    """Philox4x32: four 32-bit words for each 128-bit counter under a 64-bit key; words are int64 in [0, 2³²)."""
    # Constants as tensors: with Python numbers each operation would convert them again.
    m0, m1, w0, w1, low, half = map(torch.tensor, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, _U32, 32))
    for _ in range(rounds):
        # An int64 product wraps modulo 2⁶⁴, which leaves both 32-bit halves right.
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> half & low) ^ c1 ^ k0, p1 & low, (p0 >> half & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + w0 & low, k1 + w1 & low
    return [c0, c1, c2, c3]


def random_bits(rng: Tensor, m: int, n: int, *, stream: int = 0, rank: int = 0) -> Tensor:
    """The 16 random bits of every element of an (m, n) matrix, as int32 in [0, 65535].

    A function of the key, the step, the stream, the rank and the element's row and column alone. One Philox call serves
    eight neighbours of a row: counter (column // 8, row, step, stream + 256 · rank), lane column % 8, two lanes a word,
    the low half first.

    Args:
        rng: (2,) int64, key and step; the step counts modulo 2³².
        stream: 0 to 255, tells the uses of one step apart.   rank: 0 to 2²⁴ - 1, tells data-parallel replicas apart.
    """
    key, step = rng[0], rng[1]
    blocks = (n + 7) // 8
    c0 = torch.arange(blocks, device=rng.device).expand(m, blocks)
    c1 = torch.arange(m, device=rng.device)[:, None].expand(m, blocks)
    words = philox(c0, c1, step & _U32, torch.as_tensor(stream + 256 * rank), key & _U32, key >> 32 & _U32)
    halves = [h for w in words for h in (w & 0xFFFF, w >> 16)]
    return torch.stack(halves, -1).reshape(m, blocks * 8)[:, :n].to(torch.int32)


def round_codes(y: Tensor, rounding: str, bits: Tensor | None = None) -> Tensor:
    """Round to integers: to nearest with ties to even, or stochastically with 16 random bits for each element.

    Stochastic: floor(y + bits / 2¹⁶) with y, |y| < 2¹⁴, first rounded to a multiple of 2⁻¹⁶. The mean is y to within
    2⁻¹⁷, and an integer y is returned as it is, whatever the bits.
    """
    if rounding == "nearest":
        return torch.round(y)
    return (torch.round(y * 65536.0).to(torch.int32) + bits >> 16).to(y.dtype)


def round_e4m3(y: Tensor, rounding: str, bits: Tensor | None = None) -> Tensor:
    """Round to float8_e4m3fn, |y| clamped to 448: to nearest with ties to even, or stochastically with 16 random bits.

    Stochastic: |y| + bits / 2¹⁶ of the distance to the next larger number, rounded down. The mean is y to within 2⁻¹⁶ of
    that distance, and a number of the format is returned as it is, whatever the bits.
    """
    y = y.to(torch.float32)
    if rounding == "nearest":
        return y.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    a = y.abs()
    small = a < 2.0**-6  # there the numbers are the multiples of 2⁻⁹, as between 2⁻⁶ and 2⁻⁵
    # 20 bits of float32's mantissa lie below the format's; with 2⁻⁶ added, of a small one as well.
    code = (torch.where(small, a + 2.0**-6, a).view(torch.int32) + (bits << 4) >> 20) - 960
    code = torch.where(small, code - 8, code).clamp(max=0x7E)  # 448; 0x7F would be NaN
    return torch.where(torch.signbit(y), code - 128, code).to(torch.int8).view(torch.float8_e4m3fn)


# ---- quantization


def quantization_params(
    lo: Tensor, hi: Tensor, bits: int, zero: str, format: str = "int"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scale and zero of the groups of elements whose minimum and maximum are lo and hi (float32 or float64, any shape).

    Returns (scale, inv, z, i, offset): a code is round((x - z) * inv + i) less 2**(bits-1) where affine, and
    x ≈ code * scale + offset. Nothing clips. Groups that are exact: all zero (symmetric, grid: scale 1) and all equal
    (min: scale 0). A non-finite lo or hi makes scale or offset non-finite, so that the whole group dequantizes to
    non-finite values.

    Source: StatQuant section 3.3 (min), its published code (grid); both affine forms with 2**bits - 1 bins.
    """
    nought = torch.zeros_like(lo)
    shift = 2 ** (bits - 1)
    if zero == "symmetric":
        z = i = nought
        amax = hi  # lo is -hi
        scale = _at_least_tiny(_divide(amax, E4M3_MAX if format == "e4m3" else shift - 1), amax)
        scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    elif zero == "min":
        z, i = lo, nought
        scale = _at_least_tiny(_divide(hi - lo, 2 * shift - 1), hi - lo)
    else:
        # The comparisons are written so that a NaN stays.
        below = -torch.where(lo > 0, nought, lo)
        above = torch.where(hi < 0, nought, hi)
        span = below + above
        i = torch.floor(below / span * (2 * shift - 1))
        i = torch.where(span == 0, nought, i)
        # Fewer negatives than half a bin of them: zero sits on code 1, and the bin is wide enough for both ends.
        narrow = (i == 0) & (below > 0)
        scale = torch.where(i == 0, _divide(above, 2 * shift - 1), below / i)
        scale = torch.where(narrow, torch.maximum(below, _divide(above, 2 * shift - 2)), scale)
        scale = _at_least_tiny(scale, span)
        scale = torch.where(span == 0, torch.ones_like(scale), scale)
        i = torch.where(narrow, torch.ones_like(i), i)
        z = nought
    inv = torch.where(scale == 0, nought, 1.0 / scale)
    offset = z + (shift - i) * scale
    return scale, inv, z, i, offset


def _divide(x: Tensor, n: int) -> Tensor:
    """x / n, correctly rounded: on a GPU torch multiplies by the reciprocal where the divisor is a Python number."""
    return x / torch.full_like(x, n)


def _at_least_tiny(scale: Tensor, span: Tensor) -> Tensor:
    return torch.where((scale < SCALE_MIN) & (span > 0), torch.full_like(scale, SCALE_MIN), scale)


def quantize(
    x: Tensor,
    quantizer: Quantizer,
    *,
    multiplier: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    rank: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
    row_absmax: Tensor | None = None,
) -> QTensor:
    """Quantize a matrix (PTQ, PSQ and their symmetric forms) to codes with q * scale + offset ≈ x * multiplier.

    Args:
        x: (M, N) floating point, any strides.
        quantizer: bits or format, granularity, zero and rounding; its householder flag is not looked at (see `householder`).
        multiplier: (M, 1) or (1, N), folded into x before anything else.
        rng, stream, rank: of the stochastic rounding, see `random_bits`.
        rows, cols: whether to return the codes row-major, transposed, or both.
        sums: whether to return the sums of the codes along the rows (if rows) and the columns (if cols).
        row_absmax: (M,) int32, or (1,) per_tensor: bits of the magnitudes that x * multiplier is quantized with, instead
            of those found in it (see `fqt.ranges`); of a symmetric quantizer, not per_column. What is larger clips.

    Returns:
        QTensor of int8 or float8_e4m3fn codes. A NaN or an infinity makes its whole row (per_row), column or tensor
        dequantize to non-finite values, and leaves the others alone.
    """
    m, n = x.shape
    y = x.to(compute_dtype(x))
    if multiplier is not None:
        y = y * multiplier.to(y.dtype)
    if row_absmax is None:
        lo, hi = _range(y, quantizer)
    else:
        hi = row_absmax.view(torch.float32)[:, None].to(y.dtype)
        lo = -hi
    bits = random_bits(rng, m, n, stream=stream, rank=rank) if quantizer.rounding == "stochastic" else None
    q, scale, offset = codes(y, lo, hi, quantizer, bits, given=row_absmax is not None)
    return QTensor(
        q=q if rows else None,
        qt=q.view(torch.int8).t().clone(memory_format=torch.contiguous_format).view(q.dtype) if cols else None,
        scale=scale,
        offset=offset,
        row_sum=q.sum(1, dtype=torch.int32) if sums and rows else None,
        col_sum=q.sum(0, dtype=torch.int32) if sums and cols else None,
    )


def codes(
    y: Tensor, lo: Tensor, hi: Tensor, quantizer: Quantizer, bits: Tensor | None = None, *, given: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, offset or None where symmetric) of y, float32 or float64 of any shape, in the ranges lo to hi.

    lo, hi: broadcast against y, and scale and offset have their shape.   bits: of y's shape, for a stochastic rounding.
    given: the ranges were not found in y, so that it may lie beyond them: it clips there.
    """
    scale, inv, z, i, offset = quantization_params(lo, hi, quantizer.bits, quantizer.zero, quantizer.format)
    symmetric = quantizer.zero == "symmetric"
    y = y * inv if symmetric else (y - z) * inv + i
    y = y.nan_to_num(0.0)  # NaN has no code; the scale carries it
    if quantizer.format == "e4m3":
        return round_e4m3(y, quantizer.rounding, bits), scale, None
    shift = 2 ** (quantizer.bits - 1)
    if given:  # fixed point has no room for what is far beyond the range
        y = y.clamp(1 - shift, shift - 1)
    q = round_codes(y, quantizer.rounding, bits)
    q = q.clamp(1 - shift, shift - 1) if symmetric else q.clamp(0, 2 * shift - 1) - shift
    return q.to(torch.int8), scale, None if symmetric else offset


def _range(y: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(lo, hi) of each group, shaped to broadcast against y; (-amax, amax) for a symmetric quantizer; 0 if empty."""
    dims = {"per_tensor": (0, 1), "per_row": (1,), "per_column": (0,)}[quantizer.granularity]
    shape = [1 if d in dims else y.shape[d] for d in (0, 1)]
    if y.numel() == 0:
        return y.new_zeros(shape), y.new_zeros(shape)
    if quantizer.zero == "symmetric":
        amax = y.abs().amax(dims, keepdim=True)
        return -amax, amax
    return y.amin(dims, keepdim=True), y.amax(dims, keepdim=True)


def widen_row_absmax(row_absmax: Tensor, c: Tensor) -> None:
    """Let row_absmax (M,) int32 cover the rows of c (M, N): the bits of max |c| in float32, whose order is the numbers'.

    NaN is above infinity. Initially all 0, or the least int32.
    """
    if c.shape[1]:
        row_absmax.copy_(torch.maximum(row_absmax, c.abs().float().view(torch.int32).amax(1)))


# ---- matrix products of codes


def codes_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product A Bᵀ of codes in a floating dtype: exact before the conversion for int8, summed in dtype for e4m3."""
    if a.dtype == torch.int8:
        return int_mm(a, b).to(dtype)
    return mm(a.to(dtype), b.to(dtype).t())


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product A Bᵀ of (M, K) and (N, K) int8: int32, or int64 where int32 could overflow (K > 131 071).

    In float32, in chunks of K whose sums are exact in any order: fast on every CPU, and exact also where float32 matrix
    products are allowed to run in TF32 or bfloat16, which hold every int8 code.
    """
    k = a.shape[1]
    total = None
    for start in range(0, k, _EXACT_FLOAT_TERMS):
        part = slice(start, min(start + _EXACT_FLOAT_TERMS, k))
        chunk = mm(a[:, part].float(), b[:, part].float().t()).to(torch.int32)
        if total is None:
            total = chunk if k <= MAX_INT32_TERMS else chunk.to(torch.int64)
        else:
            total += chunk
    return torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device) if total is None else total


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the operands' own dtype, whatever autocast would make of it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def scaled_mm(a: Operand, b: Operand, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The product A Bᵀ (+ bias) of two quantized operands, (M, N), from one exact integer matrix product.

    With A = qa·sa + oa and B = qb·sb + ob, offsets of A per row or single, the offset of B single, and
    no scale of B for 1:

        A Bᵀ = sa·sb·(qa qbᵀ) + oa·(sb·Σqb + K·ob) + (ob·sa)·Σqa

    Source: [derived]; integer arithmetic identities for affine operands.
    """
    dtype = a.scale.dtype
    k = a.q.shape[1]
    out = codes_mm(a.q, b.q, dtype) * a.scale[:, None]
    if b.scale is not None:
        out = out * b.scale[None, :]
    if a.offset is not None:
        u = b.sum.to(dtype) if b.scale is None else b.sum.to(dtype) * b.scale
        if b.offset is not None:
            u = u + b.offset * float(k)
        out = out + a.offset[:, None] * u[None, :]
    if b.offset is not None:
        out = out + (b.offset * a.scale * a.sum.to(dtype))[:, None]
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(out_dtype)


# ---- the three products of a layer, from their definition


def fprop(x: QTensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + bias, (M, N)."""
    y = x.dequantize() @ w.dequantize().t()
    return y if bias is None else y + bias


def dgrad(dy: Tensor, w: QTensor, recipe: Recipe, **random) -> Tensor:
    """dX = Q_b2(dY) W, (M, K): dequantized operands, a scale per output channel of W folded into dY first.

    dy: (M, N).   random: rng, stream and rank of the stochastic rounding.
    """
    if recipe.dgrad is None:
        return dy @ w.dequantize()
    if recipe.w.granularity == "per_tensor":
        return dequantized_gradient(dy, recipe.dgrad, **random) @ w.dequantize()
    return dequantized_gradient(dy, recipe.dgrad, multiplier=w.scale.t(), **random) @ w.q.to(w.scale.dtype)


def wgrad(dy: Tensor, x: QTensor, recipe: Recipe, **random) -> Tensor:
    """dW = Q_b1(dY)ᵀ X, (N, K): dequantized operands, a scale per sample of X folded into dY first."""
    if recipe.wgrad is None:
        return dy.t() @ x.dequantize()
    if recipe.x.granularity == "per_tensor":
        return dequantized_gradient(dy, recipe.wgrad, **random).t() @ x.dequantize()
    return dequantized_gradient(dy, recipe.wgrad, multiplier=x.scale, **random).t() @ x.q.to(x.scale.dtype)


def householder_codes(g: Tensor, quantizer: Quantizer, **more) -> tuple[Householder, QTensor]:
    """The block Householder transform of G (M, N), float32 or float64, and the codes of T G; more: as of `quantize`.

    An auto quantizer's transform is the identity in the groups where that has the smaller predicted variance.
    """
    h = Householder.of(g, quantizer.groups)
    y = h.apply(g)
    if quantizer.auto and g.shape[1]:
        h = h.where_better(*(t.amax(1) - t.amin(1) for t in (g, y)))
        y = h.apply(g)
    return h, quantize(y, quantizer, **more)


def dequantized_gradient(g: Tensor, quantizer: Quantizer, *, multiplier: Tensor | None = None, **random) -> Tensor:
    """Q_b(G · multiplier) as a float matrix (M, N): any gradient quantizer, BHQ included."""
    if not quantizer.householder:
        return quantize(g, quantizer, multiplier=multiplier, **random).dequantize()
    g = g.to(compute_dtype(g))
    g = g if multiplier is None else g * multiplier
    h, codes = householder_codes(g, quantizer, **random)
    return torch.where(h.constant, g[:, :1], h.inverse(codes.dequantize()))
