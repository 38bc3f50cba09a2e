"""The step of a weight that is held in int8 (`fqt.int8_weight`): new codes by stochastic rounding, without a float copy.

    w = q · scale,   w' = the step of `loop` from w,   q' = floor(w' / scale' + r / 2¹⁶),   r of 16 random bits

so that E[q' · scale'] = w' (to within 2⁻¹⁷ · scale'; what moves a weight by less than that is lost). The random bits are a
function of (seed, layer, number of updates, element): `Int8Weight.rng`.

A row keeps its scale as long as its largest |w'| lies from 63 to 127 scales. An element that a step does not move then keeps
its code, whatever the bits, and one that is moved by u has the variance p (1 - p) scale² with p = frac(u / scale). Else the
scale becomes the largest |w'| · 1.125 / 127, which leaves an eighth of headroom; a row of zeros keeps its scale.
A NaN or an infinity in w' makes the scale of its row, and so the row, non-finite, and leaves the other rows alone.

What stochastic rounding costs: on a quadratic of curvature μ, steps of learning rate η, the variance of a weight has a part

    E[p (1 - p)] scale² / (2ημ - η²μ²)   →   E|gradient| · scale / (2μ)   as η → 0

that a falling learning rate does not remove; it is proportional to the scale. (Rounding to nearest instead stops where
|u| < scale / 2.) Measured with μ = 1, scale 0.05 and gradient noise of variance 1 (`fqt_bench.int8_weight_study`):
0.0102 at η = 0.02 (the formula: 0.0103) and 0.0191 at η = 0.002 (0.0191, its limit 0.0202), beside the 0.0101 and 0.0010
that float32 weights have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..capture import is_capturing, refuse
from ..dispatch import choose
from ..int8_weight import Int8Weight
from ..position import Position, first_threshold
from ..products import device_guard
from ..reference import SCALE_MIN, random_bits, round_codes
from . import loop

UPDATE = 2  # the stream of random bits; `fqt.gradients` has 0 and 1
LOWEST, HIGHEST = 63, 127  # integers: rounding stochastically never takes the largest code across them
HEADROOM = 1.125
_HYPER = {"sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
          "adamw": ("lr", "betas", "eps", "weight_decay")}  # fmt: skip
_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def row_scales(scale: Tensor, new: Tensor) -> Tensor:
    """The scales (N, 1) of rows that become new (N, K) float32."""
    largest = new.abs().amax(1, keepdim=True)  # NaN and infinity stay
    kept = (largest >= scale * LOWEST) & (largest <= scale * HIGHEST)
    wider = largest / torch.full_like(largest, HIGHEST) * HEADROOM
    wider = torch.where(wider < SCALE_MIN, torch.full_like(wider, SCALE_MIN), wider)
    return torch.where(kept | (largest == 0), scale, wider)


def rounded(new: Tensor, scale: Tensor, rng: Tensor) -> Tensor:
    """The codes (N, K) int8 of new (N, K) float32 under scales (N, 1), rounded stochastically with rng's random bits."""
    y = (new / scale).nan_to_num(0.0)  # NaN has no code; the scale carries it
    codes = round_codes(y, "stochastic", random_bits(rng, *new.shape, stream=UPDATE))
    return codes.clamp(-HIGHEST, HIGHEST).to(torch.int8)


def stepped(p: Int8Weight, g: Tensor, state: dict, position: Position, group: dict, rule: str,
            grad_scale: Tensor | None = None) -> Tensor:  # fmt: skip
    """w' (N, K) float32 of a step, which makes and advances the optimizer state; p stays. Arguments as of `step_`."""
    w = p.dequantize(torch.float32)
    s = loop.scale_of(p if callable(position.target) else w, position, state)
    g = loop.gradient(g, w, group["maximize"], grad_scale)
    step = loop.sgd_step if rule == "sgd" else loop.adamw_step
    new = step(w, g, state, s, position=position.position, **{name: group[name] for name in _HYPER[rule]})
    state |= {name: state[name].to(p.dtype) for name in _MOMENTS if name in state}
    return new


def write_(p: Int8Weight, q: Tensor, scale: Tensor) -> None:
    """Give p new codes (N, K) and scales (N, 1), and advance its random stream."""
    for held, value in ((p.q, q), (p.qt, q.t()), (p.scale, scale)):
        held.copy_(value)
    p.rng[1:].add_(1)
    torch.autograd.graph.increment_version(p)


@torch.no_grad()
def step_(p: Int8Weight, g: Tensor, state: dict, position: Position, group: dict, rule: str,
          grad_scale: Tensor | None = None, *, found_inf: Tensor | None = None,
          fused: bool | None = None) -> None:  # fmt: skip
    """Update p in place by one step, advance its random stream, and make and advance its optimizer state.

    Args:
        g: (N, K), the gradient as autograd left it, of p's dtype.
        state: of p, as `loop` keeps it; the moments are of p's dtype.
        position: the options of position-based scaling.   group: the hyperparameters of `loop.sgd_step` or
            `loop.adamw_step` and "maximize", by their names.   rule: "sgd" or "adamw".
        grad_scale: GradScaler's scale, that g is divided by.   found_inf: where it is not 0, nothing is done; it is read
            back only where the state is made, and without a kernel.
        fused: whether the kernel computes the step; None: where dispatch chooses Triton for the device.
    """
    if not p.numel():
        return
    if fused is None:
        fused = choose("psgd", p.device, *p.shape, dtype=p.dtype).backend == "triton"
    made = _is_made(state, position, group, rule)
    if is_capturing(p.device) and not made:
        refuse(f"weights of shape {tuple(p.shape)} have no state yet")
    if found_inf is not None and not (fused and made):
        if is_capturing(p.device):
            raise ValueError(
                f"a step of {tuple(p.shape)} weights with a GradScaler cannot be captured in a CUDA graph without the kernel"
            )
        if found_inf.item():
            return
        found_inf = None
    if fused:
        _launch(p, g, state, position, group, rule, grad_scale, found_inf)
        return
    new = stepped(p, g, state, position, group, rule, grad_scale)
    scale = row_scales(p.scale, new)
    write_(p, rounded(new, scale, p.rng), scale)


def _is_made(state: dict, position: Position, group: dict, rule: str) -> bool:
    """Whether the state has all that a step advances."""
    needed = ["exp_avg"] if rule == "adamw" else ["momentum_buffer"] * bool(group["momentum"])
    needed += ["range"] * position.has_range + ["threshold"] * (position.target == "grid+zero")
    return all(state.get(name) is not None for name in needed)


def _launch(p: Int8Weight, g: Tensor, state: dict, position: Position, group: dict, rule: str,
            grad_scale: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
    """`step_` by the kernel. For a target that is a function, the scale of the gradient is computed by torch."""
    from fqt_kernels.int8_step import int8_step

    adamw = rule == "adamw"
    s = loop.scale_of(p, position, state) if callable(position.target) else None
    first = "exp_avg" if adamw else "momentum_buffer" if group["momentum"] else None
    new = first is not None and state.get(first) is None
    if new:
        state |= {
            name: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for name in (first, *["exp_avg_sq"] * adamw)
        }
        state |= {"powers": torch.ones(2, dtype=torch.float64, device=p.device)} if adamw else {}
    ranges = position.has_range
    fresh = ranges and state.get("range") is None
    if fresh:
        state["range"] = p.scale.new_zeros(p.shape[0] if position.per_channel else 1, 2)
    zeros = position.target == "grid+zero"
    fresh_threshold = zeros and state.get("threshold") is None
    if fresh_threshold:
        state["threshold"] = first_threshold(p.dequantize(torch.float32), position.sparsity)
    with device_guard(p.q):
        int8_step(
            p.q, p.qt, p.scale, p.rng, g, _hyper(position, group, rule, s is not None),
            first=state[first] if first else None, second=state["exp_avg_sq"] if adamw else None,
            powers=state["powers"] if adamw else None, range=state["range"] if ranges else None,
            threshold=state["threshold"] if zeros else None, s=s, fresh=fresh, fresh_threshold=fresh_threshold, new=new,
            found_inf=found_inf, grad_scale=grad_scale,
        )  # fmt: skip
    torch.autograd.graph.increment_version((p, p.q, p.qt, p.scale, p.rng))


def _hyper(position: Position, group: dict, rule: str, points: bool):
    """A group's hyperparameters as the kernel takes them. points: there is a scale of a target that is a function."""
    from .fused import hyper_of

    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" else lr.to(torch.float32)
    target = "points" if points else position.target if position.has_range else None
    return hyper_of(position, group, lr if isinstance(lr, Tensor) else float(lr), rule)._replace(target=target)
