"""What compute-sanitizer says, read: findings, summaries, and what is not understood."""

import pytest

from fqt_bench.sanitize_report import TOOLS, parse

OOB = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _rows_kernel+0x3d0 in quantize.py:137
=========     by thread (5,0,0) in block (2,0,0)
=========     Address 0x7f0c00000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0c00000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame:  [0x2dd3f1] in libcuda.so.1
=========
========= Invalid __global__ read of size 4 bytes
=========     at _rows_kernel+0x3d0 in quantize.py:137
=========     by thread (6,0,0) in block (2,0,0)
=========     Address 0x7f0c00000204 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
FRESH = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 16 bytes
=========     at load_tile+0x100 in statistics.py:70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========         Device Frame: _tile_kernel+0x2c0 in quantize.py:99
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<int>>(int, T2, T3)+0x50
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec00200
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _scaled_mm_kernel+0x90 in gemm.py:41
=========     and Read access at _scaled_mm_kernel+0x100 in gemm.py:51 [508 hazards]
=========
========= Warning: Race reported between Write access at _leaders_kernel+0x90 in grouping.py:41
=========     and Read access at _leaders_kernel+0x100 in grouping.py:51 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
BARRIER = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at _hopper_scaled_mm_kernel+0x15520 in gemm_hopper.py:150
=========     by thread (128,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
SAMPLES = {"memcheck": OOB, "initcheck": FRESH, "racecheck": RACE, "synccheck": BARRIER}


@pytest.mark.parametrize(
    "tool, kinds, kernels",
    [
        ("memcheck", ["Invalid __global__ read of size 4 bytes"], ["_rows_kernel"]),
        ("initcheck", ["Uninitialized __global__ memory read of size 16 bytes"], ["_tile_kernel"]),
        ("racecheck", ["error: Race reported", "warning: Race reported"], ["_scaled_mm_kernel", "_leaders_kernel"]),
        ("synccheck", ["Barrier error detected. Divergent thread(s) in block"], ["_hopper_scaled_mm_kernel"]),
    ],
)
def test_a_report_is_a_finding_of_its_kernel(tool, kinds, kernels):
    report = parse(SAMPLES[tool], tool)
    assert [f.kind for f in report.ours] == kinds and [f.kernel for f in report.ours] == kernels
    assert not report.problems and all(f.place and f.lines for f in report.findings)


def test_the_same_place_counts_up_and_keeps_the_first_report_without_host_frames():
    (finding,) = parse(OOB, "memcheck").findings
    assert finding.count == 2 and finding.place == "_rows_kernel+0x3d0 in quantize.py:137"
    assert "by thread (5,0,0) in block (2,0,0)" in finding.lines and not any("Host Frame" in x for x in finding.lines)


def test_a_kernel_of_torchs_is_not_ours():
    other = parse(FRESH, "initcheck").findings[1]
    assert not other.ours and "vectorized_elementwise_kernel" in other.kernel
    text = OOB.replace("_rows_kernel", "void at::native::_cat_kernel<float>(float*)")
    assert not parse(text, "memcheck").ours


def test_the_manuals_own_layout_without_indents_is_read_alike():
    flat = OOB.replace("=========     ", "========= ").replace("=========         ", "========= ")
    assert parse(flat, "memcheck").findings == parse(OOB, "memcheck").findings


@pytest.mark.parametrize("tool, text", [(tool, CLEAN_RACE if tool == "racecheck" else CLEAN) for tool in TOOLS])
def test_a_clean_output_has_neither_findings_nor_problems(tool, text):
    report = parse(text, tool)
    assert report.errors == 0 and not report.findings and not report.problems


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no summary"),
        ("Segmentation fault\n", "no summary"),
        ("========= COMPUTE-SANITIZER\n", "no summary"),
        (OOB.rpartition("========= ERROR")[0], "no summary"),
        (OOB.replace("SUMMARY: 2", "SUMMARY: 5"), "the summary counts 5 errors, but 2 were read"),
        (CLEAN.replace("0 errors", "1,204 errors"), "the summary counts 1204 errors"),
        (OOB.replace("SUMMARY: 2 errors", "SUMMARY: 9 errors\n========= ERROR SUMMARY: 7 errors were not printed. Use "
                     "--print-limit option to adjust the number of printed errors"), "7 reports were not printed"),
        ("========= Error: Target application terminated before first instrumented API call\n" + CLEAN, "terminated"),
        ("========= Internal Sanitizer Error: The Sanitizer encountered an error while launching _rows_kernel and didn't "
         "track the launch. Errors might go undetected.\n" + CLEAN, "Internal Sanitizer Error"),
        ("========= Warning: Detected overflow of tracked cuda::barrier structures.\n" + CLEAN, "overflow"),
        (OOB.replace("Invalid __global__ read of size 4 bytes", "Something new", 1), "Something new"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_a_problem_and_never_no_errors(text, why):
    assert any(why in problem for problem in parse(text, "memcheck").problems)


def test_a_race_summary_must_agree_with_its_reports():
    assert any("counts 3 hazards" in p for p in parse(RACE.replace(": 2 hazards", ": 3 hazards"), "racecheck").problems)


def test_an_error_of_a_call_from_the_host_is_no_kernels():
    head = '========= Program hit CUDA_ERROR_NOT_FOUND (error 500) due to "named symbol not found" on CUDA API call\n'
    report = parse(head + CLEAN.replace("0 errors", "1 error"), "memcheck")
    assert not report.ours and not report.problems and report.findings[0].kernel is None
