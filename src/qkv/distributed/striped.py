"""What one rank stores of a cache: which tokens of a step are its own, and how rows get to those who keep them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.cache.sequence import Unfinished
from qkv.cache.spec import Spec
from qkv.cache.storage import Places, Storage
from qkv.cache.summaries import Filled
from qkv.distributed.shards import Shards
from qkv.distributed.transport import Group


class Own(Places):
    """Where a rank's own rows of a step go, and which of the step's rows those are."""

    __slots__ = ("_moves", "ends", "index", "starts", "tokens")

    def __init__(self, base: array[int], index: array[int], step: Unfinished, storage: Striped) -> None:
        spec = storage.spec
        super().__init__(base or array("q", [0]), 1, len(base), spec.heads, storage.slots, spec.device)
        packed = (
            torch.frombuffer(index, dtype=torch.int64) if index else torch.empty(0, dtype=torch.int64, device="cpu")
        )
        self.index = packed.to(spec.device)  # of the step's rows, sequence by sequence
        self.starts = [seq._length for seq in step.seqs]
        self.tokens = step.T
        self._moves: tuple[Shards, Moves] | None = None

    def moves(self, shards: Shards, storage: Striped) -> Moves:
        """How rows that ranks hold as `shards` says get to where they are stored; found once a step."""
        if self._moves is None or self._moves[0] != shards:
            self._moves = shards, Moves.of(self.starts, self.tokens, shards, storage)
        return self._moves[1]


class Moves(NamedTuple):
    """Which of its rows a rank sends to each rank, how many come from each, and the order of these in the end."""

    sent: list[Tensor]
    arriving: list[int]
    order: Tensor

    @classmethod
    def of(cls, starts: Sequence[int], T: int, shards: Shards, storage: Striped) -> Moves:
        """Of a step of T tokens for each sequence; rows are numbered sequence by sequence."""
        first = torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None]
        row = torch.arange(len(starts), dtype=torch.int64, device="cpu")[:, None] * T
        keys = []
        sent: list[Tensor] = []
        for rank in range(storage.ranks):
            at = shards.positions(rank)
            owner = (first + at).div(storage.slots, rounding_mode="floor") % storage.ranks
            if rank == storage.rank:
                sent = [(owner == other).flatten().nonzero()[:, 0] for other in range(storage.ranks)]
            keys.append((row + at)[owner == storage.rank])
        return cls(sent, [len(x) for x in keys], torch.cat(keys).argsort())


class Arriving(NamedTuple):
    """The rows of a step that this rank was given: those that `shards` says it holds."""

    k: Tensor
    v: Tensor
    shards: Shards


class Striped(Storage):
    """A rank's pages: the stripe number g of the books is page g, `slots` tokens of it."""

    def __init__(self, spec: Spec, pages: int, slots: int, group: Group) -> None:
        self.rank, self.ranks, self.slots, self.group = group.rank, group.size, slots, group
        self.arriving: Arriving | None = None
        super().__init__(spec, pages, slots)
        self.page_size = slots * self.ranks  # as the books count

    @property
    def bytes(self) -> int:
        return self.pages * self.slots * self.bytes_per_slot

    def own(self, step: Unfinished) -> Own:
        """Where the rows go of the step's tokens that are this rank's."""
        P, n, row = self.slots, self.ranks, 0
        base, index = array("q"), array("q")
        for seq, end in zip(step.seqs, step.ends, strict=True):
            begin, table, stripe = seq._length, seq._table, P * n
            for number in range(begin // stripe, -(-end // stripe)):
                first = number * stripe + self.rank * P
                lo, hi = max(first, begin), min(first + P, end)
                if lo < hi:
                    slot = table[number] * self.spec.heads * P + lo - first
                    base.extend(range(slot, slot + hi - lo))
                    index.extend(range(row + lo - begin, row + hi - begin))
            row += end - begin
        return Own(base, index, step, self)

    def write(self, layer: int, rows: tuple[Tensor, ...], places: Places, filled: Filled | None) -> None:
        """Store this rank's own of a step's rows: those it was given, or that come from ranks that hold them."""
        assert isinstance(places, Own)
        if self.arriving is not None:
            rows = self._moved(self.arriving, places)
        elif len(places.index):
            rows = tuple([_packed(x).index_select(0, places.index) for x in rows])
        if len(places.index):
            super().write(layer, tuple([x[None].transpose(1, 2) for x in rows]), places, None)

    def _moved(self, given: Arriving, places: Own) -> tuple[Tensor, Tensor]:
        """This rank's own rows of keys and values, (m, Hkv, width) each, from all that hold some."""
        moves, heads, widths = places.moves(given.shards, self), self.spec.heads, self.spec.widths
        parts = [torch.cat([_packed(x)[index].flatten() for x in (given.k, given.v)]) for index in moves.sent]
        wide = heads * sum(widths)
        found = self.group.swap("keys and values of a step", parts, [(count * wide,) for count in moves.arriving])
        split = [x.split([count * heads * w for w in widths]) for x, count in zip(found, moves.arriving, strict=True)]
        k, v = (
            torch.cat([part[i].view(-1, heads, width) for part in split])[moves.order] for i, width in enumerate(widths)
        )
        return k, v

    def poison_slots(self, page: int, first: int) -> None:
        own = max(first - self.rank * self.slots, 0)
        if own < self.slots:
            super().poison_slots(page, own)


def _packed(x: Tensor) -> Tensor:
    """Rows (n, H, T, width) one after the other, sequence by sequence: (n T, H, width)."""
    return x.detach().transpose(1, 2).flatten(0, 1)
