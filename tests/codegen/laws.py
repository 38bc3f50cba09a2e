"""What the compiler's output must satisfy, whatever the version of Triton. Each law is a function

(architecture, Triton's version, the entry's name, its figures) → whether it holds
"""

import re
from collections.abc import Callable

Law = Callable[[str, tuple[int, int], str, dict], bool]

# KiB that one program may have.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
_MMA_SYNC = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8\.s32"
_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
_TCGEN05 = r"tcgen05\.mma\.cta_group::\d\.kind::i8\S*"
_FP8_MMA_SYNC = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"
_FP8_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3"
_FP8_TCGEN05 = r"tcgen05\.mma\.cta_group::\d\.kind::f8f6f4\S*"
_MFMA = r"v_mfma_i32_(32x32x16|16x16x32)_i8"


# They handle a few numbers for each row or group.
OF_GROUPS = {"_params_kernel", "_row_ranges_kernel", "_leaders_kernel", "_groups_kernel", "_tile_groups_kernel",
             "_group_absmax_kernel", "_choose_kernel", "_householder_weights_kernel", "_int8_prepare_kernel"}  # fmt: skip


def is_product(name: str) -> bool:
    return name.split()[1].endswith("_mm_kernel")


def is_pipelined(name: str) -> bool:
    """Whether it is the product of gemm_hopper.py, of which more is asked."""
    return name.split()[1] == "_hopper_scaled_mm_kernel"


def is_fp8(name: str) -> bool:
    return is_product(name) and "fp8" in name.split()


def is_aligned(name: str) -> bool:
    return "odd" not in name.split()


def compiles(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    return "error" not in figures


def tensor_cores(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """A product multiplies its codes, int8 or float8, on the tensor cores, and on nothing else of them; what is no product
    has none."""
    if not is_product(name):
        return "mma" not in figures
    if is_fp8(name):
        wanted = {"sm_90": _FP8_WGMMA, "sm_100": _FP8_TCGEN05}.get(arch, _FP8_MMA_SYNC)
    else:
        tcgen05 = _TCGEN05 if triton >= (3, 8) else _MMA_SYNC
        wanted = {"sm_90": _WGMMA, "gfx942": _MFMA, "sm_100": tcgen05}.get(arch, _MMA_SYNC)
    return bool(figures.get("mma")) and all(re.fullmatch(wanted, opcode) for opcode in figures["mma"])


def no_spills(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    return figures["spilled"] == 0


def shared_memory_fits(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    return figures["shared"] <= SHARED[arch] * 1024


def registers_fit(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """One program has the registers that it asks for: allocated in eights, 64 Ki of them on NVIDIA, 128 Ki on AMD."""
    allocated = -(-figures["registers"] // 8) * 8 * figures["threads"]
    if arch.startswith("gfx"):
        return figures["registers"] <= 512 and allocated <= 4 * 64 * 512
    return figures["registers"] <= 255 and allocated <= 65536


def wide_loads(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """A product reads codes in pieces of 16 bytes in its main loop, rows being multiples of 16 bytes in every launch; the
    pipelined one reads none there, its producer does, and convolutions of groups whose channels are not read one by one.

    An aligned matrix that is quantized is read and, its rows or its columns, written in pieces that make a warp's access
    512 contiguous bytes: 16 bytes a thread with NVIDIA's 32 threads, 8 with AMD's 64.
    """
    if is_product(name):
        if "groups" in name.split():
            return True
        return figures.get("loop_loads") == ([] if is_pipelined(name) else [16])
    kernel = name.split()[1]
    if not is_aligned(name) or kernel in OF_GROUPS:
        return True
    piece = 8 if arch.startswith("gfx") else 16
    # What is found of rows or groups is little beside what is read. The first transform of auto finds ranges.
    finds = kernel.endswith(("_stats_kernel", "_extremes_kernel")) or kernel.startswith("_follower")
    finds = finds or ("auto" in name and "#2" not in name)
    return max(figures["loads"]) >= piece and (finds or max(figures["stores"]) >= piece)


def pipelined(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """The pipelined product loads both operands by TMA, and stores by TMA where rows are whole pieces of 16 bytes. Its main
    loop keeps one wgmma in flight, in the assembly too (ptxas may serialize them), and frees a stage only behind a
    barrier of the partition's warps that read it. Registers go from the producer to the consumers: to one partition of 8
    warps, or to two of 4, of which the first has 256 until the others have begun. Together no more than the launch has.
    """
    if not is_pipelined(name):
        return True
    loads, stores = figures["tma"]
    moved = loads == 2 and (stores > 0) == is_aligned(name)
    in_flight = figures["waits"] == [1] and figures.get("assembly_waits", [1]) == [1]
    registers = [24, 120, 240, 256] if " w4 " in name else [24, 240]
    return moved and in_flight and figures["freed_early"] == 0 and figures["setmaxnreg"] == registers


def unfused(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """The pipelined product rounds each float operation: its results equal the reference bit for bit."""
    return figures.get("fused") == 0 if is_pipelined(name) else True


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        compiles, tensor_cores, no_spills, shared_memory_fits, registers_fit, wide_loads, pipelined, unfused
    )
}  # fmt: skip


def violations(law: Law, arch: str, version: str, entries: dict[str, dict]) -> list[str]:
    """The entries of an architecture that break a law, with their figures. A failed compilation breaks `compiles`."""
    triton = tuple(int(part) for part in version.split(".")[:2])
    entries = entries.items() if law is compiles else [(k, v) for k, v in entries.items() if "error" not in v]
    return [f"{name}: {figures}" for name, figures in entries if not law(arch, triton, name, figures)]
