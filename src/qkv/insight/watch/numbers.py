"""The numbers of one watched call, head by head: from every row what the softmax gives away, from a few rows more.

Of every row: lse, largest score and weight, entropy, the share of a learned sink. Of at most 16 rows of each head, in
the first 4 batch rows and in float64: the share of the first keys, how far the weights are from the mean of all visible
keys, and which heads agree.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.backends.reference import definition
from qkv.backends.tiled.statistics import statistics
from qkv.call.keys import KVView
from qkv.call.problem import CALL, Inputs, Problem
from qkv.call.statistics import Statistics, Wanted
from qkv.call.validate import validate
from qkv.insight.watch.calls import Call, Unseen
from qkv.numerics import no_autocast
from qkv.observation import observe
from qkv.plans import choose

ROWS = 16
"""Rows of each head that are looked at one weight at a time, in the first batch rows."""
_BATCH = 4
_NUMBERS = 1 << 22  # of keys at a time in float64
_FEW_KEYS = 4  # a row that sees fewer says little about its head
_ENOUGH = 64  # weights over which two heads are compared, at least
_SAME = 0.99  # correlation of what two heads add to a uniform share
_UNIFORM = 0.02  # total variation distance to a uniform share
_SURE = 0.99  # a largest weight that leaves nothing to others


class Looked(NamedTuple):
    """A call, checked, and what its weights come to."""

    problem: Problem
    inputs: Inputs
    statistics: Statistics
    real: Tensor | None  # (B, 1, Lq): the rows that there are, where sequences have unequal numbers of them


def look(call: Call) -> Looked:
    """Find the statistics of a call; nothing is differentiated and no random number drawn."""
    options = call.options._replace(dropout_p=0.0, return_lse=False)
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise Unseen("a CUDA graph is being recorded, and to read a number would end that")
    with torch.no_grad():
        if isinstance(call.k, KVView):
            found = observe(CALL, call.q, call.k, None, call.mask, options, call.backend, Wanted())
            queries, real = call.k.layout.queries, None
            if queries is not None:
                at = torch.arange(found.statistics.lse.shape[2], device=call.q.device)
                real = (at < torch.tensor(queries, device=at.device, dtype=torch.int64)[:, None])[:, None]
            part = max(found.parts, key=lambda p: p.problem.Lq)
            return Looked(part.problem, part.inputs, found.statistics, real)
        v = call.k[..., :0] if call.v is None else call.v
        problem, inputs = validate(CALL, call.q.detach(), call.k.detach(), v.detach(), call.mask, options)
        own = choose(problem, call.backend).chosen.observe(problem, inputs, Wanted())
        return Looked(problem, inputs, statistics(problem, inputs, Wanted()) if own is None else own[1], None)


def of_all_rows(looked: Looked) -> dict[str, Any]:
    """The numbers that every row takes part in; lists have one entry a head, None where no row counts."""
    s, real, p = looked.statistics, looked.real, looked.problem
    bad, dead = s.lse.isnan(), s.score == -torch.inf
    if real is not None:
        bad, dead = bad & real, dead & real
    good = ~(bad | dead) if real is None else ~(bad | dead) & real
    sinks = looked.inputs.sinks

    def mean(x: Tensor) -> Tensor:
        return torch.where(good, x, 0.0).sum((0, 2)) / good.sum((0, 2))

    none = torch.full((), -torch.inf, dtype=s.score.dtype, device=s.score.device)
    columns = [
        mean(s.entropy),
        mean(s.entropy.exp()),
        torch.where(good, s.score, none).amax((0, 2)) if good.numel() else s.score.new_full((p.Hq,), -torch.inf),
        mean(s.weight),
        mean((s.weight > _SURE).to(s.weight.dtype)),
        torch.zeros_like(mean(s.lse)) if sinks is None else mean((sinks.to(s.lse.dtype)[:, None] - s.lse).exp()),
    ]
    names = ("entropy", "tokens", "logit", "weight", "sure", "sink")
    found: dict[str, Any] = {
        name: [x if math.isfinite(x) else None for x in column]
        for name, column in zip(names, torch.stack(columns).tolist(), strict=True)
    }
    if sinks is None:
        found["sink"] = None
    total = bad.shape[0] * bad.shape[2] if real is None else int(real.sum())
    for name, rows in (("nan", bad), ("dead", dead)):
        count = int(rows.sum())
        found[name] = {"rows": count, "of": total * p.Hq, "first": first_of(rows) if count else None}
    return found


def first_of(marked: Tensor) -> dict[str, int]:
    """Where (B, H, L) is marked first: at the lowest row, and there at the first batch row and head."""
    row, batch, head = (int(n) for n in marked.permute(2, 0, 1).nonzero()[0])
    return {"batch": batch, "head": head, "row": row}


def of_values(v: Tensor | None) -> dict[str, Any]:
    """NaN among the values, which no score shows."""
    if v is None or isinstance(v, KVView) or not v.shape[-1]:
        return {"keys": 0, "first": None}
    marked = v.detach().isnan().any(-1)
    count = int(marked.sum())
    return {"keys": count, "first": first_of(marked) if count else None}


class Few(NamedTuple):
    """Weights of a few rows: p and what is visible, (B, H, rows, Lk) float64, and which rows say something."""

    p: Tensor
    visible: Tensor
    judged: Tensor  # (B, H, rows)


def few_rows(looked: Looked) -> Few:
    """Rows evenly spread, of as many batch rows as stay small; the last row is one of them."""
    p, inputs = looked.problem, looked.inputs
    batch = max(1, min(p.B, _BATCH, _NUMBERS // max(1, p.Lk * p.D)))
    if batch < p.B:
        starts = p.positions[:batch] if isinstance(p.positions, tuple) and len(p.positions) > 1 else p.positions
        where = inputs.positions
        where = where[:batch] if where is not None and where.shape[0] > 1 else where
        p = replace(p, B=batch, positions=starts)
        inputs = inputs._replace(q=inputs.q[:batch], k=inputs.k[:batch], positions=where)
    count = max(1, min(ROWS, p.Lq, _NUMBERS // max(1, batch * p.Hq * p.Lk)))
    rows = (
        torch.linspace(p.Lq - 1, 0, min(count, p.Lq), device=inputs.q.device, dtype=torch.float64)
        .round()
        .long()
        .flip(0)
    )
    heads = max(1, _NUMBERS // max(1, batch * p.Lk * p.D)) // p.group * p.group or 1
    parts = []
    with torch.no_grad(), no_autocast(p.device):
        inputs = inputs._replace(v=inputs.k[..., :0])
        for some in torch.arange(p.Hq, device=rows.device).split(heads):
            parts.append(definition(p, inputs, rows, some)[:2])
    weights, visible = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    judged = (visible.sum(-1) >= _FEW_KEYS) & ~weights.isnan().any(-1) & (weights.sum(-1) > 1e-6)
    return Few(weights, visible, judged)


def of_few_rows(few: Few, first: int) -> dict[str, Any]:
    """The numbers that a few rows give; lists have one entry a head, None where no row says anything."""
    p, visible, judged = few
    share = p / p.sum(-1, keepdim=True)
    flat = visible / visible.sum(-1, keepdim=True)
    apart = torch.where(judged[..., None], share - flat, 0.0)
    count = judged.sum((0, 2))

    def mean(x: Tensor) -> Tensor:
        return torch.where(judged, x, 0.0).sum((0, 2)) / count

    columns = torch.stack(
        [
            mean(p[..., :first].sum(-1)),
            mean(apart.abs().sum(-1) / 2),
            mean((share.amax(-1) > _SURE).double()) if share.shape[-1] else count.double(),
        ]
    )
    freedom = torch.where(judged, visible.sum(-1) - 1, 0).sum((0, 2))
    on_first, away, sure = ([x if math.isfinite(x) else None for x in column] for column in columns.tolist())
    enough = [n >= _ENOUGH for n in freedom.tolist()]
    heads = range(len(enough))
    uniform = [h for h, x in enumerate(away) if enough[h] and x is not None and x < _UNIFORM]
    on_sink = [h for h in heads if (on_first[h] or 0) > 0.5]
    saturated = [h for h in heads if enough[h] and (sure[h] or 0) > 0.9]
    vectors = apart.transpose(0, 1).flatten(1)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    alike = (vectors @ vectors.mT).tolist()
    # What all agree on, the mean of everything or one key, is no sign of two heads that do the same.
    plain = {h for h in heads if not enough[h] or h in uniform or (on_first[h] or 0) > 0.9}
    duplicate = [
        [a, b, alike[a][b]] for a in heads for b in range(a) if not {a, b} & plain and alike[a][b] > _SAME
    ]  # fmt: skip
    return {
        "first": on_first, "away": away, "uniform_heads": uniform, "sink_heads": on_sink,
        "saturated_heads": saturated, "duplicate_heads": sorted([min(a, b), max(a, b), c] for a, b, c in duplicate),
    }  # fmt: skip
