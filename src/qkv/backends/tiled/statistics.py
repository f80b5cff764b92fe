"""What the weights of a call come to, tile by tile in plain PyTorch: for any feature, on any device.

A row's softmax is that of `tiled.forward`, with one more sum, t = sum_j exp(s_ij - m) (s_ij - m): the entropy is
log l - t / l. What needs the weights themselves takes a second pass over the tiles, when m and l are known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.backends.tiled.walk import QueryTile, Walk, step
from qkv.call.problem import Inputs, Problem
from qkv.call.statistics import Statistics, Wanted
from qkv.numerics import no_autocast

# Far below it a weight is 0 in every dtype; finite, for 0 * inf is NaN.
_GONE = -2000.0
# Tiles off the CPU: long, for each costs some 70 kernels, and their temporaries some tens of MiB.
_ELSEWHERE = 256, 8192, 1 << 22


class _Rows(NamedTuple):
    """The softmax of a tile's rows, (b, kv heads, group * rows, 1) each."""

    top: Tensor  # the largest score, or sink
    total: Tensor  # sum of exp(s - top), the sink among them
    moment: Tensor  # sum of exp(s - top) (s - top)
    score: Tensor  # the largest score


def statistics(problem: Problem, inputs: Inputs, wanted: Wanted) -> Statistics:
    """The statistics of a call that was checked, for backends that have none of their own."""
    with torch.no_grad(), no_autocast(problem.device):
        return _Pass(problem, inputs, wanted).run()


class _Pass:
    """One call's tiles, and where what is found in them goes."""

    def __init__(self, problem: Problem, inputs: Inputs, wanted: Wanted) -> None:
        p, self.wanted = problem, wanted
        self.walk = Walk(problem, inputs, None if problem.device == "cpu" else _ELSEWHERE)
        self.inputs, self.device = inputs, inputs.q.device
        rows, kind = (p.B, p.Hq, p.Lq), p.accumulate

        def zeros(*size: int, dtype: torch.dtype = kind) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        exact = torch.float64
        self.found = Statistics(
            zeros(*rows), zeros(*rows), zeros(*rows), zeros(*rows),
            distance=zeros(*rows) if wanted.distance else None,
            top_keys=zeros(*rows, wanted.top, dtype=torch.int64) - 1 if wanted.top else None,
            top_weights=zeros(*rows, wanted.top) if wanted.top else None,
            mass=zeros(p.B, p.Hq, p.Lk, dtype=exact) if wanted.mass else None,
            map=None if wanted.bins is None else zeros(p.B, p.Hq, *wanted.bins, dtype=exact),
        )  # fmt: skip

    def run(self) -> Statistics:
        tiles = list(self.walk.all_tiles())
        for done, tile in enumerate(tiles):
            if self.wanted.progress is not None:
                self.wanted.progress(done / len(tiles))
            q = self.walk.load_queries(self.inputs.q, tile)
            rows = self._rows(tile, q)
            self._store_rows(tile, rows)
            if self.wanted.weights:
                self._weights(tile, q, rows)
        return self.found

    def _rows(self, tile: QueryTile, q: Tensor) -> _Rows:
        walk = self.walk
        top, total = walk.begin(tile, q)
        moment, score = torch.zeros_like(total), torch.full_like(total, -torch.inf)
        for key in walk.keys(tile):
            s = walk.scores(q, walk.load(self.inputs.k, tile, key), tile, key).s
            e, shrink, higher = step(s, top)
            base = higher.masked_fill(higher == -torch.inf, 0.0)
            moment = shrink * (moment + total * (top - base).clamp(min=_GONE))
            moment = moment + (e * (s - base).clamp(min=_GONE)).sum(-1, keepdim=True)
            total = total * shrink + e.sum(-1, keepdim=True)
            score = torch.maximum(score, s.amax(-1, keepdim=True))
            top = higher
        return _Rows(top, total, moment, score)

    def _store_rows(self, tile: QueryTile, rows: _Rows) -> None:
        top, total, moment, score = rows
        dead = total == 0
        lse = torch.where(dead, -torch.inf, top + total.log())
        weight = torch.where(score == -torch.inf, 0.0, (score - top).exp() / total)
        entropy = torch.where(dead, 0.0, (total.log() - moment / total).clamp(min=0.0))
        found = self.found
        for x, to in ((lse, found.lse), (score, found.score), (weight, found.weight), (entropy, found.entropy)):
            self.walk.store(torch.where(total.isnan() & ~lse.isnan(), torch.nan, x), to, tile)

    def _weights(self, tile: QueryTile, q: Tensor, rows: _Rows) -> None:
        """The second pass: weights, and what they add up to."""
        walk, found, wanted = self.walk, self.found, self.wanted
        bad = walk.unfold(rows.total.isnan() | rows.top.isnan())
        away = received = torch.zeros((), device=self.device, dtype=self.walk.problem.accumulate)
        best: tuple[Tensor, Tensor] | None = None
        here = tile.here
        for key in walk.keys(tile):
            scored = walk.scores(q, walk.load(self.inputs.k, tile, key), tile, key)
            p = torch.where(scored.s == -torch.inf, 0.0, (scored.s - rows.top).exp() / rows.total)
            p = walk.unfold(p).masked_fill(bad, 0.0)
            if wanted.distance:
                away = away + (p * (scored.at.p - scored.at.j).abs()).sum(-1)
                received = received + p.sum(-1)
            if wanted.top:
                best = _merge(best, walk.unfold(scored.s), scored.at.j, wanted.top)
            exact = p.double() if wanted.mass or wanted.bins is not None else p
            if found.mass is not None:
                found.mass[here[0], here[1], key.where] += exact.sum(-2)
            if found.map is not None:
                self._pool(tile, key.where, exact)
        if found.distance is not None and torch.is_tensor(received) and received.dim():
            found.distance[here] = torch.where(received == 0, 0.0, away / received)
        if found.distance is not None:
            found.distance[here] = found.distance[here].masked_fill(bad[..., 0], torch.nan)
        if best is not None and found.top_keys is not None and found.top_weights is not None:
            scores, keys = best
            weights = (scores - walk.unfold(rows.top)).exp() / walk.unfold(rows.total)
            n = keys.shape[-1]
            gone = scores == -torch.inf
            found.top_keys[here][..., :n] = keys.masked_fill(gone | bad, -1)
            found.top_weights[here][..., :n] = weights.masked_fill(gone, 0.0)
        if found.top_weights is not None:
            found.top_weights[here] = found.top_weights[here].masked_fill(bad, torch.nan)

    def _pool(self, tile: QueryTile, keys: slice, p: Tensor) -> None:
        """Adds a tile of weights to the pooled map."""
        problem, to = self.walk.problem, self.found.map
        assert to is not None
        rows, first = _sums(tile.here[2], to.shape[2], problem.Lq, self.device)
        columns, left = _sums(keys, to.shape[3], problem.Lk, self.device)
        part = rows @ p @ columns.mT
        to[tile.here[0], tile.here[1], first : first + rows.shape[0], left : left + columns.shape[0]] += part


def _sums(where: slice, bins: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """What sums tokens into bins, (bins that they reach, tokens), and the first of those."""
    at = torch.arange(where.start, where.stop, device=device) * bins // length
    first = where.start * bins // length
    reach = torch.arange(first, (where.stop - 1) * bins // length + 1, device=device)
    return (at == reach[:, None]).double(), first


def _merge(best: tuple[Tensor, Tensor] | None, s: Tensor, j: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest of what was kept and of a tile's scores, with their keys; of equal ones the lower key first."""
    keys = j.expand(s.shape)
    if best is not None:
        s, keys = torch.cat((best[0], s), -1), torch.cat((best[1], keys), -1)
    s, order = torch.sort(s, dim=-1, descending=True, stable=True)  # lower keys come first already
    return s[..., :top], keys.gather(-1, order[..., :top])
