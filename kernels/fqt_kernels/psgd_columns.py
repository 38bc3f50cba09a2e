"""Where the numbers lie that the kernels of `psgd.py` read: columns of tables, flags, and what is kept of weights."""

import triton.language as tl

# Columns of the table of tensors, int64: addresses, 0 for none, then numbers. LR_PTR: of a lr that is on the device. ROWS:
# 0 of a tensor that is one sequence of elements, COLS many.
W, G, FIRST, SECOND, POWERS, RANGE, THRESHOLD, POINTS, LAM, Q, QT, SCALE, NEWEST, LR_PTR, ROWS, COLS, FLAGS = map(
    tl.constexpr, range(17)
)
COLUMNS = tl.constexpr(17)

# In FLAGS: the number of the target, see `position.TARGETS`; flags; the number of the group.
KIND, NEW, FRESH, FRESH_THRESHOLD, ABSMAX, PER_CHANNEL, UPDATE, NESTEROV, MAXIMIZE, CODES, MOMENTUM = map(
    tl.constexpr, (7, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
)
GROUP_BITS = tl.constexpr(16)

# Columns of the table of hyperparameters, float64. LAMBDA: negative for "auto".
LR, BETA, KEEP, DECAY, BETA1, BETA2, NEW1, NEW2, ADAM_EPS, QMAX, LAMBDA, LARGEST, EPS, SPARSITY = map(
    tl.constexpr, range(14)
)
HYPERS = tl.constexpr(14)

# What is kept of a tensor's newest weights, int32: how many are at most the threshold, and bits of the largest magnitude
# that the ranges of channels will reach to; minus the minimum and the maximum, the count and the magnitude that a pass
# under way has found; and, for each row of the range, the bits of minus the minimum and of the maximum.
SMALL, REACH, LOW_NOW, HIGH_NOW, SMALL_NOW, REACH_NOW, EXTREMES = map(tl.constexpr, (0, 1, 2, 3, 4, 5, 8))
