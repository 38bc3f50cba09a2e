"""Whole training steps of whole networks, each candidate alone on the GPU: step time, memory, tokens or images a second.

    python -m fqt_bench.end_to_end --out FILE.json [--networks llama resnet50] [--layers 12] [--tokens 8192] [--batch 256]
                                   [--rounds 2] [--limit-s 500] [--quick] [--[no-]profile]
    python -m fqt_bench.end_to_end --report FILE.json      # the tables and the plot of a result

A stack of Llama-8B blocks on one sequence of tokens, and ResNet-50, in bf16: as they are, compiled, with torchao's int8 and
with fqt's recipes. A candidate is built from the same weights, trains for the steps of the check (its losses may
be off by 5 % of what exact gains), is timed over a few steps in a row and freed, before the next one is built. Rounds go
A B C … C B A, so that a drift of the clocks shows: the interval of a time is that of the rounds' medians.

All have torch.optim.AdamW(fused=True) on bf16 weights (ResNet's norms are in float32), whose states have the dtype of the
weights; a step is forward, cross-entropy, backward and optimizer, gradients set to None. What does not fit on the GPU
is recorded as that. Where the time would not do, the stack gets fewer blocks, by the measured time of a step, and the result
says so; what is not run is named with the reason. The file is written after every candidate; the plot is FILE.png.

--quick runs toy sizes, and alone works without a GPU. Exit status: 0 measured, 1 one of fqt's own candidates is wrong or
raises, or nothing could be measured, 2 a mistake in the call, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fqt.cli import INTERRUPTED, positive

from . import environment, peers, train
from .cpu import CpuTimer
from .end_to_end_networks import NETWORKS, Work, make, ways
from .end_to_end_tables import draw, tables
from .end_to_end_visit import CHECKED, allocated, free, profiled, timed, visit
from .harness import RESERVE_S, Budget, Wrong
from .wholes import COMPILED, EXACT, KIND

Record = dict[str, Any]
STEPS, QUICK_STEPS = 10, 2  # timed, of a visit
SIZES = {"layers": 12, "tokens": 8192, "batch": 256}
QUICK_SIZES = {"layers": 2, "tokens": 64, "batch": 16}
COMPILING_S = 45.0  # a candidate that was not visited yet is not begun on a GPU with less time left
STEPPING = 0.5  # of a network's time, for steps; the rest is for compiling
SLOWER = 1.25  # a candidate's step over exact's, on average, when blocks are chosen
OK, WRONG, ERROR, OUT_OF_MEMORY, NOT_RUN = "ok", "wrong", "error", "out of memory", "not run"
METHOD = (
    "Each candidate alone on the device, in rounds of opposite order; torch.optim.AdamW(fused=True), its states in the "
    "dtype of the weights, bf16 on a GPU; steps in a row, between device events. Peak: above what was allocated before the "
    "candidate was built."
)


def measure(work: Work, device: torch.device, budget: Budget, rounds: int, steps: int, save: Callable[[], None],
            candidates: list[Record]) -> None:  # fmt: skip
    """Fill `candidates` with a record for each way of training the network; save() after each visit."""
    todo = ways(work, device)
    candidates += [_record(way) for way in todo]
    pairs = list(zip(todo, candidates, strict=True))
    held = allocated(device)
    for number in range(rounds):
        for way, record in pairs if number % 2 == 0 else reversed(pairs):
            if record["status"] != OK:
                continue
            first = candidates[0]
            compiling = COMPILING_S if device.type == "cuda" and not record["rounds"] else 0.0
            if lacking := _lacking(record, first, budget, steps, compiling):
                record |= {"status": NOT_RUN} if number == 0 else {}
                record["remark"] = f"{record['remark']}; round {number + 1}: {lacking}".removeprefix("; round 1: ")
                save()
                continue
            print(f"end to end: {budget.spent():5.1f} s  {work.title}: {way.title}", file=sys.stderr, flush=True)
            full = first["rounds"][0]["losses"] if first["rounds"] else None
            try:
                found = visit(work, way, device, steps, full)
                record["remark"] = found.pop("remark")
                record["rounds"].append({"round": number, **found})
            except Exception as error:  # whatever a candidate runs into
                record |= _failure(error)
            free(device, held)
            add_figures(work, candidates)
            save()


def _record(way: train.Way) -> Record:
    provider, missing = way.fields.get("provider", "fqt"), way.fields["missing"]
    return {"name": way.title, "tag": way.fields["tag"], "ours": provider == "fqt", "provider": provider,
            "status": NOT_RUN if missing else OK, "remark": missing, "rounds": [], "profile": None}  # fmt: skip


def _lacking(record: Record, first: Record, budget: Budget, steps: int, compiling: float) -> str:
    """Why a visit is not begun: nothing to check it against, or too little time. "" where it is."""
    if record is not first and not first["rounds"]:
        return f"nothing to check it against: {first['name']} is not measured"
    known = next((r["rounds"][-1]["ms"] for r in (record, first) if r["rounds"]), 0.0)
    needed = RESERVE_S + compiling + (CHECKED + steps) * known * 1e-3
    return "" if budget.left() >= needed else f"{max(budget.left(), 0):.0f} s are left, {needed:.0f} s are needed"


def _failure(error: Exception) -> Record:
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    if isinstance(error, Wrong):
        return {"status": WRONG, "remark": text}
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": OUT_OF_MEMORY, "remark": text}
    return {"status": ERROR, "remark": f"{type(error).__name__}: {text}"}


def add_figures(work: Work, candidates: Sequence[Record]) -> None:
    """From the rounds of each candidate that is "ok": medians, rates, memory, and ratios to exact, eager and compiled."""
    measured = [c for c in candidates if c["status"] == OK and c["rounds"]]
    for c in candidates:
        for field in ("ms", "items_s", "tflops", "peak", "saved", "ratio"):
            c.pop(field, None)
    for c in measured:
        medians = [r["ms"] for r in c["rounds"]]
        samples = [ms for r in c["rounds"] for ms in r["samples_ms"]]
        median = statistics.median(samples)
        memory = [r["memory"] for r in c["rounds"] if r["memory"]]
        c |= {
            "ms": {"median": median, "low": min(medians), "high": max(medians), "n": len(samples)},
            "items_s": work.items / median * 1e3,
            "tflops": work.flops / median * 1e-9,
            "peak": max((m["peak"] for m in memory), default=None),
            "saved": max((m["saved"] for m in memory), default=None),
            "ratio": {b["tag"]: _ratio(b, c) for b in measured if b["tag"] in (EXACT, COMPILED)},
        }


def _ratio(base: Record, record: Record) -> dict[str, float]:
    """Of the medians, and the least and the greatest of the rounds that both have; above 1 is faster than the base."""
    a, b = ({r["round"]: r for r in c["rounds"]} for c in (base, record))
    both = sorted(a.keys() & b.keys())
    medians = [statistics.median(ms for n in both for ms in of[n]["samples_ms"]) for of in (a, b)]
    each = [a[n]["ms"] / b[n]["ms"] for n in both]
    return {"value": medians[0] / medians[1], "low": min(each), "high": max(each)}


# ---- how many blocks


def fitting(layers: int, step_s: float, steps: int, seconds: float) -> tuple[int, str]:
    """(blocks, why there are fewer than asked) so that so many steps of all candidates together end in the seconds, where
    one of exact takes step_s with all blocks."""
    needed = step_s * steps * SLOWER
    if needed <= seconds:
        return layers, ""
    fewer = max(1, int(layers * seconds / needed))
    return fewer, (f"{fewer} of {layers} blocks: with all a step of exact takes {step_s * 1e3:.0f} ms, and the {steps} "
                   f"steps of all candidates about {needed:.0f} s; there are {seconds:.0f} s for them")  # fmt: skip


def exact_step_s(work: Work, device: torch.device) -> float | None:
    """Seconds of one of exact's, None where it does not fit: the visits will say so."""
    model = work.network.build()
    run = train.step(lambda: model, work.network)
    try:
        timed(run, 2, device)
        return statistics.median(timed(run, 2, device)[0]) * 1e-3
    except torch.OutOfMemoryError:
        return None


def prepared(name: str, args: argparse.Namespace, device: torch.device, seconds: float, steps: int) -> tuple[Work, str]:
    """The network with as many of the blocks asked for as the time allows, and the note on that."""

    def made(layers: int) -> Work:
        return make(name, device, layers=layers, tokens=args.tokens, batch=args.batch, quick=args.quick)

    work, note = made(args.layers), ""
    if work.layers is not None:
        visits = args.rounds * sum(not way.fields["missing"] for way in ways(work, device))
        held = allocated(device)
        step_s = exact_step_s(work, device)
        free(device, held)
        if step_s is not None:
            layers, note = fitting(work.layers, step_s, visits * (CHECKED + steps), STEPPING * seconds)
            work = work if layers == work.layers else made(layers)
    return work, note


# ---- the command


def run(args: argparse.Namespace, device: torch.device, timer: Any) -> Record:
    """Measure all networks, then profile fqt's candidates; the file is written as it goes."""
    budget = Budget(args.limit_s, timer)
    asked = ("networks", "layers", "tokens", "batch", "rounds", "limit_s", "quick", "profile")
    result: Record = {"kind": KIND, "environment": environment.environment(device), "method": METHOD,
                      "arguments": {name: getattr(args, name) for name in asked}, "networks": []}  # fmt: skip
    steps, works = QUICK_STEPS if args.quick else STEPS, []

    def save() -> None:
        environment.write(args.out, result | {"spent_s": round(budget.spent(), 1)})

    for number, name in enumerate(args.networks):
        peers.forget_compiled()
        share = Budget(budget.left() / (len(args.networks) - number), timer)
        work, note = prepared(name, args, device, share.left(), steps)
        works.append(work)
        described = ("name", "title", "shape", "layers", "unit", "items", "parameters", "flops")
        entry = {field: getattr(work, field) for field in described}
        entry |= {"layers_asked": None if work.layers is None else args.layers, "note": note, "candidates": []}
        result["networks"].append(entry)
        measure(work, device, share, args.rounds, steps, save, entry["candidates"])
    if args.profile:
        for work, entry in zip(works, result["networks"], strict=True):
            profile(work, device, budget, entry["candidates"])
            save()
    return result


def profile(work: Work, device: torch.device, budget: Budget, candidates: Sequence[Record]) -> None:
    """Where a step's time goes, of fqt's candidates: after all timings, since a profiler may slow what comes after it."""
    held = allocated(device)
    for way, record in zip(ways(work, device), candidates, strict=True):
        if not (record["ours"] and record["status"] == OK and record["rounds"]):
            continue
        if budget.left() < 2 * RESERVE_S:
            record["profile"] = {"error": f"{max(budget.left(), 0):.0f} s are left"}
            continue
        try:
            record["profile"] = profiled(work, way)
        except Exception as error:  # a profiler that may not look at the device, memory
            record["profile"] = {"error": _failure(error)["remark"]}
        free(device, held)


def report(result: Record, path: Path) -> None:
    """Print the tables; draw the plot, or say why there is none."""
    print(tables(result))
    if importlib.util.find_spec("matplotlib") is None:
        print("end to end: no plot: matplotlib is not installed", file=sys.stderr)
    else:
        draw(result, path.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return the exit status; see the module."""
    parser = argparse.ArgumentParser(prog="python -m fqt_bench.end_to_end", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FILE.json")
    where.add_argument("--report", type=Path, metavar="FILE.json", help="only draw and print what it holds")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    for name, what in (
        ("layers", "blocks of the stack"),
        ("tokens", "of its sequence"),
        ("batch", "images of ResNet-50"),
    ):
        said = f"{what} (default: {SIZES[name]}, with --quick {QUICK_SIZES[name]})"
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=said)
    parser.add_argument("--rounds", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=500.0, help="of everything (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, help="fqt's kernels (default: on a GPU)")
    args = parser.parse_args(argv)
    if args.report:
        report(json.loads(args.report.read_text(encoding="utf-8")), args.report)
        return 0
    for name, size in (QUICK_SIZES if args.quick else SIZES).items():
        setattr(args, name, getattr(args, name) or size)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.quick:
        parser.error("torch.cuda.is_available() is false: without --quick it measures a GPU")
    if args.profile and not has_gpu:
        parser.error("--profile needs a GPU")
    args.profile = has_gpu if args.profile is None else args.profile
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    if not has_gpu:
        torch.set_num_threads(1)  # two wait for each other wherever another process has one of their cores
    try:
        result = run(args, device, CpuTimer())
    except KeyboardInterrupt:
        print(f"end to end: interrupted; {args.out} has what was done", file=sys.stderr)
        return INTERRUPTED
    report(result, args.out)
    found = [c for network in result["networks"] for c in network["candidates"]]
    failed = any(c["ours"] and c["status"] in (WRONG, ERROR) for c in found)
    return int(failed or not any("ms" in c for c in found))


if __name__ == "__main__":
    sys.exit(main())
