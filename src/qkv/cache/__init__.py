"""Key/value caches: dense, ring, on pages, latent, with compressed blocks. `qkv.attention(q, cache.view(seqs))` reads.

>>> import torch, qkv
>>> cache = qkv.cache.PagedCache(pages=64, num_kv_heads=2, head_dim=16, dtype=torch.float32)
>>> a, b = cache.add(), cache.add()
>>> cache.append([a, b], torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16))
>>> twin = cache.fork(a)
>>> cache.append([a, twin], torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
>>> a.length, b.length, twin.length, cache.stats().pages_used
(6, 5, 6, 3)
"""

from __future__ import annotations

from qkv.cache.dense import DenseCache
from qkv.cache.external import stored
from qkv.cache.latent import LatentCache
from qkv.cache.paged import PagedCache
from qkv.cache.ring import RingCache
from qkv.cache.sequence import Sequence
from qkv.cache.sparse import SparseCache
from qkv.cache.stats import Stats
from qkv.cache.step import LayerStep, Step
from qkv.errors import PagesExhausted

__all__ = [
    "DenseCache",
    "LatentCache",
    "LayerStep",
    "PagedCache",
    "PagesExhausted",
    "RingCache",
    "Sequence",
    "SparseCache",
    "Stats",
    "Step",
    "stored",
]
