"""What a result says: which targets are met, and the ceilings for the cost model."""

import json

import pytest
import torch
from bench_fakes import record

from fqt import cost
from fqt_bench import targets
from fqt_bench.suites import plans
from fqt_bench.targets import TARGETS

RECORD = record()


def _measured(suite, shape, *candidates):
    passed = {"status": "ok", "ours": True, "remark": ""}
    records = [{"name": tag, "tag": tag, **passed, **figures} for tag, figures in candidates]
    return {"suite": suite, "shape": shape, "unit": "TOPS", "candidates": records}


def _result(*cases, **lists):
    return {"environment": RECORD, "cases": list(cases), "memory": [], "repeats": [], "launches": [],
            "skipped": [], **lists}  # fmt: skip


def _targets(result):
    return {(t.name, t.what): t.row(result)[3:] for t in TARGETS}


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
    for result in (_result(), _result(repeats=[{"status": "ok"}])):
        assert {verdict for _, verdict in _targets({**result, "environment": cpu}).values()} == {"not measured"}
    partly = _result(repeats=[{"status": v} for v in ("ok", "ok", "ok", "wrong", "skip")])
    assert _targets(partly)["T10", "candidates whose runs are bit-identical"] == ("75 %", "missed")


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


def test_every_target_reads_a_case_that_is_planned():
    """A target whose suite, shape or tag has no case would be "not measured" for ever."""
    asked = []
    planned = plans(("kernels", "layers", "optim"), torch.device("cuda", 0), quick=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "best", lambda result, suite, shape, tags, field="tops": asked.append((suite, shape)))
        for target in TARGETS:
            target.measure({"memory": [], "repeats": [], "launches": []})
    assert len(asked) > 20 and set(asked) <= {(plan.suite, plan.shape) for plan in planned}
