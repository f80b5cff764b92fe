"""Draws the README's pictures from numbers that qkv computes: a lookup, and masks. Run: python docs/pictures/draw.py"""

from __future__ import annotations

from pathlib import Path

import torch

import qkv

# Five entries filed under what they are like; the value of each is its colour. "strawberry" is not among them.
LIKE = ("fruit", "small", "sour", "water", "cold")
QUERY = ("strawberry", (1.0, 1.0, 0.3, 0.0, 0.0))
ENTRIES = (
    ("cherry", (1.0, 1.0, 0.4, 0.0, 0.0), (176, 24, 56)),
    ("apple", (1.0, 0.5, 0.3, 0.0, 0.0), (214, 58, 44)),
    ("lime", (1.0, 0.2, 1.0, 0.0, 0.0), (132, 190, 52)),
    ("sea", (0.0, 0.0, 0.0, 1.0, 0.4), (38, 112, 184)),
    ("snow", (0.0, 0.2, 0.0, 0.5, 1.0), (226, 234, 242)),
)
SCALE = 3.0

THEMES = {
    "light": {"text": "#1f2328", "muted": "#59636e", "panel": "#f6f8fa", "line": "#d1d9e0", "accent": "#0969da"},
    "dark": {"text": "#f0f6fc", "muted": "#9198a1", "panel": "#151b23", "line": "#3d444d", "accent": "#4493f8"},
}
# Eight queries (rows) and keys (columns). What is written is what is drawn; a bias is shown as the weights that it
# leaves of equal scores, each row's largest in full colour.
MASKS = (
    ("every earlier key", "qkv.causal()"),
    ("the last three", "qkv.sliding_window(3)"),
    ("two texts in one row", "qkv.documents([3, 5])\n& qkv.causal()"),
    ("a prompt sees itself", "qkv.causal() | qkv.prefix(3)"),
    ("the first, and the last three", "qkv.causal() & (qkv.prefix(1)\n| qkv.sliding_window(3))"),
    ("neighbours, and one for all", "qkv.longformer(2, [4])"),
)
SCORES = (
    ("less, the farther away", "qkv.alibi([0.5])"),
    ("any function of a score", "qkv.score_mod(\n  lambda s, b, h, p, j:\n  s - 0.1 * (p - j) ** 2)"),
)
LENGTH, CELL = 8, 13
FONT = "font-family=\"ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""
WIDTH, HEIGHT, TOP, STEP = 556, 330, 84, 40  # narrow, so that a phone leaves letters of nine pixels
QUERY_X, KEY_X, BAR_X, VALUE_X, OUT_X = 8, 146, 292, 422, 496
BAR = 68


def lookup() -> tuple[list[float], list[float]]:
    """Return the five weights, and the colour that comes back."""
    q = torch.tensor(QUERY[1]).view(1, 1, 1, -1)
    k = torch.tensor([key for _, key, _ in ENTRIES]).view(1, 1, len(ENTRIES), -1)
    v = torch.tensor([value for _, _, value in ENTRIES]).float().view(1, 1, len(ENTRIES), 3)
    weights = qkv.weights(q, k, scale=SCALE)
    return weights.flatten().tolist(), qkv.attention(q, k, v, scale=SCALE).flatten().tolist()


class Pen:
    """Writes the elements of an SVG in the colours of a theme."""

    def __init__(self, theme: str) -> None:
        self.c = THEMES[theme]

    def text(self, x: float, y: float, words: str, size: float = 14, fill: str = "text", extra: str = "") -> str:
        return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{self.c[fill]}" {extra}>{words}</text>'

    def box(self, x: float, y: float, width: float, height: float, round_: int, fill: str, line: bool = True) -> str:
        stroke = f' stroke="{self.c["line"]}"' if line else ""
        size = f'width="{width:g}" height="{height:g}" rx="{round_}"'
        return f'<rect x="{x:g}" y="{y:g}" {size} fill="{fill}"{stroke}/>'

    def curve(self, x0: float, y0: float, x1: float, y1: float, stroke: str, width: float, opacity: float) -> str:
        bend = (x1 - x0) * 0.45
        path = f"M{x0:g} {y0:g} C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}"
        brush = f'stroke="{stroke}" stroke-width="{width:.1f}" stroke-opacity="{opacity:.2f}"'
        return f'<path d="{path}" fill="none" {brush}/>'

    def vector(self, x: float, y: float, numbers: tuple[float, ...]) -> str:
        return "".join(
            f'<rect x="{x + 17 * n:g}" y="{y - 7:g}" width="14" height="14" rx="3" fill="{self.c["accent"]}" '
            f'fill-opacity="{0.06 + 0.94 * number:.2f}" stroke="{self.c["line"]}"/>'
            for n, number in enumerate(numbers)
        )


def picture(theme: str) -> str:
    """Return the SVG text for one theme."""
    pen = Pen(theme)
    weights, out = lookup()
    middle = TOP + STEP * (len(ENTRIES) - 1) / 2
    mixed = f"rgb({','.join(str(round(part)) for part in out)})"
    told = (
        "A dictionary would raise KeyError: 'strawberry'.",
        "Attention compares it with every key, and mixes the values.",
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="680" {FONT} role="img">',
        "<title>A query is compared with every key; the weights say how much of each value comes back</title>",
        *_heads(pen),
        *_query(pen, middle),
        *_entries(pen, middle, weights),
        pen.box(OUT_X, middle - 26, 52, 52, 10, mixed),
        *(pen.text(QUERY_X, HEIGHT - 30 + 20 * n, line, 15, "muted") for n, line in enumerate(told)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _heads(pen: Pen) -> list[str]:
    bold = 'font-weight="700"'
    return [
        pen.text(QUERY_X, 28, "Q", 20, "accent", bold),
        pen.text(QUERY_X + 20, 28, "what I look for", 15, "muted"),
        pen.text(KEY_X, 28, "K", 20, "accent", bold),
        pen.text(KEY_X + 20, 28, "what it is like", 15, "muted"),
        pen.text(BAR_X, 28, f"softmax({SCALE:g} q·k)", 14.5, "text", 'font-weight="600"'),
        pen.text(BAR_X, 48, "weights, sum 1", 15, "muted"),
        pen.text(VALUE_X, 28, "V", 20, "accent", bold),
        pen.text(VALUE_X, 48, "colour", 15, "muted"),
        pen.text(OUT_X, 28, "out", 18, "accent", bold),
        pen.text(OUT_X, 48, "Σ w·v", 15, "muted"),
    ]


def _query(pen: Pen, middle: float) -> list[str]:
    parts = [
        pen.box(QUERY_X, middle - 50, 114, 112, 10, pen.c["panel"]),
        pen.text(QUERY_X + 12, middle - 24, QUERY[0], 16, "text", 'font-weight="600"'),
        pen.vector(QUERY_X + 12, middle, QUERY[1]),
    ]
    for n, word in enumerate(LIKE):
        x, y = QUERY_X + 20 + 17 * n, middle + 18
        turned = f'text-anchor="start" transform="rotate(50 {x:g} {y:g})"'
        parts.append(pen.text(x - 2, y + 2, word, 14, "muted", turned))
    return parts


def _entries(pen: Pen, middle: float, weights: list[float]) -> list[str]:
    parts: list[str] = []
    for n, ((name, key, value), weight) in enumerate(zip(ENTRIES, weights, strict=True)):
        y = TOP + STEP * n
        colour = f"rgb{value}".replace(" ", "")
        parts += [
            pen.curve(QUERY_X + 114, middle, KEY_X - 4, y, pen.c["accent"], 1.5, 0.25 + 0.75 * weight),
            pen.vector(KEY_X, y, key),
            pen.text(KEY_X + 88, y + 5, name, 15),
            pen.box(BAR_X, y - 9, BAR, 18, 4, pen.c["panel"]),
            pen.box(BAR_X, y - 9, round(max(2.0, BAR * weight), 1), 18, 4, pen.c["accent"], line=False),
            pen.text(BAR_X + BAR + 7, y + 5, f"{weight:.2f}", 15, "text" if weight > 0.05 else "muted"),
            pen.curve(VALUE_X + 36, y, OUT_X, middle, colour, 1 + 22 * weight, 0.75),
            pen.box(VALUE_X, y - 13, 36, 26, 6, colour),
        ]
    return parts


def shades(code: str, bias: bool) -> list[list[float]]:
    """Return how much each query sees of each key, 0 to 1: of a mask, or of causal attention with a bias."""
    value = eval(f"({code})", {"qkv": qkv})
    if not bias:
        seen: list[list[float]] = value.tensor(LENGTH, LENGTH)[0, 0].float().tolist()
        return seen
    q = torch.zeros(1, 1, LENGTH, 1)
    p = qkv.weights(q, q, mask=qkv.causal(), bias=value)[0, 0]
    shown: list[list[float]] = (p / p.amax(-1, keepdim=True)).tolist()
    return shown


def masks(theme: str) -> str:
    """Return the SVG text of masks and score functions for one theme."""
    c = THEMES[theme]
    column, row, side = 220, 206, LENGTH * CELL
    mono = "font-family=\"ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace\""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {4 * column} {2 * row}" {FONT} role="img">',
        "<title>Masks and score functions: which keys (columns) each query (row) sees, with the code of each</title>",
    ]
    for n, (title, code) in enumerate(MASKS + SCORES):
        x0, y0, bias = 20 + column * (n % 4), 30 + row * (n // 4), n >= len(MASKS)
        parts.append(f'<text x="{x0}" y="{y0 - 10}" font-size="13" fill="{c["text"]}">{title}</text>')
        for i, line in enumerate(shades(code, bias)):
            for j, share in enumerate(line):
                fill = f'fill="{c["accent"]}" fill-opacity="{share:.2f}"' if share else f'fill="{c["panel"]}"'
                at = f'x="{x0 + CELL * j}" y="{y0 + CELL * i}" width="{CELL - 2}" height="{CELL - 2}" rx="2"'
                parts.append(f'<rect {at} {fill} stroke="{c["line"]}" stroke-width="0.5"/>')
        for at, part in enumerate((f"mask=qkv.causal(),\nbias={code}" if bias else code).split("\n")):
            drawn = part.replace("&", "&amp;").replace(" ", "\u00a0")
            y = y0 + side + 16 + 15 * at
            parts.append(f'<text x="{x0}" y="{y}" font-size="11.5" {mono} fill="{c["muted"]}">{drawn}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write the pictures for both themes beside this file."""
    for theme in THEMES:
        for name, draw in (("lookup", picture), ("masks", masks)):
            (Path(__file__).parent / f"{name}-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
