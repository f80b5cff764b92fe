"""Rows handed out to ranks and gathered from them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from qkv.checks import shown
from qkv.distributed.agreement import Told, agree_again, agree_once, together
from qkv.distributed.shards import Shards, check_shards
from qkv.distributed.transport import Group, check_device, groups_of
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError


def shard(x: Tensor, shards: Shards, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """This rank's rows of a tensor that every rank has.

    Parameters
    ----------
    x : Tensor
        The whole sequence in dimension `dim`.
    shards : Shards
        Who holds which rows.
    mesh : DeviceMesh
        The ranks; of two dimensions in row-major order.
    dim : int
        2 for q, k and v; 1 for a model's inputs (B, L).

    Returns
    -------
    Tensor
        A view where the rank's rows are one range, else a copy. Differentiable.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shards of another length, or of another number of ranks.

    Notes
    -----
    Nothing is sent.

    Examples
    --------
    >>> import torch, qkv
    >>> x = torch.arange(8)
    >>> qkv.distributed.Shards.zigzag(8, 2).take(x, 0, dim=0)  # what rank 0 of 2 gets
    tensor([0, 1, 6, 7])
    """
    call = "qkv.distributed.shard()"
    groups = groups_of(call, mesh)
    dim = _checked(call, x, shards, groups, dim)
    return shards.take(x, rank_of(groups), dim)


def unshard(x: Tensor, shards: Shards, mesh: DeviceMesh, dim: int = 2) -> Tensor:
    """The whole tensor, on every rank, of the rows that each holds.

    Parameters
    ----------
    x : Tensor
        The rank's own rows in dimension `dim`; the other sizes and the dtype are the same on all ranks.
    shards, mesh, dim
        As for `shard`.

    Returns
    -------
    Tensor
        Rows in the order of the sequence. Differentiable: a rank's gradient is the sum over ranks of the gradients that
        their copies got, in the order of ranks.

    Raises
    ------
    ShapeError, ArgumentError, ArgumentTypeError
        Other rows than the shards say.
    RankError
        A rank is gone, or too slow for the group's timeout.

    Notes
    -----
    Cost: every rank receives all rows. Where ranks hold unequally many, as many as the one with the most.

    Examples
    --------
    >>> import torch, qkv
    >>> shards = qkv.distributed.Shards.zigzag(8, 2)
    >>> parts = [shards.take(torch.arange(8), rank, dim=0) for rank in range(2)]
    >>> shards.put(parts, dim=0)  # what every rank gets
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    call = "qkv.distributed.unshard()"
    groups = groups_of(call, mesh)
    with together(groups):
        dim = _checked(call, x, shards, groups, dim, own=True)
        for group in groups:
            check_device(call, group, x)
        others = (*x.shape[:dim], "rows", *x.shape[dim + 1 :])
        learns = torch.is_grad_enabled() and x.requires_grad
        told = Told.of(f"unshard x {others} {x.dtype} gradients={learns} shards={shards.ranges}")
    agree_once(groups, told)
    for group in groups:
        group.connect(x.device)
    whole: Tensor = _Unshard.apply(groups, shards, dim, x)
    return whole


class _Unshard(Function):
    @staticmethod
    def forward(ctx: Any, groups: tuple[Group, ...], shards: Shards, dim: int, x: Tensor) -> Tensor:
        ctx.groups, ctx.shards, ctx.dim = groups, shards, dim
        return gathered(groups, shards, dim, x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d: Tensor) -> Any:
        groups, shards, dim = ctx.groups, ctx.shards, ctx.dim
        agree_again(groups[0])
        wide = torch.float64 if d.dtype == torch.float64 else torch.float32
        ranks = range(shards.ranks)
        found = [shards.take(d, rank, dim) for rank in ranks]  # what this rank has for each
        # In row-major order: first to the ranks' row of the mesh, then to the rank in it.
        for group in groups:
            each = len(ranks) // group.size
            blocks = [torch.cat(found[n * each : (n + 1) * each], dim) for n in range(group.size)]
            ranks = ranks[group.rank * each : (group.rank + 1) * each]
            got = group.swap("sums of gradients", blocks, [blocks[group.rank].shape] * group.size)
            total = got[0].to(wide)
            for x in got[1:]:
                total = total + x
            found = list(total.to(d.dtype).split([shards.rows(rank) for rank in ranks], dim))
        return None, None, None, found[0]


def gathered(groups: tuple[Group, ...], shards: Shards, dim: int, x: Tensor) -> Tensor:
    """All rows in order, from each rank's own."""
    most = max((shards.rows(rank) for rank in range(shards.ranks)), default=0)
    size = list(x.shape)
    size[dim] = most
    padded = x.new_zeros(size)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    found = padded[None]
    for group in reversed(groups):
        found = torch.cat(group.gather("gathering rows", found))
    return shards.put([part.narrow(dim, 0, shards.rows(rank)) for rank, part in enumerate(found)], dim)


def rank_of(groups: tuple[Group, ...]) -> int:
    """The rank's number in row-major order of the mesh."""
    rank = 0
    for group in groups:
        rank = rank * group.size + group.rank
    return rank


def _checked(call: str, x: Any, shards: Any, groups: tuple[Group, ...], dim: Any, own: bool = False) -> int:
    check_shards(call, "shards", shards, prod(group.size for group in groups))
    if not isinstance(x, Tensor):
        raise ArgumentTypeError.of(call, "x must be a tensor", shown(x), "Pass the rows as a tensor")
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        given = f"dim={shown(dim)} and x {tuple(x.shape)}"
        raise ArgumentError.of(call, "dim must be a dimension of x", given, "Pass the one that counts rows")
    rank, dim = rank_of(groups), dim % x.dim()
    want = shards.rows(rank) if own else shards.length
    if x.shape[dim] != want:
        rule = "x must hold the rank's own rows" if own else "x must hold the whole sequence"
        given = f"x {tuple(x.shape)}, dim={dim} and shards of {want} rows" + (f" on rank {rank}" if own else "")
        raise ShapeError.of(call, rule, given, "Make the shards with qkv.distributed.shards(length, mesh, mask=mask)")
    return int(dim)
