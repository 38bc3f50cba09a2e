"""Whether anything but its own code would notice the call of an operator of torch.library.

To call an operator through the dispatcher, with its autograd formula, takes 100 to 200 µs on the host, several times what
a layer takes to launch its kernels. It need not be gone through where the dispatcher would come to the operator's code
straight away. That is told by the dispatcher's own keys, which whatever it would stop at adds to a tensor's or a thread's.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded wherever autograd is; keys of single devices are not


def is_unwatched(*tensors: Tensor | None) -> bool:
    """Whether the call of an operator with these tensors would come to its code for the CPU or a GPU, and to nothing else.

    Of plain tensors only; not under torch.compile, a profiler, a trace, a mode of torch's (`torch.set_default_device` is
    one), a transform of torch.func or forward-mode differentiation. Autograd is left out of it, who calls the code makes
    the node: not below autograd, where grad mode says that there is to be one and the dispatcher makes none.
    """
    if torch.compiler.is_compiling() or torch.autograd.profiler._is_profiler_enabled:
        return False
    if torch._C._is_torch_function_mode_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _unwatched_states():
        return False
    return all(
        t is None
        or (
            type(t) in (Tensor, torch.nn.Parameter)
            and torch._C._dispatch_keys(t).raw_repr() in plain_keys(t.device.type)
        )
        for t in tensors
    )


@functools.cache
def _unwatched_states() -> tuple[int, ...]:
    """What the dispatcher adds of itself to a call's keys, outside and inside of inference mode."""
    found: list[int] = []

    def look() -> None:  # on a thread that nothing was entered on
        for inference in (False, True):
            with torch.inference_mode(inference):
                found.append(torch._C._dispatch_tls_local_include_set().raw_repr())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return tuple(found)


@functools.cache
def plain_keys(device: str) -> tuple[int, ...]:
    """The dispatcher's keys of a device's plain tensors, of inference ones as well; () of a device without kernels."""
    if device not in DEVICES:
        return ()
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return tuple(found)
