"""What the capture of a CUDA graph asks for: whether one is going on, and constants on a device that outlive it.

A captured operation runs at each replay, and the Python around it does not. So nothing may be read back to the host, copied
from pageable memory, or kept that was made in a capture: it lies in the graph's own memory, and has no value before the
first replay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def is_capturing(device: torch.device | str | None = None) -> bool:
    """Whether what this thread launches now on a device, by default on the current GPU, goes into a CUDA graph."""
    on_gpu = torch.cuda.is_initialized() if device is None else torch.device(device).type == "cuda"
    return on_gpu and torch.cuda.is_current_stream_capturing()


def refuse(what: str) -> None:
    """Raise the error of a step that cannot be captured; what: why.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{what}: a first step cannot be captured in a CUDA graph, take one before")


class Constants(Generic[T]):
    """Tensors that are a function of numbers and a device, kept for the next call.

    make(*of), of which the last is the device, computes on that device alone: it copies nothing from the host. At most
    `limit` values are kept, the last used; those that a capture read, for good: every replay reads them again. What is not
    there yet in a capture is made by the graph, at each replay, and not kept.
    """

    def __init__(self, make: Callable[..., T], limit: int = 256) -> None:
        self._make, self._limit = make, limit
        self._known: dict[tuple, T] = {}
        self._captured: dict[tuple, T] = {}
        self._lock = threading.Lock()  # backward passes run on threads of autograd's

    def __call__(self, *of) -> T:
        capturing = is_capturing(of[-1])
        with self._lock:
            value = self._known.pop(of, self._captured.get(of))
            if value is not None:
                self._known[of] = value  # the last used
                if capturing:
                    self._captured[of] = value
                return value
        value = self._make(*of)
        if not capturing:
            if torch.device(of[-1]).type == "cuda":  # another stream may read it next
                torch.cuda.current_stream(of[-1]).synchronize()
            with self._lock:
                self._known[of] = value
                while len(self._known) > self._limit:
                    del self._known[next(iter(self._known))]
        return value

    def clear(self) -> None:
        """Forget what no capture has read."""
        with self._lock:
            self._known.clear()

    def __len__(self) -> int:
        return len(self._known.keys() | self._captured.keys())
