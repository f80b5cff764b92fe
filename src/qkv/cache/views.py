"""What caches hand out: views of the keys that lie in them, and copies of their summaries."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered
from typing import Any

from qkv.cache import checks
from qkv.cache.ledger import Ledger, Recent
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.state import check_seqs, refuse_layer
from qkv.cache.summaries import Filled
from qkv.call.keys import KVLayout, KVView
from qkv.call.summaries import Summaries, summaries_of
from qkv.errors import ArgumentError

_INT = frozenset((int,))
_RECENT = 4  # layouts kept for the layers to come: one for each group of sequences that a model steps apart


class Views(Ledger):
    """The views of a cache's sequences."""

    def view(self, seqs: Ordered[Sequence], layer: int = 0, *, lengths: Any = None) -> KVView:
        """All keys and values of one layer that were appended, an unfinished step's among them, where they lie.

        Parameters
        ----------
        seqs : list of Sequence
            Each once; the rows of q are theirs, in this order.
        layer : int
        lengths : list of int
            Ragged queries: how many each sequence has, packed as q (1, Hq, sum, D).

        Returns
        -------
        KVView
            For `qkv.attention(q, view)`. It ends when a page that it may name is given back, overwritten or moved:
            attention refuses it then.

        Notes
        -----
        Cost: the layout is made once a step, and about 1 microsecond in each further layer. No key is copied.
        """
        if layer.__class__ is not int or layer < 0 or layer >= self.layers:
            refuse_layer(self, "view", layer)
        self._mend()
        names = tuple(seqs) if seqs.__class__ is list else seqs if seqs.__class__ is tuple else None
        counts = lengths
        if lengths is not None:  # 1.0 and True equal 1, and are refused: they must not be found here
            counts = (
                tuple(lengths) if lengths.__class__ in (list, tuple) and _INT.issuperset(map(type, lengths)) else ...
            )
        for recent in self._recent:
            if recent.seqs == names and recent.lengths == counts:
                for step, included in recent.steps:
                    if (layer < step.next) != included:
                        break
                else:
                    layout = recent.layout
                    break
        else:
            layout = self._layout(seqs, layer, lengths)
        storage = self._storage
        kept = storage.summaries[layer].kept if storage.summaries else None
        return KVView(*storage.parts[layer], layout, self._held, kept)

    def index_view(self, seqs: Ordered[Sequence], layer: int = 0, *, lengths: Any = None) -> KVView:
        """The index keys of one layer, where they lie, for `qkv.select_tokens`: a view of one head without values.

        Parameters
        ----------
        seqs, layer, lengths
            As for `view`.

        Returns
        -------
        KVView
            It lives as long as a `view` does.

        Raises
        ------
        ArgumentError
            A cache without index_dim=.
        """
        view, parts = self.view(seqs, layer, lengths=lengths), self._storage.index_parts
        if parts is None:
            rule, fix = "only a cache with index_dim= holds index keys", "Build the cache with index_dim="
            raise ArgumentError.of(f"{self._name}.index_view()", rule, "index_dim=0", fix)
        return KVView(*parts[layer], view.layout, view.held)

    def summaries(self, seqs: Ordered[Sequence], layer: int = 0) -> Summaries:
        """The mean, minimum and maximum of the keys of each full block, in a cache with summaries=.

        Parameters
        ----------
        seqs, layer
            As for `view`.

        Returns
        -------
        qkv.Summaries
            Copies, float32 (n, Hkv, blocks, D), and how many blocks of each sequence are full; past them, and where
            the cache gave keys back, everything is 0.

        Raises
        ------
        ArgumentError
            A cache without summaries=.

        Notes
        -----
        Cost: a copy. `qkv.select_blocks(q, view)` reads them where they lie.
        """
        view = self.view(seqs, layer)
        if view.summaries is None:
            rule, fix = "only a cache with summaries= keeps them", "Build the cache with summaries=64, or another block"
            raise ArgumentError.of(f"{self._name}.summaries()", rule, "no summaries=", fix)
        return summaries_of(view)

    def _filled(self, step: Unfinished) -> Filled | None:
        """The blocks that a step fills, where there are some and summaries are kept."""
        block = self._spec.summaries
        if not block:
            return None
        rows = [(seq._table, seq._length, end) for seq, end in zip(step.seqs, step.ends, strict=True)]
        filled = Filled(rows, block, self.page_size, self.device)
        return filled if filled.count else None

    def _layout(self, seqs: Any, layer: int, lengths: Any) -> KVLayout:
        call = f"{self._name}.view()"
        names = check_seqs(self, call, seqs)
        counts = None if lengths is None else checks.counts(call, "lengths", lengths, len(names))
        P = self.page_size
        tables, starts, held = array("i"), array("q", [0]), array("q")
        steps: dict[Unfinished, bool] = {}
        for seq in names:
            length, table, step = seq._length, seq._table, seq._step
            if step is not None:
                steps[step] = layer < step.next
                if layer < step.next:
                    length = seq._end
            pages = -(-length // P)
            tables.extend(table if len(table) == pages else table[:pages])
            starts.append(len(tables))
            held.append(length)
        queries = most = None
        if counts is not None:
            queries = array("q", counts)
            for seq, count, length in zip(names, counts, held, strict=True):
                if count > length or not self._reaches(seq, length - count):
                    self._refuse_queries(call, seq, count, length)
        elif self.window is not None:
            short = [(seq, length) for seq, length in zip(names, held, strict=True) if seq._gone > self._pinned]
            most = min((length - (seq._gone * P + self.window - 1) for seq, length in short), default=None)
        layout = KVLayout(tables, starts, held, queries, self.clock, most)
        recent = Recent(names, counts, list(steps.items()), layout)
        self._recent = [recent, *self._recent[: _RECENT - 1]]
        return layout

    def _reaches(self, seq: Sequence, position: int) -> bool:
        """Whether all keys before `position` that a query there sees are still stored."""
        if self.window is None or position == 0 or seq._gone <= self._pinned:
            return True
        first = max((position - self.window + 1) // self.page_size, self._pinned)
        return first >= seq._gone or position <= self._pinned * self.page_size

    def _refuse_queries(self, call: str, seq: Sequence, count: int, length: int) -> None:
        given = f"{count} queries of {seq!r} with {length} keys"
        if count > length:
            rule, fix = "queries are the last of a sequence's tokens", "Append their keys first, or pass fewer"
        else:
            rule = f"the queries' window of {self.window} keys must still be stored"
            fix = "Ask for the queries of the last step only"
        raise ArgumentError.of(call, rule, given, fix)
