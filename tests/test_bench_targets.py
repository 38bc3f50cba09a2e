"""What a result says: which targets are met, and the ceilings for the cost model."""

import json
from dataclasses import replace

import pytest
import torch
from bench_fakes import FakeTimer, a_case, candidate, record

from fqt import cost
from fqt_bench import measures, targets
from fqt_bench.harness import repeat
from fqt_bench.suites import plans
from fqt_bench.targets import TARGETS

RECORD = record()


def _measured(suite, shape, *candidates):
    """The first candidate is the baseline."""
    passed = {"status": "ok", "ours": True, "remark": "", "prediction": ""}
    records = [{"name": tag, "tag": tag, **passed, **figures} for tag, figures in candidates]
    return {"suite": suite, "shape": shape, "unit": "TOPS", "baseline": candidates[0][0], "candidates": records}


def _repeat(name, remark="3 runs bit-equal", status="ok", suite="gemm"):
    return {"suite": suite, "shape": "8x8x8", "name": name, "status": status, "remark": remark}


def _lines(result):
    """(predicted, measured, verdict) of each target."""
    return {(t.name, t.what): t.line(result)[3:] for t in TARGETS}


def _result(*cases, **lists):
    return {"environment": RECORD, "cases": list(cases), "memory": [], "repeats": [], "launches": [],
            "skipped": [], **lists}  # fmt: skip


def _targets(result):
    return {(t.name, t.what): t.judged(result)[4:6] for t in TARGETS}


def test_a_target_is_met_at_its_bound_and_missed_beyond_it():
    def verdicts(tops, saved, int_mm):
        product = _measured("gemm", "8192x8192x8192", ("bf16", {"tops": 800.0}), ("_int_mm", {"tops": int_mm}),
                            ("portable", {"tops": 900.0}), ("hopper", {"tops": tops}))  # fmt: skip
        memory = [{"name": "bf16", "saved": 100}, {"name": "int8", "saved": saved}]
        got = _targets(_result(product, memory=memory))
        return [got["T1", "int8 product at 8192³"], got["T2", "int8 product over _int_mm at 8192³"],
                got["T9", "bytes that a forward saves over bf16's"]]  # fmt: skip

    assert verdicts(1150.0, 52, 1150.0) == [("1150 TOPS", "met"), ("1.00×", "met"), ("0.52×", "met")]
    assert verdicts(1149.0, 53, 1150.0) == [("1149 TOPS", "missed"), ("1.00×", "missed"), ("0.53×", "missed")]


def test_a_layer_is_compared_with_the_faster_of_the_bf16_ones():
    layer = _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", {"tops": 600.0}), ("bf16 compiled", {"tops": 700.0}),
                      ("int8", {"tops": 980.0}), ("torchao", {"tops": 490.0}))  # fmt: skip
    got = _targets(_result(layer))
    assert got["T3", "int8 layer over bf16 at 8192³"] == ("1.40×", "met")
    assert got["T4", "int8 layer over torchao's at 8192³"] == ("2.00×", "met")


def test_stochastic_rounding_is_judged_by_time_not_by_rate():
    case = _measured("quantize", "8192x8192", ("copy", {"gb_s": 3000.0}), ("rows nearest", {"gb_s": 2800.0}),
                     ("rows stochastic", {"gb_s": 2500.0}))  # fmt: skip
    got = _targets(_result(case))
    assert got["T5", "row quantization over a copy"] == ("0.93×", "met")
    assert got["T6", "stochastic over nearest time, rows"] == ("1.12×", "missed")


def test_what_was_not_measured_or_was_wrong_meets_no_target():
    wrong = _measured("gemm", "8192x8192x8192", ("hopper", {"tops": 9e9}))
    wrong["candidates"][0]["status"] = "wrong"
    for result in (_result(), _result(wrong)):
        assert {verdict for _, verdict in _targets(result).values()} == {"not measured"}
    cpu = {**RECORD, "device": "cpu"}
    for result in (_result(), _result(repeats=[_repeat("a")])):
        assert {verdict for _, verdict in _targets({**result, "environment": cpu}).values()} == {"not measured"}


def test_the_run_ends_in_ceilings_that_the_cost_model_reads(tmp_path):
    cases = [
        _measured("gemm", "8192x8192x8192", ("bf16", {"tops": 798.1234}), ("portable", {"tops": 950.0}),
                  ("hopper", {"tops": 1160.0}), ("_int_mm", {"tops": 2000.0})),
        _measured("gemm", "4096x4096x4096", ("bf16", {"tops": 700.0}), ("split", {"tops": 100.0})),
        _measured("quantize", "8192x8192", ("copy", {"gb_s": 3000.0})),
        _measured("quantize", "4096x4096", ("copy", {"gb_s": 9000.0})),  # from the L2
        _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", {"tops": 5000.0})),
    ]  # fmt: skip
    entry = targets.ceilings(_result(*cases), "bench/results/nvidia-h200/x.json")
    rates = {name: entry[name] for name in ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")}
    assert rates == {"bf16_tflops": 798.123, "int8_tops": 1160.0, "fp8_tflops": None, "tb_s": 3.0}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps([entry]))
    assert cost.measured(path) == {"NVIDIA H200": entry}
    assert targets.ceilings(_result(*cases[:2]), "") is None  # no bandwidth
    assert targets.ceilings({**_result(*cases), "environment": {**RECORD, "device": "cpu"}}, "") is None


def test_the_cubes_and_the_layers_have_a_target_each():
    """T2 at every cube from 4096 on, T4 at the shapes of T3."""
    shapes = {name: {t.measure.shape for t in TARGETS if t.name == name} for name in ("T2", "T3", "T4")}
    assert shapes["T2"] == {f"{n}x{n}x{n}" for n in (4096, 8192, 16384)}
    assert shapes["T3"] == shapes["T4"] and len(shapes["T3"]) == 4
    bounds = {t.measure.shape: t.bound for t in TARGETS if t.name == "T3"}
    assert bounds == {"8192x8192x8192": 1.3, "8192x28672x4096": 1.2, "8192x4096x14336": 1.2, "4096x4096x4096": 1.1}


def test_equal_bits_of_runs_and_of_configurations_are_targets_of_their_own():
    fine, other = "3 runs bit-equal, and those of a", "differs from a"
    found = [
        _repeat("a"),
        _repeat("b", fine),
        _repeat("b split 4", other, "wrong"),
        _repeat("c", "does not fit", "skip"),
        _repeat("d e4m3", "run 2 differs from run 1", "wrong"),
        _repeat("layer", fine, suite="linear fwd+bwd"),
    ]
    runs, configurations = (t.what for t in TARGETS if t.name == "T10")

    def rows(repeats):
        got = _targets(_result(repeats=repeats))
        return got["T10", runs], got["T10", configurations]

    # All but d repeat their own bits; of b and its split, which are compared with a, one has a's.
    assert rows(found) == (("80 %", "missed"), ("50 %", "missed"))
    assert rows([_repeat("a"), _repeat("b split 4", fine)]) == (("100 %", "met"), ("100 %", "met"))
    assert rows(found[:2]) == (("100 %", "met"), ("", "not measured"))  # no split among them


def test_what_harness_repeats_is_what_the_targets_count():
    def made(name, value):
        return candidate(name, run=lambda i: torch.tensor(value), same_bits="int8")

    case = replace(a_case(made("a", 1.0), made("b split 4", 1.0), made("c", 2.0)), suite="gemm")
    got = _targets(_result(repeats=repeat(case, FakeTimer())))
    assert [row for (name, _), row in got.items() if name == "T10"] == [("100 %", "met"), ("50 %", "missed")]


def test_each_target_has_its_prediction_beside_the_figure():
    tops = {"tops": 900.0}
    product = _measured("gemm", "8192x8192x8192", ("bf16", {**tops, "prediction": "798 (datasheet)"}), ("_int_mm", tops),
                        ("hopper", tops), ("portable", {**tops, "prediction": "950 (datasheet)"}))  # fmt: skip
    layer = _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", {**tops, "prediction": "700 (measured)"}),
                      ("torchao", tops), ("int8", {**tops, "prediction": "1.45× (measured)"}))  # fmt: skip
    quantize = _measured("quantize", "8192x8192", ("copy", {"gb_s": 3000.0, "prediction": "3000 GB/s (measured)"}),
                         ("both nearest", {"gb_s": 2700.0, "prediction": "0.80×"}),
                         ("both stochastic", {"gb_s": 2700.0, "prediction": "0.40×"}))  # fmt: skip
    dgrad = _measured("householder", "4096x4096x4096", *((tag, {"ms": {"median": 1.0}, "prediction": f"{ms} ms (measured)"})
                      for tag, ms in (("product", "0.200"), ("psq whole", "0.230"), ("whole tile", "0.250"))))  # fmt: skip
    got = {what: row[0] for (_, what), row in _lines(_result(product, layer, quantize, dgrad)).items()}
    assert got["int8 product at 8192³"] == "950 TOPS" and got["int8 product over bf16 at 8192³"] == "1.19×"
    assert got["int8 layer over bf16 at 8192³"] == "1.45×" and got["both layouts over a copy"] == "0.80×"
    assert got["stochastic over nearest time, both layouts"] == "2.00×"
    assert got["BHQ in tiles beyond PSQ, of dgrad at 4096³"] == "10 %"  # 0.020 of 0.200 ms
    # The model knows neither torch._int_mm nor torchao.
    assert got["int8 product over _int_mm at 8192³"] == got["int8 layer over torchao's at 8192³"] == ""
    assert _lines(_result(product))["T1", "int8 product over bf16 at 8192³"] == ("1.19×", "1.00×", "missed")


def test_a_target_that_is_not_measured_says_why():
    tops = {"tops": 900.0}
    layer = _measured("linear fwd+bwd", "8192x8192x8192", ("bf16", tops), ("int8", tops), ("torchao", {}))
    layer["candidates"][2] |= {"status": "skip", "remark": "not installed: torchao"}
    skipped = [{"suite": "gemm", "shape": "16384x16384x16384", "status": "skip", "remark": "3 of 60 s left, 20 needed"}]
    result = _result(layer, _measured("gemm", "8192x8192x8192", ("bf16", tops)), skipped=skipped)
    got = {what: row[2] for (_, what), row in _lines(result).items()}
    assert got["int8 layer over torchao's at 8192³"] == "not measured: torchao: skip: not installed: torchao"
    assert got["int8 product over _int_mm at 16384³"].endswith("16384x16384x16384: skip: 3 of 60 s left, 20 needed")
    assert got["int8 product over _int_mm at 8192³"].startswith("not measured: no portable or ")
    assert got["int8 layer over torchao's at 4096³"] == "not measured"  # a run that was not to measure it
    cpu = {**result, "environment": {**RECORD, "device": "cpu"}}
    assert set(_lines(cpu).values()) == {("", "", "not measured")}


def test_every_target_reads_a_case_that_is_planned():
    """A target whose suite, shape or tag has no case would be "not measured" for ever."""
    asked = []
    planned = plans(("kernels", "layers", "optim"), torch.device("cuda", 0), quick=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "best", lambda result, suite, shape, tags, field="tops": asked.append((suite, shape)))
        for target in TARGETS:
            target.measure({"memory": [], "repeats": [], "launches": []})
    assert len(asked) > 20 and set(asked) <= {(plan.suite, plan.shape) for plan in planned}
