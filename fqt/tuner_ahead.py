"""Compile the candidates of many problems in parallel processes, before any is timed: `fqt_bench.ahead` for tuning.

`python -m fqt.tuner_ahead JOBS DEVICE PART PARTS` is one of the processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .candidates import Candidate
from .dispatch import Problem
from .tuner_cases import build, describe, title

MIN_STALL_S = 30.0  # a compilation takes some seconds, on busy cores many

Job = tuple[Problem, tuple[Candidate, ...]]


def trial(jobs: Sequence[Job], device: torch.device, limit_s: float) -> dict[tuple[str, str], str]:
    """Run every candidate of every job once, in processes of their own, for at most limit_s.

    A process that ends leaves candidates untried: all that is not refused by then is run again, until none ends.

    Returns why a candidate, (problem in words, title), must not be run: it hangs or takes its process down.
    """
    from fqt_bench import ahead

    end, refused = time.monotonic() + limit_s, {}
    while (left := end - time.monotonic()) > 0:
        todo = [(p, [c for c in candidates if (describe(p), title(c)) not in refused]) for p, candidates in jobs]
        found = _run(todo, device, left, ahead)
        refused |= {(shape, name): why for (_, shape, name), why in found.items()}
        if not found:
            break
    return refused


def _run(jobs: Iterable[tuple[Problem, Sequence[Candidate]]], device: torch.device, limit_s: float, ahead) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps([[asdict(problem), candidates] for problem, candidates in jobs]), encoding="utf-8")

        def command(part: int, parts: int) -> list[str]:
            return [sys.executable, "-m", "fqt.tuner_ahead", str(file), str(device), str(part), str(parts)]

        # A short budget ends before the usual patience does, and a kernel that hangs would be met again when it is timed.
        refused = ahead.run_ahead(command, ahead.parts(), limit_s, min(ahead.STALL_S, max(0.5 * limit_s, MIN_STALL_S)))
        untried = {line for log in Path(folder).glob("untried-*") for line in log.read_text("utf-8").splitlines()}
    if untried:
        text = "compiled when they are timed, since their inputs could not be made beside those of other processes"
        print(f"fqt tune: {len(untried)} problems are {text}: {'; '.join(sorted(untried))}", file=sys.stderr)
    return refused


def read(text: str) -> list[Job]:
    """The jobs as `trial` wrote them."""
    return [
        (Problem(**fields | {"geometry": tuple(fields["geometry"])}),
         tuple(Candidate(kernel, tuple(config), split_k) for kernel, config, split_k in candidates))
        for fields, candidates in json.loads(text)
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """A worker: run each of its candidates once, saying so. A kernel that breaks the CUDA context ends the process."""
    file, device, part, parts = argv
    jobs = read(Path(file).read_text(encoding="utf-8"))
    untried = share(jobs, torch.device(device), int(part), int(parts))
    Path(file).with_name(f"untried-{part}").write_text("\n".join(untried), encoding="utf-8")
    return 0


def share(jobs: Iterable[Job], device: torch.device, part: int, parts: int) -> list[str]:
    """Run every parts-th candidate, counted over all jobs, once. Returns the problems that could not be built, and why."""
    from fqt_bench.ahead import run_once

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    number, untried = 0, []
    for problem, candidates in jobs:
        mine = [c for i, c in enumerate(candidates, number) if i % parts == part]
        number += len(candidates)
        if not mine:
            continue
        try:
            case = build(problem, mine, device, sets=1, yardstick=False, exact=False)
        except Exception as error:  # out of memory, say: several workers share it
            untried.append(f"{describe(problem)}: {' '.join(str(error).split())[:200]}")
            continue
        for candidate in case.candidates:
            key = (case.suite, case.shape, candidate.name)
            run_once(lambda run=candidate.run: run(0), key, torch.cuda.synchronize if on_gpu else lambda: None)
        del case, candidate  # and with them the inputs, before the next ones are made
        if on_gpu:
            torch.cuda.empty_cache()
    return untried


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
