"""Which problems dispatch is asked to solve: of layers given by their shapes, or of one training step of a model.

The operators run as they are, on tensors without data, while what they ask `dispatch.choose` is written down and the
kernels are replaced by their shapes. So the problems are those of training, whatever `products` makes of a recipe.

`--model module:function`: the function takes no arguments and returns one of

    (model, inputs)   inputs: a tensor, a tuple of positional or a dict of keyword arguments. The step is model(inputs) and
                      the backward pass from every output that has one.
    (model, step)     step: called without arguments, does the forward and the backward pass itself (loss, autocast, …).

It is called where new tensors are fake (`torch._subclasses.FakeTensorMode`) and live on the GPU if there is one, by
default: no memory is taken and nothing is computed, so a step must not look at values (`.item()`, a mask's size).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import collect_conv, conv_ops, conv_problems, conv_products, dispatch, gradients, ops, products, reference, tuned
from .cli import UsageError
from .convert import quantize_
from .dispatch import Choice, Problem
from .layer import QuantizedLayer
from .recipe import Recipe
from .suites import Convolution, Layer

Met = dict[Problem, int]  # one problem of each key of a tuned table, and how often such were met

_NOT_THE_USERS = ("<", *(str(Path(m.__file__).parent) + os.sep for m in (torch, dispatch, importlib)))


class Target(NamedTuple):
    """The GPU that problems are posed for."""

    arch: str
    processors: int
    device: str = "cuda"

    @staticmethod
    def of(device: torch.device) -> Target:
        """A GPU of this machine."""
        return Target(*dispatch.device_info(str(device)), device.type)

    def problem(self, op: str, m: int, n: int, k: int = 0, dtype: torch.dtype | None = None, **more) -> Problem:
        """The problem on this GPU, with nothing asked for: any kernel may compete."""
        posed = dispatch.problem(op, torch.device("cpu"), m, n, k, dtype, **more | {"plain": True})
        here = dict(device=self.device, arch=self.arch, processors=self.processors)
        return replace(posed, **here, force="triton" if self.device == "cpu" else "auto", deterministic=False)


@dataclass
class Collected:
    """The problems of a model's step, how many quantized layers it has, and what its user should know."""

    problems: Met
    layers: int = 0
    notes: list[str] = field(default_factory=list)


# ---- recording


@contextlib.contextmanager
def recording(target: Target) -> Iterator[Counter[Problem]]:
    """Within, the operators compute nothing, and what they ask dispatch for is counted. For tensors without data."""
    from fqt_kernels import gemm, gemm_householder, gradient, grouping, householder, quantize, statistics

    met: Counter[Problem] = Counter()

    def choose(op: str, device: Any, m: int, n: int, k: int = 0, dtype: torch.dtype | None = None, **more) -> Choice:
        if m and n and (k or op != "scaled_mm") and op in tuned.OPS:
            met[target.problem(op, m, n, k, dtype, **more)] += 1
        return Choice("triton", (), "recorded", _kernel(target, op, m, n, k, dtype, **more))

    with _replaced(
        *((asking, "choose", choose) for asking in (products, gradients, conv_products)), *collect_conv.fakes(choose),
        (gemm, "scaled_mm", _scaled_mm), (quantize, "quantize", _quantize),
        (gradient, "quantize_gradient", _quantize_gradient), (gradient, "statistics", _statistics),
        (statistics, "row_stats", lambda x, *_: x.new_empty(2, 1, x.shape[0])),
        (grouping, "row_ranges", lambda partial: (partial[0, 0], partial[0, 0])),
        (grouping, "group_rows", lambda ranges, _: (ranges,)), (householder, "transform", _transform),
        (householder, "inverse", _inverse), (gemm_householder, "scaled_mm", _scaled_mm),
        (reference, "mm", torch.matmul),  # without the autocast of a device, which "meta" has none of
    ):  # fmt: skip
        yield met


def _kernel(target: Target, op: str, *sizes: Any, plain: bool = True, **more: Any) -> str:
    """What is launched in place of a kernel: of a convolution's product the path that the heuristic takes."""
    if op not in conv_problems.PRODUCTS:
        return "portable" if op == "scaled_mm" else "tile"
    return conv_problems.path_of(replace(target.problem(op, *sizes, **more), plain=plain))


@contextlib.contextmanager
def _replaced(*fakes: tuple[Any, str, Any]) -> Iterator[None]:
    """Within, these attributes of these objects are others."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in fakes]
    try:
        for owner, name, fake in fakes:
            setattr(owner, name, fake)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _scaled_mm(
    a: Tensor, b: Tensor, *_: Any, out_dtype: torch.dtype | None = None, out: Tensor | None = None, **__: Any
):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype or torch.float32) if out is None else out


def _quantize(
    x: Tensor, *, granularity: str, zero: str, rows: bool = True, cols: bool = False, sums: bool = False, **_: Any
) -> tuple[Tensor | None, ...]:
    m, n = x.shape
    shape = {"per_tensor": (1, 1), "per_row": (m, 1), "per_column": (1, n)}[granularity]
    codes = torch.float8_e4m3fn if zero == "e4m3" else torch.int8
    return (
        x.new_empty((m, n), dtype=codes) if rows else None,
        x.new_empty((n, m), dtype=codes) if cols else None,
        x.new_empty(shape, dtype=torch.float32),
        None if zero in ("symmetric", "e4m3") else x.new_empty(shape, dtype=torch.float32),
        x.new_empty(m, dtype=torch.int32) if sums and rows else None,
        x.new_empty(n, dtype=torch.int32) if sums and cols else None,
    )


def _quantize_gradient(dy: Tensor, g, h, *, sums: bool = False, bias: bool = False, **_: Any):
    from fqt_kernels.gradient import Quantized

    q, _, *g_rest, g_sums, _ = _quantize(dy, granularity=g.granularity, zero=g.zero, sums=sums)
    _, qt, *h_rest, _, h_sums = _quantize(dy, granularity=h.granularity, zero=h.zero, rows=False, cols=True, sums=sums)
    total = dy.new_empty(dy.shape[1], dtype=torch.float32) if bias else None
    return Quantized(q, *g_rest, g_sums), Quantized(qt, *h_rest, h_sums), total


def _statistics(dy: Tensor, *_: Any, bias: bool = False, **__: Any):
    partial = dy.new_empty((2, 1, dy.shape[0]), dtype=torch.int32)
    return partial, partial, dy.new_empty(dy.shape[1], dtype=torch.float32) if bias else None


def _transform(x: Tensor, *_: Any, zero: str, sums: bool = False, **__: Any) -> tuple[Tensor | None, ...]:
    q, _, scale, offset, row_sum, _ = _quantize(x, granularity="per_row", zero=zero, sums=sums)
    return q, scale, offset, row_sum


def _inverse(z: Tensor, *_: Any, out_dtype: torch.dtype, **__: Any) -> Tensor:
    return z.to(out_dtype)


class _Operators(TorchDispatchMode):
    """Runs the own code of each operator of fqt that a step meets, beside its fake implementation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fqt":
            _code(func._opname)(*args, **kwargs)
        return func(*args, **kwargs)


def _code(op: str) -> Callable[..., Any]:
    """The Python code of an operator, beneath the dispatcher."""
    owner = {"conv2d": conv_ops.forward, "conv2d_backward": conv_ops.backward}.get(op) or getattr(ops, op)
    return owner._init_fn


def by_key(met: Iterable[tuple[Problem, int]]) -> Met:
    """One problem, the first, of each key of a tuned table, with the counts of all."""
    first: dict[tuned.Key, Problem] = {}
    counts: Met = {}
    for problem, count in met:
        same = first.setdefault(tuned.key(problem), problem)
        counts[same] = counts.get(same, 0) + count
    return counts


# ---- layers by shape


def of_layers(
    layers: Iterable[Layer], target: Target, recipes: Iterable[str] = ("int8",), dtype: str = "bfloat16"
) -> Met:
    """The problems of a training step of each layer under each recipe, X, W and Y of one dtype.

    Raises:
        ValueError: an unknown recipe or dtype.
    """
    parsed = _parsed(recipes, dtype)
    with recording(target) as met:
        for layer in layers:
            for recipe in parsed:
                _train(layer, recipe, getattr(torch, dtype))
    return by_key(met.items())


def of_convolutions(
    convolutions: Iterable[Convolution], target: Target, recipes: Iterable[str] = ("int8",), dtype: str = "bfloat16"
) -> Met:
    """The problems of a training step of convolutions without bias, in channels_last memory, under each recipe that
    convolutions can have: see `of_layers`."""
    parsed = [recipe for recipe in _parsed(recipes, dtype) if conv_ops.reason_against(recipe) is None]
    found: Counter[Problem] = Counter()
    for of in convolutions:
        for recipe in parsed:
            with recording(target) as met:
                collect_conv.train(of, recipe, getattr(torch, dtype), _code)
            for problem, times in met.items():
                found[problem] += times * of.count
    return by_key(found.items())


def _parsed(recipes: Iterable[str], dtype: str) -> list[Recipe]:
    """Those that quantize anything."""
    if dtype not in tuned.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(tuned.DTYPES)}, got {dtype!r}")
    return [recipe for recipe in map(Recipe.parse, recipes) if not recipe.is_exact]


def _train(layer: Layer, recipe: Recipe, dtype: torch.dtype) -> None:
    """What `fqt.nn.Linear` does in a step, beneath the dispatcher, whose tracing machinery takes a second to import."""
    _, m, n, k = layer
    x, weight = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (m, n))
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    w = products.quantized(weight, recipe.w, cols=True, sums=recipe.affine)
    y, *saved = _code("linear")(
        x, weight, None, w.q, w.qt, w.scale, w.offset, w.row_sum, w.col_sum, rng, str(recipe), dtype, True
    )
    _code("linear_backward")(
        y, *saved, w.qt, w.scale, w.offset, w.col_sum, rng, 0, str(recipe), dtype, dtype, dtype, True, True, False
    )


def read_shapes(path: str | os.PathLike) -> list[Layer]:
    """Layers from a JSON file: [{"name": "mlp", "m": 8192, "n": 28672, "k": 4096}, …], m samples, W (n, k).

    Raises:
        UsageError: the file cannot be read, or what in it is no layer.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"--shapes {path}: {e.strerror or e}") from e
    except ValueError as e:  # of JSON, or of UTF-8
        raise UsageError(f"--shapes {path}: not JSON: {e}") from e
    if not isinstance(items, list) or not items:
        raise UsageError(f'--shapes {path}: a list of layers is wanted: [{{"name": …, "m": …, "n": …, "k": …}}, …]')
    return [_layer(item, f"--shapes {path}: layer {i}") for i, item in enumerate(items, 1)]


def _layer(item: Any, where: str) -> Layer:
    if not isinstance(item, dict) or item.keys() != {"name", "m", "n", "k"}:
        got = f"the fields {', '.join(map(repr, item))}" if isinstance(item, dict) else repr(item)
        raise UsageError(f"{where}: the fields name, m, n and k are wanted, got {got:.200}")
    if not isinstance(item["name"], str):
        raise UsageError(f"{where}: name must be a string, got {item['name']!r:.100}")
    for size in "mnk":
        if type(item[size]) is not int or not 1 <= item[size] < 2**31:
            raise UsageError(f"{where}: {size} must be a whole number from 1 to 2³¹ - 1, got {item[size]!r:.100}")
    return Layer(**item)


# ---- a model


def of_model(spec: str, target: Target, recipes: Iterable[str] | None = None) -> Collected:
    """The problems of one step of the model that `spec`, "module:function", makes (see the top of this file).

    recipes: what the model is quantized with, once for each. None leaves a quantized model as it is, and quantizes
    another with "int8".

    Raises:
        UsageError: nothing to call, no step, nothing to quantize, or what the user's code raises.
    """
    make = _load(spec)
    collected = Collected({})
    counts: Counter[Problem] = Counter()
    for recipe in [None] if recipes is None else [Recipe.parse(r) for r in recipes]:
        counts.update(_of_step(spec, make, target, recipe, collected))
    collected.problems = by_key(counts.items())
    if not counts:
        raise UsageError(f"--model {spec}: its step met no quantized layer")
    return collected


def _of_step(
    spec: str, make: Callable[[], Any], target: Target, recipe: Recipe | None, collected: Collected
) -> Counter:
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device(device), _replaced((nn.Module, "_apply", _converter())), warnings.catch_warnings():
        # torch's, of its own copy.deepcopy: an address of 0 is what a fake tensor has.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with _users(f"--model {spec}"):
            made = make()
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            kind = f"{type(made).__name__} of {len(made)}" if isinstance(made, tuple) else type(made).__name__
            raise UsageError(f"--model {spec}: it must return (model, inputs) or (model, step), got {kind}")
        model, rest = made
        _quantized(model, spec, recipe, collected)
        # Backward passes too on this thread, whose mode it is that sees the operators.
        alone = torch.autograd.set_multithreading_enabled(False)
        with recording(target) as met, alone, _Operators(), _users(f"--model {spec}"):
            rest() if callable(rest) and not isinstance(rest, Tensor) else _step(model, rest)
    return met


def _quantized(model: nn.Module, spec: str, recipe: Recipe | None, collected: Collected) -> None:
    """Quantize the model where asked to, or where it is not; note the layers that are left as they are."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    if recipe is None and layers:
        collected.layers = len(layers)
        return
    report = quantize_(model, recipe or "int8", strict=False)
    skipped: dict[str, list[str]] = {}
    for layer in report.skipped:
        skipped.setdefault(layer.reason, []).append(layer.name or layer.type)
    notes = []
    for reason, names in skipped.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        notes.append(f"{len(names)} layer{'s' * (len(names) > 1)} skipped ({', '.join(names[:4])}{more}): {reason}")
    if not report.converted:
        raise UsageError(
            f"--model {spec}: nothing to quantize: {'; '.join(notes) or 'the model has no nn.Linear or nn.Conv1d, 2d or 3d'}"
        )
    collected.layers = len(report.converted)
    collected.notes += [note for note in notes if note not in collected.notes]


def _converter() -> Callable[..., nn.Module]:
    """What stands in for `nn.Module._apply`, through which `.to()` and `.cuda()` go: torch's own refuses fake parameters.

    Parameters are replaced, not changed, and shared ones stay shared.
    """
    seen: dict[tuple[int, int], tuple[Any, Tensor, Tensor]] = {}  # with what the ids are of: no other gets them

    def convert(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        if (id(fn), id(tensor)) not in seen:
            with torch.no_grad():
                new = fn(tensor)
            new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            seen[id(fn), id(tensor)] = fn, tensor, new
        return seen[id(fn), id(tensor)][2]

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                child._apply(fn)
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: convert(t, fn) for name, t in tensors.items() if t is not None})
        return module

    return apply


def _step(model: nn.Module, inputs: Any) -> None:
    """Forward, and backward from every output that has a gradient."""
    if isinstance(inputs, dict):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        raise UsageError("no output of the model has a gradient; return (model, step) with the whole step instead")
    torch.autograd.backward(leaves, [torch.ones_like(t) for t in leaves])


def _load(spec: str) -> Callable[[], Any]:
    """The function that "package.module:function" names; modules are also looked for in the current folder."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UsageError(f"--model wants module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _users(f"--model {spec}"):
        found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"--model {spec}: module {module} has no function {name!r}")
    return found


@contextlib.contextmanager
def _users(what: str) -> Iterator[None]:
    """Whatever the user's code raises, as one line that says where."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{what}: {e}") from e
    except (Exception, SystemExit) as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
        where = f"{frames[-1].filename.removeprefix(os.getcwd() + os.sep)}:{frames[-1].lineno}: " if frames else ""
        text = (str(e).strip() or "no message").splitlines()[0][:300]
        hint = " (a step runs on tensors without data)" if type(e).__name__.startswith("DataDependent") else ""
        raise UsageError(f"{what}: {where}{type(e).__name__}: {text}{hint}") from e
