"""The shapes of networks' parameters, as an optimizer meets them, and small ones of the same structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
BLOCKS = (3, 4, 6, 3)  # of ResNet-50's four stages


@dataclass(frozen=True)
class Parameters:
    """The shapes of a network's parameters, in the order of its modules."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def matrices(self) -> tuple[Shape, ...]:
        """The weights (N, K) of linear layers."""
        return tuple(shape for shape in self.shapes if len(shape) == 2)

    @property
    def size(self) -> str:
        """How many tensors, x, how many elements."""
        return f"{len(self.shapes)}x{self.elements}"


def resnet(name: str, width: int = 64, blocks: Sequence[int] = BLOCKS, classes: int = 1000) -> Parameters:
    """A ResNet of bottleneck blocks (arXiv 1512.03385 table 1): convolutions (out, in, height, width) without bias, each
    with the weight and the bias of its batch norm, and a linear layer."""
    shapes: list[Shape] = [*_convolution(width, 3, 7)]
    channels = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for block in range(count):
            shapes += [*_convolution(inner, channels, 1), *_convolution(inner, inner, 3)]
            shapes += _convolution(4 * inner, inner, 1)
            if block == 0:  # the shortcut has another number of channels
                shapes += _convolution(4 * inner, channels, 1)
            channels = 4 * inner
    return Parameters(name, (*shapes, (classes, channels), (classes,)))


def _convolution(out: int, channels: int, edge: int) -> list[Shape]:
    return [(out, channels, edge, edge), (out,), (out,)]


def llama_block(name: str, hidden: int = 4096, kv: int = 1024, inner: int = 14336) -> Parameters:
    """A block of Llama 3 8B: qkv, o, w1 and w3 in one, w2, and two norms."""
    matrices = ((hidden + 2 * kv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    return Parameters(name, (*matrices, (hidden,), (hidden,)))


RESNET50 = resnet("ResNet-50")
LLAMA_8B = llama_block("Llama-8B block")
SMALL_RESNET50 = resnet("ResNet-50 a quarter as wide", 16, classes=250)
SMALL_LLAMA = llama_block("Llama-8B block an eighth as wide", 512, 128, 1792)
TINY = resnet("tiny ResNet", 4, (1, 1), 8)
