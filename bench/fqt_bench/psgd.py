"""The case of a step of PSGD over all parameters of a network, against torch's optimizers and a copy of as many bytes.

Bytes that a step has to move, of an element of e bytes (4 in float32, 2 in bfloat16):

    w read and written, gradient read                       3·e
    momentum, or each of AdamW's two moments                2·e    read and written: SGD and PSGD 5·e in all, AdamW 7·e
    int8 codes of a weight (N, K), both layouts             2      and 4·N for the scales
    w held in int8, in the place of 2·e for w               3      codes read and written, transposed written; 8·N

Not counted: what a target knows of a tensor (8 bytes a range, read and written), tables of addresses, hyperparameters.
SGD with int8 codes counts as one pass as well: what it reads again is not what has to move.

A weight (two dimensions or more) is drawn to the target; the steps of the other parameters are plain. Gradients stay the
same from step to step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fqt
import fqt.nn
from fqt import dispatch
from fqt.cli import table
from fqt.int8_weight import Int8Weight, hold_int8_
from fqt.optim import PSGD, PSGDAdamW, loop
from fqt.optim.options import position_of

from .cases import gaussian
from .harness import Candidate, Case, Wrong, check_equal, check_near
from .layers import dtype_name
from .operators import check_quantized
from .optim import LR, RECIPE, check_step
from .parameters import Parameters
from .providers import peer
from .stats import of_the_copy

SUITE = "psgd step"
SGD = {"lr": LR, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW = {"lr": LR, "weight_decay": 1e-2}
TARGETS: dict[str, dict[str, Any]] = {
    "grid": {}, "zero": {"target": "zero"}, "grid+zero": {"target": "grid+zero"}, "grid per channel": {"per_channel": True},
}  # fmt: skip
HYPERPARAMETERS = {"sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
                   "adamw": ("lr", "betas", "eps", "weight_decay")}  # fmt: skip
EMITTING = "PSGD fused, grid, int8 codes"
NEEDS_GPU = "not measured: needs a GPU"
# ‖difference‖ / ‖value‖: of a few roundings of each element; of bfloat16, where the value before rounding is as close as
# that, one element in a thousand may round to the other neighbour: 2⁻⁸ · √0.001.
BOUNDS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-13}
# Against float64. s of a weight near its point is a difference of near numbers: up to q · L = 14 roundings of its largest.
FORMULA = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-7}


def title(parameters: Parameters, dtype: torch.dtype) -> str:
    """The kind of a case."""
    return f"{SUITE}, {parameters.name} {dtype_name(dtype)}"


def step_bytes(parameters: Parameters, element: int, moments: int = 1, codes: str = "") -> float:
    """What a step has to move; codes: "" or "written", or "held" of weights that are nothing else. See above."""
    moved = float((3 + 2 * moments) * element * parameters.elements)
    for n, k in parameters.matrices if codes else ():
        moved += {"written": 2 * n * k + 4 * n, "held": (3 - 2 * element) * n * k + 8 * n}[codes]
    return moved


# ---- the candidates


@dataclass(frozen=True)
class Way:
    """A way of making a step. make: an optimizer of parameters. check: given such an optimizer and its step. kernel:
    whether it is the fused kernel. codes: as in `step_bytes`. ours: whether the step is fqt's."""

    title: str
    tag: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    check: Callable[[Any, Callable[[], object]], str]
    moments: int = 1
    codes: str = ""
    kernel: bool = False
    ours: bool = True


class Loop(PSGD):
    """A step as a user would write it: the definition, one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                new, self.state[w] = defined(self, group, w)
                w.copy_(new)


def ways(device: torch.device) -> list[Way]:
    """The first is the baseline, fused SGD. Without a GPU every target is measured by foreach."""
    fused, foreach = ({"kind": torch.optim.SGD, name: True, **SGD} for name in ("fused", "foreach"))
    found = [_torch("SGD fused", "sgd fused", **fused), _torch("SGD foreach", "sgd foreach", **foreach),
             _torch("SGD fused, then int8 codes", "sgd fused codes", codes="written", **fused)]  # fmt: skip
    for target, options in TARGETS.items():
        found.append(_psgd(f"fused, {target}", "" if options else "psgd", True, **options))
    found.append(_psgd(EMITTING.removeprefix("PSGD "), "psgd codes", True, codes="written"))
    found.append(_psgd("fused, grid, weights held in int8", "psgd held", True, codes="held"))
    for target, options in TARGETS.items() if device.type == "cpu" else [("grid", {})]:
        found.append(_psgd(f"foreach, {target}", "" if options else "psgd foreach", False, **options))
    if device.type == "cpu":
        found.append(_psgd("foreach, grid, weights held in int8", "psgd foreach held", False, codes="held"))
    found.append(_psgd("loop, grid", "psgd loop", False, Loop, check=check_formula))
    adamw = {"rates": ADAMW, "moments": 2}
    return [*found, _torch("AdamW fused", "adamw fused", 2, kind=torch.optim.AdamW, fused=True, **ADAMW),
            _psgd("fused, grid", "psgd adamw", True, PSGDAdamW, **adamw),
            _psgd("foreach, grid", "psgd adamw foreach", False, PSGDAdamW, **adamw)]  # fmt: skip


def _torch(name: str, tag: str, moments: int = 1, codes: str = "", *, kind: type, **options: Any) -> Way:
    """Of an optimizer of torch. After a step of one, all layers of a process think that their weights may have changed: so
    that those of the other candidates do not, this one says that it shows its writes, and its own layers are told."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = kind(params, **options)
        optimizer.advances_versions = True
        return optimizer

    return Way(f"torch {name}", tag, make, check_step, moments, codes, ours=bool(codes))


def _psgd(name: str, tag: str, fused: bool | None, kind: type = PSGD, moments: int = 1, codes: str = "",
          check: Callable | None = None, rates: dict[str, Any] = SGD, **options: Any) -> Way:  # fmt: skip
    """Of an optimizer of fqt, whose weights are drawn to a target."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        weights, rest = ([p for p in params if (p.dim() > 1) is drawn] for drawn in (True, False))
        return kind([{"params": weights, **options}, {"params": rest, "target": None}], fused=fused, **rates)

    check = check or (check_held if codes == "held" else check_defined)
    name = f"{'PSGDAdamW' if kind is PSGDAdamW else 'PSGD'} {name}"
    return Way(name, tag, make, check, moments, codes, kernel=fused is True)


def case(parameters: Parameters, dtype: torch.dtype, device: torch.device, *, kernels: bool | None = None,
         brief: bool = False) -> Case:  # fmt: skip
    """A step of each optimizer on parameters of the dtype; ratios to fused SGD, by time.

    kernels: whether the fused kernel is run, None: as the device has it. brief: grid and codes as dispatch chooses, alone.
    """
    against = _against(device, dtype) if kernels is None else "" if kernels else NEEDS_GPU
    chosen = ways(device)
    if brief:
        chosen = [chosen[0], _psgd("by dispatch, grid", "psgd", None),
                  _psgd("by dispatch, grid, int8 codes", "psgd codes", None, codes="written")]  # fmt: skip
    gradients = functools.cache(functools.partial(_values, parameters, dtype, device, 1))
    candidates = [_candidate(way, parameters, dtype, device, gradients, against) for way in chosen]
    if not brief:
        candidates.append(_copy(step_bytes(parameters, dtype.itemsize), device))
    return Case(title(parameters, dtype), parameters.size, "ms", candidates[0].name, tuple(candidates), 1)


def _against(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel cannot be measured, "" if it can."""
    if device.type == "cpu":
        return NEEDS_GPU
    choice = dispatch.choose("psgd", device, 1, 1, dtype=dtype)
    return "" if choice.backend == "triton" else f"not measured: {choice.reason}"


def _values(parameters: Parameters, dtype: torch.dtype, device: torch.device, odd: int) -> list[Tensor]:
    return [gaussian(*shape, device=device, seed=2 * i + odd, dtype=dtype) for i, shape in enumerate(parameters.shapes)]


def _candidate(way: Way, parameters: Parameters, dtype: torch.dtype, device: torch.device,
               gradients: Callable[[], list[Tensor]], against: str) -> Candidate:  # fmt: skip
    @functools.cache  # not before it runs: the trial run builds every case in several processes
    def made() -> tuple[list[fqt.nn.Linear], torch.optim.Optimizer]:
        params, layers = _parameters(_values(parameters, dtype, device, 0), way.codes)
        for p, g in zip(params, gradients(), strict=True):
            p.grad = g
        return layers, way.make(params)

    def run(i: int) -> tuple[Tensor, ...]:
        layers, optimizer = made()
        optimizer.step()
        if isinstance(optimizer, torch.optim.SGD):  # see `_torch`
            for layer in layers:
                fqt.invalidate_(layer)
        return tuple(layer._quantized_weight(transposed=True) for layer in layers)

    def check(out: tuple, i: int) -> str:
        layers, optimizer = made()
        remark = way.check(optimizer, lambda: run(i))
        if way.codes != "written":
            return remark
        for layer in layers:
            check_quantized(layer._quantized_weight(transposed=True), layer.weight.detach(), layer.recipe.w, cols=True)
        return f"{remark}, codes bit-equal"

    who = {"missing": against if way.kernel else ""} if way.ours else peer("torch", device)
    return Candidate(way.title, run, check, bytes=step_bytes(parameters, dtype.itemsize, way.moments, way.codes),
                     tag=way.tag, **who)  # fmt: skip


def _parameters(values: list[Tensor], codes: str) -> tuple[list[nn.Parameter], list[fqt.nn.Linear]]:
    """Parameters with these values, and with codes the linear layers that those with two dimensions belong to."""
    if not codes:
        return [nn.Parameter(v) for v in values], []
    layers: dict[int, fqt.nn.Linear] = {}
    for i, v in enumerate(values):
        if v.dim() == 2:
            layers[i] = fqt.nn.Linear(v.shape[1], v.shape[0], bias=False, recipe=RECIPE, device=v.device, dtype=v.dtype)
            layers[i].weight = nn.Parameter(v)
    if codes == "held":
        hold_int8_(nn.ModuleList(layers.values()))
    return [layers[i].weight if i in layers else nn.Parameter(v) for i, v in enumerate(values)], list(layers.values())


def shares(record: dict[str, Any], launches: Iterable[dict[str, Any]] = ()) -> str:
    """What a measured case moves: GB/s, its share of the copy's, and the kernels counted in the entries of `launches`."""
    kernels = {r["name"]: str(r["kernels"]) for r in launches if r["shape"] == record["shape"]}
    share = of_the_copy(record)
    rows = [(c["name"], f"{c['gb_s']:.4g}", f"{100 * share[c['name']]:.1f} %", kernels.get(c["name"], ""))
            for c in record["candidates"] if c["name"] in share]  # fmt: skip
    header = (f"{record['suite']} {record['shape']}", "GB/s", "of the copy", "launches")
    return table(header, rows, right=(1, 2, 3)) if rows else ""


def _copy(moved: float, device: torch.device) -> Candidate:
    """A copy that reads half of the bytes and writes the other half."""

    @functools.cache
    def made() -> tuple[Tensor, Tensor]:
        source = gaussian(int(moved / 2) // 4, device=device, seed=0, dtype=torch.float32)
        return source, torch.empty_like(source)

    def run(i: int) -> Tensor:
        source, target = made()
        return target.copy_(source)

    return Candidate("copy_ of as many bytes as SGD's", run, lambda out, i: check_equal(out, made()[0]),
                     bytes=float(int(moved / 2) // 4 * 8), **peer("torch", device), tag="step copy")  # fmt: skip


# ---- checks: one more step, against what the definition makes of the parameters as they were before it


def defined(optimizer: PSGD | PSGDAdamW, group: dict[str, Any], w: Tensor,
            dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """(w, state) after a step of `fqt.optim.loop` in w's dtype (float32 of a weight held in int8), or in another."""
    x = w.dequantize(torch.float32) if isinstance(w, Int8Weight) else w.detach()
    x = x if dtype is None else x.to(dtype)
    state = {key: v.clone() if dtype is None or not v.is_floating_point() else v.to(dtype, copy=True)
             for key, v in optimizer.state[w].items()}  # fmt: skip
    position = position_of(group, optimizer.names)
    s = loop.scale_of(x, position, state)
    step = loop.sgd_step if optimizer.rule == "sgd" else loop.adamw_step
    how = {name: group[name] for name in HYPERPARAMETERS[optimizer.rule]}
    new = step(x, loop.gradient(w.grad, x, group["maximize"]), state, s, position=position.position, **how)
    return new.to(x.dtype), state


def _after(optimizer: PSGD | PSGDAdamW, run: Callable[[], object],
           dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:  # fmt: skip
    """(what, got, wanted) of every weight and of its state after a step; "held": of a weight that is held in int8."""
    members = [(group, w) for group in optimizer.param_groups for w in group["params"]]
    wanted = [defined(optimizer, group, w, dtype) for group, w in members]
    run()
    for (_, w), (new, state) in zip(members, wanted, strict=True):
        yield "held" if isinstance(w, Int8Weight) else "weight", w.detach(), new
        for key in sorted(state.keys() - {"step"}):
            yield key, optimizer.state[w][key], state[key]


def check_defined(optimizer: PSGD | PSGDAdamW, run: Callable[[], object]) -> str:
    """To the last bit, or as close as `BOUNDS`: on a GPU torch's operators need not round as they do on a CPU."""
    return _worst(_compared(*found) for found in _after(optimizer, run))


def check_formula(optimizer: PSGD | PSGDAdamW, run: Callable[[], object]) -> str:
    """As close to float64 as one rounding of each operation allows."""
    return _worst(check_near(got, want, FORMULA.get(got.dtype, FORMULA[torch.float32]), what)
                  for what, got, want in _after(optimizer, run, torch.float64))  # fmt: skip


def check_held(optimizer: PSGD | PSGDAdamW, run: Callable[[], object]) -> str:
    """The new codes lie on either side of what the step makes of q · scale, in both layouts, and more than a thousandth of
    them are not the nearest ones: rounding is stochastic. All else is as ever."""
    remarks = []
    for what, got, want in _after(optimizer, run):
        if what != "held":
            remarks.append(_compared(what, got, want.to(got.dtype)))
            continue
        off = (got.q - want / got.scale).abs()
        if not bool((off < 1 + 2.0**-10).all()) or not torch.equal(got.q, got.qt.t()):
            raise Wrong("codes that are not next to the stepped weight, or differ between the layouts")
        if not float((off > 0.5).float().mean()) > 1e-3:
            raise Wrong("every code is the nearest one")
    return f"{_worst(remarks)}, codes next to the stepped weight"


def _compared(what: str, got: Tensor, want: Tensor) -> str:
    if got.dtype != want.dtype:
        raise Wrong(f"{what}: {got.dtype} instead of {want.dtype}")
    return "" if torch.equal(got, want) else check_near(got, want, BOUNDS.get(got.dtype, BOUNDS[torch.float32]), what)


def _worst(remarks: Iterable[str]) -> str:
    """Of remarks "error …" the largest; "bit-equal" where there is none."""
    return max(filter(None, remarks), key=lambda remark: float(remark.split()[-1]), default="bit-equal")
