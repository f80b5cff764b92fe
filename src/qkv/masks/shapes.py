"""Masks that are a rule about two positions: causal, windows, prefix, chunks, strides, global tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkv.checks import LIMIT, Operand, integer, integers, whole
from qkv.errors import ArgumentError, ShapeError
from qkv.masks.base import Mask
from qkv.masks.intervals import INFINITE, Cuts, Rows, Spans, column, groups
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.tile import Sizes, Tile

__all__ = [
    "causal",
    "chunked",
    "dilated",
    "global_tokens",
    "prefix",
    "sliding_window",
    "strided",
    "window",
]

_ALL = 0  # the opcode of a window without sides, for a kernel


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask, op=1):
    """p - left <= j <= p + right, None = unbounded; made by `causal`, `sliding_window` and `window`."""

    left: int | None
    right: int | None
    text: str

    fits_any_length = True
    _by_distance = True

    @property
    def depends_on_position(self) -> bool:
        return self.left is not None or self.right is not None

    def words(self) -> str:
        if self.left is None and self.right == 0:
            return "itself and the keys before it"
        if self.right == 0:
            return f"the last {self.left + 1:,} keys up to itself" if self.left else "itself alone"
        before = "all keys before" if self.left is None else f"{self.left:,} before"
        after = "all keys after" if self.right is None else f"{self.right:,} after"
        return f"{before} to {after} its own position"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        if self.left is None:
            return at.j <= at.p + self.right if self.right is not None else torch.ones_like(at.j, dtype=torch.bool)
        seen = at.j >= at.p - self.left
        return seen if self.right is None else seen & (at.j <= at.p + self.right)

    def _spans(self, rows: Rows) -> Spans:
        lo = column(-INFINITE) if self.left is None else rows.p[:, None] - self.left
        hi = column(INFINITE) if self.right is None else rows.p[:, None] + (self.right + 1)
        return Spans(lo, hi, self.left is not None, self.right is not None)

    def _lower(self, builder: Builder) -> None:
        if self.depends_on_position:
            super()._lower(builder)
        else:
            builder.emit(_ALL)

    def _numbers(self) -> tuple[int, ...]:
        return -1 if self.left is None else self.left, -1 if self.right is None else self.right

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        left, right = next(words), next(words)
        if right == 0:  # by the constructors that people use: a message or a plan then names what they wrote
            return causal() if left < 0 else sliding_window(left + 1)
        return window(None if left < 0 else left, None if right < 0 else right)

    def __repr__(self) -> str:
        return self.text


# Masks made of a few integers are made once: a plan looked up with them then compares by identity.
_interned = lru_cache(maxsize=256)(Window)


def _window(left: int | None, right: int | None, text: str) -> Window:
    # torch.compile cannot follow a cached class, and needs no cache.
    return Window(left, right, text) if torch.compiler.is_dynamo_compiling() else _interned(left, right, text)


def causal() -> Window:
    """Each query sees the keys up to its own position: j <= p.

    Returns
    -------
    Mask

    Notes
    -----
    Cost: half the work of full attention where Lq = Lk; what lies past the diagonal is never visited.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.

    Examples
    --------
    >>> import qkv
    >>> print(qkv.causal().picture(3, 3))
    p/j 0 1 2
      0 ■ · ·
      1 ■ ■ ·
      2 ■ ■ ■
    """
    return _window(None, 0, "causal()")


def sliding_window(n: int) -> Window:
    """Each query sees n keys: its own and the n - 1 before it, p - n < j <= p; never the future.

    Parameters
    ----------
    n : int >= 1
        In tokens, the query's own position included. Libraries that count distances call the same mask n - 1;
        `window(left, right)` takes distances.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        n is not an int >= 1.

    Notes
    -----
    Cost: Lq n pairs instead of Lq Lk.
    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers"; Jiang et al. 2023, "Mistral 7B".

    Examples
    --------
    >>> import qkv
    >>> print(qkv.sliding_window(2).picture(4, 4))
    p/j 0 1 2 3
      0 ■ · · ·
      1 ■ ■ · ·
      2 · ■ ■ ·
      3 · · ■ ■
    """
    n = integer("qkv.sliding_window()", "n", n, low=1)
    return _window(n - 1, 0, f"sliding_window({n})")


def window(left: int | None, right: int | None) -> Window:
    """Each query sees the keys from `left` before it to `right` after it, inclusive: p - left <= j <= p + right.

    Parameters
    ----------
    left, right : int >= 0 or None
        Distances in tokens; None = unbounded. Both 0 is the query's own position alone.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        A side that is neither None nor an int >= 0.

    Notes
    -----
    Cost: about Lq (left + right + 1) pairs.

    Examples
    --------
    >>> import qkv
    >>> print(qkv.window(1, 2).picture(4, 5, positions="start"))
    p/j 0 1 2 3 4
      0 ■ ■ ■ · ·
      1 ■ ■ ■ ■ ·
      2 · ■ ■ ■ ■
      3 · · ■ ■ ■
    """
    left = None if left is None else integer("qkv.window()", "left", left)
    right = None if right is None else integer("qkv.window()", "right", right)
    return _window(left, right, f"window({left}, {right})")


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask, op=2):
    """j < n; made by `prefix`."""

    n: int | Operand

    fits_any_length = True

    @property
    def varies_by_batch(self) -> bool:
        return isinstance(self.n, Operand) and self.n.tensor.numel() > 1

    def check(self, call: str, sizes: Sizes) -> None:
        check_batch(call, "prefix(n)", self.n, sizes.B)

    def words(self) -> str:
        own = "the first keys, a number for each batch row"
        return f"the first {self.n:,} keys" if isinstance(self.n, int) else own

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        return at.j < (self.n.on(at.b.device)[at.b] if isinstance(self.n, Operand) else self.n)

    def _spans(self, rows: Rows) -> Spans:
        n = int(self.n.tensor[rows.b]) if isinstance(self.n, Operand) else self.n
        return Spans(column(-INFINITE), column(n))

    def _lower(self, builder: Builder) -> None:
        if isinstance(self.n, Operand):
            builder.emit(self.op, 0, builder.operand(self.n.tensor))
        else:
            builder.emit(self.op, self.n, -1)

    def _numbers(self) -> tuple[int, ...]:
        return (-1 if isinstance(self.n, Operand) else self.n,)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        n = next(words)
        return prefix(next(tensors) if n < 0 else n)

    def __repr__(self) -> str:
        return f"prefix({self.n!r})"


def check_batch(call: str, name: str, operand: Any, B: int) -> None:
    """Raise unless a (B,) operand has one value a batch row."""
    if isinstance(operand, Operand) and operand.tensor.numel() != B:
        rule = f"{name} with a value for each batch row needs B of them"
        raise ShapeError.of(call, rule, f"{operand.tensor.numel()} values and B={B}", f"Pass {B} value{'s' * (B != 1)}")


def prefix(n: Any) -> Prefix:
    """Every query sees the first n keys: j < n.

    Parameters
    ----------
    n : int >= 0, or B of them
        B ints are a length for each batch row. More than Lk is all keys.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        n is not ints >= 0.
    ShapeError
        At use: a number of lengths that is not B.

    Notes
    -----
    Prefix-LM is ``causal() | prefix(n)``; attention sinks (StreamingLLM) are
    ``causal() & (prefix(4) | sliding_window(1024))``.
    Source: Raffel et al. 2020 (T5), section 3.2.1; Xiao et al. 2024, "Efficient Streaming Language Models with
    Attention Sinks".

    Examples
    --------
    >>> import qkv
    >>> print((qkv.causal() | qkv.prefix(2)).picture(4, 4))
    p/j 0 1 2 3
      0 ■ ■ · ·
      1 ■ ■ · ·
      2 ■ ■ ■ ·
      3 ■ ■ ■ ■
    """
    if whole(n) is None and hasattr(n, "__iter__") and not isinstance(n, str) and getattr(n, "ndim", 1) != 0:
        return Prefix(Operand(integers("qkv.prefix()", "n", n)))
    return Prefix(integer("qkv.prefix()", "n", n))


@dataclass(frozen=True, eq=False, repr=False)
class Chunked(Mask, op=5):
    """p // n == j // n; made by `chunked`."""

    n: int

    depends_on_position = True
    fits_any_length = True

    def words(self) -> str:
        return f"the keys of its own chunk of {self.n:,}"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        return floor(at.p, self.n) == floor(at.j, self.n)

    def _cuts(self, b: int) -> Cuts | None:
        return Cuts(period=self.n) if self.n > 1 else None

    def _spans(self, rows: Rows) -> Spans:
        if self.n == 1:  # a chunk of one key moves with the position, which needs no cuts
            return Spans(rows.p[:, None], rows.p[:, None] + 1, True, True)
        lo = floor(rows.p, self.n)[:, None] * self.n
        return Spans(lo, lo + self.n)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return chunked(next(words))

    def __repr__(self) -> str:
        return f"chunked({self.n})"


def floor(x: Tensor, n: int) -> Tensor:
    """x // n rounded down, for negative x too."""
    return x.div(n, rounding_mode="floor")


def chunked(n: int) -> Chunked:
    """Each query sees the keys of its own chunk of n positions: p // n == j // n.

    Parameters
    ----------
    n : int >= 1
        Tokens. ``chunked(n) & causal()`` is the local attention of Llama 4.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        n is not an int >= 1.

    Notes
    -----
    Cost: Lq n pairs instead of Lq Lk.
    Source: Meta AI 2025, Llama 4 (local layers).

    Examples
    --------
    >>> import qkv
    >>> print(qkv.chunked(2).picture(4, 4))
    p/j 0 1 2 3
      0 ■ ■ · ·
      1 ■ ■ · ·
      2 · · ■ ■
      3 · · ■ ■
    """
    return Chunked(integer("qkv.chunked()", "n", n, low=1))


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Mask, op=6):
    """(p - j - offset) % n == 0; made by `strided`."""

    n: int
    offset: int

    fits_any_length = True
    _by_distance = True

    @property
    def depends_on_position(self) -> bool:
        return self.n > 1

    def words(self) -> str:
        return f"every {ordinal(self.n)} key, counted from itself"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        return (at.p - at.j - self.offset) % self.n == 0

    def _spans(self, rows: Rows) -> Spans:
        return Spans(column(-INFINITE), column(INFINITE), exact=self.n == 1)

    def _period(self) -> tuple[int, int] | None:
        return self.n, self.offset

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return strided(next(words), next(words))

    def __repr__(self) -> str:
        return f"strided({self.n})" if self.offset == 0 else f"strided({self.n}, {self.offset})"


def strided(n: int, offset: int = 0) -> Strided:
    """Each query sees every n-th key, counted from its own position: (p - j - offset) % n == 0.

    Parameters
    ----------
    n : int >= 1
        Tokens from one visible key to the next.
    offset : int
        Any sign: 0 sees the query's own position, 1 the one before it, ...

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        n is not an int >= 1, or offset is not an int.

    Notes
    -----
    Cost: tiles are visited whole, no work is saved unless another mask does.
    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (strided pattern).

    Examples
    --------
    >>> import qkv
    >>> print((qkv.strided(2) & qkv.causal()).picture(4, 4))
    p/j 0 1 2 3
      0 ■ · · ·
      1 · ■ · ·
      2 ■ · ■ ·
      3 · ■ · ■
    """
    n = integer("qkv.strided()", "n", n, low=1)
    # Only the remainder matters, so equal masks are equal values.
    return Strided(n, integer("qkv.strided()", "offset", offset, low=-LIMIT) % n)


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Mask, op=7):
    """|p - j| <= window * step and (p - j) % step == 0; made by `dilated`."""

    window: int
    step: int

    depends_on_position = True
    fits_any_length = True
    _by_distance = True

    def words(self) -> str:
        return f"every {ordinal(self.step)} key within {self.window * self.step:,} of itself"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        distance = at.p - at.j
        return (distance.abs() <= self.window * self.step) & (distance % self.step == 0)

    def _spans(self, rows: Rows) -> Spans:
        reach, p = self.window * self.step, rows.p[:, None]
        return Spans(p - reach, p + (reach + 1), True, True, exact=self.step == 1)

    def _period(self) -> tuple[int, int] | None:
        return self.step, 0

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return dilated(next(words), next(words))

    def __repr__(self) -> str:
        return f"dilated({self.window}, {self.step})"


def dilated(window: int, step: int) -> Dilated:
    """Each query sees `window` keys on each side, `step` apart, and itself.

    The rule: |p - j| <= window * step and (p - j) % step == 0.

    Parameters
    ----------
    window : int >= 0
        Keys seen on each side.
    step : int >= 1
        Tokens from one to the next.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        Other values, or window * step > 2**48.

    Notes
    -----
    Cost: the tiles within window * step are visited whole.
    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1.

    Examples
    --------
    >>> import qkv
    >>> print(qkv.dilated(1, 2).picture(5, 5))
    p/j 0 1 2 3 4
      0 ■ · ■ · ·
      1 · ■ · ■ ·
      2 ■ · ■ · ■
      3 · ■ · ■ ·
      4 · · ■ · ■
    """
    window = integer("qkv.dilated()", "window", window)
    step = integer("qkv.dilated()", "step", step, low=1)
    if window * step > LIMIT:
        rule = "window * step must be at most 2**48"
        given = f"window={window}, step={step}"
        raise ArgumentError.of("qkv.dilated()", rule, given, "Use strided(step) to reach every key")
    return Dilated(window, step)


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Mask, op=8):
    """p or j is in indices; made by `global_tokens`."""

    indices: Operand

    fits_any_length = True
    _reads_position = True

    @property
    def depends_on_position(self) -> bool:
        return self.indices.tensor.numel() > 0

    def words(self) -> str:
        return "the global tokens, which see every key in turn"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        chosen = self.indices.on(at.j.device)
        return torch.isin(at.p, chosen) | torch.isin(at.j, chosen)

    def _runs(self) -> Tensor:
        """(2, R): the consecutive indices as ranges [start, stop)."""
        runs: Tensor | None = self.__dict__.get("_ranges")
        if runs is None:
            at = self.indices.tensor
            inside = at[1:] != at[:-1] + 1
            edge = torch.ones(min(1, at.numel()), dtype=torch.bool, device="cpu")
            runs = torch.stack([at[torch.cat([edge, inside])], at[torch.cat([inside, edge])] + 1])
            object.__setattr__(self, "_ranges", runs)
        return runs

    def _cuts(self, b: int) -> Cuts | None:
        return Cuts(at=self._runs().T.reshape(-1).contiguous())

    def _spans(self, rows: Rows) -> Spans:
        start, stop = self._runs()
        pieces = torch.zeros_like(rows.p)
        seen = groups(start, stop, pieces, pieces + start.numel())
        if start.numel() == 0:
            return seen
        run = torch.searchsorted(start, rows.p, right=True) - 1
        everything = ((run >= 0) & (rows.p < stop[run.clamp(min=0)]))[:, None]
        # A query at an index sees all keys: its first range is everything, the others lie past the last key.
        lo = torch.where(everything, INFINITE, seen.lo)
        hi = torch.where(everything, INFINITE, seen.hi)
        lo[:, :1] = torch.where(everything, -INFINITE, lo[:, :1])
        return Spans(lo, hi, exact=seen.exact if seen.exact is True else everything)

    def _lower(self, builder: Builder) -> None:
        builder.emit(self.op, builder.operand(self.indices.tensor))

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return global_tokens(next(tensors))

    def __repr__(self) -> str:
        return f"global_tokens({self.indices!r})"


def global_tokens(indices: Any) -> GlobalTokens:
    """A few tokens see everything and are seen by everyone: p or j is in indices.

    Parameters
    ----------
    indices : ints >= 0
        In any order, as a list or a 1-D tensor; repeats count once.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        indices are not a list or 1-D tensor of ints >= 0.

    Notes
    -----
    Cost: about 2 Lk pairs an index.
    Source: Beltagy et al. 2020, "Longformer"; Zaheer et al. 2020, "Big Bird".

    Examples
    --------
    >>> import qkv
    >>> print(qkv.global_tokens([1]).picture(3, 3))
    p/j 0 1 2
      0 · ■ ·
      1 ■ ■ ■
      2 · ■ ·
    """
    return GlobalTokens(Operand(integers("qkv.global_tokens()", "indices", indices).unique()))


def ordinal(n: int) -> str:
    """A number as it counts: 1st, 2nd, 3rd, 4th."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"
