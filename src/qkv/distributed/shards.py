"""Who holds which rows of a sequence: a value that is equal on all ranks, and how rows are handed out and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qkv.checks import integer, shown, whole
from qkv.errors import ArgumentError, ArgumentTypeError

Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges [start, stop), in ascending order, none of which is empty or meets another."""


@dataclass(frozen=True)
class Shards:
    """Which rows of a sequence each rank holds: for each rank its ranges [start, stop), in ascending order.

    A rank's tensor is its ranges one after the other. The value says nothing of data or processes, and has to be the
    same on all ranks: `qkv.distributed.shards` makes one that balances a mask's work, the constructors below make plain
    ones, and one can be written by hand.

    Parameters
    ----------
    ranges : sequence of sequences of (start, stop)
        One sequence a rank; together they hold each row of 0 .. length - 1 once. A rank may hold nothing.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        Something else than pairs of ints; a row that no rank holds, or two do.

    Examples
    --------
    >>> from qkv.distributed import Shards
    >>> Shards.zigzag(16, 2)
    Shards(0: 0-3 12-15; 1: 4-11)
    >>> Shards.zigzag(16, 2).positions(0)
    tensor([ 0,  1,  2,  3, 12, 13, 14, 15])
    """

    ranges: tuple[Ranges, ...]

    def __init__(self, ranges: Sequence[Sequence[Sequence[int]]]) -> None:
        object.__setattr__(self, "ranges", _checked(ranges))

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Shards:
        """The rows in order, as many on each rank or one more on the first ones.

        Parameters
        ----------
        length, ranks : int

        Returns
        -------
        Shards
        """
        length, ranks = _sizes(length, ranks)
        return cls(tuple(((a, b),) for a, b in cut(length, ranks)))

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Shards:
        """2 n chunks for n ranks, of which rank r holds chunks r and 2 n - 1 - r: causal work is equal on all.

        Parameters
        ----------
        length, ranks : int

        Returns
        -------
        Shards
        """
        length, ranks = _sizes(length, ranks)
        chunks = cut(length, 2 * ranks)
        return cls(tuple((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.ranges)

    @cached_property
    def length(self) -> int:
        """Rows of the whole sequence."""
        return sum(self.rows(rank) for rank in range(self.ranks))

    def rows(self, rank: int) -> int:
        """How many rows a rank holds.

        Parameters
        ----------
        rank : int

        Returns
        -------
        int
        """
        return sum(stop - start for start, stop in self.ranges[rank])

    def positions(self, rank: int) -> Tensor:
        """The rows that a rank holds by their numbers in the sequence: what rotary embeddings are turned by.

        Parameters
        ----------
        rank : int

        Returns
        -------
        Tensor, int64, shape (rows,)
        """
        parts = [torch.arange(start, stop, dtype=torch.int64, device="cpu") for start, stop in self.ranges[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def joined(self, ranks: Sequence[int]) -> Ranges:
        """What some ranks hold together.

        Parameters
        ----------
        ranks : sequence of int

        Returns
        -------
        tuple of (start, stop)
        """
        return merged(sorted(part for rank in ranks for part in self.ranges[rank]))

    def take(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """A rank's rows of a whole tensor: a view where they are one range, else a copy.

        Parameters
        ----------
        x : Tensor
            `length` long in dimension `dim`.
        rank, dim : int

        Returns
        -------
        Tensor
        """
        if x.shape[dim] != self.length:
            given = f"a tensor {tuple(x.shape)}, dim={dim}, and shards of {self.length} rows"
            fix = "Make the shards for the tensor's length, or name its dimension of rows"
            raise ArgumentError.of("Shards.take()", "shards are made for a number of rows", given, fix)
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def put(self, parts: Sequence[Tensor], dim: int = 2) -> Tensor:
        """The whole tensor of all ranks' rows, in order.

        Parameters
        ----------
        parts : sequence of Tensor
            One a rank.
        dim : int

        Returns
        -------
        Tensor
        """
        return in_order(parts, self.ranges, dim)

    def __repr__(self) -> str:
        told = [
            f"{rank}: {' '.join(f'{a}-{b - 1}' for a, b in mine[:4])}{' ...' if len(mine) > 4 else ''}".rstrip()
            for rank, mine in enumerate(self.ranges[:8])
        ]
        return f"Shards({'; '.join(told)}{f'; ... {self.ranks} ranks' if self.ranks > 8 else ''})"


def in_order(parts: Sequence[Tensor], ranges: Sequence[Ranges], dim: int) -> Tensor:
    """The rows of several tensors, each of which holds its ranges one after the other, in the order of the sequence."""
    pieces = []
    for part, mine in zip(parts, ranges, strict=True):
        at = 0
        for start, stop in mine:
            pieces.append((start, part.narrow(dim, at, stop - start)))
            at += stop - start
    ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim) if ordered else parts[0]


def blocks(shards: Shards, rows: int) -> list[tuple[Ranges, ...]]:
    """What ranks hold, by the rows of a mesh in which they are in row-major order."""
    each = shards.ranks // rows
    return [shards.ranges[at * each : (at + 1) * each] for at in range(rows)]


def folded(shards: Shards, rows: int) -> Shards:
    """Who holds what where each row of a mesh is one rank.

    >>> folded(Shards.zigzag(16, 4), 2)
    Shards(0: 0-3 12-15; 1: 4-11)
    """
    return Shards([sorted(part for mine in block for part in mine) for block in blocks(shards, rows)])


def place(held: Ranges, part: tuple[int, int]) -> slice:
    """Where some rows stand in the tensor of those that are held; they are in one of its ranges.

    >>> place(((0, 4), (12, 16)), (13, 15))
    slice(5, 7, None)
    """
    at = 0
    for start, stop in held:
        if start <= part[0] and part[1] <= stop:
            return slice(at + part[0] - start, at + part[1] - start)
        at += stop - start
    raise AssertionError(f"{part} is not in {held}")


def merged(parts: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges in ascending order of their starts as `Ranges`: those that meet become one.

    >>> merged([(0, 2), (2, 5), (4, 4), (7, 9), (8, 12)])
    ((0, 5), (7, 12))
    """
    found: list[tuple[int, int]] = []
    for start, stop in parts:
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)


def common(one: Ranges, two: Ranges) -> Ranges:
    """The rows that are in both.

    >>> common(((0, 5), (7, 12)), ((3, 8), (11, 20)))
    ((3, 5), (7, 8), (11, 12))
    """
    found, i, j = [], 0, 0
    while i < len(one) and j < len(two):
        start, stop = max(one[i][0], two[j][0]), min(one[i][1], two[j][1])
        if start < stop:
            found.append((start, stop))
        if one[i][1] <= two[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def _int(value: Any) -> int:
    found = whole(value)
    if found is None:
        raise TypeError
    return found


def _sizes(length: int, ranks: int) -> tuple[int, int]:
    call = "qkv.distributed.Shards"
    return integer(call, "length", length), integer(call, "ranks", ranks, low=1)


def cut(length: int, parts: int) -> list[tuple[int, int]]:
    """Ranges of a length cut into parts that are alike, the first ones longer by one where it does not divide."""
    each, more = divmod(length, parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + each + (part < more))
    return list(pairwise(ends))


def check_shards(call: str, name: str, given: Any, ranks: int) -> None:
    """Raise unless it is a `Shards` for so many ranks."""
    fix = "Make them with qkv.distributed.shards(length, mesh, mask=mask)"
    if not isinstance(given, Shards):
        raise ArgumentTypeError.of(call, f"{name} must be a qkv.distributed.Shards", shown(given), fix)
    if given.ranks != ranks:
        raise ArgumentError.of(call, f"{name} must be made for the mesh", f"{given!r} and {ranks} ranks", fix)


def _checked(ranges: Sequence[Sequence[Sequence[int]]]) -> tuple[Ranges, ...]:
    call, fix = "qkv.distributed.Shards", "Write one list of (start, stop) a rank, in ascending order"
    try:
        pairs = [[(_int(start), _int(stop)) for start, stop in mine] for mine in ranges]
    except (TypeError, ValueError):
        given = f"ranges={shown(ranges)}"
        raise ArgumentTypeError.of(call, "ranges must be a sequence of pairs a rank", given, fix) from None
    if not pairs:
        raise ArgumentError.of(call, "there must be at least one rank", "ranges=[]", fix)
    for rank, mine in enumerate(pairs):
        if any(start < 0 or stop < start for start, stop in mine) or any(
            stop > start for (_, stop), (start, _) in pairwise(mine)
        ):
            rule = "a rank's ranges must be in ascending order and may not overlap"
            raise ArgumentError.of(call, rule, f"rank {rank} with {shown(mine)}", fix)
    every = sorted((start, stop, rank) for rank, mine in enumerate(pairs) for start, stop in mine if stop > start)
    end, before = 0, None
    for start, stop, rank in every:
        if start != end:
            what = (
                f"row {end} is held by no rank" if start > end else f"row {start} is held by ranks {before} and {rank}"
            )
            raise ArgumentError.of(call, "each row must be held by exactly one rank", what, fix)
        end, before = stop, rank
    return tuple(merged(mine) for mine in pairs)
