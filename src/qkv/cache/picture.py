"""Page tables as text that a person reads."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from qkv.cache.pool import PagePool
from qkv.cache.sequence import Sequence

_WIDTH = 100  # columns
_ROWS = 40


def picture(name: str, page_size: int, seqs: Ordered[Sequence], pool: PagePool) -> str:
    """A row a sequence: its pages in order, `*` on those that others use, too, `·` for pages given back.

    The last page shows its fill where it is not full.
    """
    pages = len(pool.refs)
    head = f"{name}: {pages} pages of {page_size} tokens"
    digits = len(str(max(pages - 1, 0)))
    shown = seqs if len(seqs) <= _ROWS else [*seqs[: _ROWS - 1], seqs[-1]]
    number = max([len(str(seq._number)) for seq in shown] + [1]) + 1
    tokens = max([len(str(seq._length)) for seq in shown] + [6])
    lines = [head, f"{'seq':>{number + 2}}  {'tokens':>{tokens}}  pages"]
    for place, seq in enumerate(shown):
        if place == _ROWS - 1 and len(shown) < len(seqs):
            lines.append(f"{'...':>{number + 2}}  {len(seqs) - len(shown)} more sequences")
        start = f"{f'#{seq._number}':>{number + 2}}  {seq._length:>{tokens}}  "
        lines.append((start + _row(seq, page_size, pool, digits, _WIDTH - len(start))).rstrip())
    used = pages - pool.available
    shared = sum(1 for refs in pool.refs if refs > 1)
    lines.append(f"used {used} ({shared} shared *), cached {len(pool.cached)}, free {len(pool.free)}")
    return "\n".join(lines)


def _row(seq: Sequence, page_size: int, pool: PagePool, digits: int, width: int) -> str:
    if seq._live is None:
        return "swapped out"
    boxes = []
    for at, page in enumerate(seq._table):
        fill = min(max(seq._length - at * page_size, 0), page_size)
        label = "·".rjust(digits) if page < 0 else str(page).rjust(digits)
        mark = "*" if page >= 0 and pool.refs[page] > 1 else " "
        boxes.append(f"[{label}{mark}]" if fill == page_size or page < 0 else f"[{label}{mark}{fill}/{page_size}]")
    if sum(map(len, boxes)) <= width:
        return "".join(boxes)
    tail = boxes[-2:]
    middle = f" ... {len(boxes)} more ... "
    room = width - sum(map(len, tail)) - len(middle)
    front: list[str] = []
    while room >= len(boxes[len(front)]) and len(front) < len(boxes) - len(tail):
        room -= len(boxes[len(front)])
        front.append(boxes[len(front)])
    hidden = len(boxes) - len(front) - len(tail)
    return "".join([*front, f" ... {hidden} more ... ", *tail])
