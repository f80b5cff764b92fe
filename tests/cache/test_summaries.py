"""Summaries of blocks in caches. What random operations do to them stands in `tests.kit.cache_promises`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkv.cache import DenseCache, LatentCache, PagedCache
from tests.kit.cache_truth import contents, rows

STORAGES = (None, torch.int8, torch.float8_e4m3fn)


def test_they_are_of_what_attention_reads() -> None:
    """In 8 bits they are those of the stored numbers with their scales, and not of what was appended."""
    for storage in STORAGES:
        cache = PagedCache(pages=9, page_size=8, num_kv_heads=2, head_dim=5, storage=storage, summaries=4)
        seq = cache.add()
        for n, T in enumerate((3, 7, 1, 13)):
            cache.append([seq], *(rows(n, 1, 2, T, 5, dtype=torch.bfloat16) for _ in range(2)))
        keys, _, _ = contents(cache.view([seq]), 0)
        blocks = keys.double().unflatten(1, (6, 4))
        found = cache.summaries([seq])
        for x, want in zip(found[:3], (blocks.mean(2), blocks.amin(2), blocks.amax(2)), strict=True):
            assert x.dtype == torch.float32
            assert torch.allclose(x[0].double(), want, rtol=1e-6, atol=1e-7), storage


def test_sequences_of_several_lengths_stand_side_by_side() -> None:
    cache = DenseCache(sequences=3, num_kv_heads=1, head_dim=2, dtype=torch.float32, summaries=5)
    seqs = [cache.add() for _ in range(3)]
    cache.append(seqs, *(rows(n, 1, 1, 29, 2) for n in range(2)), lengths=[14, 3, 12])
    found = cache.summaries(seqs)
    assert found.full == (2, 0, 2)
    assert found.mean.shape == (3, 1, 2, 2)
    assert not found.mean[1].any()
    assert cache.page_size % 5 == 0
    assert cache.summaries([]).mean.shape == (0, 1, 0, 2)


def test_a_long_append_is_summarised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for most in (1 << 22, 30):
        monkeypatch.setattr("qkv.cache.summaries._NUMBERS", most)
        cache = LatentCache(rank=3, rope_dim=1, pages=20, dtype=torch.float32, summaries=8, layers=2)
        seq = cache.add()
        for layer in range(2):
            cache.append([seq], rows(layer, 1, 100, 3), rows(layer + 2, 1, 100, 1), layer)
        made.append([x for layer in range(2) for x in cache.summaries([seq], layer)[:3]])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_their_bytes_are_counted() -> None:
    sizes: dict[str, Any] = {"pages": 4, "page_size": 8, "num_kv_heads": 3, "head_dim": 5, "layers": 2}
    plain, kept = PagedCache(**sizes), PagedCache(**sizes, summaries=4)
    assert kept.stats().bytes - plain.stats().bytes == 3 * 4 * (4 * 2 * 3 * 5 * 2)
    assert kept.stats().bytes_per_token == plain.stats().bytes_per_token
