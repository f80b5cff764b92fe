"""A trace as one page of HTML: opened from disk, with nothing loaded and nothing sent."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from qkv.insight.page import content as gathering, frame, lookup, palette, sections
from qkv.insight.page.markup import Markup, code, data, joined, node
from qkv.insight.page.source import Source
from qkv.insight.record import Record

__all__ = ["document", "framed"]

NOTEBOOK = 1_000_000
"""Bytes of data of a page in a notebook, which keeps every one that it ever showed."""


def document(trace: Record, rows: Sequence[int] = (), *, budget: int = gathering.BUDGET) -> str:
    """The page of a trace, as text; `rows` are queries to show in full besides those that are chosen."""
    content = gathering.gather(Source(trace), rows, budget)
    style, style_source = code("style", palette.style() + _file("page.css"))
    script, script_source = code("script", _file("page.js"))
    policy = (
        f"default-src 'none'; style-src {style_source}; script-src {script_source}; base-uri 'none'; form-action 'none'"
    )
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=policy),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("meta", name="referrer", content="no-referrer"),
        node("title", "qkv: what this attention did"),
        style,
    )
    made = [
        sections.shapes(content), sections.mask(content), sections.heads(content), sections.map_(content),
        lookup.query(content), lookup.pages(content), lookup.flash(content), lookup.reproduce(content),
    ]  # fmt: skip
    main = node("main", sections.verdict(content), _bar(), *made, id="top")
    body = node("body", _contents(made[-3] is not None), main, data("trace", gathering.data(content, budget)), script)
    return "<!doctype html>\n" + node("html", head, body, lang="en")


def framed(trace: Record) -> str:
    """The page in a frame: nothing of the notebook's reaches it, nor it the notebook, and there may be many."""
    page = document(trace, budget=NOTEBOOK)
    return node(
        "iframe",
        srcdoc=page,
        sandbox="allow-scripts allow-downloads",
        loading="lazy",
        width="100%",
        height="720",
        title="qkv: what this attention did",
        style="border:1px solid #8884;border-radius:8px",
    )


def _contents(paged: bool) -> Markup:
    shown = [name for name in frame.TITLES if paged or name != "pages"]
    items = joined(node("li", node("a", frame.TITLES[name], href=f"#{name}")) for name in shown)
    return node("nav", node("ol", items), aria_label="Contents", class_="contents")


def _bar() -> Markup:
    """The controls that all sections share; the script fills them."""
    return node("div", id="bar", class_="bar js-only", role="toolbar", aria_label="What is shown")


def _file(name: str) -> str:
    return files("qkv.insight.page").joinpath(name).read_text(encoding="utf-8")
