"""ResNet-50 in plain torch, and the case of a training step of it: bf16 in channels_last memory against quantized layers.

Source: He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385) table 1, with the stride of a bottleneck
at its 3x3 convolution, as torchvision has it. Its parameters are `parameters.RESNET50`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt

from . import train
from .cases import gaussian
from .harness import Case
from .operators import work_dtype
from .parameters import BLOCKS
from .providers import peer

TITLE = "train ResNet-50"
CLASSES = 64  # of the images that it trains on
LR = 1e-3
# What a block's branch is scaled by at first. With 1 the first steps of a deep network are chaotic: rounding to bf16 alone
# moved the loss after them by up to a quarter of their progress; with 1/4, int8, psq8 and bf16 by 1.1 % at most (three seeds
# of a network an eighth as wide, 32 x 32 pixels, on a CPU).
BRANCH = 0.25


class Bottleneck(nn.Module):
    """relu(1x1, 3x3 and 1x1 of x + shortcut(x)), each convolution with a norm, 4 times as many channels out as within."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if (channels, 1) != (4 * width, stride):
            projection = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """(N, 3, H, W) images to (N, classes) logits. blocks: of each stage.   width: channels within a block of the first."""

    def __init__(self, width: int = 64, blocks: Sequence[int] = BLOCKS, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            for block in range(count):
                stages.append(Bottleneck(channels, inner, 2 if stage and not block else 1))
                channels = 4 * inner
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


def case(batch: int, edge: int, device: torch.device, *, width: int = 64, blocks: Sequence[int] = BLOCKS,
         title: str = TITLE) -> Case:  # fmt: skip
    """Forward, loss, backward and AdamW on (batch, 3, edge, edge) images; weights in bf16 on a GPU, norms in float32.

    On a GPU also with the layers converted that `fqt.conv_cost` expects to be faster, and torch's own compiled.
    """
    trained = network(batch, edge, device, width, blocks)
    ways = [train.full_precision(device), train.quantized("int8"), train.quantized("psq8")]
    if device.type == "cuda":
        faster = functools.partial(_where_faster, x=trained.x)
        compiled = functools.partial(torch.compile, dynamic=False)
        ways += [train.Way("fqt int8, where predicted faster", faster, train.ALLOWED, {"tag": "int8 where faster"}),
                 train.Way(f"{ways[0].title}, torch.compile", compiled, train.ALLOWED,
                           {**peer("torch.compile", device), "tag": "full precision compiled"})]  # fmt: skip
    return train.compare(title, f"{batch}x3x{edge}x{edge}", trained, ways)


def network(batch: int, edge: int, device: torch.device, width: int, blocks: Sequence[int]) -> train.Network:
    """Images are noise on a coarse pattern of their class."""
    dtype = work_dtype(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = ResNet(width, blocks, CLASSES).to(device, dtype, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    labels = torch.arange(batch, device=device) % CLASSES
    patterns = gaussian(CLASSES, 3, 4, 4, device=device, seed=1, dtype=torch.float32)
    noise = gaussian(batch, 3, edge, edge, device=device, seed=0, dtype=torch.float32)
    x = noise + F.interpolate(patterns, size=(edge, edge))[labels]
    x = x.to(dtype, memory_format=torch.channels_last)
    return train.Network(functools.partial(copy.deepcopy, model), x, labels, LR)


def _where_faster(model: nn.Module, x: Tensor) -> nn.Module:
    fqt.quantize_(model, "int8", only_if_faster=True, strict=False, example_input=x)
    return model
