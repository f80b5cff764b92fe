"""Every method gives what one process gives, forward and backward, over any shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.distributed import Shards, attention, shard, unshard
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

B, HQ, HKV, L, D, DV = 2, 4, 2, 301, 32, 16
UNEVEN = Shards([[(0, 2), (250, 251)], [(2, 250), (251, 300)], [], [(300, 301)]])


def drawn(seed: int) -> list[Tensor]:
    """q, k, v, sinks, and gradients of out and lse."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, HQ, L, D), (B, HKV, L, D), (B, HKV, L, DV), (HQ,), (B, HQ, L, DV), (B, HQ, L))
    return [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]


_grids: dict[Any, Any] = {}


def grid(mesh: Any, shape: tuple[int, ...] | None) -> Any:
    """The mesh, or one of two dimensions of all ranks."""
    from torch.distributed.device_mesh import DeviceMesh

    if shape is None:
        return mesh
    if shape not in _grids:
        _grids[shape] = DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=("ring", "heads"))
    return _grids[shape]


def on_one(mesh: Any, shape: Any, mask: Any, shards: Shards, method: str, backend: str | None) -> list[Tensor]:
    mesh = grid(mesh, shape)
    *given, d_out, d_lse = drawn(1)
    for x in given:
        x.requires_grad_()
    q, k, v = (shard(x, shards, mesh) for x in given[:3])
    out, lse = attention(
        q, k, v, mask, mesh=mesh, shards=shards, method=method, sinks=given[3], return_lse=True, backend=backend
    )
    whole = unshard(out, shards, mesh), unshard(lse, shards, mesh)
    # Every rank has a copy of the whole, so each may have only its share of the gradient.
    torch.autograd.backward(whole, (d_out / shards.ranks, d_lse / shards.ranks))
    return [whole[0].detach(), whole[1].detach(), *(x.grad for x in given if x.grad is not None)]


MASKS = {
    "full": None,
    "causal": qkv.causal(),
    "documents": qkv.documents([100, 150, 51]) & qkv.causal(),
    "per_head": qkv.per_head([qkv.causal(), qkv.sliding_window(9), qkv.prefix(7), qkv.causal() & qkv.strided(3)]),
}
CASES = [
    ("ring", Shards.zigzag(L, 2), None),
    ("ring", UNEVEN, None),
    ("allgather", Shards.zigzag(L, 3), None),
    ("ulysses", Shards.contiguous(L, 3), None),
    ("ulysses", UNEVEN, None),
    ("hybrid", Shards.zigzag(L, 4), (2, 2)),
    ("hybrid", UNEVEN, (4, 1)),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("method", "shards", "shape"), CASES, ids=lambda x: str(x)[:24])
def test_it_is_what_one_process_computes(method: str, shards: Shards, shape: Any, mask: str) -> None:
    *given, d_out, d_lse = drawn(1)
    for x in given:
        x.requires_grad_()
    out, lse = qkv.attention(*given[:3], mask=MASKS[mask], sinks=given[3], return_lse=True)
    torch.autograd.backward((out, lse), (d_out, d_lse))
    found = on_ranks(shards.ranks, on_one, shape, MASKS[mask], shards, method, None)
    for rank in found:  # float64: some 1e-15 a sum of a few hundred numbers of size 1
        torch.testing.assert_close(rank[0], out.detach(), rtol=0, atol=2e-14)
        torch.testing.assert_close(rank[1], lse.detach(), rtol=0, atol=2e-14)
    for n, x in enumerate(given, 2):
        total = sum(rank[n] for rank in found)
        torch.testing.assert_close(total, x.grad, rtol=0, atol=1e-13)
