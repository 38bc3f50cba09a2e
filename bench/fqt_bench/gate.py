"""The decision about timings: which cases are slower in one tree than in another, by more than the machine's noise.

Noise is measured first where too little is stored. What exceeds its threshold (`noise.threshold`) is measured again in
fresh processes, and only what exceeds it twice in the same direction counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .duel import Duel
from .noise import ENOUGH, Noise, threshold
from .trees import Tree

# The cases that `timed.CASES` sets up; named here because that module imports torch.
CASES = ("quantize per_row nearest", "quantize per_row stochastic", "scaled_mm",
         "linear int8 step", "linear psq8 step", "linear bhq8 step")  # fmt: skip
Fight = Callable[[Tree, Tree, Sequence[str]], list[Duel]]


@dataclass(frozen=True)
class Timing:
    """status: "same", "regression", "improvement", "not confirmed", "unknown" in a tree, or "failed" in one.

    threshold: on |log ratio|, 0.0 where nothing was timed. stored: how many values of noise it is derived from.
    """

    name: str
    status: str
    first: Duel
    confirmation: Duel | None = None
    threshold: float = 0.0
    stored: int = 0

    @property
    def regression(self) -> bool:
        """Slower, or broken where the base was not."""
        last = self.confirmation or self.first
        return self.status == "regression" or (self.status == "failed" and "base" not in last.failed)


def judge(
    base: Tree,
    head: Tree,
    cases: Sequence[str],
    noise: Noise,
    fight: Fight,
    say: Callable[[str], None] = lambda text: None,
) -> list[Timing]:
    """Time the cases and decide. What identical trees yield is added to the noise, after it was judged.

    Raises:
        OSError: the noise cannot be stored.
    """
    _measure_noise(base, cases, noise, fight, say)
    limits = {case: threshold(noise.of(case), len(cases)) for case in cases if noise.of(case)}
    first = fight(base, head, cases)
    suspects = [d.name for d in first if d.timed and d.name in limits and abs(d.log_ratio) > limits[d.name]]
    if suspects:
        say(f"measuring again: {', '.join(suspects)}")
    again = {duel.name: duel for duel in fight(base, head, suspects)} if suspects else {}
    timings = []
    for duel in first:
        limit, stored = limits.get(duel.name, 0.0), len(noise.of(duel.name))
        known = duel.name in limits or not duel.timed  # else its noise could not be measured, but it could
        status = _status(duel, again.get(duel.name), limit) if known else "unknown"
        timings.append(Timing(duel.name, status, duel, again.get(duel.name), limit, stored))
    if base.digest == head.digest:
        noise.add({duel.name: duel.log_ratio for duel in first if duel.timed})
    return timings


def _measure_noise(base: Tree, cases: Sequence[str], noise: Noise, fight: Fight, say: Callable[[str], None]) -> None:
    impossible: set[str] = set()
    while lacking := [case for case in cases if len(noise.of(case)) < ENOUGH and case not in impossible]:
        have = min(len(noise.of(case)) for case in lacking)
        say(f"measuring the noise of this machine, {have + 1} of {ENOUGH}")
        same = fight(base, base, lacking)
        impossible |= {duel.name for duel in same if not duel.timed}
        noise.add({duel.name: duel.log_ratio for duel in same if duel.timed})


def _status(first: Duel, again: Duel | None, limit: float) -> str:
    if not first.timed:
        return "failed" if first.failed else "unknown"
    if abs(first.log_ratio) <= limit:
        return "same"
    if again is None or not again.timed:
        return "failed"
    if abs(again.log_ratio) <= limit or first.log_ratio * again.log_ratio < 0:
        return "not confirmed"
    return "regression" if first.log_ratio > 0 else "improvement"
