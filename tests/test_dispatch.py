"""`select` is a pure function of a frozen problem; `backend` forces its answer."""

import doctest
import subprocess
import sys

import pytest
import torch

import fqt
from fqt import dispatch
from fqt.dispatch import Problem, select

H100 = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0", dtype="bfloat16")


def test_the_choice_is_printable_hashable_and_repeatable():
    p = Problem("scaled_mm", 4096, 4096, 4096, **H100)
    assert select(p) is select(Problem(**vars(p))) and "128, 256, 128" in str(select(p))
    with pytest.raises(AttributeError):
        p.m = 1


@pytest.mark.parametrize(
    ("change", "backend", "says"),
    [
        ({}, "triton", "fills 132"),
        ({"device": "cpu", "arch": ""}, "reference", "CPU"),
        ({"triton": None}, "reference", "not installed"),
        ({"dtype": "float64"}, "reference", "float64"),
        ({"arch": "sm75"}, "reference", "sm75.*sm_80"),
        ({"arch": "sm103"}, "refused", "INT8 throughput"),
        ({"arch": "sm103", "force": "triton"}, "triton", ""),
        ({"arch": "gfx942"}, "triton", ""),
        ({"arch": "sm120"}, "triton", ""),
        ({"force": "reference"}, "reference", "asked for"),
    ],
)
def test_what_decides_the_backend(change, backend, says):
    choice = select(Problem("scaled_mm", 4096, 4096, 4096, **{**H100, **change}))
    assert choice.backend == backend
    assert pytest.importorskip("re").search(says, choice.reason)


def test_tiles_shrink_with_the_output_and_long_sums_flush():
    areas = []
    for size in (64, 512, 2048, 8192):
        config = select(Problem("scaled_mm", size, size, 1024, **H100)).config
        areas.append(config[0] * config[1])
    assert areas == sorted(areas) and areas[0] < areas[-1]
    from fqt_kernels.gemm import FLUSH_CONFIG, MAX_INT32_TERMS

    assert select(Problem("scaled_mm", 8192, 8192, MAX_INT32_TERMS + 1, **H100)).config == FLUSH_CONFIG["sm90"]


def test_every_family_of_gpu_has_configurations():
    from fqt_kernels.gemm import CONFIGS, FLUSH_CONFIG

    assert {*dispatch._FAMILY.values(), "amd"} == CONFIGS.keys() == FLUSH_CONFIG.keys()


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


def test_a_refused_gpu_raises_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(dispatch, "device_info", lambda device: ("sm103", 148))
    from fqt import ops

    refused = Problem("quantize", 4, 4, **{**H100, "arch": "sm103"})
    monkeypatch.setattr(ops, "problem", lambda *a, **k: refused)
    with pytest.raises(RuntimeError, match=r"sm_103.*bf16"):
        fqt.ops.quantize(torch.randn(4, 4), 8, "per_row", "symmetric", "nearest")


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
