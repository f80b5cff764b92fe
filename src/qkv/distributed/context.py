"""Sequences that ranks hold together, as layers are told of them."""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qkv.distributed.functional import attention
from qkv.distributed.rows import rank_of, shard, unshard
from qkv.distributed.shards import Shards, check_shards
from qkv.distributed.transport import groups_of


class Context:
    """Which rows of its sequences a rank holds, and how their attention goes over all: what layers take as `across=`.

    Parameters
    ----------
    mesh : DeviceMesh
        The ranks that hold the sequences together: a dimension of the program's mesh, or two for "hybrid".
    shards : Shards
        Who holds which rows, such as `qkv.distributed.shards(length, mesh, mask)`.
    method : str
        As in `qkv.distributed.attention`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shards of another number of ranks, or a mesh that is none.

    Notes
    -----
    It is a value: a step makes one for its length and hands it to the model, which hands it to its layers. What works
    on single tokens (projections, norms, perceptrons, the embedding, the loss of a token) needs nothing of it. A loss
    that is a mean over all tokens is each rank's sum divided by the tokens of all ranks; a parameter's gradient is then
    the sum over ranks, with nothing divided.

    Examples
    --------
    In a program that torchrun started::

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))["context"]
        across = qkv.distributed.Context(mesh, qkv.distributed.shards(tokens.shape[1], mesh, qkv.causal()))
        x = embed(across.shard(tokens))                     # (B, rows, dim)
        for layer in layers:
            x = x + layer(x, mask=qkv.causal(), across=across)
    """

    def __init__(self, mesh: DeviceMesh, shards: Shards, *, method: str | None = None) -> None:
        call = "qkv.distributed.Context()"
        groups = groups_of(call, mesh)
        check_shards(call, "shards", shards, prod(group.size for group in groups))
        self.rank = rank_of(groups)
        self.mesh, self.shards, self.method = mesh, shards, method

    @property
    def length(self) -> int:
        """Rows of the whole sequence."""
        return self.shards.length

    @cached_property
    def positions(self) -> Tensor:
        """Where this rank's rows stand in the sequence, int64 (rows,)."""
        return self.shards.positions(self.rank)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's rows of what all ranks have, such as tokens (B, L): `qkv.distributed.shard`.

        Parameters
        ----------
        x : Tensor
        dim : int

        Returns
        -------
        Tensor
        """
        return shard(x, self.shards, self.mesh, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rows of all ranks in order, on each of them: `qkv.distributed.unshard`.

        Parameters
        ----------
        x : Tensor
        dim : int

        Returns
        -------
        Tensor
        """
        return unshard(x, self.shards, self.mesh, dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        """`qkv.distributed.attention` of this rank's rows.

        Parameters
        ----------
        q, k, v, mask, **options
            As there.

        Returns
        -------
        Tensor
        """
        return attention(q, k, v, mask, mesh=self.mesh, shards=self.shards, method=self.method, **options)

    def __repr__(self) -> str:
        return f"Context(rank {self.rank} of {self.shards.ranks}, {self.shards!r})"
