"""Attention as layers: projections, positions and masks around `qkv.attention`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkv.nn.attention import Attention
    from qkv.nn.indexer import Indexer
    from qkv.nn.latent import LatentAttention
    from qkv.nn.multihead import MultiheadAttention
    from qkv.nn.sparse import SparseAttention

_LAZY = {
    "Attention": "qkv.nn.attention",
    "Indexer": "qkv.nn.indexer",
    "LatentAttention": "qkv.nn.latent",
    "MultiheadAttention": "qkv.nn.multihead",
    "SparseAttention": "qkv.nn.sparse",
}

__all__ = ["Attention", "Indexer", "LatentAttention", "MultiheadAttention", "SparseAttention"]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(import_module(_LAZY[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'qkv.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
