"""The command line of benchmarks: `fqt bench`. Standard library only, until a command runs."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of `fqt`."""
