"""The command of extreme extents: its checks on a few elements, its processes, and the grids of launches beyond 2³¹."""

import functools
import importlib
import io
import json
import os
import sys

import pytest
import torch

from fqt import dispatch, reference
from fqt_bench import extremes, extremes_check, extremes_conv, extremes_matrix, extremes_step
from fqt_bench.extremes_check import Case, Wrong, bits_at, pieces, same

MODULES = extremes_matrix, extremes_conv, extremes_step
ALL = [case for module in MODULES for case in module.cases(True)]
# The first of each kernel and each way to check it; the others are the same code with other extents.
CASES = list(
    {(case.kernel, case.run.func): case for case in reversed(ALL) if isinstance(case.run, functools.partial)}.values()
)


@pytest.fixture(autouse=True)
def _small_pieces():
    before = extremes_check.piece()
    extremes_check.set_piece(extremes.TINY_PIECE)
    yield
    extremes_check.set_piece(before)


# ---- the cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_case_passes_on_a_few_elements(case, device):
    assert case.run(torch.device(device))


def test_sums_beyond_int32_and_too_large_images_are_refused(device):
    assert extremes_conv._refusals(torch.device(device))


def test_large_and_tiny_cases_are_of_the_same_launches():
    for module in MODULES:
        large, tiny = ([(case.kernel, case.run) for case in module.cases(flag)] for flag in (False, True))
        assert [kernel for kernel, _ in large] == [kernel for kernel, _ in tiny]
        assert [getattr(run, "func", run) for _, run in large] == [getattr(run, "func", run) for _, run in tiny]


def test_every_title_is_one_cases_and_every_kernel_is_one_of_the_package():
    large = [case for module in MODULES for case in module.cases(False)]
    assert len({case.title for case in large}) == len(large) and len({case.title for case in ALL}) == len(ALL)
    sources = ("quantize", "gradient", "gemm", "gemm_householder", "householder", "conv", "conv_quantize", "conv_wgrad",
               "psgd", "int8_step")  # fmt: skip
    known = {name for source in sources for name in vars(importlib.import_module(f"fqt_kernels.{source}"))}
    assert {case.kernel for case in large} <= known
    assert all(1 <= case.gib < 64 for case in large)


def test_on_a_gpu_every_configuration_and_every_split_is_launched(monkeypatch):
    from fqt_kernels import conv, conv_wgrad, gemm

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "device_info", lambda device: ("sm90", 132))
    found = extremes_matrix.launches(gpu, 200, 136, 131_071, splits=True)
    portable = {c.config: {o.split_k for o in found if o.config == c.config} for c in found if c.kernel == "portable"}
    fitting = {config for config in gemm.CONFIGS["sm90"] if gemm.fits(config, 136)}
    assert portable.keys() == fitting and {c.kernel for c in found} >= {"portable", "cublas"}
    for config, splits in portable.items():
        tiles = -(-200 // config[0]) * -(-136 // config[1])
        assert splits == set(range(1, min(132 // tiles, 32) + 1))
    long = extremes_matrix.launches(gpu, 200, 136, 131_072, splits=True)
    assert [(c.config, c.split_k) for c in long if c.kernel == "portable"] == [(gemm.FLUSH_CONFIG["sm90"], 1)]
    assert extremes_conv._configs("conv", gpu, 16) == conv.CONFIGS["sm90"]
    assert extremes_conv._configs("conv_wgrad", gpu, 16) == conv_wgrad.CONFIGS["sm90"]
    assert extremes_conv._splits(802_816, (64, 64, 128, 4, 4), extremes_conv.SPLITS)[:3] == [7, 16, 33]


def _last(tensors, index):
    """The tensors, with the last element of one of them another number."""
    flat = tensors[index].view(-1)
    flat[-1] = flat[-1] * 2 + 1 if flat.is_floating_point() else flat[-1] + 1
    return tensors


@pytest.mark.parametrize(
    "kernel, module, launcher, spoil",
    [
        ("_tile_kernel", "quantize", "quantize", lambda out: _last(out, 0)),
        ("_tile_kernel", "quantize", "quantize", lambda out: _last(out, 1)),
        ("_tile_kernel", "quantize", "quantize", lambda out: _last(out, 2)),
        ("_tile_kernel", "quantize", "quantize", lambda out: _last(out, 4)),
        ("_tile_kernel", "quantize", "quantize", lambda out: _last(out, 5)),
        ("_gradient_tile_kernel", "gradient", "quantize_gradient", lambda out: (_last(out[0], 0), *out[1:])),
        ("_gradient_tile_kernel", "gradient", "quantize_gradient", lambda out: (out[0], _last(out[1], 0), out[2])),
        ("_gradient_tile_kernel", "gradient", "quantize_gradient", lambda out: _last(out, 2)),
        ("_scaled_mm_kernel", "gemm", "scaled_mm", lambda c: _last([c], 0)[0]),
        ("_images_kernel", "conv_quantize", "quantize_images", lambda out: _last(out, 0)),
        ("_images_kernel", "conv_quantize", "quantize_images", lambda out: _last(out, 1)),
        ("_images_kernel", "conv_quantize", "quantize_images", lambda out: _last(out, 4)),
        ("_conv_wgrad_mm_kernel", "conv_wgrad", "conv_wgrad", lambda dw: _last([dw], 0)[0]),
        ("_long_transform_kernel", "householder", "transform", lambda out: _last(out, 0)),
        ("_long_transform_kernel", "householder", "transform", lambda out: _last(out, 3)),
        ("_inverse_kernel", "householder", "inverse", lambda out: _last([out], 0)[0]),
        ("_householder_mm_kernel", "gemm_householder", "scaled_mm", lambda c: _last([c], 0)[0]),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_wrong_number_at_the_very_end_is_found(kernel, module, launcher, spoil, monkeypatch, device):
    source = importlib.import_module(f"fqt_kernels.{module}")
    real = getattr(source, launcher)
    monkeypatch.setattr(source, launcher, lambda *args, **kwargs: spoil(real(*args, **kwargs)))
    case = next(case for case in CASES if case.kernel == kernel)
    with pytest.raises(Wrong):
        case.run(torch.device(device))


@pytest.mark.parametrize("what", ["q", "qt", "scale", "momentum"])
def test_one_wrong_number_of_a_step_is_found(what, monkeypatch, device):
    from fqt_kernels import int8_step

    real = int8_step.int8_step

    def spoiled(q, qt, scale, rng, g, hyper, *, first, new):
        real(q, qt, scale, rng, g, hyper, first=first, new=new)
        _last([dict(q=q, qt=qt, scale=scale, momentum=first)[what]], 0)

    monkeypatch.setattr(int8_step, "int8_step", spoiled)
    with pytest.raises(Wrong, match=what):
        extremes_step._int8_step(32, 48, torch.device(device))


# ---- what they are compared by


def test_the_random_bits_of_a_piece_are_those_of_its_place(device):
    rng = torch.tensor([-0x123456789ABCDEF, 41], device=device)
    whole = reference.random_bits(rng, 37, 53, stream=5, rank=3)
    for rows, cols in ((slice(0, 37), slice(0, 53)), (slice(30, 37), slice(48, 53)), (slice(3, 4), slice(8, 17))):
        assert torch.equal(bits_at(rng, rows, cols, 5 + 256 * 3), whole[rows, cols])
    some = torch.tensor([36, 0, 7], device=device)
    assert torch.equal(bits_at(rng, some, slice(16, 53), 5 + 256 * 3), whole[some][:, 16:])


@pytest.mark.parametrize("m, n, step", [(1, 1, 1), (70, 44, 1), (3, 5000, 1), (300, 8, 128), (1, 1025, 1)])
def test_pieces_cover_every_element_once(m, n, step):
    seen = torch.zeros(m, n)
    for rows, cols in pieces(m, n, step):
        seen[rows, cols] += 1
        assert cols.start % 8 == 0 and rows.start % step == 0
    assert (seen == 1).all()


def test_a_difference_is_told_with_its_place_in_the_whole():
    want = torch.zeros(4, 5)
    got = want.clone()
    got[2, 3] = 7.0
    with pytest.raises(Wrong, match=r"q\[102, 203\] is 7.0, not 0.0; 1 such"):
        same("q", got, want, (100, 200))
    with pytest.raises(Wrong, match="float64"):
        same("q", want.double(), want)
    same("nan", torch.tensor([float("nan")]), torch.tensor([float("nan")]))


# ---- the command

FAKE = """\
import os, sys
import torch
from fqt_bench.extremes_check import Case, Wrong
def right(device): return "right"
def wrong(device): raise Wrong("q[3] is 1, not 2")
def dies(device): print("Fatal: device lost", file=sys.stderr); sys.stderr.flush(); os._exit(134)
broken = hangs = right
def full(device): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
def raises(device): raise RuntimeError("Triton Error [CUDA]: invalid argument")
def cases(tiny):
    for name in os.environ["CASES_OF_TEST"].split():
        yield Case("_fake_kernel", f"{name} {tiny}", 0.1, globals()[name.rstrip("0123456789")])
"""
# A worker that starts at once: it says what the real one would say.
WORKER = """\
import json, sys, time
print("{a line of a library's}", flush=True)
for title in json.load(sys.stdin):
    print(json.dumps({"began": title}), flush=True)
    if "hangs" in title:
        time.sleep(600)
    broken = {"broken": True} if "broken" in title else {}
    record = {"case": title, "status": "failed" if broken else "passed", "message": "", "seconds": 0.0, **broken}
    print(json.dumps(record), flush=True)
    if broken:
        sys.exit(3)
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("right wrong", *arguments): (exit status, the records that were written, what was printed)."""
    (tmp_path / "cases_of_test.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    def run(names, *arguments):
        monkeypatch.setenv("CASES_OF_TEST", names)
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        status = extremes.main(["--tiny", "--cases", "cases_of_test", "--out", str(out), *arguments])
        records = json.loads(out.read_text())["cases"] if out.exists() else None
        return status, records, capsys.readouterr()

    return run


def test_a_case_that_takes_its_process_down_loses_no_other(command):
    status, records, printed = command("right1 dies right2 wrong full raises right3")
    assert [r["status"] for r in records] == ["passed", "failed", "passed", "failed", "skipped", "failed", "passed"]
    assert status == 1 and "134" in records[1]["message"] and "device lost" in records[1]["message"]
    assert "q[3] is 1, not 2" in records[3]["message"] and "invalid argument" in records[5]["message"]
    assert "3 passed, 3 failed, 1 skipped" in printed.out


@pytest.fixture
def quick(command, monkeypatch):
    """`command`, with the worker that starts at once."""
    monkeypatch.setattr(extremes, "worker", lambda args: [sys.executable, "-S", "-c", WORKER])
    return command


def test_a_case_without_end_is_stopped_and_the_next_ones_run(quick):
    status, records, _ = quick("right1 hangs right2", "--case-s", "1")
    assert status == 1 and [r["status"] for r in records] == ["passed", "failed", "passed"]
    assert records[1]["message"] == "no end after 1 s"


def test_what_the_limit_leaves_out_is_named_and_is_no_success(quick):
    status, records, _ = quick("hangs1 right hangs2", "--limit-s", "2")
    assert status == 1 and [r["status"] for r in records] == ["not run"] * 3
    assert "--limit-s 2" in records[0]["message"] and "limit of 2 s" in records[2]["message"]


def test_after_a_broken_device_the_next_cases_get_a_new_process(quick):
    status, records, _ = quick("broken right1 right2")
    assert status == 1 and [r["status"] for r in records] == ["failed", "passed", "passed"]


def test_success_is_0_and_a_mistake_2(quick):
    status, records, _ = quick("right1 right2", "--only", "*right2*")
    assert status == 0 and [r["case"] for r in records] == ["_fake_kernel: right2 True"]
    status, records, printed = quick("right", "--only", "nothing*")
    assert status == 2 and records is None and "_fake_kernel: right True" in printed.err
    if not torch.cuda.is_available():
        assert extremes.main(["--only", "*"]) == 2


def test_a_process_with_a_broken_device_runs_no_other_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([case.title for case in ALL[:3]])))
    broken = {ALL[1].title: {"broken": True}}
    monkeypatch.setattr(extremes, "judge", lambda case, device: {"case": case.title} | broken.get(case.title, {}))
    assert extremes.main(["--worker", "--tiny"]) == extremes.BROKEN
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines if "case" in line] == [case.title for case in ALL[:2]]


def test_a_lost_context_is_told_from_a_launch_that_failed(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(extremes, "_poison", lambda device: None)
    monkeypatch.setattr(extremes, "_lacking", lambda case, device: None)
    record = extremes.judge(Case("_fake_kernel", "lost", 0.1, lost), torch.device("cuda"))
    assert record["broken"] and record["status"] == "failed" and "illegal memory access" in record["message"]


def test_a_case_that_does_not_fit_is_skipped_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(extremes, "_free", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    record = extremes.judge(Case("_fake_kernel", "large", 12.0, None), torch.device("cuda"))
    assert record["status"] == "skipped" and record["message"] == "needs 12.0 GiB, 10.0 free"
