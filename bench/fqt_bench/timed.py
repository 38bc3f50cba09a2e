"""Time the library of one tree, turn by turn, as `duel` asks: the other side of its sockets.

    python -m fqt_bench.timed DESCRIPTOR

Imports torch and forks a process for each socket that comes over the given one, with the folders of a tree as JSON: what
all trees share is imported once. A forked process writes {"pid": its own} when it stands ready, then reads JSON lines
{"case": name, "samples": n} and answers each with {"ns": the least nanoseconds of a call among n samples}, or
{"unknown": text} or {"error": text}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch

from .library import use

WARM_UP = 5  # calls; on a GPU the first of them compiles
GPU_CALLS = 10  # in a sample: the queue is filled once and waited for once
# (batch, in, out) of the layers and products. On a CPU a call takes about a millisecond: longer than the clock is coarse,
# shorter than what interrupts it.
SIZES = {"cpu": (64, 128, 128), "cuda": (4096, 4096, 4096)}


def _layer(recipe: str, device: str) -> Callable[[], object]:
    import fqt
    import fqt.nn

    m, k, n = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = fqt.nn.Linear(k, n, device=device, dtype=dtype, recipe=recipe)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)

    def step():
        x.grad = layer.weight.grad = layer.bias.grad = None
        fqt.invalidate_(layer)  # the weight is quantized anew, as after an optimizer step
        layer(x).backward(dy)

    return step


def _quantize(rounding: str, device: str) -> Callable[[], object]:
    from fqt import ops

    m, k, _ = SIZES[device]
    x = torch.randn(m, 4 * k, device=device)
    rng = torch.tensor([1, 0], device=device) if rounding == "stochastic" else None
    return lambda: ops.quantize(x, 8, "per_row", "symmetric", rounding, rng=rng, cols=True)


def _product(device: str) -> Callable[[], object]:
    from fqt import ops

    m, k, n = SIZES[device]
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    scale_a, scale_b = (torch.rand(rows, device=device) for rows in (m, n))
    return lambda: ops.scaled_mm(a, b, scale_a, scale_b)


CASES: dict[str, Callable[[str], Callable[[], object]]] = {  # by the names of gate.CASES
    "quantize per_row nearest": lambda device: _quantize("nearest", device),
    "quantize per_row stochastic": lambda device: _quantize("stochastic", device),
    "scaled_mm": _product,
    **{f"linear {recipe} step": lambda device, r=recipe: _layer(r, device) for recipe in ("int8", "psq8", "bhq8")},
}


class Timer:
    """Calls of cases, each set up and warmed up when it is first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls: dict[str, Callable[[], object]] = {}

    def least(self, case: str, samples: int) -> int:
        """Nanoseconds of a call, the least of so many samples."""
        if case not in self.calls:
            torch.manual_seed(0)
            self.calls[case] = CASES[case](self.device)
            self._sample(self.calls[case], WARM_UP)
            gc.collect()
            gc.freeze()
        call, count = self.calls[case], GPU_CALLS if self.device == "cuda" else 1
        return min(self._sample(call, count) for _ in range(samples))

    def _sample(self, call: Callable[[], object], count: int) -> int:
        self._wait()
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        self._wait()
        return (time.perf_counter_ns() - start) // count

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def serve(roots: list[str], connection: socket.socket) -> None:
    """Answer until the other side hangs up."""
    with connection, connection.makefile("rw", buffering=1) as lines:
        use(roots)
        gc.disable()  # what a step leaves in cycles is little
        timer = Timer("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps({"pid": os.getpid()}), file=lines)
        for line in lines:
            asked = json.loads(line)
            try:
                answer = {"ns": timer.least(asked["case"], asked["samples"])}
            except Exception as e:  # whatever the library runs into: the other cases can still be timed
                kind = "unknown" if _lacks(e, asked["case"] not in timer.calls) else "error"
                answer = {kind: f"{type(e).__name__}: {e}"[:500]}
            print(json.dumps(answer), file=lines)


def _lacks(error: Exception, set_up: bool) -> bool:
    """Whether the tree has no such function, argument or recipe: a case could not be set up, or an error is raised by the
    call here. One that is raised inside the library's code is a bug of its."""
    if not isinstance(error, (AttributeError, ImportError, LookupError, TypeError, ValueError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return set_up or frame.f_code.co_filename == __file__


def main() -> None:
    importlib.import_module("torch._dynamo")  # the first call of an operator imports it, for longer than all else takes
    torch.set_num_threads(1)  # what more threads take depends on who else is there
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
            if not message:
                return
            connection = socket.socket(fileno=descriptors[0])
            if os.fork() == 0:
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # compilers are waited for
                serve(json.loads(message), connection)
                return
            connection.close()


if __name__ == "__main__":
    main()
