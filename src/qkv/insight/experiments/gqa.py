"""What grouped-query and multi-query attention share, what it saves, and what averaging heads costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkv.cache import PagedCache
from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, bars, prose
from qkv.insight.given import Given
from qkv.insight.terminal import number

HEADS, TOKENS, HEAD = 8, 32, 32
REAL, WIDE = 32, 128  # query heads and their width in the model whose cache is counted
QUESTION = "What do grouped-query (GQA) and multi-query (MQA) heads share?"
SOURCES = ("MQA: arxiv.org/abs/1911.02150; GQA, mean-pooling: arxiv.org/abs/2305.13245",)


def run(seed: int) -> Answer:
    """Share two key/value heads among eight queries, share them wrongly, and average eight heads into fewer."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    shared = attention(q, k[:, :2], v[:, :2])
    group = HEADS // 2
    right = attention(q, *(x[:, :2].repeat_interleave(group, 1) for x in (k, v)))
    wrong = attention(q, *(x[:, :2].repeat(1, group, 1, 1) for x in (k, v)))
    one = torch.randn(2, 1, 1, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    alike = [0.95**0.5 * x + 0.05**0.5 * y for x, y in zip(one, (k, v), strict=True)]  # 95 % of each head in common
    sizes = {n: _bytes(n) for n in (REAL, 8, 1)}
    numbers: dict[str, Measured] = {
        "key/value heads of 32 query heads": tuple(sizes),
        "bytes a token, bfloat16": tuple(sizes.values()),
        "GQA differs from heads repeated in groups by": _apart(right, shared),
        "GQA differs from heads repeated in turns by": _apart(wrong, shared),
    }
    pooled, kin = _pooled(q, k, v, None), _pooled(q, alike[0], alike[1], None)
    numbers |= {f"mean-pooled to {n}, unlike heads: out is off by": e for n, e in pooled.items()}
    numbers |= {f"mean-pooled to {n}, heads alike: out is off by": e for n, e in kin.items()}
    drawn = {f"{n} of 8, unlike heads": e for n, e in pooled.items()} | {
        f"{n} of 8, 95 % alike": e for n, e in kin.items()
    }
    picture = f"{_fan(HEADS, 2)}\n\nout is off (relative) when k and v heads are averaged into\n{bars(drawn, 24)}"
    same, turned = _apart(right, shared), _apart(wrong, shared)
    mha, gqa, mqa = sizes.values()
    ok = same < 1e-9
    verdict = prose(f"""
        Query head h reads key/value head h // group: each of them serves {group} neighbours. It equals heads repeated
        with repeat_interleave (differs by {number(same)}); repeat, in turns, is another model
        (by {number(turned)}). A cache of {REAL} heads of {WIDE} keeps {number(mha)} bytes a token (MHA), with 8
        {number(gqa)} (GQA), with 1 {number(mqa)} (MQA): {number(mha / gqa)} and {number(mha / mqa)} times less; no
        score is saved, every query head still makes its own. Averaging trained heads into fewer is not free: out is
        off by {pooled[2]:.0%} for 2 unlike heads, {kin[2]:.0%} where heads are 95 % alike, so models are trained on
        afterwards.
        """)
    short = f"Keys and values: {REAL // 8} query heads read each pair, and the cache shrinks {number(mha / gqa)} times."
    if not ok:
        short = "Query head h does not read key/value head h // group here, which must not happen."
    return Answer("gqa", QUESTION, numbers, picture, verdict, SOURCES, short=short)


def on(given: Given) -> Answer:
    """Average the caller's key/value heads into fewer, and see how far its outputs move."""
    heads = given.k.shape[1]
    batch = slice(given.batch, given.batch + 1)
    q, k = (x[batch].detach().double().cpu() for x in (given.q, given.k))
    v = torch.stack([given.values(h) for h in range(0, q.shape[1], q.shape[1] // heads)])[None]
    found = _pooled(q[:, :, given.rows], k, v, given)
    size = given.k.element_size() * (given.k.shape[3] + v.shape[3])
    numbers: dict[str, Measured] = {"key/value heads": heads, "bytes a token": heads * size}
    numbers |= {f"mean-pooled to {n}: out is off by": e for n, e in found.items()}
    numbers |= {f"mean-pooled to {n}: bytes a token": n * size for n in found}
    names = {f"{n} of {heads}, {number(n * size)} bytes a token": e for n, e in found.items()}
    fewest = min(found, default=heads)
    told = f"with {fewest} out is off by {found[fewest]:.0%}, for {heads // fewest} times fewer bytes" if found else ""
    verdict = prose(f"""
        Your {heads} key/value heads keep {number(heads * size)} bytes a token.
        {f"Averaged in groups of neighbours, {told} (relative to out, over all query heads)." if found else ""}
        {"" if found else "There is only one, so nothing is left to share."}
        It is how a trained model is begun to be turned into GQA; training on afterwards mends most of it.
        """)
    short = f"Averaged into {fewest}, your {heads} key/value heads move out by {found.get(fewest, 0.0):.0%}."
    return Answer("gqa", QUESTION, numbers, bars(names, 24), verdict, SOURCES, short=short)


def _pooled(q: Tensor, k: Tensor, v: Tensor, given: Given | None) -> dict[int, float]:
    """By how much out is off, relative to it, when key/value heads are averaged into each smaller number of groups."""
    mask, positions, scale = (None, None, None) if given is None else (given.mask, given.positions, given.scale)
    if given is not None and positions is None and q.shape[2] < given.q.shape[2]:
        positions = given.rows
    whole = attention(q, k, v, scale=scale) if given is None or mask is None else _masked(given, k, v)
    found = {}
    for count in (n for n in range(k.shape[1] // 2, 0, -1) if k.shape[1] % n == 0):
        fewer = [x.unflatten(1, (count, -1)).mean(2) for x in (k, v)]
        less = attention(q, *fewer, scale=scale) if given is None or mask is None else _masked(given, *fewer)
        found[count] = _apart(less, whole)
    return found


def _masked(given: Given, k: Tensor, v: Tensor) -> Tensor:
    """The outputs of the rows that are looked at, with the mask of the call."""
    whole = replace(given, q=given.q.double().cpu(), k=k.expand(given.q.shape[0], -1, -1, -1), v=None)
    group = given.q.shape[1] // k.shape[1]
    return torch.stack([whole.weights(h) @ v[0, h // group] for h in range(given.q.shape[1])])[None]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm()) / max(float(b.norm()), 1e-300)


def _bytes(heads: int) -> int:
    """Bytes a token of a cache in bfloat16, as the cache itself counts them."""
    cache = PagedCache(pages=1, num_kv_heads=heads, head_dim=WIDE, dtype=torch.bfloat16)
    return cache.stats().bytes_per_token


def _fan(heads: int, shared: int) -> str:
    """Which query heads read which key/value heads."""
    group = heads // shared
    top = "query head      " + "  ".join(f"{h}" for h in range(heads))
    arms = "                " + "  ".join("└──┴──┴──┘"[: 3 * group - 2] for _ in range(shared))
    low = "key/value head  " + "  ".join(f"{g:^{3 * group - 2}}" for g in range(shared))
    return "\n".join(line.rstrip() for line in (top, arms, low))
