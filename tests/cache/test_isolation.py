"""Canaries: nothing is shared across salts, and a page that one user gave back can never be read by another.

Every hit is asked for in pairs: the one who may share does, and the one who may not does not. A test of the second
alone would pass a cache that never shares.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from typing import Any

import numpy as np
import pytest
import torch

from qkv.cache import LatentCache, PagedCache
from tests.kit.cache_reading import Code, contents, numbers

P, LAYERS, H, D = 4, 2, 2, 6
PROMPT = [5, 3, 8, 1, 9, 2, 7, 7, 4, 6]  # two whole pages and a half


class Store:
    """A cache, and ids for what is written to it."""

    def __init__(self, pages: int = 24, **options: Any) -> None:
        shape: dict[str, Any] = {
            "page_size": P,
            "num_kv_heads": H,
            "head_dim": D,
            "layers": LAYERS,
            "dtype": torch.float64,
        }
        self.cache = PagedCache(pages=pages, **shape | {"debug": True} | options)
        self.code = Code(LAYERS, H, D, D, None)
        self.dtype = options.get("dtype", torch.float64)
        self.next = 1

    def add(self, tokens: Any = PROMPT, **who: Any) -> Any:
        """A sequence with all its tokens written: those that were found are not written again."""
        seq = self.cache.add(tokens=tokens, **who)
        self.write(seq, len(tokens) - seq.length)
        return seq

    def write(self, seq: Any, count: int, tokens: Any = None) -> list[int]:
        ids = list(range(self.next, self.next + count))
        self.next += count
        for layer in range(LAYERS):
            given = None if tokens is None else [tokens]
            self.cache.append([seq], *self.code.tensors(ids, layer, 1, self.dtype), layer, tokens=given)
        return ids

    def read(self, seq: Any) -> list[int]:
        return contents(self.cache, [seq], self.code)[0]

    def pages(self, *seqs: Any) -> set[int]:
        return {p for seq in seqs for p in seq.pages}


WHO: tuple[dict[str, Any], ...] = (
    {}, {"salt": 1}, {"salt": "1"}, {"salt": b"1"}, {"salt": ""}, {"salt": b""}, {"salt": 0}, {"salt": "None"},
    {"salt": -1}, {"salt": "1\x00"}, {"salt": 256}, {"salt": b"\x01"}, {"salt": b"\x00\x01"},
    {"adapter": "1"}, {"adapter": 1}, {"adapter": b"1"}, {"salt": "1", "adapter": "1"}, {"salt": "11", "adapter": ""},
    {"salt": "", "adapter": "11"}, {"salt": "a", "adapter": "bc"}, {"salt": "ab", "adapter": "c"},
)  # fmt: skip


@pytest.mark.parametrize("digest", ["real", "constant"])
def test_users_share_with_themselves_and_with_nobody_else(digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs over all kinds of salt and adapter, the ones that only frame differently among them."""
    if digest == "constant":
        force_constant_digest(monkeypatch)
    for mine, other in itertools.combinations(WHO, 2):
        store = Store()
        first = store.add(**mine)
        theirs = store.add(**other)
        assert theirs.cached_tokens == 0, f"{other} was given the pages of {mine}"
        assert not store.pages(first) & store.pages(theirs)
        again = store.cache.add(tokens=PROMPT, **mine)
        assert again.cached_tokens == 8, f"{mine} was not given its own pages"
        assert again.pages[:2] == first.pages[:2]
        assert store.read(again) == store.read(first)[:8]
        assert not set(store.read(first)) & set(store.read(theirs))


def force_constant_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hash of the standard library says the same, so that only a comparison can tell prefixes apart."""

    class Constant:
        digest_size = 32

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def update(self, _: Any) -> None: ...

        def copy(self) -> Constant:
            return self

        def digest(self) -> bytes:
            return b"\x07" * 32

        def hexdigest(self) -> str:
            return "07" * 32

    for name in ("blake2b", "sha256"):
        monkeypatch.setattr(hashlib, name, Constant)
    patch_imported_hashes(monkeypatch, Constant)


def patch_imported_hashes(monkeypatch: pytest.MonkeyPatch, constant: Any) -> None:
    """Also where a module took the function by name."""
    import sys

    for name, module in list(sys.modules.items()):
        if name.startswith("qkv.cache"):
            for attribute in ("blake2b", "sha256"):
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, constant)


def test_a_constant_digest_still_gives_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts of three pages over two tokens, added while others live, forked, freed and evicted."""
    force_constant_digest(monkeypatch)
    store = Store(pages=40)
    rng = np.random.default_rng(0)
    wrote: dict[tuple[Any, tuple[int, ...]], set[int]] = {}
    living: list[Any] = []
    hits = 0
    for _ in range(120):
        tokens = rng.integers(0, 2, int(rng.integers(1, 10))).tolist()
        salt = [None, "u"][int(rng.integers(2))]
        seq = store.cache.add(tokens=tokens, salt=salt)
        for j, one in enumerate(store.read(seq)):
            assert one in wrote[salt, tuple(tokens[: j + 1])], f"{tokens} was given the numbers of another prefix"
        hits += bool(seq.cached_tokens)
        start = seq.length
        for j, one in enumerate(store.write(seq, len(tokens) - start), start):
            wrote.setdefault((salt, tuple(tokens[: j + 1])), set()).add(one)
        living.append(seq)
        if len(living) > 5:
            store.cache.free(living.pop(int(rng.integers(len(living)))))
    assert hits > 10, "the digest was to be constant, not useless"


def test_what_is_given_back_is_poisoned_before_anyone_can_read_it() -> None:
    """Debug: a page of a freed user that is not cached reads as NaN in every slot, at once and in the next owner."""
    store = Store(pages=6)
    secret = store.cache.add(salt="a")
    store.write(secret, 22)
    pages = store.pages(secret)
    assert len(pages) == 6
    view = store.cache.view([secret])
    pool = [numbers(store.cache.view([secret], layer=i)) for i in range(LAYERS)]
    assert all(np.isfinite(x.k[p, :, :2]).all() for x in pool for p in pages)
    store.cache.free(secret)
    spy = store.cache.add(salt="b")
    store.write(spy, 1)
    for layer in range(LAYERS):
        now = numbers(store.cache.view([spy], layer=layer))
        finite = np.isfinite(now.k).all((1, 3)) | np.isfinite(now.v).any((1, 3))
        assert finite.sum() == 1, "numbers of a freed user are still in the pool"
    assert view.layout.alive_at != view.layout.clock.now


def test_cached_pages_of_one_user_are_evicted_and_poisoned_for_another() -> None:
    store = Store(pages=4)
    store.cache.free(store.add(salt="a"))
    assert store.cache.stats().pages_cached == 2
    spy = store.cache.add(tokens=PROMPT, salt="b")
    assert spy.cached_tokens == 0
    ids = store.write(spy, 16)  # takes all four pages, the two cached ones of the other user among them
    assert store.read(spy) == ids
    assert store.cache.stats().pages_cached == 0
    store.cache.free(spy)
    back = store.cache.add(tokens=PROMPT, salt="a")
    assert back.cached_tokens == 0, "an evicted page was found again"


def test_a_swapped_sequence_gives_its_pages_to_others_clean() -> None:
    store = Store(pages=3)
    a = store.cache.add(salt="a")
    mine = store.write(a, 12)
    store.cache.swap_out(a)
    b = store.cache.add(salt="b")
    theirs = store.write(b, 5)
    assert store.read(b) == theirs
    now = numbers(store.cache.view([b]))
    assert np.isfinite(now.k).all((1, 3)).sum() == 5, "numbers of a swapped sequence are still in the pool"
    store.cache.free(b)
    store.cache.swap_in(a)
    assert store.read(a) == mine


def test_identity_and_dtype_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, or two storages, that hash one prompt with one key: their chains have no digest in common."""
    monkeypatch.setattr(secrets, "token_bytes", bytes)
    made: list[dict[str, Any]] = [
        {}, {"identity": "model-a"}, {"identity": "model-b"}, {"identity": b"model-b"}, {"identity": 1},
        {"identity": "1"}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"storage": torch.int8},
        {"page_size": 2},
    ]  # fmt: skip
    digests = [chain_digests(options) for options in made]
    assert chain_digests({}) == digests[0], "with the same key and names the digests are the same"
    for one, two in itertools.combinations(digests, 2):
        assert not one & two


def chain_digests(options: dict[str, Any]) -> set[bytes]:
    """The digests under which a cache files the pages of a prompt."""
    store = Store(**options)
    store.add()
    digests = {entry.digest for entry in store.cache._pool.entries if entry is not None}
    assert len(digests) == 10 // store.cache.page_size
    return digests


def test_two_caches_have_two_keys() -> None:
    """Nobody who knows the digests of one process can aim at another's."""
    assert not chain_digests({}) & chain_digests({})


def test_a_parent_evicted_under_living_children() -> None:
    """The first page of a chain is gone, the second is held: nobody may be given the second as a first, or a gap."""
    store = Store(pages=8)
    a = store.add()
    twin = store.cache.fork(a)
    store.cache.truncate(a, 0)
    store.cache.free(a)
    assert store.read(twin)[:8] == list(range(1, 9))
    store.cache.evict()
    shifted = store.cache.add(tokens=PROMPT[4:])
    assert shifted.cached_tokens == 0, "the second page of a prompt was found as the first of another"
    whole = store.cache.add(tokens=PROMPT)
    assert whole.cached_tokens == 8
    assert store.read(whole) == store.read(twin)[:8]


def test_children_of_an_evicted_page_are_not_reached_through_its_successor() -> None:
    """Page 0 of a chain is evicted and its place taken by other tokens: the old second page must not follow it."""
    store = Store(pages=12)
    a = store.add(PROMPT)  # pages A0 A1
    store.cache.free(a)
    store.cache.evict(1)
    other = [1, 1, 1, 1, *PROMPT[4:]]
    b = store.add(other)
    assert b.cached_tokens == 0
    again = store.cache.add(tokens=PROMPT)
    ids = store.read(again)
    assert ids == list(range(1, len(ids) + 1)), "numbers of another chain"
    assert again.cached_tokens in (0, 4)


def test_pages_of_a_longer_prompt_follow_only_their_own_parent() -> None:
    """The same second page after two first pages: the hit of one never serves the other."""
    store = Store(pages=24)
    one, two = [0, 0, 0, 0, *PROMPT[4:]], [1, 1, 1, 1, *PROMPT[4:]]
    a, b = store.add(one), store.add(two)
    assert b.cached_tokens == 0
    again_a, again_b = store.cache.add(tokens=one), store.cache.add(tokens=two)
    assert (again_a.cached_tokens, again_b.cached_tokens) == (8, 8)
    assert store.read(again_a) == store.read(a)[:8]
    assert store.read(again_b) == store.read(b)[:8]


def test_the_least_recently_used_goes_first() -> None:
    store = Store(pages=6)
    for salt in ("a", "b"):
        store.cache.free(store.add(salt=salt))
    store.cache.free(store.cache.add(tokens=PROMPT, salt="a"))  # "a" was used last
    store.cache.evict(2)
    assert store.cache.add(tokens=PROMPT, salt="b").cached_tokens == 0
    assert store.cache.add(tokens=PROMPT, salt="a").cached_tokens == 8


def test_the_end_of_a_chain_goes_before_its_beginning() -> None:
    """A first page without its second is of use; a second without its first is not."""
    store = Store(pages=6)
    store.cache.free(store.add())
    store.cache.evict(1)
    assert store.cache.add(tokens=PROMPT).cached_tokens == 4


def test_generated_tokens_are_shared_only_when_they_are_known() -> None:
    store = Store()
    a = store.add(PROMPT[:3])
    store.write(a, 5, PROMPT[3:8])
    assert store.cache.add(tokens=PROMPT).cached_tokens == 8
    b = store.add([2, 2, 2])
    store.write(b, 5)
    assert store.cache.add(tokens=[2, 2, 2, 0, 0, 0, 0, 0, 0]).cached_tokens == 0


def test_a_truncated_page_that_is_written_again_is_not_what_it_was() -> None:
    store = Store()
    a = store.add(PROMPT[:8])
    store.cache.truncate(a, 6)
    store.write(a, 2, [0, 0])
    b = store.cache.add(tokens=PROMPT)
    assert b.cached_tokens in (4, 8)
    assert store.read(b) == list(range(1, b.cached_tokens + 1)), "a page was found whose end was overwritten"
    c = store.cache.add(tokens=[*PROMPT[:6], 0, 0, 1])
    assert c.cached_tokens == 8, "what was written after a truncation is not found"
    assert store.read(c)[:8] == store.read(a)


def test_an_unfinished_step_is_not_shared() -> None:
    """Pages that only the first layer has are not found: the other layers hold nothing yet."""
    store = Store()
    a = store.cache.add(tokens=PROMPT)
    store.cache.append([a], *store.code.tensors(list(range(1, 11)), 0, 1, torch.float64), 0)
    assert store.cache.add(tokens=PROMPT).cached_tokens == 0
    store.cache.append([a], *store.code.tensors(list(range(1, 11)), 1, 1, torch.float64), 1)
    assert store.cache.add(tokens=PROMPT).cached_tokens == 8


def test_latent_pages_are_shared_by_salt_alike() -> None:
    cache = LatentCache(rank=6, rope_dim=2, pages=12, page_size=P, dtype=torch.float64, debug=True)
    a = cache.add(tokens=PROMPT, salt="a")
    cache.append([a], torch.ones(1, 10, 6, dtype=torch.float64), torch.ones(1, 10, 2, dtype=torch.float64))
    assert cache.add(tokens=PROMPT, salt="a").cached_tokens == 8
    assert cache.add(tokens=PROMPT, salt="b").cached_tokens == 0
