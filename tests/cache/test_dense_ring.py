"""Caches of one stretch of memory a sequence, and of a few pages that are written over and over."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import qkv
from qkv.cache import DenseCache, PagedCache, PagesExhausted, RingCache
from tests.kit.cache_truth import Mirror, attended, rows, snapshot, unchanged


def dense(sequences: int = 3, **sizes: Any) -> Mirror:
    given = {"num_kv_heads": 2, "head_dim": 3, "value_dim": 5, "dtype": torch.float32, "debug": True}
    return Mirror(DenseCache(sequences=sequences, **{**given, **sizes}))


def ring(sequences: int = 3, **sizes: Any) -> Mirror:
    given = {"num_kv_heads": 2, "head_dim": 3, "dtype": torch.float32, "debug": True, "page_size": 4}
    return Mirror(RingCache(sequences=sequences, **{**given, **sizes}))


# ---- dense


@pytest.mark.parametrize("capacity", [None, 100, 96])
@pytest.mark.parametrize("layers", [1, 2])
def test_dense_holds_what_goes_in(capacity: int | None, layers: int) -> None:
    m = dense(capacity=capacity, layers=layers)
    a, b = m.add(), m.add()
    m.append([a, b], T=30)
    c = m.add()
    m.append([c, a], lengths=[5, 66])
    for _ in range(4 if capacity is None else 0):
        m.append([b, c, a], T=17)
    m.check()
    assert m.cache.page_size == {None: 256, 100: 112, 96: 96}[capacity]
    view = m.cache.view([c, a])
    assert view.k.shape == (3, 2, m.cache.page_size, 3)
    assert list(view.layout.tables) == [*c.pages, *a.pages]
    assert view.held is None


def test_dense_grows_in_the_middle_of_steps() -> None:
    m = dense(layers=2, storage=torch.int8)
    b, a = m.add(), m.add()
    exact = dense(layers=2)
    pair = {a: exact.add(), b: exact.add()}
    m.append([a, b], T=63)
    k, v = m.make(1, 1)
    m.cache.append([a], k, v)  # a's step is open, of slot 63
    view = m.cache.view([a])
    far = m.make(1, 300)
    m.cache.append([b], *far)
    assert view.layout.alive_at != m.cache.clock.now
    assert m.cache.page_size == 368
    m.cache.append([a], k, v, layer=1)
    m.cache.append([b], *far, layer=1)
    for seq, twin in pair.items():
        made = (k, v) if seq is a else far
        for layer in range(2):
            held = m.kept[seq][layer]
            first = [torch.stack([x[i] for x in held], 1)[None] for i in (0, 1)]
            exact.cache.append(
                [twin], torch.cat((first[0], made[0]), 2), torch.cat((first[1], made[1]), 2), layer=layer
            )
    for layer in range(2):
        got, want = m.cache.view([a, b], layer=layer), exact.cache.view([pair[a], pair[b]], layer=layer)
        for i, length in enumerate((64, 363)):
            for x, scale, true in ((got.k, got.k_scale, want.k), (got.v, got.v_scale, want.v)):
                assert scale is not None
                page = got.layout.tables[i]
                read = x[page, :, :length] * scale[page, :, :length, None]
                error = (read - true[want.layout.tables[i], :, :length]).abs()
                assert (error <= scale[page, :, :length, None] * 0.5001).all()
    assert m.cache.view([a]).k_scale[b.pages[0], :, 363:].isnan().all()


def test_dense_capacity_and_places() -> None:
    m = dense(sequences=2, capacity=20, layers=2)
    a, b = m.add(), m.add()
    m.append([a], T=18)
    before = snapshot(m.cache)
    with pytest.raises(qkv.ArgumentError, match="21 tokens and capacity=20"):
        m.cache.append([b, a], *m.make(1, 4), lengths=[1, 3])
    with pytest.raises(PagesExhausted, match="2 sequences"):
        m.cache.add()
    assert unchanged(before, snapshot(m.cache))
    m.append([a, b], lengths=[2, 20])
    stats = m.cache.stats()
    assert (stats.tokens, stats.waste_tokens, stats.pages_used, stats.pages_free) == (40, 2 * 32 - 40, 2, 0)
    view = m.cache.view([a])
    page = a.pages[0]
    m.free(a)
    assert view.layout.alive_at != m.cache.clock.now
    assert view.k[page].isnan().all()
    c = m.add()
    assert c.pages == (page,)
    m.append([c], T=3)
    m.check()


def test_dense_truncates_and_rolls_back() -> None:
    m = dense(layers=2)
    a, b = m.add(), m.add()
    m.append([a, b], T=9)
    m.truncate(a, 4)
    assert m.cache.view([a]).k[a.pages[0], :, 4:].isnan().all()
    m.cache.append([a, b], *m.make(2, 100))
    m.cache.rollback([b])
    m.check()
    assert m.cache.page_size == 128  # what has grown stays
    m.append([b, a], T=2)
    m.truncate(b, 0)
    m.check()


def test_only_caches_on_pages_share() -> None:
    for m in (dense(), ring(window=4)):
        for names in ({"tokens": [1]}, {"salt": "a"}, {"adapter": "a"}):
            with pytest.raises(qkv.ArgumentError, match=f"{next(iter(names))}.*PagedCache"):
                m.cache.add(**names)
        a = m.add()
        with pytest.raises(qkv.ArgumentError, match="share prefixes"):
            m.cache.append([a], *m.make(1, 1), tokens=[[1]])
        assert not hasattr(m.cache, "fork")


# ---- ring


@pytest.mark.parametrize(
    ("window", "sinks", "chunk", "page_size"),
    [(1, 0, 1, 1), (1, 0, 1, 4), (6, 0, 1, 4), (5, 0, 5, 4), (6, 5, 3, 4), (9, 2, 4, 3), (3, 4, 1, 4), (7, 0, 20, 4),
     (16, 1, 1, 64)],
)  # fmt: skip
@pytest.mark.parametrize("layers", [1, 2])
def test_ring_keeps_all_that_a_query_sees(window: int, sinks: int, chunk: int, page_size: int, layers: int) -> None:
    m = ring(window=window, sinks=sinks, chunk=chunk, page_size=page_size, layers=layers)
    generator = random.Random(window)
    a, b, c = m.add(), m.add(), m.add()
    for _ in range(40):
        counts = [generator.randrange(1, chunk + 1), generator.randrange(0, 2), generator.randrange(0, chunk + 1)]
        m.append([a, b, c], lengths=counts)
        for seq, count in zip((a, b, c), counts, strict=True):
            m.check([seq], queries=max(count, 1))
    for _ in range(20):
        m.append([c, a])
        m.check()
    pages = {page for seq in (a, b, c) for page in seq.pages if page >= 0}
    assert len(pages) <= m.cache.stats().pages
    assert len(a.pages) == -(-a.length // page_size), "the table is logical"
    # No page more than the pages that window - 1 + chunk keys can lie on, wherever they begin.
    most = max((start + window - 2 + chunk) // page_size - start // page_size + 1 for start in range(page_size))
    assert m.cache.stats().pages == 3 * (most + -(-sinks // page_size))
    assert repr(m.cache.view([a]).held) == f"window({window - 1}, None)" + (f" | prefix({sinks})" if sinks else "")


def test_ring_overwrites_end_views_and_poison() -> None:
    m = ring(sequences=1, window=4)
    a = m.add()
    for count in range(30):
        view = m.cache.view([a])
        pages = a.pages
        m.append([a])
        moved = any(before >= 0 > after for before, after in zip(pages, a.pages, strict=False))
        assert moved == (view.layout.alive_at != m.cache.clock.now)
        assert moved == (count % 4 == 0 and count >= 8)
        if moved:
            assert m.cache.view([a]).k[a.pages[-1], :, 1:].isnan().all()


def test_ring_refuses_what_does_not_fit() -> None:
    m = ring(sequences=2, window=6, chunk=3, layers=2)
    a, b = m.add(), m.add()
    m.append([a, b], T=3)
    before = snapshot(m.cache)
    with pytest.raises(qkv.ArgumentError, match="4 tokens and chunk=3"):
        m.cache.append([b, a], *m.make(1, 5), lengths=[1, 4])
    with pytest.raises(PagesExhausted, match="2 sequences"):
        m.cache.add()
    assert unchanged(before, snapshot(m.cache))
    m.free(a)
    c = m.add()
    m.append([c, b], T=2)
    m.check()


def test_ring_takes_the_last_step_back() -> None:
    m = ring(window=6, chunk=4, sinks=2, layers=2)
    a, b = m.add(), m.add()
    generator = random.Random(3)
    for _ in range(30):
        m.append([a, b], T=4)
        m.truncate(a, a.length - generator.randrange(0, 5))
        m.check([a], queries=0)
        m.cache.append([b, a], *m.make(2, generator.randrange(1, 5)))
        m.cache.rollback([a])
        m.check(queries=0)
    before = snapshot(m.cache)
    with pytest.raises(qkv.ArgumentError, match="must still be stored"):
        m.cache.truncate(b, b.length - 20)
    assert unchanged(before, snapshot(m.cache))
    m.truncate(b, 2)  # the sinks are all there is to see
    m.append([b], T=4)
    m.check([b])
    m.truncate(b, 0)
    m.append([b], T=3)
    m.check([b])


def test_ring_figures_and_long_sequences() -> None:
    m = ring(sequences=2, window=6, page_size=4)
    a = m.add()
    for _ in range(18):
        m.append([a])
    stats = m.cache.stats()
    assert (stats.pages, stats.pages_used, stats.tokens, stats.waste_tokens) == (6, 3, 10, 2)
    wide = Mirror(RingCache(sequences=1, window=64, chunk=4096, num_kv_heads=1, head_dim=1, dtype=torch.float32))
    long = wide.cache.add()
    x = torch.arange(4096.0).view(1, 1, -1, 1)
    for i in range(100):
        wide.cache.append([long], x + 4096 * i, x)
    view = wide.cache.view([long])
    last = view.layout.tables[-1]
    assert long.length == 409_600
    assert view.k[last, 0, :, 0].tolist() == list(range(409_600 - 64, 409_600))


# ---- both, under random traffic


@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_random_traffic(kind: str) -> None:
    generator = random.Random(7)
    m = dense(sequences=4, layers=2) if kind == "dense" else ring(sequences=4, window=7, chunk=3, sinks=1)
    for _ in range(250):
        live = list(m.kept)
        some = generator.sample(live, generator.randrange(1, len(live) + 1)) if live else []
        roll = generator.random()
        if (roll < 0.15 or not live) and len(live) < 4:
            m.add()
        elif roll < 0.5:
            m.append(some, T=generator.randrange(1, 4))
        elif roll < 0.75:
            m.append(some, lengths=[generator.randrange(0, 4) for _ in some])
            m.truncate(some[0], some[0].length)
        elif roll < 0.8:
            m.free(some[0])
        m.check()
        owned = [page for seq in m.kept for page in m.cache._owned(seq)]
        assert sorted(owned + m.cache._pool.free) == list(range(m.cache.stats().pages))


def test_an_interrupted_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkv.cache.storage import Storage

    for m in (dense(layers=2), ring(window=6, chunk=70, layers=2), ring(window=6, chunk=70)):
        a, b = m.add(), m.add()
        m.append([a, b], T=60)
        m.append([a, b], T=3)
        for site in ("grown", "write"):

            def stop(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(Storage, site, stop)
                if site == "write" or isinstance(m.cache, DenseCache):
                    with pytest.raises(KeyboardInterrupt):
                        m.cache.append([a, b], *m.make(2, 70))
            m.check(queries=0)
        m.append([a, b], T=2)
        m.check()
        m.free(a)
        m.append([m.add(), b], T=1)
        m.check()


# ---- every cache, read by attention


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (DenseCache, {"sequences": 3}),
    "ring": (RingCache, {"sequences": 3, "window": 9, "sinks": 2, "chunk": 6, "page_size": 4}),
    "pages": (PagedCache, {"pages": 60, "page_size": 4}),
    "pages of one": (PagedCache, {"pages": 200, "page_size": 1}),
    "pages with a window": (PagedCache, {"pages": 60, "page_size": 4, "window": 7, "sinks": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_what_is_stored(kind: str) -> None:
    """Prefill, chunks, ragged steps and decode against the definition in float64; what must not be read is NaN.

    The bound: sums of at most 60 products of numbers of a few units, twice, in float64.
    """
    make, sizes = KINDS[kind]
    m = Mirror(make(**sizes, num_kv_heads=2, head_dim=8, value_dim=6, layers=2, dtype=torch.float64, debug=True))
    a, b, c = m.add(), m.add(), m.add()
    window, sinks = m.cache.window, m.cache.sinks
    for turn, counts in enumerate(
        [[5, 3, 6], [1, 0, 4], [2, 6, 1], [1, 1, 1], [6, 6, 6], [1, 1, 1], [0, 1, 2], [1, 1, 1]]
    ):
        ragged = len(set(counts)) > 1
        m.append([b, a, c], **({"lengths": counts} if ragged else {"T": counts[0]}))
        q = 3 * rows(900 + turn, 1 if ragged else 3, 4, sum(counts) if ragged else counts[0], 8, dtype=torch.float64)
        for layer in range(2):
            view = m.cache.view([b, a, c], layer=layer, lengths=counts if ragged else None)
            out = qkv.attention(q, view, mask=qkv.causal(), scale=0.5)
            start = 0
            for i, (seq, count) in enumerate(zip((b, a, c), counts, strict=True)):
                mine = (0, slice(None), slice(start, start + count)) if ragged else (i,)
                start += count
                if not count:
                    continue
                k, v = (torch.stack([pair[n] for pair in m.kept[seq][layer]], 1) for n in (0, 1))
                want = attended(q[mine], k, v, 0.5, window, sinks)
                assert (out[mine] - want).abs().max() < 1e-12, (turn, layer, i)
