"""How many keys of each block a query sees: what selection has to know of a mask, without a table of Lq x Lk."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.masks.base import Mask
from qkv.masks.shapes import Window
from qkv.masks.tile import Sizes, Tile

_PAIRS = 1 << 22  # that are looked at together where a mask has no closed form
_RANGES = 64  # of a row, up to which adding them up beats looking at the pairs


def keys_seen(mask: Mask | None, i: Tensor, p: Tensor, block: int, sizes: Sizes, b: int = 0, h: int = 0) -> Tensor:
    """int64 (rows, blocks): the keys of each block that the queries with indices i, at positions p, see. Exact.

    From the ranges of keys that single rows see where the mask knows them exactly; the other rows look at their pairs,
    a tile at a time.

    >>> import qkv
    >>> at = torch.tensor([2, 6])
    >>> keys_seen(qkv.sliding_window(4), at, at, 3, Sizes(1, 1, 7, 7))
    tensor([[3, 0, 0],
            [0, 3, 1]])
    """
    blocks = -(-sizes.Lk // block)
    edges = (torch.arange(blocks + 1, dtype=torch.int64, device="cpu") * block).clamp_(max=sizes.Lk)
    if mask is None:
        return edges.diff().expand(len(i), blocks)
    if isinstance(mask, Window):  # causal and all windows: a step of decode asks for nothing else
        start = p.new_zeros(p.shape) if mask.left is None else p - mask.left
        stop = p.new_full(p.shape, sizes.Lk) if mask.right is None else p + mask.right + 1
        start = start.clamp(min=0)
        return _covered(edges, start[:, None], torch.maximum(stop, start)[:, None])
    found = mask.intervals(p, p, b=b, h=h, Lq=sizes.Lq, Lk=sizes.Lk, i_first=i, Hq=sizes.Hq)
    starts, stops = found.visible_start, found.visible_stop
    if starts.shape[1] > _RANGES:
        return _looked_at(mask, i, p, block, sizes, b, h)
    seen = _covered(edges, starts, stops)
    vague = seen.sum(1) != (found.full_stop - found.full_start).sum(1)
    if bool(vague.any()):
        rows = vague.nonzero()[:, 0]
        seen[rows] = _looked_at(mask, i[rows], p[rows], block, sizes, b, h)
    return seen


def _covered(edges: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """How much of each stretch between two edges the disjoint ranges of each row cover."""
    before = torch.zeros((len(starts), len(edges)), dtype=torch.int64, device="cpu")
    for start, stop in zip(starts.unbind(1), stops.unbind(1), strict=True):
        before += (torch.minimum(edges, stop[:, None]) - start[:, None]).clamp_(min=0)
    return before.diff()


def _looked_at(mask: Mask, i: Tensor, p: Tensor, block: int, sizes: Sizes, b: int, h: int) -> Tensor:
    device, blocks = mask._device(), -(-sizes.Lk // block)
    seen = torch.zeros((len(i), blocks), dtype=torch.int64, device="cpu")
    at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (b, h))
    wide = max(block, _PAIRS // max(1, len(i)) // block * block)
    rows = max(1, _PAIRS // wide)
    for first in range(0, len(i), rows):
        own = slice(first, first + rows)
        index, where = (x[own, None].to(device) for x in (i, p))
        for start in range(0, sizes.Lk, wide):
            j = torch.arange(start, min(start + wide, sizes.Lk), device=device)
            shown = mask.visible(Tile.pairs(at_b, at_h, index, where, j), sizes).expand(len(index), len(j))
            shown = torch.nn.functional.pad(shown, (0, -len(j) % block)).unflatten(1, (-1, block))
            seen[own, start // block : start // block + shown.shape[1]] = shown.sum(-1).cpu()
    return seen
