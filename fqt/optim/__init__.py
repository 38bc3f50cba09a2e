"""Optimizers. "PSGD" is Position-based Scaled Gradient Descent here (arXiv 2005.11035), not Preconditioned SGD."""

from __future__ import annotations

from .adamw import PSGDAdamW
from .options import param_groups
from .position_scaled import PositionScaled
from .psgd import PSGD

__all__ = ["PSGD", "PSGDAdamW", "PositionScaled", "param_groups"]
