"""qkv.select_blocks against its definition, in float64 loops: groups, batches, positions, ties, and what is hidden."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkv
from qkv.cache import DenseCache, LatentCache, PagedCache, RingCache
from qkv.masks import Sizes
from qkv.masks.shares import keys_seen
from tests.kit import mask_specs
from tests.kit.selecting import selected


def whole(seed: int, *shape: int, dtype: torch.dtype = torch.float64, wide: int = 3) -> Tensor:
    """Small whole numbers: all scores are exact in float32 and many are equal, where blocks have 2**n keys."""
    made = torch.randint(-wide, wide + 1, shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shown(mask: qkv.Mask, q: Tensor, Lk: int, positions: Any) -> Tensor:
    B, Hq, Lq, _ = q.shape
    return mask.tensor(Lq, Lk, positions, B, Hq)


def truth(q: Tensor, k: Tensor, mask: qkv.Mask | None, positions: Any, *rest: Any, **more: Any) -> Tensor:
    everything = qkv.window(None, None)
    seen = shown(everything if mask is None else mask, q, k.shape[2], positions)
    found = selected(*(x.detach().double().numpy() for x in (q, k)), seen.numpy(), *rest, **more)
    return torch.from_numpy(found)


MASKS: dict[str, Any] = {
    "none": lambda s: None,
    "causal": lambda s: qkv.causal(),
    "window": lambda s: qkv.sliding_window(13),
    "prefix and window": lambda s: qkv.causal() & (qkv.prefix(3) | qkv.sliding_window(9)),
    "documents": lambda s: qkv.documents([s.Lk // 3, s.Lk - s.Lk // 3]) & qkv.causal(),
    "padding": lambda s: qkv.padding([max(0, s.Lk - 5 * b) for b in range(s.B)]) & qkv.causal(),
    "strided": lambda s: qkv.strided(3) | qkv.window(6, 0),
    "heads": lambda s: qkv.per_head([(qkv.causal(), qkv.prefix(9))[h % 2] for h in range(s.Hq)]),
    "nothing": lambda s: ~qkv.window(None, None),
    "function": lambda s: qkv.mask_mod(lambda b, h, p, j: (j <= p) & (j // 4 != p % 3)),
    "chosen": lambda s: qkv.selected_blocks(torch.arange(3).view(1, 1, 1, 3), 7, queries=999) & qkv.causal(),
}


@pytest.mark.parametrize("how", ["mean", "minmax"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_definition(name: str, how: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    B, Hkv, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    Lq, Lk, D = rng.choice([1, 2, 9, 30]), rng.choice([1, 7, 30, 49]), rng.choice([1, 5, 8])
    block, top_k = rng.choice([1, 2, 4, 8, 16]), rng.choice([1, 2, 3, 5, 99])
    more = {"per_group": rng.random() < 0.5, "queries": rng.choice([1, 1, 3, 64])}
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    q, k = whole(seed, B, Hkv * group, Lq, D, dtype=dtype), whole(seed + 1, B, Hkv, Lk, D, dtype=dtype)
    mask = MASKS[name](Sizes(B, Hkv * group, Lq, Lk))
    positions = rng.choice(["end", 3, [1, 5][:B], torch.randint(0, Lk, (B, Lq), generator=torch.Generator())])
    want = truth(q, k, mask, positions, block, top_k, how, **more)
    found = qkv.select_blocks(q, k, block, top_k, how, mask=mask, positions=positions, **more)
    assert torch.equal(shown(found, q, Lk, positions), want), (B, Hkv, group, Lq, Lk, D, block, top_k, more, dtype)
    summaries = qkv.block_summaries(k, block)
    again = qkv.select_blocks(q, k, block, top_k, how, summaries, mask=mask, positions=positions, **more)
    assert torch.equal(shown(again, q, Lk, positions), want)


@pytest.mark.parametrize("how", ["mean", "minmax"])
def test_scores_that_are_no_whole_numbers(how: str) -> None:
    q, k = normal(1, 2, 6, 40, 16), normal(2, 2, 2, 40, 16)
    for per_group, queries in ((False, 1), (True, 1), (True, 4)):
        more = {"per_group": per_group, "queries": queries}
        found = qkv.select_blocks(q, k, 3, 4, how, mask=qkv.causal(), **more)
        assert torch.equal(shown(found, q, 40, None), truth(q, k, qkv.causal(), None, 3, 4, how, **more))


def test_long_rows_are_chosen_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = whole(3, 1, 4, 50, 4), whole(4, 1, 2, 50, 4)
    mask = qkv.causal() & (qkv.prefix(5) | qkv.strided(2))
    want = shown(qkv.select_blocks(q, k, 4, 3, mask=mask, queries=3), q, 50, None)
    monkeypatch.setattr("qkv.selection._SCORES", 1)
    monkeypatch.setattr("qkv.masks.shares._PAIRS", 16)
    assert torch.equal(shown(qkv.select_blocks(q, k, 4, 3, mask=mask, queries=3), q, 50, None), want)
    assert torch.equal(want, truth(q, k, mask, None, 4, 3, queries=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lower_block_and_nan_is_chosen(dtype: torch.dtype) -> None:
    q, k = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 8, 1, dtype=dtype)
    k[0, 0, 2:4] = -0.0
    assert qkv.select_blocks(q, k, 2, 2).tensor(1, 8)[0, 0, 0].tolist() == [True] * 4 + [False] * 4
    k[0, 0, 6] = torch.nan
    assert qkv.select_blocks(q, k, 2, 1).tensor(1, 8)[0, 0, 0].tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("how", ["mean", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_keys_are_not_looked_at(how: str, dtype: torch.dtype) -> None:
    q, k = whole(5, 1, 2, 30, 4, dtype=dtype), whole(6, 1, 1, 30, 4, dtype=dtype)
    mask = qkv.sliding_window(20) & qkv.padding([23])
    want = truth(q[:, :, 12:], k, mask, 12, 4, 3, how)
    poisoned = k.clone()
    poisoned[:, :, 23:], poisoned[0, 0, 0] = torch.nan, torch.inf  # the first key is in a block that all see in part
    seen = shown(mask, q[:, :, 12:], 30, 12)
    assert not seen[..., 23:].any()
    found = qkv.select_blocks(q[:, :, 12:], poisoned, 4, 3, how, mask=mask & ~qkv.prefix(1), positions=12)
    assert torch.equal(shown(found, q[:, :, 12:], 30, 12), truth(q[:, :, 12:], k, mask & ~qkv.prefix(1), 12, 4, 3, how))
    assert want.shape == seen.shape


def test_a_function_of_queries_and_summaries() -> None:
    q, k = whole(7, 2, 4, 20, 3), whole(8, 2, 2, 20, 3)

    def nearest(q: Tensor, of: qkv.Summaries) -> Tensor:
        mean = of.mean.repeat_interleave(q.shape[1] // of.mean.shape[1], 1)
        return -(q[..., None, :] - mean[:, :, None]).abs().sum(-1)

    for more in ({}, {"per_group": True, "queries": 3}):
        found = qkv.select_blocks(q, k, 4, 2, nearest, mask=qkv.causal(), **more)
        want = truth(q, k, qkv.causal(), None, 4, 2, lambda x, keys: -abs(x - keys.mean(0)).sum(), **more)
        assert torch.equal(shown(found, q, 20, None), want)


def test_attention_through_the_choice_has_its_gradients() -> None:
    q, k, v = (normal(n, 1, 4 if n == 1 else 2, 24, 8).requires_grad_() for n in (1, 2, 3))
    mask = qkv.select_blocks(q, k, 4, 2, mask=qkv.causal(), per_group=True)
    d_out = normal(4, 1, 4, 24, 8)
    found = torch.autograd.grad(qkv.attention(q, k, v, mask), (q, k, v), d_out)
    bools = torch.from_numpy(shown(mask, q, 24, None).numpy())
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    scores = torch.where(bools, q @ wide[0].mT / 8**0.5, -torch.inf)
    want = torch.autograd.grad(scores.softmax(-1) @ wide[1], (q, k, v), d_out)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ of caches
_HEADS: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 4, "debug": True}
CACHES: dict[str, Any] = {
    "paged": lambda **o: PagedCache(pages=40, page_size=8, **_HEADS, **o),
    "paged, window": lambda **o: PagedCache(pages=40, page_size=8, window=21, sinks=3, **_HEADS, **o),
    "dense": lambda **o: DenseCache(sequences=3, **_HEADS, **o),
    "ring": lambda **o: RingCache(sequences=3, window=21, chunk=33, page_size=8, **_HEADS, **o),
    "latent": lambda **o: LatentCache(rank=3, rope_dim=1, pages=40, page_size=8, debug=True, **o),
    "another order": lambda **o: PagedCache(pages=90, page_size=8, **_HEADS, **o),
}


def filled(kind: str, lengths: list[int], **options: Any) -> tuple[Any, list[Any], list[Tensor]]:
    """A cache, its sequences, and the keys (Hkv, L, D) of each: by steps of 11 tokens at most, in turn."""
    cache = CACHES[kind](**options)
    if kind == "another order":  # pages that do not follow one another
        first, gaps = cache.add(), [cache.add() for _ in range(20)]
        for seq in (first, *gaps):
            cache.append([seq], *(torch.zeros(1, 2, 8, 4, dtype=cache.dtype),) * 2)
        cache.free(gaps[::2])
    seqs, heads = [cache.add() for _ in lengths], 1 if kind == "latent" else 2
    keys = [whole(n, heads, length, 4, dtype=cache.dtype) for n, length in enumerate(lengths)]
    for start in range(0, max(lengths), 11):
        for seq, k in zip(seqs, keys, strict=True):
            own = k[None, :, start : start + 11]
            if own.shape[2]:
                cache.append([seq], *((own[:, 0, :, :3], own[:, 0, :, 3:]) if kind == "latent" else (own, own)))
    return cache, seqs, keys


@pytest.mark.parametrize("how", ["mean", "minmax"])
@pytest.mark.parametrize("summaries", [True, False])
@pytest.mark.parametrize("kind", CACHES)
def test_views_of_caches(kind: str, summaries: bool, how: str) -> None:
    """One query and several, of sequences of several lengths, and packed; from summaries kept, and made here."""
    cache, seqs, keys = filled(kind, [64, 3, 37], dtype=torch.float32, **({"summaries": 4} if summaries else {}))
    for T, packed in ((1, False), (3, False), (None, True)):
        counts = [2, 3, 1] if packed else [T] * 3
        q = whole(9, 1 if packed else 3, 4, sum(counts) if packed else T, 4, dtype=torch.float32)
        if kind in ("paged, window", "ring") and max(counts) > 1:
            continue
        view = cache.view(seqs, lengths=counts if packed else None)
        held = qkv.causal() if view.held is None else qkv.causal() & view.held
        found = qkv.select_blocks(q, view, 4, 5, how, mask=qkv.causal(), per_group=kind != "dense")
        start = 0
        for i, (k, count) in enumerate(zip(keys, counts, strict=True)):
            own = q[:, :, start : start + count] if packed else q[i : i + 1]
            start += count
            want = truth(own, k[None], held, "end", 4, 5, how, per_group=kind != "dense")
            seen = (found if view.held is None else found & view.held).tensor(count, k.shape[1], "end", 3, 4)
            assert torch.equal(seen[i], want[0]), (i, T)
        out = qkv.attention(q, view, mask=found)
        assert torch.allclose(out, qkv.attention(q, view, mask=found, backend="tiled"), atol=1e-5)


def test_views_of_sequences_in_eight_bits() -> None:
    cache, seqs, _ = filled("paged", [64, 40], dtype=torch.bfloat16, storage=torch.int8, summaries=8)
    view = cache.view(seqs)
    q = normal(11, 2, 4, 1, 4, dtype=torch.bfloat16)
    stored = (view.k.float() * view.k_scale[..., None]).double()  # type: ignore[index]
    found = qkv.select_blocks(q, view, 8, 3, mask=qkv.causal())
    for i, seq in enumerate(seqs):
        k = stored[list(seq.pages)].transpose(0, 1).flatten(1, 2)[None, :, : seq.length]
        want = truth(q[i : i + 1], k, qkv.causal(), "end", 8, 3)
        assert torch.equal(found.tensor(1, seq.length, "end", 2, 4)[i], want[0])


def test_summaries_may_be_given_for_a_view() -> None:
    cache, seqs, _ = filled("paged", [64, 40], dtype=torch.float32, summaries=8)
    view, q = cache.view(seqs), whole(12, 2, 4, 1, 4, dtype=torch.float32)
    for block in (8, 16):
        of = cache.summaries(seqs) if block == 8 else qkv.block_summaries(qkv.call.view.gathered(view)[0], 16)
        found = qkv.select_blocks(q, view, block, 2, summaries=of, mask=qkv.causal())
        plain = qkv.select_blocks(q, view._replace(summaries=None), block, 2, mask=qkv.causal())
        for i, seq in enumerate(seqs):
            seen = [m.tensor(1, seq.length, "end", 2, 4)[i] for m in (found, plain)]
            assert torch.equal(*seen)


# -------------------------------------------------------------------------------------- what a query sees of blocks
@mask_specs.seeds(60)
def test_keys_seen_are_counted(seed: int) -> None:
    spec, s, rng = mask_specs.drawn(seed)
    _, at = mask_specs.draw_positions(rng, s)
    block = rng.choice([1, 3, 7, 64])
    seen = mask_specs.truth(spec, s, at)
    b, h = rng.randrange(s.B), rng.randrange(s.Hq)
    i = torch.arange(s.Lq)
    found = keys_seen(spec.mask, i, torch.tensor(at[b], dtype=torch.int64), block, Sizes(s.B, s.Hq, s.Lq, s.Lk), b, h)
    want = torch.nn.functional.pad(seen[b, h], (0, -s.Lk % block)).unflatten(1, (-1, block)).sum(-1)
    assert torch.equal(found, want), spec.text


# ------------------------------------------------------------------------------------------------------------ errors
Q, K = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 10, 8)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "block": ({"block": 0}, qkv.ArgumentError, "block=0"),
    "top_k": ({"top_k": 0}, qkv.ArgumentError, "top_k=0"),
    "how": ({"how": "max"}, qkv.ArgumentError, "how='max'"),
    "how is a number": ({"how": 3}, qkv.ArgumentTypeError, "how=3"),
    "queries": ({"queries": 0}, qkv.ArgumentError, "queries=0"),
    "per_group": ({"per_group": 1}, qkv.ArgumentTypeError, "per_group"),
    "mask": ({"mask": "causal"}, qkv.ArgumentTypeError, "'causal'"),
    "positions": ({"mask": qkv.causal(), "positions": None}, qkv.ArgumentError, "positions="),
    "summaries": ({"summaries": K}, qkv.ArgumentTypeError, "block_summaries"),
    "another block": ({"summaries": qkv.block_summaries(K, 5)}, qkv.ArgumentError, "blocks of 5"),
    "other keys": ({"summaries": qkv.block_summaries(K[:, :, :3], 2)}, qkv.ShapeError, "(1, 1, 1, 8)"),
    "scores": ({"how": lambda q, s: q}, qkv.ShapeError, "(1, 2, 4, 5)"),
    "heads": ({"k": torch.zeros(1, 3, 10, 8)}, qkv.ShapeError, "Hkv=3"),
    "keys": ({"k": "keys"}, qkv.ArgumentTypeError, "keys"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changed, kind, text = WRONG[name]
    given = {"q": Q, "k": K, "block": 2, "top_k": 2, "positions": "end"} | changed
    with pytest.raises(kind) as error:
        qkv.select_blocks(**given)  # type: ignore[arg-type]
    assert text in str(error.value)


def test_a_cache_says_what_to_do() -> None:
    cache, seqs, _ = filled("paged", [9], dtype=torch.float32, summaries=4)
    with pytest.raises(qkv.ArgumentError, match="summaries=4"):
        qkv.select_blocks(Q[:, :, :1, :4], cache.view(seqs), 8, 2)
    plain, seqs, _ = filled("paged", [9], dtype=torch.float32)
    with pytest.raises(qkv.ArgumentError, match="summaries="):
        plain.summaries(seqs)
    with pytest.raises(qkv.ArgumentError, match="page_size"):
        filled("paged", [9], dtype=torch.float32, summaries=3)
    with pytest.raises(qkv.ArgumentTypeError, match="summaries"):
        filled("paged", [9], dtype=torch.float32, summaries=4.0)


def test_summaries_of_tensors() -> None:
    k = normal(20, 2, 3, 11, 5, dtype=torch.bfloat16)
    found = qkv.block_summaries(k, 4)
    assert (found.block, found.full) == (4, (2, 2))
    for x, of in zip(found[:3], (np.mean, np.min, np.max), strict=True):
        want = np.stack([of(k.double().numpy()[:, :, c : c + 4], axis=2) for c in (0, 4)], 2)
        assert x.dtype == torch.float32
        assert np.allclose(x.numpy(), want, rtol=1e-6, atol=1e-6)
    assert qkv.block_summaries(k[:, :, :3], 4).mean.shape == (2, 3, 0, 5)
    for wrong, kind in ((k[0], qkv.ShapeError), ([k], qkv.ArgumentTypeError)):
        with pytest.raises(kind):
            qkv.block_summaries(wrong, 4)  # type: ignore[arg-type]
