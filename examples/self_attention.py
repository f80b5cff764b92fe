"""Self-attention: each token of a sequence looks things up in the same sequence."""

from __future__ import annotations

import torch

import qkv

torch.manual_seed(0)
tokens, width, heads = 12, 64, 4
x = torch.randn(1, tokens, width)
w_q, w_k, w_v, w_o = (torch.randn(width, width) / width**0.5 for _ in range(4))


def split(t: torch.Tensor) -> torch.Tensor:
    """(B, L, heads * D) -> (B, heads, L, D): split, then change the order; a bare reshape would mix tokens."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


q, k, v = split(x @ w_q), split(x @ w_k), split(x @ w_v)
out = qkv.attention(q, k, v, mask=qkv.causal())
y = out.transpose(1, 2).flatten(2) @ w_o
print("x", tuple(x.shape), "→ q", tuple(q.shape), "→ out", tuple(out.shape), "→ y", tuple(y.shape))
print(qkv.plan(q, k, v, mask=qkv.causal()))
