"""A run's samples in the file format of pytest-benchmark, so that `pytest-benchmark compare` prints its tables of them."""

from __future__ import annotations

import statistics
from typing import Any

from .stats import percentile

FORMAT = "5.3.1"  # of pytest-benchmark, whose reader this was written for


def of(result: dict[str, Any]) -> dict[str, Any]:
    """The candidates that were measured, as pytest-benchmark writes its own: a group a case, times in seconds."""
    e = result["environment"]
    return {
        "machine_info": {
            "node": "",
            "processor": e["cpu"],
            "machine": e["host"],
            "python_version": e["python"],
            "cpu": {"brand_raw": e["cpu"]},
            "gpu": e["gpu"],
            "torch": e["torch"],
        },
        "commit_info": {
            "id": e["commit"] or "unversioned",
            "time": None,
            "author_time": None,
            "dirty": bool(e["dirty"]),
            "project": "fqt",
            "branch": "(unknown)",
        },
        "benchmarks": [
            _benchmark(case, candidate)
            for case in result["cases"]
            for candidate in case["candidates"]
            if candidate["status"] == "ok"
        ],
        "datetime": e["date"],
        "version": FORMAT,
    }


def _benchmark(case: dict[str, Any], candidate: dict[str, Any]) -> dict[str, Any]:
    group, name = f"{case['suite']} {case['shape']}", candidate["name"]
    return {
        "group": group,
        "name": name,
        "fullname": f"fqt bench::{group}::{name}",
        "params": None,
        "param": None,
        "extra_info": {"provider": candidate["provider"], "remark": candidate["remark"]},
        "options": {"disable_gc": True, "timer": "perf_counter", "min_rounds": 1, "max_time": 0.0, "min_time": 0.0,
                    "warmup": True},
        "stats": _stats([ms * 1e-3 for ms in candidate["samples_ms"]]),
    }  # fmt: skip


def _stats(data: list[float]) -> dict[str, Any]:
    """The figures that pytest-benchmark computes of its rounds, seconds; outliers by its rules of 1 σ and 1.5 IQR."""
    n, mean, deviation = len(data), statistics.fmean(data), statistics.stdev(data) if len(data) > 1 else 0.0
    q1, median, q3 = (percentile(data, percent) for percent in (25, 50, 75))
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    within = [value for value in data if low <= value <= high]
    beyond_sigma = sum(abs(value - mean) > deviation for value in data)
    return {
        "min": min(data),
        "max": max(data),
        "mean": mean,
        "stddev": deviation,
        "rounds": n,
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": n - len(within),
        "stddev_outliers": beyond_sigma,
        "outliers": f"{beyond_sigma};{n - len(within)}",
        "ld15iqr": min(within),
        "hd15iqr": max(within),
        "ops": 1 / mean,
        "total": sum(data),
        "data": data,
        "iterations": 1,
    }
