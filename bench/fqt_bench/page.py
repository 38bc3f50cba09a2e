"""`fqt bench report`: results as report.md, fit for a job summary, and as report.html, one page that needs nothing else.

Both write down the same sections (`fqt_bench.sections`); the same results give the same bytes. All text of a result is
escaped: names and remarks may come from anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sections import Figure, Section, Table

TITLE = "fqt benchmarks"
OUT = "fqt-report"
SUMMARY_BYTES = 1_000_000  # a job summary may have 1 MiB
LONG = 24  # a cell of more characters may be broken, but not to a narrow column
INSTALL = "pip install 'fqt-kernels[demo]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fqt bench report`."""
    parser.add_argument("paths", nargs="*", metavar="FILE|DIR",
                        help="results, or folders that have some (default: bench/results of the checkout)")  # fmt: skip
    parser.add_argument("--out", default=OUT, metavar="DIR", help="folder for report.md and report.html")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Write the report. 0; 1 where a file among several was refused.

    Raises:
        UsageError: no result at all, a folder that cannot be written, or no matplotlib: report.md is written all the same.
    """
    from fqt.cli import UsageError

    from . import wholes
    from .reading import OTHER, find, load

    paths = find(Path(path) for path in args.paths) if args.paths else find([_default()])
    runs, refused = load(paths)
    trained, refused = wholes.among(refused)
    for path, reason in refused:
        print(f"fqt bench report: {path}: {reason}", file=sys.stderr)
    if left_out := len(trained) - len(wholes.newest(trained)):
        print(f"fqt bench report: {left_out} of {len(trained)} results of whole training steps are not shown: "
              "of a CPU, of toy sizes, or older than another of the GPU", file=sys.stderr)  # fmt: skip
    # In a folder there may be tuned tables and comparisons beside the results.
    named = {Path(path).resolve() for path in args.paths}
    refused = [(p, reason) for p, reason in refused if not reason.startswith(OTHER) or p.resolve() in named]
    if not runs:
        where = ", ".join(args.paths) or str(_default())
        alone = ", only of fqt_bench.end_to_end, which are shown beside them" if trained else ""
        raise UsageError(f"no results of `fqt bench` in {where}{alone}{f': {len(refused)} refused' if refused else ''}")

    from .sections import document

    sections = document(runs, [(path.name, reason) for path, reason in refused], trained)
    written = {"markdown": _write(Path(args.out) / "report.md", markdown(sections))}
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{written['markdown']} is written; report.html needs matplotlib: {INSTALL}")
    written["html"] = _write(Path(args.out) / "report.html", html(sections))
    if args.json:
        print(json.dumps({**written, **_facts(runs, refused)}, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(written.values()))
    return 1 if refused else 0


def _default() -> Path:
    from fqt.cli import UsageError

    from .environment import ROOT

    if ROOT is None:
        raise UsageError("name a FILE or DIR: fqt is installed, and only a checkout has bench/results")
    return ROOT / "bench" / "results"


def _facts(runs: Sequence[Any], refused: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """For `--json`: the runs, the targets by GPU, and all that is not in order."""
    from . import facts

    machines = facts.machines(runs)
    return {
        "runs": [{"file": run.file, "machine": run.machine, "date": run.date, "commit": run.commit} for run in runs],
        "refused": [{"file": str(path), "reason": reason} for path, reason in refused],
        "targets": {m.name: [{**v._asdict(), "run": v.run.file if v.run else None} for v in facts.verdicts(m)]
                    for m in machines if m.is_gpu},
        "problems": [{"machine": m.name, **p._asdict(), "run": p.run.file} for m in machines for p in facts.problems(m)],
    }  # fmt: skip


def _write(path: Path, text: str) -> str:
    """In one step: a reader never sees half a page."""
    from fqt.cli import UsageError

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    except OSError as e:
        raise UsageError(f"--out {path.parent}: {e.strerror or e}") from e
    return str(path)


# ---- markdown


def markdown(sections: Sequence[Section]) -> str:
    """GitHub's flavour, without the figures: the tables have their numbers. Bulky sections go where it would be too long."""
    text = "\n".join(_markdown(sections))
    if len(text.encode()) > SUMMARY_BYTES:
        kept = [section for section in sections if not section.bulky]
        left_out = ", ".join(section.title for section in sections if section.bulky)
        text = "\n".join([*_markdown(kept), f"Left out for its length, see report.html: {left_out}.", ""])
    return text


def _markdown(sections: Sequence[Section]) -> Iterator[str]:
    from .sections import Heading, Table, Text, Tiles

    yield f"# {TITLE}\n"
    for section in sections:
        yield f"## {section.title}\n"
        for block in section.blocks:
            if isinstance(block, Text):
                text = _md(block.text)
                yield f"> **{text}**\n" if block.warning else f"{text}\n"
            elif isinstance(block, Heading):
                yield f"### {_md(block.text)}\n"
            elif isinstance(block, Tiles):
                yield f"{_md(block.title)}: {', '.join(f'**{_md(count)}** {_md(what)}' for count, what in block.items)}\n"
            elif isinstance(block, Table):
                yield _markdown_table(block)


def _markdown_table(table: Table) -> str:
    from .sections import Mark

    def row(cells: Sequence[str]) -> str:
        return (
            f"| {' | '.join(f'**{_md(c)}**' if isinstance(c, Mark) and c not in _PLAIN else _md(c) for c in cells)} |"
        )

    rule = "|".join("---:" if i in table.right else "---" for i in range(len(table.header)))
    lines = "\n".join([row(table.header), f"|{rule}|", *map(row, table.rows)])
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary>\n\n{lines}\n\n</details>\n"
    return f"**{_md(table.caption)}**\n\n{lines}\n"


_PLAIN = ("ok", "met", "not measured")  # what need not stand out


def _md(text: str) -> str:
    """As it is written: no emphasis, code, link, cell or element begins in it."""
    escaped = re.sub(r"([\\`*\[\]|~#$])|((?<!\w)_|_(?!\w))", r"\\\1\2", escape(text, quote=False))
    return escaped.strip() or "–"


# ---- HTML


def html(sections: Sequence[Section]) -> str:
    """One page: style and drawings are inside, there is no script, and its policy forbids to load anything."""
    ids = {section.title: re.sub(r"[^a-z0-9]+", "-", section.title.lower()) for section in sections}
    links = "".join(f'<li><a href="#{ids[s.title]}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section aria-labelledby="{ids[s.title]}"><h2 id="{ids[s.title]}">{escape(s.title)}</h2>\n'
        f"{''.join(_blocks(s, ids[s.title]))}</section>"
        for s in sections
    )
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{TITLE}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{TITLE}</h1></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _blocks(section: Section, ident: str) -> Iterator[str]:
    from .sections import Figure, Heading, Text, Tiles

    figures: list[str] = []
    for i, block in enumerate(section.blocks):
        if isinstance(block, Figure):
            figures.append(_html_figure(block, f"{ident}-{i}"))
            continue
        if figures:
            yield f'<div class="figures">{"".join(figures)}</div>\n'
            figures = []
        if isinstance(block, Text):
            yield f'<p class="{"warning" if block.warning else "note"}">{escape(block.text)}</p>\n'
        elif isinstance(block, Heading):
            yield f"<h3>{escape(block.text)}</h3>\n"
        elif isinstance(block, Tiles):
            items = "".join(f"<li><b>{escape(count)}</b> {escape(what)}</li>" for count, what in block.items)
            yield f'<h3>{escape(block.title)}</h3>\n<ul class="tiles">{items}</ul>\n'
        else:
            yield _html_table(block)
    if figures:
        yield f'<div class="figures">{"".join(figures)}</div>\n'


def _html_figure(figure: Figure, ident: str) -> str:
    from . import plots

    drawing = getattr(plots, f"{figure.kind}_figure")(*figure.data, ident=ident, label=figure.label)
    caption = escape(figure.caption)
    scroll = f'<div class="scroll" tabindex="0" role="group" aria-label="{caption}">{drawing}</div>'
    return f'<figure class="{figure.kind}"><figcaption>{caption}</figcaption>{scroll}</figure>'


def _html_table(table: Table) -> str:
    from .sections import Mark

    def cell(i: int, text: str) -> str:
        kind = " class=n" if i in table.right else " class=long" if len(text) > LONG else ""
        return f'<th scope="row"{kind}>{mark(text)}</th>' if i == 0 else f"<td{kind}>{mark(text)}</td>"

    def mark(text: str) -> str:
        inner = escape(text)
        return f'<span class="mark {inner.replace(" ", "-")}">{inner}</span>' if isinstance(text, Mark) else inner

    head = "".join(f'<th scope="col"{" class=n" if i in table.right else ""}>{escape(h)}</th>'
                   for i, h in enumerate(table.header))  # fmt: skip
    rows = "\n".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in table.rows)
    caption = escape(table.caption)
    text = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{caption}"><table aria-label="{caption}">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )
    if table.folded:
        return f"<details><summary>{caption}</summary>\n{text}</details>\n"
    return f'<p class="caption">{caption}</p>\n{text}'
