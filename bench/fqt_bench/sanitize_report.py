"""What compute-sanitizer writes, as findings: one for each place in a kernel, with how often it was reported.

A report is a line behind "========= " and, indented, what belongs to it. Every such line is either known or a problem: an
output that is not understood, that has no summary, or whose reports do not add up to its summary is never "0 errors".

Source: NVIDIA's Compute Sanitizer manual, 2025 (https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fqt.cli import table

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MAX_LINES = 8  # of a report that are kept
SHOWN = 20  # findings of a tool that are printed; the file has all
_PREFIX = re.compile(r"^={8,9}( *)(.*?)\s*$")
# Triton calls a kernel as its Python function; torch's are C++ names, in which ours cannot occur.
_OURS = re.compile(r"(?<![\w:])_[a-z0-9]\w*_kernel\b")
_ERRORS = re.compile(r"ERROR SUMMARY: ([\d.,]+) errors?$")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: ([\d.,]+) hazards? displayed \(([\d.,]+) errors?, ([\d.,]+) warnings?\)$")
_NOT_PRINTED = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: ([\d.,]+) (?:errors?|hazards?) (?:was|were) not printed")
_RACE = re.compile(r"(Error|Warning|Info): (?:\(.*?\) )?(Race reported|Potential \w+ hazard)", re.IGNORECASE)
_KINDS = re.compile(
    r"Invalid |Uninitialized |Barrier error detected|Warpgroup MMA |Potential invalid |Deadlock detected|Malloc/Free error|"
    r"Misaligned |Tensor Memory |Hardware exception|Illegal |Stack overflow|Unused ",
    re.IGNORECASE,
)
_HOST = re.compile(r"Program hit |Host API |Leaked |Fatal UVM", re.IGNORECASE)
_IGNORED = re.compile(r"COMPUTE-SANITIZER|LEAK SUMMARY|Tracking kernels launched|Default timeout can be adjusted")
# Continuations, should a version not indent them.
_MORE = re.compile(
    r"(at|in|by|and|Address|Access|Device Frame|Host Frame|Saved host|Write Thread|Read Thread|Current Value)\b"
)
_FRAME = re.compile(r"(?:at|Device Frame:?|access at) (.+?)(?:\(|\+0x|:0x| \[| in |$)")


@dataclass
class Finding:
    """What was reported at one place.

    kind: the first line, as "Invalid __global__ read of size 4 bytes". kernel: the kernel's name, None of a call of the
    host. ours: whether it is a kernel of this package. place: where in it. lines: the first report, trimmed. count: reports.
    """

    tool: str
    kind: str
    kernel: str | None
    ours: bool
    place: str
    lines: list[str]
    count: int = 1

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


@dataclass
class Report:
    """An output: findings, what its summary counts, and the problems that keep it from being trusted."""

    findings: list[Finding] = field(default_factory=list)
    errors: int | None = None  # None where there is no summary
    warnings: int = 0
    not_printed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ours(self) -> list[Finding]:
        return [f for f in self.findings if f.ours]


@dataclass
class Outcome:
    """What a tool came to.

    status: "clean", "found", "failed" (its output cannot be trusted, see reason), "blind" (the planted fault was not
    reported), "not finished" (cut off; what was found until then is there), or "not run". control: "reported", or why not.
    """

    tool: str
    status: str = "not run"
    reason: str = ""
    control: str = "not run"
    report: Report = field(default_factory=Report)
    checks: int = 0
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == "clean"

    def record(self) -> dict[str, Any]:
        """For JSON: findings in our kernels, and those in others."""
        found = {ours: [f.record() for f in self.report.findings if f.ours == ours] for ours in (True, False)}
        return {
            "tool": self.tool, "status": self.status, "reason": self.reason, "control": self.control,
            "errors": self.report.errors, "warnings": self.report.warnings, "checks": self.checks,
            "seconds": round(self.seconds, 1), "command": self.command, "findings": found[True],
            "in_other_kernels": found[False], "problems": self.report.problems,
        }  # fmt: skip


def parse(text: str, tool: str) -> Report:
    """The findings of a tool's output; with problems where it is not understood, cut off, or contradicts itself."""
    report, found, displayed = Report(), {}, None
    for head, more in _records(text):
        if _IGNORED.match(head):
            continue
        if match := _ERRORS.match(head):
            displayed = report.errors = _number(match[1])
        elif match := _HAZARDS.match(head):
            displayed, report.errors, report.warnings = map(_number, match.groups())
        elif match := _NOT_PRINTED.match(head):
            report.not_printed += _number(match[1])
        elif (finding := _finding(tool, head, more)) is None:
            report.problems.append(head[:300])
        else:
            key = finding.kind, finding.kernel, finding.place
            if key in found:
                found[key].count += 1
            else:
                found[key] = finding
    report.findings = list(found.values())
    reported = sum(finding.count for finding in report.findings)
    if displayed is None:
        report.problems.append("no summary: the output ends before it")
    elif tool != "racecheck" and displayed != reported + report.not_printed:
        missing = f"{report.not_printed} not printed" if report.not_printed else "none left out"
        report.problems.append(f"the summary counts {displayed} errors, but {reported} were read and {missing}")
    elif tool == "racecheck" and displayed != reported:
        report.problems.append(f"the summary counts {displayed} hazards, but {reported} were read")
    if report.not_printed:
        report.problems.append(f"{report.not_printed} reports were not printed: any kernel may have been meant")
    return report


def _number(text: str) -> int:
    return int(re.sub(r"[.,]", "", text))  # thousands as the machine's language writes them


def _records(text: str) -> list[tuple[str, list[str]]]:
    """(first line, lines that belong to it) of each report, without the prefix."""
    records: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = _PREFIX.match(line)
        if match is None or not match[2]:
            continue
        blanks, words = match.groups()
        if records and (len(blanks) > 1 or _MORE.match(words)):
            records[-1][1].append(words)
        else:
            records.append((words, []))
    return records


def _finding(tool: str, head: str, more: list[str]) -> Finding | None:
    """What a report says; None where it is none, or of an unknown form."""
    lines = [head, *(line for line in more if not line.startswith(("Host Frame", "Saved host")))]
    text = "\n".join(lines)
    ours, frames = _OURS.search(text), _FRAME.findall(text)
    kernel = ours[0] if ours else frames[-1].strip()[:120] if frames else None
    if race := _RACE.match(head):
        kind = f"{race[1].lower()}: {race[2]}"
    elif _HOST.match(head):
        kind, kernel, ours = head, None, None
    elif _KINDS.match(head) and kernel:
        kind = head.rstrip(".")
    else:
        return None
    places = re.findall(r"\S+\+0x[0-9a-f]+(?: in \S+)?|0x[0-9a-f]+ in \S+", text) if kernel else []
    return Finding(tool, kind, kernel, ours is not None, ", ".join(dict.fromkeys(places))[:300], lines[:MAX_LINES])


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each tool, then the findings."""
    rows = []
    for o in outcomes:
        others = len(o.report.findings) - len(o.report.ours)
        counts = (str(len(o.report.ours)), str(others), "-" if o.report.errors is None else str(o.report.errors))
        rows.append((o.tool, o.status, *counts, o.control.partition(" (")[0], f"{o.seconds:.0f} s", o.reason[:100]))
    header = ("tool", "status", "places", "elsewhere", "errors", "planted fault", "took", "because")
    parts = [table(header, rows, right=(2, 3, 4))]
    for o in outcomes:
        ours = o.report.ours
        parts += ["\n  ".join([f"{o.tool}: {f.kernel}, {f.count} times", *f.lines]) for f in ours[:SHOWN]]
        parts += [f"{o.tool}: {len(ours) - SHOWN} more"] * (len(ours) > SHOWN)
    return "\n\n".join(parts)
