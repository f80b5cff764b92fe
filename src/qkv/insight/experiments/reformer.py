"""Why Reformer can share queries and keys: which mask takes which harm of it away."""

from __future__ import annotations

import torch

from qkv.insight.answer import Answer, Measured, bars, one, prose
from qkv.insight.terminal import number
from qkv.masks import Mask, causal, sliding_window
from qkv.probabilities import weights

TOKENS, WIDTH, HEAD = 64, 512, 64
QUESTION = "Reformer shares Q and K: why does it not fail?"
SOURCES = ("Kitaev, Kaiser, Levskaya 2020, Reformer, section 2, arxiv.org/abs/2001.04451",)


def run(seed: int) -> Answer:
    """Random tokens, one matrix for queries and keys: hide the token itself, the future, both, or nothing."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    w = torch.randn(WIDTH, HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5
    tied = x @ w
    unit = tied / tied.norm(dim=-1, keepdim=True) * HEAD**0.5
    alone = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    alone[0, 0] = True  # the first token has nobody else to look at
    not_self = ~sliding_window(1)
    masks: dict[str, Mask | torch.Tensor | None] = {
        "neither": None,
        "itself hidden": not_self,
        "future hidden": causal(),
        "both hidden": (causal() & not_self) | alone,
    }
    on_itself, two_way, after = {}, {}, {}
    for name, mask in masks.items():
        p = weights(tied, tied, mask=mask)[0, 0]
        on_itself[name] = p.diagonal()[1:].mean().item()
        both = (p > 0) & (p.mT > 0) & ~torch.eye(TOKENS, dtype=torch.bool)
        two_way[name] = both.double().sum().item() / (TOKENS * (TOKENS - 1))
        after[name] = p.triu(1).sum(-1).mean().item()
    normed = weights(tied, unit)[0, 0].diagonal().mean().item()
    numbers: dict[str, Measured] = {f"weight on itself, {name}": w for name, w in on_itself.items()}
    numbers |= {f"pairs that look at each other, {name}": w for name, w in two_way.items()}
    numbers |= {f"weight on later tokens, {name}": w for name, w in after.items()}
    numbers["weight on itself, keys normed as in Reformer"] = normed
    numbers["the first token's weight on itself, both hidden"] = weights(tied, tied, mask=masks["both hidden"])[
        0, 0, 0, 0
    ].item()
    picture = f"Q = K, weight on the token itself, with\n{bars(on_itself)}\n"
    picture += f"pairs of tokens that look at each other, with\n{bars(two_way)}"
    works = on_itself["both hidden"] < 1e-9 and two_way["both hidden"] == 0 < two_way["itself hidden"]
    verdict = prose(f"""
        A shared matrix does two harms: a token's best match is itself ({number(on_itself["neither"])} of its weight),
        and scores are the same both ways, so whoever is looked at looks back ({two_way["neither"]:.0%} of pairs).
        Hiding the token itself cures the first ({number(on_itself["itself hidden"])}), a causal mask the second
        ({two_way["future hidden"]:.0%}); Reformer does both, and lets the first token, which has nobody else, see
        itself ({number(one(numbers["the first token's weight on itself, both hidden"]))}).
        Norming keys to one length, as it does too, leaves {number(normed)} on the token itself: that is not the cure.
        Direction then comes from the mask alone: an encoder, which has none, cannot borrow this.
        """)
    short = "It hides each token from itself, and the causal mask gives the direction back."
    if not works:
        short = "The two masks do not cure here what they are told to cure: see the bars."
    return Answer("reformer", QUESTION, numbers, picture, verdict, SOURCES, short=short)
