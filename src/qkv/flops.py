"""What FLOP counters are told about the private ops: `torch.utils.flop_counter.FlopCounterMode` and its users.

Two products of the forward pass, q k^T and p v, cost 2 (D + Dv) FLOPs a pair of a query and a key; the backward pass
computes five, of which three are as deep as D and two as Dv. PyTorch counts every pair of its own attention, causal or
not. Here a mask that is composed of causal, sliding_window, window, prefix and chunked of numbers counts the pairs that
it shows: they are the work that is done. The contents of tensors are never looked at: a mask that holds some, any other
mask, and positions that are data count every pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from qkv._torch import without_modes
from qkv.backends.tiled.schedule import HeadRow, count_tiles
from qkv.masks import Mask
from qkv.masks.portable import decode
from qkv.masks.shapes import Chunked, Prefix, Window

_MOST_ROWS = 1 << 22  # of queries whose pairs are counted one row at a time


def pairs(q: Tensor, k: Tensor, positions: Tensor | None, operands: Any, static: dict[str, Any]) -> int:
    """Pairs of a query and a key, over all batch rows and query heads, that the call computes with."""
    B, Hq, Lq, _ = q.shape
    Lk = k.shape[2]
    every = B * Hq * Lq * Lk
    plain = all(isinstance(n, int) for n in (B, Hq, Lq, Lk, *static["words"], *static["offsets"]))
    if not (plain and every and static["words"]) or operands or positions is not None:
        return every
    mask = decode(static["words"], ())
    if mask is None or not _exact(mask):
        return every
    offsets = {"end": [Lk - Lq], "at": static["offsets"]}.get(static["reading"], [0])
    heads = range(Hq if mask.varies_by_head else 1)
    if Lq * len(offsets) * len(heads) > _MOST_ROWS:
        return every
    lines = [HeadRow(b, h, offset, None) for b, offset in enumerate(offsets) for h in heads]
    with without_modes():  # one that makes tensors without data would count nothing
        shown = count_tiles(mask, lines, Lq, Lk, 1, 1).visible
    return shown * (B // len(offsets)) * (Hq // len(heads))


def _exact(mask: Mask) -> bool:
    """Whether the mask's intervals are the keys that it shows, and not just hold them."""
    parts = [part for value in vars(mask).values() for part in (value if isinstance(value, tuple) else (value,))]
    inner = [part for part in parts if isinstance(part, Mask)]
    return all(map(_exact, inner)) if inner else isinstance(mask, (Window, Prefix, Chunked))


def _forward(*given: Any, out_val: Any = None, **static: Any) -> int:
    q, k, v, _, positions, _, _, operands = given
    return 2 * int(q.shape[3] + v.shape[3]) * pairs(q, k, positions, operands, static)


def _backward(*given: Any, out_val: Any = None, **static: Any) -> int:
    q, k, v, _, positions, _, _, operands = given[5:]  # after d_out, d_lse, out, lse and state
    return 2 * int(3 * q.shape[3] + 2 * v.shape[3]) * pairs(q, k, positions, operands, static)


def register() -> None:
    """Tell the counters; those that exist already are not reached, so this is done as early as the ops are made."""
    for op, formula in ((torch.ops.qkv.attention, _forward), (torch.ops.qkv.attention_backward, _backward)):
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
