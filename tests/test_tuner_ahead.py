"""Compiling ahead: every candidate once, over several processes, and crashes named."""

import sys
import weakref
from collections import Counter

import pytest
import torch
from tune_fakes import LARGE, MIDDLE, SMALL, A, B, Bench, C, D

from fqt import tuner_ahead
from fqt.candidates import Candidate, candidates
from fqt.collect import Target
from fqt.tuner_cases import describe, title
from fqt_bench import ahead

CPU = torch.device("cpu")


def test_every_candidate_is_tried_in_exactly_one_process(monkeypatch, capsys):
    jobs = [(SMALL, (A, B, C)), (LARGE, (A, B, C, D))]
    bench, seen = Bench(), Counter()
    monkeypatch.setattr(tuner_ahead, "build", bench.build)
    for part in range(3):
        tuner_ahead.share(jobs, CPU, part, 3)
    for line in capsys.readouterr().out.splitlines():
        seen[line] += 1
    assert len(seen) == 14 and set(seen.values()) == {1} and len(bench.log) == 7  # a beginning and an end of each


def test_problems_of_one_candidate_are_spread_over_the_processes(monkeypatch):
    monkeypatch.setattr(tuner_ahead, "build", (bench := Bench()).build)
    for part, problem in enumerate((SMALL, MIDDLE, LARGE)):
        tuner_ahead.share([(SMALL, (A,)), (MIDDLE, (A,)), (LARGE, (A,))], CPU, part, 3)
        assert bench.log[part:] == [(describe(problem), title(A))]


def test_a_problem_that_cannot_be_built_leaves_the_process_the_others(monkeypatch):
    bench = Bench()
    bench.bad[SMALL] = torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(tuner_ahead, "build", bench.build)
    untried = tuner_ahead.share([(SMALL, (A,)), (LARGE, (A,))], CPU, 0, 1)
    assert [problem for problem, _ in bench.log] == [describe(LARGE)] and untried == [f"{describe(SMALL)}: no memory"]


def test_what_no_process_could_try_is_said(monkeypatch, capsys):
    bench = Bench()
    bench.bad[SMALL] = torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(tuner_ahead, "build", bench.build)

    def run_ahead(command, parts, limit_s, stall_s):
        for part in range(2):
            tuner_ahead.main(command(part, 2)[3:])
        return {}

    monkeypatch.setattr(ahead, "run_ahead", run_ahead)
    assert tuner_ahead.trial([(SMALL, (A, B)), (LARGE, (A, B))], CPU, 70.0) == {}
    said = capsys.readouterr().err
    assert "1 problems are compiled when they are timed" in said and f"{describe(SMALL)}: no memory" in said
    assert describe(LARGE) not in said


def test_the_inputs_of_a_problem_are_gone_before_the_next_ones_are_made(monkeypatch):
    bench, alive = Bench(), weakref.WeakSet()

    def build(*arguments, **more):
        assert len(alive) == 0
        case = bench.build(*arguments, **more)
        alive.update(candidate.run for candidate in case.candidates)
        return case

    monkeypatch.setattr(tuner_ahead, "build", build)
    tuner_ahead.share([(SMALL, (A, B)), (LARGE, (A, B))], CPU, 0, 1)
    assert len(bench.log) == 4


def test_crashes_are_named_and_what_a_dead_process_left_is_tried_again(monkeypatch):
    split, ran = Candidate("portable", B.config, 4), []

    def run_ahead(command, parts, limit_s, stall_s):
        program, _, module, file, device, part, of = command(1, 4)
        assert (program, module, device, part, of) == (sys.executable, "fqt.tuner_ahead", "cuda:1", "1", "4")
        assert 0 < limit_s <= 70 and 30 <= stall_s <= 35  # a kernel that hangs is found before the budget ends
        with open(file, encoding="utf-8") as jobs:
            ran.append(tuner_ahead.read(jobs.read()))
        return {} if len(ran) == 3 else {("scaled_mm", describe(SMALL), title((A, split)[len(ran) - 1])): "did not end"}

    monkeypatch.setattr(ahead, "run_ahead", run_ahead)
    refused = tuner_ahead.trial([(SMALL, (A, split, C)), (LARGE, (A,))], torch.device("cuda", 1), 70.0)
    assert refused == {(describe(SMALL), title(A)): "did not end", (describe(SMALL), title(split)): "did not end"}
    assert ran == [[(SMALL, tried), (LARGE, (A,))] for tried in ((A, split, C), (split, C), (C,))]


@pytest.mark.interpreted
def test_a_real_process_runs_its_candidates_and_nothing_is_held_against_them(monkeypatch):
    monkeypatch.setattr(ahead, "parts", lambda: 1)
    problem = Target("", 1, "cpu").problem("scaled_mm", 4, 4, 4, dtype=torch.float32)
    ended = []
    monkeypatch.setattr(ahead._Worker, "pending", lambda self: ended.append(len(self._keys("end"))))
    assert tuner_ahead.trial([(problem, candidates(problem))], CPU, 60.0) == {}
    assert ended[-1] == len(candidates(problem)) == 1
