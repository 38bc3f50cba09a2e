"""The shapes of what a model's layers are given, found by running it once on an example."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip


def input_shapes(model: nn.Module, example: Tensor | tuple) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of the first argument of each module, by its qualified name, in every call of it.

    What runs is a copy that shares the model's parameters, in evaluation, without gradients and without the hooks of its
    modules, and torch's random states are put back: the model, its buffers and its modes stay as they are. (What a module
    writes outside of itself, or into a parameter, is not undone.)

    Args:
        example: the model's argument, or a tuple of its arguments.

    Raises:
        TypeError: example is neither.   ValueError: the model cannot be copied, or raises; the message says what.
    """
    if not isinstance(example, (Tensor, tuple)):
        raise TypeError(f"example_input must be a tensor or a tuple of arguments, got {type(example).__name__}")
    try:
        twin = copy.deepcopy(model, _shared(model))
    except Exception as e:
        raise ValueError(f"example_input: the model cannot be copied: {type(e).__name__}: {e}") from e
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name, _ in model.named_modules()}
    for name, module in twin.named_modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
        module.register_forward_pre_hook(_Recorder(shapes[name]), with_kwargs=True)
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
            twin.eval()(*(example if isinstance(example, tuple) else (example,)))
    except Exception as e:
        raise ValueError(f"example_input: the model raises {type(e).__name__}: {e}") from e
    return shapes


def _shared(model: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy that leaves out parameters, and tensors computed from them, which cannot be copied."""
    kept = list(model.parameters())
    for module in model.modules():
        kept += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(t): t for t in kept}


class _Recorder:
    """A hook that notes the shape of a module's first argument."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [*args, *kwargs.values()]
        if given and isinstance(given[0], Tensor):
            self._shapes.append(tuple(given[0].shape))
