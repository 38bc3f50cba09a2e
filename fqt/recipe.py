"""Recipes: which quantizer each operand of the three matrix products of a layer goes through.

    fprop  Y  = X  Wᵀ      operands x, w        (contracts K, the input features)
    dgrad  dX = dY W       operands dgrad, w    (contracts N, the output features)
    wgrad  dW = dYᵀ X      operands wgrad, x    (contracts M, the samples)

This module imports nothing but the standard library, so that the command line can check a recipe's name without torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass

GRANULARITIES = ("per_tensor", "per_row", "per_column")
ZEROS = ("symmetric", "grid", "min")
ROUNDINGS = ("nearest", "stochastic")
FORMATS = ("int", "e4m3")
GROUPS = ("global", "tile")
RANGES = ("exact", "bound", "delayed")


@dataclass(frozen=True)
class Quantizer:
    """How a matrix becomes 8-bit codes with x ≈ q * scale (+ offset).

    Args:
        bits: 2 to 8. The codes lie in [-(2**(bits-1)-1), 2**(bits-1)-1] (symmetric) or [-2**(bits-1), 2**(bits-1)-1].
        granularity: what shares a scale: "per_tensor", "per_row" (a sample of X or dY, an output channel of W) or
            "per_column" (an output channel of dY).
        zero: "symmetric" (no offset), "min" (affine between minimum and maximum, the papers' form), or "grid" (affine,
            the range stretched so that zero is itself a code and exact zeros stay exact; StatQuant's published code).
        rounding: "nearest" (ties to even) or "stochastic" (unbiased).
        householder: block Householder transform of the rows before quantizing (BHQ); per_row only.
        format: "int", or "e4m3": codes are float8_e4m3fn numbers up to 448, symmetric, bits 8.
        groups: of the householder transform: "global", rows of the whole matrix (the paper's form), or "tile", rows of each
            128, so that the inverse is part of the matrix product.
        auto: transform only the groups whose predicted variance that lowers; the others are quantized per sample (PSQ).
        range: where the ranges come from: "exact", found in the values themselves; see `fqt.ranges` for the others.

    Raises:
        ValueError: a field is out of range, or fields that exclude each other are combined.

    Source: StatQuant (arXiv 2010.14298) sections 3 and 4.
    """

    bits: int = 8
    granularity: str = "per_tensor"
    zero: str = "symmetric"
    rounding: str = "nearest"
    householder: bool = False
    format: str = "int"
    groups: str = "global"
    auto: bool = False
    range: str = "exact"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        for field, allowed in (("granularity", GRANULARITIES), ("zero", ZEROS), ("rounding", ROUNDINGS),
                               ("format", FORMATS), ("groups", GROUPS), ("range", RANGES)):  # fmt: skip
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if self.householder and self.granularity != "per_row":
            raise ValueError(f"householder needs granularity 'per_row', got {self.granularity!r}")
        if not self.householder and (self.groups != "global" or self.auto):
            raise ValueError(f"groups and auto belong to the householder transform, got {self}")
        if self.range != "exact" and (self.zero != "symmetric" or self.granularity == "per_column" or self.householder):
            raise ValueError(f"range {self.range!r} goes with symmetric codes per tensor or per row, got {self}")
        if self.format == "e4m3" and (self.bits != 8 or self.zero != "symmetric" or self.householder):
            raise ValueError(f"e4m3 codes have 8 bits, are symmetric and take no householder transform, got {self}")


@dataclass(frozen=True)
class Recipe:
    """A quantizer, or None for full precision, for each operand of the three matrix products.

    x and w are rounded to nearest, so that the forward pass is a deterministic function of the batch (StatQuant,
    theorem 1); dgrad and wgrad quantize the output gradient dY for the matrix product of that name, and None leaves that
    product in full precision (quantization-aware training). With x and w None the layer is an ordinary `nn.Linear`.

    A scale that lies on a contracted index cannot be factored out of an integer matrix product. It is folded into dY
    before dY is quantized: dgrad then quantizes dY·s_w (w per row), wgrad quantizes s_x·dY (x per row).

    Equal recipes compare equal and hash alike. `Recipe.parse` reads a name or `to_json`'s text.

    Raises:
        ValueError: a combination that no integer matrix product can compute.
    """

    x: Quantizer | None = None
    w: Quantizer | None = None
    dgrad: Quantizer | None = None
    wgrad: Quantizer | None = None

    def __post_init__(self) -> None:
        if (self.x is None) != (self.w is None):
            raise ValueError("x and w are quantized both or not at all")
        if self.x is None and (self.dgrad is not None or self.wgrad is not None):
            raise ValueError("quantized gradients need quantized x and w")
        for name in ("x", "w"):
            q = getattr(self, name)
            if q is None:
                continue
            if q.rounding != "nearest" or q.householder or q.range != "exact":
                raise ValueError(
                    f"{name} is rounded to nearest, has an exact range and no householder transform, got {q}"
                )
            if q.granularity == "per_column" or (q.granularity == "per_row" and q.zero != "symmetric"):
                raise ValueError(f"{name} is per_tensor, or per_row and symmetric, got {q}")
        if self.dgrad is not None and self.dgrad.granularity == "per_column":
            raise ValueError("dgrad contracts the columns of dY: its quantizer is per_tensor or per_row")
        if self.wgrad is not None and self.wgrad.granularity == "per_row":
            raise ValueError("wgrad contracts the rows of dY: its quantizer is per_tensor or per_column")
        quantizers = [q for q in (self.x, self.w, self.dgrad, self.wgrad) if q is not None]
        formats = {q.format for q in quantizers}
        if len(formats) > 1:
            raise ValueError(f"the operands of a product have one format, got {' and '.join(sorted(formats))}")
        # Asked for several times in a layer's step, and traced by torch.compile, which cannot trace a cached_property.
        object.__setattr__(self, "_affine", any(q.zero != "symmetric" or q.householder for q in quantizers))

    @property
    def is_exact(self) -> bool:
        return self.x is None

    @property
    def affine(self) -> bool:
        """Whether sums of codes are needed: an operand has an offset, or rows of no range are put back after dgrad."""
        return self._affine

    @property
    def format(self) -> str:
        """The format of all codes, "int" or "e4m3"."""
        return "int" if self.x is None else self.x.format

    @property
    def name(self) -> str:
        """The short name ("psq5"), or "custom" where no named recipe is equal to this one."""
        return _names().get(self, "custom")

    def __str__(self) -> str:
        return self.name if self.name != "custom" else self.to_json()

    def as_qat(self) -> Recipe:
        """The same forward pass with full-precision gradients: what this recipe's gradient is an unbiased estimate of."""
        return dataclasses.replace(self, dgrad=None, wgrad=None)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Raises ValueError where the text is no recipe: bad JSON, an unknown or missing field, a value out of range."""
        try:
            fields = json.loads(text)
            if sorted(fields) != sorted(f.name for f in dataclasses.fields(Recipe)):
                raise TypeError(f"its fields must be {', '.join(f.name for f in dataclasses.fields(Recipe))}")
            return Recipe(**{k: None if v is None else Quantizer(**v) for k, v in fields.items()})
        except (TypeError, AttributeError, json.JSONDecodeError) as e:
            raise ValueError(f"not a recipe: {text!r} ({e})") from e

    @staticmethod
    def exact() -> Recipe:
        """Full precision."""
        return Recipe()

    @staticmethod
    def qat(bits: int = 8) -> Recipe:
        """Quantization-aware training: X and W per tensor, `bits` bits, zero on the grid; gradients in full precision."""
        q = Quantizer(bits, "per_tensor", "grid")
        return Recipe(x=q, w=q)

    @staticmethod
    def ptq(bits: int = 8, zero: str = "grid") -> Recipe:
        """Fully quantized, the gradient of dgrad per tensor (PTQ). zero="min" is the paper's min/max form."""
        return _statquant(Quantizer(bits, "per_tensor", zero, "stochastic"))

    @staticmethod
    def psq(bits: int = 8) -> Recipe:
        """Fully quantized, the gradient of dgrad per sample (PSQ), min/max."""
        return _statquant(Quantizer(bits, "per_row", "min", "stochastic"))

    @staticmethod
    def bhq(bits: int = 8, groups: str = "global") -> Recipe:
        """Fully quantized, the gradient of dgrad through the block Householder quantizer (BHQ).

        groups="tile" forms the groups within each 128 rows, which is faster and spreads a large row less.
        """
        return _statquant(Quantizer(bits, "per_row", "min", "stochastic", householder=True, groups=groups))

    @staticmethod
    def auto(bits: int = 8, groups: str = "global") -> Recipe:
        """As `bhq`, but group by group PSQ where its predicted variance is no larger; decided on the device."""
        return _statquant(Quantizer(bits, "per_row", "min", "stochastic", householder=True, groups=groups, auto=True))

    @staticmethod
    def int8() -> Recipe:
        """Made for speed: symmetric 8-bit codes throughout, X per sample, W per output channel, scales folded into dY."""
        row = Quantizer(8, "per_row", "symmetric")
        return Recipe(
            x=row,
            w=row,
            dgrad=Quantizer(8, "per_row", "symmetric", "stochastic"),
            wgrad=Quantizer(8, "per_column", "symmetric", "stochastic"),
        )

    @staticmethod
    def fp8() -> Recipe:
        """As `int8`, in float8_e4m3fn codes: for GPUs that multiply these faster, or have no fast integers (sm_103)."""
        made = {f.name: getattr(Recipe.int8(), f.name) for f in dataclasses.fields(Recipe)}
        return Recipe(**{name: dataclasses.replace(q, format="e4m3") for name, q in made.items()})

    @staticmethod
    def parse(spec: str | Recipe) -> Recipe:
        """A recipe from its name ("psq5", "psq-5"), its JSON text, or a recipe as it is.

        Raises:
            TypeError: neither a string nor a Recipe.   ValueError: an unknown name; the message lists the valid ones.
        """
        if isinstance(spec, Recipe):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"a recipe is a name or a fqt.Recipe, got {type(spec).__name__}")
        return _parse(spec)


def _statquant(dgrad: Quantizer) -> Recipe:
    """The paper's recipe: 8-bit per-tensor X and W, 8-bit stochastic per-tensor dY for wgrad, `dgrad` for dgrad."""
    qat = Recipe.qat(8)
    return dataclasses.replace(qat, dgrad=dgrad, wgrad=Quantizer(8, "per_tensor", "grid", "stochastic"))


@functools.cache
def _named() -> dict[str, Recipe]:
    named = {"exact": Recipe.exact(), "qat8": Recipe.qat(8), "int8": Recipe.int8(), "fp8": Recipe.fp8()}
    for bits in range(8, 1, -1):
        named |= {f"ptq{bits}": Recipe.ptq(bits), f"psq{bits}": Recipe.psq(bits)}
        named |= {f"bhq{bits}": Recipe.bhq(bits), f"auto{bits}": Recipe.auto(bits)}
        named |= {f"{name}{bits}-tile": getattr(Recipe, name)(bits, "tile") for name in ("bhq", "auto")}
    return named


@functools.cache
def _names() -> dict[Recipe, str]:
    return {recipe: name for name, recipe in _named().items()}


@functools.lru_cache(maxsize=256)
def _parse(spec: str) -> Recipe:
    if spec.lstrip().startswith("{"):
        return Recipe.from_json(spec)
    named = _named()
    name = "auto8" if spec == "auto" else re.sub(r"^(qat|ptq|psq|bhq|auto)-(\d+)", r"\1\2", spec)
    if name not in named:
        raise ValueError(
            f"unknown recipe {spec!r}. Valid: exact, qat8, int8, fp8, ptq2..ptq8, psq2..psq8, bhq2..bhq8, "
            "auto2..auto8 (auto is auto8; also written ptq-4), bhq and auto with -tile (bhq5-tile), or a fqt.Recipe"
        )
    return named[name]
