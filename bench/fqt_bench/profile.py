"""What limits a kernel: candidates of the suites' cases under Nsight Compute (ncu).

    python -m fqt_bench.profile --result RESULT.json ... [--top N]      # the candidates furthest from their predictions
    python -m fqt_bench.profile --only "gemm 8192*" [--candidate "*hopper*"] [--suite NAME ...]
                                [--out FILE.json] [--limit-s N] [--ncu FILE]

Each candidate has a process of its own: warm, then one run between cudaProfilerStart and cudaProfilerStop, replayed by ncu
until it has every counter, with clocks as they are and caches flushed. `fqt_bench.profile_choice` says which are furthest,
`fqt_bench.profile_read` by what rule a kernel is limited by what. Without --candidate only fqt's own are profiled.

First the tool is tried on a kernel that reads and writes 1 GiB: ncu has to see this one kernel, with as many bytes read from
DRAM and written to it within 5 % (what is written may be short of the L2's size, where it may stay). Else its counters are
"not trusted", and every table says so. Metrics that ncu does not know are named and left out.

Where there is no ncu, or it cannot read counters, torch.profiler gives the durations of the kernels, and nothing else: the
status is "durations only" with the reason. The file is written after each candidate.

Exit status: 0 every candidate has counters, or durations where ncu can have none; 1 one has neither, or its counters are not
whole or not trusted; 2 a mistake in the call; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fqt.cli import INTERRUPTED, MISTAKE, Defaults, UsageError, positive, table

from . import environment, profile_ncu, reading
from .products import DISPATCHED
from .profile_choice import slowest
from .profile_ncu import Commands, Ncu
from .sanitize import _seconds
from .suites import NAMES

COUNTERS, PARTLY, DURATIONS, FAILED, NOT_RUN = (
    "counters", "counters, not whole", "durations only", "failed", "not run")  # fmt: skip


class Wanted(NamedTuple):
    """A candidate to profile; why: what it was chosen for."""

    suite: str
    shape: str
    name: str
    why: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module for its exit status."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except UsageError as e:
        print(f"profile: {e}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("profile: interrupted", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """Choose, try ncu, profile one after another, write the file after each."""
    if args.result is None and args.only is None and args.candidate is None:
        raise UsageError("say what to profile: --result RESULT.json, or --only PATTERN")
    commands, device = Commands(args.limit_s), gpu()
    measured = _results(args.result)
    suites = args.suite or (measured["suites"] if measured else ["kernels", "layers"])
    chosen = choose(args, measured, suites, commands)
    ncu = profile_ncu.find(args.ncu)
    result: dict[str, Any] = {"kind": "profile of fqt_bench.profile", "environment": environment.environment(device),
                              "results": [path.name for path in args.result or ()], "profiles": []}  # fmt: skip
    for there in measured["gpus"] - {result["environment"]["gpu"]} if measured else ():
        here = result["environment"]["gpu"]
        print(f"profile: a result is of {there or 'a CPU'}, and this is {here}", file=sys.stderr)
    l2 = (result["environment"]["l2_mib"] or 0) * 2**20

    def save() -> None:
        result["ncu"] = ncu.record()
        if args.out:
            environment.write(args.out, result)

    if not ncu.why:
        profile_ncu.prepare(ncu, commands, l2)
    save()
    print(_state(ncu), flush=True)
    for wanted in chosen:
        result["profiles"].append(one(wanted, suites, ncu, commands))
        save()
        print(f"\n{text(result['profiles'][-1], ncu)}", flush=True)
    return _close(result["profiles"], ncu)


def _close(profiles: Sequence[dict[str, Any]], ncu: Ncu) -> int:
    """Print how many have what, in one line; the exit status."""
    statuses = [p["status"] for p in profiles]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    reasons = "; ".join(dict.fromkeys(p["reason"] for p in profiles if p["reason"]))
    doubt = f" (NOT TRUSTED: {ncu.planted['reason']})" if COUNTERS in counts and not ncu.trusted else ""
    print(f"\n{len(profiles)} candidates: {counts}{doubt}{': ' * bool(reasons)}{reasons}"[:600])
    return int(not all(s == DURATIONS or (s == COUNTERS and ncu.trusted) for s in statuses))


# ---- what is profiled


def choose(
    args: argparse.Namespace, measured: dict[str, Any] | None, suites: Sequence[str], commands: Commands
) -> list[Wanted]:
    """The candidates that the call asks for. Raises UsageError where there are none."""
    if args.only is None and args.candidate is None:
        found = [Wanted(r.suite, r.shape, r.name, r.why) for r in slowest(measured, args.top)]
        if not found:
            files = " ".join(map(str, args.result))
            raise UsageError(f"--result {files}: no candidate of fqt's has a figure and a prediction")
        return found
    if measured:
        there = [{"suite": case["suite"], "shape": case["shape"], **c} for case in measured["cases"]
                 for c in case["candidates"] if c["status"] == "ok"]  # fmt: skip
    else:
        there = _listed(suites, args.only or "*", commands)
    there = [c for c in there if fnmatchcase(f"{c['suite']} {c['shape']}", f"*{args.only or '*'}*")]
    matching = [c for c in there if (fnmatchcase(c["name"], f"*{args.candidate}*") if args.candidate else c["ours"])]
    if not matching:
        known = ", ".join(dict.fromkeys(f"{c['suite']} {c['shape']}: {c['name']}" for c in there))
        raise UsageError(
            f"nothing matches --only {args.only} --candidate {args.candidate}; there are: {known or 'none'}"
        )
    matching.sort(key=lambda c: DISPATCHED not in c["name"])
    if len(matching) > args.top:
        print(f"profile: {args.top} of the {len(matching)} candidates that match; --top takes more", file=sys.stderr)
    return [Wanted(c["suite"], c["shape"], c["name"]) for c in matching[: args.top]]


def _listed(suites: Sequence[str], only: str, commands: Commands) -> list[dict[str, Any]]:
    """The candidates of the cases, as a process of its own says: this one holds no memory of the GPU."""
    status, out, err = commands.run(
        profile_ncu.child({"mode": "list", "suites": list(suites), "only": only}), profile_ncu.ONE_S
    )
    said = profile_ncu.answer(out)
    if not isinstance(said, list):
        why = said.get("failed") if said else f"exit status {status}: {profile_ncu.last(err)}"
        raise UsageError(f"the cases cannot be listed: {why}")
    return said


def _results(paths: Sequence[Path] | None) -> dict[str, Any] | None:
    """The suites and cases of all results, and the GPUs that they are of."""
    runs = []
    for path in paths or ():
        try:
            runs.append(reading.read(path))
        except reading.Refused as e:
            raise UsageError(f"--result {path}: {e}") from e
    if not runs:
        return None
    return {"suites": list(dict.fromkeys(suite for run in runs for suite in run.result["suites"])),
            "cases": [case for run in runs for case in run.result["cases"]], "gpus": {run.gpu for run in runs}}  # fmt: skip


def gpu() -> torch.device:
    """The GPU. Raises UsageError where none is NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise UsageError("it needs an NVIDIA GPU, and torch sees none: not measured")
    return torch.device("cuda", torch.cuda.current_device())


# ---- one candidate


def one(wanted: Wanted, suites: Sequence[str], ncu: Ncu, commands: Commands) -> dict[str, Any]:
    """The profile of a candidate, for JSON: by ncu, or durations where that cannot count."""
    print(f"profile: {wanted.suite} {wanted.shape}: {wanted.name}", file=sys.stderr, flush=True)
    work = {"suites": list(suites), "suite": wanted.suite, "shape": wanted.shape, "name": wanted.name}
    record: dict[str, Any] = {
        **wanted._asdict(),
        "ops": None,
        "bytes": None,
        "status": FAILED,
        "reason": "",
        "kernels": [],
    }
    why = ncu.why
    if not why and not commands.over():
        report, why, said = profile_ncu.count(ncu, {"mode": "candidate", **work}, commands)
        record |= {name: said.get(name) for name in ("ops", "bytes")}
        if not why:
            status = PARTLY if report.problems else COUNTERS
            kernels = [k.record() for k in report.kernels]
            return record | {"status": status, "reason": "; ".join(report.problems), "kernels": kernels}
        if "failed" in said:
            return record | {"reason": why}
    if commands.over():
        return record | {"status": NOT_RUN, "reason": commands.over()}
    status, out, err = commands.run(profile_ncu.child({"mode": "durations", **work}), profile_ncu.ONE_S)
    said = profile_ncu.answer(out) or {}
    if "kernels" in said:
        return record | said | {"status": DURATIONS, "reason": why}
    ended = (
        f"did not end within {profile_ncu.ONE_S:g} s"
        if status is None
        else f"exit status {status}: {profile_ncu.last(err)}"
    )
    return record | {"reason": f"{why}; and no durations: {said.get('failed') or commands.over() or ended}"}


# ---- in words

HEADER = ("kernel", "us", "read MB", "written MB", "DRAM", "L2", "L2 hits", "L1, shared", "conflicts", "tensor", "issue",
          "warps", "registers")  # fmt: skip


def _state(ncu: Ncu) -> str:
    """What became of ncu's trial, and what it cannot tell."""
    if ncu.why:
        return f"{DURATIONS}: {ncu.why}"
    said = "a kernel of known bytes is counted right" if ncu.trusted else f"NOT TRUSTED: {ncu.planted['reason']}"
    lines = [f"ncu, {ncu.version or 'version unknown'}: {said}"]
    lines += [f"unknown to it, left out: {', '.join(names)}" for names in ncu.unknown().values()]
    return "\n".join(lines)


def text(profile: dict[str, Any], ncu: Ncu) -> str:
    """A candidate's profile: its kernels, what limits each, and what had to be moved beside what was."""
    lines = [f"{profile['suite']} {profile['shape']}: {profile['name']}: {profile['status']}"]
    lines[0] += f": {profile['reason']}" if profile["reason"] else ""
    lines += [f"  {profile['why']}"] if profile["why"] else []
    kernels = profile["kernels"]
    if profile["status"] == DURATIONS:
        lines += [f"  {k['us']:.1f} us, {k['count']} of {k['name'][:100]}" for k in kernels]
        return "\n".join(lines)
    if not kernels:
        return "\n".join(lines)
    if not ncu.trusted:
        lines.append(f"  COUNTERS NOT TRUSTED: {ncu.planted['reason']}")
    rows = [_row(k["name"], k["values"]) for k in kernels]
    lines += [f"  {line}" for line in table(HEADER, rows, right=range(1, len(HEADER))).splitlines()]
    for k in kernels:
        v = k["values"]
        lines.append(f"  {_short(k['name'])}: {k['limited_by']}")
        if v.get("occupancy_most_pct") is not None:
            most = f"occupancy {_cell(v['occupancy_pct'])} of {_cell(v['occupancy_most_pct'])} %"
            by = k["occupancy_limited_by"] or "what is not known"
            lines.append(f"    {most}, limited by {by}; grid {k['grid']}, block {k['block']}")
    silent = [name for name in ncu.asked() if all(k["values"].get(name) is None for k in kernels)]
    lines += [f"  without a value: {', '.join(ncu.asked()[name] for name in silent)}"] if silent else []
    return "\n".join([*lines, *_work(profile)])


def _row(name: str, v: dict[str, float | None]) -> tuple[str, ...]:
    scaled = [None if v.get(f) is None else v[f] / by
              for f, by in (("time_ns", 1e3), ("read_bytes", 1e6), ("written_bytes", 1e6))]  # fmt: skip
    both = (v.get("bank_conflicts"), v.get("shared_wavefronts"))
    conflicts = None if None in both else 100 * both[0] / both[1] if both[1] else 0.0
    shares = [v.get(f) for f in ("dram_pct", "l2_pct", "l2_hit_pct", "l1_pct")]
    shares += [conflicts, *(v.get(f) for f in ("tensor_pct", "issue_pct", "occupancy_pct"))]
    return (_short(name), *(_cell(x) for x in scaled), *(_cell(x, " %") for x in shares), _cell(v.get("registers")))


def _work(profile: dict[str, Any]) -> list[str]:
    """What the work needs beside what its kernels did."""
    kernels = [k["values"] for k in profile["kernels"]]
    times, moved = ([None if None in (parts := [v.get(f) for f in fields]) else sum(parts) for v in kernels]
                    for fields in (("time_ns",), ("read_bytes", "written_bytes")))  # fmt: skip
    if None in times or not sum(times):
        return []
    ns, lines = sum(times), []
    if None not in moved:
        said = f"  moved {sum(moved) * 1e-6:.1f} MB, {sum(moved) / ns:.0f} GB/s"
        needed = f": {sum(moved) / profile['bytes']:.2f}× the {profile['bytes'] * 1e-6:.1f} MB that have to be moved"
        lines.append(said + (needed if profile["bytes"] else "; what has to be moved is not counted"))
    if profile["ops"]:
        lines.append(
            f"  {profile['ops']:.4g} operations in {ns * 1e-6:.4f} ms of kernels: {profile['ops'] / ns * 1e-3:.0f} TOPS"
        )
    return lines


def _short(name: str) -> str:
    """A kernel's name without its parameters, and not too long."""
    plain = name.partition("(")[0].removeprefix("void").strip()
    return plain[-50:] or name[:50]


def _cell(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.1f}{unit}" if value < 100 else f"{value:.0f}{unit}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fqt_bench.profile", description=__doc__.splitlines()[0], formatter_class=Defaults
    )
    parser.add_argument("--result", type=Path, nargs="+", metavar="RESULT.json",
                        help="profile what is furthest from its prediction in these")  # fmt: skip
    parser.add_argument(
        "--only", metavar="PATTERN", help='cases, "SUITE SHAPE", that contain this; * and ? as in files'
    )
    parser.add_argument("--candidate", metavar="PATTERN", help="candidates, peers too, whose names contain this")
    parser.add_argument("--suite", nargs="+", choices=NAMES, metavar="NAME", help="where cases are from; by default the "
                        "result's, or kernels and layers")  # fmt: skip
    parser.add_argument("--top", type=positive, default=6, metavar="N", help="at most so many candidates")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write all counters")
    parser.add_argument("--limit-s", type=_seconds, default=600, metavar="N", help="for all that is run together")
    parser.add_argument("--ncu", metavar="FILE", help="Nsight Compute's command line, where it is not found")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it: nothing is left on the GPU
    sys.exit(main())
