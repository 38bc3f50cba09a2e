"""`fqt.nn.Conv1d`, `Conv2d`, `Conv3d`: torch's own convolutions in every respect but their products."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fqt
import fqt.nn
from fqt import conv_ops, conv_products, ops
from fqt.conv_nn import QUANTIZED
from fqt.recipe import Quantizer, Recipe

E4M3 = Recipe.fp8()
DELAYED = Recipe(
    x=Quantizer(8, "per_row"), w=Quantizer(8, "per_row"),
    dgrad=Quantizer(8, "per_row", "symmetric", "stochastic", range="delayed"),
    wgrad=Quantizer(8, "per_column", "symmetric", "stochastic"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_device(device):
    with torch.device(device):
        yield


def layer(n=2, channels=3, out=4, kernel=3, recipe="int8", **options):
    return (fqt.nn.Conv1d, fqt.nn.Conv2d, fqt.nn.Conv3d)[n - 1](channels, out, kernel, recipe=recipe, **options)


def images(n=2, channels=3, edge=6, batch=2, **options):
    return torch.randn(batch, channels, *range(edge, edge + n), **options)


def gradients(module, x, dy=None):
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def plain(module):
    """torch's own layer with the same weights."""
    return fqt.dequantize_(copy.deepcopy(module))


# ---- values


CASES = [
    (1, dict(kernel=4, padding="same")),  # one more pixel after than before
    (1, dict(kernel=3, stride=2, padding=1, dilation=2, sample="row")),
    (2, dict(kernel=(3, 2), padding="same", dilation=(1, 3))),
    (2, dict(kernel=3, stride=2, padding=(1, 2), channels=4, groups=2)),
    (2, dict(kernel=1, padding="valid", channels=16)),
    (2, dict(kernel=(2, 3), stride=(1, 2), padding=(0, 1), sample="row")),
    (3, dict(kernel=(1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2))),
]


@pytest.mark.parametrize(("n", "options"), CASES, ids=lambda v: str(v) if isinstance(v, int) else "")
def test_qat_is_the_plain_convolution_of_the_dequantized_operands(n, options):
    """Input and weight on their grids, and gradients in full precision: in float64 nothing else is rounded.

    By image a tensor of few levels is its own code; by row every window must be: the input is ±1 (no window is all 0).
    """
    x = Quantizer(8, "per_row", "symmetric")
    module = layer(n, recipe=Recipe(x=x, w=x), dtype=torch.float64, **options)
    inputs = images(n, module.in_channels, dtype=torch.float64).sign()
    other = plain(module)
    with torch.no_grad():
        other.weight.copy_(module.computed_weight())
    dy = torch.randn_like(other(inputs))
    for got, expected in zip(gradients(module, inputs, dy), gradients(other, inputs, dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # 2⁻⁵³ times sums of a few hundred terms
    step = module.weight.detach().flatten(1).abs().amax(1) / 127
    error = (module.computed_weight() - module.weight).flatten(1).abs().amax(1)
    assert bool((error <= step / 2 * (1 + 1e-9)).all()) and bool(error.any())


def test_every_pixel_has_a_scale_of_its_own_by_rows_and_the_image_one_by_images():
    """A bright pixel costs precision in all of its image, but only in the windows that see it."""
    x = torch.full((1, 1, 1, 8), 0.3)
    x[..., 0] = 1000.0
    by = {}
    for sample in ("image", "row"):
        module = layer(channels=1, out=1, kernel=1, bias=False, sample=sample)
        with torch.no_grad():
            module.weight.fill_(1.0)
            by[sample] = module(x).flatten()
    assert by["image"][1:].abs().max() == 0  # 0.3 is less than half of 1000 / 127
    # codes of ±127 for x and for w, each scale rounded three times (2⁻²⁴) in float32
    torch.testing.assert_close(by["row"], x.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 2])
def test_kernels_and_reference_give_the_same_layer(n):
    """The very bits in float32, but for the bias gradient, sums in another order (2⁻²⁴ of a partial sum each)."""
    module = layer(n, kernel=2, channels=2, out=3, recipe="psq4", padding="same")
    x = images(n, 2, edge=3)
    dy = torch.randn_like(module(x))
    found = []
    for backend in ("reference", "triton"):
        fqt.invalidate_(module)
        fqt.set_step(3)
        with fqt.backend(backend):
            found.append(gradients(module, x, dy))
    for name, a, b in zip(("y", "dx", "dw"), *found, strict=False):
        assert torch.equal(a, b), name
    torch.testing.assert_close(found[0][3], found[1][3], rtol=0, atol=1e-5)


def test_exact_is_torchs_own_with_any_padding_mode():
    for n in (1, 2, 3):
        module = layer(n, recipe="exact", padding=1, padding_mode="circular")
        x = images(n)
        assert all(torch.equal(a, b) for a, b in zip(gradients(module, x), gradients(plain(module), x), strict=True))


# ---- shapes and memory


@pytest.mark.parametrize(("n", "options"), CASES, ids=lambda v: str(v) if isinstance(v, int) else "")
@pytest.mark.parametrize("batch", [None, 0, 1])
def test_outputs_have_the_shape_of_torchs(n, options, batch):
    module = layer(n, **options)
    x = images(n, module.in_channels, batch=batch or 0 if batch != 1 else 1)
    x = torch.randn(x.shape[1:]) if batch is None else x
    y, dx, dw = gradients(module, x)[:3]
    assert y.shape == plain(module)(x).shape
    assert dx.shape == x.shape and dw.shape == module.weight.shape and torch.isfinite(dw).all()


@pytest.mark.parametrize("sample", ["image", "row"])
@pytest.mark.parametrize("of", ["", "x", "w"])
def test_memory_is_channels_last_where_the_input_or_the_weight_is(of, sample):
    module, last = layer(sample=sample), torch.channels_last
    module = module.to(memory_format=last) if of == "w" else module
    x = images().to(memory_format=last) if of == "x" else images()
    y, dx, dw, _ = gradients(module, x)
    expected = gradients(plain(module), x)
    assert y.stride() == expected[0].stride() and y.is_contiguous(memory_format=last) == bool(of)
    assert dw.stride() == expected[2].stride() == module.weight.stride()
    assert dx.shape == x.shape
    fqt.set_step(0)
    first = gradients(module, x)
    fqt.set_step(0)
    again = gradients(module, x.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # of other strides the same values


def test_conv3d_keeps_channels_last_3d_and_conv1d_is_contiguous():
    x = images(3).to(memory_format=torch.channels_last_3d)
    assert layer(3)(x).stride() == plain(layer(3))(x).stride()
    assert layer(1)(images(1)).is_contiguous()


# ---- dtypes and devices


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_torchs(n, dtype):
    assert {t.dtype for t in gradients(layer(n, dtype=dtype), images(n, dtype=dtype))} == {dtype}


@pytest.mark.parametrize("n", [2, 3])
def test_autocast_gives_the_dtypes_of_torchs(n, device):
    module, x = layer(n), images(n, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = module(x)
        y.sum().backward()
        assert y.dtype == plain(module)(x).dtype == torch.bfloat16
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.ones(2, 3, 6, 6, dtype=torch.int64), TypeError, r"stem\.0 \(3 → 4, 3×3\).*int64"),
        (torch.randn(2, 3, 6, 6, dtype=torch.float16), TypeError, r"stem\.0 .*float16.*float32"),
        (torch.randn(2, 5, 6, 6), ValueError, r"stem\.0 .*\(N, 3, H, W\).*\(2, 5, 6, 6\)"),
        (torch.randn(3, 6), ValueError, r"stem\.0 .*\(3, H, W\).*\(3, 6\)"),
        (torch.randn(2, 3, 6, 2), ValueError, r"stem\.0 .*kernel that spans \(3, 3\).*\(6, 2\)"),
        (torch.randn(2, 3, 0, 6), ValueError, r"stem\.0 .*no pixels"),
        (torch.randn(2, 3, 6, 6, device="meta"), ValueError, r"stem\.0 .*meta"),
    ],
)
def test_a_wrong_input_names_the_layer(x, error, says):
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 4, 3))})
    fqt.quantize_(model, "int8")
    with pytest.raises(error, match=says):
        model["stem"](x if x.is_meta else x.to(model["stem"][0].weight.device))


# ---- what cannot be quantized


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer(padding=1, padding_mode="reflect"), "fqt.nn.Conv2d .*padding_mode 'reflect'.*zeros"),
        (lambda: layer(3, channels=4, groups=2), "fqt.nn.Conv3d .*groups=2.*im2col"),
        (lambda: layer(channels=4, groups=2, sample="row"), "groups=2.*im2col"),
        (lambda: layer(recipe="fp8"), "fqt.nn.Conv2d .*e4m3"),
        (lambda: layer(3, recipe=E4M3), "e4m3"),
        (lambda: layer(recipe=DELAYED), "delayed"),
        (lambda: layer(sample="pixel"), "sample must be one of image, row, got 'pixel'"),
        (lambda: layer(3, sample="image"), "sample must be one of row, got 'image'"),
        (lambda: layer(recipe="psq9"), "unknown recipe"),
        (lambda: setattr(layer(), "recipe", "fp8"), "e4m3"),
        (lambda: setattr(layer(channels=4, groups=2), "sample", "row"), "groups=2"),
        (lambda: setattr(layer(recipe="exact", padding=1, padding_mode="reflect"), "recipe", "int8"), "reflect"),
    ],
)
def test_what_products_are_not_made_for_is_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_refused_recipe_leaves_the_layer_as_it_was():
    module = layer(recipe="psq4")
    with pytest.raises(ValueError):
        module.recipe = "fp8"
    assert module.recipe == Recipe.psq(4) and "recipe=psq4" in repr(module)


# ---- the weight's codes


@pytest.fixture
def counted(monkeypatch):
    """How often a weight was quantized, of convolutions by images or by rows."""
    calls = []
    for owner, name in ((conv_ops, "quantize_filters"), (ops, "quantize_weight")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=original, **k: calls.append(1) or _f(*a, **k))
    monkeypatch.setattr(conv_ops.ops, "quantize_weight", ops.quantize_weight)
    return calls


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_weight_is_quantized_once_per_version(n, counted):
    """Through `quantize_filters` a weight also passes `quantize_weight`: what counts is whether anything was done."""
    module, x = layer(n), images(n, requires_grad=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        counted.clear()
        module(x).sum().backward()
        assert counted
        counted.clear()
        module(x).sum().backward()  # accumulation
        with torch.no_grad():
            module(images(n, edge=7))  # of another size
        assert not counted
        optimizer.step()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_write_of_the_weight_is_seen(n):
    module, x = layer(n), images(n)

    def fresh():
        other = layer(n)
        other.load_state_dict(module.state_dict())
        return other(x)

    def writes():
        with torch.no_grad():
            module.weight.mul_(2)
        yield "in place"
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
        yield "load_state_dict"
        module.weight = nn.Parameter(torch.randn_like(module.weight))
        yield "a new Parameter"
        module.to(torch.bfloat16).to(torch.float32)
        yield "to(dtype) there and back"
        module(x).sum().backward()
        torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()
        yield "a fused optimizer, which does not advance the version"
        module.weight.data.mul_(3)
        fqt.invalidate_(module)
        yield "invalidate_"

    module(x)
    for what in writes():
        assert torch.equal(module(x), fresh()), what


def test_changing_the_sample_changes_the_codes():
    module, x = layer(), images()
    by_image = module(x)
    module.sample = "row"
    assert "sample=row" in repr(module)
    other = layer(sample="row")
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x)) and not torch.equal(module(x), by_image)


@pytest.mark.parametrize("n", [1, 2])
def test_only_codes_of_the_input_are_kept_and_in_evaluation_nothing(n, monkeypatch):
    module, x = layer(n, channels=16, out=16), images(n, 16, batch=16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
        large = [t for t in kept if t.numel() >= x.numel()]
        assert [t.dtype for t in large] == [torch.int8] and large[0].numel() == x.numel()
        kept.clear()
        written = []
        original = conv_products.quantized
        monkeypatch.setattr(conv_products, "quantized", lambda *a, **k: written.append(k["cols"]) or original(*a, **k))
        with torch.no_grad():
            module(x)
        module.requires_grad_(False)(x.detach())
    assert not kept and written == [False, False]  # nor were codes written that nobody reads


def test_a_second_derivative_raises():
    module, x = layer(), images(requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def test_a_gradient_added_to_in_the_kernel_is_the_sum_of_the_gradients():
    """In place for contiguous weights by images; by rows autograd adds. In float32 the very bits either way."""
    for sample, n, same in (("image", 2, True), ("row", 2, False), ("image", 1, False)):
        found = []
        for fused in (False, True):
            module = layer(n, sample=sample, fuse_grad_accumulation=fused, bias=False)
            module.weight.data.copy_(torch.linspace(-1, 1, module.weight.numel()).view_as(module.weight))
            fqt.manual_seed(0)
            module._fqt_key_name = "same"
            fqt.manual_seed(0)
            x = torch.linspace(-1, 2, 2 * 3 * 6**n).view(2, 3, *[6] * n)
            module(x).sum().backward()
            first = module.weight.grad
            module(x).sum().backward()
            found.append(module.weight.grad)
        assert torch.equal(*found) and (not same or found[1] is first)


# ---- torch's own layer in every other respect


@pytest.mark.parametrize("n", [1, 2, 3])
def test_copies_and_pickles_compute_the_same_and_are_independent(n):
    module, x = nn.Sequential(layer(n, recipe="psq4")), images(n)
    module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    fqt.set_step(2)  # reaches the copies too
    expected = gradients(module[0], x)
    for other in copies:
        assert other[0].recipe == module[0].recipe and other[0].sample == module[0].sample
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients(other[0], x), strict=True))
        with torch.no_grad():
            other[0].weight.zero_()
        assert bool(module[0].weight.any())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_state_dict_both_ways_and_weights_only(n):
    module, other = layer(n), plain(layer(n))
    assert list(module.state_dict()) == list(other.state_dict()) == ["weight", "bias"]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    module.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(module.weight, other.weight)


def test_a_layer_built_on_meta_gets_the_stream_it_would_have_had(device):
    made = nn.Sequential(nn.Conv2d(3, 4, 3))
    fqt.quantize_(made, "psq4")
    for assign in (False, True):
        module = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"))
        fqt.quantize_(module, "psq4")
        assert module(torch.randn(2, 3, 6, 6, device="meta")).shape == (2, 4, 4, 4)
        if not assign:
            module.to_empty(device=device)
        module.load_state_dict(made.state_dict(), strict=True, assign=assign)
        module.to(device)
        assert torch.equal(module[0]._fqt_rng.cpu(), made[0]._fqt_rng.cpu())
        module(images()).sum().backward()
        assert module[0]._fqt_rng[1] == 1


def test_layers_are_torchs_own_types_and_draw_from_streams_of_their_own():
    assert {c.__name__ for c in QUANTIZED} == {"Conv1d", "Conv2d", "Conv3d"}
    for kind, quantized in QUANTIZED.items():
        assert issubclass(quantized, kind) and getattr(fqt.nn, kind.__name__) is quantized
    a, b = layer(), layer()
    assert not torch.equal(a._fqt_rng, b._fqt_rng) and list(a.state_dict()) == ["weight", "bias"]
    state = fqt.get_rng_state(nn.Sequential(a))
    a(images()).sum().backward()
    assert a._fqt_rng[1] == 1
    fqt.set_rng_state(nn.Sequential(a), state)
    assert a._fqt_rng[1] == 0


class ByImagesAndRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv1d(2, 3, 3), nn.Conv2d(3, 4, (1, 2)), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.third(self.second(self.first(x)[:, :, None]))


def test_compiled_training_repeats_eager_training_bit_for_bit():
    """fullgraph with AOT autograd, by images of a Conv1d and a Conv2d and by rows."""

    def train(compiled):
        torch.manual_seed(1)
        model = ByImagesAndRows()
        fqt.quantize_(model, "psq4")
        model.third.sample = "row"
        fqt.manual_seed(5)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        x = torch.randn(2, 2, 7)
        run(x).square().mean().backward()
        return [p.grad for p in model.parameters()] + [model.first._fqt_rng]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


# ---- the rest of the library


def test_other_modules_see_quantized_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    fqt.quantize_(model, "int8")
    conv, x = model[0], images(edge=6)[..., :6]

    def loss(m):
        return m(x).square().mean()

    before = conv._fqt_rng.clone()
    assert 0 < fqt.demo.gradient_variance(model, loss, draws=3) < 1  # of both layers
    only = nn.Sequential(conv, nn.Flatten())
    assert 0 < fqt.demo.gradient_variance(only, loss, draws=3) < 1
    assert torch.equal(conv._fqt_rng, before)
    target = fqt.targets.FakeQuantized(model)
    torch.testing.assert_close(target(conv.weight), conv.computed_weight(), rtol=0, atol=0)
    assert target(conv.bias) is None
    with pytest.raises(ValueError, match=r"0 is a fqt.nn.Conv2d, .* make it a nn.Conv2d"):
        fqt.lsq_(model)
    report = fqt.hold_int8_(model)
    assert report.held == ("2",) and "Conv2d: only matrices are held" in report.skipped["0"]
    fqt.release_int8_(model)
    y = model(x)
    assert [w.unchanged for w in fqt.round_weights_(model, 2).weights] == ["", ""]
    assert not torch.equal(model(x), y)
    with fqt.recording(model) as records:
        loss(model).backward()
    assert list(records.layers) == ["0", "2"] and records.layers["0"].wgrad.passes == 1
    fqt.dequantize_(model)
    assert type(conv) is nn.Conv2d and not [n for n in vars(conv) if "fqt" in n or n == "fuse_grad_accumulation"]


def test_an_optimizer_of_fqt_leaves_the_codes_of_a_convolution_to_the_layer():
    """Its kernel writes the codes of linear layers; a convolution quantizes its new weight itself."""
    module, x = layer(), images()
    optimizer = fqt.optim.PSGD([module.weight], lr=0.5)
    module(x).sum().backward()
    with fqt.backend("triton"):
        optimizer.step()
    other = layer()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))


# ---- weights that are not there to stay


@pytest.mark.parametrize("recipe", ["int8", "psq8"])
def test_training_goes_on_after_inference_mode(recipe):
    """The codes that evaluation left are saved for the backward pass of a layer whose input needs no gradient."""
    for layer, x in (
        (fqt.nn.Conv2d(3, 4, 3, recipe=recipe), torch.randn(2, 3, 5, 5)),
        (fqt.nn.Linear(3, 4, recipe=recipe), torch.randn(2, 3)),
    ):
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y, expected) and layer.weight.grad.any()


def test_a_weight_passed_in_for_a_call_is_quantized_in_every_call():
    """Its address is another one's as soon as it is gone, and the version of both is 0."""
    layer, x = fqt.nn.Conv2d(2, 3, 3, recipe="psq8"), torch.ones(1, 2, 3, 3)
    with torch.no_grad():
        for i in range(1, 20):
            w = torch.full((3, 2, 3, 3), float(i))
            y = torch.func.functional_call(layer, {"weight": w, "bias": torch.zeros(3)}, (x,))
            del w
            torch.testing.assert_close(y.flatten(), torch.full((3,), 18.0 * i))


def test_a_transposed_sequence_gives_contiguous_memory_as_torch_does():
    x = torch.randn(2, 10, 4).transpose(1, 2)
    assert nn.Conv1d(4, 6, 3)(x).is_contiguous() and fqt.nn.Conv1d(4, 6, 3)(x).is_contiguous()


@pytest.mark.parametrize("recipe", ["int8", "psq8"])
@pytest.mark.parametrize("channels", [16, 19])
def test_a_1x1_convolution_is_a_product_of_matrices(recipe, channels, monkeypatch):
    """As reports say, also where padded channels would count as terms of an offset."""
    layer, x = fqt.nn.Conv2d(channels, 5, 1, recipe=recipe), torch.randn(2, channels, 3, 2, requires_grad=True)
    expected = layer(x)
    monkeypatch.setattr(conv_products, "_implicit_product", None)
    with fqt.backend("triton"):
        found = layer(x)
        found.sum().backward()
    assert torch.equal(found, expected)
