"""pytest-benchmark timings of the CPU backend against plain torch: for information, no timed assertion.

    python -m pytest bench/test_bench_cpu.py

Not collected by a plain `pytest`. The CPU backend is `fqt.reference`, made to be exact and readable, not fast.
"""

import pytest
import torch

import fqt
import fqt.nn
from fqt import products, reference
from fqt.recipe import Quantizer

QUANTIZERS = {
    "per_row": Quantizer(8, "per_row"),
    "per_row stochastic": Quantizer(8, "per_row", "symmetric", "stochastic"),
    "per_tensor grid": Quantizer(8, "per_tensor", "grid"),
    "per_column": Quantizer(8, "per_column"),
}


@pytest.fixture(autouse=True)
def _two_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="quantize 512x512")
@pytest.mark.parametrize("name", ["clone", *QUANTIZERS])
def test_quantize(benchmark, name):
    x = torch.randn(512, 512)
    rng = torch.tensor([1, 0])
    call = x.clone if name == "clone" else lambda: products.quantized(x, QUANTIZERS[name], rng=rng, cols=True)
    benchmark(call)


@pytest.mark.benchmark(group="product 256x256x512")
@pytest.mark.parametrize("name", ["torch float32", "fqt scaled_mm"])
def test_scaled_mm(benchmark, name):
    x, w = torch.randn(256, 512), torch.randn(256, 512)
    a, b = (reference.quantize(t, QUANTIZERS["per_row"]).rows() for t in (x, w))
    benchmark((lambda: x @ w.t()) if name == "torch float32" else (lambda: products.product(a, b)))


@pytest.mark.benchmark(group="linear forward + backward, 256 x 512 -> 512")
@pytest.mark.parametrize("name", ["nn.Linear", "int8", "psq8", "bhq8"])
def test_linear_step(benchmark, name):
    layer = torch.nn.Linear(512, 512) if name == "nn.Linear" else fqt.nn.Linear(512, 512, recipe=name)
    x, dy = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        fqt.invalidate_(layer)  # the weight is quantized anew, as after an optimizer step
        layer(x).backward(dy)

    benchmark(step)
