"""A cache for native sparse attention: beside the keys, compressed blocks of them, which come at a lower rate."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence as Ordered
from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks
from qkv.cache.base import Cache
from qkv.cache.dense import DenseCache
from qkv.cache.paged import PagedCache
from qkv.cache.sequence import Sequence
from qkv.cache.spec import Spec
from qkv.cache.step import LayerStep, Step
from qkv.cache.storage import Places, Plane, Storage
from qkv.cache.summaries import Filled
from qkv.call.keys import KVLayout, KVView
from qkv.checks import integer
from qkv.errors import ArgumentError, ShapeError

_CALL = "qkv.cache.SparseCache()"


class SparseCache(Cache):
    """Keys and values, and a compressed key and value for each `stride` tokens, on the same pages.

    ::

        tokens       0  1  2  3 | 4  5  6  7 | 8  9 ..        a page of P tokens has P / stride entries beside it
        entries               0 |          1 |                entry e is stored with token e stride + stride - 1

    An entry is made of tokens up to the one that it is stored with, so whatever holds those tokens holds the entry:
    forks, shared prefixes, copies on write, `truncate` and swapping keep both right together.

    Parameters
    ----------
    stride : int
        Tokens from one entry to the next; on pages it divides page_size.
    num_kv_heads, head_dim, value_dim : int
        Heads, D and Dv (= D unless given) of the keys and values.
    compressed_heads : int
        Heads of the entries, which have the same D and Dv; num_kv_heads unless given.
    pages, page_size, identity
        On pages, with all that `qkv.cache.PagedCache` does but its window: that forgets what blocks are selected from.
    sequences, capacity
        Dense, as `qkv.cache.DenseCache`; in place of pages.
    layers, dtype, storage, device, debug
        As in `qkv.cache.PagedCache`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, or both or neither of pages and sequences.

    Notes
    -----
    Memory: layers (num_kv_heads + compressed_heads / stride) (D + Dv) numbers a token. `qkv.nn.SparseAttention.cache`
    makes one with a layer's sizes, and the layer fills and reads it through `SparseLayerStep`.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = SparseCache(stride=4, pages=8, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    >>> seq, k = cache.add(), torch.randn(1, 1, 10, 16)
    >>> means = k[:, :, :8].unflatten(2, (2, 4)).mean(3)
    >>> cache.append([seq], k, k, compressed=(means, means))
    >>> cache.entries([seq]).layout.lengths
    array('q', [2])
    """

    _storage: CompressedStorage

    def __init__(
        self,
        *,
        stride: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        compressed_heads: int | None = None,
        pages: int | None = None,
        page_size: int = 64,
        sequences: int | None = None,
        capacity: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        identity: str | bytes | int | None = None,
        debug: bool = False,
    ) -> None:
        of_pages = {"page_size": None if page_size == 64 else page_size, "identity": identity}
        checks.one_kind(_CALL, "sparse", pages, sequences, of_pages=of_pages, of_dense={"capacity": capacity})
        self.stride = checks.size(_CALL, "stride", stride)
        spec = Spec.of_heads(_CALL, num_kv_heads, head_dim, value_dim, 0, layers, dtype, storage, device, debug)
        heads = spec.heads if compressed_heads is None else checks.size(_CALL, "compressed_heads", compressed_heads)
        self.compressed_heads = heads
        if isinstance(self, PagedSparseCache):
            count, P = checks.size(_CALL, "pages", pages), checks.size(_CALL, "page_size", page_size)
            if P % self.stride:
                fix = f"Use a page_size that is a multiple of {self.stride}"
                raise ArgumentError.of(_CALL, "stride must divide page_size", f"page_size={P}, stride={stride}", fix)
            self._begin_paged(_CALL, spec, count, P, identity, None, 0)
        else:
            assert isinstance(self, DenseSparseCache)
            self._begin_dense(_CALL, spec, sequences, capacity)
        self._storage = CompressedStorage(self._storage, self.stride, heads)

    def __new__(cls, *args: Any, **given: Any) -> Any:
        if cls is not SparseCache:
            return super().__new__(cls)
        # Which of its kinds it is follows from the arguments. An object given another class later is slower to read.
        return super().__new__(PagedSparseCache if given.get("sequences") is None else DenseSparseCache)

    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]  # so that help() shows what it takes

    def append(
        self,
        seqs: Ordered[Sequence],
        k: Tensor,
        v: Tensor,
        layer: int = 0,
        *,
        lengths: Any = None,
        tokens: Any = None,
        index: Tensor | None = None,
        compressed: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Store the keys and values of a step's tokens, and its entries, in one layer.

        Parameters
        ----------
        compressed : (Tensor, Tensor), shapes (1, Hc, E, D) and (1, Hc, E, Dv)
            The entries that the step completes, of all sequences one after the other, E = sum over sequences of
            new length // stride - old length // stride. May be left out where E is 0.
        seqs, k, v, layer, lengths, tokens, index
            As in `qkv.cache.PagedCache.append`; so are the errors. There is no index_dim, and so no index.
        """
        rows = self._entry_rows(seqs, k, lengths, compressed)
        self._storage.coming = rows
        try:
            super().append(seqs, k, v, layer, lengths=lengths, tokens=tokens, index=index)
        finally:
            self._storage.coming = None

    def entries(self, seqs: Ordered[Sequence], layer: int = 0) -> KVView:
        """The entries of one layer, as keys and values of sequences that are `stride` times shorter.

        Parameters
        ----------
        seqs, layer
            As for `view`.

        Returns
        -------
        KVView
            Its sequence i has length // stride of them.
        """
        view = self.view(seqs, layer)
        layout = view.layout
        tables, starts, lengths = array("i"), array("q", [0]), array("q")
        wide = self._storage.entries_per_page
        for i, length in enumerate(layout.lengths):
            count, first = length // self.stride, layout.starts[i]
            tables.extend(layout.tables[first : first - (-count // wide)])
            starts.append(len(tables))
            lengths.append(count)
        shorter = KVLayout(tables, starts, lengths, None, layout.clock)
        k, v = self._storage.entries[layer]
        return KVView(k.data, v.data, k.scale, v.scale, self.dtype, shorter, None)

    def step(self, seqs: Ordered[Sequence], lengths: Any = None, T: int | None = None, *, tokens: Any = None) -> Step:
        """A step whose layers take entries, too: `SparseLayerStep`.

        Parameters
        ----------
        seqs, lengths, T, tokens
            As for `qkv.cache.PagedCache.step`; so are the errors.

        Returns
        -------
        SparseStep
        """
        made = super().step(seqs, lengths, T, tokens=tokens)
        return SparseStep(self, made.seqs, made.T, made.lengths, tokens)

    def _entry_rows(self, seqs: Any, k: Any, lengths: Any, compressed: Any) -> tuple[Tensor, ...]:
        """The entries of a step, checked as far as its other arguments are what `append` takes."""
        call = f"{self._name}.append()"
        D, Dv = self._spec.widths
        if compressed is None:
            compressed = tuple(torch.empty(1, self.compressed_heads, 0, w, **self._kind()) for w in (D, Dv))
        given = list(compressed) if isinstance(compressed, (tuple, list)) else [compressed]
        if len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
            said = f"compressed of {len(given)} parts"
            raise ShapeError.of(call, "compressed is a pair of tensors, keys and values", said, "Pass (k_cmp, v_cmp)")
        try:
            counts = lengths if lengths is not None else [k.shape[2]] * len(seqs)
            E = sum(
                (seq._length + count) // self.stride - seq._length // self.stride
                for seq, count in zip(seqs, counts, strict=True)
            )
        except (AttributeError, IndexError, TypeError, ValueError):
            E = given[0].shape[2] if given[0].ndim > 2 else 0  # the base says what is wrong with the rest
        shapes = ((1, self.compressed_heads, E, D), (1, self.compressed_heads, E, Dv))
        checks.check_rows(call, (("k_cmp", given[0]), ("v_cmp", given[1])), shapes, self.dtype, self.device)
        return tuple(given)

    def _kind(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}


class CompressedStorage(Storage):
    """The tensors of another storage, and beside them planes of entries, one for each `stride` slots of a page."""

    def __init__(self, tokens: Storage, stride: int, heads: int) -> None:
        vars(self).update(vars(tokens))
        self.stride, self.heads = stride, heads
        self.entries_per_page = -(-self.page_size // stride)
        self.coming: tuple[Tensor, ...] | None = None  # what the next `write` stores as entries
        sizes = [(self.pages, heads, self.entries_per_page, width) for width in self.spec.widths]
        with torch.inference_mode(False), torch.no_grad():
            made = (tuple(Plane(s, self.spec.storage, self.spec.device) for s in sizes) for _ in self.planes)
            self.entries: list[tuple[Plane, ...]] = list(made)
        if self.spec.debug:
            self._poison_entries(self._ids(range(self.pages)))

    @property
    def bytes_per_slot(self) -> int:
        tokens = super().bytes_per_slot
        return tokens + tokens * self.heads // (self.spec.heads * self.stride)

    def write(self, layer: int, rows: tuple[Tensor, ...], places: Places, filled: Filled | None) -> None:
        super().write(layer, rows, places, filled)
        assert self.coming is not None
        if not self.coming[0].shape[2]:
            return
        wide = self.spec.heads * places.page_size
        page, slot = places._base // wide, places._base % wide
        last = slot % self.stride == self.stride - 1
        base = page[last] * (self.heads * self.entries_per_page) + slot[last] // self.stride
        at = Places(array("q", base.tolist()), 1, len(base), self.heads, self.entries_per_page, self.spec.device)
        for plane, x in zip(self.entries[layer], self.coming, strict=True):
            plane.write(x, at)

    def read_rows(self, plane: Plane, index: Tensor) -> Tensor:
        """The rows (..., width) of a plane in the dtype of given tensors."""
        rows = plane.data.view(-1, plane.data.shape[-1])[index]
        if plane.scale_rows is not None:
            rows = rows.float() * plane.scale_rows[index][..., None]
        return rows.to(self.spec.dtype)

    def _tensors(self) -> Iterator[Tensor]:
        yield from super()._tensors()
        for plane in self._entry_planes():
            yield plane.pages
            if plane.scale is not None:
                yield plane.scale

    def _entry_planes(self) -> Iterator[Plane]:
        for planes in self.entries:
            yield from planes

    def poison(self, pages: Ordered[int]) -> None:
        super().poison(pages)
        if len(pages):
            self._poison_entries(self._ids(pages))

    def _poison_entries(self, ids: Tensor) -> None:
        for plane in self._entry_planes():
            plane.poison(ids)

    def poison_slots(self, page: int, first: int) -> None:
        super().poison_slots(page, first)
        for plane in self._entry_planes():
            plane.poison_slots(page, first // self.stride)  # those that are stored with a token from `first` on

    def grown(self, page_size: int) -> Storage:
        new = CompressedStorage(super().grown(page_size), self.stride, self.heads)
        with torch.inference_mode(False), torch.no_grad():
            for old, fresh in zip(self._entry_planes(), new._entry_planes(), strict=True):
                fresh.raw[:, :, : self.entries_per_page] = old.raw
                if old.scale is not None and fresh.scale is not None:
                    fresh.scale[:, :, : self.entries_per_page] = old.scale
        new.coming = self.coming
        return new


class SparseStep(Step):
    """A `Step` of a `SparseCache`."""

    __slots__ = ("_found",)

    _cache: SparseCache

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._found: dict[int, tuple[Places | None, Tensor, Tensor]] = {}

    def layer(self, i: int) -> SparseLayerStep:
        """One layer of the step.

        Parameters
        ----------
        i : int
            0 .. layers - 1.

        Returns
        -------
        SparseLayerStep
        """
        integer("Step.layer()", "i", i, high=self._cache.layers - 1)
        return SparseLayerStep(self, i)

    def _blocks(self, block: int) -> tuple[Places | None, Tensor, Tensor]:
        """Where the tokens of the entries' blocks are: one answer for all layers.

        The rows of the `block` - 1 tokens before the step, of each sequence; for each entry the places of its block's
        tokens among these and then the step's own (E, block), and whether they exist.
        """
        if block not in self._found:
            P, before, stride = self._cache.page_size, block - 1, self._cache.stride
            wide = self._cache._spec.heads * P
            rows, entries, shift = array("q"), array("q"), len(self.seqs) * before
            counts = self.lengths if self.lengths is not None else (self.T,) * len(self.seqs)
            for i, (seq, start, count) in enumerate(zip(self.seqs, self._starts, counts, strict=True)):
                at = range(start - before, start)
                rows.extend(seq._table[t // P] * wide + t % P if t >= 0 else 0 for t in at)
                for last in range(start - (start + 1) % -stride, start + count, stride):
                    entries.extend((i * before + before, shift, last - start, last))
                shift += count
            found = torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 4, 1).unbind(1)
            old, new, local, position = (t.to(self._cache.device) for t in found)
            token = local + torch.arange(-before, 1, device=local.device)  # counted from the step's first
            places = token + torch.where(token < 0, old, new)
            held = Places(rows, len(self.seqs), before, self._cache._spec.heads, P, local.device) if rows else None
            self._found[block] = held, places, position + (token - local) >= 0
        return self._found[block]


class SparseLayerStep(LayerStep):
    """One layer of a step of a `SparseCache`: a `qkv.call.keys.LayerCache` with entries.

    Parameters
    ----------
    step : SparseStep
    layer : int
    """

    __slots__ = ()

    _step: SparseStep

    @property
    def stride(self) -> int:
        """Tokens from one entry to the next."""
        return self._step._cache.stride

    def blocks(self, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor] | None:
        """The last `block` tokens at each entry that the step completes, to be compressed; None where it has none.

        Parameters
        ----------
        k, v : Tensor
            As for `append`, before it is called.
        block : int
            A multiple of stride.

        Returns
        -------
        (Tensor, Tensor), shapes (1, Hc, E, block, D) and (1, Hc, E, block, Dv)
            Of the first compressed_heads heads. Tokens before a sequence's first are 0.
        """
        cache = self._step._cache
        before, places, real = self._step._blocks(block)
        if not len(places):
            return None
        found = []
        for plane, x in zip(cache._storage.planes[self._layer], (k, v), strict=True):
            parts = [x[:, : cache.compressed_heads].transpose(0, 1).flatten(1, 2)]
            if before is not None:
                heads, P = plane.data.shape[1:3]
                index = before.rows(heads, P, False).view(before.shape[0], heads, -1)[:, : cache.compressed_heads]
                parts.insert(0, cache._storage.read_rows(plane, index.transpose(0, 1).flatten(1)))
            tokens = torch.cat(parts, dim=1)[:, places]  # (Hc, E, block, width)
            found.append(torch.where(real[..., None], tokens, 0)[None])
        return found[0], found[1]

    def append(
        self,
        k: Tensor,
        v: Tensor,
        index: Tensor | None = None,
        *,
        compressed: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Store the step's keys, values and entries in this layer.

        Parameters
        ----------
        k, v, index, compressed
            As for `SparseCache.append`.
        """
        step, tokens = self._step, self._begun(k)
        more = {"lengths": step.lengths, "tokens": tokens, "index": index, "compressed": compressed}
        step._cache.append(step.seqs, k, v, self._layer, **more)

    def entries(self) -> KVView:
        """All entries of the sequences in this layer, the step's own among them."""
        return self._step._cache.entries(self._step.seqs, self._layer)


class PagedSparseCache(SparseCache, PagedCache):
    """A `SparseCache` on pages."""

    _name = "SparseCache"


class DenseSparseCache(SparseCache, DenseCache):
    """A dense `SparseCache`."""

    _name = "SparseCache"
