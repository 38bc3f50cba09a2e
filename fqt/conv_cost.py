"""What a quantized convolution is expected to gain over cuDNN's in bf16 and channels_last: `fqt.cost`'s roofline of its
three products, of N images, P output pixels each, C channels in, O out, T taps.

    fprop (N·P, O, T·C)      dgrad (N·pixels, C, T·O)      wgrad (O, C·T, N·P)

Each takes 2·N·P·O·T·C/groups operations at the rate of its path, or reads its operands and writes its result, whichever is
longer. An image is read once by a product, however many taps look at it. Besides, quantization moves the bytes of `traffic`.
dX is taken to be needed, W to be quantized once in a step. A prediction is no measurement: none of these constants is
measured, and it says where the ceilings come from. Where every operator of a layer was tuned on the GPU, `tuned_convolution`
adds up the times that tuning took instead, cuDNN's beside, and says "tuned".

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import conv_problems
from .conv_problems import ALIGNMENT, MAX_INT32_TERMS, Call
from .cost import (
    ELEMENT,
    Ceilings,
    NotModelled,
    Pass,
    Prediction,
    Product,
    _launch_ms,
    _memory_ms,
    _pass,
    _quantization,
    _rate,
    linear,
    product,
)
from .dispatch import Choice, Problem, select, triton_version
from .recipe import Recipe
from .tuned_cost import Dtypes, NotTuned, tuned_ms

if TYPE_CHECKING:
    from .tuned import Table

# Assumptions.
IMPLICIT = 0.65  # the share of a matrix product's rate that an implicit GEMM reaches, cuDNN's and fqt's alike
CUDNN_CHANNELS = 8  # to whose multiples cuDNN pads the channels of a convolution of one group
# Bytes an element of the windows costs where they are written out in floating point: stacked, and put in order (read and
# written); backward, their gradient put in order, and, tap by tap, put into zeros (written twice, read) and added (2 + 1).
WINDOWS = 3 * ELEMENT, 8 * ELEMENT


@dataclass(frozen=True)
class Shape:
    """A convolution of so many images. pixels: of an input image; out_pixels: of an output; taps: of the kernel.

    path: of `conv_products.PATHS`.   windows: im2col of values, not of codes, in forward and backward.   geometry: its
    `fqt.conv.Geometry` where it is known and has one (in two dimensions at most, without windows).
    """

    images: int
    channels: int
    out_channels: int
    pixels: int
    out_pixels: int
    taps: int
    groups: int = 1
    path: str = "implicit GEMM"
    windows: bool = False
    geometry: Any = None

    def call(self, name: str, channels_last: bool = True) -> Call:
        """What dispatch is asked about a product, "fprop", "dgrad" or "wgrad". The geometry must be known."""
        s, g = self, self.geometry
        c, o = s.channels // s.groups, s.out_channels // s.groups
        if name == "wgrad":
            stored = conv_problems.padded(s.images) if s.images >= ALIGNMENT else s.images
            return conv_problems.wgrad(g, s.images, o, c, stored)
        rows, terms = (s.channels, o) if name == "dgrad" else (s.out_channels, c)
        # Few channels of X have no padding, those of dY always have.
        is_padded = s.groups == 1 and (name == "dgrad" or terms >= ALIGNMENT)
        stored = conv_problems.padded(terms) if is_padded else terms
        return conv_problems.product(g, s.images, rows, terms, stored, name == "dgrad", channels_last)

    def quantization(self, what: str, channels_last: bool, *words: str) -> Call:
        """That of "X" or "dY" with (granularity, rounding, layout), or both of dY with the granularities of both."""
        s, of_x = self, what == "X"
        c, p = (s.channels, s.pixels) if of_x else (s.out_channels, s.out_pixels)
        is_padded = s.groups == 1 and (c >= ALIGNMENT or not of_x) and words[-1] != "cols"
        stored = conv_problems.padded(c) if is_padded else c
        call = conv_problems.quantization if len(words) == 3 else conv_problems.gradient
        return call(s.images, c, p, stored, p > 1 and (c == 1 or not channels_last), *words)

    @property
    def products(self) -> dict[str, tuple[int, int, int]]:
        """(rows, columns, terms) of the products of one group."""
        outputs, c, o = self.images * self.out_pixels, self.channels // self.groups, self.out_channels // self.groups
        return {
            "fprop": (outputs, o, self.taps * c),
            "dgrad": (self.images * self.pixels, c, self.taps * o),
            "wgrad": (o, c * self.taps, outputs),
        }

    @property
    def elements(self) -> dict[str, int]:
        return {
            "X": self.images * self.channels * self.pixels,
            "W": self.out_channels * self.channels // self.groups * self.taps,
            "dY": self.images * self.out_channels * self.out_pixels,
        }

    @property
    def multiplications(self) -> int:
        """Of one product, that of the border with padding included."""
        return self.elements["dY"] * self.channels // self.groups * self.taps


_OPERANDS = {"fprop": ("X", "W", "dY"), "dgrad": ("dY", "W", "X"), "wgrad": ("dY", "X", "W")}  # two and the result


def convolution(shape: Shape, recipe: Recipe, ceilings: Ceilings) -> Prediction:
    """Predict a layer without bias, activations in bf16.

    Raises:
        NotModelled: a recipe, a GPU or a size that the model says nothing about.
    """
    s = shape
    if min(s.images, s.channels, s.out_channels, s.pixels, s.out_pixels, s.taps) < 1:
        raise NotModelled(f"{s} is no convolution")
    rate = _rate(recipe, ceilings)
    if s.windows:
        return _of_windows(s, recipe, ceilings)
    products = tuple(_product(name, s, rate, ceilings) for name in s.products)
    elements = s.elements | {"dX": s.elements["X"]}
    passes = [_pass(name, elements[name], *work, ceilings) for name, work in traffic(recipe).items()]
    if s.path == "im2col":
        passes.append(_codes_of_windows(s, ceilings))
    return Prediction(products, tuple(passes), "int8", ceilings.source)


def tuned_convolution(
    shape: Shape, recipe: Recipe, table: Table, dtype: str | Dtypes = "bfloat16", channels_last: bool = True, **gpu
) -> Prediction:
    """`convolution` of the times in a tuned table, each scaled by the work to this very size; X, W and dY of `dtype`.

    gpu: device, arch, processors and triton of the `dispatch.Problem`. Where only a step without dX was tuned, that of a
    network's first layer, it is that. Times are the GPU's, without gaps between launches. What no operator is asked for is
    left out: copies of W and dW where W is in channels_last memory.

    Raises:
        NotTuned: operators that the table does not have.   NotModelled: a layer or recipe that tuning does not cover.
    """
    s = shape
    try:
        ms = tuned_ms(operators(s, recipe, dtype, channels_last, **gpu), table)
    except NotTuned as e:
        if "dgrad" not in e.missing:
            raise
        try:
            ms = tuned_ms(operators(s, recipe, dtype, channels_last, first=True, **gpu), table)
        except NotTuned as first:
            raise min(e, first, key=lambda found: found.lacks) from None
    done = {name: size for name, size in s.products.items() if name in ms}
    ms["W"] = 0.0, ms["W"][1] + ms.pop("arranging W")[1]
    products = tuple(Product(name, size, *ms[name]) for name, size in done.items())
    passes = tuple(Pass(name, s.elements[name], size, ms[name][1]) for name, (size, _) in traffic(recipe).items())
    return Prediction(products, passes, "int8", "tuned")


def operators(
    s: Shape, recipe: Recipe, dtype: str | Dtypes, channels_last: bool, *, first: bool = False, **gpu
) -> dict[str, Problem]:
    """What a training step of a layer asks dispatch for, by the names of `Prediction`'s parts; and "arranging W".

    channels_last: of the memory of X, Y and their gradients.   first: dX is not needed. Raises NotModelled.
    """
    quantizers = (recipe.x, recipe.w, recipe.dgrad, recipe.wgrad)
    if s.geometry is None:
        raise NotModelled("convolutions that write their windows out are not tuned")
    if None in quantizers or any(q.householder for q in quantizers):
        raise NotModelled(f"recipe {recipe} does more than tuned kernels do")
    if {recipe.dgrad.rounding, recipe.wgrad.rounding} != {"stochastic"}:
        raise NotModelled(f"recipe {recipe} does not quantize dY by the kernel that tuning measures")
    if any(q.zero != "symmetric" for q in quantizers):
        raise NotModelled(f"recipe {recipe} has offsets, whose terms tuning does not measure")
    o, x, h = s.out_channels, recipe.x, recipe.wgrad
    calls = {name: s.call(name, channels_last) for name in s.products if not (first and name == "dgrad")}
    calls["X"] = s.quantization("X", channels_last, x.granularity, x.rounding, "both")
    of_dy = (h.granularity, h.rounding, "cols") if first else (recipe.dgrad.granularity, h.granularity)
    calls["dY"] = s.quantization("dY", channels_last, *of_dy)
    calls["arranging W"] = conv_problems.arranged(o, s.channels // s.groups, s.taps, s.groups)
    of = Dtypes.of(dtype)
    dtypes = {"X": of.x, "dY": of.dy}  # of the others' codes there is but one
    found = {
        name: Problem(call.op, *call.sizes, dtype=dtypes.get(name, of.x), **call.more, **gpu)
        for name, call in calls.items()
    }
    kind = f"{recipe.w.granularity} {recipe.w.rounding} rows"
    return found | {"W": Problem("quantize", o, s.elements["W"] // o, dtype=of.w, kind=kind, **gpu)}


def traffic(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(bytes per element, kernels) of quantizing X, W and dY, and of dX's inverse transform.

    An image is larger than what a program holds, so that X and dY are read for the statistics, and once more to write codes
    in the layouts of two products. An offset needs sums of the other operand's codes in wgrad. W is quantized as in a linear
    layer, then arranged for fprop and dgrad. A Householder transform is that of `fqt.cost.traffic` with the inverse apart,
    after dY was arranged by image.
    """
    g, h = recipe.dgrad, recipe.wgrad
    x = 2 * ELEMENT + 2 + (h.zero != "symmetric"), 3
    w, w_kernels = _quantization(recipe.w, layouts=1)
    sums = int(recipe.x.zero != "symmetric")
    inverse = {}
    if g.householder:
        dy = 2 * ELEMENT + 3 * ELEMENT + 1 + 1 + ELEMENT * g.auto + sums, 16 + 2 * g.auto
        inverse = {"dX": (4 + 4, 6)}
    elif {g.rounding, h.rounding} == {"stochastic"}:
        dy = 2 * ELEMENT + 2 + sums, 3
    else:
        dy = 2 * (2 * ELEMENT + 1) + sums, 6
    return {"X": x, "W": (w + 4, w_kernels + 4), "dY": dy} | inverse


def why_slower(prediction: Prediction) -> str:
    """What a layer that is predicted to lose, or was measured to, spends its time on."""
    p = prediction
    products, passes = sum(q.ms for q in p.products), sum(q.ms for q in p.passes)
    if p.source == "tuned":
        return f"{p.codes} products take {products:.3g} ms, quantizing {passes:.3g} ms"
    if products >= p.bf16_ms:
        return (
            f"its products alone take {products:.3g} ms in {p.codes}: too narrow, or too small groups, for full tiles"
        )
    saved = p.bf16_ms - products
    return f"{p.codes} products save {saved:.3g} ms, and quantizing moves {p.bytes / 1e6:.3g} MB, {passes:.3g} ms"


def _product(name: str, s: Shape, rate: float, ceilings: Ceilings) -> Product:
    m, n, k = size = s.products[name]
    full, waves, rounded = _filled(name, s, ceilings)
    first, second, result = (s.elements[operand] for operand in _OPERANDS[name])
    share = 1.0 if s.path == "1x1 GEMM" else IMPLICIT
    bf16 = 2e-9 * s.multiplications * _padding(s) / (ceilings.bf16_tflops * share * (waves if s.groups == 1 else 1.0))
    bf16_ms = max(bf16, _memory_ms(ELEMENT * (first + second + result), ceilings)) + _launch_ms(1, ceilings)
    if s.path == "1x1 GEMM" and (name != "wgrad" or k <= MAX_INT32_TERMS):  # more terms: the kernel of convolutions
        ms = product(name, size, rate, ceilings).ms
    elif s.path == "im2col" and name == "fprop":
        ms = product(name, (m, n, conv_problems.padded(k)), rate, ceilings).ms
    else:
        computing = 2e-9 * s.multiplications * rounded / (rate * IMPLICIT * full)
        ms = max(computing, _memory_ms(first + second + ELEMENT * result, ceilings))
        ms += _launch_ms(1 + (name == "wgrad"), ceilings)
    return Product(name, size, bf16_ms, ms)


def _padding(s: Shape) -> float:
    """What cuDNN's zeros in the channels multiply its operations by; its kernels of groups are taken to waste nothing."""
    if s.groups > 1:
        return 1.0
    return _up(s.channels, CUDNN_CHANNELS) * _up(s.out_channels, CUDNN_CHANNELS) / (s.channels * s.out_channels)


def _filled(name: str, s: Shape, ceilings: Ceilings) -> tuple[float, float, float]:
    """Of an implicit GEMM's time the share that goes into outputs, not into partial tiles and a partial wave, and that of
    whole waves, which cuDNN's is charged as well; and the blocks of K by the terms they hold."""
    if not ceilings.processors or not ceilings.arch:
        return 1.0, 1.0, 1.0
    m, n, k = s.products[name]
    choice = choose(name, s, ceilings.arch, ceilings.processors)
    if choice.backend == "reference":
        raise NotModelled(f"plain torch: {choice.reason}")
    block_m, block_n, block_k = choice.config[:3]
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n) * s.groups
    pieces, at_once = tiles * choice.split_k, ceilings.processors
    waves = pieces / (math.ceil(pieces / at_once) * at_once)
    parts = 1 if name == "wgrad" else s.taps  # each of its own blocks
    covered = m * n * s.groups / (tiles * block_m * block_n)
    return covered * waves, waves, parts * _up(math.ceil(k / parts), block_k) / k


def choose(name: str, s: Shape, arch: str, processors: int) -> Choice:
    """What dispatch gives an implicit GEMM on a GPU."""
    gpu = {"device": "cuda", "arch": arch, "processors": processors, "triton": triton_version()}
    return select(Problem("conv_wgrad" if name == "wgrad" else "conv", *s.products[name], kind=kind(name, s), **gpu))


def kind(name: str, s: Shape) -> str:
    """`dispatch.Problem.kind` of a product, of one without stride and dilation where the geometry is not known."""
    if s.geometry is not None:
        return s.call(name).kind
    words = [f"{count} {what}" for what, count in (("groups", s.groups), ("taps", s.taps)) if count > 1]
    few = conv_problems.few(s.images) if name == "wgrad" else ""
    return " ".join(filter(None, ["dgrad" * (name == "dgrad"), *words, few]))


def _codes_of_windows(s: Shape, ceilings: Ceilings) -> Pass:
    """im2col of codes: written, and read and written again where a row is padded."""
    terms = s.taps * s.channels
    elements = s.images * s.out_pixels * conv_problems.padded(terms)
    return _pass("im2col", elements, 1 if terms % ALIGNMENT == 0 else 3, 2, ceilings)


def _of_windows(s: Shape, recipe: Recipe, ceilings: Ceilings) -> Prediction:
    """A linear layer of the windows, written out in floating point."""
    m, n, k = s.products["fprop"]
    matrices = linear(m, n, k, recipe, ceilings)
    bf16 = [_product(name, s, ceilings.int8_tops, ceilings).bf16_ms for name in s.products]
    products = tuple(replace(p, bf16_ms=ms) for p, ms in zip(matrices.products, bf16, strict=True))
    windows = _pass("im2col", m * k, sum(WINDOWS), 3 + 2 * s.taps, ceilings)
    return replace(matrices, products=products, passes=(*matrices.passes, windows))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
