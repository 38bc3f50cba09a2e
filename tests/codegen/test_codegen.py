"""The compiler gate: laws that every compiled kernel keeps, and figures that change only together with their table."""

import pytest

from fqt_bench.codegen.table import ARCHES, Table, chosen, compile_table

from . import laws

REGENERATE = "If the change is meant, write the table again with this Triton: python -m tests.codegen.update"


@pytest.fixture(scope="session")
def table() -> Table:
    return compile_table()


def broken(law: laws.Law, table: Table, arch: str) -> str:
    found = laws.violations(law, arch, table.triton, table.of(arch))
    return f"{len(found)} of {len(table.of(arch))} with Triton {table.triton}:\n" + "\n".join(found) if found else ""


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("law", laws.LAWS)
def test_every_compiled_kernel_keeps_the_law(table, law, arch):
    assert not broken(laws.LAWS[law], table, arch)


def test_every_kernel_of_the_package_is_compiled(table):
    assert {name.split()[1] for name in table.entries} == table.kernels


@pytest.mark.parametrize("arch", ARCHES)
def test_every_configuration_that_dispatch_may_choose_is_compiled(table, arch):
    missing = {f"{arch} _scaled_mm_kernel {name}" for name in chosen(arch)} - set(table.entries)
    assert not missing, f"{len(missing)} are not compiled: {sorted(missing)}"


@pytest.mark.parametrize("arch", ARCHES)
def test_figures_equal_the_committed_table(table, arch):
    committed = table.committed()
    if committed is None:
        pytest.skip(
            f"figures of Triton {table.triton} are not compared: no {table.path.name} (the laws above hold or fail)"
        )
    difference = table.difference(committed, arch)
    assert not difference, f"{table.path.name} differs on {arch}:\n{difference}\n{REGENERATE}"


GOOD = {"threads": 256, "registers": 168, "spilled": 0, "shared": 98304, "loads": [4, 16], "stores": [16],
        "mma": ["wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"], "loop_loads": [16]}  # fmt: skip
BAD = [
    ("compiles", {"error": "CompilationError"}),
    ("tensor_cores", {"mma": []}),
    ("tensor_cores", {"mma": ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"]}),
    ("tensor_cores", {"mma": [*GOOD["mma"], "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"]}),
    ("no_spills", {"spilled": 8}),
    ("shared_memory_fits", {"shared": 227 * 1024 + 16}),
    ("registers_fit", {"registers": 256}),
    ("registers_fit", {"threads": 512}),
    ("wide_loads", {"loop_loads": [8, 16]}),
    ("wide_loads", {"loop_loads": []}),
]
PIPELINED = {**GOOD, "threads": 384, "loads": [4], "loop_loads": [], "setmaxnreg": [24, 240], "tma": [2, 4],
             "waits": [1], "assembly_waits": [1], "freed_early": 0, "fused": 0}  # fmt: skip
BAD_PIPELINED = [
    ("tensor_cores", {"mma": ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"]}),
    ("wide_loads", {"loop_loads": [16]}),
    ("pipelined", {"setmaxnreg": []}),
    ("pipelined", {"tma": [0, 4]}),
    ("pipelined", {"tma": [2, 0]}),
    ("pipelined", {"waits": [0]}),
    ("pipelined", {"waits": [0, 1]}),
    ("pipelined", {"waits": []}),
    ("pipelined", {"assembly_waits": [0, 1]}),
    ("pipelined", {"freed_early": 1}),
    ("unfused", {"fused": 1}),
]
PARTITIONED = {**PIPELINED, "setmaxnreg": [24, 120, 240, 256]}
FP8 = {**GOOD, "mma": ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"]}
CASES = [
    ("_scaled_mm_kernel 128x128x128 w8 s3 fp8", FP8, "tensor_cores", {"mma": GOOD["mma"]}),
    *[("_scaled_mm_kernel 128x256x128 w8 s3", GOOD, *case) for case in BAD],
    *[("_hopper_scaled_mm_kernel 128x256x128 w8 s4", PIPELINED, *case) for case in BAD_PIPELINED],
    ("_hopper_scaled_mm_kernel 128x256x128 w4 s4", PARTITIONED, "pipelined", {"setmaxnreg": [24, 240]}),
]


@pytest.mark.parametrize(("kernel", "good", "law", "change"), CASES)
def test_a_law_fails_where_it_is_broken(kernel, good, law, change):
    name = f"sm_90 {kernel} scales even"
    assert laws.violations(laws.LAWS[law], "sm_90", "3.7.1", {name: good}) == []
    assert laws.violations(laws.LAWS[law], "sm_90", "3.7.1", {name: {**good, **change}})


def test_a_changed_missing_or_new_entry_shows_in_the_difference():
    old = Table(
        "0", frozenset(), {"sm_90 a": {"registers": 1}, "sm_90 b": {"registers": 2}, "sm_80 c": {"registers": 3}}
    )
    new = Table("0", frozenset(), {"sm_90 a": {"registers": 9}, "sm_90 d": {"registers": 2}})
    assert old.difference(old, "sm_90") == ""
    expected = ['- "sm_90 a": {"registers": 1}', '- "sm_90 b": {"registers": 2}',
                '+ "sm_90 a": {"registers": 9}', '+ "sm_90 d": {"registers": 2}']  # fmt: skip
    assert sorted(new.difference(old, "sm_90").splitlines()) == sorted(expected)
