"""The ways in which keys and queries of several ranks meet: keys come to queries, or all rows of a head to one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qkv import execute
from qkv.autograd import attend, savable
from qkv.call.problem import Inputs, Options, Output, Problem
from qkv.distributed.exchange import exchange
from qkv.distributed.heads import Swap, ToHeads, ToRows, head_cuts
from qkv.distributed.parts import Whole, mixed
from qkv.distributed.ring import Attend, Run
from qkv.distributed.shards import Shards, blocks, folded
from qkv.distributed.transport import Group
from qkv.masks import Mask
from qkv.masks.portion import portion
from qkv.plans import choose
from qkv.scores import ScoreTerm


class Call(NamedTuple):
    """A checked call: its problem is the whole sequence's, its tensors are the rank's own."""

    problem: Problem
    inputs: Inputs
    bias: ScoreTerm | None
    options: Options
    rows: Shards
    keys: Shards
    method: str
    backend: str | None

    def tensors(self) -> tuple[Tensor, ...]:
        """The bias's."""
        return () if self.bias is None else self.bias.tensors()


def prepared(call: Call, groups: Sequence[Group]) -> Callable[[], Output]:
    """The call planned, without a message; calling it runs it."""
    if call.method in ("ring", "allgather"):
        ready = ByKeys(call, groups[0], call.method)
        inputs = call.inputs
        return lambda: ready.run(inputs.q, inputs.k, inputs.v, call.tensors(), inputs.sinks, drawn(call.problem))
    return ByHeads(call, None if call.method == "ulysses" else groups[0], groups[-1]).run


def drawn(problem: Problem) -> int:
    """The seed of a call's dropout."""
    return int(execute.draw_seed()) if problem.dropout_p else 0


class ByKeys:
    """Keys come to the rank's queries: "ring" or "allgather"."""

    def __init__(self, call: Call, group: Group, method: str) -> None:
        p = call.problem
        self.call, self.group, self.method = call, group, method
        self.plan, self.backend = exchange(p, call.rows, call.keys, call.inputs.positions), _backend(p, call.backend)

    def run(self, q: Tensor, k: Tensor, v: Tensor, bias: tuple[Tensor, ...], sinks: Tensor | None, seed: int) -> Output:
        """out and lse of the rank's rows."""
        problem, inputs, term, options, *_ = self.call
        plain = options._replace(positions=None, bias=None, sinks=None)  # of data the rest is what counts
        whole = Whole(problem, plain, self.backend, term, inputs.positions, seed)
        run = Run(whole, self.plan, self.group, self.method)
        if problem.needs_grad:
            return Output(*Attend.apply(run, q, k, v, sinks, *map(savable, (inputs.positions, *bias))))
        return run.attend(q, k, v, sinks)


def _backend(problem: Problem, backend: str | None) -> str:
    """One for all pieces, so that their rows' states have one unit: it has to take masks of portions."""
    p = problem
    mask = None if p.mask is None else portion(p.mask, first_key=1, first_query=1, Lq=p.Lq + 1, Lk=p.Lk + 1)
    return choose(replace(p, mask=mask, needs_grad=True, needs_lse=True, has_sinks=False, part=True), backend).backend


class ByHeads:
    """Rows become heads among the ranks of `group`, and back; between those of `ring`, if any, keys come to queries.

    The ranks of the shards are in row-major order of (ring, group).
    """

    def __init__(self, call: Call, ring: Group | None, group: Group) -> None:
        p, self.call, self.group = call.problem, call, group
        cuts, key_cuts = head_cuts(p.Hq, p.Hkv, group.size)
        self.heads = start, stop = cuts[group.rank]
        here, count = (0, 1) if ring is None else (ring.rank, ring.size)
        rows, keys = (blocks(shards, count) for shards in (call.rows, call.keys))
        q_swap, self.out_swap = Swap(group, cuts, rows[here], "queries"), Swap(group, cuts, rows[here], "results")
        k_swap, v_swap = (Swap(group, key_cuts, keys[here], what) for what in ("keys", "values"))
        self.swaps = q_swap, k_swap, v_swap
        self.mask: Mask | None = None
        self.bias: ScoreTerm | None = None
        self.inner: ByKeys | None = None
        if start == stop:
            return
        self.mask = None if p.mask is None else p.mask.of_heads(start, stop, p.Hq)  # type: ignore[assignment]
        self.bias = None if call.bias is None else call.bias.of_heads(slice(start, stop))
        first, last = key_cuts[group.rank]
        bias = () if self.bias is None else self.bias.specs()
        problem = replace(p, Hq=stop - start, Hkv=last - first, mask=self.mask, bias=bias)
        if ring is None and call.backend is not None:
            choose(problem, call.backend)  # whether it can: of some masks' heads one rank's may be refused
        if ring is not None:
            own_rows, own_keys = (folded(shards, count) for shards in (call.rows, call.keys))
            inner = call._replace(problem=problem, bias=self.bias, rows=own_rows, keys=own_keys)
            self.inner = ByKeys(inner, ring, "ring")

    def run(self) -> Output:
        """out and lse of the rank's rows."""
        call, (start, stop) = self.call, self.heads
        p, inputs = call.problem, call.inputs
        seed = mixed(drawn(p), start)
        q, k, v = ToHeads.apply(self.swaps, inputs.q, inputs.k, inputs.v)
        if start == stop:
            common = [t for t in (inputs.sinks, *call.tensors()) if t is not None]
            found = Output(*Idle.apply(p, q, k, v, *common))
        else:
            found = self._attend(q, k, v, None if inputs.sinks is None else inputs.sinks[start:stop], seed)
        if not p.needs_lse:
            return Output(ToRows.apply(self.out_swap, p.Hq, found.out)[0], None)
        assert found.lse is not None
        out, lse = ToRows.apply(self.out_swap, p.Hq, found.out, found.lse.unsqueeze(-1))
        return Output(out, lse.squeeze(-1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seed: int) -> Output:
        if self.inner is not None:
            return self.inner.run(q, k, v, self.inner.call.tensors(), sinks, seed)
        options = self.call.options._replace(bias=self.bias, sinks=sinks)
        return attend(q, k, v, self.mask, options, self.call.backend, seed=seed)


class Idle(Function):
    """What a rank without heads does where others attend: it only hands on, but with the same graph as theirs.

    A tensor is kept for the backward pass as theirs are: a checkpoint computes again up to where all are back."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, q: Tensor, k: Tensor, v: Tensor, *common: Tensor) -> Any:
        p = problem
        ctx.save_for_backward(q, k, v, *common)
        out = q.new_empty(p.B, 0, q.shape[2], p.Dv)
        return out, out.new_empty(p.B, 0, q.shape[2], dtype=p.accumulate)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        return None, *map(torch.zeros_like, ctx.saved_tensors)
