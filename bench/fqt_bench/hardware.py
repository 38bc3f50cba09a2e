"""Everything that wants a GPU, part by part, each with a time limit of its own, and its raw results in one folder.

    python -m fqt_bench.hardware [check | tune | bench | PART ...] [--limit-s N] [--out DIR] [--list]

    check   is every kernel right, free of races and deterministic on this GPU; do models train on it as on the CPU
    tune    measure the kernels' configurations for this GPU
    bench   time kernels, layers, optimizers and steps

Results go to bench/results/<gpu>: what each part writes itself, what it printed in PART-<date>-<commit>.log (not committed:
it names paths), and the verdicts, with the last line of each, in hardware-<date>-<commit>.json. A part that fails or runs
out of time does not keep the next one from running; one that there is no time left for is named. Exit status 1 if a part
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fqt.cli import table

from . import environment, sanitize
from .psgd_runs import FASHION

WORKERS = 12  # of the test suite: most of its time goes into compiling
LEAST_S = 20.0  # a part is not begun with less time left
STUDY = "resnet-fashion-*.json"  # of the CPU backend, in bench/results/cpu


class Part(NamedTuple):
    """arguments: of python; its results are {dir}/…-{stem}.json, {dir} a folder in {out}. seconds: its limit. missing: why
    it cannot run."""

    group: str
    arguments: tuple[str, ...]
    seconds: float
    missing: str = ""


def parts(root: Path, fashion: Path = FASHION) -> dict[str, Part]:
    """By name, in the order in which they run."""
    python = lambda group, seconds, line: Part(group, ("-m", *line.split()), seconds)  # noqa: E731
    return {
        "doctor": python("check", 570, "fqt doctor --repeat 100 --out {dir}/doctor-{stem}.json"),
        "tests": python("check", 570, f"pytest -v --ignore tests/codegen {_workers()}"),
        "sanitize": python(
            "check", 570, "fqt_bench.sanitize --jobs 4 --limit-s 540 --out {dir}/sanitize-{stem}.json"
        )._replace(missing=sanitize.missing()),
        "extremes": python("check", 570, "fqt_bench.extremes --limit-s 540 --out {dir}/extremes-{stem}.json"),
        "endurance": python("check", 400, "fqt_bench.endurance --limit-s 370 --out {dir}/endurance-{stem}.json"),
        "demo": python("check", 400, "fqt_bench.beside demo --out {dir}/demo-{stem}.json"),
        "resnet": _resnet(root, fashion),
        "tune": python("tune", 400, "fqt tune --suite llama-8b cubes --budget 4"),
        "export": python("tune", 60, "fqt tune export {dir}/tuned-{stem}.json"),
        "kernels": python("bench", 450, "fqt bench --suite kernels layers train --budget-s 360 --out {out}"),
        "optim": python("bench", 200, "fqt bench --suite optim --budget-s 120 --out {out}"),
        "householder": python("bench", 260, "fqt bench --suite householder --budget-s 180 --out {out}"),
        "conv": python("bench", 330, "fqt bench --suite conv --budget-s 240 --out {out}"),
    }


def _workers() -> str:
    has = importlib.util.find_spec("xdist") is not None
    return f"--numprocesses {min(WORKERS, os.cpu_count() or 1)} --dist load" if has else ""


def _resnet(root: Path, fashion: Path) -> Part:
    """The networks of the CPU's study, on this GPU."""
    studies = sorted((root / "bench" / "results" / "cpu").glob(STUDY))
    line = (
        "-m",
        "fqt_bench.beside",
        "resnet",
        "--base",
        str(studies[-1]) if studies else "",
        "--out",
    )
    arguments = (*line, "{dir}/resnet-{stem}.json", "--fashion-mnist", str(fashion), "--limit-s", "500")
    missing = "" if studies else f"no study {STUDY} of the CPU's"
    if not missing and not fashion.is_dir():
        missing = (
            f"{fashion} is not there: Debian's package dataset-fashion-mnist, or FQT_FASHION_MNIST for another folder"
        )
    return Part("check", arguments, 570, missing)


def chosen(found: Mapping[str, Part], names: Sequence[str]) -> list[str]:
    """The parts of these names or groups in the order of all; all where there are none.

    Raises:
        ValueError: a name is neither.
    """
    groups = {part.group for part in found.values()}
    if unknown := [name for name in names if name not in found and name not in groups]:
        raise ValueError(f"no part {unknown[0]!r}; there are {', '.join((*sorted(groups), *found))}")
    return [name for name, part in found.items() if not names or name in names or part.group in names]


def run(part: Part, log: Path, seconds: float, places: Mapping[str, str], root: Path) -> dict[str, Any]:
    """Run a part in a process of its own and show what it prints: {"status", "seconds", "returncode", "last"}.

    status: "ok", "failed", or "out of time" where it was ended after so many seconds. last: the last line it printed.
    """
    command = [sys.executable, *(argument.format(**places) for argument in part.arguments)]
    paths = [*(str(root / folder) for folder in (".", "kernels", "bench")), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if importlib.util.find_spec("platformdirs") is None:  # which says where the store of tuned tables is
        env.setdefault("FQT_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fqt-cache"))
    start = time.monotonic()
    tee = subprocess.Popen(["tee", "-i", str(log)], stdin=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=tee.stdin,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        returncode = process.wait(seconds)
        status = "ok" if returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        returncode, status = _end(process), "out of time"
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the part has left behind
            os.killpg(process.pid, signal.SIGKILL)
        tee.stdin.close()
        tee.wait()
    printed = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip("= ")[:300] for line in reversed(printed) if line.strip()), "")
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "returncode": returncode, "last": last}


def _end(process: subprocess.Popen) -> int:
    """End a process and all that it has started, first by SIGINT, so that it writes what it knows."""
    for sent, patience in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(patience)
    return process.returncode


def _heed_signals() -> None:
    """An interrupt is one also for what runs in the background of a shell, and a request to end is one: parts are ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.hardware", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PART", help="parts or groups of them; by default all")
    parser.add_argument("--limit-s", type=float, default=float("inf"), metavar="N", help="of all parts together")
    parser.add_argument("--out", type=Path, metavar="DIR", help="in place of bench/results")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    args = parser.parse_args(argv)
    root = environment.ROOT
    if root is None:
        parser.error("it runs in a checkout of the repository, which has tests/ and bench/results/")
    found = parts(root, Path(os.environ.get("FQT_FASHION_MNIST", FASHION)))
    try:
        names = chosen(found, args.names)
    except ValueError as e:
        parser.error(str(e))
    if args.list:
        some = [(name, found[name]) for name in names]
        rows = [(name, p.group, f"{p.seconds:g} s", p.missing or " ".join(p.arguments)) for name, p in some]
        print(table(("part", "group", "at most", "command"), rows))
        return 0
    if not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is false: not measured")
    _heed_signals()
    return _run_all({name: found[name] for name in names}, args.out, args.limit_s, root)


def _run_all(some: Mapping[str, Part], out: Path | None, limit_s: float, root: Path) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = environment.environment(device)
    out = (environment.default_out() if out is None else out).absolute()
    path = environment.result_path(out, ["hardware"], record)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem.removeprefix("hardware-")
    places = {"out": str(out), "dir": str(path.parent), "stem": stem}
    start, verdicts = time.monotonic(), {}
    for name, part in some.items():
        left = limit_s - (time.monotonic() - start)
        if part.missing or left < LEAST_S:
            verdicts[name] = {"status": "not run", "why": part.missing or f"{max(left, 0):.0f} s are left"}
            continue
        print(f"== {name}: python {' '.join(part.arguments)}", flush=True)
        log = path.parent / f"{name}-{stem}.log"
        verdicts[name] = run(part, log, min(part.seconds, left), places, root)
        environment.write(path, {"kind": "parts of fqt_bench.hardware", "environment": record, "parts": verdicts})
    environment.write(path, {"kind": "parts of fqt_bench.hardware", "environment": record, "parts": verdicts})
    rows = [(name, v["status"], f"{v['seconds']:.0f} s" if "seconds" in v else "", v.get("why", ""))
            for name, v in verdicts.items()]  # fmt: skip
    print(table(("part", "status", "time", ""), rows, right=(2,)))
    print(f"results: {path.parent}")
    return int(any(v["status"] in ("failed", "out of time") for v in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
