"""What `PSGD` and `PSGDAdamW` share: checking, gathering, choosing who computes a step, and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import dispatch
from ..capture import is_capturing, refuse
from ..position import Position
from ..reference import compute_dtype
from . import options, state
from .foreach import Batch

if TYPE_CHECKING:
    from .fused import Kernel


class Found(NamedTuple):
    """The parameters of a group, device and dtype that have a gradient; numbers: which of the group's they are."""

    index: int
    group: dict
    position: Position
    has_moments: bool
    params: list[Tensor]
    grads: list[Tensor]
    numbers: list[int]
    points: list[Tensor | None]


class PositionOptimizer(torch.optim.Optimizer):
    """An optimizer that scales by position in its own step. Subclasses say what the rule of the step is.

    A step is that of `fqt.optim.loop`, whoever computes it. Options are checked when a group is added and again whenever
    they have changed.
    """

    advances_versions = True  # of every tensor it writes, so that caches keyed by them hold (see `fqt.nn`)
    _step_supports_amp_scaling = True  # torch.amp.GradScaler: hands over grad_scale and found_inf
    rule: str  # "sgd" or "adamw"
    moment: str  # the state that a parameter's first step makes
    names: Mapping[str, str] = {}  # options of `Position` that have another key in the groups
    own_options: tuple[str, ...]
    check: Callable[[Mapping], None]
    batch_step: Callable[[Batch, float | Tensor, Tensor | None], None]

    def __init__(self, params, defaults: dict, fused: bool | None) -> None:
        if fused is not None:
            options.flag("fused", fused)
        self.fused = fused
        self._warned_of_vectors = False
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop everything that can be found again."""
        self._checked: dict[int, tuple[tuple, Position]] = {}  # by group: its options when they were checked
        self._kernels: dict[torch.device, Kernel] = {}
        self.fallbacks: dict[str, str] = {}  # parameters that a GPU's kernel does not step, and why

    # ---- groups

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; options that it leaves out are the optimizer's defaults.

        Raises:
            TypeError, ValueError: an option is out of range, or a parameter is none that can be stepped; the group is then
            not added.
        """
        by_default = "target" not in param_group
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            self._position(index, group)
            options.learning_rate(group["lr"])
            for i, w in enumerate(group["params"]):
                options.parameter(w, options.label(self.param_groups, index, i))
        except Exception:
            self.param_groups.pop()
            self._checked.pop(index, None)
            raise
        if by_default and not self._warned_of_vectors:
            self._warned_of_vectors = options.warn_of_vectors(self.param_groups, [index])

    def _position(self, index: int, group: dict) -> Position:
        """A group's checked options."""
        values = tuple([group[key] for key in self.own_options])
        known = self._checked.get(index)
        if known is None or known[0] != values:
            type(self).check(group)
            known = self._checked[index] = values, options.position_of(group, self.names)
        return known[1]

    def position_of(self, w: Tensor) -> tuple[Position, dict]:
        """The options that a parameter is scaled by, and its state, empty before its first step.

        Raises:
            ValueError: it is none of the optimizer's parameters.
        """
        index = options.group_of(self.param_groups, w)
        return self._position(index, self.param_groups[index]), self.state.get(w, {})

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; returns the closure's loss.

        closure: reevaluates the model and returns the loss; called once, with gradients enabled, before anything else.

        Raises:
            TypeError, ValueError: an option, learning rate or gradient that cannot be used; nothing has been changed then.
            RuntimeError: fused=True, and there is no kernel for a parameter; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        except BaseException:
            for name in ("found_inf", "grad_scale"):  # GradScaler takes them away only after a step that returns
                self.__dict__.pop(name, None)
            raise
        return loss

    def _step(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        fused, int8, others = self._divided(self._found())
        self._check_capture(int8, others, found_inf)
        if found_inf is not None and (others or self._makes_state(fused, int8)):
            if found_inf.item():
                return
            found_inf = None
        for found in (*fused, *int8, *others):
            if callable(found.position.target):
                found.points.extend(self._points(found))
        for found in others:
            w = found.params[0]
            scale = None if grad_scale is None else grad_scale.to(w.device)
            for batch in self._batches(found):
                type(self).batch_step(batch, _rate(found, w), scale)
        for found in int8:
            self._int8_step(found, grad_scale, found_inf)
        for device in dict.fromkeys(f.params[0].device for f in fused):
            here = [f for f in fused if f.params[0].device == device]
            self._kernels[device].step(here, [_rate(f, f.params[0]) for f in here], self.state, grad_scale, found_inf)

    def _found(self) -> list[Found]:
        """What there is to step."""
        lists: dict[tuple, Found] = {}
        for index, group in enumerate(self.param_groups):
            position = self._position(index, group)
            options.learning_rate(group["lr"])
            has_moments = self.rule == "adamw" or group["momentum"] != 0
            for i, w in enumerate(group["params"]):
                g = w.grad
                if g is None:
                    continue
                device, dtype = w.device, w.dtype
                if g.layout is not torch.strided or g.dtype is not dtype or g.shape != w.shape or g.device != device:
                    options.gradient(g, w, options.label(self.param_groups, index, i))
                key = index, device, dtype, type(w)
                found = lists.get(key)
                if found is None:
                    _rate_device(group["lr"], device)
                    found = lists[key] = Found(index, group, position, has_moments, [], [], [], [])
                found.params.append(w)
                found.grads.append(g)
                found.numbers.append(i)
        return list(lists.values())

    def _makes_state(self, fused: list[Found], int8: list[Found]) -> bool:
        """Whether a step of these parameters makes state, which a kernel cannot leave undone."""
        return any(w not in self.state for found in int8 for w in found.params) or any(
            self._kernels[found.params[0].device].makes_state(found) for found in fused
        )

    def _check_capture(self, int8: list[Found], others: list[Found], found_inf: Tensor | None) -> None:
        """Refuse, while a CUDA graph is captured, what each replay would do anew and what waits for the device."""
        for found in (*int8, *others):
            if not is_capturing(found.params[0].device):
                continue
            if found_inf is not None and others:
                raise ValueError(
                    f"{options.label(self.param_groups, found.index, found.numbers[0])}: a step with a GradScaler cannot be "
                    f"captured in a CUDA graph without the kernel, which alone looks at found_inf on the device"
                )
            for w, i in zip(found.params, found.numbers, strict=True):
                if absent := _missing(found, w, self.state.get(w, {}), self.moment):
                    refuse(f"{options.label(self.param_groups, found.index, i)} has no {' nor '.join(absent)} yet")

    def _points(self, found: Found) -> Iterator[Tensor | None]:
        """x̄ of each parameter by the group's function."""
        for w, i in zip(found.params, found.numbers, strict=True):
            points = found.position.target(w)
            if points is not None and (not isinstance(points, Tensor) or points.shape != w.shape):
                got = f"shape {tuple(points.shape)}" if isinstance(points, Tensor) else repr(points)
                raise ValueError(
                    f"{options.label(self.param_groups, found.index, i)}: the target function must return a tensor of that "
                    f"shape or None, got {got}"
                )
            yield points

    def _batches(self, found: Found) -> list[Batch]:
        """Parameters whose state is alike."""
        batches: dict[tuple, Batch] = {}
        points = found.points or [None] * len(found.params)
        for w, g, point in zip(found.params, found.grads, points, strict=True):
            held = self.state[w]
            p = found.position if w.numel() else options.PLAIN
            fresh = p.has_range and not state.has_range(held, w, p)
            new = found.has_moments and held.get(self.moment) is None
            batch = batches.get((p is options.PLAIN, fresh, new))
            if batch is None:
                batch = batches[p is options.PLAIN, fresh, new] = Batch([], [], [], [], p, found.group, fresh, new)
            for values, value in zip(batch, (w, g, held, point), strict=False):
                values.append(value)
        return list(batches.values())

    def _int8_step(self, found: Found, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The step of weights that are held in int8."""
        from .int8 import step_

        fused = False if self.fused is False else None
        points = found.points or [None] * len(found.params)
        for w, g, point in zip(found.params, found.grads, points, strict=True):
            held, position = self.state[w], found.position
            if callable(position.target):  # evaluated once, before any parameter is stepped
                position = dataclasses.replace(position, target=lambda _, point=point: point)
            scalars = [None if t is None else t.to(w.device) for t in (grad_scale, found_inf)]
            if not state.has_range(held, w, position):
                held.pop("range", None)
            step_(w, g, held, position, found.group, self.rule, scalars[0], found_inf=scalars[1], fused=fused)
            if self.rule == "adamw":
                taken = 1 if found_inf is None else (scalars[1] == 0).to(torch.float32)
                if "step" not in held:
                    held["step"] = torch.zeros((), device=w.device)
                held["step"].add_(taken)

    # ---- who computes it

    def _divided(self, lists: list[Found]) -> tuple[list[Found], list[Found], list[Found]]:
        """What the kernel steps, what is held in int8 and has a step of its own, and what torch's operations step."""
        fused, int8, others = [], [], []
        for found in lists:
            w = found.params[0]
            if type(w) not in (Parameter, Tensor) and _is_int8(w):
                int8.append(found)
                if (reason := self._unchosen(w)) is not None:
                    self._decline(found, reason)
                continue
            reason = self._reason_against(w)
            if reason is not None:
                self._decline(found, reason)
                others.append(found)
                continue
            taken, left = self._kernel(w.device).divided(found, self.state)
            fused += [taken] if taken.params else []
            for part, why in left:
                self._decline(part, why)
                others.append(part)
        return fused, int8, others

    def _kernel(self, device: torch.device) -> Kernel:
        known = self._kernels.get(device)
        if known is None:
            from .fused import Kernel

            known = self._kernels[device] = Kernel(self.rule)
        return known

    def _reason_against(self, w: Tensor) -> str | None:
        """Why the kernel does not step parameters of this device and dtype, None if it does."""
        if self.fused is not False and type(w) not in (Parameter, Tensor):
            return f"the kernel takes no {type(w).__name__}"
        return self._unchosen(w)

    def _unchosen(self, w: Tensor) -> str | None:
        """Why no kernel is chosen for the device and dtype of w, None if one is."""
        if self.fused is False:
            return "asked for"
        choice = dispatch.choose("psgd", w.device, 1, 1, dtype=w.dtype)
        return None if choice.backend == "triton" else choice.reason

    def _decline(self, found: Found, reason: str) -> None:
        """Say so where the kernel was asked for, or would have been expected on a GPU."""
        if self.fused is False or (not self.fused and not found.params[0].is_cuda):
            return
        names = [options.label(self.param_groups, found.index, i) for i in found.numbers]
        if self.fused:
            raise RuntimeError(f"fqt.optim: fused=True, but no kernel steps {names[0]}: {reason}")
        if reason not in self.fallbacks.values():
            warnings.warn(
                f"fqt.optim: {names[0]}{' and others' * (len(names) > 1)} on {found.params[0].device} will be stepped by "
                f"torch's multi-tensor operations: {reason}",
                stacklevel=5,
            )
        self.fallbacks |= dict.fromkeys(names, reason)

    # ---- checkpoints and copies

    def state_dict(self) -> dict:
        """As of any optimizer. In place of a target that is a function there is its name alone, and `load_state_dict` keeps
        the live group's."""
        handle = self.register_state_dict_post_hook(
            lambda _, whole: {**whole, "param_groups": state.saved(whole["param_groups"])}, prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state_dict, of this class or of torch's optimizer with the same rule. Options that it lacks stay as
        they are; the moments are cast to the parameters' dtypes, the rest keeps its own.

        Raises:
            ValueError: other groups than the optimizer's, or a target that was a function where the live one is none.
        """
        given: dict = {}
        functions = state.functions(self.param_groups)

        def adopt(_, whole: dict) -> dict:
            whole = state.without_torchs(whole)
            given.update(state.adopted(self.param_groups, whole, ("lr", *self.own_options)))
            return given

        def finish(_) -> None:
            state.put_back(self.param_groups, functions)
            state.restore(self, given)

        handles = (
            self.register_load_state_dict_pre_hook(adopt),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "fused": self.fused, "_warned_of_vectors": self._warned_of_vectors}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()


@functools.cache
def _int8_weight() -> type:
    from ..int8_weight import Int8Weight

    return Int8Weight


def _is_int8(w: Tensor) -> bool:
    return isinstance(w, _int8_weight())


def _missing(found: Found, w: Tensor, held: Mapping, moment: str) -> list[str]:
    """The state that a step of this parameter would make."""
    if not w.numel():
        return []
    absent = [moment] if found.has_moments and held.get(moment) is None else []
    absent += ["range"] if found.position.has_range and not state.has_range(held, w, found.position) else []
    return absent + ["threshold"] * (found.position.target == "grid+zero" and held.get("threshold") is None)


def _rate_device(lr: float | Tensor, device: torch.device) -> None:
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != device:
        raise ValueError(f"lr is on {lr.device}, parameters on {device}")


def _rate(found: Found, w: Tensor) -> float | Tensor:
    """A number, or on a GPU a 0-d tensor in the compute dtype of w."""
    lr = found.group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    return lr.item() if lr.device.type == "cpu" else lr.to(compute_dtype(w))
