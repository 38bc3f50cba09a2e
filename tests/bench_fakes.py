"""Fakes for the tests of the benchmark: a clock that nothing real drives, and candidates that go wrong."""

import torch

from fqt_bench import environment
from fqt_bench.harness import Candidate, Case, Effort, Sample, Wrong

ONCE = Effort(rounds=2, min_rounds=2, warm_up_s=0.0, warm_up_rounds=1)


class FakeTimer:
    """Every run takes 1, 2, 3, … ms of device time, and `second` seconds of the clock."""

    def __init__(self, second=0.0, starved=False):
        self.clock, self.second, self.starved, self.samples, self.leads = 0.0, second, starved, 0, []

    def now(self):
        return self.clock

    def synchronize(self):
        pass

    def sample(self, run, lead_ms):
        run()
        self.clock += self.second
        self.samples += 1
        self.leads.append(lead_ms)
        return Sample(float(self.samples), 0.25, self.starved)


def candidate(name, run=lambda i: None, check=lambda out, i: "fine", **fields):
    return Candidate(name, run, check, **{"ops": 1e9, **fields})


def a_case(*candidates, sets=2):
    return Case("suite", "1x1", "TOPS", candidates[0].name, candidates, sets)


def says(text):
    def check(out, i):
        raise Wrong(text)

    return check


def raises(error):
    def run(i):
        raise error

    return run


def bad_candidates():
    """A candidate for each status that is not "ok"."""
    out_of_resources = type("OutOfResources", (Exception,), {})
    return {
        "wrong": candidate("bad", check=says("3 of 4 elements differ")),
        "error": candidate("bad", run=raises(RuntimeError("no kernel\nfor this"))),
        "skip": candidate("bad", run=raises(out_of_resources("shared memory"))),
    }


def record(**fields):
    """The environment of a result, of a GPU that is not there."""
    return {**environment.environment(torch.device("cpu")), "device": "cuda", "gpu": "NVIDIA H200",
            "commit": "0123456789abcdef", "dirty": False, **fields}  # fmt: skip
