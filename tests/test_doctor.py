"""`fqt doctor`: its verdicts, and that a broken kernel cannot pass."""

import dataclasses
import json
import pathlib
import re

import pytest
import torch

import fqt_kernels.quantize
from fqt import candidates, cli, dispatch, doctor, reference, selftest, tuned


@pytest.fixture
def no_kernels(monkeypatch):
    """As on a machine without a GPU, although the tests run with the interpreter on."""
    how = ("not run", torch.device("cpu"), "no GPU: kernels not run on hardware; the CPU reference backend is used")
    monkeypatch.setattr(doctor, "_kernels_run", lambda: how)


def results(checks) -> list[dict]:
    return [doctor._verdict(check) for check in checks]


def test_without_a_gpu_the_reference_is_checked_and_the_exit_status_is_0(no_kernels, capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no GPU: kernels not run on hardware" in text and "all checks passed" in text
    assert "FAILED" not in text and "_tile_kernel" not in text


def test_json_holds_every_case(no_kernels, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["kernels"]["run"] == "not run"
    assert report["versions"]["torch"] == torch.__version__ and report["devices"][0]["device"] == "cpu"
    assert {choice["op"] for choice in report["dispatch"]} >= {"quantize", "quantize_gradient", "scaled_mm", "conv"}
    assert all(choice["source"] == "" for choice in report["dispatch"])  # there is nothing to choose on a CPU
    assert report["tuning"]["entries"] == 0 and isinstance(report["tuning"]["counts"], dict)
    assert all(check["ok"] and check["error"] is not None for check in report["checks"])


def test_the_report_says_what_is_tuned_and_where_it_is_kept(no_kernels, monkeypatch, capsys, tmp_path):
    """The store's path and counts, the number of entries, and of each choice where it comes from."""
    gpu = dict(device="cuda", arch="sm90", processors=132, triton="3.7.1")
    found = []
    for op, *sizes in (("scaled_mm", 4096, 4096, 4096), ("quantize", 4096, 4096, 0)):
        p = dispatch.Problem(op, *sizes, dtype="bfloat16", kind="" if sizes[2] else "per_row nearest both", **gpu)
        best = candidates.candidates(p)[1]
        found.append(tuned.Entry(tuned.key(p), (tuned.Timing(*best, 141_000),), 0, tuple(sizes)))
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.tuning, "table", lambda device: tuned.Table(found))
    monkeypatch.setattr(doctor.tuning, "counts", lambda: {"hit": 1, "stale: quantize": 2})
    problem = dispatch.problem
    on_gpu = lambda *args, **more: dataclasses.replace(problem(*args, **more), **gpu)  # noqa: E731
    monkeypatch.setattr(doctor.dispatch, "problem", on_gpu)
    monkeypatch.setattr(doctor, "reference_checks", list)
    monkeypatch.setattr(doctor, "layer_checks", lambda *_: [])
    report = doctor.run()
    sources = {choice["op"] + choice["shape"]: choice["source"] for choice in report["dispatch"]}
    assert sources == {
        "quantize4096x4096": "tuned", "quantize_gradient4096x4096": "heuristic", "scaled_mm128x128x128": "heuristic",
        "scaled_mm4096x4096x4096": "tuned", "scaled_mm576x64x200704": "heuristic",
        "householder global4096x4096": "", "householder tile4096x4096": "", "quantize_images50176x256": "heuristic",
        "conv50176x256x2304": "heuristic", "conv_wgrad256x2304x50176": "heuristic",
    }  # fmt: skip
    text = doctor.summary(report)
    assert f"2 entries for this device; store {tmp_path}, hit 1, stale: quantize 2" in text
    assert re.search(r"4096x4096x4096 .*  tuned  +tuned at 4096x4096x4096: 0.141 ms", text)


def test_every_kernel_has_a_check(device):
    sources = pathlib.Path(fqt_kernels.quantize.__file__).parent.glob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)}
    checked = {check.kernel for check in selftest.kernel_checks(torch.device(device), interpreter=device == "cpu")}
    # Gluon's kernel runs on hardware alone, and on Hopper's.
    assert kernels and kernels - checked <= {"_hopper_scaled_mm_kernel"} and checked <= kernels


def test_every_kernel_passes_here(device):
    checks = list(selftest.kernel_checks(torch.device(device), interpreter=device == "cpu"))
    checks += selftest.layer_checks(torch.device(device), interpreter=device == "cpu")
    if device == "cpu":  # the interpreter is slow, and test_*_kernel* runs it at length: each kernel, one in sixteen
        checks = list({check.kernel: check for check in checks}.values()) + checks[::16]
    assert [r for r in results(checks) if not r["ok"]] == []


def test_a_broken_kernel_fails_and_is_named(device, monkeypatch, capsys):
    right = fqt_kernels.quantize.quantize

    def off_by_one(x, **options):
        q, *rest = right(x, **options)
        if q is not None:
            q[1, 2] += 1
        return q, *rest

    monkeypatch.setattr(fqt_kernels.quantize, "quantize", off_by_one)
    monkeypatch.setattr(doctor, "_kernels_run", lambda: ("interpreter", torch.device(device), "run here"))
    only = [c for c in selftest._quantize_checks(torch.device(device)) if c.case.startswith("per_row, min, nearest")]
    monkeypatch.setattr(doctor, "kernel_checks", lambda *_: only)
    monkeypatch.setattr(doctor, "layer_checks", lambda *_: [])
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"FAILED _tile_kernel: per_row, min, nearest.* q differs by up to 1 in 1 of", text)
    assert re.search(r"FAILED _rows_kernel: per_row, min, nearest.* q differs by up to 1 in 1 of", text)
    assert re.search(r"FAILED _long_rows_kernel: per_row, min, nearest.* q differs by up to 1 in 1 of", text)
    assert "3 checks failed" in text


def test_a_broken_reference_fails(monkeypatch, no_kernels, capsys):
    monkeypatch.setattr(reference, "round_codes", lambda y, rounding, bits=None: torch.floor(y))
    assert cli.main(["doctor"]) == 1
    assert "FAILED reference.quantize: per_tensor, symmetric, nearest" in capsys.readouterr().out


def test_a_kernel_that_does_not_launch_is_a_failure_not_a_crash():
    def launch():
        raise RuntimeError("out of\nregisters")

    result = doctor._verdict(selftest.Check("_k_kernel", "case", launch))
    assert (result["ok"], result["error"], result["message"]) == (False, None, "RuntimeError: out of registers")


@pytest.mark.parametrize(
    ("got", "want", "bound", "ok"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0.0, True),
        ([float("inf")], [float("inf")], 0.0, True),
        ([0.0], [-0.0], 0.0, True),
        ([float("nan")], [1.0], 1e9, False),
        ([float("inf")], [float("-inf")], 1e9, False),
        ([1.0], [float("inf")], 1e9, False),
        ([1.0, 2.0], [1.0, 2.5], 0.5, True),
        ([1.0, 2.0], [1.0, 2.5], 0.4, False),
        ([1.0], [1.0, 1.0], 9.0, False),
    ],
)
def test_what_counts_as_equal(got, want, bound, ok):
    verdict = doctor._compare(torch.tensor(got), torch.tensor(want), bound)
    assert verdict[0] is ok
    json.dumps(verdict, allow_nan=False)


def test_the_bound_of_a_product_is_small_beside_the_product():
    """So small that an error of one code (1/128 of one factor of 37) is far outside."""
    a, b, bias = selftest._operands(67, 45, 37, "affine, bias")
    one_code = a.scale[:, None] * b.scale[None, :]
    assert float((selftest.scaled_mm_bound(a, b, bias) / one_code).max()) < 1


@pytest.mark.parametrize("found", [{"gcc"}, {"clang"}, {"gcc", "clang"}, {"my-cc"}, set()])
def test_the_c_compiler_is_the_one_triton_would_call(found, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.delenv("CC", raising=False)
    assert doctor.c_compiler() == ("gcc" if "gcc" in found else "clang" if "clang" in found else None)
    monkeypatch.setenv("CC", "my-cc")
    assert doctor.c_compiler() == ("my-cc" if "my-cc" in found else None)
