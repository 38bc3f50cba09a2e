"""What may be launched for a problem: few, valid and known candidates, the heuristic's guess first, all of the same bits."""

import doctest
import functools
import itertools

import laws
import pytest
import torch
from products import pair

from fqt import candidates as module
from fqt import reference
from fqt.candidates import KERNELS, Candidate, candidates, heuristic, known
from fqt.dispatch import Problem, select
from fqt.recipe import Quantizer
from fqt_kernels import gemm, gemm_cublas, gemm_hopper, gradient, quantize

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

GPUS = {
    "sm80": dict(arch="sm80", processors=108), "sm89": dict(arch="sm89", processors=128),
    "sm90": dict(arch="sm90", processors=132), "sm100": dict(arch="sm100", processors=148),
    "gfx942": dict(arch="gfx942", processors=304),
}  # fmt: skip
SIZES = list(itertools.product((1, 40, 512, 4096, 8191), (1, 64, 4088, 14336), (1, 4096, 100_000, 200_704)))


def product(m, n, k, gpu="sm90", **change):
    here = dict(device="cuda", dtype="bfloat16", triton="3.7.1")
    return Problem("scaled_mm", m, n, k, **here | GPUS[gpu] | change)


def matrix(kind, m=144, n=80, op="quantize", **change):
    return Problem(op, m, n, device="cuda", dtype="float32", triton="3.7.1", kind=kind, **GPUS["sm90"] | change)


# ---- what they are


@pytest.mark.parametrize("force", ["auto", "triton"])
@pytest.mark.parametrize("format", ["int", "e4m3"])
@pytest.mark.parametrize("gpu", GPUS)
def test_they_are_few_different_known_and_valid(gpu, format, force):
    """The guess, which is what `select` chooses with an empty table, is the first: ties between measurements go to it."""
    for size in SIZES:
        p = product(*size, gpu, format=format, force=force)
        if gpu in ("sm80", "gfx942") and format == "e4m3":  # no float8 on the tensor cores
            if force == "auto":
                assert candidates(p) == () and heuristic(p) is None
            continue
        found, choice = candidates(p), select(p)
        assert 1 <= len(found) == len(set(found)) <= 16 and found[0] == heuristic(p)
        assert found[0] == (choice.kernel, choice.config, choice.split_k) and choice.source == "heuristic"
        assert all(c.kernel in KERNELS and known(p.op, format, c.kernel, c.config) for c in found)
        assert candidates(p) == found
        for kernel, config, split in found:
            if kernel == "portable":
                tiles = module.tiles(p, config)
                assert gemm.fits(config, p.n) or p.k > gemm.MAX_INT32_TERMS
                assert split == 1 or (tiles * split <= p.processors and p.k >= 8 * config[2] * split)
                assert split == 1 or (format == "int" and gpu != "gfx942" and p.k <= gemm.MAX_INT32_TERMS)
            else:
                against = gemm_cublas.reason_against if kernel == "cublas" else gemm_hopper.reason_against
                assert force == "auto" and format == "int" and split == 1 and against(gpu, *size) is None


@pytest.mark.parametrize("force", ["auto", "triton"])
@pytest.mark.parametrize("format", ["int", "e4m3"])
@pytest.mark.parametrize("gpu", GPUS)
def test_what_competes_is_allowed_and_of_the_rest_nothing_but_other_splits(gpu, format, force):
    """Of all that the code knows. A split that is allowed leaves no processor waiting, and no program without its blocks."""
    sizes = itertools.product((1, 17, 512, 4096), (15, 64, 4096), (100, 65536, 200_704), (False, True))
    for m, n, k, deterministic in sizes:
        p = product(m, n, k, gpu, format=format, force=force, deterministic=deterministic)
        competing = candidates(p)
        configs = (
            (kernel, config) for kernel, found in module._configs("scaled_mm", format).items() for config in found
        )
        everything = {Candidate(*each, split) for each in configs for split in (1, 2, 5, 16)} | set(competing)
        allowed = {candidate for candidate in everything if module.allows(p, candidate)}
        assert allowed >= set(competing)
        for kernel, config, split in allowed - set(competing):
            assert kernel == "portable" and force == "auto" and (split > 1 or len(competing) == module.MAX_CANDIDATES)
            if split == 1:
                continue
            assert format == "int" and not gpu.startswith("gfx") and k <= gemm.MAX_INT32_TERMS
            assert module.tiles(p, config) * split <= p.processors and -(-k // config[2]) >= 8 * split


def test_the_library_and_the_hopper_kernel_compete_where_they_can():
    def kernels(*size, **change):
        return {c.kernel for c in candidates(product(*size, **change))}

    asynchronous = {"hopper"} if gemm_hopper.reason_against("sm90", 128, 128, 128) is None else set()
    assert kernels(4096, 4096, 4096) == {"portable", "cublas"} | asynchronous
    assert kernels(4096, 4096, 4096, plain=False) == kernels(4096, 4096, 4096, gpu="sm80") == {"portable", "cublas"}
    assert kernels(16, 4096, 4096, gpu="sm80") == kernels(64, 4092, 64, gpu="sm80") == {"portable"}
    assert kernels(4096, 4096, 4096, format="e4m3") == kernels(4096, 4096, 4096, force="triton") == {"portable"}
    assert kernels(4096, 4096, 4096, force="hopper") == asynchronous or {"portable"}
    assert kernels(4096, 4096, 4096, force="hopper", plain=False) == {"portable"}


def test_sums_beyond_int32_have_one_configuration():
    assert candidates(product(64, 64, 131_072)) == (Candidate("portable", gemm.FLUSH_CONFIG["sm90"]),)
    assert len(candidates(product(64, 64, 131_071))) > 1


def test_few_tiles_compete_with_several_splits_and_many_with_none():
    """Around the guess, and none for a full grid."""
    found = candidates(product(512, 512, 16384))
    splits = {c.split_k for c in found if c.config == found[0].config}
    assert found[0].split_k == 8 and {1, 4, 8} <= splits and max(splits) <= 16
    assert all(c.split_k == 1 for c in candidates(product(8192, 8192, 8192)))


def test_where_only_the_reference_computes_there_is_nothing():
    p = functools.partial(product, 4096, 4096, 4096)
    for nothing in (
        p(force="reference"), p(triton=None), p(device="cpu"), p(dtype="float64"), p(arch="sm75"), p(arch="sm103"),
        p(arch="sm110"), matrix("per_row nearest both", arch="sm75"),
    ):  # fmt: skip
        assert candidates(nothing) == () and heuristic(nothing) is None
    assert candidates(p(arch="sm110", force="triton"))[0].kernel == "portable"


def test_determinism_leaves_float8_its_guess_and_int8_everything():
    """Float32 sums depend on the configuration, and a table may change between two runs; integer sums do not."""
    for size in SIZES:
        p = product(*size, format="e4m3", deterministic=True)
        assert candidates(p) == (heuristic(p),)
        assert candidates(product(*size, deterministic=True)) == candidates(product(*size))
    kinds = ("quantize", "per_row nearest both"), ("quantize_gradient", "per_row per_column")
    for (op, kind), format in itertools.product(kinds, ("int", "e4m3")):
        p = matrix(kind, op=op, format=format)
        assert candidates(Problem(**vars(p) | {"deterministic": True})) == candidates(p)


@pytest.mark.parametrize(
    "kind, m, n, kernels",
    [
        ("per_row nearest both", 8192, 1024, ["rows", "long_rows", "tile"]),
        ("per_row nearest rows", 8192, 4096, ["rows", "long_rows", "tile"]),
        ("per_row nearest both", 8191, 1024, ["long_rows", "tile"]),
        ("per_row nearest both", 8192, 4096, ["long_rows", "tile"]),
        ("per_row stochastic rows", 8192, 28672, ["long_rows", "tile"]),
        ("per_row nearest both stats", 8192, 1024, ["tile"]),
        ("per_row nearest both strided", 8192, 1024, ["tile"]),
        ("per_tensor nearest both", 8192, 1024, ["tile"]),
        ("per_column stochastic cols", 8192, 1024, ["tile"]),
        ("", 8192, 1024, ["tile"]),
    ],
)
def test_the_launcher_s_choice_and_the_kernels_that_take_more_compete(kind, m, n, kernels):
    found = candidates(matrix(kind, m, n))
    assert list(dict.fromkeys(c.kernel for c in found)) == kernels and found[0] == heuristic(matrix(kind, m, n))
    x = torch.empty(n, m, device="meta").t() if "strided" in kind else torch.empty(m, n, device="meta")
    words = kind.split()
    first = quantize.choose_kernel(x, words[0] if words else "", {"cols", "both"} & {*words} != set(), "stats" in words)
    config = {"rows": (), "long_rows": quantize.LONG_ROWS, "tile": quantize.tile_of(x)}[first]
    assert found[0] == (first, config, 1)


def test_tiles_that_were_not_compiled_do_not_compete():
    """More than the launchers' own only for extents of multiples of 16, on the GPUs that the compiler gate compiles for."""
    kinds = dict(kind="per_tensor nearest both"), dict(kind="per_row per_column", op="quantize_gradient")
    for more in kinds:
        assert len(candidates(matrix(**more))) == 1 + len(module.MORE_TILES)
        assert [c.config for c in candidates(matrix(m=145, **more))] == [quantize.ODD_TILE]
        assert [c.config for c in candidates(matrix(arch="gfx942", **more))] == [quantize.TILE]
    assert Candidate("long_rows", module.MORE_LONG_ROWS[0]) in candidates(matrix("per_row nearest both", 256, 28672))
    assert len(candidates(matrix("per_row nearest both", 256, 28671))) == 2


@pytest.mark.parametrize(
    "op, format, kernel, config, expected",
    [
        ("scaled_mm", "int", "cublas", (), True),
        ("scaled_mm", "e4m3", "cublas", (), False),
        ("scaled_mm", "int", "portable", (128, 256, 128, 8, 3), True),
        ("scaled_mm", "int", "portable", gemm.FLUSH_CONFIG["sm90"], True),
        ("scaled_mm", "e4m3", "portable", gemm.FLUSH_CONFIG["sm90"], False),
        ("scaled_mm", "int", "portable", (512, 256, 128, 8, 3), False),
        ("scaled_mm", "int", "hopper", gemm_hopper.CONFIGS[0], True),
        ("scaled_mm", "int", "tile", quantize.TILE, False),
        ("quantize", "e4m3", "tile", quantize.ODD_TILE, True),
        ("quantize", "int", "rows", (), True),
        ("quantize", "int", "long_rows", (64, 128, 8), False),
        ("quantize_gradient", "int", "tile", (128, 128, 8), True),
        ("quantize_gradient", "int", "rows", (), False),
        ("quantize", "int", "__import__", (), False),
        ("conv", "int", "implicit", (128, 128, 128, 8, 3), True),
        ("conv", "int", "im2col", (), True),
        ("conv", "int", "portable", (128, 128, 128, 8, 3), False),
        ("conv", "e4m3", "implicit", (128, 128, 128, 8, 3), False),
        ("conv_wgrad", "int", "im2col", (), False),
        ("quantize_images", "int", "tile", (16, 8, 16, 8), True),
        ("quantize_images", "int", "tile", (128, 128, 8), False),
        ("arrange_filters", "int", "torch", (), True),
    ],
)
def test_what_the_code_has_is_known(op, format, kernel, config, expected):
    assert known(op, format, kernel, config) is expected


def test_docstring_examples_hold():
    assert doctest.testmod(module).failed == 0


# ---- the same bits


@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_every_candidate_of_an_int8_product_gives_the_same_bits(gpu, device):
    """One sum, split or not, by whichever kernel that runs here: an affine product of little output and a long sum."""
    m, n, k = 40, 56, 3088
    a, b = pair(m, n, k, ("per_row", True, "per_row", True))
    expected = reference.scaled_mm(a, b)
    found = [c for c in candidates(product(m, n, k, gpu)) if c.kernel != "hopper"]
    assert {c.kernel for c in found} == {"portable", "cublas"} and len({c.split_k for c in found}) > 2
    a, b = (o._replace(**{name: t.to(device) for name, t in o._asdict().items()}) for o in (a, b))
    for kernel, config, split in found:
        launch = gemm_cublas.scaled_mm
        if kernel == "portable":
            launch = functools.partial(gemm.scaled_mm, config=config, split_k=split)
        got = launch(
            a.q, b.q, a.scale, b.scale, a_offset=a.offset, b_offset=b.offset, a_sum=a.sum, b_sum=b.sum
        )  # fmt: skip
        laws.assert_same(got, expected, f"{kernel} {config} split {split}")


@pytest.mark.parametrize("zero", ["symmetric", "min", "e4m3"])
@pytest.mark.parametrize(
    "kind, m, n, count",
    [
        ("per_row nearest both", 144, 80, 6),
        ("per_row stochastic both", 35, 45, 2),
        ("per_row stochastic rows", 33, 40, 3),
        ("per_row nearest cols strided", 32, 48, 3),
        ("per_tensor stochastic both", 80, 144, 3),
        ("per_column stochastic cols", 48, 32, 3),
        ("per_row nearest both stats", 32, 48, 3),
    ],
)
def test_every_candidate_of_a_quantization_is_the_reference(kind, m, n, count, zero, device):
    if "stats" in kind and zero == "min":
        zero = "symmetric"  # producers find absolute maxima
    granularity, rounding, layout, *more = kind.split()
    format = "e4m3" if zero == "e4m3" else "int"
    quantizer = Quantizer(8, granularity, "symmetric" if zero == "e4m3" else zero, rounding, format=format)
    x, rng = torch.randn(m, n) * torch.logspace(-3, 3, m)[:, None], torch.tensor([41, 7])
    layouts = dict(rows=layout != "cols", cols=layout != "rows", sums=zero == "min")
    want = reference.quantize(x, quantizer, rng=rng, **layouts)
    given = x.to(device)
    given = given.t().contiguous().t() if "strided" in more else given
    stats = given.abs().amax(1).view(torch.int32)[None, None] if "stats" in more else None
    found = candidates(matrix(kind, m, n, format=format))
    assert len(found) == count
    for kernel, config, _ in found:
        got = quantize.quantize(
            given, bits=8, granularity=granularity, zero=zero, rng=rng.to(device) if rounding == "stochastic" else None,
            kernel=kernel, tile=config or None, stats=stats, **layouts,
        )  # fmt: skip
        for name, value in zip(("q", "qt", "scale", "offset", "row_sum", "col_sum"), got, strict=True):
            expected = getattr(want, name)
            both = [t.view(torch.int8) if t is not None and format == "e4m3" and "q" in name else t
                    for t in (value, expected)]  # fmt: skip
            laws.assert_same(*both, f"{name} of {kernel} {config}")


@pytest.mark.parametrize("m, n", [(48, 80), (33, 45)])
def test_every_candidate_of_both_quantizations_of_a_gradient_gives_the_same_bits(m, n, device):
    dy, rng = torch.randn(m, n, device=device), torch.tensor([41, 7], device=device)
    sides = gradient.Side(8, "per_row", "min"), gradient.Side(8, "per_column", "symmetric")
    results = []
    for kernel, tile, _ in candidates(matrix("per_row per_column", m, n, op="quantize_gradient")):
        assert kernel == "tile"
        g, h, total = gradient.quantize_gradient(
            dy, *sides, row_mul=None, col_mul=None, rng=rng, streams=(0, 1), sums=True, bias=True, tile=tile
        )
        results.append([*g, *h, total])
    assert len(results) == (3 if m == 48 else 1)
    want = reference.quantize(dy.cpu(), Quantizer(8, "per_row", "min", "stochastic"), rng=rng.cpu(), sums=True)
    for result in results:
        laws.assert_same(result[0], want.q)
        for got, first in zip(result, results[0], strict=True):
            laws.assert_same(got, None if first is None else first.cpu())
