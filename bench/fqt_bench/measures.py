"""The figures of a result that targets are set for, each with the cost model's prediction. Pure functions of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .harness import DIFFERS_FROM, SAME_AS
from .householder import SUITE as HOUSEHOLDER

FAILED = ("wrong", "error")
GEMM, LINEAR, QUANTIZE = "gemm", "linear fwd+bwd", "quantize"
Result = dict[str, Any]


class Measure(Protocol):
    """A figure of a result, None where it is missing. predicted: by the cost model before the run. why: it is missing."""

    def __call__(self, result: Result) -> float | None: ...
    def predicted(self, result: Result) -> float | None: ...
    def why(self, result: Result) -> str: ...


def best(result: Result, suite: str, shape: str, tags: Sequence[str], field: str = "tops") -> float | None:
    """The largest figure of the candidates with one of these tags that passed their checks; "per_ms": runs in one."""
    found = [_figure(c, field) for _, c in _tagged(result, suite, shape, tags) if c["status"] == "ok"]
    return max(filter(None, found), default=None)


def _tagged(result: Result, suite: str, shape: str, tags: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The case, and a candidate with one of the tags, for each."""
    return [(case, c) for case in result["cases"] if (case["suite"], case["shape"]) == (suite, shape)
            for c in case["candidates"] if c["tag"] in tags]  # fmt: skip


def _figure(candidate: dict[str, Any], field: str) -> float | None:
    return 1 / candidate["ms"]["median"] if field == "per_ms" else candidate.get(field)


# A rate, such as "1165 (datasheet)", or a ratio to the baseline, "1.45× (measured)"; a time.
_EXPECTED = re.compile(r"(\d+(?:\.\d+)?)(×?)(?: \([a-z]+\))?")
_MILLISECONDS = re.compile(r"(\d+(?:\.\d+)?) ms")


def _expected(result: Result, suite: str, shape: str, tags: Sequence[str], relative: bool) -> float | None:
    """The largest predicted rate of the candidates, or ratio to their case's baseline, whose own is 1."""
    found = []
    for case, c in _tagged(result, suite, shape, tags):
        match = _EXPECTED.fullmatch(c["prediction"])
        if match and bool(match[2]) == relative:
            found.append(float(match[1]))
        elif relative and c["name"] == case["baseline"]:
            found.append(1.0)
    return max(found, default=None)


@dataclass(frozen=True)
class Rate:
    """The rate of the best candidate with one of `tags`; with `base`, over that of the best with one of those."""

    suite: str
    shape: str
    tags: Sequence[str]
    base: Sequence[str] = ()
    field: str = "tops"

    def __call__(self, result: Result) -> float | None:
        ours = best(result, self.suite, self.shape, self.tags, self.field)
        theirs = best(result, self.suite, self.shape, self.base, self.field) if self.base else 1.0
        return None if ours is None or theirs is None else ours / theirs

    def predicted(self, result: Result) -> float | None:
        for relative in (False, True) if self.base else (False,):
            ours, theirs = (_expected(result, self.suite, self.shape, t, relative) for t in (self.tags, self.base))
            if ours and (theirs or not self.base):
                return ours / (theirs or 1.0)
        return None

    def why(self, result: Result) -> str:
        return _why(result, self.suite, self.shape, self.tags, *([self.base] if self.base else []))


def _why(result: Result, suite: str, shape: str, *groups: Sequence[str]) -> str:
    """Why none of the candidates of a group has a figure, or why there is no such case, in the words of the run."""
    cases = [case for case in result["cases"] if (case["suite"], case["shape"]) == (suite, shape)]
    if not cases:
        left_out = (s for s in result["skipped"] if (s["suite"], s["shape"]) == (suite, shape))
        return next((f"{suite} {shape}: {said(s)}" for s in left_out), "")
    for tags in groups:
        found = [c for _, c in _tagged(result, suite, shape, tags)]
        if not any(c["status"] == "ok" for c in found):
            none = f"no {' or '.join(tags)} in {suite} {shape}"
            return f"{found[0]['name']}: {said(found[0])}" if found else none
    return ""


@dataclass(frozen=True)
class BeyondPsq:
    """What BHQ's whole input gradient takes beyond PSQ's, in percent of the product that they have in common: statistics,
    grouping, transform and quantization less PSQ's quantization, and the inverse, or what the product with it takes more.
    """

    shape: str
    tag: str

    @property
    def tags(self) -> tuple[str, ...]:
        return self.tag, "psq whole", "product"

    def __call__(self, result: Result) -> float | None:
        return self._percent([best(result, HOUSEHOLDER, self.shape, [tag], "per_ms") for tag in self.tags])

    def predicted(self, result: Result) -> float | None:
        found = []
        for tag in self.tags:
            texts = (c["prediction"] for _, c in _tagged(result, HOUSEHOLDER, self.shape, [tag]))
            found.append(next((1 / float(m[1]) for m in map(_MILLISECONDS.match, texts) if m and float(m[1])), None))
        return self._percent(found)

    def _percent(self, per_ms: Sequence[float | None]) -> float | None:
        if None in per_ms:
            return None
        ours, psq, product = (1 / r for r in per_ms)
        return 100 * (ours - psq) / product

    def why(self, result: Result) -> str:
        return _why(result, HOUSEHOLDER, self.shape, *([tag] for tag in self.tags))


@dataclass(frozen=True)
class Counted:
    """A figure that is counted, and has no prediction."""

    count: Callable[[Result], float | None]

    def __call__(self, result: Result) -> float | None:
        return self.count(result)

    def predicted(self, result: Result) -> None:
        return None

    def why(self, result: Result) -> str:
        return ""


def saved(result: Result) -> float | None:
    saved = {r["name"]: r["saved"] for r in result["memory"]}
    return saved["int8"] / saved["bf16"] if {"int8", "bf16"} <= saved.keys() else None


def repeated(result: Result) -> float | None:
    """The share of the own candidates that repeat their bits; those that could not run are none."""
    found = [r for r in result["repeats"] if r["status"] in ("ok", *FAILED)]
    same = [r for r in found if r["status"] == "ok" or r["remark"].startswith(DIFFERS_FROM)]
    return 100.0 * len(same) / len(found) if found else None


def independent(result: Result) -> float | None:
    """The share of the products' candidates, splits of K among them, whose bits are those of the case's first."""
    compared = (r for r in result["repeats"] if SAME_AS in r["remark"] or r["remark"].startswith(DIFFERS_FROM))
    found = [r for r in compared if r["suite"] == GEMM]
    if not any(" split " in r["name"] for r in found):
        return None
    return 100.0 * sum(r["status"] == "ok" for r in found) / len(found)


def launched(name: str, shape: str) -> Counted:
    """Kernels that a run of this candidate launches."""
    key = (name, shape)
    return Counted(
        lambda result: next((r["kernels"] for r in result["launches"] if (r["name"], r["shape"]) == key), None)
    )


def said(record: dict[str, Any]) -> str:
    """The status and what was found."""
    return ": ".join(filter(None, (record["status"], record["remark"])))
