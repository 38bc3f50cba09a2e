"""What tuning measures of convolutions: their products and quantizations, as `conv_products` launches them.

Codes are those of Gaussians by recipe int8, whose scales are folded into dY. Every output is compared with `fqt.conv`.
Beside a product cuDNN's of the Gaussians is timed, in bfloat16 and channels_last memory, by its fastest algorithm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv, conv_problems, conv_products, dispatch, reference, tuner_cases
from .candidates import Candidate
from .conv import Filters, Geometry, Images
from .conv_problems import Numbers
from .dispatch import Choice, Problem
from .recipe import Quantizer, Recipe

Made = list[tuple[Any, Callable[[int], Any]]]  # harness candidates, and what the outputs of each should be


def made(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int, exact: bool
) -> tuple[Made, Callable[..., Any]]:
    """The harness candidates of a problem, each with its expected outputs, and what makes cuDNN's of a product."""
    if problem.op in conv_problems.PRODUCTS:
        inputs = _Inputs.of(problem, device, sets)
        make = _product(problem, candidates, inputs, exact)
        return list(make), lambda problem, made, device, sets: _bf16(inputs, made)
    makes = {"quantize_images": _quantization, "quantize_gradient_images": _gradient}
    return list(makes.get(problem.op, _arrangement)(problem, candidates, device, sets)), lambda *_: None


# ---- products


class _Inputs(NamedTuple):
    """Of a product: the geometry, images, channels of all groups, and which two of "x", "w" and "dy" it reads."""

    geometry: Geometry
    n: int
    channels: int
    out_channels: int
    names: tuple[str, str]
    device: torch.device
    sets: int

    @classmethod
    def of(cls, problem: Problem, device: torch.device, sets: int) -> _Inputs:
        g = Geometry(*Numbers.of(problem))
        n, contracted, *_ = problem.geometry
        if problem.op == "conv_wgrad":
            c, o, names = contracted, problem.m, ("x", "dy")
        elif "dgrad" in problem.kind:
            c, o, names = problem.n, contracted, ("w", "dy")
        else:
            c, o, names = contracted, problem.n, ("x", "w")
        return cls(g, n, c * g.groups, o * g.groups, names, device, sets)

    def values(self) -> list[dict[str, Tensor]]:
        """Gaussian X (N, C, H, W), W (O, C/groups, R, S) and dY (N, O, P, Q) of each set, in channels_last memory and
        bfloat16 (in the interpreter float32); of what the product does not read nothing is written."""
        from fqt_bench.cases import gaussian
        from fqt_bench.operators import work_dtype

        dtype, g, n, c, o = work_dtype(self.device), self.geometry, self.n, self.channels, self.out_channels
        shapes = {"x": (n, *g.size, c), "w": (o, *g.kernel, c // g.groups), "dy": (n, *g.out, o)}

        def made(name: str, seed: int) -> Tensor:
            if name in self.names:
                return gaussian(*shapes[name], device=self.device, seed=seed, dtype=dtype).permute(0, 3, 1, 2)
            return torch.empty(shapes[name], dtype=dtype, device=self.device).permute(0, 3, 1, 2)

        return [{name: made(name, 3 * i + place) for place, name in enumerate(shapes)} for i in range(self.sets)]


def _product(
    problem: Problem, candidates: tuple[Candidate, ...], inputs: _Inputs, exact: bool
) -> Iterator[tuple[Any, Callable[[int], Tensor]]]:
    from fqt_bench.harness import check_rounded

    g, n = inputs.geometry, inputs.n
    transposed, last = "dgrad" in problem.kind, "contiguous" not in problem.kind
    make = _operands if exact else _any_operands
    if problem.op == "conv_wgrad":
        pairs = make(inputs, "h", "x")

        def launch(i: int, choice: Choice) -> Tensor:
            return conv_products.weight_product(*pairs[i], None, g, n, torch.bfloat16, choice=choice)

        def want(i: int) -> Tensor:
            shape = inputs.out_channels, inputs.channels // g.groups, *g.kernel
            return conv.wgrad(*pairs[i], None, g, n).view(shape)
    else:
        pairs = make(inputs, "g", "back") if transposed else make(inputs, "x", "filters")

        def launch(i: int, choice: Choice) -> Tensor:
            return conv_products.product(
                *pairs[i], g, None, torch.bfloat16, transposed=transposed, channels_last=last, choice=choice
            )

        def want(i: int) -> Tensor:
            return conv.product(*pairs[i], g, transposed=transposed).unflatten(2, g.size if transposed else g.out)

    expected = functools.cache(want)
    for kernel, config, split in candidates:
        choice = Choice("triton", config, "", kernel, split)

        def run(i: int, choice: Choice = choice) -> Tensor:
            with dispatch.backend(problem.force):  # of the product of matrices that may be part of it
                return launch(i, choice)

        def check(out: Tensor, i: int) -> str:
            return check_rounded(out, expected(i))

        yield tuner_cases.ours(Candidate(kernel, config, split), run, check, "int"), expected


def _operands(inputs: _Inputs, first: str, second: str) -> list[tuple[Any, Any]]:
    """Both operands of a product for each set, of those that `_codes` makes."""
    return [tuple(_codes(inputs, name, **values) for name in (first, second)) for values in inputs.values()]


def _codes(inputs: _Inputs, name: str, x: Tensor, w: Tensor, dy: Tensor) -> Images | Filters:
    """X for fprop and wgrad, W for fprop ("filters") and for dgrad ("back"), dY for dgrad ("g") and for wgrad ("h")."""
    g, recipe, rng = inputs.geometry, Recipe.int8(), tuner_cases.rng_of(w.device)
    stored = conv_products.channels_of_x(inputs.channels, g.groups)
    if name == "x":
        cols = inputs.names == ("x", "dy")
        return conv.quantize(x.flatten(2), recipe.x, groups=g.groups, channels=stored, rows=not cols, cols=cols)
    if name == "h":
        scale = _codes(inputs, "x", x, w, dy).scale[:, None]
        return conv.quantize(dy.flatten(2), recipe.wgrad, multiplier=scale, rng=rng, rows=False, cols=True)
    codes = reference.quantize(w.flatten(1), recipe.w)
    scale = codes.scale.flatten()
    if name == "g":
        stored = conv_products.channels_of_dy(inputs.out_channels, g.groups)
        return conv.quantize(
            dy.flatten(2), recipe.dgrad, groups=g.groups, channels=stored, multiplier=scale[None], rng=rng
        )
    forward, back = conv.filters(codes.q.view(w.shape), g, stored)
    if name == "filters":
        return Filters(forward, scale, None, None, w.shape[1])
    return Filters(back, None, None, None, len(w) // g.groups)


def _any_operands(inputs: _Inputs, first: str, second: str) -> list[tuple[Any, Any]]:
    """As `_operands` makes them, of any codes and of scales of 1: a byte each to make, where processes share a GPU."""
    _, n, c, o, names, device, sets = inputs
    g, one = inputs.geometry, torch.ones(1, device=device)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 120, shape, dtype=torch.int8, device=device)

    def made(name: str) -> Images | Filters:
        if name in ("filters", "back"):
            arranged = conv.filters(codes(o, c // g.groups, *g.kernel), g, conv_products.channels_of_x(c, g.groups))
            q, channels = (arranged[0], c) if name == "filters" else (arranged[1], o)
            return Filters(q, one, None, None, channels // g.groups)
        pixels, channels = (g.pixels, c) if name == "x" else (g.out_pixels, o)
        if names == ("x", "dy"):
            return Images(None, codes(channels, pixels, conv.padded_images(n)), one, None)
        stored = (conv_products.channels_of_x if name == "x" else conv_products.channels_of_dy)(channels, g.groups)
        return Images(codes(n, pixels, stored), None, one, None)

    return [(made(first), made(second)) for _ in range(sets)]


def _bf16(inputs: _Inputs, made: Made):
    """cuDNN's product of the Gaussians that the codes are of."""
    from fqt_bench.harness import Candidate as Timed
    from fqt_bench.harness import check_near
    from fqt_bench.operators import searching

    g, values = inputs.geometry, inputs.values()
    padding, before = _padding(g)
    if before is not None:
        for each in values:
            each["x"] = conv.pad(each["x"], before).contiguous(memory_format=torch.channels_last)

    def run(i: int) -> Tensor:
        x, w, dy = values[i].values()
        with searching():
            if inputs.names == ("x", "w"):
                return F.conv2d(x, w, None, g.stride, padding, g.dilation, g.groups)
            wanted = [name not in inputs.names for name in ("x", "w")]
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dy, x, w, None, g.stride, padding, g.dilation, False, (0, 0), g.groups, (*wanted, False)
            )
            return dx if wanted[0] else dw

    def check(out: Tensor, i: int) -> str:
        if before is not None and inputs.names == ("w", "dy"):
            out = conv.of_images(out, g)
        return check_near(out, made[0][1](i), tuner_cases.LOSSY) if made else ""

    return Timed(tuner_cases.BF16, run, check, provider="torch")


def _padding(g: Geometry) -> tuple[tuple[int, int], tuple[int, ...] | None]:
    """What cuDNN pads images by; and, where that does not give the geometry's outputs, by how much they are padded ahead of
    it, as `conv.pad` takes it."""
    padded = [size + 2 * pad for size, pad in zip(g.size, g.padding, strict=True)]
    spans = [d * (k - 1) + 1 for k, d in zip(g.kernel, g.dilation, strict=True)]
    out = tuple((size - span) // s + 1 for size, span, s in zip(padded, spans, g.stride, strict=True))
    if out == tuple(g.out):
        return g.padding, None
    ends = [(p - 1) * s + span - before - size
            for p, s, span, before, size in zip(g.out, g.stride, spans, g.padding, g.size, strict=True)]  # fmt: skip
    return (0, 0), (g.padding[1], ends[1], g.padding[0], ends[0])


# ---- quantizations


def _quantization(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int
) -> Iterator[tuple[Any, Callable[[int], tuple]]]:
    from fqt_kernels.conv_quantize import quantize_images

    granularity, rounding, layout, *_ = problem.kind.split()
    z = tuner_cases.quantizer_of(granularity, problem.format, rounding)
    x, rng = _images(problem, device, sets), tuner_cases.rng_of(device)
    more = dict(channels=problem.geometry[1], rows=layout != "cols", cols=layout != "rows",
                rng=rng if rounding == "stochastic" else None)  # fmt: skip
    expected = functools.cache(lambda i: tuple(_exactly(x[i], z, **more)))
    for candidate in candidates:

        def run(i: int, tile: tuple[int, ...] = candidate.config) -> tuple[Tensor | None, ...]:
            return quantize_images(x[i], bits=8, granularity=granularity, zero=z.zero, tile=tile, **more)

        yield tuner_cases.ours(candidate, run, lambda out, i: tuner_cases.same(out, expected(i))), expected


def _gradient(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int
) -> Iterator[tuple[Any, Callable[[int], tuple]]]:
    """Both quantizations of dY; scales of X and W are folded into it where its channels have scales, as recipe int8 does."""
    from fqt_bench.cases import gaussian
    from fqt_kernels.conv_quantize import quantize_gradient_images
    from fqt_kernels.gradient import Side

    g, h = (tuner_cases.quantizer_of(word, problem.format, "stochastic") for word in problem.kind.split()[:2])
    (n, channels), folded = problem.geometry, h.granularity == "per_column"
    dy, rng = _images(problem, device, sets), tuner_cases.rng_of(device)
    row_mul = gaussian(n, device=device, seed=98).float() if folded else None
    col_mul = gaussian(problem.n, device=device, seed=97).float() if folded else None

    def want(i: int) -> tuple[Tensor | None, ...]:
        a = _exactly(dy[i], g, channels=channels, multiplier=col_mul[None] if folded else None, rng=rng)
        b = _exactly(
            dy[i], h, multiplier=row_mul[:, None] if folded else None, rng=rng, stream=1, rows=False, cols=True
        )
        return a.rows, a.scale, a.offset, b.cols, b.scale, b.offset

    expected = functools.cache(want)
    for candidate in candidates:

        def run(i: int, tile: tuple[int, ...] = candidate.config) -> tuple[Tensor | None, ...]:
            (rows, *of_g, _), cols, _ = quantize_gradient_images(
                dy[i], *(Side(8, z.granularity, z.zero) for z in (g, h)), row_mul=row_mul, col_mul=col_mul, rng=rng,
                streams=(0, 1), channels=channels, tile=tile,
            )  # fmt: skip
            return rows, *of_g, *cols

        yield tuner_cases.ours(candidate, run, lambda out, i: tuner_cases.same(out, expected(i))), expected


def _images(problem: Problem, device: torch.device, sets: int) -> list[Tensor]:
    """Gaussian (N, C, P) of the problem's memory."""
    from fqt_bench.cases import gaussian

    n, c = problem.geometry[0], problem.n
    p, dtype = problem.m // n, getattr(torch, problem.dtype)
    if "pixels_last" in problem.kind:
        return [gaussian(n, c, p, device=device, seed=i, dtype=dtype) for i in range(sets)]
    return [gaussian(n, p, c, device=device, seed=i, dtype=dtype).transpose(1, 2) for i in range(sets)]


def _exactly(
    x: Tensor, z: Quantizer, *, channels: int = 0, multiplier: Tensor | None = None, rng: Tensor | None = None,
    stream: int = 0, rows: bool = True, cols: bool = False
) -> Images:  # fmt: skip
    """`fqt.conv.quantize` with parameters from the CPU (see `fqt_bench.cases`)."""
    n, c, p = x.shape
    y = x.float() if multiplier is None else x.float() * multiplier[:, :, None]
    dims = {"per_tensor": (0, 1, 2), "per_row": (1, 2), "per_column": (0, 2)}[z.granularity]
    symmetric = z.zero == "symmetric"
    hi = y.abs().amax(dims, keepdim=True) if symmetric else y.amax(dims, keepdim=True)
    lo = -hi if symmetric else y.amin(dims, keepdim=True)
    parameters = reference.quantization_params(lo.cpu(), hi.cpu(), z.bits, z.zero)
    scale, inv, zero, i, offset = (t.to(x.device) for t in parameters)
    bits = None
    if z.rounding == "stochastic":
        bits = reference.random_bits(rng, n * p, c, stream=stream).view(n, p, c).transpose(1, 2)
    q = reference.round_codes(y * inv if symmetric else (y - zero) * inv + i, z.rounding, bits)
    q = (q.clamp(-127, 127) if symmetric else q.clamp(0, 255) - 128).to(torch.int8)
    return Images(
        F.pad(q.transpose(1, 2), (0, max(channels - c, 0))).contiguous() if rows else None,
        F.pad(q.permute(1, 2, 0), (0, conv.padded_images(n) - n)).contiguous() if cols else None,
        scale.flatten(), None if symmetric else offset.flatten(),
    )  # fmt: skip


# ---- filters


def _arrangement(
    problem: Problem, candidates: tuple[Candidate, ...], device: torch.device, sets: int
) -> Iterator[tuple[Any, Callable[[int], tuple]]]:
    """Of the codes of W: what torch's copies take, which have nothing to be compared with but themselves on the CPU."""
    rows, channels, taps = problem.m, problem.n, problem.k
    groups = conv_problems.count(problem.kind, "groups")
    g = Geometry((0, 0), (0, 0), (1, taps), groups=groups)
    stored = conv_products.channels_of_x(channels * groups, groups)
    q = [torch.randint(-127, 128, (rows, channels, 1, taps), dtype=torch.int8, device=device) for _ in range(sets)]
    expected = functools.cache(lambda i: tuple(t.to(device) for t in conv.filters(q[i].cpu(), g, stored)))
    for candidate in candidates:
        yield (
            tuner_cases.ours(
                candidate, lambda i: conv.filters(q[i], g, stored), lambda out, i: tuner_cases.same(out, expected(i))
            ),
            expected,
        )
