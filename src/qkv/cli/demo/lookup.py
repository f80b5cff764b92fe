"""One question looked up in a text, three ways: as a dictionary would, by attention, and not at all."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.cli.demo.features import Features
from qkv.cli.demo.passages import SENTENCE_END, Passage, Text
from qkv.cli.demo.words import count, spellings
from qkv.functional import attention
from qkv.probabilities import weights


@dataclass(frozen=True)
class Way:
    """One way to look the question up: what came back, and from how many passages."""

    name: str
    how: str
    largest: float  # the largest weight
    passages: float  # e to the entropy of the weights: from how many passages the answer is blended
    words: tuple[str, ...]  # the words nearest to what came back


@dataclass(frozen=True)
class Hit:
    """A passage that was found, its weight, and the part of it to quote."""

    weight: float
    passage: Passage
    quote: str


@dataclass(frozen=True)
class Found:
    """Everything about one question."""

    question: str
    known: bool  # whether any word of the question occurs in the text
    q: Tensor  # (1, 1, 1, D)
    weights: Tensor  # (1, 1, 1, Lk)
    out: Tensor  # (1, 1, 1, Dv)
    hits: tuple[Hit, ...]
    ways: tuple[Way, ...]
    words: frozenset[str]  # the stems that were looked for
    features: Features


class Lookup:
    """A text made ready for questions."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.features = Features(text.passages)
        self.forms = spellings(text.passages)

    def ask(self, question: str, shown: int = 5) -> Found:
        """Look a question up, and keep the `shown` passages with the largest weights."""
        features = self.features
        q, k, v = features.query(question), features.k, features.v
        p = weights(q, k)  # (1, 1, 1, Lk)
        out = attention(q, k, v)  # (1, 1, 1, Dv)
        top = p[0, 0, 0].topk(min(shown, k.shape[2]))
        stems = frozenset(feature for feature in count(question) if not feature.startswith("~"))
        hits = tuple(
            Hit(weight, self.text.passages[index], self._quote(self.text.passages[index], stems))
            for weight, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        best = int(top.indices[0])
        hard = torch.zeros_like(p).index_fill_(3, top.indices[:1], 1.0)
        ways = (
            self._way("hard", "a dictionary", hard, v[:, :, best : best + 1]),
            self._way("soft", "attention", p, out),
            self._way("mean", "scale = 0", weights(q, k, scale=0.0), attention(q, k, v, scale=0.0)),
        )
        return Found(question, bool(q.any()), q, p, out, hits, ways, stems, features)

    def telling_question(self) -> str:
        """Ask about the words that tell most about the text: often used, and in a few places."""
        total = len(self.text.passages)
        used: dict[str, float] = defaultdict(float)
        for passage in self.text.passages:
            for feature, n in count(passage.text).items():
                if feature[0] != "~" and len(feature) > 3 and feature.isalpha():
                    used[feature] += n
        scored = {f: n * math.log(1 + total / self.features.occurs[f]) for f, n in used.items()}
        best = sorted(scored, key=lambda feature: (-scored[feature], feature))[:2]
        told = " and ".join(self.forms.get(feature, feature) for feature in best)
        return f"What does it say about {told}?" if told else "What does it say?"

    def _way(self, name: str, how: str, p: Tensor, out: Tensor) -> Way:
        entropy = torch.special.entr(p.double()).sum().item()
        words = tuple(self.features.words(out, self.forms))
        return Way(name, how, p.max().item(), math.exp(entropy), words)

    def _quote(self, passage: Passage, stems: frozenset[str]) -> str:
        """Return the passage from the sentence on that has most of the question's words, rare ones counting more."""
        sentences = [" ".join(piece.split()) for piece in SENTENCE_END.split(passage.text)]
        told = [sum(self.features.weight(f) for f in stems.intersection(count(s))) for s in sentences]
        return " ".join(sentences[told.index(max(told)) :])
