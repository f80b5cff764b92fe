"""What a cache stores of a token, and in what: the part of its arguments that its tensors follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.cache import checks


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

    @classmethod
    def of_heads(cls, call: str, num_kv_heads: Any, head_dim: Any, value_dim: Any, *common: Any) -> Spec:
        """Keys and values; `common` are layers, dtype, storage, device and debug, as users pass them."""
        H, D = checks.size(call, "num_kv_heads", num_kv_heads), checks.size(call, "head_dim", head_dim)
        Dv = D if value_dim is None else checks.size(call, "value_dim", value_dim)
        return cls(H, (D, Dv), None, *checks.common(call, *common))

    @classmethod
    def of_latents(cls, call: str, rank: Any, rope_dim: Any, *common: Any) -> Spec:
        """Latents of `rank` numbers with rotary parts."""
        R = checks.size(call, "rank", rank)
        return cls(1, (R + checks.size(call, "rope_dim", rope_dim),), R, *checks.common(call, *common))

    def rows(self, name: str, k: Any, v: Any, n: int, T: int) -> tuple[Tensor, ...]:
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
        return (k, v) if R is None else (torch.cat((k.detach(), v.detach()), dim=-1)[:, None],)
