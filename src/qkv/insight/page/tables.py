"""The page's tables: what a screen reader reads, what a page without scripts shows, and where scripts begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkv.insight.page.drawing import sparkline
from qkv.insight.page.maps import binned, entropies
from qkv.insight.page.markup import Markup, node
from qkv.insight.page.packed import edges
from qkv.insight.page.source import Lane, Source
from qkv.insight.page.text import digits, percent, token

Names = Callable[[str, int], str]
"""("k" or "q", number) to the token's text, made visible; "" where there is none."""


def scrolled(table: Markup, name: str) -> Markup:
    """A table that may be wider than the page: it scrolls by itself, by keyboard, too."""
    return node("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def heads(source: Source) -> Markup:
    """Heads at a glance, one row each."""
    columns = [
        ("head", "", "sort"),
        (
            "effective tokens",
            "e to the entropy, averaged over queries: so many equal weights would be as spread out",
            "sort n",
        ),
        ("entropy", "nats, averaged over queries", "sort n"),
        ("largest weight", "averaged over queries", "sort n"),
        ("above 0.99", "share of queries whose largest weight is above 0.99", "sort n"),
        ("first key", "share of all weight that key 0 receives", "sort n"),
        *([("nothing", "share of all weight that the learned sink takes", "sort n")] if source.has_sinks else []),
        ("distance", "tokens between a query and what it looks at, averaged by weight", "sort n"),
        ("entropy by query", "", ""),
        ("weight by key", "drawn as its square root", ""),
        ("the same as", "an earlier head that does the same: equal maps and entropies", ""),
    ]
    top = node("tr", *(_heading(*column) for column in columns))
    body = [_head_row(source, lane) for lane in source.lanes]
    caption = node("caption", "Heads at a glance", class_="hush")
    table = node("table", caption, node("thead", top), node("tbody", *body), id="heads-table", class_="sortable")
    return scrolled(table, "Table of heads")


def _heading(name: str, what: str, kind: str) -> Markup:
    sorts = "sort" in kind
    inner = node("button", name, type="button", class_="sort", title=what or None) if sorts else name
    return node(
        "th", inner, scope="col", title=None if sorts else what or None, class_="n" if "n" in kind.split() else None
    )


def _head_row(source: Source, lane: Lane) -> Markup:
    points = 48 if len(source.lanes) <= 48 else 20
    facts, mass = lane.facts, source.mass(lane)
    entropy = binned(entropies(source, lane), min(points, lane.Lq)).tolist()
    received = None if mass is None else binned(mass, min(points, lane.Lk)).sqrt().tolist()
    twin = next((x.name for x in source.lanes if x.batch == lane.batch and x.head == facts.twin), "–")
    pick = node("button", lane.name, type="button", class_="pick", data_lane=lane.number)
    return node(
        "tr",
        node("th", pick, scope="row", data_v=lane.number),
        _cell(facts.effective, digits(facts.effective, 3)),
        _cell(facts.entropy, digits(facts.entropy, 3)),
        _cell(facts.largest, digits(facts.largest, 3)),
        _cell(facts.sharp, percent(facts.sharp)),
        _cell(facts.first, percent(facts.first)),
        _cell(facts.learned, percent(facts.learned)) if source.has_sinks else None,
        _cell(facts.distance, digits(facts.distance, 3)),
        node("td", sparkline(entropy, f"Entropy of the queries of {lane.name}, first to last", "line q")),
        node("td", "–" if received is None else sparkline(received, f"Weight of the keys in {lane.name}", "line k")),
        node("td", twin),
        data_lane=lane.number,
    )


def _cell(value: float, text: str) -> Markup:
    missing = math.isnan(value)
    return node("td", "–" if missing else text, class_="n", data_v=-1 if missing else f"{value:.9g}")


def bins(lane: Lane, one: Tensor, names: Names, count: int = 10) -> Markup:
    """The largest bins of a lane's map, in words and numbers; the page's script writes the same for other lanes."""
    rows, columns = edges(lane.Lq, one.shape[0]), edges(lane.Lk, one.shape[1])
    order = torch.sort(torch.nan_to_num(one).flatten(), descending=True, stable=True).indices[:count].tolist()
    body = []
    for at in order:
        r, c = divmod(at, one.shape[1])
        if float(one[r, c]) > 0:
            where = (_span("q", rows[r], rows[r + 1], names), _span("k", columns[c], columns[c + 1], names))
            body.append(
                node("tr", *(node("td", w) for w in where), node("td", digits(float(one[r, c]), 3), class_="n"))
            )
    top = node("tr", *(node("th", name, scope="col", class_=kind) for name, kind in _BINS))
    caption = node("caption", "Where this head’s map is largest")
    return node("table", caption, node("thead", top), node("tbody", *body), id="bins-table")


_BINS = (("queries", None), ("keys", None), ("mean weight", "n"))


def _span(side: str, start: int, stop: int, names: Names) -> Markup:
    if stop - start > 1:
        return node("span", f"{start:,} to {stop - 1:,}")
    text = names(side, start)
    return node("span", f"{start:,} ", token(text) if text else None)


QUERY_COLUMNS = (
    ("key", "its number, and its token: what advertises"),
    ("q · k", "the product of what is asked and what is advertised"),
    ("scaled", "times the scale"),
    ("capped", "softcap × tanh(scaled / softcap)"),
    ("biased", "plus the bias"),
    ("mask", "whether the query may see the key"),
    ("exp(s − max)", "the exponential, over the largest score"),
    ("weight", "divided by the sum: the soft answer"),
    ("|v|", "length of the value"),
    ("weight × |v|", "what is passed on"),
    ("running total", "of the weights, in the order of this table"),
    ("without it", "how far the output moves, of its length, when this key is taken away"),
)


def query_columns(source: Source) -> list[tuple[str, str]]:
    """The columns that this call has."""
    left_out = {*([] if source.trace.softcap is not None else ["capped"]), *([] if source.has_bias else ["biased"])}
    return [column for column in QUERY_COLUMNS if column[0] not in left_out]


def query(source: Source, found: dict[str, Any], names: Names) -> Markup:
    """One query in full."""
    columns = query_columns(source)
    top = node(
        "tr",
        *(node("th", name, scope="col", title=what, class_=None if name == "key" else "n") for name, what in columns),
    )
    body, total = [], 0.0
    for place, key in enumerate(found["keys"].tolist()):
        total += float(found["weight"].float()[place])
        body.append(_query_row(source, found, place, key, total, names))
    caption = node("caption", "Every step from the product to the weight, for the keys listed", class_="hush")
    table = node("table", caption, node("thead", top), node("tbody", *body), id="query-table", class_="steps")
    return scrolled(table, "Table of one query")


def _query_row(source: Source, found: dict[str, Any], place: int, key: int, total: float, names: Names) -> Markup:
    dot, weight, norm, effect = (float(found[name].float()[place]) for name in ("dot", "weight", "norm", "effect"))
    seen = bool(found["visible"][place])
    scale, cap = source.trace.scale, source.trace.softcap
    scaled = dot * scale
    score = scaled if cap is None else cap * math.tanh(scaled / cap)
    texts = [_or_none(dot), _or_none(scaled)]
    texts += [_or_none(score)] if cap is not None else []
    if source.has_bias:
        score += float(found["bias"].float()[place])
        texts.append(digits(score) if seen else "–")
    top = found["top"]
    exp = math.exp(min(score - top, 50.0)) if seen and top is not None else 0.0
    texts += ["visible" if seen else "hidden", digits(exp), digits(weight)]
    texts += [digits(norm), digits(weight * norm), digits(total), percent(effect) if seen else "–"]
    text = names("k", key)
    first = node("th", f"{key:,} ", token(text) if text else None, scope="row")
    return node("tr", first, *(node("td", t, class_="n") for t in texts), class_=None if seen else "hidden")


def _or_none(x: float) -> str:
    return "–" if math.isnan(x) else digits(x)


def tiles(found: dict[str, Any], Lk: int) -> Markup:
    """The online softmax of one query, tile by tile."""
    top = node(
        "tr",
        *(
            node("th", name, scope="col")
            for name in (
                "tile",
                "keys",
                "largest score",
                "running max m",
                "rescale by",
                "sum l",
                "output so far, first numbers",
            )
        ),
    )
    width = found["tiles"]["width"]
    body = []
    for n, (highest, m, factor, l) in enumerate(found["tiles"]["steps"]):
        out = found["tiles"]["outs"][n].tolist()
        body.append(
            node(
                "tr",
                node("th", str(n + 1), scope="row"),
                node("td", f"{n * width:,} to {min(Lk, (n + 1) * width) - 1:,}", class_="n"),
                node("td", "none visible" if highest is None else digits(highest), class_="n"),
                node("td", "−∞" if m is None else digits(m), class_="n"),
                node("td", digits(factor), class_="n"),
                node("td", digits(l), class_="n"),
                node("td", "  ".join(digits(x) for x in out[:4]), class_="n"),
            )
        )
    caption = node("caption", "The running maximum, sum and output after every tile", class_="hush")
    table = node("table", caption, node("thead", top), node("tbody", *body), id="tiles-table", class_="steps")
    return scrolled(table, "Table of tiles")
