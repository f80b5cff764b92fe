"""Keys and values that lie in a cache: what its views hand to `attention`, and what layers of models ask of a cache."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qkv.masks import Mask


class Clock:
    """Counts what ends the life of views: pages given back, overwritten or moved."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class KVLayout:
    """Where the keys of some sequences lie: one for all layers of a step.

    The key j of sequence i is in slot j % P of page tables[starts[i] + j // P]. An entry of -1 is a page that was given
    back: the view's `held` hides its keys, and no kernel touches it.
    """

    __slots__ = ("alive_at", "clock", "fits", "lengths", "most", "placed", "queries", "starts", "tables")

    def __init__(
        self,
        tables: array[int],
        starts: array[int],
        lengths: array[int],
        queries: array[int] | None,
        clock: Clock,
        most: int | None = None,
    ) -> None:
        self.tables = tables  # 'i': all tables, one after the other
        self.starts = starts  # 'q', n + 1 of them: where each table begins, and the end of the last
        self.lengths = lengths  # 'q': keys of each sequence, these with the step's own
        self.queries = queries  # 'q': of a ragged step, queries of each sequence; None: all have q.shape[2]
        self.clock, self.alive_at = clock, clock.now
        self.fits: tuple[int, int] | None = None  # the sizes of a pool whose pages it was found to name
        self.placed: dict[tuple[int, int, int], tuple[Tensor, int]] = {}  # what `call.summaries.places_of` found
        self.most = most  # queries that a sequence may have at most: what earlier ones see was given back; None: all


class BlockSummaries(NamedTuple):
    """What a cache keeps of the blocks of a layer's keys: float32 (Hkv, N pages, blocks of a page, D) each.

    Those of blocks that are full are right; others hold anything.
    """

    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    block: int  # keys of a block; it divides the pages' slots


class KVView(NamedTuple):
    """Keys and values of one layer for some sequences, where they lie in a cache; `attention` takes it as k.

    Queries are the sequences' last tokens: query i of a sequence with Lk keys and Lq queries stands on Lk - Lq + i.
    """

    k: Tensor  # (N pages, Hkv, P slots, D), in `dtype` or a storage type
    v: Tensor  # (N, Hkv, P, Dv); may be a view of k
    k_scale: Tensor | None  # (N, Hkv, P) float32: what a stored number stands for, where storage is int8 or float8
    v_scale: Tensor | None
    dtype: torch.dtype  # of the queries and outputs
    layout: KVLayout
    held: Mask | None  # what the cache still holds; joined with the call's mask by &
    summaries: BlockSummaries | None = None  # of a cache that keeps them, for `qkv.select_blocks`


class SharedView(Protocol):
    """Keys and values that several processes hold; `attention` takes it as k, and leaves the call to it."""

    def attend(self, call: str, q: Any, v: Any, mask: Any, options: Any, backend: Any) -> Any:
        """What `attention` returns, as an `Output` with lse; the arguments are as the caller gave them."""
        ...


class LayerCache(Protocol):
    """One layer of a step of some sequences, as a layer of a model takes it."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store the step's keys (n, Hkv, T, D) and values; ragged: packed as (1, Hkv, T, D)."""
        ...

    def view(self) -> KVView:
        """All keys of the sequences, the step's own among them."""
        ...

    @property
    def positions(self) -> Tensor:
        """int64 (n, T), ragged (1, T): where the step's tokens stand in their sequences."""
        ...


class IndexedLayerCache(LayerCache, Protocol):
    """One layer of a step whose cache holds the keys of an indexer, too."""

    def append(self, k: Tensor, v: Tensor, index: Tensor | None = None) -> None:
        """Store the step's index keys (n, 1, T, Di) with the others; ragged: packed as (1, 1, T, Di)."""
        ...

    def index_view(self) -> KVView:
        """All index keys of the sequences, the step's own among them: one head without values."""
        ...
