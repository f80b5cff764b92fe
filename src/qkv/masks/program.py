"""A mask as data for a compiled kernel: a list of integers in postfix order and the tensors they name.

Each instruction is an opcode followed by a fixed number of words; leaves push one truth value for (b, h, i, p, j),
AND, OR and NOT combine what is on the stack. Tensors are named by their index in `operands`.

=========  ==  =============================================================================================
opcode         words that follow
=========  ==  =============================================================================================
ALL         0
WINDOW      1  left, right: p - left <= j <= p + right; -1 = unbounded
PREFIX      2  n, operand: j < n; operand -1, or an int64 (B,) tensor that replaces n
PADDING     3  operand, side: int64 (B,) lengths; side 0 right, 1 left
DOCUMENTS   4  by_index, contiguous, lo, hi, q_rows, q_len, qid, kid, k_rows: lo, hi int64 (q_rows, q_len), the range
               that holds every key of the query's document; unless contiguous, ids int64 must be equal and >= 0
CHUNKED     5  n
STRIDED     6  n, offset
DILATED     7  window, step
GLOBAL      8  operand: sorted unique int64
RANDOM      9  per_row, block, seed
BLOCKS     10  operand, rows_b, rows_h, nq, nk, block: uint8 (rows_b, rows_h, nq, nk)
PER_HEAD   11  Hq, then for every head the length of its program and the program
DENSE      12  operand, stride_b, stride_h, stride_i, stride_j (elements; 0 where broadcast)
AND        13
OR         14
NOT        15
=========  ==  =============================================================================================
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Op(IntEnum):
    """The opcodes; their numbers are part of the interface to the kernels."""

    ALL = 0
    WINDOW = 1
    PREFIX = 2
    PADDING = 3
    DOCUMENTS = 4
    CHUNKED = 5
    STRIDED = 6
    DILATED = 7
    GLOBAL = 8
    RANDOM = 9
    BLOCKS = 10
    PER_HEAD = 11
    DENSE = 12
    AND = 13
    OR = 14
    NOT = 15


class Program(NamedTuple):
    """A lowered mask: the words and the tensors they name."""

    words: list[int]
    operands: tuple[Tensor, ...]


class Builder:
    """Collects words and operands for one call's sizes; the same tensor is stored once."""

    def __init__(self, *, B: int, Hq: int, Lq: int, Lk: int) -> None:
        self.B, self.Hq, self.Lq, self.Lk = B, Hq, Lq, Lk
        self.words: list[int] = []
        self.operands: list[Tensor] = []
        self.supported = True

    def emit(self, op: Op, *words: int) -> None:
        self.words += [int(op), *words]

    def operand(self, tensor: Tensor) -> int:
        for index, known in enumerate(self.operands):
            if known is tensor:
                return index
        self.operands.append(tensor)
        return len(self.operands) - 1

    def finish(self) -> Program | None:
        return Program(self.words, tuple(self.operands)) if self.supported else None
