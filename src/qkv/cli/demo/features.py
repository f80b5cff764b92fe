"""From passages to q, k and v by counting words: nothing here is trained, and nothing here knows the text's meaning.

    x    (…, F)  how often each feature occurs; a feature is a word's stem, or a piece of four letters of a word
    k    = damped(x) W_K        W_K = diag(rarity) R          R (F, D) seeded random, its rows of length about 1
    q    = x / |x| W_Q          W_Q = sharpness √D diag(rarity) R
    v    = damped(x) / |x| W_V  W_V = diag(rarity) R_v

R Rᵀ is close to the identity (Johnson and Lindenstrauss), so q·k/√D is close to a sum over the words that the question
and the passage share, rare words counting more: the BM25 score of a search engine.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn.functional import embedding_bag

from qkv.cli.demo.passages import Passage
from qkv.cli.demo.words import Counts, count

WIDTH, VALUE_WIDTH = 1024, 512  # D and Dv: the wider, the closer to exact word matching
ROWS = 2**15  # features with a row of W of their own; a text with more shares rows, by hash
SHARPNESS = 1.5
DAMPING, LENGTH = 1.2, 0.4  # BM25's k1 and b: a word's tenth occurrence adds little, a long passage is not favoured
RARITY = 0.75  # power of the inverse document frequency on each side
HEADING = 0.5  # what a word of the heading counts


class Features:
    """The features of a text, its W_Q, W_K, W_V, and k and v of its passages.

    Parameters
    ----------
    passages : sequence of Passage
        What will be looked up: Lk of them.
    seed : int
        Seed of R and R_v; torch's global generator is not used.
    """

    def __init__(self, passages: Sequence[Passage], seed: int = 0) -> None:
        counts = [count(passage.text) for passage in passages]
        for found, passage in zip(counts, passages, strict=True):
            for feature, n in count(passage.heading).items():
                found[feature] += HEADING * n
        self.occurs = Counter(feature for found in counts for feature in found)
        own = [feature for feature, _ in self.occurs.most_common(ROWS)]
        self.row = {feature: index for index, feature in enumerate(own)}
        self.shared = len(self.occurs) > ROWS
        self.size = len(own)
        total = len(passages)
        rarity = torch.tensor([math.log(1 + (total - n + 0.5) / (n + 0.5)) for n in (self.occurs[f] for f in own)])
        self.rarity = rarity.pow(RARITY)[:, None]  # (F, 1)

        direction = _directions(own, WIDTH + VALUE_WIDTH, seed)  # (F, D + Dv), entries of variance 1
        self.w_k = self.rarity * direction[:, :WIDTH] / WIDTH**0.5
        self.w_q = self.w_k * (SHARPNESS * WIDTH**0.5)
        self.w_v = self.rarity * direction[:, WIDTH:] / VALUE_WIDTH**0.5

        mean = sum(sum(found.values()) for found in counts) / total
        damped = [_damp(found, mean) for found in counts]
        self.k = self._project(damped, self.w_k)[None, None]  # (1, 1, Lk, D)
        self.v = self._project([self._unit(found) for found in damped], self.w_v)[None, None]  # (1, 1, Lk, Dv)

    def query(self, question: str) -> torch.Tensor:
        """Return q (1, 1, 1, D) of a question; all zeros if none of its words occurs in the text."""
        known = {feature: n for feature, n in count(question).items() if feature in self.occurs}
        return self._project([self._unit(known)], self.w_q)[None, None]

    def words(self, out: torch.Tensor, forms: dict[str, str], number: int = 5) -> list[str]:
        """Return the words whose rows of W_V are nearest to an out (…, Dv), in the text's own spelling."""
        stems = [feature for feature in self.row if not feature.startswith("~") and len(feature) > 2]
        rows = self.w_v[[self.row[s] for s in stems]] / self.rarity[[self.row[s] for s in stems]]
        nearest = (rows @ out.flatten().to(rows.dtype)).topk(min(number, len(stems))).indices.tolist()
        return [forms.get(stems[index], stems[index]) for index in nearest]

    def weight(self, feature: str) -> float:
        """Return how much a shared feature adds to a score, before the length of the question is divided out."""
        return self.rarity[self.row[feature]].item() ** 2 if feature in self.row else 0.0

    def _unit(self, found: Counts) -> Counts:
        length = math.sqrt(sum((n * self.rarity[self._index(f)].item()) ** 2 for f, n in found.items()))
        return {feature: n / length for feature, n in found.items()} if length else found

    def _index(self, feature: str) -> int:
        index = self.row.get(feature)
        return zlib.crc32(feature.encode()) % self.size if index is None else index

    def _project(self, found: Sequence[Counts], matrix: torch.Tensor) -> torch.Tensor:
        """Return x @ matrix for rows x that are mostly zeros."""
        starts = [0]
        for row in found:
            starts.append(starts[-1] + len(row))
        indices = torch.tensor([self._index(feature) for row in found for feature in row], dtype=torch.int64)
        amounts = torch.tensor([n for row in found for n in row.values()], dtype=torch.float32)
        return embedding_bag(
            indices, matrix, torch.tensor(starts[:-1]), mode="sum", per_sample_weights=amounts.to(matrix.dtype)
        )


def _directions(features: Sequence[str], width: int, seed: int) -> torch.Tensor:
    """Return a random row for each feature, which depends on the feature and the seed only, not on the text."""
    rows = torch.empty(len(features), width)
    rng = torch.Generator()
    for row, feature in zip(rows, features, strict=True):
        row.normal_(generator=rng.manual_seed(zlib.crc32(f"{seed} {feature}".encode())))
    return rows


def _damp(found: Counts, mean: float) -> Counts:
    """Let repeated words count less and long passages not count more (BM25's saturation)."""
    bend = DAMPING * (1 - LENGTH + LENGTH * sum(found.values()) / mean) if mean else DAMPING
    return {feature: n * (DAMPING + 1) / (n + bend) for feature, n in found.items()}
