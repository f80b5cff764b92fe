"""A table that is printed a line at a time, as results come: the widths of its columns are set beforehand."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qkv.insight.terminal import cells, pad, paint

_VERDICT = re.compile(r"(?<=[×% ] )(?:pass|near|miss|wrong result)(?=\s|$)", re.MULTILINE)
_STYLE = {"pass": "green", "near": "yellow", "miss": "red", "wrong result": "red"}


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
