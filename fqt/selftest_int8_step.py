"""The checks of `fqt doctor` for the step of weights that are held in int8: its kernels against `fqt.optim.int8`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .int8_weight import Int8Weight
from .position import Position

Compared = dict[str, tuple[Tensor, Tensor, Tensor | float]]
SHAPES = {"odd": (19, 37), "aligned": (32, 144)}
GROUP = {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True, "maximize": False,
         "betas": (0.9, 0.99), "eps": 1e-8}  # fmt: skip
_WEIGHT = ("q", "qt", "scale", "rng", "momentum_buffer", "exp_avg", "exp_avg_sq")
_STATE = ("rng", "powers", "range", "threshold")
STEPS = 2  # the second one reads the state that the first one made


def checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(kernel, case, run) of every kernel of the step, see `fqt.selftest.Check`."""
    grid, both = Position("grid"), Position("grid+zero", bits=3, sparsity=0.5, per_channel=True, position="update")
    for shape in SHAPES:
        for rule, position, dtype in (
            ("sgd", Position(None), torch.float32),
            ("sgd", grid, torch.bfloat16),
            ("adamw", both, torch.float32),
        ):
            case = f"{rule}, target {position.target}, {dtype}, {shape}".replace("torch.", "")
            yield (
                "_int8_step_kernel",
                case,
                lambda s=shape, r=rule, p=position, d=dtype: _case(device, s, r, p, d, _WEIGHT),
            )
    yield "_int8_prepare_kernel", "grid+zero", lambda: _case(device, "odd", "adamw", both, torch.float32, _STATE)
    yield "_int8_extremes_kernel", "grid", lambda: _case(device, "odd", "sgd", grid, torch.float32, ("range",))


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Int8Weight:
    """Rows of very different sizes, one of zeros, one with a NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 1, shape[0])[:, None]
    x[3], x[5, 7] = 0.0, float("nan")
    return Int8Weight.of(x.to(dtype), torch.tensor([0x123456789ABCDEF, 4]))


def _case(device: torch.device, shape: str, rule: str, position: Position, dtype: torch.dtype,
          names: tuple[str, ...]) -> Compared:  # fmt: skip
    """A weight and its state after some steps."""
    want = _after(torch.device("cpu"), shape, rule, position, dtype, fused=False)
    got = _after(device, shape, rule, position, dtype, fused=True)
    return {name: (_comparable(got[name]), _comparable(want[name]), 0.0) for name in names if name in want}


def _after(device: torch.device, shape: str, rule: str, position: Position, dtype: torch.dtype,
           fused: bool) -> dict[str, Tensor]:  # fmt: skip
    from .optim.int8 import step_

    p, state, generator = weight(SHAPES[shape], dtype).to(device), {}, torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        g = torch.randn(p.shape, generator=generator).to(device, dtype)
        step_(p, g, state, position, GROUP, rule, fused=fused)
    return {"q": p.q, "qt": p.qt, "scale": p.scale, "rng": p.rng, **state}


def _comparable(t: Tensor) -> Tensor:
    """A NaN is as good as another."""
    return torch.where(t.isnan(), 1e38, t) if t.is_floating_point() else t
