"""Where a call is planned, prepared and run: on tensors, and on a cache's view.

What a backend prepared is kept for calls of the same kind, by one key: all that the checks and the plan depend on,
metadata, options and the mask, and never data. Who finds a call by its key need not check it again. A view's lengths
and pages are no part of a key: a step of decode is prepared once.

The native kernel reads pages where they lie. Where it cannot run a call on a view, keys and values are copied to plain
tensors, and another backend computes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from qkv.backends.base import Backend, Prepared
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Output, Problem, empty_output
from qkv.call.view import check_view, gathered, joined, problem_of
from qkv.masks import Mask
from qkv.plans import Part, check_backend, choose, over_view
from qkv.scores import ScoreTerm

# Of masks' tensors and what kernels made of them. A mask of a batch's packed documents is some MiB, and only the last
# few are of use; a plan without tensors weighs nothing and is held by the number of entries alone.
BUDGET = 64 << 20
LARGEST = BUDGET // 4
"""Bytes of the largest entry that is kept: one may not push out all others."""

now: Callable[[], int] = count().__next__
_WEIGHTLESS = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))


class Kept:
    """A value, when it was used last, and what it keeps alive."""

    __slots__ = ("__weakref__", "bytes", "holds", "used", "value")

    def __init__(self, value: Any, holds: tuple[Any, ...], bytes: int) -> None:
        self.value, self.holds, self.bytes, self.used = value, holds, bytes, now()


class Remembered(dict[Any, Kept]):
    """A table of at most `most` entries. Looking up needs no lock; everything that changes a table takes it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self._lock = most, threading.Lock()
        self._newest: Callable[[], Kept | None] = lambda: None

    def put(self, key: Any, value: Any, holds: tuple[Any, ...] = ()) -> None:
        """Keep the value, unless it is too large. `holds`: masks, tensors and tuples that the entry keeps alive."""
        kept = Kept(value, holds, weight(holds) if holds else 0)
        with self._lock:
            newest = self._newest()
            if newest is not None and newest.holds:
                # The call that made it has run since, and its mask may have kept what it computed.
                newest.bytes = weight(newest.holds)
            if kept.bytes > LARGEST:
                return
            self[key], self._newest = kept, weakref.ref(kept)
            if len(self) > self.most:
                del self[min(self, key=lambda k: self[k].used)]
            held = 0
            for entry in self.values():
                held += entry.bytes
            if held > BUDGET:
                self._shrink(held - BUDGET)

    def held(self) -> int:
        """Bytes that the entries keep alive, what two of them share counted twice."""
        with self._lock:
            return sum(kept.bytes for kept in self.values())

    def _shrink(self, excess: int) -> None:
        heavy = sorted((kept.used, key) for key, kept in self.items() if kept.bytes)
        for _, key in heavy:
            excess -= self.pop(key).bytes
            if excess <= 0:
                return


def weight(holds: Any) -> int:
    """Bytes of the tensors in a value, in its attributes and in theirs; each once."""
    seen: set[int] = set()
    left, found = [holds], 0
    while left:
        part = left.pop()
        if part.__class__ in _WEIGHTLESS or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            found += part.untyped_storage().nbytes()
        elif isinstance(part, (tuple, list)):
            left += part
        elif isinstance(part, dict):
            left += part.values()
        else:
            left += getattr(part, "__dict__", {}).values()
            for kind in type(part).__mro__:
                for name in getattr(kind, "__slots__", ()):
                    left.append(getattr(part, name, None))
    return found


PREPARED = Remembered(512)
"""What is kept of calls, and the masks that it keeps alive: bounded in bytes."""

PLAIN_POSITIONS = frozenset((type(None), str, int))
"""Classes of `positions=` that a key can hold as they are given: the others hold data."""


def key_of(
    q: Any, k: Any, v: Any, mask: Any, positions: Any, bias: Any, scale: Any, softcap: Any, dropout_p: Any, sinks: Any,
    return_lse: Any, backend: Any, learns: bool | str,
) -> Any:  # fmt: skip
    """All that a prepared call depends on, or None where no key can stand for it: two calls of one key are one kind.

    positions and bias are as given where they hold no data, else what stands for them: their metadata.
    """
    if sinks is not None:
        if sinks.is_neg() or (learns and sinks.is_inference()):  # the checks make another tensor of it
            return None
        sinks = (sinks.shape, sinks.stride(), sinks.dtype, sinks.device, sinks.__class__)
    # Classes are part of the key because True == 1 == 1.0, and a subclass of Tensor may have no storage.
    if k.__class__ is not KVView:
        if q.is_neg() or k.is_neg() or v.is_neg():
            return None
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.__class__,
            k.__class__, v.__class__, (q.is_cpu and k.is_cpu and v.is_cpu) or (q.device, k.device, v.device),
            k.data_ptr() == v.data_ptr(), mask, positions, positions.__class__, bias, scale, scale.__class__, softcap,
            softcap.__class__, dropout_p, sinks, return_lse, backend, learns,
        )  # fmt: skip
    if q.is_neg():
        return None
    keys, values, k_scale, v_scale, dtype, layout, held, _ = k
    return (
        q.shape, q.stride(), q.dtype, q.__class__, keys.shape, keys.stride(), keys.dtype, values.shape, values.stride(),
        keys.is_cpu, dtype, len(layout.lengths), layout.queries is None, held,
        None if k_scale is None else k_scale.stride(), None if v_scale is None else v_scale.stride(), mask, scale,
        scale.__class__, softcap, softcap.__class__, sinks, return_lse, backend,
    )  # fmt: skip


def users_own(mask: Mask | None) -> list[Any]:
    """The tensors and functions of the user's that a mask holds by reference."""
    found: list[Any] = []
    left: list[Any] = [mask]
    while left:
        part = left.pop()
        if isinstance(part, Mask):
            left += (value for name, value in vars(part).items() if not name.startswith("_"))  # the others are caches
        elif isinstance(part, tuple):
            left += part
        elif isinstance(part, Tensor) or callable(part):
            found.append(part)
    return found


def prepare(problem: Problem, inputs: Inputs, options: Options, backend: str | None, key: Any = None) -> Prepared:
    """The call made ready by the backend that its plan names; kept under its key, unless it holds what is the user's.

    `key`: where the call was looked for already, under that key.
    """
    own = problem.mask is not None and bool(users_own(problem.mask))
    if key is None and not own:
        q, k, v, where, _, sinks, _ = inputs
        positions = problem.positions if where is None else (problem.positions, where.shape)
        key = key_of(
            q, k, v, problem.mask, positions, problem.bias, options.scale, options.softcap, problem.dropout_p, sinks,
            options.return_lse, backend, "part" if problem.part else problem.needs_grad,
        )  # fmt: skip
        kept = PREPARED.get(key)
        if kept is not None:
            kept.used = now()
            found: Prepared = kept.value
            return found
    prepared = choose(problem, backend).chosen.prepare(problem, inputs)
    if not own and key is not None:
        PREPARED.put(key, prepared, () if problem.mask is None else (problem.mask, prepared.operands))
    return prepared


def draw_seed() -> Tensor:
    """A seed for dropout from torch's generator, the same one inside and outside of a graph."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def on_view(
    call: str, q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: Any, part: bool = False
) -> Output:
    """What `attention` returns for queries and a cache's view. `part`: its keys are some of those that rows see, and
    its state are `Output.rows`, by which parts are joined."""
    key = _view_key(q, view, mask, options, backend) if v is None else None
    if part and key is not None:
        key = (key, "part")
    kept = PREPARED.get(key) if key is not None else None
    layout = view.layout
    fresh = layout.clock.now == layout.alive_at and (layout.most is None or q.shape[2] <= layout.most)
    if kept is not None and fresh:
        kept.used = now()
        try:
            output: Output = kept.value.run(q, view, (), options.sinks)
            return output._replace(state=output.rows(kept.value.unit)) if part else output
        except ValueError:  # lengths or pages that do not fit: the checks below say which
            pass
    check_backend(call, backend)
    check_view(call, q, view, v, options)
    q = q.resolve_neg()
    known = joined(call, mask, view.held)
    plan, in_place, parts = over_view(call, q, view, known, options, backend)
    if not in_place:
        return _copied(call, q, view, known, options, plan.chosen, parts, part)
    planned = []
    for group, problem, inputs in parts:
        terms = () if inputs.bias is None else inputs.bias.tensors()
        ready = plan.chosen.prepare_view(replace(problem, part=part), q, view, terms, inputs.sinks)
        planned.append((ready, terms, inputs.sinks, group.sequences))
    if len(parts) == 1 and len(parts[0].group.sequences) == len(layout.lengths):
        ready, terms, sinks, _ = planned[0]
        if key is not None and (known is None or not users_own(known)):
            PREPARED.put(key, ready, (known, ready.operands))
        output = ready.run(q, view, terms, sinks)
        return output._replace(state=output.rows(ready.unit)) if part else output
    to = _empty(q, view, options.return_lse, part)
    for ready, terms, sinks, sequences in planned:
        ready.run(q, view, terms, sinks, to, list(sequences))
    return to._replace(state=to.rows(planned[0][0].unit)) if part and planned else to


def _view_key(q: Any, view: KVView, mask: Any, options: Options, backend: Any) -> Any:
    """The key of a call on a view, or None where a call has to be looked at anew."""
    o = options
    if o.positions is not None or o.bias is not None or o.return_lse.__class__ is not bool:
        return None
    if o.dropout_p.__class__ is not float or o.dropout_p != 0:
        return None
    if mask is not None and not (isinstance(mask, Mask) and mask.fits_any_length):
        return None
    try:
        learns = torch.is_grad_enabled() and (q.requires_grad or (o.sinks is not None and o.sinks.requires_grad))
        if learns or not q.is_cpu:
            return None
        return key_of(
            q, view, None, mask, None, None, o.scale, o.softcap, o.dropout_p, o.sinks, o.return_lse, backend, False
        )
    except (TypeError, AttributeError, RuntimeError):
        return None


def _copied(
    call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, chosen: Backend, parts: list[Part],
    part: bool,
) -> Output:  # fmt: skip
    """On copies of the keys and values, by a backend that knows no pages."""
    given = q
    if view.k_scale is not None and q.dtype in (torch.bfloat16, torch.float16):
        # What is stored has more digits than q's dtype: it is computed with as it is, and only the result is rounded.
        view, q, options = view._replace(dtype=torch.float32), q.float(), options._replace(bias=_wide(options.bias))
        parts = [Part(p.group, *problem_of(call, q, view, mask, options, p.group)) for p in parts]
    keys, values = gathered(view)
    queries = view.layout.queries
    starts = [0]
    for rows_of_one in queries if queries is not None else ():
        starts.append(starts[-1] + rows_of_one)
    to = _empty(q, view, options.return_lse, part)
    states = None if to.state is None else to.state.double()
    for group, problem, inputs in parts:
        rows = q
        if queries is not None:
            rows = q.new_zeros((len(queries), q.shape[1], group.Lq, q.shape[3]))
            for i in group.sequences:
                rows[i] = q[0, :, starts[i] : starts[i + 1]]
        inputs = inputs._replace(q=rows, k=keys[:, :, : group.Lk], v=values[:, :, : group.Lk])
        with torch.no_grad():
            out, lse, state = chosen.prepare(replace(problem, needs_grad=False, part=part), inputs).run(*inputs)
        for i in group.sequences:
            at: Any = (i,) if queries is None else (0, slice(None), slice(starts[i], starts[i + 1]))
            to.out[at] = out[i]
            if to.lse is not None:
                assert lse is not None
                to.lse[at] = lse[i]
            if states is not None:
                where: Any = (slice(None), *at)
                states[where] = Output(out, lse, state).rows(chosen.unit(problem))[:, i]
    if given.dtype != q.dtype:
        to = to._replace(out=empty_output(given, view.v.shape[3]).copy_(to.out))
    return to._replace(state=states)


def _wide(bias: Tensor | ScoreTerm | None) -> Tensor | ScoreTerm | None:
    if bias is None or isinstance(bias, Tensor):
        return None if bias is None else bias.float()
    return bias.with_tensors(tuple(t.float() for t in bias.tensors()))


def _empty(q: Tensor, view: KVView, with_lse: bool, with_state: bool) -> Output:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:3], dtype=accumulate, device=q.device) if with_lse else None
    state = torch.empty((2, *q.shape[:3]), dtype=accumulate, device=q.device) if with_state else None
    return Output(empty_output(q, view.v.shape[3]), lse, state)
