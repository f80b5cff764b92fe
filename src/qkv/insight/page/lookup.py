"""The page's sections on one query: number by number, on which pages its keys lie, tile by tile; then how."""

from __future__ import annotations

from typing import Any

from qkv.insight.page import pages as cache, tables
from qkv.insight.page.content import Content
from qkv.insight.page.frame import figure, section
from qkv.insight.page.markup import Markup, joined, node
from qkv.insight.page.text import counted, digits, percent, plain, token


def query(content: Content) -> Markup:
    if not content.rows or not content.rows[0]:
        return section("query", _no_tensors(content))
    found = content.rows[0][0]
    text = content.names("q", found["i"])
    asks = node(
        "p",
        f"Query {found['i']:,} ",
        token(text) if text else None,
        " of ",
        node("b", content.first.name),
        id="query-who",
    )
    cards = node(
        "div",
        _card("q", "The query asks", "its vector q, compared with every key by one product"),
        _card("k", "Keys advertise", "q · k is large where what is offered is what is asked"),
        _card("v", "Values are passed on", "weight × v, added up over the keys: the output"),
        class_="cards",
    )
    picker = node("div", id="query-picker", class_="tabs js-only", role="group", aria_label="Queries")
    head = node("div", asks, node("p", _answer(content, found), id="query-says", class_="said"), aria_live="polite")
    table = tables.query(content.source, found, content.names)
    lead = (
        "A dictionary whose equality is soft: an exact one compares the query with every key and returns one value; "
        "this one returns all values, each as much as its key fits."
    )
    order = node("div", id="query-order", class_="tabs js-only", role="group", aria_label="Order of the keys")
    return section(
        "query",
        cards,
        picker,
        head,
        order,
        table,
        node("p", _rest(found), id="query-rest", class_="mute"),
        _proof(content, found),
        lead=lead,
    )


def _card(colour: str, title: str, what: str) -> Markup:
    return node("div", node("h3", title), node("p", what), class_=f"card {colour}")


def _answer(content: Content, found: dict[str, Any]) -> str:
    if found["seen"] == 0:
        return "It sees no key: its output is 0."
    place = int(found["weight"].argmax())
    key, weight = int(found["keys"][place]), float(found["weight"].float()[place])
    text = content.names("k", key)
    best = f"key {key:,}{f' “{text}”' if text else ''} answers best: it has {percent(weight)} of the weight"
    return f"Of {counted(found['seen'], 'visible key')}, {best}."


def _rest(found: dict[str, Any]) -> str:
    count, weight, seen = found["rest"]
    end = f"lse = {digits(found['lse'] or 0.0)}; the output has length {digits(found['size'] or 0.0)}."
    if not count:
        return f"All keys are listed. {end}"
    left = f"Not listed: {counted(count, 'key')}, {seen:,} of them visible, with {percent(weight)} of the weight."
    return f"{left} {end}"


def _proof(content: Content, found: dict[str, Any]) -> Markup:
    three = (
        ("Weight", "where the query looked. It says nothing of what was there."),
        (
            "Weight × |v|",
            "how much was passed on. A sink has much weight and a short value. Two long values may cancel.",
        ),
        (
            "Without it",
            "how far the output moves when the key is taken away and the others share its weight. One key at a time: "
            "two that say the same cover for each other.",
        ),
    )
    items = joined(node("div", node("dt", name), node("dd", what)) for name, what in three)
    return node(
        "aside",
        node("h3", "What weights do not prove"),
        node("dl", items, class_="three"),
        node("p", unique(content.source.Dv, found["seen"]), id="query-unique"),
        class_="notice",
    )


def unique(Dv: int, seen: int) -> str:
    """Whether other weights could have given the row's output."""
    if seen > Dv + 1:
        return (
            f"This row sees {seen:,} keys, its values have {Dv:,} numbers. Infinitely many other weights give the same "
            f"output: {Dv + 1:,} keys are always enough (Carathéodory). The weights are what this model computed, not "
            "the only account of it."
        )
    few = f"This row sees {counted(seen, 'key')}, its values have {Dv:,} numbers"
    return f"{few}: unless its values depend on each other, no other weights give this output."


def pages(content: Content) -> Markup | None:
    """The page table, where the keys came from a paged cache."""
    s = content.source
    table = s.trace.pages
    if table is None or not table.tables:
        return None
    lead = (
        "Keys and values lie on pages, wherever there was room, and a table for each sequence says where. Pages save "
        "memory and let prompts be shared; the arithmetic is that of any other attention, and so are its results."
    )
    drawn = cache.picture(s, table)
    picture = node("div", drawn, class_="wide pages", tabindex="0", role="region", aria_label="Picture of the pages")
    said = node("p", cache.words(s, table), " ", cache.largest(s, table), class_="said")
    bar = node(
        "p",
        "Each box is a page, in the order of its sequence’s tokens: tinted and marked ×2 where two sequences share it, "
        "dashed where it was given back. Its bar is its part of the sequence’s weight, over the heads shown here.",
        class_="mute",
    )
    listed = (cache.sequences(s, table), cache.slots(s, table, content.names))
    return section("pages", said, figure("pages", picture), bar, *listed, lead=lead)


def flash(content: Content) -> Markup:
    if not content.rows or not content.rows[0]:
        return section("flash", _no_tensors(content))
    found = content.rows[0][0]
    lead = (
        "Fast kernels never see a whole row of scores. They take a tile of keys at a time and keep three things: the "
        "largest score so far m, the sum l of exp(s − m), and the output so far. When m grows, l and the output are "
        "rescaled."
    )
    player = node(
        "div", id="player", class_="player js-only", tabindex="0", role="group", aria_label="Tiles: arrow keys step"
    )
    end = node("p", _end(found), id="flash-end", class_="said")
    return section(
        "flash",
        figure("flash", node("div", id="flash-live", class_="live js-only")),
        player,
        tables.tiles(found, content.first.Lk),
        end,
        lead=lead,
    )


def _end(found: dict[str, Any]) -> str:
    tiles = found["tiles"]["outs"]
    last = ", ".join(digits(x) for x in tiles[-1, :4].tolist()) if len(tiles) else "0"
    said = f"After the last tile the output begins {last}."
    if "kernel" in found:
        given = ", ".join(digits(x or 0.0) for x in found["kernel"][:4])
        said += f" The call returned {given}: the largest difference is {digits(found['off'] or 0.0, 2)}."
    return said


def _no_tensors(content: Content) -> Markup:
    if content.source.held:
        return node("p", "This call has no query.", class_="mute")
    said = (
        "This needs q, k and v, and the trace has them no more: it was read from a file. Make the page where they are, "
        "with qkv.see(q, k, v, …).html(path)."
    )
    return node("p", said, class_="mute")


def reproduce(content: Content) -> Markup:
    versions = ", ".join(f"{name} {number}" for name, number in content.versions)
    return section(
        "reproduce",
        node("pre", node("code", _code(content)), tabindex="0", role="region", aria_label="Code"),
        node(
            "p",
            versions + ". The same tensors give the same page, to the byte: nothing in it is drawn at random.",
            class_="mute",
        ),
        node(
            "details",
            node("summary", "The plan of the call"),
            node("pre", plain(content.source.trace.plan), tabindex="0", role="region", aria_label="Plan"),
        ),
        node(
            "p",
            "Nothing is loaded and nothing is sent: this file’s own policy (default-src 'none') forbids it.",
            class_="mute",
        ),
    )


def _code(content: Content) -> str:
    s, t = content.source, content.source.trace
    given = [
        f"# q {(s.B, s.Hq, s.Lq, s.D)}, k {(s.B, s.Hkv, s.Lk, s.D)}, v {(s.B, s.Hkv, s.Lk, s.Dv)}",
        f"# {t.dtype} on {t.device}",
    ]
    if t.seed is not None:
        given.append(f"torch.manual_seed({t.seed})  # before q, k and v are made")
    more = [f"scale={t.scale:.17g}"]
    more += [f"softcap={t.softcap:g}"] if t.softcap is not None else []
    more += ["bias=...  # " + ", ".join(t.bias)] if t.bias else []
    more += ["sinks=..."] if s.has_sinks else []
    more += [f"heads={list(t.heads)}"] if len(t.heads) != s.Hq else []
    more += ["tokens=..."] if t.tokens is not None else []
    mask = "" if t.mask == "none" else f"    mask={plain(t.mask)},\n"
    arguments = f"    q, k, v,\n{mask}" + "".join(
        f"    {one},\n" for one in [*more, f'backend="{t.backend}"'] if "#" not in one
    )
    arguments += "".join(f"    {one}\n" for one in more if "#" in one)
    return "\n".join([*given, "import qkv", "", f"t = qkv.see(\n{arguments})", 't.html("attention.html")'])
