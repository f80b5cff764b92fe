"""Draws a mask with characters: one row a query, one column a key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FULL, MIXED, EMPTY = "■", "▒", "·"
CELLS = 48


def draw(rows: Callable[[int, int], Tensor], labels: list[int], Lk: int, cells: int = CELLS) -> str:
    """The picture of a mask whose rows i0..i1-1 `rows(i0, i1)` gives as bool (i1 - i0, Lk).

    Where a side has more than `cells` entries a character stands for a block of them, and the last line says so.
    """
    Lq = len(labels)
    step_q, step_k = max(1, -(-Lq // cells)), max(1, -(-Lk // cells))
    columns = -(-Lk // step_k)
    every = 1 if columns <= 10 and step_k == 1 else 5
    width = max([2, *(len(str(p)) for p in labels)])
    header = ""
    for column in range(0, columns, every):
        header = header.ljust(2 * column) + str(column * step_k)
    lines = [f"{'p/j':>{width + 1}} {header}".rstrip()]
    for start in range(0, Lq, step_q):
        seen = rows(start, min(start + step_q, Lq))
        padding = columns * step_k - Lk
        some = torch.nn.functional.pad(seen.any(0), (0, padding), value=False).view(columns, step_k).any(1)
        every_key = torch.nn.functional.pad(seen.all(0), (0, padding), value=True).view(columns, step_k).all(1)
        marks = [
            FULL if full else MIXED if any_ else EMPTY
            for full, any_ in zip(every_key.tolist(), some.tolist(), strict=True)
        ]
        lines.append(f"{labels[start]:>{width + 1}} {' '.join(marks)}".rstrip())
    if step_q > 1 or step_k > 1:
        lines.append(f"one cell: {step_q} x {step_k} (queries x keys); {FULL} all, {MIXED} some, {EMPTY} none visible")
    return "\n".join(lines)
