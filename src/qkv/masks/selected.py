"""Blocks of keys by lists: what learned selection chose for each query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkv.checks import integer, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks.base import ByReference, version_of
from qkv.masks.intervals import BUDGET, INFINITE, Cuts, Rows, Spans, anything, column
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.shapes import floor
from qkv.masks.tile import Sizes, Tile

__all__ = ["selected_blocks"]

_SHAPE = "(B or 1, H, rows, n)"


@dataclass(frozen=True, eq=False, repr=False)
class Selected(ByReference, op=16):
    """j // block is in the list of query i; made by `selected_blocks`."""

    t: Tensor  # int32 or int64 (rows_b, heads, rows, n)
    version: int | None
    block: int
    queries: int

    made_by = "selected_blocks"
    noun = "the indices of selected blocks"
    fits_any_length = True  # whose lists cover the most queries of a call has enough for fewer

    @property
    def varies_by_batch(self) -> bool:
        return self.t.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.t.shape[1] > 1

    def check(self, call: str, sizes: Sizes) -> None:
        rows_b, heads, rows, _ = self.t.shape
        given = f"indices {tuple(self.t.shape)}"
        if rows_b not in (1, sizes.B) or sizes.Hq % heads:
            rule = f"selected_blocks: indices must be {_SHAPE}, and H must divide Hq"
            fix = "Give them a list for each batch row and head of keys, or one for all"
            raise ShapeError.of(call, rule, f"{given}, B={sizes.B} and Hq={sizes.Hq}", fix)
        if rows * self.queries < sizes.Lq:
            rule = "selected_blocks: there must be a list for every query"
            given += f" with queries={self.queries}, which cover {rows * self.queries}, and Lq={sizes.Lq}"
            raise ShapeError.of(call, rule, given, f"Pass {-(-sizes.Lq // self.queries)} rows of lists")
        super().check(call, sizes)

    def words(self) -> str:
        return "the keys chosen for it" if self.block == 1 else f"the blocks of {self.block} keys chosen for it"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        self._unchanged("selected_blocks()")
        rows_b, heads, rows, _ = self.t.shape
        b = at.b if rows_b > 1 else torch.zeros_like(at.b)
        line = (b * heads + at.h // max(sizes.Hq // heads, 1)) * rows + floor(at.i, self.queries)
        if self.t.numel() == 0:
            return torch.zeros_like(line + at.j, dtype=torch.bool)
        places, span = self._places()
        wanted = line * span + (floor(at.j, self.block) + 1).clamp(max=span - 1)
        found = torch.searchsorted(places, wanted).clamp_(max=places.numel() - 1)
        return places[found] == wanted

    def _places(self) -> tuple[Tensor, int]:
        """All lists one after the other, each `span` numbers after the one before; its 0 and span - 1 are nothing."""
        known: tuple[Tensor, int] | None = self.__dict__.get("_known_places")
        if known is None:
            lists = self._sorted().flatten(0, 2).to(torch.int64)
            span = min(max(int(lists.max()), -1) + 3, 2**62 // lists.shape[0])
            after = torch.arange(lists.shape[0], device=lists.device)[:, None] * span
            known = ((lists.clamp(-1, span - 3) + 1 + after).flatten(), span)
            object.__setattr__(self, "_known_places", known)
        return known

    def _sorted(self) -> Tensor:
        """The lists in ascending order, contiguous: the user's own tensor, where it is so."""
        known: Tensor | None = self.__dict__.get("_known_sorted")
        if known is None:
            known = self.t.detach().contiguous()
            if not bool((known[..., 1:] >= known[..., :-1]).all()):
                known = known.sort(-1).values
            object.__setattr__(self, "_known_sorted", known)
        return known

    def _cuts(self, b: int) -> Cuts | None:
        return Cuts(period=self.queries, by_index=True, optional=True)

    def _spans(self, rows: Rows) -> Spans:
        self._unchanged("selected_blocks()")
        rows_b, heads, lines, n = self.t.shape
        if heads > 1 and rows.Hq is None:
            return anything()
        h = 0 if rows.Hq is None else rows.h // (rows.Hq // heads)
        if not lines or not n:
            return Spans(column(0), column(0))
        lists = self._sorted()[min(rows.b, rows_b - 1), h].to("cpu", torch.int64)
        far = INFINITE // self.block
        lists = lists[floor(rows.i, self.queries).clamp(0, lines - 1)].clamp(max=far - 1)
        if lists.numel() > BUDGET:
            begin = torch.where(lists < 0, far, lists).amin(1, keepdim=True) * self.block
            end = (lists.amax(1, keepdim=True) + 1).clamp(min=0) * self.block
            return Spans(torch.minimum(begin, end), end, exact=False)
        lists = torch.where(lists < 0, far, lists).sort(1).values
        start = torch.where(lists < far, lists * self.block, INFINITE)
        return Spans(start, torch.where(lists < far, start + self.block, INFINITE))

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        self._unchanged("selected_blocks()")
        each = Hq // self.t.shape[1]
        # One list for all of them, whole lists, or the lists of heads one by one.
        if (stop - 1) // each == start // each:
            lists = self.t[:, start // each : start // each + 1]
        elif start % each == 0 and stop % each == 0:
            lists = self.t[:, start // each : stop // each]
        else:
            lists = self.t.repeat_interleave(each, 1)[:, start:stop]
        return selected_blocks(lists, self.block, queries=self.queries)

    def _lower(self, builder: Builder) -> None:
        self._unchanged("selected_blocks()")
        lists = self._sorted()
        wide = int(lists.dtype == torch.int64)
        builder.emit(self.op, builder.operand(lists), wide, *lists.shape, self.block, self.queries)

    def _numbers(self) -> tuple[int, ...]:
        return self.block, self.queries

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return selected_blocks(next(tensors), next(words), queries=next(words))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(selected_blocks, queries=self.queries), (self.t, self.block)

    def __repr__(self) -> str:
        more = "" if self.queries == 1 else f", queries={self.queries}"
        return f"selected_blocks(<indices {tuple(self.t.shape)}>, {self.block}{more})"


def selected_blocks(indices: Tensor, block: int, *, queries: int = 1) -> Selected:
    """Each query sees the blocks of keys that a list names: key j where j // block is in the list of query i.

    What learned selection chose, as a mask: `select_blocks` and `select_tokens` make such ones. Queries are told by
    index and not by position; combine it with `causal()` where a chosen block may hold keys that come later.

    Parameters
    ----------
    indices : int32 or int64 tensor (B or 1, H, rows, n)
        H divides Hq, and query head h reads list h // (Hq // H): heads that share keys and values share lists where
        H = Hkv. rows = ceil(Lq / queries), and query i reads list i // queries. Entries are numbers of key blocks, in
        any order, repeated or not; negative ones, and those past the last key, are nothing. Held by reference and not
        copied: changing it in place afterwards is an error at the next use.
    block : int >= 1
        Keys of a block; 1 selects single keys.
    queries : int >= 1
        Consecutive queries that share a list.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        A tensor of another kind or a block of another value; at use lists that do not fit the call.

    Notes
    -----
    Cost: Lq n block pairs at most. Lists that are not in ascending order are sorted once; nothing is allocated in
    proportion to Lq Lk.

    Examples
    --------
    >>> import torch, qkv
    >>> chosen = torch.tensor([[0, -1], [0, 1], [2, 0]])
    >>> print((qkv.selected_blocks(chosen[None, None], 2) & qkv.causal()).picture(3, 6, positions="end"))
    p/j 0 1 2 3 4 5
      3 ■ ■ · · · ·
      4 ■ ■ ■ ■ · ·
      5 ■ ■ · · ■ ■
    """
    call = "qkv.selected_blocks()"
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        given = shown(indices) if isinstance(indices, Tensor) else f"{shown(indices)} ({type(indices).__name__})"
        fix = "Pass what torch.topk returns, or convert it with .to(torch.int64)"
        raise ArgumentTypeError.of(call, "indices must be an int32 or int64 tensor", given, fix)
    if indices.ndim != 4 or indices.shape[1] == 0:
        fix = "Add dimensions of size 1 for B and H"
        raise ShapeError.of(call, f"indices must be {_SHAPE} with H >= 1", shown(indices), fix)
    if indices.is_meta or indices.layout != torch.strided:
        given = f"{shown(indices)} on {indices.device}, {indices.layout}"
        raise ArgumentError.of(call, "indices must hold their values in a strided tensor", given, "Fill it")
    block = integer(call, "block", block, low=1)
    return Selected(indices, version_of(indices), block, integer(call, "queries", queries, low=1))


def of_ascending(lists: Tensor, block: int, queries: int) -> Selected:
    """`selected_blocks` of lists that are known to be in ascending order, and right: what a selection made."""
    made = Selected(lists, version_of(lists), block, queries)
    object.__setattr__(made, "_known_sorted", lists.contiguous())
    return made
