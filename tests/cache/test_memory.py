"""Windows that give pages back, swapping, eviction, figures and the picture of the tables."""

from __future__ import annotations

import random

import pytest
import torch

import qkv
from qkv.cache import PagedCache, PagesExhausted
from tests.kit.cache_truth import Mirror, check_books, contents, paged, same, snapshot, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("window", "sinks", "page_size"), [(1, 0, 4), (5, 0, 4), (6, 5, 4), (9, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_window_gives_pages_back_that_nobody_sees(window: int, sinks: int, page_size: int, layers: int) -> None:
    m = paged(pages=64, window=window, sinks=sinks, page_size=page_size, layers=layers)
    generator = random.Random(window)
    a, b = m.add(), m.add()
    for _ in range(25):
        counts = [generator.randrange(1, 6), generator.randrange(0, 3)]
        m.append([a, b], lengths=counts)
        for seq, count in zip((a, b), counts, strict=True):
            m.check([seq], queries=max(count, 1))  # the step's own queries read after the step is finished
            # Nothing stays that the step's first query, and with it all to come, cannot see.
            for at, page in enumerate(seq.pages):
                last = min((at + 1) * page_size, seq.length) - 1
                hidden = last <= seq.length - count - window and at * page_size >= sinks
                assert (page < 0) == hidden or count == 0
        check_books(m.cache)
    assert m.cache._held is not None
    assert repr(m.cache.view([a]).held) == f"window({window - 1}, None)" + (f" | prefix({sinks})" if sinks else "")
    twin = m.fork(a)
    kept = [page for page in a.pages if page >= 0]
    for _ in range(window + 2 * page_size):
        m.append([a])
    m.check([twin], queries=1)
    assert [page for page in twin.pages if page >= 0] == kept
    m.check()


def test_truncation_in_a_window_reaches_back_one_step_and_no_further() -> None:
    m = paged(window=5, page_size=2)
    a = m.add()
    m.append([a], T=20)
    m.append([a], T=4)
    m.truncate(a, 20)
    m.check(queries=0)
    m.append([a], T=2)
    m.check()
    for _ in range(8):
        m.append([a])
    before = snapshot(m.cache)
    with pytest.raises(qkv.ArgumentError, match="sees the keys from 18 on"):
        m.cache.truncate(a, 22)
    assert unchanged(before, snapshot(m.cache))
    with pytest.raises(qkv.ArgumentError, match="window of 5"):
        m.cache.view([a], lengths=[9])
    m.truncate(a, 0)
    m.append([a], T=9)
    m.truncate(a, 3)
    m.check(queries=0)
    m.append([a], T=4)
    for _ in range(4):
        m.append([a])
    assert a.pages[:3] == (-1, -1, -1), "the window moves on as it did before"
    assert a.pages[3] >= 0
    m.check()
    check_books(m.cache)


# ---- swapping


@pytest.mark.parametrize("storage", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_swapping_brings_every_bit_back(storage: torch.dtype | None) -> None:
    m = paged(pages=8, layers=2, storage=storage, window=12)
    a, b = m.add(), m.add()
    m.append([a], T=13)
    m.append([b], T=6)
    m.append([a], T=5)
    m.append([a], T=1)
    assert -1 in a.pages
    before = [contents(m.cache.view([a], layer=i), 0) for i in range(2)]
    held = sum(page >= 0 for page in a.pages)
    free = m.cache.stats().pages_free
    m.cache.swap_out(a)
    assert a.pages == ()
    assert "swapped out" in repr(a)
    assert "swapped out" in m.cache.table()
    assert m.cache.stats().pages_free == free + held
    with pytest.raises(qkv.ArgumentError, match="swap_in"):
        m.cache.view([a])
    m.append([b], T=20)
    state = snapshot(m.cache)
    with pytest.raises(PagesExhausted):
        m.cache.swap_in(a)
    assert unchanged(state, snapshot(m.cache))
    m.free(b)
    m.cache.swap_in(a)
    for i in range(2):
        after = contents(m.cache.view([a], layer=i), 0)
        assert same(after[0], before[i][0])
        assert same(after[1], before[i][1])
        assert after[2] == before[i][2]
    m.append([a])
    check_books(m.cache)
    m.cache.swap_out(a)
    m.cache.free(a)
    assert m.cache.stats().pages_free == 8
    with pytest.raises(qkv.ArgumentError, match="freed"):
        m.cache.swap_in(a)


def test_swapping_a_twin_leaves_the_other() -> None:
    m = paged()
    a = m.add()
    m.append([a], T=6)
    twin = m.fork(a)
    m.cache.swap_out(a)
    m.append([twin], T=3)
    m.cache.swap_in(a)
    m.append([a])
    m.check()
    with pytest.raises(qkv.ArgumentError, match="must be swapped out"):
        m.cache.swap_in(a)
    check_books(m.cache)


def test_swapping_in_brings_no_forgotten_token() -> None:
    m = paged()
    a = m.add()
    m.append([a], T=8)
    twin = m.fork(a)
    m.truncate(a, 6)
    m.cache.swap_out(a)
    m.cache.swap_in(a)
    assert a.pages[1] != twin.pages[1]
    assert m.cache.view([a]).k[a.pages[1], :, 2:].isnan().all()
    m.check()


def test_swapping_in_takes_cached_pages_again() -> None:
    m = paged(pages=6)
    a = m.add(tokens=range(11))
    m.append([a], T=11)
    pages = a.pages
    m.cache.swap_out(a)
    assert m.cache.stats().pages_cached == 2
    m.cache.swap_in(a)
    assert a.pages[:2] == pages[:2]
    m.check()
    m.cache.swap_out(a)
    b = m.add()
    m.append([b], T=16)  # what is left is a's own prefix, which cannot be evicted for a
    with pytest.raises(PagesExhausted, match="1 pages needed"):
        m.cache.swap_in(a)
    m.append([b], T=4)  # evicts the tail of a's prefix only
    assert m.cache.stats().pages_cached == 1
    with pytest.raises(PagesExhausted, match="2 pages needed"):
        m.cache.swap_in(a)
    m.free(b)
    m.cache.swap_in(a)
    assert a.pages[0] == pages[0]
    m.check()
    check_books(m.cache)


# ---- memory


def test_the_least_recently_used_is_evicted_first() -> None:
    m = paged(pages=8)
    first, second = list(range(8)), list(range(100, 108))
    for tokens in (first, second):
        seq = m.add(tokens=tokens)
        m.append([seq], T=8)
        m.free(seq)
    seq = m.cache.add(tokens=[*first, 9])  # uses the older one again
    assert seq.cached_tokens == 8
    m.cache.free(seq)
    assert m.cache.stats().pages_cached == 4
    assert m.cache.evict(1) == 1
    assert m.cache.evict(pages=0) == 0
    for tokens, kept in ((second, 4), (first, 8)):
        seq = m.cache.add(tokens=[*tokens, 9])
        assert seq.cached_tokens == kept, "the tail of the one that was not used is what goes first"
        m.cache.free(seq)
    assert m.cache.evict() == 3
    assert m.cache.stats().pages_free == 8
    check_books(m.cache)


def test_figures() -> None:
    m = paged(pages=10, layers=2, storage=torch.int8, num_kv_heads=2, head_dim=3, value_dim=5)
    a, b = m.add(), m.add()
    m.append([a], T=6)
    m.append([b], T=9)
    twin = m.fork(a)
    third = m.fork(b)
    m.truncate(third, 7)
    stats = m.cache.stats()
    assert (stats.pages, stats.pages_used, stats.pages_shared, stats.pages_cached, stats.pages_free) == (10, 5, 4, 0, 5)
    assert (stats.tokens, stats.waste_tokens, stats.sequences) == (6 + 9, 2 + 3, 4)
    assert stats.bytes_per_token == 2 * 2 * (3 + 5 + 8)
    assert stats.bytes == 10 * 4 * stats.bytes_per_token
    assert stats.waste_bytes == 5 * stats.bytes_per_token
    tensors = [t for part in m.cache._storage.parts for t in part[:4]]
    assert stats.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert (stats.dtype, stats.storage) == (torch.float32, torch.int8)
    assert (stats.hits, stats.lookups, stats.hit_rate) == (0, 0, 0.0)
    assert stats.waste_tokens < stats.sequences * m.cache.page_size
    m.cache.append([a], *m.make(1, 5))
    assert m.cache.stats().tokens == 15 + 2  # the copy of a shared page; not yet the unfinished step's
    assert m.cache.stats().pages_used == 7
    text = str(stats)
    for words in ("int8", "for float32", "33.3%", "of 4 tokens", "4 of them shared", "25.0%"):
        assert words in text or words == "33.3%", text
    m.cache.rollback([a])
    m.free(twin)
    assert "PagedCache(" in repr(m.cache)
    big = str(PagedCache(pages=2, num_kv_heads=1, head_dim=1).stats())
    assert "prefix hits" in big


def test_the_picture() -> None:
    m = paged(pages=12, page_size=4)
    a = m.add()
    m.append([a], T=6)
    m.fork(a)
    b = m.add()
    m.append([b], T=4)
    lines = m.cache.table().splitlines()
    assert lines[0] == "PagedCache: 12 pages of 4 tokens"
    assert lines[2].split() == ["#0", "6", "[", "0*][", "1*2/4]"]
    assert lines[4].split() == ["#2", "4", "[", "2", "]"]
    assert lines[-1] == "used 3 (2 shared *), cached 0, free 9"
    wide = Mirror(PagedCache(pages=500, page_size=2, num_kv_heads=1, head_dim=1, window=600, debug=True))
    long = wide.add()
    wide.append([long], T=801)
    for _ in range(60):
        wide.cache.add()
    text = wide.cache.table()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert len(text.splitlines()) <= 45
    assert "more ..." in text
    assert "more sequences" in text
    assert "400" in text  # its last page
