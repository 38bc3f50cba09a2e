"""Laws of split-K: several programs share a tile's sum, and no bit of the result shows it."""

import itertools
import random

import laws
import pytest
import torch
from products import codes, launch, pair

import fqt_kernels.gemm as kernels
from fqt import reference
from fqt.qtensor import Operand

CONFIG = (32, 32, 32, 4, 2)
SPLITS = (2, 3, 5, 64)  # that divide the number of blocks, that do not, and more than there are blocks
AFFINE = ("per_row", True, "per_tensor", True)

pytestmark = pytest.mark.skipif(torch.version.hip is not None, reason="split_k is for NVIDIA only")
interpreted = pytest.mark.interpreted  # programs can only be ordered there


@pytest.fixture(autouse=True)
def memory(guard):
    """What the launcher allocates lies between guard bands; fresh memory holds poison."""
    return guard(kernels)


@pytest.mark.parametrize("m, n, k", [(1, 1, 64), (33, 31, 80), (32, 64, 128), (65, 33, 207)])
@pytest.mark.parametrize("epilogue", [("per_row", False, "none", False), AFFINE], ids=["symmetric", "affine"])
def test_a_split_changes_no_bit(m, n, k, epilogue, device):
    a, b = pair(m, n, k, epilogue)
    bias = torch.randn(n)
    expected = reference.scaled_mm(a, b, bias)
    for split in SPLITS:
        laws.assert_same(launch(a, b, bias, config=CONFIG, split_k=split, device=device), expected, f"split_k {split}")


@pytest.mark.parametrize("config", [(16, 16, 32, 1, 1), (64, 64, 32, 1, 1), (32, 64, 64, 4, 3)], ids=str)
def test_tilings_and_splits_commute(config, device):
    a, b = pair(37, 53, 300, AFFINE)
    expected = reference.scaled_mm(a, b)
    for split in (2, 4):
        laws.assert_same(launch(a, b, config=config, split_k=split, device=device), expected)


@pytest.mark.parametrize("k", [1, 31, 1024, 131_071])
@pytest.mark.parametrize("split", [2, 7])
def test_the_sum_is_exact_up_to_131071_extreme_codes(k, split, device):
    """All -128 · -128, all 127 · 127, and mixed: neither a part nor the whole leaves int32."""
    a, b = (Operand(codes(m, k, m, extreme=True), torch.ones(1), None, None) for m in (5, 3))
    out = launch(a, b, config=(16, 16, 512, 4, 2), split_k=split, device=device)
    exact = a.q.long() @ b.q.long().t()
    laws.assert_same(out, exact.float())
    assert float(out[0, 0]) == k * 2**14


def test_a_split_repeats_itself(device):
    a, b = pair(65, 33, 208)
    first, second = (launch(a, b, config=CONFIG, split_k=3, device=device) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("k, split, made", [(0, 4, 1), (16, 4, 1), (32, 4, 1), (33, 4, 2), (208, 1, 1), (208, 2, 2)])
def test_a_workspace_is_made_only_where_blocks_are_shared(k, split, made, memory, device):
    """And where it is, it is one."""
    a, b = pair(33, 7, k)
    laws.assert_same(launch(a, b, config=CONFIG, split_k=split, device=device), reference.scaled_mm(a, b))
    assert memory.made == made


# ---- the order of programs


def reordered(monkeypatch, order):
    """From now on the interpreter's i-th program of a grid, as it counts them, is program order[i]."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx = type(builder).set_grid_idx

    def permuted(x, y, z):
        columns = builder.grid_dim[1]
        x, y = divmod(order[x * columns + y], columns)
        set_grid_idx(builder, x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", permuted)


@interpreted
@pytest.mark.unsanitized
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_program_of_a_tile_may_be_the_last(order, monkeypatch):
    a, b = pair(31, 17, 80, AFFINE)
    expected = reference.scaled_mm(a, b)
    reordered(monkeypatch, order)
    laws.assert_same(launch(a, b, config=CONFIG, split_k=3), expected)


@interpreted
@pytest.mark.unsanitized
@pytest.mark.parametrize("seed", range(4))
def test_programs_of_all_tiles_may_come_in_any_order(seed, monkeypatch):
    """6 tiles of 4 programs, shuffled."""
    order = list(range(24))
    random.Random(seed).shuffle(order)
    a, b = pair(70, 33, 128, AFFINE)
    expected = reference.scaled_mm(a, b)
    out = torch.zeros(70, 33)
    row_absmax = torch.full((70,), -(2**31), dtype=torch.int32)
    reordered(monkeypatch, order)
    launch(a, b, config=CONFIG, split_k=4, out=out, row_absmax=row_absmax)
    laws.assert_same(out, expected)
    laws.assert_same(row_absmax, expected.abs().view(torch.int32).amax(1))


@interpreted
def test_a_program_counts_itself_after_its_sum_and_reads_the_whole_after_that(monkeypatch):
    """What the interpreter, which runs programs one after the other, cannot show by its results: the order of accesses
    that the memory model asks for. Relaxed additions of the tile, a barrier, the counter with acquire and release, loads."""
    from triton.runtime.interpreter import interpreter_builder as builder

    events = []

    def watched(name, note):
        method = getattr(builder, name)

        def call(*args):
            if (event := note(*args)) is not None:
                events.append(event)
            return method(*args)

        monkeypatch.setattr(builder, name, call)

    watched("set_grid_idx", lambda x, y, z: "start")
    watched("create_barrier", lambda: "barrier")
    watched("create_atomic_rmw", lambda op, ptr, val, mask, sem, scope: (val.data.size, sem.name, scope.name))
    watched("create_masked_load", lambda ptrs, *_: "tile" if ptrs.data.size == 1024 and _is_int32(ptrs) else None)
    a, b = pair(32, 32, 96, ("per_row", False, "none", False))
    launch(a, b, config=(32, 32, 32, 4, 2), split_k=3)
    programs = [list(part) for start, part in itertools.groupby(events, lambda e: e == "start") if not start]
    adding = [(1024, "RELAXED", "GPU"), "barrier", (1, "ACQUIRE_RELEASE", "GPU")]
    assert programs == [adding, adding, [*adding, "tile"]]


def _is_int32(pointers) -> bool:
    return pointers.get_element_ty().primitive_bitwidth == 32


# ---- refusals


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(split_k=0), "split_k must be at least 1, got 0"),
        (dict(split_k=2, k=131_072), "131072 terms leave int32"),
        (dict(split_k=2, fp8=True), "order of float8's"),
    ],
)
def test_what_would_change_the_result_is_refused(change, says, device):
    a, b = pair(3, 2, change.pop("k", 64))
    if change.pop("fp8", False):
        a, b = (t._replace(q=t.q.view(torch.float8_e4m3fn), sum=None) for t in (a, b))
    with pytest.raises(ValueError, match=says):
        launch(a, b, device=device, **change)


def test_amd_is_refused(monkeypatch, device):
    a, b = pair(3, 2, 64)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match=r"split_k is 2, but .* on AMD"):
        launch(a, b, split_k=2, device=device)
