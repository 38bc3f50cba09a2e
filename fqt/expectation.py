"""What a layer is expected to gain over bf16, and which kernel each of its operators gets: for reports and `fqt.explain`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import conv_cost, conv_nn, conv_ops, conv_problems, cost, tuned_cost, tuning
from .conv_cost import Shape
from .dispatch import Choice, device_info, problem, select, triton_version
from .layer import QuantizedLayer
from .nn import Linear
from .recipe import Recipe
from .tuned_cost import Dtypes, NotTuned

T = TypeVar("T")


class Expectation(NamedTuple):
    """kernel, speedup, speedup_source and reason of a `fqt.convert.LayerReport`."""

    kernel: str
    speedup: float | None
    source: str
    reason: str


FULL_PRECISION = Expectation("torch", None, "", "full precision")


# ---- for reports


def of_linear(layer: nn.Linear, recipe: Recipe, rows: int) -> Expectation:
    """Of a linear layer of so many samples, quantized or not yet."""
    device = layer.weight.device
    choice = _choice("scaled_mm", device, rows, *layer.weight.shape, dtype=layer.weight.dtype, format=recipe.format)
    try:
        expected, untuned = _predict(rows, layer, recipe, choice)
    except cost.NotModelled as e:
        return Expectation(choice.backend, None, str(e), choice.reason)
    reason = choice.reason
    if expected.ratio < 1:
        times = f"{expected.bf16_ms:.3g} ms, quantized {expected.ms:.3g} ms for {rows} rows"
        reason = f"bf16 is expected to be faster here: {times}"
    return Expectation(choice.backend, expected.ratio, expected.source, _also(reason, untuned))


def _also(reason: str, untuned: str) -> str:
    """With why the prediction is not made of the times that were tuned."""
    return "; ".join(filter(None, (reason, untuned and f"the tuned times were of no use: {untuned}")))


def of_convolution(layer: _ConvNd, recipe: Recipe, inputs: Sequence[tuple[int, ...]] | None) -> Expectation:
    """Of a convolution, quantized or not yet, on inputs of these shapes; None: they are not known."""
    device, sample = layer.weight.device, conv_nn.sample_of(layer)
    shapes = [_shape(layer, sample, each) for each in inputs or ()]
    path, choice = _fprop_choice(layer, sample, shapes[0] if shapes else None)
    kernel = choice.backend if choice.backend == "reference" else path
    reason = choice.reason if choice.backend == "reference" or choice.fallback else ""
    try:
        if choice.backend == "reference":
            cost.ceilings(device)  # where there is no GPU, that is the reason
            raise cost.NotModelled(f"plain torch: {choice.reason}")
        if inputs is None:
            raise cost.NotModelled("the image size is unknown: give example_input")
        if not inputs:
            raise cost.NotModelled("example_input does not reach it")
        found, untuned = _predict_convolution(shapes, recipe, layer.weight)
    except cost.NotModelled as e:
        return Expectation(kernel, None, str(e), reason)
    bf16_ms, ms, source = sum(p.bf16_ms for p in found), sum(p.ms for p in found), found[0].source
    more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
    more += "" if all(len(p.products) == 3 for p in found) else ", without a gradient of its input"
    times = f"{bf16_ms:.3g} ms, quantized {ms:.3g} ms for {'×'.join(map(str, inputs[0]))}{more}"
    if bf16_ms < ms:
        why = conv_cost.why_slower(max(found, key=lambda p: p.ms - p.bf16_ms))
        reason = f"bf16 {'was measured' if source == 'tuned' else 'is expected'} to be faster here: {times}; {why}"
    elif source == "tuned":
        reason = "; ".join(filter(None, (reason, f"measured to be faster than bf16: {times}")))
    return Expectation(kernel, bf16_ms / ms, source, _also(reason, untuned))


def _predict_convolution(
    shapes: Sequence[Shape], recipe: Recipe, weight: Tensor, x: Tensor | None = None
) -> tuple[list[cost.Prediction], str]:
    """Of all shapes, all from what was tuned on the device, or all from its ceilings; and why not the former, where some
    operators were tuned.

    Of the memory format of x; without it of the weight's, and where that does not tell either of both, channels_last first,
    whichever was tuned. Raises cost.NotModelled.
    """
    device = (weight if x is None else x).device
    table, gpu = tuning.table(device), _gpu(device)

    def predict(channels_last: bool, dtypes: Dtypes) -> list[cost.Prediction]:
        return [conv_cost.tuned_convolution(s, recipe, table, dtypes, channels_last, **gpu) for s in shapes]

    options = itertools.product(_formats(weight, x), _dtypes(weight, x)) if len(table) else ()
    found, untuned = _from_tuned(predict, options)
    with _saying(untuned):
        return found or [conv_cost.convolution(shape, recipe, cost.ceilings(device)) for shape in shapes], untuned


def _from_tuned(predict: Callable[..., T], options: Iterable[tuple]) -> tuple[T | None, str]:
    """The prediction by the first option that the tuned table has all times for; else what it lacks for the one that lacks
    least, "" where it has nothing of any, or where tuning does not cover the layer."""
    closest: NotTuned | None = None
    for option in options:
        try:
            return predict(*option), ""
        except NotTuned as e:
            if e.partly and (closest is None or e.lacks < closest.lacks):
                closest = e
        except cost.NotModelled:
            return None, ""
    return None, "" if closest is None else str(closest)


@contextlib.contextmanager
def _saying(untuned: str) -> Iterator[None]:
    """Where the model has no prediction either, the reason is followed by why tuned times made none."""
    try:
        yield
    except cost.NotModelled as e:
        raise cost.NotModelled(_also(str(e), untuned)) from None


def _gpu(device: torch.device) -> dict:
    """What of a `dispatch.Problem` says which GPU it is for; nothing of another device, which has no table."""
    if device.type != "cuda":
        return {}
    arch, processors = device_info(str(device))
    return dict(device=device.type, arch=arch, processors=processors, triton=triton_version())


def _dtypes(weight: Tensor, x: Tensor | None) -> list[Dtypes]:
    """Those that X, W and dY may have: with x as a layer would take it now; else first the weight's, then those of
    autocast over a float32 weight, whichever were tuned."""
    w = _name(weight.dtype)
    if x is not None:
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return [Dtypes(_name(x.dtype), w, _name(torch.get_autocast_dtype(kind) if autocast else x.dtype))]
    lower = ("bfloat16", "float16") if w == "float32" else ()
    return [Dtypes.of(w), *(Dtypes(of_x, w, dy) for dy in lower for of_x in (dy, w))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _formats(weight: Tensor, x: Tensor | None) -> tuple[bool, ...]:
    """Whether the output may be in channels_last memory: as a layer of this weight makes it of x, or of any input."""
    if weight.dim() != 4:
        return (False,)
    last = conv_ops.is_channels_last(weight)
    if x is not None:
        return (last or conv_ops.is_channels_last(x if x.dim() == 4 else x[None]),)
    tells = not (weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last))
    return (last,) if tells else (True, False)


def _shape(layer: _ConvNd, sample: str, given: tuple[int, ...]) -> Shape:
    """Of a convolution's input (N, C, *size) or (C, *size)."""
    n = len(layer.kernel_size)
    size, out = given[-n:], conv_nn.outputs(layer, given[-n:])
    sizes = (math.prod(pixels) for pixels in (size, out, layer.kernel_size))
    images = given[0] if len(given) == n + 2 else 1
    path, windows = conv_nn.kernel_path(layer, sample), sample == "row"
    geometry = None if windows else conv_nn.geometry(layer, size)
    return Shape(images, layer.in_channels, layer.out_channels, *sizes, layer.groups, path, windows, geometry)


def _fprop_choice(layer: _ConvNd, sample: str, shape: Shape | None) -> tuple[str, Choice]:
    """The path and what dispatch would choose; of a convolution whose image size is not known only the backend means
    something."""
    if shape is not None and sample != "row":
        return _product_choice("fprop", shape, layer.weight, _formats(layer.weight, None)[0])
    m, n = (128, 128) if shape is None else shape.products["fprop"][:2]
    op = "scaled_mm" if sample == "row" else "conv"
    choice = _choice(op, layer.weight.device, m, n, layer.weight[0].numel(), dtype=layer.weight.dtype)
    return conv_nn.kernel_path(layer, sample), choice


# ---- for a user


def explain(layer: nn.Module, x: Tensor) -> None:
    """Print which backend and configuration each operator of a layer gets for an input, why, and what each is expected to
    cost beside bf16 (`fqt.cost`, `fqt.conv_cost`); nothing is run.

    Raises:
        TypeError: layer is not quantized.   ValueError: x does not fit the layer.
    """
    print(explanation(layer, x))


def explanation(layer: nn.Module, x: Tensor) -> str:
    """What `explain` prints."""
    if not isinstance(layer, QuantizedLayer):
        raise TypeError(f"explain takes a fqt.nn.Linear or convolution, got {type(layer).__name__}")
    layer._check_shape(x)
    recipe = layer.recipe
    if isinstance(layer, Linear):
        k, n = layer.in_features, layer.out_features
        shape, sizes = None, (x.numel() // k if k else 0, n, k)
        text = "M={} N={} K={}".format(*sizes)
    else:
        shape = _shape(layer, layer.sample, tuple(x.shape))
        sizes = shape.products["fprop"]
        text = f"input {'×'.join(map(str, x.shape))}"
    lines = [f"{layer.label}, recipe {recipe.name}, {text}, {x.dtype} on {x.device}"]
    if recipe.is_exact:
        return "\n".join([*lines, "  every product: torch, full precision"])
    if shape is not None and shape.windows:
        lines.append(f"  im2col: torch, windows ({sizes[0]}, {sizes[2]}) in {x.dtype}")
    if shape is None or shape.windows:
        lines += _matrix_operators(recipe, x, layer.weight, *sizes)
    else:
        lines += _image_operators(recipe, x, layer.weight, shape, _formats(layer.weight, x)[0])
    return "\n".join([*lines, *_expectation(layer, x, sizes, shape)])


def _matrix_operators(recipe: Recipe, x: Tensor, weight: Tensor, m: int, n: int, k: int) -> Iterator[str]:
    dtypes = _now(weight, x)
    for what, op, rows, cols, kind in _quantizations(recipe, m, n, k):
        choice = _choice(op, x.device, rows, cols, dtype=dtypes[what.split()[0]], format=recipe.format, kind=kind)
        yield f"  quantize {what} ({rows}, {cols}): {choice}"
    for what, quantizer, shape in (("fprop", recipe.x, (m, n, k)), ("dgrad", recipe.dgrad, (m, k, n)),
                                   ("wgrad", recipe.wgrad, (n, k, m))):  # fmt: skip
        choice = _choice("scaled_mm", x.device, *shape, dtype=x.dtype, format=recipe.format)
        how = str(choice) if quantizer else "torch, full precision"
        if quantizer and quantizer.householder and quantizer.groups == "tile" and choice.backend == "triton":
            how = "triton: a kernel with the inverse transform in its epilogue"
        elif quantizer and quantizer.householder:
            how += ", then the inverse transform"
        yield f"  {what} {shape}: {how}"


def _image_operators(recipe: Recipe, x: Tensor, weight: Tensor, s: Shape, last: bool) -> Iterator[str]:
    """Of a convolution; sizes of products are those of a group. last: images are in channels_last memory."""
    pixels, outputs, dtypes = s.images * s.pixels, s.images * s.out_pixels, _now(weight, x)
    asked = s.quantization("X", last, recipe.x.granularity, recipe.x.rounding, "both")
    yield f"  quantize X ({pixels}, {s.channels}): {_asked(asked, x)}"
    w, kind = (s.out_channels, s.elements["W"] // s.out_channels), f"{recipe.w.granularity} {recipe.w.rounding} rows"
    yield f"  quantize W {w}: {_choice('quantize', x.device, *w, dtype=dtypes['W'], kind=kind)}"
    gradients = {"dgrad": recipe.dgrad, "wgrad": recipe.wgrad}
    together = [q and not q.householder and q.rounding == "stochastic" for q in gradients.values()]
    for name, quantizer in gradients.items():
        if quantizer is not None and quantizer.householder:
            matrix = s.images, s.out_pixels * s.out_channels
            choice = _choice("householder", x.device, *matrix, dtype=dtypes["dY"], kind=quantizer.groups)
            yield f"  quantize dY for {name}, block Householder {matrix}: {choice}"
        elif quantizer is not None and not all(together):
            layout = {"dgrad": "rows", "wgrad": "cols"}[name]
            call = s.quantization("dY", last, quantizer.granularity, quantizer.rounding, layout)
            choice = _asked(call, x, dtypes["dY"])
            yield f"  quantize dY for {name} ({outputs}, {s.out_channels}): {choice}"
    if all(together):
        call = s.quantization("dY", last, *(q.granularity for q in gradients.values()))
        choice = _asked(call, x, dtypes["dY"])
        yield f"  quantize dY for dgrad and wgrad ({outputs}, {s.out_channels}): {choice}"
    for name, shape in s.products.items():
        quantizer = gradients.get(name, recipe.x)
        if quantizer is None:
            yield f"  {name} {shape}: torch, full precision"
            continue
        path, choice = _product_choice(name, s, x, last)
        then = ", then the inverse transform" if quantizer.householder else ""
        yield f"  {name} {shape}: {path + ', ' if choice.backend == 'triton' else ''}{choice}{then}"


def _product_choice(name: str, s: Shape, x: Tensor, last: bool) -> tuple[str, Choice]:
    """How a product of images is computed on the device of x, in its dtype: the path and what that launches; with the
    measured reason for the path, where there is one."""
    asked = s.call(name, last)
    choice = _asked(asked, x)
    if choice.kernel not in ("pointwise", "im2col"):
        return conv_problems.PATHS["implicit"], choice
    path = conv_problems.PATHS[choice.kernel]
    of_matrices = _choice("scaled_mm", x.device, *conv_problems.of_matrices(choice.kernel, *asked.sizes), dtype=x.dtype)
    if choice.source in ("tuned", "nearest"):
        of_matrices = replace(of_matrices, reason=f"{of_matrices.reason}; {path}: {choice.reason}")
    return path, of_matrices


def _asked(call: conv_problems.Call, x: Tensor, dtype: torch.dtype | None = None) -> Choice:
    return _choice(call.op, x.device, *call.sizes, dtype=dtype or x.dtype, **call.more)


def _now(weight: Tensor, x: Tensor) -> dict[str, torch.dtype]:
    """The dtypes of what is quantized as a layer would take x now."""
    (dtypes,) = _dtypes(weight, x)
    return {name: getattr(torch, of) for name, of in zip(("X", "W", "dY"), dtypes, strict=True)}


def _expectation(layer: QuantizedLayer, x: Tensor, sizes: tuple[int, int, int], shape: Shape | None) -> list[str]:
    """The terms of the cost model, a line each."""
    try:
        if shape is None:
            choice = _choice("scaled_mm", x.device, *sizes, dtype=x.dtype, format=layer.recipe.format)
            expected, untuned = _predict(sizes[0], layer, layer.recipe, choice, x)
        else:
            (expected,), untuned = _predict_convolution([shape], layer.recipe, layer.weight, x)
    except cost.NotModelled as e:
        return [f"  expected: not predicted: {e}"]
    source = "the tuned times of its operators" if expected.source == "tuned" else f"on {cost.ceilings(x.device)}"
    lines = [f"  expected, forward and backward, {_also(source, untuned)}"]
    for p in expected.products:
        lines.append(f"    {p.name:<11} bf16 {p.bf16_ms:8.4f} ms   {expected.codes} {p.ms:8.4f} ms")
    for p in expected.passes:
        moved = f"{p.bytes_per_element} bytes an element, {p.bytes / 1e6:.1f} MB"
        what = {"dX": "inverse of dX", "im2col": "im2col"}.get(p.name, f"quantize {p.name}")
        lines.append(f"    {what:<34} {p.ms:8.4f} ms   {moved}")
    total = f"bf16 {expected.bf16_ms:8.4f} ms   {expected.codes} {expected.ms:8.4f} ms   {expected}"
    return [*lines, f"    {'in all':<11} {total}"]


# ---- of matrices


def _choice(op: str, device: torch.device, *sizes: int, **more) -> Choice:
    """What dispatch would choose now: nothing is tuned for it."""
    return select(problem(op, device, *sizes, **more), tuning.table(device))


def _quantizations(recipe: Recipe, m: int, n: int, k: int) -> Iterator[tuple[str, str, int, int, str]]:
    """(what, operator, rows, columns, kind) of the quantizations of X, W and dY, as `products` asks for them."""
    for what, rows, cols, q in (("X", m, k, recipe.x), ("W", n, k, recipe.w)):
        yield what, "quantize", rows, cols, f"{q.granularity} {q.rounding} both"
    g, h = recipe.dgrad, recipe.wgrad
    if g and g.householder:
        yield "dY for dgrad, block Householder", "householder", m, n, g.groups
        if h:
            together = " stats" * ({g.rounding, h.rounding} == {"stochastic"})
            yield "dY for wgrad", "quantize", m, n, f"{h.granularity} {h.rounding} cols{together}"
        return
    if g and h and {g.rounding, h.rounding} == {"stochastic"}:
        yield "dY", "quantize_gradient", m, n, f"{g.granularity} {h.granularity}"
        return
    for product, q, layout in (("dgrad", g, "rows"), ("wgrad", h, "cols")):
        if q:
            yield f"dY for {product}", "quantize", m, n, f"{q.granularity} {q.rounding} {layout}"


def _predict(
    rows: int, layer: nn.Linear, recipe: Recipe, choice: Choice, x: Tensor | None = None
) -> tuple[cost.Prediction, str]:
    """From what was tuned on the device, else from its ceilings, as `_predict_convolution`."""
    device = (layer.weight if x is None else x).device
    if choice.backend == "reference":
        cost.ceilings(device)  # where there is no GPU, that is the reason
        raise cost.NotModelled(f"plain torch: {choice.reason}")
    sizes, table, gpu = (rows, layer.out_features, layer.in_features), tuning.table(device), _gpu(device)

    def predict(dtypes: Dtypes) -> cost.Prediction:
        return tuned_cost.tuned_linear(*sizes, recipe, table, dtypes, **gpu)

    found, untuned = _from_tuned(predict, zip(_dtypes(layer.weight, x)) if len(table) else ())
    with _saying(untuned):
        return found or cost.linear(*sizes, recipe, cost.ceilings(device)), untuned
