"""The lowering of masks, run by an interpreter that knows only the table of instructions.

Every case is named by its seed: `pytest tests/masks/test_programs.py -k seed17`.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

import qkv
from qkv.masks import Op, Program
from qkv.masks.rule import Rule
from tests.kit.mask_specs import KINDS, Sizes, Spec, draw_positions, draw_sizes, drawn, drawn_blocks, leaf, seeds


def run_program(program: Program, s: Sizes, b: int, h: int, i: int, p: int, j: int) -> bool:
    operands = program.operands

    def run(words: list[int]) -> bool:
        stack: list[bool] = []
        at = 0

        def take(n: int) -> list[int]:
            nonlocal at
            at += n
            return words[at - n : at]

        while at < len(words):
            (op,) = take(1)
            if op == 0:
                stack.append(True)
            elif op == 1:
                left, right = take(2)
                stack.append((left < 0 or j >= p - left) and (right < 0 or j <= p + right))
            elif op == 2:
                n, which = take(2)
                stack.append(j < (n if which < 0 else int(operands[which][b])))
            elif op == 3:
                which, side = take(2)
                n = int(operands[which][b])
                stack.append(j >= s.Lk - n if side else j < n)
            elif op == 4:
                by_index, contiguous, lo, hi, q_rows, q_len, qid, kid, k_rows = take(9)
                x, row = (i if by_index else p), b if q_rows > 1 else 0
                assert operands[lo].shape == operands[hi].shape == (q_rows, q_len)
                seen = 0 <= x < q_len and bool(operands[lo][row, x] <= j < operands[hi][row, x])
                if seen and not contiguous:
                    mine = int(operands[qid][row, x])
                    assert operands[kid].shape == (k_rows, s.Lk)
                    seen = mine >= 0 and mine == int(operands[kid][b if k_rows > 1 else 0, j])
                stack.append(seen)
            elif op == 5:
                (n,) = take(1)
                stack.append(p // n == j // n)
            elif op == 6:
                n, offset = take(2)
                stack.append((p - j - offset) % n == 0)
            elif op == 7:
                w, step = take(2)
                stack.append(abs(p - j) <= w * step and (p - j) % step == 0)
            elif op == 8:
                chosen = operands[take(1)[0]].tolist()
                assert chosen == sorted(set(chosen))
                stack.append(p in chosen or j in chosen)
            elif op == 9:
                per_row, block, seed = take(3)
                stack.append(j // block in drawn_blocks(per_row, block, seed, p // block, s.Lk))
            elif op == 10:
                which, rows_b, rows_h, nq, nk, block = take(6)
                table = operands[which]
                assert table.dtype == torch.uint8
                assert table.shape == (rows_b, rows_h, nq, nk)
                row = p // block
                here = 0 <= row < nq and j // block < nk
                stack.append(here and bool(table[b if rows_b > 1 else 0, h if rows_h > 1 else 0, row, j // block]))
            elif op == 11:
                (heads,) = take(1)
                assert heads == s.Hq
                parts = [take(take(1)[0]) for _ in range(heads)]
                stack.append(run(parts[h]))
            elif op == 12:
                which, *strides = take(5)
                t = operands[which]
                offset = sum(x * stride for x, stride in zip((b, h, i, j), strides, strict=True))
                stack.append(bool(torch.as_strided(t, (1,), (1,), t.storage_offset() + offset)))
            elif op == 15:
                stack.append(not stack.pop())
            else:
                assert op in (13, 14)
                second, first = stack.pop(), stack.pop()
                stack.append(first and second if op == 13 else first or second)
        assert len(stack) == 1
        return stack[0]

    return run(program.words)


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
        (qkv.causal() & qkv.prefix(1) & qkv.prefix(2), [1, -1, 0, 2, 1, -1, 13, 2, 2, -1, 13]),
    ]:
        program = mask.program()
        assert program is not None
        assert program.words == words, mask


def test_the_kernels_and_the_masks_have_one_table_of_opcodes() -> None:
    sources = "".join(path.read_text() for path in sorted((Path(__file__).parents[2] / "csrc").rglob("*.h")))
    (members,) = re.findall(r"enum MaskOp : int64_t \{(.*?)\};", sources, re.DOTALL)
    theirs = {name.upper(): int(number) for name, number in re.findall(r"kMask(\w+) = (\d+)", members)}
    assert theirs == {op.name.replace("_", ""): op.value for op in Op}
    for op, kind in Rule.kinds.items():
        assert kind.op == op
    assert set(Rule.kinds) == set(Op) - {Op.ALL}  # a window without sides, for a kernel
