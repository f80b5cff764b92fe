"""What the layers share: checks of sizes and inputs, the norm, masks combined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError, UnsupportedError, describe
from qkv.masks import Mask
from qkv.masks.arguments import shown, whole


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (float64 for float64).

    Half types keep x's dtype whatever the weight's, so that queries, keys and values agree under autocast.
    Source: Zhang and Sennrich (2019), arXiv 1910.07467.
    """

    def __init__(
        self, size: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def size(call: str, name: str, value: Any, low: int = 1) -> int:
    """A size given to a layer."""
    number = whole(value)
    fix = f"Pass a whole number >= {low}"
    if number is None:
        given = f"{name}={shown(value)} ({type(value).__name__})"
        raise ArgumentTypeError(describe(call, f"{name} must be an integer", given, fix))
    if number < low:
        raise ArgumentError(describe(call, f"{name} must be >= {low}", f"{name}={number}", fix))
    return number


def check_tokens(call: str, name: str, x: Any, width_name: str, width: int) -> None:
    """x must be (B, L, width)."""
    if not isinstance(x, Tensor):
        rule, fix = f"{name} must be a tensor", f"Pass (B, L, {width})"
        raise ArgumentTypeError(describe(call, rule, f"{name}={shown(x)} ({type(x).__name__})", fix))
    if x.dim() != 3 or x.shape[-1] != width:
        fix = (
            "Add the batch dimension with unsqueeze(0)" if x.dim() == 2 else f"Build the layer with {width_name} of it"
        )
        given = f"{name} {tuple(x.shape)} and {width_name}={width}"
        raise ShapeError(describe(call, f"{name} must be (B, L, {width_name})", given, fix))


def refuse_cache(call: str, cache: Any) -> None:
    """No cache exists yet: none is silently ignored."""
    if cache is not None:
        rule, given = "caches are not supported yet", f"cache of type {type(cache).__name__}"
        fix = "Leave cache out and pass the whole sequence, with mask=qkv.causal()"
        raise UnsupportedError(describe(call, rule, given, fix))


def combined(own: Mask | None, mask: Mask | Tensor | None) -> Mask | Tensor | None:
    """What both the layer's and the call's mask allow."""
    if own is None or mask is None:
        return mask if own is None else own
    return own & mask
