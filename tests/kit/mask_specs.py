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
from qkv.masks import Mask, portion
from qkv.masks.stripes import Stripes
from tests.kit import masks
from tests.kit.masks import Sizes as Sizes, document, drawn_blocks as drawn_blocks, partition

Predicate = Callable[[int, int, int, int, int], bool]  # b, h, i, p, j


@dataclass
class Spec:
    text: str
    mask: Mask
    sees: Predicate
    exact: bool  # whether intervals() must be exact
    lowers: bool = True
    tensors: list[torch.Tensor] = field(default_factory=list)


def _id(ids: list[int], x: int) -> int:
    return ids[x] if 0 <= x < len(ids) else -1


def _prefix_rows(rng: random.Random, s: Sizes) -> Spec:
    ns = [rng.randint(0, s.Lk + 2) for _ in range(s.B)]
    return Spec(f"prefix({ns})", qkv.prefix(torch.tensor(ns, dtype=torch.int32)), lambda b, h, i, p, j: j < ns[b], True)


def _documents_cross(rng: random.Random, s: Sizes) -> Spec:
    n = rng.randint(1, 5)
    mine, theirs = partition(rng, s.Lq, n), partition(rng, s.Lk, n)
    return Spec(
        f"documents({mine}, {theirs})",
        qkv.documents(mine, theirs),
        lambda b, h, i, p, j: document(mine, i) == document(theirs, j) >= 0,
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


def _selected(rng: random.Random, s: Sizes) -> Spec:
    block, queries, n = rng.choice([1, 3, 16]), rng.choice([1, 1, 2, 5]), rng.choice([0, 1, 2, 5])
    rb, heads = rng.choice([1, s.B]), rng.choice([h for h in range(1, s.Hq + 1) if s.Hq % h == 0])
    shape = (rb, heads, -(-s.Lq // queries), n)
    drawn = [rng.randint(-2, -(-s.Lk // block) + 1) for _ in range(shape[0] * shape[1] * shape[2] * n)]
    t = torch.tensor(drawn, dtype=rng.choice([torch.int32, torch.int64])).view(shape)
    lists = t.tolist()

    def selected(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j // block in lists[b % rb][h // (s.Hq // heads)][i // queries]

    mask = qkv.selected_blocks(t, block, queries=queries)
    return Spec(f"selected_blocks({shape}, {block}, {queries})", mask, selected, True, tensors=[t])


def _mask_mod(rng: random.Random, s: Sizes) -> Spec:
    return Spec(
        "mask_mod(...)",
        qkv.mask_mod(lambda b, h, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4),
        lambda b, h, i, p, j: (b + 2 * h + p * 3 + j * 5) % 7 < 4,
        False,
        lowers=False,
    )


def _of_row(rng: random.Random, s: Sizes, kind: masks.Kind) -> Spec:
    assert kind.small is not None
    args, sees, exact = kind.small(rng, s)
    return Spec(f"{kind.name}({', '.join(map(repr, args))})", getattr(qkv, kind.name)(*args), sees, exact)


def _stripes(rng: random.Random, s: Sizes) -> Spec:
    block, ranks = rng.choice([1, 3, 16]), rng.randint(1, 4)
    rank, blocks = rng.randrange(ranks), rng.choice([0, 1, rng.randint(0, 9), 100])

    def stripes(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j // block % ranks == rank and j < blocks * block

    mask = Stripes(block, ranks, rank, blocks)
    return Spec(f"stripes({block}, {ranks}, {rank}, {blocks})", mask, stripes, True)


def _portion(rng: random.Random, s: Sizes) -> Spec:
    """Some keys and queries of a larger call, whose mask may be a portion itself."""
    i, j = (rng.choice([0, rng.randint(0, 20)]) for _ in range(2))
    whole = Sizes(s.B, s.Hq, s.Lq + i + rng.randint(0, 4), s.Lk + j + rng.randint(0, 4))
    part = expression(rng, whole, rng.randint(0, 2), KINDS)
    mask = portion(part.mask, first_key=j, first_query=i, Lq=whole.Lq, Lk=whole.Lk)
    return Spec(
        f"portion({part.text}, {j}, {i}, {whole})",
        mask,
        lambda b, h, at, p, key: part.sees(b, h, at + i, p + j, key + j),
        part.exact,
        part.lowers,
        part.tensors,
    )


_EXACT: dict[str, Callable[[random.Random, Sizes], Spec]] = {
    **{kind.name: partial(_of_row, kind=kind) for kind in masks.KINDS if kind.small and kind.exact},
    "prefix_rows": _prefix_rows,
    "documents_cross": _documents_cross,
    "segments": partial(_segments, kind="segments"),
    "segments_cross": partial(_segments, kind="segments_cross"),
}
_MAKERS = {
    **_EXACT,
    **{kind.name: partial(_of_row, kind=kind) for kind in masks.KINDS if kind.small and not kind.exact},
    "blocks": _blocks,
    "per_head": _per_head,
    "dense": _dense,
    "selected_blocks": _selected,
    "mask_mod": _mask_mod,
    "stripes": _stripes,
    "portion": _portion,
}
EXACT_KINDS, KINDS = list(_EXACT), list(_MAKERS)


def leaf(rng: random.Random, s: Sizes, kind: str) -> Spec:
    """One mask of the given kind that fits the sizes."""
    return _MAKERS[kind](rng, s)


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
