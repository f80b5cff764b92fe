"""Pictures of docs/gallery.md: the heads of the model that ships. They show what the page's own code computes."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sheet import FULL, INK, PLAIN, SMALL, Sheet
from torch import Tensor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gallery.md"
SHOWN, CELL = 48, 2  # bytes of the text that a map shows, and pixels of a byte
LEVELS = ((0.05, 0.25), (0.1, 0.4), (0.2, 0.6), (0.4, 0.8), (0.7, 1.0))  # from this weight on, this opacity


@cache
def page() -> dict[str, Any]:
    """Run the page's code on one thread, and return all that it names."""
    scope: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for code in re.findall(
                r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
            ):
                exec(compile(code, PAGE.name, "exec"), scope)
    finally:
        torch.set_num_threads(threads)
    return scope


def _map(s: Sheet, x: float, y: float, p: Tensor) -> None:
    """A head's weights in five strengths; runs of equal strength in a row are one stroke."""
    s.box(x, y, SHOWN * CELL, SHOWN * CELL, "panel", corner=0)
    level = sum((p >= least).long() for least, _ in LEVELS)
    for n, (_, opacity) in enumerate(LEVELS, start=1):
        path = ""
        for i, row in enumerate((level == n).tolist()):
            j = 0
            while j < SHOWN:
                run = next((at for at in range(j, SHOWN) if not row[at]), SHOWN) - j
                if run:
                    path += f"M{x + CELL * j:g} {y + CELL * i:g}h{CELL * run}v{CELL}h-{CELL * run}z"
                j += run + 1
        if path:
            s.parts.append(f'<path d="{path}" fill="{s.c["accent"]}" fill-opacity="{opacity}"/>')


def heads(theme: str) -> str:
    """All 24 heads, a map each."""
    p = page()["p"]
    s = Sheet(theme, 706, f"The weights of 24 heads on {SHOWN} bytes of text: rows are queries, columns keys")
    s.text(8, 20, f"rows: queries, columns: keys, the first {SHOWN} bytes", SMALL, "muted")
    for h in range(4):
        s.text(64 + 106 * h + SHOWN * CELL / 2, 44, f"head {h}", SMALL, "muted", anchor="middle")
    for layer in range(6):
        s.text(8, 104 + 106 * layer, f"layer {layer}", SMALL, "muted")
        for h in range(4):
            _map(s, 64 + 106 * h, 52 + 106 * layer, p[4 * layer + h, :SHOWN, :SHOWN])
    s.text(8, 698, "full colour: 0.7 of a query's weight or more; none: below 0.05", SMALL, "muted")
    return s.svg()


def scores(theme: str) -> str:
    """Each head's score for each kind, what shuffled texts give, and what a name takes."""
    found = page()
    left, wide, least = 130, 330, found["LEAST"]
    s = Sheet(theme, 278, "Scores of 24 heads for three kinds of head, with shuffled baselines and a threshold")
    s.text(8, 22, "mean weight on the pairs that a kind is about", bold=True, fill="accent")
    bottom = 214
    for tick in range(0, 11, 2):
        x = left + wide * tick / 10
        s.line(x, 40, x, bottom, "line", 1)
        s.text(x, bottom + 18, f"{tick / 10:g}", SMALL, "muted", anchor="middle")
    s.line(left + wide * least, 34, left + wide * least, bottom, s.hues[1], 2)
    s.text(left + wide * least + 6, 46, f"a name takes {least:g}", SMALL, s.hues[1])
    for n, (kind, score) in enumerate(found["scores"].items()):
        y = 78 + 52 * n
        s.text(8, y + 5, kind, PLAIN)
        chance = found["chance"][kind]
        above = (chance.mean(0) + found["SPREADS"] * chance.std(0)).max().item()
        s.box(left, y - 14, max(2.0, round(wide * above, 1)), 28, s.hues[1], opacity=0.35, line=None, corner=0)
        for value in score.tolist():
            x, strong = left + wide * value, value >= least
            s.parts.append(
                f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{s.c["accent"]}" fill-opacity="{1 if strong else 0.35}"/>'
            )
    s.text(8, 254, "a dot: a head; orange field: shuffled bytes, up to", SMALL, "muted")
    s.text(8, 271, f"the mean and {found['SPREADS']} standard deviations of any head", SMALL, "muted")
    return s.svg()


def text(theme: str) -> str:
    """What one byte looks at, by three heads chosen by a rule."""
    found = page()
    p, i = found["p"], SHOWN - 1
    chosen = (
        ("the largest previous-token score", int(found["scores"]["previous-token"].argmax())),
        ("the fewest keys to a query", int(found["spread"].argmin())),
        ("the farthest keys on average", int(found["distance"].argmax())),
    )
    s = Sheet(theme, 226, "What one byte of the text looks at, by three heads")
    width = 9.6
    for n, (why, head) in enumerate(chosen):
        y = 22 + 62 * n
        s.text(8, y, f"layer {head // 4} head {head % 4}", bold=True, fill="accent")
        s.text(142, y, why, SMALL, "muted")
        for j, byte in enumerate(found["TEXT"][:SHOWN]):
            x = 8 + width * j
            weight = p[head, i, j].item()
            if weight >= 0.005:
                s.box(
                    x, y + 8, width, 24, "accent", opacity=round(min(1.0, weight * 0.85 + 0.1), 2), line=None, corner=1
                )
            if j == i:
                s.box(x, y + 8, width, 24, "none", line="text", corner=1)
            ink = INK[theme] if weight * 0.85 + 0.1 >= FULL[theme] else "text"
            s.text(x + width / 2, y + 25, chr(byte), SMALL, ink, anchor="middle", mono=True)
    s.text(8, 204, "framed: the byte that asks; colour: its weight on a byte", SMALL, "muted")
    s.text(8, 221, f"the largest weights: {', '.join(f'{p[h, i].max():.2f}' for _, h in chosen)}", SMALL, "muted")
    return s.svg()
