"""A cache on fixed pages: sequences of any length from one pool, shared prefixes, forks, eviction and swapping."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from qkv.cache import checks
from qkv.cache.base import Cache
from qkv.cache.picture import picture
from qkv.cache.pool import PagePool
from qkv.cache.prefix import Entry, PrefixIndex, typed
from qkv.cache.sequence import NEVER, Host, Sequence, Unfinished
from qkv.cache.spec import Spec
from qkv.cache.state import check_seqs
from qkv.cache.storage import Storage
from qkv.checks import integer, short
from qkv.errors import ArgumentError, PagesExhausted


class PagedCache(Cache):
    """Keys and values on pages of a pool; a sequence is a table of pages, and pages may be shared.

    ::

        sequence A  [ 3 ][ 7 ][ 1  5/16]      pages 3 and 7 are in both tables: stored once
        sequence B  [ 3 ][ 7 ][ 4 12/16]      at most one page of a sequence, its last, is partly empty

    Parameters
    ----------
    pages : int
        N, the pool: pages * page_size tokens in all.
    num_kv_heads, head_dim : int
        Hkv and D.
    value_dim : int
        Dv; D unless given.
    index_dim : int
        Keep the keys of an indexer beside each token, Di numbers for all heads (`qkv.select_tokens`); 0: none.
    page_size : int
        P, tokens of a page.
    summaries : int
        Keep the mean, minimum and maximum of each block of so many keys, which divide a page, for `qkv.select_blocks`:
        12 D bytes a block and head. None: none.
    layers : int
        Layers of the model; one table serves all.
    window : int
        Give pages back that no query to come sees: a query sees at most the last `window` keys, its own among them.
    sinks : int
        With window: the first keys, which stay visible.
    dtype : torch.dtype
        Of given keys and values, of queries and outputs: float64, float32, bfloat16 or float16.
    storage : torch.int8 or torch.float8_e4m3fn
        Store in 8 bits, with one float32 scale for each token and head. int8 errs by max|row| / 254 at most, float8 by
        a sixteenth of each number.
    device : of the tensors
    identity : str, bytes or int
        What else makes keys and values: the model and its version. It enters the digests.
    debug : bool
        Fill slots with NaN when they are given back.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, or a pool that memory cannot hold.

    Notes
    -----
    Cost: pages are taken and given back in O(1); memory is layers * pages * page_size * Hkv * (D + Dv) numbers.
    Sharing: see `add`. A page is written by at most one sequence; `append` copies a page that others use first.
    One thread at a time may use a cache. A step is either finished or not: whatever interrupts a call, an exhausted
    pool or Ctrl-C, the cache stays valid.
    Source: Kwon et al. (2023), "Efficient Memory Management for Large Language Model Serving with PagedAttention".

    Examples
    --------
    >>> import torch, qkv
    >>> cache = PagedCache(pages=8, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    >>> prompt = [5, 1, 7, 2, 9, 9, 3, 4, 1, 6]
    >>> a = cache.add(tokens=prompt)
    >>> cache.append([a], torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16))
    >>> b = cache.add(tokens=prompt)
    >>> b.cached_tokens, b.length, a.pages, b.pages
    (8, 8, (0, 1, 2), (0, 1))
    >>> cache.stats().pages_shared, cache.stats().waste_tokens
    (2, 2)
    """

    def __init__(
        self,
        *,
        pages: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        page_size: int = 16,
        index_dim: int = 0,
        summaries: int | None = None,
        layers: int = 1,
        window: int | None = None,
        sinks: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        identity: str | bytes | int | None = None,
        debug: bool = False,
    ) -> None:
        call = "qkv.cache.PagedCache()"
        if window is not None:
            window = checks.size(call, "window", window)
        sinks = checks.size(call, "sinks", sinks, low=0)
        if sinks and window is None:
            fix = "Pass window= with it; without a window all keys stay"
            raise ArgumentError.of(call, "sinks are keys that stay while a window moves on", f"sinks={sinks}", fix)
        pages, page_size = checks.size(call, "pages", pages), checks.size(call, "page_size", page_size)
        spec = Spec.of_heads(call, num_kv_heads, head_dim, value_dim, index_dim, layers, dtype, storage, device, debug)
        spec = spec.summarising(call, summaries, page_size)
        self._begin_paged(call, spec, pages, page_size, identity, window, sinks)

    def _begin_paged(
        self, call: str, spec: Spec, pages: int, page_size: int, identity: Any, window: int | None, sinks: int
    ) -> None:
        """What is the same for pages of keys and values, and of latents."""
        index = f" index {spec.index}" if spec.index else ""
        names = [
            typed(call, "identity", identity),
            ("str", f"{type(self).__name__} {spec.heads} {spec.widths} {spec.layers}{index}"),
            ("str", short(spec.dtype)),
            ("str", short(spec.storage)),
            ("int", page_size),
        ]
        self._index = PrefixIndex(page_size, names)
        super().__init__(self._stored(spec, pages, page_size), PagePool(pages, self._index), window=window, sinks=sinks)

    def _stored(self, spec: Spec, pages: int, page_size: int) -> Storage:
        """Where the pages lie."""
        return Storage(spec, pages, page_size)

    # ---- sequences

    def add(self, tokens: Any = None, salt: Any = None, adapter: Any = None) -> Sequence:
        """Begin a sequence, on shared pages as far as its first tokens are in the cache.

        Parameters
        ----------
        tokens : list of int, or int Tensor (L,)
            The ids of the tokens that will be appended, such as a prompt. The leading full pages that hold the same
            tokens are shared: `seq.length` begins at `seq.cached_tokens`, at most len(tokens) - 1, and the keys to
            append are those of tokens[seq.cached_tokens:]. Pages that the sequence fills can be shared in turn.
        salt : str, bytes or int
            Whose tokens they are. Sequences share only with the same salt, type included.
        adapter : str, bytes or int
            What else makes this sequence's keys and values, such as a LoRA's name. Sharing needs the same one.

        Returns
        -------
        Sequence

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Tokens, salt or adapter of another type, or negative tokens.

        Notes
        -----
        Cost: a keyed 256-bit digest and a comparison a page, about 1 microsecond. No page is taken here.
        """
        call = f"{self._name}.add()"
        self._mend()
        root = self._index.root(typed(call, "salt", salt), typed(call, "adapter", adapter))
        known = None if tokens is None else checks.token_array(call, "tokens", tokens)
        seq = Sequence(self, self._made, root)
        matched: list[Entry] = []
        if known is not None:
            pages = max(len(known) - 1, 0) // self.page_size  # the last token is computed anyway: its logits are needed
            matched = self._index.match(root, known.tobytes(), pages)
            self._lookups += pages
            self._hits += len(matched)
            seq._tokens = known
            seq._due = (len(matched) + 1) * self.page_size
        if matched:
            seq._table = array("i", [entry.page for entry in matched])
            seq._chain, seq._hashed = matched[-1], len(matched)
            seq._length = seq._cached = len(matched) * self.page_size
            seq._gone = self._pinned
        self._adopt(seq)
        return seq

    def _adopt(self, seq: Sequence) -> None:
        """Make a sequence whose table is set one of the cache's, and a user of its pages."""
        with self._change():
            for page in self._owned(seq):
                self._pool.share(page)
            self._enter(seq)

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence of the same tokens, on the same pages; what either appends is its own.

        Parameters
        ----------
        seq : Sequence
            Not in an unfinished step, and not swapped out.

        Returns
        -------
        Sequence

        Raises
        ------
        ArgumentError, ArgumentTypeError
            A sequence that cannot be forked now.

        Notes
        -----
        Cost: a table entry a page. The partly filled last page is shared, too; the first that appends copies it.
        """
        self._between_steps("fork", [seq])
        twin = Sequence(self, self._made, seq._root)
        twin._length = twin._cached = seq._length
        twin._table, twin._gone = seq._table[:], seq._gone
        twin._tokens = None if seq._tokens is None else seq._tokens[:]
        twin._chain, twin._hashed, twin._due = seq._chain, seq._hashed, seq._due
        self._adopt(twin)
        return twin

    # ---- pages of a step

    def _count(self, call: str, step: Unfinished) -> Any:
        P, refs, entries = self.page_size, self._pool.refs, self._pool.entries
        fresh: list[tuple[Sequence, int]] = []
        written: list[Sequence] = []  # whose last page others use, or a prefix is found by
        need = 0
        for seq, end in zip(step.seqs, step.ends, strict=True):
            length = seq._length
            if length == end:
                continue
            more = -(-end // P) + (-length // P)
            if more:
                fresh.append((seq, more))
                need += more
            if length % P:
                page = seq._table[-1]
                if refs[page] != 1 or entries[page] is not None:
                    written.append(seq)
        copies: list[tuple[Sequence, int]] = []
        alone: list[tuple[Sequence, int]] = []
        left: dict[int, int] = {}
        for seq in written:
            page = seq._table[-1]
            users = left.get(page, refs[page])
            left[page] = users - 1
            if users > 1:  # the last of several keeps the page
                copies.append((seq, page))
            elif entries[page] is not None:
                alone.append((seq, page))
        need += len(copies)
        if need > self._pool.available:
            self._refuse(call, need, f"{len(step.seqs)} sequences of which {len(fresh)} need new pages")
        return need, fresh, copies, alone

    def _claim(self, claim: Any) -> None:
        need, fresh, copies, alone = claim
        if not need and not alone:
            return
        pool = self._pool
        for _, page in alone:
            pool.unregister(page)
        pages = self._take(need)
        at = len(copies)
        if copies:
            self._storage.copy_pages([page for _, page in copies], pages[:at])
            self._tick()
            for (seq, page), own in zip(copies, pages, strict=False):
                seq._table[-1] = own
                pool.release(page)
                if self.debug:
                    self._storage.poison_slots(own, seq._length % self.page_size)
        if self.debug:  # only now: the others copied from these pages, and may know more tokens of them
            for seq, page in alone:
                self._storage.poison_slots(page, seq._length % self.page_size)
        for seq, more in fresh:
            seq._table.extend(pages[at : at + more])
            at += more

    def _take(self, need: int) -> list[int]:
        pages, evicted = self._pool.take(need)
        if evicted:
            self._tick()
            if self.debug:
                self._storage.poison(evicted)
        return pages

    def _refuse(self, call: str, need: int, why: str) -> None:
        pool = self._pool
        given = f"{need} pages needed ({why}), {len(pool.free)} free and {len(pool.cached)} cached of {len(pool.refs)}"
        fix = (
            "Cached pages are evicted by themselves; free() or swap_out() a sequence and try again, append fewer "
            "tokens at a time, or build the cache with more pages"
        )
        raise PagesExhausted.of(call, "a step takes all its pages or none", given, fix)

    # ---- what follows a step

    def _check_tokens(
        self, call: str, names: tuple[Sequence, ...], tokens: Any, T: int, lengths: tuple[int, ...] | None
    ) -> list[array[int]]:
        rows = checks.step_tokens(call, tokens, len(names), T, lengths)
        for seq, row in zip(names, rows, strict=True):
            known = seq._tokens
            if known is not None and len(known) > seq._length:
                both = min(len(known) - seq._length, len(row))
                if known[seq._length : seq._length + both] != row[:both]:
                    given = f"{list(row[:4])}... for {seq!r}, known as {list(known[seq._length : seq._length + 4])}..."
                    fix = "Append the keys of the tokens that add() was given, or truncate() the sequence first"
                    raise ArgumentError.of(call, "tokens must be those that are known already", given, fix)
        return rows

    def _fold(self, step: Unfinished) -> None:
        if step.tokens is None:
            return
        for seq, row, end in zip(step.seqs, step.tokens, step.ends, strict=True):
            known = array("q") if seq._tokens is None else seq._tokens
            if end - len(row) <= len(known) < end:  # no gap, and not done yet
                known.extend(row[len(known) - end :])
                seq._tokens = known
                seq._due = (seq._hashed + 1) * self.page_size

    def _settle(self, step: Unfinished) -> None:
        for seq in step.seqs:
            if seq._length >= seq._due:
                self._pool.register(seq, self.page_size)
        if self.window is not None:
            self._release_passed(step)

    def _release_passed(self, step: Unfinished) -> None:
        """Give pages back that left the window of the step's first query, and so of all to come.

        Not of the query after the step: the step's own queries read the last layer after it is committed.
        """
        assert self.window is not None
        given_back = []
        for seq, count in zip(step.seqs, step.counts, strict=True):
            if not count:
                continue  # its last queries are still those of an earlier step
            stop = (seq._length - count - self.window + 1) // self.page_size
            gone = max(seq._gone, self._pinned)
            if stop > gone:
                table = seq._table
                for at in range(gone, stop):
                    if table[at] >= 0:
                        given_back.append(table[at])
                        table[at] = -1
                seq._gone = stop
        if given_back:
            self._tick()
            self._give_back(given_back)

    def _shorten(self, seq: Sequence, length: int) -> None:
        if seq._tokens is not None:
            del seq._tokens[length:]
        hashed = length // self.page_size
        if hashed == 0:
            seq._chain, seq._hashed = seq._root, 0
        while seq._hashed > hashed:
            if seq._chain is not None:
                seq._chain = seq._chain.parent  # type: ignore[union-attr]
            seq._hashed -= 1
        seq._due = NEVER if seq._tokens is None or seq._chain is None else (seq._hashed + 1) * self.page_size
        super()._shorten(seq, length)

    # ---- memory

    def evict(self, pages: int | None = None) -> int:
        """Free pages that no sequence uses and that are kept for a prefix to come, the least recently used first.

        Parameters
        ----------
        pages : int
            At most so many; all unless given. `append` evicts by itself where it needs pages.

        Returns
        -------
        int
            How many were freed.
        """
        call = f"{self._name}.evict()"
        self._mend()
        count = len(self._pool.cached) if pages is None else integer(call, "pages", pages)
        with self._change():
            dropped = self._pool.evict(count)
            if dropped:
                self._tick()
                if self.debug:
                    self._storage.poison(dropped)
        return len(dropped)

    def swap_out(self, seq: Sequence) -> None:
        """Move a sequence's pages to host memory and give them back; it can only be freed or swapped in then.

        Pages that others use stay for them; the copy is whole.

        Parameters
        ----------
        seq : Sequence
            Not in an unfinished step.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            A sequence that cannot be moved now.

        Notes
        -----
        Cost: a copy of its pages.
        """
        self._between_steps("swap_out", [seq])
        places = [at for at, page in enumerate(seq._table) if page >= 0]
        pages = [seq._table[at] for at in places]
        tensors = self._storage.read(pages)
        host = Host(tensors, places, [self._pool.entries[page] for page in pages], len(seq._table))
        with self._change():
            self._tick()
            seq._host = host
            seq._live = None
            seq._table = array("i")
            self._give_back(pages)

    def swap_in(self, seq: Sequence) -> None:
        """Bring a swapped out sequence back, bit for bit. Its pages that are still cached are taken again as they are.

        Parameters
        ----------
        seq : Sequence
            One that `swap_out` moved.

        Raises
        ------
        ArgumentError
            The sequence is not swapped out.
        PagesExhausted
            Too few pages; nothing was changed.
        """
        call = f"{self._name}.swap_in()"
        self._mend()
        check_seqs(self, call, [seq], swapped=True)
        host = seq._host
        if host is None:
            fix = "Only a sequence that cache.swap_out() moved can be brought back"
            raise ArgumentError.of(call, "the sequence must be swapped out", repr(seq), fix)
        pool = self._pool
        # An entry that is alive is on the page it was on, and what is on a page with an entry is never written.
        again = [at for at, entry in enumerate(host.entries) if entry is not None and entry.page >= 0]
        kept = {at: host.entries[at].page for at in again}  # type: ignore[union-attr]
        missing = [at for at in range(len(host.places)) if at not in kept]
        unused = sum(1 for page in kept.values() if pool.refs[page] == 0)
        if len(missing) > pool.available - unused:
            self._refuse(call, len(missing), f"{len(kept)} of {len(host.places)} are still cached")
        with self._change():
            for page in kept.values():
                pool.share(page)
            pages = self._take(len(missing))
            if missing:
                self._storage.restore(host.tensors, missing, pages)
            table = array("i", [-1]) * host.size
            for at, page in [*kept.items(), *zip(missing, pages, strict=True)]:
                table[host.places[at]] = page
            seq._table = table
            seq._live = self
            seq._host = None
            if self.debug:
                self._poison_tail(seq)

    # ---- figures

    def table(self) -> str:
        """The page tables as text: a row a sequence, shared pages marked, the fill of each last page."""
        self._mend()
        return picture(self._name, self.page_size, list(self._seqs), self._pool)

    def _empty_slots(self) -> int:
        last: dict[int, list[int]] = {}
        empty = 0
        P = self.page_size
        for seq in self._seqs:
            used, pages = seq._length, -(-seq._length // P)
            empty += P * sum(1 for page in seq._table[pages:] if page >= 0)  # of an unfinished step: nobody else's
            if used % P and seq._table:
                last.setdefault(seq._table[pages - 1], []).append(used % P)
        for page, fills in last.items():
            if self._pool.refs[page] == len(fills):  # nobody uses all of it
                empty += P - max(fills)
        return empty
