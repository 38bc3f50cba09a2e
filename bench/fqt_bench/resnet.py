"""The ResNets of CIFAR-10 in plain torch: a stem, three stages of basic blocks, and one linear layer.

    depth 6n + 2, n blocks in each stage, of width, 2·width and 4·width channels; stages two and three halve the image first.

Source: He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385) section 4.2, with shortcuts of option B.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3.

    shortcut: a 1x1 convolution and its norm where the block changes the shape, else x itself.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if (channels_in, 1) != (channels, stride):
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """(N, channels, H, W) images to (N, classes) logits.

    Args:
        depth: 20, 32, 44, …; 8 is the smallest.   width: channels of the first stage, 16 in the paper.
        channels: of the images.   pool: images are averaged over pool x pool pixels before anything else.

    Raises:
        ValueError: depth is not 6n + 2 for an n of at least 1.
    """

    def __init__(self, depth: int = 20, width: int = 16, channels: int = 3, classes: int = 10, pool: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2, one of 8, 14, 20, 26, 32, …, got {depth}")
        self.pool = nn.AvgPool2d(pool)
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = _stage(width, width, blocks, 1)
        self.stage2 = _stage(width, 2 * width, blocks, 2)
        self.stage3 = _stage(2 * width, 4 * width, blocks, 2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(self.pool(x))))
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))
