"""The case of an optimizer's step, with and without the quantization of the weights that it changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fqt
import fqt.nn

from .cases import BF16_BOUND, gaussian
from .harness import Candidate, Case, Wrong, check_near
from .operators import check_quantized, work_dtype
from .providers import peer

LAYERS = 4
LR = 1e-2  # a step that is more than a bfloat16 weight's rounding, and that leaves the weights finite for thousands
# (name, class, arguments): whichever form of it torch has one launch for many parameters in.
OPTIMIZERS: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("SGD fused", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-4, "fused": True}),
    ("SGD foreach", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-4, "foreach": True}),
    ("Adam fused", torch.optim.Adam, {"fused": True}),
]
RECIPE = "int8"
NOT_OF_THE_LOOP = ("fused", "foreach", "decoupled_weight_decay")  # the last follows from the class


def step(n: int, k: int, device: torch.device) -> Case:
    """One step of each optimizer on the weights (N, K) of a few layers: of `nn.Linear`, and of `fqt.nn.Linear`, whose
    weights are then quantized anew in both layouts, as the next forward pass would. Ratios to the first, by time."""
    candidates = []
    for name, kind, options in OPTIMIZERS:
        candidates.append(_candidate(name, kind, options, n, k, device, None))
        candidates.append(_candidate(name, kind, options, n, k, device, RECIPE))
    candidates.append(_bitsandbytes(n, k, device))
    return Case("optimizer step", f"{LAYERS}x{n}x{k}", "ms", candidates[0].name, tuple(candidates), 1)


def _layers(n: int, k: int, device: torch.device, recipe: str | None) -> list[nn.Linear]:
    """Layers whose weights have gradients, the same ones in every call."""
    dtype = work_dtype(device)
    options = {"bias": False, "device": device, "dtype": dtype}
    layers = []
    for i in range(LAYERS):
        layer = nn.Linear(k, n, **options) if recipe is None else fqt.nn.Linear(k, n, recipe=recipe, **options)
        with torch.no_grad():
            layer.weight.copy_(gaussian(n, k, device=device, seed=2 * i, dtype=dtype))
        layer.weight.grad = gaussian(n, k, device=device, seed=2 * i + 1, dtype=dtype)
        layers.append(layer)
    return layers


def _candidate(name: str, kind: type, options: dict[str, Any], n: int, k: int, device: torch.device,
               recipe: str | None) -> Candidate:  # fmt: skip
    @functools.cache  # not before it runs: the trial run builds every case in several processes
    def made() -> tuple[list[nn.Linear], torch.optim.Optimizer]:
        layers = _layers(n, k, device, recipe)
        return layers, kind([layer.weight for layer in layers], lr=LR, **options)

    def run(i: int) -> tuple[Tensor, ...]:
        layers, optimizer = made()
        optimizer.step()
        if recipe is None:
            return tuple(layer.weight.detach() for layer in layers)
        return tuple(layer._quantized_weight(transposed=True) for layer in layers)

    def check(out: tuple, i: int) -> str:
        layers, optimizer = made()
        remark = check_step(optimizer, lambda: run(i))
        if recipe is None:
            return remark
        for layer in layers:
            check_quantized(layer._quantized_weight(transposed=True), layer.weight.detach(), layer.recipe.w, cols=True)
        return f"{remark}, codes bit-equal"

    if recipe is None:
        return Candidate(name, run, check, **peer("torch", device), tag=name)
    return Candidate(f"{name}, {recipe} codes of the weights", run, check, tag=f"{name} {recipe}")


def check_step(optimizer: torch.optim.Optimizer, run: Callable[[], object]) -> str:
    """One more step, against the same one in float64 by torch's plain loop over the parameters."""
    weights = optimizer.param_groups[0]["params"]
    exact = [nn.Parameter(w.detach().double()) for w in weights]
    for w, e in zip(weights, exact, strict=True):
        e.grad = w.grad.double()
    options = {key: value for key, value in optimizer.defaults.items() if key not in NOT_OF_THE_LOOP}
    loop = type(optimizer)(exact, **options, foreach=False)
    loop.load_state_dict({**loop.state_dict(), "state": copy.deepcopy(optimizer.state_dict()["state"])})
    before = [w.detach().clone() for w in weights]
    loop.step()
    run()
    bound = BF16_BOUND if weights[0].dtype == torch.bfloat16 else 2.0**-20  # a few roundings of each element
    remarks = [check_near(w.detach(), e.detach(), bound, "weight") for w, e in zip(weights, exact, strict=True)]
    if weights[0].dtype == torch.float32 and any(torch.equal(w, b) for w, b in zip(weights, before, strict=True)):
        raise Wrong("the step left a weight as it was")  # in bf16 a step this small may round away
    return max(remarks)


def _bitsandbytes(n: int, k: int, device: torch.device) -> Candidate:
    """Adam with states of 8 bits."""

    @functools.cache
    def made() -> tuple[list[nn.Linear], Any]:
        from bitsandbytes.optim import Adam8bit

        layers = _layers(n, k, device, None)
        return layers, Adam8bit([layer.weight for layer in layers], lr=LR)

    def run(i: int) -> tuple[Tensor, ...]:
        layers, optimizer = made()
        optimizer.step()
        return tuple(layer.weight.detach() for layer in layers)

    def check(out: tuple[Tensor, ...], i: int) -> str:
        if not all(bool(w.isfinite().all()) for w in out):
            raise Wrong("weights that are not finite")
        return "finite"

    return Candidate("bitsandbytes Adam8bit", run, check, **peer("bitsandbytes", device), tag="adam8bit")
