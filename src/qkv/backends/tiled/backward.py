"""Gradients of attention, tile by tile in two sweeps: scores are recomputed, nothing quadratic is kept.

    m_i, l_i = max_j s_ij, sum_j exp(s_ij - m_i)                the rows' own, of these very scores
    p_ij     = exp(s_ij - m_i) / l_i                            w_ij = keep_ij p_ij / (1 - dropout_p)
    dp_ij    = keep_ij (do_i . v_j) / (1 - dropout_p)           delta_i = sum_j p_ij dp_ij
    ds_ij    = p_ij (dp_ij - delta_i + dlse_i)
    dv_j     = sum_i w_ij do_i              dq_i = scale sum_j dx_ij k_j          dk_j = scale sum_i dx_ij q_i
    with dx = ds through softcap and score_mod;  dbias = ds;  dsink_h = sum_i exp(sink_h - m_i) / l_i (dlse_i - delta_i)

The first sweep over the keys of a query tile finds m, l and delta. A saved lse would spare it, but lse is one rounded
number: at |lse| = 1e6 it is known to 0.03, and so are the weights, whose sum has to be 1. Likewise delta is do . o, but
only from the very dp that it is subtracted from does nothing remain where one key has all the weight.

Source: Dao et al., FlashAttention (2022), appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.backends.base import Gradients
from qkv.backends.tiled.schedule import KeyTile
from qkv.backends.tiled.walk import QueryTile, Scores, Walk, product, step
from qkv.call.problem import Inputs, Output, Problem
from qkv.masks import Tile
from qkv.numerics import finite, no_autocast, softcap_slope, steady_matmul
from qkv.scores import ScoreMod


def backward(problem: Problem, inputs: Inputs, d_out: Tensor, d_lse: Tensor, whole: Output | None = None) -> Gradients:
    """Gradients of sum(out * d_out) + sum(lse * d_lse). `whole`: results of all keys, if these are a part."""
    with no_autocast(problem.device):
        return _Backward(problem, inputs, d_out, d_lse, whole).run()


class Pair(NamedTuple):
    """One tile of queries and keys: scores, what of them is visible (None: all), k, v and do . v, dropout applied."""

    found: Scores
    seen: Tensor | None
    k: Tensor
    v: Tensor
    d_prob: Tensor


class Rows:
    """What the rows' weights are made of, (B, Hq, Lq): maxima, sums, and, given d_out, delta."""

    def __init__(self, walk: Walk, d_out: Tensor | None, careful: bool) -> None:
        self.walk, self.d_out, self.careful = walk, d_out, careful
        p = walk.problem
        empty = torch.empty(3, p.B, p.Hq, p.Lq, dtype=p.accumulate, device=walk.device)
        self.top, self.total, self.delta = empty.unbind(0)

    def sweep(self, tile: QueryTile) -> tuple[Tensor, Tensor, Tensor]:
        """Find maxima, sums and delta of a tile of queries, (b, kv heads, group * rows, 1)."""
        walk, p = self.walk, self.walk.problem
        q = walk.load_queries(walk.inputs.q, tile)
        do = walk.load_queries(self.d_out, tile) if self.d_out is not None else q.new_zeros(*q.shape[:3], p.Dv)
        top, total = walk.begin(tile, q)
        mean = torch.zeros_like(total)
        for key in walk.keys(tile):
            pair = self.pair(q, do, tile, key)
            e, shrink, top = step(pair.found.s, top)
            total = total * shrink + e.sum(-1, keepdim=True)
            share = e * pair.d_prob
            if pair.seen is not None:
                share = torch.where(pair.seen, share, 0.0)
            mean = mean * shrink + share.sum(-1, keepdim=True)
        dead = total == 0
        total = total.masked_fill(dead, 1.0)
        found = (top.masked_fill(dead, 0.0), total, mean / total)
        for to, x in zip((self.top, self.total, self.delta), found, strict=True):
            walk.store(x, to, tile)
        return found

    def pair(self, q: Tensor, do: Tensor, tile: QueryTile, key: KeyTile) -> Pair:
        """The same bits in every sweep."""
        walk = self.walk
        k, v = walk.load(walk.inputs.k, tile, key), walk.load(walk.inputs.v, tile, key)
        found = walk.scores(q, k, tile, key)
        seen = found.s != -torch.inf if found.seen is not None or self.careful or walk.can_hide else None
        return Pair(found, seen, k, v, kept(walk, steady_matmul(do, v, b_t=True), found.at))

    def load(self, tile: QueryTile) -> list[Tensor]:
        """Maxima, sums and delta of a tile of queries."""
        return [self.walk.load_queries(x, tile) for x in (self.top, self.total, self.delta)]

    def sink_share(self) -> Tensor | None:
        """The weight of each row's sink."""
        sinks = self.walk.inputs.sinks
        if sinks is None:
            return None
        s = sinks.to(self.top.dtype)[:, None]
        return torch.where(s == -torch.inf, 0.0, torch.exp(s - self.top) / self.total)


class GivenRows(Rows):
    """The same where the keys are a part of those that rows see: from their results over all keys."""

    def __init__(self, walk: Walk, d_out: Tensor, careful: bool, whole: Output) -> None:
        super().__init__(walk, d_out, careful)
        assert whole.state is not None
        top, total = whole.state
        dead = total == 0
        self.top, self.total = top.masked_fill(dead, 0.0), total.masked_fill(dead, 1.0)
        kind = walk.problem.accumulate
        self.delta = (d_out.to(kind) * whole.out.to(kind)).sum(-1)

    def sweep(self, tile: QueryTile) -> tuple[Tensor, Tensor, Tensor]:
        top, total, delta = self.load(tile)
        return top, total, delta


def kept(walk: Walk, x: Tensor, at: Tile) -> Tensor:
    """What dropout leaves of a tile of weights, or of their gradients."""
    p = walk.problem.dropout_p
    return torch.where(walk.keep(at), x / (1.0 - p), 0.0) if p > 0 else x


def pulled(y: Tensor, x: Tensor, towards: Tensor, further: bool = False) -> Tensor:
    """The gradient of sum(y * towards) with respect to x; 0 where y does not depend on it."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(y, x, towards, create_graph=further, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def collected(
    walk: Walk, buffers: list[tuple[Tensor, ...]], add: Callable[[QueryTile, Tensor, Tensor], Tensor]
) -> Gradients:
    """All gradients but the sinks'. `add` adds a tile of queries' share to its block's dk and dv and to the buffers of
    the bias, and returns the tile's dq; dk and dq without the scale."""
    p, inputs = walk.problem, walk.inputs
    kind = p.accumulate if p.part else p.dtype  # parts are added up before they are rounded
    dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (inputs.q, inputs.k, inputs.v))
    for block in walk.blocks():
        dk_sum, dv_sum = (torch.zeros(x[block].shape, dtype=p.accumulate, device=x.device) for x in (dk, dv))
        for tile in walk.tiles(block):
            walk.store(add(tile, dk_sum, dv_sum) * p.scale, dq, tile)
        dk[block], dv[block] = (dk_sum * p.scale).to(dk.dtype), dv_sum.to(dv.dtype)
    tensors = inputs.bias.tensors() if inputs.bias is not None else ()
    flat = [buffer for of_term in buffers for buffer in of_term]
    of_bias = tuple(x if p.part else x.to(t.dtype) for x, t in zip(flat, tensors, strict=True))
    return Gradients(dq, dk, dv, None, of_bias)


class _Backward:
    def __init__(
        self, problem: Problem, inputs: Inputs, d_out: Tensor, d_lse: Tensor, whole: Output | None = None
    ) -> None:
        self.walk = Walk(problem, inputs)
        self.problem, self.inputs, self.d_out = problem, inputs, d_out
        kind = problem.accumulate
        # One look at the data decides whether NaN and inf have to be kept from what does not see them.
        data = (inputs.q, inputs.k, inputs.v, d_out)
        self.careful = not all(bool(torch.isfinite(x.sum(dtype=kind))) for x in data)
        self.d_lse = d_lse.to(kind)
        self.rows = (
            Rows(self.walk, d_out, self.careful) if whole is None else GivenRows(self.walk, d_out, self.careful, whole)
        )
        self.buffers = [t.new_gradients(kind) for t in self.walk.terms]

    def run(self) -> Gradients:
        found = collected(self.walk, self.buffers, self._query_tile)
        return found._replace(sinks=self._sinks())

    def _query_tile(self, tile: QueryTile, dk: Tensor, dv: Tensor) -> Tensor:
        walk = self.walk
        q, do, d_lse = (walk.load_queries(x, tile) for x in (self.inputs.q, self.d_out, self.d_lse))
        top, total, delta = self.rows.sweep(tile)
        # A row that sees a NaN has NaN scores already; in the products its factor counts as 0, to touch no other row.
        clean_q = finite(q) if self.careful else q
        dq = torch.zeros_like(q)
        for key in walk.keys(tile):
            found, seen, k, _, d_prob = self.rows.pair(q, do, tile, key)
            prob = (found.s - top).exp_().div_(total)
            if seen is not None:
                prob = torch.where(seen, prob, 0.0)  # a row's NaN (it sees one) must not reach what it does not see
            dv[:, :, key.where] += self._transposed(kept(walk, prob, found.at), seen, do)
            ds = (d_prob - delta).add_(d_lse).mul_(prob)
            if seen is not None:
                ds = torch.where(seen, ds, 0.0)
            dx = self._through(ds, found)
            dq += steady_matmul(dx, finite(k) if self.careful else k)
            dk[:, :, key.where] += steady_matmul(dx, clean_q, a_t=True)
        return dq

    def _transposed(self, weight: Tensor, seen: Tensor | None, do: Tensor) -> Tensor:
        if self.careful:
            assert seen is not None
            return product(weight, seen, do, transposed=True)
        return steady_matmul(weight, do, a_t=True)

    def _through(self, ds: Tensor, found: Scores) -> Tensor:
        """Add the terms' own gradients, and return the gradient of scale * q.k."""
        walk = self.walk
        if walk.terms:
            ds = walk.unfold(ds)
            for index in reversed(range(len(walk.terms))):
                term = walk.terms[index]
                if isinstance(term, ScoreMod):
                    with torch.enable_grad():
                        before = found.before[index].detach().requires_grad_()
                        after = term.apply(before, found.at)
                    through = pulled(after, before, ds)
                    # Hidden scores have no gradient, even where fn's derivative is not finite there.
                    ds = torch.where(ds == 0, 0.0, through) if found.seen is not None or self.careful else through
                else:
                    term.add_gradients(self.buffers[index], ds, found.at)
            ds = walk.fold(ds)
        if found.dots is not None:
            assert self.problem.softcap is not None
            slope = softcap_slope(found.dots, self.problem.softcap)
            ds = torch.where(ds == 0, 0.0, ds * slope)
        return ds

    def _sinks(self) -> Tensor | None:
        share, sinks = self.rows.sink_share(), self.inputs.sinks
        if share is None or sinks is None:
            return None
        return (share * (self.d_lse - self.rows.delta)).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
