"""Laws of CUDA graphs: a step can be captured, and its replays are the eager steps; what cannot be captured says so."""

import contextlib
import copy
import dataclasses

import capture as captured
import pytest
import torch
from capture import AsCaptured, Forbidden
from torch import nn

import fqt
from fqt import capture, conv, layer, products
from fqt.int8_weight import Int8Weight
from fqt.optim import PSGD, PositionScaled, PSGDAdamW
from fqt.recipe import Quantizer

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "psgd": lambda groups: PSGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, target="grid+zero"),
    "psgd adamw": lambda groups: PSGDAdamW(groups, lr=0.01, target="grid"),
    "scaled": lambda groups: PositionScaled(torch.optim.SGD(groups, lr=0.1, momentum=0.9), target="grid+zero"),
}
# A capture is pretended on CPU tensors; on a GPU test_capture_replay captures.
TRITON = pytest.param("triton", marks=pytest.mark.interpreted)
# (optimizer, whether weights are held in int8, which only fqt's own step)
STEPPED = [*((name, False) for name in OPTIMIZERS), ("psgd", True), ("psgd adamw", True)]
# A warning is due where biases are drawn to a grid too, which is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:fqt.optim. parameter:UserWarning")


def linear(recipe, held=False):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    fqt.quantize_(model, recipe)
    if held:
        fqt.hold_int8_(model)
    return model, torch.randn(12, 16)


def images(recipe, held=False):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    fqt.quantize_(model, recipe)
    return model, torch.randn(4, 3, 5, 5)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---- what finds the faults


def _mask(x):
    return x[x > 0]


PLANTED = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "mask": _mask,
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: torch.unique(x),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a number": lambda x: torch.as_tensor(0.1, device=x.device),
    "moved": lambda x: torch.tensor([1.0] * 4).to(x.device),
    "moved like": lambda x: torch.ones(4).to(x),
    "operand": lambda x: x + torch.ones(4),
    "made of the host's": lambda x: x + torch.arange(4).float() * 2,
    "list index": lambda x: x[[0, 2]],
    "copied": lambda x: torch.empty_like(x).copy_(torch.ones(4)),
    "repeats": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device)),
    "new": lambda x: x.new_tensor([1.0]),
}
ALLOWED = {
    "numbers of Python": lambda x: (x * 2 + 1).clamp(max=0.5).masked_fill_(x > 0, 3.0),
    "a number of the host's": lambda x: x * torch.tensor(2.0),
    "of the device": lambda x: torch.arange(4, device=x.device) + x.new_zeros(4) + torch.full_like(x, 2),
    "within the host": lambda x: torch.unique(torch.arange(4) % 2).tolist(),
    "indices of the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "times": lambda x: x.repeat_interleave(3),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_its_line_named(name):
    x = torch.randn(4)
    with pytest.raises(Forbidden, match=r"tests/test_capture.py:\d+"), AsCaptured():
        PLANTED[name](x)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_capture_allows_is_no_fault(name):
    x = torch.randn(4)
    with AsCaptured():
        ALLOWED[name](x)


def test_faults_inside_of_an_operator_are_found(monkeypatch):
    """In the forward and the backward pass, on both backends."""
    model, x = linear("int8")
    quantized = products.quantized
    monkeypatch.setattr(products, "quantized", lambda x, *a, **k: (x.amax().item(), quantized(x, *a, **k))[1])
    with pytest.raises(Forbidden, match=r"_local_scalar_dense"), AsCaptured():
        model(x)


# ---- whole steps


CASES = [
    *[("reference", linear, r, o) for r, o in (("int8", "psgd"), ("psq8", "psgd adamw"), ("ptq4", "scaled"),
                                               ("bhq8", "sgd"), ("bhq5-tile", "sgd"), ("auto4", "sgd"), ("fp8", "sgd"))],
    *[("reference", images, r, o) for r, o in (("int8", "scaled"), ("psq8", "sgd"), ("bhq8", "psgd"), ("qat8", "sgd"))],
    *[pytest.param(*TRITON.values, make, r, o, marks=TRITON.marks) for make, r, o in (
        (linear, "psq8", "psgd"), (linear, "bhq8", "psgd adamw"), (linear, "bhq5-tile", "sgd"),
        (images, "int8", "psgd"), (images, "bhq8", "sgd"))],
]  # fmt: skip


@pytest.mark.parametrize(("backend", "make", "recipe", "optimizer"), CASES)
def test_a_step_can_be_captured(backend, make, recipe, optimizer):
    """After one eager step. Without one as well, where the optimizer has no state of fqt's to make."""
    model, x = make(recipe)
    conv._borders.clear(), conv._insides.clear()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with fqt.backend(backend):
        if optimizer != "sgd":
            step(model, stepper, x)
        with AsCaptured():
            step(model, stepper, x)


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_a_step_of_held_weights_can_be_captured(backend):
    for kind in ("psgd", "psgd adamw"):
        model, x = linear("int8", held=True)
        stepper = OPTIMIZERS[kind](model.parameters())
        with fqt.backend(backend):
            step(model, stepper, x)
            with AsCaptured():
                step(model, stepper, x)


@pytest.mark.parametrize("range", ["bound", "delayed"])
def test_a_step_with_ranges_from_the_layer_above_can_be_captured(range):
    """The hand-over from layer to layer takes place, which keeps away from other modes than this test's."""
    quantizer = Quantizer(4, "per_row", "symmetric", "stochastic", range=range)
    recipe = fqt.Recipe.parse("psq4")
    model, x = linear(dataclasses.replace(recipe, dgrad=quantizer))
    taken = fqt.ranges.handover.counts["taken"]
    with AsCaptured():
        step(model, OPTIMIZERS["sgd"](model.parameters()), x)
    assert fqt.ranges.handover.counts["taken"] > taken


# ---- what cannot be captured


@contextlib.contextmanager
def pretended(monkeypatch):
    """All of fqt believes that a CUDA graph is captured."""
    with monkeypatch.context() as patch:
        for module in captured.modules():
            patch.setattr(module, "is_capturing", lambda device=None: True)
        yield


@pytest.mark.parametrize("backend", ["reference", TRITON])
@pytest.mark.parametrize(("optimizer", "held"), [of for of in STEPPED if of[0] != "sgd"])
def test_a_first_step_is_refused_and_changes_nothing(backend, held, optimizer, monkeypatch):
    model, x = linear("int8", held)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with fqt.backend(backend):
        model(x).square().mean().backward()
        before = values(model)
        with (
            pretended(monkeypatch),
            pytest.raises(ValueError, match=r"first step cannot be captured .* take one before"),
        ):
            stepper.step()
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, values(model), strict=True)
        )
        stepper.step()


@pytest.mark.parametrize("kind", [PositionScaled, PSGD])
def test_a_threshold_that_a_new_target_needs_is_not_first_made_in_a_capture(kind, monkeypatch):
    w = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = PSGD([w], lr=0.1) if kind is PSGD else PositionScaled(torch.optim.SGD([w], lr=0.1))
    w.grad = torch.randn(4, 6)
    optimizer.step()
    optimizer.param_groups[0]["target"] = "grid+zero"
    with pretended(monkeypatch), pytest.raises(ValueError, match=r"no threshold yet: a first step cannot be captured"):
        optimizer.step()
    optimizer.step()
    with pretended(monkeypatch):
        optimizer.step()


def values(model):
    return [p.dequantize() if isinstance(p, Int8Weight) else p.detach().clone() for p in model.parameters()]


def test_a_scaler_is_refused_where_the_host_looks_at_it(monkeypatch):
    model, x = linear("int8")
    stepper = OPTIMIZERS["psgd"](model.parameters())
    step(model, stepper, x)
    stepper.found_inf, stepper.grad_scale = torch.zeros(1), torch.ones(1)
    with pretended(monkeypatch), pytest.raises(ValueError, match="GradScaler"):
        stepper.step()


def test_a_launch_that_a_capture_refuses_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda.device, "__init__", lambda *_: None)
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda _: None)
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda *_: False)
    with pytest.raises(RuntimeError, match="run one step with the same shapes before capturing"):
        with products._Launching("cuda"):
            raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match=r"^out of memory$"), products._Launching("cuda"):
        raise RuntimeError("out of memory")


# ---- what replays read and write


@pytest.mark.parametrize("backend", ["reference", TRITON])
@pytest.mark.parametrize(("optimizer", "held"), STEPPED)
def test_a_step_advances_the_tensors_that_are_there(optimizer, held, backend):
    """A replay writes to the addresses of the captured step: state that a step replaced would never advance."""
    model, x = linear("int8", held)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with fqt.backend(backend):
        step(model, stepper, x)
        before = state_of(model, stepper)
        step(model, stepper, x)
    after = state_of(model, stepper)
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def state_of(model, optimizer):
    """All tensors that a training step leaves behind."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    for kind in ("state", "position_state"):
        for number, held in enumerate(getattr(optimizer, kind, {}).values()):
            found |= {f"{kind} {number} {name}": t for name, t in held.items() if isinstance(t, torch.Tensor)}
    return found


def test_constants_that_a_capture_read_stay(monkeypatch):
    made = []

    def make(number, device):
        made.append(number)
        return torch.full((1,), number)

    constants = capture.Constants(make, limit=2)
    first = constants(1, "cpu")
    monkeypatch.setattr(capture, "is_capturing", lambda device=None: True)
    assert constants(1, "cpu") is first
    assert constants(9, "cpu") is not constants(9, "cpu"), "memory of the graph was kept for others"
    monkeypatch.undo()
    for number in (2, 3, 4, 9):
        constants(number, "cpu")
    assert constants(1, "cpu") is first and made == [1, 9, 9, 2, 3, 4, 9]
    constants(2, "cpu")
    assert made[-1] == 2 and len(constants) <= 3, "more than the limit and what was captured is kept"


def write_unseen(w):
    """As a replay does: autograd's version stays."""
    before = w._version
    w.detach().numpy()[...] *= -2
    assert w._version == before


def written_by_a_forward_pass(model, x, monkeypatch):
    with pretended(monkeypatch):
        model(x)


def written_by_a_step(model, x, monkeypatch):
    model(x).sum().backward()
    with pretended(monkeypatch):
        torch.optim.SGD(model.parameters(), lr=0.0).step()


@pytest.mark.parametrize("make", [linear, images])
@pytest.mark.parametrize("write", [written_by_a_forward_pass, written_by_a_step])
def test_an_eager_pass_after_replays_uses_the_weights_as_they_are(make, write, monkeypatch):
    """Between replays too, in evaluation, and whatever codes were kept before the capture."""
    model, x = make("int8")
    model(x), write(model, x, monkeypatch)
    for _ in range(2):
        with torch.no_grad():
            write_unseen(model[0].weight)
            fresh, _ = make("int8")
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(model(x), fresh(x))
            model(x)


def test_codes_of_weights_in_no_graph_are_kept(monkeypatch):
    """Of frozen weights also when they were captured: nothing in a graph writes those."""
    model, x = linear("int8")
    model[0].weight.requires_grad_(False)
    with pretended(monkeypatch):
        model[0](x)
    model(x)
    kept = [m._fqt_cache for m in model if isinstance(m, layer.QuantizedLayer)]
    model(x)
    assert None not in kept and kept == [m._fqt_cache for m in model if isinstance(m, layer.QuantizedLayer)]


def test_a_capture_quantizes_the_weights_itself(monkeypatch):
    """Each pass of it: replays of a forward pass see what was written to the weights since, of two passes both."""
    model, x = linear("int8")
    model(x)
    calls, quantize = [], type(model[0])._quantize
    monkeypatch.setattr(type(model[0]), "_quantize", lambda self, *a: calls.append(self) or quantize(self, *a))
    with pretended(monkeypatch):
        model(x), model(x)
    assert len(calls) == 6


def test_a_copy_of_a_captured_model_is_in_no_graph(monkeypatch):
    model, x = linear("int8")
    written_by_a_forward_pass(model, x, monkeypatch)
    other = copy.deepcopy(model)
    other(x)
    assert model[0]._fqt_cache is None and other[0]._fqt_cache is not None


def test_a_table_of_another_shape_is_captured_from_memory_put_by(monkeypatch):
    """In a capture no pinned memory is allocated, though the step has other items than the eager ones before it."""
    from fqt_kernels import psgd_table

    capturing, empty = [False], torch.empty

    def pin(t):
        assert not capturing[0], "pinned in a capture"
        return t.clone()

    monkeypatch.setattr(psgd_table, "is_capturing", lambda device: capturing[0])
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, device=None, **k: empty(*a, **k))
    mirror, gpu = psgd_table.Mirror(), torch.device("cuda")
    for rows, capturing[0] in ((2, False), (3, False), (40, True), (5, False), (4, True)):
        table = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2)
        assert torch.equal(mirror.update(rows, lambda table=table: table, gpu), table)
    assert len(mirror._kept) == 4 and mirror._kept[0].shape == (40, 2)
