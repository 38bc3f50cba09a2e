"""Position-based Scaled Gradient Descent (not Preconditioned SGD)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import foreach, options
from .base import PositionOptimizer


class PSGD(PositionOptimizer):
    """Position-based Scaled Gradient Descent, not Preconditioned SGD: SGD whose gradient is scaled, weight by weight, with
    the weight's distance to the nearest point of a target set.

        s = λ · (|w − x̄(w)| + ε)          g ← s · g   before weight decay and momentum, as in `torch.optim.SGD`

    Weights drift onto the targets during ordinary training, while the full-precision accuracy stays; afterwards rounding
    them there costs little (`fqt.round_weights_`, `fqt.prune_`). Formulas: `fqt.position` and `fqt.optim.loop`.

    Args:
        params: parameters, (name, parameter) pairs or groups, which may differ in all options; float32, bfloat16, float16
            or float64.
        lr: a number, or a 0-d tensor on the CPU or on the parameters' device (there it is not checked).
        momentum, dampening, weight_decay, nesterov, maximize: as of `torch.optim.SGD`. Weight decay is not scaled.
        target: "grid", the symmetric uniform grid of `bits` bits between the weights' extremes; "zero"; "grid+zero", zero
            the share `sparsity` of the smallest weights, the grid for the others; a function that is given the parameter
            and returns x̄ or None (see `fqt.targets`); None, plain SGD (norms, biases: `fqt.optim.param_groups`).
        scale: λ, or "auto", so that s has a mean near 1 and an upper limit (`fqt.position.LARGEST`).
        eps: ε.   delta: "ema", a running range as in the published code, or "absmax", of the weights before each step.
        per_channel: a grid for each index of the first dimension.
        position: "grad", or "update": s scales the whole update, weight decay and momentum included.
        fused: None, one kernel for all parameters where `fqt.dispatch` chooses Triton for their device, else torch's
            multi-tensor operations, which give the same bits; True demands the kernel; False forgoes it. A choice of this
            process: no checkpoint holds it.

    A step: the closure, if given; then the range of each parameter that has a gradient advances from its weights as they
    are, and the weights are updated. A step that `torch.amp.GradScaler` skips advances nothing. Gradients are only read:
    unlike torch's fused optimizers, this one leaves them scaled. Steps cannot be differentiated.

    The kernel learns the range of the weights that it writes. Other writes are noticed by autograd's versions; those that
    autograd does not see (`.data`, torch's fused optimizers, between replays of a CUDA graph) reach the range a step later.

    Synchronization with the host: none with the kernel, except that with a GradScaler the steps that make new state, or
    follow a change of options, look at found_inf; the multi-tensor operations look at it in every such step. In a CUDA
    graph steps can be captured after a first one outside, with a GradScaler those of the kernel; lr has to be a tensor
    there to be changed, and no layer's codes are written.

    Raises:
        TypeError, ValueError: an option is out of range; a parameter or (in `step`) a gradient cannot be used.
        RuntimeError (step): fused=True, and there is no kernel for a parameter.

    Source: arXiv 2005.11035, section 3; its published code for the order and the running range.
    """

    rule = "sgd"
    moment = "momentum_buffer"
    own_options = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", *options.FIELDS)
    check = options.sgd
    batch_step = foreach.sgd_step

    def __init__(self, params, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False,
                 target: str | Callable[[Tensor], Tensor | None] | None = "grid", bits: int = 4, sparsity: float = 0.9,
                 scale: float | str = "auto", eps: float = 0.0, delta: str = "ema", per_channel: bool = False,
                 position: str = "grad", fused: bool | None = None) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
            target=target, bits=bits, sparsity=sparsity, scale=scale, eps=eps, delta=delta, per_channel=per_channel,
            position=position,
        )  # fmt: skip
        super().__init__(params, defaults, fused)
