"""What a cache holds, read without its code: numbers that say where they belong, and a reader of views.

Every key and value written by these tests is a row of small whole numbers that every storage type keeps exactly:
a marker, then the digits of one integer that no other (write, layer, head) has. A row that is read back from a wrong
page, slot, layer or head, or from an older write, is therefore never the row that was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qkv.call.keys import KVView

MARKERS = {torch.int8: 127, torch.float8_e4m3fn: 448}  # the largest number of a row: its scale is then exactly 1
BASES = {torch.int8: 100, torch.float8_e4m3fn: 16}


class Code:
    """Rows for keys and values. `rank`: of a latent cache, whose values are the first numbers of its keys."""

    def __init__(self, layers: int, heads: int, D: int, Dv: int, storage: torch.dtype | None, latent: bool = False):
        self.layers, self.heads, self.D, self.Dv, self.latent = layers, heads, D, Dv, latent
        self.marker, self.base = MARKERS.get(storage, 127), BASES.get(storage, 100)
        self.digits = min(D, Dv) - 1
        self.most = self.base**self.digits // (layers * heads)  # ids are below it
        self.powers = self.base ** np.arange(self.digits, dtype=np.int64)
        wide = max(D, Dv)
        self.columns = np.arange(wide - 1) % self.digits

    def rows(self, ids: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The key rows (len(ids), heads, D) and value rows (len(ids), heads, Dv) of these writes, float64."""
        unique = (np.asarray(ids, dtype=np.int64)[:, None] * self.layers + layer) * self.heads + np.arange(self.heads)
        digits = (unique[..., None] // self.powers) % self.base
        rows = np.empty((*unique.shape, len(self.columns) + 1))
        rows[..., 0] = self.marker
        rows[..., 1:] = digits[..., self.columns]
        k = rows[..., : self.D]
        return (k, k[..., : self.Dv]) if self.latent else (k, -rows[..., : self.Dv])

    def tensors(self, ids: Any, layer: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """k (n, heads, T, D) and v of a step whose ids come sequence by sequence; n = 1 for a packed one."""
        k, v = self.rows(ids, layer)
        k, v = (torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for x in (k, v))
        if len(ids) == 0:
            return k.reshape(n, self.heads, 0, self.D), v.reshape(n, self.heads, 0, self.Dv)
        return tuple(x.unflatten(0, (n, -1)).transpose(1, 2) for x in (k, v))  # type: ignore[return-value]

    def ids(self, k: np.ndarray, layer: int) -> np.ndarray:
        """The writes that key rows (n, heads, D) come from, by their first head; -1 for rows that no write made."""
        with np.errstate(invalid="ignore"):
            unique = np.nan_to_num(k[:, 0, 1 : self.digits + 1] @ self.powers, nan=-1.0).astype(np.int64)
            right = (
                (k[:, 0, 0] == self.marker)
                & (unique >= 0)
                & (unique % (self.layers * self.heads) == layer * self.heads)
            )
        return np.where(right, unique // (self.layers * self.heads), -1)


class Numbers(NamedTuple):
    """The storage of one layer in float64: k (N, Hkv, P, D) and v (N, Hkv, P, Dv), scales applied."""

    k: np.ndarray
    v: np.ndarray


def numbers(view: KVView) -> Numbers:
    """What is stored, every slot of every page, whoever owns it."""
    k, v = view.k.double(), view.v.double()
    if view.k_scale is not None:
        assert view.v_scale is not None
        k, v = k * view.k_scale.double()[..., None], v * view.v_scale.double()[..., None]
    return Numbers(k.numpy(), v.numpy())


class Slots(NamedTuple):
    """Where the keys of a view lie, one entry a key, sequence by sequence."""

    sequence: np.ndarray
    key: np.ndarray
    page: np.ndarray  # -1: given back
    slot: np.ndarray


def slots(view: KVView) -> Slots:
    """Walk the tables of a view's layout, with every check a kernel would rely on."""
    layout, (N, _, P, _) = view.layout, view.k.shape
    assert (layout.tables.typecode, layout.starts.typecode, layout.lengths.typecode) == ("i", "q", "q")
    tables = np.array(layout.tables, dtype=np.int64)
    starts = np.array(layout.starts, dtype=np.int64)
    lengths = np.array(layout.lengths, dtype=np.int64)
    assert len(starts) == len(lengths) + 1, "a table without a sequence"
    assert starts[-1] <= len(tables), "the tables end before their sequences"
    assert (lengths >= 0).all(), "a length below 0"
    assert (np.diff(starts) >= -(-lengths // P)).all(), "a table is too short"
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    key = np.arange(len(sequence)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    page = tables[starts[sequence] + key // P] if len(sequence) else np.empty(0, np.int64)
    assert ((page >= -1) & (page < N)).all(), "an entry names a page that does not exist"
    return Slots(sequence, key, page, key % P)


def tables_of(view: KVView) -> list[list[int]]:
    """The pages of each sequence of a view, -1 where one was given back."""
    starts = list(view.layout.starts)
    P = view.k.shape[2]
    used = [-(-n // P) for n in view.layout.lengths]
    return [list(view.layout.tables[a : a + n]) for a, n in zip(starts, used, strict=False)]


def contents(cache: Any, seqs: Sequence[Any], code: Code, layers: Iterable[int] | None = None) -> list[list[int]]:
    """The writes that each sequence holds, decoded (-1: given back, -2: no write's row); all layers must agree."""
    found: list[list[int]] | None = None
    for layer in range(code.layers) if layers is None else layers:
        view = cache.view(list(seqs), layer=layer)
        where, stored = slots(view), numbers(view)
        here = where.page >= 0
        rows, values = (x[where.page[here], :, where.slot[here]] for x in stored)
        ids = code.ids(rows, layer)
        k, v = code.rows(ids, layer)
        wrong = (rows != k).any((1, 2)) | (values != v).any((1, 2)) | (ids < 0)
        held = np.full(len(where.key), -1)
        held[here] = np.where(wrong, -2, ids)
        ends = np.cumsum(np.array(view.layout.lengths, dtype=np.int64)).tolist()
        mine = [held[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
        assert found is None or found == mine, f"layer {layer} holds {mine}, the one before {found}"
        found = mine
    return found or []


def audit(cache: Any) -> None:
    """The pool's own books against the tables, which are the truth, and against each other."""
    pool, index = cache._pool, cache._pool.index
    users = Counter(page for seq in cache._seqs for page in cache._owned(seq))
    refs = {page: n for page, n in enumerate(pool.refs) if n}
    assert refs == users, f"reference counts {refs}, tables say {dict(users)}"
    assert len(set(pool.free)) == len(pool.free), "a page is free twice"
    free, cached = set(pool.free), set(pool.cached)
    assert not free & cached, "a page is free and cached"
    assert not (free | cached) & refs.keys(), "a page that is used is also free or cached"
    assert len(free) + len(cached) + len(refs) == len(pool.refs), "a page is lost"
    filed = {page: entry for page, entry in enumerate(pool.entries) if entry is not None}
    assert all(entry.page == page for page, entry in filed.items()), "an entry names another page"
    assert not free & filed.keys(), "a free page can be found by a prefix"
    assert cached <= filed.keys(), "a page is kept for nothing"
    if index is not None:
        found = [entry for same in index._found.values() for entry in same]
        assert len(found) == len(filed), "the index and the pages disagree"
        assert {id(entry) for entry in found} == {id(entry) for entry in filed.values()}


def cached_pages(cache: Any) -> list[int]:
    """Pages whose contents a prompt may still find, whoever uses them."""
    return [page for page, entry in enumerate(cache._pool.entries) if entry is not None]
