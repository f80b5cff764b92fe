"""Which tiles of the score matrix hold a visible key: empty ones are not visited, full ones do not ask the mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.problem import Problem
from qkv.masks import Mask, counts, touched
from qkv.masks.intervals import Rows

# Arbitrary positions cut the queries into runs of consecutive positions. Beyond this many runs a tile, asking the mask
# for intervals costs more than it can save, and every tile counts as mixed.
_MAX_RUNS_PER_TILE = 8


class KeyTile(NamedTuple):
    """Keys start..stop of one tile; `full` promises that every query of the query tile sees all of them."""

    start: int
    stop: int
    full: bool

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)


class TileCount(NamedTuple):
    """How many tiles a mask leaves: over all batch rows and query heads."""

    visible: int
    full: int
    total: int


class _Runs(NamedTuple):
    """Runs of consecutive positions within one query tile: first and last position, first query index, tile."""

    first: Tensor
    last: Tensor
    i_first: Tensor
    tile: Tensor


class HeadRow(NamedTuple):
    """One query head of one batch row, as the mask sees it: its positions, or where they start."""

    b: int
    h: int
    offset: int
    positions: Tensor | None  # int64 (Lq,) on the CPU
    Hq: int | None = None  # of how many heads


def head_row(problem: Problem, positions: Tensor | None, b: int, h: int) -> HeadRow:
    """Query head h of batch row b; `positions` are the problem's, (B or 1, Lq), where they are data."""
    if positions is None:
        return HeadRow(b, h, problem.offset(b), None, problem.Hq)
    return HeadRow(b, h, 0, positions[b if positions.shape[0] > 1 else 0].cpu(), problem.Hq)


class Schedule:
    """The key tiles of each query tile, for queries that several heads or batch rows process together.

    A tile is visited if any of them needs it, and full only if it is full for all: a tile that one of them does not
    need changes nothing there, bit for bit.
    """

    def __init__(self, mask: Mask | None, lines: Sequence[HeadRow], Lq: int, Lk: int, T: int, K: int) -> None:
        self._Lk, self._K = Lk, K
        self._dense = mask is None
        self._ranges: list[list[list[tuple[list[int], list[int]]]]] | None = None
        if mask is None or (Lq <= T and Lk <= K):
            return  # nothing to skip, or one tile: looking at its mask costs less than asking for intervals
        self._ranges = []
        for line in lines:
            runs = _runs(line, Lq, T)
            if runs is None:
                self._ranges = None
                return
            first, last, i_first, _ = runs
            found = mask.intervals(first, last, b=line.b, h=line.h, Hq=line.Hq, Lk=Lk, Lq=Lq, i_first=i_first)
            per_tile: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(-(-Lq // T))]
            visible = _rows(found.visible_start, found.visible_stop, found.visible_count)
            full = _rows(found.full_start, found.full_stop, found.full_count)
            for tile, seen, whole in zip(runs.tile.tolist(), visible, full, strict=True):
                per_tile[tile].append((seen, whole))
            self._ranges.append(per_tile)

    def keys(self, tile: int) -> Iterator[KeyTile]:
        """The key tiles that query tile `tile` has to visit, in order."""
        Lk, K = self._Lk, self._K
        if self._ranges is None:
            for start in range(0, Lk, K):
                yield KeyTile(start, min(start + K, Lk), self._dense)
            return
        touched: set[int] = set()
        whole: set[int] | None = None
        for per_tile in self._ranges:
            for seen, full in per_tile[tile]:
                mine: set[int] = set()
                for start, stop in zip(seen[::2], seen[1::2], strict=True):
                    touched.update(range(start // K, -(-stop // K)))
                for start, stop in zip(full[::2], full[1::2], strict=True):
                    mine.update(range(-(-start // K), -(-stop // K) if stop >= Lk else stop // K))
                whole = mine if whole is None else whole & mine
        for index in sorted(touched):
            yield KeyTile(index * K, min(index * K + K, Lk), whole is not None and index in whole)


def _rows(start: Tensor, stop: Tensor, count: Tensor) -> list[list[int]]:
    """Ranges as flat lists start, stop, start, stop, … without the padding."""
    pairs = torch.stack((start, stop), -1).flatten(1).tolist()
    return [row[: 2 * n] for row, n in zip(pairs, count.tolist(), strict=True)]


def _runs(line: HeadRow, Lq: int, T: int, any_number: bool = False) -> _Runs | None:
    starts = torch.arange(0, Lq, T, device="cpu")
    if line.positions is None:
        ends = (starts + T).clamp(max=Lq)
        return _Runs(starts + line.offset, ends - 1 + line.offset, starts, starts // T)
    p = line.positions
    breaks = (p[1:] - p[:-1] != 1).nonzero().flatten() + 1
    if not any_number and breaks.numel() > _MAX_RUNS_PER_TILE * starts.numel():
        return None
    starts = torch.cat((starts, breaks)).unique()
    ends = torch.cat((starts[1:], starts.new_tensor([Lq]))) if starts.numel() else starts
    return _Runs(p[starts], p[ends - 1], starts, starts // T)


def count_tiles(mask: Mask | None, lines: Sequence[HeadRow], Lq: int, Lk: int, T: int, K: int) -> TileCount:
    """Count tiles of T queries by K keys over some heads, without a loop over tiles."""
    each = -(-Lq // T) * -(-Lk // K)
    if mask is None:
        return TileCount(each * len(lines), each * len(lines), each * len(lines))
    visible = full = 0
    for line in lines:
        runs, found = _runs(line, Lq, T), (each, 0)
        if runs is not None:
            whole = Rows(runs.first, runs.i_first, line.b, line.h, Lq, Lk, line.Hq)
            found = touched.tiles(mask, whole, runs.last, runs.tile, K)
        visible, full = visible + found[0], full + found[1]
    return TileCount(visible, full, each * len(lines))


def _lines(problem: Problem, positions: Tensor | None) -> tuple[list[HeadRow], int]:
    """The heads that may differ in what they see, and how many are like each of them."""
    p = problem
    batch, heads = (p.B if p.varies_by_batch else min(p.B, 1)), (p.Hq if p.varies_by_head else min(p.Hq, 1))
    lines = [head_row(p, positions, b, h) for b in range(batch) for h in range(heads)]
    return lines, (p.B // batch if batch else 0) * (p.Hq // heads if heads else 0)


def tiles_of(problem: Problem, positions: Tensor | None, tile: tuple[int, int]) -> TileCount:
    """The tiles of a whole call; `positions` are the problem's, where they are data."""
    p = problem
    kept: dict[tuple[int, int], TileCount] = p.__dict__.setdefault("_tiles", {})
    if positions is None and tile in kept:  # a plan says tiles and work, and both come from here
        return kept[tile]
    lines, times = _lines(p, positions)
    found = TileCount(*(times * n for n in count_tiles(p.mask, lines, p.Lq, p.Lk, *tile)))
    if positions is None:
        kept[tile] = found
    return found


def pairs_of(problem: Problem, positions: Tensor | None, look: counts.Look) -> counts.Pairs:
    """Visible pairs of a whole call; `positions` are the problem's, where they are data."""
    p = problem
    if p.mask is None:
        every = p.B * p.Hq * p.Lq * p.Lk
        return counts.Pairs(every, every)
    lines, times = _lines(p, positions)
    kept: counts.Pairs | None = p.__dict__.get("_pairs")
    if positions is None and kept is not None:  # a plan says both these and its work, which is at least that
        look.tell(p.Lq * len(lines))
        return kept
    least = most = 0
    for line in lines:
        runs = _runs(line, p.Lq, max(p.Lq, 1), any_number=True)
        assert runs is not None
        one = counts.pairs(p.mask, *runs[:3], b=line.b, h=line.h, sizes=p.sizes, look=look)
        least, most = least + times * one.least, most + times * one.most
    both = counts.Pairs(least, most)
    if positions is None and both.exact:
        p.__dict__["_pairs"] = both
    return both
