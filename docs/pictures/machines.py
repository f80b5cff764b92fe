"""Pictures of the course about how it is computed: the tiles of Flash, the pages of a cache."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from sheet import SMALL, Sheet

import qkv

SCORES = ((1.0, 2.0), (4.0, 0.5), (3.0, 3.5))  # of one query, in three tiles of two keys
VALUES = ((10.0, 20.0), (30.0, 40.0), (50.0, 60.0))  # one number a key
PROMPT, TAILS = 10, (3, 1, 5)  # tokens that three chats share, and what each adds
PAGE = 4


class State(NamedTuple):
    """What one query carries from tile to tile, and the factor that what it had is multiplied by."""

    factor: float
    m: float
    l: float
    acc: float


def walk() -> list[State]:
    """The state after each tile."""
    state, seen = State(1.0, -math.inf, 0.0, 0.0), []
    for scores, values in zip(SCORES, VALUES, strict=True):
        m = max(state.m, *scores)
        factor = math.exp(state.m - m)
        new = [math.exp(score - m) for score in scores]
        l = state.l * factor + sum(new)
        acc = state.acc * factor + sum(e * value for e, value in zip(new, values, strict=True))
        state = State(factor, m, l, acc)
        seen.append(state)
    return seen


def flash(theme: str) -> str:
    """One query goes through three tiles of keys."""
    s = Sheet(theme, 306, "Flash: one query goes through three tiles of keys with a maximum, a sum and an output")
    columns = ((148, "max"), (232, "old ×"), (308, "sum"), (388, "Σ e·v"), (472, "out"))
    s.text(8, 24, "scores", bold=True, fill="accent")
    s.text(8, 44, "values", SMALL, "muted")
    for x, name in columns:
        s.text(x, 24, name, bold=True, fill="accent", anchor="end")
    for x, name in zip((148, 232, 308, 388, 472), ("m", "e^(m′−m)", "l", "acc", "acc / l"), strict=True):
        s.text(x, 44, name, SMALL, "muted", anchor="end")
    steps = walk()
    for n, state in enumerate(steps):
        y = 58 + 58 * n
        for j in range(2):
            s.cell(8 + 44 * j, y, 44, 24, 0.9 * SCORES[n][j] / 4, f"{SCORES[n][j]:g}")
            s.text(29 + 44 * j, y + 40, f"{VALUES[n][j]:g}", SMALL, "muted", anchor="middle")
        shown = (
            f"{state.m:g}",
            f"{state.factor:.3f}",
            f"{state.l:.3f}",
            f"{state.acc:.2f}",
            f"{state.acc / state.l:.2f}",
        )
        for (x, _), words in zip(columns, shown, strict=True):
            s.text(x, y + 17, words, anchor="end")
        if n:
            s.arrow(16, y - 16, 16, y - 4)
    flat = [score for tile in SCORES for score in tile]
    q = torch.tensor(flat, dtype=torch.float64).view(1, 1, -1, 1)
    v = torch.tensor(VALUES, dtype=torch.float64).view(1, 1, -1, 1)
    whole = qkv.attention(torch.ones(1, 1, 1, 1, dtype=torch.float64), q, v, scale=1.0).item()
    s.text(8, 258, f"softmax over all {len(flat)} scores at once: out {whole:.2f}", bold=True)
    s.text(8, 280, "the same; no row of weights was ever kept, only", SMALL, "muted")
    s.text(8, 299, "m, l and acc of the query, whatever Lk is", SMALL, "muted")
    return s.svg()


def chats() -> tuple[qkv.cache.PagedCache, list[list[int]], list[int]]:
    """Three chats that begin with one prompt: the cache, the pages of each in order, and their lengths."""
    cache = qkv.cache.PagedCache(pages=14, page_size=PAGE, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    seqs = []
    for n, tail in enumerate(TAILS):
        tokens = [*range(PROMPT), *(100 * (n + 1) + i for i in range(tail))]
        seqs.append(cache.add(tokens=tokens))
        new = torch.zeros(1, 1, len(tokens) - seqs[-1].length, 8)
        cache.append(seqs[-1:], new, new)
    layout = cache.view(seqs).layout
    table, starts = list(layout.tables), list(layout.starts)
    pages = [table[a:b] for a, b in pairwise(starts)]
    return cache, pages, [seq.length for seq in seqs]


def paged(theme: str) -> str:
    """Each chat's list of pages, and the pool that they lie in."""
    cache, pages, lengths = chats()
    s = Sheet(theme, 338, "Paged attention: each sequence has a list of page numbers; the pages lie in one pool")
    s.text(8, 22, "what each chat holds: a list of page numbers", bold=True, fill="accent")
    users: dict[int, list[int]] = {}
    for n, (row, length) in enumerate(zip(pages, lengths, strict=True)):
        y = 34 + 38 * n
        s.text(8, y + 20, f"chat {n}")
        s.text(472, y + 20, f"{length} tokens", fill="muted", anchor="end")
        for at, page in enumerate(row):
            users.setdefault(page, []).append(n)
            s.box(70 + 64 * at, y, 56, 30, s.hues[n], opacity=0.2, line=s.hues[n])
            s.text(98 + 64 * at, y + 20, str(page), anchor="middle")
    stats = cache.stats()
    s.text(8, 170, f"the pool: {stats.pages} pages of {PAGE} tokens", bold=True, fill="accent")
    for page in range(stats.pages):
        x, y = 8 + 67 * (page % 7), 182 + 54 * (page // 7)
        owners = users.get(page, [])
        s.box(x, y, 60, 46, "panel")
        if owners:
            filled = max(min(lengths[n] - PAGE * pages[n].index(page), PAGE) for n in owners)
            for slot in range(filled):
                for part, n in enumerate(owners):
                    high = 18 / len(owners)
                    s.box(x + 4 + 13.2 * slot, y + 24 + high * part, 12, high, s.hues[n], line=None, corner=1)
        s.text(x + 6, y + 17, str(page), SMALL, "text" if owners else "muted")
    alone = sum(-(-length // PAGE) for length in lengths)
    s.text(8, 312, f"{stats.pages_used} pages used, {stats.pages_shared} of them shared; without sharing {alone}")
    s.text(
        8, 331, f"stripes: shared; {stats.tokens} slots hold a token, {stats.waste_tokens} wait for one", SMALL, "muted"
    )
    return s.svg()
