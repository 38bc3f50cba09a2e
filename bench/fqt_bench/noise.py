"""How far apart two measurements of identical code lie on a machine, and from when on a difference is none of it.

Stored, by machine, protocol and case: |log ratio| of comparisons of a tree with itself, the newest last.

The threshold of a case. Let n such values be stored, and let two more be measured of identical code: the comparison and,
if it exceeds the threshold, its confirmation. Nothing distinguishes the n + 2 values (they are exchangeable), whatever
their distribution. So both new ones exceed the k-th largest of the stored ones with probability
k (k + 1) / ((n + 1) (n + 2)), and both are slow-downs, a ratio's sign being a coin's, in a quarter of that. The threshold is
the k-th largest with the greatest k for which this is at most ALARMS / cases. Where not even k = 1 is (few are stored), the
largest is extrapolated: as though P(|log ratio| > t) fell like t^-TAIL, heavier than any noise we have seen. A difference
below FLOOR is not worth an alarm.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

SCHEMA = 1
ALARMS = 1 / 200  # false ones for each comparison of all cases: one in 40 comparisons has a chance of about a fifth
ENOUGH = 20  # values of a case below which noise is measured before anything is compared
KEPT = 200  # values of a case
TAIL = 2.0
FLOOR = math.log(1.03)


def threshold(stored: Sequence[float], cases: int = 1) -> float:
    """The |log ratio| that identical code exceeds twice running, as a slow-down, with probability ALARMS / cases at most.

    Raises:
        ValueError: nothing is stored.
    """
    if not stored:
        raise ValueError("a threshold needs measured noise")
    n, wanted = len(stored), ALARMS / cases
    descending = sorted(stored, reverse=True)
    k = max((k for k in range(1, n + 1) if _both(k, n) <= wanted), default=0)
    if k:
        return max(descending[k - 1], FLOOR)
    # The chance of both is the square of one's, and one's falls like t^-TAIL.
    return max(descending[0] * (_both(1, n) / wanted) ** (1 / (2 * TAIL)), FLOOR)


def _both(k: int, n: int) -> float:
    """The chance that both of two further values are slow-downs beyond the k-th largest of n."""
    return k * (k + 1) / (4 * (n + 1) * (n + 2))


class Noise:
    """The stored values of one machine and one protocol in a file."""

    def __init__(self, path: Path, machine: str, protocol: str) -> None:
        self.path, self.key = path, f"{machine} | {protocol}"
        self.cases = _read(path).get(self.key, {})

    def of(self, case: str) -> list[float]:
        return self.cases.get(case, [])

    def add(self, values: Mapping[str, float]) -> None:
        """Append one |log ratio| to each case and write the file, other machines' values and other processes' kept.

        Raises:
            OSError: the file cannot be written.
        """
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            everything = _read(self.path)
            self.cases = everything.setdefault(self.key, {})
            for case, value in values.items():
                self.cases[case] = [*self.cases.get(case, []), round(abs(value), 6)][-KEPT:]
            text = json.dumps({"schema": SCHEMA, "noise": everything}, indent=1)
            part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, self.path)


def default_path() -> Path:
    from fqt import store

    return store.directory() / "bench-noise.json"


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    """What a file holds; nothing where there is none or it is not one of ours: then noise is measured anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return {}
        return {
            str(key): {str(case): [_value(v) for v in values] for case, values in cases.items()}
            for key, cases in content["noise"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _value(v: object) -> float:
    if not isinstance(v, (int, float)) or not math.isfinite(v) or v < 0:
        raise ValueError(f"no |log ratio|: {v!r}")
    return float(v)
