"""Triton kernels of fqt, and nothing else: this package imports torch and triton, never fqt.

Checks of a user's input, dispatch and autograd live in `fqt`; the launchers here expect what their docstrings say.
"""
