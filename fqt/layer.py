"""What quantized layers share: a recipe, a random stream, and the codes of the weight, kept while it stays as it is."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import capture, rng
from .dispatch import Choice
from .recipe import Recipe

_built = 0  # layers constructed directly, which have no qualified name to take their key from
_said: set[str] = set()  # reasons of fall-backs that were already given
_steps = 0  # of all optimizers of the process that may write weights without advancing autograd's version


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """torch's fused optimizers, and kernels of other libraries, write weights without advancing autograd's version.

    So does every replay of a step that is captured in a CUDA graph: codes of such weights are kept no more.
    """
    global _steps
    _steps += not getattr(optimizer, "advances_versions", False)
    if capture.is_capturing():
        for group in optimizer.param_groups:
            for w in group["params"]:
                _replays_write(w)


def _replays_write(w: Tensor) -> None:
    w._fqt_in_graph = True  # on the parameter itself: an id would be another's soon, and a weak reference stops torch


register_optimizer_step_post_hook(_count_step)


class Cached(NamedTuple):
    """Codes of a weight in the state `key`; transposed: those for dgrad are among them."""

    key: tuple
    value: Any
    transposed: bool


class QuantizedLayer(nn.Module):
    """The base of `fqt.nn.Linear` and the convolutions, before torch's own class in their order of resolution.

    Beside the plain class's attributes it has those that begin with `_fqt_`, and `fuse_grad_accumulation`. A layer defines
    `_quantize`, `_check_shape`, `_would_choose`, `computed_weight` and `label`.
    """

    plain_class: ClassVar[type[nn.Module]]  # that a layer is made of, and becomes again

    def _build(self, recipe: Recipe, fuse_grad_accumulation: bool) -> None:
        """The end of the constructor of a layer that is not made of a plain one."""
        global _built
        _built += 1
        self._become_quantized(recipe, "", f"fqt.nn.{type(self).__name__} {_built}")
        self.fuse_grad_accumulation = fuse_grad_accumulation

    def _become_quantized(self, recipe: Recipe, name: str, key_name: str) -> None:
        """Take on a recipe, the name that errors call the layer by, and the name its random key is made of."""
        self._fqt_cache: Cached | None = None
        self._fqt_name, self._fqt_key_name = name, key_name
        self.recipe = recipe
        self.fuse_grad_accumulation = False
        for buffer, value in self._new_state(self.weight.device).items():
            self.register_buffer(buffer, value, persistent=False)
        rng.register(self)
        rng.restart(self)

    def _become_plain(self) -> None:
        """What `_become_quantized` did, undone."""
        rng.forget(self)
        for name in self._new_state(self.weight.device):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in [n for n in self.__dict__ if n.startswith("_fqt_") or n == "fuse_grad_accumulation"]:
            del self.__dict__[name]
        self.__class__ = self.plain_class

    def _new_state(self, device: torch.device) -> dict[str, Tensor]:
        """The buffers of a layer that has not trained yet."""
        return {"_fqt_rng": torch.zeros(2, dtype=torch.int64, device=device)}

    @property
    def recipe(self) -> Recipe:
        """The layer's recipe; assign a name or a Recipe to change it."""
        return self._fqt_recipe

    @recipe.setter
    def recipe(self, value: str | Recipe) -> None:
        recipe = Recipe.parse(value)
        if reason := self._reason_against(recipe):
            raise ValueError(f"{self.label}: {reason}")
        self._fqt_recipe = recipe
        self._fqt_spec = str(recipe)  # what the operators take

    def _reason_against(self, recipe: Recipe) -> str | None:
        """Why the layer cannot have a recipe, None if it can."""
        return None

    # ---- the input

    def _check(self, x: Tensor) -> torch.dtype:
        """Refuse an input the layer cannot take; the dtype of the output otherwise."""
        if not x.is_floating_point():
            raise TypeError(f"{self.label}: the input must be floating point, got {x.dtype}")
        self._check_shape(x)
        weight = self.weight
        if x.device != weight.device:
            raise ValueError(f"{self.label}: the input is on {x.device}, the weight on {weight.device}")
        if not torch.compiler.is_compiling() and x.is_cuda:
            self._say_fallback(x)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        if x.dtype != weight.dtype:
            raise TypeError(
                f"{self.label}: the input is {x.dtype}, the weight {weight.dtype}; cast one or use autocast"
            )
        return x.dtype

    def _check_shape(self, x: Tensor) -> None:
        raise NotImplementedError

    def _say_fallback(self, x: Tensor) -> None:
        choice = self._would_choose(x)
        if choice.fallback and choice.reason not in _said:
            _said.add(choice.reason)
            how = "without Triton kernels" if choice.backend == "reference" else "below the speed of the GPU"
            warnings.warn(f"fqt: {self.label} runs {how} on {x.device}: {choice.reason}", stacklevel=4)

    def _would_choose(self, x: Tensor) -> Choice:
        """What dispatch chooses for a large product of this layer on the device of x."""
        raise NotImplementedError

    # ---- the weight's codes

    def _quantized_weight(self, transposed: bool) -> Any:
        """The weight's codes, from the cache where the parameter is the same and unchanged; also for dgrad if transposed."""
        w = self.weight
        if torch.compiler.is_compiling() or not _has_version(w):
            return self._quantize(w.detach(), transposed)
        if capture.is_capturing(w.device):
            if w.requires_grad and torch.is_grad_enabled():  # a training step, by which replays may write it
                _replays_write(w)
            return self._quantize(w.detach(), transposed)
        if hasattr(w, "_fqt_in_graph"):
            self._fqt_cache = None
            return self._quantize(w.detach(), transposed)
        key = self._cache_key(w)
        cached = self._fqt_cache
        if cached is None or cached.key != key or (transposed and not cached.transposed):
            # Autograd could not save tensors of inference mode for a later step.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
                cached = Cached(key, self._quantize(w.detach(), transposed), transposed)
            self._keep(cached)
        return cached.value

    def _quantize(self, w: Tensor, transposed: bool) -> Any:
        raise NotImplementedError

    def _keep(self, codes: Cached) -> None:
        self.__dict__["_fqt_cache"] = codes  # past Module.__setattr__

    def _cache_key(self, w: Tensor) -> tuple:
        return w.data_ptr(), w._version, w.dtype, w.device, self._fqt_recipe, _steps if w.requires_grad else None

    def computed_weight(self) -> Tensor:
        """The weight as products see it, its codes dequantized: of its shape, float32 (float64 for a float64 weight).

        Of a layer that quantizes: the recipe is not "exact".
        """
        raise NotImplementedError

    # ---- text

    @property
    def label(self) -> str:
        """What errors and reports call the layer: its qualified name, or its type, and its size."""
        raise NotImplementedError

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
        on_meta = self._fqt_rng.is_meta
        super()._apply(fn, recurse)
        if on_meta and not self._fqt_rng.is_meta:  # to_empty() left the buffers without a value
            for name, value in self._new_state(self._fqt_rng.device).items():
                self._buffers[name].copy_(value)
            rng.restart(self)
        return self

    def _leave_meta(self) -> None:
        """Follow a weight that came off the meta device by itself."""
        stream = self.__dict__.get("_buffers", {}).get("_fqt_rng")
        if stream is not None and stream.is_meta and not self.weight.is_meta:
            self._buffers.update(self._new_state(self.weight.device))
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


def _has_version(w: Tensor) -> bool:
    """Whether (address, version) identifies the weight's value, and a result may outlive this call.

    Not of a weight that is computed, or passed in for a call: its address is another one's soon.
    """
    if not isinstance(w, nn.Parameter):
        return False
    return not (w.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(w) or type(w.data) is not Tensor)


def invalidate_(model: nn.Module) -> nn.Module:
    """Forget the quantized weights of a model's layers, after a write that autograd did not see; returns the model.

    `param.data.copy_(…)`, `param.data.add_(…)` and the like do not advance the version counter, so the layer would go on
    with the codes of the old value. Optimizers, `load_state_dict` and in-place writes under `torch.no_grad()` need no call;
    nor do replays of a CUDA graph that holds a layer's training pass or an optimizer's step.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module._fqt_cache = None
    return model
