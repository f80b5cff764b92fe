"""A mask for a part of a call: some of its keys and some of its queries, counted from 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.checks import integer
from qkv.errors import ShapeError
from qkv.masks.base import Composed, Mask, decoded
from qkv.masks.intervals import INFINITE, Cuts, Rows, Spans
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.tile import Sizes, Tile


@dataclass(frozen=True, eq=False, repr=False)
class Portion(Composed, op=17):
    """What `part` shows of the keys from `first_key` on to the queries from `first_query` on; made by `portion`.

    A portion of an expression has the portions of its leaves as its leaves.
    """

    part: Mask
    first_key: int
    first_query: int
    Lq: int
    Lk: int

    @property
    def parts(self) -> tuple[Mask, ...]:  # type: ignore[override]
        return (self.part,)

    @property
    def fits_any_length(self) -> bool:
        return False

    def check(self, call: str, sizes: Sizes) -> None:
        for side, first, own, whole in (
            ("keys", self.first_key, sizes.Lk, self.Lk),
            ("queries", self.first_query, sizes.Lq, self.Lq),
        ):
            if first + own > whole:
                rule = f"a portion of a mask must lie within the {side} of the whole"
                given = f"{own} {side} from number {first} on and {whole} of the whole"
                raise ShapeError.of(call, rule, given, f"Pass at most {max(whole - first, 0)} {side}")
        self.part.check(call, self._whole(sizes))

    def _whole(self, sizes: Sizes) -> Sizes:
        return sizes._replace(Lq=self.Lq, Lk=self.Lk)

    def words(self) -> str:
        return f"{self.part.words()}, where keys count from {self.first_key:,}"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        there = at._replace(i=at.i + self.first_query, p=at.p + self.first_key, j=at.j + self.first_key)
        return self.part.visible(there, self._whole(sizes))

    def _of(self, leaf: Rule) -> Rule:
        """The same portion of another mask."""
        if leaf is self.part:
            return self
        assert isinstance(leaf, Mask)
        return leaf if leaf._by_distance else Portion(leaf, self.first_key, self.first_query, self.Lq, self.Lk)

    def _leaves(self, h: int) -> list[Rule]:
        return [self._of(leaf) for leaf in self.part._leaves(h)]

    def _decide(self, h: int, leaves: dict[Rule, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        known = leaves.get(self)
        return known or self.part._decide(h, {leaf: leaves[self._of(leaf)] for leaf in self.part._leaves(h)})

    # Of a portion of a leaf.
    def _cuts(self, b: int) -> Cuts | None:
        cuts = self.part._cuts(b)
        if cuts is None:
            return None
        first = self.first_query if cuts.by_index else self.first_key
        return cuts._replace(at=None if cuts.at is None else cuts.at - first, shift=cuts.shift + first)

    def _spans(self, rows: Rows) -> Spans:
        p, i = rows.p + self.first_key, rows.i + self.first_query
        spans = self.part._spans(rows._replace(p=p, i=i, Lq=self.Lq, Lk=self.Lk))
        lo, hi = (torch.where(end.abs() == INFINITE, end, end - self.first_key) for end in (spans.lo, spans.hi))
        return spans._replace(lo=lo, hi=hi)

    def _period(self) -> tuple[int, int] | None:
        return self.part._period()

    @property
    def _has_ranges(self) -> bool:
        return self.part._has_ranges

    # Lowered: the numbers, and the part; before it, for a kernel, its length.
    def _lower(self, builder: Builder) -> None:
        outer, builder.words = builder.words, []
        self.part._lower(builder)
        inner, builder.words = builder.words, outer
        builder.emit(self.op, *self._numbers(), len(inner), *inner)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        first_key, first_query, Lq, Lk = (next(words) for _ in range(4))
        return cls(decoded(words, tensors), first_key, first_query, Lq, Lk)

    def _numbers(self) -> tuple[int, ...]:
        return self.first_key, self.first_query, self.Lq, self.Lk

    def _for_head(self, h: int) -> Rule:
        return self._of(self.part._for_head(h))

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        return self._of(self.part.of_heads(start, stop, Hq))

    def __repr__(self) -> str:
        where = f"first_key={self.first_key}, first_query={self.first_query}, Lq={self.Lq}, Lk={self.Lk}"
        return f"portion({self.part!r}, {where})"


def portion(mask: Mask, *, first_key: int, first_query: int, Lq: int, Lk: int) -> Mask:
    """The mask that a part of a call has to be given, for each query to see what it sees in the whole.

    Key j of the part is key first_key + j of the whole, query i is query first_query + i, and a query at position p of
    the part stands at p + first_key of the whole: p - j is the same in both, and so are biases that go by it.

    Parameters
    ----------
    mask : Mask
        Of the whole call.
    first_key, first_query : int >= 0
        Where the part begins.
    Lq, Lk : int >= 0
        The numbers of queries and keys of the whole call.

    Returns
    -------
    Mask
        The same one where it looks at p - j alone: causal, windows, strided, dilated, and what is composed of them.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        Numbers of another kind.
    ShapeError
        At use: a part that reaches beyond the whole.

    Notes
    -----
    Cost: that of the mask. A mask that holds tensors of the whole call holds them still.

    Examples
    --------
    >>> import qkv
    >>> from qkv.masks import portion
    >>> whole = qkv.prefix(3) | qkv.chunked(4)
    >>> part = portion(whole, first_key=2, first_query=5, Lq=8, Lk=8)
    >>> whole.tensor(8, 8)[:, :, 5:8, 2:6].equal(part.tensor(3, 4, positions=5 - 2))
    True
    """
    call = "portion()"
    first_key, first_query, Lq, Lk = (
        integer(call, name, x)
        for name, x in (("first_key", first_key), ("first_query", first_query), ("Lq", Lq), ("Lk", Lk))
    )
    return mask if mask._by_distance else Portion(mask, first_key, first_query, Lq, Lk)
