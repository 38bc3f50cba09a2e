"""Run every candidate once in processes of their own, before anything is timed.

Triton's cache then holds every kernel, compiled on all cores; and a candidate that hangs, or takes the process's CUDA
context with it, is known by name and left out before it can take the benchmark down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

STALL_S = 100.0  # in one candidate: several times what the slowest one compiles and tunes in
MAX_PARTS = 8
Key = tuple[str, str, str]  # suite, shape, candidate


@dataclass
class _Worker:
    process: subprocess.Popen
    log: Path

    def begun(self) -> list[Key]:
        return self._keys("begin")

    def pending(self) -> Key | None:
        """The candidate that was begun last, if it has not ended."""
        begun, ended = self.begun(), self._keys("end")
        return begun[-1] if len(begun) > len(ended) else None

    def _keys(self, event: str) -> list[Key]:
        lines = self.log.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half written
        return [tuple(entry[event]) for entry in map(json.loads, lines) if event in entry]


def run_ahead(
    command: Callable[[int, int], Sequence[str]], parts: int, limit_s: float, stall_s: float = STALL_S
) -> dict[Key, str]:
    """Start command(part, parts) for each part and wait. Returns why a candidate must not be run, for each such.

    A worker that works on one candidate for longer than stall_s is ended, and that candidate hangs; one that dies died of
    its candidate. After limit_s all are ended, and nothing is held against what they were at.
    """
    refused: dict[Key, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = [_start(command(i, parts), Path(folder) / f"{i}.jsonl") for i in range(parts)]
        end = time.monotonic() + limit_s
        try:
            while workers and time.monotonic() < end:
                for worker in list(workers):
                    key, code = worker.pending(), worker.process.poll()
                    if code is not None:
                        workers.remove(worker)
                        if key is not None:
                            refused[key] = f"its process ended with status {code} in the trial run"
                    elif key is not None and time.time() - worker.log.stat().st_mtime > stall_s:
                        _end(worker.process)
                        workers.remove(worker)
                        refused[key] = f"did not end within {stall_s:.0f} s in the trial run"
                time.sleep(0.1)
        finally:  # an interrupt too: none may go on, on the device
            for worker in workers:
                _end(worker.process)
    return refused


def _start(command: Sequence[str], log: Path) -> _Worker:
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers are parallel enough
    with log.open("w") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, env=env)
    return _Worker(process, log)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def parts() -> int:
    return max(1, min((os.cpu_count() or 1) - 1, MAX_PARTS))


def command(part: int, parts: int, suites: Sequence[str], only: str, quick: bool) -> list[str]:
    """What starts worker number `part` of `parts`."""
    work = json.dumps({"part": part, "parts": parts, "suites": list(suites), "only": only, "quick": quick})
    return [sys.executable, "-m", "fqt_bench.ahead", work]


def main(argv: Sequence[str]) -> int:
    """A worker: run each of its candidates once, saying so. A kernel that breaks the CUDA context ends the process."""
    import torch

    from .suites import LAST, plans

    work = json.loads(argv[0])
    device = torch.device("cuda", torch.cuda.current_device())
    number = 0
    for turn, plan in enumerate(plans(work["suites"], device, work["quick"], work["only"])):
        whole = plan.effort in LAST  # a worker's alone: inputs and oracles would cost each as much as what it runs
        if plan.key != "cases" or (whole and turn % work["parts"] != work["part"]):
            continue
        try:
            case = plan.build(sets=1)
        except Exception as error:  # out of memory: several workers share it
            print(f"fqt_bench.ahead: {plan.suite} {plan.shape}: {error}", file=sys.stderr)
            continue
        for candidate in (c for c in case.candidates if not c.missing):
            number += not whole
            if whole or number % work["parts"] == work["part"]:
                run_once(
                    lambda run=candidate.run: run(0), (case.suite, case.shape, candidate.name), torch.cuda.synchronize
                )
        del case
        torch.cuda.empty_cache()
    return 0


def run_once(run: Callable[[], object], key: Key, synchronize: Callable[[], None]) -> None:
    """Say that it begins, run it, say that it ended. Its own errors are for the benchmark to report."""
    print(json.dumps({"begin": key}), flush=True)
    try:
        run()
    except Exception as error:
        print(f"fqt_bench.ahead: {key}: {error}", file=sys.stderr)
    synchronize()  # raises where the context is broken
    print(json.dumps({"end": key}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
