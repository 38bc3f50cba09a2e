"""The store of tuned tables: one JSON file per machine in the user's cache directory. Read as data, never executed.

A file that is missing, damaged, unsafe or of another machine is a miss: counted, said once in a process, never an error.
Writers lock, read again, merge and replace the file in one step, so that a writer killed at any moment loses nothing that
`save` had returned for, and a reader never sees half a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import safefile, tuned
from .cli import UsageError
from .safefile import Absent, Unusable
from .tuned import Entry, Key, Refused, Table

SCHEMA = 1
MAX_BYTES = 1 << 20
MAX_ENTRIES = 1024
LOCK_TIMEOUT_S = 20.0
NAME = re.compile(r"[a-z0-9-]*-[0-9a-f]{12}\.json")  # of a machine's file
SHIPPED = Path(__file__).with_name("tables")

_QUANTIZE = ("quantize.py", "statistics.py", "_device.py")
_PRODUCT = ("gemm.py", "gemm_hopper.py", "gemm_cublas.py", "_device.py", "_gluon.py")
_IMAGES = ("conv_quantize.py", "conv_statistics.py", "gradient.py", *_QUANTIZE)
# The files whose code runs, or decides how it runs, when a kernel of the op is timed. Torch alone arranges filters.
_SOURCES = {
    "scaled_mm": _PRODUCT,
    "quantize": _QUANTIZE,
    "quantize_gradient": ("gradient.py", *_QUANTIZE),
    "conv": ("conv.py", *_PRODUCT),
    "conv_wgrad": ("conv_wgrad.py", *_PRODUCT),
    "quantize_images": _IMAGES,
    "quantize_gradient_images": _IMAGES,
    "arrange_filters": (),
}

_counts: Counter[str] = Counter()
_said: set[str] = set()


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for. driver, triton: "" where unknown."""

    gpu: str
    arch: str
    processors: int
    driver: str
    triton: str
    torch: str

    @staticmethod
    def of(device) -> Machine:
        """The machine of a GPU's torch.device."""
        import torch

        from . import dispatch

        index = torch.cuda.current_device() if device.index is None else device.index
        arch, processors = dispatch.device_info(f"cuda:{index}")
        name = torch.cuda.get_device_name(index)
        return Machine(name, arch, processors, driver(), dispatch.triton_version() or "", torch.__version__)


@functools.cache
def driver() -> str:
    """The version of the GPU's driver: the kernel module's word, else nvidia-smi's; "" where neither says it."""
    for file in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(file).read_text().strip()
    call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


class NoPlace(Unusable, UsageError):
    """There is no folder for tables."""


def directory() -> Path:
    """The folder of the tables: FQT_CACHE_DIR, else the platform's cache directory of this user.

    Raises:
        NoPlace: nothing says where that is.
    """
    if place := os.environ.get("FQT_CACHE_DIR"):
        return Path(place).expanduser()
    try:
        import platformdirs
    except ImportError:
        raise NoPlace("platformdirs is not installed, which finds the cache directory: set FQT_CACHE_DIR") from None

    return Path(platformdirs.user_cache_dir("fqt", appauthor=False))


def path(machine: Machine) -> Path:
    """The machine's file: a readable name, and a hash of the schema and of all that the machine is."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine.gpu} {machine.arch}".lower()).strip("-")[:60]
    digest = hashlib.blake2b(json.dumps([SCHEMA, asdict(machine)]).encode(), digest_size=6).hexdigest()
    return directory() / f"{slug}-{digest}.json"


def kernels() -> Path:
    """The folder of the kernels' sources."""
    import fqt_kernels

    return Path(fqt_kernels.__path__[0])


@functools.cache
def sources() -> dict[str, str]:
    """Of each op the hash of the sources of the kernels that compete for it.

    Of the raw bytes: Python's tokens and syntax trees differ between its versions, and Triton too recompiles a kernel
    whose comments or line numbers changed.
    """
    folder, hashes = kernels(), {}
    for op, names in _SOURCES.items():
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
        hashes[op] = digest.hexdigest()
    return hashes


def load(machine: Machine, *, file: Path | None = None) -> Table:
    """The entries of this very machine and of the present kernels, from its own file or from `file`. Never raises."""
    try:
        file = path(machine) if file is None else Path(file)
        content = _read(file)
        if content.machine != machine:
            raise Unusable("of another machine")
    except Unusable as e:
        _missed(file or "of this GPU", e)
        return tuned.EMPTY
    _counts["hit"] += 1
    valid = _valid(content.entries, str(file))
    table = Table(entry for (source, key), entry in valid.items() if source == sources()[key.op])
    for op, n in Counter(key.op for source, key in valid if source != sources()[key.op]).items():
        _counts[f"stale: {op}"] += n
        if all(entry.key.op != op for entry in table):
            warn_once(
                f"stale {op}", f"the kernels of {op} changed since it was tuned for this GPU: run `fqt tune` again"
            )
    return table


def save(machine: Machine, entries: Iterable[Entry], *, file: Path | None = None) -> bool:
    """Add entries to the machine's own file or to `file`; of equal keys the last saved stays, beyond a bound the oldest go.

    Returns:
        Whether they are on the disk. Where they are not, the reason is counted and said once.

    Raises:
        ValueError: an entry that `load` would refuse.
    """
    entries = list(entries)
    if refused := tuned.from_json([tuned.to_json(entry) for entry in entries])[1]:
        raise ValueError(f"entries that no table may hold: {_listed(refused)}")
    target = file
    try:
        target = path(machine) if file is None else Path(file)
        _save(machine, entries, target, own=file is None)
    except (OSError, NotImplementedError) as e:  # filelock.Timeout is one; the other: a file system without locks
        held = isinstance(e, TimeoutError)
        reason = "another process holds its lock" if held else getattr(e, "strerror", None) or str(e)
        _unsaved(target, reason)
        return False
    except Unusable as e:
        _unsaved(target, str(e))
        return False
    _counts["saved"] += len(entries)
    return True


def machine_of(file: Path) -> Machine:
    """The machine that a file's table is of. Raises ValueError, with the reason, where it holds none."""
    try:
        return _read(Path(file)).machine
    except Unusable as e:
        raise ValueError(f"{file}: no tuned table: {e}") from None


def shipped(machine: Machine) -> Table:
    """The entries that the package ships for GPUs like this one: same name, arch and number of processors.

    Measured with another driver, torch, Triton or revision of the kernels they are a prior, better than a model: entries
    of the nearest versions win.
    """
    found = []
    for file in sorted(SHIPPED.glob("*.json")):
        try:
            content = _read(file, trusted=True)
        except Unusable as e:
            _missed(file, e)
            continue
        if all(getattr(content.machine, name) == getattr(machine, name) for name in ("gpu", "arch", "processors")):
            same = [getattr(content.machine, name) == getattr(machine, name) for name in ("triton", "torch", "driver")]
            found.append((same, content.entries, str(file)))
    table = tuned.EMPTY
    for _, entries, name in sorted(found, key=lambda item: item[0]):
        more, refused = tuned.from_json([_without_source(item) for item in entries], "shipped")
        _refused(name, refused)
        table = table.merged(more)
    return table


def counts() -> dict[str, int]:
    """What this process met: "hit", "miss: <why>", "refused: <why>", "stale: <op>", "saved", "not saved: <why>", ..."""
    return dict(_counts)


def count(what: str, n: int = 1) -> None:
    """Add to `counts`."""
    _counts[what] += n


def warn_once(about: str, text: str) -> None:
    """Warn, unless this process was warned of it before."""
    if about not in _said:
        _said.add(about)
        warnings.warn(f"fqt: {text}", stacklevel=3)


# ---- reading


class _Content(NamedTuple):
    machine: Machine
    entries: list[Any]


def _read(file: Path, *, trusted: bool = False) -> _Content:
    """What a file holds, of whichever machine. trusted: it came with the package. Raises `Unusable`."""
    data = safefile.read(file, MAX_BYTES, trusted=trusted)
    try:
        content = safefile.parse(data)
    except ValueError:
        raise Unusable("not JSON", mine=True) from None
    match content:
        case {
            "schema": 1,
            "machine": {
                "gpu": str(),
                "arch": str(),
                "processors": int(),
                "driver": str(),
                "triton": str(),
                "torch": str(),
            },
            "entries": list(entries),
        } if len(content) == 3 and len(content["machine"]) == 6:
            return _Content(Machine(**content["machine"]), entries)
    raise Unusable("of another schema", mine=True)


def _valid(items: list[Any], name: str) -> dict[tuple[str, Key], Entry]:
    """The valid entries by (hash of their kernels, key), in the file's order; the others are counted.

    Those of other revisions of the kernels are kept too, for who goes back to one; their configurations are theirs.
    """
    valid: dict[tuple[str, Key], Entry] = {}
    refused: Counter[str] = Counter()
    for item in items:
        try:
            source = item.get("source") if isinstance(item, dict) else None
            if not isinstance(source, str) or not re.fullmatch("[0-9a-f]{16}", source):
                raise Refused("no hash of its kernels")
            present = sources().get(str(item.get("op"))) == source
            entry = tuned.entry_from_json(_without_source(item), present=present)
        except Refused as e:
            refused[str(e)] += 1
            continue
        valid.pop((source, entry.key), None)
        valid[source, entry.key] = entry
    _refused(name, refused)
    return valid


def _without_source(item: Any) -> Any:
    return {field: value for field, value in item.items() if field != "source"} if isinstance(item, dict) else item


def _listed(refused: dict[str, int]) -> str:
    return ", ".join(f"{n} with {why}" for why, n in sorted(refused.items()))


def _refused(name: str, refused: dict[str, int]) -> None:
    for why, n in refused.items():
        _counts[f"refused: {why}"] += n
        warn_once(f"refused: {why}", f"{name}: {n} tuned {'entry' if n == 1 else 'entries'} refused: {why}")


def _missed(file: Path | str, miss: Unusable) -> None:
    _counts[f"miss: {miss}"] += 1
    if not isinstance(miss, Absent):
        warn_once(f"miss: {miss}", f"the tuned table {file} is not used: {miss}")


# ---- writing


def locked(file: Path) -> contextlib.AbstractContextManager:
    """Within, no other process writes the file. Raises OSError, TimeoutError where another holds the lock for long."""
    import filelock

    return filelock.FileLock(f"{file}.lock").acquire(timeout=LOCK_TIMEOUT_S, poll_interval=0.01)


def _save(machine: Machine, entries: list[Entry], file: Path, own: bool) -> None:
    """Raises OSError, and `Unusable` where a file is in the way that is not this machine's table."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    safefile.check_folder(file.parent)
    with locked(file):
        safefile.clean(file)
        kept: dict[tuple[str, Key], Entry] = {}
        try:
            content = _read(file)
            if content.machine != machine:
                raise Unusable("of another machine", mine=True)
            kept = _valid(content.entries, str(file))
        except Absent:
            pass
        except Unusable as e:
            if not (own and e.mine):  # a file that was named is the user's: only a table of this machine is added to
                raise
            _missed(file, e)
        for entry in entries:
            kept.pop((sources()[entry.key.op], entry.key), None)
            kept[sources()[entry.key.op], entry.key] = entry  # the newest last
        safefile.replace(file, _text(machine, kept))


def _text(machine: Machine, entries: dict[tuple[str, Key], Entry]) -> str:
    """The file, a line to an entry, of as many of the newest as the bounds allow."""
    head = f'{{"schema": {SCHEMA},\n"machine": {json.dumps(asdict(machine))},\n"entries": [\n'
    lines: list[str] = []
    size = len(head) + len("\n]}\n")
    for (source, _), entry in reversed(entries.items()):
        line = json.dumps({"source": source} | tuned.to_json(entry))
        size += len(line) + len(",\n")
        if len(lines) == MAX_ENTRIES or size > MAX_BYTES:
            break
        lines.append(line)
    if dropped := len(entries) - len(lines):
        _counts["dropped"] += dropped
        warn_once("dropped", f"the tuned table is full: the {dropped} oldest of {len(entries)} entries were dropped")
    return head + ",\n".join(reversed(lines)) + "\n]}\n"


def _unsaved(file: Path | None, reason: str) -> None:
    _counts[f"not saved: {reason}"] += 1
    warn_once(
        f"not saved: {reason}",
        f"tuned entries are not saved{f' to {file}' * bool(file)}: {reason}",
    )
