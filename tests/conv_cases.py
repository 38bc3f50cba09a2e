"""Convolutions to try: a seeded walk through kernels, strides, paddings, dilations, groups, odd sizes and memory formats."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from fqt.conv import Geometry

RECIPES = ("int8", "ptq8", "psq8", "bhq8", "qat8", "psq4", "auto8", "bhq5-tile")


class Case(NamedTuple):
    """x (N, C, H, W), weight (O, C/groups, R, S), bias (O,), dy (N, O, P, Q), all float32; padding (before, after) twice."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    geometry: Geometry
    padding: tuple[tuple[int, int], tuple[int, int]]
    recipe: str

    @property
    def options(self) -> dict:
        """Of torch's convolutions, for an image that is padded already."""
        g = self.geometry
        return dict(stride=g.stride, dilation=g.dilation, groups=g.groups)

    @property
    def surroundings(self) -> tuple[int, ...]:
        """The padding as F.pad takes it."""
        return (*self.padding[1], *self.padding[0])


def case(number: int) -> Case:
    """The case of that number: whatever the random draws, its recipe, memory format and kind take turns."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    while True:
        kind = ("plain", "1x1", "grouped", "depthwise", "channels of 16", "plain", "strided", "few channels")[
            number % 8
        ]
        n = draw.choice((1, 2, 5, 16, 17))
        size = tuple(draw.randint(1, 3 if n > 5 else 5) for _ in range(2))
        groups, c, o = 1, draw.choice((1, 3, 17)), draw.choice((1, 5, 16))
        kernel, stride = (draw.randint(1, 3), draw.randint(1, 3)), (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2)))
        dilation = (draw.choice((1, 1, 2)), draw.choice((1, 1, 3)))
        padding = tuple((draw.randint(0, 2), draw.randint(0, 2)) for _ in range(2))
        if kind == "1x1":
            kernel, stride, padding, c = (1, 1), (1, 1), ((0, 0), (0, 0)), draw.choice((16, 19))
        elif kind == "grouped":
            groups, c, o = 2, 2 * draw.choice((3, 16)), 2 * draw.choice((1, 4))
        elif kind == "depthwise":
            groups, c, o = 3, 3, draw.choice((3, 6))
        elif kind == "channels of 16":
            c, o = draw.choice((16, 32)), draw.choice((8, 20))
        elif kind == "strided":
            stride, c = (2, 2), draw.choice((16, 18))
        try:
            geometry = Geometry.of(size, kernel, stride, padding, dilation, groups)
        except ValueError:
            continue
        x, dy = normal(n, c, *size), normal(n, o, *geometry.out)
        memory = (torch.contiguous_format, torch.channels_last)[number // 8 % 2]
        x, dy = x.contiguous(memory_format=memory), dy.contiguous(memory_format=memory)
        weight, bias = normal(o, c // groups, *kernel), normal(o)
        return Case(x, weight, bias, dy, geometry, padding, RECIPES[(number + number // 8) % 8])
