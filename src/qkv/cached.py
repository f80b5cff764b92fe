"""Attention over a cache's view: plan once for a kind of step, then pass addresses.

The native kernel reads pages where they lie. Where it cannot run the call, keys and values are copied to plain tensors
and a PyTorch backend computes.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.backends import base
from qkv.masks import Mask
from qkv.planning import check_backend, choose
from qkv.scores import ScoreTerm
from qkv.spec import Inputs, KVView, Output, Problem, empty_output
from qkv.validation import Options
from qkv.viewing import Group, check_view, gathered, groups, joined, problem_of, whole

# Prepared calls by everything that they depend on: a step's lengths and pages are none of it.
_PREPARED: dict[Any, base.ExecuteView] = {}
_MAX_PREPARED = 128
_lock = threading.Lock()


def attend(call: str, q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: Any) -> Output:
    """What `attention` returns for queries and a view."""
    key = _key(q, view, mask, options, backend) if v is None and options.positions is None else None
    execute = _PREPARED.get(key) if key is not None else None
    layout = view.layout
    fresh = layout.clock.now == layout.alive_at and (layout.most is None or q.shape[2] <= layout.most)
    if execute is not None and fresh and not _learns(q, options.sinks):
        try:
            return execute(q, view, (), options.sinks, options.return_lse)
        except ValueError:  # lengths or pages that do not fit: the checks below say which
            pass
    check_backend(call, backend)
    check_view(call, q, view, v, options)
    q = q.resolve_neg()
    known = joined(call, mask, view.held)
    if known is None or known.fits_any_length:
        group = whole(q, view)
        problem, inputs = problem_of(call, q, view, known, options, group)
        if all(term.kind in ("alibi", "relative") for term in problem.bias):
            native = _native(problem, view, backend)
            if native is None:
                return _copied(call, q, view, known, options, backend)
            execute = _prepare(native, problem, q, view, inputs)
            if key is not None and inputs.sinks is options.sinks:
                with _lock:
                    if len(_PREPARED) >= _MAX_PREPARED:
                        del _PREPARED[next(iter(_PREPARED))]
                    _PREPARED[key] = execute
            return execute(q, view, _tensors(inputs.bias), inputs.sinks, options.return_lse)
    return _by_group(call, q, view, known, options, backend)


def _by_group(call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, backend: Any) -> Output:
    """Sequences with equal lengths at a time: a mask or bias of theirs is made for these lengths."""
    planned: list[tuple[Group, base.ExecuteView, Inputs]] = []
    for group in groups(q, view):
        problem, inputs = problem_of(call, q, view, mask, options, group)
        native = _native(problem, view, backend)
        if native is None:
            return _copied(call, q, view, mask, options, backend)
        planned.append((group, _prepare(native, problem, q, view, inputs), inputs))
    to = _empty(q, view, options.return_lse)
    for group, execute, inputs in planned:
        execute(q, view, _tensors(inputs.bias), inputs.sinks, options.return_lse, to, list(group.sequences))
    return to


def _copied(call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, backend: Any) -> Output:
    """On copies of the keys and values, by a backend that knows no pages."""
    given = q
    if view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16):
        # What is stored has more digits than q's dtype: it is computed with as it is, and only the result is rounded.
        view, q = view._replace(dtype=torch.float32), q.float()
        if isinstance(options.bias, Tensor):
            options = options._replace(bias=options.bias.float())
        elif options.bias is not None:
            options = options._replace(bias=options.bias.with_tensors(tuple(t.float() for t in options.bias.tensors())))
    keys, values = gathered(view)
    queries = view.layout.queries
    starts = [0]
    for count in queries if queries is not None else ():
        starts.append(starts[-1] + count)
    to = _empty(q, view, True)
    assert to.lse is not None
    for group in groups(q, view):
        problem, inputs = problem_of(call, q, view, mask, options, group)
        rows = q
        if queries is not None:
            rows = q.new_zeros((len(queries), q.shape[1], group.Lq, q.shape[3]))
            for i in group.sequences:
                rows[i] = q[0, :, starts[i] : starts[i + 1]]
        problem = replace(problem, needs_lse=True, needs_grad=False)
        plan = choose(problem, backend, inputs.positions)
        k, v = keys[:, :, : group.Lk], values[:, :, : group.Lk]
        with torch.no_grad():
            out, lse, _ = base.load(plan.backend).run(problem, replace(inputs, q=rows, k=k, v=v))
        assert lse is not None
        for i in group.sequences:
            if queries is None:
                to.out[i], to.lse[i] = out[i], lse[i]
            else:
                to.out[0, :, starts[i] : starts[i + 1]], to.lse[0, :, starts[i] : starts[i + 1]] = out[i], lse[i]
    if given.dtype != q.dtype:
        to = Output(empty_output(given, view.v.shape[3]).copy_(to.out), to.lse)
    return to if options.return_lse else Output(to.out, None)


def _native(problem: Problem, view: KVView, backend: str | None) -> Any:
    """The backend that will run the problem, if it reads these pages where they lie."""
    chosen = base.load(backend or choose(problem, None).backend)
    if getattr(chosen, "prepare_view", None) is None:
        return None
    if backend is not None:
        choose(problem, backend)  # raises where it cannot run the call
    if view.k_scale is not None and problem.dtype == torch.float64:
        return None  # stored numbers are multiplied in float32 there
    return chosen


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
