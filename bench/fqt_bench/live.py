"""What a process holds: memory, live tensors and the entries of fqt's caches; and what of it grew between two counts."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

HOST_SLACK = 64 * 2**20  # bytes: allocators and the interpreter keep some
WARM_UP = 10  # one record in so many, at the beginning
LEAST = 4  # records that anything is said about
_CONTAINERS = (Mapping, Set, list, deque, weakref.WeakSet)


@dataclass
class Record:
    """What was counted after so many steps. tensors: live ones by "dtype shape device". reserved, peak: of the GPU's
    allocator, None without one."""

    steps: int
    allocated: int
    reserved: int | None
    peak: int | None
    host: int
    tensors: dict[str, int]
    caches: dict[str, int]


def live_tensors() -> list[Tensor]:
    """All tensors that the garbage collector knows."""
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


def count(steps: int, device: torch.device, roots: Mapping[str, object]) -> Record:
    """The memory as it is. roots: objects whose containers are counted beside those of fqt's modules."""
    gc.collect()
    tensors = live_tensors()
    kinds = Counter(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} {t.device.type}" for t in tensors)
    reserved = peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        allocated = sum(dict(filter(None, map(_storage, tensors))).values())
    return Record(steps, allocated, reserved, peak, _resident(), dict(kinds), cache_sizes(roots))


def _storage(t: Tensor) -> tuple[int, int] | None:
    """(which it is, its bytes) of a tensor's storage, None where it has none or one of unknown size: of a trace."""
    try:
        storage = t.untyped_storage()
        size = storage.nbytes()
    except RuntimeError:
        return None
    return (storage._cdata, size) if isinstance(size, int) else None  # else a symbol's


def _resident() -> int:
    """Resident bytes of this process, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0
    import resource

    return pages * resource.getpagesize()


def cache_sizes(roots: Mapping[str, object]) -> dict[str, int]:
    """How many entries each container has, by name: of fqt's modules, of the objects they hold, and of the roots."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    modules = [(n, m) for n, m in sorted(sys.modules.items()) if n.split(".")[0] in ("fqt", "fqt_kernels")]
    found = [(n, key, value) for n, m in modules for key, value in list(vars(m).items()) if not key.startswith("__")]
    for name, key, value in sorted(found, key=lambda f: getattr(f[2], "__module__", "") != f[0]):  # not where imported
        _measure(f"{name}.{key}", value, sizes, seen)
    for name, value in roots.items():
        _measure(name, value, sizes, seen)
    return sizes


def _measure(name: str, value: object, sizes: dict[str, int], seen: set[int], depth: int = 0) -> None:
    if id(value) in seen or isinstance(value, (type, Tensor, str, nn.Module)):
        return
    info = getattr(value, "cache_info", None)
    if callable(info):
        seen.add(id(value))
        sizes[name] = info().currsize
    elif isinstance(value, _CONTAINERS):
        seen.add(id(value))
        sizes[name] = len(value)
        if isinstance(value, dict) and depth < 4:
            for i, inner in enumerate(list(value.values())):
                if _is_ours(inner):
                    _measure(f"{name}[{i}]", inner, sizes, seen, depth + 1)
    elif _is_ours(value) and depth < 4:
        seen.add(id(value))
        for key, inner in list(getattr(value, "__dict__", {}).items()):
            _measure(f"{name}.{key}", inner, sizes, seen, depth + 1)


def _is_ours(value: object) -> bool:
    return type(value).__module__.split(".")[0] in ("fqt", "fqt_kernels", "torch.optim")


# ---- what is judged


def first(records: Sequence[Record]) -> Record:
    """That of the end of the warm-up."""
    return records[len(records) // WARM_UP]


def judge(records: Sequence[Record]) -> list[str]:
    """What is more in some later record than it was at the end of the warm-up, one line each."""
    if len(records) < LEAST:
        return [f"{len(records)} counts are too few to be judged, {LEAST} are needed"]
    start, later = first(records), records[len(records) // WARM_UP + 1 :]
    lines = []
    most = max(later, key=lambda r: r.allocated)
    if most.allocated > start.allocated:
        lines.append(
            f"allocated: {start.allocated} bytes after {start.steps} steps, {most.allocated} after {most.steps}"
        )
    for what in ("tensors", "caches"):
        before = getattr(start, what)
        for name in sorted({name for r in later for name in getattr(r, what)}):
            most = max(later, key=lambda r: getattr(r, what).get(name, 0))
            now, then = getattr(most, what).get(name, 0), before.get(name, 0)
            if now > then:
                lines.append(f"{what}: {name}: {then} after {start.steps} steps, {now} after {most.steps}")
    last = records[-1]
    if last.host > start.host + HOST_SLACK:
        lines.append(
            f"host: {start.host >> 20} MiB after {start.steps} steps, {last.host >> 20} after {last.steps}: more than "
            f"{HOST_SLACK >> 20} MiB more"
        )
    return lines
