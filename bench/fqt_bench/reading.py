"""Results that `fqt bench` wrote: found, read, and held against `schema.json`. Standard library only.

A result may come from anywhere: it is data, never trusted. What is not a whole result of this schema is `Refused` with the
reason; text is stripped of what does not print and, in remarks, of folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("schema.json")
VERSION = 3
OTHER = "not a result of fqt bench"  # begins the reason against what is something else
MAX_BYTES = 256 * 2**20  # a result with every sample is a few MiB
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|/)(?:[^\s:'\"<>|/\\]+[/\\])+(?=[^\s/\\])")


class Refused(ValueError):
    """A file that is no result of this schema; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Run:
    """One result. file: its name, without folders."""

    file: str
    result: dict[str, Any]

    @property
    def gpu(self) -> str | None:
        """The GPU's name; None of a run on the CPU."""
        environment = self.result["environment"]
        return (environment["gpu"] or "unknown GPU") if environment["device"] == "cuda" else None

    @property
    def machine(self) -> str:
        """The GPU's name, or "CPU" and its model."""
        return self.gpu or f"CPU ({self.result['environment'].get('cpu') or 'unknown'})"

    @property
    def date(self) -> str:
        return self.result["environment"]["date"]

    @property
    def commit(self) -> str:
        e = self.result["environment"]
        return f"{(e['commit'] or 'unknown')[:9]}{' with changes' if e['dirty'] else ''}"


def find(paths: Iterable[Path]) -> list[Path]:
    """The files named, and all *.json in the folders named; each once, in the order of their paths."""
    found = {p.resolve(): p for path in paths for p in (sorted(path.rglob("*.json")) if path.is_dir() else [path])}
    return [found[key] for key in sorted(found)]


def load(paths: Iterable[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """The results, oldest first, and the files refused with the reasons."""
    runs, refused = [], []
    for path in paths:
        try:
            runs.append(read(path))
        except Refused as e:
            refused.append((path, str(e)))
    return sorted(runs, key=lambda run: (run.date, run.file, run.commit)), refused


def read(path: Path) -> Run:
    """One result. Raises Refused."""
    result = parse(path)
    if not isinstance(result, dict) or "schema" not in result:
        raise Refused(f'{OTHER}: it has no field "schema"')
    if "suites" not in result and "cases" not in result:
        raise Refused(f"{OTHER}: it has no cases")
    if result["schema"] != VERSION or isinstance(result["schema"], bool):
        raise Refused(f"schema {_shown(result['schema'])}, and this reads schema {VERSION} alone")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for problem in mismatches(result, schema, schema):
        raise Refused(problem)
    if result["ceilings"] is not None:
        _check_ceilings(result["ceilings"])
    return Run(_printable(path.name), clean(result))


def parse(path: Path) -> Any:
    """What a file holds as JSON, of whatever form. Raises Refused."""
    try:
        if not path.is_file():
            raise Refused("no such file" if not path.exists() else "not a plain file")
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"larger than {MAX_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as e:
        raise Refused(f"cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise Refused(f"not JSON: not UTF-8 at byte {e.start}") from e
    except json.JSONDecodeError as e:
        where = "it ends too early" if e.pos >= len(e.doc.rstrip()) else f"{e.msg} in line {e.lineno}"
        raise Refused(f"not JSON: {where}") from e
    except (RecursionError, ValueError) as e:  # nested too deep; or an integer with too many digits
        raise e if isinstance(e, Refused) else Refused(f"not JSON that can be read: {e}") from e


def _no_constant(name: str) -> None:
    raise Refused(f"not JSON: {name} is no number")


def _check_ceilings(entry: dict[str, Any]) -> None:
    from fqt.cost import Ceilings

    try:
        Ceilings(*(entry[name] for name in ("bf16_tflops", "int8_tops", "fp8_tflops", "tb_s")), "measured")
    except ValueError as e:
        raise Refused(f"ceilings: {e}") from e


def clean(value: Any, field: str = "") -> Any:
    """The same value with its text printable, and without the folders that a remark (of an exception, say) names."""
    if isinstance(value, dict):
        return {_printable(key): clean(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, field) for item in value]
    if isinstance(value, str):
        return _printable(_FOLDERS.sub("…/", value) if field == "remark" else value)
    return value


def _printable(text: str) -> str:
    """Control characters, lone surrogates and marks that turn the direction of writing become blanks."""
    return "".join(c if c.isprintable() else " " for c in text)


# ---- the schema

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: _is_number(v),
    "integer": lambda v: _is_number(v) and v == v // 1,
}
_LIMITS: dict[
    str, tuple[str, Callable[[Any, Any], bool], str]
] = {  # keyword: of which type, whether it holds, in words
    "minimum": ("number", lambda v, limit: v >= limit, "at least"),
    "exclusiveMinimum": ("number", lambda v, limit: v > limit, "more than"),
    "minLength": ("string", lambda v, limit: len(v) >= limit, "of a length of at least"),
    "minItems": ("array", lambda v, limit: len(v) >= limit, "a list of at least"),
    "minProperties": ("object", lambda v, limit: len(v) >= limit, "an object with at least"),
    "pattern": ("string", lambda v, limit: re.search(limit, v) is not None, "text like"),
    "uniqueItems": (
        "array",
        lambda v, limit: not limit or len(v) == len({json.dumps(i) for i in v}),
        "without repeats:",
    ),
}
_ANNOTATIONS = {"$schema", "$defs", "$id", "title", "description", "examples", "then", "else"}


def mismatches(value: Any, schema: Any, root: dict[str, Any], where: str = "") -> Iterator[str]:
    """How a value departs from a JSON schema, as sentences that begin with the field. It knows the keywords that
    `schema.json` uses, and raises NotImplementedError for any other: jsonschema is not among what fqt installs."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{where or 'the file'}: not allowed here"
        return
    for keyword, rule in schema.items():
        if keyword in _LIMITS:
            kind, holds, words = _LIMITS[keyword]
            if _TYPES[kind](value) and not holds(value, rule):
                yield f"{where or 'the file'}: must be {words} {rule}, got {_shown(value)}"
        elif keyword in _RULES:
            yield from _RULES[keyword](value, rule, schema, root, where)
        elif keyword not in _ANNOTATIONS:
            raise NotImplementedError(f"schema keyword {keyword!r}")


def _type(value: Any, rule: str | Sequence[str], schema: Any, root: Any, where: str) -> Iterator[str]:
    names = [rule] if isinstance(rule, str) else rule
    if not any(_TYPES[name](value) for name in names):
        yield f"{where or 'the file'}: must be {' or '.join(names)}, got {_shown(value)}"


def _enum(value: Any, rule: Sequence[Any], schema: Any, root: Any, where: str) -> Iterator[str]:
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in rule):
        yield f"{where or 'the file'}: must be {', '.join(map(_shown, rule))}, got {_shown(value)}"


def _required(value: Any, rule: Sequence[str], schema: Any, root: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{_at(where, name)}: missing" for name in rule if name not in value)


def _properties(value: Any, rule: dict[str, Any], schema: Any, root: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name in (name for name in rule if name in value):
            yield from mismatches(value[name], rule[name], root, _at(where, name))


def _additional(value: Any, rule: Any, schema: Any, root: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name in sorted(value.keys() - schema.get("properties", {}).keys()):
            yield from mismatches(value[name], rule, root, _at(where, name))


def _items(value: Any, rule: Any, schema: Any, root: Any, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from mismatches(item, rule, root, f"{where}[{i}]")


def _reference(value: Any, rule: str, schema: Any, root: dict[str, Any], where: str) -> Iterator[str]:
    yield from mismatches(value, root["$defs"][rule.removeprefix("#/$defs/")], root, where)


def _if(value: Any, rule: Any, schema: Any, root: dict[str, Any], where: str) -> Iterator[str]:
    branch = "else" if any(True for _ in mismatches(value, rule, root, where)) else "then"
    yield from mismatches(value, schema.get(branch, True), root, where)


_RULES = {"type": _type, "enum": _enum, "const": lambda v, rule, *rest: _enum(v, [rule], *rest), "required": _required,
          "properties": _properties, "additionalProperties": _additional, "items": _items, "$ref": _reference,
          "if": _if}  # fmt: skip


def _is_number(value: Any) -> bool:
    """Finite, and small enough to be written as a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _at(where: str, name: str) -> str:
    return _printable(f"{where}.{name}" if where else name)[:200]


def _shown(value: Any) -> str:
    text = _printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}…"
