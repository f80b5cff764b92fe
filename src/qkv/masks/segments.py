"""Masks that know lengths: padding, and documents packed into one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.checks import Operand, integers, lookup, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks.base import Mask
from qkv.masks.intervals import INFINITE, Cuts, Rows, Spans, column, groups
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.shapes import check_batch
from qkv.masks.tile import Sizes, Tile

__all__ = ["documents", "padding"]


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask, op=3):
    """j is one of the row's real keys; made by `padding`."""

    lengths: Operand
    side: str

    @property
    def varies_by_batch(self) -> bool:
        return self.lengths.tensor.numel() > 1

    def check(self, call: str, sizes: Sizes) -> None:
        check_batch(call, "padding(lengths)", self.lengths, sizes.B)
        longest = int(self.lengths.tensor.max()) if sizes.B else 0
        if longest > sizes.Lk:
            rule = "padding(lengths) must be at most the number of keys"
            raise ShapeError.of(call, rule, f"a length of {longest} and Lk={sizes.Lk}", "Pass lengths in 0..Lk")

    def words(self) -> str:
        return "the real keys of its batch row, no padding"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        length = self.lengths.on(at.b.device)[at.b]
        return at.j < length if self.side == "right" else at.j >= sizes.Lk - length

    def _spans(self, rows: Rows) -> Spans:
        length = int(self.lengths.tensor[rows.b])
        if self.side == "right":
            return Spans(column(-INFINITE), column(length))
        return Spans(column(rows.Lk - length), column(INFINITE))

    def _lower(self, builder: Builder) -> None:
        builder.emit(self.op, builder.operand(self.lengths.tensor), int(self.side == "left"))

    def _numbers(self) -> tuple[int, ...]:
        return (int(self.side == "left"),)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return padding(next(tensors), side="left" if next(words) else "right")

    def __repr__(self) -> str:
        return f"padding({self.lengths!r}{', side=' + repr(self.side) if self.side != 'right' else ''})"


def padding(lengths: Any, side: str = "right") -> Padding:
    """Hides the keys that are padding: batch row b has lengths[b] real keys, at the left end unless padded on the left.

    Parameters
    ----------
    lengths : B ints in 0..Lk
        A list or a 1-D tensor.
    side : "right" or "left"
        Where the padding is: "right" shows j < lengths[b], "left" shows j >= Lk - lengths[b].

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        Lengths or a side of another kind; at use a number of lengths that is not B, or one beyond Lk.

    Notes
    -----
    It hides keys only: queries at padding are computed as any other (a row without any visible key is 0).
    Cost: keys outside are never visited.

    Examples
    --------
    >>> import qkv
    >>> print(qkv.padding([2]).picture(2, 4))
    p/j 0 1 2 3
      0 ■ ■ · ·
      1 ■ ■ · ·
    """
    if side not in ("right", "left") or not isinstance(side, str):
        rule = 'side must be "right" or "left", the end where the padding is'
        raise ArgumentError.of("qkv.padding()", rule, f"side={shown(side)}", 'Use side="right" or side="left"')
    return Padding(Operand(integers("qkv.padding()", "lengths", lengths)), side)


class Runs(NamedTuple):
    """Where the documents of one row lie: the tokens start..stop-1 belong to document `id` >= 0, in order."""

    start: Tensor
    stop: Tensor
    id: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Axis:
    """The documents along the queries or the keys: lengths (documents,) or ids (rows, L)."""

    lengths: Operand | None
    ids: Operand | None

    @property
    def rows(self) -> int:
        return self.ids.tensor.shape[0] if self.ids is not None else 1

    @property
    def size(self) -> int:
        if self.ids is not None:
            return self.ids.tensor.shape[1]
        return int(self.given.sum())

    @property
    def given(self) -> Tensor:
        """The lengths or the ids, whichever they were given by."""
        operand = self.lengths if self.ids is None else self.ids
        assert operand is not None
        return operand.tensor

    def id_of(self, row: Tensor, at: Tensor) -> Tensor:
        """The document of each token; -1 for none and outside the row."""
        if self.ids is not None:
            return lookup(self.ids.on(at.device), row, at, -1)
        ends = self.given.cumsum(0).to(at.device)
        found = torch.searchsorted(ends, at.contiguous(), right=True)
        return torch.where((at >= 0) & (found < ends.numel()), found, -1)

    def runs(self, row: int) -> Runs:
        """The runs of equal ids >= 0 of one row. Kept, so that planning costs nothing a token after the first call."""
        row = min(row, self.rows - 1)
        kept: dict[int, Runs] = self.__dict__.setdefault("_runs", {})
        if row not in kept:
            if self.ids is not None:
                ids, size = torch.unique_consecutive(self.ids.tensor[row], return_counts=True)
                real = ids >= 0
            else:
                size = self.given
                ids, real = torch.arange(size.numel(), device="cpu"), size > 0
            stop = size.cumsum(0)
            kept[row] = Runs((stop - size)[real], stop[real], ids[real])
        return kept[row]

    def __repr__(self) -> str:
        if self.ids is None:
            return repr(self.lengths)
        return repr(self.ids)[1:-1] if self.rows == 1 else repr(self.ids)

    def _key(self) -> tuple[Any, ...]:
        return self.lengths, self.ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "ids": self.ids}


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask, op=4):
    """The query's document is the key's; made by `documents`."""

    queries: Axis
    keys: Axis
    by_index: bool

    @property
    def depends_on_position(self) -> bool:
        return not self.by_index

    @property
    def varies_by_batch(self) -> bool:
        return max(self.queries.rows, self.keys.rows) > 1

    def check(self, call: str, sizes: Sizes) -> None:
        for side, axis, name, want in (("queries", self.queries, "Lq", sizes.Lq), ("keys", self.keys, "Lk", sizes.Lk)):
            if side == "queries" and not self.by_index:
                continue
            if axis.size != want:
                what = "lengths must sum exactly to" if axis.ids is None else "ids must have length"
                whose = f"the {side}' " if self.by_index else ""
                given = (
                    f"{'lengths that sum to' if axis.ids is None else 'ids of length'} {axis.size} and {name}={want}"
                )
                fix = f"Make {whose}{'lengths sum to' if axis.ids is None else 'ids have length'} {want}"
                if axis.ids is None and not self.by_index:
                    fix += "; for queries of another packing pass documents(lengths, k_lengths)"
                raise ShapeError.of(call, f"documents: {whose}{what} {name}", given, fix)
            if axis.rows not in (1, sizes.B):
                rule = "documents: ids of two dimensions must be (B, L)"
                given = f"ids of {axis.rows} rows and B={sizes.B}"
                raise ShapeError.of(call, rule, given, f"Pass {sizes.B} rows, or one row for all")

    def words(self) -> str:
        return "the keys of its own document"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        mine = self.queries.id_of(at.b, at.i if self.by_index else at.p)
        return (mine == self.keys.id_of(at.b, at.j)) & (mine >= 0)

    def positions(self, align: str) -> Tensor:
        """The position of every query that stands its document on the keys of the same document.

        Parameters
        ----------
        align : "start" or "end"
            "start" stands each document's first query on its first key, "end" its last query on its last key.

        Returns
        -------
        Tensor, int64, shape (1, Lq)

        Raises
        ------
        ArgumentError
            The documents are given by ids, which need not be contiguous.

        Notes
        -----
        Cost: O(Lq).

        Examples
        --------
        >>> import qkv
        >>> qkv.documents([1, 2], [3, 3]).positions("end")
        tensor([[2, 4, 5]])
        """
        call = "documents().positions()"
        if align not in ("start", "end") or not isinstance(align, str):
            raise ArgumentError.of(call, 'align must be "start" or "end"', f"{shown(align)}", "Use one of the two")
        if self.queries.lengths is None or self.keys.lengths is None:
            rule = "positions follow from lengths only"
            raise ArgumentError.of(call, rule, repr(self), "Make the mask with documents(lengths, k_lengths)")
        mine, theirs = self.queries.lengths.tensor, self.keys.lengths.tensor
        with torch.inference_mode(False):  # for training too, wherever they were asked for
            first = theirs.cumsum(0) - theirs
            if align == "end":
                first = first + theirs - mine
            shift = first - (mine.cumsum(0) - mine)
            return (torch.arange(self.queries.size, device="cpu") + shift.repeat_interleave(mine))[None]

    def _cuts(self, b: int) -> Cuts | None:
        start, stop, _ = self.queries.runs(b)
        # Runs that touch share a border; sorted because runs are in order.
        return Cuts(at=torch.stack([start, stop], 1).view(-1), by_index=self.by_index)

    def _spans(self, rows: Rows) -> Spans:
        mine = self._document(rows.i if self.by_index else rows.p, rows.b)
        keys = self._by_document(rows.b)
        begin = torch.searchsorted(keys.id, mine)
        return groups(keys.start, keys.stop, begin, torch.searchsorted(keys.id, mine, right=True))

    def _document(self, at: Tensor, b: int) -> Tensor:
        """The document of the queries at these positions or indices; -1 for none."""
        start, stop, document = self.queries.runs(b)
        if start.numel() == 0:
            return torch.full_like(at, -1)
        run = (torch.searchsorted(start, at, right=True) - 1).clamp(min=0)
        return torch.where((at >= start[run]) & (at < stop[run]), document[run], -1)

    def _by_document(self, b: int) -> Runs:
        """The keys' runs in order of document; those of one document stay in order of position."""
        runs = self.keys.runs(b)
        if self.keys.ids is None:
            return runs
        order = runs.id.argsort(stable=True)
        return Runs(*(x[order] for x in runs))

    def _lower(self, builder: Builder) -> None:
        rows = max(self.queries.rows, self.keys.rows)
        contiguous = True
        for b in range(rows):
            keys = self._by_document(b)
            contiguous &= not bool((keys.id[1:] == keys.id[:-1]).any())
        both = cache(lambda: self._ranges(rows))
        ranges = builder.operand(lambda: both()[0]), builder.operand(lambda: both()[1])
        ids = (-1, -1, 1)
        if not contiguous:
            mine = self._table(self.queries).expand(rows, -1).contiguous()
            theirs = self._table(self.keys)
            ids = (builder.operand(mine), builder.operand(theirs), theirs.shape[0])
        builder.emit(self.op, int(self.by_index), int(contiguous), *ranges, rows, self.queries.size, *ids)

    def _ranges(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where the keys begin and end that each query sees, both (rows, queries); between them may be others."""
        lo, hi = torch.zeros((2, rows, self.queries.size), dtype=torch.int64, device="cpu")
        for b in range(rows):
            keys, queries = self._by_document(b), self.queries.runs(b)
            if keys.id.numel() == 0 or queries.id.numel() == 0:
                continue
            first = torch.searchsorted(keys.id, queries.id)
            after = torch.searchsorted(keys.id, queries.id, right=True)
            some = after > first
            begin = torch.where(some, keys.start[first.clamp(max=keys.id.numel() - 1)], 0)
            end = torch.where(some, keys.stop[(after - 1).clamp(min=0)], 0)
            count = queries.stop - queries.start
            begin, end = begin.repeat_interleave(count), end.repeat_interleave(count)
            if begin.numel() == self.queries.size:  # every token is of a document
                lo[b], hi[b] = begin, end
            else:
                at = self._tokens(queries)
                lo[b, at], hi[b, at] = begin, end
        return lo, hi

    def _numbers(self) -> tuple[int, ...]:
        return int(self.queries.ids is not None), int(self.by_index)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.queries.given, self.keys.given) if self.by_index else (self.queries.given,)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        by_ids, own_keys = next(words), next(words)
        queries, keys = next(tensors), next(tensors) if own_keys else None
        return documents(segment_ids=queries, k_segment_ids=keys) if by_ids else documents(queries, keys)

    @staticmethod
    def _tokens(runs: Runs) -> Tensor:
        """The index of every token of the runs."""
        count = runs.stop - runs.start
        shift = runs.start - (count.cumsum(0) - count)
        return torch.arange(int(count.sum()), device="cpu") + shift.repeat_interleave(count)

    @staticmethod
    def _table(axis: Axis) -> Tensor:
        if axis.ids is not None:
            return axis.ids.tensor
        lengths = axis.given
        return torch.arange(lengths.numel(), device="cpu").repeat_interleave(lengths)[None]

    def __repr__(self) -> str:
        names = ("segment_ids", "k_segment_ids") if self.queries.ids is not None else ("", "k_lengths")
        axes = (self.queries, self.keys) if self.by_index else (self.queries,)
        parts = [repr(a) for a in axes]
        if self.queries.ids is not None:
            parts = [f"{name}={part}" for name, part in zip(names, parts, strict=False)]
        return f"documents({', '.join(parts)})"


def documents(
    lengths: Any = None, k_lengths: Any = None, *, segment_ids: Any = None, k_segment_ids: Any = None
) -> Documents:
    """Each query sees the keys of its own document: sequences packed into one row ("varlen").

    Parameters
    ----------
    lengths : ints >= 0
        Tokens of each document in order, the same for all batch rows; they sum to Lk exactly. A query belongs to
        the document at its position, so that one mask serves the whole row and chunks of it.
    k_lengths : ints >= 0
        As many. Then `lengths` are the queries' (sum Lq) and these the keys' (sum Lk), and a query's document is
        that of its index. `mask.positions("end")` gives the positions for ``& causal()``.
    segment_ids, k_segment_ids : ints, shape (L,) or (B, L)
        Instead of lengths, the document of every token. Documents need not be contiguous; tokens of a negative id see
        nothing and are seen by nothing.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        Both or neither of lengths and ids, or values of another kind; at use sums or lengths that do not fit the
        tensors.

    Notes
    -----
    Positions count along the packed row; a query at a position outside it sees nothing.
    Cost: the sum of Lq Lk over the documents.
    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination".

    Examples
    --------
    >>> import qkv
    >>> print((qkv.documents([2, 3]) & qkv.causal()).picture(5, 5))
    p/j 0 1 2 3 4
      0 ■ · · · ·
      1 ■ ■ · · ·
      2 · · ■ · ·
      3 · · ■ ■ ·
      4 · · ■ ■ ■
    """
    call = "qkv.documents()"
    if (lengths is None) == (segment_ids is None):
        given = "neither" if lengths is None else "both"
        fix = "Pass documents(lengths) or documents(segment_ids=...)"
        raise ArgumentTypeError.of(call, "documents are given by lengths or by segment_ids", given, fix)
    if (k_lengths is not None and lengths is None) or (k_segment_ids is not None and segment_ids is None):
        given = "segment_ids with k_lengths" if lengths is None else "lengths with k_segment_ids"
        fix = "Pass documents(lengths, k_lengths) or documents(segment_ids=..., k_segment_ids=...)"
        raise ArgumentTypeError.of(call, "queries and keys must be given in the same way", given, fix)
    if lengths is not None:
        queries = Axis(_lengths(call, "lengths", lengths), None)
        if k_lengths is None:
            return Documents(queries, queries, by_index=False)
        keys = Axis(_lengths(call, "k_lengths", k_lengths), None)
        counts = queries.given.numel(), keys.given.numel()
        if counts[0] != counts[1]:
            rule = "lengths and k_lengths must name the same documents"
            given = f"{counts[0]} lengths and {counts[1]} k_lengths"
            raise ShapeError.of(call, rule, given, "Pass 0 for a document without queries or keys")
        return Documents(queries, keys, by_index=True)
    queries = _ids(call, "segment_ids", segment_ids)
    if k_segment_ids is None:
        return Documents(queries, queries, by_index=False)
    keys = _ids(call, "k_segment_ids", k_segment_ids)
    if queries.rows != keys.rows and 1 not in (queries.rows, keys.rows):
        rule = "segment_ids and k_segment_ids must be of the same batch"
        given = f"{queries.rows} and {keys.rows} rows"
        raise ShapeError.of(call, rule, given, "Pass (B, Lq) and (B, Lk), or one row for all")
    return Documents(queries, keys, by_index=True)


def _lengths(call: str, name: str, given: Any) -> Operand:
    nested = (
        given.ndim > 1 if isinstance(given, Tensor) else isinstance(given, (list, tuple)) and any(map(_many, given))
    )
    if nested:
        ids = name.replace("lengths", "segment_ids")
        rule = f"{name} are those of one packed row, shared by the batch"
        fix = (
            f"Where rows differ pass {ids}=, (B, L), each token's document: "
            "torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])"
        )
        raise ShapeError.of(call, rule, f"{name}={shown(given)}", fix)
    return Operand(integers(call, name, given))


def _many(x: Any) -> bool:
    return isinstance(x, (list, tuple)) or getattr(x, "ndim", 0) > 0


def _ids(call: str, name: str, given: Any) -> Axis:
    ids = integers(call, name, given, low=None, dims=(1, 2))
    return Axis(None, Operand(ids.view(1, -1) if ids.ndim == 1 else ids))
