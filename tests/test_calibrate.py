"""The calibration of the cost model, on results that are MADE UP from the model itself: nothing here was measured."""

import functools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import bench_fabricated as fake
import pytest

from fqt import cost
from fqt.cli import UsageError
from fqt.cost import Ceilings
from fqt.recipe import Recipe
from fqt_bench import calibrate, calibrate_fit, environment
from fqt_bench.facts import Machine
from fqt_bench.reading import Run

TRUE = Ceilings(700.0, 1000.0, 1150.0, 2.8, "measured", fake.H100, "sm90", 132, 5.0, 0.8, 0.4, 110.0, 260.0)
GEMMS = ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (1024, 1024, 1024), (8192, 28672, 4096),
         (8192, 4096, 14336), (512, 1024, 1024), (3000, 5000, 4096), (16384, 6144, 4096), (64, 4096, 4096),
         (1500, 3000, 4096), (3072, 3072, 1024), (2560, 4096, 1024), (50432, 4096, 1024))  # fmt: skip
MATRICES = ((8192, 8192), (16384, 8192), (4096, 1024))  # the last lies in the L2
CONFIG = "portable 64x128x128 w4 s4 split 2"


def x(*size):
    return "x".join(map(str, size))


def results(true=TRUE, noise=0.0, gemms=GEMMS, layers=GEMMS, matrices=MATRICES, skip=(), seed=0, date="2026-03-01"):
    """What `fqt bench` would write if the model were the truth; noise: standard deviation of a time's logarithm."""
    chance = random.Random(seed)

    def timed(name, ms, tag, ours=True, **fields):
        return fake.candidate(name, ms * math.exp(chance.gauss(0, noise)), tag=tag, ours=ours, tops=1.0, **fields)

    def product(size, rate, format="int", tiling=None):
        return cost.product("", size, rate, true, format, tiling)

    cases = []
    for size in gemms:
        one, fp8 = product(size, true.int8_tops), product(size, true.fp8_tflops or 1.0, "e4m3")
        other = product(size, true.int8_tops, tiling=cost.tiling(size, (64, 128), 2, true.processors))
        cases.append(fake.case("gemm", x(*size), timed("torch bf16", one.bf16_ms, "bf16", False),
                               timed("portable 128x256x128 w8 s3 (dispatch)", one.ms, "portable"),
                               timed(CONFIG, other.ms, "split"), timed("e4m3 (dispatch)", fp8.ms, "fp8"),
                               timed("_int_mm", one.ms, "_int_mm", False)))  # fmt: skip
    passes = {  # name: tag, bytes an element, kernels
        "per_row nearest, rows + transposed (dispatch)": ("both nearest", 4, 1),
        "per_row nearest, rows (rows)": ("rows nearest", 3, 1),
        "per_row stochastic, rows + transposed (tile)": ("both stochastic", 6, 3),
        "per_tensor grid nearest, rows + transposed + sums (dispatch)": ("", 6, 3),
        "per_column stochastic, transposed + multiplier (dispatch)": ("", 5, 3),
        "gradient of int8, both quantizations": ("gradient int8", 6, 4),
    }
    for m, n in matrices:
        made = [timed(name, cost.quantized(float(size) * m * n, kernels, true), tag)
                for name, (tag, size, kernels) in passes.items()]  # fmt: skip
        copy = timed("copy_", cost.copied(4.0 * m * n, true), "copy", False)
        cases.append(fake.case("quantize", x(m, n), copy, *made, unit="GB/s"))
    for size in layers:
        int8, psq8 = (cost.linear(*size, Recipe.parse(name), true) for name in ("int8", "psq8"))
        cases.append(fake.case("linear fwd+bwd", x(*size), timed("nn.Linear bf16", int8.bf16_ms, "bf16", False),
                               timed("fqt.nn.Linear int8", int8.ms, "int8"), timed("fqt.nn.Linear psq8", psq8.ms, "psq8"),
                               timed("fqt.nn.Linear int8 hopper", int8.ms, "int8 hopper")))  # fmt: skip
    for case in cases:
        case["candidates"] = [c for c in case["candidates"] if c["tag"] not in skip]
    return fake.result(*cases, environment={"date": f"{date}T10:00:00+00:00"})


def machine(*found):
    return Machine(fake.H100, tuple(Run(f"{i}.json", result) for i, result in enumerate(found)))


def calibrated(*found):
    return calibrate.calibrate(machine(*found))


@functools.cache
def noisy():
    """2 % of noise in each time. Not to be changed."""
    return calibrated(results(noise=0.02, seed=3))


def after(found):
    return {name: c["after"] for name, c in found["constants"].items()}


# ---- the constants


def test_the_constants_of_a_world_that_is_the_model_are_found():
    """Times without noise: the objective is least, and 1, at the truth alone. 1e-3: the search ends where no step of 1e-5
    of a logarithm helps, far nearer to it than that in all directions that matter."""
    found = calibrated(results())
    for name, value in after(found).items():
        assert value == pytest.approx(getattr(TRUE, name), rel=1e-3), name
        assert found["constants"][name]["kept"] == ""
    assert found["errors"]["after"] < 1e-4 < 0.02 < found["errors"]["before"]
    assert found["errors"]["left out"] < 1e-3
    assert all(abs(o["after_error"]) < 1e-3 for o in found["observations"])  # those that are not fitted to as well


def test_noise_moves_them_by_a_few_standard_errors():
    """Four: of nine constants one is further off in one of 1700 draws, were the noise of all as Gaussian as it is made."""
    for name, c in noisy()["constants"].items():
        true = getattr(TRUE, name)
        off = abs(c["after"] - true) if name in calibrate.LINEAR_SCALE else abs(math.log(c["after"] / true))
        assert off < 4 * c["error"] < 8 * calibrate_fit.TOLD[name], name


def test_a_few_shapes_that_the_model_does_not_describe_do_not_bend_it_and_are_shown_first():
    result = results()
    for case in result["cases"][:2]:
        for c in case["candidates"]:
            c["ms"]["median"] *= 3
    found = calibrated(result)
    assert after(found)["int8_tops"] == pytest.approx(1000.0, rel=0.01)
    off = {o["shape"] for o in found["observations"] if abs(o["after_error"]) > 0.5}
    assert off == {x(*GEMMS[0]), x(*GEMMS[1])}
    shown = calibrate.report(found).partition("Most wrong after the fit")[2].splitlines()[3:9]
    assert all(line.split()[1] in off for line in shown)


def test_the_constants_that_were_wrong_are_named():
    """Against the datasheet's expectation, 798 TFLOP/s, 950 TOPS, 3.0 TB/s and a launch of 2 µs."""
    line = next(t for t in calibrate.report(noisy()).splitlines() if t.startswith("Constants that were wrong"))
    for name in ("bf16_tflops by -1", "launch_us by +1", "quantize_share by -"):
        assert name in line
    assert "int8_tops" not in line and "tb_s" not in line  # by 5 and 7 %


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"skip": ("fp8",)}, {"fp8_tflops": "no measurement depends on it"}),
        ({"skip": ("bf16",)}, dict.fromkeys(("bf16_tflops", "bf16_fill", "bf16_ramp"), "no measurement depends on it")),
        ({"true": replace(TRUE, ramp=0.0, bf16_fill=1.0)}, dict.fromkeys(("ramp", "bf16_fill"), "agree with it")),
        ({"gemms": GEMMS[:1], "layers": (), "matrices": ()},
         {"tb_s": "no measurement depends on it", "quantize_share": "no measurement depends on it",
          **dict.fromkeys(("launch_us", "bf16_fill", "bf16_ramp", "ramp"), "tell it to ± ")}),
        # Most of a product's time is its launch.
        ({"gemms": GEMMS[3:4], "layers": GEMMS[3:4], "noise": 0.02},
         dict.fromkeys(("int8_tops", "fp8_tflops", "bf16_fill", "bf16_ramp", "ramp"), "tell it to ± ")),
    ],
    ids=["no fp8", "no bf16", "as before", "one large shape", "one small shape"],
)  # fmt: skip
def test_a_constant_that_nothing_tells_keeps_its_value(options, kept):
    found = calibrated(results(**options))
    silent = {name: c for name, c in found["constants"].items() if c["kept"]}
    assert silent.keys() == kept.keys(), {name: c["kept"] for name, c in silent.items()}
    for name, why in kept.items():
        assert why in silent[name]["kept"] and silent[name]["error"] is None
        assert silent[name]["after"] == silent[name]["before"] or name == "fp8_tflops"
    missing = {"bf16_tflops", "int8_tops", "tb_s"} & kept.keys()
    assert (found["entry"] is None) == bool(missing) and all(name in found["no_entry"] for name in missing)


def test_an_expected_rate_of_fp8_does_not_become_a_measured_one():
    assert calibrated(results(skip=("fp8",)))["entry"]["fp8_tflops"] is None


# ---- what is fitted to


def test_what_a_layer_does_not_launch_is_shown_with_its_reason_and_not_fitted_to():
    result = results()
    slow = next(c for case in result["cases"] if case["suite"] == "linear fwd+bwd" for c in case["candidates"])
    slow |= {"starved": 3, "ms": {**slow["ms"], "median": 50.0}}
    found = calibrated(result)
    others = {(o["name"], o["shape"]): o["not_fitted"] for o in found["observations"] if o["not_fitted"]}
    assert others.pop(("nn.Linear bf16", x(*GEMMS[0]))) == "host-bound"
    small = {name: why for (name, shape), why in others.items() if shape == "4096x1024"}
    assert set(small.values()) == {"the L2 holds a part of it"} and "copy_" in small
    rest = {name: why for (name, shape), why in others.items() if shape != "4096x1024"}
    assert rest == {
        CONFIG: "dispatch does not take it",
        "fqt.nn.Linear int8 hopper": "only by fqt.backend('hopper')",
        **dict.fromkeys(("per_row nearest, rows (rows)", "per_row stochastic, rows + transposed (tile)",
                         "per_column stochastic, transposed + multiplier (dispatch)"), "a layer does not launch it"),
    }  # fmt: skip
    assert all(c["after"] == pytest.approx(getattr(TRUE, name), rel=1e-3) for name, c in found["constants"].items())
    assert "host-bound" in calibrate.report(found)
    assert {o["name"] for o in found["observations"]}.isdisjoint({"_int_mm"})  # the model says nothing of it


def test_the_model_of_all_observations_counts_as_the_cost_model_does():
    found = calibrate_fit.observations(machine(results()), TRUE)
    assert len(found) == 4 * len(GEMMS) + 7 * len(MATRICES) + 4 * len(GEMMS)
    for c in (TRUE, replace(TRUE, bf16_fill=1.0, launch_us=0.0, quantize_share=1.3, tb_s=0.9, ramp=7.0, bf16_ramp=0.0)):
        ms = calibrate_fit.Model(found, TRUE).ms(calibrate_fit.constants(c))
        assert ms.tolist() == pytest.approx([o.predicted(c) for o in found], rel=1e-12)


def test_a_shape_left_out_has_no_say_in_its_own_prediction():
    """Its times three times as long: its left-out predictions stay, those of the fit to all, with it, do not."""
    shape = x(*GEMMS[4])
    slow = results(noise=0.01)
    for c in (c for case in slow["cases"] if case["shape"] == shape for c in case["candidates"]):
        c["ms"]["median"] *= 3

    def predicted(result):
        before = cost.from_datasheet(fake.H100, "sm90", 132)
        errors = calibrate_fit.left_out(calibrate_fit.observations(machine(result), before), before)
        return {(o.suite, o.name): math.exp(e) * o.ms for o, e in errors.items() if o.shape == shape}

    usual, one_off = predicted(results(noise=0.01)), predicted(slow)
    assert len(usual) == 6 and one_off == pytest.approx(usual, rel=1e-12)
    others = [after(calibrated(result))["int8_tops"] for result in (results(noise=0.01), slow)]
    assert others[0] != pytest.approx(others[1], rel=1e-6)


def test_of_two_runs_the_newer_one_counts_where_it_has_the_case():
    old, new = results(replace(TRUE, int8_tops=500.0)), results(date="2026-03-02")
    assert after(calibrated(old, new)) == after(calibrated(new))


# ---- decisions


def decided(found, suite, name="int8"):
    return {d["shape"]: (d["verdict_before"], d["verdict_after"]) for d in found["decisions"]
            if (d["suite"], d["name"]) == (suite, name)}  # fmt: skip


def test_a_wrong_decision_is_named_and_mended_by_the_fit():
    """In this world int8 is hardly faster, launches are dear and quantization slow, so that layers lose where the model's
    first constants have them win."""
    found = calibrated(results(replace(TRUE, int8_tops=800.0, quantize_share=0.5)))
    verdicts = decided(found, "linear fwd+bwd").values()
    assert ("WRONG", "right") in verdicts and "WRONG" not in {after for _, after in verdicts}
    assert "after: 0\n" in calibrate.report(found)
    assert {d["name"] for d in found["decisions"]} == {"int8", "psq8", "fp8"}


def test_a_decision_that_stays_wrong_is_named_and_first():
    result = results()
    (case,) = (c for c in result["cases"] if (c["suite"], c["shape"]) == ("gemm", x(*GEMMS[0])))
    ours = case["candidates"][1]
    ours |= {"samples_ms": [5 * ms for ms in ours["samples_ms"]]}
    text = calibrate.report(calibrated(result)).partition("Is it faster than bf16?")[2]
    first, _, _, row, *_ = text.splitlines()
    assert first.endswith(f"after: 1: gemm {x(*GEMMS[0])} int8") and row.split()[:2] == ["gemm", x(*GEMMS[0])]


def test_a_decision_within_the_noise_or_of_a_starved_device_is_none():
    one = calibrate.Decision("gemm", "8x8x8", "int8", 1.01, 0.99, 1.03, 0.5, 2.0)
    assert one.verdict(0.5) == one.verdict(2.0) == "undecidable"
    sure = replace(one, low=1.001)
    assert (sure.verdict(0.5), sure.verdict(2.0), sure.verdict(None)) == ("WRONG", "right", "not modelled")
    lost = replace(one, measured=0.9, low=0.8, high=0.95)
    assert (lost.verdict(0.5), lost.verdict(2.0)) == ("right", "WRONG")
    assert replace(lost, host_bound=True).verdict(2.0) == "host-bound"


def test_a_decision_compares_what_dispatch_takes_with_the_faster_bf16():
    case = fake.case("linear fwd+bwd", "4096x4096x4096", fake.candidate("nn.Linear bf16", 2.0, tag="bf16"),
                     fake.candidate("compiled", 1.0, tag="bf16 compiled", starved=3),
                     fake.candidate("int8", 1.25, tag="int8"),
                     fake.candidate("int8 hopper", 0.1, tag="int8 hopper"))  # fmt: skip
    (one,) = calibrate.decisions(machine(fake.result(case)), TRUE, TRUE)
    assert one.measured == pytest.approx(0.8) and one.host_bound
    case = fake.case("gemm", "4096x4096x4096", fake.candidate("bf16", 2.0, tag="bf16"),
                     fake.candidate("other", 0.5, tag="portable"),
                     fake.candidate("a (dispatch)", 1.0, tag="hopper"))  # fmt: skip
    (one,) = calibrate.decisions(machine(fake.result(case)), TRUE, TRUE)
    assert one.measured == pytest.approx(2.0) and not one.host_bound


# ---- files


def test_the_entry_predicts_what_the_document_says(tmp_path, monkeypatch):
    path = tmp_path / "ceilings.json"
    calibrate.add_to(path, noisy())
    monkeypatch.setattr(cost, "MEASURED", path)
    cost.named.cache_clear()
    try:
        c = cost.named(fake.H100, "sm90", 132)
        again = calibrated(results(noise=0.02, seed=3))
    finally:
        cost.named.cache_clear()
    observed = calibrate_fit.observations(machine(results(noise=0.02, seed=3)), c)
    assert [o.predicted(c) for o in observed] == [o["after_ms"] for o in noisy()["observations"]]
    assert c.launch_us == noisy()["entry"]["fitted"]["launch_us"] != cost.LAUNCH_US
    assert again["before"] == "measured"
    assert [o["before_ms"] for o in again["observations"]] == [o["after_ms"] for o in noisy()["observations"]]


def test_an_entry_takes_the_place_of_its_own_only(tmp_path):
    entry = noisy()["entry"]
    other, older = {**entry, "gpu": "another"}, {**entry, "date": "2025-01-01"}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps([other, older, {**entry, "tb_s": 9.0}]))
    calibrate.add_to(path, noisy())
    assert json.loads(path.read_text()) == [other, older, entry]
    for broken, says in (("[{]", "not JSON"), (json.dumps([{**other, "fitted": {"launch_us": -1.0}}]),
                                               r"entry 0: fitted: launch_us must be a number from 0\.0")):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(UsageError, match=says):
            calibrate.add_to(path, noisy())
        assert path.read_text() == broken


def test_constants_that_do_not_carry_over_are_not_kept(tmp_path):
    path = tmp_path / "ceilings.json"
    for errors in ({"before": 0.1, "after": 0.01, "left out": 0.2}, {"before": 0.1, "after": 0.01, "left out": None}):
        with pytest.raises(UsageError, match="no better than before"):
            calibrate.add_to(path, {**noisy(), "errors": errors})
    with pytest.raises(UsageError, match="not measured: tb_s"):
        calibrate.add_to(path, {**noisy(), "entry": None, "no_entry": "not measured: tb_s"})
    assert not path.exists()


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def test_the_command_writes_what_it_prints_and_the_entry_says_where_the_result_lies(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    path = write(tmp_path / "bench" / "results" / "h100" / "a.json", results(layers=GEMMS[:3]))
    out, ceilings = Path(path).with_name("calibration.json"), tmp_path / "ceilings.json"
    assert calibrate.main([path, "--out", str(out), "--ceilings", str(ceilings)]) == 0
    document, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert json.loads(ceilings.read_text()) == [document["entry"]]
    assert document["entry"]["file"] == document["results"][0]["file"] == "bench/results/h100/a.json"
    assert document["results"][0]["environment"] == results()["environment"]
    for said in (fake.H100, "launch_us", "Is it faster than bf16?", x(*GEMMS[0])):
        assert said in printed
    assert calibrate.main([str(out.parent)]) == 0  # a folder in which there is more than results
    assert calibrate.main([str(out)]) == 2 and "not a result of fqt bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.json": lambda: results(gemms=GEMMS[:1]), "b.json": lambda: fake.result(environment={"gpu": "FABRICATED B"})},
         "of one GPU are needed, got those of FABRICATED B, 132 processors; FABRICATED H100"),
        ({"a.json": lambda: results(gemms=GEMMS[:1]), "b.json": lambda: fake.result(environment={"processors": 114})},
         "80GB HBM3, 114 processors; FABRICATED H100 80GB HBM3, 132 processors"),
        ({"a.json": lambda: fake.result(environment=fake.ON_CPU)}, "FABRICATED CPU.*no GPU"),
        ({"a.json": fake.result}, "no figure that tells a constant"),
        ({"a.json": lambda: fake.result(environment={"gpu": "FABRICATED GPU"})}, "no measured ceilings of FABR"),
        ({"a.json": lambda: {"schema": 3, "cases": 1}}, "a.json: "),
        ({}, "got those of none"),
    ],
    ids=["two GPUs", "two sizes of one", "a CPU", "nothing", "an unknown GPU", "broken", "no file"],
)  # fmt: skip
def test_what_it_cannot_use_is_refused(files, says, tmp_path, capsys):
    import re

    for name, result in files.items():
        write(tmp_path / name, result())
    assert calibrate.main([str(tmp_path)]) == 2
    assert re.search(says, capsys.readouterr().err)
