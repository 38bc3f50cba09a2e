"""AdamW with position-based scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from . import foreach, options
from .base import PositionOptimizer


class PSGDAdamW(PositionOptimizer):
    """AdamW with the position-based scale of `PSGD`, of the gradient or of the update.

    With position="grad" (the published code) the scaled gradient enters both moments: the step is then, up to eps,
    independent of the magnitude of `scale`. With "update" the moments are AdamW's own, and the update, without the weight
    decay, is multiplied by s: the step is proportional to `scale`.

    Args:
        params, lr, maximize, target, bits, sparsity, scale, delta, per_channel, position, fused: as of `PSGD`.
        betas, eps, weight_decay: as of `torch.optim.AdamW`; weight decay is decoupled and not scaled.
        position_eps: ε of the scale.

    Steps, GradScaler and errors are as of `PSGD`. State: "step", "exp_avg", "exp_avg_sq" as of AdamW, and "powers", (2,)
    float64, β₁ᵗ and β₂ᵗ, which the steps go by ("step" is for the reader).

    Source: arXiv 2005.11035, appendix D; its published code.
    """

    rule = "adamw"
    moment = "exp_avg"
    names: Mapping[str, str] = {"eps": "position_eps"}
    own_options = ("betas", "eps", "weight_decay", "maximize",
                   *(f"position_{field}" if field == "eps" else field for field in options.FIELDS))  # fmt: skip
    check = options.adamw
    batch_step = foreach.adamw_step

    def __init__(self, params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, maximize: bool = False,
                 target: str | Callable[[Tensor], Tensor | None] | None = "grid", bits: int = 4, sparsity: float = 0.9,
                 scale: float | str = "auto", position_eps: float = 0.0, delta: str = "ema", per_channel: bool = False,
                 position: str = "grad", fused: bool | None = None) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, target=target, bits=bits,
            sparsity=sparsity, scale=scale, position_eps=position_eps, delta=delta, per_channel=per_channel,
            position=position,
        )  # fmt: skip
        super().__init__(params, defaults, fused)
