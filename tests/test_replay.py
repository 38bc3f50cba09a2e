"""Launches again and again on the same memory: what differs is found and named, what does not leaves no trace."""

import contextlib
import gc
import pathlib
import re
import types
import weakref

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import fqt_kernels
from fqt import guarded, replay


@triton.jit
def _add_one_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < N) + 1, mask=offs < N)


@triton.jit
def _pair_kernel(pair, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(pair[1] + offs, tl.load(pair[0] + offs) + tl.load(pair[1] + offs))


@triton.jit
def _through_table_kernel(table_ptr, tensors):
    """Adds 1 to the first element of each tensor of a table of addresses."""
    for i in range(tensors):
        ptr = tl.load(table_ptr + i).to(tl.pointer_type(tl.int32))
        tl.store(ptr, tl.load(ptr) + 1)


@triton.jit
def _counting_kernel(out_ptr, address, at, LAUNCH: tl.constexpr):
    """Counts its launches in memory that no argument shows, and writes the count, or whether it is LAUNCH, to out[at]."""
    ptr = tl.cast(address, tl.int64).to(tl.pointer_type(tl.int32))
    count = tl.load(ptr)
    tl.store(ptr, count + 1)
    tl.store(out_ptr + at, count if LAUNCH < 0 else (count == LAUNCH).to(tl.int32))


@pytest.fixture
def hidden(device):
    """Memory that a kernel is given the bare address of."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def test_a_launch_in_place_repeats_and_leaves_the_memory_as_one_launch_does(device):
    x = torch.arange(37, dtype=torch.float32, device=device)
    version = x._version
    with replay.recording(3) as seen:
        _add_one_kernel[lambda meta: (triton.cdiv(37, meta["BLOCK"]),)](x, N=37, BLOCK=16, num_warps=1)
    assert x.tolist() == [i + 1.0 for i in range(37)] and x._version == version
    assert (seen.launches, seen.repeated, seen.faults, seen.skipped) == (1, 1, [], {})
    assert seen.kernels == {"_add_one_kernel": 1}


@triton.jit
def _named_kernel(kernel, seen, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(kernel + offs, tl.load(kernel + offs) + seen)


def test_an_argument_of_a_launch_may_have_any_name(device):
    x = torch.zeros(16, device=device)
    with replay.recording(2) as seen:
        _named_kernel[(1,)](kernel=x, seen=1, BLOCK=16)
    assert x.tolist() == [1.0] * 16 and (seen.repeated, seen.faults) == (1, [])


def test_every_repetition_launches(device, hidden):
    out = torch.zeros(4, dtype=torch.int32, device=device)
    with replay.recording(5):
        _counting_kernel[(1,)](out, hidden.data_ptr(), 0, -1)
    assert hidden.item() == 6 and out.tolist() == [0, 0, 0, 0]  # the first launch and five; as the first left it


@pytest.mark.parametrize(("launch", "times"), [(-1, 4), (3, 1), (0, 4), (5, 0)])
def test_a_launch_that_differs_is_named_with_the_bytes_and_the_repetitions(launch, times, device, hidden):
    out = torch.zeros(4, dtype=torch.int32, device=device)
    with replay.recording(4) as seen:
        _counting_kernel[(1,)](out, hidden.data_ptr(), 2, launch)
    fault = f"in {times} of 4 repetitions: out_ptr in 1 of 16 bytes, the first at byte 8"
    assert seen.faults == ([f"_counting_kernel differs from its first launch {fault}"] if times else [])
    assert seen.repeated == 1 and out.tolist() == [0, 0, int(launch == 0), 0]


def test_memory_around_a_view_is_compared_too(device, hidden):
    whole = torch.zeros(8, dtype=torch.int32, device=device)
    with replay.recording(1) as seen:
        _counting_kernel[(1,)](whole[4:6], hidden.data_ptr(), -3, -1)
    assert "out_ptr in 1 of 32 bytes, the first at byte -12" in seen.faults[0]


def test_a_table_of_addresses_reaches_the_memory_that_they_point_into(device, hidden):
    tensors = [torch.zeros(8, dtype=torch.int32, device=device) for _ in range(3)]
    places = tensors[0], tensors[1][5:], hidden
    table = torch.tensor([[t.data_ptr() for t in places]], device=device)
    with replay.recording(2) as seen:
        _through_table_kernel[(1,)](table, 3)
    assert seen.faults == [] and [t.sum().item() for t in places] == [1, 1, 1]
    found = replay.reachable([("table_ptr", table), ("n", 3)])
    assert [m.names for m in found] == [
        ["table_ptr"], *([f"what table_ptr[0, {i}] points at"] for i in range(3))
    ]  # fmt: skip
    assert [m.start for m in found] == [0, 0, 20, 0] and len(found[2].bytes) == 32


def test_sizes_seeds_and_addresses_without_a_tensor_reach_nothing(device):
    gone = torch.zeros(2**20, device=device)
    values = [0, 4096, -1, 0x123456789ABCDEF, 2**47 - 1, gone.data_ptr()]
    del gone
    found = replay.reachable([("rng_ptr", torch.tensor(values, device=device))])
    assert [m.names for m in found] == [["rng_ptr"]]


def test_storages_count_once_and_tuples_and_descriptors_are_looked_into(device):
    x = torch.zeros(64, dtype=torch.int32, device=device)
    base = torch.zeros(16, 16, device=device)
    pair, descriptor = (x[:16], (x[32:], None)), TensorDescriptor(base, [16, 16], [16, 1], [16, 16])
    empty = torch.empty(0, device=device)
    found = replay.reachable([("pair", pair), ("desc", descriptor), ("empty", empty), ("N", 3), ("x", x[8:])])
    assert [(m.names, len(m.bytes), m.start) for m in found] == [
        (["pair[0]", "pair[1][0]", "x"], 256, 0), (["desc"], 1024, 0)
    ]  # fmt: skip
    assert all(m.bytes.data_ptr() == t.data_ptr() for m, t in zip(found, (x, base), strict=True))


def test_two_arguments_of_one_storage_are_put_back_as_one(device):
    x = torch.arange(32, dtype=torch.int32, device=device)
    with replay.recording(2) as seen:
        _pair_kernel[(1,)]((x[:16], x[16:]), BLOCK=16)
    assert seen.faults == [] and x.tolist() == [*range(16), *(2 * i + 16 for i in range(16))]


def once(arguments, **options) -> tuple[replay.Recording, int]:
    """What a recording says of one launch, and how often it took place."""
    seen, calls = replay.Recording(3, **options), []
    assert seen.launch("k", lambda: calls.append(0) or "value", arguments) == "value"
    return seen, len(calls)


def test_what_is_not_repeated_is_counted_with_the_reason(monkeypatch):
    x = torch.zeros(2**18, dtype=torch.int32)
    assert once([("x", x)], limit=2**20)[1] == 4
    assert once([("x", x), ("view", x[3:])], limit=2**20)[1] == 4
    assert once([("x", x), ("y", torch.zeros(1))], limit=2**20) == (
        replay.Recording(3, 2**20, kernels={"k": 1}, skipped={"too large: over 1 MiB": 1}), 1
    )  # fmt: skip
    seen, calls = once([("x", x), ("y", torch.zeros(1, device="meta"))])
    assert (seen.repeated, seen.skipped, calls) == (0, {"with memory of several devices": 1}, 1)
    seen, calls = once([("x", torch.empty(0)), ("n", 3)])
    assert (seen.repeated, seen.skipped, calls) == (0, {"of tensors without memory": 1}, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    seen, calls = once([("x", x)])
    assert (seen.launches, seen.repeated, seen.skipped, calls) == (1, 0, {"in the capture of a CUDA graph": 1}, 1)


def test_a_launch_that_raises_raises_and_memory_is_as_the_first_left_it():
    x, calls = torch.zeros(4), []

    def launch():
        x.add_(1)
        calls.append(0)
        if len(calls) == allowed:
            raise RuntimeError("no launch")

    for allowed, left in (1, 1.0), (3, 1.0):
        x.zero_()
        calls.clear()
        with pytest.raises(RuntimeError, match="no launch"):
            replay.Recording(5).launch("k", launch, [("x", x)])
        assert len(calls) == allowed and x.tolist() == [left] * 4


@pytest.mark.parametrize("kind", [JITFunction, GluonJITFunction])
def test_compiled_kernels_are_repeated_and_warmups_are_not(kind, monkeypatch):
    """Without a GPU: what `run` does is replaced, what calls it is Triton's."""
    x, calls = torch.zeros(4), []

    def run(self, *args, grid, warmup, **kwargs):
        calls.append((self, grid, warmup, kwargs))
        if not warmup:
            x.add_(1)
        return "compiled"

    monkeypatch.setattr(JITFunction, "run", run)
    kernel = kind(_add_one_kernel.fn)
    with replay.recording(2) as seen:
        assert kernel[(7,)](x, N=4, BLOCK=4, num_warps=2) == "compiled"
        kernel.warmup(x, N=4, BLOCK=4, grid=(1,))
    assert JITFunction.run is run and x.tolist() == [1.0] * 4
    assert calls[:3] == [(kernel, (7,), False, {"N": 4, "BLOCK": 4, "num_warps": 2})] * 3 and len(calls) == 4
    assert (seen.launches, seen.repeated, seen.faults) == (1, 1, [])


def test_nothing_is_intercepted_after_an_error_in_the_context():
    run, interpreted = JITFunction.run, type(_add_one_kernel).run
    with pytest.raises(ZeroDivisionError), replay.recording(1):
        assert type(_add_one_kernel).run is not interpreted
        1 / 0  # noqa: B018
    assert JITFunction.run is run and type(_add_one_kernel).run is interpreted


# ---- other conditions on a GPU


def test_every_second_repetition_on_a_gpu_is_under_load(monkeypatch):
    order = []

    class Load:
        def __init__(self, device):
            order.append(str(device))

        def __enter__(self):
            order.append("begin")

        def __exit__(self, *_):
            order.append("end")

    monkeypatch.setattr(replay, "_Load", Load)
    seen = replay.Recording(4)
    for _ in range(2):
        load = seen._load(torch.device("cuda", 0))
        for i in range(4):
            with load(i):
                order.append(i)
    assert order == ["cuda:0"] + 2 * [0, "begin", 1, "end", 2, "begin", 3, "end"]
    with seen._load(torch.device("cpu"))(1):
        assert len(order) == 17


def test_the_load_begins_after_what_was_launched_and_ends_before_what_follows(monkeypatch):
    order = []

    class Stream:
        def __init__(self, name="main"):
            self.name = "beside" if isinstance(name, torch.device) else name

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext(order.append(f"on {s.name}")))
    monkeypatch.setattr(replay, "LOAD_BYTES", 64)
    load = replay._Load(torch.device("cpu"))
    with load:
        order.append("launch")
    assert order == ["beside waits for main", "on beside", "launch", "main waits for beside"]
    assert load._before.tolist() == load._beside.tolist() == [1] * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: streams and captures are faked in the tests above")
def test_load_and_capture_on_a_gpu(device, hidden):
    x = torch.zeros(64, dtype=torch.int32, device=device)
    _add_one_kernel[(4,)](x, 64, BLOCK=16)
    graph = torch.cuda.CUDAGraph()
    with replay.recording(6) as seen:
        _add_one_kernel[(4,)](x, 64, BLOCK=16)
        with torch.cuda.graph(graph):
            _add_one_kernel[(4,)](x, 64, BLOCK=16)
        _counting_kernel[(1,)](x, hidden.data_ptr(), 2, 3)
    graph.replay()
    assert x.tolist() == [3, 3, 1, *[3] * 61] and hidden.item() == 7
    assert seen.skipped == {"in the capture of a CUDA graph": 1} and seen.repeated == 2
    assert len(seen.faults) == 1 and "in 1 of 6 repetitions" in seen.faults[0]


# ---- memory between guard bands


def test_every_module_that_allocates_is_among_the_launchers():
    sources = pathlib.Path(fqt_kernels.__file__).parent.glob("*.py")
    allocating = {source.stem for source in sources if re.search(r"torch\.(empty|zeros)\(", source.read_text())}
    names = {module.__name__.removeprefix("fqt_kernels.") for module in guarded.launchers()}
    assert len(allocating) > 10 and allocating <= names


def test_guarded_memory_is_given_back_and_aligned_as_without_guards(device):
    module = types.SimpleNamespace(torch=torch)
    with guarded.guarded([module]) as memory:
        x = module.torch.empty(3, 5, dtype=torch.int8, device=device)
        assert x.data_ptr() % 64 == 0 and (memory.GUARD * x.element_size()) % 512 == 0
        assert (x == 0x5A).all() and x.is_contiguous() and memory.made == 1 and memory.broken() == []
        frame = weakref.ref(x.untyped_storage())
    assert module.torch is torch
    with pytest.raises(ZeroDivisionError), guarded.guarded([module]):
        1 / 0  # noqa: B018
    assert module.torch is torch
    del x, memory
    gc.collect()
    assert frame() is None


@pytest.mark.parametrize("at", [-1, 15, -4096, 4110])
def test_a_write_outside_is_found_on_its_side_and_names_who_allocated(at, device):
    memory = guarded.GuardedTorch()
    x, _ = memory.empty((3, 5), dtype=torch.int16, device=device), memory.zeros(7, device=device)
    memory.check()
    x.as_strided((1,), (1,), x.storage_offset() + at).fill_(3)
    (found,) = memory.broken()
    side = "before" if at < 0 else "after"
    assert re.fullmatch(rf"{side} the 15 int16 that test_replay\.py:\d+ allocates", found)
    with pytest.raises(AssertionError, match=side):
        memory.check()


def test_pinned_memory_is_torchs_own(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: (shape, options))
    memory = guarded.GuardedTorch()
    options = {"dtype": torch.int64, "device": "cpu", "pin_memory": True}
    assert memory.empty((2, 3), dtype=torch.int64, pin_memory=True) == (((2, 3),), options) and memory.made == 0
