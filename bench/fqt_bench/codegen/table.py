"""The table of figures: compiling it, and the committed copies of it, one file for each version of Triton."""

import difflib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FIGURES = ROOT / "tests" / "codegen" / "figures"
# The GPUs that are compiled for, and the name of their table of configurations. A process each, the longest first.
ARCHES = {"sm_90": "sm90", "sm_100": "sm100", "sm_80": "sm80", "sm_120": "sm80", "gfx942": "amd", "sm_89": "sm80"}
CONSTRAINTS = ROOT / "constraints.txt"  # of a checkout: the installed package has none, and compiles for all
PINNED = not CONSTRAINTS.exists() or f"triton=={metadata.version('triton')}" in CONSTRAINTS.read_text().split()
if not PINNED:
    # The integer instructions of sm_80: once, with the pinned version, is worth the time. So they are on sm_100 with
    # Tritons that do not know tcgen05's.
    del ARCHES["sm_120"], ARCHES["sm_89"]
    if tuple(map(int, metadata.version("triton").split(".")[:2])) < (3, 8):
        del ARCHES["sm_100"]
# Launches that need less than another one of the same kernel.
LESS = re.compile(
    r"(?<!fp8 )scales odd$| split "
    r"|^(64x\d+x\d+ w4|128x64x\d+ (c1 )?w\d|128x128x\d+ w8) .*affine tail$"  # there is an odd one
    r"|^(128x128x128 w4 s6|256x128x128 w4 s4) affine |^128x256x128 w4 s4 affine tail$"
    r"|^row ranges even|^groups \w+ even|^bhq n(128|1024|8192) |^bhq n4096 min nearest"
    r"|^psgd (bfloat16|adamw every scaled)|^int8 step sgd"
    r"|^n1024 cols (grid|min) |^n4096 |^n28672 min|^per_tensor (cols )?grid"
    r"|^gradient (int8 odd|psq8 stochastic|ptq4|fp8 odd)"
    r"|conv (even|affine contiguous tail)$|wgrad strided even$"
    r"|^images (nhwc rows|nhwc symmetric|nhwc gradient|nhwc odd|nchw odd 14x14|first)"
)


def config_name(config: tuple[int, ...]) -> str:
    return "{}x{}x{} w{} s{}".format(*config)


@functools.cache
def chosen(arch: str) -> frozenset[str]:
    """The launches of the portable product that dispatch chooses without being asked. sm_89 has split sums for sm_80's."""
    from fqt.dispatch import Problem, select

    sizes = [(1, 1), (512, 512), (2048, 1024), (4096, 4096), (8192, 4095), (16384, 16384)]
    gpu = dict(device="cuda", arch=arch.replace("_", ""), processors=108, triton=metadata.version("triton"))
    names = set()
    for (m, n), k, codes in itertools.product(sizes, (64, 4096, 32768, 200_704), ("int", "e4m3")):
        choice = select(Problem("scaled_mm", m, n, k, format=codes, **gpu))
        if choice.backend == "reference":  # float8 where there is none
            continue
        kind = "fp8 scales" if codes == "e4m3" else "flush scales" if k == 200_704 else "scales"
        names.add(f"{config_name(choice.config)} {kind} {'even' if n % 16 == 0 or n == 1 else 'odd'}")
        if choice.split_k > 1 and arch != "sm_89":
            names.add(f"{config_name(choice.config)} split added bfloat16 absmax tail")
    return frozenset(names)


def is_worth_it(arch: str, name: str) -> bool:
    """Whether a launch is compiled for the architecture.

    With the pinned Triton all for sm_90; for sm_80 all but variants and most quantizations of images. Else those that need
    the most of each kernel and configuration, and those that dispatch chooses without being asked: with other Tritons for
    all but sm_90, and for sm_120, whose instructions are sm_80's, the products alone, for sm_120 without convolutions; for
    sm_89 of the integers, whose instructions are sm_80's, not the longest epilogues.
    """
    if PINNED and arch == "sm_90":
        return True
    words = name.split()
    if not re.match(r"\d+x\d+x\d+ ", name) and (arch == "sm_120" or (arch != "sm_90" and not PINNED)):
        return False
    if arch == "sm_120" and {"conv", "wgrad"} & set(words):
        return False
    complete = PINNED and arch == "sm_80" and words[0] != "images"
    few = (
        {"folded", "float32", "multiplier"}
        if complete
        else {"folded", "float32", "multiplier", "symmetric", "full", "one"}
    )
    plain = "split" in words or not {"added", "absmax"} & set(words)
    hopper = ("affine", "even"), ("full", "even"), ("scales", "tail"), ("full", "odd")
    varied = few & set(words) or tuple(words[-2:]) in hopper
    if not plain or varied or re.search(r"\d+x\d+ w8$", name) or (arch == "sm_89" and "affine" in words):
        return False
    return complete or not LESS.search(name) or name in chosen(arch)


@dataclass(frozen=True)
class Table:
    """What a version of Triton makes of the kernels.

    entries: figures by "architecture kernel launch", or {"error": text} where the compilation failed.
    kernels: the names of all kernels of the package.
    """

    triton: str
    kernels: frozenset[str]
    entries: dict[str, dict]

    def of(self, arch: str) -> dict[str, dict]:
        return {name: figures for name, figures in self.entries.items() if name.split()[0] == arch}

    def lines(self) -> list[str]:
        """The entries, one a line, sorted."""
        return [f"{json.dumps(name)}: {json.dumps(self.entries[name])}" for name in sorted(self.entries)]

    @property
    def path(self) -> Path:
        return FIGURES / f"triton-{self.triton}.json"

    def write(self) -> None:
        self.path.write_text("{\n" + ",\n".join(self.lines()) + "\n}\n")

    def committed(self) -> "Table | None":
        """The committed table of the same version of Triton, None if there is none."""
        if not self.path.exists():
            return None
        return Table(self.triton, self.kernels, json.loads(self.path.read_text()))

    def difference(self, other: "Table", arch: str) -> str:
        """The lines of an architecture that differ in the other table, as a diff from it to this one."""
        mine, theirs = (Table(t.triton, t.kernels, t.of(arch)).lines() for t in (self, other))
        return "\n".join(line for line in difflib.ndiff(theirs, mine) if line[0] in "+-")


def compile_table() -> Table:
    """Compile everything with the installed Triton, from an empty cache, in processes of their own."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [json.loads(line) for output in pool.map(_compile, ARCHES) for line in output.splitlines()]
    heads = [line for line in lines if "kernels" in line]
    entries = {name: figures for line in lines if "kernels" not in line for name, figures in line.items()}
    return Table(heads[0]["triton"], frozenset(heads[0]["kernels"]), entries)


def _compile(arch: str) -> str:
    # Triton's settings change what it emits; TRITON_INTERPRET would keep it from compiling at all.
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    roots = [str(ROOT / folder) for folder in (".", "kernels", "bench")]
    env["PYTHONPATH"] = os.pathsep.join([p for p in [env.get("PYTHONPATH")] if p] + roots)
    command = [sys.executable, "-m", "fqt_bench.codegen.worker", arch]
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
