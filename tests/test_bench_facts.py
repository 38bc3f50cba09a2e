"""What the report says of targets, of where int8 pays and of ceilings. Every result here is FABRICATED."""

import json
import re

import bench_fabricated as fake
import pytest

from fqt_bench import facts, page, sections

plots = pytest.importorskip("fqt_bench.plots")  # needs matplotlib: a machine with a GPU may have none


def test_targets_come_from_the_newest_run_of_the_gpu_that_measured_them():
    def run(date, *cases):
        return fake.result(*cases, environment={"date": f"{date}T00:00:00+00:00"})

    cube = "8192x8192x8192"
    old, new = (
        run("2026-01-01", fake.pair("gemm", cube, 1.39, "portable")),
        run("2026-01-02", fake.pair("gemm", cube, 1.41, "hopper")),
    )
    other = run("2026-01-03", fake.pair("gemm", "1x2x3", 9.0, "portable"))
    rows = {v.what: v for v in facts.verdicts(fake.machine(old, new, other))}
    found = rows["int8 product over bf16 at 8192³"]
    assert (found.value, found.verdict, found.run.result) == ("1.41×", "met", new)
    assert [v.verdict for v in facts.verdicts(fake.machine(old, other)) if v.what == found.what] == ["missed"]
    missing = rows["int8 layer over bf16 at 8192³"]
    assert (missing.value, missing.verdict, missing.run) == ("", "not measured", None)
    wrong = fake.but(new, "cases", 0, "candidates", 1, to=fake.failed("x", "wrong", "y"))
    assert [v.verdict for v in facts.verdicts(fake.machine(wrong)) if v.what == found.what] == ["not measured"]


def test_targets_say_what_was_predicted_and_why_there_is_no_figure():
    cube, what = "8192x8192x8192", "int8 product at 8192³"
    met = fake.pair("gemm", cube, 12.0, "portable")
    met["candidates"][1]["prediction"] = "1130 (datasheet)"
    lost = fake.result(fake.but(met, "candidates", 1, to=fake.failed("x", "error", "no memory", tag="portable")))
    later = {"environment": {"date": "2026-12-01T00:00:00+00:00"}}

    def found(*results):
        return next(v for v in facts.verdicts(fake.machine(*results)) if v.what == what)

    assert (found(fake.result(met)).predicted, found(fake.result(met)).why) == ("1130 TOPS", "")
    without = found(lost)
    assert (without.verdict, without.value, without.run) == ("not measured", "", None) and without.why.endswith(
        "no memory"
    )
    assert found(lost, fake.result(**later)).why == without.why  # a run without the case has nothing to say
    assert found(lost, fake.result(met)).verdict == "met"
    text = page.markdown(sections.document(fake.runs(lost)))
    assert re.search(
        r"\| not measured \| – \| ≥ 1150 TOPS \| [^|]* \| x: error: no memory \| – \|", text.replace("**", "")
    )


def test_the_cpu_measures_no_target():
    fast = fake.on_cpu(fake.pair("gemm", "8192x8192x8192", 50.0, "portable"))
    fast = fake.machine(fast, fast)
    assert {v.verdict for found in (fast, None) for v in facts.verdicts(found)} == {"not measured"}
    assert facts.trends(fast) == []


def test_a_newer_run_that_ran_out_of_time_does_not_hide_older_figures():
    def run(date, *candidates):
        return fake.result(fake.case("gemm", "1x2x3", *candidates), environment={"date": f"{date}T00:00:00+00:00"})

    measured = run("2026-01-01", fake.candidate("a"))
    skipped, again = (run(date, fake.failed("a", "skip", "no time")) for date in ("2026-01-02", "2026-01-03"))
    for runs, shown in (((measured, skipped), measured), ((skipped, again), again), ((skipped, measured), measured)):
        (found,) = fake.machine(*runs).cases()
        assert found.run.result == shown


def test_a_newer_run_that_is_in_order_takes_a_problem_away():
    shape = "1x2x3"
    bad = fake.result(fake.case("gemm", shape, fake.candidate("a"), fake.failed("b", "error", "x")),
                      environment={"date": "2026-01-01T00:00:00+00:00"},
                      skipped=[{"suite": s, "shape": shape, "status": "skip", "remark": "x"} for s in ("quantize", "optim")],
                      repeats=[{"suite": "gemm", "shape": shape, "name": "b", "status": "wrong", "remark": ""}])  # fmt: skip
    good = fake.result(fake.case("gemm", shape, fake.candidate("a"), fake.candidate("b")),
                       fake.case("quantize", shape, fake.candidate("a")))  # fmt: skip
    assert [(p.status, p.suite) for p in facts.problems(fake.machine(bad))] == [
        ("wrong", "repeat"), ("error", "gemm"), ("skip", "quantize"), ("skip", "optim")]  # fmt: skip
    assert [(p.status, p.suite) for p in facts.problems(fake.machine(bad, good))] == [
        ("wrong", "repeat"),
        ("skip", "optim"),
    ]


def test_a_trend_needs_two_runs_of_one_gpu_and_is_in_the_order_of_time():
    def run(date, ratio, **more):
        environment = {"date": f"{date}T00:00:00+00:00", **more}
        return fake.result(fake.pair("gemm", "8192x8192x8192", ratio, "portable"), environment=environment)

    assert facts.trends(fake.machine(run("2026-01-01", 1.1))) == []
    (trend,) = facts.trends(fake.machine(run("2026-01-01", 1.1), fake.result(), run("2026-01-03", 1.3)))
    assert [(r.date[:10], round(value, 6)) for r, value in trend.points] == [("2026-01-01", 1.1), ("2026-01-03", 1.3)]
    assert (trend.what, trend.bound) == ("T1 int8 product over bf16 at 8192³", 1.4)
    two = facts.machines(fake.runs(run("2026-01-01", 1.1), run("2026-01-02", 1.2, gpu="FABRICATED other")))
    assert [facts.trends(m) for m in two] == [[], []]


# ---- where int8 pays


def grid(cells, **fields):
    ms, weights = sorted({m for m, _ in cells}), sorted({w for _, w in cells})
    return facts.Grid(tuple(ms), tuple(weights), cells, **fields)


A, B = (1, 1), (2, 2)


def test_the_frontier_lies_between_measured_neighbours_on_both_sides_of_one():
    found = grid(
        {(1, A): 0.5, (2, A): 0.9, (4, A): 1.1, (8, A): 1.2, (1, B): 1.3, (2, B): 1.0, (4, B): 0.99, (8, B): 2.0}
    )
    assert facts.crossings(found) == [(A, 2, 4, True), (B, 2, 4, False), (B, 4, 8, True)]
    # Cell (i, j) is the unit square around (i, j): upright segments along M, level ones between the rows A and B, which
    # differ at M = 1, 2 and 4.
    assert sorted(facts.borders(found)) == sorted([
        ((1.5, -0.5), (1.5, 0.5), True), ((1.5, 0.5), (1.5, 1.5), True), ((2.5, 0.5), (2.5, 1.5), True),
        ((-0.5, 0.5), (0.5, 0.5), True), ((0.5, 0.5), (1.5, 0.5), True), ((1.5, 0.5), (2.5, 0.5), True)])  # fmt: skip


def test_over_cells_that_are_not_measured_the_frontier_is_marked_as_inexact_and_never_level():
    found = grid({(1, A): 0.5, (8, A): 2.0, (2, B): 2.0, (4, B): 3.0})
    assert facts.crossings(found) == [(A, 1, 8, True)]
    # M = 2 and 4 are the columns 1 and 2: the gap of the row A goes from 0.5 to 2.5.
    assert list(facts.borders(found)) == [((0.5, -0.5), (0.5, 0.5), False), ((2.5, -0.5), (2.5, 0.5), False)]


def test_there_is_no_frontier_where_every_measured_cell_is_on_one_side():
    assert not list(facts.borders(grid({(1, A): 1.0, (2, A): 1.5, (1, B): 7.0})))


def test_a_cell_is_the_fastest_own_int8_over_the_fastest_bf16_and_nothing_that_failed():
    def layer(name, ms, tag, **fields):
        return fake.candidate(name, ms, tag=tag, tops=1.0, **fields)

    case = fake.case("linear fwd+bwd", "8x2x3", layer("nn.Linear bf16", 4.0, "bf16"),
                     layer("bf16 compiled", 3.0, "bf16 compiled"), layer("int8", 2.5, "int8"),
                     layer("int8 hopper", 2.0, "int8 hopper"), layer("psq8", 0.1, "psq8"),
                     layer("torchao", 0.1, "torchao"), fake.failed("b", "wrong", "x", tag="int8"))  # fmt: skip
    found = facts.grid(fake.machine(fake.result(case, fake.pair("gemm", "8x2x3", 5.0, "portable"))), "linear fwd+bwd")
    assert found.cells == {(8, (2, 3)): 1.5}
    case["candidates"][0]["name"], case["candidates"][1]["name"] = "nn.Linear float32", "float32 compiled"
    assert facts.int8_over_bf16(case) is None  # a baseline in other numbers is not bf16


def test_measured_and_predicted_cells_are_never_mixed():
    result = fake.result(*(fake.pair("gemm", shape, 1.7, "portable") for shape in ("8192x4096x4096", "64x1024x1024")))
    found = facts.grid(fake.machine(result), "gemm")
    assert len(found.cells) == 2 and len(found.predicted) == 4 and found.source == "datasheet"
    assert set(found.cells.values()) == {1.7} and 1.7 not in found.predicted.values()
    measured, predicted = (plots.heat_figure(found, p, ident="i", label="l") for p in (False, True))
    assert measured.count(">1.70<") == 2 and measured.count(">not<") == measured.count(">measured<") == 2
    assert "<pattern" in measured and "<pattern" not in predicted
    shown = sorted(f"{value:.2f}" for value in found.predicted.values())
    assert sorted(re.findall(r">(\d+\.\d\d)<", predicted)) == shown
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.html(sections.document(fake.runs(result))))
    assert {"Measured", "Predicted (datasheet), no measurement"} <= set(captions)


def test_calibrated_constants_predict_where_the_gpu_has_them(tmp_path, monkeypatch):
    runs = fake.machine(fake.result(fake.pair("gemm", "8192x4096x4096", 1.2, "portable")))
    entry = {"gpu": fake.H100, "bf16_tflops": 800.0, "int8_tops": 400.0, "fp8_tflops": None, "tb_s": 3.0,
             "versions": {"a": 1}, "date": "2026-01-01", "file": "x",
             "fitted": {"launch_us": 9.0, "ramp": 512.0}}  # fmt: skip
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps([entry]))
    (usual,) = facts.grid(runs, "gemm").predicted.values()
    monkeypatch.setattr(facts.cost, "MEASURED", path)
    facts.cost.named.cache_clear()
    try:
        found = facts.grid(runs, "gemm")
        named = facts.predictor(runs)
    finally:
        facts.cost.named.cache_clear()
    assert (named.launch_us, named.ramp, found.source) == (9.0, 512.0, "measured")
    (predicted,) = found.predicted.values()
    one = facts.cost.product("", (8192, 4096, 4096), 400.0, named)
    assert predicted == one.bf16_ms / one.ms < 0.5 < usual


def test_a_prediction_on_the_wrong_side_of_one_comes_first_then_the_furthest_off():
    found = grid({(1, A): 2.0, (2, A): 1.1, (4, A): 1.5, (8, A): 3.0},
                 predicted={(1, A): 4.0, (2, A): 0.99, (4, A): 1.6})  # fmt: skip
    table = sections._beside("x", found)
    assert [(row[0], *row[2:]) for row in table.rows] == [
        ("2", "1.10", "0.990", "-10 %", "wrong side of 1"), ("1", "2.00", "4.00", "+100 %", "–"),
        ("4", "1.50", "1.60", "+7 %", "–")]  # fmt: skip


# ---- roofline


def test_intensity_is_operations_over_the_bytes_that_must_move():
    product = fake.case("gemm", "2x3x5", fake.candidate("a", tops=200.0, gb_s=400.0, tag="portable"))
    layer = fake.case("linear fwd+bwd", "2x3x5", fake.candidate("b", tops=7.0, tag="int8"))
    other = [
        fake.case("gemm", "2x3x5x7", fake.candidate("no bytes", tops=1.0)),
        fake.case("optim", "9", fake.candidate("no ops")),
    ]
    one, two = facts.points(fake.machine(fake.result(product, layer, *other)))
    assert (one.intensity, one.tops, one.format) == (500.0, 200.0, "int8")
    # 6·2·3·5 operations; X 10, W 15 and dY 6 elements read, dX, dW and Y as many written, 2 bytes each.
    assert two.intensity == pytest.approx(180 / (2 * 2 * (10 + 15 + 6)))


def test_ceilings_are_measured_where_a_run_measured_them_else_the_datasheets_else_none():
    entry = {"gpu": fake.H100, "bf16_tflops": 700.0, "int8_tops": 1100.0, "fp8_tflops": None, "tb_s": 3.0, "versions": {},
             "date": "2026-01-01", "file": "x"}  # fmt: skip
    assert facts.ceilings(fake.machine(fake.result())).source == "datasheet"
    with_own = facts.ceilings(fake.machine(fake.result(ceilings=entry), fake.result()))
    assert (with_own.source, with_own.int8_tops) == ("measured", 1100.0)
    assert facts.ceilings(fake.machine(fake.result(environment={"gpu": "FABRICATED unknown"}))) is None
    assert facts.ceilings(fake.machine(fake.on_cpu())) is None
    point = facts.points(
        fake.machine(fake.result(fake.case("gemm", "2x3x5", fake.candidate("a", tops=30.0, gb_s=3e3, tag="portable"))))
    )
    assert facts.roof(with_own, point[0]) == 30.0  # 10 operations a byte at 3 TB/s
