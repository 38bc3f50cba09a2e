"""Count what one training step of a layer does, or one of an optimizer, on CPU tensors with the kernels in Triton's
interpreter; JSON lines.

    TRITON_INTERPRET=1 python -m fqt_bench.steps [--recipes RECIPE ...] [--optimizers OPTIMIZER ...] [--only PATTERN]

Of "step RECIPE linear": launches of kernels, the bytes that their loads and stores touch (lanes that the mask leaves out
touch none; an atomic both loads and stores), torch operators that a GPU would launch something for, and the bytes of
tensors: the highest sum of those the step made, and what waits between forward and backward besides the output. Of "step
RECIPE linear KERNEL": the share of that kernel. "step OPTIMIZER" is the second step over the weight of a linear layer, whose
codes for the next forward pass it writes, the weight of a convolution and their biases, and has the same but for what is
saved. Nothing of it depends on the machine or the time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPTIMIZERS = {
    "psgd": ("PSGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    "psgd adamw": ("PSGDAdamW", {"lr": 0.1}),
}
IMAGES = (24, 16, 3, 3)  # the weight of a convolution
M, K, N = 96, 144, 80  # several tiles of each kernel in the interpreter's configurations, the last of them not full
# They neither launch anything nor are marked as views.
_FREE = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
         "lift_fresh", "set_", "resize_"}  # fmt: skip
# Of the interpreter's functions those that are watched, and those that come to memory by one of them, or do not at all.
_WATCHED = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
_BY_OTHERS = {f"create_{name}" for name in (
    "load", "store", "tensor_pointer_load", "tensor_pointer_store", "descriptor_load", "descriptor_store",
    "descriptor_gather", "descriptor_scatter", "gather",
)}  # fmt: skip
_ACCESS = re.compile(r"create_\w*(load|store|atomic|gather|scatter|reduce|copy)\w*")


class Unknown(Exception):
    """The tree knows no such recipe or optimizer."""


class Step(TorchDispatchMode):
    """Counts while it is entered: .kernels (launches), .loaded, .stored (bytes) by kernel, .operators, .live, .peak."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._kernel: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._kernel is not None:  # what the interpreter itself does with the arguments
            return func(*args, **kwargs)
        if func.namespace == "fqt":  # below this mode: its implementation is entered with the mode on
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in _FREE:
            self.operators[str(func)] += 1
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._keep(t.untyped_storage())
        return out

    def know(self, *tensors: torch.Tensor) -> None:
        """These were there before the step: what an operator returns of them is not new."""
        for t in tensors:
            storage = t.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    @contextmanager
    def interpreting(self) -> Iterator[None]:
        """Watch Triton's interpreter.

        Raises:
            RuntimeError: this version of it lacks a function that is watched, or the environment does not ask for it; when a
                kernel uses a function of it that comes to memory in a way that is not known.
        """
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        missing = [name for name in _WATCHED if not hasattr(builder, name)]
        if missing or os.environ.get("TRITON_INTERPRET") != "1":
            what = f"its interpreter has no {', '.join(missing)}" if missing else "TRITON_INTERPRET=1 is not set"
            raise RuntimeError(f"bytes cannot be counted with this Triton: {what}")
        run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

        def launch(grid, *args, **kwargs):
            self._kernel = grid.fn.__name__
            self.kernels[self._kernel] += 1
            try:
                return run(grid, *args, **kwargs)
            finally:
                gc.collect()  # the interpreter leaves the arguments in cycles
                self._kernel = None

        def touched(ptrs, mask=None) -> int:
            lanes = ptrs.data.size if mask is None else int(mask.data.sum()) * (ptrs.data.size // mask.data.size)
            return lanes * max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)

        def masked_load(self_, ptrs, mask, *rest, **more):
            self.loaded[self._kernel] += touched(ptrs, mask)
            return load(self_, ptrs, mask, *rest, **more)

        def masked_store(self_, ptrs, value, mask, *rest, **more):
            self.stored[self._kernel] += touched(ptrs, mask)
            return store(self_, ptrs, value, mask, *rest, **more)

        def atomic_rmw(self_, op, ptr, val, mask, *rest, **more):
            self.loaded[self._kernel] += touched(ptr, mask)
            self.stored[self._kernel] += touched(ptr, mask)
            return rmw(self_, op, ptr, val, mask, *rest, **more)

        def atomic_cas(self_, ptr, *rest, **more):
            self.loaded[self._kernel] += touched(ptr)
            self.stored[self._kernel] += touched(ptr)
            return cas(self_, ptr, *rest, **more)

        hooks = dict(create_masked_load=masked_load, create_masked_store=masked_store, create_atomic_rmw=atomic_rmw,
                     create_atomic_cas=atomic_cas)  # fmt: skip
        others = {name for name in vars(builder) if _ACCESS.fullmatch(name)} - _BY_OTHERS - set(hooks)
        hooks |= {name: _refused(name) for name in others}
        with mock.patch.object(executor, "__call__", launch), mock.patch.multiple(builder, **hooks):
            yield


def _refused(name: str) -> Callable:
    def refuse(*args, **kwargs):
        raise RuntimeError(f"bytes cannot be counted with this Triton: {name} of its interpreter is not watched")

    return refuse


def count(recipe: str, m: int = M, k: int = K, n: int = N) -> dict[str, dict[str, int]]:
    """The counters of a step with a batch of m and a layer (k → n) of the recipe, float32, by name.

    Raises:
        Unknown: the tree knows no such recipe.   RuntimeError: see `Step.interpreting`.
    """
    import fqt
    import fqt.nn

    torch.manual_seed(0)
    fqt.manual_seed(0)
    with fqt.backend("triton"):
        try:
            small = fqt.nn.Linear(8, 8, recipe=recipe)
        except ValueError as e:
            raise Unknown(str(e)) from e
        _run(small, torch.ones(8, 8, requires_grad=True), torch.ones(8, 8))  # what is lazy
        layer = fqt.nn.Linear(k, n, recipe=recipe)
        x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
        step = Step()
        step.know(x, dy, *layer.parameters(), *layer.buffers())
        with step.interpreting(), step:
            saved = _run(layer, x, dy, step)
    return _counters(step, f"step {recipe} linear", saved_bytes=saved)


def count_optimizer(name: str) -> dict[str, dict[str, int]]:
    """The counters of a step of one of `OPTIMIZERS` on float32 parameters that have their state, by name.

    Raises:
        Unknown: the tree has no such optimizer.   RuntimeError: see `Step.interpreting`.
    """
    import fqt
    import fqt.nn

    kind, options = OPTIMIZERS[name]
    try:
        import fqt.optim

        make = getattr(fqt.optim, kind)
    except (ImportError, AttributeError) as e:
        raise Unknown(str(e)) from e
    torch.manual_seed(0)
    with fqt.backend("triton"):
        layer, convolution = fqt.nn.Linear(K, N), torch.nn.Conv2d(IMAGES[1], IMAGES[0], IMAGES[2])
        params = [*layer.parameters(), *convolution.parameters()]
        weights, biases = params[::2], params[1::2]
        optimizer = make([{"params": weights}, {"params": biases, "target": None}], **options, fused=True)
        for p in params:
            p.grad = torch.randn_like(p)
        for _ in range(2):  # what is lazy, and then what finds its state
            optimizer.step()
            layer._quantized_weight(transposed=True)
        step = Step()
        step.know(*params, *(p.grad for p in params))
        step.know(*(t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)))
        with step.interpreting(), step:
            optimizer.step()
            layer._quantized_weight(transposed=True)
    return _counters(step, f"step {name}")


def _counters(step: Step, title: str, **more: int) -> dict[str, dict[str, int]]:
    """By the title the sums, and the share of each kernel."""
    if not step.kernels:
        raise RuntimeError(f"{title} launched no kernel")
    totals = {"launches": step.kernels.total(), "bytes_loaded": step.loaded.total(), "bytes_stored": step.stored.total(),
              "torch_operators": step.operators.total(), "peak_bytes": step.peak, **more}  # fmt: skip
    shares = {
        f"{title} {kernel}": {"launches": step.kernels[kernel], "bytes_loaded": step.loaded[kernel],
                              "bytes_stored": step.stored[kernel]}
        for kernel in sorted(step.kernels)
    }  # fmt: skip
    return {title: totals, **shares}


def _run(layer, x: torch.Tensor, dy: torch.Tensor, step: Step | None = None) -> int:
    """Forward and backward. Returns the bytes that step has seen made and not freed when forward is done, but y's."""
    y = layer(x)
    saved = step.live - y.untyped_storage().nbytes() if step else 0
    y.backward(dy)
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--recipes", nargs="*", default=[], metavar="RECIPE")
    parser.add_argument("--optimizers", nargs="*", default=[], metavar="OPTIMIZER", choices=OPTIMIZERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()  # what is freed when must not depend on what else there is
    gc.freeze()
    todo = [(f"step {recipe} linear", functools.partial(count, recipe)) for recipe in args.recipes]
    todo += [(f"step {name}", functools.partial(count_optimizer, name)) for name in args.optimizers]
    for title, counted in todo:
        try:
            found = counted()
        except Unknown as e:
            found = {title: {"unknown": str(e)[:500]}}
        except Exception as e:  # whatever a kernel runs into: the other steps still have counters
            found = {title: {"error": f"{type(e).__name__}: {e}"[:500]}}
        for name, counters in found.items():
            if fnmatchcase(name, args.only):
                print(json.dumps({name: counters}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
