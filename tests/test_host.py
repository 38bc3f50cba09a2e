"""The host's part of a step, on a GPU that is not there: what is called, how often. Nothing is timed here."""

import gc
import json
from collections import Counter

import pytest
import torch

from fqt import dispatch, ops
from fqt.cli import UsageError
from fqt.dispatch import choose
from fqt.ranges import handover
from fqt_bench import host, host_gpu
from fqt_bench.host import Linear, Split, count
from fqt_bench.host_gpu import GPU, nothing, pretended

SHAPE = (32, 48, 64)
LAUNCHES = {  # of a step that quantizes its weight
    "int8": {"_rows_kernel": 2, "_gradient_stats_kernel": 1, "_params_kernel": 2, "_gradient_tile_kernel": 1,
             "_scaled_mm_kernel": 3},
    "psq8": {"_row_stats_kernel": 2, "_tile_kernel": 2, "_gradient_stats_kernel": 1, "_params_kernel": 5,
             "_gradient_tile_kernel": 1, "_scaled_mm_kernel": 3},
}  # fmt: skip
SYNCHRONIZES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")


@pytest.mark.parametrize("recipe", LAUNCHES)
def test_a_step_launches_no_more_than_its_kernels_and_what_it_must(recipe):
    found = count(Linear(recipe, SHAPE))
    assert found["launches"] == LAUNCHES[recipe]
    sums = {"aten.zeros.default": 6} if recipe == "psq8" else {}  # of codes, added up by atomics
    assert found["on_gpu"] == {"aten.add_.Tensor": 1, **sums}  # the step of the random stream


@pytest.mark.parametrize(("recipe", "most"), [("int8", 34), ("psq8", 58)])
def test_a_step_calls_no_more_operators_of_torch(recipe, most):
    operators = Counter(count(Linear(recipe, SHAPE))["operators"])
    assert operators.total() <= most, operators
    assert operators["aten.empty.memory_format"] <= {"int8": 19, "psq8": 31}[recipe]


@pytest.mark.parametrize("recipe", [*LAUNCHES, "bhq8", "fp8"])
def test_a_step_does_not_wait_for_the_device(recipe):
    operators = count(Linear(recipe, SHAPE))["operators"]
    assert not [name for name in operators if name.split(".")[1] in SYNCHRONIZES]


def test_a_repeated_shape_is_chosen_for_once():
    with pretended(nothing):
        linear = Linear("int8", SHAPE)
        linear.step()
        before = dispatch.select.cache_info(), dispatch._chosen.cache_info()
        linear.step()
        after = dispatch.select.cache_info(), dispatch._chosen.cache_info()
        assert after[0] == before[0]  # not even asked
        assert after[1].misses == before[1].misses and after[1].hits > before[1].hits
        Linear("int8", (SHAPE[0], SHAPE[1], 2 * SHAPE[2])).step()
        assert dispatch._chosen.cache_info().misses > before[1].misses


@pytest.mark.parametrize("recipe", LAUNCHES)
def test_steps_leave_nothing_behind(recipe):
    def alive() -> tuple[int, ...]:
        gc.collect()
        found = [type(thing) for thing in gc.get_objects()]
        return sum(issubclass(kind, torch.Tensor) for kind in found), len(handover._left), len(found)

    with pretended(nothing):
        linear = Linear(recipe, SHAPE)
        for _ in range(3):
            linear.step()
        before = alive()
        for _ in range(20):
            linear.step()
        after = alive()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 10  # not one for each of the steps


# ---- the GPU that is not there


def test_within_the_pretence_kernels_of_that_gpu_are_chosen_and_afterwards_all_is_as_before():
    x = torch.zeros(2, 2)
    before = dict(vars(torch.Tensor)), torch.empty, torch.zeros, dict(vars(torch.cuda)), dict(dispatch_state())
    with pretended(nothing):
        assert x.device == GPU and x.is_cuda and torch.empty(3, device=GPU).device == GPU
        choice = choose("scaled_mm", x.device, 256, 256, 256)
        assert (choice.backend, choice.source) == ("triton", "heuristic")
        assert dispatch.device_info(str(GPU)) == ("sm90", 132)
    assert x.device.type == "cpu" and not x.is_cuda
    assert before == (
        dict(vars(torch.Tensor)),
        torch.empty,
        torch.zeros,
        dict(vars(torch.cuda)),
        dict(dispatch_state()),
    )
    assert dispatch.device_info.cache_info().currsize == dispatch._chosen.cache_info().currsize == 0


def dispatch_state() -> dict[int, object]:
    from fqt import tuning

    return tuning._active


def test_what_is_launched_is_given_to_the_pretence():
    launched = []
    with pretended(lambda kernel, *args, grid, **options: launched.append((kernel.fn.__name__, len(args), grid))):
        linear = Linear("int8", SHAPE)
        linear.forward()
    assert [name for name, _, _ in launched] == ["_rows_kernel", "_rows_kernel", "_scaled_mm_kernel"]
    assert all(arguments and grid[0] >= 1 for _, arguments, grid in launched)


def test_the_stages_of_a_step_add_up_to_its_time(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(host.time, "perf_counter_ns", lambda: next(ticks))
    split = Split()
    inner = split.timed("inner", lambda: None)
    outer = split.timed("outer", lambda: (inner(), inner()))
    split.run(lambda: (outer(), inner()))
    assert split.ns == {"inner": 3, "outer": 3, host.AUTOGRAD: 3}
    with pytest.raises(ZeroDivisionError):
        split.timed("failed", lambda: 1 / 0)()
    assert split._stages == [host.AUTOGRAD]


def test_a_watched_step_has_every_stage_and_leaves_no_watcher():
    before = ops._forward, ops.linear._backward_fn, dict(ops.linear._backend_fns), torch.empty
    with pretended(nothing):
        linear, split = Linear("int8", SHAPE), Split()
        with split.watching():
            split.run(linear.step)
    stages = {host.AUTOGRAD, host.LAYER, host.RULES, host.BODIES, host.DISPATCH, host.LAUNCHERS, host.GUARDS,
              host.ALLOCATION}  # fmt: skip
    assert stages <= {stage for stage, ns in split.ns.items() if ns > 0}
    assert before == (ops._forward, ops.linear._backward_fn, dict(ops.linear._backend_fns), torch.empty)


# ---- the command


def test_records_say_what_was_measured(tmp_path, capsys):
    out = tmp_path / "host.json"
    assert (
        host.main(["--recipes", "int8", "exact", "--shape", "16", "32", "48", "--samples", "6", "--out", str(out)]) == 0
    )
    result = json.loads(out.read_text())
    assert "no GPU" in result["what"] and result["environment"]["device"] == "cpu"
    assert [r["name"] for r in result["records"]] == ["int8", "exact", host.PLAIN]
    int8, exact, _ = result["records"]
    assert int8["shape"] == [16, 32, 48] and sum(int8["python"]["shares"].values()) == pytest.approx(1, abs=0.01)
    assert exact["launches"] == {} and "shares" not in exact["python"] and "triton" not in int8
    assert all(r["python"][f"{half}_us"] > 0 for r in result["records"] for half in ("forward", "backward", "step"))
    printed = capsys.readouterr().out
    assert "int8: 9 launches" in printed and "µs of CPU time" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("int9", SHAPE, 5), "--recipes int9"),
        (("int8", (0, 1, 1), 5), "must be positive, got 0 1 1"),
        (("int8", SHAPE, 0), "and 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, says):
    recipe, shape, samples = arguments
    with pytest.raises(UsageError, match=says):
        host.run([recipe], shape, "float32", samples, False)
    assert gc.isenabled()


def test_triton_s_launcher_takes_no_part_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET"), host_gpu.offline():
        pass
