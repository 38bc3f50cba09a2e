"""Laws of the optimizers' steps by torch's multi-tensor operations: they are the plain loop's, and that is the formulas'."""

import math
import warnings

import pytest
import torch
from laws import EPS, assert_same
from optim_twin import Twin, give_gradients, parameters, tensors

import fqt
from fqt.optim import PSGD, PSGDAdamW, loop
from fqt.position import Position

pytestmark = pytest.mark.filterwarnings("ignore:fqt.optim. parameter .* will be drawn")
CALLABLE = {"target": lambda w: w.round() if w.dim() != 1 else None}
SGD_CASES = {
    "plain": dict(target=None, momentum=0.9, weight_decay=0.01),
    "momentum": dict(momentum=0.9),
    "dampening, decay": dict(momentum=0.9, dampening=0.3, weight_decay=0.01, bits=2),
    "nesterov, maximize": dict(momentum=0.9, nesterov=True, maximize=True, delta="absmax"),
    "zero": dict(target="zero", eps=0.01, momentum=0.5),
    "zero, number": dict(target="zero", scale=3.0, eps=0.01, weight_decay=0.1),
    "grid+zero": dict(target="grid+zero", sparsity=0.5, momentum=0.9, bits=3),
    "grid+zero, update": dict(target="grid+zero", sparsity=0.3, position="update", momentum=0.9, weight_decay=0.01),
    "channels": dict(per_channel=True, bits=8, scale=20.0, eps=0.001),
    "channels, both": dict(per_channel=True, target="grid+zero", delta="absmax", momentum=0.9, weight_decay=0.1),
    "function": dict(**CALLABLE, momentum=0.9, nesterov=True),
    "function, number": dict(**CALLABLE, scale=2.0, eps=0.1, position="update"),
}
ADAMW_CASES = {
    "plain": dict(target=None),
    "grid": dict(weight_decay=0.1, bits=3),
    "update": dict(betas=(0.5, 0.7), eps=1e-3, position="update", maximize=True, weight_decay=0.0),
    "grid+zero": dict(target="grid+zero", sparsity=0.4, position_eps=0.01),
    "channels": dict(per_channel=True, delta="absmax", scale=9.0),
    "function": dict(**CALLABLE),
}


def run(optimizer: torch.optim.Optimizer, steps: range = range(4), twin: Twin | None = None) -> Twin:
    """Steps with missing gradients, a NaN, an accumulated gradient and a new learning rate, beside the plain loop."""
    twin = twin or Twin(optimizer)
    for t in steps:
        give_gradients(optimizer, seed=10 + t, without=(0, 4) if t % 2 == 0 else ())
        if t == 1:
            optimizer.param_groups[0]["params"][-1].grad.view(-1)[0] = math.nan
        if t == 3:
            first = optimizer.param_groups[0]["params"][0]
            first.grad += first.grad.square()
            optimizer.param_groups[0]["lr"] = 0.01
        twin.step()
        optimizer.step()
    twin.check()
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SGD_CASES)
def test_steps_of_sgd_are_the_plain_loops(case, dtype):
    run(PSGD(parameters(dtype=dtype), lr=0.05, **SGD_CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ADAMW_CASES)
def test_steps_of_adamw_are_the_plain_loops(case, dtype):
    optimizer = PSGDAdamW(parameters(dtype=dtype), lr=0.05, **ADAMW_CASES[case])
    run(optimizer)
    w = optimizer.param_groups[0]["params"]
    assert [float(optimizer.state[w[i]]["step"]) for i in (0, 1)] == [2, 4]


def test_groups_of_other_options_and_dtypes_are_stepped_by_their_own():
    half = parameters(dtype=torch.bfloat16)
    groups = [
        {"params": parameters(seed=1), "bits": 3},
        {"params": parameters(seed=2), "target": None, "momentum": 0.0},
        {"params": parameters(seed=3) + half, "target": "grid+zero", "sparsity": 0.5, "lr": torch.tensor(0.125)},
    ]
    optimizer = PSGD(groups, lr=0.05, momentum=0.9)
    twin = run(optimizer)
    optimizer.add_param_group({"params": parameters(seed=4, dtype=torch.float64), "nesterov": True, "target": "zero"})
    run(optimizer, twin=twin)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [PSGD, PSGDAdamW])
def test_a_learning_rate_may_be_a_tensor(make, kind):
    optimizer = make(parameters(), lr=torch.tensor(0.1, dtype=kind))
    twin = run(optimizer, range(2))
    optimizer.param_groups[0]["lr"].fill_(0.01)
    run(optimizer, range(4, 6), twin)


def test_options_that_change_between_steps_count():
    optimizer = PSGD(parameters(), lr=0.05)
    twin = Twin(optimizer)
    changes = [{}, {"bits": 2}, {"target": "zero"}, {"momentum": 0.9}, {"target": None}, {"target": "grid"}]
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        give_gradients(optimizer, seed=t)
        twin.step()
        optimizer.step()
    twin.check()
    for lr in (-1.0, torch.tensor(math.nan)):
        with pytest.raises(ValueError, match="lr must be a number from 0"):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    optimizer.param_groups[0].update(bits=9, lr=0.1)
    before = [w.detach().clone() for w in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
        optimizer.step()
    assert all(torch.equal(w, b) for w, b in zip(optimizer.param_groups[0]["params"], before, strict=True))


def test_a_range_of_another_shape_starts_anew():
    optimizer = PSGD([parameters()[0]], lr=0.05)
    w = optimizer.param_groups[0]["params"][0]
    for per_channel, rows in ((False, 1), (True, 5), (False, 1)):
        optimizer.param_groups[0]["per_channel"] = per_channel
        give_gradients(optimizer, seed=1)
        expected = w.detach().reshape(rows, -1)
        expected = torch.stack([expected.amin(1).clamp(max=0), expected.amax(1).clamp(min=0)], 1)
        optimizer.step()
        assert_same(optimizer.state[w]["range"], expected)


def test_weights_that_are_all_zero_have_no_scale():
    w, v = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = PSGD([{"params": [w], "target": "grid+zero"}, {"params": [v], "per_channel": True}], lr=1.0)
    v.data[1] = torch.tensor([1.0, -1.0, 0.5, 0.2])
    run(optimizer, range(3))


# ---- the plain loop is the formula's


@pytest.mark.parametrize("position", ["grad", "update"])
def test_the_plain_step_of_sgd_is_the_formula_in_float64(position):
    w, g, buffer = (t.reshape(-1) for t in tensors([(40, 10)] * 3, seed=3))
    lr, mu, damp, decay = 0.1, 0.9, 0.3, 0.01
    p = Position(bits=4, position=position)
    state = {"momentum_buffer": buffer.clone()}
    s = loop.scale_of(w, p, state)
    new = loop.sgd_step(w, g, state, s, lr=lr, momentum=mu, dampening=damp, weight_decay=decay, nesterov=False,
                        position=position)  # fmt: skip
    x, gd, b, sd = (t.double() for t in (w, g, buffer, s))
    first = b * mu + ((gd * sd if position == "grad" else gd) + x * decay) * (1 - damp)
    expected = x - (first * sd if position == "update" else first) * lr
    # Every rounding, of operations and of hyperparameters, is at most EPS of what it rounds; a term of the sum passes at
    # most 8 of them. s itself is taken as float32 has it.
    terms = b.abs() * mu + ((gd * sd).abs() if position == "grad" else gd.abs()) + x.abs() * decay
    bound = 8 * EPS * (x.abs() + terms * (sd if position == "update" else 1) * lr)
    assert bool(((new.double() - expected).abs() <= bound).all())
    assert float(bound.max()) < 1e-5  # a missing term would show


@pytest.mark.parametrize("position", ["grad", "update"])
def test_the_plain_step_of_adamw_is_the_formula_in_float64(position):
    w, g, first, second = (t.reshape(-1) for t in tensors([(40, 10)] * 4, seed=5))
    second = second.square()
    lr, (b1, b2), eps, decay, t = 0.1, (0.9, 0.99), 1e-6, 0.01, 3
    powers = torch.tensor([b1, b2], dtype=torch.float64) ** t
    state = {"exp_avg": first.clone(), "exp_avg_sq": second.clone(), "powers": powers.clone()}
    s = loop.scale_of(w, Position(bits=3, position=position), state)
    new = loop.adamw_step(w, g, state, s, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, position=position)
    x, gd, sd = w.double(), g.double(), s.double()
    if position == "grad":
        gd = gd * sd
    m, v = first.double() * b1 + gd * (1 - b1), second.double() * b2 + gd**2 * (1 - b2)
    c1, c2 = 1 - powers * torch.tensor([b1, b2], dtype=torch.float64)
    update = (m / c1) / ((v / c2).sqrt() + eps)
    expected = x * (1 - lr * decay) - update * (sd if position == "update" else 1) * lr
    # As above, 16 roundings on the way; a numerator that cancels keeps the error of its terms.
    size = ((first.abs() * b1 + gd.abs() * (1 - b1)) / c1) / ((v / c2).sqrt() + eps)
    bound = 16 * EPS * (x.abs() + size * (sd if position == "update" else 1) * lr)
    assert bool(((new.double() - expected).abs() <= bound).all())


# ---- torch's own optimizers


@pytest.mark.parametrize(
    "options", [dict(), dict(momentum=0.5), dict(momentum=0.5, nesterov=True), dict(maximize=True)]
)
def test_plain_sgd_is_torchs_where_its_fused_products_are_exact(options):
    """torch multiplies by lr and adds in one rounding: with powers of two the product needs none."""
    mine, theirs = parameters(), parameters()
    pair = PSGD(mine, lr=0.125, target=None, **options), torch.optim.SGD(theirs, lr=0.125, foreach=False, **options)
    for t in range(5):
        for optimizer in pair:
            give_gradients(optimizer, seed=t)
            optimizer.step()
    for w, v in zip(mine, theirs, strict=True):
        assert_same(w, v)


def test_plain_steps_are_torchs_within_the_rounding():
    for options in (dict(momentum=0.9, dampening=0.1, weight_decay=0.01), dict(momentum=0.9, nesterov=True)):
        w, v = parameters([(50, 40)])[0], parameters([(50, 40)])[0]
        mine, theirs = PSGD([w], lr=0.1, target=None, **options), torch.optim.SGD([v], lr=0.1, **options)
        _compare(mine, theirs, w, v, largest_update=0.1 * 10 * 5)
    w, v = parameters([(50, 40)])[0], parameters([(50, 40)])[0]
    _compare(PSGDAdamW([w], lr=0.1, target=None), torch.optim.AdamW([v], lr=0.1), w, v, largest_update=0.1 * 3.2)


def _compare(mine, theirs, w, v, largest_update: float) -> None:
    """5 steps: each has at most 12 roundings of terms no larger than the weights or the largest update.

    Of SGD that is lr · |g| (below 5 here) · the sum of the powers of the momentum; of AdamW in its first steps, where
    |m̂| / √v̂ is at most √(1/(1-β₁)) by Cauchy and Schwarz.
    """
    for t in range(5):
        for optimizer in (mine, theirs):
            give_gradients(optimizer, seed=20 + t)
            optimizer.step()
    difference = float((w - v).detach().abs().max())
    assert difference <= 5 * 12 * EPS * (float(w.detach().abs().max()) + largest_update)


# ---- the scale of Adam


def test_adam_does_not_feel_the_magnitude_of_the_scale_of_the_gradient():
    """m̂ / (√v̂ + eps) of g·λ is that of g with eps / λ: powers of two change no rounding, and eps = 0 none at all."""
    results = []
    for scale in (2.0, 64.0):
        w = parameters([(20, 10)])[0]
        optimizer = PSGDAdamW([w], lr=0.01, scale=scale, eps=0.0, position_eps=0.01)
        for t in range(4):
            give_gradients(optimizer, seed=t)
            optimizer.step()
        results.append(w.detach())
    assert_same(*results)


def test_adams_update_is_proportional_to_the_scale_of_the_update():
    w, v = parameters([(20, 10)])[0], parameters([(20, 10)])[0]
    for x, scale in ((w, 2.0), (v, 8.0)):
        optimizer = PSGDAdamW([x], lr=2.0**-10, scale=scale, weight_decay=0.0, position="update")
        give_gradients(optimizer, seed=1)
        optimizer.step()
    start = tensors([(20, 10)])[0].double()
    # The updates are exactly proportional (powers of two); the sum rounds to half an ulp of a weight.
    error = (v.double() - start) - 4 * (w.double() - start)
    assert bool((error.abs() <= 5 * EPS * 1.01 * start.abs().clamp(min=2**-4)).all())
    assert float((w.detach() - start).abs().max()) > 1e-4


# ---- what a step leaves alone


def test_a_nan_gradient_changes_what_plain_sgd_would_change():
    at = int(tensors([(6, 6)])[0].abs().flatten().argsort()[20])  # neither an extreme nor among the small ones
    for target in ("grid", "zero", "grid+zero"):
        w, v = parameters([(6, 6)])[0], parameters([(6, 6)])[0]
        for x, poisoned in ((w, True), (v, False)):
            optimizer = PSGD([x], lr=0.1, momentum=0.9, target=target, sparsity=0.3)
            for t in range(3):
                give_gradients(optimizer, seed=t)
                x.grad.view(-1)[at] = math.nan if poisoned and t == 0 else 0.0
                optimizer.step()
        poisoned = (torch.arange(36) == at).view(6, 6)
        assert torch.equal(w.isnan(), poisoned)
        assert_same(w[~poisoned], v[~poisoned])


def test_a_parameter_without_gradient_has_no_step():
    ws = parameters()
    optimizer = PSGD(ws, lr=0.1, momentum=0.9)
    give_gradients(optimizer, seed=0, without=(0,))
    before = ws[0].detach().clone()
    optimizer.step()
    assert torch.equal(ws[0], before) and ws[0] not in optimizer.state
    assert all(w in optimizer.state for w in ws[1:])


def test_gradients_are_read_only():
    for make in (PSGD, PSGDAdamW):
        for options in (dict(), dict(target=None, weight_decay=0.0), dict(maximize=True)):
            optimizer = make(parameters(), lr=0.1, **options)
            give_gradients(optimizer, seed=0)
            before = [w.grad.clone() for w in optimizer.param_groups[0]["params"]]
            for _ in range(2):
                optimizer.step()
            for w, g in zip(optimizer.param_groups[0]["params"], before, strict=True):
                assert torch.equal(w.grad, g)


def test_a_closure_runs_with_gradients_and_before_the_range_is_taken():
    w = parameters([(4, 4)])[0]
    optimizer = PSGD([w], lr=0.1, delta="absmax")

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        with torch.no_grad():
            w.mul_(2)
        loss = w.square().sum()
        loss.backward()
        return loss

    expected = 2 * float(w.detach().abs().max())
    loss = optimizer.step(closure)
    assert loss.requires_grad and float(fqt.position.absmax(optimizer.state[w]["range"])) == expected


def test_a_layout_other_than_contiguous_is_kept():
    w = torch.nn.Parameter(tensors([(4, 3, 5, 5)])[0].to(memory_format=torch.channels_last))
    v = torch.nn.Parameter(torch.randn(8, 12)[::2, ::3])
    run(PSGD([w, v], lr=0.1, momentum=0.9))
    assert w.is_contiguous(memory_format=torch.channels_last)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(lr=-1.0), ValueError, "lr must be a number from 0, got -1.0"),
        (dict(lr=math.nan), ValueError, "lr must be .* got nan"),
        (dict(lr="fast"), TypeError, "lr must be a number, got 'fast'"),
        (dict(lr=torch.tensor([0.1])), ValueError, r"lr must be .* 0-d .* shape \(1,\)"),
        (dict(lr=torch.tensor(-0.5)), ValueError, "lr must be a number from 0, got -0.5"),
        (dict(lr=torch.tensor(1)), ValueError, "lr must be .* got torch.int64"),
        (dict(lr=0.1, momentum=-0.1), ValueError, "momentum must be .* -0.1"),
        (dict(lr=0.1, momentum=True), TypeError, "momentum must be a number, got True"),
        (dict(lr=0.1, weight_decay=math.inf), ValueError, "weight_decay must be .* inf"),
        (dict(lr=0.1, dampening="x"), TypeError, "dampening"),
        (dict(lr=0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (dict(lr=0.1, maximize=1), TypeError, "maximize must be a bool, got 1"),
        (dict(lr=0.1, target="gird"), ValueError, "target must be one of grid"),
        (dict(lr=0.1, bits=1), ValueError, "bits must be"),
        (dict(lr=0.1, scale=0), ValueError, "scale must be"),
        (dict(lr=0.1, fused="yes"), TypeError, "fused must be a bool"),
    ],
)
def test_an_option_out_of_range_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        PSGD(parameters(), **options)


def test_adamws_options_are_checked():
    for options, text in ((dict(betas=(0.9, 1.0)), r"betas\[1\] must be .* 1.0"), (dict(eps=-1.0), "eps must be"),
                          (dict(position_eps=-1.0), "eps must be"), (dict(betas=0.9), "betas must be two")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            PSGDAdamW(parameters(), **options)


def test_a_group_that_is_refused_is_not_added():
    optimizer = PSGD(parameters(), lr=0.1)
    integers, complexes = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.complex64)
    for group, text in (({"params": parameters(), "bits": 0}, "bits"), ({"params": [integers]}, "int32"),
                        ({"params": [complexes]}, "complex64")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    give_gradients(optimizer, seed=0)
    optimizer.step()


def test_a_gradient_that_cannot_be_used_is_refused_by_name_before_anything_changes():
    first, table = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PSGD([("first", first), ("table.weight", table.weight)], lr=0.1)
    first.grad = torch.ones(3, 3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"parameter 'table.weight' of shape \(5, 2\): its gradient is torch.sparse_coo"
    ):
        optimizer.step()
    assert torch.equal(first, torch.ones(3, 3)) and not optimizer.state
    optimizer = PSGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, target=lambda w: torch.zeros(4))
    give_gradients(optimizer, seed=0)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*: the target function must return .* \(4,\)"):
        optimizer.step()


def test_a_kernel_that_is_demanded_and_is_not_there_is_an_error():
    optimizer = PSGD(parameters([(3, 3)]), lr=0.1, fused=True)
    give_gradients(optimizer, seed=0)
    with fqt.backend("reference"), pytest.raises(RuntimeError, match=r"no kernel steps parameter 0 .*: asked for"):
        optimizer.step()


def test_vectors_with_the_default_target_are_warned_of_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with pytest.warns(UserWarning, match=r"'0.bias' of shape \(2,\) and others will be drawn .*param_groups") as said:
        optimizer = PSGD(model.named_parameters(), lr=0.1)
        optimizer.add_param_group({"params": [("own", torch.nn.Parameter(torch.ones(3)))]})
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PSGD(fqt.optim.param_groups(model), lr=0.1)
        PSGD([{"params": model.parameters(), "target": "grid"}], lr=0.1)
        PSGD(model.parameters(), lr=0.1, target=None)
        PSGD(model.parameters(), lr=0.1, **CALLABLE)
