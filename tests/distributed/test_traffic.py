"""What is moved: keys that some query of another rank may see, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.distributed import Shards, attention
from qkv.distributed.transport import traffic
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

HQ, HKV, L, D, DV = 4, 2, 512, 32, 16


def moved(mesh: Any, shards: Shards, mask: Any, dtype: torch.dtype, method: str, B: int) -> tuple[int, int]:
    """Bytes that a rank receives forward, and backward."""
    g = torch.Generator().manual_seed(2)
    rank = mesh.get_local_rank()
    whole = [torch.randn(B, H, L, W, generator=g).to(dtype) for H, W in ((HQ, D), (HKV, D), (HKV, DV))]
    q, k, v = (shards.take(x, rank).requires_grad_() for x in whole)
    attention(q, k, v, mask, mesh=mesh, shards=shards, method=method)  # planned: what follows is the exchange alone
    with traffic() as forward:
        out = attention(q, k, v, mask, mesh=mesh, shards=shards, method=method)
    with traffic() as backward:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return forward.received, backward.received


@pytest.mark.parametrize("method", ["ring", "allgather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ranks", "window"), [(2, 1), (2, 17), (3, 64), (4, 100), (4, 200)])
def test_a_window_moves_what_reaches_over_the_seams(ranks: int, window: int, dtype: torch.dtype, method: str) -> None:
    shards, mask = Shards.contiguous(L, ranks), qkv.sliding_window(window)
    found = on_ranks(ranks, moved, shards, mask, dtype, method, 2)
    forward, backward = (sum(rank[n] for rank in found) for n in range(2))
    # All ranks together, for each of two batch rows.
    most = 2 * (ranks - 1) * (window - 1) * HKV * (D + DV) * dtype.itemsize
    reach = sum(min(window - 1, shards.ranges[r][0][0]) for r in range(1, ranks))  # a window may reach over several
    assert forward == 2 * reach * HKV * (D + DV) * dtype.itemsize <= most
    assert backward == forward + 2 * reach * HKV * (D + DV) * 4 <= 3 * most


def test_documents_of_one_rank_move_nothing() -> None:
    shards = Shards([[(0, 100), (300, 400)], [(100, 300)], [(400, 512)]])
    mask = qkv.documents([100, 200, 100, 112]) & qkv.causal()
    assert on_ranks(3, moved, shards, mask, torch.float32, "ring", 1) == [(0, 0)] * 3


def test_causal_keys_go_to_later_queries_alone() -> None:
    shards = Shards.contiguous(L, 4)
    found = on_ranks(4, moved, shards, qkv.causal(), torch.float32, "ring", 1)
    each = HKV * (D + DV) * 4 * (L // 4)
    assert [rank[0] for rank in found] == [0, each, 2 * each, 3 * each]
    assert [rank[1] for rank in found] == [3 * each, 3 * each, 3 * each, 3 * each]  # keys come, gradients go back
