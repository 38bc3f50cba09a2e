"""The counters that need no GPU: exact, the same every time, and greater when a kernel does more."""

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fqt_bench import counters, steps
from fqt_bench.counters import Change, changes, collect, matches
from fqt_bench.steps import Step

ROOT = Path(__file__).resolve().parents[1]
interpreted = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("counter", "old", "new", "percent", "kind"),
    [
        ("instructions", 100, 101, 0, "regression"),
        ("instructions", 100, 99, 0, "improvement"),
        ("instructions", 100, 102, 2, "tolerated"),
        ("instructions", 100, 103, 2, "regression"),
        ("spilled", 0, 4, 50, "regression"),  # any growth from nothing is more than any percentage
        ("loads_16", 0, 8, 0, "described"),
        ("tma_stores", 4, 0, 0, "described"),
        ("bytes_loaded", 7, None, 0, "improvement"),
        ("launches", None, 1, 0, "regression"),
    ],
)
def test_more_of_anything_is_a_regression_but_within_the_tolerance(counter, old, new, percent, kind):
    base, head = ({"a": {} if value is None else {counter: value}} for value in (old, new))
    assert changes(base, head, {counter: percent}) == [Change("a", counter, old or 0, new or 0, kind)]
    assert changes(base, base) == []


def test_entries_of_one_side_alone_are_not_compared():
    assert changes({"a": {"loads": 1}}, {"b": {"loads": 2}}) == []


def test_a_pattern_occurs_anywhere_and_may_have_wildcards():
    name = "sm_90 _rows_kernel n4096 min stochastic"
    assert all(matches(p, name) for p in (None, "", "_rows_kernel", "rows*min", "n409?", name))
    assert not any(matches(p, name) for p in ("_tile_kernel", "min*rows", "n4?6"))


def test_every_kernel_of_the_package_is_in_the_smoke_selection():
    sources = [path.read_text() for path in (ROOT / "kernels" / "fqt_kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE)}
    assert {kernel for started in counters.SMOKE.values() for kernel in started} == kernels


@interpreted
def test_a_step_counts_the_same_in_every_process_and_what_the_shapes_say():
    first = collect("smoke", only="step int8 *")
    assert first == steps.count("int8")
    m, k, n = steps.M, steps.K, steps.N
    rows = first["step int8 linear _rows_kernel"]
    # X (M, K) and W (N, K) in float32 are read once; codes in both layouts and a float32 scale for each row are written.
    assert rows == {"launches": 2, "bytes_loaded": 4 * (m + n) * k, "bytes_stored": 2 * (m + n) * k + 4 * (m + n)}
    total = first["step int8 linear"]
    for counter in ("launches", "bytes_loaded", "bytes_stored"):
        assert total[counter] == sum(entry[counter] for name, entry in first.items() if name != "step int8 linear")
    # What waits for backward: transposed codes and scales of X, codes in both layouts and scales of W.
    assert total["saved_bytes"] == m * k + 4 * m + 2 * n * k + 4 * n
    # dX, dW and dbias are there at the end, and Y until then.
    assert total["peak_bytes"] >= 4 * (m * k + n * k + n + m * n)


def test_a_launch_that_a_tree_does_not_know_is_said_and_the_others_are_counted(monkeypatch, capsys):
    known = "n4096 min stochastic"
    monkeypatch.setattr(counters, "SMOKE", {known: ("_rows_kernel",), "no such thing": ("_rows_kernel",)})
    found = collect("smoke", ROOT, only="sm_90 _rows_kernel*")
    assert list(found) == [f"sm_90 _rows_kernel {known}"]
    entry = found[f"sm_90 _rows_kernel {known}"]
    assert entry["instructions"] > 0
    assert entry["loads"] == sum(count for name, count in entry.items() if name.startswith("loads_"))
    assert "not known: sm_90 ? no such thing" in capsys.readouterr().err


def test_another_selection_is_refused():
    with pytest.raises(ValueError, match="smoke or full, got 'all'"):
        collect("all")


@triton.jit
def _touch_kernel(x_ptr, y_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x.to(tl.float32))
    tl.atomic_add(sum_ptr + at % 2, at, mask=at < 3)


@interpreted
def test_bytes_are_those_of_the_lanes_that_a_mask_leaves():
    step = Step()
    tensors = torch.ones(8, dtype=torch.float16), torch.empty(8), torch.zeros(2, dtype=torch.int32)
    with step.interpreting(), step:
        _touch_kernel[(2,)](*tensors, 5, BLOCK=8)
    # Of each of two programs: 5 loads of 2 bytes, 8 stores of 4, 3 atomics of 4 that load and store.
    assert step.kernels == {"_touch_kernel": 1}
    assert step.loaded == {"_touch_kernel": 2 * (5 * 2 + 3 * 4)}
    assert step.stored == {"_touch_kernel": 2 * (8 * 4 + 3 * 4)}
    assert not step.operators, "what the interpreter does itself is no operator"


@interpreted
def test_an_interpreter_that_lacks_a_watched_function_or_has_an_unknown_one_is_refused(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_bulk_load", lambda *args: None, raising=False)
    masked = InterpreterBuilder.create_masked_load
    with Step().interpreting():
        with pytest.raises(RuntimeError, match="create_bulk_load of its interpreter is not watched"):
            InterpreterBuilder().create_bulk_load()
        assert InterpreterBuilder.create_masked_load is not masked
    assert InterpreterBuilder.create_masked_load is masked
    monkeypatch.delattr(InterpreterBuilder, "create_masked_load")
    with pytest.raises(RuntimeError, match="no create_masked_load"), Step().interpreting():
        pass


def test_a_recipe_that_is_not_there_is_unknown_and_a_layer_that_raises_is_not(monkeypatch):
    import fqt.nn

    with pytest.raises(steps.Unknown, match="no such recipe"):
        steps.count("no such recipe")

    def bug(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(fqt.nn.Linear, "forward", bug)
    with pytest.raises(ValueError, match="a bug"):
        steps.count("int8")


def test_memory_and_operators_of_a_step_are_those_of_its_tensors():
    x = torch.ones(256)
    step = Step()
    step.know(x)
    with step:
        y = x * 2  # 1 KiB
        z = y.view(16, 16).t()[1:]  # the same memory
        y.add_(1)
        del y
        assert step.live == 1024
        del z
        assert step.live == 0
        w = torch.empty(512)  # launches nothing
        w = w.clone()
    assert (step.live, step.peak) == (2048, 4096)
    assert sum(step.operators.values()) == 3  # mul, add_, clone
