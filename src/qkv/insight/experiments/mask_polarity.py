"""What True in a mask means: to qkv and PyTorch's function it keeps, to PyTorch's module it drops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkv.functional import attention
from qkv.insight.answer import Answer, Measured, one, prose
from qkv.insight.terminal import number

TOKENS, HEAD = 5, 8
QUESTION = "In a mask of attention, does True keep or drop?"
SOURCES = ("docs.pytorch.org, attn_mask; a reversed mask: github.com/pytorch/pytorch/issues/27968",)


def run(seed: int) -> Answer:
    """Give one mask, a causal one, to three functions, and to the module's both ways round."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, TOKENS, HEAD, generator=rng, dtype=torch.float64)
    keep = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    ours = attention(x, x, x, mask=keep)
    found = {
        "scaled_dot_product_attention(attn_mask=m)": functional.scaled_dot_product_attention(x, x, x, attn_mask=keep),
        "nn.MultiheadAttention(attn_mask=m)": _module(x, keep),
        "nn.MultiheadAttention(attn_mask=~m)": _module(x, ~keep),
    }
    watched = _module(x, keep, need_weights=True)
    numbers: dict[str, Measured] = {}
    for name, out in found.items():
        same = (out - ours)[torch.isfinite(out)]
        numbers[f"{name} differs from qkv by"] = same.abs().max().item()
    numbers["nn.MultiheadAttention(attn_mask=m): tokens that are NaN"] = _nan(
        found["nn.MultiheadAttention(attn_mask=m)"]
    )
    numbers["the same with need_weights=True"] = _nan(watched)
    apart = [one(numbers[f"{name} differs from qkv by"]) for name in found]
    dead = [
        numbers["nn.MultiheadAttention(attn_mask=m): tokens that are NaN"],
        numbers["the same with need_weights=True"],
    ]
    rows = [" ".join("■" if seen else "·" for seen in row) for row in keep.tolist()]
    other = [" ".join("·" if seen else "■" for seen in row) for row in keep.tolist()]
    lines = [f"{'m = tril, True keeps':<28}the same m, True drops"]
    lines += [f"  {a:<26}  {b}" for a, b in zip(rows, other, strict=True)]
    lines += [""] + [f"{name:<44} differs from qkv by {number(a)}" for name, a in zip(found, apart, strict=True)]
    as_told = apart[0] < 1e-9 < 1e-3 < apart[1] and apart[2] < 1e-9
    inverted = "the opposite: True drops there" if as_told else "not what it is told to be: see the three lines"
    verdict = prose(f"""
        True keeps in qkv.attention and in scaled_dot_product_attention (they differ by {number(apart[0])}).
        nn.MultiheadAttention reads the same tensor as {inverted}
        (differs by {number(apart[1])}; inverted first, by {number(apart[2])}).
        Nothing raises, the shapes agree: each token then sees only what comes after it, and the last sees nothing: the
        module gives {dead[0]} NaN token{"s" if dead[0] != 1 else ""}, and {dead[1]} where its weights are asked for.
        Its key_padding_mask drops on True as well. In words, qkv's way: m[i, j] is True where query i may look at key
        j. A float mask has no such doubt: it is added, 0 keeps and -inf drops.
        """)
    short = "In qkv and in PyTorch's function True keeps; in nn.MultiheadAttention it drops."
    if not as_told:
        short = "The conventions measured here are not those that are told: see the three lines."
    return Answer("mask-polarity", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _nan(out: Tensor) -> int:
    return int((~torch.isfinite(out)).any(-1).sum())


def _module(x: Tensor, mask: Tensor, need_weights: bool = False) -> Tensor:
    """nn.MultiheadAttention of one head whose projections change nothing; the function, since making one is random."""
    one = torch.eye(HEAD, dtype=x.dtype)
    tokens = x[0, 0, :, None]  # (L, B, E)
    zero = torch.zeros(3 * HEAD, dtype=x.dtype)
    parts = (one.repeat(3, 1), zero, None, None, False, 0.0, one, zero[:HEAD])
    with torch.no_grad():
        out = functional.multi_head_attention_forward(
            tokens, tokens, tokens, HEAD, 1, *parts, training=False, need_weights=need_weights, attn_mask=mask
        )[0]
    return out[:, 0][None, None]
