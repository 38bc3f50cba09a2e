"""The steps of an optimizer by the kernel: one launch for all parameters of a dtype on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fqt_kernels.psgd import MultiTensor
from fqt_kernels.psgd_table import Hyper, Slot, is_capturing, unsupported

from .. import nn
from ..position import NO_RANGE, Position, first_threshold
from ..products import device_guard
from . import state

if TYPE_CHECKING:
    from .base import Found

_HYPERS = {"sgd": ("momentum", "dampening", "weight_decay", "nesterov", "maximize"),
           "adamw": ("betas", "eps", "weight_decay", "maximize")}  # fmt: skip


class _Known(NamedTuple):
    """A parameter that the kernel steps, with all of its state there, and what that was found by."""

    w: Tensor
    position: Position
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    has_moments: bool
    held: dict
    state: tuple[tuple[str, Tensor], ...]
    tensors: tuple[Tensor | None, ...]  # first, second, powers, range, threshold

    def still(self, w: Tensor, found: Found, held: dict | None) -> bool:
        """Whether nothing has changed but values."""
        if not (self.w is w and self.held is held and self.position is found.position):
            return False
        if self.has_moments is not found.has_moments or self.dtype is not w.dtype:
            return False
        if self.shape != w.shape or self.stride != w.stride():
            return False
        for name, value in self.state:
            if held.get(name) is not value:
                return False
        return True


class Kernel:
    """What steps the parameters of an optimizer that are on one device: rule "sgd" or "adamw".

    Weights and gradients have one set of dense strides (a gradient of others is copied), and so has the state.
    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._multi = MultiTensor()
        self._known: dict[int, _Known] = {}  # by the parameter's id
        self._hypers: dict[int, tuple] = {}  # by group: what its hyperparameters were made of, and they

    # ---- what it can step

    def divided(self, found: Found, states: Mapping) -> tuple[Found, list[tuple[Found, str]]]:
        """What the kernel can step of these parameters, and the others, by the reason."""
        against = {}
        for i, w in enumerate(found.params):
            held, known = states.get(w), self._known.get(id(w))
            if known is None or not known.still(w, found, held):
                self._known.pop(id(w), None)
                if why := _against(found, w, held or {}, self._rule):
                    against[i] = why
        if not against:
            return found, []
        taken = _some(found, [i for i in range(len(found.params)) if i not in against])
        reasons = dict.fromkeys(against.values())
        return taken, [(_some(found, [i for i in against if against[i] == why]), why) for why in reasons]

    def makes_state(self, found: Found) -> bool:
        """Whether a step of these parameters, which are `divided`, may make state."""
        return any(id(w) not in self._known for w in found.params if w.numel())

    # ---- the step

    def step(
        self,
        lists: list[Found],
        rates: list[float | Tensor],
        states: Mapping,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step them, make and advance their states, and the versions of what is written.

        rates: lr, numbers or 0-d float32 tensors on the device.   found_inf: given only where all states are there.
        """
        device = lists[0].params[0].device
        capturing = is_capturing(device)
        slots, hypers, emissions = [], [self._hyper(found, lr) for found, lr in zip(lists, rates, strict=True)], []
        scalars = [None if t is None else t.to(device, torch.float32) for t in (found_inf, grad_scale)]
        try:
            for number, found in enumerate(lists):
                for i, (w, g) in enumerate(zip(found.params, found.grads, strict=True)):
                    codes, bits = None, 8
                    if not capturing and (emitted := nn.emission(w)) is not None:
                        emissions.append((w, emitted))
                        codes, bits = emitted.codes, emitted.quantizer.bits
                    known = self._known.get(id(w))
                    if known is not None and not found.points and g.stride() == known.stride:
                        slots.append(Slot(w, g, *known.tensors, None, None, False, False, False, number, codes, bits))
                    else:
                        point = found.points[i] if found.points else None
                        slot = self._slot(w, g, states[w], found, point)
                        slots.append(slot._replace(group=number, codes=codes, bits=bits))
            with device_guard(slots[0].w):
                self._multi.step(slots, hypers, rule=self._rule, found_inf=scalars[0], grad_scale=scalars[1])
        except BaseException:
            self._unmake(slots, states)
            raise
        if self._rule == "adamw":
            steps = [states[slot.w]["step"] for slot in slots]
            taken = torch.ones_like(steps[0]) if found_inf is None else (scalars[0] == 0).to(steps[0])
            torch._foreach_add_(steps, taken, alpha=1.0)  # without alpha torch would read the tensor back to the host
        torch.autograd.graph.increment_version(
            [slot.w for slot in slots] + [codes for _, emitted in emissions for codes in emitted.codes]
        )
        self._multi.written(slots)
        if len(self._known) > len(slots):  # parameters that are gone, or have no gradient now
            self._known = {id(slot.w): self._known[id(slot.w)] for slot in slots}
        for w, emitted in emissions:
            emitted.renew(w)

    def _unmake(self, slots: list[Slot], states: Mapping) -> None:
        """Drop state that was made but has no value yet."""
        self._known.clear()
        for slot in slots:
            for made, name in (
                (slot.new, "momentum_buffer"),
                (slot.fresh, "range"),
                (slot.fresh_threshold, "threshold"),
            ):
                if made:
                    del states[slot.w][name]

    def _hyper(self, found: Found, lr: float | Tensor) -> Hyper:
        values = (found.group[key] for key in _HYPERS[self._rule])
        of = (
            found.position,
            lr,
            *(tuple(v) if isinstance(v, list) else v for v in values),
        )  # a list may change by itself
        known = self._hypers.get(found.index)
        if known is None or known[0][1] is not lr or known[0] != of:
            known = self._hypers[found.index] = of, hyper_of(found.position, found.group, lr, self._rule)
        return known[1]

    def _slot(self, w: Tensor, g: Tensor, held: dict, found: Found, points: Tensor | None) -> Slot:
        """A parameter as the kernel takes it; makes what its state lacks."""
        if not (g.is_contiguous() and w.is_contiguous()) and g.stride() != w.stride():
            g = torch.empty_like(w).copy_(g)
        p, new, fresh, fresh_threshold, lam = found.position, False, False, False, None
        names: list[str | None] = [None] * 5
        made: dict[str, Tensor] = {}
        if self._rule == "adamw":
            names[:3] = "exp_avg", "exp_avg_sq", "powers"
            if "exp_avg" not in held:
                state.make_adamw(made, w)
        elif found.has_moments:
            names[0] = "momentum_buffer"
            if new := held.get("momentum_buffer") is None:
                made["momentum_buffer"] = torch.empty_like(w)
        if not w.numel():
            points = None
        elif p.has_range:
            names[3] = "range"
            if fresh := not state.has_range(held, w, p):
                made["range"] = torch.empty(_rows(w, p), 2, device=w.device)
            if p.target == "grid+zero":
                names[4] = "threshold"
                if fresh_threshold := held.get("threshold") is None:
                    made["threshold"] = first_threshold(w, p.sparsity)
        elif points is not None:
            points = torch.empty_like(w, dtype=torch.float32).copy_(points)
            lam = _factor(w, p, points)
        if made and is_capturing(w.device):
            raise ValueError(
                f"a parameter of shape {tuple(w.shape)} has no {' nor '.join(made)} yet: a first step cannot be captured in "
                f"a CUDA graph, take one before"
            )
        held |= made
        tensors = tuple([None if name is None else held[name] for name in names])
        kept = tuple([(name, held[name]) for name in names if name is not None])
        self._known[id(w)] = _Known(w, p, w.dtype, w.shape, w.stride(), found.has_moments, held, kept, tensors)
        return Slot(w, g, *tensors, points, lam, fresh, fresh_threshold, new)


def _against(found: Found, w: Tensor, held: Mapping, rule: str) -> str | None:
    """Why the kernel cannot step a parameter, None if it can."""
    p, range, threshold = found.position, None, None
    names = ("exp_avg", "exp_avg_sq") if rule == "adamw" else ("momentum_buffer",)
    first, second = (*(held.get(name) for name in names), None)[:2]
    if p.has_range and w.numel():
        range = torch.empty(_rows(w, p), 2, device=w.device)
        threshold = torch.empty(1, device=w.device) if p.target == "grid+zero" else None
    return unsupported(Slot(w, w, first, second, range=range, threshold=threshold), hyper_of(p, found.group, 0.0, rule))


def _rows(w: Tensor, p: Position) -> int:
    return len(w) if p.per_channel and w.dim() else 1


def _some(found: Found, which: list[int]) -> Found:
    """The parameters of these numbers."""
    lists = ([values[i] for i in which] for values in (found.params, found.grads, found.numbers))
    return found._replace(**dict(zip(("params", "grads", "numbers"), lists, strict=True)), points=[])


def hyper_of(p: Position, group: Mapping, lr: float | Tensor, rule: str) -> Hyper:
    """A group's hyperparameters as the kernels take them; lr a number or a 0-d float32 tensor on the device."""
    of_position = {
        name: getattr(p, name) for name in ("qmax", "sparsity", "scale", "eps", "delta", "per_channel", "position")
    }
    target = "points" if callable(p.target) else p.target
    largest = 1.0 if p.scale != "auto" else p.largest
    own = {"adam_eps" if key == "eps" else key: group[key] for key in _HYPERS[rule]}
    if rule == "adamw":
        own["betas"] = tuple(own["betas"])
    return Hyper(lr, target=target, largest=largest, **of_position, **own)


def _factor(w: Tensor, p: Position, points: Tensor) -> Tensor:
    """(1,): λ of a target that is a function, 0 for s = 1; `fqt.position.scale_to_points`."""
    if p.scale != "auto":
        return torch.full((1,), p.scale, device=w.device)
    distance = (w.to(torch.float32) - points).abs() + p.eps
    reach = torch.where(distance.isfinite(), distance, torch.zeros_like(distance)).amax().reshape(1)
    exists = reach >= NO_RANGE
    factor = torch.full_like(reach, p.largest) / torch.where(exists, reach, torch.ones_like(reach))
    return torch.where(exists, factor, torch.zeros_like(factor))
