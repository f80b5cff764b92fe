"""A mask as data for a compiled kernel: words in postfix order and the tensors they name.

The words of each kind of mask stand in csrc/mask/kinds.h; the opcodes are the classes' own `op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

Source: TypeAlias = "Tensor | Callable[[], Tensor]"


class Program(NamedTuple):
    """A lowered mask: the words, and the tensors they name, or what makes those once: a plan needs none of them."""

    words: list[int]
    sources: tuple[Source, ...]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors, the same ones each time."""
        return tuple([source if isinstance(source, Tensor) else source() for source in self.sources])


class Builder:
    """Collects the words and operands of a program; the same tensor is stored once."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.sources: list[Source] = []
        self.supported = True

    def emit(self, op: int, *words: int) -> None:
        self.words += [int(op), *words]

    def operand(self, source: Source) -> int:
        for index, stored in enumerate(self.sources):
            if stored is source:
                return index
        self.sources.append(source)
        return len(self.sources) - 1

    def finish(self) -> Program | None:
        return Program(self.words, tuple(self.sources)) if self.supported else None
