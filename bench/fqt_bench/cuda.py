"""The only module that needs a GPU: device events, the L2 flush, and the profiler's count of launches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .harness import Sample

FLUSH_BYTES = 256 * 2**20  # at least; twice the L2 where that is more
_CALIBRATION_CYCLES = 10_000_000


class CudaTimer:
    """Times a run between two events on the current stream: L2 flushed, the device held back until the host is ahead."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        words = max(2 * properties.L2_cache_size, FLUSH_BYTES) // 4
        self._written = torch.empty(words, dtype=torch.int32, device=device)
        self._read = torch.ones(words, dtype=torch.int32, device=device)
        self._spin(_CALIBRATION_CYCLES)  # raises an idle clock
        self._cycles_per_ms = _CALIBRATION_CYCLES / self._spin(_CALIBRATION_CYCLES)

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sample(self, run: Callable[[], object], lead_ms: float) -> Sample:
        """The device idles for lead_ms and then flushes its L2, while the host enqueues the run: launch gaps stay out.

        The flush writes a buffer of at least twice the L2 and then reads another, so that the run does not pay for
        writing the first one back. A sample is starved where the device reached the start event before the host was done.
        """
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(lead_ms * self._cycles_per_ms))
        self._written.fill_(1)
        self._read.max()
        start.record()
        began = time.perf_counter()
        run()
        host_ms = (time.perf_counter() - began) * 1e3
        end.record()
        starved = start.query()
        end.synchronize()
        return Sample(start.elapsed_time(end), host_ms, starved)

    def _spin(self, cycles: int) -> float:
        """ms that the device takes for so many cycles."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def memory(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object]) -> dict[str, int]:
    """Bytes that the forward keeps until its backward, its output left out, and the peak of both above what was there.

    A step before it makes whatever stays (codes of the weight, kernels, gradients).
    """
    for _ in range(2):
        y = forward()
        backward(y)
        del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    backward(y)
    torch.cuda.synchronize()
    return {"saved": saved, "peak": torch.cuda.max_memory_allocated() - before}


def launches(step: Callable[[], object]) -> dict[str, Any]:
    """What one step launches, by torch.profiler: see `count_launches`. The step must be compiled and warm.

    Raises RuntimeError where the profiler sees none: it may not be allowed to look at the device.
    """
    for _ in range(2):  # the first profile of a process may miss launches
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            step()
            torch.cuda.synchronize()
    counts = count_launches(prof.events())
    if not counts["kernels"]:
        raise RuntimeError("torch.profiler reports no kernel")
    return counts


def count_launches(events: Iterable[Any]) -> dict[str, Any]:
    """{"kernels", "copies": counts of kernels and of memory copies and fills; "by_name": count and µs of each}."""
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    counts = Counter(e.name for e in on_device)
    times: Counter[str] = Counter()
    for e in on_device:
        times[e.name] += e.time_range.elapsed_us()
    copies = sum(n for name, n in counts.items() if name.startswith(("Memcpy", "Memset")))
    by_name = {name: {"count": counts[name], "us": round(us, 1)} for name, us in times.most_common()}
    return {"kernels": sum(counts.values()) - copies, "copies": copies, "by_name": by_name}
