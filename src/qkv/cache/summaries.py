"""The mean, minimum and maximum of each block of a cache's keys, kept beside its pages.

Only blocks that are full have a summary: it is made of the stored keys by the append that fills the block, and whatever
empties a part of it, a truncate or a rollback, makes the block one that is not full. So nothing has to be undone; and
what copies, swaps or poisons pages does so with their summaries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkv.cache.spec import Spec
from qkv.call.keys import BlockSummaries
from qkv.call.summaries import summarised

_NUMBERS = 1 << 22  # of keys that are read at a time


class Filled:
    """The blocks that a step fills: the page of each and its number on the page, for all layers.

    rows: the table of each sequence, and its lengths before and after the step.
    """

    __slots__ = ("block", "count", "page")

    def __init__(
        self, rows: Iterable[tuple[array[int], int, int]], block: int, page_size: int, device: torch.device
    ) -> None:
        pages, blocks = array("q"), array("q")
        each = page_size // block
        for table, length, end in rows:
            for at in range(length // block, end // block):
                pages.append(table[at // each])
                blocks.append(at % each)
        self.count = len(pages)
        if self.count:
            self.page, self.block = (torch.frombuffer(x, dtype=torch.int64).to(device) for x in (pages, blocks))


class Summaries:
    """Those of one layer: float32 (Hkv, N, blocks of a page, D) each, heads first: a product reads them as they are."""

    __slots__ = ("block", "kept", "kinds")

    def __init__(self, spec: Spec, pages: int, page_size: int) -> None:
        size = (spec.heads, pages, page_size // spec.summaries, spec.widths[0])
        self.block = spec.summaries
        self.kinds = [torch.zeros(size, dtype=torch.float32, device=spec.device) for _ in range(3)]
        mean, low, high = self.kinds
        self.kept = BlockSummaries(mean, low, high, self.block)

    def fill(self, data: Tensor, scale: Tensor | None, filled: Filled) -> None:
        """Summarise blocks of the keys `data` (N, Hkv, P, D), as they are stored."""
        N, H, P, D = data.shape
        blocks = data.view(N, H, P // self.block, self.block, D)
        scales = None if scale is None else scale.view(N, H, -1, self.block)
        step = max(1, _NUMBERS // max(1, H * self.block * D))
        for first in range(0, filled.count, step):
            at: Any = (filled.page[first : first + step], slice(None), filled.block[first : first + step])
            keys = blocks[at]  # (count, Hkv, block, D)
            if scales is not None:
                keys = keys.to(torch.float32) * scales[at][..., None]
            where = (slice(None), at[0], at[2])
            for to, x in zip(self.kinds, summarised(keys), strict=True):
                to[where] = x.transpose(0, 1).to(torch.float32)

    def by_page(self) -> Iterator[Tensor]:
        """The same memory, pages first."""
        for x in self.kinds:
            yield x.transpose(0, 1)

    def poison(self, pages: Tensor) -> None:
        for x in self.kinds:
            x.index_fill_(1, pages, torch.nan)

    def poison_slots(self, page: int, first: int) -> None:
        for x in self.kinds:
            x[:, page, first // self.block :] = torch.nan

    def grow_from(self, old: Summaries) -> None:
        """Take what a storage with shorter pages has."""
        for to, x in zip(self.kinds, old.kinds, strict=True):
            to[:, :, : x.shape[2]] = x
