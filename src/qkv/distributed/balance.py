"""Who should hold which rows: shards that give all ranks about equal work, few rows too many, and few bytes to move.

Four kinds of shards are tried, the plainest first:

1. contiguous, equal rows: full attention, and whatever sees as much everywhere;
2. contiguous, equal work: cut where the visible pairs before a row reach a rank's share, mixed with rows until no rank
   holds too many, and moved to where a document begins if that is near;
3. zig-zag: chunks r and 2 n - 1 - r, for causal masks;
4. dealt: 2, 4 or 8 chunks a rank, those with most work first, each to the rank that has least; then borders between
   chunks are moved from the rank with more work to the one with less.

Of those whose slowest rank has at most 3 % more work than the best, the one is chosen that moves the fewest rows, in
the fewest ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qkv.checks import integer, shown
from qkv.distributed.remembered import remembered
from qkv.distributed.shards import Shards
from qkv.distributed.work import Profile, Sight, lacking, owned, profile, visible
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.masks import as_mask

_FINE = 64  # blocks a rank in which work is counted
_BLOCKS = 1 << 16  # at most
_ALIKE = 0.03  # shards whose slowest ranks' work differs by less are alike: then rows that move decide
_GOOD = 0.01  # the slowest rank's work beyond an equal share that needs no further shards
_NEAR = (0.02, 0.1)  # shares of a rank's work and rows by which a cut may move to where a document begins
_FINER = (0.5, 0.25, 0.0)  # how much of a chunk's size is its work, the rest its rows, until no rank has too many
_SWEEPS = 12  # over all borders
_BORDERS = 1 << 12  # of more, none is moved


@dataclass(frozen=True)
class Balance:
    """Shards, and what each rank has of them: visible pairs over all heads, and keys that it sees and does not hold."""

    shards: Shards
    kind: str
    pairs: Tensor
    missing: Tensor

    @property
    def slowest(self) -> float:
        """The work of the rank that has most."""
        return float(self.pairs.max())


def shards(
    length: int,
    ranks: Any,
    mask: Any = None,
    *,
    batch: int = 1,
    heads: int = 1,
    slack: float = 0.25,
) -> Shards:
    """Shards of a sequence that give each rank about the same work, planned from the mask.

    Parameters
    ----------
    length : int
        Rows of the whole sequence, its queries and its keys.
    ranks : int or DeviceMesh
        How many ranks, or the mesh of them.
    mask : Mask, optional
        What `attention` will be given; None sees everything.
    batch, heads : int
        Batch rows and query heads, for a mask that differs among them: work is summed over them.
    slack : float
        How many more rows than an equal share a rank may hold, as a part of that share: 0.25 is a quarter more memory.

    Returns
    -------
    Shards
        The same on every rank and in every run: nothing is measured, nothing is sent.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        No such numbers, or a mask made for other lengths.

    Notes
    -----
    Cost: some milliseconds for 1,000,000 rows and thousands of documents; kept for the next call.

    Examples
    --------
    >>> import qkv
    >>> from qkv.distributed import shards
    >>> shards(16, 2, qkv.causal())
    Shards(0: 0-3 12-15; 1: 4-11)
    >>> shards(16, 2, qkv.documents([8, 8]) & qkv.causal())
    Shards(0: 0-7; 1: 8-15)
    """
    call = "qkv.distributed.shards()"
    length = integer(call, "length", length)
    count = integer(call, "ranks", ranks if isinstance(ranks, int) else _size(call, ranks), low=1)
    batch, heads = integer(call, "batch", batch, low=1), integer(call, "heads", heads, low=1)
    if isinstance(slack, bool) or not isinstance(slack, (int, float)):
        raise ArgumentTypeError.of(call, "slack must be a number", f"slack={shown(slack)}", "Try slack=0.25")
    if not 0 <= slack <= count:
        rule = "slack must be from 0 to the number of ranks"
        raise ArgumentError.of(call, rule, f"slack={slack}", "Try slack=0.25, a quarter more rows")
    rule_of = as_mask(mask, call)
    work = Sight(rule_of, batch, heads, length, length)
    if rule_of is not None:
        rule_of.check(call, work.sizes)
    return balance(work, count, float(slack)).shards


def _size(call: str, mesh: Any) -> int:
    size = getattr(mesh, "size", None)
    if not callable(size):
        given = f"ranks={shown(mesh)}"
        raise ArgumentTypeError.of(call, "ranks must be a number or a DeviceMesh", given, "Pass mesh or mesh.size()")
    return int(size())


@remembered(32)
def balance(sight: Sight, ranks: int, slack: float) -> Balance:
    """The best shards that were tried, and what they come to."""
    line = profile(sight, min(_FINE * ranks, _BLOCKS))
    most = -(-sight.Lq // ranks)
    most = max(most, int(most * (1 + slack)))
    found: list[Balance] = []
    for kind, make in _tried(sight.Lq, ranks, line, most):
        found.append(weighed(sight, line, make(), kind))
        if found[-1].slowest * ranks <= (1 + _GOOD) * line.total:
            break
    enough = min(one.slowest for one in found) * (1 + _ALIKE)
    # Kinds are in the order of their ranges, so the first of those that move the least has the fewest.
    return min((one for one in found if one.slowest <= enough), key=lambda one: int(one.missing.sum()))


def weighed(sight: Sight, line: Profile, shards: Shards, kind: str = "given") -> Balance:
    """What shards come to."""
    held = owned(shards.ranges)
    each = line.upto(held.stop) - line.upto(held.start)
    pairs = torch.zeros(shards.ranks, dtype=torch.float64, device="cpu").index_add_(0, held.rank, each)
    return Balance(shards, kind, pairs, lacking(visible(sight, held), held, shards.ranks, sight.Lk))


def _tried(length: int, ranks: int, line: Profile, most: int) -> Iterator[tuple[str, Callable[[], Shards]]]:
    yield "contiguous", lambda: Shards.contiguous(length, ranks)
    if ranks == 1 or not line.total:
        return
    for near in _NEAR:
        yield "by work", lambda near=near: _by_work(length, ranks, line, most, near)  # type: ignore[misc]
    yield "zigzag", lambda: Shards.zigzag(length, ranks)
    for each in (2, 4, 8):
        yield f"dealt {each}", lambda each=each: _dealt(length, ranks, line, most, each)  # type: ignore[misc]


def _by_work(length: int, ranks: int, line: Profile, most: int, near: float) -> Shards:
    """One range a rank, of equal work as far as no rank holds more than `most` rows."""
    rows, work = line.edges.double() / length, line.before.double() / line.total
    share = torch.arange(1, ranks, dtype=torch.float64, device="cpu") / ranks
    low, high = 0.0, 1.0
    cuts = _where(line, work, share)
    if int(_ended(cuts, length).diff().max()) > most:
        # How much of a share is counted in rows: the least that keeps all within `most`.
        for _ in range(12):
            part = (low + high) / 2
            cuts = _where(line, part * rows + (1 - part) * work, share)
            low, high = (low, part) if int(_ended(cuts, length).diff().max()) <= most else (part, high)
        cuts = _where(line, high * rows + (1 - high) * work, share)
    cuts = _moved(cuts, line, near * line.total / ranks, near * length / ranks)
    ends = _ended(cuts, length)
    if int(ends.diff().max()) > most:
        ends = _ended(_where(line, high * rows + (1 - high) * work, share), length)
    return Shards([[pair] for pair in pairwise(ends.tolist())])


def _where(line: Profile, measure: Tensor, share: Tensor) -> Tensor:
    """The rows at which a measure that grows along the edges reaches these shares."""
    at = (torch.searchsorted(measure, share, right=True) - 1).clamp(0, measure.numel() - 2)
    more = measure[at + 1] - measure[at]
    part = torch.where(more > 0, (share - measure[at]) / more.clamp(min=1e-300), 0).clamp(0, 1)
    return line.edges[at] + (part * (line.edges[at + 1] - line.edges[at])).round().long()


def _ended(cuts: Tensor, length: int) -> Tensor:
    return torch.cat((cuts.new_tensor([0]), cuts, cuts.new_tensor([length]))).cummax(0).values


def _moved(cuts: Tensor, line: Profile, work: float, rows: float) -> Tensor:
    """Cuts where the nearest document begins, if neither more work nor more rows than this lie between."""
    if not line.marks.numel():
        return cuts
    after = torch.searchsorted(line.marks, cuts).clamp(max=line.marks.numel() - 1)
    before = (after - 1).clamp(min=0)
    best, least = cuts, torch.full_like(cuts, 1 << 62)
    for mark in (line.marks[before], line.marks[after]):
        far = (mark - cuts).abs()
        fits = (far <= rows) & ((line.upto(mark) - line.upto(cuts)).abs() <= work) & (far < least)
        best, least = torch.where(fits, mark, best), torch.where(fits, far, least)
    return best


def _dealt(length: int, ranks: int, line: Profile, most: int, each: int) -> Shards:
    """Chunks dealt by their work, `each` a rank; then borders are moved to equal it."""
    for finer, near in (*((finer, 0.25) for finer in _FINER), (0.0, 0.0)):
        ends, owners, work = _hands(length, ranks, line, each, finer, near)
        rows = [0] * ranks
        for rank, (start, stop) in zip(owners, pairwise(ends), strict=True):
            rows[rank] += stop - start
        if max(rows) <= most:
            break
    if len(owners) <= _BORDERS:
        _evened(ends, owners, work, rows, line, most)
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for rank, pair in zip(owners, pairwise(ends), strict=True):
        found[rank].append(pair)
    return Shards(found)


def _hands(
    length: int, ranks: int, line: Profile, each: int, finer: float, near: float
) -> tuple[list[int], list[int], list[float]]:
    """The ends of all chunks, who gets each, and the work of each rank: those with most work first, in turns."""
    count = each * ranks
    share = torch.arange(1, count, dtype=torch.float64, device="cpu") / count
    cuts = _where(line, (1 - finer) * line.edges.double() / length + finer * line.before.double() / line.total, share)
    bounds = _ended(_moved(cuts, line, line.total / ranks / 10, near * length / count), length)
    work = line.upto(bounds).diff()
    order = work.argsort(descending=True, stable=True)
    owner = torch.empty_like(order)
    held = torch.zeros(ranks, dtype=torch.float64, device="cpu")
    for turn in order.view(each, ranks):
        least = held.argsort(stable=True)
        owner[turn] = least
        held[least] += work[turn]
    return bounds.tolist(), owner.tolist(), held.tolist()


def _evened(ends: list[int], owners: list[int], work: list[float], rows: list[int], line: Profile, most: int) -> None:
    """Move the borders between chunks from the rank with more work to the one with less, in place."""
    share = line.total / len(work)
    for _ in range(_SWEEPS):
        if max(work) <= (1 + _GOOD / 2) * share:
            return
        for n in range(1, len(owners)):
            left, right = owners[n - 1], owners[n]
            more = work[left] - work[right]
            if abs(more) <= _GOOD / 4 * share:
                continue
            here = line.at(ends[n])
            to = line.row(here - more / 2)
            low, high = ends[n] - (most - rows[right]), ends[n] + (most - rows[left])
            to = min(max(to, ends[n - 1], low), ends[n + 1], high)
            taken = here - line.at(to)
            work[left], work[right] = work[left] - taken, work[right] + taken
            rows[left], rows[right] = rows[left] + to - ends[n], rows[right] + ends[n] - to
            ends[n] = to
