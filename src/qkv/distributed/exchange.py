"""Which keys ranks need of each other, and in which stages they come: planned from the mask, without data or processes.

1. The queries of each rank are cut into tiles, whose visible keys are found by ranges (`Rule.intervals`): a rank needs
   of another the keys that some query of its own may see. Every rank plans for all, and finds the same.
2. Stages say in which order keys arrive. The first is what a rank holds itself; then with "ring" one other rank's keys
   a stage, rank r - t at stage t, and with "allgather" those of all others at once.
3. A stage is computed in pieces: a range of queries that are next to each other, by a range of keys that are.

Whatever ranges cannot say (a mask that is a tensor or a function, positions that jump) is taken as visible: more keys
are moved than needed, never fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.problem import Problem
from qkv.distributed.remembered import remembered
from qkv.distributed.shards import Ranges, Shards, common, merged

_TILES = 64  # tiles of a range of queries: how finely it is known which of them see a range of keys
_SHORTEST = 32  # rows of a tile, at least
LONGEST = 1 << 15  # queries of a piece, about: what a piece returns is there beside what all pieces are joined in
_MOST = 16  # ranges of keys that are moved between two ranks; where there are more, gaps are moved, too
_JUMPS = 4096  # runs of consecutive positions that are looked at one by one


class Piece(NamedTuple):
    """Queries and keys that are computed together, by their numbers in the sequence."""

    queries: tuple[int, int]
    keys: tuple[int, int]


class Stage(NamedTuple):
    """What comes to a rank at once, what it sends meanwhile, each with the other rank, and what it then computes."""

    arrives: tuple[tuple[int, Ranges], ...]
    leaves: tuple[tuple[int, Ranges], ...]
    pieces: tuple[Piece, ...]


class Tiles(NamedTuple):
    """Tiles of queries, in order, and the ranges of keys that each may see."""

    rows: list[tuple[int, int]]
    seen: list[Ranges]


@dataclass(frozen=True)
class Exchange:
    """Who holds which queries and keys, and which keys each rank's queries may see."""

    queries: Shards
    keys: Shards
    tiles: tuple[Tiles, ...]
    """Of each rank."""

    def needed(self, rank: int, of: int) -> Ranges:
        """The keys that `rank` needs of another: some query of its own may see them."""
        found = common(_union(self.tiles[rank].seen), self.keys.ranges[of])
        return _closed(found, self.keys.ranges[of])

    def stages(self, rank: int, method: str) -> tuple[Stage, ...]:
        """What a rank waits for and computes, in order: by "ring", or by "allgather"."""
        key = rank, method
        if key not in self._known:
            self._known[key] = self._stages(rank, method)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, str], tuple[Stage, ...]]:
        return {}

    def _stages(self, rank: int, method: str) -> tuple[Stage, ...]:
        ranks = self.queries.ranks
        own = Stage((), (), self.pieces(rank, self.keys.ranges[rank]))
        others = [(rank - t) % ranks for t in range(1, ranks)]
        to = [(rank + t) % ranks for t in range(1, ranks)]
        turns = [([a], [b]) for a, b in zip(others, to, strict=True)] if method == "ring" else [(others, to)]
        found = [own]
        for sources, targets in turns:
            arrives = [(other, self.needed(rank, other)) for other in sources]
            leaves = [(other, self.needed(other, rank)) for other in targets]
            held = merged(sorted(part for _, ranges in arrives for part in ranges))
            stage = Stage(
                tuple((other, ranges) for other, ranges in arrives if ranges),
                tuple((other, ranges) for other, ranges in leaves if ranges),
                self.pieces(rank, held),
            )
            found.append(stage)  # an empty one, too: stages are numbered alike on all ranks, and messages by them
        return tuple(found)

    def pieces(self, rank: int, keys: Ranges) -> tuple[Piece, ...]:
        """The pieces of a rank's queries that see some of these keys, ordered by queries and then by keys."""
        tiles, found = self.tiles[rank], []
        for start, stop in self.queries.ranges[rank]:
            mine = [(rows, seen) for rows, seen in zip(tiles.rows, tiles.seen, strict=True) if start <= rows[0] < stop]
            blocks: dict[int, list[tuple[tuple[int, int], Ranges]]] = {}
            for rows, seen in mine:
                blocks.setdefault((rows[0] - start) // LONGEST, []).append((rows, seen))
            for block in blocks.values():
                for part in keys:
                    seeing = [(rows, common(seen, (part,))) for rows, seen in block]
                    seeing = [(rows, seen) for rows, seen in seeing if seen]
                    if seeing:
                        queries = seeing[0][0][0], seeing[-1][0][1]
                        columns = min(seen[0][0] for _, seen in seeing), max(seen[-1][1] for _, seen in seeing)
                        found.append(Piece(queries, columns))
        return tuple(found)


def exchange(problem: Problem, queries: Shards, keys: Shards, positions: Tensor | None = None) -> Exchange:
    """What ranks need of each other for a call.

    Parameters
    ----------
    problem : Problem
        The whole call: Lq and Lk are all queries and keys.
    queries, keys : Shards
    positions : int64 (B or 1, Lq), optional
        Where each query stands, if the problem's positions are "tensor".

    Returns
    -------
    Exchange
    """
    if positions is not None or problem.mask is None:
        return _found(problem, queries, keys, positions)
    # Of a problem the ranges depend on the mask, positions and sizes alone.
    alike = replace(problem, call="", D=1, Dv=1, scale=1.0, softcap=None, bias=(), has_sinks=False, dropout_p=0.0)
    return _kept(replace(alike, needs_grad=False, needs_lse=False), queries, keys)


@remembered(64)
def _kept(problem: Problem, queries: Shards, keys: Shards) -> Exchange:
    return _found(problem, queries, keys, None)


def _found(problem: Problem, queries: Shards, keys: Shards, positions: Tensor | None) -> Exchange:
    rows = [[tile for part in mine for tile in _tiled(*part)] for mine in queries.ranges]
    flat = [tile for mine in rows for tile in mine]
    seen = _seen(problem, flat, positions)
    tiles, at = [], 0
    for mine in rows:
        tiles.append(Tiles(mine, seen[at : at + len(mine)]))
        at += len(mine)
    return Exchange(queries, keys, tuple(tiles))


def _tiled(start: int, stop: int) -> list[tuple[int, int]]:
    step = max(-(-(stop - start) // _TILES), _SHORTEST)
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


def _seen(problem: Problem, tiles: list[tuple[int, int]], positions: Tensor | None) -> list[Ranges]:
    """The keys that each tile of queries may see in some batch row and head."""
    p, every = problem, merged([(0, problem.Lk)])
    if p.mask is None or not tiles or not p.B or not p.Hq:
        return [every if p.B and p.Hq else () for _ in tiles]
    found: list[list[tuple[int, int]]] = [[] for _ in tiles]
    for b in range(p.B if p.varies_by_batch else 1):
        runs = _runs(p, tiles, positions, b)
        if runs is None:
            return [every for _ in tiles]
        first, last, index, owner = runs
        for h in range(p.Hq if p.varies_by_head else 1):
            got = p.mask.intervals(first, last, b=b, h=h, Lk=p.Lk, Lq=p.Lq, i_first=index, Hq=p.Hq)
            start, stop = got.visible_start.tolist(), got.visible_stop.tolist()
            for t, mine, ends, count in zip(owner, start, stop, got.visible_count.tolist(), strict=True):
                found[t] += zip(mine[:count], ends[:count], strict=True)
    return [merged(sorted(parts)) for parts in found]


def _runs(
    problem: Problem, tiles: list[tuple[int, int]], positions: Tensor | None, b: int
) -> tuple[Tensor, Tensor, Tensor, list[int]] | None:
    """Tiles of one batch row as runs of consecutive positions: first and last position, first index, tile number."""
    start, stop = torch.tensor(tiles, dtype=torch.int64, device="cpu").t().contiguous()
    if positions is None:
        offset = problem.offset(b)
        return start + offset, stop - 1 + offset, start, list(range(len(tiles)))
    p = positions[min(b, positions.shape[0] - 1)].to("cpu")
    breaks = (p[1:] - p[:-1] != 1).nonzero().flatten() + 1
    if breaks.numel() > _JUMPS:
        return None
    # Every tile, and every break inside of one, begins a run. Tiles of a rank's several ranges are not in order.
    start, order = start.sort()
    stop = stop[order]
    owner = torch.searchsorted(start, breaks, right=True) - 1
    inside = (owner >= 0) & (breaks < stop[owner.clamp(min=0)])
    begin = torch.cat([start, breaks[inside]])
    number = torch.cat([torch.arange(len(tiles), device="cpu"), owner[inside]])
    begin, places = begin.sort(stable=True)
    number = number[places]
    keep = torch.ones_like(begin, dtype=torch.bool)
    keep[:-1] = begin[1:] != begin[:-1]
    begin, number = begin[keep], number[keep]
    end = torch.minimum(torch.cat([begin[1:], stop[-1:]]), stop[number])
    return p[begin], p[end - 1], begin, order[number].tolist()


def _union(parts: Sequence[Ranges]) -> Ranges:
    return merged(sorted(part for ranges in parts for part in ranges))


def _closed(found: Ranges, within: Ranges) -> Ranges:
    """At most `_MOST` ranges, the smallest gaps filled where there are more; no gap that `within` has is."""
    if len(found) <= _MOST:
        return found
    gaps = []
    for n, ((_, stop), (start, _)) in enumerate(pairwise(found)):
        filled = common(((stop, start),), within) == ((stop, start),)
        gaps.append((start - stop, n) if filled else (1 << 62, n))
    fill = {n for size, n in sorted(gaps)[: len(found) - _MOST] if size < 1 << 62}
    whole: list[tuple[int, int]] = [found[0]]
    for n, part in enumerate(found[1:]):
        if n in fill:
            whole[-1] = (whole[-1][0], part[1])
        else:
            whole.append(part)
    return tuple(whole)
