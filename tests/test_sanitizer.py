"""Every kernel under the sanitizer of the interpreter, and that the sanitizer finds what it looks for."""

import importlib
import pkgutil
import warnings

import pytest
import sanitizer
import torch
import triton
import triton.language as tl
from sanitizer import Sanitizer

import fqt_kernels
from fqt import doctor, selftest

pytestmark = [pytest.mark.interpreted, pytest.mark.unsanitized]  # on a GPU: python -m fqt_bench.sanitize

MODULES = [
    importlib.import_module(f"fqt_kernels.{module.name}")
    for module in pkgutil.iter_modules(fqt_kernels.__path__)
    if module.name not in ("_gluon", "gemm_hopper")  # the interpreter does not run Gluon
]
MODULES = [module for module in MODULES if hasattr(module, "torch")]
CHECKS = list(selftest.kernel_checks(torch.device("cpu"), interpreter=True))


@pytest.mark.parametrize("kernel", sorted({check.kernel for check in CHECKS}))
def test_a_kernel_reaches_its_memory_in_order_and_programs_may_run_in_any(kernel):
    """Up to eight checks of `fqt doctor`; programs of every second from the last to the first, of others shuffled."""
    launches, checks = 0, [check for check in CHECKS if check.kernel == kernel]
    for number, check in enumerate(checks[:: -(-len(checks) // 8)]):
        under = Sanitizer(MODULES, sanitizer.backwards if number % 2 else sanitizer.shuffled(number))
        with under as found:
            verdict = doctor._verdict(check)
        assert verdict["ok"], f"{check.case}: {verdict['message']}"
        launches += under.launches.get(kernel, 0)
        assert not sanitizer.wrong(found), f"{check.case}: {found}"
    assert launches


# ---- planted faults: a kernel of few programs on `memory`, 64 float32 and what else it needs


def run(kernel, *tensors, grid=4, modules=(), order=sanitizer.in_order, **constants):
    with Sanitizer(modules, order) as found:
        kernel[(grid,)](*tensors, **constants)
    return found


def memory(n: int = 64) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)


@triton.jit
def _shifted_kernel(x_ptr, out_ptr, SHIFT: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(x_ptr + at + SHIFT, mask=at + SHIFT < N, other=0.0))


def test_an_address_outside_of_the_tensors_is_found():
    with pytest.raises(Exception, match="load outside of the launch's tensors"):
        run(_shifted_kernel, memory(), memory(), SHIFT=8, N=72)
    with pytest.raises(Exception, match="load outside of the launch's tensors"):
        run(_shifted_kernel, memory(), memory(), SHIFT=-1, N=64)
    with pytest.raises(Exception, match="store outside of the launch's tensors"):
        run(_shifted_kernel, memory(), memory(), grid=5, SHIFT=0, N=64)
    assert run(_shifted_kernel, memory(), memory(), SHIFT=8, N=64) == []


def test_an_address_between_the_elements_of_a_view_is_found():
    view = memory(96).view(32, 3)[:, :2]
    found = run(_shifted_kernel, view, memory(), SHIFT=0, N=64)
    assert len(found) == 1 and "between or beside the elements" in found[0]


@triton.jit
def _whole_word_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load((x_ptr.to(tl.int64) + 2).to(tl.pointer_type(tl.float32))))


def test_an_address_that_is_no_multiple_of_the_size_is_found():
    assert any("no multiple" in f for f in run(_whole_word_kernel, memory(), memory(), grid=1))


@triton.jit
def _half_kernel(out_ptr, copy_ptr, LAST: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, at.to(tl.float32), mask=at < 8)
    tl.store(copy_ptr + at, tl.load(out_ptr + at, mask=at < LAST, other=0.0))


class Launchers:
    """As a module of launchers."""

    torch = torch

    def launch(self, last: int) -> None:
        _half_kernel[(1,)](self.torch.empty(16), self.torch.empty_like(memory(16)), LAST=last)


@pytest.mark.parametrize("last", [8, 9])
def test_a_load_of_what_nothing_has_stored_is_found(last):
    launchers = Launchers()
    with Sanitizer([launchers]) as found:
        launchers.launch(last)
    assert any("load of what nothing has stored" in f for f in found) == (last == 9)
    assert launchers.torch is torch


def test_memory_that_torch_has_filled_may_be_loaded():
    launchers = Launchers()
    with Sanitizer([launchers]) as found:
        _shifted_kernel[(4,)](launchers.torch.empty(64).zero_(), memory(), SHIFT=0, N=64)
        second = launchers.torch.empty(64)
        _shifted_kernel[(4,)](memory(), second, SHIFT=0, N=64)  # and what an earlier launch has
        _shifted_kernel[(4,)](second, memory(), SHIFT=0, N=64)
    assert found == []


# ---- order between programs


@triton.jit
def _same_kernel(out_ptr, KIND: tl.constexpr):
    me = tl.program_id(0)
    if KIND == "store":
        tl.store(out_ptr, me.to(tl.float32))
    elif KIND == "load":
        tl.store(out_ptr + 1 + me, tl.load(out_ptr + 2))
    elif KIND == "add":
        tl.atomic_add(out_ptr, 1.0, sem="relaxed")
    elif KIND == "own":
        tl.store(out_ptr + me, tl.load(out_ptr + 32 + me))
    else:
        tl.atomic_add(out_ptr, 1.0, sem="relaxed")
        tl.store(out_ptr + 1 + me, tl.load(out_ptr))


@pytest.mark.parametrize("order", [sanitizer.in_order, sanitizer.backwards, sanitizer.shuffled(3)])
def test_programs_that_share_a_byte_without_an_order_are_found(order):
    def found(kind: str) -> list[str]:
        return run(_same_kernel, memory(), order=order, KIND=kind)

    assert any("store to what another program stores" in f for f in found("store"))
    assert any("another program" in f for f in found("load"))
    assert any("another program" in f for f in found("peek"))
    assert found("add") == [] and found("own") == []


@triton.jit
def _ticket_kernel(parts_ptr, ticket_ptr, out_ptr, BARRIER: tl.constexpr, SEM: tl.constexpr, LAST: tl.constexpr):
    """The last to arrive adds up what all have stored."""
    at = tl.program_id(0) * 512 + tl.arange(0, 512)
    tl.store(parts_ptr + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem=SEM) == LAST:
        total = tl.zeros((512,), tl.float32)
        for i in range(4):
            total += tl.load(parts_ptr + i * 512 + tl.arange(0, 512))
        tl.store(out_ptr + tl.arange(0, 512), total)


@pytest.mark.parametrize(
    ("barrier", "sem", "last", "right"),
    [(True, "acq_rel", 3, True), (False, "acq_rel", 3, False), (True, "relaxed", 3, False), (True, "release", 3, False),
     (True, "acquire", 3, False), (True, "acq_rel", 2, False)],
)  # fmt: skip
def test_the_last_to_arrive_needs_a_barrier_a_release_and_an_acquire(barrier, sem, last, right):
    """And must be the last: of three of four, the fourth's part is not there, or stored meanwhile."""
    for order in (sanitizer.in_order, sanitizer.backwards, sanitizer.shuffled(1)):
        tensors = torch.zeros(2048), torch.zeros(1, dtype=torch.int32), torch.zeros(512)
        found = run(_ticket_kernel, *tensors, order=order, BARRIER=barrier, SEM=sem, LAST=last)
        assert (found == []) == right, found


@triton.jit
def _added_kernel(sum_ptr, ticket_ptr, out_ptr, BARRIER: tl.constexpr, SEM: tl.constexpr, TAKE: tl.constexpr):
    """All add to the same sum, which the last to arrive loads or takes away."""
    at = tl.arange(0, 512)
    tl.atomic_add(sum_ptr + at, at + tl.program_id(0), sem="relaxed")
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem=SEM) == 3:
        if TAKE:
            tl.store(out_ptr + at, tl.atomic_xchg(sum_ptr + at, at * 0, sem="relaxed"))
        else:
            tl.store(out_ptr + at, tl.load(sum_ptr + at))


@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize(
    ("barrier", "sem", "right"), [(True, "acq_rel", True), (False, "acq_rel", False), (True, "acquire", False)]
)
def test_what_all_have_added_up_needs_the_same(barrier, sem, right, take):
    for order in (sanitizer.in_order, sanitizer.shuffled(1)):
        tensors = (
            torch.zeros(512, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(512, dtype=torch.int32),
        )
        found = run(_added_kernel, *tensors, order=order, BARRIER=barrier, SEM=sem, TAKE=take)
        assert (found == []) == right, found
        assert tensors[2].tolist() == [4 * i + 6 for i in range(512)]  # one after the other they are right all the same


@triton.jit
def _read_by_all_kernel(x_ptr, out_ptr):
    me = tl.program_id(0)
    if me < 3:
        tl.store(out_ptr + me, tl.load(x_ptr))
    else:
        tl.store(x_ptr, 1.0)


@pytest.mark.parametrize("order", [sanitizer.in_order, sanitizer.backwards])
def test_a_store_to_what_several_programs_load_is_found(order):
    assert any("another program" in f for f in run(_read_by_all_kernel, memory(), memory(), order=order))


# ---- order within a program


@triton.jit
def _turned_kernel(x_ptr, out_ptr, BARRIER: tl.constexpr, FIRST: tl.constexpr):
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    if FIRST == "load":
        tl.store(out_ptr + i * 32 + j, tl.load(x_ptr + j * 32 + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i * 32 + j, (i * 0 + j).to(tl.float32))
    if FIRST == "store":
        if BARRIER:
            tl.debug_barrier()
        tl.store(out_ptr + i * 32 + j, tl.load(x_ptr + j * 32 + i))


@pytest.mark.parametrize("first", ["load", "store"])
def test_threads_of_a_program_need_a_barrier_between_a_store_and_a_load(first):
    assert any("other threads" in f for f in run(_turned_kernel, memory(1024), memory(1024), grid=1, BARRIER=False,
                                                 FIRST=first))  # fmt: skip
    assert run(_turned_kernel, memory(1024), memory(1024), grid=1, BARRIER=True, FIRST=first) == []


@triton.jit
def _increased_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + 1)


def test_a_thread_may_store_what_it_has_loaded_unless_others_have_loaded_it_too():
    assert run(_increased_kernel, memory(512), grid=1, N=512) == []
    assert any("other threads" in f for f in run(_increased_kernel, memory(64), grid=1, N=64))


@triton.jit
def _collapsed_kernel(out_ptr, value_ptr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at // 2, tl.load(value_ptr + at))


def test_one_address_with_two_values_is_found():
    same = memory().div(2, rounding_mode="floor")
    assert run(_collapsed_kernel, memory(), same, grid=1) == []
    assert any("two values" in f for f in run(_collapsed_kernel, memory(), memory(), grid=1))


# ---- hints and extents


@triton.jit
def _hinted_kernel(out_ptr, start):
    start = tl.multiple_of(start, 16)
    tl.store(out_ptr + start + tl.arange(0, 16), 0.0)


def test_a_hint_that_is_not_true_is_found():
    assert run(_hinted_kernel, memory(), 32, grid=1) == []
    assert run(_hinted_kernel, memory(), 24, grid=1) == ["_hinted_kernel: tl.multiple_of says 16, the value is 24"]


@triton.jit
def _far_kernel(x_ptr, n, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x_ptr + row * n + tl.arange(0, 16), 1.0)


def test_an_offset_that_leaves_int32_is_found_at_the_corners_of_a_large_grid():
    """Of memory that is never touched but there: three rows in the middle and two at either end are 64 bytes each."""
    x = torch.empty((1 << 20) + 1, 2112, dtype=torch.bfloat16)  # 2.2e9 elements
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the overflow
        assert run(_far_kernel, x, 2112, grid=len(x), order=sanitizer.corners, WIDE=True) == []
        with pytest.raises(Exception, match="store outside of the launch's tensors"):
            run(_far_kernel, x, 2112, grid=len(x), order=sanitizer.corners, WIDE=False)


def test_what_is_patched_is_as_before():
    before = torch.randn(16)
    with pytest.raises(ZeroDivisionError), Sanitizer(MODULES):
        raise ZeroDivisionError
    assert all(module.torch is torch for module in MODULES)
    out = torch.zeros(16)
    _shifted_kernel[(1,)](before, out, SHIFT=0, N=16)
    assert torch.equal(out, before)
