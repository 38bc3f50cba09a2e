"""fqt: fully quantized training. All three matrix products of a layer on int8 or float8 operands.

Names are loaded on first use: importing fqt imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_ATTRIBUTES = {
    "Recipe": "recipe", "Quantizer": "recipe",
    "quantize_": "convert", "dequantize_": "convert", "ConversionReport": "convert", "explain": "expectation",
    "invalidate_": "nn",
    "round_weights_": "after_training", "prune_": "after_training",
    "hold_int8_": "int8_weight", "release_int8_": "int8_weight", "Int8Weight": "int8_weight",
    "lsq_": "lsq", "remove_lsq_": "lsq",
    "manual_seed": "rng", "set_step": "rng", "get_rng_state": "rng", "set_rng_state": "rng",
    "backend": "dispatch",
    "recording": "telemetry",
}  # fmt: skip
_MODULES = (
    "after_training",
    "candidates",
    "collect",
    "conv",
    "conv_cost",
    "conv_nn",
    "conv_ops",
    "conv_products",
    "convert",
    "cost",
    "demo",
    "dispatch",
    "doctor",
    "example",
    "expectation",
    "gradients",
    "householder",
    "int8_weight",
    "layer",
    "lsq",
    "nn",
    "ops",
    "optim",
    "position",
    "products",
    "qtensor",
    "ranges",
    "recipe",
    "reference",
    "rng",
    "selftest",
    "store",
    "suites",
    "targets",
    "telemetry",
    "tuned",
    "tuner",
    "tuning",
    "variance",
)

__all__ = ["__version__", *_ATTRIBUTES, *_MODULES]


def __getattr__(name: str):
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(f".{_ATTRIBUTES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'fqt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
