"""Chosen queries in full, number by number, and the tiles that Flash attention would take for them; in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkv.insight.page.packed import packed
from qkv.insight.page.source import Lane, Row, Source

ALL_KEYS = 160  # up to so many keys a query shows them all
MOST_STEPS = 12
SHOWN = 8  # numbers of an output


def chosen(source: Source, lane: Lane, wanted: Sequence[int]) -> list[tuple[int, str]]:
    """Queries to show, and why: those that were asked for, the last, the sharpest, the flattest and the first."""
    if not lane.Lq:
        return []
    entropy = source.series(source.statistics.entropy, lane)
    live = torch.isfinite(source.series(source.statistics.lse, lane)) & ~entropy.isnan()
    live[: lane.Lq // 4] = False  # the first queries of a causal call see few keys, which makes any row sharp
    found: dict[int, list[str]] = {}
    for i in wanted:
        if -lane.Lq <= i < lane.Lq:
            found.setdefault(i % lane.Lq, []).append("asked for")
    found.setdefault(lane.Lq - 1, []).append("last")
    if bool(live.any()):
        found.setdefault(int(entropy.masked_fill(~live, torch.inf).argmin()), []).append("sharpest")
        found.setdefault(int(entropy.masked_fill(~live, -torch.inf).argmax()), []).append("flattest")
    found.setdefault(0, []).append("first")
    return [(i, ", ".join(dict.fromkeys(why))) for i, why in found.items()]


def listed(row: Row, most: int) -> Tensor:
    """The keys to list: all, or those with the largest weights and shares of the output, the ends, and two hidden."""
    Lk = len(row.weight)
    if Lk <= most:
        return torch.arange(Lk, device="cpu")
    both = ((row.weight, most // 2), (row.weight * row.norm, most // 8))
    picks = [torch.topk(torch.nan_to_num(x), min(n, Lk)).indices for x, n in both]
    seen = row.visible.nonzero().flatten()
    hidden = (~row.visible).nonzero().flatten()
    return torch.tensor(
        sorted(set(torch.cat([*picks, seen[:2], seen[-4:], hidden[:2]]).tolist())), dtype=torch.int64, device="cpu"
    )


def row_data(source: Source, row: Row, i: int, why: str, most: int = ALL_KEYS) -> dict[str, Any]:
    """A query as the page shows it: numbers of the listed keys, what the others add up to, and the tiles."""
    keys = listed(row, most)
    bias = (
        torch.where(row.visible, row.score - _capped(source, row.dot * source.trace.scale), 0.0)
        if source.has_bias
        else None
    )
    size = float(row.out.norm())
    effect = leave_one_out(row, keys) / (size or 1.0)
    rest = torch.ones(len(row.weight), dtype=torch.bool, device="cpu")
    rest[keys] = False
    top = float(row.score[row.visible].max()) if bool(row.visible.any()) else float("-inf")
    found: dict[str, Any] = {
        "i": i, "why": why, "top": _number(top), "lse": _number(row.lse), "seen": int(row.visible.sum()),
        "size": _number(size), "out": _numbers(row.out[:SHOWN]),
        "keys": keys, "dot": row.dot[keys], "visible": row.visible[keys], "weight": row.weight[keys],
        "norm": row.norm[keys], "effect": effect,
        "rest": [int(rest.sum()), float(row.weight[rest].sum()), int((rest & row.visible).sum())],
        "tiles": tiles(source, row),
    }  # fmt: skip
    if bias is not None:
        found["bias"] = bias[keys]
    if row.kernel is not None:
        found["kernel"] = _numbers(row.kernel[:SHOWN])
        found["off"] = _number(float((row.kernel.double() - row.out).abs().max()))
    return found


def stored(found: dict[str, Any]) -> dict[str, Any]:
    """A query as JSON: its tensors packed."""
    kinds = {torch.int64: torch.int32, torch.bool: torch.uint8, torch.float64: torch.float32}
    packs = {name: packed(x, kinds[x.dtype]) if isinstance(x, Tensor) else x for name, x in found.items()}
    return {**packs, "tiles": {**found["tiles"], "outs": packed(found["tiles"]["outs"], torch.float32)}}


def leave_one_out(row: Row, keys: Tensor) -> Tensor:
    """How far the output moves when a key is taken away and the weights of the others grow to fill its place."""
    w = row.weight[keys]
    moved = w / (1 - w).clamp(min=1e-12) * (row.out - row.value[keys]).norm(dim=-1)
    return torch.where(1 - w > 1e-9, moved, row.out.norm())  # without its only key a row is 0


def _capped(source: Source, scores: Tensor) -> Tensor:
    cap = source.trace.softcap
    return scores if cap is None else cap * torch.tanh(scores / cap)


def tile_width(Lk: int, most: int = MOST_STEPS) -> int:
    """Keys of a tile: a round number, for at most so many tiles."""
    least = -(-Lk // most)
    for width in (1, 2, 4, 8, 16, 32, 64):
        if width >= least:
            return width
    return -(-least // 64) * 64


def tiles(source: Source, row: Row) -> dict[str, Any]:
    """The online softmax over tiles of keys: the running maximum m, the sum l and the output, after every tile."""
    width = tile_width(len(row.score))
    m, l, o = -torch.inf, 0.0, torch.zeros_like(row.out)
    if source.has_sinks:  # a learned sink is in the sum from the start, with a value of 0
        left = 1 - float(row.weight.sum())
        if left > 1e-12:
            m, l = row.lse + math.log(left), 1.0
    highest, sums, products = _apart(row, width)
    steps: list[list[float | None]] = []
    outs: list[Tensor] = []
    for top, part, product in zip(highest.tolist(), sums.tolist(), products, strict=True):
        new = max(m, top)
        if new == -torch.inf:
            steps.append([None, None, 1.0, 0.0])
        else:
            old, mine = math.exp(m - new), math.exp(top - new)
            l, o, m = l * old + part * mine, o * old + product * mine, new
            steps.append([_number(top), _number(m), old, l])
        outs.append(o / l if l else o)
    many = torch.stack(outs) if outs else torch.zeros(0, len(row.out), dtype=torch.float64, device="cpu")
    return {"width": width, "steps": steps, "outs": many[:, :SHOWN]}


def _apart(row: Row, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every tile alone: its largest score, the sum of exp(score - that), and the values added up by these."""
    count = -(-len(row.score) // width)
    score = torch.nn.functional.pad(row.score, (0, count * width - len(row.score)), value=-torch.inf).view(count, width)
    highest = score.amax(-1) if score.numel() else score.new_zeros(0)
    e = (score - highest.masked_fill(highest == -torch.inf, 0.0)[:, None]).exp()
    value = row.value if bool(row.norm.isfinite().all()) else torch.nan_to_num(row.value)
    parts = value.split(width) if len(value) else ()
    products = [e[n, : len(part)] @ part for n, part in enumerate(parts)]
    return highest, e.sum(-1), torch.stack(products) if products else value.new_zeros(0, value.shape[-1])


def _number(x: float) -> float | None:
    """JSON has no NaN and no infinity: -inf and NaN are null."""
    return x if x == x and abs(x) != torch.inf else None


def _numbers(x: Tensor) -> list[float | None]:
    return [_number(float(n)) for n in x]
