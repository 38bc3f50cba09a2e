"""BHQ's stages by the CPU backend and by the kernels, inputs for them, and what is right: for `householder`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fqt import products, reference
from fqt.gradients import DGRAD
from fqt.householder import Groups, Householder, group_rows
from fqt.qtensor import Operand, QTensor
from fqt.recipe import Quantizer, Recipe

from .cases import GRID, gaussian, quantize_exactly

BITS = 5
RNG = (0x0123456789ABCDEF, 7)  # key and step of the stochastic rounding
PSQ = Recipe.psq(BITS).dgrad
# How groups are formed; "auto" leaves those that do not lower the predicted variance as they are.
FORMS = {"global": Recipe.bhq(BITS).dgrad, "tile": Recipe.bhq(BITS, "tile").dgrad, "auto": Recipe.auto(BITS).dgrad}
SOURCES = ("lognormal", "equal", "one")


def gradient(source: str, m: int, n: int, device: torch.device, seed: int, dtype: torch.dtype) -> Tensor:
    """Gaussian rows. "lognormal": of sizes exp(2 z), z ~ N(0, 1), groups of every size. "equal": of one size, groups
    of 2 and 3 rows, the largest number of groups. "one": a single row leads all others."""
    rows = gaussian(m, n, device=device, seed=seed, dtype=torch.float32)
    if source == "lognormal":
        rows *= (2 * gaussian(m, 1, device=device, seed=seed + 1000, dtype=torch.float32)).exp()
    elif source == "one":
        rows[m // 3] *= 4 * m  # more than all others together
    return rows.to(dtype)


# ---- the stages, by the CPU backend and by the kernels


class Stages(NamedTuple):
    """How a backend does each stage, and None for the product with the inverse where it has none.

    statistics(dy) -> (ranges, magnitudes or None);   grouping(ranges, "global" or "tile") -> groups
    transform(dy, statistics, groups, quantizer, rng) -> QTensor
    inverse(z, magnitudes of z or None, statistics, groups, value, columns, dtype) -> dX
    product(a, b, statistics, groups, value, columns, dtype) -> dX
    """

    statistics: Callable[..., tuple[Tensor, Tensor | None]]
    grouping: Callable[..., Any]
    transform: Callable[..., QTensor]
    inverse: Callable[..., Tensor]
    product: Callable[..., Tensor] | None


def torch_stages() -> Stages:
    """The definitions of `fqt.householder` and `fqt.reference`, which are the CPU backend."""

    def statistics(dy: Tensor) -> tuple[Tensor, None]:
        y = dy.float()
        return y.amax(1) - y.amin(1), None

    def transform(dy: Tensor, found, groups: Groups, z: Quantizer, rng: Tensor) -> QTensor:
        h, y = Householder(groups, (found[0] == 0)[:, None]), dy.float()
        t = h.apply(y)
        if z.auto:
            t = h.where_better(found[0], t.amax(1) - t.amin(1)).apply(y)
        return reference.quantize(t, z, rng=rng, stream=DGRAD, sums=True)

    def inverse(z: Tensor, absmax, found, groups: Groups, value: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        h = Householder(groups, (found[0] == 0)[:, None])
        return torch.where(h.constant, value[:, None] * columns, h.inverse(z)).to(dtype)

    return Stages(statistics, group_rows, transform, inverse, None)


def kernel_stages(device: torch.device, m: int, n: int, k: int) -> Stages:
    """Those of `fqt_kernels`."""
    from fqt import candidates, dispatch
    from fqt_kernels import gemm_householder, grouping, householder
    from fqt_kernels.statistics import row_stats

    family = candidates.family(dispatch.problem("scaled_mm", device, m, k, n)) or "sm80"

    def statistics(dy: Tensor) -> tuple[Tensor, Tensor]:
        return grouping.row_ranges(row_stats(dy, "per_row", False))

    def transform(dy: Tensor, found, groups, z: Quantizer, rng: Tensor) -> QTensor:
        ranges, absmax = found
        if z.auto:  # writes its choice into s
            groups = groups._replace(s=groups.s.clone())
        q, scale, offset, total = householder.transform(
            dy, groups, absmax, bits=z.bits, zero=z.zero, rng=rng, stream=DGRAD, sums=True,
            ranges=ranges if z.auto else None,
        )  # fmt: skip
        return QTensor(q, None, scale, offset, total)

    def inverse(z: Tensor, absmax, found, groups, value: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        return householder.inverse(z, groups, absmax, ranges=found[0], value=value, columns=columns, out_dtype=dtype)

    def product(a: Operand, b: Operand, found, groups, value: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        return gemm_householder.scaled_mm(
            a.q, b.q, a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum, out_dtype=dtype,
            groups=groups, ranges=found[0], value=value, columns=columns, config=gemm_householder.config(family, m, k),
        )  # fmt: skip

    fused = gemm_householder.reason_against(family, m, k, n) is None
    return Stages(statistics, grouping.group_rows, transform, inverse, product if fused else None)


# ---- inputs, and what is right for them


class Problem:
    """Gradients dY and one W, quantized, and the inputs and the right outcome of each stage for input set i.

    Nothing is made before it is asked for: the gradient alone of a large layer takes a gigabyte.
    """

    def __init__(self, m: int, n: int, k: int, device: torch.device, source: str, sets: int, stages: Stages) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.dtype, self.stages, self.rng = dtype, stages, torch.tensor(RNG, device=device)
        self.dy = [gradient(source, m, n, device, i, dtype) for i in range(sets)]
        self.w = gaussian(k, n, device=device, seed=77, dtype=dtype)  # Wᵀ
        self.b = products.quantized(self.w, GRID, sums=True).rows()
        self.columns = self.b.sum * self.b.scale + self.b.offset * float(n)
        for name in ("found", "groups", "right", "product", "magnitudes", "given"):
            setattr(self, name, functools.cache(getattr(self, name)))

    def value(self, i: int) -> Tensor:
        return self.dy[i][:, 0].float().contiguous()

    def found(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The statistics, by the stages."""
        return self.stages.statistics(self.dy[i])

    def groups(self, i: int, form: str) -> Any:
        """The groups, by the stages."""
        return self.stages.grouping(self.found(i)[0], FORMS[form].groups)

    def right(self, i: int, form: str) -> tuple[Householder, QTensor]:
        """The transform and the codes, by definition."""
        y, z = self.dy[i].float(), FORMS[form]
        h = Householder.of(y, z.groups)
        t = h.apply(y)
        if z.auto:
            h = h.where_better(*(x.amax(1) - x.amin(1) for x in (y, t)))
            t = h.apply(y)
        return h, quantize_exactly(t, z, rng=self.rng, stream=DGRAD, sums=True)

    def product(self, i: int, form: str) -> Tensor:
        """The float32 product of the right codes."""
        return reference.scaled_mm(self.right(i, form)[1].rows(), self.b)

    def magnitudes(self, i: int, form: str) -> Tensor:
        row_absmax = torch.zeros(self.dy[i].shape[0], dtype=torch.int32, device=self.dy[i].device)
        reference.widen_row_absmax(row_absmax, self.product(i, form))
        return row_absmax

    def input_gradient(self, i: int, form: str) -> Tensor:
        """dX, by definition, in float32."""
        h = self.right(i, form)[0]
        return torch.where(h.constant, self.value(i)[:, None] * self.columns, h.inverse(self.product(i, form)))

    def given(self, i: int) -> QTensor:
        """PSQ's codes."""
        return quantize_exactly(self.dy[i], PSQ, rng=self.rng, stream=DGRAD, sums=True)

    def variance(self, i: int, form: str) -> float:
        """An upper bound of E‖Ĝ - G‖², and of a sample of it: N/4 bins² of each row, weighted by the inverse transform."""
        h, codes = self.right(i, form)
        return 0.25 * self.dy[i].shape[1] * float((h.weights() * codes.scale[:, 0].double().square()).sum())
