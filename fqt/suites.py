"""Shapes that training meets: the layers of some networks, and the problems that they pose to dispatch.

A layer is (name, M, N, K): M samples (tokens, or pixels of a convolution), N outputs, K inputs. Convolutions keep theirs as
well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


class Convolution(NamedTuple):
    """`count` equal convolutions of a network, of n square images with c channels: kernel x kernel filters, padded by half.

    edge: of an image.   o: output channels.   first: of the network's own input, which has no gradient.
    """

    name: str
    n: int
    c: int
    edge: int
    o: int
    kernel: int
    stride: int = 1
    groups: int = 1
    count: int = 1
    first: bool = False

    @property
    def out_edge(self) -> int:
        return (self.edge + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def multiplications(self) -> int:
        """Of one of its three products, those by the zeros of the padding included."""
        return self.n * self.out_edge**2 * self.o * self.c // self.groups * self.kernel**2

    @property
    def as_layer(self) -> Layer:
        """A group as a matrix product of unfolded images."""
        return Layer(
            self.name, self.n * self.out_edge**2, self.o // self.groups, self.c // self.groups * self.kernel**2
        )


def _resnet(batch: int, blocks: Sequence[int], stage: Callable[..., list[Convolution]]) -> tuple[Convolution, ...]:
    """A ResNet for images of 224 x 224 pixels. stage(name, batch, c, edge, width, stride, blocks): of one of its stages."""
    found = [Convolution("conv1", batch, 3, 224, 64, 7, 2, first=True)]
    c, edge = 64, 56
    for i, count in enumerate(blocks):
        found += stage(f"layer{i + 1}", batch, c, edge, 64 * 2**i, 2 if i else 1, count)
        c, edge = found[-1].o, found[-1].out_edge
    return tuple(found)


def _bottlenecks(name: str, n: int, c: int, edge: int, width: int, stride: int, blocks: int) -> list[Convolution]:
    """The stride is that of the first block's 3x3, and of its shortcut."""
    wide, out = 4 * width, edge // stride
    return [
        Convolution(f"{name}.0.conv1", n, c, edge, width, 1),
        Convolution(f"{name}.0.conv2", n, width, edge, width, 3, stride),
        Convolution(f"{name}.0.downsample", n, c, edge, wide, 1, stride),
        Convolution(f"{name}.conv1", n, wide, out, width, 1, count=blocks - 1),
        Convolution(f"{name}.conv2", n, width, out, width, 3, count=blocks - 1),
        Convolution(f"{name}.conv3", n, width, out, wide, 1, count=blocks),
    ]


def _basic_blocks(name: str, n: int, c: int, edge: int, width: int, stride: int, blocks: int) -> list[Convolution]:
    """The first block has a shortcut of its own where it changes the shape."""
    shortcut = Convolution(f"{name}.0.downsample", n, c, edge, width, 1, stride)
    return [
        Convolution(f"{name}.0.conv1", n, c, edge, width, 3, stride),
        *([shortcut] if (c, stride) != (width, 1) else []),
        Convolution(f"{name}.conv", n, width, edge // stride, width, 3, count=2 * blocks - 1),
    ]


def resnet50(batch: int) -> tuple[Convolution, ...]:
    """The convolutions of ResNet-50; of those of the same shape in a stage, one but for the first block's."""
    return _resnet(batch, (3, 4, 6, 3), _bottlenecks)


def resnet18(batch: int) -> tuple[Convolution, ...]:
    """The convolutions of ResNet-18."""
    return _resnet(batch, (2, 2, 2, 2), _basic_blocks)


def distinct(convolutions: Iterable[Convolution]) -> tuple[Convolution, ...]:
    """One of each shape, by the name of the first, with the counts of all."""
    found: dict[Convolution, Convolution] = {}
    for c in convolutions:
        shape = c._replace(name="", count=0)
        before = found.get(shape)
        found[shape] = c if before is None else before._replace(count=before.count + c.count)
    return tuple(found.values())


CONVOLUTIONS = {"ResNet-50": distinct(resnet50(256)), "ResNet-18": distinct(resnet18(64))}
CONVOLUTION_SUITES = {"resnet50-conv": CONVOLUTIONS["ResNet-50"]}  # as convolutions, not as matrix products


def _resnet50(batch: int) -> tuple[Layer, ...]:
    """Its layers as matrix products; the first 3x3 of a stage has the same shape as the others."""
    convolutions = (c for c in resnet50(batch) if not c.name.endswith(".0.conv2"))
    return (*(c.as_layer for c in convolutions), Layer("fc", batch, 1000, 2048))


SUITES: dict[str, tuple[Layer, ...]] = {
    "llama-8b": _at((4096, 8192, 16384), _LLAMA_8B),
    "bert-large": _at((8192, 16384), _BERT_LARGE),  # 16 and 32 sequences of 512 tokens
    "vit-large": (Layer("patches", 256 * 196, 1024, 768), *_at((256 * 197,), _VIT_LARGE), Layer("head", 256, 1000, 1024)),
    "resnet50": _resnet50(64),
    "cubes": tuple(Layer(f"cube {n}", n, n, n) for n in (1024, 2048, 4096, 8192, 16384)),
}  # fmt: skip


def layers(suites: Iterable[str]) -> list[Layer]:
    """The linear layers of some suites, their names with the suite's in front.

    Raises:
        ValueError: an unknown suite.
    """
    found = []
    for suite in suites:
        if suite not in SUITES and suite not in CONVOLUTION_SUITES:
            raise ValueError(f"unknown suite {suite!r}; there are {', '.join((*SUITES, *CONVOLUTION_SUITES))}")
        found += [layer._replace(name=f"{suite} {layer.name}") for layer in SUITES.get(suite, ())]
    return found


def convolutions(suites: Iterable[str]) -> list[Convolution]:
    """The convolutions of those of some suites that have them."""
    return [of for suite in suites for of in CONVOLUTION_SUITES.get(suite, ())]


def problems(suites: Iterable[str], target: Target, recipes: Iterable[str] = ("int8",), dtype: str = "bfloat16") -> Met:
    """The problems that training steps of the layers pose to dispatch, one of each key of a tuned table, with counts."""
    from . import collect

    suites, recipes = list(suites), list(recipes)
    met = collect.of_layers(layers(suites), target, recipes, dtype)
    more = collect.of_convolutions(convolutions(suites), target, recipes, dtype)
    return collect.by_key([*met.items(), *more.items()])
