"""The checks of `fqt doctor` for the step of PSGD in one launch: its kernels against `fqt.optim.loop`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import reference
from .optim import loop
from .position import Position, first_threshold
from .recipe import Quantizer

Compared = dict[str, tuple[Tensor, Tensor, float]]
# Of each: shape, whose first extent is more on a GPU, and options of its scale. Rows on 16-byte boundaries and not.
PARAMETERS = [
    ((32, 48), Position("grid")),
    ((19, 70), Position("grid+zero", sparsity=0.5, per_channel=True, position="update")),
    ((2560,), Position("zero", scale=3.0, eps=0.01)),
    ((30, 11), Position("grid+zero", bits=3, sparsity=0.9, delta="absmax")),
    ((7,), Position(None)),
]
MORE = 16  # times that extent on a GPU, so that many programs share a tensor
OPTIONS = {
    "sgd": dict(momentum=0.9, dampening=0.25, weight_decay=0.01, nesterov=False),
    "adamw": dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01),
}
STEPS = 2


def checks(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(kernel, case, run) of the step and of the statistics before the first one, see `fqt.selftest.Check`."""
    for rule in OPTIONS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = f"{rule}, {str(dtype).removeprefix('torch.')}"
            yield "_psgd_kernel", case, lambda r=rule, d=dtype: _steps_case(device, r, d)
    yield "_psgd_stats_kernel", "float32", lambda: _first_ranges_case(device)


def _steps_case(device: torch.device, rule: str, dtype: torch.dtype) -> Compared:
    """Weights, state and codes after some steps, of which the second is GradScaler's to skip."""
    from fqt_kernels.psgd import MultiTensor

    generator = torch.Generator().manual_seed(3)
    multi, slots, compared = MultiTensor(), [], {}
    more = 1 if device.type == "cpu" else MORE
    shapes = [(more * rows, *rest) for (rows, *rest), _ in PARAMETERS]
    wanted = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    wanted[1][3, 5], wanted[3][2] = float("nan"), 0.0
    states: list[dict] = [{} for _ in wanted]
    found, scaler = torch.zeros(1, device=device), torch.full((1,), 3.0, device=device)
    for step in range(STEPS + 1):
        gradients = [torch.randn(w.shape, generator=generator).to(dtype) for w in wanted]
        if not step:
            slots = [_first_slot(i, wanted[i], rule, device) for i in range(len(wanted))]
        slots = [s._replace(g=g.to(device)) for s, g in zip(slots, gradients, strict=True)]
        found.fill_(float(step == 1))
        multi.step(slots, [_hyper(p, rule) for _, p in PARAMETERS], rule=rule, found_inf=found, grad_scale=scaler)
        torch.autograd.graph.increment_version([s.w for s in slots])
        multi.written(slots)
        slots = [s._replace(fresh=False, fresh_threshold=False, new=False) for s in slots]
        if step != 1:
            wanted = [_wanted(w, g, p, state, rule, scaler.cpu()) for w, g, (_, p), state in
                      zip(wanted, gradients, PARAMETERS, states, strict=True)]  # fmt: skip
    for i, (slot, w, state) in enumerate(zip(slots, wanted, states, strict=True)):
        names = "momentum_buffer" if rule == "sgd" else "exp_avg", "exp_avg_sq", "powers", "range", "threshold"
        tensors = slot.first, slot.second, slot.powers, slot.range, slot.threshold
        pairs = {name: (t, state[name]) for name, t in zip(names, tensors, strict=True) if t is not None}
        if slot.codes is not None:
            codes = reference.quantize(w, Quantizer(8, "per_row", "symmetric"), cols=True)
            q, qt, scale = slot.codes
            pairs |= {"q": (q, codes.q), "qt": (qt, codes.qt), "scale": (scale, codes.scale)}
        compared |= {f"{name} {i}": _bits(*pair) for name, pair in (pairs | {"weights": (slot.w, w)}).items()}
    return compared


def _first_slot(i: int, w: Tensor, rule: str, device: torch.device):
    from fqt_kernels.psgd import Slot

    (_, p), adamw = PARAMETERS[i], rule == "adamw"
    moment = lambda: torch.zeros_like(w, device=device)  # noqa: E731
    rows = len(w) if p.per_channel else 1
    codes = None
    if i < 2:
        n, k = w.shape
        codes = tuple(torch.empty(s, dtype=torch.int8, device=device) for s in ((n, k), (k, n)))
        codes += (torch.empty(n, 1, device=device),)
    return Slot(
        w.to(device, copy=True),
        w,
        first=moment(),
        second=moment() if adamw else None,
        powers=torch.ones(2, dtype=torch.float64, device=device) if adamw else None,
        range=torch.empty(rows, 2, device=device) if p.has_range else None,
        threshold=first_threshold(w, p.sparsity).to(device) if p.target == "grid+zero" else None,
        fresh=True,
        fresh_threshold=True,
        new=not adamw,
        group=i,
        codes=codes,
    )


def _hyper(p: Position, rule: str):
    from fqt_kernels.psgd import Hyper

    options = dict(OPTIONS[rule])
    options["adam_eps"] = options.pop("eps", 0.0)
    names = ("target", "qmax", "sparsity", "scale", "largest", "eps", "delta", "per_channel", "position")
    return Hyper(0.05, **options, **{name: getattr(p, name) for name in names})


def _wanted(w: Tensor, g: Tensor, p: Position, state: dict, rule: str, scaler: Tensor) -> Tensor:
    step = loop.sgd_step if rule == "sgd" else loop.adamw_step
    s = loop.scale_of(w, p, state)
    g = loop.gradient(g, w, False, scaler)
    return step(w, g, state, s, lr=0.05, position=p.position, **OPTIONS[rule]).to(w.dtype)


def _first_ranges_case(device: torch.device) -> Compared:
    """The ranges of a first step are the extremes of the weights: a learning rate of 0 leaves the weights alone."""
    from fqt_kernels.psgd import Hyper, MultiTensor, Slot

    w = torch.randn(40, 70, generator=torch.Generator().manual_seed(4))
    w[7, 8] = float("inf")
    finite = torch.where(w.isfinite(), w, torch.zeros_like(w))
    compared = {}
    for channels in (False, True):
        rows = finite if channels else finite.reshape(1, -1)
        here = w.to(device)
        slot = Slot(here, torch.zeros_like(here), range=torch.empty(len(rows), 2, device=device), fresh=True)
        MultiTensor().step([slot], [Hyper(0.0, target="grid", qmax=7, per_channel=channels)], rule="sgd")
        compared[f"range of {len(rows)}"] = slot.range, torch.stack([rows.amin(1), rows.amax(1)], 1), 0.0
    return compared


def _bits(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor, float]:
    """A NaN is as good as another."""
    got, want = got.cpu(), want.cpu()
    if got.is_floating_point():
        got, want = (torch.where(t.isnan(), torch.full_like(t, 12345.0), t) for t in (got, want))
    return got, want, 0.0
