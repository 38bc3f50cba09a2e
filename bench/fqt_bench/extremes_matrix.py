"""Extreme extents of the quantization of matrices, of their products, and of the block Householder transform."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fqt import dispatch, gradients, products, reference
from fqt import householder as definition
from fqt.candidates import Candidate, allows, candidates, family
from fqt.householder import Householder
from fqt.qtensor import Operand
from fqt.recipe import Quantizer

from .extremes_check import (
    Case,
    Quantized,
    Wrong,
    bits_at,
    check_quantized,
    codes_of,
    gib,
    near,
    normal,
    piece,
    pieces,
    rng_of,
    same,
)

_gib = functools.partial(gib, spare=4)  # for a piece and its definition
KERNELS = {"rows": "_rows_kernel", "long_rows": "_long_rows_kernel", "tile": "_tile_kernel"}
LARGEST_GROUP = 2**15  # rows of a group that is computed again
MOST_SPLITS = 64  # programs that share a sum: more than any candidate has


def cases(tiny: bool) -> Iterator[Case]:
    """On a GPU extents beyond 2³¹; tiny: the same launches of a few elements."""
    yield from _quantizations(tiny)
    yield from _gradients(tiny)
    yield from _products(tiny)
    yield from _long_sums(tiny)
    yield from _householders(tiny)
    yield from _one_row(tiny)


# ---- quantization


def _quantizations(tiny: bool) -> Iterator[Case]:
    aligned, odd = ((48, 80), (35, 70)) if tiny else ((2**20 + 16, 2112), (2**20 + 3, 2112))
    few, tall = ((3, 592), (77, 3)) if tiny else ((9, 2**28), (2**30, 3))
    symmetric, affine = Quantizer(8, "per_row", "symmetric"), Quantizer(5, "per_row", "min", "stochastic")
    listed: list[tuple[tuple[int, int], Quantizer, str]] = [
        (odd, symmetric, "rows"), (odd, affine, "long_rows"), (aligned, symmetric, "long_rows"),
        (few, affine, "long_rows"), (few, symmetric, "tile"), (tall, affine, "rows"),
    ]  # fmt: skip
    for granularity, zero, rounding in (
        ("per_tensor", "grid", "stochastic"),
        ("per_column", "symmetric", "nearest"),
        ("per_column", "min", "stochastic"),
    ):
        z = Quantizer(8, granularity, zero, rounding)
        listed += [(shape, z, "tile") for shape in (aligned, odd, few)]
    for strided in (False, True):
        for (m, n), z, kernel in listed if not strided else [(odd, symmetric, "tile")]:
            words = f"{m}x{n}, {z.granularity}, {z.zero}, {z.rounding}{', strided' * strided}"
            run = functools.partial(_quantize, m, n, z, kernel, strided)
            groups = {"per_tensor": 1, "per_row": m, "per_column": n}[z.granularity]
            yield Case(KERNELS[kernel], words, _gib(m * n, 4) + 20 * groups / 2**30, run)


def _one_row(tiny: bool) -> Iterator[Case]:
    """The longest row that the kernel steps along in int32. The last case: a counter that leaves int32 never ends."""
    from fqt_kernels.quantize import LONG_ROWS

    n = 511 if tiny else 2**31 - 1 - LONG_ROWS[1]
    run = functools.partial(_quantize, 1, n, Quantizer(8, "per_row", "symmetric"), "long_rows", False)
    yield Case("_long_rows_kernel", f"1x{n}, per_row, symmetric, nearest", _gib(n, 4), run)


def _quantize(m: int, n: int, z: Quantizer, kernel: str, strided: bool, device: torch.device) -> str:
    from fqt_kernels.quantize import quantize

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter cuts float32 off to bfloat16
    x = normal(n, m, device=device, dtype=dtype).t() if strided else normal(m, n, device=device, dtype=dtype)
    rng = rng_of(device) if z.rounding == "stochastic" else None
    sums = m * n < 2**31 or max(m, n) < 2**24  # int32 holds the sum of so many codes
    cols = kernel != "rows"  # which makes a transposed copy of shorter rows only
    q, qt, scale, offset, row_sum, col_sum = quantize(
        x, bits=z.bits, granularity=z.granularity, zero=z.zero, rng=rng, stream=5, cols=cols, sums=sums, kernel=kernel
    )
    check_quantized("", x, Quantized(z, rng, 5, None, q, qt, scale, offset, row_sum, col_sum))
    return "codes, scales and sums"


def _gradients(tiny: bool) -> Iterator[Case]:
    m, n = (35, 70) if tiny else (2**20 + 3, 2112)
    for name, g, h in (
        ("int8", Quantizer(8, "per_row", "symmetric", "stochastic"), Quantizer(8, "per_column", "symmetric", "stochastic")),
        ("affine", Quantizer(4, "per_row", "min", "stochastic"), Quantizer(8, "per_tensor", "grid", "stochastic")),
    ):  # fmt: skip
        run = functools.partial(_gradient, m, n, g, h)
        yield Case("_gradient_tile_kernel", f"{m}x{n}, {name}", _gib(m * n, 4.1), run)


def _gradient(m: int, n: int, g: Quantizer, h: Quantizer, device: torch.device) -> str:
    from fqt_kernels.gradient import Side, quantize_gradient

    dy, rng = normal(m, n, device=device, dtype=torch.bfloat16), rng_of(device)
    row_mul, col_mul = (
        torch.linspace(*ends, size, device=device) for ends, size in (((0.5, 2.0), m), ((2.0, 0.25), n))
    )
    of_g, of_h, total = quantize_gradient(
        dy, *(Side(z.bits, z.granularity, z.zero) for z in (g, h)), row_mul=row_mul, col_mul=col_mul, rng=rng,
        streams=(0, 1), sums=True, bias=True,
    )  # fmt: skip
    scales = [(q.scale, q.offset) for q in (of_g, of_h)]
    check_quantized("G ", dy, Quantized(g, rng, 0, col_mul[None], of_g.codes, None, *scales[0], of_g.sums, None))
    check_quantized("H ", dy, Quantized(h, rng, 1, row_mul[:, None], None, of_h.codes, *scales[1], None, of_h.sums))
    want, size = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
    for rows, cols in pieces(m, n):
        want[cols] += dy[rows, cols].double().sum(0)
        size[cols] += dy[rows, cols].double().abs().sum(0)
    near("bias", total, want, m * 2.0**-24 * size)  # so many additions
    return "both codes, scales, sums and column sums"


# ---- products


def _products(tiny: bool) -> Iterator[Case]:
    m, n, k = (70, 44, 48) if tiny else (2**20 + 3, 2112, 64)
    yield Case("_scaled_mm_kernel", f"{m}x{n} outputs, K {k}", _gib(m * n, 4), functools.partial(_product, m, n, k))
    k, n, m = (336, 44, 37) if tiny else (4112, 48, 2**19 + 5)
    yield Case("_scaled_mm_kernel", f"A {m}x{k}, N {n}", _gib(m * k, 2), functools.partial(_product, m, n, k))
    yield Case("_scaled_mm_kernel", f"B {m}x{k}, M {n}", _gib(m * k, 2), functools.partial(_product, n, m, k))


def _product(m: int, n: int, k: int, device: torch.device) -> str:
    a, b = codes_of(m, k, device=device), codes_of(n, k, device=device, seed=3)
    sa, sb = (torch.linspace(0.5, 2.0, size, device=device) for size in (m, n))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tried = []
    for candidate in launches(device, m, n, k, splits=False):
        c = launch(candidate, device)(a, b, sa, sb, out_dtype=dtype)
        for rows, cols in pieces(m, n):
            left, right = Operand(a[rows], sa[rows], None, None), Operand(b[cols], sb[cols], None, None)
            want = reference.scaled_mm(left, right, None, dtype)
            same(f"{candidate}: C", c[rows, cols], want, (rows.start, cols.start))
        tried.append(candidate)
        del c
    return f"{len(tried)} candidates, bit for bit"


def _long_sums(tiny: bool) -> Iterator[Case]:
    """Codes whose sums are as large as they can be; both are exact in float32."""
    m, n = (37, 24) if tiny else (200, 136)
    for k, (a, b) in itertools.product((131_071, 131_072, 200_704), ((-128, -128), (127, -128))):
        k = k if not tiny else k // 1024
        run = functools.partial(_long_sum, m, n, k, a, b)
        yield Case("_scaled_mm_kernel", f"{m}x{n}, K {k}, codes {a} and {b}", 1.0, run)


def _long_sum(m: int, n: int, k: int, a: int, b: int, device: torch.device) -> str:
    qa, qb = (torch.full(shape, code, dtype=torch.int8, device=device) for shape, code in (((m, k), a), ((n, k), b)))
    sa, sb = (torch.full((size,), 2.0**-4, device=device) for size in (m, n))
    # Exact in float32, and so are the sums of whole blocks of K that the longer ones are made of: k·127 has 24 bits.
    want = torch.full((m, n), k * a * b * 2.0**-8, device=device)
    found = launches(device, m, n, k, splits=True)
    for candidate in found:
        same(f"{candidate}: C", launch(candidate, device)(qa, qb, sa, sb), want)
    return f"{len(found)} candidates and ways to split K, bit for bit"


def launches(device: torch.device, m: int, n: int, k: int, splits: bool) -> list[Candidate]:
    """All that may be launched for a product; splits: also every number of programs that may share a sum."""
    with dispatch.backend("triton" if device.type == "cpu" else "auto"):
        p = dispatch.problem("scaled_mm", device, m, n, k)
        found = list(candidates(p))
        if splits:
            found += [c._replace(split_k=s) for c in candidates(p) for s in range(1, MOST_SPLITS + 1)]
        return [candidate for candidate in dict.fromkeys(found) if allows(p, candidate)]


def launch(candidate: Candidate, device: torch.device):
    processors = dispatch.device_info(str(device))[1] if device.type == "cuda" else 1
    return products.launcher(candidate, processors)


# ---- the block Householder transform


def _householders(tiny: bool) -> Iterator[Case]:
    m, n = (131, 16) if tiny else (2**20 + 16, 2112)
    for groups in ("tile", "global"):
        run = functools.partial(_transform, m, n, groups)
        yield Case("_transform_kernel", f"{m}x{n}, {groups}", _gib(m * n, 4), run)
        run = functools.partial(_inverse, m, n, groups)
        yield Case("_inverse_kernel", f"{m}x{n}, {groups}", _gib(m * n, 9), run)
    few = (9, 70) if tiny else (131, 2**24 + 16)
    run = functools.partial(_transform, *few, "global")
    yield Case(
        "_long_transform_kernel", f"{few[0]}x{few[1]}, global", _gib(few[0] * few[1], 4) + 8 * few[1] / 2**27, run
    )
    run = functools.partial(_product_of_tiles, m, n, 64)
    yield Case("_householder_mm_kernel", f"{m}x{n} outputs, K 64", _gib(m * n, 5), run)


def _rows_of_many_sizes(m: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A row in 16 is a large one."""
    x = normal(m, n, device=device, dtype=dtype)
    x[::16] *= 32.0
    return x


def _transform(m: int, n: int, groups: str, device: torch.device) -> str:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dy, rng = _rows_of_many_sizes(m, n, device, dtype), rng_of(device)
    z = Quantizer(5, "per_row", "min", "stochastic", householder=True, groups=groups)
    with dispatch.backend("triton"):
        t = gradients.transformed(dy, z, sums=True, rng=rng)
    for rows, _ in pieces(m, n):
        same("ranges", t.ranges[rows], dy[rows].amax(1).float() - dy[rows].amin(1).float(), (rows.start,))
    _check_groups(t.groups, t.ranges, groups)
    count = 0
    for rows, h in _whole_groups(t.groups, t.ranges, m, n):
        lo, hi = (torch.full((len(rows), 1), sign * torch.inf, device=device) for sign in (1, -1))
        for _, y in _transformed(h, dy, rows):
            lo, hi = torch.minimum(lo, y.amin(1, True)), torch.maximum(hi, y.amax(1, True))
        sums = torch.zeros(len(rows), dtype=torch.int64, device=device)
        where = f"of rows {int(rows.min())} to {int(rows.max())}: "
        for cols, y in _transformed(h, dy, rows):
            q, scale, offset = reference.codes(y, lo, hi, z, bits_at(rng, rows, cols, gradients.DGRAD))
            same(where + "q", t.codes.q[:, cols][rows], q, (0, cols.start))
            sums += q.sum(1)
        same(where + "scale", t.codes.scale[rows], scale)
        same(where + "offset", t.codes.offset[rows], offset)
        same(where + "row_sum", t.codes.row_sum[rows], sums.to(torch.int32))
        count += len(rows)
    return f"groups of all rows; codes of {count} rows"


def _transformed(h: Householder, x: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """T x of these rows, some columns at a time. The sums of followers are in units of the largest magnitude of whole rows,
    so that this is a column more."""
    n = x.shape[1]
    width = max(piece() // len(rows) // 8 * 8, 8)
    columns = [slice(c, min(c + width, n)) for c in range(0, n, width)]
    largest = torch.stack([x[:, cols][rows].float().abs().amax(1) for cols in columns]).amax(0)[:, None]
    for cols in columns:
        yield cols, h.apply(torch.cat([x[:, cols][rows].float(), largest], 1))[:, :-1]


def _inverse(m: int, n: int, groups: str, device: torch.device) -> str:
    from fqt_kernels import grouping, householder

    z = _rows_of_many_sizes(m, n, device, torch.float32)
    absmax = torch.empty(m, dtype=torch.int32, device=device)
    ranges = torch.empty(m, device=device)
    for rows, cols in pieces(m, n):
        if cols.stop - cols.start < n:
            raise ValueError("rows are compared whole")
        absmax[rows] = z[rows].abs().amax(1).view(torch.int32)
        ranges[rows] = z[rows].amax(1) - z[rows].amin(1)
    found = grouping.group_rows(ranges, groups)
    value, columns = torch.zeros(m, device=device), torch.zeros(n, device=device)
    out = householder.inverse(
        z, found, absmax, ranges=ranges, value=value, columns=columns, out_dtype=torch.float32
    )  # fmt: skip
    count = 0
    for rows, h in _whole_groups(found, ranges, m, n):
        same(f"of rows {int(rows.min())} to {int(rows.max())}: dX", out[rows], h.inverse(z[rows]))
        count += len(rows)
    return f"{count} rows"


def _check_groups(found, ranges: Tensor, groups: str) -> None:
    want = definition.group_rows(ranges, groups)
    for name, got, expected in zip(want._fields, found, want, strict=True):
        same(name, got, expected.to(got.dtype))


def _whole_groups(found, ranges: Tensor, m: int, n: int) -> Iterator[tuple[Tensor, Householder]]:
    """Runs of whole groups, as (rows, their own transform): all, in pieces; groups of too many rows are left out."""
    order, group, first, s = (t.long() if t.dtype == torch.int32 else t for t in found)
    size = first[1:] - first[:-1]
    begins = torch.unique(first[:-1][size > 0])  # in order: runs of positions
    ends = torch.cat([begins[1:], begins.new_tensor([m])])
    fits = ends - begins <= LARGEST_GROUP
    starts, stops = begins[fits].tolist(), ends[fits].tolist()
    if not starts:
        raise Wrong(f"no group of at most {LARGEST_GROUP} rows among {m}")
    most = max(next(iter(pieces(m, n)))[0].stop, max(b - a for a, b in zip(starts, stops, strict=True)))
    i = 0
    while i < len(starts):
        j = i
        while j + 1 < len(starts) and starts[j + 1] == stops[j] and stops[j + 1] - starts[i] <= most:
            j += 1
        rows = order[starts[i] : stops[j]]
        numbers = group[rows]
        local = torch.unique_consecutive(numbers, return_inverse=True)[1]
        bounds = torch.tensor(starts[i : j + 1], device=order.device) - starts[i]
        total = len(rows)
        firsts = torch.full((total + 1,), total, device=order.device)
        firsts[: len(bounds)] = bounds
        scales = torch.ones(total, device=order.device)
        scales[: len(bounds)] = s[numbers[bounds]]
        own = definition.Groups(torch.arange(total, device=order.device), local, firsts, scales)
        yield rows, Householder(own, (ranges[rows] == 0)[:, None])
        i = j + 1


def _product_of_tiles(m: int, n: int, k: int, device: torch.device) -> str:
    """The bound is that of `fqt.selftest_householder`."""
    from fqt_kernels import gemm_householder, grouping

    a, b = codes_of(m, k, device=device), codes_of(n, k, device=device, seed=3)
    sa, sb = (torch.linspace(0.5, 2.0, size, device=device) for size in (m, n))
    sa[::16] *= 32.0
    ranges = sa.clone()
    groups = grouping.group_rows(ranges, "tile")
    known = torch.zeros(max(m, n), device=device)
    tried = gemm_householder.CONFIGS[family(dispatch.problem("scaled_mm", device, m, n, k)) or "sm80"]
    for config in tried:
        c = gemm_householder.scaled_mm(
            a, b, sa, sb, groups=groups, ranges=ranges, value=known[:m], columns=known[:n], config=config
        )
        for rows, _ in pieces(m, n, definition.TILE):
            z = reference.scaled_mm(Operand(a[rows], sa[rows], None, None), Operand(b, sb, None, None))
            h = Householder(definition.group_rows(ranges[rows], "tile"), (ranges[rows] == 0)[:, None])
            largest = torch.zeros(len(z), device=device).scatter_reduce_(0, h.group, z.abs().amax(1), "amax")[h.group]
            limit = (64 * 2.0**-24 * largest * h.size.sqrt())[:, None] / h.s
            near(f"{config}: C", c[rows], h.inverse(z), limit, (rows.start, 0))
        del c
    return f"{len(tried)} configurations, within the bound"
