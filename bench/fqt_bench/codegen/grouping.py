"""The launches of the compiler gate that put rows into groups for the block Householder transform."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels import grouping

_empty = functools.partial(torch.empty, device="meta")
_ints = functools.partial(_empty, dtype=torch.int32)


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch) of all that is compiled for an architecture. "odd": a number of rows that no alignment follows from;
    the compiler makes no less of it, so that it stands for both on most."""
    for extent, m in (("even", 8192), ("odd", 8191)) if arch == "sm_90" else (("odd", 8191),):
        groups = grouping.Groups(_ints(m), _ints(m), _ints(m + 1), _empty(m))
        yield f"row ranges {extent}", functools.partial(grouping.row_ranges, _ints(2, 32, m))
        yield f"groups global {extent}", functools.partial(grouping.group_rows, _empty(m), "global")
        yield f"groups tile {extent}", functools.partial(grouping.group_rows, _empty(m), "tile")
        yield f"groups absmax {extent}", functools.partial(grouping.group_absmax, _ints(m), groups)
