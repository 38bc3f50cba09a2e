"""fqt: fully quantized training. See README.md; torch is imported on the first use of a name, not before."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
