"""Shapes that training meets: the layers of some networks, and the problems that they pose to dispatch.

A layer is (name, M, N, K): M samples (tokens, or pixels of a convolution), N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .collect import Met, Target


class Layer(NamedTuple):
    """A linear layer, W (n, k), and the m rows of its input."""

    name: str
    m: int
    n: int
    k: int


def _at(sizes: Iterable[int], layers: Iterable[tuple[str, int, int]]) -> tuple[Layer, ...]:
    return tuple(Layer(f"{name} {m}", m, n, k) for m in sizes for name, n, k in layers)


_LLAMA_8B = (("qkv", 6144, 4096), ("o", 4096, 4096), ("w13", 28672, 4096), ("w2", 4096, 14336))
_BERT_LARGE = (("qkv", 3072, 1024), ("output", 1024, 1024), ("up", 4096, 1024), ("down", 1024, 4096))
_VIT_LARGE = (("qkv", 3072, 1024), ("proj", 1024, 1024), ("fc1", 4096, 1024), ("fc2", 1024, 4096))


def _resnet50(batch: int) -> tuple[Layer, ...]:
    """Its convolutions as matrix products of unfolded images: M = batch·height·width of the output, N = channels out,
    K = channels in · kernel height · kernel width. Of layers of the same shape in a stage, one."""
    layers = [Layer("conv1", batch * 112 * 112, 64, 3 * 7 * 7)]
    channels, before = 64, 56  # in, and the edge of the image in
    for stage, (width, edge) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), 1):
        image, wide = batch * edge * edge, 4 * width
        layers += [
            Layer(f"layer{stage}.0.conv1", batch * before * before, width, channels),
            Layer(f"layer{stage}.0.downsample", image, wide, channels),
            Layer(f"layer{stage}.conv1", image, width, wide),
            Layer(f"layer{stage}.conv2", image, width, 9 * width),
            Layer(f"layer{stage}.conv3", image, wide, width),
        ]
        channels, before = wide, edge
    return (*layers, Layer("fc", batch, 1000, 2048))


SUITES: dict[str, tuple[Layer, ...]] = {
    "llama-8b": _at((4096, 8192, 16384), _LLAMA_8B),
    "bert-large": _at((8192, 16384), _BERT_LARGE),  # 16 and 32 sequences of 512 tokens
    "vit-large": (Layer("patches", 256 * 196, 1024, 768), *_at((256 * 197,), _VIT_LARGE), Layer("head", 256, 1000, 1024)),
    "resnet50": _resnet50(64),
    "cubes": tuple(Layer(f"cube {n}", n, n, n) for n in (1024, 2048, 4096, 8192, 16384)),
}  # fmt: skip


def layers(suites: Iterable[str]) -> list[Layer]:
    """The layers of some suites, their names with the suite's in front.

    Raises:
        ValueError: an unknown suite.
    """
    found = []
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
        found += [layer._replace(name=f"{suite} {layer.name}") for layer in SUITES[suite]]
    return found


def problems(suites: Iterable[str], target: Target, recipes: Iterable[str] = ("int8",), dtype: str = "bfloat16") -> Met:
    """The problems that training steps of the layers pose to dispatch, one of each key of a tuned table, with counts."""
    from . import collect

    return collect.of_layers(layers(suites), target, recipes, dtype)
