"""Files of results: JSON lines, a row a line, of one processor and instruction set.

A file has up to six parts, `calls`, `training`, `caches`, `insight`, `sparse` and `models`; a run writes its own and
keeps the others. The first line of a part says what was run on what; every other line is one row, and `of` names the
list it is from.

    {"part": "calls", "schema": 2, "date": …, "machine": …, "versions": …, "settings": …, "seconds": …}
    {"part": "calls", "of": "rows", "name": "full 2048 d128 f32", …}
    {"part": "calls", "of": "memory", "name": "causal 4096 f32", …}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv.errors import ArgumentError

DIGITS = 4  # significant ones of every measured number: more than two runs ever agree in


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The same data with floats cut to so many significant digits.

    >>> rounded({"median": 0.0459416465, "rounds": 8, "of": [1234.5678]})
    {'median': 0.04594, 'rounds': 8, 'of': [1235.0]}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    return [rounded(inner, digits) for inner in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, part: str, document: Mapping[str, Any]) -> None:
    """Put a run (see `report.document`) in the place of what the file holds of this part."""
    lists = {key: rows for key, rows in document.items() if isinstance(rows, list)}
    head = {"part": part, **{key: value for key, value in document.items() if key not in lists}}
    lines = [line for line in _lines(path) if line["part"] != part]
    lines += [head, *({"part": part, "of": key, **row} for key, rows in lists.items() for row in rows)]
    text = "".join(json.dumps(rounded(line), ensure_ascii=False) + "\n" for line in lines)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a file by part, each as `report.document` gave it."""
    found: dict[str, dict[str, Any]] = {}
    for line in _lines(path):
        part, key = line.pop("part"), line.pop("of", None)
        if key is None:
            found[part] = {**line, "rows": []}
        else:
            found[part].setdefault(key, []).append(line)
    return found


def check(path: Path, part: str, machine: Mapping[str, Any], isa: str | None) -> None:
    """Refuse a file that is none of results, or whose other parts are of another processor or instruction set."""
    for other, run in read(path).items():
        theirs, wanted = (run["machine"]["cpu"], run["settings"].get("isa")), (machine["cpu"], isa)
        if other != part and theirs != wanted:
            rule = "a file of results is of one processor and instruction set"
            given = f"{path}, of {theirs[0]} (--isa {theirs[1]}), and a run on {wanted[0]} (--isa {wanted[1]})"
            raise ArgumentError.of("qkv bench", rule, given, "Name another file")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any("part" not in line for line in lines):
            raise ValueError("a line without its part")
    except (ValueError, TypeError) as error:
        rule = "a file of results holds JSON lines, each with its part"
        raise ArgumentError.of("qkv bench", rule, f"{path} ({error})", "Name another file") from None
    return lines
