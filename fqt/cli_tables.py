"""`fqt tune show | export | merge | clear`: the tables that tuning makes. Standard library only, until a command runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import UsageError, table

if TYPE_CHECKING:
    from .store import Machine
    from .tuned import Entry


def add(tune: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `fqt tune`."""
    verbs = tune.add_subparsers(metavar="show | export | merge | clear", title="tables")

    def verb(name: str, command, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=f"{text.capitalize()}.")
        # Not to overwrite what `fqt tune --json show` says.
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text")
        parser.add_argument("--file", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="the table")
        parser.set_defaults(command=command)
        return parser

    verb("show", _show, "print the tuned tables of this user, or the one in --file")
    export = verb("export", _export, "write a table, as the package ships them, to a new file")
    export.add_argument("target", type=Path, metavar="FILE")
    merge = verb("merge", _merge, "add the valid entries of files to the tables of the machines they are of")
    merge.add_argument("sources", type=Path, nargs="+", metavar="FILE")
    clear = verb("clear", _clear, "remove this machine's table, or the one in --file, or all")
    clear.add_argument("--all", action="store_true", help="the tables of all machines in the cache directory")


def us(ns: int) -> str:
    return f"{ns / 1e3:.1f}"


def ratio(other_ns: int | None, ns: int) -> str:
    return f"{other_ns / ns:.2f}" if other_ns else ""


def this_machine() -> Machine | None:
    import torch

    from .store import Machine

    if not torch.cuda.is_available():
        return None
    return Machine.of(torch.device("cuda", torch.cuda.current_device()))


def _machine_of(file: Path) -> Machine:
    """The machine that a file's table is of. Raises UsageError where it holds none."""
    from . import store

    if not file.exists():
        raise UsageError(f"{file}: no such file")
    try:
        return store.machine_of(file)
    except ValueError as e:
        raise UsageError(str(e)) from e


def _tables(args: argparse.Namespace) -> list[Path]:
    """The file that was named, or all tables in the cache directory."""
    from . import store

    if args.file is not None:
        return [args.file]
    return sorted(store.directory().glob("*.json"))


def _named(machine: Machine) -> str:
    versions = f"driver {machine.driver or 'unknown'}, Triton {machine.triton or 'unknown'}, torch {machine.torch}"
    return f"{machine.gpu} ({machine.arch}, {machine.processors} processors; {versions})"


def _show(args: argparse.Namespace) -> int:
    from . import store

    with plain_warnings():
        here, shown = this_machine(), []
        for file in _tables(args):
            try:
                machine = _machine_of(file)
            except UsageError as e:
                if args.file is not None:
                    raise
                print(f"fqt: {e}", file=sys.stderr)
                continue
            shown.append((str(file), machine, list(store.load(machine, file=file))))
        if here is not None and args.file is None:
            shown.append(("shipped with fqt", here, list(store.shipped(here))))
    if args.json:
        print(json.dumps([_table_json(*entry, here) for entry in shown], indent=1))
        return 0
    if not shown:
        print(f"no tuned table in {store.directory()}: `fqt tune` on a machine with a GPU makes one")
    for i, (file, machine, entries) in enumerate(shown):
        mine = ", this machine" if machine == here else ""
        print("\n" * (i > 0) + f"{_named(machine)}{mine}\n{file}: {len(entries)} entries")
        if entries:
            header = ("problem", "chosen", "µs", "× bf16", "TOPS", "runner-up")
            print(table(header, [_row(entry) for entry in sorted(entries)], right=(2, 3, 4)))
    return 0


def _table_json(file: str, machine: Machine, entries: list[Entry], here: Machine | None) -> dict[str, Any]:
    from dataclasses import asdict

    from .tuned import to_json

    return {"file": file, "machine": asdict(machine), "this_machine": machine == here,
            "entries": [to_json(entry) for entry in entries]}  # fmt: skip


def _row(entry: Entry) -> tuple[str, ...]:
    """problem, chosen, µs, times bf16's speed, rate, and the next in the ranking with what it loses."""
    from .conv_problems import count
    from .tuned import PRODUCTS
    from .tuner_cases import title

    key, (m, n, k), (best, *others) = entry.key, entry.exact, entry.ranking
    product = key.op in PRODUCTS
    sizes = "x".join(map(str, (m, n, k) if k else (m, n)))
    name = " ".join(filter(None, (key.op, key.format, key.dtype, key.kind, sizes)))
    rate = f"{2e-3 * m * n * k * count(key.kind, 'groups') / max(best.ns, 1):.0f}" if product else ""
    next_best = f"{title(others[0])} {others[0].ns / max(best.ns, 1):.2f}×" if others else ""
    return name, title(best), us(best.ns), ratio(entry.bf16_ns, max(best.ns, 1)), rate, next_best


def _only_table(args: argparse.Namespace, verb: str) -> Path:
    """The table that a verb is about: --file, else this machine's, else the only one there is."""
    from . import store

    if args.file is not None:
        return args.file
    if (here := this_machine()) is not None:
        return store.path(here)
    tables = _tables(args)
    if len(tables) != 1:
        names = "".join(f"\n  {file}" for file in tables)
        found = f"{len(tables)} in {store.directory()}{names}"
        raise UsageError(f"{verb}: no GPU here, so name a table with --file; {found}")
    return tables[0]


def _export(args: argparse.Namespace) -> int:
    """The valid entries of a table into a new file, of the store's own format."""
    import tempfile

    from . import store

    source = _only_table(args, "export")
    if args.target.exists():
        raise UsageError(f"{args.target}: there is such a file already; `fqt tune merge --file` adds to one")
    machine = _machine_of(source)
    with plain_warnings(), tempfile.TemporaryDirectory() as folder:
        entries = list(store.load(machine, file=source))
        if not entries:
            raise UsageError(f"{source}: no entry that is valid for the present kernels")
        if not store.save(
            machine, entries, file=Path(folder) / "table.json"
        ):  # beside it lies a lock, which stays there
            raise UsageError(f"{folder}: cannot be written")
        try:
            args.target.write_bytes((Path(folder) / "table.json").read_bytes())
        except OSError as e:
            raise UsageError(f"{args.target}: {e.strerror or e}") from e
    return _say(args, {"file": str(args.target), "of": str(source), "entries": len(entries)},
                f"{args.target}: {len(entries)} entries of {_named(machine)}")  # fmt: skip


def _merge(args: argparse.Namespace) -> int:
    """Exit status 1 where a file gave nothing, or an entry of it was refused."""
    from . import store

    found, texts, failed = [], [], False
    with plain_warnings():
        for file in args.sources:
            machine = _machine_of(file)
            before = Counter(store.counts())
            entries = list(store.load(machine, file=file))
            refused = {why: n for why, n in (Counter(store.counts()) - before).items()
                       if why.startswith(("refused", "stale"))}  # fmt: skip
            into = args.file or store.path(machine)
            saved = bool(entries) and store.save(machine, entries, file=args.file)
            failed |= not saved or any(why.startswith("refused") for why in refused)
            found.append(
                {"file": str(file), "into": str(into), "taken": len(entries) if saved else 0, "refused": refused}
            )
            text = f"{file}: {len(entries) if saved else 0} entries of {_named(machine)} taken into {into}"
            texts.append("; ".join([text, *(f"{n} {why}" for why, n in refused.items())]))
    _say(args, found, "\n".join(texts))
    return int(failed)


def _clear(args: argparse.Namespace) -> int:
    from . import store

    if args.all and args.file is not None:
        raise UsageError("--all and --file exclude each other")
    files = [file for file in _tables(args) if not args.all or _is_table(file)]
    if files and not args.all:
        files = [_only_table(args, "clear")]
    removed = []
    for file in files:
        if not args.all and not file.exists():
            continue
        if args.file is not None:
            _machine_of(file)  # nothing but a table is removed
        try:
            with store.locked(file):  # whose file stays: who waits for it would be alone with the old one
                file.unlink()
        except OSError as e:
            raise UsageError(f"{file}: {e.strerror or e}") from e
        removed.append(str(file))
    where = args.file or store.directory()
    return _say(args, {"removed": removed}, "\n".join(f"removed {file}" for file in removed) or f"no table in {where}")


def _is_table(file: Path) -> bool:
    """Whether a file of the cache directory, which may be any folder of the user's, is a table or a damaged one."""
    from . import store

    with contextlib.suppress(ValueError):
        return bool(store.NAME.fullmatch(file.name) or store.machine_of(file))
    return False


def _say(args: argparse.Namespace, data: Any, text: str) -> int:
    print(json.dumps(data, indent=1) if args.json else text)
    return 0


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, warnings of fqt's own are lines on stderr like other messages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="fqt: ")
        show = warnings.showwarning

        def plain(message, category, *rest: Any, **more: Any) -> None:
            if str(message).startswith("fqt: "):
                print(message, file=sys.stderr)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = plain
        yield
