"""How much of a call's work lies where, and which keys ranks lack: from a mask's ranges, for any number of ranks.

Nothing here loops over rows or over pairs of ranks. Work is counted between chosen rows (`Profile`) and in cells of
queries by keys (`cells`); what ranks lack is the union of their queries' visible ranges without what they hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.masks import Mask, Sizes, Tile
from qkv.masks.counts import grid

_CUTS = 1 << 16  # places where a mask changes its form that are remembered
_LOOK = 1 << 20  # pairs that are looked at one by one, where ranges do not say what is visible


class Sight(NamedTuple):
    """What decides which pairs there are: the mask, sizes, and where queries stand."""

    mask: Mask | None
    B: int
    Hq: int
    Lq: int
    Lk: int
    firsts: tuple[int, ...] = (0,)
    """The position of query 0: one, or one a batch row."""
    some: tuple[int, int] | None = None
    """The heads that count, if not all."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.B, self.Hq, self.Lq, self.Lk)

    @property
    def many(self) -> int:
        """Heads that count, over all batch rows."""
        start, stop = self.some or (0, self.Hq)
        return self.B * (stop - start)

    def first(self, b: int) -> int:
        """The position of query 0 in a batch row."""
        return self.firsts[b if len(self.firsts) > 1 else 0]

    def heads(self) -> Iterator[tuple[int, int, int]]:
        """(batch row, head, how many are like it) for those that may see other keys."""
        if self.mask is None or not self.many:
            return
        start, stop = self.some or (0, self.Hq)
        batch = self.B if self.mask.varies_by_batch or len(self.firsts) > 1 else 1
        alike = stop - start if not self.mask.varies_by_head else 1
        yield from ((b, h, self.B // batch * alike) for b in range(batch) for h in range(start, stop, alike))


class Counted(NamedTuple):
    """Pairs in each cell, and whether they were counted; else they are what ranges allow, at most."""

    pairs: Tensor
    exact: bool


def cells(sight: Sight, queries: Tensor, keys: Tensor, rows: Tensor | None = None) -> Counted:
    """Visible pairs over all batch rows and heads in each cell of ranges of queries by keys.

    Parameters
    ----------
    sight : Sight
    queries : int64 (2, R)
        Where ranges start, in ascending order, and stop.
    keys : int64 (C + 1,)
        From 0 to Lk, ascending: column c has keys[c] .. keys[c + 1].
    rows : int64 (G,), optional
        Where each row of cells begins, if ranges share rows of cells.

    Returns
    -------
    Counted
        Of int64 (R or G, C).
    """
    start, stop = queries
    rows = start if rows is None else rows
    total = torch.zeros(rows.numel(), keys.numel() - 1, dtype=torch.int64, device="cpu")
    if sight.mask is None:
        owner = torch.searchsorted(rows, start, right=True) - 1
        high = torch.zeros_like(rows).index_add_(0, owner, stop - start)
        return Counted(high[:, None] * keys.diff() * sight.many, True)
    some, exact = stop > start, True
    start, stop = start[some], stop[some]
    for b, h, times in sight.heads():
        where = (start + sight.first(b), stop - 1 + sight.first(b), start)
        found = grid(sight.mask, *where, b=b, h=h, sizes=sight.sizes, rows=rows, keys=keys)
        if found is None and sight.Lq * sight.Lk <= _LOOK:
            found = _looked_at(sight, start, stop, rows, keys, b, h)
        if found is None:
            found = grid(sight.mask, *where, b=b, h=h, sizes=sight.sizes, rows=rows, keys=keys, most=True)
            exact = False
        assert found is not None
        total += times * found
    return Counted(total, exact)


def _looked_at(sight: Sight, start: Tensor, stop: Tensor, rows: Tensor, keys: Tensor, b: int, h: int) -> Tensor:
    """`cells` of one head by looking at each pair."""
    assert sight.mask is not None
    out = torch.zeros(rows.numel(), keys.numel() - 1, dtype=torch.int64, device="cpu")
    device = sight.mask._device()
    at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (b, h))
    column = torch.searchsorted(keys, torch.arange(sight.Lk, device="cpu"), right=True) - 1
    for first, last in zip(start.tolist(), stop.tolist(), strict=True):
        i = torch.arange(first, last, device=device)[:, None]
        j = torch.arange(sight.Lk, device=device)[None]
        seen = sight.mask.visible(Tile.pairs(at_b, at_h, i, i + sight.first(b), j), sight.sizes)
        each = seen.expand(last - first, sight.Lk).sum(0).cpu()
        owner = bisect_right(rows.tolist(), first) - 1
        out[owner].index_add_(0, column.clamp(max=out.shape[1] - 1), each)
    return out


@dataclass(frozen=True, eq=False)
class Profile:
    """Visible pairs before each of some rows, over all batch rows and heads; between two of them they grow evenly."""

    edges: Tensor  # int64, from 0 to Lq, ascending
    before: Tensor  # int64: pairs of the queries below each edge
    marks: Tensor  # int64: rows where the mask changes its form, such as where documents begin
    exact: bool

    @cached_property
    def total(self) -> int:
        return int(self.before[-1])

    @cached_property
    def _lists(self) -> tuple[list[int], list[int]]:
        return self.edges.tolist(), self.before.tolist()

    def upto(self, x: Tensor) -> Tensor:
        """Pairs of the queries below x: float64, exact at edges."""
        at = (torch.searchsorted(self.edges, x, right=True) - 1).clamp(0, max(self.edges.numel() - 2, 0))
        if self.edges.numel() < 2:
            return torch.zeros_like(x, dtype=torch.float64)
        low, high = self.edges[at], self.edges[at + 1]
        share = (x - low).double() / (high - low).double()
        return self.before[at].double() + share * (self.before[at + 1] - self.before[at]).double()

    def at(self, x: int) -> float:
        """`upto` of one row."""
        edges, before = self._lists
        n = min(max(bisect_right(edges, x) - 1, 0), len(edges) - 2)
        if n < 0:
            return 0.0
        low, high = edges[n], edges[n + 1]
        return before[n] + (x - low) / (high - low) * (before[n + 1] - before[n])

    def row(self, pairs: float) -> int:
        """The row below which so many pairs are, about."""
        edges, before = self._lists
        n = min(max(bisect_right(before, pairs) - 1, 0), len(edges) - 2)
        if n < 0:
            return 0
        more = before[n + 1] - before[n]
        share = (pairs - before[n]) / more if more else 0.0
        return edges[n] + round(min(max(share, 0.0), 1.0) * (edges[n + 1] - edges[n]))


def profile(sight: Sight, blocks: int) -> Profile:
    """How work grows along the queries: counted at about `blocks` rows, and wherever the mask changes its form."""
    step = max(1, -(-sight.Lq // max(blocks, 1)))
    marks = _marks(sight)
    edges = torch.arange(0, sight.Lq, step, device="cpu")
    edges = torch.cat((edges, marks, edges.new_tensor([0, sight.Lq]))).unique()
    keys = edges.new_tensor([0, sight.Lk])
    each = cells(sight, torch.stack((edges[:-1], edges[1:])), keys)
    before = torch.nn.functional.pad(each.pairs[:, 0].cumsum(0), (1, 0))
    return Profile(edges, before, marks, each.exact)


def _marks(sight: Sight) -> Tensor:
    """The rows between 0 and Lq where a mask's ranges change their form; none of a mask that has too many."""
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    found = [none]
    for b, h, _ in sight.heads():
        assert sight.mask is not None
        for leaf in dict.fromkeys(sight.mask._leaves(h)):
            cuts = leaf._cuts(b)
            if cuts is None or cuts.optional:
                continue
            first = 0 if cuts.by_index else sight.first(b)
            if cuts.at is not None:
                found.append(cuts.at - first)
            elif sight.Lq // cuts.period <= _CUTS:
                found.append(
                    torch.arange(-(-first // cuts.period), (first + sight.Lq) // cuts.period + 1, device="cpu")
                )
                found[-1] = found[-1] * cuts.period - first
    at = torch.cat(found)
    at = at[(at > 0) & (at < sight.Lq)].unique()
    return at if at.numel() <= _CUTS else none


class Owned(NamedTuple):
    """Ranges of rows and who holds each: int64 (N,), ordered by rank and start."""

    start: Tensor
    stop: Tensor
    rank: Tensor


def owned(ranges: Sequence[Sequence[tuple[int, int]]]) -> Owned:
    """What ranks hold, as tensors."""
    flat = [(start, stop, rank) for rank, mine in enumerate(ranges) for start, stop in mine]
    table = torch.tensor(flat, dtype=torch.int64, device="cpu").view(-1, 3)
    return Owned(*table.T.contiguous())


def visible(sight: Sight, queries: Owned) -> Owned:
    """The ranges of keys that some query of a rank may see: of each rank disjoint and in order."""
    every = torch.zeros_like(queries.start)
    if not sight.many or not sight.Lk:
        return Owned(*(x[:0] for x in queries))
    if sight.mask is None:
        return _union(Owned(every, every + sight.Lk, queries.rank), sight.Lk)
    parts = [Owned(*(x[:0] for x in queries))]
    for b, h, _ in sight.heads():
        where = queries.start + sight.first(b), queries.stop - 1 + sight.first(b)
        got = sight.mask.intervals(*where, b=b, h=h, Lk=sight.Lk, Lq=sight.Lq, i_first=queries.start, Hq=sight.Hq)
        some = torch.arange(got.visible_start.shape[1], device="cpu") < got.visible_count[:, None]
        owner = queries.rank[:, None].expand(some.shape)
        parts.append(Owned(*(x.masked_select(some) for x in (got.visible_start, got.visible_stop, owner))))
    return _union(Owned(*(torch.cat(x) for x in zip(*parts, strict=True))), sight.Lk)


def _union(parts: Owned, length: int) -> Owned:
    """The same rows of each rank as disjoint ranges in order."""
    if not parts.start.numel():
        return parts
    # Ranks stand one after the other with a gap of one row, so that one sweep merges all.
    base = parts.rank * (length + 1)
    start, order = (parts.start + base).sort()
    stop = (parts.stop + base)[order]
    reach = stop.cummax(0).values
    fresh = torch.nn.functional.pad(start[1:] > reach[:-1], (1, 0), value=True)
    ended = torch.nn.functional.pad(fresh[1:], (0, 1), value=True)
    start, stop = start[fresh], reach[ended]
    rank = start.div(length + 1, rounding_mode="floor")
    return Owned(start - rank * (length + 1), stop - rank * (length + 1), rank)


def lacking(seen: Owned, held: Owned, ranks: int, length: int) -> Tensor:
    """How many rows that a rank sees it does not hold: int64 (ranks,)."""
    both = _union(Owned(*(torch.cat(x) for x in zip(seen, held, strict=True))), length)
    return _rows(both, ranks) - _rows(held, ranks)


def _rows(parts: Owned, ranks: int) -> Tensor:
    return torch.zeros(ranks, dtype=torch.int64, device="cpu").index_add_(0, parts.rank, parts.stop - parts.start)
