"""Tiles of keys that hold a key which a tile of queries sees, or one that is hidden, without looking at single rows.

They come from the pieces of `intervals`, within which every end stands still or moves by one key a row: the tiles of K
keys that a tile of queries touches are a union of ranges, and so are those with a hidden key.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qkv.masks import patches
from qkv.masks.intervals import Parts, Ranges, Rows, Spans, cells, divided

MANY = 256  # tiles from which on some may stand for others
_RARE = 16  # tiles of a period: with fewer there are none between


def tiles(mask: Any, whole: Rows, last: Tensor, tile: Tensor, K: int) -> tuple[int, int]:
    """Tiles with a visible key, and without a hidden one, of K keys by the runs of queries from `whole` to `last`.

    Run r is of query tile `tile[r]`; runs are in the order of their tiles.
    """
    Lk = whole.Lk
    if not last.numel() or not Lk:
        return 0, 0
    number: Tensor = torch.arange(last.numel(), device="cpu")
    weight: Tensor | None = None
    if last.numel() >= MANY and _even(whole, last, tile):
        if (apart := _apart(mask, whole, last, tile, K)) is not None:
            return apart
        if (some := representatives(mask, whole, last, K)) is not None:
            number, weight = some
    visible, hidden = _counted(mask, whole, last, tile, K, number, weight)
    return visible, (int(tile[-1]) - int(tile[0]) + 1) * -(-Lk // K) - hidden


def _counted(
    mask: Any, whole: Rows, last: Tensor, tile: Tensor, K: int, number: Tensor, weight: Tensor | None = None
) -> tuple[int, int]:
    """Tiles with a visible key, and with a hidden one, by the runs with these numbers; each stands for so many."""
    part = whole._replace(p=whole.p[number], i=whole.i[number])
    parts = divided(mask, part, last[number], 4 * last.numel() + 4096)
    owner = tile[number][parts.tile] if weight is None else parts.tile
    visible, hidden = (
        _touched(parts, ranges, owner, whole.Lk, K, weight) for ranges in (parts.pieces.visible, parts.pieces.hidden)
    )
    return visible, hidden


def _even(whole: Rows, last: Tensor, tile: Tensor) -> bool:
    """Whether runs are the tiles of one run, all but the last equally long."""
    size = last - whole.p + 1
    same = (size[:-1] == size[0]).all() & (whole.p[1:] - whole.p[:-1] == size[:-1]).all()
    return bool(same & (whole.i[1:] - whole.i[:-1] == size[:-1]).all() & (tile[1:] == tile[:-1] + 1).all())


def _apart(mask: Any, whole: Rows, last: Tensor, tile: Tensor, K: int) -> tuple[int, int] | None:
    """`tiles` of an expression with a mask of blocks: most of its blocks count for themselves."""
    n, T, rows = last.numel(), int(last[0] - whole.p[0]) + 1, int(last[-1] - whole.p[0]) + 1
    found = patches.find(mask, whole._replace(p=whole.p[:1], i=whole.i[:1]), rows, (T, K), 4 * n + 4096)
    if found is None or not found.apart:
        return None
    without, number = patches.without(mask, whole.b, whole.h), found.others.nonzero()[:, 0]
    base = tiles(without, whole, last, tile, K)
    visible, full = found.visible + base[0], found.full + base[1]
    for sign, of in ((1, mask), (-1, without)) if number.numel() else ():
        more = _counted(of, whole, last, tile, K, number)
        visible, full = visible + sign * more[0], full - sign * more[1]
    return visible, full


def representatives(mask: Any, whole: Rows, last: Tensor, K: int) -> tuple[Tensor, Tensor] | None:
    """Tiles that stand for all, where the mask's form changes rarely: their numbers, and twice their weights.

    Inside of a piece, and further than a tile from its ends, no end passes another, and each moves by as many keys as
    the tile has rows, or as its own steps are long: what tile t + P touches, with P tiles' rows a multiple of K and of
    these steps, grows evenly with t. So the first and the last of each remainder of t stand for those between. None
    where that is not so, or does not pay.
    """
    first, i_first, b, h, _, Lk, _ = whole
    n, T = first.numel(), int(last[0] - first[0]) + 1
    leaves = list(dict.fromkeys(mask._leaves(h)))
    cuts = [leaf._cuts(b) for leaf in leaves]
    often = [c is not None and 0 < c.period < _RARE * T for c in cuts]
    if any(c.optional or (c.at is not None and 8 * c.at.numel() > n) for c in cuts if c is not None):
        return None
    steps = [c.period for c, short in zip(cuts, often, strict=True) if c is not None and short]
    forms = [
        _Steps(c.period) if c is not None and short else x for x, c, short in zip(leaves, cuts, often, strict=True)
    ]
    found = cells([*forms, Keys(Lk)], whole._replace(p=first[:1], i=i_first[:1]), last[-1:], 4 * n + 4096)
    vague = [leaf for leaf, spans in zip(leaves, found.spans, strict=False) if spans.exact is not True]
    ranges = [leaf for leaf in vague if leaf._period() is None and leaf._has_ranges]
    if ranges or found.rows.numel() * 8 > n:
        return None
    period, margin = math.lcm(T, K, *steps) // T, T + 2 * K + 2 * max(steps, default=0)
    low = -(-(found.row + margin) // T)
    high = torch.maximum((found.row + found.rows - margin).div(T, rounding_mode="floor"), low)
    count = torch.where(high - low < 4 * period, 0, high - low)
    begin = torch.stack([low, low + count], 1)[count > 0]
    # Twice how many each stands for: none between the first and the last of a remainder.
    change = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
    change[begin[:, 0]], change[begin[:, 1]] = -2, 2
    weight = change[:-1].cumsum(0) + 2
    at = begin[:, :1] + torch.arange(period, device="cpu") if begin.numel() else begin[:, :1]
    each = (begin[:, 1:] - at + period - 1).div(period, rounding_mode="floor")
    weight[at], weight[at + (each - 1) * period] = each, each
    chosen = weight.nonzero()[:, 0]
    return chosen, weight[chosen]


def _touched(parts: Parts, ranges: Ranges, owner: Tensor, Lk: int, K: int, weight: Tensor | None) -> int:
    """Tiles of keys that the ranges touch, over all query tiles; `weight`: twice how many each stands for."""
    lo, hi = parts.ends(ranges, Lk)
    chosen = lo < hi
    # Query tiles stand one after the other, with a gap of one tile of keys between them.
    stride = -(-Lk // K) + 1
    base = (owner * stride)[:, None]
    lo, hi = lo.div_(K, rounding_mode="floor").add_(base), hi.add_(K - 1).div_(K, rounding_mode="floor").add_(base)
    same = owner[1:] == owner[:-1]
    several = torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1))
    total = 0
    # Only ranges of several parts may be out of order.
    for which in (~several, several) if bool(same.any()) else (None,):
        some = (lo, hi, chosen) if which is None else (lo[which], hi[which], chosen[which])
        start, stop = some[0].masked_select(some[2]), some[1].masked_select(some[2])
        if start.numel() == 0:
            continue
        if which is several and bool((start[1:] < start[:-1]).any()):
            start, order = start.sort()
            stop = stop[order]
        covered = torch.maximum(start, torch.nn.functional.pad(stop.cummax(0).values[:-1], (1, 0)))
        new = (stop - covered).clamp_(min=0)
        total += int(new.sum() if weight is None else (new * weight[start // stride]).sum())
    return total if weight is None else total // 2


class _Steps:
    """Where ends may be that stand still for `step` rows and then move as far: between two that move with each row."""

    def __init__(self, step: int) -> None:
        self.step = step

    def _cuts(self, b: int) -> None:
        return None

    def _spans(self, rows: Rows) -> Spans:
        return Spans(rows.p[:, None] - self.step, rows.p[:, None] + self.step, True, True)


class Keys:
    """The keys there are, as if they were a mask: all in one range, or from each of `edges` to the next."""

    def __init__(self, Lk: int, edges: Tensor | None = None) -> None:
        self.edges = torch.tensor([0, Lk], dtype=torch.int64, device="cpu") if edges is None else edges

    def _cuts(self, b: int) -> None:
        return None

    def _spans(self, rows: Rows) -> Spans:
        return Spans(self.edges[None, :-1], self.edges[None, 1:])
