"""What a mask leaves, counted: against every pair looked at, by definitions that share no code with the masks."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

import qkv
from qkv.masks import Sizes as Shape, counts, patches, portion, touched
from tests.kit.mask_specs import EXACT_KINDS, KINDS, Sizes, Spec, draw_positions, draw_sizes, expression, leaf, seeds

CLOSED = [kind for kind in KINDS if kind not in ("dense", "mask_mod", "per_head", "portion")]
EVERYTHING = 1 << 40


def runs(line: list[int]) -> list[tuple[int, int, int]]:
    """(first position, last position, first index) of queries at consecutive positions."""
    found: list[tuple[int, int, int]] = []
    for i, p in enumerate(line):
        if found and found[-1][1] + 1 == p:
            found[-1] = (found[-1][0], p, found[-1][2])
        else:
            found.append((p, p, i))
    return found


def counted(mask: qkv.Mask, line: list[int], s: Sizes, b: int, h: int, look: int = 0) -> counts.Pairs:
    first, last, index = (torch.tensor(x, dtype=torch.int64) for x in zip(*runs(line), strict=True))
    return counts.pairs(mask, first, last, index, b=b, h=h, sizes=Shape(*_numbers(s)), look=counts.Look(look))


def _numbers(s: Sizes) -> tuple[int, int, int, int]:
    return s.B, s.Hq, s.Lq, s.Lk


def seen(spec: Spec, line: list[int], s: Sizes, b: int, h: int) -> list[list[bool]]:
    return [[bool(spec.sees(b, h, i, p, j)) for j in range(s.Lk)] for i, p in enumerate(line)]


def check(spec: Spec, s: Sizes, rng: random.Random, closed: bool) -> None:
    if not s.Lq:
        return
    _, table = draw_positions(rng, s)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    line = table[b]
    want = sum(map(sum, seen(spec, line, s, b, h)))
    where = f"{spec.text} {s} b={b} h={h} {line}"
    assert counted(spec.mask, line, s, b, h, EVERYTHING) == (want, want), where
    bound = counted(spec.mask, line, s, b, h)
    assert bound.least <= want <= bound.most, where
    assert not closed or bound.exact, where


@pytest.mark.parametrize("kind", KINDS)
@seeds(25)
def test_pairs_of_each_mask(kind: str, seed: int) -> None:
    rng = random.Random(f"counts {kind} {seed}")
    s = draw_sizes(rng)
    check(leaf(rng, s, kind), s, rng, kind in CLOSED)


@seeds(400)
def test_pairs_of_compositions_in_closed_form(seed: int) -> None:
    rng = random.Random(f"counts closed {seed}")
    s = draw_sizes(rng)
    check(expression(rng, s, rng.randint(1, 3), CLOSED), s, rng, True)


@seeds(150)
def test_pairs_of_compositions_of_all_masks(seed: int) -> None:
    rng = random.Random(f"counts all {seed}")
    s = draw_sizes(rng, 24)
    check(expression(rng, s, rng.randint(1, 3), KINDS), s, rng, False)


@pytest.mark.parametrize("kind", ["strided", "dilated"])
@seeds(60)
def test_remainders_meet_every_other_mask(kind: str, seed: int) -> None:
    rng = random.Random(f"counts {kind} with others {seed}")
    s = draw_sizes(rng)
    one, two = leaf(rng, s, kind), expression(rng, s, 1, [*EXACT_KINDS, "strided", "dilated"])
    both = Spec("both", one.mask & ~two.mask, lambda *at: one.sees(*at) and not two.sees(*at), False)
    check(both, s, rng, True)


@pytest.mark.parametrize("kind", KINDS)
@seeds(12)
def test_tiles_of_each_mask(kind: str, seed: int) -> None:
    """Those with a visible key, and those without a hidden one; more and fewer where ranges are only bounds."""
    from qkv.backends.tiled.schedule import HeadRow, count_tiles

    rng = random.Random(f"tiles {kind} {seed}")
    s = draw_sizes(rng)
    if not s.Lq or not s.Lk:
        return
    spec, T, K = leaf(rng, s, kind), rng.choice([1, 3, 8, 64]), rng.choice([1, 2, 5, 16])
    _, table = draw_positions(rng, s)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    dense = torch.tensor(seen(spec, table[b], s, b, h))
    tiles = [dense[i : i + T, j : j + K] for i in range(0, s.Lq, T) for j in range(0, s.Lk, K)]
    some, every = sum(bool(t.any()) for t in tiles), sum(bool(t.all()) for t in tiles)
    found = count_tiles(spec.mask, [HeadRow(b, h, 0, torch.tensor(table[b]), s.Hq)], s.Lq, s.Lk, T, K)
    assert found.total == len(tiles)
    many = len(runs(table[b])) > 8 * -(-s.Lq // T)  # positions without order: no tile is thought about
    if spec.exact and not many:
        assert (found.visible, found.full) == (some, every), spec.text
    assert found.visible >= some
    assert found.full <= every


@seeds(150)
def test_pairs_of_portions_are_counted_where_those_of_the_whole_are(seed: int) -> None:
    rng = random.Random(f"counts portions {seed}")
    s = draw_sizes(rng)
    i, j = rng.randint(0, 9), rng.randint(0, 20)
    whole = Sizes(s.B, s.Hq, s.Lq + i + rng.randint(0, 3), s.Lk + j + rng.randint(0, 3))
    of = expression(rng, whole, rng.randint(0, 2), CLOSED)
    part = portion(of.mask, first_key=j, first_query=i, Lq=whole.Lq, Lk=whole.Lk)
    check(Spec(repr(part), part, lambda b, h, at, p, key: of.sees(b, h, at + i, p + j, key + j), False), s, rng, True)


LONG = 1_000_003
OF_A_MILLION = [
    (qkv.causal(), LONG * (LONG + 1) // 2),
    (qkv.sliding_window(4096), 4096 * LONG - 4096 * 4095 // 2),
    (qkv.window(5, 7), 13 * LONG - 5 * 6 // 2 - 7 * 8 // 2),
    (qkv.documents([LONG - 1000, 1000]), (LONG - 1000) ** 2 + 1000**2),
    (qkv.strided(7) & qkv.causal(), sum((LONG - d) for d in range(0, LONG, 7))),
    (qkv.dilated(64, 16), LONG + 2 * sum(LONG - 16 * d for d in range(1, 65))),
    (~qkv.chunked(8), LONG**2 - (LONG // 8) * 64 - 9),
    (qkv.global_tokens([5, LONG - 1]), 4 * LONG - 4),
    (qkv.random_blocks(3, 64, 0) & qkv.prefix(0), 0),
]


@pytest.mark.parametrize(("mask", "want"), OF_A_MILLION, ids=lambda x: f"{x!r:.40}")
def test_a_million_tokens_are_counted(mask: qkv.Mask, want: int) -> None:
    s = Sizes(1, 1, LONG, LONG)
    assert counted_range(mask, s) == (want, want)


def counted_range(mask: qkv.Mask, s: Sizes, offset: int = 0) -> Any:
    first, last, index = (torch.tensor([x]) for x in (offset, offset + s.Lq - 1, 0))
    return counts.pairs(mask, first, last, index, b=0, h=0, sizes=Shape(*_numbers(s)), look=counts.Look(0))


def test_positions_far_away_do_not_overflow() -> None:
    s = Sizes(1, 1, 1000, 1000)
    want = sum((p - j) % 7 == 3 for p in range(2**48, 2**48 + 1000) for j in range(1000))
    assert counted_range(qkv.strided(7, 3), s, 2**48) == (want, want)
    want = sum((p - j) % 7 == 3 for p in range(-(2**48), -(2**48) + 1000) for j in range(1000))
    assert counted_range(qkv.strided(7, 3), s, -(2**48)) == (want, want)


def test_rows_are_divided_where_ranges_are_many() -> None:
    """Every second token global: half a million ranges a row are not held for a million rows at once."""
    L = 4001
    even = torch.arange(0, L, 2)
    s, n = Sizes(1, 1, L, L), even.numel()
    want = 2 * n * L - n * n
    assert counted_range(qkv.global_tokens(even), s) == (want, want)
    ids = torch.arange(L) % 2
    want = n * n + (L - n) ** 2
    assert counted_range(qkv.documents(segment_ids=ids), s) == (want, want)


def test_a_period_too_long_is_bounded_or_looked_at() -> None:
    mask, s = qkv.strided(1999) & qkv.strided(2003, 1), Sizes(1, 1, 3000, 3000)
    want = sum(3000 - abs(d) for d in range(-2999, 3000) if d % 1999 == 0 and (d - 1) % 2003 == 0)
    bound = counted_range(mask, s)
    assert bound.least <= want < bound.most
    first, last, index = (torch.tensor([x]) for x in (0, 2999, 0))
    look = counts.Look(EVERYTHING)
    assert counts.pairs(mask, first, last, index, b=0, h=0, sizes=Shape(1, 1, 3000, 3000), look=look) == (want, want)


def test_looking_keeps_its_limit() -> None:
    t = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.3
    s = Sizes(1, 1, 300, 300)
    mask, line = qkv.dense(t) & qkv.causal(), list(range(300))
    want = int(t.tril().sum())
    assert counted(mask, line, s, 0, 0, 300 * 300) == (want, want)
    assert counted(mask, line, s, 0, 0, 1000) == (0, 300 * 301 // 2)


@seeds(120)
def test_a_picture_that_was_counted_is_the_one_that_was_looked_at(seed: int) -> None:
    rng = random.Random(f"pictures {seed}")
    s = draw_sizes(rng)
    if not s.Lq or not s.Lk:
        return
    spec = expression(rng, s, rng.randint(0, 2), CLOSED)
    _, table = draw_positions(rng, s)
    b, h, steps = rng.randrange(s.B), rng.randrange(s.Hq), (rng.randint(1, 9), rng.randint(1, 9))
    dense = torch.tensor(seen(spec, table[b], s, b, h))
    cells = [
        [dense[i : i + steps[0], j : j + steps[1]] for j in range(0, s.Lk, steps[1])] for i in range(0, s.Lq, steps[0])
    ]
    want = [[int(cell.any()) + int(cell.all()) for cell in row] for row in cells]
    line = torch.tensor(table[b])
    found = counts.counted_cells(spec.mask, line, b=b, h=h, sizes=Shape(*_numbers(s)), steps=steps)
    assert found is not None
    assert found.tolist() == want, f"{spec.text} {s} {steps}"


@seeds(150)
def test_cells_between_any_rows_and_keys_are_counted(seed: int) -> None:
    """Grids cut anywhere: the ranges of queries that ranks hold, by the ranges of keys that others do."""
    rng = random.Random(f"grids {seed}")
    s = draw_sizes(rng)
    if not s.Lq:
        return
    closed = rng.random() < 0.7
    spec = expression(rng, s, rng.randint(0, 2), CLOSED if closed else KINDS)
    _, table = draw_positions(rng, s)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    rows = sorted({0, *(rng.randrange(s.Lq) for _ in range(3))})
    keys = sorted({0, s.Lk, *(rng.randint(0, s.Lk) for _ in range(4))}) if s.Lk else [0, 0]
    breaks = [i for _, _, i in runs(table[b])]
    starts = sorted({*rows, *breaks})
    ends = [*starts[1:], s.Lq]
    dense = torch.tensor(seen(spec, table[b], s, b, h), dtype=torch.int64).reshape(s.Lq, s.Lk)
    want = [[int(dense[i:z, j:y].sum()) for j, y in pairwise(keys)] for i, z in pairwise([*rows, s.Lq])]
    first, last, index = (
        torch.tensor(x, dtype=torch.int64)
        for x in ([table[b][i] for i in starts], [table[b][z - 1] for z in ends], starts)
    )
    for most in (False, True):
        found = counts.grid(
            spec.mask, first, last, index, b=b, h=h, sizes=Shape(*_numbers(s)), rows=torch.tensor(rows),
            keys=torch.tensor(keys), most=most,
        )  # fmt: skip
        where = f"{spec.text} {s} b={b} h={h} {rows} {keys} {table[b]}"
        if closed or (found is not None and not most):
            assert found is not None
            assert found.tolist() == want, where
        elif most:
            assert found is not None
            assert bool((found >= torch.tensor(want)).all()), where


def test_long_pictures_are_those_of_every_pair() -> None:
    mask = (qkv.causal() & (qkv.prefix(100) | qkv.sliding_window(700))) | qkv.random_blocks(1, 200, 3)
    drawn = mask.picture(3000, 2500, positions=-20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv.masks.base._LOOKED_AT", 1 << 40)
        assert mask.picture(3000, 2500, positions=-20) == drawn
    assert "▒" in drawn
    assert "■" in drawn
    t = torch.ones(3000, 3000, dtype=torch.bool)
    assert "▒" not in qkv.dense(t).picture(3000, 3000).rpartition("one cell")[0], "a tensor is looked at"


@seeds(60)
def test_tiles_that_stand_for_others_count_as_they_do(seed: int) -> None:
    """Long enough that most tiles are not looked at: the same number as by looking at each."""
    from qkv.backends.tiled.schedule import HeadRow, count_tiles

    rng = random.Random(f"representatives {seed}")
    L = rng.randint(2000, 4000)
    s = Sizes(1, 1, L, L + rng.choice([0, 0, -777, 1313]))
    spec = expression(rng, s, rng.randint(0, 2), ["causal", "sliding_window", "window", "prefix", "chunked", "padding",
                      "strided", "dilated", "global_tokens", "documents"])  # fmt: skip
    wide = rng.choice([qkv.sliding_window(rng.randint(1, 900)), qkv.window(300, rng.randint(0, 700)), qkv.prefix(5)])
    T, K, offset = rng.choice([3, 4, 6]), rng.choice([1, 2, 8, 10]), rng.choice([0, 0, -500, 900])
    for mask in (spec.mask, spec.mask & wide, spec.mask | (wide & qkv.causal())):
        line = [HeadRow(0, 0, offset, None, 1)]
        found = count_tiles(mask, line, s.Lq, s.Lk, T, K)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(touched, "MANY", 1 << 60)
            assert count_tiles(mask, line, s.Lq, s.Lk, T, K) == found, f"{mask!r} {s} {T} {K} {offset}"


def test_most_tiles_of_a_window_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkv.backends.tiled.schedule import HeadRow, count_tiles

    seen: list[int] = []
    whole = touched.divided
    monkeypatch.setattr(touched, "divided", lambda m, w, last, n: (seen.append(last.numel()), whole(m, w, last, n))[1])
    count_tiles(qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(4096)), [HeadRow(0, 0, 0, None)], LONG, LONG, 96, 16)
    assert seen[0] < 300


def looked_at(table: torch.Tensor, T: int, K: int) -> tuple[int, int, int]:
    """Visible pairs, and tiles of T by K with a visible one, and without a hidden one: of a table (Lq, Lk)."""
    high, wide = -table.shape[0] % T, -table.shape[1] % K
    some = torch.nn.functional.pad(table, (0, wide, 0, high)).unflatten(1, (-1, K)).unflatten(0, (-1, T)).any(3).any(1)
    gone = torch.nn.functional.pad(~table, (0, wide, 0, high)).unflatten(1, (-1, K)).unflatten(0, (-1, T)).any(3).any(1)
    return int(table.sum()), int(some.sum()), int((~gone).sum())


def all_counts(mask: qkv.Mask, Lq: int, Lk: int, offset: int, T: int, K: int) -> tuple[int, int, int]:
    from qkv.backends.tiled.schedule import HeadRow, count_tiles

    tiles = count_tiles(mask, [HeadRow(0, 0, offset, None, 1)], Lq, Lk, T, K)
    first = torch.tensor([offset])
    pairs = counts.pairs(
        mask, first, first + Lq - 1, torch.tensor([0]), b=0, h=0, sizes=Shape(1, 1, Lq, Lk), look=counts.Look(0)
    )
    assert pairs.exact, f"{mask!r}"
    return pairs.least, tiles.visible, tiles.full


def portion_of(rng: random.Random, mask: qkv.Mask, Lq: int, Lk: int, offset: int) -> tuple[Any, Any, int, int, int]:
    """A mask, or a part of it at a random place: its table, and its numbers of queries and keys and first position."""
    table = mask.tensor(Lq, Lk, positions=offset).view(Lq, Lk)
    if rng.random() < 0.6:
        return mask, table, Lq, Lk, offset
    i, j = rng.randint(0, 90), rng.choice([0, rng.randint(1, 90)])
    rows, keys = Lq - i - rng.choice([0, 7]), Lk - j - rng.choice([0, 11])
    part = portion(mask, first_key=j, first_query=i, Lq=Lq, Lk=Lk)
    return part, table[i : i + rows, j : j + keys], rows, keys, offset + i - j


def others(rng: random.Random, L: int) -> qkv.Mask:
    """A mask with few pieces."""
    some = rng.sample(range(L), 2)
    return rng.choice([
        qkv.causal(), qkv.sliding_window(rng.randint(1, L // 2)), qkv.window(rng.randint(0, 40), rng.randint(0, 90)),
        qkv.prefix(rng.randint(0, L // 3)), qkv.global_tokens(some), qkv.padding([rng.randint(L // 2, L - 40)]),
        qkv.documents([min(some), L - min(some)]),
    ])  # fmt: skip


@seeds(150)
def test_forms_that_come_back_are_counted_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"come back {seed}")
    monkeypatch.setattr(touched, "MANY", 4)
    L, T, K = rng.randint(300, 700), rng.choice([1, 2, 3, 4, 6]), rng.choice([1, 2, 4, 6])
    offset = rng.choice([0, 0, -3, 5, -120])
    mask: qkv.Mask = qkv.chunked(rng.randint(2, 7))
    if rng.random() < 0.4:
        step = qkv.strided(rng.randint(2, 3))
        mask = rng.choice([mask & step, mask | (step & others(rng, L)), mask | qkv.chunked(rng.randint(2, 4)), ~mask])
    for _ in range(rng.randint(0, 2)):
        other = others(rng, L)
        mask = rng.choice([mask & other, mask | other, mask & ~other, other & ~mask])
    mask, table, Lq, Lk, offset = portion_of(rng, mask, L, L, offset)
    want = looked_at(table, T, K)
    found = all_counts(mask, Lq, Lk, offset, T, K)
    where = f"{mask!r} L={L} T={T} K={K} offset={offset}"
    assert found[0] == want[0], where
    assert found[1] >= want[1], where
    assert found[2] <= want[2], where
    assert "strided" in repr(mask) or found == want, where


@seeds(200)
def test_blocks_that_lie_apart_count_for_themselves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"apart {seed}")
    for where, name, value in ((touched, "MANY", 4), (patches, "_LEAST", 4), (patches, "_MOST", rng.choice([1, 4]))):
        monkeypatch.setattr(where, name, value)
    L, T, K = rng.randint(300, 700), rng.choice([1, 3, 4, 6, 8]), rng.choice([1, 2, 4, 6])
    Lk, offset, size = L + rng.choice([0, 0, -90, 55]), rng.choice([0, 0, -3, 5, -120]), rng.choice([2, 3, 4, 5, 8, 16])
    kind = rng.choice(["random", "random", "map", "map", "lists"])
    if kind == "random":
        mask: qkv.Mask = qkv.random_blocks(rng.randint(0, 3), size, rng.randint(0, 99))
    elif kind == "lists":
        g = torch.Generator().manual_seed(seed)
        lists = torch.randint(-1, Lk // size + 2, (1, 1, -(-L // size), rng.randint(0, 3)), generator=g)
        mask = qkv.selected_blocks(lists, size, queries=size)
    else:
        g = torch.Generator().manual_seed(seed)
        blocks = torch.rand(-(-L // size) + 1, -(-(L + 55) // size), generator=g) < rng.choice([0.01, 0.05, 0.4])
        mask = qkv.blocks(blocks, size)
    for _ in range(rng.randint(0, 2)):
        other = others(rng, Lk)
        mask = rng.choice([mask & other, mask | other, mask | other, mask & ~other, other & ~mask, ~mask & other])
    mask, table, Lq, Lk, offset = portion_of(rng, mask, L, Lk, offset)
    want = looked_at(table, T, K)
    assert all_counts(mask, Lq, Lk, offset, T, K) == want, f"{mask!r} Lq={Lq} Lk={Lk} T={T} K={K} offset={offset}"
    assert all_counts(mask, Lq, Lk, offset, T, K) == want, "what was kept is what was found"


def test_most_blocks_are_not_thought_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million tokens of BigBird, or of a map; and what was kept answers for no other length, offset or tile."""
    looked: list[int] = []
    whole = touched._counted
    monkeypatch.setattr(touched, "_counted", lambda *args: (looked.append(args[5].numel()), whole(*args))[1])
    g = torch.Generator().manual_seed(1)
    sparse = qkv.blocks(torch.rand(2001, 2001, generator=g) < 0.01, 512)
    for mask in (qkv.bigbird(64), qkv.bigbird(64) & qkv.causal(), sparse):
        looked.clear()
        all_counts(mask, LONG, LONG, 0, 48, 16)
        assert sum(looked) < 1000, f"{mask!r}: {looked}"
        for Lq, offset, T in ((LONG - 640, 0, 48), (LONG - 640, 640, 48), (LONG - 640, 640, 64)):
            found = all_counts(mask, Lq, LONG, offset, T, 16)
            object.__delattr__(mask, "_patches")
            assert all_counts(mask, Lq, LONG, offset, T, 16) == found, f"{mask!r} {Lq} {offset} {T}"
