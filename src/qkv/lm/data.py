"""The bytes that are trained on, and those held out."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qkv.errors import ArgumentError

HELD_OUT = 10  # the last 1/10 of a text, from the next blank line on
SPLIT = "the last tenth, from the next blank line on"
_BLANK = re.compile(rb"\n[ \t]*\n")


@dataclass(frozen=True)
class Corpus:
    """A text as two uint8 tensors that share nothing: what is trained on, and what is held out."""

    name: str
    train: Tensor  # (T,) uint8
    held: Tensor  # (T',) uint8
    sha256: str  # of the two parts, one after the other

    def batches(self, batch: int, context: int, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets), int64 (batch, context) each, from random places of the training part, for ever."""
        while True:
            starts = torch.randint(len(self.train) - context, (batch, 1), generator=rng)
            window = self.train[starts + torch.arange(context + 1)].long()
            yield window[:, :-1], window[:, 1:]

    def held_out(self, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets) that ask for each held-out byte but the first exactly once.

        Windows of `context` bytes stand side by side, so a byte is predicted from 1 to `context` bytes before it.
        """
        whole = (len(self.held) - 1) // context
        inputs, targets = self.held[:-1].long(), self.held[1:].long()
        for first in range(0, whole, batch):
            part = slice(first * context, min(first + batch, whole) * context)
            yield inputs[part].view(-1, context), targets[part].view(-1, context)
        if whole * context < len(inputs):
            yield inputs[whole * context :][None], targets[whole * context :][None]


def read_corpus(path: str | None, context: int) -> Corpus:
    """Return a file's bytes, or Python's language reference, split for training.

    Parameters
    ----------
    path : str or None
        A file of any bytes; None for the language reference that this Python carries (`pydoc_data.topics`).
    context : int
        Bytes in a training window; each part must hold more than one window.

    Raises
    ------
    ArgumentError
        If the file cannot be read or is too short, or this Python carries no reference.
    """
    name, data = _reference() if path is None else (Path(path).name, _read(path))
    blank = _BLANK.search(data, len(data) - len(data) // HELD_OUT)
    cut = blank.end() if blank else len(data) - len(data) // HELD_OUT
    if len(data) - cut <= context:  # no blank line, or one too near the end
        cut = len(data) - len(data) // HELD_OUT
    if min(cut, len(data) - cut) <= context:
        rule = f"a tenth of the text is held out, and each part must be longer than the context of {context:,} bytes"
        fix = f"Use a text of more than {(context + 1) * HELD_OUT:,} bytes, or a smaller --context"
        raise ArgumentError.of("qkv train", rule, f"{name}, {len(data):,} bytes", fix)
    both = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Corpus(name, both[:cut].clone(), both[cut:].clone(), hashlib.sha256(data).hexdigest())


def _reference() -> tuple[str, bytes]:
    """The topics in alphabetical order, every paragraph where it first stands.

    Topics quote each other at length: with the repetitions left in, much of what is held out would have been seen.
    """
    try:
        from pydoc_data import topics
    except ImportError:
        rule, fix = "the default text is pydoc_data.topics", "Name a file: qkv train FILE"
        raise ArgumentError.of("qkv train", rule, "a Python without it", fix) from None
    seen: set[str] = set()
    kept: list[str] = []
    for _, text in sorted(topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph.rstrip())
    version = ".".join(platform.python_version_tuple()[:2])
    return f"the Python {version} language reference", ("\n\n".join(kept) + "\n").encode()


def _read(path: str) -> bytes:
    def refuse(rule: str, given: str, fix: str) -> ArgumentError:
        return ArgumentError.of("qkv train", rule, given, fix)

    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise refuse("no such file", repr(path), "Check the name, or leave it out for the Python reference") from None
    except IsADirectoryError:
        raise refuse("this is a directory", repr(path), "Name one file in it") from None
    except OSError as error:
        raise refuse("the file cannot be read", f"{path!r} ({error.strerror})", "Name a file you may read") from None
