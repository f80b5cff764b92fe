"""The lowering of masks, run by an interpreter that knows only the table of instructions.

Every case is named by its seed: `pytest tests/masks/test_programs.py -k seed17`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import qkv
from qkv.masks import Program, portion
from qkv.masks.rule import Rule
from tests.kit.mask_specs import KINDS, Sizes, Spec, draw_positions, draw_sizes, drawn, drawn_blocks, leaf, seeds


class Cell(NamedTuple):
    """A program asked about one query and key: its operators by opcode, written a second time."""

    program: Program
    s: Sizes
    b: int
    h: int
    i: int
    p: int
    j: int

    def run(self, words: list[int]) -> bool:
        stack: list[bool] = []
        at = 0
        while at < len(words):
            op, at = words[at], at + 1
            if op == 11:  # a program for each head, each behind its length
                seen, at = self.per_head(words, at)
                stack.append(seen)
            elif op == 17:  # a program of the whole call, behind its length
                j, i, Lq, Lk, length = words[at : at + 5]
                at += 5 + length
                whole = Sizes(self.s.B, self.s.Hq, Lq, Lk)
                there = self._replace(s=whole, i=self.i + i, p=self.p + j, j=self.j + j)
                stack.append(there.run(words[at - length : at]))
            elif op in ATOMS:
                count, atom = ATOMS[op]
                stack.append(atom(self, *words[at : at + count]))
                at += count
            elif op == 15:
                stack.append(not stack.pop())
            else:
                assert op in (13, 14)
                second, first = stack.pop(), stack.pop()
                stack.append(first and second if op == 13 else first or second)
        assert len(stack) == 1
        return stack[0]

    def per_head(self, words: list[int], at: int) -> tuple[bool, int]:
        heads, at = words[at], at + 1
        assert heads == self.s.Hq
        parts = []
        for _ in range(heads):
            parts.append(words[at + 1 : at + 1 + words[at]])
            at += 1 + words[at]
        return self.run(parts[self.h]), at

    def number(self, which: int) -> int:
        return int(self.program.operands[which][self.b])

    def prefix(self, n: int, which: int) -> bool:
        return self.j < (n if which < 0 else self.number(which))

    def padding(self, which: int, side: int) -> bool:
        n = self.number(which)
        return self.j >= self.s.Lk - n if side else self.j < n

    def document(
        self, by_index: int, contiguous: int, lo: int, hi: int, q_rows: int, q_len: int, qid: int, kid: int, k_rows: int
    ) -> bool:
        operands, j = self.program.operands, self.j
        x, row = (self.i if by_index else self.p), self.b if q_rows > 1 else 0
        assert operands[lo].shape == operands[hi].shape == (q_rows, q_len)
        seen = 0 <= x < q_len and bool(operands[lo][row, x] <= j < operands[hi][row, x])
        if seen and not contiguous:
            mine = int(operands[qid][row, x])
            assert operands[kid].shape == (k_rows, self.s.Lk)
            seen = mine >= 0 and mine == int(operands[kid][self.b if k_rows > 1 else 0, j])
        return seen

    def chosen(self, which: int) -> bool:
        found = self.program.operands[which].tolist()
        assert found == sorted(set(found))
        return self.p in found or self.j in found

    def blocks(self, which: int, rows_b: int, rows_h: int, nq: int, nk: int, block: int) -> bool:
        table, row = self.program.operands[which], self.p // block
        assert table.dtype == torch.uint8
        assert table.shape == (rows_b, rows_h, nq, nk)
        here = 0 <= row < nq and self.j // block < nk
        return here and bool(table[self.b if rows_b > 1 else 0, self.h if rows_h > 1 else 0, row, self.j // block])

    def selected(
        self, which: int, wide: int, rows_b: int, heads: int, rows: int, n: int, block: int, queries: int
    ) -> bool:
        lists = self.program.operands[which]
        assert lists.dtype == (torch.int64 if wide else torch.int32)
        assert lists.shape == (rows_b, heads, rows, n)
        row = lists[self.b if rows_b > 1 else 0, self.h // (self.s.Hq // heads), self.i // queries].tolist()
        assert row == sorted(row)
        return self.j // block in row

    def dense(self, which: int, *strides: int) -> bool:
        t = self.program.operands[which]
        offset = sum(x * stride for x, stride in zip((self.b, self.h, self.i, self.j), strides, strict=True))
        return bool(torch.as_strided(t, (1,), (1,), t.storage_offset() + offset))


# opcode: (words behind it, what it says of a cell)
ATOMS: dict[int, tuple[int, Callable[..., bool]]] = {
    0: (0, lambda c: True),
    1: (2, lambda c, left, right: (left < 0 or c.j >= c.p - left) and (right < 0 or c.j <= c.p + right)),
    2: (2, Cell.prefix),
    3: (2, Cell.padding),
    4: (9, Cell.document),
    5: (1, lambda c, n: c.p // n == c.j // n),
    6: (2, lambda c, n, offset: (c.p - c.j - offset) % n == 0),
    7: (2, lambda c, w, step: abs(c.p - c.j) <= w * step and (c.p - c.j) % step == 0),
    8: (1, Cell.chosen),
    9: (3, lambda c, n, block, seed: c.j // block in drawn_blocks(n, block, seed, c.p // block, c.s.Lk)),
    10: (6, Cell.blocks),
    12: (5, Cell.dense),
    16: (8, Cell.selected),
}


def run_program(program: Program, s: Sizes, b: int, h: int, i: int, p: int, j: int) -> bool:
    return Cell(program, s, b, h, i, p, j).run(program.words)


def check_program(spec: Spec, s: Sizes, rng: random.Random) -> None:
    program = spec.mask.program()
    assert (program is not None) == spec.lowers, spec.text
    if program is None:
        return
    for operand in program.operands:
        assert operand.device.type == "cpu"
        assert operand.is_contiguous() or any(operand is t for t in spec.tensors)
    assert all(type(word) is int and -(2**63) <= word < 2**63 for word in program.words)
    positions, at = draw_positions(rng, s)
    cells = [(b, h, i, j) for b in range(s.B) for h in range(s.Hq) for i in range(s.Lq) for j in range(s.Lk)]
    for b, h, i, j in rng.sample(cells, min(60, len(cells))):
        found = run_program(program, s, b, h, i, at[b][i], j)
        assert found == spec.sees(b, h, i, at[b][i], j), f"{spec.text} {s} {positions} at {(b, h, i, at[b][i], j)}"


@pytest.mark.parametrize("kind", KINDS)
@seeds(8)
def test_each_program_is_the_mask(kind: str, seed: int) -> None:
    rng = random.Random(f"program {kind} {seed}")
    s = draw_sizes(rng)
    check_program(leaf(rng, s, kind), s, rng)


@seeds(150)
def test_programs_of_compositions_are_the_mask(seed: int) -> None:
    spec, s, rng = drawn(seed + 10_000)
    check_program(spec, s, rng)


def test_the_words_are_the_table() -> None:
    t = torch.ones(1, 2, 1, 4, dtype=torch.bool)
    for mask, words in [
        (qkv.window(None, None), [0]),
        (qkv.causal(), [1, -1, 0]),
        (qkv.sliding_window(8), [1, 7, 0]),
        (qkv.prefix(3) | qkv.causal(), [2, 3, -1, 1, -1, 0, 14]),
        (qkv.padding([1, 2], side="left"), [3, 0, 1]),
        (qkv.documents([1, 3]), [4, 0, 1, 0, 1, 1, 4, -1, -1, 1]),
        (qkv.documents(segment_ids=[0, 1, 0, 1]), [4, 0, 0, 0, 1, 1, 4, 2, 3, 1]),
        (~qkv.chunked(4), [5, 4, 15]),
        (qkv.per_head([qkv.causal(), ~qkv.strided(2)]), [11, 2, 3, 1, -1, 0, 4, 6, 2, 0, 15]),
        (qkv.dense(t), [12, 0, 0, 4, 0, 1]),
        (~portion(qkv.chunked(4), first_key=1, first_query=2, Lq=3, Lk=4), [17, 1, 2, 3, 4, 2, 5, 4, 15]),
        (qkv.causal() & qkv.prefix(1) & qkv.prefix(2), [1, -1, 0, 2, 1, -1, 13, 2, 2, -1, 13]),
    ]:
        program = mask.program()
        assert program is not None
        assert program.words == words, mask


def test_the_kernels_and_the_masks_have_one_table_of_opcodes() -> None:
    table = (Path(__file__).parents[2] / "csrc" / "mask" / "kinds.h").read_text()
    theirs = {int(number): name for name, number in re.findall(r"\bKIND\((\w+), (\d+),", table)}
    assert theirs.pop(0) == "All"  # a window without sides, for a kernel
    assert set(Rule.kinds) == set(theirs)
    for op, kind in Rule.kinds.items():
        assert kind.op == op
        assert kind.__name__.startswith(theirs[op])
