"""Conversion of a model in place, and the report of what was done and what was not."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from . import conv_nn, expectation, rng
from .example import input_shapes
from .expectation import FULL_PRECISION
from .layer import QuantizedLayer
from .nn import Linear
from .recipe import Recipe

Filter = Callable[[nn.Module, str], bool]

_QUANTIZED = {nn.Linear: Linear, **conv_nn.QUANTIZED}  # by the only type that each is made of


@dataclass(frozen=True)
class LayerReport:
    """One layer: its qualified name, type, shape, recipe, status, kernel, expected speed-up, and the reason.

    shape: (out, in), of a convolution (out, in / groups, *kernel). status: "converted", "switched" (had another recipe),
    "unchanged" (had this recipe), "skipped". kernel: "triton" or, of a convolution, "implicit GEMM", "1x1 GEMM" or "im2col"
    (of fprop, as tuned); "reference" where no kernel runs, "torch" in full precision. speedup is the
    predicted ratio over bf16 of forward and backward (`fqt.cost`, `fqt.conv_cost`), None where there is no prediction;
    speedup_source is where the prediction's ceilings come from, "measured" or "datasheet", "tuned" where the operators
    themselves were timed, or why there is none.
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
    *,
    example_input: Tensor | tuple | None = None,
) -> ConversionReport:
    """Make a model's linear layers and convolutions train on quantized operands, in place.

    Each layer keeps its Parameters (so optimizers built before go on working), hooks, name and state_dict keys; its class
    becomes `fqt.nn.Linear`, `Conv1d`, `Conv2d` or `Conv3d`. Layers that are quantized already change to the new recipe. Only
    modules whose type is exactly torch's are swapped; one whose weight is read by its parent, shares its life with a
    parametrization, or is computed by a hook is skipped, with the reason in the report. So are transposed convolutions, and
    those whose padding, groups or recipe their products are not made for. `nn.TransformerEncoderLayer`'s fast path, which
    reads the weights itself, is switched off. Convert before wrapping in DDP or FSDP and before torch.compile.

    Args:
        recipe: one for all layers, or a mapping of name patterns ("*.mlp.*", fnmatch) to recipes; the first that matches
            decides, and a layer that none matches is left alone.
        filter_fn: called with (module, qualified name); False leaves the layer as it is.
        strict: raise where nothing was quantized, or a pattern matched no layer.
        only_if_faster: leave a layer as it is where bf16 was measured to be faster on the GPU that it is on (`fqt tune`);
            where not all of its operators were measured, where `fqt.cost` predicts that. Where there is no prediction
            either (no GPU yet, an unknown one, gradients in full precision, a convolution without example_input) strict
            raises; else the layer is quantized, and the report says so. Layers left alone for their speed are no failure,
            even if they are all.
        rows: samples (rows of the flattened input) of linear layers in a forward pass, for the predictions; tokens × batch
            of a transformer. Not of layers that the run on example_input reaches, whose samples are then known.
        fuse_grad_accumulation: whether the kernels add to weight gradients that exist already (see `fqt.nn.Linear`); None
            leaves that as it is, off for a layer that is converted.
        example_input: an input of the model, or a tuple of its arguments, of the batch and image sizes of training, on the
            model's device: a copy of the model without hooks is run on it once (`fqt.example.input_shapes`), for the
            predictions. Without it nothing is predicted of convolutions, whose image sizes are not known.

    Raises:
        TypeError: model is no module, example_input neither tensor nor tuple.   ValueError: an unknown recipe, rows below 1,
        a model that cannot run on example_input, or what strict forbids; in the case of only_if_faster and of example_input
        the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_ takes a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1, got {rows!r}")
    patterns = recipe if isinstance(recipe, Mapping) else {"*": recipe}
    recipes = {pattern: Recipe.parse(value) for pattern, value in patterns.items()}
    modules = dict(model.named_modules())
    inputs = None if example_input is None else input_shapes(model, example_input)
    layers: list[LayerReport] = []
    used, chosen, slower = set(), {}, False
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, _ConvNd)):
            continue
        pattern = next((p for p in recipes if fnmatch.fnmatchcase(name, p)), None)
        reason = _why_not(module, name, modules)
        if reason is None:
            reason = "no pattern matches its name" if pattern is None else _why_not_by(recipes[pattern], module)
        if reason is None:
            used.add(pattern)
            if filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn returned False"
        if reason is not None:
            layers.append(_skipped(module, name, reason))
            continue
        layers.append(_planned(module, name, recipes[pattern], rows, None if inputs is None else inputs[name]))
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
    """Turn a model's quantized layers back into torch's own, in place, the same Parameters; returns the model."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module._become_plain()
        if "_fqt_fast_path" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fqt_fast_path")
    return model


def _why_not(module: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The reason a linear layer or convolution cannot be swapped, or None."""
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not quantized"
    if type(module) not in (*_QUANTIZED, *_QUANTIZED.values()):
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "MultiheadAttention reads its weight directly"
        if parametrize.is_parametrized(module):
            return "its weight is parametrized"
        plain = next((plain for plain in _QUANTIZED if isinstance(module, plain)), None)
        return f"its type is {type(module).__name__}, not nn.{plain.__name__ if plain else 'Conv1d, 2d or 3d'}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a hook (weight_norm, pruning)"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    return None


def _why_not_by(recipe: Recipe, module: nn.Linear | _ConvNd) -> str | None:
    """The reason a layer cannot have a recipe, or None."""
    if isinstance(module, nn.Linear):
        return None
    return conv_nn.reason_against(module, recipe, conv_nn.sample_of(module))


def _planned(
    module: nn.Linear | _ConvNd, name: str, recipe: Recipe, rows: int, inputs: list[tuple[int, ...]] | None
) -> LayerReport:
    """What converting a layer will be, and is expected to gain; inputs: the shapes that it is given, if they are known."""
    status = "converted"
    if isinstance(module, QuantizedLayer):
        status = "unchanged" if module.recipe == recipe else "switched"
    if recipe.is_exact:
        expected = FULL_PRECISION
    elif isinstance(module, nn.Linear):
        met = max((math.prod(shape[:-1]) for shape in inputs or ()), default=0)
        expected = expectation.of_linear(module, recipe, met or rows)
    else:
        expected = expectation.of_convolution(module, recipe, inputs)
    return LayerReport(name, type(module).__name__, _shape(module), recipe.name, status, *expected)


def _shape(module: nn.Linear | _ConvNd) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


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
            f"{layer.speedup_source}; {'' if on_gpu else 'move the model to its GPU first, or '}pass strict=False to "
            "quantize it all the same"
        )
    return replace(layer, reason="; ".join(filter(None, (layer.reason, "only_if_faster had no prediction to go by"))))


def _convert(module: nn.Linear | _ConvNd, name: str, recipe: Recipe) -> None:
    if isinstance(module, QuantizedLayer):
        module.recipe, module._fqt_name = recipe, name
        if module._fqt_key_name != name:
            module._fqt_key_name = name
            rng.restart(module)
    else:
        module.__class__ = _QUANTIZED[type(module)]
        module._become_quantized(recipe, name, name)


def _skipped(module: nn.Linear | _ConvNd, name: str, reason: str) -> LayerReport:
    if isinstance(module, QuantizedLayer):
        reason += f"; it stays quantized by {module.recipe.name}"
    return LayerReport(name, type(module).__name__, _shape(module), "", "skipped", "", None, "", reason)


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
        what = (
            f"all were skipped:\n{report}" if report.layers else "the model has no nn.Linear and no nn.Conv1d, 2d or 3d"
        )
        raise ValueError(f"strict: nothing was quantized; {what}")
