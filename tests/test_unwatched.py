"""Operators whose calls nobody would see are not gone through, and it makes no difference."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fqt.nn
from fqt import ops
from fqt.unwatched import is_unwatched

RECIPES = ("int8", "psq5", "bhq4", "qat8", "fp8", "ptq8")


class Seen(TorchDispatchMode):
    """The names of the operators of fqt that come to the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fqt":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    pass


# ---- what is seen


def test_plain_tensors_and_parameters_are_unwatched(device):
    x = torch.zeros(3, 4, device=device)
    assert is_unwatched(x, None, nn.Parameter(x), x.t(), x[1:], x.clone().requires_grad_() * 2)
    with torch.no_grad(), torch.autocast(torch.device(device).type):
        assert is_unwatched(x)
    with torch.inference_mode():
        assert is_unwatched(x, torch.zeros(2, device=device))


@pytest.mark.parametrize("context", [Seen, Functions, FakeTensorMode, torch.autograd.profiler.profile])
def test_under_a_mode_or_a_profiler_nothing_is_unwatched(context):
    x = torch.zeros(2)
    with context():
        assert not is_unwatched(x)
    assert is_unwatched(x)


def test_tensors_that_are_not_plain_are_watched():
    x = torch.zeros(2, 2)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for t in (fake, x.to("meta"), torch._neg_view(x), x.to_sparse(), x.as_subclass(Wrapped)):
        assert not is_unwatched(t)
        assert not is_unwatched(x, None, t)


def test_transforms_and_traces_are_watched():
    found = []

    def look(t):
        found.append(is_unwatched(torch.zeros(2)))
        return t * 2

    torch.func.vmap(look)(torch.zeros(2, 2))
    torch.func.grad(lambda t: look(t).sum())(torch.zeros(2))
    torch.func.functionalize(look)(torch.zeros(2))
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(look, torch.zeros(2), check_trace=False)
    torch.compile(look, backend="eager", fullgraph=True)(torch.zeros(2))
    assert found and not any(found)


def _layer(recipe, device="cpu", **options):
    fqt.manual_seed(3)
    torch.manual_seed(1)
    layer = fqt.nn.Linear(9, 5, device=device, recipe=recipe, **options)
    return layer, torch.randn(2, 3, 9, device=device, requires_grad=True), torch.randn(2, 3, 5, device=device)


def test_who_watches_sees_the_operators_of_either_half():
    layer, x, dy = _layer("int8")
    with Seen() as seen:
        layer(x).backward(dy)
    assert seen.names == ["quantize", "linear", "linear_backward"]
    y = layer(x)
    with Seen() as seen:
        y.backward(dy)
    assert seen.names == ["linear_backward"]
    with torch.autograd.profiler.profile() as profiled:
        fqt.invalidate_(layer)(x).backward(dy)
    assert {"fqt::quantize", "fqt::linear", "fqt::linear_backward"} <= {
        event.name for event in profiled.function_events
    }


def test_who_does_not_watch_calls_no_operator(monkeypatch):
    layer, x, dy = _layer("int8")
    for name in ("quantize", "linear", "linear_backward"):
        monkeypatch.setattr(ops, name, None)
    layer(x).backward(dy)
    assert x.grad is not None


# ---- and nothing else changes


def _step(layer, x, dy, watched):
    """y and the gradients of x, weight and bias, with the operators in neither half, in one of them, or in both."""
    x.grad = layer.weight.grad = None
    fqt.set_step(7)
    fqt.invalidate_(layer)
    if "forward" in watched:
        with Seen():
            y = layer(x)
    else:
        y = layer(x)
    if "backward" in watched:
        with Seen():
            y.backward(dy)
    else:
        y.backward(dy)
    bias = () if layer.bias is None else (layer.bias.grad,)
    found = [None if t is None else t.clone() for t in (y.detach(), x.grad, layer.weight.grad, *bias)]
    for p in layer.parameters():
        p.grad = None
    return found, layer._fqt_rng.clone()


@pytest.mark.parametrize(
    "trains", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_and_without_the_operators_every_bit_is_the_same(recipe, trains, device):
    layer, x, dy = _layer(recipe, device)
    for t, trained in zip((x, layer.weight, layer.bias), trains, strict=True):
        t.requires_grad_(trained)
    with fqt.backend("triton" if recipe == "int8" else "auto"):
        (want, state), *others = (
            _step(layer, x, dy, watched) for watched in ("forward backward", "", "forward", "backward")
        )
    for found, then in others:
        assert torch.equal(then, state)
        for a, b in zip(found, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["int8", "psq8"])
def test_inference_gives_the_same_with_and_without_the_operators(recipe):
    layer, x, _ = _layer(recipe)
    with Seen():
        want = layer(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(fqt.invalidate_(layer)(x), want)
    assert torch.equal(layer(x), want) and layer(x).grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_gradient_is_rounded_once_to_its_dtype(dtype, device):
    layer, x, _ = _layer("int8", device, dtype=dtype)
    eps = torch.finfo(dtype).eps
    dy = (1 + eps * torch.randint(0, int(1 / eps), (2, 3, 5), device=device)).to(dtype)  # sums: exact in float32 alone
    with fqt.backend("triton"):
        layer(x.detach().to(dtype).requires_grad_()).backward(dy)
    got, total = layer.bias.grad, dy.float().flatten(0, 1).sum(0)
    assert got.dtype == dtype and not torch.equal(total.to(dtype).float(), total)
    if dtype == torch.bfloat16 and not got.is_cuda:  # the interpreter truncates it
        assert ((got.float() - total).abs() <= 2.0**-7 * total.abs()).all()
    else:
        assert torch.equal(got, total.to(dtype))


def test_a_gradient_that_wgrad_adds_to_advances_its_version(device):
    layer, x, dy = _layer("int8", device)
    layer.fuse_grad_accumulation = True
    with fqt.backend("triton"):
        layer(x).backward(dy)
        grad = layer.weight.grad
        before = grad._version
        layer(x).backward(dy)
    assert layer.weight.grad is grad and grad._version > before


def test_a_second_derivative_is_refused_as_ever(monkeypatch):
    layer, x, dy = _layer("int8")
    called, operator = [], ops.linear_backward
    monkeypatch.setattr(ops, "linear_backward", lambda *of: called.append(1) or operator(*of))
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    assert called  # autograd watches
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_gradients_that_are_not_asked_for_are_not_made(monkeypatch):
    layer, x, dy = _layer("int8")
    made = []
    monkeypatch.setattr(ops.gradients, "weight_gradient", lambda *of, **more: made.append("dW"))
    layer.weight.requires_grad_(False)
    layer(x).backward(dy)
    assert made == [] and x.grad is not None


# ---- where the two ways must not be told apart


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_checkpoint_may_recompute_the_other_way(recipe, watched, frozen, device):
    """A profiler over one half only: autograd saves as many tensors of the same kinds by the operator as without it."""
    net = nn.Sequential(fqt.nn.Linear(8, 8, recipe=recipe), fqt.nn.Linear(8, 4, recipe=recipe)).to(device)
    net[0].weight.requires_grad_(not frozen)
    x = torch.randn(6, 8, device=device)
    found = []
    for halves in ((), (watched,)):
        net.zero_grad()
        fqt.manual_seed(0)
        leaf = x.clone().requires_grad_()
        with torch.autograd.profiler.profile(enabled="forward" in halves):
            y = checkpoint(net, leaf, use_reentrant=False)
        with torch.autograd.profiler.profile(enabled="backward" in halves):
            y.sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_dual_tensor_is_watched():
    """Forward-mode differentiation would go through the rounding of the code beneath."""
    layer = fqt.nn.Linear(9, 5).requires_grad_(False)
    with forward_ad.dual_level():
        assert not is_unwatched(torch.zeros(2))
        y = layer(forward_ad.make_dual(torch.randn(3, 9), torch.ones(3, 9)))
        assert forward_ad.unpack_dual(y).tangent is None
    assert is_unwatched(torch.zeros(2))


def test_below_autograd_there_is_no_node():
    """As in the body of a user's own operator, with a trainable layer and grad mode on."""
    layer, x = fqt.nn.Linear(9, 5), torch.randn(3, 9)
    with torch._C._AutoDispatchBelowAutograd():
        assert not layer(x).requires_grad
        with torch.no_grad():
            assert is_unwatched(x)
    assert layer(x).requires_grad
