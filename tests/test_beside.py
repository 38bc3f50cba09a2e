"""Accuracies on a device beside the CPU's: what is trained, and when they count as equal."""

import json

import pytest
import torch

from fqt import demo
from fqt_bench import beside, psgd_runs, recipe_study
from fqt_bench.psgd_runs import Data

pytestmark = pytest.mark.usefixtures("one_thread")


def runs(*accuracies):
    return [{"seed": i, "diverged": a is None, "accuracy": a} for i, a in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("base", "found", "verdict"),
    [
        (runs(90.0, 92.0, 94.0), runs(92.8, 94.8, 96.8), "within"),  # 2.8 of √(2² + 2²) = 2.83
        (runs(90.0, 92.0, 94.0), runs(92.9, 94.9, 96.9), "beyond"),
        # t = difference / (2 · √(2/3)), of 4 degrees of freedom: p = 0.01 at 4.604.
        (runs(90.0, 92.0, 94.0), runs(82.6, 84.6, 86.6), "beyond"),
        (runs(90.0, 92.0, 94.0), runs(82.4, 84.4, 86.4), "outside"),
        (runs(90.0, 92.0, 94.0), runs(90.0, 92.0, None), "outside"),
        (runs(None, None), runs(None, None), "within"),
        (runs(None, None), runs(None), "within"),
        (runs(90.0), runs(90.0), "within"),
        (runs(90.0), runs(90.1), "beyond"),  # of one seed nothing is known of the spread
        (runs(90.0, 90.0), runs(90.1, 90.1), "outside"),
    ],
)
def test_accuracies_are_compared_with_the_spread_of_both(base, found, verdict):
    (row,) = beside.compared({"int8": base}, {"int8": found})
    assert row["verdict"] == verdict and row["recipe"] == "int8"


def test_equal_devices_are_seldom_told_apart():
    """Of normal accuracies: beyond the spread in 16 % of recipes of three seeds, as the rule says, and one of twelve recipes
    outside in 1 % of comparisons at most. Limits: four standard deviations of 2 000 comparisons."""
    draws = torch.randn(2000, 12, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 90
    beyond = outside = 0
    for one in draws.tolist():
        sides = [{str(i): runs(*recipe[side]) for i, recipe in enumerate(one)} for side in (0, 1)]
        verdicts = [row["verdict"] for row in beside.compared(*sides)]
        beyond += sum(verdict != "within" for verdict in verdicts)
        outside += "outside" in verdicts
    assert abs(beyond / 24_000 - 0.159) < 4 * (0.159 * 0.841 / 24_000) ** 0.5
    assert outside / 2000 <= 0.01 + 4 * (0.01 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("t", "freedom", "p"), [(4.604, 4, 0.01), (2.776, 4, 0.05), (1.0, 1, 0.5), (2.042, 30, 0.05), (0.0, 3, 1)]
)
def test_probabilities_are_students(t, freedom, p):
    """Tables of the distribution, to their four digits."""
    assert [beside.students_p(x, freedom) for x in (t, -t)] == pytest.approx([p, p], rel=2e-3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study, and the images that it was made of."""
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 1, 28, 28, generator=draws), torch.randint(10, (96,), generator=draws)
    data = Data("MNIST noise", x[:64], y[:64], x[64:], y[64:], shift=1)
    plan = recipe_study.QUICK
    lines = tmp_path_factory.mktemp("study") / "lines.jsonl"
    found = recipe_study.whole(data, plan, 1, 2, ["psq"], [8], [4], ["exact"], lines)
    path = lines.with_name("study.json")
    path.write_text(json.dumps(found), encoding="utf-8")
    return path, data


def test_a_study_repeated_on_its_own_device_has_the_same_accuracies(study, monkeypatch, tmp_path, capsys):
    """All runs, their seeds and the weights they start from are the base's."""
    path, data = study
    monkeypatch.setattr(psgd_runs, "load", lambda name, folder: data)
    out = tmp_path / "beside.json"
    assert beside.main(["resnet", "--base", str(path), "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["recipe"], row["difference"], row["device"]["runs"]) for row in result["rows"]] == [
        ("exact", 0.0, 2), ("psq8", 0.0, 2)
    ]  # fmt: skip
    assert result["environment"]["device"] == "cpu" and "within" in capsys.readouterr().out
    base = json.loads(path.read_text())
    for run in base["runs"]:
        if run["recipe"] == "psq8":
            run.update(diverged=True, accuracy=None)
    shifted = tmp_path / "shifted.json"
    shifted.write_text(json.dumps(base))
    assert beside.main(["resnet", "--base", str(shifted), "--device", "cpu"]) == 1


def test_what_was_found_is_kept_after_every_run_and_none_is_begun_too_late(study, monkeypatch, tmp_path, capsys):
    """All recipes have a seed before the next is begun."""
    path, data = study
    monkeypatch.setattr(psgd_runs, "load", lambda name, folder: data)
    now = iter(range(1000))
    monkeypatch.setattr(beside.time, "perf_counter", lambda: float(next(now)))
    out = tmp_path / "beside.json"
    arguments = ["resnet", "--base", str(path), "--device", "cpu", "--out", str(out)]
    assert beside.main([*arguments, "--limit-s", "4"]) == 0
    found = json.loads(out.read_text())["runs"]
    assert {recipe: [run["seed"] for run in of] for recipe, of in found.items()} == {"exact": [0], "psq8": [0]}
    assert "2 of the base's 4 runs were not begun within 4 s" in capsys.readouterr().out
    real, calls = recipe_study.run, []

    def interrupted(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(recipe_study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beside.main(arguments)
    assert list(json.loads(out.read_text())["runs"]) == ["exact"]


def test_another_set_of_images_is_refused(study, monkeypatch, capsys):
    path, data = study
    monkeypatch.setattr(psgd_runs, "load", lambda name, folder: data._replace(train_x=data.train_x[:60]))
    with pytest.raises(SystemExit, match="2"):
        beside.main(["resnet", "--base", str(path), "--device", "cpu"])
    assert "60 of MNIST noise" in capsys.readouterr().err


def test_a_base_of_unknown_data_is_refused(study, tmp_path, capsys):
    path, _ = study
    base = json.loads(path.read_text())
    base["data"]["name"] = "CIFAR-10"
    (other := tmp_path / "other.json").write_text(json.dumps(base))
    with pytest.raises(SystemExit, match="2"):
        beside.main(["resnet", "--base", str(other), "--device", "cpu"])
    assert "of CIFAR-10, of which there is nothing here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["resnet", "--device", "cpu"], "needs --base"),
     (["demo", "--base", "missing.json", "--device", "cpu"], "No such file"),
     (["demo", "--base", "EMPTY", "--device", "cpu"], "no demo.json"),
     (["resnet", "--base", "EMPTY", "--device", "cpu"], "no study of")],
)  # fmt: skip
def test_a_base_that_is_none_is_a_mistake(arguments, says, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        beside.main([str(empty) if a == "EMPTY" else a for a in arguments])
    assert says in capsys.readouterr().err


@pytest.mark.interpreted
def test_without_a_gpu_nothing_is_measured(capsys):
    with pytest.raises(SystemExit, match="2"):
        beside.main(["demo"])
    assert "not measured" in capsys.readouterr().err


def test_the_demo_is_run_as_its_base_was_or_on_the_cpu_first(monkeypatch, tmp_path):
    called = []

    def run(*, device, out, draw=True, **plan):
        called.append((device, plan))
        assert not draw or not out
        of = {"int8": {"runs": [{"seed": 0, "diverged": False, "accuracy": 0.5, "train_loss": [1.0]}]}}
        return {"recipes": of, "data": {"name": "digits"}, "arguments": plan}

    monkeypatch.setattr(demo, "run", run)
    assert beside.main(["demo", "--device", "cpu"]) == 0
    plan = {"epochs": 8, "seeds": 3, "bits": [4, 2]}
    assert called == [("cpu", plan), ("cpu", plan)]
    base = tmp_path / "demo.json"
    base.write_text(json.dumps(run(device="cpu", out="", epochs=1, seeds=1, bits=[3])))
    called.clear()
    assert beside.main(["demo", "--base", str(base), "--device", "cpu"]) == 0
    assert called == [("cpu", {"epochs": 1, "seeds": 1, "bits": [3]})]
