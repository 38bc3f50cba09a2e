"""Laws of position-based scaling: `fqt.position`, the definition."""

import itertools
import math

import pytest
import torch
from laws import EPS

from fqt.position import (
    LARGEST,
    Position,
    absmax,
    advanced_range,
    advanced_threshold,
    count_of_zeros,
    extremes,
    first_threshold,
    position_scale,
    scale_to_points,
    targets,
)

GRID = Position()


def spread(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def warp(x: torch.Tensor, points: torch.Tensor, spacing: float, scale: float, eps: float) -> torch.Tensor:
    """f of equation (5), made continuous across the cells' borders: a cell is as wide as any other, f of it too."""
    lam = math.sqrt(scale) / 2  # λ_s = 4 λ²
    half = (math.sqrt(spacing / 2 + eps) - math.sqrt(eps)) / lam
    inside = torch.sign(x - points) * (torch.sqrt((x - points).abs() + eps) - math.sqrt(eps)) / lam
    return inside + 2 * half * (points / spacing)


# ---- the scale is that of the paper


@pytest.mark.parametrize("target", ["grid", "zero"])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_scale_times_the_square_of_the_warps_derivative_is_one(target, eps):
    p = Position(target, bits=3, scale=7.0, eps=eps)
    x = spread(400, dtype=torch.float64)
    points = targets(x, p, extremes(x))
    spacing = float(absmax(extremes(x))) / 3
    away = (x - points).abs() > 1e-3  # on its point itself f has no derivative where ε = 0
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(warp(x, points, spacing, 7.0, eps).sum(), x)
    s = position_scale(x, p, extremes(x))
    # float64: ten roundings, and |x - x̄| loses at most 3 digits of 16 to cancellation.
    torch.testing.assert_close(
        (s * slope**2)[away], torch.ones(int(away.sum()), dtype=torch.float64), rtol=1e-11, atol=0
    )


def test_the_warp_has_no_jump_between_cells():
    p = Position(bits=3, scale=7.0)
    range = torch.tensor([[-3.0, 3.0]], dtype=torch.float64)
    border = torch.arange(-2.5, 3.0, dtype=torch.float64)
    left, right = (warp(x, targets(x, p, range), 1.0, 7.0, 0.0) for x in (border - 1e-13, border + 1e-13))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lr", [1e-3, 1e-4, 1e-5])
def test_a_scaled_step_is_a_plain_step_in_the_warped_space_to_first_order(lr):
    """F(x) moves by h = ηg/f', and F⁻¹(y) is quadratic in y: with λ = 1 the step differs from ηsg by h² = η²g²s exactly, as
    long as it does not cross x̄. Over the step that is η|g|, at most some 3.2 η of thousands of N(0, 1) gradients."""
    x, g = spread(4000, dtype=torch.float64), spread(4000, seed=1, dtype=torch.float64)
    spacing = 0.1
    p = Position(bits=8, scale=4.0)  # λ = 1
    range = torch.tensor([[-12.7, 12.7]], dtype=torch.float64)
    points = targets(x, p, range)
    torch.testing.assert_close(points, torch.round(x / spacing) * spacing, rtol=0, atol=1e-14)
    kept = (x - points).abs() > 0.01
    x, g, points = x[kept], g[kept], points[kept]
    s = position_scale(x, p, range)
    slope = s.rsqrt()
    root = torch.sign(x - points) * (x - points).abs().sqrt() - lr * g / slope  # y − c(x̄), with λ = 1
    back = points + torch.sign(root) * root**2
    assert torch.equal(torch.sign(root), torch.sign(x - points))
    error = (back - (x - lr * s * g)).abs()
    # float64: a few roundings of numbers up to 4.
    torch.testing.assert_close(error, lr**2 * g**2 * s, rtol=1e-12, atol=16 * 2.0**-53)
    assert 2.5 * lr < float((error / (lr * s * g).abs()).max()) < 4.5 * lr


def test_targets_are_the_nearest_points_of_the_grid():
    for bits in range(2, 9):
        p, x = Position(bits=bits), spread(50, 40, seed=bits)
        q = 2 ** (bits - 1) - 1
        spacing = x.abs().max().double() / q
        grid = torch.arange(-q, q + 1, dtype=torch.float64) * spacing
        nearest = (x.double()[..., None] - grid).abs().amin(-1)
        distance = (x.double() - targets(x, p, extremes(x)).double()).abs()
        # Δ, x/Δ and Δ·k are each rounded once: 3 half ulps of the largest point, twice where a border is crossed.
        assert float((distance - nearest).abs().max()) <= 6 * EPS * float(x.abs().max())


def test_weights_beyond_the_range_go_to_its_end():
    range = torch.tensor([[-0.5, 0.7]])
    x = torch.tensor([5.0, -5.0, 0.69])
    torch.testing.assert_close(targets(x, GRID, range), torch.tensor([0.7, -0.7, 0.7]), rtol=2 * EPS, atol=0)
    assert float(position_scale(x, GRID, range).max()) == LARGEST["grid"]  # 86 Δ away, and no more than halfway
    free = position_scale(x, Position(scale=10.0), range)
    torch.testing.assert_close(free[:2], torch.full((2,), 43.0), rtol=8 * EPS, atol=0)


# ---- scale "auto"


@pytest.mark.parametrize("target", ["grid", "zero", "grid+zero"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_auto_does_not_depend_on_the_size_of_the_weights(target, per_channel):
    p, x = Position(target, per_channel=per_channel), spread(30, 40)
    found = []
    for factor in (1.0, 2.0**-20, 2.0**20):
        y = x * factor
        found.append(position_scale(y, p, extremes(y, per_channel), first_threshold(y, p.sparsity)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert float(found[0].max()) <= p.largest == LARGEST[target]


def test_the_largest_scales_of_auto():
    """2 midway between two points of the grid, 4 of the largest weight that is drawn to zero, 2 at the threshold."""
    x = torch.tensor([-7.0, 0.5, 3.5, -1.5, 7.0])
    s = position_scale(x, GRID, extremes(x))
    torch.testing.assert_close(s, torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0]), rtol=8 * EPS, atol=8 * EPS)
    s = position_scale(x, Position("zero"), extremes(x))
    torch.testing.assert_close(s, x.abs() * (4 / 7), rtol=4 * EPS, atol=0)
    s = position_scale(x, Position("grid+zero"), extremes(x), torch.tensor([1.5]))
    torch.testing.assert_close(s, torch.tensor([0.0, 2 / 3, 2.0, 2.0, 0.0]), rtol=8 * EPS, atol=8 * EPS)


def test_auto_is_one_in_the_mean_where_weights_lie_evenly():
    for p in (GRID, Position("grid+zero", sparsity=0.5), Position(bits=8)):
        x = torch.linspace(-1, 1, 100_001)
        s = position_scale(x, p, extremes(x), first_threshold(x, p.sparsity))
        assert (
            abs(float(s.mean()) - 1) < 2e-3
        )  # cells at the ends are halves, and the middle one of "grid+zero" is not whole


@pytest.mark.parametrize("target", ["grid", "zero", "grid+zero"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_the_scale_has_the_weights_shape(target, shape):
    x = spread(*shape)
    for per_channel in (False, True):
        p = Position(target, per_channel=per_channel)
        s = position_scale(x, p, extremes(x, per_channel), first_threshold(x, p.sparsity))
        assert s.shape == shape and s.dtype == torch.float32


def test_eps_moves_a_weight_off_its_point():
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert position_scale(x, GRID, extremes(x)).tolist() == [0, 0, 0]
    s = position_scale(x, Position(scale=3.0, eps=0.5), extremes(x))
    torch.testing.assert_close(s, torch.full((3,), 1.5), rtol=2 * EPS, atol=0)


def test_without_a_range_steps_are_plain():
    """Weights that are all zero have no grid: an initialization with zeros must not stay for ever."""
    x = torch.zeros(4, 5)
    x[0, 0], x[1] = 2.0**-110, torch.randn(5)
    for target in ("grid", "zero", "grid+zero"):
        for scale in ("auto", 5.0):
            p = Position(target, scale=scale, per_channel=True)
            s = position_scale(x, p, extremes(x, True), first_threshold(x, 0.5))
            assert torch.equal(s[[0, 2, 3]], torch.ones(3, 5)), (target, scale)
            assert not torch.equal(s[1], torch.ones(5))
    assert torch.equal(targets(x, Position("grid", per_channel=True), extremes(x, True))[0], x[0])


def test_scale_to_points():
    x, points = torch.tensor([0.0, 1.0, 5.0, math.nan]), torch.tensor([0.0, 0.5, 3.0, 0.0])
    p = Position(lambda w: w)
    assert scale_to_points(x, p, points)[:3].tolist() == [0.0, 0.5, 2.0]
    assert scale_to_points(x, Position(lambda w: w, scale=3.0, eps=0.5), points)[:3].tolist() == [1.5, 3.0, 7.5]
    assert scale_to_points(x[:3], p, x[:3]).tolist() == [1, 1, 1]
    x[1] = math.inf  # takes no part in the largest distance
    assert scale_to_points(x / 4, p, points / 4)[[0, 2]].tolist() == [0.0, 2.0]
    assert scale_to_points(torch.empty(0), p, torch.empty(0)).shape == (0,)


# ---- the range


def test_the_first_range_is_exact_and_the_next_a_running_average():
    a, b = torch.tensor([-2.0, 1.0]), torch.tensor([3.0, 0.5])
    first = advanced_range(GRID, None, extremes(a))
    assert first.tolist() == [[-2.0, 1.0]]
    # Zero counts as a weight, as in the published code: the minimum of b is 0.
    torch.testing.assert_close(
        advanced_range(GRID, first, extremes(b)), torch.tensor([[-1.8, 1.2]]), rtol=3 * EPS, atol=0
    )
    assert advanced_range(Position(delta="absmax"), first, extremes(b)).tolist() == [[0.0, 3.0]]


def test_weights_that_are_not_finite_do_not_move_the_others():
    x = spread(6, 7)
    y = x.clone()
    y[2, 3], y[4, 4], y[5, 1] = math.nan, math.inf, -math.inf
    touched = ~y.isfinite()
    x[touched] = 0.0
    for per_channel in (False, True):
        p = Position("grid+zero", sparsity=0.5, per_channel=per_channel)
        threshold = torch.tensor([0.5])
        s, t = (position_scale(w, p, extremes(w, per_channel), threshold) for w in (x, y))
        assert torch.equal(s[~touched], t[~touched])
        assert not t[2, 3].isfinite()
        assert torch.equal(extremes(x, per_channel), extremes(y, per_channel))


def test_extremes_of_each_channel():
    x = spread(5, 3, 2, 2)
    want = torch.stack([x.flatten(1).amin(1).clamp(max=0), x.flatten(1).amax(1).clamp(min=0)], 1)
    assert torch.equal(extremes(x, True), want)
    assert extremes(torch.empty(0, 3), True).shape == (0, 2)
    assert extremes(torch.empty(0)).tolist() == [[0, 0]] and extremes(torch.tensor(-3.0), True).tolist() == [[-3, 0]]


# ---- the threshold of "grid+zero"


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_the_first_threshold_covers_the_share_of_weights(sparsity):
    x = spread(40, 25)
    assert int((x.abs() <= first_threshold(x, sparsity)).sum()) == round(1000 * sparsity)


def test_counts_of_zeros():
    assert (count_of_zeros(0.29, 100), count_of_zeros(0.9, 10), count_of_zeros(1.0, 7)) == (29, 9, 7)  # 0.29 · 100 < 29
    x = torch.tensor([1.0, -1.0, 2.0, math.nan, math.inf])  # what is not finite is never among the smallest
    assert float(first_threshold(x, 0.4)) == 1.0 and float(first_threshold(x, 0.6)) == 2.0
    # Of magnitude t itself counts as small: two of four, so that t stays.
    y, t = torch.tensor([0.5, -1.0, 2.0, 3.0]), torch.ones(1)
    assert torch.equal(advanced_threshold(Position("grid+zero", sparsity=0.5), t, y, extremes(y)), t)


def test_the_step_of_the_threshold_is_that_of_the_largest_channel():
    x = torch.tensor([[0.1, 0.2], [256.0, 256.0]])
    t = advanced_threshold(Position("grid+zero", sparsity=1.0, per_channel=True), torch.zeros(1), x, extremes(x, True))
    assert float(t) == pytest.approx(0.1, rel=4 * EPS)


def test_without_a_threshold_all_weights_have_the_grids_scale():
    p, x = Position("grid+zero", eps=0.01, sparsity=0.0), torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(
        position_scale(x, p, extremes(x), torch.zeros(1)), position_scale(x, Position(eps=0.01), extremes(x))
    )


def test_the_threshold_follows_the_quantile():
    """The step is 0.1 · (missing share) · t: a quantile that moved by a factor of 4 is reached within some hundred steps."""
    p, x = Position("grid+zero", sparsity=0.8), spread(5000)
    t = first_threshold(x, 0.8)
    for factor in (4.0, 0.25):
        y = x * factor
        for _ in range(400):
            t = advanced_threshold(p, t, y, extremes(y))
        assert abs(float((y.abs() <= t).float().mean()) - 0.8) < 0.01
    t = advanced_threshold(p, torch.zeros(1), x, extremes(x))  # nor does it stay at zero
    assert float(t) == pytest.approx(0.1 * 0.8 * float(x.abs().max()) / 256, rel=8 * EPS)


def test_small_weights_are_drawn_to_zero_and_large_ones_to_the_grid():
    p, x = Position("grid+zero", sparsity=0.7, bits=5), spread(1000)
    t = first_threshold(x, 0.7)
    points = targets(x, p, extremes(x), t)
    small = x.abs() <= t
    assert int(small.sum()) == 700 and not points[small].any()
    assert torch.equal(points[~small], targets(x, Position(bits=5), extremes(x))[~small])


# ---- what it is for


def test_noise_alone_drives_scaled_weights_onto_the_grid_and_leaves_plain_ones():
    """Targets absorb multiplicative noise: the mean square distance in units of Δ² falls from 1/12, plain SGD's stays."""
    generator = torch.Generator().manual_seed(5)
    start = torch.rand(4000, generator=generator) * 2 - 1
    range = torch.tensor([[-1.0, 1.0]])
    errors = []
    for p in (GRID, None):
        w = start.clone()
        for _ in itertools.repeat(None, 300):
            s = 1.0 if p is None else position_scale(w, p, range)
            w = (w - 0.02 * s * torch.randn(4000, generator=generator)).clamp(-1, 1)
        errors.append(float(((w - targets(w, GRID, range)) * 7).square().mean()))
    assert errors[0] < 0.02 / 12 * 10 and abs(errors[1] * 12 - 1) < 0.1


# ---- options


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"target": "gird"}, ValueError, "target"),
        ({"target": 3}, ValueError, "target"),
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": 9}, ValueError, "bits"),
        ({"bits": True}, ValueError, "bits"),
        ({"bits": 4.0}, ValueError, "bits"),
        ({"sparsity": 1.1}, ValueError, "sparsity"),
        ({"sparsity": math.nan}, ValueError, "sparsity"),
        ({"scale": 0}, ValueError, "scale"),
        ({"scale": math.inf}, ValueError, "scale"),
        ({"scale": "Auto"}, ValueError, "scale"),
        ({"eps": -1e-3}, ValueError, "eps"),
        ({"eps": "0"}, ValueError, "eps"),
        ({"delta": "max"}, ValueError, "delta"),
        ({"per_channel": 1}, TypeError, "per_channel"),
        ({"position": "weight"}, ValueError, "position"),
        ({"target": torch.round, "per_channel": True}, ValueError, "per_channel"),
    ],
)
def test_options_out_of_range_are_refused(options, error, name):
    with pytest.raises(error, match=name):
        Position(**options)
