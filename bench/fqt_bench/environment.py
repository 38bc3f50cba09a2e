"""What a result was measured on, and the file it is kept in."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fqt

PACKAGES = ("fqt", "fqt_kernels", "fqt_bench")
PEERS = ("torchao", "bitsandbytes")
_SMI = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")


def checkout(file: str = __file__) -> Path | None:
    """The root of the checkout that this package runs from, None where it is installed."""
    root = Path(file).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "bench" / "fqt_bench").is_dir() else None


ROOT = checkout()


def environment(device: torch.device) -> dict[str, Any]:
    """The record that goes into every result. Versions that are not there, and facts that nobody tells, are None."""
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        **_gpu(device),
        "fqt": fqt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "peers": {name: _version(name) for name in PEERS},
        "cpu": _cpu(),
        "host": f"{platform.machine()}, {os.cpu_count()} processors",
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "source": source_digest(),
    }


def slug(name: str) -> str:
    """A GPU's name as a folder's: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def source_digest(folders: Mapping[str, Path] | None = None) -> str:
    """A hash of the packages' sources, the same wherever they lie: it tells what ran also where there is no git."""
    digest = hashlib.sha256()
    for name, folder in sorted((_folders() if folders is None else folders).items()):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{name}/{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _folders() -> dict[str, Path]:
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: Path(spec.submodule_search_locations[0]) for name, spec in specs.items() if spec is not None}


def default_out() -> Path:
    """Where results go unless the user says: bench/results of the checkout, else fqt-bench in the current folder."""
    return ROOT / "bench" / "results" if ROOT else Path("fqt-bench")


def result_path(out: Path, suites: Sequence[str], record: dict[str, Any]) -> Path:
    """out/<gpu or cpu>/<suites>-<date>-<commit>.json, or the first of …-2, …-3 that does not exist: results are kept."""
    commit = f"{record['commit'][:9] if record['commit'] else 'nogit'}{'-dirty' if record['dirty'] else ''}"
    stem = f"{'-'.join(suites)}-{record['date'][:10]}-{commit}"
    folder, count = out / slug(record["gpu"] or record["cpu"]), 1
    while (path := folder / f"{stem}{f'-{count}' if count > 1 else ''}.json").exists():
        count += 1
    return path


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON in one step: a reader, or a run that is cut off, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return dict.fromkeys(("gpu", "capability", "processors", "memory_gib", "l2_mib", "driver", "smi"))
    properties = torch.cuda.get_device_properties(device)
    smi = _smi()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": smi.get("driver_version"),
        "smi": smi,
    }


def _smi() -> dict[str, str]:
    """What nvidia-smi reports of the first GPU, empty where there is no nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader")
    return dict(zip(_SMI, (field.strip() for field in text.split("\n")[0].split(",")), strict=False)) if text else {}


def _cpu() -> str:
    """The processor's model as Linux names it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*models, platform.processor(), platform.machine()]), "cpu")


def _commit() -> tuple[str | None, bool | None]:
    """(HEAD, whether tracked files of the packages differ from it), None where there is no repository."""
    if ROOT is None:
        return None, None
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--",
                     *(str(folder) for folder in _folders().values()))  # fmt: skip
    return (head, None if status is None else bool(status)) if head else (None, None)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
