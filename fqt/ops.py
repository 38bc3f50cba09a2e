"""The operators `fqt::…` of torch.library: dispatch to a backend, fake implementations, autograd.

`quantize`, `scaled_mm` and the two halves of a linear layer. Each runs on CPU and CUDA tensors of any strides, traces
under torch.compile, and knows its output shapes without data. The optional outputs of an operator are empty tensors,
since operator schemas have no optional outputs.

torch.library takes longer to call an operator than this package to compute it. A layer (`linear_of`, `quantize_weight`)
calls the code beneath by itself where nothing would see the operator (`is_unwatched`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import custom_op

from . import gradients, products, ranges, reference, rng
from .qtensor import Operand, QTensor
from .ranges import handover
from .recipe import Quantizer, Recipe
from .unwatched import is_unwatched

_DEVICES = ("cpu", "cuda")


# ---- optional tensors in schemas


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _or_none(t: Tensor, present: bool) -> Tensor | None:
    return t if present else None


@functools.cache
def _recipe(text: str) -> Recipe:
    return Recipe.parse(text)


# Between the operators of a layer codes of either format travel as int8: few operators of torch take float8.


def _as_bytes(q: Tensor | None) -> Tensor | None:
    return None if q is None else q.view(torch.int8)


def _as_codes(q: Tensor | None, recipe: Recipe) -> Tensor | None:
    return q if q is None or recipe.format == "int" else q.view(torch.float8_e4m3fn)


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
    format: str = "int",
    row_absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize a matrix: (q, qt, scale, offset, row_sum, col_sum), empty where not asked for. See `reference.quantize`.

    row_absmax (M,) int32, as `scaled_mm` leaves it: the magnitudes of the rows of x, which are then not looked for.

    Raises:
        TypeError: x is no floating-point matrix.   ValueError: a quantizer's field, the multiplier's shape or the
        missing rng of a stochastic rounding.
    """
    quantizer = Quantizer(bits, granularity, zero, rounding, format=format)
    if x.dim() != 2 or not x.is_floating_point():
        raise TypeError(f"fqt::quantize: x must be a floating-point matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if rounding == "stochastic" and (rng is None or rng.shape != (2,) or rng.dtype != torch.int64):
        raise ValueError("fqt::quantize: stochastic rounding needs rng, a (2,) int64 tensor of key and step")
    if multiplier is not None and multiplier.shape not in ((x.shape[0], 1), (1, x.shape[1])):
        raise ValueError(f"fqt::quantize: multiplier is (M, 1) or (1, N), got {tuple(multiplier.shape)}")
    if sums and format == "e4m3":
        raise ValueError("fqt::quantize: sums of codes serve offsets, which e4m3 codes have none of")
    if row_absmax is not None:
        if row_absmax.dtype != torch.int32 or row_absmax.shape != (1 if granularity == "per_tensor" else x.shape[0],):
            raise ValueError(
                f"fqt::quantize: row_absmax is (M,) int32, per_tensor (1,), got {row_absmax.dtype} {tuple(row_absmax.shape)}"
            )
        if granularity == "per_column" or zero != "symmetric":
            raise ValueError("fqt::quantize: row_absmax goes with a symmetric quantizer per_row or per_tensor")
    for name, t in (("rng", rng), ("multiplier", multiplier), ("row_absmax", row_absmax)):
        if t is not None and t.device != x.device:
            raise ValueError(f"fqt::quantize: x is on {x.device}, {name} on {t.device}")
    if multiplier is not None:
        multiplier = multiplier.to(reference.compute_dtype(x))
    rng, row_absmax = (None if t is None else t.contiguous() for t in (rng, row_absmax))
    t = products.quantized(
        x, quantizer, multiplier=multiplier, rng=rng, stream=stream, rank=rank, rows=rows, cols=cols, sums=sums,
        row_absmax=row_absmax,
    )  # fmt: skip
    q, qt = (_or_empty(c, x.new_empty(0, dtype=_codes_dtype(format))) for c in (t.q, t.qt))
    row_sum, col_sum = (_or_empty(c, x.new_empty(0, dtype=torch.int32)) for c in (t.row_sum, t.col_sum))
    return q, qt, t.scale, _or_empty(t.offset, t.scale), row_sum, col_sum


@quantize.register_fake
def _(
    x, bits, granularity, zero, rounding, multiplier=None, rng=None, stream=0, rank=0, rows=True, cols=False, sums=False,
    format="int", row_absmax=None,
):  # fmt: skip
    m, n = x.shape
    scale = _fake_scale(x, granularity)
    return (
        x.new_empty((m, n) if rows else 0, dtype=_codes_dtype(format)),
        x.new_empty((n, m) if cols else 0, dtype=_codes_dtype(format)),
        scale,
        scale.new_empty(scale.shape if zero != "symmetric" else 0),
        x.new_empty(m if rows and sums else 0, dtype=torch.int32),
        x.new_empty(n if cols and sums else 0, dtype=torch.int32),
    )


def _codes_dtype(format: str) -> torch.dtype:
    return torch.float8_e4m3fn if format == "e4m3" else torch.int8


def _fake_scale(x: Tensor, granularity: str) -> Tensor:
    shape = {"per_tensor": (1, 1), "per_row": (x.shape[0], 1), "per_column": (1, x.shape[1])}[granularity]
    return x.new_empty(shape, dtype=reference.compute_dtype(x))


def quantize_weight(w: Tensor, recipe: Recipe, transposed: bool) -> QTensor:
    """W (N, K) by the recipe's quantizer, through the operator where that is traced; both layouts if transposed.

    The codes are int8, the bytes of those of another format.
    """
    z = recipe.w
    if w.dim() == 2 and w.is_floating_point() and z.rounding == "nearest" and is_unwatched(w):
        t = products.quantized(w, z, cols=transposed, sums=recipe.affine)
        return t if z.format == "int" else t._replace(q=_as_bytes(t.q), qt=_as_bytes(t.qt))
    q, qt, scale, offset, row_sum, col_sum = quantize(
        w, z.bits, z.granularity, z.zero, z.rounding, cols=transposed, sums=recipe.affine, format=z.format
    )
    return QTensor(
        _as_bytes(q),
        _as_bytes(_or_none(qt, transposed)),
        scale,
        _or_none(offset, z.zero != "symmetric"),
        _or_none(row_sum, recipe.affine),
        _or_none(col_sum, recipe.affine and transposed),
    )


# ---- fqt::scaled_mm


@custom_op("fqt::scaled_mm", mutates_args=("row_absmax",), device_types=_DEVICES)
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
    row_absmax: Tensor | None = None,
) -> Tensor:
    """C = A Bᵀ + bias (M, N) from codes a (M, K), b (N, K) int8 or float8_e4m3fn; see `reference.scaled_mm` for scales,
    offsets and sums.

    row_absmax (M,) int32, contiguous, initially 0: becomes the magnitudes of the rows of C, for `quantize` of C.

    Raises:
        TypeError: codes that are not matrices of one of these types, or scales that are not float32 (float64).
        ValueError: shapes that do not fit, or a sum that is missing.
    """
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn) or a.dim() != 2 or b.dim() != 2:
        raise TypeError(
            f"fqt::scaled_mm: a and b must be matrices of int8 or of float8_e4m3fn, got {a.dtype}, {b.dtype}"
        )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"fqt::scaled_mm: a {tuple(a.shape)} and b {tuple(b.shape)} differ in their last dimension")
    m, n = a.shape[0], b.shape[0]
    expected = {
        "a_scale": (a_scale, (1, m)), "b_scale": (b_scale, (1, n)), "a_offset": (a_offset, (a_scale.numel(),)),
        "b_offset": (b_offset, (1,)), "a_sum": (a_sum, (m,)), "b_sum": (b_sum, (n,)), "bias": (bias, (n,)),
        "row_absmax": (row_absmax, (m,)),
    }  # fmt: skip
    for t in (a_scale, b_scale, a_offset, b_offset):
        if t is not None and t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"fqt::scaled_mm: scales and offsets must be float32, got {t.dtype}")
    for name, (t, sizes) in expected.items():
        if t is not None and (t.dim() != 1 or t.numel() not in sizes):
            raise ValueError(
                f"fqt::scaled_mm: {name} must have shape ({' or '.join(map(str, sizes))},), got {tuple(t.shape)}"
            )
    if row_absmax is not None and (row_absmax.dtype != torch.int32 or not row_absmax.is_contiguous()):
        raise ValueError(f"fqt::scaled_mm: row_absmax must be contiguous int32, got {row_absmax.dtype}")
    if a.dtype != torch.int8 and (a_offset is not None or b_offset is not None):
        raise ValueError("fqt::scaled_mm: float8 codes have no offsets")
    if (a_offset is not None and b_sum is None) or (b_offset is not None and a_sum is None):
        raise ValueError("fqt::scaled_mm: an offset on one side needs the sum of the codes of the other")
    scales = [None if t is None else t.contiguous() for t in (a_scale, a_offset, b_scale, b_offset)]
    sums = [None if t is None else t.contiguous() for t in (a_sum, b_sum, bias)]
    return products.product(
        Operand(a, scales[0], scales[1], sums[0]), Operand(b, scales[2], scales[3], sums[1]), sums[2], out_dtype,
        row_absmax=row_absmax,
    )  # fmt: skip


@scaled_mm.register_fake
def _(a, b, a_scale, b_scale, a_offset=None, b_offset=None, a_sum=None, b_sum=None, bias=None,
      out_dtype=torch.float32, row_absmax=None):  # fmt: skip
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
    accumulate: bool = False,
    range_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y = Q_f(X) Q_θ(W)ᵀ + bias for X (M, K) and an already quantized W (N, K); the rest is saved for backward.

    weight takes no part in the forward pass: it is where the gradient of W goes; accumulate: wgrad adds to its .grad, where
    there is one, by itself (see `fqt.nn.Linear`). Returns (y, and if save_x the
    transposed codes of X (K, M), their scale, offset and column sums; else four empty tensors).
    """
    y, xq = _forward(x, bias, QTensor(w_q, None, w_scale, w_offset, w_row_sum), _recipe(recipe), out_dtype, save_x)
    if xq is None:
        return (
            y,
            x.new_empty(0, dtype=torch.int8),
            *(x.new_empty(0, dtype=w_scale.dtype) for _ in range(2)),
            x.new_empty(0, dtype=torch.int32),
        )
    return (
        y,
        _as_bytes(xq.qt),
        xq.scale,
        _or_empty(xq.offset, xq.scale),
        _or_empty(xq.col_sum, x.new_empty(0, dtype=torch.int32)),
    )


def _forward(
    x: Tensor, bias: Tensor | None, w: QTensor, r: Recipe, out_dtype: torch.dtype, save_x: bool
) -> tuple[Tensor, QTensor | None]:
    """Y, and if save_x X quantized in both layouts."""
    xq = products.quantized(x, r.x, cols=save_x, sums=r.affine)
    w = w if r.format == "int" else w._replace(q=_as_codes(w.q, r))
    return products.product(xq.rows(), w.rows(), bias, out_dtype), xq if save_x else None


@linear.register_fake
def _(x, weight, bias, w_q, w_qt, w_scale, w_offset, w_row_sum, w_col_sum, rng, recipe, out_dtype, save_x,
      accumulate=False, range_state=None):  # fmt: skip
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


@custom_op("fqt::linear_backward", mutates_args=("rng", "w_grad", "dx_absmax", "range_state"), device_types=_DEVICES)
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
    w_grad: Tensor | None = None,
    dy_absmax: Tensor | None = None,
    dy_exact: bool = False,
    dx_absmax: Tensor | None = None,
    range_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, dbias) of `fqt::linear` from dY (M, N), empty where not needed; advances the step of rng.

    The bias gradient is the column sum of dY itself. w_grad: dW is added to it, and not returned. dy_absmax, dy_exact: what
    was handed over of dY's rows; dx_absmax (M,) int32 zeros: becomes what is handed over of dX's (see `fqt.ranges`).
    """
    found = _gradients(
        dy, (x_qt, x_scale, x_offset, x_col_sum), (w_qt, w_scale, w_offset, w_col_sum), rng, rank, recipe,
        (x_dtype, w_dtype, bias_dtype), (need_x, need_w, need_bias), w_grad,
        None if dy_absmax is None else ranges.Rows(dy_absmax, dy_exact), dx_absmax, range_state,
    )  # fmt: skip
    return tuple(
        _or_empty(t, dy.new_empty(0, dtype=dtype))
        for t, dtype in zip(found, (x_dtype, w_dtype, bias_dtype), strict=True)
    )


def _gradients(
    dy: Tensor,
    x: tuple[Tensor | None, ...],
    w: tuple[Tensor | None, ...],
    rng: Tensor,
    rank: int,
    recipe: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    needed: tuple[bool, bool, bool],
    w_grad: Tensor | None,
    rows: ranges.Rows | None,
    dx_absmax: Tensor | None,
    range_state: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`linear_backward`, None for what is not needed or was added to w_grad.

    x, w: transposed codes, scale, offset and column sums, None or empty what there is not.   rows: what was handed over
    of dY's rows.
    """
    r = _recipe(recipe)
    random = {"rng": rng, "rank": rank}
    (x_dtype, w_dtype, bias_dtype), (need_x, need_w, need_bias) = dtypes, needed
    w = QTensor(None, _as_codes(w[0], r), *w[1:3], None, w[3])
    x_qt, x_scale, x_offset, x_col_sum = x
    offset = None if x_offset is None or not x_offset.numel() else x_offset
    x = QTensor(None, _as_codes(x_qt, r), x_scale, offset, None, _or_none(x_col_sum, r.affine))
    dx = dw = dbias = g = h = total = g_absmax = h_absmax = None
    if rows is not None or any(z is not None and z.range == "delayed" for z in (r.dgrad, r.wgrad)):
        g_absmax, h_absmax = (
            None if z is None or not needs else ranges.row_ranges_for(z, dy, multiplier, rows, state)
            for z, needs, multiplier, state in zip(
                (r.dgrad, r.wgrad), (need_x, need_w), gradients.multipliers(w, x, r),
                (None, None) if range_state is None else range_state, strict=True,
            )
        )  # fmt: skip
    both = None
    if need_x and need_w and g_absmax is None and h_absmax is None:
        both = gradients.quantized_gradient(dy, w, x, r, need_bias, bias_dtype=bias_dtype, **random)
    if both is not None:
        g, h, total = both
    if need_x:
        dx = gradients.input_gradient(dy, w, r, x_dtype, g, g_absmax, dx_absmax, **random)
    if need_bias:
        dbias = (dy.sum(0, dtype=w.scale.dtype) if total is None else total).to(bias_dtype)
    if need_w:  # last: dY may be the very gradient that is added to
        added = gradients.weight_gradient(dy, x, r, w_dtype, h, w_grad, h_absmax, **random)
        dw = added if w_grad is None else dw
    rng[1:].add_(1)
    return dx, dw, dbias


@linear_backward.register_fake
def _(dy, x_qt, x_scale, x_offset, x_col_sum, w_qt, w_scale, w_offset, w_col_sum, rng, rank, recipe,
      x_dtype, w_dtype, bias_dtype, need_x, need_w, need_bias, w_grad=None, dy_absmax=None, dy_exact=False,
      dx_absmax=None, range_state=None):  # fmt: skip
    m, n = dy.shape
    return (
        dy.new_empty((m, w_qt.shape[0]) if need_x else 0, dtype=x_dtype),
        dy.new_empty((n, x_qt.shape[0]) if need_w and w_grad is None else 0, dtype=w_dtype),
        dy.new_empty(n if need_bias else 0, dtype=bias_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, w_qt, w_scale, w_offset, _, w_col_sum, rng_state, recipe, _, save_x, accumulate, state = inputs
    ctx.mark_non_differentiable(*output[1:])
    r = _recipe(recipe)  # the same is saved as by `fqt_linear`: a checkpoint's recomputation may take the other way
    there = save_x, save_x, save_x and r.x.zero != "symmetric", save_x and r.affine
    of_x = (t if is_there else None for t, is_there in zip(output[1:], there, strict=True))
    saved = *of_x, w_qt, w_scale, w_offset, w_col_sum
    _remember(ctx, x, weight, bias, saved, rng_state, recipe, save_x, accumulate, state)


def _remember(ctx, x, weight, bias, saved, rng_state, recipe, save_x, accumulate, state) -> None:
    """For backward; saved: transposed codes, scale, offset and column sums, of X and of W."""
    ctx.range_state = state
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.rng, ctx.recipe, ctx.save_x = rng_state, recipe, save_x
    ctx.parameter = weight if accumulate else None
    ctx.follows = ranges.follows_linear(x)
    ctx.dtypes = (x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 15
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: under activation checkpointing each reading recomputes
    if (need_x and saved[4] is None) or (need_w and not ctx.save_x):
        raise RuntimeError("fqt::linear: a gradient is asked for that nothing was saved for (save_x, w_qt)")
    w_grad = _grad_to_add_to(ctx.parameter) if need_w else None
    z, w = _recipe(ctx.recipe).dgrad, _recipe(ctx.recipe).w
    rows = left = None
    if z is not None and ranges.uses_rows(z, w.granularity == "per_row") and handover.serves(dy):
        rows = handover.take(dy)
        left = dy.new_zeros(dy.shape[0], dtype=torch.int32) if need_x and ctx.follows else None
    needed = need_x, need_w, need_bias
    dx, dw, dbias = _backward_of(dy, saved, ctx, needed, w_grad, rows, left)
    if left is not None:
        handover.leave(dx, ranges.Rows(left, exact=z.range != "delayed"))
    if torch.is_grad_enabled():  # create_graph=True
        dx, dw, dbias = _NoSecondDerivative.apply(dy.new_empty(0, requires_grad=True), dx, dw, dbias)
    dw = dw if need_w and w_grad is None else None
    return (dx if need_x else None, dw, dbias if need_bias else None, *(None,) * 12)


def _backward_of(dy, saved, ctx, needed, w_grad, rows, left) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`linear_backward`, or what is beneath it."""
    if not torch.is_grad_enabled() and is_unwatched(dy, w_grad):
        if w_grad is not None:  # a kernel does not
            torch.autograd.graph.increment_version(w_grad)
        return _gradients(
            dy, saved[:4], saved[4:], ctx.rng, rng.rank(), ctx.recipe, ctx.dtypes, needed, w_grad, rows, left,
            ctx.range_state,
        )  # fmt: skip
    x = [dy.new_empty(0) if t is None else t for t in saved[:4]]
    handed = (None, False) if rows is None else rows
    return linear_backward(
        dy, *x, *saved[4:], ctx.rng, rng.rank(), ctx.recipe, *ctx.dtypes, *needed, w_grad, *handed, left, ctx.range_state
    )  # fmt: skip


def _grad_to_add_to(parameter: Tensor | None) -> Tensor | None:
    """The gradient of a parameter that wgrad may add to without autograd: nobody is told when it does.

    None where the addition is autograd's: there is no gradient yet or the kernel cannot add to it, someone waits to be
    told, the backward pass was not asked for this gradient, or wants it returned (`torch.autograd.grad`), or it runs beside
    the default stream, which autograd would have made wait.
    """
    if parameter is None or torch.is_grad_enabled() or not parameter.is_leaf or type(parameter.grad) is not Tensor:
        return None
    grad = parameter.grad
    if (grad.dtype, grad.shape, grad.device) != (parameter.dtype, parameter.shape, parameter.device):
        return None
    if not grad.is_contiguous() or (grad.dim() == 2 and grad.stride(1) != 1):
        return None
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    if grad.is_cuda and torch.cuda.current_stream(grad.device) != torch.cuda.default_stream(grad.device):
        return None
    try:
        asked = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # the gradient is to be returned
        return None
    return grad if asked else None


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through and refuses to be differentiated: silence would be a second derivative of zero."""

    @staticmethod
    def forward(ctx, anchor, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("fqt: a quantized layer has no second derivative; use recipe 'exact' where one is needed")


linear.register_autograd(_backward, setup_context=_setup_context)


# ---- a layer's call


def linear_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w: QTensor,
    rng_state: Tensor,
    recipe: str,
    out_dtype: torch.dtype,
    save_x: bool,
    accumulate: bool,
    range_state: Tensor | None,
) -> Tensor:
    """Y of `fqt::linear`, by the operator or, where nothing would see it, by the code beneath."""
    if not is_unwatched(x, weight, bias):
        return linear(
            x, weight, bias, w.q, w.qt, w.scale, w.offset, w.row_sum, w.col_sum, rng_state, recipe, out_dtype, save_x,
            accumulate, range_state,
        )[0]  # fmt: skip
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return fqt_linear.apply(x, weight, bias, w, rng_state, recipe, out_dtype, save_x, accumulate, range_state)
    return _forward(x, bias, w, _recipe(recipe), out_dtype, save_x)[0]


class fqt_linear(torch.autograd.Function):
    """`fqt::linear` without the dispatcher. `ranges.follows_linear` knows both nodes by this name."""

    @staticmethod
    def forward(ctx, x, weight, bias, w, rng_state, recipe, out_dtype, save_x, accumulate, range_state):
        y, xq = _forward(x, bias, w, _recipe(recipe), out_dtype, save_x)
        of_x = (None,) * 4 if xq is None else (_as_bytes(xq.qt), xq.scale, xq.offset, xq.col_sum)
        saved = *of_x, w.qt, w.scale, w.offset, w.col_sum
        _remember(ctx, x, weight, bias, saved, rng_state, recipe, save_x, accumulate, range_state)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, dy)[:10]
