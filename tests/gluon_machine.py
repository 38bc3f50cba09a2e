"""The machine of `gluon.py`: shared memory, barriers, what is in flight, and the partitions' turns."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gluon_values import Descriptor, DType, Fault, Tensor

POISON = 77  # in shared memory that nothing has landed in yet
LIMIT_S = 120.0  # for a program to come to its end


class _Ended(BaseException):
    """Raised in the partitions of a launch that has failed."""


class Memory:
    """An allocation of shared memory, or a view of one."""

    def __init__(
        self, data: torch.Tensor, dtype: DType, marks: tuple[torch.Tensor, ...], barriers: dict, layout: Any
    ) -> None:
        self.data, self.dtype, self.marks, self.barriers, self.layout = data, dtype, marks, barriers, layout
        self.reading, self.writing, self.unfenced, self.owner = marks

    @staticmethod
    def allocate(dtype: DType, shape: list[int], layout: Any) -> Memory:
        marks = tuple(torch.zeros(shape, dtype=torch.int8) for _ in range(4))
        return Memory(torch.full(shape, POISON, dtype=dtype.torch), dtype, marks, {}, layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def _view(self, of: Callable[[torch.Tensor], torch.Tensor]) -> Memory:
        return Memory(of(self.data), self.dtype, tuple(of(mark) for mark in self.marks), self.barriers, self.layout)

    def index(self, i: int) -> Memory:
        if not 0 <= i < self.shape[0]:
            raise Fault(f"index {i} of shared memory {self.shape}")
        return self._view(lambda t: t[i])

    def slice(self, start: int, length: int) -> Memory:
        if not 0 <= start <= start + length <= self.shape[0]:
            raise Fault(f"rows {start} to {start + length} of shared memory {self.shape}")
        return self._view(lambda t: t[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return self._view(lambda t: t.permute(order))

    def store(self, x: Tensor) -> None:
        machine = Machine.current
        self._own("stored to")
        if self.reading.any() or self.writing.any():
            raise Fault("shared memory is stored to while a copy or a product still uses it")
        if x.shape != self.shape or x.value.dtype != self.dtype.torch:
            raise Fault(f"{x.value.dtype} {x.shape} is stored to shared memory of {self.dtype.torch} {self.shape}")
        self.data.copy_(x.value)
        self.unfenced.fill_(machine.partition.number + 1)
        self.owner.fill_(machine.partition.number + 1)

    def load(self, layout: Any) -> Tensor:
        self._own("loaded from")
        if self.writing.any():
            raise Fault("shared memory is loaded from before a copy has landed")
        return Tensor(self.data.clone(), layout)

    def _own(self, what: str) -> None:
        me = Machine.current.partition.number + 1
        if ((self.owner != 0) & (self.owner != me)).any():
            raise Fault(f"shared memory of another partition is {what}")

    def begin_read(self, what: str) -> None:
        if self.writing.any():
            raise Fault(f"{what} reads shared memory before a copy has landed")
        if self.unfenced.any():
            raise Fault(f"{what} reads what threads have stored, with no fence between")
        self.reading.add_(1)

    def begin_write(self) -> None:
        if self.reading.any() or self.writing.any():
            raise Fault("a copy is loaded over shared memory that is still read or loaded")
        self.writing.add_(1)
        self.data.fill_(POISON)


@dataclass
class Barrier:
    count: int
    pending: int
    bytes: int = 0
    completed: int = 0
    seen: int = 0  # phases that somebody has waited for
    loaded: bool = False

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("a barrier is arrived at more often than its phase allows")
        if self.pending == 0 and self.bytes == 0:
            self.completed, self.pending = self.completed + 1, self.count


@dataclass(repr=False)
class InFlight:
    """An accumulator that wgmma is to write. before: a Tensor, or the one in flight before it."""

    before: Any
    a: Memory
    b: Memory
    use_acc: bool
    value: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.before.shape

    @property
    def layout(self) -> Any:
        return self.before.layout

    def __getattr__(self, name: str):
        raise Fault(f"an accumulator is used, .{name}, while its product is in flight")

    def execute(self) -> None:
        before = self.before.value
        product = self.a.data.double() @ self.b.data.double()  # exact: below 2⁵³
        total = product.to(torch.int64) + (before.to(torch.int64) if self.use_acc else 0)
        self.value = ((total + 2**31) % 2**32 - 2**31).to(torch.int32)  # wgmma wraps
        for operand in (self.a, self.b):
            operand.reading.sub_(1)


@dataclass
class Copy:
    """A store by TMA."""

    source: Memory
    descriptor: Descriptor
    at: list[int]
    done: bool = False

    def execute(self) -> None:
        (row, column), (rows, columns) = self.at, self.source.shape
        c, stored = self.descriptor.base, self.descriptor.stored
        here = c[row : row + rows, column : column + columns]  # beyond the end TMA stores nothing
        here.copy_(self.source.data[: here.shape[0], : here.shape[1]])
        stored[row : row + rows, column : column + columns] += 1
        self.source.reading.sub_(1)
        self.done = True


@dataclass
class Partition:
    number: int
    warps: int
    run: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    turn: threading.Event = field(default_factory=threading.Event)
    products: list[InFlight] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    done: bool = False


# Kinds of events, of which a machine holds one back as long as anything else may happen: none, or what a partition does,
# or what it has in flight.
LAZY = (None, ("loads", 0), *((kind, i) for kind in ("products", "stores", "partition") for i in range(3)))
PATIENCE = 0.98  # the probability that it does


class Machine:
    """One program of a launch. lazy: an index of LAZY."""

    current: Machine

    def __init__(self, program: int, programs: int, warps: int, rng: random.Random, lazy: int = 0) -> None:
        self.program, self.programs, self.rng, self.lazy = program, programs, rng, LAZY[lazy % len(LAZY)]
        self.main = self.partition = Partition(0, warps, lambda: None)
        self.loads: list[Callable[[], None]] = []
        self.memories: list[Memory] = []
        self.partitions: list[Partition] = []
        self._finished = threading.Event()
        self._ending, self._error = False, None
        Machine.current = self

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let anything else that may happen happen, at least until `ready`."""
        me = self.partition
        if me is self.main:
            if not ready():
                raise Fault("the program waits before it has partitions")
            return
        me.ready = ready
        if not self._go_on(me):
            me.turn.wait()
            me.turn.clear()
        if self._ending:
            raise _Ended

    def specialize(self, functions: list[tuple], warps: list[int]) -> None:
        everyone = [self.main.warps, *warps]
        self.partitions = [Partition(i, everyone[i], lambda f=f, a=a: f(*a)) for i, (f, a) in enumerate(functions)]
        threads = [threading.Thread(target=self._run, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        self._go_on(None)
        ended = self._finished.wait(LIMIT_S)
        self._ending = True
        for partition in self.partitions:
            partition.turn.set()
        for thread in threads:
            thread.join(LIMIT_S)
        self.partition = self.main
        if self._error is not None or not ended:
            raise self._error or Fault(f"the program does not come to an end within {LIMIT_S:.0f} s")
        barriers = (barrier for memory in self.memories for barrier in memory.barriers.values())
        if any(barrier.loaded and barrier.seen < barrier.completed for barrier in barriers):
            raise Fault("the program ends with loads that nobody has waited for")

    def _run(self, partition: Partition) -> None:
        partition.turn.wait()
        partition.turn.clear()
        try:
            if self._ending:
                return
            partition.run()
            if partition.products or not all(copy.done for copy in partition.copies):
                raise Fault(f"partition {partition.number} ends with products or copies in flight")
            partition.done = True
            self._go_on(partition)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
            self._finished.set()

    def _go_on(self, me: Partition | None) -> bool:
        """Whoever has the turn lets events happen, until it is a partition's turn: true if it is its own."""
        while moves := list(self._moves(self.partitions)):
            eager = [move for kind, move in moves if kind != self.lazy]
            patient = eager and self.rng.random() < PATIENCE
            move = self.rng.choice(eager if patient else [move for _, move in moves])
            if isinstance(move, Partition):
                move.ready = lambda: True
                if move is me:
                    return True
                self.partition = move
                move.turn.set()
                return False
            move()
        if waiting := [p.number for p in self.partitions if not p.done]:
            raise Fault(f"partitions {waiting} wait forever")
        self._finished.set()
        return False

    def _moves(self, partitions: list[Partition]) -> Iterator[tuple[tuple[str, int], Any]]:
        """What may happen next, by kind: a partition's turn, or something to call."""
        yield from ((("partition", p.number), p) for p in partitions if not p.done and p.ready())
        yield from ((("loads", 0), self._landing(i)) for i in range(len(self.loads)))
        for p in partitions:
            if p.products and p.products[0].value is None:
                yield ("products", p.number), p.products[0].execute
            yield from ((("stores", p.number), copy.execute) for copy in p.copies if not copy.done)

    def _landing(self, i: int) -> Callable[[], None]:
        return lambda: self.loads.pop(i)()
