"""Token selection by an indexer: against its definition a query at a time, and its scores with their gradients.

Queries, keys and weights are small integers wherever a choice is compared: scores are then exact in every dtype and
order of addition, equal ones are frequent, and a choice is right or wrong to the key.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv import indexing
from qkv.cache import DenseCache, LatentCache, PagedCache
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["as it is", "small tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of 8 keys and a merge at every 16, the sizes of tests are those of long contexts."""
    if request.param == "small tiles":
        for name, value in (
            ("_PRODUCTS", 64),
            ("_KEYS", (8, 16)),
            ("_QUERIES", 5),
            ("_SPAN", 16),
            ("_SEEN", 150),
            ("_KEPT", 200),
        ):
            monkeypatch.setattr(indexing, name, value)


def whole(rng: random.Random, *shape: int, low: int = -2, high: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def scores(q: Tensor, k: Tensor, weights: Tensor, b: int, t: int, s: int) -> float:
    """The definition, in plain Python."""
    total = 0.0
    for h in range(q.shape[1]):
        dot = sum(float(x) * float(y) for x, y in zip(q[b, h, t], k[b, 0, s], strict=True))
        total += float(weights[b, t, h]) * max(dot, 0.0)
    return total


def wanted(q: Tensor, k: Tensor, weights: Tensor, top_k: int, seen: Tensor) -> Tensor:
    """bool (B, H, Lq, Lk): of the keys that are seen the best, and of equal ones the first."""
    found = torch.zeros_like(seen)
    B, H, Lq, _ = seen.shape
    for b in range(B):
        for t in range(Lq):
            own = [scores(q, k, weights, b, t, s) if seen[b, :, t, s].any() else 0.0 for s in range(k.shape[2])]
            for h in range(H):
                keys = sorted(seen[b, h, t].nonzero()[:, 0].tolist(), key=lambda s: (-own[s], s))
                found[b, h, t, keys[:top_k]] = True
    return found


def masks(rng: random.Random, B: int, Hq: int, Lq: int, Lk: int) -> Iterator[qkv.Mask]:
    yield qkv.causal()
    yield qkv.causal() & qkv.padding([rng.randint(0, Lk) for _ in range(B)])
    yield qkv.window(rng.randint(0, 9), rng.randint(0, 9)) | qkv.prefix(rng.randint(0, 4))
    yield ~qkv.causal()
    yield qkv.dense(torch.rand(B, 1, Lq, Lk, generator=torch.Generator().manual_seed(rng.randrange(99))) < 0.5)
    yield qkv.mask_mod(lambda b, h, p, j: (p + j + b) % 3 > 0)
    yield qkv.per_head([qkv.causal() if h % 2 else qkv.sliding_window(3 + h) for h in range(Hq)])
    yield qkv.strided(3) & qkv.causal()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_choice_is_the_definition(dtype: torch.dtype) -> None:
    """Random sizes, masks and positions; what is hidden from all queries of a row is NaN."""
    for seed in range(8):
        rng = random.Random(seed)
        B, Hi, Di, Hq = 2 if seed < 4 else rng.randint(1, 2), rng.choice((1, 2, 5)), rng.choice((1, 3)), 4
        Lq, Lk, top_k = rng.randint(1, 20), rng.randint(2, 41), rng.randint(1, 12)
        each = [rng.randint(-3, Lk) for _ in range(B)]
        positions: Any = (each, whole(rng, B, Lq, low=-3, high=Lk, dtype=torch.int64), "end", rng.randint(-5, 40))
        positions = positions[seed % 4]
        q, k, weights = (whole(rng, *size, dtype=dtype) for size in ((B, Hi, Lq, Di), (B, 1, Lk, Di), (B, Lq, Hi)))
        for mask in masks(rng, B, Hq, Lq, Lk):
            told = f"seed {seed}, {dtype}, B{B} Hi{Hi} Di{Di} Lq{Lq} Lk{Lk} top {top_k}, {mask}, {positions}"
            H = Hq if mask.varies_by_head else 1
            seen = mask.tensor(Lq, Lk, positions=positions, B=B, Hq=H)
            poisoned = k.masked_fill(~seen.any(2).any(1)[:, None, :, None], torch.nan)
            heads = {"heads": Hq} if H > 1 else {}
            found = qkv.select_tokens(q, poisoned, weights, top_k, mask=mask, positions=positions, **heads)
            got = found.tensor(Lq, Lk, positions=positions, B=B, Hq=H)
            assert torch.equal(got, wanted(q, k, weights, top_k, seen)), told


@pytest.mark.usefixtures("_tiles")
def test_without_a_mask_and_of_more_keys_than_there_are() -> None:
    rng = random.Random(0)
    q, k, weights = whole(rng, 2, 3, 4, 2), whole(rng, 2, 1, 29, 2), whole(rng, 2, 4, 3)
    every = torch.ones(2, 1, 4, 29, dtype=torch.bool)
    for top_k in (1, 7, 28):
        got = qkv.select_tokens(q, k, weights, top_k)
        assert torch.equal(got.tensor(4, 29, B=2, positions="end"), wanted(q, k, weights, top_k, every))
    mask = qkv.causal()
    assert qkv.select_tokens(q, k, weights, 29, mask=mask, positions="end") is mask
    assert qkv.select_tokens(q, k, weights, 100).tensor(4, 29, B=2, positions="end").all()
    none = qkv.select_tokens(q, k, weights, 3, mask=qkv.prefix(0)).tensor(4, 29, B=2, positions="end")
    assert not none.any()
    empty = qkv.select_tokens(q[:, :, :0], k, weights[:, :0], 3, mask=mask, positions="end")
    assert empty.tensor(0, 29, B=2, positions="end").shape == (2, 1, 0, 29)


def test_what_is_not_finite() -> None:
    """NaN counts as the largest, -inf as the smallest of what is seen, before all that is hidden."""
    k = torch.tensor([1.0, torch.inf, torch.nan, 2.0, 3.0])[None, None, :, None]
    q, weights = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)

    def chosen(n: int, sign: float = 1.0, mask: Any = None) -> list[int]:
        found = qkv.select_tokens(q, k, sign * weights, n, mask=mask, positions="end")
        return found.tensor(1, 5, positions="end")[0, 0, 0].nonzero()[:, 0].tolist()  # type: ignore[no-any-return]

    assert chosen(1) == [1]  # NaN is as large as infinity, and later
    assert chosen(2) == [1, 2]
    assert chosen(3) == [1, 2, 4]
    assert chosen(4, -1.0) == [0, 2, 3, 4]
    assert chosen(3, -1.0, qkv.prefix(2)) == [0, 1]
    assert chosen(3, 1.0, qkv.dense(torch.tensor([[True, False, False, True, True]]))) == [0, 3, 4]


@pytest.mark.parametrize(("dtype", "large", "small"), [(torch.float64, 1.0, 1e-12), (torch.bfloat16, 256.0, 1.0)])
def test_scores_are_compared_in_float32_and_float64(dtype: torch.dtype, large: float, small: float) -> None:
    """Scores that differ by less than the next wider of rounding: the last key has the largest."""
    k = torch.tensor([[large, 0.0], [large, small]], dtype=dtype)[None, None]
    ones = torch.ones(1, 1, 1, 2, dtype=dtype)
    assert qkv.select_tokens(ones, k, ones[..., 0], 1).tensor(1, 2, positions="end").tolist() == [[[[False, True]]]]
    q = torch.tensor([large, large + small], dtype=torch.float64)[None, None, None]
    k = torch.eye(2, dtype=torch.float64)[None, None]
    found = qkv.select_tokens(q, k, torch.ones(1, 1, 1, dtype=torch.float64), 1)
    assert found.tensor(1, 2, positions="end").tolist() == [[[[False, True]]]]


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return found


def test_nothing_is_made_in_proportion_to_all_pairs() -> None:
    Lq, Lk, rng = 3000, 40_000, random.Random(0)
    q, weights = torch.randn(1, 1, Lq, 1), torch.ones(1, Lq, 1)
    k = whole(rng, 1, 1, Lk, 1, dtype=torch.float32)
    with _Largest() as largest:
        qkv.select_tokens(q, k, weights, 8, mask=qkv.causal(), positions="end")
    assert largest.numel < Lq * Lk // 16
    q = q.requires_grad_()
    with _Largest() as largest:
        qkv.index_scores(q, k, weights, rows=[0, 7, 2000], mask=qkv.causal(), positions="end").sum().backward()
    assert largest.numel < 64 * Lk


def test_a_backward_pass_computes_products_again() -> None:
    kept: list[int] = []
    q, k, weights = torch.randn(1, 8, 50, 4, requires_grad=True), torch.randn(1, 1, 300, 4), torch.randn(1, 50, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        scores = qkv.index_scores(q, k, weights, mask=qkv.causal(), positions="end")
    assert sum(kept) < 2 * 50 * 300  # and not 8 times that
    scores.masked_fill(scores == -torch.inf, 0).sum().backward()
    assert q.grad is not None


# ---------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_attention_of_grouped_heads_over_what_was_chosen(dtype: torch.dtype) -> None:
    """Forward and backward, against dense float64 over the chosen keys."""
    rng = random.Random(5)
    B, Hq, Hkv, L, D, top_k = 2, 6, 2, 70, 16, 9
    qi, ki, weights = (whole(rng, *size, dtype=dtype) for size in ((B, 3, L, 2), (B, 1, L, 2), (B, L, 3)))
    seen = (qkv.causal() & qkv.padding([70, 33])).tensor(L, L, B=B)
    chosen = wanted(qi, ki, weights, top_k, seen)
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(B, H, L, D, generator=generator, dtype=torch.float64) for H in (Hq, Hkv, Hkv)]
    ours, theirs = ([x.to(to).requires_grad_() for x in made] for to in (dtype, torch.float64))
    mask = qkv.select_tokens(qi, ki, weights, top_k, mask=qkv.causal() & qkv.padding([70, 33]))
    out = qkv.attention(*ours, mask=mask)
    q, k, v = theirs[0], theirs[1].repeat_interleave(3, 1), theirs[2].repeat_interleave(3, 1)
    p = (q @ k.transpose(2, 3) * D**-0.5).masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0.0)
    want = p @ v
    close = 1e-11 if dtype == torch.float64 else 2e-5
    assert (out - want).abs().max() < close
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * cotangent.to(dtype)).sum().backward()
    (want * cotangent).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad).abs().max() < 10 * close


# -------------------------------------------------------------------------------------------------------------- caches
_EACH: dict[str, Any] = {"index_dim": 3, "dtype": torch.float32, "debug": True}
_HEADS: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 4}
CACHES: dict[str, Any] = {
    "pages of 4": lambda: PagedCache(pages=60, page_size=4, **_HEADS, **_EACH),
    "pages of 1": lambda: PagedCache(pages=200, page_size=1, **_HEADS, **_EACH),
    "pages of 32": lambda: PagedCache(pages=9, page_size=32, **_HEADS, **_EACH),
    "int8": lambda: PagedCache(pages=60, page_size=4, storage=torch.int8, **_HEADS, **_EACH),
    "window": lambda: PagedCache(pages=60, page_size=4, window=20, sinks=3, **_HEADS, **_EACH),
    "dense": lambda: DenseCache(sequences=3, capacity=80, **_HEADS, **_EACH),
    "dense, growing": lambda: DenseCache(sequences=3, **_HEADS, **_EACH),
    "latent": lambda: LatentCache(rank=6, rope_dim=2, pages=60, page_size=4, **_EACH),
    "latent, dense": lambda: LatentCache(rank=6, rope_dim=2, sequences=3, **_EACH),
}


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", CACHES)
def test_a_view_chooses_as_tensors_do(kind: str) -> None:
    """In steps of one token, of several and ragged ones, and what attention then sees."""
    rng, cache = random.Random(7), CACHES[kind]()
    latent = isinstance(cache, LatentCache)
    seqs, kept = [cache.add() for _ in range(3)], [torch.zeros(0, 3) for _ in range(3)]
    held = qkv.causal() if cache.window is None else qkv.causal() & (qkv.prefix(3) | qkv.sliding_window(20))
    for step in ([17, 30, 2], [1, 1, 1], [4, 4, 4], [0, 3, 9], [1, 1, 1], [2, 0, 1], [1, 1, 1]):
        ragged = len(set(step)) > 1
        n, T = (1, sum(step)) if ragged else (3, step[0])
        more: dict[str, Any] = {"lengths": step} if ragged else {}
        new = whole(rng, n, 1, T, 3, dtype=torch.float32)
        if kind == "int8":  # whose step is 1 or 2 then, by token, so that what is stored are these very numbers
            new[..., 2] = 127.0
            new *= whole(rng, n, 1, T, 1, low=1, high=2, dtype=torch.float32)
        sizes = ((n, T, 6), (n, T, 2)) if latent else ((n, 2, T, 4), (n, 2, T, 4))
        cache.append(seqs, torch.randn(sizes[0]), torch.randn(sizes[1]), index=new, **more)
        q, weights = whole(rng, n, 2, T, 3, dtype=torch.float32), whole(rng, n, T, 2, dtype=torch.float32)
        view = cache.index_view(seqs, **more)
        found = qkv.select_tokens(q, view, weights, 5, mask=qkv.causal())
        packed = new.transpose(0, 1).flatten(1, 2)[0].split(step)
        for i, (seq, own) in enumerate(zip(seqs, packed, strict=True)):
            kept[i] = torch.cat((kept[i], own))
            Lq, Lk = step[i], seq.length
            first = sum(step[:i])
            mine = (0, slice(first, first + Lq)) if ragged else (i, slice(None))
            seen = held.tensor(Lq, Lk, positions="end")
            want = wanted(q[mine[0], :, mine[1]][None], kept[i][None, None], weights[mine][None], 5, seen)
            got = found.tensor(max(step), Lk, positions=Lk - Lq, B=3)[i, :, :Lq]
            if cache.window is not None:  # attention adds what the cache still holds
                got = got & held.tensor(Lq, Lk, positions="end")[0]
            assert torch.equal(got, want[0]), (step, i)
        main = cache.view(seqs, **more)
        out = qkv.attention(torch.randn(n, 2, T, main.k.shape[3]), main, mask=found)
        assert out.isfinite().all()


def test_a_mask_over_sequences_of_several_lengths_is_attentions_own() -> None:
    """One token a sequence: out of pages as out of each sequence's own tensors."""
    cache, rng = CACHES["pages of 4"](), random.Random(3)
    seqs, lengths = [cache.add() for _ in range(3)], [30, 4, 11]
    k, v = torch.randn(1, 2, 45, 4), torch.randn(1, 2, 45, 4)
    index = whole(rng, 1, 1, 45, 3, dtype=torch.float32)
    cache.append(seqs, k, v, index=index, lengths=lengths)
    q, qi, weights = torch.randn(3, 4, 1, 4), whole(rng, 3, 2, 1, 3, dtype=torch.float32), torch.ones(3, 1, 2)
    mask = qkv.select_tokens(qi, cache.index_view(seqs), weights, 6)
    out, first = qkv.attention(q, cache.view(seqs), mask=mask), 0
    for i, n in enumerate(lengths):
        here = slice(first, first + n)
        seen = wanted(qi[i : i + 1], index[:, :, here], weights[i : i + 1], 6, torch.ones(1, 1, 1, n, dtype=torch.bool))
        want = qkv.attention(q[i : i + 1], k[:, :, here], v[:, :, here], seen)
        assert (out[i] - want[0]).abs().max() < 1e-5
        first += n


# -------------------------------------------------------------------------------------------------------- index scores
def dense_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    total: Tensor = sum(  # type: ignore[assignment]
        weights[:, :, h, None] * torch.clamp(q[:, h] @ k[:, 0].transpose(1, 2), min=0) for h in range(q.shape[1])
    )
    return total


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("seed", range(4))
def test_scores_and_their_gradients(seed: int) -> None:
    """Of all rows and of some, of all keys and of some; -inf where hidden, with no gradient there."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, Hi, Lq, Lk, Di = 2, 3, rng.randint(3, 9), rng.randint(9, 20), 4
    sizes = ((B, Hi, Lq, Di), (B, 1, Lk, Di), (B, Lq, Hi))
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    rows = sorted(rng.sample(range(Lq), 3))
    keys = torch.randint(-1, Lk, (B if seed % 2 else 1, 3, 6), generator=generator)
    mask = qkv.causal() & qkv.padding([Lk, 5])
    seen = mask.tensor(Lq, Lk, positions="end", B=B)[:, 0]
    for options in ({}, {"rows": rows}, {"rows": rows, "keys": keys}):
        for given in (None, mask):
            ours, theirs = ([x.clone().requires_grad_() for x in made] for _ in range(2))
            got = qkv.index_scores(*ours, mask=given, positions="end", **options)  # type: ignore[arg-type]
            want = dense_scores(*theirs)
            shown = seen if given is not None else torch.ones_like(seen)
            if "rows" in options:
                want, shown = want[:, rows], shown[:, rows]
            if "keys" in options:
                at = keys.expand(B, -1, -1)
                want, shown = want.gather(2, at.clamp(min=0)), shown.gather(2, at.clamp(min=0)) & (at >= 0)
            assert torch.equal(got == -torch.inf, ~shown)
            assert (got - want)[shown].abs().max() < 1e-12
            cotangent = torch.randn(got.shape, generator=generator, dtype=torch.float64)
            for x, result in ((ours, got), (theirs, want)):
                (torch.where(shown, result, 0.0) * cotangent).sum().backward()
                assert all(t.grad is not None for t in x)
            for x, y in zip(ours, theirs, strict=True):
                assert (x.grad - y.grad).abs().max() < 1e-11  # type: ignore[operator]


@pytest.mark.parametrize("chosen", [False, True])
def test_hidden_keys_of_scores_may_hold_anything(chosen: bool) -> None:
    q, k, weights = torch.randn(1, 2, 4, 3, requires_grad=True), torch.randn(1, 1, 6, 3), torch.randn(1, 4, 2)
    k[:, :, 4:] = torch.nan
    keys = torch.tensor([[[0, 5, 1], [3, 2, 4], [0, 1, 2], [-1, -1, 4]]]) if chosen else None
    found = qkv.index_scores(q, k, weights, mask=qkv.prefix(4), positions="end", keys=keys)
    found.masked_fill(found == -torch.inf, 0).sum().backward()
    assert not found.isnan().any()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_an_indexer_learns_what_attention_looks_at() -> None:
    """The loss of the paper, over all keys: the keys that it then chooses hold most of attention's weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, 16, generator=generator)
    wq, wk = (torch.randn(16, 16, generator=generator) * 0.6 for _ in range(2))
    q, k = (x @ w for w in (wq, wk))
    target = qkv.weights(q[:, None], k[:, None], mask=qkv.causal()).mean(1)
    learned = [(torch.randn(16, n, generator=generator) * 0.25).requires_grad_() for n in (4 * 8, 8, 4)]

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = (x @ w for w in learned)
        return a.unflatten(-1, (4, 8)).transpose(1, 2), b[:, None], c

    def mass() -> float:
        """How much of attention's weight lies on the 8 chosen keys of queries that see more."""
        seen = qkv.select_tokens(*parts(), 8, mask=qkv.causal()).tensor(96, 96)[0]
        return float((target * seen).sum(-1)[:, 16:].mean())

    before, adam = mass(), torch.optim.Adam(learned, lr=0.03)
    for _ in range(150):
        log = qkv.index_scores(*parts(), mask=qkv.causal()).log_softmax(-1)
        loss = -(target * log.masked_fill(target == 0, 0)).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert mass() > before + 0.2
    assert mass() > 0.7


# -------------------------------------------------------------------------------------------------------------- errors
Q, K, W = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 6, 5), torch.randn(2, 4, 3)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"top_k": 0}, ArgumentError, "top_k must be an integer >= 1"),
        ({"top_k": 2.0}, ArgumentTypeError, "top_k must be an integer"),
        ({"q": None}, ArgumentTypeError, "q must be a tensor"),
        ({"k": K.tolist()}, ArgumentTypeError, "k must be a tensor"),
        ({"k": K[:, 0]}, ShapeError, r"keys \(B, 1, Lk, Di\) of one"),
        ({"k": K.expand(-1, 3, -1, -1)}, ShapeError, "of one"),
        ({"k": K[:1]}, ShapeError, "one batch size"),
        ({"k": K[..., :4]}, ShapeError, "one head size"),
        ({"k": K.double()}, ArgumentTypeError, "one dtype"),
        ({"weights": W.transpose(1, 2)}, ShapeError, r"weights must be \(B, Lq, Hi\)"),
        ({"weights": W.long()}, ArgumentTypeError, "floating"),
        ({"weights": None}, ArgumentTypeError, "weights must be a tensor"),
        ({"mask": qkv.causal()}, ArgumentError, "where the queries stand"),
        ({"mask": qkv.per_head([qkv.prefix(1), qkv.prefix(2)])}, ArgumentError, "heads=Hq"),
        ({"mask": qkv.per_head([qkv.prefix(1), qkv.prefix(2)]), "heads": 3}, ShapeError, "per_head"),
        ({"mask": torch.ones(4, 7, dtype=torch.bool)}, ShapeError, "broadcast"),
        ({"maks": None}, ArgumentTypeError, "mask"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        qkv.select_tokens(**{"q": Q, "k": K, "weights": W, "top_k": 2, **given})


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"rows": [4]}, ArgumentError, "query rows"),
        ({"keys": torch.zeros(2, 3, 1, dtype=torch.int64)}, ShapeError, r"keys must be \(B or 1, rows, n\)"),
        ({"keys": torch.full((2, 4, 1), 6)}, ArgumentError, "keys must be those that there are"),
        ({"mask": qkv.per_head([qkv.prefix(1), qkv.prefix(2)])}, ArgumentError, "one for all heads"),
        ({"weights": W[:, :3]}, ShapeError, r"weights must be \(B, Lq, Hi\)"),
        ({"top_k": 3}, ArgumentTypeError, "top_k"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(given: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        qkv.index_scores(**{"q": Q, "k": K, "weights": W, **given})


def test_views_and_transforms() -> None:
    cache = PagedCache(pages=4, page_size=4, **_HEADS, **_EACH)
    seq = cache.add()
    cache.append([seq], torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), index=torch.randn(1, 1, 6, 3))
    q, weights = torch.randn(1, 2, 1, 3), torch.randn(1, 1, 2)
    with pytest.raises(ShapeError, match="index_view"):
        qkv.select_tokens(q, cache.view([seq]), weights, 2)
    with pytest.raises(ArgumentError, match="Leave positions out"):
        qkv.select_tokens(q, cache.index_view([seq]), weights, 2, positions=3)
    with pytest.raises(ArgumentTypeError, match="dtype of its cache"):
        qkv.select_tokens(q.double(), cache.index_view([seq]), weights, 2)
    with pytest.raises(ArgumentTypeError, match="a cache keeps no gradients"):
        qkv.index_scores(q, cache.index_view([seq]), weights)  # type: ignore[arg-type]
    view = cache.index_view([seq])
    cache.truncate(seq, 3)
    with pytest.raises(ArgumentError, match="new view"):
        qkv.select_tokens(q, view, weights, 2)
    with pytest.raises(UnsupportedError, match="depends on the data"):
        torch.func.vmap(lambda x: qkv.select_tokens(x[None], K[:1], W[:1], 2).tensor(4, 6))(Q)  # type: ignore[no-untyped-call]
