"""`fqt doctor`: its verdicts, and that a broken kernel cannot pass."""

import dataclasses
import gc
import importlib
import json
import pathlib
import re
import signal
import sys
import types
import weakref

import pytest
import torch
import triton
import triton.language as tl

import fqt_kernels.quantize
from fqt import candidates, cli, dispatch, doctor, guarded, reference, replay, selftest, selftest_psgd, tuned


@pytest.fixture
def no_kernels(monkeypatch):
    """As on a machine without a GPU, although the tests run with the interpreter on."""
    how = ("not run", torch.device("cpu"), "no GPU: kernels not run on hardware; the CPU reference backend is used")
    monkeypatch.setattr(doctor, "_kernels_run", lambda: how)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def results(checks) -> list[dict]:
    return [doctor._verdict(check) for check in checks]


def test_without_a_gpu_the_reference_is_checked_and_the_exit_status_is_0(no_kernels, capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no GPU: kernels not run on hardware" in text and re.search(
        r"all \d+ checks passed; no kernel was launched", text
    )
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


def test_a_gpu_without_tuned_entries_is_told_of_fqt_tune(no_kernels, monkeypatch):
    monkeypatch.setattr(doctor, "reference_checks", list)
    monkeypatch.setattr(doctor, "layer_checks", lambda *_: [])
    report = doctor.run()
    report["devices"] = report["devices"][:1]
    assert "fqt tune" not in doctor.summary(report)
    report["devices"].append({"device": "cuda:0", "description": "a GPU"})
    assert "0 entries for this device (fqt tune measures them" in doctor.summary(report)


def test_every_kernel_has_a_check(device):
    sources = pathlib.Path(fqt_kernels.quantize.__file__).parent.glob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)}
    checked = {check.kernel for check in selftest.kernel_checks(torch.device(device), interpreter=device == "cpu")}
    # Gluon's kernel runs on hardware alone, and on Hopper's.
    assert kernels and kernels - checked <= {"_hopper_scaled_mm_kernel"} and checked <= kernels


def test_every_kernel_passes_here(device):
    checks = list(selftest.layer_checks(torch.device(device), interpreter=device == "cpu"))
    if device != "cpu":  # in the interpreter test_sanitizer.py runs those of each kernel
        checks += selftest.kernel_checks(torch.device(device))
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
    assert re.search(r"3 of \d+ checks FAILED", text)


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


# ---- only some checks, a file, and launches that are repeated


@triton.jit
def _numbers_kernel(out_ptr, address, N, SKIPPED: tl.constexpr, BEYOND: tl.constexpr, COUNTED: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """0, 1, 2, … into out, without the element SKIPPED and with BEYOND more; if COUNTED plus the number of launches before,
    which is counted at the address."""
    n = tl.arange(0, BLOCK)
    launches = 0
    if COUNTED:
        ptr = tl.cast(address, tl.int64).to(tl.pointer_type(tl.int32))
        launches = tl.load(ptr)
        tl.store(ptr, launches + 1)
    tl.store(out_ptr + n, n + launches, mask=(n < N + BEYOND) & (n != SKIPPED))


@pytest.fixture
def numbers(device, monkeypatch):
    """numbers(flaws…): the doctor checks `_numbers_kernel` alone, in some cases, on memory that a module of launchers of its
    own allocates; returns that module."""
    module, counter = types.SimpleNamespace(torch=torch, made=[]), torch.zeros(1, dtype=torch.int32, device=device)

    def run(skipped=-1, beyond=0, changing=False, launches=1, wrong=0):
        for _ in range(launches):
            out = module.torch.empty(20, dtype=torch.int32, device=device)
            module.made.append(weakref.ref(out.untyped_storage()))
            _numbers_kernel[(1,)](
                out, counter.data_ptr(), 20, SKIPPED=skipped, BEYOND=beyond, COUNTED=changing, BLOCK=32
            )
        return {"out": (out, torch.arange(20, dtype=torch.int32) + wrong, 0.0)} if launches else {}

    def checked(**cases):
        counter.zero_()
        checks = [selftest.Check("_numbers_kernel", case, lambda f=f: run(**f)) for case, f in cases.items()]
        monkeypatch.setattr(doctor, "kernel_checks", lambda *_: checks)
        return module

    monkeypatch.setattr(doctor, "_kernels_run", lambda: ("interpreter", torch.device(device), "run here"))
    monkeypatch.setattr(doctor, "reference_checks", list)
    monkeypatch.setattr(doctor, "layer_checks", lambda *_: [])
    monkeypatch.setattr(guarded, "launchers", lambda: [module])
    return checked


def test_launches_are_repeated_and_counted(numbers, capsys):
    numbers(one={}, three={"launches": 3})
    assert cli.main(["doctor", "--repeat", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = "kernel", "case", "ok", "launches", "repeated", "different", "skipped", "faults"
    assert [[check[key] for key in keys] for check in report["checks"]] == [
        ["_numbers_kernel", "one", True, 1, 1, 0, 0, []], ["_numbers_kernel", "three", True, 3, 3, 0, 0, []]
    ]  # fmt: skip
    assert report["repeat"] == 5
    assert cli.main(["doctor", "--repeat", "5"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"launches  repeated 5x", text) and re.search(
        r"_numbers_kernel +2  bit-equal .* 4  all bit-equal", text
    )
    assert "4 launches repeated 5 times, all bit-equal" in text and "all 2 checks passed" in text


def test_without_repeat_nothing_is_intercepted_or_guarded(numbers, monkeypatch, capsys):
    module = numbers(one={})
    monkeypatch.setattr(replay, "recording", lambda *_: 1 / 0)
    monkeypatch.setattr(guarded, "guarded", lambda *_: 1 / 0)
    assert cli.main(["doctor"]) == 0 and len(module.made) == 1
    assert "repeated" not in capsys.readouterr().out


def test_a_launch_that_differs_fails_its_check_and_is_named(numbers, capsys):
    numbers(steady={}, changing={"changing": True, "launches": 1})
    assert cli.main(["doctor", "--repeat", "3"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"FAILED _numbers_kernel: changing: bit-equal; _numbers_kernel differs from its first launch in 3 of 3 "
                     r"repetitions: out_ptr in 20 of \d+ bytes, the first at byte 0\n", text)  # fmt: skip
    assert "2 launches repeated 3 times, 1 DIFFER" in text and "1 of 2 checks FAILED" in text
    assert re.search(r"_numbers_kernel +2  1 FAILED .* 2  1 DIFFER", text)


def test_a_check_that_fails_against_the_reference_is_repeated_all_the_same(numbers, capsys):
    numbers(wrong={"wrong": 1})
    assert cli.main(["doctor", "--repeat", "2"]) == 1
    text = capsys.readouterr().out
    assert "out differs by up to 1 in 20 of 20 places" in text and "1 launch repeated 2 times, all bit-equal" in text


def test_a_write_outside_and_an_element_that_is_not_written_fail(numbers, capsys):
    numbers(beyond={"beyond": 1}, skipping={"skipped": 7})
    assert cli.main(["doctor", "--repeat", "1"]) == 1
    text = capsys.readouterr().out
    assert re.search(
        r"_numbers_kernel: beyond: bit-equal; written outside, after the 20 int32 that test_doctor.py:\d+ all", text
    )
    assert re.search(r"_numbers_kernel: skipping: out differs by up to \d.* in 1 of 20 places", text)
    assert "2 of 2 checks FAILED" in text


def test_a_check_of_a_kernel_that_launches_another_fails(numbers, monkeypatch, capsys):
    numbers()
    right = selftest.Check("_row_stats_kernel", "mistaken", lambda: {})
    monkeypatch.setattr(doctor, "kernel_checks", lambda *_: [right])
    assert cli.main(["doctor", "--repeat", "1"]) == 1
    assert "_row_stats_kernel: mistaken: bit-equal; it was not launched, but nothing" in capsys.readouterr().out


def test_launches_that_are_not_repeated_are_said(numbers, monkeypatch, capsys):
    numbers(one={}, two={"launches": 2})
    right = replay.recording
    monkeypatch.setattr(replay, "recording", lambda n: right(n, limit=1000))
    assert cli.main(["doctor", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"_numbers_kernel +2  bit-equal +0 +3 not repeated", text)
    assert "0 launches repeated 1 time, none" in text
    assert "3 launches not repeated: too large: over 0.000953674 MiB" in text


def test_memory_of_a_check_is_freed_after_it(numbers):
    module = numbers(one={}, two={})
    doctor.run(repeat=2)
    gc.collect()
    assert len(module.made) == 2 and all(storage() is None for storage in module.made)


def test_a_launch_that_fails_is_a_verdict_under_repetition_too(numbers, monkeypatch, capsys):
    numbers()

    def launch():
        raise RuntimeError("out of registers")

    monkeypatch.setattr(doctor, "kernel_checks", lambda *_: [selftest.Check("_k_kernel", "case", launch)])
    monkeypatch.setattr(guarded.GuardedTorch, "broken", lambda _: launch())  # as on a GPU after an illegal access
    assert cli.main(["doctor", "--repeat", "1"]) == 1
    assert ("_k_kernel: case: RuntimeError: out of registers; the guard bands cannot be read: RuntimeError: out of reg"
            in capsys.readouterr().out)  # fmt: skip


def test_the_step_of_psgd_is_repeated_on_the_memory_that_its_tables_point_at(device, monkeypatch):
    """AdamW: a step moves weights, moments, powers and ranges, which only tables of addresses show."""
    monkeypatch.setattr(selftest_psgd, "STEPS", 0)  # after the first
    checks = {f"{c.kernel}: {c.case}": c for c in selftest.kernel_checks(torch.device(device), device == "cpu")}
    result = doctor._repeated(checks["_psgd_kernel: adamw, float32"], 1)
    assert result["ok"] and result["repeated"] == result["launches"] == 4, result


@pytest.mark.parametrize(
    ("only", "found"),
    [("_params*", {"_params_kernel"}), ("_params_kernel", {"_params_kernel"}), ("*: e4m3, 17*", {"_params_kernel"}),
     ("fqt.nn.*2d: int8, 3*", {"fqt.nn.Conv2d"}), ("_*stats_kernel", {"_row_stats_kernel", "_psgd_stats_kernel",
                                                                    "_gradient_stats_kernel", "_image_stats_kernel"})],
)  # fmt: skip
def test_only_chooses_checks_by_kernel_and_case(only, found, monkeypatch, device, capsys):
    monkeypatch.setattr(doctor, "_kernels_run", lambda: ("interpreter", torch.device(device), "run here"))
    monkeypatch.setattr(doctor, "_verdict", lambda check: {**check._asdict(), "run": "", "ok": True, "error": 0.0,
                                                          "of_bound": None, "message": ""})  # fmt: skip
    assert cli.main(["doctor", "--json", "--only", only]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {check["kernel"] for check in report["checks"]} == found and report["only"] == only


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "_param"], "no check 'KERNEL: case' is like this; there are checks of reference.philox, .*; no GPU"),
     (["--repeat", "3"], "--repeat 3: there are no launches to repeat: no GPU: kernels not run"),
     (["--out", "{tmp}"], "is a folder"), (["--out", "{tmp}/file/x.json"], "its folder cannot be made"),
     (["--repeat", "0"], "not a whole number of at least 1")],
)  # fmt: skip
def test_a_call_that_cannot_be_answered_exits_2_before_any_check(
    arguments, words, no_kernels, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "_verdict", lambda _: 1 / 0)
    assert cli.main(["doctor", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(words, captured.err)


def test_repeating_checks_that_launch_nothing_exits_2(monkeypatch, device, capsys):
    monkeypatch.setattr(doctor, "_kernels_run", lambda: ("interpreter", torch.device(device), "run here"))
    assert cli.main(["doctor", "--only", "reference.philox", "--repeat", "2"]) == 2
    assert "--repeat 2: none of the 1 checks launches a kernel" in capsys.readouterr().err


def test_out_holds_the_report_and_the_environment(no_kernels, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "reference_checks", lambda: list(selftest.reference_checks())[:2])
    file = tmp_path / "new" / "doctor.json"
    assert cli.main(["doctor", "--out", str(file)]) == 0
    assert "all 2 checks passed" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["device"] == "cpu"
    assert len(report["checks"]) == 2 and report["ok"] and [p.name for p in file.parent.iterdir()] == ["doctor.json"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "fqt_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fqt_bench", None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fqt_bench.environment")
    assert cli.main(["doctor", "--out", str(file), "--json"]) == 0
    assert json.loads(file.read_text()) == {"environment": None, **json.loads(capsys.readouterr().out)}


# ---- a run that does not get to its end


@pytest.fixture
def faked(monkeypatch):
    """faked(**runs): the doctor has these checks alone, of kernels _NAME_kernel, on a GPU that is not there."""
    monkeypatch.setattr(doctor, "_kernels_run", lambda: ("hardware", torch.device("cuda", 0), "run on a fake"))
    monkeypatch.setattr(doctor, "_environment", lambda device: {"device": str(device)})
    monkeypatch.setattr(doctor, "reference_checks", list)
    monkeypatch.setattr(doctor, "layer_checks", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def checked(**runs):
        checks = [selftest.Check(f"_{name}_kernel", "a case", run) for name, run in runs.items()]
        monkeypatch.setattr(doctor, "kernel_checks", lambda *_: checks)

    return checked


def passes():
    return {"out": (torch.ones(2), torch.ones(2), 0.0)}


def raises():
    raise RuntimeError("an illegal memory access was encountered")


def test_out_is_written_before_every_check_and_so_outlives_a_kill(faked, tmp_path, capsys):
    file, seen = tmp_path / "doctor.json", []

    def looks():
        seen.append(json.loads(file.read_text()))
        return passes()

    faked(a=looks, b=looks, c=looks)
    assert cli.main(["doctor", "--out", str(file), "--json"]) == 0
    names = ["_a_kernel: a case", "_b_kernel: a case", "_c_kernel: a case"]
    assert [[f"{check['kernel']}: {check['case']}" for check in part["checks"]] for part in seen] == [
        [], names[:1], names[:2]
    ]  # fmt: skip
    assert [part["not_run"] for part in seen] == [names, names[1:], names[2:]]
    assert not any(part["finished"] or part["ok"] for part in seen)
    assert all(part["environment"] == {"device": "cuda:0"} and part["dispatch"] for part in seen)
    report = json.loads(file.read_text())
    assert report["finished"] and report["ok"] and report["not_run"] == [] and len(report["checks"]) == 3
    assert report == {"environment": {"device": "cuda:0"}, **json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("out", [True, False])
def test_an_interrupted_run_keeps_and_prints_what_it_found(out, faked, tmp_path, capsys):
    faked(a=passes, b=raises, c=lambda: signal.raise_signal(signal.SIGINT), d=passes)
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", *(["--out", str(file)] if out else [])]) == 130
    text = capsys.readouterr().out
    assert "FAILED _b_kernel: a case: RuntimeError" in text
    assert text.endswith(
        "1 of 2 checks FAILED\ninterrupted after 2 of 4 checks\nnot run: _c_kernel (1), _d_kernel (1)\n"
    )
    assert file.exists() == out
    if out:
        report = json.loads(file.read_text())
        assert (report["stopped"], report["finished"], report["ok"]) == ("interrupted", False, False)
        assert [check["ok"] for check in report["checks"]] == [True, False]
        assert report["not_run"] == ["_c_kernel: a case", "_d_kernel: a case"]


def test_an_interrupted_run_without_a_failure_claims_nothing_of_all_checks(faked, capsys):
    faked(a=passes, b=lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().out.endswith(
        "\n1 check passed\ninterrupted after 1 of 2 checks\nnot run: _b_kernel (1)\n"
    )


@pytest.mark.parametrize("repeat", [[], ["--repeat", "2"]])
def test_checks_end_where_the_gpu_is_unusable(repeat, faked, monkeypatch, tmp_path, capsys):
    ran, broken = [], []

    def synchronize(device):
        assert device == torch.device("cuda", 0)
        if broken:
            raises()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    faked(a=passes, b=lambda: broken.append(1) or raises(), c=lambda: ran.append(1), d=passes)
    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--out", str(file), *repeat]) == 1
    assert not ran
    text, why = capsys.readouterr().out, "RuntimeError: an illegal memory access was encountered"
    stopped = f"_b_kernel: a case left the GPU unusable: {why}"
    assert f"FAILED _b_kernel: a case: {why}" in text
    assert text.endswith(f"\nstopped after 2 of 4 checks: {stopped}\nnot run: _c_kernel (1), _d_kernel (1)\n")
    report = json.loads(file.read_text())
    assert (report["stopped"], report["finished"], report["ok"]) == (stopped, False, False)
    assert report["not_run"] == ["_c_kernel: a case", "_d_kernel: a case"]


def test_checks_go_on_after_a_failure_that_the_gpu_survives(faked, capsys):
    faked(a=raises, b=passes)
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [check["ok"] for check in report["checks"]] == [False, True]
    assert (report["stopped"], report["finished"], report["not_run"]) == (None, True, [])


def test_a_report_that_cannot_be_written_ends_the_run_before_any_check(faked, monkeypatch, tmp_path, capsys):
    def replace(*_):
        raise OSError(28, "No space left on device")

    faked(a=lambda: 1 / 0)
    monkeypatch.setattr(doctor.safefile, "replace", replace)
    assert cli.main(["doctor", "--out", str(tmp_path / "doctor.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "doctor.json: cannot be written: No space left on device" in captured.err


def test_progress_is_a_line_a_check_in_a_pipe_if_the_run_is_long_or_kept(faked, numbers, tmp_path, capsys):
    faked(a=passes, b=passes)
    lines = "1/2 _a_kernel: a case\n2/2 _b_kernel: a case\n"
    for arguments, err in (([], ""), (["--out", str(tmp_path / "doctor.json")], lines)):
        assert cli.main(["doctor", *arguments]) == 0 and capsys.readouterr().err == err
    numbers(one={}, two={})
    assert cli.main(["doctor", "--repeat", "1"]) == 0
    assert capsys.readouterr().err == "1/2 _numbers_kernel: one\n2/2 _numbers_kernel: two\n"


def test_on_a_terminal_progress_is_one_line_rewritten_and_then_cleared(faked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    faked(a=passes, b=passes)
    assert cli.main(["doctor", "--out", str(tmp_path / "doctor.json")]) == 0
    assert capsys.readouterr().err == "\r\x1b[K1/2 _a_kernel: a case\r\x1b[K2/2 _b_kernel: a case\r\x1b[K"


def test_the_kernel_of_hopper_is_checked_after_all_others(monkeypatch):
    from fqt_kernels import gemm_hopper

    if gemm_hopper.ABSENT:
        pytest.skip(gemm_hopper.ABSENT)
    monkeypatch.setattr(dispatch, "device_info", lambda device: ("sm90", 132))
    kernels = [check.kernel for check in selftest.kernel_checks(torch.device("cuda", 0))]
    count = kernels.count("_hopper_scaled_mm_kernel")
    assert 0 < count < len(kernels) and set(kernels[-count:]) == {"_hopper_scaled_mm_kernel"}
    assert {"_psgd_kernel", "_int8_step_kernel", "_scaled_mm_kernel"} < set(kernels)
