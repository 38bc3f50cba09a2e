"""Launch every Triton kernel several times on the same memory, and compare every byte: `fqt doctor --repeat`.

    with recording(100) as seen:
        run()
    seen.faults  # of the launches whose bytes were not always the same

A launch within the context is repeated where it is made: the memory that it can reach is copied before and after it; then,
100 times, put back as it was before, the kernel launched with the same arguments, and every byte compared with that after
the first launch. Afterwards the memory is as the first launch left it, and no version counter of a tensor has moved.

A launch can reach the whole storages of its tensors, also of those in tuples and in tensor descriptors; and, where a value
in a tensor of int64 is an address, as in the tables of `fqt_kernels.psgd`, the storage there of any tensor alive.

On a GPU every second repetition meets other conditions than the first launch, so that its programs run in another order:
a cold L2, and another stream that passes over 128 MiB and takes a part of the processors meanwhile. Triton's interpreter
runs one program after the other: there, repeating shows only what follows from memory that the launch does not show.

Every kernel of fqt_kernels is held to equal bits: their atomics add and compare integers alone, whose order leaves no trace,
and sums of floats have a fixed order.

Not repeated, but counted with the reason: a launch in the capture of a CUDA graph, which runs later; one that reaches more
memory than the limit, or memory of several devices, or none at all.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**28  # bytes that a launch may reach; five times as many are needed beside them
LOAD_BYTES = 2**27  # larger than the L2 of most GPUs
_ADDRESSES = 2**20, 2**48  # of user space: smaller values are sizes and indices, larger ones seeds


@dataclass
class Memory:
    """A storage that a launch can reach. bytes: all of it, (B,) uint8; start: where the first argument in it begins."""

    names: list[str]
    bytes: Tensor
    start: int


@dataclass
class Recording:
    """What became of the launches.

    faults: of each launch that differed, which bytes and in how many repetitions. skipped: launches by the reason why they
    were not repeated. kernels: launches by the kernel's name.
    """

    repetitions: int
    limit: int = LIMIT
    repeated: int = 0
    faults: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    _loads: dict[torch.device, _Load] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def launch(self, kernel: str, launch: Callable[[], Any], arguments: Iterable[tuple[str, Any]]) -> Any:
        """Launch, repeat and compare; what the first launch returns or raises."""
        self.kernels[kernel] += 1
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self._skip("in the capture of a CUDA graph", launch)
        memory = reachable(arguments)
        size, devices = sum(m.bytes.numel() for m in memory), {m.bytes.device for m in memory}
        if not memory:
            return self._skip("of tensors without memory", launch)
        if size > self.limit:
            return self._skip(f"too large: over {self.limit / 2**20:g} MiB", launch)
        if len(devices) > 1:
            return self._skip("with memory of several devices", launch)
        result, fault = _replay(launch, memory, self.repetitions, self._load(devices.pop()))
        self.repeated += 1
        if fault:
            self.faults.append(f"{kernel} differs from its first launch {fault}")
        return result

    def _skip(self, reason: str, launch: Callable[[], Any]) -> Any:
        self.skipped[reason] += 1
        return launch()

    def _load(self, device: torch.device) -> Callable[[int], contextlib.AbstractContextManager]:
        if device.type != "cuda":
            return lambda _: contextlib.nullcontext()
        if device not in self._loads:
            self._loads[device] = _Load(device)
        return lambda i: self._loads[device] if i % 2 else contextlib.nullcontext()


@contextlib.contextmanager
def recording(repetitions: int, limit: int = LIMIT) -> Iterator[Recording]:
    """Repeat every launch within the context so often. limit: bytes that a launch may reach, else it is not repeated."""
    import triton
    from triton.runtime.jit import JITFunction

    kinds = [JITFunction]  # Gluon's is one too
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import InterpretedFunction

        kinds.append(InterpretedFunction)
    seen, runs = Recording(repetitions, limit), [kind.run for kind in kinds]
    for kind, run in zip(kinds, runs, strict=True):
        kind.run = _recorded(run, seen)
    try:
        yield seen
    finally:
        for kind, run in zip(kinds, runs, strict=True):
            kind.run = run


def _recorded(run: Callable[..., Any], seen: Recording) -> Callable[..., Any]:
    def recorded(kernel, /, *args, grid, warmup, **kwargs):  # an argument of the launch may be called `kernel` too
        launch = lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs)  # noqa: E731
        if warmup:
            return launch()
        parameters = list(inspect.signature(kernel.fn).parameters)
        return seen.launch(kernel.__name__, launch, [*zip(parameters, args, strict=False), *kwargs.items()])

    return recorded


# ---- the memory of a launch


def reachable(arguments: Iterable[tuple[str, Any]]) -> list[Memory]:
    """The storages that a launch with these arguments, (name, value), can reach, each once; waits for a GPU if one of them
    is of int64."""
    found: dict[tuple[torch.device, int], Memory] = {}
    tensors = list(_tensors(arguments))
    for name, t in tensors:
        _add(found, name, t.untyped_storage(), t.data_ptr())
    live: dict[torch.device, _Live] = {}
    for name, table in tensors:
        if table.dtype != torch.int64:
            continue
        may = (table >= _ADDRESSES[0]) & (table < _ADDRESSES[1])
        for place, value in zip(may.nonzero().tolist(), table[may].tolist(), strict=True):
            if table.device not in live:
                live[table.device] = _Live(table.device)
            if storage := live[table.device].at(value):
                _add(found, f"what {name}{place} points at", storage, value)
    return list(found.values())


def _tensors(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _tensors((f"{name}[{i}]", item) for i, item in enumerate(value))
        elif isinstance(base := getattr(value, "base", None), Tensor):  # a tensor descriptor
            yield name, base


def _add(found: dict[tuple[torch.device, int], Memory], name: str, storage: torch.UntypedStorage, address: int) -> None:
    key = storage.device, storage.data_ptr()
    if key in found:
        found[key].names.append(name)
    elif storage.nbytes():
        view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        found[key] = Memory([name], view, address - storage.data_ptr())


class _Live:
    """The storages of all tensors of a device that the garbage collector knows, by their addresses."""

    def __init__(self, device: torch.device) -> None:
        storages = {}
        for t in gc.get_objects():
            if not issubclass(type(t), Tensor):  # the class alone: isinstance would ask proxies what they stand for
                continue
            try:
                storage = t.untyped_storage()
                if storage.device == device and storage.nbytes():
                    storages[storage.data_ptr()] = storage
            except RuntimeError:  # fake, sparse or a wrapper: none of its own
                continue
        self._starts = sorted(storages)
        self._storages = storages

    def at(self, address: int) -> torch.UntypedStorage | None:
        i = bisect.bisect_right(self._starts, address) - 1
        storage = self._storages[self._starts[i]] if i >= 0 else None
        return storage if storage is not None and address < self._starts[i] + storage.nbytes() else None


# ---- repeating a launch


def _replay(launch: Callable[[], Any], memory: list[Memory], repetitions: int,
            load: Callable[[int], contextlib.AbstractContextManager]) -> tuple[Any, str]:  # fmt: skip
    """What the first launch returned, and how others differed from it, "" if none did. Waits for a GPU once, at the end."""
    parts = [m.bytes for m in memory]
    before = [part.clone() for part in parts]
    result = launch()
    after = torch.cat(parts)
    now, differs = torch.empty_like(after), torch.empty_like(after, dtype=torch.bool)
    ever = torch.zeros_like(differs)
    hits = torch.zeros(repetitions, dtype=torch.bool, device=after.device)
    try:
        for i in range(repetitions):
            _put(parts, before)
            with load(i):
                launch()
            torch.cat(parts, out=now)
            torch.ne(now, after, out=differs)
            ever |= differs
            torch.any(differs, 0, out=hits[i])
    finally:
        _put(parts, after.split([len(part) for part in parts]))
    times = int(hits.sum())
    return result, f"in {times} of {repetitions} repetitions: {_places(memory, ever)}" if times else ""


def _put(parts: Iterable[Tensor], contents: Iterable[Tensor]) -> None:
    for part, content in zip(parts, contents, strict=True):
        part.copy_(content)


def _places(memory: list[Memory], ever: Tensor) -> str:
    """Of each storage with a byte that differed: how many did, and where, from the first argument's beginning, the first."""
    places = []
    for m, part in zip(memory, ever.split([len(m.bytes) for m in memory]), strict=True):
        if count := int(part.sum()):
            first = int(part.int().argmax()) - m.start
            places.append(f"{', '.join(m.names)} in {count} of {len(part)} bytes, the first at byte {first}")
    return "; ".join(places)


class _Load:
    """While it is entered, another stream passes over memory; before, the L2 is filled with other memory. That pass also
    gives the host the time to launch, so that the other stream and the launch begin together."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._before, self._beside = (
            torch.zeros(LOAD_BYTES // 4, dtype=torch.int32, device=device) for _ in ("before", "beside")
        )

    def __enter__(self) -> None:
        self._before.add_(1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._beside.add_(1)

    def __exit__(self, *_: object) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
