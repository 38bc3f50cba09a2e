"""Conversion of a model in place, and the report of what was done and what was not."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from . import cost, rng, tuning
from .dispatch import Choice, device_info, problem, select, triton_version
from .nn import Linear
from .recipe import Recipe

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class LayerReport:
    """One layer: its qualified name, type, shape (out, in), recipe, status, kernel, expected speed-up, and the reason.

    status: "converted", "switched" (had another recipe), "unchanged" (had this recipe), "skipped". speedup is the
    predicted ratio over bf16 of forward and backward (`fqt.cost`), None where there is no prediction; speedup_source is
    where the prediction's ceilings come from, "measured" or "datasheet", "tuned" where the operators themselves were timed,
    or why there is none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    recipe: str
    status: str
    kernel: str
    speedup: float | None
    speedup_source: str
    reason: str

    @property
    def expected(self) -> str:
        """ "1.32× (datasheet)"; "not predicted: …"; nothing for a layer to which no prediction applies."""
        if self.speedup is not None:
            return f"{self.speedup:.2f}× ({self.speedup_source})"
        return f"not predicted: {self.speedup_source}" if self.speedup_source else ""


@dataclass
class ConversionReport:
    """What `quantize_` did to each linear layer and convolution of a model. `str` is a table, `to_json` the same as data."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that now train as asked: converted, switched or unchanged."""
        return [r for r in self.layers if r.status != "skipped"]

    @property
    def skipped(self) -> list[LayerReport]:
        return [r for r in self.layers if r.status == "skipped"]

    @property
    def fallbacks(self) -> list[LayerReport]:
        """Converted layers that run without a Triton kernel where they are now."""
        return [r for r in self.converted if r.kernel.startswith("reference")]

    def to_json(self) -> str:
        return json.dumps([asdict(r) for r in self.layers], indent=1)

    def __str__(self) -> str:
        head = ("layer", "type", "shape", "recipe", "status", "kernel", "speed-up", "reason")
        rows = [
            (r.name or "(the model)", r.type, "×".join(map(str, r.shape)), r.recipe, r.status, r.kernel, r.expected,
             r.reason) for r in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        reference = f", {len(self.fallbacks)} without a Triton kernel" if self.fallbacks else ""
        lines.append(f"{len(self.converted)} layers quantized{reference}, {len(self.skipped)} skipped")
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    recipe: str | Recipe | Mapping[str, str | Recipe] = "int8",
    filter_fn: Filter | None = None,
    strict: bool = True,
    only_if_faster: bool = False,
    rows: int = 4096,
    fuse_grad_accumulation: bool | None = None,
) -> ConversionReport:
    """Make a model's `nn.Linear` layers train on quantized operands, in place.

    Each layer keeps its Parameters (so optimizers built before go on working), hooks, name and state_dict keys; its class
    becomes `fqt.nn.Linear`. Layers that are quantized already change to the new recipe. Only modules whose type is
    exactly `nn.Linear` are swapped; one whose weight is read by its parent, shares its life with a parametrization, or is
    computed by a hook is skipped, with the reason in the report. `nn.TransformerEncoderLayer`'s fast path, which reads
    the weights itself, is switched off. Convert before wrapping in DDP or FSDP and before torch.compile.

    Args:
        recipe: one for all layers, or a mapping of name patterns ("*.mlp.*", fnmatch) to recipes; the first that matches
            decides, and a layer that none matches is left alone.
        filter_fn: called with (module, qualified name); False leaves the layer as it is.
        strict: raise where nothing was quantized, or a pattern matched no layer.
        only_if_faster: leave a layer as it is where `fqt.cost` predicts bf16 to be faster on the GPU that it is on. Where
            there is no prediction (no GPU yet, an unknown one, gradients in full precision) strict raises; else the layer
            is quantized, and the report says so. Layers left alone for their speed are no failure, even if they are all.
        fuse_grad_accumulation: whether the kernels add to weight gradients that exist already (see `fqt.nn.Linear`); None
            leaves that as it is, off for a layer that is converted.
        rows: samples (rows of the flattened input) in a forward pass, for the predictions; tokens × batch of a
            transformer.

    Raises:
        TypeError: model is no module.   ValueError: an unknown recipe, rows below 1, or what strict forbids; in the case of
        only_if_faster the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_ takes a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1, got {rows!r}")
    patterns = recipe if isinstance(recipe, Mapping) else {"*": recipe}
    recipes = {pattern: Recipe.parse(value) for pattern, value in patterns.items()}
    modules = dict(model.named_modules())
    layers: list[LayerReport] = []
    used, chosen, slower = set(), {}, False
    for name, module in modules.items():
        if isinstance(module, _ConvNd):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            layers.append(_skipped(module, name, shape, "convolutions are not quantized"))
        if not isinstance(module, nn.Linear):
            continue
        pattern = next((p for p in recipes if fnmatch.fnmatchcase(name, p)), None)
        reason = _why_not(module, name, modules)
        if pattern is None:
            reason = reason or "no pattern matches its name"
        elif reason is None:
            used.add(pattern)
            if filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn returned False"
        if reason is not None:
            layers.append(_skipped(module, name, (module.out_features, module.in_features), reason))
            continue
        layers.append(_planned(module, name, recipes[pattern], rows))
        if only_if_faster:
            layers[-1] = _unless_slower(layers[-1], recipes[pattern], module.weight.is_cuda, strict)
        if layers[-1].status == "skipped":
            slower = True
        else:
            chosen[name] = recipes[pattern]
    for name, chosen_recipe in chosen.items():
        _convert(modules[name], name, chosen_recipe)
        if fuse_grad_accumulation is not None:
            modules[name].fuse_grad_accumulation = fuse_grad_accumulation
    report = ConversionReport(layers)
    _disable_fast_paths(model)
    if strict:
        _check_strict(report, [p for p in recipes if p not in used and isinstance(recipe, Mapping)], slower)
    return report


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn a model's quantized layers back into `nn.Linear`, in place, the same Parameters; returns the model."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
            rng.forget(module)
            for name in ("_fqt_rng", "_fqt_range_state"):
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
            for name in [n for n in module.__dict__ if n.startswith("_fqt_") or n == "fuse_grad_accumulation"]:
                del module.__dict__[name]
        if "_fqt_fast_path" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fqt_fast_path")
    return model


def explain(layer: nn.Module, x: Tensor) -> None:
    """Print which backend and configuration each operator of a layer gets for an input, why, and what each is expected to
    cost beside bf16 (`fqt.cost`); nothing is run.

    Raises:
        TypeError: layer is not quantized.   ValueError: x does not fit the layer.
    """
    print(explanation(layer, x))


def explanation(layer: nn.Module, x: Tensor) -> str:
    """What `explain` prints."""
    if not isinstance(layer, Linear):
        raise TypeError(f"explain takes a fqt.nn.Linear, got {type(layer).__name__}")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise ValueError(f"{layer.label}: expected input (*, {layer.in_features}), got {tuple(x.shape)}")
    k, n = layer.in_features, layer.out_features
    m = x.numel() // k if k else 0
    recipe = layer.recipe
    lines = [f"{layer.label}, recipe {recipe.name}, M={m} N={n} K={k}, {x.dtype} on {x.device}"]
    if recipe.is_exact:
        return "\n".join([*lines, "  every product: torch, full precision"])
    for what, op, rows, cols, kind in _quantizations(recipe, m, n, k):
        choice = _choice(op, x.device, rows, cols, dtype=x.dtype, format=recipe.format, kind=kind)
        lines.append(f"  quantize {what} ({rows}, {cols}): {choice}")
    for what, quantizer, shape in (("fprop", recipe.x, (m, n, k)), ("dgrad", recipe.dgrad, (m, k, n)),
                                   ("wgrad", recipe.wgrad, (n, k, m))):  # fmt: skip
        choice = _choice("scaled_mm", x.device, *shape, dtype=x.dtype, format=recipe.format)
        how = str(choice) if quantizer else "torch, full precision"
        if quantizer and quantizer.householder and quantizer.groups == "tile" and choice.backend == "triton":
            how = "triton: a kernel with the inverse transform in its epilogue"
        elif quantizer and quantizer.householder:
            how += ", then the inverse transform"
        lines.append(f"  {what} {shape}: {how}")
    return "\n".join([*lines, *_expectation(layer, x, m)])


def _expectation(layer: Linear, x: Tensor, m: int) -> list[str]:
    """The terms of the cost model, a line each."""
    sizes = m, layer.out_features, layer.in_features
    choice = _choice("scaled_mm", x.device, *sizes, dtype=x.dtype, format=layer.recipe.format)
    try:
        expected = _predict(m, layer, layer.recipe, x.device, choice)
    except cost.NotModelled as e:
        return [f"  expected: not predicted: {e}"]
    source = "the tuned times of its operators" if expected.source == "tuned" else f"on {cost.ceilings(x.device)}"
    lines = [f"  expected, forward and backward, {source}"]
    for p in expected.products:
        lines.append(f"    {p.name:<11} bf16 {p.bf16_ms:8.4f} ms   {expected.codes} {p.ms:8.4f} ms")
    for p in expected.passes:
        moved = f"{p.bytes_per_element} bytes an element, {p.bytes / 1e6:.1f} MB"
        what = f"{'inverse of' if p.name == 'dX' else 'quantize'} {p.name}"
        lines.append(f"    {what:<34} {p.ms:8.4f} ms   {moved}")
    total = f"bf16 {expected.bf16_ms:8.4f} ms   {expected.codes} {expected.ms:8.4f} ms   {expected}"
    return [*lines, f"    {'in all':<11} {total}"]


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


def _predict(rows: int, layer: nn.Linear, recipe: Recipe, device: torch.device, choice: Choice) -> cost.Prediction:
    """From what was tuned on the device, else from its ceilings. Raises cost.NotModelled."""
    if choice.backend == "reference":
        cost.ceilings(device)  # where there is no GPU, that is the reason
        raise cost.NotModelled(f"plain torch: {choice.reason}")
    sizes, table = (rows, layer.out_features, layer.in_features), tuning.table(device)
    if len(table):
        arch, processors = device_info(str(device))
        gpu = dict(device=device.type, arch=arch, processors=processors, triton=triton_version())
        with contextlib.suppress(cost.NotModelled):
            return cost.tuned_linear(*sizes, recipe, table, str(layer.weight.dtype).removeprefix("torch."), **gpu)
    return cost.linear(*sizes, recipe, cost.ceilings(device))


def _why_not(module: nn.Linear, name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The reason a linear layer cannot be swapped, or None."""
    if type(module) not in (nn.Linear, Linear):
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "MultiheadAttention reads its weight directly"
        if parametrize.is_parametrized(module):
            return "its weight is parametrized"
        return f"its type is {type(module).__name__}, not nn.Linear"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a hook (weight_norm, pruning)"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    return None


def _planned(module: nn.Linear, name: str, recipe: Recipe, rows: int) -> LayerReport:
    """What converting a layer will be, and is expected to gain."""
    status = "converted"
    if isinstance(module, Linear):
        status = "unchanged" if module.recipe == recipe else "switched"
    shape, device = tuple(module.weight.shape), module.weight.device
    if recipe.is_exact:
        return LayerReport(name, "Linear", shape, recipe.name, status, "torch", None, "", "full precision")
    choice = _choice("scaled_mm", device, rows, *shape, dtype=module.weight.dtype, format=recipe.format)
    try:
        expected = _predict(rows, module, recipe, device, choice)
    except cost.NotModelled as e:
        return LayerReport(name, "Linear", shape, recipe.name, status, choice.backend, None, str(e), choice.reason)
    reason = choice.reason
    if expected.ratio < 1:
        times = f"{expected.bf16_ms:.3g} ms, quantized {expected.ms:.3g} ms for {rows} rows"
        reason = f"bf16 is expected to be faster here: {times}"
    return LayerReport(
        name, "Linear", shape, recipe.name, status, choice.backend, expected.ratio, expected.source, reason
    )


def _unless_slower(layer: LayerReport, recipe: Recipe, on_gpu: bool, strict: bool) -> LayerReport:
    """The report of the layer, or of its being left alone where bf16 is expected to be faster."""
    if recipe.is_exact or (layer.speedup is not None and layer.speedup >= 1):
        return layer
    if layer.speedup is not None or (on_gpu and layer.kernel == "reference"):
        reason = layer.reason if layer.speedup is not None else f"bf16 is faster than plain torch: {layer.reason}"
        return replace(layer, recipe="", status="skipped", kernel="", reason=reason)
    if strict:
        raise ValueError(
            f"only_if_faster: no prediction for {layer.name or 'the model'} with recipe {layer.recipe}: "
            f"{layer.speedup_source}; move the model to its GPU first, or pass strict=False to quantize it all the same"
        )
    return replace(layer, reason=f"{layer.reason}; only_if_faster had no prediction to go by")


def _convert(module: nn.Linear, name: str, recipe: Recipe) -> None:
    if isinstance(module, Linear):
        module.recipe, module._fqt_name = recipe, name
        if module._fqt_key_name != name:
            module._fqt_key_name = name
            rng.restart(module)
    else:
        module.__class__ = Linear
        module._become_quantized(recipe, name, name)


def _skipped(module: nn.Module, name: str, shape: tuple[int, ...], reason: str) -> LayerReport:
    return LayerReport(name, type(module).__name__, shape, "", "skipped", "", None, "", reason)


def _disable_fast_paths(model: nn.Module) -> None:
    """TransformerEncoderLayer's inference path hands its layers' weights to one fused operator: make it call the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and "_fqt_fast_path" not in module.__dict__:
            if any(isinstance(m, Linear) for m in module.modules()):
                module.__dict__["_fqt_fast_path"] = module.activation_relu_or_gelu
                module.activation_relu_or_gelu = 0


def _check_strict(report: ConversionReport, unused: list[str], slower: bool) -> None:
    if unused:
        raise ValueError(f"strict: no layer that can be quantized matches {', '.join(map(repr, unused))}\n{report}")
    if not report.converted and not slower:
        what = f"all were skipped:\n{report}" if report.layers else "the model has no nn.Linear"
        raise ValueError(f"strict: nothing was quantized; {what}")
