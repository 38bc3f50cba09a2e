"""What a result was measured on, and the file it is kept in."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fqt", "kernels", "bench")
_SMI = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")


def environment(device: torch.device) -> dict[str, Any]:
    """The record that goes into every result. Versions that are not there, and facts that nobody tells, are None."""
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_gpu(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "host": f"{platform.machine()}, {os.cpu_count()} processors",
        "commit": commit,
        "dirty": dirty,
        "source": source_digest(),
    }


def slug(name: str) -> str:
    """A GPU's name as a folder's: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def source_digest(root: Path = ROOT) -> str:
    """A hash of the library's and the benchmark's sources: it tells what ran also where there is no git."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def result_path(out: Path, suite: str, record: dict[str, Any]) -> Path:
    """out/<gpu>/<suite>-<date>-<commit>.json, or the first of …-2, …-3 that does not exist: results are kept."""
    commit = f"{record['commit'][:9] if record['commit'] else 'nogit'}{'-dirty' if record['dirty'] else ''}"
    stem = f"{suite}-{record['date'][:10]}-{commit}"
    folder, count = out / slug(record["gpu"] or "cpu"), 1
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


def _commit() -> tuple[str | None, bool | None]:
    """(HEAD, whether tracked files differ from it), None where there is no repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
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
