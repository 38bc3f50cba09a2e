"""A machine that runs a Gluon kernel of warp-specialized partitions on the CPU: its very Python source, on torch tensors.

What runs asynchronously on the GPU does so here: TMA copies land, stores read and wgmma multiply at any moment that the
barriers allow, and partitions take turns at each of them, in an order drawn from a seed. Beside wrong results it finds, and
raises `Fault` for:

- shared memory that is written while a copy or a product still reads it, or read before what is copied to it has landed;
- shared memory that one partition writes and another uses, for which only barriers of memory copies are meant;
- a store by TMA, or a product, of what threads wrote with no fence of the asynchronous proxy since, and a copy that is to
  arrive on a barrier so initialized;
- a wait that never ends, and loads that nobody waits for;
- an accumulator that is used while its product is in flight; products or copies in flight at the end of a partition;
- an element of the output that is stored twice or not at all; loads and stores beyond the end of a tensor.

In every launch one kind of event is held back, another with another seed. Bytes are to be expected before they land, and
shared memory of threads belongs to one partition for good: that is stricter than the GPU. Integers have no end.

The warps of a partition go in step: barriers between them, layouts (but those of TMA) and registers are the compiler's
and are left to tests/codegen. Rounding is torch's; sums of int8 products are exact.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import torch
from gluon_machine import Barrier, Copy, InFlight, Machine, Memory
from gluon_values import Descriptor, DType, Fault, Pointer, Scalar, Tensor

from fqt_kernels._gluon import gl

__all__ = ["Fault", "emulate"]

COMPILER_BYTES = 512  # of shared memory, for the states of partitions: 312 were seen


def _with_barrier(view: Memory) -> Barrier:
    key = view.data.storage_offset()
    if key not in view.barriers:
        raise Fault("a barrier that was not initialized")
    return view.barriers[key]


class _MBarrier:
    """Gluon's mbarrier."""

    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(view: Memory, count: int) -> None:
        if view.data.storage_offset() in view.barriers:
            raise Fault("a barrier is initialized twice")
        view.barriers[view.data.storage_offset()] = Barrier(count, count)
        view.unfenced.fill_(Machine.current.partition.number + 1)

    @staticmethod
    def wait(view: Memory, parity: int) -> None:
        barrier = _with_barrier(view)
        Machine.current.pause(lambda: barrier.completed % 2 != parity)
        barrier.seen = barrier.completed

    @staticmethod
    def arrive(view: Memory, pred: bool = True) -> None:
        Machine.current.pause()
        if pred:
            barrier = _with_barrier(view)
            barrier.pending -= 1
            barrier.settle()

    @staticmethod
    def expect(view: Memory, size: int) -> None:
        Machine.current.pause()
        barrier = _with_barrier(view)
        barrier.bytes += size
        barrier.loaded = True
        barrier.pending -= 1
        barrier.settle()


def _same_layout(descriptor: Descriptor, memory: Memory) -> None:
    if descriptor.layout != memory.layout:
        raise Fault(f"TMA copies {descriptor.layout}, and shared memory is {memory.layout}")


def _tma_load(descriptor: Descriptor, at: list[int], view: Memory, target: Memory) -> None:
    machine, barrier = Machine.current, _with_barrier(view)
    machine.pause()
    _same_layout(descriptor, target)
    if view.unfenced.any():
        raise Fault("a copy is to arrive on a barrier that was initialized with no fence since")
    if list(target.shape) != descriptor.block_shape or min(at) < 0:
        raise Fault(f"a block of {descriptor.block_shape} at {at} is loaded to {target.shape}")
    target.begin_write()
    (row, column), (rows, columns) = at, target.shape

    def land() -> None:
        block = descriptor.base[row : row + rows, column : column + columns]
        target.data.zero_()
        target.data[: block.shape[0], : block.shape[1]] = block
        target.writing.sub_(1)
        barrier.bytes -= target.bytes
        if barrier.bytes < 0:
            raise Fault("more bytes land than a barrier expects")
        barrier.settle()

    machine.loads.append(land)


def _tma_store(descriptor: Descriptor, at: list[int], source: Memory) -> None:
    machine = Machine.current
    machine.pause()
    _same_layout(descriptor, source)
    if list(source.shape) != descriptor.block_shape or min(at) < 0:
        raise Fault(f"{source.shape} is stored as a block of {descriptor.block_shape} at {at}")
    source.begin_read("a store by TMA")
    machine.partition.copies.append(Copy(source, descriptor, [int(i) for i in at]))


def _tma_store_wait(pending: int) -> None:
    copies = Machine.current.partition.copies
    Machine.current.pause(lambda: all(copy.done for copy in copies[: max(0, len(copies) - pending)]))


def _fence() -> None:
    machine = Machine.current
    for memory in machine.memories:
        memory.unfenced[memory.unfenced == machine.partition.number + 1] = 0


def _warpgroup_mma(a: Memory, b: Memory, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> InFlight:
    machine = Machine.current
    machine.pause()
    if not is_async:
        raise Fault("a synchronous product")
    if (a.shape[0], b.shape[1]) != acc.shape or a.shape[1] != b.shape[0]:
        raise Fault(f"{a.shape} times {b.shape} is added to another shape")
    for operand in (a, b):
        operand.begin_read("a product")
    product = InFlight(acc, a, b, use_acc)
    machine.partition.products.append(product)
    return product


def _warpgroup_mma_wait(outstanding: int, deps: list) -> Any:
    machine = Machine.current
    products, (acc,) = machine.partition.products, deps
    while len(products) > outstanding:
        first = products[0]
        machine.pause(lambda first=first: first.value is not None)
        products.pop(0)
    if products and products[-1] is acc:
        return acc
    return Tensor(acc.value, acc.layout) if isinstance(acc, InFlight) else acc


def _load(pointer: Pointer, mask: Tensor | None = None, other: int = 0) -> Tensor:
    offsets, layout = pointer.at()
    count = pointer.elements.numel()
    wanted = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.value
    if (wanted & ((offsets < 0) | (offsets >= count))).any():
        raise Fault(f"a load beyond the {count} elements of a tensor")
    values = pointer.elements[offsets.clamp(0, count - 1)]
    return Tensor(torch.where(wanted, values, torch.full_like(values, other)), layout)


def _store(pointer: Pointer, x: Tensor, mask: Tensor) -> None:
    offsets, _ = pointer.at()
    wanted = mask.value.expand(offsets.shape)
    count = pointer.elements.numel()
    if (wanted & ((offsets < 0) | (offsets >= count))).any():
        raise Fault(f"a store beyond the {count} elements of a tensor")
    pointer.elements[offsets[wanted]] = x.value[wanted]
    pointer.stored.index_add_(0, offsets[wanted], torch.ones(int(wanted.sum()), dtype=torch.int16))


def _allocate(dtype: DType, shape: list[int], layout: Any) -> Memory:
    memory = Memory.allocate(dtype, list(shape), layout)
    Machine.current.memories.append(memory)
    return memory


def _static_layout(*args: Any, **fields: Any) -> types.SimpleNamespace:
    """Of NVMMADistributedLayout the instruction's shape is asked for."""
    return types.SimpleNamespace(instr_shape=args[-1])


LANGUAGE = types.SimpleNamespace(
    constexpr=None,
    **{name: DType(getattr(torch, name)) for name in ("int8", "int32", "int64", "float32", "bfloat16")},
    NVMMADistributedLayout=_static_layout,
    NVMMASharedLayout=gl.NVMMASharedLayout,
    SwizzledSharedLayout=_static_layout,
    BlockedLayout=_static_layout,
    SliceLayout=lambda dim, parent: types.SimpleNamespace(parent=parent),
    allocate_shared_memory=_allocate,
    cdiv=lambda a, b: Scalar(-(-a // b)),
    program_id=lambda axis: Scalar(Machine.current.program),
    num_programs=lambda axis: Scalar(Machine.current.programs),
    num_warps=lambda: Machine.current.partition.warps,
    arange=lambda start, stop, layout: Tensor(torch.arange(start, stop), layout),
    zeros=lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=dtype.torch), layout),
    expand_dims=lambda x, axis: Tensor(x.value.unsqueeze(axis), x.layout),
    convert_layout=lambda x, layout, assert_trivial: Tensor(x.value, layout),
    static_range=range,
    load=_load,
    store=_store,
    warp_specialize=lambda functions, warps, registers: Machine.current.specialize(functions, warps),
)


def emulate(module: types.ModuleType, kernel: str, seed: int) -> Callable:
    """What takes the place of a kernel of the module, launched as a jitted function is. `tl.minimum` is all that its
    functions use of Triton's language."""
    names = {
        **vars(module), "gl": LANGUAGE, "mbarrier": _MBarrier, "tma_load": _tma_load, "tma_store": _tma_store,
        "tma_store_wait": _tma_store_wait, "fence_async_shared": _fence, "warpgroup_mma": _warpgroup_mma,
        "warpgroup_mma_wait": _warpgroup_mma_wait, "tl": types.SimpleNamespace(minimum=min),
        "range": lambda *args: map(Scalar, range(*args)),
    }  # fmt: skip
    for name, value in vars(module).items():
        if isinstance(getattr(value, "fn", None), types.FunctionType):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return lambda *args, **options: run(names[kernel], grid[0], seed, args, options, module.SHARED_BYTES)

    return Launcher()


def run(function: Callable, programs: int, seed: int, args: tuple, options: dict[str, Any], shared: int) -> None:
    """All programs of a launch, one after the other in any order. C is the third of `args`, by descriptor or by pointer."""
    rng = random.Random(seed)
    warps = options.pop("num_warps")
    options.pop("enable_fp_fusion")
    arguments = [_argument(arg) for arg in args]
    c = arguments[2]
    size = c.base if isinstance(c, Descriptor) else c.elements
    stored = torch.zeros(size.shape, dtype=torch.int16)
    if isinstance(c, Descriptor):
        c.stored = stored
    else:
        arguments[2] = Pointer(c.elements, 0, stored)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each partition's thread would have a team of its own
    try:
        _run_programs(function, programs, seed, arguments, options, shared, warps, rng)
    finally:
        torch.set_num_threads(threads)
    if (stored != 1).any():
        raise Fault(f"{int((stored == 0).sum())} elements of C are not stored, {int((stored > 1).sum())} twice or more")


def _run_programs(function, programs, seed, arguments, options, shared, warps, rng) -> None:
    for program in rng.sample(range(programs), programs):
        machine = Machine(program, programs, warps, rng, seed + program)
        function(*arguments, **options)
        needed = sum(memory.bytes for memory in machine.memories)
        if needed > shared - COMPILER_BYTES:
            raise Fault(f"{needed} bytes of shared memory of {shared}, and the compiler needs some")


def _argument(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return Pointer(arg.view(-1))  # raises where it is not contiguous
    return Descriptor(arg) if hasattr(arg, "block_shape") else Scalar(arg) if isinstance(arg, int) else arg
