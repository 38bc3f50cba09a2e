"""The optimizer's step of a weight that is held as int8 codes: W = q · scale is read, stepped and rounded stochastically
to new codes, row-major and transposed, with no float copy of it in memory. The definition is `fqt/optim/int8.py`.

A program walks over blocks of rows. The new scale of a row depends on all of its new values, so each block is read twice:
for its largest magnitudes, and (from the L2) for its codes. Before that a small kernel advances what is one for the whole
weight, and where the target needs the range of the weights, another finds it in the codes.

Nothing is kept here between steps: all state is the caller's, so that a CUDA graph can hold a step.
"""

import torch
import triton
import triton.language as tl

from ._device import is_wide, magnitude, random_words, round_codes, tile_offsets, wraps
from .householder_sums import all_registers
from .position import TARGETS, absmax, advanced_range, advanced_threshold, position_scale
from .psgd_device import rounded
from .psgd_table import Hyper
from .quantize import processors_and_l2, store_columns, store_rows

UPDATE = tl.constexpr(2)  # the stream of random bits
# (BLOCK_M, BLOCK_N, num_warps): 16 bytes of a transposed row; where rows or columns are no multiples of 16, fewer elements a
# thread, whose addresses take registers.
TILE, ODD_TILE = (16, 128, 8), (16, 32, 4)
RANGE_TILE = (16, 256, 8)
PROGRAMS = 4  # on a processor, at most: fewer where their rows would not fit in the L2
# What `_int8_prepare_kernel` leaves for the others, float32: whether there is a step, and its numbers; from MOMENTUM on
# those of `_numbers`. MOMENTUM and KEEP are what the first moment and g are multiplied with, DECAYED what AdamW's weights.
GO, LR, UNSCALE, DECAYED, C1, C2, REACH, THRESHOLD, MOMENTUM, KEEP, BETA2, KEEP2, DECAY, ADAM_EPS, QMAX, LAMBDA, LARGEST, \
    EPS, SPARSITY = map(tl.constexpr, range(19))  # fmt: skip
NUMBERS = tl.constexpr(11)


@triton.jit
def row_scale(scale, largest):
    """The scale of rows whose new values are up to largest, which may be NaN or infinite."""
    kept = (largest >= scale * 63.0) & (largest <= scale * 127.0)
    wider = tl.math.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)) * 1.125
    tiny = 7.703719777548943e-34  # 2⁻¹¹⁰
    wider = tl.where(wider < tiny, tiny, wider)
    return tl.where(kept | (largest == 0.0), scale, wider)


@triton.jit
def _stepped(q_ptr, g_ptr, first_ptr, second_ptr, s_ptr, params_ptr, scale, reach, mask, corner, offs,
             KIND: tl.constexpr, NEW: tl.constexpr, NESTEROV: tl.constexpr, SCALE_UPDATE: tl.constexpr):  # fmt: skip
    """(w', first moment, second moment) float32 of a tile, its elements offs from the corner. Moments that there are none
    of have no meaning.

    AdamW where there is a second moment, else SGD; in the order of `fqt.optim.loop`.
    """
    x = tl.load(q_ptr + corner + offs, mask=mask, other=0).to(tl.float32) * scale
    g = tl.load(g_ptr + corner + offs, mask=mask, other=0.0).to(tl.float32) * tl.load(params_ptr + UNSCALE)
    momentum, keep = tl.load(params_ptr + MOMENTUM), tl.load(params_ptr + KEEP)
    s = 1.0
    if KIND == 4:  # s itself is given
        s = tl.load(s_ptr + corner + offs, mask=mask, other=0.0)
    elif KIND != 0:
        s = position_scale(
            x, reach, tl.load(params_ptr + THRESHOLD), KIND, tl.load(params_ptr + QMAX),
            tl.load(params_ptr + LAMBDA), tl.load(params_ptr + LARGEST), tl.load(params_ptr + EPS),
        )  # fmt: skip
    if KIND != 0 and not SCALE_UPDATE:
        g = g * s
    first = x
    second = x
    if second_ptr is not None:
        x = x * tl.load(params_ptr + DECAYED)
        first = tl.load(first_ptr + corner + offs, mask=mask, other=0.0).to(tl.float32) * momentum + g * keep
        second = tl.load(second_ptr + corner + offs, mask=mask, other=0.0).to(tl.float32)
        second = second * tl.load(params_ptr + BETA2) + (g * g) * tl.load(params_ptr + KEEP2)
        nought = tl.zeros(x.shape, tl.float32)
        root = tl.math.div_rn(tl.sqrt_rn(second), nought + tl.load(params_ptr + C2))
        g = tl.math.div_rn(
            tl.math.div_rn(first, nought + tl.load(params_ptr + C1)), root + tl.load(params_ptr + ADAM_EPS)
        )
    else:
        decay = tl.load(params_ptr + DECAY)
        g = tl.where(decay != 0.0, g + x * decay, g)
        if first_ptr is not None:
            first = g
            if not NEW:
                first = tl.load(first_ptr + corner + offs, mask=mask, other=0.0).to(tl.float32) * momentum + g * keep
            g = g + first * momentum if NESTEROV else first
    if KIND != 0 and SCALE_UPDATE:
        g = g * s
    return x - g * tl.load(params_ptr + LR), first, second


@triton.jit
def _int8_step_kernel(
    q_ptr, qt_ptr, scale_ptr, rng_ptr, g_ptr, first_ptr, second_ptr, s_ptr, range_ptr, params_ptr, N, K,
    KIND: tl.constexpr, PER_ROW: tl.constexpr, NEW: tl.constexpr, NESTEROV: tl.constexpr, SCALE_UPDATE: tl.constexpr,
    PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    zero = tl.full((), 0, tl.int64)
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    offs = m * K + n
    reach = tl.load(params_ptr + REACH)
    key, step = tl.load(rng_ptr), tl.load(rng_ptr + 1) - 1  # which `_int8_prepare_kernel` has advanced
    blocks = tl.cdiv(tl.cdiv(N, BLOCK_M) - tl.program_id(0), tl.num_programs(0)) * tl.load(params_ptr + GO).to(tl.int32)
    for block in range(0, blocks):
        first_m = (tl.program_id(0) + block * tl.num_programs(0)).to(tl.int64) * BLOCK_M
        rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
        mask_m = rows < N
        scale = tl.load(scale_ptr + rows, mask=mask_m, other=1.0)
        row_reach = reach
        if PER_ROW:
            low = tl.load(range_ptr + 2 * rows, mask=mask_m, other=0.0)
            row_reach = absmax(low, tl.load(range_ptr + 2 * rows + 1, mask=mask_m, other=0.0))
        largest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for first_n in range(0, K, BLOCK_N):
            mask = mask_m & (first_n + n < K)
            corner = first_m * K + first_n
            new, _, _ = _stepped(
                q_ptr, g_ptr, first_ptr, second_ptr, s_ptr, params_ptr, scale, row_reach, mask, corner, offs,
                KIND, NEW, NESTEROV, SCALE_UPDATE,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.where(mask, magnitude(new), 0))
        new_scale = row_scale(scale, tl.max(largest, 1, keep_dims=True).to(tl.float32, bitcast=True))
        tl.store(scale_ptr + rows, new_scale, mask=mask_m)
        for first_n in range(0, K, BLOCK_N):
            mask_n = first_n + n < K
            mask = mask_m & mask_n
            corner = first_m * K + first_n
            new, first, second = _stepped(
                q_ptr, g_ptr, first_ptr, second_ptr, s_ptr, params_ptr, scale, row_reach, mask, corner, offs,
                KIND, NEW, NESTEROV, SCALE_UPDATE,
            )  # fmt: skip
            if first_ptr is not None:
                tl.store(first_ptr + corner + offs, rounded(first, first_ptr.dtype.element_ty)[0], mask=mask)
            if second_ptr is not None:
                tl.store(second_ptr + corner + offs, rounded(second, second_ptr.dtype.element_ty)[0], mask=mask)
            words = random_words(key, step, UPDATE, rows, (first_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :])
            q = round_codes(tl.math.div_rn(new, new_scale) * 65536.0, words, 8, 0, True, False, PTX)
            store_rows(q_ptr, None, q, mask_m, mask_n, first_m, first_n, K, BLOCK_M, BLOCK_N, WIDE)
            store_columns(qt_ptr, None, q, mask_m, mask_n, first_m, zero + first_n, N, BLOCK_M, BLOCK_N, WIDE)


@triton.jit
def _int8_extremes_kernel(
    q_ptr, scale_ptr, threshold_ptr, extremes_ptr, small_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each row, the extremes of its finite weights and 0, and how many are at most the threshold."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, n = tile_offsets(BLOCK_M, BLOCK_N, WIDE)
    rows = (first_m + tl.arange(0, BLOCK_M))[:, None]
    mask_m = rows < N
    scale = tl.load(scale_ptr + rows, mask=mask_m, other=0.0)
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first_n in range(0, K, BLOCK_N):
        mask = mask_m & (first_n + n < K)
        x = tl.load(q_ptr + (first_m * K + first_n) + (m * K + n), mask=mask, other=0).to(tl.float32) * scale
        if small_ptr is not None:
            small += (mask & (tl.abs(x) <= tl.load(threshold_ptr))).to(tl.int32)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN is 0 too
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    tl.store(extremes_ptr + 2 * rows, tl.min(low, 1, keep_dims=True), mask=mask_m)
    tl.store(extremes_ptr + 2 * rows + 1, tl.max(high, 1, keep_dims=True), mask=mask_m)
    if small_ptr is not None:
        tl.store(small_ptr + rows, tl.sum(small, 1, keep_dims=True), mask=mask_m)


@triton.jit
def _int8_prepare_kernel(
    params_ptr, rng_ptr, lr, grad_scale_ptr, powers_ptr, betas_ptr, range_ptr, threshold_ptr, extremes_ptr, small_ptr,
    skip_ptr, numbers, size, N,
    PER_ROW: tl.constexpr, REPLACE: tl.constexpr, LR_POINTER: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance the random stream, the powers of AdamW, the range and the threshold, unless the step is to be skipped; and
    leave the numbers of the step."""
    go = True
    if skip_ptr is not None:
        go = tl.load(skip_ptr) == 0.0
    if go:
        rate = tl.load(lr) if LR_POINTER else tl.full((), lr, tl.float32)  # in the interpreter numbers are float64
        unscale = tl.full((), 1.0, tl.float32)
        if grad_scale_ptr is not None:
            unscale = tl.math.div_rn(unscale, tl.load(grad_scale_ptr))
        tl.store(params_ptr + LR, rate)
        tl.store(params_ptr + UNSCALE, -unscale if MAXIMIZE else unscale)
        decay = rate * tl.full((), numbers[DECAY - MOMENTUM], tl.float32)
        tl.store(params_ptr + DECAYED, 1.0 - decay)
        for i in tl.static_range(NUMBERS):
            tl.store(params_ptr + MOMENTUM + i, numbers[i])
        tl.store(rng_ptr + 1, tl.load(rng_ptr + 1) + 1)
        if powers_ptr is not None:
            first = tl.load(powers_ptr) * tl.load(betas_ptr)
            second = tl.load(powers_ptr + 1) * tl.load(betas_ptr + 1)
            tl.store(powers_ptr, first)
            tl.store(powers_ptr + 1, second)
            tl.store(params_ptr + C1, (1.0 - first).to(tl.float32))
            tl.store(params_ptr + C2, tl.sqrt_rn((1.0 - second).to(tl.float32)))
        if range_ptr is not None:
            low, high = _advance_range(range_ptr, extremes_ptr, N, PER_ROW, REPLACE, BLOCK)
            tl.store(params_ptr + REACH, absmax(low, high))
            threshold = 0.0
            if threshold_ptr is not None:
                threshold = tl.load(threshold_ptr)
                if small_ptr is not None:
                    small, n = _total(small_ptr, N, BLOCK), tl.full((), size, tl.float32)
                    threshold = advanced_threshold(threshold, small, n, numbers[SPARSITY - MOMENTUM], absmax(low, high))
                    tl.store(threshold_ptr, threshold)
            tl.store(params_ptr + THRESHOLD, threshold)
        tl.store(params_ptr + GO, 1.0)
    else:
        tl.store(params_ptr + GO, 0.0)


@triton.jit
def _advance_range(range_ptr, extremes_ptr, N, PER_ROW: tl.constexpr, REPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Advance the range, that of each row or of all, and return the ends of all."""
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        row_low = tl.load(extremes_ptr + 2 * rows, mask=rows < N, other=0.0)
        row_high = tl.load(extremes_ptr + 2 * rows + 1, mask=rows < N, other=0.0)
        if PER_ROW:
            if not REPLACE:
                row_low = advanced_range(tl.load(range_ptr + 2 * rows, mask=rows < N, other=0.0), row_low, False)
                row_high = advanced_range(tl.load(range_ptr + 2 * rows + 1, mask=rows < N, other=0.0), row_high, False)
            tl.store(range_ptr + 2 * rows, row_low, mask=rows < N)
            tl.store(range_ptr + 2 * rows + 1, row_high, mask=rows < N)
        low = tl.minimum(low, row_low)
        high = tl.maximum(high, row_high)
    low = tl.min(low, 0)
    high = tl.max(high, 0)
    if not PER_ROW:
        if not REPLACE:
            low = advanced_range(tl.load(range_ptr), low, False)
            high = advanced_range(tl.load(range_ptr + 1), high, False)
        tl.store(range_ptr, low)
        tl.store(range_ptr + 1, high)
    return low, high


@triton.jit
def _total(small_ptr, N, BLOCK: tl.constexpr):
    """The sum of N counts."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        total += tl.load(small_ptr + rows, mask=rows < N, other=0)
    return tl.sum(total, 0)


def int8_step(
    q: torch.Tensor,
    qt: torch.Tensor,
    scale: torch.Tensor,
    rng: torch.Tensor,
    g: torch.Tensor,
    hyper: Hyper,
    *,
    first: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
    powers: torch.Tensor | None = None,
    range: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
    fresh: bool = False,
    fresh_threshold: bool = False,
    new: bool = False,
    found_inf: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
    ptx: bool = True,
) -> None:
    """Step a weight q (N, K) int8, qt (K, N), scale (N, 1) float32, N and K ≥ 1, in place; AdamW where powers is given.

    All tensors are contiguous. g (N, K) float32 or bfloat16; first and second are moments of its shape and dtype; rng (2,)
    int64 is advanced; powers (2,) float64, range (1, 2) or (N, 2) and threshold (1,) float32 as in `psgd_table.Slot`, and
    so are fresh, fresh_threshold and new. s (N, K) float32 is the scale of the gradient itself, of hyper.target "points".
    Where found_inf is not 0, nothing is done. grad_scale: g is divided by it. Both are float32 with one element.

    Raises:
        ValueError: a tensor that is not contiguous; 2³¹ - 1024 to 2³¹ - 1 rows or columns.
    """
    tensors = dict(q=q, qt=qt, scale=scale, rng=rng, first=first, second=second, powers=powers, range=range, s=s)
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got shape {tuple(t.shape)} with strides {t.stride()}")
    (n, k), kind = q.shape, TARGETS[hyper.target]
    if wraps(n, 1024) or wraps(k, max(TILE[1], RANGE_TILE[1])):
        raise ValueError(f"a weight of {n} rows of {k} elements: the kernel steps along both in int32")
    extremes = small = None
    if range is not None:
        extremes = torch.empty((n, 2), dtype=torch.float32, device=q.device)
        if threshold is not None and not fresh_threshold:
            small = torch.empty(n, dtype=torch.int32, device=q.device)
        block_m, block_n, warps = RANGE_TILE
        _int8_extremes_kernel[(triton.cdiv(n, block_m),)](
            q, scale, threshold, extremes, small, n, k,
            BLOCK_M=block_m, BLOCK_N=block_n, WIDE=is_wide(block_m * k + block_n), num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    params = torch.empty(MOMENTUM.value + NUMBERS.value, dtype=torch.float32, device=q.device)
    _int8_prepare_kernel[(1,)](
        params, rng, hyper.lr, grad_scale, powers, None if powers is None else _betas(hyper.betas, q.device),
        range, threshold, extremes, small, found_inf, _numbers(hyper, powers is not None), float(n * k), n,
        PER_ROW=hyper.per_channel, REPLACE=fresh or hyper.delta == "absmax", LR_POINTER=isinstance(hyper.lr, torch.Tensor),
        MAXIMIZE=hyper.maximize, BLOCK=1024, enable_fp_fusion=False,
    )  # fmt: skip
    block_m, block_n, warps = tile or (ODD_TILE if n % 16 or k % 16 else TILE)
    _int8_step_kernel[(_programs(q, g, block_m, (first is not None) + (second is not None)),)](
        q, qt, scale, rng, g.contiguous(), first, second, s, range, params, n, k,
        KIND=kind, PER_ROW=hyper.per_channel and kind != 0, NEW=new, NESTEROV=hyper.nesterov,
        SCALE_UPDATE=hyper.position == "update", PTX=ptx, BLOCK_M=block_m, BLOCK_N=block_n,
        WIDE=is_wide(block_m * k + block_n, block_n * n + block_m), num_warps=warps, enable_fp_fusion=False,
        **all_registers(warps if second is not None else 2 * warps),  # of AdamW one program on a processor, else two
    )  # fmt: skip


def _numbers(hyper: Hyper, adamw: bool) -> tuple[float, ...]:
    """The hyperparameters in the order that the kernels know them by: float64 here, rounded to float32 by the launch."""
    moments = (hyper.momentum, 1 - hyper.dampening, 0.0, 0.0)
    if adamw:
        moments = (hyper.betas[0], 1 - hyper.betas[0], hyper.betas[1], 1 - hyper.betas[1])
    lam = -1.0 if hyper.scale == "auto" else hyper.scale
    more = (hyper.weight_decay, hyper.adam_eps, hyper.qmax, lam, hyper.largest, hyper.eps, hyper.sparsity)
    return tuple(float(number) for number in (*moments, *more))  # an integer 1 would be a constant of the kernel


def _betas(betas: tuple[float, float], device: torch.device) -> torch.Tensor:
    """(2,) float64, by one launch and not kept: a capture may copy nothing from the host, and its tensors are its own."""
    return torch.view_as_real(torch.full((), complex(*betas), dtype=torch.complex128, device=device))


def _programs(q: torch.Tensor, g: torch.Tensor, block_m: int, moments: int) -> int:
    """How many programs walk over the rows: as many as have what they read twice in half the L2 together."""
    n, k = q.shape
    processors, l2 = processors_and_l2(q.device)
    rows = block_m * k * (1 + g.element_size() * (1 + moments))
    each = min(max(l2 // 2 // (rows * processors), 1), PROGRAMS)
    return min(triton.cdiv(n, block_m), processors * each)
