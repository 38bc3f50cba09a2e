"""What runs under Nsight Compute: one candidate of a case, warm, and one run of it between cudaProfilerStart and Stop.

    python -m fqt_bench.profile_child '{"mode": "candidate", "suites": [...], "suite": …, "shape": …, "name": …}'

mode "candidate": the run alone is profiled. "durations": torch.profiler times its kernels instead. "copy": a kernel of known
traffic in place of a candidate. "list": the candidates of the cases that match "only", nothing is run. The last line of its
output is an answer in JSON; exit status 1, and {"failed": why}, where the candidate cannot run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .harness import Candidate
from .products import DISPATCHED
from .suites import plans

WARM_UPS = 3
COPY_BYTES = 2**30  # read, and as many written: a multiple of any L2


class Hooks(NamedTuple):
    """What a GPU is needed for. launches: `fqt_bench.cuda.launches`."""

    synchronize: Callable[[], object]
    start: Callable[[], object]
    stop: Callable[[], object]
    launches: Callable[[Callable[[], object]], dict[str, Any]]


def of_cuda() -> Hooks:
    from .cuda import launches

    return Hooks(torch.cuda.synchronize, torch.cuda.profiler.start, torch.cuda.profiler.stop, launches)


def region(run: Callable[[], object], hooks: Hooks, warm_ups: int = WARM_UPS) -> None:
    """Run once between start and stop, and before it outside of them; nothing is in flight at either."""
    for _ in range(warm_ups):
        run()
    hooks.synchronize()
    hooks.start()
    try:
        run()
        hooks.synchronize()
    finally:
        hooks.stop()


def answer(work: dict[str, Any], device: torch.device, hooks: Hooks) -> Any:
    """What the mode gives, ready for JSON. Raises LookupError where there is no such case or candidate."""
    mode = work["mode"]
    if mode == "list":
        return listing(work["suites"], work["only"], device)
    if mode == "copy":
        return copy(work.get("bytes", COPY_BYTES), device, hooks)
    candidate = find(work["suites"], work["suite"], work["shape"], work["name"], device)
    said = {"ops": candidate.ops, "bytes": candidate.bytes}
    if mode == "candidate":
        region(lambda: candidate.run(0), hooks)
        return said
    for _ in range(WARM_UPS):
        candidate.run(0)
    by_name = hooks.launches(lambda: candidate.run(0))["by_name"]
    return {**said, "kernels": [{"name": name, **found} for name, found in by_name.items()]}


def copy(size: int, device: torch.device, hooks: Hooks) -> dict[str, int]:
    """Read so many bytes and write as many, in a kernel: ncu does not see what `copy_` starts, a copy of the driver's."""
    x = torch.ones(size // 4, dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    region(lambda: torch.neg(x, out=y), hooks)
    return {"bytes": x.numel() * 4}


def listing(suites: Sequence[str], only: str, device: torch.device) -> list[dict[str, Any]]:
    """{"suite", "shape", "name", "ours"} of every candidate that can run, of the cases that match."""
    found = []
    for plan in plans(suites, device, False, only):
        if plan.key == "cases":
            case = plan.build(sets=1)
            found += [{"suite": case.suite, "shape": case.shape, "name": c.name, "ours": c.ours}
                      for c in case.candidates if not c.missing]  # fmt: skip
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def find(suites: Sequence[str], suite: str, shape: str, name: str, device: torch.device) -> Candidate:
    """A candidate of a case, on one set of inputs, whether dispatch selects it now or did then. Raises LookupError, of one
    that cannot run too."""
    quick_or_not = (plan for quick in (False, True) for plan in plans(suites, device, quick))
    plan = next((p for p in quick_or_not if p.key == "cases" and (p.suite, p.shape) == (suite, shape)), None)
    if plan is None:
        raise LookupError(f"no case {suite} {shape} in the suites {' '.join(suites)}")
    wanted = name.removesuffix(DISPATCHED)
    candidate = next((c for c in plan.build(sets=1).candidates if c.name.removesuffix(DISPATCHED) == wanted), None)
    if candidate is None or candidate.missing:
        raise LookupError(f"{suite} {shape}: {name}: {candidate.missing if candidate else 'no such candidate'}")
    return candidate


def main(argv: Sequence[str], device: torch.device | None = None, hooks: Hooks | None = None) -> int:
    try:
        said = answer(
            json.loads(argv[0]), device or torch.device("cuda", torch.cuda.current_device()), hooks or of_cuda()
        )
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0][:300]
        print(json.dumps({"failed": f"{type(error).__name__}: {text}"}), flush=True)
        return 1
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
