"""Scores and weights of any rectangle of queries and keys, from q, k and the rows' lse: nothing else is looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.problem import Inputs, Problem, query_positions
from qkv.masks import Tile
from qkv.numerics import no_autocast, softcap
from qkv.scores import ScoreMod, TensorBias

# lse is rounded to the accumulation type: beyond this size that would cost weights their sixth digit.
_LARGE = 16.0


class Rectangle(NamedTuple):
    """float64 (heads, rows, keys) each; -inf and 0 where a key is hidden."""

    dots: Tensor  # q . k
    scores: Tensor  # what the softmax takes
    visible: Tensor  # bool
    weights: Tensor


def rectangle(
    problem: Problem, inputs: Inputs, lse: Tensor, b: int, heads: Tensor, rows: slice, keys: slice
) -> Rectangle:
    """The scores and weights of some heads, by the definition, in float64.

    lse: (B, Hq, Lq) of the call. The lse of a row of large scores is found anew, from all of its keys.
    """
    with torch.no_grad(), no_autocast(problem.device):
        dots, s, seen = _scores(problem, inputs, b, heads, rows, keys)
        norm = lse[b].index_select(0, heads.to(lse.device))[:, rows].to(s.device, torch.float64).clone()
        large = torch.isfinite(norm) & (norm.abs() > _LARGE)
        for at in large.any(0).nonzero().flatten().tolist():
            norm[:, at] = _lse_of_row(problem, inputs, b, heads, range(problem.Lq)[rows][at])
        dead = norm == -torch.inf
        p = torch.where(seen, (s - norm.masked_fill(dead, 0.0)[..., None]).exp(), 0.0)
        return Rectangle(dots, s, seen, p)


def _lse_of_row(problem: Problem, inputs: Inputs, b: int, heads: Tensor, row: int) -> Tensor:
    s = _scores(problem, inputs, b, heads, slice(row, row + 1), slice(0, problem.Lk))[1][:, 0]
    if inputs.sinks is not None:
        sinks = inputs.sinks.detach().index_select(0, heads.to(inputs.sinks.device)).to(s.device, s.dtype)
        s = torch.cat((s, sinks[:, None]), -1)
    return s.logsumexp(-1)


def _scores(
    p: Problem, inputs: Inputs, b: int, heads: Tensor, rows: slice, keys: slice
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = inputs.q.detach(), inputs.k.detach()
    device = q.device
    heads = heads.to(device)
    q = q[b, :, rows].index_select(0, heads).double()
    k = k[b, :, keys].index_select(0, heads // p.group).double()
    i, j = torch.arange(p.Lq, device=device)[rows], torch.arange(p.Lk, device=device)[keys]
    where = query_positions(p, inputs.positions, device)
    at = Tile(
        slice(b, b + 1), heads, i, keys, torch.full((1, 1, 1, 1), b, device=device, dtype=torch.int64),
        heads[:, None, None], i[:, None], where[b if where.shape[0] > 1 else 0][i][None, None, :, None], j,
    )  # fmt: skip
    seen = torch.ones(1, len(heads), len(i), len(j), dtype=torch.bool, device=device)
    if p.mask is not None:
        seen = seen & p.mask.visible(at, p.sizes)
    terms = inputs.bias.terms if inputs.bias is not None else ()
    for term in terms:
        if isinstance(term, TensorBias):  # -inf hides
            seen = seen & (term.tile(at, torch.float64) != -torch.inf)
    hidden = ~seen[0].any(1, keepdim=True).transpose(-1, -2)  # what no row sees may hold anything
    dots = (q @ k.masked_fill(hidden, 0).mT)[None]
    s = dots * p.scale
    if p.softcap is not None:
        s = softcap(s, p.softcap)
    for term in terms:
        s = term.apply(s, at) if isinstance(term, ScoreMod) else s + term.tile(at, s.dtype)
    return dots[0], torch.where(seen, s, -torch.inf)[0], seen[0].expand(s.shape[1:])
