"""Why heads stare at the first token: weights sum to 1, and nothing is no key."""

from __future__ import annotations

import math

import torch

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number, table

LENGTHS = (16, 256, 4096)
HEAD, ROWS, LEAD = 64, 64, 3.0
MANY = 0.3  # of a row's weight: a share above which a head is said to have a sink
QUESTION = "Why do heads stare at the first token?"
SOURCES = ("Xiao et al. 2023, StreamingLLM, arxiv.org/abs/2309.17453; learned: GPT-OSS, arxiv.org/abs/2508.10925",)


def run(seed: int) -> Answer:
    """Ask for what no key has, with and without a place for the weight to go."""
    rng = torch.Generator().manual_seed(seed)
    plain, rested, share, token = [], [], [], []
    for n in LENGTHS:
        q = torch.randn(1, 1, ROWS, HEAD, generator=rng, dtype=torch.float64)
        k, v = torch.randn(2, 1, 1, n, HEAD, generator=rng, dtype=torch.float64)
        level = math.log(n) + LEAD
        sinks = torch.tensor([level], dtype=torch.float64)
        out = attention(q, k, v)
        quiet, all_ = attention(q, k, v, sinks=sinks, return_lse=True)
        plain.append(out.norm(dim=-1).mean().item())
        rested.append(quiet.norm(dim=-1).mean().item())
        share.append((level - all_).exp().mean().item())
        # the same by a first token: one key whose score is `level` for every query, with value 0
        first = torch.cat([torch.zeros(1, 1, 1, HEAD, dtype=torch.float64), k], 2)
        bias = torch.zeros(1, n + 1, dtype=torch.float64)
        bias[0, 0] = level
        same = attention(q, first, torch.cat([torch.zeros_like(v[:, :, :1]), v], 2), bias=bias)
        token.append((same - quiet).abs().max().item())
    numbers: dict[str, Measured] = {
        "keys": LENGTHS,
        "length of out, no sink": tuple(plain),
        "length of out, with a sink": tuple(rested),
        "weight of the sink": tuple(share),
        "a first token with that score and value 0 differs by": tuple(token),
        "quieter by": tuple(a / b for a, b in zip(plain, rested, strict=True)),
    }
    lines = ["length of out when no key matches"]
    for n, a, b, s in zip(LENGTHS, plain, rested, share, strict=True):
        lines.append(f"{number(n):>6} keys  no sink {bar(a, 36, plain[0])} {number(a)}")
        lines.append(f"{'':>6}       sink {number(s):<6.5} {bar(b, 32, plain[0])} {number(b)}")
    quieter = min(a / b for a, b in zip(plain, rested, strict=True))
    verdict = prose(f"""
        A head that finds nothing must still spend a weight of 1, and out is a mean of whatever is there: of length
        {number(plain[0])} among {LENGTHS[0]} keys, noise that the next layer has to bear. A sink, a score with no
        value ({number(LEAD)} above the log of the number of keys), takes {number(share[0])} of the weight and leaves
        {number(rested[0])}. A first token with that score and value 0 does the same (differs by
        {number(max(token))}): every query can see it, so models learn to use it. A window that drops it brings the
        noise back, {number(quieter)} times as loud here: keep it (prefix(1) | sliding_window(n)) or give heads a
        learned sink (sinks=). So much weight is a way to say nothing, not importance (qkv why explanation).
        """)
    short = "Weights must sum to 1: a head that finds nothing parks them where no value is."
    if quieter < 2:
        short = f"A sink made the output only {number(quieter)} times quieter here: little to explain."
    return Answer("sink", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def on(given: Given) -> Answer:
    """The share of the caller's weight that lies on the first key, by head, and what that key brings."""
    rows, shares, brought, fair = [["head", "on key 0", "equal would be", "of what out is made of"]], [], [], []
    for head, p in given.each():
        alive = p[(p > 0).sum(-1) > 1]
        if not len(alive):
            alive = p
        shares.append(alive[:, 0].mean().item())
        fair.append((1 / (alive > 0).sum(-1).clamp_min(1).double()).mean().item())
        if given.v is not None:
            size = given.values(head).norm(dim=-1)
            carried = alive * size
            brought.append((carried[:, 0].sum() / carried.sum().clamp_min(1e-300)).item())
        cells = [str(head), number(shares[-1]), number(fair[-1]), number(brought[-1]) if brought else "pass v="]
        if len(rows) <= 12:
            rows.append(cells)
    staring = sum(s > MANY for s in shares)
    numbers: dict[str, Measured] = {"weight on key 0": tuple(shares), "equal weights": tuple(fair)}
    if brought:
        numbers["share of weight × |v| on key 0"] = tuple(brought)
    numbers["heads with more than 0.3 on key 0"] = float(staring)
    mean = sum(shares) / len(shares)
    carried_text = ""
    if brought:
        part = sum(brought) / len(brought)
        carried_text = f"Of what out is made of, weight × |v|, it brings {number(part)}: "
        carried_text += "far less than its weight, a sink." if part < 0.5 * mean else "no less than half its weight."
    verdict = prose(f"""
        Key 0 holds {number(mean)} of the weight on average (rows that see one key left out), where equal weights would
        give {number(sum(fair) / len(fair))}; {staring} of {len(shares)} heads put more than {MANY} there.
        {carried_text} A sink is usual in trained models; a window or a cache that drops key 0 then changes outputs.
        """)
    short = f"{staring} of {len(shares)} heads put more than {MANY} of their weight on the first key."
    return Answer("sink", QUESTION, numbers, table(rows, "<>>>"), verdict, SOURCES, short=short)
