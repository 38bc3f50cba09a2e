"""The kernels of a convolution one by one: quantization of X and dY against a copy, each product against cuDNN's.

What is timed is what `fqt.conv_products` launches, as a layer calls it. Bytes of a quantization are those that have to move:
2 read (of float32: 4) and 1 for each layout written, of an element; a second read is not counted. All codes are int8, those
of Gaussians.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fqt.nn
from fqt import candidates, conv_cost, conv_products, dispatch
from fqt.conv import Images
from fqt.gradients import DGRAD, WGRAD
from fqt.suites import Convolution

from . import convs
from .cases import BF16_BOUND
from .convs import RECIPES, Operands
from .harness import Candidate, Case, Wrong, check_equal, check_near
from .layers import dtype_name
from .operators import RNG, searching, work_dtype
from .providers import peer

QUANTIZE = "conv quantize"
PRODUCTS = ("fprop", "dgrad", "wgrad")


def title(product: str) -> str:
    """The kind of a product's case."""
    return f"conv {product}"


class Inputs(NamedTuple):
    """Of a case: the convolution, X and dY of each input set, and torch's own layer."""

    of: Convolution
    x: list[Tensor]
    dy: list[Tensor]
    plain: torch.nn.Conv2d

    @classmethod
    def make(cls, of: Convolution, device: torch.device, sets: int) -> Inputs:
        dtype = work_dtype(device)
        x, dy = convs.inputs(of, device, sets, dtype)
        return cls(of, [t.detach() for t in x], dy, convs.layer(of, device, dtype))

    def quantized(self, recipe: str) -> tuple[fqt.nn.Conv2d, Callable[[int], Operands]]:
        """A layer with the same weight, and the operands of its step on an input set, which are made once."""
        weight = self.plain.weight
        layer = convs.layer(self.of, weight.device, weight.dtype, recipe)
        with torch.no_grad():
            layer.weight.copy_(weight)
        rng = torch.tensor(RNG, device=weight.device)
        return layer, functools.cache(lambda i: convs.operands(layer, self.x[i], self.dy[i], rng))


# ---- quantization


def quantize(of: Convolution, device: torch.device, sets: int = 2) -> Case:
    """X in both layouts, and dY for dgrad and for wgrad, in GB/s, against a copy of X; X also in contiguous memory."""
    inputs = Inputs.make(of, device, sets)
    x, dy = inputs.x, inputs.dy
    target = torch.empty_like(x[0])
    copy = Candidate("copy_", lambda i: target.copy_(x[i]), lambda out, i: check_equal(out, x[i]), bytes=2.0 * x[0].nbytes,
                     **peer("torch", device), tag="copy")  # fmt: skip
    made = [copy]
    contiguous = [t.contiguous() for t in x]
    for recipe in RECIPES:
        layer, operands = inputs.quantized(recipe)
        check_x = functools.partial(_check_x, operands)
        bytes_of_x = float(x[0].nbytes + 2 * x[0].numel())
        made += [
            Candidate(f"X, {recipe}", _run_x(x, layer), check_x, bytes=bytes_of_x, tag=f"X {recipe}"),
            Candidate(f"X, {recipe}, NCHW", _run_x(contiguous, layer), check_x, bytes=bytes_of_x),
            Candidate(f"dY, {recipe}, both quantizations", _run_dy(dy, layer, operands),
                      functools.partial(_check_dy, operands), bytes=float(dy[0].nbytes + 2 * dy[0].numel()),
                      tag=f"gradient {recipe}"),
        ]  # fmt: skip
    return Case(QUANTIZE, convs.size(of), "GB/s", copy.name, tuple(made), sets)


def _run_x(x: list[Tensor], layer: fqt.nn.Conv2d) -> Callable[[int], Images]:
    r, groups = layer.recipe, layer.groups
    channels = conv_products.channels_of_x(layer.in_channels, groups)
    return lambda i: conv_products.quantized(x[i].flatten(2), r.x, groups=groups, channels=channels, cols=True,
                                             sums=r.w.zero != "symmetric")  # fmt: skip


def _run_dy(dy: list[Tensor], layer: fqt.nn.Conv2d, operands: Callable[[int], Operands]) -> Callable[[int], tuple]:
    """As `fqt.conv_ops.backward` does: by one kernel where there is one, else one after the other."""
    r, groups = layer.recipe, layer.groups
    random = {"rng": torch.tensor(RNG, device=dy[0].device), "rank": 0}

    def run(i: int) -> tuple[Images, Images]:
        o, images, affine = operands(i), dy[i].flatten(2), r.w.zero != "symmetric"
        both = conv_products.quantized_gradient(
            images, r, o.geometry, o.f.scale, o.x.scale, sums=affine, bias=False, **random
        )
        if both is not None:
            return both[:2]
        by_channel = o.f.scale[None] if o.b.scale is None else None
        by_image = o.x.scale[:, None] if o.x_scale is None else None
        quantized = functools.partial(conv_products.quantized, images, groups=groups, **random)
        return (
            quantized(r.dgrad, channels=conv_products.channels_of_dy(layer.out_channels, groups), stream=DGRAD,
                      multiplier=by_channel, sums=affine),
            quantized(r.wgrad, channels=layer.out_channels, stream=WGRAD, multiplier=by_image, rows=False, cols=True),
        )  # fmt: skip

    return run


def _check_x(operands: Callable[[int], Operands], out: Images, i: int) -> str:
    return _same(out, operands(i).x)


def _check_dy(operands: Callable[[int], Operands], out: tuple[Images, Images], i: int) -> str:
    for got, want in zip(out, (operands(i).g, operands(i).h), strict=True):
        _same(got, want)
    return "bit-equal"


def _same(got: Images, want: Images) -> str:
    for a, b, what in zip(got, want, Images._fields, strict=True):
        if (a is None) != (b is None):
            raise Wrong(f"{what}: {'missing' if a is None else 'not asked for'}")
        if a is not None:
            check_equal(a, b, what)
    return "bit-equal"


# ---- products


def product(name: str, of: Convolution, device: torch.device, sets: int = 2, *, kernels: bool | None = None) -> Case:
    """fprop, dgrad or wgrad of codes that are there, in TOPS, against cuDNN's product of the values.

    kernels: whether the implicit GEMM is run with each of its configurations as well; None: as the device has it.
    """
    inputs = Inputs.make(of, device, sets)
    dtype, work = inputs.plain.weight.dtype, 2.0 * of.multiplications
    terms = {"fprop": of.c * of.kernel**2, "dgrad": of.o * of.kernel**2, "wgrad": of.n * of.out_edge**2}[name]
    bound = BF16_BOUND if dtype == torch.bfloat16 else terms * 2.0**-24  # float32 sums of so many terms
    plain = Candidate(f"torch {name} {dtype_name(dtype)}", functools.partial(_searched, name, inputs),
                      lambda out, i: check_near(out, _torch(name, inputs, i, torch.float32), bound), work,
                      **peer("torch", device), tag="bf16")  # fmt: skip
    made = [plain]
    for recipe in RECIPES:
        layer, operands = inputs.quantized(recipe)

        def check(out: Tensor, i: int, operands: Callable[[int], Operands] = operands) -> str:
            return check_near(out, getattr(operands(i), name)(), bound)

        run = functools.partial(_product, name, layer, inputs, operands)
        made.append(Candidate(f"fqt {name}, {recipe}", run, check, work, tag=recipe))
        if recipe == "int8" and (device.type == "cuda" if kernels is None else kernels):
            made += [Candidate(f"implicit GEMM, {recipe}, {text}", run, check, work)
                           for text, run in _configured(name, of, device, dtype, operands)]  # fmt: skip
    return Case(title(name), convs.size(of), "TOPS", plain.name, tuple(made), sets)


def _torch(name: str, inputs: Inputs, i: int, dtype: torch.dtype | None = None) -> Tensor:
    """One product of torch's, of the values as they are or in another dtype."""
    layer = inputs.plain
    x, w, dy = (
        t.detach() if dtype is None else t.detach().to(dtype) for t in (inputs.x[i], layer.weight, inputs.dy[i])
    )
    if name == "fprop":
        return F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups,
        (name == "dgrad", name == "wgrad", False),
    )  # fmt: skip
    return dx if name == "dgrad" else dw


def _searched(name: str, inputs: Inputs, i: int) -> Tensor:
    with searching():
        return _torch(name, inputs, i)


def _product(name: str, layer: fqt.nn.Conv2d, inputs: Inputs, operands: Callable[[int], Operands], i: int) -> Tensor:
    o, dtype = operands(i), layer.weight.dtype
    if name == "fprop":
        return conv_products.product(o.x, o.f, o.geometry, None, dtype)
    if name == "dgrad":
        return conv_products.product(o.g, o.b, o.geometry, None, dtype, transposed=True)
    return conv_products.weight_gradient(inputs.dy[i].flatten(2), o.x, layer.recipe, o.geometry, dtype, o.h,
                                         rng=layer._fqt_rng)  # fmt: skip


def _configured(
    name: str, of: Convolution, device: torch.device, dtype: torch.dtype, operands: Callable[[int], Operands]
) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """(title, run) of each configuration in the table of the device, with the splits that dispatch has chosen; codes
    without offsets."""
    from fqt_kernels import conv, conv_wgrad

    m, n, k = convs.shape_of(of).products[name]
    op = "conv_wgrad" if name == "wgrad" else "conv"
    family = candidates.family(dispatch.problem(op, device, m, n, k, torch.float32)) or "sm80"
    splits = dispatch.choose(op, device, m, n, k, torch.float32, kind=conv_cost.kind(name, convs.shape_of(of))).split_k

    def run(i: int, config: tuple[int, ...]) -> Tensor:
        o = operands(i)
        options = {"out_dtype": dtype, "config": config}
        if name == "fprop":
            return conv.conv(o.x.rows, o.f.q, o.geometry, a_scale=o.x.scale, b_scale=o.f.scale, **options)
        if name == "dgrad":
            return conv.conv(
                o.g.rows, o.b.q, o.geometry, transposed=True, a_scale=o.g.scale, b_scale=o.b.scale, **options
            )
        return conv_wgrad.conv_wgrad(o.h.cols, o.x.cols, o.n, o.geometry, a_scale=o.h.scale, b_scale=o.x_scale,
                                     splits=splits, **options)  # fmt: skip

    for config in (conv_wgrad if name == "wgrad" else conv).CONFIGS[family]:
        block_m, block_n, block_k, warps, stages = config
        yield f"{block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages", functools.partial(run, config=config)
