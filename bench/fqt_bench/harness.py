"""Fair timing: candidates interleaved in one process, each checked before and after it is timed, raw samples kept.

Nothing here touches a device: a `Timer` is passed in (`fqt_bench.cuda.CudaTimer`, `fqt_bench.cpu.CpuTimer`, a fake one
in the tests).
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .stats import percentile, speed_ups

DOES_NOT_FIT = "does not fit"  # begins the remark on a candidate that the device is too small for
DIFFERS_FROM, SAME_AS = "differs from", ", and those of"  # in the remark on what is compared with another's bits
RESERVE_S = 5.0  # a candidate that has not been compiled is not started with less time left than this
FIRST_LEAD_MS = 1.0  # head start of the host while it has not been timed
MAX_LEAD_MS = 20.0


class Wrong(Exception):
    """A candidate's output is not what the reference says."""


class Sample(NamedTuple):
    """device_ms: that the work took. host_ms: to enqueue it, 0 where nothing is enqueued. starved: the device had to wait
    for the host."""

    device_ms: float
    host_ms: float
    starved: bool


class Timer(Protocol):
    """What the harness needs of a device; `now` is a clock in seconds."""

    def now(self) -> float: ...
    def synchronize(self) -> None: ...
    def sample(self, run: Callable[[], object], lead_ms: float) -> Sample: ...


@dataclass(frozen=True)
class Candidate:
    """One way of doing a case's work.

    run(i) launches on input set i and returns its outputs. check(outputs, i) returns a remark such as "bit-equal", or
    raises Wrong. ops and bytes: the operations and the bytes of memory traffic that the work needs at least, None where
    no rate is to be quoted. provider: whose code it is; a failure of fqt's own is a failure of the benchmark. tag: what it
    counts as in the targets. missing: why it cannot run here, and is reported as skipped. rewind: called before a run that
    is to repeat the one before. same_bits: candidates of a case with the same name here must give the same bits.
    """

    name: str
    run: Callable[[int], Any]
    check: Callable[[Any, int], str]
    ops: float | None = None
    bytes: float | None = None
    provider: str = "fqt"
    prediction: str = ""
    tag: str = ""
    missing: str = ""
    rewind: Callable[[], object] | None = None
    same_bits: str = ""

    @property
    def ours(self) -> bool:
        return self.provider == "fqt"


@dataclass(frozen=True)
class Case:
    """Candidates that are timed against each other on `sets` sets of inputs.

    suite: the kind of case. unit: what the table shows, a rate or "ms". ratios are of the rates in that unit, of the times
    where it is "ms".
    """

    suite: str
    shape: str
    unit: str
    baseline: str
    candidates: tuple[Candidate, ...]
    sets: int = 2


class Budget:
    """A number of seconds by a timer's clock, from `start` on, or from now."""

    def __init__(self, seconds: float, timer: Timer, start: float | None = None) -> None:
        self.seconds, self._timer, self._start = seconds, timer, timer.now() if start is None else start

    def spent(self) -> float:
        return self._timer.now() - self._start

    def left(self) -> float:
        return self.seconds - self.spent()


@dataclass(frozen=True)
class Effort:
    """How long a case is warmed up and sampled: whole rounds, until `rounds` or, after min_rounds, until limit_s."""

    rounds: int = 100
    min_rounds: int = 10
    limit_s: float = 3.0
    warm_up_s: float = 0.25
    warm_up_rounds: int = 3


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    case: Case,
    timer: Timer,
    budget: Budget,
    effort: Effort = Effort(),
    refused: Mapping[str, str] = {},
    log: Callable[[str], object] = _say,
) -> dict[str, Any]:
    """Check, warm up, sample and check again every candidate of a case: plain values, ready for JSON.

    Each round runs every candidate once, in an order of its own: drifts of clock or temperature reach all alike.
    A status is "ok", "wrong", "error" or "skip"; only "ok" comes with figures. An error is also what `refused` names, with
    the reason: it is not run. Skipped: what is not installed, does not fit on the device, or finds no time left.
    """
    records = {c.name: _record(c) for c in case.candidates}
    for name in refused.keys() & records.keys():
        records[name] |= {"status": "error", "remark": f"crashed: {refused[name]}"}
    for candidate in (c for c in case.candidates if c.missing):
        records[candidate.name] |= {"status": "skip", "remark": candidate.missing}
    candidates = [c for c in case.candidates if records[c.name]["status"] == "ok"]
    active = [c for c in candidates if _admit(c, case, timer, budget, records[c.name], log)]
    samples: dict[str, list[Sample]] = {c.name: [] for c in active}
    lead_ms = _warm_up(active, case, timer, effort, records)
    start, done = timer.now(), 0
    with _no_garbage_collection():
        for order in orders(len(active), effort.rounds):
            if done >= effort.min_rounds and (timer.now() - start > effort.limit_s or budget.left() <= 0):
                break
            for candidate in (active[i] for i in order):
                if records[candidate.name]["status"] == "ok":
                    sample = _sample(candidate, done % case.sets, timer, lead_ms, records[candidate.name])
                    samples[candidate.name] += [sample] if sample else []
            done += 1
    for candidate in active:
        if records[candidate.name]["status"] == "ok":
            _try(candidate, 0, timer, records[candidate.name])
    for candidate in active:
        if records[candidate.name]["status"] == "ok":
            records[candidate.name] |= figures(samples[candidate.name], candidate)
    _add_ratios(records, case, {c.name: c for c in case.candidates})
    return {"suite": case.suite, "shape": case.shape, "unit": case.unit, "baseline": case.baseline, "rounds": done,
            "sets": case.sets, "lead_ms": lead_ms, "candidates": list(records.values())}  # fmt: skip


def repeat(
    case: Case, timer: Timer, refused: Mapping[str, str] = {}, runs: int = 3, set_: int = 0
) -> list[dict[str, str]]:
    """Whether fqt's own candidates give the same bits in each of several runs, and those that must, the same as others.

    One record each: suite, shape, name, status ("wrong" where they differ, or a failure's) and remark.
    """
    records, first = [], {}
    for candidate in (c for c in case.candidates if c.ours and not c.missing and c.name not in refused):
        record = {"suite": case.suite, "shape": case.shape, "name": candidate.name, "status": "ok",
                  "remark": f"{runs} runs bit-equal"}  # fmt: skip
        records.append(record)
        try:
            kept = _bits(candidate, timer, set_)
            differs = next((f"run {i + 1} differs from run 1" for i in range(1, runs)
                            if not _equal(kept, _bits(candidate, timer, set_))), "")  # fmt: skip
            if candidate.same_bits:
                name, bits = first.setdefault(candidate.same_bits, (candidate.name, kept))
                differs = differs or ("" if _equal(bits, kept) else f"{DIFFERS_FROM} {name}")
                if name != candidate.name:
                    record["remark"] += f"{SAME_AS} {name}"
        except Exception as error:
            record |= _failure(error)
        else:
            record |= {"status": "wrong", "remark": differs} if differs else {}
    return records


def _bits(candidate: Candidate, timer: Timer, set_: int) -> list[torch.Tensor]:
    if candidate.rewind is not None:
        candidate.rewind()
    out = candidate.run(set_)
    timer.synchronize()
    return [t.clone() for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def _equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def orders(candidates: int, rounds: int, seed: int = 0) -> Iterator[list[int]]:
    """For each round a permutation of the candidates."""
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        order = list(range(candidates))
        shuffle(order)
        yield order


# ---- figures


def figures(samples: Sequence[Sample], candidate: Candidate) -> dict[str, Any]:
    """Median, p10 and p90 in ms, the rates that follow from the median, and the raw samples in the order taken."""
    times = [s.device_ms for s in samples]
    median = statistics.median(times)
    return {
        "ms": {"median": median, "p10": percentile(times, 10), "p90": percentile(times, 90), "n": len(times)},
        "tops": None if candidate.ops is None else candidate.ops / median * 1e-9,
        "gb_s": None if candidate.bytes is None else candidate.bytes / median * 1e-6,
        "host_ms": statistics.median(s.host_ms for s in samples),
        "starved": sum(s.starved for s in samples),
        "samples_ms": times,
    }


def _add_ratios(records: dict[str, dict[str, Any]], case: Case, candidates: Mapping[str, Candidate]) -> None:
    """ "ratio": the rate, in the case's unit, over the baseline's in the same run; above 1 is faster."""

    def work(name: str) -> float | None:
        field = {"GB/s": "bytes", "ms": None}.get(case.unit, "ops")
        return 1.0 if field is None else getattr(candidates[name], field)

    measured = {
        name: record["samples_ms"] for name, record in records.items() if record["status"] == "ok" and work(name)
    }
    if case.baseline in measured:
        for name, ratio in speed_ups(measured[case.baseline], measured).items():
            more = work(name) / work(case.baseline)
            records[name]["ratio"] = {field: more * value for field, value in ratio._asdict().items()}


# ---- running a candidate


def _record(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "ours": candidate.ours,
        "provider": candidate.provider,
        "tag": candidate.tag,
        "prediction": candidate.prediction,
        "status": "ok",
        "remark": "",
    }


def _admit(
    candidate: Candidate, case: Case, timer: Timer, budget: Budget, record: dict[str, Any], log: Callable[[str], object]
) -> bool:
    """Compile and check a candidate on every input set; false, with the reason in its record, where it is not timed."""
    if budget.left() < RESERVE_S:
        record |= {"status": "skip", "remark": f"{max(budget.left(), 0):.0f} s of {budget.seconds:.0f} s left"}
        return False
    log(f"bench: {budget.spent():5.1f} s  {case.suite} {case.shape}: {candidate.name}")
    with poisoned_memory():
        return all(_try(candidate, i, timer, record) for i in range(case.sets))


def _try(candidate: Candidate, i: int, timer: Timer, record: dict[str, Any]) -> bool:
    """Run once and check; false, and the status and reason in the record, where the candidate is wrong or raises."""
    try:
        out = candidate.run(i)
        timer.synchronize()
        record["remark"] = candidate.check(out, i)
        return True
    except Exception as error:
        record |= _failure(error)
        return False


def _failure(error: Exception) -> dict[str, str]:
    if isinstance(error, Wrong):
        return {"status": "wrong", "remark": str(error)}
    text = (str(error).strip() or "no message").splitlines()[0][:200]
    if isinstance(error, ModuleNotFoundError):
        return {"status": "skip", "remark": f"not installed: {text}"}
    # Triton's: more shared memory than a block may have.
    if isinstance(error, torch.OutOfMemoryError) or type(error).__name__ == "OutOfResources":
        return {"status": "skip", "remark": f"{DOES_NOT_FIT}: {text}"}
    return {"status": "error", "remark": f"{type(error).__name__}: {text}"}


def _sample(candidate: Candidate, i: int, timer: Timer, lead_ms: float, record: dict[str, Any]) -> Sample | None:
    try:
        return timer.sample(lambda: candidate.run(i), lead_ms)
    except Exception as error:
        record |= _failure(error)
        return None


def _warm_up(
    active: Sequence[Candidate], case: Case, timer: Timer, effort: Effort, records: dict[str, dict[str, Any]]
) -> float:
    """Run the candidates in turn for at least warm_up_s. Returns the lead: twice what the host needs to enqueue the
    slowest one, the same for all, since a device that has idled longer is cooler."""
    host: dict[str, list[float]] = {c.name: [] for c in active}
    start, done = timer.now(), 0
    while active and (done < effort.warm_up_rounds or timer.now() - start < effort.warm_up_s):
        for candidate in active:
            if records[candidate.name]["status"] == "ok":
                sample = _sample(candidate, done % case.sets, timer, FIRST_LEAD_MS, records[candidate.name])
                host[candidate.name] += [sample.host_ms] if sample else []
        done += 1
        if all(records[c.name]["status"] != "ok" for c in active):
            break
    slowest = max((statistics.median(ms) for ms in host.values() if ms), default=0.0)
    return min(2 * slowest + 0.05, MAX_LEAD_MS) if slowest else 0.0


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within, no sample pays for the garbage of those before it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch.empty and its like hand out NaN and the largest integers, so that nothing unwritten goes unseen."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns of operators without a deterministic form
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


# ---- checks


def check_equal(got: torch.Tensor, want: torch.Tensor, what: str = "output") -> str:
    """The same bits; NaN is never right."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{what}: {got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}")
    if not torch.equal(got, want):
        raise Wrong(f"{what}: {int((got != want).sum())} of {want.numel()} elements differ")
    return "bit-equal"


def check_rounded(got: torch.Tensor, want: torch.Tensor, what: str = "output") -> str:
    """A bfloat16 `got` against a float32 `want`: equal after rounding, or within one unit in the last place, 2⁻⁷."""
    if torch.equal(got, want.to(got.dtype)):
        return "bit-equal"
    if got.shape != want.shape or not bool(((got.float() - want).abs() <= 2.0**-7 * want.abs()).all()):
        raise Wrong(f"{what}: not within one unit in the last place of {got.dtype}")
    return "within 1 bf16 ulp"


def check_near(got: torch.Tensor, want: torch.Tensor, bound: float, what: str = "output") -> str:
    """‖got − want‖ ≤ bound · ‖want‖, in float64 sums."""
    if got.shape != want.shape:
        raise Wrong(f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    difference = (got.float() - want.float()).square().sum(dtype=torch.float64)
    error = float((difference / want.float().square().sum(dtype=torch.float64)).sqrt())
    if not error <= bound:
        raise Wrong(f"{what}: relative error {error:.2g}, allowed {bound:.2g}")
    return f"error {error:.1e}"
