"""What was seen, on one screen of 80 columns and 24 rows: layers, warnings, what was not seen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from qkv.insight.terminal import fit, table
from qkv.insight.watch.findings import History

WIDTH, HEIGHT = 80, 24
_MOST_NOTES = 8


def summary(title: str, layers: dict[str, History], notes: list[str]) -> str:
    """A screen; the layers with warnings come first where not all fit, and none is left out without a word."""
    warned = [(name, h) for name, h in layers.items() if h.kinds]
    said = [line for name, h in warned for line in _told(name, h)]
    text = [*said, *notes]
    cut = (
        text
        if len(text) <= _MOST_NOTES
        else [*text[: _MOST_NOTES - 1], f"… and {len(text) - _MOST_NOTES + 1} more: see .warnings and .not_seen"]
    )
    room = HEIGHT - 1 - 1 - len(cut) - 1  # title, heading, notes, a line for the layers that do not fit
    names = list(layers)
    if len(names) > room:
        first = [name for name, _ in warned][: room - 1]
        kept = set([*first, *[n for n in names if n not in first]][:room])
        left = len(names) - len(kept)
        names = [n for n in names if n in kept]
    else:
        left = 0
    rows = [_row(name, layers[name]) for name in names]
    heading = ["layer", "looked", "tokens", "logit", "first", "heads", "NaN"]
    lines = [title, *(table([heading, *rows], "<>>>><>").splitlines() if rows else [])]
    if left:
        lines.append(f"… and {left} layers without warnings")
    return "\n".join(fit(line, WIDTH) for line in [*lines, *cut])


def _row(name: str, h: History) -> list[str]:
    r = h.last
    heads = [
        f"{len(r[key])} {word}"
        for key, word in (("uniform_heads", "uniform"), ("sink_heads", "sink"), ("saturated_heads", "sure"))
        if r[key]
    ]
    if r["duplicate_heads"]:
        heads.append(f"{len({h for pair in r['duplicate_heads'] for h in pair[:2]})} alike")
    shown = name if len(name) <= 26 else "…" + name[-25:]
    of = f"{len(r['heads'])}: " if heads else f"{len(r['heads'])}"
    return [
        shown or "(model)", f"{h.looked:,}", _span(r["tokens"]), _largest(r["logit"]), _percent(r["first"]),
        fit(of + ", ".join(heads), 24), f"{r['nan']['rows']:,}" if r["nan"]["rows"] else "-",
    ]  # fmt: skip


def _real(values: Any) -> list[float]:
    return [x for x in values or () if x is not None]


def _span(values: Any) -> str:
    real = _real(values)
    if not real:
        return "-"
    low, high = (_one_place(x) for x in (min(real), max(real)))
    return low if low == high else f"{low}..{high}"


def _largest(values: Any) -> str:
    real = _real(values)
    return _one_place(max(real)) if real else "-"


def _one_place(x: float) -> str:
    return f"{x:.1f}" if abs(x) < 1000 else f"{x:,.0f}"


def _percent(values: Any) -> str:
    real = _real(values)
    return f"{100 * sum(real) / len(real):.0f}%" if real else "-"


def _told(name: str, h: History) -> Iterable[str]:
    latest = {w["kind"]: w for w in h.last.get("warnings", ())}
    for kind, count in h.kinds.items():
        if kind == "nan" and h.nan is not None:
            yield f"! {name or 'model'}: NaN from step {h.nan['step']}, row {h.nan['row']} of head {h.nan['head']}"
        elif kind in latest:
            yield f"! {name or 'model'}: {latest[kind]['text']} ({count} of {h.looked})"
        else:
            yield f"! {name or 'model'}: {kind} ({count} of {h.looked}, not the last time)"


def wrapped(text: str) -> list[str]:
    """A note in lines of the screen's width."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
