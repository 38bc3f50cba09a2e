"""The options of a parameter group: what they may be, and `fqt.optim.param_groups`."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from ..position import TARGETS, Position

FIELDS = ("target", "bits", "sparsity", "scale", "eps", "delta", "per_channel", "position")
PLAIN = Position(target=None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def position_of(group: Mapping, names: Mapping[str, str]) -> Position:
    """The `Position` of a group's options; names: the option's key in the group, of those fields that have another."""
    return Position(**{field: group[names.get(field, field)] for field in FIELDS})


def number(name: str, value: object, low: float = 0.0, below: float = math.inf) -> None:
    """Raise unless value is a number with low ≤ value < below.

    Raises:
        TypeError, ValueError: it is not; the message names the option.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value < below:
        limits = f"from {low:g}" if low > -math.inf else "finite"
        raise ValueError(
            f"{name} must be a number {limits}{f' and below {below:g}' if below < math.inf else ''}, got {value!r}"
        )


def flag(name: str, value: object) -> None:
    """Raise a TypeError unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def learning_rate(lr: object) -> None:
    """Raise unless lr is a number from 0 or a 0-d floating-point tensor of one. A tensor on a GPU is not read.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(lr, Tensor):
        return number("lr", lr)
    if lr.dim() or not lr.is_floating_point() or lr.requires_grad:
        raise ValueError(
            f"lr must be a number or a 0-d floating-point tensor that needs no gradient, got {lr.dtype} of shape "
            f"{tuple(lr.shape)}{', which requires one' * lr.requires_grad}"
        )
    if lr.device.type == "cpu":
        number("lr", lr.item())
    return None


def sgd(group: Mapping) -> None:
    """Raise where an option of SGD is out of range."""
    number("momentum", group["momentum"])
    number("dampening", group["dampening"], -math.inf)
    number("weight_decay", group["weight_decay"])
    flag("nesterov", group["nesterov"])
    flag("maximize", group["maximize"])
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov needs a momentum and no dampening, got momentum {group['momentum']}, dampening {group['dampening']}"
        )


def adamw(group: Mapping) -> None:
    """Raise where an option of AdamW is out of range."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        number(f"betas[{i}]", beta, below=1.0)
    number("eps", group["eps"])
    number("weight_decay", group["weight_decay"])
    flag("maximize", group["maximize"])


def label(groups: list[dict], group: int, i: int) -> str:
    """What errors call a parameter: its name, if the optimizer was given names, else where it is; and its shape."""
    names = groups[group].get("param_names")
    name = f"parameter {names[i]!r}" if names else f"parameter {i} of group {group}"
    return f"{name} of shape {tuple(groups[group]['params'][i].shape)}"


def group_of(groups: list[dict], w: Tensor) -> int:
    """The number of the group that a parameter is in.

    Raises:
        ValueError: it is in none.
    """
    for index, group in enumerate(groups):
        if any(p is w for p in group["params"]):
            return index
    raise ValueError(f"a parameter of shape {tuple(w.shape)} is none of the optimizer's")


def parameter(p: Tensor, name: str) -> None:
    """Raise a TypeError unless p is a strided tensor of a floating-point dtype that the steps are defined for."""
    if p.layout is not torch.strided:
        raise TypeError(f"{name} is {p.layout}: only strided parameters can be drawn to a target or stepped")
    if p.dtype not in _DTYPES:
        raise TypeError(f"{name} is {p.dtype}: parameters are float32, bfloat16, float16 or float64")


def gradient(g: Tensor, p: Tensor, name: str) -> None:
    """Raise unless g is a strided tensor of p's dtype, shape and device.

    Raises:
        TypeError: it is sparse, complex or of another dtype.   ValueError: of another shape or on another device.
    """
    if g.layout is not torch.strided:
        raise TypeError(f"{name}: its gradient is {g.layout}; sparse gradients are not supported")
    if g.dtype is not p.dtype:
        raise TypeError(f"{name}: its gradient is {g.dtype}, the parameter {p.dtype}")
    if g.shape != p.shape:
        raise ValueError(f"{name}: its gradient has shape {tuple(g.shape)}")
    if g.device != p.device:
        raise ValueError(f"{name}: its gradient is on {g.device}, the parameter on {p.device}")


def warn_of_vectors(groups: list[dict], indices: list[int]) -> bool:
    """Warn, and return True, where a target by name of these groups draws parameters with fewer than two dimensions.

    For groups that have it by default: a bias or a norm on a grid is hardly ever meant.
    """
    few = [
        (g, i)
        for g in indices
        for i, w in enumerate(groups[g]["params"])
        if w.dim() < 2 and groups[g]["target"] in TARGETS
    ]
    if few:
        warnings.warn(
            f"fqt.optim: {label(groups, *few[0])}{' and others' * (len(few) > 1)} will be drawn to target "
            f"{groups[few[0][0]]['target']!r} only because it is the optimizer's default. Biases and norms are better left "
            f"alone: fqt.optim.param_groups(model) gives them target=None",
            stacklevel=6,
        )
    return bool(few)


def param_groups(model: nn.Module, **weight_options) -> list[dict]:
    """Two parameter groups of a model: the weights of its linear and convolutional layers with `weight_options`, and the
    rest (biases, norms, embeddings) with target=None, which makes its steps plain.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    >>> weights, rest = param_groups(model, target="grid", bits=3)
    >>> [len(group["params"]) for group in (weights, rest)], weights["bits"], rest["target"]
    ([1, 3], 3, None)

    Args:
        model: nn.Linear and nn.Conv1d, 2d, 3d and their transposes count, and every subclass, `fqt.nn.Linear` among them.
            Where a weight is computed by one parametrization of another tensor (`fqt.lsq_`), that tensor counts.
        weight_options: of the optimizer, for the weights; what is not given is the optimizer's default. ε is `eps` for
            `PSGD` and `position_eps` for the others, where `eps` is their own.

    Returns:
        Groups with names, in the order of `model.named_parameters()`; a parameter that several layers share comes once, as a
        weight if it is one of theirs. A group without parameters is left out.

    Raises:
        TypeError: model is no module, or the name of an option is a misspelt one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name in weight_options.keys() - {*FIELDS, "position_eps"}:
        if meant := difflib.get_close_matches(name, FIELDS, 1, 0.8):  # optimizers ignore keys that they do not know
            raise TypeError(f"unknown option {name!r}: did you mean {meant[0]!r}?")
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(_weight(m)) for m in model.modules() if isinstance(m, layers)}
    split = ([], [])
    for name, p in model.named_parameters():
        split[id(p) not in weights].append((name, p))
    groups = {"params": split[0], **weight_options}, {"params": split[1], "target": None}
    return [group for group in groups if group["params"]]


def _weight(layer: nn.Module) -> Tensor | None:
    """The parameter that a layer's weight is or is computed from."""
    made = layer._modules.get("parametrizations", {})
    return made["weight"]._parameters.get("original") if "weight" in made else layer._parameters.get("weight")
