"""The suites of `fqt bench`: which cases each has, by device, the most wanted first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from fqt.suites import CONVOLUTIONS, SUITES, Convolution

from . import (
    cases,
    conv_pieces,
    convs,
    householder,
    layers,
    operators,
    optim,
    parameters,
    products,
    psgd,
    resnet50,
    train,  # fmt: skip
)
from .harness import Case, Effort, Timer, repeat
from .providers import has_fp8

NAMES = ("smoke", "kernels", "layers", "optim", "train", "householder", "conv")
FAMILIES = ("exact", "qat8", "ptq8", "psq8", "bhq8", "int8", "fp8")  # a recipe of each


@dataclass(frozen=True)
class Plan:
    """A case that is built when its turn comes, and the seconds without which it is not begun.

    first: it comes before all that are not, of all suites. key: the list of the result that it adds to: "cases", and build()
    gives the Case to measure, or "memory", "repeats", "launches", and build(timer=…, refused=…) gives the entries; refused:
    why a candidate of this name is not to be run.
    """

    suite: str
    shape: str
    needs_s: float
    build: Callable[..., Any]
    key: str = "cases"
    effort: Effort | None = None  # None: the run's
    first: bool = False


HUGE, LARGE, SMALL = ((n, n, n) for n in (16384, 8192, 4096))
W13, W2 = (8192, 28672, 4096), (8192, 4096, 14336)  # Llama-8B, 8192 tokens
VIT = (50432, 4096, 1024)  # ViT-L/16, batch 256, the wide layer
SPLIT = (1024, 1024, 65536)  # the weight gradient of a narrow layer
STEP = (8192, 4096, 4096)
# Where int8 begins to pay: shapes of networks at several sizes, and odd and small ones, where it is expected to lose.
NETWORKS = ("llama-8b", "bert-large", "vit-large")
FRONTIER = tuple(dict.fromkeys((m, n, k) for name in ("cubes", *NETWORKS) for _, m, n, k in SUITES[name]))
ODD = ((4095, 4095, 4095), (1000, 1000, 1000), (64, 4096, 4096), (8192, 64, 1024), (512, 1024, 1024), (128, 128, 128))
# The products of a backward pass, dX = dY W and dW = dYᵀ X, of the networks' layers at one number of rows each.
BACKWARD = tuple(dict.fromkeys(shape for name in NETWORKS for _, m, n, k in SUITES[name] if m in (8192, 50432)
                               for shape in ((m, k, n), (n, k, m)) if shape not in FRONTIER))  # fmt: skip
PIECES = tuple(
    next(c for c in CONVOLUTIONS["ResNet-50"] if c.name == name)
    for name in ("layer3.conv2", "layer2.0.conv2", "layer3.conv1")
)  # 3x3, 3x3 with stride 2, 1x1
# Each of the ways that the kernels compute a convolution, without and with stride, and groups of a channel.
TINY_CONVS = (Convolution("stem", 16, 3, 12, 16, 7, 2, first=True), Convolution("strided", 16, 16, 8, 32, 3, 2),
              Convolution("1x1", 16, 16, 8, 32, 1), Convolution("depthwise", 16, 16, 8, 16, 3, groups=16))  # fmt: skip
SMALL_CONVS = (Convolution("3x3", 8, 32, 14, 32, 3), Convolution("3x3 strided", 8, 32, 14, 64, 3, 2),
               Convolution("1x1", 8, 64, 14, 32, 1), Convolution("stem", 8, 3, 32, 32, 7, 2, first=True))  # fmt: skip
BRIEF = Effort(rounds=30, min_rounds=8, limit_s=0.5, warm_up_s=0.1)
BRIEFER = replace(BRIEF, rounds=20, limit_s=0.4)
LAST = (BRIEF, BRIEFER)  # efforts of what is measured last, in this order
DENSE = Effort(rounds=40, min_rounds=7, limit_s=10, warm_up_s=0.1, warm_up_rounds=1)  # whose products take a second
SMOKE = Effort(rounds=15, min_rounds=5, limit_s=1.2, warm_up_s=0.05, warm_up_rounds=1)
SMOKE_CONVS = Effort(rounds=5, min_rounds=3, limit_s=0.2, warm_up_s=0.0, warm_up_rounds=1)  # each: there are several


def plans(suites: Sequence[str], device: torch.device, quick: bool, only: str = "*") -> list[Plan]:
    """What the suites consist of on the device; quick: the smaller shapes alone. only: a pattern, with * and ? as in file
    names, that occurs in "SUITE SHAPE" of a case. What is at the end is skipped when the time runs out."""
    made = _on_gpu if device.type == "cuda" else _on_cpu
    found: dict[tuple[str, str], Plan] = {}
    for suite in suites:
        for plan in _smoke(device) if suite == "smoke" else made(suite, device, quick):
            found.setdefault((plan.suite, plan.shape), plan)
    wanted = [plan for plan in found.values() if fnmatchcase(f"{plan.suite} {plan.shape}", f"*{only}*")]
    return sorted(
        wanted, key=lambda plan: -1 if plan.first else LAST.index(plan.effort) + 1 if plan.effort in LAST else 0
    )


def _plan(build: Callable[..., Any], suite: str, shape: Sequence[int], needs_s: float, device: torch.device,
          **fields: Any) -> Plan:  # fmt: skip
    return Plan(suite, "x".join(map(str, shape)), needs_s, functools.partial(build, *shape, device), **fields)


def _entries(key: str, shape: Sequence[int], needs_s: float, device: torch.device, build: Callable[..., Any],
             of: str = "") -> Plan:  # fmt: skip
    title = f"{key} of {of}" if of else key
    return Plan(title, "x".join(map(str, shape)), needs_s, functools.partial(build, shape, device), key)


def _smoke(device: torch.device) -> list[Plan]:
    """Every operator once, small."""
    size, names = (256, 256, 256), [name for name in FAMILIES if _runs(name, device)]
    linear = functools.partial(_linear, names=names)
    return [
        _plan(operators.quantize, "quantize", size[:2], 1, device, effort=SMOKE),
        _plan(operators.product, "gemm", size, 1, device, effort=SMOKE),
        _plan(linear, "linear fwd+bwd", size, 2, device, effort=SMOKE),
        _plan(_conversion, "convert", (4, 128, 128), 1, device, effort=SMOKE),
        _householder(size, 2, device, effort=SMOKE),
        _psgd(parameters.TINY, torch.float32, 1, device, effort=SMOKE, brief=True),
        *(_conv(of, 1, device, effort=SMOKE_CONVS, compiled=False, sets=1) for of in TINY_CONVS),
    ]


def _runs(recipe: str, device: torch.device) -> bool:
    """Whether the device computes the recipe: float8 on a GPU needs one that has it, the CPU backend has everything."""
    return recipe != "fp8" or device.type == "cpu" or has_fp8(device)


def _linear(m: int, n: int, k: int, device: torch.device, sets: int = 2, names: Sequence[str] | None = None):
    return layers.linear(m, n, k, device, sets, dtype=operators.work_dtype(device), names=names)


def _conversion(count: int, n: int, k: int, device: torch.device, sets: int = 1):
    return operators.conversion(n, device)


def _householder(shape: Sequence[int], needs_s: float, device: torch.device, source: str = householder.SOURCES[0],
                 effort: Effort | None = None, **parts: bool) -> Plan:  # fmt: skip
    build = functools.partial(householder.case, source=source, **parts)
    return _plan(build, householder.title(source), shape, needs_s, device, effort=effort)


def _conv(of: Convolution, needs_s: float, device: torch.device, network: str = "", effort: Effort | None = None,
          **options: Any) -> Plan:  # fmt: skip
    """Of a whole layer."""
    build = functools.partial(convs.case, of, device, network=network, **options)
    return Plan(convs.title(network), convs.size(of), needs_s, build, effort=effort)


def _pieces(of: Convolution, needs_s: float, device: torch.device, effort: Effort | None = None) -> list[Plan]:
    """Of a layer's kernels, one by one."""
    made = [(conv_pieces.QUANTIZE, functools.partial(conv_pieces.quantize, of, device))]
    made += [(conv_pieces.title(name), functools.partial(conv_pieces.product, name, of, device))
             for name in conv_pieces.PRODUCTS]  # fmt: skip
    return [Plan(title, convs.size(of), needs_s, build, effort=effort) for title, build in made]


def _conv_entries(key: str, of: Convolution, needs_s: float, device: torch.device) -> Plan:
    """ "repeats" or "launches" of a layer."""
    count = {"repeats": _repeats_of_conv, "launches": _launches_of_conv}[key]
    return Plan(f"{key} of {convs.SUITE}", convs.size(of), needs_s, functools.partial(count, of, device), key)


def _psgd(of: parameters.Parameters, dtype: torch.dtype, needs_s: float, device: torch.device,
          effort: Effort | None = None, **parts: bool) -> Plan:  # fmt: skip
    build = functools.partial(_single, functools.partial(psgd.case, **parts), (of, dtype), device)
    return Plan(psgd.title(of, dtype), of.size, needs_s, build, effort=effort)


def _launches_of_psgd(of: parameters.Parameters, dtype: torch.dtype, needs_s: float, device: torch.device) -> Plan:
    build = functools.partial(_launches_of_a_step, of, dtype, device)
    return Plan(f"launches of {psgd.title(of, dtype)}", of.size, needs_s, build, "launches")


def _first(*made: Plan) -> list[Plan]:
    return [replace(plan, first=True) for plan in made]


def _on_cpu(suite: str, device: torch.device, quick: bool) -> list[Plan]:
    """Small shapes of the CPU backend, which is made to be exact and readable, not fast."""
    if suite == "kernels":
        return [
            _plan(operators.product, "gemm", (512, 512, 512), 2, device),
            _plan(operators.quantize, "quantize", (512, 1024), 3, device),
        ]
    if suite == "layers":
        shape = (512, 512, 512)
        return [
            _plan(functools.partial(_linear, names=FAMILIES), "linear fwd+bwd", shape, 5, device),
            _entries("repeats", shape, 2, device, _repeats_of_layers, "linear fwd+bwd"),
        ]
    if suite == "householder":
        large, others = (4096, 1024, 1024), householder.SOURCES[1:]
        sizes = {(128, 512, 512): 15, (512, 512, 512): 20, (2048, 1024, 1024): 40, large: 60}
        return [*(_householder(shape, needs_s, device, effort=DENSE) for shape, needs_s in sizes.items()),
                *(_householder(large, 20, device, source, DENSE, authors=False) for source in others)]  # fmt: skip
    if suite == "conv":
        first = SMALL_CONVS[0]
        return [*(_conv(of, 3, device) for of in SMALL_CONVS), *_pieces(first, 3, device),
                _conv_entries("repeats", first, 2, device)]  # fmt: skip
    small = (parameters.SMALL_RESNET50, parameters.SMALL_LLAMA) if suite == "optim" else ()
    return [*(_psgd(of, torch.float32, 15, device) for of in small),
            *_steps(suite, device, ((1024, 1024),), ((128, 256, 3),), ((8, 32, 128, 2),)),
            *([_resnet50(16, 32, 40, device, width=8, title=f"{resnet50.TITLE} an eighth as wide")]
              if suite == "train" else [])]  # fmt: skip


def _on_gpu(suite: str, device: torch.device, quick: bool) -> list[Plan]:
    def gemm(shape: Sequence[int], needs_s: float) -> Plan:
        return _plan(products.gemm, "gemm", shape, needs_s, device)

    def linear(shape: Sequence[int], needs_s: float) -> Plan:
        return _plan(layers.linear, "linear fwd+bwd", shape, needs_s, device)

    def quantize(shape: Sequence[int], needs_s: float) -> Plan:
        return _plan(cases.quantize, "quantize", shape, needs_s, device)

    if suite == "kernels":
        repeats = [_entries("repeats", shape, 6, device, _repeats_of_products, "gemm") for shape in (SPLIT, STEP)]
        if quick:
            return [gemm(SMALL, 15), quantize(SMALL[:2], 10), *repeats, _householder(SMALL, 8, device, authors=False)]
        brief = functools.partial(products.gemm, every=False)
        frontier = [_plan(brief, "gemm", shape, 2, device, effort=effort)
                    for effort, shapes in ((BRIEF, (*ODD, *FRONTIER)), (BRIEFER, BACKWARD)) for shape in shapes]  # fmt: skip
        return [*_first(gemm(LARGE, 15), gemm(SMALL, 10), quantize(LARGE[:2], 15), *repeats, gemm(HUGE, 20)),
                gemm(W13, 12), gemm(W2, 12), gemm(SPLIT, 10), quantize(SMALL[:2], 8), quantize((32768, 1024), 8),
                *(_householder(shape, 10, device, authors=False) for shape in (LARGE, SMALL)), *frontier]  # fmt: skip
    if suite == "layers":
        entries = [_entries("memory", STEP, 5, device, _memory),
                   _entries("repeats", STEP, 6, device, _repeats_of_layers, "linear fwd+bwd")]  # fmt: skip
        if quick:
            return [linear(SMALL, 15), *entries]
        brief = functools.partial(layers.linear, names=("int8",), peers=False)
        # The reference checks the three products in float32, three times each: some 10¹³ operations a second in all.
        frontier = [_plan(brief, "linear fwd+bwd", shape, 2 + 6e-13 * math.prod(shape), device, effort=BRIEF)
                    for shape in (*ODD, *FRONTIER)]  # fmt: skip
        # torchao tunes its kernel anew for each product of each shape.
        wanted = ((LARGE, 25), (W13, 25), (W2, 20), (SMALL, 15))
        return [*_first(*(linear(shape, needs_s) for shape, needs_s in wanted), *entries), linear(VIT, 15),
                _entries("launches", STEP, 8, device, _launches), *frontier]  # fmt: skip
    if suite == "householder":
        if quick:
            return [_householder(SMALL, 15, device)]
        # The authors fill their matrices on the CPU: seconds for one of 16384 rows.
        against, largest = {LARGE: 40, SMALL: 15, W13: 40, W2: 40}, (16384, 4096, 4096)
        return [*(_householder(shape, needs_s, device) for shape, needs_s in against.items()),
                *(_householder(LARGE, 10, device, source, authors=False) for source in householder.SOURCES[1:]),
                *(_householder(shape, 6, device, effort=BRIEF, authors=False) for shape in FRONTIER
                  if shape not in (*against, largest)), _householder(largest, 90, device, effort=BRIEF)]  # fmt: skip
    if suite == "conv":
        entries = [_conv_entries(key, of, 4, device) for key in ("repeats", "launches") for of in PIECES]
        pieces = [plan for of in PIECES for plan in _pieces(of, 4, device, BRIEF)]
        of_network = {name: [_conv(of, 4, device, name, BRIEF) for of in all_] for name, all_ in CONVOLUTIONS.items()}
        if quick:
            return [*(_conv(of, 6, device, "ResNet-50") for of in PIECES), *entries]
        return [*entries, *of_network["ResNet-50"], *pieces, *of_network["ResNet-18"]]
    if suite == "train":
        mlp, encoder = ((4096, 2048, 4), ()) if quick else ((8192, 4096, 4), ((16, 512, 1024, 4),))
        image = (64, 128) if quick else (256, 224)
        return [*_steps(suite, device, (), (mlp,), encoder), _resnet50(*image, 30, device)]
    nets = (parameters.RESNET50,) if quick else (parameters.LLAMA_8B, parameters.RESNET50)
    each = [plan(of, torch.float32, s, device) for of in nets for plan, s in ((_psgd, 15), (_launches_of_psgd, 8))]
    step = _steps(suite, device, ((4096, 4096),), (), ())
    if quick:
        return [*each, *step]
    return [*each, *step, _psgd(parameters.LLAMA_8B, torch.bfloat16, 15, device),
            *_steps(suite, device, ((14336, 4096),), (), ())]  # fmt: skip


def _steps(suite: str, device: torch.device, weights: Sequence, mlps: Sequence, encoders: Sequence) -> list[Plan]:
    """Of the suites optim and train."""
    if suite == "optim":
        made = [(optim.step, "optimizer step", shape, (optim.LAYERS, *shape)) for shape in weights]
    else:
        made = [(train.mlp, "train mlp", shape, shape) for shape in mlps]
        made += [(train.encoder, "train encoder", shape, shape) for shape in encoders]
    return [Plan(name, "x".join(map(str, title)), 15 if device.type == "cuda" else 4,
                 functools.partial(_single, build, shape, device)) for build, name, shape, title in made]  # fmt: skip


def _resnet50(
    batch: int, edge: int, needs_s: float, device: torch.device, title: str = resnet50.TITLE, **options: Any
) -> Plan:
    build = functools.partial(_single, functools.partial(resnet50.case, title=title, **options), (batch, edge), device)
    return Plan(title, f"{batch}x3x{edge}x{edge}", needs_s, build)


def _single(build: Callable[..., Any], shape: Sequence[int], device: torch.device, sets: int = 1):
    """A case that changes its own state, and so has one set of inputs."""
    return build(*shape, device)


# ---- what is counted beside the cases


def _memory(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    from .cuda import memory

    return layers.memory(*shape, device, memory, refused)


def _repeats_of_products(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    return repeat(products.gemm(*shape, device, sets=1), timer, refused)


def _repeats_of_layers(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    names = None if device.type == "cuda" else FAMILIES
    return repeat(_linear(*shape, device, sets=1, names=names), timer, refused)


def _repeats_of_conv(of: Convolution, device: torch.device, timer: Timer, refused: Mapping[str, str]):
    return repeat(convs.case(of, device, sets=1, compiled=False), timer, refused)


def _launches_of_conv(of: Convolution, device: torch.device, timer: Timer, refused: Mapping[str, str]):
    from .cuda import launches

    return case_launches(launches, convs.case(of, device, sets=1, compiled=False), refused)


def _launches(shape: tuple[int, int, int], device: torch.device, timer: Timer, refused: Mapping[str, str]):
    from .cuda import launches

    return layer_launches(launches, device, shape, refused)


def layer_launches(count: Callable[[Callable[[], object]], dict[str, Any]], device: torch.device,
                   shape: tuple[int, int, int], refused: Mapping[str, str] = {}) -> list[dict[str, Any]]:  # fmt: skip
    """The launches of one forward and backward of nn.Linear and of ours."""
    case = layers.linear(*shape, device, sets=1)
    wanted = tuple(c for c in case.candidates if c.ours or c.name == case.baseline)
    return case_launches(count, replace(case, candidates=wanted), refused)


def _launches_of_a_step(of: parameters.Parameters, dtype: torch.dtype, device: torch.device, timer: Timer,
                        refused: Mapping[str, str]) -> list[dict[str, Any]]:  # fmt: skip
    from .cuda import launches

    return case_launches(launches, psgd.case(of, dtype, device), refused)


def case_launches(count: Callable[[Callable[[], object]], dict[str, Any]], case: Case,
                  refused: Mapping[str, str] = {}) -> list[dict[str, Any]]:  # fmt: skip
    """The launches of a run of each candidate that can run, once it is warm; counts do not vary from run to run."""
    found = []
    for candidate in (c for c in case.candidates if not c.missing and c.name not in refused):
        try:
            for _ in range(3):
                candidate.run(0)
        except Exception:  # which the case that times it reports
            continue
        found.append({"name": candidate.name, "shape": case.shape, **count(lambda run=candidate.run: run(0))})
    return found
