"""Why a token may not see the next one: what the mask makes of one pass."""

from __future__ import annotations

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose
from qkv.insight.terminal import bar, number
from qkv.masks import Mask, causal

TOKENS, HEAD = 8, 16
QUESTION = "Why may a token not see the tokens after it?"
SOURCES = ("Vaswani et al. 2017, section 3.2.3 (leftward information flow), arxiv.org/abs/1706.03762",)


def run(seed: int) -> Answer:
    """Run a causal pass against one pass for every prefix, and change the last token with and without the mask."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    masked = attention(q, k, v, mask=causal())
    prefixes = [attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(TOKENS)]
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, -1] = torch.randn(HEAD, generator=rng, dtype=torch.float64)
    masks: dict[str, Mask | None] = {"causal": causal(), "no mask": None}
    moved = {}
    for name, mask in masks.items():
        before, after = attention(q, k, v, mask=mask), attention(changed[0], changed[1], changed[2], mask=mask)
        moved[name] = (after - before)[0, 0].norm(dim=-1)
    numbers: dict[str, Measured] = {
        "one causal pass differs from a pass a prefix by": (torch.cat(prefixes, 2) - masked).abs().max().item(),
        "earlier outputs move with the last token, causal": moved["causal"][:-1].max().item(),
        "earlier outputs move with the last token, no mask": moved["no mask"][:-1].max().item(),
        "the last output itself moves by": moved["causal"][-1].item(),
        "predictions to learn from in one pass": TOKENS,
        "pairs in one causal pass": TOKENS * (TOKENS + 1) // 2,
        "pairs in a pass for every prefix, uncached": sum(n * n for n in range(1, TOKENS + 1)),
    }
    largest = max(max(x.tolist()) for x in moved.values())
    lines = [f"{'how far token i moves if':<26}{'causal mask':<26}no mask", "the last token is another"]
    for i in range(TOKENS):
        drawn = "".join(f"{bar(moved[n][i].item(), 16, largest)} {number(moved[n][i].item()):<9}" for n in moved)
        lines.append(f"{f'  token {i}':<26}{drawn.rstrip()}")
    apart, leak = (one(numbers[name]) for name in list(numbers)[:2])
    free = one(numbers["earlier outputs move with the last token, no mask"])
    holds = leak == 0 and free > 1e-6
    verdict = prose(f"""
        Row i of one causal pass is what a pass over tokens 0 to i alone gives (they differ by {number(apart)}), so a
        text of {TOKENS} tokens gives {TOKENS} predictions to learn from at once: {numbers["pairs in one causal pass"]}
        pairs instead of {numbers["pairs in a pass for every prefix, uncached"]}.
        With the mask earlier rows move by {number(leak)} when the last token changes; without it by {number(free)}:
        the answer would be in the question, and training would learn to copy it.
        In generation the future does not exist yet, so the mask only keeps training like generating.
        """)
    short = "So that every row of one pass is a fair guess: none has seen its own answer."
    if not holds:
        short = "The mask does not do here what is told of it: see how far the rows move."
    return Answer("causal", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)
