"""Draws what four ranks do with a causal sequence: who computes what, and when. Run: python docs/pictures/ranks.py"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import qkv
from qkv.call.problem import Problem
from qkv.distributed import Shards
from qkv.distributed.exchange import Exchange, exchange

sys.path.insert(0, str(Path(__file__).parent))
from draw import FONT, Pen

RANKS, CHUNK = 4, 64
CHUNKS = 2 * RANKS
LENGTH = CHUNKS * CHUNK
COLOURS = {"light": ("#0969da", "#1a7f37", "#9a6700", "#8250df"), "dark": ("#4493f8", "#3fb950", "#d29922", "#ab7df8")}
INK = {"light": "#fff", "dark": "#0d1117"}
WIDTH, HEIGHT, CELL = 556, 606, 34
LEFT, TOP = 150, 84


def planned() -> Exchange:
    """What the ranks need of each other."""
    shards = Shards.zigzag(LENGTH, RANKS)
    call = ("", 1, 1, 1, LENGTH, LENGTH, 1, 1, torch.float32, "cpu")  # one head, as no process makes it
    problem = Problem(*call, qkv.causal(), "start", 1.0, None, (), False, 0.0, False, False)
    return exchange(problem, shards, shards)


def computed(plan: Exchange) -> dict[tuple[int, int], tuple[int, int]]:
    """Of each chunk of queries by each of keys: the rank that computes it, and its stage."""
    found = {}
    for rank in range(RANKS):
        for number, stage in enumerate(plan.stages(rank, "ring")):
            for (a, b), (lo, hi) in stage.pieces:
                for row in range(a // CHUNK, b // CHUNK):
                    for column in range(lo // CHUNK, -(-hi // CHUNK)):
                        if column <= row:
                            found[row, column] = rank, number
    return found


def picture(theme: str) -> str:
    """Return the SVG text for one theme."""
    pen, plan, colours = Pen(theme), planned(), COLOURS[theme]
    cells = computed(plan)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="680" {FONT} role="img">',
        "<title>Eight chunks of a causal sequence on four ranks: who computes each tile, and at which stage</title>",
        pen.text(8, 28, "Who computes what, and when", 18, "text", 'font-weight="700"'),
        pen.text(8, 50, "Rows: queries, in eight chunks. Columns: keys. The colour is the rank,", 15, "muted"),
        pen.text(8, 70, "the number the stage at which the keys are there; 0: its own.", 15, "muted"),
    ]
    for row in range(CHUNKS):
        rank = next(r for r in range(RANKS) if any(a <= row * CHUNK < b for a, b in plan.queries.ranges[r]))
        y = TOP + row * CELL
        parts.append(pen.text(LEFT - 10, y + 22, f"rank {rank}", 15, "text", 'text-anchor="end"'))
        for column in range(CHUNKS):
            x = LEFT + column * CELL
            known = cells.get((row, column))
            fill = pen.c["panel"] if known is None else colours[known[0]]
            parts.append(pen.box(x, y, CELL - 3, CELL - 3, 5, fill))
            if known is not None:
                extra = f'text-anchor="middle" font-weight="600" style="fill:{INK[theme]}"'
                parts.append(pen.text(x + (CELL - 3) / 2, y + 21, str(known[1]), 14, "text", extra))
    return "\n".join([*parts, *_lanes(pen, plan, theme, cells), "</svg>"]) + "\n"


def _lanes(pen: Pen, plan: Exchange, theme: str, cells: dict[tuple[int, int], tuple[int, int]]) -> list[str]:
    """Each rank's stages: what arrives while the one before is computed, and how much is computed."""
    top = TOP + CHUNKS * CELL + 34
    parts = [pen.text(8, top, "Stage", 15, "text", 'font-weight="600"')]
    wide = (WIDTH - 90) / RANKS
    for stage in range(RANKS):
        told = "own keys" if stage == 0 else f"{stage}: from r − {stage}"
        parts.append(pen.text(84 + stage * wide, top, told, 15, "muted"))
    for rank in range(RANKS):
        y = top + 12 + rank * 50
        parts.append(pen.text(8, y + 25, f"rank {rank}", 15, "text"))
        for number, stage in enumerate(plan.stages(rank, "ring")):
            mine = [at for at, known in cells.items() if known == (rank, number)]
            work = sum(0.5 if row == column else 1 for row, column in mine)
            moved = sum(b - a for _, ranges in stage.arrives for a, b in ranges) // CHUNK
            x = 84 + number * wide
            parts.append(pen.box(x, y, wide - 8, 40, 6, COLOURS[theme][rank]))
            ink = f'style="fill:{INK[theme]}"'
            parts.append(pen.text(x + 8, y + 17, f"{work:g} tiles", 14.5, "text", ink))
            come = (
                "nothing comes" if not stage.arrives else f"{moved} chunk{'s' * (moved > 1)} come{'s' * (moved == 1)}"
            )
            parts.append(pen.text(x + 8, y + 34, come, 13.5, "text", ink))
    return parts


if __name__ == "__main__":
    for name in COLOURS:
        (Path(__file__).parent / f"ranks-{name}.svg").write_text(picture(name), encoding="utf-8")
