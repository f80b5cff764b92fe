"""Ranks that die, stop, or do something else: a typed error within the group's timeout, and never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.distributed import Shards, attention, parts, transport
from tests.kit.ranks import on_own_ranks, on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

L = 96
TIMEOUT = 4.0  # of the groups in which a rank is lost


def made(rank: int, shards: Shards) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    whole = [torch.randn(1, 2, L, 16, generator=g) for _ in range(3)]
    return [shards.take(x, rank).requires_grad_() for x in whole]


def pass_both(mesh: Any, shards: Shards, mask: Any, before: Any = None) -> list[Tensor]:
    """Forward and backward on one rank. `before`: what is done before each piece, by its number."""
    q, k, v = (x.detach().requires_grad_() for x in made(mesh.get_local_rank(), shards))
    count, run, gradients = [0], parts.Whole.run, parts.Whole.gradients

    def counted(original: Any) -> Any:
        def called(*given: Any) -> Any:
            if before is not None:
                before(count[0])
            count[0] += 1
            return original(*given)

        return called

    try:
        parts.Whole.run, parts.Whole.gradients = counted(run), counted(gradients)  # type: ignore[method-assign]
        out = attention(q, k, v, mask, mesh=mesh, shards=shards, method="ring")
        found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    finally:
        parts.Whole.run, parts.Whole.gradients = run, gradients  # type: ignore[method-assign]
    return [out.detach(), *found]


def dies(mesh: Any, shards: Shards, at: int) -> tuple[str, float]:
    """Rank 1 is killed before its piece number `at`; what the others say, and after how long."""
    begin = time.monotonic()

    def before(piece: int) -> None:
        if mesh.get_local_rank() == 1 and piece == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        pass_both(mesh, shards, None, before)
    except qkv.RankError as error:
        return str(error), time.monotonic() - begin
    return "nothing was noticed", time.monotonic() - begin


@pytest.mark.parametrize("at", [1, 4], ids=["between stages", "backward"])
def test_a_rank_that_dies_is_an_error_on_the_others(at: int) -> None:
    found = on_own_ranks(3, dies, Shards.contiguous(L, 3), at, timeout=TIMEOUT, lost=(1,))
    assert found[1] is None
    for rank in (0, 2):
        said, seconds = found[rank]
        assert said.startswith("qkv.distributed.attention(): rank"), said
        assert "could not finish stage" in said, said
        assert "rank 1" in said or rank == 0 or "rank 0" in said, said  # who waits for the one that waits, too
        assert seconds < 3 * TIMEOUT + 20, seconds


def stops(mesh: Any, shards: Shards, seconds: float) -> tuple[str, list[Tensor]]:
    """Rank 1 is stopped for so long between two pieces."""

    def before(piece: int) -> None:
        if mesh.get_local_rank() == 1 and piece == 1:
            waker = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            waker.wait()

    try:
        return "", pass_both(mesh, shards, qkv.causal(), before)
    except qkv.RankError as error:
        return str(error), []


def test_a_slow_rank_is_waited_for() -> None:
    shards = Shards.zigzag(L, 3)
    found = on_own_ranks(3, stops, shards, 1.5)
    known = on_ranks(3, pass_both, shards, qkv.causal())
    for (said, slow), quick in zip(found, known, strict=True):
        assert said == ""
        for a, b in zip(slow, quick, strict=True):
            assert torch.equal(a, b)


def test_a_rank_that_stops_for_longer_than_the_timeout_is_an_error() -> None:
    found = on_own_ranks(2, stops, Shards.contiguous(L, 2), 2 * TIMEOUT, timeout=TIMEOUT)
    assert "rank 0 of 2 could not finish stage" in found[0][0]
    assert "imed out" in found[0][0] or "rank 1" in found[0][0], found[0][0]


def differs(mesh: Any, what: str) -> str:
    rank = mesh.get_local_rank()
    shards, mask, scale = Shards.contiguous(L, 3), qkv.causal(), None
    if rank == 1 and what == "mask":
        mask = qkv.sliding_window(7)
    if what == "documents":  # of as many, and alike in the few that a message shows
        mask = qkv.documents([8] * 5 + ([10, 6] if rank == 1 else [6, 10]) + [8] * 5) & mask
    if rank == 1 and what == "shards":
        shards = Shards([[(0, 32)], [(64, 96)], [(32, 64)]])
    if rank == 1 and what == "scale":
        scale = 0.5
    q, k, v = made(rank, shards)
    grad = torch.enable_grad() if rank == 1 or what != "gradients" else torch.no_grad()
    try:
        with grad:
            attention(q, k, v, mask, mesh=mesh, shards=shards, scale=scale, method="ring")
    except qkv.ArgumentError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["mask", "documents", "shards", "scale", "gradients"])
def test_ranks_that_make_different_calls_are_told(what: str) -> None:
    for said in on_ranks(3, differs, what):
        assert "all ranks must make the same call" in said, said
    # and the group is as good as before
    on_ranks(3, pass_both, Shards.contiguous(L, 3), qkv.causal())


def captures(mesh: Any) -> str:
    slope = torch.zeros((), requires_grad=True)
    q, k, v = made(0, Shards.contiguous(L, 1))
    try:
        attention(q, k, v, mesh=mesh, bias=qkv.score_mod(lambda s, b, h, p, j: s + slope * (p - j)))
    except qkv.UnsupportedError as error:
        return str(error)
    return ""


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    assert "differentiated with respect to the scores only" in on_ranks(1, captures)[0]


class _Later:
    """What isend and irecv give back, begun after a while by a thread of its own."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        for one in self.work.result():
            one.wait()


def delayed(mesh: Any, shards: Shards, mask: Any, seconds: float) -> list[Tensor]:
    """Every message is begun so much later, in the order in which it was asked for."""
    from concurrent.futures import ThreadPoolExecutor

    original = transport.dist.batch_isend_irecv
    with ThreadPoolExecutor(1) as executor:

        def later(operations: Any) -> list[Any]:
            def begin() -> Any:
                time.sleep(seconds * (1 + mesh.get_local_rank()))
                return original(operations)

            work = _Later(executor.submit(begin))
            return [work] + [_Done()] * (len(operations) - 1)

        transport.dist.batch_isend_irecv = later
        try:
            return pass_both(mesh, shards, mask)
        finally:
            transport.dist.batch_isend_irecv = original


class _Done:
    def wait(self) -> None:
        pass


def test_a_slow_network_changes_no_bit() -> None:
    shards = Shards.zigzag(L, 4)
    slow, quick = (on_ranks(4, delayed, shards, qkv.causal(), seconds) for seconds in (0.02, 0.0))
    again = on_ranks(4, pass_both, shards, qkv.causal())
    for a, b, c in zip(slow, quick, again, strict=True):
        assert all(torch.equal(x, y) and torch.equal(y, z) for x, y, z in zip(a, b, c, strict=True))
