"""The scaled int8 product of `gemm.py` for Hopper, in Gluon: persistent, warp-specialized, with asynchronous wgmma.

On int8, `tl.dot` waits for every block of K on sm_90. Here two roles share a program, which stays on its processor and
takes every so-manieth tile of the grouped walk:

- The producer, one warp with 24 registers, copies blocks of A and B by TMA into a ring of shared memory. A stage of the
  ring has two barriers: `full` completes when both blocks have landed, `empty` when they have been multiplied.
- The consumers, 8 warps with 240 registers, keep one wgmma in flight: at step i they start that of step i, wait for that
  of step i - 1, and free its stage. Then they finish the tile, while the producer already loads the next one. They are
  one partition of 8 warps, or two of 4 with a half of the tile's rows each. Two do not wait for each other: one may be as
  many steps ahead as the ring has stages, so that one multiplies while the other finishes its half.

Steps count on across tiles, and a step alone says which stage it uses and which parity its barriers have (`stage_of`,
`full_parity`, `empty_parity`, `freed_stage`). The epilogue rounds in the order of `gemm.py`, piece by piece: a piece is
as wide as the 128 bytes that TMA swizzles, and two of them take turns in shared memory. Its operands are read before the
main loop, those of a column by one thread each, which pass them around through shared memory after it.

Compiled and inspected for sm_90a with Triton 3.6, 3.7 and 3.9 (tests/codegen), the ring explored in every interleaving,
this source run on the CPU by the machine of tests/gluon.py (tests/test_gemm_hopper*.py); it has not run on a GPU yet.
"""

import torch
import triton

from . import _device
from ._gluon import (
    ABSENT,
    TensorDescriptor,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .gemm import GROUP_M, MAX_INT32_TERMS

CONSUMER_WARPS = 8
# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), num_warps of a partition of consumers: 8 of the only one, 4 of each
# of two. Tiles of 128x256 and 256x128 read the fewest bytes of shared memory for each product and fill it: 4 stages of
# 48 KB.
CONFIGS = [(128, 128, 128, 8, 4), (128, 128, 128, 4, 6), (128, 256, 128, 8, 4), (128, 256, 128, 4, 4),
           (256, 128, 128, 8, 4), (256, 128, 128, 4, 4)]  # fmt: skip
SHARED_BYTES = 227 * 1024  # that one program may have
PIECE_BYTES = 128  # the width of a piece of the output: the widest that TMA swizzles

tile_ids = jit(_device.tile_ids.fn)


@jit
def stage_of(step, STAGES: gl.constexpr):
    return step % STAGES


@jit
def full_parity(step, STAGES: gl.constexpr):
    """Of the phase of `full` that ends when the blocks of this step have landed."""
    return (step // STAGES) & 1


@jit
def empty_parity(step, STAGES: gl.constexpr):
    """Of the phase of `empty` that ends when the step before in this stage has read it; a fresh barrier is past it."""
    return (step // STAGES + 1) & 1


@jit
def freed_stage(step, STAGES: gl.constexpr):
    """The stage of step - 1, which no wgmma reads any longer once only that of `step` is in flight."""
    return stage_of(step + (STAGES - 1), STAGES)


@jit
def _produce(a_desc, b_desc, ring, GROUP_M: gl.constexpr):
    """Load every block of every tile of this program, each as soon as its stage is free."""
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    BLOCK_N: gl.constexpr = b_ring.shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    num_m = gl.cdiv(a_desc.shape[0], BLOCK_M)
    num_n = gl.cdiv(b_desc.shape[0], BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_ids(tile, num_m, num_n, GROUP_M)
        for k in range(0, a_desc.shape[1], BLOCK_K):
            stage = stage_of(step, STAGES)
            mbarrier.wait(empty.index(stage), empty_parity(step, STAGES))
            # Blocks that reach beyond the operands count in full: their rest is filled with zeros.
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma_load(a_desc, [tile_m * BLOCK_M, k], full.index(stage), a_ring.index(stage))
            tma_load(b_desc, [tile_n * BLOCK_N, k], full.index(stage), b_ring.index(stage))
            step += 1


@jit
def _consume(
    FIRST_ROW: gl.constexpr, staging, columns, ring, work,
    SB_COLUMN: gl.constexpr, TMA_STORE: gl.constexpr, GROUP_M: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Multiply this partition's rows of the blocks of every tile, from FIRST_ROW of the tile on, and finish and store
    them."""
    a_ring, b_ring, full, empty = ring
    M, N, K, c, operands, terms, stride_sa = work
    a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr = operands
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_M: gl.constexpr = a_ring.shape[1] // CONSUMERS
    BLOCK_N: gl.constexpr = b_ring.shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    ROWS: gl.constexpr = staging.shape[1]
    COLUMNS: gl.constexpr = staging.shape[2]
    ACROSS: gl.constexpr = BLOCK_N // COLUMNS
    WARPS: gl.constexpr = gl.num_warps()
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 32])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    num_m = gl.cdiv(M, BLOCK_M * CONSUMERS)
    num_n = gl.cdiv(N, BLOCK_N)
    sb = None
    ob = None
    if b_scale_ptr is not None and not SB_COLUMN:
        sb = gl.load(b_scale_ptr)
    if b_offset_ptr is not None:
        ob = gl.load(b_offset_ptr)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = tile_ids(tile, num_m, num_n, GROUP_M)
        first_m = tile_m * (BLOCK_M * CONSUMERS) + FIRST_ROW
        first_n = tile_n * BLOCK_N
        sa, oa, a_sum = (), (), ()  # of each run of ROWS rows
        for run in gl.static_range(BLOCK_M // ROWS):
            offs_m = first_m + run * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            sa += (_load(a_scale_ptr, offs_m, stride_sa, M),)
            if a_offset_ptr is not None:
                oa += (_load(a_offset_ptr, offs_m, stride_sa, M),)
            if b_offset_ptr is not None:
                a_sum += (_load(a_sum_ptr, offs_m, 1, M),)
        offs_n = first_n + gl.arange(0, BLOCK_N, line)
        if a_offset_ptr is not None:
            b_sum = _load(b_sum_ptr, offs_n, 1, N)
        if bias_ptr is not None:
            bias = _load(bias_ptr, offs_n, 1, N)
        column_scale = sb
        if SB_COLUMN:
            column_scale = _load(b_scale_ptr, offs_n, 1, N)

        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, acc_layout)
        for k in range(0, K, BLOCK_K):
            stage = stage_of(step, STAGES)
            mbarrier.wait(full.index(stage), full_parity(step, STAGES))
            a = a_ring.index(stage).slice(FIRST_ROW, BLOCK_M)
            b = b_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # The compiler puts a barrier of the partition's warps before this: none of them still reads the stage.
            mbarrier.arrive(empty.index(freed_stage(step, STAGES)), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(freed_stage(step, STAGES)))

        if SB_COLUMN:
            columns.index(0).store(column_scale)
        if a_offset_ptr is not None:
            u = b_sum.to(gl.float32)
            if b_scale_ptr is not None:
                u *= column_scale
            if ob is not None:
                u += ob * (terms * 1.0)
            columns.index(SB_COLUMN).store(u)
        if bias_ptr is not None:
            columns.index(columns.shape[0] - 1).store(bias.to(gl.float32))
        pieces = _pieces(acc, ROWS, COLUMNS)
        for i in gl.static_range(len(pieces)):
            part = gl.convert_layout(pieces[i], layout, assert_trivial=True)
            out = _finish(part, sa, oa, a_sum, i // ACROSS, sb, ob, columns, i % ACROSS * COLUMNS,
                          SB_COLUMN, a_offset_ptr is not None, bias_ptr is not None)  # fmt: skip
            _store(out, staging.index(i % staging.shape[0]), c, first_m + i // ACROSS * ROWS,
                   first_n + i % ACROSS * COLUMNS, M, N, staging.shape[0] - 1, TMA_STORE)  # fmt: skip
    tma_store_wait(0)


@jit
def _load(ptr, offs, stride, extent):
    """The elements of an operand of the epilogue, zeros beyond its end."""
    return gl.load(ptr + offs * stride, mask=offs < extent, other=0)


@jit
def _finish(
    acc, sa, oa, a_sum, RUN: gl.constexpr, sb, ob, columns, FIRST: gl.constexpr,
    SB_COLUMN: gl.constexpr, A_OFFSET: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The epilogue of `gemm.py` for a piece of the sums. sa, oa, a_sum: of each run of rows, the piece lying in RUN;
    what belongs to its columns is in `columns` from FIRST on."""
    layout: gl.constexpr = acc.type.layout
    out = acc.to(gl.float32) * gl.expand_dims(sa[RUN], 1)
    if SB_COLUMN:
        out *= _column(columns, 0, FIRST, layout)
    elif sb is not None:
        out *= sb
    if A_OFFSET:
        out += gl.expand_dims(oa[RUN], 1) * _column(columns, SB_COLUMN, FIRST, layout)
    if ob is not None:
        out += gl.expand_dims(ob * sa[RUN] * a_sum[RUN].to(gl.float32), 1)
    if BIAS:
        out += _column(columns, columns.shape[0] - 1, FIRST, layout)
    return out


@jit
def _pieces(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """x cut into a tuple of pieces of this shape, row by row. No value leaves its thread."""
    if x.shape[0] > ROWS:
        upper, lower = x.reshape([2, x.shape[0] // 2, x.shape[1]]).permute(1, 2, 0).split()
        return _pieces(upper, ROWS, COLUMNS) + _pieces(lower, ROWS, COLUMNS)
    elif x.shape[1] > COLUMNS:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _pieces(left, ROWS, COLUMNS) + _pieces(right, ROWS, COLUMNS)
    else:
        return (x,)


@jit
def _column(columns, row: gl.constexpr, first: gl.constexpr, layout: gl.constexpr):
    """What a row of `columns` holds from `first` on, for the columns [1, COLUMNS] of a piece of this layout."""
    part = columns.index(row).slice(first, layout.instr_shape[1])
    return gl.expand_dims(part.load(gl.SliceLayout(0, layout)), 0)


@jit
def _store(out, buffer, c, first_m, first_n, M, N, pending: gl.constexpr, TMA_STORE: gl.constexpr):
    """Store a piece through shared memory, where it matters for whole rows: by TMA, or with threads side by side."""
    if TMA_STORE:
        tma_store_wait(pending)
        buffer.store(out.to(buffer.dtype))
        fence_async_shared()
        tma_store(c, [first_m, first_n], buffer)
    else:
        WARPS: gl.constexpr = gl.num_warps()
        layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        buffer.store(out.to(buffer.dtype))
        m = gl.expand_dims(gl.arange(0, 2 * WARPS, gl.SliceLayout(1, layout)), 1)
        n = gl.expand_dims(gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout)), 0)
        c += first_m.to(gl.int64) * N + first_n
        ROWS: gl.constexpr = buffer.shape[0]
        # A few rows at a time: the addresses of a whole piece would be kept in registers, all through the main loop.
        for row in gl.static_range(0, ROWS, 2 * WARPS):
            mask = (m < M - first_m - row) & (n < N - first_n)
            gl.store(c + (m * N + n), buffer.slice(row, 2 * WARPS).load(layout), mask=mask)
            c += 2 * WARPS * N


@jit(do_not_specialize=["terms"])
def _hopper_scaled_mm_kernel(
    a_desc, b_desc, c, a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr,
    terms, stride_sa, SB_COLUMN: gl.constexpr, TMA_STORE: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, VECTORS: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = a_desc.block_shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_shape[0]
    OUT: gl.constexpr = c.dtype if TMA_STORE else c.dtype.element_ty
    PIECE: gl.constexpr = [16 * gl.num_warps(), 1024 // OUT.primitive_bitwidth]  # rows of PIECE_BYTES
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_shape, a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(128, OUT.primitive_bitwidth, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    staging = gl.allocate_shared_memory(OUT, [BUFFERS] + PIECE, out_layout)
    columns = gl.allocate_shared_memory(gl.float32, [VECTORS, BLOCK_N], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    M, N, K = a_desc.shape[0], b_desc.shape[0], a_desc.shape[1]
    operands = (a_scale_ptr, b_scale_ptr, a_offset_ptr, b_offset_ptr, a_sum_ptr, b_sum_ptr, bias_ptr)
    ring = (a_ring, b_ring, full, empty)
    work = (M, N, K, c, operands, terms, stride_sa)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (0, staging, columns, ring, work, SB_COLUMN, TMA_STORE, GROUP_M, CONSUMERS)),
                (_produce, (a_desc, b_desc, ring, GROUP_M)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        HALF: gl.constexpr = BLOCK_M // 2
        staging_2 = gl.allocate_shared_memory(OUT, [BUFFERS] + PIECE, out_layout)
        columns_2 = gl.allocate_shared_memory(gl.float32, [VECTORS, BLOCK_N], line)
        gl.warp_specialize(
            [
                (_consume, (0, staging, columns, ring, work, SB_COLUMN, TMA_STORE, GROUP_M, CONSUMERS)),
                (_consume, (HALF, staging_2, columns_2, ring, work, SB_COLUMN, TMA_STORE, GROUP_M, CONSUMERS)),
                (_produce, (a_desc, b_desc, ring, GROUP_M)),
            ],
            [4, 1],
            [240, 24],
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
    out_dtype: torch.dtype = torch.float32,
    config: tuple[int, int, int, int, int],
    processors: int,
) -> torch.Tensor:
    """Launch C = A Bᵀ as `gemm.scaled_mm` does, for int8 codes, on as many programs as there are processors.

    Codes that TMA cannot read, because their address or the stride of their rows is no multiple of 16, are copied first.

    Raises:
        ValueError: `reason_against` the shapes or the dtype.
    """
    (m, terms), n = a.shape, b.shape[0]
    if reason := reason_against("sm90", m, n, terms, a.dtype):
        raise ValueError(reason)
    c = torch.empty(m, n, dtype=out_dtype, device=a.device)
    block_m, block_n, block_k, warps, stages = config
    sb_column = int(b_scale is not None and b_scale.numel() > 1)
    vectors = max(1, sb_column + (a_offset is not None) + (bias is not None))
    piece = 16 * warps, PIECE_BYTES // c.element_size()
    consumers = CONSUMER_WARPS // warps
    left = SHARED_BYTES - 1024 - stages * (block_m + block_n) * block_k - consumers * vectors * block_n * 4
    buffers = min(2, left // (consumers * piece[0] * PIECE_BYTES))
    tma_store = n * c.element_size() % 16 == 0
    _hopper_scaled_mm_kernel[(min(processors, triton.cdiv(m, block_m) * triton.cdiv(n, block_n)),)](
        _descriptor(_aligned(a), block_m, block_k), _descriptor(_aligned(b), block_n, block_k),
        _descriptor(c, *piece) if tma_store else c,
        a_scale, b_scale, a_offset, b_offset, a_sum, b_sum, bias, terms, int(a_scale.numel() > 1),
        SB_COLUMN=sb_column, TMA_STORE=tma_store, STAGES=stages, BUFFERS=buffers, VECTORS=vectors, GROUP_M=GROUP_M,
        CONSUMERS=consumers, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return c


def reason_against(arch: str, m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> str | None:
    """Why this kernel cannot multiply (m, k) by (n, k) codes transposed, None if it can. arch: "sm90", "gfx942".

    Float8 is left to `gemm.py`: the tensor cores keep fewer bits than float32 of a sum, and a second accumulator, to which
    each block's sum is added, does not fit in the registers of these tiles.
    """
    if ABSENT:
        return ABSENT
    if dtype != torch.int8:
        return f"the codes are {dtype}, not int8"
    if arch != "sm90":
        return f"asynchronous wgmma needs sm_90, not {arch}"
    if min(m, n, k) < 1:
        return f"an extent of {m}x{n}x{k} is 0"
    if k > MAX_INT32_TERMS:
        return f"an int32 sum of {k} products may overflow: at most {MAX_INT32_TERMS}"
    if max(m, n) > 2**27:
        return f"{m}x{n} is too large for 32-bit offsets"
    return None


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """Of a matrix that is copied in blocks of this shape, rows of 128 bytes."""
    return TensorDescriptor.from_tensor(x, [rows, columns], gl.NVMMASharedLayout(128, 8 * x.element_size(), 2))


def _aligned(q: torch.Tensor) -> torch.Tensor:
    """q (R, K), or a copy with zero columns up to a multiple of 16, where TMA cannot read q itself."""
    if q.stride(1) == 1 and q.stride(0) % 16 == 0 and q.stride(0) >= q.shape[1] and q.data_ptr() % 16 == 0:
        return q
    rows, k = q.shape
    copy = torch.zeros(rows, k + -k % 16, dtype=q.dtype, device=q.device)
    copy[:, :k] = q
    return copy
