"""Dropout: one mask whatever the tiling, the stated share, and its gradient."""

from __future__ import annotations

import math

import torch

import qkv
from tests.rowwise import BACKENDS, inputs


def test_dropout_is_one_mask_for_every_tiling() -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=150, Lk=300, grad=True)
    results = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        out, lse = qkv.attention(q, k, v, dropout_p=0.4, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), torch.cos(out.detach() * 9))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)
    torch.manual_seed(7)
    assert torch.equal(qkv.attention(q, k, v, dropout_p=0.4), results[1][0])
    assert not torch.equal(qkv.attention(q, k, v, dropout_p=0.4), results[1][0])
    assert torch.allclose(results[0][1], qkv.attention(q, k, v, return_lse=True)[1], atol=1e-5)


def test_dropout_keeps_the_stated_share() -> None:
    from qkv.numerics import dropout_keep

    n = 1000
    i = torch.arange(n)
    for p in (0.1, 0.5, 0.9):
        kept = dropout_keep(123, p, *(torch.tensor(x) for x in (0, 0)), i[:, None], i)
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n**2)
        other = dropout_keep(124, p, torch.tensor(0), torch.tensor(0), i[:, None], i)
        assert abs((kept == other).double().mean() - (p * p + (1 - p) ** 2)) < 0.01


def test_dropout_gradient_agrees_with_autograd() -> None:
    q, k, v = inputs(Lq=3, Lk=4, D=3, Dv=2, dtype=torch.float64, grad=True)

    def call(q, k, v):
        torch.manual_seed(3)
        return qkv.attention(q, k, v, dropout_p=0.3, backend="tiled")

    assert torch.autograd.gradcheck(call, (q, k, v))
