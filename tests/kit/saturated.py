"""What holds of gradients at scores of any size and any rounding: a row's weights add up to 1.

The sum of dV over the keys is then the sum of dout over the rows, though no score is exact and the error rule, which
grows with the scores, forgives anything. It takes a backward pass that finds the forward pass's scores again, to the
bit.
"""

from __future__ import annotations

import torch

import qkv

SIZES = ((2, 40, 16), (3, 600, 300), (70, 90, 64), (50, 333, 130), (60, 70, 300))  # Lq, Lk, D
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fault(backend: str, scale: float = 1e5) -> str:
    """Where weights of the backward pass do not add up to 1, or ""."""
    for Lq, Lk, D in SIZES:
        for dtype in DTYPES:
            gen = torch.Generator().manual_seed(Lq + D)
            q, k, v, towards = (
                torch.randn(1, H, L, n, generator=gen).to(dtype)
                for H, L, n in ((2, Lq, D), (1, Lk, D), (1, Lk, 8), (2, Lq, 8))
            )
            v.requires_grad_()
            out = qkv.attention(q.requires_grad_(), k, v, scale=scale, backend=backend)
            dv, dq = torch.autograd.grad(out, (v, q), towards)
            found, want = dv.double().sum((0, 1, 2)), towards.double().sum((0, 1, 2))
            size = dv.double().abs().sum((0, 1, 2)) + towards.double().abs().sum((0, 1, 2))
            off = float(((found - want).abs() / size).max())
            if not off <= 2 * torch.finfo(dtype).eps or not dq.isfinite().all():
                return f"Lq={Lq} Lk={Lk} D={D} {dtype}: weights of the backward pass are off by {off:.1e} of 1"
    return ""
