"""The experiments of `qkv.why`: their numbers against independent ones, and their verdicts against their numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv.insight.answer import UNITS, Answer
from qkv.insight.terminal import cells, number
from qkv.insight.topics import GROUPS, TOPICS, meant

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    return {topic: qkv.why(topic) for topic in TOPICS}


def test_the_topics_come_in_the_order_in_which_a_learner_meets_them() -> None:
    assert list(TOPICS) == [
        *(
            "lookup",
            "softmax",
            "names",
            "cross",
            "shapes",
            "softmax-axis",
            "order",
            "same-qk",
            "reformer",
            "projections",
        ),
        *("scale", "gradient", "causal", "mask-polarity", "mask-alignment", "dead-rows", "heads", "thin-heads"),
        *("split-heads", "kv-cache", "gqa", "latent", "long-context", "sink", "sparse", "cost", "flash", "paged"),
        "explanation",
    ]
    assert [name for group in GROUPS.values() for name in group] == list(TOPICS)
    assert list(GROUPS) == [
        *("the lookup", "shapes", "which is which", "scale", "masks", "heads", "sharing keys", "long inputs"),
        *("speed and memory", "reading weights"),
    ]


def test_the_docstring_tells_every_topic_in_its_group_and_which_take_tensors() -> None:
    assert qkv.why.__doc__ is not None
    lines = {line.strip() for line in qkv.why.__doc__.splitlines()}
    for group, topics in GROUPS.items():
        told = ", ".join(f"{name}*" if topic.needs else name for name, topic in topics.items())
        assert f"{group:<16}  {told}" in lines


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_the_screen(topic: str, seed: int) -> None:
    answer = qkv.why(topic, seed=seed)
    text = str(answer)
    lines = text.splitlines()
    assert lines[0] == answer.short, "the answer is the first line, whole"
    assert lines[1] == f"{topic}: {answer.question} (seed {seed})"
    assert len(lines) <= (30 if topic in ("names", "shapes") else 28)
    assert max(map(cells, text.splitlines())) <= 80
    assert max(map(cells, answer.full().splitlines())) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("topic", TOPICS)
def test_an_answer_has_every_part(topic: str, answers: dict[str, Answer]) -> None:
    answer = answers[topic]
    assert answer.topic == topic
    assert answer.question.endswith("?")
    assert answer.short
    assert answer.numbers
    assert answer.sources
    text = answer.full()
    for part in (answer.question, answer.picture, *answer.numbers):
        assert part in text
    for printed, parts in ((text, (answer.verdict, *answer.sources)), (str(answer), (answer.picture, answer.verdict))):
        flat = " ".join(printed.split())
        for part in parts:
            assert " ".join(part.split()) in flat or part in flat.replace("- ", "-")


@pytest.mark.parametrize("topic", TOPICS)
def test_every_unit_that_is_used_is_defined(topic: str, answers: dict[str, Answer]) -> None:
    answer = answers[topic]
    text = " ".join(str(answer).split())
    for term, meaning in UNITS.items():
        used = re.search(rf"\b{term}\b", f"{answer.short} {answer.question} {answer.picture} {answer.verdict}")
        assert (f"{term}: {meaning}." in text) >= bool(used)


@pytest.mark.parametrize("topic", TOPICS)
def test_an_answer_is_json(topic: str, answers: dict[str, Answer]) -> None:
    found = json.loads(answers[topic].json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["short"] == answers[topic].short
    for name, value in answers[topic].numbers.items():
        for got, want in zip(
            found["numbers"][name] if isinstance(value, tuple) else [found["numbers"][name]],
            value if isinstance(value, tuple) else [value],
            strict=True,
        ):
            assert got is None if not math.isfinite(want) else got == want


@pytest.mark.parametrize("topic", TOPICS)
def test_an_answer_is_a_frozen_value(topic: str, answers: dict[str, Answer]) -> None:
    answer = answers[topic]
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.verdict = "another"  # type: ignore[misc]
    with pytest.raises(TypeError):
        answer.numbers["more"] = 1.0  # type: ignore[index]
    assert pickle.loads(pickle.dumps(answer)) == answer
    assert copy.deepcopy(answer) == answer
    assert hash(copy.deepcopy(answer)) == hash(answer)


@pytest.mark.parametrize("topic", TOPICS)
def test_experiments_are_seeded_and_leave_the_global_generator_alone(topic: str, answers: dict[str, Answer]) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = qkv.why(topic, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.numbers == answers[topic].numbers
    assert again == answers[topic]
    if topic != "cost":  # it counts operations, of whatever numbers
        assert qkv.why(topic, seed=1).numbers != answers[topic].numbers


def test_unknown_topics_are_named_in_the_error() -> None:
    with pytest.raises(qkv.ArgumentError, match='Use one of "lookup", "softmax", "names"'):
        qkv.why("zzz")
    with pytest.raises(qkv.ArgumentTypeError, match="topic must be a string"):
        qkv.why(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        *(("rope", "order"), ("MLA", "latent"), ("mqa", "gqa"), ("axis", "softmax-axis"), ("sinks", "sink")),
        *(("dead rows", "dead-rows"), ("split_heads", "split-heads"), ("grdient", "gradient"), ("pages", "paged")),
    ],
)
def test_a_near_name_is_asked_back(asked: str, found: str) -> None:
    assert meant(asked)[0] == found
    with pytest.raises(qkv.ArgumentError, match=f'no such topic.*Did you mean "{found}"'):
        qkv.why(asked)


def test_a_name_near_nothing_lists_the_topics_only() -> None:
    assert meant("xyzzy") == []
    with pytest.raises(qkv.ArgumentError, match=r"Got 'xyzzy'\. Use one of"):
        qkv.why("xyzzy")


@pytest.mark.parametrize("seed", [True, 1.5, "0", None])
def test_a_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(qkv.ArgumentTypeError, match="seed must be an integer"):
        qkv.why("lookup", seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_is_in_range(seed: int) -> None:
    with pytest.raises(qkv.ArgumentError, match=r"seed must be an integer [<>]="):
        qkv.why("lookup", seed=seed)


def test_lookup_follows_the_closed_form(answers: dict[str, Answer]) -> None:
    n = answers["lookup"].numbers
    sharpness = n["sharpness (the scale argument)"]
    expected = [math.exp(s) / (math.exp(s) + 15) for s in sharpness]
    assert n["weight on the right key"] == pytest.approx(expected, rel=1e-6)
    error, spread, slope = (
        n[name]
        for name in ("distance from the stored value", "distance from the plain mean", "how far out moves as q moves")
    )
    assert error[-1] < 1e-4 < 1 < error[0]
    assert spread[0] < 1e-6
    # out = v_r + (1 - w) * c for the right entry r: both distances are linear in the weight
    assert [e / error[0] for e in error] == pytest.approx([(1 - w) / (1 - 1 / 16) for w in expected], abs=1e-6)
    best = max(range(len(slope)), key=slope.__getitem__)
    assert 0 < best < len(slope) - 1
    assert slope[0] == 0
    assert slope[-1] < 0.01 * slope[best]
    assert f"largest at sharpness {number(sharpness[best])}" in answers["lookup"].verdict


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _jacobian_norms(p: np.ndarray) -> np.ndarray:
    """Of each row the norm of diag(p) - p pᵀ, without the matrix."""
    square = (p * p).sum(-1)
    return np.sqrt(np.maximum(square - 2 * (p**3).sum(-1) + square**2, 0))


def test_scale_agrees_with_other_random_numbers(answers: dict[str, Answer]) -> None:
    """The experiment again, in NumPy, with another generator: statistics agree, digits do not have to."""
    n = answers["scale"].numbers
    rng = np.random.default_rng(7)
    for index, d in enumerate(n["d"]):
        q, k = rng.standard_normal((32, 12, d)), rng.standard_normal((32, 128, d))
        scores = q @ k.transpose(0, 2, 1)
        assert n["variance of q·k"][index] == pytest.approx(d, rel=0.15)
        assert n["variance of q·k, 1/√d"][index] == pytest.approx(1, rel=0.15), "what the square root is for"
        assert n["variance of q·k, 1/d"][index] == pytest.approx(1 / d, rel=0.15)
        for rule, scale in (("no scale", 1.0), ("1/√d", d**-0.5), ("1/d", 1 / d)):
            p = _softmax(scores * scale).reshape(-1, 128)
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
            rel = 0.3 if d < 16 else 0.12  # few dimensions, few keys: one long key decides a row
            jacobian = _jacobian_norms(p[::2])
            assert jacobian[0] == pytest.approx(np.linalg.norm(np.diag(p[0]) - np.outer(p[0], p[0])), rel=1e-3)
            assert n[f"peak weight, {rule}"][index] == pytest.approx(p.max(-1).mean(), rel=rel)
            assert n[f"entropy, nats, {rule}"][index] == pytest.approx(entropy, rel=rel, abs=0.08)
            flat = n[f"rows with gradient < 0.01, {rule}"][index]
            assert flat == pytest.approx((jacobian < 0.01).mean(), abs=0.12)
            if d < 256 or rule != "no scale":
                assert n[f"median gradient, {rule}"][index] == pytest.approx(np.median(jacobian), rel=max(rel, 0.25))
            else:  # far from the centre the median has a long tail: its size, not its digits
                assert n[f"median gradient, {rule}"][index] < 0.1
    assert n["entropy of equal weights, nats"] == pytest.approx(math.log(128))


def test_scale_is_honest_about_d_64(answers: dict[str, Answer]) -> None:
    answer = answers["scale"]
    at, last = answer.numbers["d"].index(64), -1
    raw, scaled = answer.numbers["median gradient, no scale"], answer.numbers["median gradient, 1/√d"]
    assert raw[at] > scaled[at]
    assert "does not vanish" in " ".join(answer.verdict.split())
    assert number(raw[at]) in answer.verdict
    assert raw[last] < 0.01 * scaled[last]
    assert "At d = 1024 it does vanish" in answer.verdict


def test_same_qk_agrees_with_numpy(answers: dict[str, Answer]) -> None:
    n = answers["same-qk"].numbers
    rng = np.random.default_rng(11)
    x = rng.standard_normal((64, 512))
    w_q, w_k = (rng.standard_normal((512, 64)) / 512**0.5 for _ in range(2))
    cases = {"W_Q and W_K": (x @ w_q, x @ w_k), "W_Q = W_K": (x @ w_q, x @ w_q), "no projection": (x, x)}
    for name, (q, k) in cases.items():
        own = np.diag(_softmax(q @ k.T / q.shape[1] ** 0.5)).mean()
        assert n[f"mean weight on itself, {name}"] == pytest.approx(own, abs=0.05)
    assert n["asymmetry of the scores, W_Q = W_K"] < 1e-12
    assert n["asymmetry of the scores, W_Q and W_K"] > 1
    # a shift has nothing on the diagonal and one side only, so half its squared norm is antisymmetric
    assert n["'the one before me': part no symmetric score can hold"] == pytest.approx(math.sqrt(0.5))
    before = [n[f"weight on the one before, {way}"] for way in ("two matrices", "one, as it is")]
    assert before[0] > 0.999
    assert before[1] < 0.01
    assert n["weight on the one before, one, itself hidden"] == pytest.approx(0.5, abs=0.01)
    assert n["weight on the one before, one, itself and future hidden"] > 0.999


def test_projections_counts_and_fold(answers: dict[str, Answer]) -> None:
    n = answers["projections"].numbers
    found = {name: n[f"tokens found, {name}"] for name in ("all three", "no W_Q, W_K refitted", "no W_V")}
    assert set(found.values()) == {1.0}
    assert [n[f"tokens found, {name}"] for name in ("no W_Q", "no W_K", "neither")] == [0.0, 0.0, 0.0]
    assert n["tokens that find themselves, neither"] == 1.0
    assert n["error of out, all three"] < 1e-4
    assert n["share of out that is the load, all three"] == pytest.approx(1.0)
    assert n["share of out that is the load, no W_V"] < 0.5
    assert n["fold: largest difference of the weights"] < 1e-12
    assert n["rank of the scores, W_Q and W_K 8, 32, 64, 128 wide"] == (8, 32, 64, 128)
    assert n["parameters, two thin matrices"] == 2 * 512 * 64 * 8
    assert n["parameters, folded"] == 8 * 512 * 512
    assert (n["FLOPs a score, thin"], n["FLOPs a score, folded"]) == (128, 1024)
    assert (n["cached numbers a token, thin"], n["cached numbers a token, folded"]) == (2 * 8 * 64, 512)
    assert n["fold under a rotation: the product changes by"] > 0.05


def test_names_tells_the_roles_apart(answers: dict[str, Answer]) -> None:
    answer = answers["names"]
    n = answer.numbers
    assert n["self: tokens asking, tokens offered, rows of out"] == (5, 5, 5)
    assert n["cross: English asks French"] == (5, 4, 5)
    assert n["roles swapped: French asks English"] == (4, 5, 4)
    assert n["columns of q, of k, of v, of out"] == (16, 16, 3, 3)
    assert n["words that found their translation"] == 1.0
    assert 0.25 <= n['largest weight of "now", which has none'] < 0.9
    assert n["q reordered: out, put back in order, changes by"] < 1e-9
    assert n["k and v reordered together: out changes by"] < 1e-9
    assert n["v reordered alone: out changes by"] > 0.1
    for word in ("the", "black", "cat", "sleeps", "le", "chat", "noir", "dort"):
        assert word in answer.picture


@pytest.mark.parametrize("topic", TOPICS)
def test_an_experiment_is_small(topic: str) -> None:
    """Well under a second, counted rather than timed: products of all kinds, what attention registers among them."""
    with FlopCounterMode(display=False) as counter:
        qkv.why(topic)
    assert counter.get_total_flops() < 2e9


def test_every_topic_that_a_document_names_is_one() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "src").rglob("*.py")]
    named = {
        (path.name, found)
        for path in files
        for found in re.findall(r"""qkv[. ]why(?:\(| +)["']?([a-z][a-z-]+)["']?""", path.read_text(encoding="utf-8"))
    }
    named -= {(path, "topic") for path in ("__init__.py", "why.py")}  # where they say how to call it
    told = {topic for _, topic in named}
    assert {"scale", "lookup", "names", "same-qk", "projections"} <= told
    assert told <= set(TOPICS), f"not a topic: {sorted(pair for pair in named if pair[1] not in TOPICS)}"
