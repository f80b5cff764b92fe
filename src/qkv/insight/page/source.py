"""What the page reads of a trace: its fields under one roof, and, where it holds the call's tensors, its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.statistics import Statistics
from qkv.insight.record import Head, Record
from qkv.insight.rectangle import rectangle

CALL = "Trace.html()"
MOST_LANES = 256


@dataclass(frozen=True)
class Lane:
    """One query head of one batch row: a page shows one at a time."""

    number: int
    batch: int
    place: int
    """Of the head among those that were traced."""
    facts: Head
    name: str
    Lq: int
    Lk: int
    values: int
    """Which of `value_norms`' heads it reads."""
    covered: bool
    """Whether the trace's picture of the mask is that of this lane, too."""

    @property
    def head(self) -> int:
        return self.facts.head

    @property
    def live(self) -> int:
        """Queries that see a key and are no NaN."""
        return self.Lq - self.facts.dead - self.facts.bad


class Row(NamedTuple):
    """One query by the definition, in float64."""

    dot: Tensor  # (Lk,) q . k
    score: Tensor  # scaled, capped, biased; -inf where hidden
    visible: Tensor
    weight: Tensor
    value: Tensor  # (Lk, Dv)
    norm: Tensor  # (Lk,) |v|
    out: Tensor  # (Dv,)
    lse: float
    kernel: Tensor | None  # what the call returned


class Source:
    """A trace as the page takes it."""

    def __init__(self, trace: Record) -> None:
        self.trace = trace
        self.B, self.Hq, self.Hkv, self.Lq, self.Lk, self.D, self.Dv = trace.shapes
        self.statistics: Statistics = trace.statistics
        self.dtype: torch.dtype = getattr(torch, trace.dtype, torch.float32)
        self.has_bias, self.has_sinks = bool(trace.bias), trace.sinks is not None
        self.heads = trace.heads

    @cached_property
    def lanes(self) -> list[Lane]:
        """A lane for each batch row and traced head, the first MOST_LANES of them."""
        t = self.trace
        every = [(b, place) for b in range(self.B) for place in range(len(t.heads))][:MOST_LANES]
        return [self._lane(number, b, place) for number, (b, place) in enumerate(every)]

    def _lane(self, number: int, b: int, place: int) -> Lane:
        t = self.trace
        facts = t.table[b][place]
        name = f"head {facts.head}" if self.B == 1 else f"row {b}, head {facts.head}"
        values = facts.kv_head if len(t.heads) == self.Hq else min(place, t.value_norms.shape[1] - 1)
        return Lane(number, b, place, facts, name, *t.lengths[b], values, self._covers(b, place))

    def _covers(self, b: int, place: int) -> bool:
        if (b, place) == (0, 0):
            return True
        if self.trace.held is None or self.trace.lengths[b] != self.trace.lengths[0]:
            return False
        problem = self.trace.held.parts[0].problem
        return (b == 0 or not problem.varies_by_batch) and (place == 0 or not problem.varies_by_head)

    @property
    def held(self) -> bool:
        """Whether rows and windows can be computed."""
        return self.trace.held is not None

    def weights(self, lane: Lane, q: tuple[int, int], k: tuple[int, int]) -> Tensor:
        """The exact weights of a rectangle."""
        held = self.trace.held
        if held is None:
            raise AssertionError("windows are for traces that hold their tensors")
        part, lse, head = (
            held.part_of(CALL, lane.batch),
            self.statistics.lse,
            torch.tensor([lane.place], dtype=torch.int64, device="cpu"),
        )
        return rectangle(part.problem, part.inputs, lse, lane.batch, head, slice(*q), slice(*k)).weights[0].cpu()

    def rows(self, lane: Lane, wanted: Sequence[int]) -> list[Row]:
        """Queries in full; raises where a tensor of the call was changed since it was looked at."""
        held = self.trace.held
        if held is None:
            return []
        part = held.part_of(CALL, lane.batch)
        b, g = lane.batch, lane.place // part.problem.group
        key, value = (x.detach()[b, g].double().cpu() for x in (part.inputs.k, part.inputs.v))
        out, found = held.out, []
        plain = tuple(out.shape[:3]) == (self.B, len(self.heads), self.Lq)
        norms, clean = value.norm(dim=-1), torch.nan_to_num(value, 0.0, 0.0, 0.0)
        fine = norms.isfinite()  # what is hidden may hold anything
        head, sinks = torch.tensor([lane.place], dtype=torch.int64, device="cpu"), self.trace.sinks
        sink = (
            torch.zeros(0, dtype=torch.float64, device="cpu").double()
            if sinks is None
            else sinks[lane.place, None].double().cpu()
        )
        for i in wanted:
            lse = self.statistics.lse
            one = rectangle(part.problem, part.inputs, lse, lane.batch, head, slice(i, i + 1), slice(0, lane.Lk))
            score, visible = (x[0, 0].cpu() for x in one[1:3])
            visible = visible & (score != -torch.inf)
            norm = torch.cat((score, sink)).logsumexp(0)  # in float64: the trace's lse has the digits of its dtype
            weight = torch.where(visible, (score - norm).exp(), 0.0)
            dot = key @ part.inputs.q.detach()[b, lane.place, i].double().cpu()
            if self.trace.pages is not None:  # what hidden slots of a cache hold is nobody's
                dot = dot.masked_fill(~visible, torch.nan)
            mixed = weight @ clean if bool(fine[visible].all()) else weight[visible] @ value[visible]
            kernel = out[lane.batch, lane.place, i].detach().cpu() if plain else None
            found.append(Row(dot, score, visible, weight, value, norms, mixed, float(norm), kernel))
        return found

    def series(self, x: Tensor, lane: Lane) -> Tensor:
        """A statistic of the lane's queries, in float64."""
        return x[lane.batch, lane.place, : lane.Lq].double()

    def mass(self, lane: Lane) -> Tensor | None:
        """What each key of the lane receives, as a share of all."""
        mass = self.statistics.mass
        return None if mass is None else mass[lane.batch, lane.place, : lane.Lk].double() / max(1, lane.live)

    @property
    def positions(self) -> str:
        """Where the queries stand, in words."""
        p = self.trace.positions
        if not p.numel():
            return "none"
        first, last = p[:, 0], p[:, -1]
        steady = bool((p[:, 1:] - p[:, :-1] == 1).all()) and bool((first == first[0]).all())
        if steady and not len({x for x, _ in self.trace.lengths}) > 1:
            where = f"query 0 stands on {int(first[0]):,}, the last on {int(last[0]):,}"
            return f"{where} of {self.Lk:,} keys"
        return "each batch row has its own" if len(p) > 1 else "as they were given, not one after the other"
