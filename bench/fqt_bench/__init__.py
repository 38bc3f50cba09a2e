"""Benchmarks of fqt: the suites behind `fqt bench`, the counters that need no GPU, comparisons and reports."""
