"""Quantized modules: subclasses of torch's own, so that a model's class can be swapped in place."""

from __future__ import annotations

import functools
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, ranges
from .conv_nn import Conv1d, Conv2d, Conv3d
from .dispatch import Choice, choose_untuned
from .int8_weight import DTYPES, HELD, Int8Weight
from .layer import Cached, QuantizedLayer, invalidate_
from .qtensor import QTensor
from .recipe import Quantizer, Recipe

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Emission", "Linear", "emission", "invalidate_"]

_holders: dict[int, list[weakref.ref[Linear]]] = {}  # by id of a weight: the layers that may hold its codes


class Linear(QuantizedLayer, nn.Linear):
    """`torch.nn.Linear` whose three matrix products run on quantized operands, as its recipe says.

    Built directly, or made of an `nn.Linear` in place by `fqt.quantize_`. Parameters, their names, state_dict keys and
    hooks are those of `nn.Linear`; the recipe and the random stream are in no state_dict (see `fqt.get_rng_state`).

    Input (*, in_features) float32, bfloat16, float16 (float64 by the reference backend), of the weight's dtype unless
    autocast is on; output (*, out_features) in the dtype that `nn.Linear` gives. A sample is a row of the input flattened
    to two dimensions. Activation ranges are always those of the batch at hand, in evaluation as well.

    The weight is quantized once for each version of the parameter (its address and autograd's version counter), and again
    after a step of any optimizer where it requires a gradient. (The kernel of `fqt.optim` writes the new codes of
    symmetric per-row recipes itself, in place, so that a graph kept from before refuses another backward pass.) Other
    writes that autograd does not see, through `.data` or by a foreign library, need `fqt.invalidate_`. In the capture of a
    CUDA graph it is quantized in each pass, and where the graph trains it, in each pass outside as well. Between forward and
    backward the input is kept as int8 codes, transposed; in evaluation, or where nothing needs a gradient, nothing is kept.

    Args:
        recipe: a name such as "psq5" or a `fqt.Recipe`.
        fuse_grad_accumulation: where the weight has a gradient already, wgrad's kernel adds to it, rounding once, instead
            of making another that autograd then adds. The addition stays autograd's where someone waits to be told of the
            gradient or to be given it (hooks on the parameter, torch.distributed, `torch.autograd.grad`, create_graph),
            under torch.compile, beside the default stream, and for a gradient of another layout or dtype. Only hooks on
            the parameter's AccumulateGrad node go unseen: they are called with None.
        The other arguments are those of `nn.Linear`.

    Raises (forward):
        TypeError: an input that is not floating point, or of another dtype than the weight.
        ValueError: a wrong last dimension, or another device than the weight's.
        RuntimeError (backward): a second derivative is asked for.

    Source: StatQuant (arXiv 2010.14298) sections 2 and 3.
    """

    plain_class = nn.Linear

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *,
                 recipe: str | Recipe = "int8", fuse_grad_accumulation: bool = False) -> None:  # fmt: skip
        recipe = Recipe.parse(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(recipe, fuse_grad_accumulation)

    def _new_state(self, device: torch.device) -> dict[str, Tensor]:
        return super()._new_state(device) | {"_fqt_range_state": ranges.new_state(device)}

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        recipe = self._fqt_recipe
        if recipe.is_exact:
            return F.linear(input, self.weight, self.bias)
        out_dtype = self._check(input)
        weight, lead = self.weight, input.shape[:-1]
        x = input if len(lead) == 1 else input.reshape(math.prod(lead), self.in_features)
        training = torch.is_grad_enabled()
        save_x = training and weight.requires_grad
        w = self._quantized_weight(transposed=training and input.requires_grad)
        y = ops.linear_of(
            x, weight, self.bias, w, self._fqt_rng, self._fqt_spec, out_dtype, save_x,
            self.fuse_grad_accumulation and not torch.compiler.is_compiling(), self._fqt_range_state,
        )  # fmt: skip
        return y if len(lead) == 1 else y.reshape(*lead, self.out_features)

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{self.label}: expected input (*, {self.in_features}), got {tuple(x.shape)}")

    def _would_choose(self, x: Tensor) -> Choice:
        return choose_untuned("scaled_mm", x.device, 128, 128, 128, x.dtype, format=self._fqt_recipe.format)

    # ---- the weight's codes

    def _quantized_weight(self, transposed: bool) -> QTensor:
        w = self.weight
        if isinstance(w, Int8Weight) and self._fqt_recipe.w == HELD:
            return w.codes(transposed=transposed, sums=self._fqt_recipe.affine)
        return super()._quantized_weight(transposed)

    def _quantize(self, w: Tensor, transposed: bool) -> QTensor:
        return ops.quantize_weight(w, self._fqt_recipe, transposed)

    def _keep(self, codes: Cached) -> None:
        super()._keep(codes)
        w = self.weight
        if self._parameters.get("weight") is w:
            _hold(w, self)

    def _holds_codes(self, w: Tensor) -> bool:
        """Whether the cache has symmetric int8 codes per row of the weight as it is, in both layouts."""
        recipe, cached = self._fqt_recipe, self._fqt_cache
        if cached is None or not cached.transposed or recipe.is_exact or recipe.affine:
            return False
        return recipe.w.granularity == "per_row" and recipe.format == "int" and cached.key == self._cache_key(w)

    def computed_weight(self) -> Tensor:
        codes = self._quantized_weight(transposed=False)
        q = codes.q if self._fqt_recipe.format == "int" else codes.q.view(torch.float8_e4m3fn)
        return codes._replace(q=q).dequantize()

    @property
    def label(self) -> str:
        return f"{self._fqt_name or 'fqt.nn.Linear'} ({self.in_features} → {self.out_features})"

    def _apply(self, fn, recurse=True):
        if isinstance(self.weight, Int8Weight):  # torch would put the cast values behind the codes' back
            dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
            if dtype not in DTYPES:
                raise TypeError(
                    f"{self.label}: its weight is held in int8, which has no {dtype}: fqt.release_int8_ first"
                )
        return super()._apply(fn, recurse)


# ---- codes that an optimizer's kernel writes


class Emission(NamedTuple):
    """Codes of a weight (N, K) that layers hold in both layouts, and that a step may write anew: q (N, K), qt (K, N) int8,
    scale (N, 1) float32."""

    value: QTensor
    quantizer: Quantizer
    layers: list[Linear]

    @property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value.q, self.value.qt, self.value.scale

    def renew(self, w: Tensor) -> None:
        """The codes are those of w as it is now: it, and they, have advanced their versions."""
        for layer in self.layers:
            layer._fqt_cache = Cached(layer._cache_key(w), self.value, True)


def _hold(w: Tensor, layer: Linear) -> None:
    """Let `emission` find a layer by its weight."""
    key, before = id(w), layer.__dict__.get("_fqt_held_by")  # no weak reference to the weight: torch could not swap it
    if before not in (None, key):  # the layer had another weight
        for ref in [ref for ref in _holders.get(before, ()) if ref() is layer]:
            _drop(before, ref)
    layer.__dict__["_fqt_held_by"] = key
    known = _holders.setdefault(key, [])
    if all(ref() is not layer for ref in known):
        known.append(weakref.ref(layer, functools.partial(_drop, key)))


def _drop(key: int, ref: weakref.ref) -> None:
    """Forget a layer that is gone."""
    left = [other for other in _holders.get(key, ()) if other is not ref]
    if left:
        _holders[key] = left
    else:
        _holders.pop(key, None)


def emission(w: Tensor) -> Emission | None:
    """The codes that a step which writes w should write as well, None if no layer holds any that a kernel can write.

    Those of the first layer whose codes are current; all layers of the weight with the same quantizer will share them.
    """
    refs = _holders.get(id(w))
    if refs is None or not w.is_contiguous() or w.is_inference():
        return None
    layers = [layer for ref in refs if (layer := ref()) is not None and layer._parameters.get("weight") is w]
    for layer in layers:
        if layer._holds_codes(w):
            z = layer._fqt_recipe.w
            alike = [one for one in layers if one._fqt_recipe.w == z and not one._fqt_recipe.affine]
            return Emission(layer._fqt_cache.value, z, alike)
    return None
