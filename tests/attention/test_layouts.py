"""attention() and memory: strides, expanded tensors, values that are a view of the keys, and groups of heads."""

from __future__ import annotations

import pytest
import torch

import qkv
from tests.kit.sharp import BACKENDS, inputs


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other places of memory."""
    B, H, L, D = x.shape
    wide = torch.full((B, H, 2 * L, D + 3), torch.nan, dtype=x.dtype)
    wide[:, :, ::2, 2:-1] = x
    offset = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return {
        "BLHD": x.transpose(1, 2).contiguous().transpose(1, 2),
        "LBHD": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "D first": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "step 2": wide[:, :, ::2, 2:-1],
        "offset": offset,
        "negated": torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype == torch.float32 else x,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["BLHD", "LBHD", "D first", "step 2", "offset", "negated"])
def test_strides_change_no_bit(layout: str, backend: str) -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=5, Lk=6)
    mask = qkv.causal()
    want = qkv.attention(q, k, v, mask=mask, positions="end", backend=backend)
    moved = [layouts(x)[layout] for x in (q, k, v)]
    got = qkv.attention(*moved, mask=mask, positions="end", backend=backend)
    assert torch.equal(got, want)

    grads = []
    for tensors in ((q, k, v), moved):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = qkv.attention(*leaves, mask=mask, positions="end", backend=backend)
        d_out = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).cos()
        grads.append(torch.autograd.grad(out, leaves, d_out))
        strided = layouts(d_out)[layout]
        again = torch.autograd.grad(
            qkv.attention(*leaves, mask=mask, positions="end", backend=backend), leaves, strided
        )
        assert all(torch.equal(a, b) for a, b in zip(grads[-1], again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_expanded_inputs() -> None:
    q, k, v = inputs(B=1, Hq=2, Hkv=1)
    wide = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    want = qkv.attention(q, k, v)
    assert torch.equal(qkv.attention(*wide), want.expand(3, -1, -1, -1))
    leaf = k.clone().requires_grad_()
    qkv.attention(wide[0], leaf.expand(3, -1, -1, -1), wide[2]).backward(torch.ones(3, *want.shape[1:]))
    assert leaf.grad.shape == k.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_keeps_the_order_of_q(backend: str) -> None:
    q, k, v = inputs(B=2, Hq=4, Hkv=4, Lq=5, Lk=6, Dv=3)
    moved = q.transpose(1, 2).contiguous().transpose(1, 2)
    for grad in (False, True):
        out = qkv.attention(moved.requires_grad_(grad), k, v, backend=backend)
        assert out.transpose(1, 2).is_contiguous()
    assert qkv.attention(q, k, v, backend=backend).is_contiguous()
    assert qkv.attention(q.expand(2, -1, -1, -1), k, v, backend=backend).is_contiguous()
    assert qkv.attention(q[:1].expand(2, -1, -1, -1), k, v, backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_view_of_the_keys(backend: str) -> None:
    """MLA's absorbed decode: v is the leading columns of k."""
    q, latent, _ = inputs(Hq=4, Hkv=1, Lq=1, Lk=40, D=12)
    out = qkv.attention(q, latent, latent[..., :8], backend=backend)
    assert torch.equal(out, qkv.attention(q, latent, latent[..., :8].clone(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_of_heads_reads_the_right_values(backend: str) -> None:
    v = torch.arange(3.0)[None, :, None, None].expand(1, 3, 5, 2)
    out = qkv.attention(torch.randn(1, 6, 4, 8), torch.randn(1, 3, 5, 8), v, backend=backend)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([0.0, 0, 1, 1, 2, 2]))
