"""Laws of CUDA graphs on a GPU: replays repeat the eager steps to the bit, and so does what torch.compile makes.

The same bodies run on a CPU with the step itself in the graph's place, so that a GPU meets nothing untried.
"""

import contextlib

import pytest
import torch
from laws import assert_same
from torch import nn

import fqt
from fqt.optim import PSGD, PositionScaled, PSGDAdamW
from fqt.recipe import Quantizer, Recipe

CUDA = torch.cuda.is_available()
GRAPH = pytest.param(
    "graph", marks=pytest.mark.skipif(not CUDA, reason="a CUDA graph needs a GPU; on a CPU its step runs eagerly")
)
WARM_UP, STEPS = (3, 5) if CUDA else (1, 2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:fqt.optim. parameter:UserWarning"), pytest.mark.usefixtures("one_thread")
]  # fmt: skip
DELAYED = Recipe(
    *(Quantizer(8, "per_tensor", "symmetric"),) * 2,
    *(
        Quantizer(4, g, "symmetric", "stochastic", range=r)
        for g, r in (("per_row", "delayed"), ("per_tensor", "exact"))
    ),
)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, capturable=CUDA)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def psgd(params):
    return PSGD(params, lr=0.05, momentum=0.9, weight_decay=0.01, target="grid+zero")


def psgd_adamw(params):
    return PSGDAdamW(params, lr=0.01, target="grid")


def scaled(params):
    return PositionScaled(sgd(params), target="grid+zero")


def dense(recipe, device):
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 16))
    fqt.quantize_(model.to(device), recipe)
    return model, (24, 32)


def held(recipe, device):
    model, shape = dense(recipe, device)
    fqt.hold_int8_(model)
    return model, shape


def images(recipe, device):
    """channels_last; stride, padding, one of 1x1, few channels, groups."""
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4)
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(128, 16))
    fqt.quantize_(model.to(device, memory_format=torch.channels_last), recipe)
    return model, (8, 3, 8, 8)


class Training:
    """A model, its optimizer, and a step of both on an input that stays where it is."""

    def __init__(self, make, recipe, optimizer, device, autocast=False, accumulate=1):
        torch.manual_seed(1)
        fqt.manual_seed(1)
        self.device, self.autocast, self.accumulate = device, autocast, accumulate
        self.model, shape = make(recipe, device)
        self.optimizer = optimizer(self.model.parameters())
        self.x = torch.zeros(accumulate, *shape, device=device)
        self.y = torch.zeros(accumulate, shape[0], 16, device=device)
        self.loss = torch.zeros((), device=device)

    def feed(self, number):
        generator = torch.Generator().manual_seed(number)
        for t in (self.x, self.y):
            t.copy_(torch.randn(t.shape, generator=generator))

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        for x, y in zip(self.x, self.y, strict=True):
            with self._context():
                out = self.model(x)
            loss = (out.float() - y).square().mean()
            loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _context(self):
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def state(self):
        """Everything that a step changes, by name."""
        found = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), "loss": self.loss}
        for name, p in self.model.named_parameters():
            found |= {
                f"{name}.{inner}": getattr(p, inner) for inner in ("q", "qt", "scale", "rng") if hasattr(p, inner)
            }
        for kind in ("state", "position_state"):
            for number, state in enumerate(getattr(self.optimizer, kind, {}).values()):
                found |= {f"{kind} {number} {key}": t for key, t in state.items() if isinstance(t, torch.Tensor)}
        return {name: (t.dequantize() if hasattr(t, "qt") else t).detach().cpu().clone() for name, t in found.items()}

    def warm_up(self):
        """On another stream, as torch asks."""
        stream = torch.cuda.Stream() if CUDA else None
        if CUDA:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(WARM_UP):
                self.feed(number)
                self.step()
        if CUDA:
            torch.cuda.current_stream().wait_stream(stream)

    def captured(self):
        """What replays the step."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def train(how, *args, **options):
    """The state after warm-up and steps: "plain", "function" (the step is called as a graph's replay is), or "graph"."""
    training = Training(*args, **options)
    training.warm_up()
    run = training.captured() if how == "graph" else training.step
    for number in range(WARM_UP, WARM_UP + STEPS):
        training.feed(number)
        run()
    return training, training.state()


def assert_all_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert_same(t, expected[name], name)


CASES = [
    (dense, "int8", psgd, {}),
    (dense, "psq8", adamw, {}),
    (dense, "bhq8", psgd_adamw, {}),
    (dense, "bhq5-tile", sgd, {}),
    (dense, "auto4", sgd, {}),
    (dense, "fp8", sgd, {}),
    (dense, DELAYED, sgd, {}),
    (dense, "int8", scaled, {}),
    (dense, "int8", psgd, {"autocast": True}),
    (dense, "psq4", psgd, {"accumulate": 2}),
    (held, "int8", psgd, {}),
    (held, "int8", psgd_adamw, {}),
    (images, "int8", psgd, {}),
    (images, "psq8", adamw, {}),
    (images, "bhq8", sgd, {}),
    (images, "psq8", sgd, {"autocast": True}),
]


@pytest.mark.parametrize("how", ["function", GRAPH])
@pytest.mark.parametrize(("make", "recipe", "optimizer", "options"), CASES)
def test_replays_are_the_eager_steps(how, make, recipe, optimizer, options, device):
    """Parameters, buffers with the random counters, the state of the optimizer and the loss, to the bit."""
    _, expected = train("plain", make, recipe, optimizer, device, **options)
    _, found = train(how, make, recipe, optimizer, device, **options)
    assert_all_same(found, expected)
    counters = [t for name, t in found.items() if name.endswith("_fqt_rng")]
    steps = (WARM_UP + STEPS) * options.get("accumulate", 1)
    assert counters and all(int(t[1]) == steps for t in counters), "the random counters do not count the steps"


@pytest.mark.parametrize("how", ["function", GRAPH])
@pytest.mark.parametrize("make", [dense, images])
def test_evaluation_between_replays_sees_their_weights(how, make, device):
    """Nothing has to be said to fqt: the codes of weights that a graph writes are not kept."""
    training = Training(make, "int8", psgd, device)
    training.warm_up()
    run, x = training.captured() if how == "graph" else training.step, training.x[0].clone()
    for number in range(2):
        training.feed(number)
        run()
        fresh, _ = make("int8", device)
        fresh.load_state_dict(training.model.state_dict())
        with torch.no_grad():
            assert_same(training.model(x), fresh(x), f"the output after replay {number}")


@pytest.mark.parametrize("how", ["function", GRAPH])
def test_eager_steps_go_on_after_replays(how, device):
    """As if all had been eager: state, counters and codes are where replays left them."""
    _, expected = train("plain", dense, "int8", psgd, device)
    training = Training(dense, "int8", psgd, device)
    training.warm_up()
    run = training.captured() if how == "graph" else training.step
    for number in range(WARM_UP, WARM_UP + STEPS):
        training.feed(number)
        (run if number < WARM_UP + STEPS - 1 else training.step)()
    assert_all_same(training.state(), expected)


@pytest.mark.parametrize("how", ["function", GRAPH])
def test_a_graph_of_a_forward_pass_sees_weights_that_are_written_later(how, device):
    torch.manual_seed(1)
    model, shape = dense("int8", device)
    x, out = torch.randn(shape, device=device), torch.zeros(shape[0], 16, device=device)

    def forward():
        with torch.no_grad():
            out.copy_(model(x))

    forward()
    run = forward
    if how == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        run = graph.replay
    with torch.no_grad():
        model[0].weight.mul_(-2)
    run()
    fresh, _ = dense("int8", device)
    fresh.load_state_dict(model.state_dict())
    assert_same(out, fresh(x).detach(), "the output")


@pytest.mark.skipif(not CUDA, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("make", [dense, images])
def test_graphed_callables_repeat_the_eager_steps(make, device):
    def run(graphed):
        torch.manual_seed(1)
        model, shape = make("psq8", device)
        x = torch.randn(shape, device=device)
        call = torch.cuda.make_graphed_callables(model, (x.clone(),)) if graphed else model
        fqt.manual_seed(5)
        optimizer = sgd(model.parameters())
        for number in range(STEPS):
            optimizer.zero_grad()
            call(x * (number + 1)).square().mean().backward()
            optimizer.step()
        return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}

    assert_all_same(run(True), run(False))


# ---- torch.compile

gpu = pytest.mark.skipif(not CUDA, reason="inductor's kernels for a GPU need one")
HOWS = [
    {"backend": "aot_eager"},
    pytest.param({"backend": "inductor"}, marks=gpu),
    pytest.param({"backend": "inductor", "mode": "reduce-overhead"}, marks=gpu),
]


@pytest.mark.parametrize("options", HOWS, ids=lambda o: f"{o['backend']} {o.get('mode', '')}".strip())
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("make", "recipe"), [(dense, "int8"), (images, "psq8")])
def test_compiled_training_repeats_eager_training(make, recipe, autocast, options, device):
    """fullgraph. Of layers whose operators round alike in every backend, the loss outside."""

    def run(compiled):
        torch.manual_seed(1)
        fqt.manual_seed(1)
        model, shape = make(recipe, device)
        if make is dense:
            del model[1]  # inductor has a LayerNorm of its own
        call = torch.compile(model, fullgraph=True, **options) if compiled else model
        optimizer = sgd(model.parameters())
        for number in range(4):
            if CUDA:
                torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(device)
            x = x.to(memory_format=torch.channels_last) if make is images else x
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                out = call(x)
            out.float().square().mean().backward()
            optimizer.step()
        return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}

    torch._dynamo.reset()
    assert_all_same(run(True), run(False))
