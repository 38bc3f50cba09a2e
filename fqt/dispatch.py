"""Which backend, kernel and launch configuration an operator gets: a pure function of a frozen problem.

>>> h100 = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0")
>>> print(select(Problem("scaled_mm", 8192, 8192, 8192, **h100)))
triton portable (128, 256, 128, 8, 3): 2048 tiles for 132 processors
>>> print(select(Problem("scaled_mm", 512, 512, 16384, **h100)))
triton portable (128, 128, 128, 8, 3) split_k 8: 16 tiles for 132 processors: 8 programs share a sum
>>> print(select(Problem("scaled_mm", 512, 512, 512, **h100 | {"arch": "sm75"})))
reference: sm_75 has no int8 kernel: it needs sm_80 or newer
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

BACKENDS = ("auto", "triton", "hopper", "reference")
# Whether "auto" takes the asynchronous kernel of gemm_hopper.py where it can. `fqt.backend("hopper")` does in any case.
HOPPER_KERNEL = False

# Kinds of GPU that share a table of configurations. sm_86, 89 and 120 have the int8 instructions of sm_80, and sm_120 has
# the float8 ones of sm_89.
_FAMILY = {"sm80": "sm80", "sm86": "sm80", "sm87": "sm80", "sm89": "sm80", "sm120": "sm80", "sm121": "sm80"}
_FAMILY |= {"sm90": "sm90", "sm100": "sm100"}
_FP8_FAMILY = {"sm89": "sm89", "sm120": "sm89", "sm121": "sm89", "sm90": "sm90", "sm100": "sm100", "sm103": "sm100"}
_INTERPRETER_CONFIG = (32, 32, 32, 1, 1)  # the interpreter's cost is per program and per block of K, not per element
_MAX_SPLIT = 32
_MIN_SPLIT_STEPS = 8  # blocks of K that each program keeps: a pipeline of 4 stages is full for half of them


@dataclass(frozen=True)
class Problem:
    """One call of an operator, as far as its choice of kernel may depend on it.

    op: "quantize" (an (m, n) matrix) or "scaled_mm" ((m, k) times (n, k) transposed). dtype: of the unquantized input.
    format: of the codes, "int" or "e4m3". arch: "sm90", "gfx942", "" without a GPU. processors: streaming
    multiprocessors or compute units. triton: its version, None where it is not installed. force: what the user asked for
    by `fqt.backend`. plain: the product is neither added to an existing output nor are its row maxima wanted.
    """

    op: str
    m: int
    n: int
    k: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    arch: str = ""
    processors: int = 1
    triton: str | None = None
    force: str = "auto"
    format: str = "int"
    plain: bool = True


@dataclass(frozen=True)
class Choice:
    """How an operator is computed, and the reason.

    backend: "triton" or "reference". config: the launch configuration, if there is one. kernel: of a product by Triton,
    "portable" (`gemm.py`) or "hopper" (`gemm_hopper.py`). split_k: how many programs share a sum. fallback: slower than
    the GPU could be, for a reason that the user should be told once.
    """

    backend: str
    config: tuple[int, ...] | None
    reason: str
    kernel: str = ""
    split_k: int = 1
    fallback: bool = False

    def __str__(self) -> str:
        parts = [self.backend, self.kernel, str(self.config or ""), f"split_k {self.split_k}" * (self.split_k > 1)]
        return f"{' '.join(filter(None, parts))}: {self.reason}"


@functools.lru_cache(maxsize=4096)
def select(problem: Problem) -> Choice:
    """Choose the backend, the kernel and its configuration. Pure: no device is touched, no environment is read.

    Raises:
        RuntimeError: a backend was asked for that cannot run here.
    """
    p = problem
    if p.force == "reference":
        return Choice("reference", None, "asked for")
    if p.dtype == "float64":
        return Choice("reference", None, "float64 is computed by the reference")
    if p.device == "cpu":
        return _on_cpu(p)
    missing = "Triton is not installed" if p.triton is None else _no_kernel(p)
    if missing and p.force == "auto":
        return Choice("reference", None, missing, fallback=True)
    if missing and (p.triton is None or _cannot_compile(p)):
        raise RuntimeError(f"fqt.backend({p.force!r}): {missing}")
    if p.op == "quantize":
        return Choice("triton", None, "fused statistics and rounding")
    return _product(p)


def _on_cpu(p: Problem) -> Choice:
    if p.force == "hopper":
        raise RuntimeError("fqt.backend('hopper'): it needs a GPU of sm_90, got CPU tensors")
    if p.force != "triton":
        return Choice("reference", None, "CPU tensors")
    if p.triton is None:
        raise RuntimeError("fqt.backend('triton'): Triton is not installed")
    if p.op == "quantize":
        return Choice("triton", None, "asked for, in the interpreter")
    return Choice("triton", _INTERPRETER_CONFIG, "asked for, in the interpreter", "portable")


def _family(p: Problem) -> str | None:
    """The table of configurations of the GPU, None if it has none."""
    if p.format == "e4m3":
        return _FP8_FAMILY.get(p.arch)
    return "amd" if p.arch.startswith("gfx") else _FAMILY.get(p.arch)


def _no_kernel(p: Problem) -> str | None:
    """Why no Triton kernel computes this well on the GPU, and what to do; None if one does."""
    if _family(p):
        return None
    name, kind = p.arch.replace("sm", "sm_") or p.device, "int8" if p.format == "int" else "float8"
    if p.arch == "sm103":
        return "sm_103 has next to no INT8 throughput: use recipe 'fp8' on it"
    if not _cannot_compile(p):
        return f"no {kind} kernel is known to suit {name}: fqt.backend('triton') tries those of older GPUs"
    if p.format == "int":
        return f"{name} has no int8 kernel: it needs sm_80 or newer"
    instead = "; use recipe 'int8' on it" if _family(replace(p, format="int")) else ""
    return f"{name} has no float8 kernel: it needs sm_89 or newer{instead}"


def _cannot_compile(p: Problem) -> bool:
    """Whether Triton is known to refuse the kernels; those for a GPU that is too new to be known may be worth a try."""
    refused = {"int": ("sm70", "sm72", "sm75"), "e4m3": ("sm70", "sm72", "sm75", "sm80", "sm86", "sm87", "gfx")}
    return not p.arch or p.arch.startswith(refused[p.format])


def _product(p: Problem) -> Choice:
    """The kernel and the configuration of a product that Triton computes."""
    from fqt_kernels import gemm

    family = _family(p) or {"int": "sm80", "e4m3": "sm89"}[p.format]
    against = _against_hopper(p)
    if against is None:
        from fqt_kernels.gemm_hopper import CONFIGS

        config, _ = _cheapest(p, CONFIGS, 1)
        return Choice("triton", config, _filling(p, config, 1), "hopper")
    note = f"; not the Hopper kernel: {against}" if p.force == "hopper" else ""
    if p.format == "int" and p.k > gemm.MAX_INT32_TERMS:
        reason = f"sums of {p.k} terms leave int32 in pieces"
        return Choice("triton", gemm.FLUSH_CONFIG[family], reason + note, "portable")
    table = (gemm.CONFIGS if p.format == "int" else gemm.FP8_CONFIGS)[family]
    splittable = p.format == "int" and family != "amd"
    config, split = _cheapest(
        p, [config for config in table if gemm.fits(config, p.n)], _MAX_SPLIT if splittable else 1
    )
    reason, legacy = _filling(p, config, split) + note, False
    if p.arch == "sm100" and p.format == "int" and p.triton is not None and _version(p.triton) < (3, 8):
        legacy = True
        reason += f"; Triton {p.triton} multiplies int8 by sm_80's instructions: 3.8 and newer use tcgen05"
    return Choice("triton", config, reason, "portable", split, fallback=legacy)


def _against_hopper(p: Problem) -> str | None:
    """Why the product does not get the Hopper kernel, None if it does."""
    if p.force != "hopper" and not (HOPPER_KERNEL and p.force == "auto" and p.arch == "sm90"):
        return "not asked for"
    from fqt_kernels.gemm_hopper import CONFIGS, reason_against

    # Of a shape that any kernel takes: what is left is the GPU or the version of Triton.
    if p.force == "hopper" and (never := reason_against(p.arch, 128, 128, 128)):
        raise RuntimeError(f"fqt.backend('hopper'): {never}")
    if p.format != "int":
        return "its float8 sums are not promoted to float32"
    if not p.plain:
        return "it writes a new output and no row maxima"
    if p.force == "auto" and _tiles(p, CONFIGS[-1]) < p.processors:
        return "the output is small"
    return reason_against(p.arch, p.m, p.n, p.k)


def _tiles(p: Problem, config: tuple[int, ...]) -> int:
    return -(-p.m // config[0]) * -(-p.n // config[1])


def _filling(p: Problem, config: tuple[int, ...], split: int) -> str:
    tiles = _tiles(p, config)
    shared = f": {split} programs share a sum" if split > 1 else ""
    return f"{tiles} tile{'s' * (tiles > 1)} for {p.processors} processors{shared}"


def _cheapest(p: Problem, configs: list[tuple[int, ...]], max_split: int) -> tuple[tuple[int, ...], int]:
    """The configuration and split_k of the least `_cost`; of equals the first. Sums are only split over free processors."""
    candidates = [
        (config, split)
        for config in configs
        for split in range(1, max_split + 1)
        if split == 1 or (_tiles(p, config) * split <= p.processors and _steps(p, config) >= _MIN_SPLIT_STEPS * split)
    ]
    return min(candidates, key=lambda candidate: _cost(p, *candidate))


def _steps(p: Problem, config: tuple[int, ...]) -> int:
    return -(-p.k // config[2])


def _cost(p: Problem, config: tuple[int, ...], split: int) -> float:
    """How long a processor is busy, in products of 128x256x128: a model of proportions, not a measurement.

    A program multiplies, in a time like its area, and meanwhile loads, in a time like its edges. Both take equally long
    at 128x256 (an H100 reads 5.5 TB/s from L2 at 1000 TOPS): smaller tiles wait for their loads. Its pipeline fills and
    empties in the time of 256 codes of K. With split_k it also adds its tile to memory: 4 bytes an element, at a quarter
    of the loads' rate.
    """
    block_m, block_n, block_k, *_ = config
    waves = -(-_tiles(p, config) * split // p.processors)
    speed = max(block_m * block_n / (128 * 256), (block_m + block_n) / (128 + 256))
    depth = -(-_steps(p, config) // split) * block_k + 256
    adding = 16 * block_m * block_n / ((128 + 256) * 128) if split > 1 else 0.0
    return waves * (depth / 128 * speed + adding)


def _version(text: str) -> tuple[int, ...]:
    """(major, minor) of a version like "3.7.1+git"."""
    return tuple(int(part) for part in text.split(".")[:2])


_forced = "auto"  # of the whole process: autograd runs backward passes on threads of its own


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context every operator of the process, backward passes included, runs on this backend:
    "triton", "hopper", "reference", or "auto" (the default).

    "triton" on CPU tensors runs the kernels in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first use.
    "hopper" is "triton" with the asynchronous kernel of products for sm_90, wherever that takes the shape.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def problem(
    op: str, device, m: int, n: int, k: int = 0, dtype=None, *, format: str = "int", plain: bool = True
) -> Problem:
    """The problem of calling `op` on tensors of a torch.device, under the current `backend`."""
    arch, processors = device_info(str(device)) if device.type == "cuda" else ("", 1)
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return Problem(op, m, n, k, name, device.type, arch, processors, triton_version(), _forced, format, plain)


@functools.cache
def device_info(device: str) -> tuple[str, int]:
    """(arch, processors) of a GPU."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


@functools.cache
def triton_version() -> str | None:
    """Triton's version, or None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
