"""The ResNets and their study: sizes, which runs count, what the variances are, and what the report says."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fqt
from fqt_bench import psgd_runs, recipe_study, recipe_tables
from fqt_bench.psgd_runs import Data
from fqt_bench.recipe_study import QUICK
from fqt_bench.resnet import ResNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 1, 28, 28, generator=draws), torch.randint(10, (120,), generator=draws)
    return Data("noise", x[:80], y[:80], x[80:], y[80:], shift=1)


@pytest.fixture(scope="module")
def quick(data, tmp_path_factory):
    """The JSON file of a quick study."""
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("study") / "study.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psgd_runs, "load", lambda name, folder: data)
        assert recipe_study.main(["--quick", "--out", str(path)]) == 0
    return path


# ---- the network


def parameters(n, w, channels, classes=10):
    """3x3 filters of the stem and of 2n layers a stage, the 1x1 ones of two shortcuts, two numbers for each normalized
    channel, and the classifier."""
    filters = 9 * channels * w + 9 * w**2 * 2 * n
    filters += sum(9 * (c // 2 * c + (2 * n - 1) * c**2) + c // 2 * c for c in (2 * w, 4 * w))
    norms = 2 * w * (1 + 2 * n) + sum(2 * c * (2 * n + 1) for c in (2 * w, 4 * w))
    return filters + norms + (4 * w + 1) * classes


def test_a_resnet_has_the_papers_number_of_parameters():
    """ResNet-20 has 0.27 million: 269 722, and 2 752 in the shortcuts' convolutions and norms."""
    assert parameters(3, 16, 3) == 269_722 + 2_752
    for depth, width, channels in ((20, 16, 3), (32, 16, 3), (20, 8, 1), (8, 2, 1), (26, 3, 3)):
        model = ResNet(depth, width, channels)
        assert sum(p.numel() for p in model.parameters()) == parameters((depth - 2) // 6, width, channels)
        layers = recipe_study.layers_of(model)
        assert len(layers) == depth + 2  # the convolutions and the classifier, and two shortcuts


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_errors(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*got {depth}"):
        ResNet(depth)


def test_stages_halve_the_image_and_double_the_channels():
    model, shapes = ResNet(8, 4, 3, classes=7, pool=2), []
    for stage in (model.bn, model.stage1, model.stage2, model.stage3, model.fc):
        stage.register_forward_hook(lambda m, x, y: shapes.append(tuple(y.shape)))
    model(torch.randn(2, 3, 28, 30))
    assert shapes == [(2, 4, 14, 15), (2, 4, 14, 15), (2, 8, 7, 8), (2, 16, 4, 4), (2, 7)]


def test_every_convolution_and_the_classifier_are_converted():
    report = fqt.quantize_(model := ResNet(20, 2, 1), "psq5")
    assert [r.name for r in report.converted] == list(recipe_study.layers_of(model)) and not report.skipped


def test_recipes_start_from_the_same_weights():
    models = [recipe_study.network(QUICK, recipe, seed) for recipe, seed in (("exact", 3), ("psq5", 3), ("psq5", 4))]
    assert [{str(m.recipe) for m in recipe_study.layers_of(model).values()} for model in models] == [
        {"exact"}, {"psq5"}, {"psq5"}
    ]  # fmt: skip
    exact, same, other = (list(model.parameters()) for model in models)
    assert all(map(torch.equal, exact, same)) and not torch.equal(same[0], other[0])


# ---- the study


def test_a_quick_study_has_every_run_and_draws_its_plot(quick):
    found = json.loads(quick.read_text(encoding="utf-8"))
    assert {"kind", "choice", "rule", "environment", "data", "plan", "seeds", "seeds_8_bits", "families", "bits",
            "variance_bits", "arguments", "summary", "learning_rate", "layers", "variance", "sources", "tuning",
            "runs", "checkpoints"} == set(found)  # fmt: skip
    assert (found["seeds"], found["seeds_8_bits"]) == (1, 2)
    assert [f"{r['recipe']} {r['seed']}" for r in found["runs"]] == ["exact 0", "psq8 0", "psq4 0", "exact 1", "psq8 1"]
    assert [r["lr"] for r in found["tuning"]] == list(recipe_study.RATES["resnet"])
    best = max(found["tuning"], key=lambda r: (r["accuracy"], -r["train_loss"]))
    assert {r["lr"] for r in found["runs"] + found["checkpoints"]} == {best["lr"]} == {found["learning_rate"]}
    for c in found["checkpoints"]:  # of one network, which is its own mean
        assert found["variance"][c["when"]][c["recipe"]]["sampling"] == c["sampling"]
    assert found["variance"]["early"]["psq4"]["sampling"] != found["variance"]["end"]["psq4"]["sampling"]
    at = [(c["seed"], c["when"], c["recipe"]) for c in found["checkpoints"]]
    assert at == [(0, w, r) for w in ("early", "end") for r in ("exact", "psq4")]
    assert len(found["layers"]) == QUICK.depth + 2
    for r in found["runs"]:
        assert not r["diverged"] and 0 <= r["accuracy"] <= 100 and r["train_loss"] > 0
        layers = {name: line.split() for name, line in r["variance"]["layers"].items()}
        quantized = r["recipe"] != "exact"
        assert {len(line) for line in layers.values()} == {len(found["layers"])}
        assert ("-" in layers["wgrad"]) is not quantized
        assert [v == "-" for v in layers["dgrad"]] == [i == 0 or not quantized for i in range(len(found["layers"]))]
        assert (r["variance"]["quantization"] > 0) is quantized and r["variance"]["sampling"] > 0
    assert quick.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_a_study_on_one_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        recipe_study.main(["--quick", "--device", "cuda", "--out", "study.json"])
    assert "not measured" in capsys.readouterr().err


def test_without_matplotlib_the_tables_are_printed_and_the_plot_is_said_to_be_missing(quick, monkeypatch, capsys):
    monkeypatch.setattr(recipe_study.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(recipe_study.recipe_plots, "draw", None)
    assert recipe_study.main(["--report", str(quick)]) == 0
    said = capsys.readouterr()
    assert "| 8 |" in said.out and "no plot" in said.err


def test_the_study_of_text_says_bits_a_byte(tmp_path, monkeypatch, capsys):
    """Of a network that has learned nothing: some 8 bits, those of 256 bytes that are equally likely."""
    pytest.importorskip("matplotlib")
    x, y = torch.randint(256, (2, 120, 8), generator=torch.Generator().manual_seed(0))
    text = Data("noise", x[:80], y[:80], x[80:], y[80:])
    monkeypatch.setattr(psgd_runs, "load", lambda name, folder: {"python": text}[name])
    path = tmp_path / "study.json"
    assert recipe_study.main(["--quick", "--dataset", "python", "--out", str(path)]) == 0
    found, said = json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out
    assert [r["lr"] for r in found["tuning"]] == list(recipe_study.RATES["gpt"])
    assert found["arguments"]["optimizer"] == "AdamW" and found["layers"][-1] == "head"
    losses = [r["test_loss"] / math.log(2) for r in found["runs"] if r["recipe"] == "psq8"]
    cell = f"{sum(losses) / 2:.3f} ± {torch.tensor(losses, dtype=torch.float64).std().item():.3f}"
    assert f"| 8 | {cell} |" in said and all(7.5 < loss < 9 for loss in losses)
    assert (
        "Transformer of 1 blocks of width 8, noise, 80 training and 40 test windows of 64 bytes; 2 steps of 16" in said
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_was_cut_off_runs_what_is_missing_and_finds_the_same(quick, data, tmp_path, monkeypatch):
    found = json.loads(quick.read_text(encoding="utf-8"))
    lines = quick.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = [i for i, line in enumerate(lines) if '"stage": "test"' in line][-1]
    again = tmp_path / "again.jsonl"
    again.write_text("".join(lines[:cut] + lines[cut + 1 : -1]) + lines[-1][:50], encoding="utf-8")
    ran, train = [], psgd_runs.train
    monkeypatch.setattr(psgd_runs, "train", lambda *args, **named: ran.append(args) or train(*args, **named))
    resumed = recipe_study.study(data, QUICK, {"exact": 2, "psq8": 2, "psq4": 1}, ["exact", "psq4"], again)
    del resumed["sources"]  # which somebody may be editing
    assert len(ran) == 2 and json.loads(json.dumps(resumed)) == {name: found[name] for name in resumed}
    assert len(again.read_text(encoding="utf-8").splitlines()) == len(lines) + 1  # one of them cut off


def test_the_learning_rate_is_chosen_without_the_test_images(data, tmp_path, monkeypatch):
    seen = []

    def run(plan, recipe, lr, data, seed, measure=True):
        seen.append((recipe, lr, seed, data.train_x, data.test_x))
        return record(50.0 - lr, 1.0)

    monkeypatch.setattr(recipe_study, "run", run)
    recipe_study.study(data, QUICK, {"exact": 1, "psq8": 1}, [], tmp_path / "lines.jsonl")
    *tuning, exact, psq8 = seen
    assert [s[:3] for s in tuning] == [("exact", lr, recipe_study.TUNING_SEED) for lr in recipe_study.RATES["resnet"]]
    for *_, train_x, test_x in tuning:
        assert torch.equal(torch.cat([train_x, test_x]), data.train_x) and len(test_x) == 16
    best = min(recipe_study.RATES["resnet"])  # as `run` has it
    assert exact[:3] == ("exact", best, 0) and psq8[:3] == ("psq8", best, 0)
    assert all(s[3] is data.train_x and s[4] is data.test_x for s in (exact, psq8))


def test_the_report_prints_what_the_file_holds(quick, capsys):
    assert recipe_study.main(["--report", str(quick)]) == 0
    said = capsys.readouterr().out
    s = json.loads(quick.read_text(encoding="utf-8"))["summary"]
    exact, psq8 = (recipe_tables.accuracy_cell(s[name], s["exact"]) for name in ("exact", "psq8"))
    assert f"| 8 | {psq8} |" in said and f"exact {exact}." in said


def test_accuracies_are_paired_by_seed():
    def record(recipe, seed, accuracy):
        return {"recipe": recipe, "seed": seed, "accuracy": accuracy, "diverged": accuracy is None}

    runs = [record("exact", 0, 90.0), record("exact", 1, 80.0), record("exact", 2, None),
            record("psq4", 1, 79.5), record("psq4", 0, 90.5), record("psq4", 2, 85.0), record("ptq2", 0, None)]  # fmt: skip
    assert recipe_tables.paired({"runs": runs}) == {"exact": [0.0, 0.0], "psq4": [-0.5, 0.5], "ptq2": []}


def test_a_run_whose_weights_are_not_finite_diverged(data):
    found = recipe_study.run(QUICK, "exact", math.inf, data, 0)
    assert found.pop("diverged") is True and set(found.values()) == {None} and len(found) == 5
    found["diverged"] = True
    s = recipe_study.summary([found])
    assert (s["runs"], s["diverged"], s["accuracy_mean"], s["variance"]) == (1, 1, None, None)
    assert not recipe_tables.is_within(s, s)


# ---- the variances


def test_variances_are_those_of_draws_and_of_batches(data):
    """Against a loop over whole gradients; and nothing is random without quantized gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4, bias=False), nn.ReLU(), nn.Linear(4, 10))
    fqt.quantize_(model, "psq4")
    plan = QUICK._replace(batches=4, looked_at=2, draws=3)
    twin = copy.deepcopy(model)
    found = recipe_study.variances(model, "psq4", data, plan, means := {})
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).split(16)

    def gradient(recipe, rows):
        fqt.quantize_(twin, recipe)
        loss = F.cross_entropy(twin(data.train_x[rows]), data.train_y[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]).double()

    mean = torch.stack([gradient("qat8", rows) for rows in order[:4]])
    fqt.set_step(recipe_study.FIRST_DRAW, twin)
    errors = torch.stack([gradient("psq4", order[i]) - mean[i] for i in (0, 1) for _ in range(3)])
    assert found["sampling"] == pytest.approx(mean.var(0).sum().item())
    assert found["norm2"] == pytest.approx(mean.square().sum(1).mean().item())
    assert found["quantization"] == pytest.approx(errors.square().sum(1).mean().item())
    for i, (start, n) in enumerate(((0, 784 * 4), (784 * 4, 40))):
        each = [float(found["layers"][name].split()[i]) for name in ("sampling", "quantization")]
        part = slice(start, start + n)
        expected = [mean.var(0)[part].sum().item(), errors[:, part].square().sum(1).mean().item()]
        assert each == pytest.approx(expected, rel=5e-4)  # four digits
    assert [v == "-" for name in ("dgrad", "wgrad") for v in found["layers"][name].split()] == [
        True,
        False,
        False,
        False,
    ]
    bits = {r: recipe_study.variances(model, r, data, plan, means) for r in ("qat8", "psq8")}
    assert len(means) == 1 and bits["qat8"]["quantization"] == 0
    assert bits["psq8"]["sampling"] == bits["qat8"]["sampling"] == found["sampling"]
    assert 0 < bits["psq8"]["quantization"] < found["quantization"]


# ---- what is made of the records


def record(accuracy, loss, quantization=1.0, layers="1 -"):
    lines = dict.fromkeys(("sampling", "quantization", "dgrad", "wgrad"), layers)
    v = {"norm2": 1.0, "sampling": 4.0, "quantization": quantization, "layers": lines}
    return {"diverged": accuracy is None, "accuracy": accuracy, "train_loss": loss,
            "variance": None if accuracy is None else v}  # fmt: skip


def test_summaries_are_means_and_deviations_of_the_runs_that_did_not_diverge():
    runs = [record(90.0, 0.5, 1.0, "1 -"), record(92.0, 0.3, 3.0, "2 -"), record(None, None)]
    s = recipe_study.summary(runs)
    assert (s["runs"], s["diverged"]) == (3, 1)
    assert [s["accuracy_mean"], s["accuracy_std"]] == pytest.approx([91.0, math.sqrt(2)])
    assert [s["train_loss_mean"], s["train_loss_std"]] == pytest.approx([0.4, 0.1 * math.sqrt(2)])
    assert s["variance"]["quantization"] == 2.0 and s["variance"]["ratio"] == 0.5
    assert s["variance"]["layers"]["dgrad"] == "1.5 -"
    assert recipe_tables.accuracy_cell(s, s) == "**91.00 ± 1.41, 1 of 3 diverged**"
    assert recipe_study.summary(runs[:1])["accuracy_std"] is None


@pytest.mark.parametrize("mean,within", [(91.0, True), (89.6, True), (89.4, False)])
def test_a_recipe_is_within_the_spread_or_below_it(mean, within):
    """Exact 90 ± 0.3, the other ± 0.4: a spread of 0.5."""
    exact, other = ({"diverged": 0, "accuracy_mean": m, "accuracy_std": s} for m, s in ((90.0, 0.3), (mean, 0.4)))
    assert recipe_tables.is_within(other, exact) is within


def test_the_learning_rate_is_the_most_accurate_then_that_of_the_least_loss():
    def runs(*cells):
        return [{"lr": i, "diverged": a is None, "accuracy": a, "train_loss": b} for i, (a, b) in enumerate(cells)]

    assert recipe_study.chosen(runs((90.0, 0.3), (91.0, 0.2), (91.0, 0.1), (None, None))) == 2
    with pytest.raises(ValueError, match="diverged at every"):
        recipe_study.chosen(runs((None, None)))
