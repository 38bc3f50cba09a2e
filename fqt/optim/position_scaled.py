"""Position-based scaling inside the step of any optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..capture import is_capturing, refuse
from ..position import Position, position_scale
from ..reference import compute_dtype
from . import loop, options, state
from .base import PositionOptimizer

NAMES = {"eps": "position_eps"}  # "eps" is many optimizers' own
KEYS = tuple(NAMES.get(field, field) for field in options.FIELDS)


class PositionScaled(torch.optim.Optimizer):
    """Any torch optimizer with the position-based scale of `PSGD` inside its `step()`.

        optimizer = fqt.optim.PositionScaled(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), bits=4)

    position="grad": during the inner step each gradient is replaced by s·g, after every evaluation of the closure, and
    restored afterwards, also where the inner step raises. position="update": the inner step is made as it is, then
    w := w_before + s·(w_after − w_before), so that s also scales the weight decay of the inner optimizer, decoupled or not.
    s is of the weights before the update; a closure that is evaluated several times (LBFGS) gives gradients at several
    points, each scaled by s there, with one range for the whole step.

    param_groups, state and defaults are those of the inner optimizer, whose groups hold the options: target, bits, sparsity,
    scale, position_eps (`eps` here), delta, per_channel, position. Keys that a group already has win; later changes count.
    Schedulers, hooks, zero_grad and add_param_group work on either.

    A GradScaler unscales and checks before it calls this optimizer's step, also where the inner one is fused: hand it this
    one. The scale is computed in float32 (float64) and s·g rounded to the gradient's dtype.

    Raises:
        TypeError: no optimizer, or one that scales by itself; a parameter or gradient that cannot be scaled.
        ValueError: an option is out of range.
    """

    advances_versions = True  # it writes by torch's operations; the inner optimizer speaks for itself

    def __init__(self, optimizer: torch.optim.Optimizer, *, target: str | Callable[[Tensor], Tensor | None] | None = "grid",
                 bits: int = 4, sparsity: float = 0.9, scale: float | str = "auto", eps: float = 0.0, delta: str = "ema",
                 per_channel: bool = False, position: str = "grad") -> None:  # fmt: skip
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
            optimizer, (PositionOptimizer, PositionScaled)
        ):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer that does not scale by position itself, got "
                f"{type(optimizer).__name__}"
            )
        values = target, bits, sparsity, scale, eps, delta, per_channel, position
        self.position_defaults = dict(zip(KEYS, values, strict=True))
        given = [{**self.position_defaults, **group} for group in optimizer.param_groups]
        for index, group in enumerate(given):
            self._check(given, index, group)
        by_default = [i for i, group in enumerate(optimizer.param_groups) if "target" not in group]
        self.__setstate__({"optimizer": optimizer, "position_state": {}, "position_defaults": self.position_defaults})
        for live, group in zip(optimizer.param_groups, given, strict=True):
            live.update({key: group[key] for key in KEYS})
        self._warned_of_vectors = options.warn_of_vectors(optimizer.param_groups, by_default)

    # ---- what is the inner optimizer's

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of the inner optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group to the inner optimizer; options that it leaves out are this one's defaults.

        Raises:
            TypeError, ValueError: as of the class; the group is then not added.
        """
        by_default = "target" not in param_group
        self.optimizer.add_param_group({**self.position_defaults, **param_group})
        index = len(self.param_groups) - 1
        try:
            self._check(self.param_groups, index, self.param_groups[index])
        except Exception:
            self.param_groups.pop()
            raise
        if by_default and not self._warned_of_vectors:
            self._warned_of_vectors = options.warn_of_vectors(self.param_groups, [index])

    @staticmethod
    def _check(groups: list[dict], index: int, group: dict) -> None:
        if options.position_of(group, NAMES).target is not None:
            for i, w in enumerate(group["params"]):
                options.parameter(w, options.label(groups, index, i))

    def position_of(self, w: Tensor) -> tuple[Position, dict]:
        """The options that a parameter is scaled by, and its range and threshold, empty before its first step.

        Raises:
            ValueError: it is none of the optimizer's parameters.
        """
        group = self.param_groups[options.group_of(self.param_groups, w)]
        return options.position_of(group, NAMES), self.position_state.get(w, {})

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """A step of the inner optimizer, scaled; returns what it returns."""
        with _Step(self) as scaled:
            if closure is None:
                scaled.begin()
                return self.optimizer.step()

            def evaluate():
                scaled.restore()
                with torch.enable_grad():
                    loss = closure()
                scaled.begin()
                return loss

            return self.optimizer.step(evaluate)

    # ---- checkpoints and copies

    def state_dict(self) -> dict:
        """{"optimizer": the inner one's, "position": {number of the parameter: copies of range and threshold}}; of a target
        that is a function only that it was one."""
        numbers = {w: i for i, w in enumerate(self._parameters())}
        inner = self.optimizer.state_dict()
        return {
            "optimizer": {**inner, "param_groups": state.saved(inner["param_groups"])},
            "position": {
                numbers[w]: {name: t.clone() if isinstance(t, Tensor) else t for name, t in held.items()}
                for w, held in self.position_state.items()
                if w in numbers
            },
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from `state_dict()`, or from one of the inner optimizer alone: options that it lacks stay as they are.

        Raises:
            ValueError: other groups than the optimizer's, or a target that was a function where the live one is none.
        """
        both = state_dict if "position" in state_dict else {"optimizer": state_dict, "position": {}}
        functions = state.functions(self.param_groups)
        self.optimizer.load_state_dict(state.adopted(self.param_groups, both["optimizer"], KEYS))
        state.put_back(self.param_groups, functions)
        ws = list(self._parameters())
        self.position_state = {
            ws[i]: {key: v.detach().to(ws[i].device, compute_dtype(ws[i]), copy=True) for key, v in held.items()}
            for i, held in both["position"].items()
        }

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def __getstate__(self) -> dict:
        names = "optimizer", "position_state", "position_defaults", "_warned_of_vectors"
        return {name: self.__dict__[name] for name in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class _Step(contextlib.AbstractContextManager):
    """One step: gradients are swapped on `begin` and put back on `restore`, and at the end weights are pulled back to s
    times their update."""

    def __init__(self, optimizer: PositionScaled) -> None:
        self._optimizer = optimizer
        self._positions = [options.position_of(group, NAMES) for group in optimizer.param_groups]
        self._own: list[tuple[Tensor, Tensor]] = []  # parameters whose gradients are swapped, and their own gradients
        self._advanced: set[int] = set()  # the parameters whose range is this step's
        self._before: dict[Tensor, tuple[Tensor, Tensor]] = {}  # weights before the step and s, of position "update"

    def begin(self) -> None:
        """Scale: the gradients of the moment, or take down the weights and their s."""
        for index, (group, p) in enumerate(zip(self._optimizer.param_groups, self._positions, strict=True)):
            if p.target is None:
                continue
            for i, w in enumerate(group["params"]):
                if w.grad is None or w in self._before:
                    continue
                options.gradient(w.grad, w, options.label(self._optimizer.param_groups, index, i))
                s = self._scale(w, p)
                if s is None:
                    continue
                if p.position == "update":
                    self._before[w] = w.detach().clone(), s
                else:
                    self._own.append((w, w.grad))
                    w.grad = (w.grad.detach().to(s.dtype) * s).to(w.dtype)

    def restore(self) -> None:
        """The gradients as they were."""
        while self._own:
            w, g = self._own.pop()
            w.grad = g

    def _scale(self, w: Tensor, p: Position) -> Tensor | None:
        held = self._optimizer.position_state.setdefault(w, {})
        if id(w) not in self._advanced:
            self._advanced.add(id(w))
            if not state.has_range(held, w, p):
                held.pop("range", None)
            if p.has_range and w.numel() and is_capturing(w.device):
                wanted = ["range", *["threshold"] * (p.target == "grid+zero")]
                if absent := [name for name in wanted if held.get(name) is None]:
                    refuse(f"a parameter of shape {tuple(w.shape)} has no {' nor '.join(absent)} yet")
            s = loop.scale_of(w, p, held)
        elif p.has_range and w.numel():  # a further evaluation in this step: the range stays
            s = position_scale(w, p, held["range"], held.get("threshold"))
        else:
            s = loop.scale_of(w, p, held)
        return None if s is None else s.reshape(w.shape)

    def __exit__(self, kind, *_) -> None:
        self.restore()
        if kind is None:
            for w, (before, s) in self._before.items():
                x = before.to(s.dtype)
                w.copy_(x + s * (w.detach().to(s.dtype) - x))
