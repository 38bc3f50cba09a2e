"""Laws of the step of weights that are held in int8: its scales, its rounding, its replay, and the kernel bit for bit."""

import copy
import json
from pathlib import Path

import laws
import pytest
import torch
from torch import nn

import fqt
import fqt_kernels.int8_step as kernels
from fqt import reference
from fqt.int8_weight import Int8Weight, hold_int8_
from fqt.optim import PSGD, PSGDAdamW, int8, loop
from fqt.position import Position

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

PLAIN = Position(target=None)
GROUP = {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True, "maximize": False,
         "betas": (0.9, 0.99), "eps": 1e-8}  # fmt: skip
SGD = GROUP | {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}


def weight(n=6, k=9, dtype=torch.float32, key=77, device="cpu"):
    """Rows of different sizes, one of zeros."""
    x = torch.randn(n, k) * torch.logspace(-3, 1, n)[:, None]
    x[min(3, n - 1)] = 0.0
    return Int8Weight.of(x.to(dtype), torch.tensor([key, 3])).to(device)


def state_of(p, state):
    return {"q": p.q, "qt": p.qt, "scale": p.scale, "rng": p.rng, **state}


def assert_same_state(p, state, other, other_state):
    got, want = state_of(p, state), state_of(other, other_state)
    assert got.keys() == want.keys()
    for name in got:
        laws.assert_same(got[name], want[name], name)


# ---- scales


@pytest.mark.parametrize(
    ("largest", "kept"),
    [(62.99, False), (63.0, True), (100.0, True), (127.0, True), (127.01, False), (1000.0, False), (0.0, True)],
)
def test_a_row_keeps_its_scale_while_its_codes_use_half_the_range(largest, kept):
    scale = torch.tensor([[0.25]])
    new = torch.tensor([[0.1, -largest * 0.25, 0.0]]) if largest else torch.zeros(1, 3)
    # The new scale leaves an eighth of headroom: the largest code is 127 / 1.125 to within roundings.
    got = int8.row_scales(scale, new)
    if kept:
        assert torch.equal(got, scale)
    else:
        assert torch.allclose(got, new.abs().amax().view(1, 1) * 1.125 / 127, rtol=4 * laws.EPS, atol=0)


def test_scales_stay_large_enough_to_divide_by():
    scale = int8.row_scales(torch.ones(2, 1), torch.tensor([[1e-40, 0.0], [1e-36, -1e-37]]))
    assert (scale == 2.0**-110).all()
    assert torch.equal(int8.row_scales(scale, torch.tensor([[2.0**-110], [2.0**-108]])), scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_shows_in_its_row_and_stays_there(bad, fused, device):
    p, g = weight(18, 20, device=device), torch.randn(18, 20).to(device)
    clean, poisoned = p.clone(), g.clone()
    poisoned[4, 7] = bad
    int8.step_(p, poisoned, {}, PLAIN, SGD, "sgd", fused=fused)
    int8.step_(clean, g, {}, PLAIN, SGD, "sgd", fused=fused)
    others = torch.arange(18, device=device) != 4
    assert not p.dequantize()[4].isfinite().any()
    assert torch.equal(p.q[others], clean.q[others]) and torch.equal(p.scale[others], clean.scale[others])
    assert p.dequantize()[others].isfinite().all()


# ---- rounding


@pytest.mark.parametrize("bits", [0, 65535])
def test_an_element_that_is_not_moved_keeps_its_code_whatever_the_bits(monkeypatch, bits):
    """All codes under 4096 scales of all mantissas: q · scale / scale is within half of 2⁻¹⁶ of q."""
    q = torch.arange(-127, 128, dtype=torch.int8).repeat(4096, 1)
    scale = (1 + torch.rand(4096, 1)) * 2.0 ** torch.randint(-40, 20, (4096, 1))
    monkeypatch.setattr(int8, "random_bits", lambda *_, **__: torch.full(q.shape, bits, dtype=torch.int32))
    assert torch.equal(int8.row_scales(scale, q * scale), scale)
    assert torch.equal(int8.rounded(q * scale, scale, laws.random_state()), q)


def test_codes_never_leave_their_range():
    """Largest values on both edges of what keeps its scale, under scales whose product with 127 is rounded up."""
    scale = torch.rand(4096, 1) + 0.5
    edge = scale * 127
    new = torch.cat([edge, -edge, edge.nextafter(torch.zeros(()))], 1)
    assert torch.equal(int8.row_scales(scale, new), scale)
    codes = int8.rounded(new, scale, laws.random_state(6))
    assert int(codes.min()) == -127 and int(codes.max()) == 127
    assert torch.equal(codes[:, :2], torch.tensor([[127, -127]], dtype=torch.int8).expand(4096, 2))


def test_a_step_is_unbiased_and_has_the_variance_of_its_fraction():
    """w' = w - u: the mean is w', the variance p (1 - p) scale² with p the fraction of u / scale."""
    p, g, draws = weight(16, 24), torch.randn(16, 24), 512
    p.q.clamp_(-90, 90)
    p.q[:, 0] = 100  # not moved: every row keeps its scale
    p.qt.copy_(p.q.t())
    g[:, 0] = 0.0
    g *= p.scale * 3 / SGD["lr"]
    want = int8.stepped(p, g, {}, PLAIN, SGD, "sgd")
    assert torch.equal(int8.row_scales(p.scale, want), p.scale)

    drawn = []

    def draw(i):
        w = copy.deepcopy(p)
        w.rng[1] = i
        int8.step_(w, g, {}, PLAIN, SGD, "sgd")
        assert torch.equal(w.qt, w.q.t()) and int(w.rng[1]) == i + 1
        drawn.append(w.dequantize())
        return drawn[-1]

    laws.assert_unbiased(draw, want, draws, bin=p.scale)
    fraction = (want.double() / p.scale).frac().abs()
    expected = fraction * (1 - fraction)
    codes = (torch.stack(drawn).double() - want.double()) / p.scale
    # The square's fourth moment is at most 1/12 of a code⁴: the standard error of the mean over all is below it.
    error = 5 * (1 / 12 / codes.numel()) ** 0.5
    assert abs(float(codes.square().mean() - expected.mean())) < error
    assert float(expected.mean()) > 10 * error


def test_steps_replay_and_random_bits_belong_to_key_and_step():
    g = torch.randn(6, 32)
    first, again, later, other = (copy.deepcopy(weight(6, 32)) for _ in range(4))
    for w in (again, later, other):
        w.copy_(first)
    later.rng[1] += 1
    other.rng[0] += 1
    for w in (first, again, later, other):
        int8.step_(w, g, {}, PLAIN, SGD, "sgd")
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.q, later.q) and not torch.equal(first.q, other.q)


@pytest.mark.parametrize("fused", [False, True])
def test_a_graph_from_before_a_step_refuses_another_backward_pass(fused, device):
    layer = nn.Linear(9, 6).to(device)
    fqt.quantize_(layer, "int8")
    hold_int8_(layer)
    loss = layer(torch.randn(2, 9).to(device).requires_grad_()).sum()
    loss.backward(retain_graph=True)
    version = layer.weight._version
    int8.step_(layer.weight, layer.weight.grad, {}, PLAIN, SGD, "sgd", fused=fused)
    assert layer.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_loops_step_before_it_is_rounded(rule, dtype):
    p, state, plain_state, position = weight(dtype=dtype), {}, {}, Position("grid+zero", bits=3, sparsity=0.5)
    for _ in range(3):
        w, g = p.dequantize(torch.float32), torch.randn(6, 9).to(dtype)
        got = int8.stepped(p, g, state, position, GROUP, rule)
        s = loop.scale_of(w, position, plain_state)
        step = {"sgd": loop.sgd_step, "adamw": loop.adamw_step}[rule]
        group = {name: GROUP[name] for name in int8._HYPER[rule]}
        want = step(w, g.float(), plain_state, s, position="grad", **group)
        plain_state |= {name: plain_state[name].to(dtype) for name in int8._MOMENTS if name in plain_state}
        laws.assert_same(got, want)
        assert state.keys() == plain_state.keys()
        for name in state:
            laws.assert_same(state[name], plain_state[name], name)


# ---- the kernel


@pytest.fixture
def memory(guard, monkeypatch):
    """Guard bands around what is allocated, and few programs, so that each walks over several blocks of rows."""
    monkeypatch.setattr(kernels, "_programs", lambda *_: 2)
    return guard(kernels)


BOTH = {"bits": 3, "sparsity": 0.5, "eps": 1e-3}
CASES = [
    ("sgd", torch.float32, (1, 1), Position(None), SGD),
    ("sgd", torch.float32, (35, 33), Position(None), GROUP | {"nesterov": False, "dampening": 0.5}),
    ("sgd", torch.bfloat16, (48, 144), Position("grid", delta="absmax"), GROUP | {"maximize": True}),
    ("sgd", torch.float32, (18, 5), Position("zero", position="update"), GROUP | {"momentum": 0.0, "nesterov": False}),
    ("adamw", torch.bfloat16, (19, 40), Position("grid+zero", per_channel=True, **BOTH), GROUP),
    ("adamw", torch.float32, (32, 16), Position("grid+zero", position="update", scale=7.0, **BOTH), GROUP),
    ("adamw", torch.float32, (7, 34), Position(lambda w: w.dequantize().round(), eps=0.1), GROUP),
]


@pytest.mark.parametrize(("rule", "dtype", "shape", "position", "group"), CASES)
def test_the_kernel_equals_the_definition_bit_for_bit(memory, device, rule, dtype, shape, position, group):
    """Two steps, of which the second reads what the first has made; gradients with strides, divided by a scale. The range
    does not see rows that are infinite, or NaN as one is in the second step."""
    want = weight(*shape, dtype=dtype)
    want.scale[40:41] = torch.inf
    p, state, want_state = want.to(device, copy=True), {}, {}
    for _ in range(2):
        g = torch.randn(shape[::-1]).to(dtype).t() * 8
        if len(g) > 40:
            g[-1, 7] = torch.nan
        scale = torch.tensor([3.0])
        int8.step_(p, g.to(device), state, position, group, rule, scale.to(device), fused=True)
        int8.step_(want, g, want_state, position, group, rule, scale, fused=False)
        assert_same_state(p, state, want, want_state)
    assert all(state[name].dtype == dtype for name in int8._MOMENTS if name in state)


def test_the_kernel_rounds_as_the_definition_on_the_edges_of_codes(memory, device):
    """w' / scale + r / 2¹⁶ a rounding error away from the next code, for the random bits r of each element."""
    want = weight(18, 40)
    want.q.clamp_(-90, 90)
    want.q[:, 0] = 100
    want.qt.copy_(want.q.t())
    bits = reference.random_bits(want.rng, 18, 40, stream=int8.UPDATE)
    g = want.dequantize() - (want.q + 1 - bits / 65536) * want.scale
    g[:, 0] = 0.0
    p, before = want.to(device, copy=True), want.q.clone()
    int8.step_(p, g.to(device), {}, PLAIN, SGD | {"lr": 1.0}, "sgd", fused=True)
    int8.step_(want, g, {}, PLAIN, SGD | {"lr": 1.0}, "sgd", fused=False)
    assert_same_state(p, {}, want, {})
    assert {0, 1} == set((p.q.cpu() - before).unique().tolist())


def test_the_kernel_changes_scales_as_the_definition(memory, device):
    """Rows whose new values reach to all that `row_scales` tells apart."""
    largest = torch.tensor([0.0, 1e-30, 62.5, 63.0, 64.0, 126.5, 127.0, 127.25, 1e30, torch.inf, torch.nan])
    want = weight(11, 6)
    want.scale.copy_(2.0 ** torch.arange(-5.0, 6.0)[:, None])
    want.scale[1] = 2.0**-20  # of a row that becomes smaller than a scale can be
    for codes in (want.q, want.qt):
        codes.zero_()
    g = torch.zeros(11, 6)
    g[:, 4] = largest * want.scale[:, 0]
    p, before = want.to(device, copy=True), want.scale.clone()
    int8.step_(p, g.to(device), {}, PLAIN, SGD | {"lr": 1.0}, "sgd", fused=True)
    int8.step_(want, g, {}, PLAIN, SGD | {"lr": 1.0}, "sgd", fused=False)
    assert_same_state(p, {}, want, {})
    assert (p.scale.cpu() == before).flatten().tolist() == [True, *[False] * 2, *[True] * 4, *[False] * 4]
    assert float(p.scale[1]) == 2.0**-110


def test_the_kernel_takes_a_learning_rate_on_the_device(memory, device):
    want, g = weight(5, 8), torch.randn(5, 8)
    p = want.to(device, copy=True)
    hyper = int8._hyper(PLAIN, GROUP, "sgd", False)._replace(lr=torch.tensor(0.05, device=device), momentum=0.0)
    kernels.int8_step(p.q, p.qt, p.scale, p.rng, g.to(device), hyper)
    int8.step_(want, g, {}, PLAIN, GROUP | {"momentum": 0.0}, "sgd", fused=False)
    assert_same_state(p, {}, want, {})


def test_codes_do_not_depend_on_the_tile(device):
    p = weight(35, 70, device=device)
    g, hyper, results = torch.randn(35, 70).to(device), int8._hyper(PLAIN, SGD, "sgd", False), []
    for tile in ((16, 32, 1), (32, 128, 1)):
        w = p.clone()
        kernels.int8_step(w.q, w.qt, w.scale, w.rng, g, hyper, tile=tile)
        results.append(w)
    assert_same_state(results[0], {}, results[1], {})


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_changes_nothing(fused, device):
    p, state, position = weight(device=device), {}, Position("grid+zero")
    found, g = torch.ones(1, device=device), torch.randn(6, 9).to(device)
    int8.step_(p, g, state, position, GROUP, "adamw", found_inf=found, fused=fused)
    assert not state and int(p.rng[1]) == 3
    int8.step_(p, g, state, position, GROUP, "adamw", found_inf=0 * found, fused=fused)
    assert int(p.rng[1]) == 4
    before, before_state = p.clone(), copy.deepcopy(state)
    int8.step_(p, torch.full_like(g, torch.inf), state, position, GROUP, "adamw", found_inf=found, fused=fused)
    assert_same_state(p, state, before, before_state)


def test_tensors_that_the_kernel_cannot_address_are_refused():
    p = weight()
    with pytest.raises(ValueError, match="first must be contiguous"):
        hyper = int8._hyper(PLAIN, GROUP, "sgd", False)
        kernels.int8_step(p.q, p.qt, p.scale, p.rng, torch.ones(6, 9), hyper, first=torch.zeros(9, 6).t())


# ---- in optimizers


def _trained(steps, optimizer_of, resume_at=None):
    """A model and its optimizer after some steps; stopped, saved, loaded into new ones and gone on at one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    fqt.manual_seed(5)
    fqt.quantize_(model, "int8")
    hold_int8_(model)
    optimizer = optimizer_of(model)
    x, y = torch.randn(steps, 8, 12), torch.randint(0, 4, (steps, 8))
    for i in range(steps):
        if i == resume_at:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), fqt.get_rng_state(model)))
            model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
            fqt.quantize_(model, "int8")
            hold_int8_(model)
            model.load_state_dict(saved[0])
            optimizer = optimizer_of(model)
            optimizer.load_state_dict(saved[1])
            fqt.set_rng_state(model, saved[2])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda m: PSGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, target="grid+zero"),
        lambda m: PSGDAdamW(m.parameters(), lr=0.01, target="grid"),
    ],
)
@pytest.mark.filterwarnings("ignore:fqt.optim")  # that biases are drawn to the target as well
def test_stopping_loading_and_going_on_is_not_stopping(optimizer_of):
    through, optimizer = _trained(6, optimizer_of)
    stopped, other = _trained(6, optimizer_of, resume_at=3)
    for (name, p), q in zip(through.named_parameters(), stopped.parameters(), strict=True):
        inner = ("q", "qt", "scale", "rng") if isinstance(p, Int8Weight) else ("data",)
        assert isinstance(q, Int8Weight) == isinstance(p, Int8Weight)
        for part in inner:
            laws.assert_same(getattr(q, part), getattr(p, part), f"{name}.{part}")
        for key, value in optimizer.state[p].items():
            laws.assert_same(torch.as_tensor(other.state[q][key]), torch.as_tensor(value), f"{name}: {key}")
    assert int(through[0].weight.rng[1]) == 6


def test_excess_variance_on_a_quadratic_is_that_of_the_formula(monkeypatch):
    """The study, of fewer weights: within five standard errors of E[p (1 - p)] Δ² / (2 η μ - η² μ²), which is far from 0."""
    from fqt_bench import int8_weight_study as study

    monkeypatch.setattr(study, "ROWS", 16)
    got = study.quadratic(0.05)
    assert abs(got["excess"] - got["formula"]) < 5 * got["standard_error"] < got["formula"]


def test_the_committed_figures_keep_the_formula():
    from fqt_bench import int8_weight_study as study

    results = Path(__file__).parents[1] / "bench" / "results" / "cpu"
    result = json.loads(max(results.glob("int8-weight-study-*.json")).read_text(encoding="utf-8"))
    for f in result["quadratic"]:
        assert abs(f["excess"] - f["formula"]) < 5 * f["standard_error"]
    slowest = min(result["quadratic"], key=lambda f: f["rate"])
    assert slowest["excess"] > 0.9 * slowest["limit"] > 10 * slowest["mean_square"]["float32"]
    assert slowest["mean_square"]["int8 to nearest"] > 10 * slowest["mean_square"]["int8"]  # it has not moved
    table = study.report(result)
    assert all(f"| {name} |" in table for name in study.WEIGHTS)
