"""What a distributed call costs by each method: against the exchange itself, the mask's table, and sums by hand."""

from __future__ import annotations

import json
import random
import re
import shlex
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv.cli.main import main
from qkv.distributed import DistributedPlan, Machine, Shards, costs, plan, planning
from qkv.distributed.costs import Rank, Stage
from tests.distributed.test_balance import SLOWER, drawn, table
from tests.kit.mask_specs import seeds
from tests.kit.ranks import on_ranks

FAST = Machine(1e30, 0.0, 1e9)  # bytes cost nothing


def empty(L: int, H: int = 2, D: int = 8, B: int = 1, grad: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return torch.empty(B, H, L, D, dtype=dtype, device="meta", requires_grad=grad)


def planned(
    L: int, mesh: Any, mask: Any = None, Hq: int = 2, Hkv: int = 2, B: int = 1, **given: Any
) -> DistributedPlan:
    k = empty(L, Hkv, given.pop("D", 8), B, dtype=given.get("dtype", torch.float32))
    q = empty(L, Hq, k.shape[3], B, given.pop("grad", True), dtype=given.pop("dtype", torch.float32))
    return plan(q, k, empty(L, Hkv, given.pop("Dv", 8), B, dtype=q.dtype), mask, mesh=mesh, **given)


def cut_anywhere(rng: random.Random, L: int, ranks: int) -> Shards:
    """Ranges of any lengths, dealt to ranks at random."""
    ends = sorted({0, L, *(rng.randint(0, L) for _ in range(3 * ranks))})
    parts: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for pair in pairwise(ends):
        parts[rng.randrange(ranks)].append(pair)
    return Shards(parts)


@seeds(40)
def test_pairs_of_every_stage_are_those_of_the_masks_table(seed: int) -> None:
    rng = random.Random(f"stages {seed}")
    L, ranks = rng.choice([1, 5, 40, 61]), rng.choice([1, 2, 3, 5])
    mask = drawn(rng, L)
    rows, keys = cut_anywhere(rng, L, ranks), cut_anywhere(rng, L, ranks)
    found = planned(L, ranks, mask, B=2, shards=rows, key_shards=keys)
    every = table(mask, L, 2, 2)
    for method in ("ring", "allgather"):
        cost = found.costs[method]
        assert cost.exact
        assert [rank.rank for rank in cost.ranks] == list(range(ranks))
        for rank in cost.ranks:
            mine = every[:, :, rows.positions(rank.rank)]
            assert rank.pairs == int(mine.sum()), f"{mask!r} {rows} {keys}"
            assert rank.stages[0].pairs == int(mine[..., keys.positions(rank.rank)].sum())
            assert sum(stage.pairs for stage in rank.stages) == rank.pairs
        assert sum(rank.pairs for rank in cost.ranks) == int(every.sum())
        assert sum(rank.traffic.received for rank in cost.ranks) == sum(rank.traffic.sent for rank in cost.ranks)
    for rank in found.costs["ring"].ranks:
        others = [(rank.rank - t) % ranks for t in range(1, ranks)]
        seen = [int(every[:, :, rows.positions(rank.rank)][..., keys.positions(other)].sum()) for other in others]
        assert [n for n in seen if n] == [stage.pairs for stage in rank.stages[1:] if stage.pairs]


@seeds(40)
def test_ranks_that_are_many_are_planned_as_the_few_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By arithmetic on ranges instead of the exchange: the same bytes and pairs where masks are ranges."""
    rng = random.Random(f"many {seed}")
    L, ranks = rng.choice([40, 61, 300]), rng.choice([2, 3, 5, 7])
    mask = rng.choice([None, qkv.causal(), qkv.sliding_window(9), qkv.documents([L // 3, L - L // 3]) & qkv.causal(),
                       qkv.window(3, 4)])  # fmt: skip
    shards = rng.choice([Shards.contiguous, Shards.zigzag])(L, ranks)
    costs._between.cache_clear()
    few = planned(L, ranks, mask, shards=shards).costs["ring"]
    monkeypatch.setattr(costs, "FEW", 0)
    monkeypatch.setattr(costs, "LOOKED_AT", ranks)
    costs._between.cache_clear()
    many = planned(L, ranks, mask, shards=shards).costs["ring"]
    costs._between.cache_clear()
    assert len(many.ranks) == ranks
    for a, b in zip(few.ranks, many.ranks, strict=True):
        assert (a.pairs, a.traffic) == (b.pairs, b.traffic), f"{mask!r} {shards}"


def test_a_window_moves_what_it_reaches_over() -> None:
    found = planned(10_000, 4, qkv.sliding_window(100), Hkv=2, D=16, Dv=24)
    reach = 99 * 2 * (16 + 24) * 4
    assert [rank.traffic.received for rank in found.costs["ring"].ranks] == [0, reach, reach, reach]
    assert [rank.traffic.sent for rank in found.costs["ring"].ranks] == [reach, reach, reach, 0]
    back = [(rank.traffic.back_received, rank.traffic.back_sent) for rank in found.costs["ring"].ranks]
    assert back == [(reach, reach), (2 * reach, 2 * reach), (2 * reach, 2 * reach), (reach, reach)]
    half = planned(10_000, 4, qkv.sliding_window(100), Hkv=2, D=16, Dv=24, dtype=torch.bfloat16)
    assert half.costs["ring"].ranks[1].traffic == (reach // 2, reach // 2, reach // 2 + reach, reach // 2 + reach)


def test_ulysses_moves_queries_keys_values_and_results() -> None:
    """4 ranks of 100 rows, 8 heads that read 4, B = 3: by hand."""
    found = planned(400, 4, qkv.causal(), Hq=8, Hkv=4, B=3, D=16, Dv=24, shards=Shards.contiguous(400, 4))
    rank = found.costs["ulysses"].ranks[1]
    queries, keys = 3 * 300 * 2 * 16, 3 * 300 * 1 * (16 + 24)  # come from the others, for the own heads
    results = 3 * 100 * 6 * 24  # of the own rows, from the others' heads; lse where it is asked for
    assert rank.traffic.received == 4 * (queries + keys + results)
    assert rank.traffic.back_sent == rank.traffic.received
    own_queries, own_keys = 3 * 100 * 6 * 16, 3 * 100 * 3 * (16 + 24)
    assert rank.traffic.sent == 4 * (own_queries + own_keys + 3 * 300 * 2 * 24)
    assert rank.pairs == 3 * 2 * 400 * 401 // 2


def test_keys_that_several_ranks_read_move_to_each() -> None:
    found = planned(400, 4, None, Hq=8, Hkv=2, D=16, Dv=16, shards=Shards.contiguous(400, 4))
    for rank in found.costs["ulysses"].ranks:
        queries, keys = 300 * 2 * 16, 300 * 1 * 32
        assert rank.traffic.received == 4 * (queries + keys + 100 * 6 * 16)


def test_heads_that_see_more_are_more_work() -> None:
    mask = qkv.per_head([qkv.causal(), qkv.sliding_window(1)])
    found = planned(100, 2, mask, shards=Shards.contiguous(100, 2))
    assert [rank.pairs for rank in found.costs["ulysses"].ranks] == [5050, 100]


def test_hybrid_is_ulysses_in_rows_of_the_mesh_and_a_ring_between_them() -> None:
    found = planned(400, (2, 2), None, Hq=4, Hkv=2, D=16, Dv=16)
    assert found.method == "hybrid"
    assert set(found.costs) == {"hybrid"}
    assert {rank.pairs for rank in found.costs["hybrid"].ranks} == {2 * 200 * 400}
    ring, queries, keys = 200 * 1 * 32, 100 * 2 * 16, 100 * 1 * 32
    results = 100 * 2 * 16
    for rank in found.costs["hybrid"].ranks:
        assert rank.traffic.received == 4 * (ring + queries + keys + results)
    wide = planned(400, (2, 2), qkv.causal(), Hq=4, Hkv=2)
    assert sum(rank.pairs for rank in wide.costs["hybrid"].ranks) == 4 * 400 * 401 // 2


def seconds(rank: Rank) -> tuple[float, float]:
    return rank.forward.seconds, rank.backward.seconds


def test_seconds_are_the_slowest_ranks_work_where_bytes_cost_nothing() -> None:
    found = planned(1000, 2, qkv.causal(), machine=FAST, shards=Shards.contiguous(1000, 2))
    work = [2 * n * 2 * (8 + 8) / 1e9 for n in (500 * 501 // 2, 500 * 501 // 2 + 500 * 500)]
    for rank, forward in zip(found.costs["ring"].ranks, work, strict=True):
        assert seconds(rank) == pytest.approx((forward, 2.5 * forward))
        assert rank.forward.exposed + rank.backward.exposed == pytest.approx(0, abs=1e-12)
        assert rank.flops == pytest.approx(forward * 1e9)
    assert found.costs["ring"].seconds(True) == pytest.approx(3.5 * work[1])
    assert (found.method, found.seconds) == ("ulysses", pytest.approx(3.5 * sum(work) / 2)), "a head each is even"
    assert found.alone == pytest.approx(3.5 * sum(work))


def test_what_is_received_is_hidden_by_what_is_computed_meanwhile() -> None:
    """Three ranks that see everything: stages of c seconds, whose keys take t: c + 2 max(c, t), or t late for all."""
    c = 2 * 100 * 100 * 32 / 1e9
    letter = 100 * 2 * 16 * 4
    for t in (c / 4, c, 5 * c):
        machine = Machine(letter / (0.75 * t), 0.25 * t, 1e9)
        found = planned(300, 3, None, machine=machine)
        ring, gather = found.costs["ring"].ranks[1], found.costs["allgather"].ranks[1]
        assert ring.forward.seconds == pytest.approx(c + 2 * max(c, t))
        assert ring.forward.exposed == pytest.approx(2 * max(0, t - c), abs=1e-9)
        both = 0.25 * t + 1.5 * t
        assert gather.forward.seconds == pytest.approx(max(c, both) + 2 * c)
        # Backward: the first stage meets keys, the second keys and gradients, the third gradients; the last go alone.
        b = 2.5 * c
        assert ring.backward.seconds == pytest.approx(max(b, t) + max(b, t) + max(b, t) + t)
        assert gather.backward.seconds == pytest.approx(max(b, both) + 2 * b + both)


def test_every_row_that_is_computed_again_costs_its_rate() -> None:
    slow = Machine(1e30, 0.0, 1e30, row=1e-3)
    found = planned(300, 3, None, Hq=3, Hkv=3, machine=slow)
    assert found.costs["ring"].ranks[0].forward.seconds == pytest.approx(3 * 100 * 3 * 1e-3)
    assert found.costs["allgather"].ranks[0].forward.seconds == pytest.approx(3 * 100 * 3 * 1e-3)
    assert found.costs["ring"].ranks[0].backward.seconds == pytest.approx(2 * 3 * 100 * 3 * 1e-3)
    assert found.costs["ulysses"].ranks[0].forward.seconds == pytest.approx(300 * 1e-3)


def test_copies_of_an_all_to_all_count_where_memory_is_known() -> None:
    plain, slow = (Machine(1e9, 0.0, 1e30, memory=memory) for memory in (None, 1e9))
    one, two = (planned(300, 3, None, Hq=3, Hkv=3, machine=m).costs["ulysses"].ranks[0].forward for m in (plain, slow))
    assert two.seconds == pytest.approx(5 * one.seconds)
    assert two.exposed == pytest.approx(two.seconds)


def test_the_cheapest_is_chosen() -> None:
    few = planned(4096, 4, None, Hq=8, Hkv=8, machine=Machine(1e6, 0.0, 1e12))
    assert few.method == "ulysses", "its bytes do not grow with ranks"
    window = planned(4096, 4, qkv.sliding_window(64), Hq=8, Hkv=8, machine=Machine(1e6, 0.0, 1e12))
    assert window.method == "ring"
    late = planned(64, 4, qkv.causal(), Hq=8, Hkv=8, machine=Machine(1e12, 1e-3, 1e12))
    assert late.method == "allgather", "messages at once wait for one latency"
    for found in (few, window, late):
        best = min(cost.seconds(True) for cost in found.costs.values())
        assert found.seconds <= 1.02 * best
        assert {name for name, _ in found.refused} == {"ring", "allgather", "ulysses", "hybrid"} - {found.method}
        assert all(why for _, why in found.refused)


def test_a_call_is_run_as_its_plan_says() -> None:
    rng = random.Random(7)
    for _ in range(20):
        L, ranks = rng.choice([64, 500]), rng.choice([1, 2, 4])
        machine = Machine(10 ** rng.uniform(5, 11), 10 ** rng.uniform(-7, -3), 10 ** rng.uniform(9, 13))
        found = planned(L, ranks, rng.choice([None, qkv.causal()]), Hq=4, Hkv=4, machine=machine)
        p = found.problem
        assert planning.choose(p, found.shards, found.key_shards, (ranks,), machine) == found.method
    usual = planned(500, 4, None, Hq=4, Hkv=4)
    assert planning.choose(usual.problem, usual.shards, usual.key_shards, (4,)) == usual.method
    assert planning.choose(usual.problem, usual.shards, usual.key_shards, (2, 2)) == "hybrid"
    assert planning.choose(usual.problem, usual.shards, usual.key_shards, (1,)) == "ring"


def test_methods_that_cannot_run_say_why() -> None:
    bias = torch.zeros(4, 256, 1)
    slow = Machine(1e6, 0.0, 1e12)
    k = empty(256, 4)
    assert plan(k, k, k, mesh=4, machine=slow).method == "ulysses"
    found = plan(k, k, k, mesh=4, bias=bias, machine=slow)
    assert found.method != "ulysses"
    assert "row a query" in dict(found.refused)["ulysses"]
    assert "more ranks than heads" in dict(planned(256, 4, None).refused)["ulysses"]
    assert "two dimensions" in dict(planned(256, 4, None).refused)["hybrid"]
    with pytest.raises(qkv.ArgumentError, match="'ulysses' cannot run this call: it has no work for more ranks"):
        planned(256, 4, None, method="ulysses")
    with pytest.raises(qkv.ArgumentError, match="method must be one of"):
        planned(256, 4, None, method="rings")
    with pytest.raises(qkv.ArgumentError, match="shards must be Shards of 256 rows on 4 ranks"):
        planned(256, 4, None, shards=Shards.contiguous(255, 4))
    with pytest.raises(qkv.ArgumentTypeError, match="mesh must be sizes or a DeviceMesh"):
        planned(256, "four", None)
    with pytest.raises(qkv.ArgumentError, match="bandwidth must be finite and above 0"):
        Machine(0, 1e-5, 1e12)
    with pytest.raises(qkv.ArgumentTypeError, match="latency must be a number"):
        Machine(1e9, "10us", 1e12)  # type: ignore[arg-type]


def test_a_method_that_was_asked_for_is_the_plans() -> None:
    found = planned(4096, 4, None, Hq=8, Hkv=8, machine=Machine(1e6, 0.0, 1e12), method="ring")
    assert found.method == "ring"
    assert dict(found.refused)["ulysses"] == "'ring' was asked for"
    assert "asked for by method=" in str(found)


@pytest.mark.parametrize("L", [0, 1, 3])
@pytest.mark.parametrize("mesh", [1, 5, (2, 2)])
def test_ranks_without_work_are_planned(L: int, mesh: Any) -> None:
    for mask in (None, qkv.causal()):
        found = planned(L, mesh, mask, Hq=4, Hkv=4)
        assert sum(rank.pairs for rank in found.cost.ranks) == 4 * (L * (L + 1) // 2 if mask is not None else L * L)
        assert str(found)


def test_queries_and_keys_of_other_lengths() -> None:
    q, k = empty(40), empty(100)
    found = plan(q, k, k, qkv.causal(), mesh=4, positions="end")
    assert sum(rank.pairs for rank in found.costs["ring"].ranks) == 2 * sum(60 + i + 1 for i in range(40))
    several = plan(empty(40, B=2), empty(100, B=2), None, qkv.causal(), mesh=4, positions=[0, 60])
    want = 2 * (sum(i + 1 for i in range(40)) + sum(60 + i + 1 for i in range(40)))
    assert sum(rank.pairs for rank in several.costs["ring"].ranks) == want
    data = plan(q, k, k, qkv.causal(), mesh=2, positions=torch.arange(40)[None])
    assert "positions are data" in str(data)


def test_a_hundred_million_tokens_on_thousands_of_ranks() -> None:
    mask, L = qkv.causal(), 100_000_000
    planned(1000, 2000, mask)
    start = time.thread_time()
    found = planned(L, 4096, mask, Hq=8, Hkv=2)
    told = str(found)
    assert time.thread_time() - start < 1.0 * SLOWER
    assert "of 4,096 ranks" in told
    ranks = found.costs["ring"].ranks
    assert {rank.rank for rank in ranks} >= {0, 4095}
    share = 8 * L * (L + 1) // 2 / 4096
    assert all(abs(rank.pairs / share - 1) < 0.001 for rank in ranks)
    assert all(rank.stages == () for rank in ranks)
    first = next(rank for rank in ranks if rank.rank == 0)
    rows = 4096 * 2
    assert first.traffic.received == (L - first.rows) * 2 * 16 * 4, "its last chunk sees every other key"
    last = next(rank for rank in ranks if rank.rank == 4095)
    assert last.traffic.received == pytest.approx(first.traffic.received / 2, rel=2 / rows)


def test_pairs_that_were_not_counted_are_told_as_bounds() -> None:
    found = planned(4096, 2, qkv.mask_mod(lambda b, h, q, k: (q + k) % 3 == 0) & qkv.causal())
    assert not found.cost.exact
    assert "pairs are bounds" in str(found)
    assert sum(rank.pairs for rank in found.cost.ranks) == 2 * 4096 * 4097 // 2


def test_memory_is_a_share_of_one_ranks() -> None:
    one, four = (
        planned(40_000, 1, qkv.sliding_window(64), grad=False),
        planned(40_000, 4, qkv.sliding_window(64), grad=False),
    )
    alone = one.costs["ring"].ranks[0].memory
    assert all(alone / 4 <= rank.memory <= alone / 3 for rank in four.costs["ring"].ranks)
    million = [planned(1_000_000, n, qkv.sliding_window(64), Hq=8, Hkv=8, D=128, Dv=128, grad=False) for n in (1, 4)]
    one, four = ([rank.memory for rank in found.costs["ring"].ranks] for found in million)
    tensors = 4 * 8 * 1_000_000 * 128 * 4
    assert tensors <= one[0] <= 1.1 * tensors
    assert all(memory <= one[0] / 3.5 for memory in four)
    everything = planned(40_000, 4, None, grad=False)
    ring, gather = (max(rank.memory for rank in everything.costs[name].ranks) for name in ("ring", "allgather"))
    assert ring < gather


def test_a_stage_is_told_in_pairs_rows_and_bytes() -> None:
    found = planned(64, 2, None, shards=Shards.contiguous(64, 2))
    letter = 32 * 2 * 16 * 4
    assert found.costs["ring"].ranks[0].stages == (
        Stage(2 * 32 * 32, 2 * 32, 0, 0), Stage(2 * 32 * 32, 2 * 32, letter, letter),
    )  # fmt: skip


def test_plans_are_values() -> None:
    mask = qkv.documents([300, 700]) & qkv.causal()
    assert planned(1000, 4, mask) == planned(1000, 4, qkv.documents([300, 700]) & qkv.causal())
    assert planned(1000, 4, mask) != planned(1000, 2, mask)
    assert str(planned(1000, 4, mask)) == str(planned(1000, 4, mask))


PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed-plan.md"
SHOWN = re.findall(
    r"^```sh\n(.*?)\n```\n\n```\n(.*?)\n```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize("n", range(len(SHOWN)))
def test_the_page_shows_what_the_command_prints(n: int, capsys: pytest.CaptureFixture[str]) -> None:
    command, shown = SHOWN[n]
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.rstrip() == shown


def test_the_page_shows_ten_commands() -> None:
    assert len(SHOWN) == 10


SHAPE = ["plan", "--distributed", "--shape", "hq=8,hkv=2,lq=100000,d=64", "--mask", "causal()"]
FIGURES = ["--bandwidth", "25GB/s", "--latency", "10us", "--flops", "400T"]


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, "--ranks", "8", *FIGURES, "--gradients"]) == 0
    said = capsys.readouterr().out
    q = torch.zeros(()).expand(1, 8, 100_000, 64)
    k = q[:, :2]
    found = plan(q.detach().requires_grad_(), k, k, qkv.causal(), mesh=8, machine=Machine(25e9, 1e-5, 4e14))
    assert said == f"{found}\n"
    assert main([*SHAPE, "--ranks", "4x2", *FIGURES, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mesh"] == [4, 2]
    assert told["method"] == "hybrid"
    assert len(told["methods"]["hybrid"]) == 8
    assert told["machine"] == {"bandwidth": 25e9, "latency": 1e-5, "flops": 4e14}


def test_the_command_folds_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, "--ranks", "512", *FIGURES]) == 0
    said = capsys.readouterr().out
    assert "median" in said
    assert "of 512 ranks" in said
    assert len(said.splitlines()) < 25


def test_the_command_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE[:3], "hq=2,lq=256,d=16", "--ranks", "2"]) == 0
    assert "1 GB/s, 100 µs a message" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--ranks takes a number, or two as RxH; or several of these, with commas. Got no --ranks"),
        (["--ranks", "2x2x2"], "Got '2x2x2'"),
        (["--ranks", "0"], "Got '0'"),
        (["--ranks", "2", "--bandwidth", "fast"], "Try --bandwidth 25GB/s"),
        (["--ranks", "2", "--latency", "10"], "its unit"),
        (["--ranks", "2", "--flops", "-1"], "Try --flops 400T"),
        (["--ranks", "2", "--flops", "1T", "--method", "best"], "method must be one of"),
        (["--ranks", "2", "--flops", "1T", "--method", "hybrid"], "a mesh of two dimensions"),
        (["--ranks", "2", "--backend", "cpu"], "Leave it out"),
    ],
)
def test_the_command_says_what_it_takes(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, *given]) == 2
    assert words in capsys.readouterr().err


def moved(mesh: Any, call: dict[str, Any], method: str) -> tuple[int, int, int, int]:
    """What a rank receives and sends, forward and in the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh

    from qkv.distributed import attention
    from qkv.distributed.transport import traffic

    rank, shards = mesh.get_local_rank(), call["shards"]
    B, Hq, Hkv, L, D, Dv, dtype = call["sizes"]
    g = torch.Generator().manual_seed(3)
    whole = [torch.randn(B, H, L, W, generator=g).to(dtype) for H, W in ((Hq, D), (Hkv, D), (Hkv, Dv))]
    q, k, v = (shards.take(x, rank).requires_grad_() for x in whole)
    over = init_device_mesh("cpu", (2, 2)) if method == "hybrid" else mesh
    given: dict[str, Any] = {"mesh": over, "shards": shards, "method": method}
    attention(q, k, v, call["mask"], **given)  # planned: what follows is the call alone
    with traffic() as forward:
        out = attention(q, k, v, call["mask"], **given)
    with traffic() as backward:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return forward.received, forward.sent, backward.received, backward.sent


def agreed(mesh: Any, whole: bool) -> tuple[Machine, Machine]:
    """What a rank is told where each has other figures, and where all have the usual ones: that is remembered."""
    from torch.distributed.device_mesh import init_device_mesh

    from qkv.distributed import machine as module
    from qkv.distributed.transport import groups_of

    over = init_device_mesh("cpu", (2, 2)) if whole else mesh
    rank = mesh.get_local_rank()
    own = Machine(1e9, 1e-4, 1e11 * (1 + rank), 9e10 / (1 + rank), 1e-7 * rank, 1e10 + rank)
    try:
        found, plain = Machine.measured(over, own), Machine.measured(over)
        assert module.known(groups_of("test", over)) == plain
    finally:
        module._KNOWN.clear()  # the mesh is that of other tests, too
    return found, plain


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("whole", [False, True])
def test_ranks_agree_on_what_was_measured(whole: bool) -> None:
    found = on_ranks(4, agreed, whole)
    assert len(set(found)) == 1
    first, plain = found[0]
    assert (first.flops, first.backward, first.row, first.memory) == (1e11, 9e10 / 4, 1e-7 * 3, 1e10)
    assert (plain.flops, plain.backward, plain.row, plain.memory) == (1e11, None, 0.0, None)
    assert 1e6 < first.bandwidth < 1e12
    assert 1e-7 < first.latency < 1


def chosen_there(mesh: Any, machine: Machine) -> str:
    """Which method `attention` runs where these figures were measured: it is told by who talks to whom."""
    from qkv.distributed import attention, machine as module
    from qkv.distributed.transport import groups_of, traffic

    (group,) = groups_of("test", mesh)
    module._KNOWN[group.process_group] = ((group.size,), machine)
    try:
        q = torch.randn(1, 4, 64, 16)
        attention(q, q, q, mesh=mesh)
        with traffic() as seen:
            attention(q, q, q, mesh=mesh)
        return "ulysses" if seen.received < 3 * 64 * 4 * 32 * 4 else "keys"
    finally:
        del module._KNOWN[group.process_group]


@pytest.mark.xdist_group("ranks")
def test_what_was_measured_decides() -> None:
    assert set(on_ranks(4, chosen_there, Machine(1e6, 0.0, 1e12))) == {"ulysses"}
    assert set(on_ranks(4, chosen_there, Machine(1e12, 0.0, 1e6, row=1e-9))) == {"keys"}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses", "hybrid"])
@pytest.mark.parametrize("case", ["zigzag", "uneven", "documents", "half"])
def test_what_is_planned_to_move_is_what_moves(method: str, case: str) -> None:
    L, ranks, dtype, Hq, Hkv = 203, 4, torch.float32, 4, 2
    mask: Any = qkv.causal()
    shards = Shards.zigzag(L, ranks)
    if case == "uneven":
        shards, mask = cut_anywhere(random.Random(5), L, ranks), qkv.window(30, 5)
    elif case == "documents":
        mask = qkv.documents([50, 100, 53]) & qkv.causal()
        shards = qkv.distributed.shards(L, ranks, mask)
    elif case == "half":
        dtype, Hkv = torch.bfloat16, 4
    call = {"mask": mask, "shards": shards, "sizes": (2, Hq, Hkv, L, 16, 24, dtype)}
    shape = (2, 2) if method == "hybrid" else (ranks,)
    found = planned(L, shape, mask, Hq=Hq, Hkv=Hkv, B=2, D=16, Dv=24, dtype=dtype, shards=shards)
    want = [tuple(rank.traffic) for rank in found.costs[method].ranks]
    assert on_ranks(ranks, moved, call, method) == want
