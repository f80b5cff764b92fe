"""What the native kernels compute of queries and keys, and how they say it: found by a walk without products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from qkv.call.problem import Problem
from qkv.masks import Mask

LOOKED_AT = 1 << 18
"""Granules of 16 keys that are looked at to say how many pairs are computed: some milliseconds."""

PLAIN = (0, 0, 0, 1)
"""Strides of tensors that nothing is read of."""

# Of masks whose rows are rearranged, or whose keys are gathered (csrc/mask/kinds.h): chunked, strided, dilated, random,
# blocks, dense, selected. Tiles of other masks hold neighbours, and their granules lie where they lie.
_APART = frozenset((5, 6, 7, 9, 10, 12, 16))


class Cover(NamedTuple):
    """What a walk found: see `Cover` of csrc/attention.h."""

    pairs: int
    step: int
    block: int
    by_query: bool
    gathers: bool

    @property
    def in_order(self) -> bool:
        """Whether tiles hold neighbours, and keys lie where they lie."""
        return self[1:] == (1, 0, False, False)

    def words(self) -> str:
        """What is rearranged or gathered; empty where nothing is."""
        found = []
        if self.step > 1:
            found.append(f"rows are rearranged: a tile holds every {self.step}th")
        if self.block > 0:
            found.append(f"rows are rearranged: tiles end where blocks of {self.block} do")
        if self.by_query:
            found.append("rows are rearranged: a tile holds all heads of a group")
        if self.gathers:
            found.append("keys are gathered")
        return "; ".join(found)


def told(problem: Problem) -> bool:
    """Whether a walk tells more than covering tiles do."""
    p = problem
    return p.mask is not None and 0 not in (p.B, p.Hq, p.Lq, p.Lk) and not _APART.isdisjoint(_kinds(p.mask))


def cover(native: Any, positions: Tensor | None, granules: int) -> Cover:
    """The walk of a native object, over about so many granules; of more, evenly spread tiles tell of the others."""
    where = None if positions is None else positions.contiguous()
    address, rows = (0, 0) if where is None else (where.data_ptr(), where.shape[0])
    return Cover(*native.cover(address, rows, granules))


def _kinds(mask: Mask) -> Iterator[int]:
    parts: tuple[Mask, ...] = getattr(mask, "parts", ())
    for part in parts:
        yield from _kinds(part)
    if not parts:
        yield mask.op
