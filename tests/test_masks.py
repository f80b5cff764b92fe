"""Masks against a second definition in plain Python, written from the table of conventions, no code shared.

A random mask is drawn as a `Spec`: how to build it with qkv, and a predicate that says what it must show.
Every case is named by its seed: `pytest tests/test_masks.py -k seed17`.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import qkv
from qkv.masks import Mask, Program

Predicate = Callable[[int, int, int, int, int], bool]  # b, h, i, p, j


@dataclass
class Sizes:
    B: int
    Hq: int
    Lq: int
    Lk: int


@dataclass
class Spec:
    text: str
    mask: Mask
    sees: Predicate
    exact: bool  # whether intervals() must be exact
    lowers: bool = True
    tensors: list[torch.Tensor] = field(default_factory=list)


def _partition(rng: random.Random, total: int, parts: int) -> list[int]:
    borders = sorted(rng.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in zip([0, *borders], [*borders, total], strict=True)]


def _document(lengths: list[int], x: int) -> int:
    if x < 0:
        return -1
    for d, n in enumerate(lengths):
        if x < n:
            return d
        x -= n
    return -1


def _id(ids: list[int], x: int) -> int:
    return ids[x] if 0 <= x < len(ids) else -1


def _splitmix(seed: int, row: int, draw: int) -> int:
    word = 2**64
    x = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + draw * 0x94D049BB133111EB) % word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % word
    return x ^ (x >> 31)


def drawn_blocks(per_row: int, block: int, seed: int, row: int, Lk: int) -> set[int]:
    blocks = (Lk + block - 1) // block
    chosen: set[int] = set()
    for last in range(blocks - min(per_row, blocks), blocks):
        pick = _splitmix(seed, row, last) % (last + 1)
        chosen.add(last if pick in chosen else pick)
    return chosen


def leaf(rng: random.Random, s: Sizes, kind: str) -> Spec:
    """One mask of the given kind that fits the sizes."""
    if kind == "causal":
        return Spec("causal()", qkv.causal(), lambda b, h, i, p, j: j <= p, True)
    if kind == "sliding_window":
        n = rng.choice([1, 2, 3, 7, 1000])
        return Spec(f"sliding_window({n})", qkv.sliding_window(n), lambda b, h, i, p, j: p - n < j <= p, True)
    if kind == "window":
        left, right = (rng.choice([None, 0, 1, 3, 9]) for _ in range(2))

        def window(b: int, h: int, i: int, p: int, j: int) -> bool:
            return (left is None or j >= p - left) and (right is None or j <= p + right)

        return Spec(f"window({left}, {right})", qkv.window(left, right), window, True)
    if kind == "prefix":
        n = rng.randint(0, s.Lk + 2)
        return Spec(f"prefix({n})", qkv.prefix(n), lambda b, h, i, p, j: j < n, True)
    if kind == "prefix_rows":
        ns = [rng.randint(0, s.Lk + 2) for _ in range(s.B)]
        return Spec(
            f"prefix({ns})", qkv.prefix(torch.tensor(ns, dtype=torch.int32)), lambda b, h, i, p, j: j < ns[b], True
        )
    if kind == "padding":
        ns, side = [rng.randint(0, s.Lk) for _ in range(s.B)], rng.choice(["right", "left"])

        def padding(b: int, h: int, i: int, p: int, j: int) -> bool:
            return j < ns[b] if side == "right" else j >= s.Lk - ns[b]

        return Spec(f"padding({ns}, {side!r})", qkv.padding(ns, side), padding, True)
    if kind == "documents":
        ns = _partition(rng, s.Lk, rng.randint(1, 5))
        return Spec(
            f"documents({ns})",
            qkv.documents(ns),
            lambda b, h, i, p, j: _document(ns, p) == _document(ns, j) >= 0,
            True,
        )
    if kind == "documents_cross":
        n = rng.randint(1, 5)
        mine, theirs = _partition(rng, s.Lq, n), _partition(rng, s.Lk, n)
        return Spec(
            f"documents({mine}, {theirs})",
            qkv.documents(mine, theirs),
            lambda b, h, i, p, j: _document(mine, i) == _document(theirs, j) >= 0,
            True,
        )
    if kind in ("segments", "segments_cross"):
        names = rng.choice([[0, 1], [-1, 0, 5], [3, 2, 1, 0, -7]])
        table = {}
        for name, length in (("q", s.Lq), ("k", s.Lk)):
            rows = rng.choice([1, s.B])
            table[name] = [[rng.choice(names) for _ in range(length)] for _ in range(rows)]
            if rng.random() < 0.5:
                table[name] = [sorted(row) for row in table[name]]
        shapes = {n: torch.tensor(t, dtype=torch.int64).reshape(len(t), -1) for n, t in table.items()}
        if kind == "segments":
            mask = qkv.documents(segment_ids=shapes["k"])
        else:
            mask = qkv.documents(segment_ids=shapes["q"], k_segment_ids=shapes["k"])

        def segments(b: int, h: int, i: int, p: int, j: int) -> bool:
            keys = table["k"][b % len(table["k"])]
            mine = _id(keys, p) if kind == "segments" else _id(table["q"][b % len(table["q"])], i)
            return mine == keys[j] and mine >= 0

        return Spec(f"{kind}({table})", mask, segments, True)
    if kind == "chunked":
        n = rng.choice([1, 2, 5, 16])
        return Spec(f"chunked({n})", qkv.chunked(n), lambda b, h, i, p, j: p // n == j // n, True)
    if kind == "strided":
        n, offset = rng.choice([1, 2, 5]), rng.randint(-3, 6)
        return Spec(
            f"strided({n}, {offset})", qkv.strided(n, offset), lambda b, h, i, p, j: (p - j - offset) % n == 0, n == 1
        )
    if kind == "dilated":
        w, step = rng.randint(0, 4), rng.choice([1, 2, 3])
        return Spec(
            f"dilated({w}, {step})",
            qkv.dilated(w, step),
            lambda b, h, i, p, j: abs(p - j) <= w * step and (p - j) % step == 0,
            step == 1,
        )
    if kind == "global_tokens":
        at = [rng.randint(0, s.Lk + 3) for _ in range(rng.randint(0, 4))]
        return Spec(f"global_tokens({at})", qkv.global_tokens(at), lambda b, h, i, p, j: p in at or j in at, True)
    if kind == "random_blocks":
        per, block, seed = rng.randint(0, 4), rng.choice([1, 3, 8]), rng.choice([0, 1, 2**63 - 1, rng.getrandbits(40)])

        def random_blocks(b: int, h: int, i: int, p: int, j: int) -> bool:
            return j // block in drawn_blocks(per, block, seed, p // block, s.Lk)

        return Spec(f"random_blocks({per}, {block}, {seed})", qkv.random_blocks(per, block, seed), random_blocks, True)
    if kind == "blocks":
        block = rng.choice([1, 4, 16])
        nq, nk = (-(-n // block) + rng.randint(0, 1) for n in (s.Lq, s.Lk))
        rb, rh = rng.choice([1, s.B]), rng.choice([1, s.Hq])
        values = torch.tensor([rng.random() < 0.5 for _ in range(rb * rh * nq * nk)], dtype=torch.bool)
        shape = (nq, nk) if rb == rh == 1 and rng.random() < 0.5 else (rb, rh, nq, nk)
        cells = values.view(rb, rh, nq, nk).tolist()

        def blocks(b: int, h: int, i: int, p: int, j: int) -> bool:
            row = p // block
            return 0 <= row < nq and cells[b % rb][h % rh][row][j // block]

        return Spec(f"blocks({shape}, {block})", qkv.blocks(values.view(shape), block), blocks, True)
    if kind == "per_head":
        parts = [expression(rng, s, rng.randint(0, 1), kinds=EXACT_KINDS) for _ in range(s.Hq)]
        return Spec(
            f"per_head([{', '.join(part.text for part in parts)}])",
            qkv.per_head([part.mask for part in parts]),
            lambda b, h, i, p, j: parts[h].sees(b, h, i, p, j),
            all(part.exact for part in parts),
            all(part.lowers for part in parts),
        )
    if kind == "dense":
        sizes = [rng.choice([1, n]) for n in (s.B, s.Hq, s.Lq, s.Lk)]
        t = torch.tensor([rng.random() < 0.5 for _ in range(sizes[0] * sizes[1] * sizes[2] * sizes[3])]).bool()
        t = t.view(sizes)
        if rng.random() < 0.3:
            t, sizes = t[0, 0], [1, 1, *sizes[2:]]
        elif rng.random() < 0.3:
            t = t.transpose(2, 3).contiguous().transpose(2, 3)
        cells = t.reshape(sizes).tolist()

        def dense(b: int, h: int, i: int, p: int, j: int) -> bool:
            return cells[b % sizes[0]][h % sizes[1]][i % sizes[2]][j % sizes[3]]

        return Spec(f"dense({tuple(t.shape)})", qkv.dense(t), dense, False, tensors=[t])
    if kind == "mask_mod":
        return Spec(
            "mask_mod(...)",
            qkv.mask_mod(lambda b, h, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4),
            lambda b, h, i, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4,
            False,
            lowers=False,
        )
    raise AssertionError(kind)


EXACT_KINDS = [
    *("causal", "sliding_window", "window", "prefix", "prefix_rows", "padding", "documents", "documents_cross"),
    *("segments", "segments_cross", "chunked"),
]
KINDS = [
    *EXACT_KINDS,
    *("strided", "dilated", "global_tokens", "random_blocks", "blocks", "per_head", "dense", "mask_mod"),
]


def expression(rng: random.Random, s: Sizes, depth: int, kinds: list[str]) -> Spec:
    """A random composition of at most `depth` levels of & | ~."""
    if depth == 0 or rng.random() < 0.15:
        return leaf(rng, s, rng.choice(kinds))
    a = expression(rng, s, depth - 1, kinds)
    if rng.random() < 0.25:
        return Spec(f"~({a.text})", ~a.mask, lambda *at: not a.sees(*at), a.exact, a.lowers, a.tensors)
    c = expression(rng, s, depth - 1, kinds)
    exact, lowers, tensors = a.exact and c.exact, a.lowers and c.lowers, a.tensors + c.tensors
    if rng.random() < 0.5:
        return Spec(
            f"({a.text} & {c.text})", a.mask & c.mask, lambda *at: a.sees(*at) and c.sees(*at), exact, lowers, tensors
        )
    return Spec(
        f"({a.text} | {c.text})", a.mask | c.mask, lambda *at: a.sees(*at) or c.sees(*at), exact, lowers, tensors
    )


def draw_sizes(rng: random.Random, most: int = 40) -> Sizes:
    Lq = rng.choice([0, 1, 2, rng.randint(1, most), rng.randint(1, most)])
    Lk = rng.choice([0, 1, Lq, Lq, rng.randint(1, most)])
    return Sizes(rng.randint(1, 3), rng.randint(1, 3), Lq, Lk)


def draw_positions(rng: random.Random, s: Sizes) -> tuple[Any, list[list[int]]]:
    """A value for positions=, and what it means: the position of each query of each batch row."""
    kind = rng.choice(["start", "end", "int", "negative", "rows", "table", "shared"])
    if kind == "start":
        return "start", [list(range(s.Lq))] * s.B
    if kind == "end":
        return "end", [[i + s.Lk - s.Lq for i in range(s.Lq)]] * s.B
    if kind in ("int", "negative"):
        first = rng.randint(0, 9) if kind == "int" else -rng.randint(1, 9)
        return first, [[first + i for i in range(s.Lq)]] * s.B
    if kind == "rows":
        first_of = [rng.randint(-5, 20) for _ in range(s.B)]
        given = first_of if rng.random() < 0.5 else torch.tensor(first_of)
        return given, [[f + i for i in range(s.Lq)] for f in first_of]
    rows = s.B if kind == "table" else 1
    table = [[rng.randint(-5, s.Lk + 5) for _ in range(s.Lq)] for _ in range(rows)]
    return torch.tensor(table, dtype=torch.int64).view(rows, s.Lq), [table[b % rows] for b in range(s.B)]


def truth(spec: Spec, s: Sizes, at: list[list[int]]) -> torch.Tensor:
    cells = [
        [[[spec.sees(b, h, i, at[b][i], j) for j in range(s.Lk)] for i in range(s.Lq)] for h in range(s.Hq)]
        for b in range(s.B)
    ]
    return torch.tensor(cells, dtype=torch.bool).view(s.B, s.Hq, s.Lq, s.Lk)


def drawn(seed: int, depth: int = 3, kinds: list[str] = KINDS, most: int = 40) -> tuple[Spec, Sizes, random.Random]:
    rng = random.Random(seed)
    s = draw_sizes(rng, most)
    return expression(rng, s, rng.randint(0, depth), kinds), s, rng


def seeds(n: int) -> Any:
    return pytest.mark.parametrize("seed", range(n), ids=lambda seed: f"seed{seed}")


@pytest.mark.parametrize("kind", KINDS)
@seeds(12)
def test_each_mask_is_its_definition(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    s = draw_sizes(rng)
    spec = leaf(rng, s, kind)
    positions, at = draw_positions(rng, s)
    found = spec.mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq)
    assert found.dtype == torch.bool
    assert found.shape == (s.B, s.Hq, s.Lq, s.Lk)
    assert torch.equal(found, truth(spec, s, at)), f"{spec.text} at {positions} of {s}"


@seeds(250)
def test_compositions_are_their_definition(seed: int) -> None:
    spec, s, rng = drawn(seed, most=16)
    positions, at = draw_positions(rng, s)
    assert torch.equal(spec.mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq), truth(spec, s, at)), f"{spec.text} {s}"


# The lowering, run by an interpreter that knows only the table of instructions.


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
    program = spec.mask.program(B=s.B, Hq=s.Hq, Lq=s.Lq, Lk=s.Lk)
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
    sizes = {"B": 2, "Hq": 2, "Lq": 4, "Lk": 4}
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
        program = mask.program(**sizes)
        assert program is not None
        assert program.words == words, mask


# Laws.


@seeds(60)
def test_laws_of_the_algebra(seed: int) -> None:
    rng = random.Random(seed)
    s = draw_sizes(rng, 12)
    a, b, c = (expression(rng, s, 1, KINDS).mask for _ in range(3))
    positions, _ = draw_positions(rng, s)

    def t(mask: Mask) -> torch.Tensor:
        return mask.tensor(s.Lq, s.Lk, positions, s.B, s.Hq)

    assert torch.equal(t(~(a & b)), t(~a | ~b))
    assert torch.equal(t(~(a | b)), t(~a & ~b))
    assert torch.equal(t(a & (b | c)), t((a & b) | (a & c)))
    assert torch.equal(t(a & b), t(a) & t(b))
    assert torch.equal(t(a | b), t(a) | t(b))
    assert torch.equal(t(~a), ~t(a))
    assert torch.equal(t(~~a), t(a))
    assert not t(a & ~a).any()
    assert t(a | ~a).all()
    assert (a & b) & c == a & (b & c)
    assert hash((a | b) | c) == hash(a | (b | c))


@pytest.mark.parametrize("w", [1, 2, 3, 5, 8, 100])
def test_how_many_keys_a_window_shows(w: int) -> None:
    # The words of other libraries differ by one here; these are the counts for query i of 8.
    count = qkv.sliding_window(w).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i + 1, w) for i in range(8)]
    count = qkv.window(w, 0).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i, w) + 1 for i in range(8)]
    count = qkv.window(w, w).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [min(i, w) + 1 + min(7 - i, w) for i in range(8)]
    count = (qkv.causal() & qkv.chunked(w)).tensor(8, 8)[0, 0].sum(-1).tolist()
    assert count == [i % w + 1 for i in range(8)]


def test_streaming_llm_keeps_sinks_and_recent_tokens() -> None:
    seen = (qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(8))).tensor(64, 64)[0, 0]
    assert seen[50].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(43, 51)]
    assert seen.sum(-1).tolist() == [min(i + 1, 12) for i in range(64)]


@pytest.mark.parametrize(
    ("per_row", "block", "Lk"), [(0, 4, 40), (3, 4, 40), (3, 4, 41), (10, 4, 40), (99, 4, 40), (1, 64, 9)]
)
def test_random_blocks_are_distinct_whole_and_as_many_as_asked(per_row: int, block: int, Lk: int) -> None:
    seen = qkv.random_blocks(per_row, block, seed=5).tensor(Lk, Lk)[0, 0]
    blocks = -(-Lk // block)
    padded = torch.nn.functional.pad(seen, (0, blocks * block - Lk), value=False)[::block].view(blocks, blocks, block)
    assert (padded.any(-1).sum(-1) == min(per_row, blocks)).all()
    assert torch.equal(seen, seen[::block].repeat_interleave(block, 0)[:Lk])
    whole = padded.all(-1) | ~padded.any(-1)
    assert whole[:, : Lk // block].all()
    if 0 < per_row < blocks:
        assert not torch.equal(seen, qkv.random_blocks(per_row, block, seed=6).tensor(Lk, Lk)[0, 0])


def test_random_blocks_are_uniform_and_the_same_everywhere() -> None:
    seen = qkv.random_blocks(4, 1, seed=0).tensor(4000, 16, positions="start")[0, 0]
    # 4,000 rows of 4 in 16: each block 1,000 times, standard deviation sqrt(4000 * 3 / 16) = 27.
    assert (seen.sum(0) - 1000).abs().max() < 5 * 28
    # Other kernels and versions must draw these very blocks.
    mask = qkv.random_blocks(3, 2, seed=7)
    rows = mask.tensor(4, 20, positions="start")[0, 0, ::2, ::2]
    assert [row.nonzero()[:, 0].tolist() for row in rows] == [sorted(drawn_blocks(3, 2, 7, row, 20)) for row in (0, 1)]


def test_bigbird_and_longformer_are_compositions() -> None:
    assert qkv.bigbird(16, 3, 1, 2, seed=4) == (
        qkv.window(24, 24) | qkv.global_tokens(range(16)) | qkv.random_blocks(2, 16, 4)
    )
    assert qkv.bigbird(16, random_blocks=0, global_blocks=0) == qkv.window(24, 24)
    assert qkv.longformer(8, [3, 1]) == qkv.window(4, 4) | qkv.global_tokens([1, 3])
    assert qkv.longformer(8, dilation=3) == qkv.dilated(4, 3)
    seen = qkv.bigbird(8, seed=1).tensor(128, 128)[0, 0]
    assert seen[:16].all()
    assert seen[:, :16].all()
    assert seen.diagonal().all()
    assert seen[64].sum() >= 16 + 25
    assert not seen.all()


@pytest.mark.parametrize("seed", range(20))
def test_document_positions_align_each_document(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    mine, theirs = ([rng.randint(0, 5) for _ in range(n)] for _ in range(2))
    mask = qkv.documents(mine, theirs)
    for align in ("start", "end"):
        expected = []
        for d in range(n):
            first = sum(theirs[:d]) + (theirs[d] - mine[d] if align == "end" else 0)
            expected += [first + r for r in range(mine[d])]
        positions = mask.positions(align)
        assert positions.dtype == torch.int64
        assert positions.shape == (1, sum(mine))
        assert positions[0].tolist() == expected
        seen = (mask & qkv.causal()).tensor(sum(mine), sum(theirs), positions=positions)[0, 0]
        row = 0
        for d in range(n):
            for r in range(mine[d]):
                last = r + (theirs[d] - mine[d] if align == "end" else 0)
                keys = range(sum(theirs[:d]), sum(theirs[:d]) + max(0, min(theirs[d], last + 1)))
                assert seen[row].nonzero()[:, 0].tolist() == list(keys)
                row += 1


# A mask is a value.


@seeds(40)
def test_equal_masks_are_equal_values(seed: int) -> None:
    kinds = [k for k in KINDS if k not in ("dense", "mask_mod")]
    first, s, _ = drawn(seed, depth=2, kinds=kinds)
    second, _, _ = drawn(seed, depth=2, kinds=kinds)
    assert first.mask == second.mask
    assert hash(first.mask) == hash(second.mask)
    assert {first.mask: 1}[second.mask] == 1
    assert repr(first.mask) == repr(second.mask)
    again = pickle.loads(pickle.dumps(first.mask))
    assert again == first.mask
    assert hash(again) == hash(first.mask)
    assert copy.deepcopy(first.mask) is first.mask
    assert torch.equal(again.tensor(s.Lq, s.Lk, "start", s.B, s.Hq), first.mask.tensor(s.Lq, s.Lk, "start", s.B, s.Hq))


def test_different_masks_are_different_values() -> None:
    t = torch.ones(2, 2, dtype=torch.bool)
    masks = [
        *(qkv.causal(), qkv.sliding_window(2), qkv.sliding_window(3), qkv.window(1, 0), qkv.window(None, 0)),
        *(qkv.prefix(1), qkv.prefix([1]), qkv.prefix([2]), qkv.padding([1]), qkv.padding([1], side="left")),
        *(qkv.documents([1, 1]), qkv.documents([2]), qkv.documents([1, 1], [1, 1])),
        *(qkv.documents(segment_ids=[0, 1]), qkv.documents(segment_ids=[0, 1], k_segment_ids=[0, 1])),
        *(qkv.chunked(2), qkv.strided(2), qkv.strided(2, 1), qkv.dilated(1, 2), qkv.dilated(2, 1)),
        *(qkv.global_tokens([1]), qkv.global_tokens([]), qkv.random_blocks(1, 2, 0), qkv.random_blocks(1, 2, 1)),
        *(qkv.blocks(t, 1), qkv.blocks(t, 2), qkv.blocks(~t, 1), qkv.blocks(t[None, None], 3)),
        *(qkv.per_head([qkv.causal()]), qkv.per_head([qkv.causal()] * 2), qkv.dense(t), qkv.dense(t.clone())),
        *(qkv.causal() & qkv.prefix(1), qkv.prefix(1) & qkv.causal(), qkv.causal() | qkv.prefix(1), ~qkv.causal()),
        *(qkv.mask_mod(lambda b, h, p, j: j <= p), qkv.mask_mod(lambda b, h, p, j: j <= p)),
    ]
    assert len(set(masks)) == len(masks)
    for i, a in enumerate(masks):
        assert [a == b for b in masks] == [i == k for k in range(len(masks))]
        assert a != "a mask"
    assert qkv.dense(t) == qkv.dense(t)
    assert qkv.strided(4, -1) == qkv.strided(4, 7)
    assert qkv.global_tokens([3, 1, 3]) == qkv.global_tokens(torch.tensor([1, 3]))


def test_repr_is_the_constructor_call() -> None:
    for text in [
        "causal()",
        "sliding_window(4)",
        "window(None, 3)",
        "prefix(4)",
        "prefix([1, 2])",
        "padding([3, 5], side='left')",
        "documents([3, 5]) & causal()",
        "documents([3, 5], [4, 4])",
        "documents(segment_ids=[0, 0, -1])",
        "documents(segment_ids=[0], k_segment_ids=[[0, 1], [1, 1]])",
        "(causal() | prefix(2)) & ~chunked(4)",
        "~(causal() & strided(3, 1))",
        "dilated(2, 3) | global_tokens([0, 9]) | random_blocks(1, 8, 0)",
        "per_head([causal(), sliding_window(2)])",
    ]:
        mask = eval(text, {name: getattr(qkv.masks, name) for name in qkv.masks.__all__})
        assert repr(mask) == text
        assert len(repr(qkv.documents(range(1000)))) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_change(kind: str) -> None:
    rng = random.Random(kind)
    spec = leaf(rng, Sizes(2, 2, 8, 8), kind)
    for name in (*spec.mask.__dict__, "anything"):
        with pytest.raises(AttributeError):
            setattr(spec.mask, name, 1)


def test_arguments_are_copied() -> None:
    lengths, ids, at = torch.tensor([3, 5]), torch.tensor([0, 0, 1]), torch.tensor([0, 2])
    table = torch.eye(2, dtype=torch.bool)
    masks = [qkv.padding(lengths), qkv.documents(lengths), qkv.documents(segment_ids=ids), qkv.global_tokens(at)]
    masks += [qkv.blocks(table, 4), qkv.prefix(lengths)]
    before = [(repr(m), hash(m), m.tensor(8, 8, B=2) if "segment" not in repr(m) else m.tensor(3, 3)) for m in masks]
    for t in (lengths, ids, at):
        t.zero_()
    table.fill_(True)
    for mask, (text, code, seen) in zip(masks, before, strict=True):
        assert repr(mask) == text
        assert hash(mask) == code
        assert torch.equal(mask.tensor(*seen.shape[2:], B=seen.shape[0]), seen)


def test_a_dense_tensor_is_held_and_guarded() -> None:
    t = torch.ones(4, 4, dtype=torch.bool)
    mask = qkv.dense(t)
    assert mask.t is t
    other = mask & qkv.causal()
    t[1, 2] = False
    for use in (
        lambda: mask.tensor(4, 4),
        lambda: other.tensor(4, 4),
        lambda: mask.program(B=1, Hq=1, Lq=4, Lk=4),
        lambda: mask.check("f()", B=1, Hq=1, Lq=4, Lk=4, device="cpu"),
    ):
        with pytest.raises(qkv.ArgumentError, match="changed in place"):
            use()
    assert qkv.dense(t) != mask
    assert not qkv.dense(t).tensor(4, 4)[0, 0, 1, 2]
    with torch.inference_mode():
        unversioned = torch.ones(2, 2, dtype=torch.bool)
    assert qkv.dense(unversioned).tensor(2, 2).all()


def test_bool_tensors_combine_on_either_side() -> None:
    t = torch.eye(3, dtype=torch.bool)
    for mask in (t | qkv.prefix(1), qkv.prefix(1) | t):
        assert torch.equal(mask.tensor(3, 3)[0, 0], t | (torch.arange(3) < 1))
    for mask in (t & qkv.prefix(1), qkv.prefix(1) & t):
        assert torch.equal(mask.tensor(3, 3)[0, 0], t & (torch.arange(3) < 1))
    assert qkv.masks.as_mask(t) == qkv.dense(t)
    assert qkv.masks.as_mask(None) is None


@pytest.mark.parametrize(
    ("mask", "position", "batch", "head"),
    [
        (qkv.causal(), True, False, False),
        (qkv.window(None, None), False, False, False),
        (qkv.prefix(3), False, False, False),
        (qkv.prefix([3, 4]), False, True, False),
        (qkv.padding([3, 4]), False, True, False),
        (qkv.documents([3, 4]), True, False, False),
        (qkv.documents([3, 4], [1, 1]), False, False, False),
        (qkv.documents(segment_ids=[[0, 1], [1, 1]]), True, True, False),
        (qkv.documents(segment_ids=[0, 1], k_segment_ids=[0]), False, False, False),
        (qkv.dense(torch.ones(1, 1, 3, 3).bool()), False, False, False),
        (qkv.dense(torch.ones(2, 2, 3, 3).bool()), False, True, True),
        (qkv.blocks(torch.ones(2, 3, 1, 1).bool(), 9), True, True, True),
        (qkv.per_head([qkv.prefix(1), qkv.prefix(2)]), False, False, True),
        (qkv.per_head([qkv.prefix(1), qkv.prefix(1)]), False, False, False),
        (~qkv.chunked(2) & qkv.padding([1, 2]), True, True, False),
    ],
    ids=repr,
)
def test_what_a_mask_depends_on(mask: Mask, position: bool, batch: bool, head: bool) -> None:
    assert (mask.depends_on_position, mask.varies_by_batch, mask.varies_by_head) == (position, batch, head)


# Pictures.


def test_picture() -> None:
    assert qkv.causal().picture(2, 3, positions="end") == "p/j 0 1 2\n  1 ■ ■ ·\n  2 ■ ■ ■"
    assert qkv.causal().picture(0, 0) == "p/j"
    assert qkv.sliding_window(1).picture(1, 12, positions=-1).splitlines() == [
        "p/j 0         5         10",
        " -1 " + " ".join("·" * 12),
    ]
    head = qkv.per_head([qkv.causal(), ~qkv.causal()])
    assert head.picture(2, 2, Hq=2, h=1) == "p/j 0 1\n  0 · ■\n  1 · ·"
    rows = qkv.padding([1, 2])
    assert rows.picture(1, 2, B=2, b=0) == "p/j 0 1\n  0 ■ ·"
    assert rows.picture(1, 2, B=2, b=1) == "p/j 0 1\n  0 ■ ■"


def test_a_large_picture_is_drawn_in_blocks() -> None:
    lines = qkv.causal().picture(480, 480).splitlines()
    assert len(lines) == 1 + 48 + 1
    assert lines[2].split() == ["10", "■", "▒", *"·" * 46]
    assert "10 x 10" in lines[-1]
    assert "1234567" in qkv.causal().picture(2, 2, positions=1234567)


def test_doctests() -> None:
    import doctest
    import importlib
    import pkgutil

    names = ["qkv.masks", *(m.name for m in pkgutil.iter_modules(qkv.masks.__path__, "qkv.masks."))]
    ran = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(r.failed for r in ran) == 0
    assert sum(r.attempted for r in ran) > 40
