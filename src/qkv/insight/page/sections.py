"""The page's sections on the whole call, in the order in which they are read; `lookup` has those on one query.

What needs a script is marked, and hidden without one.
"""

from __future__ import annotations

import torch

from qkv.insight.page import drawing, strip, tables
from qkv.insight.page.content import Content
from qkv.insight.page.frame import figure, section
from qkv.insight.page.markup import Markup, joined, node
from qkv.insight.page.text import counted, digits, percent, plain
from qkv.insight.terminal import amount


def verdict(content: Content) -> Markup:
    s, t = content.source, content.source.trace
    many = "" if s.B == 1 else f"{counted(s.B, 'batch row')}, "
    kind = "multi-head" if s.Hq == s.Hkv else "multi-query" if s.Hkv == 1 else "grouped-query"
    facts = (
        f"{many}{counted(s.Lq, 'query', 'queries')} × {counted(s.Lk, 'key')}, {counted(s.Hq, 'query head')} on "
        f"{counted(s.Hkv, 'key/value head')} ({kind}), D {s.D}, Dv {s.Dv}, {t.dtype}, by {t.backend}"
    )
    said = [node("li", plain(w)) for w in content.warnings]
    box = (
        node("ul", *said, class_="warnings", aria_label="Warnings")
        if said
        else node("p", "Nothing to warn of.", class_="fine")
    )
    return node(
        "header",
        node("p", "qkv", node("span", " · what this attention did", class_="mute"), class_="brand"),
        node("h1", content.verdict, id="verdict-title"),
        node("p", facts, class_="facts"),
        box,
        id="verdict",
    )


def shapes(content: Content) -> Markup:
    s = content.source
    found = strip.steps(s)
    first = content.map_of(content.first) if s.lanes else None
    whole = amount(s.B * s.Hq * s.Lq * s.Lk * 4, "B", 1024)
    lead = (
        f"Solid: tensors of this call. Dashed: x and the projections, which make q, k and v in your model and were not "
        f"seen, and the scores, which would take {whole} and are never stored whole."
    )
    picture = node(
        "div", strip.picture(s, first), class_="wide", tabindex="0", role="region", aria_label="Picture of the shapes"
    )
    return section("shapes", figure("shapes", picture), strip.table(found), lead=lead)


def mask(content: Content) -> Markup:
    t = content.source.trace
    cover = t.cover
    total = max(1, cover.numel())
    rows = [
        (name, int((cover == value).sum()), words)
        for value, name, words in (
            (2, "visible", "every query of the block sees every key"),
            (1, "mixed", "some do"),
            (0, "hidden", "none does"),
        )
    ]
    body = [
        node(
            "tr",
            node("th", node("i", class_=f"key {c}"), name, scope="row"),
            node("td", f"{n:,}", class_="n"),
            node("td", percent(n / total), class_="n"),
            node("td", words),
        )
        for (name, n, words), c in zip(rows, ("vis", "mix", "hid"), strict=True)
    ]
    columns = (("blocks", None), ("number", "n"), ("share", "n"), ("", None))
    top = node("tr", *(node("th", name, scope="col", class_=kind) for name, kind in columns))
    table = node(
        "table",
        node("caption", f"The mask in {cover.shape[0]} × {cover.shape[1]} blocks"),
        node("thead", top),
        node("tbody", *body),
    )
    words = node(
        "div",
        node("p", plain(f"{t.mask_words[:1].upper()}{t.mask_words[1:]}."), class_="said"),
        node("p", "As code: ", node("code", plain(t.mask)), class_="mute"),
        node("p", f"Positions: {plain(content.source.positions)}.", class_="mute"),
        table,
        class_="words",
    )
    sizes = t.lengths[0] if t.lengths else (0, 0)
    return section("mask", node("div", figure("mask", drawing.mask_picture(cover, *sizes)), words, class_="pair"))


def heads(content: Content) -> Markup:
    lead = (
        "Each row is a head. Effective tokens say how many keys a query really looks at. A first key with much weight "
        "is a sink: weights have to add up to 1, and it takes what is left when nothing fits."
    )
    hint = node("p", "Sort by a column’s name. A head’s name opens it in the sections below.", class_="mute js-only")
    return section("heads", tables.heads(content.source), hint, lead=lead)


def map_(content: Content) -> Markup:
    """The pooled map, read by pointer and keyboard, and the windows in which every weight is known."""
    one = content.map_of(content.first) if content.source.lanes else None
    if one is None or content.maps is None:
        return section("map", node("p", "This trace has no pooled map.", class_="mute"))
    lane = content.first
    cells = f"in {one.shape[0]} × {one.shape[1]} bins" if content.pools(lane) else "every one of them"
    exact = "to three digits" if content.maps.exact else "to 3 %"
    lead = (
        f"Weight of each query (down) on each key (across): {cells}, {exact}. The colour is the logarithm of the "
        "weight; the margins are each query’s entropy and the weight that each key receives."
    )
    still = node("div", drawing.map_picture(one, lane.Lq, lane.Lk, lane.name), class_="still")
    live = node("div", id="map-live", class_="live js-only")
    top = float(torch.nan_to_num(one).max())
    legend = drawing.legend(digits(top, 2), digits(top / 10**drawing.DECADES, 2))
    says = node("div", id="map-says", class_="says js-only", role="status", aria_live="polite")
    return section(
        "map",
        node(
            "div",
            figure("map", joined([still, live]), node("figcaption", legend, id="map-legend")),
            node("div", says, tables.bins(lane, one, content.names), class_="words"),
            class_="pair broad",
        ),
        _zoom(content),
        lead=lead,
    )


def _zoom(content: Content) -> Markup | None:
    if not content.pools(content.first):
        return None
    if not content.windows:
        return node("p", "The trace holds no tensors: weights inside the bins are not known here.", class_="mute")
    said = (
        "Windows in which every weight is known, computed from q and k; they are framed on the map. The first holds "
        "the last queries and keys, the others lie around the largest bins elsewhere (past the first queries, which "
        "have few keys to choose from)."
    )
    live = node("div", id="zoom-live", class_="live js-only")
    says = node("div", id="zoom-says", class_="says js-only", role="status", aria_live="polite")
    return node(
        "div",
        node("h3", "Inside the bins"),
        node("p", said, class_="mute"),
        node("div", id="zoom-tabs", class_="tabs js-only", role="group", aria_label="Windows"),
        node("div", figure("zoom", live, class_="js-only"), node("div", says, class_="words"), class_="pair broad"),
        node("noscript", node("p", "The page’s script draws these windows.")),
        class_="zoom",
        id="zoom",
    )
