"""The value an experiment returns: what was asked, what was measured, and what follows from it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qkv.insight.terminal import columns, number, paint, table

Measured = float | tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """A question settled by an experiment; its text (`print(answer)`) is made for a terminal.

    Parameters
    ----------
    topic : str
        The name it was asked by, as in `qkv.why("scale")`.
    question : str
        What the experiment settles, in one sentence.
    numbers : mapping of str to float or tuple of floats
        Everything that was measured, by name; tuples of one length are the columns of one table. Read-only.
    picture : str
        A terminal drawing of the numbers.
    verdict : str
        What the numbers say, and what they do not.
    sources : tuple of str
        Where the question, or the claim under test, comes from.
    trained : str
        What it costs models that were trained: measured beforehand, not by this call.
    """

    topic: str
    question: str
    numbers: Mapping[str, Measured]
    picture: str
    verdict: str
    sources: tuple[str, ...]
    trained: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", MappingProxyType(dict(self.numbers)))

    def __reduce__(self) -> tuple[object, ...]:  # a read-only view cannot be pickled, its content can
        texts = (self.picture, self.verdict, self.sources, self.trained)
        return Answer, (self.topic, self.question, dict(self.numbers), *texts)

    def __hash__(self) -> int:
        return hash((self.topic, self.question, tuple(self.numbers.items()), self.verdict))

    def __str__(self) -> str:
        width = min(columns(), 100)
        parts = [
            paint(f"{self.topic}: ", "dim") + paint(self.question, "bold"),
            _numbers(self.numbers),
            self.picture,
            textwrap.fill(self.verdict, width),
            textwrap.fill(self.trained, width),
            "\n".join(
                textwrap.fill(source, width, initial_indent="· ", subsequent_indent="  ") for source in self.sources
            ),
        ]
        return "\n\n".join(part for part in parts if part)


def prose(text: str) -> str:
    """A paragraph, of a text that is written over several lines.

    >>> prose('''One sentence.
    ...     And another.''')
    'One sentence. And another.'
    """
    return " ".join(text.split())


def _numbers(numbers: Mapping[str, Measured]) -> str:
    """Lay the numbers out: runs of series with one length share a table, single numbers a list."""
    blocks: list[list[list[str]]] = []
    length = None
    for name, value in numbers.items():
        row = [name, *map(number, value)] if isinstance(value, tuple) else [name, number(value)]
        if not blocks or len(row) != length:
            blocks.append([])
            length = len(row)
        blocks[-1].append(row)
    return "\n\n".join(table(block, "<" + ">" * 16) for block in blocks)
