"""Blocks of keys by their mean, minimum and maximum: of tensors, and of a cache's view."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.call.keys import KVView
from qkv.checks import integer, no_tensor, shown
from qkv.errors import ShapeError


class Summaries(NamedTuple):
    """The mean, minimum and maximum of each full block of keys; made by `block_summaries` and `Cache.summaries`."""

    mean: Tensor  # (B, Hkv, blocks, D), float32, float64 for keys in float64
    minimum: Tensor
    maximum: Tensor
    block: int  # keys of a block
    full: tuple[int, ...]  # blocks of each batch row that have a summary; the others are 0


def block_summaries(k: Tensor, block: int) -> Summaries:
    """The mean, minimum and maximum of each full block of keys: what `select_blocks` looks at.

    Parameters
    ----------
    k : Tensor, shape (B, Hkv, Lk, D)
    block : int >= 1
        Keys of a block.

    Returns
    -------
    Summaries
        mean, minimum and maximum, (B, Hkv, Lk // block, D), float32, or float64 for keys in float64; block; and `full`,
        how many blocks each batch row has. The keys after the last full block have none.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        k is no tensor of four dimensions, or another block.

    Notes
    -----
    Cost: the keys are read once, or as often as torch's mean, amin and amax do. They have no gradient: selection has
    none. Caches keep them as keys are appended: `PagedCache(summaries=64, ...)`.

    Examples
    --------
    >>> import torch, qkv
    >>> found = qkv.block_summaries(torch.arange(10.0).view(1, 1, 5, 2), 2)
    >>> found.mean[0, 0], found.maximum[0, 0], found.full
    (tensor([[1., 2.],
            [5., 6.]]), tensor([[2., 3.],
            [6., 7.]]), (2,))
    """
    call = "qkv.block_summaries()"
    if not isinstance(k, Tensor):
        raise no_tensor(call, "k", k, "Pass keys (B, Hkv, Lk, D)")
    if k.ndim != 4:
        raise ShapeError.of(call, "k must be (B, Hkv, Lk, D)", shown(k), "Add dimensions of size 1 for B and Hkv")
    block = integer(call, "block", block, low=1)
    n = k.shape[2] // block
    with torch.no_grad():
        return Summaries(*summarised(k.detach()[:, :, : n * block].unflatten(2, (n, block))), block, (n,) * len(k))


def summarised(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, minimum and maximum over dimension -2 of keys, as float32 at least."""
    keys = keys if keys.dtype == torch.float64 else keys.to(torch.float32)
    if 0 in keys.shape:  # amin refuses sizes of 0
        nothing = keys.new_zeros((*keys.shape[:-2], keys.shape[-1]))
        return nothing, nothing, nothing
    return keys.mean(-2), keys.amin(-2), keys.amax(-2)


def full_blocks(view: KVView, block: int) -> tuple[int, ...]:
    """How many blocks of each sequence of a view are full."""
    return tuple([length // block for length in view.layout.lengths])


def places_of(view: KVView, i: int, block: int) -> tuple[Tensor, int]:
    """Where the summaries of sequence i's full blocks lie, counted over all pages; -1 where keys were given back.

    And the first of these, where they follow each other; else -1. All layers of a step have them in common.
    """
    known = view.layout.placed.get((i, block, view.k.shape[2]))
    if known is None:
        places = _places(view, i, block)
        first, n = int(places[0]) if places.numel() else -1, places.numel()
        if first >= 0 and not torch.equal(places, torch.arange(first, first + n, dtype=torch.int64, device="cpu")):
            first = -1
        known = view.layout.placed[i, block, view.k.shape[2]] = places, first
    return known


def _places(view: KVView, i: int, block: int) -> Tensor:
    layout, each = view.layout, view.k.shape[2] // block
    n = layout.lengths[i] // block
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    first = layout.starts[i] * layout.tables.itemsize
    pages = torch.frombuffer(layout.tables, dtype=torch.int32, count=-(-n // each), offset=first).to(torch.int64)
    if each == 1:
        return pages
    blocks = pages[:, None] * each + torch.arange(each, device="cpu")
    return torch.where(pages[:, None] < 0, -1, blocks).flatten()[:n]


def summaries_of(view: KVView) -> Summaries:
    """Copies of what a cache keeps for the sequences of a view."""
    kept = view.summaries
    assert kept is not None
    full = full_blocks(view, kept.block)
    found = []
    for x in kept[:3]:
        assert isinstance(x, Tensor)
        flat = x.flatten(1, 2)
        to = flat.new_zeros((len(full), flat.shape[0], max(full, default=0), flat.shape[2]))
        for i, n in enumerate(full):
            at = places_of(view, i, kept.block)[0].to(flat.device)
            to[i, :, :n] = torch.where(at[:, None] < 0, 0, flat[:, at.clamp(min=0)])
        found.append(to)
    return Summaries(found[0], found[1], found[2], kept.block, full)
