"""Fixtures shared by all tests. Without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import functools
import inspect
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

import pytest
from triton.language.core import is_builtin
from triton.runtime import interpreter

# One thread for each of the processes that share the machine, if pytest-xdist runs several.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(torch.get_num_threads(), 2))


@functools.cache
def _builtins(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: object, builder: object, scope: object) -> None:
    """The interpreter's own looks through all members of Triton's language at every call of every device function, a
    third of its time. The names of the builtins among them do not change."""
    for name in _builtins(package):
        if is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtin


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU if there is one, else the CPU, in the interpreter."""
    return DEVICE


@pytest.fixture
def guard(monkeypatch):
    """guard(*modules): what these modules of launchers allocate lies between guard bands, poison where nothing is written.

    Returns the `laws.GuardedTorch` they allocate from; that nothing outside was written is asserted when the test ends.
    """
    import laws

    guarded = laws.GuardedTorch()

    def replace_torch(*modules):
        for module in modules:
            monkeypatch.setattr(module, "torch", guarded)
        return guarded

    yield replace_torch
    guarded.check()


@pytest.fixture(scope="module")
def one_thread():
    """As demo, studies and benchmarks compute on a CPU: sums have one order, and no thread waits for another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same seeds, torch's and fqt's."""
    import fqt

    torch.manual_seed(0)
    fqt.manual_seed(0)


def pytest_collection_modifyitems(items):
    if DEVICE != "cpu":
        skip = pytest.mark.skip(reason="where there is a GPU kernels are not interpreted here")
        for item in items:
            if item.get_closest_marker("interpreted"):
                item.add_marker(skip)


if DEVICE == "cpu":
    _may_launch = True
    _execute = interpreter.GridExecutor.__call__

    def _checked(self, *args, **kwargs):
        assert _may_launch, (
            f"{self.fn.__name__} is launched on CPU tensors, which fails where there is a GPU: the test needs the fixture "
            "`device`, for where its tensors are, or the mark `interpreted`"
        )
        return _execute(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = _checked

    @pytest.fixture(autouse=True)
    def _launches_where_it_says(request):
        """A test that launches kernels has asked where."""
        global _may_launch
        _may_launch = "device" in request.fixturenames or request.node.get_closest_marker("interpreted") is not None
        yield
        _may_launch = True


if "FQT_SANITIZE" in os.environ and DEVICE == "cpu":

    @pytest.fixture(autouse=True)
    def _sanitized(request):
        """Every launch of every test under `sanitizer.Sanitizer`: FQT_SANITIZE=1 pytest, for a new kernel; twice as slow."""
        import sanitizer

        if request.node.get_closest_marker("unsanitized"):
            yield
            return
        with sanitizer.Sanitizer() as found:
            yield
        assert not sanitizer.wrong(found), found
