"""`select` is a pure function of a frozen problem; `backend` forces its answer."""

import doctest
import itertools
import math
import re
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import fqt
from fqt import candidates, dispatch, tuned
from fqt.candidates import Candidate
from fqt.dispatch import Choice, Problem, choose, select

H100 = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0", dtype="bfloat16")


def product(m=4096, n=4096, k=4096, **change):
    return select(Problem("scaled_mm", m, n, k, **{**H100, **change}))


def test_the_choice_is_printable_hashable_and_repeatable():
    p = Problem("scaled_mm", 4096, 4096, 4096, **H100)
    assert select(p) is select(Problem(**vars(p))) and "portable (128, 256, 128, 8, 3): 512 tiles" in str(select(p))
    assert "split_k" not in str(select(p)) and " split_k 32: " in str(product(64, 64, 100_000))
    with pytest.raises(AttributeError):
        p.m = 1


@pytest.mark.parametrize(
    ("change", "backend", "fallback", "says"),
    [
        ({}, "triton", False, "512 tiles for 132"),
        ({"device": "cpu", "arch": ""}, "reference", False, "CPU"),
        ({"device": "cpu", "arch": "", "force": "triton"}, "triton", False, "interpreter"),
        ({"device": "mps", "arch": ""}, "reference", True, "mps has no int8 kernel"),
        ({"triton": None}, "reference", True, "not installed"),
        ({"dtype": "float64"}, "reference", False, "float64"),
        ({"force": "reference"}, "reference", False, "asked for"),
        ({"arch": "sm75"}, "reference", True, "sm_75 has no int8 kernel: it needs sm_80"),
        ({"arch": "sm75", "format": "e4m3"}, "reference", True, "sm_75 has no float8 kernel: it needs sm_89 or newer$"),
        ({"arch": "sm103"}, "reference", True, "INT8 throughput: use recipe 'fp8'"),
        ({"arch": "sm103", "force": "triton"}, "triton", False, "tiles"),
        ({"arch": "sm103", "format": "e4m3"}, "triton", False, "tiles"),
        ({"arch": "sm100"}, "triton", True, "Triton 3.6.0 multiplies int8 by sm_80's .* 3.8"),
        ({"arch": "sm100", "triton": "3.8.0+git1a"}, "triton", False, "tiles for 132 processors$"),
        ({"arch": "sm100", "triton": "3.10.0"}, "triton", False, "tiles for 132 processors$"),
        ({"arch": "sm100", "format": "e4m3"}, "triton", False, "tiles for 132 processors$"),
        ({"arch": "sm110"}, "reference", True, "known to suit sm_110: fqt.backend.'triton'. tries"),
        ({"arch": "sm110", "force": "triton"}, "triton", False, "tiles"),
        ({"arch": "sm80", "format": "e4m3"}, "reference", True, "sm_80 has no float8 .* use recipe 'int8'"),
        ({"arch": "gfx942"}, "triton", False, ""),
        ({"arch": "gfx942", "format": "e4m3"}, "reference", True, "gfx942 has no float8 .* use recipe 'int8'"),
        ({"arch": "sm120", "format": "e4m3"}, "triton", False, ""),
        ({"arch": "sm120"}, "triton", False, ""),
    ],
)
@pytest.mark.parametrize("op", ["scaled_mm", "quantize", "quantize_gradient"])
def test_what_decides_the_backend(op, change, backend, fallback, says):
    """All operators of a layer go the same way; what multiplies slowly, quantizes well."""
    choice = select(Problem(op, 4096, 4096, 4096, **{**H100, **change}))
    slow = backend == "triton" and fallback
    assert (choice.backend, choice.fallback) == (backend, fallback and not (slow and op != "scaled_mm"))
    assert choice.kernel == ("portable" if backend == "triton" and op == "scaled_mm" else "")
    chosen = backend == "triton" and change.get("device") != "cpu"
    assert choice.source == ("heuristic" if chosen else "")
    if op == "scaled_mm" or backend == "reference":
        assert re.search(says, choice.reason), choice.reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"triton": None}, "Triton is not installed"),
        ({"triton": None, "device": "cpu"}, "Triton is not installed"),
        ({"arch": "sm75"}, "sm_75 has no int8 kernel"),
        ({"arch": "sm86", "format": "e4m3"}, "sm_86 has no float8 kernel"),
        ({"arch": "gfx942", "format": "e4m3"}, "gfx942 has no float8 kernel"),
    ],
)
@pytest.mark.parametrize("op", ["scaled_mm", "quantize"])
def test_kernels_that_cannot_compile_are_not_forced(op, change, says):
    with pytest.raises(RuntimeError, match=rf"fqt.backend\('triton'\): {says}"):
        select(Problem(op, 64, 64, 64, force="triton", **{**H100, **change}))


def test_tiles_shrink_with_the_output_and_long_sums_flush():
    areas = []
    for size in (64, 512, 2048, 8192):
        config = product(size, size, 1024).config
        areas.append(config[0] * config[1])
    assert areas == sorted(areas) and areas[0] < areas[-1]
    from fqt_kernels.gemm import FLUSH_CONFIG, MAX_INT32_TERMS

    for size in (64, 8192):
        assert product(size, size, MAX_INT32_TERMS).config != FLUSH_CONFIG["sm90"]
        flushed = product(size, size, MAX_INT32_TERMS + 1)
        assert (flushed.config, flushed.split_k) == (FLUSH_CONFIG["sm90"], 1)
        assert product(size, size, MAX_INT32_TERMS + 1, format="e4m3").config != FLUSH_CONFIG["sm90"]


@pytest.mark.parametrize("arch, processors", [("sm90", 132), ("sm80", 108), ("sm89", 128), ("sm100", 148)])
def test_long_sums_of_few_tiles_are_split(arch, processors):
    """As far as processors are free and 8 blocks of K stay with each program; sums of short rows and full grids are not."""
    splits = {}
    for m, n, k in itertools.product((1, 64, 512, 1024, 8192), (64, 768, 4096), (64, 1024, 8192, 65536)):
        choice = product(m, n, k, arch=arch, processors=processors, triton="3.9.0")
        block_m, block_n, block_k, *_ = choice.config
        tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
        splits[m, n, k] = choice.split_k
        if choice.split_k > 1:
            assert tiles * choice.split_k <= processors and k >= 8 * block_k * choice.split_k
            assert f"{choice.split_k} programs share a sum" in choice.reason
    assert splits[64, 64, 65536] == 32 and splits[512, 768, 65536] > 1
    assert splits[8192, 4096, 65536] == splits[64, 64, 64] == splits[1, 64, 1024] == 1


def test_only_exact_sums_of_nvidia_are_split():
    assert product(64, 64, 65536).split_k > 1
    assert product(64, 64, 65536, format="e4m3").split_k == 1
    assert product(64, 64, 65536, arch="gfx942").split_k == 1


def test_rows_that_are_no_multiples_of_16_get_tiles_that_keep_their_registers():
    from fqt_kernels.gemm import CONFIGS, FP8_CONFIGS, fits

    kinds = [("sm90", "int"), ("sm90", "e4m3"), ("sm80", "int"), ("sm100", "int")]
    for (arch, codes), n in itertools.product(kinds, (4095, 50257)):
        assert fits(product(8192, n, 4096, arch=arch, format=codes).config, n)
    assert all(fits(table[0], 4095) for table in (*CONFIGS.values(), *FP8_CONFIGS.values()))
    assert not fits(product().config, 4095) and fits(product().config, 4096)


def test_every_family_of_gpu_has_configurations():
    from fqt_kernels.gemm import CONFIGS, FLUSH_CONFIG, FP8_CONFIGS

    assert {*candidates.FAMILY.values(), "amd"} == CONFIGS.keys() == FLUSH_CONFIG.keys()
    assert {*candidates.FP8_FAMILY.values()} == FP8_CONFIGS.keys()


# ---- convolutions


def convolution(op="conv", m=50_176, n=256, k=9 * 256, kind="9 taps", **change):
    return select(Problem(op, m, n, k, **{**H100, "kind": kind, **change}))


@pytest.mark.parametrize("op", candidates.CONVOLUTIONS)
def test_convolutions_go_the_way_of_products(op):
    """The backend and what the user is told; forcing, too."""
    assert convolution(op).backend == "triton" and convolution(op).source == "heuristic"
    for change, fallback in (
        ({"triton": None}, True), ({"arch": "sm75"}, True), ({"arch": "sm103"}, True), ({"format": "e4m3"}, True),
        ({"device": "cpu", "arch": ""}, False), ({"dtype": "float64"}, False), ({"force": "reference"}, False),
    ):  # fmt: skip
        choice = convolution(op, **change)
        assert (choice.backend, choice.fallback) == ("reference", fallback), change
    assert "leave convolutions in bfloat16" in convolution(op, arch="sm103").reason
    assert convolution(op, format="e4m3").reason == "convolutions have kernels for int8 codes only"
    interpreted = convolution(op, device="cpu", arch="", force="triton")
    assert interpreted.backend == "triton" and (interpreted.config is None) == op.startswith("quantize")
    slow = convolution(op, arch="sm100", triton="3.7.1")
    assert slow.fallback != op.startswith("quantize") and ("tcgen05" in slow.reason) == slow.fallback
    for forced in ({"force": "triton"}, {"force": "hopper"}):
        assert convolution(op, **forced).backend == "triton"
        with pytest.raises(RuntimeError, match="int8 codes only"):
            convolution(op, format="e4m3", **forced)


def test_convolutions_get_configurations_of_their_own_kernels():
    from fqt_kernels import conv, conv_wgrad

    assert {*candidates.FAMILY.values(), "amd"} == conv.CONFIGS.keys() == conv_wgrad.CONFIGS.keys()
    for arch, n, (taps, channels) in itertools.product(("sm80", "sm90", "gfx942"), (16, 20, 512), ((1, 64), (9, 512))):
        table = "amd" if arch == "gfx942" else arch
        choice = convolution(n=n, k=taps * channels, kind=f"{taps} taps", arch=arch)
        assert choice.config in conv.CONFIGS[table] and conv.fits(choice.config, n) and choice.split_k == 1
        assert "tiles for 132 processors" in choice.reason and str(choice).startswith("triton implicit (")
        assert convolution("conv_wgrad", n, taps * channels, 50_176, "", arch=arch).config in conv_wgrad.CONFIGS[table]
    assert convolution(n=4, k=9 * 4, kind="9 taps 32 groups").config == conv.UNALIGNED_CONFIG
    assert convolution(n=32, k=9 * 32, kind="9 taps 32 groups").config[1] == 32  # no tile is mostly beyond a group


def test_sums_of_a_convolution_stay_in_int32():
    """Those of fprop and dgrad as a whole, or the reference computes them; those of wgrad in every program."""
    from fqt_kernels.gemm import MAX_INT32_TERMS

    assert convolution(k=MAX_INT32_TERMS, kind="").backend == "triton"
    for device in ({}, {"device": "cpu", "arch": ""}):
        choice = convolution(k=MAX_INT32_TERMS + 1, kind="", **device)
        assert choice.backend == "reference" and "131072 products (taps times channels" in choice.reason
        assert choice.fallback is (not device)
        with pytest.raises(RuntimeError, match="leaves int32"):
            convolution(k=MAX_INT32_TERMS + 1, kind="", force="triton", **device)
    for k, m, groups in itertools.product((49, 131_072, 200_704, 3_211_264), (1, 64, 4096), (1, 32)):
        for device in ({}, {"arch": "gfx942"}, {"device": "cpu", "arch": "", "force": "triton"}):
            choice = convolution("conv_wgrad", m, 9 * m, k, f"{groups} groups" * (groups > 1), **device)
            block_k = choice.config[2]
            assert math.ceil(math.ceil(k / block_k) / choice.split_k) * block_k <= MAX_INT32_TERMS
            tiles = math.ceil(m / choice.config[0]) * math.ceil(9 * m / choice.config[1]) * groups
            least = math.ceil(math.ceil(k / block_k) / (MAX_INT32_TERMS // block_k))
            assert choice.split_k in (1, least) or choice.split_k * tiles <= 2 * 132
    assert convolution("conv_wgrad", 64, 9 * 64, 802_816, "").split_k > 16  # few tiles would leave processors free


def test_the_taps_and_groups_of_a_convolution_count():
    """A tap's channels fill whole blocks of K, and every group has tiles of its own."""
    p = Problem("conv", 4096, 64, 9 * 64, **H100, kind="9 taps 4 groups")
    assert candidates.tiles(p, (128, 64, 128, 4, 4)) == 4 * 32
    assert candidates.steps(p, (128, 64, 128, 4, 4)) == 9 and candidates.steps(p, (128, 64, 32, 4, 4)) == 18
    assert candidates.steps(replace(p, kind="4 groups"), (128, 64, 128, 4, 4)) == 5


# ---- the kernel for Hopper


@pytest.fixture
def hopper():
    """gemm_hopper, if its Gluon is there."""
    module = pytest.importorskip("fqt_kernels.gemm_hopper")
    if never := module.reason_against("sm90", 128, 128, 128):
        pytest.skip(never)
    return module


def test_the_hopper_kernel_is_not_for_cpu_tensors():
    with pytest.raises(RuntimeError, match="CPU tensors"):
        select(Problem("scaled_mm", 8, 8, 8, force="hopper"))


def test_the_hopper_kernel_is_for_who_asks(hopper, monkeypatch):
    assert product().kernel == "portable"
    choice = product(force="hopper")
    assert (choice.backend, choice.kernel, choice.split_k) == (
        "triton",
        "hopper",
        1,
    ) and choice.config in hopper.CONFIGS
    assert str(choice).startswith("triton hopper (")
    assert select(Problem("quantize", 64, 64, force="hopper", **H100)).backend == "triton"
    select.cache_clear()  # of answers from before the switch
    monkeypatch.setattr(candidates, "HOPPER_KERNEL", True)
    try:
        assert product().kernel == "hopper" and product(512, 512, 65536).kernel == "portable"
        assert product(force="triton").kernel == product(arch="sm100").kernel == "portable"
    finally:
        select.cache_clear()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(k=200_704), "not the Hopper kernel: .*overflow"),
        (dict(format="e4m3"), "not the Hopper kernel: its float8 sums"),
        (dict(plain=False), "not the Hopper kernel: it writes a new output"),
    ],
)
def test_what_the_hopper_kernel_cannot_do_the_portable_one_does(change, says, hopper):
    choice = product(force="hopper", **change)
    assert choice.kernel == "portable" and re.search(says, choice.reason)


def test_a_gpu_without_the_hopper_kernel_refuses_it(hopper):
    with pytest.raises(RuntimeError, match=r"fqt.backend\('hopper'\): .*sm_90, not sm80"):
        product(force="hopper", arch="sm80")


# ---- tuned tables


def entry(m, n, k, ranking, bf16_ms=0.0, op="scaled_mm", origin="", **change):
    """A table's entry of measured candidates: (candidate, milliseconds), in order."""
    timings = tuple(tuned.Timing(*candidate, round(ms * 1e6)) for candidate, ms in ranking)
    key = tuned.key(Problem(op, m, n, k, **{**H100, **change}))
    return tuned.Entry(key, timings, round(bf16_ms * 1e6), (m, n, k), origin)


PORTABLE, SMALL = Candidate("portable", (128, 128, 128, 8, 3)), Candidate("portable", (64, 128, 128, 4, 4))
CUBLAS, ASYNC = Candidate("cublas", ()), Candidate("hopper", (128, 256, 128, 8, 4))
STRANGER = Candidate("portable", (512, 512, 128, 8, 3))


def chosen(table, m=4096, n=4096, k=4096, **change):
    choice = select(Problem("scaled_mm", m, n, k, **{**H100, **change}), table)
    return choice, Candidate(choice.kernel, choice.config or (), choice.split_k)


def test_the_best_measured_candidate_is_chosen():
    """Over the heuristic's, whatever kernel it is; of the problem's whole bucket."""
    guess = heuristic = candidates.heuristic(Problem("scaled_mm", 4096, 4096, 4096, **H100))
    for best in (PORTABLE, SMALL, CUBLAS):
        assert best != guess
        table = tuned.Table([entry(4096, 4096, 4096, [(best, 0.1), (heuristic, 0.2)])])
        for m in (4096, 4000, 3600):
            choice, candidate = chosen(table, m)
            assert (candidate, choice.backend, choice.source) == (best, "triton", "tuned")
            assert choice.reason == "tuned at 4096x4096x4096: 0.1 ms" and not choice.fallback
    assert chosen(tuned.EMPTY)[1] == guess and chosen(tuned.EMPTY)[0].source == "heuristic"


def test_a_table_may_take_the_hopper_kernel(hopper):
    """HOPPER_KERNEL is the heuristic's; where the kernel cannot write what is wanted, the next of the ranking is chosen."""
    assert not candidates.HOPPER_KERNEL
    table = tuned.Table([entry(4096, 4096, 4096, [(ASYNC, 0.1), (CUBLAS, 0.2)])])
    assert chosen(table)[1] == ASYNC and chosen(table, plain=False)[1] == CUBLAS
    assert chosen(table, force="hopper")[1] == ASYNC


def test_what_is_no_candidate_is_never_launched():
    """A configuration that the code does not have, a kernel that cannot compute it, another operator's kernel: skipped."""
    others = [(STRANGER, 0.01), (Candidate("tile", (64, 128, 8)), 0.02), (PORTABLE._replace(split_k=7), 0.03)]
    table = tuned.Table([entry(4096, 4096, 4096, [*others, (SMALL, 0.1)])])
    assert chosen(table)[1] == SMALL and chosen(table)[0].source == "tuned"
    guess = candidates.heuristic(Problem("scaled_mm", 4096, 4096, 4096, **H100))
    choice, candidate = chosen(tuned.Table([entry(4096, 4096, 4096, others)]))
    assert candidate == guess and choice.source == "heuristic"
    table = tuned.Table([entry(16, 4096, 4096, [(CUBLAS, 0.01), (SMALL, 0.1)])])
    assert chosen(table, 16)[1] == SMALL  # torch._int_mm wants 17 rows
    table = tuned.Table([entry(64, 64, 262_144, [(SMALL, 0.01)])])
    assert chosen(table, 64, 64, 262_144)[0].source == "heuristic"  # sums that leave int32


def test_without_an_entry_the_nearest_bucket_decides():
    """Within a factor of two of every dimension, the nearest that names a candidate; the reason says where."""
    near = entry(4096, 4096, 5120, [(STRANGER, 0.01)]), entry(4096, 4096, 6144, [(CUBLAS, 0.2)])
    far = entry(4096, 4096, 8192, [(SMALL, 0.3)]), entry(4096, 16384, 4096, [(PORTABLE, 0.4)])
    choice, candidate = chosen(tuned.Table([*far, *near]))
    assert (candidate, choice.source) == (CUBLAS, "nearest")
    assert choice.reason == "tuned at the nearest shape 4096x4096x6144: 0.2 ms"
    assert chosen(tuned.Table([far[1]]))[0].source == "heuristic"
    own = entry(4096, 4096, 4096, [(SMALL, 0.5)])
    assert chosen(tuned.Table([*far, *near, own]))[0].source == "tuned"
    assert (
        chosen(tuned.Table([*near, own]), 4096, 4095, 4096)[0].source == "heuristic"
    )  # unaligned rows are another kind


def test_the_reason_says_where_bf16_is_faster():
    """Dispatch does not replace quantized arithmetic by bf16, it says what was measured."""
    table = tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.912)], bf16_ms=1.41, origin="shipped")])
    assert chosen(table)[0].reason == "tuned at 4096x4096x4096 (shipped): 0.912 ms; bf16 takes 1.41 ms"
    choice, candidate = chosen(tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.912)], bf16_ms=0.8)]))
    assert candidate == CUBLAS and choice.reason.endswith("0.912 ms; bf16 is faster: 0.8 ms")


def test_what_the_user_forces_beats_the_table():
    table = tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.1), (ASYNC, 0.2), (SMALL, 0.3)])])
    assert chosen(table, force="reference")[0] == Choice("reference", None, "asked for")
    assert chosen(table, force="triton")[1] == SMALL  # the library is none of Triton's kernels
    for gone in (dict(triton=None), dict(device="cpu", arch=""), dict(arch="sm75"), dict(dtype="float64")):
        assert chosen(table, **gone)[0].backend == "reference"
    assert chosen(table, device="cpu", arch="", force="triton")[0].reason == "asked for, in the interpreter"


def test_deterministic_float8_products_keep_the_heuristic_s_configuration():
    p = Problem("scaled_mm", 4096, 4096, 4096, **H100, format="e4m3")
    guess = candidates.heuristic(p)
    other = next(c for c in candidates.candidates(p) if c != guess)
    table = tuned.Table([entry(4096, 4096, 4096, [(other, 0.1), (guess, 0.2)], format="e4m3")])
    assert chosen(table, format="e4m3")[1] == other
    assert chosen(table, format="e4m3", deterministic=True)[1] == guess
    table = tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.1)])])
    assert chosen(table, deterministic=True)[1] == CUBLAS  # sums of int8 are exact


def test_a_slow_portable_kernel_is_a_fallback_also_where_it_was_measured():
    here = dict(arch="sm100", triton="3.7.1")
    table = tuned.Table([entry(4096, 4096, 4096, [(PORTABLE, 0.1)], **here)])
    choice = chosen(table, **here)[0]
    assert choice.fallback and choice.source == "tuned" and "use tcgen05" in choice.reason
    table = tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.1)], **here)])
    assert not chosen(table, **here)[0].fallback


def test_quantizations_are_chosen_from_the_table():
    """By dtype and kind as well; without an entry the launcher chooses."""
    kind = dict(op="quantize", kind="per_row nearest both", dtype="bfloat16")
    tile = Candidate("tile", (128, 64, 8))
    table = tuned.Table([entry(8192, 1024, 0, [(tile, 0.1)], **kind), entry(8192, 1024, 0, [(tile, 0.1)], op="quantize",
                         kind="per_row stochastic rows")])  # fmt: skip
    p = Problem(m=8192, n=1024, **{**H100, **kind})
    assert str(select(p, table)) == "triton tile (128, 64, 8): tuned at 8192x1024: 0.1 ms"
    for other in (replace(p, dtype="float32"), replace(p, kind="per_row nearest rows"), replace(p, m=512)):
        choice = select(other, table)
        assert (choice.kernel, choice.config, choice.source) == ("", None, "heuristic")
    both = dict(op="quantize_gradient", kind="per_row per_column")
    table = tuned.Table([entry(8192, 1024, 0, [(tile, 0.1)], **both)])
    assert select(Problem(m=8192, n=1024, **{**H100, **both}), table).config == tile.config


# ---- what operators launch


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, and a stand-in for `fqt.tuning` that knows what its `table` says and finds SMALL."""
    tuning = types.SimpleNamespace(active=tuned.EMPTY, on=False, calls=[])

    def tune_now(problem, device):
        tuning.calls.append((problem, device))
        tuning.active = tuned.Table([entry(problem.m, problem.n, problem.k, [(SMALL, 0.1)])])

    tuning.table, tuning.enabled, tuning.tune_now = lambda device: tuning.active, lambda: tuning.on, tune_now
    monkeypatch.setattr(dispatch, "_tuning", lambda: tuning)
    monkeypatch.setattr(dispatch, "device_info", lambda device: ("sm90", 132))
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._chosen.cache_clear()
    yield tuning
    dispatch._chosen.cache_clear()


CUDA = torch.device("cuda", 0)
CALL = ("scaled_mm", CUDA, 4096, 4096, 4096, torch.bfloat16)


def test_operators_choose_by_the_table_of_their_device(gpu):
    assert choose(*CALL).source == "heuristic"
    gpu.active = tuned.Table([entry(4096, 4096, 4096, [(CUBLAS, 0.1)])])
    assert choose(*CALL).kernel == "cublas"
    assert choose("scaled_mm", torch.device("cpu"), 4096, 4096, 4096).backend == "reference"
    with fqt.backend("triton"):
        assert choose(*CALL).kernel == "portable"
    gpu.active = tuned.EMPTY
    assert choose(*CALL).source == "heuristic" and gpu.calls == []


def test_determinism_is_asked_for_at_every_call(gpu):
    p = dict(format="e4m3")
    guess, other = candidates.candidates(Problem("scaled_mm", 4096, 4096, 4096, **H100, **p))[:2]
    gpu.active = tuned.Table([entry(4096, 4096, 4096, [(other, 0.1)], **p)])
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (False, True, False):
            torch.use_deterministic_algorithms(wanted)
            assert choose(*CALL, **p).config == (guess if wanted else other).config
            assert dispatch.problem(*CALL).deterministic is wanted
    finally:
        torch.use_deterministic_algorithms(before)


def test_only_enabled_tuning_tunes_and_only_what_has_no_entry(gpu):
    choose(*CALL)
    assert gpu.calls == []
    gpu.on = True
    choice = choose(*CALL, plain=False)
    assert [(p.m, p.n, p.k, p.plain, d) for p, d in gpu.calls] == [(4096, 4096, 4096, False, CUDA)]
    assert (choice.config, choice.source) == (SMALL.config, "tuned")
    choose(*CALL, plain=False)
    choose(*CALL)
    assert len(gpu.calls) == 1
    gpu.active = tuned.Table([entry(4096, 4096, 6144, [(CUBLAS, 0.1)])])
    assert choose(*CALL).config == SMALL.config and len(gpu.calls) == 2  # the nearest is not its own
    gpu.active = tuned.Table([entry(4096, 4096, 4096, [(STRANGER, 0.1)])])
    assert choose(*CALL).source == "heuristic" and len(gpu.calls) == 2  # tuned, if to no avail


def test_nothing_is_tuned_that_no_gpu_runs_now(gpu, monkeypatch):
    """Not on the CPU, not what the reference computes, not while a graph is captured or a program is traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu.on = True
    choose("scaled_mm", torch.device("cpu"), 4096, 4096, 4096)
    with fqt.backend("reference"):
        choose(*CALL)
    choose("scaled_mm", CUDA, 64, 64, 64, torch.float64)
    with FakeTensorMode():
        choose(*CALL)
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (torch.compiler, "is_compiling")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            choose(*CALL)
    assert gpu.calls == []
    choose(*CALL)
    assert len(gpu.calls) == 1


# ---- forcing a backend


def test_backend_forces_nests_and_restores():
    p = lambda: dispatch.problem("quantize", torch.device("cpu"), 4, 4)  # noqa: E731
    with fqt.backend("triton"):
        assert select(p()).backend == "triton"
        with fqt.backend("reference"):
            assert select(p()).reason == "asked for"
        assert select(p()).backend == "triton"
    assert select(p()).reason == "CPU tensors"
    with pytest.raises(ValueError, match="cuda"), fqt.backend("cuda"):
        pass
    with pytest.raises(RuntimeError, match="not installed"):
        select(Problem("quantize", 4, 4, force="triton"))


def test_a_problem_says_what_is_asked_of_it():
    p = dispatch.problem("scaled_mm", torch.device("cpu"), 4, 5, 6, torch.bfloat16, format="e4m3", plain=False)
    assert (p.m, p.n, p.k, p.dtype, p.format, p.plain, p.force) == (4, 5, 6, "bfloat16", "e4m3", False, "auto")
    assert (p.kind, p.deterministic) == ("", False)
    assert (
        dispatch.problem("quantize", torch.device("cpu"), 4, 5, kind="per_row nearest both").kind
        == "per_row nearest both"
    )


def test_docstring_examples_hold():
    assert doctest.testmod(dispatch).failed == 0


def test_importing_fqt_imports_neither_torch_nor_triton():
    code = (
        "import sys, fqt; assert 'torch' not in sys.modules and 'triton' not in sys.modules; fqt.Recipe.parse('psq5')"
    )
    code += "; assert 'torch' not in sys.modules; import fqt.dispatch; assert 'torch' not in sys.modules"
    code += "; import fqt.products; assert not {'fqt.tuning', 'fqt.store', 'platformdirs'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fqt_works_without_triton():
    """With Triton's import blocked, a layer trains on the CPU, and the choice says why."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fqt, fqt.nn
layer = fqt.nn.Linear(8, 4, recipe="bhq4")
layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
assert fqt.dispatch.triton_version() is None and layer.weight.grad is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
