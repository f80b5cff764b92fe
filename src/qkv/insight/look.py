"""Looking at a call: what its statistics, its mask and its norms come to, as a record."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from qkv.call.keys import KVView
from qkv.call.problem import Options, query_positions
from qkv.call.statistics import Statistics, Wanted
from qkv.checks import integers, short, shown, whole
from qkv.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from qkv.insight.cover import cover, visible_keys
from qkv.insight.heads import completed
from qkv.insight.held import Held
from qkv.insight.record import Pages, Record, Shapes
from qkv.insight.words import in_words
from qkv.masks import Mask
from qkv.observation import Observed, Part, observe

_CALL = "qkv.see()"
_SAMPLED = 64
R = TypeVar("R", bound=Record)


def look(
    kind: type[R], q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any, wanted: Wanted, heads: Any,
    tokens: Any = None, query_tokens: Any = None,
) -> R:  # fmt: skip
    """The record of a call, of the class `kind`."""
    chosen, arguments = _of_heads(q, k, v, mask, options, heads)
    found = observe(_CALL, *arguments, backend, wanted)
    return completed(_record(kind, found, arguments[1], (q, k, v), chosen, _names(tokens, query_tokens, found.parts)))


def _of_heads(
    q: Any, k: Any, v: Any, mask: Any, options: Options, heads: Any
) -> tuple[list[int] | None, tuple[Any, Any, Any, Any, Options]]:
    """The call of some query heads alone, each with its own copy of no tensor but q, k and v's heads."""
    if heads is None or not isinstance(q, Tensor) or q.dim() != 4:
        return None, (q, k, v, mask, options)
    one = whole(heads)
    chosen = [int(h) for h in integers(_CALL, "heads", heads if one is None else [one])]
    if isinstance(k, KVView):
        rule, fix = "heads= chooses among the heads of tensors", "Leave heads out, or pass plain k and v"
        raise UnsupportedError.of(_CALL, rule, "a cache's view", fix)
    Hq, Hkv = q.shape[1], k.shape[1]
    if not chosen or max(chosen) >= Hq or len(set(chosen)) != len(chosen) or Hkv == 0 or Hq % Hkv:
        fix = f"Use distinct heads in [0, {Hq})"
        raise ArgumentError.of(_CALL, "heads must be query heads of the call", f"heads={chosen} and Hq={Hq}", fix)
    if (isinstance(mask, Mask) and mask.varies_by_head) or (
        isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
    ):
        rule, fix = (
            "heads= goes with a mask that is the same for all heads",
            "Leave heads out, or pass the heads' own mask",
        )
        raise UnsupportedError.of(_CALL, rule, shown(mask), fix)
    if options.bias is not None:
        rule, fix = "heads= cannot cut a bias into heads", "Pass q[:, h:h+1], its keys and its bias"
        raise UnsupportedError.of(_CALL, rule, shown(options.bias), fix)
    at = torch.tensor(chosen, device=q.device, dtype=torch.int64)
    of = at // (Hq // Hkv)
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.index_select(0, at.to(options.sinks.device)))
    return chosen, (q.index_select(1, at), k.index_select(1, of), v.index_select(1, of), mask, options)


def _names(tokens: Any, query_tokens: Any, parts: tuple[Part, ...]) -> tuple[Any, Any]:
    """Token texts, checked: as many as keys, and as many as queries."""
    Lq, Lk = (max((getattr(p.problem, n) for p in parts), default=0) for n in ("Lq", "Lk"))
    if query_tokens is None and tokens is not None and Lq == Lk:
        query_tokens = tokens
    found: list[tuple[str, ...] | None] = []
    for name, given, length in (("tokens", tokens, Lk), ("query_tokens", query_tokens, Lq)):
        if given is None:
            found.append(None)
            continue
        if isinstance(given, str) or not all(isinstance(t, str) for t in given):
            rule, fix = f"{name} are texts, one for each {'key' if name == 'tokens' else 'query'}", "Pass a list of str"
            raise ArgumentTypeError.of(_CALL, rule, f"{name}={shown(given)}"[:200], fix)
        if len(given) != length:
            rule = f"{name} must be as many as the {'keys' if name == 'tokens' else 'queries'}"
            raise ArgumentError.of(_CALL, rule, f"{len(given):,} {name} and {length:,}", f"Pass {length:,} texts")
        found.append(tuple(given))
    return found[0], found[1]


def _record(
    kind: type[R],
    found: Observed,
    k: Any,
    given: tuple[Any, Any, Any],
    chosen: list[int] | None,
    names: tuple[Any, Any],
) -> R:
    plan, parts, view = found.plan, found.parts, k if isinstance(k, KVView) else None
    p, (whole_q, whole_k, whole_v) = plan.problem, given
    B, Hkv = (len(view.layout.lengths), view.k.shape[1]) if view is not None else (p.B, whole_k.shape[1])
    heads = tuple(range(whole_q.shape[1])) if chosen is None else tuple(chosen)
    Lq, Lk = max((x.problem.Lq for x in parts), default=0), max((x.problem.Lk for x in parts), default=0)
    lengths = [(0, 0)] * B
    for part in parts:
        for b in part.sequences:
            lengths[b] = part.problem.Lq, part.problem.Lk
    sampled, visible = _visible(parts, B, len(heads), Lq)
    whole = [(x.inputs.k, x.inputs.v) if view is not None else (whole_k, whole_v) for x in parts]
    norms = [_norms(parts, [pair[n] for pair in whole], B, Lk) for n in (0, 1)]
    one = next(iter(parts), None)
    sinks = None if one is None or one.inputs.sinks is None else one.inputs.sinks.detach().float().cpu()
    bias = () if one is None or one.inputs.bias is None else tuple(str(spec.kind) for spec in one.problem.bias)
    return kind(
        Shapes(B, whole_q.shape[1], Hkv, Lq, Lk, p.D, p.Dv), short(p.dtype), p.device, plan.backend, str(plan),
        "none" if p.mask is None else repr(p.mask), in_words(p.mask),
        torch.zeros(0, 0, dtype=torch.uint8, device="cpu") if one is None else cover(one.problem, one.inputs.positions),
        visible, sampled, _positions(parts, B, Lq), p.scale, p.softcap, bias, sinks, heads, tuple(lengths),
        _kept(found.statistics),
        norms[0], norms[1], names[0], names[1], None if view is None else _pages(view), plan.flops, plan.bytes,
        held=Held.of(parts, found.out),
    )  # fmt: skip


def _kept(s: Statistics) -> Statistics:
    """On the CPU, and the map in float32: its sums were made in float64."""
    found = {name: None if t is None else t.cpu() for name, t in s._asdict().items()}
    return Statistics(**{**found, "map": None if s.map is None else s.map.float().cpu()})  # type: ignore[arg-type]


def _visible(parts: tuple[Part, ...], B: int, heads: int, Lq: int) -> tuple[Tensor, Tensor]:
    """Some rows, and how many keys they see: masks that do not vary are asked once."""
    n = min(_SAMPLED, Lq)
    sampled = (
        torch.unique(torch.linspace(0, max(Lq - 1, 0), n, dtype=torch.float64, device="cpu").round().long())
        if n
        else torch.zeros(0, dtype=torch.int64, device="cpu").long()
    )
    visible = torch.zeros(B, heads, len(sampled), dtype=torch.int64, device="cpu")
    for part in parts:
        p = part.problem
        rows = sampled[sampled < p.Lq]
        for b in part.sequences if p.varies_by_batch else part.sequences[:1]:
            for h in range(heads if p.varies_by_head else min(heads, 1)):
                seen = visible_keys(p, part.inputs.positions, rows, b, h)
                at = [b] if p.varies_by_batch else list(part.sequences)
                visible[at, h : (h + 1 if p.varies_by_head else heads), : len(rows)] = seen
    return sampled, visible


def _norms(parts: tuple[Part, ...], tensors: list[Tensor], B: int, Lk: int) -> Tensor:
    """|k_j| or |v_j|, float32 (B, Hkv, Lk); 0 past a sequence's end."""
    heads = tensors[0].shape[1] if tensors else 0
    to = torch.zeros(B, heads, Lk, dtype=torch.float32, device="cpu")
    for part, x in zip(parts, tensors, strict=True):
        for b in part.sequences:
            for h in range(heads):
                to[b, h, : part.problem.Lk] = x[b, h].detach().float().norm(dim=-1).cpu()
    return to


def _positions(parts: tuple[Part, ...], B: int, Lq: int) -> Tensor:
    to = torch.zeros(B, Lq, dtype=torch.int64, device="cpu")
    for part in parts:
        where = query_positions(part.problem, part.inputs.positions, "cpu").cpu()
        for b in part.sequences:
            to[b, : part.problem.Lq] = where[b if where.shape[0] > 1 else 0]
    return to


def _pages(view: KVView) -> Pages:
    layout, size = view.layout, view.k.shape[2]
    tables = []
    for i, length in enumerate(layout.lengths):
        start = layout.starts[i]
        tables.append(tuple(layout.tables[start : start + -(-length // size)]))
    return Pages(size, view.k.shape[0], tuple(tables))
