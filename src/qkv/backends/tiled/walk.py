"""The tiles of one problem in the order in which they are visited, and their scores: for forward and backward alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.backends.tiled.schedule import KeyTile, Schedule, head_row
from qkv.call.problem import Inputs, Problem, query_positions
from qkv.masks import Tile
from qkv.numerics import dropout_keep, softcap, steady_matmul
from qkv.scores import ScoreMod, ScoreTerm, TensorBias

# A block of heads is chosen so that one tile of scores stays in the second-level cache on a CPU.
_SCORES_PER_BLOCK = {"cpu": 1 << 18}
_SCORES_PER_BLOCK_ELSEWHERE = 1 << 26


class Block(NamedTuple):
    """Batch rows and key/value heads that are computed together."""

    batch: slice
    kv_heads: slice


class QueryTile(NamedTuple):
    """A tile of queries of one block; `here` is where it lies in (B, Hq, Lq): batch rows, query heads, queries."""

    block: Block
    number: int
    here: tuple[slice, slice, slice]


class Scores(NamedTuple):
    """One tile of scores, (b, kv heads, group * queries, keys), where it lies, and what its derivative needs."""

    s: Tensor
    seen: Tensor | None  # None: every element is visible
    at: Tile
    dots: Tensor | None  # scale * q.k, if softcap needs it
    before: dict[int, Tensor]  # the input of each score_mod, by the term's index


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """Queries and keys of a tile. They depend on the sequence's own lengths only: neighbours cannot change a bit."""
    if problem.device != "cpu":
        return 512, 1024
    return (128, 256) if problem.Lq > 16 else (16, 2048)


class Walk:
    """The order in which one problem's tiles are visited, shared by forward and backward."""

    def __init__(self, problem: Problem, inputs: Inputs, sizes: tuple[int, int, int] | None = None) -> None:
        """`sizes`: queries and keys of a tile, and the scores of a block's tiles, at most."""
        self.problem, self.inputs = problem, inputs
        self.device = inputs.q.device
        limit = _SCORES_PER_BLOCK.get(problem.device, _SCORES_PER_BLOCK_ELSEWHERE)
        self.T, self.K, self.limit = (*tile_sizes(problem), limit) if sizes is None else sizes
        self.positions = query_positions(problem, inputs.positions, self.device)
        self.terms: tuple[ScoreTerm, ...] = inputs.bias.terms if inputs.bias is not None else ()
        self.can_hide = any(isinstance(t, (ScoreMod, TensorBias)) for t in self.terms)
        self._schedules: dict[tuple[int, int], Schedule] = {}

    def blocks(self) -> Iterator[Block]:
        """On the CPU one batch row at a time: a batch neighbour must not change which matrix product runs."""
        p = self.problem
        on_cpu = p.device == "cpu"
        rows = 1 if on_cpu else max(p.B, 1)
        scores = rows * max(p.group, 1) * min(self.T, max(p.Lq, 1)) * min(self.K, max(p.Lk, 1))
        heads = max(1, self.limit // scores)
        for b in range(0, p.B, rows):
            for g in range(0, p.Hkv, heads):
                yield Block(slice(b, min(b + rows, p.B)), slice(g, min(g + heads, p.Hkv)))

    def tiles(self, block: Block) -> Iterator[QueryTile]:
        for number, start in enumerate(range(0, self.problem.Lq, self.T)):
            rows = slice(start, min(start + self.T, self.problem.Lq))
            yield QueryTile(block, number, (block.batch, self.heads(block), rows))

    def all_tiles(self) -> Iterator[QueryTile]:
        for block in self.blocks():
            yield from self.tiles(block)

    def heads(self, block: Block) -> slice:
        """The query heads that read the block's key/value heads."""
        return slice(block.kv_heads.start * self.problem.group, block.kv_heads.stop * self.problem.group)

    def keys(self, tile: QueryTile) -> Iterator[KeyTile]:
        """The key tiles that a tile of queries has to visit, in order."""
        p, block = self.problem, tile.block
        b = block.batch.start if p.varies_by_batch else 0
        h = block.kv_heads.start if p.varies_by_head else 0
        if (b, h) not in self._schedules:
            batch = range(block.batch.start, block.batch.stop) if p.varies_by_batch else range(1)
            heads = self.heads(block) if p.varies_by_head else slice(0, 1)
            self._schedules.clear()  # blocks come in order: an earlier one is not asked for again
            lines = [
                head_row(p, self.inputs.positions, row, head)
                for row in batch
                for head in range(heads.start, heads.stop)
            ]
            self._schedules[b, h] = Schedule(p.mask, lines, p.Lq, p.Lk, self.T, self.K)
        return self._schedules[b, h].keys(tile.number)

    def at(self, tile: QueryTile, key: KeyTile) -> Tile:
        batch, _, rows = tile.here
        b, h, i, j = (torch.arange(s.start, s.stop, device=self.device) for s in (*tile.here, key.where))
        p = self.positions[batch, rows] if self.positions.shape[0] > 1 else self.positions[:, rows]
        return Tile(*tile.here, key.where, b[:, None, None, None], h[:, None, None], i[:, None], p[:, None, :, None], j)

    def load(self, x: Tensor, tile: QueryTile, key: KeyTile) -> Tensor:
        """Rows of k or v as (b, kv heads, rows, D) in the accumulation dtype."""
        return self._copy(x[tile.block.batch, tile.block.kv_heads, key.where])

    def load_queries(self, x: Tensor, tile: QueryTile) -> Tensor:
        """Rows of q (or out, or a gradient of it) as (b, kv heads, group * rows, D): a group shares each key load.

        Of one number a row, such as lse, D is 1.
        """
        x = self._copy(x[tile.here])
        return self.fold(x if x.dim() == 4 else x.unsqueeze(-1))

    def store(self, x: Tensor, to: Tensor, tile: QueryTile) -> None:
        """The way back."""
        x = self.unfold(x).to(to.dtype)
        to[tile.here] = x if to.dim() == 4 else x.squeeze(-1)

    def _copy(self, x: Tensor) -> Tensor:
        # Always a copy: the bits of a matrix product may depend on its operands' strides, and even on their alignment.
        return torch.empty(x.shape, dtype=self.problem.accumulate, device=x.device).copy_(x)

    def fold(self, x: Tensor) -> Tensor:
        """(b, query heads, rows, n) to (b, kv heads, group * rows, n)."""
        group, (b, heads, n, width) = self.problem.group, x.shape
        return x.reshape(b, heads // group, group * n, width)

    def unfold(self, x: Tensor) -> Tensor:
        """(b, kv heads, group * rows, n) to (b, query heads, rows, n)."""
        group, (b, heads, n, width) = self.problem.group, x.shape
        return x.reshape(b, heads * group, n // group, width)

    def begin(self, tile: QueryTile, q: Tensor) -> tuple[Tensor, Tensor]:
        """Row maxima and sums before any key: those of the sinks."""
        sinks = self.inputs.sinks
        if sinks is None:
            top = q.new_full((*q.shape[:3], 1), -torch.inf)
        else:
            mine = sinks[tile.here[1]].to(q.dtype)[None, :, None, None]
            top = self.fold(mine.expand(*self.unfold(q).shape[:3], 1))
        return top, torch.where(top == -torch.inf, 0.0, torch.exp(top - top))

    def scores(self, q: Tensor, k: Tensor, tile: QueryTile, key: KeyTile) -> Scores:
        """Scores of one tile, -inf where hidden."""
        p = self.problem
        dots = steady_matmul(q, k, b_t=True).mul_(p.scale)  # a scaled q may overflow where the score does not
        s = dots if p.softcap is None else softcap(dots, p.softcap)
        at = self.at(tile, key)
        seen: Tensor | None = None
        before: dict[int, Tensor] = {}
        if self.terms or not key.full:
            s = self.unfold(s)
            if not key.full:
                assert p.mask is not None
                seen = p.mask.visible(at, p.sizes)
            for index, term in enumerate(self.terms):
                if isinstance(term, ScoreMod):
                    before[index] = s
                    s = term.apply(s, at)
                else:
                    value = term.tile(at, s.dtype)
                    s = s + value
                    if isinstance(term, TensorBias):
                        open_ = value != -torch.inf
                        seen = open_ if seen is None else seen & open_
            if seen is not None:
                s = torch.where(seen, s, -torch.inf)
            s = self.fold(s)
        return Scores(s, seen, at, dots if p.softcap is not None else None, before)

    def keep(self, at: Tile) -> Tensor:
        """The surviving weights of a tile under dropout, folded like the scores."""
        kept = dropout_keep(self.inputs.seed, self.problem.dropout_p, at.b, at.h, at.i, at.j)
        return self.fold(kept.expand(at.b.shape[0], at.h.shape[0], at.i.shape[0], at.j.shape[0]))


def product(weights: Tensor, seen: Tensor, values: Tensor, *, transposed: bool = False) -> Tensor:
    """weights @ values where a value can only reach the rows that see it, NaN and inf included.

    With finite values the bits are those of the plain product: hidden weights are exact zeros.
    `transposed`: weights and seen are given as (summed, rows).
    """
    finite = torch.isfinite(values)
    result = steady_matmul(weights, values.masked_fill(~finite, 0), a_t=transposed)
    if not bool(finite.all()):
        reach = (seen.transpose(-1, -2) if transposed else seen).to(weights.dtype)
        kinds = ((values.isnan(), torch.nan), (values == torch.inf, torch.inf), (values == -torch.inf, -torch.inf))
        for kind, number in kinds:
            result = result + torch.where(reach @ kind.to(weights.dtype) > 0, number, 0.0)
    return result


def step(s: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(s - m'), the factor exp(m - m') of what was summed before, and m': the maximum with these scores."""
    higher = torch.maximum(top, s.amax(-1, keepdim=True))
    base = higher.masked_fill(higher == -torch.inf, 0.0)
    return (s - base).exp_(), (top - base).exp_(), higher
