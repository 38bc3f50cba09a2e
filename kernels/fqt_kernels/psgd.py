"""The step of PSGD (Position-based Scaled Gradient Descent) and of its AdamW, of many tensors in one launch.

    g ← s(w)·g,   then the step of SGD or of AdamW with g        (position "grad"; s scales the whole update in "update")

`fqt.optim.loop` is the definition, and the kernels agree with it to the last bit. A program steps an item: 16 rows of a
matrix, where a tensor has a range for each channel or codes are written, or 16384 elements of a tensor in one piece. Each
weight is read and written once; the extremes of the new weights, from which the next step's range follows, are found on
the way, by integer atomics, whose result has no order. A program that writes codes quantizes the rows that it has just
written, from the L2. The program that ends last advances the state that a whole tensor shares (`psgd_device.finish`).
"""

from __future__ import annotations

from collections import defaultdict

import torch
import triton
import triton.language as tl

from . import psgd_columns as at
from ._device import from_ordered, magnitude, quantization_params, round_codes, scaled
from .position import absmax
from .psgd_device import (
    adamw,
    adamw_numbers,
    count_small,
    finish,
    fours,
    has_range,
    hyper,
    item,
    pointer,
    position_numbers,
    publish,
    range_of_step,
    rounded,
    scale,
    sgd,
    sgd_numbers,
    span,
    threshold_of_step,
    widened,
)
from .psgd_table import (
    BLOCK_M,
    BLOCK_N,
    PIECE,
    Hyper,
    Mirror,
    Newest,
    Slot,
    extents,
    hyper_row,
    is_aligned,
    is_capturing,
    items,
    key_of,
    missing,
    moved_row,
    moving_addresses,
    options_of,
    row_of,
    table,
    unsupported,
)

__all__ = ["Hyper", "MultiTensor", "Slot", "unsupported"]

NUM_WARPS = 8
TENSORS = 512  # whose state the last program advances at a time: no number is held by two threads


@triton.jit
def _codes(w_ptr, row_ptr, absmax_bits, first, BITS: tl.constexpr, ALIGNED: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Quantize BLOCK_M rows of the matrix, w_ptr being at the first; absmax_bits [BLOCK_M, 1]."""
    rows, cols = tl.load(row_ptr + at.ROWS), tl.load(row_ptr + at.COLS)
    if ALIGNED:
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 16)
    q_ptr = pointer(row_ptr, at.Q, tl.int8, ALIGNED) + first * cols
    qt_ptr = pointer(row_ptr, at.QT, tl.int8, ALIGNED) + first
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    high = from_ordered(absmax_bits)
    scale, inv, zp, _ = quantization_params(-high, high, BITS, 0)
    mask_m = m < (rows - first).to(tl.int32)
    tl.store(pointer(row_ptr, at.SCALE, tl.float32, ALIGNED) + first + m, scale, mask=mask_m)
    stride, stride_t = cols.to(tl.int32), rows.to(tl.int32)
    for tile in range(0, tl.cdiv(stride, BLOCK_N)):
        mask = mask_m & (n + tile * BLOCK_N < stride)
        w = tl.load(w_ptr + tile * BLOCK_N + (m * stride + n), mask=mask, other=0.0).to(tl.float32)
        q = round_codes(scaled(w, inv, zp, 0, False), 0, BITS, 0, False, False, True)
        tl.store(q_ptr + tile * BLOCK_N + (m * stride + n), q, mask=mask)
        tl.store(qt_ptr + rows * (tile * BLOCK_N) + (n * stride_t + m), q, mask=mask)  # rows: int64


@triton.jit
def _psgd_kernel(
    items_ptr, table_ptr, hypers_ptr, found_ptr, grad_scale_ptr, ticket_ptr, tensors,
    DTYPE: tl.constexpr, ADAMW: tl.constexpr, MOMENTS: tl.constexpr, RANGES: tl.constexpr, COUNTS: tl.constexpr,
    POINTS: tl.constexpr, CODES: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    skipped = 0.0
    if found_ptr is not None:
        skipped = tl.load(found_ptr)
    if skipped == 0.0:
        row_ptr, first = item(items_ptr, table_ptr, BLOCK_M)
        _step_item(row_ptr, hypers_ptr, grad_scale_ptr, first, DTYPE, ADAMW, MOMENTS, RANGES, COUNTS, POINTS, CODES,
                   BITS, ALIGNED, BLOCK_M, BLOCK_N, PIECE)  # fmt: skip
        if RANGES or ADAMW:
            finish(table_ptr, hypers_ptr, ticket_ptr, tensors, True, ADAMW, RANGES, COUNTS, BLOCK_T)


@triton.jit
def _step_item(row_ptr, hypers_ptr, grad_scale_ptr, first, DTYPE: tl.constexpr, ADAMW: tl.constexpr,
               MOMENTS: tl.constexpr, RANGES: tl.constexpr, COUNTS: tl.constexpr, POINTS: tl.constexpr,
               CODES: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    flags = tl.load(row_ptr + at.FLAGS).to(tl.int32)
    kind = flags & at.KIND
    hyper_ptr = hypers_ptr + (flags >> at.GROUP_BITS) * at.HYPERS
    start, stride, lead, step, limit, height = span(row_ptr, first, ALIGNED, BLOCK_M, BLOCK_N, PIECE)
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask_m, offs = m < height, m * stride + n
    w_ptr, g_ptr = pointer(row_ptr, at.W, DTYPE, ALIGNED) + start, pointer(row_ptr, at.G, DTYPE, ALIGNED) + start
    first_ptr, second_ptr = w_ptr, w_ptr
    if MOMENTS:
        first_ptr = pointer(row_ptr, at.FIRST, DTYPE, ALIGNED) + start
    if ADAMW:
        second_ptr = pointer(row_ptr, at.SECOND, DTYPE, ALIGNED) + start
        numbers = adamw_numbers(row_ptr, hyper_ptr)
    else:
        numbers = sgd_numbers(row_ptr, hyper_ptr)
    position, grad_scale = position_numbers(hyper_ptr), 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.math.div_rn(1.0, tl.load(grad_scale_ptr))
    points_ptr, points_lam = pointer(row_ptr, at.POINTS, tl.float32, ALIGNED) + start, 0.0
    if POINTS:
        points_lam = tl.load(pointer(row_ptr, at.LAM, tl.float32, False), mask=kind == 4, other=0.0)
    newest_ptr = pointer(row_ptr, at.NEWEST, tl.int32, False)
    rows = tl.where((flags & at.PER_CHANNEL) != 0, first + m, 0)
    low_now = tl.zeros([BLOCK_M, 1], tl.float32)
    high_now, threshold = low_now, 0.0
    if RANGES:
        range_ptr, mask_r = pointer(row_ptr, at.RANGE, tl.float32, False), mask_m & has_range(flags)
        low_now, high_now = range_of_step(range_ptr, newest_ptr, rows, flags, mask_r)
        if COUNTS:
            threshold = threshold_of_step(
                row_ptr, pointer(row_ptr, at.THRESHOLD, tl.float32, False), newest_ptr, tl.max(absmax(low_now, high_now)),
                flags, hyper(hyper_ptr, at.SPARSITY), kind == 3,
            )  # fmt: skip
        tl.debug_barrier()  # a row's state is held by several threads, and one of them will write it
    reach = absmax(low_now, high_now)
    low = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    high, small, top = low, low, low
    for tile in range(0, tl.cdiv(limit, step)):
        here = tile * step + offs
        mask = mask_m & (n + m * lead + tile * step < limit)
        # All loads come before any division, whose slow path the compiler would not move a load across.
        x = tl.load(w_ptr + here, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + here, mask=mask, other=0.0).to(tl.float32)
        first_moment, second_moment, points = x, x, x
        if MOMENTS:
            has = (flags & (at.MOMENTUM | at.NEW)) == at.MOMENTUM
            first_moment = tl.load(first_ptr + here, mask=mask & (ADAMW or has), other=0.0).to(tl.float32)
        if ADAMW:
            second_moment = tl.load(second_ptr + here, mask=mask, other=0.0).to(tl.float32)
        if POINTS:
            points = tl.load(points_ptr + here, mask=mask & (kind == 4), other=0.0)
        if grad_scale_ptr is not None:
            g = g * grad_scale
        g = tl.where((flags & at.MAXIMIZE) != 0, -g, g)
        s = scale(x, reach, threshold, position, kind, points, points_lam, RANGES, POINTS)
        if ADAMW:
            new = adamw(
                x, g, s, first_moment, second_moment, numbers, flags, first_ptr + here, second_ptr + here, mask, DTYPE
            )
        else:
            new = sgd(x, g, s, first_moment, numbers, flags, first_ptr + here, mask, DTYPE, MOMENTS)
        stored, new = rounded(new, DTYPE)
        tl.store(w_ptr + here, stored, mask=mask)
        if RANGES:
            low, high = widened(low, high, new, mask)
        if COUNTS:
            small = count_small(small, new, mask, threshold)
        if CODES:
            top = tl.maximum(top, tl.max(fours(tl.where(mask, magnitude(new), 0)), 2))
    if RANGES:
        publish(newest_ptr, low, high, small, rows, mask_m, flags, low_now, high_now, (flags & at.ABSMAX) != 0, COUNTS)
        channels = mask_r & ((flags & at.PER_CHANNEL) != 0)
        tl.store(range_ptr + 2 * rows, low_now, mask=channels)
        tl.store(range_ptr + (1 + 2 * rows), high_now, mask=channels)
    if CODES:
        if (flags & at.CODES) != 0:
            tl.debug_barrier()  # the weights that other threads of the program have written are read
            _codes(w_ptr, row_ptr, tl.max(top, 1, keep_dims=True), first, BITS, ALIGNED, BLOCK_M, BLOCK_N)


@triton.jit
def _psgd_stats_kernel(
    items_ptr, table_ptr, hypers_ptr, ticket_ptr, tensors,
    DTYPE: tl.constexpr, COUNTS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row_ptr, first = item(items_ptr, table_ptr, BLOCK_M)
    flags = tl.load(row_ptr + at.FLAGS).to(tl.int32)
    start, stride, lead, step, limit, height = span(row_ptr, first, ALIGNED, BLOCK_M, BLOCK_N, PIECE)
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask_m = m < height
    w_ptr, newest_ptr = pointer(row_ptr, at.W, DTYPE, ALIGNED) + start, pointer(row_ptr, at.NEWEST, tl.int32, False)
    rows = tl.where((flags & at.PER_CHANNEL) != 0, first + m, 0)
    low_now = tl.zeros([BLOCK_M, 1], tl.float32)
    high_now, threshold = low_now, 0.0
    if COUNTS:
        range_ptr, running = pointer(row_ptr, at.RANGE, tl.float32, False), mask_m & ((flags & at.FRESH) == 0)
        low_now = tl.load(range_ptr + 2 * rows, mask=running, other=0.0)
        high_now = tl.load(range_ptr + (1 + 2 * rows), mask=running, other=0.0)
        threshold = tl.load(pointer(row_ptr, at.THRESHOLD, tl.float32, False), mask=(flags & at.KIND) == 3, other=0.0)
    low = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    high, small = low, low
    for tile in range(0, tl.cdiv(limit, step)):
        mask = mask_m & (n + m * lead + tile * step < limit)
        x = tl.load(w_ptr + tile * step + (m * stride + n), mask=mask, other=0.0).to(tl.float32)
        low, high = widened(low, high, x, mask)
        if COUNTS:
            small = count_small(small, x, mask, threshold)
    replace = (flags & (at.FRESH | at.ABSMAX)) != 0
    publish(newest_ptr, low, high, small, rows, mask_m, flags, low_now, high_now, replace, COUNTS)
    finish(table_ptr, hypers_ptr, ticket_ptr, tensors, False, False, True, COUNTS, BLOCK_T)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class MultiTensor:
    """The launches of an optimizer on one device, and what they keep between steps: tables, and the newest extremes.

    A launch for all parameters of a dtype; a second one for those whose addresses or ends are not on 16-byte boundaries.
    """

    def __init__(self) -> None:
        self._newest: dict[int, Newest] = {}  # by the parameter's id
        self._batches: list[_Batch] = []
        self._batched_of: tuple | None = None
        self._addresses: list[tuple] = []
        self._places: dict[int, tuple[_Batch, int]] = {}  # of the slots: their launches and their rows of its table
        self._hypers: list[Hyper] = []  # of the last step
        self._mirrors: defaultdict[tuple, Mirror] = defaultdict(Mirror)
        self._ticket: torch.Tensor | None = None
        self._captured: list[torch.Tensor] = []

    def step(
        self,
        slots: list[Slot],
        hypers: list[Hyper],
        *,
        rule: str,
        found_inf: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
    ) -> None:
        """Step all slots, which are on one device: rule "sgd" or "adamw".

        found_inf, grad_scale: GradScaler's, float32 with one element, on the device. Where found_inf is not 0, nothing is
        done or advanced, and nothing is read back to find that out. So a caller that sets fresh, fresh_threshold or new
        in a slot, each of which holds for the first step that is taken, has to know that found_inf is 0.

        In the capture of a CUDA graph none of the three may be set: a step goes before it. The graph reads and writes
        what this object holds, which has to outlive it.

        Raises:
            ValueError: a slot that the kernel cannot step (`unsupported`), by its index; an unknown rule; a first step in a
                capture.
        """
        if rule not in ("sgd", "adamw"):
            raise ValueError(f"rule must be sgd or adamw, got {rule!r}")
        of = rule, [key_of(slot) for slot in slots], [options_of(hyper) for hyper in hypers]
        addresses = [moving_addresses(slot) for slot in slots]
        if of != self._batched_of or not self._moved(slots, hypers, addresses):
            self._batched_of = None
            self._check(slots, hypers, rule)
            self._batches = self._batched(slots, hypers, rule)
            self._batched_of = of
        self._addresses = addresses
        self._hypers = hypers
        if not self._batches:
            return
        device = slots[self._batches[0].members[0]].w.device
        if self._ticket is None:
            self._ticket = torch.zeros(1, dtype=torch.int32, device=device)
        if is_capturing(device):
            if any(slot.new or slot.fresh or slot.fresh_threshold for slot in slots):
                raise ValueError("a first step cannot be captured in a CUDA graph: take one before")
            self._captured += [self._ticket, *(newest.data for newest in self._newest.values())]
        rows = [hyper_row(hyper) for hyper in hypers]
        numbers = self._mirrors["hypers",].update(rows, lambda: table(rows, "d"), device)
        for batch in self._batches:
            self._launch(batch, slots, numbers, found_inf, grad_scale)

    def written(self, slots: list[Slot]) -> None:
        """After the caller has bumped the versions of the weights of the last `step`: its extremes are those of the weights
        as they are now. A weight whose version is another at the next step was changed outside."""
        for slot in slots:
            if slot.range is not None and slot.w.numel():
                self._newest[id(slot.w)].record(slot, self._hypers[slot.group])

    def forget(self) -> None:
        """Trust no extremes: weights, ranges or thresholds may have changed in a way that versions do not show."""
        for newest in self._newest.values():
            newest.forget()

    def _check(self, slots: list[Slot], hypers: list[Hyper], rule: str) -> None:
        for i, slot in enumerate(slots):
            hyper = hypers[slot.group]
            reason = unsupported(slot, hyper) or missing(slot, hyper, rule)
            if slot.w.device != slots[0].w.device:
                reason = f"all are on one device, {slots[0].w.device}, got {slot.w.device}"
            if reason:
                raise ValueError(f"slot {i}, weights {tuple(slot.w.shape)}: {reason}")

    def _moved(self, slots: list[Slot], hypers: list[Hyper], addresses: list[tuple]) -> bool:
        """Put new addresses of gradients and points into the tables; False where the launches have to be made anew."""
        for i, (now, before) in enumerate(zip(addresses, self._addresses, strict=True)):
            if now != before and slots[i].w.numel():
                batch, place = self._places[i]
                if batch.flags["ALIGNED"] and any(address % 16 for address in now[:2]):
                    return False
                if slots[i].points is not None and unsupported(slots[i], hypers[slots[i].group]):
                    return False
                batch.rows[place] = moved_row(batch.rows[place], now)
        return True

    def _batched(self, slots: list[Slot], hypers: list[Hyper], rule: str) -> list[_Batch]:
        """The launches of a step."""
        members: dict[tuple, list[int]] = {}
        for i, slot in enumerate(slots):
            if slot.w.numel():
                key = slot.w.dtype, is_aligned(slot, hypers[slot.group]), slot.bits
                members.setdefault(key, []).append(i)
        known = {key: self._newest[key] for slot in slots if (key := id(slot.w)) in self._newest}
        for slot in slots:
            if slot.range is not None and not (id(slot.w) in known and known[id(slot.w)].fits(slot)):
                known[id(slot.w)] = Newest(slot)
        self._newest = known
        batches = [_Batch(key, rule, indices, slots, hypers, known) for key, indices in members.items()]
        self._places = {i: (batch, place) for batch in batches for place, i in enumerate(batch.members)}
        return batches

    def _launch(
        self,
        batch: _Batch,
        slots: list[Slot],
        numbers: torch.Tensor,
        found_inf: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
    ) -> None:
        members = [slots[i] for i in batch.members]
        stale = [
            place
            for place, slot in enumerate(members)
            if slot.range is not None and not self._newest[id(slot.w)].holds(slot, self._hypers[slot.group])
        ]
        if stale:
            flags = {name: batch.flags[name] for name in ("DTYPE", "COUNTS", "ALIGNED")}
            self._run(_psgd_stats_kernel, batch, stale, (numbers, self._ticket), flags)
        from .householder_sums import all_registers

        everything = list(range(len(members)))
        operands = numbers, found_inf, grad_scale, self._ticket
        # AdamW with targets that are functions needs more than two programs on a processor have; nothing else does.
        options = all_registers(NUM_WARPS) if batch.flags["ADAMW"] and batch.flags["POINTS"] else {}
        self._run(_psgd_kernel, batch, everything, operands, batch.flags | options)

    def _run(self, kernel: triton.JITFunction, batch: _Batch, which: list[int], operands: tuple, flags: dict) -> None:
        """Launch a kernel over some tensors of a batch."""
        device, block_n = operands[0].device, BLOCK_N if flags["ALIGNED"] else BLOCK_N // 2
        rows, sizes = [batch.rows[i] for i in which], [batch.sizes[i] for i in which]
        mirrors = self._mirrors[kernel, batch.key, "items"], self._mirrors[kernel, batch.key, "tensors"]
        work = mirrors[0].update(sizes, lambda: items(sizes), device)
        tensors = mirrors[1].update(rows, lambda: table(rows, "q"), device)
        kernel[(len(work),)](
            work, tensors, *operands, len(rows), **flags, BLOCK_M=BLOCK_M, BLOCK_N=block_n, PIECE=PIECE, BLOCK_T=TENSORS,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


class _Batch:
    """The tensors of one launch: where they are among the slots, their rows of the table, and what the kernel is compiled
    for."""

    def __init__(self, key: tuple, rule: str, members: list[int], slots: list[Slot], hypers: list[Hyper],
                 newest: dict[int, Newest]) -> None:  # fmt: skip
        dtype, aligned, bits = self.key = key
        self.members = members
        mine = [slots[i] for i in members]
        self.sizes = [extents(slot, hypers[slot.group]) for slot in mine]
        self.rows = [
            row_of(slot, hypers[slot.group], None if slot.range is None else newest[id(slot.w)].data) for slot in mine
        ]
        self.flags = dict(
            DTYPE=DTYPES[dtype], ADAMW=rule == "adamw", MOMENTS=any(slot.first is not None for slot in mine),
            RANGES=any(slot.range is not None for slot in mine), COUNTS=any(slot.threshold is not None for slot in mine),
            POINTS=any(slot.points is not None for slot in mine), CODES=any(slot.codes is not None for slot in mine),
            BITS=bits, ALIGNED=aligned,
        )  # fmt: skip
