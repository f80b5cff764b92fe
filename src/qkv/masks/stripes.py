"""Keys that are dealt to ranks a block at a time: what one of them holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qkv.masks.base import Mask
from qkv.masks.intervals import INFINITE, Rows, Spans, column
from qkv.masks.program import Builder
from qkv.masks.selected import Selected
from qkv.masks.shapes import floor
from qkv.masks.tile import Sizes, Tile

_RANGES = 4096  # up to which each block is a range of its own


@dataclass(frozen=True, eq=False, repr=False)
class Stripes(Mask):
    """j // block % ranks == rank, of the first `blocks` blocks; a value without tensors, for kernels a list of blocks.

    >>> print(Stripes(2, 3, 1, 8).picture(1, 12))
    p/j 0         5         10
      0 · · ■ ■ · · · · ■ ■ · ·
    """

    block: int
    ranks: int
    rank: int
    blocks: int

    fits_any_length = True

    def words(self) -> str:
        return f"the keys on pages of rank {self.rank}"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        number = floor(at.j, self.block)
        return (number % self.ranks == self.rank) & (number < self.blocks)

    def _lists(self) -> Tensor:
        """The blocks, as one list for all queries (1, 1, 1, n)."""
        stop = max(self.rank, self.blocks)
        return torch.arange(self.rank, stop, self.ranks, dtype=torch.int32, device="cpu").view(1, 1, 1, -1)

    def _spans(self, rows: Rows) -> Spans:
        count = len(range(self.rank, self.blocks, self.ranks))
        if count > _RANGES:
            return Spans(column(self.rank * self.block), column(self.blocks * self.block), exact=False)
        if not count:
            return Spans(column(0), column(0))
        start = self._lists()[0, 0].to(torch.int64) * self.block
        return Spans(start, start + self.block)

    def _lower(self, builder: Builder) -> None:
        count = len(range(self.rank, self.blocks, self.ranks))
        builder.emit(Selected.op, builder.operand(cache(self._lists)), 0, 1, 1, 1, count, self.block, INFINITE)

    def __repr__(self) -> str:
        return f"stripes({self.block}, {self.ranks}, {self.rank}, {self.blocks})"
