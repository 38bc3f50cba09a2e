"""Whose code a case is measured against, and why it cannot be where it cannot: a peer is never silently absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

INSTALL = "pip install 'fqt-kernels[peers]'"


class Provider(NamedTuple):
    """package: what candidates give as their provider. against(device): why it cannot run there, "" where it can."""

    package: str
    against: Callable[[torch.device], str]


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU has products of e4m3 codes."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def _needs_fp8(device: torch.device) -> str:
    return "" if has_fp8(device) else "needs a GPU with float8 products (sm_89 or newer)"


def _needs_gpu_and(package: str) -> Callable[[torch.device], str]:
    def against(device: torch.device) -> str:
        if importlib.util.find_spec(package) is None:
            return f"not installed: {package} ({INSTALL})"
        return "" if device.type == "cuda" else "needs a GPU"

    return against


PROVIDERS = {
    "torch": Provider("torch", lambda device: ""),
    "torch.compile": Provider("torch", lambda device: "" if device.type == "cuda" else "needs a GPU"),
    "torch._int_mm": Provider("torch", lambda device: "" if hasattr(torch, "_int_mm") else "needs torch._int_mm"),
    "torch._scaled_mm": Provider("torch", _needs_fp8),
    "torchao": Provider("torchao", _needs_gpu_and("torchao")),
    "torchao float8": Provider("torchao", lambda device: _needs_gpu_and("torchao")(device) or _needs_fp8(device)),
    "bitsandbytes": Provider("bitsandbytes", _needs_gpu_and("bitsandbytes")),
}


def peer(name: str, device: torch.device) -> dict[str, str]:
    """The fields `provider` and `missing` of a candidate of that provider."""
    provider = PROVIDERS[name]
    return {"provider": provider.package, "missing": provider.against(device)}
