"""Text to train on without a download: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fqt.cli import UsageError

CONTEXT = 64  # bytes of a window
TRAIN, TEST = 16_000, 1_600  # windows
TEST_EVERY = 10  # each tenth file is for testing
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config",
    "ensurepip",
}


def files(folder: Path) -> list[Path]:
    """The modules of a standard library in the order of their names, without tests and what was installed or generated."""
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    kept = (path for path in found if not LEFT_OUT & set(path.parts) and not path.name.startswith("_sysconfigdata"))
    return [folder / path for path in sorted(kept, key=lambda path: path.as_posix())]


def windows(paths: Sequence[Path], count: int, context: int = CONTEXT) -> Tensor:
    """(count, context + 1) int64: windows of the joined files at equal distances, from the first byte to the last.

    Raises:
        UsageError: the files are too short for as many that do not overlap.
    """
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths) or b" "), dtype=torch.uint8)
    if len(text) < count * (context + 1):
        raise UsageError(f"{len(paths)} sources of {len(text)} bytes: {count} windows of {context + 1} bytes need more")
    starts = torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(context + 1)].long()


def load(folder: Path | None = None, train: int = TRAIN, test: int = TEST) -> tuple[Tensor, Tensor]:
    """Windows for training and, of other files, for testing.

    folder: of the sources, by default the standard library of this Python.

    Raises:
        UsageError: there are not enough sources there.
    """
    found = files(Path(sysconfig.get_path("stdlib")) if folder is None else folder)
    held = found[::TEST_EVERY]
    rest = [path for i, path in enumerate(found) if i % TEST_EVERY]
    return windows(rest, train), windows(held, test)
