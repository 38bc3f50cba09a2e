"""Optimizers. "PSGD" is Position-based Scaled Gradient Descent here (arXiv 2005.11035), not Preconditioned SGD."""
