"""Rows' results over a part of the keys of a cache: what a cache of several ranks joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.cache import PagedCache
from qkv.call.problem import Options
from qkv.execute import on_view


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "tiled", "reference", None])
@pytest.mark.parametrize("storage", [None, torch.int8], ids=["", "int8"])
@pytest.mark.parametrize(
    "more",
    [{}, {"sinks": [0.5, -torch.inf, 3.0, -2.0]}, {"softcap": 3.0}, {"slopes": [0.5, 0.1, 0.02, 0.3]}, {"scale": -0.3}],
    ids=lambda more: next(iter(more), "plain"),
)
def test_rows_say_what_lse_says_and_more(more: dict[str, Any], storage: Any, backend: str | None, ragged: bool) -> None:
    g = torch.Generator().manual_seed(6)
    cache = PagedCache(
        pages=16, num_kv_heads=2, head_dim=8, value_dim=4, page_size=4, dtype=torch.float32, storage=storage
    )
    seqs = [cache.add(), cache.add()]
    cache.append(seqs, torch.randn(2, 2, 30, 8, generator=g), torch.randn(2, 2, 30, 4, generator=g))
    if ragged:
        q, view = torch.randn(1, 4, 7, 8, generator=g), cache.view(seqs, lengths=[5, 2])
    else:
        q, view = torch.randn(2, 4, 3, 8, generator=g), cache.view(seqs)
    options = Options(
        bias=qkv.alibi(more["slopes"]) if "slopes" in more else None, scale=more.get("scale"),
        softcap=more.get("softcap"), sinks=torch.tensor(more["sinks"]) if "sinks" in more else None, return_lse=True,
    )  # fmt: skip
    mask = qkv.causal() & qkv.sliding_window(2) if ragged else qkv.per_head([qkv.causal(), qkv.prefix(0)] * 2)
    for _ in range(2):  # the second is one that was kept
        out, lse, rows = on_view("test", q, view, None, mask, options, backend, part=True)
        assert lse is not None
        assert rows is not None
        m, l = rows
        assert rows.dtype == torch.float64
        assert torch.equal(l == 0, lse == -torch.inf)
        # lse is rounded to float32, and so are m and l before they are joined here
        torch.testing.assert_close((m + l.log()).float(), lse, rtol=1e-6, atol=1e-6)
        known = on_view("test", q, view, None, mask, options, backend)
        assert known.state is None
        assert torch.equal(known.out, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 40])
def test_rows_of_many_keys(T: int, dtype: torch.dtype) -> None:
    """Sequences that kernels cut into chunks of keys, and queries that fill vectors; scores far from 0."""
    g = torch.Generator().manual_seed(9)
    cache = PagedCache(pages=400, num_kv_heads=1, head_dim=16, page_size=16, dtype=dtype)
    seq = cache.add()
    k, v = (torch.randn(1, 1, 6000, 16, generator=g) for _ in range(2))
    k[..., 0] = 1
    cache.append([seq], k.to(dtype), v.to(dtype))
    q = torch.randn(1, 2, T, 16, generator=g)
    q[..., 0] = 4096.0
    options = Options(return_lse=True)
    _, _, rows = on_view("test", q.to(dtype), cache.view([seq]), None, qkv.causal(), options, None, part=True)
    assert rows is not None
    m, l = rows
    s = q.to(dtype).double() @ k.to(dtype).double()[0, 0].T * 0.25
    s = s.masked_fill(torch.arange(6000) > torch.arange(6000 - T, 6000)[:, None], -torch.inf)
    # In float32 scores of 1024 are sums of some 4096, each rounded to 2^-12 of that, and here a few of them.
    error = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(m + l.log(), s.logsumexp(-1), rtol=0, atol=error)
    torch.testing.assert_close(m, s.amax(-1), rtol=0, atol=error)  # a state is no lse
