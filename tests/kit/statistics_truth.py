"""What the weights of a call come to, from the oracle's rows; and how far a backend may be from it.

A score may be off by e_i = 8 eps (4 + S_i), eps of the accumulation type and S_i the row's sum of magnitudes as in the
error rule of `tests.kit.judge`: a weight is then off by a factor of exp(2 e_i), an entropy H by 2 e_i (1 + H).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.call.statistics import Statistics, Wanted
from tests.kit import oracle
from tests.kit.judge import eps_acc

Array = NDArray[Any]


@dataclass
class Truth:
    """Statistics of all rows in the oracle's precision. p[b, h, i]: the weights of the keys that the row sees."""

    call: oracle.Call
    lse: Array
    score: Array
    weight: Array
    entropy: Array
    distance: Array
    error: Array  # e_i, but for eps
    p: dict[tuple[int, int, int], tuple[Array, Array, Array]] = field(default_factory=dict)  # keys, scores, weights

    @classmethod
    def of(cls, call: oracle.Call) -> Truth:
        B, Hq, Lq, _ = call.geo
        found = cls(call, *(np.zeros((B, Hq, Lq)) for _ in range(6)))
        result = oracle.attention(call)
        found.lse, found.error = result.lse, 8 * (4 + result.spread)
        group = max(1, Hq // max(1, call.k.shape[1]))
        sizes = abs(call.k), abs(call.v)
        with np.errstate(all="ignore"):
            for at in np.ndindex(B, Hq, Lq):
                found._row(at, oracle._forward_row(call, result, *at, at[1] // group, sizes))
        return found

    def _row(self, at: Any, row: Any) -> None:
        j, lse = self.call.keys(*at), self.lse[at]
        p = row.p
        sink = row.sink if self.call.sinks is not None else 0.0
        s = (row.k @ self.call.q[at]) * self.call.scale
        if self.call.softcap is not None:
            s = self.call.softcap * np.tanh(s / self.call.softcap)
        for term in row.terms:
            s = s * term.gain + term.add
        self.p[at] = j, s, p
        self.score[at], self.weight[at] = s.max(initial=-np.inf), p.max(initial=0)
        every = np.append(p, sink)
        self.entropy[at] = -(every * np.log(every, where=every > 0, out=np.zeros_like(every))).sum()
        away = abs(self.call.positions[at[0], at[2]] - j)
        self.distance[at] = (p * away).sum() / p.sum() if p.sum() != 0 else 0
        if np.isnan(lse):
            for x in (self.score, self.weight, self.entropy, self.distance):
                x[at] = np.nan

    def mass(self) -> tuple[Array, Array]:
        """sum_i p_ij of all keys, and the same of p_ij e_i."""
        B, Hq, _, Lk = self.call.geo
        total, error = np.zeros((B, Hq, Lk)), np.zeros((B, Hq, Lk))
        for (b, h, i), (j, _, p) in self.p.items():
            if not np.isnan(self.lse[b, h, i]):
                total[b, h, j] += p
                error[b, h, j] += p * self.error[b, h, i]
        return total, error

    def map(self, rows: int, columns: int) -> tuple[Array, Array]:
        B, Hq, Lq, Lk = self.call.geo
        total, error = np.zeros((B, Hq, rows, columns)), np.zeros((B, Hq, rows, columns))
        for (b, h, i), (j, _, p) in self.p.items():
            if not np.isnan(self.lse[b, h, i]):
                np.add.at(total[b, h, i * rows // Lq], j * columns // Lk, p)
                np.add.at(error[b, h, i * rows // Lq], j * columns // Lk, p * self.error[b, h, i])
        return total, error


def faults(truth: Truth, found: Statistics, wanted: Wanted, dtype: torch.dtype, slack: float = 1) -> list[str]:
    """What is further from the truth than the bound allows, by name."""
    eps = slack * eps_acc(dtype)
    e = truth.error * eps
    tiny = 1e-30 if dtype != torch.float64 else 1e-200  # weights below may be flushed to 0
    wrong = []

    def check(name: str, got: torch.Tensor | None, want: Array, bound: Array) -> None:
        assert got is not None, name
        have = got.double().cpu().numpy()
        with np.errstate(all="ignore"):
            same = (have == want) | (np.isnan(have) & np.isnan(want)) | (abs(have - want) <= bound)
        if have.shape != want.shape:
            wrong.append(f"{name}: shape {have.shape} instead of {want.shape}")
        elif not same.all():
            at = tuple(int(x[0]) for x in np.nonzero(~same))
            wrong.append(f"{name} at {at}: {have[at]!r} instead of {want[at]!r}, allowed {bound[at]:.3g}")

    with np.errstate(all="ignore"):
        finite = np.where(np.isfinite(truth.score), abs(truth.score), 0)
        check("lse", found.lse, truth.lse, e + 4 * eps * abs(truth.lse))
        check("score", found.score, truth.score, e + 4 * eps * finite)
        # A score that is off by e at both ends: the row's own and its largest.
        check("weight", found.weight, truth.weight, truth.weight * np.expm1(np.minimum(2 * e, 50)) + tiny)
        check("entropy", found.entropy, truth.entropy, np.expm1(np.minimum(2 * e, 50)) * (1 + truth.entropy))
        if wanted.distance:
            check(
                "distance", found.distance, truth.distance, truth.distance * np.expm1(np.minimum(4 * e, 50)) + 64 * eps
            )
    if wanted.mass:
        total, error = truth.mass()
        check("mass", found.mass, total, 2 * eps * error * np.exp(np.minimum(2 * e.max(initial=0), 50)) + tiny)
    if wanted.bins is not None:
        total, error = truth.map(*wanted.bins)
        check("map", found.map, total, 2 * eps * error * np.exp(np.minimum(2 * e.max(initial=0), 50)) + tiny)
    if wanted.top:
        wrong += _wrong_keys(truth, found, wanted.top, e, eps, tiny)
    return wrong


def _wrong_keys(truth: Truth, found: Statistics, top: int, e: Array, eps: float, tiny: float) -> list[str]:
    """Keys of the largest scores: each is one of the row's own, once, and no key left out has a larger score."""
    assert found.top_keys is not None
    assert found.top_weights is not None
    keys, weights = found.top_keys.cpu().numpy(), found.top_weights.double().cpu().numpy()
    for at, (j, s, p) in truth.p.items():
        got, mine = keys[at], weights[at]
        if np.isnan(truth.lse[at]):
            if not (got == -1).all() or not np.isnan(mine).all():
                return [f"top at {at}: keys {got}, weights {mine} of a row that is NaN"]
            continue
        alive = int((s > -np.inf).sum())
        n = min(top, alive)
        order = {int(key): place for place, key in enumerate(j)}
        some = got[got >= 0]
        # Weights below the smallest number of the accumulation type are 0: their keys may be missing or in any order.
        if len(set(some)) != len(some) or any(int(x) not in order for x in some) or (got[len(some) :] != -1).any():
            return [f"top at {at}: {got}, and the row sees {j[:20]}"]
        where = [order[int(x)] for x in some]
        off = 2 * e[at] + 8 * eps * abs(s[np.isfinite(s)]).max(initial=0)
        best = np.sort(s)[::-1][:n]
        if len(some) != n:
            return [f"top at {at}: {len(some)} keys of {n}"]
        if (abs(s[where] - best) > off).any():
            return [f"top at {at}: scores {s[where]}, and the largest are {best}"]
        equal = np.nonzero(s[where][1:] == s[where][:-1])[0]
        exact = truth.call.exact
        if exact and any(some[x] > some[x + 1] for x in equal):
            return [f"top at {at}: {some}: of equal scores the lower key goes first"]
        if (abs(mine[:n] - p[where]) > p[where] * np.expm1(min(2 * e[at], 50)) + tiny).any():
            return [f"top at {at}: weights {mine[:n]} instead of {p[where]}"]
        if (mine[n:] != 0).any():
            return [f"top at {at}: weights {mine[n:]} past the visible keys"]
    return []
