"""Dropout: one mask whatever the tiling, the stated share, and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import qkv
from qkv.backends import registry
from qkv.call.problem import Inputs, Output
from tests.kit import backends
from tests.kit.sharp import BACKENDS, inputs


def test_dropout_is_one_mask_for_every_tiling() -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=150, Lk=300, grad=True)
    results = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        out, lse = qkv.attention(q, k, v, dropout_p=0.4, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), torch.cos(out.detach() * 9))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)
    chosen = qkv.plan(q, k, v, dropout_p=0.4).backend
    torch.manual_seed(7)
    again = qkv.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(7)
    assert torch.equal(again, qkv.attention(q, k, v, dropout_p=0.4, backend=chosen))
    assert not torch.equal(again, qkv.attention(q, k, v, dropout_p=0.4))
    assert torch.allclose(results[0][1], qkv.attention(q, k, v, return_lse=True)[1], atol=1e-5)


@pytest.mark.parametrize("backend", backends.promising())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 83), (3, 530), (70, 131)])
def test_every_backend_drops_the_weights_that_the_hash_names(
    backend: str, dtype: torch.dtype, Lq: int, Lk: int
) -> None:
    """Values are unit vectors: out holds every weight. Negative seeds are seeds; batch rows and heads differ."""
    from qkv.numerics import dropout_keep

    B, Hq, Hkv, p, seed = 2, 4, 2, 0.3, -12345
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(B, H, L, 16, generator=generator).to(dtype) for H, L in ((Hq, Lq), (Hkv, Lk)))
    v = torch.eye(Lk, dtype=dtype).expand(B, Hkv, Lk, Lk)
    problem = replace(qkv.plan(q, k, v, dropout_p=p).problem, needs_lse=True)
    native, given = registry.load(backend), Inputs(q, k, v, seed=seed)
    found = Output(*native.prepare(problem, given).run(*given))
    plain = Output(*native.prepare(replace(problem, dropout_p=0.0), given).run(q, k, v))
    at = torch.meshgrid(*(torch.arange(n) for n in (B, Hq, Lq, Lk)), indexing="ij")
    keep = dropout_keep(seed, p, *at)
    assert torch.equal(found.lse, plain.lse)
    assert torch.equal(found.out == 0, ~keep | (plain.out == 0))
    want, eps = plain.out.double() / (1 - p), torch.finfo(dtype).eps
    assert ((found.out.double() - want).abs()[keep] <= 2 * eps * want[keep] + torch.finfo(dtype).tiny).all()


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
