"""State of the optimizers: its shapes and dtypes, and how it goes into a checkpoint and comes out of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from ..position import TARGETS, Position
from ..reference import compute_dtype

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of the parameter's dtype, as torch's own loading makes them
_OF_TORCH = ("foreach", "fused", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay")


def has_range(held: Mapping, w: Tensor, p: Position) -> bool:
    """Whether there is a range with as many rows as the options want; else the next step starts a new one."""
    known = held.get("range")
    return known is not None and len(known) == (len(w) if p.per_channel and w.dim() else 1)


def make_adamw(held: dict, w: Tensor) -> None:
    """AdamW's state before the first step."""
    held["step"] = torch.zeros((), device=w.device)
    held["exp_avg"], held["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
    held["powers"] = torch.ones(2, dtype=torch.float64, device=w.device)


def saved(groups: list[dict]) -> list[dict]:
    """Groups of a state_dict with the names of functions in their place, which do not belong into a file."""
    return [
        {**g, "target": f"function {getattr(g['target'], '__name__', g['target'])}"} if callable(g["target"]) else g
        for g in groups
    ]


def functions(groups: list[dict]) -> dict[int, Callable]:
    """The targets of these groups that are functions."""
    return {i: g["target"] for i, g in enumerate(groups) if callable(g.get("target"))}


def put_back(groups: list[dict], kept: Mapping[int, Callable]) -> None:
    """Give the groups that were loaded with the name of a function the one that they had, itself and no copy."""
    for i, function in kept.items():
        if _was_function(groups[i]["target"]):
            groups[i]["target"] = function


def _was_function(target: object) -> bool:
    return target is not None and target not in TARGETS


def without_torchs(given: Mapping) -> dict:
    """A state_dict without the options of torch's own optimizers that say how, not what, they compute.

    Raises:
        ValueError: AdamW's state is of another rule than `PSGDAdamW`'s.
    """
    for i, group in enumerate(given["param_groups"]):
        if group.get("amsgrad") or (group.get("decoupled_weight_decay") is False and group.get("weight_decay")):
            raise ValueError(
                f"group {i} of the loaded state is of Adam with amsgrad or with weight decay in the gradient, which "
                f"PSGDAdamW does not continue"
            )
    groups = [{key: value for key, value in group.items() if key not in _OF_TORCH} for group in given["param_groups"]]
    return {**given, "param_groups": groups}


def adopted(live: list[dict], given: Mapping, names: tuple[str, ...]) -> dict:
    """A state_dict to be loaded, made whole: options (of these names) that it lacks are those of the live groups. Targets
    that are functions are names; see `put_back`.

    Raises:
        ValueError: a saved target was a function where the live one is none.
    """
    groups = []
    for i, group in enumerate(given["param_groups"]):
        group = dict(group)
        if i < len(live):  # torch compares the numbers of groups
            if _was_function(group.get("target")) and not callable(live[i]["target"]):
                raise ValueError(
                    f"the target of group {i} was {group['target']!r}, which no state_dict holds: give the optimizer a "
                    f"function before loading, got target {live[i]['target']!r}"
                )
            group = {**{key: live[i][key] for key in names}, **group}
            if callable(group["target"]):
                group["target"] = "function"  # torch would copy it, and all that it refers to
        groups.append(group)
    return {**given, "param_groups": groups}


def restore(optimizer: torch.optim.Optimizer, given: Mapping) -> None:
    """After torch has loaded `given`, all floating-point state cast to the parameters' dtypes: what keeps its own.

    Range and threshold are of the compute dtype, step is float32, powers float64, of the betas and step if there are none.
    """
    for key, w in _loaded(optimizer, given):
        before, held = given["state"].get(key, {}), optimizer.state.get(w, {})
        own = {"range": compute_dtype(w), "threshold": compute_dtype(w), "powers": torch.float64, "step": torch.float32}
        for name, value in before.items():
            if isinstance(value, Tensor) and name not in MOMENTS:
                held[name] = value.detach().to(w.device, own.get(name, value.dtype), copy=True)
        for name in ("range", "threshold", *MOMENTS):
            if held.get(name, 0) is None:
                del held[name]
        if held.get("exp_avg") is not None:
            _add_powers(optimizer, w, held)


def _loaded(optimizer: torch.optim.Optimizer, given: Mapping) -> Iterator[tuple[object, Tensor]]:
    """(key in the given state, parameter) of all parameters."""
    keys = chain.from_iterable(g["params"] for g in given["param_groups"])
    return zip(keys, chain.from_iterable(g["params"] for g in optimizer.param_groups), strict=True)


def _add_powers(optimizer: torch.optim.Optimizer, w: Tensor, held: dict) -> None:
    """Moments of torch's AdamW: its step as a tensor, and the powers of its betas."""
    step = float(held["step"])
    held["step"] = torch.tensor(step, dtype=torch.float32, device=w.device)
    if "powers" not in held:
        betas = next(g["betas"] for g in optimizer.param_groups if any(p is w for p in g["params"]))
        held["powers"] = torch.tensor([beta**step for beta in betas], dtype=torch.float64, device=w.device)
