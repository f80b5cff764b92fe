"""Pictures as SVG, drawn by the server: they need no script, take their colours from the page's style, and print."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.insight.page.markup import Markup, joined, node
from qkv.insight.page.palette import STEPS

DECADES = 4.0
"""A map's colours span so many powers of ten below its largest value."""


def svg(width: float, height: float, *content: str | None, label: str, **attributes: str) -> Markup:
    """A picture with a name for those who do not see it."""
    box = f"0 0 {width:g} {height:g}"
    return node("svg", node("title", label), *content, viewBox=box, role="img", **attributes)


def write(x: float, y: float, text: str, class_: str = "t", anchor: str = "start") -> Markup:
    return node("text", text, x=f"{x:g}", y=f"{y:g}", class_=class_, text_anchor=anchor)


def box(x: float, y: float, width: float, height: float, class_: str, rx: float = 0) -> Markup:
    return node("rect", x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height:g}", class_=class_, rx=rx or None)


def cells(levels: Tensor, x: float, y: float, width: float, height: float, classes: Sequence[str]) -> Markup:
    """A matrix of small integers as one path for each class; runs of equal cells are one piece. -1 is not drawn."""
    rows, columns = levels.shape
    if not levels.numel():
        return Markup()
    pieces: dict[int, list[str]] = {}
    for r, row in enumerate(levels.tolist()):
        start = 0
        for c in range(1, columns + 1):
            if c == columns or row[c] != row[start]:
                if row[start] >= 0:
                    pieces.setdefault(row[start], []).append(f"M{start} {r}h{c - start}v1h-{c - start}z")
                start = c
    paths = [node("path", d="".join(pieces[level]), class_=classes[level]) for level in sorted(pieces)]
    turn = f"translate({x:g} {y:g}) scale({width / columns:.6g} {height / rows:.6g})"
    return node("g", *paths, transform=turn, shape_rendering="crispEdges")


def shrunk(x: Tensor, most: int, largest: bool = False) -> Tensor:
    """A matrix with at most so many rows and columns: means, or maxima, of blocks."""
    pool = torch.nn.functional.adaptive_max_pool2d if largest else torch.nn.functional.adaptive_avg_pool2d
    size = (min(most, x.shape[0]), min(most, x.shape[1]))
    return x if size == tuple(x.shape) else pool(x[None, None].double(), size)[0, 0]


def levels(values: Tensor, top: float) -> Tensor:
    """The colour of each value, 0 .. STEPS - 1: equal steps of the logarithm; 0 and NaN are -1."""
    t = 1 + torch.log10(values.double().clamp(min=1e-30) / (top or 1.0)) / DECADES
    level = (t.clamp(0, 1) * (STEPS - 1)).round()
    return torch.where(values > 0, level, -1.0).nan_to_num(-1.0).to(torch.int64)


MAP_CLASSES = [f"m{i}" for i in range(STEPS)]
COVER_CLASSES = ["hid", "mix", "vis"]


def framed(inner: Markup, left: str, top: str, ends: tuple[int, int], side: tuple[float, float], label: str) -> Markup:
    """A matrix of queries and keys with its axes: `ends` are the last query and the last key."""
    width, height = side
    x, y = 44.0, 30.0
    axes = [
        box(x, y, width, height, "frame"),
        write(x, y - 16, top, "t mute"),
        write(x, y - 4, "0", "t num mute"),
        write(x + width, y - 4, f"{ends[1]:,}", "t num mute", "end"),
        write(x - 6, y + 10, "0", "t num mute", "end"),
        write(x - 6, y + height - 2, f"{ends[0]:,}", "t num mute", "end"),
        node(
            "text",
            left,
            class_="t mute",
            text_anchor="middle",
            transform=f"translate({x - 28:g} {y + height / 2:g}) rotate(-90)",
        ),
    ]
    return svg(x + width + 8, y + height + 8, inner, *axes, label=label, class_="plot")


def mask_picture(cover: Tensor, Lq: int, Lk: int) -> Markup:
    """Which keys each query may see: hidden, mixed and visible blocks."""
    width, height = proportions(Lq, Lk, 300)
    inner = cells(cover.to(torch.int64), 44, 30, width, height, COVER_CLASSES)
    label = f"The mask: {Lq:,} queries by {Lk:,} keys, in {cover.shape[0]} by {cover.shape[1]} blocks"
    return framed(inner, "queries", "keys", (max(Lq - 1, 0), max(Lk - 1, 0)), (width, height), label)


def map_picture(values: Tensor, Lq: int, Lk: int, name: str, most: int = 64) -> Markup:
    """A pooled map for readers without scripts."""
    small = shrunk(torch.nan_to_num(values.double()), most, largest=True)
    width, height = proportions(Lq, Lk, 520)
    inner = cells(levels(small, float(small.max())), 44, 30, width, height, MAP_CLASSES)
    return framed(inner, "queries", "keys", (Lq - 1, Lk - 1), (width, height), f"Where the queries of {name} look")


def proportions(Lq: int, Lk: int, most: float) -> tuple[float, float]:
    """A rectangle like the matrix, as far as that can be seen: no side is under a third of the other."""
    ratio = max(1 / 3, min(3.0, max(Lq, 1) / max(Lk, 1)))
    return (most, most * ratio) if ratio <= 1 else (most / ratio, most)


def sparkline(values: Sequence[float], label: str, class_: str) -> Markup:
    """A small line from 0 up; a value that is no number is a gap."""
    width, height = 96.0, 22.0
    good = [v for v in values if math.isfinite(v)]
    top = max([*good, 1e-30])
    points, pen = [], "M"
    for place, v in enumerate(values):
        if not math.isfinite(v):
            pen = "M"
            continue
        x = 1 + (width - 2) * place / max(1, len(values) - 1)
        points.append(f"{pen}{x:.1f} {height - 2 - (height - 4) * v / top:.1f}")
        pen = "L"
    line = node("path", d="".join(points) or "M0 0", class_=class_)
    return svg(width, height, line, label=label, class_="spark")


def legend(top: str, bottom: str) -> Markup:
    """The colours of a map from its largest value down."""
    steps = joined(box(4 + 12 * i, 4, 12.2, 12, f"m{i}") for i in range(STEPS))
    words = (write(4, 30, bottom, "t num mute"), write(4 + 12 * STEPS, 30, top, "t num mute", "end"))
    return svg(
        200, 34, steps, *words, label=f"Colours: from {bottom} to {top}, on a logarithmic scale", class_="legend"
    )
