"""What a mask leaves visible: a small picture at any length, and how many keys each row sees."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.call.problem import Problem, query_positions
from qkv.masks import Mask, Sizes, Tile

CELLS = 64
_EXACT_PAIRS = 1 << 24  # up to which every pair is looked at


def cover(problem: Problem, positions: Tensor | None, b: int = 0, h: int = 0, cells: int = CELLS) -> Tensor:
    """uint8 (rows, columns), at most `cells` each: 0 hidden, 1 partly visible, 2 visible.

    Queries and keys are in bins as in the pooled map. Where not every pair can be looked at and the mask answers
    conservatively, a cell may say 1 where it is 0 or 2.
    """
    p = problem
    rows, columns = min(cells, p.Lq), min(cells, p.Lk)
    if p.mask is None or 0 in (rows, columns):
        return torch.full((rows, columns), 2, dtype=torch.uint8, device="cpu")
    where = query_positions(p, positions, "cpu").cpu()
    line = where[b if where.shape[0] > 1 else 0]
    if p.Lq * p.Lk <= _EXACT_PAIRS:
        return _looked_at(p, line, b, h, rows, columns)
    edges = torch.tensor([-(-r * p.Lq // rows) for r in range(rows + 1)], dtype=torch.int64, device="cpu")
    starts = torch.unique(torch.cat((edges[:-1], (line[1:] - line[:-1] != 1).nonzero().flatten() + 1)))
    if len(starts) > 1 << 16:
        return torch.ones((rows, columns), dtype=torch.uint8, device="cpu")
    ends = torch.cat((starts[1:], torch.tensor([p.Lq], dtype=torch.int64, device="cpu"))) - 1
    found = p.mask.intervals(line[starts], line[ends], b=b, h=h, Lk=p.Lk, Lq=p.Lq, i_first=starts, Hq=p.Hq)
    seen = _binned(found.visible_start, found.visible_stop, columns, p.Lk, touched=True)
    full = _binned(found.full_start, found.full_stop, columns, p.Lk, touched=False)
    bins = starts * rows // p.Lq
    any_ = torch.zeros(rows, columns, dtype=torch.bool, device="cpu").index_put_((bins,), seen, accumulate=True)
    some_hidden = torch.zeros(rows, columns, dtype=torch.bool, device="cpu").index_put_((bins,), ~full, accumulate=True)
    return any_.to(torch.uint8) + (any_ & ~some_hidden).to(torch.uint8)


def _binned(start: Tensor, stop: Tensor, columns: int, Lk: int, *, touched: bool) -> Tensor:
    """(tiles, columns): whether the ranges touch each bin of keys, or cover it."""
    edges = torch.tensor([-(-c * Lk // columns) for c in range(columns + 1)], dtype=torch.int64, device="cpu")
    lo, hi = edges[:-1], edges[1:]
    found = torch.zeros(start.shape[0], columns, dtype=torch.bool, device="cpu")
    for r in range(start.shape[1]):
        a, z = start[:, r, None], stop[:, r, None]
        inside = (a < hi) & (z > lo) if touched else (a <= lo) & (z >= hi)
        found |= inside & (z > a)
    return found


def _looked_at(p: Problem, line: Tensor, b: int, h: int, rows: int, columns: int) -> Tensor:
    device = p.mask._device() if p.mask is not None else torch.device("cpu")
    seen = torch.zeros(rows, columns, dtype=torch.int64, device="cpu")
    per_row, per_column = (
        torch.bincount(torch.arange(n, device="cpu") * m // n, minlength=m) for n, m in ((p.Lq, rows), (p.Lk, columns))
    )
    at_column = torch.arange(p.Lk, device="cpu") * columns // p.Lk
    step = max(1, (1 << 22) // p.Lk)
    for first in range(0, p.Lq, step):
        i = torch.arange(first, min(first + step, p.Lq), device="cpu")
        visible = _visible(p.mask, p.sizes, b, h, i.to(device), line[i].to(device)).cpu()
        part = torch.zeros(len(i), columns, dtype=torch.int64, device="cpu").index_add_(1, at_column, visible.long())
        seen.index_add_(0, i * rows // p.Lq, part)
    return (seen > 0).to(torch.uint8) + (seen == per_row[:, None] * per_column).to(torch.uint8)


def _visible(mask: Mask | None, sizes: Sizes, b: int, h: int, i: Tensor, p: Tensor) -> Tensor:
    j = torch.arange(sizes.Lk, device=i.device)
    if mask is None:
        return torch.ones(len(i), sizes.Lk, dtype=torch.bool, device=i.device)
    at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=i.device) for n in (b, h))
    return mask.visible(Tile.pairs(at_b, at_h, i[:, None], p[:, None], j), sizes).expand(len(i), sizes.Lk)


def visible_keys(problem: Problem, positions: Tensor | None, rows: Tensor, b: int = 0, h: int = 0) -> Tensor:
    """int64 (rows,): how many keys each of the chosen rows sees. Exact; looks at every key of them."""
    p = problem
    where = query_positions(p, positions, "cpu").cpu()
    line = where[b if where.shape[0] > 1 else 0]
    device = p.mask._device() if p.mask is not None else torch.device("cpu")
    step = max(1, (1 << 22) // max(p.Lk, 1))
    parts = [
        _visible(p.mask, p.sizes, b, h, some.to(device), line[some].to(device)).sum(-1).cpu()
        for some in rows.split(step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")
