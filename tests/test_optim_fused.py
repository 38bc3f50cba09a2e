"""Laws of the optimizers' steps by the kernel: those of the plain loop, and of what it writes for `fqt.nn.Linear`."""

from dataclasses import replace

import pytest
import torch
from laws import assert_same
from optim_twin import Twin, give_gradients, parameters, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import fqt
from fqt.dispatch import Problem, select
from fqt.optim import PSGD, PSGDAdamW
from fqt.recipe import Quantizer, Recipe
from fqt_kernels.psgd import MultiTensor

pytestmark = pytest.mark.filterwarnings("ignore:fqt.optim. parameter .* will be drawn")


def rounded_matrices(w):
    return w.round() if w.dim() == 2 else None


@pytest.fixture(autouse=True)
def _in_the_kernel():
    with fqt.backend("triton"):
        yield


def run(optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    twin = Twin(optimizer)
    for t in range(steps):
        give_gradients(optimizer, seed=10 + t, without=(0,) if t == 0 else ())
        twin.step()
        optimizer.step()
    twin.check()
    assert not optimizer.fallbacks


def to(device: str, ws: list) -> list:
    return [torch.nn.Parameter(w.detach().to(device)) for w in ws]


def test_steps_of_sgd_are_the_plain_loops(device):
    groups = [
        {"params": to(device, parameters([(5, 7), (), (0, 3)])), "weight_decay": 0.01, "dampening": 0.2},
        {"params": to(device, parameters([(9,)], 1, torch.bfloat16)), "target": "grid+zero", "nesterov": True},
        {
            "params": to(device, parameters([(2, 3, 2)], 2)),
            "per_channel": True,
            "delta": "absmax",
            "position": "update",
        },
        {"params": to(device, parameters([(4, 4), (3,)], 3)), "target": rounded_matrices},
        {"params": to(device, parameters([(5,)], 5)), "target": torch.clone},  # all lie on their points: s = 1
        {"params": to(device, parameters([(7,)], 4)), "target": None, "momentum": 0.0, "maximize": True},
    ]
    run(PSGD(groups, lr=0.05, momentum=0.9))


def test_steps_of_adamw_are_the_plain_loops(device):
    groups = [
        {"params": to(device, parameters([(5, 7)])), "maximize": True},
        {"params": to(device, parameters([(3, 3)], 1, torch.float16)), "target": "zero", "position": "update"},
    ]
    run(PSGDAdamW(groups, lr=0.05, betas=(0.8, 0.9), position_eps=0.01))


def test_gradients_and_state_of_other_layouts(device):
    """A gradient of other strides is copied; a view with gaps, and moments of other strides, are stepped by torch."""
    last = torch.nn.Parameter(tensors([(2, 3, 2, 2)])[0].to(device, memory_format=torch.channels_last))
    view = torch.nn.Parameter(torch.randn(6, 8, device=device)[::2, ::2])
    optimizer = PSGD([last, view], lr=0.1, momentum=0.9)
    twin = Twin(optimizer)
    for t in range(3):
        give_gradients(optimizer, seed=t)
        last.grad = last.grad.contiguous(memory_format=torch.contiguous_format if t else torch.channels_last)
        if t == 2:
            optimizer.state[last]["momentum_buffer"] = optimizer.state[last]["momentum_buffer"].contiguous()
        twin.step()
        optimizer.step()
    twin.check()
    assert last.is_contiguous(memory_format=torch.channels_last)
    optimizer = PSGD([("view", view)], lr=0.1, fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True, but no kernel steps parameter 'view' .* dense"):
        optimizer.step()


def test_what_changes_between_steps_counts(device):
    w = to(device, parameters([(4, 6)]))[0]
    optimizer = PSGD([w], lr=0.1)
    twin = Twin(optimizer)
    changes = [{}, {"bits": 2}, {"momentum": 0.9}, {"per_channel": True}, {"target": "grid+zero"}, {"lr": 0.01}]
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        if "per_channel" in change:
            del twin.copies[w][1]["range"]  # of another shape: it starts anew
        give_gradients(optimizer, seed=t)
        twin.step()
        optimizer.step()
        twin.check()
    w.data = w.data.t().contiguous().t()  # other strides than the momentum's
    optimizer.step()
    twin.step()
    twin.check()
    w.data = w.data[:2].contiguous()
    w.grad = torch.ones_like(w)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()


def test_float64_is_stepped_by_torch(device):
    w = torch.nn.Parameter(tensors([(3, 4)], dtype=torch.float64)[0].to(device))
    optimizer = PSGD([w], lr=0.1, target="zero")
    if device == "cuda":
        with pytest.warns(UserWarning, match="float64 is computed by the reference"):
            give_gradients(optimizer, seed=0)
            optimizer.step()
        assert optimizer.fallbacks
    else:
        run(optimizer, 2)
    with pytest.raises(RuntimeError, match="float64 is computed by the reference"):
        optimizer = PSGD([w], lr=0.1, fused=True)
        optimizer.step()


def test_versions_advance_with_what_the_kernel_writes(device):
    w = to(device, parameters([(3, 4)]))[0]
    optimizer = PSGD([w], lr=0.1)
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    before = w._version
    optimizer.step()
    assert w._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_launch_that_fails_leaves_no_state_without_a_value(device, monkeypatch):
    for make in (PSGD, PSGDAdamW):
        w = to(device, parameters([(4, 4)]))[0]
        optimizer = make([w], lr=0.1, target="grid+zero", **({"momentum": 0.9} if make is PSGD else {}))
        twin = Twin(optimizer)
        give_gradients(optimizer, seed=0)
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(MultiTensor, "step", lambda *_, **__: 1 // 0)
            optimizer.step()
        for t in range(2):
            give_gradients(optimizer, seed=t)
            twin.step()
            optimizer.step()
        twin.check()


def test_dispatch_chooses_the_kernel_where_triton_compiles():
    problem = Problem("psgd", 1, 1, device="cuda", triton="3.7.1")
    for arch in ("sm80", "sm90", "sm103", "gfx942", "sm75"):
        choice = select(replace(problem, arch=arch))
        assert (choice.backend, choice.fallback) == (("reference", True) if arch == "sm75" else ("triton", False)), arch
    assert "sm_75 has no kernel: it needs sm_80 or newer" in select(replace(problem, arch="sm75")).reason
    assert select(replace(problem, arch="sm90", triton=None)).reason == "Triton is not installed"
    assert select(replace(problem, arch="sm90", dtype="float64")).backend == "reference"
    assert select(Problem("psgd", 1, 1)).backend == "reference"


class Reads(TorchDispatchMode):
    """The operators that read a tensor back to the host."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [PSGD, PSGDAdamW])
def test_a_step_reads_nothing_back_to_the_host(device, make, monkeypatch):
    """Nor does one with a GradScaler, once all state is there."""
    monkeypatch.setattr(MultiTensor, "_run", lambda *_: None)  # the interpreter reads everything
    for target in ("grid", "grid+zero", None, rounded_matrices):
        w = to(device, parameters([(4, 4)]))[0]
        optimizer = make([w], lr=0.1, target=target)
        for t in range(3):
            give_gradients(optimizer, seed=t)
            if t == 2:
                optimizer.found_inf, optimizer.grad_scale = (torch.tensor(v, device=device) for v in (0.0, 2.0))
            with Reads() as reads:
                optimizer.step()
            assert not reads.found, (target, t)


def test_a_skipped_step_advances_nothing(device):
    """Of a new optimizer it makes no state; later it leaves weights, moments, ranges and powers as they are."""
    for make in (PSGD, PSGDAdamW):
        w = to(device, parameters([(4, 4)]))[0]
        optimizer = make([w], lr=0.1, target="grid+zero", **({"momentum": 0.9} if make is PSGD else {}))
        start = w.detach().clone()
        give_gradients(optimizer, seed=0)
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(v, device=device) for v in (4.0, 1.0))
        optimizer.step()
        assert torch.equal(w, start) and not optimizer.state
        twin = Twin(optimizer)
        for t, found in enumerate((0.0, 1.0, 2.0, 0.0)):
            give_gradients(optimizer, seed=t)
            optimizer.found_inf.fill_(found)
            if not found:
                twin.step(optimizer.grad_scale)
            optimizer.step()
            twin.check()
        assert make is PSGD or float(optimizer.state[w]["step"]) == 2


# ---- codes for fqt.nn.Linear


class Counted:
    """How often weights were quantized."""

    def __init__(self, monkeypatch):
        self.count = 0
        quantize = fqt.ops.quantize_weight

        def counted(*args):
            self.count += 1
            return quantize(*args)

        monkeypatch.setattr(fqt.ops, "quantize_weight", counted)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def layer(device: str, seed: int = 0, dtype: torch.dtype = torch.float32, recipe: str = "int8") -> fqt.nn.Linear:
    made = fqt.nn.Linear(6, 5, device=device, dtype=dtype, recipe=recipe)
    with torch.no_grad():
        made.weight.copy_(tensors([(5, 6)], seed)[0])
        made.bias.zero_()
    return made


def batch(device: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return tensors([(4, 6)], seed, dtype)[0].to(device).requires_grad_()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps, device: str, dtype=torch.float32) -> list:
    outputs = []
    for t in steps:
        optimizer.zero_grad()
        with fqt.backend("reference"):  # faster than interpreted passes
            y = model(batch(device, t, dtype))
            y.float().square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def optimizer_of(model: torch.nn.Module, **options) -> PSGD:
    return PSGD(fqt.optim.param_groups(model), lr=2.0**-7, momentum=0.5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_writes_the_codes_that_quantizing_would_give(device, counted, dtype):
    results = {}
    for fused in (True, False):
        fqt.manual_seed(3)
        model = layer(device, dtype=dtype)
        model._fqt_key_name = "same"
        fqt.rng.restart(model)
        before = counted.count
        outputs = train(model, optimizer_of(model, fused=fused), range(4), device, dtype)
        results[fused] = [model.weight, *outputs], counted.count - before, model._quantized_weight(True)
    for mine, other in zip(results[True][0], results[False][0], strict=True):
        assert_same(mine, other)
    assert (results[True][1], results[False][1]) == (1, 4)
    for name in ("q", "qt", "scale"):
        assert_same(getattr(results[True][2], name), getattr(results[False][2], name), name)


def test_codes_stay_where_they_are_and_serve_evaluation(device, counted):
    model = layer(device)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1), device)
    addresses = [t.data_ptr() for t in model._fqt_cache.value[:3]]
    train(model, optimizer, range(1, 3), device)
    assert [t.data_ptr() for t in model._fqt_cache.value[:3]] == addresses
    model.eval()
    with torch.no_grad():
        y = model(batch(device, 9))
    assert counted.count == 1
    fqt.invalidate_(model)
    with torch.no_grad():
        assert_same(model(batch(device, 9)), y)
    assert counted.count == 2


def test_a_graph_kept_from_before_a_step_refuses_another_backward_pass(device):
    model = layer(device)
    optimizer = optimizer_of(model)
    loss = model(batch(device, 0)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_share_what_is_written(device, counted):
    first, second, third = layer(device), layer(device), layer(device)
    second.weight = third.weight = first.weight
    third.recipe = "psq5"  # per tensor: of its own codes
    model = torch.nn.ModuleList([first, second, third])
    optimizer = optimizer_of(model)
    for t in range(3):
        optimizer.zero_grad()
        x = batch(device, t)
        with fqt.backend("reference"):
            sum(one(x).square().sum() for one in model).backward()
        optimizer.step()
    assert counted.count == 2 + 3  # the first two once each, the third after every step
    assert first._fqt_cache.value is second._fqt_cache.value
    codes = first._fqt_cache.value.q.clone()
    fqt.invalidate_(model)
    assert_same(first._quantized_weight(True).q, codes)
    second.weight = torch.nn.Parameter(
        first.weight.detach().clone()
    )  # untied: a step of the first is no business of it
    second._quantized_weight(True)
    before = counted.count
    optimizer.step()
    second._quantized_weight(True)
    first._quantized_weight(True)
    assert counted.count == before


def test_what_changes_a_layer_drops_the_codes_that_were_written(device, counted):
    model = layer(device)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2), device)
    model.recipe = "psq5"
    train(model, optimizer, range(2, 4), device)
    assert counted.count == 3
    model.recipe = "int8"
    train(model, optimizer, range(4, 6), device)
    assert counted.count == 4
    with torch.no_grad():
        model.weight.mul_(1.5)
    train(model, optimizer, range(6, 8), device)
    assert counted.count == 5
    model.weight = torch.nn.Parameter(model.weight.detach() * 2)
    train(model, optimizer_of(model), range(8, 10), device)
    assert counted.count == 6
    model.to(torch.bfloat16)
    train(model, optimizer_of(model), range(10, 12), device, torch.bfloat16)
    assert counted.count == 7
    model.load_state_dict(model.state_dict())
    train(model, optimizer_of(model), range(12, 14), device, torch.bfloat16)
    assert counted.count == 8


def test_a_step_of_another_optimizer_still_drops_the_codes(device, counted):
    model = layer(device)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2), device)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
    train(model, optimizer, range(2, 4), device)
    assert counted.count == 2


def test_a_skipped_step_leaves_the_codes_right(device, counted):
    model = layer(device)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2), device)
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(v, device=device) for v in (1.0, 1.0))
    train(model, optimizer, range(2, 3), device)
    codes = model._quantized_weight(True)
    assert counted.count == 1
    fqt.invalidate_(model)
    for mine, other in zip(codes[:3], model._quantized_weight(True)[:3], strict=True):
        assert_same(mine, other)


ROWS = Quantizer(8, "per_row")
NOT_WRITTEN = {
    "per tensor": Recipe(x=Quantizer(), w=Quantizer()),
    "sums are needed": Recipe(x=Quantizer(zero="grid"), w=ROWS),
    "float8": Recipe(x=replace(ROWS, format="e4m3"), w=replace(ROWS, format="e4m3")),
    "one layout": Recipe(x=ROWS, w=ROWS),
}


@pytest.mark.parametrize("why", NOT_WRITTEN)
def test_codes_that_the_kernel_cannot_write_are_quantized_as_ever(device, counted, why):
    model = layer(device, recipe=NOT_WRITTEN[why])
    optimizer = optimizer_of(model)
    for t in range(2):
        optimizer.zero_grad()
        x = batch(device, t)
        with fqt.backend("reference"):
            model(x.detach() if why == "one layout" else x).square().sum().backward()
        optimizer.step()
    assert counted.count == 2
