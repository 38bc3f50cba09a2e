"""Ranks of torch.distributed agree on rank 0's tuned table, through the process group's key-value store.

No collective: ranks call operators at different times, and a hidden collective among their own could deadlock. The table
travels as JSON and is validated like a file.
"""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from . import safefile, store, tuned
from .store import Machine
from .tuned import Table

MAX_BYTES = 4 * store.MAX_BYTES  # of a shipped table and a stored one

# By process group: what this process published, (generation, name).
_published: weakref.WeakKeyDictionary[Any, set[tuple[int, str]]] = weakref.WeakKeyDictionary()


def agree(own: Table, machine: Machine, timeout_s: float, generation: int = 0) -> Table:
    """Rank 0's table, or this rank's own where it has another GPU or rank 0 publishes none within timeout_s.

    Every rank publishes the digest of what it uses. Warns, naming this rank, where it is not all of rank 0's table.
    generation: tables of different ones are apart.
    """
    rank = dist.get_rank()
    try:
        values = _values(generation)
        if rank == 0:
            _publish(values, generation, "table", _message(own, machine))
            used = own
        else:
            used = _of_rank_0(values, own, machine, timeout_s)
        _publish(values, generation, f"digest/{rank}", used.digest.encode())
    except RuntimeError as e:  # the store's: a connection, a kind of store that cannot do this
        _warn("store", f"cannot reach the process group's store and uses its own tuned table: {e}")
        return own
    return used


def digests(own: Table, timeout_s: float, generation: int = 0) -> dict[int, str | None]:
    """The digest of every rank's table, None of those that published none within timeout_s; this rank's is `own`'s,
    unless it published one before."""
    values = _values(generation)
    _publish(values, generation, f"digest/{dist.get_rank()}", own.digest.encode())
    until = time.monotonic() + timeout_s
    found = {}
    for rank in range(dist.get_world_size()):
        data = _wait(values, f"digest/{rank}", until - time.monotonic())
        found[rank] = None if data is None else data.decode(errors="replace")
    return found


def _values(generation: int) -> Any:
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_default_store", None)  # private, and the same since torch 1.8
    if find is None:
        raise RuntimeError("this torch does not give it")
    return dist.PrefixStore(f"fqt/tuned/{generation}", find())


def _publish(values: Any, generation: int, name: str, data: bytes) -> None:
    """Once in a process group: a process with GPUs of several kinds speaks for the one it used first. What an earlier
    group left in the same store is replaced: who has read that already shows by its digest."""
    said = _published.setdefault(dist.group.WORLD, set())
    if (generation, name) not in said:
        values.set(name, data)
        said.add((generation, name))


def _wait(values: Any, name: str, timeout_s: float) -> bytes | None:
    """A value, None if it is not there in time. Asks again and again: `Store.wait` would hold the store against the
    process's other threads, whose collectives rank 0 may be waiting for."""
    until, pause = time.monotonic() + timeout_s, 0.001
    while not values.check([name]):
        if time.monotonic() >= until:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return values.get(name)


def _message(table: Table, machine: Machine) -> bytes:
    content = dict(machine=asdict(machine), sources=store.sources(), entries=table.to_json())
    return json.dumps(content).encode()


def _of_rank_0(values: Any, own: Table, machine: Machine, timeout_s: float) -> Table:
    data = _wait(values, "table", timeout_s)
    if data is None:
        _warn("silent", f"got no tuned table from rank 0 within {timeout_s:g} s and uses its own")
        return own
    try:
        theirs, sources, entries = _parsed(data)
    except ValueError as e:
        _warn("message", f"refused rank 0's tuned table and uses its own: {e}")
        return own
    kind = ("gpu", "arch", "processors")
    if any(theirs.get(name) != getattr(machine, name) for name in kind):
        gpus = machine.gpu, theirs.get("gpu")
        _warn("gpu", f"has another GPU than rank 0 and uses its own tuned table: {gpus[0]!r}, rank 0 {gpus[1]!r}")
        return own
    present = {op for op, digest in store.sources().items() if sources.get(op) == digest}
    known = [item for item in entries if not isinstance(item, dict) or item.get("op") in present]
    table, refused = tuned.from_json(known, "rank 0")
    if len(known) < len(entries):
        refused["other sources of the kernels"] = len(entries) - len(known)
    for why, n in refused.items():
        store.count(f"refused: {why}", n)
        _warn(why, f"refused {n} of the {len(entries)} entries of rank 0's tuned table: {why}")
    return table


def _parsed(data: bytes) -> tuple[dict, dict, list]:
    """(machine, sources, entries). Raises ValueError."""
    if len(data) > MAX_BYTES:
        raise ValueError("too large")
    match safefile.parse(data):
        case {"machine": dict(machine), "sources": dict(sources), "entries": list(entries)}:
            return machine, sources, entries
    raise ValueError("of another schema")


def _warn(about: str, text: str) -> None:
    store.warn_once(f"rank {about}", f"rank {dist.get_rank()} {text}")
