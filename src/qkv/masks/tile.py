"""What masks and score terms are asked about: the place of a tile of query-key pairs, and the sizes of its call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ALL = slice(None)


class Sizes(NamedTuple):
    """The call that a mask or a score term has to fit."""

    B: int
    Hq: int
    Lq: int
    Lk: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class Tile(NamedTuple):
    """Where a tile lies: the selection of each axis, and its indices as int64 tensors that broadcast to 4-D."""

    batch: slice
    heads: slice | Tensor
    rows: slice | Tensor
    keys: slice
    b: Tensor
    h: Tensor
    i: Tensor
    p: Tensor
    j: Tensor

    @classmethod
    def pairs(cls, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor) -> Tile:
        """The pairs with these indices, for masks, which look at nothing else."""
        return cls(_ALL, _ALL, _ALL, _ALL, b, h, i, p, j)
