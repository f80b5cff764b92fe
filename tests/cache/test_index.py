"""Index keys in caches: a plane of one head that follows its sequences wherever their keys and values go."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from tests.kit.cache_truth import contents, rows, same

HEADS, D, DI, LAYERS = 3, 4, 5, 2
_HEADS: dict[str, Any] = {"num_kv_heads": HEADS, "head_dim": D, "value_dim": 2}
_EACH: dict[str, Any] = {"index_dim": DI, "layers": LAYERS, "dtype": torch.float32, "debug": True}
KINDS: dict[str, Callable[[], Any]] = {
    "paged": lambda: PagedCache(pages=60, page_size=4, **_HEADS, **_EACH),
    "paged, window": lambda: PagedCache(pages=60, page_size=4, window=9, sinks=2, **_HEADS, **_EACH),
    "paged, int8": lambda: PagedCache(pages=60, page_size=4, storage=torch.int8, **_HEADS, **_EACH),
    "dense": lambda: DenseCache(sequences=4, capacity=160, **_HEADS, **_EACH),
    "dense, growing": lambda: DenseCache(sequences=4, **_HEADS, **_EACH),
    "ring": lambda: RingCache(sequences=4, window=9, chunk=8, page_size=4, **_HEADS, **_EACH),
    "latent, paged": lambda: LatentCache(rank=6, rope_dim=2, pages=60, page_size=4, **_EACH),
    "latent, dense": lambda: LatentCache(rank=6, rope_dim=2, sequences=4, **_EACH),
}


class Told:
    """Every index key that was appended, (Di,) a token, and the caches that hold them."""

    def __init__(self, cache: Any, seed: int) -> None:
        self.cache, self.seed = cache, seed
        self.kept: dict[Any, list[list[Tensor]]] = {}

    def add(self) -> None:
        self.kept[self.cache.add()] = [[] for _ in range(LAYERS)]

    def append(self, seqs: list[Any], counts: list[int]) -> None:
        """A step, ragged unless all counts are equal."""
        ragged = len(set(counts)) > 1
        n, T = (1, sum(counts)) if ragged else (len(seqs), counts[0])
        for layer in range(LAYERS):
            self.seed += 3
            latent = isinstance(self.cache, LatentCache)
            sizes = ((n, T, 6), (n, T, 2)) if latent else ((n, HEADS, T, D), (n, HEADS, T, 2))
            k, v = (rows(self.seed + i, *size) for i, size in enumerate(sizes))
            index = rows(self.seed + 2, n, 1, T, DI)
            if layer and not ragged:  # tokens first, as a layer's projection gives it
                index = index.transpose(1, 2).contiguous().transpose(1, 2)
            self.cache.append(seqs, k, v, layer, index=index, **({"lengths": counts} if ragged else {}))
            for seq, own in zip(seqs, index.transpose(0, 1).flatten(1, 2)[0].split(counts), strict=True):
                self.kept[seq][layer] += own.unbind()

    def check(self) -> None:
        for layer in range(LAYERS):
            view = self.cache.index_view(list(self.kept), layer)
            assert view.v.shape[3] == 0
            assert self.cache.view(list(self.kept), layer).v.shape[3] == (
                6 if isinstance(self.cache, LatentCache) else 2
            )
            for i, layers in enumerate(self.kept.values()):
                keys, _, at = contents(view, i)
                want = layers[layer]
                first = 0 if self.cache.window is None else max(0, len(want) - self.cache.window)
                assert set(range(first, len(want))) <= set(at)
                if at and view.k_scale is None:
                    assert same(keys[0], torch.stack([want[j] for j in at]))
                elif at:
                    assert (keys[0] - torch.stack([want[j] for j in at])).abs().max() < 0.02


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_index_keys_go_where_their_sequences_go(kind: str, seed: int) -> None:
    rng, told = random.Random(seed), Told(KINDS[kind](), 100 * seed)
    for _ in range(3):
        told.add()
    for _ in range(40):
        seqs = rng.sample(list(told.kept), rng.randint(1, len(told.kept)))
        counts = [rng.randint(0, 6) for _ in seqs]
        told.append(seqs, counts if rng.random() < 0.5 else [rng.randint(1, 4)] * len(seqs))
        seq = rng.choice(list(told.kept))
        if rng.random() < 0.3 and told.cache.window is None:
            length = rng.randint(0, seq.length)
            told.cache.truncate(seq, length)
            told.kept[seq] = [layer[:length] for layer in told.kept[seq]]
        if rng.random() < 0.3 and isinstance(told.cache, PagedCache) and len(told.kept) < 4:
            told.kept[told.cache.fork(seq)] = [list(layer) for layer in told.kept[seq]]
        if rng.random() < 0.2 and isinstance(told.cache, PagedCache):
            told.cache.swap_out(seq)
            told.cache.swap_in(seq)
        if len(told.kept) == 4 or max(len(layer[0]) for layer in told.kept.values() if layer) > 100:
            longest = max(told.kept, key=lambda s: s.length)
            told.cache.free(longest)
            del told.kept[longest]
            if not told.kept:
                told.add()
        told.check()


def test_shared_prefixes_share_index_keys() -> None:
    cache = PagedCache(pages=8, page_size=4, **_HEADS, **_EACH)
    prompt = list(range(10))
    first = cache.add(tokens=prompt)
    made = [rows(layer, 1, 1, 10, DI) for layer in range(LAYERS)]
    for layer, index in enumerate(made):
        cache.append([first], rows(7, 1, HEADS, 10, D), rows(8, 1, HEADS, 10, 2), layer, index=index)
    second = cache.add(tokens=prompt)
    assert second.length == 8
    for layer, index in enumerate(made):
        assert same(contents(cache.index_view([second], layer), 0)[0], index[0, :, :8])
    plain = PagedCache(pages=8, page_size=4, **_HEADS, layers=LAYERS, dtype=torch.float32)
    assert plain.stats().bytes_per_token + 4 * DI * LAYERS == cache.stats().bytes_per_token


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    cache = PagedCache(pages=8, page_size=4, **_HEADS, **_EACH)
    plain = DenseCache(sequences=1, **_HEADS, dtype=torch.float32)
    seq, own = cache.add(), plain.add()
    k, v, index = rows(0, 1, HEADS, 3, D), rows(1, 1, HEADS, 3, 2), rows(2, 1, 1, 3, DI)
    with pytest.raises(ArgumentError, match="in every step"):
        cache.append([seq], k, v)
    with pytest.raises(ShapeError, match=r"index must be \(1, 1, 3, 5\)"):
        cache.append([seq], k, v, index=index[:, :, :2])
    with pytest.raises(ArgumentTypeError, match="the cache's dtype"):
        cache.append([seq], k, v, index=index.double())
    with pytest.raises(ArgumentError, match="only a cache with index_dim="):
        plain.append([own], k, v, index=index)
    with pytest.raises(ArgumentError, match="only a cache with index_dim="):
        plain.index_view([own])
    assert (seq.length, own.length, cache.stats().pages_used) == (0, 0, 0)
