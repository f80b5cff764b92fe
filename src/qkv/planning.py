"""From a problem to a plan: which backend runs, why each other one does not, and what the work costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qkv import cures
from qkv.backends import base
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError, describe
from qkv.masks.arguments import shown
from qkv.scores import ScoreTerm
from qkv.spec import Inputs, KVView, Problem
from qkv.tiling import TileCount, View, count_tiles
from qkv.validation import Options, validate
from qkv.viewing import check_view, groups, joined, problem_of, whole

_warned = False


@dataclass(frozen=True)
class Plan:
    """What will run, and why. `print` it; `attention` executes nothing else."""

    problem: Problem
    backend: str
    reason: str
    refused: tuple[tuple[str, str], ...]
    """(backend, why it does not run) for every other backend."""
    note: str
    """What the backend wants its reader to know, such as promises that do not hold."""
    tile: tuple[int, int]
    positions: Tensor | None = None
    cached: bool = False
    """Whether the keys are a cache's view."""

    @cached_property
    def tiles(self) -> TileCount:
        """Tiles of `tile` = (queries, keys) that hold a visible key, that are visible throughout, and all."""
        p = self.problem
        batch, heads = (p.B if p.varies_by_batch else min(p.B, 1)), (p.Hq if p.varies_by_head else min(p.Hq, 1))
        rows = self.positions.cpu() if self.positions is not None else None
        views = [
            View(
                b, h, 0 if rows is not None else p.offset(b), None if rows is None else rows[b if len(rows) > 1 else 0]
            )
            for b in range(batch)
            for h in range(heads)
        ]
        times = (p.B // batch if batch else 0) * (p.Hq // heads if heads else 0)
        return TileCount(*(times * n for n in count_tiles(p.mask, views, p.Lq, p.Lk, *self.tile)))

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products over the visible tiles."""
        p = self.problem
        tile = min(self.tile[0], p.Lq) * min(self.tile[1], p.Lk)
        pairs = min(self.tiles.visible * tile, p.B * p.Hq * p.Lq * p.Lk)
        return 2 * (p.D + p.Dv) * pairs

    @property
    def bytes(self) -> int:
        """Bytes of q, k, v and out: what has to move at least once."""
        p = self.problem
        numbers = p.B * (p.Hq * p.Lq * (p.D + p.Dv) + p.Hkv * p.Lk * (p.D + p.Dv))
        return numbers * p.dtype.itemsize

    @property
    def gradients(self) -> str:
        """What computes first derivatives, and what further ones and forward mode."""
        if self.cached:
            return "none: the keys of a cache have none"
        backend = base.load(self.backend)
        if backend.differentiable:
            return f"{self.backend}, by autograd through its own operations"
        why = base.no_backward(backend, self.problem)
        first = f"{self.backend}, by its own backward pass" if why is None else "tiled"
        first += f" ({why})" if why is not None and self.backend != "tiled" else ""
        return f"{first}; second derivatives and forward mode: tiled; third: only by backend='reference'"

    def __str__(self) -> str:
        p, tiles = self.problem, self.tiles
        dtype = str(p.dtype).removeprefix("torch.")
        lines = [
            f"problem   q ({p.B}, {p.Hq}, {p.Lq}, {p.D})  k ({p.B}, {p.Hkv}, {p.Lk}, {p.D})  "
            f"v ({p.B}, {p.Hkv}, {p.Lk}, {p.Dv})  {dtype} on {p.device}",
            f"mask      {shown(p.mask) if p.mask is not None else 'none: every key is visible'}",
            f"backend   {self.backend}: {self.reason}",
        ]
        lines += [f"          {self.note}"] if self.note else []
        lines += [f"{'refused' if not i else '':<10}{name}: {why}" for i, (name, why) in enumerate(self.refused)]
        lines += [f"gradients {self.gradients}"]
        part = f" ({tiles.visible / tiles.total:.2%})" if tiles.total else ""
        lines += [
            f"tiles     {tiles.visible:,} of {tiles.total:,} visited{part}, {tiles.full:,} of them fully visible; "
            f"one tile is {self.tile[0]} queries x {self.tile[1]} keys",
            f"work      {_unit(self.flops, 'FLOP', 1000)}",
            f"memory    {_unit(self.bytes, 'B', 1024)} of inputs and output",
        ]
        return "\n".join(lines)


def _unit(n: float, unit: str, step: int) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if n < step or prefix == "P":
            text = f"{n:.3g}" if prefix else f"{n:.0f}"
            return f"{text} {prefix}{'i' if step == 1024 and prefix else ''}{unit}".replace("ki", "Ki")
        n /= step
    raise AssertionError


def check_backend(call: str, backend: Any) -> None:
    """`backend=` is None or a known name."""
    if backend is None or (isinstance(backend, str) and backend in base.NAMES):
        return
    fix = f"Use one of {', '.join(base.NAMES)}, or leave it out"
    if not isinstance(backend, str):
        raise ArgumentTypeError(describe(call, "backend is a name", f"backend={shown(backend)}", fix))
    raise ArgumentError(describe(call, "backend must be a known name", f"backend={backend!r}", fix))


def choose(problem: Problem, backend: str | None, positions: Tensor | None = None) -> Plan:
    """The plan for a problem: the backend asked for, or the first that can and should run it.

    The order: the native kernel; PyTorch's own where there is no tuned kernel for the machine and the call needs
    nothing that it lacks; tiled, which can do everything.
    """
    if backend is not None:
        return _by_name(problem, backend, positions)
    native, tiled, sdpa = _find("cpu"), base.load("tiled"), base.load("sdpa")
    cannot = native if isinstance(native, str) else native.supports(problem)
    untuned = None if cannot is not None else getattr(native, "untuned", lambda _: None)(problem)
    lacking = sdpa.supports(problem)
    only_by_name = ("reference", "its memory is quadratic: only by name")
    if lacking is None and (untuned is not None or problem.device != "cpu"):
        reason = "no tuned kernel of ours for this machine, and the call needs nothing that PyTorch's lacks"
        refused = (("cpu", cannot or str(untuned)), ("tiled", "PyTorch's own kernel is faster"), only_by_name)
        return _plan(problem, sdpa, reason, refused, positions)
    if cannot is None and not isinstance(native, str):
        refused = (
            ("sdpa", lacking or "the native kernel promises more"),
            ("tiled", "the native kernel is faster"),
            only_by_name,
        )
        return _plan(problem, native, "the native kernel supports this call", refused, positions)
    if isinstance(native, str):
        _warn_once(problem, native)
    why = tiled.supports(problem)
    if why is not None:
        fix = "Move the tensors to a device with data"
        rule = f"no backend can run this call, because {why}"
        raise UnsupportedError(describe(problem.call, rule, f"tensors on {problem.device!r}", fix))
    refused = (("cpu", str(cannot)), ("sdpa", lacking or "tiled promises more"), only_by_name)
    return _plan(problem, tiled, "it takes any call on any device", refused, positions)


def _by_name(problem: Problem, name: str, positions: Tensor | None) -> Plan:
    chosen = _find(name)
    why = chosen if isinstance(chosen, str) else chosen.supports(problem)
    if why is not None or isinstance(chosen, str):
        fix = "Choose another backend, or leave it out and print qkv.plan(...) for what runs"
        rule = f"backend {name!r} cannot run this call, because {why}"
        raise UnsupportedError(describe(problem.call, rule, f"backend={name!r}", fix))
    others = tuple(
        (other, f"{name!r} was asked for") for other in ("cpu", "sdpa", "tiled", "reference") if other != name
    )
    return _plan(problem, chosen, "asked for by backend=", others, positions)


def _plan(
    problem: Problem, backend: base.Backend, reason: str, refused: tuple[tuple[str, str], ...], positions: Tensor | None
) -> Plan:
    return Plan(problem, backend.name, reason, refused, backend.note(problem), backend.tile(problem), positions)


def _find(name: str) -> base.Backend | str:
    """The backend of that name, or why it is not installed."""
    try:
        backend = base.load(name)
    except ImportError as error:
        return f"the native extension is not installed ({error})"
    missing = getattr(backend, "missing", None)
    return missing if isinstance(missing, str) else backend


def _warn_once(problem: Problem, why: str) -> None:
    global _warned
    if not _warned and problem.device == "cpu":
        _warned = True
        warnings.warn(f"qkv: {why}; attention runs in plain PyTorch (backend 'tiled').", UserWarning, stacklevel=5)


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
    q, k, v, mask and all others
        As in `attention`; v may be left out, and then counts as a tensor like k. For a cache's view the plan counts
        every sequence as long as the longest.

    Returns
    -------
    Plan
        Print it: the backend, why each other was refused, tiles, FLOPs, bytes. The same as fields: backend, refused,
        tiles, flops, bytes.

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
        raise cures.unknown(call, unknown, plan)
    check_backend(call, backend)
    options = Options(positions, bias, scale, softcap, sinks, dropout_p, return_lse)
    if isinstance(k, KVView):
        return _plan_view(call, q, k, v, mask, options, backend)
    problem, inputs = validate(call, q, k, k if v is None else v, mask, options)
    if problem.device == "meta":  # tensors without data stand for ones that have it
        problem = replace(problem, device="cpu")
    return choose(problem, backend, inputs.positions)


def _plan_view(call: str, q: Any, view: KVView, v: Any, mask: Any, options: Options, backend: str | None) -> Plan:
    check_view(call, q, view, v, options)
    known = joined(call, mask, view.held)
    if (known is not None and not known.fits_any_length) or options.bias is not None:
        for group in groups(q, view):
            problem_of(call, q, view, known, options, group)
    problem, inputs = problem_of(call, q, view, known, options, whole(q, view))
    found, k_scaled = choose(problem, backend, inputs.positions), view.k_scale is not None
    wide = k_scaled and problem.dtype == torch.float64
    in_place = getattr(base.load(found.backend), "prepare_view", None) is not None and not wide
    stored = str(view.k.dtype).removeprefix("torch.")
    pages = f"keys in {stored} on pages of {view.k.shape[2]}, {'read where they lie' if in_place else 'copied first'}"
    return replace(found, note=f"{found.note}; {pages}" if found.note else pages, cached=True)


def prepared(problem: Problem, backend: base.Backend, inputs: Inputs) -> base.Execute | None:
    """The backend's prepared call, where it offers one."""
    prepare = getattr(backend, "prepare", None)
    found: base.Execute | None = prepare(problem, inputs) if prepare is not None else None
    return found
