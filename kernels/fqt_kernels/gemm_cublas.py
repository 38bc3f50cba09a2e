"""The scaled int8 product of `gemm.py` by the vendor's library: `torch._int_mm`, then one pass over its int32 sums.

cuBLASLt (hipBLASLt on AMD) writes the sums qa qbᵀ to memory, 4 bytes each, and `_epilogue_kernel` reads each once, scales
it as `gemm.py` does, with its very function, and writes C: the results are equal bit for bit. The sums cost 4·M·N bytes of
memory and 8·M·N bytes of traffic, which a long K repays where the library's main loop is the faster one.
"""

import torch
import triton
import triton.language as tl

from ._device import is_wide, tile_offsets
from .gemm import MAX_INT32_TERMS, _check, _finish, _padded

# (BLOCK_M, BLOCK_N, num_warps): a warp reads 1 KB of a row, a thread keeps 16 sums; the vectors of columns are read once
# for 16 rows.
TILE = (16, 256, 8)
MAX_SUMS = 2**28  # sums at a time: 1 GiB that a step has to have to spare
MIN_M = 17  # of torch._int_mm on a GPU
UNIT = 8  # so it is of N, and eight outputs of 2 bytes are one store of 16


@triton.jit
def _epilogue_kernel(
    sums_ptr, c_ptr, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr,
    row_absmax_ptr, M, units_n, terms, units_cm, stride_sa, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Extents and strides in units: that they are multiples of UNIT, the compiler would not see by itself.
    N = units_n * UNIT
    stride_cm = units_cm * UNIT
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    mask = (first_m + m < M) & (first_n + n < N)
    sums = tl.load(sums_ptr + (first_m * N + first_n) + (m * N + n), mask=mask, other=0)
    vectors = (a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr)
    _finish(
        sums.to(tl.float32), vectors, c_ptr, row_absmax_ptr, first_m, first_n, M, N, terms,
        stride_cm, stride_sa, stride_sb, BLOCK_M, BLOCK_N, ADD, WIDE,
    )  # fmt: skip


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
) -> torch.Tensor:
    """C = A Bᵀ as `gemm.scaled_mm` computes it, with its arguments, for int8 codes and K up to 131 071.

    Codes whose K, rows' stride or address is no multiple of 16 are copied first, padded with zeros.

    Raises:
        TypeError: codes or out of a wrong dtype.   ValueError: an argument that does not fit the others, or, on a GPU,
        `reason_against` the shapes.
    """
    _check(a, b, (a_offset, b_offset, a_sum, b_sum), out_dtype, out, row_absmax, split_k=1)
    (m, terms), n = a.shape, b.shape[0]
    if reason := reason_against("cuda" if a.is_cuda else "", m, n, terms, a.dtype):
        raise ValueError(f"scaled_mm: {reason}")
    sums = torch._int_mm(_addressable(a), _addressable(b).t())
    c = torch.empty(m, n, dtype=out_dtype or torch.float32, device=a.device) if out is None else out
    stride_cm = c.stride(0)
    unit = UNIT if n % UNIT == 0 and stride_cm % UNIT == 0 else 1
    block_m, block_n, warps = TILE
    _epilogue_kernel[(-(-m // block_m) * -(-n // block_n),)](
        sums, c, a_scale, b_scale, a_offset, b_offset, a_sum, b_sum, bias, row_absmax,
        m, n // unit, terms, stride_cm // unit, int(a_scale.numel() > 1), int(b_scale is not None and b_scale.numel() > 1),
        BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit, ADD=out is not None, WIDE=is_wide(block_m * max(n, stride_cm)),
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return c


def reason_against(arch: str, m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> str | None:
    """Why `torch._int_mm` cannot multiply (m, k) by (n, k) codes transposed, None if it can.

    arch: "sm90", "gfx942", "" without a GPU, where it takes any extents. A K that it would refuse is padded.
    """
    if dtype != torch.int8:
        return f"the codes are {dtype}, not int8"
    if min(m, n, k) < 1:
        return f"an extent of {m}x{n}x{k} is 0"
    if k > MAX_INT32_TERMS:
        return f"an int32 sum of {k} products may overflow: at most {MAX_INT32_TERMS}"
    if m * n > MAX_SUMS:
        return f"{m}x{n} sums would take {m * n >> 28} GiB of memory"
    if arch and (m < MIN_M or n % UNIT):
        return f"torch._int_mm wants at least {MIN_M} rows and multiples of {UNIT} columns, not {m}x{n}"
    return None


def _addressable(q: torch.Tensor) -> torch.Tensor:
    """q, or a copy where the library might not read it: it may count on addresses of whole 16 bytes."""
    q = _padded(q)
    return q if q.is_meta or q.data_ptr() % 16 == 0 else q.clone()
