"""Exact counters of the kernels and of training steps, which need no GPU and do not depend on the machine.

Of each compiled launch (`codegen.worker`), by "ARCH KERNEL LAUNCH": instructions, registers, spilled bytes, shared memory,
loads and stores of global memory. Of each step in Triton's interpreter (`steps`), a recipe's by "step RECIPE linear" and an
optimizer's by "step OPTIMIZER", and with the kernel's name behind it by kernel: launches, bytes moved, torch operators, peak
and saved memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .trees import Tree, command, environment

# A launch or two of every kernel, and the kernels that it starts: about a second each, apart from starting.
SMOKE: dict[str, tuple[str, ...]] = {
    "n1024 cols symmetric nearest": ("_rows_kernel",),
    "n4096 min stochastic": ("_rows_kernel",),
    "n28672 cols symmetric nearest": ("_long_rows_kernel",),
    "per_tensor both grid nearest": ("_row_stats_kernel", "_params_kernel", "_tile_kernel"),
    "gradient int8 stochastic": ("_gradient_stats_kernel", "_params_kernel", "_gradient_tile_kernel"),
    "128x256x128 w8 s3 scales even": ("_scaled_mm_kernel",),
    "64x128x128 w4 s4 fp8 scales even": ("_scaled_mm_kernel",),
    "128x256x128 w8 s4 scales even": ("_hopper_scaled_mm_kernel",),
    "epilogue scales even": ("_epilogue_kernel",),
    "row ranges even": ("_row_ranges_kernel",),
    "groups global even": ("_leaders_kernel", "_groups_kernel"),
    "groups tile even": ("_tile_groups_kernel",),
    "bhq n4096 auto min stochastic": (
        "_group_absmax_kernel",
        "_follower_sums_kernel",
        "_follower_totals_kernel",
        "_transform_kernel",
        "_choose_kernel",
    ),
    "bhq n28672 auto min stochastic": ("_long_transform_kernel",),
    "inverse bfloat16": ("_inverse_kernel",),
    "128x128x128 c2 w8 s3 householder scales even": ("_householder_weights_kernel", "_householder_mm_kernel"),
    "psgd codes every scaled": ("_psgd_stats_kernel", "_psgd_kernel"),
    "128x128x128 w8 s3 conv scales even": ("_conv_mm_kernel",),
    "128x128x128 w8 s3 wgrad scales even": ("_conv_wgrad_mm_kernel", "_conv_wgrad_sum_kernel"),
    "images nhwc symmetric nearest": ("_row_stats_kernel", "_params_kernel", "_images_kernel"),
    "images nhwc gradient int8 stochastic": ("_image_stats_kernel", "_params_kernel", "_gradient_images_kernel"),
    "int8 step adamw grid+zero bfloat16": ("_int8_prepare_kernel", "_int8_extremes_kernel", "_int8_step_kernel"),
}
SMOKE_ARCH = "sm_90"
SELECTIONS = ("smoke", "full")
RECIPES = ("int8", "psq8", "bhq8", "qat8", "fp8")
OPTIMIZERS = ("psgd", "psgd adamw")
GATED = ("instructions", "registers", "spilled", "scalars_spilled", "shared", "loads", "stores", "atomics",
         "launches", "bytes_loaded", "bytes_stored", "torch_operators", "peak_bytes", "saved_bytes")  # fmt: skip
# What says how, not how much: a wide load in place of narrow ones adds to loads_16, and takes from loads.
_DESCRIBES = re.compile(r"(loads|stores)_\d+|tma_(loads|stores)")


@dataclass(frozen=True)
class Counters:
    """entries: {counter: count} by name. unknown: why a launch or a recipe is not the tree's. failed: why it broke.

    of: the versions and the architectures that the entries are of.
    """

    entries: dict[str, dict[str, int]]
    unknown: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    of: dict[str, object] = field(default_factory=dict)


def matches(pattern: str | None, name: str) -> bool:
    """Whether the pattern, with * and ? as in file names, occurs in the name; None occurs in every one."""
    return pattern is None or fnmatchcase(name, f"*{pattern}*")


def collect(
    selection: str = "smoke", tree: Path | str | None = None, only: str | None = None
) -> dict[str, dict[str, int]]:
    """The counters of a selection, "smoke" or "full", for the library in a folder or the installed one, by name.

    Launches and recipes that the tree does not know, and those that fail in it, are named on stderr and left out.

    Raises:
        ValueError: another selection.   fqt.cli.UsageError: the folder holds no fqt.
    """
    counters = measure(selection, Tree.installed() if tree is None else Tree.at(tree), only)
    for kind, found in (("not known", counters.unknown), ("failed", counters.failed)):
        for name, reason in found.items():
            print(f"counters: {kind}: {name}: {reason}", file=sys.stderr)
    return counters.entries


def measure(selection: str, tree: Tree, only: str | None = None) -> Counters:
    """`collect`, with what is not known and what failed."""
    if selection not in SELECTIONS:
        raise ValueError(f"the counters are of {' or '.join(SELECTIONS)}, got {selection!r}")
    jobs = _jobs(selection, only)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(lambda job: _lines(job, tree, cache), jobs))
    entries: dict[str, dict[str, int]] = {}
    problems: dict[str, dict[str, str]] = {"unknown": {}, "error": {}}
    versions = set()
    for line in (line for output in outputs for line in output):
        if "triton" in line:
            versions.add(line["triton"])
            continue
        for name, found in line.items():
            kind = next(iter(found)) if found else ""
            (problems[kind] if kind in problems else entries)[name] = found[kind] if kind in problems else found
    arches = sorted({name.split()[0] for name in entries if not name.startswith("step ")})
    return Counters(dict(sorted(entries.items())), problems["unknown"], problems["error"],
                    {"triton": next(iter(versions), None), "arches": arches})  # fmt: skip


@dataclass(frozen=True)
class _Job:
    name: str
    module: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def _jobs(selection: str, only: str | None) -> list[_Job]:
    """Processes of about the same length, so that they share the cores."""
    chosen = ("--only", f"*{only or ''}*")
    kernels = ("", *(kernel for started in SMOKE.values() for kernel in started))
    recipes = [r for r in RECIPES if any(matches(only, f"step {r} linear {kernel}") for kernel in kernels)]
    optimizers = [o for o in OPTIMIZERS if any(matches(only, f"step {o} {kernel}".rstrip()) for kernel in kernels)]
    interpreted = (("TRITON_INTERPRET", "1"),)
    steps = (*chosen, "--recipes", *recipes, "--optimizers", *optimizers)
    jobs = [_Job("step", "steps", steps, interpreted)] if recipes or optimizers else []
    if selection == "full":
        from .codegen.table import ARCHES

        return [*(_Job(arch, "codegen.worker", (arch, "--counters", *chosen)) for arch in ARCHES), *jobs]
    launches = [
        name for name, kernels in SMOKE.items() if any(matches(only, f"{SMOKE_ARCH} {k} {name}") for k in kernels)
    ]
    parts = [part for part in (launches[::2], launches[1::2]) if part]
    worker = (SMOKE_ARCH, "--counters", *chosen, "--launches")
    return [*(_Job(SMOKE_ARCH, "codegen.worker", (*worker, *part)) for part in parts), *jobs]


def _lines(job: _Job, tree: Tree, cache: str) -> list[dict]:
    """What the process of a job prints; one that dies is a failure of all that it had not come to."""
    env = environment(TRITON_CACHE_DIR=cache, **dict(job.environment))
    done = subprocess.run(command(job.module, job.arguments, tree), cwd=tree.roots[0], env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        lines.append({f"{job.name} ?": {"error": f"the process ended with {done.returncode}: {reason}"[:500]}})
    return lines


# ---- what changed


@dataclass(frozen=True)
class Change:
    """A counter that differs. kind: "regression", "tolerated", "improvement", or "described" where neither is better."""

    name: str
    counter: str
    base: int
    head: int
    kind: str

    @property
    def percent(self) -> float | None:
        """By how much it grew; None from 0."""
        return 100 * (self.head - self.base) / self.base if self.base else None


def changes(
    base: Mapping[str, Mapping[str, int]],
    head: Mapping[str, Mapping[str, int]],
    tolerance: Mapping[str, float] | None = None,
) -> list[Change]:
    """The counters that differ of the entries that both have. tolerance: percent that a counter may grow by.

    A counter that only one side has counts as 0 on the other: a kernel that one of them does not launch moves no bytes.
    """
    tolerance = tolerance or {}
    found = []
    for name in base.keys() & head.keys():
        for counter in base[name].keys() | head[name].keys():
            old, new = base[name].get(counter, 0), head[name].get(counter, 0)
            if old != new:
                found.append(Change(name, counter, old, new, _kind(counter, old, new, tolerance.get(counter, 0.0))))
    return sorted(found, key=lambda c: (_ORDER[c.kind], c.name, c.counter))


_ORDER = {kind: i for i, kind in enumerate(("regression", "tolerated", "improvement", "described"))}


def _kind(counter: str, old: int, new: int, percent: float) -> str:
    if _DESCRIBES.fullmatch(counter):
        return "described"
    if new < old:
        return "improvement"
    return "tolerated" if 100 * (new - old) <= percent * old else "regression"
