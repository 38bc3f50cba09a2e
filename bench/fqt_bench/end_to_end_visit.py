"""One candidate of the end-to-end benchmark, alone on the device: built, checked, timed and freed."""

from __future__ import annotations

import gc
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import peers, train
from .end_to_end_networks import Work
from .harness import Wrong

HELD = 64 * 2**20  # bytes that may stay after a candidate was freed, before what was compiled is dropped as well
TOP = 12  # kernels that a profile names
CHECKED = train.STEPS + 1  # steps before the timed ones: the check, and the warm-up
# Of a kernel's name, the first that is found. fqt's kernels are called _<operator>_kernel, those that multiply …_mm_kernel.
GROUPS = (
    ("our products", r"^_\w*_mm_kernel|^_epilogue_kernel|^_conv_wgrad_sum_kernel"),
    ("our quantization", r"^_\w+_kernel"),
    ("copies", r"^Mem(cpy|set)"),
    ("optimizer", r"multi_tensor_apply|FusedAdam"),
    ("attention", r"(?i)flash|fmha|attention|sdp"),
    ("norms and pooling", r"(?i)batch_?norm|bn_(fw|bw)|layer_?norm|rms_?norm|pool"),
    ("library products", r"(?i)gemm|nvjet|cutlass|xmma|conv|winograd|wgrad|dgrad|imma|sm\d\d_"),
)
OTHER = "elementwise and other"


def allocated(device: torch.device) -> int:
    """Bytes of live tensors on a GPU, 0 without one."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device, held: int) -> None:
    """Give back what a candidate has left behind, down to about `held` bytes; what was compiled may hold its weights."""
    gc.collect()
    if device.type != "cuda":
        return
    if allocated(device) > held + HELD:
        peers.forget_compiled()
        gc.collect()
    torch.cuda.empty_cache()


def visit(work: Work, way: train.Way, device: torch.device, steps: int, full: list[float] | None) -> dict[str, Any]:
    """The record of a round: losses of the steps of the check, then times of so many steps in a row, and memory.

    full: exact's losses; None of exact itself.

    Raises:
        Wrong: see `judged`. What the candidate raises.
    """
    began, before = time.perf_counter(), allocated(device)
    model = way.convert(work.network.build())
    built = allocated(device)
    run = train.step(lambda: model, work.network)
    losses = [float(run(0)) for _ in range(CHECKED)]
    remark = judged(losses, full, way.allowed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples, host = timed(run, steps, device)
    memory = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        memory = {"before": before, "built": built - before, "peak": peak - before, "saved": _saved(model, work)}
    return {"remark": remark, "seconds": round(time.perf_counter() - began, 2), "losses": losses, "memory": memory,
            "ms": statistics.median(samples), "samples_ms": samples, "host_ms": statistics.median(host)}  # fmt: skip


def judged(losses: list[float], full: list[float] | None, allowed: float) -> str:
    """A remark on how the loss falls.

    At no step of the check may it be further from exact's than `allowed` of what exact gains in all of them: what training
    ends at is about zero for anything that learns. At toy sizes int8 and psq8 were 0.9 % off at most, bhq5 2.2 %.

    Raises:
        Wrong: it is, or a loss is not finite, or exact gains nothing.
    """
    before, after = losses[0], losses[-1]
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    remark = f"loss {before:.3f} to {after:.3f}"
    if full is None:
        if not after < before:
            raise Wrong(f"full precision learns nothing: loss {before:.4f}, then {after:.4f}")
        return remark
    distances = [abs(a - b) / (full[0] - full[-1]) for a, b in zip(losses, full, strict=True)]
    worst = max(range(len(losses)), key=distances.__getitem__)
    if distances[worst] > allowed:
        raise Wrong(f"loss {losses[worst]:.4f} after {worst} steps, full precision {full[worst]:.4f}: "
                    f"{distances[worst]:.1%} of its progress off, allowed {allowed:.0%}")  # fmt: skip
    return f"{remark}, at most {distances[worst]:.1%} off"


def timed(run: Callable[[int], object], steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """(ms of each step, ms of the host in it), the steps in a row: on a GPU between device events, where it waits for the
    host as it would in a training run."""
    host, marks = [], [_mark(device)]
    for _ in range(steps):
        began = time.perf_counter()
        run(0)
        host.append((time.perf_counter() - began) * 1e3)
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], host
    return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)], host


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _saved(model: nn.Module, work: Work) -> int:
    """Bytes that a forward keeps for its backward, its output left out; there was a step before it."""
    before = torch.cuda.memory_allocated()
    y = model(work.network.x)
    return torch.cuda.memory_allocated() - before - y.nbytes


# ---- where a step's time goes


def profiled(work: Work, way: train.Way) -> dict[str, Any]:
    """The kernels of one step of the candidate, by torch.profiler: see `shares`."""
    from .cuda import launches

    model = way.convert(work.network.build())
    run = train.step(lambda: model, work.network)
    for _ in range(3):
        run(0)
    return shares(launches(lambda: run(0)))


def shares(found: dict[str, Any]) -> dict[str, Any]:
    """Of what `cuda.launches` found: the sum of µs, the share of each group in it, and the TOP kernels."""
    by_name = found["by_name"]
    total = sum(entry["us"] for entry in by_name.values())
    groups: dict[str, float] = {}
    for name, entry in by_name.items():
        groups[group(name)] = groups.get(group(name), 0.0) + entry["us"] / total
    top = sorted(by_name.items(), key=lambda item: -item[1]["us"])[:TOP]
    return {
        "kernels": found["kernels"],
        "us": round(total, 1),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "top": [{"name": name, **entry, "share": entry["us"] / total, "group": group(name)} for name, entry in top],
    }


def group(name: str) -> str:
    """Of GROUPS, by a kernel's name."""
    return next((title for title, pattern in GROUPS if re.search(pattern, name)), OTHER)
