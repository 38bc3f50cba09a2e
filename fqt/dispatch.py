"""Which backend, kernel and launch configuration an operator gets: a pure function of a frozen problem and a tuned table.

>>> h100 = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0")
>>> print(select(Problem("scaled_mm", 8192, 8192, 8192, **h100)))
triton portable (128, 256, 128, 8, 3): 2048 tiles for 132 processors
>>> print(select(Problem("scaled_mm", 512, 512, 16384, **h100)))
triton portable (128, 128, 128, 8, 3) split_k 8: 16 tiles for 132 processors: 8 programs share a sum
>>> print(select(Problem("scaled_mm", 512, 512, 512, **h100 | {"arch": "sm75"})))
reference: sm_75 has no int8 kernel: it needs sm_80 or newer
>>> from fqt import tuned
>>> key = tuned.key(Problem("scaled_mm", 8192, 8192, 8192, **h100))
>>> ranking = (tuned.Timing("cublas", (), 1, 912_000), tuned.Timing("portable", (128, 128, 128, 8, 3), 1, 1_080_000))
>>> table = tuned.Table([tuned.Entry(key, ranking, 1_410_000, (8192, 8192, 8192))])
>>> print(select(Problem("scaled_mm", 8000, 8192, 8192, **h100), table))
triton cublas: tuned at 8192x8192x8192: 0.912 ms; bf16 takes 1.41 ms
>>> select(Problem("scaled_mm", 8192, 8192, 4096, **h100), table).source
'nearest'
>>> print(select(Problem("scaled_mm", 8192, 8192, 8192, force="triton", **h100), table))
triton portable (128, 128, 128, 8, 3): tuned at 8192x8192x8192: 1.08 ms; bf16 takes 1.41 ms
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import candidates, conv_problems
from .candidates import Candidate
from .tuned import EMPTY, OPS, Entry, Table, Timing

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "triton", "hopper", "reference")


@dataclass(frozen=True)
class Problem:
    """One call of an operator, as far as its choice of kernel may depend on it.

    op: "quantize" (an (m, n) matrix), "quantize_gradient" (two quantizations of one), "householder" (its transform and
    quantization, of which there is nothing to tune), "psgd" (an optimizer's step of all parameters of a dtype; nor of this),
    "scaled_mm" ((m, k) times (n, k) transposed), or of a convolution: "conv" (fprop or dgrad: m pixels of all images'
    outputs, n channels of theirs in a group, sums of k = taps times channels of a group), "conv_wgrad" (m output channels
    of a group, n = input channels of a group times taps, sums over k = output pixels of all images), "quantize_images" (m
    pixels of n channels) and "quantize_gradient_images" (two quantizations of one); "arrange_filters" (codes of m filters,
    n channels of a group and k taps, put in order by torch) is only timed. dtype: of the unquantized input, or of the
    parameters.
    format: of the codes, "int" or "e4m3". arch: "sm90", "gfx942", "" without a GPU. processors:
    streaming multiprocessors or compute units. triton: its version, None where it is not installed. force: what the user
    asked for by `fqt.backend`. plain: the product is neither added to an existing output nor are its row maxima wanted; that
    of a convolution may be computed as one of matrices where its geometry is that.
    kind: of a quantization, what else its speed depends on: words with blanks between, granularity, rounding, layout
    ("rows", "cols" or "both"), "strided" where x is not contiguous, "stats" where its ranges are given; of
    "quantize_gradient" both granularities; of "householder" how groups are formed; of "conv" and "conv_wgrad" "dgrad", "32
    groups", "9 taps", "2x2 stride", "2x2 dilation", where there is more than one, and "contiguous" where the output is not
    in channels_last memory; of images "pixels_last" where neighbours in memory are pixels, and where there are fewer than
    16 "8 images" (of wgrad too); see `conv_problems.GRAMMAR`. deterministic: `torch.use_deterministic_algorithms` is on.
    geometry: of a convolution's operator, all that its inputs follow from (see `conv_problems`); in no key of a table.
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
    kind: str = ""
    deterministic: bool = False
    geometry: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """How an operator is computed, and the reason.

    backend: "triton" or "reference". config: the launch configuration, if there is one. kernel: a name of
    `candidates.KERNELS`; "" of a quantization whose launcher chooses by the strides. split_k: how many programs share a
    sum. fallback: slower than the GPU could be, for a reason that the user should be told once. source: "tuned" by the
    table's own entry of the problem, "nearest" by another's, "heuristic", "" where there was nothing to choose.
    """

    backend: str
    config: tuple[int, ...] | None
    reason: str
    kernel: str = ""
    split_k: int = 1
    fallback: bool = False
    source: str = ""

    def __str__(self) -> str:
        parts = [self.backend, self.kernel, str(self.config or ""), f"split_k {self.split_k}" * (self.split_k > 1)]
        return f"{' '.join(filter(None, parts))}: {self.reason}"


@functools.lru_cache(maxsize=4096)
def select(problem: Problem, table: Table = EMPTY) -> Choice:
    """Choose the backend, the kernel and its configuration. Pure: no device is touched, no environment is read.

    What the table says, of this problem or else of the nearest, counts as far as it names `candidates` of this problem;
    then the heuristic. bf16 never takes the place of quantized arithmetic: where it was faster, the reason says so.

    Raises:
        RuntimeError: a backend was asked for that cannot run here.
    """
    p = problem
    choice = _without_a_choice(p)
    if choice is None:
        choice = _remarked(p, _measured(p, table) or _guessed(p))
    return choice


def _without_a_choice(p: Problem) -> Choice | None:
    """The reference, or the interpreter; None where kernels compete."""
    if p.force == "reference":
        return Choice("reference", None, "asked for")
    if p.dtype == "float64":
        return Choice("reference", None, "float64 is computed by the reference")
    if p.op in candidates.CONVOLUTIONS and (why := candidates.against_convolution(p)):
        if p.force == "triton" or (p.force == "hopper" and p.device != "cpu"):
            raise RuntimeError(f"fqt.backend({p.force!r}): {why}")
        if p.force == "auto":
            return Choice("reference", None, why, fallback=p.device != "cpu")
    if p.device == "cpu":
        return _on_cpu(p)
    missing = _missing(p)
    if missing and p.force == "auto":
        return Choice("reference", None, missing, fallback=True)
    if missing and (p.triton is None or candidates.cannot_compile(p)):
        raise RuntimeError(f"fqt.backend({p.force!r}): {missing}")
    if p.force == "hopper" and p.op == "scaled_mm":
        from fqt_kernels.gemm_hopper import reason_against

        # Of a shape that any kernel takes: what is left is the GPU or the version of Triton.
        if never := reason_against(p.arch, 128, 128, 128):
            raise RuntimeError(f"fqt.backend('hopper'): {never}")
    return None


def _missing(p: Problem) -> str | None:
    """Why there is no good kernel on a GPU, None if there is one."""
    if p.triton is None:
        return "Triton is not installed"
    if p.op != "psgd":
        return candidates.no_kernel(p)
    name = p.arch.replace("sm", "sm_") or p.device
    return f"{name} has no kernel: it needs sm_80 or newer" if candidates.cannot_compile(p) else None


def _on_cpu(p: Problem) -> Choice:
    if p.force == "hopper":
        raise RuntimeError("fqt.backend('hopper'): it needs a GPU of sm_90, got CPU tensors")
    if p.force != "triton":
        return Choice("reference", None, "CPU tensors")
    if p.triton is None:
        raise RuntimeError("fqt.backend('triton'): Triton is not installed")
    if p.op in conv_problems.PRODUCTS:
        kernel, config, split = candidates.heuristic(p)
        return Choice("triton", config, "asked for, in the interpreter", kernel, split)
    if p.op != "scaled_mm":
        return Choice("triton", None, "asked for, in the interpreter")
    return Choice("triton", candidates.INTERPRETER_CONFIG, "asked for, in the interpreter", "portable")


def _measured(p: Problem, table: Table) -> Choice | None:
    """The best that the table knows and that may be launched for this problem."""
    if not len(table) or p.op not in OPS:
        return None
    own = table.exact(p)
    known = [("tuned", own)] if own else []
    known += [("nearest", entry) for entry in table.nearest(p)]
    for source, entry in known:
        for timing in entry.ranking:
            if candidates.allows(p, Candidate(timing.kernel, timing.config, timing.split_k)):
                reason = _timed(entry, timing, "" if source == "tuned" else " the nearest shape")
                return Choice("triton", timing.config or None, reason, timing.kernel, timing.split_k, source=source)
    return None


def _timed(entry: Entry, timing: Timing, which: str) -> str:
    """Where and how fast it was, and bf16."""
    shape = "x".join(map(str, entry.exact if entry.exact[2] else entry.exact[:2]))
    text = f"tuned at{which} {shape}{f' ({entry.origin})' if entry.origin else ''}: {timing.ns / 1e6:.3g} ms"
    if entry.bf16_ns:
        text += f"; bf16 {'takes' if timing.ns <= entry.bf16_ns else 'is faster:'} {entry.bf16_ns / 1e6:.3g} ms"
    return text


def _guessed(p: Problem) -> Choice:
    """The heuristic's choice of a problem that Triton computes."""
    if p.op == "householder":
        return Choice("triton", None, "grouping, transform and rounding on the device")
    if p.op == "psgd":
        return Choice("triton", None, "one launch for all parameters")
    if p.op in conv_problems.PRODUCTS:
        kernel, config, split = candidates.heuristic(p)
        reason = conv_problems.PATHS[kernel] + (f", {_sharing(p, config, split)}" if kernel == "implicit" else "")
        return Choice("triton", config or None, reason, kernel, split, source="heuristic")
    if p.op != "scaled_mm":
        return Choice("triton", None, "fused statistics and rounding", source="heuristic")
    from fqt_kernels.gemm import MAX_INT32_TERMS

    kernel, config, split = candidates.heuristic(p)
    reason = _sharing(p, config, split)
    if p.format == "int" and p.k > MAX_INT32_TERMS:
        reason = f"sums of {p.k} terms leave int32 in pieces"
    return Choice("triton", config, reason, kernel, split, source="heuristic")


def _sharing(p: Problem, config: tuple[int, ...], split: int) -> str:
    tiles = candidates.tiles(p, config)
    shared = f": {split} programs share a sum" if split > 1 else ""
    return f"{tiles} tile{'s' * (tiles > 1)} for {p.processors} processors{shared}"


def _remarked(p: Problem, choice: Choice) -> Choice:
    """With what the user should know of the portable kernels."""
    if choice.kernel not in ("portable", "implicit"):
        return choice
    reason, slow = choice.reason, False
    if p.force == "hopper" and p.op == "scaled_mm":
        reason += f"; not the Hopper kernel: {candidates.against_hopper(p)}"
    if p.arch == "sm100" and p.format == "int" and _version(p.triton) < (3, 8):
        slow = True
        reason += f"; Triton {p.triton} multiplies int8 by sm_80's instructions: 3.8 and newer use tcgen05"
    return replace(choice, reason=reason, fallback=slow)


def _version(text: str) -> tuple[int, ...]:
    """(major, minor) of a version like "3.7.1+git"."""
    return tuple(int(part) for part in text.split(".")[:2])


def choose(
    op: str,
    device: torch.device,
    m: int,
    n: int,
    k: int = 0,
    dtype: torch.dtype | None = None,
    *,
    format: str = "int",
    plain: bool = True,
    kind: str = "",
    geometry: tuple[int, ...] = (),
) -> Choice:
    """What an operator launches: `select` of its `problem`, by the tuned table of the device.

    Where `fqt.tuning.enable()` asked for it, a problem of a GPU that has no entry of its own is tuned first; but never while
    a CUDA graph is captured or a program is traced.
    """
    call = (op, device, m, n, k, dtype, format, plain, kind, _forced, _is_deterministic(), geometry)
    if device.type != "cuda":
        return _chosen(EMPTY, *call)
    tuning = _tuning()
    table = tuning.table(device)
    choice = _chosen(table, *call)
    if choice.source in ("nearest", "heuristic") and op in OPS and tuning.enabled() and not _is_recorded():
        posed = _problem(*call)
        if table.exact(posed) is None:
            tuning.tune_now(posed, device)
            choice = _chosen(tuning.table(device), *call)
    return choice


def choose_untuned(
    op: str, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype | None = None, *, format: str = "int"
) -> Choice:
    """`choose` without a table, hence without a look at one."""
    return _chosen(EMPTY, op, device, m, n, k, dtype, format, True, "", _forced, _is_deterministic(), ())


@functools.lru_cache(maxsize=4096)
def _chosen(table: Table, *call) -> Choice:
    """`select`, without making a problem: operators ask several times for each layer and step."""
    return select(_problem(*call), table)


@functools.cache
def _tuning():
    """`fqt.tuning`, imported when the first GPU asks."""
    return importlib.import_module(".tuning", __package__)


def _is_recorded() -> bool:
    """Whether what is launched now would be recorded instead of run, so that it cannot be timed."""
    import torch
    from torch._guards import detect_fake_mode

    return torch.compiler.is_compiling() or detect_fake_mode() is not None or torch.cuda.is_current_stream_capturing()


_forced = "auto"  # of the whole process: autograd runs backward passes on threads of its own


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context every operator of the process, backward passes included, runs on this backend:
    "triton", "hopper", "reference", or "auto" (the default).

    "triton" never multiplies by the GPU vendor's library, as "auto" may by a tuned table. On CPU tensors it runs the kernels
    in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first use. "hopper" is "triton" with the asynchronous
    kernel of products for sm_90, wherever that takes the shape.

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
    op: str,
    device: torch.device,
    m: int,
    n: int,
    k: int = 0,
    dtype: torch.dtype | None = None,
    *,
    format: str = "int",
    plain: bool = True,
    kind: str = "",
    geometry: tuple[int, ...] = (),
) -> Problem:
    """The problem of calling `op` on tensors of a device, under the current `backend` and torch's demand of determinism."""
    return _problem(op, device, m, n, k, dtype, format, plain, kind, _forced, _is_deterministic(), geometry)


def _problem(op, device, m, n, k, dtype, format, plain, kind, force, deterministic, geometry) -> Problem:
    arch, processors = device_info(str(device)) if device.type == "cuda" else ("", 1)
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    more = arch, processors, triton_version(), force, format, plain, kind, deterministic, geometry
    return Problem(op, m, n, k, name, device.type, *more)


def _is_deterministic() -> bool:
    import torch

    return torch.are_deterministic_algorithms_enabled()


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
