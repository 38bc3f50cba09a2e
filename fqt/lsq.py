"""LSQ, learned step size quantization: fake-quantized weights whose step size is trained together with them.

    v̂ = s · round(clip(v / s, -Q_N, Q_P)),   Q_N = 2**(bits-1), Q_P = Q_N - 1

    ∂v̂/∂v = 1 where -Q_N < v/s < Q_P, else 0
    ∂v̂/∂s = round(v/s) - v/s there, -Q_N at and below -Q_N, Q_P at and above Q_P

The gradient of a step is multiplied by 1 / √(N · Q_P), N being the number of weights that share it. It starts at
2 · mean|v| / √Q_P.

Source: Esser et al., "Learned Step Size Quantization" (ICLR 2020), section 2.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .layer import QuantizedLayer
from .reference import compute_dtype

if TYPE_CHECKING:
    from .convert import Filter

FLOOR = 2.0**-10  # of a step's first value: what it acts as at least


class _FakeQuantize(torch.autograd.Function):
    """v̂ of v, with max(step, floor) as s, in v's dtype; arithmetic in the compute dtype."""

    @staticmethod
    def forward(ctx, v: Tensor, step: Tensor, floor: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(v, step, floor)
        ctx.bits = bits
        x, s = _in_steps(v, step, floor)
        return (torch.round(x.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * s).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, step, floor = ctx.saved_tensors
        low, high = -(2 ** (ctx.bits - 1)), 2 ** (ctx.bits - 1) - 1
        x, _ = _in_steps(v, step, floor)
        inside = (x > low) & (x < high)
        grad_v = torch.where(inside, grad, torch.zeros_like(grad))
        terms = grad.to(x.dtype) * torch.where(inside, torch.round(x) - x, x.clamp(low, high))
        shared = terms.sum_to_size(step.shape)
        return grad_v, (shared * (1 / math.sqrt(v.numel() / step.numel() * high))).to(step.dtype), None, None


def _in_steps(v: Tensor, step: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """(v / s, s) in the compute dtype."""
    s = torch.maximum(step, floor).to(compute_dtype(v))
    return v.to(s.dtype) / s, s


class LearnedStep(nn.Module):
    """The parametrization: a weight v becomes v̂.

    `step` is the parameter s, of shape () or, per channel, (C, 1, …), C the first dimension of the weight; float32 (float64
    of float64 weights). It acts as at least `floor`, a buffer, 2**-10 of its first value: should the optimizer drive it to
    zero or below, nothing is divided by zero, and as the gradient is that at `floor` it can grow again. `remove_lsq_` warns
    of such a step.

    Args:
        v: the weight, floating point.   bits: 2 to 8.   per_channel: a step for each index of the first dimension.

    Raises:
        ValueError: bits out of range, or a weight that is empty, all zero or not finite: no step to start from. A channel
        that is all zero starts with the step of the whole tensor.
    """

    def __init__(self, v: Tensor, bits: int = 4, per_channel: bool = False) -> None:
        super().__init__()
        check_bits("bits", bits)
        self.bits = bits
        x = v.detach().to(compute_dtype(v)).abs()
        if not x.numel() or not bool(x.isfinite().all()) or not bool(x.any()):
            what = "empty" if not x.numel() else "zero" if bool(x.isfinite().all()) else "not finite"
            raise ValueError(f"a weight of shape {tuple(v.shape)} is {what}: there is no step to start from")
        mean = x.mean()
        if per_channel:
            means = x.mean(tuple(range(1, x.dim())), keepdim=True)
            mean = torch.where(means > 0, means, mean)
        self.step = nn.Parameter(mean * (2 / math.sqrt(2 ** (bits - 1) - 1)))
        self.register_buffer("floor", self.step.detach() * FLOOR)

    def forward(self, v: Tensor) -> Tensor:
        return _FakeQuantize.apply(v, self.step, self.floor, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, steps={self.step.numel()}"


def lsq_(
    model: nn.Module,
    bits: int = 4,
    *,
    first_last_bits: int = 8,
    filter_fn: Filter | None = None,
    per_channel: bool = False,
) -> list[str]:
    """Train the weights of a model's nn.Linear and nn.Conv* layers through LSQ's fake quantization, in place.

    A layer's weight becomes v̂ of v, by `torch.nn.utils.parametrize`: v stays the same Parameter, now called
    `layer.parametrizations.weight.original` (an optimizer built before goes on training it), and the step is a new one,
    `….weight.0.step`, which an optimizer must be given: build it afterwards, of `model.parameters()`. state_dict holds
    both, under these names; loading it needs a model on which `lsq_` was called with the same options. Start from a
    trained model. `remove_lsq_` ends it.

    Args:
        bits: 2 to 8.   first_last_bits: of the first and the last of the model's layers, in the order of their registration,
            whether or not filter_fn takes them.
        filter_fn: called with (module, qualified name); False leaves the layer as it is.
        per_channel: a step for each index of the weight's first dimension, instead of one.

    Returns:
        The qualified names of the layers.

    Raises:
        TypeError: model is no module.
        ValueError: bits out of range, no layer, or one whose weight cannot be parametrized: that of a quantized layer, which
        quantizes its weight itself (`fqt.targets.FakeQuantized` knows it, `fqt.dequantize_` makes it a plain one), one
        that is parametrized or computed by a hook, shared with another module, empty, all zero or not finite. The model is
        unchanged then.
    """
    check_bits("bits", bits)
    check_bits("first_last_bits", first_last_bits)
    layers = list(weighted_layers(model))
    ends = {layers[0][0], layers[-1][0]} if layers else set()
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    planned: list[tuple[str, nn.Module, LearnedStep]] = []
    for name, module in layers:
        if filter_fn is not None and not filter_fn(module, name):
            continue
        label = name or "the model"
        if isinstance(module, QuantizedLayer):
            raise ValueError(
                f"{label} is a fqt.nn.{type(module).__name__}, which quantizes its weight itself: leave it out by "
                f"filter_fn, or make it a nn.{type(module).__name__} with fqt.dequantize_"
            )
        w = own_weight(module, label)
        if users[id(w)] > 1:
            raise ValueError(f"{label}: its weight is shared with another module, which would go on with v itself")
        try:
            step = LearnedStep(w, first_last_bits if name in ends else bits, per_channel)
        except ValueError as e:
            raise ValueError(f"{label}: {e}") from None
        planned.append((name, module, step))
    if not planned:
        raise ValueError("no layer to quantize: the model has no nn.Linear or nn.Conv*, or filter_fn refused them all")
    for _, module, step in planned:
        parametrize.register_parametrization(module, "weight", step)
    return [name for name, _, _ in planned]


def remove_lsq_(model: nn.Module, round: bool = True) -> list[str]:
    """Turn the weights under `lsq_` back into ordinary Parameters, the ones they were before, with the value v̂, or, with
    round=False, v. Returns the names of the layers.

    A step that training drove below its floor (see `LearnedStep`) is warned of: the weights it rounds are nearly zero.

    Raises:
        ValueError: no layer is under `lsq_`, or another parametrization was added to one.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], LearnedStep)
    ]
    if not found:
        raise ValueError("remove_lsq_: no layer of the model is under lsq_")
    for name, module in found:
        if len(module.parametrizations.weight) > 1:
            raise ValueError(f"{name or 'the model'}: its weight has a parametrization besides that of lsq_")
    for name, module in found:
        v, learned = module.parametrizations.weight.original, module.parametrizations.weight[0]
        if bool((learned.step < learned.floor).any()):
            warnings.warn(
                f"fqt: {name or 'the model'}: training drove a step of lsq_ to {learned.step.min().item():.3g}, below its "
                f"floor of {learned.floor.min().item():.3g}; a lower learning rate of the steps prevents it",
                stacklevel=2,
            )
        with torch.no_grad():
            if round:
                v.copy_(learned(v))
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return [name for name, _ in found]


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: deep copies share theirs, of which torch deletes the property."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(qualified name, module) of every nn.Linear and nn.Conv* of a model, subclasses too, in order of registration."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd)))


def own_weight(module: nn.Module, label: str) -> nn.Parameter:
    """The weight of a layer, where it is a Parameter of its own, floating point and has values.

    Raises:
        ValueError: it is not; label is what the error calls the layer.
    """
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError(f"{label}: its weight is parametrized; remove that first (lsq_ by remove_lsq_)")
    w = module._parameters.get("weight")
    if w is None:
        raise ValueError(f"{label}: its weight is computed by a hook (weight_norm, pruning)")
    if type(w) is not nn.Parameter or type(w.data) is not Tensor:
        kind = type(w) if type(w) is not nn.Parameter else type(w.data)
        raise ValueError(
            f"{label}: its weight is a {kind.__name__}, not an ordinary tensor (release_int8_ makes it one of an Int8Weight)"
        )
    if not w.is_floating_point() or w.is_meta:
        raise ValueError(f"{label}: its weight must be floating point and have values, got {w.dtype} on {w.device}")
    return w


def check_bits(what: str, bits: int) -> None:
    """Raise a ValueError unless bits, which the error calls `what`, is an integer from 2 to 8."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{what} must be an integer from 2 to 8, got {bits!r}")
