"""How the operators of a convolution are put to dispatch: stated once, for those that launch, tune and predict them.

A geometry here is a `fqt.conv.Geometry`, or what has its fields; in a `dispatch.Problem` it is numbers, of which no part is
in the key of a tuned table: (images, channels that a group contracts, then size, out, kernel, stride, padding and dilation,
pairs, and groups) of a product, (images, channels of a pixel's codes) of a quantization.

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .dispatch import Problem

PRODUCTS = ("conv", "conv_wgrad")
QUANTIZATIONS = ("quantize_images", "quantize_gradient_images")
ARRANGED = "arrange_filters"
# How a product is computed, by the kernel's name in a `dispatch.Choice`, and as reports call it.
PATHS = {"implicit": "implicit GEMM", "pointwise": "1x1 GEMM", "im2col": "im2col"}
ALIGNMENT = 16  # codes, as `fqt.conv` has it
MAX_INT32_TERMS = 131_071  # as `fqt.reference` has it
_COUNT, _PAIR = r"[1-9]\d{0,8}", r"[1-9]\d{0,4}x[1-9]\d{0,4}"
_IMAGES = rf"(pixels_last )?({_COUNT} images )?"
_GRANULARITY = "per_(tensor|row|column) "
_WHERE = rf"({_COUNT} groups )?({_COUNT} taps )?({_PAIR} stride )?({_PAIR} dilation )?"
# What `Problem.kind` may be, with a blank behind it.
GRAMMAR = {
    "conv": rf"(dgrad )?{_WHERE}(contiguous )?",
    "conv_wgrad": rf"{_WHERE}({_COUNT} images )?",
    "quantize_images": rf"{_GRANULARITY}(nearest|stochastic) (rows|cols|both) {_IMAGES}",
    "quantize_gradient_images": rf"{_GRANULARITY}{_GRANULARITY}{_IMAGES}",
    ARRANGED: rf"({_COUNT} groups )?({_COUNT} taps )?",
}


_kept = functools.lru_cache(maxsize=4096)  # operators ask several times for each layer and step


class Call(NamedTuple):
    """What `dispatch.choose` is asked, but for device and dtype."""

    op: str
    m: int
    n: int
    k: int
    kind: str
    geometry: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.m, self.n, self.k

    @property
    def more(self) -> dict[str, Any]:
        return {"kind": self.kind, "geometry": self.geometry}


@_kept
def product(
    geometry, images: int, rows: int, channels: int, stored: int, transposed: bool, channels_last: bool = True
) -> Call:
    """fprop or, transposed, dgrad: to so many rows of all groups, from so many of a group, `stored` with padding."""
    g = geometry
    size = g.size if transposed else g.out
    kind = _words("dgrad" * transposed, *_where(g), "" if channels_last else "contiguous")
    sizes = images * size[0] * size[1], rows // g.groups, g.kernel[0] * g.kernel[1] * stored
    return Call("conv", *sizes, kind, (images, channels, *numbers(g)))


@_kept
def wgrad(geometry, images: int, rows: int, channels: int, stored: int) -> Call:
    """dW of so many rows and channels of a group, from codes of so many images, `stored` with padding."""
    g = geometry
    taps, pixels = g.kernel[0] * g.kernel[1], g.out[0] * g.out[1]
    sizes = rows, channels * taps, pixels * stored
    return Call("conv_wgrad", *sizes, _words(*_where(g), few(images)), (images, channels, *numbers(g)))


@_kept
def quantization(
    images: int,
    channels: int,
    pixels: int,
    stored: int,
    pixels_last: bool,
    granularity: str,
    rounding: str,
    layout: str,
) -> Call:
    """Of images (N, C, P) of any memory; stored: channels of a pixel's codes. layout: "rows", "cols" or "both"."""
    kind = _words(granularity, rounding, layout, "pixels_last" * pixels_last, few(images))
    return Call("quantize_images", images * pixels, channels, 0, kind, (images, stored))


@_kept
def gradient(
    images: int, channels: int, pixels: int, stored: int, pixels_last: bool, for_dgrad: str, for_wgrad: str
) -> Call:
    """Both quantizations of dY (N, O, P), by their granularities."""
    kind = _words(for_dgrad, for_wgrad, "pixels_last" * pixels_last, few(images))
    return Call("quantize_gradient_images", images * pixels, channels, 0, kind, (images, stored))


@_kept
def arranged(rows: int, channels: int, taps: int, groups: int) -> Call:
    """The codes of W (rows, channels of a group, taps) put in order for fprop and dgrad (`fqt.conv.filters`)."""
    kind = _words(_of(groups, "groups"), _of(taps, "taps"))
    return Call(ARRANGED, rows, channels, taps, kind, ())


def padded(n: int) -> int:
    """Up to a multiple of 16."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def has_pixels_last(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether neighbours in the memory of images (N, C, P) are pixels rather than channels."""
    return shape[2] > 1 and (shape[1] == 1 or stride[2] < stride[1])


def count(kind: str, what: str) -> int:
    """How many "groups", "taps" or "images" a kind says there are, 1 where it says nothing."""
    words = kind.split()
    return int(words[words.index(what) - 1]) if what in words else 1


def path(geometry, channels: int) -> str:
    """How the kernels compute fprop of images with so many channels, a name of PATHS; dgrad and wgrad have no im2col."""
    if is_pointwise(geometry):
        return "pointwise"
    return "im2col" if geometry.groups == 1 and channels < ALIGNMENT else "implicit"


def path_of(problem) -> str:
    """That of a product's problem; "implicit" where its geometry is not known, or where wgrad sums more than int32 holds."""
    if not problem.geometry or not problem.plain or problem.k > MAX_INT32_TERMS:
        return "implicit"
    found = path(Numbers.of(problem), problem.geometry[1])
    return "implicit" if found == "im2col" and (problem.op == "conv_wgrad" or "dgrad" in problem.kind) else found


def of_matrices(path: str, m: int, n: int, k: int) -> tuple[int, int, int]:
    """The product of matrices that one of these sizes is ("pointwise"), or is made ("im2col")."""
    return m, n, padded(k) if path == "im2col" else k


def part(problem: Problem) -> Problem | None:
    """The product of matrices that one of a convolution may be computed as; None where it is none."""
    if problem.op not in PRODUCTS or (way := path_of(problem)) == "implicit":
        return None
    m, n, k = of_matrices(way, problem.m, problem.n, problem.k)
    return replace(problem, op="scaled_mm", m=m, n=n, k=k, kind="", geometry=())


def is_pointwise(g) -> bool:
    """Whether every product is that of two matrices: 1x1 without stride, padding and groups."""
    return g.kernel == g.stride == (1, 1) and g.padding == (0, 0) and g.out == g.size and g.groups == 1


def numbers(g) -> tuple[int, ...]:
    """A geometry as numbers; `Numbers.of` is the way back."""
    return (*g.size, *g.out, *g.kernel, *g.stride, *g.padding, *g.dilation, g.groups)


class Numbers(NamedTuple):
    """The fields of a `fqt.conv.Geometry`."""

    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, problem) -> Numbers:
        """Of a product's problem. Raises ValueError where it was posed without a geometry."""
        _, _, *flat = problem.geometry or (0, 0)
        if len(flat) != 13:
            raise ValueError(f"the geometry of the convolution is not known: {problem}")
        return cls(*zip(flat[:-1:2], flat[1:-1:2], strict=True), flat[-1])


def few(images: int) -> str:
    """Fewer images than codes that are loaded at once, which are padded differently."""
    return f"{images} images" if images < ALIGNMENT else ""


def _where(g) -> tuple[str, ...]:
    return (_of(g.groups, "groups"), _of(g.kernel[0] * g.kernel[1], "taps"), _pair(g.stride, "stride"),
            _pair(g.dilation, "dilation"))  # fmt: skip


def _of(number: int, what: str) -> str:
    return f"{number} {what}" if number > 1 else ""


def _pair(pair: tuple[int, int], what: str) -> str:
    return "" if tuple(pair) == (1, 1) else f"{pair[0]}x{pair[1]} {what}"


def _words(*words: str) -> str:
    return " ".join(filter(None, words))
