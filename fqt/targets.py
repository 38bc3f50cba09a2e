"""Points that position-based scaling draws weights to, beyond the uniform grid: functions for `target=` of the optimizers.

Such a function is given a parameter and returns x̄, the point of every weight, of its shape, in float32 (float64 for float64
weights), or None for a plain step. A weight that is not finite takes no part in where the others' points lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .int8_weight import Int8Weight
from .layer import QuantizedLayer
from .lsq import LearnedStep, check_bits
from .position import NO_RANGE, absmax, extremes
from .reference import compute_dtype

# ---- floating-point grids


def adaptivfloat(w: Tensor, bits: int = 8, exponent_bits: int = 3) -> Tensor:
    """The nearest number of the AdaptivFloat format whose exponents fit the tensor's largest weight.

    With m = bits - 1 - exponent_bits and E = ⌊log2 max|w|⌋ the points are 0 and ±2**e · (1 + k / 2**m), k from 0 to
    2**m - 1, e from E - 2**exponent_bits + 1 to E, but for the smallest magnitude, whose codes zero has:
    2 · (2**(bits-1) - 1) + 1 points. A tie goes to the even mantissa, half of the smallest magnitude to 0; what lies beyond
    the largest point is drawn to it. Weights all below 2**-100 have no points: they are returned.

    Args:
        w: of any shape, floating point; one set of points for all of it.
        bits: 2 to 8, sign included.   exponent_bits: 1 to bits - 1.

    Raises:
        ValueError: bits or exponent_bits out of range.

    Source: Tambe et al., "Algorithm-Hardware Co-Design of Adaptive Floating-Point Encodings" (DAC 2020), algorithm 1,
    which leaves half of the smallest magnitude as it is.
    """
    check_bits("bits", bits)
    if not isinstance(exponent_bits, int) or isinstance(exponent_bits, bool) or not 1 <= exponent_bits < bits:
        raise ValueError(f"exponent_bits must be an integer from 1 to bits - 1 = {bits - 1}, got {exponent_bits!r}")
    mantissa_bits = bits - 1 - exponent_bits
    smallest = 2.0 ** (1 - 2**exponent_bits) * (1 + 2.0**-mantissa_bits)
    x, reach = _values(w)
    return _nearest_float(x, reach, _power_below(reach), smallest, 2 - 2.0**-mantissa_bits, mantissa_bits)


def power_of_two(w: Tensor, bits: int = 4) -> Tensor:
    """The nearest of 0 and ±2**(E - k), k from 0 to 2**(bits-1) - 2, where 2**E is the power of two nearest max|w|.

    Nearest by distance, not by logarithm: 1.5 · 2**e is midway and goes to the larger, half of the smallest power to 0.
    Weights all below 2**-100 have no points: they are returned.

    Args:
        w: of any shape, floating point; one set of points for all of it.   bits: 2 to 8, sign included.

    Raises:
        ValueError: bits out of range.
    """
    check_bits("bits", bits)
    x, reach = _values(w)
    top = _power_below(reach)
    top = torch.where((reach >= 1.5 * top) & (2 * top).isfinite(), 2 * top, top)
    return _nearest_float(x, reach, top, 2.0 ** (2 - 2 ** (bits - 1)), 1.0, 0)


@dataclass(frozen=True)
class AdaptivFloat:
    """`adaptivfloat` with these bits, for `target=`."""

    bits: int = 4
    exponent_bits: int = 2

    def __post_init__(self) -> None:
        adaptivfloat(torch.empty(0), self.bits, self.exponent_bits)  # raises what it would raise in a step

    def __call__(self, w: Tensor) -> Tensor:
        return adaptivfloat(w, self.bits, self.exponent_bits)


@dataclass(frozen=True)
class PowerOfTwo:
    """`power_of_two` with these bits, for `target=`."""

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)

    def __call__(self, w: Tensor) -> Tensor:
        return power_of_two(w, self.bits)


def _values(w: Tensor) -> tuple[Tensor, Tensor]:
    """The weights in the compute dtype, and the largest finite magnitude, 0-d."""
    return w.detach().to(compute_dtype(w)), absmax(extremes(w)).reshape(())


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above x > 0, exactly: x / (2 · mantissa), the mantissa in [1/2, 1)."""
    return x / (2 * torch.frexp(x).mantissa)


def _nearest_float(
    x: Tensor, reach: Tensor, top: Tensor, smallest: float, largest: float, mantissa_bits: int
) -> Tensor:
    """The nearest of 0 and top · ±2**e · (1 + k / 2**mantissa_bits) between top · smallest and top · largest.

    Every step is exact but the one rounding: top and the steps between points are powers of two. A NaN stays.
    """
    y = (x.abs() / top).clamp(max=largest)
    step = _power_below(y) * 2.0**-mantissa_bits
    point = (torch.round(y / step) * step).clamp(min=smallest)
    point = torch.where(y <= smallest / 2, torch.zeros_like(y), point)
    return torch.where(reach >= NO_RANGE, torch.copysign(point, x) * top, x)


# ---- the weights that a layer computes with


class FakeQuantized:
    """For `target=`, in quantization-aware training: x̄ of a parameter is the quantized weight that its layer computes with.

    Of a weight under `fqt.lsq_` it is v̂ with the learned step, of the weight of a layer of `fqt.nn` its codes under the
    recipe, dequantized. Every other parameter of the model takes plain steps (None), and so do weights of exact recipes,
    those that are codes already (`fqt.hold_int8_`), biases and the learned steps themselves. Layers are looked for when a
    step asks, by the parameter's identity, so that the model may be changed after the optimizer was built.

    The model is held by reference. A deep copy made together with the model is of the copy of the model, any other one of
    the same model (an optimizer's `load_state_dict` copies its groups). A pickle does not contain the model: what is
    loaded from it has none, and says so when it is called; assign it: `target.model = model`.

    Args:
        model: whose parameters the optimizer has.

    Raises:
        TypeError: model is no module.   ValueError (call): the model does not have this parameter, or there is no model.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"FakeQuantized takes a torch.nn.Module, got {type(model).__name__}")
        self.model: nn.Module | None = model
        self._names: dict[
            int, str
        ] = {}  # of modules, by id of a parameter: verified at each use, so it may be out of date

    def __call__(self, w: Tensor) -> Tensor | None:
        if self.model is None:
            raise ValueError(f"{self!r} was loaded from a pickle, without its model: assign its attribute `model`")
        module = self._holder(w)
        if module is None:
            modules = dict(self.model.named_modules())
            self._names = {id(p): name for name, m in modules.items() for p in m._parameters.values()}
            self._names |= {
                id(_weight(m)): name for name, m in modules.items()
            }  # a layer that quantizes it comes first
            module = self._holder(w)
        if module is None:
            raise ValueError(f"a parameter of shape {tuple(w.shape)} is not one of the model that {self!r} was made of")
        return _quantized(module, w) if _weight(module) is w else None

    def _holder(self, w: Tensor) -> nn.Module | None:
        """The module that is known to hold w, and that quantizes it if one does; None if it no longer does."""
        name = self._names.get(id(w))
        try:
            module = None if name is None else self.model.get_submodule(name)
        except AttributeError:
            return None
        if module is None or _weight(module) is w or any(p is w for p in module._parameters.values()):
            return module
        return None

    def __repr__(self) -> str:
        return f"FakeQuantized({'' if self.model is None else type(self.model).__name__})"

    def __deepcopy__(self, memo: dict) -> FakeQuantized:
        model = memo.get(id(self.model))
        return self if model is None else FakeQuantized(model)

    def __getstate__(self) -> dict:
        return {"model": None, "_names": {}}


def _weight(module: nn.Module) -> Tensor | None:
    """The parameter that a layer fake-quantizes, or None."""
    if parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations.weight
        return chain.original if isinstance(chain[0], LearnedStep) else None
    if isinstance(module, QuantizedLayer) and not module.recipe.is_exact:
        w = module._parameters.get("weight")
        return None if isinstance(w, Int8Weight) else w
    return None


@torch.no_grad()
def _quantized(layer: nn.Module, w: Tensor) -> Tensor:
    """The weight w of a layer of `_weight`, as the layer computes with it, in the compute dtype."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight[0](w.to(compute_dtype(w)))
    return layer.computed_weight()
