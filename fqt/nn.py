"""Quantized modules: subclasses of torch's own, so that a model's class can be swapped in place."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops, ranges, rng
from .dispatch import problem, select
from .int8_weight import DTYPES, HELD, Int8Weight
from .qtensor import QTensor
from .recipe import Quantizer, Recipe

_built = 0  # layers constructed directly, which have no qualified name to take their key from
_said: set[str] = set()  # reasons of fall-backs that were already given
_steps = 0  # of all optimizers of the process that may write weights without advancing autograd's version
_holders: dict[int, list[weakref.ref[Linear]]] = {}  # by id of a weight: the layers that may hold its codes


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """torch's fused optimizers, and kernels of other libraries, write weights without advancing autograd's version."""
    global _steps
    _steps += not getattr(optimizer, "advances_versions", False)


register_optimizer_step_post_hook(_count_step)


class _Cached(NamedTuple):
    key: tuple
    value: QTensor


class Linear(nn.Linear):
    """`torch.nn.Linear` whose three matrix products run on quantized operands, as its recipe says.

    Built directly, or made of an `nn.Linear` in place by `fqt.quantize_`. Parameters, their names, state_dict keys and
    hooks are those of `nn.Linear`; the recipe and the random stream are in no state_dict (see `fqt.get_rng_state`).

    Input (*, in_features) float32, bfloat16, float16 (float64 by the reference backend), of the weight's dtype unless
    autocast is on; output (*, out_features) in the dtype that `nn.Linear` gives. A sample is a row of the input flattened
    to two dimensions. Activation ranges are always those of the batch at hand, in evaluation as well.

    The weight is quantized once for each version of the parameter (its address and autograd's version counter), and again
    after a step of any optimizer where it requires a gradient. (The kernel of `fqt.optim` writes the new codes of
    symmetric per-row recipes itself, in place, so that a graph kept from before refuses another backward pass.) Other
    writes that autograd does not see, through `.data` or by a foreign library, need `fqt.invalidate_`. Between forward and
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

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *,
                 recipe: str | Recipe = "int8", fuse_grad_accumulation: bool = False) -> None:  # fmt: skip
        global _built
        recipe = Recipe.parse(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        _built += 1
        self._become_quantized(recipe, "", f"fqt.nn.Linear {_built}")
        self.fuse_grad_accumulation = fuse_grad_accumulation

    def _become_quantized(self, recipe: Recipe, name: str, key_name: str) -> None:
        """Take on a recipe, the name that errors call the layer by, and the name its random key is made of."""
        self._fqt_cache: _Cached | None = None
        self._fqt_name, self._fqt_key_name = name, key_name
        self.recipe = recipe
        self.fuse_grad_accumulation = False
        device = self.weight.device
        self.register_buffer("_fqt_rng", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("_fqt_range_state", ranges.new_state(device), persistent=False)
        rng.register(self)
        rng.restart(self)

    @property
    def recipe(self) -> Recipe:
        """The layer's recipe; assign a name or a Recipe to change it."""
        return self._fqt_recipe

    @recipe.setter
    def recipe(self, value: str | Recipe) -> None:
        self._fqt_recipe = Recipe.parse(value)
        self._fqt_spec = str(self._fqt_recipe)  # what the operators take

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        recipe = self._fqt_recipe
        if recipe.is_exact:
            return F.linear(input, self.weight, self.bias)
        out_dtype = self._check(input)
        lead = input.shape[:-1]
        x = input.reshape(math.prod(lead), self.in_features)
        training = torch.is_grad_enabled()
        save_x = training and self.weight.requires_grad
        w = self._quantized_weight(transposed=training and input.requires_grad)
        y = ops.linear(
            x, self.weight, self.bias, w.q, w.qt, w.scale, w.offset, w.row_sum, w.col_sum, self._fqt_rng,
            self._fqt_spec, out_dtype, save_x, self.fuse_grad_accumulation and not torch.compiler.is_compiling(),
            self._fqt_range_state,
        )[0]  # fmt: skip
        return y.reshape(*lead, self.out_features)

    def _check(self, x: Tensor) -> torch.dtype:
        """Refuse an input the layer cannot take; the dtype of the output otherwise."""
        if not x.is_floating_point():
            raise TypeError(f"{self.label}: the input must be floating point, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{self.label}: expected input (*, {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"{self.label}: the input is on {x.device}, the weight on {self.weight.device}")
        if not torch.compiler.is_compiling() and x.is_cuda:
            self._say_fallback(x)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        if x.dtype != self.weight.dtype:
            raise TypeError(
                f"{self.label}: the input is {x.dtype}, the weight {self.weight.dtype}; cast one or use autocast"
            )
        return x.dtype

    def _say_fallback(self, x: Tensor) -> None:
        choice = select(problem("scaled_mm", x.device, 128, 128, 128, x.dtype, format=self._fqt_recipe.format))
        if choice.fallback and choice.reason not in _said:
            _said.add(choice.reason)
            how = "without Triton kernels" if choice.backend == "reference" else "below the speed of the GPU"
            warnings.warn(f"fqt: {self.label} runs {how} on {x.device}: {choice.reason}", stacklevel=4)

    def _quantized_weight(self, transposed: bool) -> QTensor:
        """The weight's codes, from the cache where the parameter is the same and unchanged; both layouts if transposed."""
        w = self.weight
        if isinstance(w, Int8Weight) and self._fqt_recipe.w == HELD:
            return w.codes(transposed=transposed, sums=self._fqt_recipe.affine)
        if torch.compiler.is_compiling() or not _has_version(w):
            return ops.quantize_weight(w.detach(), self._fqt_recipe, transposed)
        key = self._cache_key(w)
        cached = self._fqt_cache
        if cached is None or cached.key != key or (transposed and cached.value.qt is None):
            cached = _Cached(key, ops.quantize_weight(w.detach(), self._fqt_recipe, transposed))
            self._fqt_cache = cached
            if self._parameters.get("weight") is w:
                _hold(w, self)
        return cached.value

    def _cache_key(self, w: Tensor) -> tuple:
        return w.data_ptr(), w._version, w.dtype, w.device, self._fqt_recipe, _steps if w.requires_grad else None

    def _holds_codes(self, w: Tensor) -> bool:
        """Whether the cache has symmetric int8 codes per row of the weight as it is, in both layouts."""
        recipe, cached = self._fqt_recipe, self._fqt_cache
        if cached is None or cached.value.qt is None or recipe.is_exact or recipe.affine:
            return False
        return recipe.w.granularity == "per_row" and recipe.format == "int" and cached.key == self._cache_key(w)

    @property
    def label(self) -> str:
        """What errors and reports call the layer: its qualified name, or its shape."""
        return f"{self._fqt_name or 'fqt.nn.Linear'} ({self.in_features} → {self.out_features})"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self._fqt_recipe.name}"

    # ---- whatever may change the weight behind its version counter drops the cache

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name == "weight":  # also how FSDP swaps in the gathered parameter, and load_state_dict(assign=True) its own
            self.__dict__["_fqt_cache"] = None
            self._leave_meta()

    def _apply(self, fn, recurse=True):
        self._fqt_cache = None
        if isinstance(self.weight, Int8Weight):  # torch would put the cast values behind the codes' back
            dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
            if dtype not in DTYPES:
                raise TypeError(
                    f"{self.label}: its weight is held in int8, which has no {dtype}: fqt.release_int8_ first"
                )
        on_meta = self._fqt_rng.is_meta
        super()._apply(fn, recurse)
        if on_meta and not self._fqt_rng.is_meta:  # to_empty() left the stream without a value
            rng.restart(self)
            self._fqt_range_state.zero_()
        return self

    def _leave_meta(self) -> None:
        """Follow a weight that came off the meta device by itself."""
        stream = self.__dict__.get("_buffers", {}).get("_fqt_rng")
        if stream is not None and stream.is_meta and not self.weight.is_meta:
            self._buffers["_fqt_rng"] = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
            self._buffers["_fqt_range_state"] = ranges.new_state(self.weight.device)
            rng.restart(self)

    def _load_from_state_dict(self, *args, **kwargs):
        self._fqt_cache = None
        super()._load_from_state_dict(*args, **kwargs)

    # ---- copies and pickles

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fqt_cache": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("fuse_grad_accumulation", False)  # of a layer that was pickled before there was one
        rng.register(self)


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
            layer._fqt_cache = _Cached(layer._cache_key(w), self.value)


def _hold(w: Tensor, layer: Linear) -> None:
    """Let `emission` find a layer by its weight."""
    key = id(w)  # no weak reference to the weight: torch would refuse to swap it
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


def _has_version(w: Tensor) -> bool:
    """Whether (address, version) identifies the parameter's value, and a result may outlive this call."""
    if w.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(w) or type(w.data) is not Tensor:
        return False
    return not (w.is_cuda and torch.cuda.is_current_stream_capturing())


def invalidate_(model: nn.Module) -> nn.Module:
    """Forget the quantized weights of a model's layers, after a write that autograd did not see; returns the model.

    `param.data.copy_(…)`, `param.data.add_(…)` and the like do not advance the version counter, so the layer would go on
    with the codes of the old value. Optimizers, `load_state_dict` and in-place writes under `torch.no_grad()` need no call.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module._fqt_cache = None
    return model
