"""What tuning measures: real kernels in the interpreter, found right, or wrong where one code is."""

import pytest
import torch
from tune_fakes import LARGE

from fqt import collect, store, tuned, tuner, tuner_cases
from fqt.candidates import candidates
from fqt.collect import Target
from fqt.dispatch import Problem
from fqt.store import Machine
from fqt.suites import Layer
from fqt.tuner import tune
from fqt.tuner_cases import title
from fqt_bench import harness

CPU = torch.device("cpu")
HERE = Machine("CPU", "cpu", 1, "", "3.7.1", torch.__version__)
BRIEF = harness.Effort(rounds=1, min_rounds=1, warm_up_s=0.0, warm_up_rounds=0)


@pytest.mark.interpreted
def test_real_kernels_are_right_and_all_are_ranked(tmp_path):
    """Extents that are no multiples of 16 have the fewest candidates: a run takes the interpreter 0.1 s."""
    met = {
        problem: count
        for recipe, ops in (("int8", tuned.OPS), ("fp8", ("quantize_gradient", "scaled_mm")))
        for problem, count in collect.of_layers([Layer("", 5, 5, 5)], Target("", 1, "cpu"), [recipe], "float32").items()
        if problem.op in ops
    }
    file = tmp_path / "table.json"
    report = tune(met, CPU, budget_s=600.0, machine=HERE, file=file, effort=BRIEF)
    assert [r.problem for r in report.tuned] == tuner.in_order(met) and report.remaining == []
    assert {r.problem.op for r in report.tuned} == {"scaled_mm", "quantize", "quantize_gradient"}
    table = store.load(HERE, file=file)
    for result in report.tuned:
        assert result.excluded == {} and list(result.times) == [title(c) for c in candidates(result.problem)]
        assert table.exact(result.problem) == result.entry
        assert (result.entry.bf16_ns > 0) == (result.problem.op == "scaled_mm")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "kind", ["per_row stochastic cols", "per_row nearest both strided", "per_row nearest rows stats"]
)
def test_a_real_kernel_that_writes_one_wrong_code_is_found(kind, tmp_path, monkeypatch):
    from fqt_kernels import quantize

    def wrong(x, *, kernel=None, **more):
        assert (more["stats"] is not None) == ("stats" in kind) and x.is_contiguous() == ("strided" not in kind)
        q, qt, *rest = launch(x, kernel=kernel, **more)
        if kernel == "tile":
            codes = qt if q is None else q
            codes[-1, -1] += 1
        return q, qt, *rest

    launch = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", wrong)
    problem = Target("", 1, "cpu").problem("quantize", 5, 9, dtype=torch.bfloat16, kind=kind)
    (result,) = tune({problem: 1}, CPU, budget_s=600.0, machine=HERE, file=tmp_path / "t.json", effort=BRIEF).results
    assert result.wrong == sum(c.kernel == "tile" for c in candidates(problem)) > 0
    assert result.entry is None or {timing.kernel for timing in result.entry.ranking} <= {"rows", "long_rows"}


def test_the_grid_fits_the_gpu_and_is_no_table():
    large = tuner_cases.grid(LARGE)
    assert 50 < len(large) == len(set(large))
    for _, (block_m, block_n, block_k, warps, stages), split_k in large:
        assert (block_m + block_n) * block_k * stages <= 227 * 1024 and split_k == 1
        assert block_m * block_n <= 128 * 32 * warps
    assert len(tuner_cases.grid(Problem("scaled_mm", 4096, 4096, 4096, device="cuda", arch="sm86"))) < len(large)
    assert tuner_cases.grid(Problem("quantize", 64, 64)) == ()
