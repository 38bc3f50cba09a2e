"""Does anything grow in a long training run? Memory, live tensors and fqt's own caches over thousands of steps.

    python -m fqt_bench.endurance --steps 10000 --recipes int8 psq8 bhq8 --out FILE.json

Each recipe trains two small networks, an MLP with fqt.optim.PSGD and a convolutional one with torch's AdamW, in rounds of
PERIOD steps that are all alike: batches of four sizes, an evaluation without and one in inference mode, a checkpoint that is
written and read back, and a network that is made, converted, trained for a step, given other weights and thrown away. At the
ends of rounds the memory is counted, of the first ones each, later of some. A tenth of the counts are warm-up; after them
nothing may be more than it was then:

    allocated      bytes: torch.cuda.memory_allocated, without a GPU the storages of all live tensors
    tensors        live ones that Python knows
    caches         entries of each container of fqt, and of the optimizers: module globals, functools caches, registries
    host           resident bytes of the process, which may grow by `live.HOST_SLACK`, 64 MiB
    left behind    layers of networks that were thrown away (weak references)
    losses         of all steps are finite

On a GPU a whole training step of each network is captured in a CUDA graph as well, and replayed as often. Each run does its
first round, in which the kernels are compiled, before its share of --limit-s begins. The file is written after each run.
Exit status: 0 nothing grew, 1 something did, or was "not judged", 2 a mistake in the call, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqt
from fqt.cli import INTERRUPTED
from fqt.optim import PSGD, PSGDAdamW

from . import environment
from .live import LEAST, Record, count, first, judge

PERIOD = 16  # steps of a round
BATCHES = (8, 5, 16, 3)
COUNTS = 64  # of a run, about: each takes half a second
DENSE = 8  # counts at the beginning of a run, after each round, so that one that is cut short has some
RECIPES = ("int8", "psq8", "bhq8")


@dataclass
class Run:
    """What was counted of one recipe's training, or of the replays of its graphs.

    grown: what grew, one line each.   not_judged: why nothing can be said, "" if the counts were judged.
    """

    name: str
    steps: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    not_judged: str = "interrupted"

    @property
    def status(self) -> str:
        """ "grew", "not judged" or "nothing grew"."""
        return "grew" if self.grown else "not judged" if self.not_judged else "nothing grew"

    def as_dict(self) -> dict[str, Any]:
        """Of the records the tensors and caches are told of the first after the warm-up and of the last only."""
        thin = [
            asdict(r) | {"tensors": sum(r.tensors.values()), "caches": sum(r.caches.values())} for r in self.records
        ]
        ends = {} if not self.records else {"first": asdict(first(self.records)), "last": asdict(self.records[-1])}
        return {"name": self.name, "status": self.status, "not_judged": self.not_judged, "grown": self.grown,
                "steps": self.steps, "seconds": round(self.seconds, 1), "records": thin, **ends}  # fmt: skip


# ---- what is trained


def mlp(recipe: str, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    """(network, shape of a sample)."""
    model = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    return _quantized(model, recipe, device), (24,)


def cnn(recipe: str, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    """(network, shape of a sample); channels_last."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 4))
    return _quantized(model.to(memory_format=torch.channels_last), recipe, device), (3, 6, 6)


def _quantized(model: nn.Module, recipe: str, device: torch.device) -> nn.Module:
    model = model.to(device)
    fqt.quantize_(model, recipe)
    return model


def train_step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    """One step towards an output of the inputs' first four numbers; the loss, on its device."""
    optimizer.zero_grad()
    loss = (model(x) - x.flatten(1)[:, :4]).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Trainer:
    """The two networks of a recipe, and the rounds they are trained in.

    left: layers of networks that were thrown away, by weak references, which are still there.   losses: not yet looked at.
    """

    def __init__(self, recipe: str, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.pairs: list[tuple[nn.Module, Any, tuple[int, ...]]] = []
        (dense, x), (convs, images) = mlp(recipe, device), cnn(recipe, device)
        options = dict(lr=0.01, momentum=0.9, weight_decay=1e-3)
        groups = fqt.optim.param_groups(dense, target="grid+zero", bits=8)
        self.pairs.append((dense, PSGD(groups, **options), x))
        adamw = torch.optim.AdamW(convs.parameters(), lr=1e-3, capturable=device.type == "cuda")
        self.pairs.append((convs, adamw, images))
        self.left: list[str] = []
        self.losses: list[Tensor] = []

    def step(self, number: int) -> None:
        """Step `number` of a run; what else there is to do depends on its place in the round."""
        place = number % PERIOD
        for model, optimizer, shape in self.pairs:
            x = self._batch(BATCHES[number % len(BATCHES)], shape)
            self.losses.append(train_step(model, optimizer, x))
            if place == PERIOD // 4:
                model.eval()
                for context in (torch.no_grad(), torch.inference_mode()):
                    with context:
                        self.losses.append(model(x).square().mean())
                model.train()
            if place == PERIOD // 2:
                self._checkpoint(model, optimizer)
        if place == PERIOD * 3 // 4:
            self._throw_away(number)
        if place == PERIOD - 1:
            self._look_at_losses(number)

    def _batch(self, n: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(n, *shape, device=self.device)

    def _checkpoint(self, model: nn.Module, optimizer: Any) -> None:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), fqt.get_rng_state(model)], file)
        file.seek(0)
        weights, state, streams = torch.load(file, map_location=self.device)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        fqt.set_rng_state(model, streams)

    def _throw_away(self, number: int) -> None:
        """Networks that live for a step or two, with and without weights held in int8."""
        gone = [weakref.ref(layer) for make in (mlp, cnn) for layer in self._passing(make)]
        gc.collect()
        self.left += [f"{type(m).__name__} made in step {number}" for ref in gone if (m := ref()) is not None]

    def _passing(self, make: Callable) -> list[nn.Module]:
        model, shape = make(self.recipe, self.device)
        x = self._batch(BATCHES[0], shape)
        with fqt.recording(model):
            train_step(model, torch.optim.SGD(model.parameters(), lr=0.01), x)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        train_step(model, PSGD(fqt.optim.param_groups(model), lr=0.01, momentum=0.9), x)
        if self.recipe == "int8":
            fqt.hold_int8_(model)
            train_step(model, PSGDAdamW(fqt.optim.param_groups(model)), x)
        return list(model.modules())

    def _look_at_losses(self, number: int) -> None:
        if not bool(torch.stack(self.losses).isfinite().all()):
            raise Diverged(f"a loss of the last {PERIOD} steps before step {number + 1} is not finite")
        self.losses.clear()

    def roots(self) -> dict[str, object]:
        """What has containers that could grow beside fqt's modules."""
        return {f"{type(o).__name__}": o for _, o, _ in self.pairs} | {
            f"{type(o).__name__}.state": o.state for _, o, _ in self.pairs
        }


class Diverged(Exception):
    """A loss is not finite."""


# ---- runs


def train(run: Run, recipe: str, steps: int, device: torch.device, until: Callable[[], float]) -> None:
    """Train a recipe's networks; until: asked after the first round, when by `time.monotonic` no further one is begun."""
    torch.manual_seed(0)
    fqt.manual_seed(0)
    trainer = Trainer(recipe, device)
    _rounds(run, trainer.step, steps, device, until, trainer.roots)
    run.grown += [f"left behind: {name}" for name in dict.fromkeys(trainer.left)]


def replay(run: Run, recipe: str, steps: int, device: torch.device, until: Callable[[], float]) -> None:
    """Capture a training step of each of a recipe's networks, and replay them with new inputs; until: as of `train`."""
    torch.manual_seed(0)
    trainer = Trainer(recipe, device)
    graphs = [
        captured(model, optimizer, trainer._batch(BATCHES[0], shape)) for model, optimizer, shape in trainer.pairs
    ]

    def step(number: int) -> None:
        for graph, x, loss in graphs:
            x.normal_()
            graph.replay()
            trainer.losses.append(loss.clone())
        if number % PERIOD == PERIOD - 1:
            trainer._look_at_losses(number)

    _rounds(run, step, steps, device, until, trainer.roots)


def captured(model: nn.Module, optimizer: Any, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """(graph, its input, its loss) of a training step, after three steps on another stream, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = train_step(model, optimizer, x)
    return graph, x, loss


def _rounds(
    run: Run, step: Callable[[int], None], steps: int, device: torch.device, until: Callable[[], float], roots: Callable
) -> None:
    """Run rounds of steps, count after some, and judge: by counts at equal distances, if there are enough of them."""
    start, end, every = time.monotonic(), math.inf, PERIOD * max(steps // PERIOD // COUNTS, 1)
    for number in range(steps):
        if number == PERIOD:
            end = until()
        if number % PERIOD == 0 and time.monotonic() >= end:
            break
        try:
            step(number)
        except Diverged as e:
            run.grown.append(f"losses: {e}")
            break
        run.steps = number + 1
        run.seconds = time.monotonic() - start
        if run.steps % every == 0 or (run.steps % PERIOD == 0 and len(run.records) < DENSE):
            run.records.append(count(run.steps, device, roots()))
    regular = [r for r in run.records if r.steps % every == 0]
    if len(regular) >= DENSE:
        run.records = regular
    run.not_judged = "" if len(run.records) >= LEAST else f"too few counts: {len(run.records)}, {LEAST} are needed"
    run.grown += [] if run.not_judged else judge(run.records)


def runs(done: list[Run], recipes: Sequence[str], steps: int, device: torch.device, limit_s: float) -> Iterator[Run]:
    """The runs of all recipes, each with an equal share of what is left of the time. done: gets each when it begins."""
    kinds = {train: "", replay: ", CUDA graph"} if device.type == "cuda" else {train: ""}
    todo = [(kind, recipe, recipe + name) for recipe in recipes for kind, name in kinds.items()]
    end = time.monotonic() + limit_s
    for number, (kind, recipe, name) in enumerate(todo):
        done.append(Run(name))
        kind(done[-1], recipe, steps, device, functools.partial(_share, end, len(todo) - number))
        yield done[-1]


def _share(end: float, parts: int) -> float:
    """When the first of so many equal parts of the time from now to `end` is over."""
    now = time.monotonic()
    return now + (end - now) / parts


def line_of(run: Run) -> str:
    """What a run comes to, in a line, and what grew."""
    text = f"{run.name}: {run.steps} steps in {run.seconds:.0f} s"
    if run.records:
        start, last = first(run.records), run.records[-1]
        text += (
            f", allocated {start.allocated} → {last.allocated} bytes, tensors {sum(start.tensors.values())} → "
            f"{sum(last.tensors.values())}, entries of caches {sum(start.caches.values())} → "
            f"{sum(last.caches.values())}, host {start.host >> 20} → {last.host >> 20} MiB"
        )
    text += f": {run.status.upper() if run.grown else run.status}" + (f": {run.not_judged}" if run.not_judged else "")
    return "\n".join([text, *(f"  {line}" for line in run.grown)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.endurance", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="of each recipe (default: %(default)s)")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=math.inf,
        help="no further round but the first of a recipe is begun after so many seconds",
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--backend", default="auto", help="of fqt.backend: triton runs the kernels on a CPU as well")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    if args.steps < LEAST * PERIOD:
        parser.error(f"--steps is at least {LEAST * PERIOD}, got {args.steps}")
    device = _device(parser, args.device)
    for recipe in args.recipes:
        try:
            if reason := fqt.conv_ops.reason_against(fqt.Recipe.parse(recipe)):
                parser.error(reason)
        except ValueError as e:
            parser.error(str(e))
    torch.set_num_threads(1)  # the matrices are too small for more
    arguments = {"steps": args.steps, "recipes": list(args.recipes), "backend": args.backend, "period": PERIOD}
    result = {"environment": environment.environment(device), "arguments": arguments}
    done: list[Run] = []

    def tell(run: Run) -> None:
        print(line_of(run), flush=True)
        if args.out is not None:
            environment.write(args.out, result | {"runs": [run.as_dict() for run in done]})

    try:
        with fqt.backend(args.backend):
            for run in runs(done, args.recipes, args.steps, device, args.limit_s):
                tell(run)
    except KeyboardInterrupt:
        if done:
            tell(done[-1])
        print("endurance: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0 if all(run.status == "nothing grew" for run in done) else 1


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        parser.error(f"--device is auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main())
