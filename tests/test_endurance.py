"""Laws of the endurance run: it trains, counts and judges; nothing of fqt grows, and a planted leak is named."""

import collections
import importlib
import json
import math
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fqt
from fqt import cli
from fqt_bench import endurance, live
from fqt_bench.live import Record

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
CPU = torch.device("cpu")


def record(steps, allocated=100, host=0, tensors=5, caches=3, name="a.b"):
    return Record(steps, allocated, None, None, host, {"float32 (2,) cpu": tensors}, {name: caches})


def records(n=20, **later):
    """Equal counts, but for the last."""
    return [*(record(i) for i in range(n - 1)), record(n - 1, **later)]


# ---- counting


def test_live_tensors_and_their_bytes_are_counted():
    before = live.count(0, CPU, {})
    kept = [torch.zeros(3, 41, 7) for _ in range(2)]
    views = [kept[0][1:], kept[0].view(-1)]
    after = live.count(0, CPU, {})
    assert after.allocated - before.allocated == 2 * kept[0].nbytes
    assert after.tensors["float32 (3, 41, 7) cpu"] == 2 and len(views) == 2
    assert after.host > 0 and after.reserved is None


def test_tensors_of_a_trace_have_no_bytes():
    """Compiled functions keep some, of sizes that are symbols; a record is numbers."""
    shapes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    before = live.count(0, CPU, {})
    traced = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(5, 40), symbolic_context=shapes)
    after = live.count(0, CPU, {})
    assert not isinstance(traced.shape[0], int) and sum(after.tensors.values()) == sum(before.tensors.values()) + 1
    assert type(after.allocated) is int and after.allocated == before.allocated


def test_every_kind_of_container_of_fqt_is_found(monkeypatch):
    """Those of today by name, and any that a module may get: a dict, a set, a deque, a functools cache, one in an object."""
    for name in ("nn", "conv", "telemetry"):
        importlib.import_module(f"fqt.{name}")
    sizes = live.cache_sizes({})
    known = ("fqt.nn._holders", "fqt.rng._layers", "fqt.layer._said", "fqt.dispatch._chosen", "fqt.telemetry._owners",
             "fqt.ranges.handover._left", "fqt.ranges.handover.counts", "fqt.conv._borders._known")  # fmt: skip
    assert not set(known) - sizes.keys()
    for name, made in (("a", {1: 2}), ("b", {1}), ("c", collections.deque([1]))):
        monkeypatch.setattr(fqt.layer, f"_new_{name}", made, raising=False)
    found = live.cache_sizes({})
    assert {key: size for key, size in found.items() if key not in sizes} == dict.fromkeys(
        ("fqt.layer._new_a", "fqt.layer._new_b", "fqt.layer._new_c"), 1
    )
    fqt.nn.Linear(2, 2)
    model = fqt.nn.Linear(4, 4)
    assert live.cache_sizes({})["fqt.rng._layers"] == found["fqt.rng._layers"] + 1, model


# ---- judging


def test_equal_counts_did_not_grow():
    assert live.judge(records()) == []
    assert live.judge(records(allocated=99, tensors=4, caches=2)) == [], "less is not more"


@pytest.mark.parametrize(("what", "later"), [
    ("allocated: 100 bytes after 2 steps, 101 after 19", dict(allocated=101)),
    ("tensors: float32 (2,) cpu: 5 after 2 steps, 6 after 19", dict(tensors=6)),
    ("caches: a.b: 3 after 2 steps, 4 after 19", dict(caches=4)),
    ("caches: new: 0 after 2 steps, 3 after 19", dict(name="new")),
    ("host: 0 MiB after 2 steps, 64 after 19", dict(host=live.HOST_SLACK + 1)),
])  # fmt: skip
def test_what_grew_is_named(what, later):
    (line,) = live.judge(records(**later))
    assert line.startswith(what)


def test_the_warm_up_may_grow_and_the_host_by_its_slack():
    counts = records(host=live.HOST_SLACK)
    counts[0] = record(0, allocated=1, tensors=1, caches=0)
    counts[1] = record(1, allocated=1000)
    assert live.judge(counts) == []


def test_growth_in_the_middle_is_growth():
    counts = records()
    counts[10] = record(10, tensors=9)
    assert live.judge(counts) == ["tensors: float32 (2,) cpu: 5 after 2 steps, 9 after 10"]


def test_too_few_counts_are_not_judged():
    assert "too few" in live.judge(records(3))[0]


# ---- running


def run(*more, steps=16):
    return endurance.main(["--steps", str(steps), "--device", "cpu", *more])


@pytest.fixture
def short(monkeypatch):
    """Rounds of four steps."""
    monkeypatch.setattr(endurance, "PERIOD", 4)


def test_nothing_grows_and_the_result_is_written(capsys, tmp_path):
    out = tmp_path / "endurance.json"
    assert run("--recipes", "int8", "--out", str(out), steps=64) == 0
    said = capsys.readouterr().out
    assert said.startswith("int8: 64 steps") and said.endswith("nothing grew\n")
    (result,) = json.loads(out.read_text())["runs"]
    assert result["steps"] == 64 and [r["steps"] for r in result["records"]] == [16, 32, 48, 64]
    assert result["grown"] == [] and result["last"]["caches"]["PSGD.state"] == 8


@pytest.mark.interpreted
def test_nothing_grows_on_the_kernels(monkeypatch, capsys):
    """In the interpreter, with networks of one layer, none of them thrown away."""

    def small(layer, sample):
        return lambda recipe, device: (
            endurance._quantized(nn.Sequential(layer(), nn.Flatten()), recipe, device),
            sample,
        )

    monkeypatch.setattr(endurance, "PERIOD", 2)
    monkeypatch.setattr(endurance, "BATCHES", (2, 1))
    monkeypatch.setattr(endurance, "mlp", small(lambda: nn.Linear(4, 4), (4,)))
    monkeypatch.setattr(endurance, "cnn", small(lambda: nn.Linear(4, 4), (4,)))
    monkeypatch.setattr(endurance.Trainer, "_throw_away", lambda *_: None)
    assert run("--backend", "triton", "--recipes", "psq8", steps=8) == 0, capsys.readouterr().out


def test_a_leak_of_tensors_is_named(monkeypatch, capsys, short):
    leak, product = [], fqt.products.product
    monkeypatch.setattr(fqt.products, "_leak", leak, raising=False)

    def leaking(*args, **kwargs):
        out = product(*args, **kwargs)
        leak.append(out[:1].clone())
        return out

    monkeypatch.setattr(fqt.products, "product", leaking)
    assert run("--recipes", "psq8") == 1
    said = capsys.readouterr().out
    assert "GREW" in said and "caches: fqt.products._leak: " in said
    assert "allocated: " in said and "tensors: float32 (1, " in said


def test_a_registry_that_keeps_layers_alive_is_named(monkeypatch, capsys, short):
    kept = set()
    monkeypatch.setattr(fqt.rng, "_layers", kept)
    assert run("--recipes", "int8") == 1
    said = capsys.readouterr().out
    assert "caches: fqt.rng._layers: " in said and "left behind: Linear made in step 3" in said


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, capsys, short):
    step = endurance.train_step
    monkeypatch.setattr(endurance, "train_step", lambda *args: step(*args) * float("nan"))
    assert run("--recipes", "int8") == 1
    assert "losses: a loss of the last 4 steps before step 4 is not finite" in capsys.readouterr().out


def test_what_is_too_short_is_not_judged_which_is_neither_growth_nor_success(capsys, short, tmp_path):
    """The first round is run in any case: in it the kernels are compiled."""
    out = tmp_path / "endurance.json"
    assert run("--recipes", "int8", "--limit-s", "0", "--out", str(out)) == 1
    said = capsys.readouterr().out
    assert said.startswith("int8: 4 steps") and said.endswith("not judged: too few counts: 1, 4 are needed\n")
    (result,) = json.loads(out.read_text())["runs"]
    assert result["status"] == "not judged" and result["grown"] == [] and "1, 4" in result["not_judged"]


@pytest.fixture
def rounds(monkeypatch, short):
    """rounds(steps, until): a run of nothing, whose counts cost nothing."""
    monkeypatch.setattr(endurance, "COUNTS", 10)
    monkeypatch.setattr(endurance, "count", lambda steps, device, roots: record(steps))

    def of(steps, until=lambda: math.inf, step=lambda number: None):
        made = endurance.Run("nothing")
        endurance._rounds(made, step, steps, CPU, until, dict)
        return made

    return of


def test_each_round_is_counted_until_there_are_some_and_long_runs_keep_regular_counts(rounds, monkeypatch):
    steps = [r.steps for r in rounds(4 * 30).records]
    assert steps == [4 * i for i in range(3, 31, 3)], "every third of thirty rounds"
    clock = iter(range(1000))
    monkeypatch.setattr(endurance, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    cut = rounds(4 * 30, until=lambda: 50)
    steps = [r.steps for r in cut.records]
    assert cut.status == "nothing grew" and len(steps) > endurance.DENSE
    assert steps == [*range(4, 36, 4), 36], "one that is cut short keeps all"


def test_the_clock_of_a_run_starts_after_its_first_round(rounds):
    asked, ran = [], []
    rounds(16, until=lambda: asked.append(len(ran)) or math.inf, step=ran.append)
    assert asked == [4] and len(ran) == 16


def test_the_time_is_shared_equally_by_the_runs_that_are_left(monkeypatch):
    shares = []
    monkeypatch.setattr(endurance, "train", lambda run, r, steps, device, until: shares.append(until()))
    start = endurance.time.monotonic()
    assert [r.name for r in endurance.runs([], ["a", "b", "c"], 64, CPU, 9e6)] == ["a", "b", "c"]
    assert [(share - start) / 1e6 for share in shares] == pytest.approx([3, 4.5, 9], rel=1e-2)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_what_is_done_is_written_when_the_next_run_is_cut_off(monkeypatch, capsys, short, tmp_path, end):
    out, step = tmp_path / "endurance.json", endurance.Trainer.step

    def cut(trainer, number):
        if trainer.recipe == "psq8" and number == 5:
            raise end
        step(trainer, number)

    monkeypatch.setattr(endurance.Trainer, "_throw_away", lambda *_: None)
    monkeypatch.setattr(endurance.Trainer, "step", cut)
    arguments = "--recipes", "int8", "psq8", "bhq8", "--out", str(out)
    if end is KeyboardInterrupt:
        assert run(*arguments) == cli.INTERRUPTED and "psq8: 5 steps" in capsys.readouterr().out
    else:
        with pytest.raises(end):
            run(*arguments)
    found = [(r["name"], r["status"], r["steps"]) for r in json.loads(out.read_text())["runs"]]
    cut_off = [("psq8", "not judged", 5)] if end is KeyboardInterrupt else []
    assert found == [("int8", "nothing grew", 16), *cut_off]


def test_weights_that_are_given_and_taken_leave_nothing():
    """A layer is known by the weight it has, and by none that it had."""
    model, known = fqt.nn.Linear(4, 4), len(fqt.nn._holders)
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(5)]
    for w in weights:
        model.weight = w
        model(torch.randn(2, 4, requires_grad=True))
    assert len(fqt.nn._holders) == known + 1 and fqt.nn.emission(weights[-1]) is not None
    del model
    assert len(fqt.nn._holders) == known


@pytest.mark.parametrize("mistake", [
    ["--steps", "3"], ["--recipes", "psq99"], ["--recipes", "fp8"], ["--device", "tpu"],
])  # fmt: skip
def test_mistakes_are_named(mistake, capsys):
    with pytest.raises(SystemExit) as e:
        run(*mistake, steps=64)
    assert e.value.code == 2 and mistake[1] in capsys.readouterr().err.replace("'", "")


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_replays_do_not_grow(capsys):
    assert endurance.main(["--steps", "160", "--recipes", "int8", "psq8"]) == 0, capsys.readouterr().out
    assert "int8, CUDA graph: 160 steps" in capsys.readouterr().out
