"""Whether a large weight is an explanation: what it carries, and how else the same output can be had."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.errors import ArgumentError
from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

TOKENS, VALUE, TOP = 1024, 64, 5
SINK, LEAD = 256, 2.0  # keys of the row whose first is a sink, and how far its score is above theirs
MOST = 2048  # keys of the caller's row for which other weights are sought
QUESTION = "Is a large weight an explanation?"
SOURCES = (
    "Jain, Wallace 2019, arxiv.org/abs/1902.10186; Wiegreffe, Pinter 2019, arxiv.org/abs/1908.04626",
    "Kobayashi et al. 2020 (norms), arxiv.org/abs/2004.10102; Brunner et al. 2020, arxiv.org/abs/1908.04211",
)


def run(seed: int) -> Answer:
    """A sink with a small value, and other weights for the same output of 1,024 tokens."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, TOKENS, VALUE, generator=rng, dtype=torch.float64)
    v = torch.randn(TOKENS, VALUE, generator=rng, dtype=torch.float64)
    p = weights(q, k, rows=[-1])[0, 0, 0]
    asks, keys = q[0, 0, 0], k[0, 0, :SINK].clone()
    keys[0] = asks * (math.log(SINK) + LEAD) * VALUE**0.5 / asks.square().sum()  # LEAD above the log of all the others
    staring = weights(asks[None, None, None], keys[None, None])[0, 0, 0]
    sunk = v[:SINK].clone()
    sunk[0] *= 0.02  # and its value is small, as that of a sink is
    return _answer(staring, sunk, p, v, "")


def on(given: Given) -> Answer:
    """The last of the caller's rows that is looked at, in the first head (or the one that was chosen)."""
    head = given.heads[0]
    p, v = given.weights(head)[-1], given.values(head)
    if not bool(torch.isfinite(p).all() and torch.isfinite(v).all()):
        rule, fix = (
            "weights and values must be finite to be explained",
            'Ask qkv.why("dead-rows", ...) which rows are NaN',
        )
        raise ArgumentError.of("qkv.why()", rule, f"NaN or infinity in row {int(given.rows[-1])} of head {head}", fix)
    seen = p > 0
    p, v = p[seen][:MOST], v[seen][:MOST]
    p = p / p.sum().clamp_min(1e-300)
    where = f"Row {int(given.rows[-1])} of head {head}"
    where += f", its first {MOST:,} visible keys. " if int(seen.sum()) > MOST else ". "
    if not len(p):
        p, v = torch.ones(1, dtype=torch.float64), torch.zeros(1, v.shape[1], dtype=torch.float64)
        where += "It sees no key, so nothing is explained by it. "
    return _answer(p, v, p, v, where)


def _answer(staring: Tensor, sunk: Tensor, p: Tensor, v: Tensor, where: str) -> Answer:
    best = int(staring.argmax())
    carried = staring * sunk.norm(dim=-1)
    share = (carried[best] / carried.sum().clamp_min(1e-300)).item()
    other = elsewhere(p, v)
    distance = ((p - other).abs().sum() / 2).item()
    top = min(TOP, len(p))
    overlap = len(set(p.topk(top).indices.tolist()) & set(other.topk(top).indices.tolist()))
    apart = ((p - other) @ v).norm().item() / max((p @ v).norm().item(), 1e-300)
    used, held = int((p > 0).sum()), int((other > 0).sum())
    numbers: dict[str, Measured] = {
        "largest weight": staring[best].item(),
        "its share of weight × |v|": share,
        "tokens with weight, as computed": used,
        "tokens with weight, other weights": held,
        "numbers in a value": v.shape[1],
        "total variation of the two": distance,
        f"of the {TOP} largest, in common": overlap,
        "smallest of the other weights": other.min().item(),
        "the other weights sum to": other.sum().item(),
        "out differs (relative) by": apart,
    }
    bars = {"its weight": staring[best].item(), "its share of weight × |v|": share}
    lines = [f"the key with the largest weight{', a sink' if not where else ''}"]
    lines += [f"  {name:<32} {bar(x, 30)} {number(x)}" for name, x in bars.items()]
    lines += [f"two sets of weights with one output, |v| = {v.shape[1]} numbers"]
    for name, x in (("tokens with weight, as computed", used), ("tokens with weight, other weights", held)):
        lines.append(f"  {name:<34} {bar(x, 28, max(used, 1))} {number(x)}")
    lines.append(f"  total variation {number(distance)}, out differs by {number(apart)} (relative)")
    many = held < used
    verdict = prose(f"""
        {where}(a) A weight times a small value is little: the key with weight {number(staring[best].item())} brings
        {share:.1%} of the sum of weight × |v|. (b) Weights are not the only ones: in {v.shape[1]} dimensions any mean
        is a mean of at most {v.shape[1] + 1} of its points (Carathéodory).
        {_other(many, used, held, distance, overlap, apart)}
        So a weight says what this computation mixed, which is a fact; that the tokens it leaves out do not matter is
        not. (c) Not so fast: those other weights are not what this q and k would give, and training may tie weights to
        causes. Remove a token and see the output move: that is a test.
        """)
    short = f"Not by itself: weight {number(staring[best].item())} brings {share:.1%}; other weights give the same out."
    if not many:
        short = f"{used} visible tokens, {v.shape[1]} numbers in a value: no other weights give this out."
    elif share > 0.5 * staring[best].item():
        short = f"Not by itself: other weights, {number(distance)} away, give the same output."
    return Answer("explanation", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _other(many: bool, used: int, held: int, distance: float, overlap: int, apart: float) -> str:
    if many:
        return f"""
            {number(used)} tokens become {held}, total variation {number(distance)}, {overlap} of the {TOP} largest in
            common, and out is the same to {number(apart)}."""
    return f"""
        With {number(used)} tokens there is no such freedom: their values determine the weights (total variation
        {number(distance)})."""


def elsewhere(p: Tensor, v: Tensor) -> Tensor:
    """Weights with the same sum and the same mean of v on at most Dv + 1 tokens, where p is small; none below 0.

    Of more points than Dv + 1 some combination is 0, and moving along it changes nothing until a weight reaches 0. The
    tokens with a weight are gone through once; a basis of Dv + 1 of them takes up what the others give away. Then
    tokens are exchanged as long as that lowers the sum of p times the new weights (the simplex method).
    """
    points = torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], 1)  # the last column keeps the sum
    used = (p > 0).nonzero().flatten()
    left, sizes, _ = torch.linalg.svd(points[used], full_matrices=False)
    rank = int((sizes > 1e-10 * sizes[0]).sum())
    if len(used) <= rank:
        return p.clone()
    points = torch.zeros(len(v), rank, dtype=v.dtype).index_copy(0, used, left[:, :rank])  # the same, in fewer numbers
    first = used[_independent(left[:, :rank])]
    basis = _Basis(first, torch.linalg.inv(points[first].T), p[first].clone())
    for j in sorted(set(used.tolist()) - set(first.tolist())):
        basis.give(j, points[j], p[j].item())
    for _ in range(_EXCHANGES):
        prices = p[basis.tokens] @ basis.inverse
        gain = (p - points @ prices).masked_fill(p == 0, 0.0)
        gain[basis.tokens] = 0.0
        j = int(gain.argmin())
        if gain[j] > -1e-9:
            break
        basis.give(j, points[j], math.inf)
    found = torch.zeros_like(p)
    exact = torch.linalg.solve(points[basis.tokens].T, points.T @ p)  # free of the rounding that steps gather
    found[basis.tokens] = exact if bool((exact >= 0).all()) else basis.held.clamp_min(0)
    return found


def _independent(points: Tensor) -> Tensor:
    """As many rows as there are columns, that have an inverse: those that elimination pivots on."""
    order = torch.arange(len(points))
    for i, pivot in enumerate(torch.linalg.lu_factor(points)[1].tolist()):
        order[[i, pivot - 1]] = order[[pivot - 1, i]]
    return order[: points.shape[1]]


_EXCHANGES = 400  # rarely more than 200 are found


@dataclass
class _Basis:
    """Dv + 1 tokens, the inverse of their points as columns, and their weights."""

    tokens: Tensor
    inverse: Tensor
    held: Tensor

    def give(self, j: int, point: Tensor, weight: float) -> None:
        """Take up to `weight` of token j's up; where one of the basis runs dry first, j takes its place.

        An infinite weight asks for as much of j as there can be, so it is j that takes.
        """
        along = self.inverse @ point  # what the basis takes up for each unit that token j gives away
        taking = math.isinf(weight)
        room = torch.where((along > 0) if taking else (along < 0), self.held / along.abs().clamp_min(1e-300), torch.inf)
        free, at = (x.item() for x in room.min(0))
        if free >= weight:
            self.held = self.held + weight * along
            return
        self.held = self.held + (-free if taking else free) * along
        self.held[int(at)] = free if taking else weight - free
        self.tokens[int(at)] = j
        row = self.inverse[int(at)] / along[int(at)]
        self.inverse = self.inverse - along[:, None] * row
        self.inverse[int(at)] = row
