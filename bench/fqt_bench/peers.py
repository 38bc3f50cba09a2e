"""What a user would have in place of fqt's layers and products: torchao's layers; torch._int_mm with scales, compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

MOST_COMPILED = 64  # compilations of one function that are kept
# A layer that does not quantize is off by bfloat16's rounding alone, 0.0017 of the norm. int8: a row's largest value is some
# 3 to 5.5 standard deviations, so rounding to 1/127 of it costs 0.007 to 0.0125 of an operand's norm; two operands.
INT8_ERROR = (0.004, 0.05)
# e4m3 has 3 bits after the leading one: rounding errors are uniform within 2⁻⁴ of a value at most, 2⁻⁴/√3 of an operand's
# norm, and at least half of that; two operands, and 0.01 for sums that keep fewer bits than float32.
FP8_ERROR = (2.0**-4 / 6**0.5, 2.0**-4 * (2 / 3) ** 0.5 + 0.01)


class Layer(NamedTuple):
    """A layer of torchao's. convert(plain): one with the weight of an nn.Linear without bias. error: its least and its
    largest relative error in norm, of Y, dX and dW; less, and nothing was quantized. provider: of `providers.PROVIDERS`."""

    name: str
    tag: str
    provider: str
    error: tuple[float, float]
    convert: Callable[[nn.Linear], nn.Module]


def int8_mixed_precision(plain: nn.Linear) -> nn.Linear:
    """torchao's int8 mixed precision: all three products by its own quantization and kernel, `_dynamic_int8_mm`.

    torchao has two layers of it. With 0.16 to 0.18 and torch 2.11 to 2.13 the tensor subclass computes in bf16, being
    registered for an operator that is never called, and the module is not compiled (a graph break at the products). This
    one does as the module does, and is compiled as a whole. All layers are of one class: blocks of others compile anew.
    """
    from torchao.prototype.quantized_training.int8_mixed_precision import _dynamic_int8_mm as product

    return with_parameters(_int8_class(product), plain)


@functools.cache
def _int8_class(product: Callable[[Tensor, Tensor], Tensor]) -> type[nn.Linear]:
    """The class of layers with these products."""

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return product(x, w.T)

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            dw = product(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1])).T  # in torchao's order
            return product(dy, w), dw

    class Int8MixedPrecision(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = Products.apply(x, self.weight)
            return y if self.bias is None else y + self.bias

    return Int8MixedPrecision


def float8_rowwise(plain: nn.Linear) -> nn.Module:
    """torchao's float8 training with scales per row, all three products in e4m3."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(plain, config=Float8LinearConfig.from_recipe_name("rowwise"))


def with_parameters(kind: type[nn.Linear], plain: nn.Linear) -> nn.Linear:
    """A layer of that class with the parameters of another, themselves."""
    layer = kind(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
    layer.weight, layer.bias = plain.weight, plain.bias
    return layer


TORCHAO = (
    Layer("torchao int8 mixed precision", "torchao", "torchao", INT8_ERROR, int8_mixed_precision),
    Layer("torchao float8 row-wise", "torchao fp8", "torchao float8", FP8_ERROR, float8_rowwise),
)


def lacks(convert: Callable[[nn.Linear], nn.Module]) -> str:
    """Why the torchao that is installed cannot make this layer, "" where it can."""
    try:
        convert(nn.Linear(16, 16, bias=False, device="meta", dtype=torch.bfloat16))
    except Exception as error:  # another package's: whatever it raises
        return f"this torchao has no such layer: {type(error).__name__}: {error}"
    return ""


def int_mm_scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """(M, K) and (N, K) int8 with float32 scales (M,) and (N,): bf16 (M, N), to be compiled."""
    return (torch._int_mm(a, b.t()) * a_scale[:, None] * b_scale[None, :]).to(torch.bfloat16)


def compiled(function: Callable) -> Callable:
    """torch.compile. Where torch would stop compiling and go on eagerly, after 8 shapes of a function (all modules of
    torch.nn are one), this one goes on, and raises in the end."""
    import torch._dynamo  # not before it is wanted: it takes seconds

    torch._dynamo.config.recompile_limit = MOST_COMPILED
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Drop what was compiled: for a case that begins, since those before it need theirs no more."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
