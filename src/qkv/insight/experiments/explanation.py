"""Whether a large weight is an explanation: what it carries, and how else the same output can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.insight.answer import Answer, Measured, prose
from qkv.insight.given import Given
from qkv.insight.terminal import bar, number
from qkv.probabilities import weights

TOKENS, VALUE, TOP = 1024, 64, 5
SINK = 256  # keys of the row whose first is a sink
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
    short_q, short_k = q[:, :, :1], k[:, :, :SINK].clone()
    short_k[0, 0, 0] = 7 * short_q[0, 0, 0] / short_q[0, 0, 0].norm()  # every query's best key, as a sink is
    staring = weights(short_q, short_k)[0, 0, 0]
    sunk = v[:SINK].clone()
    sunk[0] *= 0.02  # and its value is small, as that of a sink is
    return _answer(staring, sunk, p, v, "")


def on(given: Given) -> Answer:
    """The last of the caller's rows that is looked at, in the first head (or the one that was chosen)."""
    head = given.heads[0]
    p, v = given.weights(head)[-1], given.values(head)
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
    many = used > v.shape[1] + 1
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
        short = f"With {used} visible tokens and {v.shape[1]}-number values these weights may be the only ones."
    elif share > 0.5 * staring[best].item():
        short = f"Not by itself: other weights, {number(distance)} away, give the same output."
    return Answer("explanation", QUESTION, numbers, "\n".join(lines), verdict, SOURCES, short=short)


def _other(many: bool, used: int, held: int, distance: float, overlap: int, apart: float) -> str:
    if many:
        return f"""
            {number(used)} tokens become {held}, total variation {number(distance)}, {overlap} of the {TOP} largest in
            common, and out is the same to {number(apart)}."""
    return f"""
        With only {number(used)} tokens there is no such freedom (values in general position determine the weights), and
        none was found: total variation {number(distance)}."""


def elsewhere(p: Tensor, v: Tensor) -> Tensor:
    """Weights with the same sum and the same mean of v on at most Dv + 1 tokens, none below 0.

    Of more points than Dv + 1 some combination is 0, and moving along it changes nothing until a weight reaches 0. The
    tokens with a weight are gone through once; a basis of Dv + 1 of them takes up what the others give away.
    """
    size = v.shape[1] + 1
    points = torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], 1)  # the last row keeps the sum
    order = p.argsort(descending=True, stable=True)  # the small come last, and so stay: far from where it started
    order = order[p[order] > 0]
    if len(order) <= size or torch.linalg.matrix_rank(points[order[:size]]) < size:
        return p.clone()
    basis, inverse = order[:size].clone(), torch.linalg.inv(points[order[:size]].T)
    held = p[basis].clone()
    for j in order[size:].tolist():
        along = inverse @ points[j]  # what the basis has to take up for each unit that token j gives away
        falls = along < 0
        room = torch.where(falls, held / (-along).clamp_min(1e-300), torch.inf)
        free, at = room.min(0)
        give = p[j].item()
        if free.item() >= give:
            held = held + give * along
            continue
        # the basis runs dry at `at` first: token j takes its place, with what it still has
        held = held + free * along
        held[at] = give - free.item()
        basis[at] = j
        pivot = along[at].item()
        row = inverse[at] / pivot
        inverse = inverse - along[:, None] * row
        inverse[at] = row
    found = torch.zeros_like(p)
    exact = torch.linalg.solve(points[basis].T, points.T @ p)  # free of what rounding the steps have gathered
    found[basis] = exact if bool((exact >= 0).all()) else held.clamp_min(0)
    return found
