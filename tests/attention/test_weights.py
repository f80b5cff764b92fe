"""weights(): the probabilities of chosen rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError
from tests.kit.sharp import inputs


@pytest.mark.parametrize("rows", [slice(None), slice(1, 6, 2), 3, -1, [4, 0], torch.tensor([2, 2]), []], ids=str)
def test_weights(rows: Any) -> None:
    q, k, v = inputs(B=2, Hq=4, Lq=7, Lk=9)
    bias, mask = torch.randn(7, 9), torch.rand(2, 1, 7, 9) > 0.4
    sinks = torch.zeros(4)
    p = qkv.weights(q, k, rows=rows, mask=mask, bias=bias, softcap=3.0, sinks=sinks)
    picked = (
        list(range(7))[rows]
        if isinstance(rows, slice)
        else torch.arange(7)[
            rows if isinstance(rows, torch.Tensor) else torch.tensor(rows, dtype=torch.int64).reshape(-1)
        ].tolist()
    )
    assert p.shape == (2, 4, len(picked), 9)
    out = qkv.attention(q, k, v, mask=mask, bias=bias, softcap=3.0, sinks=sinks)[:, :, picked]
    assert torch.allclose(p @ v.repeat_interleave(2, 1), out, atol=1e-5)
    assert (p.sum(-1) < 1).all()


def test_weights_of_a_long_sequence_stay_small() -> None:
    q, k = torch.randn(1, 1, 100_000, 8), torch.randn(1, 1, 100_000, 8)
    p = qkv.weights(q, k, rows=slice(99_990, None), mask=qkv.causal() & qkv.sliding_window(4))
    assert p.shape == (1, 1, 10, 100_000)
    assert ((p > 0).sum(-1) == 4).all()
    with pytest.raises(ArgumentError, match="rows"):
        qkv.weights(q, k, rows=100_000)
    with pytest.raises(ArgumentTypeError, match="rows"):
        qkv.weights(q, k, rows="all")


@pytest.mark.parametrize("heads", [0, -1, [2, 0], slice(1, None), torch.tensor([3, 3]), []], ids=str)
@pytest.mark.parametrize("rows", [None, [1, 4]], ids=str)
def test_weights_of_some_heads_are_those_of_all(heads: Any, rows: Any) -> None:
    """With everything that differs by head: grouped keys, sinks, slopes, tables, biases, masks."""
    q, k, _ = inputs(B=2, Hq=4, Lq=7, Lk=9)
    generator = torch.Generator().manual_seed(0)
    table, slopes = torch.randn(4, 5, generator=generator), torch.rand(4, generator=generator)
    bias = qkv.alibi(slopes) + qkv.relative(table) + torch.randn(2, 4, 7, 9, generator=generator)
    bias = bias + qkv.score_mod(lambda s, b, h, p, j: s * (1 + h))
    mask = qkv.per_head([qkv.causal(), qkv.sliding_window(3), qkv.prefix(4), qkv.padding([9, 5])])
    given = {
        "mask": mask,
        "bias": bias,
        "softcap": 3.0,
        "sinks": torch.randn(4, generator=generator),
        "positions": "end",
    }
    every = qkv.weights(q, k, rows=rows, **given)
    picked = heads if isinstance(heads, slice) else torch.arange(4)[heads].reshape(-1)
    assert torch.equal(qkv.weights(q, k, rows=rows, heads=heads, **given), every[:, picked])


def test_gradients_of_the_weights_of_a_head() -> None:
    q, k, _ = (t.double() for t in inputs(B=1, Hq=4, Lq=5, Lk=6))
    leaves, d_p = [q.requires_grad_(), k.requires_grad_()], torch.randn(1, 1, 5, 6, dtype=torch.float64)
    got = torch.autograd.grad(qkv.weights(q, k, heads=2), leaves, d_p)
    want = torch.autograd.grad(qkv.weights(q, k)[:, 2:3], leaves, d_p)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 1e-14
        assert w.abs().max() > 1e-3


def test_gigabytes_of_weights_have_to_be_asked_for() -> None:
    """What 20,000 tokens of 8 heads would take; nothing is allocated before the error."""
    q = k = torch.zeros(1, 1, 1, 8).expand(1, 8, 20_000, 8)
    with pytest.raises(
        ArgumentError, match=r"up to 1 GiB.*q \(1, 8, 20000, 8\).*12\.8 GB.*rows=slice\(0, 16\).*heads=0"
    ):
        qkv.weights(q, k)
    assert qkv.weights(q, k, rows=[19_999], heads=[1, 3]).shape == (1, 2, 1, 20_000)
    assert qkv.weights(q[:, :, :3], k).shape == (1, 8, 3, 20_000)
    with pytest.raises(ArgumentError, match=r"heads must be those of query heads.*heads=8 and Hq=8.*\[0, 8\)"):
        qkv.weights(q, k, heads=8)
    with pytest.raises(ArgumentTypeError, match="heads"):
        qkv.weights(q, k, heads="all")
