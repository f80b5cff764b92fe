"""What comes out of a row that sees no key: of -inf, of -1e9, and of a rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, bars, one, prose
from qkv.insight.given import Given
from qkv.insight.terminal import number, table
from qkv.probabilities import weights

TOKENS, HEAD, DEAD = 5, 8, 2  # the row that sees nothing
QUESTION = "What comes out of a row that sees no key?"
SOURCES = ("github.com/pytorch/pytorch/issues/41508 (NaN); The Annotated Transformer (-1e9)",)


def run(seed: int) -> Answer:
    """Hide every key from one row of five, and fill its scores with -inf, with -1e9, or leave it to qkv."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, TOKENS, HEAD, generator=rng, dtype=torch.float32)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    seen[DEAD] = False
    rows: dict[str, Tensor] = {}
    poisoned: dict[str, int] = {}
    for name, fill, dtype in (
        ("-inf", -math.inf, torch.float32),
        ("-1e9, float32", -1e9, torch.float32),
        ("-1e9, float64", -1e9, torch.float64),
    ):
        a, b, c = (x.to(dtype).requires_grad_() for x in (q, k, v))
        scores = a @ b.mT / HEAD**0.5
        # added, as the mask of many programs is: a number so large that the scores' own digits are lost
        p = torch.softmax(torch.where(seen, scores, scores + fill), -1)
        rows[name] = p[DEAD].detach()
        poisoned[name] = int((~torch.isfinite(torch.autograd.grad((p @ c).sum(), b)[0])).sum())
    given = [x[None, None].clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(given[0], given[1], given[2], mask=seen, return_lse=True)
    rows["qkv"] = weights(given[0], given[1], mask=seen)[0, 0, DEAD].detach()
    poisoned["qkv"] = int((~torch.isfinite(torch.autograd.grad(out.sum(), given[1])[0])).sum())
    whole = torch.softmax(q[DEAD] @ k.mT / HEAD**0.5, -1)
    even = (rows["-1e9, float32"].max() - rows["-1e9, float32"].min()).item()
    lost = (rows["-1e9, float64"] - whole).abs().max().item()
    numbers: dict[str, Measured] = {
        "NaN among the 5 weights, -inf": int(rows["-inf"].isnan().sum()),
        "weights of forbidden keys, -1e9, float32": tuple(rows["-1e9, float32"].tolist()),
        "weights of forbidden keys, -1e9, float64": tuple(rows["-1e9, float64"].tolist()),
        "weights of forbidden keys, qkv": tuple(rows["qkv"].tolist()),
        "-1e9 in float64 differs from no mask at all by": lost,
        "largest number in out, qkv": out[0, 0, DEAD].abs().max().item(),
        "lse, qkv": lse[0, 0, DEAD].item(),
    }
    numbers |= {f"NaN in the gradient of all keys ({TOKENS * HEAD}), {name}": n for name, n in poisoned.items()}
    cells = [["fill with", "weights of the five forbidden keys", "", "", "", "", "NaN in k's gradient"]]
    cells += [
        [name, *(number(w) for w in row.tolist()), f"{poisoned[name]} of {TOKENS * HEAD}"] for name, row in rows.items()
    ]
    cells[0][1:6] = ["key 0", "key 1", "key 2", "key 3", "key 4"]
    clean = poisoned["qkv"] == 0 and numbers["largest number in out, qkv"] == 0
    verdict = prose(f"""
        e^-inf / 0: a softmax over nothing is {"NaN" if rows["-inf"].isnan().all() else "a number here"}, and its
        gradient poisons every key, {poisoned["-inf"]} of {TOKENS * HEAD} numbers, though one row was dead.
        With -1e9 nothing is NaN and something is worse: the row attends to what was forbidden, in float32
        {"evenly, its scores drown in -1e9" if even < 1e-3 else "unevenly"}, and in float64 as if there were no mask
        (differs by {number(lost)}). Rows of padding are like that. By rule, in qkv on every backend: weights 0, out
        {number(one(numbers["largest number in out, qkv"]))}, lse {number(lse[0, 0, DEAD].item())}, gradient
        {"0" if clean else "not clean here"}, and merging it with other parts of a row is exact.
        """)
    short = "By rule 0; a softmax of -inf gives NaN, and -1e9 attends to what it hides."
    if not clean:
        short = "It should be 0 and clean; here it was not: see the numbers."
    return Answer("dead-rows", QUESTION, numbers, table(cells, "<>>>>>>"), verdict, SOURCES, short=short)


def on(given: Given) -> Answer:
    """Count the caller's rows that see no key, and what a plain softmax would make of them."""
    dead, nan = {}, 0
    for head, p in given.each():
        dead[head] = p.sum(-1) == 0
        nan += int(p.isnan().any(-1).sum())
    total, looked = sum(int(x.sum()) for x in dead.values()), sum(len(x) for x in dead.values())
    worst = max(dead, key=lambda head: int(dead[head].sum()))
    numbers: dict[str, Measured] = {
        "rows that see no key": float(total),
        "rows looked at": float(looked),
        "rows that are NaN": float(nan),
        "heads with such rows": float(sum(bool(x.any()) for x in dead.values())),
    }
    first = [int(given.rows[i]) for i in dead[worst].nonzero().flatten().tolist()[:8]]
    text = f"{total:,} of {looked:,} rows see no key"
    picture = bars({"rows that see no key": float(total), "rows that see some": float(looked - total)}, 30, looked)
    picture += f"\nof head {worst}, rows {', '.join(map(str, first))} are the first" if first else ""
    verdict = prose(f"""
        {text} ({nan:,} rows are NaN for another reason: their inputs are).
        qkv gives such rows 0, with lse -inf and gradient 0. A plain softmax of -inf would make them NaN, and through
        the gradient every key; -1e9 would let them read the values that the mask hides.
        {"Rows of padding are expected to be dead; any other is a mistake of the mask." if total else ""}
        """)
    return Answer("dead-rows", QUESTION, numbers, picture, verdict, SOURCES, short=text[0].upper() + text[1:] + ".")
