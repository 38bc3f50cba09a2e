"""Choosing, before it is imported, the folders that fqt comes from. Standard library only."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence


def use(roots: Sequence[str]) -> None:
    """From now on fqt and fqt_kernels are imported from these folders.

    Raises:
        RuntimeError: they would come from elsewhere.
    """
    sys.path[:0] = roots
    importlib.invalidate_caches()
    within = tuple(os.path.join(os.path.realpath(root), "") for root in roots)
    for name in ("fqt", "fqt_kernels"):
        spec = importlib.util.find_spec(name)
        if name in sys.modules or spec is None or not os.path.realpath(spec.origin).startswith(within):
            raise RuntimeError(f"{name} is imported from {spec and spec.origin}, not from {', '.join(roots)}")
