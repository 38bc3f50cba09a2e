"""Nsight Compute (ncu): where it is, which metrics it knows, a trial of it, and the counters of one run of a process.

Nothing it says is believed before the trial: it has to see the one kernel that a process runs to read and write 1 GiB
(`fqt_bench.profile_child`), with as many bytes read from DRAM and written to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import profile_read, reading
from .profile_child import COPY_BYTES

PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda-*/bin/ncu")
OPTIONS = ("--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none",
           "--cache-control", "all", "--target-processes", "application-only")  # fmt: skip
ONE_S = 150.0  # for one candidate: it may have to be compiled, and is replayed a dozen times
ASK_S = 60.0  # for ncu's version and list of metrics
ATTEMPTS = 8  # to find the metrics that ncu knows, should it name one at a time
PATIENCE_S = 3.0  # with a process that was asked to end; fqt_bench.hardware has 10 s with this one
TOLERANCE = 0.05  # of the planted kernel's bytes


class Commands:
    """Runs one command at a time, in a session of its own, until the time of all is over."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self._end = limit_s, time.monotonic() + limit_s

    def over(self) -> str:
        """Why nothing is run any more, "" while something is."""
        return f"--limit-s {self.limit_s:g} is over" if time.monotonic() >= self._end else ""

    def run(self, command: Sequence[str], at_most_s: float) -> tuple[int | None, str, str]:
        """(exit status, stdout, stderr); the status is None where the command was ended for its time."""
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            status: int | None = None
            try:
                status = process.wait(max(min(at_most_s, self._end - time.monotonic()), 0))
            except subprocess.TimeoutExpired:
                pass
            finally:  # an interrupt too: nothing may go on, on the device
                _end(process)
            out.seek(0)
            err.seek(0)
            return status, out.read(), err.read()


def _end(process: subprocess.Popen) -> None:
    """End a process and what it has started, which may outlive it: first politely."""
    for how, patience in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


@dataclass
class Ncu:
    """Nsight Compute. why: what keeps it from counting, "" where nothing is known to. planted: what came of its trial."""

    path: str
    why: str = ""
    version: str = ""
    listed: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    planted: dict[str, Any] = field(default_factory=lambda: {"status": "not run", "reason": ""})

    def asked(self) -> dict[str, str]:
        return profile_read.metrics(self.refused, self.listed)[0]

    def unknown(self) -> dict[str, list[str]]:
        """The fields that no metric is left for, with those that were to give them."""
        return {name: list(profile_read.FIELDS[name]) for name in profile_read.metrics(self.refused, self.listed)[1]}

    @property
    def trusted(self) -> bool:
        return self.planted["status"] == "trusted"

    def record(self) -> dict[str, Any]:
        return {"version": self.version, "reason": self.why, "metrics": self.asked() if self.path else {},
                "unknown": self.unknown() if self.path else {}, "planted": self.planted}  # fmt: skip


# ---- its use


def child(work: dict[str, Any]) -> list[str]:
    """The command of a process that does this work: see `fqt_bench.profile_child`."""
    return [sys.executable, "-m", "fqt_bench.profile_child", json.dumps(work)]


def find(given: str | None) -> Ncu:
    """Where Nsight Compute is: what was given, on PATH, or where CUDA puts it."""
    if given:
        path = shutil.which(given)
        return Ncu(path) if path else Ncu("", why=f"--ncu {given} is no program")
    places = [str(p) for place in PLACES for p in sorted(Path("/").glob(place[1:]), reverse=True)]
    path = shutil.which("ncu") or next(filter(shutil.which, places), None)
    return Ncu(path) if path else Ncu("", why=f"ncu is neither on PATH nor at {', '.join(PLACES)}")


def prepare(ncu: Ncu, commands: Commands, l2: float) -> None:
    """Learn ncu's version, and try it, and the metrics that it knows, on the planted kernel."""
    try:
        _, out, _ = commands.run([ncu.path, "--version"], ASK_S)
        ncu.version = next((line.strip() for line in out.splitlines() if line.startswith("Version")), "")[:100]
    except OSError as e:
        ncu.why = f"{ncu.path}: {e.strerror or e}"
        return
    report, why, said = count(ncu, {"mode": "copy"}, commands)
    if why:
        ncu.why, ncu.planted = why, {"status": "no counters", "reason": why}
        return
    reason = doubt(report, said.get("bytes", COPY_BYTES), l2)
    ncu.planted = {"status": "not trusted" if reason else "trusted", "reason": reason, "bytes": said.get("bytes"),
                   "kernels": [k.record() for k in report.kernels]}  # fmt: skip


def doubt(report: profile_read.Report, size: int, l2: float) -> str:
    """Why the counters of a kernel that reads and writes `size` bytes are not believed, "" where they are."""
    if report.problems or len(report.kernels) != 1:
        return "; ".join(report.problems) or f"{len(report.kernels)} kernels were seen where one ran"
    (kernel,) = report.kernels
    for what, least in (("read_bytes", (1 - TOLERANCE) * size), ("written_bytes", (1 - TOLERANCE) * size - l2)):
        value = kernel[what]
        if value is None or not least <= value <= (1 + TOLERANCE) * size:
            seen = "no number" if value is None else f"{value:.4g}"
            return f"a kernel that moves {size:.4g} bytes each way has {seen} {what.replace('_', ' ')}"
    return ""


def count(ncu: Ncu, work: dict[str, Any], commands: Commands) -> tuple[profile_read.Report, str, dict[str, Any]]:
    """(the kernels, why there are none, what the process said). Asks again without the metrics that ncu refuses; where it
    does so once more, without all that its list does not have."""
    for attempt in range(ATTEMPTS):
        asked = ncu.asked()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            metrics = ",".join(dict.fromkeys(asked.values()))
            command = [ncu.path, *OPTIONS, "--metrics", metrics, "--log-file", str(log), *child(work)]
            status, out, err = commands.run(command, ONE_S)
            printed = log.read_text(errors="replace") if log.is_file() else ""
        printed, said = "\n".join((printed, out, err)), answer(out) or {}
        new = profile_read.refused(printed, asked.values()) or profile_read.doubtful(printed, asked)
        if not new:
            break
        ncu.refused += new
        if attempt and not ncu.listed:
            ncu.listed = _listed(ncu, commands)
    report = profile_read.read(printed, asked)
    if status is None:
        return report, commands.over() or f"ncu did not end within {ONE_S:g} s", said
    if not report.kernels:
        why = said.get("failed") or profile_read.failure(printed) or "; ".join(report.problems)
        return report, why or f"ncu ended with {status} and said nothing of it: {last(err)}", said
    if status:
        report.problems.append(f"ncu ended with {status}: {profile_read.failure(printed) or last(err)}")
    return report, "", said


def _listed(ncu: Ncu, commands: Commands) -> set[str]:
    """The base names that ncu lists for this GPU; none where its list is of another form."""
    status, out, _ = commands.run([ncu.path, "--query-metrics"], ASK_S)
    names = profile_read.base_names(out) if status == 0 else set()
    return names if "gpu__time_duration" in names or "dram__throughput" in names else set()


# ---- what a process printed


def answer(out: str) -> Any:
    """The last line that is an object or a list of them, in JSON, of what a process printed; None where there is none."""
    for line in reversed(out.splitlines()):
        if line.startswith(("{", "[{", "[]")):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def last(err: str) -> str:
    """The last line of what a process wrote to stderr, without the folders that it names."""
    return reading._FOLDERS.sub("…/", (err.strip().splitlines() or ["no message"])[-1])[:300]
