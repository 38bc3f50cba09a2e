"""What a quantized convolution is expected to gain over cuDNN's in bf16 and channels_last: `fqt.cost`'s roofline of its
three products, of N images, P output pixels each, C channels in, O out, T taps.

    fprop (N·P, O, T·C)      dgrad (N·pixels, C, T·O)      wgrad (O, C·T, N·P)

Each takes 2·N·P·O·T·C/groups operations at the rate of its path, or reads its operands and writes its result, whichever is
longer. An image is read once by a product, however many taps look at it. Besides, quantization moves the bytes of `traffic`.
dX is taken to be needed, W to be quantized once in a step. A prediction is no measurement: none of these constants is
measured, and it says where the ceilings come from.

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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

# Assumptions.
IMPLICIT = 0.65  # the share of a matrix product's rate that an implicit GEMM reaches, cuDNN's and fqt's alike
CUDNN_CHANNELS = 8  # to whose multiples cuDNN pads the channels of a convolution of one group
# Bytes an element of the windows costs where they are written out in floating point: stacked, and put in order (read and
# written); backward, their gradient put in order, and, tap by tap, put into zeros (written twice, read) and added (2 + 1).
WINDOWS = 3 * ELEMENT, 8 * ELEMENT
_MAX_INT32_TERMS = 131_071  # of `fqt.reference`, which imports torch
_ALIGNMENT = 16  # of `fqt.conv`


@dataclass(frozen=True)
class Shape:
    """A convolution of so many images. pixels: of an input image; out_pixels: of an output; taps: of the kernel.

    path: of `conv_products.PATHS`.   windows: im2col of values, not of codes, in forward and backward.
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
    """What a layer that is predicted to lose spends its time on."""
    p = prediction
    products, passes = sum(q.ms for q in p.products), sum(q.ms for q in p.passes)
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
    if s.path == "1x1 GEMM" and (name != "wgrad" or k <= _MAX_INT32_TERMS):  # more terms: the kernel of convolutions
        ms = product(name, size, rate, ceilings).ms
    elif s.path == "im2col" and name == "fprop":
        ms = product(name, (m, n, _up(k, _ALIGNMENT)), rate, ceilings).ms
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
    """`dispatch.Problem.kind` of a product."""
    counts = {"groups": s.groups, "taps": s.taps if name != "wgrad" else 1}
    return " ".join(f"{count} {what}" for what, count in counts.items() if count > 1)


def _codes_of_windows(s: Shape, ceilings: Ceilings) -> Pass:
    """im2col of codes: written, and read and written again where a row is padded."""
    terms = s.taps * s.channels
    elements = s.images * s.out_pixels * _up(terms, _ALIGNMENT)
    return _pass("im2col", elements, 1 if terms % _ALIGNMENT == 0 else 3, 2, ceilings)


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
