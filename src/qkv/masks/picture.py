"""Draws a mask with characters: one row a query, one column a key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qkv.masks.counts import counted_cells
from qkv.masks.rule import Rule
from qkv.masks.tile import Sizes, Tile

FULL, MIXED, EMPTY = "■", "▒", "·"
CELLS = 48


def draw(rows: Callable[[int, int], Tensor], labels: list[int], Lk: int, cells: int = CELLS) -> str:
    """The picture of a mask whose rows i0..i1-1 `rows(i0, i1)` gives as bool (i1 - i0, Lk).

    Where a side has more than `cells` entries a character stands for a block of them, and the last line says so.
    """
    Lq = len(labels)
    step_q, step_k = steps(Lq, Lk, cells)
    padding = -Lk % step_k
    table = []
    for start in range(0, Lq, step_q):
        seen = rows(start, min(start + step_q, Lq))
        some = torch.nn.functional.pad(seen.any(0), (0, padding), value=False).view(-1, step_k).any(1)
        every_key = torch.nn.functional.pad(seen.all(0), (0, padding), value=True).view(-1, step_k).all(1)
        table.append([2 if full else int(any_) for full, any_ in zip(every_key.tolist(), some.tolist(), strict=True)])
    return written(table, labels[::step_q], step_q, step_k)


def steps(Lq: int, Lk: int, cells: int = CELLS) -> tuple[int, int]:
    """Queries and keys that one character stands for."""
    return max(1, -(-Lq // cells)), max(1, -(-Lk // cells))


def written(table: list[list[int]], labels: list[int], step_q: int, step_k: int) -> str:
    """A table of 0 (none visible), 1 (some) and 2 (all); `labels` are the positions of each row's first query."""
    columns = max(map(len, table), default=0)
    every = 1 if columns <= 10 and step_k == 1 else 5
    width = max([2, *(len(str(p)) for p in labels)])
    header = ""
    for column in range(0, columns, every):
        header = header.ljust(2 * column)
        header += " " * (len(header) > 2 * column) + str(column * step_k)  # numbers of many digits stay apart
    lines = [f"{'p/j':>{width + 1}} {header}".rstrip()]
    for label, row in zip(labels, table, strict=True):
        lines.append(f"{label:>{width + 1}} {' '.join((EMPTY, MIXED, FULL)[x] for x in row)}".rstrip())
    if step_q > 1 or step_k > 1:
        lines.append(
            f"one cell: {step_q:,} x {step_k:,} (queries x keys); {FULL} all, {MIXED} some, {EMPTY} none visible"
        )
    return "\n".join(lines)


def counted(mask: Rule, p: Tensor, sizes: Sizes, b: int, h: int) -> str | None:
    """A head's picture, from visible pairs counted in each cell; None where they are not known without looking."""
    line = (p[b] if p.shape[0] > 1 else p[0]).to("cpu")
    step = steps(sizes.Lq, sizes.Lk)
    found = counted_cells(mask, line, b=b, h=h, sizes=sizes, steps=step)
    return None if found is None else written(found.tolist(), line[:: step[0]].tolist(), *step)


def looked_at(mask: Rule, p: Tensor, sizes: Sizes, b: int, h: int, cells: int = CELLS) -> str:
    """The same picture, from each pair."""
    device = mask._device()
    line = (p[b] if p.shape[0] > 1 else p[0]).to(device)
    j = torch.arange(sizes.Lk, device=device)
    at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (b, h))

    def rows(start: int, stop: int) -> Tensor:
        i = torch.arange(start, stop, device=device)[:, None]
        seen = mask.visible(Tile.pairs(at_b, at_h, i, line[start:stop, None], j), sizes)
        return seen.expand(stop - start, sizes.Lk).cpu()

    return draw(rows, line.tolist(), sizes.Lk, cells)
