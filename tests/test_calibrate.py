"""The calibration of the cost model, on results that are MADE UP from the model itself: nothing here was measured."""

import json
import math
import random
import re
from dataclasses import replace

import bench_fabricated as fake
import pytest

from fqt import cost
from fqt.cli import UsageError
from fqt.cost import Ceilings
from fqt.recipe import Recipe
from fqt_bench import calibrate
from fqt_bench.facts import Machine
from fqt_bench.reading import Run

TRUE = Ceilings(700.0, 1000.0, 1200.0, 2.8, "measured", fake.H100, "sm90", 132, 5.0, 0.8, 0.4)
GEMMS = ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (1024, 1024, 1024), (8192, 28672, 4096),
         (8192, 4096, 14336), (512, 1024, 1024), (3000, 5000, 4096), (16384, 6144, 4096), (64, 4096, 4096),
         (1500, 3000, 4096), (3072, 3072, 1024), (2560, 4096, 1024))  # fmt: skip
COPIES = ((8192, 8192), (4096, 4096), (1024, 1024))


def x(*size):
    return "x".join(map(str, size))


def results(true=TRUE, noise=0.0, gemms=GEMMS, layers=GEMMS, copies=COPIES, skip=(), seed=0, date="2026-03-01"):
    """What `fqt bench` would write if the model were the truth; noise: standard deviation of a time's logarithm."""
    chance = random.Random(seed)

    def timed(name, ms, tag, ours):
        return fake.candidate(name, ms * math.exp(chance.gauss(0, noise)), tag=tag, ours=ours, tops=1.0)

    cases = []
    for size in gemms:
        one, fp8 = (cost.product("", size, rate, true, f) for rate, f in ((true.int8_tops, "int"), (1200.0, "e4m3")))
        cases.append(fake.case("gemm", x(*size), timed("torch bf16", one.bf16_ms, "bf16", False),
                               timed("portable (dispatch)", one.ms, "portable", True),
                               timed("portable another", 2 * one.ms, "portable", True),
                               timed("e4m3 (dispatch)", fp8.ms, "fp8", True)))  # fmt: skip
    for m, n in copies:
        x_bytes, dy_bytes = cost.traffic(Recipe.int8())["X"], cost.traffic(Recipe.int8())["dY"]
        passes = [timed(name, cost.quantized(size * m * n, kernels, true), tag, True) for name, tag, (size, kernels) in
                  (("per_row (dispatch)", "both nearest", x_bytes), ("gradient", "gradient int8", dy_bytes))]  # fmt: skip
        copy = timed("copy_", cost.copied(4.0 * m * n, true), "copy", False)
        cases.append(fake.case("quantize", x(m, n), copy, *passes, unit="GB/s"))
    for size in layers:
        int8, psq8 = (cost.linear(*size, Recipe.parse(name), true) for name in ("int8", "psq8"))
        cases.append(fake.case("linear fwd+bwd", x(*size), timed("nn.Linear bf16", int8.bf16_ms, "bf16", False),
                               timed("fqt.nn.Linear int8", int8.ms, "int8", True),
                               timed("fqt.nn.Linear psq8", psq8.ms, "psq8", True)))  # fmt: skip
    for case in cases:
        case["candidates"] = [c for c in case["candidates"] if c["tag"] not in skip]
    return fake.result(*cases, environment={"date": f"{date}T10:00:00+00:00"})


def machine(*found):
    return Machine(fake.H100, tuple(Run(f"{i}.json", result) for i, result in enumerate(found)))


def after(found):
    return {name: c["after"] for name, c in found["constants"].items()}


def test_the_constants_of_a_world_that_is_the_model_are_found():
    """Times without noise: the objective is least, and 1, at the truth alone. 2e-3: the search ends where no step of 1e-5
    of a logarithm helps, far nearer to it than that in all directions that matter."""
    found = calibrate.calibrate(machine(results()))
    for name, value in after(found).items():
        assert value == pytest.approx(getattr(TRUE, name), rel=2e-3), name
        assert found["constants"][name]["kept"] == ""
    assert found["errors"]["after"] < 1e-3 < 0.02 < found["errors"]["before"]
    assert found["errors"]["left out"] < 2e-3


def test_noise_moves_them_little():
    """Noise of 2 % in each of some 90 times. The rates rest on 20 products and 60 terms of layers: a few tenths of the noise
    each; a launch or a share on fewer: within a tenth."""
    found = after(calibrate.calibrate(machine(results(noise=0.02, seed=3))))
    for name in ("bf16_tflops", "int8_tops", "tb_s"):
        assert found[name] == pytest.approx(getattr(TRUE, name), rel=0.03), name
    assert found["launch_us"] == pytest.approx(5.0, rel=0.1) and found["quantize_share"] == pytest.approx(0.8, rel=0.1)


def test_a_few_shapes_that_the_model_does_not_describe_do_not_bend_it():
    result = results()
    for case in result["cases"][:2]:
        for c in case["candidates"]:
            c["ms"]["median"] *= 3
    found = calibrate.calibrate(machine(result))
    assert after(found)["int8_tops"] == pytest.approx(1000.0, rel=0.01)
    off = {o["shape"] for o in found["observations"] if abs(math.log(o["after_ms"] / o["ms"])) > 0.5}
    assert off == {x(*GEMMS[0]), x(*GEMMS[1])}


def test_what_is_host_bound_is_shown_and_not_fitted_to():
    result = results()
    slow = next(c for case in result["cases"] if case["suite"] == "linear fwd+bwd" for c in case["candidates"])
    slow |= {"starved": 3, "ms": {**slow["ms"], "median": 50.0}}
    found = calibrate.calibrate(machine(result))
    assert found["errors"]["after"] < 1e-3
    assert [o["ms"] for o in found["observations"] if o["host_bound"]] == [50.0]
    assert "host-bound" in calibrate.report(found)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"skip": ("fp8",)}, {"fp8_tflops": "no such product"}),
        ({"skip": ("bf16",)}, {"bf16_tflops": "no such product", "bf16_fill": "0 of the 3 products"}),
        ({"skip": ("copy",)}, {"tb_s": "no copy"}),
        ({"copies": ((8192, 8192),), "skip": ("both nearest", "gradient int8")}, {"quantize_share": "by itself"}),
        ({"gemms": GEMMS[:1], "layers": (), "copies": ((8192, 8192),)},
         {"launch_us": "in 1 of the 3 measurements", "bf16_fill": "0 of the 3 products"}),
    ],
)  # fmt: skip
def test_a_constant_that_nothing_tells_keeps_its_value(options, kept):
    found = calibrate.calibrate(machine(results(**options)))
    assert {name for name, c in found["constants"].items() if c["kept"]} == kept.keys()
    for name, why in kept.items():
        constant = found["constants"][name]
        assert why in constant["kept"] and constant["after"] == constant["before"]
    told = found["entry"] is not None
    assert told == ({"bf16_tflops", "tb_s"}.isdisjoint(kept)) and bool(found["no_entry"]) != told


def test_a_shape_left_out_is_not_among_what_is_fitted_to(monkeypatch):
    seen = []
    real = calibrate.fit

    def spied(found, c, free, step=0.25):
        seen.append({o.shape for o in found})
        return real(found, c, free, step)

    monkeypatch.setattr(calibrate, "fit", spied)
    calibrate.calibrate(machine(results(layers=())))
    shapes = seen[0]
    assert sorted(map(sorted, (shapes - some for some in seen[1:]))) == sorted([shape] for shape in shapes)


# ---- decisions


def decided(verdicts, suite="gemm"):
    return {d["shape"]: (d["verdict_before"], d["verdict_after"]) for d in verdicts["decisions"] if d["suite"] == suite}


def test_a_wrong_decision_is_named_and_mended_by_the_fit():
    """In this world int8 is hardly faster, launches are dear and quantization slow, so that layers lose where the model's
    first constants have them win."""
    true = replace(TRUE, int8_tops=800.0, quantize_share=0.5)
    found = calibrate.calibrate(machine(results(true)))
    verdicts = decided(found, "linear fwd+bwd").values()
    assert ("WRONG", "right") in verdicts and "WRONG" not in {after for _, after in verdicts}
    assert "WRONG" in calibrate.report(found)


def test_a_decision_within_the_noise_is_none():
    one = calibrate.Decision("gemm", "8x8x8", 1.01, 0.99, 1.03, 0.5, 2.0)
    assert one.verdict(0.5) == one.verdict(2.0) == "undecidable"
    sure = replace(one, low=1.001)
    assert (sure.verdict(0.5), sure.verdict(2.0), sure.verdict(None)) == ("WRONG", "right", "not modelled")
    lost = replace(one, measured=0.9, low=0.8, high=0.95)
    assert (lost.verdict(0.5), lost.verdict(2.0)) == ("right", "WRONG")


def test_a_decision_compares_what_dispatch_takes_with_the_faster_bf16():
    case = fake.case("linear fwd+bwd", "4096x4096x4096", fake.candidate("nn.Linear bf16", 2.0, tag="bf16"),
                     fake.candidate("compiled", 1.0, tag="bf16 compiled"), fake.candidate("int8", 1.25, tag="int8"),
                     fake.candidate("int8 hopper", 0.1, tag="int8 hopper"))  # fmt: skip
    (one,) = calibrate.decisions(machine(fake.result(case)), TRUE, TRUE)
    assert one.measured == pytest.approx(0.8)


# ---- the model and the fit are one


def test_the_fit_counts_as_the_model_does():
    found = calibrate.observations(machine(results()), TRUE)
    assert len(found) == 3 * len(GEMMS) + 3 * len(COPIES) + 3 * len(GEMMS)
    for c in (TRUE, replace(TRUE, bf16_fill=1.0, launch_us=0.0, quantize_share=1.3, tb_s=0.9)):
        ms = calibrate.Fit(found, TRUE).ms(calibrate.constants(c))
        assert ms.tolist() == pytest.approx([o.predicted(c) for o in found], rel=1e-12)


def test_the_entry_predicts_what_the_document_says(tmp_path, monkeypatch):
    found = calibrate.calibrate(machine(results(noise=0.01)))
    path = tmp_path / "ceilings.json"
    calibrate.add_to(path, found)
    monkeypatch.setattr(cost, "MEASURED", path)
    cost.named.cache_clear()
    try:
        c = cost.named(fake.H100, "sm90", 132)
    finally:
        cost.named.cache_clear()
    observed = calibrate.observations(machine(results(noise=0.01)), c)
    assert [o.predicted(c) for o in observed] == [o["after_ms"] for o in found["observations"]]
    assert c.launch_us == found["entry"]["fitted"]["launch_us"] != cost.LAUNCH_US


# ---- files


def test_an_entry_takes_the_place_of_its_own_only(tmp_path):
    found = calibrate.calibrate(machine(results(layers=())))
    other = {**found["entry"], "gpu": "another"}
    older = {**found["entry"], "date": "2025-01-01"}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps([other, older, {**found["entry"], "tb_s": 9.0}]))
    calibrate.add_to(path, found)
    assert json.loads(path.read_text()) == [other, older, found["entry"]]
    path.write_text("[{]")
    with pytest.raises(UsageError, match="not JSON"):
        calibrate.add_to(path, found)
    path.write_text(json.dumps([{**other, "fitted": {"launch_us": -1.0}}]))
    with pytest.raises(UsageError, match=r"entry 0: fitted: launch_us must be a number from 0\.0"):
        calibrate.add_to(path, found)


def test_constants_that_do_not_carry_over_are_not_kept(tmp_path):
    found = calibrate.calibrate(machine(results(layers=())))
    path = tmp_path / "ceilings.json"
    for errors in ({"before": 0.1, "after": 0.01, "left out": 0.2}, {"before": 0.1, "after": 0.01, "left out": None}):
        with pytest.raises(UsageError, match="no better than before"):
            calibrate.add_to(path, {**found, "errors": errors})
    with pytest.raises(UsageError, match="not measured: tb_s"):
        calibrate.add_to(path, {**found, "entry": None, "no_entry": "not measured: tb_s"})
    assert not path.exists()


def write(folder, name, result):
    (folder / name).write_text(json.dumps(result))
    return str(folder / name)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    path = write(tmp_path, "a.json", results(layers=GEMMS[:3]))
    out, ceilings = tmp_path / "out.json", tmp_path / "ceilings.json"
    assert calibrate.main([path, "--out", str(out), "--ceilings", str(ceilings)]) == 0
    document, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert json.loads(ceilings.read_text()) == [document["entry"]] and document["results"] == ["a.json"]
    assert fake.H100 in printed and "launch_us" in printed and "Is int8 faster than bf16?" in printed


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.json": lambda: results(gemms=GEMMS[:1]), "b.json": lambda: fake.result(environment={"gpu": "FABRICATED B"})},
         "of one GPU are needed, got those of FABRICATED B, FABRICATED H100"),
        ({"a.json": lambda: fake.result(environment={**fake.ENVIRONMENT, **fake.ON_CPU})}, r"no GPU"),
        ({"a.json": lambda: fake.result()}, "no figure that the cost model predicts"),
        ({"a.json": lambda: {"schema": 3, "cases": 1}}, "a.json: "),
        ({}, "got those of none"),
    ],
    ids=["two GPUs", "a CPU", "nothing", "broken", "no file"],
)  # fmt: skip
def test_what_it_cannot_use_is_refused(files, says, tmp_path, capsys):
    for name, result in files.items():
        write(tmp_path, name, result())
    assert calibrate.main([str(tmp_path)]) == 2
    assert re.search(says, capsys.readouterr().err)
