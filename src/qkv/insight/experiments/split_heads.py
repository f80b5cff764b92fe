"""Splitting heads: view then transpose, against a reshape that has the right shape and the wrong numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import number
from qkv.masks import causal

TOKENS, HEADS, HEAD = 6, 2, 2
QUESTION = "How are heads split: view and transpose, or one reshape?"
SOURCES = ("A learner's question: github.com/harvardnlp/annotated-transformer/issues/94",)


def run(seed: int) -> Answer:
    """Split numbered channels both ways, then look for the future in the past with the wrong one."""
    x = torch.arange(TOKENS * HEADS * HEAD, dtype=torch.float64).view(1, TOKENS, HEADS * HEAD)
    right, wrong = _right(x), _wrong(x)
    misplaced = (right != wrong).double().mean().item()
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, TOKENS, HEADS * HEAD, generator=rng, dtype=torch.float64)
    later = tokens.clone()
    later[:, 3] += 1  # with the wrong split token 3 is where head 1 begins
    moved = {}
    for name, split in (("right", _right), ("wrong", _wrong)):
        a, b = (attention(*(split(t),) * 3, mask=causal()) for t in (tokens, later))
        moved[name] = (b - a).transpose(1, 2).flatten(2)[0].abs().amax(-1)  # joined as everybody joins
    seen = [len(set(wrong[0, h].flatten().div(HEADS * HEAD).floor().tolist())) for h in range(HEADS)]
    numbers: dict[str, Measured] = {
        "elements in the wrong place": misplaced,
        "shape, right": tuple(right.shape),
        "shape, wrong": tuple(wrong.shape),
        "tokens that each head sees, wrong": tuple(seen),
        "tokens 0 to 2 move with token 3, right": moved["right"][:3].max().item(),
        "tokens 0 to 2 move with token 3, wrong": moved["wrong"][:3].max().item(),
    }
    lines = [f"{'x (6 tokens, 4 channels)':<26}{'head 0':<16}{'head 1'}"]
    for name, heads_of in (("view, transpose", right), ("reshape", wrong)):
        for i in range(TOKENS):
            row = " ".join(f"{int(n):>2}" for n in x[0, i])
            heads = "".join(f"{' '.join(f'{int(n):>2}' for n in heads_of[0, h, i]):<16}" for h in range(HEADS))
            lines.append(f"t{i}: {row:<22}{heads}{name if i == 0 else ''}".rstrip())
    verdict = prose(f"""
        x.view(B, N, h, d).transpose(1, 2) gives head 0 the first d channels of every token. x.reshape(B, h, N, d)
        has the same shape, raises nothing, and puts {misplaced:.0%} of the numbers elsewhere: each head holds
        whole tokens, {seen[0]} and {seen[1]} of {TOKENS}, cut into pieces that pose as tokens.
        {_leak(moved["right"][:3].max().item(), moved["wrong"][:3].max().item())}
        The way back is transpose(1, 2).flatten(2), for the same reason.
        """)
    short = f"view, then transpose; one reshape has the shape and {misplaced:.0%} of the numbers wrong."
    if misplaced == 0:
        short = "Both ways agree here, which they must not with more than one head and token."
    return Answer("split-heads", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _leak(right: float, wrong: float) -> str:
    leak = f"change token 3 and the outputs of tokens 0 to 2 move by {number(wrong)} (rightly split: {number(right)})."
    return f"It leaks through a causal mask: {leak}" if wrong > 1e-12 >= right else f"No leak shows here: {leak}"


def _right(x: Tensor) -> Tensor:
    return x.view(1, TOKENS, HEADS, HEAD).transpose(1, 2)


def _wrong(x: Tensor) -> Tensor:
    return x.reshape(1, HEADS, TOKENS, HEAD)
