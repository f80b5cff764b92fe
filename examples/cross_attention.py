"""Cross-attention: queries come from one sequence, keys and values from another, such as a text and its translation."""

from __future__ import annotations

import torch

import qkv

torch.manual_seed(0)
target, source = torch.randn(2, 5, 64), torch.randn(2, 9, 64)  # (B, Lq, width), (B, Lk, width)
w_q, w_k, w_v = (torch.randn(64, 64) / 8 for _ in range(3))


def heads(t: torch.Tensor) -> torch.Tensor:
    """(B, L, 4 * 16) -> (B, 4, L, 16)."""
    return t.unflatten(-1, (4, 16)).transpose(1, 2)


mask = qkv.padding([9, 6])  # the second source has six real tokens; padding hides keys and needs no positions
q, k, v = heads(target @ w_q), heads(source @ w_k), heads(source @ w_v)
out = qkv.attention(q, k, v, mask=mask)
print("target", tuple(q.shape), "reads source", tuple(k.shape), "→", tuple(out.shape))
print("weights of the second text's first word:", qkv.weights(q, k, rows=slice(0, 1), mask=mask)[1, 0, 0])
