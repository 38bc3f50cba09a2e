"""The case of a matrix product: C = A Bᵀ of quantized operands."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fqt import cost, dispatch, reference
from fqt.qtensor import Operand

from .cases import BF16_BOUND, ROW, ceilings, gaussian, has_fp8, quantize_exactly
from .harness import Candidate, Case, check_equal, check_near, check_rounded

FP8_BOUND = 1e-2  # fast accumulation keeps fewer bits than float32
DISPATCHED = " (dispatch)"  # marks the configuration that dispatch selects
MAX_SPLIT = 16


def gemm(m: int, n: int, k: int, device: torch.device, sets: int = 2) -> Case:
    """The kernels with every configuration of their tables, against torch.matmul in bf16, torch._int_mm, and
    torch._scaled_mm in fp8 with scales per row where the GPU has fp8. Small outputs are also split along K."""
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
        ops, 2.0 * m * k + 2.0 * n * k + out_bytes, ours=False, prediction=expectation.bf16(), tag="bf16",
    )  # fmt: skip
    int_mm = Candidate(
        "torch._int_mm (int32 out)",
        lambda i: torch._int_mm(a[i].q, b[i].q.t()),
        lambda out, i: check_equal(out, reference.int_mm(a[i].q, b[i].q)),
        **{**counts, "bytes": counts["bytes"] + out_bytes}, ours=False, tag="_int_mm",
    )  # fmt: skip
    expected = functools.cache(lambda i: reference.scaled_mm(a[i], b[i]))
    candidates = [matmul, int_mm]
    if has_fp8(device):
        candidates += _fp8(x, w, expectation.fp8(), counts)
    for name, tag, selected, launch in _launches(m, n, k, device):
        candidates.append(
            Candidate(
                f"{name}{DISPATCHED * selected}",
                lambda i, launch=launch: launch(a[i].q, b[i].q, a[i].scale, b[i].scale, out_dtype=torch.bfloat16),
                lambda out, i: check_rounded(out, expected(i)),
                **counts, prediction=expectation.int8() if selected else "", tag=tag, same_bits="int8",
            )
        )  # fmt: skip
    return Case("gemm", f"{m}x{n}x{k}", "TOPS", matmul.name, tuple(candidates), sets)


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


def config_table(device: torch.device, format: str = "int") -> list[tuple[int, ...]]:
    """The portable kernel's configurations for the device's kind of GPU; the CPU's interpreter runs those of sm_90."""
    from fqt_kernels.gemm import CONFIGS, FP8_CONFIGS

    arch = dispatch.device_info(str(device))[0] if device.type == "cuda" else "sm90"
    table = CONFIGS if format == "int" else FP8_CONFIGS
    family = "amd" if arch.startswith("gfx") else {"sm103": "sm100"}.get(arch, arch)
    return table.get(family) or next(iter(table.values()))  # the first is safe everywhere


def split_for(m: int, n: int, k: int, config: tuple[int, ...], processors: int) -> int:
    """Parts of K that give each processor a tile of its own, 1 where there are tiles enough."""
    tiles = -(-m // config[0]) * -(-n // config[1])
    return max(1, min(processors // tiles, -(-k // config[2]) // 8, MAX_SPLIT))


def _launches(
    m: int, n: int, k: int, device: torch.device, format: str = "int"
) -> Iterator[tuple[str, str, bool, functools.partial]]:
    """(name, tag, whether dispatch selects it, launch) of each configuration of the portable kernel, also split along K
    where its tiles are fewer than the processors, and of the kernel for Hopper."""
    from fqt_kernels import gemm, gemm_hopper

    arch, processors = dispatch.device_info(str(device)) if device.type == "cuda" else ("", 1)
    choice = dispatch.select(dispatch.problem("scaled_mm", device, m, n, k, torch.float32, format=format))
    for config in (c for c in config_table(device, format) if gemm.fits(c, n)):
        selected = choice.split_k if (choice.kernel, choice.config) == ("portable", config) else 0
        can_split = format == "int" and not arch.startswith("gfx")
        for split_k in sorted({1, split_for(m, n, k, config, processors) if can_split else 1, selected or 1}):
            name = f"scaled_mm {_title(config)}{f' split {split_k}' if split_k > 1 else ''}"
            launch = functools.partial(gemm.scaled_mm, config=config, split_k=split_k)
            yield name, "portable" if split_k == 1 else "split", split_k == selected, launch
    if format == "int" and gemm_hopper.reason_against(arch, m, n, k) is None:
        for config in gemm_hopper.CONFIGS:
            launch = functools.partial(gemm_hopper.scaled_mm, config=config, processors=processors)
            yield f"hopper {_title(config)}", "hopper", (choice.kernel, choice.config) == ("hopper", config), launch


def _title(config: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, config[:3]))} w{config[3]} s{config[4]}"


def _fp8(x: list[Tensor], w: list[Tensor], prediction: str, counts: dict[str, float]) -> Iterator[Candidate]:
    """e4m3 codes with float32 scales per row and bf16 output: the peer, with fast accumulation, and fqt's own product."""

    def scaled(t: Tensor) -> Operand:
        scale = t.float().abs().amax(1, keepdim=True) / 448.0
        return Operand((t.float() / scale).to(torch.float8_e4m3fn), scale, None, None)

    a, b = [scaled(t) for t in x], [scaled(t) for t in w]

    def check(out: Tensor, i: int) -> str:
        return check_near(
            out, reference.mm(a[i].q.float(), b[i].q.float().t()) * a[i].scale * b[i].scale.t(), FP8_BOUND
        )

    def peer(i: int) -> Tensor:
        return torch._scaled_mm(a[i].q, b[i].q.t(), scale_a=a[i].scale, scale_b=b[i].scale.t(),
                                out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip

    yield Candidate("torch._scaled_mm fp8 row-wise", peer, check, **counts, ours=False, tag="_scaled_mm fp8")
    (m, k), n = x[0].shape, w[0].shape[0]
    for name, _, selected, launch in _launches(m, n, k, x[0].device, "e4m3"):
        yield Candidate(
            f"{name} e4m3{DISPATCHED * selected}",
            lambda i, launch=launch: launch(a[i].q, b[i].q, a[i].scale.flatten(), b[i].scale.flatten(),
                                            out_dtype=torch.bfloat16),
            check, **counts, prediction=prediction if selected else "", tag="fp8",
        )  # fmt: skip
