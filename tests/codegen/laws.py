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
_MFMA = r"v_mfma_i32_(32x32x16|16x16x32)_i8"


def is_product(name: str) -> bool:
    return name.split()[1].endswith("_mm_kernel")


def is_aligned(name: str) -> bool:
    return "odd" not in name.split()


def compiles(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    return "error" not in figures


def int8_tensor_cores(arch: str, triton: tuple[int, int], name: str, figures: dict) -> bool:
    """A product multiplies int8 on the tensor cores, and on nothing else of them; what is no product has none."""
    if not is_product(name):
        return "mma" not in figures
    wanted = {"sm_90": _WGMMA, "gfx942": _MFMA, "sm_100": _TCGEN05 if triton >= (3, 8) else _MMA_SYNC}.get(
        arch, _MMA_SYNC
    )
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
    """A product reads codes in pieces of 16 bytes in its main loop, rows being multiples of 16 bytes in every launch.

    An aligned matrix that is quantized is read and, its rows or its columns, written in pieces that make a warp's access
    512 contiguous bytes: 16 bytes a thread with NVIDIA's 32 threads, 8 with AMD's 64.
    """
    if is_product(name):
        return figures.get("loop_loads") == [16]
    if not is_aligned(name):
        return True
    piece = 8 if arch.startswith("gfx") else 16
    return max(figures["loads"]) >= piece and (not figures["stores"] or max(figures["stores"]) >= piece)


LAWS: dict[str, Law] = {
    law.__name__: law for law in (compiles, int8_tensor_cores, no_spills, shared_memory_fits, registers_fit, wide_loads)
}


def violations(law: Law, arch: str, version: str, entries: dict[str, dict]) -> list[str]:
    """The entries of an architecture that break a law, with their figures. A failed compilation breaks `compiles`."""
    triton = tuple(int(part) for part in version.split(".")[:2])
    entries = entries.items() if law is compiles else [(k, v) for k, v in entries.items() if "error" not in v]
    return [f"{name}: {figures}" for name, figures in entries if not law(arch, triton, name, figures)]
