"""The case of a training step: forward, loss, backward and optimizer of a small network, by recipe.

Before it is timed, each candidate trains a fresh copy of the network for a few steps, and must lower the loss as full
precision does.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt

from . import peers
from .cases import gaussian
from .harness import Candidate, Case, Wrong
from .layers import dtype_name
from .operators import searching, work_dtype
from .providers import has_fp8, peer

RECIPES = ("exact", "int8", "psq8", "bhq8")
STEPS = 8  # of the check
CLASSES = 64
LR = 0.25  # over the network's width: Adam's steps add up over the inputs of a neuron. Stable up to four times that.
# A product of 8-bit operands is about 1 % of its norm off, and so is each of the three of a layer; what a step gains is
# linear in its gradient to first order, and the error has mean zero. A few layers in a row: five times that.
ALLOWED = 0.05  # of full precision's progress
ALLOWED_EXACT = 0.01  # the same operators, in another order of sums at most


class Network(NamedTuple):
    """build(): a model in its initial state, on the device. x: its inputs. labels: one for each output. lr: of AdamW."""

    build: Callable[[], nn.Module]
    x: Tensor
    labels: Tensor
    lr: float


class Way(NamedTuple):
    """Of training it: convert(model) returns the model to train. allowed: distance from full precision's progress, as a
    share of it. fields: of the candidate."""

    title: str
    convert: Callable[[nn.Module], nn.Module]
    allowed: float
    fields: dict[str, str]


def mlp(batch: int, width: int, depth: int, device: torch.device) -> Case:
    """depth layers of width x width with ReLU, and a head, on `batch` samples."""

    def build() -> nn.Module:
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, CLASSES))

    return _case("train mlp", f"{batch}x{width}x{depth}", build, (batch, width), device)


def encoder(batch: int, tokens: int, width: int, depth: int, device: torch.device) -> Case:
    """depth encoder layers of torch, feed-forward 4 times as wide, on (batch, tokens, width). Its attention keeps torch's
    own product: `fqt.quantize_` converts the feed-forward layers and the head, and skips what attention reads itself."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, max(width // 64, 1), 4 * width, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, CLASSES))

    return _case("train encoder", f"{batch}x{tokens}x{width}x{depth}", build, (batch, tokens, width), device)


def _case(suite: str, shape: str, build: Callable[[], nn.Module], sizes: tuple[int, ...], device: torch.device) -> Case:
    dtype = work_dtype(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = build().to(device, dtype)
    x = gaussian(*sizes, device=device, seed=0, dtype=dtype)
    # Labels that a linear map of the inputs gives: to be learned, not memorized.
    teacher = gaussian(sizes[-1], CLASSES, device=device, seed=1, dtype=dtype)
    network = Network(functools.partial(copy.deepcopy, model), x, (x @ teacher).argmax(-1), LR / sizes[-1])
    recipes = (*RECIPES, "fp8") if has_fp8(device) else RECIPES
    ways = [full_precision(device), *(quantized(name, ALLOWED_EXACT if name == "exact" else ALLOWED) for name in recipes),
            Way("torchao int8 mixed precision, torch.compile", _torchao, ALLOWED,
                {**peer("torchao", device), "tag": "torchao"})]  # fmt: skip
    return compare(suite, shape, network, ways)


def full_precision(device: torch.device) -> Way:
    """The baseline: the model as it is."""
    return Way(f"torch {dtype_name(work_dtype(device))}", lambda model: model, ALLOWED_EXACT,
               {**peer("torch", device), "tag": "full precision"})  # fmt: skip


def quantized(name: str, allowed: float = ALLOWED) -> Way:
    """All layers converted to a recipe."""
    return Way(f"fqt {name}", functools.partial(_quantized, name=name), allowed, {"tag": name})


def compare(suite: str, shape: str, network: Network, ways: Sequence[Way]) -> Case:
    """A training step of the network, by each of the ways; ratios to the first."""
    full = functools.cache(lambda: losses(network.build, network))

    def candidate(way: Way) -> Candidate:
        def converted() -> nn.Module:
            return way.convert(network.build())

        check = _check(network, converted, full, way.allowed)
        return Candidate(way.title, step(converted, network), check, **way.fields)

    return Case(suite, shape, "ms", ways[0].title, tuple(map(candidate, ways)), 1)


def _quantized(model: nn.Module, name: str) -> nn.Module:
    fqt.quantize_(model, name)
    return model


def with_torchao(model: nn.Module) -> nn.Module:
    """torchao's int8 mixed precision in every linear layer."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, peers.int8_mixed_precision(child))
    return model


def _torchao(model: nn.Module) -> nn.Module:
    return peers.compiled(with_torchao(model))


def step(build: Callable[[], nn.Module], network: Network) -> Callable[[int], Tensor]:
    """run(i): one training step of the model that is built at the first; returns the loss before it."""

    @functools.cache  # not before it runs: the trial run builds every case in several processes
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build().train()
        return model, torch.optim.AdamW(model.parameters(), lr=network.lr, fused=True)

    def run(i: int) -> Tensor:
        model, optimizer = made()
        optimizer.zero_grad(set_to_none=True)
        with searching():
            loss = F.cross_entropy(model(network.x).flatten(0, -2).float(), network.labels.flatten())
            loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def losses(build: Callable[[], nn.Module], network: Network) -> tuple[float, float]:
    """The loss before and after STEPS steps of a fresh model."""
    run = step(build, network)
    first = float(run(0))
    for _ in range(STEPS - 1):
        run(0)
    return first, float(run(0))


def _check(network: Network, build: Callable[[], nn.Module], full: Callable[[], tuple[float, float]],
           allowed: float) -> Callable[[Tensor, int], str]:  # fmt: skip
    """The loss of the step done is finite; a fresh model's progress is full precision's, to within `allowed` of it."""

    def check(loss: Tensor, i: int) -> str:
        if not math.isfinite(float(loss)):
            raise Wrong(f"loss {float(loss)}")
        (before, after), (_, got) = full(), losses(build, network)
        progress = before - after
        if not progress > 0:
            raise Wrong(f"full precision learns nothing: loss {before:.4f}, then {after:.4f}")
        distance = abs(got - after) / progress
        if not distance <= allowed:
            raise Wrong(f"loss {got:.4f} after {STEPS} steps, full precision {after:.4f}: "
                        f"{distance:.1%} of its progress off, allowed {allowed:.0%}")  # fmt: skip
        return f"loss {before:.3f} to {got:.3f}, {distance:.1%} off"

    return check
