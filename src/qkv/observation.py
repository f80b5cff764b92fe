"""A call that is looked at: what `attention` computes, to the bit, and what its weights come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.backends.tiled.statistics import statistics
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Problem
from qkv.call.statistics import Statistics, Wanted
from qkv.call.validate import validate
from qkv.call.view import Group, check_view, gathered, groups, joined, problem_of
from qkv.execute import draw_seed, on_view, prepare
from qkv.plans import Plan, check_backend, choose, over_view


class Part(NamedTuple):
    """Sequences of one length of a call, and their tensors: of plain tensors, all batch rows."""

    sequences: tuple[int, ...]
    problem: Problem
    inputs: Inputs


class Observed(NamedTuple):
    """`out` is bitwise what `attention` gives; statistics of sequences of unequal lengths are padded.

    Past a sequence's own queries and keys there is NaN, in keys -1, in mass and map 0.
    """

    out: Tensor
    statistics: Statistics
    plan: Plan
    parts: tuple[Part, ...]


def observe(
    call: str, q: Tensor, k: Tensor | KVView, v: Tensor | None, mask: Any, options: Options, backend: str | None,
    wanted: Wanted,
) -> Observed:  # fmt: skip
    """Run a call on the backend that its plan names, and find the statistics of its weights.

    A backend that has statistics of its own gives them on the way (`Backend.observe`); for the others `tiled` looks at
    the scores once more. Nothing is differentiated.
    """
    check_backend(call, backend)
    with torch.no_grad():
        if isinstance(k, KVView):
            return _of_view(call, q, k, v, mask, options, backend, wanted)
        problem, inputs = validate(call, q, k, v, mask, options)
        wanted = _fitting(wanted, problem.Lq, problem.Lk)
        plan = choose(problem, backend)
        if problem.dropout_p > 0:  # as `attention` draws it
            inputs = inputs._replace(seed=int(draw_seed()))
        found = plan.chosen.observe(problem, inputs, wanted)
        if found is None:
            out = prepare(problem, inputs, options, backend).run(*inputs)[0]
            found = out, statistics(problem, inputs, wanted)
        every = tuple(range(problem.B))
        return Observed(found[0], found[1], plan, (Part(every, problem, inputs),))


def _fitting(wanted: Wanted, Lq: int, Lk: int) -> Wanted:
    if wanted.bins is None:
        return wanted
    return wanted._replace(bins=(min(wanted.bins[0], Lq), min(wanted.bins[1], Lk)))


def _of_view(
    call: str, q: Tensor, view: KVView, v: Tensor | None, mask: Any, options: Options, backend: Any, wanted: Wanted
) -> Observed:
    check_view(call, q, view, v, options)
    known = joined(call, mask, view.held)
    plan, in_place, placed = over_view(call, q, view, known, options, backend)
    native = None
    if in_place:
        parts_in_place = [(group.sequences, problem, inputs) for group, problem, inputs in placed]
        native = plan.chosen.observe_view(q.resolve_neg(), view, parts_in_place, wanted)
    out = on_view(call, q, view, v, mask, options, backend).out if native is None else native[0]
    wide = view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16)
    if wide:  # what is stored has more digits than q's dtype
        q, view = q.float(), view._replace(dtype=torch.float32)
    keys, values = gathered(view)
    queries = view.layout.queries
    parts: list[Part] = []
    for group in groups(q, view):
        problem, inputs = problem_of(call, q, view, known, options, group)
        rows = _rows_of(q, queries, group)
        inputs = inputs._replace(q=rows, k=keys[:, :, : group.Lk], v=values[:, :, : group.Lk])
        parts.append(Part(group.sequences, replace(problem, needs_grad=False), inputs))
    if native is not None:
        return Observed(out, native[1], plan, tuple(parts))
    found = [
        statistics(part.problem, part.inputs, _fitting(wanted, part.problem.Lq, part.problem.Lk)) for part in parts
    ]
    return Observed(out, _padded(parts, found, len(view.layout.lengths)), plan, tuple(parts))


def _rows_of(q: Tensor, queries: Any, group: Group) -> Tensor:
    """The queries of a group's sequences, one batch row each: (sequences of the view, Hq, Lq, D)."""
    if queries is None:
        return q
    rows, start = q.new_zeros((len(queries), q.shape[1], group.Lq, q.shape[3])), 0
    for i, count in enumerate(queries):
        if i in group.sequences:
            rows[i] = q[0, :, start : start + count]
        start += count
    return rows


def _padded(parts: list[Part], found: list[Statistics], n: int) -> Statistics:
    """The statistics of all sequences side by side."""
    if len(parts) == 1 and len(parts[0].sequences) == n:
        return found[0]
    fields: dict[str, Tensor | None] = {}
    for name in Statistics._fields:
        values = [getattr(one, name) for one in found]
        if not values or values[0] is None:
            fields[name] = None
            continue
        size = [max(v.shape[d] for v in values) for d in range(1, values[0].dim())]
        nothing = -1 if name == "top_keys" else 0 if name in ("mass", "map") else torch.nan
        to = values[0].new_full((n, *size), nothing)
        for part, value in zip(parts, values, strict=True):
            for i in part.sequences:
                to[i][tuple(slice(0, s) for s in value.shape[1:])] = value[i]
        fields[name] = to
    return Statistics(**fields)  # type: ignore[arg-type]
