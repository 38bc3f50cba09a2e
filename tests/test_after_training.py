"""Laws of rounding and pruning after training: `fqt.after_training`."""

import json
import math
import subprocess
import sys

import pytest
import torch
from laws import EPS, assert_same
from torch import nn
from torch.nn.utils import prune

import fqt
import fqt.nn
from fqt import optim
from fqt.position import Position, absmax, advanced_range, extremes, targets
from fqt.targets import AdaptivFloat, FakeQuantized, PowerOfTwo, adaptivfloat


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 3)
    return nn.Sequential(*layers).to(dtype)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def others(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if p.dim() < 2]


def trained(model: nn.Module, steps: int = 3, **options) -> optim.PSGD:
    """A PSGD that has made steps with random gradients."""
    options = {"lr": 0.3, "eps": 0.01, **options}
    optimizer = optim.PSGD(
        optim.param_groups(model, **{k: v for k, v in options.items() if k != "lr"}), lr=options["lr"]
    )
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


# ---- rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_rounded_weights_are_the_nearest_of_the_grid(bits, per_channel):
    model = net()
    before, rest = weights(model), others(model)
    report = fqt.round_weights_(model, bits, per_channel=per_channel)
    q = 2 ** (bits - 1) - 1
    for (name, old), row in zip(before.items(), report.weights, strict=True):
        new = model.get_submodule(name).weight.detach()
        flat = old.reshape(len(old) if per_channel else 1, -1)
        spacing = flat.abs().amax(1, keepdim=True) / torch.tensor(float(q))
        assert_same(torch.tensor(row.spacing), spacing.flatten())
        points = torch.arange(-q, q + 1) * spacing  # (R, 2q + 1), as the rounding makes them: one product
        distance = (flat.double()[:, :, None] - points.double()[:, None]).abs()
        assert torch.isin(new.flatten(), points).all()
        # A quotient rounded to float32 may cross a midpoint by an ulp: distances differ by up to 2·EPS·|w| then.
        actual = (flat.double() - new.reshape(flat.shape).double()).abs()
        assert (actual <= distance.amin(2) + 2 * EPS * flat.abs()).all()
    for a, b in zip(others(model), rest, strict=True):
        assert_same(a, b)


def test_rounding_again_changes_no_code():
    model = net()
    first = fqt.round_weights_(model, 4)
    once = weights(model)
    fqt.round_weights_(model, 4)
    for (name, old), row in zip(once.items(), first.weights, strict=True):
        # Δ·q / q may be off by one rounding, and so the points.
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), old, rtol=4 * EPS, atol=0)
        assert len(row.spacing) == 1


def test_without_a_number_of_bits_it_is_four():
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    assert fqt.round_weights_(model) == fqt.round_weights_(other, 4, target="grid", per_channel=False)


@pytest.mark.parametrize("target", [AdaptivFloat(), PowerOfTwo(3), lambda w: torch.full_like(w, 0.5)])
def test_rounding_to_a_function_sets_its_points(target):
    model = net()
    before = weights(model)
    report = fqt.round_weights_(model, target=target)
    for name, old in before.items():
        assert_same(model.get_submodule(name).weight.detach(), target(old))
    row = report.weights[0]
    assert (row.target, row.bits, row.spacing, row.mse_in_spacings) == (repr(target), None, (), None)


def test_half_precision_weights_hold_the_points_rounded_to_their_dtype():
    model = net(torch.bfloat16)
    before = weights(model)
    fqt.round_weights_(model, 4)
    for name, old in before.items():
        assert_same(model.get_submodule(name).weight.detach(), targets(old, Position(), extremes(old)).bfloat16())


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True}, {"delta": "absmax"}, {"bits": 3}, {"target": "grid+zero"}]
)
def test_the_grid_of_training_is_the_grid_of_evaluation(options):
    """The points that the optimizer's last step drew the weights to are those they are rounded to."""
    model = net()
    optimizer = trained(model, **options)
    p = Position(**options)
    drawn = {}  # the last step's range and its weights' points, by the definition: from the weights before it
    for name, w in weights(model).items():
        running = optimizer.state[model.get_submodule(name).weight]["range"].clone()
        drawn[name] = advanced_range(p, running, extremes(w, p.per_channel))
    step(model, optimizer)
    after = weights(model)
    report = fqt.round_weights_(model, optimizer=optimizer)
    for row in report.weights:
        w, range = model.get_submodule(row.name).weight, drawn[row.name]
        assert (row.target, row.bits) == (p.target, p.bits)
        assert_same(torch.tensor(row.spacing), absmax(range) / torch.tensor(float(p.qmax)))
        assert_same(w.detach(), targets(after[row.name], p, range, optimizer.state[w].get("threshold")))
        assert not torch.equal(range, extremes(after[row.name], p.per_channel))  # else any range would do


def test_options_come_from_the_group_and_contradictions_are_refused():
    model = net()
    optimizer = trained(model, bits=3, per_channel=True)
    before = weights(model)
    for given, match in (({"bits": 4}, "bits 4 contradicts the optimizer's group, which has 3"),
                         ({"per_channel": False}, "per_channel False contradicts"),
                         ({"target": "zero"}, "target 'zero' contradicts"),
                         ({"target": PowerOfTwo()}, "contradicts")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fqt.round_weights_(model, optimizer=optimizer, **given)
    for name, old in before.items():
        assert_same(model.get_submodule(name).weight.detach(), old)
    report = fqt.round_weights_(model, 3, target="grid", per_channel=True, optimizer=optimizer)
    assert all(row.bits == 3 and len(row.spacing) == row.shape[0] for row in report.weights)


def test_groups_of_one_optimizer_are_rounded_each_as_it_says():
    model = net()
    groups = [{"params": [model[0].weight], "target": None}, {"params": [model[3].weight], "bits": 3},
              {"params": [model[4].weight], "target": PowerOfTwo(3)}]  # fmt: skip
    optimizer = optim.PSGD(groups, lr=0.1)
    step(model, optimizer)
    before = weights(model)
    report = fqt.round_weights_(model, optimizer=optimizer)
    assert [row.unchanged for row in report.weights] == ["its group has target None", "", ""]
    assert_same(model[0].weight.detach(), before["0"])
    assert len(model[3].weight.unique()) <= 7
    assert_same(model[4].weight.detach(), PowerOfTwo(3)(before["4"]))
    assert "unchanged: its group has target None" in str(report)


def test_optimizers_without_a_grid_for_a_weight_are_refused():
    def refused(match, optimizer, model, **options):
        before = weights(model)
        with pytest.raises(ValueError, match=match):
            fqt.round_weights_(model, optimizer=optimizer, **options)
        for name, old in before.items():
            assert_same(model.get_submodule(name).weight.detach(), old)

    model = net()
    refused("^0: its weight is none of the optimizer's", trained(net()), model)
    refused("^0: the optimizer has made no step on its weight", trained(model, steps=0), model)
    refused("^0: its group's target 'zero' has no grid", trained(model, target="zero"), model)
    refused("bits belong to the target 'grid'", trained(model, target=PowerOfTwo()), model, bits=4)
    refused("nothing to round", trained(model, target=None), model)
    optimizer = trained(model)
    optimizer.param_groups[0]["per_channel"] = True
    refused("^0: the optimizer has made no step on its weight with these options", optimizer, model)
    optimizer.param_groups[0].update(per_channel=False, target="grid+zero")
    refused("^0: the optimizer has made no step on its weight with these options", optimizer, model)
    with pytest.raises(TypeError, match=r"optimizer must be one of fqt\.optim, which draw weights to a grid, got SGD"):
        fqt.round_weights_(model, optimizer=torch.optim.SGD(model.parameters(), lr=1))


def test_other_optimizers_know_their_grids_too():
    model = net()
    for optimizer in (
        optim.PSGDAdamW(optim.param_groups(model), lr=0.1, bits=3),
        optim.PositionScaled(torch.optim.Adagrad(optim.param_groups(model), lr=0.1), bits=3),
    ):
        step(model, optimizer)
        p, state = optimizer.position_of(model[3].weight)
        expected = targets(model[3].weight, p, state["range"])
        report = fqt.round_weights_(model, optimizer=optimizer)
        assert_same(model[3].weight.detach(), expected)
        assert report.weights[1].bits == 3


# ---- pruning


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_exactly_the_smallest_become_zero(sparsity):
    model = net()
    before = weights(model)
    report = fqt.prune_(model, sparsity)
    for (name, old), row in zip(before.items(), report.weights, strict=True):
        new, k = model.get_submodule(name).weight.detach(), round(sparsity * old.numel())
        gone = new == 0
        assert int(gone.sum()) == k and row.nonzero == old.numel() - k
        assert_same(new[~gone], old[~gone])
        if 0 < k < old.numel():
            assert old[gone].abs().max() <= old[~gone].abs().min()


def test_of_equal_magnitudes_the_first_become_zero():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 1.0, 3.0], [-1.0, 2.0, 0.0, 1.0]])
    fqt.prune_(layer, 0.5)
    assert layer.weight.tolist() == [[0.0, -2.0, 0.0, 3.0], [0.0, 2.0, 0.0, 1.0]]
    both = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    for m in both:
        m.weight.data = torch.ones_like(m.weight)
    fqt.prune_(both, 0.75, scope="global")
    assert both[0].weight.tolist() == [[0.0, 0.0]] and both[1].weight.tolist() == [[0.0], [1.0]]


def test_globally_the_smallest_of_all_layers_become_zero():
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(100)
    before = torch.cat([w.flatten() for w in weights(model).values()])
    report = fqt.prune_(model, 0.6, scope="global")
    after = torch.cat([w.flatten() for w in weights(model).values()])
    assert int((after == 0).sum()) == round(0.6 * before.numel())
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert report.weights[-1].kept > 0.9 > report.weights[0].kept
    assert report.kept == int((after != 0).sum()) / before.numel()


def test_zeros_stay_zeros_under_rounding():
    model = net()
    fqt.prune_(model, 0.5)
    zeros = {name: w == 0 for name, w in weights(model).items()}
    fqt.round_weights_(model, 4)
    for name, zero in zeros.items():
        assert (model.get_submodule(name).weight[zero] == 0).all()


def test_the_order_is_free_where_rounding_makes_more_zeros_than_pruning():
    first, second = net(), net()
    second.load_state_dict(first.state_dict())
    fqt.prune_(first, 0.1)
    fqt.round_weights_(first, 3)
    report = fqt.round_weights_(second, 3)
    assert all(row.kept < 0.9 for row in report.weights)
    fqt.prune_(second, 0.1)
    for a, b in zip(weights(first).values(), weights(second).values(), strict=True):
        assert_same(a, b)


# ---- which layers


def test_shared_weights_count_once_and_the_filter_chooses():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(3, 3))
    model[1].weight = model[0].weight
    before = model[2].weight.detach().clone()
    report = fqt.prune_(model, 0.5, scope="global", filter_fn=lambda module, name: name != "2")
    assert [row.name for row in report.weights] == ["0"] and int((model[1].weight == 0).sum()) == 8
    assert_same(model[2].weight.detach(), before)
    assert [row.name for row in fqt.round_weights_(model).weights] == ["0", "2"]


@pytest.mark.parametrize("change", [fqt.round_weights_, fqt.prune_])
def test_layers_that_cannot_be_changed_are_refused_by_name_before_any_is(change):
    def refused(bad, match):
        model = nn.Sequential(nn.Linear(3, 3), bad)
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=match):
            change(model)
        assert_same(model[0].weight.detach(), before)

    for value in (math.nan, math.inf):
        bad = nn.Linear(3, 2)
        bad.weight.data[0, 1] = value
        refused(bad, r"^1: its weight of shape \(2, 3\) is not finite")
    under_lsq = nn.Linear(3, 2)
    fqt.lsq_(under_lsq)
    refused(under_lsq, r"^1: its weight is parametrized; remove that first \(lsq_ by remove_lsq_\)")
    refused(prune.identity(nn.Linear(3, 2), "weight"), "^1: its weight is computed by a hook")
    refused(nn.Linear(3, 2, device="meta"), "^1: its weight must be floating point and have values")
    for nothing in (nn.ReLU(), nn.Embedding(3, 3)):
        with pytest.raises(ValueError, match="no layer"):
            change(nothing)
    with pytest.raises(ValueError, match="no layer"):
        change(net(), filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        change(None)


@pytest.mark.parametrize("change", [fqt.round_weights_, fqt.prune_])
def test_weights_held_as_codes_are_refused(change):
    model = nn.Sequential(fqt.nn.Linear(3, 2))
    fqt.hold_int8_(model)
    with pytest.raises(ValueError, match=r"^0: its weight is a Int8Weight, not an ordinary tensor \(release_int8_"):
        change(model)
    change(fqt.release_int8_(model))


@pytest.mark.parametrize("call, match", [
    (lambda m: fqt.round_weights_(m, 9), "bits must be an integer from 2 to 8, got 9"),
    (lambda m: fqt.round_weights_(m, target="zero"), "target must be 'grid' or a function of the weights, got 'zero'"),
    (lambda m: fqt.round_weights_(m, 4, target=adaptivfloat), "bits belong to the target 'grid'"),
    (lambda m: fqt.round_weights_(m, target=adaptivfloat, per_channel=True), "per_channel belongs to the targets by name"),
    (lambda m: fqt.round_weights_(m, target=lambda w: w[0]), "^0: <function .* returned points of shape"),
    (lambda m: fqt.prune_(m, 1.5), "sparsity must be a number from 0 to 1, got 1.5"),
    (lambda m: fqt.prune_(m, scope="model"), "scope must be 'layer' or 'global', got 'model'"),
])  # fmt: skip
def test_options_out_of_range_are_refused(call, match):
    model = net()
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        call(model)
    for name, old in before.items():
        assert_same(model.get_submodule(name).weight.detach(), old)


def test_empty_and_zero_weights_are_left_and_reported():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.empty(0, 3))
    nn.init.zeros_(model[1].weight)
    for report in (fqt.round_weights_(model), fqt.prune_(model), fqt.round_weights_(model, per_channel=True)):
        empty, zero = report.weights
        assert (empty.mse, empty.kept, zero.mse, zero.kept) == (0.0, 1.0, 0.0, 0.0)
        assert "nan" not in str(report) and json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (model[1].weight == 0).all()


@pytest.mark.parametrize("options", [{}, {"target": PowerOfTwo(3)}, None])
def test_quantized_layers_notice(options):
    layer = fqt.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.no_grad():
        stale = layer(x)
        fqt.prune_(layer) if options is None else fqt.round_weights_(layer, **options)
        y = layer(x)
        assert_same(y, fqt.invalidate_(layer)(x))
    assert not torch.equal(y, stale)


def test_quantized_layers_are_rounded_to_what_they_compute_with():
    model = nn.Sequential(fqt.nn.Linear(8, 8), nn.Linear(8, 8))
    before = weights(model)
    target = FakeQuantized(model)
    expected = target(model[0].weight)
    report = fqt.round_weights_(model, target=target)
    assert_same(model[0].weight.detach(), expected)
    assert_same(model[1].weight.detach(), before["1"])
    assert report.weights[1].unchanged == "FakeQuantized(Sequential) has no points for it"


# ---- the report


def test_the_report_says_what_changed():
    model = net()
    before = weights(model)
    report = fqt.round_weights_(model, 3, per_channel=True)
    errors, counts = 0.0, 0
    for row, old in zip(report.weights, before.values(), strict=True):
        new = model.get_submodule(row.name).weight.detach()
        error = (new.double() - old.double()).square()
        spacing = torch.tensor(row.spacing, dtype=torch.float64).reshape(-1, *[1] * (old.dim() - 1))
        assert row.shape == tuple(old.shape) and row.numel == old.numel()
        assert row.mse == pytest.approx(error.mean().item(), rel=1e-12)
        assert row.mse_in_spacings == pytest.approx((error / spacing**2).mean().item(), rel=1e-12)
        assert 0 < row.mse_in_spacings < 1 / 4 and row.kept == (new != 0).sum().item() / old.numel()
        errors, counts = errors + error.sum().item(), counts + old.numel()
    assert report.mse == pytest.approx(errors / counts, rel=1e-12) and report.numel == counts


def test_the_report_is_a_table_and_data():
    model = net()
    report = fqt.round_weights_(model, 3, per_channel=True)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "target", "Δ", "MSE", "MSE/Δ²", "kept"]
    assert len(lines) == 6 and "4×2×3×3" in lines[2] and "3-bit grid" in lines[2] and " to " in lines[2]
    assert lines[-1].startswith("3 layers, 243 weights") and lines[-1].endswith(f"{report.kept:.2%}")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["numel"], data["mse"], data["kept"]) == (243, report.mse, report.kept)
    assert data["layers"][1]["name"] == "3" and data["layers"][1]["spacing"] == list(report.weights[1].spacing)
    assert str(fqt.prune_(nn.Linear(2, 2))).splitlines()[2].split()[:4] == ["(the", "model)", "2×2", "zero"]


# ---- the package


def test_the_names_are_exported_and_cost_no_import_of_torch():
    names = ["round_weights_", "prune_", "lsq_", "remove_lsq_", "hold_int8_", "release_int8_", "Int8Weight"]
    modules = ["optim", "position", "targets", "lsq", "after_training", "int8_weight"]
    assert set(names + modules) <= set(dir(fqt))
    for name in names + modules:
        assert getattr(fqt, name) is not None
    code = "import sys, fqt; sys.exit(bool({'torch', 'triton', 'numpy'} & set(sys.modules)) or not hasattr(fqt, '__all__'))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
