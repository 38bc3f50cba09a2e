"""Code run on the CPU as it were captured in a CUDA graph: `AsCaptured` finds what a capture forbids, or bakes in unseen.

On a CPU tensors of the host and of the device look alike. Here a tensor is the host's where it was made without naming a
device, or of numbers (torch.tensor), and what is computed of such tensors alone; all others are the device's.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("fqt", "kernels", "bench", "tests"))
# They wait for the device: for a value, or for the size of what they return.
WAITS = {
    _aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.nonzero_static, _aten.masked_select,
    _aten.unique_dim, _aten._unique2, _aten._unique, _aten.unique_consecutive, _aten.unique_dim_consecutive, _aten.bincount,
    _aten.argwhere,
}  # fmt: skip
# Elementwise, though not tagged so: they take a number of the host's as it is.
ELEMENTWISE = {_aten.__and__, _aten.__or__, _aten.__xor__, _aten.__lshift__, _aten.__rshift__}
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros")
# Lines that only a CPU reaches: (file, function) and why.
ONLY_ON_A_CPU = {("foreach.py", "_position_scales"): "exists.is_cuda or …"}


def modules() -> list[ModuleType]:
    """The modules of fqt that ask whether a graph is captured."""
    ours = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in ("fqt", "fqt_kernels")]
    return [m for m in ours if "is_capturing" in vars(m)]


class Forbidden(AssertionError):
    """What a capture would not have allowed, one line each: the place, the operator, the reason."""


class AsCaptured(TorchDispatchMode):
    """Within, everything of fqt believes that a CUDA graph is captured; on leaving, `Forbidden` names what was wrong.

    Watched: the operators of torch, those inside of fqt's own as well, and the methods that copy between host and device.
    Not what Triton's interpreter does with the arguments of a launch, which a GPU's driver takes as they are.

    faults: what was found so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self._host: dict[int, StorageWeakRef] = {}
        self._launching = False

    # ---- whose a tensor is

    def is_host(self, t: Tensor) -> bool:
        if not torch._C._has_storage(t):
            return False
        known = self._host.get(t.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def know_host(self, t: Tensor) -> Tensor:
        """It is the host's."""
        storage = t.untyped_storage()
        self._host[storage._cdata] = StorageWeakRef(storage)
        return t

    def _fault(self, what: str, reason: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS) and f.filename != __file__]
        at = frames[-1]
        if (Path(at.filename).name, at.name) not in ONLY_ON_A_CPU:
            self.faults.append(f"{Path(at.filename).relative_to(ROOT)}:{at.lineno} ({at.name}): {what}: {reason}")

    # ---- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        if func.namespace == "fqt":  # below this mode: its implementation is entered with the mode on
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # below autograd operators come whole that it would have taken apart
                return func.decompose(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        host = [t for t in tensors if self.is_host(t)]
        if len(host) < len(tensors):
            self._judge(func, args, kwargs, host)
        out = func(*args, **kwargs)
        if tensors and len(host) == len(tensors):
            for t in pytree.tree_leaves(out):
                if isinstance(t, Tensor) and torch._C._has_storage(t):
                    self.know_host(t)
        return out

    def _judge(self, func, args: tuple, kwargs: dict, host: list[Tensor]) -> None:
        """An operator of which at least one operand is the device's."""
        packet = func.overloadpacket
        if packet in WAITS or func is _aten.repeat_interleave.Tensor:
            self._fault(str(func), "the host waits for the device")
        elif packet in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self._fault(str(func), "the size of what a mask selects is asked of the device")
        if packet is _aten.copy_:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if host and blocking:
                self._fault(str(func), "copies between host and device and waits")
        elif any(t.dim() for t in host):
            self._fault(str(func), "an operand is the host's")
        elif host and torch.Tag.pointwise not in func.tags and packet not in ELEMENTWISE:
            self._fault(str(func), "a number of the host's is copied to the device")

    # ---- functions and methods that move data, which on a CPU do nothing

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        from triton.runtime.interpreter import GridExecutor

        from fqt import ranges

        for name in ("tensor", "as_tensor", "from_numpy", "frombuffer"):
            yield mock.patch.object(torch, name, self._factory(name, getattr(torch, name)))
        for name in FACTORIES:
            yield mock.patch.object(torch, name, self._allocator(getattr(torch, name)))
        for name in ("__getitem__", "__setitem__"):
            yield mock.patch.object(Tensor, name, self._indexer(getattr(Tensor, name)))
        for name in ("cpu", "numpy", "tolist"):
            yield mock.patch.object(Tensor, name, self._reader(name, getattr(Tensor, name)))
        yield mock.patch.object(Tensor, "to", self._mover(Tensor.to))
        yield mock.patch.object(Tensor, "new_tensor", self._maker(Tensor.new_tensor))
        yield mock.patch.object(GridExecutor, "__call__", self._launcher(GridExecutor.__call__))
        # The hand-over keeps away from modes, of which this one is not the program's.
        yield mock.patch.object(ranges, "_get_current_dispatch_mode", lambda: None)
        for module in modules():
            yield mock.patch.object(module, "is_capturing", lambda device=None: True)

    def _factory(self, name: str, make):
        def made(data, *args, device=None, **kwargs):
            more = kwargs if device is None else {**kwargs, "device": device}
            on_device = isinstance(data, Tensor) and not self.is_host(data)
            if self._launching or on_device:
                return make(data, *args, **more)
            if device is not None:
                self._fault(f"torch.{name}", "numbers of the host's are copied to the device")
                return make(data, *args, **more)
            return self.know_host(make(data, *args, **more))

        return made

    def _allocator(self, make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out if kwargs.get("device") is not None or self._launching else self.know_host(out)

        return made

    def _indexer(self, take):
        def taken(t, index, *value):
            if not self._launching and not self.is_host(t):
                if any(isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,))):
                    self._fault("an index", "numbers of the host's are copied to the device")
            return take(t, index, *value)

        return taken

    def _reader(self, name: str, read):
        def reading(t, *args, **kwargs):
            if not self._launching and not self.is_host(t):
                self._fault(f"Tensor.{name}", "the host waits for the device")
            return read(t, *args, **kwargs)

        return reading

    def _mover(self, to):
        def moving(t, *args, **kwargs):
            out = to(t, *args, **kwargs)
            target = kwargs.get("device", kwargs.get("other", args[0] if args else None))
            names_device = isinstance(target, (str, torch.device))
            names_device |= isinstance(target, Tensor) and not self.is_host(target)
            if self._launching or not names_device or not self.is_host(t):
                return out
            self._fault("Tensor.to", "copies from the host to the device and waits")
            return out.clone() if out is t else out

        return moving

    def _maker(self, make):
        def made(t, *args, **kwargs):
            if not self._launching and not self.is_host(t):
                self._fault("Tensor.new_tensor", "numbers of the host's are copied to the device")
            return make(t, *args, **kwargs)

        return made

    def _launcher(self, launch):
        def launching(grid, *args, **kwargs):
            for t in (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)):
                if self.is_host(t):
                    self._fault(f"launch of {grid.fn.__name__}", "an operand is the host's")
            self._launching = True
            try:
                return launch(grid, *args, **kwargs)
            finally:
                self._launching = False

        return launching

    def __enter__(self):
        if not getattr(self, "_stack", None):
            self._stack, self._depth = contextlib.ExitStack(), 0
            for patch in self._patches():
                self._stack.enter_context(patch)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()
            self._stack = None
            if kind is None and self.faults:
                raise Forbidden("\n".join(dict.fromkeys(self.faults)))
