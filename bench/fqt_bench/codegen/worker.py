"""Compile the launches for an architecture without a GPU and print what the compiler made of them, in JSON lines.

    python -m fqt_bench.codegen.worker ARCH

A process of its own, because `TRITON_INTERPRET=1` in the environment of the other tests turns kernels into Python.
Triton itself specializes the arguments, as in a real launch: only its driver is replaced, by one that names the target.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fqt_kernels

from .launches import launches

MMA = re.compile(r"wgmma\.mma_async\S+|mma\.sync\S+|tcgen05\.mma\S+|v_s?mfma_\w+|v_s?wmma_\w+")
SASS_MMA = re.compile(r"\b(?:IMMA|IGMMA|UTC\w*MMA)\b")
PTX_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\s")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s[^;]*?\], (0x[0-9a-f]+|\d+)")
AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dwordx?\d?)\w*\s")
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
FUSED = re.compile(r"\bfma\.|\b(?:add|sub|mul)\.(?:ftz\.)?f32\b")  # the latter may be fused: no rounding is given
LABEL = re.compile(r"^\s*([.$]?\.?L\w+):")
BRANCH = re.compile(r"\b(?:bra|BRA|s_c?branch)[\w.]*\s.*?([.$]\.?L\w+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s|^\t[a-z]\w+")  # of disassembled NVIDIA code; of AMD assembly


class Offline:
    """The part of a Triton driver that a compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the key of Triton's caches in memory

    def get_current_stream(self, device: str) -> int:
        return 0


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compiled(launch: Callable[[], object], target: GPUTarget) -> list[tuple[str, object]]:
    """(kernel's name, compiled kernel) of each kernel that the launch would start on the target."""
    seen = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        seen.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(Offline(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return seen


def main_loop(text: str, mma: re.Pattern) -> list[str]:
    """The lines of the innermost loop that holds a tensor-core instruction, none if there is no such loop."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := LABEL.match(line))}
    loops = []
    for i, line in enumerate(lines):
        m = BRANCH.search(line)
        first = labels.get(m[1], i) if m else i
        if any(mma.search(inner) for inner in lines[first:i]):
            loops.append(lines[first : i + 1])
    return min(loops, key=len, default=[])


def widths(lines: list[str]) -> tuple[list[int], list[int]]:
    """The sizes in bytes of the loads and the stores of global memory, each once, in increasing order."""
    text = "\n".join(lines)
    found = {"l": {int(size, 0) for size in PTX_COPY.findall(text)}, "s": set()}
    for kind, vector, bits in PTX_ACCESS.findall(text):
        found[kind[0]].add(int(vector or 1) * int(bits) // 8)
    for kind, size in AMD_ACCESS.findall(text):
        found[kind[0]].add(AMD_BYTES[size])
    return sorted(found["l"]), sorted(found["s"])


def tool(name: str, arguments: list[str], binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        path = getattr(knobs.nvidia, name).path
        return subprocess.run([path, *arguments, f.name], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict[str, int]:
    """Registers of a thread, and bytes of memory that each thread needs because it has too few."""
    if "cubin" in kernel.asm:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", ["-res-usage"], kernel.asm["cubin"])))
        return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}
    usage = dict(re.findall(r"\.(\w+):\s*(\d+)", kernel.asm["amdgcn"]))
    spilled = max(4 * int(usage["vgpr_spill_count"]), int(usage["private_segment_fixed_size"]))
    # Scalar registers spill to lanes of vector registers, not to memory.
    scalars = int(usage["sgpr_spill_count"])
    return {"registers": int(usage["vgpr_count"]), "spilled": spilled, "scalars_spilled": scalars}


def pipeline(ptx: str) -> dict[str, object]:
    """Of a warp-specialized product: registers that warps ask for, TMA loads and stores in the text, wgmma left in flight
    by the waits of the main loop, arrivals on a barrier with no barrier of the consumers since they waited."""
    waited = early = 0
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line:
            waited = 1
        elif re.search(r"\bbar\.sync\s+0,", line):
            waited = 0
        elif "mbarrier.arrive.shared" in line:
            early += waited
    loop = "\n".join(main_loop(ptx, MMA))
    copies = [re.findall(rf"cp\.async\.bulk\.tensor\.2d\.{to}", ptx) for to in (r"shared::\w+\.global", "global")]
    return {
        "setmaxnreg": sorted({int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}),
        "tma": [len(found) for found in copies],
        "waits": sorted({int(n) for n in re.findall(r"wgmma\.wait_group\S+\s+(\d+)", loop)}),
        "freed_early": early,
        "fused": len(FUSED.findall(ptx)),
    }


def figures(name: str, kernel) -> dict[str, object]:
    """What the table records of a compiled kernel."""
    text = kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]
    loads, stores = widths(text.splitlines())
    meta = kernel.metadata
    entry = {"threads": meta.num_warps * meta.target.warp_size, **resources(kernel), "shared": meta.shared,
             "loads": loads, "stores": stores}  # fmt: skip
    if MMA.search(text):
        entry["mma"] = sorted(set(MMA.findall(text)))
        entry["loop_loads"] = widths(main_loop(text, MMA))[0]
        if "setmaxnreg" in text:
            entry |= pipeline(text)
        # Disassembly takes as long as a compilation: once for each configuration.
        if name.endswith("scales even"):
            assembly = tool("nvdisasm", ["-c"], kernel.asm["cubin"]) if "cubin" in kernel.asm else text
            loop = main_loop(assembly, SASS_MMA if "cubin" in kernel.asm else MMA)
            entry["loop_instructions"] = sum(bool(INSTRUCTION.match(line)) for line in loop)
            if "setmaxnreg" in text:
                waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb\d, 0x(\w+)", "\n".join(loop))
                entry["assembly_waits"] = sorted({int(n, 16) for n in waits})
    return entry


def kernels_of_the_package() -> list[str]:
    """The names of all kernels there are, whether or not a launch is listed for them."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(fqt_kernels.__path__, "fqt_kernels.")]
    objects = {name: value for module in modules for name, value in vars(module).items()}
    return sorted(
        name for name, value in objects.items() if isinstance(value, JITFunction) and name.endswith("_kernel")
    )


def main(arch: str) -> None:
    print(json.dumps({"triton": triton.__version__, "kernels": kernels_of_the_package()}))
    seen = set()  # launches share kernels: the ranges of x do not depend on the rounding
    for name, launch in launches(arch):
        try:
            kernels = compiled(launch, target_of(arch))
        except Exception as e:  # whatever a compiler throws: the other launches still have figures
            print(json.dumps({f"{arch} ? {name}": {"error": f"{type(e).__name__}: {e}"[:500]}}), flush=True)
            continue
        for kernel_name, kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps({f"{arch} {kernel_name} {name}": figures(name, kernel)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
