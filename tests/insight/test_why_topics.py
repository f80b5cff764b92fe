"""Each experiment against the same numbers computed another way: NumPy in float64 on its own draws, or by counting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkv
from qkv.insight.answer import Answer, one, series
from qkv.insight.experiments.explanation import elsewhere
from qkv.insight.topics import TOPICS

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")

SEEDS = (0, 1, 2)
Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(rng: torch.Generator, *shape: int) -> Array:
    return torch.randn(*shape, generator=rng, dtype=torch.float64).numpy()


def flat(answer: Answer) -> str:
    return " ".join(answer.verdict.split())


def causal(n: int) -> Array:
    return np.where(np.tril(np.ones((n, n))) > 0, 0.0, -np.inf)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax(seed: int) -> None:
    n = qkv.why("softmax", seed=seed).numbers
    rng = draws(seed)
    q, k, v = (randn(rng, 1, 1, m, 32)[0, 0] for m in (256, 64, 64))
    scores = q @ k.T / 32**0.5

    def share(s: Array) -> Array:
        return s / s.sum(-1, keepdims=True)

    assert one(n["weights below 0, share of the sum"]) == (share(scores) < 0).mean() > 0.3
    assert one(n["largest sum of |weights| of a row, share of the sum"]) == pytest.approx(
        np.abs(share(scores)).sum(-1).max(), rel=1e-6
    )
    moved = np.abs(share(scores + 1) - share(scores)).max()
    assert one(n["all scores + 1: a weight moves by, share of the sum"]) == pytest.approx(moved, rel=1e-6)
    p = softmax(scores)
    back = 2 * (p @ v) @ v.T  # of |out|² by the weights, then through diag(p) - p pᵀ
    slope = np.linalg.norm(p * (back - (p * back).sum(-1, keepdims=True)), axis=-1)
    lower = np.sort(slope)[(len(slope) - 1) // 2]
    assert one(n["how far out moves with the scores, softmax"]) == pytest.approx(lower, rel=1e-9)
    assert max(series(n["softmax differs from qkv.weights, qkv.attention by"])) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_cost(seed: int) -> None:
    answer = qkv.why("cost", seed=seed)
    n = answer.numbers
    layer = qkv.nn.Attention(64, 4, bias=False, device="meta")
    held = sum(p.numel() for p in layer.parameters())
    assert series(n["projections, FLOPs"]) == tuple(2 * held * m for m in (32, 64, 128, 256, 512))
    even = series(n["tokens"]).index(one(n["tokens at which pairs cost as much, all visible"]))
    assert series(n["pairs, all visible"])[even] == series(n["projections, FLOPs"])[even]
    assert "counted: exactly" in flat(answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_cross(seed: int) -> None:
    n = qkv.why("cross", seed=seed).numbers
    rng = draws(seed)
    x, source = randn(rng, 3, 12), randn(rng, 5, 12)
    w = [randn(rng, 12, m) / 12**0.5 for m in (8, 8, 4)]

    def out(asks: Array, read: Array) -> Array:
        return softmax((asks @ w[0]) @ (read @ w[1]).T / 8**0.5) @ (read @ w[2])

    asked, read = x.copy(), source.copy()
    asked[1] += 1
    read[1] += 1
    by_query = np.linalg.norm(out(asked, source) - out(x, source), axis=1)
    by_token = np.linalg.norm(out(x, read) - out(x, source), axis=1)
    assert series(n["each row of out moves with another query by"]) == pytest.approx(by_query, abs=1e-12)
    assert series(n["each row of out moves with another source token by"]) == pytest.approx(by_token, abs=1e-12)
    assert (n["rows of out that one other query moves"], n["rows of out that one other source token moves"]) == (1, 3)
    assert one(n["step by step with k and v kept: out differs by"]) < 1e-14


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_can_be_followed_by_hand(seed: int) -> None:
    answer = qkv.why("shapes", seed=seed)
    rng = draws(seed)
    x, w_q, w_k, w_v, w_o = (
        torch.randint(low, high + 1, (rows, 4), generator=rng).double().numpy()
        for rows, low, high in ((3, -2, 2), *[(4, -1, 1)] * 4)
    )
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    heads = [softmax(q[:, a : a + 2] @ k[:, a : a + 2].T / 2**0.5) @ v[:, a : a + 2] for a in (0, 2)]
    out = np.concatenate(heads, 1) @ w_o
    for i, word in enumerate(("cats", "eat", "mice")):
        assert series(answer.numbers[f"output, {word}"]) == pytest.approx(out[i], abs=1e-12)
    assert answer.numbers["scores and weights (B, h, L, L)"] == (1, 2, 3, 3)
    assert answer.numbers["split in heads (B, h, L, d)"] == (1, 2, 3, 2)
    rows = [line.split() for line in answer.picture.splitlines()]
    assert [int(cell) for cell in rows[0 + 1]] == [*map(int, (*w_q[0], *w_k[0], *w_v[0], *w_o[0]))]
    assert [int(cell) for cell in rows[6][1:]] == [*map(int, (*x[0], *q[0], *k[0], *v[0]))]
    p = softmax(q[:, 2:] @ k[:, 2:].T / 2**0.5)
    assert [float(cell) for cell in rows[10][10:13]] == pytest.approx(p[0], abs=0.0051)
    assert [float(cell) for cell in rows[14][-4:]] == pytest.approx(out[0], abs=0.051)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_axis(seed: int) -> None:
    answer = qkv.why("softmax-axis", seed=seed)
    rng = draws(seed)
    q, k, v = (randn(rng, 6, 8) for _ in range(3))
    other = q.copy()
    other[-1] = 3 * randn(rng, 8)
    moved = {}
    for axis in ("keys", "queries"):
        p = []
        for x in (q, other):
            scores = x @ k.T / 8**0.5 + causal(6)
            p.append(softmax(scores) if axis == "keys" else softmax(scores.T).T)
        moved[axis] = np.abs((p[1] - p[0]) @ v)[:-1].max()
        assert series(answer.numbers[f"row sums, over {axis}"]) == pytest.approx(p[0].sum(1), abs=1e-12)
        assert one(answer.numbers[f"earlier outputs move by, over {axis}"]) == pytest.approx(moved[axis], abs=1e-12)
    assert one(answer.numbers["over keys: differs from qkv.attention by"]) < 1e-14
    assert one(answer.numbers["over queries: differs from qkv.attention by"]) > 0.1
    assert "leaks through a causal mask" in flat(answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_order(seed: int) -> None:
    answer = qkv.why("order", seed=seed)
    rng = draws(seed)
    q, k, v = randn(rng, 3, 1, 2, 32, 64)[:, 0]
    order = torch.randperm(32, generator=rng).numpy()

    def turned(x: Array) -> Array:
        theta = np.arange(32)[:, None] * 10000.0 ** (-np.arange(32) / 32)
        a, b = x[..., :32], x[..., 32:]
        return np.concatenate([a * np.cos(theta) - b * np.sin(theta), b * np.cos(theta) + a * np.sin(theta)], -1)

    def out(q: Array, k: Array, v: Array, hidden: Array | float = 0.0) -> Array:
        return softmax(q @ k.transpose(0, 2, 1) / 8 + hidden) @ v

    for name, run in (
        ("causal mask", lambda q, k, v: out(q, k, v, causal(32))),
        ("rotary", lambda q, k, v: out(turned(q), turned(k), v)),
    ):
        whole = run(q, k, v)
        moved = run(q[:, order], k[:, order], v[:, order]) - whole[:, order]
        expected = np.linalg.norm(moved) / np.linalg.norm(whole)
        assert one(answer.numbers[f"out changes by, {name}"]) == pytest.approx(expected, rel=1e-9)
    assert "on it alone" in flat(answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_reformer(seed: int) -> None:
    n = qkv.why("reformer", seed=seed).numbers
    rng = draws(seed)
    tied = randn(rng, 1, 1, 64, 512)[0, 0] @ (randn(rng, 512, 64) / 512**0.5)
    scores = tied @ tied.T / 8
    own = np.eye(64) > 0
    for name, seen in (
        ("neither", np.ones((64, 64)) > 0),
        ("itself hidden", ~own),
        ("future hidden", np.tril(np.ones((64, 64))) > 0),
    ):
        p = softmax(np.where(seen, scores, -np.inf))
        assert one(n[f"weight on itself, {name}"]) == pytest.approx(np.diag(p)[1:].mean(), abs=1e-12)
        assert one(n[f"weight on later tokens, {name}"]) == pytest.approx(np.triu(p, 1).sum(1).mean(), abs=1e-12)
    assert n["pairs that look at each other, itself hidden"] == 1.0
    assert n["pairs that look at each other, future hidden"] == 0.0
    assert n["the first token's weight on itself, both hidden"] == 1.0
    unit = tied / np.linalg.norm(tied, axis=1, keepdims=True) * 8
    normed = np.diag(softmax(tied @ unit.T / 8)).mean()
    assert one(n["weight on itself, keys normed as in Reformer"]) == pytest.approx(normed, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_one_step(seed: int) -> None:
    """The scale outside and inside of W_Q, by finite differences of a loss written out anew."""
    n = qkv.why("gradient", seed=seed).numbers
    rng = draws(seed)
    for d in (16, 64, 256, 1024):
        for rows in (64, 128):
            torch.randn(4, 1, rows, d, generator=rng, dtype=torch.float32)
    x = randn(rng, 1, 1, 24, 64)[0, 0]
    w_q, w_k, w_v = (randn(rng, 64, 16) / 8 for _ in range(3))
    aim = randn(rng, 1, 1, 24, 16)[0, 0]

    def out(w: Array, scale: float) -> Array:
        return softmax(scale * (x @ w) @ (x @ w_k).T) @ (x @ w_v)

    moves = []
    for scale, w in ((0.25, w_q), (1.0, w_q / 4)):
        slope = np.zeros_like(w)
        for at in np.ndindex(w.shape):
            step = np.zeros_like(w)
            step[at] = 1e-5
            up, down = (((out(w + sign * step, scale) - aim) ** 2).mean() for sign in (1, -1))
            slope[at] = (up - down) / 2e-5
        moves.append(np.linalg.norm(out(w - 0.1 * 24 * slope, scale) - out(w, scale)))
    assert one(n["one step: out moves further by, scale inside"]) == pytest.approx(moves[1] / moves[0], rel=1e-4)
    assert moves[1] > 2 * moves[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_causal(seed: int) -> None:
    n = qkv.why("causal", seed=seed).numbers
    rng = draws(seed)
    q, k, v = randn(rng, 3, 1, 1, 8, 16)[:, 0, 0]
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[-1] = randn(rng, 16)
    before, after = (softmax(a @ b.T / 4) @ c for a, b, c in ((q, k, v), changed))
    free = np.linalg.norm(after - before, axis=1)[:-1].max()
    assert one(n["earlier outputs move with the last token, no mask"]) == pytest.approx(free, rel=1e-9)
    last = np.linalg.norm(after - before, axis=1)[-1]  # the last row sees everything, masked or not
    assert one(n["the last output itself moves by"]) == pytest.approx(last, rel=1e-9)
    assert n["earlier outputs move with the last token, causal"] == 0
    assert one(n["one causal pass differs from a pass a prefix by"]) < 1e-14
    assert n["pairs in one causal pass"] == 8 * 9 / 2
    assert n["pairs in a pass for every prefix, uncached"] == sum(i * i for i in range(1, 9))


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_polarity(seed: int) -> None:
    answer = qkv.why("mask-polarity", seed=seed)
    n = answer.numbers
    x = randn(draws(seed), 1, 1, 5, 8)[0, 0]
    keep = np.tril(np.ones((5, 5))) > 0
    right = softmax(np.where(keep, x @ x.T / 8**0.5, -np.inf)) @ x
    wrong = softmax(np.where(~keep[:-1], (x @ x.T)[:-1] / 8**0.5, -np.inf)) @ x  # the last row sees nothing
    assert one(n["scaled_dot_product_attention(attn_mask=m) differs from qkv by"]) < 1e-12
    assert one(n["nn.MultiheadAttention(attn_mask=~m) differs from qkv by"]) < 1e-12
    apart = np.abs(wrong - right[:-1]).max()
    # a module that gives the row that sees nothing 0 differs there as well
    rows = (apart, max(apart, np.abs(right[-1]).max()))
    assert one(n["nn.MultiheadAttention(attn_mask=m) differs from qkv by"]) == pytest.approx(
        rows[0] if n["nn.MultiheadAttention(attn_mask=m): tokens that are NaN"] else rows[1], rel=1e-9
    )
    assert "True keeps in qkv.attention" in flat(answer)
    assert "the opposite: True drops there" in flat(answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_dead_rows(seed: int) -> None:
    answer = qkv.why("dead-rows", seed=seed)
    n = answer.numbers
    q, k, _ = torch.randn(3, 5, 8, generator=draws(seed), dtype=torch.float32).double().numpy()
    whole = softmax(q[2] @ k.T / 8**0.5)
    assert series(n["weights of forbidden keys, -1e9, float64"]) == pytest.approx(whole, abs=1e-6)
    assert one(n["-1e9 in float64 differs from no mask at all by"]) < 1e-6
    assert n["lse, qkv"] == -math.inf
    assert n["largest number in out, qkv"] == 0
    poisoned = {name: n[f"NaN in the gradient of all keys (40), {name}"] for name in ("-inf", "-1e9, float32", "qkv")}
    assert poisoned == {"-inf": 40, "-1e9, float32": 0, "qkv": 0}


@pytest.mark.parametrize("seed", SEEDS)
def test_heads(seed: int) -> None:
    n = qkv.why("heads", seed=seed).numbers
    assert one(n["one head: differs from the mean of the two by"]) < 1e-12
    assert one(n["out moves if the two values change places, one head"]) < 1e-12
    # two unit vectors at a right angle change places, in both halves: √(2 + 2)
    assert one(n["out moves if the two values change places, two heads"]) == pytest.approx(2, abs=1e-9)
    for h, parameters in zip(series(n["heads of a layer"]), series(n["parameters"]), strict=True):
        layer = qkv.nn.Attention(512, int(h), bias=False, device="meta")
        assert parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("seed", SEEDS)
def test_thin_heads(seed: int) -> None:
    n = qkv.why("thin-heads", seed=seed).numbers
    rng = draws(seed)
    estimate = series(n["e^√d / (e^√d + 1023 e^½)"])
    for i, d in enumerate((2, 4, 8, 16, 32, 64)):
        x = randn(rng, 1, 1, 1024, d)[0, 0]
        x = x / np.linalg.norm(x, axis=1, keepdims=True) * d**0.5
        rows = np.arange(0, 1024, 32)
        p = softmax(x[rows] @ x.T / d**0.5)
        assert series(n["weight on the own position"])[i] == pytest.approx(p[np.arange(32), rows].mean(), rel=1e-9)
        sharp = softmax(series(n["sharper by, for 0.9"])[i] * x[rows] @ x.T / d**0.5)[np.arange(32), rows].mean()
        assert 0.9 <= sharp < 0.905, "the smallest such scale"
        assert series(n["weight on the own position"])[i] == pytest.approx(estimate[i], rel=0.25 if d > 4 else 0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_split_heads(seed: int) -> None:
    n = qkv.why("split-heads", seed=seed).numbers
    tokens = np.arange(24).reshape(6, 4)
    right = np.stack([tokens[:, :2], tokens[:, 2:]])
    assert n["elements in the wrong place"] == (right != tokens.reshape(2, 6, 2)).mean()
    assert n["shape, right"] == n["shape, wrong"] == (1, 2, 6, 2)
    assert n["tokens that each head sees, wrong"] == (3, 3)
    x = randn(draws(seed), 1, 6, 4)[0]
    later = x.copy()
    later[3] += 1
    outs = []
    for y in (x, later):
        heads = y.reshape(2, 6, 2)
        outs.append(softmax(heads @ heads.transpose(0, 2, 1) / 2**0.5 + causal(6)) @ heads)
    moved = np.abs(outs[1] - outs[0])[:, :3].max()
    assert one(n["tokens 0 to 2 move with token 3, wrong"]) == pytest.approx(moved, rel=1e-9)
    assert moved > 0.1
    assert n["tokens 0 to 2 move with token 3, right"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_kv_cache(seed: int) -> None:
    n = qkv.why("kv-cache", seed=seed).numbers
    assert one(n["step by step over a cache: out differs by"]) < 1e-12
    assert n["other earlier queries move the newest out by"] == 0
    assert n["pairs scored, with a cache"] == 32 * 33 / 2
    assert n["pairs scored, all anew each step"] == sum(i * i for i in range(1, 33))
    assert n["bytes a token that the cache keeps"] == 2 * 4 * 16 * 8


@pytest.mark.parametrize("seed", SEEDS)
def test_gqa(seed: int) -> None:
    answer = qkv.why("gqa", seed=seed)
    n = answer.numbers
    q, k, v = randn(draws(seed), 3, 1, 8, 32, 32)[:, 0]

    def out(k: Array, v: Array, of: list[int]) -> Array:
        return np.stack([softmax(q[h] @ k[of[h]].T / 32**0.5) @ v[of[h]] for h in range(8)])

    def off(a: Array, b: Array) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    groups = out(k, v, [h // 4 for h in range(8)])
    turns = off(out(k, v, [h % 2 for h in range(8)]), groups)
    assert one(n["GQA differs from heads repeated in turns by"]) == pytest.approx(turns, rel=1e-9)
    whole = out(k, v, list(range(8)))
    for count in (4, 2, 1):
        fewer = [x.reshape(count, 8 // count, 32, 32).mean(1) for x in (k, v)]
        expected = off(out(*fewer, [h // (8 // count) for h in range(8)]), whole)
        assert one(n[f"mean-pooled to {count}, unlike heads: out is off by"]) == pytest.approx(expected, rel=1e-9)
        assert one(n[f"mean-pooled to {count}, heads alike: out is off by"]) < 0.5 * expected
    fan = answer.picture.splitlines()
    assert fan[0].split() == ["query", "head", *map(str, range(8))]
    assert [fan[0].index(str(h)) for h in range(8)] == [i for i, c in enumerate(fan[1]) if c in "└┴┘"]


@pytest.mark.parametrize("seed", SEEDS)
def test_latent(seed: int) -> None:
    n = qkv.why("latent", seed=seed).numbers
    assert one(n["absorbed differs from expanded by"]) < 1e-12
    assert n["small layer: rank of all heads' keys and values"] == n["small layer: numbers of the latent"] == 16
    assert n["small layer: numbers of all heads' keys and values"] == 8 * (8 + 8)
    kept, _, heads = series(n["bytes a token: latent, GQA of 8 × 128, 128 heads"])
    assert n["times smaller than 128 heads"] == heads / kept == pytest.approx(71.11, abs=0.01)
    assert n["FLOPs a pair, expanded"] == 2 * 128 * (128 + 64 + 128)


def test_latent_takes_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal outputs show nothing if they are of one form: the keys and values are expanded once, for one of them."""
    expanded = []
    real = qkv.nn.LatentAttention._materialised

    def spied(layer: qkv.nn.LatentAttention, *given: Any) -> tuple[Tensor, Tensor]:
        expanded.append(layer.absorb)
        return real(layer, *given)

    monkeypatch.setattr(qkv.nn.LatentAttention, "_materialised", spied)
    qkv.why("latent")
    assert expanded == [False]


@pytest.mark.parametrize("seed", SEEDS)
def test_long_context(seed: int) -> None:
    n = qkv.why("long-context", seed=seed).numbers
    keys = series(n["keys"])
    for gap in (5, 10):
        expected = [math.exp(gap) / (math.exp(gap) + m - 1) for m in keys]
        assert series(n[f"weight, {gap} above"]) == pytest.approx(expected, rel=1e-5)
    varied = series(n["10 above others of variance 1, up to 100,000"])
    crowd = [math.exp(10) / (math.exp(10) + (m - 1) * math.exp(0.5)) for m in keys]
    assert varied[1:4] == pytest.approx(crowd[1:4], rel=0.1)
    for m, score in zip(keys, series(n["score above, for a weight of 0.9"]), strict=True):
        assert math.exp(score) / (math.exp(score) + m - 1) == pytest.approx(0.9)


@pytest.mark.parametrize("seed", SEEDS)
def test_sink(seed: int) -> None:
    n = qkv.why("sink", seed=seed).numbers
    rng = draws(seed)
    for i, m in enumerate((16, 256, 4096)):
        q = randn(rng, 1, 1, 64, 64)[0, 0]
        k, v = randn(rng, 2, 1, 1, m, 64)[:, 0, 0]
        e = np.exp(q @ k.T / 8)
        sink = math.exp(3) * m
        plain, quiet = e / e.sum(1, keepdims=True) @ v, e / (e.sum(1, keepdims=True) + sink) @ v
        for name, out in (("no sink", plain), ("with a sink", quiet)):
            assert series(n[f"length of out, {name}"])[i] == pytest.approx(np.linalg.norm(out, axis=1).mean(), rel=1e-9)
        assert series(n["weight of the sink"])[i] == pytest.approx((sink / (e.sum(1) + sink)).mean(), rel=1e-9)
    assert max(series(n["a first token with that score and value 0 differs by"])) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_sparse(seed: int) -> None:
    answer = qkv.why("sparse", seed=seed)
    n = answer.numbers
    i, j = np.arange(512)[:, None], np.arange(512)[None]
    near, first = abs(i - j) <= 64, (i < 4) | (j < 4)
    seen = [
        np.ones((512, 512)) > 0,
        near,
        near | first,
        qkv.bigbird(16, 3, 1, 3, seed=seed).tensor(512, 512)[0, 0].numpy(),
        near & (j <= i),
        (near | first) & (j <= i),
    ]
    assert series(n["pairs scored"]) == tuple(int(mask.sum()) for mask in seen)
    hops = []
    for mask in seen:
        held, layers = np.arange(512) == 40, 0
        while not held[-1]:
            held, layers = held | (mask.astype(int) @ held.astype(int) > 0), layers + 1
        hops.append(layers)
    assert series(n["layers until it arrives"]) == tuple(hops)
    assert hops[1] == n["estimate for the window, distance / 64 rounded up"] == 8
    assert hops[2] == 2
    assert hops[4] == hops[5] == 8, "under a causal mask a global token has read only what came before it"
    found = series(n["weight on the far one"])
    assert found[0] > 0.99
    assert found[1] == found[2] == found[4] == found[5] == 0
    assert one(n["window: gradient from it to the last, those layers"]) > 0
    assert n["window: gradient from it to the last, one layer fewer"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_flash(seed: int) -> None:
    n = qkv.why("flash", seed=seed).numbers
    rng = draws(seed)
    q, k, v = randn(rng, 8), randn(rng, 20, 8), randn(rng, 20, 8)
    scores = 2 * k @ q / 8**0.5
    for i in range(5):
        seen = scores[: 4 * (i + 1)]
        assert series(n["running maximum m"])[i] == seen.max()
        e = np.exp(seen - seen.max())
        assert series(n["running sum l"])[i] == pytest.approx(e.sum(), rel=1e-12)
        assert series(n["length of the running sum o"])[i] == pytest.approx(np.linalg.norm(e @ v[: len(e)]), rel=1e-12)
        off = np.linalg.norm(softmax(seen) @ v[: len(e)] - softmax(scores) @ v)
        assert series(n["o / l is away from the result by"])[i] == pytest.approx(off, abs=1e-12)
    tops = np.array([scores[: 4 * (i + 1)].max() for i in range(5)])
    assert series(n["what was before is multiplied by"]) == pytest.approx([0, *np.exp(tops[:-1] - tops[1:])])
    assert one(n["lse, m + ln l"]) == pytest.approx(np.log(np.exp(scores).sum()), rel=1e-12)
    assert one(n["differs from the softmax of all scores by"]) < 1e-14
    assert one(n["this build's kernel, float32, differs from the definition by"]) < 1e-5
    assert n["bytes of m, l and o of a tile of 128 queries"] == 128 * (1 + 1 + 64) * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_paged(seed: int) -> None:
    answer = qkv.why("paged", seed=seed)
    n = answer.numbers
    lengths = series(n["tokens of each chat"])
    size = 2 * 2 * 32 * 4
    assert n["bytes a token"] == size
    pages = [math.ceil(length / 16) for length in lengths]
    assert n["bytes, on pages, nothing shared"] == sum(pages) * 16 * size
    assert n["pages used"] == 60 + sum(p - 60 for p in pages)  # 960 tokens fill 60 pages, held once
    assert n["bytes, on pages, prompt shared"] == one(n["pages used"]) * 16 * size
    assert n["pages shared"] == 60
    assert n["bytes of empty slots on the pages"] == sum(p * 16 - t for p, t in zip(pages, lengths, strict=True)) * size
    assert n["FLOPs of a step, pages"] == n["FLOPs of a step, tensors"] == 4 * 2 * 32 * sum(lengths)
    assert one(n["out differs from plain tensors by"]) < 1e-6
    assert "The arithmetic is the same" in flat(answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_explanation(seed: int) -> None:
    answer = qkv.why("explanation", seed=seed)
    n = answer.numbers
    assert n["tokens with weight, as computed"] == 1024
    assert one(n["smallest of the other weights"]) >= 0
    assert one(n["the other weights sum to"]) == pytest.approx(1, abs=1e-12)
    assert one(n["out differs (relative) by"]) < 1e-12
    assert f"brings {one(n['its share of weight × |v|']):.1%}" in flat(answer)


@pytest.mark.parametrize(("tokens", "wide"), [(40, 3), (200, 16), (64, 16), (10, 9)])
def test_other_weights_of_any_row(tokens: int, wide: int) -> None:
    """Against the definition: not negative, the same sum, the same mean of the values, on few tokens."""
    for seed in range(5):
        rng = draws(seed)
        p = torch.softmax(2 * torch.randn(tokens, generator=rng, dtype=torch.float64), -1)
        v = torch.randn(tokens, wide, generator=rng, dtype=torch.float64)
        if seed == 3:
            v[:, 1] = v[:, 0]  # values of fewer dimensions than they have numbers
        other = elsewhere(p, v)
        assert float(other.min()) >= 0
        assert float(other.sum()) == pytest.approx(1, abs=1e-10)
        assert torch.allclose(other @ v, p @ v, atol=1e-10)
        assert int((other > 0).sum()) <= wide + 1 - (seed == 3)
        assert float((p - other).abs().sum()) / 2 > 0.2 or tokens == wide + 1


def test_few_tokens_have_no_other_weights() -> None:
    p, v = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.randn(3, 8, generator=draws(0), dtype=torch.float64),
    )
    assert torch.equal(elsewhere(p, v), p)
    hidden = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    same: Tensor = elsewhere(hidden, torch.zeros(4, 2, dtype=torch.float64))
    assert same[1] == same[3] == 0, "a hidden token is given no weight"
    assert float(same.sum()) == pytest.approx(1)


CLAIMS = {
    "cross": "out differs by",
    "shapes": "side by side again",
    "softmax-axis": "And it leaks through a causal mask",
    "softmax": "e^score is positive",
    "cost": "Twice the text is 4 times the pairs",
    "order": "each output is the same",
    "reformer": "whoever is looked at looks back (100% of pairs)",
    "gradient": "the often-told story is wrong at this width",
    "causal": "With the mask earlier rows move by 0",
    "mask-alignment": 'is_causal=True reads "start"',
    "dead-rows": "its gradient poisons every key, 40 of 40",
    "heads": "The price: the same parameters",
    "thin-heads": "have rank at most d (measured 2, 4, 8, 16, 32, 64)",
    "split-heads": "It leaks through a causal mask",
    "kv-cache": "the newest output moves by 0",
    "gqa": "repeat_interleave (differs by 0)",
    "latent": "the same result",
    "long-context": "lost among a million",
    "sink": "A first token with that score and value 0 does the same",
    "sparse": "one fewer passes no gradient at all",
    "flash": "Not a FLOP is saved",
    "paged": "Pages do not make a call faster",
    "explanation": "1,024 tokens become 65",
    "names": "reorder both and nothing changes",
    "scale": "At d = 1024 it does vanish",
    "same-qk": "nearly always itself",
    "lookup": "neither can be trained",
    "projections": "only the product W_Q W_Kᵀ matters",
    "mask-polarity": "Nothing raises",
}


@pytest.mark.parametrize("topic", CLAIMS)
@pytest.mark.parametrize("seed", range(5))
def test_what_a_verdict_claims_holds_for_other_seeds(topic: str, seed: int) -> None:
    answer = qkv.why(topic, seed=seed)
    assert CLAIMS[topic] in flat(answer)
    for word in ("which must not happen", "not what is told", "see the numbers", "see the bars", "No leak shows"):
        assert word not in f"{answer.short} {flat(answer)}"


def test_every_topic_makes_a_claim_here() -> None:
    assert set(CLAIMS) == set(TOPICS)
