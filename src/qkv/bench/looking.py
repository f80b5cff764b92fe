"""`qkv bench --insight`: what it costs to look at a call, as a multiple of the call itself.

Three contenders take turns, all by one backend: `attention`; the same with every row's lse, largest score and weight,
and entropy; the same with each row's top keys and what each key receives too, for which scores are found twice. They
are checked against the definition in float64 first: of some rows all, and what the keys of a head receive.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import qkv
from qkv.bench import turns
from qkv.bench.turns import Quartiles, Terms
from qkv.call.problem import Options
from qkv.call.statistics import Statistics, Wanted
from qkv.observation import observe

TOP = 8
WANTED = {"rows": Wanted(), "all": Wanted(top=TOP, mass=True)}
NEEDED = {"rows": 1.3, "all": 2.5}
"""How many times as long as the call each may take at most."""
RECTANGLE, RECTANGLE_MS = 256, 50.0
"""Queries and keys of a rectangle of weights at the longest call, and the milliseconds that it may take."""
AGREE = 1e-5  # of each statistic's own size
HEAD = "Looking at a call, as a multiple of the call: each row's lse, maximum and entropy; top 8 and mass too:"
_SAMPLE = 16  # rows of a head that are checked
_LONG = 100_000


@dataclass(frozen=True)
class Call:
    """What is looked at: self-attention of one sequence."""

    heads: int
    length: int
    dim: int
    causal: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        mask, kind = "causal" if self.causal else "full", {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{mask} {self.heads}×{self.length} d{self.dim} {kind}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.dim)
        q, k, v = (torch.randn(1, self.heads, self.length, self.dim, generator=g).to(self.dtype) for _ in range(3))
        return q, k, v

    @property
    def mask(self) -> qkv.Mask | None:
        return qkv.causal() if self.causal else None

    def compare(self, terms: Terms) -> list[Looked]:
        """Check what is found, then time the three in turn."""
        return [compare(self, terms)]


def calls(*, quick: bool = False) -> Iterator[Call]:
    """Eight heads of 2,048 tokens in every kind, and one of 100,000; quick: the first kind of each type."""
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64,) if quick else (64, 128):
            for causal in (False, True):
                yield Call(8, 2048, dim, causal, dtype)
    if not quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield Call(1, _LONG, 64, True, dtype)


@dataclass(frozen=True)
class Looked:
    """One call: medians over rounds, ratios within a round as quartiles."""

    name: str
    milliseconds: float  # of the call itself
    rows: Quartiles  # lse, largest score and weight, entropy
    all: Quartiles  # and top keys, and what keys receive
    error: float  # the worst of the statistics, relative to each one's size
    rounds: int
    rectangle: float | None = None  # milliseconds, at the longest call

    @property
    def agrees(self) -> bool:
        return self.error <= AGREE

    @property
    def verdict(self) -> str:
        """As `turns.verdict` says."""
        if not self.agrees:
            return "wrong result"
        found = [turns.at_most(NEEDED[key], getattr(self, key)) for key in NEEDED]
        if self.rectangle is not None:
            found.append(turns.at_most(RECTANGLE_MS, (self.rectangle,) * 3))
        return turns.verdict(found)

    def __str__(self) -> str:
        rows, every = (
            f"{middle:.2f}× ({low:.2f} to {high:.2f}), ≤ {NEEDED[key]}×"
            for key, (low, middle, high) in (("rows", self.rows), ("all", self.all))
        )
        size = f"{RECTANGLE} × {RECTANGLE}"
        more = "" if self.rectangle is None else f"; {size} weights {self.rectangle:.1f} ms, ≤ {RECTANGLE_MS:.0f}"
        return f"  {self.name:<26} {self.milliseconds:9.1f} ms; rows {rows}; all {every}{more}  {self.verdict}"


def compare(call: Call, terms: Terms) -> Looked:
    """Check what is found, then time the three in turn."""
    q, k, v = call.tensors()
    mask, backend = call.mask, terms.backend

    def look(wanted: Wanted) -> tuple[Tensor, Statistics]:
        found = observe("qkv.see()", q, k, v, mask, Options(), backend, wanted)
        return found.out, found.statistics

    contenders: dict[str, Callable[[], object]] = {
        "call": lambda: qkv.attention(q, k, v, mask, backend=backend),
        "rows": lambda: look(WANTED["rows"]),
        "all": lambda: look(WANTED["all"]),
    }
    out, found = look(WANTED["all"])
    plain = qkv.attention(q, k, v, mask, backend=backend)
    error = max(worst(call, q, k, found), 0.0 if torch.equal(out, plain) else math.inf)
    taken = turns.take_turns(contenders, terms)
    rows, every = (turns.ratios(taken[name], taken["call"]) for name in NEEDED)
    rectangle = _rectangle(call, q, k, v, backend) if call.length == _LONG else None
    median = 1e3 * statistics.median(taken["call"])
    return Looked(call.name, median, rows, every, error, len(taken["call"]), rectangle)


def worst(call: Call, q: Tensor, k: Tensor, found: Statistics) -> float:
    """The largest error of the statistics, each relative to its size: by the definition, in float64.

    Rows of every head, and of calls of which a head fits into memory what all keys of one receive.
    """
    L, errors = call.length, []
    at = torch.linspace(0, L - 1, _SAMPLE).long()
    for h in range(call.heads):
        p, s = _weights(call, q[0, h], k[0, h], at)
        top = p.topk(TOP, -1).values
        ours = found.top_weights, found.top_keys
        assert ours[0] is not None
        assert ours[1] is not None
        weights, keys = ours[0][0, h, at].double(), ours[1][0, h, at]
        pairs = [
            (found.lse[0, h, at], s.logsumexp(-1)),
            (found.score[0, h, at], s.amax(-1)),
            (found.weight[0, h, at], p.amax(-1)),
            (found.entropy[0, h, at], -torch.special.xlogy(p, p).sum(-1)),
            (weights, top),
            (p.gather(-1, keys.clamp(min=0)).masked_fill(keys < 0, 0.0), top),
        ]
        errors += [_error(x.double(), y) for x, y in pairs]
    assert found.mass is not None
    errors.append(_error(found.mass.sum(-1), torch.full((1, call.heads), float(L), dtype=torch.float64)))
    if L <= 4096:
        whole = _weights(call, q[0, 0], k[0, 0], torch.arange(L))[0].sum(0)
        errors.append(_error(found.mass[0, 0], whole))
    return max(errors)


def _weights(call: Call, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and scores of some queries of a head, in float64."""
    s = q[at].double() @ k.double().mT * call.dim**-0.5
    if call.causal:
        s = s.masked_fill(torch.arange(call.length) > at[:, None], -torch.inf)
    return s.softmax(-1), s


def _error(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


def _rectangle(call: Call, q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> float:
    """Milliseconds of a rectangle of weights in the middle of a call that was looked at: the median of five."""
    trace, taken = qkv.see(q, k, v, call.mask, top=0, bins=0, mass=False, backend=backend), []
    queries = slice(call.length - RECTANGLE, call.length)
    keys = slice(call.length // 2, call.length // 2 + RECTANGLE)
    for _ in range(5):
        begun = time.perf_counter()
        trace.weights(q=queries, k=keys)
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken)


def measurement() -> turns.Measurement:
    """`qkv bench --insight`."""
    return turns.Measurement(
        "insight",
        seconds=420.0,
        quick_seconds=60.0,
        calls=lambda quick: list(calls(quick=quick)),
        begin=lambda say: HEAD,
        rounds=15,
        quick_rounds=15,
    )
