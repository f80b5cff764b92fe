"""From a text to the passages that the demo looks things up in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qkv.errors import ArgumentError, describe

LARGEST = 8 * 2**20  # bytes read of a file; more would take longer than a demo should
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


def read_reference() -> Text:
    """Return the language reference that this Python carries (what `help("with")` prints).

    Raises
    ------
    ArgumentError
        If this Python was built without it.
    """
    try:
        from pydoc_data import topics
    except ImportError:
        raise ArgumentError(
            describe(
                "qkv demo", "the default text is pydoc_data.topics", "a Python without it", "Name a file: qkv demo FILE"
            )
        ) from None
    import platform

    passages: dict[str, Passage] = {}  # by content: long topics repeat the paragraphs of short ones
    for topic, text in sorted(topics.topics.items(), key=lambda item: len(item[1])):
        for passage in cut(text):
            found = Passage(topic, passage.text, passage.heading)
            passages.setdefault(" ".join(passage.text.split()), found)
    name = f"the Python {'.'.join(platform.python_version_tuple()[:2])} language reference"
    return Text(name, sum(map(len, topics.topics.values())), tuple(passages.values()))


def read_file(path: str) -> Text:
    """Read a file and cut it into passages.

    Raises
    ------
    ArgumentError
        If there is no such file, it is a directory, cannot be read, is empty, or is not text.
    """

    def refuse(rule: str, given: str, fix: str) -> ArgumentError:
        return ArgumentError(describe("qkv demo", rule, given, fix))

    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise refuse("no such file", repr(path), "Check the name, or leave it out for the Python reference") from None
    except IsADirectoryError:
        raise refuse("this is a directory", repr(path), "Name one text file in it") from None
    except OSError as error:
        raise refuse("the file cannot be read", f"{path!r} ({error.strerror})", "Name a file you may read") from None
    note = ""
    if len(data) > LARGEST:
        data, note = data[:LARGEST], f"only the first {LARGEST // 2**20} MB of the file were read"
    text = _decode(data)
    if text is None:
        raise refuse("the file is not text", repr(path), "Name a plain-text file (UTF-8)")
    passages = tuple(cut(text))
    if not passages:
        raise refuse("the file has no words in it", f"{path!r}, {len(data):,} bytes", "Name a file with some text")
    return Text(file.name, len(text), passages, note)


def _decode(data: bytes) -> str | None:
    """Return the text of the bytes, or None where they are not text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) == LARGEST and len(data) - error.start < 4:  # the cut went through a letter
            return data[: error.start].decode("utf-8-sig")
        text = data.decode("latin-1")
    control = sum((letter < " " and letter not in "\t\n\r\f\v\x1b") or "\x7f" <= letter <= "\x9f" for letter in text)
    return text if control <= len(text) // 100 else None


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
