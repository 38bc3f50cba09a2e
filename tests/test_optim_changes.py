"""Laws of the kernel's steps where something changes between them: options, shapes, dtypes, parameters; and of captures."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

import fqt
from fqt.optim import PSGD, PositionScaled, PSGDAdamW, fused, loop
from fqt_kernels import psgd, psgd_table


def trained(backend: str, device: str, kind=PSGD, changes=None, shape=(3, 64), steps=6, **options) -> tuple:
    """The weights and the state after some steps, before each of which options or the parameter change; on the CPU."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape).to(device))
    optimizer = kind([{"params": [w], "target": "grid+zero"}], lr=0.1, sparsity=0.5, **options)
    with fqt.backend(backend):
        for i in range(steps):
            optimizer.param_groups[0].update((changes or {}).get(i, {}))
            w.grad = torch.randn(shape).to(device)
            optimizer.step()
    return w.detach().cpu(), optimizer.state[w]["threshold"].cpu()


@pytest.mark.parametrize(
    ("kind", "shape", "changes"),
    [
        (PSGD, (3, 64), {2: {"target": "grid"}, 3: {"target": "grid+zero"}}),
        (PSGD, (3, 64), {2: {"target": "zero"}, 4: {"target": "grid+zero"}}),
        (PSGD, (3, 64), {2: {"target": None}, 3: {"target": "grid+zero", "bits": 3}}),
        (PSGD, (3, 64), {2: {"delta": "absmax"}, 4: {"delta": "ema", "sparsity": 0.9}}),
        (PSGD, (1, 64), {2: {"per_channel": True}}),
        (PSGDAdamW, (3, 16), {2: {"eps": 0.5}}),
        (PSGDAdamW, (3, 16), {2: {"betas": (0.5, 0.5)}}),
    ],
)
def test_options_that_change_take_effect_at_once(kind, shape, changes, device):
    computed = ("triton", device), ("reference", "cpu")
    ours, theirs = (trained(*by, kind, changes, shape) for by in computed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_weight_that_was_cut_short_is_written_no_further_than_it_goes(device):
    whole = torch.randn(8, 16).to(device)
    w, before = nn.Parameter(whole), whole.clone()
    optimizer = PSGD([{"params": [w], "target": None}], lr=1.0)
    with fqt.backend("triton"):
        for rows in (8, 4):
            w.data = whole[:rows]  # the same address and strides
            w.grad = torch.ones(rows, 16, device=device)
            optimizer.step()
    steps = torch.tensor([2.0] * 4 + [1.0] * 4)[:, None]
    # Two roundings of numbers up to 4 and of their differences.
    torch.testing.assert_close((before - whole).cpu(), steps.expand(8, 16), rtol=0, atol=8 * 2.0**-22)


def test_a_model_that_is_cast_goes_on(device):
    w = nn.Parameter(torch.randn(4, 16).to(device))
    optimizer = PSGD([{"params": [w], "target": "grid"}], lr=0.1, momentum=0.9)
    with fqt.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
            w.data = w.data.to(dtype)
            w.grad = torch.ones_like(w)
            optimizer.step()
    assert bool(w.isfinite().all()) and w.dtype == torch.bfloat16


def test_a_parameter_that_was_removed_is_let_go(device):
    ws = [nn.Parameter(torch.randn(4, 16).to(device)) for _ in range(2)]
    optimizer = PSGD([{"params": ws, "target": "grid"}], lr=0.1, momentum=0.9)
    with fqt.backend("triton"):
        for w in ws:
            w.grad = torch.ones_like(w)
        optimizer.step()
        gone = weakref.ref(ws[0])
        optimizer.state.pop(ws[0])
        optimizer.param_groups[0]["params"] = ws[1:]
        del w, ws[0]
        optimizer.step()
    gc.collect()
    assert gone() is None


@pytest.mark.interpreted
@pytest.mark.parametrize(("kind", "options"), [(PSGD, {"momentum": 0.9}), (PSGDAdamW, {})])
def test_a_first_step_is_refused_in_a_capture(monkeypatch, kind, options):
    """Each replay of the graph would make the state anew."""
    w = nn.Parameter(torch.randn(4, 16))
    w.grad = torch.ones_like(w)
    optimizer = kind([{"params": [w], "target": None}], lr=0.1, **options)
    with fqt.backend("triton"):
        for module in (fused, psgd, psgd_table):
            monkeypatch.setattr(module, "is_capturing", lambda _: True)
        with pytest.raises(ValueError, match="captured"):
            optimizer.step()
        monkeypatch.undo()
        assert not optimizer.state[w]
        optimizer.step()


# ---- weights that are held in int8


def held(device: str = "cpu") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).to(device)
    fqt.quantize_(model, "int8")
    fqt.hold_int8_(model)
    model[0].weight.grad = torch.ones(16, 16, device=device)
    return model


def test_the_kernel_that_was_asked_for_is_demanded_of_held_weights_too(device):
    optimizer = PSGD(held(device).parameters(), lr=0.1, fused=True)
    with fqt.backend("reference"), pytest.raises(RuntimeError, match="fused=True"):
        optimizer.step()
    with fqt.backend("triton"):
        optimizer.step()


def test_betas_may_be_a_list_for_held_weights(device):
    found = []
    for betas in ((0.5, 0.75), [0.5, 0.75]):
        torch.manual_seed(0)
        model = held(device)
        with fqt.backend("triton"):
            PSGDAdamW(model.parameters(), lr=0.1, betas=betas).step()
        found.append(model[0].weight.dequantize())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_points_of_another_shape_are_refused_before_any_step(backend, device):
    model, other = held(device), nn.Parameter(torch.randn(4, 4).to(device))
    other.grad = torch.ones_like(other)
    groups = [
        {"params": [other], "target": "grid"},
        {"params": list(model.parameters()), "target": lambda w: torch.zeros(1, 16)},
    ]
    before = other.detach().clone()
    with fqt.backend(backend), pytest.raises(ValueError, match=r"\(1, 16\)"):
        PSGD(groups, lr=0.1).step()
    assert torch.equal(other, before)


def test_points_of_another_shape_are_refused_around_any_optimizer():
    w = nn.Parameter(torch.randn(4, 16))
    w.grad = torch.ones_like(w)
    optimizer = PositionScaled(torch.optim.SGD([w], lr=0.1), target=lambda w: torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"\(1, 16\)"):
        optimizer.step()


def test_a_held_model_is_not_cast_to_what_it_cannot_be():
    model = held()
    codes = model[0].weight.q.clone()
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match="release_int8_"):
            model.to(dtype)
    assert torch.equal(model.to(torch.bfloat16)[0].weight.q, codes)


def test_a_held_model_can_be_shared_between_processes():
    model = held()
    values = model[0].weight.dequantize()
    model.share_memory()
    assert model[0].weight.q.is_shared() and torch.equal(model[0].weight.dequantize(), values)


def test_a_step_that_fails_leaves_no_scale_of_a_scaler_behind():
    w = nn.Parameter(torch.randn(4, 16))
    w.grad = torch.ones_like(w)
    optimizer = PSGD([{"params": [w], "target": lambda w: torch.zeros(3)}], lr=0.125)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with pytest.raises(ValueError):
        optimizer.step()
    before = w.detach().clone()
    optimizer.param_groups[0]["target"] = None
    optimizer.step()
    assert torch.equal(w, before - 0.125)


def test_torch_can_swap_a_parameter_that_was_stepped(device):
    model = nn.Sequential(nn.Linear(16, 16)).to(device)
    fqt.quantize_(model, "int8")
    optimizer = PSGD([{"params": list(model.parameters()), "target": "grid"}], lr=0.125, momentum=0.9)
    with fqt.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                model.to(dtype)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
            optimizer.zero_grad()
            model(torch.randn(8, 16).to(device, dtype)).sum().backward()
            optimizer.step()
    assert model[0].weight.dtype == torch.bfloat16 and bool(model[0].weight.isfinite().all())


def test_a_loops_moment_has_the_dtype_that_its_weight_has_now():
    """And stays in its memory while that does not change: replays of a CUDA graph advance it."""
    state, seen = {}, []
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        w = torch.randn(4, 16, dtype=dtype)
        loop.sgd_step(w, w.float(), state, None, lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False,
                      position="grad")  # fmt: skip
        seen.append(state["momentum_buffer"])
    assert [m.dtype for m in seen] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, False, True]
