"""Which keys a tile of queries can see: the ranges a kernel has to visit, found without looking at any single row.

A tile is a run of queries at consecutive positions. For one query most masks see a few ranges of keys whose ends either
stand still or move with the position: causal sees [-inf, p + 1), a document [its first key, its last key + 1). So

1. cut the tiles into pieces where an end changes its form (a document begins, a chunk ends) or where an end that moves
   crosses one that stands still: within a piece the order of all ends is fixed;
2. the sorted ends divide the keys of a piece into cells, and each cell is wholly inside or outside each range: evaluate
   the mask once a cell, with `may` (some key might be visible) and `must` (all are) for masks that are only bounded;
3. over the rows of a piece a cell [lo, hi) covers [lo of the first row, hi of the last): the visible keys of a tile are
   the union of its cells that may be visible, the full ones the complement of the union of those that may be hidden.

The result is exact where every mask in the expression is. Cost and memory go with the number of pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Stands for an unbounded end. Twice this plus any position still fits int64.
INFINITE = 2**60
# A bound on (pieces x ranges) of the masks that are allowed to answer conservatively: 64 MB of ends at most.
BUDGET = 2**20


class Intervals(NamedTuple):
    """The key ranges of T query tiles, int64; range r of tile t is [start[t, r], stop[t, r]) for r < count[t].

    visible_* : the keys that some row of the tile sees; what is outside all of them is EMPTY
    full_*    : the keys that every row of the tile sees
    Ranges are sorted, disjoint, not empty and do not touch; unused entries are 0.
    """

    visible_start: Tensor
    visible_stop: Tensor
    visible_count: Tensor
    full_start: Tensor
    full_stop: Tensor
    full_count: Tensor


class Cuts(NamedTuple):
    """The positions (or query indices) at which the ends of a mask's ranges change their form."""

    at: Tensor | None = None  # sorted int64, or
    period: int = 0  # every one that is a multiple of this when `shift` is added
    by_index: bool = False
    optional: bool = False  # may be left out, at the price of exactness, where there are too many
    shift: int = 0


class Rows(NamedTuple):
    """The first row of each of N pieces, all of one batch row."""

    p: Tensor  # (N,) its position
    i: Tensor  # (N,) its query index
    b: int
    h: int
    Lq: int
    Lk: int
    Hq: int | None = None  # where lists are shared by heads, it says by how many


class Spans(NamedTuple):
    """The K ranges [lo, hi) that a mask sees from the first row of each piece; both (N or 1, K), sorted along K."""

    lo: Tensor
    hi: Tensor
    lo_moves: bool = False  # the end moves by one key with each row
    hi_moves: bool = False
    exact: bool | Tensor = True  # False: keys inside may be hidden, keys outside are; a tensor is (N, 1)


class Expression(Protocol):
    """What this file needs to know of a mask."""

    def _leaves(self, h: int) -> list[Any]: ...

    def _decide(self, h: int, known: dict[Any, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]: ...


def column(value: int) -> Tensor:
    """One end that is the same in all pieces."""
    return torch.full((1, 1), value, dtype=torch.int64, device="cpu")


def anything() -> Spans:
    """Every key may be visible; none is known to be."""
    return Spans(column(-INFINITE), column(INFINITE), exact=False)


def groups(starts: Tensor, stops: Tensor, begin: Tensor, end: Tensor) -> Spans:
    """For each piece the ranges number begin..end-1 of a list; their hull, not exact, where that is too many."""
    if starts.numel() == 0 or begin.numel() == 0:
        return Spans(column(0), column(0))
    most = int((end - begin).max())
    some = end > begin
    if most <= 1 or begin.numel() * most > BUDGET:
        last = starts.numel() - 1
        lo = torch.where(some, starts[begin.clamp(max=last)], 0)[:, None]
        hi = torch.where(some, stops[(end - 1).clamp(min=0)], 0)[:, None]
        return Spans(lo, hi, exact=most <= 1)
    index = begin[:, None] + torch.arange(most, device="cpu")
    inside = index < end[:, None]
    index = index.clamp(max=starts.numel() - 1)
    return Spans(torch.where(inside, starts[index], INFINITE), torch.where(inside, stops[index], INFINITE))


def compute(
    mask: Expression,
    first: Tensor,
    last: Tensor,
    i_first: Tensor,
    *,
    b: int,
    h: int,
    Lq: int,
    Lk: int,
    Hq: int | None = None,
) -> Intervals:
    """The intervals of `mask` for tiles at positions first..last (inclusive), whose first queries are i_first."""
    tiles, size = first.numel(), last - first + 1
    some = size > 0
    if not bool(some.all()):
        found = compute(mask, first[some], last[some], i_first[some], b=b, h=h, Lq=Lq, Lk=Lk, Hq=Hq)
        return Intervals(*(x.new_zeros((tiles, *x.shape[1:])).index_put((some,), x) for x in found))
    parts = divided(mask, Rows(first, i_first, b, h, Lq, Lk, Hq), last)
    visible = _union(parts.pieces.visible, parts, tiles, Lk)
    return Intervals(*visible, *_complement(*_union(parts.pieces.hidden, parts, tiles, Lk), Lk))


class Parts(NamedTuple):
    """Tiles and pieces both divide the line of all rows: what belongs to one tile and one piece each, in order."""

    pieces: Pieces
    tile: Tensor
    piece: Tensor
    skipped: Tensor  # rows of the piece before the part's first
    rest: Tensor  # rows of the part after its first

    def ends(self, ranges: Ranges, Lk: int) -> tuple[Tensor, Tensor]:
        """Over the rows of each part, where each of the piece's ranges begins and stops: both (parts, R)."""
        lo, hi = ranges.lo[self.piece], ranges.hi[self.piece]
        lo = lo + ranges.lo_step[self.piece] * self.skipped[:, None]
        hi = hi + ranges.hi_step[self.piece] * (self.skipped + self.rest)[:, None]
        return lo.clamp_(0, Lk), hi.clamp_(0, Lk)


def divided(mask: Expression, whole: Rows, last: Tensor, limit: int | None = None) -> Parts:
    """Tiles that have rows, from `whole` to the positions `last`, cut into parts; `limit` of cuts that are optional."""
    first, i_first, *_ = whole
    tiles, size = first.numel(), last - first + 1
    # Tiles that follow one another are one stretch: its pieces, not the tiles, are what has to be thought about.
    begins = (first[1:] != last[:-1] + 1) | (i_first[1:] - i_first[:-1] != size[:-1])
    head = torch.nn.functional.pad(begins, (1, 0), value=True)[:tiles].nonzero()[:, 0]
    line = size.cumsum(0) - size  # where each tile begins if all rows of all tiles stood in one line
    tail = torch.cat([head[1:], head.new_tensor([tiles])]) - 1 if tiles else head
    pieces = _pieces(mask, whole._replace(p=first[head], i=i_first[head]), last[tail], limit or 4 * tiles + 4096)

    start = line[head][pieces.stretch] + pieces.row
    part = line if start.numel() == head.numel() else torch.cat([line, start]).unique()
    tile = torch.searchsorted(line, part, right=True) - 1
    piece = torch.searchsorted(start, part, right=True) - 1
    rest = torch.nn.functional.pad(part[1:], (0, 1), value=int(size.sum())) - part - 1
    return Parts(pieces, tile, piece, part - start[piece], rest)


class Ranges(NamedTuple):
    """For each piece up to R ranges: both ends at its first row, (P, R), and by how much they move with each row."""

    lo: Tensor
    hi: Tensor
    lo_step: Tensor
    hi_step: Tensor


class Pieces(NamedTuple):
    """Pieces in the order of their rows: the stretch and the row in it where each begins, and what its rows see."""

    stretch: Tensor
    row: Tensor
    visible: Ranges
    hidden: Ranges


class Cells(NamedTuple):
    """Pieces as in `Pieces`, and what the ends of all ranges divide their keys into: E ends, E + 1 cells."""

    stretch: Tensor
    row: Tensor
    rows: Tensor  # (P,) of each piece
    spans: list[Spans]  # of each leaf, at the pieces' first rows
    ends: Tensor  # (P, E), sorted
    step: Tensor
    lo_key: Tensor  # (P, E + 1): twice the middle of where a cell begins, which orders it among ends that move
    real: Tensor  # (P, E + 1): whether the cell has a key

    @property
    def bounds(self) -> Ranges:
        """Both ends of every cell."""
        ends, step = self.ends, self.step
        return Ranges(_edged(ends, -INFINITE, 0), _edged(ends, INFINITE, 1), _edged(step, 0, 0), _edged(step, 0, 1))

    def inside(self, leaf: int) -> tuple[Tensor, Tensor]:
        """(may, must): whether each cell is in one of the leaf's ranges, and surely visible."""
        return _inside(self.spans[leaf], self.lo_key, self.rows)


def cells(leaves: Sequence[Any], whole: Rows, last: Tensor, limit: int) -> Cells:
    """Step 1, and the ends of step 2: stretches of rows cut into pieces of one form each."""
    first, i_first, b, *_ = whole
    stretch = torch.arange(first.numel(), device="cpu")
    row, rows = torch.zeros_like(stretch), last - first + 1
    coarse, found = set(), []
    for leaf in leaves:
        cuts = leaf._cuts(b)
        if cuts is None:
            continue
        more = cuts_of(cuts, i_first if cuts.by_index else first, rows, limit)
        if more is None:
            coarse.add(leaf)
        elif more[0].numel():
            found.append(more)
    stretch, row, rows = _cut(rows, found)

    where = whole._replace(p=first[stretch] + row, i=i_first[stretch] + row)
    spans = [anything() if leaf in coarse else leaf._spans(where) for leaf in leaves]
    fixed, moving = _ends(spans, rows.numel())
    crossing = _crossings(fixed, moving, rows)
    if crossing:
        source, inner, rows = _cut(rows, crossing)
        spans = [_follow(s, source, inner[:, None]) for s in spans]
        fixed, moving = fixed[source], moving[source] + inner[:, None]
        stretch, row = stretch[source], row[source] + inner

    ends = torch.cat([fixed, moving], 1)
    step = torch.cat([torch.zeros_like(fixed[:1]), torch.ones_like(moving[:1])], 1).expand_as(ends)
    # Ends never change their order within a piece, so the sum of an end's first and last value sorts them.
    key, order = (2 * ends + step * (rows - 1)[:, None]).sort(1)
    lo_key, hi_key = _edged(key, -2 * INFINITE, 0), _edged(key, 2 * INFINITE, 1)
    return Cells(stretch, row, rows, spans, ends.gather(1, order), step.gather(1, order), lo_key, lo_key < hi_key)


def _pieces(mask: Expression, whole: Rows, last: Tensor, limit: int) -> Pieces:
    """Steps 1 and 2: stretches of rows cut into pieces of one form each, and the mask decided for every cell."""
    leaves = list(dict.fromkeys(mask._leaves(whole.h)))
    found = cells(leaves, whole, last, limit)
    may, must = mask._decide(whole.h, {leaf: found.inside(n) for n, leaf in enumerate(leaves)})
    bounds, real = found.bounds, found.real
    return Pieces(found.stretch, found.row, chosen(may & real, bounds), chosen(~must & real, bounds))


def chosen(cells: Tensor, ends: Ranges) -> Ranges:
    """The chosen cells of each piece, those that touch as one range."""
    before = torch.nn.functional.pad(cells[:, :-1], (1, 0))
    after = torch.nn.functional.pad(cells[:, 1:], (0, 1))
    begins, stops = cells & ~before, cells & ~after
    count = begins.sum(1)
    chosen = ((ends.lo, begins), (ends.hi, stops), (ends.lo_step, begins), (ends.hi_step, stops))
    return Ranges(*(_table(end.masked_select(at), count) for end, at in chosen))


def cuts_of(cuts: Cuts, begin: Tensor, rows: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """(stretch, row) of every cut after a stretch's first row and up to its last; None if there are too many."""
    end = begin + rows - 1
    if cuts.at is not None:
        low, high = torch.searchsorted(cuts.at, torch.stack([begin, end]), right=True)
    else:
        low, high = ((x + cuts.shift).div(cuts.period, rounding_mode="floor") + 1 for x in (begin, end))
    count = high - low
    total = int(count.sum())
    if cuts.optional and total > limit:
        return None
    owner = torch.repeat_interleave(count, output_size=total)
    nth = torch.arange(total, device="cpu") - (count.cumsum(0) - count)[owner] + low[owner]
    return owner, (cuts.at[nth] if cuts.at is not None else nth * cuts.period - cuts.shift) - begin[owner]


def _cut(rows: Tensor, cuts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches of `rows` rows each, cut at (stretch, row): the stretch, first row and number of rows of each piece."""
    whole = torch.arange(rows.numel(), device="cpu")
    if not cuts:
        return whole, torch.zeros_like(whole), rows
    line = rows.cumsum(0) - rows
    start = torch.cat([line, *(line[owner] + row for owner, row in cuts)]).unique()
    owner = torch.searchsorted(line, start, right=True) - 1
    stop = torch.nn.functional.pad(start[1:], (0, 1), value=int(rows.sum()))
    return owner, start - line[owner], stop - start


def _ends(spans: Sequence[Spans], pieces: int) -> tuple[Tensor, Tensor]:
    """All ends of all ranges at the pieces' first rows: those that stand still, and those that move."""
    none = torch.empty((pieces, 0), dtype=torch.int64, device="cpu")
    fixed, moving = [none], [none]
    for s in spans:
        for end, moves in ((s.lo, s.lo_moves), (s.hi, s.hi_moves)):
            if end.numel() == 1 and abs(int(end)) == INFINITE:
                continue  # divides nothing
            (moving if moves else fixed).append(end.expand(pieces, -1))
    return torch.cat(fixed, 1), torch.cat(moving, 1)


def _crossings(fixed: Tensor, moving: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(piece, row within the piece) where an end that moves has just passed one that stands still."""
    found = []
    for m in moving.unbind(1):  # one at a time keeps the memory linear in the number of ends
        passed = fixed - m[:, None] + 1
        piece, end = ((passed > 0) & (passed < rows[:, None])).nonzero(as_tuple=True)
        if piece.numel():
            found.append((piece, passed[piece, end]))
    return found


def _follow(s: Spans, source: Tensor, shift: Tensor) -> Spans:
    """Ranges of pieces that were split: the ends that move have moved by `shift`."""
    pieces = source.numel()
    lo, hi = (e[source] if e.shape[0] > 1 else e.expand(pieces, -1) for e in (s.lo, s.hi))
    exact = s.exact[source] if isinstance(s.exact, Tensor) and s.exact.shape[0] > 1 else s.exact
    return Spans(lo + shift if s.lo_moves else lo, hi + shift if s.hi_moves else hi, s.lo_moves, s.hi_moves, exact)


def _edged(ends: Tensor, value: int, at_end: int) -> Tensor:
    return torch.nn.functional.pad(ends, (0, 1) if at_end else (1, 0), value=value)


def _inside(s: Spans, cell: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(may, must), both (N, cells): is the cell that begins at `cell` inside one of the ranges?"""
    last = (rows - 1)[:, None]
    lo = (2 * s.lo + last if s.lo_moves else 2 * s.lo).expand(cell.shape[0], -1)
    hi = (2 * s.hi + last if s.hi_moves else 2 * s.hi).expand(cell.shape[0], -1)
    if lo.shape[1] == 1:
        may = (lo <= cell) & (cell < hi)
    else:  # ranges are sorted: more have begun than ended
        begun = torch.searchsorted(lo.contiguous(), cell, right=True)
        may = begun > torch.searchsorted(hi.contiguous(), cell, right=True)
    if s.exact is True:
        return may, may
    return may, may & s.exact


def _union(ranges: Ranges, parts: Parts, tiles: int, Lk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step 3, the union of each tile's ranges: start and stop (T, R) and count (T,)."""
    # Tiles stand one after the other with a gap of one key, so that one sweep merges them all.
    base = (parts.tile * (Lk + 1))[:, None]
    lo, hi = parts.ends(ranges, Lk)
    chosen = lo < hi
    start, stop = (lo + base).masked_select(chosen), (hi + base).masked_select(chosen)
    if start.numel() == 0:
        nothing = torch.zeros((tiles, 1), dtype=torch.int64, device="cpu")
        return nothing, nothing.clone(), torch.zeros(tiles, dtype=torch.int64, device="cpu")
    if bool((start[1:] < start[:-1]).any()):
        start, order = start.sort()
        stop = stop[order]
    reach = stop.cummax(0).values
    fresh = torch.nn.functional.pad(start[1:] > reach[:-1], (1, 0), value=True)
    ended = torch.nn.functional.pad(fresh[1:], (0, 1), value=True)
    start, stop = start.masked_select(fresh), reach.masked_select(ended)
    owner = start.div(Lk + 1, rounding_mode="floor")
    count = torch.bincount(owner, minlength=tiles)
    base = owner * (Lk + 1)
    return _table(start - base, count), _table(stop - base, count), count


def _complement(start: Tensor, stop: Tensor, count: Tensor, Lk: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the ranges leave of [0, Lk)."""
    unused = torch.arange(start.shape[1], device="cpu") >= count[:, None]
    begins = torch.nn.functional.pad(stop.masked_fill(unused, Lk), (1, 0))
    ends = torch.nn.functional.pad(start.masked_fill(unused, Lk), (0, 1), value=Lk)
    chosen = begins < ends
    count = chosen.sum(1)
    return _table(begins.masked_select(chosen), count), _table(ends.masked_select(chosen), count), count


def _table(flat: Tensor, count: Tensor) -> Tensor:
    """Rows of `count` values each, from the values of all rows one after the other; 0 where a row has no more."""
    width = max(1, int(count.max()) if count.numel() else 0)
    if flat.numel() == count.numel() * width:
        return flat.view(-1, width)
    out = torch.zeros((count.numel(), width), dtype=torch.int64, device="cpu")
    return out.masked_scatter_(torch.arange(width, device="cpu") < count[:, None], flat)
