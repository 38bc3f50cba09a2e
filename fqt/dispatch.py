"""Which backend and which launch configuration an operator gets: a pure function of a frozen problem.

>>> print(select(Problem("scaled_mm", 8192, 8192, 8192, device="cuda", arch="sm90", processors=132, triton="3.6.0")))
triton (128, 256, 128, 8, 3): largest tile that fills 132 processors
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

BACKENDS = ("auto", "triton", "reference")
# Kinds of GPU that share a table of configurations. sm_86, 89 and 120 have the instructions of sm_80.
_FAMILY = {"sm80": "sm80", "sm86": "sm80", "sm87": "sm80", "sm89": "sm80", "sm120": "sm80", "sm121": "sm80"}
_FAMILY |= {"sm90": "sm90", "sm100": "sm100"}
_INTERPRETER_CONFIG = (32, 32, 32, 1, 1)  # the interpreter's cost is per program and per block of K, not per element


@dataclass(frozen=True)
class Problem:
    """One call of an operator, as far as its choice of kernel may depend on it.

    op: "quantize" (an (m, n) matrix) or "scaled_mm" ((m, k) times (n, k) transposed). dtype: of the unquantized input.
    arch: "sm90", "gfx942", "" without a GPU. processors: streaming multiprocessors or compute units. triton: its
    version, None where it is not installed. force: a backend that the user asked for by `fqt.backend`.
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


@dataclass(frozen=True)
class Choice:
    """backend "triton", "reference" or "refused", the launch configuration if there is one, and the reason."""

    backend: str
    config: tuple[int, ...] | None
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}{f' {self.config}' if self.config else ''}: {self.reason}"


@functools.lru_cache(maxsize=4096)
def select(problem: Problem) -> Choice:
    """Choose the backend and the configuration. Pure: no device is touched, no environment is read."""
    p = problem
    if p.force == "reference":
        return Choice("reference", None, "asked for")
    if p.dtype == "float64":
        return Choice("reference", None, "float64 is computed by the reference")
    if p.force == "triton":
        if p.triton is None:
            raise RuntimeError("fqt.backend('triton'): Triton is not installed")
        if p.device == "cpu":
            return Choice(
                "triton", _INTERPRETER_CONFIG if p.op == "scaled_mm" else None, "asked for, in the interpreter"
            )
    elif p.device == "cpu":
        return Choice("reference", None, "CPU tensors")
    if p.triton is None:
        return Choice("reference", None, "Triton is not installed")
    family = _FAMILY.get(p.arch) or ("amd" if p.arch.startswith("gfx") else None)
    if p.arch == "sm103" and p.force != "triton":
        return Choice(
            "refused", None, "sm_103 has next to no INT8 throughput: train in bf16 or fp8 on it (recipe 'exact')"
        )
    if family is None:
        if p.force != "triton":
            return Choice(
                "reference", None, f"no int8 tensor-core kernel for {p.arch or p.device}: it needs sm_80 or newer"
            )
        family = "sm80"
    if p.op == "quantize":
        return Choice("triton", None, "fused statistics and rounding")
    return _gemm_config(p, family)


def _gemm_config(p: Problem, family: str) -> Choice:
    from fqt_kernels.gemm import CONFIGS, FLUSH_CONFIG, MAX_INT32_TERMS

    if p.k > MAX_INT32_TERMS:
        return Choice("triton", FLUSH_CONFIG[family], f"sums of {p.k} terms leave int32 in pieces")
    for config in reversed(CONFIGS[family]):
        if -(-p.m // config[0]) * -(-p.n // config[1]) >= p.processors:
            return Choice("triton", config, f"largest tile that fills {p.processors} processors")
    return Choice("triton", CONFIGS[family][0], f"smallest tile: the output has too few for {p.processors} processors")


_forced = "auto"  # of the whole process: autograd runs backward passes on threads of its own


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context every operator of the process, backward passes included, runs on this backend:
    "triton", "reference", or "auto" (the default).

    "triton" on CPU tensors runs the kernels in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first use.

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


def problem(op: str, device, m: int, n: int, k: int = 0, dtype=None) -> Problem:
    """The problem of calling `op` on tensors of a torch.device, under the current `backend`."""
    arch, processors = device_info(str(device)) if device.type == "cuda" else ("", 1)
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return Problem(op, m, n, k, name, device.type, arch, processors, triton_version(), _forced)


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
