"""Statistics and comparisons that tests state their laws with. Every bound says where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def assert_unbiased(draw: Callable[[int], Tensor], expected: Tensor, draws: int, sigmas: float = 5.0) -> None:
    """The mean of draw(0), …, draw(draws - 1) agrees with expected: two z-tests with the draws' own variance.

    One on the sum over all elements of their deviations with random signs (a common bias), one on the largest |z| of a
    single element. With N elements the largest of N standard normal variables exceeds √(2 ln N) + 4 with probability
    below 1e-4 (Gumbel tail); the few elements without any variance must be exact to float32 rounding.
    """
    mean, square = torch.zeros_like(expected, dtype=torch.float64), torch.zeros_like(expected, dtype=torch.float64)
    for i in range(draws):
        x = draw(i).double()
        mean += x
        square += x * x
    mean /= draws
    variance = (square / draws - mean * mean).clamp(min=0) * draws / (draws - 1)
    error = mean - expected.double()
    # Rounding of float32 arithmetic: a few ulps of the largest value that entered an element's computation.
    floor = 4 * 2.0**-23 * float(expected.abs().max())
    z = (error.abs() - floor).clamp(min=0) / (variance / draws).sqrt().clamp(min=1e-300)
    z = torch.where(error.abs() <= floor, torch.zeros_like(z), z)
    limit = math.sqrt(2 * math.log(max(expected.numel(), 2))) + 4
    assert float(z.max()) < limit, f"an element is biased: z = {float(z.max()):.1f}, limit {limit:.1f}"
    total = float(error.sum()) / max(math.sqrt(float((variance / draws).sum())), floor * math.sqrt(expected.numel()) + 1e-300)
    assert abs(total) < sigmas, f"the mean is biased: z = {total:.1f}"


def total_variance(draw: Callable[[int], Tensor], expected: Tensor, draws: int) -> float:
    """Σ_ij E (x_ij - expected_ij)² over draws, in float64."""
    return sum(float((draw(i).double() - expected.double()).square().sum()) for i in range(draws)) / draws


def random_state(key: int = 0, step: int = 0, device: str = "cpu") -> Tensor:
    """A (2,) int64 (key, step); keys of small integers are spread over 64 bits."""
    return torch.tensor([(key * 0x9E3779B97F4A7C15 + 0x1234567) % 2**63, step], device=device)


def poisoned(x: Tensor) -> Tensor:
    """x as a strided view into a larger tensor of NaN: reading outside of it shows."""
    m, n = x.shape
    frame = torch.full((m + 3, 2 * n + 5), float("nan"), dtype=x.dtype, device=x.device)
    view = frame[1 : m + 1, 2 : 2 * n + 2 : 2]
    view.copy_(x)
    return view
