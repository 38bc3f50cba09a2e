"""Collecting: the problems are those that the operators ask dispatch for, without memory and without running anything."""

import json
import sys
import textwrap
from collections import Counter

import pytest
import torch
from torch import nn

import fqt
from fqt import collect, conv, dispatch, gradients, products, tuned
from fqt.cli import UsageError
from fqt.collect import Target, of_layers, of_model, read_shapes, recording
from fqt.suites import Layer

H100 = Target("sm90", 132)
CPU = Target("", 1, "cpu")
RECIPES = ["int8", "fp8", "qat8", "ptq4", "psq8", "bhq8", "auto5-tile"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """model(code) is the --model of a module with this code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(code: str) -> str:
        name = f"made_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\nimport fqt\n" + textwrap.dedent(code))
        return f"{name}:make"

    yield write
    for name in [name for name in sys.modules if name.startswith("made_")]:
        del sys.modules[name]


def asked(problem):
    """What of a problem does not depend on the device."""
    return problem.op, problem.m, problem.n, problem.k, problem.dtype, problem.format, problem.kind


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_recorded_is_what_a_real_step_asks_for(recipe, device, monkeypatch):
    """The layer runs for real, without a GPU in the interpreter, while a spy listens at dispatch."""
    heard: Counter = Counter()
    choose = products.choose

    def spy(op, device, m, n, k=0, dtype=None, **more):
        if op in tuned.OPS:
            heard[asked(dispatch.problem(op, device, m, n, k, dtype, **more))] += 1
        return choose(op, device, m, n, k, dtype, **more)

    for owner in (products, gradients):
        monkeypatch.setattr(owner, "choose", spy)
    layer = fqt.nn.Linear(16, 8, bias=False, recipe=recipe, dtype=torch.bfloat16, device=device)
    x = torch.randn(4, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    with dispatch.backend("triton"):
        y = layer(x)
        y.backward(torch.randn_like(y))
    monkeypatch.undo()
    with recording(CPU) as met:
        collect._train(Layer("", 4, 8, 16), fqt.Recipe.parse(recipe), torch.bfloat16)
    assert Counter({asked(problem): count for problem, count in met.items()}) == heard


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_of_one_layer_poses_the_problems_of_its_shape(model, recipe):
    spec = model(f"""
        def make():
            layer = fqt.nn.Linear(320, 96, recipe={recipe!r}, dtype=torch.bfloat16)
            return layer, torch.randn(4, 50, 320, dtype=torch.bfloat16, requires_grad=True)
    """)
    assert of_model(spec, H100).problems == of_layers([Layer("", 200, 96, 320)], H100, [recipe])


def test_what_was_replaced_is_put_back_whatever_happens():
    before = products.choose, gradients.choose, nn.Module._apply
    with pytest.raises(ZeroDivisionError), recording(H100):
        assert products.choose is not before[0]
        raise ZeroDivisionError
    with pytest.raises(UsageError):
        of_model("json:loads", H100)
    assert before == (products.choose, gradients.choose, nn.Module._apply)


def test_a_model_that_no_memory_holds_is_collected(model):
    spec = model("""
        def make():
            return nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 64)), torch.randn(1 << 16, 1 << 20)
    """)
    found = of_model(spec, H100)
    assert found.layers == 2
    assert (1 << 20, 1 << 20, 1 << 16) in {(p.m, p.n, p.k) for p in found.problems}


def test_the_first_layer_needs_no_gradient_of_its_input(model):
    spec = model("def make(): return nn.Linear(64, 32), torch.randn(128, 64)")
    shapes = [(p.m, p.n, p.k) for p in of_model(spec, H100).problems if p.op == "scaled_mm"]
    assert sorted(shapes) == [(32, 64, 128), (128, 32, 64)]  # wgrad, fprop


def test_layers_of_one_shape_are_counted_not_repeated(model):
    spec = model("def make(): return nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))), torch.randn(32, 64)")
    found = of_model(spec, H100)
    keys = [tuned.key(problem) for problem in found.problems]
    assert found.layers == 5 and len(set(keys)) == len(keys)
    # fprop and dgrad of 32x64x64 share a key: 5 and, but for the first layer, 4; wgrad 5.
    assert sorted(count for p, count in found.problems.items() if p.op == "scaled_mm") == [5, 9]


def test_sizes_of_one_bucket_are_one_problem_the_first():
    found = of_layers([Layer("a", 4090, 512, 256), Layer("b", 4096, 512, 256), Layer("c", 4097, 512, 256)], H100)
    assert [(p.m, count) for p, count in found.items() if (p.op, p.n, p.k) == ("scaled_mm", 512, 256)] == [
        (4090, 2),
        (4097, 1),
    ]


def test_recipes_quantize_what_is_not_and_replace_what_is(model):
    plain = model("def make(): return nn.Linear(64, 32), torch.randn(128, 64)")
    quantized = model("def make(): return fqt.nn.Linear(64, 32, recipe='fp8'), torch.randn(128, 64)")

    def formats(spec, recipes=None):
        return {problem.format for problem in of_model(spec, H100, recipes).problems}

    assert formats(plain) == {"int"} and formats(quantized) == {"e4m3"}
    assert formats(plain, ["fp8"]) == {"e4m3"} and formats(quantized, ["int8"]) == {"int"}
    assert formats(plain, ["int8", "fp8"]) == {"int", "e4m3"}


def test_convolutions_and_foreign_layers_are_named_with_the_reason(model):
    spec = model("""
        def make():
            stem = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3))
            model = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16))
            return model, torch.randn(2, 3, 32, 32)
    """)
    found = of_model(spec, H100)
    assert found.layers == 1 and found.notes == [
        "2 layers skipped (0.0, 0.2): transposed convolutions are not quantized"
    ]


def test_a_step_of_the_users_own_with_autocast_and_inputs_by_name(model):
    step = model("""
        def make():
            model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)), torch.randn(128, 64)
            def step():
                with torch.autocast(x.device.type, torch.bfloat16):
                    loss = model(x).float().square().mean()
                loss.backward()
            return model, step
    """)
    dtypes = {(p.op, p.m, p.n): p.dtype for p in of_model(step, H100).problems if p.op != "scaled_mm"}
    assert dtypes["quantize", 128, 64] == "float32"  # the input as it is
    assert dtypes["quantize", 128, 32] == "bfloat16"  # what autocast made of the first layer's output
    assert dtypes["quantize_gradient", 128, 16] == "bfloat16"
    named = model("def make(): return nn.Linear(64, 32), {'input': torch.randn(128, 64)}")
    assert of_model(named, H100).layers == 1


@pytest.mark.parametrize("recipe", ["int8", "psq4", "bhq4", "qat8"])
def test_of_convolutions_what_can_be_tuned_is_collected(model, recipe):
    """Of each the products that its recipe quantizes, and the matrix products that some are: of 1x1 in all three directions,
    of few channels by im2col (symmetric X)."""
    spec = model("""
        def make():
            layers = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, stride=2, groups=4)
            return nn.Sequential(*layers), torch.randn(32, 3, 8, 8)
    """)
    kept = [len(constants) for constants in (conv._borders, conv._insides)]
    found = of_model(spec, H100, [recipe])
    assert found.layers == 3 and not found.notes
    # What has no data would serve every later step.
    assert [len(constants) for constants in (conv._borders, conv._insides)] == kept
    products = {(p.m, p.n, p.k) for p in found.problems if p.op == "scaled_mm"}
    expected = {(32 * 64, 64, 32)}
    expected |= {(32 * 64, 32, 32)} if recipe == "int8" else set()
    expected |= {(32 * 64, 32, 64), (64, 32, 64 * 32)} if recipe != "qat8" else set()
    assert products == expected
    ops = {"quantize", "scaled_mm", "arrange_filters", "quantize_images", "conv"}
    ops |= {"conv_wgrad"} if recipe != "qat8" else set()
    assert {p.op for p in found.problems} == ops | (
        {"quantize_gradient_images"} if recipe in ("int8", "psq4") else set()
    )
    kinds = {p.kind for p in found.problems if p.op == "conv"}
    assert {"contiguous", "9 taps contiguous", "4 groups 9 taps 2x2 stride contiguous"} <= kinds
    backward = {"dgrad contiguous", "dgrad 4 groups 9 taps 2x2 stride contiguous"}  # the first layer has none
    assert backward <= kinds if recipe in ("int8", "psq4") else not {k for k in kinds if k.startswith("dgrad 9 taps")}


def test_inputs_are_a_tensor_or_a_tuple_of_several(model):
    spec = model("""
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(64, 32)
            def forward(self, a, b):
                return {"out": self.layer(a + b), "size": len(a)}
        def make():
            return Sum(), (torch.randn(128, 64), torch.randn(64))
    """)
    assert of_model(spec, H100).layers == 1


def test_models_may_be_moved_and_converted_and_stay_tied(model):
    spec = model("""
        def make():
            model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
            model[2].weight = model[0].weight
            model = model.half().to(torch.get_default_device()).to(torch.bfloat16)
            assert model[2].weight is model[0].weight and model[1].running_mean.dtype is torch.bfloat16
            return model, torch.randn(32, 64, dtype=torch.bfloat16)
    """)
    assert {p.dtype for p in of_model(spec, H100).problems if p.op != "scaled_mm"} == {"bfloat16"}


@pytest.mark.parametrize(
    "code, says",
    [
        ("def make(): return nn.Linear(3, 4)", r"must return \(model, inputs\) or \(model, step\), got Linear"),
        ("def make(): return 1, 2, 3", "got tuple of 3"),
        ("make = 3", "has no function 'make'"),
        ("def other(): pass", "has no function 'make'"),
        ("def make(): return nn.ConvTranspose2d(3, 4, 3), torch.randn(1, 3, 8, 8)", "nothing to quantize: 1 layer skipped"),
        ("def make(): return nn.ReLU(), torch.randn(3)", "nothing to quantize: the model has no nn.Linear"),
        ("def make(): return nn.Linear(3, 4), lambda: None", "met no quantized layer"),
        ("def make(): return nn.Linear(3, 4), torch.randn(2, 5)", "ValueError: .*expected input .*3.*got"),
        ("def make():\n    return {}['width']", r"made_0\.py:5: KeyError: 'width'"),
        ("raise RuntimeError('at import')", r"made_0\.py:4: RuntimeError: at import"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def make():\n    m = nn.Linear(3, 4)\n    return m, lambda: m(torch.randn(2, 3)).sum().item()",
         r"made_0\.py:6: DataDependent.*without data"),
        ("def make():\n    m = fqt.nn.Linear(3, 4)\n    m.requires_grad_(False)\n    return m, torch.randn(2, 3)",
         "no output of the model has a gradient"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_is_one_line(model, code, says):
    with pytest.raises(UsageError, match=says) as e:
        of_model(model(code), H100)
    assert "\n" not in str(e.value) and str(e.value).startswith("--model made_0:make: ")


@pytest.mark.parametrize("spec", ["", "module", ":make", "module:", "no_such_module_of_this_name:make"])
def test_a_model_that_cannot_be_found_is_named(spec):
    with pytest.raises(UsageError, match="--model"):
        of_model(spec, H100)


def test_an_unknown_recipe_or_dtype_is_named():
    with pytest.raises(ValueError, match="unknown recipe 'int7'"):
        of_layers([], H100, ["int7"])
    with pytest.raises(ValueError, match="got 'float8'"):
        of_layers([], H100, dtype="float8")
    assert of_layers([Layer("a", 8, 8, 8)], H100, ["exact"]) == {}


def test_shapes_are_read_from_a_file(tmp_path):
    (tmp_path / "shapes.json").write_text('[{"name": "mlp", "m": 8192, "n": 28672, "k": 4096}]')
    assert read_shapes(tmp_path / "shapes.json") == [Layer("mlp", 8192, 28672, 4096)]


GOOD = {"name": "mlp", "m": 1, "n": 2, "k": 3}


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "not JSON"),
        ("[{", "not JSON"),
        ("{}", "a list of layers"),
        ("[]", "a list of layers"),
        ("[3]", "layer 1: .*got 3"),
        (json.dumps([GOOD, GOOD | {"m": 0}]), "layer 2: m must be .*got 0"),
        (json.dumps([GOOD | {"n": True}]), "layer 1: n must be .*got True"),
        (json.dumps([GOOD | {"k": 2.5}]), "layer 1: k must be .*got 2.5"),
        (json.dumps([GOOD | {"k": 1 << 31}]), "layer 1: k must be"),
        (json.dumps([GOOD | {"name": 7}]), "layer 1: name must be a string, got 7"),
        (json.dumps([GOOD | {"count": 7}]), "layer 1: .*got the fields .*'count'"),
        (json.dumps([{"name": "x"}]), "layer 1: .*got the fields 'name'"),
    ],
)
def test_what_is_wrong_with_a_file_of_shapes_is_named(tmp_path, content, says):
    (tmp_path / "shapes.json").write_text(content)
    with pytest.raises(UsageError, match=rf"--shapes .*shapes\.json: {says}"):
        read_shapes(tmp_path / "shapes.json")


def test_a_file_of_shapes_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--shapes .*none\.json: No such file"):
        read_shapes(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(UsageError, match="not JSON"):
        read_shapes(tmp_path / "bytes.json")
