"""Inputs for calls that are written out in a test, sharp ones, and one call that takes every gradient.

Logits have a standard deviation of 4 and more, and needles are planted: kernels that return mean(V) pass tests with
flat softmaxes.
"""

from __future__ import annotations

import torch

import qkv

BACKENDS = ("reference", "tiled")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(B=1, Hq=2, Hkv=2, Lq=7, Lk=9, D=8, Dv=8, dtype=torch.float32, seed=0, grad=False):
    """q and k whose logits have std 4, values with distinct rows, and needles: some queries match one edge key."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, L, D, generator=gen, dtype=torch.float64) * 2 for H, L in ((Hq, Lq), (Hkv, Lk)))
    v = torch.randn(B, Hkv, Lk, Dv, generator=gen, dtype=torch.float64) + torch.arange(Lk)[:, None] / max(Lk, 1)
    for i, j in enumerate((0, Lk - 1, Lk // 2)):
        if 0 <= j < Lk and i < Lq and Hkv:
            q[:, :, i] = k[:, :, j].repeat_interleave(Hq // Hkv, 1) * 3
    return tuple(x.to(dtype).requires_grad_(grad) for x in (q, k, v))


def run(backend, q, k, v, *, with_grad=True, bias=None, sinks=None, **kwargs):
    """out, lse and the gradients of everything that requires one; out gradients are random, never a sum()."""
    out, lse = qkv.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend=backend, **kwargs)
    gen = torch.Generator().manual_seed(99)
    d_out, d_lse = (torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    if with_grad:
        live = torch.isfinite(lse)
        torch.autograd.backward([out, lse], [d_out, torch.where(live, d_lse, 0.0)])
    return out, lse, d_out, d_lse
