"""Everything that the page shows, gathered from a trace once, and cut to a budget of bytes."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qkv.insight.page import facts, maps, rows
from qkv.insight.page.maps import Maps
from qkv.insight.page.packed import as_stored, packed
from qkv.insight.page.source import Lane, Source
from qkv.insight.page.text import visible

BUDGET = 4_400_000
"""Bytes of data; the page's own texts, style and script take what is left of 5 MB."""


_ROW, _KEY = 1900, 33  # bytes of a query in full, and of each key that it lists
_LEAST = 16  # keys


@dataclass
class Content:
    """What the sections show; windows and rows are empty where the trace holds no tensors."""

    source: Source
    verdict: str
    warnings: list[str]
    maps: Maps | None
    windows: list[list[dict[str, Any]]]
    rows: list[list[dict[str, Any]]]
    versions: list[tuple[str, str]]

    @property
    def first(self) -> Lane:
        """The lane that is shown before one is chosen."""
        return self.source.lanes[0]

    def map_of(self, lane: Lane) -> torch.Tensor | None:
        """The lane's map with the digits that the page's data has."""
        one = None if self.maps is None else self.maps.values[lane.number]
        return None if one is None or self.maps is None else as_stored(one, self.maps.kind)

    def pools(self, lane: Lane) -> bool:
        """Whether a bin of the lane's map holds more than one weight."""
        one = None if self.maps is None else self.maps.values[lane.number]
        return one is not None and tuple(one.shape) != (lane.Lq, lane.Lk)

    def names(self, side: str, at: int) -> str:
        """The token of a query or key, made visible; "" where there is none."""
        t = self.source.trace
        tokens = t.query_tokens if side == "q" else t.tokens
        return visible(tokens[at]) if tokens is not None and at < len(tokens) else ""


def gather(source: Source, wanted: Sequence[int], budget: int) -> Content:
    """The content of a trace's page, with the queries that are wanted among those shown in full."""
    found = maps.pooled(source, int(budget * 0.66))
    content = Content(source, facts.verdict(source), facts.warnings(source), found, [], [], versions())
    if source.held:
        if found is not None and any(map(content.pools, source.lanes)):
            content.windows = maps.window_data(source, found, int(budget * 0.11))
        content.rows = full_rows(source, wanted, int(budget * 0.12), int(budget * 0.32))
        left_out = len({i % source.Lq for i in wanted} - {row["i"] for row in content.rows[0]}) if content.rows else 0
        if left_out:
            content.warnings.append(
                f"{left_out:,} of the queries asked for are not on the page: it has no room for them."
            )
    return content


def full_rows(source: Source, wanted: Sequence[int], budget: int, most_of_all: int) -> list[list[dict[str, Any]]]:
    """Every lane's chosen queries, and all others where there is room; so it is with the keys that each one lists."""
    picks = [rows.chosen(source, lane, wanted) for lane in source.lanes]
    short = all(max(lane.Lq, lane.Lk) <= rows.ALL_KEYS for lane in source.lanes)
    if short and sum(lane.Lq * (lane.Lk * _KEY + _ROW) for lane in source.lanes) <= most_of_all:
        budget = most_of_all
        for lane, pick in zip(source.lanes, picks, strict=True):
            known = {i for i, _ in pick}
            pick += [(i, "") for i in range(lane.Lq) if i not in known]
    room = max(1, int(budget / max(1, len(picks)) / (_LEAST * _KEY + _ROW)))
    picks = [pick[:room] for pick in picks]
    count = max(1, sum(map(len, picks)))
    most = int(max(_LEAST, min(rows.ALL_KEYS, (budget / count - _ROW) / _KEY)))
    found = []
    for lane, pick in zip(source.lanes, picks, strict=True):
        read = source.rows(lane, [i for i, _ in pick])
        found.append([rows.row_data(source, row, i, why, most) for row, (i, why) in zip(read, pick, strict=True)])
    return found


def data(content: Content, budget: int) -> dict[str, Any]:
    """What the page's script reads."""
    s, t = content.source, content.source.trace
    lanes = [
        {"name": x.name, "norms": f"{x.batch} {x.values}", "Lq": x.Lq, "Lk": x.Lk, "covered": x.covered}
        for x in s.lanes
    ]
    return {
        "Dv": s.Dv,
        "scale": t.scale,
        "softcap": t.softcap,
        "bias": s.has_bias,
        "lanes": lanes,
        "cover": {"rows": t.cover.shape[0], "columns": t.cover.shape[1], "values": packed(t.cover, torch.uint8)},
        "map": maps.stored(content.maps) if content.maps is not None else None,
        "series": maps.series(s, int(budget * 0.05)),
        "norms": maps.norms(s, content.maps),
        "windows": content.windows,
        "rows": [[rows.stored(row) for row in lane] for lane in content.rows],
        "tokens": _tokens(content, int(budget * 0.05)),
    }


def _tokens(content: Content, room: int) -> dict[str, dict[str, str]]:
    """The texts that the script may show: of keys and queries in full rows first, then of bins and windows."""
    t, lanes = content.source.trace, content.source.lanes
    found: dict[str, dict[str, str]] = {"q": {}, "k": {}}

    def add(side: str, numbers: Any) -> None:
        nonlocal room
        for at in numbers:
            if room > 0 and str(at) not in found[side] and (text := content.names(side, at)):
                found[side][str(at)] = text
                room -= len(json.dumps(text)) + 10

    if t.tokens is None and t.query_tokens is None:
        return found
    for lane in content.rows:
        for row in lane:
            add("q", [row["i"]])
            add("k", row["keys"].tolist())
    if not any(map(content.pools, lanes)):
        add("q", range(content.source.Lq))
        add("k", range(content.source.Lk))
    for some in content.windows:
        for window in some:
            add("q", range(*window["q"]))
            add("k", range(*window["k"]))
    return found


def versions() -> list[tuple[str, str]]:
    """What computed the page."""
    return [
        ("qkv", sys.modules["qkv"].__version__),
        ("torch", str(torch.__version__)),
        ("Python", platform.python_version()),
    ]
