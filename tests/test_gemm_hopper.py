"""Laws of the Hopper product. Its arithmetic of tiles, stages and parities is run as it is, on plain integers, in a model of
the ring; the kernel itself runs where there is an sm_90 GPU, and everywhere else it is compiled (tests/codegen)."""

import importlib
import inspect
import itertools
import sys
import types
from dataclasses import dataclass, replace

import laws
import pytest
import torch

import fqt_kernels.gemm
import fqt_kernels.gemm_hopper as kernels
from fqt import reference
from fqt.qtensor import Operand
from fqt_kernels import _device


def plain(jitted, **names):
    """A jitted function as Python, on integers; names: what it calls."""
    return types.FunctionType(jitted.fn.__code__, names)


# ---- the walk of the tiles


def test_both_products_walk_the_tiles_alike():
    assert kernels.tile_ids.fn is _device.tile_ids.fn is fqt_kernels.gemm.tile_ids.fn


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_every_tile_is_visited_once(group):
    """By programs that each take every so-manieth tile, and a group of rows of tiles is finished before the next."""
    tile_ids = plain(_device.tile_ids, tl=types.SimpleNamespace(minimum=min))
    for num_m, num_n, programs in itertools.product((1, 2, 7, 8, 9, 16, 19), (1, 2, 5, 13), (1, 2, 7, 132)):
        tiles = num_m * num_n
        visited = [tile_ids(i, num_m, num_n, group) for start in range(programs) for i in range(start, tiles, programs)]
        assert sorted(visited) == list(itertools.product(range(num_m), range(num_n)))
        groups = [tile_ids(i, num_m, num_n, group)[0] // group for i in range(tiles)]
        assert groups == sorted(groups)


# ---- the ring


@dataclass(frozen=True)
class Arithmetic:
    """What a step says about stages and parities."""

    stage: object
    full_parity: object
    empty_parity: object
    freed: object


STAGE = plain(kernels.stage_of)
ARITHMETIC = Arithmetic(
    STAGE, plain(kernels.full_parity), plain(kernels.empty_parity), plain(kernels.freed_stage, stage_of=STAGE)
)


class Ring:
    """A model of one program: the producer, two warpgroups of consumers in one partition or in two, loads that land in any
    order, and barriers.

    A state is how many steps the producer has issued, which of its loads are under way, and how far each warpgroup is in
    its operations: the rest follows. A warpgroup's operations are "read" (wait for `full`, start the wgmma of a step),
    "sync" (wait until at most so many wgmma are in flight, then for the other warpgroup) and "free" (arrive on `empty`,
    which one thread of the first warpgroup does for all). Of two partitions none waits for the other, both arrive on
    `empty`, and a phase of it ends with every second arrival.
    """

    def __init__(self, arithmetic: Arithmetic, stages: int, k_steps: int, tiles: int, partitions: int = 1):
        self.stages, self.steps, self.arithmetic, self.partitions = stages, k_steps * tiles, arithmetic, partitions
        self.stage_of = [arithmetic.stage(step, stages) for step in range(self.steps)]
        self.operations = []
        for step in range(self.steps):
            k = step % k_steps
            self.operations += [("read", step), ("sync", 1)]
            if k > 0:
                self.operations.append(("free", arithmetic.freed(step, stages)))
            if k == k_steps - 1:
                self.operations += [("sync", 0), ("free", arithmetic.freed(step + 1, stages))]
        # Before each operation: the steps whose wgmma may still read, the syncs passed, the arrivals on each `empty`.
        self.reading, self.syncs, self.freed = [()], [0], [(0,) * stages]
        for kind, value in self.operations:
            reading, freed = self.reading[-1], list(self.freed[-1])
            if kind == "read":
                reading += (value,)
            elif kind == "sync":
                reading = reading[len(reading) - value :]
            else:
                freed[value] += 1
            self.reading.append(reading)
            self.syncs.append(self.syncs[-1] + (kind == "sync"))
            self.freed.append(tuple(freed))

    def passes(self, completed: int, parity: int, meant: int) -> bool:
        """Whether a wait returns. A barrier tells its current phase from the one before, no more: the phase that is meant
        must be one of these two."""
        assert completed in (meant - 1, meant), f"{completed} phases completed where {meant} is waited for"
        return completed % 2 != parity

    def successors(self, state):
        issued, flying, *at = state
        landed = [0] * self.stages
        for step in range(issued):
            landed[self.stage_of[step]] += step not in flying
        if issued < self.steps:
            stage, meant = self.stage_of[issued], issued // self.stages
            arrived = sum(self.freed[i][stage] for i in at[: self.partitions]) // self.partitions
            if self.passes(arrived, self.arithmetic.empty_parity(issued, self.stages), meant):
                busy = [step for i in at for step in self.reading[i] if self.stage_of[step] == stage]
                assert not busy, f"step {issued} is loaded over step {busy[0]}, which is being read"
                lost = [step for step in range(issued) if self.stage_of[step] == stage and not self.read(step, at)]
                assert not lost, f"step {issued} is loaded over step {lost[0]}, which is still to be read"
                yield issued + 1, flying | {issued}, *at
        for step in flying:
            yield issued, flying - {step}, *at
        for i, position in enumerate(at):
            if position == len(self.operations):
                continue
            if self.partitions == 1 and any(self.syncs[j] < self.syncs[position] for j in at):
                continue
            kind, value = self.operations[position]
            if kind == "read":
                stage, meant = self.stage_of[value], value // self.stages + 1
                if not self.passes(landed[stage], self.arithmetic.full_parity(value, self.stages), meant):
                    continue
                held = [step for step in range(issued) if self.stage_of[step] == stage]
                assert held[-1:] == [value] and value not in flying, f"step {value} is read where {held[-1:]} is"
            yield issued, flying, *at[:i], position + 1, *at[i + 1 :]

    def read(self, step: int, at: list[int]) -> bool:
        """Whether both warpgroups have started the wgmma of a step."""
        return all(("read", step) in self.operations[:position] for position in at)

    def explore(self) -> int:
        """Follow every interleaving; the number of states.

        Raises:
            AssertionError: a stage is overwritten early, a step reads other data than its own, a parity tells nothing, or
                nobody can go on.
        """
        first = (0, frozenset(), 0, 0)
        seen, todo = {first}, [first]
        while todo:
            state = todo.pop()
            followers = list(self.successors(state))
            done = state == (self.steps, frozenset(), len(self.operations), len(self.operations))
            assert followers or done, f"deadlock: {state}"
            for follower in followers:
                if follower not in seen:
                    seen.add(follower)
                    todo.append(follower)
        return len(seen)


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_ring_neither_blocks_nor_mixes_steps(stages, partitions):
    """Whatever the order in which producer, consumers and loads advance."""
    for k_steps, tiles in itertools.product(range(1, 10), range(6)):
        states = Ring(ARITHMETIC, stages, k_steps, tiles, partitions).explore()
        assert states > 4 * k_steps * tiles


BROKEN = {
    "full parity flipped": dict(full_parity=lambda step, stages: (step // stages + 1) % 2),
    "full parity of the next step": dict(full_parity=lambda step, stages: (step + 1) // stages % 2),
    "full parity constant": dict(full_parity=lambda step, stages: 0),
    "empty parity flipped": dict(empty_parity=lambda step, stages: step // stages % 2),
    "empty parity of the next step": dict(empty_parity=lambda step, stages: ((step + 1) // stages + 1) % 2),
    "empty parity constant": dict(empty_parity=lambda step, stages: 1),
    "the stage in flight is freed": dict(freed=lambda step, stages: step % stages),
    "the stage before the last is freed": dict(freed=lambda step, stages: (step - 2) % stages),
    "a stage too many": dict(stage=lambda step, stages: step % (stages - 1)),
    "stages in pairs": dict(stage=lambda step, stages: step // 2 % stages),
}


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_ring_is_found(change, partitions):
    """The model can tell: with wrong arithmetic it blocks, or mixes steps, or waits for a phase it cannot know."""
    with pytest.raises(AssertionError, match=r"deadlock|loaded over|is read where|phases completed"):
        Ring(replace(ARITHMETIC, **change), stages=4, k_steps=3, tiles=4, partitions=partitions).explore()


def test_a_warpgroup_that_does_not_wait_for_the_other_is_found():
    """The barrier between a warpgroup's wait and the arrival, which the compiler inserts, matters."""
    ring = Ring(ARITHMETIC, stages=2, k_steps=3, tiles=2)
    ring.syncs = [0] * len(ring.syncs)
    with pytest.raises(AssertionError, match="loaded over"):
        ring.explore()


# ---- what it cannot do


def test_the_reason_names_what_is_wrong():
    def reason(arch="sm90", m=64, n=64, k=64, dtype=torch.int8):
        return kernels.reason_against(arch, m, n, k, dtype)

    assert kernels.ABSENT is None, "every supported Triton has a Gluon with the names that the kernel needs"
    assert reason() is None
    assert reason(m=1, n=1, k=1) is None
    assert reason(k=131_071) is None and "131072" in reason(k=131_072)
    assert all("sm_90" in reason(arch=arch) and arch in reason(arch=arch) for arch in ("sm80", "sm100", "gfx942", ""))
    assert all("is 0" in reason(**{extent: 0}) for extent in "mnk")
    assert "32-bit" in reason(m=2**27 + 1) and "32-bit" in reason(n=2**27 + 1)
    assert "float8_e4m3fn" in reason(dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(("k", "dtype"), [(0, torch.int8), (131_072, torch.int8), (64, torch.float8_e4m3fn)])
def test_the_launcher_refuses_what_the_kernel_cannot_do(k, dtype):
    codes = torch.empty(8, k, dtype=dtype, device="meta")
    with pytest.raises(ValueError, match=r"is 0|131072|float8_e4m3fn"):
        kernels.scaled_mm(codes, codes, torch.ones(1), torch.ones(1), config=kernels.CONFIGS[0], processors=1)


def test_the_portable_product_takes_the_same_arguments():
    """So that dispatch may exchange one for the other: what this one lacks has a default there."""
    mine, portable = (inspect.signature(module.scaled_mm).parameters for module in (kernels, fqt_kernels.gemm))
    assert set(mine) - set(portable) == {"processors"}
    assert all(portable[name].default is not inspect.Parameter.empty for name in set(portable) - set(mine))


@pytest.mark.parametrize("config", kernels.CONFIGS)
def test_a_configuration_fills_its_warps_and_fits(config):
    block_m, block_n, block_k, warps, stages = config
    assert warps in (4, 8) and block_m % (16 * kernels.CONSUMER_WARPS) == 0 and block_k == 128 and stages >= 2
    assert block_m * block_n // (32 * kernels.CONSUMER_WARPS) <= 128, "accumulators of a thread with 240 registers"
    # The ring, the least staging and the most operands of columns, and a kilobyte for barriers and the compiler.
    ring, consumers = stages * (block_m + block_n) * block_k, kernels.CONSUMER_WARPS // warps
    least = consumers * (16 * warps * kernels.PIECE_BYTES + 3 * 4 * block_n)
    assert ring + least + 1024 <= kernels.SHARED_BYTES
    # Two pieces take turns in the staging, and a tile begins with the first: it has an even number of them.
    for size in (2, 4):
        assert block_m // (consumers * 16 * warps) * (block_n * size // kernels.PIECE_BYTES) % 2 == 0


def test_codes_that_tma_can_read_are_not_copied():
    whole = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    assert whole.data_ptr() % 16 == 0
    for readable in (whole, whole[2:, :33], whole[:, 16:], whole[::2]):
        assert kernels._aligned(readable) is readable
    shifted = torch.randint(-128, 128, (513,), dtype=torch.int8)[1:].view(8, 64)
    one_row = whole[0].as_strided((1, 48), (5, 1))
    narrow, repeated = whole[:, :33].contiguous(), whole[:1].expand(8, 64)
    for unreadable in (whole[:, 1:], narrow, whole.t(), repeated, whole[::3, ::2], shifted, one_row):
        copied = kernels._aligned(unreadable)
        k = unreadable.shape[1]
        assert torch.equal(copied[:, :k], unreadable) and not copied[:, k:].any()
        assert copied.stride(1) == 1 and copied.stride(0) % 16 == 0 and copied.data_ptr() % 16 == 0


@pytest.mark.parametrize("absent", ["triton.experimental", "triton.experimental.gluon.language.nvidia.hopper"])
def test_without_gluon_the_module_imports_and_says_so(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    for name in ("fqt_kernels._gluon", "fqt_kernels.gemm_hopper"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fqt_kernels, "gemm_hopper", kernels)  # and put back what the import binds
    monkeypatch.setattr(fqt_kernels, "_gluon", sys.modules.get("fqt_kernels._gluon"), raising=False)
    module = importlib.import_module("fqt_kernels.gemm_hopper")
    assert "Gluon" in module.reason_against("sm90", 64, 64, 64)
    codes = torch.zeros(8, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="Gluon"):
        module.scaled_mm(codes, codes, torch.ones(1), torch.ones(1), config=module.CONFIGS[0], processors=1)


# ---- on the GPU it is for

HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="runs on sm_90 only; elsewhere tests/codegen compiles it")
# One below and above a tile, a row and a column, unaligned rows of C and of the codes, steps below and above the ring.
SHAPES = [(1, 1, 1), (3, 2, 17), (255, 129, 640), (257, 127, 2000), (128, 256, 128), (2, 4099, 48), (1030, 1032, 1040)]
OFFSETS = list(itertools.product((False, True), (False, True)))


def operand(*args) -> Operand:
    """`laws.random_operand` on the GPU."""
    return Operand(*(None if t is None else t.cuda() for t in laws.random_operand(*args)))


def launch(a: Operand, b: Operand, bias=None, out_dtype=torch.float32, config=kernels.CONFIGS[0], processors=5):
    return kernels.scaled_mm(
        a.q, b.q, a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum, bias=bias,
        out_dtype=out_dtype, config=config, processors=processors,
    )  # fmt: skip


@on_hopper
@pytest.mark.parametrize("config", kernels.CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_product_is_the_reference(shape, config, monkeypatch):
    """Bit for bit in float32, rounded once more in bfloat16; nothing beside C is written, and all of C is. Few programs
    take many tiles."""
    guarded = laws.GuardedTorch()
    monkeypatch.setattr(kernels, "torch", guarded)
    m, n, k = shape
    for i, (granularity, (a_offset, b_offset)) in enumerate(itertools.product(("per_row", "per_tensor"), OFFSETS)):
        a = operand(m, k, granularity, a_offset, False, 2 * i)
        b = operand(n, k, ("per_row", "per_tensor", "none")[i % 3], b_offset, True, 2 * i + 1)
        bias = None if i % 3 == 0 else torch.randn(n, device="cuda").to((torch.float32, torch.bfloat16)[i % 2])
        host = [Operand(*(None if t is None else t.cpu() for t in side)) for side in (a, b)]
        for out_dtype in (torch.float32, torch.bfloat16):
            expected = reference.scaled_mm(*host, None if bias is None else bias.cpu(), out_dtype)
            laws.assert_same(launch(a, b, bias, out_dtype, config), expected, f"{shape} {i} {out_dtype}")
    guarded.check()


@on_hopper
@pytest.mark.parametrize("config", kernels.CONFIGS)
@pytest.mark.parametrize("n", [6144, 6143])
def test_a_race_would_show(config, n):
    """Large products, many times over, on all processors and on few, stored by TMA and by threads: always the portable
    kernel's bits."""
    a, b = operand(4096, 8192, "per_row", True, False, 0), operand(n, 8192, "per_row", True, True, 1)
    portable = fqt_kernels.gemm.scaled_mm(
        a.q, b.q, a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum,
        config=fqt_kernels.gemm.CONFIGS["sm90"][0],
    )  # fmt: skip
    for processors in (132, 131, 7) * 7:
        assert torch.equal(launch(a, b, config=config, processors=processors), portable)


@on_hopper
def test_the_longest_sum_is_exact():
    k = 131_071
    codes = torch.full((3, k), -128, dtype=torch.int8, device="cuda")
    one = torch.ones(1, device="cuda")
    out = kernels.scaled_mm(codes, codes, one, one, config=kernels.CONFIGS[-1], processors=1)
    assert torch.equal(out, torch.full_like(out, float(k * 2**14)))
