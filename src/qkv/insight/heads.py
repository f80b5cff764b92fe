"""The heads of a trace at a glance, what looks wrong with them, and the call in a sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qkv.insight.record import Head, Record
from qkv.insight.terminal import number

SHARP = 0.99
"""A row whose largest weight exceeds this looks at one key."""
FLAT = 0.98
"""A head whose entropy exceeds this part of the logarithm of the visible keys looks at all of them alike."""
SINK = 0.3
"""A key that takes more of the mass than this is a sink (Gu et al., 2024, use 0.3)."""
_TWIN = 0.9999  # cosine of two pooled maps from which heads count as the same
_TWIN_NATS = 1e-3


R = TypeVar("R", bound=Record)


def completed(trace: R) -> R:
    """The record with its heads at a glance, its warnings, and the call in a sentence."""
    trace = replace(trace, table=tuple(heads_of(trace, b) for b in range(trace.shapes.B)))
    return replace(trace, warnings=warnings_of(trace), verdict=verdict_of(trace))


def heads_of(trace: Record, b: int) -> tuple[Head, ...]:
    """The heads of batch row b."""
    s, Lq = trace.statistics, trace.lengths[b][0]
    twins = _twins(trace, b)
    found = []
    for place, head in enumerate(trace.heads):
        entropy, score = s.entropy[b, place, :Lq].double().cpu(), s.score[b, place, :Lq].double().cpu()
        weight, lse = s.weight[b, place, :Lq].double().cpu(), s.lse[b, place, :Lq].double().cpu()
        bad = lse.isnan() | score.isnan()
        live = ~bad & (score > -torch.inf)
        mass = None if s.mass is None else s.mass[b, place].cpu()
        total = float(mass.sum()) if mass is not None else 0.0
        away = None if s.distance is None else s.distance[b, place, :Lq].double().cpu()
        sink = 0.0
        if trace.sinks is not None and bool((~bad).any()):
            sink = float((trace.sinks[place].double().cpu() - lse[~bad]).exp().nan_to_num(0.0).mean())
        found.append(
            Head(
                head,
                trace.group_of(head),
                _mean(entropy[live]),
                _mean(entropy[live].exp()),
                _mean(weight[live]),
                float(score[live].max()) if bool(live.any()) else -math.inf,
                math.nan if mass is None else float(mass[0]) / total if total > 0 and len(mass) else 0.0,
                sink,
                math.nan if away is None else _mean(away[live]),
                _mean((weight[live] > SHARP).double()),
                _flatness(trace, b, place),
                int((~bad & ~live).sum()),
                int(bad.sum()),
                twins.get(head),
            )
        )
    return tuple(found)


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else math.nan


def _flatness(trace: Record, b: int, place: int) -> float:
    rows = trace.sampled[trace.sampled < trace.lengths[b][0]]
    if not len(rows):
        return math.nan
    visible = trace.visible[b, place, : len(rows)].double()
    entropy = trace.statistics.entropy[b, place].cpu()[rows].double()
    several = (visible > 1) & ~entropy.isnan()
    return _mean((entropy / visible.log())[several])


def _twins(trace: Record, b: int) -> dict[int, int]:
    """Of each head the first one that does the same: by the cosine of their pooled maps, and their rows' entropies."""
    pooled = trace.statistics.map
    if pooled is None or len(trace.heads) < 2 or not pooled.numel():
        return {}
    flat = torch.nn.functional.normalize(pooled[b].flatten(1).float(), dim=1)
    entropy = trace.statistics.entropy[b, :, : trace.lengths[b][0]].double()
    alike = (flat @ flat.mT > _TWIN).tolist()
    twins: dict[int, int] = {}
    for x, head in enumerate(trace.heads):
        for y in range(x):
            apart = (
                (entropy[x] - entropy[y]).abs().nanmean()
                if entropy.shape[1]
                else torch.zeros((), dtype=torch.float64, device="cpu")
            )
            if alike[x][y] and trace.heads[y] not in twins and float(apart) <= _TWIN_NATS:
                twins[head] = trace.heads[y]
                break
    return twins


def warnings_of(trace: Record) -> tuple[str, ...]:
    """What looks wrong in any batch row, in plain words, and what to do about it."""
    found = []
    for b, heads in enumerate(trace.table):
        where = f"batch row {b}: " if trace.shapes.B > 1 else ""
        bad = [h for h in heads if h.bad]
        if bad:
            first = trace.statistics.lse[b, trace.heads.index(bad[0].head)].isnan().nonzero()
            found.append(
                f"{where}{_heads(bad)} {'has' if len(bad) == 1 else 'have'} rows that are NaN, the first of head "
                f"{bad[0].head} is row {int(first[0]) if len(first) else 0}: look for NaN or inf in q, k or the bias"
            )
        dead = [h for h in heads if h.dead]
        if dead:
            found.append(
                f"{where}{dead[0].dead:,} rows of {_heads(dead)} see no key: their output is 0. If they are not "
                "padding, check the mask and positions="
            )
        for told, some, fix in (
            (
                ("looks at one key in more than 95 % of rows", "look at one key in more than 95 % of rows"),
                [h for h in heads if h.sharp > 0.95],
                "is the scale missing, or applied twice? Sharp heads learn little: their gradients are near 0",
            ),
            (
                ("looks at every key alike", "look at every key alike"),
                [h for h in heads if h.flat > FLAT],
                "a head that chooses nothing averages; at initialisation this is usual, after training it is not",
            ),
            (
                (
                    f"sends more than {SINK:.0%} of its mass to key 0",
                    f"send more than {SINK:.0%} of their mass to key 0",
                ),
                [h for h in heads if h.first > SINK and trace.lengths[b][1] > 8],
                "a sink: it has to be somewhere when nothing fits. Look at weight x |v|, which is usually small there",
            ),
            (
                ("does what an earlier head does", "do what an earlier head does"),
                [h for h in heads if h.twin is not None],
                "duplicates: copied weights, or heads that were shared by mistake",
            ),
        ):
            if some:
                found.append(f"{where}{_heads(some)} {told[len(some) > 1]}: {fix}")
    return tuple(found)


def _heads(some: list[Head]) -> str:
    names = [str(h.head) for h in some]
    if len(names) == 1:
        return f"head {names[0]}"
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"heads {shown}"


def verdict_of(trace: Record) -> str:
    """The call in a sentence: how many keys a query sees, and how many it looks at."""
    live = [h for heads in trace.table for h in heads if h.effective == h.effective]
    Lq, Lk = trace.shapes.Lq, trace.shapes.Lk
    if not live:
        return f"none of the {Lq:,} queries sees one of the {Lk:,} keys"
    seen = float(trace.visible.double().mean()) if trace.visible.numel() else 0.0
    low, high = min(h.effective for h in live), max(h.effective for h in live)
    looks = number(low) if high - low < 0.05 * high else f"{number(low)} to {number(high)}"
    away = [h.distance for h in live if h.distance == h.distance]
    far = f", {number(sum(away) / len(away))} tokens away on average" if away else ""
    return f"a query sees {number(round(seen, 1))} keys on average and looks at {looks} of them, by head{far}"
