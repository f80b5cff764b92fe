"""How much a mask leaves, without looking at single rows: visible pairs.

They come from the pieces of `intervals`, within which every end stands still or moves by one key a row:

* a cell of R rows whose ends are lo + s r and hi + t r has R (hi - lo) + (t - s) R (R - 1) / 2 pairs;
* what a mask sees of a cell by the remainder of p - j (strided, dilated) has a period: its sum over the first x
  distances is q times that of a period and a rest, and so is the sum of these sums over rows.

A mask without ranges (a tensor, a function) is looked at where the ranges of the others leave it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks import patches, touched
from qkv.masks.intervals import Rows, cells, cuts_of
from qkv.masks.rule import Rule
from qkv.masks.tile import Sizes, Tile
from qkv.masks.touched import Keys, representatives

_CUTS = 1 << 15  # pieces that are thought about at once
_PERIOD = 1 << 20  # the longest period that is tabulated
_AT_ONCE = 1 << 22  # pairs that are looked at at once
_FEW = 64  # pieces that are not divided further
_COLUMNS = 32  # of a grid; where it has more, fewer pieces are thought about at once
_BITS = 60  # masks of an expression that a code has room for


class Pairs(NamedTuple):
    """Visible pairs of query and key: at least, and at most; equal where they were counted."""

    least: int
    most: int

    @property
    def exact(self) -> bool:
        return self.least == self.most


class Look:
    """How many pairs may be looked at where ranges do not say what is visible; and who is told of rows counted."""

    def __init__(self, pairs: int, tell: Callable[[int], None] = lambda rows: None) -> None:
        self.left, self.tell = pairs, tell


def pairs(
    mask: Any, first: Tensor, last: Tensor, i_first: Tensor, *, b: int, h: int, sizes: Sizes, look: Look
) -> Pairs:
    """Visible pairs of runs of queries at consecutive positions, as `Rule.intervals` takes them.

    Exact for all masks whose keys follow from ranges and remainders; of a tensor or a function as long as not more
    pairs than `look` allows have to be looked at: then the bounds that the other masks give.
    """
    some = last >= first
    first, last, i_first = first[some], last[some], i_first[some]
    leaves, least, most = list(dict.fromkeys(mask._leaves(h))), 0, 0
    if (alike := _alike(mask, leaves, Rows(first, i_first, b, h, sizes.Lq, sizes.Lk, sizes.Hq), last)) is not None:
        look.tell(int((last - first + 1).sum()))
        (first, i_first, *_), last, weight = alike
        silent = Look(0)
        for twice in weight.unique().tolist():
            own = weight == twice
            found = pairs(mask, first[own], last[own], i_first[own], b=b, h=h, sizes=sizes, look=silent)
            least += twice * found.least
        return Pairs(least // 2, least // 2)
    if (apart := _pairs_apart(mask, first, last, i_first, b, h, sizes)) is not None:
        look.tell(int((last - first + 1).sum()))
        return Pairs(apart, apart)
    for part in _portions(first, last, i_first, -(-_pieces(leaves, first, last, i_first, b) // _CUTS)):
        found = _Portion(mask, leaves, *part, b, h, sizes).count(look)
        least, most = least + found.least, most + found.most
        look.tell(int((part[1] - part[0] + 1).sum()))
    return Pairs(least, most)


def _pairs_apart(mask: Any, first: Tensor, last: Tensor, i_first: Tensor, b: int, h: int, sizes: Sizes) -> int | None:
    """Visible pairs of one run, of an expression with a mask of blocks: most of its blocks count for themselves."""
    if first.numel() != 1:
        return None
    rows = int(last - first) + 1
    found = patches.find(mask, Rows(first, i_first, b, h, sizes.Lq, sizes.Lk, sizes.Hq), rows, None, rows)
    if found is None or not found.apart:
        return None
    without, total, silent = patches.without(mask, b, h), found.pairs, Look(0)
    total += pairs(without, first, last, i_first, b=b, h=h, sizes=sizes, look=silent).least
    for sign, of in ((1, mask), (-1, without)):
        some = pairs(
            of, first + found.x0, first + (found.x1 - 1), i_first + found.x0, b=b, h=h, sizes=sizes, look=silent
        )
        total += sign * some.least
    return total


def _alike(mask: Any, leaves: list[Any], whole: Rows, last: Tensor) -> tuple[Rows, Tensor, Tensor] | None:
    """Runs that stand for one run, and twice how many each stands for, where a form comes back every few rows.

    They are as long as all forms together take to come back, and so see as many pairs as others, or evenly more.
    """
    cuts, periods = [leaf._cuts(whole.b) for leaf in leaves], [leaf._period() for leaf in leaves]
    steps = [c.period for c in cuts if c is not None and c.period and not c.optional]
    if last.numel() != 1 or not steps:
        return None
    rows, every = int(last - whole.p) + 1, math.lcm(*steps, *(p[0] for p in periods if p is not None))
    if rows < touched.MANY * every:
        return None
    start = torch.arange(0, rows, every, device="cpu")
    runs = whole._replace(p=whole.p + start, i=whole.i + start)
    ends = (runs.p + (every - 1)).clamp(max=int(last))
    plain = [leaf for leaf, p in zip(leaves, periods, strict=True) if p is None]
    sure = all(s.exact is True for s in (leaf._spans(runs._replace(p=runs.p[:1], i=runs.i[:1])) for leaf in plain))
    chosen = representatives(mask, runs, ends, 1) if sure else None
    if chosen is None:
        return None
    number, weight = chosen
    return runs._replace(p=runs.p[number], i=runs.i[number]), ends[number], weight


def grid(
    mask: Rule,
    first: Tensor,
    last: Tensor,
    i_first: Tensor,
    *,
    b: int,
    h: int,
    sizes: Sizes,
    rows: Tensor,
    keys: Tensor,
    most: bool = False,
) -> Tensor | None:
    """Visible pairs in each cell of queries by keys, int64 (rows, columns); None where they are not known.

    Row r of cells begins with query `rows[r]`, in which runs begin where it does not go on; column c has the keys from
    `keys[c]` to `keys[c + 1]`, from 0 to Lk. `most`: pairs that may be visible count where it is not known.
    """
    out = torch.zeros(rows.numel(), keys.numel() - 1, dtype=torch.int64, device="cpu")
    leaves = list(dict.fromkeys(mask._leaves(h)))
    pieces = _pieces(leaves, first, last, i_first, b) * max(1, keys.numel() // _COLUMNS)
    for part in _portions(first, last, i_first, -(-pieces // _CUTS)):
        if not _Portion(mask, leaves, *part, b, h, sizes, keys).scatter(out, rows, most):
            return None
    return out


def counted_cells(mask: Rule, line: Tensor, *, b: int, h: int, sizes: Sizes, steps: tuple[int, int]) -> Tensor | None:
    """0, 1 or 2 for each cell of `steps` queries by keys: none, some or all of it visible; `line`: all positions.

    None where that is not known without looking at pairs.
    """
    breaks = (line[1:] - line[:-1] != 1).nonzero().flatten() + 1
    rows, columns = (torch.arange(0, n, step, device="cpu") for n, step in zip(sizes[2:4], steps, strict=True))
    starts = torch.cat((rows, breaks)).unique()
    ends, keys = torch.cat((starts[1:], starts.new_tensor([sizes.Lq]))) - 1, _closed(columns, sizes.Lk)
    found = grid(mask, line[starts], line[ends], starts, b=b, h=h, sizes=sizes, rows=rows, keys=keys)
    if found is None:
        return None
    high, wide = _closed(rows, sizes.Lq).diff(), keys.diff()
    return (found > 0).to(torch.uint8) + (found == high[:, None] * wide).to(torch.uint8)


def _closed(starts: Tensor, end: int) -> Tensor:
    return torch.cat((starts, starts.new_tensor([end])))


def _pieces(leaves: list[Any], first: Tensor, last: Tensor, i_first: Tensor, b: int) -> int:
    """About how many pieces the runs are cut into."""
    rows, cuts = int((last - first + 1).sum()), [leaf._cuts(b) for leaf in leaves]
    each = [cuts_of(c, i_first if c.by_index else first, last - first + 1, rows) for c in cuts if c is not None]
    return first.numel() + sum(c[0].numel() for c in each if c is not None)


def _portions(first: Tensor, last: Tensor, i_first: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs divided into about equal numbers of rows."""
    if parts <= 1:
        yield first, last, i_first
        return
    size = last - first + 1
    line, rows = size.cumsum(0) - size, int(size.sum())
    step = -(-rows // parts)
    for begin in range(0, rows, step):
        inside = (line + size > begin) & (line < begin + step)
        before = (begin - line[inside]).clamp(min=0)
        after = (line[inside] + size[inside] - begin - step).clamp(min=0)
        yield first[inside] + before, last[inside] - after, i_first[inside] + before


class _Portion:
    """Some runs of queries of one head, divided into cells."""

    def __init__(
        self,
        mask: Rule,
        leaves: list[Any],
        first: Tensor,
        last: Tensor,
        i_first: Tensor,
        b: int,
        h: int,
        sizes: Sizes,
        keys: Tensor | None = None,
    ) -> None:
        self.mask, self.leaves, self.b, self.h, self.sizes = mask, leaves, b, h, sizes
        self.runs, self.rows = (first, last, i_first), int((last - first + 1).sum())
        self.keys = keys
        of = [*leaves, Keys(sizes.Lk, keys)]
        whole = Rows(first, i_first, b, h, sizes.Lq, sizes.Lk, sizes.Hq)
        self.cells = cells(of, whole, last, limit=self.rows)
        self.p, self.i = (start[self.cells.stretch] + self.cells.row for start in (first, i_first))
        self.known = {leaf: self.cells.inside(n) for n, leaf in enumerate(leaves)}
        self.real = self.cells.inside(len(leaves))[0] & self.cells.real
        self.bounds = self.cells.bounds
        vague = [leaf for leaf, spans in zip(leaves, self.cells.spans, strict=False) if spans.exact is not True]
        self.periods: dict[Any, tuple[int, int]] = {
            leaf: period for leaf in vague if (period := leaf._period()) is not None
        }
        self.vague = [leaf for leaf in vague if leaf not in self.periods]

    def count(self, look: Look) -> Pairs:
        """Visible pairs, looked at where they do not follow from ranges."""
        if self._vast:
            return self._halved(look)
        known = self._each()
        if known is not None:
            return Pairs(int(known.sum()), int(known.sum()))
        may, must = self.mask._decide(self.h, self.known)
        least, unsure = self._size(must & self.real), may & ~must & self.real
        boxes = self._boxes(unsure)
        cost = sum(rows * (hi - lo) for _, rows, lo, hi, *_ in boxes)
        if cost > look.left:
            return Pairs(least, least + self._size(unsure))
        look.left -= cost
        least += sum(self._seen(*box) for box in boxes)
        return Pairs(least, least)

    @property
    def _vast(self) -> bool:
        """Whether a mask has more ranges than are told for all rows at once."""
        return self.cells.rows.numel() > _FEW and any(leaf._has_ranges for leaf in self.vague)

    def _each(self) -> Tensor | None:
        """Visible pairs of each cell that is real; None where the mask has to be looked at."""
        if self.periods and not self.vague and (found := self._periodic()) is not None:
            return found
        may, must = self.mask._decide(self.h, self.known)
        if bool((may & ~must & self.real).any()):
            return None
        return self._sizes().masked_fill(~must, 0).masked_select(self.real)

    def scatter(self, out: Tensor, rows: Tensor, most: bool) -> bool:
        """Add the visible pairs to the cells of a grid whose rows begin at `rows`; False where they are not known."""
        if self._vast:
            b, h, sizes = self.b, self.h, self.sizes
            halves = (
                _Portion(self.mask, self.leaves, *part, b, h, sizes, self.keys) for part in _portions(*self.runs, 2)
            )
            return all(half.scatter(out, rows, most) for half in halves)
        known = self._each()
        if known is None and most:
            may, _ = self.mask._decide(self.h, self.known)
            known = self._sizes().masked_fill(~may, 0).masked_select(self.real)
        if known is not None:
            assert self.keys is not None
            row = torch.searchsorted(rows, self.i, right=True) - 1
            at = torch.searchsorted(self.keys, self.bounds.lo.masked_select(self.real).clamp(min=0), right=True) - 1
            line = row[:, None].expand(self.real.shape).masked_select(self.real) * out.shape[1]
            out.view(-1).index_add_(0, line + at.clamp(max=out.shape[1] - 1), known)
        return known is not None

    def _halved(self, look: Look) -> Pairs:
        halves = [
            _Portion(self.mask, self.leaves, *part, self.b, self.h, self.sizes).count(look)
            for part in _portions(*self.runs, 2)
        ]
        return Pairs(sum(half.least for half in halves), sum(half.most for half in halves))

    def _sizes(self) -> Tensor:
        """Pairs of each cell."""
        rows, to = self.cells.rows[:, None], self.bounds
        return rows * (to.hi - to.lo) + (to.hi_step - to.lo_step) * (rows * (rows - 1)).div(2, rounding_mode="floor")

    def _size(self, chosen: Tensor) -> int:
        """Pairs in the chosen cells."""
        return int(self._sizes().masked_select(chosen).sum())

    def _boxes(self, chosen: Tensor) -> list[tuple[int, ...]]:
        """Of each chosen cell: its piece, rows, the keys of all its rows, its ends at the first row, their steps."""
        piece, cell = chosen.nonzero(as_tuple=True)
        lo, hi, lo_step, hi_step = (x.expand(chosen.shape)[piece, cell] for x in self.bounds)
        rows = self.cells.rows[piece]
        table = (piece, rows, lo, hi + hi_step * (rows - 1), lo, hi, lo_step, hi_step)
        return [tuple(row) for row in torch.stack(table, 1).tolist()]

    def _seen(self, piece: int, rows: int, first: int, last: int, lo: int, hi: int, lo_step: int, hi_step: int) -> int:
        """Visible pairs of one cell, by looking at each."""
        device, found = self.mask._device(), 0
        at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (self.b, self.h))
        p, i = int(self.p[piece]), int(self.i[piece])
        for left in range(first, last, _AT_ONCE):
            j = torch.arange(left, min(left + _AT_ONCE, last), device=device)
            step = max(1, _AT_ONCE // j.numel())
            for begin in range(0, rows, step):
                row = torch.arange(begin, min(begin + step, rows), device=device)[:, None]
                seen = self.mask.visible(Tile.pairs(at_b, at_h, i + row, p + row, j), self.sizes)
                found += int((seen & (j >= lo + lo_step * row) & (j < hi + hi_step * row)).sum())
        return found

    def _periodic(self) -> Tensor | None:
        """Visible pairs of each real cell, from ranges and remainders of p - j; None if the period is too long."""
        N = math.lcm(*(n for n, _ in self.periods.values()))
        code = torch.zeros(self.real.shape, dtype=torch.int64, device="cpu")
        for n, leaf in enumerate(self.leaves):
            code |= self.known[leaf][0].to(torch.int64) << n
        kinds, kind = code.masked_select(self.real).unique(return_inverse=True)
        if kinds.numel() * N > _PERIOD or len(self.leaves) > _BITS:
            return None
        remainder, known = torch.arange(N, device="cpu"), {}
        for n, leaf in enumerate(self.leaves):
            inside = ((kinds >> n) & 1).bool()[:, None].expand(-1, N)
            if leaf in self.periods:
                period, rest = self.periods[leaf]
                inside = inside & (remainder % period == rest)
            known[leaf] = inside, inside
        sums = _Sums(self.mask._decide(self.h, known)[0].expand(kinds.numel(), N), kind)
        rows, p = (x[:, None].expand(self.real.shape).masked_select(self.real) for x in (self.cells.rows, self.p))
        total = torch.zeros_like(rows)
        for end, step, sign in ((self.bounds.lo, self.bounds.lo_step, 1), (self.bounds.hi, self.bounds.hi_step, -1)):
            distance = p + 1 - end.masked_select(self.real)
            still = step.expand(self.real.shape).masked_select(self.real) == 0  # then the distance grows with each row
            many = torch.where(still, sums.of_sums(distance + rows) - sums.of_sums(distance), rows * sums(distance))
            total += sign * many
        return total


class _Sums:
    """Sums of functions of period N, one of K a distance: over distances below x, and of these sums below x.

    All in the integers modulo 2**64, whose differences are right as long as the counts are below 2**63.
    """

    def __init__(self, function: Tensor, kind: Tensor) -> None:
        pad = torch.nn.functional.pad
        self.N, self.kind = function.shape[1], kind
        self.once = pad(function.to(torch.int64).cumsum(1), (1, 0))
        self.twice = pad(self.once[:, :-1].cumsum(1), (1, 0))

    def __call__(self, x: Tensor) -> Tensor:
        q = x.div(self.N, rounding_mode="floor")
        return q * self.once[self.kind, self.N] + self.once[self.kind, x - q * self.N]

    def of_sums(self, x: Tensor) -> Tensor:
        """Sum over y < x of the sum over distances below y."""
        q = x.div(self.N, rounding_mode="floor")
        rest, every = x - q * self.N, self.once[self.kind, self.N]
        even = q % 2 == 0
        triangle = torch.where(even, q.div(2, rounding_mode="floor"), q) * torch.where(
            even, q - 1, (q - 1).div(2, rounding_mode="floor")
        )
        return (
            every * self.N * triangle + q * self.twice[self.kind, self.N] + rest * q * every
            + self.twice[self.kind, rest]
        )  # fmt: skip
