"""The scaled matrix product: C = A Bᵀ (+ bias) of two quantized operands, both with the contracted index last.

    A = qa·sa + oa,  B = qb·sb + ob   ⇒   C = sa·sb·(qa qbᵀ) + oa·(sb·Σqb + K·ob) + (ob·sa)·Σqa + bias

sa and oa per row of A or single, sb per row of B or single, ob single. One kernel serves fprop, dgrad and wgrad. Products
of int8 codes are summed in int32, which can hold 131 071 of them whatever the codes; longer sums continue in float32.
Products of float8 (e4m3) codes, which have no offsets, are summed in float32.
"""

import torch
import triton
import triton.language as tl

from ._device import is_wide, magnitude, tile_ids, tile_offsets

MAX_INT32_TERMS = 131_071

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by kind of GPU, by size of the output tile; the first row is safe.
# Of equal tiles dispatch takes the first; the others are candidates for tuning.
CONFIGS = {
    # 99 KiB of shared memory, of which sm_80 has more. Triton 3.8 and 3.9 spill 128x256, and 128x128 with 4 warps.
    "sm80": [(64, 64, 64, 4, 4), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3), (128, 128, 64, 8, 4)],
    "sm90": [
        (64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 128, 128, 4, 3), (128, 256, 128, 8, 3),
        (256, 128, 128, 8, 3), (128, 256, 256, 8, 2),
    ],
    "sm100": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3)],
    "amd": [(64, 64, 64, 4, 2), (128, 128, 64, 8, 2)],
}  # fmt: skip
# float8: two float32 tiles where sums of tensor cores are promoted (`_dot`), so that 128x256 would spill.
FP8_CONFIGS = {
    "sm89": [(64, 64, 128, 4, 3), (64, 128, 128, 4, 3), (128, 128, 128, 8, 3)],
    "sm90": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 128, 128, 8, 4)],
    "sm100": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3)],
}
# Sums that leave int32 keep a float32 tile beside the int32 one: half the tile, or registers spill.
FLUSH_CONFIG = {
    "sm80": (128, 64, 64, 8, 3),
    "sm90": (128, 64, 128, 8, 3),
    "sm100": (128, 64, 64, 8, 3),
    "amd": (128, 64, 128, 8, 2),
}
GROUP_M = 8


def is_aligned(stride: int) -> bool:
    """Whether rows of the output, so many elements apart, are stored in pieces of 16 bytes, whatever their dtype."""
    return stride % 16 == 0


def fits(config: tuple[int, int, int, int, int], stride: int) -> bool:
    """Whether a thread has the registers for its part of the tile. Rows of the output that are no multiples of 16
    elements are stored element by element, each with an address and a mask of its own: at most 64 of them a thread."""
    block_m, block_n, _, warps, _ = config
    return is_aligned(stride) or block_m * block_n <= 64 * 32 * warps


@triton.jit
def _scaled_mm_kernel(
    a_ptr, b_ptr, c_ptr, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr,
    row_absmax_ptr, partial_ptr, M, N, K, terms, stride_am, stride_bn, stride_cm, stride_sa, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr, FLUSH: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = pid_m.to(tl.int64) * BLOCK_M
    first_n = pid_n.to(tl.int64) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # K is a multiple of 16, terms of its columns count (the rest are zero codes). Rows beyond the edge read row 0 and
    # are not stored: no mask for them in the loop.
    a_ptrs = a_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_am + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    num_k = tl.cdiv(K, BLOCK_K)
    if FLUSH:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, num_k, FLUSH):
            last = tl.minimum(first + FLUSH, num_k)
            acc += _dot(a_ptrs, b_ptrs, offs_k, K, first, last, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K).to(tl.float32)
    elif partial_ptr is None:
        acc = _dot(a_ptrs, b_ptrs, offs_k, K, 0, num_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    else:
        share = tl.cdiv(num_k, tl.num_programs(1))
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, num_k)
        acc = _dot(a_ptrs, b_ptrs, offs_k, K, first, last, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
        if _add_partial(partial_ptr, acc, BLOCK_M, BLOCK_N) < tl.num_programs(1) - 1:
            return

    # The epilogue takes columns of the tile at a time: its vectors, addresses and tcgen05's sums, which come out of their
    # own memory, need registers for one chunk only.
    WIDTH: tl.constexpr = BLOCK_N // CHUNKS
    chunks = _split(acc, CHUNKS)
    vectors = (a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr)
    for i in tl.static_range(CHUNKS):
        if partial_ptr is None:
            chunk = chunks[i]
        else:
            chunk = tl.load(_partial(partial_ptr, i * WIDTH, BLOCK_M, BLOCK_N, WIDTH))
        _finish(
            chunk.to(tl.float32), vectors, c_ptr, row_absmax_ptr, first_m, first_n + i * WIDTH, M, N, terms,
            stride_cm, stride_sa, stride_sb, BLOCK_M, WIDTH, ADD, WIDE,
        )  # fmt: skip


@triton.jit
def _dot(a_ptrs, b_ptrs, offs_k, K, first, last,
         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Σ over the blocks first … last - 1 of K: in int32 of int8 codes, in float32 of float8.

    The tensor cores of sm_89 and sm_90 keep fewer bits than float32 of a sum of float8 products, so each block's sum is
    added to the others outside of them; a second tile of registers is the price. What keeps Triton from merging addition
    and product is max_num_imprecise_acc: on sm_90 its default (up to BLOCK_K, Triton adds registers that asynchronous wgmma
    has yet to write), before and after a number other than its default, 0. tcgen05 sums in memory of its own: merged.
    """
    FP8: tl.constexpr = a_ptrs.dtype.element_ty.is_fp8()
    WARPGROUPS: tl.constexpr = tl.target_info.cuda_capability_geq(9) and not tl.target_info.cuda_capability_geq(12)
    IMPRECISE: tl.constexpr = None if WARPGROUPS else BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if FP8 else tl.int32)
    for block in range(first, last):
        k = block * BLOCK_K
        if EVEN_K:
            a = tl.load(a_ptrs + k)
            b = tl.load(b_ptrs + k)
        else:
            a = tl.load(a_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
            b = tl.load(b_ptrs + k, mask=offs_k[:, None] < K - k, other=0.0)
        if FP8:
            acc += tl.dot(a, b, max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _add_partial(partial_ptr, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add acc to its tile's int32 sum; how many programs of the tile had done so before.

    The program that all others precede may read the whole sum with plain loads. The barrier orders the relaxed additions
    of every thread before the counter's, which one thread does for the program (Triton predicates scalar atomics); there,
    acq_rel releases them to the device, being cumulative, and acquires those of the programs counted before; the barrier
    behind which Triton passes the old count to the other threads orders their loads after it. int32 addition is
    associative, so the sum does not depend on the order.
    """
    tl.atomic_add(_partial(partial_ptr, 0, BLOCK_M, BLOCK_N, BLOCK_N), acc, sem="relaxed")
    tl.debug_barrier()
    counts_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
    return tl.atomic_add(counts_ptr + tl.program_id(0), 1, sem="acq_rel")


@triton.jit
def _partial(partial_ptr, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Where WIDTH columns of the sum of this program's tile lie: whole tiles, one after the other."""
    m, n = tile_offsets(BLOCK_M, WIDTH, False)
    return partial_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + first_n + (m * BLOCK_N + n)


@triton.jit
def _split(x, CHUNKS: tl.constexpr):
    """The columns of x in a tuple of 1, 2 or 4 chunks, from left to right. No value leaves its thread."""
    if CHUNKS == 1:
        chunks = (x,)
    elif CHUNKS == 2:
        chunks = _halves(x)
    else:
        left, right = _halves(x)
        chunks = _halves(left) + _halves(right)
    return chunks


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, x.shape[0], 2, x.shape[1] // 2), 0, 2, 1))


@triton.jit
def _finish(out, vectors, c_ptr, row_absmax_ptr, first_m, first_n, M, N, terms, stride_cm, stride_sa, stride_sb,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Scale the sums of products of the chunk at (first_m, first_n), add what the offsets and the bias do, and store it."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    out = _affine(out, vectors, offs_m, offs_n, mask_m, mask_n, terms, stride_sa, stride_sb)
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    c_ptrs = c_ptr + (first_m * stride_cm + first_n) + (m * stride_cm + n)
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        out += tl.load(c_ptrs, mask=mask, other=0.0).to(tl.float32)
    out = out.to(c_ptr.dtype.element_ty)
    tl.store(c_ptrs, out, mask=mask)
    if row_absmax_ptr is not None:
        # As stored. Integer maxima do not depend on the order of the atomics, and a NaN is the largest of all.
        absmax = tl.max(tl.where(mask, magnitude(out.to(tl.float32)), -2147483648), 1)
        tl.atomic_max(row_absmax_ptr + offs_m, absmax, mask=mask_m, sem="relaxed")


@triton.jit
def _affine(out, vectors, offs_m, offs_n, mask_m, mask_n, terms, stride_sa, stride_sb):
    """Sums of products of these rows and columns scaled, with what the offsets and the bias add."""
    a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr = vectors
    sa = tl.load(a_scale_ptr + offs_m * stride_sa, mask=mask_m, other=0.0)[:, None]
    out *= sa
    if b_scale_ptr is not None:
        sb = tl.load(b_scale_ptr + offs_n * stride_sb, mask=mask_n, other=0.0)[None, :]
        out *= sb
    if a_offset_ptr is not None:
        oa = tl.load(a_offset_ptr + offs_m * stride_sa, mask=mask_m, other=0.0)[:, None]
        u = tl.load(b_sum_ptr + offs_n, mask=mask_n, other=0)[None, :].to(tl.float32)
        if b_scale_ptr is not None:
            u *= sb
        if b_offset_ptr is not None:
            u += tl.load(b_offset_ptr) * (terms * 1.0)
        out += oa * u
    if b_offset_ptr is not None:
        row = tl.load(a_sum_ptr + offs_m, mask=mask_m, other=0)[:, None].to(tl.float32)
        out += tl.load(b_offset_ptr) * sa * row
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    return out


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor | None,
    *,
    a_offset: torch.Tensor | None = None,
    b_offset: torch.Tensor | None = None,
    a_sum: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    row_absmax: torch.Tensor | None = None,
    split_k: int = 1,
    config: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Launch C = A Bᵀ for a (M, K) and b (N, K), both int8 or both float8_e4m3fn, whose last stride is 1; M, N ≥ 1,
    K ≥ 0. Where K or a row's stride is no multiple of 16, the codes are copied first, padded with zeros.

    a_scale (M or 1,), b_scale (N or 1,) or None for 1, a_offset like a_scale, b_offset (1,), all float32; a_sum (M,) and
    b_sum (N,) int32, the row sums of the codes, needed where the other side has an offset; bias (N,) of any floating dtype.
    out_dtype: of a new C (float32). Or out: an existing C of contiguous rows, to which the product is added, rounded once.
    row_absmax (M,) int32: becomes the maximum of itself and the bits of |c| of a row, as stored (`statistics.row_stats`).
    split_k: how many programs share the sum of a tile. It changes no bit, and is for int8 on NVIDIA only.

    Raises:
        TypeError: codes or out of a wrong dtype.   ValueError: an argument that does not fit the others.
    """
    _check(a, b, (a_offset, b_offset, a_sum, b_sum), out_dtype, out, row_absmax, split_k)
    (m, terms), n = a.shape, b.shape[0]
    a, b = _padded(a), _padded(b)
    k = a.shape[1]
    block_m, block_n, block_k, warps, stages = config
    tiles, num_k = -(-m // block_m) * -(-n // block_n), -(-k // block_k)  # triton.cdiv takes 2 µs
    split_k = -(-num_k // -(-num_k // split_k)) if num_k else 1  # so that none is left without a block
    partial = None
    if split_k > 1:  # a sum and a count for each tile
        partial = torch.zeros(tiles * (block_m * block_n + 1), dtype=torch.int32, device=a.device)
    c = torch.empty(m, n, dtype=out_dtype or torch.float32, device=a.device) if out is None else out
    stride_cm = c.stride(0)
    # Of 16 elements a thread, in the largest tiles 32; a tile of so few stays whole where its rows are aligned.
    elements = block_m * block_n // (32 * warps)
    chunks = 1 if elements <= 32 and is_aligned(stride_cm) else min(max(elements // 16, 1), 4)
    flush = MAX_INT32_TERMS // block_k if terms > MAX_INT32_TERMS and a.dtype == torch.int8 else 0
    _scaled_mm_kernel[(tiles, split_k)](
        a, b, c, a_scale, b_scale, a_offset, b_offset, a_sum, b_sum, bias, row_absmax, partial,
        m, n, k, terms, a.stride(0), b.stride(0), stride_cm,
        int(a_scale.numel() > 1), int(b_scale is not None and b_scale.numel() > 1),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M, CHUNKS=chunks, EVEN_K=k % block_k == 0,
        FLUSH=flush, ADD=out is not None, WIDE=is_wide(block_m * stride_cm), num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return c


def _check(a, b, affine, out_dtype, out, row_absmax, split_k: int) -> None:
    """Refuse what the kernel would compute wrongly without a word."""
    m, n = a.shape[0], b.shape[0]
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"scaled_mm: a and b must both be int8 or both float8_e4m3fn, got {a.dtype} and {b.dtype}")
    fp8 = a.dtype != torch.int8
    if fp8 and any(t is not None for t in affine):
        raise ValueError("scaled_mm: float8 codes have no offsets and no sums")
    if split_k < 1:
        raise ValueError(f"scaled_mm: split_k must be at least 1, got {split_k}")
    if split_k > 1:
        why = "the order of float8's float32 additions would change the result" if fp8 else None
        if a.shape[1] > MAX_INT32_TERMS:
            why = f"{a.shape[1]} terms leave int32, which holds {MAX_INT32_TERMS}"
        if torch.version.hip:  # a workgroup's barrier does not wait for the atomics of its other waves
            why = "the last program of a tile may miss additions on AMD"
        if why:
            raise ValueError(f"scaled_mm: split_k is {split_k}, but {why}")
    if out is not None:
        if out.dtype not in (torch.float32, torch.bfloat16, torch.float16) or out_dtype not in (None, out.dtype):
            raise TypeError(f"scaled_mm: out is {out.dtype}, wanted {out_dtype or 'float32, bfloat16 or float16'}")
        rows = out.dim() == 2 and out.stride(1) == 1 and (m == 1 or out.stride(0) >= n)
        if out.shape != (m, n) or not rows or out.device != a.device:
            raise ValueError(
                f"scaled_mm: out must be ({m}, {n}) of contiguous rows on {a.device}, "
                f"got {tuple(out.shape)} of strides {out.stride()} on {out.device}"
            )
    if row_absmax is not None and (
        row_absmax.shape != (m,) or row_absmax.dtype != torch.int32 or not row_absmax.is_contiguous()
        or row_absmax.device != a.device
    ):  # fmt: skip
        raise ValueError(
            f"scaled_mm: row_absmax must be ({m},) contiguous int32 on {a.device}, "
            f"got {tuple(row_absmax.shape)} {row_absmax.dtype} on {row_absmax.device}"
        )


def _padded(q: torch.Tensor) -> torch.Tensor:
    """q (R, K), with zero columns up to a multiple of 16: loads narrower than 16 bytes cost far more than this copy."""
    if q.shape[1] % 16 == 0 and q.stride(0) % 16 == 0:
        return q
    # As int8: not every operator of torch takes float8.
    return torch.nn.functional.pad(q.view(torch.int8), (0, -q.shape[1] % 16)).contiguous().view(q.dtype)
