"""Tables of measured kernels: what tuning found, as plain data. Standard library only; nothing of a table is executed.

An entry ranks the candidates of one bucket of problems, so that sizes that jitter (a batch's tokens) share one.

>>> [bucket(size) for size in (0, 1, 17, 4096, 4097, 28672)]
[0, 16, 20, 4096, 5120, 28672]
>>> entry = Entry(Key("scaled_mm", "int", "", "", 1, 4096, 4096, 4096),
...               (Timing("portable", (128, 256, 128, 8, 3), 1, 141_000),), 0, (4096, 4000, 4096))
>>> Table([entry]).to_json()
[{'op': 'scaled_mm', 'format': 'int', 'dtype': '', 'kind': '', 'exact': [4096, 4000, 4096], 'bf16_ns': 0, \
'ranking': [{'kernel': 'portable', 'config': [128, 256, 128, 8, 3], 'split_k': 1, 'ns': 141000}]}]
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from . import conv_problems

if TYPE_CHECKING:
    from .dispatch import Problem

PRODUCTS = ("scaled_mm", *conv_problems.PRODUCTS)  # beside which bf16 is timed
OPS = ("scaled_mm", "quantize", "quantize_gradient", *conv_problems.GRAMMAR)
CODES_ONLY = (*PRODUCTS, conv_problems.ARRANGED)
FORMATS = ("int", "e4m3")
DTYPES = ("float32", "float16", "bfloat16")  # of what is quantized; "" of what reads nothing but codes
# Of a kind: granularity, rounding, layout, and what else `Problem.kind` may say; convolutions have a grammar of their own.
WORDS = ("per_tensor", "per_row", "per_column", "nearest", "stochastic", "rows", "cols", "both", "strided", "stats")
MAX_RANKING = MAX_CONFIG = MAX_WORDS = 8
MAX_NAME = 32
MAX_VALUE = 1 << 16  # of a configuration
MAX_SIZE = 1 << 48  # of a dimension
MAX_NS = 1 << 53


class Key(NamedTuple):
    """A bucket of problems that share an entry. dtype: of what is quantized, "" of what reads nothing but codes. kind: as in
    `Problem`. aligned: 1 where n and k, of "conv" a tap's part of k, are multiples of 16. m, n, k: buckets."""

    op: str
    format: str
    dtype: str
    kind: str
    aligned: int
    m: int
    n: int
    k: int


class Timing(NamedTuple):
    """A candidate and its median time in nanoseconds."""

    kernel: str
    config: tuple[int, ...]
    split_k: int
    ns: int


class Entry(NamedTuple):
    """What was measured of a key, at the sizes exact = (m, n, k): the candidates, the best first, at most 8.

    bf16_ns: torch.matmul, or cuDNN's convolution, in bfloat16 of the same sizes, 0 where not measured. origin: "" of this
    machine, else where the entry came from ("shipped", "rank 0"): for the text of a choice, part of neither the JSON nor a
    table's digest.
    """

    key: Key
    ranking: tuple[Timing, ...]
    bf16_ns: int
    exact: tuple[int, int, int]
    origin: str = ""


def is_complete(entry: Entry | None) -> bool:
    """Whether an entry says all that tuning can: of a product, also bf16's time, for which there is none inside a step."""
    return entry is not None and (entry.bf16_ns > 0 or entry.key.op not in PRODUCTS)


def bucket(size: int) -> int:
    """The size that stands for `size`: 0 for 0, 16 up to 16, else rounded up to one of four sizes an octave."""
    if size <= 16:
        return 16 if size else 0
    step = 1 << (size.bit_length() - 3)  # an eighth of the power of two above
    return -(-size // step) * step


def key(problem: Problem) -> Key:
    """The key of a problem."""
    dtype = "" if problem.op in CODES_ONLY else problem.dtype
    return _key(problem.op, problem.format, dtype, problem.kind, (problem.m, problem.n, problem.k))


def _key(op: str, format: str, dtype: str, kind: str, sizes: tuple[int, int, int]) -> Key:
    _, n, k = sizes
    terms = k // conv_problems.count(kind, "taps") if op == "conv" else k
    return Key(op, format, dtype, kind, int(n % 16 == terms % 16 == 0), *map(bucket, sizes))


class Table:
    """Entries by key. Immutable; equal only to itself, so that it is a cheap part of a cache's key."""

    __slots__ = ("__dict__", "_entries")

    def __init__(self, entries: Iterable[Entry] = ()):
        """Of several entries of one key the last stays."""
        self._entries = {entry.key: entry for entry in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __repr__(self) -> str:
        return f"Table of {len(self)} entries, {self.digest}"

    def exact(self, problem: Problem) -> Entry | None:
        """The entry of the problem's own key."""
        return self._entries.get(key(problem))

    def nearest(self, problem: Problem) -> tuple[Entry, ...]:
        """The entries that differ from the problem's key only in m, n and k, each within a factor of two, nearest first.

        The distance is the product of the three factors. Of equals the smaller key is first, whatever the order of entries.
        """
        wanted = key(problem)
        found = [(_distance(wanted, entry.key), entry) for entry in self._neighbours.get(wanted[:5], ())]
        found = [(distance, entry) for distance, entry in found if distance is not None]
        return tuple(entry for _, entry in sorted(found, key=lambda pair: (pair[0], pair[1].key)))

    def merged(self, other: Table) -> Table:
        """Both tables' entries; of a key that both have, the other's."""
        return Table([*self, *other])

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the contents: equal where `to_json` is."""
        return hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def _neighbours(self) -> dict[tuple, list[Entry]]:
        groups: dict[tuple, list[Entry]] = {}
        for entry in self:
            groups.setdefault(entry.key[:5], []).append(entry)
        return groups

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as plain values, in the order of their keys."""
        return [to_json(entry) for entry in sorted(self, key=lambda entry: entry.key)]


EMPTY = Table()


def _distance(a: Key, b: Key) -> Fraction | None:
    """Exact, so that every machine breaks the same ties. None where a dimension is beyond a factor of two."""
    pairs = [(min(x, y), max(x, y)) for x, y in zip(a[5:], b[5:], strict=True) if x or y]
    if any(high > 2 * low for low, high in pairs):
        return None
    return Fraction(prod(high for _, high in pairs), prod(low for low, _ in pairs))


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry as plain values. Its key follows from them: buckets are never stored, so they cannot contradict."""
    op, format, dtype, kind, *_ = entry.key
    ranking = [timing._asdict() | {"config": list(timing.config)} for timing in entry.ranking]
    return dict(op=op, format=format, dtype=dtype, kind=kind, exact=list(entry.exact), bf16_ns=entry.bf16_ns,
                ranking=ranking)  # fmt: skip


def from_json(obj: Any, origin: str = "") -> tuple[Table, dict[str, int]]:
    """The table of the valid entries of what `to_json` wrote, or of whatever else; and how many were refused, by reason.

    Never raises for data. Valid is what tuning itself could have written: known words, integers within their ranges, and
    only kernels and configurations that the code has.
    """
    if not isinstance(obj, list):
        return EMPTY, {"no list of entries": 1}
    entries, refused = [], Counter()
    for item in obj:
        try:
            entries.append(entry_from_json(item, origin))
        except Refused as e:
            refused[str(e)] += 1
    return Table(entries), dict(refused)


class Refused(ValueError):
    """Why an entry is not valid: one of few texts, to be counted."""


def entry_from_json(item: Any, origin: str = "", *, present: bool = True) -> Entry:
    """One entry. present: of the present kernels, so that the code must have what it ranks. Raises `Refused`."""
    op, format, dtype, kind, exact, bf16_ns, ranking = _fields(
        item, ("op", "format", "dtype", "kind", "exact", "bf16_ns", "ranking")
    )
    _word(op, OPS)
    _word(format, FORMATS)
    _word(dtype, ("",) if op in CODES_ONLY else DTYPES)
    _check_kind(op, kind)
    sizes = _integers(exact, 0, MAX_SIZE, range(3, 4))
    timings = tuple(_timing(timing) for timing in _list(ranking, range(1, MAX_RANKING + 1)))
    if len({timing[:3] for timing in timings}) < len(timings):
        raise Refused("a candidate twice")
    if present:
        _check_candidates(op, format, timings)
    return Entry(_key(op, format, dtype, kind, sizes), timings, _integer(bf16_ns, 0, MAX_NS), sizes, origin)


def _check_kind(op: str, kind: Any) -> None:
    if op in conv_problems.GRAMMAR:
        known = isinstance(kind, str) and re.fullmatch(conv_problems.GRAMMAR[op], f"{kind} " if kind else "", re.ASCII)
        if not known:
            raise Refused("an unknown word")
        return
    words = kind.split(" ") if isinstance(kind, str) and kind else []
    if kind != " ".join(words) or len(words) > MAX_WORDS or (words and op == "scaled_mm"):
        raise Refused("an unknown word")
    for word in words:
        _word(word, WORDS)


def _timing(item: Any) -> Timing:
    kernel, config, split_k, ns = _fields(item, Timing._fields)
    if not isinstance(kernel, str) or not kernel.isidentifier() or len(kernel) > MAX_NAME:
        raise Refused("an unknown kernel")
    values = _integers(config, 1, MAX_VALUE, range(MAX_CONFIG + 1))
    return Timing(kernel, values, _integer(split_k, 1, MAX_VALUE), _integer(ns, 0, MAX_NS))


def _check_candidates(op: str, format: str, timings: tuple[Timing, ...]) -> None:
    from . import candidates

    for timing in timings:
        if timing.kernel not in candidates.KERNELS:
            raise Refused("an unknown kernel")
        if not candidates.known(op, format, timing.kernel, timing.config):
            raise Refused("a configuration that the code does not have")


def _fields(item: Any, names: tuple[str, ...]) -> list[Any]:
    if not isinstance(item, dict):
        raise Refused("not an object")
    if item.keys() - set(names):
        raise Refused("an unknown field")
    if len(item) < len(names):
        raise Refused("a missing field")
    return [item[name] for name in names]


def _word(text: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(text, str) or text not in allowed:
        raise Refused("an unknown word")


def _list(values: Any, lengths: range) -> list[Any]:
    if not isinstance(values, list):
        raise Refused("no list where one belongs")
    if len(values) not in lengths:
        raise Refused("a list of a wrong length")
    return values


def _integers(values: Any, low: int, high: int, lengths: range) -> tuple[int, ...]:
    return tuple(_integer(value, low, high) for value in _list(values, lengths))


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int:  # True is an int to isinstance
        raise Refused("a non-integer where an integer belongs")
    if not low <= value <= high:
        raise Refused("a number out of range")
    return value
