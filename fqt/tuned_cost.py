"""What a quantized linear layer is expected to gain over bf16 where each of its operators was tuned on the GPU: the times
that tuning took, added up, each scaled by the work. `fqt.conv_cost` does so for convolutions.

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import tuned
from .cost import _CODES, NotModelled, Pass, Prediction, Product, _products, traffic
from .dispatch import Problem
from .recipe import Recipe

if TYPE_CHECKING:
    from .tuned import Entry, Table


class NotTuned(NotModelled):
    """Operators, by the names of `Prediction`'s parts, that a table has no entry of, and products whose entry has no bf16.

    of: how many operators were asked for.
    """

    def __init__(self, missing: Mapping[str, Problem], alone: Sequence[str], of: int):
        self.missing, self.alone, self.of = dict(missing), list(alone), of
        names = [f"{name} in {p.dtype}" if p.op not in tuned.CODES_ONLY else name for name, p in missing.items()]
        parts = [f"{', '.join(names)} {'were' if len(names) > 1 else 'was'} not tuned"] * bool(names)
        if alone:
            were = "were" if len(alone) > 1 else "was"
            parts.append(f"{', '.join(alone)} {were} tuned without bf16, which `fqt tune` times")
        super().__init__(", ".join(parts))

    @property
    def lacks(self) -> int:
        """How many operators are of no use."""
        return len(self.missing) + len(self.alone)

    @property
    def partly(self) -> bool:
        """Whether at least half of the operators were tuned: less may be another layer's."""
        return 2 * len(self.missing) <= self.of


class Dtypes(NamedTuple):
    """Of a layer's X, W and dY, by their names in torch. Under autocast W is float32, dY is not."""

    x: str
    w: str
    dy: str

    @classmethod
    def of(cls, dtype: str | Dtypes) -> Dtypes:
        """Those of a layer of one dtype."""
        return cls(dtype, dtype, dtype) if isinstance(dtype, str) else dtype


def tuned_linear(
    m: int, n: int, k: int, recipe: Recipe, table: Table, dtype: str | Dtypes = "bfloat16", **gpu
) -> Prediction:
    """`linear` of the times in a tuned table, each scaled by the work to this very size; X, W and dY of `dtype`.

    gpu: device, arch, processors and triton of the `dispatch.Problem`.

    Raises:
        NotTuned: operators that the table does not have.   NotModelled: a recipe that tuning does not cover.
    """
    problems = operators(m, n, k, recipe, dtype, **gpu)
    ms = tuned_ms(problems, table)
    products = tuple(Product(name, shape, *ms[name]) for name, shape in _products(m, n, k).items())
    passes = tuple(
        Pass(name, problems[name].m * problems[name].n, size, ms[name][1])
        for name, (size, _) in traffic(recipe).items()
    )
    return Prediction(products, passes, _CODES[recipe.format], "tuned")


def operators(m: int, n: int, k: int, recipe: Recipe, dtype: str | Dtypes, **gpu) -> dict[str, Problem]:
    """What a training step of a layer asks dispatch for, by the names of `Prediction`'s parts. Raises NotModelled."""
    quantizers = (recipe.x, recipe.w, recipe.dgrad, recipe.wgrad)
    if None in quantizers or any(q.householder for q in quantizers):
        raise NotModelled(f"recipe {recipe} does more than tuned kernels do")
    if {recipe.dgrad.rounding, recipe.wgrad.rounding} != {"stochastic"}:
        raise NotModelled(f"recipe {recipe} does not quantize dY by the kernel that tuning measures")
    gpu |= {"format": recipe.format}
    of = Dtypes.of(dtype)
    found = {name: Problem("scaled_mm", *shape, **gpu) for name, shape in _products(m, n, k).items()}
    for name, (rows, columns), q, its in (("X", (m, k), recipe.x, of.x), ("W", (n, k), recipe.w, of.w)):
        kind = f"{q.granularity} {q.rounding} both"
        found[name] = Problem("quantize", rows, columns, dtype=its, kind=kind, **gpu)
    kind = f"{recipe.dgrad.granularity} {recipe.wgrad.granularity}"
    return found | {"dY": Problem("quantize_gradient", m, n, dtype=of.dy, kind=kind, **gpu)}


def tuned_ms(problems: Mapping[str, Problem], table: Table) -> dict[str, tuple[float, float]]:
    """Of each operator (bf16's time, ours), 0 for bf16 where it has no such operator. Raises NotTuned."""
    missing = {name: problem for name, problem in problems.items() if table.exact(problem) is None}
    alone = [name for name, problem in problems.items()
             if name not in missing and not tuned.is_complete(table.exact(problem))]  # fmt: skip
    if missing or alone:
        raise NotTuned(missing, alone, len(problems))
    return {name: _scaled_ms(problem, table.exact(problem)) for name, problem in problems.items()}


def _scaled_ms(problem: Problem, entry: Entry) -> tuple[float, float]:
    """The times of an entry, by the work."""
    sizes = ((p or 1) / (e or 1) for p, e in zip((problem.m, problem.n, problem.k), entry.exact, strict=True))
    scale = 1e-6 * math.prod(sizes)
    return scale * entry.bf16_ns, scale * entry.ranking[0].ns
