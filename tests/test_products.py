"""Quantizations and products are launched as dispatch chooses, and say to it what their speed depends on."""

import pytest
import torch
from products import pair

import fqt
import fqt.gradients
import fqt.products
from fqt.dispatch import Choice
from fqt.recipe import Quantizer
from fqt_kernels import gemm_cublas, gradient, quantize


def launched(monkeypatch, choice, module, name, run):
    """The keyword arguments of the one call of a launcher, where dispatch makes this choice, and what `run` returns."""
    asked, seen = [], []
    launcher = getattr(module, name)
    for owner in (fqt.products, fqt.gradients):
        monkeypatch.setattr(owner, "choose", lambda *args, **kwargs: asked.append((args, kwargs)) or choice)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.append(kwargs) or launcher(*args, **kwargs))
    result = run()
    assert len(asked) == len(seen) == 1
    return asked[0], seen[0], result


@pytest.mark.parametrize("cols", [False, True])
@pytest.mark.parametrize(
    "kernel, config", [("", None), ("rows", None), ("long_rows", (32, 128, 8)), ("tile", (64, 32, 8))]
)
def test_a_quantization_is_launched_as_chosen(monkeypatch, kernel, config, cols, device):
    x = torch.randn(32, 48, device=device)
    choice = Choice("triton", config, "", kernel)
    (args, more), options, q = launched(
        monkeypatch, choice, quantize, "quantize", lambda: fqt.products.quantized(x, Quantizer(8, "per_row"), cols=cols)
    )
    assert args == ("quantize", x.device, 32, 48)
    assert more == {"dtype": x.dtype, "format": "int", "kind": f"per_row nearest {'both' if cols else 'rows'}"}
    assert (options["kernel"], options["tile"]) == (kernel or None, config)
    assert torch.equal(q.q.cpu(), fqt.reference.quantize(x.cpu(), Quantizer(8, "per_row")).q)


@pytest.mark.parametrize(
    "x, options, kind",
    [
        (torch.zeros(8, 16), dict(rows=False, cols=True), "per_row stochastic cols"),
        (torch.zeros(16, 8).t(), {}, "per_row stochastic rows strided"),
        (torch.zeros(8, 16), dict(row_absmax=torch.zeros(8, dtype=torch.int32)), "per_row stochastic rows stats"),
    ],
)
def test_the_kind_of_a_quantization_says_what_its_speed_depends_on(x, options, kind, monkeypatch, device):
    quantizer, rng = Quantizer(8, "per_row", rounding="stochastic"), torch.zeros(2, dtype=torch.int64, device=device)
    options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    run = lambda: fqt.products.quantized(x.to(device), quantizer, rng=rng, **options)  # noqa: E731
    (_, more), _, _ = launched(monkeypatch, Choice("triton", None, ""), quantize, "quantize", run)
    assert more["kind"] == kind


def test_both_quantizations_of_a_gradient_are_launched_as_chosen(monkeypatch, device):
    recipe = fqt.Recipe.parse("int8")
    dy, x, w = (torch.randn(shape).to(device) for shape in ((32, 48), (32, 16), (48, 16)))
    x, w = fqt.reference.quantize(x, recipe.x), fqt.reference.quantize(w, recipe.w)
    rng = torch.zeros(2, dtype=torch.int64, device=device)
    run = lambda: fqt.gradients.quantized_gradient(dy, w, x, recipe, False, rng=rng, rank=0)  # noqa: E731
    choice = Choice("triton", (64, 32, 8), "", "tile")
    (args, more), options, _ = launched(monkeypatch, choice, gradient, "quantize_gradient", run)
    assert args == ("quantize_gradient", dy.device, 32, 48) and more["kind"] == "per_row per_column"
    assert options["tile"] == (64, 32, 8)


@pytest.mark.parametrize("added", [False, True])
def test_a_product_is_launched_as_chosen(monkeypatch, added, device):
    """By the library too: a new output, or one that is added to, with its row maxima."""
    a, b = pair(33, 24, 48)
    want = fqt.reference.scaled_mm(a, b)
    a, b = (o._replace(q=o.q.to(device), scale=o.scale.to(device), sum=None) for o in (a, b))
    out = torch.ones(33, 24, device=device) if added else None
    row_absmax = torch.zeros(33, dtype=torch.int32, device=device) if added else None
    run = lambda: fqt.products.product(a, b, out=out, row_absmax=row_absmax)  # noqa: E731
    (args, more), _, c = launched(monkeypatch, Choice("triton", None, "", "cublas"), gemm_cublas, "scaled_mm", run)
    assert args[2:5] == (33, 24, 48) and more == {"format": "int", "plain": not added}
    assert (c is out) is added and torch.equal(c.cpu(), want + 1 if added else want)
    assert not added or torch.equal(row_absmax, c.abs().view(torch.int32).amax(1))
