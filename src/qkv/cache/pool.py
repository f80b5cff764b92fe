"""The accounts of a page pool: who uses a page, which pages are free, which are kept for their contents.

Pure bookkeeping: no tensor is touched here. Every operation is O(1) a page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from qkv.cache.prefix import Entry, PrefixIndex
from qkv.cache.sequence import NEVER, Sequence


class PagePool:
    """Counts the users of each page.

    A page is used (in tables: refs > 0), cached (no user, but an entry of the prefix index) or free.
    """

    __slots__ = ("cached", "entries", "free", "index", "refs")

    def __init__(self, pages: int, index: PrefixIndex | None = None) -> None:
        self.index = index
        self.refs = [0] * pages
        self.entries: list[Entry | None] = [None] * pages
        self.free = list(
            range(pages - 1, -1, -1)
        )  # a stack: the page given back last is still in the processor's cache
        self.cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def available(self) -> int:
        """Pages that `take` can give: the free ones, and the cached ones by eviction."""
        return len(self.free) + len(self.cached)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """`count` pages with one user each, and those among them that were evicted. There must be enough."""
        free = self.free
        kept = len(free) - min(count, len(free))
        pages = free[kept:]
        pages.reverse()
        del free[kept:]
        evicted = self._drop(count - len(pages)) if len(pages) < count else []
        pages += evicted
        refs = self.refs
        for page in pages:
            refs[page] = 1
        return pages, evicted

    def share(self, page: int) -> None:
        """One user more."""
        if self.refs[page] == 0:
            del self.cached[page]
        self.refs[page] += 1

    def release(self, page: int) -> bool:
        """One user less. True where the page is free now; a page with an entry is kept as the most recently used."""
        self.refs[page] -= 1
        if self.refs[page]:
            return False
        if self.entries[page] is not None:
            self.cached[page] = None
            return False
        self.free.append(page)
        return True

    def prune(self, pages: Iterable[int]) -> None:
        """Drop the entries below an evicted page, which nothing can find; `pages` in the order of their chain."""
        for page in pages:
            entry = self.entries[page]
            if entry is not None and entry.parent.page < 0:
                self.unregister(page)

    def evict(self, count: int) -> list[int]:
        """Free up to `count` cached pages, the least recently used first."""
        pages = self._drop(min(count, len(self.cached)))
        self.free += pages
        return pages

    def unregister(self, page: int) -> None:
        """The page's contents stop being what its entry says."""
        entry = self.entries[page]
        if entry is not None:
            entry.page = -1
            self.entries[page] = None
            assert self.index is not None
            self.index.remove(entry)

    def register(self, seq: Sequence, page_size: int) -> None:
        """Let the pages that are full and whose tokens are known be found."""
        P, tokens, index = page_size, seq._tokens, self.index
        assert tokens is not None
        assert index is not None
        full = min(seq._length, len(tokens)) // P
        while seq._hashed < full:
            at, parent = seq._hashed, seq._chain
            page = seq._table[at]
            entry = None
            if parent is not None and parent.page >= 0:  # below an evicted page nothing can be found
                chunk = tokens[at * P : (at + 1) * P].tobytes()
                digest, entry = index.find(parent, chunk)
                if entry is None and page >= 0 and self.entries[page] is None:
                    entry = Entry(digest, parent, chunk, page)
                    self.entries[page] = entry
                    index.add(entry)
            if entry is None:
                seq._chain, seq._due = None, NEVER
                return
            seq._chain = entry
            seq._hashed = at + 1
        seq._due = (full + 1) * P

    def rebuild(self, owned: Iterable[Iterable[int]]) -> None:
        """Derive all counts from the tables again, after something broke into a change of the books."""
        refs = [0] * len(self.refs)
        for pages in owned:
            for page in pages:
                refs[page] += 1
        alive: list[Entry] = []
        for page, entry in enumerate(self.entries):
            if entry is not None and entry.page != page:
                self.entries[page] = None
            elif entry is not None:
                alive.append(entry)
        kept = [entry.page for entry in alive if refs[entry.page] == 0]
        order = {page: place for place, page in enumerate(self.cached)}
        kept.sort(key=lambda page: order.get(page, len(order)))
        cached = OrderedDict.fromkeys(kept)
        free = [page for page in range(len(refs) - 1, -1, -1) if refs[page] == 0 and page not in cached]
        self.refs, self.cached, self.free = refs, cached, free
        if self.index is not None:
            self.index.rebuild(alive)

    def _drop(self, count: int) -> list[int]:
        pages = []
        for _ in range(count):
            page, _none = self.cached.popitem(last=False)
            self.unregister(page)
            pages.append(page)
        return pages
