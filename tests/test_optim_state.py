"""Laws of the optimizers' state: checkpoints, copies, GradScaler, schedulers."""

import copy
import io
import pickle

import pytest
import torch
from laws import assert_same
from optim_twin import Twin, give_gradients, parameters

from fqt.optim import PSGD, PositionScaled, PSGDAdamW
from fqt.position import absmax

pytestmark = pytest.mark.filterwarnings("ignore:fqt.optim. parameter .* will be drawn")
SHAPES = [(5, 7), (3,), (), (0, 3)]


def sgd(ws, **options):
    return PSGD(ws, lr=0.05, momentum=0.9, target="grid+zero", sparsity=0.5, **options)


def adamw(ws, **options):
    return PSGDAdamW(ws, lr=0.05, betas=(0.8, 0.9), per_channel=True, **options)


def wrapped(ws, **options):
    return PositionScaled(torch.optim.AdamW(ws, lr=0.05), target="grid+zero", sparsity=0.5, **options)


MAKE = pytest.mark.parametrize("make", [sgd, adamw, wrapped])


def steps(optimizer, numbers) -> None:
    for t in numbers:
        give_gradients(optimizer, seed=t, without=(0,) if t == 0 else ())
        optimizer.step()


def params(optimizer) -> list:
    return [w for group in optimizer.param_groups for w in group["params"]]


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- going on


@MAKE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("passed", [through_a_file, copy.deepcopy])
def test_stopping_and_going_on_gives_the_bits_of_not_stopping(make, dtype, passed):
    whole = make(parameters(SHAPES, dtype=dtype))
    steps(whole, range(5))
    first = make(parameters(SHAPES, dtype=dtype))
    steps(first, range(3))
    second = make([torch.nn.Parameter(w.detach().clone()) for w in params(first)])
    second.load_state_dict(passed(first.state_dict()))
    steps(second, range(3, 5))
    for w, v in zip(params(whole), params(second), strict=True):
        assert_same(v, w)


@MAKE
def test_state_keeps_its_dtypes_through_a_checkpoint(make):
    first, second = make(parameters(SHAPES, dtype=torch.bfloat16)), make(parameters(SHAPES, dtype=torch.bfloat16))
    steps(first, range(2))
    second.load_state_dict(through_a_file(first.state_dict()))
    for w, v in zip(params(first), params(second), strict=True):
        for one, other in ((first.state[w], second.state[v]), (first.position_of(w)[1], second.position_of(v)[1])):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert_same(other[name], value, name)


@MAKE
def test_copies_and_pickles_go_on_with_the_same_bits(make):
    first = make(parameters(SHAPES))
    steps(first, range(2))
    for second in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert params(second)[0] is not params(first)[0] and type(second) is type(first)
        mine = copy.deepcopy(first)
        steps(second, range(2, 4))
        steps(mine, range(2, 4))
        for w, v in zip(params(mine), params(second), strict=True):
            assert_same(v, w)


def test_a_checkpoint_of_torchs_sgd_goes_on():
    ws = parameters(SHAPES)
    theirs = torch.optim.SGD(ws, lr=0.125, momentum=0.5, foreach=False)
    steps(theirs, range(1, 3))
    mine = PSGD([torch.nn.Parameter(w.detach().clone()) for w in ws], lr=9.0, target=None)
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    assert mine.param_groups[0]["target"] is None and mine.param_groups[0]["lr"] == 0.125
    assert not {"foreach", "fused", "differentiable"} & mine.param_groups[0].keys()
    steps(theirs, range(3, 5))
    steps(mine, range(3, 5))
    for w, v in zip(ws, params(mine), strict=True):
        assert_same(v, w)  # powers of two: see test_optim
    drawn = PSGD([torch.nn.Parameter(w.detach().clone()) for w in ws], lr=0.1, target="zero", bits=3)
    drawn.load_state_dict(theirs.state_dict())
    assert drawn.param_groups[0]["target"] == "zero" and drawn.param_groups[0]["bits"] == 3
    steps(drawn, range(5, 7))


def test_a_checkpoint_of_torchs_adamw_goes_on():
    w = parameters([(20, 10)])[0]
    theirs = torch.optim.AdamW([w], lr=0.01)
    steps(theirs, range(1, 4))
    mine = PSGDAdamW([torch.nn.Parameter(w.detach().clone())], target=None)
    mine.load_state_dict(through_a_file(theirs.state_dict()))  # else torch shares the moments
    v = params(mine)[0]
    assert mine.state[v]["powers"].tolist() == pytest.approx([0.9**3, 0.999**3], rel=1e-12)
    steps(theirs, range(4, 6))
    steps(mine, range(4, 6))
    # 2 steps of about 20 roundings of weights up to 4 and updates of at most 3 · lr: see test_optim
    assert float((w - v).detach().abs().max()) < 2 * 20 * 2**-24 * 4
    assert float(mine.state[v]["step"]) == 5
    for other in (torch.optim.Adam([w], weight_decay=0.1), torch.optim.AdamW([w], amsgrad=True)):
        with pytest.raises(ValueError, match="group 0 of the loaded state is of Adam with"):
            mine.load_state_dict(other.state_dict())


@MAKE
def test_a_function_is_in_no_checkpoint_and_stays_the_live_one(make):
    class Points:
        def __call__(self, w):
            return w.round()

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    optimizer = make(parameters(SHAPES))
    points = optimizer.param_groups[0]["target"] = Points()
    optimizer.param_groups[0]["per_channel"] = False
    steps(optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    again = make(parameters(SHAPES))
    with pytest.raises(ValueError, match=r"the target of group 0 was 'function .*Points.* got target 'grid"):
        again.load_state_dict(saved)
    again.param_groups[0].update(target=points, per_channel=False)
    again.load_state_dict(saved)
    assert again.param_groups[0]["target"] is points and optimizer.param_groups[0]["target"] is points
    steps(again, range(2, 3))


def test_hooks_of_the_user_see_and_change_what_is_loaded():
    first, second = sgd(parameters(SHAPES)), sgd(parameters(SHAPES))
    steps(first, range(2))
    seen = []
    second.register_load_state_dict_pre_hook(lambda _, state: seen.append("before") or {**state})
    second.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[params(o)[0]]["range"].dtype if o.state else None)
    )
    second.load_state_dict(first.state_dict())
    assert seen == ["before", torch.float32]
    assert len(second._optimizer_load_state_dict_pre_hooks) == len(second._optimizer_load_state_dict_post_hooks) == 1


# ---- the running range


def test_the_range_is_that_of_the_weights_before_each_step():
    w = parameters([(6, 5)])[0]
    optimizer = PSGD([w], lr=0.5, bits=3)
    running = None
    for t in range(4):
        ends = torch.stack([w.detach().amin().clamp(max=0), w.detach().amax().clamp(min=0)])
        running = ends if running is None else ends * 0.1 + running * 0.9
        give_gradients(optimizer, seed=t)
        optimizer.step()
        assert_same(optimizer.state[w]["range"], running[None])
    # Δ of the last step, which rounding after training uses (`fqt.round_weights_`)
    assert float(absmax(optimizer.state[w]["range"])) == float(running.abs().max())


# ---- GradScaler


class Scaler:
    """torch.amp.GradScaler on the CPU."""

    def __new__(cls, **options):
        return torch.amp.GradScaler("cpu", init_scale=4.0, **options)


@pytest.mark.parametrize("make", [sgd, adamw, wrapped])
@pytest.mark.parametrize("unscaled", [False, True])
def test_gradscaler_skips_what_is_not_finite_and_advances_nothing(make, unscaled):
    optimizer, plain = make(parameters(SHAPES)), make(parameters(SHAPES))
    scaler = Scaler(growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes the scale
    for t, bad in enumerate((True, False, True, False)):
        for one in (optimizer, plain):
            give_gradients(one, seed=t)
        for w in params(optimizer):
            w.grad *= scaler.get_scale()
        if bad:
            params(optimizer)[1].grad[0] = float("inf")
        else:
            plain.step()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t == 0:
            assert not optimizer.state
            assert make is not wrapped or not optimizer.position_state
        for w, v in zip(params(optimizer), params(plain), strict=True):
            assert_same(w, v)
    assert not hasattr(optimizer, "found_inf") and scaler.get_scale() == 1.0


def test_gradients_stay_scaled():
    optimizer = sgd(parameters(SHAPES))
    give_gradients(optimizer, seed=0)
    scaler = Scaler()
    scaler.scale(torch.ones(()))
    before = params(optimizer)[0].grad.clone()
    scaler.step(optimizer)
    assert_same(params(optimizer)[0].grad, before)


def test_a_scaled_float16_gradient_is_divided_in_float32():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = PSGD([w], lr=1.0, target=None)
    w.grad = torch.full((3,), 6e-8 * 2**14, dtype=torch.float16)
    twin = Twin(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**14), torch.tensor(0.0)
    twin.step(optimizer.grad_scale)
    optimizer.step()
    twin.check()


# ---- the rest of an optimizer's life


@MAKE
def test_schedulers_drive_the_learning_rate(make):
    optimizer = make(parameters(SHAPES))
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
            torch.optim.lr_scheduler.StepLR(optimizer, 1),
        ],
        milestones=[2],
    )
    rates = []
    for t in range(4):
        give_gradients(optimizer, seed=t)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx([0.025, 0.0375, 0.05, 0.005])
    again = make(parameters(SHAPES))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["initial_lr"] == 0.05


@MAKE
def test_hooks_and_zero_grad(make):
    optimizer, calls = make(parameters(SHAPES)), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    give_gradients(optimizer, seed=0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert calls == ["pre", "post"] and all(float(w.grad.abs().sum()) == 0 for w in params(optimizer))
    optimizer.zero_grad()
    assert all(w.grad is None for w in params(optimizer))
    optimizer.step()  # nothing to do
    assert repr(optimizer).startswith(type(optimizer).__name__)


def test_a_parameter_that_moves_takes_its_state_along_by_checkpoint():
    """Casting the model and loading: moments follow the parameter's dtype, the range keeps its own."""
    first = sgd(parameters(SHAPES))
    steps(first, range(1, 3))
    second = sgd([torch.nn.Parameter(w.detach().bfloat16()) for w in params(first)])
    second.load_state_dict(first.state_dict())
    w, v = params(first)[0], params(second)[0]
    assert_same(second.state[v]["momentum_buffer"], first.state[w]["momentum_buffer"].bfloat16())
    assert_same(second.state[v]["range"], first.state[w]["range"])
    steps(second, range(3, 4))
