"""What plans keep between calls: tables that share one budget in bytes, where the least recently used goes first.

A hit costs a look-up and a number: `found = table.get(key)`, then `found.used = now()` and `found.value`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, ClassVar

from torch import Tensor

# Of masks' tensors and what kernels made of them. A mask of a batch's packed documents is some MiB, and only the last
# few are of use; a plan without tensors weighs nothing and is held by the number of entries alone.
BUDGET = 64 << 20
LARGEST = BUDGET // 4
"""Bytes of the largest entry that is kept: one may not push out all others."""

now: Callable[[], int] = count().__next__


class Kept:
    """A value, when it was used last, and what it keeps alive."""

    __slots__ = ("bytes", "holds", "used", "value")

    def __init__(self, value: Any, holds: tuple[Any, ...]) -> None:
        self.value, self.holds, self.used, self.bytes = value, holds, now(), weight(holds)


class Remembered(dict[Any, Kept]):
    """A table of at most `most` entries. Looking up needs no lock; everything that changes a table takes it."""

    _lock = threading.Lock()
    _tables: ClassVar[list[Remembered]] = []  # all of them: the budget is one
    _newest: ClassVar[tuple[Remembered, Any] | None] = None

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self._tables.append(self)

    def put(self, key: Any, value: Any, holds: Iterable[Any] = ()) -> None:
        """Keep the value, unless it is too large. `holds`: masks, tensors and tuples that the entry keeps alive."""
        kept = Kept(value, tuple(holds))
        with self._lock:
            self._weigh_again()
            self.pop(key, None)
            if kept.bytes > LARGEST:
                return
            if len(self) >= self.most:
                del self[min(self, key=lambda k: self[k].used)]
            self[key] = kept
            Remembered._newest = self, key
            _shrink(self._tables)

    @classmethod
    def _weigh_again(cls) -> None:
        """The call that made the newest entry has run since, and its mask may have kept what it computed."""
        if cls._newest is None:
            return
        table, key = cls._newest
        if (kept := table.get(key)) is not None:
            kept.bytes = weight(kept.holds)


def _shrink(tables: list[Remembered]) -> None:
    heavy = [(kept.used, table, key) for table in tables for key, kept in table.items() if kept.bytes]
    excess = sum(table[key].bytes for _, table, key in heavy) - BUDGET
    if excess <= 0:
        return
    for _, table, key in sorted(heavy, key=lambda found: found[0]):
        excess -= table.pop(key).bytes
        if excess <= 0:
            return


def held() -> int:
    """Bytes that all tables keep alive, what two of them share counted twice."""
    with Remembered._lock:
        return sum(kept.bytes for table in Remembered._tables for kept in table.values())


def weight(holds: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors in a value, in its attributes and in theirs; each once."""
    seen = set() if seen is None else seen
    if holds is None or isinstance(holds, (int, float, str)) or id(holds) in seen:
        return 0
    seen.add(id(holds))
    if isinstance(holds, Tensor):
        return holds.untyped_storage().nbytes()
    if isinstance(holds, (tuple, list)):
        parts: Iterable[Any] = holds
    elif isinstance(holds, dict):
        parts = holds.values()
    else:
        slots = [name for kind in type(holds).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(holds, "__dict__", {}).values(), *(getattr(holds, name, None) for name in slots)]
    return sum(weight(part, seen) for part in parts)
