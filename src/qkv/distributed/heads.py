"""From rows to heads and back, all to all: each rank then has some heads of all rows that its group holds.

Query heads stay with the key/value heads that they read. Where there are at least as many of these as ranks, each rank
gets some; else each gets one, which several then have, with some of its query heads.

Source: Jacobs et al., DeepSpeed Ulysses (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qkv.distributed.agreement import agree_again
from qkv.distributed.shards import Ranges, cut, in_order, merged, place
from qkv.distributed.transport import Group

Cuts: TypeAlias = "tuple[tuple[int, int], ...]"
"""Of each rank, its heads [start, stop)."""


def head_cuts(Hq: int, Hkv: int, ranks: int) -> tuple[Cuts, Cuts]:
    """The query heads and the key/value heads of each rank.

    >>> head_cuts(8, 2, 4)
    (((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 1), (0, 1), (1, 2), (1, 2)))
    """
    if not Hkv:
        return ((0, 0),) * ranks, ((0, 0),) * ranks
    group = Hq // Hkv
    if Hkv >= ranks:
        whole = tuple(cut(Hkv, ranks))
        return tuple((a * group, b * group) for a, b in whole), whole
    queries, keys = [], []
    for head, (first, last) in enumerate(cut(ranks, Hkv)):
        for a, b in cut(group, last - first):
            queries.append((head * group + a, head * group + b))
            keys.append((head, head + 1) if a < b else (head, head))
    return tuple(queries), tuple(keys)


@dataclass(frozen=True, eq=False)
class Swap:
    """How a tensor (B, H, rows, width) goes from one rank's rows to one rank's heads."""

    group: Group
    heads: Cuts
    ranges: tuple[Ranges, ...]
    """The rows of each rank of the group."""
    what: str

    @property
    def mine(self) -> tuple[int, int]:
        return self.heads[self.group.rank]

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, H, own rows, width) to (B, own heads, rows of all, width), in the order of the sequence."""
        B, _, _, width = x.shape
        count = self.mine[1] - self.mine[0]
        sizes = [(B, count, sum(b - a for a, b in rows), width) for rows in self.ranges]
        found = self.group.swap(f"all-to-all of {self.what}", [x[:, a:b] for a, b in self.heads], sizes)
        return in_order(found, self.ranges, 2)

    def to_rows(self, x: Tensor, heads: int) -> Tensor:
        """The way back; of heads that several ranks have, their sum, in the order of ranks."""
        B, _, _, width = x.shape
        held = merged(sorted(part for rows in self.ranges for part in rows))
        parts = [torch.cat([x[:, :, place(held, part)] for part in rows] or [x[:, :, :0]], 2) for rows in self.ranges]
        own = sum(b - a for a, b in self.ranges[self.group.rank])
        sizes = [(B, b - a, own, width) for a, b in self.heads]
        found = self.group.swap(f"all-to-all of {self.what}", parts, sizes)
        if sum(b - a for a, b in self.heads) == heads:
            return torch.cat(found, 1)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        to = torch.zeros((B, heads, own, width), dtype=wide, device=x.device)
        for (a, b), part in zip(self.heads, found, strict=True):
            to[:, a:b] += part
        return to.to(x.dtype)


# One node for all tensors of a direction: autograd runs nodes that are ready in an order that may differ between ranks,
# and an all-to-all waits for the same one on every rank.
class ToHeads(Function):
    """`Swap.to_heads` of some tensors, whose gradient is `to_rows`."""

    @staticmethod
    def forward(ctx: Any, swaps: tuple[Swap, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swaps, ctx.heads = swaps, [x.shape[1] for x in tensors]
        return tuple(swap.to_heads(x) for swap, x in zip(swaps, tensors, strict=True))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *given: Tensor) -> Any:
        return None, *(s.to_rows(d, heads) for s, d, heads in zip(ctx.swaps, given, ctx.heads, strict=True))


class ToRows(Function):
    """`Swap.to_rows` of some tensors, of heads that one rank has each; its gradient is `to_heads`."""

    @staticmethod
    def forward(ctx: Any, swap: Swap, heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap = swap
        return tuple(swap.to_rows(x, heads) for x in tensors)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *given: Tensor) -> Any:
        agree_again(ctx.swap.group)
        return None, None, *map(ctx.swap.to_heads, given)
