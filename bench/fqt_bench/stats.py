"""Figures of samples that were taken in interleaved rounds: percentiles, and ratios with their confidence intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

RESAMPLES = 1000
CONFIDENCE = 0.95


class Ratio(NamedTuple):
    """value, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def speed_ups(
    base: Sequence[float], times: Mapping[str, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Ratio]:
    """median(base) / median(times[name]) for each name, with its 95 % interval: a percentile bootstrap over rounds.

    Element i of every sequence is of round i, which is drawn as a whole: what slowed all candidates of a round, such as
    a clock that fell, slows both sides of a ratio. The same samples and seed give the same interval.

    Raises:
        ValueError: sequences of different lengths, or empty ones.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    rounds = len(base)
    if not rounds or any(len(values) != rounds for values in times.values()):
        raise ValueError(f"as many samples as rounds, got {[rounds, *map(len, times.values())]}")
    draw = random.Random(seed).choices
    drawn: dict[str, list[float]] = {name: [] for name in times}
    everyone = range(rounds)
    for _ in range(resamples):
        picked = draw(everyone, k=rounds)
        over = median([base[i] for i in picked])
        for name, values in times.items():
            drawn[name].append(over / median([values[i] for i in picked]))
    tail = 50 * (1 - CONFIDENCE)
    over = median(base)
    return {
        name: Ratio(over / median(times[name]), percentile(ratios, tail), percentile(ratios, 100 - tail))
        for name, ratios in drawn.items()
    }


def of_the_copy(record: dict[str, Any]) -> dict[str, float]:
    """The bytes a second of each measured candidate over those of the copy of the same case, by name; empty without one."""
    ok = {c["name"]: c for c in record["candidates"] if c["status"] == "ok" and c["gb_s"]}
    copy = next((c["gb_s"] for c in ok.values() if c["tag"].endswith("copy")), None)
    return {} if copy is None else {name: c["gb_s"] / copy for name, c in ok.items()}
