"""`fqt.recording()`: what quantizing the gradients does to them, layer by layer, while a model trains.

The numbers of one backward pass are those of `fqt.variance`; here layers are told apart and their numbers summed, on the
device, and read.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import rng as streams
from .householder import Groups, Householder
from .qtensor import QTensor
from .recipe import Quantizer
from .variance import measured

_active: tuple[Records, ...] = ()
_owners: dict[int, weakref.ref[nn.Module]] = {}  # layers by the address of their random stream
_lock = threading.RLock()  # backward passes run on threads of autograd's


# ---- what is read


class Statistic(NamedTuple):
    """Of one number of each backward pass: its sum, mean, least and largest; NaN where there is none."""

    total: float
    mean: float
    least: float
    largest: float


@dataclass(frozen=True)
class Record:
    """What was recorded of one product of one layer; record["psq"] is one of its statistics.

    quantizer: its short name, "ptq8", "psq5", "bhq4-tile", "auto8", …   passes: backward passes recorded.
    nonfinite_passes: how many of them had a number that is not finite; they are left out of the statistics.
    nonfinite_rows: rows of G with a NaN or an infinity, over all passes.

    statistics, by name:
        rows, norm2: N and ‖G‖².
        range_smallest, range_median, range_largest: of the ranges of the rows.   zero_rows: the fraction of range zero.
        ptq, psq, bhq, bhq_tile (of wgrad ptq, per_column): the variance that each is predicted to have, with the bits of
            the quantizer in use, whichever that is. Rows of range zero count in those of bhq, though their result is exact.
        predicted: the same of the codes in use, from their scales.   conditional, empirical: see `fqt.variance`.
        clipped: the fraction of elements beyond the end of the codes by more than rounding; none unless ranges were not
            found in the values themselves.   zeros_before, zeros_after: the fraction of elements that are 0 in G, in Q(G).
        groups, groups_transformed, rows_transformed, largest_group: of a householder transform, else absent; `auto` left
            the other groups and rows to psq.
    """

    quantizer: str
    passes: int
    nonfinite_passes: int
    nonfinite_rows: int
    statistics: dict[str, Statistic]

    def __getitem__(self, name: str) -> Statistic:
        return self.statistics[name]

    def relative(self, name: str) -> float:
        """A variance as a fraction of ‖G‖², both summed over the passes; NaN where that is 0."""
        return _quotient(self[name].total, self["norm2"].total)

    @property
    def range_ratio(self) -> float:
        """The largest range by the median one, each averaged over the passes; NaN where the median is 0."""
        return _quotient(self["range_largest"].mean, self["range_median"].mean)

    @property
    def transformed(self) -> tuple[float, float] | None:
        """The fractions of groups and of rows that were transformed; None without a householder transform."""
        if "groups" not in self.statistics:
            return None
        pairs = (("groups_transformed", "groups"), ("rows_transformed", "rows"))
        return tuple(_quotient(self[part].total, self[whole].total) for part, whole in pairs)

    @property
    def group_size(self) -> float | None:
        """The mean size of a group; None without a householder transform."""
        return _quotient(self["rows"].total, self["groups"].total) if "groups" in self.statistics else None

    def as_dict(self) -> dict:
        """The fields, and what is derived from them."""
        variances = [name for name in _VARIANCES if name in self.statistics]
        return asdict(self) | {
            "statistics": {name: s._asdict() for name, s in self.statistics.items()},
            "relative": {name: self.relative(name) for name in variances},
            "range_ratio": self.range_ratio,
            "transformed": self.transformed,
            "group_size": self.group_size,
        }


class Layer(NamedTuple):
    """The records of a layer's two gradient products; None where that product is not quantized, or never ran."""

    dgrad: Record | None
    wgrad: Record | None


class Records:
    """What `recording` has recorded so far. `str` is a table, `to_json` the same as data; reading waits for the device."""

    def __init__(self, model: nn.Module | None, every: int) -> None:
        self.every = every
        self.unknown = 0  # quantized gradients whose layer could not be told
        self._watched = None if model is None else {m: name or "(the model)" for name, m in model.named_modules()}
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # where none is given
        self._uses: Counter[str] = Counter()  # of each name
        self._sums: dict[tuple[str, str], _Sums] = {}

    @property
    def layers(self) -> dict[str, Layer]:
        """The records by the layers' names: in the model's order, or that in which a backward pass first reached them."""
        with _lock:
            read = {key: sums.read() for key, sums in self._sums.items() if sums.passes}
        met = dict.fromkeys(name for name, _ in read)
        names = met if self._watched is None else [name for name in self._watched.values() if name in met]
        return {name: Layer(read.get((name, "dgrad")), read.get((name, "wgrad"))) for name in names}

    def to_json(self) -> str:
        """Numbers that do not exist are null."""
        layers = {
            name: {product: None if r is None else r.as_dict() for product, r in layer._asdict().items()}
            for name, layer in self.layers.items()
        }
        data = {"every": self.every, "unknown": self.unknown, "layers": layers}
        return json.dumps(_without_nan(data), indent=1, allow_nan=False)

    def __str__(self) -> str:
        rows = [
            (name, product, *_cells(record))
            for name, layer in self.layers.items()
            for product, record in layer._asdict().items()
            if record is not None
        ]
        widths = [max(len(row[i]) for row in [_HEAD, *rows]) for i in range(len(_HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [_HEAD, *rows]]
        lines.append(_LEGEND if rows else "no backward pass of a quantized layer was recorded")
        if self.unknown:
            lines.append(f"{self.unknown} quantized gradients are missing: their layers could not be told apart")
        return "\n".join(lines)

    # ---- what is written

    def _sums_of(self, layer: nn.Module, product: str, quantizer: Quantizer) -> _Sums | None:
        """What this pass is to be added to; None where the layer is not watched, or it is not this pass's turn."""
        name = self._name(layer)
        if name is None:
            return None
        sums = self._sums.get((name, product))
        if sums is None or sums.quantizer != quantizer:
            sums = self._sums[name, product] = _Sums(quantizer)
        sums.met += 1
        return sums if (sums.met - 1) % self.every == 0 else None

    def _name(self, layer: nn.Module) -> str | None:
        """What this recording calls a layer, no two of them the same; None for one that it does not watch."""
        if self._watched is not None:
            return self._watched.get(layer)
        if layer not in self._names:
            name = layer._fqt_name or layer._fqt_key_name
            self._uses[name] += 1
            self._names[layer] = f"{name} #{self._uses[name]}" if self._uses[name] > 1 else name
        return self._names[layer]


class _Sums:
    """The sums, least and largest values of the statistics of one product of one layer, on its device."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.met = self.passes = 0  # backward passes, and those of them that were recorded
        self._names: tuple[str, ...] = ()
        self._values: Tensor | None = None  # (3, K + 2) float64; the last two count finite passes and rows not finite

    def add(self, numbers: dict[str, Tensor], nonfinite_rows: Tensor) -> None:
        """Add one pass; of one with a number that is not finite, only that there was one."""
        values = torch.stack([number.double() for number in numbers.values()])
        finite = torch.isfinite(values).all()
        counts = torch.stack([finite.double(), nonfinite_rows.double()])
        new = [torch.cat([torch.where(finite, values, x), counts]) for x in (0.0, math.inf, -math.inf)]
        if self._values is not None:
            old = self._values.to(values.device)
            new = [old[0] + new[0], torch.minimum(old[1], new[1]), torch.maximum(old[2], new[2])]
        self._names, self._values = tuple(numbers), torch.stack(new)
        self.passes += 1

    def read(self) -> Record:
        """The record so far. Waits for the device."""
        if self._values.is_cuda:  # whichever stream the backward pass ran on
            torch.cuda.synchronize(self._values.device)
        (*totals, finite, rows), least, largest = self._values.tolist()
        statistics = {
            name: Statistic(total, total / finite, low, high) if finite else Statistic(*[math.nan] * 4)
            for name, total, low, high in zip(self._names, totals, least, largest, strict=False)
        }
        return Record(_label(self.quantizer), self.passes, self.passes - int(finite), int(rows), statistics)


# ---- recording


@contextlib.contextmanager
def recording(model: nn.Module | None = None, every: int = 1) -> Iterator[Records]:
    """Record what quantization does to the gradients of a model's layers, in the backward passes within a `with` block.

        with fqt.recording(model) as records:
            loss.backward()
        print(records)
        records.layers["fc1"].dgrad.relative("empirical")

    A diagnosis tool, not for every step: a product that is recorded reads dY dozens of times, in float32 on its device, and
    for a moment holds some ten matrices of its size; both kinds of BHQ groups are tried for their predictions. Between two
    passes of `every` nothing is computed. The sums stay on the device, under a kilobyte for each product, and nothing waits
    for it before they are read. No result changes, and no random number is drawn.

    The backward passes of all threads are recorded, as autograd runs on threads of its own. Recordings may be nested or
    overlap: each gets every pass of its layers. A layer that backward goes through several times in a step is recorded each
    time. A record restarts where the layer's quantizer changes. A backend of torch.compile that copies a layer's random
    stream before use makes the host wait for the copy, by whose value the layer is then told.

    Args:
        model: whose layers are recorded, under their names in it; by default all quantized layers of the process, under the
            names that `quantize_` gave them (" #2" and so on where another of that name was met before).
        every: record the first of each so many backward passes of a layer.

    Raises:
        TypeError: model is no module.   ValueError: model has no quantized layer, or every is no integer of at least 1.
        RuntimeError (backward): a CUDA graph is being captured, whose replays nothing would count.
    """
    global _active
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if model is not None and not any(hasattr(m, "_fqt_rng") for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has no quantized layer to record; see fqt.quantize_")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}")
    records = Records(model, every)
    with _lock:
        _active += (records,)
    try:
        yield records
    finally:
        with _lock:
            _active = tuple(r for r in _active if r is not records)


def is_recording() -> bool:
    """Whether `record` has anybody to tell."""
    return bool(_active)


@torch.no_grad()
def record(
    product: str,
    rng: Tensor,
    dy: Tensor,
    multiplier: Tensor | None,
    quantizer: Quantizer,
    codes: QTensor,
    groups: Householder | tuple[Tensor, ...] | None = None,
    ranges: Tensor | None = None,
) -> None:
    """Tell the recordings of one quantization of dY (M, N), where there are any.

    product: "dgrad" or "wgrad".   rng: the layer's random stream, by which it is known.   multiplier: (M, 1) or (1, N),
    folded into dY.   codes: of T (dY · multiplier); groups: of T, or T itself, None for T = 1; ranges (M,): of the rows of
    dY · multiplier, with groups.
    """
    if not _active or dy.numel() == 0 or dy.is_meta or isinstance(dy, FakeTensor):
        return
    if _capturing(dy):
        raise RuntimeError("fqt.recording() cannot be on while a backward pass is captured in a CUDA graph")
    with _lock:
        layer = _layer_of(rng)
        if layer is None:
            for records in _active:
                records.unknown += 1
            return
        wanted = [s for records in _active if (s := records._sums_of(layer, product, quantizer)) is not None]
        if not wanted:
            return
        if groups is not None and not isinstance(groups, Householder):
            order, group, first, s = groups
            groups = Householder(Groups(order.long(), group.long(), first.long(), s), (ranges == 0)[:, None])
        numbers = measured(product, dy, multiplier, quantizer, codes, groups)
        for sums in wanted:
            sums.add(*numbers)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _layer_of(rng: Tensor) -> nn.Module | None:
    """The layer whose random stream this is, or is a copy of; None where no live layer's is, or several layers' are."""
    address = rng.data_ptr()
    layer = _owners[address]() if address in _owners else None
    if layer is not None and layer._fqt_rng.data_ptr() == address:
        return layer
    live = [layer for layer in list(streams._layers) if not layer._fqt_rng.is_meta]
    _owners.clear()
    _owners.update({layer._fqt_rng.data_ptr(): weakref.ref(layer) for layer in live})
    if address in _owners:
        return _owners[address]()
    key = int(rng[0])
    same = [layer for layer in live if streams.layer_key(layer._fqt_key_name) == key]
    return same[0] if len(same) == 1 else None


# ---- text

_VARIANCES = ("ptq", "psq", "per_column", "bhq", "bhq_tile", "predicted", "conditional", "empirical")
_HEAD = ("layer", "product", "quantizer", "passes", "ranges: least, median, largest", *_VARIANCES, "transformed", "size",
         "clipped", "zeros", "zero rows", "not finite")  # fmt: skip
_LEGEND = (
    "ptq to bhq_tile: the variance each is predicted to have; predicted, conditional, empirical: of the quantizer in use; "
    "all as fractions of ‖G‖². transformed: of the groups, of the rows. size: of a group, mean and largest."
)


def _cells(r: Record) -> tuple[str, ...]:
    """The cells of a record after its layer and product."""
    groups = ("-", "-")
    if r.transformed is not None:
        of_groups, of_rows = r.transformed
        groups = (f"{of_groups:.0%}, {of_rows:.0%}", f"{r.group_size:.3g}, {r['largest_group'].largest:.0f}")
    return (
        r.quantizer,
        str(r.passes),
        ", ".join(f"{r[name].mean:.2g}" for name in ("range_smallest", "range_median", "range_largest")),
        *(f"{r.relative(name):.2e}" if name in r.statistics else "-" for name in _VARIANCES),
        *groups,
        *(f"{r[name].mean:.2%}" for name in ("clipped", "zeros_after", "zero_rows")),
        f"{r.nonfinite_rows} rows, {r.nonfinite_passes} passes" if r.nonfinite_passes else "-",
    )


def _label(quantizer: Quantizer) -> str:
    """A quantizer's short name: that of the recipe it is dgrad's of, and what differs from it there."""
    kind, zero = {"per_tensor": ("ptq", "grid"), "per_row": ("psq", "min"), "per_column": ("per_column", "min")}[
        quantizer.granularity
    ]
    if quantizer.householder:
        kind = "auto" if quantizer.auto else "bhq"
    words = [f"{kind}{quantizer.bits}" + "-tile" * (quantizer.groups == "tile")]
    words += [quantizer.format] if quantizer.format != "int" else [quantizer.zero] * (quantizer.zero != zero)
    words += [quantizer.rounding] * (quantizer.rounding != "stochastic") + [quantizer.range] * (
        quantizer.range != "exact"
    )
    return " ".join(words)


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan


def _without_nan(data):
    """The same data with None for NaN."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data
