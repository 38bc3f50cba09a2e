"""The case of a matrix product: C = A Bᵀ of quantized operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fqt import candidates, cost, dispatch, reference
from fqt.candidates import title
from fqt.products import launcher
from fqt.qtensor import Operand

from .cases import BF16_BOUND, ROW, ceilings, gaussian, quantize_exactly
from .harness import Candidate, Case, check_equal, check_near, check_rounded
from .peers import compiled, forget_compiled, int_mm_scaled
from .providers import has_fp8, peer

FP8_BOUND = 1e-2  # fast accumulation keeps fewer bits than float32
DISPATCHED = " (dispatch)"  # marks the configuration that dispatch selects


def gemm(m: int, n: int, k: int, device: torch.device, sets: int = 2, *, every: bool = True) -> Case:
    """All that `fqt.candidates` has for the product, int8 and e4m3, against torch.matmul in bf16, torch._int_mm, alone and
    with scales by torch.compile, and torch._scaled_mm in fp8 with scales per row. Unless every: what dispatch selects for
    int8, against bf16, alone."""
    x = [gaussian(m, k, device=device, seed=2 * i) for i in range(sets)]
    w = [gaussian(n, k, device=device, seed=2 * i + 1) for i in range(sets)]
    a = [quantize_exactly(t, ROW).rows() for t in x]
    b = [quantize_exactly(t, ROW).rows() for t in w]
    ops, out_bytes = 2.0 * m * n * k, 2.0 * m * n
    expectation = _Expectation((m, n, k), device)
    counts = {"ops": ops, "bytes": 1.0 * m * k + 1.0 * n * k + out_bytes}
    matmul = Candidate(
        "torch.matmul bf16",
        lambda i: torch.matmul(x[i], w[i].t()),
        lambda out, i: check_near(out, reference.mm(x[i].float(), w[i].float().t()), BF16_BOUND),
        ops, 2.0 * m * k + 2.0 * n * k + out_bytes, **peer("torch", device), prediction=expectation.bf16(), tag="bf16",
    )  # fmt: skip
    int_mm = Candidate(
        "torch._int_mm (int32 out)",
        lambda i: torch._int_mm(a[i].q, b[i].q.t()),
        lambda out, i: check_equal(out, reference.int_mm(a[i].q, b[i].q)),
        **{**counts, "bytes": counts["bytes"] + out_bytes}, **peer("torch._int_mm", device), tag="_int_mm",
    )  # fmt: skip
    expected = functools.cache(lambda i: reference.scaled_mm(a[i], b[i]))
    forget_compiled()
    scaled = functools.cache(lambda: compiled(int_mm_scaled))
    composed = Candidate(
        "torch._int_mm and scales, torch.compile",
        lambda i: scaled()(a[i].q, b[i].q, a[i].scale, b[i].scale),
        lambda out, i: check_rounded(out, expected(i)),
        **counts, **peer("torch.compile", device), tag="_int_mm compiled",
    )  # fmt: skip
    made = [matmul, int_mm, composed, *_fp8(x, w, expectation.fp8(), counts)] if every else [matmul]
    for name, tag, selected, launch in launches(m, n, k, device):
        if not every and not selected:
            continue
        made.append(
            Candidate(
                f"{name}{DISPATCHED * selected}",
                lambda i, launch=launch: launch(a[i].q, b[i].q, a[i].scale, b[i].scale, out_dtype=torch.bfloat16),
                lambda out, i: check_rounded(out, expected(i)),
                **counts, prediction=expectation.int8() if selected else "", tag=tag, same_bits="int8",
            )
        )  # fmt: skip
    return Case("gemm", f"{m}x{n}x{k}", "TOPS", matmul.name, tuple(made), sets)


class _Expectation:
    """What `fqt.cost` predicts of one product, in tera-operations a second; "" where it predicts nothing."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self._shape, self._ceilings = shape, ceilings(device)

    def bf16(self) -> str:
        return self._rate("bf16_tflops", "bf16_ms", "int")

    def int8(self) -> str:
        return self._rate("int8_tops", "ms", "int")

    def fp8(self) -> str:
        return self._rate("fp8_tflops", "ms", "e4m3")

    def _rate(self, rate: str, time: str, format: str) -> str:
        if self._ceilings is None or getattr(self._ceilings, rate) is None:
            return ""
        m, n, k = self._shape
        try:
            expected = cost.product("gemm", self._shape, getattr(self._ceilings, rate), self._ceilings, format)
        except cost.NotModelled:
            return ""
        return f"{2e-9 * m * n * k / getattr(expected, time):.0f} ({self._ceilings.source})"


def launches(
    m: int, n: int, k: int, device: torch.device, format: str = "int"
) -> Iterator[tuple[str, str, bool, Callable[..., Tensor]]]:
    """(name, tag, whether dispatch selects it, launch) of everything that may be launched for the product, in the order of
    `fqt.candidates`; on a CPU, what the interpreter runs."""
    problem = dispatch.problem("scaled_mm", device, m, n, k, torch.float32, format=format)
    if device.type == "cpu":
        problem = replace(problem, force="triton")
        choice = dispatch.select(problem)
    else:
        choice = dispatch.choose("scaled_mm", device, m, n, k, torch.float32, format=format)
    selected = (choice.kernel, choice.config or (), choice.split_k)
    for candidate in candidates.candidates(problem):
        tag = "split" if candidate.split_k > 1 else candidate.kernel
        yield title(candidate), tag, candidate == selected, launcher(candidate, problem.processors)


def _fp8(x: list[Tensor], w: list[Tensor], prediction: str, counts: dict[str, float]) -> Iterator[Candidate]:
    """e4m3 codes with float32 scales per row and bf16 output: torch._scaled_mm, with fast accumulation, and fqt's own
    product where the device has one."""

    def scaled(t: Tensor) -> Operand:
        scale = t.float().abs().amax(1, keepdim=True) / 448.0
        return Operand((t.float() / scale).to(torch.float8_e4m3fn), scale, None, None)

    a, b = [scaled(t) for t in x], [scaled(t) for t in w]

    @functools.cache
    def expected(i: int) -> Tensor:
        return reference.mm(a[i].q.float(), b[i].q.float().t()) * a[i].scale * b[i].scale.t()

    def check(out: Tensor, i: int) -> str:
        return check_near(out, expected(i), FP8_BOUND)

    def run(i: int) -> Tensor:
        return torch._scaled_mm(a[i].q, b[i].q.t(), scale_a=a[i].scale, scale_b=b[i].scale.t(),
                                out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip

    device = x[0].device
    yield Candidate("torch._scaled_mm fp8 row-wise", run, check, **counts, **peer("torch._scaled_mm", device),
                    tag="_scaled_mm fp8")  # fmt: skip
    if not has_fp8(device):
        return
    (m, k), n = x[0].shape, w[0].shape[0]
    for name, _, selected, launch in launches(m, n, k, device, "e4m3"):
        yield Candidate(
            f"{name} e4m3{DISPATCHED * selected}",
            lambda i, launch=launch: launch(a[i].q, b[i].q, a[i].scale.flatten(), b[i].scale.flatten(),
                                            out_dtype=torch.bfloat16),
            check, **counts, prediction=prediction if selected else "", tag="fp8",
        )  # fmt: skip
