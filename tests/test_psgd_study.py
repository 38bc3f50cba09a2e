"""The PSGD study: which runs count, what a line and the JSON hold, how settings are chosen, and what the report says."""

import copy
import gzip
import json
import math

import pytest
import torch

import fqt
from fqt.cli import UsageError
from fqt_bench import psgd_runs, psgd_study, psgd_tables
from fqt_bench.psgd_runs import Data, Plan
from fqt_bench.psgd_study import METHODS

PLAN = Plan("cnn", pretrain=2, steps=3, batch=16, seeds=2)
SOME = ["sgd", "psgd-2"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 1, 28, 28, generator=draws), torch.randint(10, (120,), generator=draws)
    return Data("noise", x[:80], y[:80], x[80:], y[80:], shift=1)


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    return psgd_study.whole({"noise": data}, {"noise": PLAN}, SOME, path, steps=30), path


def test_the_json_has_every_run_of_every_seed_and_what_it_was_chosen_by(result):
    found, _ = result
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert {"kind", "choice", "rule", "environment", "arguments", "methods", "noise", "datasets"} == set(found)
    noise = found["datasets"]["noise"]
    assert noise["data"] == {"name": "noise", "train": 80, "test": 40, "shift": 1} and noise["epochs"] == 5 * 16 / 80
    assert [(r["method"], r["setting"]) for r in noise["tuning"]] == [(m, s) for m in SOME for s in METHODS[m].settings]
    names = list(noise["chosen"])  # with "psgd-2*" where that is another setting
    assert names[:2] == SOME and set(names) <= {*SOME, "psgd-2*"}
    expected = [(seed, m, s) for seed in range(2) for m, s in noise["chosen"].items()]
    assert [(r["seed"], r["method"], r["setting"]) for r in noise["runs"]] == expected
    cells = {"fp", *(f"W{b}" for b in (8, 6, 4, 3, 2)), *(f"W{b} fitted" for b in (4, 3, 2)),
             *(f"S{s}" for s in (50, 80, 90, 95)), "S80 W4", "S90 W4"}  # fmt: skip
    for r in noise["runs"]:
        assert not r["diverged"] and set(r["accuracy"]) == cells
        assert ("histogram" in r) == (r["seed"] == 0)
        if r["seed"] == 0:
            counts = [int(c) for c in r["histogram"]["counts"].split()]
            assert len(counts) == psgd_runs.BINS and sum(counts) == math.prod(r["histogram"]["shape"]) == 32 * 16 * 25
    for m, s in noise["summary"].items():
        of = [r["accuracy"] for r in noise["runs"] if r["method"] == m]
        values = torch.tensor([[a["W2"], a["fp"] - a["W2"]] for a in of], dtype=torch.float64)
        assert [s["cells"]["W2"][c] for c in ("mean", "loss")] == pytest.approx(values.mean(0).tolist())
        assert [s["cells"]["W2"][c] for c in ("std", "loss_std")] == pytest.approx(values.std(0).tolist())


def test_a_study_cut_off_in_a_line_runs_what_is_missing_and_finds_the_same(result, data, tmp_path, monkeypatch, capsys):
    """Also that the same seed gives the same numbers: the last runs are done again from nothing but their lines' keys."""
    found, path = result
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(lines[:-2]) + lines[-2][:40], encoding="utf-8")
    ran = []
    run = psgd_runs.run
    monkeypatch.setattr(psgd_runs, "run", lambda *args: ran.append(args[0]) or run(*args))
    resumed = psgd_study.study("noise", data, PLAN, SOME, again)
    assert len(ran) == 2 and resumed == found["datasets"]["noise"]
    assert f"line {len(lines) - 1} is not whole" in capsys.readouterr().err
    keys = [psgd_study.key(r) for r in psgd_study.read_lines(again)]
    assert len(keys) == len(lines) and len(set(keys)) == len(keys)
    assert psgd_study.study("noise", data, PLAN, SOME, again) == resumed and len(ran) == 2
    other = PLAN._replace(steps=4)
    missing = [("sgd", METHODS["sgd"].settings[0])]
    psgd_study.do("noise", "test", 0, missing, data, other, again)
    assert len(ran) == 3  # a run of another plan is another run


def test_the_report_prints_and_draws_what_the_file_holds(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "study.json"
    path.write_text(json.dumps(result[0]), encoding="utf-8")
    assert psgd_study.main(["--report", str(path)]) == 0
    said = capsys.readouterr().out
    noise = result[0]["datasets"]["noise"]
    for method, s in noise["summary"].items():
        row = next(line for line in said.splitlines() if line.startswith(f"| {psgd_tables.NAMES[method]} |"))
        cells = [s["cells"][c] for c in ("fp", "W8", "W6", "W4", "W3", "W2")]
        assert row.split("|")[2:-1] == [f" {c['mean']:.2f} ± {c['std']:.2f} " for c in cells]
    assert "2 + 3 steps of 16 images (1.0 epochs of 80), 40 test images" in said
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_of_a_transformer_it_is_adamw_that_is_scaled_and_the_report_says_so(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    x, y = torch.randint(256, (2, 60, 8), generator=torch.Generator().manual_seed(0))
    text = Data("noise", x[:40], y[:40], x[40:], y[40:])
    plan = Plan("gpt", pretrain=1, steps=2, batch=4, seeds=1)
    found = psgd_study.whole({"python": text}, {"python": plan}, [*SOME, "l1"], tmp_path / "lines.jsonl", steps=30)
    of = found["datasets"]["python"]
    assert of["arguments"]["optimizer"] == "AdamW"
    assert {r["method"] for r in of["tuning"]} == set(SOME)  # others, and other bits, are left out
    assert [r["setting"]["lr"] for r in of["tuning"]] == [0.002, 0.004, 0.002] * 2
    assert all(set(r["accuracy"]) >= {"fp", "W4", "W3 fitted", "S80", "S90 W4"} for r in of["runs"])
    assert not any(cell in r["accuracy"] for r in of["runs"] for cell in ("W8", "S50"))
    path = tmp_path / "study.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    assert psgd_study.main(["--report", str(path)]) == 0
    said = capsys.readouterr().out.split("| gradients of pure noise")[0]
    assert "### noise, a transformer" in said and "2 steps of 4 windows" in said
    assert "| AdamW |" in said and "| PSGDAdamW, 2 bits |" in said and " SGD" not in said and "PSGD," not in said
    assert "| W4 | W3 | W2 |" in said and "W8" not in said and "50 %" not in said
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def runs_of(method, *cells):
    """Tuning runs of a method's settings: (full precision, goal) of each, None where it diverged."""
    goal = METHODS[method].goal
    return [
        {
            "method": method,
            "setting": s,
            "diverged": c is None,
            "accuracy": {} if c is None else {goal: c[1], "fp": c[0]},
        }
        for s, c in zip(METHODS[method].settings, cells, strict=True)
    ]


def test_a_setting_is_chosen_by_the_goal_among_those_that_keep_the_full_precision():
    sgd = runs_of("sgd", (90.0, 90.0), (89.0, 89.0), None)
    settings = METHODS["psgd-2"].settings
    tuning = sgd + runs_of("psgd-2", (89.5, 60.0), (89.6, 50.0), (89.4, 88.0))
    assert psgd_study.chosen(tuning, SOME) == {"sgd": settings[0], "psgd-2": settings[0], "psgd-2*": settings[2]}
    tuning = sgd + runs_of("psgd-2", None, (89.0, 50.0), (88.0, 88.0))  # none keeps it: the best of all, and no "*"
    assert psgd_study.chosen(tuning, SOME) == {"sgd": settings[0], "psgd-2": settings[2]}
    tuning = sgd + runs_of("lsq-3", (10.0, 70.0), (90.0, 60.0), (90.0, 69.0))  # LSQ has no full precision to keep
    assert psgd_study.chosen(tuning, ["sgd", "lsq-3"])["lsq-3"] == METHODS["lsq-3"].settings[0]
    with pytest.raises(ValueError, match="all settings of psgd-2 diverged"):
        psgd_study.chosen(sgd + runs_of("psgd-2", None, None, None), SOME)


@pytest.mark.parametrize("loss,fp,wins", [(1.0, 90.0, True), (4.6, 90.0, False), (1.0, 89.4, False)])
def test_psgd_wins_by_more_than_the_spread_at_the_same_full_precision_or_not_at_all(loss, fp, wins):
    def cells(fp, loss, std):
        return {"cells": {"fp": {"mean": fp, "loss": 0.0, "loss_std": 0.0}, "W3": {"loss": loss, "loss_std": std}}}

    (found,) = psgd_tables.comparisons({"sgd": cells(90.0, 5.0, 0.3), "psgd-3": cells(fp, loss, 0.4)})
    assert found["spread"] == pytest.approx(0.5) and found["gain"] == pytest.approx(5.0 - loss)
    assert found["wins"] is wins


def test_accuracies_are_of_rounded_and_cut_copies(data):
    model = psgd_runs.network("cnn")
    fqt.round_weights_(model, 3)
    before = copy.deepcopy(model.state_dict())
    cells, mse = psgd_runs.accuracies(model, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert cells["W3"] == cells["W3 fitted"] == cells["fp"] and mse["3"] < 1e-10 < 1e-3 < mse["4"]
    fqt.prune_(model, 0.5)
    assert psgd_runs.accuracies(model, data)[0]["S50"] == cells["S50"]
    w = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([5.0])]).reshape(
        1, -1
    )  # an outlier: plain rounding cuts all else
    layer = torch.nn.Sequential(torch.nn.Linear(100, 1))
    layer[0].weight.data.copy_(w)
    plain = copy.deepcopy(layer)
    fqt.round_weights_(plain, 3)
    errors = [(m[0].weight - w).square().sum().item() for m in (psgd_runs.fitted(layer, 3), plain)]
    assert errors[0] < errors[1]


def test_lsq_runs_give_the_quantized_and_the_hidden_accuracy(data):
    setting = {"start": "sgd", "lr": 0.01}
    for name in ("lsq-4", "psgd+lsq-4"):
        base = psgd_runs.pretrained(data, PLAN, 0)
        before = copy.deepcopy(base.state_dict())
        found = psgd_runs.run(METHODS[name], setting, base, data, PLAN, 0)
        assert set(found["accuracy"]) == {"fp", "W4", "S80 W4", "S90 W4"} and not found["diverged"]
        assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())  # others start from it, too


def test_a_run_that_diverges_is_a_record_without_accuracy(data):
    found = psgd_runs.run(METHODS["sgd"], {"start": "scratch", "lr": math.inf}, None, data, PLAN, 0)
    assert found == {"diverged": True, "accuracy": {}}
    assert psgd_study.summary([found]) == {"runs": 1, "diverged": 1, "cells": {}}


def test_the_held_out_images_are_the_last_fifth_of_the_training_images(data):
    held = data.held_out()
    assert torch.equal(torch.cat([held.train_x, held.test_x]), data.train_x) and len(held.test_x) == 16
    assert torch.equal(torch.cat([held.train_y, held.test_y]), data.train_y)


def test_noise_alone_draws_weights_to_the_grid_under_psgd_only():
    found = psgd_study.noise(steps=600, n=256)["mse_in_spacings"]
    # log |w - x̄| drifts by about -(lr λ)²/2 = -0.011 a step: exp(-0.011 · 600)² ≈ 2e-6, with a heavy tail of single weights
    assert found["psgd"][-1] < 0.02
    # SGD: the error of evenly lying weights has mean 1/12 and standard deviation √(1/180); of 256, five sigma are 0.023
    assert abs(found["sgd"][-1] - 1 / 12) < 0.024


def test_fashion_mnist_is_read_from_its_four_files(tmp_path):
    for part, n in (("train", 3), ("t10k", 2)):
        pixels = bytes(i % 251 for i in range(n * 28 * 28))
        head = bytes([0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 28, 0, 0, 0, 28])
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, n]) + bytes(range(n)))
        )
    found = psgd_runs.load("fashion-mnist", tmp_path)
    assert found.train_x.shape == (3, 1, 28, 28) and found.test_y.tolist() == [0, 1] and found.shift == 0
    assert found.train_x.mean().item() == pytest.approx(0, abs=1e-5) and found.train_x.std().item() == pytest.approx(1)
    assert found.train_x[0, 0, 0, 1] > found.train_x[0, 0, 0, 0]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 0])))
    with pytest.raises(UsageError, match="no idx file of bytes with 1 dimensions"):
        psgd_runs.load("fashion-mnist", tmp_path)
    with pytest.raises(UsageError, match="dataset-fashion-mnist"):
        psgd_runs.load("fashion-mnist", tmp_path / "elsewhere")
