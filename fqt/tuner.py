"""Tuning: measure every kernel that may be launched for a problem, and keep the ranking of those that are right.

A candidate takes part if it neither hangs nor crashes in a process of its own, its outputs are the reference's before and
after timing, and it repeats its own bits. Times are medians of interleaved rounds with a cold L2 (`fqt_bench.harness`).
Times within 2 % are a tie, which goes to the heuristic's choice, else to the first in the order of `candidates`: so
machines of a kind agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import conv_problems, store, tuned, tuning
from .candidates import Candidate, candidates, heuristic
from .dispatch import Problem
from .store import Machine
from .tuned import Entry, Timing
from .tuner_cases import BF16, build, describe, grid, title

TIE = 1.02  # times within this factor are equal
RUNS = 3  # that must agree in every bit
AHEAD_SHARE = 0.5  # of the budget, at most, for compiling ahead
RESERVE_S = 5.0  # a problem is not begun with less time left than this
# Of nominal hardware, only to put the longest work first.
_OPS_PER_S, _BYTES_PER_S = 1e15, 3e12


@dataclass
class Result:
    """What was found of one problem. entry: None where nothing was, and error says why.

    times: ns of every candidate that is right. excluded: why another is not, by title; wrong and crashed count those whose
    outputs differ (from the reference, or from run to run) and those that hang, crash or raise. best_of_grid: title and ns
    of the best of an exhaustive search, candidates included.
    """

    problem: Problem
    count: int
    entry: Entry | None = None
    times: dict[str, int] = field(default_factory=dict)
    heuristic: str = ""
    excluded: dict[str, str] = field(default_factory=dict)
    wrong: int = 0
    crashed: int = 0
    best_of_grid: tuple[str, int] | None = None
    error: str = ""

    @property
    def chosen(self) -> Timing | None:
        return self.entry.ranking[0] if self.entry else None

    @property
    def heuristic_ns(self) -> int | None:
        return self.times.get(self.heuristic)

    def to_json(self) -> dict[str, Any]:
        chosen = self.chosen
        grid_ns = self.best_of_grid and {"name": self.best_of_grid[0], "ns": self.best_of_grid[1]}
        return {
            "problem": dataclasses.asdict(self.problem), "count": self.count, "error": self.error,
            "chosen": chosen and {"name": title(chosen), "ns": chosen.ns},
            "heuristic": {"name": self.heuristic, "ns": self.heuristic_ns} if self.heuristic else None,
            "bf16_ns": self.entry.bf16_ns or None if self.entry else None, "times_ns": self.times,
            "excluded": self.excluded, "wrong": self.wrong, "crashed": self.crashed, "best_of_grid": grid_ns,
        }  # fmt: skip


@dataclass
class Report:
    """What a tuning did: results in the order of the work, known problems that were not measured again, those that were
    not begun, and the seconds that compiling ahead and measuring took. stopped: why it ended early, "" where it did not.
    """

    results: list[Result] = field(default_factory=list)
    known: int = 0
    remaining: list[Problem] = field(default_factory=list)
    compile_s: float = 0.0
    measure_s: float = 0.0
    stopped: str = ""
    interrupted: bool = False
    unsaved: int = 0

    @property
    def tuned(self) -> list[Result]:
        return [result for result in self.results if result.entry is not None]

    def to_json(self) -> dict[str, Any]:
        return {
            "results": [result.to_json() for result in self.results], "known": self.known,
            "remaining": [describe(problem) for problem in self.remaining], "compile_s": round(self.compile_s, 3),
            "measure_s": round(self.measure_s, 3), "stopped": self.stopped, "interrupted": self.interrupted,
            "unsaved": self.unsaved,
        }  # fmt: skip


# Called when a stage begins and after every result: the report so far, how many problems there are, and what is at work.
Progress = Callable[[Report, int, str], object]


def worth(problem: Problem, count: int = 1) -> float:
    """Seconds that a nominal GPU spends on so many of these problems."""
    elements = problem.m * problem.n
    if problem.op in tuned.PRODUCTS:
        return 2.0 * elements * problem.k * conv_problems.count(problem.kind, "groups") / _OPS_PER_S * count
    if problem.op == conv_problems.ARRANGED:  # read once, written for fprop and for dgrad
        return 3.0 * elements * problem.k / _BYTES_PER_S * count
    copies = 2 if "both" in problem.kind or problem.op.startswith("quantize_gradient") else 1
    return elements * (getattr(torch, problem.dtype).itemsize + copies) / _BYTES_PER_S * count


def in_order(problems: Mapping[Problem, int]) -> list[Problem]:
    """The problems with the most work first; of equals a product of matrices before the convolution that is made of it,
    then the given order."""
    return sorted(problems, key=lambda p: (-worth(p, problems[p]), p.op in conv_problems.PRODUCTS))


def tune(
    problems: Mapping[Problem, int],
    device: torch.device,
    *,
    budget_s: float,
    machine: Machine | None = None,
    file: Path | None = None,
    force: bool = False,
    exhaustive: bool = False,
    timer: Any = None,
    trial: Callable[..., Mapping[tuple[str, str], str]] | None = None,
    effort: Any = None,
    on_progress: Progress = lambda *_: None,
) -> Report:
    """Measure problems, the most work first, and save the entry of each to the store as soon as it is known.

    Problems that the store has are left alone, but for products without bf16's time, as a step tunes them, which come last.
    Ctrl-C, or the end of the budget, ends the tuning and keeps what is done; a problem that raises is reported, and the
    next one is begun.

    Args:
        problems: with how often each occurs.
        machine, file: whose table the entries go to, and into which file (see `fqt.store`); by default the device's own.
        force: measure again what the store has.
        exhaustive: time a grid of configurations beside the candidates of products. They are reported, never stored.
        timer, effort: of `fqt_bench.harness`.   trial: `tuner_ahead.trial`, or another that finds crashes.
    """
    machine = Machine.of(device) if machine is None else machine
    known = tuned.EMPTY if force else store.load(machine, file=file)
    todo = [problem for problem in in_order(problems) if not tuned.is_complete(known.exact(problem))]
    todo.sort(key=lambda problem: known.exact(problem) is not None)  # bf16 may fail again and again
    report = Report(known=len(problems) - len(todo), remaining=todo)
    if not todo:
        return report
    try:
        with _current(device), tuning.reading(file):
            session = _Session(device, budget_s, timer, effort, exhaustive)
            if trial is not None or device.type == "cuda":
                on_progress(report, len(todo), f"compiling the candidates of {len(todo)} problems")
                with session.timed(report, "compile_s"):
                    session.try_ahead(todo, trial)
            with session.timed(report, "measure_s"):
                _measure_all(session, problems, report, machine, file, on_progress)
        on_progress(report, len(todo), "")
    except KeyboardInterrupt:
        report.interrupted, report.stopped = True, "interrupted"
    return report


def _measure_all(session: _Session, problems: Mapping[Problem, int], report: Report, machine: Machine, file: Path | None,
                 on_progress: Progress) -> None:  # fmt: skip
    """Measure and save what remains of the report, until the budget or the device is spent."""
    total = len(report.remaining)
    while report.remaining and not report.stopped:
        if session.left() < RESERVE_S:
            report.stopped = f"less than {RESERVE_S:g} s of the budget are left"
            return
        problem = report.remaining[0]
        on_progress(report, total, describe(problem))
        result = session.measured(problem, problems[problem])
        report.stopped = session.broken()
        if result.entry is not None and not store.save(machine, [result.entry], file=file):
            report.unsaved += 1
        elif problem.op == "scaled_mm":
            tuning.reload()  # a convolution that is a product of matrices is timed with what was found of that
        report.results.append(result)
        report.remaining = report.remaining[1:]


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def tune_one(problem: Problem, device: torch.device) -> Entry:
    """Measure one problem here and now, in about a second: what `fqt.tuning.enable` does inside a step.

    Nothing is compiled ahead, and no bf16 product is timed. What the step forbids (`fqt.backend`, determinism, adding to
    an output) may compete: the entry is for other steps too.

    Raises:
        RuntimeError: no candidate is right, or there is none; the message is the reason.
    """
    from fqt_bench.harness import Effort

    if device.type != "cpu":
        problem = dataclasses.replace(problem, force="auto", deterministic=False, plain=True)
    with _current(device), torch.no_grad():
        effort = Effort(rounds=10, min_rounds=3, limit_s=0.2, warm_up_s=0.02)
        result = _Session(device, float("inf"), None, effort, False, sets=1, yardstick=False).measured(problem, 1)
    if result.entry is None:
        raise RuntimeError(result.error)
    return result.entry


class _Session:
    """A device, a timer and a budget, and what the trial runs found."""

    def __init__(self, device: torch.device, budget_s: float, timer: Any, effort: Any, exhaustive: bool,
                 sets: int = 2, yardstick: bool = True) -> None:  # fmt: skip
        from fqt_bench.harness import Budget, Effort

        self._device, self._exhaustive, self._sets, self._yardstick = device, exhaustive, sets, yardstick
        self._timer = timer or _timer(device)
        self._effort = effort or Effort(rounds=40, limit_s=1.0, warm_up_s=0.1)
        self._budget = Budget(budget_s, self._timer)
        self._refused: Mapping[tuple[str, str], str] = {}

    def left(self) -> float:
        return self._budget.left()

    @contextlib.contextmanager
    def timed(self, report: Report, name: str) -> Iterator[None]:
        """Adds the seconds within to a field of the report."""
        start = self._timer.now()
        try:
            yield
        finally:
            setattr(report, name, getattr(report, name) + self._timer.now() - start)

    def try_ahead(self, problems: Sequence[Problem], trial: Callable[..., Mapping] | None) -> None:
        if trial is None:
            from .tuner_ahead import trial
        jobs = [(problem, self._competing(problem)) for problem in problems]
        self._refused = trial([job for job in jobs if job[1]], self._device, AHEAD_SHARE * self._budget.seconds)

    def _competing(self, problem: Problem) -> tuple[Candidate, ...]:
        """The candidates, and behind them the grid of an exhaustive search."""
        found = candidates(problem)
        return tuple(dict.fromkeys((*found, *grid(problem)))) if self._exhaustive and found else found

    def measured(self, problem: Problem, count: int) -> Result:
        """Measure one problem. Whatever it raises is in the result: the next problem may do better."""
        result = Result(problem, count)
        try:
            self._measure(problem, result)
        except Exception as e:  # out of memory, or whatever a driver throws
            text = (str(e).strip() or "no message").splitlines()[0][:200]
            result.error = f"{type(e).__name__}: {text}"
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        return result

    def broken(self) -> str:
        """Why the device is of no use any more, "" where it is."""
        try:
            self._timer.synchronize()
        except RuntimeError as e:
            return f"the device is of no use any more: {str(e).splitlines()[0][:200]}"
        return ""

    def _measure(self, problem: Problem, result: Result) -> None:
        from fqt_bench.harness import Budget, measure, repeat

        order = candidates(problem)
        if not order:
            result.error = "no kernel competes: the reference computes it"
            return
        competing = self._competing(problem)
        first = heuristic(problem)
        result.heuristic = title(first) if first in order else ""
        case = build(problem, competing, self._device, self._sets, self._yardstick)
        refused = {name: why for (of, name), why in self._refused.items() if of == case.shape}
        whole = Budget(float("inf"), self._timer)  # is kept between problems: one that is begun is measured whole
        measured = measure(case, self._timer, whole, self._effort, refused, log=lambda line: None)
        times = _times(measured["candidates"], result)
        good = dataclasses.replace(case, candidates=tuple(c for c in case.candidates if c.name in times))
        for record in repeat(good, self._timer, runs=RUNS):
            if (status := _status(record)) != "ok":
                del times[record["name"]]
                _exclude(result, record["name"], status, record["remark"])
        bf16_ns = times.pop(BF16, 0)
        result.times = {title(c): times[title(c)] for c in order if title(c) in times}
        if self._exhaustive and result.times:
            result.best_of_grid = min(times.items(), key=lambda item: item[1])
        ranked = ranking({c: times[title(c)] for c in order if title(c) in times}, first)
        if not ranked:
            result.error = "no candidate is right: " + "; ".join(f"{n}: {why}" for n, why in result.excluded.items())
            return
        result.entry = Entry(tuned.key(problem), ranked, bf16_ns, (problem.m, problem.n, problem.k))


def ranking(times: Mapping[Candidate, int], first: Candidate | None) -> tuple[Timing, ...]:
    """The candidates, in their stable order, from the best to the worst: each time the next is, of those within 2 % of the
    best that is left, the heuristic's choice, else the first."""
    left = sorted(times, key=lambda candidate: candidate != first)  # the heuristic's in front, the others as they are
    ranked = []
    while left and len(ranked) < tuned.MAX_RANKING:
        best = min(times[candidate] for candidate in left)
        ranked.append(next(candidate for candidate in left if times[candidate] <= best * TIE))
        left.remove(ranked[-1])
    return tuple(Timing(c.kernel, tuple(c.config), c.split_k, times[c]) for c in ranked)


def _times(records: Sequence[Mapping[str, Any]], result: Result) -> dict[str, int]:
    """ns by name of the harness' records that are right; the others are excluded from the result."""
    times = {}
    for record in records:
        if (status := _status(record)) == "ok":
            times[record["name"]] = max(1, round(record["ms"]["median"] * 1e6))
        else:
            _exclude(result, record["name"], status, record["remark"])
    return times


def _status(record: Mapping[str, Any]) -> str:
    """What the harness found of a candidate: "ok", "wrong", "error" or "skip"."""
    return record["status"]


def _exclude(result: Result, name: str, status: str, remark: str) -> None:
    result.excluded[name] = f"{status}: {remark}"
    result.wrong += status == "wrong" and name != BF16
    result.crashed += status == "error" and name != BF16


def _timer(device: torch.device):
    if device.type == "cpu":  # in the interpreter
        from fqt_bench.cpu import CpuTimer

        return CpuTimer()
    from fqt_bench.cuda import CudaTimer

    return CudaTimer(device)
