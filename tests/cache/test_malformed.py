"""Malformed uses of the caches: each has its error class and a message with rule, given and fix, and changes nothing.

An entry of a table is a name: (the call, the class, words that the message must contain).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import qkv
from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache, stored
from qkv.errors import ArgumentError, ArgumentTypeError, PagesExhausted, QKVError, ShapeError

S, A, T, X = ShapeError, ArgumentError, ArgumentTypeError, PagesExhausted
Entry = tuple[Callable[[Any], Any], type[QKVError], tuple[str, ...]]

H, D, P = 2, 4, 4
POOL: dict[str, Any] = {"pages": 8, "page_size": P}
HEADS: dict[str, Any] = {"num_kv_heads": H, "head_dim": D}
ROWS: dict[str, Any] = {"sequences": 3}
RING: dict[str, Any] = {"sequences": 2, "window": 5, "page_size": 2}
LATENT: dict[str, Any] = {"rank": 4, "rope_dim": 2}


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def paged(**changes: Any) -> PagedCache:
    return PagedCache(**POOL | HEADS | {"dtype": torch.float32} | changes)


def kv(n: int = 1, length: int = 1, heads: int = H, wide: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    return t(n, heads, length, wide), t(n, heads, length, wide) * 2


# --------------------------------------------------------------------------------------------------- constructors
MADE: dict[str, Entry] = {
    "no pages": (lambda s: paged(pages=0), A, ("pages", "0")),
    "fewer than no pages": (lambda s: paged(pages=-1), A, ("pages", "-1")),
    "pages is a float": (lambda s: paged(pages=2.5), T, ("pages", "2.5")),
    "pages is True": (lambda s: paged(pages=True), T, ("pages", "True")),
    "page_size of 0": (lambda s: paged(page_size=0), A, ("page_size", "0")),
    "page_size is a string": (lambda s: paged(page_size="16"), T, ("page_size", "'16'")),
    "no heads": (lambda s: paged(num_kv_heads=0), A, ("num_kv_heads", "0")),
    "heads is None": (lambda s: paged(num_kv_heads=None), T, ("num_kv_heads", "None")),
    "head_dim of 0": (lambda s: paged(head_dim=0), A, ("head_dim", "0")),
    "value_dim below 0": (lambda s: paged(value_dim=-1), A, ("value_dim", "-1")),
    "no layers": (lambda s: paged(layers=0), A, ("layers", "0")),
    "dtype is int64": (lambda s: paged(dtype=torch.int64), T, ("dtype", "int64")),
    "dtype is a string": (lambda s: paged(dtype="float32"), T, ("dtype", "float32")),
    "storage is uint8": (lambda s: paged(storage=torch.uint8), T, ("storage", "uint8")),
    "storage is a string": (lambda s: paged(storage="int8"), T, ("storage", "int8")),
    "window of 0": (lambda s: paged(window=0), A, ("window", "0")),
    "window is a float": (lambda s: paged(window=4.0), T, ("window", "4.0")),
    "sinks below 0": (lambda s: paged(window=4, sinks=-1), A, ("sinks", "-1")),
    "sinks without a window": (lambda s: paged(sinks=2), A, ("sinks", "window")),
    "no sequences": (lambda s: DenseCache(sequences=0, **HEADS), A, ("sequences", "0")),
    "capacity of 0": (lambda s: DenseCache(sequences=1, capacity=0, **HEADS), A, ("capacity", "0")),
    "capacity is a float": (lambda s: DenseCache(sequences=1, capacity=8.0, **HEADS), T, ("capacity", "8.0")),
    "ring window of 0": (lambda s: RingCache(sequences=1, window=0, **HEADS), A, ("window", "0")),
    "ring window is None": (lambda s: RingCache(sequences=1, window=None, **HEADS), T, ("window", "None")),
    "ring sinks below 0": (lambda s: RingCache(sequences=1, window=3, sinks=-2, **HEADS), A, ("sinks", "-2")),
    "chunk of 0": (lambda s: RingCache(sequences=1, window=3, chunk=0, **HEADS), A, ("chunk", "0")),
    "rank of 0": (lambda s: LatentCache(rank=0, rope_dim=2, **POOL), A, ("rank", "0")),
    "rope_dim below 0": (lambda s: LatentCache(rank=4, rope_dim=-1, **POOL), A, ("rope_dim", "-1")),
    "latent on pages and rows": (lambda s: LatentCache(**LATENT, pages=4, sequences=2), A, ("pages", "sequences")),
    "latent on neither": (lambda s: LatentCache(**LATENT), A, ("pages", "sequences")),
}

# ------------------------------------------------------------------------------- uses of a paged cache of two layers


def scene() -> SimpleNamespace:
    """Sequences of 6 and 3 tokens, one in the middle of a step, one swapped out, one freed, one of another cache."""
    cache = paged(layers=2, debug=True)
    a, b, middle, out, gone = (cache.add(tokens=[1, 2, 3], salt=n) for n in range(5))
    for seq, length in ((a, 6), (b, 3), (out, 2), (gone, 1)):
        for layer in range(2):
            cache.append([seq], *kv(1, length), layer)
    cache.swap_out(out)
    cache.free(gone)
    cache.append([middle], *kv(1, 2), 0)
    other = paged()
    return SimpleNamespace(cache=cache, a=a, b=b, middle=middle, out=out, gone=gone, foreign=other.add(), other=other)


def put(s: Any, seqs: Any, k: Any = None, v: Any = None, layer: Any = 0, **more: Any) -> Any:
    one_k, one_v = kv()
    return s.cache.append(seqs, one_k if k is None else k, one_v if v is None else v, layer, **more)


USED: dict[str, Entry] = {
    # add
    "tokens is a string": (lambda s: s.cache.add(tokens="abc"), T, ("tokens",)),
    "tokens are floats": (lambda s: s.cache.add(tokens=[1.5]), T, ("tokens", "1.5")),
    "a token is True": (lambda s: s.cache.add(tokens=[True]), T, ("tokens", "bool")),
    "a token is None": (lambda s: s.cache.add(tokens=[1, None]), T, ("tokens", "None")),
    "tokens is an int": (lambda s: s.cache.add(tokens=5), T, ("tokens", "5")),
    "tokens is a float tensor": (lambda s: s.cache.add(tokens=t(3)), T, ("tokens", "float32")),
    "tokens is 2-D": (lambda s: s.cache.add(tokens=t(1, 3, dtype=torch.int64)), S, ("tokens", "(1, 3)")),
    "a token below 0": (lambda s: s.cache.add(tokens=[-1]), A, ("tokens", "-1")),
    "a token of 2^63": (lambda s: s.cache.add(tokens=[2**63]), A, ("tokens", str(2**63))),
    "salt is a list": (lambda s: s.cache.add(tokens=[1], salt=["a"]), T, ("salt", "list")),
    "salt is a float": (lambda s: s.cache.add(tokens=[1], salt=1.5), T, ("salt", "1.5")),
    "adapter is a dict": (lambda s: s.cache.add(tokens=[1], adapter={}), T, ("adapter", "dict")),
    # append: the sequences
    "a sequence alone": (lambda s: put(s, 3), T, ("seqs", "3")),
    "a None among them": (lambda s: put(s, [s.a, None], *kv(2)), T, ("None",)),
    "an index": (lambda s: put(s, [0]), T, ("0",)),
    "twice the same": (lambda s: put(s, [s.a, s.a], *kv(2)), A, ("twice",)),
    "a freed one": (lambda s: put(s, [s.gone]), A, ("freed",)),
    "a swapped one": (lambda s: put(s, [s.out]), A, ("swap",)),
    "a foreign one": (lambda s: put(s, [s.foreign]), A, ("of this cache",)),
    # append: the tensors
    "k is a list": (lambda s: put(s, [s.a], [[1.0]]), T, ("k", "list")),
    "v is an array": (lambda s: put(s, [s.a], None, np.ones((1, H, 1, D))), T, ("v", "ndarray")),
    "k is 3-D": (lambda s: put(s, [s.a], t(H, 1, D)), S, ("k", f"({H}, 1, {D})")),
    "heads of k": (lambda s: put(s, [s.a], t(1, 3, 1, D)), S, ("k", f"(1, 3, 1, {D})")),
    "head size of k": (lambda s: put(s, [s.a], t(1, H, 1, 5)), S, ("k", f"(1, {H}, 1, 5)")),
    "head size of v": (lambda s: put(s, [s.a], None, t(1, H, 1, 3)), S, ("v", f"(1, {H}, 1, 3)")),
    "rows of k": (lambda s: put(s, [s.a], *kv(2)), S, ("(2, ",)),
    "rows for two": (lambda s: put(s, [s.a, s.b], *kv(1)), S, ("(1, ",)),
    "tokens of k and v": (lambda s: put(s, [s.a], t(1, H, 2, D), t(1, H, 3, D)), S, ("(1, 2, 2, 4)", "(1, 2, 3, 4)")),
    "heads after length": (lambda s: put(s, [s.a], t(1, 3, H, D), t(1, 3, H, D)), S, ("(1, 3, 2, 4)",)),
    "dtype of k": (lambda s: put(s, [s.a], kv()[0].double()), T, ("float64", "float32")),
    "dtype of v": (lambda s: put(s, [s.a], None, kv()[1].bfloat16()), T, ("bfloat16", "float32")),
    "device of k": (lambda s: put(s, [s.a], kv()[0].to("meta")), T, ("meta",)),
    "v is sparse": (lambda s: put(s, [s.a], None, kv()[1].to_sparse()), T, ("sparse",)),
    # append: the layer and the order
    "layer below 0": (lambda s: put(s, [s.a], layer=-1), A, ("layer", "-1")),
    "layer too large": (lambda s: put(s, [s.a], layer=2), A, ("layer", "2")),
    "layer is a string": (lambda s: put(s, [s.a], layer="0"), T, ("layer", "'0'")),
    "layer is True": (lambda s: put(s, [s.a], layer=True), T, ("layer", "True")),
    "the second layer first": (lambda s: put(s, [s.a], layer=1), A, ("layer", "rollback")),
    "the first layer again": (lambda s: put(s, [s.middle], *kv(1, 2), 0), A, ("layer", "rollback")),
    "another count in layer 1": (lambda s: put(s, [s.middle], *kv(1, 1), 1), (A, S), ("2", "1")),
    "one in a step, one not": (lambda s: put(s, [s.a, s.middle], *kv(2, 2), 1), A, ("rollback",)),
    # append: lengths and tokens
    "lengths: sum": (lambda s: put(s, [s.a, s.b], *kv(1, 3), lengths=[1, 1]), S, ("lengths", "3")),
    "lengths: count": (lambda s: put(s, [s.a, s.b], *kv(1, 3), lengths=[3]), S, ("lengths", "2")),
    "lengths: negative": (lambda s: put(s, [s.a, s.b], *kv(1, 3), lengths=[4, -1]), A, ("lengths", "-1")),
    "lengths: floats": (lambda s: put(s, [s.a, s.b], *kv(1, 3), lengths=[1.0, 2.0]), T, ("lengths", "1.0")),
    "lengths: an int": (lambda s: put(s, [s.a], lengths=1), T, ("lengths",)),
    "lengths: rows not packed": (lambda s: put(s, [s.a, s.b], *kv(2, 1), lengths=[1, 1]), S, ("(2, ",)),
    "step tokens: count": (lambda s: put(s, [s.a], tokens=[[1, 2]]), S, ("tokens", "2")),
    "step tokens: rows": (lambda s: put(s, [s.a], tokens=[[1], [2]]), S, ("tokens", "2")),
    "step tokens: floats": (lambda s: put(s, [s.a], tokens=[[0.5]]), T, ("tokens", "0.5")),
    "step tokens: below 0": (lambda s: put(s, [s.a], tokens=[[-5]]), A, ("tokens", "-5")),
    "too many tokens": (lambda s: put(s, [s.a], *kv(1, 40)), X, ("pages", "evict")),
    # view and step
    "view of a freed one": (lambda s: s.cache.view([s.gone]), A, ("freed",)),
    "view of a swapped one": (lambda s: s.cache.view([s.out]), A, ("swap",)),
    "view of a foreign one": (lambda s: s.cache.view([s.foreign]), A, ("of this cache",)),
    "view twice": (lambda s: s.cache.view([s.a, s.a]), A, ("twice",)),
    "view of layer 2": (lambda s: s.cache.view([s.a], layer=2), A, ("layer", "2")),
    "view of None": (lambda s: s.cache.view(None), T, ("seqs", "None")),
    "view lengths: count": (lambda s: s.cache.view([s.a], lengths=[1, 1]), S, ("lengths",)),
    "view lengths: too many": (lambda s: s.cache.view([s.a], lengths=[7]), (A, S), ("7", "6")),
    "view lengths: negative": (lambda s: s.cache.view([s.a], lengths=[-1]), A, ("-1",)),
    "step without a count": (lambda s: s.cache.step([s.a]), A, ("T", "lengths")),
    "step with both counts": (lambda s: s.cache.step([s.a], T=1, lengths=[1]), A, ("T", "lengths")),
    "step of T below 0": (lambda s: s.cache.step([s.a], T=-1), A, ("T", "-1")),
    "step of a freed one": (lambda s: s.cache.step([s.gone], T=1), A, ("freed",)),
    "step: layer 2": (lambda s: s.cache.step([s.a], T=1).layer(2), A, ("layer", "2")),
    # what is done with sequences
    "freed twice": (lambda s: s.cache.free(s.gone), A, ("freed",)),
    "one of them freed before": (lambda s: s.cache.free([s.a, s.gone]), A, ("freed",)),
    "the same twice in one free": (lambda s: s.cache.free([s.a, s.a]), A, ("twice",)),
    "free of a foreign one": (lambda s: s.cache.free(s.foreign), A, ("of this cache",)),
    "free of None": (lambda s: s.cache.free(None), T, ("None",)),
    "fork of a freed one": (lambda s: s.cache.fork(s.gone), A, ("freed",)),
    "fork of a swapped one": (lambda s: s.cache.fork(s.out), A, ("swap",)),
    "fork in a step": (lambda s: s.cache.fork(s.middle), A, ("step", "rollback")),
    "fork of a list": (lambda s: s.cache.fork([s.a]), T, ("list",)),
    "truncate below 0": (lambda s: s.cache.truncate(s.a, -1), A, ("length", "-1")),
    "truncate past the end": (lambda s: s.cache.truncate(s.a, 7), A, ("7", "6")),
    "truncate to a float": (lambda s: s.cache.truncate(s.a, 2.0), T, ("length", "2.0")),
    "truncate to True": (lambda s: s.cache.truncate(s.a, True), T, ("length", "True")),
    "truncate in a step": (lambda s: s.cache.truncate(s.middle, 0), A, ("step", "rollback")),
    "truncate a swapped one": (lambda s: s.cache.truncate(s.out, 0), A, ("swap",)),
    "rollback of a freed one": (lambda s: s.cache.rollback([s.gone]), A, ("freed",)),
    "rollback of one twice": (lambda s: s.cache.rollback([s.middle, s.middle]), A, ("twice",)),
    "swapped out twice": (lambda s: s.cache.swap_out(s.out), A, ("swap",)),
    "swapped in without out": (lambda s: s.cache.swap_in(s.a), A, ("swap",)),
    "swapped out in a step": (lambda s: s.cache.swap_out(s.middle), A, ("step", "rollback")),
    "swap of a freed one": (lambda s: s.cache.swap_in(s.gone), A, ("freed",)),
    "evict below 0": (lambda s: s.cache.evict(-1), A, ("pages", "-1")),
    "evict a float": (lambda s: s.cache.evict(1.0), T, ("pages", "1.0")),
}


def others() -> SimpleNamespace:
    """One small cache of each other class, with a sequence of three tokens each."""
    dense = DenseCache(sequences=1, capacity=4, **HEADS, dtype=torch.float32)
    ring = RingCache(**RING, **HEADS, dtype=torch.float32, chunk=2)
    latent = LatentCache(**LATENT, **POOL, dtype=torch.float32)
    s = SimpleNamespace(dense=dense, ring=ring, latent=latent, d=dense.add(), r=ring.add(), l=latent.add())
    dense.append([s.d], *kv(1, 3))
    for _ in range(12):
        ring.append([s.r], *kv(1, 1))
    latent.append([s.l], t(1, 3, 4), t(1, 3, 2))
    return s


OTHERS: dict[str, Entry] = {
    "dense: tokens": (lambda s: s.dense.add(tokens=[1]), A, ("tokens", "PagedCache")),
    "dense: salt": (lambda s: s.dense.add(salt="a"), A, ("salt", "PagedCache")),
    "ring: adapter": (lambda s: s.ring.add(adapter="a"), A, ("adapter", "PagedCache")),
    "dense: one sequence too many": (lambda s: s.dense.add(), (A, X), ("sequences", "1")),
    "dense: full": (lambda s: s.dense.append([s.d], *kv(1, 14)), (A, X), ("capacity", "17")),
    "dense: tokens of a step": (lambda s: s.dense.append([s.d], *kv(), tokens=[[1]]), A, ("tokens",)),
    "dense: truncate too far": (lambda s: s.dense.truncate(s.d, 4), A, ("4", "3")),
    "ring: more than a chunk": (lambda s: s.ring.append([s.r], *kv(1, 3)), (A, S), ("chunk", "3")),
    "ring: truncate into what is gone": (lambda s: s.ring.truncate(s.r, 1), A, ("window",)),
    "latent: k of 4 dimensions": (lambda s: s.latent.append([s.l], t(1, 1, 1, 4), t(1, 1, 2)), S, ("(1, 1, 1, 4)",)),
    "latent: rank": (lambda s: s.latent.append([s.l], t(1, 1, 5), t(1, 1, 2)), S, ("(1, 1, 5)", "4")),
    "latent: rope": (lambda s: s.latent.append([s.l], t(1, 1, 4), t(1, 1, 3)), S, ("(1, 1, 3)", "2")),
    "latent: tokens differ": (lambda s: s.latent.append([s.l], t(1, 2, 4), t(1, 1, 2)), S, ("(1, 2, 2)", "(1, 1, 2)")),
}

# --------------------------------------------------------------------------------------------- one's own pool
K, V = t(6, H, P, D), t(6, H, P, D)


def table(*rows: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


def own(tables: Any = None, lengths: Any = (5, 3), k: Any = K, v: Any = V, **more: Any) -> Callable[[Any], Any]:
    tables = table([0, 1], [2, -1]) if tables is None else tables
    return lambda s: stored(k, v, tables, list(lengths) if isinstance(lengths, tuple) else lengths, **more)


STORED: dict[str, Entry] = {
    "table of floats": (own(table([0, 1], [2, 3]).float()), T, ("table", "float32")),
    "table of bools": (own(table([0, 1], [1, 0]).bool()), T, ("table", "bool")),
    "table is a list": (own([[0, 1], [2, -1]]), T, ("table", "list")),
    "table is 1-D": (own(table([0, 1])[0]), S, ("table", "(2,)")),
    "a page out of range": (own(table([0, 6], [2, -1])), A, ("6",)),
    "a used entry of -1": (own(table([0, -1], [2, -1])), A, ("-1",)),
    "a page below -1": (own(table([-7, 1], [2, -1])), A, ("-7",)),
    "a table too short": (own(lengths=(9, 3)), (A, S), ("3",)),
    "lengths of another count": (own(lengths=(5,)), S, ("lengths",)),
    "a length below 0": (own(lengths=(5, -1)), A, ("-1",)),
    "lengths of floats": (own(lengths=(5.0, 3.0)), T, ("5.0",)),
    "v of other pages": (own(v=t(5, H, P, D)), S, ("(5, 2, 4, 4)",)),
    "v of other slots": (own(v=t(6, H, 3, D)), S, ("(6, 2, 3, 4)",)),
    "k is 3-D": (own(k=t(6, P, D)), S, ("(6, 4, 4)",)),
    "dtypes differ": (own(v=V.double()), T, ("float64",)),
    "a table elsewhere": (own(table([0, 1], [2, 3]).to("meta")), T, ("meta",)),
    "int8 without scales": (own(k=K.to(torch.int8), v=V.to(torch.int8), dtype=torch.float32), (A, T), ("k_scale",)),
    "scales of another shape": (
        own(k=K.char(), v=V.char(), k_scale=t(6, H), v_scale=t(6, H, P), dtype=torch.float32), S, ("k_scale", "(6, 2)"),
    ),
    "scales in float16": (
        own(k=K.char(), v=V.char(), k_scale=t(6, H, P).half(), v_scale=t(6, H, P), dtype=torch.float32),
        T, ("k_scale", "float16"),
    ),
    "scales without int8": (own(k_scale=t(6, H, P), v_scale=t(6, H, P)), A, ("k_scale",)),
    "queries: too many": (own(queries=[6, 3]), (A, S), ("6", "5")),
    "queries of another count": (own(queries=[1]), S, ("queries",)),
    "csr: indptr falls": (own((table([0, 2, 1])[0], table([0, 1, 2])[0])), A, ("indptr",)),
    "csr: indptr does not begin at 0": (own((table([1, 2, 3])[0], table([0, 1, 2])[0]), (3, 3)), A, ("indptr",)),
    "csr: indptr ends past the indices": (own((table([0, 2, 9])[0], table([0, 1, 2])[0])), A, ("indptr",)),
    "csr: a page out of range": (own((table([0, 2, 3])[0], table([0, 1, 99])[0])), A, ("99",)),
    "csr: too short": (own((table([0, 1, 2])[0], table([0, 1])[0])), (A, S), ("needs 2",)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the check
def state(cache: Any, seqs: list[Any]) -> tuple[Any, ...]:
    """Figures, tables and every number that can be read."""
    views = [cache.view([q], layer=i) for q in seqs for i in range(cache.layers)]
    bits = [(x.tables, x.starts, x.lengths) for x in (v.layout for v in views)]
    tensors = [x.clone().nan_to_num(-7.0) for v in views for x in v[:2]]
    return str(cache.stats()), [(q.length, q.tokens, q.pages, q.cached_tokens) for q in seqs], bits, tensors


def same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    return one[:3] == two[:3] and all(torch.equal(a, b) for a, b in zip(one[3], two[3], strict=True))


def judge(entry: Entry, given: Any) -> None:
    call, kind, words = entry
    kinds = kind if isinstance(kind, tuple) else (kind,)
    with pytest.raises(QKVError) as error:
        call(given)
    text = str(error.value)
    assert type(error.value) in kinds, f"{type(error.value).__name__}: {text}"
    assert re.fullmatch(r"(qkv\.)?[\w.]+\(\): \S.*\. Got \S.*\. \S.*\.", text, re.DOTALL), f"not in three parts: {text}"
    assert not re.search(r"[^. ]\.\.($|\s)", text), f"two stops: {text}"
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


@pytest.mark.parametrize("entry", MADE.values(), ids=MADE)
def test_a_cache_is_not_made(entry: Entry) -> None:
    judge(entry, None)


@pytest.mark.parametrize("entry", USED.values(), ids=USED)
def test_a_paged_cache_refuses_and_stays(entry: Entry) -> None:
    s = scene()
    held = [s.a, s.b, s.middle]
    before, clock = state(s.cache, held), s.cache.view([s.a]).layout.clock.now
    judge(entry, s)
    assert same(before, state(s.cache, held)), "a refused call changed the cache"
    assert s.cache.view([s.a]).layout.clock.now == clock, "a refused call made views stale"
    # and everything still works, the unfinished step and the swapped sequence too
    s.cache.append([s.middle], *kv(1, 2), 1)
    s.cache.swap_in(s.out)
    s.cache.free([s.a, s.b, s.middle, s.out])
    assert s.cache.stats().pages_used == 0


@pytest.mark.parametrize("entry", OTHERS.values(), ids=OTHERS)
def test_the_other_caches_refuse_and_stay(entry: Entry) -> None:
    s = others()
    caches = ((s.dense, s.d), (s.ring, s.r), (s.latent, s.l))
    before = [state(cache, [seq]) for cache, seq in caches]
    judge(entry, s)
    for (cache, seq), old in zip(caches, before, strict=True):
        assert same(old, state(cache, [seq])), "a refused call changed the cache"


@pytest.mark.parametrize("entry", STORED.values(), ids=STORED)
def test_a_pool_of_ones_own_is_checked(entry: Entry) -> None:
    judge(entry, None)


def test_there_are_many() -> None:
    assert len(MADE) + len(USED) + len(OTHERS) + len(STORED) >= 60


# --------------------------------------------------------------------------------------- attention with a bad view
def test_a_stale_view_is_refused_by_attention() -> None:
    cache = paged()
    seq = cache.add()
    cache.append([seq], *kv(1, 3))
    view = cache.view([seq])
    q = t(1, H, 1, D)
    qkv.attention(q, view, mask=qkv.causal())
    cache.free(seq)
    with pytest.raises(ArgumentError, match="Ask the cache for a new view"):
        qkv.attention(q, view, mask=qkv.causal())


def test_entries_past_the_used_part_are_not_looked_at() -> None:
    rows = table([0, 1, 99, -5], [2, 1 << 30, -1, -1])
    view = stored(K, V, rows, [5, 3])
    assert list(view.layout.lengths) == [5, 3]
    assert isinstance(view.layout.tables, array)
