"""The figures that `qkv.why` is held to: what others measured or derived, with how near ours have to come.

The tolerance is that of other random numbers, not of arithmetic: the experiments draw their own. What a row expects is
its source's, or an analytic value; where the definition of an experiment is not the source's, the row says so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

import qkv
from qkv.insight.answer import Answer, series
from qkv.insight.topics import TOPICS

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")

SEEDS = (0, 1, 2)
VASWANI = "Vaswani et al. 2017"


class Figure(NamedTuple):
    """A number of an answer, or a row of them, and what it has to be near to."""

    topic: str
    number: str
    expected: float | tuple[float, ...]
    within: float  # absolute, or relative where `relative`
    source: str
    relative: bool = False


FIGURES = (
    Figure("lookup", "weight on the right key", (0.0625, 0.153, 0.330, 0.785, 0.995, 1.0), 6e-4, "e^b / (e^b + 15)"),
    Figure("softmax", "weights below 0, softmax", 0.0, 0.0, "e^s > 0"),
    Figure("softmax", "all scores + 1: a weight moves by, softmax", 0.0, 1e-12, "e^(s + 1) / e^(t + 1) = e^s / e^t"),
    Figure("softmax", "rows of 4 keys without any weight, share, positive", 1 / 16, 0.06, "four signs of even odds"),
    Figure("softmax", "how far out moves with the scores, largest only", 0.0, 0.0, "a constant"),
    Figure("cost", "pairs, all visible", tuple(4 * n * n * 64 for n in (32, 64, 128, 256, 512)), 0.0, "4 n² d"),
    Figure("cost", "pairs, causal", tuple(2 * n * (n + 1) * 64 for n in (32, 64, 128, 256, 512)), 0.0, "n (n + 1) / 2"),
    Figure("cost", "the same, a layer 4,096 wide", 8192, 0.0, "8 n d² = 4 n² d"),
    Figure("scale", "variance of q·k", (4.0, 16.0, 64.0, 256.0, 1024.0), 0.12, f"{VASWANI}, footnote 4: d", True),
    Figure("scale", "variance of q·k, 1/√d", (1.0,) * 5, 0.12, f"{VASWANI}, 3.2.1: 1 at every d"),
    Figure("scale", "peak weight, no scale", (0.248, 0.520, 0.761, 0.885, 0.944), 0.06, "NumPy, 128 keys"),
    Figure("scale", "peak weight, 1/√d", (0.075, 0.069, 0.069, 0.069, 0.068), 0.012, "NumPy, 128 keys"),
    Figure("scale", "entropy of equal weights, nats", 4.852, 1e-3, "ln 128"),
    Figure("gradient", "median gradient, no scale", (0.33, 0.248, 0.030, 5.2e-4), 0.06, "NumPy, 128 keys"),
    Figure("gradient", "median gradient, 1/√d", (0.132,) * 4, 0.01, "NumPy, 128 keys: constant in d"),
    Figure("gradient", "rows with gradient < 0.01, no scale", (0.01, 0.128, 0.397, 0.636), 0.08, "NumPy, 128 keys"),
    Figure("gradient", "rows with gradient < 0.01, 1/√d", (0.0,) * 4, 0.0, "none at any d"),
    Figure("gradient", "scale inside W_Q: out differs by", 0.0, 1e-12, "the same function"),
    Figure("gradient", "scale inside W_Q: gradient of W_Q longer by", 4.0, 1e-9, "chain rule: √16"),
    Figure("same-qk", "mean weight on itself, W_Q and W_K", 0.014, 0.008, "NumPy, 64 tokens"),
    Figure("same-qk", "mean weight on itself, W_Q = W_K", 0.942, 0.03, "NumPy, 64 tokens"),
    Figure("same-qk", "mean weight on itself, no projection", 1.0, 1e-4, "NumPy, 64 tokens"),
    Figure("same-qk", "rows whose best key is itself, W_Q and W_K", 0.02, 0.06, "chance: 1/64"),
    Figure("same-qk", "rows whose best key is itself, W_Q = W_K", 1.0, 0.02, "NumPy"),
    Figure("same-qk", "'the one before me': part no symmetric score can hold", 0.7071, 1e-4, "√(1/2)"),
    Figure("reformer", "weight on itself, neither", 0.942, 0.03, "as same-qk"),
    Figure("reformer", "weight on itself, both hidden", 0.0, 0.0, "Kitaev et al. 2020: hidden"),
    Figure("reformer", "pairs that look at each other, neither", 1.0, 0.0, "symmetric scores"),
    Figure("reformer", "pairs that look at each other, both hidden", 0.0, 0.0, "a causal mask"),
    Figure(
        "projections", "rank of the scores, W_Q and W_K 8, 32, 64, 128 wide", (8, 32, 64, 128), 0.0, "linear algebra"
    ),
    Figure("heads", "squared error of two look-ups, one head", 1.0, 1e-9, "2 × |a - b|² / 4 of orthonormal values"),
    Figure("heads", "squared error of two look-ups, two heads", 0.0, 1e-14, "a sharp look-up"),
    Figure("heads", "parameters", (1_048_576,) * 3, 0.0, "4 × 512²"),
    Figure("heads", "FLOPs of q·k, 1,024 tokens", (2**30,) * 3, 0.0, "2 n² d_model"),
    Figure("heads", "weights, 1,024 tokens", (2**20, 2**23, 2**26), 0.0, "h n²"),
    Figure(
        "thin-heads",
        "weight on the own position",
        (0.003, 0.005, 0.010, 0.032, 0.146, 0.640),
        0.012,
        "NumPy, n = 1,024",
    ),
    Figure("thin-heads", "rank of scores, 128 tokens", (2, 4, 8, 16, 32, 64), 0.0, "Bhojanapalli et al. 2020"),
    Figure("split-heads", "elements in the wrong place", 5 / 6, 1e-12, "20 of 24, counted by hand"),
    Figure("softmax-axis", "row sums, over keys", (1.0,) * 6, 1e-12, f"{VASWANI}, equation 1"),
    Figure("softmax-axis", "earlier outputs move by, over keys", 0.0, 0.0, "causality"),
    Figure("cross", "cross: rows of q, of k, of out", (3, 5, 3), 0.0, f"{VASWANI}, 3.2.3"),
    Figure("mask-alignment", 'keys seen, positions="start"', (1, 2), 0.0, "2 queries, 5 keys, by hand"),
    Figure("mask-alignment", 'keys seen, positions="end"', (4, 5), 0.0, "2 queries, 5 keys, by hand"),
    Figure("mask-alignment", 'decoding step, keys seen of 1000, "start"', 1, 0.0, "by hand"),
    Figure("mask-alignment", 'decoding step, keys seen of 1000, "end"', 1000, 0.0, "by hand"),
    Figure("dead-rows", "NaN among the 5 weights, -inf", 5, 0.0, "0 / 0"),
    Figure("dead-rows", "weights of forbidden keys, -1e9, float32", (0.2,) * 5, 1e-6, "scores below one unit of 1e9"),
    Figure("dead-rows", "weights of forbidden keys, qkv", (0.0,) * 5, 0.0, "the rule"),
    Figure("order", "out changes by, no positions", 0.0, 1e-14, "a sum has no order"),
    Figure("order", "out changes by, rotary, all moved on by 1,000", 0.0, 1e-12, "Su et al. 2021: distances only"),
    Figure("sink", "length of out, no sink", (2.77, 0.82, 0.20), 0.15, "NumPy, D = 64", True),
    Figure("sink", "length of out, with a sink", (0.21, 0.06, 0.015), 0.25, "NumPy, D = 64", True),
    Figure("sink", "weight of the sink", (0.92,) * 3, 0.01, "e³ / (e³ + e^½)"),
    Figure("long-context", "weight, 10 above", (0.999, 0.989, 0.843, 0.18, 0.02), 3e-3, "e^g / (e^g + n - 1)"),
    Figure("explanation", "tokens with weight, other weights", 65, 0.0, "Carathéodory: Dv + 1"),
    Figure("explanation", "total variation of the two", 0.981, 0.018, "NumPy; ours goes on to the least overlap"),
    Figure("explanation", "of the 5 largest, in common", 0, 0.0, "NumPy"),
    Figure("explanation", "largest weight", 0.803, 0.06, "NumPy, a sink"),
    Figure("explanation", "its share of weight × |v|", 0.085, 0.03, "NumPy, its value 0.02 as long"),
    Figure("latent", "numbers a token: latent, rotated key, both", (512, 64, 576), 0.0, "DeepSeek-AI 2024"),
    Figure("latent", "bytes a token: latent, GQA of 8 × 128, 128 heads", (1152, 4096, 81920), 0.0, "2 bytes a number"),
    Figure("latent", "FLOPs a pair, absorbed", 2 * 128 * 1088, 0.0, "2 H (2 R + dr)"),
    Figure("gqa", "bytes a token, bfloat16", (16384, 4096, 512), 0.0, "2 Hkv D 2 bytes"),
    Figure("gqa", "GQA differs from heads repeated in groups by", 0.0, 1e-14, "h // group"),
    Figure("kv-cache", "rows projected, all anew each step", 32 * 33 / 2, 0.0, "1 + 2 + ... + 32"),
    Figure("flash", "bytes of all weights, 100,000 tokens, a head, float32", 4e10, 0.0, "n² × 4"),
    Figure("paged", "bytes, reserved, 2,048 a chat", 8 * 2048 * 2 * 2 * 32 * 4, 0.0, "chats × tokens × 2 Hkv D × 4"),
)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, int], Answer]:
    return {(topic, seed): qkv.why(topic, seed=seed) for topic in {f.topic for f in FIGURES} for seed in SEEDS}


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.topic}: {figure.number}")
def test_a_figure_is_what_is_told_of_it(figure: Figure, answers: dict[tuple[str, int], Answer]) -> None:
    for seed in SEEDS:
        found = answers[figure.topic, seed].numbers[figure.number]
        expected = figure.expected if isinstance(figure.expected, tuple) else (figure.expected,)
        got = found if isinstance(found, tuple) else (found,)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            room = figure.within * (abs(b) if figure.relative else 1.0)
            assert abs(a - b) <= room, f"seed {seed}: {a} is not within {room} of {b} ({figure.source})"


def test_every_topic_but_those_of_shapes_and_words_has_a_figure() -> None:
    rest = {"names", "shapes", "causal", "mask-polarity", "sparse"}  # what they show is in test_why_topics.py
    assert {figure.topic for figure in FIGURES} == set(TOPICS) - rest


def test_the_wrong_axis_does_what_it_is_told_to_do(answers: dict[tuple[str, int], Answer]) -> None:
    """Told: rows summing to 0.09 to 2.82, earlier outputs moving by 1.74: of other random numbers, so the kind only."""
    for seed in SEEDS:
        numbers = answers["softmax-axis", seed].numbers
        sums = series(numbers["row sums, over queries"])
        assert min(sums) < 0.6 < 2 < max(sums)
        assert sum(sums) == pytest.approx(6), "each of the six keys shares out 1"
        moved = numbers["earlier outputs move by, over queries"]
        assert isinstance(moved, float)
        assert moved > 0.05


def test_the_widest_gap_vanishes_in_order_of_size(answers: dict[tuple[str, int], Answer]) -> None:
    """0.0005 told for d = 1,024: the median's tail is long, so its order of size."""
    for seed in SEEDS:
        raw = series(answers["gradient", seed].numbers["median gradient, no scale"])[-1]
        assert 1e-5 < raw < 1e-2
        assert series(answers["scale", seed].numbers["peak weight, 1/d"])[-1] == pytest.approx(1 / 128, rel=0.12)
        assert series(answers["scale", seed].numbers["entropy, nats, no scale"])[-1] == pytest.approx(0.137, abs=0.09)
        assert series(answers["scale", seed].numbers["entropy, nats, 1/√d"])[-1] == pytest.approx(4.37, abs=0.03)
        assert series(answers["long-context", seed].numbers["weight, 5 above"])[2] == pytest.approx(
            math.exp(5) / (math.exp(5) + 4095), rel=1e-5
        )
