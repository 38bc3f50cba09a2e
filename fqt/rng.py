"""Random streams of stochastic rounding: reproducible from (seed, step, layer, element), whatever the launch order.

Every quantized layer owns a (2,) int64 tensor (key, step), a non-persistent buffer. The key is a hash of the seed and of
the layer's name; every backward pass draws with the current step and then advances it on the device. Neither torch's
global generator nor the tiling of a kernel plays a part.
"""

from __future__ import annotations

import hashlib
import weakref

import torch
from torch import Tensor, nn

_seed = 0
_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every live layer with an `_fqt_rng`


def layer_key(name: str, seed: int | None = None) -> int:
    """The 64-bit key of the layer of that name under a seed (the current one by default)."""
    text = f"{_seed if seed is None else seed}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def register(layer: nn.Module) -> None:
    """Let `manual_seed` and `set_step` reach this layer for as long as it lives."""
    _layers.add(layer)


def forget(layer: nn.Module) -> None:
    """No longer reach this layer, which has no stream any more."""
    _layers.discard(layer)


def restart(layer: nn.Module) -> None:
    """Put a layer at the start of its stream: the key of its name under the current seed, step 0."""
    with torch.no_grad():
        layer._fqt_rng.copy_(torch.tensor([layer_key(layer._fqt_key_name), 0]))


def rank() -> int:
    """This process's data-parallel rank, which batch tensors mix into their random bits; 0 without torch.distributed.

    Replicas must not share bits for their own gradients: shared bits correlate the rounding errors that averaging over
    replicas is there to cancel.
    """
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def manual_seed(seed: int) -> None:
    """Restart the random streams of all quantized layers, present and future, from a seed. Independent of torch's seed.

    Written into the layers' device tensors in place, so that captured graphs see it.

    Raises:
        TypeError: seed is no integer.
    """
    global _seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    _seed = seed
    for layer in list(_layers):
        restart(layer)


def set_step(step: int, model: nn.Module | None = None) -> None:
    """Pin the step counter of a model's layers (of all live layers by default): the next backward pass draws with it.

    Repeating a backward pass after the same `set_step` repeats its random bits; the counter then goes on from there.

    Raises:
        ValueError: step is not an integer in [0, 2³²).
    """
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**32:
        raise ValueError(f"step must be an integer from 0 to 2**32 - 1, got {step!r}")
    for layer in list(_layers) if model is None else _named_layers(model).values():
        with torch.no_grad():
            layer._fqt_rng[1:].fill_(step)


def get_rng_state(model: nn.Module) -> dict[str, int | dict[str, Tensor]]:
    """The state of a model's random streams, for a checkpoint: {"seed": int, "layers": {name: (2,) int64 on the CPU}}."""
    layers = {name: layer._fqt_rng.detach().cpu().clone() for name, layer in _named_layers(model).items()}
    return {"seed": _seed, "layers": layers}


def set_rng_state(model: nn.Module, state: dict) -> None:
    """Restore what `get_rng_state` returned, for the same model: a resumed run then repeats the uninterrupted one.

    Raises:
        ValueError: the state's layers are not the model's; the message names the ones that differ.
    """
    global _seed
    layers = _named_layers(model)
    try:
        seed, saved = state["seed"], dict(state["layers"])
    except (TypeError, KeyError, ValueError) as e:
        raise ValueError(f"not a state of fqt.get_rng_state: {state!r:.80}") from e
    if differ := sorted(layers.keys() ^ saved.keys()):
        raise ValueError(f"the state is of another model: layers {', '.join(differ[:8])} are in only one of the two")
    for name, value in saved.items():
        if not isinstance(value, Tensor) or value.shape != (2,) or value.dtype != torch.int64:
            raise ValueError(f"the state of layer {name!r} is not a (2,) int64 tensor: {value!r:.80}")
    _seed = seed
    with torch.no_grad():
        for name, layer in layers.items():
            layer._fqt_rng.copy_(saved[name])


def _named_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "_fqt_rng")}
