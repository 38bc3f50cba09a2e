"""What was expected before anything was measured, for the table to set beside the measurement. Never a measurement.

The model of a linear layer, forward and backward, with X (M, K), W (N, K):

    T_bf16 = 6·M·N·K / R_bf16          T_int8 = 6·M·N·K / R_int8 + (a·M·K + b·M·N + c·N·K) / BW

a = 6, b = 6, c = 4 bytes are moved by an ideal chain of quantize kernels. R_int8 is what a synchronous tl.dot was
expected to reach on sm_90; R_bf16 and BW are earlier readings of torch on the same kind of GPU.
"""

from __future__ import annotations

import torch

SYNCHRONOUS_TOPS = (900, 1000)  # sm_90, 128x256 tile
_READINGS = {"H100": (798, 3.0), "H200": (788, 4.3)}  # bf16 TFLOP/s at 8192³, TB/s of a copy
_TARGETS = {(False, "nearest"): 0.90, (False, "stochastic"): 0.85, (True, "nearest"): 0.85, (True, "stochastic"): 0.85}


def _reading(device: torch.device) -> tuple[float, float] | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((figures for part, figures in _READINGS.items() if part in name), None)


def matmul_bf16(device: torch.device) -> str:
    reading = _reading(device)
    return f"{reading[0]} (earlier, 8192³)" if reading else ""


def copy(device: torch.device) -> str:
    reading = _reading(device)
    return f"{reading[1] * 1000:.0f} (earlier, GBs)" if reading else ""


def synchronous_dot(device: torch.device) -> str:
    return f"{SYNCHRONOUS_TOPS[0]} to {SYNCHRONOUS_TOPS[1]}" if _reading(device) else ""


def quantize_target(both_layouts: bool, rounding: str) -> str:
    """A target rather than a prediction: the share of the copy's bandwidth."""
    return f"target ≥ {_TARGETS[both_layouts, rounding]:.2f}×"


def linear_int8(m: int, n: int, k: int, device: torch.device) -> str:
    reading = _reading(device)
    return f"{linear_ratio(m, n, k, *reading):.2f}×" if reading else ""


def linear_ratio(m: int, n: int, k: int, bf16_tflops: float, tb_s: float, int8_tops: float = 950.0) -> float:
    """T_bf16 / T_int8 of the model above."""
    ops, moved = 6.0 * m * n * k, 6.0 * m * k + 6.0 * m * n + 4.0 * n * k
    return (ops / bf16_tflops) / (ops / int8_tops + moved / tb_s)
