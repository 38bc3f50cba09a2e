"""A GPU that is not there: tensors that say they are on an H100, and a driver of Triton's that launches nothing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from fqt.cli import UsageError

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20, name="make-believe H100")


@contextlib.contextmanager
def pretended(launch: Callable[..., object] | None = None) -> Iterator[None]:
    """Within the context every tensor says that it is on an H100, and kernels are not launched but given to launch.

    launch(kernel, *arguments, grid=…, warmup=…, **options) takes the place of `JITFunction.run`; None leaves that as it
    is. All tensors are the CPU's, what is allocated "on the GPU" too, and torch's own operators compute.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fqt import dispatch, tuned, tuning
    from fqt_kernels import quantize

    importlib.import_module("torch._dynamo")  # which torch does late, and looks at torch.Tensor
    # Found before torch's own attributes of the base class, and read as fast as they.
    tensor = {"device": GPU, "is_cuda": True}
    gpu = {
        "current_device": lambda: 0, "get_device_properties": lambda device=None: H100,
        "current_stream": lambda device=None: _STREAM, "default_stream": lambda device=None: _STREAM,
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
    }  # fmt: skip
    table = tuning._Active(None, tuned.EMPTY, lambda: None)
    caches = (dispatch._chosen, dispatch.device_info, quantize.processors_and_l2)
    if spec := importlib.util.find_spec("fqt.unwatched"):  # of a tree that has it
        caches += (importlib.import_module(spec.name).plain_keys,)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for cache in caches:  # of the GPU that is there, if one is
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for name, value in tensor.items():
            enter(mock.patch.object(torch.Tensor, name, value))
        for name, value in gpu.items():
            enter(mock.patch.object(torch.cuda, name, value))
        for name in ("empty", "zeros"):
            enter(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
        enter(mock.patch.dict(tuning._active, {0: table}))
        if os.environ.get("TRITON_INTERPRET") != "1":  # launchers ask Triton which GPU they launch for
            enter(offline())
        if launch is not None:
            for kind in (JITFunction, InterpretedFunction):
                enter(mock.patch.object(kind, "run", launch))
        yield


_STREAM = SimpleNamespace(cuda_stream=0)


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*sizes, device=None, **options):
        return make(*sizes, **options)

    return made


def nothing(kernel: object, *args: object, **options: object) -> None:
    """The launch of a kernel that is not launched."""


class Driver:
    """Triton's driver of the GPU that is not there: kernels are compiled for sm_90, loaded nowhere, launched by nobody."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *of: (1, 1, 0, 0, 1024),
            fill_tma_descriptor_tiled=lambda *of: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return "make-believe"  # the key of Triton's caches in memory, apart from those of a GPU that is there

    def get_current_stream(self, device: str) -> int:
        return 0

    def launcher_cls(self, src, metadata):
        """Triton's launcher, all that is Python of it."""
        from triton.backends.nvidia import driver

        launcher = object.__new__(driver.CudaLauncher)
        launcher.__dict__.update(metadata._asdict())
        launcher.arg_annotations = launcher.kernel_signature = ()
        descriptors = getattr(metadata, "tensordesc_meta", None)
        launcher.launch = driver.wrap_handle_tensordesc(nothing, dict(src.signature), descriptors)
        return launcher


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within the context Triton's driver is `Driver`.

    Raises:
        UsageError: kernels are interpreted in this process, so that Triton's launcher has no part in it.
    """
    from triton.runtime.driver import driver

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 leaves out Triton's launcher: unset it")
    before = driver._active
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver._active = before
