"""`qkv.why` on the caller's tensors: the same numbers by NumPy, what is chosen of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkv
from qkv.insight.answer import Answer, one, series
from qkv.insight.terminal import cells
from qkv.insight.topics import TOPICS

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")

TAKERS = [name for name, topic in TOPICS.items() if topic.needs]
B, HQ, HKV, L, D, DV = 2, 4, 2, 24, 8, 5


def made(seed: int = 0, Lq: int = L, Lk: int = L, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, HQ, Lq, D), "k": (B, HKV, Lk, D), "v": (B, HKV, Lk, DV)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def probabilities(given: dict[str, Tensor], b: int, h: int, scale: float = D**-0.5, causal: bool = True) -> np.ndarray:
    """Of one head, from the definition."""
    q, k = given["q"][b, h].double().numpy(), given["k"][b, h // (HQ // HKV)].double().numpy()
    scores = scale * q @ k.T
    if causal:
        scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("topic", TAKERS)
def test_it_says_what_was_measured_and_fits_the_screen(topic: str) -> None:
    answer = qkv.why(topic, **made(), mask=qkv.causal(), batch=1)
    assert f"your q {(B, HQ, L, D)}" in answer.data
    assert "batch row 1" in answer.data
    assert answer.trained == "", "what small models cost says nothing of these tensors"
    for text in (str(answer), answer.full()):
        assert max(map(cells, text.splitlines())) <= 80
    assert len(str(answer).splitlines()) <= 30
    assert str(answer).splitlines()[0] == answer.short


@pytest.mark.parametrize("topic", TAKERS)
def test_nothing_is_written_drawn_or_kept(topic: str) -> None:
    given = made(dtype=torch.float32)
    given = {name: x.requires_grad_() for name, x in given.items()}
    before = {name: x.detach().clone() for name, x in given.items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (qkv.why(topic, **given, mask=qkv.causal()) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    for name, x in given.items():
        assert torch.equal(x, before[name])
        assert x.grad is None


@pytest.mark.parametrize("topic", TAKERS)
@pytest.mark.parametrize(
    "case", ["one pair", "decoding", "all hidden", "more queries", "bfloat16", "equal values", "one number wide"]
)
def test_odd_sizes_are_answered(topic: str, case: str) -> None:
    options: dict[str, Any] = {}
    given = made()
    if case == "one pair":
        given = made(Lq=1, Lk=1)
    elif case == "decoding":
        given, options = made(Lq=1, Lk=300), {"mask": qkv.causal(), "positions": "end"}
    elif case == "all hidden":
        options = {"mask": torch.zeros(L, L, dtype=torch.bool)}
    elif case == "more queries":
        given = made(Lq=30, Lk=4)
    elif case == "bfloat16":
        given = made(dtype=torch.bfloat16)
    elif case == "equal values":
        given["v"] = torch.ones_like(given["v"])
    else:
        given = {name: x[..., :1] for name, x in given.items()}
    answer = qkv.why(topic, **given, **options)
    assert max(map(cells, answer.full().splitlines())) <= 80
    answer.json()


@pytest.mark.parametrize("seed", range(3))
def test_scale_and_gradient(seed: int) -> None:
    given = made(seed)
    scale, gradient = (qkv.why(t, **given, mask=qkv.causal(), scale=0.5, batch=1) for t in ("scale", "gradient"))
    products = np.stack([(given["q"][1, h] @ given["k"][1, h // 2].T).numpy() for h in range(HQ)])
    assert one(scale.numbers["variance of q·k"]) == pytest.approx(products.var(), rel=1e-9)
    assert one(scale.numbers["variance of the scores, this call"]) == pytest.approx(products.var() / 4, rel=1e-9)
    for rule, factor in (("this call", 0.5), ("no scale", 1.0), ("1/√d", D**-0.5), ("1/d", 1 / D)):
        p = np.concatenate([probabilities(given, 1, h, factor) for h in range(HQ)])
        assert one(scale.numbers[f"peak weight, {rule}"]) == pytest.approx(p.max(-1).mean(), rel=1e-9)
        norms = np.array([np.linalg.norm(np.diag(row) - np.outer(row, row)) for row in p])
        lower = np.sort(norms)[(len(norms) - 1) // 2]  # of an even number, torch takes the lower middle
        assert one(gradient.numbers[f"median gradient, {rule}"]) == pytest.approx(lower, abs=1e-7)
        assert one(gradient.numbers[f"rows with gradient < 0.01, {rule}"]) == pytest.approx((norms < 0.01).mean())


@pytest.mark.parametrize("seed", range(3))
def test_sink_and_long_context(seed: int) -> None:
    given = made(seed)
    sink, long = (qkv.why(t, **given, mask=qkv.causal()) for t in ("sink", "long-context"))
    for h in range(HQ):
        p = probabilities(given, 0, h)[1:]  # the first row sees one key
        size = np.linalg.norm(given["v"][0, h // 2].numpy(), axis=1)
        assert series(sink.numbers["weight on key 0"])[h] == pytest.approx(p[:, 0].mean(), rel=1e-9)
        assert series(sink.numbers["equal weights"])[h] == pytest.approx(np.mean(1 / np.arange(2, L + 1)), rel=1e-9)
        carried = (p[:, 0] * size[0]).sum() / (p * size).sum()
        assert series(sink.numbers["share of weight × |v| on key 0"])[h] == pytest.approx(carried, rel=1e-9)
        top = p.max(-1)
        assert series(long.numbers["best weight"])[h] == pytest.approx(top.mean(), rel=1e-9)
        for factor in (10, 100):
            left = (top / (top + factor * (1 - top))).mean()
            assert series(long.numbers[f"with {factor} × the others"])[h] == pytest.approx(left, rel=1e-9)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        assert series(long.numbers["effective tokens"])[h] == pytest.approx(np.exp(entropy).mean(), rel=1e-9)


def test_a_sink_is_seen() -> None:
    given = made()
    given["q"][..., 0] = 4.0
    given["k"][:, :, 0] = 0.0
    given["k"][:, :, 0, 0] = 3.5
    given["v"][:, :, 0] *= 0.01
    answer = qkv.why("sink", **given, mask=qkv.causal())
    assert answer.short == "4 of 4 heads put more than 0.3 of their weight on the first key."
    assert "far less than its weight, a sink" in " ".join(answer.verdict.split())
    plain = qkv.why("sink", **made(), mask=qkv.causal())
    assert "a sink" not in plain.verdict.replace("A sink", "")


def test_dead_rows_are_counted_by_head() -> None:
    given = made()
    seen = torch.ones(B, HQ, L, L, dtype=torch.bool)
    seen[0, 1, 3] = seen[0, 1, 7] = seen[1, 0, 2] = False
    answer = qkv.why("dead-rows", q=given["q"], k=given["k"], mask=seen)
    assert answer.numbers["rows that see no key"] == 2
    assert answer.numbers["heads with such rows"] == 1
    assert answer.numbers["rows looked at"] == HQ * L
    assert "of head 1, rows 3, 7" in answer.picture
    assert qkv.why("dead-rows", q=given["q"], k=given["k"], mask=seen, batch=1).numbers["rows that see no key"] == 1
    assert qkv.why("dead-rows", q=given["q"], k=given["k"], mask=seen, head=0).numbers["rows that see no key"] == 0
    given["q"][0, 2, 5] = float("nan")
    assert qkv.why("dead-rows", q=given["q"], k=given["k"], mask=seen).numbers["rows that are NaN"] == 1


def test_heads_that_look_alike_are_found() -> None:
    given = made()
    given["q"][:, 1] = given["q"][:, 0]  # both read key/value head 0
    answer = qkv.why("heads", q=given["q"], k=given["k"])
    assert answer.short.startswith("1 of 6 pairs")
    assert answer.numbers["of heads"] == (0.0, 1.0)
    apart = [
        np.abs(probabilities(given, 0, i, causal=False) - probabilities(given, 0, j, causal=False)).sum(-1).mean() / 2
        for i in range(HQ)
        for j in range(i)
    ]
    assert one(answer.numbers["mean total variation of two heads"]) == pytest.approx(np.mean(apart), rel=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gqa_pools_neighbours(causal: bool) -> None:
    given = made()
    answer = qkv.why("gqa", **given, mask=qkv.causal() if causal else None, batch=1)
    pooled = {name: x.mean(1, keepdim=True).expand(-1, HKV, -1, -1) for name, x in given.items() if name != "q"}
    outs = [
        np.stack([probabilities(x, 1, h, causal=causal) @ x["v"][1, h // 2].numpy() for h in range(HQ)])
        for x in (given, {**given, **pooled})
    ]
    expected = np.linalg.norm(outs[1] - outs[0]) / np.linalg.norm(outs[0])
    assert one(answer.numbers["mean-pooled to 1: out is off by"]) == pytest.approx(expected, rel=1e-9)
    assert answer.numbers["bytes a token"] == HKV * (D + DV) * 8


def test_flash_and_explanation_follow_the_row_that_is_asked_for() -> None:
    given = made()
    for head in (0, 3):
        p = probabilities(given, 1, head)[-1]
        out = p @ given["v"][1, head // 2].numpy()
        flash = qkv.why("flash", **given, mask=qkv.causal(), head=head, batch=1)
        assert f"Row {L - 1} of head {head}." in flash.verdict
        assert one(flash.numbers["differs from the softmax of all scores by"]) < 1e-12
        scores = D**-0.5 * (given["k"][1, head // 2] @ given["q"][1, head, -1]).numpy()
        assert one(flash.numbers["lse, m + ln l"]) == pytest.approx(np.log(np.exp(scores).sum()), rel=1e-9)
        told = qkv.why("explanation", **given, mask=qkv.causal(), head=head, batch=1)
        assert one(told.numbers["largest weight"]) == pytest.approx(p.max(), rel=1e-9)
        assert told.numbers["tokens with weight, other weights"] == DV + 1
        assert np.linalg.norm(out) * one(told.numbers["out differs (relative) by"]) < 1e-10


def test_flash_of_hidden_tiles() -> None:
    """A window that begins late: the first tiles see nothing, and m starts at -inf without a NaN."""
    given = made()
    answer = qkv.why("flash", **given, mask=qkv.causal() & qkv.sliding_window(3))
    top = series(answer.numbers["running maximum m"])
    assert top[0] == -np.inf < top[-1]
    assert one(answer.numbers["differs from the softmax of all scores by"]) < 1e-12


def test_alignment_counts_the_callers_sizes() -> None:
    given = made(Lq=3, Lk=10)
    answer = qkv.why("mask-alignment", q=given["q"], k=given["k"])
    assert answer.numbers['keys the last query sees, "start"'] == 3
    assert answer.numbers['keys the first query sees, "end"'] == 8
    more = made(Lq=10, Lk=3)
    assert qkv.why("mask-alignment", q=more["q"], k=more["k"]).numbers['queries that see no key, "end"'] == 7


def test_order_of_the_callers_tensors() -> None:
    given = made()
    assert one(qkv.why("order", **given).numbers["out changes by, no positions"]) < 1e-12
    assert one(qkv.why("order", **given).numbers["out changes by, causal mask"]) > 0.1


def test_long_inputs_are_sampled_and_that_is_said() -> None:
    q = k = torch.randn(1, 1, 3000, 4, generator=torch.Generator().manual_seed(0))
    answer = qkv.why("dead-rows", q=q, k=k, mask=qkv.causal())
    assert answer.numbers["rows looked at"] == 256
    assert "256 of 3,000 rows" in answer.data


@pytest.mark.parametrize("topic", [name for name in TOPICS if name not in TAKERS])
def test_topics_that_take_no_tensors_say_which_do(topic: str) -> None:
    given = made()
    with pytest.raises(qkv.ArgumentError, match=f'"{topic}" makes its own tensors.*ask one of "order", "scale"'):
        qkv.why(topic, q=given["q"], k=given["k"])


def test_what_is_refused() -> None:
    given = made()
    q, k, v = given.values()
    for topic in ("order", "gqa", "flash", "explanation"):
        with pytest.raises(qkv.ArgumentTypeError, match=r"so it needs v.*Pass v="):
            qkv.why(topic, q=q, k=k)
    with pytest.raises(qkv.ArgumentTypeError, match=r"q= and k= together.*Pass k="):
        qkv.why("scale", q=q)
    with pytest.raises(qkv.ArgumentTypeError, match=r"q= and k= together.*Pass q="):
        qkv.why("sink", mask=qkv.causal())
    with pytest.raises(qkv.ArgumentTypeError, match="q must be a tensor"):
        qkv.why("scale", q=q.numpy(), k=k)  # type: ignore[arg-type]
    with pytest.raises(qkv.ShapeError):
        qkv.why("scale", q=q, k=k[..., :4])
    with pytest.raises(qkv.ArgumentError, match="head must be an integer <= 3"):
        qkv.why("sink", q=q, k=k, head=4)
    with pytest.raises(qkv.ArgumentError, match="batch must be an integer <= 1"):
        qkv.why("sink", q=q, k=k, batch=2)
    with pytest.raises(qkv.ArgumentError, match="positions= must say"):
        qkv.why("sink", q=q[:, :, :3], k=k, mask=qkv.causal())
    with pytest.raises(qkv.ArgumentError, match="there must be something to measure"):
        qkv.why("sink", q=q[:, :, :0], k=k)
    q[0, 0, -1] = float("nan")
    with pytest.raises(qkv.ArgumentError, match=r"must be finite to be explained.*dead-rows"):
        qkv.why("explanation", q=q, k=k, v=v)


def _zeros(*given: Tensor, **_: Any) -> Tensor:
    return torch.zeros(*given[0].shape[:3], given[2].shape[3], dtype=given[0].dtype)


def _first(q: Tensor, k: Tensor, *_: Any, rows: Any = None, **__: Any) -> Tensor:
    """Every query takes the first key, whatever is asked."""
    count = q.shape[2] if rows is None else len(rows)
    p = torch.zeros(*q.shape[:2], count, k.shape[2], dtype=torch.float64)
    p[..., 0] = 1
    return p


def _flat(q: Tensor, k: Tensor, *_: Any, rows: Any = None, **__: Any) -> Tensor:
    """Equal weights, whatever is asked: a softmax that measures nothing."""
    count = q.shape[2] if rows is None else len(rows)
    return torch.full((*q.shape[:2], count, k.shape[2]), 1 / k.shape[2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("topic", "module", "name", "fake", "told"),
    [
        ("causal", "causal", "causal", lambda: None, "The mask does not do here what is told of it"),
        ("heads", "heads", "attention", _zeros, "One head did no worse"),
        ("thin-heads", "thin_heads", "weights", _flat, "Thin heads did no worse here"),
        ("same-qk", "same_qk", "weights", _flat, "Tied, only 2%"),
        ("reformer", "reformer", "weights", _flat, "The two masks do not cure here"),
        ("projections", "projections", "weights", _first, "The projections did not do here what is told"),
        ("sparse", "sparse", "weights", _flat, "Nothing was lost here"),
        ("long-context", "long_context", "weights", _flat, "It did not blur here"),
        ("mask-polarity", "mask_polarity", "attention", _zeros, "The conventions measured here are not those"),
        ("shapes", "shapes", "attention", _zeros, "do not agree, which must not happen"),
        ("gqa", "gqa", "attention", lambda q, k, v, **_: v.sum() * k.shape[1] + q, "which must not happen"),
    ],
)
def test_numbers_that_come_out_the_other_way_are_told_so(
    topic: str, module: str, name: str, fake: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment that measures something else must not print the usual sentence."""
    usual = qkv.why(topic).short
    monkeypatch.setattr(f"qkv.insight.experiments.{module}.{name}", fake)
    answer: Answer = qkv.why(topic)
    assert told in answer.short
    assert answer.short != usual


def test_a_cache_that_gives_something_else_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkv.insight.experiments import kv_cache

    real = kv_cache.attention

    def forgets(q: Tensor, k: Any, *more: Any, **options: Any) -> Tensor:
        out: Tensor = real(q, k, *more, **options)
        return out if isinstance(k, Tensor) else out + 1e-3

    monkeypatch.setattr(kv_cache, "attention", forgets)
    assert "The cache did not give here" in qkv.why("kv-cache").short
