"""A step: the tokens that some sequences get at once, layer after layer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered
from typing import Any, Protocol

import torch
from torch import Tensor

from qkv.cache.sequence import Sequence
from qkv.call.keys import KVView, LayerCache
from qkv.checks import integer
from qkv.errors import ArgumentError, ShapeError


class Home(Protocol):
    """What a step asks of its cache."""

    layers: int
    device: torch.device

    def append(
        self, seqs: Ordered[Sequence], k: Tensor, v: Tensor, layer: int, *, lengths: Any, tokens: Any, index: Any
    ) -> None: ...

    def view(self, seqs: Ordered[Sequence], layer: int, *, lengths: Any) -> KVView: ...

    def index_view(self, seqs: Ordered[Sequence], layer: int, *, lengths: Any) -> KVView: ...


class Step:
    """A step of some sequences, layer by layer, as a model takes it; made by `cache.step(seqs, T=1)`.

    `layer(i)` is a `qkv.call.keys.LayerCache`: append the layer's keys and values, then attend to its view.

    Parameters
    ----------
    cache, seqs, T, lengths, tokens
        What `cache.step` was given.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = qkv.cache.PagedCache(pages=8, num_kv_heads=1, head_dim=4, layers=2, dtype=torch.float32)
    >>> seqs = [cache.add(), cache.add()]
    >>> step = cache.step(seqs, T=3)
    >>> for i in range(2):
    ...     layer = step.layer(i)
    ...     layer.append(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    >>> step.positions, seqs[0].length
    (tensor([[0, 1, 2],
            [0, 1, 2]]), 3)
    """

    __slots__ = ("T", "_cache", "_positions", "_starts", "_tokens", "lengths", "seqs")

    def __init__(
        self, cache: Home, seqs: tuple[Sequence, ...], T: int, lengths: tuple[int, ...] | None, tokens: Any
    ) -> None:
        self._cache, self.seqs, self.T, self.lengths, self._tokens = cache, seqs, T, lengths, tokens
        self._starts = [seq._length for seq in seqs]
        self._positions: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """int64 (n, T), ragged (1, sum T): where the step's tokens stand in their sequences."""
        if self._positions is None:
            starts, T = self._starts, self.T
            if self.lengths is None:
                first = torch.tensor(starts, dtype=torch.int64, device="cpu").view(-1, 1)
                made = first + torch.arange(T, dtype=torch.int64, device="cpu")
            else:
                flat = array("q")
                for start, count in zip(starts, self.lengths, strict=True):
                    flat.extend(range(start, start + count))
                made = torch.tensor(flat, dtype=torch.int64, device="cpu").view(1, T)
            self._positions = made.to(self._cache.device)
        return self._positions

    def layer(self, i: int) -> LayerCache:
        """One layer of the step.

        Parameters
        ----------
        i : int
            0 .. layers - 1.

        Returns
        -------
        LayerCache
        """
        integer("Step.layer()", "i", i, high=self._cache.layers - 1)
        return LayerStep(self, i)

    def __repr__(self) -> str:
        counts = self.T if self.lengths is None else list(self.lengths)
        return f"Step({len(self.seqs)} sequences, {counts} tokens, {self._cache.layers} layers)"


class LayerStep:
    """One layer of a `Step`; a `qkv.call.keys.LayerCache`.

    Parameters
    ----------
    step : Step
    layer : int
    """

    __slots__ = ("_layer", "_step")

    def __init__(self, step: Step, layer: int) -> None:
        self._step, self._layer = step, layer

    def append(self, k: Tensor, v: Tensor, index: Tensor | None = None) -> None:
        """Store the step's keys and values in this layer.

        Parameters
        ----------
        k : Tensor, shape (n, Hkv, T, D)
            Ragged: packed as (1, Hkv, T, D).
        v : Tensor, shape (n, Hkv, T, Dv)
        index : Tensor, shape (n, 1, T, Di)
            The keys of an indexer, in a cache with index_dim = Di.
        """
        step, tokens = self._step, self._begun(k)
        step._cache.append(step.seqs, k, v, self._layer, lengths=step.lengths, tokens=tokens, index=index)

    def _begun(self, k: Tensor) -> Any:
        """The step's token ids, where the cache is to know them now, once the step fits the sequences and k."""
        call, step, layer = "LayerCache.append()", self._step, self._layer
        if layer == 0 and [seq._length for seq in step.seqs] != step._starts:
            rule = "a Step is for the lengths its sequences had when it was made"
            given = f"lengths {step._starts} then, {[seq._length for seq in step.seqs]} now"
            raise ArgumentError.of(call, rule, given, "Make a new one with cache.step() for each step")
        T = k.shape[-2] if isinstance(k, Tensor) and k.ndim >= 2 else step.T
        if step.T != T:
            given = f"{T} tokens and a step of {step.T}"
            raise ShapeError.of(call, "a step has one number of tokens in all layers", given, "Pass them all")
        return step._tokens if layer == 0 else None

    def view(self) -> KVView:
        """All keys of the sequences in this layer, the step's own among them."""
        return self._step._cache.view(self._step.seqs, self._layer, lengths=self._step.lengths)

    def index_view(self) -> KVView:
        """The index keys of the sequences in this layer, the step's own among them; `Cache.index_view` says more."""
        return self._step._cache.index_view(self._step.seqs, self._layer, lengths=self._step.lengths)

    @property
    def positions(self) -> Tensor:
        """int64 (n, T), ragged (1, T): where the step's tokens stand in their sequences."""
        return self._step.positions
