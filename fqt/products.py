"""Quantization and the three matrix products of a layer, on whichever backend dispatch chooses: what `ops` is made of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .dispatch import choose, device_info
from .householder import Householder
from .qtensor import Operand, QTensor
from .recipe import Quantizer, Recipe

DGRAD, WGRAD = 0, 1  # streams: the two quantizations of one dY draw bits of their own


def _device_guard(t: Tensor):
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


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
    row_absmax: Tensor | None = None,
) -> QTensor:
    """`fqt.reference.quantize`, by the kernels where dispatch chooses them."""
    random = rng if quantizer.rounding == "stochastic" else None
    choice = None
    if x.numel():
        layout = "both" if rows and cols else "cols" if cols else "rows"
        kind = _kind(x, quantizer.granularity, quantizer.rounding, layout, "stats" * (row_absmax is not None))
        choice = choose("quantize", x.device, *x.shape, dtype=x.dtype, format=quantizer.format, kind=kind)
    if choice is None or choice.backend == "reference":
        return reference.quantize(x, quantizer, multiplier=multiplier, rng=random, stream=stream, rank=rank,
                                  rows=rows, cols=cols, sums=sums, row_absmax=row_absmax)  # fmt: skip
    from fqt_kernels.quantize import quantize as launch

    with _device_guard(x):
        return QTensor(
            *launch(x, bits=quantizer.bits, granularity=quantizer.granularity, zero=_zero(quantizer), rng=random,
                    multiplier=multiplier, stream=stream + 256 * rank, rows=rows, cols=cols, sums=sums,
                    stats=None if row_absmax is None else row_absmax[None, None],
                    kernel=choice.kernel or None, tile=choice.config or None)
        )  # fmt: skip


def _kind(x: Tensor, *words: str) -> str:
    """`dispatch.Problem.kind` of a quantization of x."""
    return " ".join(filter(None, (*words, "" if x.is_contiguous() else "strided")))


def _zero(quantizer: Quantizer) -> str:
    """How the kernels call a quantizer's codes."""
    return "e4m3" if quantizer.format == "e4m3" else quantizer.zero


def quantized_gradient(
    dy: Tensor, w: QTensor, x: QTensor, recipe: Recipe, bias: bool, *, rng: Tensor, rank: int
) -> tuple[QTensor, QTensor, Tensor | None] | None:
    """Both quantizations of dY (M, N), for dgrad and for wgrad, and its column sums (N,) if bias, by the fused kernels.

    They are those that `input_gradient` and `weight_gradient` make each for itself. None where no fused kernel applies.
    """
    g, h = recipe.dgrad, recipe.wgrad
    if g is None or h is None or g.householder or {g.rounding, h.rounding} != {"stochastic"} or dy.numel() == 0:
        return None
    kind = _kind(dy, g.granularity, h.granularity)
    choice = choose("quantize_gradient", dy.device, *dy.shape, dtype=dy.dtype, format=recipe.format, kind=kind)
    if choice.backend == "reference":
        return None
    from fqt_kernels.gradient import Side, quantize_gradient

    with _device_guard(dy):
        rows, cols, total = quantize_gradient(
            dy, *(Side(z.bits, z.granularity, _zero(z)) for z in (g, h)),
            row_mul=x.scale.flatten() if _folded(recipe.x) else None,
            col_mul=w.scale.flatten() if _folded(recipe.w) else None,
            rng=rng, streams=(DGRAD + 256 * rank, WGRAD + 256 * rank), sums=recipe.affine, bias=bias,
            tile=choice.config or None,
        )  # fmt: skip
    return (
        QTensor(rows.codes, None, rows.scale, rows.offset, row_sum=rows.sums),
        QTensor(None, cols.codes, cols.scale, cols.offset, col_sum=cols.sums),
        total,
    )


def product(
    a: Operand,
    b: Operand,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    row_absmax: Tensor | None = None,
) -> Tensor:
    """`fqt.reference.scaled_mm`, by the kernel that dispatch chooses.

    out: an existing matrix of contiguous rows, which the product is added to, rounded once, instead of a new one of
    out_dtype. row_absmax (M,) int32 is widened to cover the rows of the result (`fqt.reference.widen_row_absmax`).
    """
    m, n, k = a.q.shape[0], b.q.shape[0], a.q.shape[1]
    plain, choice = out is None and row_absmax is None, None
    if m and n:
        choice = choose("scaled_mm", a.q.device, m, n, k, a.scale.dtype, format=_format(a.q), plain=plain)
    if choice is None or choice.backend == "reference":
        c = reference.scaled_mm(a, b, bias, out_dtype if out is None else a.scale.dtype)
        c = c if out is None else out.copy_(out.to(c.dtype) + c)
        if row_absmax is not None:
            reference.widen_row_absmax(row_absmax, c)
        return c
    operands = a.q.contiguous(), b.q.contiguous(), a.scale, b.scale
    terms = dict(a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum,
                 bias=None if bias is None else bias.contiguous())  # fmt: skip
    processors = device_info(str(a.q.device))[1] if a.q.is_cuda else 1
    launch = launcher((choice.kernel, choice.config, choice.split_k), processors)
    more = {} if plain else dict(out=out, row_absmax=row_absmax)
    with _device_guard(a.q):
        return launch(*operands, **terms, **more, out_dtype=out_dtype if out is None else None)


def launcher(candidate: tuple[str, tuple[int, ...], int], processors: int) -> Callable[..., Tensor]:
    """The `scaled_mm` of a product's (kernel, config, split_k), see `candidates.Candidate`."""
    kernel, config, split_k = candidate
    if kernel == "hopper":
        from fqt_kernels.gemm_hopper import scaled_mm

        return functools.partial(scaled_mm, config=config, processors=processors)
    if kernel == "cublas":
        from fqt_kernels.gemm_cublas import scaled_mm

        return scaled_mm
    if kernel != "portable":
        raise ValueError(f"no product has a kernel {kernel!r}")
    from fqt_kernels.gemm import scaled_mm

    return functools.partial(scaled_mm, config=config, split_k=split_k)


def _format(q: Tensor) -> str:
    """The format of codes, as recipes call it."""
    return "int" if q.dtype == torch.int8 else "e4m3"


def _folded(quantizer: Quantizer) -> bool:
    """Whether the scales of X or W lie on an index that a gradient product contracts, so that they are folded into dY."""
    return quantizer.granularity == "per_row"


def _columns(t: QTensor, quantizer: Quantizer) -> Operand:
    """The transposed codes of X or W as an operand, with scale 1 where the scales are folded into dY."""
    return t.cols()._replace(scale=None) if _folded(quantizer) else t.cols()


def input_gradient(
    dy: Tensor, w: QTensor, recipe: Recipe, out_dtype: torch.dtype, g: QTensor | None = None, **random
) -> Tensor:
    """dgrad: dX = Q_b2(dY) W, (M, K), from dY (M, N) and the transposed codes of W (N, K); g: dY quantized already."""
    quantizer = recipe.dgrad
    if quantizer is None:
        return reference.mm(dy.to(w.scale.dtype), w.dequantize()).to(out_dtype)
    multiplier = w.scale.t() if _folded(recipe.w) else None
    operand = _columns(w, recipe.w)
    if not quantizer.householder:
        if g is None:
            g = quantized(dy, quantizer, multiplier=multiplier, stream=DGRAD, sums=recipe.affine, **random)
        return product(g.rows(), operand, out_dtype=out_dtype)
    y = dy.to(w.scale.dtype)
    y = y if multiplier is None else y * multiplier
    transform = Householder.of(y)
    codes = quantized(transform.apply(y), quantizer, stream=DGRAD, sums=recipe.affine, **random)
    # The inverse acts on the rows only, so it commutes with the product.
    dx = transform.inverse(product(codes.rows(), operand, out_dtype=w.scale.dtype))
    if y.shape[1]:
        columns = w.col_sum.to(y.dtype) if _folded(recipe.w) else w.col_sum * w.scale[0]
        columns = columns if w.offset is None else columns + w.offset[0] * float(y.shape[1])
        dx = torch.where(transform.constant, y[:, :1] * columns, dx)
    return dx.to(out_dtype)


def weight_gradient(
    dy: Tensor,
    x: QTensor,
    recipe: Recipe,
    out_dtype: torch.dtype,
    h: QTensor | None = None,
    out: Tensor | None = None,
    **random,
) -> Tensor:
    """wgrad: dW = Q_b1(dY)ᵀ X, (N, K), from dY (M, N) and the transposed codes of X (M, K).

    h: dY quantized already. out: a gradient of earlier steps (N, K) that this one is added to, instead of a new one.
    """
    if recipe.wgrad is None:
        dw = reference.mm(dy.t().to(x.scale.dtype), x.dequantize())
        return dw.to(out_dtype) if out is None else out.copy_(out + dw)
    if h is None:
        multiplier = x.scale if _folded(recipe.x) else None
        h = quantized(
            dy, recipe.wgrad, multiplier=multiplier, stream=WGRAD, rows=False, cols=True, sums=recipe.affine, **random
        )
    return product(h.cols(), _columns(x, recipe.x), out_dtype=out_dtype, out=out)
