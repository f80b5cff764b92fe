"""Keys that a model has selected for each query: tensors `indices` and `block_indices` of sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.checks import shown
from qkv.errors import ShapeError, UnsupportedError
from qkv.masks import Mask, selected_blocks

_CALL = "attn_implementation='qkv'"


def selected(module: Any, query: Tensor, Lk: int, indices: Tensor | None, block_indices: Tensor | None) -> Mask | None:
    """Which of Lk keys are selected by both, where they are given; None = all of them."""
    keys = None if indices is None else _keys(indices, query, Lk)
    if block_indices is None:
        return keys
    blocks = _blocks(block_indices, module, query)
    return blocks if keys is None else keys & blocks


def _keys(indices: Tensor, query: Tensor, Lk: int) -> Mask | None:
    """The keys of int `indices` (B, Lq, n), negative for none; None = all of them. Cost: nothing a pair."""
    B, Lq = query.shape[0], query.shape[2]
    if indices.ndim != 3 or indices.shape[:2] != (B, Lq):
        rule = "indices must select keys for each query: int (B, Lq, n)"
        raise ShapeError.of(_CALL, rule, f"indices {shown(indices)}, B={B} and Lq={Lq}", "Use 'eager'")
    if indices.shape[2] >= Lk and (torch.compiler.is_compiling() or bool((indices >= 0).all())):
        return None  # the best n of no more than n
    return selected_blocks(indices[:, None], 1)


def _blocks(block_indices: Tensor, module: Any, query: Tensor) -> Mask:
    """The blocks of int `block_indices` (B, groups of heads, Lq, n), negative for none.

    The size of a block is that of the layer's indexer.
    """
    B, Hq, Lq = query.shape[:3]
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        rule = "block_indices need a layer whose `indexer` has a `block_size`"
        raise UnsupportedError.of(_CALL, rule, type(module).__name__, "Use attn_implementation='eager'")
    fits = block_indices.ndim == 4 and block_indices.shape[0] == B and block_indices.shape[2] == Lq
    if not fits or Hq % block_indices.shape[1]:
        rule = "block_indices must select blocks for each group of heads and query: int (B, groups, Lq, n)"
        given = f"block_indices {shown(block_indices)}, B={B}, Hq={Hq} and Lq={Lq}"
        raise ShapeError.of(_CALL, rule, given, "Use attn_implementation='eager'")
    return selected_blocks(block_indices, size)
