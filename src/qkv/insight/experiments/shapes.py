"""One small sentence walked from x to the output: every matrix, small enough to check by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.terminal import number
from qkv.probabilities import weights

WORDS = ("cats", "eat", "mice")
WIDTH, HEADS, HEAD = 4, 2, 2
QUESTION = "Which shapes lead from a sentence to the output?"
SOURCES = ("Vaswani et al. 2017, section 3.2.2, arxiv.org/abs/1706.03762",)


def run(seed: int) -> Answer:
    """Walk three words through a layer of two heads, with whole numbers up to the scores."""
    rng = torch.Generator().manual_seed(seed)

    def whole(rows: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (rows, WIDTH), generator=rng).double()

    x, w_q, w_k, w_v, w_o = whole(len(WORDS), -2, 2), *(whole(WIDTH, -1, 1) for _ in range(4))
    q, k, v = (x @ w for w in (w_q, w_k, w_v))  # (L, h d)
    split = [y.view(1, len(WORDS), HEADS, HEAD).transpose(1, 2) for y in (q, k, v)]  # (1, h, L, d)
    scores = split[0] @ split[1].mT  # (1, h, L, L)
    p = weights(split[0], split[1])
    out = attention(*split)  # (1, h, L, d)
    joined = out.transpose(1, 2).flatten(2)[0]  # (L, h d)
    y = joined @ w_o
    by_hand = torch.softmax(scores / HEAD**0.5, -1) @ split[2]
    numbers: dict[str, Measured] = {
        "x (L, dim)": tuple(x.shape),
        "W_Q, W_K, W_V, W_O (dim, dim)": tuple(w_q.shape),
        "Q, K, V (L, h d)": tuple(q.shape),
        "split in heads (B, h, L, d)": tuple(split[0].shape),
        "scores and weights (B, h, L, L)": tuple(scores.shape),
        "heads' outputs (B, h, L, d)": tuple(out.shape),
        "joined (L, h d)": tuple(joined.shape),
        "output (L, dim)": tuple(y.shape),
        "rows of the weights sum to": tuple(p.sum(-1).flatten().tolist()),
        "qkv.attention differs from softmax(q kᵀ / √d) v by": (out - by_hand).abs().max().item(),
    }
    numbers |= {f"output, {word}": tuple(row) for word, row in zip(WORDS, y.tolist(), strict=True)}
    words = list(WORDS)
    lines = _blocks([("W_Q", w_q), ("W_K", w_k), ("W_V", w_v), ("W_O", w_o)], [""] * WIDTH)
    lines += _blocks([("x", x), ("Q = x W_Q", q), ("K = x W_K", k), ("V = x W_V", v)], words)
    heads = [(f"q kᵀ, head {h}", scores[0, h]) for h in range(HEADS)]
    heads += [(f"softmax, head {h}", p[0, h]) for h in range(HEADS)]
    lines += _blocks(heads, words)
    lines += _blocks([(f"p v, head {h}", out[0, h]) for h in range(HEADS)] + [("joined", joined), ("× W_O", y)], words)
    apart, sums = (out - by_hand).abs().max().item(), p.sum(-1)
    right = apart < 1e-9 and y.shape == x.shape
    verdict = prose(f"""
        {len(WORDS)} words of {WIDTH} numbers; W_Q, W_K and W_V make queries, keys and values of them. Head 0 takes the
        first {HEAD} columns of each, head 1 the last: a view, nothing is computed. Each head scores every query against
        every key, {len(WORDS)} × {len(WORDS)}, divides by √{HEAD}, and each row of its softmax sums to 1 (to
        {number((sums - 1).abs().max().item())}). Rows of weights times values give {len(WORDS)} × {HEAD} a head; side
        by side again, W_O mixes the heads, and out has x's shape. qkv.attention: the same to {number(apart)}.
        """)
    short = "x → Q K V → heads → scores L × L → softmax, a row → p v → join → W_O: x's shape"
    if not right:
        short = "The walk below and qkv.attention do not agree, which must not happen."
    return Answer("shapes", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _blocks(blocks: list[tuple[str, Tensor]], names: list[str]) -> list[str]:
    """Matrices side by side, a word before each row; the wider, the fewer columns there are."""
    each = 4 if sum(matrix.shape[1] for _, matrix in blocks) > 12 else 5
    widths = [max(each * matrix.shape[1], len(title)) + 2 for title, matrix in blocks]
    titles = "".join(f"{title:<{wide}}" for (title, _), wide in zip(blocks, widths, strict=True))
    lines = [f"      {titles}".rstrip()]
    for i, name in enumerate(names):
        cells = ["".join(f"{_short(n):>{each}}" for n in matrix[i].tolist()) for _, matrix in blocks]
        line = "".join(f"{cell:<{wide}}" for cell, wide in zip(cells, widths, strict=True))
        lines.append(f"{name:<5}{line}".rstrip())
    return lines


def _short(value: float) -> str:
    """A number in at most four letters: whole ones plainly, the rest to a digit or two."""
    if abs(value - round(value)) < 1e-9:
        return str(round(value))
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.1f}"
