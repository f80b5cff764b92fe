"""What each method computes, moves and holds on a rank: the rules of `ring`, `heads` and `exchange`, as arithmetic.

    ring, allgather   keys and values that a rank's queries see and others hold, once; in the backward pass once more,
                      with their gradients on the way back in the accumulation dtype
    ulysses           q, k, v to ranks of heads, out back, and lse if asked for; in the backward pass their gradients
                      the other way
    hybrid            both: within a row of the mesh rows become heads, between rows keys come to queries

All ranks have totals; times need the pairs of a rank with each other one, and are found for some ranks where there are
many: the first and last, those with most work and most bytes, and some between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.problem import Problem
from qkv.distributed.exchange import LONGEST, exchange
from qkv.distributed.heads import head_cuts
from qkv.distributed.machine import Machine, products
from qkv.distributed.remembered import remembered
from qkv.distributed.shards import Shards, folded
from qkv.distributed.work import Owned, Sight, cells, owned, profile, visible

FEW = 16  # ranks whose exchange is planned in full, as `attention` does it
LOOKED_AT = 24  # ranks of more whose stages are looked at


class Stage(NamedTuple):
    """What a rank computes, and what it receives for that and sends meanwhile: forward; in pairs, rows, bytes."""

    pairs: int
    rows: int
    received: int
    sent: int


class Traffic(NamedTuple):
    """Bytes that a rank receives and sends, forward and in the backward pass."""

    received: int
    sent: int
    back_received: int
    back_sent: int


class Passed(NamedTuple):
    """Seconds of one direction: in all, and of these the ones in which a rank waits for bytes."""

    seconds: float
    exposed: float


@dataclass(frozen=True)
class Rank:
    """One rank by one method."""

    rank: int
    rows: int
    pairs: int
    flops: int
    traffic: Traffic
    stages: tuple[Stage, ...]
    """Up to 16 of them; none of a rank that has more."""
    forward: Passed
    backward: Passed
    memory: int
    """Bytes of tensors at the peak of a forward pass, the rank's q, k, v and out among them."""
    back_memory: int


@dataclass(frozen=True)
class Cost:
    """One method on all ranks; `ranks` are those that were looked at."""

    method: str
    ranks: tuple[Rank, ...]
    of: int
    exact: bool
    """Whether pairs were counted; else they are what the mask's ranges allow."""

    def slowest(self, backward: bool) -> Rank:
        return max(self.ranks, key=lambda r: r.forward.seconds + (r.backward.seconds if backward else 0.0))

    def seconds(self, backward: bool) -> float:
        """Until the slowest rank is ready."""
        rank = self.slowest(backward)
        return rank.forward.seconds + (rank.backward.seconds if backward else 0.0)


class Between(NamedTuple):
    """Of some ranks, with each rank: pairs, rows of queries that are computed, rows of keys received, and sent."""

    chosen: list[int]
    pairs: Tensor
    rows: Tensor
    received: Tensor
    sent: Tensor
    exact: bool


def cost(problem: Problem, rows: Shards, keys: Shards, mesh: tuple[int, ...], method: str, machine: Machine) -> Cost:
    """What a method comes to."""
    ring, heads = (1, mesh[0]) if method == "ulysses" else (mesh[0], mesh[1] if len(mesh) > 1 else 1)
    own_rows, own_keys = (folded(shards, ring) for shards in (rows, keys))
    cuts, key_cuts = head_cuts(problem.Hq, problem.Hkv, heads)
    found: list[Rank] = []
    exact = True
    alike = replace(problem, call="", D=1, Dv=1, scale=1.0, softcap=None, bias=(), has_sinks=False, dropout_p=0.0)
    alike = replace(alike, needs_grad=False, needs_lse=False)
    for place in _places(cuts):
        part = replace(problem, Hq=cuts[place][1] - cuts[place][0], Hkv=key_cuts[place][1] - key_cuts[place][0])
        sight = sight_of(problem, cuts[place])
        between = _between(alike, sight, own_rows, own_keys, max(LOOKED_AT // len(_places(cuts)), 4))
        exact = exact and between.exact
        for n, at in enumerate(between.chosen):
            rank = at * heads + place
            swapped = _Swapped(problem, rows, keys, heads, rank, cuts, key_cuts)
            stages = _stages(part, between, n, method)
            found.append(_rank(problem, part, rows, rank, stages, swapped, machine, own_rows, own_keys, at))
    return Cost(method, tuple(sorted(found, key=lambda r: r.rank)), rows.ranks, exact)


def sight_of(problem: Problem, heads: tuple[int, int] | None = None) -> Sight:
    """What decides a problem's pairs; positions that are data count as if queries stood in order from 0."""
    p = problem
    firsts = p.positions if isinstance(p.positions, tuple) else (p.Lk - p.Lq if p.positions == "end" else 0,)
    return Sight(p.mask, p.B, p.Hq, p.Lq, p.Lk, firsts, heads)


def _places(cuts: Sequence[tuple[int, int]]) -> list[int]:
    """Places in a row of the mesh that stand for all: the first and the last, and between them a few."""
    last = len(cuts) - 1
    return sorted({0, last, *(last * n // 4 for n in range(1, 4))}) if last >= FEW else list(range(last + 1))


@remembered(8)
def _between(problem: Problem, sight: Sight, rows: Shards, keys: Shards, most: int) -> Between:
    """What ranks of a ring have to do with each other."""
    held, own = owned(rows.ranges), owned(keys.ranges)
    ranks = rows.ranks
    if ranks <= FEW:
        chosen = list(range(ranks))
        received, sent, busy = _planned(problem, rows, keys)
    else:
        seen = visible(sight, held)
        chosen = _chosen(sight, held, seen, ranks, most)
        received, sent = _needed(chosen, held, own, seen, ranks)
        busy = None
    some = torch.isin(held.rank, torch.tensor(chosen, dtype=torch.int64, device="cpu"))
    mine = Owned(*(x[some] for x in held))
    order = mine.start.argsort()
    mine = Owned(*(x[order] for x in mine))
    edges, owner = _edges(own, sight.Lk)
    number = torch.searchsorted(torch.tensor(chosen, dtype=torch.int64, device="cpu"), mine.rank)
    counted = cells(sight, torch.stack((mine.start, mine.stop)), edges)
    by_source = torch.zeros(mine.rank.numel(), ranks, dtype=torch.int64, device="cpu")
    by_source.index_add_(1, owner, counted.pairs)
    pairs = torch.zeros(len(chosen), ranks, dtype=torch.int64, device="cpu").index_add_(0, number, by_source)
    if busy is None:
        touched = (counted.pairs > 0).to(torch.int64) * (mine.stop - mine.start)[:, None]
        each = torch.zeros_like(by_source).index_add_(1, owner, touched)
        busy = torch.zeros_like(pairs).index_add_(0, number, each)
    return Between(chosen, pairs, busy, received, sent, counted.exact)


def _edges(own: Owned, length: int) -> tuple[Tensor, Tensor]:
    """The borders of all ranges of keys in order, and who holds what lies between."""
    order = own.start.argsort()
    return torch.cat((own.start[order], own.start.new_tensor([length]))), own.rank[order]


def _planned(problem: Problem, rows: Shards, keys: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of keys received and sent, rows of queries computed, of each rank with each: from the exchange itself."""
    ranks = rows.ranks
    simple = replace(problem, positions="start") if problem.positions == "tensor" else problem
    plan = exchange(simple, rows, keys)
    received, busy = torch.zeros(2, ranks, ranks, dtype=torch.int64, device="cpu")
    for a in range(ranks):
        for b in range(ranks):
            needed = keys.ranges[b] if a == b else plan.needed(a, b)
            pieces = plan.pieces(a, needed)
            busy[a, b] = sum(piece.queries[1] - piece.queries[0] for piece in pieces)
            received[a, b] = 0 if a == b else sum(stop - start for start, stop in needed)
    return received, received.T, busy


def _chosen(sight: Sight, held: Owned, seen: Owned, ranks: int, most: int) -> list[int]:
    """Ranks that are looked at."""
    line = profile(sight, min(16 * ranks, 1 << 16))
    pairs = torch.zeros(ranks, dtype=torch.float64, device="cpu")
    pairs.index_add_(0, held.rank, line.upto(held.stop) - line.upto(held.start))
    width = torch.zeros(ranks, dtype=torch.int64, device="cpu").index_add_(0, seen.rank, seen.stop - seen.start)
    found = {0, ranks - 1, *(int(f(x)) for x in (pairs, width) for f in (torch.argmax, torch.argmin))}
    found.update(ranks * n // most for n in range(most))
    return sorted(found)


def _needed(chosen: list[int], held: Owned, own: Owned, seen: Owned, ranks: int) -> tuple[Tensor, Tensor]:
    """Rows of keys that chosen ranks receive of each rank, and send to each."""
    received, sent = torch.zeros(2, len(chosen), ranks, dtype=torch.int64, device="cpu")
    for n, rank in enumerate(chosen):
        mine = seen.rank == rank
        start, stop = seen.start[mine], seen.stop[mine]
        if start.numel():
            below = torch.nn.functional.pad((stop - start).cumsum(0), (1, 0))

            def upto(x: Tensor, start: Tensor = start, stop: Tensor = stop, below: Tensor = below) -> Tensor:
                at = torch.searchsorted(start, x, right=True)
                return below[at] - (stop[(at - 1).clamp(min=0)] - x).clamp(min=0) * (at > 0)

            received[n].index_add_(0, own.rank, upto(own.stop) - upto(own.start))
        for a, b in zip(own.start[own.rank == rank].tolist(), own.stop[own.rank == rank].tolist(), strict=True):
            both = (seen.stop.clamp(max=b) - seen.start.clamp(min=a)).clamp(min=0)
            sent[n].index_add_(0, seen.rank, both)
        received[n, rank] = sent[n, rank] = 0
    return received, sent


def _stages(part: Problem, between: Between, n: int, method: str) -> Tensor:
    """The stages of one chosen rank of a ring: int64 (stages, 4) of pairs, rows, bytes received and sent."""
    p, ranks, rank = part, between.pairs.shape[1], between.chosen[n]
    each = p.B * p.Hkv * (p.D + p.Dv) * p.dtype.itemsize
    turn = torch.arange(ranks, device="cpu")
    source, target = (rank - turn) % ranks, (rank + turn) % ranks
    pairs, rows = between.pairs[n, source], between.rows[n, source] * p.B * p.Hq
    received, sent = between.received[n, source] * each, between.sent[n, target] * each
    table = torch.stack((pairs, rows, received, sent), 1)
    if method == "allgather" and ranks > 1:
        table = torch.stack((table[0], table[1:].sum(0)))
    moves = (table[:, 2:] > 0).any(1)
    moves[0] = True
    return table[moves]


class _Swapped:
    """What a rank sends and receives to make rows into heads and back: bytes, and those of each all-to-all."""

    def __init__(
        self, problem: Problem, rows: Shards, keys: Shards, heads: int, rank: int,
        cuts: Sequence[tuple[int, int]], key_cuts: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        p, size, place = problem, problem.dtype.itemsize, rank % heads
        row = range(rank - place, rank - place + heads)
        self.letters: list[tuple[int, int]] = []
        self.all = 0
        if heads == 1:
            return
        for shards, of, width, back in (
            (rows, cuts, p.D * size, False), (keys, key_cuts, p.D * size, False), (keys, key_cuts, p.Dv * size, False),
            (rows, cuts, p.Dv * size, True), *[(rows, cuts, p.accumulate.itemsize, True)] * p.needs_lse,
        ):  # fmt: skip
            count = [stop - start for start, stop in of]
            others = sum(shards.rows(r) for r in row) - shards.rows(rank)
            sent = p.B * shards.rows(rank) * (sum(count) - count[place]) * width
            received = p.B * others * count[place] * width
            self.letters.append((sent, received) if back else (received, sent))
            self.all += p.B * (others + shards.rows(rank)) * count[place] * width

    def traffic(self) -> tuple[int, int]:
        """Bytes received and sent, forward; the backward pass is the reverse."""
        return sum(a for a, _ in self.letters), sum(b for _, b in self.letters)

    def seconds(self, machine: Machine) -> float:
        return sum((machine.swap(max(pair)) for pair in self.letters), 0.0)


def _rank(
    problem: Problem, part: Problem, rows: Shards, rank: int, stages: Tensor, swapped: _Swapped,
    machine: Machine, own_rows: Shards, own_keys: Shards, at: int,
) -> Rank:  # fmt: skip
    """One rank's costs from its stages."""
    wide = problem.accumulate.itemsize / problem.dtype.itemsize
    pairs, _, received, sent = stages.sum(0).tolist()
    to_heads, to_rows = swapped.traffic()
    traffic = Traffic(
        received + to_heads, sent + to_rows,
        received + int(sent * wide) + to_rows, sent + int(received * wide) + to_heads,
    )  # fmt: skip
    swaps = swapped.seconds(machine)
    forward, backward = (
        Passed(found.seconds + swaps, found.exposed + swaps)
        for found in (_forward(part, stages, machine), _backward(part, stages, machine, wide))
    )
    memory, back = _memory(part, stages, own_rows.rows(at), own_keys.rows(at), wide)
    told = tuple(Stage(*row) for row in stages.tolist()) if len(stages) <= FEW else ()
    return Rank(
        rank, rows.rows(rank), pairs, products(problem)[0] * pairs, traffic, told, forward, backward,
        memory + 2 * swapped.all, back + 4 * swapped.all,
    )  # fmt: skip


def _forward(part: Problem, stages: Tensor, machine: Machine) -> Passed:
    """While a stage is computed, what the next one needs is on its way."""
    return _overlapped(_work(part, stages, machine), _next(_transfers(stages, machine)))


def _backward(part: Problem, stages: Tensor, machine: Machine, wide: float) -> Passed:
    """The same; and what the stage before found for others' keys goes back."""
    work = _work(part, stages, machine, backward=True)
    back = _transfers(stages, machine, wide)
    found = _overlapped(work, _next(_transfers(stages, machine)) + torch.nn.functional.pad(back[:-1], (1, 0)))
    end = float(back[-1])
    return Passed(found.seconds + end, found.exposed + end)


def _work(part: Problem, stages: Tensor, machine: Machine, backward: bool = False) -> Tensor:
    """Seconds in which each stage is computed."""
    pairs, rows = stages[:, :2].double().unbind(1)
    seconds: Tensor = machine.seconds(part, pairs, rows, backward)
    return seconds


def _transfers(stages: Tensor, machine: Machine, wide: float = 1.0) -> Tensor:
    """Seconds in which each stage's bytes move; the first has none."""
    seconds: Tensor = machine.transfer(stages[:, 2:].max(1).values.double() * wide)
    return seconds


def _next(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x[1:], (0, 1))


def _overlapped(work: Tensor, moving: Tensor) -> Passed:
    exposed = float((moving - work).clamp(min=0).sum())
    return Passed(float(work.sum()) + exposed, exposed)


def _memory(part: Problem, stages: Tensor, rows: int, keys: int, wide: float) -> tuple[int, int]:
    """Bytes of tensors at the peaks of both directions."""
    p, size, acc = part, part.dtype.itemsize, part.accumulate.itemsize
    q, k = p.B * p.Hq * rows, p.B * p.Hkv * keys * (p.D + p.Dv)  # heads' rows; numbers of keys and values
    own = q * (p.D + p.Dv) * size + k * size + 3 * q * acc
    moving = stages[:, 2:].sum(1)
    # Two stages are in memory, and what is being sent to others is copied.
    two, held = int((moving + _next(moving)).max()), int(moving.max())
    # What a piece returns is there beside what all are joined in, which is the result itself where it has its dtype.
    piece, converted = p.B * p.Hq * min(rows, LONGEST), acc != size
    forward = own + two + piece * (p.Dv * size + 3 * acc) + q * p.Dv * acc * converted
    back = own + two + (q * p.D + k) * (acc + size * converted) + q * p.Dv * size
    back += piece * p.D * acc + k * size + int(2 * held * wide)
    return forward, back
