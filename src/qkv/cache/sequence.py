"""A sequence of tokens in a cache, the handle that users hold, and the step that some of them are in."""

from __future__ import annotations

from array import array

from torch import Tensor

from qkv.cache.prefix import Entry, Root
from qkv.cache.storage import Places
from qkv.cache.summaries import Filled

NEVER = 1 << 62


class Host:
    """The pages of a sequence in host memory: `read`'s tensors, their places in the table, and their old entries."""

    __slots__ = ("entries", "places", "size", "tensors")

    def __init__(self, tensors: list[Tensor], places: list[int], entries: list[Entry | None], size: int) -> None:
        self.tensors, self.places, self.entries, self.size = tensors, places, entries, size


class Sequence:
    """One sequence in a cache, made by `cache.add()` or `cache.fork()`; two are equal only if they are the same object.

    Parameters
    ----------
    home : Cache
        The cache that made it.
    number : int
        How many that cache had made before.
    root
        Where its chain of shared pages begins; None in caches that share none.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = qkv.cache.DenseCache(sequences=2, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    >>> seq = cache.add()
    >>> seq, seq.length, seq.pages, seq.tokens
    (Sequence(#0, 0 tokens, 1 page), 0, (0,), None)
    """

    __slots__ = (
        "_cached", "_chain", "_due", "_end", "_gone", "_hashed", "_home", "_host", "_length", "_live", "_number",
        "_own", "_root", "_step", "_table", "_tokens",
    )  # fmt: skip

    def __init__(self, home: object, number: int, root: Root | None) -> None:
        self._home = home
        self._live: object | None = None  # `home` while the sequence may be used
        self._number = number
        self._length = 0  # tokens of finished steps
        self._table: array[int] = array("i")  # logical page -> page, -1 where it was given back
        self._own: list[int] | None = None  # pages that belong to it for life (ring)
        self._gone = 0  # logical pages below this one, sinks aside, were given back
        self._step: Unfinished | None = None
        self._end = 0  # the length once that step is finished
        self._host: Host | None = None  # where its pages are while it is swapped out
        self._cached = 0
        # The prefix chain: its tokens as far as they are known, the entry of its last hashed page (None: the chain has
        # ended), how many pages are hashed, and the length at which the next one is.
        self._tokens: array[int] | None = None
        self._root = root
        self._chain: Entry | Root | None = root
        self._hashed = 0
        self._due = NEVER

    @property
    def length(self) -> int:
        """Tokens of finished steps."""
        return self._length

    @property
    def cached_tokens(self) -> int:
        """Leading tokens that were in the cache when the sequence was added: shared pages hold them."""
        return self._cached

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The token ids that are known, from the first on; None where none were given."""
        return None if self._tokens is None else tuple(self._tokens)

    @property
    def pages(self) -> tuple[int, ...]:
        """Its pages in order; -1 is one that was given back."""
        return tuple(self._table)

    def __repr__(self) -> str:
        if self._live is None:
            where = "freed" if self._host is None else "swapped out"
            return f"Sequence(#{self._number}, {self._length} tokens, {where})"
        held = sum(1 for page in self._table if page >= 0)
        return f"Sequence(#{self._number}, {self._length} tokens, {held} page{'s' * (held != 1)})"


class Unfinished:
    """What a cache knows about a step between its first layer and its last."""

    __slots__ = ("T", "counts", "ends", "filled", "lengths", "next", "places", "seqs", "tokens", "total")

    def __init__(
        self, seqs: tuple[Sequence, ...], T: int, lengths: tuple[int, ...] | None, tokens: list[array[int]] | None
    ) -> None:
        self.seqs, self.T, self.lengths, self.tokens = seqs, T, lengths, tokens
        self.counts = (T,) * len(seqs) if lengths is None else lengths
        self.ends = [seq._length + count for seq, count in zip(seqs, self.counts, strict=True)]
        self.total = T * len(seqs) if lengths is None else T
        self.next = 0  # the layer that comes next
        self.places: Places | None = None  # None where no token is stored
        self.filled: Filled | None = None  # blocks that are full with it, where summaries are kept
