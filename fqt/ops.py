"""The operators `fqt::…` of torch.library: dispatch to a backend, fake implementations, autograd.

`quantize`, `scaled_mm` and the two halves of a linear layer. Each runs on CPU and CUDA tensors of any strides, traces
under torch.compile, and knows its output shapes without data. The optional outputs of an operator are empty tensors,
since operator schemas have no optional outputs.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference, rng
from .dispatch import Choice, problem, select
from .householder import Householder
from .qtensor import Operand, QTensor
from .recipe import Quantizer, Recipe

DGRAD, WGRAD = 0, 1  # streams: the two quantizations of one dY draw bits of their own
_DEVICES = ("cpu", "cuda")


def _choose(op: str, device: torch.device, m: int, n: int, k: int = 0, dtype: torch.dtype | None = None) -> Choice:
    choice = select(problem(op, device, m, n, k, dtype))
    if choice.backend == "refused":
        raise RuntimeError(f"fqt::{op}: {choice.reason}; or force the kernels with fqt.backend('triton')")
    return choice


def _device_guard(t: Tensor):
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


# ---- on whichever backend: what the operators below are made of


def quantized(
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
) -> QTensor:
    """`fqt.reference.quantize`, by the kernels where dispatch chooses them."""
    random = rng if quantizer.rounding == "stochastic" else None
    if x.numel() == 0 or _choose("quantize", x.device, *x.shape, dtype=x.dtype).backend == "reference":
        return reference.quantize(x, quantizer, multiplier=multiplier, rng=random, stream=stream, rank=rank,
                                  rows=rows, cols=cols, sums=sums)  # fmt: skip
    from fqt_kernels.quantize import quantize as launch

    with _device_guard(x):
        return QTensor(
            *launch(x, bits=quantizer.bits, granularity=quantizer.granularity, zero=quantizer.zero, multiplier=multiplier,
                    rng=random, stream=stream + 256 * rank, rows=rows, cols=cols, sums=sums)
        )  # fmt: skip


def product(a: Operand, b: Operand, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """`fqt.reference.scaled_mm`, by the kernel where dispatch chooses it."""
    m, n, k = a.q.shape[0], b.q.shape[0], a.q.shape[1]
    choice = _choose("scaled_mm", a.q.device, m, n, k, dtype=a.scale.dtype)
    if m == 0 or n == 0 or choice.backend == "reference":
        return reference.scaled_mm(a, b, bias, out_dtype)
    from fqt_kernels.gemm import scaled_mm as launch

    with _device_guard(a.q):
        return launch(
            a.q.contiguous(), b.q.contiguous(), a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum,
            b_sum=b.sum, bias=None if bias is None else bias.contiguous(), out_dtype=out_dtype, config=choice.config,
        )  # fmt: skip


def _without_scale(operand: Operand, folded: bool) -> Operand:
    """The operand with scale 1 where its scale, which lies on the contracted index, was folded into dY."""
    return operand._replace(scale=None) if folded else operand


def input_gradient(dy: Tensor, w: QTensor, recipe: Recipe, out_dtype: torch.dtype, **random) -> Tensor:
    """dgrad: dX = Q_b2(dY) W, (M, K), from dY (M, N) and the transposed codes of W (N, K)."""
    quantizer = recipe.dgrad
    if quantizer is None:
        return reference.mm(dy.to(w.scale.dtype), w.dequantize()).to(out_dtype)
    folded = recipe.w.granularity == "per_row"
    multiplier = w.scale.t() if folded else None
    operand = _without_scale(w.cols(), folded)
    if not quantizer.householder:
        g = quantized(dy, quantizer, multiplier=multiplier, stream=DGRAD, sums=recipe.affine, **random)
        return product(g.rows(), operand, out_dtype=out_dtype)
    g = dy.to(w.scale.dtype)
    g = g if multiplier is None else g * multiplier
    transform = Householder.of(g)
    codes = quantized(transform.apply(g), quantizer, stream=DGRAD, sums=recipe.affine, **random)
    # The inverse acts on the rows only, so it commutes with the product.
    dx = transform.inverse(product(codes.rows(), operand, out_dtype=w.scale.dtype))
    if g.shape[1]:
        columns = w.col_sum.to(g.dtype) if folded else w.col_sum * w.scale[0]
        columns = columns if w.offset is None else columns + w.offset[0] * float(g.shape[1])
        dx = torch.where(transform.constant, g[:, :1] * columns, dx)
    return dx.to(out_dtype)


def weight_gradient(dy: Tensor, x: QTensor, recipe: Recipe, out_dtype: torch.dtype, **random) -> Tensor:
    """wgrad: dW = Q_b1(dY)ᵀ X, (N, K), from dY (M, N) and the transposed codes of X (M, K)."""
    if recipe.wgrad is None:
        return reference.mm(dy.t().to(x.scale.dtype), x.dequantize()).to(out_dtype)
    folded = recipe.x.granularity == "per_row"
    multiplier = x.scale if folded else None
    h = quantized(
        dy, recipe.wgrad, multiplier=multiplier, stream=WGRAD, rows=False, cols=True, sums=recipe.affine, **random
    )
    return product(h.cols(), _without_scale(x.cols(), folded), out_dtype=out_dtype)


# ---- optional tensors in schemas


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _or_none(t: Tensor, present: bool) -> Tensor | None:
    return t if present else None


@functools.cache
def _recipe(text: str) -> Recipe:
    return Recipe.parse(text)


# ---- fqt::quantize


@custom_op("fqt::quantize", mutates_args=(), device_types=_DEVICES)
def quantize(
    x: Tensor,
    bits: int,
    granularity: str,
    zero: str,
    rounding: str,
    multiplier: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    rank: int = 0,
    rows: bool = True,
    cols: bool = False,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize a matrix: (q, qt, scale, offset, row_sum, col_sum), empty where not asked for. See `reference.quantize`.

    Raises:
        TypeError: x is no floating-point matrix.   ValueError: a quantizer's field, the multiplier's shape or the
        missing rng of a stochastic rounding.
    """
    quantizer = Quantizer(bits, granularity, zero, rounding)
    if x.dim() != 2 or not x.is_floating_point():
        raise TypeError(f"fqt::quantize: x must be a floating-point matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if rounding == "stochastic" and (rng is None or rng.shape != (2,) or rng.dtype != torch.int64):
        raise ValueError("fqt::quantize: stochastic rounding needs rng, a (2,) int64 tensor of key and step")
    if multiplier is not None and multiplier.shape not in ((x.shape[0], 1), (1, x.shape[1])):
        raise ValueError(f"fqt::quantize: multiplier is (M, 1) or (1, N), got {tuple(multiplier.shape)}")
    for name, t in (("rng", rng), ("multiplier", multiplier)):
        if t is not None and t.device != x.device:
            raise ValueError(f"fqt::quantize: x is on {x.device}, {name} on {t.device}")
    if multiplier is not None:
        multiplier = multiplier.to(reference.compute_dtype(x))
    t = quantized(
        x, quantizer, multiplier=multiplier, rng=rng, stream=stream, rank=rank, rows=rows, cols=cols, sums=sums
    )
    q, qt = (_or_empty(c, x.new_empty(0, dtype=torch.int8)) for c in (t.q, t.qt))
    row_sum, col_sum = (_or_empty(c, x.new_empty(0, dtype=torch.int32)) for c in (t.row_sum, t.col_sum))
    return q, qt, t.scale, _or_empty(t.offset, t.scale), row_sum, col_sum


@quantize.register_fake
def _(
    x, bits, granularity, zero, rounding, multiplier=None, rng=None, stream=0, rank=0, rows=True, cols=False, sums=False
):
    m, n = x.shape
    scale = _fake_scale(x, granularity)
    return (
        x.new_empty((m, n) if rows else 0, dtype=torch.int8),
        x.new_empty((n, m) if cols else 0, dtype=torch.int8),
        scale,
        scale.new_empty(scale.shape if zero != "symmetric" else 0),
        x.new_empty(m if rows and sums else 0, dtype=torch.int32),
        x.new_empty(n if cols and sums else 0, dtype=torch.int32),
    )


def _fake_scale(x: Tensor, granularity: str) -> Tensor:
    shape = {"per_tensor": (1, 1), "per_row": (x.shape[0], 1), "per_column": (1, x.shape[1])}[granularity]
    return x.new_empty(shape, dtype=reference.compute_dtype(x))


def quantize_weight(w: Tensor, recipe: Recipe, transposed: bool) -> QTensor:
    """W (N, K) by the recipe's quantizer through the operator, so that it can be traced; both layouts if transposed."""
    z = recipe.w
    q, qt, scale, offset, row_sum, col_sum = quantize(
        w, z.bits, z.granularity, z.zero, z.rounding, cols=transposed, sums=recipe.affine
    )
    return QTensor(
        q,
        _or_none(qt, transposed),
        scale,
        _or_none(offset, z.zero != "symmetric"),
        _or_none(row_sum, recipe.affine),
        _or_none(col_sum, recipe.affine and transposed),
    )


# ---- fqt::scaled_mm


@custom_op("fqt::scaled_mm", mutates_args=(), device_types=_DEVICES)
def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_offset: Tensor | None = None,
    b_offset: Tensor | None = None,
    a_sum: Tensor | None = None,
    b_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """C = A Bᵀ + bias (M, N) from codes a (M, K), b (N, K) int8; see `reference.scaled_mm` for scales, offsets and sums.

    Raises:
        TypeError: codes that are not int8 matrices.   ValueError: shapes that do not fit, or a sum that is missing.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2:
        raise TypeError(f"fqt::scaled_mm: a and b must be int8 matrices, got {a.dtype} and {b.dtype}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"fqt::scaled_mm: a {tuple(a.shape)} and b {tuple(b.shape)} differ in their last dimension")
    m, n = a.shape[0], b.shape[0]
    expected = {
        "a_scale": (a_scale, (1, m)), "b_scale": (b_scale, (1, n)), "a_offset": (a_offset, (a_scale.numel(),)),
        "b_offset": (b_offset, (1,)), "a_sum": (a_sum, (m,)), "b_sum": (b_sum, (n,)), "bias": (bias, (n,)),
    }  # fmt: skip
    for name, (t, sizes) in expected.items():
        if t is not None and (t.dim() != 1 or t.numel() not in sizes):
            raise ValueError(
                f"fqt::scaled_mm: {name} must have shape ({' or '.join(map(str, sizes))},), got {tuple(t.shape)}"
            )
    if (a_offset is not None and b_sum is None) or (b_offset is not None and a_sum is None):
        raise ValueError("fqt::scaled_mm: an offset on one side needs the sum of the codes of the other")
    scales = [None if t is None else t.contiguous() for t in (a_scale, a_offset, b_scale, b_offset)]
    sums = [None if t is None else t.contiguous() for t in (a_sum, b_sum, bias)]
    return product(
        Operand(a, scales[0], scales[1], sums[0]), Operand(b, scales[2], scales[3], sums[1]), sums[2], out_dtype
    )


@scaled_mm.register_fake
def _(a, b, a_scale, b_scale, a_offset=None, b_offset=None, a_sum=None, b_sum=None, bias=None, out_dtype=torch.float32):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


# ---- fqt::linear: forward, and its backward


@custom_op("fqt::linear", mutates_args=(), device_types=_DEVICES)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_q: Tensor,
    w_qt: Tensor | None,
    w_scale: Tensor,
    w_offset: Tensor | None,
    w_row_sum: Tensor | None,
    w_col_sum: Tensor | None,
    rng: Tensor,
    recipe: str,
    out_dtype: torch.dtype,
    save_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y = Q_f(X) Q_θ(W)ᵀ + bias for X (M, K) and an already quantized W (N, K); the rest is saved for backward.

    weight takes no part in the forward pass: it is where the gradient of W goes. Returns (y, and if save_x the
    transposed codes of X (K, M), their scale, offset and column sums; else four empty tensors).
    """
    r = _recipe(recipe)
    xq = quantized(x, r.x, cols=save_x, sums=r.affine)
    w = QTensor(w_q, w_qt, w_scale, w_offset, w_row_sum, w_col_sum)
    y = product(xq.rows(), w.rows(), bias, out_dtype)
    if not save_x:
        return (
            y,
            x.new_empty(0, dtype=torch.int8),
            *(x.new_empty(0, dtype=w_scale.dtype) for _ in range(2)),
            x.new_empty(0, dtype=torch.int32),
        )
    return y, xq.qt, xq.scale, _or_empty(xq.offset, xq.scale), _or_empty(xq.col_sum, x.new_empty(0, dtype=torch.int32))


@linear.register_fake
def _(x, weight, bias, w_q, w_qt, w_scale, w_offset, w_row_sum, w_col_sum, rng, recipe, out_dtype, save_x):
    r = _recipe(recipe)
    (m, k), n = x.shape, w_q.shape[0]
    scale = _fake_scale(x, r.x.granularity)
    return (
        x.new_empty(m, n, dtype=out_dtype),
        x.new_empty((k, m) if save_x else 0, dtype=torch.int8),
        scale if save_x else scale.new_empty(0),
        scale.new_empty(scale.shape if save_x and r.x.zero != "symmetric" else 0),
        x.new_empty(k if save_x and r.affine else 0, dtype=torch.int32),
    )


@custom_op("fqt::linear_backward", mutates_args=("rng",), device_types=_DEVICES)
def linear_backward(
    dy: Tensor,
    x_qt: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    x_col_sum: Tensor,
    w_qt: Tensor | None,
    w_scale: Tensor,
    w_offset: Tensor | None,
    w_col_sum: Tensor | None,
    rng: Tensor,
    rank: int,
    recipe: str,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, dbias) of `fqt::linear` from dY (M, N), empty where not needed; advances the step of rng.

    The bias gradient is the column sum of dY itself.
    """
    r = _recipe(recipe)
    random = {"rng": rng, "rank": rank}
    dx, dw, dbias = (dy.new_empty(0, dtype=d) for d in (x_dtype, w_dtype, bias_dtype))
    if need_x:
        w = QTensor(None, w_qt, w_scale, w_offset, None, w_col_sum)
        dx = input_gradient(dy, w, r, x_dtype, **random)
    if need_w:
        present = x_offset.numel() > 0
        x = QTensor(None, x_qt, x_scale, _or_none(x_offset, present), None, _or_none(x_col_sum, r.affine))
        dw = weight_gradient(dy, x, r, w_dtype, **random)
    if need_bias:
        dbias = dy.sum(0, dtype=w_scale.dtype).to(bias_dtype)
    rng[1:].add_(1)
    return dx, dw, dbias


@linear_backward.register_fake
def _(dy, x_qt, x_scale, x_offset, x_col_sum, w_qt, w_scale, w_offset, w_col_sum, rng, rank, recipe,
      x_dtype, w_dtype, bias_dtype, need_x, need_w, need_bias):  # fmt: skip
    m, n = dy.shape
    return (
        dy.new_empty((m, w_qt.shape[0]) if need_x else 0, dtype=x_dtype),
        dy.new_empty((n, x_qt.shape[0]) if need_w else 0, dtype=w_dtype),
        dy.new_empty(n if need_bias else 0, dtype=bias_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, w_qt, w_scale, w_offset, _, w_col_sum, rng_state, recipe, _, save_x = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], w_qt, w_scale, w_offset, w_col_sum)
    ctx.rng, ctx.recipe, ctx.save_x = rng_state, recipe, save_x
    ctx.dtypes = (x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 13
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: under activation checkpointing each reading recomputes
    if (need_x and saved[4] is None) or (need_w and not ctx.save_x):
        raise RuntimeError("fqt::linear: a gradient is asked for that nothing was saved for (save_x, w_qt)")
    dx, dw, dbias = linear_backward(dy, *saved, ctx.rng, rng.rank(), ctx.recipe, *ctx.dtypes, need_x, need_w, need_bias)
    if torch.is_grad_enabled():  # create_graph=True
        dx, dw, dbias = _NoSecondDerivative.apply(dy.new_empty(0, requires_grad=True), dx, dw, dbias)
    return (dx if need_x else None, dw if need_w else None, dbias if need_bias else None, *(None,) * 10)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through and refuses to be differentiated: silence would be a second derivative of zero."""

    @staticmethod
    def forward(ctx, anchor, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("fqt: a quantized layer has no second derivative; use recipe 'exact' where one is needed")


linear.register_autograd(_backward, setup_context=_setup_context)
