"""What may be launched for the operators of a convolution, and that all of it computes the same bits."""

import laws
import pytest
import torch

import fqt
from fqt import candidates as module
from fqt import conv, conv_problems, conv_products, tuned
from fqt.candidates import Candidate, candidates, heuristic, known
from fqt.conv import Filters, Geometry
from fqt.dispatch import Choice, Problem, select
from fqt.recipe import Quantizer
from fqt_kernels import conv as conv_kernel
from fqt_kernels import conv_quantize, conv_wgrad
from fqt_kernels.gradient import Side

GPUS = {"sm80": 108, "sm89": 128, "sm90": 132, "sm100": 148, "gfx942": 304}  # processors
CONVOLUTION = Geometry.of((16, 16), (3, 3), padding=((1, 1), (1, 1)))
POINTWISE = Geometry.of((16, 16), (1, 1))
ASKED = {
    "9 taps": conv_problems.product(CONVOLUTION, 16, 64, 64, 64, False),
    "1x1": conv_problems.product(POINTWISE, 16, 64, 64, 64, True),
    "few channels": conv_problems.product(CONVOLUTION, 16, 64, 3, 3, False),
    "dgrad of few": conv_problems.product(CONVOLUTION, 16, 64, 3, 3, True),
    "groups": conv_problems.product(CONVOLUTION._replace(groups=4), 16, 64, 16, 16, False),
    "wgrad": conv_problems.wgrad(CONVOLUTION, 16, 64, 64, 16),
    "wgrad 1x1": conv_problems.wgrad(POINTWISE, 16, 64, 64, 16),
    "long wgrad 1x1": conv_problems.wgrad(POINTWISE, 1024, 64, 64, 1024),
    "images": conv_problems.quantization(16, 64, 256, 64, False, "per_row", "nearest", "both"),
    "odd images": conv_problems.quantization(15, 60, 7, 64, True, "per_row", "nearest", "cols"),
    "gradient": conv_problems.gradient(16, 64, 256, 64, True, "per_row", "per_column"),
}
WAYS = {"1x1": "pointwise", "wgrad 1x1": "pointwise", "few channels": "im2col"}


def asked(name, gpu="sm90", **change):
    call = ASKED[name]
    return Problem(call.op, *call.sizes, **dict(device="cuda", triton="3.7.1", arch=gpu, processors=GPUS[gpu]) | call.more
                   | change)  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ASKED)
def test_all_that_the_launchers_have_competes_the_guess_first(name, gpu):
    """The guess is what `select` chooses with an empty table. Each is known, allowed and different."""
    p = asked(name, gpu)
    found, choice = candidates(p), select(p)
    assert 1 <= len(found) == len(set(found)) <= 16 and found[0] == heuristic(p)
    assert all(known(p.op, "int", c.kernel, c.config) and module.allows(p, c) for c in found)
    assert candidates(Problem(**vars(p) | {"format": "e4m3"})) == ()
    if p.op.startswith("quantize"):
        assert {c.kernel for c in found} == {"tile"} and len(found) == (1 if "odd" in name else 2)
        assert choice.backend == "triton" and choice.config is None
        return
    way = WAYS.get(name, "implicit")
    assert heuristic(p) == (choice.kernel, choice.config or (), choice.split_k)
    assert {c.kernel for c in found} == {"implicit", way} and found[0].kernel == way
    assert all(c.split_k == 1 for c in found) or p.op == "conv_wgrad"
    configs = {c.config for c in found if c.kernel == "implicit"}
    if "few" in name:
        assert configs == {conv_kernel.UNALIGNED_CONFIG}
    else:
        tables = conv_kernel.CONFIGS if p.op == "conv" else conv_wgrad.CONFIGS
        assert configs <= set(tables[module.table_of(p)]) and len(configs) > 1


def test_the_geometry_decides_whether_a_convolution_is_a_product_of_matrices():
    """Not the key of a table: padding, and what the product is added to, are no part of that."""
    p = asked("1x1")
    padded = conv_problems.product(POINTWISE._replace(padding=(1, 1), out=(18, 18)), 16, 64, 64, 64, True)
    for change in (padded.more, {"plain": False}, {"geometry": ()}):
        other = Problem(**vars(p) | change)
        assert tuned.key(other) == tuned.key(p) and not module.allows(other, Candidate("pointwise", ()))
        assert {c.kernel for c in candidates(other)} == {"implicit"}


def test_wgrad_takes_the_splits_of_a_neighbour_as_far_as_they_suit():
    p, config = asked("wgrad"), conv_wgrad.CONFIGS["sm90"][0]
    competing = {c.split_k for c in candidates(p) if c.config == config}
    more = set(range(1, max(competing))) - competing
    assert more and all(module.allows(p, Candidate("implicit", config, split)) for split in more | competing)
    for kernel, other, split in (("implicit", config, 1000), ("implicit", (1, 2), 1), ("im2col", (), 1)):
        assert not module.allows(p, Candidate(kernel, other, split))
    assert not module.allows(Problem(**vars(p) | {"arch": "sm75"}), Candidate("implicit", config, 1))


# ---- the same bits


@pytest.mark.parametrize("zero", ["symmetric", "min"])
def test_a_1x1_convolution_is_the_same_whichever_way_it_is_computed(zero, device):
    """All three products, of 5 images of 3x2 with 20 channels; affine operands have sums, and codes that pad them."""
    g, n, c, o = Geometry.of((3, 2), (1, 1)), 5, 20, 7
    z, rng = Quantizer(8, "per_tensor" if zero == "min" else "per_row", zero), torch.tensor([3, 1])
    affine = zero == "min"
    x, dy = torch.randn(n, c, 6), torch.randn(n, o, 6)
    a = conv.quantize(x, z, channels=32, cols=True, sums=affine)
    h = conv.quantize(dy, Quantizer(8, "per_column", zero, "stochastic"), rng=rng, rows=False, cols=True)
    q = torch.randint(-127, 128, (o, 1, c), dtype=torch.int8)
    offset = torch.randn(1) if affine else None
    f = Filters(torch.nn.functional.pad(q, (0, 12)), torch.rand(o), offset, q.sum(2, dtype=torch.int32), c)
    a, h, f = (type(t)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in t)) for t in (a, h, f))
    implicit = Choice("triton", conv_kernel.CONFIGS["sm80"][0], "", "implicit")
    ways = [implicit, Choice("triton", None, "", "pointwise")]
    with fqt.backend("triton"):
        got = [conv_products.product(a, f, g, None, choice=way) for way in ways]
        laws.assert_same(got[0], got[1].cpu())
        laws.assert_same(got[0].flatten(2), conv.product(a, f, g).cpu())
        if not affine:  # whose images are not padded
            ways[0] = Choice("triton", conv_wgrad.CONFIGS["sm80"][0], "", "implicit", 2)
            dw = [conv_products.weight_product(h, a, None, g, n, torch.float32, choice=way) for way in ways]
            laws.assert_same(dw[0], dw[1].cpu())


@pytest.mark.parametrize("memory", ["channels_last", "contiguous"])
def test_every_tile_of_images_gives_the_same_bits_and_others_are_refused(memory, device):
    n, c, p = 16, 16, 16
    x = torch.randn(n, p, c, device=device).transpose(1, 2)
    x = x if memory == "channels_last" else x.contiguous()
    rng = torch.tensor([5, 2], device=device)
    last = memory == "contiguous"
    sides = Side(8, "per_row", "symmetric"), Side(8, "per_column", "symmetric")
    one = dict(bits=8, granularity="per_row", zero="symmetric", cols=True)
    both = dict(row_mul=None, col_mul=None, rng=rng, streams=(0, 1))
    call = conv_problems.gradient(n, c, p, c, last, "per_row", "per_column")
    tiles = [
        t.config for t in candidates(Problem(call.op, *call.sizes, **call.more, device="cuda", arch="sm90", triton="3"))
    ]
    assert tiles == [table[last, True] for table in (conv_quantize.TILES, conv_quantize.ODD_TILES)]
    results = [
        [*conv_quantize.quantize_images(x, tile=tile, **one), *(t for part in conv_quantize.quantize_gradient_images(
            x, *sides, tile=tile, **both)[:2] for t in part)] for tile in (*tiles, None)
    ]  # fmt: skip
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            laws.assert_same(got, None if want is None else want.cpu())
    with pytest.raises(ValueError, match=r"tiles of .* got \(4, 4, 4, 1\)"):
        conv_quantize.quantize_images(x, tile=(4, 4, 4, 1), **one)
