"""The plainest cache: one contiguous stretch of memory a sequence."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection
from typing import Any

import torch

from qkv.cache import checks
from qkv.cache.base import Cache
from qkv.cache.pool import PagePool
from qkv.cache.sequence import Sequence, Unfinished
from qkv.cache.spec import Spec
from qkv.cache.storage import Storage
from qkv.errors import ArgumentError

_FIRST = 64  # slots of a growing cache at the start
_MULTIPLE = 16


class DenseCache(Cache):
    """Keys and values of up to `sequences` sequences, each in one contiguous stretch of `capacity` slots.

    Parameters
    ----------
    sequences : int
        Most sequences at a time.
    num_kv_heads, head_dim, value_dim : int
        Hkv, D and Dv (= D unless given).
    capacity : int
        Most tokens of a sequence, all allocated at once. None: the memory doubles when full (new tensors, copied).
    index_dim, summaries, layers, dtype, storage, device, debug
        As in `qkv.cache.PagedCache`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, or tensors that memory cannot hold.

    Notes
    -----
    Memory: sequences * capacity tokens whatever is stored; `PagedCache` wastes less than a page a sequence.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = DenseCache(sequences=1, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    >>> seq = cache.add()
    >>> cache.append([seq], torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16))
    >>> seq.length, cache.page_size
    (100, 128)
    """

    _what = "place"

    def __init__(
        self,
        *,
        sequences: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        capacity: int | None = None,
        index_dim: int = 0,
        summaries: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        debug: bool = False,
    ) -> None:
        call = "qkv.cache.DenseCache()"
        spec = Spec.of_heads(call, num_kv_heads, head_dim, value_dim, index_dim, layers, dtype, storage, device, debug)
        self._begin_dense(call, spec.summarising(call, summaries), sequences, capacity)

    def _begin_dense(self, call: str, spec: Spec, sequences: Any, capacity: Any) -> None:
        """What is the same for keys and values, and for latents."""
        count = checks.size(call, "sequences", sequences)
        self.capacity = None if capacity is None else checks.size(call, "capacity", capacity)
        slots = _rounded(_FIRST if self.capacity is None else self.capacity, spec)
        super().__init__(Storage(spec, count, slots), PagePool(count))

    def _hold(self, seq: Sequence, pages: list[int]) -> None:
        seq._table = array("i", pages)

    def _count(self, call: str, step: Unfinished) -> Any:
        longest = max(step.ends, default=0)
        if self.capacity is not None and longest > self.capacity:
            given = f"{longest} tokens and capacity={self.capacity}"
            fix = "Build the cache with a larger capacity, or leave it out to let it grow"
            raise ArgumentError.of(call, "a sequence must fit into the capacity", given, fix)
        return longest

    def _claim(self, claim: Any) -> None:
        if claim <= self.page_size:
            return
        self._storage = self._storage.grown(_rounded(max(claim, 2 * self.page_size), self._spec))
        self.page_size = self._storage.page_size
        self._tick()

    def _repair(self) -> None:
        self.page_size = self._storage.page_size
        super()._repair()

    def _owned(self, seq: Sequence) -> Collection[int]:
        return seq._table

    def _trim(self, seq: Sequence) -> None:
        if self.debug:
            self._poison_tail(seq)

    def _cut(self, seq: Sequence) -> None:
        pass

    def _poison_tail(self, seq: Sequence) -> None:
        self._storage.poison_slots(seq._table[0], seq._length)

    def _empty_slots(self) -> int:
        return sum(self.page_size - seq._length for seq in self._seqs)


def _rounded(slots: int, spec: Spec) -> int:
    """So many slots or a few more: blocks of summaries divide them."""
    step = math.lcm(_MULTIPLE, spec.summaries or 1)
    return -(-slots // step) * step
