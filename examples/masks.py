"""Masks as values: compose them, draw them, and use one mask for a whole prompt and for its pieces."""

from __future__ import annotations

import torch

import qkv

mask = qkv.documents([5, 7]) & qkv.causal() & (qkv.prefix(1) | qkv.sliding_window(4))
print(mask, mask.picture(12, 12), sep="\n")

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
whole = qkv.attention(q, k, v, mask=mask)
pieces = [qkv.attention(q[:, :, i : i + 4], k, v, mask=mask, positions=i) for i in range(0, 12, 4)]
torch.testing.assert_close(torch.cat(pieces, 2), whole)

out, lse = qkv.attention(q, k[:, :, :6], v[:, :, :6], return_lse=True)  # two sets of keys, merged exactly
rest, rest_lse = qkv.attention(q, k[:, :, 6:], v[:, :, 6:], return_lse=True)
torch.testing.assert_close(qkv.merge(out, lse, rest, rest_lse)[0], qkv.attention(q, k, v))
print("four queries at a time, and keys in two halves: the same result")
