"""A second definition of every mask in plain Python, written from the table of conventions, no code shared.

A random mask is drawn as a `Spec`: how to build it with qkv, and a predicate that says what it must show.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

import qkv
from qkv.masks import Mask

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


def _causal(rng: random.Random, s: Sizes) -> Spec:
    return Spec("causal()", qkv.causal(), lambda b, h, i, p, j: j <= p, True)


def _sliding_window(rng: random.Random, s: Sizes) -> Spec:
    n = rng.choice([1, 2, 3, 7, 1000])
    return Spec(f"sliding_window({n})", qkv.sliding_window(n), lambda b, h, i, p, j: p - n < j <= p, True)


def _window(rng: random.Random, s: Sizes) -> Spec:
    left, right = (rng.choice([None, 0, 1, 3, 9]) for _ in range(2))

    def window(b: int, h: int, i: int, p: int, j: int) -> bool:
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return Spec(f"window({left}, {right})", qkv.window(left, right), window, True)


def _prefix(rng: random.Random, s: Sizes) -> Spec:
    n = rng.randint(0, s.Lk + 2)
    return Spec(f"prefix({n})", qkv.prefix(n), lambda b, h, i, p, j: j < n, True)


def _prefix_rows(rng: random.Random, s: Sizes) -> Spec:
    ns = [rng.randint(0, s.Lk + 2) for _ in range(s.B)]
    return Spec(f"prefix({ns})", qkv.prefix(torch.tensor(ns, dtype=torch.int32)), lambda b, h, i, p, j: j < ns[b], True)


def _padding(rng: random.Random, s: Sizes) -> Spec:
    ns, side = [rng.randint(0, s.Lk) for _ in range(s.B)], rng.choice(["right", "left"])

    def padding(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j < ns[b] if side == "right" else j >= s.Lk - ns[b]

    return Spec(f"padding({ns}, {side!r})", qkv.padding(ns, side), padding, True)


def _documents(rng: random.Random, s: Sizes) -> Spec:
    ns = _partition(rng, s.Lk, rng.randint(1, 5))
    return Spec(
        f"documents({ns})",
        qkv.documents(ns),
        lambda b, h, i, p, j: _document(ns, p) == _document(ns, j) >= 0,
        True,
    )


def _documents_cross(rng: random.Random, s: Sizes) -> Spec:
    n = rng.randint(1, 5)
    mine, theirs = _partition(rng, s.Lq, n), _partition(rng, s.Lk, n)
    return Spec(
        f"documents({mine}, {theirs})",
        qkv.documents(mine, theirs),
        lambda b, h, i, p, j: _document(mine, i) == _document(theirs, j) >= 0,
        True,
    )


def _segments(rng: random.Random, s: Sizes, kind: str) -> Spec:
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


def _chunked(rng: random.Random, s: Sizes) -> Spec:
    n = rng.choice([1, 2, 5, 16])
    return Spec(f"chunked({n})", qkv.chunked(n), lambda b, h, i, p, j: p // n == j // n, True)


def _strided(rng: random.Random, s: Sizes) -> Spec:
    n, offset = rng.choice([1, 2, 5]), rng.randint(-3, 6)
    return Spec(
        f"strided({n}, {offset})", qkv.strided(n, offset), lambda b, h, i, p, j: (p - j - offset) % n == 0, n == 1
    )


def _dilated(rng: random.Random, s: Sizes) -> Spec:
    w, step = rng.randint(0, 4), rng.choice([1, 2, 3])
    return Spec(
        f"dilated({w}, {step})",
        qkv.dilated(w, step),
        lambda b, h, i, p, j: abs(p - j) <= w * step and (p - j) % step == 0,
        step == 1,
    )


def _global_tokens(rng: random.Random, s: Sizes) -> Spec:
    at = [rng.randint(0, s.Lk + 3) for _ in range(rng.randint(0, 4))]
    return Spec(f"global_tokens({at})", qkv.global_tokens(at), lambda b, h, i, p, j: p in at or j in at, True)


def _random_blocks(rng: random.Random, s: Sizes) -> Spec:
    per, block, seed = rng.randint(0, 4), rng.choice([1, 3, 8]), rng.choice([0, 1, 2**63 - 1, rng.getrandbits(40)])

    def random_blocks(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j // block in drawn_blocks(per, block, seed, p // block, s.Lk)

    return Spec(f"random_blocks({per}, {block}, {seed})", qkv.random_blocks(per, block, seed), random_blocks, True)


def _blocks(rng: random.Random, s: Sizes) -> Spec:
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


def _per_head(rng: random.Random, s: Sizes) -> Spec:
    parts = [expression(rng, s, rng.randint(0, 1), kinds=EXACT_KINDS) for _ in range(s.Hq)]
    return Spec(
        f"per_head([{', '.join(part.text for part in parts)}])",
        qkv.per_head([part.mask for part in parts]),
        lambda b, h, i, p, j: parts[h].sees(b, h, i, p, j),
        all(part.exact for part in parts),
        all(part.lowers for part in parts),
    )


def _dense(rng: random.Random, s: Sizes) -> Spec:
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


def _mask_mod(rng: random.Random, s: Sizes) -> Spec:
    return Spec(
        "mask_mod(...)",
        qkv.mask_mod(lambda b, h, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4),
        lambda b, h, i, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4,
        False,
        lowers=False,
    )


_MAKERS: dict[str, Callable[[random.Random, Sizes], Spec]] = {
    "causal": _causal,
    "sliding_window": _sliding_window,
    "window": _window,
    "prefix": _prefix,
    "prefix_rows": _prefix_rows,
    "padding": _padding,
    "documents": _documents,
    "documents_cross": _documents_cross,
    "segments": partial(_segments, kind="segments"),
    "segments_cross": partial(_segments, kind="segments_cross"),
    "chunked": _chunked,
    "strided": _strided,
    "dilated": _dilated,
    "global_tokens": _global_tokens,
    "random_blocks": _random_blocks,
    "blocks": _blocks,
    "per_head": _per_head,
    "dense": _dense,
    "mask_mod": _mask_mod,
}


def leaf(rng: random.Random, s: Sizes, kind: str) -> Spec:
    """One mask of the given kind that fits the sizes."""
    return _MAKERS[kind](rng, s)


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
