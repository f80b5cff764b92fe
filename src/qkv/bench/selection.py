"""Rows of `qkv bench --sparse` for decode with selected blocks: what the selection costs, and what a step gains.

Contenders take turns: a step over all keys of a paged cache, the selection alone by each way to score, and a selection
with the attention over what it chose. They are checked in float64 first: the choice against the scores' definition,
written out here once more, and the outputs against attention to the keys that were chosen, and to all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import qkv
from qkv.bench import turns
from qkv.bench.cases import TOLERANCE
from qkv.bench.turns import Quartiles, Terms
from qkv.call.keys import KVView

LENGTH, QUICK_LENGTH = 131_072, 16_384
HEADS = ((32, 8), (8, 8))  # of queries, of keys
SELECTION, STEP = 0.05, 8.0
"""A selection may take SELECTION of a full step, and a full step has to take STEP times a step with selected blocks."""
BLOCK, PART, DIM = 64, 16, 128  # a PARTth of the blocks is chosen
HOW = "mean", "minmax"
_ROUNDS = 3  # for each that a call without a cache is given: a step takes milliseconds
_ASTRAY = 1e-5  # by how much a chosen block may miss the best ones, of the largest score: float32's rounding
_SEED = 20260714


@dataclass(frozen=True)
class Step:
    """One query of a sequence whose keys lie on pages of one block each."""

    heads: int
    kv_heads: int
    length: int = LENGTH
    dim: int = DIM

    @property
    def name(self) -> str:
        return f"decode {self.heads}/{self.kv_heads}×{self.length} d{self.dim} bf16, 1/{PART} of the blocks"

    @property
    def top_k(self) -> int:
        """The blocks that are chosen."""
        return self.length // BLOCK // PART

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        g = torch.Generator().manual_seed(_SEED + self.heads)
        size = (1, self.kv_heads, self.length, self.dim)
        q = torch.randn(1, self.heads, 1, self.dim, generator=g).to(torch.bfloat16)
        k, v = (torch.randn(size, generator=g).to(torch.bfloat16) for _ in range(2))
        return q, k, v

    def select(self, q: Tensor, view: KVView, how: str) -> qkv.Mask:
        """The mask of the chosen blocks."""
        return qkv.select_blocks(q, view, BLOCK, self.top_k, how, mask=qkv.causal(), per_group=True)  # type: ignore[arg-type]

    @torch.inference_mode()
    def compare(self, terms: Terms) -> list[Selected]:
        """Check the choices and the outputs, then time the contenders in turn."""
        q, k, v = self.tensors()
        pages = -(-self.length // BLOCK)
        cache = qkv.cache.PagedCache(
            pages=pages,
            page_size=BLOCK,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            dtype=torch.bfloat16,
            summaries=BLOCK,
        )
        seq = cache.add()
        cache.append([seq], k, v)
        view = cache.view([seq])

        def attend(mask: qkv.Mask) -> Tensor:
            out: Tensor = qkv.attention(q, view, mask=mask, backend=terms.backend)
            return out

        contenders: dict[str, Callable[[], object]] = {"full": partial(attend, qkv.causal())}
        error, astray = _error(attend(qkv.causal()), q, k, v, None), 0.0
        for how in HOW:
            chosen = self.select(q, view, how)
            seen = chosen.tensor(1, self.length, "end", 1, self.heads)[0, :, 0]
            astray = max(astray, _astray(seen, self.top_k, _scores(q, k, how)))
            error = max(error, _error(attend(chosen), q, k, v, seen))
            contenders[how] = partial(self.select, q, view, how)
        contenders["step"] = lambda: attend(self.select(q, view, "mean"))
        del k, v
        taken = turns.take_turns(contenders, Terms(terms.backend, _ROUNDS * terms.rounds, terms.until))
        full = taken["full"]
        mean, minmax = (turns.ratios(taken[how], full) for how in HOW)
        step = turns.ratios(full, taken["step"])
        median, held = 1e3 * statistics.median(full), self.length >= LENGTH
        return [Selected(self.name, median, mean, minmax, step, held, error, astray, len(full))]


def steps(*, quick: bool = False) -> list[Step]:
    """Those that are measured."""
    return [Step(*HEADS[0], QUICK_LENGTH)] if quick else [Step(*heads) for heads in HEADS]


@dataclass(frozen=True)
class Selected:
    """One step: medians over rounds, ratios within a round as quartiles."""

    name: str
    full: float  # milliseconds of a step over all keys
    mean: Quartiles  # of it, what the selection takes
    minmax: Quartiles
    step: Quartiles  # how many times as long the full step takes as one with selected blocks, selection included
    held: bool  # to what is needed: at the length that it was promised for
    error: float  # of the worst output, relative
    astray: float  # by how much a chosen block misses the best ones, of the largest score
    rounds: int

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE["bf16"] and self.astray <= _ASTRAY

    @property
    def verdict(self) -> str:
        """As `turns.verdict` says."""
        if not self.agrees:
            return "wrong result"
        found = [turns.at_most(SELECTION, self.mean), turns.at_most(SELECTION, self.minmax), (STEP, self.step)]
        return turns.verdict(found if self.held else [])

    def __str__(self) -> str:
        most, least = (f" (≤ {SELECTION:.0%})", f" (≥ {STEP:g}×)") if self.held else ("", "")
        return (
            f"  {self.name:<44} {self.full:7.2f} ms; selection by mean {self.mean[1]:.2%}{most}, by minmax "
            f"{self.minmax[1]:.2%}{most}; step {self.step[1]:.2f}× faster{least}  {self.verdict}"
        )


def _scores(q: Tensor, k: Tensor, how: str) -> Tensor:
    """The score of each block for each key head, (Hkv, blocks), by definition: the sum over the group's heads."""
    found = []
    for queries, keys in zip(q[0, :, 0].double().chunk(k.shape[1]), k[0], strict=True):
        blocks = keys.double().unflatten(0, (-1, BLOCK))
        if how == "mean":
            found.append(sum(blocks.mean(1) @ one for one in queries))
        else:
            low, high = blocks.amin(1), blocks.amax(1)
            found.append(sum(torch.maximum(low * one, high * one).sum(-1) for one in queries))
    return torch.stack(found)  # type: ignore[arg-type]


def _astray(seen: Tensor, top_k: int, scores: Tensor) -> float:
    """By how much chosen blocks miss the best `top_k`; inf unless each head sees so many blocks, and those whole."""
    blocks = seen.unflatten(1, (-1, BLOCK))
    some = blocks.any(-1)
    if not torch.equal(some, blocks.all(-1)) or not bool((some.sum(-1) == top_k).all()):
        return math.inf
    scores = scores.repeat_interleave(len(seen) // len(scores), 0)
    least = scores.topk(top_k, -1).values[:, -1]
    worst = scores.masked_fill(~some, math.inf).amin(-1)
    return float(((least - worst) / scores.abs().amax(-1)).clamp(min=0).max())


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> float:
    """The worst relative error of a head's output: over the keys that it sees, or, of the ends, over all."""
    worst, group = 0.0, q.shape[1] // k.shape[1]
    for h in range(q.shape[1]) if seen is not None else (0, q.shape[1] - 1):
        keys, values = (
            t[0, h // group].double() if seen is None else t[0, h // group][seen[h]].double() for t in (k, v)
        )
        expected = (keys @ q[0, h, 0].double() * q.shape[3] ** -0.5).softmax(0) @ values
        error = float((out[0, h, 0].double() - expected).norm() / expected.norm())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
