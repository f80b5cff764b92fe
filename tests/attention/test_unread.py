"""Masked means unread: hidden bytes change no bit, and what is visible spreads as the definition says."""

from __future__ import annotations

import pytest
import torch

import qkv
from tests.kit.sharp import BACKENDS, inputs
from tests.kit.truth import Truth


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_bytes_change_no_bit(backend: str, dtype: torch.dtype, poison: float) -> None:
    """Keys hidden from all rows, or from some: rows that do not see them keep their bits, gradients too."""
    q, k, v = inputs(B=2, Hq=4, Lq=150, Lk=300, dtype=dtype)
    seen = torch.rand(150, 300, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[:, 17] = seen[:, 299] = False
    seen[5] = False
    some = torch.arange(150) % 3 == 0  # the rows that see key 40, which is poisoned as well
    seen[:, 40] = some
    dirty_k, dirty_v = k.clone(), v.clone()
    for j in (17, 299, 40):
        dirty_k[:, :, j], dirty_v[:, :, j] = poison, poison
    results = []
    for kk, vv in ((k, v), (dirty_k, dirty_v)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, kk, vv)]
        out, lse = qkv.attention(*leaves, mask=seen, return_lse=True, backend=backend)
        # Rows that see the poison take no part in the loss.
        d_out = torch.where(some[:, None], 0.0, torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).to(
            dtype
        )
        d_lse = torch.where(some, 0.0, torch.where(torch.isfinite(lse), 1.0, 0.0))
        dq, dk, dv = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
        results.append((out[:, :, ~some], lse[:, :, ~some], dq[:, :, ~some]))
        assert not dk[:, :, 17].any()
        assert not dv[:, :, 299].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_poison_leaves_every_gradient_alone(backend: str) -> None:
    q, k, v = inputs(B=2, Lq=9, Lk=9)
    results = []
    for number in (0.0, torch.nan):
        leaves = [x.clone() for x in (q, k, v)]
        for x in leaves:
            x[0, :, 6:] = number
        leaves = [x.requires_grad_() for x in leaves]
        mask = qkv.padding([6, 9]) & qkv.causal() & qkv.documents([6, 3])
        out = qkv.attention(*leaves, mask=mask, backend=backend)
        d_out = torch.ones_like(out)
        d_out[0, :, 6:] = number  # those rows are dead: not even a NaN gradient of theirs may leak
        results.append((out, *torch.autograd.grad(out, leaves, d_out)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_visible_nan_and_inf(backend: str) -> None:
    q, k, v = inputs(Lq=4, Lk=4)
    nan = k.clone()
    nan[0, 0, 2, 0] = torch.nan
    out, lse = qkv.attention(q, nan, v, mask=qkv.causal(), return_lse=True, backend=backend)
    assert out[0, 0, 2:].isnan().all()
    assert lse[0, 0, 2:].isnan().all()
    assert torch.isfinite(out[0, 0, :2]).all()
    assert torch.isfinite(out[0, 1]).all()
    plus = torch.zeros(4, 4)
    plus[1, 2], plus[2, 0] = torch.inf, -torch.inf
    out, lse = qkv.attention(q, k, v, bias=plus, return_lse=True, backend=backend)
    assert out[0, :, 1].isnan().all()
    assert lse[0, :, 1].isnan().all()
    Truth(q[:, :, 2:3], k, v, bias=plus[2:3]).check(out[:, :, 2:3])
    out, lse = qkv.attention(q, k, v, bias=torch.full((4, 4), -torch.inf), return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    value = v.clone()
    value[0, 0, 3, 1] = torch.inf
    out = qkv.attention(q, k, value, mask=qkv.causal(), backend=backend)
    assert out[0, 0, 3, 1] == torch.inf
    assert torch.isfinite(out[0, 0, :3]).all()
    assert torch.isfinite(out[0, 0, 3, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_minus_infinity_hides(backend: str) -> None:
    q, k, v = inputs(Lq=4, Lk=5)
    bias = torch.zeros(5)
    bias[2] = -torch.inf
    want = qkv.attention(q, k, v, bias=bias, backend=backend)
    k[:, :, 2], v[:, :, 2] = torch.nan, torch.nan
    assert torch.equal(qkv.attention(q, k, v, bias=bias, backend=backend), want)
