"""The Hopper product's own source, run on the CPU by the machine of `gluon.py`: its results, and that faults show."""

import importlib.util
import itertools

import gluon
import gluon_machine
import pytest
import torch
from laws import random_operand as operand

import fqt_kernels.gemm_hopper as kernels
from fqt import reference
from fqt.qtensor import Operand

KERNEL = "_hopper_scaled_mm_kernel"
NAMES = ["x".join(map(str, c[:3])) + f" w{c[3]} s{c[4]}" for c in kernels.CONFIGS]
# One below and above a tile, a row and a column, rows of C that TMA cannot store, steps below and above the ring.
SHAPES = [(1, 1, 1), (3, 2, 17), (255, 129, 640), (257, 136, 1300), (128, 256, 128), (300, 520, 48)]
OFFSETS = list(itertools.product((False, True), (False, True)))


def launch(module, a: Operand, b: Operand, config, seed: int, bias=None, out_dtype=torch.float32, processors=2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, KERNEL, gluon.emulate(module, KERNEL, seed))
        return module.scaled_mm(
            a.q, b.q, a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum, bias=bias,
            out_dtype=out_dtype, config=config, processors=processors,
        )  # fmt: skip


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_product_is_the_reference(shape, config):
    """Bit for bit, also in bfloat16; every element is stored once. The order of events differs from case to case."""
    m, n, k = shape
    for i, (granularity, (a_offset, b_offset)) in enumerate(itertools.product(("per_row", "per_tensor"), OFFSETS)):
        if (i + SHAPES.index(shape)) % 2:  # half of the epilogues with each shape
            continue
        seed = 1000 * kernels.CONFIGS.index(config) + 100 * SHAPES.index(shape) + i
        a = operand(m, k, granularity, a_offset, False, 2 * seed)
        b = operand(n, k, ("per_row", "per_tensor", "none")[i % 3], b_offset, True, 2 * seed + 1)
        bias = None if i % 3 == 0 else torch.randn(n).to((torch.float32, torch.bfloat16)[i % 2])
        out_dtype = (torch.float32, torch.bfloat16)[i // 2 % 2]
        out = launch(kernels, a, b, config, seed, bias, out_dtype)
        expected = reference.scaled_mm(a, b, bias, out_dtype)
        assert out.dtype == out_dtype and torch.equal(out, expected), (shape, i)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=NAMES)
def test_any_order_of_events_gives_the_same_bits(config):
    """Of copies that land, products that finish, stores that are read, and partitions that advance."""
    a, b = operand(400, 900, "per_row", True, False, 0), operand(264, 900, "per_row", True, True, 1)
    expected = reference.scaled_mm(a, b, None, torch.float32)
    for seed in range(kernels.CONFIGS.index(config) % 2, len(gluon_machine.LAZY), 2):
        assert torch.equal(launch(kernels, a, b, config, seed, processors=1 + seed % 3), expected), seed


# ---- the machine can tell

SPLIT, WHOLE = (128, 256, 128, 4, 4), (128, 256, 128, 8, 4)
EMPTY = "            mbarrier.wait(empty.index(stage), empty_parity(step, STAGES))\n"
FULL = "            mbarrier.wait(full.index(stage), full_parity(step, STAGES))\n"
LAST_FREE = "        mbarrier.arrive(empty.index(freed_stage(step, STAGES)))\n"
LAST_WAIT = "        acc = warpgroup_mma_wait(0, deps=[acc])\n"
EXTRA = """            step += 1
    stage = stage_of(step, STAGES)
    mbarrier.wait(empty.index(stage), empty_parity(step, STAGES))
    mbarrier.expect(full.index(stage), BLOCK_M * BLOCK_K)
    tma_load(a_desc, [0, 0], full.index(stage), a_ring.index(stage))


"""
STORE = "        buffer.store(out.to(buffer.dtype))\n        fence_async_shared()\n"
OUT_LAYOUT = "out_layout: gl.constexpr = gl.NVMMASharedLayout(128"
SECOND = "(HALF, staging_2, columns_2, ring"
MUTATIONS = {
    "stages are not waited for": (EMPTY, ""),
    "loads are not waited for": (FULL, ""),
    "the stage in flight is freed": ("freed_stage(step, STAGES)), pred=k > 0)", "stage_of(step, STAGES)), pred=k > 0)"),
    "the last stage is not freed": (LAST_FREE, ""),
    "the last product is not waited for": ("acc = warpgroup_mma_wait(0, deps=[acc])\n", "pass\n"),
    "the last stage is freed early": (LAST_WAIT + LAST_FREE, LAST_FREE + LAST_WAIT),
    "a load that nobody waits for": ("            step += 1\n\n\n", EXTRA),
    "another swizzle": (OUT_LAYOUT, OUT_LAYOUT.replace("128", "64")),
    "more shared memory than there is": ("left = SHARED_BYTES - 1024", "left = 2 * SHARED_BYTES - 1024"),
    "rows beyond the end": ("(m < M - first_m - row)", "(m < M - first_m)"),
    "the bias of other columns": ("out += _column(columns, columns.shape[0] - 1, FIRST, layout)",
                                  "out += _column(columns, 0, FIRST, layout)"),
    "two products in flight": ("warpgroup_mma_wait(1, deps=[acc])", "warpgroup_mma_wait(2, deps=[acc])"),
    "fewer bytes expected": ("(BLOCK_M + BLOCK_N) * BLOCK_K)", "(BLOCK_M + BLOCK_N) * BLOCK_K // 2)"),
    "more bytes expected": ("(BLOCK_M + BLOCK_N) * BLOCK_K)", "(BLOCK_M + BLOCK_N) * BLOCK_K * 2)"),
    "A's block is loaded twice": ("tma_load(b_desc, [tile_n * BLOCK_N, k]", "tma_load(b_desc, [tile_m * BLOCK_N, k]"),
    "staging is not waited for": ("        tma_store_wait(pending)\n", ""),
    "stores are not fenced": (STORE, STORE.replace("        fence_async_shared()\n", "")),
    "stores are not waited for at the end": ("    tma_store_wait(0)\n", ""),
    "barriers are not fenced": ("    fence_async_shared()\n    M, N, K", "    M, N, K"),
    "both halves are the first": (SECOND, SECOND.replace("HALF", "0")),
    "staging in common": (SECOND, SECOND.replace("staging_2", "staging")),
    "columns in common": (SECOND, SECOND.replace("columns_2", "columns")),
    "one partition frees for both": ("mbarrier.init(empty.index(i), count=CONSUMERS)",
                                     "mbarrier.init(empty.index(i), count=1)"),
    "tiles as high as a half": ("tile_m * (BLOCK_M * CONSUMERS) + FIRST_ROW", "tile_m * BLOCK_M + FIRST_ROW"),
    "tiles counted by halves": ("num_m = gl.cdiv(M, BLOCK_M * CONSUMERS)", "num_m = gl.cdiv(M, BLOCK_M)"),
    "a half of the columns": ("_column(columns, 0, FIRST, layout)", "_column(columns, 0, 0, layout)"),
    "rows of another run": ("gl.expand_dims(sa[RUN], 1)\n", "gl.expand_dims(sa[0], 1)\n"),
    "an unmasked scale": ("mask=offs < extent, other=0)", "mask=offs < extent + 1, other=0)"),
}  # fmt: skip
ONLY_WITH_RUNS = {"rows of another run": (256, 128, 128, 8, 4)}


@pytest.mark.parametrize("old,new", MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_kernel_is_found(old, new, tmp_path, request):
    """By a fault or a wrong result, of products with several tiles and more steps than stages, in one of as many orders of
    events as there are kinds of them to hold back."""
    with open(kernels.__file__) as f:
        source = f.read()
    assert source.count(old) == 1, f"{source.count(old)} places to break"
    (tmp_path / "broken.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("fqt_kernels.broken_hopper", tmp_path / "broken.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = ONLY_WITH_RUNS.get(request.node.callspec.id, SPLIT)
    a, bias = operand(300, 1100, "per_row", True, False, 0), torch.randn(264)
    both = [operand(n, 1100, "per_row", True, True, 1) for n in (264, 263)]  # stores by TMA, and by threads
    expected = [reference.scaled_mm(a, b, bias[: len(b.q)], torch.float32) for b in both]
    for seed in range(2 * len(gluon_machine.LAZY)):
        b, want = both[seed // len(gluon_machine.LAZY)], expected[seed // len(gluon_machine.LAZY)]
        try:
            out = launch(module, a, b, config, seed, bias[: len(b.q)], processors=1)
        except gluon.Fault:
            return
        if not torch.equal(out, want):
            return
    pytest.fail("nothing was found")
