"""Attention over a cache's view: plan once for a kind of step, then pass addresses.

The native kernel reads pages where they lie. Where it cannot run the call, keys and values are copied to plain tensors
and a PyTorch backend computes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.backends import base
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Output, Problem, empty_output
from qkv.call.view import check_view, gathered, joined, problem_of
from qkv.masks import Mask
from qkv.plans import Part, Plan, check_backend, over_view
from qkv.remembered import Remembered, now
from qkv.scores import ScoreTerm

# Prepared calls by everything that they depend on: a step's lengths and pages are none of it.
_PREPARED = Remembered(128)


def attend(call: str, q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: Any) -> Output:
    """What `attention` returns for queries and a view."""
    key = _key(q, view, mask, options, backend) if v is None and options.positions is None else None
    kept = _PREPARED.get(key) if key is not None else None
    layout = view.layout
    fresh = layout.clock.now == layout.alive_at and (layout.most is None or q.shape[2] <= layout.most)
    if kept is not None and fresh and not _learns(q, options.sinks):
        kept.used = now()
        try:
            output: Output = kept.value(q, view, (), options.sinks, options.return_lse)
            return output
        except ValueError:  # lengths or pages that do not fit: the checks below say which
            pass
    check_backend(call, backend)
    check_view(call, q, view, v, options)
    q = q.resolve_neg()
    known = joined(call, mask, view.held)
    plan, in_place, parts = over_view(call, q, view, known, options, backend)
    if not in_place:
        return _copied(call, q, view, known, options, plan, parts)
    native = base.load(plan.backend)
    planned = [(part, _prepare(native, part.problem, q, view, part.inputs)) for part in parts]
    if len(parts) == 1 and len(parts[0].group.sequences) == len(view.layout.lengths):
        execute, inputs = planned[0][1], parts[0].inputs
        if key is not None and inputs.sinks is options.sinks:
            _PREPARED.put(key, execute, (known, getattr(execute, "operands", ())))
        return execute(q, view, _tensors(inputs.bias), inputs.sinks, options.return_lse)
    to = _empty(q, view, options.return_lse)
    for (group, _, inputs), execute in planned:
        execute(q, view, _tensors(inputs.bias), inputs.sinks, options.return_lse, to, list(group.sequences))
    return to


def _copied(
    call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, plan: Plan, parts: list[Part]
) -> Output:
    """On copies of the keys and values, by a backend that knows no pages."""
    given, backend = q, base.load(plan.backend)
    if view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16):
        # What is stored has more digits than q's dtype: it is computed with as it is, and only the result is rounded.
        view, q = view._replace(dtype=torch.float32), q.float()
        if isinstance(options.bias, Tensor):
            options = options._replace(bias=options.bias.float())
        elif options.bias is not None:
            options = options._replace(bias=options.bias.with_tensors(tuple(t.float() for t in options.bias.tensors())))
        parts = [Part(p.group, *problem_of(call, q, view, mask, options, p.group)) for p in parts]
    keys, values = gathered(view)
    queries = view.layout.queries
    starts = [0]
    for count in queries if queries is not None else ():
        starts.append(starts[-1] + count)
    to = _empty(q, view, options.return_lse)
    for group, problem, inputs in parts:
        rows = q
        if queries is not None:
            rows = q.new_zeros((len(queries), q.shape[1], group.Lq, q.shape[3]))
            for i in group.sequences:
                rows[i] = q[0, :, starts[i] : starts[i + 1]]
        k, v = keys[:, :, : group.Lk], values[:, :, : group.Lk]
        with torch.no_grad():
            out, lse, _ = backend.run(replace(problem, needs_grad=False), replace(inputs, q=rows, k=k, v=v))
        for i in group.sequences:
            at: Any = (i,) if queries is None else (0, slice(None), slice(starts[i], starts[i + 1]))
            to.out[at] = out[i]
            if to.lse is not None:
                assert lse is not None
                to.lse[at] = lse[i]
    if given.dtype != q.dtype:
        to = Output(empty_output(given, view.v.shape[3]).copy_(to.out), to.lse)
    return to


def _prepare(native: Any, problem: Problem, q: Tensor, view: KVView, inputs: Inputs) -> base.ExecuteView:
    prepared: base.ExecuteView = native.prepare_view(problem, q, view, _tensors(inputs.bias), inputs.sinks)
    return prepared


def _empty(q: Tensor, view: KVView, with_lse: bool) -> Output:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:3], dtype=accumulate, device=q.device) if with_lse else None
    return Output(empty_output(q, view.v.shape[3]), lse)


def _tensors(bias: ScoreTerm | None) -> tuple[Tensor, ...]:
    return bias.tensors() if bias is not None else ()


def _learns(q: Tensor, sinks: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or (sinks is not None and sinks.requires_grad))


def _key(q: Any, view: KVView, mask: Any, options: Options, backend: Any) -> Any:
    """All that a prepared call depends on, or None where a call has to be looked at anew."""
    o = options
    if (
        o.bias is not None
        or o.dropout_p.__class__ is not float
        or o.dropout_p != 0
        or o.return_lse.__class__ is not bool
    ):
        return None
    if not (mask is None or (isinstance(mask, Mask) and mask.fits_any_length)):
        return None
    k, v, k_scale, v_scale = view.k, view.v, view.k_scale, view.v_scale
    try:
        if not q.is_cpu or q.is_neg():
            return None
        return (
            q.shape, q.stride(), q.dtype, q.__class__, k.shape, k.stride(), k.dtype, v.shape, v.stride(),
            None if k_scale is None else k_scale.stride(), None if v_scale is None else v_scale.stride(),
            view.dtype, len(view.layout.lengths),
            view.layout.queries is None, view.held, mask, o.scale, o.scale.__class__, o.softcap, o.softcap.__class__,
            None if o.sinks is None else (o.sinks.shape, o.sinks.stride(), o.sinks.dtype, o.sinks.device),
            o.sinks.__class__, o.return_lse, backend,
        )  # fmt: skip
    except (TypeError, AttributeError, RuntimeError):
        return None
