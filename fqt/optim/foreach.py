"""The steps of `loop`, of many tensors at once in torch's multi-tensor operations: the same values to the last bit.

Multiplications and additions are separate (no `alpha=`, no `lerp`, no `addcmul`), as their fused forms round differently.
The operands of a sum or product may change places. Gradients are read only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..position import EMA, NO_RANGE, Position, advanced_threshold, first_threshold, scale_to_points
from ..reference import compute_dtype
from . import loop, state


class Batch(NamedTuple):
    """Parameters of one group, device and dtype, with their gradients and state. points: x̄ of a target that is a function.
    None of the ranges has a value yet, or all have (fresh); the same of the moments (new)."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict]
    points: list[Tensor | None]
    position: Position
    group: dict
    fresh: bool
    new: bool


def sgd_step(batch: Batch, lr: float | Tensor, grad_scale: Tensor | None) -> None:
    """`loop.sgd_step` of a batch, in place; lr a number, or a 0-d tensor on the batch's device in the compute dtype."""
    group, p = batch.group, batch.position
    xs, gs, scales = _prepared(batch, grad_scale)
    if scales and p.position == "grad":
        torch._foreach_mul_(scales, gs)
        gs = scales
    if group["weight_decay"]:
        decays = torch._foreach_mul(xs, group["weight_decay"])
        torch._foreach_add_(decays, gs)
        gs = decays
    if group["momentum"]:
        gs = _momentum(batch, gs)
    if scales and p.position == "update":
        torch._foreach_mul_(scales, gs)
        gs = scales
    _descend(batch.params, xs, torch._foreach_mul(gs, _each(lr, gs)))


def _momentum(batch: Batch, gs: list[Tensor]) -> list[Tensor]:
    """What momentum makes of the gradients; the buffers are made or advanced."""
    momentum, dampening, nesterov = (batch.group[key] for key in ("momentum", "dampening", "nesterov"))
    if batch.new:
        buffers = gs
        for held, w in zip(batch.states, batch.params, strict=True):
            held["momentum_buffer"] = torch.empty_like(w)
        _store(batch.states, "momentum_buffer", buffers)
    else:
        buffers = _computed([held["momentum_buffer"] for held in batch.states])
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, torch._foreach_mul(gs, 1 - dampening) if dampening else gs)
        _store(batch.states, "momentum_buffer", buffers)
    if not nesterov:
        return buffers
    ahead = torch._foreach_mul(buffers, momentum)
    torch._foreach_add_(ahead, gs)
    return ahead


def adamw_step(batch: Batch, lr: float | Tensor, grad_scale: Tensor | None) -> None:
    """`loop.adamw_step` of a batch, in place, its state's "step" included; lr as for `sgd_step`."""
    group, p, params = batch.group, batch.position, batch.params
    (beta1, beta2), kind = group["betas"], compute_dtype(params[0])
    xs, gs, scales = _prepared(batch, grad_scale)
    if scales and p.position == "grad":
        torch._foreach_mul_(scales, gs)
        gs = scales
    if batch.new:
        for held, w in zip(batch.states, params, strict=True):
            state.make_adamw(held, w)
    firsts, seconds = (_computed([held[key] for held in batch.states]) for key in ("exp_avg", "exp_avg_sq"))
    torch._foreach_mul_(firsts, beta1)
    torch._foreach_add_(firsts, torch._foreach_mul(gs, 1 - beta1))
    squares = torch._foreach_mul(gs, gs)
    torch._foreach_mul_(squares, 1 - beta2)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_add_(seconds, squares)
    _store(batch.states, "exp_avg", firsts)
    _store(batch.states, "exp_avg_sq", seconds)

    steps, powers = ([held[key] for held in batch.states] for key in ("step", "powers"))
    torch._foreach_add_(steps, 1)
    advanced = torch.stack(powers)  # (tensors, 2)
    advanced = torch.stack([advanced[:, 0] * beta1, advanced[:, 1] * beta2], 1)
    torch._foreach_copy_(powers, advanced.unbind())
    c1, c2 = (1 - advanced).to(kind).unbind(1)
    updates = torch._foreach_div(firsts, c1.unbind())
    denominators = _roots(seconds)
    torch._foreach_div_(denominators, _roots([c2])[0].unbind())
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_div_(updates, denominators)
    if scales and p.position == "update":
        torch._foreach_mul_(updates, scales)
    torch._foreach_mul_(updates, _each(lr, updates))
    if group["weight_decay"]:
        shrink = 1 - (lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=kind)) * group["weight_decay"]
        torch._foreach_mul_(xs, _each(shrink, xs))
    _descend(params, xs, updates)


def _each(factor: float | Tensor, tensors: list[Tensor]) -> float | list[Tensor]:
    """A factor of all tensors: a number, or on a GPU a list, as torch would read a single tensor back to the host."""
    if not isinstance(factor, Tensor):
        return factor
    return [factor] * len(tensors) if factor.is_cuda else factor.item()


def _roots(xs: list[Tensor]) -> list[Tensor]:
    """`loop.root`s; a GPU's own are correctly rounded."""
    return list(torch._foreach_sqrt(xs)) if xs[0].is_cuda else [loop.root(x) for x in xs]


def _descend(params: list[Tensor], xs: list[Tensor], updates: list[Tensor]) -> None:
    """params := xs - updates; xs are the parameters themselves or copies in the compute dtype."""
    torch._foreach_sub_(xs, updates)
    if xs[0] is not params[0]:
        torch._foreach_copy_(params, xs)


def _store(states: list[dict], key: str, values: list[Tensor]) -> None:
    """Write values into the states' tensors, rounding to their dtype, unless they are these tensors."""
    kept = [held[key] for held in states]
    if kept[0] is not values[0]:
        torch._foreach_copy_(kept, values)


def _computed(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves where they are of the compute dtype, else copies."""
    kind = compute_dtype(tensors[0])
    return tensors if tensors[0].dtype == kind else [t.to(kind) for t in tensors]


def _prepared(batch: Batch, grad_scale: Tensor | None) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """(xs, gs, s): weights and `loop.gradient`s in the compute dtype, and their scale, None for 1, in tensors of its own."""
    xs, gs = _computed(batch.params), _computed(batch.grads)
    if grad_scale is not None:
        gs = torch._foreach_mul(gs, _each((torch.ones_like(grad_scale) / grad_scale).to(gs[0]), gs))
    if batch.group["maximize"]:
        gs = torch._foreach_neg(gs)
    return xs, gs, _scales(batch, xs)


# ---- the scale


def _scales(batch: Batch, xs: list[Tensor]) -> list[Tensor] | None:
    """`loop.scale_of` of a batch; advances its ranges and thresholds."""
    p = batch.position
    if p.target is None:
        return None
    if callable(p.target):
        return [
            torch.ones_like(x) if points is None else scale_to_points(x, p, points)
            for x, points in zip(xs, batch.points, strict=True)
        ]
    ranges = _advanced_ranges(batch, xs)
    thresholds = None
    if p.target == "grid+zero":
        for held, x in zip(batch.states, xs, strict=True):
            if held.get("threshold") is None:
                held["threshold"] = first_threshold(x, p.sparsity)
            else:
                held["threshold"].copy_(advanced_threshold(p, held["threshold"], x, held["range"]))
        thresholds = [held["threshold"].reshape(()) for held in batch.states]
    return _position_scales(xs, p, ranges, thresholds)


def _advanced_ranges(batch: Batch, xs: list[Tensor]) -> Tensor:
    """(rows of all tensors, 2): `position.advanced_range`, stored as the states' "range" (rows of one tensor, 2)."""
    p = batch.position
    found = [_extremes(x, p.per_channel) for x in xs]
    sizes = [low.numel() for low, _ in found]
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    ranges = torch.stack([low.clamp(max=0), high.clamp(min=0)], 1)
    if not batch.fresh:
        running = [held["range"] for held in batch.states]
        if p.delta == "ema":
            ranges = ranges * EMA + torch.cat(running) * (1 - EMA)
        torch._foreach_copy_(running, ranges.split(sizes))
    else:
        for held, part in zip(batch.states, ranges.split(sizes), strict=True):
            held["range"] = part.clone()
    return ranges


def _extremes(x: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Minima (R,) and maxima (R,) of a tensor with non-finite elements as zeros."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    if per_channel and x.dim():
        return tuple(x.reshape(len(x), -1).aminmax(dim=1))
    return tuple(end.reshape(1) for end in x.aminmax())


def _position_scales(xs: list[Tensor], p: Position, ranges: Tensor, thresholds: list[Tensor] | None) -> list[Tensor]:
    """`position.position_scale` of tensors whose ranges (rows of all, 2) follow each other."""
    sizes = [len(x) if p.per_channel and x.dim() else 1 for x in xs]

    def per_tensor(rows: Tensor) -> list[Tensor]:
        parts = rows.split(sizes)
        return [
            v.reshape(()) if len(v) == 1 else v.reshape(-1, *[1] * (x.dim() - 1))
            for v, x in zip(parts, xs, strict=True)
        ]

    reach = torch.maximum(-ranges[:, 0], ranges[:, 1])
    exists = reach >= NO_RANGE
    spacing = torch.where(exists, reach, torch.ones_like(reach)) / torch.full_like(reach, float(p.qmax))
    if p.target == "zero":
        distances = torch._foreach_abs(xs)
    else:
        distances = _distances(xs, p.qmax, per_tensor(spacing), thresholds)
    if p.eps:
        torch._foreach_add_(distances, p.eps)
    if p.scale != "auto":
        torch._foreach_mul_(distances, p.scale)
    else:
        largest = p.largest if p.target == "zero" else 2 * p.largest
        factors = per_tensor(torch.full_like(spacing, largest) / spacing)
        if thresholds is not None:
            factors = [_factor(x, p, t, factor) for x, t, factor in zip(xs, thresholds, factors, strict=True)]
        torch._foreach_mul_(distances, factors)
        torch._foreach_clamp_max_(distances, p.largest)
    if exists.is_cuda or not exists.all():  # on a GPU unread
        for unknown, s in zip(per_tensor(~exists), distances, strict=True):
            s.masked_fill_(unknown, 1.0)
    return distances


def _distances(xs: list[Tensor], qmax: int, spacings: list[Tensor], thresholds: list[Tensor] | None) -> list[Tensor]:
    """|x - x̄| of the grid, and with thresholds of zero for the smallest; where there is no range, anything."""
    points = torch._foreach_div(xs, spacings)
    torch._foreach_clamp_max_(points, float(qmax))
    torch._foreach_clamp_min_(points, -float(qmax))
    torch._foreach_round_(points)
    torch._foreach_mul_(points, spacings)
    if thresholds is not None:
        for x, point, threshold in zip(xs, points, thresholds, strict=True):
            point.masked_fill_(x.abs() <= threshold, 0.0)
    torch._foreach_sub_(points, xs)
    torch._foreach_abs_(points)
    return points


def _factor(x: Tensor, p: Position, threshold: Tensor, factor: Tensor) -> Tensor:
    """λ of every weight of "grid+zero" under scale "auto"."""
    exists = threshold >= NO_RANGE
    near = torch.full_like(threshold, p.largest) / torch.where(exists, threshold, torch.ones_like(threshold))
    return torch.where(x.abs() <= threshold, torch.where(exists, near, factor), factor)
