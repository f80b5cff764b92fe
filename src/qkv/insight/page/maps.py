"""The pooled maps, their margins and the windows in which every weight is known, cut to the page's budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.insight.page.packed import codes, edges, halves, packed
from qkv.insight.page.source import Lane, Source

MOST_POINTS = 512
_LETTERS = 4 / 3  # of base64, a byte


class Maps(NamedTuple):
    """Mean weight that the queries of a row bin give to a column bin, for each lane; and how it is stored."""

    kind: str  # "f16" to three digits, "u8" to 3 %
    values: list[Tensor | None]

    @property
    def exact(self) -> bool:
        return self.kind == "f16"


def pooled(source: Source, budget: int) -> Maps | None:
    """The maps in the finest form that the budget allows; lanes past it have none."""
    maps, lanes = source.statistics.map, source.lanes
    if maps is None or not lanes or 0 in maps.shape[-2:]:
        return None
    step, kind, count = _form(maps.shape[-2], maps.shape[-1], len(lanes), budget)
    values: list[Tensor | None] = []
    for lane in lanes:
        one = maps[lane.batch, lane.place, : lane.Lq, : lane.Lk].double()
        values.append(_means(one, step, lane.Lq, lane.Lk) if lane.number < count and one.numel() else None)
    return Maps(kind, values)


def _form(rows: int, columns: int, lanes: int, budget: int) -> tuple[int, str, int]:
    """By how much maps are pooled further, their kind, and how many there are."""
    step = 1
    while True:
        cells = -(-rows // step) * -(-columns // step)
        for kind, size in (("f16", 2), ("u8", 1)):
            one = cells * size * _LETTERS
            if lanes * one <= budget:
                return step, kind, lanes
        if cells <= 64 * 64:
            return step, "u8", max(1, int(budget // one))
        step *= 2


def _means(one: Tensor, step: int, Lq: int, Lk: int) -> Tensor:
    """Sums over bins as means over the queries of bins that are `step` times as large, as far as that divides them."""
    starts = torch.tensor(edges(Lq, one.shape[0]), dtype=torch.float64, device="cpu")
    sizes = (starts[1:] - starts[:-1])[:, None]
    for dim, length in ((0, Lq), (1, Lk)):
        old, new = one.shape[dim], _coarser(one.shape[dim], length, step)
        to = torch.arange(old, device="cpu") * new // old
        shape = [new if d == dim else n for d, n in enumerate(one.shape)]
        one = one.new_zeros(shape).index_add_(dim, to, one)
        if dim == 0:
            sizes = sizes.new_zeros(new, 1).index_add_(0, to, sizes)
    return one / sizes.clamp(min=1)


def _coarser(bins: int, length: int, step: int) -> int:
    """How many bins there are when they grow by `step`; bins of more than one thing have to join evenly."""
    if bins == length:
        return -(-bins // step)
    return next(bins // by for by in range(min(step, bins), 0, -1) if bins % by == 0)


def stored(maps: Maps) -> dict[str, Any]:
    """The maps as the page's data."""
    write = halves if maps.exact else codes
    values = [
        None if one is None else {"rows": one.shape[0], "columns": one.shape[1], "values": write(one)}
        for one in maps.values
    ]
    return {"kind": maps.kind, "values": values}


def binned(x: Tensor, bins: int) -> Tensor:
    """Means of a series over bins; NaN takes no part, and is what an empty bin has."""
    starts = edges(len(x), bins)
    good = ~x.isnan()
    sums = torch.cat((x.new_zeros(1), torch.where(good, x, 0.0).cumsum(0)))
    counts = torch.cat((x.new_zeros(1), good.to(x.dtype).cumsum(0)))
    at = torch.tensor(starts, dtype=torch.int64, device="cpu")
    return (sums[at[1:]] - sums[at[:-1]]) / (counts[at[1:]] - counts[at[:-1]])


def entropies(source: Source, lane: Lane) -> Tensor:
    """Of each query of the lane; NaN for those that see nothing."""
    dead = source.series(source.statistics.lse, lane) == -torch.inf
    return source.series(source.statistics.entropy, lane).masked_fill(dead, torch.nan)


def series(source: Source, budget: int) -> dict[str, Any]:
    """Of each lane: entropy of the queries and the share of all weight that keys receive, in bins."""
    lanes = source.lanes
    points = max(16, min(MOST_POINTS, int(budget / (max(1, len(lanes)) * 6 * _LETTERS))))
    found: dict[str, Any] = {"entropy": [], "mass": []}
    for lane in lanes:
        row = binned(entropies(source, lane), min(points, lane.Lq))
        found["entropy"].append(packed(torch.nan_to_num(row), torch.float16))
        mass = source.mass(lane)
        if mass is not None:
            found["mass"].append(packed(binned(mass, min(points, lane.Lk)), torch.float32))
    return found


def norms(source: Source, maps: Maps | None) -> dict[str, str]:
    """Mean |v| of the column bins, by batch row and key/value head."""
    found: dict[str, str] = {}
    for lane in source.lanes:
        one = None if maps is None else maps.values[lane.number]
        if one is not None and (name := f"{lane.batch} {lane.values}") not in found:
            values = source.trace.value_norms[lane.batch, lane.values, : lane.Lk].double()
            found[name] = packed(binned(values, one.shape[1]), torch.float32)
    return found


class Window(NamedTuple):
    """A rectangle of weights, computed exactly."""

    q: tuple[int, int]
    k: tuple[int, int]
    why: str


def windows(source: Source, lane: Lane, maps: Maps, side: int, count: int) -> list[Window]:
    """Where to look closer: the last queries and their keys, then around the largest bins elsewhere."""
    Lq, Lk = lane.Lq, lane.Lk
    found = [Window(_around(Lq, Lq, side), _around(Lk, Lk, side), "the last queries and the last keys")]
    one = maps.values[lane.number]
    if one is None:
        return found[:count]
    rows, columns = edges(Lq, one.shape[0]), edges(Lk, one.shape[1])
    late = torch.nan_to_num(one)
    late[: one.shape[0] // 8] = 0  # the first queries have few keys to choose from
    order = torch.sort(late.flatten(), descending=True, stable=True).indices[: 64 * count].tolist()
    for at in order:
        if len(found) >= count:
            break
        r, c = divmod(at, one.shape[1])
        i, j = _peak(source, lane, (rows[r], rows[r + 1]), (columns[c], columns[c + 1]))
        new = Window(
            _around(i + side // 2, Lq, side), _around(j + side // 2, Lk, side), f"around query {i:,}, key {j:,}"
        )
        if all(_apart(new, old) for old in found):
            found.append(new)
    return found


def _around(end: int, length: int, side: int) -> tuple[int, int]:
    stop = min(max(end, side), length)
    return max(0, stop - side), stop


def _apart(a: Window, b: Window) -> bool:
    """Whether less than a quarter of a window lies in the other."""
    shared = [max(0, min(x[1], y[1]) - max(x[0], y[0])) for x, y in ((a.q, b.q), (a.k, b.k))]
    return shared[0] * shared[1] * 4 < (a.q[1] - a.q[0]) * (a.k[1] - a.k[0])


def _peak(source: Source, lane: Lane, q: tuple[int, int], k: tuple[int, int]) -> tuple[int, int]:
    """The query of a bin whose largest weight lies in the bin's keys, and that key; else the bin's corner."""
    s = source.statistics
    if s.top_keys is None or s.top_weights is None:
        return q[0], k[0]
    keys = s.top_keys[lane.batch, lane.place, q[0] : q[1]]
    weights = s.top_weights[lane.batch, lane.place, q[0] : q[1]]
    inside = torch.where((keys >= k[0]) & (keys < k[1]), weights, -1.0)
    if not inside.numel() or float(inside.max()) < 0:
        return q[0], k[0]
    at = int(inside.flatten().argmax())
    return q[0] + at // keys.shape[-1], int(keys.flatten()[at])


def window_data(source: Source, maps: Maps, budget: int) -> list[list[dict[str, Any]]]:
    """Every lane's windows with their weights, as the page's data."""
    lanes = source.lanes
    side, count = _side(len(lanes), budget)
    found = []
    for lane in lanes:
        mine = []
        for w in windows(source, lane, maps, side, count):
            sizes = source.trace.value_norms[lane.batch, lane.values, w.k[0] : w.k[1]]
            weights = halves(source.weights(lane, w.q, w.k))
            mine.append({"q": w.q, "k": w.k, "why": w.why, "values": weights, "norms": packed(sizes, torch.float32)})
        found.append(mine)
    return found


def _side(lanes: int, budget: int) -> tuple[int, int]:
    """How large windows are, and how many a lane has."""
    for side, count in ((96, 3), (80, 3), (64, 3), (56, 3), (48, 3), (48, 2), (40, 2), (32, 2), (24, 2), (24, 1)):
        if lanes * count * (side * side * 2 + side * 4 + 60) * _LETTERS <= budget:
            return side, count
    return 16, 1
