"""After training, and without fine-tuning: rounding a model's weights to a grid, cutting the smallest, and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import position
from .cli import table
from .lsq import own_weight, weighted_layers
from .position import Position

if TYPE_CHECKING:
    from .convert import Filter

_HEAD = ("layer", "shape", "target", "Δ", "MSE", "MSE/Δ²", "kept")


@dataclass(frozen=True)
class WeightReport:
    """What became of one weight.

    name, shape: the layer's qualified name, the weight's shape. target: "grid", "grid+zero", "zero", or a function's repr;
    bits: of the grid. spacing: Δ of the grid, one value or one for each channel, 0 where all weights are zero; empty for
    other targets. mse: mean (new - old)², and mse_in_spacings: mean ((new - old) / Δ)², None without a grid; 1/12 is that of
    weights which lie evenly. nonzero: how many weights are not zero now. unchanged: why the weight was left as it is, or "".
    """

    name: str
    shape: tuple[int, ...]
    target: str
    bits: int | None
    spacing: tuple[float, ...]
    mse: float
    mse_in_spacings: float | None
    nonzero: int
    unchanged: str = ""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def kept(self) -> float:
        """The fraction of the weights that are not zero; 1 of no weights."""
        return self.nonzero / self.numel if self.numel else 1.0

    def to_dict(self) -> dict:
        return {**asdict(self), "kept": self.kept}

    def _cells(self) -> tuple[str, ...]:
        low, high = (min(self.spacing), max(self.spacing)) if self.spacing else (0, 0)
        spacing = "" if not self.spacing else f"{low:.4g}" if low == high else f"{low:.3g} to {high:.3g}"
        relative = "" if self.mse_in_spacings is None else f"{self.mse_in_spacings:.4f}"
        what = f"{self.bits}-bit {self.target}" if self.bits else self.target
        what = f"unchanged: {self.unchanged}" if self.unchanged else what
        shape = "×".join(map(str, self.shape))
        return self.name or "(the model)", shape, what, spacing, f"{self.mse:.3g}", relative, f"{self.kept:.2%}"


@dataclass(frozen=True)
class Report:
    """What `round_weights_` or `prune_` did to each layer. `str` is a table, `to_dict` the same as data for JSON."""

    weights: list[WeightReport] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(w.numel for w in self.weights)

    @property
    def mse(self) -> float:
        """Over all weights."""
        return sum(w.mse * w.numel for w in self.weights) / max(self.numel, 1)

    @property
    def kept(self) -> float:
        """The fraction of all weights that are not zero; 1 of no weights."""
        return sum(w.nonzero for w in self.weights) / self.numel if self.numel else 1.0

    def to_dict(self) -> dict:
        layers = [w.to_dict() for w in self.weights]
        return {"layers": layers, "numel": self.numel, "mse": self.mse, "kept": self.kept}

    def __str__(self) -> str:
        count = f"{len(self.weights)} layers, {self.numel} weights"
        total = (count, "", "", "", f"{self.mse:.3g}", "", f"{self.kept:.2%}")
        return table(_HEAD, [*(w._cells() for w in self.weights), total], right=range(3, 7))


class _Plan(NamedTuple):
    """Where a weight's points come from: the options, and the optimizer's state of it, if there is an optimizer."""

    options: Position
    range: Tensor | None = None
    threshold: Tensor | None = None


@torch.no_grad()
def round_weights_(
    model: nn.Module,
    bits: int | None = None,
    *,
    target: str | Callable[[Tensor], Tensor | None] | None = None,
    per_channel: bool | None = None,
    optimizer: Optimizer | None = None,
    filter_fn: Filter | None = None,
) -> Report:
    """Round the weights of a model's linear and convolutional layers to the nearest points of a grid, in place.

    The weights stay in their dtype, holding values of the grid Δ·{-q, …, q}, q = 2**(bits-1) - 1; biases stay as they are.
    A weight that several layers share is rounded once. Weights all below 2**-100 have no grid and stay.

    Without an optimizer Δ = max|w| / q, of each tensor or channel as it is now. With one, Δ is the one that the
    optimizer's last step drew the weights to, from the range in its state; what lies beyond that range is clipped to it.
    Target, bits and per_channel are then those of the weight's group, and one that is given must be the same. Of a group
    with target "grid+zero" the weights up to the threshold of the last step become zero; one with target None is left as
    it is, and the report says so.

    Args:
        bits: 2 to 8; 4 where neither it nor an optimizer is given.
        target: "grid", or a function that is given the weight and returns its points (`fqt.targets`), which has its own
            bits; "grid" where neither it nor an optimizer is given.
        per_channel: a Δ for each index of the first dimension.
        optimizer: a `fqt.optim` optimizer (PSGD, PSGDAdamW, PositionScaled) that has made a step on each of these weights.
        filter_fn: called with (module, qualified name); False leaves the layer as it is.

    Raises:
        TypeError: model is no module, optimizer none of `fqt.optim`.
        ValueError: an option out of range or in contradiction to the optimizer's group; no layer; a weight that is not
        finite, not an ordinary Parameter (see `fqt.lsq.own_weight`), or that the optimizer does not have, has made no step
        on, or draws to "zero". Nothing has changed then, unless a function returned points of another shape.
    """
    weights = _weights(model, filter_fn)
    given = {"bits": bits, "target": target, "per_channel": per_channel}
    given = {name: value for name, value in given.items() if value is not None}
    if optimizer is None:
        plans = dict.fromkeys(weights, _Plan(_without_optimizer(given)))
    else:
        plans = {name: _of_optimizer(name, w, optimizer, given) for name, w in weights.items()}
    own = next((plan.options.target for plan in plans.values() if callable(plan.options.target)), None)
    if own is not None and bits is not None:
        raise ValueError(f"bits belong to the target 'grid': {own!r} has its own")
    if all(plan.options.target is None for plan in plans.values()):
        raise ValueError("nothing to round: the groups of all these weights have target None")
    return Report([_rounded(name, w, plans[name]) for name, w in weights.items()])


@torch.no_grad()
def prune_(model: nn.Module, sparsity: float = 0.9, *, scope: str = "layer", filter_fn: Filter | None = None) -> Report:
    """Set the smallest weights of a model's linear and convolutional layers to zero, in place.

    Exactly the round(sparsity · n) weights of least magnitude (more only where more were zero already); of equal ones
    those of lower index, and of the earlier layer. A weight that several layers share counts once.
    No mask is kept: training that goes on moves the zeros again. A grid of `round_weights_` has a zero, so that zeros stay
    under rounding; rounding first makes many magnitudes equal, so prune first where both are wanted.

    Args:
        sparsity: the share, 0 to 1.
        scope: "layer", of each weight tensor; "global", of all of them together.
        filter_fn: called with (module, qualified name); False leaves the layer as it is.

    Raises:
        TypeError: model is no module.   ValueError: an option out of range, no layer, or a weight that is not finite or not
        an ordinary Parameter (see `fqt.lsq.own_weight`). Nothing has changed then.
    """
    Position(sparsity=sparsity)  # raises where it is out of range
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    weights = _weights(model, filter_fn)
    if scope == "layer":
        masks = [_smallest(w.abs().flatten(), sparsity) for w in weights.values()]
    else:
        device = next(iter(weights.values())).device
        all_sizes = torch.cat([w.abs().flatten().to(device) for w in weights.values()])
        masks = _smallest(all_sizes, sparsity).split([w.numel() for w in weights.values()])
    reports = []
    for (name, w), mask in zip(weights.items(), masks, strict=True):
        old = w.clone()
        w.masked_fill_(mask.reshape(w.shape).to(w.device), 0.0)
        reports.append(_report(name, w, old, "zero"))
    return Report(reports)


def _weights(model: nn.Module, filter_fn: Filter | None) -> dict[str, nn.Parameter]:
    """The layers' weights by the layers' names, shared ones once, checked."""
    found: dict[str, nn.Parameter] = {}
    for name, module in weighted_layers(model):
        if filter_fn is not None and not filter_fn(module, name):
            continue
        w = own_weight(module, name or "the model")
        if not bool(w.isfinite().all()):
            raise ValueError(f"{name or 'the model'}: its weight of shape {tuple(w.shape)} is not finite")
        if not any(w is other for other in found.values()):
            found[name] = w
    if not found:
        raise ValueError("no layer: the model has no nn.Linear or nn.Conv*, or filter_fn refused them all")
    return found


def _without_optimizer(given: dict) -> Position:
    target = given.get("target", "grid")
    if target != "grid" and not callable(target):
        raise ValueError(f"target must be 'grid' or a function of the weights, got {target!r}")
    return Position(**given)


def _of_optimizer(name: str, w: Tensor, optimizer: Optimizer, given: dict) -> _Plan:
    label = name or "the model"
    if not hasattr(optimizer, "position_of"):
        raise TypeError(
            f"optimizer must be one of fqt.optim, which draw weights to a grid, got {type(optimizer).__name__}"
        )
    try:
        p, state = optimizer.position_of(w)
    except ValueError:
        raise ValueError(f"{label}: its weight is none of the optimizer's; leave it out by filter_fn") from None
    for option, value in given.items():
        if value != getattr(p, option):
            raise ValueError(
                f"{label}: {option} {value!r} contradicts the optimizer's group, which has {getattr(p, option)!r}; round "
                "without optimizer for another grid than the one trained for"
            )
    if p.target == "zero":
        raise ValueError(f"{label}: its group's target 'zero' has no grid to round to; use prune_")
    rows = len(w) if p.per_channel and w.dim() else 1
    missing = len(state.get("range", ())) != rows or (p.target == "grid+zero" and "threshold" not in state)
    if p.has_range and w.numel() and missing:
        raise ValueError(
            f"{label}: the optimizer has made no step on its weight with these options: it has no range of it"
        )
    return _Plan(p, state.get("range"), state.get("threshold"))


def _rounded(name: str, w: nn.Parameter, plan: _Plan) -> WeightReport:
    p = plan.options
    if p.target is None:
        return _report(name, w, w, "", unchanged="its group has target None")
    if not w.numel():
        return _report(name, w, w, "", unchanged="it is empty")
    old = w.clone()
    if callable(p.target):
        points = p.target(w)
        if points is None:
            return _report(name, w, w, "", unchanged=f"{p.target!r} has no points for it")
        if points.shape != w.shape:
            raise ValueError(
                f"{name or 'the model'}: {p.target!r} returned points of shape {tuple(points.shape)} for weights of "
                f"shape {tuple(w.shape)}"
            )
        w.copy_(points)
        return _report(name, w, old, repr(p.target))
    range = plan.range if plan.range is not None else position.extremes(w, p.per_channel)
    w.copy_(position.targets(w, p, range, plan.threshold))
    reach = position.absmax(range)
    spacing = torch.where(reach >= position.NO_RANGE, reach / torch.full_like(reach, p.qmax), torch.zeros_like(reach))
    return _report(name, w, old, p.target, p.bits, spacing)


def _smallest(sizes: Tensor, sparsity: float) -> Tensor:
    """Of magnitudes (n,): a mask of the round(sparsity · n) smallest, of equal ones the first."""
    mask = torch.zeros_like(sizes, dtype=torch.bool)
    mask[sizes.argsort(stable=True)[: position.count_of_zeros(sparsity, len(sizes))]] = True
    return mask


def _report(
    name: str,
    w: Tensor,
    old: Tensor,
    target: str,
    bits: int | None = None,
    spacing: Tensor | None = None,
    unchanged: str = "",
) -> WeightReport:
    """spacing (1,) or (C,) of the grid; 0 where weights have none."""
    error = (w.double() - old.double()).square()
    relative = None
    if spacing is not None:
        squares = spacing.double().square().reshape(-1, *[1] * (w.dim() - 1))
        relative = _mean(torch.where(squares > 0, error / squares, torch.zeros_like(error)))
    spacings = () if spacing is None else tuple(spacing.tolist())
    nonzero = int(w.count_nonzero())
    return WeightReport(name, tuple(w.shape), target, bits, spacings, _mean(error), relative, nonzero, unchanged)


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else 0.0
