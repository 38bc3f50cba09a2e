"""The networks of the end-to-end benchmark, and the ways of training them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import llama, peers, resnet50, train
from .cases import gaussian
from .operators import work_dtype
from .parameters import BLOCKS
from .providers import peer
from .wholes import COMPILED, EXACT

NETWORKS = ("llama", "resnet50")
NO_CONVOLUTIONS = "torchao has int8 training of linear layers, and no convolutions"
SMALL = llama.Sizes(width=64, inner=128, heads=4, kv_heads=2)  # of --quick


class Work(NamedTuple):
    """A network and the batch that it is trained on.

    layers: its blocks, None where their number is fixed.   unit, items: what a step works on, and how many.   parameters:
    their number.   flops: of a step.   compiled(model): the model with its forward compiled.   lacks: by the tag of a way,
    why it cannot be trained in that.
    """

    name: str
    title: str
    shape: str
    layers: int | None
    unit: str
    items: int
    parameters: int
    flops: float
    network: train.Network
    compiled: Callable[[nn.Module], nn.Module]
    lacks: dict[str, str]


def llama_stack(layers: int, tokens: int, device: torch.device, quick: bool = False) -> Work:
    """Blocks of the widths of Llama 3 8B on one sequence of so many tokens; labels that a linear map of the inputs gives."""
    sizes = SMALL if quick else llama.Sizes()
    dtype = work_dtype(device)
    x = gaussian(1, tokens, sizes.width, device=device, seed=0, dtype=dtype)
    teacher = gaussian(sizes.width, train.CLASSES, device=device, seed=1, dtype=dtype)

    def build(device: torch.device = device) -> nn.Module:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            return llama.Llama(layers, tokens, sizes, train.CLASSES).to(dtype)

    network = train.Network(build, x, (x @ teacher).argmax(-1), train.LR / sizes.width)
    parameters, flops = _counted(build(torch.device("meta")), x)
    flops += llama.attention_flops(layers, 1, tokens, sizes)
    title = f"{layers} block{'s' * (layers > 1)} of {'a small Llama' if quick else 'Llama-8B'}"
    return Work("llama", title, f"{tokens}x{sizes.width}", layers, "tokens", tokens, parameters, flops, network,
                _blocks_compiled, {})  # fmt: skip


def resnet50_images(batch: int, device: torch.device, quick: bool = False) -> Work:
    """ResNet-50 on images of 224 x 224 pixels, in channels_last memory; see `resnet50.case`."""
    width, blocks, edge = (8, (1, 1, 1, 1), 32) if quick else (64, BLOCKS, 224)
    network = resnet50.network(batch, edge, device, width, blocks)
    with torch.device("meta"):
        parameters, flops = _counted(resnet50.ResNet(width, blocks, resnet50.CLASSES), network.x)
    return Work("resnet50", "a small ResNet" if quick else "ResNet-50", f"{batch}x3x{edge}x{edge}", None, "images", batch,
                parameters, flops, network, peers.compiled, {"torchao": NO_CONVOLUTIONS})  # fmt: skip


def _counted(model: nn.Module, x: Tensor) -> tuple[int, float]:
    """(parameters, operations of the layers' products in a step) of a model on the meta device: 2 for each multiplication of
    the forward product, of the weight gradient's, and of the input gradient's where the input has one."""
    total = 0.0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += 2.0 * out.numel() * layer.weight[0].numel() * (2 + inputs[0].requires_grad)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(add)
    dtype = next(model.parameters()).dtype
    model(torch.empty(x.shape, dtype=dtype, device="meta"))
    return sum(p.numel() for p in model.parameters()), total


def _blocks_compiled(model: llama.Llama) -> llama.Llama:
    """Block by block, since all have the same graph: compiling the whole takes as many times as long."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = peers.compiled(block)
    return model


def ways(work: Work, device: torch.device) -> Sequence[train.Way]:
    """Of training it, the most wanted first. The first is what the others' progress is compared with."""
    exact, int8 = train.full_precision(device), train.quantized("int8")
    compiler = peer("torch.compile", device)

    def compiled(convert: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        return lambda model: work.compiled(convert(model))

    torchao = train.Way("torchao int8 mixed precision, torch.compile", compiled(train.with_torchao), train.ALLOWED,
                        {**peer("torchao", device), "tag": "torchao"})  # fmt: skip
    found = [
        exact._replace(allowed=train.ALLOWED, fields={**exact.fields, "tag": EXACT}),
        train.Way(f"{exact.title}, torch.compile", work.compiled, train.ALLOWED, {**compiler, "tag": COMPILED}),
        int8,
        train.quantized("psq8"),
        torchao,
        train.quantized("bhq5"),
        train.Way(f"{int8.title}, torch.compile", compiled(int8.convert), train.ALLOWED,
                  {"missing": compiler["missing"], "tag": "int8 compiled"}),
    ]  # fmt: skip
    return [
        way._replace(
            fields={**way.fields, "missing": work.lacks.get(way.fields["tag"]) or way.fields.get("missing", "")}
        )
        for way in found
    ]


def make(name: str, device: torch.device, *, layers: int, tokens: int, batch: int, quick: bool) -> Work:
    """The network of that name."""
    if name == "llama":
        return llama_stack(layers, tokens, device, quick)
    return resnet50_images(batch, device, quick)
