"""The value an experiment returns: what was asked, what was measured, and what follows from it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qkv.insight.terminal import bar, cells, columns, number, pad, paint, table

Measured = float | tuple[float, ...]

# Every unit and term that a text may use without saying what it is; print() defines those that it finds in it.
UNITS = {
    "nats": "an entropy of H nats is that of e^H equal weights; 1 nat is 1.44 bits",
    "bits per byte": "yes/no questions left for each next byte of text; fewer is better",
    "bytes a token": "what the cache of one layer keeps of each token it has read",
    "FLOPs": "floating-point operations; a product and a sum are two",
    "logit": "a score before the softmax",
    "lead": "how far the best score is above the log of what all others sum to",
    "effective tokens": "e^entropy: as many equal weights are as spread out",
    "lse": "log of the sum of the e^score of a row, the denominator of its softmax",
    "total variation": "the weight that would have to move to make two rows equal: 0 same, 1 disjoint",
    "muP": "a way to scale widths so that learning rates carry over",
}


@dataclass(frozen=True)
class Answer:
    """A question settled by an experiment; its text (`print(answer)`) fits one screen of a terminal.

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
    short : str
        The answer in one line; like the verdict it follows from the numbers.
    data : str
        What was measured: random numbers of a seed, or the caller's tensors.
    """

    topic: str
    question: str
    numbers: Mapping[str, Measured]
    picture: str
    verdict: str
    sources: tuple[str, ...]
    trained: str = ""
    short: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", MappingProxyType(dict(self.numbers)))

    def __reduce__(self) -> tuple[object, ...]:  # a read-only view cannot be pickled, its content can
        texts = (self.picture, self.verdict, self.sources, self.trained, self.short, self.data)
        return Answer, (self.topic, self.question, dict(self.numbers), *texts)

    def __hash__(self) -> int:
        return hash((self.topic, self.question, tuple(self.numbers.items()), self.verdict))

    def __str__(self) -> str:
        return self._text(self.picture)

    def full(self) -> str:
        """The text that is printed, and after its picture the table of every number.

        Returns
        -------
        str
        """
        return self._text(self.picture, _numbers(self.numbers))

    def json(self) -> str:
        """Everything in it, as JSON; a number that JSON cannot write (inf, nan) is null.

        Returns
        -------
        str

        Examples
        --------
        >>> import json, qkv
        >>> json.loads(qkv.why("lookup").json())["numbers"]["sharpness (the scale argument)"]
        [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
        """
        names = ("topic", "question", "short", "data", "picture", "verdict", "trained", "sources")
        parts: dict[str, object] = {name: getattr(self, name) for name in names}
        parts["numbers"] = {name: _plain(value) for name, value in self.numbers.items()}
        return json.dumps(parts, ensure_ascii=False, allow_nan=False, indent=1)

    def _text(self, *drawn: str) -> str:
        width = min(columns(), 100)
        asked = f"{self.topic}: {self.question}" + (f" ({self.data})" if self.data else "")
        told = "\n".join(textwrap.fill(text, width) for text in (self.verdict, self.trained) if text)
        said = f"{self.short} {self.question} {''.join(drawn)} {told}"
        notes = [f"{term}: {meaning}." for term, meaning in UNITS.items() if re.search(rf"\b{term}\b", said)]
        below = [textwrap.fill(line, width, initial_indent="· ", subsequent_indent="  ") for line in self.sources]
        small = "\n".join([*(textwrap.fill(note, width) for note in notes), *below])
        head = paint(textwrap.fill(self.short, width), "bold") + "\n" + paint(textwrap.fill(asked, width), "dim")
        return "\n\n".join(part for part in (head, *drawn, told, small) if part)


def _plain(value: Measured) -> object:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value if math.isfinite(value) else None


def prose(text: str) -> str:
    """A paragraph, of a text that is written over several lines.

    >>> prose('''One sentence.
    ...     And another.''')
    'One sentence. And another.'
    """
    return " ".join(text.split())


def bars(rows: Mapping[str, float], width: int = 30, largest: float = 1.0) -> str:
    """A line for each number: its name, a bar, the number.

    >>> print(bars({"one head": 0.5, "two heads": 1.0}, width=8))
    one head   ████     0.500
    two heads  ████████ 1
    """
    wide = max(map(cells, rows), default=0)
    return "\n".join(f"{pad(name, wide)}  {bar(value, width, largest)} {number(value)}" for name, value in rows.items())


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


def one(value: Measured) -> float:
    """A measured value that is a single number."""
    if isinstance(value, tuple):
        raise TypeError(value)
    return value


def series(value: Measured) -> tuple[float, ...]:
    """A measured value that is a row of a table."""
    if not isinstance(value, tuple):
        raise TypeError(value)
    return value
