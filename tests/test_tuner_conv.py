"""Tuning of convolutions: real kernels in the interpreter, found right, or wrong where one value is; torch's beside."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tune_fakes import SMALL

from fqt import (
    collect,
    conv,
    conv_cost,
    conv_problems,
    conv_products,
    expectation,
    store,
    tuned,
    tuner,
    tuner_ahead,
    tuner_cases,
    tuner_conv,
)
from fqt.candidates import candidates
from fqt.collect import Target
from fqt.conv import Geometry
from fqt.recipe import Recipe
from fqt.store import Machine
from fqt.suites import Convolution
from fqt.tuner_cases import BF16, title
from fqt_bench import harness
from fqt_bench.operators import work_dtype

CPU = torch.device("cpu")
HERE = Machine("CPU", "cpu", 1, "", "3.7.1", torch.__version__)
BRIEF = harness.Effort(rounds=1, min_rounds=1, warm_up_s=0.0, warm_up_rounds=1)
EVEN = Geometry.of(
    (3, 4), (2, 2), padding=((0, 1), (0, 1))
)  # "same" of an even kernel: as much before as after it is not
TINY = {
    "strided": Convolution("", 1, 4, 1, 4, 2, 2, groups=2),
    "1x1": Convolution("", 2, 20, 1, 4, 1),
    "few channels": Convolution("", 1, 3, 2, 4, 3),
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Of a store that takes the operators of convolutions, whichever sources their kernels have."""
    monkeypatch.setattr(store, "sources", lambda: dict.fromkeys(tuned.OPS, "0" * 16))
    return tmp_path / "table.json"


def problems(of, *ops):
    return {p: n for p, n in collect.of_convolutions([of], Target("", 1, "cpu")).items() if p.op in ops}


def tune(met, file):
    return tuner.tune(met, CPU, budget_s=600.0, machine=HERE, file=file, effort=BRIEF)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", TINY)
def test_real_kernels_are_right_and_what_is_measured_is_kept(name, file):
    """Three products, each beside torch's in bf16, that is right too; of one layer also what it quantizes, and the filters:
    all that a report adds up."""
    met = problems(TINY[name], *(("quantize", *conv_problems.GRAMMAR) if name == "1x1" else conv_problems.PRODUCTS))
    report = tune(met, file)
    assert [r.problem for r in report.tuned] == tuner.in_order(met) and report.remaining == []
    assert len(met) == (7 if name == "1x1" else 3)
    table = store.load(HERE, file=file)
    for result in report.tuned:
        assert result.excluded == {} and list(result.times) == [title(c) for c in candidates(result.problem)]
        assert table.exact(result.problem) == result.entry
        assert (result.entry.bf16_ns > 0) == (result.problem.op in conv_problems.PRODUCTS)
    ways = {r.chosen.kernel for r in report.tuned if r.problem.op in conv_problems.PRODUCTS}
    assert ways == {"1x1": {"pointwise"}, "few channels": {"im2col", "implicit"}}.get(name, {"implicit"})
    if name == "1x1":
        shape = expectation._shape(torch.nn.Conv2d(20, 4, 1), "image", (2, 20, 1, 1))
        found = conv_cost.tuned_convolution(shape, Recipe.int8(), table)
        assert found.ms == pytest.approx(sum(r.chosen.ns for r in report.tuned) / 1e6)
        assert found.bf16_ms == pytest.approx(sum(r.entry.bf16_ns for r in report.tuned) / 1e6)


def run(case, i=0):
    """Of each candidate of a case whether it is right."""
    found = {}
    for candidate in case.candidates:
        try:
            candidate.check(candidate.run(i), i)
            found[candidate.name] = True
        except harness.Wrong:
            found[candidate.name] = False
    return found


@pytest.mark.interpreted
@pytest.mark.parametrize("op", conv_problems.GRAMMAR)
def test_what_one_wrong_value_makes_of_an_output_is_found(op, monkeypatch):
    """In the first and in the last place of every output."""
    from fqt_kernels import conv_quantize

    owners = {"conv": (conv_products, "product"), "conv_wgrad": (conv_products, "weight_product"),
              "quantize_images": (conv_quantize, "quantize_images"), "arrange_filters": (conv, "filters"),
              "quantize_gradient_images": (conv_quantize, "quantize_gradient_images")}  # fmt: skip
    (owner, name), (problem, *_), place = owners[op], problems(TINY["1x1"], op), None
    launch, outputs = getattr(owner, name), []

    def wrong(*args, **more):
        out = launch(*args, **more)
        outputs[:] = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if place is not None:
            part = outputs[place // 2]
            spot = part[(-(place % 2),) * part.dim()]
            spot.copy_(spot + 1 if part.dtype == torch.int8 else spot * 1.02 + 1)
        return out

    monkeypatch.setattr(owner, name, wrong)
    case = tuner_cases.build(problem, candidates(problem), CPU, sets=1)
    assert set(run(case).values()) == {True} and len(case.candidates) == 1 + (op in tuned.PRODUCTS)
    for place in range(2 * len(outputs)):
        assert run(case) == {c.name: c.name == BF16 for c in case.candidates}, place


@pytest.mark.interpreted
def test_the_yardstick_is_the_same_product_or_wrong(monkeypatch):
    """It is checked against the codes' product: of other images it is far off, whichever of the three it is."""
    for problem in problems(TINY["strided"], *conv_problems.PRODUCTS):
        case = tuner_cases.build(problem, candidates(problem)[:1], CPU, sets=2)
        bf16 = case.candidates[0]
        assert bf16.name == BF16 and bf16.provider == "torch"
        bf16.check(bf16.run(0), 0)
        with pytest.raises(harness.Wrong, match="relative error"):
            bf16.check(bf16.run(1), 0)


def test_the_yardstick_s_images_are_in_bfloat16_and_channels_last():
    assert work_dtype(torch.device("cuda")) is torch.bfloat16
    for problem in problems(Convolution("", 2, 16, 16, 6, 3), *conv_problems.PRODUCTS):
        inputs = tuner_conv._Inputs.of(problem, CPU, 2)
        for values in inputs.values():
            read = [values[name] for name in inputs.names]
            assert all(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in read)
            assert {t.dtype for t in values.values()} == {work_dtype(CPU)}


@pytest.mark.parametrize("transposed", [False, True])
def test_more_padding_behind_than_in_front_is_made_before_the_yardstick_runs(transposed):
    call = conv_problems.product(EVEN, 1, 4, 5, 5, transposed)
    problem = Target("", 1, "cpu").problem(call.op, *call.sizes, **call.more)
    inputs = tuner_conv._Inputs.of(problem, CPU, 1)
    made, _ = tuner_conv.made(problem, candidates(problem), CPU, 1, True)
    bf16 = tuner_conv._bf16(inputs, made)
    assert bf16.check(bf16.run(0), 0).startswith("error") and tuner_conv._padding(EVEN)[1] == (0, 1, 0, 1)
    assert tuner_conv._padding(EVEN._replace(out=(2, 3))) == ((0, 0), None)


@pytest.mark.parametrize("name", TINY)
def test_the_codes_of_a_trial_run_have_the_shapes_of_those_that_are_timed(name):
    """So that what is compiled ahead is what is timed. No kernel runs."""
    for problem in problems(TINY[name], *conv_problems.PRODUCTS):
        inputs = tuner_conv._Inputs.of(problem, CPU, 1)
        names = {("x", "dy"): ("h", "x"), ("w", "dy"): ("g", "back")}.get(inputs.names, ("x", "filters"))
        ((first, second),), ((a, b),) = tuner_conv._operands(inputs, *names), tuner_conv._any_operands(inputs, *names)
        cols = inputs.names == ("x", "dy")
        assert (a.cols if cols else a.rows).shape == (first.cols if cols else first.rows).shape
        assert (b.cols if cols else b.q).shape == (second.cols if cols else second.q).shape
        assert getattr(b, "channels", 0) == getattr(second, "channels", 0)


def test_a_product_of_matrices_is_tuned_before_the_convolution_that_it_is():
    met = collect.of_convolutions([Convolution("", 256, 64, 14, 64, 1)], Target("sm90", 132))
    order = [p for p in tuner.in_order(met) if p.op in tuned.PRODUCTS]
    of_matrices = {(p.m, p.n, p.k): order.index(p) for p in order if p.op == "scaled_mm"}
    assert of_matrices and all(of_matrices[p.m, p.n, p.k] < order.index(p) for p in order if p.op != "scaled_mm")


def test_the_work_of_a_convolution_is_that_of_all_groups():
    call = conv_problems.product(Geometry.of((8, 8), (3, 3), groups=4), 16, 64, 16, 16, False)
    problem = Target("sm90", 132).problem(call.op, *call.sizes, **call.more)
    alone = replace(problem, kind=problem.kind.replace("4 groups ", ""))
    assert tuner.worth(problem) == 4 * tuner.worth(alone) == 8 * 16 * 36 * 16 * 144 / tuner._OPS_PER_S


def test_a_worker_reads_the_geometry_that_it_was_given():
    call = conv_problems.product(EVEN, 2, 4, 5, 5, False)
    problem = replace(SMALL, op=call.op, **call.more)
    text = json.dumps([[asdict(p), candidates(p)] for p in (problem, SMALL)])
    jobs = tuner_ahead.read(text)
    assert jobs == [(problem, candidates(problem)), (SMALL, candidates(SMALL))] and len({p for p, _ in jobs}) == 2
