"""The cache of multi-head latent attention: one plane, of which the values are the first columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.cache import LatentCache, PagedCache, PagesExhausted
from qkv.cache.dense import DenseCache
from tests.kit.cache_truth import attended, check_books, contents, rows, same

SIZES: dict[str, Any] = {"rank": 6, "rope_dim": 2, "dtype": torch.float32, "debug": True}
KINDS = {
    "pages": {"pages": 24, "page_size": 4},
    "dense": {"sequences": 3},
    "dense of 40": {"sequences": 3, "capacity": 40},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_latent_and_rotary_part_side_by_side(kind: str, layers: int) -> None:
    cache = LatentCache(**SIZES, **KINDS[kind], layers=layers)
    assert isinstance(cache, LatentCache)
    assert isinstance(cache, PagedCache if kind == "pages" else DenseCache)
    a, b = cache.add(), cache.add()
    kept: dict[Any, list[list[torch.Tensor]]] = {a: [[] for _ in range(layers)], b: [[] for _ in range(layers)]}
    seed = 0
    for counts in ([5, 5], [1, 1], [0, 7], [9, 3], [1, 1]):
        for layer in range(layers):
            seed += 2
            total = sum(counts)
            latent, rope = rows(seed, 1, total, 6), rows(seed + 1, total, 1, 2).transpose(0, 1)
            if counts[0] == counts[1]:
                T = counts[0]
                cache.append([a, b], latent.view(2, T, 6), rope.reshape(2, T, 2), layer=layer)
            else:
                cache.append([a, b], latent=latent, rope=rope, layer=layer, lengths=counts)
            both = torch.cat((latent, rope), -1)[0]
            kept[a][layer].append(both[: counts[0]])
            kept[b][layer].append(both[counts[0] :])
    for layer in range(layers):
        view = cache.view([b, a], layer=layer)
        assert view.v.data_ptr() == view.k.data_ptr()
        assert (view.k.shape[1], view.k.shape[3], view.v.shape[3]) == (1, 8, 6)
        assert view.v.stride() == view.k.stride()
        for i, seq in enumerate((b, a)):
            k, v, _ = contents(view, i)
            want = torch.cat(kept[seq][layer])[None]
            assert same(k, want)
            assert same(v, want[..., :6])
    stats = cache.stats()
    assert stats.bytes_per_token == layers * 8 * 4
    assert stats.bytes == layers * view.k.numel() * 4
    assert stats.cache == "LatentCache"


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_one_scale_serves_key_and_value(storage: torch.dtype) -> None:
    cache = LatentCache(**SIZES, pages=4, storage=storage)
    a = cache.add()
    latent, rope = rows(1, 1, 5, 6), 3 * rows(2, 1, 5, 2)
    cache.append([a], latent, rope)
    view = cache.view([a])
    assert view.k_scale is view.v_scale
    largest = 127 if storage == torch.int8 else 448
    both = torch.cat((latent, rope), -1)
    assert torch.equal(view.k_scale[a.pages[0], 0, :5], both[0].abs().amax(-1) / largest)
    k, v, _ = contents(view, 0)
    assert same(v, k[..., :6])
    error = (k - both).abs()
    assert (error <= both.abs().amax(-1, keepdim=True) / (254 if storage == torch.int8 else 16) * 1.0001).all()
    assert cache.stats().bytes_per_token == 8 + 4


def test_pages_do_all_that_pages_do() -> None:
    cache = LatentCache(**SIZES, pages=4, page_size=4)
    a = cache.add()
    cache.append([a], rows(1, 1, 6, 6), rows(2, 1, 6, 2))
    twin = cache.fork(a)
    cache.append([twin], rows(3, 1, 1, 6), rows(4, 1, 1, 2))
    assert twin.pages[0] == a.pages[0]
    assert twin.pages[1] != a.pages[1]
    assert same(contents(cache.view([twin]), 0)[0][:, :6], contents(cache.view([a]), 0)[0])
    with pytest.raises(PagesExhausted):
        cache.append([a], rows(5, 1, 9, 6), rows(6, 1, 9, 2))
    before = contents(cache.view([a]), 0)[0]
    cache.swap_out(a)
    cache.swap_in(a)
    assert same(contents(cache.view([a]), 0)[0], before)
    assert "LatentCache: 4 pages" in cache.table()
    cache.free([a, twin])
    assert cache.evict() == 0
    check_books(cache)


def test_a_step_for_a_model() -> None:
    cache = LatentCache(**SIZES, sequences=2, layers=2)
    seqs = [cache.add(), cache.add()]
    step = cache.step(seqs, T=3)
    for i in range(2):
        step.layer(i).append(rows(i, 2, 3, 6), rows(i, 2, 3, 2))
        assert list(step.layer(i).view().layout.lengths) == [3, 3]
    assert seqs[0].length == 3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_latents(kind: str) -> None:
    """Absorbed attention: the value is the key's first columns. Float64, so the bound is rounding of short sums."""
    cache = LatentCache(**{**SIZES, "dtype": torch.float64}, **KINDS[kind])
    a, b = cache.add(), cache.add()
    kept: dict[Any, list[torch.Tensor]] = {a: [], b: []}
    for turn, T in enumerate((7, 1, 4, 1)):
        latent, rope = rows(turn, 2, T, 6, dtype=torch.float64), rows(turn + 9, 2, T, 2, dtype=torch.float64)
        cache.append([a, b], latent, rope)
        q = 2 * rows(turn + 50, 2, 4, T, 8, dtype=torch.float64)
        out = qkv.attention(q, cache.view([a, b]), mask=qkv.causal(), scale=0.3)
        for i, seq in enumerate((a, b)):
            kept[seq].append(torch.cat((latent[i], rope[i]), -1)[None])
            k = torch.cat(kept[seq], 1)
            want = attended(q[i], k, k[..., :6], 0.3, None, 0)
            assert (out[i] - want).abs().max() < 1e-12, (turn, i)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({}, qkv.ArgumentError),
        ({"pages": 4, "sequences": 2}, qkv.ArgumentError),
        ({"pages": 4, "capacity": 20}, qkv.ArgumentError),
        ({"sequences": 4, "page_size": 8}, qkv.ArgumentError),
        ({"sequences": 4, "identity": "a"}, qkv.ArgumentError),
        ({"pages": 0}, qkv.ArgumentError),
        ({"pages": 4, "rank": 0}, qkv.ArgumentError),
        ({"pages": 4, "rope_dim": -1}, qkv.ArgumentError),
        ({"pages": 4, "rope_dim": 2.0}, qkv.ArgumentTypeError),
        ({"sequences": "2"}, qkv.ArgumentTypeError),
        ({"sequences": 2, "capacity": 0}, qkv.ArgumentError),
    ],
)
def test_malformed_sizes(sizes: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"qkv.cache.LatentCache\(\)"):
        LatentCache(**{**SIZES, **sizes})


@pytest.mark.parametrize(
    ("latent", "rope", "kind", "words"),
    [
        (rows(1, 2, 3, 5), rows(2, 2, 3, 2), qkv.ShapeError, r"latent \(2, 3, 5\)"),
        (rows(1, 2, 3, 6), rows(2, 2, 3, 3), qkv.ShapeError, r"rope \(2, 3, 3\)"),
        (rows(1, 2, 3, 6), rows(2, 2, 2, 2), qkv.ShapeError, r"rope \(2, 2, 2\)"),
        (rows(1, 2, 1, 3, 6), rows(2, 2, 1, 3, 2), qkv.ShapeError, r"latent \(2, 1, 3, 6\)"),
        (rows(1, 2, 3, 6), None, qkv.ArgumentTypeError, "rope"),
        ("latent", rows(2, 2, 3, 2), qkv.ArgumentTypeError, "latent"),
        (rows(1, 2, 3, 6).double(), rows(2, 2, 3, 2), qkv.ArgumentTypeError, "float64"),
        (rows(1, 2, 3, 6), rows(2, 2, 3, 2).bfloat16(), qkv.ArgumentTypeError, "bfloat16"),
    ],
)
def test_malformed_rows(latent: Any, rope: Any, kind: type[Exception], words: str) -> None:
    for sizes in KINDS.values():
        cache = LatentCache(**SIZES, **sizes)
        seqs = [cache.add(), cache.add()]
        with pytest.raises(kind, match=words):
            cache.append(seqs, latent, rope)
        assert [seq.length for seq in seqs] == [0, 0]
