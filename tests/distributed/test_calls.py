"""What a call over ranks promises besides numbers: one graph on all, draws of its own, and nothing lost in silence."""

from __future__ import annotations

import gc
import math
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import qkv
from qkv.distributed import Machine, Shards, attention, plan, ring, transport, unshard
from tests.distributed.test_methods import grid
from tests.kit.ranks import on_own_ranks, on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

L = 48
METHODS = [("ring", None), ("allgather", None), ("ulysses", None), ("hybrid", (2, 2))]


def made(mesh: Any, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float64) -> tuple[Shards, list[Tensor]]:
    """Shards, and this rank's q, k and v."""
    shards, g = Shards.zigzag(L, mesh.size()), torch.Generator().manual_seed(3)
    whole = [torch.randn(2, h, L, 8, generator=g, dtype=torch.float64).to(dtype) for h in (heads[0], *heads[1:] * 2)]
    return shards, [shards.take(x, mesh.get_local_rank()).requires_grad_() for x in whole]


# ------------------------------------------------------------------------------------------------- one graph on all
def learned(mesh: Any, shape: Any, method: str, heads: tuple[int, int], only_sinks: bool, again: bool) -> list[Tensor]:
    """Gradients; `again`: with a checkpoint around the call, which computes it anew in the backward pass."""
    shards, given = made(mesh, heads)
    sinks = torch.linspace(-1, 1, heads[0], dtype=torch.float64).requires_grad_()
    if only_sinks:
        given = [x.detach() for x in given]

    def call(*x: Tensor) -> Any:
        at = grid(mesh, shape)
        return attention(*x, qkv.causal(), mesh=at, shards=shards, method=method, sinks=sinks, return_lse=True)

    found = checkpoint(call, *given, use_reentrant=False) if again else call(*given)
    out, lse = found
    wanted = [sinks] if only_sinks else [*given, sinks]
    return list(torch.autograd.grad((out * out.detach().sin()).sum() + (lse * 0.5).sum(), wanted))


@pytest.mark.parametrize("only_sinks", [False, True])
@pytest.mark.parametrize(("method", "shape"), METHODS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (1, 1)], ids=["", "idle ranks", "one head"])
def test_a_checkpoint_changes_no_bit(method: str, shape: Any, heads: tuple[int, int], only_sinks: bool) -> None:
    plain = on_ranks(4, learned, shape, method, heads, only_sinks, False)
    again = on_ranks(4, learned, shape, method, heads, only_sinks, True)
    for a, b in zip(plain, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if only_sinks:  # each rank has a share of the gradient, and heads of the swapped ones are whole somewhere
        g = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(2, h, L, 8, generator=g, dtype=torch.float64) for h in (heads[0], *heads[1:] * 2))
        sinks = torch.linspace(-1, 1, heads[0], dtype=torch.float64).requires_grad_()
        out, lse = qkv.attention(q, k, v, qkv.causal(), sinks=sinks, return_lse=True)
        (want,) = torch.autograd.grad((out * out.detach().sin()).sum() + (lse * 0.5).sum(), [sinks])
        torch.testing.assert_close(sum(rank[0] for rank in plain), want, rtol=1e-12, atol=1e-12)


def twice(mesh: Any, method: str) -> str:
    shards, (q, k, v) = made(mesh)
    out = attention(q, k, v, mesh=mesh, shards=shards, method=method)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_second_derivative_is_an_error(method: str) -> None:
    for said in on_ranks(2, twice, method):
        assert "once_differentiable" in said, said


# --------------------------------------------------------------------------------------------------------- dropout
def dropped(mesh: Any, shape: Any, method: str) -> tuple[Tensor, float, float]:
    """Which weights of equal ones a head kept, from values that count in powers; and both sides of out's linearity."""
    ranks, rank, H = mesh.size(), mesh.get_local_rank(), 4
    shards = Shards.zigzag(L, ranks)
    zeros = torch.zeros(1, H, shards.rows(rank), 8, dtype=torch.float64)
    v = shards.take(torch.eye(L, dtype=torch.float64).expand(1, H, L, L), rank).clone().requires_grad_()
    torch.manual_seed(11)  # the same on all ranks, as training scripts do
    out = attention(zeros, zeros, v, mesh=grid(mesh, shape), shards=shards, method=method, dropout_p=0.5)
    d = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    (dv,) = torch.autograd.grad(out, v, d)
    return out.detach() > 0, float((out * d).sum().detach()), float((dv * v).sum().detach())


@pytest.mark.parametrize(("method", "shape"), METHODS)
def test_heads_and_ranks_draw_for_themselves(method: str, shape: Any) -> None:
    found = on_ranks(4, dropped, shape, method)
    kept = Shards.zigzag(L, 4).put([rank[0] for rank in found])[0]  # (H, L, L)
    rows = kept.flatten(0, 1)
    # 24 of 48 on average: two of 192 rows are equal by a chance of 1e-10, one has under 6 or over 42 by one of 1e-5
    assert len(rows.unique(dim=0)) == len(rows)
    assert int(rows.sum(1).min()) > 5
    assert int(rows.sum(1).max()) < 43
    for a in range(len(kept)):  # and no two heads are alike in many places
        for b in range(a):
            assert 0.4 < float((kept[a] == kept[b]).double().mean()) < 0.6
    # the backward pass drew alike: out is linear in v
    assert math.isclose(sum(rank[1] for rank in found), sum(rank[2] for rank in found), rel_tol=1e-9, abs_tol=1e-9)


# ------------------------------------------------------------------------------------------------- biases and masks
def biased(mesh: Any, dtype: torch.dtype, change: str) -> Any:
    """A frozen tensor of all keys and a table that learns; `change`: what is written to before the backward pass."""
    shards, (q, k, v) = made(mesh, dtype=dtype)
    g = torch.Generator().manual_seed(8)
    frozen, shared = torch.randn(4, 1, L, generator=g).to(dtype), torch.randn(4, 1, L, generator=g).to(dtype)
    table = torch.randn(4, 9, generator=g).to(dtype).requires_grad_()
    shared.requires_grad_()
    positions = torch.arange(L)[None].clone()
    bias = qkv.score_mod(lambda s, b, h, p, j: s * 0.5) + qkv.relative(table)
    bias = bias + frozen + shared
    out = attention(q, k, v, mesh=mesh, shards=shards, method="ring", bias=bias, positions=positions)
    with torch.no_grad():
        for name, x in (("frozen", frozen), ("table", table), ("positions", positions)):
            if name == change:
                x += 1
    try:
        found = torch.autograd.grad(out, (q, table, shared), out.detach().sin())
    except RuntimeError as error:
        return str(error)
    return [out.detach(), *found]


@pytest.mark.parametrize("change", ["frozen", "table", "positions"])
def test_what_is_changed_before_the_backward_pass_is_noticed(change: str) -> None:
    for said in on_ranks(2, biased, torch.float32, change):
        assert "modified by an inplace operation" in said, said


def cancelling(mesh: Any, method: str) -> Tensor:
    """The gradient of one number a head that all scores have: 0, of pieces that are 85.3, -32 and -53.3 in bfloat16."""
    shards = Shards.contiguous(L, 3)
    zeros = torch.zeros(2, 4, 16, 8, dtype=torch.bfloat16)
    v = torch.full_like(zeros, (1.0, -0.375, -0.625)[mesh.get_local_rank()])
    shared = torch.zeros(4, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = attention(zeros, zeros, v, mesh=mesh, shards=shards, method=method, bias=shared)
    (found,) = torch.autograd.grad(out, shared, torch.ones_like(out))
    return found


@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_gradients_of_a_shared_bias_are_rounded_once(method: str) -> None:
    for found in on_ranks(3, cancelling, method):
        assert float(found.abs().max()) < 1e-4  # sums of 256 numbers of float32; rounded apart the pieces leave 0.25


def one_row(mesh: Any, method: str) -> str:
    """Ranks of one row each: a bias of one row may be of one query or of all."""
    shards = Shards.contiguous(mesh.size(), mesh.size())
    q = torch.randn(1, 4, 1, 8)
    try:
        attention(q, q, q, mesh=mesh, shards=shards, method=method, bias=torch.randn(4, 1, mesh.size()))
    except qkv.UnsupportedError as error:
        return str(error)
    return ""


def test_a_bias_with_a_row_a_query_stays_with_its_queries() -> None:
    assert all("stays with its queries" in said for said in on_ranks(2, one_row, "ulysses"))
    assert on_ranks(2, one_row, "ring") == ["", ""]


def in_a_row(mesh: Any) -> list[str]:
    """A 2-D mesh takes no bias with a row a query, whether hybrid was named or not."""
    shards, given = made(mesh)
    at, said = grid(mesh, (1, 2)), []
    for method in (None, "hybrid"):
        bias = torch.zeros(4, shards.rows(mesh.get_local_rank()), L, dtype=torch.float64)
        try:
            attention(*given, mesh=at, shards=shards, method=method, bias=bias)
        except qkv.UnsupportedError as error:
            said.append(str(error))
    try:
        plan(*given, mesh=(1, 2), bias=torch.zeros(4, L // 2, L // 2, dtype=torch.float64))
    except qkv.UnsupportedError as error:
        said.append(str(error))
    return said


def test_a_grid_refuses_a_bias_with_a_row_a_query() -> None:
    for said in on_ranks(2, in_a_row):
        assert len(said) == 3
        assert all("stays with its queries" in text for text in said)


def of_inference(mesh: Any) -> Tensor:
    shards, given = made(mesh)
    with torch.inference_mode():
        bias = torch.randn(4, 1, L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = attention(*given, mesh=mesh, shards=shards, method="ring", bias=bias)
    return torch.autograd.grad(out, given[0], torch.ones_like(out))[0]


def test_a_bias_made_in_inference_mode_serves_training() -> None:
    assert all(bool(x.isfinite().all()) for x in on_ranks(2, of_inference))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_other_backends_give_the_same(method: str, backend: str) -> None:
    found = on_ranks(2, by_backend, method, backend)
    for a, b in zip(found, on_ranks(2, by_backend, method, None), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def by_backend(mesh: Any, method: str, backend: str | None) -> list[Tensor]:
    shards, given = made(mesh)
    out = attention(*given, qkv.causal(), mesh=mesh, shards=shards, method=method, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, given, out.detach().cos())]


def let_go(mesh: Any) -> list[str]:
    """What is still there of a mask's tensor and of a function when the caller has let go of them."""
    shards, given = made(mesh)
    table = torch.rand(L, L) < 0.5
    seen = weakref.ref(table)
    for mask in (qkv.dense(table), qkv.mask_mod(lambda b, h, p, j, t=table: t[p, j])):
        for method in ("ring", "ulysses", None):
            attention(*given, mask, mesh=mesh, shards=shards, method=method)
    del mask, table
    gc.collect()
    return [] if seen() is None else ["the mask's tensor"]


def test_nothing_of_the_users_is_kept() -> None:
    assert on_ranks(2, let_go) == [[], []]


# ----------------------------------------------------------------------------------------- errors, and what follows
def refused(mesh: Any, what: str) -> str:
    shards, (q, k, v) = made(mesh)
    rank, more = mesh.get_local_rank(), {}
    if what in ("dtype", "lengths") and rank == 1:
        k = k.float()
    if what == "rows" and rank == 1:
        q = q[:, :, 1:]
    if what == "bias" and rank == 1:
        more["bias"] = torch.zeros(4, 3, L, dtype=torch.float64)
    try:
        attention(q, k, v, mesh=mesh, shards=None if what == "lengths" else shards, **more)  # type: ignore[call-overload]
    except qkv.QKVError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("what", ["dtype", "rows", "bias", "lengths"])
def test_an_error_on_one_rank_is_an_error_on_all(what: str) -> None:
    said = on_ranks(3, refused, what)
    assert all("RankError" in said[rank] and "rank 1" in said[rank] for rank in (0, 2)), said
    assert said[1].startswith(("ShapeError", "ArgumentTypeError")), said
    assert on_ranks(3, refused, "") == ["", "", ""]  # and the group is as good as before


def in_a_grid(mesh: Any) -> str:
    """A mask of its own on the last rank of 2 x 2, which shares no row or column of the mesh with the first."""
    shards, given = made(mesh)
    mask = qkv.causal() if mesh.get_local_rank() < 3 else qkv.sliding_window(5)
    try:
        attention(*given, mask, mesh=grid(mesh, (2, 2)), shards=shards, method="hybrid")
    except qkv.ArgumentError as error:
        return str(error)
    return ""


def test_ranks_of_a_grid_compare_with_all() -> None:
    said = on_ranks(4, in_a_grid)
    assert all("all ranks must make the same call" in text for text in said), said
    assert "rank(s) [3] alone" in said[3]


def moved_positions(mesh: Any, differ: bool) -> str:
    shards, given = made(mesh)
    positions = torch.arange(L)[None] + 3
    if differ and mesh.get_local_rank() == 1:
        positions[0, 5] = 40
    try:
        attention(*given, qkv.causal(), mesh=mesh, shards=shards, positions=positions)
    except qkv.ArgumentError as error:
        return str(error)
    return ""


def test_positions_are_compared_by_their_numbers() -> None:
    assert on_ranks(2, moved_positions, False) == ["", ""]
    assert all("all ranks must make the same call" in text for text in on_ranks(2, moved_positions, True))


def again_after(mesh: Any, method: str, everywhere: bool) -> list[Any]:
    """A backend's error, in the second piece on all ranks or in the first on one; then a call with other tensors."""
    shards = Shards.contiguous(L, mesh.size())  # as many pieces on all ranks: they fail in one stage
    g = torch.Generator().manual_seed(5)
    whole = [torch.randn(2, 4, L, 8, generator=g, dtype=torch.float64) for _ in range(3)]
    given = [shards.take(x, mesh.get_local_rank()) for x in whole]
    run, count, said = ring.Whole.run, [0], ""

    def failing(*x: Any) -> Any:
        count[0] += 1
        if count[0] == (2 if everywhere else 1) and (everywhere or mesh.get_local_rank() == 1):
            raise MemoryError("no memory for a piece")
        return run(*x)

    ring.Whole.run = failing  # type: ignore[method-assign]
    try:
        attention(*given, mesh=mesh, shards=shards, method=method)
    except (MemoryError, qkv.RankError) as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        ring.Whole.run = run  # type: ignore[method-assign]
    if not everywhere:
        return [said]
    found = attention(*(x + 1 for x in given), mesh=mesh, shards=shards, method=method)
    return [said, found, shards.take(qkv.attention(*(x + 1 for x in whole)), mesh.get_local_rank())]


@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_a_call_can_be_made_again_after_an_error(method: str) -> None:
    for said, out, known in on_ranks(3, again_after, method, True):
        assert said.startswith("MemoryError")
        torch.testing.assert_close(out, known, rtol=1e-13, atol=1e-13)


def test_an_error_between_messages_ends_on_the_others_within_the_timeout() -> None:
    found = on_own_ranks(3, again_after, "ring", False, timeout=4.0)
    assert found[1][0].startswith("MemoryError")
    # Rank 1 has sent its keys for stage 1 before, and sends none for stage 2: rank 0 waits for those.
    assert found[0][0].startswith("RankError"), found


def alone_with(mesh: Any) -> str:
    """Rank 1 makes a wrong call, and rank 0 none."""
    if mesh.get_local_rank() == 0:
        time.sleep(3)
        return ""
    return refused(mesh, "dtype")


def test_the_own_error_is_what_a_rank_says_whose_others_do_not_call() -> None:
    assert on_own_ranks(2, alone_with, timeout=1.5)[1].startswith("ArgumentTypeError")


def never_looked(mesh: Any) -> list[str]:
    """As on a group of GPUs alone, which asks before the first call of a kind: one that differs is not remembered."""
    waits = transport.Group.waits
    transport.Group.waits = property(lambda group: True)  # type: ignore[assignment, method-assign]
    try:
        shards, given = made(mesh)
        said = []
        for scale in (0.25 if mesh.get_local_rank() else None, None, None):
            try:
                attention(*given, qkv.causal(), mesh=mesh, shards=shards, method="ring", scale=scale)
                said.append("")
            except qkv.ArgumentError as error:
                said.append(str(error))
        return said
    finally:
        transport.Group.waits = waits  # type: ignore[method-assign]


def test_what_was_not_agreed_on_is_asked_again() -> None:
    for first, *others in on_ranks(2, never_looked):
        assert "all ranks must make the same call" in first
        assert others == ["", ""]


def gathers(mesh: Any, what: str) -> str:
    """Rows of another dtype, or a wrong number of them, on one rank."""
    shards, (q, _, _) = made(mesh)
    if mesh.get_local_rank():
        q = q.float() if what == "dtype" else q[:, :, 1:] if what == "rows" else q.detach()
    try:
        unshard(q, shards, mesh)
    except qkv.QKVError as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("what", ["dtype", "rows", "gradient"])
def test_ranks_agree_before_they_gather(what: str) -> None:
    found = on_ranks(2, gathers, what)
    assert found == (["RankError", "ShapeError"] if what == "rows" else ["ArgumentError"] * 2)


def held_at_once(mesh: Any) -> tuple[int, int]:
    """The most stages' keys of others in memory, forward and in both passes."""
    most, alive, make = [0], [], ring.Mailbox.__init__

    def counted(box: Any, senders: Any, k: Any, v: Any, dtype: Any = None) -> None:
        make(box, senders, k, v, dtype)
        if dtype is None:
            alive.extend(weakref.ref(x) for x in box.memory)
            most[0] = max(most[0], sum(x() is not None for x in alive))

    ring.Mailbox.__init__ = counted  # type: ignore[method-assign]
    try:
        shards, given = made(mesh)
        out = attention(*given, mesh=mesh, shards=shards, method="ring")
        first = most[0]
        out.sum().backward()
    finally:
        ring.Mailbox.__init__ = make  # type: ignore[method-assign]
    return first, most[0]


def test_keys_of_two_ranks_are_in_memory() -> None:
    assert on_ranks(4, held_at_once) == [(2, 2)] * 4


# ------------------------------------------------------------------------------------------------- what is not taken
def unfit(mesh: Any) -> list[str]:
    from torch.autograd import forward_ad
    from torch.distributed.tensor import DTensor, Replicate, Shard as Placed

    shards, (q, k, v) = made(mesh)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own formulas of forward mode
    said = []
    try:
        attention(DTensor.from_local(q, mesh, [Placed(2)]), k, v, mesh=mesh, shards=shards)
    except qkv.ArgumentTypeError as error:
        said.append(str(error))
    for method in ("ring", "ulysses"):
        for name, size in (("sinks", (4,)), ("bias", (4, 1, L))):
            given = DTensor.from_local(torch.zeros(size, dtype=torch.float64), mesh, [Replicate()])
            try:
                attention(q, k, v, mesh=mesh, shards=shards, method=method, **{name: given})  # type: ignore[call-overload]
            except qkv.ArgumentTypeError as error:
                said.append(str(error))
    with forward_ad.dual_level():
        for given in ((forward_ad.make_dual(q.detach(), q.detach()), None), (q.detach(), torch.ones(4).double())):
            sinks = None if given[1] is None else forward_ad.make_dual(given[1], given[1])
            try:
                attention(given[0], k.detach(), v.detach(), mesh=mesh, shards=shards, sinks=sinks)
            except qkv.UnsupportedError as error:
                said.append(str(error))
    return said


def test_what_would_be_lost_is_refused() -> None:
    for first, *others in on_ranks(2, unfit):
        assert [text.split("(): ")[1].split(" must")[0] for text in others[:4]] == ["sinks", "bias"] * 2
        others = others[4:]
        assert "q must be a plain tensor" in first
        assert "to_local()" in first
        assert [text.split(". Got")[0].split("): ")[1] for text in others] == ["forward mode cannot follow it"] * 2


def test_shards_are_whole_numbers() -> None:
    for ranges in ([[(0, 2.5)]], [[(False, 2)]], [[(0, "2")]], [[(0, torch.tensor(2.0))]]):
        with pytest.raises(qkv.ArgumentTypeError, match="pairs a rank"):
            Shards(ranges)  # type: ignore[arg-type]


def measured(mesh: Any) -> tuple[bool, bool]:
    mesh = DeviceMesh("cpu", torch.arange(2))  # of its own: what is measured for a mesh stays
    q = torch.empty(1, 4, 64, 8, device="meta")
    usual = plan(q, q, mesh=mesh).machine == Machine.usual("cpu")
    found = Machine.measured(mesh)
    return usual, plan(q, q, mesh=mesh).machine == found


def test_a_plan_for_a_mesh_goes_by_what_was_measured_for_it() -> None:
    assert on_ranks(2, measured) == [(True, True), (True, True)]


def by_default(mesh: Any) -> tuple[list[Tensor], str]:
    return [x for method in ("ring", "ulysses") for x in by_backend(mesh, method, None)], refused(mesh, "rows")


def test_a_group_of_the_default_backend_is_as_good() -> None:
    """init_process_group() without a backend names none: what its group carries is asked by device."""
    for a, b in zip(on_own_ranks(2, by_default, backend=None), on_ranks(2, by_default), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        assert a[1] == b[1]
        assert a[1]
