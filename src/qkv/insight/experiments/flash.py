"""How a softmax can be exact without all its scores at hand: a tile at a time, with a running m, l and o."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import number, table

KEYS, TILE, HEAD, VALUE = 20, 4, 8, 8
LONG, WIDE = 100_000, 64  # tokens and numbers of a head whose memory is told
QUESTION = "How can Flash attention be exact, a tile at a time?"
SOURCES = (
    "Milakov, Gimelshein 2018, online softmax, arxiv.org/abs/1805.02867",
    "Dao et al. 2022, FlashAttention, arxiv.org/abs/2205.14135",
)


@dataclass(frozen=True)
class _Step:
    """After a tile: the largest score so far, the sum of e^(score - m), the sum of that times v, the rescaling."""

    m: float
    l: float
    o: Tensor
    shrink: float


def run(seed: int) -> Answer:
    """Follow one query over five tiles of four keys."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(HEAD, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(KEYS, n, generator=rng, dtype=torch.float64) for n in (HEAD, VALUE))
    scores = 2 * k @ q / HEAD**0.5
    ours = attention(2 * q[None, None, None], k[None, None], v[None, None])[0, 0, 0]
    long = torch.randn(3, 1, 1, 384, WIDE, generator=rng, dtype=torch.float32)
    exact = attention(*long.double(), backend="reference")
    kernel = (attention(*long) - exact).abs().max().item()
    answer = _answer(scores, v, ours, TILE)
    return _told(answer, kernel, "")


def on(given: Given) -> Answer:
    """Follow one row of the caller's, the last that is looked at, over tiles of its keys."""
    head, row = given.heads[0], len(given.rows) - 1
    p = given.weights(head)[row]
    scores = (given.keys(head) @ given.queries(head)[row]) * given.sharpness
    scores = scores.masked_fill(p == 0, -math.inf)
    v = given.values(head)
    tile = max(1, -(-len(scores) // 6))
    answer = _answer(scores, v, p @ v, tile)
    return _told(answer, None, f"Row {int(given.rows[row])} of head {head}. ")


def _steps(scores: Tensor, v: Tensor, tile: int) -> list[_Step]:
    m, total, o = -math.inf, 0.0, torch.zeros(v.shape[1], dtype=torch.float64)
    steps = []
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]
        top = max(m, part.max().item())
        shrink = 0.0 if m == -math.inf else math.exp(m - top)  # the first visible tile has nothing before it
        e = torch.zeros_like(part) if top == -math.inf else (part - top).exp()
        total, o, m = total * shrink + e.sum().item(), o * shrink + e @ v[start : start + tile], top
        steps.append(_Step(m, total, o, shrink))
    return steps


@dataclass(frozen=True)
class _Followed:
    numbers: dict[str, Measured]
    picture: str
    error: float
    early: float  # how far the partial results were from the end
    scores: int
    tile: int


def _answer(scores: Tensor, v: Tensor, whole: Tensor, tile: int) -> _Followed:
    steps = _steps(scores, v, tile)
    last = steps[-1]
    out = last.o / last.l if last.l else last.o
    parts = [(s.o / s.l - out).norm().item() if s.l else out.norm().item() for s in steps]
    numbers: dict[str, Measured] = {
        "running maximum m": tuple(s.m for s in steps),
        "what was before is multiplied by": tuple(s.shrink for s in steps),
        "running sum l": tuple(s.l for s in steps),
        "length of the running sum o": tuple(s.o.norm().item() for s in steps),
        "o / l is away from the result by": tuple(parts),
        "lse, m + ln l": last.m + math.log(last.l) if last.l else -math.inf,
        "differs from the softmax of all scores by": (out - whole).abs().max().item(),
        "numbers held for a row": 2 + v.shape[1],
    }
    numbers["bytes of all weights, 100,000 tokens, a head, float32"] = LONG * LONG * 4
    numbers["bytes of m, l and o of a tile of 128 queries"] = 128 * (2 + WIDE) * 4
    numbers["FLOPs a pair, either way"] = 4 * WIDE
    rows = [["keys", "m, largest", "× before", "l, sum of e^(s - m)", "|o|", "o / l off by"]]
    for i, (step, off) in enumerate(zip(steps, parts, strict=True)):
        name = f"{i * tile} to {min(len(scores), (i + 1) * tile) - 1}"
        cells = (step.m, step.shrink, step.l, step.o.norm().item(), off)
        rows.append([name, *map(number, cells)])
    error = (out - whole).abs().max().item()
    return _Followed(numbers, table(rows, "<>>>>>"), error, parts[0], len(scores), tile)


def _told(done: _Followed, kernel: float | None, where: str) -> Answer:
    exact = done.error < 1e-5
    size, state = LONG * LONG * 4, 128 * (2 + WIDE) * 4
    numbers = dict(done.numbers)
    own = ""
    if kernel is not None:
        numbers["this build's kernel, float32, differs from the definition by"] = kernel
        own = f"This build's kernel does so in float32, within {number(kernel)} of the definition in float64."
    verdict = prose(f"""
        {where}Three things are kept: m, the largest score so far; l, the sum of e^(s - m); o, the sum of e^(s - m) v. A
        larger score in a new tile only multiplies what was before by e^(m_old - m_new), which is exact, not an
        approximation: o / l after the last tile differs from a softmax of all {done.scores} scores by
        {number(done.error)}. {own} All weights of {number(LONG)} tokens would be {number(size / 1e9)} GB a head in
        float32; m, l and o of 128 queries are {number(state / 1024)} KiB. Not a FLOP is saved, {4 * WIDE} a pair either
        way ({WIDE} wide): it is faster because scores never leave the processor's own memory.
        """)
    short = "Keep the maximum, the sum and the output so far; a new maximum rescales them."
    if not exact:
        short = f"The tiles did not add up here: off by {number(done.error)}."
    return Answer("flash", QUESTION, numbers, done.picture, verdict, SOURCES, short=short)
