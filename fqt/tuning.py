"""`fqt.tuning`: the tuned table of each GPU, and tuning inside a step where it is asked for.

A GPU's table is what the package ships for its kind, then what `fqt tune` stored for this very machine. With
torch.distributed it is rank 0's on every rank that has the same GPU (`fqt.tuning.agreement` checks it).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import conv_problems, store, tuned
from .store import Machine
from .tuned import Entry, Key, Table

if TYPE_CHECKING:
    import torch

    from .dispatch import Problem

WAIT_S = 60.0  # how long a rank waits for rank 0's table, which rank 0 publishes when it first needs one


@dataclass(eq=False)
class _Active:
    """A machine's table while the process group is world(), None without one."""

    machine: Machine
    table: Table
    world: Callable[[], Any]


@dataclass(eq=False)
class Session(contextlib.AbstractContextManager):
    """Tuning is enabled until the budget is spent; leaving the context restores what was before."""

    budget_s: float
    before: Session | None
    spent_s: float = 0.0

    def __exit__(self, *_: object) -> None:
        global _session
        _session = self.before


_active: dict[int, _Active] = {}
_reading = threading.RLock()
_session: Session | None = None
_tuning = threading.Lock()
_failed: set[tuple[int, Key]] = set()
_generation = 0
_file: Path | None = None  # see `reading`


def table(device: torch.device) -> Table:
    """The active table of a device, the empty one for all but GPUs. Cheap after the first call in a process group."""
    index = _index(device)
    return tuned.EMPTY if index is None else _activated(index).table


def reload() -> None:
    """Read the tables again when they are next needed; problems whose tuning failed may be tried again.

    With torch.distributed every rank must call it, at the same point of its program.
    """
    global _generation
    with _reading:
        _active.clear()
        _failed.clear()
        _generation += 1


@contextlib.contextmanager
def reading(file: Path | None) -> Iterator[None]:
    """Within, a GPU's table is what the package ships, then what this file has in place of the machine's own, if one is
    given: for `fqt tune --file`, whose convolutions launch products of matrices by the table that they are tuned into."""
    global _file
    before, _file = _file, file
    reload()
    try:
        yield
    finally:
        _file = before
        reload()


def counts() -> dict[str, int]:
    """What this process met in files of tables, by reason, and "tuned" and "tuning failed"."""
    return store.counts()


def enable(budget_s: float = 60.0) -> Session:
    """From now on, or within `with fqt.tuning.enable():`, tune each new problem in the step that first meets it.

    Such a step takes seconds longer. What is found is used at once and stored. budget_s: for all problems together.

    Raises:
        ValueError: budget_s is not a positive number.
        RuntimeError: with several ranks, which would tune apart and disagree.
    """
    global _session
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"budget_s must be a positive number of seconds, got {budget_s!r}")
    if (size := _world_size()) > 1:
        raise RuntimeError(f"{size} ranks would tune apart and disagree: run `fqt tune` before the job instead")
    _session = Session(budget_s, _session)
    return _session


def disable() -> None:
    """No longer tune inside a step."""
    global _session
    _session = None


def enabled() -> bool:
    """Whether a new problem is tuned in the step that meets it: `enable` was called and its budget is not spent."""
    return _has_budget(_session)


def _has_budget(session: Session | None) -> bool:
    return session is not None and session.spent_s < session.budget_s


def tune_now(problem: Problem, device: torch.device) -> Entry | None:
    """Tune a problem where `enabled`, and add what is found to the device's table and to the store.

    None, and the table as it was: disabled, on no GPU, within another tuning, or failed. A failure is warned about with the
    problem and the reason, and the problem is not tried again. Not for a step that is captured or traced: that is not timed.
    """
    session, index = _session, _index(device)
    if index is None or not _has_budget(session) or (index, tuned.key(problem)) in _failed:
        return None
    if (size := _world_size()) > 1:
        disable()
        store.warn_once("tuning in ranks", f"tuning is disabled: {size} ranks would tune apart and disagree")
        return None
    if not _tuning.acquire(blocking=False):  # the tuner's own calls of operators, or another thread's
        return None
    start = time.monotonic()
    try:
        return _tune(problem, device, index)
    finally:
        session.spent_s += time.monotonic() - start
        _tuning.release()
        if not _has_budget(session):  # once in a session: it tunes no more
            warnings.warn(f"fqt: no more tuning: its {session.budget_s:g} s are spent", stacklevel=2)


def agreement(timeout_s: float = WAIT_S, *, strict: bool = False) -> dict[int, str | None]:
    """Of every rank the digest of the table it uses, None where it did not say so within timeout_s.

    Not a collective: any rank may call it, whenever. A rank speaks up when it first needs its table or calls this. Warns
    with the numbers of the ranks that differ from the first and of those that are silent.

    Raises:
        RuntimeError: strict, and there are such ranks.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    active = table(device)
    if _world_size() == 1:
        return {0: active.digest}
    from . import ranks

    digests = ranks.digests(active, timeout_s, _generation)
    silent = [rank for rank, digest in digests.items() if digest is None]
    first = next(rank for rank, digest in digests.items() if digest is not None)  # this rank spoke, if no other did
    differ = [rank for rank, digest in digests.items() if digest not in (None, digests[first])]
    problems = [f"ranks {differ} use other tuned tables than rank {first}"] * bool(differ)
    problems += [f"ranks {silent} did not say within {timeout_s:g} s which tuned table they use"] * bool(silent)
    if problems and strict:
        raise RuntimeError("; ".join(problems))
    for problem in problems:
        store.warn_once(problem, problem)
    return digests


def _tune(problem: Problem, device: torch.device, index: int) -> Entry | None:
    from . import tuner

    active = _activated(index)
    part = conv_problems.part(replace(problem, plain=True))  # with whose best kernel it is timed, see `tune_one`
    if part is not None and active.table.exact(part) is None and (index, tuned.key(part)) not in _failed:
        _tune(part, device, index)
    try:
        entry = tuner.tune_one(problem, device)
        store.save(active.machine, [entry])
    except Exception as e:  # whatever a kernel, a compiler or a driver throws: the step goes on without the tuning
        _failed.add((index, tuned.key(problem)))
        store.count("tuning failed")
        store.warn_once(
            f"failed {problem}", f"tuning failed, the heuristic is used: {type(e).__name__}: {e}: {problem}"
        )
        return None
    store.count("tuned")
    active.table = active.table.merged(Table([entry]))
    return entry


def _activated(index: int) -> _Active:
    world = _world()
    active = _active.get(index)
    if active is None or active.world() is not world:
        with _reading:
            active = _active.get(index)
            if active is None or active.world() is not world:
                active = _active[index] = _activate(index, world)
    return active


def _activate(index: int, world: Any) -> _Active:
    import torch

    machine = Machine.of(torch.device("cuda", index))
    for other in _active.values():
        if other.machine == machine and other.world() is world:
            return other
    found = store.shipped(machine).merged(store.load(machine, file=_file))
    if _world_size() > 1:
        from . import ranks

        found = ranks.agree(found, machine, WAIT_S, _generation)
    return _Active(machine, found, weakref.ref(world) if world is not None else lambda: None)


def _index(device: torch.device) -> int | None:
    """The number of a GPU, None of another device."""
    if device.type != "cuda":
        return None
    index = device.index
    if index is None:
        import torch

        index = torch.cuda.current_device()
    return index


@functools.cache
def _distributed() -> Any:
    """torch.distributed, None where torch is built without it."""
    import torch.distributed as dist

    return dist if dist.is_available() else None


def _world() -> Any:
    """The default process group, None without one."""
    dist = _distributed()
    return dist and dist.group.WORLD


def _world_size() -> int:
    dist = _distributed()
    return dist.get_world_size() if dist and dist.is_initialized() else 1
