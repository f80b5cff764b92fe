"""Time and memory against length, for a terminal and as SVG; both axes by powers: what is linear rises evenly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from xml.sax.saxutils import escape

from qkv.backends.amounts import duration
from qkv.cli.demo.contenders import HEADS, MASK, SIZE
from qkv.cli.demo.lengths import Found, Line
from qkv.insight.terminal import amount, fit, paint

MARKS, COLOURS = "●○△", ("cyan", "yellow", "")
_ROWS = 11
_WIDTH, _HEIGHT, _PANEL, _TOP, _LEFT = 760, 400, 300, 92, 62
_LINES = {"light": ("#0969da", "#bf5700", "#8c959f"), "dark": ("#4493f8", "#f0883e", "#656c76")}
_INK = {"light": ("#1f2328", "#59636e", "#d1d9e0"), "dark": ("#f0f6fc", "#9198a1", "#3d444d")}


def drawn(found: Found, width: int) -> list[str]:
    """Two charts under each other, and what their marks mean."""
    legend = "   ".join(paint(f"{mark} {line.name}", *style(c)) for mark, line, c in _marked(found))
    return [
        *_chart(found, "time", lambda line: line.times, duration, width),
        *_chart(found, "memory with inputs", lambda line: line.bytes, _bytes, width),
        legend,
    ]


def style(colour: str) -> tuple[str]:
    return (colour or "dim",)


def _marked(found: Found) -> Iterable[tuple[str, Line, str]]:
    return zip(MARKS, found.lines, COLOURS, strict=False)


def _bytes(n: float) -> str:
    return amount(n, "B", 1024)


def _chart(
    found: Found, title: str, of: Callable[[Line], Mapping[int, float]], said: Callable[[float], str], width: int
) -> list[str]:
    longs = sorted(found.lines[0].times)
    values = [v for line in found.lines for v in of(line).values()]
    low, high = math.log(min(values)), math.log(max(values))
    left = max(len(said(min(values))), len(said(max(values)))) + 1
    wide = width - left - 6
    grid = [[" "] * wide for _ in range(_ROWS)]
    for mark, line, colour in reversed(list(_marked(found))):
        for L, value in of(line).items():
            column = round((wide - 1) * _part(math.log(L), math.log(longs[0]), math.log(longs[-1])))
            grid[_ROWS - 1 - round((_ROWS - 1) * _part(math.log(value), low, high))][column] = paint(
                mark, *style(colour)
            )
    labels = {0: said(max(values)), _ROWS - 1: said(min(values))}
    lines = [f"{labels.get(row, ''):>{left}}│{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    ends = f"{longs[0]:,}", f"{longs[-1]:,} tokens"
    axis = f"{'':>{left}}└{'─' * wide}"
    return [fit(title, width), *lines, axis, f"{'':>{left}} {ends[0]}{ends[1]:>{max(1, wide - len(ends[0]))}}"]


def _part(x: float, low: float, high: float) -> float:
    return (x - low) / (high - low) if high > low else 0.5


def svg(found: Found, theme: str = "") -> str:
    """The two charts side by side; without a theme it follows the reader's."""
    title = f"{MASK!r}: {max(found.lines[0].times):,} tokens, {HEADS} heads, D {SIZE}, bfloat16"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img"><title>{escape(title)}</title><style>{_style(theme)}</style>',
        _text(16, 26, title, "t"),
    ]
    for n, line in enumerate(found.lines):
        x = 16 + 235 * n
        parts += [f'<circle class="l{n}" cx="{x + 5}" cy="46" r="5"/>', _text(x + 16, 50, line.name, "n")]
    parts += _panel(found, 0, "time of a call", lambda line: line.times, duration)
    parts += _panel(found, 1, "memory with inputs and output", lambda line: line.bytes, _bytes)
    for n, line in enumerate(line for line in found.lines if line.stopped):
        parts.append(_text(16, _HEIGHT - 26 + 16 * n, f"{line.name} stops: {line.stopped}", "n"))
    return "\n".join([*parts, "</svg>\n"])


def _style(theme: str) -> str:
    def of(name: str) -> str:
        (ink, soft, rule), hues = _INK[name], _LINES[name]
        lines = "".join(f".l{n}{{fill:{hue};stroke:{hue}}}" for n, hue in enumerate(hues))
        return f".t,.p{{fill:{ink}}}.n{{fill:{soft}}}.r{{stroke:{rule}}}{lines}"

    common = (
        ".t{font:600 15px system-ui,sans-serif}.p{font:600 13px system-ui,sans-serif}"
        ".n{font:12px system-ui,sans-serif}path{fill:none!important;stroke-width:2}.x{stroke-dasharray:3 4}"
    )
    if theme:
        return common + of(theme)
    return f"{common}{of('light')}@media (prefers-color-scheme:dark){{{of('dark')}}}"


def _panel(
    found: Found, n: int, title: str, of: Callable[[Line], Mapping[int, float]], said: Callable[[float], str]
) -> list[str]:
    left, high, bottom = _LEFT + n * (_PANEL + 78), 210, _TOP + 24 + 210
    longs = sorted(found.lines[0].times)
    expected = [(L, s if n == 0 else b) for L, s, b in (line.expected for line in found.lines if line.expected)]
    values = [v for line in found.lines for v in of(line).values()] + [v for _, v in expected if v > 0]
    low, top = min(values), max(values)

    def at(L: int, value: float) -> str:
        x = left + _PANEL * _part(math.log(L), math.log(longs[0]), math.log(longs[-1]))
        return f"{x:.1f} {bottom - high * _part(math.log(value), math.log(low), math.log(top)):.1f}"

    parts = [
        _text(left, _TOP, title, "p"),
        *(f'<path class="r" d="M{left} {y:.1f}h{_PANEL}"/>' for y in (bottom - high, bottom - high / 2, bottom)),
        *(
            _text(left - 6, bottom - high * part + 4, said(math.exp(_between(low, top, part))), "n", "end")
            for part in (0.0, 0.5, 1.0)
        ),
        _text(left, bottom + 18, f"{longs[0]:,}", "n"),
        _text(left + _PANEL, bottom + 18, f"{longs[-1]:,} tokens", "n", "end"),
    ]
    for number, line in reversed(list(enumerate(found.lines))):  # ours on top
        points = [at(L, v) for L, v in sorted(of(line).items())]
        if points:
            parts.append(f'<path class="l{number}" d="M{"L".join(points)}"/>')
        if line.expected and points and (value := line.expected[1 + n]) > 0:
            parts.append(f'<path class="l{number} x" d="M{points[-1]}L{at(line.expected[0], value)}"/>')
        for point in points:
            x, y = point.split()
            parts.append(f'<circle class="l{number}" cx="{x}" cy="{y}" r="3"/>')
    return parts


def _between(low: float, high: float, part: float) -> float:
    return math.log(low) + part * (math.log(high) - math.log(low))


def _text(x: float, y: float, text: str, class_: str, anchor: str = "start") -> str:
    return f'<text class="{class_}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
