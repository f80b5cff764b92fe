"""Why keys and values are kept while a text is written, and queries are not."""

from __future__ import annotations

import torch

from qkv.cache import DenseCache
from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose
from qkv.insight.terminal import number, table
from qkv.masks import causal

TOKENS, WIDTH, HEADS, HEAD = 32, 64, 4, 16
QUESTION = "Why is there a cache of keys and values, and none of queries?"
SOURCES = ("Shazeer 2019, Fast Transformer Decoding, section 2.4, arxiv.org/abs/1911.02150",)


def run(seed: int) -> Answer:
    """Write 32 tokens one at a time over a cache, and compare with computing the whole text again at each."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    made = [torch.randn(WIDTH, HEADS * HEAD, generator=rng, dtype=torch.float64) / WIDTH**0.5 for _ in range(3)]

    def project(tokens: torch.Tensor) -> list[torch.Tensor]:
        return [(tokens @ w).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for w in made]

    q, k, v = project(x)
    anew = attention(q, k, v, mask=causal())
    cache = DenseCache(sequences=1, capacity=TOKENS, num_kv_heads=HEADS, head_dim=HEAD, dtype=torch.float64)
    seq, steps = cache.add(), []
    with torch.inference_mode():
        for i in range(TOKENS):
            new_q, new_k, new_v = project(x[:, i : i + 1])
            cache.append([seq], new_k, new_v)
            steps.append(attention(new_q, cache.view([seq]), mask=causal()))
        apart = (torch.cat(steps, 2) - anew).abs().max().item()
    other = q.clone()
    other[:, :, :-1] = torch.randn(1, HEADS, TOKENS - 1, HEAD, generator=rng, dtype=torch.float64)
    idle = (attention(other, k, v, mask=causal()) - anew)[:, :, -1].abs().max().item()
    rows, again = TOKENS, TOKENS * (TOKENS + 1) // 2
    numbers: dict[str, Measured] = {
        "step by step over a cache: out differs by": apart,
        "other earlier queries move the newest out by": idle,
        "rows projected, with a cache": rows,
        "rows projected, all anew each step": again,
        "pairs scored, with a cache": again,
        "pairs scored, all anew each step": sum(n * n for n in range(1, TOKENS + 1)),
        "bytes a token that the cache keeps": cache.stats().bytes_per_token,
    }
    cells = [["to write 32 tokens", "rows of q, k, v", "pairs scored"]]
    cells.append(["with a cache", number(rows), number(again)])
    cells.append(["all anew each step", number(again), number(one(numbers["pairs scored, all anew each step"]))])
    as_told = apart < 1e-9 and idle == 0
    verdict = prose(f"""
        A new token asks one question, of all tokens so far. Their keys and values are needed again at every step, so
        they are kept: the output is the same (differs by {number(apart)}) for {rows} projected rows instead of
        {number(again)}. Earlier queries are never asked again: put any others in their place and the newest output
        moves by {number(idle)}. Nothing earlier changes either, since the mask hides the new token from the old.
        The price is memory: {number(cache.stats().bytes_per_token)} bytes a token here, 2 × {HEADS}
        heads × {HEAD} numbers × 8 bytes, in every layer (qkv why gqa, qkv why latent).
        """)
    short = "Keys and values are asked again at every step; an old query never is."
    if not as_told:
        short = "The cache did not give here what computing anew gives: see the numbers."
    return Answer("kv-cache", QUESTION, numbers, table(cells, "<>>"), verdict, SOURCES, short=short)
