"""The launches of the block Householder transform and of its inverse, for the compiler gate: see `launches`."""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels import householder
from fqt_kernels.grouping import Groups

_empty = functools.partial(torch.empty, device="meta")
_ints = functools.partial(_empty, dtype=torch.int32)


HUNGRY = {
    "bhq n4096 auto min stochastic",
    "bhq n8192 grid stochastic",
    "bhq n8191 odd min stochastic",
    "bhq n28672 auto min stochastic",
    "bhq n28671 odd min stochastic",
    "inverse bfloat16",
    "inverse odd bfloat16",
}


def _groups(m: int) -> Groups:
    return Groups(_ints(m), _ints(m), _ints(m + 1), _empty(m))


def _transform(m: int, n: int, zero: str, *, bits: int = 8, dtype: torch.dtype = torch.bfloat16, nearest: bool = False,
               multiplier: tuple[int, int] | None = None, auto: bool = False) -> Callable[[], object]:  # fmt: skip
    return functools.partial(
        householder.transform,
        _empty(m, n, dtype=dtype),
        _groups(m),
        _ints(m),
        multiplier=None if multiplier is None else _empty(multiplier),
        bits=bits,
        zero=zero,
        rng=None if nearest else _empty(2, dtype=torch.int64),
        sums=zero != "symmetric",
        ranges=_empty(m) if auto else None,
    )


def _inverse(m: int, n: int, out_dtype: torch.dtype) -> Callable[[], object]:
    return functools.partial(
        householder.inverse, _empty(m, n), _groups(m), _ints(m),
        ranges=_empty(m), value=_empty(m), columns=_empty(n), out_dtype=out_dtype,
    )  # fmt: skip


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): rows from the shortest to the longest that one program holds, and longer ones; both have pieces of
    4, 8 and 16 rows by the number of rows. On most architectures those that need the most registers."""
    made = _launches()
    yield from made if arch in ("sm_80", "sm_90") else ((name, launch) for name, launch in made if name in HUNGRY)


def _launches() -> Iterator[tuple[str, Callable[[], object]]]:
    m = 8192
    yield "bhq n128 min stochastic", _transform(m, 128, "min")
    yield "bhq n1024 min stochastic", _transform(m, 1024, "min")
    yield "bhq n4096 auto min stochastic", _transform(m, 4096, "min", auto=True)
    yield "bhq n4096 float32 min stochastic", _transform(4096, 4096, "min", dtype=torch.float32)
    yield "bhq n4096 multiplier min stochastic", _transform(m, 4096, "min", multiplier=(1, 4096))
    yield "bhq n4096 min nearest", _transform(m, 4096, "min", nearest=True)
    yield "bhq n8192 grid stochastic", _transform(m, 8192, "grid")
    yield "bhq n8192 symmetric stochastic", _transform(2048, 8192, "symmetric")
    yield (
        "bhq n8192 float32 multiplier auto min stochastic",
        _transform(m, 8192, "min", dtype=torch.float32, multiplier=(1, 8192), auto=True),
    )
    yield "bhq n8191 odd min stochastic", _transform(m - 1, 8191, "min", multiplier=(m - 1, 1))
    yield "bhq n28672 multiplier grid stochastic", _transform(m, 28672, "grid", multiplier=(1, 28672))
    yield "bhq n28672 auto min stochastic", _transform(m, 28672, "min", auto=True)
    yield (
        "bhq n28672 float32 multiplier grid stochastic",
        _transform(m, 28672, "grid", dtype=torch.float32, multiplier=(1, 28672)),
    )
    yield "bhq n28671 odd min stochastic", _transform(m - 1, 28671, "min", multiplier=(m - 1, 1))
    yield "bhq one column odd min stochastic", _transform(m, 1, "min", auto=True)
    yield "inverse bfloat16", _inverse(m, 4096, torch.bfloat16)
    yield "inverse float32", _inverse(m, 4096, torch.float32)
    yield "inverse odd bfloat16", _inverse(m - 1, 4095, torch.bfloat16)
