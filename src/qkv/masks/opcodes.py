"""The opcodes of masks: one table for the kernels (`masks.program`) and for graphs (`masks.portable`).

The kernel form is in postfix order: leaves push one truth value for (b, h, i, p, j), AND, OR and NOT combine what is on
the stack; tensors are named by their index among the operands. The graph form is in prefix order; its tensors are taken
from a list in order of appearance, and it never depends on what is in them.

=========  ==  ==========================================================  ========================================
opcode         words that follow for a kernel                              words and tensors that follow in a graph
=========  ==  ==========================================================  ========================================
ALL         0
WINDOW      1  left, right: p - left <= j <= p + right; -1 = unbounded     left, right
PREFIX      2  n, operand: j < n; or -1 and an int64 (B,) that replaces n  n; or -1 and a tensor (B,)
PADDING     3  operand, side: int64 (B,) lengths; side 0 right, 1 left     side; a tensor (B,)
DOCUMENTS   4  by_index, contiguous, lo, hi, q_rows, q_len, qid, kid,      0 lengths, 1 ids; 1 if the keys have
               k_rows: see below                                           their own; one or two tensors
CHUNKED     5  n                                                           n
STRIDED     6  n, offset                                                   n, offset
DILATED     7  window, step                                                window, step
GLOBAL      8  operand: sorted unique int64                                a tensor of indices
RANDOM      9  per_row, block, seed                                        per_row, block, seed
BLOCKS     10  operand, rows_b, rows_h, nq, nk, block: uint8               block; a bool tensor
               (rows_b, rows_h, nq, nk)                                    (B or 1, Hq or 1, nq, nk)
PER_HEAD   11  Hq, then for every head the length of its program and the   the number of masks, then each
               program
DENSE      12  operand, stride_b, stride_h, stride_i, stride_j (elements;  a tensor (Lq, Lk) or (B, Hq, Lq, Lk)
               0 where broadcast)
AND        13                                                              the number of parts, then each
OR         14                                                              the number of parts, then each
NOT        15                                                              the part
=========  ==  ==========================================================  ========================================

DOCUMENTS for a kernel: lo, hi int64 (q_rows, q_len), the range that holds every key of the query's document; unless
contiguous, the ids qid and kid, int64, must be equal and >= 0.
"""

from __future__ import annotations

from enum import IntEnum


class Op(IntEnum):
    """The opcodes; their numbers are part of the interface to the kernels (`MaskOp` in csrc) and of saved graphs."""

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
