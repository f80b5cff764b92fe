"""Results as a table for people, and as plain data."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qkv.bench.peers import LEFT_OUT
from qkv.bench.race import OURS, Check, Result, Spread, Timing, ratio, spread
from qkv.insight.terminal import cells, pad, paint

_VERDICT = re.compile(r"(?<=[×% ] )(?:pass|near|miss|wrong result)(?=\s|$)", re.MULTILINE)
_STYLE = {"pass": "green", "near": "yellow", "miss": "red", "wrong result": "red"}
SCHEMA = 2
_HEAD = ["case", "qkv ms", "opponent", "ms", "ratio", "needed", "", "of limit"]


class Columns:
    """Columns with a name each; `sides` has "<" (text left) or ">" for each, `least` the width where it is more.

    >>> columns = Columns(["case", "ms"], "<>", [8, 6])
    >>> print(columns.head, columns.line(["full", "12.3"]), sep="\\n")
    case          ms
    full        12.3
    """

    def __init__(self, names: Sequence[str], sides: str, least: Sequence[int]) -> None:
        self._sides = sides
        self._widths = [max(cells(name), width) for name, width in zip(names, least, strict=True)]
        self.head = self.line(names)

    def line(self, texts: Sequence[str]) -> str:
        """One line; a text that is wider than its column moves those after it. Verdicts are in colour."""
        padded = (pad(*cell) for cell in zip(texts, self._widths, self._sides, strict=False))
        return _VERDICT.sub(lambda found: paint(found[0], _STYLE[found[0]]), "  ".join(padded).rstrip())


def milliseconds(seconds: float) -> str:
    """Three figures: 0.0123, 1.23, 123.

    >>> milliseconds(1.234e-5), milliseconds(0.0123456), milliseconds(1.5)
    ('0.0123', '12.3', '1,500')
    """
    ms = seconds * 1e3
    for limit, digits in ((0.1, 4), (1.0, 3), (10.0, 2), (100.0, 1)):
        if ms < limit:
            return f"{ms:.{digits}f}"
    return f"{ms:,.0f}"


def columns(names: Iterable[str]) -> Columns:
    """The table's columns, for rows of these names."""
    longest = max(map(cells, names), default=0)
    return Columns(_HEAD, "<><>>><<", (longest, 9, 13, 9, 7, 7, 12, 0))


def lines(result: Result, within: Columns) -> str:
    """One line of a row against its best peer, and one more for every target that names another opponent."""
    return "\n".join(map(within.line, _lines(result)))


def _lines(result: Result) -> list[list[str]]:
    row, timings = result.row, result.timings
    ours = timings[OURS]
    left = list(result.checks)
    best = next((check for check in left if check.opponent == result.best_peer), None)
    limit = next((check for check in left if check.opponent == "limit"), None)
    left = [check for check in left if check is not best and check is not limit]
    lines = [
        [
            row.name,
            _time(ours),
            result.best_peer or "none",
            _time(timings.get(result.best_peer or "")),
            _ratio(result.ratio),
            *_needed(best),
            _of_limit(result, limit),
        ]
    ]
    for check in left:
        against = timings.get(check.opponent)
        lines.append(
            [
                "",
                "",
                check.opponent or check.target.against,
                _time(against),
                _ratio(check.measured),
                *_needed(check),
                "",
            ]
        )
    return lines


def _time(timing: Timing | None) -> str:
    if timing is None or not timing.rounds:
        return "–"
    return milliseconds(spread(list(timing.rounds.values())).median)


def _ratio(measured: Spread | None) -> str:
    return f"{measured.median:.2f}×" if measured else "–"


def _needed(check: Check | None) -> list[str]:
    if check is None:
        return ["", ""]
    return [f"≥ {check.target.needed:.3g}×", check.verdict]


def _of_limit(result: Result, check: Check | None) -> str:
    if result.of_limit is None:
        return ""
    what = {"gemm": "GEMM", "read": "read"}[result.row.limit]
    text = f"{result.of_limit.median:.0%} {what}"
    return text if check is None else f"{text}, ≥ {check.target.needed:.0%} {check.verdict}"


def summary(results: Sequence[Result]) -> str:
    """How many targets were reached, which were not, and which peers could not take part."""
    checks = [(result.row.name, check) for result in results for check in result.checks]
    lines = []
    if checks:
        reached = sum(check.verdict == "pass" for _, check in checks)
        lines.append(f"{reached} of {len(checks)} targets reached.")
        lines += [f"  {check.verdict}: {_sentence(name, check)}" for name, check in checks if check.verdict != "pass"]
    lines += [f"  disagrees with float64: {text}" for text in disagreements(results)]
    if few := [result.row.name for result in results if 0 < len(result.timings[OURS].rounds) < 3]:
        lines.append(f"  in fewer than three rounds, since --seconds had no room for more: {', '.join(few)}")
    gaps = unavailable(results)
    chosen = [peer for peer, reason in gaps if reason == LEFT_OUT]
    if len(gaps) > len(chosen):
        lines.append("Not available:")
    lines += [f"  {peer}: {reason} ({_count(rows)})" for (peer, reason), rows in gaps.items() if reason != LEFT_OUT]
    if chosen:
        lines.append(f"Left out of this run, by --peers or --quick: {', '.join(chosen)}.")
    return "\n".join(lines)


def _sentence(name: str, check: Check) -> str:
    measured = f"{check.measured.median:.2f}" if check.measured else "not measured"
    against = "of the limit" if check.opponent == "limit" else f"× {check.opponent or check.target.against}"
    return f"{name}: {measured} {against}, needed {check.target.needed:.3g}"


def _count(rows: list[str]) -> str:
    return rows[0] if len(rows) == 1 else f"{len(rows)} rows"


def disagreements(results: Sequence[Result]) -> list[str]:
    """Contenders whose result is not attention; they are not timed."""
    return [
        f"{timing.name} on {result.row.name} (relative error {timing.error:.1e}{_of(timing)})"
        for result in results
        for timing in result.timings.values()
        if not timing.agrees and timing.error is not None
    ]


def _of(timing: Timing) -> str:
    return "" if timing.part == "out" else f" of {timing.part}"


def unavailable(results: Sequence[Result]) -> dict[tuple[str, str], list[str]]:
    """(peer, reason) -> rows that it could not run."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for timing in result.timings.values():
            if timing.unavailable:
                gaps.setdefault((timing.name, timing.unavailable), []).append(result.row.name)
    return gaps


def document(
    results: Sequence[Result],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    settings: Mapping[str, Any],
    seconds: float,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole run as plain data. Times in seconds; of the machine the processor is named and nothing else."""
    from qkv import __version__

    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "versions": {"qkv": __version__, "python": platform.python_version(), "torch": torch.__version__, **versions},
        "settings": dict(settings),
        "seconds": round(seconds, 1),
        "rows": [_row(result) for result in results],
        **(extras or {}),
    }


def _row(result: Result) -> dict[str, Any]:
    case = result.row.case
    fields = ("dtype", "B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "mask", "size", "cold", "backward")
    return {
        "name": result.row.name,
        "case": {name: getattr(case, name) for name in fields},
        "flops": case.flops,
        "kv_bytes": case.kv_bytes,
        "contenders": {name: _timing(timing, result.timings[OURS]) for name, timing in result.timings.items()},
        "best_peer": result.best_peer,
        "ratio": _spread(result.ratio),
        "limit": {"kind": result.row.limit, "seconds": result.limit_seconds, "reached": _spread(result.of_limit)},
        "targets": [
            {
                "against": check.target.against,
                "opponent": check.opponent,
                "needed": check.target.needed,
                "measured": _spread(check.measured),
                "verdict": check.verdict,
            }
            for check in result.checks
        ],
    }


def _timing(timing: Timing, ours: Timing) -> dict[str, Any]:
    if timing.unavailable:
        return {"unavailable": timing.unavailable}
    known: dict[str, Any] = {
        "seconds": _spread(spread(list(timing.rounds.values())) if timing.rounds else None),
        "times_ours": _spread(ratio(timing.rounds, ours.rounds)),
        "rounds": len(timing.rounds),
        "error": timing.error,
        "error_of": timing.part,
        "agrees": timing.agrees,
    }
    return known | ({"path": timing.note} if timing.note else {})


def _spread(values: Spread | None) -> dict[str, float] | None:
    return values._asdict() if values else None
