"""Weights held as int8 codes with a scale for each row, and as nothing else: W = q · scale.

    fqt.quantize_(model, "int8")
    fqt.hold_int8_(model)                                     # the float weights are gone
    optimizer = fqt.optim.PSGD(model.parameters(), lr=0.1)    # built afterwards; rounds stochastically

The codes are those that the matrix products take, so that nothing is quantized in the forward pass; the optimizers of
`fqt.optim` round each update stochastically to new codes (`fqt.optim.int8`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import ops
from .qtensor import QTensor
from .recipe import Quantizer
from .rng import layer_key

HELD = Quantizer(8, "per_row", "symmetric")  # what the codes of an Int8Weight are codes of
DTYPES = (torch.float32, torch.bfloat16)
_INNER = ("q", "qt", "scale", "rng")
_aten = torch.ops.aten
# Operators that look at the shape, dtype and device of this weight only.
_UNREAD = (_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like,
           _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full)  # fmt: skip


class Int8Weight(Tensor):
    """A weight (N, K) held as int8 codes: W = q · scale. Made by `hold_int8_`.

    It is a tensor of dtype float32 or bfloat16 (of which there is no copy in memory), a Parameter, and its `.grad` is an
    ordinary tensor of that dtype. `fqt.nn.Linear` multiplies the codes. Any other operator is given q · scale, computed in
    float32 and rounded to the dtype; the result is an ordinary tensor, and a view is a copy, so that writing into one
    changes nothing. `to` a device or to one of the two dtypes, `clone`, `detach`, copies, pickles and state_dict keep the
    codes; to another dtype gives an ordinary tensor.

    `copy_` (and load_state_dict) of floating-point values rounds to nearest, with the range of each row as its scale; a row
    that has these values already stays as it is. Of another Int8Weight it copies codes, scales and random stream. Other
    in-place writes are refused: an optimizer's `add_` would be rounded to nearest, where a step below half a code is lost.

    Attributes:
        q: (N, K) int8.   qt: (K, N) int8, the same codes transposed.   scale: (N, 1) float32.
        rng: (2,) int64, the key of the layer's name and the number of updates so far, which random bits are drawn with.

    Raises:
        TypeError: an in-place write other than `copy_`.
    """

    q: Tensor
    qt: Tensor
    scale: Tensor
    rng: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, q: Tensor, qt: Tensor, scale: Tensor, rng: Tensor, dtype: torch.dtype = torch.float32):
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=dtype, device=q.device)

    def __init__(self, q: Tensor, qt: Tensor, scale: Tensor, rng: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.q, self.qt, self.scale, self.rng = q, qt, scale, rng

    @classmethod
    def of(cls, x: Tensor, rng: Tensor) -> Int8Weight:
        """The nearest codes of x (N, K), float32 or bfloat16, with the range of each row as its scale."""
        q, qt, scale, *_ = ops.quantize(x.detach(), HELD.bits, HELD.granularity, HELD.zero, HELD.rounding, cols=True)
        return cls(q, qt, scale, rng, x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """q · scale as an ordinary tensor: computed in float32, rounded to dtype (this weight's own by default)."""
        return (self.q.to(torch.float32) * self.scale).to(self.dtype if dtype is None else dtype)

    def codes(self, *, transposed: bool, sums: bool = False) -> QTensor:
        """The codes as `fqt.nn.Linear` takes them; sums: of the rows (and, transposed, of the columns) as well."""
        row_sum, col_sum = ((self.q.sum(d, dtype=torch.int32) if sums else None) for d in (1, 0))
        return QTensor(
            self.q, self.qt if transposed else None, self.scale, None, row_sum, col_sum if transposed else None
        )

    def share_memory_(self) -> Int8Weight:
        """Move it to memory that processes share."""
        for name in _INNER:
            getattr(self, name).share_memory_()
        return self

    def __repr__(self) -> str:
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __setitem__(self, index, value) -> None:
        raise TypeError("an Int8Weight takes no writes by index: use copy_ with all of its values")

    # ---- what torch asks of a tensor made of tensors

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return list(_INNER), self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, outer_size, outer_stride) -> Int8Weight:
        return Int8Weight(**inner, dtype=dtype)

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        return Int8Weight(*(fn(getattr(self, name)) for name in _INNER), dtype=dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is _aten.detach:
            return args[0]._map(Tensor.detach)
        if packet is _aten.clone:
            return args[0]._map(torch.clone)
        if packet is _aten._to_copy and kwargs.get("dtype") in (None, *DTYPES):
            return _moved(args[0], **kwargs)
        if packet is _aten.copy_ and isinstance(args[0], Int8Weight):
            return _copied(*args[:2])
        _refuse_writes(func, args, kwargs)
        unread = packet in _UNREAD or (func.namespace == "fqt" and packet is torch.ops.fqt.linear)
        read = _proxy if unread else Int8Weight.dequantize
        return func(*pytree.tree_map_only(Int8Weight, read, args), **pytree.tree_map_only(Int8Weight, read, kwargs))


torch.serialization.add_safe_globals([Int8Weight])


def _proxy(w: Int8Weight) -> Tensor:
    """A tensor of the weight's shape, dtype and device with one element of memory."""
    return torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape)


def _moved(w: Int8Weight, dtype: torch.dtype | None = None, device: torch.device | None = None,
           non_blocking: bool = False, **_: object) -> Int8Weight:  # fmt: skip
    return w._map(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)


def _copied(w: Int8Weight, x: Tensor) -> Int8Weight:
    if not isinstance(x, Int8Weight):
        x = x.to(w.device, torch.float32).expand(w.shape)
        kept = (x == w.dequantize().to(torch.float32)).all(1, keepdim=True)  # the scale may not be their range's
        new = Int8Weight.of(x, w.rng)
        x = Int8Weight(new.q.where(~kept, w.q), new.qt.where(~kept.t(), w.qt), new.scale.where(~kept, w.scale), w.rng)
    for name in _INNER:
        getattr(w, name).copy_(getattr(x, name))
    return w


def _refuse_writes(func, args: tuple, kwargs: dict) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if any(isinstance(t, Int8Weight) for t in pytree.tree_leaves(value)):
            raise TypeError(
                f"{func} would write to an Int8Weight, which takes copy_ and the steps of fqt.optim's optimizers: "
                "any other update would be rounded to the nearest code, where small steps are lost"
            )


# ---- models


@dataclass(frozen=True)
class HoldReport:
    """What `hold_int8_` did. held: names of the layers whose weight is an Int8Weight now. skipped: {name: reason} of the
    other linear layers, and of quantized convolutions. bytes_before, bytes_after: of the held weights; each weight that
    layers share is counted once."""

    held: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: held in int8" for name in self.held]
        lines += [f"{name or '(the model)'}: skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(
            [*lines, f"{len(self.held)} layers held: {self.bytes_before} bytes before, {self.bytes_after} now"]
        )


def hold_int8_(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> HoldReport:
    """Hold the weights of a model's "int8" layers as int8 codes without a float copy, in place.

    The weight of every `fqt.nn.Linear` whose recipe quantizes W to 8 bits per row, symmetrically, is rounded to the nearest
    codes and becomes an `Int8Weight` Parameter: 2 bytes an element (row-major and transposed) instead of 4 and, beside
    them, 2 of the layer's cache. Weights that several layers share stay shared.

    Convolutions keep their weights: held codes are those of matrices. Build optimizers, parameter hooks and distributed
    wrappers afterwards, on the new Parameters; data-parallel replicas stay equal if they hold equal weights when they are
    wrapped. Train them with the optimizers of `fqt.optim`, which round each step stochastically: the noise that this adds
    does not vanish as the learning rate falls, see `fqt.optim.int8`. The random bits are those of `fqt.manual_seed` as it
    is when this is called, and of the layer's name.

    Args:
        filter_fn: called with (module, qualified name); False leaves the layer as it is.

    Raises:
        TypeError: model is no module.   ValueError: no weight is held; the message says why of each layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hold_int8_ takes a torch.nn.Module, got {type(model).__name__}")
    from .layer import QuantizedLayer

    kinds = nn.Linear, QuantizedLayer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    users = _users(model)
    reasons = _reasons(layers, users, filter_fn)
    held, before, after = [], 0, 0
    for name in (name for name, reason in reasons.items() if reason is None):
        held.append(name)
        weight = layers[name].weight
        if not isinstance(weight, Int8Weight):
            before += weight.numel() * weight.element_size()
            new = _replace(users[id(weight)], _held(weight, layers[name]._fqt_key_name))
            after += sum(getattr(new, inner).nbytes for inner in _INNER)
    report = HoldReport(tuple(held), {name: r for name, r in reasons.items() if r is not None}, before, after)
    if not held:
        raise ValueError(f"no weight is held in int8; {report if reasons else 'the model has no linear layers'}")
    return report


def release_int8_(model: nn.Module) -> nn.Module:
    """Make every Int8Weight of a model an ordinary Parameter with the values q · scale, in place; returns the model.

    Build optimizers afterwards. Weights that several layers share stay shared.
    """
    for users in _users(model).values():
        module, name = users[0]
        if isinstance(module._parameters[name], Int8Weight):
            _replace(users, module._parameters[name].dequantize())
    return model


_Users = list[tuple[nn.Module, str]]


def _users(model: nn.Module) -> dict[int, _Users]:
    """The (module, name) of all uses of each Parameter, by its id."""
    users: dict[int, _Users] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
    return users


def _reasons(layers: dict[str, nn.Module], users: dict[int, _Users], filter_fn) -> dict[str, str | None]:
    """Why the weight of each layer cannot be held, None where it can: all who share it have to take the codes."""
    reasons = {name: _why_not(module, name, filter_fn) for name, module in layers.items()}
    able = {id(layers[name]) for name, reason in reasons.items() if reason is None}
    for name, module in layers.items():
        if reasons[name] is None:
            unable = [type(other).__name__ for other, _ in users[id(module.weight)] if id(other) not in able]
            reasons[name] = f"its weight is shared with a {unable[0]} that is not held" if unable else None
    return reasons


def _why_not(module: nn.Module, name: str, filter_fn) -> str | None:
    """The reason that lies in a layer itself."""
    from .nn import Linear

    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}: only matrices are held"
    if not isinstance(module, Linear):
        return "it is not quantized: fqt.quantize_ comes first"
    if module.recipe.w != HELD:
        return f"its recipe {module.recipe.name} has no symmetric 8-bit weights per row"
    if type(weight) not in (nn.Parameter, Int8Weight):
        return f"its weight is a {type(module.weight).__name__}, not a Parameter"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not float32 or bfloat16"
    if weight.is_meta:
        return "its weight is on the meta device"
    return "filter_fn returned False" if filter_fn is not None and not filter_fn(module, name) else None


def _held(weight: nn.Parameter, name: str) -> Int8Weight:
    return Int8Weight.of(weight.detach(), torch.tensor([layer_key(name), 0], device=weight.device))


def _replace(users: _Users, value: Tensor) -> nn.Parameter:
    """Put a value in the place of a Parameter wherever it is used."""
    old = users[0][0]._parameters[users[0][1]]
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.grad = old.grad
    for module, name in users:
        setattr(module, name, new)
    return new
