"""Why a softmax makes weights of scores, and not shares of the plain scores, of their positive part, or the maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import number, table
from qkv.probabilities import weights

KEYS, FEW, ROWS, HEAD = 64, 4, 256, 32
QUESTION = "Why a softmax, and not each score's share of their sum?"
SOURCES = ("Bridle 1990, the name; Bahdanau et al. 2014, equation 6, arxiv.org/abs/1409.0473",)


def run(seed: int) -> Answer:
    """Make weights of random scores in four ways, add 1 to every score, and ask which way has a slope."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, HEAD, generator=rng, dtype=torch.float64) for n in (ROWS, KEYS, KEYS))
    scores = (q @ k.mT / HEAD**0.5)[0, 0]
    ways = {"softmax": _softmax, "share of the sum": _share, "share, positive": _positive, "largest only": _largest}
    made = {name: way(scores) for name, way in ways.items()}
    negative = {name: (w < 0).double().mean().item() for name, w in made.items()}
    loud = {name: w.abs().sum(-1).max().item() for name, w in made.items()}
    shifted = {name: (way(scores + 1) - made[name]).abs().max().item() for name, way in ways.items()}
    empty = {name: (way(scores[:, :FEW]).abs().sum(-1) == 0).double().mean().item() for name, way in ways.items()}
    slope = {name: _slope(way, scores, v[0, 0]) for name, way in ways.items()}
    ours = (attention(q, k, v)[0, 0] - made["softmax"] @ v[0, 0]).abs().max().item()
    same = (weights(q, k)[0, 0] - made["softmax"]).abs().max().item()
    numbers: dict[str, Measured] = {}
    for title, found in (
        ("weights below 0", negative),
        ("largest sum of |weights| of a row", loud),
        ("all scores + 1: a weight moves by", shifted),
        ("rows of 4 keys without any weight", empty),
        ("how far out moves with the scores", slope),
    ):
        numbers |= {f"{title}, {name}": value for name, value in found.items()}
    numbers["softmax differs from qkv.weights, qkv.attention by"] = (same, ours)
    rows = [["weights by", "below 0", "worst |sum|", "moved by + 1", "none at all", "slope"]]
    for name in ways:
        cells = (f"{negative[name]:.0%}", number(loud[name]), number(shifted[name]), f"{empty[name]:.0%}")
        rows.append([name, *cells, number(slope[name])])
    fine = negative["softmax"] == 0 and loud["softmax"] < 1.001 and shifted["softmax"] < 1e-9 < slope["softmax"]
    verdict = prose(f"""
        Scores are of either sign, weights must not be: by share of the sum {negative["share of the sum"]:.0%} of them
        are below 0, and where the sum comes near 0 a row's weights add up to {number(loud["share of the sum"])} in size
        (softmax: {number(loud["softmax"])}). Only positive parts leaves {empty["share, positive"]:.0%} of rows with
        {FEW} keys without any weight. The largest alone is a dictionary, with slope {number(slope["largest only"])}:
        nothing to learn from. e^score is positive, keeps the order and never ends; only differences of scores count:
        adding 1 to all moves a weight by {number(shifted["softmax"])}, which is what lets kernels subtract the
        maximum (qkv why flash). It is a choice: sigmoid and sparse weights exist, with other faults.
        """)
    short = "e^score is never below 0, never ends, and only differences between scores count."
    if not fine:
        short = "The softmax does not do here what is told of it: see the table."
    return Answer("softmax", QUESTION, numbers, table(rows, "<>>>>>"), verdict, SOURCES, short=short)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def _share(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)


def _positive(scores: Tensor) -> Tensor:
    return scores.clamp_min(0) / scores.clamp_min(0).sum(-1, keepdim=True).clamp_min(1e-300)


def _largest(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0) + 0 * scores


def _slope(way: object, scores: Tensor, v: Tensor) -> float:
    """The median over rows of the size of d |out|² / d scores: 0 where no small change of a score matters."""
    given = scores.clone().requires_grad_()
    out = way(given) @ v  # type: ignore[operator]
    (found,) = torch.autograd.grad(out.square().sum(), given)
    return float(found.norm(dim=-1).median())
