"""Faults that compute-sanitizer must report: a tool that is silent about them saw nothing, and its silence proves nothing.

    python -m fqt_bench.sanitize_planted memcheck

runs the kernel that has the tool's fault, on the GPU. None of them does harm outside of a sanitizer: what is read beyond a
tensor is memory of the same process, and threads that skip a barrier end, which opens it. Triton puts barriers around shared
memory itself, so the race is between instructions of PTX, in memory that these declare.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

SIZE = 64  # two warps
BEYOND = 1024  # elements beyond the end of the tensor

# Each thread writes a word and reads that of a thread of the other warp.
_RACE = """{
.shared .align 4 .b32 planted[64];
.reg .b32 base, tid, mine, other;
mov.u32 base, planted;
mov.u32 tid, %tid.x;
and.b32 tid, tid, 63;
shl.b32 mine, tid, 2;
xor.b32 other, mine, 128;
add.u32 mine, mine, base;
add.u32 other, other, base;
st.shared.b32 [mine], $1;
ld.shared.b32 $0, [other];
}"""
# The upper half of the second warp goes past a barrier of the whole program.
_DIVERGENCE = """{
.reg .b32 tid;
.reg .pred goes;
mov.u32 tid, %tid.x;
setp.lt.u32 goes, tid, 48;
@goes bar.sync 0;
mov.b32 $0, $1;
}"""


@triton.jit
def _planted_bounds_kernel(x_ptr, out_ptr, BEYOND: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + BEYOND + i))


@triton.jit
def _planted_fresh_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _planted_asm_kernel(x_ptr, out_ptr, ASM: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    x = tl.inline_asm_elementwise(ASM, "=r,r", [x], tl.int32, False, 1)
    tl.store(out_ptr + i, x)


# By tool: the kernel, its constants, and whether x has been written.
PLANTED = {
    "memcheck": (_planted_bounds_kernel, dict(BEYOND=BEYOND), True),
    "initcheck": (_planted_fresh_kernel, {}, False),
    "racecheck": (_planted_asm_kernel, dict(ASM=_RACE), True),
    "synccheck": (_planted_asm_kernel, dict(ASM=_DIVERGENCE), True),
}


def main(tool: str) -> int:
    kernel, constants, written = PLANTED[tool]
    out = torch.zeros(SIZE, dtype=torch.int32, device="cuda")
    # A tensor of its own size: what lies beyond it is no tensor's.
    x = (
        torch.ones(SIZE, dtype=torch.int32, device="cuda")
        if written
        else torch.empty(SIZE, dtype=torch.int32, device="cuda")
    )
    kernel[(1,)](x, out, **constants, SIZE=SIZE, num_warps=2)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
