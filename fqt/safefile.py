"""Files of data, none of them trusted: read within bounds, followed nowhere, and replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

OLD_S = 600.0  # a temporary file of this age has no writer any more

_POSIX = hasattr(os, "geteuid")  # elsewhere modes and owners say nothing


class Unusable(Exception):
    """Why a file gives no data. mine: it is a regular file of this user's, which may be replaced."""

    def __init__(self, reason: str, *, mine: bool = False) -> None:
        super().__init__(reason)
        self.mine = mine


class Absent(Unusable):
    """There is no file yet: nothing to speak of."""


def read(file: Path, max_bytes: int, *, trusted: bool = False) -> bytes:
    """The bytes of a regular file that nobody but this user and root could write. trusted: whose it is does not matter.

    Raises `Unusable`.
    """
    # Not blocking: opening a named pipe would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(file, flags)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable("no regular file")
            if not trusted:
                check_folder(file.parent)
                _check_owner(status)
            with open(fd, "rb", closefd=False) as f:
                data = f.read(max_bytes + 1)  # of the open file: its size as a path may change meanwhile
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise Absent("no file") from None
    except OSError as e:
        is_link = e.errno in (errno.ELOOP, errno.EMLINK, getattr(errno, "EFTYPE", None))  # as systems say it
        raise Unusable("a symbolic link" if is_link else e.strerror or str(e)) from None
    if len(data) > max_bytes:
        raise Unusable("too large", mine=True)
    return data


def _check_owner(file: os.stat_result) -> None:
    """Refuse what another user could have written."""
    if _POSIX and file.st_uid not in (0, os.geteuid()):
        raise Unusable("of another user")
    if _POSIX and file.st_mode & stat.S_IWOTH:
        raise Unusable("writable by anyone", mine=True)


def check_folder(folder: Path) -> None:
    """Refuse a folder where another user could put a file in the place of this user's."""
    mode = os.stat(folder).st_mode
    if _POSIX and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise Unusable("in a folder that anyone may write to")


def parse(data: bytes) -> Any:
    """The value of a JSON text: no field twice in an object, no NaN. Raises ValueError, whatever the bytes."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_int=_int, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field twice")
    return found


def _int(text: str) -> int | None:
    return int(text) if len(text) <= 20 else None  # of no use, and int() takes long over thousands of digits


def _no_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def replace(file: Path, text: str) -> None:
    """Put a new file in the place of one, on the disk before its name is. Raises OSError, and the old file is as it was."""
    fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".tmp")  # for this user alone
    try:
        with os.fdopen(fd, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # the new name too survives a loss of power, where a folder can be synchronized
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clean(file: Path) -> None:
    """Remove temporary files of writers that were killed."""
    for leftover in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.lstat().st_mtime > OLD_S:
                leftover.unlink()
