"""The benchmark's harness with a fake clock: what is counted, what is refused. Nothing is timed here."""

import gc

import pytest
import torch
from bench_fakes import ONCE, FakeTimer, a_case, bad_candidates, candidate

from fqt_bench.harness import (
    Budget,
    Case,
    Effort,
    Sample,
    Wrong,
    check_equal,
    check_near,
    check_rounded,
    figures,
    measure,
    orders,
    repeat,
)


def _measure(*candidates, effort=ONCE, timer=None, budget_s=1000.0, sets=2):
    timer = timer or FakeTimer()
    result = measure(a_case(*candidates, sets=sets), timer, Budget(budget_s, timer), effort)
    return {record["name"]: record for record in result["candidates"]}


# ---- figures


def test_figures_follow_from_the_median_and_keep_every_sample():
    samples = [Sample(ms, 0.5, ms > 3) for ms in (4.0, 2.0, 100.0, 1.0, 3.0)]
    got = figures(samples, candidate("a", ops=3e9, bytes=6e6))
    assert got["ms"] == {"median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(61.6), "n": 5}
    assert got["tops"] == pytest.approx(1.0)  # 3e9 operations in 3 ms
    assert got["gb_s"] == pytest.approx(2.0)  # 6e6 bytes in 3 ms
    assert (got["samples_ms"], got["starved"], got["host_ms"]) == ([4.0, 2.0, 100.0, 1.0, 3.0], 2, 0.5)


def test_the_ratio_is_the_rate_over_the_baselines():
    got = _measure(candidate("base"), candidate("twice the work", ops=2e9), effort=ONCE)
    assert got["base"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    other = got["twice the work"]
    assert other["ratio"]["value"] == pytest.approx(2 * got["base"]["ms"]["median"] / other["ms"]["median"])
    assert 0 < other["ratio"]["low"] <= other["ratio"]["value"] <= other["ratio"]["high"]


@pytest.mark.parametrize(("unit", "more"), [("GB/s", 3.0), ("TOPS", 2.0), ("ms", 1.0)])
def test_the_ratio_is_of_the_work_that_the_unit_counts(unit, more):
    """Twice the operations and three times the bytes in the same time; in "ms" the time alone counts."""
    timer = FakeTimer()
    timer.sample = lambda run, lead_ms: run() or Sample(2.0, 0.0, False)
    candidates = (candidate("base", bytes=1e6), candidate("other", ops=2e9, bytes=3e6))
    case = Case("suite", "1x1", unit, "base", candidates)
    got = measure(case, timer, Budget(100.0, timer), ONCE)["candidates"]
    assert got[1]["ratio"] == {"value": more, "low": more, "high": more}


def test_a_candidate_without_a_rate_has_no_ratio():
    got = _measure(candidate("base"), candidate("no operations", ops=None))
    assert "ratio" not in got["no operations"] and got["no operations"]["status"] == "ok"


# ---- interleaving


def test_every_round_runs_every_candidate_once():
    seen = list(orders(5, 200))
    assert len(seen) == 200 and all(sorted(order) == list(range(5)) for order in seen)
    firsts = [order[0] for order in seen]
    assert min(firsts.count(i) for i in range(5)) > 15  # no candidate keeps a place


def test_candidates_share_rounds_input_sets_and_head_start():
    log = []
    named = [candidate(name, run=lambda i, name=name: log.append((name, i))) for name in "abc"]
    timer = FakeTimer()
    got = _measure(*named, effort=Effort(rounds=6, warm_up_s=0.0, warm_up_rounds=1), timer=timer, sets=2)
    assert [len(got[name]["samples_ms"]) for name in "abc"] == [6, 6, 6]
    timed = log[3 * 2 + 3 : -3]  # after the checks on two sets and one round of warm-up, before the check at the end
    for r in range(6):
        assert sorted(timed[3 * r : 3 * r + 3]) == [(name, r % 2) for name in "abc"]
    assert set(timer.leads[3:]) == {2 * 0.25 + 0.05}


def test_warm_up_lasts_its_seconds_and_sampling_stops_at_its_limit_in_whole_rounds():
    timer = FakeTimer(second=0.01)
    effort = Effort(rounds=1000, min_rounds=3, limit_s=0.5, warm_up_s=0.2, warm_up_rounds=1)
    got = _measure(candidate("a"), candidate("b"), effort=effort, timer=timer)
    rounds = len(got["a"]["samples_ms"])
    assert rounds == len(got["b"]["samples_ms"]) and 25 <= rounds <= 27  # two candidates of 10 ms, 500 ms
    assert timer.samples - 2 * rounds >= 20  # 200 ms of warm-up


def test_a_spent_budget_ends_the_sampling_after_the_least_number_of_rounds():
    timer = FakeTimer(second=1.0)
    effort = Effort(rounds=1000, min_rounds=4, limit_s=1e9, warm_up_s=0.0, warm_up_rounds=1)
    got = _measure(candidate("a"), effort=effort, timer=timer, budget_s=6.0)
    assert len(got["a"]["samples_ms"]) == 5


# ---- refusals


@pytest.mark.parametrize("status", bad_candidates())
def test_what_is_wrong_or_fails_is_reported_and_never_timed(status):
    timer = FakeTimer()
    got = _measure(candidate("good"), bad_candidates()[status], timer=timer)
    assert got["bad"]["status"] == status and got["bad"]["remark"]
    assert not {"ms", "samples_ms", "tops", "ratio"} & got["bad"].keys()
    assert timer.samples == len(got["good"]["samples_ms"]) + 1  # one round of warm-up
    assert got["good"]["status"] == "ok"


def test_wrong_on_the_last_input_set_alone_is_wrong():
    def check(out, i):
        if i == 1:
            raise Wrong("this set")
        return ""

    assert _measure(candidate("a"), candidate("b", check=check))["b"]["status"] == "wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32])
def test_an_element_that_nothing_wrote_is_wrong(dtype):
    want = torch.zeros(64, dtype=dtype)  # what fresh memory often holds

    def run(i):
        out = torch.empty(64, dtype=dtype)
        out[:63] = 0
        return out

    got = _measure(candidate("a"), candidate("b", run=run, check=lambda out, i: check_equal(out, want)))
    assert got["b"]["status"] == "wrong"
    assert torch.get_deterministic_debug_mode() == 0


def test_what_goes_wrong_while_it_is_timed_loses_its_figures():
    calls = {"late": 0, "raises": 0}

    def count(name, out=None):
        calls[name] += 1
        return calls[name]

    def run_or_raise(i):
        if count("raises") == 4:
            raise RuntimeError("in the middle")

    def check(out, i):
        if out > 5:  # two checks, a round of warm-up and two rounds before it
            raise Wrong("a race")
        return ""

    late = candidate("late", run=lambda i: count("late"), check=check)
    got = _measure(candidate("base"), late, candidate("raises", run=run_or_raise))
    assert [got[name]["status"] for name in ("base", "late", "raises")] == ["ok", "wrong", "error"]
    assert "ms" not in got["late"] and "ms" not in got["raises"]


def test_without_a_baseline_there_is_no_ratio():
    got = _measure(bad_candidates()["error"], candidate("good"))
    assert "ratio" not in got["good"] and got["good"]["tops"] > 0


def test_checks_refuse_nan_other_shapes_and_what_is_beyond_the_bound():
    want = torch.linspace(-2, 2, 64)
    nan = want.clone()
    nan[5] = torch.nan
    checks = (check_equal, check_rounded, lambda got, to: check_near(got, to, 1e9))
    for check in checks:
        for got in (nan, want[:-1]):
            with pytest.raises(Wrong):
                check(got, want)
    with pytest.raises(Wrong):
        check_equal(want.double(), want)
    assert check_equal(want, want.clone()) == "bit-equal"
    assert check_near(want * 1.001, want, 2e-3).startswith("error")
    with pytest.raises(Wrong):
        check_near(want * 1.01, want, 2e-3)


def test_bfloat16_may_be_truncated_but_not_off_by_more_than_one_unit():
    want = torch.randn(1000)
    rounded = want.to(torch.bfloat16)
    assert check_rounded(rounded, want) == "bit-equal"
    truncated = (want.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)  # the upper 16 bits
    assert check_rounded(truncated, want) == "within 1 bf16 ulp"
    with pytest.raises(Wrong):
        check_rounded((rounded.view(torch.int16) + 3).view(torch.bfloat16), want)


def test_a_candidate_that_is_refused_is_reported_and_never_run():
    ran = []
    case = a_case(candidate("base"), candidate("bad", run=ran.append))
    timer = FakeTimer()
    got = measure(case, timer, Budget(1000.0, timer), ONCE, refused={"bad": "did not end", "other": ""})["candidates"]
    assert [(c["status"], c["remark"]) for c in got] == [
        ("ok", "fine"),
        ("error", "crashed: did not end"),
    ] and ran == []


def test_what_is_not_installed_is_said_and_is_no_error():
    def run(i):
        import no_such_module  # noqa: F401

    got = _measure(candidate("base"), candidate("peer", run=run))["peer"]
    assert got["status"] == "skip" and got["remark"].startswith("not installed: ") and "no_such_module" in got["remark"]


def test_what_the_device_has_no_memory_for_is_skipped():
    def run(i):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 4.00 GiB")

    got = _measure(candidate("base"), candidate("large", run=run))["large"]
    assert got["status"] == "skip" and got["remark"].startswith("does not fit: out of memory")


def test_what_cannot_run_here_is_said_and_never_run():
    ran = []
    got = _measure(candidate("base"), candidate("peer", run=ran.append, provider="torch", missing="needs a GPU"))[
        "peer"
    ]
    assert (got["status"], got["remark"], got["provider"], got["ours"]) == ("skip", "needs a GPU", "torch", False)
    assert ran == [] and "ms" not in got


def test_a_candidate_is_not_begun_when_the_time_is_up():
    got = _measure(candidate("a"), budget_s=2.0)
    assert got["a"]["status"] == "skip" and "2 s left" in got["a"]["remark"] and "ms" not in got["a"]


# ---- repetition


def _repeat(*candidates, **options):
    return [(r["name"], r["status"], r["remark"]) for r in repeat(a_case(*candidates), FakeTimer(), **options)]


def test_runs_that_give_the_same_bits_repeat_and_others_differ():
    same, runs = torch.arange(4.0), iter(range(99))
    got = _repeat(
        candidate("same", run=lambda i: (same.clone(), None)),
        candidate("last bit", run=lambda i: torch.tensor(1.0 + 2.0**-23 * (next(runs) == 2))),
        candidate("second output", run=lambda i: (same, torch.tensor(next(runs)))),
        candidate("peer", run=lambda i: torch.rand(4), provider="torch"),
        candidate("not here", missing="needs a GPU"),
    )
    assert got == [
        ("same", "ok", "3 runs bit-equal"),
        ("last bit", "wrong", "run 3 differs from run 1"),
        ("second output", "wrong", "run 2 differs from run 1"),
    ]


def test_a_run_that_writes_into_the_output_of_the_last_one_is_compared_with_what_that_was():
    shared, runs = torch.zeros(2), iter(range(9))
    assert _repeat(candidate("a", run=lambda i: shared.fill_(next(runs))))[0][1] == "wrong"


def test_a_stochastic_candidate_is_taken_back_before_each_run():
    state = [0]

    def run(i):
        state[0] += 1
        return torch.tensor(state[0])

    assert _repeat(candidate("a", run=run, rewind=lambda: state.__setitem__(0, 7)))[0][1] == "ok"
    assert _repeat(candidate("a", run=run))[0][1] == "wrong"


def test_candidates_that_must_agree_are_compared_with_the_first():
    values = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}
    named = [
        candidate(n, run=lambda i, v=v: torch.tensor(v), same_bits="" if n == "d" else "x") for n, v in values.items()
    ]
    assert [(name, status) for name, status, _ in _repeat(*named)] == [
        ("a", "ok"), ("b", "ok"), ("c", "wrong"), ("d", "ok")]  # fmt: skip
    assert [remark for *_, remark in _repeat(*named)] == [
        "3 runs bit-equal", "3 runs bit-equal, and those of a", "differs from a", "3 runs bit-equal"]  # fmt: skip


def test_what_fails_or_is_refused_repeats_nothing():
    fine = candidate("fine", run=lambda i: torch.ones(2))
    got = _repeat(fine, bad_candidates()["error"], candidate("hung"), refused={"hung": ""})
    assert [(name, status) for name, status, _ in got] == [("fine", "ok"), ("bad", "error")]


def test_no_garbage_is_collected_while_samples_are_taken(monkeypatch):
    seen = []
    timer = FakeTimer()
    taken = timer.sample
    timer.sample = lambda run, lead_ms: seen.append(gc.isenabled()) or taken(run, lead_ms)
    _measure(candidate("a"), timer=timer, effort=Effort(rounds=3, warm_up_s=0.0, warm_up_rounds=1))
    assert seen == [True, False, False, False] and gc.isenabled()
