"""What may be launched for the operators of a convolution: the part of `fqt.candidates` that is theirs.

A product is computed by the kernel of convolutions ("implicit"), or as the product of matrices that it is ("pointwise") or
is made, by writing the codes under each window out ("im2col"): as measured, else as the geometry suggests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import conv_problems
from .candidates import (
    INTERPRETER_CONFIG,
    MAX_CANDIDATES,
    MIN_SPLIT_STEPS,
    Candidate,
    cost,
    steps,
    table_of,
    taps,
    tiles,
)

if TYPE_CHECKING:
    from .dispatch import Problem


def heuristic(p: Problem) -> Candidate:
    """The heuristic's choice: a product of matrices where that is one, else the implicit one of the least `cost`; of wgrad
    with the number of programs that share a sum."""
    if p.op in conv_problems.QUANTIZATIONS:
        return Candidate("tile", _tiles(p)[0])
    if (way := conv_problems.path_of(p)) != "implicit":
        return Candidate(way, ())
    if p.device == "cpu":
        config = _interpreted(p.op)
        return Candidate("implicit", config, _least_splits(p, config))
    return _implicit(p)[0]


def competing(p: Problem) -> list[Candidate]:
    """All that may compute an operator on a GPU, the heuristic's choice among them."""
    if p.op in conv_problems.QUANTIZATIONS:
        return [Candidate("tile", tile) for tile in _tiles(p)]
    way = conv_problems.path_of(p)
    matrices = [Candidate(way, ())] * (way != "implicit")
    return matrices + _implicit(p)[: MAX_CANDIDATES - len(matrices)]


def _implicit(p: Problem) -> list[Candidate]:
    """The kernel of convolutions with its configurations, the least `cost` first; of wgrad with some splits of each."""
    found = [Candidate("implicit", config, split) for config in configs(p) for split in splits(p, config)]
    found.sort(key=lambda candidate: cost(p, candidate))
    best = {}
    for candidate in found:
        best.setdefault(candidate.config, candidate.split_k)
    # The cheapest split of a configuration, a half and twice of it, and the fewest.
    return [c for c in found if c.split_k in {best[c.config] // 2, best[c.config], 2 * best[c.config],
                                              _least_splits(p, c.config)}]  # fmt: skip


def configs(p: Problem) -> list[tuple[int, ...]]:
    """Of the kernel of convolutions, for the problem's channels."""
    from fqt_kernels import conv, conv_wgrad

    if p.op == "conv_wgrad":
        return conv_wgrad.CONFIGS[table_of(p)]
    if p.k // taps(p) % 16:
        return [conv.UNALIGNED_CONFIG]
    return [config for config in conv.CONFIGS[table_of(p)] if conv.fits(config, p.n)]


def _interpreted(op: str) -> tuple[int, ...]:
    """A configuration for the interpreter: of fprop and dgrad many pixels and few channels."""
    return (128, *INTERPRETER_CONFIG[1:]) if op == "conv" else INTERPRETER_CONFIG


def splits(p: Problem, config: tuple[int, ...]) -> range:
    """Programs that may share a sum of wgrad: two waves of them at most, each with enough blocks of K."""
    least = _least_splits(p, config)
    if p.op != "conv_wgrad":
        return range(least, least + 1)
    free = 2 * p.processors // max(tiles(p, config), 1)
    return range(least, max(least, min(free, steps(p, config) // MIN_SPLIT_STEPS)) + 1)


def _least_splits(p: Problem, config: tuple[int, ...]) -> int:
    """Programs that must share a sum of wgrad: a program's part, whole blocks of K, stays within int32."""
    from fqt_kernels.gemm import MAX_INT32_TERMS

    return max(-(-steps(p, config) // (MAX_INT32_TERMS // config[2])), 1) if p.op == "conv_wgrad" else 1


def _tiles(p: Problem) -> list[tuple[int, ...]]:
    """Those of the launchers of `conv_quantize`; of a problem without a geometry, those of one image."""
    import torch

    from fqt_kernels.conv_quantize import stored_images, tiles_of

    words, (images, channels) = p.kind.split(), p.geometry or (1, p.n)
    cols = p.op == "quantize_gradient_images" or "cols" in words or "both" in words
    pixels = p.m // images
    x = torch.empty(images, p.n, pixels, device="meta")
    x = x if "pixels_last" in words else x.transpose(1, 2).contiguous().transpose(1, 2)
    return tiles_of(x, max(channels, p.n), stored_images(images, cols), cols)


def known(op: str) -> dict[str, frozenset[tuple[int, ...]]]:
    """All configurations of an operator's kernels."""
    from fqt_kernels import conv, conv_quantize, conv_wgrad

    if op == conv_problems.ARRANGED:
        return {"torch": frozenset([()])}
    if op in conv_problems.QUANTIZATIONS:
        return {"tile": frozenset([*conv_quantize.TILES.values(), *conv_quantize.ODD_TILES.values()])}
    tables = (conv if op == "conv" else conv_wgrad).CONFIGS
    implicit = {_interpreted(op), *(config for table in tables.values() for config in table)}
    if op == "conv_wgrad":
        return {"implicit": frozenset(implicit), "pointwise": frozenset([()])}
    return {"implicit": frozenset(implicit | {conv.UNALIGNED_CONFIG}), "pointwise": frozenset([()]),
            "im2col": frozenset([()])}  # fmt: skip
