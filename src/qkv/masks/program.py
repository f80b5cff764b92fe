"""A mask as data for a compiled kernel: words in postfix order and the tensors they name.

The words of each kind of mask stand in csrc/mask/kinds.h; the opcodes are the classes' own `op`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Program(NamedTuple):
    """A lowered mask: the words and the tensors they name."""

    words: list[int]
    operands: tuple[Tensor, ...]


class Builder:
    """Collects the words and operands of a program; the same tensor is stored once."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.operands: list[Tensor] = []
        self.supported = True

    def emit(self, op: int, *words: int) -> None:
        self.words += [int(op), *words]

    def operand(self, tensor: Tensor) -> int:
        for index, stored in enumerate(self.operands):
            if stored is tensor:
                return index
        self.operands.append(tensor)
        return len(self.operands) - 1

    def finish(self) -> Program | None:
        return Program(self.words, tuple(self.operands)) if self.supported else None
