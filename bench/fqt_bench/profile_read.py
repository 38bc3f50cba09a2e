"""What Nsight Compute prints, as kernels with their counters, and what they say limits a kernel. Pure functions of text.

The form is that of `ncu --csv --page raw --print-units base`: a line of names that begins with "ID", a line of units whose
first field is empty, then a line for each kernel, all fields quoted, thousands separated by commas. Lines of the application
and of ncu itself (==PROF==, ==WARNING==, ==ERROR==) may stand between them.

What limits a kernel: the busiest of its units (`UNITS`), by the share of its peak, where that is at least BUSY %. Else
nothing is busy and it is latency: then what warps wait for most, of the cycles between two instructions of a warp.

Source: NVIDIA's Nsight Compute CLI manual and Profiling Guide (https://docs.nvidia.com/nsight-compute), 2025.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BUSY = 60.0  # percent of a unit's peak; ncu's own rule of thumb for a latency-bound kernel
_OF_TIME, _OF_ACTIVE = ".avg.pct_of_peak_sustained_elapsed", ".avg.pct_of_peak_sustained_active"
# Of a warp: what it waits for. All are of sm_90 ("gmma" only of it).
STALLS = {
    "barrier": "a barrier", "branch_resolving": "a branch", "dispatch_stall": "the dispatcher", "drain": "stores at its end",
    "gmma": "a warpgroup's matrix product", "imc_miss": "constants", "lg_throttle": "the queue of global memory",
    "long_scoreboard": "global memory or the L2", "math_pipe_throttle": "a busy arithmetic unit", "membar": "a memory fence",
    "mio_throttle": "the queue of shared memory", "misc": "something else", "no_instruction": "instructions to be fetched",
    "short_scoreboard": "shared memory or special functions", "sleeping": "its sleep to end",
    "tex_throttle": "the queue of textures", "wait": "a fixed latency",
}  # fmt: skip
_READY = ("selected", "not_selected")  # no stalls: it issues, or another warp did
_LIMITS = {"registers": "registers", "shared_mem": "shared memory", "warps": "warps", "blocks": "blocks",
           "barriers": "barriers"}  # fmt: skip
# By field: the metrics that give it. Asked is the first that ncu knows: names differ by version and GPU.
FIELDS: dict[str, tuple[str, ...]] = {
    "time_ns": ("gpu__time_duration.sum",),
    "read_bytes": ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    "written_bytes": ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    "dram_pct": (f"gpu__dram_throughput{_OF_TIME}", f"dram__throughput{_OF_TIME}"),
    "l2_pct": (f"lts__throughput{_OF_TIME}",),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct",),
    "l1_pct": (f"l1tex__throughput{_OF_ACTIVE}", f"l1tex__throughput{_OF_TIME}"),
    "shared_wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",),
    "bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
    "tensor_pct": (f"sm__pipe_tensor_cycles_active{_OF_TIME}", f"sm__inst_executed_pipe_tensor{_OF_ACTIVE}"),
    "issue_pct": (f"smsp__issue_active{_OF_ACTIVE}", f"sm__issue_active{_OF_TIME}"),
    "alu_pct": (f"sm__inst_executed_pipe_alu{_OF_ACTIVE}",),
    "fma_pct": (f"sm__pipe_fma_cycles_active{_OF_ACTIVE}", f"sm__inst_executed_pipe_fma{_OF_ACTIVE}"),
    "fma_heavy_pct": (f"sm__pipe_fmaheavy_cycles_active{_OF_ACTIVE}",),
    "xu_pct": (f"sm__inst_executed_pipe_xu{_OF_ACTIVE}",),
    "lsu_pct": (f"sm__inst_executed_pipe_lsu{_OF_ACTIVE}",),
    "tma_pct": (f"sm__pipe_tma_cycles_active{_OF_ACTIVE}",),
    "sm_pct": (f"sm__throughput{_OF_TIME}",),
    "occupancy_pct": (f"sm__warps_active{_OF_ACTIVE}",),
    "occupancy_most_pct": ("sm__maximum_warps_per_active_cycle_pct",),
    "registers": ("launch__registers_per_thread",),
    "shared_bytes": ("launch__shared_mem_per_block",),
    "waves": ("launch__waves_per_multiprocessor",),
    **{f"limit_{name}": (f"launch__occupancy_limit_{name}",) for name in _LIMITS},
    **{f"stall_{name}": (f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio",)
       for name in (*STALLS, *_READY)},
}  # fmt: skip
ESSENTIAL = ("time_ns", "read_bytes", "written_bytes")
# Units of the GPU that can be the limit, in words. SM throughput is none of them: it is the largest of several.
UNITS = {"tensor_pct": "tensor cores", "dram_pct": "DRAM", "l2_pct": "L2", "l1_pct": "L1 and shared memory",
         "issue_pct": "issue slots", "alu_pct": "integer and logic unit (ALU)", "fma_pct": "FMA units",
         "fma_heavy_pct": "heavy FMA unit (integer products)", "xu_pct": "special functions and conversions (XU)",
         "lsu_pct": "load and store unit", "tma_pct": "TMA"}  # fmt: skip
_COMPUTED = ("launch__", "sm__maximum_warps")  # not measured, and not in what --query-metrics lists by default
_SCALES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12, "ns": 1.0, "nsecond": 1.0, "us": 1e3,
           "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}  # fmt: skip
_UNKNOWN = re.compile(r"Failed to find metric (?:regex:)?\^?([^\s($]+)")
_ERROR = re.compile(r"^==ERROR==\s*(.+)$", re.MULTILINE)
# What keeps ncu from counting, by what it says of it, in words.
_REASONS = {
    "ERR_NVGPUCTRPERM": "ERR_NVGPUCTRPERM: the driver keeps its counters from this user; they are root's, of CAP_SYS_ADMIN, "
    "or everybody's with the driver's option NVreg_RestrictProfilingToAdminUsers=0",
    "LibraryNotLoaded": "LibraryNotLoaded: ncu does not find the driver's libraries",
    "driver resource was unavailable": "another tool, such as DCGM, holds the GPU's counters",
    "No kernels were profiled": "no kernels were profiled",
}


# ---- which metrics are asked for


def metrics(without: Iterable[str] = (), listed: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """({field: metric to ask for}, the fields that no metric is left for).

    without: metrics that ncu has refused. listed: base names that `ncu --query-metrics` lists; empty: not known.
    """
    without, listed = set(without), set(listed)

    def known(metric: str) -> bool:
        return metric not in without and (
            not listed or metric.startswith(_COMPUTED) or metric.partition(".")[0] in listed
        )

    asked = {name: next(filter(known, choices), "") for name, choices in FIELDS.items()}
    return {name: metric for name, metric in asked.items() if metric}, [n for n, metric in asked.items() if not metric]


def base_names(listing: str) -> set[str]:
    """The base names of metrics in what `ncu --query-metrics` prints: the first word of its lines."""
    words = (line.split()[0] for line in listing.splitlines() if line.strip())
    return {word for word in words if re.fullmatch(r"[a-z0-9]+__\w+", word)}


def refused(text: str, asked: Iterable[str]) -> list[str]:
    """The metrics of those asked for that ncu says it does not find: it names a metric, or a pattern that begins with it."""
    names = [match.replace("\\.", ".").rstrip(".\\$,") for match in _UNKNOWN.findall(text)]
    return [metric for metric in asked if any(metric == name or metric.startswith(f"{name}.") for name in names)]


def doubtful(text: str, asked: Mapping[str, str]) -> list[str]:
    """Where ncu complains of metrics, and not of which: all but the essential ones, by whatever name."""
    complains = any("metric" in error.lower() for error in _ERROR.findall(text)) and '"ID"' not in text
    spare = [name for name in FIELDS if name not in ESSENTIAL]
    return [metric for name in spare for metric in FIELDS[name]] if complains and asked.keys() & spare else []


def failure(text: str) -> str:
    """Why ncu has counted nothing, by what it printed; "" where it says nothing of it."""
    for words, reason in _REASONS.items():
        if words in text and words != "No kernels were profiled":
            return reason
    if errors := _ERROR.findall(text):
        return errors[0].strip()[:300]
    return next((reason for words, reason in _REASONS.items() if words in text), "")


# ---- kernels


@dataclass(frozen=True)
class Kernel:
    """A launch. values: by the name of a field; bytes, ns, percent, counts; None where ncu gave no number."""

    name: str
    grid: str
    block: str
    values: Mapping[str, float | None]

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)

    @property
    def moved(self) -> float | None:
        """Bytes read from DRAM and written to it."""
        both = (self["read_bytes"], self["written_bytes"])
        return None if None in both else sum(both)

    def busiest(self) -> tuple[str, float] | None:
        """(a unit in words, the share of its peak in percent), None where no share is known."""
        shares = {words: self[name] for name, words in UNITS.items() if self[name] is not None}
        return max(shares.items(), key=lambda item: item[1]) if shares else None

    def stalls(self) -> list[tuple[str, float]]:
        """(reason, its percent of the cycles between two instructions of a warp), the largest first."""
        cycles = {name: self[f"stall_{name}"] for name in (*STALLS, *_READY)}
        total = sum(filter(None, cycles.values()))
        found = [(name, 100 * cycles[name] / total) for name in STALLS if cycles[name]] if total else []
        return sorted(found, key=lambda item: -item[1])

    def limiter(self) -> str:
        """What keeps more blocks from a processor, "" where it is not known."""
        limits = {words: self[f"limit_{name}"] for name, words in _LIMITS.items()}
        known = {words: blocks for words, blocks in limits.items() if blocks is not None}
        return " and ".join(words for words, blocks in known.items() if blocks == min(known.values()))

    def limit(self) -> str:
        """What limits the kernel, in one line: see the module."""
        busiest, stalls = self.busiest(), self.stalls()[:3]
        if busiest is None:
            return "not known: ncu gave no share of any unit's peak"
        words, share = busiest
        if share >= BUSY:
            return f"{words}: {share:.0f} % of the peak"
        waits = ", ".join(f"{STALLS[name]} ({name}) {part:.0f} %" for name, part in stalls)
        return (
            f"latency: nothing is busy ({words}: {share:.0f} % of the peak); warps wait for {waits or 'nothing known'}"
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "grid": self.grid, "block": self.block, "limited_by": self.limit(),
                "occupancy_limited_by": self.limiter(), "stalls_pct": {name: round(p, 2) for name, p in self.stalls()},
                "values": dict(self.values)}  # fmt: skip


@dataclass
class Report:
    """The kernels of an output, in order, and why it is not whole."""

    kernels: list[Kernel] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(text: str, asked: Mapping[str, str]) -> Report:
    """The kernels in what ncu printed. asked: {field: metric}."""
    report, header, units = Report(), [], []
    missing: dict[str, None] = {}
    for line in text.splitlines():
        if not line.startswith('"'):
            continue
        cells = next(csv.reader(io.StringIO(line)), [])
        if cells[:1] == ["ID"]:
            header, units = cells, []
        elif header and cells[:1] == [""] and not units:
            units = cells
        elif header and cells[0].replace(",", "").isdigit():
            whole = len(cells) == len(units) == len(header) and line.count('"') % 2 == 0 and line.rstrip().endswith('"')
            if not whole:
                report.problems.append(
                    f"ncu's output is cut off: {len(cells)} of {len(header)} fields of kernel {cells[0]}"
                )
                continue
            row = dict(zip(header, zip(cells, units, strict=True), strict=True))
            values = {name: _number(*row.get(metric, ("", ""))) for name, metric in asked.items()}
            missing |= dict.fromkeys(name for name, value in values.items() if value is None)
            place = {name: row.get(name, ("", ""))[0] for name in ("Kernel Name", "Grid Size", "Block Size")}
            report.kernels.append(Kernel(place["Kernel Name"], place["Grid Size"], place["Block Size"], values))
    if header and not report.kernels and not report.problems:
        report.problems.append("ncu's output is cut off: a header without a kernel")
    lost = [name for name in ESSENTIAL if name in missing or (report.kernels and name not in asked)]
    if lost:
        report.problems.append(f"no value of {', '.join(asked.get(name, name) for name in lost)}")
    return report


def _number(text: str, unit: str) -> float | None:
    """In bytes, ns, or as it is; None for "n/a", "nan" and whatever else is no number."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value * _SCALES.get(unit.partition("/")[0], 1.0) if math.isfinite(value) else None
