"""What BHQ costs: the stages and their bytes, the authors' way, target T8, and the study of bit-widths."""

import statistics
from collections import defaultdict

import bench_fabricated as fake
import pytest
import torch
from bench_fakes import ONCE, FakeTimer, record

from fqt import cost, demo
from fqt.householder import Householder
from fqt_bench import authors_way, bits_study, householder, householder_stages, sections
from fqt_bench.harness import Budget, Wrong, measure
from fqt_bench.householder import FORMS, SOURCES, Sizes, costs
from fqt_bench.suites import FRONTIER, plans
from fqt_bench.targets import TARGETS, report

CPU = torch.device("cpu")
EPS = 2.0**-24


def _candidates(**fields):
    return {c.name: c for c in householder.case(24, 32, 40, CPU, 1, **fields).candidates}


# ---- the authors' way


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n", [3, 4, 65])
def test_the_authors_dense_matrices_are_the_same_transform_up_to_a_factor_of_each_group(n, source):
    x = householder_stages.gradient(source, n, 24, CPU, 5, torch.float32)
    h, t = Householder.of(x), authors_way.dense(x)
    leaders = h.leader.nonzero()[:, 0]
    factor = torch.empty(n)
    factor[h.group[leaders]] = t.forward[leaders].abs().sum(1) / _entries(h)[leaders].abs().sum(1)
    factor = factor[h.group][:, None]
    y, size = t.forward @ x, t.forward.abs() @ x.abs()
    # A product of n terms in float32, and entries, sums and factors that are rounded in at most 16 operations more.
    assert ((y - factor * h.apply(x)).abs() <= (n + 16) * EPS * size).all()
    back = t.inverse @ y
    assert ((back - h.inverse(y / factor)).abs() <= (n + 16) * EPS * (t.inverse.abs() @ size)).all()
    assert ((back - x).abs() <= 2 * (n + 16) * EPS * (t.inverse.abs() @ size)).all()


def _entries(h):
    """T of a Householder, dense."""
    return h.apply(torch.eye(h.group.numel()))


@pytest.mark.parametrize("n", [3, 7, 200])
def test_the_authors_groups_are_those_of_the_library(n):
    ranges = torch.randn(n).exp() * 3
    found = authors_way.blocks(ranges)
    h = Householder.of(torch.stack([ranges, torch.zeros(n)], 1))
    assert torch.equal(torch.empty_like(found.group).scatter_(0, found.order, found.group), h.group)
    assert h.leader[found.order[: found.size.numel()]].all() and h.leader.sum() == found.size.numel()
    assert torch.equal(found.size[h.group].long(), h.size)
    assert torch.allclose(found.s2 / found.s1, h.groups.s[: found.size.numel()].double(), rtol=2.0**-22)


def test_the_authors_codes_are_within_a_bin_and_have_so_many_levels():
    y = torch.randn(16, 512)
    got = authors_way.quantize(y, 3)
    bins = (y.amax(1) - y.amin(1)) / 7
    assert ((got - y).abs() <= bins[:, None] * (1 + 1e-4)).all() and not torch.equal(got, authors_way.quantize(y, 3))
    assert all(row.unique().numel() == 8 for row in got)


def test_the_authors_way_needs_three_rows_and_dense_matrices_that_fit(monkeypatch):
    with pytest.raises(ValueError, match="three rows"):
        authors_way.dense(torch.randn(2, 8))
    monkeypatch.setattr(authors_way, "MAX_ROWS", 23)
    missing = {name: c.missing for name, c in _candidates().items() if "authors" in name}
    assert len(missing) == 4 and all("3 to 23 rows" in why for why in missing.values())
    assert not any(c.missing for name, c in _candidates().items() if "authors" not in name)


# ---- the stages


def test_the_sources_make_groups_of_every_size_of_two_and_three_and_one_of_all():
    sizes = {}
    for source in SOURCES:
        x = householder_stages.gradient(source, 512, 32, CPU, 0, torch.bfloat16).float()
        sizes[source] = set(Householder.of(x).size.tolist())
    assert {2, 3, 4, 5} < sizes["lognormal"] and max(sizes["lognormal"]) > 16
    # Ranges of Gaussian rows differ a little, and with them the sizes of some groups.
    assert sizes["equal"] <= {2, 3, 4} and sizes["one"] == {512}


@pytest.mark.parametrize("source", SOURCES)
def test_every_stage_is_there_and_right_and_the_table_says_what_it_costs(source):
    timer = FakeTimer()
    case = householder.case(24, 32, 40, CPU, 1, source=source)
    got = measure(case, timer, Budget(1000.0, timer), ONCE, log=lambda text: None)
    assert {c["status"] for c in got["candidates"]} == {"ok"}
    assert {c["remark"] for c in got["candidates"] if c["ours"]} == {"bit-equal"}
    tags = {"product", "psq", "psq whole", "statistics", "grouping global", "grouping tile", "transform global",
            "transform tile", "transform auto", "inverse global", "whole global", "whole tile", "whole auto"}  # fmt: skip
    assert {c.tag for c in case.candidates if c.ours} == tags
    assert [c.name.split(", ")[-1] for c in case.candidates if not c.ours] == ["copy_ of dY",
        "T and T⁻¹", "transform + quantize", "inverse", "input gradient"]  # fmt: skip
    result = {"environment": record(device="cpu"), "cases": [got], "memory": [], "repeats": [], "launches": [],
              "skipped": [], "counters": {}, "suites": ["householder"], "spent_s": 1.0, "budget_s": 2.0}  # fmt: skip
    lines = report(result).splitlines()
    assert not any("PSGD moves" in line for line in lines)
    first = next(i for i, line in enumerate(lines) if line.startswith("What BHQ costs"))
    assert "on the CPU; a GPU: not measured" in lines[first]
    assert {c.name for c in case.candidates} <= {line.split("  ")[0] for line in lines[first:]}


def test_a_case_of_whole_gradients_alone_has_what_t8_reads():
    assert [c.tag for c in _candidates(alone=False, authors=False).values()] == [
        "product", "psq", "psq whole", "whole global", "whole tile", "whole auto"]  # fmt: skip
    assert len(_candidates(authors=False)) == len(_candidates()) - 4


def test_the_bytes_are_those_of_the_tensors_that_the_stages_take_and_give(device):
    m, n, k = 24, 32, 40
    s, size = householder_stages.kernel_stages(torch.device(device), m, n, k), Sizes(m, n, k, 4)
    p = householder_stages.Problem(m, n, k, torch.device(device), "lognormal", 1, s)
    p.dtype, dy = torch.float32, p.dy[0].float()
    found, groups, codes = p.found(0), p.groups(0, "global"), p.right(0, "global")[1]
    moved = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    per_row = (codes.scale, codes.offset, codes.row_sum)
    assert size.statistics == moved(dy, *found)
    assert size.grouping == moved(found[0], *groups) - 4  # the end of the last group
    assert size.transform == moved(dy, codes.q, *groups, found[1], *per_row) - 4
    assert size.quantization == moved(dy, codes.q, *per_row)
    z = p.product(0, "global")
    dx = s.inverse(z, p.magnitudes(0, "global"), found, groups, p.value(0), p.columns, torch.float32)
    assert size.inverse == moved(z, dx, *groups, p.magnitudes(0, "global"), found[0], p.value(0)) - 4
    operands = (codes.q, p.b.q, *per_row)
    assert size.product() == moved(*operands, dx)
    assert size.product(row=36) == moved(*operands, dx, *groups, found[0], p.value(0)) - 4


def test_a_whole_gradient_moves_what_its_stages_move():
    m, n, k = 24, 32, 40
    of = {c.tag: c.bytes for c in _candidates().values()}
    assert min(c.bytes for c in _candidates().values()) > 0
    assert of["psq whole"] == of["psq"] + of["product"]
    product = of["statistics"] + of["grouping global"] + of["transform global"] + of["product"] + of["inverse global"]
    assert of["whole global"] == of["whole tile"] == of["whole auto"] == product  # the CPU's output is float32
    tiled = {c.tag: c.bytes for c in _candidates(kernels=True).values()}
    assert tiled["inverse tile"] == Sizes(m, n, k, 4).product(row=36)
    assert tiled["whole tile"] == of["statistics"] + of["grouping tile"] + of["transform tile"] + tiled["inverse tile"]
    halves = Sizes(m, n, k, 2)
    assert halves.product(element=4) - halves.product() == 2 * m * k


def test_what_is_off_in_one_place_is_wrong():
    named = _candidates()
    for name in (*(f"transform + quantize, {form}" for form in FORMS), "PSQ quantization"):
        good = named[name].run(0)
        for field in ("q", "scale", "offset", "row_sum"):
            off = getattr(good, field).clone()
            off.view(-1)[5] += 1
            with pytest.raises(Wrong, match=field):
                named[name].check(good._replace(**{field: off}), 0)
    for name in ("dgrad product", "inverse, global", *(f"input gradient, {what}" for what in ("PSQ", "BHQ global"))):
        off = named[name].run(0).clone()
        off[3, 5] *= 1 + 2.0**-6
        with pytest.raises(Wrong):
            named[name].check(off, 0)
    for name in ("grouping, global", "grouping, tile"):
        good = named[name].run(0)
        off = good.order.clone()
        off[[0, 1]] = off[[1, 0]]
        with pytest.raises(Wrong, match="order"):
            named[name].check(good._replace(order=off), 0)
    ranges, _ = named["statistics"].run(0)
    with pytest.raises(Wrong, match="ranges"):
        named["statistics"].check((ranges * (1 + EPS * 2), None), 0)
    authors = named["authors' way, input gradient"]
    with pytest.raises(Wrong):
        authors.check(authors.run(0).flip(0), 0)


def test_the_suite_has_the_shapes_of_the_networks_on_a_gpu_and_some_of_each_size_on_the_cpu():
    gpu = [(p.suite, p.shape) for p in plans(("householder",), torch.device("cuda", 0), False)]
    cube = "8192x8192x8192"
    assert gpu[:2] == [("householder", cube), ("householder", "4096x4096x4096")]
    assert {("householder", "x".join(map(str, shape))) for shape in FRONTIER} <= set(gpu)
    assert {("householder, equal", cube), ("householder, one", cube)} <= set(gpu)
    rows = [int(p.shape.split("x")[0]) for p in plans(("householder",), CPU, False)]
    assert set(rows) == {128, 512, 2048, 4096}


# ---- what it costs


def _timed(**times):
    """A measured case with these milliseconds by tag."""
    made = [{"name": tag, "tag": tag, "ours": True, "status": "ok", "remark": "", "prediction": "",
             "ms": {"median": ms}, "gb_s": 1e3 / ms, "samples_ms": [ms] * 5} for tag, ms in times.items()]  # fmt: skip
    return {"suite": "householder", "shape": "8192x8192x8192", "unit": "ms", "candidates": made}


def test_t8_is_what_bhq_takes_beyond_psq_over_the_product():
    def verdicts(case, **environment):
        result = {"environment": record(**environment), "cases": [case], "skipped": []}
        return {t.what: t.judged(result)[4:6] for t in TARGETS if t.name == "T8"}

    whole, tiled = "BHQ beyond PSQ, of dgrad at 8192³", "BHQ in tiles beyond PSQ, of dgrad at 8192³"
    times = {"product": 2.0, "psq whole": 2.5, "whole global": 2.68, "whole tile": 2.75}
    got = verdicts(_timed(**times))
    assert (got[whole], got[tiled]) == (("9 %", "met"), ("12 %", "missed"))
    assert got["BHQ beyond PSQ, of dgrad at 4096³"] == ("", "not measured")
    smaller = _timed(**times) | {"shape": "4096x4096x4096"}
    assert verdicts(smaller)["BHQ in tiles beyond PSQ, of dgrad at 4096³"] == ("12 %", "met")
    for name in times:
        partly = _timed(**{tag: ms for tag, ms in times.items() if tag != name})
        assert verdicts(partly)[tiled if name == "whole tile" else whole] == ("", "not measured")
    assert {v for _, v in verdicts(_timed(**times), device="cpu").values()} == {"not measured"}
    wrong = _timed(**times)
    wrong["candidates"][1]["status"] = "wrong"
    assert verdicts(wrong)[whole] == ("", "not measured")


def test_a_prediction_is_of_the_products_operations_and_of_the_bytes_that_the_others_move(monkeypatch):
    monkeypatch.setattr(householder, "ceilings", lambda device: cost.Ceilings(800.0, 1100.0, None, 3.0, "measured"))
    n = 8192
    ms = {tag: float(text.split()[0]) for tag, text in householder._expected(Sizes(n, n, n, 2), CPU).items()}
    assert ms["product"] == ms["inverse tile"] == pytest.approx(2 * n**3 / 1100e9, abs=6e-4)
    square = n * n / 3e9  # of one byte
    assert ms["statistics"] == pytest.approx(2 * square, rel=0.02) and ms["psq"] == pytest.approx(3 * square, rel=0.02)
    assert ms["inverse global"] == pytest.approx(6 * square, rel=0.02)
    # Beyond PSQ: a read for the statistics; of all rows as one also the float32 product, 2 bytes more, and the inverse.
    assert ms["whole tile"] - ms["psq whole"] == pytest.approx(2 * square, rel=0.03)
    assert ms["whole global"] - ms["psq whole"] == pytest.approx(10 * square, rel=0.03)
    monkeypatch.setattr(householder, "ceilings", lambda device: None)
    assert householder._expected(Sizes(n, n, n, 2), CPU) == {}


def test_the_table_divides_times_by_the_products_and_by_psqs():
    case = _timed(product=2.0, psq=0.5, statistics=0.25)
    *_, last = costs(case).splitlines()
    assert last.split() == ["statistics", "0.250", "12.5", "%", "12.5-12.5", "%", "0.500×", "1000", "4000"]
    *_, alone = costs(_timed(statistics=0.25)).splitlines()
    assert alone.split() == ["statistics", "0.250", "1000", "4000"]  # no product, no ratio; no copy
    *_, beside = costs(_timed(**{"dy copy": 0.2, "statistics": 0.25})).splitlines()
    assert beside.split()[-3:] == ["4000", "80.0", "%"]


def test_the_width_from_which_on_bhq_costs_less_than_a_tenth_is_of_the_measured_pieces():
    pieces = {"product": 4.0, "psq": 0.5, "statistics": 0.25, "grouping global": 0.25, "grouping tile": 0.0625,
              "transform global": 0.75, "transform tile": 0.75, "inverse global": 0.15, "inverse tile": 4.5}  # fmt: skip
    times = {**pieces, "psq whole": 4.5, "whole global": 5.4, "whole tile": 5.625}

    def rows(**other):
        return householder.break_evens(_timed(**{**times, **other}))

    # Beyond PSQ 0.25 + 0.25 + 0.75 - 0.5 = 0.75 ms, and 0.15 of each 4: 0.75 + 0.15·r = 0.05 + 0.4·r at r = 2.8.
    at, tile = rows()
    assert at.width == 22938 and (at.extra, at.share) == pytest.approx((0.9, 0.2))
    assert tile.width == float("inf") and tile.cells() == ("BHQ tile", "1.12", "25 %", "never")  # 4.5 - 4 > 0.4
    assert rows(**{"inverse global": 0.41})[0].cells()[-1] == "never"
    assert rows(**{"transform global": 0.05})[0].cells()[-1] == "1"  # 0.05 ms, a tenth of PSQ's quantization
    assert rows(**{"inverse tile": 4.125})[1].width == 15267  # 0.5625 + 0.125·r = 0.05 + 0.4·r
    alone = {tag: ms for tag, ms in times.items() if tag != "statistics"}
    assert {row.width for row in householder.break_evens(_timed(**alone))} == {None}
    assert householder.break_evens(_timed(**pieces)) == []
    assert costs(_timed(**times)).splitlines()[-1].split()[-1] == "never"
    run = fake.machine(
        fake.result(
            fake.case(
                "householder",
                "8192x8192x8192",
                *(fake.candidate(tag, ms, tag=tag) for tag, ms in times.items()),
                unit="ms",
            )
        )
    )
    (shown,) = [b for b in sections._cases([run], defaultdict(str)) if "BHQ against PSQ" in getattr(b, "caption", "")]
    assert [row[-1] for row in shown.rows] == ["22938", "never"]


# ---- the study of bit-widths


def _recipe(mean, std=0.01, diverged=0, runs=4):
    return {"runs": [{}] * runs, "diverged": diverged, "accuracy_mean": mean, "accuracy_std": std,
            "gradient_variance": {"first_epoch": 1e-3, "last_epoch": 2e-3}}  # fmt: skip


def test_a_recipe_loses_beyond_two_standard_errors_of_the_difference_or_if_it_diverges():
    base = _recipe(0.9)
    error = (2 * 0.01**2 / 4) ** 0.5
    assert not bits_study.loses(_recipe(0.9 - 1.99 * error), base)
    assert bits_study.loses(_recipe(0.9 - 2.01 * error), base)
    assert not bits_study.loses(_recipe(0.95), base)
    assert bits_study.loses(_recipe(0.95, diverged=1), base)
    assert bits_study.loses(_recipe(None, None, diverged=4), base)
    assert bits_study.loses(_recipe(0.9 - 1.99 * error, runs=5), base)  # more seeds, a smaller error


def test_a_quantizer_begins_to_lose_where_it_loses_from_there_on():
    recipes = {"qat8": _recipe(0.9)}
    for family, losing in (("ptq", {4, 3, 2}), ("psq", {7, 2}), ("bhq", {5, 4, 3}), ("auto", set())):
        for b in bits_study.BITS:
            recipes[f"{family}{b}"] = _recipe(0.5 if b in losing else 0.9)
    begin = {family: bits_study.begins_to_lose(recipes, family, bits_study.BITS) for family in bits_study.FAMILIES}
    assert begin == {"ptq": 4, "psq": 2, "bhq": None, "auto": None}
    arguments = {"seeds": 4, "epochs": 2, "families": list(bits_study.FAMILIES), "bits": list(bits_study.BITS)}
    recipes["exact"] = _recipe(0.9)
    values = dict.fromkeys(bits_study.TILED, 0.5)
    batches = [{"seed": 0, "bits": 5, "epochs": {"1": {"128": values}}}]
    text = bits_study.tables({"recipes": recipes, "arguments": arguments, "batches": batches})
    assert "| loses from | 4 bits | 2 bits | not down to 2 | not down to 2 |" in text
    assert text.count("**50.00 ± 1.00**") == 8  # every loss, also one that is not the beginning


def test_the_study_trains_every_recipe_with_every_seed_and_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bits_study, "TILED", ("bhq", "bhq-tile"))
    x, y = torch.rand(140, 16), torch.arange(140) % 10
    data = demo.Digits("made up", x, y, x[:20], y[:20])
    chosen = {"epochs": 1, "seeds": 2, "families": ["bhq"], "bits": [8, 5, 2]}
    found = bits_study.study(data=data, **chosen)
    assert list(found["recipes"]) == ["exact", "qat8", "bhq8", "bhq5", "bhq2"]
    runs = found["recipes"]["bhq2"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1] and not any("step_ms" in run for run in runs)
    assert found["recipes"]["bhq2"]["accuracy_mean"] == statistics.fmean(run["accuracy"] for run in runs)
    variance = [found["recipes"][name]["gradient_variance"]["last_epoch"] for name in ("qat8", "bhq8", "bhq5", "bhq2")]
    assert variance[0] == 0 and variance == sorted(variance)
    by_rows = found["batches"][0]["epochs"]["1"]
    assert list(by_rows) == ["128", "140"] and by_rows["128"]["bhq"] == by_rows["128"]["bhq-tile"]  # one tile
    assert by_rows["140"]["bhq"] != by_rows["140"]["bhq-tile"] and found["batches"][0]["bits"] == 5
    bits_study.plot({"arguments": chosen, **found}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
