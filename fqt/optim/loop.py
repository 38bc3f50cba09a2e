"""The steps of the optimizers, of one tensor at a time in plain torch: the definition that every other path agrees with.

Arithmetic is float32 (float64 for float64 weights) with one rounding for each operation written here; results are rounded
once more where the tensor that holds them is bfloat16 or float16. Hyperparameters are numbers that Python computes in
float64 and that are then rounded to the arithmetic's dtype; lr may be a 0-d tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..position import (
    Position,
    advanced_range,
    advanced_threshold,
    extremes,
    first_threshold,
    position_scale,
    scale_to_points,
)
from ..reference import compute_dtype


def scale_of(w: Tensor, p: Position, state: dict) -> Tensor | None:
    """s of this step, None for 1; advances state["range"] and state["threshold"] by the weights as they are."""
    if p.target is None or not w.numel():
        return None
    if callable(p.target):
        points = p.target(w)
        if points is not None and points.shape != w.shape:
            raise ValueError(
                f"the target function must return a tensor of the parameter's shape {tuple(w.shape)} or None, got shape "
                f"{tuple(points.shape)}"
            )
        return None if points is None else scale_to_points(w, p, points)
    newest = extremes(w, p.per_channel)
    keep(state, "range", advanced_range(p, state.get("range"), newest))
    if p.target != "grid+zero":
        return position_scale(w, p, state["range"])
    if state.get("threshold") is None:
        state["threshold"] = first_threshold(w, p.sparsity)
    else:
        keep(state, "threshold", advanced_threshold(p, state["threshold"], w, state["range"]))
    return position_scale(w, p, state["range"], state["threshold"])


def keep(state: dict, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Write a value into the tensor of that name, which the replays of a CUDA graph advance; make it, of dtype, if there is
    none of the value's shape and of that dtype."""
    held, dtype = state.get(name), dtype or value.dtype
    if held is None or held.shape != value.shape or held.dtype != dtype:
        state[name] = value.to(dtype, copy=True)
    else:
        held.copy_(value)


def _rate(lr: float | Tensor, g: Tensor) -> Tensor:
    """lr as a 0-d tensor beside g, without a copy from the host."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.to(g)
    return torch.full((), lr.item() if isinstance(lr, Tensor) else lr, dtype=g.dtype, device=g.device)


def gradient(g: Tensor, w: Tensor, maximize: bool, grad_scale: Tensor | None = None) -> Tensor:
    """g in the compute dtype, divided by GradScaler's scale (times its reciprocal), with the sign of what is minimized."""
    g = g.to(compute_dtype(w))
    if grad_scale is not None:
        g = g * (torch.ones_like(grad_scale) / grad_scale).to(g)
    return -g if maximize else g


def sgd_step(w: Tensor, g: Tensor, state: dict, s: Tensor | None, *, lr: float | Tensor, momentum: float,
             dampening: float, weight_decay: float, nesterov: bool, position: str) -> Tensor:  # fmt: skip
    """w after a step with g = `gradient(…)`, in the compute dtype; state["momentum_buffer"] is made and advanced.

    With s: g·s before weight decay and momentum (position "grad"), or s times the whole update ("update").
    """
    x = w.detach().to(g.dtype)
    if s is not None and position == "grad":
        g = g * s
    if weight_decay:
        g = g + x * weight_decay
    if momentum:
        buffer = state.get("momentum_buffer")
        new = g if buffer is None else buffer.to(g.dtype) * momentum + g * (1 - dampening)
        keep(state, "momentum_buffer", new, w.dtype)
        g = g + new * momentum if nesterov else new
    if s is not None and position == "update":
        g = g * s
    return x - g * _rate(lr, g)


def adamw_step(w: Tensor, g: Tensor, state: dict, s: Tensor | None, *, lr: float | Tensor, betas: tuple[float, float],
               eps: float, weight_decay: float, position: str) -> Tensor:  # fmt: skip
    """w after a step with g = `gradient(…)`, in the compute dtype; state's exp_avg, exp_avg_sq and powers are made and
    advanced. powers (2,) float64: β₁ᵗ and β₂ᵗ. Weight decay is decoupled and never scaled."""
    x = w.detach().to(g.dtype)
    if not state.get("exp_avg", torch.empty(0)).numel():
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        state["powers"] = torch.ones(2, dtype=torch.float64, device=w.device)
    if s is not None and position == "grad":
        g = g * s
    lr = _rate(lr, g)
    x = x * (1 - lr * weight_decay)
    first = state["exp_avg"].to(g.dtype) * betas[0] + g * (1 - betas[0])
    second = state["exp_avg_sq"].to(g.dtype) * betas[1] + (g * g) * (1 - betas[1])
    keep(state, "exp_avg", first, w.dtype)
    keep(state, "exp_avg_sq", second, w.dtype)
    state["powers"].copy_(torch.stack([power * beta for power, beta in zip(state["powers"], betas, strict=True)]))
    c1, c2 = (1 - state["powers"]).to(g.dtype)
    update = (first / c1) / (root(second) / root(c2) + eps)
    if s is not None and position == "update":
        update = update * s
    return x - update * lr


def root(x: Tensor) -> Tensor:
    """√x, correctly rounded in float32: torch's own on a CPU is one unit off for some x. float64 has over 2·24 + 2 bits, so
    that its rounding, or an error of one unit, leaves the one to float32 as it is."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().to(x.dtype)
