"""Timing on the CPU, where a run is over when its call returns."""

from __future__ import annotations

import time
from collections.abc import Callable

from .harness import Sample


class CpuTimer:
    """Times a call by the monotonic clock; nothing is enqueued, so that there is no head start and nothing to wait for."""

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def sample(self, run: Callable[[], object], lead_ms: float) -> Sample:
        began = time.perf_counter_ns()
        run()
        return Sample(max(time.perf_counter_ns() - began, 1) * 1e-6, 0.0, False)
