"""A cache for multi-head latent attention: one compressed vector and one rotary part a token, for all heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks
from qkv.cache.base import Cache
from qkv.cache.dense import DenseCache
from qkv.cache.paged import PagedCache
from qkv.cache.spec import Spec

_CALL = "qkv.cache.LatentCache()"


class LatentCache(Cache):
    """Latents of multi-head latent attention (MLA), on pages or dense: R + rope numbers a token, whatever the heads.

    ::

        key of a token     [ latent (R) | rotary part (rope) ]       one for all query heads, Hkv = 1
        value of a token   [ latent (R) ]                            the same memory, read once

    Parameters
    ----------
    rank, rope_dim : int
        R, numbers of the compressed vector, and those of the rotary part.
    pages, page_size, identity
        On pages, with all that `qkv.cache.PagedCache` does: sharing, forks, eviction, swapping.
    sequences, capacity
        Dense, as `qkv.cache.DenseCache`; in place of pages.
    index_dim, summaries, layers, dtype, storage, device, debug
        As in `qkv.cache.PagedCache`; in 8 bits one scale serves key and value.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Sizes and types that do not fit, or both or neither of pages and sequences.

    Notes
    -----
    Queries are absorbed: q (n, Hq, T, R + rope), and attention's output is (n, Hq, T, R). `qkv.nn.LatentAttention` says
    how. Source: DeepSeek-AI (2024), DeepSeek-V2, arXiv 2405.04434.

    Examples
    --------
    >>> import torch, qkv
    >>> cache = LatentCache(rank=32, rope_dim=8, pages=4, dtype=torch.float32)
    >>> seq = cache.add()
    >>> cache.append([seq], torch.randn(1, 5, 32), torch.randn(1, 5, 8))
    >>> view = cache.view([seq])
    >>> view.k.shape, view.v.shape, view.v.data_ptr() == view.k.data_ptr()
    (torch.Size([4, 1, 16, 40]), torch.Size([4, 1, 16, 32]), True)
    """

    def __init__(
        self,
        *,
        rank: int,
        rope_dim: int,
        pages: int | None = None,
        page_size: int = 16,
        sequences: int | None = None,
        capacity: int | None = None,
        index_dim: int = 0,
        summaries: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        storage: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        identity: str | bytes | int | None = None,
        debug: bool = False,
    ) -> None:
        of_pages = {"page_size": None if page_size == 16 else page_size, "identity": identity}
        checks.one_kind(_CALL, "latent", pages, sequences, of_pages=of_pages, of_dense={"capacity": capacity})
        if pages is not None:
            pages, page_size = checks.size(_CALL, "pages", pages), checks.size(_CALL, "page_size", page_size)
        spec = Spec.of_latents(_CALL, rank, rope_dim, index_dim, layers, dtype, storage, device, debug)
        spec = spec.summarising(_CALL, summaries, None if pages is None else page_size)
        if isinstance(self, PagedLatentCache):
            assert pages is not None
            self._begin_paged(_CALL, spec, pages, page_size, identity, None, 0)
        else:
            assert isinstance(self, DenseLatentCache)
            self._begin_dense(_CALL, spec, sequences, capacity)

    def __new__(cls, *args: Any, **given: Any) -> Any:
        if cls is not LatentCache:
            return super().__new__(cls)
        # Which of its kinds it is follows from the arguments. An object given another class later is slower to read.
        return super().__new__(PagedLatentCache if given.get("sequences") is None else DenseLatentCache)

    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]  # so that help() shows what it takes

    def append(  # type: ignore[override]
        self,
        seqs: Any,
        latent: Tensor,
        rope: Tensor,
        layer: int = 0,
        *,
        lengths: Any = None,
        tokens: Any = None,
        index: Tensor | None = None,
    ) -> None:
        """Store the latents and rotary parts of a step's tokens in one layer; the last layer ends the step.

        Parameters
        ----------
        latent : Tensor, shape (n, T, R); ragged (1, sum T, R)
        rope : Tensor, shape (n, T, rope_dim)
            After rotation.
        seqs, layer, lengths, tokens, index
            As in `qkv.cache.PagedCache.append`; so are the errors.
        """
        super().append(seqs, latent, rope, layer, lengths=lengths, tokens=tokens, index=index)


class PagedLatentCache(LatentCache, PagedCache):
    """A `LatentCache` on pages."""

    _name = "LatentCache"


class DenseLatentCache(LatentCache, DenseCache):
    """A dense `LatentCache`."""

    _name = "LatentCache"
