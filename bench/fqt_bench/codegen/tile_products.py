"""The launches of the product with the inverse of tile-local Householder groups, as `launches` has those of the others."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels import gemm_householder
from fqt_kernels.grouping import TILE, Groups

from .table import ARCHES

_empty = functools.partial(torch.empty, device="meta")
_codes = functools.partial(_empty, dtype=torch.int8)
_int32 = functools.partial(_empty, dtype=torch.int32)


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The epilogues of the recipes: scales alone, every offset, W with its scales folded away. "even": extents fill whole
    tiles; "tail": M and K do not; "odd": nor does N, which only the first configuration takes."""
    if arch == "sm_89":  # for integers the instructions are those of sm_80
        return
    configs = gemm_householder.CONFIGS[ARCHES[arch]]
    for config in configs:
        title = "{}x{}x{} c{} w{} s{} householder".format(TILE, *config)
        product = functools.partial(gemm_householder.scaled_mm, config=config, out_dtype=torch.bfloat16)
        args, rows = _arguments(8192, 4096, 4096)
        yield f"{title} scales even", functools.partial(product, *args, _empty(4096), **rows)
        for extents, m, n, k in (("tail", 8176, 4096, 4112), ("odd", 8191, 4095, 4112)):
            args, rows = _arguments(m, n, k)
            offsets = dict(a_offset=_empty(m), b_offset=_empty(1), a_sum=_int32(m), b_sum=_int32(n))
            if extents == "tail" or config == configs[0]:
                yield f"{title} affine {extents}", functools.partial(product, *args, _empty(1), **offsets, **rows)
        if arch != "sm_90":  # less than the affine epilogue
            continue
        args, rows = _arguments(8176, 4096, 4112)
        folded = dict(a_offset=_empty(8176), b_sum=_int32(4096), out_dtype=torch.float32)
        yield f"{title} folded tail", functools.partial(product, *args, None, **folded, **rows)


def _arguments(m: int, n: int, k: int) -> tuple[tuple, dict]:
    """The codes and the scale of A, and what the inverse takes."""
    groups = Groups(_int32(m), _int32(m), _int32(m + 1), _empty(m))
    inverse = dict(groups=groups, ranges=_empty(m), value=_empty(m), columns=_empty(n))
    return (_codes(m, k), _codes(n, k), _empty(m)), inverse
