"""What pages of a cache buy: memory and sharing, and no arithmetic."""

from __future__ import annotations

from typing import Any

import torch

from qkv.cache import DenseCache, PagedCache
from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import bar, number
from qkv.masks import causal
from qkv.plans import plan

CHATS, PROMPT, LONGEST, PAGE = 8, 960, 2048, 16
HEADS, HEAD = 2, 32
_MADE: dict[str, Any] = {"num_kv_heads": HEADS, "head_dim": HEAD, "dtype": torch.float32}
QUESTION = "Do pages make attention faster?"
SOURCES = ("Kwon et al. 2023, PagedAttention (vLLM), arxiv.org/abs/2309.06180",)


def run(seed: int) -> Answer:
    """Eight chats with one prompt and answers of different lengths: reserved, on pages, and on shared pages."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [PROMPT + 16 + int(n) for n in torch.randint(0, 200, (CHATS,), generator=rng)]
    reserved = DenseCache(sequences=CHATS, capacity=LONGEST, **_MADE).stats().bytes
    need = sum(-(-n // PAGE) for n in lengths)
    cache = PagedCache(pages=need, page_size=PAGE, **_MADE)
    flops, worst = _chat(cache, lengths, rng)
    stats = cache.stats()
    page = PAGE * stats.bytes_per_token
    sizes = {
        f"reserved, {LONGEST:,} a chat": reserved,
        "on pages, nothing shared": need * page,
        "on pages, prompt shared": stats.pages_used * page,
    }
    numbers: dict[str, Measured] = {
        "tokens of each chat": tuple(map(float, lengths)),
        "bytes a token": stats.bytes_per_token,
        **{f"bytes, {name}": size for name, size in sizes.items()},
        "bytes of the tokens themselves, all chats": sum(lengths) * stats.bytes_per_token,
        "bytes of empty slots on the pages": stats.waste_tokens * stats.bytes_per_token,
        "pages used": stats.pages_used,
        "pages shared": stats.pages_shared,
        **{f"FLOPs of a step, {name}": n for name, n in flops.items()},
        "out differs from plain tensors by": worst,
    }
    wide = max(map(len, sizes))
    lines = [f"bytes of keys and values of {CHATS} chats on one prompt of {PROMPT} tokens"]
    lines += [f"  {name:<{wide}}  {bar(size, 36, reserved)} {number(size)}" for name, size in sizes.items()]
    lines += ["", *_table(cache.table(), 3)]
    alone, shared = need * page, stats.pages_used * page
    same = flops["tensors"] == flops["pages"]
    verdict = prose(f"""
        A page is {PAGE} tokens; a table says which pages are a chat's (* shared). Nothing is reserved for tokens that
        may never come: {number(reserved / alone)} times fewer bytes than {number(LONGEST)} a chat, at most a page of
        each chat partly empty; the prompt is stored once: {number(alone / shared)} times fewer again
        ({stats.pages_shared} pages shared). The arithmetic is {"the same" if same else "not the same"},
        {number(flops["pages"])} FLOPs a step, and so is the result (differs by {number(worst)}).
        Pages do not make a call faster, finding them costs a little; a server is faster because more chats fit in its
        memory, and steps of many chats share the reading of the weights.
        """)
    short = "No: the arithmetic is the same. Pages save memory, and let chats share a prompt."
    if not (shared < alone < reserved and same):
        short = "Pages did not save memory here, or changed the arithmetic: see the numbers."
    return Answer("paged", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _chat(cache: PagedCache, lengths: list[int], rng: torch.Generator) -> tuple[dict[str, int], float]:
    """Fork a prompt for every chat, and ask each: FLOPs over tensors and pages, and by how much outputs differ."""

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(2, 1, HEADS, count, HEAD, generator=rng, dtype=torch.float32)

    prompt, said = tokens(PROMPT), [tokens(n - PROMPT) for n in lengths]
    first = cache.add()
    worst, flops = 0.0, {"tensors": 0, "pages": 0}
    with torch.inference_mode():
        cache.append([first], *prompt)
        chats = [first, *(cache.fork(first) for _ in range(CHATS - 1))]
        for chat, own in zip(chats, said, strict=True):
            cache.append([chat], *own)
        for chat, own in zip(chats, said, strict=True):
            q = torch.randn(1, HEADS, 1, HEAD, generator=rng, dtype=torch.float32)
            k, v = torch.cat([prompt, own], 3)
            view = cache.view([chat])
            apart = attention(q, view, mask=causal()) - attention(q, k, v)
            flops["pages"] += plan(q, view, mask=causal()).flops
            flops["tensors"] += plan(q, k, v).flops
            worst = max(worst, apart.abs().max().item())
    return flops, worst


def _table(text: str, count: int) -> list[str]:
    """The first lines of a page table, cut to what a screen shows."""
    return [line.partition(" ... ")[0] + (" …" if " ... " in line else "") for line in text.splitlines()[: count + 1]]
