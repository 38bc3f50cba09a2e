"""Statistics, comparisons and hostile memory that tests state their laws with. Every bound says where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fqt import reference
from fqt.guarded import GuardedTorch as GuardedTorch
from fqt.qtensor import Operand

EPS = 2.0**-24  # half an ulp of 1 in float32: the relative error of one rounding
DITHER = 2.0**-17  # bins: stochastic rounding draws 16 bits, so its mean is off by up to half of 2**-16


# ---- statistics


def assert_unbiased(
    draw: Callable[[int], Tensor],
    expected: Tensor,
    draws: int,
    sigmas: float = 5.0,
    *,
    bin: Tensor | float | None = None,
) -> None:
    """The mean of draw(0), …, draw(draws - 1) is the matrix expected: t-tests on sums, with the draws' own variance.

    Single elements are rarely normal (a code that steps up once in 10 000 draws), so sums are tested: over everything (a
    common bias; `sigmas` is its limit), weighted by expected and by its signs (a shrunken gradient), with 16 patterns of
    random signs, and over every row and column of a matrix that has at least 8 of both. Of T standard normal variables
    the largest is beyond √(2 ln T) + 4 with probability below 1e-4.

    bin, where it is given, is the width of an element's bin: a draw is one of the bin's two ends, so that by Hoeffding
    P(|mean - expected| > bin·√(ln(2N/1e-6) / (2·draws))) ≤ 1e-6 over all N elements.

    Float arithmetic moves a mean by a few ulps of the largest value, 16-bit dither by 2⁻¹⁷ bins; both are allowed for.
    """
    m, n = expected.shape
    expected = expected.double()
    signs = torch.randint(0, 2, (16, m * n), generator=torch.Generator().manual_seed(20101429)) * 2.0 - 1
    flat = expected.flatten()
    weights = [torch.ones_like(flat), flat / flat.abs().max().clamp(min=1e-300), flat.sign()]
    weights = torch.cat([torch.stack(weights), signs.to(flat)])
    slack = 8 * EPS * float(flat.abs().max()) + (0 if bin is None else 2 * DITHER * float(torch.as_tensor(bin).max()))
    allowed = [slack * weights.abs().sum(1)]
    if min(m, n) >= 8:
        allowed += [torch.full((m + n,), slack * max(m, n), dtype=torch.float64, device=flat.device)]
    sums, squares, mean = 0.0, 0.0, torch.zeros_like(expected)
    for first in range(0, draws, 64):
        errors = torch.stack([draw(i).double() - expected for i in range(first, min(first + 64, draws))])
        statistics = [errors.flatten(1) @ weights.t()] + ([errors.sum(2), errors.sum(1)] if min(m, n) >= 8 else [])
        statistics = torch.cat(statistics, 1)
        mean += errors.sum(0) / draws
        sums, squares = sums + statistics.sum(0), squares + (statistics**2).sum(0)
    average = sums / draws
    deviation = ((squares / draws - average**2).clamp(min=0) / (draws - 1)).sqrt()
    z = (average.abs() - torch.cat(allowed)).clamp(min=0) / deviation.clamp(min=1e-300)
    limit = math.sqrt(2 * math.log(z.numel())) + 4
    assert float(z[0]) < sigmas, f"the mean is biased: z = {float(z[0]):.1f}"
    assert float(z.max()) < limit, f"a sum is biased: z = {float(z.max()):.1f}, limit {limit:.1f}"
    if bin is not None:
        width = math.sqrt(math.log(2 * expected.numel() / 1e-6) / (2 * draws))
        excess = float((mean.abs() - torch.as_tensor(bin) * width - slack).max())
        assert excess <= 0, f"an element is biased by {excess:.3g} more than {width:.3f} bins"


def total_variance(draw: Callable[[int], Tensor], expected: Tensor, draws: int) -> float:
    """Σ_ij E (x_ij - expected_ij)² over draws, in float64."""
    return sum(float((draw(i).double() - expected.double()).square().sum()) for i in range(draws)) / draws


def random_state(key: int = 0, step: int = 0, device: str = "cpu") -> Tensor:
    """A (2,) int64 (key, step); keys of small integers are spread over 64 bits."""
    return torch.tensor([(key * 0x9E3779B97F4A7C15 + 0x1234567) % 2**63, step], device=device)


def overshooting(zero: str, m: int = 16, n: int = 256) -> tuple[Tensor, Tensor]:
    """(x, rng): rows from 0 to an end that float32's rounding puts beyond the last of 8 affine bits.

    The end times the rounded inverse of the rounded scale is 255 + 2⁻¹⁶: an element whose 16 random bits are all 1, and
    one is there, rounds that to 256. (Symmetric codes of float32 overshoot by half as much at most, which rounds away.)
    """
    end = 1 + torch.arange(4096) / 4096
    _, inv, z, i, _ = reference.quantization_params(0 * end, end, 8, zero)
    end = end[(end - z) * inv + i > 255][:m, None]
    assert len(end) == m
    for step in range(1000):
        bits = reference.random_bits(random_state(21, step), m, n)
        if bool((bits == 65535).any()):
            return torch.where(bits >= 32768, end, 0 * end), random_state(21, step)
    raise AssertionError("no element has 65535 as its random bits")


# ---- comparisons


def assert_same(actual: Tensor | None, expected: Tensor | None, what: str = "value") -> None:
    """Equal in dtype, shape and every value (NaN equals NaN, -0 equals 0); both absent is equal."""
    if actual is None or expected is None:
        assert actual is expected, f"{what}: {'absent' if actual is None else 'present'} against the reference"
        return
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    different = ~torch.isclose(actual, expected, rtol=0, atol=0, equal_nan=True)
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} differ, first at {at}: "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two float tensors hold the same values, NaN being one of them."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def ulp(x: Tensor) -> Tensor:
    """The distance of a float16 or bfloat16 value from the next one away from zero, in float32."""
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(x.float().abs().clamp(min=info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float32), exponent - 1)


# ---- hostile memory


def poisoned(x: Tensor) -> Tensor:
    """x as a strided view into a larger tensor of NaN (integers: of large values): reading outside of it shows."""
    m, n = x.shape
    frame = torch.full((m + 3, 2 * n + 5), _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = frame[1 : m + 1, 2 : 2 * n + 2 : 2]
    view.copy_(x)
    return view


def poisoned_rows(x: Tensor, stride: int) -> Tensor:
    """x (M, N) as rows `stride` ≥ N elements apart, last stride 1, with poison between, before and after them."""
    m, n = x.shape
    frame = torch.full((m + 2, stride), _poison(x.dtype), dtype=x.dtype, device=x.device)
    frame[1 : m + 1, :n] = x
    return frame[1 : m + 1, :n]


def poisoned_tail(x: Tensor) -> Tensor:
    """A vector with 64 poisoned elements on either side."""
    return poisoned_rows(x[None], x.numel() + 64)[0]


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max - 6


def random_operand(rows: int, k: int, granularity: str, offset: bool, single: bool, seed: int) -> Operand:
    """Random codes with extreme ones, scales and offsets of many magnitudes; single: one offset."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (rows, k), generator=g, dtype=torch.int8)
    q[0] = -128
    n = rows if granularity == "per_row" else 1
    scale = None if granularity == "none" else torch.exp(2 * torch.randn(n, generator=g))
    shift = torch.randn(1 if single else n, generator=g) if offset else None
    return Operand(q, scale, shift, q.sum(1, dtype=torch.int32))
