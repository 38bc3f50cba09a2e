"""Benchmarks of fqt. Not part of the installed package; run from the repository's root (see README.md here)."""
