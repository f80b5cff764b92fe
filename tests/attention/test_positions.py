"""Where the queries stand: every form of positions=, and the error when it has to be said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.errors import ArgumentError
from tests.kit.sharp import BACKENDS, inputs


def test_positions_have_to_be_said() -> None:
    q, k, v = inputs(Lq=3, Lk=5)
    with pytest.raises(ArgumentError, match="positions=") as error:
        qkv.attention(q, k, v, mask=qkv.causal())
    text = str(error.value)
    assert 'positions="start" (p = i)' in text
    assert 'positions="end" (p = i + 2)' in text
    assert "■ ■ ■ · ·" in text
    with pytest.raises(ArgumentError, match="alibi"):
        qkv.attention(q, k, v, bias=qkv.alibi([1.0, 1.0]))
    qkv.attention(q, k, v, mask=qkv.padding([4]))  # does not look at positions
    qkv.attention(q, k[:, :, :3], v[:, :, :3], mask=qkv.causal())  # one length: no doubt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "form",
    ["end", 4, np.int64(4), torch.tensor(4), [4, 4], (4, 4), torch.tensor([4, 4]), np.array([4, 4]),
     torch.tensor([[4, 5, 6]]), torch.tensor([[4, 5, 6]], dtype=torch.int32), [[4, 5, 6], [4, 5, 6]]],
    ids=str,
)  # fmt: skip
def test_forms_of_positions(form: Any, backend: str) -> None:
    q, k, v = inputs(B=2, Lq=3, Lk=7)
    want = qkv.attention(q, k, v, mask=torch.ones(3, 7).tril(4).bool(), backend=backend)
    assert torch.equal(qkv.attention(q, k, v, mask=qkv.causal(), positions=form, backend=backend), want)


def test_chunks_agree_with_the_whole() -> None:
    q, k, v = inputs(Lq=20, Lk=20)
    mask = qkv.causal() & qkv.sliding_window(6)
    whole = qkv.attention(q, k, v, mask=mask)
    for cut in range(0, 21, 5):
        part = qkv.attention(q[:, :, cut:], k, v, mask=mask, positions=cut)
        assert torch.allclose(part, whole[:, :, cut:], atol=1e-5)
