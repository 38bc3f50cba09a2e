"""The command line: `fqt` and `python -m fqt`. stdout is data; progress and errors go to stderr.

Exit status: 0 done, 1 a check failed, 2 a mistake in the call, 130 interrupted. Nothing but the standard library is
imported before a command runs, so that `fqt --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__

MISTAKE = 2
INTERRUPTED = 130


class UsageError(Exception):
    """A mistake of the user's: its message is printed as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as e:  # argparse has printed help, the version or the mistake
        return e.code if isinstance(e.code, int) else MISTAKE
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± still gets its table
    try:
        status = args.command(args)
        sys.stdout.flush()
        return status
    except UsageError as e:
        print(f"fqt: {e}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:
        # The reader went away (`fqt doctor | head`). Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fqt: interrupted", file=sys.stderr)
        return INTERRUPTED


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Text in columns of equal width, the header underlined; the columns numbered in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fqt", description="Fully quantized training in PyTorch with Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fqt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "train a small network on real digits under several recipes; compare accuracy and gradient variance"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".", formatter_class=Defaults)
    demo.add_argument("--epochs", type=positive, default=8, help="passes over the training set")
    demo.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each recipe")
    demo.add_argument(
        "--bits",
        type=_bits,
        nargs="+",
        default=[2],
        metavar="B",
        help="gradient bits, 2 to 8, beside the 8-bit recipes",
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    demo.add_argument("--out", default="fqt-demo", metavar="DIR", help="folder for demo.json and demo.png")
    demo.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    demo.set_defaults(command=_demo)

    text = (
        "print versions and devices; check every kernel on this device against the reference; say which backend is used"
    )
    doctor = commands.add_parser("doctor", help=text, description=text.capitalize() + ".", formatter_class=Defaults)
    options = {
        "only": ("PATTERN", str, "only checks whose 'KERNEL: case', or KERNEL alone, is like this; * and ? as in files"),
        "repeat": ("N", positive, "launch every kernel N more times on the same memory and compare every byte; what kernels "
                   "write lies between guard bands"),
        "out": ("FILE", str, "write the report as JSON, with the environment, beside what is printed; anew after every "
                "check"),
    }  # fmt: skip
    for name, (metavar, kind, text) in options.items():
        doctor.add_argument(f"--{name}", metavar=metavar, type=kind, default=argparse.SUPPRESS, help=text)
    doctor.add_argument("--json", action="store_true", help="print the report as JSON instead of text")
    doctor.set_defaults(command=_doctor)

    from . import cli_bench, cli_tune

    cli_tune.add(commands)
    cli_bench.add(commands)
    return parser


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that take a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 else super()._get_help_string(action)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a whole number of at least 1: {text!r}")
    return int(text)


def _bits(text: str) -> int:
    if text not in ("2", "3", "4", "5", "6", "7", "8"):
        raise argparse.ArgumentTypeError(f"bits must be an integer from 2 to 8, got {text!r}")
    return int(text)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    result = demo.run(epochs=args.epochs, seeds=args.seeds, bits=args.bits, device=args.device, out=args.out)
    print(json.dumps(result, indent=1, allow_nan=False) if args.json else demo.summary(result))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    given = vars(args)
    out = {"out": doctor.writable(given["out"])} if "out" in given else {}
    report = doctor.run(**{name: given[name] for name in ("repeat", "only") if name in given}, **out)
    print(json.dumps(report, indent=1, allow_nan=False) if args.json else doctor.summary(report), flush=True)
    if report.get("stopped") == "interrupted":
        return INTERRUPTED
    return 0 if report["ok"] else 1
