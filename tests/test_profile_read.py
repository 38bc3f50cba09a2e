"""What Nsight Compute prints is read as it is, and what limits a kernel follows from it. Every number here is made up.

The form is that of ncu 2025's `--csv --page raw --print-units base`, as NVIDIA's CLI manual describes it and as outputs of
GPUs of capability 8.0 and 9.0 in public repositories have it.
"""

import pytest

from fqt_bench import profile_read
from fqt_bench.profile_read import FIELDS, UNITS, Kernel, failure, metrics, read, refused

ASKED = {"time_ns": "gpu__time_duration.sum", "read_bytes": "dram__bytes_read.sum", "written_bytes": "dram__bytes_write.sum",
         "l2_hit_pct": "lts__t_sector_hit_rate.pct"}  # fmt: skip
SAMPLE = """==PROF== Connected to process 1234 (/usr/bin/python3.12)
bench: "a line of the application", 1,2
==PROF== Profiling "_rows_kernel" - 0: 0%....50%....100% - 14 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","lts__t_sector_hit_rate.pct"
"","","","","","","","","","","","byte","byte","ns","%"
"0","1234","python3.12","127.0.0.1","_rows_kernel","1","7","(128, 1, 1)","(8192, 1, 1)","0","9.0","134,217,728","67,108,864","71,008","33.48"
"some words in quotes" of the application
"1","1234","python3.12","127.0.0.1","void at::native::f<4, ""x"", char *>(int, T2)","1","7","(128, 1, 1)","(16, 4, 1)","0","9.0","2,048","n/a","1,024.50","nan"
==PROF== Disconnected from process 1234
"""  # noqa: E501


def test_kernels_are_read_between_other_lines():
    report = read(SAMPLE, ASKED)
    first, second = report.kernels
    assert (first.name, first.grid, first.block) == ("_rows_kernel", "(8192, 1, 1)", "(128, 1, 1)")
    assert dict(first.values) == {"time_ns": 71008.0, "read_bytes": 2**27, "written_bytes": 2**26, "l2_hit_pct": 33.48}
    assert first.moved == 3 * 2**26
    assert second.name == 'void at::native::f<4, "x", char *>(int, T2)' and second["time_ns"] == 1024.5


def test_what_is_no_number_has_no_value_and_is_said():
    report = read(SAMPLE, ASKED)
    assert report.kernels[1]["written_bytes"] is None and report.kernels[1]["l2_hit_pct"] is None
    assert report.kernels[1].moved is None
    assert report.problems == ["no value of dram__bytes_write.sum"]  # the hit rate is not essential


@pytest.mark.parametrize("unit, factor", [("nsecond", 1), ("usecond", 1e3), ("us", 1e3), ("ms", 1e6), ("second", 1e9)])
def test_units_are_scaled(unit, factor):
    report = read(SAMPLE.replace('"ns"', f'"{unit}"').replace('"byte","byte"', '"Mbyte","Kbyte"'), ASKED)
    values = report.kernels[0].values
    assert values["time_ns"] == pytest.approx(71008 * factor)
    assert (values["read_bytes"], values["written_bytes"]) == pytest.approx((2**27 * 1e6, 2**26 * 1e3))
    assert values["l2_hit_pct"] == 33.48


def test_an_output_that_is_cut_off_does_not_pass_for_whole():
    """Cut anywhere in a kernel's line: that kernel is a problem, and those before it are as they were."""
    sample = SAMPLE.replace('"n/a"', '"0"')
    whole = read(sample, ASKED)
    assert len(whole.kernels) == 2 and not whole.problems
    for number, line in enumerate(x for x in sample.splitlines() if x[:3] in ('"0"', '"1"')):
        start = sample.index(line)
        for end in range(start + 4, start + len(line)):
            report = read(sample[:end], ASKED)
            assert report.kernels == whole.kernels[:number] and "cut off" in report.problems[0], sample[start:end]
    header = sample[: sample.index('"0","1234"')]
    assert "without a kernel" in read(header, ASKED).problems[0]


def test_two_tables_are_read_as_one():
    again = SAMPLE + SAMPLE.replace('"dram__bytes_read.sum","dram__bytes_write.sum"', '"dram__bytes_write.sum","dram__bytes_read.sum"')  # noqa: E501 # fmt: skip
    kernels = read(again, ASKED).kernels
    assert [k["read_bytes"] for k in kernels] == [2**27, 2048, 2**26, None]


# ---- which metrics


def test_the_first_metric_that_ncu_knows_is_asked_for():
    asked, left_out = metrics()
    assert not left_out and asked == {name: choices[0] for name, choices in FIELDS.items()}
    listed = {choice.partition(".")[0] for choices in FIELDS.values() for choice in choices}
    asked, left_out = metrics(
        listed=listed - {"dram__bytes_read", "sm__pipe_tma_cycles_active", "launch__registers_per_thread"}
    )
    assert asked["read_bytes"] == "dram__bytes_op_read.sum" and left_out == ["tma_pct"]
    assert "registers" in asked  # such are not in the default list
    asked, left_out = metrics(without=FIELDS["read_bytes"])
    assert left_out == ["read_bytes"] and "read_bytes" not in asked


@pytest.mark.parametrize(
    "error, expected",
    [
        ("==ERROR== Failed to find metric dram__bytes_read.sum", ["dram__bytes_read.sum"]),
        (r"==ERROR== Failed to find metric regex:^dram__bytes_read\.(sum|min|max|avg|pct)$", ["dram__bytes_read.sum"]),
        (r"==ERROR== Failed to find metric regex:^lts__t_sector_hit_rate\.pct$", ["lts__t_sector_hit_rate.pct"]),
        ("==ERROR== Failed to find metric dram__bytes_read", ["dram__bytes_read.sum"]),
        ("==ERROR== Failed to find metric dram__bytes", []),
        ("==ERROR== Failed to find metric a.b\n==ERROR== Failed to find metric dram__bytes_write.sum",
         ["dram__bytes_write.sum"]),
        ("==PROF== fine", []),
    ],
)  # fmt: skip
def test_refused_metrics_are_named(error, expected):
    assert refused(error, ASKED.values()) == expected


def test_a_list_of_metrics_is_read_by_its_first_words():
    text = ("Device NVIDIA H100 (GH100)\n---------- -----\nMetric Name   Metric Type   Metric Unit   Metric Description\n"
            "dram__bytes_read    Counter   byte    # of bytes read from DRAM\n"
            "dram__throughput    Throughput    %    DRAM throughput of dram__cycles\n")  # fmt: skip
    assert profile_read.base_names(text) == {"dram__bytes_read", "dram__throughput"}


FAILURES = {
    "ERR_NVGPUCTRPERM": "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
    "Counters on the target device 0. For instructions see https://developer.nvidia.com/ERR_NVGPUCTRPERM\n"
    "==PROF== Disconnected from process 7\n==WARNING== No kernels were profiled.\n",
    "LibraryNotLoaded": "==ERROR== Cuda driver is not compatible with Nsight Compute. LibraryNotLoaded\n",
    "another tool": "==ERROR== Profiling failed because a driver resource was unavailable. Ensure that no other tool (like "
    "DCGM) is concurrently collecting profiling data.\n==ERROR== Failed to profile\n==WARNING== No kernels were profiled.\n",
    "no kernels were profiled": "==PROF== Disconnected from process 7\n==WARNING== No kernels were profiled.\n",
    "something new": "==PROF== x\n==ERROR== something new\n==WARNING== No kernels were profiled.\n",
}


@pytest.mark.parametrize("words", FAILURES)
def test_a_failure_has_a_reason_by_its_name(words):
    assert words in failure(FAILURES[words]) and not read(FAILURES[words], ASKED).kernels


def test_nothing_that_ncu_says_of_a_fine_run_is_a_failure():
    assert not failure(SAMPLE)


# ---- what limits a kernel


def kernel(**values):
    return Kernel("k", "(1, 1, 1)", "(128, 1, 1)", values)


@pytest.mark.parametrize("name", UNITS)
def test_the_busiest_unit_limits_a_kernel(name):
    shares = dict.fromkeys(UNITS, 10.0) | {"sm_pct": 99.0, name: 60.0}
    assert kernel(**shares).limit() == f"{UNITS[name]}: 60 % of the peak"
    assert kernel(**shares | {name: 59.9}).limit().startswith("latency: nothing is busy")


def test_a_kernel_without_a_busy_unit_waits_for_something():
    """Shares of all cycles, of those too in which a warp issues or could; these two are no stalls."""
    k = kernel(tensor_pct=30.0, stall_long_scoreboard=5.0, stall_barrier=2.0, stall_wait=1.0, stall_gmma=None,
               stall_selected=1.0, stall_not_selected=11.0)  # fmt: skip
    assert k.stalls() == [("long_scoreboard", 25.0), ("barrier", 10.0), ("wait", 5.0)]
    assert "tensor cores: 30 % of the peak); warps wait for global memory or the L2 (long_scoreboard) 25 %" in k.limit()
    assert "nothing known" in kernel(tensor_pct=3.0).limit() and "not known" in kernel(sm_pct=90.0).limit()


def test_what_allows_the_fewest_blocks_limits_the_occupancy():
    assert kernel(limit_registers=2.0, limit_shared_mem=1.0, limit_warps=8.0).limiter() == "shared memory"
    assert (
        kernel(limit_registers=1.0, limit_shared_mem=1.0, limit_blocks=None).limiter() == "registers and shared memory"
    )
    assert kernel().limiter() == ""


def test_every_stall_and_unit_is_asked_for():
    ready = {"stall_selected", "stall_not_selected"}  # without them shares of the cycles are of something else
    assert {f"stall_{name}" for name in profile_read.STALLS} | ready | UNITS.keys() <= FIELDS.keys()
    names = [choice for choices in FIELDS.values() for choice in choices]
    assert len(set(names)) == len(names)
