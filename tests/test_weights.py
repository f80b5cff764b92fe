"""weights(): the probabilities of chosen rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.errors import ArgumentError, ArgumentTypeError
from tests.rowwise import inputs


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
