"""Attention over keys that other ranks hold: they come stage by stage, each while the one before is computed.

    forward     own keys, then those of each stage: pieces are computed, and joined in this order
    backward    keys and values come once more; dK and dV of a stage go back to who holds the keys, in the accumulation
                dtype, and are added in the order of the stages

A rank computes for its own queries alone, and its results stay where they are. The order of all sums follows from the
plan, so bits are the same from run to run. Of others' keys those of two stages are in memory at most, with dK and dV of
two in the backward pass; "allgather" has one stage.

Source: Liu et al., Ring Attention (2023), for the order; the joining is the online softmax's (Milakov and Gimelshein
2018).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qkv.call.problem import Output
from qkv.distributed.agreement import agree_again
from qkv.distributed.exchange import Exchange, Piece, Stage
from qkv.distributed.parts import Joined, Whole
from qkv.distributed.shards import Ranges, merged, place
from qkv.distributed.transport import Group, Pending
from qkv.scores import ScoreTerm


@dataclass(frozen=True, eq=False)
class Run:
    """One call on one rank."""

    whole: Whole
    exchange: Exchange
    group: Group
    method: str

    def over(self, bias: Sequence[Tensor], positions: Tensor | None) -> Run:
        """The same over these tensors of its bias and positions."""
        term = self.whole.bias
        term = None if term is None else term.with_tensors(bias)
        return replace(self, whole=replace(self.whole, bias=term, positions=positions))

    def stages(self) -> tuple[Stage, ...]:
        """In order; the first is what the rank holds itself."""
        return self.exchange.stages(self.group.rank, self.method)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Output:
        """out in q's dtype, lse and state of the rank's rows."""
        p = self.whole.problem
        joined = Joined(p, q.shape[2], q.device, self.whole.unit)
        with closing(self.arriving(k, v)) as stages:
            for stage, keys in stages:
                for piece in stage.pieces:
                    rows, mine, values = self.rows(piece), *keys.find(piece.keys)
                    problem, inputs = self.whole.inputs_of(piece, q, mine, values, rows)
                    joined.add(rows, self.whole.run(problem, inputs))
                    del mine, values, inputs
                del keys  # while the next are waited for, those after them find their memory
        joined.add_sinks(sinks)
        return joined.finish(q.dtype)

    def arriving(self, k: Tensor, v: Tensor) -> Generator[tuple[Stage, Keys], None, None]:
        """Each stage with its keys; those of the next are on their way while one is computed.

        Closed early, after an error, it waits for those."""
        stages = self.stages()
        coming: tuple[Pending, Mailbox] | None = None
        try:
            for n, stage in enumerate(stages):
                if coming is None:
                    keys = [Keys.held(self.exchange.keys.ranges[self.group.rank], k, v)]
                else:
                    coming[0].wait()
                    keys, coming = [coming[1].keys()], None  # where it copies, what it copied goes
                if n + 1 < len(stages):
                    coming = self._ask(n + 1, stages[n + 1], k, v)
                yield stage, keys.pop()  # it is the caller's, and goes when the caller is done
        finally:
            if coming is not None:
                coming[0].leave()

    def _ask(self, n: int, stage: Stage, k: Tensor, v: Tensor) -> tuple[Pending, Mailbox]:
        box = Mailbox(stage.arrives, k, v)
        leaving = [(other, torch.cat([x.flatten() for x in self.own(ranges, k, v)])) for other, ranges in stage.leaves]
        return self.group.exchange(f"stage {n}: keys and values", box.letters(), leaving), box

    def own(self, ranges: Ranges, *tensors: Tensor) -> list[Tensor]:
        """Ranges of the rank's own keys: of each range its part of each tensor (B, Hkv, keys, width)."""
        held = self.exchange.keys.ranges[self.group.rank]
        return [x[:, :, place(held, part)] for part in ranges for x in tensors]

    def rows(self, piece: Piece) -> slice:
        """Where a piece's queries stand among the rank's own."""
        return place(self.exchange.queries.ranges[self.group.rank], piece.queries)


@dataclass(eq=False)
class Keys:
    """Keys of the sequence and their values by ranges."""

    ranges: Ranges
    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def held(cls, ranges: Ranges, k: Tensor, v: Tensor) -> Keys:
        """Those of a tensor that holds the ranges one after the other."""
        slices = [place(ranges, part) for part in ranges]
        return cls(ranges, [k[:, :, s] for s in slices], [v[:, :, s] for s in slices])

    def zeros(self, kind: torch.dtype) -> Keys:
        """As many zeros, for gradients."""
        k, v = ([torch.zeros(x.shape, dtype=kind, device=x.device) for x in xs] for xs in (self.k, self.v))
        return Keys(self.ranges, k, v)

    def find(self, part: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """k and v of some keys that are in one range."""
        for (start, stop), k, v in zip(self.ranges, self.k, self.v, strict=True):
            if start <= part[0] and part[1] <= stop:
                inside = slice(part[0] - start, part[1] - start)
                return k[:, :, inside], v[:, :, inside]
        raise AssertionError(f"{part} is not in {self.ranges}")


class Mailbox:
    """Memory for what some ranks send: of each its ranges in order, of each range k, then v."""

    def __init__(self, senders: Sequence[tuple[int, Ranges]], k: Tensor, v: Tensor, dtype: torch.dtype | None = None):
        self.senders, self.widths, self.lead = senders, (k.shape[3], v.shape[3]), tuple(k.shape[:2])
        each = self.lead[0] * self.lead[1] * sum(self.widths)
        self.memory = [
            torch.empty(each * _count(ranges), dtype=dtype or k.dtype, device=k.device) for _, ranges in senders
        ]

    def letters(self) -> list[tuple[int, Tensor]]:
        """Each rank's message."""
        return [(other, x) for (other, _), x in zip(self.senders, self.memory, strict=True)]

    def parts(self) -> Iterator[tuple[int, tuple[int, int], Tensor, Tensor]]:
        """Rank, range, k and v."""
        for (other, ranges), x in zip(self.senders, self.memory, strict=True):
            at = 0
            for start, stop in ranges:
                found = []
                for width in self.widths:
                    size = (*self.lead, stop - start, width)
                    number = size[0] * size[1] * size[2] * width
                    found.append(x[at : at + number].view(size))
                    at += number
                yield other, (start, stop), found[0], found[1]

    def keys(self) -> Keys:
        """The keys of all ranks; ranges that meet are copied next to each other, to be computed at once."""
        parts = sorted(((part, k, v) for _, part, k, v in self.parts()), key=lambda x: x[0])
        ranges = merged([part for part, _, _ in parts])
        groups: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in ranges]
        at = 0
        for part, k, v in parts:
            while part[0] >= ranges[at][1]:
                at += 1
            groups[at][0].append(k)
            groups[at][1].append(v)
        k_v = [[x[0] if len(x) == 1 else torch.cat(x, 2) for x in group] for group in groups]
        return Keys(ranges, [x[0] for x in k_v], [x[1] for x in k_v])


def _count(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


class Sums:
    """What a rank's gradients add up to, in the accumulation dtype or a wider one.

    `learns`: which of the bias's tensors want theirs."""

    def __init__(self, run: Run, q: Tensor, k: Tensor, v: Tensor, learns: Sequence[bool]) -> None:
        p, bias, wanted = run.whole.problem, run.whole.bias, iter(learns)
        self.q, self.k, self.v = (torch.zeros(x.shape, dtype=p.accumulate, device=x.device) for x in (q, k, v))
        self.terms: list[tuple[ScoreTerm, tuple[Tensor, ...] | None]] = []
        for term in () if bias is None else bias.terms:
            mine = any([next(wanted) for _ in term.tensors()])
            self.terms.append((term, term.new_gradients(p.accumulate) if mine else None))

    def add_bias(self, found: Sequence[Tensor], rows: slice, keys: slice) -> None:
        left = iter(found)
        for term, sums in self.terms:
            mine = [next(left) for _ in term.tensors()]
            if sums is not None:
                for to, x in zip(term.with_tensors(sums).cut(rows, keys).tensors(), mine, strict=True):
                    to += x

    def of_bias(self) -> list[Tensor | None]:
        """Of each tensor in its dtype, or None."""
        found: list[Tensor | None] = []
        for term, sums in self.terms:
            given = term.tensors()
            found += [None] * len(given) if sums is None else [x.to(t.dtype) for x, t in zip(sums, given, strict=True)]
        return found


class _Gradients:
    """One backward pass on one rank."""

    def __init__(
        self, run: Run, q: Tensor, k: Tensor, v: Tensor, whole: Output, d_out: Tensor, d_lse: Tensor, sums: Sums
    ) -> None:
        self.run, self.q, self.k, self.v, self.whole = run, q, k, v, whole
        self.d_out, self.d_lse, self.sums = d_out, d_lse, sums
        self.returns: list[tuple[Pending, Mailbox]] = []

    def all(self) -> None:
        """Of all stages, into the sums."""
        try:
            with closing(self.run.arriving(self.k, self.v)) as stages:
                n = -1
                for stage, keys in stages:  # without enumerate, which would hold the last keys
                    n += 1
                    if n == 0:
                        held = self.run.exchange.keys.ranges[self.run.group.rank]
                        self._stage(stage, keys, Keys.held(held, self.sums.k, self.sums.v))
                        del keys
                        continue
                    mine = keys.zeros(self.sums.k.dtype)
                    self._stage(stage, keys, mine)
                    del keys
                    self._send_back(n, stage, mine)
                    del mine
            while self.returns:
                self._take(*self.returns[0])
                del self.returns[0]
        finally:
            for pending, _ in self.returns:
                pending.leave()

    def _stage(self, stage: Stage, keys: Keys, to: Keys) -> None:
        for piece in stage.pieces:
            rows, (k, v) = self.run.rows(piece), keys.find(piece.keys)
            problem, inputs = self.run.whole.inputs_of(piece, self.q, k, v, rows)
            out, lse, state = self.whole
            assert lse is not None
            assert state is not None
            known = Output(out[:, :, rows], lse[:, :, rows].contiguous(), state[:, :, :, rows].contiguous())
            found = self.run.whole.gradients(problem, inputs, known, self.d_out[:, :, rows], self.d_lse[:, :, rows])
            self.sums.q[:, :, rows] += found.q
            dk, dv = to.find(piece.keys)
            dk += found.k
            dv += found.v
            self.sums.add_bias(found.bias, rows, slice(*piece.keys))

    def _send_back(self, n: int, stage: Stage, mine: Keys) -> None:
        """To who holds the keys; and what others found for the rank's own keys is on its way to it."""
        kind = self.sums.k.dtype
        leaving = [
            (other, torch.cat([x.flatten() for x in chain(*(mine.find(part) for part in ranges))]))
            for other, ranges in stage.arrives
        ]
        box = Mailbox(stage.leaves, self.k, self.v, kind)
        pending = self.run.group.exchange(f"stage {n}: gradients of keys and values", box.letters(), leaving, 1)
        self.returns.append((pending, box))
        while len(self.returns) > 2:  # the oldest are there by now
            self._take(*self.returns[0])
            del self.returns[0]

    def _take(self, pending: Pending, box: Mailbox) -> None:
        pending.wait()
        for _, part, k, v in box.parts():
            to_k, to_v = self.run.own((part,), self.sums.k, self.sums.v)
            to_k += k
            to_v += v


class Attend(Function):
    """`Run.attend` as a function of autograd's."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, positions: Any, *bias: Tensor
    ) -> Any:
        found = run.attend(q, k, v, sinks)
        ctx.run = run.over([t.new_empty(0) for t in bias], None)  # what is saved is held once, where hooks may move it
        # All that the backward pass reads: autograd notices what is changed in place before that.
        ctx.save_for_backward(q, k, v, sinks, positions, *found, *bias)
        return found.out, found.lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, sinks, positions, out, lse, state, *bias = ctx.saved_tensors
        run: Run = ctx.run.over(bias, positions)
        if not run.group.mesh:  # in a grid they have agreed before rows became heads
            agree_again(run.group, direct=True)
        sums = Sums(run, q, k, v, ctx.needs_input_grad[6:])
        _Gradients(run, q, k, v, Output(out, lse, state), d_out, d_lse.to(lse.dtype), sums).all()
        d_sinks = None
        if sinks is not None:
            m, l = state
            share = torch.where(l == 0, 0.0, torch.exp(sinks.to(m.dtype)[:, None] - m * run.whole.unit) / l)
            delta = (d_out.to(m.dtype) * out.to(m.dtype)).sum(-1)
            d_sinks = (share * (d_lse - delta)).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
        return (
            None, sums.q.to(q.dtype), sums.k.to(k.dtype), sums.v.to(v.dtype), d_sinks, None, *sums.of_bias(),
        )  # fmt: skip
