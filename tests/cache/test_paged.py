"""Caches on pages: what goes in is there, forks, exhaustion, steps and views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkv
from qkv.cache import PagedCache, PagesExhausted
from tests.kit.cache_truth import Mirror, check_books, contents, paged, rows, same, snapshot, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_goes_in_is_there(page_size: int, layers: int, dtype: torch.dtype) -> None:
    m = paged(pages=120, page_size=page_size, layers=layers, dtype=dtype, num_kv_heads=2, head_dim=8, value_dim=6)
    a, b, c = m.add(), m.add(), m.add()
    m.append([a, b], T=7)
    m.append([c, a], lengths=[5, 0])
    m.append([b, c, a], lengths=[0, 4, 9])
    m.append([b], T=0)
    for _ in range(5):
        m.append([a, c, b])
    assert [s.length for s in (a, b, c)] == [21, 12, 14]
    m.check()
    m.check([b, a])
    check_books(m.cache)


def _odd(x: torch.Tensor, where: str) -> torch.Tensor:
    """The same numbers, elsewhere in memory."""
    if where == "heads after tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if where == "a slice at an odd offset":
        room = torch.full((x.shape[0], x.shape[1], x.shape[2] + 1, x.shape[3] + 1), torch.nan, dtype=x.dtype)
        room[:, :, 1:, 1:] = x
        return room[:, :, 1:, 1:]
    if where == "an odd offset without gaps":
        room = torch.cat((torch.full((1,), torch.nan, dtype=x.dtype), x.reshape(-1)))
        return room[1:].view(x.shape)
    if where == "every second number":
        return x.repeat_interleave(2, -1)[..., ::2]
    if where == "expanded":
        return x[:, :, :1].expand(x.shape)
    if where == "negative bit":
        return torch._neg_view(-x)
    return x


@pytest.mark.parametrize(
    "where",
    ["heads after tokens", "a slice at an odd offset", "an odd offset without gaps", "every second number", "expanded",
     "negative bit"],
)  # fmt: skip
@pytest.mark.parametrize(("n", "T"), [(3, 1), (1, 6), (3, 6)])
def test_any_strides(where: str, n: int, T: int) -> None:
    for dtype, D in ((torch.bfloat16, 8), (torch.float32, 3), (torch.float64, 4)):
        cache = PagedCache(pages=16, page_size=4, num_kv_heads=2, head_dim=D, dtype=dtype)
        seqs = [cache.add() for _ in range(n)]
        k, v = _odd(rows(1, n, 2, T, D, dtype=dtype), where), _odd(rows(2, n, 2, T, D, dtype=dtype), where)
        cache.append(seqs, k, v)
        view = cache.view(seqs)
        for i in range(n):
            assert same(contents(view, i)[0], k[i].resolve_neg()), where
            assert same(contents(view, i)[1], v[i].resolve_neg()), where


def test_every_bit_pattern_is_kept() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, 1, -1, 16)
    cache = PagedCache(pages=4096, page_size=1, num_kv_heads=1, head_dim=16)
    seq = cache.add()
    cache.append([seq], bits.view(torch.bfloat16), bits.flip(-1).view(torch.bfloat16))
    k, v, _ = contents(cache.view([seq]), 0)
    assert torch.equal(k.view(torch.int16), bits[0])
    assert torch.equal(v.view(torch.int16), bits[0].flip(-1))


def test_inference_mode_and_gradients_on_both_sides() -> None:
    with torch.inference_mode():
        m = paged(head_dim=4)  # 16 bytes: these rows move as complex numbers, which autograd would follow
        a = m.add()
        m.append([a], T=3)
    m.append([a], T=3)
    with torch.inference_mode():
        m.append([a], T=2)
        twin = m.fork(a)
        inside = m.make(1, 1)
    m.append([twin])
    k, v = m.make(1, 1)
    m.cache.append([a], k.requires_grad_(), (v * 2).requires_grad_())
    m.kept[a][0].append((k[0, :, 0].detach(), v[0, :, 0] * 2))
    m.cache.append([a], *inside)
    m.kept[a][0].append((inside[0][0, :, 0], inside[1][0, :, 0]))
    m.check()
    view = m.cache.view([a])
    assert not view.k.requires_grad
    assert not view.k.is_inference()


# ---- forks


def test_a_fork_shares_all_pages_and_the_first_writer_copies() -> None:
    m = paged(layers=2)
    a = m.add()
    m.append([a], T=6)
    twin = m.fork(a)
    assert twin.pages == a.pages
    assert (twin.length, twin.cached_tokens) == (6, 6)
    assert m.cache.stats().pages_used == 2
    assert m.cache.stats().pages_shared == 2
    m.append([twin])
    assert twin.pages[0] == a.pages[0]
    assert twin.pages[1] != a.pages[1]
    m.append([a])  # alone on its last page now: no copy
    assert m.cache.stats().pages_used == 3
    m.append([a, twin], T=3)
    m.check()
    check_books(m.cache)


def test_twins_that_append_in_one_step_make_one_copy() -> None:
    for order in ((0, 1, 2), (2, 0, 1)):
        m = paged(pages=4)
        a = m.add()
        m.append([a], T=6)
        three = [a, m.fork(a), m.fork(a)]
        m.append([three[i] for i in order])  # 2 pages and 2 copies: all there is
        assert m.cache.stats().pages_free == 0
        m.check()
        check_books(m.cache)
    m = paged(pages=3)
    a = m.add()
    m.append([a], T=6)
    three = [a, m.fork(a), m.fork(a)]
    before = snapshot(m.cache)
    with pytest.raises(PagesExhausted, match="2 pages needed"):
        m.append(three)
    assert unchanged(before, snapshot(m.cache))
    m.free(three[2])
    m.kept[three[0]], m.kept[three[1]] = ([list(layer) for layer in m.kept[a]] for _ in range(2))
    m.append(three[:2])
    m.check()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_twins_on_a_truncated_page_that_is_found_by_a_prefix(order: tuple[int, int]) -> None:
    """The one that keeps the page must not spoil what the other copies from it: a soak of a million steps met this."""
    m = paged(pages=8, page_size=4, debug=True)
    a = m.add(tokens=[5, 6, 7, 8, 9])
    m.append([a], T=4, tokens=[[5, 6, 7, 8]])
    both = [a, m.fork(a)]
    for seq, length in zip(both, (1, 3), strict=True):
        m.truncate(seq, length)
    m.append([both[i] for i in order])
    m.check()
    check_books(m.cache)


def test_forks_of_full_pages_copy_nothing() -> None:
    m = paged()
    a = m.add()
    m.append([a], T=8)
    twin = m.fork(a)
    m.append([a, twin])
    assert m.cache.stats().pages_used == 4
    assert m.cache.stats().pages_shared == 2
    m.check()


def test_truncation_inside_a_shared_page() -> None:
    m = paged()
    a = m.add()
    m.append([a], T=11)
    twin = m.fork(a)
    m.truncate(twin, 6)
    m.truncate(twin, 5)
    assert twin.pages == a.pages[:2]
    m.append([twin], T=2)  # must not touch tokens 5, 6 and 7 of a
    m.append([a])
    m.check()
    m.truncate(a, 0)
    assert a.pages == ()
    m.append([a], T=5)
    m.check()
    check_books(m.cache)


def test_copies_poison_what_the_sequence_does_not_have() -> None:
    m = paged()
    a = m.add()
    m.append([a], T=4)
    twin = m.fork(a)
    m.truncate(twin, 2)
    m.append([twin])
    view = m.cache.view([twin])
    assert view.k[twin.pages[0], :, 3:].isnan().all()
    assert not view.k[a.pages[0]].isnan().any()


# ---- exhaustion


def test_exhaustion_changes_nothing_for_anyone() -> None:
    m = paged(pages=6, layers=2)
    a, b, c = m.add(), m.add(), m.add()
    m.append([a, b], T=7)
    m.append([c], T=4)
    before = snapshot(m.cache)
    k, v = m.make(1, 9)
    with pytest.raises(PagesExhausted, match=r"4 pages needed .*1 free and 0 cached of 6.*swap_out") as error:
        m.cache.append([a, c, b], k, v, lengths=[2, 5, 2])
    assert isinstance(error.value, RuntimeError)
    assert isinstance(error.value, qkv.QKVError)
    assert unchanged(before, snapshot(m.cache))
    m.append([a, b], lengths=[1, 1])
    m.free(c)
    m.append([a, b], T=4)
    m.check()
    check_books(m.cache)


def test_exhaustion_counts_cached_pages() -> None:
    m = paged(pages=4)
    a = m.add(tokens=range(8))
    m.append([a], T=8)
    m.free(a)
    assert m.cache.stats().pages_cached == 2
    b = m.add()
    m.append([b], T=16)
    m.check()
    assert m.cache.stats().pages_cached == 0
    check_books(m.cache)


def test_a_page_is_poisoned_whenever_it_is_given_back() -> None:
    m = paged(pages=8, window=6)
    a = m.add()
    assert all(x.isnan().all() for x in m.cache.view([a])[:2])
    m.append([a], T=8)
    pages = a.pages
    for _ in range(3):
        m.append([a])
    view = m.cache.view([a])
    assert a.pages[0] == -1
    assert view.k[pages[0]].isnan().all()
    last = a.pages[-1]
    m.truncate(a, 10)
    assert m.cache.view([a]).v[last, :, 2:].isnan().all()
    m.free(a)
    assert view.k.isnan().all()
    assert view.v.isnan().all()


# ---- steps


def test_layers_come_in_order_and_lengths_move_at_the_end() -> None:
    m = paged(layers=3)
    a, b = m.add(), m.add()
    m.append([a, b], T=3)
    k, v = m.make(2, 2)
    with pytest.raises(qkv.ArgumentError, match=r"layer=1, expected layer=0.*rollback"):
        m.cache.append([a, b], k, v, layer=1)
    m.cache.append([a, b], k, v)
    assert (a.length, b.length) == (3, 3)
    lengths = [list(m.cache.view([a, b], layer=i).layout.lengths) for i in range(3)]
    assert lengths == [[5, 5], [3, 3], [3, 3]]
    for wrong in (0, 2):
        with pytest.raises(qkv.ArgumentError, match="rollback"):
            m.cache.append([a, b], k, v, layer=wrong)
    for seqs in ([b, a], [a], [b]):
        with pytest.raises(qkv.ArgumentError, match="same sequences"):
            m.cache.append(seqs, k[: len(seqs)], v[: len(seqs)], layer=1)
    with pytest.raises(qkv.ShapeError, match=r"\(2, 2, 1, 3\)"):
        m.cache.append([a, b], k[:, :, :1], v[:, :, :1], layer=1)
    with pytest.raises(qkv.ArgumentError, match="same lengths"):
        m.cache.append([a, b], k.reshape(1, 2, 4, 3), v.reshape(1, 2, 4, 5), layer=1, lengths=[2, 2])
    for call in (m.cache.fork, m.cache.swap_out, lambda s: m.cache.truncate(s, 1), lambda s: m.cache.step([s], T=1)):
        with pytest.raises(qkv.ArgumentError, match=r"unfinished step.*rollback"):
            call(a)
    m.cache.rollback([b])
    m.check()
    m.cache.rollback([a, b])
    m.append([b, a], T=2)
    m.check()
    check_books(m.cache)


def test_two_groups_step_at_the_same_time() -> None:
    m = paged(layers=2)
    a, b, c = m.add(), m.add(), m.add()
    m.append([a, b, c], T=5)
    first, second = m.make(1, 3), m.make(2, 1)
    for layer in range(2):
        m.cache.append([a], *first, layer=layer)
        m.cache.append([b, c], *second, layer=layer)
        assert list(m.cache.view([c, a, b], layer=layer).layout.lengths) == [6, 8, 6]
    for layer in range(2):
        m.kept[a][layer] += [(first[0][0, :, t], first[1][0, :, t]) for t in range(3)]
        for i, seq in enumerate((b, c)):
            m.kept[seq][layer].append((second[0][i, :, 0], second[1][i, :, 0]))
    m.check()


def test_rollback_gives_the_pages_back() -> None:
    m = paged(pages=5, layers=2)
    a, b = m.add(), m.add()
    m.append([a, b], T=3)
    twin = m.fork(a)
    used = m.cache.stats().pages_used
    k, v = m.make(3, 3)
    with pytest.raises(PagesExhausted):
        m.cache.append([a, b, twin], k, v)
    m.cache.append([a, b], k[:2], v[:2])
    assert m.cache.stats().pages_free == 0
    m.cache.rollback(a)
    assert m.cache.stats().pages_used == used + 1  # a's copy of the page that it shared
    m.check()
    view = m.cache.view([b])
    assert view.k[b.pages[0], :, 3:].isnan().all()
    m.cache.append([a, b], k[:2], v[:2])
    m.cache.free(a)  # rolls the step back for b as well
    del m.kept[a]
    m.check()
    m.append([b], T=5)
    m.check()
    check_books(m.cache)


def test_a_failed_later_layer_can_be_given_again() -> None:
    m = paged(layers=2)
    a = m.add()
    k, v = m.make(1, 3)
    m.cache.append([a], k, v)
    with pytest.raises(qkv.ArgumentTypeError, match="float64"):
        m.cache.append([a], k.double(), v, layer=1)
    m.cache.append([a], k, v, layer=1)
    m.kept[a] = [[(k[0, :, t], v[0, :, t]) for t in range(3)]] * 2
    m.check()


def test_step_objects() -> None:
    m = paged(layers=2)
    a, b = m.add(), m.add()
    m.append([a, b], lengths=[3, 6])
    step = m.cache.step([a, b], T=2)
    assert step.positions.tolist() == [[3, 4], [6, 7]]
    assert step.positions.dtype == torch.int64
    ragged = m.cache.step([b, a], lengths=[1, 3])
    assert ragged.layer(0).positions.tolist() == [[6, 3, 4, 5]]
    k, v = m.make(2, 2)
    with pytest.raises(qkv.ShapeError, match="1 tokens and a step of 2"):
        step.layer(0).append(k[:, :, :1], v[:, :, :1])
    for i in range(2):
        layer = step.layer(i)
        layer.append(k, v)
        assert list(layer.view().layout.lengths) == [5, 8]
        assert layer.view().layout.queries is None
        m.kept[a][i] += [(k[0, :, t], v[0, :, t]) for t in range(2)]
        m.kept[b][i] += [(k[1, :, t], v[1, :, t]) for t in range(2)]
    m.check()
    with pytest.raises(qkv.ArgumentError, match="lengths"):
        ragged.layer(0).append(*m.make(1, 4))
    ragged = m.cache.step([b, a], [1, 3])
    for i in range(2):
        ragged.layer(i).append(*m.make(1, 4))
        assert list(ragged.layer(i).view().layout.queries) == [1, 3]


# ---- views


def test_the_layout_is_shared_by_the_layers_of_a_step() -> None:
    m = paged(layers=3)
    a, b = m.add(), m.add()
    m.append([a, b], T=5)
    seen = []
    k, v = m.make(2, 1)
    for layer in range(3):
        m.cache.append([a, b], k, v, layer=layer)
        view = m.cache.view([a, b], layer=layer)
        seen.append(view.layout)
        assert list(view.layout.lengths) == [6, 6]
    assert seen[0] is seen[1] is seen[2]
    assert m.cache.view([b, a]).layout is not seen[0]
    assert m.cache.view([a, b], lengths=[1, 1]).layout is not seen[0]
    m.cache.append([a, b], k, v)
    assert list(m.cache.view([a, b]).layout.lengths) == [7, 7]
    assert list(m.cache.view([a, b], layer=2).layout.lengths) == [6, 6]
    m.cache.rollback([a])
    assert list(m.cache.view([a, b]).layout.lengths) == [6, 6]


def test_views_end_when_pages_move() -> None:
    def ends(change: Callable[[Mirror, Any, Any], Any], **sizes: Any) -> bool:
        m = paged(layers=2, **sizes)
        a = m.add(tokens=range(14))
        m.append([a], T=14)
        gone = m.add(tokens=range(50, 60))
        m.append([gone], T=10)
        m.free(gone)
        b = m.fork(a)
        view = m.cache.view([a])
        assert view.layout.alive_at == m.cache.clock.now
        change(m, a, b)
        return view.layout.alive_at != m.cache.clock.now

    def rolled(m: Mirror, a: Any, b: Any) -> None:
        m.free(b)
        m.cache.append([a], *m.make(1, 6))
        view = m.cache.view([a])
        m.cache.rollback([a])
        assert view.layout.alive_at != m.cache.clock.now

    assert ends(lambda m, a, b: m.free(a))
    assert ends(lambda m, a, b: m.truncate(a, 9))
    assert ends(lambda m, a, b: m.cache.swap_out(a))
    assert ends(lambda m, a, b: m.cache.evict())
    assert ends(lambda m, a, b: m.append([a]))  # copies the page shared with b
    assert ends(lambda m, a, b: m.append([m.add()], T=8 * 4 - 4 * 4), pages=8)  # evicts
    assert ends(lambda m, a, b: (m.free(b), m.append([a], T=9), m.append([a])), window=5)
    assert ends(rolled)
    assert not ends(lambda m, a, b: (m.append([m.add()], T=8), m.fork(a), m.add(), m.cache.stats(), m.cache.table()))
