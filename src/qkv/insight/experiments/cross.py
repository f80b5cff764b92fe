"""Cross-attention: which sequence decides what, and what is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose
from qkv.insight.terminal import number, table

WRITES, READS, WIDTH, HEAD, VALUE = 3, 5, 12, 8, 4  # the decoder's tokens, the encoder's, and the sizes
QUESTION = "Cross-attention: whose is the output, and whose are the keys?"
SOURCES = ("Vaswani et al. 2017, section 3.2.3, arxiv.org/abs/1706.03762",)


def run(seed: int) -> Answer:
    """Let three tokens read five, write token by token with the source's keys kept, and change one token of each."""
    rng = torch.Generator().manual_seed(seed)
    x, source = (torch.randn(n, WIDTH, generator=rng, dtype=torch.float64) for n in (WRITES, READS))
    made = [torch.randn(WIDTH, n, generator=rng, dtype=torch.float64) / WIDTH**0.5 for n in (HEAD, HEAD, VALUE)]

    def attend(asks: Tensor, read: Tensor) -> Tensor:
        q, k, v = asks @ made[0], read @ made[1], read @ made[2]
        return attention(q[None, None], k[None, None], v[None, None])[0, 0]

    itself, cross, swapped = attend(x, x), attend(x, source), attend(source, x)
    k, v = (source @ w for w in made[1:])  # once for the whole sentence
    steps = [attention((x[i : i + 1] @ made[0])[None, None], k[None, None], v[None, None])[0, 0] for i in range(WRITES)]
    asked, read = x.clone(), source.clone()
    asked[1] += 1
    read[1] += 1
    moved_q = (attend(asked, source) - cross).norm(dim=-1)
    moved_k = (attend(x, read) - cross).norm(dim=-1)
    numbers: dict[str, Measured] = {
        "self: rows of q, of k, of out": (WRITES, WRITES, itself.shape[0]),
        "cross: rows of q, of k, of out": (WRITES, READS, cross.shape[0]),
        "swapped: rows of q, of k, of out": (READS, WRITES, swapped.shape[0]),
        "columns of out": cross.shape[1],
        "step by step with k and v kept: out differs by": (torch.cat(steps) - cross).abs().max().item(),
        "rows of k and v computed, kept": READS,
        "rows of k and v computed, anew each step": READS * WRITES,
        "rows of out that one other query moves": int((moved_q > 1e-12).sum()),
        "rows of out that one other source token moves": int((moved_k > 1e-12).sum()),
        "each row of out moves with another query by": tuple(moved_q.tolist()),
        "each row of out moves with another source token by": tuple(moved_k.tolist()),
    }
    cases = (("self", WRITES, WRITES, itself), ("cross", WRITES, READS, cross), ("swapped", READS, WRITES, swapped))
    rows = [["", "q", "k", "scores", "v", "out"]]
    rows += [
        [name, f"[{a}, {HEAD}]", f"[{b}, {HEAD}]", f"[{a}, {b}]", f"[{b}, {VALUE}]", str(list(out.shape))]
        for name, a, b, out in cases
    ]
    as_told = all(out.shape[0] == a for _, a, _, out in cases)
    short = "Q's sequence, the one being written, gives out its length; K and V are read."
    if not as_told:
        short = "The output does not have the length of Q's sequence here: see the shapes."
    return Answer("cross", QUESTION, numbers, table(rows), _verdict(numbers), SOURCES, short=short)


def _verdict(numbers: dict[str, Measured]) -> str:
    apart = one(numbers["step by step with k and v kept: out differs by"])
    by_q, by_k = (numbers[f"rows of out that one other {what} moves"] for what in ("query", "source token"))
    return prose(f"""
        {WRITES} tokens read {READS}: a score for each pair, {WRITES} × {READS}, each of the {WRITES} rows summing to 1.
        Another query moves {by_q} row of out, another source token {by_k} of {WRITES}.
        The source does not change while the text is written, so its keys and values are computed once:
        {READS} rows instead of {READS * WRITES} in {WRITES} steps, and out differs by {number(apart)}.
        The widths of q and k agree ({HEAD}); that of v ({VALUE}) is out's.
        No causal mask belongs here: the whole source exists before the first word is written.
        """)
