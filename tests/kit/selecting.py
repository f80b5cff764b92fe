"""Block selection from its definition: loops over queries and blocks in float64, with no code of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def score(how: str, q: Array, keys: Array) -> float:
    """What one query (D,) expects of the keys (block, D)."""
    if how == "mean":
        return float(q @ keys.mean(0))
    low, high = keys.min(0), keys.max(0)
    return float(sum(max(x * a, x * b) for x, a, b in zip(q, low, high, strict=True)))


def selected(
    q: Array,
    k: Array,
    seen: Array,
    block: int,
    top_k: int,
    how: str | Callable[[Array, Array], float] = "mean",
    per_group: bool = False,
    queries: int = 1,
) -> Array:
    """Which of the keys that the mask shows, `seen` (B, Hq, Lq, Lk), each query attends to."""
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    group, found = Hq // max(Hkv, 1), np.zeros_like(seen)
    for b in range(B):
        for h in range(Hq):
            heads = range(h // group * group, h // group * group + group) if per_group else [h]
            for i in range(Lq):
                rows = range(i // queries * queries, min(i // queries * queries + queries, Lq))
                kept, scored = [], []
                for c in range(0, Lk, block):
                    sees = [seen[b, g, r, c : c + block] for g in heads for r in rows]
                    if not any(x.any() for x in sees):
                        continue
                    if c + block > Lk or not all(x.all() for x in sees):
                        kept.append(c)
                        continue
                    keys = k[b, h // group, c : c + block]
                    of = how if callable(how) else lambda x, y: score(str(how), x, y)
                    total = sum(of(q[b, g, r], keys) for g in heads for r in rows)
                    scored.append((-total, c))
                kept += [c for _, c in sorted(scored)[: max(top_k - len(kept), 0)]]
                for c in kept:
                    found[b, h, i, c : c + block] = seen[b, h, i, c : c + block]
    return found
