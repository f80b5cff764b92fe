"""What every section of the page is made of: its heading, its pictures with the buttons that save them."""

from __future__ import annotations

from qkv.insight.page.markup import Markup, node

TITLES = {
    "verdict": "What was found",
    "shapes": "Shapes, from x to the output",
    "mask": "Who may see whom",
    "heads": "Heads at a glance",
    "map": "Where queries look",
    "query": "One query in full",
    "pages": "Pages of the cache",
    "flash": "The same row, tile by tile",
    "reproduce": "How to make this page again",
}


def section(name: str, *content: str | None, lead: str = "") -> Markup:
    """A section with its title and the sentence that it opens with; the style numbers them."""
    head = node("h2", TITLES[name], id=f"{name}-title")
    opening = node("p", lead, class_="lead") if lead else None
    return node("section", head, opening, *content, id=name, aria_labelledby=f"{name}-title")


def figure(name: str, picture: Markup, *below: str | None, class_: str = "") -> Markup:
    """A picture, with the buttons that save it."""
    save = node(
        "span",
        *(
            node(
                "button",
                kind.upper(),
                type="button",
                class_="save",
                data_kind=kind,
                data_of=name,
                aria_label=f"Save this picture as {kind.upper()}",
            )
            for kind in ("svg", "png")
        ),
        class_="saves js-only",
    )
    return node("figure", picture, save, *below, id=f"fig-{name}", class_=class_ or None)
