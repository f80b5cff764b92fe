"""Plain-text drawing for a terminal: bars, heat-maps and tables in unicode, no dependency.

Width is measured in terminal cells (a CJK letter takes two), and colour is used only where it can be seen:
on a terminal, unless NO_COLOR is set or TERM is "dumb".
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHADES = " ░▒▓█"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_WIDEST = 120  # wider lines of text are hard to read, whatever the terminal


def columns(stream: TextIO | None = None) -> int:
    """Return the width to draw for: the terminal's own (at most 120), and 80 where there is none.

    >>> import io
    >>> columns(io.StringIO())
    80
    """
    if not is_terminal(stream):
        return 80
    return max(40, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns))


def is_terminal(stream: TextIO | None = None) -> bool:
    """Say whether the stream (standard output by default) is a terminal that a person looks at."""
    stream = sys.stdout if stream is None else stream
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no such method, or a closed stream
        return False


def has_colour(stream: TextIO | None = None) -> bool:
    """Say whether colour codes may be written: a terminal, NO_COLOR unset or empty, TERM not "dumb"."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and is_terminal(stream)


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """Wrap text in the codes of a style ("bold", "dim", "red", "green", …) where colour may be used.

    >>> import io
    >>> paint("plain", "bold", io.StringIO())
    'plain'
    """
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if has_colour(stream) else text


def cells(text: str) -> int:
    """Count the terminal cells that a text takes.

    >>> cells("abc"), cells("注意"), cells("e\u0301")
    (3, 4, 1)
    """
    return sum(_cell(letter) for letter in text)


def _cell(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Cf", "Cc", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def fit(text: str, width: int) -> str:
    """Cut a text to at most `width` cells, marking a cut with "…".

    >>> fit("a soft dictionary", 10), fit("short", 10)
    ('a soft di…', 'short')
    """
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for letter in text:
        used += _cell(letter)
        if used > width - 1:
            break
        kept.append(letter)
    return "".join(kept).rstrip() + "…" if width > 0 else ""


def pad(text: str, width: int, align: str = "<") -> str:
    """Fill a text with spaces to `width` cells; align is "<" (text left) or ">" (text right)."""
    space = " " * max(0, width - cells(text))
    return space + text if align == ">" else text + space


def bar(value: float, width: int, largest: float = 1.0) -> str:
    """Draw value / largest as a bar `width` cells long, in eighths of a cell.

    >>> bar(0.5, 8), bar(1.0, 3), bar(0.0, 2)
    ('████    ', '███', '  ')

    A value above zero always leaves a mark, and one that is not finite is drawn as "?":

    >>> bar(1e-9, 4), bar(float("nan"), 4)
    ('▏   ', '?   ')
    """
    share = value / largest if largest > 0 else 0.0
    if share != share or share in (float("inf"), float("-inf")):
        return pad("?", width)
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    eighths = max(eighths, 1) if share > 0 else eighths
    whole, part = divmod(eighths, 8)
    return pad("█" * whole + (_EIGHTHS[part] if part else ""), width)


def heatmap(values: Sequence[Sequence[float]], rows: Sequence[str] = (), names: Sequence[str] = ()) -> str:
    """Draw a small matrix of weights in [0, 1], one shaded cell each, with its row and column names.

    >>> print(heatmap([[1.0, 0.0], [0.5, 0.5]], ["cat", "dog"], ["le", "chien"]))
         le     chien
    cat  ██████
    dog  ▒▒▒▒▒▒ ▒▒▒▒▒▒
    """
    left = max((cells(name) for name in rows), default=0)
    wide = max([2, *(cells(name) + 1 for name in names)])
    lines = []
    if names:
        lines.append(" " * (left + 2) + " ".join(pad(name, wide) for name in names))
    for index, row in enumerate(values):
        name = rows[index] if index < len(rows) else ""
        lines.append(pad(name, left) + "  " + " ".join(_shade(value) * wide for value in row))
    return "\n".join(line.rstrip() for line in lines)


def _shade(value: float) -> str:
    if value != value:
        return "?"
    return _SHADES[min(len(_SHADES) - 1, max(0, round(value * (len(_SHADES) - 1))))]


def table(rows: Iterable[Sequence[str]], align: str = "", gap: int = 2) -> str:
    """Lay out rows of text in columns; align has "<" or ">" for each column ("<" where missing).

    >>> print(table([["d", "variance"], ["4", "4.1"], ["1024", "1018"]], align="<>"))
    d     variance
    4          4.1
    1024      1018
    """
    grid = [list(row) for row in rows]
    count = max((len(row) for row in grid), default=0)
    grid = [row + [""] * (count - len(row)) for row in grid]
    widths = [max(cells(row[c]) for row in grid) for c in range(count)]
    sides = align.ljust(count, "<")[:count]
    return "\n".join(
        (" " * gap).join(pad(text, width, side) for text, width, side in zip(row, widths, sides, strict=True)).rstrip()
        for row in grid
    )


def number(value: float) -> str:
    """Write a number in at most about seven letters, readable at a glance.

    >>> [number(x) for x in (0.0, 8.0, 0.0625, 0.99999, 253.52, 1018.4, 16384, 3.2e-16)]
    ['0', '8', '0.0625', '1.000', '253.5', '1,018', '16,384', '3.2e-16']
    """
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    size = abs(value)
    if size < 1e-3:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.1:
        return f"{value:.4f}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


def amount(count: float, unit: str, step: int = 1000) -> str:
    """A number of bytes or operations.

    >>> amount(65_536, "B", 1024), amount(4.2e9, "FLOP"), amount(12, "B", 1024)
    ('64.0 KiB', '4.20 GFLOP', '12 B')
    """
    size, prefixes = (
        float(count),
        ["", "k" if step == 1000 else "Ki", *(p + ("i" if step == 1024 else "") for p in "MGTPE")],
    )
    place = 0
    while size >= step and place < len(prefixes) - 1:
        size, place = size / step, place + 1
    written = f"{size:.0f}" if place == 0 else f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f}"
    return f"{written} {prefixes[place]}{unit}"
