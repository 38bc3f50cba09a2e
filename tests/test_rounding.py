"""Laws of rounding to float8_e4m3fn, and of the assembly that rounds to integers on NVIDIA."""

import math
import re

import laws
import pytest
import torch

import fqt_kernels._device as device_code
from fqt import reference

ALL_BITS = torch.arange(65536, dtype=torch.int32)
NUMBERS = torch.arange(-128, 128).to(torch.int8).view(torch.float8_e4m3fn).float()
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()  # 253 of them: -0 is 0


def neighbours(y):
    """The largest number of the format that is not above y, and the smallest that is not below."""
    at = torch.searchsorted(NUMBERS, y.contiguous())
    above = NUMBERS[at.clamp(max=len(NUMBERS) - 1)]
    below = torch.where(above == y, above, NUMBERS[(at - 1).clamp(min=0)])
    return below, above


# ---- e4m3


@pytest.mark.parametrize("bits", [0, 1, 32768, 65535])
def test_a_number_of_the_format_is_a_fixed_point(bits):
    for rounding in ("nearest", "stochastic"):
        rounded = reference.round_e4m3(NUMBERS, rounding, torch.full(NUMBERS.shape, bits, dtype=torch.int32))
        assert rounded.dtype == torch.float8_e4m3fn and torch.equal(rounded.float(), NUMBERS)


def test_stochastic_rounding_takes_a_neighbour_with_the_probability_of_its_nearness():
    """Over all 65536 bits the mean is y to within 2⁻¹⁶ of the distance of its neighbours, towards zero."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([2.0**-11, 2.0**-9, 2.0**-6, 0.1, 1, 30, 440])
    for y in ((torch.rand(7, 6, generator=g) * 2 - 1) * sizes[:, None]).flatten():
        rounded = reference.round_e4m3(y.expand(65536), "stochastic", ALL_BITS).float()
        below, above = neighbours(y[None])
        assert set(rounded.tolist()) <= {float(below), float(above)}
        error = float(rounded.double().mean() - y.double()) * float(y.sign()) / float(above - below)
        assert -(2.0**-16) <= error <= 2.0**-20


def test_nearest_is_the_nearest_number_ties_to_even():
    y = torch.cat([torch.linspace(-460, 460, 4001), torch.linspace(-0.03, 0.03, 4001)])
    below, above = neighbours(y.clamp(-448, 448))
    rounded = reference.round_e4m3(y, "nearest").float()
    assert torch.equal(
        (rounded - y.clamp(-448, 448)).abs(),
        torch.minimum(y.clamp(-448, 448) - below, above - y.clamp(-448, 448)).abs(),
    )
    halves = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    assert bool((reference.round_e4m3(halves, "nearest").view(torch.uint8) % 2 == 0).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_lies_beyond_the_largest_number_becomes_it_and_never_nan(rounding):
    y = torch.tensor([448.0, 448.00003, 463.9, 464, 500, 1e30, -448.00003, -1e30])
    rounded = reference.round_e4m3(y, rounding, torch.full(y.shape, 65535, dtype=torch.int32)).float()
    assert torch.equal(rounded, y.clamp(-448, 448))


@pytest.mark.parametrize("biased", [False, True])
def test_e4m3_is_unbiased_by_the_z_test_which_rejects_a_biased_rounder(biased):
    """256 draws of 4096 values; the biased one leaves out the last place that the random bits reach of a small number."""
    y = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 64)

    def draw(i):
        bits = reference.random_bits(laws.random_state(2, i), 64, 64)
        return reference.round_e4m3(y, "stochastic", (bits + 2000).clamp(max=65535) if biased else bits).float() / unit

    below, above = neighbours(y)
    unit = (above - below).clamp(min=2.0**-9)
    if biased:
        with pytest.raises(AssertionError, match="biased"):
            laws.assert_unbiased(draw, y / unit, 256, bin=1.0)
    else:
        laws.assert_unbiased(draw, y / unit, 256, bin=1.0)


# ---- the assembly, evaluated here instruction by instruction


def _signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def _nearest_int(y: float) -> int:
    """cvt.rni.s32.f32: ties to even, saturating, NaN to 0."""
    return (
        0
        if math.isnan(y)
        else max(min(round(y) if math.isfinite(y) else int(math.copysign(2**31, y)), 2**31 - 1), -(2**31))
    )


def _bytes_of(a: int, b: int, selector: int) -> int:
    """prmt.b32: four bytes of the eight of a and b."""
    source = (a % 2**32).to_bytes(4, "little") + (b % 2**32).to_bytes(4, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


INSTRUCTIONS = {
    "cvt.rni.s32.f32": _nearest_int,
    "dp2a.lo.u32.u32": lambda a, b, c: _signed(c + (a & 0xFFFF) * (b & 0xFF) + (a >> 16) * (b >> 8 & 0xFF)),
    "max.s32": max,
    "min.s32": min,
    "sub.s32": lambda a, b: _signed(a - b),
    "prmt.b32": _bytes_of,
}


def evaluate(assembly: str, operands: list[float]) -> int:
    """The value of $0 for the values of $1, $2, …."""
    registers: dict[str, float] = {f"${i}": value for i, value in enumerate(operands, 1)}
    body = re.fullmatch(r"\{ \.reg \.b32 a, b, c, d; (.*) \}", assembly, re.S)[1]
    for statement in filter(None, (s.strip() for s in body.split(";"))):
        opcode, arguments = statement.split(None, 1)
        target, *sources = (a.strip() for a in arguments.split(","))
        registers[target] = INSTRUCTIONS[opcode](*(registers[s] if s in registers else int(s, 0) for s in sources))
    return registers["$0"]


ZEROS = {"symmetric": device_code.SYMMETRIC, "grid": device_code.GRID, "min": device_code.MIN}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_assembly_gives_the_codes_of_the_reference(zero, stochastic, bits):
    """Four neighbours at a time: all ends of the range, ties, values around them, NaN, every corner of the random bits."""
    half = 2 ** (bits - 1)
    low, high = (1 - half, half - 1) if zero == "symmetric" else (0, 2 * half - 1)
    g = torch.Generator().manual_seed(bits)
    y = torch.cat([
        torch.tensor([low, low + 0.5, low + 1.5, high - 0.5, high, 0.0, -0.0, math.nan, low + 2.0**-17, high - 2.0**-17]),
        torch.rand(390, generator=g) * (high - low) + low,
    ])  # fmt: skip
    draws = torch.randint(0, 65536, y.shape, generator=g, dtype=torch.int32)
    draws[:40] = torch.tensor([0, 1, 32767, 65535]).repeat(10)
    if zero == "grid":  # float32 puts them beyond both ends
        y[10:14] = torch.tensor([-(2.0**-16), -(2.0**-15), high + 2.0**-16, high + 2.0**-15])
        draws[10:14] = torch.tensor([0, 0, 65535, 65535])
    if zero == "min":
        y[10], draws[10] = high + 2.0**-16, 65535
    expected = reference.round_codes(y.nan_to_num(0.0), "stochastic" if stochastic else "nearest", draws)
    expected = (expected.clamp(low, high) - (0 if zero == "symmetric" else half)).to(torch.int8)
    assembly = device_code.rounding_ptx(bits, ZEROS[zero], stochastic, False)
    values = (y.double() * (65536 if stochastic else 1)).view(-1, 4).tolist()
    words = (draws.long()[0::2] + (draws.long()[1::2] << 16)).view(-1, 2).tolist()
    for four, pair, codes in zip(values, words, expected.view(-1, 4), strict=True):
        a, b, c, d = four
        packed = evaluate(assembly, [a, c, b, d, *(pair if stochastic else [])])
        assert packed.to_bytes(4, "little") == bytes(codes.view(torch.uint8).tolist()), (four, pair, codes)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_assembly_clips_where_ranges_may_not_hold(zero, stochastic):
    low, high = (-127, 127) if zero == "symmetric" else (-128, 127)
    assembly = device_code.rounding_ptx(8, ZEROS[zero], stochastic, True)
    far = [y * (65536.0 if stochastic else 1.0) for y in (-1000.0, -300.0, 300.0, 1000.0)]
    packed = evaluate(assembly, [far[0], far[2], far[1], far[3], *([0, 0xFFFFFFFF] if stochastic else [])])
    assert [b - 256 * (b > 127) for b in packed.to_bytes(4, "little")] == [low, low, high, high]


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes_never_leave_their_range(bits):
    """Why the assembly does not clamp them: for each of the 2²³ mantissas of a largest magnitude, it is the last code."""
    largest = 2 ** (bits - 1) - 1
    amax = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    _, inv, *_ = reference.quantization_params(-amax, amax, bits, "symmetric")
    assert bool((torch.round(amax * (inv * 65536.0)) == largest * 65536).all())
