"""Attention as a dictionary lookup, from an exact one to a plain mean."""

from __future__ import annotations

import math

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, prose
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

ENTRIES = 16
SHARPNESS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
ASKED = 5  # the entry that is looked up


def run(seed: int) -> Answer:
    """Look one key up among sixteen, with the softmax from flat to sharp."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.linalg.qr(torch.randn(ENTRIES, ENTRIES, generator=rng, dtype=torch.float64))[0]  # orthonormal rows
    values = torch.randn(ENTRIES, 8, generator=rng, dtype=torch.float64)
    k, v = keys[None, None], values[None, None]

    noise = torch.randn(ENTRIES, generator=rng, dtype=torch.float64)
    exact = keys[ASKED]
    misspelt = exact + 0.5 * noise / noise.norm()  # a query that equals no key: a dictionary would raise KeyError

    hit, hit_misspelt, error, spread, slope = [], [], [], [], []
    for sharpness in SHARPNESS:
        q = exact[None, None, None].clone().requires_grad_()
        p = weights(q.detach(), k, scale=sharpness)[0, 0, 0]
        out = attention(q, k, v, scale=sharpness)
        hit.append(p[ASKED].item())
        error.append((out[0, 0, 0] - values[ASKED]).norm().item())
        spread.append((out[0, 0, 0] - values.mean(0)).norm().item())
        hit_misspelt.append(weights(misspelt[None, None, None], k, scale=sharpness)[0, 0, 0, ASKED].item())
        slope.append(_sensitivity(out, q))

    numbers = {
        "sharpness (the scale argument)": SHARPNESS,
        "weight on the right key": tuple(hit),
        "the same, query misspelt by half": tuple(hit_misspelt),
        "distance from the stored value": tuple(error),
        "distance from the plain mean": tuple(spread),
        "how far out moves as q moves": tuple(slope),
    }
    lines = [f"sharpness {number(s):>5}  {bar(w, 40)} {number(w)}" for s, w in zip(SHARPNESS, hit, strict=True)]
    best = max(range(len(SHARPNESS)), key=slope.__getitem__)
    verdict = prose(f"""
        The query is compared with every key; softmax turns the {ENTRIES} scores into weights that sum to 1;
        out is the weighted mean of the values.
        At sharpness 0 it is the plain mean (off by {number(spread[0])}),
        at {number(SHARPNESS[-1])} the stored value to within {number(error[-1])}, as d[key] gives.
        A query that equals no key finds the nearest one
        (weight {number(hit_misspelt[-1])}) where a dictionary raises KeyError.
        Softness buys a slope to learn from, largest at sharpness {number(SHARPNESS[best])} ({number(slope[best])});
        the mean has {number(slope[0])}, the almost exact lookup {number(slope[-1])}: neither can be trained.
        """)
    short = "A soft dictionary: the nearer a key is to the query, the more its value counts."
    sources = (
        "Vaswani et al. 2017, section 3.2, arxiv.org/abs/1706.03762",
        "stats.stackexchange.com/questions/421935; Dive into Deep Learning, ch. 11, d2l.ai",
    )
    return Answer(
        "lookup", "What do queries, keys and values do?", numbers, "\n".join(lines), verdict, sources, short=short
    )


def _sensitivity(out: torch.Tensor, q: torch.Tensor) -> float:
    """Return the Frobenius norm of d out / d q: how much the answer moves when the question does."""
    total = 0.0
    for component in out[0, 0, 0]:
        (gradient,) = torch.autograd.grad(component, q, retain_graph=True)
        total += gradient.square().sum().item()
    return math.sqrt(total)
