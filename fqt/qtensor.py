"""A quantized matrix, and one operand of an integer matrix product."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operand(NamedTuple):
    """One side of a matrix product `A Bᵀ`: (R, K) codes, int8 or float8_e4m3fn, whose last dimension is contracted.

    scale (R or 1,) and offset (R or 1,) are those of the rows, None for 1 and for 0; sum (R,) int32 is the sum of each
    row's codes, needed only where the other side has an offset.
    """

    q: Tensor
    scale: Tensor | None
    offset: Tensor | None
    sum: Tensor | None


class QTensor(NamedTuple):
    """A quantized (M, N) matrix: x ≈ q * scale (+ offset).

    q (M, N) are the codes, int8 or float8_e4m3fn, qt (N, M) the same codes transposed; either may be absent. scale and
    offset (absent when symmetric) are float32, or float64 for a float64 matrix, of shape (1, 1), (M, 1) or (1, N). row_sum
    (M,) and col_sum (N,) int32 are sums of the codes, absent unless asked for.
    """

    q: Tensor | None
    qt: Tensor | None
    scale: Tensor
    offset: Tensor | None
    row_sum: Tensor | None = None
    col_sum: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The (M, N) matrix q * scale (+ offset), in the dtype of scale."""
        q = self.q if self.q is not None else self.qt.t()
        x = q.to(self.scale.dtype) * self.scale
        return x if self.offset is None else x + self.offset

    def rows(self) -> Operand:
        """As an operand whose contracted dimension is the columns. The scale must not vary along them."""
        return Operand(
            self.q, self.scale.flatten(), None if self.offset is None else self.offset.flatten(), self.row_sum
        )

    def cols(self) -> Operand:
        """As an operand whose contracted dimension is the rows: the transposed codes."""
        return Operand(
            self.qt, self.scale.flatten(), None if self.offset is None else self.offset.flatten(), self.col_sum
        )
