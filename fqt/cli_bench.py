"""The command line of benchmarks: `fqt bench`. Standard library only, until a command runs.

The subcommands' options are those of `fqt_bench.compare` and `fqt_bench.page`, which are imported when one is called.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .cli import Defaults

SUITES = ("smoke", "kernels", "layers", "optim", "train", "householder", "conv")
BUDGET_S = 420.0
_DAY_S = 86_400.0
_SUBCOMMANDS = {
    "compare": ("fqt_bench.compare", "two revisions in one job: exact counters and interleaved timings"),
    "report": ("fqt_bench.page", "markdown and one HTML page of the results of runs"),
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of `fqt`."""
    text = "measure the library on this machine: correctness before every number, one JSON file a run"
    bench = commands.add_parser("bench", help=text, description=_sentence(text), formatter_class=_Help)
    bench.add_argument(
        "--suite", nargs="+", choices=SUITES, default=["smoke"], metavar="SUITE",
        help="of smoke (every operator once and the noise-free counters: a minute, no GPU needed), kernels, layers, optim, "
        "train, householder, conv (default: smoke)",
    )  # fmt: skip
    bench.add_argument(
        "--out", metavar="DIR", help="folder of results (default: bench/results in a checkout, else fqt-bench)"
    )
    budget = bench.add_mutually_exclusive_group()
    budget.add_argument("--budget", dest="budget_s", type=_minutes, default=BUDGET_S, metavar="MINUTES",
                        help=f"time in all, compilation included (default: {BUDGET_S / 60:.0f})")  # fmt: skip
    budget.add_argument("--budget-s", type=_seconds, default=argparse.SUPPRESS, metavar="N", help="the same in seconds")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    bench.add_argument("--quick", action="store_true", help="smaller shapes and fewer rounds on a GPU")
    bench.add_argument(
        "--no-trial", action="store_true", help="leave out the trial run, which compiles in parallel on a GPU"
    )
    bench.add_argument(
        "--only", metavar="PATTERN", help="only cases with this in their name and shape; * and ? as in files"
    )
    bench.add_argument(
        "--benchmark-json", metavar="FILE", help="write the samples for pytest-benchmark compare as well"
    )
    bench.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    bench.set_defaults(command=_bench)
    subcommands = bench.add_subparsers(metavar="compare | report", parser_class=_Imported)
    for name, (module, what) in _SUBCOMMANDS.items():
        subcommands.add_parser(name, help=what, description=_sentence(what), formatter_class=_Help, module=module)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


class _Help(Defaults):
    """Leaves out the defaults that an option's help says in its own words, and those that are none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or "(default: " in (action.help or "")
        return action.help if said else super()._get_help_string(action)


class _Imported(argparse.ArgumentParser):
    """A parser whose options are those of a module that is imported when it is to parse."""

    def __init__(self, *args: Any, module: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._module = module

    def parse_known_args(self, args=None, namespace=None):
        if self._module:
            module, self._module = importlib.import_module(self._module), ""
            module.add_arguments(self)
            self.set_defaults(command=module.run)
        return super().parse_known_args(args, namespace)


def _bench(args: argparse.Namespace) -> int:
    from fqt_bench import run

    args.suite = list(dict.fromkeys(args.suite))
    return run.main(args)


def _minutes(text: str) -> float:
    return 60 * _positive(text, "minutes", _DAY_S / 60)


def _seconds(text: str) -> float:
    return _positive(text, "seconds", _DAY_S)


def _positive(text: str, unit: str, limit: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < limit:
        raise argparse.ArgumentTypeError(f"not a number of {unit} between 0 and a day's: {text!r}")
    return value
