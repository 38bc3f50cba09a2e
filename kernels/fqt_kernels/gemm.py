"""The scaled int8 matrix product: C = A Bᵀ (+ bias) of two quantized operands, both with the contracted index last.

    A = qa·sa + oa,  B = qb·sb + ob   ⇒   C = sa·sb·(qa qbᵀ) + oa·(sb·Σqb + K·ob) + (ob·sa)·Σqa + bias

sa and oa per row of A or single, sb per row of B or single, ob single. One kernel serves fprop, dgrad and wgrad. Products
are summed in int32, which can hold 131 071 of them whatever the codes; longer sums continue in float32.
"""

import torch
import triton
import triton.language as tl

from ._device import is_wide, tile_ids, tile_offsets

MAX_INT32_TERMS = 131_071

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by kind of GPU, by size of the output tile; the first row is safe.
CONFIGS = {
    "sm80": [(64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3)],
    "sm90": [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3)],
    # tcgen05 (Triton 3.8 and later) hands larger tiles to the epilogue in more registers than a thread has.
    "sm100": [(64, 64, 128, 4, 4), (64, 128, 128, 8, 4)],
    "amd": [(64, 64, 64, 4, 2), (128, 128, 64, 8, 2)],
}
# Sums that leave int32 keep a float32 tile beside the int32 one: half the tile, or registers spill.
FLUSH_CONFIG = {
    "sm80": (128, 64, 64, 8, 3),
    "sm90": (128, 64, 128, 8, 3),
    "sm100": (128, 64, 128, 8, 3),
    "amd": (128, 64, 128, 8, 2),
}
GROUP_M = 8


@triton.jit
def _scaled_mm_kernel(
    a_ptr, b_ptr, c_ptr, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr,
    M, N, K, terms, stride_am, stride_bn, stride_cm, stride_sa, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, FLUSH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_ids(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # K is a multiple of 16, terms of its columns count (the rest are zero codes). Rows beyond the edge read row 0 and
    # are not stored: no mask for them in the loop.
    a_ptrs = a_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_am + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    num_k = tl.cdiv(K, BLOCK_K)
    if FLUSH == 0:
        acc = _dot(a_ptrs, b_ptrs, offs_k, K, 0, num_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, num_k, FLUSH):
            last = tl.minimum(first + FLUSH, num_k)
            acc += _dot(a_ptrs, b_ptrs, offs_k, K, first, last, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K).to(tl.float32)

    mask_m = offs_m < M
    mask_n = offs_n < N
    sa = tl.load(a_scale_ptr + offs_m * stride_sa, mask=mask_m, other=0.0)[:, None]
    out = acc * sa
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
    c_tile = c_ptr + pid_m.to(tl.int64) * BLOCK_M * stride_cm + pid_n * BLOCK_N
    tile_m, tile_n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    c_ptrs = c_tile + (tile_m * stride_cm + tile_n)
    tl.store(c_ptrs, out.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _dot(a_ptrs, b_ptrs, offs_k, K, first, last,
         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Σ over the blocks first … last - 1 of K, in int32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in range(first, last):
        k = block * BLOCK_K
        if EVEN_K:
            a = tl.load(a_ptrs + k)
            b = tl.load(b_ptrs + k)
        else:
            a = tl.load(a_ptrs + k, mask=offs_k[None, :] < K - k, other=0)
            b = tl.load(b_ptrs + k, mask=offs_k[:, None] < K - k, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


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
    out_dtype: torch.dtype = torch.float32,
    config: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Launch C = A Bᵀ for a (M, K) and b (N, K) int8 whose last stride is 1; M, N ≥ 1, K ≥ 0. Where K or a row's
    stride is no multiple of 16, the codes are copied first, padded with zeros.

    a_scale (M or 1,), b_scale (N or 1,) or None for 1, a_offset like a_scale, b_offset (1,), all float32; a_sum (M,) and
    b_sum (N,) int32, the row sums of the codes, needed where the other side has an offset; bias (N,) of any floating dtype.
    """
    (m, terms), n = a.shape, b.shape[0]
    a, b = _aligned(a), _aligned(b)
    k = a.shape[1]
    c = torch.empty(m, n, dtype=out_dtype, device=a.device)
    block_m, block_n, block_k, warps, stages = config
    _scaled_mm_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        a, b, c, a_scale, b_scale, a_offset, b_offset, a_sum, b_sum, bias,
        m, n, k, terms, a.stride(0), b.stride(0), n,
        int(a_scale.numel() > 1), int(b_scale is not None and b_scale.numel() > 1),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M,
        EVEN_K=k % block_k == 0, FLUSH=0 if terms <= MAX_INT32_TERMS else MAX_INT32_TERMS // block_k,
        WIDE=is_wide(block_m * n), num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return c


def _aligned(q: torch.Tensor) -> torch.Tensor:
    """q (R, K), with zero columns up to a multiple of 16: loads narrower than 16 bytes cost far more than this copy."""
    if q.shape[1] % 16 == 0 and q.stride(0) % 16 == 0:
        return q
    return torch.nn.functional.pad(q, (0, -q.shape[1] % 16)).contiguous()
