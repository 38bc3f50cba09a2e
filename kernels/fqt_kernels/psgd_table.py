"""What a step of many tensors is told: the parameters, the hyperparameters, and the tables of both that the kernels read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from . import psgd_columns as at
from .position import TARGETS

# An item is BLOCK_M rows of a matrix, or a piece of so many elements of a tensor. A program has BLOCK_N columns of it in its
# registers, or half as many where nothing is aligned and each element has an address of its own.
BLOCK_M, BLOCK_N, PIECE = 16, 128, 16384
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 2**26  # of a matrix: offsets within 16 rows are int32
MAX_ROWS = 2**24  # that codes are written of: offsets within BLOCK_N rows of the transposed ones are int32
SPARE = 16  # an item of 16 rows and 16384 columns is 16 pieces
MAX_COUNTED = 2**31 - 1  # elements of a tensor whose small ones are counted, in int32


class Slot(NamedTuple):
    """One parameter of a step.

    w is the parameter itself, not a detached alias: whether its extremes are still known is asked of this object and its
    version. w, g, first, second and points have one shape and one set of dense strides; numel may be 0 (nothing is done).

    Attributes:
        w: float32, bfloat16 or float16.   g: of w's dtype.
        first: momentum_buffer or exp_avg, of w's dtype; None without momentum.   second: exp_avg_sq, of AdamW.
        powers: (2,) float64, β₁ᵗ and β₂ᵗ of AdamW before the step; the kernel advances them.
        range: (R, 2) float32, R = 1 or, per channel, w.shape[0] (1 of a 0-d w); None without a target by name. Advanced.
        threshold: (1,) float32, of "grid+zero". Advanced.
        points: x̄ float32, of a target that is a function.   lam: (1,) float32, λ for points, 0 where s = 1.
        fresh: range has no value yet (it is not read): this step's is the newest extremes alone.
        fresh_threshold: threshold is this step's already; otherwise it is the last step's.
        new: first has no value yet (it is not read): it becomes g.
        group: index into the hyperparameters.
        codes: q (N, K) int8, qt (K, N) int8 and scale (N, 1) float32 to write, of w contiguous as (N, K).   bits: theirs.
    """

    w: Tensor
    g: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    powers: Tensor | None = None
    range: Tensor | None = None
    threshold: Tensor | None = None
    points: Tensor | None = None
    lam: Tensor | None = None
    fresh: bool = False
    fresh_threshold: bool = False
    new: bool = False
    group: int = 0
    codes: tuple[Tensor, Tensor, Tensor] | None = None
    bits: int = 8


class Hyper(NamedTuple):
    """The hyperparameters of a group; see `fqt.optim.loop` and `fqt.position.Position`.

    lr: a number, or a 0-d float32 tensor on the device, which is read when the kernel runs.   target: "grid", "zero",
    "grid+zero", "points" (a function found them) or None.   qmax: 1 where the target has no grid.   scale: λ or "auto".
    largest: the largest s of "auto".
    """

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    target: str | None = None
    qmax: int = 1
    sparsity: float = 0.0
    scale: float | str = "auto"
    largest: float = 2.0
    eps: float = 0.0
    delta: str = "ema"
    per_channel: bool = False
    position: str = "grad"


# ---- what the kernel can step


def is_matrix(slot: Slot, hyper: Hyper) -> bool:
    """Whether rows matter: of codes, or of a range for each of them."""
    return slot.codes is not None or (hyper.per_channel and slot.range is not None)


def extents(slot: Slot, hyper: Hyper) -> tuple[int, int]:
    """(rows, columns) of a tensor as items see it; (0, elements) of one whose rows do not matter."""
    if not is_matrix(slot, hyper):
        return 0, slot.w.numel()
    rows = slot.w.shape[0] if slot.w.dim() else 1
    return rows, slot.w.numel() // max(rows, 1)


def unsupported(slot: Slot, hyper: Hyper) -> str | None:
    """Why the kernel cannot step this parameter, None if it can; `MultiTensor.step` raises ValueError with these words."""
    w = slot.w
    if w.dtype not in DTYPES:
        return f"weights are float32, bfloat16 or float16, got {w.dtype}"
    for name in ("g", "first", "second"):
        t = getattr(slot, name)
        if t is not None and (t.dtype, t.shape, t.device) != (w.dtype, w.shape, w.device):
            return f"{name} is of the weights' dtype, shape and device, got {t.dtype} {tuple(t.shape)} on {t.device}"
    same = [t for t in (slot.g, slot.first, slot.second, slot.points) if t is not None]
    if not _is_dense(w) or any(_strides(t) != _strides(w) for t in same):
        return f"tensors are dense, with the weights' strides, got {[t.stride() for t in (w, *same)]}"
    rows, cols = extents(slot, hyper)
    if rows > 1 and w.stride(0) != cols:
        return f"rows with ranges of their own lie one after the other, got strides {w.stride()} of {tuple(w.shape)}"
    if rows and cols > MAX_COLUMNS:
        return f"rows have at most {MAX_COLUMNS} elements, got {cols}"
    if slot.codes is not None and rows > MAX_ROWS:
        return f"codes are written of at most {MAX_ROWS} rows, got {rows}"
    if slot.threshold is not None and w.numel() > MAX_COUNTED:
        return f"a tensor with a threshold has at most {MAX_COUNTED} elements, got {w.numel()}"
    if slot.codes is not None and not (w.dim() > 0 and w.is_contiguous()):
        return f"weights that codes are written of are contiguous, got strides {w.stride()} of {tuple(w.shape)}"
    return _unsupported_state(slot, hyper, rows, cols)


def _unsupported_state(slot: Slot, hyper: Hyper, rows: int, cols: int) -> str | None:
    channels = rows if hyper.per_channel else 1
    wanted = {"range": ((channels, 2), torch.float32), "threshold": ((1,), torch.float32), "lam": ((1,), torch.float32),
              "powers": ((2,), torch.float64), "points": (tuple(slot.w.shape), torch.float32)}  # fmt: skip
    found = {name: t for name in wanted if (t := getattr(slot, name)) is not None}
    if slot.codes is not None:
        q, qt, scale = (((rows, cols), torch.int8), ((cols, rows), torch.int8), ((rows, 1), torch.float32))
        wanted |= {"q": q, "qt": qt, "scale": scale}
        found |= dict(zip(("q", "qt", "scale"), slot.codes, strict=True))
    for name, t in found.items():
        dense = t.is_contiguous() or name == "points"
        if (tuple(t.shape), t.dtype) != wanted[name] or not dense or t.device != slot.w.device:
            shape, dtype = wanted[name]
            return f"{name} is {dtype} {shape}, contiguous, on {slot.w.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
    return None


def missing(slot: Slot, hyper: Hyper, rule: str) -> str | None:
    """What a step by these hyperparameters reads and the slot has not, as a reason; None if it has all."""
    needs = ("first", "second", "powers") if rule == "adamw" else ("first",) if hyper.momentum else ()
    if hyper.target == "grid+zero" and slot.range is not None:
        needs += ("threshold",)
    if slot.points is not None:
        needs += ("lam",)
    absent = [name for name in needs if getattr(slot, name) is None]
    return f"{rule} with target {hyper.target!r} needs {', '.join(absent)}" if absent else None


def _is_dense(w: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(w.stride(), w.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def is_aligned(slot: Slot, hyper: Hyper) -> bool:
    """Whether pieces of 16 bytes, of transposed codes 8, lie on boundaries of their own and end with rows and tensors."""
    rows, cols = extents(slot, hyper)
    tensors = (slot.w, slot.g, slot.first, slot.second, slot.points, *(slot.codes or ()))
    if any(t is not None and t.data_ptr() % 16 for t in tensors):
        return False
    return cols % 16 == 0 and (slot.codes is None or rows % 8 == 0) if rows else cols % 8 == 0


# ---- what is kept of the newest weights


class Newest:
    """The extremes of a parameter's newest weights, on the device, and which weights those were.

    Kept for the parameters of the last step: of one that had no gradient in it they are found again.
    """

    def __init__(self, slot: Slot):
        self._w = slot.w  # no weak reference: torch would refuse to swap the parameter
        self._version, self._address, self._counted = -1, 0, ()
        self.data = torch.zeros(at.EXTREMES.value + 2 * len(slot.range), dtype=torch.int32, device=slot.w.device)

    def fits(self, slot: Slot) -> bool:
        return self._w is slot.w and len(self.data) == at.EXTREMES.value + 2 * len(slot.range)

    def holds(self, slot: Slot, hyper: Hyper) -> bool:
        """Whether nothing has changed since `record`."""
        w = slot.w
        if self._version != w._version or self._address != w.data_ptr() or self._w is not w:
            return False
        return slot.threshold is None or self._counted == _counted(slot, hyper)

    def record(self, slot: Slot, hyper: Hyper) -> None:
        """What is on the device is of the weights as they are now."""
        self._version, self._address = slot.w._version, slot.w.data_ptr()
        self._counted = () if slot.threshold is None else _counted(slot, hyper)

    def forget(self) -> None:
        self._version = -1


def _counted(slot: Slot, hyper: Hyper) -> tuple:
    """What the count of small weights depends on besides them, and the magnitude that channels will reach to."""
    held = slot.threshold, slot.range
    return (hyper.delta, hyper.per_channel, *chain.from_iterable((t.data_ptr(), t._version) for t in held))


# ---- the tables


class Mirror:
    """A table on a device that follows one on the host: it is copied again where that changes.

    Copies come from pinned memory and do not wait. What a CUDA graph reads is never written again: what changes while it is
    captured is copied by the graph itself, from memory that is kept, and later changes go into another table.
    """

    def __init__(self) -> None:
        self._of: object = None
        self._table: Tensor | None = None
        self._captured = False
        self._kept: list[Tensor] = []
        self._spare: Tensor | None = None

    def update(self, of: object, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The table that make() gives on the CPU, a function of `of`."""
        capturing = is_capturing(device)
        if self._table is None or of != self._of:
            host = make()
            if device.type == "cuda":
                host = self._pinned(host, capturing)
            if self._table is None or self._captured or self._table.shape != host.shape:
                self._table = torch.empty(host.shape, dtype=host.dtype, device=device)
                self._captured = False
            self._table.copy_(host, non_blocking=True)
            self._of = None if capturing else of  # a captured copy takes place when the graph runs
            if capturing:
                self._kept.append(host)
        if capturing:
            self._captured = True
            self._kept.append(self._table)
        return self._table

    def _pinned(self, host: Tensor, capturing: bool) -> Tensor:
        """A copy in pinned memory. Not every torch lets a capture allocate any, so that some is put by before: SPARE times
        as much as the table has now, since in a capture no codes are written, and items of other extents are more."""
        if capturing and self._spare is not None and self._spare.nbytes >= host.nbytes:
            spare, self._spare = self._spare, None
            return spare[: host.nbytes].view(host.dtype).view(host.shape).copy_(host)
        if not capturing and (self._spare is None or self._spare.nbytes < SPARE * host.nbytes):
            self._spare = torch.empty(SPARE * host.nbytes, dtype=torch.uint8, pin_memory=True)
        return host.pin_memory()


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(rows: list[tuple], code: str) -> Tensor:
    """Rows of numbers as a tensor of int64 (code "q") or float64 ("d")."""
    numbers = array(code, chain.from_iterable(rows))
    return torch.frombuffer(numbers, dtype=torch.int64 if code == "q" else torch.float64).view(len(rows), -1)


def items(sizes: Iterable[tuple[int, int]]) -> Tensor:
    """(I, 2) int32 on the CPU: the items of tensors of such extents, the longest first; see `psgd_device.item`."""
    parts = []
    for i, (rows, cols) in enumerate(sizes):
        count, length = (-(-rows // BLOCK_M), cols * BLOCK_M) if rows else (-(-cols // PIECE), min(cols, PIECE))
        first = torch.arange(count, dtype=torch.int32) * BLOCK_M
        parts.append((length, torch.stack([torch.full_like(first, i), first], 1)))
    parts.sort(key=lambda part: -part[0])
    return torch.cat([part for _, part in parts])


def row_of(slot: Slot, hyper: Hyper, newest: Tensor | None) -> tuple[int, ...]:
    """A tensor's row of the table, in the order of `psgd_columns`."""
    tensors = slot.w, slot.g, slot.first, slot.second, slot.powers, slot.range, slot.threshold, slot.points, slot.lam
    tensors += (*(slot.codes or (None,) * 3), newest, hyper.lr if isinstance(hyper.lr, Tensor) else None)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return (*addresses, *extents(slot, hyper), flags_of(slot, hyper))


def key_of(slot: Slot) -> tuple:
    """What a tensor's row follows from, but for hyperparameters and `moving_addresses`. It keeps no tensor alive."""
    w, g, first, second, powers, range, threshold, points, lam, *flags, codes, bits = slot
    return (
        id(w),
        w.data_ptr(),
        w.shape,
        w.dtype,
        w.stride(),
        g.dtype,
        g.stride(),
        None if first is None else first.data_ptr(),
        None if second is None else second.data_ptr(),
        None if powers is None else powers.data_ptr(),
        None if range is None else range.data_ptr(),
        None if threshold is None else threshold.data_ptr(),
        points is None,
        lam is None,
        *flags,
        None if codes is None else tuple(t.data_ptr() for t in codes),
        bits,
    )


def moving_addresses(slot: Slot) -> tuple[int, int, int]:
    """Of gradient, points and their λ, which are often in other memory at each step."""
    points = 0 if slot.points is None else slot.points.data_ptr()
    return slot.g.data_ptr(), points, 0 if slot.lam is None else slot.lam.data_ptr()


def moved_row(row: tuple[int, ...], addresses: tuple[int, int, int]) -> tuple[int, ...]:
    """A tensor's row with other moving addresses."""
    g, points, lam = addresses
    return (*row[: at.G.value], g, *row[at.G.value + 1 : at.POINTS.value], points, lam, *row[at.LAM.value + 1 :])


def options_of(hyper: Hyper) -> tuple:
    """What a tensor's row follows from of the hyperparameters."""
    lr = hyper.lr.data_ptr() if isinstance(hyper.lr, Tensor) else None
    return (lr, hyper.momentum != 0, hyper.nesterov, hyper.maximize, hyper.target, hyper.delta, hyper.per_channel,
            hyper.position)  # fmt: skip


def flags_of(slot: Slot, hyper: Hyper) -> int:
    by_name = slot.range is not None
    kind = TARGETS[hyper.target] if by_name or slot.points is not None else TARGETS[None]
    flags = {at.NEW: slot.new, at.FRESH: slot.fresh, at.FRESH_THRESHOLD: slot.fresh_threshold,
             at.ABSMAX: hyper.delta == "absmax", at.PER_CHANNEL: by_name and hyper.per_channel,
             at.UPDATE: hyper.position == "update", at.NESTEROV: hyper.nesterov, at.MAXIMIZE: hyper.maximize,
             at.CODES: slot.codes is not None, at.MOMENTUM: hyper.momentum != 0}  # fmt: skip
    return kind + sum(flag.value for flag, is_set in flags.items() if is_set) + (slot.group << at.GROUP_BITS.value)


def hyper_row(hyper: Hyper) -> tuple[float, ...]:
    """A group's row of the table, in the order of `psgd_columns`."""
    lr = 0.0 if isinstance(hyper.lr, Tensor) else float(hyper.lr)
    beta1, beta2 = hyper.betas
    lam = -1.0 if hyper.scale == "auto" else float(hyper.scale)
    return (lr, hyper.momentum, 1 - hyper.dampening, hyper.weight_decay, beta1, beta2, 1 - beta1, 1 - beta2,
            hyper.adam_eps, float(hyper.qmax), lam, hyper.largest, hyper.eps, hyper.sparsity)  # fmt: skip
