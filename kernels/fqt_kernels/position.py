"""Device arithmetic of position-based scaling: what `fqt/position.py` defines, in float32 and in its order.

    s(w) = λ · (|w − x̄(w)| + ε)        x̄(w): the point of the target that w is drawn to

Nothing here loads or stores. Launchers pass `enable_fp_fusion=False`, so that each operation rounds once.
"""

import triton
import triton.language as tl

# The targets by number. POINTS: x̄ is given.
PLAIN, GRID, ZERO, GRID_ZERO, POINTS = 0, 1, 2, 3, 4
TARGETS = {None: PLAIN, "grid": GRID, "zero": ZERO, "grid+zero": GRID_ZERO, "points": POINTS}


@triton.jit
def nearest(t):
    """t rounded to an integer, ties to even, for |t| < 2²²; NaN stays."""
    return (t + 12582912.0) - 12582912.0  # 1.5 · 2²³ has 1 as its last place


@triton.jit
def position_scale(x, reach, threshold, kind, qmax, lam, largest, eps):
    """s of the weights x [BLOCK_M, BLOCK_N] for a target by name; `fqt.position.position_scale`.

    reach: the magnitude that the grid reaches to, a number or [BLOCK_M, 1]. Numbers: threshold, of GRID_ZERO; kind, GRID,
    ZERO or GRID_ZERO; qmax, 1 for ZERO; lam, negative for "auto"; largest, of "auto"; eps. All but kind float32.
    """
    nought = reach * 0.0
    exists = reach >= 7.888609052210118e-31  # 2⁻¹⁰⁰
    reach = tl.where(exists, reach, 1.0)
    spacing = tl.math.div_rn(reach, nought + qmax)
    t = tl.math.div_rn(x, spacing)
    t = tl.where(t > qmax, qmax, tl.where(t < -qmax, -qmax, t))
    near = (kind == 2) | ((kind == 3) & (tl.abs(x) <= threshold))
    distance = tl.abs(x - tl.where(near, 0.0, nearest(t) * spacing)) + eps
    far_scale = tl.math.div_rn(nought + 2.0 * largest, spacing)
    limit = tl.where(kind == 2, reach, nought + threshold)
    has_limit = limit >= 7.888609052210118e-31
    near_scale = tl.math.div_rn(nought + largest, tl.where(has_limit, limit, 1.0))
    auto = distance * tl.where(near, tl.where(has_limit, near_scale, far_scale), far_scale)
    auto = tl.where(auto > largest, largest, auto)
    return tl.where(exists, tl.where(lam < 0.0, auto, distance * lam), 1.0)


@triton.jit
def points_scale(x, points, lam, eps):
    """s of the weights x for given x̄; 1 where lam is 0. `fqt.position.scale_to_points`."""
    s = (tl.abs(x - points) + eps) * lam
    return tl.where(lam == 0.0, 1.0, s)


@triton.jit
def absmax(low, high):
    """The magnitude that the grid reaches to, of a range."""
    return tl.maximum(-low, high)


@triton.jit
def advanced_range(running, newest, replace):
    """An end of the range that a step uses: 0.1·newest + 0.9·running, or where replace the newest alone."""
    return tl.where(replace, newest, newest * 0.1 + running * 0.9)


@triton.jit
def advanced_threshold(threshold, small, n, sparsity, reach):
    """The threshold that a step uses; small of n weights are at most the last one's, reach is of the whole tensor."""
    share = tl.math.div_rn(small.to(tl.float32), n.to(tl.float32))
    return threshold + ((sparsity - share) * 0.1) * tl.maximum(threshold, reach * 0.00390625)
