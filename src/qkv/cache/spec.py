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
        dtype, device = self.dtype, self.device
        if self.rank is not None:
            sizes = ((n, T, self.rank), (n, T, self.widths[0] - self.rank))
            checks.check_rows(f"{name}.append()", (("latent", k), ("rope", v)), sizes, dtype, device)
            return (torch.cat((k.detach(), v.detach()), dim=-1)[:, None],)
        H, (D, Dv) = self.heads, self.widths
        try:
            if (
                k.shape == (n, H, T, D)
                and v.shape == (n, H, T, Dv)
                and k.dtype is dtype
                and v.dtype is dtype
                and k.device == v.device == device
                and k.layout is v.layout is torch.strided
            ):
                return k, v
        except AttributeError:
            pass
        checks.check_rows(f"{name}.append()", (("k", k), ("v", v)), ((n, H, T, D), (n, H, T, Dv)), dtype, device)
        return k, v
