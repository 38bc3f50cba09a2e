"""A small decoder-only transformer in plain torch, every product with weights an `nn.Linear`.

    x = token + position;   x += proj(attention(norm1(x)));   x += fc2(gelu(fc1(norm2(x))));   head(norm(x))

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3: norms before the layers,
output layers of the blocks initialized smaller by the root of their number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.02  # of the initial weights, at width 768; in inverse proportion to the root of the width


class Block(nn.Module):
    """Causal self-attention and a feed-forward network four times as wide, each added to its input (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (N, heads, T, size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """(N, T) tokens to (N, T, vocabulary) logits of the token after each.

    Args:
        depth: number of blocks.   width: a multiple of heads.   context: the largest T.

    Raises:
        ValueError: of a width that is no multiple of heads, and in forward of T beyond the context.
    """

    def __init__(self, depth: int, width: int, heads: int = 4, context: int = 64, vocabulary: int = 256) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of {heads} heads, got {width}")
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        std = STD * math.sqrt(768 / width)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                last = name.endswith(("proj", "fc2"))  # of a block: what is added to x
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * depth) if last else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        t, context = tokens.shape[1], self.position.num_embeddings
        if t > context:
            raise ValueError(f"{t} tokens, but the network's context is {context}")
        x = self.token(tokens) + self.position(torch.arange(t, device=tokens.device))
        return self.head(self.norm(self.blocks(x)))
