"""Compile the launches for an architecture without a GPU and print what the compiler made of them, in JSON lines.

    python -m fqt_bench.codegen.worker ARCH [--counters] [--launches NAME ...] [--only PATTERN]

By default the figures of the committed table; with --counters what `fqt_bench.counters` compares, of every kernel.

A process of its own, because `TRITON_INTERPRET=1` in the environment of the other tests turns kernels into Python.
Triton itself specializes the arguments, as in a real launch: only its driver is replaced, by one that names the target.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fqt_kernels

from .launches import launches
from .table import is_worth_it

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
NO_OPERATION = re.compile(r"\bNOP\b|^\ts_nop\b")  # padding to a multiple of 128 bytes; waits
SASS_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.([\w.]+)")
SASS_NARROW = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of what is not 4 bytes wide
SASS_TMA = re.compile(r"\bUTMA(LD|ST)G\b")
ATOMIC = re.compile(r"\b(?:ATOM|RED)G?\.|\b(?:global|buffer|flat)_atomic_")
# What is raised where a tree's launchers do not know a launch, before the compiler has anything to refuse.
UNKNOWN = (AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)


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


def compiled(
    launch: Callable[[], object], target: GPUTarget, wanted: Callable[[str], bool] = lambda kernel: True
) -> list[tuple[str, object]]:
    """(kernel's name, compiled kernel) of each kernel that the launch would start on the target, of those wanted."""
    seen = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if wanted(self.fn.__name__):
            seen.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(Offline(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return seen


def main_loop(text: str, mma: re.Pattern) -> list[str]:
    """The lines of the innermost loop that holds a tensor-core instruction, none if there is no such loop."""
    return min(main_loops(text, mma), key=len, default=[])


def main_loops(text: str, mma: re.Pattern) -> list[list[str]]:
    """The lines of the shortest loop around each tensor-core instruction, each loop once."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := LABEL.match(line))}
    spans = []
    for i, line in enumerate(lines):
        m = BRANCH.search(line)
        first = labels.get(m[1], i) if m else i
        if first < i:
            spans.append((i - first, first, i))
    used = (i for i, line in enumerate(lines) if mma.search(line))
    around = (min((span for span in spans if span[1] <= i < span[2]), default=None) for i in used)
    return [lines[first : last + 1] for _, first, last in sorted({span for span in around if span is not None})]


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
    by the waits of the partitions' main loops, arrivals on a barrier with no barrier of the partition's warps since they
    waited, partitions that share such a barrier counted as well."""
    waited = early = 0
    own, last = set(), ""
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line:
            waited = 1
        elif barrier := re.search(r"\bbar\.sync\s+(\d+),", line):
            waited, last = 0, barrier[1]
        elif "mbarrier.arrive.shared" in line:
            early += waited
            own.add(last)
    loops = main_loops(ptx, MMA)
    early += len(loops) - len(own)
    copies = [re.findall(rf"cp\.async\.bulk\.tensor\.2d\.{to}", ptx) for to in (r"shared::\w+\.global", "global")]
    return {
        "setmaxnreg": sorted({int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}),
        "tma": [len(found) for found in copies],
        "waits": waits(loops, r"wgmma\.wait_group\S+\s+(\d+)"),
        "freed_early": early,
        "fused": len(FUSED.findall(ptx)),
    }


def waits(loops: list[list[str]], pattern: str) -> list[int]:
    """How many wgmma each wait of any of the loops leaves in flight, -1 for a loop without a wait."""
    return sorted({int(n, 0) for loop in loops for n in re.findall(pattern, "\n".join(loop)) or ["-1"]})


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
                loops = main_loops(assembly, SASS_MMA)
                entry["assembly_waits"] = waits(loops, r"WARPGROUP\.DEPBAR\.LE gsb\d, (0x\w+)")
    return entry


def kernels_of_the_package() -> list[str]:
    """The names of all kernels there are, whether or not a launch is listed for them."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(fqt_kernels.__path__, "fqt_kernels.")]
    objects = {name: value for module in modules for name, value in vars(module).items()}
    return sorted(
        name for name, value in objects.items() if isinstance(value, JITFunction) and name.endswith("_kernel")
    )


def counters(kernel) -> dict[str, int]:
    """What a compiled kernel costs, counted in its machine code: none of it may grow unnoticed.

    instructions: all of the kernel's but padding; loads, stores: those of global memory, in all and by their width in bytes
    (a wide one that falls apart shows in both); atomics; tma_loads, tma_stores; registers and shared as the laws have them.
    """
    assembly = tool("nvdisasm", ["-c"], kernel.asm["cubin"]) if "cubin" in kernel.asm else kernel.asm["amdgcn"]
    code = [line for line in assembly.splitlines() if INSTRUCTION.match(line) and not NO_OPERATION.search(line)]
    text = "\n".join(code)
    accesses = Counter()
    for name, modifiers in SASS_ACCESS.findall(text):
        width = next((SASS_NARROW[part] for part in modifiers.split(".") if part in SASS_NARROW), 4)
        accesses["stores" if name == "STG" else "loads", width] += 1
    for kind, size in AMD_ACCESS.findall(text):
        accesses[f"{kind}s", AMD_BYTES[size]] += 1
    tma = Counter(SASS_TMA.findall(text))
    totals = {kind: sum(n for (k, _), n in accesses.items() if k == kind) for kind in ("loads", "stores")}
    return {
        "instructions": len(code),
        **resources(kernel),
        "shared": kernel.metadata.shared,
        **totals,
        **{f"{kind}_{width}": accesses[kind, width] for kind, width in sorted(accesses)},
        **({"atomics": atomics} if (atomics := len(ATOMIC.findall(text))) else {}),
        **({"tma_loads": tma["LD"], "tma_stores": tma["ST"]} if tma else {}),
    }


def print_figures(arch: str) -> None:
    seen = set()  # launches share kernels: the ranges of x do not depend on the rounding
    for name, launch in launches(arch):
        if not is_worth_it(arch, name):
            continue
        try:
            kernels = compiled(launch, target_of(arch))
        except Exception as e:  # whatever a compiler throws: the other launches still have figures
            print(json.dumps({f"{arch} ? {name}": {"error": f"{type(e).__name__}: {e}"[:500]}}), flush=True)
            continue
        repeated: Counter[str] = Counter()
        for kernel_name, kernel in kernels:
            repeated[kernel_name] += 1
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                full = f"{arch} {kernel_name} {name}{_number(repeated[kernel_name])}"
                print(json.dumps({full: figures(name, kernel)}), flush=True)


def print_counters(arch: str, names: list[str] | None, pattern: str) -> None:
    """The counters of each kernel of each launch, under a name of its own, so that trees are compared launch by launch.

    A launch that fails has {"error": text} instead, or {"unknown": text} if it is the launcher that does not take it.
    """
    known: dict[str, dict[str, int]] = {}  # by hash: launches share kernels
    for name, launch in _until_unknown(arch, names):
        try:
            kernels = compiled(
                launch, target_of(arch), lambda kernel, name=name: fnmatchcase(f"{arch} {kernel} {name}", pattern)
            )
        except Exception as e:  # as above
            kind = "unknown" if isinstance(e, UNKNOWN) and not isinstance(e, CompilationError) else "error"
            print(json.dumps({f"{arch} ? {name}": {kind: f"{type(e).__name__}: {e}"[:500]}}), flush=True)
            continue
        repeated: Counter[str] = Counter()
        for kernel_name, kernel in kernels:
            if kernel.hash not in known:
                known[kernel.hash] = counters(kernel)
            repeated[kernel_name] += 1
            full = f"{arch} {kernel_name} {name}{_number(repeated[kernel_name])}"
            print(json.dumps({full: known[kernel.hash]}), flush=True)


def _number(nth: int) -> str:
    """What tells the nth kernel of a name apart that one launch starts."""
    return f" #{nth}" if nth > 1 else ""


def _until_unknown(arch: str, names: list[str] | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches of these names, all if None; a line for each that the tree has no configuration or function for."""
    missing = set(names or ())
    reason = "no such launch"
    try:
        for name, launch in launches(arch):
            if names is None or name in names:
                missing.discard(name)
                yield name, launch
    except UNKNOWN as e:  # an older tree may lack what the list of launches is made of
        reason = f"{type(e).__name__}: {e}"[:500]
        missing = missing or {"all further launches"}
    for name in sorted(missing):
        print(json.dumps({f"{arch} ? {name}": {"unknown": reason}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch")
    parser.add_argument("--counters", action="store_true")
    parser.add_argument("--launches", nargs="+", metavar="NAME")
    parser.add_argument("--only", default="*", metavar="PATTERN")
    args = parser.parse_args()
    print(json.dumps({"triton": triton.__version__, "kernels": kernels_of_the_package()}), flush=True)
    if args.counters:
        print_counters(args.arch, args.launches, args.only)
    else:
        print_figures(args.arch)


if __name__ == "__main__":
    main()
