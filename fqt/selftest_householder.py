"""The checks of `fqt doctor` for the block Householder transform: its kernels against `fqt.householder`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import candidates, dispatch, reference
from .householder import Householder, follower_sums, group_rows
from .recipe import Quantizer

Compared = dict[str, tuple[Tensor, Tensor, Tensor | float]]
# (rows, columns): groups of every size; one group of them all, in several pieces; rows that no program holds.
SHAPES = {"powers": (131, 70), "one large row": (144, 80), "long rows": (5, 8200)}


def checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(kernel, case, run) of every kernel of the transform, see `fqt.selftest.Check`."""
    for kind in ("powers", "one large row"):
        yield "_row_ranges_kernel", kind, lambda k=kind: _ranges_case(device, k)
        for groups, kernels in (("global", ("_leaders_kernel", "_groups_kernel")), ("tile", ("_tile_groups_kernel",))):
            for kernel in kernels:
                yield kernel, f"{kind}, {groups}", lambda k=kind, g=groups: _groups_case(device, k, g)
        for kernel in ("_group_absmax_kernel", "_follower_sums_kernel", "_follower_totals_kernel"):
            yield kernel, kind, lambda k=kind: _sums_case(device, k)
    for kind, kernel in zip(
        SHAPES, ("_long_transform_kernel", "_transform_kernel", "_long_transform_kernel"), strict=True
    ):
        cases = ("global", "min", 4), ("tile", "grid", 8), ("global", "symmetric", 2)
        for groups, zero, bits in cases[:1] if kind == "long rows" else cases:
            quantizer = Quantizer(bits, "per_row", zero, "stochastic", householder=True, groups=groups)
            yield (
                kernel,
                f"{kind}, {groups}, {zero}, {bits} bits",
                lambda k=kind, q=quantizer: _codes_case(device, k, q),
            )
    for groups in ("global", "tile"):
        quantizer = Quantizer(5, "per_row", "min", "stochastic", householder=True, groups=groups, auto=True)
        yield "_choose_kernel", f"powers, {groups}", lambda q=quantizer: _codes_case(device, "powers", q)
        for kind in ("powers", "one large row"):
            yield "_inverse_kernel", f"{kind}, {groups}", lambda k=kind, g=groups: _inverse_case(device, k, g)
    for config in _configs(device):
        for kind in ("powers", "one large row"):
            yield "_householder_mm_kernel", f"{kind}, {config}", lambda k=kind, c=config: _product_case(device, k, c)
    yield "_householder_weights_kernel", "powers", lambda c=config: _product_case(device, "powers", c)


def _configs(device: torch.device) -> list[tuple[int, ...]]:
    """Of the product with the inverse in its epilogue, what dispatch can choose on the device."""
    from fqt_kernels.gemm_householder import CONFIGS

    return CONFIGS[candidates.family(dispatch.problem("scaled_mm", device, 1, 1, 1)) or "sm80"]


def rows_of(kind: str) -> Tensor:
    """A matrix of `SHAPES`, with a row of zeros, one without a range, and one with a NaN where groups are many."""
    m, n = SHAPES[kind]
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(7))
    x *= (
        torch.logspace(-6, 3, m)[:, None]
        if kind != "one large row"
        else torch.where(torch.arange(m) == 77, 1e3, 1.0)[:, None]
    )
    x[3], x[4] = 0.0, 0.5
    if kind == "powers":
        x[9, 11] = float("nan")
    return x


def _bits(t: Tensor) -> Tensor:
    """A NaN is as good as another."""
    return torch.where(t.isnan(), torch.nan, t).view(torch.int32)


def _ranges(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    from fqt_kernels.grouping import row_ranges
    from fqt_kernels.statistics import row_stats

    return row_ranges(row_stats(x.to(device), "per_row", False))


def _ranges_case(device: torch.device, kind: str) -> Compared:
    x = rows_of(kind)
    ranges, absmax = _ranges(x, device)
    want = x.abs().amax(1)
    return {
        "ranges": (ranges, x.amax(1) - x.amin(1), 0.0),
        "magnitudes": (_bits(absmax.cpu().view(torch.float32)), _bits(want), 0.0),
    }


def _groups_case(device: torch.device, kind: str, groups: str) -> Compared:
    from fqt_kernels import grouping

    x = rows_of(kind)
    ranges = x.amax(1) - x.amin(1)
    got, want = grouping.group_rows(ranges.to(device), groups), group_rows(ranges, groups)
    return {name: (g, w.to(g.dtype), 0.0) for name, g, w in zip(want._fields, got, want, strict=True)}


def _sums_case(device: torch.device, kind: str) -> Compared:
    """The largest magnitude among the followers of each group, and their sums in the groups of 8 rows and more."""
    from fqt_kernels import grouping
    from fqt_kernels.householder_sums import follower_totals

    x, least = rows_of(kind), 8
    h = Householder.of(x)
    ranges, absmax = _ranges(x, device)
    groups = grouping.group_rows(ranges)
    largest = grouping.group_absmax(absmax, groups)
    leader = h.leader[:, None]
    magnitudes = torch.where(leader, 0, _bits(x.abs())).amax(1)
    want = torch.zeros_like(magnitudes).scatter_reduce_(0, h.group, magnitudes, "amax")
    first = h.groups.first
    large = torch.arange(len(x))[first[1:] - first[:-1] >= least]
    total = follower_totals(x.to(device), groups, largest, least).cpu()[first[large] // least]
    nan = 0x7F800000  # NaNs have many bit patterns
    return {
        "magnitudes": (largest.cpu().clamp(max=nan + 1), want.to(torch.int32).clamp(max=nan + 1), 0.0),
        "sums": (total, follower_sums(x, h.group, leader)[large], 0.0),
    }


def _codes_case(device: torch.device, kind: str, quantizer: Quantizer) -> Compared:
    """Codes, scales, offsets and sums of the whole way from the matrix, and the groups that auto left."""
    from . import gradients

    x, state = rows_of(kind), torch.tensor([0x123456789ABCDEF, 7])
    h, want = reference.householder_codes(x, quantizer, rng=state, stream=gradients.DGRAD, rank=3, sums=True)
    with dispatch.backend("triton"):
        got = gradients.transformed(x.to(device), quantizer, sums=True, rng=state.to(device), rank=3)
    names = ("q", "scale", "row_sum") + ("offset",) * (want.offset is not None)
    compared = {name: (getattr(got.codes, name), getattr(want, name), 0.0) for name in names}
    return compared | {"s": (got.groups.s.cpu()[h.group], h.groups.s[h.group], 0.0)}


def _inverse_case(device: torch.device, kind: str, groups: str) -> Compared:
    from fqt_kernels import grouping, householder

    x = rows_of(kind)
    h = Householder.of(x, groups)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(2, -2, len(x))[:, None]
    ranges, _ = _ranges(x, device)
    columns = torch.linspace(-1, 1, x.shape[1])
    got = householder.inverse(
        z.to(device), grouping.group_rows(ranges, groups), z.abs().amax(1).view(torch.int32).to(device), ranges=ranges,
        value=x[:, 0].contiguous().to(device), columns=columns.to(device), out_dtype=torch.float32,
    )  # fmt: skip
    return {"dX": (got, torch.where(h.constant, x[:, :1] * columns, h.inverse(z)), 0.0)}


def _product_case(device: torch.device, kind: str, config: tuple[int, ...]) -> Compared:
    """dX of codes of T dY: the product, equal to the reference's to the bit, and the inverse in its epilogue.

    With a the largest |z| of a group, Σ |w z| of its sum is below 2.5 a; each term has two roundings of 2⁻²⁴ and at most 9
    additions, the reference's terms are off by 2⁻³⁰ a, and the sum reaches a leader √n times.
    """
    from fqt_kernels import gemm_householder, grouping

    x = rows_of(kind).nan_to_num(1.0)
    (m, k), n = x.shape, 48
    quantizer = Quantizer(8, "per_row", "min", householder=True, groups="tile")
    h, codes = reference.householder_codes(x, quantizer, sums=True)
    w = reference.quantize(
        torch.randn(n, k, generator=torch.Generator().manual_seed(2)), Quantizer(8, "per_tensor", "grid"), sums=True
    )
    a, b = codes.rows(), w.rows()
    ranges, _ = _ranges(x, device)
    columns = torch.linspace(-1, 1, n)
    got = gemm_householder.scaled_mm(
        *(t.to(device) for t in (a.q, b.q, a.scale, b.scale)),
        **{f"{side}_{name}": getattr(o, name).to(device) for side, o in (("a", a), ("b", b)) for name in ("offset", "sum")},
        groups=grouping.group_rows(ranges, "tile"), ranges=ranges, value=x[:, 0].contiguous().to(device),
        columns=columns.to(device), config=config,
    )  # fmt: skip
    z, group = reference.scaled_mm(a, b), h.group
    largest = torch.zeros(m).scatter_reduce_(0, group, z.abs().amax(1), "amax")[group]
    limit = (64 * 2.0**-24 * largest * h.size.sqrt())[:, None] / h.s
    return {"dX": (got, torch.where(h.constant, x[:, :1] * columns, h.inverse(z)), limit.expand_as(z))}
