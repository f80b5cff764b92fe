"""A sheet to draw on, in the colours of a theme: what the course's pictures share. Text stays legible at 340 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from draw import FONT, THEMES

WIDTH = 480  # of every picture of the course; at 340 pixels a letter of SMALL is 10 pixels high
SMALL, PLAIN, LARGE = 14, 15, 17
MONO = "font-family=\"ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace\""
# Colours of heads, sequences and documents: apart in both themes, and in grey.
HUES = {"light": ("#0969da", "#bf5700", "#1a7f37", "#8250df"), "dark": ("#4493f8", "#f0883e", "#3fb950", "#ab7df8")}
INK = {"light": "#ffffff", "dark": "#0d1117"}  # of text on a full colour
FULL = {"light": 0.55, "dark": 0.75}  # from this opacity on a colour counts as full

Rows = Sequence[Sequence[float]]


class Sheet:
    """Collects the elements of an SVG."""

    def __init__(self, theme: str, height: float, title: str) -> None:
        self.theme, self.c, self.hues = theme, THEMES[theme], HUES[theme]
        view = f'viewBox="0 0 {WIDTH} {height:g}" {FONT} role="img"'
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {view}>', f"<title>{escape(title)}</title>"]

    def svg(self) -> str:
        """The picture as text."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = PLAIN,
        fill: str = "text",
        *,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """Words on a baseline; `fill` is the name of a theme's colour, or a colour."""
        extra = f' text-anchor="{anchor}"' if anchor != "start" else ""
        extra += ' font-weight="600"' if bold else ""
        extra += f" {MONO}" if mono else ""
        drawn = escape(words, quote=False).replace("  ", " \u00a0")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{self.c.get(fill, fill)}"{extra}>{drawn}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "panel",
        *,
        opacity: float = 1.0,
        line: str | None = "line",
        corner: float = 3,
        dash: bool = False,
    ) -> None:
        """A rectangle; `line` None has no border."""
        edge = (
            "" if line is None else f' stroke="{self.c.get(line, line)}"' + (' stroke-dasharray="4 3"' if dash else "")
        )
        seen = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
        size = f'width="{width:g}" height="{height:g}" rx="{corner:g}"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} fill="{self.c.get(fill, fill)}"{seen}{edge}/>')

    def line(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        stroke: str = "muted",
        width: float = 1.5,
        opacity: float = 1.0,
    ) -> None:
        """A straight line."""
        seen = "" if opacity == 1 else f' stroke-opacity="{opacity:.2f}"'
        colour = self.c.get(stroke, stroke)
        ends = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
        self.parts.append(f'<line {ends} stroke="{colour}" stroke-width="{width:.1f}"{seen}/>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float, stroke: str = "muted", width: float = 1.5) -> None:
        """A straight line with a head at its end."""
        self.line(x0, y0, x1, y1, stroke, width)
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        ux, uy = (x1 - x0) / length * 7, (y1 - y0) / length * 7
        corners = ((x1, y1), (x1 - ux - uy / 2, y1 - uy + ux / 2), (x1 - ux + uy / 2, y1 - uy - ux / 2))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self.parts.append(f'<polygon points="{points}" fill="{self.c.get(stroke, stroke)}"/>')

    def cell(
        self, x: float, y: float, width: float, height: float, share: float, words: str = "", hue: str = ""
    ) -> None:
        """A cell of a matrix: its colour says how large it is (0 to 1), and words what it holds."""
        colour = hue or self.c["accent"]
        if share < 0.005:
            self.box(x, y, width - 2, height - 2, "panel")
        else:
            self.box(x, y, width - 2, height - 2, colour, opacity=min(share, 1.0))
        ink = INK[self.theme] if share >= FULL[self.theme] else "text"
        if words:
            self.text(x + width / 2 - 1, y + height / 2 + 4, words, SMALL, ink, anchor="middle")

    def matrix(
        self,
        x: float,
        y: float,
        rows: Rows,
        width: float,
        height: float,
        *,
        say: Callable[[float], str] | None = None,
        share: Callable[[float], float] = float,
        hue: str = "",
    ) -> None:
        """Cells in rows and columns; `say` writes a number, `share` turns it into a strength of colour."""
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                words = say(number) if say else ""
                self.cell(x + width * j, y + height * i, width, height, share(number), words, hue)
