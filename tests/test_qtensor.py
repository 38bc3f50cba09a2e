"""Laws of a quantized matrix: its values, and its two sides as operands."""

import laws
import pytest
import torch

from fqt import reference
from fqt.qtensor import QTensor
from fqt.recipe import GRANULARITIES, Quantizer


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("zero", ["symmetric", "min"])
def test_either_layout_dequantizes_to_code_times_scale_plus_offset(granularity, zero):
    t = reference.quantize(torch.randn(5, 7), Quantizer(8, granularity, zero), cols=True)
    scale, offset = t.scale.expand(5, 7), None if t.offset is None else t.offset.expand(5, 7)
    for m in range(5):
        for n in range(7):
            value = t.q[m, n].float() * scale[m, n]
            assert t.dequantize()[m, n] == (value if offset is None else value + offset[m, n])
    laws.assert_same(t._replace(q=None).dequantize(), t.dequantize())
    laws.assert_same(t._replace(qt=None).dequantize(), t.dequantize())


def test_rows_and_columns_are_operands_whose_last_dimension_is_contracted():
    x = torch.randn(5, 7)
    t = reference.quantize(x, Quantizer(8, "per_row", "min"), sums=True)
    a = t.rows()
    assert a.q is t.q and a.sum is t.row_sum
    assert torch.equal(a.scale, t.scale[:, 0]) and torch.equal(a.offset, t.offset[:, 0])
    t = reference.quantize(x, Quantizer(8, "per_column", "symmetric"), cols=True, sums=True)
    b = t.cols()
    assert b.q is t.qt and b.sum is t.col_sum and b.offset is None and t.rows().offset is None
    assert torch.equal(b.scale, t.scale[0])


def test_a_product_of_columns_is_that_of_the_transposed_matrix():
    """wgrad: dYᵀ X from the transposed codes of both; see the bound in test_reference."""
    g, x = torch.randn(9, 5), torch.randn(9, 4)
    a = reference.quantize(g, Quantizer(8, "per_column", "min"), cols=True, sums=True)
    b = reference.quantize(x, Quantizer(8, "per_tensor", "grid"), cols=True, sums=True)
    exact = a.dequantize().double().t() @ b.dequantize().double()
    # Offsets are of the size of the values, so no term is much larger than Σ|a||b| + K·max|a|·max|b|.
    size = 9 * float(a.dequantize().abs().max() * b.dequantize().abs().max())
    assert float((reference.scaled_mm(a.cols(), b.cols()).double() - exact).abs().max()) <= 4 * 12 * laws.EPS * size


def test_a_quantized_matrix_is_a_tuple_without_sums_unless_asked_for():
    q = torch.zeros(2, 3, dtype=torch.int8)
    t = QTensor(q, None, torch.ones(1, 1), None)
    assert t.row_sum is None and t.col_sum is None and torch.equal(t.dequantize(), torch.zeros(2, 3))
