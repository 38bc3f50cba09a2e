"""The README's table of what was measured on GPUs, from the results in bench/results.

    python -m fqt_bench.readme [--check | --write] [--results DIR] [--out FILE]

Without an option it prints the table. --check: exit 1 where the README has another one. --write: put it there. Of each GPU a
shape is taken from the newest run that has it, losses of int8 like gains. The same results give the same text.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fqt.cli import MISTAKE, UsageError
from fqt.suites import CONVOLUTIONS, SUITES

from . import convs, environment, facts, wholes
from .facts import Machine, Measured, is_host_bound, is_ok, sizes
from .products import DISPATCHED
from .reading import OTHER, Refused, Run, find, load
from .stats import speed_ups
from .targets import BF16, GEMM, LINEAR, digits
from .wholes import Whole

BEGIN = "<!-- measured on GPUs: written by python -m fqt_bench.readme --write -->"
END = "<!-- measured on GPUs: end -->"
NOTHING = """\
Not measured on a GPU yet. `make gpu` on a machine with one measures, and `python -m fqt_bench.readme --write` writes the
table here, from `bench/results/<gpu>/`."""
ABOUT = """\
Medians, all of a row from one run. "int8 over bf16" is bf16's time over int8's, with its 95 % interval: above 1 int8 is
faster. bf16 is the faster of eager and compiled, int8 what dispatch takes; the columns that follow are ratios to bf16."""
TITLES = {GEMM: "Products, C = A Bᵀ, with scales in the epilogue", LINEAR: "Linear layers, forward and backward"}
# Column: the tag of others' candidates, or of other recipes.
OTHERS = {
    GEMM: {"`torch._int_mm`": "_int_mm", "`_int_mm`, scales, compiled": "_int_mm compiled",
           "fp8 `torch._scaled_mm`": "_scaled_mm fp8", "fqt fp8": "fp8"},
    LINEAR: {"fqt psq8": "psq8", "fqt fp8": "fp8", "torchao int8": "torchao", "torchao fp8": "torchao fp8"},
}  # fmt: skip
METHODS = ("T7", "T8")  # targets of the step of PSGD and of BHQ
WHOLES = "end-to-end-*.json"
NETWORKS = {"llama-8b": "Llama-8B", "bert-large": "BERT-L", "vit-large": "ViT-L/16"}
Candidate = dict[str, Any]
Figures = dict[str, Any]


# ---- the text


def block(runs: Iterable[Run], trained: Iterable[Whole] = ()) -> str:
    """What stands between the markers, as markdown. trained: results of `fqt_bench.end_to_end`, those of a GPU count."""
    gpus = [machine for machine in facts.machines(runs) if machine.is_gpu]
    parts = [part for machine in gpus for part in _machine(machine)]
    parts += map(_whole, wholes.newest(trained))
    return "\n\n".join([ABOUT, *parts]) if parts else NOTHING


def _whole(whole: Whole) -> str:
    """Whole training steps: one table for all networks, candidates without figures with the reason."""
    rule = ["---:" if i in wholes.RIGHT else "---" for i in range(len(wholes.HEADER))]
    lines = [wholes.HEADER, rule, *([_plain(cell) for cell in row] for row in whole.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {_plain(whole.gpu)}: whole training steps\n\n{_plain(whole.versions)}.\n\n{table}"


def _machine(machine: Machine) -> Iterator[str]:
    """Nothing where the GPU has none of products, layers, convolutions, and figures of PSGD's step and of BHQ."""
    tables = {suite: [row for m in machine.cases() if (row := _row(m, suite))] for suite in TITLES}
    figures = [v for v in facts.verdicts(machine) if v.name in METHODS and v.value]
    kinds = [convs.title(network) for network in CONVOLUTIONS]
    convolved = [m for m in machine.cases() if m.case["suite"] in kinds and _fastest(m.case, (*BF16, *convs.RECIPES))]
    measured = [
        *(row.run for rows in tables.values() for row in rows),
        *(v.run for v in figures),
        *(m.run for m in convolved),
    ]
    runs = list(dict.fromkeys(run.file for run in measured))
    if not runs:
        return
    yield f"### {_plain(machine.name)}"
    yield _runs([next(run for run in machine.runs if run.file == file) for file in runs])
    for suite, rows in tables.items():
        if rows:
            ratios = [row.ratio[0] for row in rows if row.ratio]
            gains = f"{TITLES[suite]}; int8 is faster in {sum(r > 1 for r in ratios)} of {len(ratios)}:"
            yield f"{gains}\n\n{_table(suite, rows, runs)}"
    if figures:
        yield f"A step of PSGD (T7), and what BHQ costs (T8):\n\n{_figures(figures, runs)}"
    for network in CONVOLUTIONS:
        if rows := convs.rows(network, (m.case for m in convolved)):
            yield _convolutions(network, rows)


def _convolutions(network: str, rows: Sequence[convs.Row]) -> str:
    """By recipe: in how many shapes it is faster than bf16, and the time of all layers, each as often as there is one."""
    layers, total = [row for row in rows if row.of], next((row for row in rows if row.of is None), None)
    said = []
    for recipe in convs.RECIPES:
        ratios = [ratio for row in layers if (ratio := row.ratio(recipe))]
        if not ratios:
            continue
        said.append(f"{recipe} is faster in {sum(ratio > 1 for ratio in ratios)} of {len(ratios)} shapes")
        if total and (over := total.ratio(recipe)):
            ms = f"{digits(total.ours[recipe])} ms instead of {digits(total.bf16)}"
            said[-1] += f", all {total.count} convolutions together take {ms} ({over:.2f}×)"
    if judged := [row.wrong for row in layers if row.wrong is not None]:
        said.append(f"the cost model was wrong about int8 in {sum(judged)} of {len(judged)}")
    what = (
        f"Convolutions of {network}, batch {layers[0].of.n}, forward and backward, against cuDNN's bf16, channels_last"
    )
    return f"{what}: {'; '.join(said) or 'no figure'}."


def _figures(figures: Sequence[facts.Verdict], runs: Sequence[str]) -> str:
    """Of targets: what was measured, the bound, and whether it is met."""
    lines = [("", "figure", "measured", "target", "", "run"), ("---", "---", "---:", "---:", "---", "---:")]
    lines += [(v.name, v.what, v.value, v.bound, v.verdict, str(runs.index(v.run.file) + 1)) for v in figures]
    return "\n".join(f"| {' | '.join(line if len(runs) > 1 else line[:-1])} |" for line in lines)


def _runs(runs: Sequence[Run]) -> str:
    """Versions, date and commit of each; numbered where there are several."""
    texts = []
    for i, run in enumerate(runs, 1):
        e = run.result["environment"]
        versions = f"driver {e['driver']}, torch {e['torch']}, Triton {e['triton']}"
        number = f"({i}) " if len(runs) > 1 else ""
        texts.append(_plain(f"{number}{versions}, {run.date[:10]}, commit {run.commit}"))
    return f"{'; '.join(texts)}."


class Row(NamedTuple):
    """bf16 and int8: candidates of the case, None where they have no figure. ratio: (value, low, high) of int8. fastest: of
    all of fqt's that compute the same bits; None where nothing but `int8` was tried. others: ratios by column."""

    run: Run
    shape: tuple[int, ...]
    bf16: Candidate | None
    int8: Candidate | None
    ratio: tuple[float, float, float] | None
    fastest: float | None
    others: Mapping[str, float]


def _row(m: Measured, suite: str) -> Row | None:
    """None of a case that is of another suite, or has no figure of int8 or bf16."""
    case, shape = m.case, sizes(m.case["shape"])
    if case["suite"] != suite or len(shape) != 3:
        return None
    own, _ = facts.PAIRS[suite]
    bf16, tried = _fastest(case, BF16), [c for c in case["candidates"] if is_ok(c) and c["tag"] in own]
    int8 = next((c for c in tried if (DISPATCHED in c["name"] if suite == GEMM else c["tag"] == "int8")), None)
    if bf16 is None and int8 is None:
        return None
    others = {title: c for title, tag in OTHERS[suite].items() if (c := _fastest(case, (tag,)))}
    return Row(m.run, shape, bf16, int8, _ratio(case, bf16, int8), _over(bf16, _fastest(case, own)) if tried[1:] else None,
               {title: ratio for title, c in others.items() if (ratio := _over(bf16, c))})  # fmt: skip


def _fastest(case: dict[str, Any], tags: Sequence[str]) -> Candidate | None:
    found = [c for c in case["candidates"] if is_ok(c) and c["tag"] in tags]
    return min(found, key=lambda c: c["ms"]["median"], default=None)


def _over(bf16: Candidate | None, other: Candidate | None) -> float | None:
    return bf16["ms"]["median"] / other["ms"]["median"] if bf16 and other else None


def _ratio(case: dict[str, Any], bf16: Candidate | None, int8: Candidate | None) -> tuple[float, float, float] | None:
    """That which the run recorded, where bf16 is the case's baseline; else from the samples of the same rounds."""
    if bf16 is None or int8 is None:
        return None
    if bf16["name"] == case["baseline"] and "ratio" in int8:
        return tuple(int8["ratio"][end] for end in ("value", "low", "high"))
    return tuple(speed_ups(bf16["samples_ms"], {"int8": int8["samples_ms"]})["int8"])


def _table(suite: str, rows: Sequence[Row], runs: Sequence[str]) -> str:
    """Columns without an entry are left out."""
    columns = {"M × N × K": lambda row: " × ".join(map(str, row.shape)), "of": lambda row: _names(suite).get(row.shape, ""),
               "bf16, ms": lambda row: _ms(row.bf16), "fqt int8, ms": lambda row: _ms(row.int8),
               "int8 over bf16": lambda row: _interval(row.ratio), "TOPS": lambda row: _tops(row.int8),
               "fastest of fqt's": lambda row: _times(row.fastest)}  # fmt: skip
    columns |= {title: lambda row, title=title: _times(row.others.get(title)) for title in OTHERS[suite]}
    if len(runs) > 1:
        columns["run"] = lambda row: str(runs.index(row.run.file) + 1)
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    shown = {title: entries for title, entries in cells.items() if any(entry not in ("", "–") for entry in entries)}
    lines = [list(shown), ["---" if title in ("M × N × K", "of") else "---:" for title in shown]]
    lines += map(list, zip(*shown.values(), strict=True))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(candidate: Candidate | None) -> str:
    if candidate is None:
        return "–"
    return f"{digits(candidate['ms']['median'])}{' (host-bound)' * is_host_bound(candidate)}"


def _tops(candidate: Candidate | None) -> str:
    return digits(candidate["tops"]) if candidate and candidate["tops"] else "–"


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio else "–"


def _interval(ratio: tuple[float, float, float] | None) -> str:
    return "–" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


@functools.cache
def _names(suite: str) -> dict[tuple[int, ...], str]:
    """The layers of networks by shape, and of products those of which it is one of the backward pass."""
    found: dict[tuple[int, ...], list[str]] = {}
    layers = [(f"{title} {layer.name.removesuffix(f' {layer.m}')}", layer[1:])
              for suite_, title in NETWORKS.items() for layer in SUITES[suite_]]  # fmt: skip
    for name, shape in layers:
        found.setdefault(shape, []).append(name)
    for name, (m, n, k) in layers if suite == GEMM else ():
        for kind, shape in (("dgrad", (m, k, n)), ("wgrad", (n, k, m))):
            found.setdefault(shape, [f"{name}, {kind}"])
    return {shape: "; ".join(names) for shape, names in found.items()}


def _plain(text: str) -> str:
    """Text of a result, which may come from anywhere: nothing in it is markup."""
    return re.sub(r"([\\`*\[\]<>|#&!~])", r"\\\1", text)


# ---- the file


def put(text: str, table: str) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: it has not exactly one of each, in their order.
    """
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one line {BEGIN!r}, and after it one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def results(folder: Path) -> list[Run]:
    """The results in a folder, those in its folders named cpu left out; what is refused is said on stderr.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"--results {folder}: no such folder")
    runs, refused = load(path for path in find([folder]) if path.parent.name != "cpu")
    for path, reason in refused:
        if not reason.startswith(OTHER):  # studies and verdicts lie there too
            print(f"fqt_bench.readme: {path}: {reason}", file=sys.stderr)
    return runs


def whole_results(folder: Path) -> list[Whole]:
    """The results of `fqt_bench.end_to_end` in a folder's folders; what is none is said on stderr."""
    found = []
    for path in sorted(folder.glob(f"*/{WHOLES}")):
        try:
            found.append(wholes.read(path))
        except Refused as e:
            print(f"fqt_bench.readme: {path}: {e}", file=sys.stderr)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.readme", description=__doc__.splitlines()[0])
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--check", action="store_true", help="exit 1 where the file has another table")
    act.add_argument("--write", action="store_true", help="put the table into the file")
    parser.add_argument("--results", type=Path, metavar="DIR", help="in place of bench/results")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with the markers, in place of README.md")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except UsageError as e:
        print(f"fqt_bench.readme: {e}", file=sys.stderr)
        return MISTAKE


def _run(args: argparse.Namespace) -> int:
    folder = args.results or environment.default_out()
    table = block(results(folder), whole_results(folder))
    if not (args.check or args.write):
        print(table)
        return 0
    if args.out is None and environment.ROOT is None:
        raise UsageError("there is no README.md without a checkout: --out FILE names a file with the markers")
    path = args.out or environment.ROOT / "README.md"
    try:
        before = path.read_text(encoding="utf-8")
        after = put(before, table)
        if args.write and after != before:
            path.write_text(after, encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UsageError(f"{path}: {e}") from e
    if args.check and after != before:
        print(f"{path}: its table is not what the results give: python -m fqt_bench.readme --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
