"""A cache for attention with a window: each sequence has a few pages that are written over and over."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from qkv.cache import checks
from qkv.cache.base import Cache
from qkv.cache.pool import PagePool
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.spec import Spec
from qkv.cache.storage import Storage
from qkv.errors import ArgumentError


class RingCache(Cache):
    """The last `window` keys of each sequence, and the first `sinks`, in memory that never grows.

    ::

        tokens   0 .. 3 | 4 .. 7 | 8 .. 11 | 12 .. 15 | 16 17          window 6, pages of 4
        pages      -        -        r2         r0        r1           three pages in turn; - was overwritten

    A query at position p sees at most the keys j > p - window, and j < sinks: the view says so, so causal() is mask
    enough. Slot is not position: table entries are logical, and masks see true positions.

    Parameters
    ----------
    sequences : int
        Most sequences at a time.
    window : int
        Keys that a query sees, its own among them.
    num_kv_heads, head_dim, value_dim : int
        Hkv, D and Dv (= D unless given).
    sinks : int
        First keys that stay.
    chunk : int
        Most tokens of one append; their queries all find their windows.
    page_size : int
        P, the grain in which slots are reused.
    index_dim, summaries, layers, dtype, storage, device, debug
        As in `qkv.cache.PagedCache`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, or tensors that memory cannot hold.

    Notes
    -----
    Memory: window + chunk + sinks tokens a sequence, rounded up to pages, and two. `truncate` by up to the last step's
    tokens always works. Source: Beltagy et al. (2020) for the window, Xiao et al. (2024) for the sinks.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = RingCache(sequences=1, window=6, page_size=4, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    >>> seq = cache.add()
    >>> for _ in range(18):
    ...     cache.append([seq], torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
    >>> seq.length, seq.pages
    (18, (-1, -1, 2, 0, 1))
    """

    _what = "ring"

    def __init__(
        self,
        *,
        sequences: int,
        window: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        sinks: int = 0,
        chunk: int = 1,
        page_size: int = 64,
        index_dim: int = 0,
        summaries: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        debug: bool = False,
    ) -> None:
        call = "qkv.cache.RingCache()"
        window = checks.size(call, "window", window)
        sinks = checks.size(call, "sinks", sinks, low=0)
        P = checks.size(call, "page_size", page_size)
        self.chunk = checks.size(call, "chunk", chunk)
        self.sequences = checks.size(call, "sequences", sequences)
        # The window - 1 + chunk keys that a step's queries see lie on at most so many pages, wherever they begin.
        self._turning = -(-(window + self.chunk - 2) // P) + 1
        self._each = -(-sinks // P) + self._turning
        spec = Spec.of_heads(call, num_kv_heads, head_dim, value_dim, index_dim, layers, dtype, storage, device, debug)
        spec = spec.summarising(call, summaries, P)
        pages = self.sequences * self._each
        super().__init__(Storage(spec, pages, P), PagePool(pages), window=window, sinks=sinks)

    def _hold(self, seq: Sequence, pages: list[int]) -> None:
        seq._own = pages

    def _count(self, call: str, step: Unfinished) -> Any:
        most = max(step.counts, default=0)
        if most > self.chunk:
            given = f"{most} tokens and chunk={self.chunk}"
            fix = "Append fewer at a time, or build the cache with a larger chunk"
            raise ArgumentError.of(call, "an append must fit into the chunk", given, fix)
        P = self.page_size
        return [
            (seq, -(-end // P)) for seq, end in zip(step.seqs, step.ends, strict=True) if -(-end // P) > len(seq._table)
        ]

    def _claim(self, claim: Any) -> None:
        for seq, pages in claim:
            table, own, pinned, turning = seq._table, seq._own, self._pinned, self._turning
            assert own is not None
            for at in range(len(table), pages):
                past = at - turning
                if at < pinned:
                    table.append(own[at])
                    continue
                if past >= pinned:
                    if table[past] >= 0:
                        self._tick()
                        if self.debug:
                            self._storage.poison([table[past]])
                    # Gone first: a page that the table has twice could be read as both.
                    seq._gone = max(seq._gone, past + 1)
                    table[past] = -1
                table.append(own[pinned + (at - pinned) % turning])

    def _owned(self, seq: Sequence) -> Collection[int]:
        return seq._own or ()

    def _dropped(self, pages: Iterable[int]) -> None:
        if self.debug:
            self._storage.poison([page for page in pages if page >= 0])

    def _empty_slots(self) -> int:
        P = self.page_size
        empty = 0
        for seq in self._seqs:
            pages = -(-seq._length // P)
            held = sum(1 for page in seq._table[:pages] if page >= 0)
            empty += (self._each - held) * P + (pages * P - seq._length)
        return empty
