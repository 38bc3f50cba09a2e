"""Laws of the scaled product of float8 (e4m3) codes: near the exact product, the same each time, refused with offsets."""

import laws
import pytest
import torch
from products import INTERPRETED, launch

import fqt_kernels.gemm as kernels
from fqt.qtensor import Operand

if not INTERPRETED and (torch.version.hip or torch.cuda.get_device_capability() < (8, 9)):
    pytest.skip("the GPU has no float8 tensor cores", allow_module_level=True)

CONFIGS = [(32, 32, 32, 4, 2), (16, 64, 128, 4, 3), (64, 64, 32, 1, 1)]
MAX = 448.0  # the largest code


@pytest.fixture(autouse=True)
def memory(guard):
    return guard(kernels)


def operand(m, k, seed, scaled=True):
    """All finite codes alike, subnormal ones included: -448 … 448."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 0x7F, (m, k), generator=g) + 0x80 * torch.randint(0, 2, (m, k), generator=g)
    q = bits.to(torch.uint8).view(torch.float8_e4m3fn)
    return Operand(q, torch.exp(2 * torch.randn(m, generator=g)) if scaled else None, None, None)


def assert_near_exact(out, a, b, bias=None, *, block_k):
    """Against float64, in which products of codes (8 bits each) and their sums are exact.

    Each product is exact in float32. Each of at most K + 2·K/block_k additions, zeros of the padding being exact, rounds a
    partial sum of at most S = Σ|qa||qb| once. The two scales and the bias round three times more. The tensor cores of sm_89
    and sm_90 shift the 32 products of an instruction and the sum so far to the largest of them, and drop what is below
    2⁻¹³ of it: at most 33·2⁻¹³·s in each of a block's block_k/32 instructions, and the s of all blocks add up to S.
    """
    k = a.q.shape[1]
    qa, qb = a.q.double(), b.q.double()
    sa = a.scale.double()[:, None]
    sb = 1.0 if b.scale is None else b.scale.double()
    exact = qa @ qb.t() * sa * sb
    size = qa.abs() @ qb.abs().t() * sa * sb
    shift = 0.0 if bias is None else bias.double().abs()
    limit = (k + 2 * -(-k // block_k)) * laws.EPS * size + 3.01 * laws.EPS * (size + shift)
    if not INTERPRETED:
        limit = limit + 33 * 2.0**-13 * -(-block_k // 32) * size
    exact = exact if bias is None else exact + bias.double()
    error = (out.cpu().double() - exact).abs()
    assert bool((error <= limit).all()), float((error / limit.clamp(min=1e-300)).max())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 1, 0), (1, 1, 1), (33, 31, 32), (35, 64, 80), (7, 33, 207), (16, 17, 1024)])
def test_the_product_is_near_the_exact_one(m, n, k, config, device):
    for bias, scaled in ((None, True), (torch.randn(n), True), (torch.randn(n), False)):
        a, b = operand(m, k, 1), operand(n, k, 2, scaled)
        assert_near_exact(launch(a, b, bias, config=config, device=device), a, b, bias, block_k=config[2])


@pytest.mark.parametrize("k", [1, 5, 16, 37, 64])
def test_sums_of_small_integers_are_exact(k, device):
    """In float32, and with the fewest bits of tensor cores: what pads K adds nothing, not even the smallest code's 2⁻⁹."""
    a, b = (Operand(torch.randint(-1, 2, (m, k)).float(), torch.ones(1), None, None) for m in (9, 8))
    out = launch(*(t._replace(q=t.q.to(torch.float8_e4m3fn)) for t in (a, b)), device=device)
    laws.assert_same(out, a.q @ b.q.t())


@pytest.mark.parametrize("k", [131_071, 131_073])
def test_sums_are_as_long_as_they_are(k, device):
    """Float32 has no overflow to flush for: all ±448 sum to K·448², in float32 exact or to one rounding an addition."""
    a = Operand(torch.full((2, k), MAX).to(torch.float8_e4m3fn), torch.ones(1), None, None)
    a.q[1] = torch.tensor(-MAX).to(torch.float8_e4m3fn)
    out = launch(a, a, config=(16, 16, 512, 4, 2), device=device).cpu().double()
    exact = k * MAX**2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert bool(((out - exact).abs() <= (k * laws.EPS + (0 if INTERPRETED else 0.1)) * exact.abs()).all())


def test_a_scale_per_tensor_is_that_of_every_row(device):
    a, b = operand(33, 80, 1), operand(31, 80, 2)
    one = Operand(a.q, a.scale[:1], None, None), Operand(b.q, b.scale[:1], None, None)
    all_ = Operand(a.q, a.scale[:1].repeat(33), None, None), Operand(b.q, b.scale[:1].repeat(31), None, None)
    assert torch.equal(launch(*one, device=device), launch(*all_, device=device))


@pytest.mark.parametrize("k, stride", [(48, 64), (48, 55), (37, 64), (130, 144)])
def test_rows_may_be_any_distance_apart(k, stride, device):
    """With NaN between them: padded with zeros where K or the stride is no multiple of 16."""
    a, b = operand(33, k, 1), operand(35, k, 2)
    expected = launch(a, b, device=device)
    frame = torch.full((35, stride), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert bool(frame.isnan().all())
    frame[1:34, :k] = a.q
    out = launch(a._replace(q=frame.to(device)[1:34, :k]), b, device=device)
    assert torch.equal(out, expected)


def test_the_product_repeats_itself(device):
    a, b = operand(65, 208, 1), operand(33, 208, 2)
    assert torch.equal(launch(a, b, device=device), launch(a, b, device=device))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter reads the NaN of e4m3 as the number 480")
def test_a_nan_reaches_its_row_and_column_only(device):
    a, b = operand(9, 48, 1), operand(8, 48, 2)
    clean = launch(a, b, device=device).cpu()
    a.q.view(torch.uint8)[3, 5] = 0x7F
    b.q.view(torch.uint8)[2, 6] = 0xFF
    out = launch(a, b, device=device).cpu()
    hit = torch.zeros(9, 8, dtype=torch.bool)
    hit[3], hit[:, 2] = True, True
    assert torch.equal(out.isnan(), hit) and torch.equal(out[~hit], clean[~hit])


def test_a_nan_scale_reaches_its_row_only(device):
    a, b = operand(9, 48, 1), operand(8, 48, 2)
    clean = launch(a, b, device=device).cpu()
    a.scale[3] = float("nan")
    out = launch(a, b, device=device).cpu()
    assert bool(out[3].isnan().all())
    out[3] = clean[3]
    assert torch.equal(out, clean)


def test_it_adds_to_an_output_and_finds_row_maxima(device):
    a, b = operand(33, 80, 1), operand(31, 80, 2)
    product, out = launch(a, b, device=device).cpu(), torch.ones(33, 31, device=device)
    row_absmax = torch.zeros(33, dtype=torch.int32, device=device)
    launch(a, b, out=out, row_absmax=row_absmax, device=device)
    laws.assert_same(out, product + 1)
    laws.assert_same(row_absmax, (product + 1).abs().view(torch.int32).amax(1))


@pytest.mark.parametrize("field", ["offset", "sum"])
@pytest.mark.parametrize("side", [0, 1])
def test_offsets_and_sums_are_refused(field, side, device):
    operands = [operand(3, 16, 1), operand(2, 16, 2)]
    of = torch.ones(1) if field == "offset" else torch.ones(3 - side, dtype=torch.int32)
    operands[side] = operands[side]._replace(**{field: of})
    with pytest.raises(ValueError, match="float8 codes have no offsets and no sums"):
        launch(*operands, device=device)


@pytest.mark.parametrize("dtypes", [(torch.int8, torch.float8_e4m3fn), (torch.float8_e5m2,) * 2, (torch.uint8,) * 2])
def test_other_codes_are_refused(dtypes, device):
    a, b = (Operand(torch.zeros(3, 16).to(t), torch.ones(1), None, None) for t in dtypes)
    with pytest.raises(TypeError, match=f"both be int8 or both float8_e4m3fn, got {dtypes[0]}"):
        launch(a, b, device=device)
