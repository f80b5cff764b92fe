"""Which keys a causal mask shows when there are more keys than queries."""

from __future__ import annotations

import torch
from torch.nn import functional

from qkv.errors import ArgumentError
from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import number
from qkv.masks import causal

QUERIES, KEYS, HELD, HEAD = 2, 5, 1000, 8
QUESTION = "Which keys does a causal mask show when Lq is not Lk?"
SOURCES = ("github.com/pytorch/pytorch/issues/108108; flash-attention 2.1 changed to the end",)


def run(seed: int) -> Answer:
    """Count the keys that two queries see among five, and one among a thousand, with both readings of causal."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, HEAD, generator=rng, dtype=torch.float64) for n in (QUERIES, KEYS, KEYS))
    theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    apart = {
        at: (attention(q, k, v, mask=causal(), positions=at) - theirs).abs().max().item() for at in ("start", "end")
    }
    try:
        attention(q, k, v, mask=causal())
        refused = 0
    except ArgumentError:
        refused = 1
    numbers: dict[str, Measured] = {
        'keys seen, positions="start"': _seen(QUERIES, KEYS, "start"),
        'keys seen, positions="end"': _seen(QUERIES, KEYS, "end"),
        f'decoding step, keys seen of {HELD}, "start"': _seen(1, HELD, "start")[0],
        f'decoding step, keys seen of {HELD}, "end"': _seen(1, HELD, "end")[0],
        'PyTorch\'s is_causal=True differs from "start" by': apart["start"],
        'PyTorch\'s is_causal=True differs from "end" by': apart["end"],
        "qkv refuses to guess (1: yes)": refused,
    }
    one, all_ = (numbers[f'decoding step, keys seen of {HELD}, "{at}"'] for at in ("start", "end"))
    torch_reads = "start" if apart["start"] < 1e-9 else "end" if apart["end"] < 1e-9 else "neither"
    verdict = prose(f"""
        Causal means: a query at position p sees keys 0 to p. With as many keys as queries p is plain; otherwise
        somebody has to say where the queries stand. From the "start" ({_told(numbers, "start")} keys a query) suits two
        sequences that begin together; from the "end" ({_told(numbers, "end")}) suits a cache, whose last tokens ask.
        In a decoding step it is {number(_one(one))} key or {number(_one(all_))} of {HELD:,}: the wrong one makes a
        model forget all it read, and raises nothing. PyTorch's is_causal=True reads "{torch_reads}" (it differs from
        "start" by {number(apart["start"])}, from "end" by {number(apart["end"])}); flash-attention reads "end" since
        2.1. qkv {"asks for positions= where it matters" if refused else "did not ask for positions= here"}.
        """)
    short = f"Either: 1 key or all {HELD:,} in a decoding step, so say where your queries stand."
    if (one, all_) != (1, HELD):
        short = "The two readings do not see what is told of them: count the keys below."
    return Answer("mask-alignment", QUESTION, numbers, _picture(QUERIES, KEYS), verdict, SOURCES, short=short)


def on(given: Given) -> Answer:
    """The same counts for the caller's numbers of queries and keys."""
    lq, lk = given.q.shape[2], given.k.shape[2]
    numbers: dict[str, Measured] = {"queries": lq, "keys": lk}
    for at in ("start", "end"):
        first = 0 if at == "start" else lk - lq
        seen = [min(max(first + i + 1, 0), lk) for i in (0, lq - 1)]  # of the first and last query
        hidden = max(0, -first)
        numbers |= {f'keys the first query sees, "{at}"': seen[0], f'keys the last query sees, "{at}"': seen[1]}
        numbers[f'queries that see no key, "{at}"'] = min(hidden, lq)
    first_last = {
        at: [number(_one(numbers[f'keys the {which} query sees, "{at}"'])) for which in ("first", "last")]
        for at in ("start", "end")
    }
    same = lq == lk
    dead = _one(numbers['queries that see no key, "end"'])
    verdict = prose(f"""
        Your {lq:,} queries and {lk:,} keys: from the "start" the first query sees {first_last["start"][0]} and the last
        {first_last["start"][1]}; from the "end" {first_last["end"][0]} and {first_last["end"][1]}.
        {"The lengths agree, so both readings are one." if same else "Pass positions= to say which is meant."}
        {f"With more queries than keys the first {dead:,} would see none from the end." if dead else ""}
        """)
    short = (
        "As many queries as keys: there is only one reading."
        if same
        else (f"The last query sees {first_last['start'][1]} keys of {lk:,} by start, {first_last['end'][1]} by end.")
    )
    return Answer("mask-alignment", QUESTION, numbers, _small(lq, lk), verdict, SOURCES, short=short)


def _seen(queries: int, keys: int, at: str) -> tuple[float, ...]:
    return tuple(causal().tensor(queries, keys, positions=at).sum(-1).flatten().tolist())


def _one(value: Measured) -> float:
    return value[0] if isinstance(value, tuple) else value


def _told(numbers: dict[str, Measured], at: str) -> str:
    seen = numbers[f'keys seen, positions="{at}"']
    return " and ".join(map(number, seen)) if isinstance(seen, tuple) else number(seen)


def _small(lq: int, lk: int) -> str:
    """Both readings of the caller's sizes, or of smaller ones with the same kind of difference."""
    if lq == lk:
        return causal().picture(min(lq, 12), min(lk, 12))
    queries = min(lq, 6)
    keys = min(lk, 16) if lk > queries else lk
    drawn = "" if (queries, keys) == (lq, lk) else f"drawn smaller: {queries} queries and {keys} keys\n"
    return drawn + _picture(queries, keys)


def _picture(queries: int, keys: int) -> str:
    """Both readings, one below the other, for sizes that a screen holds."""
    parts = [f'positions="{at}"\n{causal().picture(queries, keys, positions=at)}' for at in ("start", "end")]
    return "\n".join(parts)
