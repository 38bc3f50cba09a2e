"""The case of a convolution, forward and backward, in channels_last memory: `fqt.nn.Conv2d` against cuDNN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt.nn
from fqt import conv, conv_cost, conv_nn, conv_products, cost, reference
from fqt.conv import Filters, Geometry, Images
from fqt.gradients import DGRAD, WGRAD
from fqt.suites import CONVOLUTIONS, Convolution

from . import layers
from .cases import BF16_BOUND, ceilings, gaussian
from .harness import Candidate, Case
from .layers import STREAM_KEY, dtype_name
from .operators import searching, work_dtype
from .providers import peer

SUITE = "conv fwd+bwd"
RECIPES = ("int8", "psq8")
BF16 = ("bf16", "bf16 compiled")  # the faster one is what a recipe is compared with
OWN = "fqt.nn.Conv2d "  # a candidate's name before its recipe's
Step = tuple[Tensor, Tensor | None, Tensor]  # Y, dX and dW; dX is None where the input needs no gradient


def size(of: Convolution) -> str:
    """N x C x H x W x O x kernel x stride, and x groups where there are any."""
    numbers = (of.n, of.c, of.edge, of.edge, of.o, of.kernel, of.stride, *([of.groups] if of.groups > 1 else []))
    return "x".join(map(str, numbers))


def title(network: str = "") -> str:
    """The kind of a case."""
    return f"{SUITE}, {network}" if network else SUITE


def images(n: int, channels: int, edge: int, *, device: torch.device, seed: int, dtype: torch.dtype) -> Tensor:
    """Gaussian (N, C, H, W), in channels_last memory."""
    return gaussian(n, edge, edge, channels, device=device, seed=seed, dtype=dtype).permute(0, 3, 1, 2)


def inputs(of: Convolution, device: torch.device, sets: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """X and dY of each input set."""
    random = functools.partial(images, of.n, device=device, dtype=dtype)
    x = [random(of.c, of.edge, seed=2 * i).requires_grad_(not of.first) for i in range(sets)]
    return x, [random(of.o, of.out_edge, seed=2 * i + 1) for i in range(sets)]


def layer(of: Convolution, device: torch.device, dtype: torch.dtype, recipe: str | None = None) -> nn.Conv2d:
    """Without bias; torch's own where no recipe is given."""
    kind = nn.Conv2d if recipe is None else functools.partial(fqt.nn.Conv2d, recipe=recipe)
    made = kind(
        of.c, of.o, of.kernel, of.stride, of.kernel // 2, groups=of.groups, bias=False, device=device, dtype=dtype
    )
    return made.to(memory_format=torch.channels_last)


def case(
    of: Convolution,
    device: torch.device,
    sets: int = 2,
    *,
    network: str = "",
    names: Sequence[str] = RECIPES,
    compiled: bool = True,
) -> Case:
    """Forward and backward of a convolution without bias: `fqt.nn.Conv2d` of the named recipes against nn.Conv2d, eager and,
    if compiled, compiled, with cuDNN's search for its fastest algorithm.

    All of the quantization is timed, that of the weight in every run, as in `layers.linear`. A network's first convolution
    has no gradient of its input to compute, and so two thirds of the operations.
    """
    dtype = work_dtype(device)
    x, dy = inputs(of, device, sets, dtype)
    terms = max(of.c, of.o) // of.groups * of.kernel**2, of.n * of.out_edge**2
    bound = BF16_BOUND if dtype == torch.bfloat16 else max(terms) * 2.0**-24  # float32 sums of so many terms
    work = {"ops": (4.0 if of.first else 6.0) * of.multiplications, "bytes": float(_least_bytes(of, dtype.itemsize))}
    plain = layer(of, device, dtype)
    name = f"nn.Conv2d {dtype_name(dtype)}"
    exact = functools.partial(_check, functools.partial(_in_float32, plain, x, dy), bound)
    baseline = Candidate(name, step(plain, x, dy), exact, **work, **peer("torch", device), tag="bf16")
    candidates = [baseline]
    for recipe in names:
        own = layer(of, device, dtype, recipe)
        with torch.no_grad():
            own.weight.copy_(plain.weight)
            own._fqt_rng.copy_(torch.tensor([STREAM_KEY, 0]))  # the same bits whichever kernels compute the layer
        candidates.append(
            Candidate(
                f"{OWN}{recipe}", step(own, x, dy),
                functools.partial(_check, functools.partial(_defined, own, x, dy), bound), **work,
                prediction=_prediction(of, own, device), tag=recipe, rewind=layers.rewind(own), same_bits=recipe,
            )
        )  # fmt: skip
    if compiled:
        candidates.append(Candidate(f"{name}, torch.compile", step(plain, x, dy, compiled=True), exact, **work,
                                    **peer("torch.compile", device), tag="bf16 compiled"))  # fmt: skip
    return Case(title(network), size(of), "TFLOP/s", baseline.name, tuple(candidates), sets)


def step(layer: nn.Conv2d, x: list[Tensor], dy: list[Tensor], compiled: bool = False) -> Callable[[int], Step]:
    """run(i): `layers.step`, in which cuDNN times its algorithms for a shape that it has not met."""
    run = layers.step(layer, x, dy, compiled)

    def searched(i: int) -> Step:
        with searching():
            return run(i)

    return searched


def _least_bytes(of: Convolution, element: int) -> int:
    """X, W and dY read once; Y, dW and, where it is needed, dX written once."""
    x, y = of.n * of.c * of.edge**2, of.n * of.o * of.out_edge**2
    return element * (x * (1 if of.first else 2) + 2 * y + 2 * of.o * of.c // of.groups * of.kernel**2)


def shape_of(of: Convolution) -> conv_cost.Shape:
    """As the cost model takes it, of an implicit GEMM."""
    return conv_cost.Shape(of.n, of.c, of.o, of.edge**2, of.out_edge**2, of.kernel**2, of.groups)


def _prediction(of: Convolution, layer: fqt.nn.Conv2d, device: torch.device) -> str:
    """ "" where there is none: the model takes dX to be needed."""
    expected = ceilings(device)
    if expected is None or of.first:
        return ""
    path = conv_products.path(conv_nn.geometry(layer, (of.edge, of.edge)), of.c)
    try:
        return str(conv_cost.convolution(replace(shape_of(of), path=path), layer.recipe, expected))
    except cost.NotModelled:
        return ""


# ---- checks


def _check(want: Callable[[int], Step], bound: float, out: Step, i: int) -> str:
    return layers.check_products(out, want(i), bound)


def _in_float32(layer: nn.Conv2d, x: list[Tensor], dy: list[Tensor], i: int) -> Step:
    """Y, dX and dW of the values as they are; where a GPU computes in TF32, that has all bits of a bf16 value."""
    a = x[i].detach().float().requires_grad_(x[i].requires_grad)
    w = layer.weight.detach().float().requires_grad_()
    y = F.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    *dx, dw = torch.autograd.grad(y, [t for t in (a, w) if t.requires_grad], dy[i].float())
    return y.detach(), *(dx or [None]), dw


def _defined(layer: fqt.nn.Conv2d, x: list[Tensor], dy: list[Tensor], i: int) -> Step:
    """Y, dX and dW by `fqt.conv`, with the random bits of the step done."""
    rng = layer._fqt_rng.clone()
    rng[1] -= 1
    of = operands(layer, x[i].detach(), dy[i], rng)
    y, dw = of.fprop(), of.wgrad()
    return y, of.dgrad() if x[i].requires_grad else None, dw


class Operands(NamedTuple):
    """Of a step of a layer of n images: X; the filters for fprop and for dgrad; dY for dgrad and for wgrad.

    Scales that lie on a contracted index are folded into dY: b has no scale, x_scale is None.
    """

    geometry: Geometry
    shape: tuple[int, ...]  # of the weight
    n: int
    x: Images
    x_scale: Tensor | None
    f: Filters
    b: Filters
    g: Images
    h: Images

    def fprop(self) -> Tensor:
        return conv.product(self.x, self.f, self.geometry).unflatten(2, self.geometry.out)

    def dgrad(self) -> Tensor:
        return conv.product(self.g, self.b, self.geometry, transposed=True).unflatten(2, self.geometry.size)

    def wgrad(self) -> Tensor:
        return conv.wgrad(self.h, self.x, self.x_scale, self.geometry, self.n).view(self.shape)


def operands(layer: fqt.nn.Conv2d, x: Tensor, dy: Tensor, rng: Tensor) -> Operands:
    """By `fqt.conv` and `fqt.reference`, of X (N, C, H, W) and dY (N, O, P, Q)."""
    r, w, g = layer.recipe, layer.weight.detach(), conv_nn.geometry(layer, tuple(x.shape[2:]))
    images_of = functools.partial(conv.quantize, groups=g.groups, rng=rng)
    channels = conv_products.channels_of_x(x.shape[1], g.groups)
    xq = images_of(x.flatten(2), r.x, channels=channels, cols=True, sums=r.w.zero != "symmetric")
    codes = reference.quantize(w.flatten(1), r.w)
    scale, offset = codes.scale.flatten(), None if codes.offset is None else codes.offset.flatten()

    def filters(q: Tensor, channels: int) -> Filters:
        return Filters(q, scale, offset, q.sum(2, dtype=torch.int32) if r.affine else None, channels)

    forward, back = conv.filters(codes.q.view(w.shape), g, channels)
    f, b = filters(forward, w.shape[1]), filters(back, len(w) // g.groups)
    fold_w, fold_x = (q.granularity == "per_row" for q in (r.w, r.x))
    return Operands(
        g, tuple(w.shape), len(x), xq, None if fold_x else xq.scale, f, b._replace(scale=None) if fold_w else b,
        images_of(dy.flatten(2), r.dgrad, channels=conv_products.channels_of_dy(len(w), g.groups), stream=DGRAD,
                  multiplier=scale[None] if fold_w else None, sums=offset is not None),
        images_of(dy.flatten(2), r.wgrad, stream=WGRAD, multiplier=xq.scale[:, None] if fold_x else None, rows=False,
                  cols=True),
    )  # fmt: skip


# ---- the table of a network


class Row(NamedTuple):
    """A layer of a network and how many such it has: ms of the faster of torch's and of fqt's by recipe, None where there is
    no figure. of: None for all layers together. predicted: int8's ratio by `fqt.conv_cost`, from before the run."""

    of: Convolution | None
    count: int
    bf16: float | None
    ours: dict[str, float | None]
    predicted: float | None = None

    @property
    def wrong(self) -> bool | None:
        """Whether the prediction is on the other side of 1; None where it or the figure is missing."""
        ratio = self.ratio("int8")
        return None if ratio is None or self.predicted is None else (ratio > 1) != (self.predicted > 1)

    def ratio(self, recipe: str) -> float | None:
        """Above 1 the recipe is faster."""
        ms = self.ours[recipe]
        return None if ms is None or self.bf16 is None else self.bf16 / ms


def rows(network: str, cases: Iterable[dict[str, Any]]) -> list[Row]:
    """Of a network's measured layers, and all together where every one was measured; empty where none was."""
    by_shape = {case["shape"]: case for case in cases if case["suite"] == title(network)}
    layers_of = [of for of in CONVOLUTIONS[network] if size(of) in by_shape]
    found = [Row(of, of.count, _least(by_shape[size(of)], BF16), {r: _least(by_shape[size(of)], [r]) for r in RECIPES},
                 _predicted(by_shape[size(of)]))
             for of in layers_of]  # fmt: skip
    if len(layers_of) < len(CONVOLUTIONS[network]):
        return found
    ours = {r: _sum(found, [row.ours[r] for row in found]) for r in RECIPES}
    total = Row(None, sum(row.count for row in found), _sum(found, [row.bf16 for row in found]), ours)
    return [*found, total]


def _least(case: dict[str, Any], tags: Sequence[str]) -> float | None:
    found = (c["ms"]["median"] for c in case["candidates"] if c["status"] == "ok" and c["tag"] in tags)
    return min(found, default=None)


def _predicted(case: dict[str, Any]) -> float | None:
    """Of text such as "1.32× (measured)"."""
    texts = (c["prediction"].split("×") for c in case["candidates"] if c["tag"] == "int8")
    return next((float(text[0]) for text in texts if len(text) == 2), None)


def _sum(found: list[Row], ms: list[float | None]) -> float | None:
    return None if None in ms else sum(row.count * each for row, each in zip(found, ms, strict=True))


def cells(row: Row) -> tuple[str, ...]:
    """Under HEADER."""
    of = row.of
    what = "all layers" if of is None else of.name
    shape = "" if of is None else f"{of.c} → {of.o}, {of.kernel}×{of.kernel}, {of.edge}² → {of.out_edge}²"
    short = lambda value: "" if value is None else f"{value:.3g}"  # noqa: E731
    ours = [cell for r in RECIPES for cell in (short(row.ours[r]), short(row.ratio(r)))]
    return what, shape, str(row.count), short(row.bf16), *ours, short(row.predicted), "wrong" * bool(row.wrong)


HEADER = (
    "layer",
    "channels, kernel, image",
    "count",
    "bf16, ms",
    *(h for r in RECIPES for h in (f"{r}, ms", "over bf16")),
    "int8, predicted",
    "decision",
)
RIGHT = tuple(range(2, len(HEADER)))  # columns of numbers
