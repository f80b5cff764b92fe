"""The ways in which keys and queries of several ranks meet: keys come to queries, or all rows of a head to one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from qkv import execute
from qkv.call.problem import Inputs, Options, Problem
from qkv.distributed.exchange import exchange
from qkv.distributed.heads import Swap, ToHeads, ToRows, head_cuts
from qkv.distributed.parts import Whole
from qkv.distributed.ring import Attend, Run
from qkv.distributed.shards import Ranges, Shards
from qkv.distributed.transport import Group
from qkv.errors import UnsupportedError
from qkv.functional import attention
from qkv.masks import Mask
from qkv.masks.portion import portion
from qkv.merging import OutputWithLse
from qkv.plans import choose
from qkv.scores import ScoreTerm, TensorBias


class Call(NamedTuple):
    """A checked call: its problem is the whole sequence's, its tensors are the rank's own."""

    problem: Problem
    inputs: Inputs
    bias: ScoreTerm | None
    options: Options
    rows: Shards
    keys: Shards
    backend: str | None


def by_keys(call: Call, group: Group, method: str) -> OutputWithLse:
    """Keys come to the rank's queries: "ring" or "allgather"."""
    problem, inputs, bias, options, rows, keys, backend = call
    plan = exchange(problem, rows, keys, inputs.positions)
    name = _backend(problem, backend)
    seed = int(execute.draw_seed()) if problem.dropout_p else 0
    run = Run(Whole(problem, options, name, bias, inputs.positions, seed, group.rank), plan, group, method)
    q, k, v, sinks, tensors = inputs.q, inputs.k, inputs.v, inputs.sinks, () if bias is None else bias.tensors()
    if torch.is_grad_enabled() and (problem.needs_grad or any(t.requires_grad for t in tensors)):
        return OutputWithLse(*Attend.apply(run, q, k, v, sinks, *tensors))
    found = run.attend(q, k, v, sinks)
    assert found.lse is not None
    return OutputWithLse(found.out, found.lse)


def _backend(problem: Problem, backend: str | None) -> str:
    """One for all pieces, so that their rows' states have one unit: it has to take masks of portions."""
    p = problem
    mask = None if p.mask is None else portion(p.mask, first_key=1, first_query=1, Lq=p.Lq + 1, Lk=p.Lk + 1)
    return choose(replace(p, mask=mask, needs_grad=True, needs_lse=True, has_sinks=False, part=True), backend).backend


def by_heads(call: Call, ring: Group | None, group: Group) -> OutputWithLse:
    """Rows become heads among the ranks of `group`, and back; between those of `ring`, if any, keys come to queries.

    The ranks of the shards are in row-major order of (ring, group).
    """
    p, inputs, o = call.problem, call.inputs, call.options
    cuts, key_cuts = head_cuts(p.Hq, p.Hkv, group.size)
    start, stop = cuts[group.rank]
    rows, keys = (_blocks(shards, ring, group) for shards in (call.rows, call.keys))
    here = 0 if ring is None else ring.rank
    q_swap, out_swap = Swap(group, cuts, rows[here], "queries"), Swap(group, cuts, rows[here], "results")
    k_swap, v_swap = (Swap(group, key_cuts, keys[here], what) for what in ("keys", "values"))
    q, k, v = ToHeads.apply((q_swap, k_swap, v_swap), inputs.q, inputs.k, inputs.v)
    if start == stop:  # more ranks than heads: this one only hands on
        wide = inputs.q.new_zeros((p.B, 0, q.shape[2]), dtype=p.accumulate)
        found = OutputWithLse(q[..., :1].expand(*q.shape[:3], p.Dv), wide + q.sum(-1, dtype=p.accumulate))
    else:
        mask = None if p.mask is None else p.mask.of_heads(start, stop, p.Hq)
        assert mask is None or isinstance(mask, Mask)
        bias = None if call.bias is None else _bias(p.call, call.bias).of_heads(slice(start, stop))
        sinks = None if inputs.sinks is None else inputs.sinks[start:stop]
        if ring is None:
            found = attention(
                q, k, v, mask, positions=o.positions, bias=bias, scale=o.scale, softcap=o.softcap, sinks=sinks,
                dropout_p=o.dropout_p, return_lse=True, backend=call.backend,
            )  # fmt: skip
        else:
            problem = replace(p, Hq=stop - start, Hkv=k.shape[1], mask=mask, bias=() if bias is None else bias.specs())
            own_rows, own_keys = (Shards([_joined(block) for block in blocks]) for blocks in (rows, keys))
            inner = Inputs(q, k, v, inputs.positions, None, sinks)
            found = by_keys(Call(problem, inner, bias, o, own_rows, own_keys, call.backend), ring, "ring")
    out, lse = ToRows.apply(out_swap, p.Hq, found.out, found.lse.unsqueeze(-1))
    return OutputWithLse(out, lse.squeeze(-1))


def _blocks(shards: Shards, ring: Group | None, group: Group) -> list[tuple[Ranges, ...]]:
    """For each rank of the ring, the rows of the ranks that swap with each other there."""
    n = group.size
    return [shards.ranges[at * n : (at + 1) * n] for at in range(1 if ring is None else ring.size)]


def _joined(ranges: tuple[Ranges, ...]) -> Ranges:
    return tuple(sorted(part for mine in ranges for part in mine))


def _bias(call: str, bias: ScoreTerm) -> ScoreTerm:
    """Raise for a tensor with a row a query: other ranks have the other rows of a head."""
    for term in bias.terms:
        if isinstance(term, TensorBias):
            (t,) = term.tensors()
            if t.dim() > 1 and t.shape[-2] > 1:
                rule = "a bias tensor with a row a query stays with its queries, and ulysses and hybrid move those"
                fix = "Use method='ring' or 'allgather', or a bias of shape (B, Hq, 1, Lk)"
                raise UnsupportedError.of(call, rule, f"bias {tuple(t.shape)}", fix)
    return bias
