"""What a Gluon kernel computes with in `gluon.py`: scalars, tensors in registers, pointers and descriptors."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch


class Fault(Exception):
    """What the kernel did wrong."""


@dataclass(frozen=True)
class DType:
    torch: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        return 8 * self.torch.itemsize

    @property
    def element_ty(self) -> DType:
        return self


class Scalar(int):
    """An integer of the kernel: Python's, with a method `to`."""

    def to(self, dtype: DType) -> Scalar:
        return self


def _scalar(name: str):
    def operator(self, other):
        result = getattr(int, name)(self, other)
        return Scalar(result) if type(result) is int else result

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "and", "rand"):
    setattr(Scalar, f"__{_name}__", _scalar(f"__{_name}__"))


class Tensor:
    """Values in registers, with a layout that nothing here depends on but what asks for it."""

    def __init__(self, value: torch.Tensor, layout: Any = None) -> None:
        self.value, self.layout = value, layout

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def type(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(layout=self.layout)

    def to(self, dtype: DType) -> Tensor:
        return Tensor(self.value.to(dtype.torch), self.layout)

    def reshape(self, shape: list[int]) -> Tensor:
        return Tensor(self.value.reshape(shape), self.layout)

    def permute(self, *order: int) -> Tensor:
        return Tensor(self.value.permute(*order), self.layout)

    def split(self) -> tuple[Tensor, Tensor]:
        if self.shape[-1] != 2:
            raise Fault(f"split of {self.shape}, whose last extent is not 2")
        return Tensor(self.value[..., 0], self.layout), Tensor(self.value[..., 1], self.layout)


def _elementwise(name: str):
    def operator(self: Tensor, other) -> Tensor:
        if isinstance(other, Pointer):
            return NotImplemented
        value = other.value if isinstance(other, Tensor) else other
        layout = self.layout if self.layout is not None else getattr(other, "layout", None)
        return Tensor(getattr(self.value, name)(value), layout)

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "lt", "and"):
    setattr(Tensor, f"__{_name}__", _elementwise(f"__{_name}__"))


@dataclass(frozen=True)
class Pointer:
    """Into the elements of a contiguous tensor. stored: how often each was, of an output."""

    elements: torch.Tensor
    offset: Any = 0
    stored: torch.Tensor | None = None

    @property
    def dtype(self) -> DType:
        return DType(self.elements.dtype)

    def __add__(self, offset) -> Pointer:
        return Pointer(self.elements, offset + self.offset, self.stored)

    def at(self) -> tuple[torch.Tensor, Any]:
        offset = self.offset
        value = offset.value if isinstance(offset, Tensor) else torch.tensor(int(offset))
        return value.to(torch.int64), getattr(offset, "layout", None)


class Descriptor:
    """What TMA knows of a matrix, from a real `TensorDescriptor`."""

    def __init__(self, real: Any) -> None:
        self.base, self.block_shape, self.layout = real.base, list(real.block_shape), real.layout
        self.shape = [Scalar(extent) for extent in real.shape]
        self.dtype, self.stored = DType(real.base.dtype), None
        itemsize = real.base.element_size()
        if real.base.data_ptr() % 16 or any(stride * itemsize % 16 for stride in real.strides[:-1]):
            raise Fault("TMA: an address or a stride that is no multiple of 16 bytes")
