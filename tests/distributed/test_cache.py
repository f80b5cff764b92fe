"""A paged cache on several ranks: against attention written out in float64, and a cache of one process."""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import qkv
from qkv.distributed import ShardedCache, Shards
from qkv.distributed.transport import traffic
from qkv.masks import Mask
from tests.kit.ranks import on_own_ranks, on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

HKV, D, DV = 2, 8, 12
MASKS: dict[str, Any] = {
    "none": None,
    "causal": qkv.causal(),
    "window": qkv.sliding_window(9),
    "streaming": qkv.causal() & (qkv.prefix(3) | qkv.sliding_window(11)),
    "strided": qkv.causal() & qkv.strided(3),
    "chunks": qkv.chunked(13) & qkv.causal(),
    "global": qkv.causal() & (qkv.global_tokens([0, 17]) | qkv.sliding_window(2)),
    "random": qkv.random_blocks(2, 5, 1),
    "heads": qkv.per_head([qkv.causal(), qkv.sliding_window(4), ~qkv.strided(2), qkv.prefix(20)]),
    "nothing": qkv.prefix(0),
    "first keys": qkv.prefix(2),
    "function": qkv.mask_mod(lambda b, h, p, j: (j <= p) & ((p + j) % 3 != 0)),
}


def cache_of(mesh: DeviceMesh, **options: Any) -> ShardedCache:
    options = dict(pages=64, num_kv_heads=HKV, head_dim=D, value_dim=DV, page_size=4, dtype=torch.float32) | options
    return ShardedCache(mesh=mesh, debug=True, **options)


def rows(gen: torch.Generator, n: int, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(n, HKV, T, width, generator=gen) * 2 for width in (D, DV))
    return k.to(dtype), v.to(dtype)


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, slopes: Any = None, sinks: Any = None) -> Any:
    """One sequence, q (Hq, T, D) at its end: out and lse in float64."""
    Hq, T, _ = q.shape
    L = k.shape[1]
    keys, values = (x.double().repeat_interleave(Hq // HKV, 0) for x in (k, v))
    scores = q.double() @ keys.mT * D**-0.5
    if slopes is not None:
        distance = (torch.arange(L - T, L)[:, None] - torch.arange(L)).abs()
        scores = scores - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
    if mask is not None:
        scores = scores.masked_fill(~mask.tensor(T, L, "end", Hq=Hq)[0], -torch.inf)
    extra = torch.full((Hq, T, 1), -torch.inf) if sinks is None else sinks.double()[:, None, None].expand(Hq, T, 1)
    lse = torch.cat((scores, extra), -1).logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    return weights @ values, lse


def digest(parts: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in parts)).hexdigest()


# --------------------------------------------------------------------------------------- steps of all kinds
def live(mesh: DeviceMesh, seed: int, dtype: torch.dtype, page_size: int) -> str:
    """Sequences come, grow, fork, shrink and go; after each step all of them attend, by a mask of some kind."""
    rng, gen = random.Random(f"live {seed}"), torch.Generator().manual_seed(seed)
    cache, stripe, found = cache_of(mesh, page_size=page_size, dtype=dtype), mesh.size() * page_size, []
    held: dict[Any, tuple[Tensor, Tensor]] = {}
    for _ in range(14):
        what = rng.choice(["add", "grow", "grow", "grow", "fork", "truncate", "free"]) if held else "add"
        if what == "add":
            held[cache.add()] = (torch.empty(HKV, 0, D, dtype=dtype), torch.empty(HKV, 0, DV, dtype=dtype))
        chosen = rng.sample(list(held), rng.randint(1, len(held)))
        if what == "fork":
            held[cache.fork(chosen[0])] = held[chosen[0]]
        elif what == "truncate":
            left = rng.randint(0, chosen[0].length)
            cache.truncate(chosen[0], left)
            held[chosen[0]] = tuple(x[:, :left] for x in held[chosen[0]])  # type: ignore[assignment]
        elif what == "free" and len(held) > 1:
            cache.free(chosen[0])
            del held[chosen[0]], chosen[0]
        T = rng.choice([1, 1, 2, page_size, stripe - 1, stripe, stripe + 1, rng.randint(1, 3 * stripe)])
        if chosen:
            k, v = rows(gen, len(chosen), T, dtype)
            cache.append(chosen, k, v)
            for seq, *more in zip(chosen, k, v, strict=True):
                held[seq] = tuple(torch.cat(pair, 1) for pair in zip(held[seq], more, strict=True))  # type: ignore
        found += compare(cache, held, rng, gen, dtype)
    return digest(found)


def compare(cache: Any, held: Any, rng: random.Random, gen: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    seqs = [seq for seq in held if seq.length]
    if not seqs:
        return []
    T = rng.choice([1, 1, min(seq.length for seq in seqs)])
    name, Hq = rng.choice(list(MASKS)), 4
    q = (torch.randn(len(seqs), Hq, T, D, generator=gen) * 2).to(dtype)
    slopes = rng.choice([None, [0.5, 0.1, 0.02, 0.3]])
    sinks = rng.choice([None, torch.tensor([0.5, -torch.inf, 3.0, -2.0])])
    bias = None if slopes is None else qkv.alibi(slopes)
    out, lse = qkv.attention(q, cache.view(seqs), mask=MASKS[name], bias=bias, sinks=sinks, return_lse=True)
    assert out.dtype == dtype
    for i, seq in enumerate(seqs):
        want, want_lse = truth(q[i], *held[seq], MASKS[name], slopes, sinks)
        error = 4e-5 if dtype == torch.float32 else 2e-12 if dtype == torch.float64 else 0.05
        assert torch.allclose(out[i].double(), want, atol=error, rtol=error), f"{name} of {seq}"
        assert torch.allclose(lse[i].double(), want_lse, atol=1e-4, rtol=1e-5), f"lse, {name} of {seq}"
    return [out, lse]


@pytest.mark.parametrize(
    ("ranks", "seed", "dtype", "page_size"),
    [
        (2, 0, torch.float32, 4),
        (2, 1, torch.float32, 16),
        (2, 2, torch.bfloat16, 16),
        (3, 3, torch.float32, 3),
        (3, 4, torch.float64, 4),
        (4, 5, torch.float32, 4),
        (4, 6, torch.float32, 1),
        (1, 7, torch.float32, 4),
    ],
)
def test_a_life_of_sequences(ranks: int, seed: int, dtype: torch.dtype, page_size: int) -> None:
    first, again = (on_ranks(ranks, live, seed, dtype, page_size) for _ in range(2))
    assert len({*first, *again}) == 1, "the same bits on every rank, and from run to run"


# ------------------------------------------------------------------------------- beside a cache of one process
def beside(mesh: DeviceMesh, storage: torch.dtype | None, window: int | None) -> None:
    """Two layers, ragged steps: what one process has in one pool, to rounding."""
    gen, options = torch.Generator().manual_seed(3), dict(layers=2, storage=storage, window=window)
    if window is not None:
        options["sinks"] = 3
    cache = cache_of(mesh, **options)
    plain = qkv.cache.PagedCache(
        pages=200, num_kv_heads=HKV, head_dim=D, value_dim=DV, page_size=4, dtype=torch.float32, **options
    )
    mask = qkv.causal() if window is None else qkv.causal() & (qkv.prefix(3) | qkv.sliding_window(window))
    mine, theirs = ([c.add() for _ in range(3)] for c in (cache, plain))
    for counts in ([19, 1, 7], [1, 0, 30], [5, 40, 1], *[[1, 1, 1]] * 9):
        one, other = cache.step(mine, lengths=counts), plain.step(theirs, lengths=counts)
        assert torch.equal(one.positions, other.positions)
        for layer in range(2):
            k, v = rows(gen, 1, sum(counts))
            q = torch.randn(1, 4, sum(counts), D, generator=gen)
            found = []
            for step in (one, other):
                at = step.layer(layer)
                at.append(k, v)
                found.append(qkv.attention(q, at.view(), mask=mask, return_lse=True))
            for a, b in zip(*found, strict=True):
                assert torch.allclose(a, b, atol=2e-5, rtol=2e-5), (counts, layer)
    assert [seq.length for seq in mine] == [seq.length for seq in theirs]
    if window is not None:
        assert mine[1].pages.count(-1) > 0


@pytest.mark.parametrize("storage", [None, torch.int8])
@pytest.mark.parametrize("window", [None, 10])
def test_beside_a_cache_of_one_process(storage: torch.dtype | None, window: int | None) -> None:
    on_ranks(3, beside, storage, window)


def far(mesh: DeviceMesh, dtype: torch.dtype, backend: str | None) -> tuple[Tensor, Tensor]:
    """Scores of 1e5 that differ by about 1 between keys on different ranks, each exact in float32."""
    gen, n = torch.Generator().manual_seed(4), 24
    cache, (_, v) = cache_of(mesh, dtype=dtype), rows(gen, 1, n, dtype)
    k = torch.zeros(1, HKV, n, D, dtype=dtype)
    k[..., 0], k[..., 1] = 1.0, ((torch.arange(n) * 7) % 9 - 4).to(dtype) / 2
    q = torch.zeros(1, 4, 1, D, dtype=dtype)
    q[..., 0], q[..., 1] = 2.0**19, 3.0
    seq = cache.add()
    cache.append([seq], k, v)
    # A scale that is a power of 2 rounds nothing.
    want, _ = truth(q[0].double() * 0.25 * D**0.5, k[0], v[0], None)
    return qkv.attention(q, cache.view([seq]), scale=0.25, backend=backend), want


@pytest.mark.parametrize("backend", [None, "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_are_joined_by_rows_states(dtype: torch.dtype, backend: str | None) -> None:
    """An lse of 1e5 is known to 0.004 in float32, and the share of a rank's keys no better."""
    for out, want in on_ranks(3, far, dtype, backend):
        error = 2e-5 if dtype == torch.float32 else 1e-10
        assert torch.allclose(out[0].double(), want, atol=error, rtol=error)


def tainted(mesh: DeviceMesh, value: float) -> Tensor:
    """A visible value that is no number, on a rank whose keys have a weight of e^-2000: 0 in float64, too."""
    gen = torch.Generator().manual_seed(2)
    cache, (k, v) = cache_of(mesh), rows(gen, 1, 8)
    k[..., 0], v[:, :, 6] = torch.where(torch.arange(8) < 4, 2000.0, 0.0), value
    q = torch.zeros(1, 4, 1, D)
    q[..., 0] = D**0.5
    seq = cache.add()
    cache.append([seq], k, v)
    return qkv.attention(q, cache.view([seq]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_visible_value_that_is_no_number_is_not_hidden(value: float) -> None:
    """0 * nan is nan, as in one process; only what is hidden does not count."""
    for out in on_ranks(2, tainted, value):
        assert bool(out.isnan().all())


def differing(mesh: DeviceMesh, what: str) -> str:
    """Queries, a mask or rows to append that another rank has otherwise."""
    gen, rank = torch.Generator().manual_seed(2), mesh.get_local_rank()
    cache, (k, v) = cache_of(mesh), rows(gen, 1, 8)
    seq = cache.add()
    try:
        if what == "append":
            shards = Shards([[(0, 8)], []] if rank else [[(0, 4)], [(4, 8)]])
            mine = shards.rows(rank)
            cache.append([seq], k[:, :, :mine], v[:, :, :mine], shards=shards)
            return ""
        cache.append([seq], k, v)
        q = torch.randn(1, 4, 2 if rank and what == "queries" else 1, D + 1 if rank and what == "width" else D)
        mask = qkv.sliding_window(3) if rank and what == "mask" else qkv.causal()
        qkv.attention(q, cache.view([seq]), mask=mask)
    except qkv.QKVError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("what", ["queries", "mask", "append", "width"])
def test_ranks_that_make_other_calls_are_told(what: str) -> None:
    said = on_ranks(2, differing, what)
    if what == "width":
        assert [text.split(":")[0] for text in said] == ["RankError", "ShapeError"], said
    else:
        assert all("all ranks must make the same call" in text for text in said), said
    assert on_ranks(2, differing, "") == ["", ""]


def modelled(mesh: DeviceMesh) -> list[Tensor]:
    """Layers of a model take a step of it as any other."""
    torch.manual_seed(0)
    layers = [qkv.nn.Attention(32, 4, num_kv_heads=2, rotary=qkv.rotary.Rotary(8), mask=qkv.causal()) for _ in range(2)]
    cache = ShardedCache(mesh=mesh, pages=8, layers=2, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32)
    x, seq, found = torch.randn(1, 21, 32), cache.add(), []
    with torch.inference_mode():
        want = x
        for layer in layers:
            want = layer(want)
        for part in x.split([13, 1, 1, 6], 1):
            step = cache.step([seq], T=part.shape[1])
            for i, layer in enumerate(layers):
                part = layer(part, cache=step.layer(i))
            found.append(part)
    assert torch.allclose(torch.cat(found, 1), want, atol=1e-5)
    return found


def test_layers_of_a_model_take_it() -> None:
    on_ranks(2, modelled)


# --------------------------------------------------------------------------------------- what is stored where
def placed(mesh: DeviceMesh, ranges: Any) -> tuple[str, int]:
    """Rows from those who hold them, and rows that all have, lie at the same places."""
    gen, shards, rank = torch.Generator().manual_seed(1), Shards(ranges), mesh.get_local_rank()
    caches = [cache_of(mesh, layers=2) for _ in range(2)]
    all_seqs = [[c.add(), c.add()] for c in caches]
    k, v = rows(gen, 1, 5)
    for c, seqs in zip(caches, all_seqs, strict=True):  # of other lengths: their pages begin elsewhere
        for layer in range(2):
            c.append(seqs[:1], k, v, layer)
    with traffic() as moved:
        for layer in range(2):
            k, v = rows(gen, 2, shards.length)
            caches[0].append(all_seqs[0], k, v, layer)
            caches[1].append(all_seqs[1], *(shards.take(x, rank) for x in (k, v)), layer, shards=shards)
    kept = [[plane.data.nan_to_num(9.0) for planes in c._storage.planes for plane in planes] for c in caches]
    for a, b in zip(*kept, strict=True):
        assert torch.equal(a, b)
    return digest(kept[0]), moved.sent


@pytest.mark.parametrize(
    "shards", [Shards.contiguous(30, 3), Shards.zigzag(31, 3), Shards([[], [(0, 20)], [(20, 29)]])]
)
def test_rows_move_to_the_ranks_that_store_them(shards: Shards) -> None:
    found = on_ranks(3, placed, shards.ranges)
    assert len({text for text, _ in found}) == 3
    assert sum(sent for _, sent in found) <= 2 * 2 * shards.length * HKV * (D + DV) * 4, "each row moves at most once"


def prefilled(mesh: DeviceMesh) -> list[Tensor]:
    """A prompt computed in shards, stored from where its rows are, and gone on with."""
    gen, rank, L = torch.Generator().manual_seed(4), mesh.get_local_rank(), 45
    shards, cache, mask = Shards.zigzag(L, mesh.size()), cache_of(mesh), MASKS["streaming"]
    k, v = rows(gen, 1, L)
    q = torch.randn(1, 4, L, D, generator=gen) * 2
    mine = [shards.take(x, rank) for x in (q, k, v)]
    out = qkv.distributed.attention(*mine, mask=mask, mesh=mesh, shards=shards)
    want, _ = truth(q[0], k[0], v[0], mask)
    assert torch.allclose(out[0].double(), shards.take(want, rank, dim=1), atol=4e-5)
    seq, found = cache.add(), []
    cache.append([seq], *mine[1:], shards=shards)
    for _ in range(6):
        more = rows(gen, 1, 1)
        k, v = (torch.cat(pair, 2) for pair in zip((k, v), more, strict=True))
        q = torch.randn(1, 4, 1, D, generator=gen) * 2
        cache.append([seq], *more)
        found.append(qkv.attention(q, cache.view([seq]), mask=mask))
        want, _ = truth(q[0], k[0], v[0], mask)
        assert torch.allclose(found[-1][0].double(), want, atol=4e-5)
    return found


def test_a_prompt_in_shards_is_gone_on_with() -> None:
    found = on_ranks(3, prefilled)
    assert len({digest(parts) for parts in found}) == 1


def balanced(mesh: DeviceMesh) -> Any:
    cache, gen = cache_of(mesh), torch.Generator().manual_seed(0)
    seqs, lengths = [cache.add() for _ in range(4)], [1, 15, 16, 51]
    for seq, length in zip(seqs, lengths, strict=True):
        cache.append([seq], *rows(gen, 1, length))
    stats = cache.stats()
    assert stats.tokens == sum(lengths) == sum(part.tokens for part in stats.ranks)
    assert stats.bytes == sum(part.bytes for part in stats.ranks) == cache._storage.bytes * mesh.size()
    assert stats.bytes == stats.pages * stats.page_size * stats.bytes_per_token
    assert stats.pages_used * stats.page_size == stats.tokens + stats.waste_tokens
    assert "rank 1" in str(stats)
    views = [cache.view([seq]).own.layout.tables for seq in seqs]
    cut = cache.fork(seqs[3])
    cache.free(seqs)
    for left in (37, 18, 3):  # what is past it is NaN on all ranks
        cache.truncate(cut, left)
        for plane in cache._storage.planes[0]:
            written = (~plane.data.isnan()).all(-1).sum()
            assert written == cache.stats().ranks[mesh.get_local_rank()].tokens * HKV
    return [[sum(page >= 0 for page in table) for table in views], [part.tokens for part in stats.ranks]]


def test_ranks_hold_equally_much_of_each_sequence() -> None:
    found = on_ranks(4, balanced)
    for pages in zip(*(pages for pages, _ in found), strict=True):
        assert max(pages) - min(pages) <= 1
    assert [sum(pages) for pages in zip(*(pages for pages, _ in found), strict=True)] == [1, 4, 4, 13]
    assert all(tokens == found[0][1] for _, tokens in found)


# -------------------------------------------------------------------------------------------------- what fails
def full(mesh: DeviceMesh) -> tuple[Any, ...]:
    cache, gen = cache_of(mesh, pages=3), torch.Generator().manual_seed(0)
    a, b = cache.add(), cache.add()
    cache.append([a], *rows(gen, 1, 9))
    before = (a.pages, a.length, b.pages, cache.stats())
    # The next token of one would lie on the last rank's page: the others have room, and refuse as well.
    with pytest.raises(qkv.PagesExhausted):
        cache.append([a, b], *rows(gen, 2, 9))
    assert (a.pages, a.length, b.pages, cache.stats()) == before
    cache.append([b], *rows(gen, 1, 3))
    return a.pages, b.pages


def test_a_full_pool_is_full_on_all_ranks() -> None:
    assert len(set(on_ranks(2, full))) == 1


def shared(mesh: DeviceMesh) -> tuple[int, int]:
    cache, gen, prompt = cache_of(mesh), torch.Generator().manual_seed(0), list(range(40))
    a = cache.add(tokens=prompt)
    cache.append([a], *rows(gen, 1, 40))
    b = cache.add(tokens=[*prompt[:30], 7, 7])
    assert b.cached_tokens == 24
    k, v = rows(gen, 1, 8)
    cache.append([b], k, v)
    q = torch.randn(2, 4, 1, D, generator=gen)
    one = qkv.attention(q, cache.view([a, b]))
    cache.swap_out(a)
    cache.swap_in(a)
    assert torch.equal(qkv.attention(q, cache.view([a, b])), one)
    stats = cache.stats()
    return stats.pages_shared, stats.tokens


def test_prefixes_are_shared_on_all_ranks() -> None:
    assert on_ranks(3, shared) == [(6, 40 + 8)] * 3


def left(mesh: DeviceMesh) -> str:
    """The last rank goes; the others say what they waited for."""
    cache = cache_of(mesh)
    seq = cache.add()
    cache.append([seq], *rows(torch.Generator().manual_seed(0), 1, 9))
    if mesh.get_local_rank() == 2:
        return "gone"
    with pytest.raises(qkv.RankError, match=r"rank [01] of 3 could not finish agreeing on the call") as told:
        qkv.attention(torch.zeros(1, 4, 1, D), cache.view([seq]))
    return str(told.value)


def test_a_rank_that_makes_no_step_is_an_error_within_the_timeout() -> None:
    begun = time.monotonic()
    found = on_own_ranks(3, left, timeout=4.0)
    assert found[2] == "gone"
    assert time.monotonic() - begun < 60
    assert "A rank has died" in found[0]


def refused(mesh: DeviceMesh) -> None:
    cache, gen = cache_of(mesh), torch.Generator().manual_seed(0)
    seq, rank = cache.add(), mesh.get_local_rank()
    k, v = rows(gen, 1, 6)
    cache.append([seq], k, v)
    view, q = cache.view([seq]), torch.randn(1, 4, 1, D)
    with pytest.raises(qkv.ShapeError, match="head size"):
        qkv.attention(q[..., :-1], view)
    with pytest.raises(qkv.UnsupportedError, match="no gradients"):
        qkv.attention(q, view, sinks=torch.zeros(4, requires_grad=True))
    with pytest.raises(qkv.ArgumentTypeError):
        qkv.weights(q, view, rows=[0])
    with pytest.raises(qkv.ArgumentTypeError, match="Shards"):
        cache.append([seq], k, v, shards=[[(0, 6)]])  # type: ignore[arg-type]
    with pytest.raises(qkv.ArgumentError, match="shards of 3 ranks"):
        cache.append([seq], k, v, shards=Shards.contiguous(6, 3))
    with pytest.raises(qkv.ShapeError, match="rows of this rank"):
        cache.append([seq], k, v, shards=Shards.contiguous(6, 2))
    assert seq.length == 6
    cache.truncate(seq, 5)
    with pytest.raises(qkv.ArgumentError, match="view lives until"):
        qkv.attention(q, view)
    if rank:  # a call that the others do not make
        cache.truncate(seq, 4)
    with pytest.raises(qkv.ArgumentError, match="the same call"):
        cache.stats()
    with pytest.raises(qkv.ArgumentError, match="the same call"):
        cache_of(mesh, pages=4 + rank)
    with pytest.raises(qkv.ArgumentTypeError, match="DeviceMesh"):
        cache_of(None)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_on_all_ranks() -> None:
    on_ranks(2, refused)
