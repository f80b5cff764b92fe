"""Why a long input blurs the lookup: the lead that one key needs grows with the log of the others."""

from __future__ import annotations

import math

import torch

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number, table
from qkv.probabilities import weights

LENGTHS = (16, 256, 4096, 100_000, 1_000_000)
GAPS = (5.0, 10.0)
MOST_VARIED = 100_000  # keys that are drawn at random
QUESTION = "Why does a long input blur the lookup?"
SOURCES = ("Velickovic et al. 2024, softmax is not enough, arxiv.org/abs/2410.01104",)


def run(seed: int) -> Answer:
    """One right key, g above all others, among ever more of them; then with others that vary."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[float, list[float]] = {gap: [] for gap in GAPS}
    noisy: list[float] = []
    for n in LENGTHS:
        k = torch.zeros(1, 1, n, 1, dtype=torch.float32)
        k[0, 0, 0] = 1
        q = torch.tensor(GAPS, dtype=torch.float32).view(1, 1, -1, 1)
        for gap, weight in zip(GAPS, weights(q, k, scale=1.0)[0, 0, :, 0].tolist(), strict=True):
            found[gap].append(weight)
        if n <= MOST_VARIED:
            k.normal_(generator=rng)
            k[0, 0, 0] = GAPS[-1]
            noisy.append(weights(torch.ones(1, 1, 1, 1, dtype=torch.float32), k, scale=1.0)[0, 0, 0, 0].item())
    needed = [math.log(9 * (n - 1)) for n in LENGTHS]
    numbers: dict[str, Measured] = {"keys": LENGTHS}
    numbers |= {f"weight, {number(gap)} above": tuple(found[gap]) for gap in GAPS}
    numbers["10 above others of variance 1, up to 100,000"] = tuple(noisy)
    numbers["score above, for a weight of 0.9"] = tuple(needed)
    top = found[GAPS[-1]]
    lines = [f"{'keys':>9}  {'weight of the one right key, 10 above the rest':<42}  needed for 0.9"]
    lines += [
        f"{number(n):>9}  {bar(w, 32)} {number(w):<9}  {number(g):>6}"
        for n, w, g in zip(LENGTHS, top, needed, strict=True)
    ]
    verdict = prose(f"""
        A key that is g above n - 1 others has weight e^g / (e^g + n - 1). Ten above, it is found among
        {LENGTHS[0]} ({number(top[0])}) and lost among a million ({number(top[-1])}); five above it has
        {number(found[5.0][2])} among {number(LENGTHS[2])}. Others that vary by 1 are a crowd e^½ times as large:
        {number(noisy[2])} instead of {number(top[2])}. Nobody took a decision: the denominator grew.
        For a weight of 0.9 it has to stand ln(9 (n - 1)) above: {number(needed[0])} to {number(needed[-1])}, so
        doubling the text costs 0.69 of score. Cures: sharper scores for longer texts (YaRN, a scale that grows with
        ln n), masks that show fewer keys (qkv why sparse), training on long texts.
        """)
    blurs = top[0] > 0.9 and top[-1] < 0.1
    short = f"A key 10 above the rest has weight {number(top[0])} among 16, {number(top[-1])} among a million."
    if not blurs:
        short = f"It did not blur here: {number(top[0])} among 16, {number(top[-1])} among a million."
    return Answer("long-context", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def on(given: Given) -> Answer:
    """How far ahead the best key of the caller's rows is, and what would be left of it among more keys."""
    series: dict[str, list[float]] = {"best weight": [], "with 10 × the others": [], "with 100 × the others": []}
    spread, heads = [], list(given.heads)
    for _, p in given.each():
        alive = p[(p.sum(-1) > 0) & ((p > 0).sum(-1) > 1)]  # rows with something to choose
        best = alive.max(-1).values
        odds = best / (alive.sum(-1) - best).clamp_min(1e-30)
        for (_, values), factor in zip(series.items(), (1, 10, 100), strict=True):
            values.append((odds / (odds + factor)).mean().item() if len(best) else 0.0)
        spread.append(torch.special.entr(alive).sum(-1).exp().mean().item() if len(best) else 0.0)
    numbers: dict[str, Measured] = {"effective tokens": tuple(spread)}
    numbers |= {name: tuple(values) for name, values in series.items()}
    cells = [["head", "effective tokens", *series]]
    for i, head in enumerate(heads[:12]):
        cells.append([str(head), number(spread[i]), *(number(values[i]) for values in series.values())])
    mean = [sum(values) / len(values) for values in series.values()]
    verdict = prose(f"""
        The largest weight of your rows is {number(mean[0])} on average (rows that see one key left out). Ten times as
        many other keys like those would leave {number(mean[1])}, a hundred times {number(mean[2])}.
        The weights spread over {number(min(spread))} to {number(max(spread))} effective tokens, by
        head{" (12 of them are drawn)" if len(heads) > 12 else ""}.
        """)
    short = f"Your best keys hold {number(mean[0])}; among ten times the keys it would be {number(mean[1])}."
    return Answer("long-context", QUESTION, numbers, table(cells, "<>>>>"), verdict, SOURCES, short=short)
