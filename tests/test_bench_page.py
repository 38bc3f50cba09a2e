"""`fqt bench report`: what the page says, what it never says, and what it is made of. Every result here is FABRICATED."""

import argparse
import builtins
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import bench_fabricated as fake
import pytest

from fqt.cli import UsageError
from fqt_bench import facts, page, reading, sections
from fqt_bench.targets import TARGETS

plots = pytest.importorskip("fqt_bench.plots")  # needs matplotlib: a machine with a GPU may have none

STATUSES = ("ok", "skip", "wrong", "error")
SCHEMA = json.loads(reading.SCHEMA.read_text())


@pytest.fixture(scope="module")
def crowded():
    """The sections of two GPU runs and one of a CPU."""
    cpu = fake.on_cpu(fake.pair("gemm", "64x64x64", 0.5, "portable"))
    shapes = fake.SHAPES[:6]
    results = [
        fake.crowded(0, "2026-01-01", "a" * 40, shapes=shapes),
        fake.crowded(1, "2026-02-01", shapes=shapes),
        cpu,
    ]
    return sections.document(fake.runs(*results), [("bad.json", "not JSON")])


@pytest.fixture(scope="module")
def html(crowded):
    return page.html(crowded)


@pytest.fixture(scope="module")
def markdown(crowded):
    return page.markdown(crowded)


class Elements(HTMLParser):
    """(tag, attributes) of every element, and all text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def table_rows(markdown, *words):
    """The cells of the rows that hold all the words."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and all(word in line for word in words)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# ---- what is said


def test_every_status_target_and_suite_is_in_both(html, markdown):
    text = Elements(html).text
    for words in (*STATUSES, "not measured", "met", "missed", *(t.what for t in TARGETS), "quantize", "linear fwd+bwd"):
        assert words in text
        assert words in markdown.replace("\\", "")
    assert {c["status"] for case in fake.crowded()["cases"] for c in case["candidates"]} == set(STATUSES)


def test_both_have_the_same_tables(crowded, html, markdown):
    tables = [block for section in crowded for block in section.blocks if isinstance(block, sections.Table)]
    cells = Elements(html).text
    for table in tables:
        for row in table.rows:
            assert all(cell in cells for cell in row)
            assert f"| {' | '.join(map(as_markdown, row))} |" in markdown
    assert len(tables) == html.count("<table") > 20


def as_markdown(cell):
    stands_out = isinstance(cell, sections.Mark) and cell not in ("ok", "met", "not measured")
    return f"**{page._md(cell)}**" if stands_out else page._md(cell)


def test_a_candidate_that_is_not_ok_shows_no_number(markdown):
    rows = [row for row in table_rows(markdown, "hopper 256x128x128 w8 s3", "illegal access") if len(row) > 6]
    assert len(rows) == 12  # products and layers of six shapes
    for name, status, *figures, provider, remark in rows:
        assert (name, status, provider) == ("hopper 256x128x128 w8 s3", "**error**", "fqt")
        assert set(figures) == {"–"} and "…/kernel.py" in remark


def test_figures_are_those_of_the_result():
    base = fake.candidate("base", 1.0, ratio=(1, 1, 1), tops=100.0)
    ours = fake.candidate("ours", 0.1234567, ratio=(1.23456, 1.2, 1.3), tops=812.34, prediction="800 (datasheet)")
    bare = fake.candidate("bare", 2.0, starved=2)
    text = page.markdown(sections.document(fake.runs(fake.result(fake.case("gemm", "1x2x3", base, ours, bare)))))
    # Three digits of a ratio or a rate, four of a time; p10 and p90 are 0.98 and 1.04 of the median.
    assert table_rows(text, "| ours |", "fqt")[0] == [
        "ours", "ok", "1.23 (1.20 to 1.30)", "812", "0.1235", "0.1210 to 0.1284", "800 (datasheet)", "fqt", "bit-equal"
    ]  # fmt: skip
    assert table_rows(text, "| bare |", "fqt")[0] == [
        "bare", "ok", "–", "–", "2.000", "1.960 to 2.080", "–", "fqt", "host-bound: 0.100 ms to launch; bit-equal"
    ]  # fmt: skip


def test_a_result_of_the_cpu_meets_no_target_and_leaves_gpu_figures_not_measured():
    suites = ("gemm", "portable"), ("linear fwd+bwd", "int8")
    fast = fake.on_cpu(*(fake.pair(suite, "8192x8192x8192", 50.0, tag) for suite, tag in suites))
    document = sections.document(fake.runs(fast))
    text = page.markdown(document)
    targets = [row for row in table_rows(text) if re.fullmatch(r"T\d+", row[0])]
    assert [row[2:4] for row in targets] == [["not measured", "–"]] * len(TARGETS)
    for words in ("GPU: not measured", "Ratios on a GPU: not measured", "Roofline of a GPU: not measured"):
        assert words in text
    # The ratios, int8 over bf16 of products, of layers and of the convolutions of two networks, and whole steps.
    assert text.count("on a GPU: not measured.") == 6
    assert "CPU (FABRICATED CPU)" in text
    figures = [block for section in document for block in section.blocks if isinstance(block, sections.Figure)]
    assert {figure.kind for figure in figures} == {"ratio", "roofline"}  # none of where int8 pays
    headings = [block.text for section in document for block in section.blocks if isinstance(block, sections.Heading)]
    assert headings and all("CPU" in text or "not measured" in text for text in headings)


def test_an_empty_result_makes_a_whole_page_of_not_measured():
    for result in (fake.result(), fake.on_cpu()):
        document = sections.document(fake.runs(result))
        assert [section.title for section in document] == [
            "Summary", "Measured on", "Targets", "Skipped, wrong and failed", "Ratio to the baseline", "Roofline",
            "Where int8 pays", "Whole training steps", "Trend", "Counters", "Method"]  # fmt: skip
        text = page.markdown(document)
        assert text.count("not measured") > len(TARGETS) and "<svg" not in page.html(document)


# ---- what the page is made of


def test_the_page_needs_nothing_from_outside(html):
    elements = Elements(html).found
    assert not {tag for tag, _ in elements} & {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    ids = {attrs["id"] for _, attrs in elements if "id" in attrs}
    references = [attrs["href"] for _, attrs in elements if "href" in attrs]
    references += re.findall(r"url\(([^)]*)\)", html)
    assert len(references) > 100
    assert all(reference[0] == "#" and reference[1:] in ids for reference in references)
    assert not any(
        name in ("src", "srcset", "xlink:href", "action") or name.startswith("on") for _, a in elements for name in a
    )
    assert "@import" not in html and "http:" not in html and "https:" not in html
    assert "default-src 'none'" in html


def test_ids_are_unique_and_every_drawing_refers_to_its_own(html):
    ids = [attrs["id"] for _, attrs in Elements(html).found if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    for drawing in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        own = set(re.findall(r' id="([^"]+)"', drawing))
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', drawing)) <= {
            pair for i in own for pair in ((i, ""), ("", i))
        }


def test_drawings_have_names_tables_have_headers_and_both_have_labels(html):
    elements = Elements(html).found
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for tag, attrs in elements if tag == "svg")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in elements if tag == "th")
    assert all(attrs.get("aria-label") for tag, attrs in elements if tag == "table")
    assert ("html", {"lang": "en"}) in elements
    assert any(tag == "meta" and attrs.get("name") == "viewport" for tag, attrs in elements)


def test_the_same_results_give_the_same_bytes_whatever_their_order_and_the_users_style(tmp_path, monkeypatch):
    import matplotlib

    cube = "8192x8192x8192"
    older = [fake.result(fake.pair("gemm", cube, day, "portable"), environment={"date": f"2026-01-0{day}T00:00:00+00:00"})
             for day in (1, 2)]  # fmt: skip
    fake.written(tmp_path, fake.crowded(shapes=fake.SHAPES[:2]), *older)
    files = sorted(tmp_path.glob("*.json"))
    fake.report(*files, "--out", tmp_path / "a")
    for name, value in {"axes.grid": True, "axes.linewidth": 9.0, "font.size": 30.0, "svg.fonttype": "path"}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    fake.report(*reversed(files), "--out", tmp_path / "b")
    assert matplotlib.rcParams["font.size"] == 30.0
    for name in ("report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


EVIL = "</svg></td><script>alert(1)</script> a|b `c` **d** [e](f) _g_ $x$ $\\frac{$ \"quoted' & <!-- -->"


def test_text_of_a_result_is_text_and_nothing_else():
    base = fake.candidate("base", 1.0, ratio=(1, 1, 1), tops=1.0, gb_s=1.0, tag="bf16")
    evil = fake.candidate(
        EVIL, 2.0, ratio=(0.5, 0.4, 0.6), tops=1.0, gb_s=1.0, remark=EVIL, prediction=EVIL, provider=EVIL
    )
    case = fake.case(EVIL, "1x2x3", base, evil, fake.failed(EVIL, "error", EVIL))
    result = fake.result(case, method=EVIL, environment={"gpu": EVIL, "driver": EVIL}, counters={EVIL: {EVIL: 1}},
                         memory=[{"name": EVIL, "shape": "1", "saved": 1, "peak": 1}])  # fmt: skip
    document = sections.document(fake.runs(result), [(EVIL, EVIL)])
    elements, text = Elements(page.html(document)), page.markdown(document)
    assert {tag for tag, _ in elements.found} & {"script", "em", "strong"} == set()
    assert elements.text.count(EVIL) > 10
    assert "<script" not in text and "<!--" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "alert" in line and "**error**" in line}
    assert widths == {7, 10}  # of the problems' six columns, and of the case's nine
    assert all(re.search(r"(?<!\\)[`$]|(?<![\\*])\*\*d", line) is None for line in rows)


def test_colours_are_defined_for_light_and_dark_and_have_contrast(html):
    style = Path(page.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 1))
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= light.keys() and light.keys() == dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style)).keys()
    assert dark.keys() == light.keys() and "#0102" not in html

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for scheme in (light, dark):
        on_paper = [(name, "paper") for name in ("ink", "muted", "link", "ours", "theirs", "int8", "bf16", "fp8")]
        for ink, back in [*on_paper, ("ink", "raised"), ("muted", "raised"), ("good", "good-back"), ("bad", "bad-back"),
                          ("mild", "mild-back")]:  # fmt: skip
            assert contrast(scheme[ink], scheme[back]) >= 4.5, (ink, back)  # WCAG 2.1 AA of small text


def test_figures_are_drawn_for_what_was_measured(html, crowded):
    kinds = [block.kind for section in crowded for block in section.blocks if isinstance(block, sections.Figure)]
    # 14 cases of the GPU and one of the CPU; products and layers of the GPU, products of the CPU; two heat maps each of two.
    assert [kinds.count(kind) for kind in ("ratio", "roofline", "heat")] == [15, 2, 4]
    assert kinds.count("trend") > 10 and html.count("<svg") == len(kinds)
    assert "3.00 TB/s (datasheet)" in html


def test_the_ratio_figure_has_every_candidate_with_a_ratio_and_its_value():
    case = fake.crowded()["cases"][0]
    drawing = plots.ratio_figure(case, ident="i", label="l")
    with_ratio = [c for c in case["candidates"] if "ratio" in c]
    for c in with_ratio:
        assert c["name"] in drawing and f">{c['ratio']['value']:.2f}<" in drawing
    order = [drawing.index(f">{c['name']}<") for c in sorted(with_ratio, key=lambda c: -c["ratio"]["value"])]
    assert order == sorted(order)
    assert "hopper 256x128x128" not in drawing  # an error


def test_a_dollar_in_a_name_is_a_dollar():
    names = ("$x^2$", "$\\frac{$")
    case = fake.case("gemm", "1x2x3", *(fake.candidate(name, ratio=(1, 1, 1)) for name in names))
    drawing = plots.ratio_figure(case, ident="i", label="l")
    assert all(f">{name}<" in drawing for name in names) and "rate over that of $x^2$" in drawing


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 1e-6), (1.0, 1e9), (1.0, 0.999999), (1e-300, 1e299)])
def test_figures_bear_any_ratio(values):
    found = [fake.candidate(str(i), 1.0, ratio=(v, v * 0.9, v * 1.1), tops=v, gb_s=1.0) for i, v in enumerate(values)]
    case = fake.case("gemm", "1x2x3", *found)
    assert "NaN" not in plots.ratio_figure(case, ident="i", label="l")
    points = facts.points(fake.machine(fake.result(case)))
    assert "NaN" not in plots.roofline_figure(points, None, ident="i", label="l")


# ---- the command


def test_no_result_at_all_is_a_mistake_and_writes_nothing(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for place in (tmp_path, tmp_path / "bad.json", tmp_path / "out"):
        with pytest.raises(UsageError, match="no results of `fqt bench` in"):
            fake.report(place, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_arguments_the_results_of_the_checkout_are_read(tmp_path, monkeypatch, capsys):
    from fqt_bench import environment

    (tmp_path / "bench" / "results" / "gpu").mkdir(parents=True)
    fake.written(tmp_path / "bench" / "results" / "gpu", fake.GOOD)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert fake.report("--out", tmp_path / "out", "--json") == 0
    assert [run["file"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["0.json"]
    monkeypatch.setattr(environment, "ROOT", None)
    with pytest.raises(UsageError, match="name a FILE or DIR"):
        fake.report("--out", tmp_path / "out")


def test_without_matplotlib_markdown_is_written_and_the_extra_is_named(tmp_path, monkeypatch):
    fake.written(tmp_path, fake.GOOD)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "fqt_bench.plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UsageError, match=r"report\.md is written; report\.html needs matplotlib: pip install 'fqt-kernels\[demo\]'"
    ):
        fake.report(tmp_path, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path):
    fake.written(tmp_path, fake.GOOD)
    with pytest.raises(UsageError, match=r"--out .*0\.json"):
        fake.report(tmp_path, "--out", tmp_path / "0.json")


def test_what_is_something_else_in_a_folder_is_passed_over_and_named_it_is_refused(tmp_path, capsys):
    """Tuned tables and comparisons lie beside results."""
    fake.written(tmp_path, fake.GOOD)
    for name, other in (("tuned.json", {"schema": 1, "entries": []}), ("compare.json", {"regressions": []})):
        (tmp_path / name).write_text(json.dumps(other))
        assert fake.report(tmp_path, "--out", tmp_path / "out") == 0
        assert f"{name}: not a result of fqt bench" in capsys.readouterr().err
        assert name not in (tmp_path / "out" / "report.md").read_text()
        assert fake.report(tmp_path, tmp_path / name, "--out", tmp_path / "out") == 1


def test_json_has_the_targets_and_the_problems(tmp_path, capsys):
    fake.written(tmp_path, fake.crowded(shapes=fake.SHAPES[:1]))
    (tmp_path / "bad.json").write_text("{")
    assert fake.report(tmp_path, "--out", tmp_path / "out", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert Path(found["markdown"]).is_file() and Path(found["html"]).is_file()
    assert [refused["reason"] for refused in found["refused"]] == ["not JSON: it ends too early"]
    assert [t["name"] for t in found["targets"][fake.H100]] == [t.name for t in TARGETS]
    assert {p["status"] for p in found["problems"]} == {"skip", "wrong", "error"}


def test_stdout_has_the_two_paths(tmp_path, capsys):
    fake.written(tmp_path, fake.GOOD)
    assert fake.report(tmp_path, "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / "out" / name) for name in ("report.md", "report.html")] and not err


def test_a_summary_that_would_be_too_long_leaves_out_the_counters_and_says_so(monkeypatch):
    counters = {f"kernel {i}": {"instructions": i} for i in range(2000)}
    document = sections.document(
        fake.runs(fake.result(counters=counters, counters_of={"triton": "3", "arches": ["sm_90"]}))
    )
    assert "kernel 1999" in page.markdown(document)
    monkeypatch.setattr(page, "SUMMARY_BYTES", 20_000)
    text = page.markdown(document)
    assert "kernel 1999" not in text and "Left out for its length, see report.html: Counters." in text
    assert "kernel 1999" in page.html(document)


def test_nothing_heavy_is_imported_for_the_options(monkeypatch):
    real = builtins.__import__

    def light(name, *args, **kwargs):
        assert name.split(".")[0] not in ("torch", "triton", "matplotlib", "numpy"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", light)
    monkeypatch.delitem(sys.modules, "fqt_bench.page")
    import fqt_bench.page as again

    again.add_arguments(argparse.ArgumentParser())
