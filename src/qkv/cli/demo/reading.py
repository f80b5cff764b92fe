"""The text that the demo looks things up in: Python's language reference, or a file."""

from __future__ import annotations

from pathlib import Path

from qkv.cli.demo.passages import Passage, Text, cut
from qkv.errors import ArgumentError

LARGEST = 8 * 2**20  # bytes read of a file; more would take longer than a demo should


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
        rule = "the default text is pydoc_data.topics"
        raise ArgumentError.of("qkv demo", rule, "a Python without it", "Name a file: qkv demo FILE") from None
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
        return ArgumentError.of("qkv demo", rule, given, fix)

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
