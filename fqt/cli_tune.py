"""The command line of tuning: `fqt tune`, and `fqt tune show | export | merge | clear` for the tables that it makes.

Standard library only, until a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli_tables
from .cli import INTERRUPTED, UsageError, positive, table
from .cli_tables import plain_warnings, ratio, this_machine, us

if TYPE_CHECKING:
    from .collect import Collected, Target

# As in `fqt.suites` and `fqt.tuned`, whose imports would cost `fqt --help` nothing, but need not happen for it.
SUITES = ("llama-8b", "bert-large", "vit-large", "resnet50", "cubes", "resnet50-conv")
DTYPES = ("bfloat16", "float16", "float32")
_BAR = 24  # characters


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of `fqt`."""
    text = "measure every kernel that competes for the shapes you train with, and keep the fastest that is right"
    tune = commands.add_parser("tune", help=text, description=f"{text.capitalize()}.")
    shapes = tune.add_argument_group("shapes (every suite, where none is named)")
    text = f"the layers of some networks: {', '.join(SUITES)} (the last: its convolutions, at batch 256)"
    shapes.add_argument("--suite", nargs="+", action="extend", choices=SUITES, metavar="SUITE", help=text)
    shapes.add_argument("--shapes", metavar="FILE", help='JSON: [{"name": "mlp", "m": 8192, "n": 28672, "k": 4096}, …]')
    text = "a function that returns (model, inputs) or (model, step); one step is run on tensors without data"
    shapes.add_argument("--model", metavar="MODULE:FUNCTION", help=text)
    text = "what to train with (default: int8; of --model, what it is quantized with)"
    shapes.add_argument("--recipe", nargs="+", metavar="RECIPE", help=text)
    text = f"of activations and weights, but for --model: {', '.join(DTYPES)} (default: bfloat16)"
    shapes.add_argument("--dtype", choices=DTYPES, default="bfloat16", metavar="DTYPE", help=text)
    text = "time in all (default: 10); what is left is done by the next run"
    tune.add_argument("--budget", type=_minutes, default=10.0, metavar="MINUTES", help=text)
    tune.add_argument("--force", action="store_true", help="measure again what the table has")
    tune.add_argument(
        "--exhaustive",
        action="store_true",
        help="measure again, beside a large grid of configurations, which is never stored",
    )
    tune.add_argument("--dry-run", action="store_true", help="list the problems and their candidates; needs no GPU")
    tune.add_argument("--arch", metavar="NAME", help="of --dry-run: sm90, gfx942, … (default: this machine's GPU)")
    tune.add_argument("--processors", type=positive, metavar="N", help="of --dry-run: how many that GPU has")
    text = "the table to add to (default: this machine's, in the cache directory)"
    tune.add_argument("--file", type=Path, metavar="FILE", help=text)
    tune.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    tune.set_defaults(command=_tune)
    cli_tables.add(tune)


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (minutes := float(text)) <= 7 * 24 * 60:
            return minutes
    raise argparse.ArgumentTypeError(f"not a number of minutes, above 0 and up to a week: {text!r}")


# ---- fqt tune


def _tune(args: argparse.Namespace) -> int:
    if not args.dry_run and (args.arch or args.processors):
        raise UsageError("--arch and --processors go with --dry-run: only the GPU that is here can be measured")
    if not args.dry_run:
        _require_gpu()
    with plain_warnings():
        return _dry_run(args) if args.dry_run else _run(args)


def _require_gpu() -> None:
    import torch

    from . import dispatch

    instead = ("The problems and candidates of a GPU: fqt tune --dry-run --arch sm90 --processors 132. "
               "Tables of other machines: fqt tune show, export, merge, clear.")  # fmt: skip
    if not torch.cuda.is_available():
        raise UsageError(f"no GPU here (torch.cuda.is_available() is false): kernels cannot be measured. {instead}")
    if dispatch.triton_version() is None:
        raise UsageError(f"Triton is not installed: there are no kernels to measure. {instead}")
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        raise UsageError("TRITON_INTERPRET is set: the interpreter's times say nothing of the GPU's")


def _run(args: argparse.Namespace) -> int:
    import torch

    from . import store, tuner
    from .collect import Target

    device = torch.device("cuda", torch.cuda.current_device())
    collected = _collect(args, Target.of(device))
    _print_notes(collected)
    if not store.save(store.Machine.of(device), [], file=args.file):  # which says why
        raise UsageError("nothing is measured: it could not be saved; --file FILE names another table")
    progress = _Progress()
    report = tuner.tune(
        collected.problems, device, budget_s=60 * args.budget, file=args.file, force=args.force or args.exhaustive,
        exhaustive=args.exhaustive, on_progress=progress,
    )  # fmt: skip
    progress.clear()
    if report.interrupted and not args.json:
        print(summary(report), file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(report.to_json(), indent=1, allow_nan=False) if args.json else summary(report))
    return INTERRUPTED if report.interrupted else _status(report)


def _status(report) -> int:
    """1 where a kernel was wrong, nothing could be measured, or what was measured could not be kept."""
    nothing = bool(report.results) and not report.tuned
    return int(nothing or report.unsaved > 0 or any(result.wrong for result in report.results))


def _collect(args: argparse.Namespace, target: Target) -> Collected:
    """The problems of everything that was asked for: suites, shapes and a model."""
    from . import collect, suites

    asked = args.suite or ([] if args.shapes or args.model else SUITES)
    asked, recipes = dict.fromkeys(asked), list(dict.fromkeys(args.recipe or ["int8"]))
    layers = collect.read_shapes(args.shapes) if args.shapes else []
    try:
        met = list(suites.problems(asked, target, recipes, args.dtype).items())
        met += collect.of_layers(layers, target, recipes, args.dtype).items()
    except ValueError as e:
        raise UsageError(f"--recipe: {e}") from e
    collected = collect.of_model(args.model, target, args.recipe) if args.model else collect.Collected({})
    collected.problems = collect.by_key([*met, *collected.problems.items()])
    if not collected.problems:
        raise UsageError(f"nothing to tune: recipe {' '.join(recipes)} has no quantized products of these layers")
    return collected


def _print_notes(collected: Collected) -> None:
    if collected.layers:
        layers = f"{collected.layers} quantized layer{'s' * (collected.layers > 1)}"
        print(f"fqt tune: the model has {layers}", file=sys.stderr)
    for note in collected.notes:
        print(f"fqt tune: {note}", file=sys.stderr)


def summary(report) -> str:
    """The report as text: a row for each problem, and what came of the rest."""
    from .tuner_cases import describe, title

    rows, exhaustive = [], any(result.best_of_grid for result in report.results)
    for result in report.results:
        row = [describe(result.problem), str(result.count)]
        if result.entry is None:
            rows.append((*row, result.error, *[""] * (4 + exhaustive)))
            continue
        best = result.chosen
        of_grid = f"{min(best.ns, result.best_of_grid[1]) / best.ns:.3f}" if result.best_of_grid else ""
        row += [title(best), us(best.ns), ratio(result.heuristic_ns, best.ns), ratio(result.entry.bf16_ns, best.ns)]
        rows.append((*row, str(len(result.excluded) or ""), *[of_grid] * exhaustive))
    header = ("problem", "count", "chosen", "µs", "× heuristic", "× bf16", "excluded", *["of the best"] * exhaustive)
    parts = [table(header, rows, right=(1, *range(3, len(header))))] if rows else []
    parts += [f"excluded from {describe(r.problem)}: {name}: {why}"
              for r in report.results if r.entry for name, why in r.excluded.items()]  # fmt: skip
    lines = [f"{len(report.tuned)} problems tuned, {report.known} known already, {len(report.remaining)} left"]
    if failed := len(report.results) - len(report.tuned):
        lines[0] += f", {failed} failed"
    if report.unsaved:
        lines.append(f"{report.unsaved} entries could not be saved")
    if report.results or report.stopped:
        lines.append(f"{report.compile_s:.1f} s compiling ahead, {report.measure_s:.1f} s measuring")
    if report.stopped and report.remaining:
        lines.append(f"{report.stopped}: run the command again to go on")
    elif report.stopped:
        lines.append(report.stopped)
    return "\n".join([*parts, *lines])


class _Progress:
    """A bar with the best so far on a terminal, rewritten in place; elsewhere a line for each result."""

    def __init__(self) -> None:
        self._terminal, self._said, self._begun = sys.stderr.isatty(), 0, False

    def __call__(self, report, total: int, stage: str) -> None:
        done = len(report.results)
        if self._terminal:
            filled = _BAR * done // max(total, 1)
            best = f"  best so far: {_brief(report.tuned[-1])}" if report.tuned else ""
            self._write(f"[{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total} {stage}{best}")
            return
        for number, result in enumerate(report.results[self._said :], self._said + 1):
            print(f"fqt tune: {number}/{total} {_brief(result)}", file=sys.stderr, flush=True)
        if not self._begun:
            print(f"fqt tune: {stage}", file=sys.stderr, flush=True)
        self._said, self._begun = done, True

    def clear(self) -> None:
        if self._terminal:
            self._write("")

    def _write(self, text: str) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)


def _brief(result) -> str:
    """One result in a line."""
    from .tuner_cases import describe, title

    if result.entry is None:
        return f"{describe(result.problem)}: {result.error}"
    best = result.chosen
    beside = [f"heuristic {us(result.heuristic_ns)}"] if result.heuristic_ns else []
    beside += [f"bf16 {us(result.entry.bf16_ns)}"] if result.entry.bf16_ns else []
    note = f" ({', '.join(beside)})" if beside else ""
    return f"{describe(result.problem)}: {title(best)} {us(best.ns)} µs{note}"


# ---- fqt tune --dry-run


def _dry_run(args: argparse.Namespace) -> int:
    from . import tuned, tuner
    from .candidates import candidates
    from .tuner_cases import describe, title

    target = _target(args)
    collected = _collect(args, target)
    _print_notes(collected)
    known = _known(args)
    found = [
        (problem, collected.problems[problem], candidates(problem)) for problem in tuner.in_order(collected.problems)
    ]
    if args.json:
        print(json.dumps([
            {"problem": describe(problem), "count": count, "tuned": tuned.is_complete(known.exact(problem)),
             "candidates": [title(c) for c in competing]} for problem, count, competing in found
        ], indent=1))  # fmt: skip
        return 0
    rows = [
        (describe(problem), str(count), str(len(competing)),
         title(competing[0]) if competing else "none: the reference computes it",
         "yes" * tuned.is_complete(known.exact(problem)))
        for problem, count, competing in found
    ]  # fmt: skip
    uses = Counter(title(c) for *_, competing in found for c in competing)
    print(table(("problem", "count", "candidates", "heuristic", "tuned"), rows, right=(1, 2)))
    print()
    print(table(("candidate", "problems"), [(name, str(n)) for name, n in sorted(uses.items())], right=(1,)))
    known_already = sum(tuned.is_complete(known.exact(problem)) for problem, *_ in found)
    print(f"\n{len(found)} problems on {target.arch} with {target.processors} processors, {sum(uses.values())} "
          f"candidates to measure, {known_already} problems tuned already; nothing was run")  # fmt: skip
    return 0


def _target(args: argparse.Namespace) -> Target:
    """The GPU of --arch and --processors, or this machine's."""
    import torch

    from .collect import Target

    if args.arch is None and args.processors is None and torch.cuda.is_available():
        return Target.of(torch.device("cuda", torch.cuda.current_device()))
    if args.arch is None or args.processors is None:
        raise UsageError("--dry-run wants both --arch and --processors, or a GPU: --arch sm90 --processors 132")
    if not re.fullmatch(r"sm\d{2,3}|gfx[0-9a-f]{3,5}", args.arch):
        raise UsageError(f"--arch wants a name such as sm90 or gfx942, got {args.arch!r}")
    return Target(args.arch, args.processors)


def _known(args: argparse.Namespace):
    """What is tuned already, of the machine that a dry run is about; nothing of a GPU that is not here."""
    from . import store, tuned

    machine = this_machine() if args.arch is None else None
    return tuned.EMPTY if machine is None else store.load(machine, file=args.file)
