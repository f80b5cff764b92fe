"""Multi-head, grouped-query and multi-query attention: head counts decide, and so does the size of the cache."""

from __future__ import annotations

import torch

import qkv

torch.manual_seed(0)
q = torch.randn(1, 32, 1, 128)  # one new token, 32 heads
for name, kv_heads in (("multi-head", 32), ("grouped-query", 8), ("multi-query", 1)):
    k, v = torch.randn(1, kv_heads, 512, 128), torch.randn(1, kv_heads, 512, 128)  # the cache of 512 tokens
    out = qkv.attention(q, k, v)  # query head h reads key/value head h // (32 / kv_heads)
    every = k.repeat_interleave(32 // kv_heads, 1), v.repeat_interleave(32 // kv_heads, 1)
    torch.testing.assert_close(out, qkv.attention(q, *every))
    print(f"{name:<14} {kv_heads:>2} key/value heads, {2 * kv_heads * 128 * 2:>6,} bytes a token in bfloat16")
