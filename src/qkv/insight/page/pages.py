"""The page table of a cache's view: which page holds which tokens, who shares it, and how much weight it receives."""

from __future__ import annotations

from collections import Counter

import torch

from qkv.insight.page.drawing import box, svg, write
from qkv.insight.page.markup import Markup, joined, node
from qkv.insight.page.source import Source
from qkv.insight.page.tables import Names, scrolled
from qkv.insight.page.text import counted, digits, percent, token
from qkv.insight.record import Pages

_SEQUENCES, _PAGES, _LISTED = 24, 16, 48


def shares(source: Source, pages: Pages, b: int) -> list[float]:
    """Of each page of a sequence, the share of all weight that its keys receive, over the heads of the trace."""
    length = source.trace.lengths[b][1]
    masses = [source.mass(lane) for lane in source.lanes if lane.batch == b and lane.live]
    found = [mass for mass in masses if mass is not None]
    if not found:
        return []
    mass = torch.stack(found).mean(0)
    starts = range(0, len(pages.tables[b]) * pages.size, pages.size)
    return [float(mass[start : min(length, start + pages.size)].sum()) for start in starts]


def uses(pages: Pages) -> Counter[int]:
    """How many of the view's sequences each page belongs to."""
    return Counter(page for table in pages.tables for page in set(table) if page >= 0)


def words(source: Source, pages: Pages) -> str:
    """The pool in a sentence."""
    used = uses(pages)
    shared = sum(1 for n in used.values() if n > 1)
    entries = sum(page >= 0 for table in pages.tables for page in table)
    tokens = sum(length for _, length in source.trace.lengths)
    slots = len(used) * pages.size
    said = (
        f"{counted(len(pages.tables), 'sequence')} of {counted(tokens, 'token')} on {counted(len(used), 'page')} of "
        f"{pages.size} slots; the pool has {pages.pool:,}, so {pages.pool - len(used):,} are free or another's. "
    )
    if shared:
        said += f"{counted(shared, 'page is', 'pages are')} shared: without that these tables would take {entries:,}. "
    filled = sum(min(pages.size, max(0, _held(source, pages, page))) for page in used)
    return said + f"{percent(filled / slots if slots else 0.0)} of the slots hold a token."


def _held(source: Source, pages: Pages, page: int) -> int:
    """Slots of a page that hold a token, by the sequence that fills most of them."""
    found = 0
    for table, (_, length) in zip(pages.tables, source.trace.lengths, strict=True):
        if page in table:
            found = max(found, min(pages.size, length - table.index(page) * pages.size))
    return found


def picture(source: Source, pages: Pages) -> Markup:
    """A row for each sequence, a box for each page; its bar is the share of the sequence's weight on it."""
    used, content, y = uses(pages), [], 8.0
    wide = max((min(len(table), _PAGES) for table in pages.tables), default=1)
    for b, table in enumerate(pages.tables[:_SEQUENCES]):
        found = shares(source, pages, b)
        top = max(found, default=0.0) or 1.0
        content.append(write(0, y + 22, f"sequence {b}", "t mute"))
        kept = list(range(len(table)))
        if len(kept) > _PAGES:
            kept = [*kept[: _PAGES // 2], *kept[-(_PAGES - _PAGES // 2) :]]
        for place, n in enumerate(kept):
            x = 84.0 + 50 * place + (14 if n >= _PAGES // 2 and len(table) > _PAGES else 0)
            content += _box(x, y, table[n], found[n] / top if found else 0.0, used[table[n]])
        if len(table) > _PAGES:
            content.append(write(84.0 + 50 * (_PAGES // 2) + 2, y + 22, "…", "t mute", "middle"))
        y += 48
    if len(pages.tables) > _SEQUENCES:
        content.append(write(0, y + 12, f"and {len(pages.tables) - _SEQUENCES} sequences more", "t mute"))
        y += 20
    width = 84 + 50 * wide + 20
    label = "Page tables: a row for each sequence, a box for each page, with the weight it receives"
    return svg(width, y, joined(content), label=label, width_=f"{width}", height_=f"{y:g}")


def _box(x: float, y: float, page: int, part: float, users: int) -> list[Markup]:
    if page < 0:
        return [box(x, y, 44, 38, "ghost", 4), write(x + 22, y + 22, "–", "t mute", "middle")]
    parts = [
        box(x, y, 44, 38, "sheet k" if users > 1 else "sheet", 4),
        box(x + 4, y + 30, max(0.5, 36 * part), 4, "area strong", 1),
        write(x + 22, y + 21, f"{page:,}", "t num", "middle"),
    ]
    return [*parts, write(x + 41, y + 10, f"×{users}", "t num mute tiny", "end")] if users > 1 else parts


def sequences(source: Source, pages: Pages) -> Markup:
    """A row for each sequence."""
    used, body = uses(pages), []
    for b, table in enumerate(pages.tables[:_SEQUENCES]):
        found = shares(source, pages, b)
        most = max(range(len(found)), key=lambda n: found[n]) if found else None
        top = "–" if most is None else f"page {table[most]:,} ({percent(found[most])})"
        numbers = (
            f"{source.trace.lengths[b][1]:,}", f"{sum(p >= 0 for p in table):,}",
            f"{sum(p >= 0 and used[p] > 1 for p in table):,}", f"{sum(p < 0 for p in table):,}",
        )  # fmt: skip
        cells = (node("td", n, class_="n") for n in numbers)
        body.append(node("tr", node("th", str(b), scope="row"), *cells, node("td", top)))
    names = ("tokens", "pages", "shared", "given back")
    top_row = node(
        "tr",
        node("th", "sequence", scope="col"),
        *(node("th", n, scope="col", class_="n") for n in names),
        node("th", "most weight", scope="col"),
    )
    table_ = node("table", node("caption", "Sequences", class_="hush"), node("thead", top_row), node("tbody", *body))
    return scrolled(table_, "Table of sequences")


def slots(source: Source, pages: Pages, names: Names) -> Markup:
    """The pages of sequence 0: which slot holds which token."""
    table, length, found, used = pages.tables[0], source.trace.lengths[0][1], shares(source, pages, 0), uses(pages)
    kept = (
        range(len(table))
        if len(table) <= _LISTED
        else [*range(_LISTED // 2), *range(len(table) - _LISTED // 2, len(table))]
    )
    body = []
    for n in kept:
        start, stop = n * pages.size, min(length, (n + 1) * pages.size)
        first, last = names("k", start), names("k", stop - 1)
        texts = (
            [token(first), " … ", token(last)]
            if first and last and stop - start > 1
            else [token(first)]
            if first
            else []
        )
        gone = table[n] < 0
        cells = (
            node("td", "given back" if gone else f"{table[n]:,}", class_="n"),
            node("td", f"{start:,} to {stop - 1:,}", class_="n"),
            node("td", f"0 to {stop - start - 1}", class_="n"),
            node("td", "–" if gone else f"{used[table[n]]}", class_="n"),
            node("td", "–" if not found else percent(found[n]), class_="n"),
            node("td", *texts),
        )
        body.append(node("tr", node("th", str(n), scope="row"), *cells))
    heads = ("page", "keys", "in slots", "sequences on it", "weight")
    top = node(
        "tr",
        node("th", "entry", scope="col"),
        *(node("th", n, scope="col", class_="n") for n in heads),
        node("th", "tokens", scope="col"),
    )
    left = len(table) - len(body)
    said = f"The page table of sequence 0: key j lies in slot j mod {pages.size} of entry ⌊j / {pages.size}⌋"
    caption = node("caption", said + (f"; {left:,} entries in between are left out" if left else ""))
    return scrolled(
        node("table", caption, node("thead", top), node("tbody", *body), class_="steps"), "Page table of sequence 0"
    )


def largest(source: Source, pages: Pages) -> str:
    """Where the weight is, in words."""
    found = [(x, b, n) for b in range(len(source.trace.lengths)) for n, x in enumerate(shares(source, pages, b))]
    if not found:
        return ""
    share, b, n = max(found, key=lambda x: (x[0], -x[1], -x[2]))
    page = pages.tables[b][n]
    cold = sum(1 for x in found if x[0] < 1e-4)
    said = f"The hottest is page {page:,} of sequence {b}: {percent(share)} of its weight."
    return said + (f" {counted(cold, 'page receives', 'pages receive')} less than {digits(1e-4, 1)}." if cold else "")
