"""The benchmark's cases at a small size: every candidate passes its check, and fails it when a value is off."""

import pytest
import torch
from bench_fakes import FakeTimer

from fqt import candidates, cost, dispatch, ops, reference
from fqt.recipe import Quantizer, Recipe
from fqt_bench import cases, layers, products, suites
from fqt_bench.harness import Budget, Effort, Wrong, measure, repeat

BUILDERS = {"gemm": products.gemm, "quantize": cases.quantize, "linear": layers.linear}


# ---- the cases, at a small size


@pytest.fixture
def with_fp8(device, monkeypatch):
    """The CPU multiplies e4m3 codes too."""
    if device == "cpu":
        for module in (products, layers):
            monkeypatch.setattr(module, "has_fp8", lambda device: True)


@pytest.mark.parametrize("name, shape", [("gemm", (64, 96, 128)), ("quantize", (64, 128)), ("linear", (128, 128, 128))])
def test_every_candidate_of_a_case_passes_its_check(name, shape, device, with_fp8):
    case = BUILDERS[name](*shape, torch.device(device), sets=1)
    timer = FakeTimer()
    records = measure(case, timer, Budget(1000.0, timer), Effort(rounds=1, warm_up_s=0.0, warm_up_rounds=1))[
        "candidates"
    ]
    assert {r["name"]: r["remark"] for r in records if r["ours"] and r["status"] not in ("ok", "skip")} == {}
    assert records[0]["status"] == "ok" and any(r["ours"] and r["status"] == "ok" for r in records)
    if name == "quantize":
        assert {r["remark"] for r in records} == {"bit-equal"}


@pytest.mark.parametrize("name, shape", [("gemm", (64, 96, 128)), ("quantize", (64, 128)), ("linear", (128, 128, 128))])
def test_every_candidate_of_a_case_is_refused_when_a_value_is_off(name, shape, device, with_fp8):
    case = BUILDERS[name](*shape, torch.device(device), sets=1)
    for candidate in (c for c in case.candidates if c.ours or (device == "cpu" and not c.missing)):
        out = candidate.run(0)
        for part in (t for t in (out if isinstance(out, tuple) else (out,)) if t is not None):
            largest = int(part.abs().argmax())
            value = part.view(-1)[largest].clone()
            part.view(-1)[largest] = -2 * value if value.is_floating_point() else value ^ 1
            with pytest.raises(Wrong):
                candidate.check(out, 0)
            part.view(-1)[largest] = value
        candidate.check(out, 0)


def test_the_exact_quantizer_of_the_cases_is_the_reference_on_the_cpu():
    x = cases.gaussian(33, 40, device=torch.device("cpu"), seed=3)
    multiplier, rng = torch.rand(33, 1) + 0.5, torch.tensor([5, 6])
    for granularity in ("per_tensor", "per_row", "per_column"):
        for zero in ("symmetric", "grid", "min"):
            for rounding in ("nearest", "stochastic"):
                for bits in (8, 3):
                    z = Quantizer(bits, granularity, zero, rounding)
                    fields = dict(multiplier=multiplier, rng=rng, stream=1, cols=True, sums=True)
                    got, want = cases.quantize_exactly(x, z, **fields), reference.quantize(x, z, **fields)
                    assert all(g is w or torch.equal(g, w) for g, w in zip(got, want, strict=True)), z


SHAPES = [(64, 64, 64), (1024, 1024, 65536), (8192, 8192, 8192), (8191, 4095, 1000)]
PRODUCTS = [(arch, shape, "int") for arch in ("sm80", "sm90", "sm100", "gfx942") for shape in SHAPES]
PRODUCTS += [(arch, SHAPES[2], "e4m3") for arch in ("sm89", "sm90", "sm103")]


@pytest.mark.parametrize(("arch", "shape", "format"), PRODUCTS)
def test_the_products_are_the_candidates_of_fqt_and_dispatch_selects_one(arch, shape, format, monkeypatch):
    monkeypatch.setattr(dispatch, "device_info", lambda device: (arch, 132))
    monkeypatch.setattr(dispatch, "choose", lambda *call, **more: dispatch.select(dispatch.problem(*call, **more)))
    gpu = torch.device("cuda", 0)
    made = list(products.launches(*shape, gpu, format))
    expected = candidates.candidates(dispatch.problem("scaled_mm", gpu, *shape, torch.float32, format=format))
    assert [name for name, *_ in made] == [products.title(c) for c in expected] and len(expected) >= 2
    assert len({name for name, *_ in made}) == len(made)
    assert [selected for _, _, selected, _ in made].count(True) == 1
    for (_, tag, _, launch), candidate in zip(made, expected, strict=True):
        given = getattr(launch, "keywords", {})
        assert given.get("config", ()) == candidate.config and given.get("split_k", 1) == candidate.split_k
        assert tag == ("split" if candidate.split_k > 1 else candidate.kernel)


def test_the_layer_is_quantized_anew_in_every_step(device):
    """Each step must pay for the weight: its codes are computed again, once, in every run."""
    case = layers.linear(128, 128, 128, torch.device(device), sets=1)
    int8 = case.candidates[1]
    calls = []
    quantize_weight = ops.quantize_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "quantize_weight", lambda *a: calls.append(a[2]) or quantize_weight(*a))
        for _ in range(3):
            int8.run(0)
    assert calls == [True] * 3  # both layouts


@pytest.fixture
def h100(monkeypatch):
    ceilings = cost.Ceilings(798, 1200, 1250, 3.0, "measured", "NVIDIA H100 80GB HBM3", "sm90", 132)
    monkeypatch.setattr(cost, "ceilings", lambda device: ceilings)
    return ceilings


def _predictions(case):
    return {c.tag: c.prediction for c in case.candidates if c.tag and c.prediction}


def test_predictions_are_the_cost_models(h100, device):
    shape, cpu = (128, 128, 128), torch.device(device)
    expected = cost.linear(*shape, Recipe.int8(), h100)
    assert _predictions(layers.linear(*shape, cpu, sets=1))["int8"] == str(expected)
    one = cost.product("gemm", shape, 1200, h100)
    rate = products._Expectation(shape, cpu)
    assert rate.bf16() == f"{2e-9 * 128**3 / one.bf16_ms:.0f} (measured)"
    assert rate.int8() == f"{2e-9 * 128**3 / one.ms:.0f} (measured)"
    got = _predictions(cases.quantize(64, 128, cpu, sets=1))
    assert got["copy"] == "3000 GB/s (measured)"
    # Written over moved: a single read of 2 bytes, 1 for each layout; a gradient is read twice.
    assert (got["rows nearest"], got["gradient int8"]) == ("0.60×", "0.67×")  # of the two, the tile kernel is the last


def test_without_ceilings_there_is_no_prediction(device, monkeypatch):
    def unknown(device):
        raise cost.NotModelled("no GPU")

    monkeypatch.setattr(cost, "ceilings", unknown)
    assert set(_predictions(layers.linear(64, 64, 64, torch.device(device), sets=1)).values()) == set()
    assert products._Expectation((64, 64, 64), torch.device(device)).int8() == ""
    no_kernel = cost.Ceilings(100, 200, None, 1.0, "measured", arch="sm75", processors=72)
    monkeypatch.setattr(cost, "ceilings", lambda device: no_kernel)
    assert products._Expectation((64, 64, 64), torch.device(device)).int8() == ""


def test_the_tags_that_the_targets_read_are_the_candidates(device):
    where = torch.device(device)
    built = (products.gemm(64, 96, 128, where, sets=1), cases.quantize(64, 128, where, sets=1),
             layers.linear(64, 64, 64, where, sets=1))  # fmt: skip
    tags = {c.tag for case in built for c in case.candidates}
    assert tags >= {"bf16", "_int_mm", "portable", "copy", "rows nearest", "rows stochastic", "both nearest",
                    "both stochastic", "int8", "psq8"}  # fmt: skip


def test_the_layers_repeat_their_bits_and_the_products_agree(device):
    for build, least in ((layers.linear, 2), (products.gemm, 1)):
        records = repeat(build(64, 96, 128, torch.device(device), sets=1), FakeTimer(), runs=2)
        assert len(records) >= least and {r["status"] for r in records} == {"ok"}, records


def test_every_layer_of_the_linear_case_has_its_launches_and_its_memory_counted(device):
    def count(run):
        run()
        return {"kernels": 1, "copies": 0, "by_name": {}}

    def usage(forward, backward):
        y = forward()
        backward(y)
        return {"saved": y.numel(), "peak": 1}

    shape = (64, 128, 32)
    ours = [layers.OWN + name for name in layers.recipes(torch.device(device))]
    launches = suites.layer_launches(count, torch.device(device), shape)
    assert [entry["name"] for entry in launches] == ["nn.Linear bf16", *ours]
    memory = layers.memory(*shape, torch.device(device), usage)
    assert [(r["name"], r["saved"]) for r in memory] == [
        (n, 64 * 128) for n in ("bf16", *layers.recipes(torch.device(device)))
    ]
    refused = {ours[0]: "did not end"}
    assert len(suites.layer_launches(count, torch.device(device), shape, refused)) == len(launches) - 1
    assert len(layers.memory(*shape, torch.device(device), usage, refused)) == len(memory) - 1


def _leaves(node):
    """The tensors that gradients are accumulated in, which a graph keeps alive."""
    if hasattr(node, "variable"):
        yield node.variable
    for below, _ in node.next_functions:
        yield from _leaves(below) if below is not None else ()


@pytest.mark.parametrize("recipe", ["bf16", "int8"])
def test_the_forward_whose_memory_is_measured_keeps_no_input_of_its_own(recipe, device):
    """nn.Linear keeps its input, 2 bytes an element; ours codes of 1 byte, and not the input."""
    m, n, k = 64, 32, 48  # an input of more elements than the weight
    kept = {}

    def usage(forward, backward):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = forward()
        kept[len(kept)] = sum(t.numel() * t.element_size() for t in saved if t.numel() == m * k)
        assert max(leaf.numel() for leaf in _leaves(y.grad_fn)) == n * k  # the weight: a larger leaf would be kept too
        backward(y)
        return {"saved": 0, "peak": 0}

    layers.memory(m, n, k, torch.device(device), usage)
    assert kept[("bf16", "int8").index(recipe)] == m * k * (2 if recipe == "bf16" else 1)
