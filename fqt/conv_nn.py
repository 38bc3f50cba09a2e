"""Quantized convolutions: subclasses of torch's own, as `fqt.nn.Linear` is."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import conv_ops, conv_products, ops
from .conv import Geometry
from .conv_ops import FilterCodes
from .dispatch import Choice, problem, select
from .layer import QuantizedLayer
from .qtensor import QTensor
from .recipe import Recipe

SAMPLES = ("image", "row")


# ---- of a convolution of torch's, or one of these


def paddings(c: _ConvNd) -> list[tuple[int, int]]:
    """(before, after) of each dimension."""
    if c.padding == "valid":
        return [(0, 0)] * len(c.kernel_size)
    if c.padding == "same":
        spans = [d * (k - 1) for k, d in zip(c.kernel_size, c.dilation, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in c.padding]


def outputs(c: _ConvNd, size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the output of images of this size, in as many dimensions as the convolution has.

    Raises:
        ValueError: the kernel is larger than the padded image.
    """
    spans = [d * (k - 1) + 1 for k, d in zip(c.kernel_size, c.dilation, strict=True)]
    padded = [n + sum(p) for n, p in zip(size, paddings(c), strict=True)]
    if any(span > n for span, n in zip(spans, padded, strict=True)):
        raise ValueError(f"a kernel that spans {tuple(spans)} is larger than the padded image, {tuple(padded)}")
    return tuple((n - span) // s + 1 for n, span, s in zip(padded, spans, c.stride, strict=True))


def geometry(c: _ConvNd, size: tuple[int, ...]) -> Geometry:
    """That of images of this size, (length,) of a Conv1d, which makes a height of 1, or (height, width) of a Conv2d."""
    lead = (1,) * (2 - len(size))
    before = (*(0 for _ in lead), *(p[0] for p in paddings(c)))
    pairs = ((*lead, *pair) for pair in (size, outputs(c, size), c.kernel_size, c.stride))
    return Geometry(*pairs, before, (*lead, *c.dilation), c.groups)


def sample_of(c: _ConvNd) -> str:
    """The sample of a quantized convolution, or that which one of torch's will have."""
    return c.sample if isinstance(c, _Convolution) else QUANTIZED[type(c)].samples[0]


def kernel_path(c: _ConvNd, sample: str) -> str:
    """How fprop is computed where there are kernels, one of `conv_products.PATHS`."""
    if sample == "row":
        return "im2col"
    smallest = tuple(d * (k - 1) + 1 for k, d in zip(c.kernel_size, c.dilation, strict=True))
    return conv_products.path(geometry(c, smallest), c.in_channels)


def reason_against(c: _ConvNd, recipe: Recipe, sample: str) -> str | None:
    """Why a convolution cannot compute by a recipe with these samples, None if it can."""
    if recipe.is_exact:
        return None
    if c.padding_mode != "zeros":
        return f"padding_mode {c.padding_mode!r}: quantized images are padded with zeros only"
    if c.groups > 1 and sample == "row":
        return f"groups={c.groups}: im2col, which this convolution goes through, makes one matrix product of one group"
    return conv_ops.reason_against(recipe)


class _Convolution(QuantizedLayer):
    """What the convolutions of any number of dimensions share."""

    samples: ClassVar[tuple[str, ...]] = SAMPLES  # that the class can have, the first by default

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1, groups: int = 1,
                 bias: bool = True, padding_mode: str = "zeros", device=None, dtype=None, *, recipe: str | Recipe = "int8",
                 sample: str | None = None, fuse_grad_accumulation: bool = False) -> None:  # fmt: skip
        recipe = Recipe.parse(recipe)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._fqt_sample = self._checked_sample(self.samples[0] if sample is None else sample, recipe)
        self._build(recipe, fuse_grad_accumulation)

    def _become_quantized(self, recipe: Recipe, name: str, key_name: str) -> None:
        self.__dict__.setdefault("_fqt_sample", self.samples[0])
        super()._become_quantized(recipe, name, key_name)

    @property
    def sample(self) -> str:
        """What shares a scale per row: "image" or "row" (an output pixel's window). Assign to change it."""
        return self._fqt_sample

    @sample.setter
    def sample(self, value: str) -> None:
        self._fqt_sample = self._checked_sample(value, self._fqt_recipe)
        self._fqt_cache = None  # whose codes may lie otherwise

    def _checked_sample(self, value: str, recipe: Recipe) -> str:
        if value not in self.samples:
            raise ValueError(f"{self.label}: sample must be one of {', '.join(self.samples)}, got {value!r}")
        if reason := reason_against(self, recipe, value):
            raise ValueError(f"{self.label}: {reason}")
        return value

    def _reason_against(self, recipe: Recipe) -> str | None:
        return reason_against(self, recipe, self._fqt_sample)

    # ---- forward

    def forward(self, input: Tensor) -> Tensor:
        if self._fqt_recipe.is_exact:
            return super().forward(input)
        out_dtype = self._check(input)
        batched = input.dim() == len(self.kernel_size) + 2
        x = input if batched else input[None]
        if self._fqt_sample == "row":
            y = self._by_windows(x, out_dtype)
        elif len(self.kernel_size) == 1:
            y = self._by_images(x[:, :, None], geometry(self, tuple(x.shape[2:])), out_dtype).squeeze(2)
        else:
            y = self._by_images(x, geometry(self, tuple(x.shape[2:])), out_dtype)
        return y if batched else y[0]

    def _by_images(self, x: Tensor, of: Geometry, out_dtype: torch.dtype) -> Tensor:
        """Y (N, O, P, Q) of X (N, C, H, W)."""
        weight, training = _filters(self.weight), torch.is_grad_enabled()
        w = self._quantized_weight(transposed=training and x.requires_grad)
        channels_last = len(self.kernel_size) == 2 and any(map(conv_ops.is_channels_last, (x, weight)))
        return conv_ops.conv2d(
            x, weight, self.bias, w, self._fqt_rng, self._fqt_spec, out_dtype, training and self.weight.requires_grad,
            conv_ops.flat(of), channels_last, self.fuse_grad_accumulation and not torch.compiler.is_compiling(),
        )  # fmt: skip

    def _by_windows(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Y of X (N, C, *size) as one matrix product of the windows of all output pixels, rows of C·taps."""
        out = outputs(self, tuple(x.shape[2:]))
        padded = F.pad(x, [p for pair in reversed(paddings(self)) for p in pair])
        taps = [
            padded[(..., *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in
                           zip(tap, self.dilation, out, self.stride, strict=True)))]
            for tap in itertools.product(*map(range, self.kernel_size))
        ]  # fmt: skip
        windows = torch.stack(taps, 2).movedim((1, 2), (-2, -1))  # (N, *out, C, taps)
        rows = windows.reshape(-1, self.weight[0].numel())
        training = torch.is_grad_enabled()
        w = self._quantized_weight(transposed=training and x.requires_grad)
        y = ops.linear(
            rows, self.weight.flatten(1), self.bias, w.q, w.qt, w.scale, w.offset, w.row_sum, w.col_sum, self._fqt_rng,
            self._fqt_spec, out_dtype, training and self.weight.requires_grad,
        )[0]  # fmt: skip
        y = y.view(len(x), *out, self.out_channels).movedim(-1, 1)
        return y.contiguous(memory_format=_memory_format(x, self.weight))

    def _check_shape(self, x: Tensor) -> None:
        n = len(self.kernel_size)
        if x.dim() not in (n + 1, n + 2) or x.shape[-n - 1] != self.in_channels:
            image = f"{self.in_channels}, {', '.join(('D', 'H', 'W')[-n:] if n > 1 else 'L')}"
            raise ValueError(f"{self.label}: expected input (N, {image}) or ({image}), got {tuple(x.shape)}")
        if 0 in x.shape[-n:]:
            raise ValueError(f"{self.label}: an image has no pixels in an input of shape {tuple(x.shape)}")
        try:
            outputs(self, tuple(x.shape[-n:]))
        except ValueError as e:
            raise ValueError(f"{self.label}: {e}") from None

    def _would_choose(self, x: Tensor) -> Choice:
        sizes = 128, 128, self.weight[0].numel()
        return select(problem("scaled_mm" if self._fqt_sample == "row" else "conv", x.device, *sizes, x.dtype))

    # ---- the weight's codes

    def _quantize(self, w: Tensor, transposed: bool) -> FilterCodes | QTensor:
        if self._fqt_sample == "row":
            return ops.quantize_weight(w.flatten(1), self._fqt_recipe, transposed)
        filters = _filters(w)
        any_size = Geometry((0, 0), (0, 0), tuple(filters.shape[2:]), groups=self.groups)
        return conv_ops.quantize_filters(filters, self._fqt_recipe, conv_ops.flat(any_size), transposed)

    def computed_weight(self) -> Tensor:
        codes: Any = self._quantized_weight(transposed=False)
        if isinstance(codes, QTensor):
            return codes.dequantize().view(self.weight.shape)
        by_channel = (-1, 1, 1)
        q = codes.f[..., : self.weight.shape[1]].transpose(1, 2).to(codes.scale.dtype) * codes.scale.view(by_channel)
        q = q if codes.offset is None else q + codes.offset.view(by_channel)
        return q.reshape(self.weight.shape)

    # ---- text

    @property
    def label(self) -> str:
        name = self.__dict__.get("_fqt_name") or f"fqt.nn.{type(self).__name__}"
        return f"{name} ({self.in_channels} → {self.out_channels}, {'×'.join(map(str, self.kernel_size))})"

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", sample={self._fqt_sample}" if self._fqt_sample != self.samples[0] else "")


class Conv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` as `fqt.nn.Conv2d` is of torch's: its images have a height of 1.

    A gradient is never accumulated by the kernel: it passes through a view of the weight.
    """

    plain_class = nn.Conv1d


class Conv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` whose three products run on quantized operands, as its recipe says.

    Built directly, or made of an `nn.Conv2d` in place by `fqt.quantize_`. All that `fqt.nn.Linear` says of parameters,
    names, state_dict, random streams, the weight's codes and what is kept for backward holds here as well. The codes of a
    weight have a scale for each output channel where the recipe has one for each row.

    Input (N, C, H, W) or (C, H, W) of any strides; output in channels_last memory where the input or the weight is, and in
    the dtype that `nn.Conv2d` gives. Padding with zeros is exact for every quantizer.

    Args:
        recipe: a name such as "psq5" or a `fqt.Recipe` of integer codes and exact ranges.
        sample: what shares a scale where the recipe has one per row: "image", all elements of one, which runs as an
            implicit GEMM; or "row", the window of one output pixel: the windows are written out in the dtype of the input,
            taps times its size, and multiplied as in a linear layer (groups = 1 only).
        fuse_grad_accumulation: see `fqt.nn.Linear`; for weights in contiguous memory and sample "image".
        The other arguments are those of `nn.Conv2d`.

    Raises:
        ValueError: a recipe, padding_mode or groups that quantized products are not made for (construction and assignment
        of recipe or sample). In forward, a wrong number of dimensions or channels, a kernel larger than the padded image,
        or another device than the weight's.
        TypeError (forward): an input that is not floating point, or of another dtype than the weight.
        RuntimeError (backward): a second derivative is asked for.

    Source: StatQuant (arXiv 2010.14298), whose published code takes an image as a sample.
    """

    plain_class = nn.Conv2d


class Conv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` as `fqt.nn.Conv2d` with sample "row" is of torch's; groups = 1 only."""

    plain_class = nn.Conv3d
    samples = ("row",)


QUANTIZED = {c.plain_class: c for c in (Conv1d, Conv2d, Conv3d)}


def _filters(weight: Tensor) -> Tensor:
    """The weight as (O, C/groups, R, S)."""
    return weight[:, :, None] if weight.dim() == 3 else weight


def _memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of a convolution's output, by torch's rule."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and any(not t.is_contiguous() and t.is_contiguous(memory_format=last) for t in (x, weight)):
        return last
    return torch.contiguous_format
