"""The operators `fqt::…`: opcheck, any strides, fake equal to real, and their errors."""

import itertools

import pytest
import torch
from laws import poisoned, random_state
from torch.library import opcheck

from fqt import dispatch, gradients, ops, products, reference
from fqt.qtensor import Operand
from fqt.recipe import Quantizer, Recipe

RECIPES = ("qat8", "int8", "fp8", "ptq8", "psq4", "bhq4")


def layouts(x):
    """The same matrix in memory of other strides, surrounded by NaN where there is a surrounding."""
    yield "contiguous", x.clone()
    yield "transposed", x.t().contiguous().t()
    yield "strided", poisoned(x)
    yield "offset", torch.cat([torch.full_like(x[:, :1], float("nan")), x], 1)[:, 1:]


def linear_arguments(recipe, x, w, bias, save=True):
    r = Recipe.parse(recipe)
    t = ops.quantize_weight(w.detach(), r, transposed=True)
    pieces = (t.q, t.qt, t.scale, t.offset, t.row_sum, t.col_sum)
    return (x, w, bias, *pieces, random_state(1).to(x.device), str(r), x.dtype, save)


def backward_arguments(recipe, dy, forward, needs=(True, True, True)):
    _, x_qt, x_scale, x_offset, x_sum = ops.linear(*forward)
    w_qt, w_scale, w_offset, w_sum = forward[4], forward[5], forward[6], forward[8]
    f32 = torch.float32
    return (
        dy,
        x_qt,
        x_scale,
        x_offset,
        x_sum,
        w_qt,
        w_scale,
        w_offset,
        w_sum,
        forward[9],
        0,
        forward[10],
        f32,
        f32,
        f32,
        *needs,
    )


@pytest.mark.parametrize(
    ("granularity", "zero", "rounding"),
    [("per_row", "symmetric", "stochastic"), ("per_tensor", "grid", "nearest"), ("per_column", "min", "stochastic")],
)
@pytest.mark.parametrize("shape", [(5, 9), (1, 7), (6, 1), (0, 3), (3, 0)])
def test_quantize_passes_opcheck(granularity, zero, rounding, shape, device):
    x = torch.randn(*shape, device=device)
    rng = random_state().to(device)
    for rows, cols, sums in ((True, False, False), (False, True, True), (True, True, True)):
        opcheck(ops.quantize, (x, 6, granularity, zero, rounding), dict(rng=rng, rows=rows, cols=cols, sums=sums))


@pytest.mark.parametrize("offsets", [False, True])
def test_scaled_mm_passes_opcheck(offsets, device):
    q = Quantizer(8, "per_tensor", "grid" if offsets else "symmetric")
    a = reference.quantize(torch.randn(5, 9, device=device), q, sums=True).rows()
    b = reference.quantize(torch.randn(7, 9, device=device), q, sums=True).rows()
    bias = torch.randn(7, device=device)
    for out_dtype in (torch.float32, torch.bfloat16):
        opcheck(ops.scaled_mm, (a.q, b.q, a.scale, b.scale, a.offset, b.offset, a.sum, b.sum, bias, out_dtype))


def test_quantize_and_scaled_mm_of_the_optional_arguments_pass_opcheck(device):
    x = torch.randn(5, 9, device=device)
    row_absmax = x.abs().amax(1).view(torch.int32)
    opcheck(ops.quantize, (x, 8, "per_row", "symmetric", "nearest"), dict(cols=True, row_absmax=row_absmax))
    for format in ("int", "e4m3"):
        # opcheck's own arithmetic on what an operator takes and returns does not know float8.
        utils = ["test_schema"] * (format == "int") + ["test_faketensor", "test_autograd_registration"]
        a = reference.quantize(x, Quantizer(8, "per_row", format=format))
        out = torch.zeros(5, dtype=torch.int32, device=device)
        opcheck(ops.scaled_mm, (a.q, a.q, a.scale.flatten(), a.scale.flatten()), dict(row_absmax=out), test_utils=utils)
        opcheck(
            ops.quantize, (x, 8, "per_row", "symmetric", "nearest"), dict(cols=True, format=format), test_utils=utils
        )


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_from_a_product_quantize_it_as_its_own_would(out_dtype, device):
    """The producer's row maxima are those of C as stored, so that the codes and scales of C are the same bits."""
    a, b = (reference.quantize(torch.randn(n, 40, device=device), Quantizer(8, "per_row")) for n in (13, 21))
    found = torch.zeros(13, dtype=torch.int32, device=device)
    c = ops.scaled_mm(a.q, b.q, a.scale.flatten(), b.scale.flatten(), out_dtype=out_dtype, row_absmax=found)
    own, given = (ops.quantize(c, 8, "per_row", "symmetric", "nearest", cols=True, row_absmax=r) for r in (None, found))
    for x, y in zip(own, given, strict=True):
        assert torch.equal(x, y)


def test_strided_row_maxima_and_random_state_are_read_as_they_are(device):
    x = torch.randn(6, 40)
    table = torch.stack([x.abs().amax(1).view(torch.int32), torch.zeros(6, dtype=torch.int32)], 1)
    rng = torch.tensor([[5, 7], [1, 2]])
    found = []
    for backend, at in (("reference", "cpu"), ("triton", device)):
        strided = dict(rng=rng.to(at)[:, 0], row_absmax=table.to(at)[:, 0])
        with dispatch.backend(backend):
            found.append(ops.quantize(x.to(at), 8, "per_row", "symmetric", "stochastic", **strided))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("change, error, says", [
    (dict(row_absmax=torch.zeros(4, dtype=torch.int32)), ValueError, "row_absmax"),
    (dict(row_absmax=torch.zeros(5)), ValueError, "row_absmax"),
    (dict(row_absmax=torch.zeros(5, dtype=torch.int32), zero="min"), ValueError, "symmetric"),
    (dict(row_absmax=torch.zeros(5, dtype=torch.int32), granularity="per_tensor"), ValueError, "per_tensor"),
    (dict(row_absmax=torch.zeros(5, dtype=torch.int32), granularity="per_column"), ValueError, "per_row"),
    (dict(format="e5m2"), ValueError, "e5m2"),
    (dict(format="e4m3", sums=True), ValueError, "sums"),
    (dict(format="e4m3", bits=7), ValueError, "8 bits"),
])  # fmt: skip
def test_quantize_refuses_what_does_not_go_together(change, error, says):
    arguments = dict(bits=8, granularity="per_row", zero="symmetric", rounding="nearest") | change
    with pytest.raises(error, match=says):
        ops.quantize(torch.randn(5, 9), **arguments)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("m", [0, 1, 6])
def test_linear_passes_opcheck(recipe, m, device):
    w = torch.randn(4, 9, device=device, requires_grad=True)
    bias = torch.randn(4, device=device, requires_grad=True)
    every = itertools.product((True, False), (bias, None)) if m > 1 else ((True, bias), (False, None))
    for x_grad, b in every:
        x = torch.randn(m, 9, device=device, requires_grad=x_grad)
        opcheck(ops.linear, linear_arguments(recipe, x, w, b))
    opcheck(
        ops.linear, linear_arguments(recipe, torch.randn(m, 9, device=device), w.detach(), bias.detach(), save=False)
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, False)])
def test_linear_backward_passes_opcheck(recipe, needs, device):
    w, x = torch.randn(4, 9, device=device), torch.randn(6, 9, device=device)
    forward = linear_arguments(recipe, x, w, None)
    opcheck(ops.linear_backward, backward_arguments(recipe, torch.randn(6, 4, device=device), forward, needs))


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_and_its_backward_do_not_depend_on_strides(recipe, device):
    """opcheck alone lets a wrong transposed input through: values over all layouts of X, W and dY."""
    x, w, dy = torch.randn(6, 9, device=device), torch.randn(4, 9, device=device), torch.randn(6, 4, device=device)
    expected = None
    for (name_x, xs), (name_w, ws), (name_dy, dys) in itertools.product(layouts(x), layouts(w), layouts(dy)):
        forward = linear_arguments(recipe, xs, ws, None)
        got = (*ops.linear(*forward), *ops.linear_backward(*backward_arguments(recipe, dys, forward)))
        expected = expected or got
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            if i == 7 or (recipe == "qat8" and i in (5, 6)):
                # Plain float32 sums of at most 9 products or terms below 20, in an order that torch picks by stride.
                torch.testing.assert_close(a, b, rtol=0, atol=9 * 20 * 2.0**-24)
            else:
                assert torch.equal(a, b), (i, name_x, name_w, name_dy)


def test_scaled_mm_does_not_depend_on_strides(device):
    a = torch.randint(-128, 128, (6, 20), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (7, 20), dtype=torch.int8, device=device)
    exact = (a.long().cpu() @ b.long().cpu().t()).float()
    one = torch.ones(1, device=device)

    def views(q):
        yield q
        yield q.t().contiguous().t()
        yield torch.stack([q, q + 1], 2)[:, :, 0]
        yield torch.cat([q, q], 1)[:, :20]

    for backend in ("reference", "triton"):
        from fqt.dispatch import backend as force

        with force(backend):
            for va, vb in itertools.product(views(a), views(b)):
                assert torch.equal(ops.scaled_mm(va, vb, one, one).cpu(), exact), backend


def test_outputs_never_share_memory():
    """An operator's outputs must be its own: a transposed copy of one row or one column is a copy too."""
    for shape in ((1, 7), (7, 1), (1, 1)):
        q, qt, *_ = ops.quantize(torch.randn(*shape), 8, "per_row", "symmetric", "nearest", cols=True)
        assert q.data_ptr() != qt.data_ptr()


def test_backward_advances_the_step_once_and_leaves_the_key(device):
    forward = linear_arguments("psq4", torch.randn(6, 9, device=device), torch.randn(4, 9, device=device), None)
    key, step = forward[9].tolist()
    ops.linear_backward(*backward_arguments("psq4", torch.randn(6, 4, device=device), forward))
    assert forward[9].tolist() == [key, step + 1]


def test_dgrad_and_wgrad_draw_independent_bits():
    """The two quantizations of one dY must not share bits: their codes' rounding errors are uncorrelated."""
    dy = torch.randn(64, 64)
    errors = []
    for stream in (gradients.DGRAD, gradients.WGRAD):
        q = Quantizer(4, "per_tensor", "symmetric", "stochastic")
        errors.append(products.quantized(dy, q, rng=random_state(), stream=stream).dequantize() - dy)
    correlation = torch.corrcoef(torch.stack([e.flatten() for e in errors]))[0, 1]
    assert abs(float(correlation)) < 5 / 64  # 4096 pairs: standard deviation 1/64


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x, q: ops.quantize(x[0], 8, "per_row", "min", "nearest"), TypeError, "matrix"),
        (lambda x, q: ops.quantize(q, 8, "per_row", "min", "nearest"), TypeError, "int8"),
        (lambda x, q: ops.quantize(x, 9, "per_row", "min", "nearest"), ValueError, "bits"),
        (lambda x, q: ops.quantize(x, 8, "per_group", "min", "nearest"), ValueError, "per_group"),
        (lambda x, q: ops.quantize(x, 8, "per_row", "min", "stochastic"), ValueError, "rng"),
        (lambda x, q: ops.quantize(x, 8, "per_row", "min", "nearest", multiplier=x), ValueError, "multiplier"),
        (lambda x, q: ops.scaled_mm(x, q, x[0, :1], x[0, :1]), TypeError, "float32"),
        (lambda x, q: ops.scaled_mm(q, q[:, 1:], x[0, :1], x[0, :1]), ValueError, "last dimension"),
        (lambda x, q: ops.scaled_mm(q, q, x[0, :2], x[0, :1]), ValueError, "a_scale"),
        (lambda x, q: ops.scaled_mm(q, q, x[0, :1], x[0, :1], x[0, :1]), ValueError, "sum"),
        (lambda x, q: ops.scaled_mm(q, q, x[0, :1], x[0, :1], bias=x[0, :4]), ValueError, "bias"),
    ],
)
def test_bad_arguments_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.randn(5, 9), torch.zeros(5, 9, dtype=torch.int8))


def test_a_gradient_that_nothing_was_saved_for_is_an_error():
    x, w = torch.randn(6, 9), torch.randn(4, 9, requires_grad=True)
    y = ops.linear(*linear_arguments("int8", x, w, None, save=False))[0]
    with pytest.raises(RuntimeError, match="nothing was saved"):
        y.sum().backward()


def test_product_without_scale_is_scale_one():
    a = Operand(torch.ones(2, 3, dtype=torch.int8), torch.ones(1), None, None)
    assert torch.equal(products.product(a, a._replace(scale=None)), torch.full((2, 2), 3.0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_waits_for_the_device(recipe):
    """Forward and backward in plain torch never read a value on the host: fake tensors have none to give."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    r = Recipe.parse(recipe)
    with FakeTensorMode():
        x, w, dy = torch.empty(200, 9), torch.empty(4, 9), torch.empty(200, 4)
        random = {"rng": torch.zeros(2, dtype=torch.int64), "rank": 0}
        xq = reference.quantize(x, r.x, cols=True, sums=True)
        wq = reference.quantize(w, r.w, cols=True, sums=True)
        assert products.product(xq.rows(), wq.rows()).shape == (200, 4)
        assert gradients.input_gradient(dy, wq, r, torch.float32, **random).shape == (200, 9)
        assert gradients.weight_gradient(dy, xq, r, torch.float32, **random).shape == (4, 9)
