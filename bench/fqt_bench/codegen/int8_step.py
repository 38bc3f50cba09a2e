"""The launches of the step of weights that are held in int8, for the compiler gate: see `launches`."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels.int8_step import int8_step
from fqt_kernels.psgd_table import Hyper

_empty = functools.partial(torch.empty, device="meta")


def _step(
    n: int, k: int, hyper: Hyper, *, dtype: torch.dtype = torch.float32, adamw: bool = False
) -> Callable[[], object]:
    codes = functools.partial(_empty, dtype=torch.int8)
    ranges = hyper.target is not None
    return functools.partial(
        int8_step,
        codes(n, k), codes(k, n), _empty(n, 1), _empty(2, dtype=torch.int64), _empty(n, k, dtype=dtype), hyper,
        first=_empty(n, k, dtype=dtype),
        second=_empty(n, k, dtype=dtype) if adamw else None,
        powers=_empty(2, dtype=torch.float64) if adamw else None,
        range=_empty(n if hyper.per_channel else 1, 2) if ranges else None,
        threshold=_empty(1) if hyper.target == "grid+zero" else None,
        found_inf=_empty(1),
        grad_scale=_empty(1),
    )  # fmt: skip


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): plain steps, and those that need the most registers."""
    plain = Hyper(0.1, momentum=0.9)
    position = plain._replace(
        target="grid+zero", qmax=7, sparsity=0.9, per_channel=True, weight_decay=1e-4, nesterov=True
    )
    yield "int8 step sgd", _step(4096, 4096, plain)
    yield "int8 step adamw grid+zero bfloat16", _step(4096, 4096, position, dtype=torch.bfloat16, adamw=True)
    yield "int8 step adamw grid+zero odd", _step(4095, 4097, position, adamw=True)
