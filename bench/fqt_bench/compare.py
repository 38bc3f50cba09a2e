"""`fqt bench compare BASE HEAD`: is HEAD slower, or does it need more? Exact counters, and timings against stored noise."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .counters import Change, Counters
    from .gate import Timing
    from .trees import Tree

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tree = "a git revision, or a folder that holds fqt: a checkout, or what pip install --target made"
    parser.add_argument("base", metavar="BASE", help=f"what to compare with: {tree}")
    parser.add_argument(
        "head", metavar="HEAD", help='what may have become slower, likewise; "." for the current folder'
    )
    parser.add_argument("--repo", default=".", metavar="DIR", help="the repository of the revisions")
    parser.add_argument("--suite", choices=("smoke", "full"), default="smoke",
                        help="the counters of a launch or two of each kernel, or of all launches and GPUs")  # fmt: skip
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--counters-only", action="store_true", help="time nothing: the result depends on no machine")
    parts.add_argument("--timings-only", action="store_true", help="count nothing")
    parser.add_argument(
        "--only", metavar="PATTERN", help="names that contain this; * and ? stand for any text or letter"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=3, metavar="N", help="pairs of fresh processes of each timing"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for compare.json: everything that was measured")
    parser.add_argument("--noise", metavar="FILE", help="where this machine's noise is kept, instead of fqt's cache")
    parser.add_argument("--tolerance", action="append", metavar="COUNTER=PERCENT",
                        help="let a counter grow by so much, e.g. instructions=2; may be given several times")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print compare.json instead of a summary in markdown")


def _positive(text: str) -> int:
    from fqt.cli import positive

    return positive(text)


def run(args: argparse.Namespace) -> int:
    """0: no regression. 1: at least one, named on stdout. 2: nothing could be counted, or timed, that was to be.

    Raises:
        fqt.cli.UsageError: an unknown revision or folder, a wrong tolerance, nothing that matches --only.
    """
    from fqt.cli import MISTAKE

    from . import summary
    from .noise import default_path
    from .trees import materialize

    tolerance = _tolerance(args.tolerance or [])
    if args.out:
        _make(Path(args.out))
    if not args.noise and not args.counters_only:
        default_path()  # raises before anything is counted
    with tempfile.TemporaryDirectory(prefix="fqt-bench-") as folder:
        base, head = (
            materialize(spec, Path(args.repo), Path(folder) / side)
            for side, spec in (("base", args.base), ("head", args.head))
        )
        result = compare(base, head, args, tolerance)
    document = summary.document(result)
    if args.out:
        path = Path(args.out) / "compare.json"
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)
    print(json.dumps(document, indent=1, allow_nan=False) if args.json else summary.markdown(result))
    if not result.regressions and result.blind:
        print(f"fqt bench compare: nothing could be compared: no {' and no '.join(result.blind)}", file=sys.stderr)
        return MISTAKE
    return 1 if result.regressions else 0


def _make(folder: Path) -> None:
    from fqt.cli import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UsageError(f"--out {folder}: {e.strerror or e}") from e


@dataclass(frozen=True)
class Comparison:
    """counters: of base and of head, with their differences; None where nothing was counted. timings: None likewise."""

    base: Tree
    head: Tree
    date: str
    environment: dict
    counters: tuple[Counters, Counters, list[Change]] | None
    timings: list[Timing] | None

    @property
    def broken(self) -> dict[str, str]:
        """Counters that fail in head and not in base."""
        if self.counters is None:
            return {}
        before, after, _ = self.counters
        return {name: reason for name, reason in after.failed.items() if name not in before.failed}

    @property
    def blind(self) -> list[str]:
        """What was to be compared, "counter" or "timing", and is known of neither tree."""
        before, after = self.counters[:2] if self.counters else (None, None)
        tried = self.counters and any((before.unknown, before.failed, after.unknown, after.failed))
        uncounted = tried and not before.entries and not after.entries
        untimed = self.timings and not any(t.first.timed for t in self.timings)
        return ["counter"] * bool(uncounted) + ["timing"] * bool(untimed)

    @property
    def regressions(self) -> list[str]:
        """One line for each: the name of the benchmark, kernel or step, and what grew."""
        lines = [f"{name}: fails: {reason}" for name, reason in self.broken.items()]
        for c in self.counters[2] if self.counters else []:
            if c.kind == "regression":
                lines.append(f"{c.name}: {c.counter} {c.base} → {c.head}")
        for t in self.timings or []:
            if t.regression:
                why = f"fails: {t.first.failed['head']}" if t.first.failed else "fails when it is measured again"
                grew = f"{100 * math.expm1(t.first.log_ratio):+.1f} % time" if t.status == "regression" else why
                lines.append(f"{t.name}: {grew}")
        return lines


def compare(base: Tree, head: Tree, args: argparse.Namespace, tolerance: dict[str, float]) -> Comparison:
    """Count and time both trees, as the arguments of the command ask.

    Raises:
        fqt.cli.UsageError: nothing matches args.only, or the noise cannot be stored.
    """
    import torch

    from fqt.cli import UsageError

    from . import counters as c
    from .environment import environment
    from .gate import CASES

    record = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [] if args.counters_only else [case for case in CASES if c.matches(args.only, case)]
    counted = None
    if not args.timings_only:
        _say("counting")
        before = c.measure(args.suite, base, args.only)
        after = before if base.digest == head.digest else c.measure(args.suite, head, args.only)
        counted = before, after, c.changes(before.entries, after.entries, tolerance)
    found = counted and any(part for side in counted[:2] for part in (side.entries, side.unknown, side.failed))
    if not cases and not found:
        raise UsageError(f"--only {args.only!r} matches no {'timing' if args.timings_only else 'counter'}")
    timings = None if args.counters_only else _timings(base, head, cases, args, record) if cases else []
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Comparison(base, head, date, record, counted, timings)


def _timings(base: Tree, head: Tree, cases: list[str], args: argparse.Namespace, record: dict) -> list[Timing]:
    from fqt.cli import UsageError

    from . import duel, gate
    from .noise import Noise, default_path

    path = Path(args.noise) if args.noise else default_path()
    machine = " ".join(str(record[key]) for key in ("gpu", "cpu", "host") if record.get(key))
    noise = Noise(path, machine, f"{duel.PROTOCOL}, rounds {args.rounds}")

    try:
        with duel.Arena() as arena:
            fight = functools.partial(duel.duels, arena, rounds=args.rounds, progress=_progress)
            return gate.judge(base, head, cases, noise, fight, _say)
    except OSError as e:
        raise UsageError(f"the noise of this machine cannot be kept in {path}: {e}") from e


def _tolerance(given: list[str]) -> dict[str, float]:
    from fqt.cli import UsageError

    from .counters import GATED

    tolerance = {}
    for text in given:
        name, _, percent = text.partition("=")
        try:
            value = float(percent)
        except ValueError:
            value = math.nan
        if name not in GATED or not 0 <= value < math.inf:
            raise UsageError(f"--tolerance is COUNTER=PERCENT, COUNTER one of {', '.join(GATED)}; got {text!r}")
        tolerance[name] = value
    return tolerance


def _say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)
