"""What judges from elsewhere found: symptoms of public reports on other implementations, asked of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.distributed import Shards, attention, plan
from qkv.errors import ArgumentError
from tests.distributed.test_calls import METHODS, made
from tests.distributed.test_methods import grid
from tests.kit.ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


def _in_another_order(mesh: Any, shape: Any, method: str) -> tuple[str, bool]:
    """What is said where a rank runs two backward passes the other way round, and whether the group is as good then."""
    at = grid(mesh, shape)
    shards, first = made(mesh)
    second = [x.detach().neg().requires_grad_() for x in first]

    def call(given: list[Tensor]) -> Tensor:
        out: Tensor = attention(*given, qkv.causal(), mesh=at, shards=shards, method=method)
        return out

    outs = [call(first), call(second)]
    said = "nothing was said"
    try:
        for out in outs if mesh.get_local_rank() else outs[::-1]:
            out.sum().backward()
    except ArgumentError as error:
        said = str(error)
    for x in first:
        x.grad = None
    outs[0].sum().backward()
    again = torch.autograd.grad(call(first).sum(), first)
    return said, all(x.grad is not None and torch.equal(x.grad, d) for x, d in zip(first, again, strict=True))


@pytest.mark.parametrize(("method", "shape"), METHODS)
def test_backward_passes_in_another_order_are_an_error_on_all_ranks(method: str, shape: Any) -> None:
    for said, good in on_ranks(4, _in_another_order, shape, method):
        assert "all ranks must run the same backward passes, in the same order" in said
        assert good


def _striped(mesh: Any, method: str) -> list[Tensor]:
    L, n = 24, mesh.size()
    shards, g = Shards([[(i, i + 1) for i in range(rank, L, n)] for rank in range(n)]), torch.Generator().manual_seed(7)
    whole = [torch.randn(1, 2, L, 8, generator=g, dtype=torch.float64) for _ in range(3)]
    mine = [shards.take(x, mesh.get_local_rank()).requires_grad_() for x in whole]
    out = attention(*mine, qkv.causal(), mesh=mesh, shards=shards, method=method)
    alone = [x.requires_grad_() for x in whole]
    want = qkv.attention(*alone, qkv.causal())
    found = [out, *torch.autograd.grad(out.sin().sum(), mine)]
    wanted = [want, *torch.autograd.grad(want.sin().sum(), alone)]
    return [
        (a - shards.take(b, mesh.get_local_rank())).abs().max().detach() for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_rows_may_be_dealt_one_by_one(method: str) -> None:
    """The order of Striped Attention (Brandon et al. 2023), as in zhuzilin/ring-flash-attention's tests."""
    for errors in on_ranks(3, _striped, method):
        assert max(errors) < 1e-12


def test_rows_that_are_dealt_one_by_one_are_swapped_for_heads() -> None:
    """By ring each row would be computed with each key apart: an hour where it is planned as milliseconds."""
    q = torch.empty(1, 4, 512, 8, device="meta")
    striped = Shards([[(i, i + 1) for i in range(rank, 512, 2)] for rank in range(2)])
    found = plan(q, q, q, qkv.causal(), mesh=2, shards=striped)
    assert found.method == "ulysses"
    assert dict(found.refused)["ring"] == "256 ranges of rows by 512 of keys are as many pieces"
    assert plan(q, q, q, qkv.causal(), mesh=2).method == "ring"
    one = torch.empty(1, 1, 512, 8, device="meta")  # no heads to swap for
    assert plan(one, one, one, qkv.causal(), mesh=2, shards=striped).method == "ring"
