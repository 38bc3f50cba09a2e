"""Gluon, Triton's language of explicit layouts and barriers, under the names of every version that this package supports.

Where there is no Gluon, or none with these names, `ABSENT` says why and the names are stand-ins: modules that define
kernels with them still import.
"""

import triton.language as tl

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit = gluon.jit
    # Triton 3.8 renamed both, and left functions that raise under the old names.
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    tma_store_wait = tma.store_wait
    ABSENT = None
except (ImportError, AttributeError) as e:
    gl = tl
    mbarrier = TensorDescriptor = fence_async_shared = warpgroup_mma = warpgroup_mma_wait = None
    tma_load = tma_store = tma_store_wait = None
    ABSENT = f"this Triton's Gluon is missing or unknown: {e}"

    def jit(fn=None, **options):
        return fn if fn is not None else lambda function: function
