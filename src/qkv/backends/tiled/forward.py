"""Online softmax over key tiles in plain PyTorch: any device, any feature, memory in proportion to the inputs.

    for each tile of queries:   m = sink or -inf;  l = 1 or 0;  acc = 0
        for each key tile the mask leaves:
            s   = scores of the tile                     m' = max(m, rowmax s)
            l   = l * exp(m - m') + rowsum exp(s - m')
            acc = acc * exp(m - m') + exp(s - m') @ v    m  = m'
        out = acc / l                                    lse = m + log l

The largest score is subtracted before anything else is done to a score, so any finite one will do: the best key has
weight exp(0) before the division, and a difference that overflows is -inf, a weight of 0.

Source: Milakov and Gimelshein (2018), Rabe and Staats (2021), Dao et al. (2022). `tiled.backward` has the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.backends.base import Backend
from qkv.backends.tiled.walk import QueryTile, Walk, product, step, tile_sizes
from qkv.call.problem import Inputs, Output, Problem, empty_output
from qkv.numerics import no_autocast, steady_matmul


def _accumulated(walk: Walk, tile: QueryTile, careful: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulated values, row sums and row maxima of one query tile."""
    p, inputs = walk.problem, walk.inputs
    q = walk.load_queries(inputs.q, tile)
    top, total = walk.begin(tile, q)
    acc = q.new_zeros(*q.shape[:3], p.Dv)
    for key in walk.keys(tile):
        found = walk.scores(q, walk.load(inputs.k, tile, key), tile, key)
        s = found.s
        e, shrink, higher = step(s, top)
        total = total * shrink + e.sum(-1, keepdim=True)
        if p.dropout_p > 0:
            e = torch.where(walk.keep(found.at), e, 0.0)
        v = walk.load(inputs.v, tile, key)
        acc.mul_(shrink).add_(product(e, s != -torch.inf, v) if careful else steady_matmul(e, v))
        top = higher
    return acc, total, top


def forward(problem: Problem, inputs: Inputs) -> Output:
    """The online softmax over all tiles."""
    walk = Walk(problem, inputs)
    out = empty_output(inputs.q, problem.Dv)
    lse = torch.empty(problem.B, problem.Hq, problem.Lq, dtype=problem.accumulate, device=inputs.q.device)
    state = torch.empty((2, *lse.shape), dtype=lse.dtype, device=lse.device) if problem.part else None
    for tile in walk.all_tiles():
        acc, total, top = _accumulated(walk, tile, careful=False)
        if not bool(torch.isfinite(acc).all()):
            # A visible or a hidden NaN or inf: once more in the same order, with hidden values kept apart.
            acc, total, top = _accumulated(walk, tile, careful=True)
        dead = total == 0
        if problem.dropout_p > 0:
            acc = acc / (1.0 - problem.dropout_p)
        walk.store(torch.where(dead, 0.0, acc / total), out, tile)
        if state is not None:
            walk.store(top, state[0], tile)
            walk.store(total, state[1], tile)
        walk.store(torch.where(dead, -torch.inf, top + torch.log(total)), lse, tile)
    return Output(out, lse, state)


class TiledBackend(Backend):
    """Online softmax in plain PyTorch."""

    name = "tiled"

    def run(self, problem: Problem, inputs: Inputs) -> Output:
        with no_autocast(problem.device):
            return forward(problem, inputs)

    def tile(self, problem: Problem) -> tuple[int, int]:
        return tile_sizes(problem)

    def note(self, problem: Problem) -> str:
        return "plain PyTorch, tile by tile"
