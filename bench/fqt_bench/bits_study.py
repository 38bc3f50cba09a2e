"""At how many bits each gradient quantizer begins to lose: accuracy and gradient variance on the demo's data, by seeds.

    python -m fqt_bench.bits_study --out FILE.json

Trains the demo's network under qat8 (full-precision gradients) and under ptq, psq, bhq and auto from 8 down to 2 bits,
and draws FILE.png beside FILE.json. The demo's batches are of 128 rows, one tile: there bhq-tile is bhq to the bit.
What its smaller groups cost is measured on larger batches, of one network, as relative variance of the weight gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fqt import demo, rng
from fqt.convert import quantize_
from fqt.nn import Linear
from fqt.recipe import Recipe

from . import environment

BASELINES = ("exact", "qat8")
FAMILIES = ("ptq", "psq", "bhq", "auto")
BITS = (8, 7, 6, 5, 4, 3, 2)
STANDARD_ERRORS = 2.0
RULE = (
    f"At b bits a quantizer loses if a run of it diverged, or if its mean accuracy is more than {STANDARD_ERRORS:g} "
    "standard errors of the difference below qat8's, over the same seeds: √((s² + s₀²)/n) of the sample variances s² and "
    "s₀² and n seeds. It begins to lose at the largest b from which on it loses at every smaller number of bits as well."
)
ROWS = (128, 512, 2048)  # batches on which tiles are compared with global groups
TILED = ("ptq", "psq", "bhq", "bhq-tile", "auto", "auto-tile")
Figures = dict[str, Any]


def recipe_of(family: str, bits: int) -> str:
    """The name of a family's recipe: ("bhq-tile", 5) is "bhq5-tile"."""
    name, dash, groups = family.partition("-")
    return f"{name}{bits}{dash}{groups}"


# ---- what is measured


def study(epochs: int, seeds: int, families: Sequence[str], bits: Sequence[int], data: demo.Digits) -> Figures:
    """Every recipe with every seed: {"recipes": {name: runs, means and deviations}, "batches": variances by batch size}."""
    names = [*BASELINES, *(recipe_of(family, b) for family in families for b in bits)]
    recipes: dict[str, Figures] = {}
    began = time.perf_counter()
    for name in names:
        runs = [demo.train(name, seed, data, epochs, lambda text: None) for seed in range(seeds)]
        for run in runs:
            del run["step_ms"]  # of a machine that may be shared
        recipes[name] = {"runs": runs, **summary(runs)}
        print(f"bits study: {time.perf_counter() - began:5.0f} s  {name}", file=sys.stderr, flush=True)
    b = sorted(bits)[len(bits) // 2]
    return {"recipes": recipes, "batches": [by_batch(seed, epochs, b, data) for seed in range(min(seeds, 3))]}


def summary(runs: Sequence[Figures]) -> Figures:
    """Accuracy: mean and sample standard deviation of the runs that did not diverge. Variance: means by epoch."""
    accuracies = [run["accuracy"] for run in runs if not run["diverged"]]
    variances = {}
    for when in ("first_epoch", "last_epoch"):
        known = [v for run in runs if (v := run["gradient_variance"][when]) is not None]
        variances[when] = statistics.fmean(known) if known else None
    return {
        "diverged": len(runs) - len(accuracies),
        "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "gradient_variance": variances,
    }


def by_batch(seed: int, epochs: int, bits: int, data: demo.Digits) -> Figures:
    """Relative variance of the weight gradients of one network, trained as the demo does under qat8, by epoch, rows of the
    batch and quantizer: {"epochs": {"8": {"512": {"bhq-tile": …}}}}."""
    torch.manual_seed(seed)
    rng.manual_seed(seed)
    model = demo.mlp(data.train_x.shape[1])
    quantize_(model, "qat8")
    optimizer = torch.optim.SGD(model.parameters(), lr=demo.LEARNING_RATE, momentum=demo.MOMENTUM)
    order = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] = demo.LEARNING_RATE * (1 - (epoch - 1) / epochs)
        demo._epoch(model, optimizer, data, torch.randperm(len(data.train_x), generator=order), [])
        if epoch in (1, epochs):
            sizes = sorted({min(rows, len(data.train_x)) for rows in ROWS})
            found[str(epoch)] = {
                str(rows): {family: _variance(model, recipe_of(family, bits), data, rows) for family in TILED}
                for rows in sizes
            }
    return {"seed": seed, "bits": bits, "epochs": found}


def _variance(model: nn.Module, recipe: str, data: demo.Digits, rows: int) -> float:
    """Of the gradients that the network would have under the recipe; its own recipes are afterwards what they were."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    before = [layer.recipe for layer in layers]
    for layer in layers:
        layer.recipe = Recipe.parse(recipe)
    x, y = data.train_x[:rows], data.train_y[:rows]
    found = demo.gradient_variance(model, lambda m: F.cross_entropy(m(x), y))
    for layer, own in zip(layers, before, strict=True):
        layer.recipe = own
    return found


# ---- what it says


def loses(recipe: Figures, base: Figures) -> bool:
    """`RULE` at one number of bits; base: of qat8. One seed has no spread: any difference counts."""
    if recipe["diverged"]:
        return True
    variances = [(r["accuracy_std"] or 0.0) ** 2 for r in (recipe, base)]
    error = (sum(variances) / len(recipe["runs"])) ** 0.5
    return recipe["accuracy_mean"] < base["accuracy_mean"] - STANDARD_ERRORS * error


def begins_to_lose(recipes: Mapping[str, Figures], family: str, bits: Sequence[int]) -> int | None:
    """The bit-width of `RULE`, None where the quantizer does not lose at the fewest bits."""
    begin = None
    for b in sorted(bits):
        if not loses(recipes[recipe_of(family, b)], recipes["qat8"]):
            break
        begin = b
    return begin


def tables(result: Figures) -> str:
    """Markdown: accuracy and variance by bits, where each quantizer begins to lose, and the variance by batch size."""
    recipes, epochs = result["recipes"], result["arguments"]["epochs"]
    families, bits = result["arguments"]["families"], result["arguments"]["bits"]
    lines = [f"| bits | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    lines += [f"| {b} | {' | '.join(_accuracy(recipes, family, b) for family in families)} |" for b in bits]
    lines.append(f"| loses from | {' | '.join(_begin(recipes, family, bits) for family in families)} |")
    baselines = ", ".join(f"{name} {_mean(recipes[name])}" for name in BASELINES)
    seeds = result["arguments"]["seeds"]
    lines += ["", f"Test accuracy in %, mean ± standard deviation of {seeds} seeds; **bold**: loses. {baselines}.", ""]
    lines += [f"| bits | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for b in bits:
        cells = [_variances(recipes[recipe_of(family, b)]) for family in families]
        lines.append(f"| {b} | {' | '.join(cells)} |")
    lines += ["", f"Relative variance of the weight gradients after epoch 1 / after epoch {epochs}.", ""]
    return "\n".join([*lines, *_batch_table(result["batches"])])


def _begin(recipes: Mapping[str, Figures], family: str, bits: Sequence[int]) -> str:
    begin = begins_to_lose(recipes, family, bits)
    return f"not down to {min(bits)}" if begin is None else f"{begin} bits"


def _accuracy(recipes: Mapping[str, Figures], family: str, bits: int) -> str:
    r = recipes[recipe_of(family, bits)]
    return f"**{_mean(r)}**" if loses(r, recipes["qat8"]) else _mean(r)


def _mean(r: Figures) -> str:
    said = "" if r["accuracy_mean"] is None else f"{100 * r['accuracy_mean']:.2f}"
    said += "" if r["accuracy_std"] is None else f" ± {100 * r['accuracy_std']:.2f}"
    diverged = f"{r['diverged']} of {len(r['runs'])} diverged" if r["diverged"] else ""
    return ", ".join(filter(None, (said, diverged)))


def _variances(r: Figures) -> str:
    return " / ".join(_short(r["gradient_variance"][when]) for when in ("first_epoch", "last_epoch"))


def _short(value: float | None) -> str:
    return "diverged" if value is None else f"{value:#.3g}"


def _batch_table(batches: Sequence[Figures]) -> list[str]:
    """Relative variance by rows of the batch, the mean over the seeds."""
    lines = [f"| {batches[0]['bits']} bits | rows | {' | '.join(TILED)} |", "|---" * (len(TILED) + 2) + "|"]
    for epoch, by_rows in batches[0]["epochs"].items():
        for rows in by_rows:
            cells = [_short(statistics.fmean(b["epochs"][epoch][rows][family] for b in batches)) for family in TILED]
            lines.append(f"| after epoch {epoch} | {rows} | {' | '.join(cells)} |")
    return lines


# ---- the plot

_MARKERS = {"ptq": ("#D55E00", "s"), "psq": ("#009E73", "^"), "bhq": ("#0072B2", "o"), "auto": ("#CC79A7", "D")}


def plot(result: Figures, path: Path) -> None:
    """Accuracy with its spread, and the relative gradient variance on a logarithmic axis, by bits."""
    from matplotlib.figure import Figure

    recipes, arguments = result["recipes"], result["arguments"]
    families, bits = arguments["families"], arguments["bits"]
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    accuracy, variance = figure.subplots(1, 2)
    base = recipes["qat8"]
    spread = 100 * (base["accuracy_std"] or 0.0)
    accuracy.axhspan(100 * base["accuracy_mean"] - spread, 100 * base["accuracy_mean"] + spread, color="0.88")
    accuracy.axhline(100 * base["accuracy_mean"], color="0.5", linewidth=1, label="qat8 ± std")
    for i, family in enumerate(families):
        color, marker = _MARKERS[family]
        made = [recipes[recipe_of(family, b)] for b in bits]
        x = [b - 0.13 * (i - (len(families) - 1) / 2) for b in bits]  # side by side: bits fall to the right
        accuracy.errorbar(x, [_percent(r["accuracy_mean"]) for r in made], [_percent(r["accuracy_std"]) for r in made],
                          color=color, marker=marker, markersize=5, linewidth=1.2, capsize=2.5, label=family)  # fmt: skip
        for when, fill, dash in (("first_epoch", "none", ":"), ("last_epoch", "full", "-")):
            y = [r["gradient_variance"][when] or float("nan") for r in made]
            variance.plot(bits, y, dash, color=color, marker=marker, markersize=5, fillstyle=fill, linewidth=1.2,
                          label=family if fill == "full" else None)  # fmt: skip
    for axes in (accuracy, variance):
        axes.set_xticks(bits)
        axes.invert_xaxis()
        axes.set_xlabel("bits of the gradient codes")
        axes.grid(alpha=0.3)
    accuracy.set_title(f"Test accuracy, %: mean ± std of {arguments['seeds']} seeds", fontsize=11)
    accuracy.legend(loc="lower left", fontsize=9)
    variance.set(yscale="log")
    variance.set_title("Relative gradient variance  E‖ĝ − g‖² / ‖g‖²", fontsize=11)
    variance.plot([], [], "o:", color="0.4", fillstyle="none", label="after epoch 1")
    variance.plot([], [], "o-", color="0.4", label=f"after epoch {arguments['epochs']}")
    variance.legend(loc="upper left", fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.bits_study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the plot is FILE.png")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--draw", action="store_true", help="only draw and print what FILE.json holds")
    args = parser.parse_args(argv)
    if args.draw:
        result = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)  # the matrices are too small for more
        data = demo.load_digits()
        chosen = {name: getattr(args, name) for name in ("epochs", "seeds", "families", "bits")}
        result = {
            "kind": "accuracy and gradient variance by bits",
            "rule": RULE,
            "environment": environment.environment(torch.device("cpu")),
            "data": {"name": data.name, "train": len(data.train_x), "test": len(data.test_x)},
            "arguments": {**chosen, "hidden": demo.HIDDEN, "batch": demo.BATCH, "learning_rate": demo.LEARNING_RATE,
                          "momentum": demo.MOMENTUM, "draws": demo.DRAWS},
            **study(data=data, **chosen),
        }  # fmt: skip
        environment.write(args.out, result)
    plot(result, args.out.with_suffix(".png"))
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
