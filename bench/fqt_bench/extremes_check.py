"""Whole results against the definition, in pieces that fit on the device beside the operands.

The definitions are those of `fqt.reference`; the random bits of a piece are those of its place in the whole matrix. Every
element of an output is compared, to the bit where nothing else is said: nothing that was not written can pass, unless memory
happened to hold the right codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fqt import reference
from fqt.recipe import Quantizer

GIB = 2**30
_piece = 2**25  # elements of a piece, a multiple of 8


class Wrong(Exception):
    """An output differs from the definition; the message says where."""


@dataclass(frozen=True)
class Case:
    """One launch of extreme extents.

    kernel: what it is about; where there are several, the last one's name. name: the extents in words. gib: GiB of memory
    that it takes at once, about. run: does it on a device and returns what it compared; raises `Wrong`.
    """

    kernel: str
    name: str
    gib: float
    run: Callable[[torch.device], str]

    @property
    def title(self) -> str:
        return f"{self.kernel}: {self.name}"


def gib(elements: int, each: float, spare: float) -> float:
    """GiB of so many elements of so many bytes, and what else is needed."""
    return elements * each / 2**30 + spare


def set_piece(elements: int) -> None:
    """Compare so many elements at a time, a multiple of 8."""
    global _piece
    _piece = elements


def piece() -> int:
    """How many elements are compared at a time."""
    return _piece


# ---- pieces


def pieces(m: int, n: int, step: int = 1) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the pieces of an (m, n) matrix: whole rows, a multiple of `step` of them, or parts of one."""
    if n > _piece:
        for row in range(m):
            yield from ((slice(row, row + 1), slice(c, min(c + _piece, n))) for c in range(0, n, _piece))
        return
    rows = max(_piece // (n + -n % 8) // step, 1) * step
    yield from ((slice(r, min(r + rows, m)), slice(0, n)) for r in range(0, m, rows))


def parts(n: int) -> Iterator[slice]:
    """The pieces of n elements in a row."""
    yield from (slice(i, min(i + _piece, n)) for i in range(0, n, _piece))


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    """A tensor of normal numbers; the first is -60 and the last 64, so that who misses an end finds another range."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(shape, dtype=dtype, device=device)
    flat = x.view(-1)
    for part in parts(flat.numel()):
        flat[part].normal_(generator=generator)
    flat[0], flat[-1] = -60.0, 64.0
    return x


def codes_of(*shape: int, device: torch.device, seed: int = 2) -> Tensor:
    """int8 codes of the whole range."""
    generator = torch.Generator(device).manual_seed(seed)
    q = torch.empty(shape, dtype=torch.int8, device=device)
    flat = q.view(-1)
    for part in parts(flat.numel()):
        flat[part].random_(-128, 128, generator=generator)
    return q


def rng_of(device: torch.device) -> Tensor:
    return torch.tensor([0x123456789ABCDEF, 7], device=device)


# ---- comparing


def same(what: str, got: Tensor, want: Tensor, at: tuple[int, ...] = ()) -> None:
    """Demand equal bits; at: where the first element lies in the whole tensor."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{what} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}")
    if torch.equal(got, want):
        return
    differ = (got != want) & ~((got != got) & (want != want))
    _raise(what, differ, got, want, at)


def near(what: str, got: Tensor, want: Tensor, bound: Tensor | float, at: tuple[int, ...] = ()) -> None:
    """Demand a distance of at most the bound, in float64."""
    differ = ~((got.double() - want.double()).abs() <= bound)
    _raise(what, differ, got, want, at)


def _raise(what: str, differ: Tensor, got: Tensor, want: Tensor, at: tuple[int, ...]) -> None:
    bad = int(differ.sum())
    if bad:
        first = torch.unravel_index(differ.flatten().to(torch.uint8).argmax().cpu(), differ.shape)
        place = tuple(int(i) for i in first)
        whole = tuple(i + offset for i, offset in zip(place, at or (0,) * len(place), strict=True))
        raise Wrong(f"{what}{list(whole)} is {got[place].item()}, not {want[place].item()}; {bad} such in its piece")


# ---- quantization


def bits_at(rng: Tensor, rows: slice | Tensor, cols: slice, stream: int) -> Tensor:
    """`reference.random_bits` of a piece: rows, a run or any, and columns from a multiple of 8 on."""
    key, step, low = rng[0], rng[1], 0xFFFFFFFF
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=rng.device)
    row = rows[:, None]
    block = torch.arange(cols.start // 8, -(-cols.stop // 8), device=rng.device)[None]
    shape = len(row), block.shape[1]
    words = reference.philox(
        block.expand(shape), row.expand(shape), step & low, torch.as_tensor(stream), key & low, key >> 32 & low
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).view(len(row), -1)[:, : cols.stop - cols.start].to(torch.int32)


@dataclass(frozen=True)
class Quantized:
    """What a kernel made of x ∘ multiplier, and how: any of its outputs may be None."""

    quantizer: Quantizer
    rng: Tensor | None
    stream: int
    multiplier: Tensor | None = None  # (M, 1) or (1, N)
    q: Tensor | None = None
    qt: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    row_sum: Tensor | None = None
    col_sum: Tensor | None = None


def check_quantized(what: str, x: Tensor, out: Quantized) -> None:
    """Compare all outputs with `reference.quantize` of x (M, N)."""
    m, n = x.shape
    z = out.quantizer
    lo, hi = _ranges(x, out)
    wanted = (("row_sum", out.row_sum, m), ("col_sum", out.col_sum, n))
    sums = {
        name: torch.zeros(size, dtype=torch.int64, device=x.device) for name, got, size in wanted if got is not None
    }
    for rows, cols in pieces(m, n):
        own = _of_groups(lo, z, rows, cols), _of_groups(hi, z, rows, cols)
        bits = None if out.rng is None else bits_at(out.rng, rows, cols, out.stream)
        q, scale, offset = reference.codes(_multiplied(x, out, rows, cols), *own, z, bits)
        at = rows.start, cols.start
        if out.q is not None:
            same(f"{what}q", out.q[rows, cols], q, at)
        if out.qt is not None:
            same(f"{what}qt", out.qt[cols, rows], q.t(), at[::-1])
        for name, got, want in (("scale", out.scale, scale), ("offset", out.offset, offset)):
            if got is not None:
                same(what + name, _of_groups(got, z, rows, cols), want, at)
        for name, dim, place in (("row_sum", 1, rows), ("col_sum", 0, cols)):
            if name in sums:
                sums[name][place] += q.sum(dim)
    for name, got, _ in wanted:
        if got is not None:
            same(what + name, got, sums[name].to(torch.int32))


def _multiplied(x: Tensor, out: Quantized, rows: slice, cols: slice) -> Tensor:
    y = x[rows, cols].float()
    if out.multiplier is None:
        return y
    return y * (out.multiplier[rows] if out.multiplier.shape[1] == 1 else out.multiplier[:, cols])


def _ranges(x: Tensor, out: Quantized) -> tuple[Tensor, Tensor]:
    """(lo, hi) of each group, (M, 1), (1, N) or (1, 1)."""
    m, n = x.shape
    z = out.quantizer
    shape = {"per_tensor": (1, 1), "per_row": (m, 1), "per_column": (1, n)}[z.granularity]
    dims = [d for d in (0, 1) if shape[d] == 1]
    hi = torch.full(shape, -torch.inf, device=x.device)
    lo = -hi
    for rows, cols in pieces(m, n):
        y = _multiplied(x, out, rows, cols)
        for held, found, wider in ((lo, y.amin(dims, True), torch.minimum), (hi, y.amax(dims, True), torch.maximum)):
            place = _of_groups(held, z, rows, cols)
            place.copy_(wider(place, found.expand_as(place)))
    if z.zero == "symmetric":
        hi = torch.maximum(hi, -lo)
        lo = -hi
    return lo, hi


def _of_groups(t: Tensor, z: Quantizer, rows: slice, cols: slice) -> Tensor:
    """The part of a tensor of groups that belongs to a piece."""
    return t[rows] if z.granularity == "per_row" else t[:, cols] if z.granularity == "per_column" else t
