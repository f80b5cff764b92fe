"""docs/gallery.md names a kind of head only where the scores, computed here once more and otherwise, bear it out."""

from __future__ import annotations

import contextlib
import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.lm import load

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gallery.md").read_text(encoding="utf-8")
KINDS = ("previous-token", "induction", "sink")
HEADS, HALF, FAR = 24, 112, 32
Pairs = list[tuple[int, int]]

pytestmark = pytest.mark.filterwarnings("ignore:qkv:UserWarning")


def _text() -> bytes:
    literal = re.search(r"^TEXT = \((.*?)^\)", PAGE, re.DOTALL | re.MULTILINE)
    assert literal is not None
    return b"".join(part.encode() for part in re.findall(r'b"([^"]*)"', literal[1]))


@pytest.fixture(scope="module")
def model() -> Any:
    return load().double()


def _weights(model: Any, text: bytes) -> Tensor:
    """The textbook's softmax of every head on a text (24, L, L)."""
    x = model.embedding(torch.tensor([list(text)])) * model.config.dim**0.5
    hidden = torch.ones(len(text), len(text)).triu(1).bool()
    found = []
    with torch.inference_mode():
        for block in model.blocks:
            q, k, v = block.attention.project(block.before_attention(x))
            p = torch.softmax((q @ k.mT / 32**0.5).masked_fill(hidden, -torch.inf), -1)
            found.append(p[0])
            x = x + block.gain * block.attention.o_proj((p @ v).transpose(1, 2).flatten(2))
            x = x + block.gain * block.mlp(block.before_mlp(x))
    return torch.cat(found)


def _score(p: Tensor, pairs: Pairs) -> Tensor:
    seen = [(i, j) for i, j in pairs if j < i]
    return torch.stack([p[:, i, j] for i, j in seen]).mean(0)


def _pairs(kind: str, length: int) -> Pairs:
    if kind == "previous-token":
        return [(i, i - 1) for i in range(8, length)]
    if kind == "induction":
        return [(HALF + i, i + 1) for i in range(8, HALF - 1)]
    return [(i, 0) for i in range(FAR, length)]


def _chance(model: Any, kind: str, text: bytes, rng: random.Random) -> Tensor:
    """The score of one shuffled text."""
    if kind == "induction":
        first = list(text[:HALF])
        return _score(_weights(model, bytes(first + rng.sample(first, HALF))), _pairs(kind, 2 * HALF))
    place = rng.sample(range(len(text)), len(text))
    out = bytearray(len(text))
    for i, at in enumerate(place):
        out[at] = text[i]
    p = _weights(model, bytes(out))
    if kind == "sink":
        other = rng.randrange(1, len(text) // 2)
        return _score(p, [(i, other) for i in range(other + FAR, len(text))])
    return _score(p, [(place[i], place[j]) for i, j in _pairs(kind, len(text))])


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's own code computes, by the names it uses."""
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
            exec(code, scope)
    return scope


def _rows() -> dict[str, tuple[int, float, str]]:
    """Of each kind: the best head, its score, and who is named, as the page shows them."""
    row = r"^([\w-]+) +layer (\d) head (\d) +([\d.]+) +[\d.]+ +[\d.]+ +(.*)$"
    return {kind: (4 * int(n) + int(h), float(s), who) for kind, n, h, s, who in re.findall(row, PAGE, re.MULTILINE)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_scores_say(model: Any, page: dict[str, Any], kind: str) -> None:
    text, rng = _text(), random.Random(1)
    shown = text[:HALF] * 2 if kind == "induction" else text
    score = _score(_weights(model, shown), _pairs(kind, len(shown)))
    chance = torch.stack([_chance(model, kind, text, rng) for _ in range(8)])
    named = ((score > chance.mean(0) + 5 * chance.std(0)) & (score >= 0.5)).nonzero().flatten().tolist()

    torch.testing.assert_close(page["scores"][kind], score, rtol=1e-9, atol=1e-12)
    theirs = page["chance"][kind]
    assert theirs.shape == (20, HEADS)
    drift = (theirs.mean(0) - chance.mean(0)).abs()
    assert (drift < 3 * (theirs.std(0) / 20**0.5 + chance.std(0) / 8**0.5) + 1e-6).all(), "the same baseline"
    best, said, who = _rows()[kind]
    assert int(score.argmax()) == best
    assert f"{score[best]:.4f}" == f"{said:.4f}"
    assert who == (", ".join(f"layer {h // 4} head {h % 4}" for h in named) or "none")


def test_what_the_prose_says_of_the_names() -> None:
    rows = _rows()
    assert set(rows) == set(KINDS)
    assert f"**One head is named: {rows['previous-token'][2]} is a previous-token head on this text." in PAGE
    assert "Induction heads: none. Sinks: none.**" in PAGE
    assert [rows[kind][2] for kind in KINDS[1:]] == ["none", "none"]
    assert "SHUFFLES, SPREADS, LEAST, HALF = 20, 5, 0.5, 112" in PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_made_for_a_kind_would_be_found(page: dict[str, Any], kind: str) -> None:
    """So "none" is a finding and not what the page's measure always says."""
    length = 2 * HALF if kind == "induction" else len(page["TEXT"])
    p = torch.full((HEADS, length, length), 1e-3)
    for i, j in _pairs(kind, length):
        p[7, i, j] = 0.9
    pairs = {"previous-token": (page["i"], page["i"] - 1), "induction": (HALF + page["a"], page["a"] + 1)}
    score = page["on"](p, *pairs.get(kind, (page["late"], page["late"] * 0)))
    assert (score >= 0.5).nonzero().flatten().tolist() == [7]
