"""CPU time of a linear layer's step on the host, from torch's autograd to Triton's C launcher. No GPU is needed or timed.

    python -m fqt_bench.host [--recipes RECIPE ...] [--shape M N K] [--dtype DTYPE] [--samples N] [--binder] [--out FILE]

At small shapes a GPU waits for the Python that launches its kernels. That Python runs here as it does there, on tensors of
the CPU that say that they are on an H100 (`pretended`): dispatch chooses that GPU's kernels, and their launchers run up to

    python  Triton's `JITFunction.run`, in whose place nothing happens: this package, torch.library and autograd alone;
    triton  with --binder: Triton's C launcher, in whose place nothing happens. Kernels are compiled for sm_90 first.

A step quantizes the weight, as after an optimizer's step, and computes the gradients of input, weight and bias. `exact` and
"nn.Linear" are of 1 × 1 × 1, so that next to nothing of their time is arithmetic. What a GPU adds is not in these numbers:
the driver's launches of kernels, its allocator instead of the CPU's, the thread that autograd runs a GPU's backward pass on.

Shares are from separate, instrumented steps (`Split`), each stage without the stages it calls. "torch operators" are all
that reach torch's dispatcher from a step but fqt's own; "on the GPU" are those among them that would launch something.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from fqt.cli import UsageError

from .environment import environment, write
from .host_gpu import nothing, offline, pretended
from .steps import Step

RECIPES = ("int8", "psq8", "exact")
PLAIN = "nn.Linear"
SHAPE = (64, 256, 256)  # rows, outputs, inputs: no kernel of this size takes an H100 as long as its launch
SAMPLES, BATCH, ROUNDS = 200, 5, 4
# Stages of a step; what is in none of them is the first.
AUTOGRAD, LAYER, RULES, BODIES, DISPATCH, LAUNCHERS, GUARDS, ALLOCATION, TRITON = (
    "autograd, torch.library, torch's operators", "layer", "autograd rules", "operators' bodies", "dispatch", "launchers",
    "device guards", "allocation", "Triton",
)  # fmt: skip


# ---- a step


class Linear:
    """One layer, its input and the gradient of its output; forward() and backward() are halves of a step.

    name: a recipe, or PLAIN. shape: (rows, outputs, inputs); of what is computed, 1 × 1 × 1.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> None:
        import fqt.nn

        m, n, k = shape
        self.computes = name in (PLAIN, "exact")
        if self.computes:
            m, n, k = 1, 1, 1
        self.layer = nn.Linear(k, n, dtype=dtype) if name == PLAIN else fqt.nn.Linear(k, n, dtype=dtype, recipe=name)
        self.x = torch.zeros(m, k, dtype=dtype, requires_grad=True)
        self.dy = torch.zeros(m, n, dtype=dtype)
        self.y = None

    def pretending(self, launch: Callable[..., object] | None = None):
        """The context of a step: the CPU for what is computed."""
        return contextlib.nullcontext() if self.computes else pretended(launch)

    def clear(self) -> None:
        """As an optimizer leaves it: without gradients, and codes of another weight."""
        self.x.grad = self.layer.weight.grad = self.layer.bias.grad = self.y = None
        if hasattr(self.layer, "_fqt_cache"):
            self.layer._fqt_cache = None

    def forward(self) -> None:
        self.y = self.layer(self.x)

    def backward(self) -> None:
        self.y.backward(self.dy)

    def step(self) -> None:
        self.clear()
        self.forward()
        self.backward()


class Dispatched(Step):
    """Counts torch's operators: .all that come to the dispatcher, and in .operators those that a GPU launches."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fqt":
            self.all[str(func)] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def count(linear: Linear) -> dict[str, dict[str, int]]:
    """Of one step after another: launches by kernel, torch operators by name, and those that a GPU would launch."""
    launched: Counter[str] = Counter()

    def launch(kernel, *args, **options) -> None:
        launched[kernel.fn.__name__] += 1

    from fqt import ops

    # A mode would be seen, and the operators gone through that nobody sees (`fqt.unwatched`).
    seen_by_nobody = mock.patch.object(ops, "is_unwatched", lambda *of: True, create=True)
    with linear.pretending(launch), seen_by_nobody:
        linear.step()
        launched.clear()
        linear.clear()
        with Dispatched() as seen:
            linear.forward()
            linear.backward()
    return {"launches": dict(launched), "operators": dict(seen.all), "on_gpu": dict(seen.operators)}


# ---- where the time goes


class Split:
    """Nanoseconds of a step by stage, .ns, each without what the stages take that it calls."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self._stages = [AUTOGRAD]
        self._since = 0

    def _enter(self, stage: str) -> None:
        now = time.perf_counter_ns()
        self.ns[self._stages[-1]] += now - self._since
        self._stages.append(stage)
        self._since = time.perf_counter_ns()

    def _leave(self) -> None:
        now = time.perf_counter_ns()
        self.ns[self._stages.pop()] += now - self._since
        self._since = time.perf_counter_ns()

    def timed(self, stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            self._enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return run

    def run(self, step: Callable[[], None]) -> None:
        self._since = time.perf_counter_ns()
        step()
        self.ns[AUTOGRAD] += time.perf_counter_ns() - self._since

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, and `pretended`, the functions of the stages tell when they begin and end."""
        from triton.runtime.jit import JITFunction

        import fqt.nn
        from fqt import gradients, ops, products
        from fqt_kernels import gemm, gemm_hopper, gradient, quantize

        fqt_linear = getattr(ops, "fqt_linear", None)  # of a tree that has it
        places = [
            (LAYER, fqt.nn.Linear, "forward"),
            *((AUTOGRAD, ops, name) for name in ("quantize", "linear", "linear_backward")),
            *((RULES, ops.linear, name) for name in ("_setup_context_fn", "_backward_fn")),
            (LAYER, ops, "linear_of"), (AUTOGRAD, fqt_linear, "apply"), (RULES, ops, "_remember"),
            (RULES, ops, "_backward"), (BODIES, ops, "_forward"), (BODIES, ops, "_gradients"),
            (BODIES, products, "quantized"),
            *((DISPATCH, module, "choose") for module in (products, gradients)),
            (LAUNCHERS, quantize, "quantize"), (LAUNCHERS, gradient, "quantize_gradient"),
            (LAUNCHERS, gemm, "scaled_mm"), (LAUNCHERS, gemm_hopper, "scaled_mm"),
            *((GUARDS, products._Launching, name) for name in ("__init__", "__enter__", "__exit__")),
            *((ALLOCATION, torch, name) for name in ("empty", "zeros")),
            (TRITON, JITFunction, "run"),
        ]  # fmt: skip
        operators = (ops.quantize, ops.linear, ops.linear_backward)
        with contextlib.ExitStack() as stack:
            for operator in operators:
                bodies = {kind: self.timed(BODIES, body) for kind, body in operator._backend_fns.items()}
                stack.enter_context(mock.patch.dict(operator._backend_fns, bodies))
            for stage, owner, name in (place for place in places if hasattr(place[1], place[2])):
                stack.enter_context(mock.patch.object(owner, name, self.timed(stage, getattr(owner, name))))
            yield


# ---- measuring


def measure(
    names: tuple[str, ...], shape: tuple[int, int, int], dtype: torch.dtype, samples: int, binder: bool
) -> list[dict[str, object]]:
    """A record of each recipe, or PLAIN: medians of the steps in microseconds, counts, and shares of the stages.

    The names take turns, `BATCH` steps each, so that what slows this machine for a while slows all of them.
    """
    linears = {name: Linear(name, shape, dtype) for name in names}
    records = [{"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), **count(linear)}
               for name, linear in linears.items()]  # fmt: skip
    _sample(linears, records, "python", nothing, samples)
    if binder:
        _sample(linears, records, "triton", None, samples)
    return records


def _sample(
    linears: dict[str, Linear], records: list[dict], what: str, launch: Callable[..., object] | None, samples: int
) -> None:
    """Add [what] to the records: the medians of forward and backward, and the shares."""
    times = {name: ([], []) for name in linears}
    splits = {name: Split() for name in linears if not linears[name].computes}
    for i in range(-(-samples // BATCH)):
        for name, linear in linears.items():
            with linear.pretending(launch):
                for j in range(BATCH + (5 if i == 0 else 1)):
                    forward, backward = _timed(linear)
                    if j >= BATCH:  # the first ones of a turn warm up
                        continue
                    times[name][0].append(forward)
                    times[name][1].append(backward)
                if name in splits and i % ROUNDS == 0:
                    with splits[name].watching():
                        for _ in range(BATCH):
                            linear.clear()
                            splits[name].run(linear.forward)
                            splits[name].run(linear.backward)
    for record in records:
        name = record["name"]
        forward, backward = times[name]
        both = [f + b for f, b in zip(forward, backward, strict=True)]
        record[what] = {
            title: round(statistics.median(ns) / 1e3, 2)
            for title, ns in (("forward_us", forward), ("backward_us", backward), ("step_us", both))
        }
        record[what]["step_us_quartiles"] = [round(q / 1e3, 2) for q in statistics.quantiles(both, n=4)[::2]]
        if name in splits:
            total = splits[name].ns.total()
            record[what]["shares"] = {k: round(ns / total, 4) for k, ns in splits[name].ns.most_common()}


def _timed(linear: Linear) -> tuple[int, int]:
    """Nanoseconds of forward and backward."""
    linear.clear()
    start = time.perf_counter_ns()
    linear.forward()
    between = time.perf_counter_ns()
    linear.backward()
    return between - start, time.perf_counter_ns() - between


def table(records: list[dict]) -> str:
    """The records as text."""
    lines = []
    for r in records:
        counts = {key: sum(r[key].values()) for key in ("launches", "operators", "on_gpu")}
        lines.append(f"{r['name']}: {counts['launches']} launches, {counts['operators']} torch operators, "
                     f"{counts['on_gpu']} of them on the GPU")  # fmt: skip
        for what in ("python", "triton"):
            if what not in r:
                continue
            t = r[what]
            low, high = t["step_us_quartiles"]
            lines.append(f"  up to {what:6}  forward {t['forward_us']:7.1f}  backward {t['backward_us']:7.1f}  "
                         f"step {t['step_us']:7.1f} µs of CPU time (half of them {low:.1f} to {high:.1f})")  # fmt: skip
            if "shares" in t:
                lines.append("    " + ", ".join(f"{k} {100 * s:.0f} %" for k, s in t["shares"].items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("M", "N", "K"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--binder", action="store_true", help="also up to Triton's C launcher")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the records, as JSON")
    args = parser.parse_args(argv)
    try:
        records = run(args.recipes, args.shape, args.dtype, args.samples, args.binder)
    except UsageError as e:
        parser.error(str(e))
    print(table(records))
    if args.out:
        write(args.out, {"what": "CPU time of the host, no GPU", "environment": environment(torch.device("cpu")),
                         "records": records})  # fmt: skip
    return 0


def run(recipes, shape, dtype: str, samples: int, binder: bool) -> list[dict]:
    """`measure` of the recipes and of nn.Linear, as the command line names them.

    Raises:
        UsageError: an unknown recipe, numbers that are not positive, or binder where kernels are interpreted.
    """
    from fqt import Recipe

    if min(*shape, samples) < 1:
        raise UsageError(f"--shape and --samples must be positive, got {' '.join(map(str, shape))} and {samples}")
    for recipe in recipes:
        try:
            Recipe.parse(recipe)
        except (TypeError, ValueError) as e:
            raise UsageError(f"--recipes {recipe}: {e}") from e
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()
    try:
        names = tuple(dict.fromkeys((*recipes, PLAIN)))
        with offline() if binder else contextlib.nullcontext():
            return measure(names, tuple(shape), getattr(torch, dtype), samples, binder)
    finally:
        gc.enable()
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
