"""What a cache must hold, from its views alone: the judge of the cache tests.

`contents` gathers a sequence's keys and values through the layout, in plain Python. `Mirror` keeps every row that was
appended in lists and compares. `check_books` recounts a pool from the tables.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from qkv.cache import PagedCache
from qkv.call.keys import KVView


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows, of which no two are alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def real(pages: Tensor, scale: Tensor | None, page: int) -> Tensor:
    """One page (Hkv, P, D) as the numbers that it stands for."""
    if scale is None:
        return pages[page]
    return pages[page].to(torch.float32) * scale[page][..., None]


def contents(view: KVView, i: int) -> tuple[Tensor, Tensor, list[int]]:
    """Keys (Hkv, n, D), values (Hkv, n, Dv) and logical indices of the n keys of sequence i that are still held."""
    layout = view.layout
    assert layout.alive_at == layout.clock.now, "the view is stale"
    P, length = view.k.shape[2], layout.lengths[i]
    table = layout.tables[layout.starts[i] : layout.starts[i + 1]]
    assert len(table) == -(-length // P), "a table names exactly the pages of its keys"
    keys, values, index = [], [], []
    for at, page in enumerate(table):
        stop = min(P, length - at * P)
        if page < 0:
            continue
        assert page < view.k.shape[0]
        keys.append(real(view.k, view.k_scale, page)[:, :stop])
        values.append(real(view.v, view.v_scale, page)[:, :stop])
        index += range(at * P, at * P + stop)
    if not keys:
        return view.k.new_zeros(view.k.shape[1], 0, view.k.shape[3]), view.v.new_zeros(0), []
    return torch.cat(keys, 1), torch.cat(values, 1), index


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Mirror:
    """Every row that was appended to a cache of keys and values, in lists."""

    def __init__(self, cache: Any, seed: int = 0) -> None:
        self.cache, self.seed = cache, seed
        self.kept: dict[
            Any, list[list[tuple[Tensor, Tensor]]]
        ] = {}  # sequence -> layer -> (k (H, D), v (H, Dv)) a token

    def add(self, like: list[list[tuple[Tensor, Tensor]]] | None = None, **names: Any) -> Any:
        """A sequence; `like` is what its cached tokens must hold."""
        seq = self.cache.add(**names)
        self.kept[seq] = [list(layer[: seq.length]) for layer in like or [[]] * self.cache.layers]
        assert all(len(layer) == seq.length for layer in self.kept[seq])
        return seq

    def make(self, *lead: int) -> tuple[Tensor, Tensor]:
        """New keys and values (*lead, T) -> (n, H, T, D)."""
        self.seed += 2
        n, T = lead
        H, (D, Dv) = self.cache._storage.spec.heads, self.cache._storage.spec.widths
        k = rows(self.seed, n, H, T, D, dtype=self.cache.dtype)
        return k, rows(self.seed + 1, n, H, T, Dv, dtype=self.cache.dtype)

    def append(self, seqs: list[Any], T: int = 1, lengths: list[int] | None = None, **more: Any) -> None:
        """A whole step of new rows, all layers."""
        counts = [T] * len(seqs) if lengths is None else lengths
        made = []
        for layer in range(self.cache.layers):
            k, v = self.make(1, sum(counts)) if lengths is not None else self.make(len(seqs), T)
            self.cache.append(seqs, k, v, layer=layer, lengths=lengths, **(more if layer == 0 else {}))
            made.append((k, v))
        for layer, (k, v) in enumerate(made):
            start = 0
            for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
                for t in range(count):
                    at = (0, slice(None), start + t) if lengths is not None else (i, slice(None), t)
                    self.kept[seq][layer].append((k[at], v[at]))
                start += count

    def fork(self, seq: Any) -> Any:
        twin = self.cache.fork(seq)
        self.kept[twin] = [list(layer) for layer in self.kept[seq]]
        return twin

    def truncate(self, seq: Any, length: int) -> None:
        self.cache.truncate(seq, length)
        self.kept[seq] = [layer[:length] for layer in self.kept[seq]]

    def free(self, seq: Any) -> None:
        self.cache.free(seq)
        del self.kept[seq]

    def check(self, seqs: list[Any] | None = None, queries: int = 1) -> None:
        """All that the next queries of these sequences see is there, bit for bit, in every layer."""
        seqs = [seq for seq in self.kept if seq._host is None] if seqs is None else seqs
        for layer in range(self.cache.layers):
            view = self.cache.view(seqs, layer=layer)
            for i, seq in enumerate(seqs):
                want = self.kept[seq][layer]
                assert seq.length == len(want), (seq, len(want))
                k, v, index = contents(view, i)
                window, sinks = self.cache.window, self.cache.sinks
                if window is None:
                    assert index == list(range(len(want)))
                else:  # what a query at length - queries or later sees
                    seen = range(max(0, len(want) - queries + 1 - window), len(want))
                    assert set(index) >= set(seen) | set(range(min(sinks, len(want)))), (seq, index)
                if index:
                    assert same(k, torch.stack([want[j][0] for j in index], 1)), seq
                    assert same(v, torch.stack([want[j][1] for j in index], 1)), seq


def paged(pages: int = 32, **sizes: Any) -> Mirror:
    """A small cache on pages, with its mirror."""
    given = {"page_size": 4, "num_kv_heads": 2, "head_dim": 3, "value_dim": 5, "dtype": torch.float32, "debug": True}
    return Mirror(PagedCache(pages=pages, **{**given, **sizes}))


def check_books(cache: Any) -> None:
    """The accounts of a cache on pages agree with the tables."""
    pool = cache._pool
    users: Counter[int] = Counter()
    for seq in cache._seqs:
        pages = [page for page in seq._table if page >= 0]
        assert len(set(pages)) == len(pages), f"{seq} has a page twice"
        users.update(pages)
        if seq._step is None and seq._host is None:
            assert len(seq._table) == -(-seq._length // cache.page_size)
    assert pool.refs == [users[page] for page in range(len(pool.refs))]
    used, cached, free = set(users), set(pool.cached), set(pool.free)
    assert len(free) == len(pool.free)
    assert not used & cached
    assert not used & free
    assert not cached & free
    assert used | cached | free == set(range(len(pool.refs)))
    entries = [entry for entry in pool.entries if entry is not None]
    assert all(entry.page == page for page, entry in enumerate(pool.entries) if entry is not None)
    assert cached <= {entry.page for entry in entries} <= cached | used
    found = [entry for same_digest in cache._index._found.values() for entry in same_digest]
    assert sorted(map(id, found)) == sorted(map(id, entries))
    assert not cache._dirty
    assert cache._committing is None


def snapshot(cache: Any) -> Any:
    """All bookkeeping, and all numbers that sequences can read."""
    pool = cache._pool
    seqs = [
        (seq, seq._length, list(seq._table), copy.copy(seq._tokens), seq._gone, seq._step, seq._hashed, seq._live)
        for seq in cache._seqs
    ]
    books = (list(pool.refs), list(pool.free), list(pool.cached), [id(e) if e else None for e in pool.entries])
    planes = [plane for planes in cache._storage.planes for plane in planes]
    data = [plane.raw.contiguous().view(torch.uint8).clone() for plane in planes]
    return seqs, books, data, cache.clock.now, cache.page_size


def unchanged(before: Any, after: Any) -> bool:
    same_data = all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    return bool(before[:2] == after[:2] and before[3:] == after[3:] and same_data)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int) -> Tensor:
    """Causal attention of the last queries q (Hq, T, D) over k (Hkv, L, D), v (Hkv, L, Dv), from the definition."""
    Hq, T, _ = q.shape
    Hkv, L, _ = k.shape
    p, j = torch.arange(L - T, L)[:, None], torch.arange(L)
    seen = j <= p
    if window is not None:
        seen &= (j > p - window) | (j < sinks)
    k, v = (x.repeat_interleave(Hq // Hkv, 0) for x in (k, v))
    weights = torch.softmax(torch.where(seen, scale * (q @ k.mT), -torch.inf), -1)
    return torch.where(seen.any(-1)[:, None], weights.nan_to_num(0.0) @ v, 0.0)
