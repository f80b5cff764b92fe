"""HTML as values: a node escapes what it is given, so a text cannot become an element wherever it comes from."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from typing import Any

_EMPTY = frozenset({"meta", "input", "br", "hr"})
_DRAWN = frozenset({"rect", "path", "line", "circle"})  # of SVG, where an element without content has to be closed


class Markup(str):
    """Text that is HTML already: made by `node` and `joined`, and by nothing else."""

    __slots__ = ()


def escaped(content: str) -> Markup:
    """A text as HTML that shows it; markup stays what it is.

    >>> escaped("a < b"), escaped(node("b", "<"))
    ('a &lt; b', '<b>&lt;</b>')
    """
    return content if isinstance(content, Markup) else Markup(html.escape(content, quote=True))


def joined(parts: Iterable[str | None], between: str = "") -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup(escaped(between).join(escaped(part) for part in parts if part is not None))


def node(tag: str, *content: str | None, **attributes: Any) -> Markup:
    """An element. Attributes: `_` stands for `-`, `class_` is class; True is an empty attribute, None or False none.

    >>> node("a", "1 < 2", None, class_="x", data_no=3, hidden=True, title=None)
    '<a class="x" data-no="3" hidden>1 &lt; 2</a>'
    """
    written = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{html.escape(str(value), quote=True)}"')
    if tag in _DRAWN:
        return Markup(f"<{tag}{''.join(written)}/>")
    opened = f"<{tag}{''.join(written)}>"
    return Markup(opened if tag in _EMPTY else f"{opened}{joined(content)}</{tag}>")


def data(name: str, value: Any) -> Markup:
    """JSON in a script element that no browser runs and no text can end: < is written as \\u003c, and > and & alike."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(f'<script type="application/json" id="{name}">{text}</script>')


def code(tag: str, text: str) -> tuple[Markup, str]:
    """A style or script element of a text of ours, and the source by which a content security policy allows it."""
    if "</" in text or "<!--" in text:
        raise AssertionError("a style or script of the page would end early")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"<{tag}>{text}</{tag}>"), f"'sha256-{digest}'"
