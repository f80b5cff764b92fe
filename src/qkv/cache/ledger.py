"""The books of a cache: tables and accounts that survive an interruption at any point.

The tables of the sequences are the truth. Who uses a page, what is free, and what the prefix index finds follow from
them. A change of the books raises the flag `_dirty` first; where anything breaks into it, MemoryError and
KeyboardInterrupt included, the books are derived from the tables again, at once or by the next call.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from typing import Any

from qkv import masks
from qkv.cache.pool import PagePool
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.storage import Storage
from qkv.call.keys import Clock, KVLayout


class Recent:
    """A layout, and what it was made for."""

    __slots__ = ("layout", "lengths", "seqs", "steps")

    def __init__(
        self, seqs: tuple[Sequence, ...], lengths: Any, steps: list[tuple[Unfinished, bool]], layout: KVLayout
    ):
        self.seqs, self.lengths, self.steps, self.layout = seqs, lengths, steps, layout


class _Change:
    """A change of the ledger: one that is broken into is repaired."""

    __slots__ = ("_ledger",)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> None:
        self._ledger._dirty = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._ledger._repair()
        self._ledger._dirty = False


class Ledger:
    """Sequences, pages and unfinished steps of a cache."""

    _name: str  # of the public class, for messages

    def __init_subclass__(cls) -> None:
        cls._name = vars(cls).get("_name", cls.__name__)

    def __init__(self, storage: Storage, pool: PagePool, *, window: int | None = None, sinks: int = 0) -> None:
        self._storage, self._pool, self._spec = storage, pool, storage.spec
        self.layers, self.dtype, self.storage = self._spec.layers, self._spec.dtype, self._spec.storage
        self.device, self.debug, self.page_size = self._spec.device, self._spec.debug, storage.page_size
        self.window, self.sinks = window, sinks
        self.clock = Clock()
        self._held: masks.Mask | None = None
        if window is not None:
            near = masks.window(window - 1, None)
            self._held = near | masks.prefix(sinks) if sinks else near
        self._pinned = -(-sinks // self.page_size)  # leading logical pages that a window never gives back
        self._seqs: dict[Sequence, None] = {}  # all that were not freed
        self._steps: dict[Unfinished, None] = {}
        self._committing: Unfinished | None = None
        self._recent: list[Recent] = []
        self._dirty = False
        self._made = 0
        self._hits = self._lookups = 0

    def _change(self) -> _Change:
        """The context in which the ledger is changed."""
        return _Change(self)

    def _mend(self) -> None:
        if self._dirty:
            self._repair()

    def _enter(self, seq: Sequence) -> None:
        """Make a sequence one of the cache's; the books are open."""
        seq._live = self
        self._made += 1
        self._seqs[seq] = None

    def _tick(self) -> None:
        """End the life of all views."""
        self.clock.now += 1
        self._recent = []

    def _shorten(self, seq: Sequence, length: int) -> None:
        """Forget tokens past `length`, all but the pages."""
        seq._gone = min(seq._gone, max(self._pinned, -(-length // self.page_size)))
        seq._length = length

    def _give_back(self, pages: Collection[int]) -> None:
        """Release pages, the last first, so that the tail of a prefix is evicted before its head."""
        self._pool.prune(pages)
        release = self._pool.release
        freed = [page for page in reversed(list(pages)) if release(page)]
        if self.debug and freed:
            self._storage.poison(freed)

    def _repair(self) -> None:
        """Derive the books from the sequences' tables."""
        self._dirty = True
        step = self._committing
        if step is not None:
            self._advance(step)
            self._committing = None
        for seq in list(self._seqs):
            if seq._host is not None:
                seq._live, seq._table = None, array("i")
            elif seq._live is None:
                del self._seqs[seq]
                seq._table, seq._own = array("i"), None
            if seq._step is not None and seq._step not in self._steps:
                seq._step = None
            if seq._step is None:
                self._cut(seq)
        self._pool.rebuild([self._owned(seq) for seq in self._seqs])
        self._tick()
        if self.debug:
            self._storage.poison(self._pool.free)
            for seq in self._seqs:
                if seq._step is None:
                    self._poison_tail(seq)
        self._dirty = False

    def _cut(self, seq: Sequence) -> None:
        """Shorten the table to the length without giving pages back."""
        del seq._table[-(-seq._length // self.page_size) :]

    def _trim(self, seq: Sequence) -> None:
        """Drop what lies past the sequence's length; the books are open."""
        kept = -(-seq._length // self.page_size)
        if len(seq._table) > kept:
            dropped = seq._table[kept:]
            del seq._table[kept:]
            self._dropped(dropped)
            self._tick()
        if self.debug:
            self._poison_tail(seq)

    def _poison_tail(self, seq: Sequence) -> None:
        """Fill the slots past the sequence's length, where no other sequence and no prefix has them."""
        used = seq._length % self.page_size
        page = seq._table[-1] if used and seq._table else -1
        if page >= 0 and self._pool.refs[page] == 1 and self._pool.entries[page] is None:
            self._storage.poison_slots(page, used)

    def _dropped(self, pages: Iterable[int]) -> None:
        self._give_back([page for page in pages if page >= 0])

    def _advance(self, step: Unfinished) -> None:
        self._fold(step)
        if self.layers == 1:
            for seq, end in zip(step.seqs, step.ends, strict=True):
                seq._length = end
        else:
            for seq, end in zip(step.seqs, step.ends, strict=True):
                seq._length, seq._step = end, None
            step.next = self.layers
            self._steps.pop(step, None)

    def _fold(self, step: Unfinished) -> None:
        """Parts of the commit that may be done twice."""

    def _undo(self, seqs: Iterable[Sequence]) -> None:
        """Forget the unfinished steps that these sequences are in."""
        steps = {seq._step: None for seq in seqs if seq._step is not None}
        if not steps:
            return
        with self._change():
            self._tick()
            for step in steps:
                self._steps.pop(step, None)
                for seq in step.seqs:
                    seq._step = None
                    self._trim(seq)

    def _owned(self, seq: Sequence) -> Collection[int]:
        """The pages that a sequence uses, in order."""
        return [page for page in seq._table if page >= 0]
