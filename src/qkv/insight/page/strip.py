"""The strip of shapes: what every step of the call makes, from x to the output, with its bytes and operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qkv.insight.page.drawing import COVER_CLASSES, MAP_CLASSES, box, cells, levels, proportions, shrunk, svg, write
from qkv.insight.page.markup import Markup, joined, node
from qkv.insight.page.source import Source
from qkv.insight.terminal import amount


class Step(NamedTuple):
    """One step: its name, what it computes, the shape of what it makes, and what that takes."""

    name: str
    what: str
    shape: str
    bytes: str
    flops: str


def steps(source: Source) -> list[Step]:
    """All steps. Operations are those of the plan: of the tiles that the mask shows something of."""
    B, Hq, Hkv, Lq, Lk, D, Dv = source.trace.shapes
    size = source.dtype.itemsize
    every = B * Hq * Lq * Lk
    pairs = source.trace.flops // (2 * (D + Dv)) if D + Dv else 0
    accumulated = 8 if source.dtype == torch.float64 else 4
    not_made = f"{amount(every * accumulated, 'B', 1024)}, not stored"

    exponentials = f"{amount(pairs, '').strip()} exp"

    def held(*shape: int) -> str:
        return amount(torch.Size(shape).numel() * size, "B", 1024)

    return [
        Step("x", "what your model feeds in; not part of this call", f"({B}, {Lq:,}, E)", "not seen", ""),
        Step("W_Q", "makes queries of x: your model's", f"(E, {Hq} · {D})", "not seen", ""),
        Step("W_K", "makes keys: your model's", f"(E, {Hkv} · {D})", "not seen", ""),
        Step("W_V", "makes values: your model's", f"(E, {Hkv} · {Dv})", "not seen", ""),
        Step("Q", "what each token asks for", _shape(B, Hq, Lq, D), held(B, Hq, Lq, D), ""),
        Step("K", "what each token advertises", _shape(B, Hkv, Lk, D), held(B, Hkv, Lk, D), ""),
        Step("V", "what each token passes on", _shape(B, Hkv, Lk, Dv), held(B, Hkv, Lk, Dv), ""),
        Step("scores", "q · k × scale, for each pair", _shape(B, Hq, Lq, Lk), not_made, amount(2 * D * pairs, "FLOP")),
        Step("mask", "which keys a query may see", _shape(B, Hq, Lq, Lk), "rules, or as it was given", ""),
        Step("softmax", "weights: each row adds up to 1", _shape(B, Hq, Lq, Lk), not_made, exponentials),
        Step("weights · V", "the values, mixed", _shape(B, Hq, Lq, Dv), "", amount(2 * Dv * pairs, "FLOP")),
        Step("output", "what the call returns", _shape(B, Hq, Lq, Dv), held(B, Hq, Lq, Dv), ""),
    ]  # fmt: skip


def _shape(*sizes: int) -> str:
    return f"({', '.join(f'{n:,}' for n in sizes)})"


def picture(source: Source, map_: torch.Tensor | None) -> Markup:
    """All steps in a row. Dashed: not part of this call, or never stored."""
    B, Hq, Hkv, Lq, Lk, D, Dv = source.trace.shapes
    width, height = proportions(Lq, Lk, 112)
    top = 150 - height / 2
    content: list[str] = [
        *_sheet(14, 118, 62, 64, 1, "ghost", "x", f"{B} × {Lq:,} × E"),
        *_arrows(80, [150] * 3, 112, [62, 150, 238]),
    ]
    names = (("Q", Hq, Lq, D, "q"), ("K", Hkv, Lk, D, "k"), ("V", Hkv, Lk, Dv, "v"))
    for place, (name, heads, length, depth, colour) in enumerate(names):
        middle = 62 + 88 * place
        content += _sheet(116, middle - 20, 44, 40, 1, "ghost", f"W_{name}", f"E × {heads}·{depth}")
        content += _arrows(164, [middle], 196, [middle])
        content += _sheet(204, middle - 22, 52, 44, heads, f"sheet {colour}", name, f"{heads} × {length:,} × {depth}")
    content += _arrows(276, [62, 150], 318, [150 - height / 4, 150 + height / 4])
    content += _matrix(326, top, width, height, "scores", f"{Lq:,} × {Lk:,}", None, "ghost")
    content += _arrows(330 + width, [150], 356 + width, [150])
    x = 364 + width
    cover = cells(shrunk(source.trace.cover.double(), 28).round().to(torch.int64), x, top, width, height, COVER_CLASSES)
    content += _matrix(x, top, width, height, "mask", "who may see whom", cover, "frame")
    content += _arrows(x + width + 4, [150], x + width + 30, [150])
    x += 38 + width
    inner = None
    if map_ is not None:
        small = shrunk(torch.nan_to_num(map_.double()), 28, largest=True)
        inner = cells(levels(small, float(small.max())), x, top, width, height, MAP_CLASSES)
    content += _matrix(x, top, width, height, "softmax", "rows add up to 1", inner, "frame")
    content += _arrows(x + width + 4, [150], x + width + 44, [150])
    content.append(node("path", d=f"M268 238H{x + width + 20:g}V156", class_="arrow v"))
    content.append(write(x + width + 24, 142, "× V", "t mute", "middle"))
    content += _sheet(x + width + 52, 118, 62, 64, Hq, "sheet o", "output", f"{Hq} × {Lq:,} × {Dv}")
    return svg(
        x + width + 150, 300, joined(content), label="The shapes of this call, from x to the output", class_="strip"
    )


def _sheet(
    x: float, y: float, width: float, height: float, count: int, class_: str, name: str, shape: str
) -> Sequence[str]:
    """A tensor: one sheet a head, up to four drawn."""
    behind = min(count, 4) - 1
    sheets = [box(x + 4 * n, y - 4 * n, width, height, class_, 3) for n in range(behind, -1, -1)]
    middle = x + width / 2
    return [
        *sheets,
        write(middle, y + height / 2 + 5, name, "t name", "middle"),
        write(middle, y + height + 15, shape, "t num mute", "middle"),
    ]


def _matrix(
    x: float, y: float, width: float, height: float, name: str, shape: str, inner: Markup | None, class_: str
) -> Sequence[str]:
    middle = x + width / 2
    return [
        inner or "",
        box(x, y, width, height, class_),
        write(middle, y - 9, name, "t name", "middle"),
        write(middle, y + height + 16, shape, "t num mute", "middle"),
        write(middle, y + height / 2 + 4, "q · k × scale", "t mute", "middle")
        if inner is None and name == "scores"
        else "",
    ]


def _arrows(x0: float, starts: Sequence[float], x1: float, ends: Sequence[float]) -> Sequence[str]:
    """Curves from one column to the next, each with its head."""
    middle = (x0 + x1) / 2
    return [
        node(
            "path",
            d=f"M{x0:g} {a:g}C{middle:g} {a:g} {middle:g} {b:g} {x1 - 1:g} {b:g}m-5 -4l5 4l-5 4",
            class_="arrow",
        )
        for a, b in zip(starts, ends, strict=True)
    ]


def table(found: Sequence[Step]) -> Markup:
    """The steps in words and numbers."""
    columns = (("", None), ("what it is", None), ("shape", "n"), ("bytes", "n"), ("operations", "n"))
    head = node("tr", *(node("th", name, scope="col", class_=kind) for name, kind in columns))
    rows = [
        node(
            "tr",
            node("th", s.name, scope="row"),
            node("td", s.what),
            node("td", s.shape, class_="n"),
            node("td", s.bytes, class_="n"),
            node("td", s.flops, class_="n"),
        )
        for s in found
    ]
    caption = node("caption", "Every step's shape, bytes and operations", class_="hush")
    return node(
        "div",
        node("table", caption, node("thead", head), node("tbody", *rows), class_="shapes"),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="Table of shapes",
    )
