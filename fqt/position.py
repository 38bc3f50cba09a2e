"""Position-based scaling of gradients: what a weight's gradient is multiplied with, by where the weight lies.

    s(w) = λ · (|w − x̄(w)| + ε)        x̄(w): the point of a target set that w is drawn to

This is the definition, in plain torch and one tensor at a time; it computes in float32 (float64 for float64 weights), in the
order written here, and the kernels agree with it to the last bit. The weights are those before the update.

Targets: "grid", the symmetric uniform grid Δ·{−q, …, q} with q = 2**(bits−1) − 1 and Δ = absmax / q; "zero"; "grid+zero",
zero for the smallest weights and the grid for the others; a function; None, for s = 1.

Source: "Position-based Scaled Gradient for Model Quantization and Pruning" (arXiv 2005.11035) equations 5 to 7; the running
range is that of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import compute_dtype

TARGETS = ("grid", "zero", "grid+zero")
DELTAS = ("ema", "absmax")
POSITIONS = ("grad", "update")
EMA = 0.1  # of the newest range in the running one, and of the missing share of zeros in the threshold
NO_RANGE = 2.0**-100  # weights that are all smaller have no grid: s = 1
# The largest s under scale "auto". For a weight midway between two grid points it is 2, so that the mean is about 1 where
# weights lie evenly; of "zero" it is that of the largest weight.
LARGEST = {"grid": 2.0, "zero": 4.0, "grid+zero": 2.0, "callable": 2.0}


@dataclass(frozen=True)
class Position:
    """The options of position-based scaling, of a parameter group.

    Args:
        target: "grid", "zero", "grid+zero", None for plain steps, or a function that is given the parameter and returns x̄,
            of its shape, or None for a plain step of that parameter (see `fqt.targets`).
        bits: 2 to 8, of the grid.
        sparsity: 0 to 1, of "grid+zero": the share of each tensor's weights that is drawn to zero.
        scale: λ, or "auto": λ follows the weights' range, so that s is at most `LARGEST`.
        eps: ε; with 0 a weight exactly on its target is moved by nothing but weight decay, momentum and a change of Δ.
        delta: "ema", Δ from a running average of minimum and maximum, a tenth of it new, or "absmax", of these weights.
        per_channel: a Δ for each index of the first dimension.
        position: "grad", s scales the gradient, before weight decay and momentum; "update", s scales the whole update.

    Raises:
        ValueError: a field is out of range, or fields that exclude each other are combined.   TypeError: a wrong type.
    """

    target: str | Callable[[Tensor], Tensor | None] | None = "grid"
    bits: int = 4
    sparsity: float = 0.9
    scale: float | str = "auto"
    eps: float = 0.0
    delta: str = "ema"
    per_channel: bool = False
    position: str = "grad"

    def __post_init__(self) -> None:
        if not (self.target is None or callable(self.target) or self.target in TARGETS):
            raise ValueError(
                f"target must be one of {', '.join(TARGETS)}, a function of the weights or None, got {self.target!r}"
            )
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if not _is_number(self.sparsity) or not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be a number from 0 to 1, got {self.sparsity!r}")
        if self.scale != "auto" and not (_is_number(self.scale) and 0 < self.scale < math.inf):
            raise ValueError(f"scale must be a positive number or 'auto', got {self.scale!r}")
        if not _is_number(self.eps) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be a number from 0, got {self.eps!r}")
        for field, allowed in (("delta", DELTAS), ("position", POSITIONS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if not isinstance(self.per_channel, bool):
            raise TypeError(f"per_channel must be a bool, got {self.per_channel!r}")
        if self.per_channel and callable(self.target):
            raise ValueError("per_channel belongs to the targets by name: a function finds its own points")

    @property
    def qmax(self) -> int:
        """The largest integer of the grid; 1 where there is none."""
        return 2 ** (self.bits - 1) - 1 if self.target in ("grid", "grid+zero") else 1

    @property
    def largest(self) -> float:
        """The largest s: `LARGEST` under scale "auto", else infinite."""
        if self.scale != "auto":
            return math.inf
        return LARGEST["callable" if callable(self.target) else self.target or "grid"]

    @property
    def has_range(self) -> bool:
        """Whether the scale needs the weights' range, which is state."""
        return self.target is not None and not callable(self.target)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- the range of the weights, and the threshold below which they are drawn to zero


def extremes(w: Tensor, per_channel: bool = False) -> Tensor:
    """(1, 2), per channel (w.shape[0], 2): the minimum and the maximum of the finite weights and of 0.

    A weight that is not finite takes no part: the others' steps do not depend on it.
    """
    x = w.detach().to(compute_dtype(w))
    x = torch.where(x.isfinite(), x, torch.zeros_like(x))
    rows = len(w) if per_channel and w.dim() else 1
    if not x.numel():
        return x.new_zeros(rows, 2)
    x = x.reshape(rows, -1)
    return torch.stack([x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)], 1)


def advanced_range(p: Position, running: Tensor | None, newest: Tensor) -> Tensor:
    """The range that a step uses, of `extremes` before it: 0.1·newest + 0.9·running, or the newest itself where there is
    none yet or p.delta is "absmax"."""
    if running is None or p.delta == "absmax":
        return newest
    return newest * EMA + running * (1 - EMA)


def absmax(range: Tensor) -> Tensor:
    """(R,): the magnitude that the grid reaches to, of ranges (R, 2)."""
    return torch.maximum(-range[:, 0], range[:, 1])


def count_of_zeros(sparsity: float, n: int) -> int:
    """How many of n weights a sparsity makes zeros."""
    return round(sparsity * n)


def first_threshold(w: Tensor, sparsity: float) -> Tensor:
    """(1,): the magnitude that a share `sparsity` of the weights does not exceed; 0 where that is none of them.

    Weights that are not finite count as the largest.
    """
    k = count_of_zeros(sparsity, w.numel())
    a = w.detach().to(compute_dtype(w)).abs().flatten()
    a = torch.where(a.isfinite(), a, torch.full_like(a, torch.finfo(a.dtype).max))
    return a.sort().values[k - 1 : k].clone() if k else a.new_zeros(1)


def advanced_threshold(p: Position, threshold: Tensor, w: Tensor, range: Tensor) -> Tensor:
    """The threshold that a step uses, of the last one's: t + 0.1 · (sparsity − share of |w| ≤ t) · max(t, absmax/256).

    It follows the quantile without sorting: the share is an integer count, whatever the order of counting. absmax: the
    largest of all channels.
    """
    n = w.numel()
    one = torch.ones((), dtype=range.dtype, device=w.device)
    small = (w.detach().to(range.dtype).abs() <= threshold).sum().to(range.dtype) / (one * n)
    step = (one * p.sparsity - small) * EMA
    return threshold + step * torch.maximum(threshold, absmax(range).amax() * 2.0**-8)


# ---- the scale


def targets(w: Tensor, p: Position, range: Tensor, threshold: Tensor | None = None) -> Tensor:
    """x̄ of every weight, in the compute dtype, for a target by name; range (R, 2) and threshold (1,) of this step.

    Where a tensor or channel has no range (`NO_RANGE`), w itself.
    """
    x = w.detach().to(range.dtype)
    if p.target == "zero":
        return torch.zeros_like(x)
    reach = _like_rows(absmax(range), x)
    exists = reach >= NO_RANGE
    q = float(p.qmax)
    spacing = torch.where(exists, reach, torch.ones_like(reach)) / torch.full_like(reach, q)
    point = torch.round((x / spacing).clamp(-q, q)) * spacing
    if p.target == "grid+zero":
        point = torch.where(x.abs() <= threshold.reshape(()), torch.zeros_like(x), point)
    return torch.where(exists, point, x)


def position_scale(w: Tensor, p: Position, range: Tensor, threshold: Tensor | None = None) -> Tensor:
    """s of every weight, in the compute dtype, for a target by name; range (R, 2) and threshold (1,) of this step.

    Under scale "auto" with q = p.qmax and L = p.largest, λ = 2·L / Δ (grid), L / absmax (zero), and for a weight that
    "grid+zero" draws to zero L / threshold; s is at most L also for a weight beyond the running range. Where a tensor or
    channel has no range s = 1.
    """
    x = w.detach().to(range.dtype)
    distance = (x - targets(w, p, range, threshold)).abs() + p.eps
    reach = _like_rows(absmax(range), x)
    exists = reach >= NO_RANGE
    if p.scale == "auto":
        reach = torch.where(exists, reach, torch.ones_like(reach))
        if p.target == "zero":
            scale = torch.full_like(reach, p.largest) / reach
        else:
            scale = torch.full_like(reach, 2 * p.largest) / (reach / torch.full_like(reach, float(p.qmax)))
        if p.target == "grid+zero":
            t = threshold.reshape(())
            near = torch.full_like(t, p.largest) / torch.where(t >= NO_RANGE, t, torch.ones_like(t))
            near = torch.where(t >= NO_RANGE, near, scale)
            scale = torch.where(x.abs() <= t, near, scale)
        s = distance * scale
        s = torch.where(s > p.largest, torch.full_like(s, p.largest), s)
    else:
        s = distance * p.scale
    return torch.where(exists, s, torch.ones_like(s))


def scale_to_points(w: Tensor, p: Position, points: Tensor) -> Tensor:
    """s of every weight for given x̄. Under scale "auto" λ = L / max |w − x̄| over the finite ones; s = 1 where all lie on
    their points and ε is 0."""
    x = w.detach().to(compute_dtype(w))
    distance = (x - points.to(x.dtype)).abs() + p.eps
    if p.scale != "auto":
        return distance * p.scale
    finite = torch.where(distance.isfinite(), distance, torch.zeros_like(distance))
    reach = finite.amax() if finite.numel() else finite.sum()
    exists = reach >= NO_RANGE
    s = distance * (torch.full_like(reach, p.largest) / torch.where(exists, reach, torch.ones_like(reach)))
    return torch.where(exists, s, torch.ones_like(s))


def _like_rows(v: Tensor, x: Tensor) -> Tensor:
    """(R,) → shaped to broadcast against x along its first dimension; 0-d of a whole tensor's one."""
    return v.reshape(()) if len(v) == 1 else v.reshape(-1, *[1] * (x.dim() - 1))
