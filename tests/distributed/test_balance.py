"""Shards that equal the work: what they come to, counted again from the mask's own table, and what is asked of them."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
import torch

import qkv
from qkv.distributed import Shards, balance, shards
from qkv.distributed.work import Sight, cells, lacking, owned, profile, visible
from tests.kit.mask_specs import seeds

MILLION = 1_000_000


def table(mask: qkv.Mask | None, L: int, B: int = 1, Hq: int = 1) -> torch.Tensor:
    """Every pair: (B, Hq, L, L)."""
    if mask is None:
        return torch.ones(B, Hq, L, L, dtype=torch.bool)
    return mask.tensor(L, L, B=B, Hq=Hq).expand(B, Hq, L, L)


def drawn(rng: random.Random, L: int) -> qkv.Mask | None:
    """A mask for L queries and keys, B = 2 and Hq = 2."""
    lengths = [len(part) for part in _parts(rng, L)]
    ids = torch.tensor(
        [[n for n, part in enumerate(_parts(rng, L)) for _ in part] for _ in range(2)], dtype=torch.int64
    )
    return rng.choice(
        [
            None,
            qkv.causal(),
            qkv.sliding_window(rng.randint(1, L + 3)),
            qkv.documents(lengths) & qkv.causal(),
            qkv.documents(segment_ids=ids.reshape(2, L)),
            qkv.strided(rng.randint(1, 5)) & qkv.causal(),
            qkv.causal() | qkv.prefix(rng.randint(0, L)),
            qkv.causal() & (qkv.global_tokens([0, L // 3]) | qkv.sliding_window(4)),
            qkv.per_head([qkv.causal(), qkv.sliding_window(3)]),
            qkv.chunked(rng.randint(1, 9)),
            qkv.dense(torch.rand(L, L, generator=torch.Generator().manual_seed(rng.randint(0, 99))) < 0.3),
        ]
    )


def _parts(rng: random.Random, L: int) -> list[range]:
    cuts = sorted({0, L, *(rng.randint(0, L) for _ in range(rng.randint(0, 6)))})
    return [range(a, z) for a, z in pairwise(cuts)]


@seeds(80)
def test_work_and_missing_keys_are_those_of_the_masks_table(seed: int) -> None:
    rng = random.Random(f"work {seed}")
    L, ranks = rng.choice([0, 1, 2, 7, 40, 61]), rng.choice([1, 2, 3, 4, 9])
    mask = drawn(rng, L)
    call = Sight(mask, 2, 2, L, L)
    held = shards(L, ranks, mask, batch=2, heads=2, slack=rng.choice([0.0, 0.25, 1.0]))
    every = table(mask, L, 2, 2)
    conservative = any(name in repr(mask) for name in ("strided", "dense"))
    where = owned(held.ranges)
    lacked = lacking(visible(call, where), where, ranks, L)
    keys = torch.tensor(sorted({0, L, *(rng.randint(0, L) for _ in range(3))}) if L else [0, 0])
    order = where.start.argsort()
    found = cells(call, torch.stack((where.start[order], where.stop[order])), keys)
    assert found.exact
    assert int(found.pairs.sum()) == int(every.sum()) == profile(call, 4).total
    for rank in range(ranks):
        rows = held.positions(rank)
        mine = found.pairs[where.rank[order] == rank].sum(0)
        want = [int(every[:, :, rows, a:z].sum()) for a, z in pairwise(keys.tolist())]
        assert mine.tolist() == want, f"{mask!r} {held}"
        seen = every[:, :, rows].any(2).any(0).any(0)
        seen[rows] = False
        assert int(lacked[rank]) >= int(seen.sum())
        assert conservative or int(lacked[rank]) == int(seen.sum()), f"{mask!r} {held}"


@seeds(60)
def test_every_row_is_held_once_and_no_rank_holds_too_many(seed: int) -> None:
    rng = random.Random(f"rows {seed}")
    L, ranks, slack = rng.choice([0, 1, 3, 50, 1000, 4099]), rng.choice([1, 2, 3, 5, 8, 33]), rng.choice([0, 0.1, 0.25])
    held = shards(L, ranks, drawn(rng, L) if L <= 1000 else qkv.causal(), batch=2, heads=2, slack=slack)
    assert held.ranks == ranks
    assert torch.cat([held.positions(rank) for rank in range(ranks)]).sort().values.tolist() == list(range(L))
    share = -(-L // ranks)
    assert max(held.rows(rank) for rank in range(ranks)) <= max(share, int(share * (1 + slack)))


def work(mask: qkv.Mask | None, held: Shards) -> list[float]:
    call = Sight(mask, 1, 1, held.length, held.length)
    return balance.weighed(call, profile(call, 1 << 14), held).pairs.tolist()


def excess(mask: qkv.Mask | None, held: Shards) -> float:
    """The slowest rank's work beyond an equal share."""
    each = work(mask, held)
    return max(each) * len(each) / sum(each) - 1


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_masks_that_have_a_known_answer_get_it(ranks: int) -> None:
    assert shards(MILLION, ranks) == Shards.contiguous(MILLION, ranks)
    assert shards(MILLION, ranks, qkv.causal()) == Shards.zigzag(MILLION, ranks)
    window = shards(MILLION, ranks, qkv.sliding_window(2048))
    assert window == Shards.contiguous(MILLION, ranks)
    assert shards(MILLION, ranks, qkv.chunked(8)) == Shards.contiguous(MILLION, ranks)


def lognormal(count: int, spread: float, seed: int) -> list[int]:
    rng = random.Random(f"documents {count} {seed}")
    size = [rng.lognormvariate(0, spread) for _ in range(count)]
    found = [int(x / sum(size) * MILLION) for x in size]
    found[-1] += MILLION - sum(found)
    return found


GIANT = [500] * 500 + [500_000] + [500] * 500
DOCUMENTS = {
    "three long": [300_000, 500_000, 200_000],
    "eight": [125_000] * 8,
    "twelve uneven": lognormal(12, 1.0, 0),
    "forty very uneven": lognormal(40, 1.5, 1),
    "three thousand": lognormal(3000, 1.0, 2),
    "a giant among a thousand": GIANT,
    "a giant first": [300_000] + [1000] * 700,
    "two giants": [1000] * 100 + [300_000] + [1000] * 300 + [200_000] + [1000] * 100,
}


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_documents_are_within_four_percent_of_an_equal_share(ranks: int, lengths: list[int]) -> None:
    mask = qkv.documents(lengths) & qkv.causal()
    held = shards(MILLION, ranks, mask)
    assert excess(mask, held) <= 0.04
    assert max(map(len, held.ranges)) <= 8
    assert max(held.rows(rank) for rank in range(ranks)) <= 1.25 * MILLION / ranks + 1


def test_equal_documents_move_nothing() -> None:
    for ranks in (2, 4, 8):
        mask = qkv.documents([MILLION // 8] * 8) & qkv.causal()
        call, held = Sight(mask, 1, 1, MILLION, MILLION), shards(MILLION, ranks, mask)
        where = owned(held.ranges)
        assert int(lacking(visible(call, where), where, ranks, MILLION).sum()) == 0


def test_a_window_that_is_long_is_cut_by_work_as_far_as_rows_allow() -> None:
    mask = qkv.sliding_window(300_000)
    held = shards(MILLION, 3, mask)
    assert max(map(len, held.ranges)) == 1
    assert excess(mask, held) <= 0.03


def test_short_documents_are_cut_between_them() -> None:
    """Thousands of short documents: few of them are on two ranks."""
    mask = qkv.documents(lognormal(4000, 0.5, 3)) & qkv.causal()
    call, held = Sight(mask, 1, 1, MILLION, MILLION), shards(MILLION, 4, mask)
    where = owned(held.ranges)
    assert int(lacking(visible(call, where), where, 4, MILLION).sum()) <= MILLION // 250
    assert max(map(len, held.ranges)) == 1


def test_documents_of_each_batch_row_are_summed() -> None:
    """Long documents on the left of one row and on the right of the other: each is uneven, both together are not."""
    left = [0] * 500 + list(range(1, 501))
    ids = torch.tensor([left, left[::-1]])
    mask = qkv.documents(segment_ids=ids)
    assert shards(1000, 2, mask, batch=2) == Shards.contiguous(1000, 2)
    alone = shards(1000, 2, qkv.documents(segment_ids=ids[0]), slack=1.0)
    assert alone.rows(0) != 500 or len(alone.ranges[0]) > 1


def test_heads_of_other_masks_are_summed() -> None:
    mask = qkv.per_head([qkv.causal(), qkv.sliding_window(1)])
    held = shards(1000, 2, mask, heads=2)
    each = [int(table(mask, 1000, 1, 2)[:, :, held.positions(rank)].sum()) for rank in range(2)]
    assert max(each) <= 1.01 * sum(each) / 2


def test_shards_are_the_same_whenever_they_are_asked_for() -> None:
    mask = qkv.documents(lognormal(300, 1.0, 4)) & qkv.causal()
    first = shards(MILLION, 8, mask)
    balance.balance.cache_clear()
    torch.manual_seed(17)
    assert shards(MILLION, 8, qkv.documents(lognormal(300, 1.0, 4)) & qkv.causal()) == first


def test_thousands_of_documents_take_less_than_a_tenth_of_a_second() -> None:
    mask = qkv.documents(lognormal(5000, 1.0, 5)) & qkv.causal()
    taken = []
    for _ in range(3):
        balance.balance.cache_clear()
        start = time.thread_time()
        shards(MILLION, 64, mask)
        taken.append(time.thread_time() - start)
    assert min(taken) < 0.1 * SLOWER
    start = time.thread_time()
    shards(MILLION, 64, mask)
    assert time.thread_time() - start < min(taken) / 10


SLOWER = 3  # machines that tests may run on


def test_four_thousand_ranks_and_a_hundred_million_tokens() -> None:
    lengths = [x * 100 for x in lognormal(1000, 1.0, 6)]
    for mask in (None, qkv.causal(), qkv.sliding_window(4096), qkv.documents(lengths) & qkv.causal()):
        balance.balance.cache_clear()
        start = time.thread_time()
        held = shards(100 * MILLION, 4096, mask)
        assert time.thread_time() - start < 1.0 * SLOWER
        assert excess(mask, held) <= 0.1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"length": -1}, "length"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": "four"}, "a number or a DeviceMesh"),
        ({"mask": "causal"}, "Write it as a call"),
        ({"slack": -0.5}, "slack=0.25"),
        ({"slack": "much"}, "slack must be a number"),
        ({"mask": qkv.documents([3, 4])}, "lengths must sum exactly"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(qkv.QKVError, match=words):
        shards(**({"length": 8, "ranks": 2} | given))  # type: ignore[arg-type]
