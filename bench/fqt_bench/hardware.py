"""Everything that wants a GPU, part by part, each with a time limit of its own, and its raw results in one folder.

    python -m fqt_bench.hardware [check | tune | speed | methods | bench | PART ...] [--limit-s N] [--out DIR] [--list]

    check   is every kernel right, free of races and deterministic on this GPU; do models train on it as on the CPU
    tune    measure the kernels' configurations for this GPU
    speed   kernels and layers to their targets, in under 25 minutes: time them beside their peers, profile those that are
            furthest from their predictions, correct the cost model's constants, and print the README's table
    methods what BHQ, a step of PSGD and convolutions cost, whole networks by recipe, the README's table, in 28 minutes
    bench   time training steps; a transformer on Python's sources under every recipe

Results go to bench/results/<gpu>: what each part writes itself, what it printed in PART-<date>-<commit>.log (not committed:
it names paths), and the verdicts, with the last line of each, in hardware-<date>-<commit>.json. A part that fails or runs
out of time does not keep the next one from running; one that there is no time left for is named. Parts that read a result
take the newest one there, and the verdict names it. Exit status 1 if a part failed.

FQT_WHEELS=DIR: a folder of wheels (torchao, bitsandbytes), for a machine without a network. They are installed into a
temporary folder, which the parts of speed, methods and bench see; see `fqt_bench.wheels` for those that are refused.
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

from fqt.cli import UsageError, table

from . import environment, reading, sanitize, wheels
from .psgd_runs import FASHION

WORKERS = 12  # of the test suite: most of its time goes into compiling
LEAST_S = 20.0  # a part is not begun with less time left
PEERS = ("speed", "methods", "bench")  # groups that see what FQT_WHEELS brings
RESULTS = ("kernels-*.json", "layers-*.json")  # of the parts kernels and layers
TEXT = "fqt_bench.recipe_study --dataset python --device cuda --bits 8 5 4 3 2"
STUDY = "resnet-fashion-*.json"  # of the CPU backend, in bench/results/cpu


class Part(NamedTuple):
    """arguments: of python; its results are {dir}/…-{stem}.json, {dir} a folder in {out}. seconds: its limit. missing: why
    it cannot run. reads: results; for the argument {results} come the newest in {dir} of each pattern."""

    group: str
    arguments: tuple[str, ...]
    seconds: float
    missing: str = ""
    reads: tuple[str, ...] = ()


def parts(root: Path, fashion: Path = FASHION) -> dict[str, Part]:
    """By name, in the order in which they run."""
    python = lambda group, seconds, line: Part(group, ("-m", *line.split()), seconds)  # noqa: E731
    of_results = lambda seconds, line: python("speed", seconds, line)._replace(reads=RESULTS)  # noqa: E731
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
        "kernels": python("speed", 400, "fqt bench --suite kernels --budget-s 320 --out {out}"),
        "layers": python("speed", 560, "fqt bench --suite layers --budget-s 470 --out {out}"),
        "profile": of_results(
            330, "fqt_bench.profile --result {results} --top 8 --limit-s 300 --out {dir}/profile-{stem}.json"
        ),
        "calibrate": of_results(120, "fqt_bench.calibrate {results} --out {dir}/calibration-{stem}.json"),
        "readme": python("speed", 60, "fqt_bench.readme --results {out}"),  # printed: it is in the part's log
        "householder": python("methods", 260, "fqt bench --suite householder --budget-s 180 --out {out}"),
        "optim": python("methods", 200, "fqt bench --suite optim --budget-s 120 --out {out}"),
        "tune-conv": python("methods", 280, "fqt tune --suite resnet50-conv --budget 3"),  # before what it makes faster
        "conv": python("methods", 310, "fqt bench --suite conv --budget-s 240 --out {out}"),
        "end-to-end": python("methods", 560, "fqt_bench.end_to_end --limit-s 500 --out {dir}/end-to-end-{stem}.json"),
        "methods-readme": python("methods", 60, "fqt_bench.readme --results {out}"),
        "train": python("bench", 220, "fqt bench --suite train --budget-s 140 --out {out}"),
        "text": python("bench", 570, f"{TEXT} --out {{dir}}/transformer-{{stem}}.json"),
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


def newest(folder: Path, pattern: str) -> Path | None:
    """The result of `fqt bench` in the folder with the latest date of those whose names match, None where there is none."""
    runs, _ = reading.load(sorted(folder.glob(pattern)))
    return folder / runs[-1].file if runs else None


def run(
    part: Part,
    log: Path,
    seconds: float,
    places: Mapping[str, str],
    root: Path,
    results: Sequence[Path] = (),
    peers: Path | None = None,
) -> dict[str, Any]:
    """Run a part in a process of its own and show what it prints: {"status", "seconds", "returncode", "last"}.

    status: "ok", "failed", or "out of time" where it was ended after so many seconds. last: the last line it printed.
    peers: a folder of packages that it may import, before those that are installed.
    """
    command = [sys.executable]
    for argument in part.arguments:
        command += map(str, results) if argument == "{results}" else [argument.format(**places)]
    paths = [
        *(str(root / folder) for folder in (".", "kernels", "bench")),
        str(peers or ""),
        os.environ.get("PYTHONPATH", ""),
    ]
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
    with tempfile.TemporaryDirectory(prefix="fqt-wheels-") as peers:
        carried = {}
        if folder := os.environ.get("FQT_WHEELS"):
            try:
                carried = wheels.install(Path(folder), Path(peers))
            except UsageError as e:
                parser.error(str(e))
            print(f"FQT_WHEELS: {', '.join(f'{name} {version}' for name, version in carried.items())}", flush=True)
        return _run_all({name: found[name] for name in names}, args.out, args.limit_s, root, Path(peers), carried)


def _run_all(
    some: Mapping[str, Part],
    out: Path | None,
    limit_s: float,
    root: Path,
    peers: Path | None = None,
    carried: Mapping[str, str] = {},
) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = environment.environment(device)
    out = (environment.default_out() if out is None else out).absolute()
    path = environment.result_path(out, ["hardware"], record)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem.removeprefix("hardware-")
    places = {"out": str(out), "dir": str(path.parent), "stem": stem}
    start, verdicts = time.monotonic(), {}

    def save() -> None:
        environment.write(path, {"kind": "parts of fqt_bench.hardware", "environment": record, "wheels": dict(carried),
                                 "parts": verdicts})  # fmt: skip

    for name, part in some.items():
        left = limit_s - (time.monotonic() - start)
        found = {pattern: newest(path.parent, pattern) for pattern in part.reads}
        results = list(filter(None, found.values()))
        lacks = "".join(f"no result {pattern}; " for pattern, result in found.items() if result is None).rstrip("; ")
        if part.missing or left < LEAST_S or (lacks and not results):
            why = part.missing or (f"{max(left, 0):.0f} s are left" if left < LEAST_S else lacks)
            verdicts[name] = {"status": "not run", "why": why}
            continue
        names = [result.name for result in results]
        print(f"== {name}: python {' '.join(part.arguments)}{': ' * bool(names)}{', '.join(names)}", flush=True)
        log = path.parent / f"{name}-{stem}.log"
        seen = peers if carried and part.group in PEERS else None
        verdicts[name] = run(part, log, min(part.seconds, left), places, root, results, seen)
        verdicts[name] |= {"results": names} if names else {}
        verdicts[name] |= {"why": lacks} if lacks else {}
        save()
    save()
    rows = [(name, v["status"], f"{v['seconds']:.0f} s" if "seconds" in v else "", v.get("why", ""))
            for name, v in verdicts.items()]  # fmt: skip
    print(table(("part", "status", "time", ""), rows, right=(2,)))
    print(f"results: {path.parent}")
    return int(any(v["status"] in ("failed", "out of time") for v in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
