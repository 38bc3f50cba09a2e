"""Laws of `fqt.optim.PositionScaled`, and of `param_groups`."""

import math

import pytest
import torch
from laws import EPS, assert_same
from optim_twin import give_gradients, parameters, tensors
from torch import nn

import fqt
from fqt.optim import PSGD, PositionScaled, param_groups
from fqt.position import Position, extremes, position_scale

pytestmark = pytest.mark.filterwarnings("ignore:fqt.optim. parameter .* will be drawn")
SHAPES = [(5, 7), (3,), (), (0, 3), (4, 2, 3)]
OPTIONS = [
    dict(),
    dict(target="grid+zero", sparsity=0.5, bits=3),
    dict(target="zero", eps=0.01, scale=3.0, delta="absmax"),
    dict(per_channel=True),
    dict(target=lambda w: w.round() if w.dim() != 1 else None),
    dict(target=None),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "grid")
@pytest.mark.parametrize(
    "rule", [dict(), dict(momentum=0.5, dampening=0.5), dict(momentum=0.5, nesterov=True, maximize=True)]
)
def test_around_torchs_sgd_it_is_psgd(options, rule):
    """To the last bit where every product that torch adds in one rounding is exact: powers of two, as in test_optim."""
    mine = PSGD(parameters(SHAPES), lr=0.125, **rule, **options)
    other = PositionScaled(torch.optim.SGD(parameters(SHAPES), lr=0.125, foreach=False, **rule), **options)
    for t in range(4):
        for optimizer in (mine, other):
            give_gradients(optimizer, seed=t, without=(0,) if t == 0 else ())
            optimizer.step()
    for w, v in zip(mine.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_same(v, w)
        for name in {"range", "threshold"} & mine.state[w].keys():
            assert_same(other.position_state[v][name], mine.state[w][name], name)


def test_around_torchs_sgd_it_is_psgd_within_the_rounding():
    w, v = parameters([(30, 20)])[0], parameters([(30, 20)])[0]
    rule = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    for optimizer in (PSGD([w], **rule), PositionScaled(torch.optim.SGD([v], **rule))):
        give_gradients(optimizer, seed=1)
        optimizer.step()
    # One step: at most 6 roundings of w, decay · w and s · g, where s is at most 2 and |g| below 5.
    assert float((w - v).detach().abs().max()) <= 6 * EPS * (5 + 0.1 * (0.05 + 2 * 5))


def test_the_update_is_scaled_weight_decay_included():
    w, v = parameters([(6, 5)])[0], parameters([(6, 5)])[0]
    start = w.detach().clone()
    plain = torch.optim.AdamW([w], lr=0.1, weight_decay=0.5)
    scaled = PositionScaled(torch.optim.AdamW([v], lr=0.1, weight_decay=0.5), position="update", bits=3)
    for optimizer in (plain, scaled):
        give_gradients(optimizer, seed=0)
        optimizer.step()
    s = position_scale(start, Position(bits=3), extremes(start))
    assert_same(v, start + s * (w.detach() - start))
    assert float((v - w).detach().abs().max()) > 0.01


def test_gradients_are_scaled_inside_the_step_and_restored():
    w, plain = parameters([(4, 3)])[0], parameters([(3,)])[0]
    seen = []

    class Inner(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            raise ArithmeticError

    optimizer = PositionScaled(Inner([{"params": [w]}, {"params": [plain], "target": None}], lr=0.1))
    give_gradients(optimizer, seed=0)
    own = w.grad, plain.grad
    before = [g.clone() for g in own]
    with pytest.raises(ArithmeticError):
        optimizer.step()
    s = position_scale(w, Position(), extremes(w))
    assert_same(seen[0][0], before[0] * s)
    assert_same(seen[0][1], before[1])
    assert w.grad is own[0] and plain.grad is own[1]
    assert_same(w.grad, before[0])


def test_every_evaluation_of_a_closure_is_scaled_where_it_is():
    """LBFGS's line search evaluates at several points; each gradient is scaled there, by one range."""
    w = parameters([(6, 4)])[0]
    target = tensors([(6, 4)], seed=9)[0]
    optimizer = PositionScaled(torch.optim.LBFGS([w], lr=0.5, max_iter=4, line_search_fn="strong_wolfe"), eps=0.1)
    first, points = w.detach().clone(), []

    def closure():
        points.append(w.detach().clone())
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = (w - target).square().sum()
        loss.backward()
        assert_same(w.grad, 2 * (w.detach() - target))  # it sees gradients of its own, never the scaled ones
        return loss

    seen = []
    inner = optimizer.optimizer._gather_flat_grad
    optimizer.optimizer._gather_flat_grad = lambda: seen.append(inner()) or seen[-1]
    optimizer.step(closure)
    assert len(points) > 2 and len(seen) == len(points)
    for x, g in zip(points, seen, strict=True):
        s = position_scale(x, Position(eps=0.1), extremes(first))
        assert_same(g.view(6, 4), 2 * (x - target) * s)
    assert_same(optimizer.position_state[w]["range"], extremes(first))
    assert_same(w.grad, 2 * (points[-1] - target))


def test_groups_state_and_options_are_the_inner_optimizers():
    a, b = parameters([(4, 3), (3, 2)])
    inner = torch.optim.SGD([{"params": [a], "bits": 2}, {"params": [b], "lr": 0.5}], lr=0.25, momentum=0.5)
    optimizer = PositionScaled(inner, bits=5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert [group["bits"] for group in inner.param_groups] == [2, 5]
    c = parameters([(2, 2)])[0]
    optimizer.add_param_group({"params": [c], "target": None})
    assert [group["target"] for group in inner.param_groups] == ["grid", "grid", None]
    inner.param_groups[1]["target"] = None
    give_gradients(optimizer, seed=0)
    starts = [w.detach().clone() for w in (b, c)]
    optimizer.step()
    for w, start, lr in zip((b, c), starts, (0.5, 0.25), strict=True):
        assert_same(w, start - lr * w.grad)
    inner.param_groups[0]["bits"] = 1
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 1"):
        optimizer.step()
    with pytest.raises(ValueError, match="sparsity"):
        optimizer.add_param_group({"params": parameters([(2, 2)]), "sparsity": 2})
    assert len(inner.param_groups) == 3


def test_the_inner_optimizers_own_checkpoint_can_be_loaded():
    inner = torch.optim.SGD(parameters(SHAPES), lr=0.125, momentum=0.5)
    give_gradients(inner, seed=0)
    inner.step()
    optimizer = PositionScaled(torch.optim.SGD(parameters(SHAPES), lr=9.0), bits=3)
    optimizer.load_state_dict(inner.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["bits"]) == (0.125, 0.5, 3) and not optimizer.position_state
    assert set(optimizer.state_dict()) == {"optimizer", "position"}


def test_ranges_go_back_to_those_of_a_checkpoint_held_in_memory():
    """Later steps write the optimizer's own."""
    (w,) = parameters([(4, 6)])
    optimizer = PositionScaled(torch.optim.SGD([w], lr=0.125), target="grid+zero")
    give_gradients(optimizer, seed=0)
    optimizer.step()
    kept = optimizer.state_dict()
    before = {name: t.clone() for name, t in optimizer.position_state[w].items()}
    give_gradients(optimizer, seed=1)
    optimizer.step()
    assert not torch.equal(optimizer.position_state[w]["range"], before["range"])
    optimizer.load_state_dict(kept)
    for name, t in before.items():
        assert torch.equal(optimizer.position_state[w][name], t), name


def test_what_cannot_be_wrapped_or_scaled_is_refused():
    for wrong in (PSGD(parameters(SHAPES), lr=0.1), PositionScaled(torch.optim.SGD(parameters(SHAPES))), "sgd"):
        with pytest.raises(TypeError, match="does not scale by position itself, got"):
            PositionScaled(wrong)
    inner = torch.optim.SGD(parameters(SHAPES))
    with pytest.raises(ValueError, match="bits"):
        PositionScaled(inner, bits=9)
    assert "bits" not in inner.param_groups[0]
    with pytest.raises(TypeError, match="complex64"):
        PositionScaled(torch.optim.SGD([torch.zeros(3, dtype=torch.complex64)]))
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = PositionScaled(torch.optim.SGD(table.parameters()))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    optimizer.param_groups[0]["target"] = None
    optimizer.step()
    with pytest.warns(UserWarning, match="only because it is the optimizer's default"):
        PositionScaled(torch.optim.SGD(parameters([(3,)])))


def test_a_fused_inner_optimizer_is_unscaled_by_gradscaler_first():
    pair = []
    for kind in (dict(fused=True), dict(foreach=False)):
        optimizer = PositionScaled(torch.optim.SGD(parameters([(4, 4)]), lr=0.125, **kind))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for t, bad in enumerate((False, True, False)):
            w = optimizer.param_groups[0]["params"][0]
            give_gradients(optimizer, seed=t)
            w.grad = scaler.scale(w.grad)
            if bad:
                w.grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
        pair.append(w)
    assert_same(*pair)
    assert bool(pair[0].isfinite().all())


# ---- param_groups


def test_param_groups_are_the_weights_of_layers_and_the_rest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose1d(2, 2, 1, bias=False)
            self.linear = fqt.nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.own = nn.Parameter(torch.ones(2, 2))

    weights, rest = param_groups(Net(), target="grid", bits=3)
    # the table is the head's weight, too
    assert [name for name, _ in weights["params"]] == ["table.weight", "conv.weight", "up.weight", "linear.weight"]
    assert [name for name, _ in rest["params"]] == [
        "own", "conv.bias", "norm.weight", "norm.bias", "linear.bias", "normed.bias",
        "normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1",
    ]  # fmt: skip
    assert (weights["bits"], rest["target"]) == (3, None) and "target" not in param_groups(Net())[0]
    optimizer = PSGD(param_groups(Net(), bits=3), lr=0.1, target="zero")
    assert [group["target"] for group in optimizer.param_groups] == ["zero", None]
    assert len(param_groups(nn.LayerNorm(3))) == 1
    with pytest.raises(TypeError, match="got list"):
        param_groups([torch.ones(2)])


def test_param_groups_see_through_one_parametrization():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(model, "weight", Twice())
    weights, rest = param_groups(model)
    assert [name for name, _ in weights["params"]] == ["parametrizations.weight.original"]
    assert [name for name, _ in rest["params"]] == ["bias"]


def test_a_range_for_each_channel_begins_anew():
    w = nn.Parameter(torch.randn(4, 6))
    optimizer = PositionScaled(torch.optim.SGD([w], lr=0.125))
    for per_channel, rows in ((False, 1), (True, 4), (False, 1)):
        optimizer.param_groups[0]["per_channel"] = per_channel
        w.grad = torch.randn(4, 6)
        before = extremes(w, per_channel)
        optimizer.step()
        found = optimizer.position_of(w)[1]["range"]
        assert found.shape == (rows, 2) and torch.equal(found, before)


def test_misspelt_options_of_the_groups_are_refused():
    model = nn.Linear(4, 3)
    for name, meant in (
        ("sparisty", "sparsity"),
        ("bit", "bits"),
        ("targets", "target"),
        ("per_chanel", "per_channel"),
    ):
        with pytest.raises(TypeError, match=meant):
            param_groups(model, **{name: 1})
    options = dict(
        lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, position_eps=0.1, amsgrad=True, position="grad"
    )
    assert param_groups(model, **options)[0].items() >= options.items()
