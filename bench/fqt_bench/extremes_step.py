"""Extreme extents of the optimizers' steps: a parameter of more than 2³¹ elements, in pieces or with codes of its rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fqt import reference
from fqt.optim import int8, loop
from fqt.position import Position, advanced_range, position_scale
from fqt.recipe import Quantizer

from .extremes_check import Case, bits_at, codes_of, normal, parts, pieces, rng_of, same

OPTIONS = dict(lr=0.05, momentum=0.9, dampening=0.25, weight_decay=0.01, nesterov=True)


def cases(tiny: bool) -> Iterator[Case]:
    """On a GPU extents beyond 2³¹; tiny: the same launches of a few elements."""
    size = 16_401 if tiny else 2**31 + 4104
    for dtype in (torch.bfloat16, torch.float32):
        gib = size * 5 * dtype.itemsize / 2**30 + 3  # weights and momentum, before and after, and the gradient
        name = f"{size} {str(dtype).removeprefix('torch.')} in a row"
        yield Case("_psgd_kernel", name, gib, functools.partial(_step, (size,), dtype, False))
    m, n = (48, 144) if tiny else (2**20 + 16, 2112)
    for rows in (m, m - 13):
        name = f"{rows}x{n} bfloat16 with codes"
        yield Case(
            "_psgd_kernel", name, rows * n * 12 / 2**30 + 3, functools.partial(_step, (rows, n), torch.bfloat16, True)
        )
        yield Case("_int8_step_kernel", f"{rows}x{n}", rows * n * 9 / 2**30 + 3, functools.partial(_int8_step, rows, n))


def _step(shape: tuple[int, ...], dtype: torch.dtype, codes: bool, device: torch.device) -> str:
    """Two steps of SGD with a range of the whole tensor: the second one reads the state that the first one left."""
    from fqt_kernels.psgd import Hyper, MultiTensor, Slot

    w, g = normal(*shape, device=device, dtype=dtype), normal(*shape, device=device, dtype=dtype, seed=2)
    before, buffer = w.clone(), torch.empty_like(w)
    p = Position("grid")
    out = None
    if codes:
        m, n = shape
        out = (torch.empty(m, n, dtype=torch.int8, device=device), torch.empty(n, m, dtype=torch.int8, device=device),
               torch.empty(m, 1, device=device))  # fmt: skip
    slot = Slot(w, g, first=buffer, range=torch.empty(1, 2, device=device), fresh=True, new=True, codes=out)
    names = ("target", "qmax", "sparsity", "scale", "largest", "eps", "delta", "per_channel", "position")
    hyper = Hyper(**OPTIONS, **{name: getattr(p, name) for name in names})
    multi, held = MultiTensor(), None
    held = _run(multi, slot, hyper, before, None, held, p)
    _run(multi, slot._replace(fresh=False, new=False), hyper, before, buffer.clone(), held, p)
    if out is not None:
        z = Quantizer(8, "per_row", "symmetric")
        for rows, _ in pieces(*shape):
            want = reference.quantize(w[rows], z, cols=True)
            same("q", out[0][rows], want.q, (rows.start, 0))
            same("qt", out[1][:, rows], want.qt, (0, rows.start))
            same("scale", out[2][rows], want.scale, (rows.start, 0))
    return f"two steps{', codes' * codes}, bit for bit"


def _run(multi, slot, hyper, before: Tensor, buffer: Tensor | None, held: Tensor | None, p: Position) -> Tensor:
    """A step, compared with `fqt.optim.loop`; before: the weights, which become the new ones. Returns the new range."""
    newest = torch.zeros(1, 2, device=before.device)
    flat = before.view(-1)
    for part in parts(flat.numel()):
        x = flat[part].float()
        newest = torch.stack([torch.minimum(newest[:, 0], x.amin()), torch.maximum(newest[:, 1], x.amax())], 1)
    held = advanced_range(p, held, newest)
    multi.step([slot], [hyper], rule="sgd")
    torch.autograd.graph.increment_version([slot.w])
    multi.written([slot])
    same("range", slot.range, held)
    for part in parts(flat.numel()):
        w, g = flat[part], slot.g.view(-1)[part]
        state = {} if buffer is None else {"momentum_buffer": buffer.view(-1)[part].clone()}
        want = loop.sgd_step(w, g.float(), state, position_scale(w, p, held), position=p.position, **OPTIONS).to(
            w.dtype
        )
        same("weights", slot.w.view(-1)[part], want, (part.start,))
        same("momentum", slot.first.view(-1)[part], state["momentum_buffer"], (part.start,))
        w.copy_(want)
    return held


def _int8_step(m: int, n: int, device: torch.device) -> str:
    """A step of SGD of a weight that is held in int8."""
    from fqt_kernels.int8_step import int8_step
    from fqt_kernels.psgd import Hyper

    q, g = codes_of(m, n, device=device), normal(m, n, device=device, dtype=torch.bfloat16, seed=3)
    q.clamp_(-127, 127)
    scale = torch.linspace(0.001, 0.1, m, device=device)[:, None].contiguous()
    qt, rng = q.t().contiguous(), rng_of(device)
    before, old, state = q.clone(), scale.clone(), rng.clone()
    buffer = torch.empty_like(g)
    int8_step(q, qt, scale, rng, g, Hyper(**OPTIONS), first=buffer, new=True)
    for rows, cols in pieces(m, n):
        held: dict = {}
        w = before[rows].float() * old[rows]
        new = loop.sgd_step(w, g[rows].float(), held, None, position="grad", **OPTIONS)
        wider = int8.row_scales(old[rows], new)
        bits = bits_at(state, rows, cols, int8.UPDATE)
        want = reference.round_codes((new / wider).nan_to_num(0.0), "stochastic", bits)
        want = want.clamp(-int8.HIGHEST, int8.HIGHEST).to(torch.int8)
        same("scale", scale[rows], wider, (rows.start, 0))
        same("q", q[rows], want, (rows.start, 0))
        same("qt", qt[:, rows], want.t(), (0, rows.start))
        same("momentum", buffer[rows], held["momentum_buffer"].to(buffer.dtype), (rows.start, 0))
    same("rng", rng, state + torch.tensor([0, 1], device=device))
    return "codes, scales and momentum, bit for bit"
