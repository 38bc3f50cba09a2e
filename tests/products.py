"""Operands of the scaled product with codes of every kind and scales of many magnitudes, and its launch."""

import torch

import fqt_kernels.gemm as kernels
from fqt.qtensor import Operand

INTERPRETED = not torch.cuda.is_available()
CONFIG = (32, 32, 64, 4, 2)


def gpu_family():
    if torch.version.hip:
        return "amd"
    return {9: "sm90", 10: "sm100"}.get(torch.cuda.get_device_capability()[0], "sm80")


def codes(m, k, seed, extreme=False):
    """int8 codes; extreme ones are -128 and 127 at random, a row of all -128, one of all 127, one of -128 but for a 1."""
    g = torch.Generator().manual_seed(seed)
    if not extreme:
        return torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    q = torch.where(torch.rand(m, k, generator=g) < 0.5, -128, 127).to(torch.int8)
    q[0], q[1:2], q[2:3] = -128, 127, -128
    q[2:3, :1] = 1
    return q


def operand(q, granularity="per_row", offset=False, offset_granularity=None, seed=0, sums=True):
    """An operand with these codes and scales and offsets of many magnitudes."""
    g = torch.Generator().manual_seed(seed + 100)

    def vector(kind, spread):
        n = q.shape[0] if kind == "per_row" else 1
        return torch.exp(spread * torch.randn(n, generator=g)) * torch.where(
            torch.rand(n, generator=g) < 0.5, -1.0, 1.0
        )

    scale = None if granularity == "none" else vector(granularity, 2.0).abs()
    return Operand(
        q,
        scale,
        vector(offset_granularity or granularity, 2.0) if offset else None,
        q.sum(1, dtype=torch.int32) if sums else None,
    )


def launch(a, b, bias=None, out_dtype=None, config=CONFIG, device="cpu", **options):
    def move(t):
        return None if t is None else t.to(device)

    return kernels.scaled_mm(
        move(a.q), move(b.q), move(a.scale), move(b.scale), a_offset=move(a.offset), b_offset=move(b.offset),
        a_sum=move(a.sum), b_sum=move(b.sum), bias=move(bias), out_dtype=out_dtype, config=config, **options,
    )  # fmt: skip


def pair(m, n, k, epilogue=("per_row", False, "per_row", False), seed=0, extreme=False):
    ga, oa, gb, ob = epilogue
    return (
        operand(codes(m, k, seed, extreme), ga, oa, seed=seed),
        operand(codes(n, k, seed + 1, extreme), gb, ob, "per_tensor", seed + 1),
    )
