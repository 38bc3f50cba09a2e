"""Everything that may be launched for a problem on its GPU, and the heuristic's guess of what is the fastest.

>>> from fqt.dispatch import Problem
>>> h100 = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0")
>>> heuristic(Problem("scaled_mm", 512, 512, 16384, **h100))
Candidate(kernel='portable', config=(128, 128, 128, 8, 3), split_k=8)
>>> [c.kernel for c in candidates(Problem("scaled_mm", 8192, 8192, 8192, format="e4m3", **h100))]
['portable', 'portable', 'portable', 'portable']
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from . import conv_problems
from .conv_problems import count

if TYPE_CHECKING:
    import torch

    from .dispatch import Problem
    from .tuned import Timing

KERNELS = ("portable", "hopper", "cublas", "rows", "long_rows", "tile", *conv_problems.PATHS, "torch")
MAX_CANDIDATES = 16
# Whether the heuristic takes the asynchronous kernel of gemm_hopper.py where it can. `fqt.backend("hopper")` does in any
# case, and a tuned table may.
HOPPER_KERNEL = False

# Kinds of GPU that share a table of configurations. sm_86, 89 and 120 have the int8 instructions of sm_80, and sm_120 has
# the float8 ones of sm_89.
FAMILY = {"sm80": "sm80", "sm86": "sm80", "sm87": "sm80", "sm89": "sm80", "sm120": "sm80", "sm121": "sm80"}
FAMILY |= {"sm90": "sm90", "sm100": "sm100"}
FP8_FAMILY = {"sm89": "sm89", "sm120": "sm89", "sm121": "sm89", "sm90": "sm90", "sm100": "sm100", "sm103": "sm100"}
INTERPRETER_CONFIG = (32, 32, 32, 1, 1)  # the interpreter's cost is per program and per block of K, not per element
# Tiles beside those that the launchers of quantizations choose, for extents of multiples of 16: 128 bytes of a transposed
# row, and of either; 32 bytes of a transposed row. Compiled for sm_80 and sm_90.
MORE_TILES = ((128, 64, 8), (128, 128, 8))
MORE_LONG_ROWS = ((32, 128, 8),)
CONVOLUTIONS = (*conv_problems.PRODUCTS, *conv_problems.QUANTIZATIONS)
_MAX_SPLIT = 32
MIN_SPLIT_STEPS = 8  # blocks of K that each program keeps: a pipeline of 4 stages is full for half of them


class Candidate(NamedTuple):
    """A kernel and how it is launched.

    kernel: of a product "portable" (`gemm.py`), "hopper" (`gemm_hopper.py`) or "cublas" (`gemm_cublas.py`), of a
    quantization "rows", "long_rows" or "tile"; of a convolution's product "implicit" (`conv.py`, `conv_wgrad.py`), or the
    way to a product of matrices, "pointwise" or "im2col", for which dispatch is asked in turn; "torch" where no kernel of
    ours competes. config: (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of a product, (BLOCK_M, BLOCK_N, num_warps) of
    a quantization, of images (images, pixels, channels, num_warps); () of what has none. split_k: programs that share a sum.
    """

    kernel: str
    config: tuple[int, ...]
    split_k: int = 1


def candidates(problem: Problem) -> tuple[Candidate, ...]:
    """All that may be launched for the problem, the heuristic's guess first; () where only the reference computes it.

    Every candidate for int8 codes computes the same bits. Float8 products do not (their float32 sums follow the
    configuration), so that with problem.deterministic the guess is the only one. Those of a product come in the order of
    their cost in the model, at most 16 of them.
    """
    guess = heuristic(problem)
    if guess is None or (problem.deterministic and problem.op == "scaled_mm" and problem.format != "int"):
        return (guess,) if guess else ()
    if problem.op in conv_problems.GRAMMAR:
        from . import conv_candidates

        found = conv_candidates.competing(problem) if problem.device != "cpu" and problem.op in CONVOLUTIONS else []
    elif problem.op == "quantize_gradient":
        found = [Candidate("tile", tile) for tile in _tiles_of(problem)]
    elif problem.op == "quantize":
        found = _quantizations(problem)
    elif problem.device == "cpu":
        found = [guess]
    else:
        found = _products(problem)
    return tuple(dict.fromkeys([guess, *found]))


def allows(problem: Problem, candidate: Candidate) -> bool:
    """Whether the candidate may be launched for the problem: what an entry of a table is asked in each new problem.

    Of a product on a GPU without a list of all `candidates`, and for any way to split K that leaves no processor waiting;
    of a convolution's wgrad for any that `conv_candidates.splits` has.
    """
    p, (kernel, config, split) = problem, candidate
    if p.op == "conv_wgrad" and kernel == "implicit" and p.device != "cpu":
        from . import conv_candidates

        known = heuristic(p) is not None and config in conv_candidates.configs(p)
        return known and split in conv_candidates.splits(p, config)
    if p.op != "scaled_mm" or p.device == "cpu" or p.force != "auto" or (p.deterministic and p.format != "int"):
        return candidate in candidates(p)
    if no_kernel(p) or p.triton is None or p.dtype == "float64":
        return False
    if kernel == "portable":
        return config in _portable_configs(p) and 1 <= split <= _most_splits(p, config)
    if split != 1:
        return False
    if kernel == "hopper":
        return Candidate(kernel, config) in _hopper(p) and against_hopper(p) is None
    from fqt_kernels import gemm_cublas

    return (kernel, config, p.format) == ("cublas", (), "int") and (
        gemm_cublas.reason_against(p.arch, p.m, p.n, p.k) is None
    )


def title(candidate: Candidate | Timing) -> str:
    """ "portable 128x256x128 w8 s3 split 4": the kernel, its tile, warps and stages, and how many share a sum."""
    kernel, config, split_k = candidate[:3]
    tile, rest = (config[:3], config[3:]) if len(config) > 3 else (config[:2], config[2:])
    parts = [kernel, "x".join(map(str, tile)), *(f"{letter}{value}" for letter, value in zip("ws", rest, strict=False))]
    return " ".join(filter(None, [*parts, f"split {split_k}" * (split_k > 1)]))


def heuristic(problem: Problem) -> Candidate | None:
    """What is chosen where nothing was measured, None where only the reference computes the problem.

    Of a quantization, what its launcher chooses for a contiguous matrix, or one that is transposed if "strided".
    """
    p = problem
    interpreted = p.device == "cpu" and p.force == "triton"
    if p.triton is None or p.force == "reference" or p.dtype == "float64" or (p.device == "cpu" and not interpreted):
        return None
    if not interpreted and (cannot_compile(p) if p.force != "auto" else no_kernel(p)):
        return None
    if p.op == "quantize":
        kernel, *_ = _quantize_kernels(p)
        return next(c for c in _quantizations(p) if c.kernel == kernel)
    if p.op == "quantize_gradient":
        return Candidate("tile", _tiles_of(p)[0])
    if p.op == conv_problems.ARRANGED:
        return Candidate("torch", ())
    if p.op in CONVOLUTIONS:
        from . import conv_candidates

        return None if against_convolution(p) else conv_candidates.heuristic(p)
    return Candidate("portable", INTERPRETER_CONFIG) if interpreted else _product(p)


def known(op: str, format: str, kernel: str, config: tuple[int, ...]) -> bool:
    """Whether the code has this configuration of the kernel, for whatever problem and GPU; False without Triton."""
    try:
        return config in _configs(op, format).get(kernel, ())
    except ImportError:
        return False


@functools.cache
def _configs(op: str, format: str) -> dict[str, frozenset[tuple[int, ...]]]:
    """All configurations of an operator's kernels."""
    from fqt_kernels import gemm, gemm_hopper, quantize

    tiles = {quantize.TILE, quantize.ODD_TILE, *MORE_TILES}
    if op == "quantize":
        return {"rows": frozenset([()]), "long_rows": frozenset([quantize.LONG_ROWS, *MORE_LONG_ROWS]),
                "tile": frozenset(tiles)}  # fmt: skip
    if op == "quantize_gradient":
        return {"tile": frozenset(tiles)}
    if op in conv_problems.GRAMMAR:
        from . import conv_candidates

        return conv_candidates.known(op) if format == "int" else {}
    tables = gemm.CONFIGS if format == "int" else gemm.FP8_CONFIGS
    portable = {INTERPRETER_CONFIG, *(config for table in tables.values() for config in table)}
    if format != "int":
        return {"portable": frozenset(portable)}
    return {"portable": frozenset(portable | {*gemm.FLUSH_CONFIG.values()}), "cublas": frozenset([()]),
            "hopper": frozenset(gemm_hopper.CONFIGS)}  # fmt: skip


# ---- which GPUs have kernels


def family(p: Problem) -> str | None:
    """The table of configurations of the GPU, None if it has none."""
    if p.format == "e4m3":
        return FP8_FAMILY.get(p.arch)
    return "amd" if p.arch.startswith("gfx") else FAMILY.get(p.arch)


def no_kernel(p: Problem) -> str | None:
    """Why no Triton kernel computes this well on the GPU, and what to do; None if one does."""
    if family(p):
        return None
    name, kind = p.arch.replace("sm", "sm_") or p.device, "int8" if p.format == "int" else "float8"
    if p.arch == "sm103" and p.op in CONVOLUTIONS:
        return "sm_103 has next to no INT8 throughput: leave convolutions in bfloat16 on it"
    if p.arch == "sm103":
        return "sm_103 has next to no INT8 throughput: use recipe 'fp8' on it"
    if not cannot_compile(p):
        return f"no {kind} kernel is known to suit {name}: fqt.backend('triton') tries those of older GPUs"
    if p.format == "int":
        return f"{name} has no int8 kernel: it needs sm_80 or newer"
    instead = "; use recipe 'int8' on it" if family(replace(p, format="int")) else ""
    return f"{name} has no float8 kernel: it needs sm_89 or newer{instead}"


def cannot_compile(p: Problem) -> bool:
    """Whether Triton is known to refuse the kernels; those for a GPU that is too new to be known may be worth a try."""
    refused = {"int": ("sm70", "sm72", "sm75"), "e4m3": ("sm70", "sm72", "sm75", "sm80", "sm86", "sm87", "gfx")}
    return not p.arch or p.arch.startswith(refused[p.format])


# ---- products


def _product(p: Problem) -> Candidate:
    """The heuristic's choice for a product on a GPU."""
    if guessed_against_hopper(p) is None:
        return min(_hopper(p), key=lambda candidate: cost(p, candidate))
    return _portable(p)[0]


def _products(p: Problem) -> list[Candidate]:
    """All kernels that may compute a product on a GPU. `fqt.backend` narrows them to what was asked for."""
    from fqt_kernels import gemm_cublas

    hopper = _hopper(p) if p.force in ("auto", "hopper") and against_hopper(p) is None else []
    if hopper and p.force == "hopper":
        return sorted(hopper, key=lambda candidate: cost(p, candidate))
    cublas = p.force == "auto" and p.format == "int" and gemm_cublas.reason_against(p.arch, p.m, p.n, p.k) is None
    others = sorted(hopper, key=lambda candidate: cost(p, candidate)) + [Candidate("cublas", ())] * cublas
    portable = _portable(p)
    kept = portable[: MAX_CANDIDATES - len(others)]
    whole = portable[0]._replace(split_k=1)  # should additions to memory cost more than the model thinks
    if whole not in kept:
        kept[-1] = whole
    return kept + others


def guessed_against_hopper(p: Problem) -> str | None:
    """Why the heuristic does not take the Hopper kernel, None if it does."""
    if p.force != "hopper" and not (HOPPER_KERNEL and p.force == "auto" and p.arch == "sm90"):
        return "not asked for"
    if (why := against_hopper(p)) is None and p.force == "auto":
        return "the output is small" if tiles(p, _hopper(p)[-1].config) < p.processors else None
    return why


def against_hopper(p: Problem) -> str | None:
    """Why the Hopper kernel cannot compute the product, None if it can."""
    from fqt_kernels.gemm_hopper import reason_against

    if p.format != "int":
        return "its float8 sums are not promoted to float32"
    if not p.plain:
        return "it writes a new output and no row maxima"
    return reason_against(p.arch, p.m, p.n, p.k)


def _hopper(p: Problem) -> list[Candidate]:
    from fqt_kernels.gemm_hopper import CONFIGS

    return [Candidate("hopper", config) for config in CONFIGS]


def _portable(p: Problem) -> list[Candidate]:
    """The portable kernel's configurations and ways to split K, the least `cost` first; of equals those of the table."""
    found = [candidate for config in _portable_configs(p) for candidate in _splits(p, config)]
    return sorted(found, key=lambda candidate: cost(p, candidate))


def _portable_configs(p: Problem) -> list[tuple[int, ...]]:
    from fqt_kernels import gemm

    name = table_of(p)
    if p.format == "int" and p.k > gemm.MAX_INT32_TERMS:
        return [gemm.FLUSH_CONFIG[name]]
    table = (gemm.CONFIGS if p.format == "int" else gemm.FP8_CONFIGS)[name]
    return [config for config in table if gemm.fits(config, p.n)]


def table_of(p: Problem) -> str:
    """The name of the table of configurations; of the nearest older GPU, where none is known to suit."""
    return family(p) or {"int": "sm80", "e4m3": "sm89"}[p.format]


def _most_splits(p: Problem, config: tuple[int, ...]) -> int:
    """Programs that may share a sum: sums of integers, over free processors only, on NVIDIA."""
    from fqt_kernels.gemm import MAX_INT32_TERMS

    if p.format != "int" or p.k > MAX_INT32_TERMS or table_of(p) == "amd":
        return 1
    return max(min(_MAX_SPLIT, p.processors // max(tiles(p, config), 1), steps(p, config) // MIN_SPLIT_STEPS), 1)


def _splits(p: Problem, config: tuple[int, ...]) -> list[Candidate]:
    """The configuration without a split, and with the cheapest one and the powers of two around it."""
    ways = [Candidate("portable", config, split) for split in range(1, _most_splits(p, config) + 1)]
    best = min(ways, key=lambda candidate: cost(p, candidate)).split_k
    around = {1, best, *(2**i for i in range(1, 6) if best <= 2 ** (i + 1) and 2**i <= 2 * best)}
    return [candidate for candidate in ways if candidate.split_k in around]


def tiles(p: Problem, config: tuple[int, ...]) -> int:
    """Of the output."""
    return -(-p.m // config[0]) * -(-p.n // config[1]) * count(p.kind, "groups")


def steps(p: Problem, config: tuple[int, ...]) -> int:
    """Blocks of K of a sum."""
    return taps(p) * -(-p.k // (taps(p) * config[2]))


def taps(p: Problem) -> int:
    """Of a convolution, where its sum goes over them one after the other."""
    return count(p.kind, "taps") if p.op == "conv" else 1


def cost(p: Problem, candidate: Candidate) -> float:
    """How long a processor is busy, in products of 128x256x128: a model of proportions, not a measurement.

    A program multiplies, in a time like its area, and meanwhile loads, in a time like its edges. Both take equally long
    at 128x256 (an H100 reads 5.5 TB/s from L2 at 1000 TOPS): smaller tiles wait for their loads. Its pipeline fills and
    empties in the time of 256 codes of K. With split_k it also adds its tile to memory: 4 bytes an element, at a quarter
    of the loads' rate.
    """
    _, config, split = candidate
    block_m, block_n, block_k, *_ = config
    waves = -(-tiles(p, config) * split // p.processors)
    speed = max(block_m * block_n / (128 * 256), (block_m + block_n) / (128 + 256))
    depth = -(-steps(p, config) // split) * block_k + 256
    adding = 16 * block_m * block_n / ((128 + 256) * 128) if split > 1 else 0.0
    return waves * (depth / 128 * speed + adding)


# ---- convolutions


def against_convolution(p: Problem) -> str | None:
    """Why no kernel computes an operator of a convolution, None if one does."""
    from fqt_kernels.gemm import MAX_INT32_TERMS

    if p.format != "int":
        return "convolutions have kernels for int8 codes only"
    if p.op == "conv" and p.k > MAX_INT32_TERMS:
        return f"a sum of {p.k} products (taps times channels of a group) leaves int32, which holds {MAX_INT32_TERMS}"
    return None


# ---- quantizations


def _quantizations(p: Problem) -> list[Candidate]:
    """The kernel that the launcher would choose, and those after it, which take ever more matrices."""
    from fqt_kernels.quantize import LONG_ROWS

    more = MORE_LONG_ROWS if _tunable(p) else ()
    configs = {"rows": [()], "long_rows": [LONG_ROWS, *more], "tile": _tiles_of(p)}
    return [Candidate(kernel, config) for kernel in _quantize_kernels(p) for config in configs[kernel]]


def _quantize_kernels(p: Problem) -> tuple[str, ...]:
    from fqt_kernels.quantize import KERNELS, choose_kernel

    words = p.kind.split()
    transposed = "cols" in words or "both" in words
    first = choose_kernel(_matrix(p), "per_row" if "per_row" in words else "", transposed, "stats" in words)
    return KERNELS[KERNELS.index(first) :]


def _tiles_of(p: Problem) -> list[tuple[int, ...]]:
    from fqt_kernels.quantize import tile_of

    return [tile_of(_matrix(p)), *(MORE_TILES if _tunable(p) else ())]


def _tunable(p: Problem) -> bool:
    """Whether tiles that were compiled for this GPU, and for these extents, are worth a try."""
    return p.m % 16 == p.n % 16 == 0 and (FAMILY.get(p.arch) in ("sm80", "sm90") or p.device == "cpu")


def _matrix(p: Problem) -> torch.Tensor:
    """What is quantized, without its elements."""
    import torch

    if "strided" in p.kind.split():
        return torch.empty(p.n, p.m, device="meta").t()
    return torch.empty(p.m, p.n, device="meta")
