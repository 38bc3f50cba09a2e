"""What a quantized linear layer is expected to gain over bf16: a roofline of one forward and backward, term by term.

    T_bf16 = 6·M·N·K / R_bf16        T = 6·M·N·K / R + (a·M·K + b·M·N + c·N·K) / BW

X is (M, K), W (N, K), dY (M, N); a, b and c are the bytes that quantizing an element of each moves, which follow from the
recipe. R and BW are `Ceilings`: rates that `fqt bench` measured on the same GPU, or shares of its datasheet's peaks. On a
GPU with a known number of processors the tiles of each product are counted in waves, and each kernel costs its launch.
`python -m fqt_bench.calibrate` fits the constants to what was measured on a GPU.
A prediction is never a measurement: it says "measured" or "datasheet" for where its ceilings come from. Where every
operator of a layer was tuned on the GPU, `fqt.tuned_cost` adds up the times that tuning took instead, and says "tuned".

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .dispatch import Choice, Problem, device_info, select, triton_version
from .recipe import Quantizer, Recipe

SOURCES = ("measured", "datasheet")
ELEMENT = 2  # bytes of bf16; of a code: 1
_CODES = {"int": "int8", "e4m3": "fp8"}
LAUNCH_US = 2.0  # an assumption
RATES = ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")
FITTED = {"launch_us": (0.0, 100.0), "quantize_share": (0.05, 2.0), "bf16_fill": (0.0, 1.0), "bf16_ramp": (0.0, 4096.0),
          "ramp": (0.0, 4096.0)}  # constants and ranges  # fmt: skip
MEASURED = Path(__file__).with_name("ceilings.json")


class NotModelled(Exception):
    """There is no prediction; the message is the reason."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that large products and copies reach on a GPU.

    bf16_tflops of torch.matmul, int8_tops and fp8_tflops (None without fp8) of fqt's own product, tb_s of a copy, read and
    written bytes counted. source: "measured" or "datasheet". arch and processors as in `dispatch.Problem`; with 0
    processors a prediction has neither waves nor launches.

    launch_us: from the end of a kernel to the start of the next one of the same stream. quantize_share: of tb_s, what
    quantization reaches. bf16_fill: how far the waves of our tiles hold for bf16's library, whose tiles are not known: 1
    like ours, 0 not at all. bf16_ramp, and ramp of our products: as many terms of a sum as a program could add while its
    pipeline fills and its result is written, so that short sums are slower. All are assumptions, those two of none, until
    `fqt_bench.calibrate` has fitted them.

    Raises:
        ValueError: a rate that is no positive number, another constant out of its range, or an unknown source.
    """

    bf16_tflops: float
    int8_tops: float
    fp8_tflops: float | None
    tb_s: float
    source: str
    gpu: str = ""
    arch: str = ""
    processors: int = 0
    launch_us: float = LAUNCH_US
    quantize_share: float = 1.0
    bf16_fill: float = 1.0
    bf16_ramp: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        for field in RATES:
            value = getattr(self, field)
            if not (_is_rate(value) or (value is None and field == "fp8_tflops")):
                raise ValueError(f"{field} must be a positive number, got {value!r}")
        for field, (low, high) in FITTED.items():
            value = getattr(self, field)
            if not (value == 0 or _is_rate(value)) or not low <= value <= high:
                raise ValueError(f"{field} must be a number from {low} to {high}, got {value!r}")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")

    def __str__(self) -> str:
        fp8 = "" if self.fp8_tflops is None else f", fp8 {self.fp8_tflops:.0f} TFLOP/s"
        rates = f"bf16 {self.bf16_tflops:.0f} TFLOP/s, int8 {self.int8_tops:.0f} TOPS{fp8}, {self.tb_s:.2f} TB/s"
        return f"{self.gpu or 'a GPU'}: {rates} ({self.source})"


@dataclass(frozen=True)
class Tiling:
    """How a product is cut. full: the share of the processors' time that goes into the output, not into partial tiles and a
    partial wave. terms: of the sum that a program computes."""

    full: float
    terms: float


@dataclass(frozen=True)
class Product:
    """One of the three products, (m, k) times (n, k) transposed, in bf16 and quantized."""

    name: str
    shape: tuple[int, int, int]
    bf16_ms: float
    ms: float


@dataclass(frozen=True)
class Pass:
    """The quantization of one matrix, in every layout that the products need, or the inverse transform of dX."""

    name: str
    elements: int
    bytes_per_element: int
    ms: float

    @property
    def bytes(self) -> int:
        return self.elements * self.bytes_per_element


@dataclass(frozen=True)
class Prediction:
    """Expected times in ms of a layer's forward and backward; the weight is quantized once in it.

    source: of the ceilings, "measured" or "datasheet"; "tuned": the times of the operators were measured, one by one.
    """

    products: tuple[Product, ...]
    passes: tuple[Pass, ...]
    codes: str  # "int8" or "fp8"
    source: str

    @property
    def bf16_ms(self) -> float:
        return sum(p.bf16_ms for p in self.products)

    @property
    def ms(self) -> float:
        return sum(p.ms for p in self.products) + sum(p.ms for p in self.passes)

    @property
    def bytes(self) -> int:
        """Moved by quantization."""
        return sum(p.bytes for p in self.passes)

    @property
    def ratio(self) -> float:
        """Above 1 the quantized layer is faster."""
        return self.bf16_ms / self.ms

    def __str__(self) -> str:
        return f"{self.ratio:.2f}× ({self.source})"


def linear(m: int, n: int, k: int, recipe: Recipe, ceilings: Ceilings) -> Prediction:
    """Predict a layer without bias, X (m, k) bf16, W (n, k).

    Raises:
        NotModelled: a recipe, a GPU or a size that the model says nothing about.
    """
    if min(m, n, k) < 1:
        raise NotModelled(f"M={m} N={n} K={k} is no product")
    format, rate = recipe.format, _rate(recipe, ceilings)
    shapes = _products(m, n, k)
    products = tuple(product(name, shape, rate, ceilings, format) for name, shape in shapes.items())
    sizes = {"X": m * k, "W": n * k, "dY": m * n, "dX": m * k}
    passes = tuple(_pass(name, sizes[name], *work, ceilings) for name, work in traffic(recipe).items())
    return Prediction(products, passes, _CODES[format], ceilings.source)


def _products(m: int, n: int, k: int) -> dict[str, tuple[int, int, int]]:
    """(rows, columns, terms) of a layer's three products."""
    return {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}


def traffic(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(bytes per element, kernels that are launched one after the other) of quantizing X, W and dY, and of dX's inverse.

    X and W are written in both layouts. A per-row scale needs one read from memory: whole rows in registers, or chunks of
    rows whose second read hits the L2. Any other scale needs a pass of statistics first, and its parameters. dY, where both
    its quantizers are stochastic, is read for the statistics of both, and once more to write the codes of each in the
    layout that its product takes. Where dgrad transforms, wgrad's codes and dgrad's are written by a pass each, auto reads
    dY once more to compare, and, unless the inverse is part of the product, dX leaves that in float32 and is read again.
    Large groups read dY twice for the transform: they are counted as if they did not.
    """
    gradients = recipe.dgrad, recipe.wgrad
    if None in gradients:
        raise NotModelled(f"recipe {recipe} leaves a product in full precision")
    inverse = {}
    if recipe.dgrad.householder:
        auto, tile = recipe.dgrad.auto, recipe.dgrad.groups == "tile"
        dy = 3 * ELEMENT + 1 + 1 + ELEMENT * auto, (10 if tile else 15) + 2 * auto
        inverse = {} if tile else {"dX": (4 + 4, 6)}  # written in float32, 2 bytes more than bf16, and read; then bf16
    elif {q.rounding for q in gradients} == {"stochastic"}:
        dy = ELEMENT + ELEMENT + 1 + 1, 4
    else:
        dy = tuple(map(sum, zip(*(_quantization(q, layouts=1) for q in gradients), strict=True)))
    return {"X": _quantization(recipe.x, layouts=2), "W": _quantization(recipe.w, layouts=2), "dY": dy} | inverse


def _quantization(quantizer: Quantizer, layouts: int) -> tuple[int, int]:
    reads, kernels = (1, 1) if quantizer.granularity == "per_row" else (2, 3)
    return reads * ELEMENT + layouts, kernels


def _rate(recipe: Recipe, ceilings: Ceilings) -> float:
    """Tera-operations a second of the recipe's products."""
    quantizers = (recipe.x, recipe.w, recipe.dgrad, recipe.wgrad)
    if None in quantizers:
        raise NotModelled("nothing is quantized" if recipe.is_exact else "products in float32 beside quantized ones")
    if recipe.format == "int":
        return ceilings.int8_tops
    if ceilings.fp8_tflops is None:
        raise NotModelled(f"no rate of fp8 products on {ceilings.gpu or 'the GPU'}")
    return ceilings.fp8_tflops


def product(name: str, shape: tuple[int, int, int], rate: float, ceilings: Ceilings, format: str = "int",
            tiling: Tiling | None = None) -> Product:  # fmt: skip
    """Predict one product of codes of a format ("int", "e4m3") at `rate` tera-operations a second, beside bf16.

    tiling: of our product; None: of what dispatch selects without a table. Both are charged its waves, bf16 as far as
    `Ceilings.bf16_fill` says.
    """
    (m, n, k), c = shape, ceilings
    cut = tiling or tiling_of(shape, c, format)
    rates = ((c.bf16_tflops * cut.full**c.bf16_fill / (1 + c.bf16_ramp / k), ELEMENT),
             (rate * cut.full / (1 + c.ramp / cut.terms), 1))  # fmt: skip
    ms = [max(2e-9 * m * n * k / tera, _memory_ms(size * (m * k + n * k) + ELEMENT * m * n, c)) + _launch_ms(1, c)
          for tera, size in rates]  # fmt: skip
    return Product(name, shape, *ms)


def _pass(name: str, elements: int, size: int, kernels: int, ceilings: Ceilings) -> Pass:
    return Pass(name, elements, size, quantized(elements * size, kernels, ceilings))


def quantized(size: float, kernels: int, ceilings: Ceilings) -> float:
    """Milliseconds of kernels one after the other that move so many bytes in all, to quantize."""
    return _memory_ms(size, ceilings) / ceilings.quantize_share + _launch_ms(kernels, ceilings)


def copied(size: float, ceilings: Ceilings) -> float:
    """Milliseconds of a copy that reads and writes so many bytes in all."""
    return _memory_ms(size, ceilings) + _launch_ms(1, ceilings)


def _memory_ms(size: float, ceilings: Ceilings) -> float:
    return 1e-9 * size / ceilings.tb_s


def _launch_ms(kernels: int, ceilings: Ceilings) -> float:
    return 1e-3 * ceilings.launch_us * kernels if ceilings.processors else 0.0


def tiling_of(shape: tuple[int, int, int], ceilings: Ceilings, format: str) -> Tiling:
    """Of what dispatch selects without a table; on a GPU without a number of processors, of full tiles."""
    if not ceilings.processors or not ceilings.arch:
        return Tiling(1.0, shape[2])
    choice = _choice(shape, ceilings.arch, ceilings.processors, format)
    if choice.backend == "reference":
        raise NotModelled(f"plain torch: {choice.reason}")
    return tiling(shape, choice.config, choice.split_k, ceilings.processors)


def tiling(shape: tuple[int, int, int], config: Sequence[int], split_k: int, processors: int) -> Tiling:
    """Of an (m, n) output in tiles of config[0] x config[1], each of whose sums of k terms split_k programs share."""
    m, n, k = shape
    block_m, block_n = config[:2]
    tiles = -(-m // block_m) * -(-n // block_n)
    pieces = tiles * split_k
    covered = m * n / (tiles * block_m * block_n)
    return Tiling(covered * pieces / (-(-pieces // processors) * processors), k / split_k)


def _choice(shape: tuple[int, int, int], arch: str, processors: int, format: str = "int") -> Choice:
    gpu = {"device": "cuda", "arch": arch, "processors": processors, "triton": triton_version()}
    return select(Problem("scaled_mm", *shape, **gpu, format=format))


# ---- ceilings

# Dense peaks by name: bf16 with float32 sums, int8, fp8 with float32 sums (10¹² operations a second), TB/s. Figures of the
# makers' datasheets and white papers as public tables quote them (half of the sparse ones where only those are given); none
# is ours. What no table confirmed is absent, and so are MIG slices, laptop versions and regional ones.
_DATASHEET = (
    (r"\bA10\b", 125, 250, None, 0.600),
    (r"\bA30\b", 165, 330, None, 0.933),
    (r"\bA40\b", 149.7, 299.3, None, 0.696),
    (r"\bA100\b.*\b40GB", 312, 624, None, 1.555),
    (r"\bA100-SXM4-80GB", 312, 624, None, 2.039),
    (r"\bA100 80GB PCIe", 312, 624, None, 1.935),
    (r"\bRTX 3090$", 71, 284, None, 0.936),
    (r"\bL4\b", 121, 242, 242, 0.300),
    (r"\bL40\b", 181, 362, 362, 0.864),
    (r"\bL40S\b", 362, 733, 733, 0.864),
    (r"\bRTX 4090$", 165.2, 660.6, 330.3, 1.008),
    (r"\bRTX 5090$", 209.5, 838, 419, 1.792),
    (r"\bH100 PCIe", 756, 1513, 1513, 2.0),
    (r"\bH100 NVL", 835, 1670, 1670, 3.9),
    (r"\bH100 80GB HBM3", 989, 1979, 1979, 3.35),
    (r"\bH200$", 989, 1979, 1979, 4.8),
    (r"\bB200\b", 2250, 4500, 4500, 7.7),
    (r"\bB300\b", 2250, 150, 4500, 7.7),
    (r"\bMI210\b", 181, 181, None, 1.6),
    (r"\bMI250X\b", 191.5, 191.5, None, 1.6),  # torch sees one of the card's two dies: half of its 383 and 3.2
    (r"\bMI300X\b", 1307.4, 2614.9, 2614.9, 5.3),
    (r"\bMI325X\b", 1307.4, 2614.9, 2614.9, 6.0),
)

# The shares of those peaks that are expected to be reached, (bf16, int8, fp8, memory), by kind of product.
_SHARES = {
    # bf16 798 TFLOP/s and a copy of 3.0 TB/s were measured on an H100 SXM (8192³, random data); on the other GPUs of
    # NVIDIA their shares are assumed. fp8 on sm_90: the middle of 1190 to 1347 TFLOP/s that Triton kernels published.
    # int8 with the synchronous products of tl.dot: 900 to 1000 TOPS expected of 1979, asynchronous ones: 1165.
    "sm90": (0.807, 0.480, 0.640, 0.896),
    "sm90 asynchronous": (0.807, 0.589, 0.640, 0.896),
    # mma.sync: an assumption, from the expectation of 1.6× on an A100 and 3× on an RTX 4090 at 8192³.
    "mma.sync": (0.807, 0.690, 0.690, 0.896),
    # tcgen05: a public reading of bf16 on a B200 is 1696 TFLOP/s; the 8-bit shares are assumed to be those of sm_90.
    "sm100": (0.754, 0.480, 0.640, 0.896),
    # A public reading on an MI300X: fp8 1159 TFLOP/s at 8192³, a copy of 4.1 TB/s. bf16 and int8 are assumptions.
    "amd": (0.50, 0.44, 0.44, 0.78),
}
_KIND = {"sm80": "mma.sync", "sm86": "mma.sync", "sm89": "mma.sync", "sm120": "mma.sync", "sm90": "sm90",
         "sm100": "sm100", "sm103": "sm100"}  # fmt: skip


def ceilings(device) -> Ceilings:
    """The ceilings of a torch.device: measured ones where `ceilings.json` has its GPU, else those of its datasheet.

    Raises:
        NotModelled: no GPU, or one that neither knows.
    """
    if device.type != "cuda":
        raise NotModelled(f"no GPU: on {device.type}")
    import torch

    return named(torch.cuda.get_device_name(device), *device_info(str(device)))


@functools.lru_cache(maxsize=64)
def named(gpu: str, arch: str, processors: int) -> Ceilings:
    """`ceilings` of a GPU by torch's name of it, its arch and its number of processors."""
    entry = measured(MEASURED).get(gpu)
    if entry is not None:
        return of_entry(entry, arch, processors)
    return from_datasheet(gpu, arch, processors)


def of_entry(entry: dict, arch: str, processors: int) -> Ceilings:
    """The ceilings of an entry of measured ones."""
    rates = (entry[f] for f in RATES)
    return Ceilings(*rates, "measured", entry["gpu"], arch, processors, **entry.get("fitted", {}))


def from_datasheet(gpu: str, arch: str, processors: int) -> Ceilings:
    """The expected shares of the GPU's peaks. Raises NotModelled for a GPU that the table does not have."""
    peaks = next((peaks for pattern, *peaks in _DATASHEET if re.search(pattern, gpu) and " MIG " not in gpu), None)
    kind = "amd" if arch.startswith("gfx") else _KIND.get(arch)
    if peaks is None or kind is None:
        raise NotModelled(f"no datasheet figures and no measured ceilings of {gpu} ({arch})")
    if kind == "sm90" and _choice((8192, 8192, 8192), arch, processors).kernel == "hopper":
        kind = "sm90 asynchronous"
    rates = (None if peak is None else peak * share for peak, share in zip(peaks, _SHARES[kind], strict=True))
    return Ceilings(*rates, "datasheet", gpu, arch, processors)


def measured(path: Path) -> dict[str, dict]:
    """The newest entry of each GPU in a file of measured ceilings: a list of {gpu, bf16_tflops, int8_tops, fp8_tflops
    (or null), tb_s, versions, date (ISO 8601), file}, as `fqt bench` writes them; "fitted", those of FITTED that
    `fqt_bench.calibrate` adds.

    Raises:
        ValueError: a file that is no such list, naming the entry and the field.
    """
    return {entry["gpu"]: entry for entry in sorted(entries(path), key=lambda entry: entry["date"])}


def entries(path: Path) -> list[dict]:
    """All entries of such a file, in its order. Raises ValueError like `measured`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(found).__name__}")
    for i, entry in enumerate(found):
        problem = _invalid(entry)
        if problem:
            raise ValueError(f"{path}: entry {i}: {problem}")
    return found


_FIELDS = {"gpu": str, "bf16_tflops": float, "int8_tops": float, "fp8_tflops": float, "tb_s": float,
           "versions": dict, "date": str, "file": str}  # fmt: skip


def _invalid(entry: object) -> str:
    """What is wrong with an entry of measured ceilings, "" for nothing."""
    if not isinstance(entry, dict) or entry.keys() - {"fitted"} != _FIELDS.keys():
        got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        return f"its fields must be {', '.join(_FIELDS)}, got {got}"
    for field, kind in _FIELDS.items():
        value = entry[field]
        if kind is float:
            if not (_is_rate(value) or (value is None and field == "fp8_tflops")):
                return f"{field} must be a positive number, got {value!r}"
        elif not isinstance(value, kind) or not value:
            return f"{field} must be a non-empty {kind.__name__}, got {value!r}"
    fitted = entry.get("fitted", {})
    if not isinstance(fitted, dict) or fitted.keys() - FITTED.keys():
        return f"fitted may have {', '.join(FITTED)}, got {fitted!r}"
    try:
        of_entry(entry, "", 0)
    except (TypeError, ValueError) as e:
        return f"fitted: {e}"
    return ""


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
