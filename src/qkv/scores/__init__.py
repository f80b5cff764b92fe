"""Score terms: what `bias=` adds to the scaled (and capped) scores before the mask selects.

    qkv.attention(q, k, v, bias=tensor)                        # (B, Hq, Lq, Lk) or anything that broadcasts to it
    qkv.attention(q, k, v, bias=qkv.alibi(slopes))             # -slope_h * |p - j|
    qkv.attention(q, k, v, bias=qkv.relative(table))           # table[h, clamp(j - p, -R, R) + R]
    qkv.attention(q, k, v, bias=qkv.score_mod(fn))             # s becomes fn(s, b, h, p, j)
    qkv.attention(q, k, v, bias=qkv.alibi(slopes) + tensor)    # terms apply from left to right

A term knows how to compute itself on one tile of the score matrix, and how to add a tile of score gradients to its own.
"""

from __future__ import annotations

from qkv.scores.base import ScoreTerm, Sum, TensorBias, TermSpec, as_bias
from qkv.scores.distance import Alibi, Relative, T5Buckets, alibi, relative
from qkv.scores.function import ScoreMod, score_mod

__all__ = [
    "Alibi",
    "Relative",
    "ScoreMod",
    "ScoreTerm",
    "Sum",
    "T5Buckets",
    "TensorBias",
    "TermSpec",
    "alibi",
    "as_bias",
    "relative",
    "score_mod",
]
