"""Peers without a network: wheels that somebody carried here, installed into a folder of their own.

No package that the measurements are of may come from there: a wheel of one of KEPT, or with a module of it, is refused.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from fqt.cli import UsageError

# By distribution, what it brings. Of these the installed ones count: the wheel's folder comes before them.
KEPT = {"torch": ("torch", "torchgen", "functorch"), "triton": ("triton",), "pytorch-triton": (), "numpy": ("numpy",),
        "fqt-kernels": ("fqt", "fqt_kernels", "fqt_bench")}  # fmt: skip
LIMIT_S = 120


def install(folder: Path, target: Path) -> dict[str, str]:
    """Install every wheel of the folder, and nothing else, into the target: {distribution: version}.

    Raises:
        UsageError: no wheel there, one that is refused, is not whole, or does not fit this Python and machine.
    """
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels:
        raise UsageError(f"FQT_WHEELS={folder}: {'no wheel is in it' if folder.is_dir() else 'not a folder'}")
    found: dict[str, str] = {}
    for wheel in wheels:
        name, version = _named(wheel)
        if name in found:
            raise UsageError(f"{wheel.name}: a second wheel of {name}, beside version {found[name]}: keep one")
        _refuse_kept(wheel, name)
        found[name] = version
    command = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", "--quiet",
               "--target", str(target))  # fmt: skip
    try:
        done = subprocess.run([*command, *map(str, wheels)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=LIMIT_S)  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise UsageError(f"FQT_WHEELS={folder}: pip did not end within {LIMIT_S} s") from e
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UsageError(f"FQT_WHEELS={folder}: {'; '.join(lines)[:500] or f'pip ended with {done.returncode}'}")
    return found


def _named(wheel: Path) -> tuple[str, str]:
    """(distribution, version) by the name of the file: NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM.whl."""
    parts = wheel.stem.split("-")
    if len(parts) not in (5, 6):
        raise UsageError(f"{wheel.name}: not the name of a wheel")
    return re.sub(r"[-_.]+", "-", parts[0]).lower(), parts[1]


def _refuse_kept(wheel: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
    except (zipfile.BadZipFile, OSError) as e:
        raise UsageError(f"{wheel.name}: not a whole wheel: {e}") from e
    # NAME.data/purelib and /platlib are unpacked into the same folder.
    tops = {re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", file).partition("/")[0] for file in files}
    modules = {re.sub(r"\..*", "", top) for top in tops if not top.endswith((".dist-info", ".data"))}
    for kept, brings in KEPT.items():
        if name == kept or modules & set(brings):
            raise UsageError(f"{wheel.name}: refused: it would take the place of the installed {kept}; take it out")
