"""A paged cache that several processes hold together: each has some pages of every sequence, and all have the books.

A page of the books, a stripe, is `page_size` tokens on each rank, one rank's after the other's::

    tokens   0 .. P - 1   P .. 2 P - 1   2 P .. 3 P - 1   3 P ..
    rank         0              1              0             1          of two: stripes are 2 P tokens

so that tables, sharing, forks and what a step needs are the same on all ranks, who need not ask each other: a pool that
is full is full everywhere. A rank's view has the table of all pages, -1 for those of others, and a mask that hides
these; keys keep their numbers, and so masks and biases mean what they always do.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks
from qkv.cache.paged import PagedCache
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.spec import Spec
from qkv.cache.stats import Stats
from qkv.cache.storage import Places, Storage
from qkv.call.keys import KVLayout
from qkv.checks import given_as, shown
from qkv.distributed.agreement import Told, agree, agree_once, together
from qkv.distributed.shards import Shards
from qkv.distributed.striped import Arriving, Striped
from qkv.distributed.transport import check_device, groups_of
from qkv.distributed.views import ShardedView
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks import Mask
from qkv.masks.stripes import Stripes


@dataclass(frozen=True)
class ShardedStats(Stats):
    """What a cache of several ranks holds: its figures are sums over the ranks, and `ranks` has those of each.

    Parameters
    ----------
    ranks : tuple of Stats
        In the order of the mesh; their pages are of `page_size` tokens on one rank.
    """

    ranks: tuple[Stats, ...] = ()

    def __str__(self) -> str:
        rows = [
            f"  rank {rank:<7}{part.tokens:>10,}  tokens, {part.pages_used:,} of {part.pages:,} pages used"
            for rank, part in enumerate(self.ranks)
        ]
        return "\n".join([super().__str__(), *rows])


class ShardedCache(PagedCache):
    """Keys and values of every sequence on pages of all ranks of a mesh: what one machine cannot hold, or read in time.

    Pages are dealt in turn, so that ranks hold equally much of each sequence but for one page, and each reads what it
    holds. All ranks make the same calls; none of them waits for another but `attention` over a view, `append` with
    shards, and `stats`. Everything else is as in `qkv.cache.PagedCache`: prefixes shared by tokens, forks, eviction,
    windows, swapping, steps.

    Parameters
    ----------
    mesh : DeviceMesh
        Of one dimension.
    pages : int
        Of each rank's pool; together they hold mesh.size() * pages * page_size tokens.
    page_size : int
        P, tokens of a page on one rank. Prefixes are shared, and pages taken, by mesh.size() * P tokens: one page on
        each rank (`cache.page_size`).
    num_kv_heads, head_dim, value_dim, layers, window, sinks, dtype, storage, device, identity, debug
        As of `qkv.cache.PagedCache`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, a mesh of another kind, or other arguments than on the other ranks.
    RankError
        A rank did not answer when the cache was made.

    Notes
    -----
    Cost: a step of decoding reads about 1 / n of the keys on each of n ranks, and sends rows * Hq * (Dv + 4) float32
    numbers to each other rank in each layer. `append` with keys that all ranks have sends nothing; with `shards=` each
    row moves at most once, to the rank that stores it: T * Hkv * (D + Dv) * (n - 1) / n numbers a sequence over all.
    Source: partial results joined as in Dao et al. (2023), "Flash-Decoding".

    Examples
    --------
    A process alone is a mesh of one rank; `torchrun` makes more of the same program.

    >>> import os, tempfile, torch, qkv, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> cache = ShardedCache(
    ...     mesh=init_device_mesh("cpu", (1,)), pages=8, num_kv_heads=2, head_dim=16, dtype=torch.float32
    ... )
    >>> seq = cache.add()
    >>> cache.append([seq], torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16))
    >>> qkv.attention(torch.randn(1, 4, 1, 16), cache.view([seq])).shape
    torch.Size([1, 4, 1, 16])
    >>> cache.stats().tokens
    40
    >>> dist.destroy_process_group()
    """

    _storage: Striped

    def __init__(
        self,
        *,
        mesh: Any,
        pages: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        page_size: int = 16,
        layers: int = 1,
        window: int | None = None,
        sinks: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        identity: str | bytes | int | None = None,
        debug: bool = False,
    ) -> None:
        call = "qkv.distributed.ShardedCache()"
        groups = groups_of(call, mesh)
        if len(groups) != 1:
            fix = "Take one dimension of it: mesh['context']"
            raise ArgumentError.of(call, "mesh must have one dimension", f"{len(groups)} dimensions", fix)
        self._group = groups[0]
        with together(groups):
            self._slots = checks.size(call, "page_size", page_size)
            super().__init__(
                pages=pages,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                value_dim=value_dim,
                page_size=self._slots * self._group.size,
                layers=layers,
                window=window,
                sinks=sinks,
                dtype=dtype,
                storage=storage,
                device=device,
                identity=identity,
                debug=debug,
            )
            check_device(call, self._group, torch.empty(0, dtype=torch.uint8, device=self.device))
        same = pages, num_kv_heads, head_dim, value_dim, page_size, layers, window, sinks, dtype, storage, identity
        agree(groups, Told.of(repr(same)))
        self._stripes: dict[int, Mask] = {}

    def _stored(self, spec: Spec, pages: int, page_size: int) -> Storage:
        return Striped(spec, pages, page_size // self._group.size, self._group)

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
        shards: Shards | None = None,
    ) -> None:
        """Store the keys and values of a step's tokens in one layer; the last layer ends the step.

        Parameters
        ----------
        seqs, layer, lengths, tokens
            As of `PagedCache.append`; the same on all ranks.
        k : Tensor, shape (n, Hkv, T, D), or (n, Hkv, rows, D) with shards
            The keys of all tokens, on every rank; or those that this rank holds.
        v : Tensor
            Likewise, of Dv.
        index
            Not of this cache.
        shards : Shards
            Who holds which of the T tokens, as `qkv.distributed.attention` left them. Rows go to the ranks that store
            them.

        Raises
        ------
        PagesExhausted
            Too few free pages, on all ranks; nothing was changed on any.
        ShapeError, ArgumentError, ArgumentTypeError
            Arguments that do not fit; nothing was changed.
        RankError
            With shards: a rank did not answer.
        """
        if shards is None:
            super().append(seqs, k, v, layer, lengths=lengths, tokens=tokens, index=index)
            return
        with together((self._group,)):
            whole = self._arrive(k, v, shards, lengths)
            sizes = [(*x.shape[:2], x.shape[3], x.dtype) for x in (k, v)]
            steps = [(seq._number, seq._length) for seq in seqs]
            told = Told.of(f"append k and v {sizes} layer={layer} sequences={steps} shards={shards.ranges}")
        agree_once((self._group,), told)
        try:
            super().append(seqs, *whole, layer, tokens=tokens, index=index)
        finally:
            self._storage.arriving = None

    def _arrive(self, k: Any, v: Any, shards: Any, lengths: Any) -> tuple[Tensor, Tensor]:
        """Leave the rank's rows to the storage; what stands for those of all ranks, without memory."""
        call, group = "ShardedCache.append()", self._group
        if not isinstance(shards, Shards):
            fix = "Pass qkv.distributed.Shards.zigzag(T, ranks), or those that the prompt was computed with"
            raise ArgumentTypeError.of(call, "shards must be a Shards", given_as("shards", shards), fix)
        if shards.ranks != group.size or lengths is not None:
            rule = "shards are for a step of equally many tokens, and for the ranks of the cache"
            given = f"shards of {shards.ranks} ranks, {group.size} ranks, lengths={shown(lengths)}"
            raise ArgumentError.of(call, rule, given, "Append sequences of other lengths one by one")
        rows, made = shards.rows(group.rank), []
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] != rows:
                given = f"{name} {tuple(x.shape)}" if isinstance(x, Tensor) else given_as(name, x)
                rule = f"{name} must hold the rows of this rank, (n, Hkv, {rows}, width)"
                raise ShapeError.of(call, rule, given, "Pass the rows that shards says the rank holds")
            made.append(x.detach().new_zeros(()).expand(*x.shape[:2], shards.length, x.shape[3]))
        self._storage.arriving = Arriving(k, v, shards)
        return made[0], made[1]

    def view(self, seqs: Ordered[Sequence], layer: int = 0, *, lengths: Any = None) -> ShardedView:  # type: ignore[override]
        """All keys and values of one layer that were appended, on the pages of all ranks.

        Parameters
        ----------
        seqs, layer, lengths
            As of `PagedCache.view`; the same on all ranks.

        Returns
        -------
        ShardedView
            For `qkv.attention(q, view)`, which all ranks call together.

        Notes
        -----
        Cost: a table of all pages is written once a step, 4 bytes a page.
        """
        view = super().view(seqs, layer, lengths=lengths)
        longest = max(view.layout.lengths, default=0)
        blocks = 1 << max(-(-longest // self._slots) - 1, 0).bit_length()  # few masks, as a cache grows
        mask = self._stripes.get(blocks)
        if mask is None:
            own: Mask = Stripes(self._slots, self._group.size, self._group.rank, blocks)
            mask = self._stripes[blocks] = own if self._held is None else own & self._held
        return ShardedView(view._replace(held=mask), self._group)

    def stats(self) -> ShardedStats:
        """Figures of the cache on all ranks, as it is now; str() of them is a readable table. All ranks ask together.

        Returns
        -------
        ShardedStats

        Raises
        ------
        ArgumentError
            The ranks have not made the same calls.
        RankError
            A rank did not answer.
        """
        own, group, waste = super().stats(), self._group, self._empty_slots()
        own = replace(
            own,
            page_size=self._slots,
            tokens=own.pages_used * self._slots - waste,
            waste_tokens=waste,
            waste_bytes=waste * own.bytes_per_token,
        )
        books = repr([(seq._number, seq._length, seq._table.tolist()) for seq in self._seqs])
        agree((group,), Told.of(f"{len(self._seqs)} sequences, {own.pages_used} pages, books {books}"))
        summed = ("pages", "pages_used", "pages_shared", "pages_cached", "pages_free", "tokens", "waste_tokens",
                  "waste_bytes", "bytes")  # fmt: skip
        mine = torch.tensor([getattr(own, name) for name in summed], dtype=torch.int64, device=self.device)
        found = [x.tolist() for x in group.gather("stats of a cache", mine)]
        ranks = tuple(replace(own, **dict(zip(summed, each, strict=True))) for each in found)
        values = {field.name: getattr(own, field.name) for field in fields(Stats)}
        values |= {name: sum(each) for name, each in zip(summed, zip(*found, strict=True), strict=True)}
        return ShardedStats(**values, ranks=ranks)

    # ---- what differs from pages that one process has

    def _places(self, step: Unfinished) -> Places:
        return self._storage.own(step)

    def _layout(self, seqs: Any, layer: int, lengths: Any) -> KVLayout:
        books, n, rank, P = super()._layout(seqs, layer, lengths), self._group.size, self._group.rank, self._slots
        tables, starts = array("i"), array("q", [0])
        for i, length in enumerate(books.lengths):
            stripes = books.tables[books.starts[i] : books.starts[i + 1]]
            own = array("i", [-1]) * (len(stripes) * n)
            own[rank::n] = stripes
            del own[-(-length // P) :]
            tables.extend(own)
            starts.append(len(tables))
        layout = KVLayout(tables, starts, books.lengths, books.queries, books.clock, books.most)
        self._recent[0].layout = layout
        return layout

    def _empty_slots(self) -> int:
        """Of this rank's pages."""
        P, first = self._slots, self._slots * self._group.rank
        fill: dict[int, int] = {}
        for seq in self._seqs:
            for at, page in enumerate(seq._table):
                if page >= 0:
                    mine = min(max(seq._length - at * self.page_size - first, 0), P)
                    fill[page] = max(fill.get(page, 0), mine)
        return sum(P - used for used in fill.values())
