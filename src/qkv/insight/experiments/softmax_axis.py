"""Over which axis of the scores the softmax runs, told by what leaks."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose
from qkv.insight.terminal import heatmap, number
from qkv.masks import causal

TOKENS, HEAD = 6, 8
QUESTION = "Over which axis of the scores does the softmax run?"
SOURCES = ("Vaswani et al. 2017, equation 1, arxiv.org/abs/1706.03762; a classic of forums",)


def run(seed: int) -> Answer:
    """Change the last query only, and see which rows of the output move with the softmax over keys and over queries."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(TOKENS, HEAD, generator=rng, dtype=torch.float64) for _ in range(3))
    other = q.clone()
    other[-1] = 3 * torch.randn(HEAD, generator=rng, dtype=torch.float64)
    sums, moved, drawn = [], [], []
    for axis in (-1, -2):
        p, again = (_weights(x, k, axis) for x in (q, other))
        sums.append(p.sum(-1))
        moved.append(((again - p) @ v)[:-1].abs().max().item())
        drawn.append(p)
    ours = attention(q[None, None], k[None, None], v[None, None], mask=causal())[0, 0]
    numbers: dict[str, Measured] = {
        "row sums, over keys": tuple(sums[0].tolist()),
        "row sums, over queries": tuple(sums[1].tolist()),
        "earlier outputs move by, over keys": moved[0],
        "earlier outputs move by, over queries": moved[1],
        "over keys: differs from qkv.attention by": (drawn[0] @ v - ours).abs().max().item(),
        "over queries: differs from qkv.attention by": (drawn[1] @ v - ours).abs().max().item(),
    }
    names = [f"{'keys' if axis == 0 else 'queries'}" for axis in (0, 1)]
    pictures = [
        [f"softmax over {name}:", *heatmap(p.tolist(), [f"q{i}" for i in range(TOKENS)]).splitlines()]
        for name, p in zip(names, drawn, strict=True)
    ]
    ends = [["row sum"] + [number(x) for x in total.tolist()] for total in sums]
    lines = [
        f"{a:<24} {b:>8}   {c:<24} {d:>8}"
        for a, b, c, d in zip(pictures[0], ends[0], pictures[1], ends[1], strict=True)
    ]
    low, high = sums[1].min().item(), sums[1].max().item()
    leaks = moved[1] > 1e-6 > moved[0]
    verdict = prose(f"""
        Each query shares out one unit of attention among the keys, so its row sums to 1
        (to {number((sums[0] - 1).abs().max().item())}).
        Normalised over queries the rows sum to {number(low)} to {number(high)}: keys share themselves out, an output
        is no mean of values any more. {_leak(moved, leaks)}
        The shape of the scores is the same for both, so nothing raises. softmax(scores, dim=-1), the last axis, is the
        keys' because scores = q kᵀ has queries as rows; qkv.attention agrees to
        {number(one(numbers["over keys: differs from qkv.attention by"]))}.
        """)
    short = "Over the keys, the last axis: every query's weights sum to 1, and nothing leaks."
    if not leaks:
        short = "Over the keys, but the leak that should tell the axes apart does not show here."
    return Answer("softmax-axis", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _weights(q: Tensor, k: Tensor, axis: int) -> Tensor:
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / HEAD**0.5).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=axis)


def _leak(moved: list[float], leaks: bool) -> str:
    if leaks:
        return f"""
            And it leaks through a causal mask: change the last query alone and earlier outputs move by
            {number(moved[1])}; on the right axis by {number(moved[0])}."""
    return f"""
        Changing the last query moves earlier outputs by {number(moved[0])} on the right axis and {number(moved[1])}
        on the wrong one."""
