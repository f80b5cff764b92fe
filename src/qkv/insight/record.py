"""What is known of one call: statistics of its weights, and how it was made. `Trace` is this with what it can do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from qkv.call.statistics import Statistics
from qkv.insight.held import Held


class Shapes(NamedTuple):
    """The sizes of a call; of a cache's view with sequences of unequal lengths Lq and Lk are the largest."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int


class Pages(NamedTuple):
    """The page tables of a cache's view: key j of sequence i is in slot j % size of page tables[i][j // size]."""

    size: int
    pool: int
    """Pages of the pool, used by these sequences or not."""
    tables: tuple[tuple[int, ...], ...]
    """Pages of each sequence, in order; -1: given back."""


class Head(NamedTuple):
    """One head of one batch row; means are over the rows that see something and are not NaN."""

    head: int
    kv_head: int
    entropy: float
    """Mean, in nats."""
    effective: float
    """Mean of exp(entropy): as many keys, evenly weighted, have a row's entropy."""
    largest: float
    """Mean of the rows' largest weights."""
    score: float
    """The largest score of all rows."""
    first: float
    """The share of all mass that key 0 takes; NaN where mass was not asked for."""
    learned: float
    """The mean weight of the learned sink."""
    distance: float
    """Mean distance in tokens between a query and what it looks at; NaN where it was not asked for."""
    sharp: float
    """The share of rows whose largest weight exceeds 0.99."""
    flat: float
    """Mean entropy over the largest possible, log(visible keys), on sampled rows; NaN where none sees two keys."""
    dead: int
    """Rows that see no key."""
    bad: int
    """Rows that are NaN."""
    twin: int | None
    """An earlier head that does the same."""


_FOUND = ("held", "table", "warnings", "verdict")  # not a part of the value, or found from the other fields


@dataclass(frozen=True, eq=False)
class Record:
    """The fields of a `Trace`."""

    shapes: Shapes
    dtype: str
    device: str
    backend: str
    plan: str
    mask: str
    """The mask as an expression."""
    mask_words: str
    cover: Tensor
    """uint8 (rows, columns), at most 64 each, of batch row 0 and head 0: 0 hidden, 1 partly visible, 2 visible."""
    visible: Tensor
    """int64 (B, H, n): how many keys the rows `sampled` see."""
    sampled: Tensor
    """int64 (n,): some rows, from the first to the last."""
    positions: Tensor
    """int64 (B or 1, Lq)."""
    scale: float
    softcap: float | None
    bias: tuple[str, ...]
    sinks: Tensor | None
    """(H,): the learned sinks' scores."""
    heads: tuple[int, ...]
    """Which query heads of the call these are; `head=` below is one of them."""
    lengths: tuple[tuple[int, int], ...]
    """Queries and keys of each batch row."""
    statistics: Statistics
    key_norms: Tensor
    """float32 (B, Hkv, Lk)."""
    value_norms: Tensor
    tokens: tuple[str, ...] | None = None
    """Of the keys."""
    query_tokens: tuple[str, ...] | None = None
    pages: Pages | None = None
    flops: int = 0
    bytes: int = 0
    seed: int | None = None
    table: tuple[tuple[Head, ...], ...] = ()
    """Of each batch row, its heads at a glance."""
    warnings: tuple[str, ...] = ()
    """What looks wrong, each with what to do about it."""
    verdict: str = ""
    """The call in a sentence."""
    held: Held | None = field(default=None, repr=False)

    def group_of(self, head: int) -> int:
        """The key/value head that a traced query head reads.

        Parameters
        ----------
        head : int

        Returns
        -------
        int
        """
        return head // (self.shapes.Hq // self.shapes.Hkv) if self.shapes.Hkv else 0

    def equals(self, other: Record) -> bool:
        """Whether everything but the tensors held is the same, bit for bit.

        Parameters
        ----------
        other : Record

        Returns
        -------
        bool
        """
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name not in _FOUND)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        both = a.dtype == b.dtype and a.shape == b.shape
        return both and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Statistics) and isinstance(b, Statistics):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(type(a) is type(b) and a == b)
