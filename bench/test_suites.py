"""The suites of `fqt bench` under pytest-benchmark: each candidate of a case is checked, then timed; a group a case.

    python -m pytest bench                                 # smoke
    FQT_BENCH_SUITES="kernels layers" python -m pytest bench --benchmark-columns=min,median,iqr

For information: candidates take turns only in `fqt bench`, whose ratios are the ones to quote. On the GPU where there is
one, without the L2 flush. Not collected by a plain `pytest`.
"""

import functools
import os

import pytest
import torch

from fqt_bench.harness import Wrong, poisoned_memory
from fqt_bench.run import CPU_THREADS
from fqt_bench.suites import NAMES, plans

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
SUITES = os.environ.get("FQT_BENCH_SUITES", "smoke").split()
if unknown := set(SUITES) - set(NAMES):
    raise pytest.UsageError(
        f"FQT_BENCH_SUITES: no such suite: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}"
    )


@functools.lru_cache(maxsize=1)
def _case(number):
    return PLANS[number].build(sets=1)


PLANS = [plan for plan in plans(SUITES, DEVICE, quick=True) if plan.key == "cases"]


def pytest_generate_tests(metafunc):
    """A test for each candidate, named by its case; the cases are built one at a time, when their tests run."""
    names = [(number, index, f"{plan.suite} {plan.shape}: {candidate.name}") for number, plan in enumerate(PLANS)
             for index, candidate in enumerate(_case(number).candidates)]  # fmt: skip
    metafunc.parametrize(("number", "index"), [name[:2] for name in names], ids=[name[2] for name in names])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    if DEVICE.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    yield
    torch.set_num_threads(before)


def test_candidate(benchmark, number, index):
    case = _case(number)
    candidate = case.candidates[index]
    if candidate.missing:
        pytest.skip(candidate.missing)
    with poisoned_memory():
        _check(candidate)
    benchmark.group = f"{case.suite} {case.shape}"
    benchmark.name = candidate.name

    def run():
        candidate.run(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    _check(candidate)


def _check(candidate):
    try:
        candidate.check(candidate.run(0), 0)
    except Wrong as error:
        pytest.fail(f"{candidate.name}: {error}")
