"""What a sweep found, as the table of docs/transformers.md."""

from __future__ import annotations

import statistics
from typing import Any

_CLASSES = {
    "equal": "qkv is called; outputs, gradients and greedy tokens are those of `eager`, and a wrong scale shows",
    "own": "attention in their own code: qkv is not called, and the results are `eager`'s to the last bit",
    "blind": "equal, but a wrong scale would hardly show: no proof",
    "disputed": "`eager`, `sdpa` and `qkv` all differ by more than 1e-3",
    "refused": "a clear error, with what to use instead",
    "KeyError": "the constructor looks the name up in a table of its own, and it cannot be set afterwards either",
    "failed": "another error, with `qkv` only",
    "unfinished": "not decided within the limits of time and memory",
    "WRONG": "**differ in silence**",
    "unbuilt": "not built small: it needs another package, or inputs of its own",
}


def counts(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The types of each class."""
    found: dict[str, list[str]] = {name: [] for name in _CLASSES}
    for record in sorted(records, key=lambda record: str(record["type"])):
        found[record["class"]].append(record["type"])
    return found


def summary(records: list[dict[str, Any]], every: int, version: str) -> str:
    """The table, and what it counts."""
    found = counts(records)
    tried = len(records)
    built = tried - len(found["unbuilt"]) - len(found["unfinished"])
    lines = [
        f"transformers {version}: {every} model types, {tried} tried, {built} built, {len(found['own'])} own, "
        f"{len(found['equal'])} equal, {len(found['WRONG'])} differ in silence",
        "",
        "| class | types | what it means |",
        "|---|---:|---|",
    ]
    lines += [f"| {name} | {len(found[name])} | {what} |" for name, what in _CLASSES.items() if found[name]]
    for case in ("plain", "right", "left", "holes", "packed", "gradients"):
        sizes = [r["cases"][case] for r in records if r["class"] == "equal" and case in r["cases"]]
        if sizes:
            lines.append(_case(case, sizes))
    tokens = [r["cases"]["tokens"] for r in records if r["class"] == "equal" and "tokens" in r["cases"]]
    lines.append(f"greedy tokens: {sum(x == 0 for x in tokens)} of {len(tokens)} equal")
    for name in _CLASSES:
        if name not in ("equal", "unbuilt") and found[name]:
            lines.append(f"\n{name}: {', '.join(found[name])}")
    later = [r["type"] for r in records if r.get("way") and r["class"] != "KeyError"]
    if later:
        lines.append(
            f"\nKeyError: 'qkv' in the constructor, right after set_attn_implementation: {', '.join(sorted(later))}"
        )
    dense = [r["type"] for r in records if r["class"] == "equal" and r.get("dense")]
    if dense:
        lines.append(f"\na mask of Lq x Lk is made (and said): {', '.join(sorted(dense))}")
    return "\n".join(lines)


def _case(case: str, sizes: list[float]) -> str:
    return f"{case}: {len(sizes)} types, median difference {statistics.median(sizes):.1e}, largest {max(sizes):.1e}"


def verdict(records: list[dict[str, Any]], *, whole: bool, least: int) -> int:
    """The exit code: 1 where anything differs in silence, or where a whole sweep built too few."""
    found = counts(records)
    built = len(records) - len(found["unbuilt"]) - len(found["unfinished"])
    few = whole and built < least
    if few:
        print(f"\nonly {built} types were built, and {least} are expected: failing builds hide faults")
    return int(bool(found["WRONG"]) or few)
