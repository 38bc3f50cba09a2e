"""Laws of the product by the vendor's library and a pass over its sums: the bits of `fqt.reference`, nothing astray."""

import inspect
import itertools
import math
import re

import laws
import pytest
import torch
from products import CONFIG, INTERPRETED, operand, pair

import fqt_kernels.gemm as portable
import fqt_kernels.gemm_cublas as kernels
from fqt import reference

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# (M, N, K): extents of 1, primes, one below and above a tile (16, 256), rows of 8 and of 16 columns, K off multiples of 16.
SHAPES = [(1, 1, 1), (1, 263, 16), (17, 1, 5), (15, 31, 48), (17, 257, 33), (31, 8, 64), (33, 24, 8), (16, 256, 37)]
if not INTERPRETED:  # torch._int_mm's own demands
    SHAPES = [(17, 8, 1), (17, 264, 16), (31, 8, 5), (33, 24, 48), (35, 256, 33), (131, 520, 37)]
EPILOGUES = list(
    itertools.product(("per_tensor", "per_row"), (False, True), ("per_tensor", "per_row", "none"), (False, True))
)
AFFINE = ("per_row", True, "per_row", True)
M, N = 33, 24  # of tests of one shape: what any device multiplies, over more than one tile of rows


@pytest.fixture(autouse=True)
def memory(guard):
    """All that the launcher allocates, the library's sums included, lies between guard bands of poison."""
    guarded = guard(kernels)

    def int_mm(a, b):
        sums = torch._int_mm(a, b)
        return guarded.empty(*sums.shape, dtype=torch.int32, device=sums.device).copy_(sums)

    guarded._int_mm = int_mm
    return guarded


def launch(a, b, bias=None, device="cpu", **options):
    def move(t):
        return None if t is None else t.to(device)

    return kernels.scaled_mm(
        move(a.q), move(b.q), move(a.scale), move(b.scale), a_offset=move(a.offset), b_offset=move(b.offset),
        a_sum=move(a.sum), b_sum=move(b.sum), bias=move(bias), **options,
    )  # fmt: skip


@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_the_product_is_the_reference(i, device):
    """Bit for bit in float32, whatever is scaled, shifted and added."""
    m, n, k = SHAPES[i]
    for j, epilogue in enumerate(EPILOGUES[i % 4 :: 4]):
        a, b = pair(m, n, k, epilogue, seed=i)
        bias = None if (i + j) % 3 == 0 else torch.randn(n).to((torch.float32, torch.bfloat16, torch.float16)[j % 3])
        laws.assert_same(launch(a, b, bias, device), reference.scaled_mm(a, b, bias), f"{SHAPES[i]} {epilogue}")


@pytest.mark.parametrize("n", [24, 31][: 1 + INTERPRETED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_output_has_the_bits_of_the_portable_kernel(dtype, n, device):
    """C, C added to what is there, and the row maxima; in the interpreter too, which truncates bfloat16 in both."""
    a, b = pair(M, n, 80, AFFINE)
    a, bias = a._replace(scale=a.scale / 4096, offset=a.offset / 4096), torch.randn(n)  # within float16
    a, b = (o._replace(**{f: t.to(device) for f, t in o._asdict().items() if t is not None}) for o in (a, b))
    arguments = (a.q, b.q, a.scale, b.scale)
    terms = dict(a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum, bias=bias.to(device))
    for stride in (None, n, 32, n + 1):
        results = []
        for scaled_mm, more in ((kernels.scaled_mm, {}), (portable.scaled_mm, {"config": CONFIG})):
            row_absmax = torch.full((M,), -(2**31), dtype=torch.int32, device=device)
            out = None if stride is None else laws.poisoned_rows(torch.ones(M, n, dtype=dtype, device=device), stride)
            kind = dtype if out is None else None
            c = scaled_mm(*arguments, **terms, out_dtype=kind, out=out, row_absmax=row_absmax, **more)
            assert (c is out if stride else c.dtype == dtype) and bool(c.isfinite().all())
            frame = [] if out is None else [out.as_strided(((M + 2) * stride,), (1,), 0).nan_to_num(nan=7.0)]
            results.append([c, row_absmax, *frame])
        for got, want in zip(*results, strict=True):
            laws.assert_same(got, want, f"stride {stride}")
        expected = results[0][0].float().abs().view(torch.int32).amax(1)
        laws.assert_same(results[0][1], expected.cpu())


def test_the_sum_of_a_gradient_is_rounded_once(device):
    """out + the product in float32, as the reference adds."""
    a, b = pair(M, N, 48, ("per_row", False, "none", False))
    before = torch.randn(M, N)
    out = before.clone().to(device)
    assert launch(a, b, device=device, out=out) is out
    laws.assert_same(out, before + reference.scaled_mm(a, b))


def test_columns_beyond_the_last_have_no_part_in_a_maximum(device):
    """Their product would be the offsets' alone, which the bias takes away from the others."""
    a, b = pair(M, N, 64, AFFINE)
    a = a._replace(scale=a.scale * 1e-9, offset=torch.full((M,), 4.0))
    b = b._replace(scale=b.scale * 1e-9, offset=torch.tensor([2.0]))
    row_absmax = torch.zeros(M, dtype=torch.int32, device=device)
    out = launch(a, b, torch.full((N,), -4.0 * 2.0 * 64), device, row_absmax=row_absmax)
    assert float(out.abs().max()) < 1
    laws.assert_same(row_absmax, out.cpu().abs().view(torch.int32).amax(1))


def test_extreme_codes_and_a_non_finite_scale(device):
    """The longest sum that int32 holds, of -128 times -128; a NaN stays in its row."""
    m, n, k = (17, 8, portable.MAX_INT32_TERMS)
    a, b = (operand(torch.full((rows, k), -128, dtype=torch.int8), sums=False) for rows in (m, n))
    a.scale[3] = math.nan
    got = launch(a, b, device=device).cpu()
    assert bool(got[3].isnan().all())
    laws.assert_same(got, reference.scaled_mm(a, b))


def test_wide_offsets_give_the_same_bits(device, monkeypatch):
    a, b = pair(M, N, 48, AFFINE)
    expected = launch(a, b, device=device)
    seen = []
    monkeypatch.setattr(kernels, "is_wide", lambda *spans: seen.append(spans) or True)
    laws.assert_same(launch(a, b, device=device), expected.cpu())
    assert seen == [(kernels.TILE[0] * N,)]


def test_codes_of_any_address_and_stride(device):
    """The library may count on 16 bytes of alignment: codes without it are copied, to the same result."""
    a, b = pair(M, N, 64)
    frame = torch.full((M, 97), 99, dtype=torch.int8, device=device)
    frame[:, 3:67] = a.q.to(device)
    got = kernels.scaled_mm(frame[:, 3:67], b.q.to(device), a.scale.to(device), b.scale.to(device))
    laws.assert_same(got, reference.scaled_mm(a, b))
    frame = torch.full((M * 64 + 5,), 99, dtype=torch.int8, device=device)
    odd = frame[5:].view(M, 64).copy_(a.q)
    assert odd.data_ptr() % 16 and kernels._addressable(odd).data_ptr() % 16 == 0
    assert kernels._addressable(b.q) is b.q


def test_it_takes_what_the_portable_kernel_takes():
    def names(f):
        return set(inspect.signature(f).parameters)

    assert names(portable.scaled_mm) - names(kernels.scaled_mm) == {"split_k", "config"}
    assert names(kernels.scaled_mm) <= names(portable.scaled_mm)


@pytest.mark.parametrize(
    "arch, shape, dtype, says",
    [
        ("sm90", (17, 8, 1), torch.int8, None),
        ("gfx942", (4096, 4096, 131_071), torch.int8, None),
        ("", (1, 1, 1), torch.int8, None),
        ("sm90", (16, 8, 64), torch.int8, "at least 17 rows .* not 16x8"),
        ("sm90", (17, 12, 64), torch.int8, "multiples of 8 columns, not 17x12"),
        ("", (17, 8, 0), torch.int8, "an extent of 17x8x0 is 0"),
        ("", (17, 8, 131_072), torch.int8, "131072 products may overflow: at most 131071"),
        ("sm90", (2**14, 2**14, 64), torch.int8, None),
        ("sm90", (2**15, 2**14, 64), torch.int8, "32768x16384 sums would take 2 GiB"),
        ("", (17, 8, 64), torch.float8_e4m3fn, "float8_e4m3fn, not int8"),
    ],
)
def test_what_the_library_cannot_multiply_is_said(arch, shape, dtype, says):
    reason = kernels.reason_against(arch, *shape, dtype)
    assert reason is None if says is None else re.search(says, reason) is not None


def test_what_it_cannot_multiply_is_refused(device):
    scale = torch.ones(1, device=device)
    for codes, says in (
        (torch.zeros(17, 131_072, dtype=torch.int8), "overflow"),
        (torch.zeros(17, 8, dtype=torch.float8_e4m3fn), "not int8"),
    ):
        with pytest.raises(ValueError, match=says):
            kernels.scaled_mm(codes.to(device), codes[:8].to(device), scale, scale)
    q = torch.zeros(24, 16, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match=r"out must be \(24, 24\)"):
        kernels.scaled_mm(q, q, scale, scale, out=torch.zeros(3, 3, device=device))
    if not INTERPRETED:
        with pytest.raises(ValueError, match="at least 17 rows"):
            kernels.scaled_mm(q[:16], q, scale, scale)
