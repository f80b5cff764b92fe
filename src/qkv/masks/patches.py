"""Masks of blocks, counted without a thought for each: most blocks that a list adds lie apart from all else.

Of an expression with one mask of blocks in it (drawn, or from a map), `without` is what it sees where no block is
listed. A listed block adds its own pairs and tiles, unless `without` sees something within the same tiles, the rest of
the expression hides a part of it, or another block touches the same tile: such rows of blocks are counted by others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks.intervals import Ranges, Rows, cells, chosen

_TOGETHER = 4  # rows of blocks in a tile, at most
_LEAST = 64  # rows of blocks, for which this pays
_MOST = 4  # tiles, or rows of blocks, for each that others have to count, at least
_FEW = 8  # rows of blocks for each piece of the rest, at least


class Without:
    """An expression as it is where a mask of blocks lists none."""

    def __init__(self, mask: Any, blocks: Any) -> None:
        self.mask, self.blocks = mask, blocks

    def _leaves(self, h: int) -> list[Any]:
        return [leaf for leaf in dict.fromkeys(self.mask._leaves(h)) if leaf != self.blocks]

    def _decide(self, h: int, known: dict[Any, tuple[Tensor, Tensor]], listed: bool = False) -> tuple[Tensor, Tensor]:
        inside = torch.full((1, 1), listed, dtype=torch.bool, device="cpu")
        may, must = self.mask._decide(h, {**known, self.blocks: (inside, inside)})
        return may, must

    def _device(self) -> torch.device:
        device: torch.device = self.mask._device()
        return device


class Patches(NamedTuple):
    """What the blocks of an expression add that count for themselves, and who does not."""

    pairs: int  # in rows of blocks that are not mixed
    x0: Tensor  # of each mixed row of blocks: its first row, counted from the first of all,
    x1: Tensor  # and the one after its last
    apart: bool  # whether most rows of blocks are not mixed
    visible: int  # tiles that are touched, and full, in tiles of queries but `others`
    full: int
    others: Tensor


class _Blocks(NamedTuple):
    """Listed blocks: keys k0..k1, touching tiles t0..t1, of all rows of row of blocks `owner`."""

    x0: Tensor  # of each row of blocks: its first row, counted from the first of all,
    x1: Tensor  # the one after its last,
    mixed: Tensor  # and whether others have to count what it sees
    owner: Tensor
    k0: Tensor
    k1: Tensor
    t0: Tensor
    t1: Tensor

    def counted(self, size: int, T: int, K: int, Lk: int) -> Patches:
        x0, x1, mixed, owner, k0, k1, t0, t1 = self
        rows = int(x1[-1])
        n, a, z = -(-rows // T), x0 // T, (x1 - 1) // T
        one = mixed.to(torch.int64)
        change = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
        others = change.index_add_(0, a, one).index_add_(0, z + 1, -one)[:-1].cumsum(0) > 0
        for d in range(1, (T - 1) // size + 2):
            others[self._meeting(a, z, d)] = True
        before = torch.nn.functional.pad((~others).to(torch.int64).cumsum(0), (1, 0))
        inner, after = (x0 + T - 1) // T, torch.where(x1 == rows, n, x1 // T)
        each = before[z + 1] - before[a], before[torch.maximum(after, inner)] - before[inner], (x1 - x0) * ~mixed
        touching, within, alone = (x[owner] for x in each)
        whole = (torch.where(k1 == Lk, t1, _over(k1, K)) - _over(k0 + (K - 1), K)).clamp_(min=0)
        sums = [int((x * y).sum()) for x, y in ((alone, k1 - k0), (touching, t1 - t0), (within, whole))]
        apart = int(one.sum()) * _MOST <= len(x0) and int(others.sum()) * _MOST <= n
        return Patches(sums[0], x0[mixed], x1[mixed], apart, sums[1], sums[2], others)

    def _meeting(self, a: Tensor, z: Tensor, d: int) -> Tensor:
        """Tiles of queries where a block, and one of the d-th row of blocks after its own, touch one tile of keys."""
        stride = int(self.t1.max()) + 1 if self.t1.numel() else 1
        base = self.owner * stride
        begin, end = base + self.t0, base + self.t1
        begun = torch.searchsorted(begin, end + d * stride)
        met = begun > torch.searchsorted(end, begin + d * stride, right=True)
        owner = self.owner[met]
        tile = z[owner]
        return tile[a[owner + d] == tile]


def find(mask: Any, whole: Rows, rows: int, tile: tuple[int, int] | None, most: int) -> Patches | None:
    """The blocks of an expression over `rows` consecutive rows from `whole`, in tiles; None: in any.

    None where it has not one mask of blocks, of at most so many rows of blocks, or the others have many pieces. What
    was found last is kept.
    """
    where = (int(whole.p), int(whole.i), *whole[2:], rows)
    kept = mask.__dict__.get("_patches")
    if kept is not None and kept[0] == where and tile in (None, kept[1]):
        last: Patches = kept[2]
        return last
    lists = _lists(mask, whole.b, whole.h)
    if len(lists) != 1:
        return None
    cuts = lists[0]._cuts(whole.b)
    size, origin = cuts.period, int(whole.i if cuts.by_index else whole.p) + cuts.shift
    T, K = tile or (size, 1)
    if size == 0 or (T - 1) // size >= _TOGETHER or not _LEAST <= rows // size <= most:
        return None
    blocks = _listed(Without(mask, lists[0]), size, origin, whole, rows, (T, K))
    found = None if blocks is None else blocks.counted(size, T, K, whole.Lk)
    if found is not None:
        object.__setattr__(mask, "_patches", (where, (T, K), found))
    return found


def without(mask: Any, b: int, h: int) -> Without:
    """An expression of which something was found."""
    return Without(mask, _lists(mask, b, h)[0])


def _lists(mask: Any, b: int, h: int) -> list[Any]:
    return [leaf for leaf in dict.fromkeys(mask._leaves(h)) if (cuts := leaf._cuts(b)) is not None and cuts.optional]


def _listed(without: Without, size: int, origin: int, whole: Rows, rows: int, tile: tuple[int, int]) -> _Blocks | None:
    """The blocks that show at all, and which rows of blocks are mixed; rows of blocks count from -origin."""
    (T, K), h, Lk = tile, whole.h, whole.Lk
    first, last = origin // size, (origin + rows - 1) // size
    rest = without._leaves(h)
    found = cells(rest, whole, whole.p + (rows - 1), limit=rows)
    if found.rows.numel() * _FEW > last - first + 1 or any(s.exact is not True for s in found.spans):
        return None
    edge = (torch.arange(first, last + 2, device="cpu") * size - origin).clamp_(0, rows)
    x0, x1 = x = edge[:-1], edge[1:]
    spans = without.blocks._spans(whole._replace(p=whole.p + x0, i=whole.i + x0))
    if spans.exact is not True or spans.lo_moves or spans.hi_moves:
        return None
    k0, k1 = (end.clamp(0, Lk).expand(len(x0), -1) for end in (spans.lo, spans.hi))
    known = {leaf: found.inside(n) for n, leaf in enumerate(rest)}
    seen, (may, must) = without._decide(h, known)[0], without._decide(h, known, listed=True)
    before, after, hidden = (chosen(at & found.real, found.bounds) for at in (seen, may, ~must))
    # A tile may have rows before and after those of its row of blocks.
    wide = x0 // T * T, ((x1 + T - 1) // T * T).clamp_(max=rows)
    piece, other = (torch.searchsorted(found.row, end, right=True) - 1 for end in (wide[0], wide[1] - 1))
    t0, t1 = _over(k0, K), _over(k1 + (K - 1), K)
    listed = k0 < k1
    shown = listed & _meets(after, found.row, piece, x, k0, k1)
    near = listed & _meets(before, found.row, piece, wide, t0 * K, t1 * K)
    near |= shown & _meets(hidden, found.row, piece, x, k0, k1)
    mixed = (piece != other) | near.any(1)
    owner = shown.nonzero()[:, 0]
    k0, k1, t0, t1 = (y.masked_select(shown) for y in (k0, k1, t0, t1))
    mixed[owner[1:][(owner[1:] == owner[:-1]) & (t0[1:] < t1[:-1])]] = True
    return _Blocks(x0, x1, mixed, owner, k0, k1, t0, t1)


def _over(x: Tensor, n: int) -> Tensor:
    """x // n: a shift takes a tenth of the time."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else x // n


def _meets(ranges: Ranges, begin: Tensor, piece: Tensor, rows: tuple[Tensor, Tensor], k0: Tensor, k1: Tensor) -> Tensor:
    """Whether keys k0..k1 are in one of the ranges that the piece has in these rows."""
    skipped, past = ((x - begin[piece])[:, None] for x in (rows[0], rows[1] - 1))
    lo = ranges.lo[piece] + ranges.lo_step[piece] * skipped
    hi = ranges.hi[piece] + ranges.hi_step[piece] * past
    met = torch.zeros(k0.shape, dtype=torch.bool, device="cpu")
    for start, stop in zip(lo.split(1, 1), hi.split(1, 1), strict=True):
        met |= torch.maximum(start, k0) < torch.minimum(stop, k1)
    return met
