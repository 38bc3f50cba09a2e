"""`fqt.recording()`: what it records of which layer and when, and that training does not notice."""

import contextlib
import copy
import gc
import json
import threading
import time

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fqt
import fqt.nn
from fqt import reference, telemetry
from fqt.recipe import Quantizer, Recipe
from fqt.variance import measured


@pytest.fixture(autouse=True)
def _on_device(device):
    with torch.device(device):
        yield


@pytest.fixture(autouse=True, scope="module")
def _others_are_left_out():
    """What lives before the first test is not gone through by the collection before each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _alone():
    """No layers of other tests live, and no recording outlives a test."""
    gc.collect()
    yield
    assert telemetry._active == ()


class Net(nn.Module):
    def __init__(self, recipe="psq4"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 6)
        fqt.quantize_(self, recipe)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def backward(model, times=1, scale=1.0):
    x = X.to(next(model.parameters()).device).requires_grad_()
    for _ in range(times):
        (model(x).square().sum() * scale).backward()


def passes(records):
    return {name: tuple(None if r is None else r.passes for r in layer) for name, layer in records.layers.items()}


def statistics(records):
    return {name: [r.statistics for r in layer] for name, layer in records.layers.items()}


# ---- what is recorded


@pytest.mark.parametrize("recipe", ["ptq4", "psq5", "bhq4", "auto4-tile", "int8", "fp8"])
def test_a_record_is_what_was_measured_of_the_codes_that_the_layer_used(recipe):
    """The last layer's dY is known: dgrad's and wgrad's codes of it, by the reference, from the same random state."""
    model = Net(recipe)
    r, state = model.fc2.recipe, model.fc2._fqt_rng.clone()
    hidden = torch.relu(model.fc1(X.to(state.device))).detach().requires_grad_()
    y = model.fc2(hidden)
    dy = torch.randn_like(y) * torch.randn(16, 1).exp()
    with fqt.recording(model) as records:
        y.backward(dy)
    xq, wq = reference.quantize(hidden.detach(), r.x), reference.quantize(model.fc2.weight.detach(), r.w)
    multipliers = (wq.scale.t(), xq.scale) if r.x.granularity == "per_row" else (None, None)
    for product, q, stream, m in zip(("dgrad", "wgrad"), (r.dgrad, r.wgrad), (0, 1), multipliers, strict=True):
        random, transform = dict(rng=state, stream=stream), None
        if q.householder:
            transform, codes = reference.householder_codes(dy, q, **random)
        else:
            codes = reference.quantize(dy, q, multiplier=m, **random)
        expected, _ = measured(product, dy, m, q, codes, transform)
        record = getattr(records.layers["fc2"], product)
        assert record.passes == 1 and record.nonfinite_passes == 0
        # The same operations on the same numbers, or on equal codes by the kernels.
        assert {k: s.mean for k, s in record.statistics.items()} == {k: float(v) for k, v in expected.items()}


def test_the_groups_of_the_kernels_make_the_same_record():
    """They are int32, with the rows' ranges beside them."""
    layer, quantizer = fqt.nn.Linear(12, 6), Recipe.bhq(4, "tile").dgrad
    dy = torch.randn(150, 6) * torch.randn(150, 1).exp()
    dy[3] = 0.25
    transform, codes = reference.householder_codes(dy, quantizer, rng=layer._fqt_rng)
    groups = tuple(t.to(torch.int32) for t in transform.groups[:3]) + transform.groups[3:]
    ranges = dy.amax(1) - dy.amin(1)
    records = []
    for more in ((transform,), (groups, ranges)):
        with fqt.recording(layer) as r:
            telemetry.record("dgrad", layer._fqt_rng, dy, None, quantizer, codes, *more)
        records.append(r.layers["(the model)"].dgrad)
    assert records[0] == records[1]


def test_statistics_are_the_sum_mean_least_and_largest_of_the_passes():
    model = Net()
    with fqt.recording(model) as records:
        for scale in (2.0, 1.0, 4.0):
            backward(model, scale=scale)
    norm = records.layers["fc2"].dgrad["norm2"]
    # dY is multiplied by powers of two, which is exact, as are float64's sums of the squares of few bits but for 1e-15.
    assert norm.largest == pytest.approx(16 * norm.least, rel=1e-14)
    assert norm.total == pytest.approx((4 + 1 + 16) * norm.least, rel=1e-14) and norm.mean == norm.total / 3


def test_what_is_derived_is_quotients_of_sums():
    model = Net("auto3")
    with fqt.recording(model) as records:
        backward(model, 2)
    r = records.layers["fc2"].dgrad
    assert r.relative("empirical") == r["empirical"].total / r["norm2"].total
    assert r.range_ratio == r["range_largest"].mean / r["range_median"].mean
    assert r.transformed == (
        r["groups_transformed"].total / r["groups"].total,
        r["rows_transformed"].total / r["rows"].total,
    )
    assert r.group_size == r["rows"].total / r["groups"].total
    assert records.layers["fc2"].wgrad.transformed is None and records.layers["fc2"].wgrad.group_size is None


def test_a_pass_that_is_not_finite_is_counted_and_left_out():
    model = Net("bhq4")
    with fqt.recording(model) as clean:
        backward(model)
    fqt.set_step(0, model)
    with fqt.recording(model) as records:
        backward(model)
        backward(model, scale=float("nan"))
    r = records.layers["fc2"].dgrad
    assert (r.passes, r.nonfinite_passes, r.nonfinite_rows) == (2, 1, 16)
    assert r.statistics == clean.layers["fc2"].dgrad.statistics
    with fqt.recording(model) as records:
        backward(model, scale=float("inf"))
    assert json.loads(records.to_json())["layers"]["fc2"]["dgrad"]["statistics"]["norm2"]["mean"] is None
    assert "16 rows, 1 passes" in str(records)


def test_products_in_full_precision_have_no_record():
    recipe = Recipe(x=Quantizer(), w=Quantizer(), wgrad=Quantizer(8, "per_tensor", "symmetric", "stochastic"))
    model = Net({"fc1": "qat8", "fc2": recipe})
    with fqt.recording(model) as records:
        backward(model)
    assert passes(records) == {"fc2": (None, 1)}


def test_a_record_restarts_where_the_quantizer_changes():
    model = Net("psq4")
    with fqt.recording(model) as records:
        backward(model, 3)
        model.fc1.recipe = "bhq5"
        backward(model)
    assert passes(records) == {"fc1": (1, 4), "fc2": (4, 4)}
    assert records.layers["fc1"].dgrad.quantizer == "bhq5"


# ---- training does not notice


@pytest.mark.parametrize("recipe", ["ptq4", "auto4", "bhq3-tile", "int8", "fp8"])
def test_training_is_the_same_with_and_without(recipe):
    """Weights, random streams and torch's generator, to the bit, after five steps, and gradients added in place."""

    def train(context):
        fqt.manual_seed(5)
        torch.manual_seed(3)
        model = Net(recipe)
        for layer in (model.fc1, model.fc2):
            layer.fuse_grad_accumulation = True
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with context(model):
            for _ in range(5):
                optimizer.zero_grad()
                backward(model, 2)
                optimizer.step()
        streams = [layer._fqt_rng for layer in (model.fc1, model.fc2)]
        return [*model.parameters(), *streams, torch.get_rng_state()]

    for a, b in zip(train(contextlib.nullcontext), train(fqt.recording), strict=True):
        assert torch.equal(a, b)


def test_tensors_without_data_or_elements_are_not_recorded():
    rng = Net().fc1._fqt_rng
    with fqt.recording() as records:
        for dy in (FakeTensorMode().from_tensor(X), torch.empty(4, 4, device="meta"), torch.empty(0, 4)):
            telemetry.record("dgrad", rng, dy, None, Quantizer(), None)
    assert records.layers == {} and records.unknown == 0


def test_a_backward_pass_cannot_be_captured_while_recording(device, monkeypatch):
    model = Net()
    backward(model)
    if device == "cpu":
        monkeypatch.setattr(telemetry, "_capturing", lambda t: True)
        capture = contextlib.nullcontext()
    else:
        torch.cuda.synchronize()
        capture = torch.cuda.graph(torch.cuda.CUDAGraph())
    x = X.to(device)  # a capture takes no copy from the host
    with fqt.recording() as records, pytest.raises(RuntimeError, match="captured in a CUDA graph"), capture:
        model(x).square().sum().backward()
    assert records.layers == {} and records.unknown == 0


# ---- which layers, and when


def test_layers_are_named_as_in_the_model_and_in_its_order():
    model = nn.Sequential(Net(), nn.ReLU(), nn.Linear(6, 3))
    fqt.quantize_(model[2], "ptq4")
    with fqt.recording(model) as records:
        backward(model)
    assert list(records.layers) == ["0.fc1", "0.fc2", "2"]
    with fqt.recording(model[2]) as records:
        backward(model)
    assert list(records.layers) == ["(the model)"]


def test_without_a_model_every_layer_is_recorded_under_a_name_of_its_own():
    a, b, direct = Net(), Net(), fqt.nn.Linear(12, 4)
    with fqt.recording() as records:
        backward(a)
        backward(b)
        backward(direct)
        later = Net()
        backward(later)
    assert list(records.layers) == ["fc2", "fc1", "fc2 #2", "fc1 #2", direct._fqt_key_name, "fc2 #3", "fc1 #3"]


def test_only_the_models_layers_are_recorded_also_after_they_moved():
    a, b = Net(), Net()
    with fqt.recording(a) as records:
        backward(a)
        backward(b)
        a.double()
        for layer in (a.fc1, a.fc2):  # as a move to another device leaves it
            layer._fqt_rng = layer._fqt_rng.clone()
        a.float()
        backward(a)
    assert passes(records) == {"fc1": (2, 2), "fc2": (2, 2)}


def test_an_address_that_another_layer_took_over_is_that_layers():
    """The table of addresses is looked at again where the layer that it names has moved."""
    a, b = Net(), Net()
    with fqt.recording() as records:
        backward(a)
        a.fc1._fqt_rng, b.fc1._fqt_rng = b.fc1._fqt_rng, a.fc1._fqt_rng
        backward(b)
    assert passes(records) == dict.fromkeys(("fc1", "fc2", "fc1 #2", "fc2 #2"), (1, 1))


def test_a_layer_is_known_by_a_copy_of_its_stream_unless_another_has_the_same():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")  # copies what an operator mutates
    with fqt.recording(model) as records:
        backward(compiled)
    assert passes(records) == {"fc1": (1, 1), "fc2": (1, 1)}
    twin = copy.deepcopy(model)
    with fqt.recording(model) as records:
        backward(compiled)
    assert records.layers == {} and records.unknown == 4
    assert "4 quantized gradients are missing" in str(records)
    del twin


def test_every_records_the_first_of_so_many_passes():
    model = Net()
    with fqt.recording(model, every=3) as records:
        for i in range(7):
            backward(model, scale=1.0 + i)
    assert passes(records) == {"fc1": (3, 3), "fc2": (3, 3)}
    norm = records.layers["fc2"].dgrad["norm2"]
    # Passes of scale 1, 4 and 7; the forward pass draws no random number.
    assert norm.total / norm.least == pytest.approx(1 + 16 + 49, rel=1e-6)


def test_nested_recordings_each_get_every_pass_of_theirs():
    model = Net()
    with fqt.recording(model) as outer:
        backward(model)
        with fqt.recording(model.fc1, every=2) as inner:
            backward(model, 2)
        backward(model)
    assert passes(outer) == {"fc1": (4, 4), "fc2": (4, 4)}
    assert passes(inner) == {"(the model)": (1, 1)}


def test_overlapping_recordings_end_each_for_itself():
    model = Net()
    first, second = fqt.recording(model), fqt.recording(model)
    a, b = first.__enter__(), second.__enter__()
    backward(model)
    first.__exit__(None, None, None)
    backward(model)
    second.__exit__(None, None, None)
    assert passes(a)["fc1"] == (1, 1) and passes(b)["fc1"] == (2, 2)


def test_passes_of_several_threads_are_recorded_one_at_a_time(monkeypatch):
    inside, most = [], []

    def slowly(*arguments):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return measured(*arguments)

    monkeypatch.setattr(telemetry, "measured", slowly)
    models = [Net(recipe) for recipe in ("psq4", "bhq4", "int8", "ptq4")]
    with fqt.recording() as records:
        threads = [threading.Thread(target=backward, args=(model, 5)) for model in models]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert list(passes(records).values()) == [(5, 5)] * 8
    assert max(most) == 1


def test_an_exception_ends_the_recording():
    model = Net()
    with pytest.raises(KeyError), fqt.recording(model) as records:
        backward(model)
        raise KeyError
    backward(model)
    assert passes(records) == {"fc1": (1, 1), "fc2": (1, 1)}


def test_a_pass_that_failed_is_no_record(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    model = Net()
    monkeypatch.setattr(telemetry, "measured", out_of_memory)
    with fqt.recording(model) as records, pytest.raises(torch.OutOfMemoryError):
        backward(model)
    assert records.layers == {}


def test_a_mistake_is_named():
    with pytest.raises(TypeError, match=r"model must be .* or None, got str"), fqt.recording("fc1"):
        pass
    with pytest.raises(ValueError, match="Linear has no quantized layer"), fqt.recording(nn.Linear(2, 2)):
        pass
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="every must be an integer of at least 1"), fqt.recording(every=every):
            pass


# ---- reading


def test_the_sums_take_memory_that_passes_do_not_add_to():
    model = Net("auto4")
    with fqt.recording(model) as records:
        backward(model)
        sizes = [sums._values.numel() for sums in records._sums.values()]
        backward(model, 5)
        assert [sums._values.numel() for sums in records._sums.values()] == sizes
    assert len(sizes) == 4 and max(sizes) * 8 < 1024


def test_json_holds_every_number():
    model = Net("auto4")
    with fqt.recording(model, every=2) as records:
        backward(model)
    data = json.loads(records.to_json())
    assert (data["every"], data["unknown"], list(data["layers"])) == (2, 0, ["fc1", "fc2"])
    for name, layer in records.layers.items():
        for product, record in layer._asdict().items():
            read = data["layers"][name][product]
            assert read["quantizer"] == record.quantizer and read["passes"] == record.passes == 1
            assert read["statistics"] == {k: s._asdict() for k, s in record.statistics.items()}
            assert all(x == record.relative(k) for k, x in read["relative"].items())
            assert read["group_size"] == record.group_size
            assert read["transformed"] == (None if record.transformed is None else list(record.transformed))


def test_the_table_has_a_line_for_each_product():
    model = Net("auto4")
    with fqt.recording(model) as records:
        assert str(records).endswith("no backward pass of a quantized layer was recorded")
        backward(model, 2)
    head, *lines, legend = str(records).splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["fc1", "dgrad", "auto4", "2"], ["fc1", "wgrad", "ptq8", "2"],
        ["fc2", "dgrad", "auto4", "2"], ["fc2", "wgrad", "ptq8", "2"],
    ]  # fmt: skip
    r = records.layers["fc2"].dgrad
    for column, cell in {"psq": f"{r.relative('psq'):.2e}", "conditional": f"{r.relative('conditional'):.2e}",
                         "transformed": f"{r.transformed[0]:.0%}, {r.transformed[1]:.0%}"}.items():  # fmt: skip
        at = head.index(f"  {column}  ") + 2
        assert lines[2][at:].startswith(cell)
    assert legend == telemetry._LEGEND


@pytest.mark.parametrize(
    "quantizer, label",
    [
        *((Recipe.parse(name).dgrad, name) for name in ("ptq8", "psq5", "bhq4", "bhq4-tile", "auto2", "auto3-tile")),
        (Recipe.ptq(3, "min").dgrad, "ptq3 min"),
        (Recipe.int8().dgrad, "psq8 symmetric"),
        (Recipe.int8().wgrad, "per_column8 symmetric"),
        (Recipe.fp8().dgrad, "psq8 e4m3"),
        (Quantizer(5, "per_row", "min", "nearest"), "psq5 nearest"),
        (Quantizer(5, "per_row", "symmetric", "stochastic", range="delayed"), "psq5 symmetric delayed"),
    ],
)
def test_a_quantizer_is_called_as_its_recipe_and_what_differs(quantizer, label):
    assert telemetry._label(quantizer) == label
