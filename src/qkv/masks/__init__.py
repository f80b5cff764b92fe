"""The mask algebra: which keys each query may attend to, as immutable values that combine with & | ~.

A mask has no length: it speaks of the query's position p and the key's position j, so the same value serves training,
prefill, chunks and decode. True = may attend, everywhere.

>>> import qkv
>>> qkv.documents([3, 5]) & qkv.causal()
documents([3, 5]) & causal()
"""

from __future__ import annotations

from qkv.masks.base import And, Mask, Not, Or
from qkv.masks.intervals import Intervals
from qkv.masks.positions import resolve_positions
from qkv.masks.program import Op, Program
from qkv.masks.segments import documents, padding
from qkv.masks.shapes import causal, chunked, dilated, global_tokens, prefix, sliding_window, strided, window
from qkv.masks.sparse import bigbird, blocks, longformer, per_head, random_blocks
from qkv.masks.tensor import as_mask, dense, mask_mod

__all__ = [
    "And",
    "Intervals",
    "Mask",
    "Not",
    "Op",
    "Or",
    "Program",
    "as_mask",
    "bigbird",
    "blocks",
    "causal",
    "chunked",
    "dense",
    "dilated",
    "documents",
    "global_tokens",
    "longformer",
    "mask_mod",
    "padding",
    "per_head",
    "prefix",
    "random_blocks",
    "resolve_positions",
    "sliding_window",
    "strided",
    "window",
]
