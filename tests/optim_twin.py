"""The plain loop beside an optimizer: `fqt.optim.loop` on copies of its parameters, one tensor at a time."""

from __future__ import annotations

import torch
from laws import assert_same
from torch import Tensor

from fqt.optim import PSGDAdamW, loop
from fqt.position import Position

SHAPES = [(5, 7), (3,), (), (1,), (4, 2, 3, 3), (0, 3), (1, 6), (9, 9)]


def tensors(shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(shapes=SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(w) for w in tensors(shapes, seed, dtype)]


def give_gradients(optimizer: torch.optim.Optimizer, seed: int, without: tuple[int, ...] = ()) -> None:
    """Random gradients to all parameters but those of these numbers."""
    ws = [w for group in optimizer.param_groups for w in group["params"]]
    for i, (w, g) in enumerate(zip(ws, tensors([w.shape for w in ws], seed), strict=True)):
        w.grad = None if i in without else g.to(w.device, w.dtype)


class Twin:
    """Copies of an optimizer's parameters and state on the CPU, stepped by the plain loop with the same gradients and
    options."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: dict[Tensor, tuple[Tensor, dict]] = {}
        self._adopt()

    def _adopt(self) -> None:
        for group in self.optimizer.param_groups:
            for w in group["params"]:
                self.copies.setdefault(w, (w.detach().to("cpu", copy=True), {}))

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        self._adopt()
        for group in self.optimizer.param_groups:
            adamw = isinstance(self.optimizer, PSGDAdamW)
            names = ("betas", "eps", "weight_decay") if adamw else ("momentum", "dampening", "weight_decay", "nesterov")
            fields = ("target", "bits", "sparsity", "scale", "delta", "per_channel", "position")
            p = Position(**{f: group[f] for f in fields}, eps=group["position_eps" if adamw else "eps"])
            for w in group["params"]:
                if w.grad is None:
                    continue
                x, state = self.copies[w]
                s = loop.scale_of(x, p, state)
                g = loop.gradient(w.grad.cpu(), x, group["maximize"], grad_scale)
                rule = loop.adamw_step if adamw else loop.sgd_step
                own = {name: group[name] for name in names}
                x.copy_(rule(x, g, state, s, lr=group["lr"], position=p.position, **own))

    def check(self) -> None:
        """Weights and state are the optimizer's, to the last bit."""
        for i, (w, (x, state)) in enumerate(self.copies.items()):
            assert_same(w, x, f"weights {i}")
            for name, value in state.items():
                if w.numel():
                    assert_same(self.optimizer.state[w][name], value, f"{name} of {i}")
