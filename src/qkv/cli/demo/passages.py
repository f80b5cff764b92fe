"""A text cut into the passages that the demo looks things up in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SHORT, LONG = 30, 130  # words: shorter pieces are joined to the next one, longer ones are cut at a sentence's end

_WORD = re.compile(r"\w+")
_RULE = re.compile(r"^\s*([*=\-~^#+.])\1{2,}\s*$")
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)*])|(?<=[.!?]\*\*))\s+|\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """A piece of the text, where it stands (a topic, or a line of the file), and the heading above it."""

    where: str
    text: str
    heading: str = ""


@dataclass(frozen=True)
class Text:
    """A named text, cut into passages."""

    name: str
    size: int  # letters
    passages: tuple[Passage, ...]
    note: str = ""  # what had to be left out, in words


def cut(text: str) -> Iterator[Passage]:
    """Cut a text into passages of about a paragraph, each knowing the heading above it."""
    heading, held, start = "", "", 0
    for line, block in _blocks(text):
        title = _title(block)
        if title is not None:
            if held:
                yield Passage(f"line {start}", held, heading)
            heading, held = title, ""
            continue
        for piece in _pieces(block):
            if not held:
                start = line
            elif _count(held) >= SHORT and not (piece.startswith(" ") and _count(held) + _count(piece) <= LONG):
                yield Passage(f"line {start}", held, heading)
                held, start = "", line
            held = f"{held}\n\n{piece}" if held else piece
    if _count(held):
        yield Passage(f"line {start}", held, heading)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, block) for the runs of lines between blank ones."""
    block: list[str] = []
    for number, line in enumerate([*text.expandtabs(4).splitlines(), ""], 1):
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield number - len(block), "\n".join(block)
            block = []


def _title(block: str) -> str | None:
    """Return the heading that a block is (underlined, or marked with #), or None."""
    lines = block.split("\n")
    if len(lines) == 2 and _RULE.match(lines[1]) and not _RULE.match(lines[0]):
        return lines[0].strip()
    if len(lines) == 1 and lines[0].startswith("#") and _count(lines[0]):
        return lines[0].strip("# ")
    return None


def _pieces(block: str) -> Iterator[str]:
    """Yield the block, cut at sentence or line ends where it is longer than a passage should be."""
    if _count(block) <= LONG:
        yield block
        return
    sentences = SENTENCE_END.split(block)
    if max(map(_count, sentences)) > LONG:  # no sentences here (a poem, a table, a program): lines, then words
        sentences = [piece for line in block.split("\n") for piece in _by_words(line)]
    held = ""
    for sentence in sentences:
        if held and _count(held) + _count(sentence) > LONG:
            yield held
            held = ""
        held = f"{held}\n{sentence}" if held else sentence
    if held:
        yield held


def _by_words(line: str) -> Iterator[str]:
    words = line.split(" ")
    for first in range(0, len(words), LONG):
        yield " ".join(words[first : first + LONG])


def _count(text: str) -> int:
    return len(_WORD.findall(text))
