"""A step of PSGD over a network's parameters: the lists, the bytes that have to move, what checks refuse, target T7."""

import functools
import math
from collections import defaultdict
from dataclasses import replace

import bench_fabricated as fake
import pytest
import torch
from bench_fakes import ONCE, FakeTimer, candidate, raises, record
from torch import nn

import fqt
from fqt.int8_weight import Int8Weight
from fqt.optim import PSGD, PSGDAdamW
from fqt_bench import counters, facts, psgd, sections, steps, suites, targets
from fqt_bench.harness import Budget, Wrong, measure
from fqt_bench.parameters import LLAMA_8B, RESNET50, SMALL_LLAMA, SMALL_RESNET50, TINY, Parameters
from fqt_bench.stats import of_the_copy
from fqt_bench.targets import TARGETS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the lists


def test_resnet_50_has_the_parameters_of_the_published_network():
    assert (len(RESNET50.shapes), RESNET50.elements, RESNET50.size) == (161, 25557032, "161x25557032")
    kinds = [sum(len(shape) == dims for shape in RESNET50.shapes) for dims in (4, 2, 1)]
    assert kinds == [53, 1, 2 * 53 + 1]  # each convolution with a batch norm; the linear layer's weight and bias
    assert RESNET50.shapes[:3] == ((64, 3, 7, 7), (64,), (64,)) and RESNET50.matrices == ((1000, 2048),)
    convolutions = [shape for shape in RESNET50.shapes if len(shape) == 4]
    # Images that a network of these convolutions passes: each takes what one before it gives.
    assert all(channels in {3, 64, *(out for out, *_ in convolutions[:i])} for i, (_, channels, *_) in
               enumerate(convolutions))  # fmt: skip


def test_a_llama_8b_block_has_its_four_matrices_and_two_norms():
    assert LLAMA_8B.shapes == ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096,), (4096,))
    assert LLAMA_8B.size == "6x218112000" and len(LLAMA_8B.matrices) == 4


@pytest.mark.parametrize(("small", "large", "width"), [(SMALL_RESNET50, RESNET50, 4), (SMALL_LLAMA, LLAMA_8B, 8)])
def test_the_small_lists_have_the_structure_of_the_large_ones(small, large, width):
    assert [len(shape) for shape in small.shapes] == [len(shape) for shape in large.shapes]
    assert [shape[2:] for shape in small.shapes] == [shape[2:] for shape in large.shapes]
    narrower = [tuple(max(size // width, 3 if i else 1) for i, size in enumerate(shape[:2])) for shape in large.shapes]
    assert [shape[:2] for shape in small.shapes] == narrower


# ---- bytes


LITTLE = Parameters("little", ((6, 3, 2, 2), (6,), (8, 12), (8,)))


@pytest.mark.parametrize("kind, moments", [(PSGD, 1), (PSGDAdamW, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_tensors_of_a_step(kind, moments, dtype):
    """Read: w, gradient, moments. Written: w, moments; codes in both layouts and scales."""
    params, layers = psgd._parameters(psgd._values(LITTLE, dtype, CPU, 0), "written")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = kind([{"params": params[::2]}, {"params": params[1::2], "target": None}], lr=0.1, **(
        {"momentum": 0.9} if kind is PSGD else {}))  # fmt: skip
    optimizer.step()
    state = [state[key] for state in optimizer.state.values() for key in state]
    kept = [t for t in state if t.dtype == dtype and t.numel() > 2]
    moved = sum(2 * p.nbytes + p.grad.nbytes for p in params) + sum(2 * t.nbytes for t in kept)
    assert psgd.step_bytes(LITTLE, dtype.itemsize, moments) == moved
    codes = [layer._quantized_weight(transposed=True) for layer in layers]
    written = sum(c.q.nbytes + c.qt.nbytes + c.scale.nbytes for c in codes)
    assert written > 0 and psgd.step_bytes(LITTLE, dtype.itemsize, moments, "written") == moved + written


def test_a_weight_held_in_int8_moves_its_codes_in_the_place_of_its_values():
    params, _ = psgd._parameters(psgd._values(LITTLE, torch.float32, CPU, 0), "held")
    weight = params[2]
    assert isinstance(weight, Int8Weight) and not any(isinstance(p, Int8Weight) for p in params[:2])
    read, written = weight.q.nbytes + weight.scale.nbytes, weight.q.nbytes + weight.qt.nbytes + weight.scale.nbytes
    values = 2 * 4 * weight.numel()
    held, plain = (psgd.step_bytes(LITTLE, 4, codes=codes) for codes in ("held", ""))
    assert held == plain - values + read + written


def test_float32_moves_20_bytes_an_element_and_bfloat16_10_and_codes_two_more():
    n = LLAMA_8B.elements
    assert [psgd.step_bytes(LLAMA_8B, e) / n for e in (4, 2)] == [20, 10]
    assert psgd.step_bytes(LLAMA_8B, 4, codes="written") / n == pytest.approx(22, rel=1e-3)  # norms have none; scales
    case = psgd.case(LITTLE, torch.float32, CPU)
    by_tag = {c.tag: c.bytes for c in case.candidates if c.tag}
    assert by_tag["step copy"] == pytest.approx(by_tag["sgd fused"], abs=8)
    assert (
        by_tag["psgd"] == by_tag["psgd foreach"] == by_tag["sgd fused"] < by_tag["psgd codes"] < by_tag["adamw fused"]
    )


# ---- the case


def _measured(case):
    timer = FakeTimer()
    return measure(case, timer, Budget(1000.0, timer), ONCE, log=lambda text: None)["candidates"]


def test_every_candidate_passes_its_check_and_a_kernel_is_not_measured_on_a_cpu():
    got = _measured(psgd.case(LITTLE, torch.float32, CPU))
    assert {c["name"]: c["remark"] for c in got if c["status"] not in ("ok", "skip")} == {}
    kernels = {c["name"] for c in got if "fused" in c["name"] and "PSGD" in c["name"]}
    assert {c["name"] for c in got if c["status"] == "skip"} == kernels and len(kernels) == 7
    assert all(c["remark"] == "not measured: needs a GPU" and c["ours"] for c in got if c["status"] == "skip")
    assert got[0]["name"] == "torch SGD fused" and all("ratio" in c for c in got if c["status"] == "ok")
    ours = {c["name"]: c["remark"] for c in got if c["status"] == "ok" and c["ours"]}
    assert all("bit-equal" in ours[f"PSGD foreach, {target}"] for target in psgd.TARGETS)


def test_what_dispatch_chooses_is_measured_on_every_device():
    first, *ours = _measured(psgd.case(LITTLE, torch.float32, CPU, brief=True))
    assert first["tag"] == "sgd fused" and [c["status"] for c in ours] == ["ok"] * 2
    assert [c["tag"] for c in ours] == ["psgd", "psgd codes"] and "codes bit-equal" in ours[1]["remark"]


ALIGNED = Parameters("aligned", ((16, 2, 2, 2), (16,), (16, 32), (16,)))


def test_the_kernels_candidates_pass_their_checks_and_write_the_codes_whoever_steps_between(device, monkeypatch):
    case = psgd.case(ALIGNED, torch.float32, torch.device(device), kernels=True)
    by_tag = {c.tag: c for c in case.candidates}
    calls = []
    quantize_weight = fqt.ops.quantize_weight
    monkeypatch.setattr(fqt.ops, "quantize_weight", lambda *a: calls.append(a[2]) or quantize_weight(*a))
    with fqt.backend("triton"):
        for tag, remark in (("psgd", "bit-equal"), ("psgd codes", "bit-equal, codes bit-equal")):
            assert not by_tag[tag].missing and by_tag[tag].check(by_tag[tag].run(0), 0) == remark
        made = len(calls)
        for _ in range(2):
            by_tag["sgd fused"].run(0)
            by_tag["psgd codes"].run(0)
        assert len(calls) == made == 1  # there were none to be written anew
        by_tag["sgd fused codes"].run(0)
        by_tag["sgd fused codes"].run(0)
        assert len(calls) == made + 2  # both layouts, each time
        by_tag["psgd codes"].check(None, 0)


@pytest.mark.interpreted
def test_the_counters_of_a_step_are_one_launch_that_moves_what_has_to_move():
    counted = steps.count_optimizer("psgd")
    total = counted.pop("step psgd")
    assert list(counted) == ["step psgd _psgd_kernel"]
    assert (total["launches"], total["torch_operators"], total["peak_bytes"]) == (1, 0, 0)
    of = Parameters("", ((steps.N, steps.K), (steps.N,), steps.IMAGES, steps.IMAGES[:1]))
    moved = psgd.step_bytes(of, 4, codes="written")
    stored = 8 * of.elements + 2 * steps.N * steps.K + 4 * steps.N  # weights, momentum; codes and their scales
    again = 4 * steps.N * steps.K  # the matrix, from the L2
    # A range for each target, and what is kept of the newest weights; each item reads its rows of the tables.
    assert 0 <= total["bytes_stored"] - stored < 200 and 0 <= total["bytes_loaded"] - (moved - stored) - again < 4000


def test_the_counted_optimizers_are_those_of_the_counters():
    assert counters.OPTIMIZERS == tuple(steps.OPTIMIZERS)


# ---- what a check refuses


def _optimizer(kind=PSGD, dtype=torch.float32, **options):
    params = [nn.Parameter(v) for v in psgd._values(LITTLE, dtype, CPU, 0)]
    for p, g in zip(params, psgd._values(LITTLE, dtype, CPU, 1), strict=True):
        p.grad = g
    rates = psgd.SGD if kind is PSGD else psgd.ADAMW
    groups = [{"params": params[::2], **options}, {"params": params[1::2], "target": None}]
    made = kind(groups, **rates, fused=False)
    made.step()
    return made


def _plain(optimizer):
    """A step that forgets to scale."""
    targets = [group["target"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["target"] = None
    optimizer.step()
    for group, target in zip(optimizer.param_groups, targets, strict=True):
        group["target"] = target


def _reset(optimizer):
    """A step whose range is always the newest one."""
    for state in optimizer.state.values():
        state.pop("range", None)
    optimizer.step()


def _off(optimizer):
    optimizer.step()
    with torch.no_grad():
        optimizer.param_groups[1]["params"][0][0] *= 1.01


WRONG = {"no step": lambda optimizer: None, "two steps": lambda optimizer: [optimizer.step(), optimizer.step()],
         "no scale": _plain, "no running range": _reset, "one element off": _off}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_step_is_reported(wrong, dtype):
    for check in (psgd.check_defined, psgd.check_formula):
        optimizer = _optimizer(dtype=dtype)
        check(optimizer, optimizer.step)
        if check is psgd.check_defined or dtype == torch.float32:  # bfloat16's rounding hides a range that is a bit off
            with pytest.raises(Wrong):
                check(optimizer, functools.partial(WRONG[wrong], optimizer))


def test_a_wrong_step_of_adamw_is_reported():
    for name in ("no step", "two steps", "no scale"):
        optimizer = _optimizer(PSGDAdamW)
        assert psgd.check_defined(optimizer, optimizer.step) == "bit-equal"
        with pytest.raises(Wrong):
            psgd.check_defined(optimizer, functools.partial(WRONG[name], optimizer))


def _held():
    params, layers = psgd._parameters(psgd._values(LITTLE, torch.float32, CPU, 0), "held")
    for p, g in zip(params, psgd._values(LITTLE, torch.float32, CPU, 1), strict=True):
        p.grad = g
    optimizer = PSGD([{"params": params[::2]}, {"params": params[1::2], "target": None}], **psgd.SGD, fused=False)
    optimizer.step()
    return optimizer, layers[0].weight


def test_codes_that_are_not_the_steps_are_reported():
    def nearest(optimizer, weight):
        new, _ = psgd.defined(optimizer, optimizer.param_groups[0], weight)
        optimizer.step()
        q = (new / weight.scale).round().to(torch.int8)
        weight.q.copy_(q)
        weight.qt.copy_(q.t())

    def layouts(optimizer, weight):
        optimizer.step()
        weight.qt[0, 0] ^= 1

    def far(optimizer, weight):
        optimizer.step()
        q = weight.q[0, :1]
        q.add_(3 if q[0] < 0 else -3)
        weight.qt.copy_(weight.q.t())

    optimizer, weight = _held()
    psgd.check_held(optimizer, optimizer.step)
    for wrong, text in ((nearest, "nearest"), (layouts, "layouts"), (far, "next to")):
        with pytest.raises(Wrong, match=text):
            psgd.check_held(optimizer, functools.partial(wrong, optimizer, weight))


# ---- what is planned, and what is counted of it


def test_the_lists_are_planned_by_size_of_the_machine_the_target_first():
    gpu = [(plan.suite, plan.shape) for plan in suites.plans(("optim",), GPU, quick=False)]
    llama, resnet = "psgd step, Llama-8B block float32", "psgd step, ResNet-50 float32"
    first = [(llama, LLAMA_8B.size), (f"launches of {llama}", LLAMA_8B.size), (resnet, RESNET50.size),
             (f"launches of {resnet}", RESNET50.size)]  # fmt: skip
    assert gpu[:4] == first and ("psgd step, Llama-8B block bf16", LLAMA_8B.size) in gpu
    assert sum(plan.needs_s for plan in suites.plans(("optim",), GPU, quick=False)) <= 120
    quick = [(plan.suite, plan.shape) for plan in suites.plans(("optim",), GPU, quick=True)]
    assert quick[:2] == first[2:] and not any("Llama" in suite for suite, _ in quick)
    cpu = [plan.shape for plan in suites.plans(("optim",), CPU, quick=False)]
    assert cpu[:2] == [SMALL_RESNET50.size, SMALL_LLAMA.size]
    smoke = [plan for plan in suites.plans(("smoke",), CPU, quick=False) if "psgd" in plan.suite]
    assert [plan.shape for plan in smoke] == [TINY.size] and TINY.elements < 5000


def test_launches_are_counted_of_every_candidate_that_runs():
    runs = []

    def count(run):
        run()
        runs.append(run)
        return {"kernels": len(runs), "copies": 0, "by_name": {}}

    case = psgd.case(LITTLE, torch.float32, CPU, brief=True)
    others = candidate("breaks", run=raises(RuntimeError("no kernel"))), candidate("not here", missing="needs a GPU")
    case = replace(case, candidates=case.candidates + others)
    found = suites.case_launches(count, case, {case.candidates[1].name: "hangs"})
    assert [entry["name"] for entry in found] == [case.candidates[i].name for i in (0, 2)]
    assert {entry["shape"] for entry in found} == {LITTLE.size}

    def blind(run):
        raise RuntimeError("torch.profiler reports no kernel")

    with pytest.raises(RuntimeError, match="profiler"):  # no count of what runs is no count of zero
        suites.case_launches(blind, case)


def test_a_case_that_goes_by_time_shows_its_bytes_a_second_and_launches_go_by_their_own_case():
    case = fake.case("psgd step, x", "2x8", fake.candidate("a", gb_s=20.0), fake.candidate("b"), unit="ms")
    launches = [{"name": name, "shape": shape, "kernels": kernels, "copies": 0, "by_name": {}}
                for name, shape, kernels in (("layer", "8x8x8", 3), ("a", "2x8", 2), ("b", "2x8", 8))]  # fmt: skip
    rows = list(targets._rows(fake.result(case, launches=launches)))
    assert [row[5] for row in rows[:2]] == ["20.0 GB/s", ""]
    assert [facts.rate(case, c) for c in case["candidates"]] == [20.0, None] and facts.rate_unit(case) == "GB/s"
    assert [row[6] for row in rows[2:]] == ["1.00", "1.00", "4.00"]


def test_a_step_is_shown_beside_the_copy_of_its_own_case_and_its_launches():
    found = (fake.candidate("sgd", gb_s=1500.0), fake.candidate("psgd", gb_s=1860.0), fake.failed("bad", "wrong", "off"),
             fake.candidate("copied", gb_s=2000.0, tag="step copy"))  # fmt: skip
    case = fake.case("psgd step, x", "2x8", *found, unit="ms")
    assert of_the_copy(case) == {"sgd": 0.75, "psgd": 0.93, "copied": 1.0}
    launches = [{"name": name, "shape": shape, "kernels": n, "copies": 0, "by_name": {}}
                for name, shape, n in (("psgd", "2x8", 3), ("sgd", "2x9", 7))]  # fmt: skip
    printed = psgd.shares(case, launches).splitlines()
    assert any(line.split() == ["psgd", "1860", "93.0", "%", "3"] for line in printed)
    assert any(line.split() == ["sgd", "1500", "75.0", "%"] for line in printed)  # of another shape
    (m,) = fake.machine(fake.result(case, launches=launches)).cases()
    shown = sections._case(m, defaultdict(str), False)
    first = shown.header.index("of the copy")
    assert [row[first : first + 2] for row in shown.rows] == [
        ("75.0 %", "–"), ("93.0 %", "3"), ("–", "–"), ("100.0 %", "–")]  # fmt: skip
    assert [shown.header[i] for i in shown.right][-1] == "p10 to p90"
    without = fake.case("psgd step, x", "2x8", *found[:3], unit="ms")
    assert psgd.shares(without) == ""


# ---- T7


def _result(ms, gb_s=3000.0, kernels=1, of=LLAMA_8B, **environment):
    made = [
        {
            "name": tag,
            "tag": tag,
            "ours": True,
            "status": "ok",
            "remark": "",
            "prediction": "",
            "ms": {"median": ms[tag]},
            "gb_s": psgd.step_bytes(of, 4, codes="written" if "codes" in tag else "") / ms[tag] * 1e-6,
        }
        for tag in ms
    ]
    made.append({"name": "copy", "tag": "step copy", "ours": False, "status": "ok", "remark": "", "prediction": "",
                 "ms": {"median": 1.0}, "gb_s": gb_s})  # fmt: skip
    case = {"suite": psgd.title(of, torch.float32), "shape": of.size, "unit": "ms", "baseline": "sgd fused",
            "candidates": made}  # fmt: skip
    launches = [{"name": "torch SGD fused", "shape": of.size, "kernels": 3, "copies": 0, "by_name": {}},
                {"name": psgd.EMITTING, "shape": of.size, "kernels": kernels, "copies": 0, "by_name": {}}]  # fmt: skip
    return {"environment": record(**environment), "cases": [case], "memory": [], "repeats": [], "launches": launches,
            "skipped": []}  # fmt: skip


def _t7(result, of=LLAMA_8B):
    return [t.judged(result)[4:6] for t in TARGETS if t.name == "T7" and of.name in t.what]


def test_t7_is_of_one_run_copy_fused_sgd_foreach_and_launches():
    # 218 million elements: 4.362 GB a step, 4.799 GB with the codes of the matrices.
    ms = {"sgd fused": 1.6, "psgd": 1.5, "psgd codes": 1.6, "psgd foreach": 7.5}
    bytes_ = LLAMA_8B.elements * 22 - 2 * 2 * 4096 + 4 * (6144 + 4096 + 28672 + 4096)
    assert math.isclose(psgd.step_bytes(LLAMA_8B, 4, codes="written"), bytes_)
    share = bytes_ / 1.6e6 / 3300.0
    met = [(f"{share:.2f}×", "met"), ("1.00×", "met"), ("5.00×", "met"), ("1", "met")]
    assert 0.9 < share < 0.92 and _t7(_result(ms, 3300.0)) == met
    slow = {**ms, "psgd": 1.9, "psgd codes": 1.7}
    assert [verdict for _, verdict in _t7(_result(slow, 3300.0, kernels=2))] == ["missed"] * 4
    assert _t7(_result(ms, 3300.0), RESNET50) == [("", "not measured")] * 4
    assert len(_t7(_result(ms, of=RESNET50), RESNET50)) == 4
    assert "not measured" not in {verdict for _, verdict in _t7(_result(ms, of=RESNET50), RESNET50)}


def test_t7_is_not_measured_on_a_cpu_or_of_what_is_wrong_or_missing():
    ms = {"sgd fused": 1.6, "psgd": 1.5, "psgd codes": 1.6, "psgd foreach": 7.5}
    assert {verdict for _, verdict in _t7(_result(ms, device="cpu"))} == {"not measured"}
    for tag in ("sgd fused", "psgd foreach"):
        partly = _t7(_result({other: t for other, t in ms.items() if other != tag}))
        assert [verdict for _, verdict in partly].count("not measured") == 1
    wrong = _result(ms)
    wrong["cases"][0]["candidates"][2]["status"] = "wrong"  # the codes
    assert [verdict for _, verdict in _t7(wrong)][:2] == ["not measured"] * 2
    assert _t7({**_result(ms), "launches": []})[3] == ("", "not measured")
