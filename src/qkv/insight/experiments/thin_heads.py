"""How thin a head may be: what few dimensions can point at."""

from __future__ import annotations

import math

import torch

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

LENGTH, ROWS = 1024, 32
SIZES = (2, 4, 8, 16, 32, 64)
QUESTION = "How thin may a head be?"
SOURCES = ("Bhojanapalli et al. 2020, Low-Rank Bottleneck in Multi-head Attention, arxiv.org/abs/2002.07028",)


def run(seed: int) -> Answer:
    """Let tokens look for themselves among 1,024 directions of d numbers, with scores of variance about 1."""
    rng = torch.Generator().manual_seed(seed)
    own, ranks, needed = [], [], []
    for d in SIZES:
        x = torch.randn(1, 1, LENGTH, d, generator=rng, dtype=torch.float64)
        x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(d)  # every number of size about 1, as a norm leaves them
        rows = torch.arange(0, LENGTH, LENGTH // ROWS)
        p = weights(x, x, rows=rows)[0, 0]
        own.append(p.gather(1, rows[:, None]).mean().item())
        ranks.append(int(torch.linalg.matrix_rank(x[0, 0, :128] @ x[0, 0, :128].mT)))
        needed.append(_needed(x[0, 0, rows] @ x[0, 0].mT, rows) * math.sqrt(d))
    alone = [math.exp(math.sqrt(d)) / (math.exp(math.sqrt(d)) + (LENGTH - 1) * math.exp(0.5)) for d in SIZES]
    numbers: dict[str, Measured] = {
        "numbers in a head": SIZES,
        "weight on the own position": tuple(own),
        "e^√d / (e^√d + 1023 e^½)": tuple(alone),
        "rank of scores, 128 tokens": tuple(ranks),
        "sharper by, for 0.9": tuple(needed),
        "weight of equal attention": 1 / LENGTH,
    }
    lines = [f"{'d':>3}  {'weight on the own position, of 1,024':<40} sharper by, for 0.9"]
    lines += [
        f"{d:>3}  {bar(w, 30)} {number(w):<9} {number(s):>8} ×" for d, w, s in zip(SIZES, own, needed, strict=True)
    ]
    low_rank = all(rank <= d for rank, d in zip(ranks, SIZES, strict=True))
    verdict = prose(f"""
        {LENGTH:,} tokens of d numbers, each asking for itself, the simplest look-up there is. With 1/√d the weight it
        finds is {number(own[0])} at d = {SIZES[0]} and {number(own[-1])} at {SIZES[-1]}: a token's score for itself
        grows as √d, the crowd does not shrink. The scores of a head have rank {"at most d" if low_rank else "above d"}
        (measured {", ".join(map(str, ranks))}), however many tokens there are.
        It is a matter of sharpness, not a wall: {number(needed[0])} times sharper scores would find the own position at
        d = {SIZES[0]}, {number(needed[-1])} times at {SIZES[-1]}. But so large a scale leaves no slope to learn from.
        So heads of 64 to 128 numbers, and more of them where the model is wider.
        """)
    grows = own[-1] > 10 * own[0]
    short = f"Thin heads see a blur: on its own place {SIZES[0]} numbers put {own[0]:.1%}, 64 put {own[-1]:.0%}."
    if not grows:
        short = f"Thin heads did no worse here: {own[0]:.1%} against {own[-1]:.1%}."
    return Answer("thin-heads", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _needed(products: torch.Tensor, rows: torch.Tensor) -> float:
    """The smallest scale, to 1 %, at which the mean weight on the own position is 0.9."""
    low, high = 1e-3, 1e8
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        found = torch.softmax(middle * products, -1).gather(1, rows[:, None]).mean().item()
        low, high = (low, middle) if found >= 0.9 else (middle, high)
    return high
