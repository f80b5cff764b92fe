"""The mask algebra: which keys each query may attend to, as immutable values that combine with & | ~.

A mask has no length: it speaks of the query's position p and the key's position j, so the same value serves training,
prefill, chunks and decode. True = may attend, everywhere.

>>> import qkv
>>> qkv.documents([3, 5]) & qkv.causal()
documents([3, 5]) & causal()
"""

from __future__ import annotations

from qkv.masks.base import And as And, Mask as Mask, Not as Not, Or as Or, as_mask as as_mask
from qkv.masks.constructors import *
from qkv.masks.intervals import Intervals as Intervals
from qkv.masks.portion import portion as portion
from qkv.masks.positions import read_positions as read_positions, resolve_positions as resolve_positions
from qkv.masks.program import Program as Program
from qkv.masks.tile import Sizes as Sizes, Tile as Tile
