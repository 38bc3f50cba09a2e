"""Hostile memory for launchers: what they allocate lies between guard bands and holds poison until it is written."""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class _Frame(NamedTuple):
    memory: Tensor  # both bands and, between them, `count` elements
    count: int
    where: str  # file:line that allocated it


class GuardedTorch:
    """torch for a module of launchers, in place of its global `torch`: every tensor it makes lies between guard bands.

    Fresh memory of `empty` holds poison, so that an element no kernel writes shows. Nothing waits for a GPU before
    `broken` or `check`; `made` counts the tensors. What other functions of torch return (pad, sort, _int_mm) has no bands.
    """

    GUARD = 4096  # elements on either side; a multiple of every alignment of torch's, so that it is as without guards

    def __init__(self, poison: int = 0x5A):
        self._poison = poison
        self._frames: list[_Frame] = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @property
    def made(self) -> int:
        return len(self._frames)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
        count = math.prod(shape)
        memory = torch.empty(count + 2 * self.GUARD, dtype=dtype, device=device)
        memory.view(torch.uint8).fill_(self._poison)  # of float32 a number near 1e16
        caller = sys._getframe(2)
        self._frames.append(_Frame(memory, count, f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"))
        return memory[self.GUARD : self.GUARD + count].view(shape)

    def empty(self, *shape, dtype=torch.float32, device="cpu", **more) -> Tensor:
        if more:  # pinned memory: of the host alone
            return torch.empty(*shape, dtype=dtype, device=device, **more)
        return self._make(_flat(shape), dtype, device)

    def empty_like(self, x: Tensor) -> Tensor:
        return self._make(x.shape, x.dtype, x.device)

    def zeros(self, *shape, dtype=torch.float32, device="cpu") -> Tensor:
        return self._make(_flat(shape), dtype, device).zero_()

    def full(self, shape, value, dtype=torch.float32, device="cpu") -> Tensor:
        return self._make(shape, dtype, device).fill_(value)

    def broken(self) -> list[str]:
        """Which bands were written over, in words."""
        flags: dict[torch.device, list[Tensor]] = {}
        for frame in self._frames:
            bands = frame.memory[: self.GUARD], frame.memory[self.GUARD + frame.count :]
            flags.setdefault(frame.memory.device, []).extend(
                (band.view(torch.uint8) != self._poison).any() for band in bands
            )
        read = {device: iter(torch.stack(each).tolist()) for device, each in flags.items()}  # waits, once a device
        broken = []
        for frame in self._frames:
            values = read[frame.memory.device]
            sides = [side for side in ("before", "after") if next(values)]
            if sides:
                what = f"{frame.count} {frame.memory.dtype}".replace("torch.", "")
                broken.append(f"{' and '.join(sides)} the {what} that {frame.where} allocates")
        return broken

    def check(self) -> None:
        """Raises AssertionError where a band was written over."""
        if broken := self.broken():
            raise AssertionError(f"written outside: {'; '.join(broken)}")


def _flat(shape: tuple) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)


def launchers() -> list[ModuleType]:
    """The modules of fqt_kernels, imported, whose global `torch` is torch."""
    import fqt_kernels

    names = [f"fqt_kernels.{found.name}" for found in pkgutil.iter_modules(fqt_kernels.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if getattr(module, "torch", None) is torch]


@contextlib.contextmanager
def guarded(modules: Iterable[ModuleType]) -> Iterator[GuardedTorch]:
    """What these modules allocate within the context lies between bands, which the caller has to check."""
    memory, modules = GuardedTorch(), list(modules)
    for module in modules:
        module.torch = memory
    try:
        yield memory
    finally:
        for module in modules:
            module.torch = torch
