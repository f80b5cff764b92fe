"""Prefixes are shared where tokens, salt and adapter are equal, and nowhere else, whatever the digest says."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.cache import LatentCache, PagedCache
from qkv.cache.prefix import PrefixIndex, framed, typed
from tests.kit.cache_truth import Mirror, check_books, contents, same

PROMPT = [7, 3, 3, 9, 1, 4, 4, 4, 2, 8, 5]


def paged(pages: int = 32, **sizes: Any) -> Mirror:
    given = {"page_size": 4, "num_kv_heads": 1, "head_dim": 2, "dtype": torch.float32, "debug": True}
    return Mirror(PagedCache(pages=pages, **{**given, **sizes}))


def filled(m: Mirror, tokens: Any = PROMPT, like: Any = None, **names: Any) -> Any:
    """A sequence whose tokens are all appended."""
    seq = m.add(None if like is None else m.kept[like], tokens=tokens, **names)
    m.append([seq], T=len(tokens) - seq.length)
    return seq


def hits(m: Mirror, tokens: Any, **names: Any) -> int:
    """How many tokens a new sequence would find."""
    seq = m.cache.add(tokens=tokens, **names)
    found: int = seq.cached_tokens
    assert seq.length == found
    m.cache.free(seq)
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_a_prompt_is_stored_once(layers: int) -> None:
    m = paged(layers=layers)
    a = filled(m)
    b = m.add(m.kept[a], tokens=PROMPT)
    assert (a.cached_tokens, b.cached_tokens, b.length) == (0, 8, 8)
    assert b.pages == a.pages[:2]
    m.append([b], T=3)
    assert b.pages[2] != a.pages[2]
    m.check()
    stats = m.cache.stats()
    assert (stats.hits, stats.lookups, stats.hit_rate) == (2, 4, 0.5)
    assert (stats.pages_used, stats.pages_shared) == (4, 2)
    assert a.tokens == tuple(PROMPT)
    check_books(m.cache)


def test_the_last_token_is_always_computed() -> None:
    m = paged()
    filled(m, PROMPT[:8])
    assert [hits(m, PROMPT[:n]) for n in range(12)] == [0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]
    assert hits(m, [*PROMPT[:4], 0, 0, 0, 0, 0]) == 4
    assert hits(m, [0, *PROMPT]) == 0
    assert hits(m, [*PROMPT[4:8], *PROMPT[:4], 1]) == 0  # the pages' tokens in another order


def test_only_pages_that_are_full_in_all_layers_are_shared() -> None:
    m = paged(layers=2)
    a = m.add(tokens=PROMPT)
    k, v = m.make(1, 8)
    m.cache.append([a], k, v)
    assert hits(m, PROMPT) == 0
    m.cache.append([a], k, v, layer=1)
    assert hits(m, PROMPT) == 8
    m.cache.append([a], *m.make(1, 3))
    m.cache.rollback([a])
    assert hits(m, [*PROMPT, 6, 6]) == 8


def test_cached_pages_outlive_their_sequence() -> None:
    m = paged()
    a = filled(m)
    kept = m.kept[a]
    pages = a.pages
    m.free(a)
    assert m.cache.stats().pages_cached == 2
    b = m.add(kept, tokens=PROMPT)
    assert b.pages == pages[:2]
    assert m.cache.stats().pages_cached == 0
    m.check()
    m.append([b], T=5)
    m.check()
    check_books(m.cache)


@pytest.mark.parametrize("constant", [False, True], ids=["keyed digest", "constant digest"])
class TestWhateverTheDigest:
    def make(self, constant: bool, **sizes: Any) -> Mirror:
        m = paged(**sizes)
        if constant:
            m.cache._index.digest = lambda parent, tokens: bytes(32)
        return m

    def test_salts_and_adapters_share_nothing(self, constant: bool) -> None:
        m = self.make(constant)
        names = [
            {}, {"salt": ""}, {"salt": b""}, {"salt": 0}, {"salt": "0"}, {"salt": 1}, {"salt": "1"}, {"salt": b"1"},
            {"salt": -1}, {"adapter": "1"}, {"adapter": 1}, {"salt": "1", "adapter": "1"}, {"salt": "None"},
            {"salt": "org_1", "adapter": "2345"}, {"salt": "org_12345", "adapter": ""}, {"salt": "org_12345"},
        ]  # fmt: skip
        first = [filled(m, PROMPT[:5], **name) for name in names]
        assert all(seq.cached_tokens == 0 for seq in first), "each of these is somebody else"
        for seq, name in zip(first, names, strict=True):
            again = m.cache.add(tokens=PROMPT[:5], **name)
            assert again.pages == seq.pages[:1], "and each finds its own"
        m.check(first)

    def test_tokens_are_compared(self, constant: bool) -> None:
        m = self.make(constant, pages=200)
        generator = random.Random(0)
        known: list[tuple[list[int], Any]] = []
        for _ in range(60):
            tokens = [generator.randrange(2) for _ in range(13)]
            like = max(known, key=lambda one: _common(one[0], tokens), default=None)
            want = 0 if like is None else min(_common(like[0], tokens), 12) // 4 * 4
            seq = m.add(None if like is None else m.kept[like[1]], tokens=tokens)
            assert seq.cached_tokens == want
            m.append([seq], T=13 - want)
            known.append((tokens, seq))
            if generator.random() < 0.3:
                m.cache.free(seq)  # its pages stay, and what they must hold
        m.kept = {seq: kept for seq, kept in m.kept.items() if seq._live is not None}
        m.check()
        check_books(m.cache)

    def test_the_same_page_under_another_parent_is_another_page(self, constant: bool) -> None:
        m = self.make(constant)
        one, two, tail = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]
        a, b = filled(m, [*one, *tail, 0]), filled(m, [*two, *tail, 0])
        assert a.pages[1] != b.pages[1]
        for seq, head in ((a, one), (b, two)):
            again = m.add(m.kept[seq], tokens=[*head, *tail, 0])
            assert again.pages == seq.pages[:2]
        assert hits(m, [*tail, *tail, 0]) == 0
        m.check()

    def test_an_evicted_parent_hides_its_children(self, constant: bool) -> None:
        m = self.make(constant, pages=8)
        a = filled(m, [*PROMPT, 1, 1])
        pages = a.pages
        m.free(a)
        pool = m.cache._pool
        pool.cached.move_to_end(pages[0], last=False)  # the head of the prefix goes first
        assert m.cache.evict(1) == 1
        assert hits(m, [*PROMPT, 1, 1]) == 0
        b = filled(m, [*PROMPT[:4], 9, 9, 9, 9, 9])
        assert hits(m, [*PROMPT, 1, 1]) == 4, "the new parent leads to its own children only"
        m.check([b])
        check_books(m.cache)

    def test_a_freed_page_serves_another_salt_as_empty_memory(self, constant: bool) -> None:
        m = self.make(constant, pages=3)
        a = filled(m, PROMPT, salt="mine")
        m.free(a)
        assert hits(m, PROMPT, salt="yours") == 0
        b = m.add(tokens=PROMPT, salt="yours")
        m.append([b], T=1)
        view = m.cache.view([b])
        assert view.k[b.pages[0], :, 1:].isnan().all(), "no number of somebody else's is left"
        m.append([b], T=10)
        m.check([b])
        assert hits(m, PROMPT, salt="mine") == 0
        assert hits(m, PROMPT, salt="yours") == 8


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def test_names_are_framed_with_type_and_length() -> None:
    start = framed([("str", "")])[:11].decode()  # what a frame of a str begins with
    values: list[Any] = [None, "", b"", "a", b"a", "ab", "b", 0, 1, -1, "0", "1", "00", "\ud800", 10**5000]
    values += [start + "b", "a" + start]
    tagged = [typed("t", "salt", value) for value in values]
    frames = [framed((a, b)) for a in tagged for b in tagged]
    assert len(set(frames)) == len(values) ** 2
    joined = {framed((a,)) + framed((b,)) for a in tagged for b in tagged}
    assert joined == set(frames), "a frame says where it ends"


def test_digests_are_keyed_and_256_bits_wide() -> None:
    one, two = PrefixIndex(4, []), PrefixIndex(4, [])
    assert len(one.digest(bytes(32), b"tokens")) == 32
    assert one.digest(bytes(32), b"tokens") == one.digest(bytes(32), b"tokens")
    assert one.digest(bytes(32), b"tokens") != two.digest(bytes(32), b"tokens")
    none = ("NoneType", None)
    roots = set()
    for names in ([("str", "model 1")], [("str", "model 2")], [("int", 1)]):
        index = PrefixIndex(4, names)
        index.digest = lambda parent, tokens: parent + tokens
        roots.add(index.root(none, none).digest)
    assert len(roots) == 3, "what makes keys and values enters the root"


@pytest.mark.parametrize(
    "other",
    [{"identity": "b"}, {"identity": 1}, {"dtype": torch.float64}, {"storage": torch.int8}, {"page_size": 5},
     {"head_dim": 4}, {"layers": 2}],
)  # fmt: skip
def test_all_that_changes_numbers_enters_the_root(other: dict[str, Any]) -> None:
    caches = [paged(**names).cache for names in ({"identity": "1"}, {"identity": "1", **other})]
    assert caches[0]._index._names != caches[1]._index._names


def test_duplicates_continue_one_chain() -> None:
    m = paged()
    a, b = m.add(tokens=PROMPT), m.add(tokens=PROMPT)
    m.append([a], T=4)
    m.append([b], T=11)  # computed page 0 a second time, and page 1 first
    assert hits(m, PROMPT) == 8
    c = m.cache.add(tokens=PROMPT)
    assert c.pages == (a.pages[0], b.pages[1])
    m.append([a], T=7)
    assert hits(m, PROMPT) == 8
    check_books(m.cache)
    # With a and its page gone, b's pages below it are out of reach, and none is kept.
    m.cache.free(c)
    m.free(a)
    m.cache.evict()
    assert hits(m, PROMPT) == 0
    m.append([b], T=5, tokens=[[1, 1, 1, 1, 1]])
    m.truncate(b, 3)
    assert (m.cache.stats().pages_free, len(m.cache._index)) == (31, 0)
    m.append([b], T=3, tokens=[[1, 1, 1]])
    assert hits(m, [*PROMPT[:3], 1, 0]) == 4
    m.truncate(b, 0)
    m.append([b], T=4, tokens=[[6, 6, 6, 6]])
    assert hits(m, [6, 6, 6, 6, 6]) == 4, "a new chain begins at the root"
    m.free(b)
    assert m.cache.stats().pages_cached == 2
    check_books(m.cache)


def test_a_chain_that_ended_begins_anew_at_the_root() -> None:
    m = paged()
    a, b = m.add(tokens=PROMPT), m.add(tokens=PROMPT)
    m.append([a, b], T=11)  # all of b's pages are duplicates of a's
    m.free(a)
    m.cache.evict()
    m.append([b], T=2, tokens=[[1, 1]])
    assert len(m.cache._index) == 0, "what follows pages that are gone is not kept to be found"
    m.truncate(b, 0)
    m.append([b], T=4, tokens=[[6, 6, 6, 6]])
    assert hits(m, [6, 6, 6, 6, 6]) == 4
    check_books(m.cache)


def test_tokens_of_steps_are_shared_in_turn() -> None:
    m = paged(layers=2)
    a, b = m.add(tokens=PROMPT), m.add()
    m.append([a, b], lengths=[11, 3], tokens=[*PROMPT, 1, 2, 3])
    m.append([a, b], T=2, tokens=torch.tensor([[20, 21], [4, 5]]))
    m.append([b, a], lengths=[3, 0], tokens=[6, 7, 8])
    assert a.tokens == (*PROMPT, 20, 21)
    assert b.tokens == (1, 2, 3, 4, 5, 6, 7, 8)
    assert hits(m, [*PROMPT, 20, 0]) == 12
    assert hits(m, [*PROMPT, 19, 0]) == 8
    c = m.add(m.kept[b], tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert c.cached_tokens == 8
    m.append([a], tokens=[[22]])
    m.append([a])  # not known: the chain ends here
    m.append([a], T=9, tokens=[range(9)])
    assert a.tokens == (*PROMPT, 20, 21, 22)
    assert hits(m, [*PROMPT, 20, 21, 22, 0, 0, 0, 0]) == 12
    m.check()
    check_books(m.cache)


def test_tokens_must_be_those_that_are_known() -> None:
    m = paged()
    a = m.add(tokens=PROMPT)
    k, v = m.make(1, 3)
    with pytest.raises(qkv.ArgumentError, match="known already"):
        m.cache.append([a], k, v, tokens=[[7, 3, 4]])
    assert a.length == 0
    m.append([a], T=3, tokens=[PROMPT[:3]])
    m.truncate(a, 2)
    assert a.tokens == tuple(PROMPT[:2])
    m.append([a], T=9, tokens=[[1] * 9])
    assert hits(m, PROMPT) == 0
    assert hits(m, [*PROMPT[:2], *[1] * 9]) == 8


def test_a_page_that_is_written_again_is_no_longer_found() -> None:
    m = paged()
    a = filled(m, PROMPT[:8])
    page = a.pages[1]
    m.truncate(a, 6)
    assert hits(m, PROMPT) == 8, "nothing was written yet"
    m.append([a])
    assert a.pages[1] == page, "the only user writes in place"
    assert m.cache.view([a]).k[page, :, 3:].isnan().all(), "and nobody holds what was there"
    m.append([a])
    assert hits(m, PROMPT) == 4
    m.truncate(a, 6)
    m.append([a], T=2, tokens=[[50, 51]])
    assert a.tokens == (*PROMPT[:6], 50, 51)
    assert hits(m, [*PROMPT[:6], 50, 51, 0]) == 8
    m.check()
    check_books(m.cache)


def test_a_page_that_others_use_is_copied_before_it_is_written_again() -> None:
    m = paged()
    a = filled(m, PROMPT[:8])
    m.truncate(a, 6)
    full = m.cache.add(tokens=PROMPT)  # takes the page that a is in the middle of
    before = contents(m.cache.view([full]), 0)
    m.append([a])
    after = contents(m.cache.view([full]), 0)
    assert same(before[0], after[0])
    assert full.pages[1] != a.pages[1]
    assert hits(m, PROMPT) == 8
    m.check([a])
    check_books(m.cache)


def test_a_chain_goes_on_after_truncation_and_fork() -> None:
    m = paged()
    a = filled(m, PROMPT)
    twin = m.fork(a)
    m.append([twin], tokens=[[60]])
    m.append([a], tokens=[[61]])
    assert twin.tokens == (*PROMPT, 60)
    assert hits(m, [*PROMPT, 60, 0]) == hits(m, [*PROMPT, 61, 0]) == 12
    m.truncate(twin, 5)
    m.append([twin], T=7, tokens=[[1, 2, 3, 4, 5, 6, 7]])
    assert hits(m, [*PROMPT[:5], 1, 2, 3, 4, 5, 6, 7, 0]) == 12
    assert hits(m, [*PROMPT, 61, 0]) == 12
    m.truncate(twin, 0)
    m.append([twin], T=4, tokens=[[9, 9, 9, 9]])
    assert hits(m, [9, 9, 9, 9, 9]) == 4
    m.check()
    check_books(m.cache)


def test_a_rolled_back_step_leaves_no_tokens() -> None:
    m = paged(layers=2)
    a = m.add()
    m.cache.append([a], *m.make(1, 4), tokens=[[1, 2, 3, 4]])
    m.cache.rollback([a])
    assert a.tokens is None
    m.append([a], T=4, tokens=[[5, 6, 7, 8]])
    assert hits(m, [1, 2, 3, 4, 0]) == 0
    assert hits(m, [5, 6, 7, 8, 0]) == 4
    k, v = m.make(1, 1)
    m.cache.append([a], k, v, tokens=[[9]])
    m.cache.append([a], k, v, layer=1, tokens=[[9]])
    assert a.tokens == (5, 6, 7, 8, 9)
    m.cache.append([a], k, v, tokens=[[9]])
    with pytest.raises(qkv.ArgumentError, match="layer 0"):
        m.cache.append([a], k, v, layer=1, tokens=[[8]])


def test_tokens_may_be_any_integers() -> None:
    m = paged()
    filled(m, PROMPT)
    tensor, array = torch.tensor(PROMPT), np.array(PROMPT)
    strided = torch.stack((tensor, tensor)).T[:, 0]
    for tokens in (tuple(PROMPT), tensor, tensor.to(torch.int32), strided, array, array.astype(np.int32)):
        assert hits(m, tokens) == 8
    assert hits(m, range(11)) == 0


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        ({"tokens": [1.0]}, qkv.ArgumentTypeError, "1.0"),
        ({"tokens": [1, True]}, qkv.ArgumentTypeError, "bool"),
        ({"tokens": [1, None]}, qkv.ArgumentTypeError, "None"),
        ({"tokens": [1, -1]}, qkv.ArgumentError, "-1"),
        ({"tokens": [2**63]}, qkv.ArgumentError, "64-bit"),
        ({"tokens": "text"}, qkv.ArgumentTypeError, "text"),
        ({"tokens": 5}, qkv.ArgumentTypeError, "int"),
        ({"tokens": {1: 2}}, qkv.ArgumentTypeError, "dict"),
        ({"tokens": [[1, 2]]}, qkv.ArgumentTypeError, r"\[1, 2\]"),
        ({"tokens": iter([1])}, qkv.ArgumentTypeError, "iterator"),
        ({"tokens": torch.tensor([[1]])}, qkv.ShapeError, r"\(1, 1\)"),
        ({"tokens": torch.tensor(1)}, qkv.ShapeError, r"\(\)"),
        ({"tokens": torch.tensor([1.0])}, qkv.ArgumentTypeError, "float32"),
        ({"tokens": torch.tensor([True])}, qkv.ArgumentTypeError, "bool"),
        ({"tokens": torch.tensor([-5])}, qkv.ArgumentError, "-5"),
        ({"tokens": torch.empty(3, dtype=torch.int64, device="meta")}, qkv.ArgumentError, "meta"),
        ({"salt": 1.5}, qkv.ArgumentTypeError, "salt=1.5"),
        ({"salt": True}, qkv.ArgumentTypeError, "bool"),
        ({"salt": ("a", "b")}, qkv.ArgumentTypeError, "tuple"),
        ({"adapter": []}, qkv.ArgumentTypeError, "adapter"),
    ],
)
def test_malformed_tokens_and_names(names: dict[str, Any], kind: type[Exception], words: str) -> None:
    m = paged()
    with pytest.raises(kind, match=words):
        m.cache.add(**names)
    assert m.cache.stats().sequences == 0


@pytest.mark.parametrize(
    ("tokens", "lengths", "kind"),
    [
        ([1, 2], None, qkv.ArgumentTypeError),
        ([[1, 2]], None, qkv.ShapeError),
        ([[1, 2], [3]], None, qkv.ShapeError),
        ([[1, 2], [3, 4], [5, 6]], None, qkv.ShapeError),
        ([[1, 2], [3, 4.5]], None, qkv.ArgumentTypeError),
        (torch.tensor([1, 2, 3, 4]), None, qkv.ArgumentTypeError),
        (torch.tensor([[1, 2], [3, -4]]), None, qkv.ArgumentError),
        ("1234", None, qkv.ArgumentTypeError),
        ([1, 2, 3], [3, 1], qkv.ShapeError),
        ([[1, 2, 3], [4]], [3, 1], qkv.ArgumentTypeError),
        (torch.tensor([[1, 2, 3, 4]]), [3, 1], qkv.ShapeError),
    ],
)
def test_malformed_tokens_of_a_step(tokens: Any, lengths: Any, kind: type[Exception]) -> None:
    m = paged()
    a, b = m.add(), m.add()
    k, v = m.make(2, 2) if lengths is None else m.make(1, 4)
    with pytest.raises(kind):
        m.cache.append([a, b], k, v, lengths=lengths, tokens=tokens)
    assert (a.length, b.length, m.cache.stats().pages_used) == (0, 0, 0)


def test_latents_share_prefixes_too() -> None:
    cache = LatentCache(rank=4, rope_dim=2, pages=8, page_size=4, dtype=torch.float32)
    a = cache.add(tokens=PROMPT, salt="s")
    cache.append([a], torch.randn(1, 11, 4), torch.randn(1, 11, 2))
    b = cache.add(tokens=PROMPT, salt="s")
    assert b.pages == a.pages[:2]
    assert cache.add(tokens=PROMPT).cached_tokens == 0
    check_books(cache)


def test_a_long_prompt_is_found_page_by_page() -> None:
    generator = random.Random(1)
    tokens = [generator.randrange(128_000) for _ in range(5_000)]
    m = Mirror(PagedCache(pages=400, num_kv_heads=1, head_dim=1, dtype=torch.float32))
    filled(m, tokens)
    assert hits(m, tokens) == 4_992
    for at in (0, 17, 2_500, 4_991):
        assert hits(m, [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]) == at // 16 * 16
