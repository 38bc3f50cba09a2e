"""Where the range of an output gradient dY comes from: `Quantizer.range`, "exact", "bound" or "delayed".

The range of dY is known only after the product that makes dY has been written out, so that "exact", the default, reads dY
twice: once for its range, once for its codes. The other ways ask for less of dY, and what they give up is this.

    exact     The range is that of the values. Unbiased, nothing clips. Where dY is, untouched, the dX of the layer above
              (`Handover`), the magnitudes of its rows come from the epilogue of that product and no pass looks for them;
              codes and scales are the same to the bit.
    bound     A magnitude that no element exceeds. Unbiased, nothing clips; the bins are as much wider as the bound is
              loose. Two bounds: max|row of dX| · max|multiplier|, from the epilogue, where scales of W are folded into dY;
              and, known before the product, |dX_ij| ≤ ‖g_i‖ · max_j ‖w_j‖ (`bound_from_product`), from which the product
              itself could write codes. (The range is then at most twice that: R_i ≤ 2 ‖g_i‖ max_j ‖w_j‖.)
    delayed   A guess from earlier steps, of the whole tensor: MARGIN times the largest magnitude of the last HISTORY
              steps; of a row: MARGIN times the largest share of its bound that any row took in those steps, of this
              step's bound. What is larger clips, which is a bias: the state counts it, and the next step's range has grown
              to hold it. The first step, and every other without a history, is exact.

A range that is not found in the values is [-b, b]: bound and delayed go with symmetric codes, per row or per tensor. A
column's magnitude comes from no row, and the Householder transform needs ranges before and after it: both stay exact. So
do float64 matrices, whose magnitudes float32 cannot hold. Where a bound is asked for and none was handed over, the range
is exact too, and counted (`Handover.counts`).

Magnitudes travel as the bits of float32 in int32, whose order is the numbers' and which puts NaN above infinity: a row
that holds either gets a scale that is not finite. So does a row whose bound is beyond the largest float16, if that is dX's
dtype: whether such a row overflowed cannot be told from the bound.

>>> import torch
>>> from fqt import reference
>>> from fqt.recipe import Quantizer
>>> quantizer = Quantizer(8, "per_row", "symmetric", range="bound")
>>> dy, scales_of_w = torch.tensor([[1.0, -2.0], [0.5, 0.25]]), torch.tensor([[1.0, 3.0]])
>>> rows = Rows(dy.abs().amax(1).view(torch.int32), exact=True)
>>> row_ranges_for(quantizer, dy, scales_of_w, rows).view(torch.float32)
tensor([6.0000, 1.5000])

Sources: StatQuant (arXiv 2010.14298), its third review (the bound, the closed form, ranges relative to a bound); delayed
scaling: NVIDIA's Transformer Engine; [derived] from Cauchy and Schwarz's inequality.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .qtensor import Operand
from .recipe import Quantizer

HISTORY = 16  # steps that a delayed range looks back
MARGIN = 1.25  # what it allows a gradient to grow by from one step to the next
CLIPPED, SEEN, FIRST = 0, 1, 2  # a layer's state: two counts, then the history
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VIEWS = tuple(f"{name}Backward" for name in ("View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze"))
_FLOAT32_MAX = torch.finfo(torch.float32).max


class Rows(NamedTuple):
    """What is known of the magnitudes of a matrix's rows: absmax (M,) int32, bits of float32; the largest themselves
    (exact), or bounds of them."""

    absmax: Tensor
    exact: bool


# ---- ranges


def uses_rows(quantizer: Quantizer, column_multiplier: bool) -> bool:
    """Whether `row_ranges_for` can do anything with `Rows`; column_multiplier: factors (1, N) are folded into dY."""
    if quantizer.zero != "symmetric" or quantizer.householder or quantizer.granularity == "per_column":
        return False
    return quantizer.range != "exact" or not column_multiplier


def new_state(device: torch.device | str | None = None) -> Tensor:
    """The memory of a layer's delayed ranges, (2, FIRST + HISTORY) int64, row 0 for dgrad's quantizer, row 1 for wgrad's.

    A row holds how many elements clipped, of how many, and the history: bits of float32, the newest first, 0 for a step
    that left none. Integers, since a module casts its floating-point buffers with its parameters, and counts stay exact.
    """
    return torch.zeros(2, FIRST + HISTORY, dtype=torch.int64, device=device)


def row_ranges_for(
    quantizer: Quantizer,
    dy: Tensor,
    multiplier: Tensor | None = None,
    rows: Rows | None = None,
    state: Tensor | None = None,
    margin: float = MARGIN,
) -> Tensor | None:
    """The magnitudes that dY ∘ multiplier is to be quantized with: `row_absmax` of `fqt.reference.quantize`.

    Args:
        dy: (M, N) floating point.   multiplier: (M, 1) or (1, N) float32, folded into dY.
        rows: what is known of the rows of dY itself, without the multiplier; None for nothing.
        state: (FIRST + HISTORY,) int64, one row of `new_state`; written in place, for range "delayed" only, as is margin.

    Returns:
        int32 bits (M,) for a quantizer per_row, (1,) per_tensor; None where the range is to be found in the values.

    Runs on the device without a synchronization, in an order of its own choosing that changes nothing (maxima and sums
    of integers), so that a captured graph may hold it.

    Raises:
        ValueError: a delayed range without its state.
    """
    if dy.dtype not in _DTYPES or dy.numel() == 0:
        return None
    folded = multiplier is not None and multiplier.shape[1] == dy.shape[1] > 1
    bound = None
    if rows is not None and uses_rows(quantizer, folded):
        bound = _multiplied(rows.absmax.view(torch.float32), multiplier)
        bound = bound.amax(0, keepdim=True) if quantizer.granularity == "per_tensor" else bound
    if quantizer.range == "delayed":
        if state is None:
            raise ValueError("a delayed range needs the state of its layer")
        if bound is None and quantizer.granularity == "per_row":
            return None
        if bound is None or not rows.exact or folded:
            bound = _delayed(quantizer, dy, multiplier, bound, state, margin)
    elif quantizer.range == "exact" and rows is not None and not rows.exact:
        return None
    return None if bound is None else bound.view(torch.int32)


def _multiplied(absmax: Tensor, multiplier: Tensor | None) -> Tensor:
    """The magnitudes of rows times a factor for each row, exactly (rounding keeps order), or times the largest of all."""
    if multiplier is None:
        return absmax
    factor = multiplier.float().abs()
    factor = factor.flatten() if factor.shape[1] == 1 else factor.amax()
    product = absmax * factor
    # Finite numbers whose product is not still bound finite ones.
    return torch.where(absmax.isfinite() & factor.isfinite(), product.clamp(max=_FLOAT32_MAX), product.abs())


def _delayed(
    quantizer: Quantizer, dy: Tensor, multiplier: Tensor | None, bound: Tensor | None, state: Tensor, margin: float
) -> Tensor:
    """The delayed ranges (M,) or (1,) of dY ∘ multiplier; state learns their true ones and what clips."""
    magnitude = dy.float() if multiplier is None else dy.float() * multiplier
    magnitude = magnitude.abs()
    true = magnitude.amax(1) if quantizer.granularity == "per_row" else magnitude.amax().reshape(1)
    unit = bound if quantizer.granularity == "per_row" else torch.ones_like(true)
    history = state[FIRST:]
    known = history.amax().to(torch.int32).view(torch.float32)
    guess = unit * known * margin
    guess = guess if bound is None else torch.minimum(guess, bound)
    # No history, or no number to guess with: exact. A row that is not finite stays so.
    guess = torch.where((guess > 0) & guess.isfinite() & true.isfinite(), guess, true)
    share = torch.where(true.isfinite() & (unit > 0), true / unit, torch.zeros_like(true)).amax()
    history.copy_(torch.cat([share.view(torch.int32).to(torch.int64).reshape(1), history[:-1]]))
    state[CLIPPED].add_((magnitude > guess[:, None]).sum())
    state[SEEN].add_(magnitude.numel())
    return guess


def bound_from_product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Bounds of the rows of C = A Bᵀ (`fqt.reference.scaled_mm` in out_dtype), before it is computed: (M,) int32 bits.

        max_j |C_ij| ≤ ‖a_i‖ · max_j ‖b_j‖      (Cauchy and Schwarz), with the norms of the dequantized rows

    What rounding adds is allowed for: a relative 2⁻²⁰, an absolute 2⁻²⁰ of what the terms of an affine operand can
    amount to before they cancel (at most 8 roundings of float32 each), and the rounding to out_dtype, which keeps order.
    The sums of codes are exact in integers.

    Args:
        a: int8 codes (M, K), float32 scales and offsets, as dgrad's gradient.   b: (N, K), as W transposed.

    Raises:
        ValueError: float8 codes, whose sums are rounded by as much as the hardware likes.
    """
    if a.q.dtype != torch.int8 or b.q.dtype != torch.int8:
        raise ValueError(f"bound_from_product: codes must be int8, got {a.q.dtype} and {b.q.dtype}")
    (norm_a, size_a), (norm_b, size_b) = _norms(a), _norms(b)
    bound = norm_a * norm_b.amax() * (1 + 2.0**-20)
    if a.offset is not None or b.offset is not None:
        bound = bound + a.q.shape[1] * 2.0**-20 * size_a * size_b.amax()
    return bound.float().to(out_dtype).float().view(torch.int32)


def _norms(x: Operand) -> tuple[Tensor, Tensor]:
    """In float64, of the rows of x dequantized: the Euclidean norms (R,), and bounds of the terms of an element."""
    q = x.q.to(torch.int32)
    squares, sums = q.square().sum(1).double(), q.sum(1).double()
    scale = torch.ones_like(squares) if x.scale is None else x.scale.double()
    offset = torch.zeros_like(squares) if x.offset is None else x.offset.double()
    total = scale**2 * squares + 2 * scale * offset * sums + offset**2 * q.shape[1]
    return total.clamp(min=0).sqrt(), 128 * scale + offset.abs()


def cross_entropy_row_ranges(
    logits: Tensor, target: Tensor, n: int | Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The least and the largest element of each row of ∂L/∂logits, for the mean cross-entropy L, without the gradient.

        ∂L/∂logits = (softmax(logits) - onehot(target)) / n:   lo_i = -(1 - p_y) / n,   hi_i = max_{j≠y} p_j / n

    so that the range is R_i = (1 - p_y + max_{j≠y} p_j) / n and the largest magnitude -lo_i. As exact as the softmax:
    it is no bound of a gradient that is rounded otherwise.

    Args:
        logits: (M, C) floating point, C ≥ 2.   target: (M,) int64.   n: how many rows the loss is the mean of.
        ignore_index: rows of this target have no gradient, and do not count towards n.

    Returns:
        lo, hi: (M,) float32 (float64 for float64).

    Source: StatQuant's third review; [derived].
    """
    counted = target != ignore_index
    y = torch.where(counted, target, 0)[:, None]
    p = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(1)
    lo = p.gather(1, y).squeeze(1).expm1()
    hi = p.scatter(1, y, -torch.inf).amax(1).exp()
    return tuple(torch.where(counted, t / n, 0.0) for t in (lo, hi))


# ---- the hand-over from layer to layer


class _Left(NamedTuple):
    storage: StorageWeakRef
    identity: tuple
    place: tuple
    rows: Rows


class Handover:
    """Carries `Rows` of a layer's dX to the layer below, for which that very tensor, or a view of all of it, is dY.

    A tensor is the same where its storage is (a weak reference, which also keeps the storage's identity from being given
    to another), its address, shape, strides and dtype, and its version: an addition of autograd's, in place or not, a hook
    that changes or replaces the gradient and any other write that autograd sees make it another. Stream and backward pass
    must be the same too, so that the magnitudes are there when they are read, and in the same captured graph. Gradients are
    not kept alive; magnitudes are, of at most `limit` tensors, until the gradients are gone and others are left.

    Nothing is left or taken for tensor subclasses and modes (torch.compile, fake tensors, functorch, counters), under
    create_graph, in inference mode or outside of a backward pass. Writes that autograd does not see go unnoticed, as they
    do in all of autograd: a hook that changes an activation's gradient through `.data`, numpy, a kernel of another library
    or GradScaler's private operator. Set `enabled` to False for a model with such hooks.

    counts: how often rows were "left" and "taken", and why they were not: nothing was there ("none"), the tensor was
    written to ("changed"), it is another view of the storage ("view"), another stream or pass ("place").
    """

    def __init__(self, limit: int = 32) -> None:
        self.limit, self.enabled = limit, True
        self.counts: Counter[str] = Counter()
        self._left: dict[int, _Left] = {}
        self._lock = threading.Lock()  # autograd has a thread for each device, and users may have more

    def serves(self, x: Tensor) -> bool:
        """Whether rows of x, or of a gradient made from it in this pass, could be handed over at all."""
        return (
            self.enabled
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and torch._C._current_graph_task_id() >= 0
            and _get_current_dispatch_mode() is None
            and type(x) is Tensor
            and torch._C._has_storage(x)  # not sparse, nor batched by torch.autograd.grad(is_grads_batched=True)
            and not x.is_inference()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and not torch._is_functional_tensor(x)
            and x.device.type in ("cpu", "cuda")
            and x.dtype in _DTYPES
            and x.numel() > 0
        )

    def leave(self, x: Tensor, rows: Rows) -> None:
        """Leave what is known of the rows of x, which was just made; rows.absmax is not written to afterwards."""
        if not self.serves(x):
            return
        storage = StorageWeakRef(x.untyped_storage())
        left = _Left(storage, _identity(x), _place(x), rows)
        with self._lock:
            for key in [key for key, old in self._left.items() if old.storage.expired()]:
                del self._left[key]
            self._left.pop(storage.cdata, None)
            while len(self._left) >= self.limit:
                del self._left[next(iter(self._left))]  # the oldest
            self._left[storage.cdata] = left
            self.counts["left"] += 1

    def take(self, x: Tensor) -> Rows | None:
        """What was left of the rows of x, or None; several layers may take the same."""
        if not self.serves(x):
            return None
        with self._lock:
            left = self._left.get(x.untyped_storage()._cdata)
            if left is None or left.storage.expired():
                how = "none"
            elif left.identity[0] != x._version:
                how = "changed"
            elif left.identity != _identity(x):
                how = "view"
            else:
                how = "taken" if left.place == _place(x) else "place"
            self.counts[how] += 1
        return left.rows if how == "taken" else None

    def clear(self) -> None:
        """Forget what was left, and the counts."""
        with self._lock:
            self._left.clear()
            self.counts.clear()


def _identity(x: Tensor) -> tuple:
    return (x._version, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device, x.is_neg())


def _place(x: Tensor) -> tuple:
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return (torch._C._current_graph_task_id(), stream)


def follows_linear(x: Tensor) -> bool:
    """Whether x, a layer's input with its autograd graph, is the output of a quantized layer, seen through views.

    Only then can the layer above leave anything that the one below can take. Views of a part are told apart by `take`.
    """
    node = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and "fqt_linear" in node.name()


handover = Handover()
