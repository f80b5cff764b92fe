"""The plan: what it says, what it costs, the tiles it counts, and the backends that run or are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkv
from qkv.backends import registry
from qkv.errors import UnsupportedError
from tests.kit import private
from tests.kit.sharp import inputs


def test_plan_says_what_runs() -> None:
    q, k, v = inputs(Lq=512, Lk=512)
    plan = qkv.plan(q, k, v, mask=qkv.causal(), backend="tiled")
    assert plan.backend == "tiled"
    assert {name for name, _ in plan.refused} == {"cpu", "sdpa", "reference"}
    assert (plan.tiles.visible, plan.tiles.full, plan.tiles.total) == (2 * 6, 2 * 2, 2 * 8)
    assert plan.flops == 2 * 2 * 8 * 12 * 128 * 256
    text = str(plan)
    assert "tiled" in text
    assert "12 of 16" in text
    assert "causal()" in text
    assert qkv.plan(q, k).problem.Dv == 8
    assert qkv.plan(q, k, v, softcap=1.0, backend="reference").backend == "reference"
    with pytest.raises(UnsupportedError, match="softcap"):
        qkv.plan(q, k, v, softcap=1.0, backend="sdpa")
    meta = torch.empty(1, 8, 4096, 64, device="meta")
    assert qkv.plan(meta, meta, meta, mask=qkv.causal()).problem.Lq == 4096


def test_a_plan_says_what_a_mask_leaves_and_what_none_would_cost() -> None:
    q, k, v = inputs(B=2, Hq=4, Hkv=2, Lq=300, Lk=300, D=16)
    plan = qkv.plan(q, k, v, mask=qkv.causal() & qkv.strided(3), backend="tiled")
    seen = int((qkv.causal() & qkv.strided(3)).tensor(300, 300).sum())
    assert plan.visible == (8 * seen, 8 * seen)
    assert plan.visible.exact
    assert plan.visible.most <= plan.pairs <= plan.dense.pairs == 8 * 300 * 300
    assert plan.dense.flops == 2 * (16 + 8) * plan.dense.pairs
    assert plan.dense.mask_bytes == 300 * 300
    assert f"{8 * seen:,} of 720,000 visible" in str(plan)
    rows = qkv.plan(q, k, v, mask=qkv.per_head([qkv.causal()] * 3 + [qkv.prefix(7)]) & qkv.padding([300, 9]))
    want = qkv.per_head([qkv.causal()] * 3 + [qkv.prefix(7)]) & qkv.padding([300, 9])
    assert rows.visible.least == int(want.tensor(300, 300, B=2, Hq=4).sum())
    assert rows.dense.mask_bytes == 8 * 300 * 300


def test_pairs_of_a_function_are_bounded_where_they_are_many() -> None:
    q = torch.zeros((), dtype=torch.float32).expand(1, 1, 5000, 8)
    plan = qkv.plan(q, q, q, mask=qkv.mask_mod(lambda b, h, p, j: p % 2 == j % 2) & qkv.causal())
    assert plan.visible == (0, 5000 * 5001 // 2)
    assert "0 to 12,502,500 (bounds: too many to look at each)" in str(plan)
    told: list[int] = []
    found = plan.look(1 << 40, told.append)
    assert found.least == found.most == sum(p // 2 + 1 for p in range(5000))
    assert sum(told) == 5000


@pytest.mark.parametrize(
    "mask",
    [
        qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(4096)),
        qkv.documents([1000] * 1000) & qkv.causal(),
        qkv.longformer(512, [0]),
        qkv.strided(16) & qkv.causal(),
        qkv.dilated(64, 16),
        qkv.chunked(8192) & qkv.causal(),
        qkv.bigbird(64),
    ],
    ids=lambda mask: f"{mask!r:.30}",
)
def test_nothing_of_a_plan_is_in_proportion_to_the_pairs(mask: qkv.Mask) -> None:
    """No tensor of a million tokens' plan has more numbers than a few for each token."""
    from tests.masks.test_intervals import largest_tensor

    q = torch.zeros((), dtype=torch.bfloat16).expand(1, 8, 1_000_000, 64)
    plan = qkv.plan(q, q, q, mask=mask)
    assert largest_tensor(lambda: (plan.tiles, plan.pairs, plan.visible)) <= 1_000_000
    assert plan.visible.exact


@pytest.mark.parametrize(
    "mask",
    [
        qkv.sliding_window(4096),
        qkv.chunked(64) & qkv.causal(),
        qkv.documents([1000] * 1000),
        qkv.bigbird(64),
    ],
    ids=lambda mask: f"{mask!r:.20}",
)
def test_a_plan_of_a_million_tokens_is_cheap(mask: qkv.Mask) -> None:
    import time

    q = torch.zeros(1, 1, 1, 64).expand(1, 8, 1_000_000, 64)
    best, threads = math.inf, torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for a core that another test has is not our time
    try:
        for _ in range(5):
            start = time.process_time()
            plan = qkv.plan(q, q, q, mask=mask)
            assert 0 < plan.tiles.visible < plan.tiles.total / 100
            assert plan.visible.exact
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert best < 0.03  # 10 ms on an idle machine


def _rows(*changed: int) -> torch.Tensor:
    return torch.tensor([list(changed) + list(range(len(changed), 6))])


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (lambda: {}, [dict(scale=0.5), dict(return_lse=True), dict(backend="reference"), dict(backend="tiled")]),
        (lambda: dict(mask=qkv.causal() & qkv.padding([3])), [dict(mask=qkv.causal())]),
        (lambda: dict(bias=torch.randn(6, 6)), [dict(bias=torch.randn(6, 1)), {}]),
        (lambda: dict(mask=qkv.causal(), positions=_rows(0)), [dict(mask=qkv.causal(), positions=_rows(1)), {}]),
        (lambda: dict(mask=qkv.causal(), positions=3), [dict(mask=qkv.causal(), positions=4)]),
    ],
    ids=["plain", "mask", "bias", "positions", "offset"],
)
def test_plans_of_equal_calls_are_equal(options: Callable[[], dict[str, Any]], others: list[dict[str, Any]]) -> None:
    one, two = qkv.plan(*inputs(Lq=6, Lk=6), **options()), qkv.plan(*inputs(Lq=6, Lk=6), **options())
    assert one == two
    assert hash(one) == hash(two)
    assert str(one) == str(two)  # and asking a plan what it says changes neither
    assert (one, hash(one)) == (two, hash(two))
    unlike = [qkv.plan(*inputs(Lq=6, Lk=6), **other) for other in others] + [qkv.plan(*inputs(Lq=6, Lk=7))]
    assert len({one, two, *unlike}) == 1 + len(unlike)


def test_a_plan_stays_what_it_was_when_positions_change() -> None:
    rows = _rows(0)
    plan = qkv.plan(*inputs(Lq=6, Lk=6), mask=qkv.causal(), positions=rows, backend="tiled")
    before = qkv.plan(*inputs(Lq=6, Lk=6), mask=qkv.causal(), positions=rows.clone(), backend="tiled")
    rows -= 9
    assert plan == before
    assert plan.tiles == before.tiles
    assert plan != qkv.plan(*inputs(Lq=6, Lk=6), mask=qkv.causal(), positions=rows, backend="tiled")


SHUFFLED = torch.randint(-5, 90, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "positions", ["start", "end", -7, [3, 50], SHUFFLED], ids=["start", "end", "-7", "rows", "shuffled"]
)
def test_counted_tiles_are_those_of_the_mask(positions: Any) -> None:
    from qkv.backends.tiled.schedule import HeadRow, Schedule, count_tiles
    from qkv.masks import read_positions

    Lq, Lk, T, K = 40, 70, 8, 16
    mask = (qkv.causal() & qkv.sliding_window(20)) | qkv.prefix(3)
    dense = mask.tensor(Lq, Lk, positions=positions, B=2)
    reading = read_positions("test", positions, 2, Lq)
    tensor = reading if isinstance(reading, torch.Tensor) else None
    visible = full = 0
    for b in range(2):
        blocks = [[dense[b, 0, i : i + T, j : j + K] for j in range(0, Lk, K)] for i in range(0, Lq, T)]
        offset = (
            {"start": 0, "end": Lk - Lq}.get(reading, 0)
            if isinstance(reading, str)
            else 0
            if tensor is not None
            else reading[b if len(reading) > 1 else 0]
        )
        view = HeadRow(b, 0, offset, None if tensor is None else tensor[b])
        schedule = Schedule(mask, [view], Lq, Lk, T, K)
        for t, row in enumerate(blocks):
            found = {key.start // K: key.full for key in schedule.keys(t)}
            for j, block in enumerate(row):
                if tensor is None:  # exact for consecutive positions
                    assert (j in found) == bool(block.any())
                    assert found.get(j, False) == bool(block.all())
                else:
                    assert j in found or not block.any()
                    assert bool(block.all()) or not found.get(j, False)
        count = count_tiles(mask, [view], Lq, Lk, T, K)
        assert count.visible == sum(len(list(schedule.keys(t))) for t in range(len(blocks)))
        assert count.full == sum(key.full for t in range(len(blocks)) for key in schedule.keys(t))
        visible, full = visible + count.visible, full + count.full
    assert visible >= full


def test_a_missing_native_backend_is_said_once(monkeypatch: pytest.MonkeyPatch, nothing_kept: None) -> None:
    import warnings

    private.use_backend(monkeypatch, "cpu", ImportError("no module"))
    private.warn_again(monkeypatch)
    q, k, v = inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qkv.attention(q, k, v)
        qkv.attention(q, k, v, mask=qkv.causal(), positions="end")
    assert len(caught) == 1
    assert "native" in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    with pytest.raises(UnsupportedError, match="native"):
        qkv.attention(q, k, v, backend="cpu:avx2")


def test_sdpa_when_nothing_is_lacking() -> None:
    q, k, v = inputs(Hq=4, Hkv=2, Lq=6, Lk=6, grad=True)
    for mask in (None, qkv.causal()):
        out = qkv.attention(q, k, v, mask=mask, backend="sdpa")
        want = qkv.attention(q, k, v, mask=mask)
        assert torch.allclose(out, want, atol=1e-5)
        grads = (torch.autograd.grad(x, (q, k, v), torch.ones_like(x)) for x in (out, want))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert "not promised" in str(qkv.plan(q, k, v, backend="sdpa"))
    for lacking in (
        dict(softcap=2.0),
        dict(return_lse=True),
        dict(mask=qkv.prefix(2)),
        dict(sinks=torch.zeros(4)),
        dict(dropout_p=0.1),
    ):
        with pytest.raises(UnsupportedError, match="sdpa"):
            qkv.attention(q, k, v, backend="sdpa", **lacking)


def test_plan_says_what_differentiates() -> None:
    q = torch.randn(1, 2, 8, 16)
    further = "second derivatives and forward mode: tiled; third: only by backend='reference'"
    assert qkv.plan(q, q, q, backend="tiled").gradients == f"tiled; {further}"
    assert qkv.plan(q, q, q, backend="reference").gradients == "reference, by autograd through its own operations"
    dropped = qkv.plan(q, q, q, dropout_p=0.5)
    assert dropped.backend == qkv.plan(q, q, q).backend
    if registry.load("cpu").supports(qkv.plan(q, q, q).problem) is None:
        plan = qkv.plan(q, q, q, backend="cpu")
        assert plan.gradients == f"cpu, by its own backward pass; {further}"
        assert f"gradients {plan.gradients}" in str(plan)
        many = qkv.plan(q, q, q, bias=sum((qkv.alibi(torch.ones(2)) for _ in range(16)), qkv.alibi(torch.ones(2))))
        assert many.gradients == f"tiled (it differentiates at most 16 score terms); {further}"
