"""The Llama blocks of the end-to-end benchmark."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fqt
from fqt_bench import llama, parameters

SIZES = llama.Sizes(width=16, inner=24, heads=4, kv_heads=2)


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + llama.EPS).sqrt() * weight


def test_a_pair_is_turned_by_its_positions_angle():
    """As complex numbers: x[2i] + i x[2i + 1], times exp(i t theta^(-2i / size))."""
    x = torch.randn(2, 3, 7, 8)
    angle = torch.arange(7.0)[:, None] * llama.THETA ** (-torch.arange(0, 8, 2) / 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(()), angle)
    got = llama.rotary(x, *llama.angles(7, 8))
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))
    assert llama.rotary(x.bfloat16(), *llama.angles(7, 8)).dtype == torch.bfloat16


def test_products_of_turned_vectors_depend_on_their_distance_alone():
    q, k = torch.randn(2, 8)
    at = llama.rotary(torch.stack((q, k))[:, None, None].expand(2, 1, 12, 8), *llama.angles(12, 8))[:, 0]
    scores = at[0] @ at[1].T
    for distance in range(-3, 4):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 5], atol=1e-3)


def test_a_block_is_attention_and_swiglu_added_to_the_input():
    """By the formulas, one head at a time: heads 0 and 1 read the first keys and values, 2 and 3 the second."""
    block, x = llama.Block(SIZES).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    cos, sin = llama.angles(5, 4)
    w = block.attention.qkv.weight
    h, heads = normed(x, block.norm1.weight), []
    for i in range(4):
        q, k, v = (h @ w[row : row + 4].T for row in (4 * i, 16 + 4 * (i // 2), 24 + 4 * (i // 2)))
        q, k = llama.rotary(q, cos, sin), llama.rotary(k, cos, sin)
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        heads.append((q @ k.mT / math.sqrt(4)).masked_fill(later, -math.inf).softmax(-1) @ v)
    y = x + torch.cat(heads, -1) @ block.attention.o.weight.T
    gate, up = (normed(y, block.norm2.weight) @ part.T for part in block.feed_forward.w13.weight.chunk(2))
    expected = y + (gate * gate.sigmoid() * up) @ block.feed_forward.w2.weight.T
    torch.testing.assert_close(block(x, cos, sin), expected, atol=1e-6, rtol=1e-6)  # angles and turns are of float32


def test_no_token_sees_a_later_one_and_each_is_trained():
    model, x = llama.Llama(2, 9, SIZES, 8), torch.randn(1, 9, 16)
    other = x.clone()
    other[:, 5:] += 1
    a, b = model(x), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5], b[:, 5])
    F.cross_entropy(a[0], torch.arange(9) % 8).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_block_has_the_parameters_of_llama_8b():
    with torch.device("meta"):
        block = llama.Block(llama.Sizes())
    shapes = sorted(tuple(p.shape) for p in block.parameters())
    assert shapes == sorted(parameters.LLAMA_8B.shapes)


def test_every_product_with_weights_is_converted():
    report = fqt.quantize_(llama.Llama(2, 4, SIZES), "psq5")
    assert len(report.converted) == 2 * 4 + 1 and not report.skipped


def test_impossible_sizes_are_errors():
    with pytest.raises(ValueError, match="even multiple of 4 heads, got 12"):
        llama.Sizes(width=12, heads=4)
    with pytest.raises(ValueError, match="multiple of 3 kv_heads, got 4"):
        llama.Sizes(width=16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="5 tokens, but the network is made for 9"):
        llama.Llama(1, 9, SIZES)(torch.randn(1, 5, 16))


def test_the_operations_of_attention_are_those_of_its_six_products():
    """A triangle of scores and of weighted values, two gradients each: 2 operations for each multiplication."""
    tokens = 1000
    pairs = tokens * (tokens + 1) / 2
    exactly = 2 * pairs * SIZES.width * 2 * 3
    assert llama.attention_flops(1, 1, tokens, SIZES) == pytest.approx(exactly, rel=2 / tokens)
    assert llama.attention_flops(3, 2, 8, SIZES) == 6 * llama.attention_flops(1, 1, 8, SIZES)
