"""Second derivatives of attention, tile by tile: nothing quadratic is kept.

A dot marks the derivative along the tangents q', k', v', bias', sinks' of the inputs, written here with a prime:

    x_ij = scale q_i . k_j        x'_ij = scale (q'_i . k_j + q_i . k'_j)        s' = x' through softcap and the terms
    lse'_i = sum_j p_ij s'_ij + exp(sink - lse_i) sink'                          p'_ij = p_ij (s'_ij - lse'_i)
    o'_i   = sum_j w_ij (s'_ij v_j + v'_j) - lse'_i o_i                          w = p, or its share that dropout keeps

These are `along`, the forward mode. `curved` differentiates the gradient once more, along the same tangents, with
dp_ij = do_i . v_j and dp'_ij = do_i . v'_j (or what dropout keeps of them), delta and p as in `tiled.backward`:

    delta'_i = sum_j p_ij s'_ij dp_ij - lse'_i delta_i + sum_j p_ij dp'_ij
    ds'_ij   = p'_ij (dp_ij - delta_i + dlse_i) + p_ij (dp'_ij - delta'_i)
    dx'      = slope ds' + slope' ds                        for each elementwise step from x to s, last step first
    dq'_i    = scale sum_j (dx'_ij k_j + dx_ij k'_j)        dk'_j = scale sum_i (dx'_ij q_i + dx_ij q'_i)
    dv'_j    = sum_i w'_ij do_i        dbias' = ds'
    dsink'   = -sum_i exp(sink - lse_i) ((sink' - lse'_i) (delta_i - dlse_i) + delta'_i)

The sums are kept apart as they stand here: where one key has all the weight, what should cancel does so exactly.

Differentiating a gradient backwards needs nothing else: the gradient of <u, dL/dx> is `curved` along u towards the
inputs, and `along` u towards do and dlse. Source: Pearlmutter, Fast Exact Multiplication by the Hessian (1994), applied
to the backward pass of Dao et al. (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.backends.base import Gradients
from qkv.backends.tiled.backward import Rows, collected, kept, pulled
from qkv.backends.tiled.schedule import KeyTile
from qkv.backends.tiled.walk import QueryTile, Walk, product
from qkv.call.problem import Inputs, Problem
from qkv.masks import Tile
from qkv.numerics import finite, no_autocast, softcap_slope, steady_matmul
from qkv.scores import ScoreMod, ScoreTerm

Tangents = Gradients
"""Directions in the shapes and dtypes of the inputs; bias has one entry a tensor of the bias."""


def along(problem: Problem, inputs: Inputs, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """The derivative of (out, lse) along the tangents, in their dtypes."""
    with no_autocast(problem.device):
        return _Second(problem, inputs, tangents, None).along()


def curved(problem: Problem, inputs: Inputs, d_out: Tensor, d_lse: Tensor, tangents: Tangents) -> Gradients:
    """The derivative along the tangents of the gradients of sum(out * d_out) + sum(lse * d_lse)."""
    with no_autocast(problem.device):
        return _Second(problem, inputs, tangents, d_out).curved(d_out, d_lse)


class _Step(NamedTuple):
    """One elementwise step from dot products to scores: ds/dx, its derivative, and the tangent that enters it."""

    slope: Tensor
    bend: Tensor
    entering: Tensor


class _Scores(NamedTuple):
    """One tile, (b, kv heads, group * rows, keys): probabilities, the tangent of the scores, and how it came about."""

    p: Tensor
    tangent: Tensor
    seen: Tensor
    at: Tile
    cap: _Step | None
    mods: dict[int, _Step]  # by the term's index


class _Rows(NamedTuple):
    """What one tile of queries needs for every tile of keys."""

    q: Tensor
    tq: Tensor
    top: Tensor
    total: Tensor
    delta: Tensor


class _Second:
    def __init__(self, problem: Problem, inputs: Inputs, tangents: Tangents, d_out: Tensor | None) -> None:
        self.walk = Walk(problem, inputs)
        self.problem, self.inputs, self.t = problem, inputs, tangents
        self.rows = Rows(self.walk, d_out, careful=True)
        for tile in self.walk.all_tiles():
            self.rows.sweep(tile)
        self.share = self.rows.sink_share()
        lifted = inputs.bias.with_tensors(tangents.bias) if inputs.bias is not None else None
        self.tangent_terms: tuple[ScoreTerm, ...] = lifted.terms if lifted is not None else ()

    def along(self) -> tuple[Tensor, Tensor]:
        """out' and lse'."""
        walk, p = self.walk, self.problem
        t_out = torch.empty(p.B, p.Hq, p.Lq, p.Dv, dtype=p.dtype, device=walk.device)
        t_lse = torch.empty(p.B, p.Hq, p.Lq, dtype=p.accumulate, device=walk.device)
        for tile in walk.all_tiles():
            rows, total = self._rows(tile), self._sink_tangent(tile)
            moved, out, more = rows.q.new_zeros(3, *rows.q.shape[:3], p.Dv).unbind(0)
            for key in walk.keys(tile):
                found = self._scores(rows, tile, key)
                weight = kept(walk, found.p, found.at)
                v, tv = (finite(walk.load(x, tile, key)) for x in (self.inputs.v, self.t.v))
                moved += steady_matmul(weight * found.tangent, v)
                out += steady_matmul(weight, v)
                more += steady_matmul(weight, tv)
                total += (found.p * found.tangent).sum(-1, keepdim=True)
            walk.store(moved - total * out + more, t_out, tile)
            walk.store(total, t_lse, tile)
        return t_out, t_lse

    def curved(self, d_out: Tensor, d_lse: Tensor) -> Gradients:
        walk, inputs = self.walk, self.inputs
        d_lse = d_lse.to(self.problem.accumulate)
        t_lse, t_delta = self._tangents_of_rows(d_out)
        buffers = [t.new_gradients(self.problem.accumulate) for t in walk.terms]

        def add(tile: QueryTile, dk: Tensor, dv: Tensor) -> Tensor:
            rows, do = self._rows(tile), walk.load_queries(d_out, tile)
            numbers = [walk.load_queries(x, tile) for x in (d_lse, t_lse, t_delta)]
            dq = torch.zeros_like(rows.q)
            for key in walk.keys(tile):
                found = self._scores(rows, tile, key)
                k, tk = walk.load(inputs.k, tile, key), walk.load(self.t.k, tile, key)
                d_p, t_dp = self._score_gradients(found, do, tile, key)
                ds, t_ds, t_p = _lifted(found, rows.delta, d_p, t_dp, numbers)
                dv[:, :, key.where] += product(kept(walk, t_p, found.at), found.seen, do, transposed=True)
                dx, t_dx = self._through(found, ds, t_ds, buffers)
                dq += steady_matmul(t_dx, finite(k)) + steady_matmul(dx, finite(tk))
                dk[:, :, key.where] += steady_matmul(t_dx, finite(rows.q), a_t=True)
                dk[:, :, key.where] += steady_matmul(dx, finite(rows.tq), a_t=True)
            return dq

        return collected(walk, buffers, add)._replace(sinks=self._sink_gradient(d_lse, t_lse, t_delta))

    def _tangents_of_rows(self, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """lse' and delta', (B, Hq, Lq)."""
        walk, p = self.walk, self.problem
        t_lse, t_delta = d_out.new_empty(2, p.B, p.Hq, p.Lq, dtype=p.accumulate).unbind(0)
        for tile in walk.all_tiles():
            rows, do, total = self._rows(tile), walk.load_queries(d_out, tile), self._sink_tangent(tile)
            moved, more = torch.zeros_like(total), torch.zeros_like(total)
            for key in walk.keys(tile):
                found = self._scores(rows, tile, key)
                d_p, t_dp = self._score_gradients(found, do, tile, key)
                by_score = found.p * found.tangent
                total += by_score.sum(-1, keepdim=True)
                moved += torch.where(found.seen, by_score * d_p, 0.0).sum(-1, keepdim=True)
                more += torch.where(found.seen, found.p * t_dp, 0.0).sum(-1, keepdim=True)
            walk.store(total, t_lse, tile)
            walk.store(moved - total * rows.delta + more, t_delta, tile)
        return t_lse, t_delta

    def _rows(self, tile: QueryTile) -> _Rows:
        return _Rows(*(self.walk.load_queries(x, tile) for x in (self.inputs.q, self.t.q)), *self.rows.load(tile))

    def _scores(self, rows: _Rows, tile: QueryTile, key: KeyTile) -> _Scores:
        walk, cap = self.walk, self.problem.softcap
        k, tk = walk.load(self.inputs.k, tile, key), walk.load(self.t.k, tile, key)
        found = walk.scores(rows.q, k, tile, key)
        seen = found.s != -torch.inf
        p = torch.where(seen, torch.exp(found.s - rows.top) / rows.total, 0.0)
        tangent = steady_matmul(rows.tq, k, b_t=True) + steady_matmul(rows.q, tk, b_t=True)
        tangent = tangent * self.problem.scale
        capped = None
        if cap is not None:
            assert found.dots is not None
            slope = softcap_slope(found.dots, cap)
            capped = _Step(slope, slope * torch.tanh(found.dots / cap) * (-2.0 / cap), tangent)
            tangent = tangent * slope
        mods: dict[int, _Step] = {}
        if walk.terms:
            tangent = walk.unfold(tangent)
            for index, (term, lifted) in enumerate(zip(walk.terms, self.tangent_terms, strict=True)):
                if isinstance(term, ScoreMod):
                    mods[index] = _mod(term, found.before[index], found.at, tangent)
                    tangent = tangent * mods[index].slope
                else:
                    tangent = tangent + lifted.tile(found.at, tangent.dtype)
            tangent = walk.fold(tangent)
        return _Scores(p, torch.where(seen, tangent, 0.0), seen, found.at, capped, mods)

    def _score_gradients(self, found: _Scores, do: Tensor, tile: QueryTile, key: KeyTile) -> tuple[Tensor, Tensor]:
        """dp and dp'."""
        v, tv = (self.walk.load(x, tile, key) for x in (self.inputs.v, self.t.v))
        d_p, t_dp = (kept(self.walk, steady_matmul(do, x, b_t=True), found.at) for x in (v, tv))
        return d_p, t_dp

    def _through(
        self, found: _Scores, ds: Tensor, t_ds: Tensor, buffers: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor]:
        """The terms' own gradients, and those of scale * q.k with their derivative."""
        walk = self.walk
        if walk.terms:
            ds, t_ds = walk.unfold(ds), walk.unfold(t_ds)
            for index in reversed(range(len(walk.terms))):
                if index in found.mods:
                    ds, t_ds = _back(found.mods[index], ds, t_ds)
                else:
                    walk.terms[index].add_gradients(buffers[index], t_ds, found.at)
            ds, t_ds = walk.fold(ds), walk.fold(t_ds)
        return _back(found.cap, ds, t_ds) if found.cap is not None else (ds, t_ds)

    def _sink_tangent(self, tile: QueryTile) -> Tensor:
        """What the sinks' tangents add to lse' of a tile of queries, (b, kv heads, group * rows, 1)."""
        walk, share, tangents = self.walk, self.share, self._tangents_of_sinks()
        if share is None or tangents is None:
            return walk.fold(torch.zeros_like(self.rows.top[tile.here]).unsqueeze(-1))
        return walk.fold((share[tile.here] * tangents[tile.here[1], None]).unsqueeze(-1))

    def _tangents_of_sinks(self) -> Tensor | None:
        sinks, tangent = self.inputs.sinks, self.t.sinks
        if sinks is None or tangent is None:
            return None
        return torch.where(sinks == -torch.inf, 0.0, tangent).to(self.rows.top.dtype)

    def _sink_gradient(self, d_lse: Tensor, t_lse: Tensor, t_delta: Tensor) -> Tensor | None:
        share, tangents, sinks = self.share, self._tangents_of_sinks(), self.inputs.sinks
        if share is None or tangents is None or sinks is None:
            return None
        found = share * ((tangents[:, None] - t_lse) * (self.rows.delta - d_lse) + t_delta)
        return -found.sum((0, 2), dtype=torch.float64).to(sinks.dtype)


def _lifted(
    found: _Scores, delta: Tensor, d_p: Tensor, t_dp: Tensor, numbers: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """ds, ds' and p'; zero where hidden."""
    d_lse, t_lse, t_delta = numbers
    towards = d_p - delta + d_lse
    t_p = torch.where(found.seen, found.p * (found.tangent - t_lse), 0.0)
    ds = torch.where(found.seen, found.p * towards, 0.0)
    t_ds = torch.where(found.seen, t_p * towards + found.p * (t_dp - t_delta), 0.0)
    return ds, t_ds, t_p


def _mod(term: ScoreMod, before: Tensor, at: Tile, entering: Tensor) -> _Step:
    """The step of a score_mod: it works element by element, so its derivative is a number an element."""
    with torch.enable_grad():
        x = before.detach().requires_grad_()
        y = term.apply(x, at)
        slope = pulled(y, x, torch.ones_like(y), further=True)
        bend = pulled(slope, x, torch.ones_like(slope), further=True)
    return _Step(slope.detach(), bend.detach(), entering)


def _back(step: _Step, ds: Tensor, t_ds: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients before one elementwise step. A hidden score has none, even where the slope is not finite there."""
    bent = torch.where(ds == 0, 0.0, ds * step.bend * step.entering)
    return torch.where(ds == 0, 0.0, ds * step.slope), torch.where(t_ds == 0, 0.0, t_ds * step.slope) + bent
