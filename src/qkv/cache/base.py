"""What all caches share: sequences, steps that are committed or not, and views."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered
from typing import Any

from torch import Tensor

from qkv.cache import checks
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.state import check_repeated, check_seqs, other_step, refuse_layer, refuse_open
from qkv.cache.stats import Stats
from qkv.cache.step import Step
from qkv.cache.storage import Places
from qkv.cache.views import Views
from qkv.checks import integer, short, shown
from qkv.errors import ArgumentError, PagesExhausted


class Cache(Views):
    """The base of all caches."""

    # ---- what users call

    def add(self, tokens: Any = None, salt: Any = None, adapter: Any = None) -> Sequence:
        """Begin a sequence.

        Parameters
        ----------
        tokens, salt, adapter
            For caches on pages, which share prefixes; others refuse them.

        Returns
        -------
        Sequence

        Raises
        ------
        PagesExhausted
            All places are taken; nothing was changed.
        ArgumentError
            A prefix for a cache that shares none.
        """
        call = f"{self._name}.add()"
        self._mend()
        if tokens is not None or salt is not None or adapter is not None:
            rule = f"tokens, salt and adapter are for caches that share prefixes, and a {self._name} does not"
            given = ", ".join(n for n, x in (("tokens", tokens), ("salt", salt), ("adapter", adapter)) if x is not None)
            raise ArgumentError.of(call, rule, given, "Leave them out, or use qkv.cache.PagedCache")
        if len(self._pool.free) < self._each:
            given = f"{len(self._pool.refs) // self._each} sequences, all in use"
            fix = "free() one, or build the cache with more sequences"
            raise PagesExhausted.of(call, f"each sequence needs a {self._what} of its own", given, fix)
        seq = Sequence(self, self._made, None)
        with self._change():
            self._hold(seq, self._pool.take(self._each)[0])
            self._enter(seq)
        return seq

    def append(
        self,
        seqs: Ordered[Sequence],
        k: Tensor,
        v: Tensor,
        layer: int = 0,
        *,
        lengths: Any = None,
        tokens: Any = None,
        index: Tensor | None = None,
    ) -> None:
        """Store the keys and values of a step's tokens in one layer; the last layer ends the step.

        Parameters
        ----------
        seqs : list of Sequence
            Each once.
        k : Tensor, shape (n, Hkv, T, D)
            Keys of T tokens for each sequence; ragged: all tokens packed as (1, Hkv, sum T, D).
        v : Tensor, shape (n, Hkv, T, Dv)
        layer : int
            Layers come in order 0, 1, ..., with the same sequences and counts. Pages are taken at layer 0, and
            `seq.length` grows with the last one.
        lengths : list of int
            Ragged: the tokens of each sequence, 0 or more.
        tokens : list of n rows of T ids, ragged: one packed list
            The step's token ids, so that a prefix cache can share the pages that they fill. Ids that follow a gap, a
            step without them, cannot be used and are only checked.
        index : Tensor, shape (n, 1, T, Di)
            The keys of an indexer, in a cache with index_dim = Di.

        Raises
        ------
        PagesExhausted
            Too few free pages; nothing was changed, for no sequence.
        ShapeError, ArgumentError, ArgumentTypeError
            Arguments that do not fit; nothing was changed.

        Notes
        -----
        Cost: a copy of the numbers, and about 1 microsecond a sequence. What is stored has no gradient.
        """
        if layer.__class__ is not int or layer < 0 or layer >= self.layers:
            refuse_layer(self, "append", layer)
        self._mend()
        if layer:
            step = self._going_on(seqs, layer, lengths)
            T = step.T if step.seqs or not isinstance(k, Tensor) or k.ndim < 2 else k.shape[-2]
            rows = self._spec.rows(self._name, k, v, 1 if lengths is not None else len(step.seqs), T, index)
            if tokens is not None:
                check_repeated(self, step, tokens)
            if step.places is not None:
                self._storage.write(layer, rows, step.places, step.filled)
            if layer + 1 < self.layers:
                step.next = layer + 1
                return
            claim = None
        else:
            call = f"{self._name}.append()"
            names = check_seqs(self, call, seqs)
            if self._steps:
                refuse_open(self, call, names)
            ragged = None if lengths is None else checks.counts(call, "lengths", lengths, len(names))
            T = sum(ragged) if ragged is not None else k.shape[-2] if isinstance(k, Tensor) and k.ndim >= 2 else -1
            rows = self._spec.rows(self._name, k, v, len(names) if ragged is None else 1, T, index)
            known = None if tokens is None else self._check_tokens(call, names, tokens, T, ragged)
            step = Unfinished(names, T, ragged, known)
            claim = self._count(call, step)
        self._dirty = True  # as `_change` does, without its object: this is the path of every token
        try:
            if layer == 0:
                self._recent = []
                self._claim(claim)
                if step.total:
                    step.places, step.filled = self._places(step), self._filled(step)
                    self._storage.write(0, rows, step.places, step.filled)
            if layer + 1 == self.layers:
                self._commit(step)
            else:
                for seq, end in zip(step.seqs, step.ends, strict=True):
                    seq._step, seq._end = step, end
                step.next = 1
                if step.seqs:
                    self._steps[step] = None
        except BaseException:
            self._repair()
            raise
        self._dirty = False

    def step(self, seqs: Ordered[Sequence], lengths: Any = None, T: int | None = None, *, tokens: Any = None) -> Step:
        """A step of T tokens a sequence, or ragged of lengths[i], for a model's layers to fill in turn.

        Parameters
        ----------
        seqs : list of Sequence
            Each once.
        lengths : list of int
            Ragged: the tokens of each sequence, 0 or more.
        T : int
            Or one number for all; one of the two is given.
        tokens
            As for `append`.

        Returns
        -------
        Step

        Raises
        ------
        ArgumentError, ArgumentTypeError, ShapeError
            Both or neither of T and lengths, or sequences that cannot begin a step.
        """
        call, names = self._between_steps("step", seqs)
        if (lengths is None) == (T is None):
            given = "neither" if T is None else f"T={shown(T)} and lengths={shown(lengths)}"
            raise ArgumentError.of(call, "a step takes T or lengths", given, "Pass T=1, or lengths=[...]")
        if lengths is None:
            return Step(self, names, checks.size(call, "T", T, low=0), None, tokens)
        counts = checks.counts(call, "lengths", lengths, len(names))
        return Step(self, names, sum(counts), counts, tokens)

    def rollback(self, seqs: Ordered[Sequence] | Sequence) -> None:
        """Forget the unfinished steps that these sequences are in, for all sequences of those steps.

        Finished steps stay; nothing happens to sequences without an unfinished one.

        Parameters
        ----------
        seqs : Sequence or list of Sequence

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Sequences of another cache, freed or swapped out.
        """
        self._mend()
        names = check_seqs(self, f"{self._name}.rollback()", [seqs] if isinstance(seqs, Sequence) else seqs)
        self._undo(names)

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget a sequence's tokens past `length`, as speculative decoding does with what was not accepted.

        Known token ids past it are forgotten, too. Pages that others use stay as they are.

        Parameters
        ----------
        seq : Sequence
        length : int
            0 .. seq.length.

        Raises
        ------
        ArgumentError
            length > seq.length, an unfinished step, or (with a window) keys that a query at `length` sees and that
            were given back. The tokens of the last step can always be taken back.
        """
        call, _ = self._between_steps("truncate", [seq])
        length = integer(call, "length", length)
        if length > seq._length:
            given = f"length={length} and a sequence of {seq._length} tokens"
            fix = "Pass a length of at most seq.length"
            raise ArgumentError.of(call, "truncate only makes a sequence shorter", given, fix)
        if not self._reaches(seq, length):
            first = max(length - (self.window or 0) + 1, 0)
            given = f"length={length}, window={self.window}, and the keys before {seq._gone * self.page_size} are gone"
            fix = "Truncate by at most the last step's tokens, or free the sequence and compute it anew"
            rule = f"a query at {length} sees the keys from {first} on, so they must still be stored"
            raise ArgumentError.of(call, rule, given, fix)
        if length == seq._length and (seq._tokens is None or len(seq._tokens) <= length):
            return
        with self._change():
            self._tick()
            self._shorten(seq, length)
            self._trim(seq)

    def free(self, seqs: Ordered[Sequence] | Sequence) -> None:
        """End sequences and give their pages back; an unfinished step that one of them is in is rolled back first.

        Parameters
        ----------
        seqs : Sequence or list of Sequence

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Sequences of another cache, or freed already.
        """
        call = f"{self._name}.free()"
        self._mend()
        names = check_seqs(self, call, [seqs] if isinstance(seqs, Sequence) else seqs, swapped=True)
        self._undo(names)
        with self._change():
            self._tick()
            for seq in names:
                seq._live = seq._host = None
                del self._seqs[seq]
                self._give_back(self._owned(seq))
                seq._table, seq._own = array("i"), None

    def stats(self) -> Stats:
        """Figures of the cache as it is now; str() of them is a readable table."""
        self._mend()
        pool, storage, P = self._pool, self._storage, self.page_size
        used = [page for page, refs in enumerate(pool.refs) if refs]
        tokens = len(used) * P - self._empty_slots()
        waste = len(used) * P - tokens
        return Stats(
            cache=self._name,
            pages=len(pool.refs),
            page_size=P,
            pages_used=len(used),
            pages_shared=sum(1 for page in used if pool.refs[page] > 1),
            pages_cached=len(pool.cached),
            pages_free=len(pool.free),
            sequences=len(self._seqs),
            tokens=tokens,
            waste_tokens=waste,
            waste_bytes=waste * storage.bytes_per_slot,
            hits=self._hits,
            lookups=self._lookups,
            bytes=storage.bytes,
            bytes_per_token=storage.bytes_per_slot,
            dtype=self.dtype,
            storage=storage.planes[0][0].data.dtype,
        )

    def __repr__(self) -> str:
        pool = self._pool
        used = len(pool.refs) - pool.available
        return (
            f"{self._name}({used} of {len(pool.refs)} pages of {self.page_size} used, {len(self._seqs)} sequences, "
            f"layers={self.layers}, dtype={short(self.dtype)}, storage={short(self.storage)})"
        )

    # ---- what differs between caches

    _what: str  # what each sequence gets all its pages as, at once
    _each = 1  # and how many pages that is

    def _hold(self, seq: Sequence, pages: list[int]) -> None:
        """Keep the pages that `add` took for a sequence."""
        raise NotImplementedError

    def _count(self, call: str, step: Unfinished) -> Any:
        """What the step needs, or an error where there is not enough. Changes nothing."""
        raise NotImplementedError

    def _claim(self, claim: Any) -> None:
        """Take what `_count` found."""
        raise NotImplementedError

    def _settle(self, step: Unfinished) -> None:
        """What follows once a step is committed."""

    def _empty_slots(self) -> int:
        """Slots of pages in use that hold no token."""
        raise NotImplementedError

    def _check_tokens(
        self, call: str, names: tuple[Sequence, ...], tokens: Any, T: int, lengths: tuple[int, ...] | None
    ) -> list[array[int]]:
        rule = f"tokens are for caches that share prefixes, and a {self._name} does not"
        raise ArgumentError.of(call, rule, "tokens", "Leave them out, or use qkv.cache.PagedCache")

    # ---- steps

    def _between_steps(self, method: str, seqs: Any) -> tuple[str, tuple[Sequence, ...]]:
        """The call, for messages, and its sequences, once none of them is in an unfinished step."""
        call = f"{self._name}.{method}()"
        self._mend()
        names = check_seqs(self, call, seqs)
        refuse_open(self, call, names)
        return call, names

    def _going_on(self, seqs: Any, layer: int, lengths: Any) -> Unfinished:
        """The unfinished step that layer > 0 of `seqs` belongs to."""
        call = f"{self._name}.append()"
        try:
            step: Unfinished | None = seqs[0]._step if seqs else None
            if (
                step is not None
                and step.next == layer
                and step in self._steps
                and step.seqs == (seqs if seqs.__class__ is tuple else tuple(seqs))
                and (
                    lengths is step.lengths
                    or (
                        step.lengths is not None
                        and checks.counts(call, "lengths", lengths, len(step.seqs)) == step.lengths
                    )
                )
            ):
                return step
        except (AttributeError, TypeError, KeyError):
            pass
        names = check_seqs(self, call, seqs)
        if not names:
            return Unfinished((), 0, None if lengths is None else (), None)
        raise other_step(self, call, names, layer, lengths)

    def _places(self, step: Unfinished) -> Places:
        P = self.page_size
        wide = self._spec.heads * P
        base = array("q")
        if step.lengths is None and step.T == 1:
            base.extend([seq._table[seq._length // P] * wide + seq._length % P for seq in step.seqs])
            return Places(base, len(step.seqs), 1, self._spec.heads, P, self.device)
        for seq, end in zip(step.seqs, step.ends, strict=True):
            at, table = seq._length, seq._table
            while at < end:
                stop = min(end, at - at % P + P)
                first = table[at // P] * wide + at % P
                base.extend(range(first, first + stop - at))
                at = stop
        n = 1 if step.lengths is not None else len(step.seqs)
        return Places(base, n, step.T, self._spec.heads, P, self.device)

    def _commit(self, step: Unfinished) -> None:
        self._committing = step  # from here on the step is finished, whatever interrupts: `_repair` goes on
        self._advance(step)
        self._committing = None  # layouts that had the step's tokens stay what they are: `next` is past all layers
        self._settle(step)
