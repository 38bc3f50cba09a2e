"""`select` is a pure function of a frozen problem; `backend` forces its answer."""

import doctest
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch

import fqt
from fqt import dispatch
from fqt.dispatch import Problem, select

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
@pytest.mark.parametrize("op", ["scaled_mm", "quantize"])
def test_what_decides_the_backend(op, change, backend, fallback, says):
    """Both operators of a layer go the same way; what multiplies slowly, quantizes well."""
    choice = select(Problem(op, 4096, 4096, 4096, **{**H100, **change}))
    slow = backend == "triton" and fallback
    assert (choice.backend, choice.fallback) == (backend, fallback and not (slow and op == "quantize"))
    assert choice.kernel == ("portable" if backend == "triton" and op == "scaled_mm" else "")
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

    assert {*dispatch._FAMILY.values(), "amd"} == CONFIGS.keys() == FLUSH_CONFIG.keys()
    assert {*dispatch._FP8_FAMILY.values()} == FP8_CONFIGS.keys()


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
    monkeypatch.setattr(dispatch, "HOPPER_KERNEL", True)
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


def test_docstring_examples_hold():
    assert doctest.testmod(dispatch).failed == 0


def test_importing_fqt_imports_neither_torch_nor_triton():
    code = (
        "import sys, fqt; assert 'torch' not in sys.modules and 'triton' not in sys.modules; fqt.Recipe.parse('psq5')"
    )
    code += "; assert 'torch' not in sys.modules"
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
