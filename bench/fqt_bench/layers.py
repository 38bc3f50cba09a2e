"""The case of a linear layer, forward and backward, and what a forward keeps in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

import fqt
import fqt.nn
from fqt import cost, dispatch, reference
from fqt.gradients import DGRAD, WGRAD
from fqt.qtensor import QTensor
from fqt.recipe import Quantizer, Recipe

from .cases import BF16_BOUND, ceilings, gaussian, quantize_exactly
from .harness import Candidate, Case, Wrong, check_near
from .peers import TORCHAO, forget_compiled, lacks
from .peers import Layer as Peer
from .peers import compiled as compile_
from .providers import has_fp8, peer

RECIPES = ("int8", "psq8")
STREAM_KEY = 0x0123456789ABCDEF
OWN = "fqt.nn.Linear "  # a candidate's name before its recipe's


def recipes(device: torch.device) -> tuple[str, ...]:
    return (*RECIPES, "fp8") if has_fp8(device) else RECIPES


def linear(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    sets: int = 2,
    *,
    dtype: torch.dtype = torch.bfloat16,
    names: Sequence[str] | None = None,
    peers: bool = True,
) -> Case:
    """Forward and backward of a linear layer without bias, X (M, K), W (N, K): `fqt.nn.Linear` of the recipes that are
    named (those of `recipes` if None) against nn.Linear and, with peers, nn.Linear compiled and torchao's layers.

    All of the quantization is timed. The codes of the weight are dropped at the start of each run, on the host, so that
    every run quantizes the weight in both layouts, as a training step does.
    """
    x = [gaussian(m, k, device=device, seed=2 * i, dtype=dtype).requires_grad_() for i in range(sets)]
    dy = [gaussian(m, n, device=device, seed=2 * i + 1, dtype=dtype) for i in range(sets)]
    ops = 6.0 * m * n * k
    bound = BF16_BOUND if dtype == torch.bfloat16 else max(m, n, k) * 2.0**-24  # float32 sums of so many terms
    plain = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    title = f"nn.Linear {dtype_name(dtype)}"
    exact = _exact_check(plain, x, dy, bound)
    baseline = Candidate(title, step(plain, x, dy), exact, ops, **peer("torch", device), tag="bf16")
    candidates = [baseline]
    hopper = ["int8"] if names is None and _against_hopper(device) is None else []
    named = [(name, "auto") for name in (recipes(device) if names is None else names)]
    for name, backend in named + [(name, "hopper") for name in hopper]:
        layer = fqt.nn.Linear(k, n, bias=False, device=device, dtype=dtype, recipe=name)
        with torch.no_grad():
            layer.weight.copy_(plain.weight)
            layer._fqt_rng.copy_(torch.tensor([STREAM_KEY, 0]))  # the same bits whichever kernels compute the layer
        note = "" if backend == "auto" else f" {backend}"
        check = exact if layer.recipe.is_exact else _layer_check(layer, x, dy, bound)
        candidates.append(
            Candidate(
                f"{OWN}{name}{note}", step(layer, x, dy, backend=backend), check, ops,
                prediction="" if note else _prediction(m, n, k, layer.recipe, device), tag=f"{name}{note}",
                rewind=rewind(layer), same_bits=name,
            )
        )  # fmt: skip
    if peers:
        candidates += [
            Candidate(f"{title}, torch.compile", step(plain, x, dy, compiled=True), exact, ops,
                      **peer("torch.compile", device), tag="bf16 compiled"),
            *(_torchao(of, plain, x, dy, ops) for of in TORCHAO),
        ]  # fmt: skip
    return Case("linear fwd+bwd", f"{m}x{n}x{k}", "TFLOP/s", baseline.name, tuple(candidates), sets)


def dtype_name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def _against_hopper(device: torch.device) -> str | None:
    """Why the kernel for Hopper does not run on the device, None if it does."""
    from fqt_kernels.gemm_hopper import reason_against

    arch = dispatch.device_info(str(device))[0] if device.type == "cuda" else ""
    return reason_against(arch, 128, 128, 128)


def _prediction(m: int, n: int, k: int, recipe: Recipe, device: torch.device) -> str:
    expected = ceilings(device)
    if expected is None:
        return ""
    try:
        return str(cost.linear(m, n, k, recipe, expected))
    except cost.NotModelled:
        return ""


def step(
    layer: torch.nn.Module | Callable[[], torch.nn.Module],
    x: list[Tensor],
    dy: list[Tensor],
    compiled: bool = False,
    backend: str = "auto",
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """run(i): forward and backward on input set i from empty gradients; returns (Y, dX, dW).

    layer: itself, or what makes it when it is run first; compiled then as well.
    """
    if compiled:
        forget_compiled()

    @functools.cache
    def made() -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
        of = layer if isinstance(layer, torch.nn.Module) else layer()
        return of, compile_(of) if compiled else of

    def run(i: int) -> tuple[Tensor, Tensor, Tensor]:
        of, forward = made()
        x[i].grad = of.weight.grad = None
        fqt.invalidate_(of)
        with fqt.backend(backend) if backend != "auto" else contextlib.nullcontext():  # "auto": whatever is in force
            y = forward(x[i])
            y.backward(dy[i])
        return y.detach(), x[i].grad, of.weight.grad

    return run


def rewind(layer: fqt.nn.Linear | fqt.nn.Conv2d) -> Callable[[], object]:
    """Takes the layer's random stream back to where it is now."""
    state = layer._fqt_rng.clone()
    return lambda: layer._fqt_rng.copy_(state)


def _torchao(of: Peer, plain: torch.nn.Linear, x: list[Tensor], dy: list[Tensor], ops: float) -> Candidate:
    """Compiled, as torchao's own benchmarks run it."""
    fields = peer(of.provider, plain.weight.device)
    fields["missing"] = fields["missing"] or lacks(of.convert)
    run = step(functools.partial(of.convert, plain), x, dy, compiled=True)
    least, most = of.error
    check = _exact_check(plain, x, dy, most, least)
    return Candidate(f"{of.name}, torch.compile", run, check, ops, **fields, tag=of.tag)


def _exact_check(layer: torch.nn.Linear, x: list[Tensor], dy: list[Tensor], bound: float, least: float = 0.0):
    """Against the products of the unquantized operands. An error of at most `least`, if any, is wrong too: nothing was
    quantized."""

    def check(out: tuple[Tensor, Tensor, Tensor], i: int) -> str:
        a, w, g = x[i].detach().float(), layer.weight.detach().float(), dy[i].float()
        want = reference.mm(a, w.t()), reference.mm(g, w), reference.mm(g.t(), a)
        remark = check_products(out, want, bound)
        if least and any(_is_near(got, to, least) for got, to in zip(out, want, strict=True)):
            raise Wrong(f"{remark}: nothing was quantized, which costs at least {least:.1e}")
        return remark

    return check


def _is_near(got: Tensor, want: Tensor, bound: float) -> bool:
    try:
        check_near(got, want, bound)
    except Wrong:
        return False
    return True


def _layer_check(layer: fqt.nn.Linear, x: list[Tensor], dy: list[Tensor], bound: float):
    """Against `fqt.reference`'s definitions of the three products, in float32, with the random bits of the step done."""

    def check(out: tuple[Tensor, Tensor, Tensor], i: int) -> str:
        recipe: Recipe = layer.recipe
        rng = layer._fqt_rng.clone()
        rng[1] -= 1
        xq, wq = _quantized(x[i].detach(), recipe.x), _quantized(layer.weight.detach(), recipe.w)
        g = dy[i].float()
        want = (
            reference.fprop(xq, wq),
            reference.dgrad(g, wq, recipe, rng=rng, stream=DGRAD),
            reference.wgrad(g, xq, recipe, rng=rng, stream=WGRAD),
        )
        return check_products(out, want, bound)

    return check


def _quantized(t: Tensor, quantizer: Quantizer) -> QTensor:
    return quantize_exactly(t, quantizer) if quantizer.format == "int" else reference.quantize(t, quantizer)


def check_products(out: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...], bound: float) -> str:
    """Y, dX and dW; None for what nobody asked for."""
    remarks = []
    for got, to, what in zip(out, want, ("Y", "dX", "dW"), strict=True):
        if (got is None) != (to is None):
            raise Wrong(f"{what}: {'missing' if got is None else 'not asked for'}")
        if got is not None:
            remarks.append(f"{what} {check_near(got, to, bound, what)}")
    return ", ".join(remarks)


# ---- memory


def memory(
    m: int, n: int, k: int, device: torch.device, usage: Callable[..., dict[str, int]], refused: Container[str] = ()
) -> list[dict[str, Any]]:
    """For nn.Linear and each recipe: "saved", the bytes that a forward keeps for its backward, and "peak" of both; the
    codes of the weight, which outlive the step, are not counted. usage(forward, backward): see `fqt_bench.cuda.memory`."""
    dy = gaussian(m, n, device=device, seed=1)
    options = {"bias": False, "device": device, "dtype": torch.bfloat16}
    built = {"bf16": lambda: torch.nn.Linear(k, n, **options)}
    for name in recipes(device):
        if OWN + name not in refused:
            built[name] = functools.partial(fqt.nn.Linear, k, n, recipe=name, **options)
    records = []
    for name, build in built.items():
        layer = build()

        def forward(layer: torch.nn.Linear = layer) -> Tensor:
            # As inside a network: nothing but the layer may keep its input, so the leaf is a single element.
            leaf = torch.ones(1, 1, device=device, dtype=torch.bfloat16, requires_grad=True)
            return layer(leaf.expand(m, k).contiguous())

        records.append({"name": name, "shape": f"{m}x{n}x{k}", **usage(forward, lambda y: y.backward(dy))})
    return records
