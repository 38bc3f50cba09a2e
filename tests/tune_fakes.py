"""A fake GPU for the tests of tuning: candidates with times, faults and a clock of the test's own."""

import torch
from bench_fakes import says

from fqt.candidates import Candidate
from fqt.dispatch import Problem
from fqt.store import Machine
from fqt.tuner_cases import BF16, describe, title
from fqt_bench import harness

H100 = Machine("NVIDIA H100 80GB HBM3", "sm90", 132, "580.1", "3.6.0", "2.11.0+cu130")
SMALL, MIDDLE, LARGE = (Problem("scaled_mm", n, n, n, device="cuda", arch="sm90", processors=132, triton="3.6.0")
                        for n in (1024, 2048, 4096))  # fmt: skip
# In the order of `candidates`: the heuristic's guess first.
A, B, C, D = (Candidate("portable", config) for config in
              ((64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3)))  # fmt: skip


class Bench:
    """Candidates A to D of any problem, with times in ms, faults and a clock of the test's own."""

    def __init__(self) -> None:
        self.times = {A: 4.0, B: 3.0, C: 2.0, D: 1.0}
        self.faults: dict[Candidate, str] = {}
        self.bad: dict[Problem, Exception] = {}
        self.clock = self.now_running = 0.0
        self.second = 0.0  # of the clock, that a sample takes
        self.log: list[tuple[str, str]] = []
        self.tried: list[list[str]] = []
        self.crashes: dict[tuple[str, str], str] = {}
        self.samples, self.interrupt_at, self.dead = 0, None, False

    # ---- a timer

    def now(self) -> float:
        return self.clock

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    def sample(self, run, lead_ms) -> harness.Sample:
        self.samples += 1
        if self.samples == self.interrupt_at:
            raise KeyboardInterrupt
        run()
        self.clock += self.second
        return harness.Sample(self.now_running, 0.1, False)

    # ---- cases and trial runs

    def build(self, problem, competing, device, sets=2, yardstick=True, exact=True):
        if problem in self.bad:
            raise self.bad[problem]
        made = [self._candidate(problem, candidate) for candidate in competing]
        fault = self.faults.get(BF16)
        check = says("far off") if fault == "wrong" else lambda out, i: ""
        bf16 = harness.Candidate(
            BF16, lambda i: 1 / 0 if fault == "raises" else self._ran(5.0), check, provider="torch"
        )
        return harness.Case(problem.op, describe(problem), "ms", "", (*[bf16] * yardstick, *made), sets)

    def _candidate(self, problem, candidate):
        fault, name = self.faults.get(candidate, ""), title(candidate)

        def run(i):
            self.log.append((describe(problem), name))
            if fault == "raises":
                raise RuntimeError("no kernel")
            return self._ran(self.times[candidate], torch.tensor([float(len(self.log))] if fault == "flaky" else [1.0]))

        check = says("3 of 4 elements differ") if fault == "wrong" else lambda out, i: "bit-equal"
        return harness.Candidate(name, run, check)

    def _ran(self, ms, out=None):
        self.now_running = ms
        return out

    def trial(self, jobs, device, limit_s):
        self.tried.append([describe(problem) for problem, _ in jobs])
        return self.crashes

    def ran(self, candidate) -> int:
        return sum(name == title(candidate) for _, name in self.log)
