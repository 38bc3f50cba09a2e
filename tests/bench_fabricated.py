"""FABRICATED results for the tests of the report: every number here is made up, none was measured on anything."""

import argparse
import copy
import json
import random

from fqt_bench import facts, page, reading

METHOD = "FABRICATED for a test: no number of this result was measured."
H100 = "FABRICATED H100 80GB HBM3"  # the datasheet's ceilings go by the end of the name
CPU = "FABRICATED CPU"

ENVIRONMENT = {
    "date": "2026-03-01T10:00:00+00:00", "device": "cuda", "gpu": H100, "capability": "9.0", "processors": 132,
    "memory_gib": 79.1, "l2_mib": 50.0, "driver": "000.00", "smi": {"temperature.gpu": "40"}, "fqt": "0.1.0",
    "peers": {"torchao": None, "bitsandbytes": None}, "python": "3.12.0", "torch": "2.13.0", "triton": "3.7.1",
    "cuda": "12.8", "hip": None, "cpu": CPU, "host": "x86_64, 16 processors", "threads": 16, "commit": "0123456789abcdef",
    "dirty": False, "source": "0" * 16,
}  # fmt: skip
ON_CPU = {"device": "cpu", "gpu": None, "cuda": None} | dict.fromkeys(
    ("capability", "processors", "memory_gib", "l2_mib", "driver", "smi")
)


def result(*cases, environment=(), **fields):
    """A whole result of schema 3 with these cases."""
    return {
        "schema": 3, "suites": ["kernels"], "method": METHOD, "environment": {**ENVIRONMENT, **dict(environment)},
        "budget_s": 420.0, "spent_s": 1.0, "cases": list(cases), "counters": {}, "counters_of": None, "memory": [],
        "repeats": [], "launches": [], "skipped": [], "ceilings": None, **fields,
    }  # fmt: skip


def case(suite, shape, *candidates, unit="TOPS"):
    """The first candidate is the baseline."""
    return {"suite": suite, "shape": shape, "unit": unit, "baseline": candidates[0]["name"], "rounds": 9, "sets": 2,
            "lead_ms": 0.5, "candidates": list(candidates)}  # fmt: skip


def candidate(name, ms=1.0, *, ratio=None, tops=None, gb_s=None, tag="", ours=True, provider="fqt", **fields):
    return {"name": name, "ours": ours, "provider": provider, "tag": tag, "prediction": "", "status": "ok",
            "remark": "bit-equal", "ms": {"median": ms, "p10": ms * 0.98, "p90": ms * 1.04, "n": 3}, "tops": tops,
            "gb_s": gb_s, "host_ms": 0.1, "starved": 0, "samples_ms": [ms * 0.98, ms, ms * 1.04],
            **({"ratio": dict(zip(("value", "low", "high"), ratio, strict=True))} if ratio else {}), **fields}  # fmt: skip


def failed(name, status, remark, **fields):
    return {"name": name, "ours": True, "provider": "fqt", "tag": "", "prediction": "", "status": status,
            "remark": remark, **fields}  # fmt: skip


def pair(suite, shape, ratio, tag):
    """bf16 at 1 ms and an int8 candidate that is `ratio` times as fast."""
    base = candidate("torch bf16", 1.0, ratio=(1, 1, 1), tops=100.0, tag="bf16", ours=False, provider="torch")
    return case(suite, shape, base, candidate("int8", 1.0 / ratio, ratio=(ratio, ratio * 0.99, ratio * 1.01),
                                              tops=100.0 * ratio, tag=tag))  # fmt: skip


SHAPES = ("8192x8192x8192", "4096x4096x4096", "8192x28672x4096", "8192x4096x14336", "1024x1024x1024", "2048x4096x4096",
          "1024x4096x4096", "8192x4096x4096", "16x4096x4096", "50432x4096x1024")  # fmt: skip


def crowded(seed=0, date="2026-03-01", commit="0123456789abcdef", gain=1.0, shapes=SHAPES):
    """Many candidates with long names, every status, every kind of figure."""
    chance = random.Random(seed)
    cases = []
    for shape in shapes:
        for suite in ("gemm", "linear fwd+bwd"):
            cases.append(_crowd(chance, suite, shape, gain))
    for shape in ("8192x8192", "4096x4096"):
        cases.append(_quantize(chance, shape))
    counters = {
        f"sm_90 _rows_kernel n{n} {layout} symmetric {rounding}": {"instructions": n, "registers": 64, "shared": 4096}
        for n in (1024, 4096, 16384) for layout in ("rows", "cols", "both") for rounding in ("nearest", "stochastic")
    } | {"step int8 linear": {"launches": 9, "bytes_loaded": 123456789, "bytes_stored": 23456789, "peak_bytes": 345678901,
                              "saved_bytes": 45678901}}  # fmt: skip
    shape = "8192x4096x4096"
    return result(
        *cases, environment={"date": f"{date}T10:00:00+00:00", "commit": commit}, suites=["kernels", "layers"],
        counters=counters, counters_of={"triton": "3.7.1", "arches": ["sm_90"]},
        memory=[{"name": "bf16", "shape": shape, "saved": 64 << 20, "peak": 512 << 20},
                {"name": "int8", "shape": shape, "saved": 33 << 20, "peak": 480 << 20}],
        repeats=[{"suite": "gemm", "shape": shape, "name": "hopper 128x256x128 w8 s3", "status": "ok",
                  "remark": "3 runs bit-equal"},
                 {"suite": "gemm", "shape": shape, "name": "scaled_mm 128x128x128 w8 s3 split 4", "status": "wrong",
                  "remark": "run 2 differs from run 1"}],
        launches=[{"name": "nn.Linear bf16", "shape": shape, "kernels": 3, "copies": 0, "by_name": {}},
                  {"name": "fqt.nn.Linear int8", "shape": shape, "kernels": 9, "copies": 1, "by_name": {}}],
        skipped=[{"suite": "gemm", "shape": "16384x16384x16384", "status": "skip", "remark": "3 of 420 s left, 12 needed"}],
    )  # fmt: skip


def _crowd(chance, suite, shape, gain):
    m, n, k = map(int, shape.split("x"))
    small = min(m, n, k) < 3000
    layer = suite != "gemm"
    ops = (6 if layer else 2) * m * n * k
    base = 700.0 if not small else 90.0
    names = [("torch.matmul bf16", "bf16", 1.0, False, "torch"),
             ("torch._int_mm (int32 out)", "_int_mm", 1.3, False, "torch"),
             ("torch._scaled_mm fp8 row-wise", "_scaled_mm fp8", 1.7, False, "torch")]  # fmt: skip
    names += [(f"scaled_mm {a}x{b}x128 w8 s{s}{' split 4' if s == 4 else ''}", "portable" if s == 3 else "split",
               1.1 + 0.05 * s, True, "fqt") for a in (64, 128, 256) for b in (128, 256) for s in (3, 4)]  # fmt: skip
    names += [("hopper 128x256x128 w8 s3 (dispatch)", "hopper", 1.45, True, "fqt")]
    if layer:
        names = [("nn.Linear bf16", "bf16", 1.0, False, "torch"),
                 ("nn.Linear bf16, torch.compile", "bf16 compiled", 1.02, False, "torch"),
                 ("torchao int8 mixed precision, torch.compile", "torchao", 1.1, False, "torchao"),
                 ("fqt.nn.Linear int8", "int8", 1.32, True, "fqt"), ("fqt.nn.Linear psq8", "psq8", 1.2, True, "fqt"),
                 ("fqt.nn.Linear fp8", "fp8", 1.25, True, "fqt"),
                 ("fqt.nn.Linear int8 hopper", "int8 hopper", 1.38, True, "fqt")]  # fmt: skip
    found = []
    for i, (name, tag, ratio, ours, provider) in enumerate(names):
        if i:
            ratio *= (0.55 if small else gain) * chance.uniform(0.93, 1.07)
        tops = base * ratio
        width = 0 if i == 0 else chance.uniform(0.002, 0.06)
        move = 2.0 * (m * n) + (2.0 if "bf16" in tag else 1.0) * (m * k + n * k)
        ms = ops / tops * 1e-9
        found.append(candidate(name, ms, ratio=(ratio, ratio * (1 - width), ratio * (1 + width)), tops=tops,
                               gb_s=None if layer else move / ms * 1e-6, tag=tag, ours=ours, provider=provider,
                               prediction=f"{tops * 0.97:.0f} (datasheet)" if "dispatch" in name else ""))  # fmt: skip
    found[-1]["starved"] = 3 if small else 0
    found += [
        failed("scaled_mm 256x256x128 w8 s4 split 16 with a name that goes on and on, longer than any column is wide",
               "skip", "does not fit: 294912 bytes of shared memory, 232448 there are"),
        failed("scaled_mm <b>bold</b> | pipe & `code` $x^2$ {tile}", "wrong", "output: 3 of 67108864 elements differ"),
        failed("hopper 256x128x128 w8 s3", "error", "RuntimeError: at /home/somebody/secret/kernel.py: illegal access"),
    ]  # fmt: skip
    return case(suite, shape, *found, unit="TFLOP/s" if layer else "TOPS")


def _quantize(chance, shape):
    found = [candidate("copy_", 0.1, ratio=(1, 1, 1), gb_s=3000.0, tag="copy", ours=False, provider="torch")]
    for kernel in ("rows", "tile"):
        for layout in ("rows", "both"):
            for rounding in ("nearest", "stochastic"):
                x = chance.uniform(0.8, 0.99)
                found.append(candidate(f"{kernel} kernel, {layout}, {rounding}", 0.1 / x, ratio=(x, x - 0.01, x + 0.01),
                                       gb_s=3000 * x, tag=f"{layout} {rounding}"))  # fmt: skip
    return case("quantize", shape, *found, unit="GB/s")


GOOD = result(case("gemm", "1x2x3", candidate("a")))


def on_cpu(*cases, **fields):
    """A result of a machine without a GPU."""
    return result(*cases, environment=ON_CPU, suites=["smoke"], **fields)


def but(value, *path, to):
    """A copy of a result with the field at the path set, or with `to` a function, changed by it."""
    made = copy.deepcopy(value)
    place = made
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to(place[path[-1]]) if callable(to) else to
    return made


# ---- what the tests do with results


def runs(*results):
    return [reading.Run(f"{i}.json", reading.clean(result)) for i, result in enumerate(results)]


def machine(*results):
    """The one machine that all the results come from."""
    (found,) = facts.machines(runs(*results))
    return found


def written(folder, *results):
    """The folder, with the results as 0.json, 1.json, …"""
    for i, result in enumerate(results):
        (folder / f"{i}.json").write_text(json.dumps(result))
    return folder


def report(*arguments):
    """`fqt bench report` with these arguments."""
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    return page.run(parser.parse_args([*map(str, arguments)]))
