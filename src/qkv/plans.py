"""From a problem to a plan: which backend runs, why each other one does not, and what the work costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.backends import amounts, base, rates, registry
from qkv.backends.amounts import Dense
from qkv.backends.tiled.schedule import TileCount, pairs_of, tiles_of
from qkv.call import keywords
from qkv.call.keys import KVView
from qkv.call.problem import Inputs, Options, Problem
from qkv.call.validate import validate
from qkv.call.view import Group, check_view, groups, joined, longest, problem_of
from qkv.checks import Operand, short, shown
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.masks import Mask
from qkv.masks.counts import Look, Pairs
from qkv.scores import ScoreTerm

_warned = False

# Queries of a sequence up to which reading pages where they lie beats copies for a faster kernel: one query of decode
# takes the portable kernel 1/2 to 1/30 of the time of the copies alone, 512 queries 3 times that of copies and kernel.
_COPIES_PAY = 32
_GLANCE = 1 << 22  # pairs that `visible` looks at one by one: 0.1 s


@dataclass(frozen=True)
class Answers:
    """What the backends say of the problems of one call: each is asked once, and only where that decides something."""

    problem: Problem
    every: tuple[Problem, ...]
    pages: bool

    @cached_property
    def native(self) -> base.Backend | str:
        """The native backend, or why it is not installed."""
        return find("cpu")

    @cached_property
    def cannot(self) -> str | None:
        """Why the native backend cannot run the call."""
        if not isinstance(self.native, str):
            return _refusal(self.native, self.every)
        return self.native if self.problem.device in ("cpu", "meta") else f"tensors are on {self.problem.device}"

    @cached_property
    def measured(self) -> base.Advice | None:
        """Which of the native kernel and PyTorch's own was measured faster here, where a recording says it."""
        if isinstance(self.native, str) or self.problem.device != "cpu":
            return None
        return self.native.measured(self.problem)

    @cached_property
    def untuned(self) -> str | None:
        """Why PyTorch's own kernel would go first."""
        if self.measured is None:
            return torch_first(self.problem.device, self.native)
        return self.measured.text if self.measured.backend == "sdpa" else None

    @cached_property
    def lacking(self) -> str | None:
        """Why PyTorch's own kernel cannot run the call."""
        return _refusal(registry.load("sdpa"), self.every)

    @property
    def few(self) -> bool:
        """Whether reading pages where they lie beats copies of them."""
        return self.pages and self.problem.Lq <= _COPIES_PAY


@dataclass(frozen=True)
class Plan:
    """What will run, and why. `print` it; `attention` executes nothing else.

    A value: plans of equal calls are equal and have one hash, whatever is written into the calls' tensors later. Calls
    are equal where metadata, options, masks and positions are; the data of q, k, v, bias and sinks is not asked.
    """

    problem: Problem
    chosen: base.Backend
    answers: Answers | None
    """What was found on the way; None where the backend was asked for by its name."""
    positions: Operand | None = None
    """Those of all queries, where they were given as a tensor: which tiles are visible depends on them."""
    pages: str = ""
    """How the keys of a cache's view are read; empty for tensors."""

    @property
    def backend(self) -> str:
        return self.chosen.name

    @property
    def cached(self) -> bool:
        """Whether the keys are a cache's view."""
        return bool(self.pages)

    @property
    def reason(self) -> str:
        return self._told[0]

    @property
    def refused(self) -> tuple[tuple[str, str], ...]:
        """(backend, why it does not run) for every other backend."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        name, found = self.backend, self.answers
        if found is None:
            others = [other for other in ("cpu", "sdpa", "tiled", "reference") if other != name]
            return "asked for by backend=", tuple((other, f"{name!r} was asked for") for other in others)
        last = ("reference", "its memory is quadratic: only by name")
        if name == "sdpa":
            why = found.cannot or found.untuned
            reason = f"{found.untuned or found.cannot}, and the call needs nothing that PyTorch's own kernel lacks"
            return reason, (("cpu", str(why)), ("tiled", "PyTorch's own kernel is faster"), last)
        if name == "cpu":
            reason, other = "the native kernel supports this call", "the native kernel promises more"
            if found.measured is not None and found.untuned is None:
                reason, other = f"{reason}; {found.measured.text}", "the native kernel was measured faster here"
            if found.few and found.untuned is not None:
                reason, other = (
                    "it reads the pages where they lie",
                    "copies of the pages would cost more than they save",
                )
            return reason, (("sdpa", found.lacking or other), ("tiled", "the native kernel is faster"), last)
        return "it takes any call on any device", (("cpu", str(found.cannot)), ("sdpa", str(found.lacking)), last)

    @property
    def note(self) -> str:
        """What the backend wants its reader to know, such as promises that do not hold."""
        return "; ".join(filter(None, (self.chosen.note(self.problem), self.pages)))

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.chosen.tile(self.problem)

    @cached_property
    def tiles(self) -> TileCount:
        """Tiles of `tile` = (queries, keys) that hold a visible key, that are visible throughout, and all."""
        return tiles_of(self.problem, self._rows, self.tile)

    @cached_property
    def pairs(self) -> int:
        """Pairs of query and key that are computed, over all batch rows and heads."""
        return self.chosen.visited(self.problem, self._rows)

    @property
    def _rows(self) -> Tensor | None:
        return self.positions.tensor if self.positions is not None else None

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products over the pairs that are computed."""
        return 2 * (self.problem.D + self.problem.Dv) * self.pairs

    @cached_property
    def visible(self) -> Pairs:
        """Pairs of query and key that the mask leaves, over all batch rows and heads: at least, and at most.

        Equal for every mask but a tensor or a function of too many pairs: those are looked at up to a limit.
        """
        return self.look(_GLANCE)

    def look(self, pairs: int, tell: Callable[[int], None] = lambda rows: None) -> Pairs:
        """`visible`, where so many pairs may be looked at one by one; `tell` is told of rows of queries, as counted."""
        return pairs_of(self.problem, self._rows, Look(pairs, tell))

    @property
    def bytes(self) -> int:
        """Bytes of q, k, v and out: what has to move at least once."""
        p = self.problem
        numbers = p.B * (p.Hq * p.Lq * (p.D + p.Dv) + p.Hkv * p.Lk * (p.D + p.Dv))
        return numbers * p.dtype.itemsize

    @property
    def seconds(self) -> float | None:
        """About how long the call takes on this machine, forward; None where that is not known: off the CPU.

        The first prediction for a dtype and a head size times a few calls, 0.1 s, unless `qkv doctor --tune` did.
        """
        return rates.seconds(self.chosen, self.problem, self.pairs)

    @property
    def gradient_seconds(self) -> float | None:
        """About how long its gradients take; None where nothing learns, or that is not known."""
        p = self.problem
        known = p.needs_grad and not self.chosen.differentiable and self.chosen.no_backward(p) is None
        return rates.seconds(self.chosen, p, self.pairs, backward=True) if known else None

    @property
    def dense(self) -> Dense:
        """The same call without a mask, and the mask as a tensor."""
        p = self.problem
        pairs = p.B * p.Hq * p.Lq * p.Lk
        batch, heads = (p.B if p.varies_by_batch else 1), (p.Hq if p.varies_by_head else 1)
        return Dense(pairs, 2 * (p.D + p.Dv) * pairs, batch * heads * p.Lq * p.Lk)

    @property
    def dense_seconds(self) -> float | None:
        """About how long the same call without a mask takes; None as for `seconds`."""
        return rates.seconds(self.chosen, replace(self.problem, mask=None), self.dense.pairs)

    @property
    def gradients(self) -> str:
        """What computes first derivatives, and what further ones and forward mode."""
        if self.cached:
            return "none: the keys of a cache have none"
        backend = self.chosen
        further = "second derivatives and forward mode: tiled; third: only by backend='reference'"
        if backend.differentiable:
            first = f"{self.backend}, by autograd through its own operations"
            return f"{first}; {further}" if backend.has_backward else first
        why = backend.no_backward(self.problem)
        first = f"{self.backend}, by its own backward pass" if why is None else "tiled"
        first += f" ({why})" if why is not None and self.backend != "tiled" else ""
        return f"{first}; {further}"

    def __str__(self) -> str:
        p = self.problem
        dtype = short(p.dtype)
        lines = [
            f"problem   q ({p.B}, {p.Hq}, {p.Lq}, {p.D})  k ({p.B}, {p.Hkv}, {p.Lk}, {p.D})  "
            f"v ({p.B}, {p.Hkv}, {p.Lk}, {p.Dv})  {dtype} on {p.device}",
            f"mask      {shown(p.mask) if p.mask is not None else 'none: every key is visible'}",
            f"backend   {self.backend}: {self.reason}",
        ]
        lines += [f"          {self.note}"] if self.note else []
        lines += [f"{'refused' if not i else '':<10}{name}: {why}" for i, (name, why) in enumerate(self.refused)]
        lines += [f"gradients {self.gradients}"]
        return "\n".join([*lines, *self.costs()])

    def costs(self) -> list[str]:
        """Its last lines: tiles, pairs, work, memory and time, beside those of the same call without a mask."""
        p, tiles = self.problem, self.tiles
        part = f" ({tiles.visible / tiles.total:.2%})" if tiles.total else ""
        lines = [
            f"tiles     {tiles.visible:,} of {tiles.total:,} visited{part}, {tiles.full:,} of them fully visible; "
            f"one tile is {self.tile[0]} queries x {self.tile[1]} keys",
            f"pairs     {amounts.of_pairs(self.visible, self.pairs, self.dense.pairs)}",
            *amounts.of_work(self.flops, self.bytes, self.dense if p.mask is not None else None),
        ]
        known = self.seconds
        if known is not None:
            dense = self.dense_seconds if p.mask is not None else None
            lines.append(f"time      {amounts.of_time(known, self.gradient_seconds, dense)}")
        return lines


def find(name: str) -> base.Backend | str:
    """The backend of that name, or why it is not installed."""
    try:
        backend = registry.load(name)
    except ImportError as error:
        return f"the native extension is not installed ({error})"
    return backend if backend.missing is None else backend.missing


def check_backend(call: str, backend: Any) -> None:
    """`backend=` is None or a known name."""
    if backend is None or (isinstance(backend, str) and backend in registry.NAMES):
        return
    fix = f"Use one of {', '.join(registry.NAMES)}, or leave it out"
    if not isinstance(backend, str):
        raise ArgumentTypeError.of(call, "backend is a name", f"backend={shown(backend)}", fix)
    raise ArgumentError.of(call, "backend must be a known name", f"backend={backend!r}", fix)


def choose(problem: Problem, backend: str | None, *, parts: Sequence[Problem] = (), pages: bool = False) -> Plan:
    """The plan for a problem: the backend asked for, or the first that can and should run it. Nothing else decides.

    The order: PyTorch's own kernel where ours are missing or not tuned for the machine and the call needs nothing that
    it lacks; the native kernel; tiled, which can do everything.

    `parts`: the problems that are computed in place of this one, where there are; what runs can run each of them.
    `pages`: keys lie on a cache's pages, which the native kernel reads where they lie; others need copies.
    """
    every = tuple(parts) or (problem,)
    if backend is not None:
        return Plan(problem, _by_name(problem, backend, every), None)
    found = Answers(problem, every, pages)
    native = found.native
    if isinstance(native, str) and problem.device == "cpu":
        _warn_once(native)
    can = found.cannot is None
    if (not can or found.untuned is not None) and not (can and found.few) and found.lacking is None:
        return Plan(problem, registry.load("sdpa"), found)
    if can and not isinstance(native, str):
        return Plan(problem, native, found)
    tiled = registry.load("tiled")
    why = tiled.supports(problem)
    if why is not None:
        fix = "Move the tensors to a device with data"
        rule = f"no backend can run this call, because {why}"
        raise UnsupportedError.of(problem.call, rule, f"tensors on {problem.device!r}", fix)
    return Plan(problem, tiled, found)


def torch_first(device: str, native: base.Backend | str) -> str | None:
    """Why PyTorch's own kernel goes first on a device, where it can do the call; None where ours does."""
    if device != "cpu":
        return f"there is no kernel of ours for {device}"
    return native if isinstance(native, str) else native.untuned()


def _refusal(backend: base.Backend, problems: Sequence[Problem]) -> str | None:
    """Why the backend cannot run one of the problems, or None where it can run all."""
    for problem in problems:
        if (why := backend.supports(problem)) is not None:
            return why
    return None


def _by_name(problem: Problem, name: str, every: Sequence[Problem]) -> base.Backend:
    chosen = find(name)
    why = chosen if isinstance(chosen, str) else _refusal(chosen, every)
    if why is not None or isinstance(chosen, str):
        fix = "Choose another backend, or leave it out and print qkv.plan(...) for what runs"
        rule = f"backend {name!r} cannot run this call, because {why}"
        raise UnsupportedError.of(problem.call, rule, f"backend={name!r}", fix)
    return chosen


def _warn_once(why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        how = "its own kernel ('sdpa') where that can do the call, else 'tiled'"
        warnings.warn(f"qkv: {why}; attention runs in PyTorch: {how}.", UserWarning, stacklevel=5)


def plan(
    q: Tensor,
    k: Tensor | KVView,
    v: Tensor | None = None,
    mask: Any = None,
    *,
    positions: Any = None,
    bias: Tensor | ScoreTerm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Plan:
    """Say what `attention` would do with the same arguments, without touching the data.

    Parameters
    ----------
    q, k, v, mask, positions, bias, scale, softcap, sinks, dropout_p, return_lse, backend
        As in `attention`; v may be left out, and then counts as a tensor like k. For a cache's view the plan counts
        every sequence as long as the longest.

    Returns
    -------
    Plan
        Print it: the backend, why each other was refused, tiles, FLOPs, bytes. The same as fields: backend, refused,
        tiles, flops, bytes. A value: plans of equal calls are equal, and have one hash.

    Raises
    ------
    QKVError
        Whatever `attention` would raise for these arguments.

    Notes
    -----
    Cost: O(Lq / tile) time and memory; 1,000,000 tokens of a sliding window take a few milliseconds. No data is read.

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = v = torch.zeros(1, 1, 1, 64).expand(1, 8, 100_000, 64)
    >>> found = qkv.plan(q, k, v, mask=qkv.sliding_window(512), backend="tiled")
    >>> found.backend, found.tiles.visible < found.tiles.total / 100
    ('tiled', True)
    """
    call = "qkv.plan()"
    if unknown:
        raise keywords.unknown(call, unknown, plan)
    check_backend(call, backend)
    options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
    if isinstance(k, KVView):
        return _plan_view(call, q, k, v, mask, options, backend)
    problem, inputs = validate(call, q, k, k if v is None else v, mask, options)
    if problem.device == "meta":  # tensors without data stand for ones that have it
        problem = replace(problem, device="cpu")
    found = choose(problem, backend)
    return found if inputs.positions is None else replace(found, positions=Operand(inputs.positions))


def _plan_view(call: str, q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: str | None) -> Plan:
    check_view(call, q, view, v, options)
    found = over_view(call, q, view, joined(call, mask, view.held), options, backend)
    stored = short(view.k.dtype)
    how = "read where they lie" if found.in_place else "copied first"
    return replace(found.plan, pages=f"keys in {stored} on pages of {view.k.shape[2]}, {how}")


class Part(NamedTuple):
    """Sequences of a view that are computed together, as a problem."""

    group: Group
    problem: Problem
    inputs: Inputs


class ViewPlan(NamedTuple):
    """What runs for a view: the plan of all sequences as if each were the longest, and the parts that are computed."""

    plan: Plan
    in_place: bool
    """Whether the backend reads the pages where they lie; else keys and values are copied first."""
    parts: list[Part]
    """Sequences with equal lengths; or one for all, where the mask and the bias are the same for any lengths."""


def over_view(call: str, q: Tensor, view: KVView, mask: Mask | None, options: Options, backend: str | None) -> ViewPlan:
    """The one rule for a view: what runs, whether on the pages themselves, and in which parts.

    `mask` is joined with what the cache holds (`call.view.joined`).
    """

    def part(group: Group) -> Part:
        return Part(group, *problem_of(call, q, view, mask, options, group))

    fits = mask is None or mask.fits_any_length
    parts = None if fits and options.bias is None else [part(group) for group in groups(q, view)]
    one = part(longest(q, view))
    # What holds for any lengths need not be planned for each.
    if fits and all(t.kind in ("alibi", "relative") for t in one.problem.bias) and _reads(backend or "cpu", one, view):
        plan = choose(one.problem, backend, pages=True)
        if _reads(plan.backend, one, view):
            return ViewPlan(plan, True, [one])
    parts = [p for p in parts or map(part, groups(q, view)) if p.group.Lq]
    plan = choose(one.problem, backend, parts=[p.problem for p in parts], pages=True)
    return ViewPlan(plan, _reads(plan.backend, one, view), parts)


def _reads(backend: str, one: Part, view: KVView) -> bool:
    """Whether the backend takes the view's pages as they are stored."""
    if view.k_scale is not None and one.problem.dtype == torch.float64:
        return False  # stored numbers are multiplied in float32 there
    found = find(backend)
    return not isinstance(found, str) and found.reads_pages
