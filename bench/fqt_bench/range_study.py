"""What ranges that are not found in the gradient cost: variance, bias, clipping, bytes, on gradients of the demo's data.

    python -m fqt_bench.range_study --out FILE.json

Two networks are trained in full precision, with the demo's data, batch, learning rate and momentum. Of every step, the
gradient of one layer is computed as the quantized layer above makes it (8 bits, symmetric, per row), and its range taken
from the values and in the ways of `fqt.ranges`; of a few steps, the gradient is then quantized many times.

    relu    the demo's network. dY of its second layer is the dX of the third, over 10 classes, through ReLU, which only
            makes elements zero: what bounds dX bounds dY, but the tensor is another, and nothing is handed over.
    stack   Linear directly under Linear, both 256 wide: dY is dX, and its rows' magnitudes are handed over.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt import demo, products, ranges, reference
from fqt.cli import table
from fqt.ranges import Rows, row_ranges_for
from fqt.recipe import Quantizer

from . import environment

BITS = (8, 6, 4)
MARGINS = (1.0, 1.25, 1.5, 2.0)
GROUPS = 16  # of draws, for the standard error of a squared bias
Figures = dict[str, Any]


class Step(NamedTuple):
    """One step's gradient dY (M, N), what is known of its rows, and the scales of W that int8 recipes fold into it."""

    dy: Tensor
    epilogue: Rows
    bound: Rows
    scales: Tensor


class Scheme(NamedTuple):
    """Where a range comes from; known: which rows it is told of ("epilogue", "bound", or "" for none)."""

    name: str
    range: str
    known: str
    granularity: str
    folded: bool


SCHEMES = [
    *[Scheme(name, range, known, "per_row", folded) for folded in (False, True) for name, range, known in (
        ("exact", "exact", ""), ("epilogue", "bound", "epilogue"), ("bound before", "bound", "bound"),
        ("delayed share", "delayed", "bound"))],
    *[Scheme(name, range, known, "per_tensor", False) for name, range, known in (
        ("exact", "exact", ""), ("bound before", "bound", "bound"), ("delayed", "delayed", ""))],
]  # fmt: skip


# ---- gradients


def network(name: str, inputs: int) -> tuple[nn.Sequential, int]:
    """A network, and the position of the layer whose dY is looked at; the layer above is the next Linear."""
    if name == "relu":
        return demo.mlp(inputs), 2
    wide = demo.HIDDEN
    layers = nn.Linear(inputs, wide), nn.ReLU(), nn.Linear(wide, wide), nn.Linear(wide, wide), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(wide, 10)), 2


def gradients(name: str, data: demo.Digits, steps: int) -> Iterator[Step]:
    """Train a network, and yield every step's gradient before its update."""
    torch.manual_seed(0)
    model, at = network(name, data.train_x.shape[1])
    above = next(i for i in range(at + 1, len(model)) if isinstance(model[i], nn.Linear))
    optimizer = torch.optim.SGD(model.parameters(), lr=demo.LEARNING_RATE, momentum=demo.MOMENTUM)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = torch.randint(len(data.train_x), (demo.BATCH,), generator=order)
        values = [data.train_x[batch]]
        for layer in model:
            values.append(layer(values[-1]))
        values[above + 1].retain_grad()
        optimizer.zero_grad()
        F.cross_entropy(values[-1], data.train_y[batch]).backward()
        passed = values[above] > 0 if above > at + 1 else None
        yield _quantized(values[above + 1].grad, model[above].weight.detach(), model[at].weight.detach(), passed, step)
        optimizer.step()


def _quantized(g: Tensor, w_above: Tensor, w: Tensor, passed: Tensor | None, step: int) -> Step:
    """dY as a quantized layer above makes it of its own gradient g: dX, where ReLU let it pass."""
    row = Quantizer(8, "per_row", "symmetric", "stochastic")
    a = reference.quantize(g, row, rng=torch.tensor([7, step])).rows()
    b = reference.quantize(w_above, Quantizer(8, "per_tensor", "symmetric"), rows=False, cols=True).cols()
    absmax = torch.zeros(len(g), dtype=torch.int32)
    dx = products.product(a, b, row_absmax=absmax)
    scales = reference.quantize(w, Quantizer(8, "per_row", "symmetric")).scale.t()
    before = Rows(ranges.bound_from_product(a, b), exact=False)
    return Step(dx if passed is None else dx * passed, Rows(absmax, exact=passed is None), before, scales)


# ---- what is measured


def study(data: demo.Digits, steps: int, draws: int) -> Figures:
    """{network: {"schemes": figures of every scheme, "margins": of delayed ranges by margin}}."""
    looked_at = sorted({round(i * (steps - 1) / 4) for i in range(1, 5)} | {1})
    result = {}
    for name in ("relu", "stack"):
        print(f"fqt range study: {name}", file=sys.stderr)
        seen = list(gradients(name, data, steps))
        schemes = [_scheme(scheme, seen, looked_at, draws) for scheme in SCHEMES]
        delayed = [scheme for scheme in SCHEMES if scheme.range == "delayed"]
        margins = [_margin(scheme, seen, margin, draws) for scheme in delayed for margin in MARGINS]
        result[name] = {"schemes": schemes, "margins": margins}
    return {"networks": result, "looked_at": looked_at}


def _ranges(scheme: Scheme, seen: Sequence[Step], margin: float = ranges.MARGIN) -> tuple[list[Tensor], list[Tensor]]:
    """A scheme's ranges of every step, and the true ones."""
    quantizer = Quantizer(8, scheme.granularity, "symmetric", "stochastic", range=scheme.range)
    state, given, true = ranges.new_state()[0], [], []
    for step in seen:
        multiplier = step.scales if scheme.folded else None
        y = step.dy * step.scales if scheme.folded else step.dy
        true.append(y.abs().amax(1) if scheme.granularity == "per_row" else y.abs().amax().reshape(1))
        known = getattr(step, scheme.known) if scheme.known else None
        absmax = row_ranges_for(quantizer, step.dy, multiplier, known, state, margin)
        given.append(true[-1] if absmax is None else absmax.view(torch.float32))
    return given, true


def _scheme(scheme: Scheme, seen: Sequence[Step], looked_at: Sequence[int], draws: int) -> Figures:
    given, true = _ranges(scheme, seen)
    figures: Figures = {**scheme._asdict(), "width": _width(given, true), "clipped": _clipped(scheme, given, seen)}
    figures["bits"] = {}
    for bits in BITS:
        quantizer = Quantizer(bits, scheme.granularity, "symmetric", "stochastic")
        measured = [_draws(seen[i], given[i], scheme, quantizer, draws) for i in looked_at]
        bias = statistics.fmean(m["bias_squared"] for m in measured)
        error = math.sqrt(sum(m["standard_error"] ** 2 for m in measured)) / len(measured)
        figures["bits"][bits] = {
            "variance": statistics.fmean(m["variance"] for m in measured),
            "bias": math.sqrt(max(bias, 0.0)),
            "bias_squared": bias,
            "standard_error": error,
            "bias_of_clipping": math.sqrt(statistics.fmean(m["bias_of_clipping"] ** 2 for m in measured)),
            "steps": measured,
        }
    return figures


def _width(given: Sequence[Tensor], true: Sequence[Tensor]) -> Figures:
    """How much wider the ranges are than the true ones, over all groups of all steps."""
    ratio = torch.cat([g[t > 0] / t[t > 0] for g, t in zip(given, true, strict=True)])
    low, median, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"median": median, "p95": high, "p05": low}


def _clipped(scheme: Scheme, given: Sequence[Tensor], seen: Sequence[Step]) -> Figures:
    """Elements beyond their range, of all steps; the share of steps that had any; the step that had most, or None."""
    counts = []
    for r, step in zip(given, seen, strict=True):
        y = step.dy * step.scales if scheme.folded else step.dy
        counts.append(int((y.abs() > r[:, None]).sum()))
    rate, steps = (total / len(counts) for total in (sum(counts) / seen[0].dy.numel(), sum(c > 0 for c in counts)))
    return {"rate": rate, "steps": steps, "worst": counts.index(max(counts)) if any(counts) else None}


def _margin(scheme: Scheme, seen: Sequence[Step], margin: float, draws: int) -> Figures:
    """Widths and clipping of a delayed range with this margin, and the bias, at 8 bits, of the step that clipped most."""
    given, true = _ranges(scheme, seen, margin)
    width, clipped = _width(given, true), _clipped(scheme, given, seen)
    worst, bias = clipped["worst"], None
    if worst is not None:
        quantizer = Quantizer(8, scheme.granularity, "symmetric", "stochastic")
        bias = _draws(seen[worst], given[worst], scheme, quantizer, draws)
    return {**scheme._asdict(), "margin": margin, "width": width, "clipped": clipped, "worst": bias}


def _draws(step: Step, absmax: Tensor, scheme: Scheme, quantizer: Quantizer, draws: int) -> Figures:
    """Relative variance E‖q-g‖²/‖g‖² and squared bias ‖E q - g‖²/‖g‖², with the standard error of the latter.

    The squared norm of a mean error holds the variance of the mean; products of the means of different draws do not. The
    standard error is the jackknife's over groups of draws.
    """
    multiplier = step.scales if scheme.folded else None
    g = (step.dy * step.scales if scheme.folded else step.dy).double()
    means, square = torch.zeros(GROUPS, g.numel(), dtype=torch.float64), 0.0
    for i in range(draws):
        q = reference.quantize(
            step.dy, quantizer, multiplier=multiplier, rng=torch.tensor([11, i]), row_absmax=absmax.view(torch.int32)
        )
        error = (q.dequantize().double() - g).flatten()
        square += float(error @ error) / draws
        means[i % GROUPS] += error / (draws // GROUPS)
    norm = float(g.square().sum())
    products_ = means @ means.t() / norm
    products_.fill_diagonal_(0)
    total, by_group = float(products_.sum()), 2 * products_.sum(1)
    left_out = (total - by_group) / ((GROUPS - 1) * (GROUPS - 2))
    jackknife = float((left_out - left_out.mean()).square().sum()) * (GROUPS - 1) / GROUPS
    beyond = (g.abs() - absmax[:, None].double()).clamp(min=0)
    return {
        "variance": square / norm,
        "bias_squared": total / (GROUPS * (GROUPS - 1)),
        "standard_error": math.sqrt(jackknife),
        "bias_of_clipping": float(beyond.norm()) / math.sqrt(norm),
    }


# ---- bytes


def traffic(n: int = 4096) -> list[Figures]:
    """Bytes for each element of a bfloat16 dY (M, n), from where the product above has it in registers to dgrad's codes.

    Arithmetic from the sizes alone; nothing here is measured. A row's magnitude is 4 bytes, written once and read once.
    """
    row = 8 / n
    return [
        {"scheme": "exact", "parts": "dY written 2, read for its range 2, read 2, codes 1", "bytes": 7 + row},
        {"scheme": "epilogue", "parts": "dY written 2, read 2, codes 1", "bytes": 5 + row},
        {"scheme": "bound or delayed, codes from a pass", "parts": "dY written 2, read 2, codes 1", "bytes": 5 + row},
        {"scheme": "bound or delayed, codes from the product", "parts": "codes 1 (not built)", "bytes": 1 + row},
    ]


# ---- the report


def report(result: Figures) -> str:
    """The tables of a result."""
    header = ("network", "quantizer", "range", "width", "95 %", "clipped", "in steps")
    header += tuple(f"{b} bit: {what}" for b in BITS for what in ("variance", "bias (z)"))
    rows, margins = [], []
    for name, figures in result["networks"].items():
        for s in figures["schemes"]:
            cells = [f"{f['variance']:.3g} | {_bias(f)}".split(" | ") for f in s["bits"].values()]
            rows.append([name, _label(s), s["name"], *_ranges_cells(s), *[c for pair in cells for c in pair]])
        margins += [
            [name, _label(m), m["name"], f"{m['margin']:g}", *_ranges_cells(m), *_worst_cells(m["worst"])]
            for m in figures["margins"]
        ]
    notes = [
        "width: range / true range, median and 95 % quantile over the groups of all steps. Clipped: of all elements.",
        "variance: E|q-g|^2/|g|^2; bias: |Eq-g|/|g|, with its square's z; means over the steps looked at.",
        "Worst step: the one that clipped most elements, at 8 bits; |clip(g) - g|/|g| is the bias that clipping must have.",
        "folded: the scales of W by output channel are folded into dY, as in int8.",
    ]
    bytes_ = [[t["scheme"], f"{t['bytes']:.2f}", t["parts"]] for t in result["bytes"]]
    return "\n".join([
        table(header, rows, right=range(3, len(header))), "", *notes, "",
        table((*header[:3], "margin", *header[3:7], "worst step: bias of clipping", "measured (z)"), margins,
              right=range(3, 10)), "",
        table(("range", "bytes/element", "arithmetic, not measured"), bytes_, right=(1,)),
    ])  # fmt: skip


def _label(s: Figures) -> str:
    return s["granularity"] + ", folded" * s["folded"]


def _ranges_cells(s: Figures) -> list[str]:
    width, clipped = s["width"], s["clipped"]
    return [f"{width['median']:.2f}", f"{width['p95']:.2f}", f"{clipped['rate']:.2g}", f"{clipped['steps']:.0%}"]


def _worst_cells(worst: Figures | None) -> list[str]:
    if worst is None:
        return ["none clipped", ""]
    bias = math.sqrt(max(worst["bias_squared"], 0.0))
    return [f"{worst['bias_of_clipping']:.1e}", f"{bias:.1e} ({worst['bias_squared'] / worst['standard_error']:.1f})"]


def _bias(f: Figures) -> str:
    return f"{f['bias']:.1e} ({f['bias_squared'] / f['standard_error']:.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.range_study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--draws", type=int, default=64, help=f"of a step's gradient, a multiple of {GROUPS}")
    args = parser.parse_args(argv)
    if args.steps < 8 or args.draws < GROUPS or args.draws % GROUPS:
        parser.error(f"steps are at least 8, draws a multiple of {GROUPS}")
    torch.set_num_threads(1)  # the matrices are too small for more
    data = demo.load_digits()
    result = {
        "environment": environment.environment(torch.device("cpu")),
        "data": data.name,
        "arguments": {"steps": args.steps, "draws": args.draws, "margin": ranges.MARGIN, "history": ranges.HISTORY},
        **study(data, args.steps, args.draws),
        "bytes": traffic(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, allow_nan=False), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
