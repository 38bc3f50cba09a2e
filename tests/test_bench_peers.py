"""What fqt is measured against: torchao's layers, with a stand-in for torchao where it is not installed; compilation."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from bench_fakes import FakeTimer
from torch import nn

from fqt import reference
from fqt_bench import layers, peers, providers, train
from fqt_bench.cases import ROW, gaussian, quantize_exactly
from fqt_bench.harness import Budget, Effort, measure

CPU = torch.device("cpu")
INSTALLED = importlib.util.find_spec("torchao") is not None


def _int8_mm(a, b):
    """As torchao's: rows of A and columns of B in int8."""
    q = [quantize_exactly(t, ROW).rows() for t in (a.reshape(-1, a.shape[-1]), b.t())]
    return reference.scaled_mm(*q).to(a.dtype).reshape(*a.shape[:-1], b.shape[1])


def _fp8(plain, config):
    """Of what it multiplies, X and W are e4m3 codes; dX and dW are products of codes too."""

    def codes(t):
        scale = t.float().abs().amax(-1, keepdim=True) / 448
        return (t.float() / scale).to(torch.float8_e4m3fn).float() * scale

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (codes(x) @ codes(w).t()).to(x.dtype)

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return (codes(dy) @ codes(w.t()).t()).to(x.dtype), (codes(dy.t()) @ codes(x.t()).t()).to(x.dtype)

    class Float8(nn.Linear):
        def forward(self, x):
            return Products.apply(x, self.weight)

    assert config == "rowwise"
    return peers.with_parameters(Float8, plain)


@pytest.fixture
def torchao(monkeypatch):
    """A stand-in that is installed and runs on the CPU, uncompiled: the two modules that are imported from."""
    names = ("torchao", "torchao.prototype", "torchao.prototype.quantized_training",
             "torchao.prototype.quantized_training.int8_mixed_precision", "torchao.float8")  # fmt: skip
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    made[names[3]]._dynamic_int8_mm = _int8_mm
    made[names[4]].convert_to_float8_training = _fp8
    made[names[4]].Float8LinearConfig = type("Config", (), {"from_recipe_name": staticmethod(lambda name: name)})
    here = {name: provider._replace(against=lambda device: "") for name, provider in providers.PROVIDERS.items()}
    monkeypatch.setattr(providers, "PROVIDERS", here)
    for module in (layers, peers):
        monkeypatch.setattr(module, "compile_" if module is layers else "compiled", lambda function: function)
    return made[names[3]], made[names[4]]


def _measured(case):
    timer = FakeTimer()
    effort = Effort(rounds=1, warm_up_s=0.0, warm_up_rounds=1)
    found = measure(case, timer, Budget(1000.0, timer), effort, log=lambda text: None)["candidates"]
    return {c["tag"]: c for c in found if c["tag"].startswith(("torchao", "bf16 compiled"))}


def test_torchaos_layers_are_candidates_that_pass_their_checks(torchao):
    got = _measured(layers.linear(128, 96, 64, CPU, sets=1, names=()))
    assert list(got) == ["bf16 compiled", "torchao", "torchao fp8"]
    assert {(c["status"], c["provider"] == "torchao") for tag, c in got.items() if tag[0] == "t"} == {("ok", True)}, got


def test_a_layer_of_torchaos_that_does_not_quantize_is_wrong(torchao):
    """What it would be timed as is bf16."""
    int8, fp8 = torchao
    int8._dynamic_int8_mm = lambda a, b: a @ b
    fp8.convert_to_float8_training = lambda plain, config: plain
    got = _measured(layers.linear(128, 96, 64, CPU, sets=1, names=()))
    for tag in ("torchao", "torchao fp8"):
        assert got[tag]["status"] == "wrong" and "nothing was quantized" in got[tag]["remark"]
    int8._dynamic_int8_mm = lambda a, b: _int8_mm(a, b) * 1.1
    got = _measured(layers.linear(128, 96, 64, CPU, sets=1, names=()))
    assert got["torchao"]["status"] == "wrong" and "allowed 0.05" in got["torchao"]["remark"]


def test_what_a_version_of_torchao_lacks_is_skipped_with_the_reason(torchao):
    int8, fp8 = torchao
    del int8._dynamic_int8_mm
    fp8.Float8LinearConfig.from_recipe_name = lambda: None  # takes no name
    got = _measured(layers.linear(128, 96, 64, CPU, sets=1, names=()))
    for tag, reason in (
        ("torchao", "ImportError: cannot import name '_dynamic_int8_mm'"),
        ("torchao fp8", "TypeError"),
    ):
        assert got[tag]["status"] == "skip" and got[tag]["remark"].startswith(
            f"this torchao has no such layer: {reason}"
        )


def test_without_torchao_or_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("torchao", "torchao float8"):
        assert providers.peer(name, CPU)["missing"] == f"not installed: torchao ({providers.INSTALL})"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert providers.peer("torchao float8", CPU)["missing"] == "needs a GPU"
    monkeypatch.setattr(providers, "has_fp8", lambda device: False)
    missing = [providers.peer(name, torch.device("cuda"))["missing"] for name in ("torchao", "torchao float8")]
    assert missing == ["", "needs a GPU with float8 products (sm_89 or newer)"]


@pytest.mark.skipif(not INSTALLED, reason="not installed: torchao")
@pytest.mark.parametrize("of", peers.TORCHAO, ids=lambda of: of.tag)
def test_the_torchao_that_is_installed_quantizes_all_three_products(of):
    assert peers.lacks(of.convert) == ""
    x, dy = [gaussian(128, 64, device=CPU, seed=1).requires_grad_()], [gaussian(128, 96, device=CPU, seed=2)]
    plain = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    least, most = of.error
    try:
        out = layers.step(of.convert(plain), x, dy)(0)
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product on the CPU: {str(error)[:100]}")
    layers._exact_check(plain, x, dy, most, least)(out, 0)


def test_in_a_network_torchao_takes_every_plain_linear_layer_and_its_parameters(torchao):
    net = nn.Sequential(nn.TransformerEncoderLayer(64, 1, 128, dropout=0.0, batch_first=True), nn.Linear(64, 8))
    before = set(net.parameters())
    got = train._torchao(net)
    kinds = {name: type(m).__name__ for name, m in got.named_modules() if isinstance(m, nn.Linear)}
    assert kinds == {"0.linear1": "Int8MixedPrecision", "0.linear2": "Int8MixedPrecision", "1": "Int8MixedPrecision",
                     "0.self_attn.out_proj": "NonDynamicallyQuantizableLinear"}  # fmt: skip
    assert set(got.parameters()) == before
    got(gaussian(2, 16, 64, device=CPU, seed=0, dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in before)


def test_the_composition_of_int_mm_and_scales_is_the_product():
    a, b = (quantize_exactly(gaussian(rows, 64, device=CPU, seed=rows), ROW).rows() for rows in (32, 48))
    got = peers.int_mm_scaled(a.q, b.q, a.scale, b.scale)
    assert torch.equal(got, reference.scaled_mm(a, b).to(torch.bfloat16))


def test_every_layer_is_compiled_however_many_there_were_before(monkeypatch):
    """torch compiles 8 shapes, and goes on eagerly with the next ones."""
    import torch._dynamo

    for name in ("recompile_limit", "fail_on_recompile_limit_hit"):
        monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))
    seen, compile_ = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compile_(function, dynamic=dynamic, backend=backend)
    )
    made = [nn.Linear(8 + i, 8, bias=False) for i in range(10)]
    try:
        for layer in made:
            peers.compiled(layer)(torch.ones(2, layer.in_features))
        assert len(seen) == len(made)
        peers.forget_compiled()
        peers.compiled(made[0])(torch.ones(2, 8))
        assert len(seen) == len(made) + 1
        torch._dynamo.config.recompile_limit = 1  # whatever the limit is, it is an error
        monkeypatch.setattr(peers, "MOST_COMPILED", 1)
        with pytest.raises(Exception, match="recompile"):
            peers.compiled(made[1])(torch.ones(2, 9))
    finally:
        torch.compiler.reset()


def test_a_case_forgets_what_those_before_it_compiled(monkeypatch):
    forgot = []
    monkeypatch.setattr(layers, "forget_compiled", lambda: forgot.append(1))
    x, dy = [gaussian(4, 8, device=CPU, seed=0)], [gaussian(4, 8, device=CPU, seed=1)]
    layers.step(nn.Linear(8, 8), x, dy)
    assert not forgot
    layers.step(nn.Linear(8, 8), x, dy, compiled=True)
    assert forgot


def test_layers_of_torchao_are_of_one_class(torchao):
    """Blocks whose layers are of other classes would be compiled one by one."""
    a, b = (peers.int8_mixed_precision(nn.Linear(16, 16)) for _ in range(2))
    assert type(a) is type(b)
