"""`fqt doctor`: what is installed, whether every kernel is right on this device, and which backend is used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, dispatch, guarded, replay, safefile, store, tuning
from .cli import UsageError, table
from .selftest import Check, formats_with_kernels, kernel_checks, layer_checks, reference_checks


def run(repeat: int = 0, only: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Gather the report: plain values, ready for JSON; "ok" is true once every check has run and passed.

    An interruption ends the checks, and so does a failed check that leaves the GPU unusable: "stopped" then says why,
    "not_run" names the checks that did not run or did not end, and "finished" stays false.

    repeat: launch every kernel of the checks so often again, and compare every byte (`fqt.replay`), in memory between guard
    bands. only: run the checks whose "KERNEL: case", or KERNEL alone, matches; * and ? as in files. out: the file that
    the report is written to, with the environment, before the first check and after every one.

    Raises:
        UsageError: no check matches; no kernel is launched that could be repeated; the file cannot be written.
    """
    how, device, reason = _kernels_run()
    if repeat and how == "not run":
        raise UsageError(f"--repeat {repeat}: there are no launches to repeat: {reason}")
    checks = [*reference_checks()]
    if how != "not run":
        checks += [*kernel_checks(device, how == "interpreter")]
    checks += [*layer_checks(device, how == "interpreter")]
    if only is not None:
        checks = _matching(checks, only, f"; {reason}" if how == "not run" else "")
    report = {
        "versions": _versions(),
        "devices": _devices(),
        "c_compiler": c_compiler(),
        "triton_cache": _triton_cache(),
        "tuning": _tuned(),
        "kernels": {"run": how, "device": str(device), "reason": reason},
        "repeat": repeat,
        "only": only,
        "checks": [],
        "not_run": [_name(check) for check in checks],
        "stopped": None,
        "dispatch": _choices(),
        "finished": False,
        "ok": False,
    }
    record = _environment(device) if out is not None else None
    try:
        for done, check in enumerate(checks, 1):
            if out is not None:
                write(out, report, record)
            _progress(f"{done}/{len(checks)} {_name(check)}", lines=bool(repeat) or out is not None)
            result = _repeated(check, repeat) if repeat else _verdict(check)
            report |= {"checks": [*report["checks"], result], "not_run": report["not_run"][1:]}
            if not result["ok"] and (why := _unusable(device)):
                report["stopped"] = f"{_name(check)} left the GPU unusable: {why}"
                break
    except KeyboardInterrupt:
        report["stopped"] = "interrupted"
    _progress("")
    ok = all(result["ok"] for result in report["checks"])
    if report["stopped"] is None:
        if repeat and ok and not any(result["launches"] for result in report["checks"]):
            raise UsageError(f"--repeat {repeat}: none of the {len(checks)} checks launches a kernel")
        report |= {"finished": True, "ok": ok}
    if out is not None:
        write(out, report, record)
    return report


def _name(check: Check) -> str:
    return f"{check.kernel}: {check.case}"


def _matching(checks: Sequence[Check], only: str, why: str) -> list[Check]:
    found = [c for c in checks if fnmatchcase(_name(c), only) or fnmatchcase(c.kernel, only)]
    if not found:
        known = ", ".join(dict.fromkeys(check.kernel for check in checks))
        raise UsageError(f"--only {only}: no check 'KERNEL: case' is like this; there are checks of {known}{why}")
    return found


def writable(file: str) -> Path:
    """The file that a report will go to, in a folder that is there. Raises UsageError."""
    path = Path(file)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--out {file}: its folder cannot be made: {e.strerror or e}") from None
    if path.is_dir():
        raise UsageError(f"--out {file}: is a folder; name a file in it")
    return path


def _environment(device: torch.device) -> dict[str, Any] | None:
    """What it is run on as `fqt bench` records it; None where fqt_bench is not installed."""
    try:
        from fqt_bench.environment import environment
    except ModuleNotFoundError as e:
        if e.name not in ("fqt_bench", "fqt_bench.environment"):
            raise
        return None
    return environment(device)


def write(path: Path, report: dict[str, Any], record: dict[str, Any] | None) -> None:
    """Write the report as JSON, with the record of the environment, in one step. Raises UsageError."""
    text = json.dumps({"environment": record, **report}, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        safefile.replace(path, text + "\n")
    except OSError as e:
        raise UsageError(f"--out {path}: cannot be written: {e.strerror or e}") from None


def summary(report: dict[str, Any]) -> str:
    """The report as text: one section for the machine, one for the checks (by kernel), one for the backends."""
    none = "not installed"
    facts = [(name, value or none) for name, value in report["versions"].items()]
    facts += [(device["device"], device["description"]) for device in report["devices"]]
    facts.append(
        ("C compiler", report["c_compiler"] or "none found: Triton needs one (gcc, clang, or CC) to launch kernels")
    )
    facts.append(("Triton cache", report["triton_cache"] or none))
    found = report["tuning"]
    met = "".join(f", {what} {n}" for what, n in sorted(found["counts"].items()))
    entries = f"{found['entries']} entries for this device"
    if not found["entries"] and len(report["devices"]) > 1:
        entries += " (fqt tune measures them; until then dispatch goes by a heuristic)"
    facts.append(("tuned tables", f"{entries}; store {found['store']}{met}"))
    facts.append(("kernels", report["kernels"]["reason"]))
    columns = "op", "shape", "backend", "source", "reason"
    choices = [tuple(choice[column] for column in columns) for choice in report["dispatch"]]
    failures = [f"FAILED {r['kernel']}: {r['case']}: {r['message']}" for r in report["checks"] if not r["ok"]]
    sections = [
        "\n".join(f"{name:<14}{value}" for name, value in facts),
        _checks_table(report),
        "What dispatch chooses for tensors of the device:\n\n"
        + table(("operator", "shape", "backend", "source", "because"), choices),
    ]
    sections += ["\n".join(failures)] if failures else []
    return "\n\n".join([*sections, _conclusion(report, len(failures))])


def _checks_table(report: dict[str, Any]) -> str:
    """A row for each kernel; what the columns of errors mean is said below, where there is an error."""
    repeat, rows = report["repeat"], []
    for kernel in dict.fromkeys(result["kernel"] for result in report["checks"]):
        results = [result for result in report["checks"] if result["kernel"] == kernel]
        failed = sum(not result["ok"] for result in results)
        equal = all(result["error"] == 0 for result in results)
        verdict = f"{failed} FAILED" if failed else "bit-equal" if equal else "within the bound"
        row = [kernel, str(len(results)), verdict, _largest([r["error"] for r in results]),
               "" if equal else _largest([r["of_bound"] for r in results])]  # fmt: skip
        if repeat:
            counts = {name: sum(result[name] for result in results) for name in ("repeated", "different", "skipped")}
            skipped = f", {counts['skipped']} not repeated" if counts["skipped"] else ""
            verdict = f"{counts['different']} DIFFER" if counts["different"] else "all bit-equal"
            row += [str(counts["repeated"] or ""), f"{verdict if counts['repeated'] else ''}{skipped}".lstrip(", ")]
        rows.append(row)
    header = ["check", "cases", "verdict", "largest error", "of its bound"]
    text = table([*header, "launches", f"repeated {repeat}x"] if repeat else header, rows, right=(1, 5))
    if any(row[4] for row in rows):
        text += "\n\nlargest error: of any output of any case; of its bound: the largest fraction, 1 being just allowed"
    return text


def _conclusion(report: dict[str, Any], failures: int) -> str:
    ran, repeat, lines = len(report["checks"]), report["repeat"], []
    checks, asked = _count(ran, "check"), ran + len(report["not_run"])
    if repeat:
        names = "repeated", "different", "skipped"
        repeated, different, skipped = (sum(r[name] for r in report["checks"]) for name in names)
        verdict = f"{different} DIFFER" if different else "all bit-equal" if repeated else "none"
        lines.append(f"{_count(repeated, 'launch', 'es')} repeated {_count(repeat, 'time')}, {verdict}")
        if skipped:
            why = "; ".join(dict.fromkeys(reason for r in report["checks"] for reason in r["why_skipped"]))
            lines.append(f"{_count(skipped, 'launch', 'es')} not repeated: {why}")
    passed = f"{'' if asked == 1 or not report['finished'] else 'all '}{checks} passed"
    lines.append(f"{failures} of {checks} FAILED" if failures else passed)
    if report["kernels"]["run"] == "not run":
        lines[-1] += "; no kernel was launched, so that this says nothing about kernels"
    if stopped := report["stopped"]:
        word, why = ("interrupted", "") if stopped == "interrupted" else ("stopped", f": {stopped}")
        lines.append(f"{word} after {ran} of {_count(asked, 'check')}{why}")
        if kernels := Counter(name.partition(": ")[0] for name in report["not_run"]):
            lines.append(f"not run: {', '.join(f'{kernel} ({n})' for kernel, n in kernels.items())}")
    return "\n".join(lines)


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{'' if n == 1 else plural}"


def _largest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.3g}" if known else "not measured"


# ---- the machine


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "fqt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = dispatch.triton_version()
    return versions


def _devices() -> list[dict[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()}, {capability}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    devices = [{"device": "cpu", "description": cpu}]
    driver = store.driver() if torch.cuda.is_available() else ""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        arch, processors = dispatch.device_info(f"cuda:{index}")
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        text = f"{properties.name}, {arch}, {processors} processors, {memory}, driver {driver or 'unknown'}"
        devices.append({"device": f"cuda:{index}", "description": text})
    return devices


def c_compiler() -> str | None:
    """The C compiler that Triton would call for its launcher: CC, else gcc, else clang; None where there is none."""
    return shutil.which(os.environ.get("CC") or "gcc") or (None if os.environ.get("CC") else shutil.which("clang"))


def _triton_cache() -> str | None:
    if dispatch.triton_version() is None:
        return None
    import triton

    return str(triton.knobs.cache.dir)


def _kernels_run() -> tuple[str, torch.device, str]:
    """How the kernels can run here, "hardware", "interpreter" or "not run", on which device, and in words."""
    cpu = torch.device("cpu")
    if dispatch.triton_version() is None:
        return "not run", cpu, "not run: Triton is not installed; the CPU reference backend is used"
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreter", cpu, "run in Triton's interpreter (TRITON_INTERPRET=1), not on hardware"
    if not torch.cuda.is_available():
        return "not run", cpu, "no GPU: kernels not run on hardware; the CPU reference backend is used"
    gpu = torch.device("cuda", torch.cuda.current_device())
    choice = dispatch.select(dispatch.problem("scaled_mm", gpu, 128, 128, 128))
    if not formats_with_kernels(gpu):
        return "not run", gpu, f"not run: {choice.reason}"
    if c_compiler() is None:
        return "not run", gpu, "not run: Triton needs a C compiler (gcc, clang, or CC) and found none"
    return "hardware", gpu, f"run on {torch.cuda.get_device_name(gpu)}"


def _device() -> torch.device:
    """What a user would train on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _tuned() -> dict[str, Any]:
    """The tuned entries of the device, the file or the folder of the store, and what reading it met."""
    device = _device()
    try:
        place = store.path(store.Machine.of(device)) if device.type == "cuda" else store.directory()
    except store.NoPlace as e:
        place = e
    return {"entries": len(tuning.table(device)), "store": str(place), "counts": tuning.counts()}


def _choices() -> list[dict[str, str]]:
    """What operators launch on the device, for a small, a large and a long problem."""
    device = _device()
    bf16 = dict(dtype=torch.bfloat16)
    problems = [("quantize", (4096, 4096), bf16 | {"kind": "per_row nearest both"})]
    problems += [("quantize_gradient", (4096, 4096), bf16 | {"kind": "per_row per_column"})]
    problems += [("householder", (4096, 4096), bf16 | {"kind": groups}) for groups in ("global", "tile")]
    problems += [("scaled_mm", shape, {}) for shape in ((128, 128, 128), (4096, 4096, 4096), (576, 64, 200_704))]
    problems += [("quantize_images", (50_176, 256), bf16), ("conv", (50_176, 256, 2304), {"kind": "9 taps"}),
                 ("conv_wgrad", (256, 2304, 50_176), {})]  # fmt: skip
    choices = []
    for op, shape, more in problems:
        choice = dispatch.select(dispatch.problem(op, device, *shape, **more), tuning.table(device))
        backend = str(choice).partition(":")[0]
        name = f"{op} {more['kind']}" if op == "householder" else op
        choices.append({"op": name, "shape": "x".join(map(str, shape)), "backend": backend, "source": choice.source,
                        "reason": choice.reason})  # fmt: skip
    return choices


# ---- running and judging a check


def _verdict(check: Check) -> dict[str, Any]:
    """Run a check: whether it passed, the largest error of its outputs, as it is and as a fraction of its bound.

    The errors are None where the check could not run, the fraction also where every bound is 0.
    """
    result: dict[str, Any] = {"kernel": check.kernel, "case": check.case, "ok": True, "error": 0.0, "of_bound": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter's numpy, about NaNs that are meant
            compared = [(name, *_compare(*triple)) for name, triple in check.run().items()]
    except Exception as e:  # a kernel that does not compile or launch is a verdict, not a crash of the doctor
        return result | {"ok": False, "error": None, "message": _words(e)}
    result["message"] = "; ".join(f"{name} {text}" for name, *_, text in compared if text) or "bit-equal"
    for _, ok, error, of_bound, _ in compared:
        result["ok"] &= ok
        result["error"] = max(result["error"], error)
        if of_bound is not None:
            result["of_bound"] = max(result["of_bound"] or 0.0, of_bound)
    return result


def _repeated(check: Check, repeat: int) -> dict[str, Any]:
    """`_verdict` of a check whose launches are repeated, in memory between guard bands: how many "launches" it made, were
    "repeated", were "different" and were "skipped"; each of the last two, an overwritten band, or that the kernel was not
    among those launched, is in words in "faults" or "why_skipped". A fault fails the check.
    """
    with guarded.guarded(guarded.launchers()) as memory, replay.recording(repeat) as seen:
        result = _verdict(check)
    faults = list(seen.faults)
    if result["error"] is not None and check.kernel.startswith("_") and check.kernel not in seen.kernels:
        faults.append(f"it was not launched, but {', '.join(seen.kernels) or 'nothing'}")
    try:
        faults += [f"written outside, {where}" for where in memory.broken()]
    except RuntimeError as e:  # of a GPU that an earlier launch has left unusable
        faults.append(f"the guard bands cannot be read: {_words(e)}")
    result |= {"launches": seen.launches, "repeated": seen.repeated, "different": len(seen.faults),
               "skipped": seen.skipped.total(), "why_skipped": sorted(seen.skipped), "faults": faults}  # fmt: skip
    if faults:
        result |= {"ok": False, "message": "; ".join([result["message"], *faults])}
    return result


def _unusable(device: torch.device) -> str:
    """Why nothing can be launched on the GPU any more, as after an illegal access: "" where it can."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as e:
            return _words(e)
    return ""


def _words(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _compare(got: Tensor, want: Tensor, bound: Tensor | float) -> tuple[bool, float, float | None, str]:
    """(within the bound, largest error, its fraction of the bound, words). Non-finite values must be the same."""
    if got.shape != want.shape or got.dtype != want.dtype:
        text = f"is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        return False, sys.float_info.max, None, text
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    same = (got == want) | (got.isnan() & want.isnan())
    # JSON has no infinity.
    error = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=sys.float_info.max)
    largest = float(error.max())
    bound = torch.as_tensor(bound, dtype=torch.float64).detach().expand_as(error)
    of_bound = None
    if bool((bound > 0).any()):
        of_bound = min(float((error / bound)[bound > 0].max()), sys.float_info.max)
    bad = int((error > bound).sum())
    if bad:
        return False, largest, of_bound, f"differs by up to {largest:.3g} in {bad} of {got.numel()} places"
    return True, largest, of_bound, f"differs by up to {largest:.3g}, within the bound" if largest else ""


def _progress(text: str, lines: bool = False) -> None:
    """One line on stderr, rewritten in place; where stderr is no terminal nothing, or with `lines` a line for each text."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
    elif lines:
        print(text, file=sys.stderr, flush=True)
