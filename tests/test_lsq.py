"""Laws of learned step size quantization: `fqt.lsq`."""

import copy
import math
import warnings

import pytest
import torch
from laws import EPS, assert_same
from torch import nn
from torch.nn.utils import parametrize, prune

import fqt
import fqt.nn
from fqt import lsq, optim, targets

GRID = torch.tensor(
    [-20.0, -4.2, -4.0, -3.9, -2.5, -1.5, -0.3, 0.0, 0.5, 1.4, 2.6, 2.9, 3.0, 3.1, 50.0]
)  # v / s, 3 bits


def learned(v: torch.Tensor, step, bits: int = 3) -> lsq.LearnedStep:
    made = lsq.LearnedStep(v, bits)
    made.step.data = torch.as_tensor(step, dtype=made.step.dtype)
    made.floor = made.step.detach() * 2.0**-10
    return made


def gradients(made: lsq.LearnedStep, v: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v = v.detach().requires_grad_(True)
    return torch.autograd.grad(made(v), (v, made.step), upstream)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


# ---- the quantizer


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_fake_quantized_weight_is_the_step_times_a_clipped_integer(bits):
    v = torch.randn(200)
    made = lsq.LearnedStep(v, bits)
    codes = made(v).detach() / made.step.detach()
    whole = torch.round(codes)
    # One rounding of s·q and one of the quotient.
    torch.testing.assert_close(codes, whole, rtol=2 * EPS, atol=0)
    assert whole.min() >= -(2 ** (bits - 1)) and whole.max() <= 2 ** (bits - 1) - 1
    inside = (v / made.step > -(2 ** (bits - 1))) & (v / made.step < 2 ** (bits - 1) - 1)
    assert ((v - made(v)).abs() <= made.step * (0.5 + EPS * 2**bits))[inside].all()


def test_values_and_derivatives_are_the_papers_at_every_place():
    step = 0.25  # a power of two: v / s is exact
    v = GRID * step
    made = learned(v, step)
    assert made(v).tolist() == [step * q for q in (-4, -4, -4, -4, -2, -2, 0, 0, 0, 1, 3, 3, 3, 3, 3)]
    for i, x in enumerate(GRID.tolist()):
        upstream = torch.zeros_like(v)
        upstream[i] = 2.0
        grad_v, grad_s = gradients(made, v, upstream)
        inside = -4 < x < 3
        assert grad_v[i] == (2.0 if inside else 0.0) and grad_v.count_nonzero() == int(inside)
        of_step = torch.round(GRID[i]) - GRID[i] if inside else torch.tensor(-4.0 if x <= -4 else 3.0)
        # g = 1 / √(N · Q_P); the square root, the quotient and two products round once each.
        torch.testing.assert_close(grad_s, 2.0 * of_step / math.sqrt(len(v) * 3), rtol=4 * EPS, atol=0)


def test_derivatives_are_those_of_a_straight_through_expression():
    v = torch.randn(7, 5, dtype=torch.float64)
    made = lsq.LearnedStep(v, 3, per_channel=True)
    made.step.data *= 0.4  # so that some weights are clipped
    upstream = torch.randn(7, 5, dtype=torch.float64)
    actual = gradients(made, v, upstream)
    v.requires_grad_(True)
    s = made.step * (1 / math.sqrt(5 * 3))  # its gradient is g times that of the step, its value is put right
    s = s + (made.step - s).detach()
    x = (v / s).clamp(-4, 3)
    (((torch.round(x) - x).detach() + x) * s).backward(upstream)
    assert (actual[0] == 0).any() and (actual[0] != 0).any()
    torch.testing.assert_close(actual[0], v.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[1], made.step.grad, rtol=1e-12, atol=1e-14)


def test_a_weight_on_its_points_and_inside_gives_the_step_no_gradient():
    v = torch.tensor([-0.75, 0.0, 0.5, 0.25])
    _, grad_s = gradients(learned(v, 0.25), v, torch.randn(4))
    assert grad_s == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_step_is_twice_the_mean_magnitude_over_the_root_of_the_largest_code(bits):
    v = torch.randn(6, 3, 2, 2) * torch.arange(1.0, 7)[:, None, None, None]
    top = 2 ** (bits - 1) - 1
    expected = 2 * v.double().abs().mean() / math.sqrt(top)
    # A mean of n float32: at most log2 n + 2 roundings in pairwise sums, and a few more.
    torch.testing.assert_close(lsq.LearnedStep(v, bits).step.double(), expected, rtol=16 * EPS, atol=0)
    per_channel = lsq.LearnedStep(v, bits, per_channel=True).step
    assert per_channel.shape == (6, 1, 1, 1)
    expected = 2 * v.double().abs().mean((1, 2, 3), keepdim=True) / math.sqrt(top)
    torch.testing.assert_close(per_channel.double(), expected, rtol=16 * EPS, atol=0)


def test_channels_have_their_own_steps_and_gradients():
    v = torch.randn(4, 9)
    together = lsq.LearnedStep(v, 3, per_channel=True)
    upstream = torch.randn(4, 9)
    grad_v, grad_s = gradients(together, v, upstream)
    for i in range(4):
        alone = learned(v[i], together.step[i, 0].item())
        assert_same(together(v)[i], alone(v[i]))
        one_v, one_s = gradients(alone, v[i], upstream[i])
        assert_same(grad_v[i], one_v)
        # The order of summing 9 terms differs; cancellation is bounded by the terms' magnitudes, each below 4·|upstream|.
        torch.testing.assert_close(grad_s[i, 0], one_s, rtol=0, atol=9 * EPS * 4 * float(upstream[i].abs().sum()))


def test_half_precision_weights_are_quantized_in_float32():
    v = torch.randn(50, dtype=torch.bfloat16)
    made = lsq.LearnedStep(v, 4)
    assert made.step.dtype == torch.float32 and made(v).dtype == torch.bfloat16
    assert_same(made(v), made(v.float()).bfloat16())
    grad_v, grad_s = gradients(made, v, torch.ones_like(v))
    assert grad_v.dtype == torch.bfloat16
    assert_same(grad_s, gradients(made, v.float(), torch.ones(50))[1])


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-30])
def test_a_step_at_or_below_zero_acts_as_its_floor_and_can_grow_again(step):
    v = torch.randn(40)
    made = lsq.LearnedStep(v, 3)
    floor = made.floor.item()
    assert 0 < floor == made.step.item() * 2.0**-10
    with torch.no_grad():
        made.step.fill_(step)
    assert_same(made(v), learned(v, floor)(v))
    grad_v, grad_s = gradients(made, v, v)
    assert grad_v.isfinite().all() and grad_s.isfinite()
    # The gradient of half the squared error: a larger step makes larger values, which descent on it must reach.
    _, grad_s = gradients(made, v, made(v).detach() - v)
    assert -math.inf < grad_s < 0


@pytest.mark.parametrize("v, what", [(torch.zeros(3, 2), "zero"), (torch.empty(0, 2), "empty"),
                                     (torch.tensor([[1.0, math.nan]]), "not finite"),
                                     (torch.tensor([[1.0, math.inf]]), "not finite")])  # fmt: skip
def test_weights_without_a_first_step_are_refused(v, what):
    for per_channel in (False, True):
        with pytest.raises(ValueError, match=f"is {what}: there is no step to start from"):
            lsq.LearnedStep(v, 4, per_channel)


def test_a_channel_of_zeros_starts_with_the_step_of_the_tensor():
    v = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert_same(lsq.LearnedStep(v, 2, True).step.flatten().detach(), torch.tensor([2.0, 4.0]))


# ---- models


def test_layers_compute_with_the_fake_quantized_weight_and_keep_their_parameters():
    model = net()
    before = dict(model.named_parameters())
    assert fqt.lsq_(model, 3) == ["0", "3", "5"]
    assert [model[i].parametrizations.weight[0].bits for i in (0, 3, 5)] == [8, 3, 8]
    for i in (0, 3, 5):
        held = model[i].parametrizations.weight
        assert held.original is before[f"{i}.weight"]
        assert_same(model[i].weight, held[0](held.original))
    x = torch.randn(2, 2, 4, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(torch.unique(model[3].weight / model[3].parametrizations.weight[0].step)) <= 8


def test_the_ends_are_those_of_the_model_whatever_the_filter():
    model = net()
    assert fqt.lsq_(model, 3, filter_fn=lambda module, name: isinstance(module, nn.Linear), first_last_bits=5) == [
        "3",
        "5",
    ]
    assert [model[i].parametrizations.weight[0].bits for i in (3, 5)] == [3, 5]


@pytest.mark.parametrize("round", [True, False])
def test_removing_leaves_the_parameters_and_classes_of_before(round):
    model = net()
    before, types = dict(model.named_parameters()), [type(m) for m in model]
    values = {name: p.detach().clone() for name, p in before.items()}
    fqt.lsq_(model)
    quantized = {f"{i}.weight": model[i].weight.detach().clone() for i in (0, 3, 5)}
    assert fqt.remove_lsq_(model, round=round) == ["0", "3", "5"]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert [type(m) for m in model] == types
    for name, p in model.named_parameters():
        assert_same(p, quantized.get(name, values[name]) if round else values[name])


def test_the_state_dict_carries_steps_and_floors():
    model, other = net(), net()
    fqt.lsq_(model, per_channel=True)
    fqt.lsq_(other, per_channel=True)
    state = model.state_dict()
    assert {"3.parametrizations.weight.original", "3.parametrizations.weight.0.floor"} <= state.keys()
    assert state["3.parametrizations.weight.0.step"].shape == (8, 1)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same(a, b)
    x = torch.randn(2, 2, 4, 4)
    assert_same(model(x), other(x))
    assert_same(copy.deepcopy(model)(x), model(x))


def test_a_step_below_its_floor_is_warned_of_when_it_ends():
    model = net()
    fqt.lsq_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fqt.remove_lsq_(copy.deepcopy(model))
    assert parametrize.is_parametrized(model[3]) and model[3].weight.shape == (
        8,
        16,
    )  # the copy's class was not this one's
    with torch.no_grad():
        model[3].parametrizations.weight[0].step.fill_(-0.5)
    with pytest.warns(UserWarning, match="3: training drove a step of lsq_ to -0.5"):
        fqt.remove_lsq_(model)


def test_what_cannot_be_parametrized_is_refused_by_name_and_nothing_changes():
    def refused(model, match, **options):
        types = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=match):
            fqt.lsq_(model, **options)
        assert [type(m) for m in model.modules()] == types

    refused(nn.Sequential(nn.Linear(2, 2), fqt.nn.Linear(2, 2)), "^1 is a fqt.nn.Linear, which quantizes")
    twice = net()
    fqt.lsq_(twice)
    refused(twice, "^0: its weight is parametrized")
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    refused(tied, "^0: its weight is shared with another module")
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    tied[1].weight = tied[0].weight
    refused(tied, "^1: its weight is shared with another module")
    zero = net()
    nn.init.zeros_(zero[3].weight)
    refused(zero, r"^3: a weight of shape \(8, 16\) is zero")
    refused(
        nn.Sequential(nn.Linear(2, 2), prune.identity(nn.Linear(2, 2), "weight")),
        "^1: its weight is computed by a hook",
    )
    refused(nn.Linear(2, 2, device="meta"), "^the model: its weight must be floating point and have values")
    refused(nn.Sequential(nn.LazyLinear(2)), "^0: its weight is a UninitializedParameter")
    refused(nn.Sequential(nn.ReLU()), "no layer to quantize")
    refused(net(), "no layer to quantize", filter_fn=lambda module, name: False)
    refused(net(), "^bits must be", bits=1)
    refused(net(), "^first_last_bits must be", first_last_bits=9)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fqt.lsq_(3)


def test_removing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="no layer of the model is under lsq_"):
        fqt.remove_lsq_(net())
    model = net()
    fqt.lsq_(model)
    parametrize.register_parametrization(model[5], "weight", nn.Tanh(), unsafe=True)
    with pytest.raises(ValueError, match=r"^5: its weight has a parametrization besides"):
        fqt.remove_lsq_(model)
    assert parametrize.is_parametrized(model[0])


# ---- together with PSGD


def test_psgd_with_lsq_learns_and_draws_the_weights_to_their_fake_quantized_values():
    """Two runs, alike but for the target: with it the weights end nearer to v̂, and both learn."""

    def train(scaled: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        fqt.lsq_(model, 3, first_last_bits=3)
        steps = [p for name, p in model.named_parameters() if name.endswith("step")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("step")]
        target = targets.FakeQuantized(model) if scaled else None
        groups = [{"params": weights, "target": target}, {"params": steps, "target": None, "lr": 0.01}]
        optimizer = optim.PSGD(groups, lr=0.05, momentum=0.9)
        before = [p.detach().clone() for p in steps]
        x = torch.randn(64, 4)
        y = torch.sin(x[:, :1] + x[:, 1:2] * x[:, 2:3])
        for _ in range(100):
            noisy = y + 0.5 * torch.randn_like(y)
            optimizer.zero_grad()
            (model(x) - noisy).square().mean().backward()
            optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(steps, before, strict=True))
        held = [m.parametrizations.weight for m in model if isinstance(m, nn.Linear)]
        errors = torch.cat([((h.original - h()) / h[0].step).detach().flatten() for h in held])
        return errors.square().mean().item(), ((model(x) - y).square().mean() / y.square().mean()).item()

    (plain, plain_loss), (drawn, drawn_loss) = train(False), train(True)
    assert drawn < 0.6 * plain  # 0.036 against 0.097 here
    assert plain_loss < 0.4 and drawn_loss < 0.4
