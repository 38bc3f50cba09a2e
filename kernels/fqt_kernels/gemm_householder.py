"""The scaled int8 product with the inverse of a block Householder transform in its epilogue: C = T⁻¹ (A Bᵀ), groups="tile".

A program computes the 128 rows of a tile, z = A Bᵀ as `gemm.py` does. Whole groups lie in a tile, and the rows are taken
in the order of the groups (`Groups.order`), so that those of a group, leader first, are neighbours. Of a group of n rows,
with d = n - √n and s the scale of the followers, the inverse of `fqt.householder` is a sum, a multiple of which each row
gets:

    b = z_leader / √n - Σ z_follower / d,   leader  z - (√n - 1) b,   follower  (z + b) / s

The sum is a segmented scan over the rows in float32, in an order that depends on the rows' places only: not on the columns
of a tile, the number of warps or the GPU. Nothing is multiplied with what another group has, so an element that is not
finite makes its group not finite, in its column, and leaves all else as it is.

Cost [derived]: on sm_90 16 instructions for each element of C, of which the CUDA cores issue those of a tile of 128x128 in
2 100 cycles, and 8 bytes through shared memory, 1 000 cycles; the main loop takes 33 000 for K = 8192 at the peak of the
tensor cores, and a pass of its own for the inverse 8 bytes of memory for each element, as much as 10 000 cycles. A product
of the tile with the 128x128 matrix T⁻¹ would take 6 100 of the tensor cores in 3xTF32, and let a NaN out of its group.
"""

import torch
import triton
import triton.language as tl

from ._device import is_wide, tile_ids
from .gemm import GROUP_M, MAX_INT32_TERMS, _affine, _check, _dot, _padded, _split, is_aligned
from .grouping import TILE, Groups

# (BLOCK_N, BLOCK_K, CHUNKS, num_warps, num_stages) by kind of GPU: the first one takes any C, the second one aligned rows.
CONFIGS = {
    "sm80": [(64, 64, 1, 8, 4), (128, 64, 4, 8, 4)],
    "sm90": [(64, 128, 1, 8, 4), (128, 128, 2, 8, 3)],
    "sm100": [(64, 128, 1, 4, 3), (128, 128, 4, 8, 3)],
    "amd": [(64, 64, 1, 4, 2), (128, 64, 2, 8, 2)],
}
MIN_TILES = 128  # with fewer, tiles of half the size occupy more of the GPU
BLOCK = 512  # of rows for which a program makes the weights


@triton.jit
def _householder_weights_kernel(
    order_ptr, group_ptr, first_ptr, s_ptr, ranges_ptr, bounds_ptr, weights_ptr, M, padded, BLOCK: tl.constexpr
):
    """What the inverse needs of the row at each place of the order, up to a multiple of a tile: bounds (2, padded) int32,
    the first and the last place of its group; weights (3, padded) of the form (z + w₁·Σ w₀z)·w₂, w₂ = 0 where the row's
    value is known. A row that is left as it is becomes a group of its own."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < M
    row = tl.load(order_ptr + place, mask=mask, other=0)
    group = tl.load(group_ptr + row, mask=mask, other=0)
    begin = tl.load(first_ptr + group, mask=mask, other=0)
    n = tl.load(first_ptr + group + 1, mask=mask, other=0) - begin
    s = tl.load(s_ptr + group, mask=mask, other=0.0)
    constant = tl.load(ranges_ptr + row, mask=mask, other=1.0) == 0
    alone = (s == 0) | (n < 2)
    leads = place == begin
    size = tl.where(alone, 2, n).to(tl.float64)
    root = tl.sqrt(size)
    give = tl.where(leads, 1 / root, -1 / (size - root)).to(tl.float32)
    take = tl.where(leads, 1 - root, 1).to(tl.float32)
    keep = (1 / tl.where(alone | leads, 1.0, s).to(tl.float64)).to(tl.float32)
    # z + 2⁻³⁰·z is z: infinities stay too, which a weight of 0 would make NaN.
    give = tl.where(alone, 1.0, give)
    take = tl.where(alone, 9.313225746154785e-10, take)
    inside = place < padded
    tl.store(bounds_ptr + place, tl.where(alone, place, begin), mask=inside)
    tl.store(bounds_ptr + padded + place, tl.where(alone, place, begin + n - 1), mask=inside)
    tl.store(weights_ptr + place, give, mask=inside)
    tl.store(weights_ptr + padded + place, take, mask=inside)
    tl.store(weights_ptr + 2 * padded + place, tl.where(constant, 0.0, keep), mask=inside)


@triton.jit
def _householder_mm_kernel(
    a_ptr, b_ptr, c_ptr, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr,
    order_ptr, bounds_ptr, weights_ptr, value_ptr, columns_ptr,
    M, N, K, terms, stride_am, stride_bn, stride_cm, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tile_ids(tl.program_id(0), num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = pid_m.to(tl.int64) * BLOCK_M
    first_n = pid_n.to(tl.int64) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    # Beyond the edge rows are read of the tile or of row 0, and not stored: no mask for them in the loop.
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * stride_am + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = _dot(a_ptrs, b_ptrs, offs_k, K, 0, tl.cdiv(K, BLOCK_K), BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)

    vectors = (a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, None)
    padded = num_m * BLOCK_M
    bounds_ptr += first_m
    weights_ptr += first_m
    keep = tl.load(weights_ptr + 2 * padded + tl.arange(0, BLOCK_M))
    constants = tl.min(keep) == 0
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)  # once more: they take no registers in the loop
    m = (rows - first_m.to(tl.int32))[:, None]
    if WIDE:
        m = m.to(tl.int64)
    WIDTH: tl.constexpr = BLOCK_N // CHUNKS
    chunks = _split(acc, CHUNKS)
    for i in tl.static_range(CHUNKS):
        offs_n = first_n + i * WIDTH + tl.arange(0, WIDTH)
        mask_n = offs_n < N
        z = _affine(chunks[i].to(tl.float32), vectors, rows, offs_n, mask_m, mask_n, terms, 1, stride_sb)
        out = _inverse(z, bounds_ptr, weights_ptr, padded, first_m.to(tl.int32))
        if constants:
            value = tl.load(value_ptr + rows, mask=mask_m, other=0.0)[:, None]
            columns = tl.load(columns_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
            out = tl.where((keep == 0)[:, None], value * columns, out)
        c_ptrs = c_ptr + (first_m * stride_cm + first_n + i * WIDTH) + (m * stride_cm + tl.arange(0, WIDTH)[None, :])
        tl.store(c_ptrs, out.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _inverse(z, bounds_ptr, weights_ptr, padded, first_m):
    """(z + w₁·Σ w₀z)·w₂ of the 128 rows of a tile, [128, WIDTH], in the order of the groups over which the sums are.

    A lane has four neighbouring rows of a column, a warp all 32 of its lanes: the gathers are shuffles.
    """
    WIDTH: tl.constexpr = z.shape[1]
    places = tl.arange(0, 128)[None, :]
    begin0, begin1, begin2, begin3 = _quarters(tl.load(bounds_ptr + places) - first_m)
    last0, last1, last2, last3 = _quarters(tl.load(bounds_ptr + padded + places) - first_m)
    give0, give1, give2, give3 = _quarters(tl.load(weights_ptr + places))
    take0, take1, take2, take3 = _quarters(tl.load(weights_ptr + padded + places))
    keep0, keep1, keep2, keep3 = _quarters(tl.load(weights_ptr + 2 * padded + places))
    z0, z1, z2, z3 = _quarters(tl.trans(z))  # [WIDTH, 32] each
    lane = tl.arange(0, 32)[None, :]
    place = 4 * lane  # of z0
    # Of each row the sum from the first row of its group, or the lane's first, on.
    s0 = give0 * z0
    s1 = give1 * z1
    s1 = tl.where(begin1 <= place, s0 + s1, s1)
    s2 = give2 * z2
    s2 = tl.where(begin2 <= place + 1, s1 + s2, s2)
    s3 = give3 * z3
    s3 = tl.where(begin3 <= place + 2, s2 + s3, s3)
    # The group of a lane's last row: its rows in the lanes before, twice as many at each step. Then what the lane before
    # has is added to the group that goes on in this one.
    carry = s3
    for i in tl.static_range(5):
        before = lane - (1 << i)
        carry = tl.where(before >= begin3 // 4, _of_lane(carry, tl.maximum(before, 0)) + carry, carry)
    carry = _of_lane(carry, tl.maximum(lane - 1, 0))
    s0 = tl.where(begin0 < place, carry + s0, s0)
    s1 = tl.where(begin1 < place, carry + s1, s1)
    s2 = tl.where(begin2 < place, carry + s2, s2)
    s3 = tl.where(begin3 < place, carry + s3, s3)
    # The whole sum is that of a group's last row, which is, in its lane, the last one of the group of the first row.
    ends = tl.where(last0 == place, s0, tl.where(last0 == place + 1, s1, tl.where(last0 == place + 2, s2, s3)))
    s3 = tl.where(last3 == place + 3, s3, _of_lane(ends, last3 // 4))
    s2 = tl.where(last2 == place + 2, s2, s3)
    s1 = tl.where(last1 == place + 1, s1, s2)
    s0 = tl.where(last0 == place, s0, s1)
    even = tl.join((z0 + take0 * s0) * keep0, (z2 + take2 * s2) * keep2)
    odd = tl.join((z1 + take1 * s1) * keep1, (z3 + take3 * s3) * keep3)
    return tl.trans(tl.reshape(tl.join(even, odd), WIDTH, 128))


@triton.jit
def _quarters(x):
    """x [R, 128] as four [R, 32]: of column 4j + i, the j-th of the i-th."""
    even, odd = tl.split(tl.reshape(x, x.shape[0], 32, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _of_lane(x, lane):
    """x [R, 32] of other lanes, lane [1, 32]."""
    return tl.gather(x, tl.broadcast_to(lane, x.shape[0], 32), 1)


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
    out_dtype: torch.dtype | None = None,
    groups: Groups,
    ranges: torch.Tensor,
    value: torch.Tensor,
    columns: torch.Tensor,
    config: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Launch C = T⁻¹ (A Bᵀ), (M, N), for int8 a (M, K) and b (N, K) whose last stride is 1; M, N, K ≥ 1.

    a_scale and a_offset (M,); b_scale, b_offset, a_sum, b_sum and out_dtype as `gemm.scaled_mm` takes them.
    groups: of `grouping.group_rows` with groups="tile".
    ranges, value (M,), columns (N,), float32: a row of range 0 becomes value·columns.

    Raises:
        TypeError: codes of a wrong dtype.   ValueError: an argument that does not fit the others, or `reason_against`.
    """
    _check(a, b, (a_offset, b_offset, a_sum, b_sum), out_dtype, None, None, split_k=1)
    (m, terms), n = a.shape, b.shape[0]
    _check_rows(m, n, a_scale, a_offset, groups, ranges, value, columns)
    if reason := reason_against("", m, n, terms, a.dtype):
        raise ValueError(f"scaled_mm: {reason}")
    a, b = _padded(a), _padded(b)
    k = a.shape[1]
    block_n, block_k, chunks, warps, stages = config
    num_m = triton.cdiv(m, TILE)
    padded = num_m * TILE
    bounds = torch.empty(2, padded, dtype=torch.int32, device=a.device)
    weights = torch.empty(3, padded, dtype=torch.float32, device=a.device)
    _householder_weights_kernel[(triton.cdiv(padded, BLOCK),)](
        *groups, ranges, bounds, weights, m, padded, BLOCK=BLOCK, enable_fp_fusion=False
    )
    c = torch.empty(m, n, dtype=out_dtype or torch.float32, device=a.device)
    _householder_mm_kernel[(num_m * triton.cdiv(n, block_n),)](
        a, b, c, a_scale, b_scale, a_offset, b_offset, a_sum, b_sum, groups[0], bounds, weights, value, columns,
        m, n, k, terms, a.stride(0), b.stride(0), n, int(b_scale is not None and b_scale.numel() > 1),
        BLOCK_M=TILE, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M, CHUNKS=chunks,
        EVEN_K=k % block_k == 0, WIDE=is_wide(TILE * n), num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return c


def config(family: str, m: int, n: int) -> tuple[int, int, int, int, int]:
    """The configuration for an (m, n) output on a kind of GPU."""
    small, large = CONFIGS[family]
    tiles = triton.cdiv(m, TILE) * triton.cdiv(n, large[0])
    return large if is_aligned(n) and tiles >= MIN_TILES else small


def reason_against(arch: str, m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> str | None:
    """Why this kernel cannot multiply (m, k) by (n, k) codes transposed, None if it can; on every arch alike."""
    if dtype != torch.int8:
        return f"the codes are {dtype}, not int8"
    if min(m, n, k) < 1:
        return f"an extent of {m}x{n}x{k} is 0"
    if k > MAX_INT32_TERMS:
        return f"an int32 sum of {k} products may overflow: at most {MAX_INT32_TERMS}"
    return None


def _check_rows(m: int, n: int, a_scale, a_offset, groups, ranges, value, columns) -> None:
    order, group, first, s = groups
    for name, x, size, dtype in (
        ("a_scale", a_scale, m, torch.float32), ("a_offset", a_offset, m, torch.float32),
        ("order", order, m, torch.int32), ("group", group, m, torch.int32), ("first", first, m + 1, torch.int32),
        ("s", s, m, torch.float32), ("ranges", ranges, m, torch.float32), ("value", value, m, torch.float32),
        ("columns", columns, n, torch.float32),
    ):  # fmt: skip
        if x is not None and (x.shape != (size,) or x.dtype != dtype or not x.is_contiguous()):
            raise ValueError(f"scaled_mm: {name} must be ({size},) contiguous {dtype}, got {tuple(x.shape)} {x.dtype}")
