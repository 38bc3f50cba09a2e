"""A stack of Llama 3 blocks in plain torch, from hidden states to logits, every product with weights an `nn.Linear`.

    x += o(attention(rotary(qkv(norm1(x)))));   x += w2(silu(gate) * up), gate, up = w13(norm2(x));   head(norm(x))

Source: Llama team, The Llama 3 Herd of Models (arXiv 2407.21783) table 3; Su et al., RoFormer (arXiv 2104.09864) section
3.4.2; Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202). The projections of q, k and v are one layer, and so are
gate and up, as in `parameters.LLAMA_8B`, which are the parameters of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THETA = 500_000.0  # base of the rotary frequencies
EPS = 1e-5  # of the norms
STD = 0.02  # of the initial weights, at width 4096; in inverse proportion to the root of the width


@dataclass(frozen=True)
class Sizes:
    """Of a block; those of Llama 3 8B by default. kv_heads: each serves heads / kv_heads heads (grouped-query attention).

    Raises:
        ValueError: heads that do not divide the width into even sizes, or kv_heads that do not divide heads.
    """

    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of {self.heads} heads, got {self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of {self.kv_heads} kv_heads, got {self.heads}")

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self.width // self.heads


def angles(tokens: int, size: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of t · THETA^(-2i / size), (tokens, size / 2) float32: position t, pair i of a head."""
    frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angle = torch.arange(tokens, dtype=torch.float64, device=device)[:, None] * frequencies
    return angle.cos().float(), angle.sin().float()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i + 1]) of (N, heads, T, size) by its position's angle, in float32; the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention of (N, T, width), rotary embedding of q and k."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv = nn.Linear(sizes.width, sizes.width + 2 * sizes.kv_heads * sizes.head, bias=False)
        self.o = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.sizes
        counts = (s.heads, s.kv_heads, s.kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, s.head)).transpose(1, 2).split(counts, 1)  # (N, heads, T, size)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=s.heads != s.kv_heads)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(gate) * up) of (N, T, width), gate and up from one layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.w13 = nn.Linear(sizes.width, 2 * sizes.inner, bias=False)
        self.w2 = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and SwiGLU, each of the norm of its input and added to it (N, T, width)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(sizes.width, EPS) for _ in range(2))
        self.attention, self.feed_forward = Attention(sizes), SwiGLU(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.feed_forward(self.norm2(x))


class Llama(nn.Module):
    """(N, T, width) hidden states, in place of embedded tokens, to (N, T, classes) logits.

    Args:
        depth: number of blocks.   tokens: the T that it is made for.   classes: of the head.

    Raises:
        ValueError: in forward of another T.
    """

    def __init__(self, depth: int, tokens: int, sizes: Sizes = Sizes(), classes: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(sizes.width, EPS), nn.Linear(sizes.width, classes, bias=False)
        # Tensors of no module: a conversion to bfloat16 leaves them in float32.
        self.angles = angles(tokens, sizes.head, self.head.weight.device)
        std = STD * math.sqrt(4096 / sizes.width)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith((".o", ".w2"))  # of a block: what is added to x
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * depth) if last else std)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.angles
        if x.shape[1] != len(cos):
            raise ValueError(f"{x.shape[1]} tokens, but the network is made for {len(cos)}")
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def attention_flops(depth: int, sequences: int, tokens: int, sizes: Sizes = Sizes()) -> float:
    """Of the two products of causal attention and the four of their gradients, 2 · T² / 2 · width each, in a step."""
    return 6.0 * depth * sequences * tokens**2 * sizes.width
