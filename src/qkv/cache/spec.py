"""What a cache stores of a token, and in what: the part of its arguments that its tensors follow from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks
from qkv.errors import ArgumentError


@dataclass(frozen=True)
class Spec:
    """Keys and values of heads, or the latents of one head whose first `rank` columns are its values."""

    heads: int
    widths: tuple[int, ...]  # of a head's key and value, or of a latent
    rank: int | None
    layers: int
    dtype: torch.dtype  # of given tensors, queries and outputs
    storage: torch.dtype  # of what is stored
    device: torch.device
    debug: bool
    index: int = 0  # of an indexer's key, one a token for all heads; 0: none
    summaries: int = 0  # keys of a block whose mean, minimum and maximum are kept; 0: none

    @classmethod
    def of_heads(cls, call: str, num_kv_heads: Any, head_dim: Any, value_dim: Any, index: Any, *common: Any) -> Spec:
        """Keys and values; `common` are layers, dtype, storage, device and debug, as users pass them."""
        H, D = checks.size(call, "num_kv_heads", num_kv_heads), checks.size(call, "head_dim", head_dim)
        Dv = D if value_dim is None else checks.size(call, "value_dim", value_dim)
        return cls(H, (D, Dv), None, *checks.common(call, *common), checks.size(call, "index_dim", index, low=0))

    @classmethod
    def of_latents(cls, call: str, rank: Any, rope_dim: Any, index: Any, *common: Any) -> Spec:
        """Latents of `rank` numbers with rotary parts."""
        R = checks.size(call, "rank", rank)
        width = R + checks.size(call, "rope_dim", rope_dim)
        return cls(1, (width,), R, *checks.common(call, *common), checks.size(call, "index_dim", index, low=0))

    def summarising(self, call: str, block: Any, page_size: int | None = None) -> Spec:
        """The same with summaries of blocks, which divide a page where its size is given."""
        if block is None:
            return self
        block = checks.size(call, "summaries", block)
        if page_size is not None and page_size % block:
            given = f"summaries={block} and page_size={page_size}"
            fix = "Pass page_size= a multiple of summaries="
            raise ArgumentError.of(call, "blocks of summaries must divide a page", given, fix)
        return replace(self, summaries=block)

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """Heads and numbers of each tensor of a layer, in the order of `rows`."""
        own = tuple([(self.heads, width) for width in self.widths])
        return (*own, (1, self.index)) if self.index else own

    def rows(self, name: str, k: Any, v: Any, n: int, T: int, index: Any) -> tuple[Tensor, ...]:
        """A step's tensors, checked, as one (n, H, T, width) for each plane; `k` and `v` may be latents and ropes."""
        (H, W, R), dtype, device = (self.heads, self.widths, self.rank), self.dtype, self.device
        first, second = ((n, H, T, W[0]), (n, H, T, W[1])) if R is None else ((n, T, R), (n, T, W[0] - R))
        try:
            fits = (
                k.shape == first
                and v.shape == second
                and k.dtype is dtype
                and v.dtype is dtype
                and k.device == v.device == device
                and k.layout is v.layout is torch.strided
            )
        except AttributeError:
            fits = False
        if not fits:
            named = (("k", k), ("v", v)) if R is None else (("latent", k), ("rope", v))
            checks.check_rows(f"{name}.append()", named, (first, second), dtype, device)
        rows = (k, v) if R is None else (torch.cat((k.detach(), v.detach()), dim=-1)[:, None],)
        if index is None and not self.index:
            return rows
        checks.check_index(f"{name}.append()", index, (n, 1, T, self.index), dtype, device)
        return (*rows, index)
