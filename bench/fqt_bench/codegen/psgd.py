"""The launches of the optimizer's step that the compiler gate compiles.

"odd" marks what is not on 16-byte boundaries: rows and tensors of other lengths.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from fqt_kernels.psgd import Hyper, MultiTensor, Slot

_empty = functools.partial(torch.empty, device="meta")


def _slot(shape: tuple[int, ...], dtype: torch.dtype, *, channels: int = 1, counts: bool = False, adamw: bool = False,
          points: bool = False, codes: bool = False, moments: bool = True) -> Slot:  # fmt: skip
    """A parameter whose state has no memory. channels: rows of its range, 0 for none."""
    like = functools.partial(_empty, shape, dtype=dtype)
    n, k = shape if codes else (0, 0)
    return Slot(
        like(),
        like(),
        first=like() if moments else None,
        second=like() if adamw else None,
        powers=_empty(2, dtype=torch.float64) if adamw else None,
        range=_empty(channels, 2) if channels else None,
        threshold=_empty(1) if counts else None,
        points=_empty(shape) if points else None,
        lam=_empty(1) if points else None,
        codes=(_empty(n, k, dtype=torch.int8), _empty(k, n, dtype=torch.int8), _empty(n, 1)) if codes else None,
    )


def _step(slot: Slot, rule: str = "sgd", *, scaled: bool = False, **options: object) -> Callable[[], object]:
    """A first step with the statistics before it. scaled: as GradScaler asks for it."""
    more = dict(found_inf=_empty(1), grad_scale=_empty(1)) if scaled else {}

    def launch() -> None:
        momentum = 0.0 if slot.first is None else 0.9
        MultiTensor().step([slot], [Hyper(lr=0.1, momentum=momentum, **options)], rule=rule, **more)

    return launch


def launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch): each starts what most layers need, with all that the kernel can be asked for in two of them."""
    matrix, odd = (4096, 4096), (4095, 4095)
    yield "psgd float32 grid", _step(_slot(matrix, torch.float32), target="grid", qmax=7)
    yield "psgd float32 plain", _step(_slot(matrix, torch.float32, channels=0, moments=False))
    yield "psgd bfloat16 codes", _step(_slot(matrix, torch.bfloat16, codes=True), target="grid", qmax=7)
    every = dict(channels=4096, counts=True, points=True, codes=True)
    yield (
        "psgd codes every scaled",
        _step(_slot(matrix, torch.float32, **every), target="grid+zero", qmax=7, per_channel=True, scaled=True),
    )
    yield (
        "psgd adamw every scaled",
        _step(
            _slot(matrix, torch.bfloat16, adamw=True, **every),
            "adamw",
            target="grid+zero",
            qmax=7,
            per_channel=True,
            scaled=True,
        ),
    )
    every["channels"] = 4095
    yield (
        "psgd adamw every odd",
        _step(_slot(odd, torch.float16, adamw=True, **every), "adamw", target="grid+zero", qmax=7, per_channel=True),
    )
