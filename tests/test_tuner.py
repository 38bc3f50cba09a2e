"""Tuning: what may win, what is kept, in which order and for how long."""

import pytest
import torch
from bench_fakes import ONCE
from hypothesis import given
from hypothesis import strategies as st
from tune_fakes import H100, LARGE, MIDDLE, SMALL, A, B, Bench, C, D

from fqt import dispatch, store, tuned, tuner, tuning
from fqt.candidates import Candidate
from fqt.tuner import Report, tune
from fqt.tuner_cases import BF16, describe, title

CPU = torch.device("cpu")
NAMED = {"B": B, "C": C, "D": D}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    bench = Bench()
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "build", bench.build)
    monkeypatch.setattr(tuner, "candidates", lambda problem: (A, B, C, D))
    monkeypatch.setattr(tuner, "heuristic", lambda problem: A)
    return bench


def run(bench, problems=None, **more) -> Report:
    problems = {SMALL: 1} if problems is None else problems
    return tune(problems, CPU, **{"budget_s": 1000.0, "machine": H100, "timer": bench, "trial": bench.trial,
                                  "effort": ONCE} | more)  # fmt: skip


def chosen(report: Report) -> Candidate:
    return Candidate(*report.results[0].entry.ranking[0][:3])


# ---- what wins


def test_the_fastest_wins_and_the_others_follow_it(bench):
    (result,) = run(bench).results
    assert [timing[:3] for timing in result.entry.ranking] == [D, C, B, A]
    assert [timing.ns for timing in result.entry.ranking] == [1_000_000, 2_000_000, 3_000_000, 4_000_000]
    assert result.entry.bf16_ns == 5_000_000 and result.heuristic_ns == 4_000_000
    assert result.entry.key == tuned.key(SMALL) and result.entry.exact == (1024, 1024, 1024)
    assert list(store.load(H100)) == [result.entry]


def test_dispatch_takes_what_won(bench):
    run(bench)
    choice = dispatch.select(SMALL, store.load(H100))
    assert (choice.source, choice.kernel, choice.config) == ("tuned", *D[:2])


@pytest.mark.parametrize("c, d, wins", [(1.0, 1.0, "C"), (1.019, 1.0, "C"), (1.021, 1.0, "D"), (1.0, 1.019, "C")])
def test_a_tie_goes_to_the_first(bench, c, d, wins):
    bench.times |= {C: c, D: d}
    assert chosen(run(bench)) == NAMED[wins]


@pytest.mark.parametrize("ms, wins", [(1.019, "C"), (1.021, "B")])
def test_what_beats_the_heuristic_by_no_more_than_a_tie_leaves_it_its_place(bench, monkeypatch, ms, wins):
    monkeypatch.setattr(tuner, "heuristic", lambda problem: C)
    bench.times |= {B: 1.0, C: ms, D: 9.0}
    assert chosen(run(bench)) == NAMED[wins]


TIMES = st.lists(st.sampled_from([1000, 1040, 1100, 2000]), min_size=4, max_size=4)
JITTER = st.lists(st.integers(-4, 4), min_size=4, max_size=4)


@given(TIMES, JITTER, JITTER)
def test_machines_whose_times_differ_by_less_than_a_tie_agree(times, one, other):
    """Times that are equal, or 4 % apart: within ±0.4 % of noise 2 % tells which."""
    ranked = [
        [
            timing[:3]
            for timing in tuner.ranking({c: t + j for c, t, j in zip((A, B, C, D), times, jitter, strict=True)}, B)
        ]
        for jitter in (one, other)
    ]
    assert ranked[0] == ranked[1]


@given(st.lists(st.integers(1, 10_000), min_size=4, max_size=4))
def test_the_first_of_a_ranking_is_within_a_tie_of_the_best(times):
    ranked = tuner.ranking(dict(zip((A, B, C, D), times, strict=True)), None)
    assert ranked[0].ns <= tuner.TIE * min(times)
    assert {timing[:3]: timing.ns for timing in ranked} == dict(zip((A, B, C, D), times, strict=True))


def test_a_ranking_is_no_longer_than_a_table_takes():
    many = {Candidate("portable", (64, 64, 128, 4, 4), split): 10 * split for split in range(1, 17)}
    assert [timing.split_k for timing in tuner.ranking(many, None)] == list(range(1, tuned.MAX_RANKING + 1))


# ---- what may not win


@pytest.mark.parametrize(
    "fault, says, wrong, crashed",
    [("wrong", "wrong: 3 of 4 elements differ", 1, 0), ("flaky", "wrong: run 2 differs from run 1", 1, 0),
     ("raises", "error: RuntimeError: no kernel", 0, 1)],
)  # fmt: skip
def test_a_candidate_that_is_not_right_never_wins_however_fast(bench, fault, says, wrong, crashed):
    bench.faults[D] = fault
    report = run(bench)
    (result,) = report.results
    assert chosen(report) == C and title(D) not in result.times
    assert result.excluded == {title(D): says} and (result.wrong, result.crashed) == (wrong, crashed)
    assert D not in [timing[:3] for timing in next(iter(store.load(H100))).ranking]


def test_what_wins_has_repeated_its_bits_three_times(bench, monkeypatch):
    """Checked on both sets of inputs, warmed up, timed twice, checked again, and run at least three times more."""
    run(bench)
    assert bench.ran(D) == 2 + 1 + 2 + 1 + tuner.RUNS and tuner.RUNS >= 3


def test_what_crashed_in_the_trial_run_is_never_run(bench):
    bench.crashes = {
        (describe(SMALL), title(D)): "its process ended with status -11",
        (describe(LARGE), title(C)): "hangs",
    }
    report = run(bench)
    (result,) = report.results
    assert chosen(report) == C and bench.ran(D) == 0 and result.crashed == 1
    assert "status -11" in result.excluded[title(D)] and bench.ran(C) > 0


def test_where_none_is_right_nothing_is_kept(bench):
    bench.faults = dict.fromkeys((A, B, C, D), "wrong")
    report = run(bench)
    assert report.tuned == [] and "no candidate is right" in report.results[0].error and len(store.load(H100)) == 0


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_yardstick_that_fails_is_no_fault_of_the_kernels(bench, fault):
    bench.faults[BF16] = fault
    (result,) = run(bench).results
    assert result.entry.bf16_ns == 0 and (result.wrong, result.crashed) == (0, 0) and BF16 in result.excluded


# ---- what is kept


def test_a_second_run_measures_compiles_and_starts_nothing(bench, monkeypatch):
    run(bench, {SMALL: 1, LARGE: 1})
    before = bench.samples, len(bench.log), len(bench.tried)
    monkeypatch.setattr(tuner, "_timer", lambda device: 1 / 0)
    report = run(bench, {SMALL: 1, LARGE: 3}, timer=None, trial=None)
    assert (bench.samples, len(bench.log), len(bench.tried)) == before
    assert report.known == 2 and report.results == report.remaining == [] and report.stopped == ""


def test_what_a_step_tuned_without_bf16_is_measured_again_beside_it(bench, monkeypatch):
    monkeypatch.setattr(tuner, "_timer", lambda device: bench)
    bench.second = 1.0  # the effort of a step is bounded by time
    assert store.save(H100, [tuner.tune_one(SMALL, CPU)])
    report = run(bench, {SMALL: 9, MIDDLE: 1})
    assert report.known == 0 and [result.problem for result in report.results] == [MIDDLE, SMALL]
    assert [result.entry.bf16_ns for result in report.results] == [5_000_000] * 2
    assert run(bench).known == 1


def test_what_is_measured_next_launches_by_the_table_that_is_tuned_into(bench, monkeypatch, tmp_path):
    """A convolution as a product of matrices does, of which the file may say what the machine's own table does not."""
    seen, gpu = [], torch.device("cuda", 0)
    monkeypatch.setattr(store.Machine, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(tuner, "build", lambda *args, **more: seen.append(len(tuning.table(gpu))) or bench.build(*args))
    tuning.reload()
    run(bench, {SMALL: 1, MIDDLE: 1}, file=tmp_path / "own.json")
    assert seen == [0, 1] and len(tuning.table(gpu)) == 0
    run(bench, {SMALL: 1, LARGE: 1}, file=tmp_path / "own.json")
    assert seen == [0, 1, 2] and len(tuning.table(gpu)) == 0
    tuning.reload()


def test_force_measures_again_and_the_newer_entry_stays(bench):
    run(bench)
    bench.times[C] = 0.5
    assert chosen(run(bench, force=True)) == C
    assert [Candidate(*entry.ranking[0][:3]) for entry in store.load(H100)] == [C]


def test_the_budget_keeps_what_is_done_and_the_next_run_goes_on(bench):
    """A problem takes 5 candidates x 3 samples x 1 s. RESERVE_S 5 s are to be left to begin another."""
    bench.second = 1.0
    problems = {SMALL: 1, MIDDLE: 1, LARGE: 1}
    first = run(bench, problems, budget_s=25.0)
    assert [r.problem for r in first.results] == [LARGE, MIDDLE] and first.remaining == [SMALL]
    assert "of the budget are left" in first.stopped and first.measure_s == 30.0
    assert {entry.exact for entry in store.load(H100)} == {(4096,) * 3, (2048,) * 3}
    second = run(bench, problems, budget_s=25.0)
    assert [r.problem for r in second.results] == [SMALL] and second.known == 2 and second.remaining == []
    assert bench.tried[-1] == [describe(SMALL)]


def test_ctrl_c_keeps_what_is_done(bench):
    bench.interrupt_at = 20  # in the second problem
    report = run(bench, {SMALL: 1, MIDDLE: 1, LARGE: 1})
    assert report.interrupted and [r.problem for r in report.tuned] == [LARGE]
    assert report.remaining == [MIDDLE, SMALL] and len(store.load(H100)) == 1


def test_ctrl_c_while_compiling_leaves_all_for_the_next_run(bench):
    def trial(*_):
        raise KeyboardInterrupt

    report = run(bench, trial=trial)
    assert report.interrupted and report.remaining == [SMALL] and bench.log == []


def test_a_place_that_cannot_be_written_is_counted(bench, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not saved"):
        report = run(bench, file=tmp_path / "file" / "table.json", force=True)
    assert report.unsaved == 1 and len(report.tuned) == 1


# ---- the order, and what goes wrong


def test_the_most_work_comes_first(bench):
    """4096³ is 64 times 1024³: 65 of the latter are more."""
    assert [r.problem for r in run(bench, {SMALL: 63, MIDDLE: 1, LARGE: 1}).results] == [LARGE, SMALL, MIDDLE]
    assert tuner.in_order({SMALL: 65, LARGE: 1}) == [SMALL, LARGE]
    assert bench.tried == [[describe(p) for p in (LARGE, SMALL, MIDDLE)]]


def test_a_problem_that_raises_is_reported_and_the_rest_goes_on(bench):
    bench.bad[LARGE] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")
    report = run(bench, {SMALL: 1, LARGE: 1})
    assert report.results[0].error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert [r.problem for r in report.tuned] == [SMALL] and report.stopped == ""


def test_a_device_that_is_broken_ends_the_tuning(bench):
    bench.bad[LARGE] = RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.dead = True
    report = run(bench, {SMALL: 1, LARGE: 1})
    assert "of no use any more: CUDA error" in report.stopped and report.remaining == [SMALL] and bench.log == []


def test_a_problem_without_kernels_is_left_to_the_reference(bench, monkeypatch):
    monkeypatch.setattr(tuner, "candidates", lambda problem: ())
    report = run(bench)
    assert "the reference computes it" in report.results[0].error and bench.log == []


def test_progress_is_told_before_and_after_every_problem(bench):
    told = []
    run(
        bench,
        {SMALL: 1, LARGE: 1},
        on_progress=lambda report, total, stage: told.append((len(report.results), total, stage)),
    )
    assert told == [(0, 2, "compiling the candidates of 2 problems"), (0, 2, describe(LARGE)), (1, 2, describe(SMALL)),
                    (2, 2, "")]  # fmt: skip


# ---- exhaustive search, and one problem


def test_an_exhaustive_search_is_reported_and_never_stored(bench, monkeypatch):
    better = Candidate("portable", (256, 256, 64, 8, 2))
    monkeypatch.setattr(tuner, "grid", lambda problem: (D, better))
    bench.times[better] = 0.5
    (result,) = run(bench, exhaustive=True).results
    assert result.best_of_grid == (title(better), 500_000)
    assert result.entry.ranking[0][:3] == D and title(better) not in result.times
    assert better not in [timing[:3] for timing in result.entry.ranking]
    assert run(bench, force=True).results[0].best_of_grid is None and bench.ran(better) == 9


def test_one_problem_is_measured_without_a_trial_a_yardstick_or_a_file(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "_timer", lambda device: bench)
    bench.second = 1.0  # the effort is bounded by time
    entry = tuner.tune_one(SMALL, CPU)
    assert entry.ranking[0][:3] == D and entry.bf16_ns == 0 and bench.tried == [] and list(tmp_path.iterdir()) == []
    bench.faults = dict.fromkeys((A, B, C, D), "wrong")
    with pytest.raises(RuntimeError, match=r"no candidate is right: .* wrong: 3 of 4 elements differ"):
        tuner.tune_one(SMALL, CPU)
