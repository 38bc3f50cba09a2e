"""Results are read only where they are whole and of the schema; every one here is FABRICATED."""

import json
import math
import random

import bench_fabricated as fake
import pytest

from fqt_bench import reading

jsonschema = pytest.importorskip("jsonschema")  # a machine with a GPU may have neither
pytest.importorskip("matplotlib")

SCHEMA = json.loads(reading.SCHEMA.read_text())


def test_the_fabricated_results_are_of_the_schema():
    for result in (fake.crowded(), fake.result(), fake.on_cpu(fake.pair("gemm", "2x3x4", 2.0, "portable"))):
        jsonschema.validate(result, SCHEMA)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def test_a_result_is_accepted_exactly_where_jsonschema_accepts_it():
    """On a whole result and on 600 that have one field replaced, removed or added, nearly all of them wrong."""
    failed = fake.failed("b", "skip", "no")
    whole = fake.result(fake.case("gemm", "1x2x3", fake.candidate("a", ratio=(1, 1, 1), tops=1.0), failed), skipped=[
        {"suite": "gemm", "shape": "", "status": "skip", "remark": "no"}], counters={"x": {"launches": 1}},
        counters_of={"triton": None, "arches": ["sm_90"]})  # fmt: skip
    chance, judge, refusals = random.Random(0), jsonschema.Draft202012Validator(SCHEMA), 0
    values = [None, True, False, 0, 1, -1, 1.0, 0.5, 1e-9, "", "x", "ok", "1x2", "TOPS", [], ["x", "x"], {}, {"x": 1}]
    for path in [(), *chance.choices([p for p in places(whole) if p], k=600)]:
        changed = fake.but(whole, *path, to=chance.choice(values)) if path else whole
        place = changed
        for step in path[:-1]:
            place = place[step]
        if path and chance.random() < 0.2:
            del place[path[-1]]
        elif path and isinstance(place, dict) and chance.random() < 0.2:
            place["unknown"] = 1
        problems = list(reading.mismatches(changed, SCHEMA, SCHEMA))
        assert (not problems) == judge.is_valid(changed), (path, problems)
        refusals += bool(problems)
    assert refusals > 300


def test_an_unknown_keyword_of_the_schema_is_not_passed_over():
    with pytest.raises(NotImplementedError, match="maxItems"):
        list(reading.mismatches([], {"maxItems": 1}, {}))


REFUSED = {
    "empty": ("", "ends too early"),
    "truncated": (json.dumps(fake.GOOD)[:-40], "not JSON"),
    "cut": ('{"schema": 3, "suites"', "ends too early"),
    "binary": (b"\xff\xfe\x00", "not UTF-8 at byte 0"),
    "a list": ("[1]", 'no field "schema"'),
    "foreign": ('{"name": "package", "version": 3}', 'no field "schema"'),
    "older": (json.dumps({**fake.GOOD, "schema": 2}), "schema 2, and this reads schema 3"),
    "newer": (json.dumps({**fake.GOOD, "schema": 4}), "schema 4, and this reads schema 3"),
    "true": (json.dumps({**fake.GOOD, "schema": True}), "schema true"),
    "NaN": (json.dumps(fake.but(fake.GOOD, "spent_s", to=math.nan)), "NaN is no number"),
    "infinite": (json.dumps(fake.GOOD).replace('"spent_s": 1.0', '"spent_s": 1e999'), "spent_s: must be number"),
    "deep": ("[" * 200_000, "not JSON"),
    "digits": ('{"schema": ' + "9" * 5000 + "}", "not JSON"),
    "missing": (json.dumps({k: v for k, v in fake.GOOD.items() if k != "cases"}), "cases: missing"),
    "a word for a time": (json.dumps(fake.but(fake.GOOD, "cases", 0, "candidates", 0, "ms", "median", to="1")),
                          "cases[0].candidates[0].ms.median: must be number"),
    "figures of a wrong one": (json.dumps(fake.but(fake.GOOD, "cases", 0, "candidates", 0, "status", to="wrong")),
                               "ms: not allowed here"),
    "ceilings": (json.dumps({**fake.GOOD, "ceilings": {"gpu": "x", "bf16_tflops": -1, "int8_tops": 1, "fp8_tflops": None,
                                                  "tb_s": 1, "versions": {}, "date": "x", "file": "x"}}),
                 "ceilings: bf16_tflops must be a positive number, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("content, reason", REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_result_is_named_with_the_reason_and_the_rest_is_reported(content, reason, tmp_path, capsys):
    folder = fake.written(tmp_path, fake.GOOD)
    (folder / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fake.report(folder, folder / "bad.json", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert str(folder / "bad.json") in said and reason in said
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| bad.json |" in text and "1 × 2 × 3" in text


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert fake.report(fake.written(tmp_path, fake.GOOD), tmp_path / "none.json", "--out", tmp_path / "out") == 1
    assert "none.json: no such file" in capsys.readouterr().err


def test_a_file_that_is_named_twice_counts_once(tmp_path):
    fake.written(tmp_path, fake.GOOD)
    assert len(reading.find([tmp_path, tmp_path / "0.json", tmp_path / ".." / tmp_path.name])) == 1


def test_neither_folders_nor_host_names_nor_what_does_not_print_get_into_the_page(tmp_path):
    bad = fake.failed(
        "x\x1b[31m\u202ey\ud800", "error", "OSError: /home/somebody/x y.py and C:\\Users\\me\\z.py, 3 GB/s"
    )
    result = fake.result(fake.case("gemm", "1x2x3", fake.candidate("a"), bad), environment={"host": "secret.example"})
    fake.written(tmp_path, result)
    fake.report(tmp_path, "--out", tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        for word in ("somebody", "Users", "secret", str(tmp_path), "\x1b", "\u202e", "\ud800"):
            assert word not in text
        assert "x y.py and …/z.py, 3 GB/s" in text


def test_runs_are_in_the_order_of_their_dates_not_of_their_files(tmp_path):
    dates = [f"2026-01-0{day}T00:00:00+00:00" for day in (3, 1, 2)]
    fake.written(tmp_path, *(fake.result(environment={"date": date}) for date in dates))
    found, refused = reading.load(reading.find([tmp_path]))
    assert [run.file for run in found] == ["1.json", "2.json", "0.json"] and not refused
