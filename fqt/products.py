"""Quantization and the product of quantized matrices, on whichever backend dispatch chooses: what `ops` is made of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .dispatch import choose, device_info
from .qtensor import Operand, QTensor
from .recipe import Quantizer


def device_guard(t: Tensor):
    """Triton launches on the current device; the tensors may be on another."""
    return _Launching(t.device) if t.is_cuda else contextlib.nullcontext()


class _Launching(torch.cuda.device):
    """Says of a launch that a capture refused what to do about it. Entered at every launch: it takes a GPU's own index."""

    def __init__(self, device: torch.device) -> None:
        self.idx, self.prev_idx = device.index, -1

    def __exit__(self, kind, error, traceback):
        torch.cuda._maybe_exchange_device(self.prev_idx)
        if isinstance(error, RuntimeError) and "capturing" in str(error):
            raise RuntimeError(
                f"a kernel could not be launched while a CUDA graph is captured ({error}): run one step with the same "
                f"shapes before capturing, since Triton compiles and loads a kernel at its first launch"
            ) from error
        return False


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
    partial: Tensor | None = None,
) -> QTensor:
    """`fqt.reference.quantize`, by the kernels where dispatch chooses them.

    partial: the extremes of x · multiplier as a kernel found them (see `fqt_kernels.statistics`), which the kernels then
    do not look for.
    """
    random = rng if quantizer.rounding == "stochastic" else None
    choice = None
    if x.numel():
        layout = "both" if rows and cols else "cols" if cols else "rows"
        partial = row_absmax[None, None] if row_absmax is not None else partial
        words = kind(x, quantizer.granularity, quantizer.rounding, layout, "stats" * (partial is not None))
        choice = choose("quantize", x.device, *x.shape, dtype=x.dtype, format=quantizer.format, kind=words)
    if choice is None or choice.backend == "reference":
        return reference.quantize(x, quantizer, multiplier=multiplier, rng=random, stream=stream, rank=rank,
                                  rows=rows, cols=cols, sums=sums, row_absmax=row_absmax)  # fmt: skip
    from fqt_kernels.quantize import quantize as launch

    with device_guard(x):
        return QTensor(
            *launch(x, bits=quantizer.bits, granularity=quantizer.granularity, zero=zero(quantizer), rng=random,
                    multiplier=multiplier, stream=stream + 256 * rank, rows=rows, cols=cols, sums=sums,
                    stats=partial, kernel=choice.kernel or None, tile=choice.config or None)
        )  # fmt: skip


def kind(x: Tensor, *words: str) -> str:
    """`dispatch.Problem.kind` of a quantization of x."""
    return " ".join(filter(None, (*words, "" if x.is_contiguous() else "strided")))


def zero(quantizer: Quantizer) -> str:
    """How the kernels call a quantizer's codes."""
    return "e4m3" if quantizer.format == "e4m3" else quantizer.zero


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
    processors = device_info(str(a.q.device))[1] if choice.kernel == "hopper" else 1
    launch = launcher((choice.kernel, choice.config, choice.split_k), processors)
    more = {} if plain else dict(out=out, row_absmax=row_absmax)
    with device_guard(a.q):
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
